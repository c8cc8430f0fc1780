"""Reads the header of a GGUF file in pure Python, and refuses what llama.cpp could not load.

A GGUF file is: magic, version, number of tensors, number of metadata pairs; the pairs; a description of
each tensor; padding; the tensors' data. See docs/gguf.md in the repository of ggml.
"""

from __future__ import annotations

import dataclasses
import mmap
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker import ModelError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MAGIC", "GgufHeader", "check_files", "read_header"]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_KEPT_ARRAY = 65_536
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
# Metadata value types of fixed size, as struct codes.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
# ggml's tensor types: (elements of a block, bytes of a block).
TENSOR_TYPES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),
    22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8),
    29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
    42: (64, 18),
}  # fmt: skip
_SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the header says.

    Attributes:
        metadata: Scalars, strings, and short arrays of numbers (as tuples) by key; other arrays are
            left out.
        num_tensors: Tensors in this file.
        tensor_types: Their types, as ggml numbers them.
        data_bytes: Bytes of tensor data in this file.
        expected_bytes: Least size of the file for all tensors to be whole.
    """

    metadata: dict[str, Any]
    num_tensors: int
    tensor_types: frozenset[int]
    data_bytes: int
    expected_bytes: int

    @property
    def architecture(self) -> str:
        """The model's architecture, e.g. ``llama``; empty if the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of ``<architecture>.<key>``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


class _Reader:
    """A cursor over the mapped file; running off its end raises ``struct.error``."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self.at = 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.number("Q")
        self._need(length)
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"a metadata value has the unknown type {kind}")
        return self.number(_SCALARS[kind])

    def _array(self) -> tuple[Any, ...] | None:
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            self._need(8 * count)
            length_at, data, at = struct.Struct("<Q").unpack_from, self._data, self.at
            for _ in range(count):  # one for each token of the vocabulary: keep it short
                at += 8 + length_at(data, at)[0]
            self.at = at
            self._need(0)
            return None
        if kind not in _SCALARS:
            raise ValueError(f"a metadata array has the unsupported element type {kind}")
        layout = f"<{count}{_SCALARS[kind]}" if count <= _MAX_KEPT_ARRAY else ""
        size = count * struct.calcsize(f"<{_SCALARS[kind]}")
        self._need(size)
        self.at += size
        return struct.unpack_from(layout, self._data, self.at - size) if layout else None

    def _need(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise struct.error("past the end")


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of one file.

    Raises:
        ModelError: The file is missing, not a file, empty, not GGUF, of an unsupported version,
            corrupt, or shorter than its header says.
    """
    try:
        if path.is_dir():
            inside = ", ".join(sorted(entry.name for entry in path.glob("*.gguf"))[:3])
            hint = f" (it holds {inside})" if inside else ""
            raise ModelError(f"{path} is a folder; name a GGUF file{hint}")
        with path.open("rb") as file:
            start = file.read(8)
            if not start:
                raise ModelError(f"{path} is empty")
            _check_start(path, start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _parse(path, data)
                size = len(data)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ModelError(f"cannot read the model file {path}: {reason}") from error
    if size < header.expected_bytes:
        raise ModelError(
            f"{path} is truncated: it has {size:,} of {header.expected_bytes:,} bytes; "
            "fetch it again"
        )
    return header


def check_files(path: Path) -> tuple[GgufHeader, int]:
    """Check a model's file, and its other parts if it is split.

    Returns:
        The (first) file's header, with the tensor types of all files, and the bytes of tensor data in them.

    Raises:
        ModelError: As ``read_header``; also if a part is missing or ``path`` is not the first part.
    """
    header = read_header(path)
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(f"{path} is no model: its general.type is {kind!r}")
    total = header.data_bytes
    count = int(header.metadata.get("split.count", 0))
    if count <= 1:
        return header, total
    match = _SPLIT_NAME.match(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelError(
            f"{path} is one of {count} parts of a model and must keep its name "
            f"(NAME-00001-of-{count:05}.gguf)"
        )
    parts = [
        path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise ModelError(f"{path} is one of {count} parts; missing: {', '.join(missing)}")
    if int(match["number"]) != 1:
        raise ModelError(f"{path} is not the first part of the model; name {parts[0].name}")
    others = [read_header(part) for part in parts[1:]]
    types = header.tensor_types.union(*(other.tensor_types for other in others))
    whole = dataclasses.replace(header, tensor_types=types)
    return whole, total + sum(other.data_bytes for other in others)


def _check_start(path: Path, start: bytes) -> None:
    if start[:4] != MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it starts with {start[:4]!r}, not {MAGIC!r}")
    version = int.from_bytes(start[4:], "little")
    if len(start) == 8 and version not in _VERSIONS:
        swapped = int.from_bytes(start[4:], "big")
        what = (
            "is a big-endian GGUF file" if swapped in _VERSIONS else f"has GGUF version {version}"
        )
        raise ModelError(f"{path} {what}; little-endian versions 2 and 3 can be loaded")


def _parse(path: Path, data: mmap.mmap) -> GgufHeader:
    reader = _Reader(data)
    reader.at = 8
    metadata: dict[str, Any] = {}
    end, types = 0, set()
    try:
        num_tensors, num_pairs = reader.number("Q"), reader.number("Q")
        for _ in range(num_pairs):
            key, kind = reader.string(), reader.number("I")
            value = reader.value(kind)
            if value is not None:
                metadata[key] = value
        for _ in range(num_tensors):
            kind, tensor_end = _tensor(reader)
            types.add(kind)
            end = max(end, tensor_end)
    except struct.error as error:
        raise ModelError(
            f"{path} is truncated or corrupt: its header runs past the end of the file "
            f"({len(data):,} bytes); fetch it again"
        ) from error
    except (ValueError, OverflowError) as error:
        raise ModelError(f"{path} is corrupt: {error}") from error
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ModelError(f"{path} is corrupt: its alignment is {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    expected = start + end if num_tensors else reader.at
    return GgufHeader(
        metadata=metadata,
        num_tensors=num_tensors,
        tensor_types=frozenset(types),
        data_bytes=end,
        expected_bytes=expected,
    )


def _tensor(reader: _Reader) -> tuple[int, int]:
    """The type of the tensor described next, and where its data ends, from the start of the tensor data."""
    name = reader.string()
    num_dims = reader.number("I")
    if num_dims > _MAX_DIMS:
        raise ValueError(f"tensor {name!r} has {num_dims} dimensions")
    elements = 1
    for _ in range(num_dims):
        elements *= reader.number("Q")
    kind, offset = reader.number("I"), reader.number("Q")
    # Of a type that this table does not know yet, the start is all that can be checked.
    block, size = TENSOR_TYPES.get(kind, (1, 0))
    return kind, int(offset + -(-elements // block) * size)
