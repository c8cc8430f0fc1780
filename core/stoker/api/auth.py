"""Who is asking. Once there are API keys, everything but ``/health`` and ``/ready`` needs one."""

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path

from stoker.config import Config, ServerConfig
from stoker.errors import (
    AuthenticationError,
    ConfigError,
    InvalidRequestError,
    PermissionDeniedError,
)
from stoker.keys import digest_of, read_keys
from stoker.tenants import ANONYMOUS, DEFAULT_TENANT, is_tenant_name

__all__ = ["TENANT_HEADER", "KeyRing", "load_keys"]

TENANT_HEADER = "x-stoker-tenant"
"""Where a trusted proxy says for which tenant it asks."""

_OPEN_PATHS = {"/health", "/ready"}

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def load_keys(config: ServerConfig) -> list[str]:
    """The keys of the tenant ``default``: those of the configuration and of its file.

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


def _owners(config: Config) -> dict[str, str]:
    """The digest of every key there is, with its tenant."""
    owners: dict[str, str] = {}

    def add(digest: str, tenant: str, where: str) -> None:
        if owners.setdefault(digest, tenant) != tenant:
            raise ConfigError(
                f"{where}: a key of {tenant!r} is also a key of {owners[digest]!r}; revoke one of them"
            )

    for key in load_keys(config.server):
        add(digest_of(key), DEFAULT_TENANT, "server.api_keys")
    for index, tenant in enumerate(config.tenants):
        for digest in tenant.keys:
            add(digest, tenant.name, f"tenants[{index}].keys")
    file = config.server.tenant_keys_file
    if file is not None:
        where = f"server.tenant_keys_file: {file}"
        path = Path(file).expanduser()
        if not path.exists():
            raise ConfigError(
                f"{where}: there is no such file; `stoker keys new TENANT` makes it with its first key"
            )
        for entry in read_keys(path):
            add(entry.digest, entry.tenant, where)
    return owners


class KeyRing:
    """Whose keys open the API, and whose word on tenants is taken. Immutable; ``load`` makes another.

    Args:
        owners: Digest of a key (``sha256:...``) -> its tenant.
        proxies: Networks whose clients may name the tenant themselves.
        is_required: Ask for a key even if there is none, so that nobody gets in.

    Attributes:
        is_required: Whether a key is asked for.
    """

    def __init__(
        self,
        owners: Mapping[str, str] | None = None,
        proxies: Iterable[Network] = (),
        *,
        is_required: bool = False,
    ) -> None:
        pairs = (owners or {}).items()
        self._owners = {bytes.fromhex(digest.partition(":")[2]): owner for digest, owner in pairs}
        self._proxies = tuple(proxies)
        self.is_required = is_required or bool(self._owners)

    @classmethod
    def load(cls, config: Config, *, was_required: bool = False) -> "KeyRing":
        """The keys of a configuration and of its files.

        Args:
            config: The configuration.
            was_required: Keys were asked for until now: that they are all gone must not open the server.

        Raises:
            ConfigError: A file cannot be used, or a key belongs to two tenants.
        """
        return cls(
            _owners(config),
            map(ipaddress.ip_network, config.server.trusted_proxies),
            # A file of keys shows that keys are wanted, also when the last one was revoked.
            is_required=was_required or config.server.tenant_keys_file is not None,
        )

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._owners)

    def identify(
        self, path: str, headers: Iterable[tuple[bytes, bytes]], client_host: str | None
    ) -> str:
        """Let a request pass, or not.

        Args:
            path: The path of the request, as it came.
            headers: Its headers, with lower-case names.
            client_host: The address at the other end of the connection; ``None`` if it has none.

        Returns:
            The tenant that asks: whose the key is, or the one that a trusted proxy names.

        Raises:
            AuthenticationError: It has no key, or a wrong one.
            PermissionDeniedError: It names a tenant and is no trusted proxy.
            InvalidRequestError: A trusted proxy names something that is no tenant.
        """
        if path in _OPEN_PATHS:
            return ANONYMOUS
        headers = list(headers)
        tenant = self._owner_of_key(headers) if self.is_required else ANONYMOUS
        named = [value for name, value in headers if name == TENANT_HEADER.encode()]
        if not named:
            return tenant
        if not self._trusts(client_host):
            raise PermissionDeniedError(
                f"{TENANT_HEADER} is taken from trusted proxies only, and {client_host or 'this client'} "
                "is none; leave it out, or add the proxy's address to [server] trusted_proxies"
            )
        return _tenant_named(named)

    def _owner_of_key(self, headers: Iterable[tuple[bytes, bytes]]) -> str:
        presented = _presented(headers)
        if presented is None:
            raise AuthenticationError(
                "an API key is required; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            )
        # How long the look-up takes may tell something of digests, but nothing of keys: to use it one
        # would have to find keys whose digests begin as wanted, and would still know none.
        owner = self._owners.get(hashlib.sha256(presented).digest())
        if owner is None:
            raise AuthenticationError("the API key is wrong")
        return owner

    def _trusts(self, host: str | None) -> bool:
        if not self._proxies or host is None:
            return False
        try:
            address = ipaddress.ip_address(host)
        except ValueError:  # a name, not an address
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped  # how IPv4 clients look on a socket for both
        return any(address in network for network in self._proxies)


def _tenant_named(values: list[bytes]) -> str:
    name = values[0].decode("latin-1").strip()
    if len(values) > 1 or not is_tenant_name(name):
        raise InvalidRequestError(
            f"{TENANT_HEADER} must be given once, with a tenant's name: letters, digits and ._- only, "
            "64 at most",
            param=TENANT_HEADER,
        )
    return name


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
