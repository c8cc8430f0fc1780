"""Snapshots as files: one for each, checked before a byte of it reaches a runtime.

A file is a fixed head, a description, the token ids and the snapshot::

    magic (8 bytes) | format version | length of the description | digest of what follows up to the snapshot
    description (MessagePack) | token ids (int32, little endian) | snapshot

The digests are BLAKE2b (RFC 7693) of 128 bits, not a CRC: native code parses a snapshot without checks of its
own, there are gigabytes of them, and BLAKE2b reads about a gigabyte a second on the thread that waits for the
disk anyway. They find damage, not malice: whoever may write into the directory is trusted, so it belongs to
this user alone.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "DamagedFileError",
    "Description",
    "digest",
    "key_of",
    "read_description",
    "read_snapshot",
    "write_snapshot",
]

_MAGIC = b"STOKERKV"
_VERSION = 1
_HEAD = struct.Struct("<8sII16s")
_MAX_DESCRIPTION = 64 * 1024
_TOKEN = np.dtype("<i4")


class DamagedFileError(ValueError):
    """A file is not a whole, unchanged snapshot of this model."""


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file says of its snapshot.

    Attributes:
        fingerprint: The model and its settings.
        scope: The isolation scope, as a digest.
        tenant: Whose request computed it.
        num_tokens: Tokens it holds.
        num_block_tokens: See ``SnapshotStore.put``.
        seconds_to_make: See ``SnapshotStore.put``.
        num_bytes: Size of the snapshot.
        digest: Of the snapshot; filled in when it is written.
    """

    fingerprint: str
    scope: str
    tenant: str
    num_tokens: int
    num_block_tokens: int
    seconds_to_make: float
    num_bytes: int
    digest: bytes = b""


def digest(*parts: bytes | memoryview) -> bytes:
    """BLAKE2b of the parts, 128 bits."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(part)
    return state.digest()


def key_of(scope: str, tokens: NDArray[np.int32]) -> str:
    """What a snapshot of these tokens is known by, and its file is called after."""
    return digest(scope.encode(), b"\0", _bytes_of(tokens)).hex()


def write_snapshot(
    path: Path, description: Description, tokens: NDArray[np.int32], snapshot: bytes
) -> int:
    """Write a file, whole or not at all; returns its size.

    It is written under another name and renamed. Nothing is flushed to the disk: a file that a crash of the
    machine cuts short is found out by its length or digest.

    Raises:
        OSError: It cannot be written; nothing is left of it.
    """
    sealed = msgspec.structs.replace(description, digest=digest(snapshot))
    described = msgspec.msgpack.encode(sealed)
    ids = _bytes_of(tokens)
    head = _HEAD.pack(_MAGIC, _VERSION, len(described), digest(described, ids))
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # Only for this user: prompts can be read from tokens and KV.
        number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(number, "wb") as file:
            file.writelines((head, described, ids, snapshot))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return len(head) + len(described) + len(ids) + len(snapshot)


def read_description(path: Path, fingerprint: str) -> tuple[Description, NDArray[np.int32], int]:
    """The description, the token ids and the file's size; the snapshot itself is not read.

    Raises:
        DamagedFileError: It is no whole file of this model.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        return _read_description(file, path, fingerprint)


def read_snapshot(path: Path, fingerprint: str) -> bytes:
    """The snapshot of a file, checked.

    Raises:
        DamagedFileError: It is no whole, unchanged file of this model.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        description, _, _ = _read_description(file, path, fingerprint)
        snapshot = file.read(description.num_bytes)
    if len(snapshot) != description.num_bytes or digest(snapshot) != description.digest:
        raise DamagedFileError("the snapshot is not what was written")
    return snapshot


def _read_description(
    file: BinaryIO, path: Path, fingerprint: str
) -> tuple[Description, NDArray[np.int32], int]:
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise DamagedFileError("the file is too short")
    magic, version, length, expected = _HEAD.unpack(head)
    if magic != _MAGIC or version != _VERSION or length > _MAX_DESCRIPTION:
        raise DamagedFileError("the file has another format")
    described = file.read(length)
    try:
        description = msgspec.msgpack.decode(described, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError("the description cannot be read") from error
    size = os.fstat(file.fileno()).st_size
    num_ids = description.num_tokens * _TOKEN.itemsize
    # Before anything is allocated: the figures may be any.
    if (
        min(description.num_tokens, description.num_bytes) < 0
        or _HEAD.size + length + num_ids + description.num_bytes != size
    ):
        raise DamagedFileError("the file has another length than it says")
    ids = file.read(num_ids)
    if digest(described, ids) != expected:
        raise DamagedFileError("the description is not what was written")
    if description.fingerprint != fingerprint:
        raise DamagedFileError("the snapshot is of another model or other settings")
    tokens = np.frombuffer(ids, _TOKEN).astype(np.int32)
    if key_of(description.scope, tokens) != path.stem:
        raise DamagedFileError("the file has another name than its tokens")
    return description, tokens, size


def _bytes_of(tokens: NDArray[np.int32]) -> bytes:
    return tokens.astype(_TOKEN, copy=False).tobytes()
