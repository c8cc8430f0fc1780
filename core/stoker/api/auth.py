"""API keys. Once there are any, everything but ``/health`` and ``/ready`` needs one."""

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from stoker.config import ServerConfig
from stoker.errors import AuthenticationError, ConfigError

__all__ = ["KeyRing", "load_keys"]

_OPEN_PATHS = {"/health", "/ready"}


def load_keys(config: ServerConfig) -> list[str]:
    """The keys of the configuration and of its file.

    Raises:
        ConfigError: The file cannot be read or is empty, or a key cannot be sent in a header.
    """
    keys = list(config.api_keys)
    _check_keys(keys, "server.api_keys")
    if config.api_keys_file is None:
        return keys
    where = f"server.api_keys_file: {config.api_keys_file}"
    try:
        text = Path(config.api_keys_file).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    from_file = [line for line in lines if line]
    if not from_file:
        raise ConfigError(f"{where} holds no key; write one on each line")
    _check_keys(from_file, where)
    return keys + from_file


def _check_keys(keys: Iterable[str], where: str) -> None:
    for number, key in enumerate(keys, start=1):
        if not key or not all("!" <= character <= "~" for character in key):
            raise ConfigError(
                f"{where}: key {number} is empty or holds something other than printable ASCII "
                "without spaces, which no client could send"
            )


class KeyRing:
    """The keys that open the API, kept as digests.

    Args:
        keys: Without any, everything is open.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def check(self, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Let a request pass, or not.

        Args:
            path: The path of the request, as it came.
            headers: Its headers, with lower-case names.

        Raises:
            AuthenticationError: It has no key, or a wrong one.
        """
        if not self._digests or path in _OPEN_PATHS:
            return
        presented = _presented(headers)
        if presented is None:
            raise AuthenticationError(
                "an API key is required; send it as 'Authorization: Bearer KEY'"
            )
        digest = hashlib.sha256(presented).digest()
        is_known = False
        for known in self._digests:  # all of them: the time must not tell which one
            is_known |= hmac.compare_digest(digest, known)
        if not is_known:
            raise AuthenticationError("the API key is wrong")


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key of a request: of the first ``Authorization: Bearer``, else of ``x-api-key``."""
    other = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer" and key.strip():
                return key.strip()
        elif name == b"x-api-key" and value.strip() and other is None:
            other = value.strip()
    return other
