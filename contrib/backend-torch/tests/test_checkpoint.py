"""What a folder holds: complete models are described, all others refused in one line that says what to do."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stoker
from stoker_backend_torch.checkpoint import is_checkpoint, open_checkpoint


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be damaged."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refusal(path: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> str:
    with pytest.raises(stoker.ModelError) as caught:
        open_checkpoint(path, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def write_safetensors(file: Path, **shapes: tuple[int, ...]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4
        for count in shape:
            size *= count
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))


def split(folder: Path) -> None:
    """Turn the folder's weights into two shards; their tensors are no model's."""
    (folder / "model.safetensors").unlink()
    write_safetensors(folder / "model-00001-of-00002.safetensors", a=(2, 3))
    write_safetensors(folder / "model-00002-of-00002.safetensors", b=(5,), c=())
    names = {key: f"model-0000{1 + (key != 'a')}-of-00002.safetensors" for key in "abc"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_a_whole_model_is_described(tiny_folder: Path) -> None:
    found = open_checkpoint(tiny_folder, trust_remote_code=False, allow_pickle=False)
    assert (found.kind, found.folder, found.path) == ("safetensors", tiny_folder, tiny_folder)
    assert found.config["model_type"] == "llama"
    assert found.tensors["model.embed_tokens.weight"].shape == (272, 32)
    total = sum(tensor.num_bytes for tensor in found.tensors.values())
    assert total == sum(tensor.bytes_as(4) for tensor in found.tensors.values())
    assert total < found.size_bytes < total + 10_000
    file = open_checkpoint(
        tiny_folder / "model.safetensors", trust_remote_code=False, allow_pickle=False
    )
    assert file == found


def test_shards_are_found_through_their_index(folder: Path) -> None:
    split(folder)
    found = open_checkpoint(folder, trust_remote_code=False, allow_pickle=False)
    assert [file.name[:11] for file in found.files] == ["model-00001", "model-00002"]
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        "a": (2, 3), "b": (5,), "c": (),
    }  # fmt: skip
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "1 of 2 shards are missing: model-00002-of-00002.safetensors" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../x.safetensors"}}'
    )
    assert "names '../x.safetensors', which is no file of the folder" in refusal(folder)
    (folder / "model.safetensors.index.json").unlink()
    assert "fetch the index, too" in refusal(folder)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "trust_remote_code = true"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantized (?)"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, which cannot be"),
        ({"text_config": {"n_layer": -1}}, "n_layer is -1"),
        ({"model_type": ["llama"]}, "model_type is no text"),
        ({"architectures": [5]}, "no list of names"),
        ({"model_type": None, "architectures": None}, "neither a model_type nor architectures"),
    ],
)
def test_configurations_that_cannot_be_served(
    folder: Path, values: dict[str, Any], expected: str
) -> None:
    change(folder / "config.json", **values)
    message = refusal(folder)
    assert expected in message
    assert "config.json" in message


def test_code_of_its_own_is_run_only_if_it_is_trusted(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModel": "x.Y"})
    assert open_checkpoint(folder, trust_remote_code=True, allow_pickle=False).config["auto_map"]


def test_configurations_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    config = folder / "config.json"
    for content in (b"{", b"[]", b"\xff\xfe", b""):
        config.write_bytes(content)
        assert "is no JSON object" in refusal(folder)
    config.unlink()
    assert "holds no config.json: name a folder in Hugging Face's format" in refusal(folder)
    config.mkdir()
    assert "holds no config.json" in refusal(folder)
    (tmp_path / "file.xyz").write_bytes(b"something else")
    assert "neither a folder in Hugging Face's format nor a GGUF file" in refusal(
        tmp_path / "file.xyz"
    )


def test_pickles_are_refused_unless_allowed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin is a pickle file" in message
    assert "allow_pickle = true" in message
    assert open_checkpoint(folder, trust_remote_code=False, allow_pickle=True).kind == "pickle"
    (folder / "pytorch_model.bin").unlink()
    assert "holds no weights" in refusal(folder, allow_pickle=True)


def test_adapters_are_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in refusal(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, expected in (
        (whole[:-1], f"it has {len(whole) - 1:,} bytes instead of {len(whole):,}"),
        (whole + b"x", "is truncated or damaged"),
        (whole[:100], "is truncated or no safetensors file"),
        (whole[:5], "is truncated or no safetensors file"),
        (b"", "is truncated or no safetensors file"),
        (b"\xff" * 200, "is truncated or no safetensors file"),
        (struct.pack("<Q", 2) + b"{]", "has a damaged header"),
        (struct.pack("<Q", 12) + b'{"a": {"b":}', "has a damaged header"),
        (struct.pack("<Q", 15) + b'{"a": {"b": 1}}', "has a damaged header"),
    ):
        file.write_bytes(content)
        message = refusal(folder)
        assert expected in message
        assert "model.safetensors" in message
    file.write_bytes(whole.replace(b'"F32"', b'"F33"'))
    assert "tensors of an unknown type: F33" in refusal(folder)


def test_a_model_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer (tokenizer.json" in refusal(folder)


def test_weights_under_another_name_are_refused(folder: Path) -> None:
    other = (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert "transformers reads model.safetensors" in refusal(other)
    assert "holds consolidated.safetensors but neither" in refusal(folder)


def test_what_looks_like_a_model(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lone.safetensors").write_bytes(b"x")
    (tmp_path / "blob").write_bytes(b"GGUF....")
    (tmp_path / "other").write_bytes(b"PK..")
    assert is_checkpoint(tiny_folder)
    assert is_checkpoint(tiny_folder / "model.safetensors")
    assert is_checkpoint(tmp_path / "absent.GGUF")
    assert is_checkpoint(tmp_path / "blob")
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "lone.safetensors")
    assert not is_checkpoint(tmp_path / "other")


def test_a_gguf_file_is_described_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF....")
    found = open_checkpoint(path, trust_remote_code=False, allow_pickle=False)
    assert (found.kind, found.path, found.files) == ("gguf", path, (path,))


def test_numbers_of_odd_types_take_what_they_take(folder: Path) -> None:
    file = folder / "model.safetensors"
    header = {"a": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]}}
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(3))
    found = open_checkpoint(folder, trust_remote_code=False, allow_pickle=False)
    assert (found.tensors["a"].num_bytes, found.tensors["a"].bytes_as(2)) == (3, 3)


def test_the_fixture_saves_what_is_asked(
    save_model: Callable[..., Path], llama_config: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "wide", llama_config(hidden_size=64))
    found = open_checkpoint(folder, trust_remote_code=False, allow_pickle=False)
    assert found.tensors["model.norm.weight"].shape == (64,)
