"""Reads and checks legacy GGML files: header, vocabulary and the directory of tensors, no weights.

ctransformers checks next to nothing: it leaves weights that a truncated file lacks uninitialised, computes
nonsense from old quantisations, and dies of headers that make no sense. So all that is checked here.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import msgspec

from stoker import ModelError
from stoker_backend_ctransformers.architectures import ARCHITECTURES, Architecture

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import BinaryIO

__all__ = ["GGUF_MAGIC", "MAGICS", "LegacyFile", "read_file"]

MAGICS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"ccgg": "ggcc"}
"""The first four bytes of such files; the names are written as little-endian numbers."""
GGUF_MAGIC = b"GGUF"

# enum ggml_type -> (elements of a block, its bytes)
_TYPES = {
    0: (1, 4),  # f32
    1: (1, 2),  # f16
    2: (32, 18),  # q4_0
    3: (32, 20),  # q4_1
    6: (32, 22),  # q5_0
    7: (32, 24),  # q5_1
    8: (32, 34),  # q8_0
    10: (256, 84),  # q2_K
    11: (256, 110),  # q3_K
    12: (256, 144),  # q4_K
    13: (256, 176),  # q5_K
    14: (256, 210),  # q6_K
}
_FLOATS = (0, 1)
_VERSION_FACTOR, _VERSION = (
    1000,
    2,
)  # ftype holds the version of the quantisation: 2002 is q4_0 of version 2
_MAX_FIELD, _MAX_NAME, _MAX_TOKEN, _MAX_LAYERS = 2**27, 256, 4096, 1024


class _UnreadableError(Exception):
    """The file is not of the layout that it is read with.

    Args:
        reason: Why not.
        num_found: How many of its tensors are there all the same.
    """

    def __init__(self, reason: str, num_found: int = 0) -> None:
        super().__init__(reason)
        self.num_found = num_found


class _UnusableError(Exception):
    """It is of the layout, and cannot be used all the same."""


class LegacyFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says about its model.

    Attributes:
        architecture: Its architecture.
        magic: ``ggml``, ``ggmf``, ``ggjt`` or ``ggcc``.
        version: Of the file format; 0 for ``ggml``.
        header: The header's numbers.
        tokens: The bytes of each token.
        weights_bytes: Size of the weights in memory.
        mapped: Whether ctransformers maps it, so that instances share the weights.
    """

    architecture: Architecture
    magic: str
    version: int
    header: dict[str, float]
    tokens: tuple[bytes, ...]
    weights_bytes: int
    mapped: bool

    def __getitem__(self, field: str) -> int:
        return int(self.header[field])

    def kv_bytes(self, context_length: int) -> int:
        """Bytes of the KV memory of one instance."""
        width = self["n_embd"]
        if "n_head_kv" in self.header and self["n_head_kv"]:
            width = width // self["n_head"] * self["n_head_kv"]
        return 2 * self["n_layer"] * context_length * width * self.architecture.kv_element_bytes


def read_file(path: Path, wanted: Sequence[str] = ()) -> LegacyFile:
    """Read a file and check that it is complete.

    Args:
        path: The file.
        wanted: Architectures to try, the likeliest first; by default all.

    Raises:
        ModelError: It is not such a file, is truncated, is of an old kind that is computed wrongly, or is
            of none of these architectures.
    """
    try:
        with path.open("rb") as file:
            return _read(path, file, path.stat().st_size, wanted or tuple(ARCHITECTURES))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from error


def _read(path: Path, file: BinaryIO, size: int, wanted: Sequence[str]) -> LegacyFile:
    start = file.read(4)
    if start == GGUF_MAGIC:
        raise ModelError(
            f"{path} is a GGUF file; the backend gguf serves it: pip install stoker-backend-gguf"
        )
    magic = MAGICS.get(start)
    if magic is None:
        raise ModelError(f"{path} is no legacy GGML file: it begins with {start!r}")
    reasons: list[tuple[int, int, str]] = []
    for name in wanted:
        reader = _Reader(file, size)
        try:
            return _read_as(ARCHITECTURES[name], magic, reader)
        except _UnreadableError as error:
            reasons.append((error.num_found, reader.position, f"{error} (read as {name})"))
        except _UnusableError as error:
            raise ModelError(f"{path} {error}") from error
    # The layout that explains most of the file is its own; what ended that is what is wrong.
    likeliest = max(reasons, key=lambda reason: reason[:2])
    raise ModelError(
        f"{path} cannot be used: {likeliest[2]}; it is damaged or incomplete, or of an architecture "
        f"that ctransformers does not know (set the option model_type; known: {', '.join(ARCHITECTURES)})"
    )


class _Reader:
    """A file, read from its fifth byte on; whatever reaches beyond its end is an error."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.position = 4
        file.seek(4)

    @property
    def at_end(self) -> bool:
        return self.position >= self._size

    def bytes(self, count: int) -> bytes:
        self._advance(count)
        return self._file.read(count)

    def numbers(self, form: str) -> tuple[float, ...]:
        return struct.unpack("<" + form, self.bytes(struct.calcsize("<" + form)))

    def count(self, most: int, what: str) -> int:
        (value,) = self.numbers("I")
        if value > most:
            raise _UnreadableError(f"{what} {int(value):,} makes no sense")
        return int(value)

    def skip(self, count: int, align: int = 1) -> None:
        """Skip to a multiple of ``align``, and ``count`` bytes more."""
        self._advance(-self.position % align + count)
        self._file.seek(self.position)

    def _advance(self, count: int) -> None:
        if self.position + count > self._size:
            raise _UnreadableError(f"it ends after {self._size:,} bytes, in the middle of its data")
        self.position += count


def _read_as(architecture: Architecture, magic: str, reader: _Reader) -> LegacyFile:
    if (magic == "ggml") == architecture.spm:  # llama's first files were "ggml", without scores
        raise _UnreadableError(f"ctransformers reads no {magic} files of this architecture")
    version = 0 if magic == "ggml" else reader.count(100, "format version")
    header = _read_header(architecture, reader)
    if magic == "ggcc":
        header["n_merges"] = reader.count(_MAX_FIELD, "number of merges")
    if architecture.repeats_vocab_size and reader.count(_MAX_FIELD, "size") != header["n_vocab"]:
        raise _UnreadableError("its vocabulary is not as large as its header says")
    tokens = _read_tokens(architecture, reader, int(header["n_vocab"]), scores=version > 0)
    if magic == "ggcc":
        for _ in range(2 * reader.count(_MAX_FIELD, "number of merges")):
            reader.skip(reader.count(_MAX_TOKEN, "length of a merge"))
    aligned = magic in {"ggjt", "ggcc"}
    sizes, quantised = _read_tensors(reader, 32 if aligned else 1)
    _check_tensors(architecture, sizes, int(header["n_layer"]))
    if quantised:
        _check_quantisation(architecture, header, magic, version)
    weights = sum(sizes.values())
    if "model/wte" in sizes and "model/lm_head" not in sizes:
        weights += sizes["model/wte"]  # ctransformers copies it
    return LegacyFile(
        architecture=architecture,
        magic=magic,
        version=version,
        header=header,
        tokens=tokens,
        weights_bytes=weights,
        mapped=architecture.spm,
    )


def _read_header(architecture: Architecture, reader: _Reader) -> dict[str, float]:
    header: dict[str, float] = {}
    for field in architecture.fields:
        name = architecture.renamed.get(field, field)
        if field in architecture.float_fields:
            (header[name],) = reader.numbers("f")
            continue
        header[name] = reader.count(_MAX_FIELD, field)
        if header[name] == 0 and name in {"n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"}:
            raise _UnreadableError(f"{field} is 0")
    if header["n_layer"] > _MAX_LAYERS or header["n_embd"] % header["n_head"]:
        raise _UnreadableError(
            f"{header['n_layer']:,} layers and {header['n_head']:,} heads of a width of "
            f"{header['n_embd']:,} make no sense"
        )
    return header


def _read_tokens(
    architecture: Architecture, reader: _Reader, count: int, *, scores: bool
) -> tuple[bytes, ...]:
    tokens = []
    for _ in range(count):
        token = reader.bytes(reader.count(_MAX_TOKEN, "length of a token"))
        if scores:
            reader.skip(4)
        if architecture.utf8_tokens:
            try:
                token = bytes(ord(char) & 255 for char in token.decode())
            except UnicodeDecodeError as error:
                raise _UnreadableError("a token is not UTF-8") from error
        tokens.append(token)
    return tuple(tokens)


def _read_tensors(reader: _Reader, align: int) -> tuple[dict[str, int], bool]:
    """The size of each tensor by its name, and whether one is quantised."""
    sizes: dict[str, int] = {}
    quantised = False
    while not reader.at_end:
        num_dims = reader.count(2, "number of a tensor's dimensions")
        name_bytes = reader.count(_MAX_NAME, "length of a tensor's name")
        kind = reader.count(100, "type of a tensor")
        elements = 1
        for _ in range(num_dims):
            elements *= reader.count(_MAX_FIELD, "dimension")
        name = reader.bytes(name_bytes).decode("utf-8", "replace")
        if kind not in _TYPES:
            raise _UnreadableError(f"the tensor {name!r} has the unknown type {kind}")
        if not num_dims or not elements or elements % _TYPES[kind][0]:
            raise _UnreadableError(f"the tensor {name!r} has an impossible shape")
        sizes[name] = elements // _TYPES[kind][0] * _TYPES[kind][1]
        reader.skip(sizes[name], align)
        quantised = quantised or kind not in _FLOATS
    return sizes, quantised


def _check_tensors(architecture: Architecture, sizes: dict[str, int], num_layers: int) -> None:
    expected = architecture.expected(num_layers)
    missing = sorted(expected - sizes.keys())
    if missing:
        raise _UnreadableError(
            f"it lacks {len(missing)} tensors, such as {missing[0]!r}", len(expected) - len(missing)
        )
    if (
        architecture.layer_tensors is None
    ):  # varies within the architecture; ctransformers checks it
        return
    unknown = sorted(sizes.keys() - expected - architecture.optional)
    if unknown:
        raise _UnreadableError(
            f"it has {len(unknown)} unknown tensors, such as {unknown[0]!r}", len(expected)
        )


def _check_quantisation(
    architecture: Architecture, header: dict[str, float], magic: str, version: int
) -> None:
    """The layout of quantised blocks changed in 2023, twice; only the last one is computed rightly."""
    found = int(header["ftype"]) // _VERSION_FACTOR
    if not architecture.spm and found != _VERSION:
        kind = f"quantisation version {found}"
    elif architecture.spm and magic != "ggcc" and (magic, version) != ("ggjt", 3):
        kind = f"{magic} version {version}"
    else:
        return
    raise _UnusableError(
        f"is quantised in an old way ({kind}) that ctransformers does not compute rightly; "
        "make a new file from the original weights"
    )
