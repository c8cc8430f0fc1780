"""Loading: what is chosen and said, what is refused, and that nothing leaves the machine."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import stoker
import stoker_backend_torch
from stoker_backend_torch import manners, planning
from stoker_backend_torch.backend import TorchBackend
from stoker_backend_torch.options import TorchOptions

Load = Callable[..., stoker.Runtime]

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def refusal(
    load: Load, path: Path, kind: type[Exception] = stoker.ModelError, **options: Any
) -> str:
    with pytest.raises(kind) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def last_logits(runtime: stoker.Runtime, tokens: list[int]) -> np.ndarray[Any, Any]:
    """Of the last of some tokens, in an empty lane."""
    count = len(tokens)
    runtime.truncate(0, 0)
    step = stoker.StepInput(
        token_ids=np.array(tokens, np.int32),
        positions=np.arange(count, dtype=np.int32),
        lanes=np.zeros(count, np.int32),
        wants_logits=np.arange(count) == count - 1,
    )
    row: np.ndarray[Any, Any] = runtime.step(step).logits[0].copy()
    return row


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the small model, to be changed."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def expected(tiny_folder: Path) -> np.ndarray[Any, Any]:
    """Logits that transformers gives after the tokens 5, 6, 7 of the small model, in float32."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.inference_mode():
        row: np.ndarray[Any, Any] = model(torch.tensor([[5, 6, 7]])).logits[0, -1].numpy()
    return row


# ----------------------------------------------------------------------------- the entry module


def test_the_plugin_registers_one_backend() -> None:
    (info,) = stoker_backend_torch.stoker_register_backends()
    assert (info.name, info.options) == ("torch", TorchOptions)
    assert (
        info.order
        > stoker.BackendInfo(api_version=1, name="x", summary="", factory=TorchBackend).order
    )
    assert isinstance(info.factory(), TorchBackend)


def test_neither_registering_nor_looking_imports_torch(tiny_folder: Path) -> None:
    code = (
        "import sys, stoker, stoker_backend_torch as p; from pathlib import Path\n"
        "backend = p.stoker_register_backends()[0].factory(); path = Path(sys.argv[1])\n"
        "assert backend.accepts(stoker.LocalModel(path=path, model_id='m', reference='m'))\n"
        "print(backend.versions()['torch'], [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_folder], capture_output=True, check=True, text=True
    )
    assert done.stdout.strip() == f"{torch.__version__} []"


def test_every_option_is_documented_and_unknown_ones_are_refused() -> None:
    for field in msgspec.structs.fields(TorchOptions):
        assert f"        {field.name}: " in (TorchOptions.__doc__ or "")
    with pytest.raises(msgspec.ValidationError, match="dvice"):
        msgspec.convert({"dvice": "cpu"}, TorchOptions)


def test_what_is_worth_measuring(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = stoker.LocalModel(path=tiny_folder, model_id="m", reference="m")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    found = {tunable.name: tunable for tunable in TorchBackend().tunables(model)}
    assert found.keys() == {"dtype", "weights"}
    for tunable in found.values():
        assert tunable.default in {value.label for value in tunable.values}
        for value in tunable.values:
            msgspec.convert(dict(value.options), TorchOptions)


# ----------------------------------------------------------------------------- what is loaded


@pytest.mark.slow
def test_a_small_model(load: Load, tiny_folder: Path, expected: np.ndarray[Any, Any]) -> None:
    runtime = load(tiny_folder, dtype="float32", device="cpu")
    info = runtime.info
    assert (info.vocab_size, info.context_length, info.num_lanes) == (263, 256, 2)
    assert (info.kv_capacity_tokens, info.kv_bytes) == (512, 512 * 2 * 2 * 16 * 4)
    assert info.device == "cpu"
    assert (info.bos_token, info.eos_token) == ("<|user|>", "<|end|>")
    assert info.end_token_ids == {0}
    assert info.chat_template is not None
    assert "add_generation_prompt" not in info.chat_template
    assert info.settings["dtype"] == "float32"
    assert info.settings["threads"] == "1"
    assert 144_000 <= info.weights_bytes < 145_000  # parameters, and some buffers
    # The padding of the vocabulary is nobody's.
    np.testing.assert_allclose(last_logits(runtime, [5, 6, 7]), expected[:263], atol=1e-5)
    with pytest.raises(stoker.EngineError, match="outside of the vocabulary of 263"):
        last_logits(runtime, [5, 263, 7])


@pytest.mark.slow
def test_end_tokens_are_all_that_anybody_names(load: Load, folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=[5, 6])
    change(folder / "config.json", eos_token_id=[7, 300])  # there are 272 logits
    assert load(folder).info.end_token_ids == {0, 5, 6, 7}


@pytest.mark.slow
def test_int8_weights_are_small_and_near(
    load: Load, save_model: Callable[..., Path], llama_config: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "wide", llama_config(hidden_size=128, intermediate_size=256))
    whole = load(folder, dtype="float32", device="cpu")
    small = load(folder, dtype="float32", device="cpu", weights="int8")
    assert small.info.settings["weights"] == "int8"
    assert small.info.weights_bytes < whole.info.weights_bytes / 2
    exact, near = last_logits(whole, [5, 6, 7]), last_logits(small, [5, 6, 7])
    assert 0 < np.abs(exact - near).max() < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_weights_on_the_cpu_are_mapped_and_not_copied(
    load: Load, save_model: Callable[..., Path], llama_config: Callable[..., Any], tmp_path: Path
) -> None:
    folder = save_model(tmp_path / "mapped", llama_config())
    runtime = load(folder, dtype="float32", device="cpu")
    weight = runtime._model.model.embed_tokens.weight  # type: ignore[attr-defined]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the kernel does not tell what is mapped")
    ranges = [
        line.split()[0].split("-") for line in maps.read_text().splitlines() if str(folder) in line
    ]
    assert any(int(a, 16) <= weight.data_ptr() < int(b, 16) for a, b in ranges)


@pytest.mark.slow
def test_pickles_load_if_they_are_allowed(
    load: Load, folder: Path, expected: np.ndarray[Any, Any]
) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "allow_pickle" in refusal(load, folder)
    runtime = load(folder, allow_pickle=True, dtype="float32", device="cpu")
    np.testing.assert_allclose(last_logits(runtime, [5, 6, 7]), expected[:263], atol=1e-5)


@pytest.mark.slow
def test_code_of_its_own_runs_if_it_is_trusted(
    load: Load, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    expected: np.ndarray[Any, Any],
) -> None:  # fmt: skip
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(REMOTE_CODE)
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    change(folder / "config.json", model_type="own", auto_map=own, architectures=["OwnForCausalLM"])
    assert "trust_remote_code = true" in refusal(load, folder)
    runtime = load(folder, trust_remote_code=True, dtype="float32", device="cpu")
    np.testing.assert_allclose(last_logits(runtime, [5, 6, 7]), expected[:263], atol=1e-5)


@pytest.mark.slow
def test_nothing_is_asked_of_the_network_nor_said_on_the_terminal(
    load: Load, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def connect(*arguments: object) -> None:
        raise AssertionError(f"a connection: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with caplog.at_level(logging.INFO, logger="stoker.backend.torch"):
        load(tiny_folder)
        assert not caplog.records  # it is quick
        monkeypatch.setattr(manners, "_PERIOD_S", 0.0)
        load(tiny_folder)
    lines = [record.getMessage() for record in caplog.records]
    assert f"loading the weights of {tiny_folder.name}: 100 %" in lines
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------- GGUF


def write_gguf(path: Path) -> None:
    """A Llama of one small layer, as llama.cpp's converter writes it."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(32)
    tokens = ["<|end|>", *(chr(0x41 + index) for index in range(30)), "AB"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 31)
    writer.add_token_merges(["A B"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (32, 32), "output": (32, 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (32, 32),
        "blk.0.attn_v": (32, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32), "blk.0.ffn_down": (32, 32),
    }  # fmt: skip
    for name, shape in shapes.items():
        packed = gguf.quantize(
            rng.standard_normal(shape, np.float32), gguf.GGMLQuantizationType.Q8_0
        )
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_gguf_file_is_dequantised(
    load: Load, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    runtime = load(tmp_path / "tiny.gguf", dtype="float32", device="cpu")
    assert (runtime.info.vocab_size, runtime.info.context_length) == (32, 64)
    assert runtime.tokenizer.decode([2, 3]) == "BC"
    assert np.isfinite(last_logits(runtime, [1, 2, 3])).all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_missing_extras_are_named(
    load: Load, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF....")
    for package in ("gguf", "accelerate", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    message = refusal(load, tmp_path / "tiny.gguf")
    assert message.endswith(
        'tiny.gguf needs gguf and accelerate: pip install "stoker-backend-torch[gguf]"'
    )
    assert 'needs torchao: pip install "stoker-backend-torch[int8]"' in refusal(
        load, tiny_folder, weights="int8"
    )


# ----------------------------------------------------------------------------- refusals


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "strange"}, "does not know the model type 'strange'"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "is recurrent"),
        ({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}, "in its own way"),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLFor..."]}, "reads more than text"),
        ({"intermediate_size": 10**9}, "they do not belong together"),
        ({"vocab_size": -5}, "by its configuration"),
        ({"num_hidden_layers": 3}, "the checkpoint has no weights for model.layers.2."),
        ({"hidden_size": 64}, "transformers cannot load it"),
        ({"hidden_size": "wide"}, "cannot read the configuration"),
    ],
)
def test_models_that_cannot_be_served(
    load: Load, folder: Path, values: dict[str, Any], expected: str
) -> None:
    change(folder / "config.json", **values)
    message = refusal(load, folder)
    assert expected in message
    assert str(folder) in message


@pytest.mark.slow
def test_a_broken_tokenizer_is_refused(load: Load, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert "cannot load the tokenizer" in refusal(load, folder)


@pytest.mark.slow
def test_code_of_a_tokenizer_is_not_run(load: Load, folder: Path, tmp_path: Path) -> None:
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own = {"AutoTokenizer": ["own.OwnTokenizer", None]}
    change(folder / "tokenizer_config.json", auto_map=own, tokenizer_class="OwnTokenizer")
    assert "its tokenizer brings Python code of its own" in refusal(load, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("generation_config.json", {"eos_token_id": [1, "x"]}, "eos_token_id is 'x'"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat template is no text"),
    ],
)
def test_small_files_that_make_no_sense_are_refused(
    load: Load, folder: Path, file: str, values: dict[str, Any], expected: str
) -> None:
    for template in folder.glob("*.jinja"):
        template.unlink()
    change(folder / file, **values)
    assert expected in refusal(load, folder)


def test_a_device_that_is_not_there_is_refused(load: Load, tiny_folder: Path) -> None:
    message = refusal(load, tiny_folder, stoker.ConfigError, device="cuda:7")
    assert "device = 'cuda:7': there is no such device here" in message


@pytest.mark.slow
def test_what_exceeds_the_memory_is_refused_before_it_is_loaded(
    load: Load, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "free_memory", lambda device: 100_000)
    message = refusal(load, tiny_folder, stoker.OutOfMemoryError, dtype="float32")
    assert "2 lanes with 256 tokens" in message
    assert "only 100.0 kB" in message
    assert load(tiny_folder, check_memory=False).info.num_lanes == 2


# ----------------------------------------------------------------------------- the real one


@pytest.mark.model
def test_smollm2_answers(load: Load, smollm2_folder: Path) -> None:
    runtime = load(smollm2_folder, context=128)
    info = runtime.info
    assert info.end_token_ids == {2}
    assert info.bos_token == "<|im_start|>"
    assert info.chat_template is not None
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    tokens = runtime.tokenizer.encode(text, add_special=True, parse_special=True)
    answer: list[int] = []
    while len(answer) < 12 and (not answer or answer[-1] not in info.end_token_ids):
        answer.append(int(last_logits(runtime, tokens + answer).argmax()))
    assert runtime.tokenizer.decode(answer) == "The capital of France is Paris."
