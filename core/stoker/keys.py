"""Keys of tenants: how they look, what is kept of them, and the file that ``stoker keys`` keeps them in.

Of a key only its SHA-256 digest is kept. A slow password hash would add nothing: a key is 256 random bits,
which nobody finds by trying, and every request would have to wait for it.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import secrets
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import msgspec

from stoker.decoding import decode
from stoker.errors import ConfigError
from stoker.tenants import ANONYMOUS, is_tenant_name

__all__ = [
    "DEFAULT_KEYS_FILE",
    "TenantKey",
    "add_key",
    "digest_of",
    "is_digest",
    "key_owner_problem",
    "new_key",
    "read_keys",
    "revoke_key",
]

DEFAULT_KEYS_FILE = "stoker-keys.toml"

_PREFIX = "sk-stoker-"
_RANDOM_BYTES = 32
_ALGORITHM = "sha256:"
_DIGEST = re.compile(rf"{_ALGORITHM}[0-9a-f]{{64}}")
_ID_LENGTH = 8
_MAX_LABEL = 100
_LOCK_TIMEOUT_S = 10.0
_HEAD = (
    "# Keys of tenants, kept by `stoker keys`; only digests, no key can be made out of them.\n"
    "# Entries may be edited by hand; comments are lost when the file is written again.\n"
)


class TenantKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is kept of a key.

    Attributes:
        tenant: Whose it is.
        digest: ``sha256:`` and 64 hex digits.
        label: What its owner calls it.
        created: When it was made.
    """

    tenant: str
    digest: str
    label: str = ""
    created: datetime.date | None = None

    @property
    def id(self) -> str:
        """What ``stoker keys`` calls it: the start of its digest."""
        return self.digest.removeprefix(_ALGORITHM)[:_ID_LENGTH]


def new_key() -> str:
    """A fresh random key."""
    return _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def digest_of(key: str | bytes) -> str:
    """What is kept of a key: ``sha256:`` and 64 hex digits."""
    raw = key.encode() if isinstance(key, str) else key
    return _ALGORITHM + hashlib.sha256(raw).hexdigest()


def is_digest(text: str) -> bool:
    """Whether ``text`` is what ``digest_of`` gives."""
    return _DIGEST.fullmatch(text) is not None


def key_owner_problem(tenant: str) -> str | None:
    """Why ``tenant`` cannot have keys; ``None`` if it can."""
    if tenant == ANONYMOUS:
        return f"{ANONYMOUS!r} is whoever has no key"
    if not is_tenant_name(tenant):
        return "a tenant's name has letters, digits and ._- only, 64 at most"
    return None


# --------------------------------------------------------------------------- the file


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: list[TenantKey] = []


def read_keys(path: Path) -> list[TenantKey]:
    """The entries of a file of keys, in its order.

    Raises:
        ConfigError: It is missing, cannot be read, or an entry is wrong; the message names the file and the
            entry, but never shows what might be a key.
    """
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the file of tenants' keys cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    keys = decode(tree, _File, origin=str(path)).keys
    owners: dict[str, str] = {}
    for index, key in enumerate(keys):
        problem = _problem(key, owners)
        if problem:
            raise ConfigError(f"keys[{index}].{problem} (from {path})")
        owners[key.digest] = key.tenant
    return keys


def _problem(key: TenantKey, owners: dict[str, str]) -> str | None:
    if problem := key_owner_problem(key.tenant):
        return f"tenant: {problem}"
    if not is_digest(key.digest):
        return (
            "digest: must be 'sha256:' and 64 lower-case hex digits; `stoker keys new` makes keys"
        )
    if owners.get(key.digest, key.tenant) != key.tenant:
        return f"digest: the same key belongs to {owners[key.digest]!r} already"
    if problem := _label_problem(key.label):
        return f"label: {problem}"
    return None


def _label_problem(label: str) -> str | None:
    if len(label) > _MAX_LABEL or not label.isprintable():
        return f"must be at most {_MAX_LABEL} printable characters"
    return None


def add_key(path: Path, tenant: str, label: str, created: datetime.date) -> tuple[str, TenantKey]:
    """Make a key and put its digest into the file, which is created if there is none.

    Args:
        path: The file.
        tenant: Whose the key will be.
        label: What to call it; may be empty.
        created: Today.

    Returns:
        The key, which nobody can get back later, and what is kept of it.

    Raises:
        ConfigError: The tenant or the label cannot be used, or the file cannot be read or written.
    """
    if problem := key_owner_problem(tenant):
        raise ConfigError(f"{tenant!r} cannot have a key: {problem}")
    if problem := _label_problem(label):
        raise ConfigError(f"the name of a key {problem}")
    key = new_key()
    entry = TenantKey(tenant=tenant, digest=digest_of(key), label=label, created=created)
    _edit(path, lambda entries: [*entries, entry])
    return key, entry


def revoke_key(path: Path, key_id: str) -> TenantKey:
    """Take a key out of the file.

    Args:
        path: The file.
        key_id: Its id, or more of its digest.

    Returns:
        What was kept of it.

    Raises:
        ConfigError: No key, or more than one, has that id, or the file cannot be read or written.
    """
    wanted = key_id.lower().removeprefix(_ALGORITHM)
    removed: list[TenantKey] = []

    def without(entries: list[TenantKey]) -> list[TenantKey]:
        found = [e for e in entries if e.digest.removeprefix(_ALGORITHM).startswith(wanted)]
        digests = sorted({entry.digest for entry in found})
        if len(wanted) < _ID_LENGTH or not digests:
            raise ConfigError(
                f"{path} has no key with the id {key_id!r}; `stoker keys list` shows them all"
            )
        if len(digests) > 1:
            raise ConfigError(
                f"{len(digests)} keys have the id {key_id!r}; give more of the digest: "
                + ", ".join(digests)
            )
        removed.append(found[0])
        return [entry for entry in entries if entry.digest != digests[0]]

    if not path.exists():  # or the edit would create it
        raise ConfigError(f"{path}: there is no such file of tenants' keys")
    _edit(path, without)
    return removed[0]


def _edit(path: Path, change: Callable[[list[TenantKey]], list[TenantKey]]) -> None:
    """Replace the file's entries, atomically and one editor at a time.

    The new content is written to ``FILE.lock``, which only one process can create, and renamed: whoever
    reads sees the old or the new entries, and no two writers start from the same ones.
    """
    path = path.expanduser().resolve()  # a link stays a link
    lock = path.with_name(f"{path.name}.lock")
    try:
        with _exclusive(lock) as file:
            entries = change(read_keys(path) if path.exists() else [])
            file.write("\n".join([_HEAD, *map(_toml, entries)]))
            file.flush()
            os.fsync(file.fileno())
            lock.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error}") from error


@contextlib.contextmanager
def _exclusive(lock: Path) -> Iterator[IO[str]]:
    """A new file that only the owner may read; it is gone afterwards, unless it was renamed."""
    give_up_s = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            break
        except FileExistsError:
            if time.monotonic() > give_up_s:
                raise ConfigError(
                    f"{lock} exists, so another `stoker keys` seems to be writing; "
                    "delete it if none is"
                ) from None
            time.sleep(0.02)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
    except BaseException:
        lock.unlink(missing_ok=True)
        raise


def _toml(key: TenantKey) -> str:
    """An entry as TOML; JSON's escapes are TOML's, too."""
    fields: Iterable[tuple[str, str]] = (
        ("tenant", msgspec.json.encode(key.tenant).decode()),
        ("digest", msgspec.json.encode(key.digest).decode()),
        ("label", msgspec.json.encode(key.label).decode() if key.label else ""),
        ("created", key.created.isoformat() if key.created else ""),
    )
    return "[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in fields if value)
