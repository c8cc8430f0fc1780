"""The header reader, on small files written by hand and on the real one."""

from __future__ import annotations

import ctypes
import re
import struct

import pytest

import stoker
from stoker_backend_gguf.gguf_header import TENSOR_TYPES, check_files, read_header


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def text_pair(key: str, value: str) -> bytes:
    return string(key) + struct.pack("<I", 8) + string(value)


def int_pair(key: str, value: int) -> bytes:
    return string(key) + struct.pack("<II", 4, value)


def gguf(pairs=(), tensors=(), data=b"", version=3) -> bytes:
    """A file with these metadata pairs, (name, dims, type, offset) tensors and data."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs)
    for name, dims, kind, offset in tensors:
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data if tensors else head


@pytest.fixture
def write(tmp_path):
    def make(content: bytes, name: str = "model.gguf"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return make


def refusal(path) -> str:
    with pytest.raises(stoker.ModelError) as caught:
        check_files(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_metadata_and_sizes(write):
    pairs = [
        text_pair("general.architecture", "llama"),
        int_pair("llama.block_count", 2),
        string("llama.heads") + struct.pack("<IIQ2i", 9, 5, 2, 7, 8),
        string("tokens") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
        string("long") + struct.pack("<IIQ", 9, 0, 70_000) + bytes(70_000),
        string("ratio") + struct.pack("<If", 6, 0.5),
        string("flag") + struct.pack("<I?", 7, True),
    ]
    tensors = [("a", (32, 2), 8, 0), ("b", (3,), 0, 96)]
    path = write(gguf(pairs, tensors, bytes(96 + 12)))
    header, total = check_files(path)
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.heads": (7, 8),
        "ratio": 0.5,
        "flag": True,
    }
    assert header.architecture == "llama"
    assert header.get("block_count") == 2
    assert header.get("absent", 5) == 5
    assert (header.num_tensors, total) == (2, 108)
    assert header.expected_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF file"),
        (b"GGUF", "truncated or corrupt"),
        (b"GGUF\x03\0\0", "truncated or corrupt"),
        (b"ggml" + bytes(60), r"not a GGUF file: it starts with b'ggml'"),
        (gguf(version=1), "GGUF version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "past the end"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "past the end"),
        (gguf([string("x") + struct.pack("<I", 77)]), "unknown type 77"),
        (gguf([string("x") + struct.pack("<IIQ", 9, 9, 1)]), "unsupported element type 9"),
        (gguf([string("x") + struct.pack("<IIQ", 9, 8, 2**61)]), "past the end"),
        (gguf([string("x") + struct.pack("<IIQ", 9, 4, 2**61)]), "past the end"),
        (gguf([int_pair("general.alignment", 0)]), "alignment is 0"),
        (gguf([], [("t", (1, 1, 1, 1, 1), 0, 0)]), "5 dimensions"),
        (gguf([], [("t", (64,), 0, 0)], bytes(255)), "truncated: it has 319 of 320 bytes"),
        (gguf([text_pair("general.type", "adapter")]), "no model: its general.type is 'adapter'"),
    ],
)
def test_bad_files_are_refused_in_one_line(write, content, message):
    assert re.search(message, refusal(write(content)))


def test_missing_files_and_folders(tmp_path, write):
    assert "No such file" in refusal(tmp_path / "absent.gguf")
    assert "is a folder" in refusal(tmp_path)
    write(gguf())
    assert "it holds model.gguf" in refusal(tmp_path)


def test_split_models_need_all_parts_and_their_names(write):
    parts = [gguf([int_pair("split.count", 2)], [("t", (8,), 0, 0)], bytes(32)) for _ in range(2)]
    first = write(parts[0], "m-00001-of-00002.gguf")
    assert "missing: m-00002-of-00002.gguf" in refusal(first)
    second = write(parts[1], "m-00002-of-00002.gguf")
    assert check_files(first)[1] == 64
    assert "not the first part" in refusal(second)
    assert "must keep its name" in refusal(write(parts[0], "renamed.gguf"))
    write(parts[1][:-1], second.name)
    with pytest.raises(stoker.ModelError, match=r"m-00002-of-00002.gguf is truncated"):
        check_files(first)


@pytest.mark.model
def test_the_real_file_is_whole_and_any_shorter_one_is_not(model_path, tmp_path):
    header = read_header(model_path)
    assert header.architecture == "llama"
    assert header.num_tensors == 272
    size = model_path.stat().st_size
    assert header.expected_bytes <= size
    start = model_path.read_bytes()[:4_000_000]
    for length in (100, 5_000, 1_000_000, 4_000_000):
        path = tmp_path / f"{length}.gguf"
        path.write_bytes(start[:length])
        assert "truncated" in refusal(path)


@pytest.mark.model
def test_tensor_types_are_those_of_the_library():
    from pathlib import Path

    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    library = next(iter(folder.glob("libggml-base.*")))
    ggml = ctypes.CDLL(str(library))
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for kind, sizes in TENSOR_TYPES.items():
        assert (ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)) == sizes, kind
