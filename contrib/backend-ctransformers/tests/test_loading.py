"""What is loaded, what is refused and why, and what is chosen when nobody says."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import stoker
from legacy_ggml import ARCHITECTURES, TOKENS, LegacyModel, make_model
from stoker import machine
from stoker_backend_ctransformers import backend, selftest
from stoker_backend_ctransformers.architectures import architecture_of_name
from stoker_backend_ctransformers.backend import CTransformersBackend
from stoker_backend_ctransformers.legacy_file import read_file
from stoker_backend_ctransformers.native import NativeSettings, find_build
from stoker_backend_ctransformers.options import CTransformersOptions

Load = Callable[..., Any]


def local(path: Path) -> stoker.LocalModel:
    return stoker.LocalModel(path=path, model_id="tiny", reference=str(path))


def refusal(load: Load, path: Path, kind: type[Exception] = stoker.ModelError, **how: Any) -> str:
    with pytest.raises(kind) as caught:
        load(path, **how)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(path: Path, model: LegacyModel, **how: Any) -> Path:
    path.write_bytes(model.to_bytes(**how))
    return path


# ----------------------------------------------------------------------------- what it is


def test_the_entry_module_is_light() -> None:
    code = (
        "import sys, stoker_backend_ctransformers as p; p.stoker_register_backends(); "
        "print([m for m in ('ctransformers', 'numpy', 'psutil', 'litestar') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_option_is_documented_and_unknown_ones_are_refused() -> None:
    for field in msgspec.structs.fields(CTransformersOptions):
        assert f"        {field.name}: " in (CTransformersOptions.__doc__ or "")
    with pytest.raises(msgspec.ValidationError, match="modeltype"):
        msgspec.convert({"modeltype": "gpt2"}, CTransformersOptions)
    with pytest.raises(msgspec.ValidationError, match="avx512"):
        msgspec.convert({"library": "avx512"}, CTransformersOptions)


def test_accepts_by_the_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    for magic in (b"lmgg", b"fmgg", b"tjgg", b"ccgg"):
        path.write_bytes(magic + b"....")
        assert CTransformersBackend().accepts(local(path))
    for other in (b"GGUF....", b"PK..", b"lm", b""):
        path.write_bytes(other)
        assert not CTransformersBackend().accepts(local(path))
    assert not CTransformersBackend().accepts(local(tmp_path))
    assert not CTransformersBackend().accepts(local(tmp_path / "absent.bin"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_architecture_is_told_by_the_file(architecture: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    file = read_file(written(tmp_path / "model.bin", model))
    assert file.architecture.name == ("gpt2" if architecture == "starcoder" else architecture)
    assert file.tokens == tuple(model.tokens)
    copied = model.tensors["model/wte"].nbytes if file.architecture.name == "gpt2" else 0
    assert file.weights_bytes == sum(tensor.nbytes for tensor in model.tensors.values()) + copied
    assert file["n_embd"] == 32
    assert file["n_layer"] == 2


@pytest.mark.parametrize("form", [(b"fmgg", 1), (b"tjgg", 1), (b"tjgg", 2)])
def test_older_formats_of_llama(
    form: tuple[bytes, int], tmp_path: Path, load: Load, run: Callable[..., Any]
) -> None:
    model = make_model("llama")
    model.llama_format = form
    old = load(written(tmp_path / "old.bin", model))
    assert old.info.settings["format"] == f"{'ggmf' if form[0] == b'fmgg' else 'ggjt'} {form[1]}"
    rows = [run(runtime, (0, [5, 6, 7], 0)) for runtime in (old, load("llama"))]
    assert abs(rows[0] - rows[1]).max() < 1e-5


def test_the_oldest_format_of_llama_is_refused(tmp_path: Path, load: Load) -> None:
    """ctransformers reads scores of tokens that it does not have."""
    model = make_model("llama")
    model.llama_format = (b"lmgg", 0)
    assert "cannot be used" in refusal(load, written(tmp_path / "oldest.bin", model))


def test_names_and_config_json_tell_apart_what_files_do_not(tmp_path: Path, load: Load) -> None:
    model = make_model("gpt2")
    assert load(written(tmp_path / "starcoder-tiny.bin", model)).info.settings["architecture"] == (
        "starcoder"
    )
    path = written(tmp_path / "model.bin", model)
    assert load(path).info.settings["architecture"] == "gpt2"
    (tmp_path / "config.json").write_text('{"model_type": "gpt_bigcode"}')
    assert load(path).info.settings["architecture"] == "starcoder"
    (tmp_path / "config.json").write_text('{"model_type": 7}')
    assert load(path).info.settings["architecture"] == "gpt2"
    assert load(path, model_type="GPTBigCode").info.settings["architecture"] == "starcoder"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-neox", "gpt_neox"),
        ("dolly_v2", "dolly-v2"),
        ("ggml-pythia-410m-q4_0", "gpt_neox"),
        ("mpt-7b-instruct.ggmlv3.q5_1", "mpt"),
        ("wizardlm-7b.ggmlv3.q4_0", "llama"),
        ("RefinedWebModel", "falcon"),
        ("something", None),
    ],
)
def test_names_of_architectures(name: str, expected: str | None) -> None:
    assert architecture_of_name(name) == expected


# ----------------------------------------------------------------------------- what is refused


def test_gguf_files_are_sent_to_the_other_backend(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    assert "pip install stoker-backend-gguf" in refusal(load, path)


def test_what_is_no_such_file_is_refused(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"PK\x03\x04")
    assert "no legacy GGML file: it begins with b'PK" in refusal(load, path)
    assert "cannot be read: No such file" in refusal(load, tmp_path / "absent.bin")
    assert "is a folder; name the GGML file" in refusal(load, tmp_path)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_truncated_files_are_refused(architecture: str, tmp_path: Path, load: Load) -> None:
    whole = make_model(architecture).to_bytes()
    path = tmp_path / "model.bin"
    for kept in (4, 10, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:kept])
        message = refusal(load, path)
        assert "it is damaged or incomplete" in message
    assert f"ends after {len(whole) - 1:,} bytes" in message
    # Cut between two tensors: ctransformers would compute with uninitialised memory.
    model = make_model(architecture)
    model.tensors.popitem()
    message = refusal(load, written(path, model))
    assert "it lacks 1 tensors" in message
    assert f"read as {architecture}" in message
    assert "set the option model_type" in message


def test_garbage_after_the_magic_is_refused(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "model.bin"
    for filling in (b"\0", b"\xff", b"\x01\0\0\0", b"text "):
        path.write_bytes(b"lmgg" + filling * 1000)
        assert "cannot be used" in refusal(load, path)


def test_damaged_numbers_are_refused(tmp_path: Path, load: Load) -> None:
    whole = make_model("gpt2").to_bytes()
    path = tmp_path / "model.bin"
    for offset in (4, 12, 16, 20, 28, 32):  # n_vocab, n_embd, n_head, n_layer, the vocabulary
        for number in (0, 7, 2**31 - 1):
            path.write_bytes(whole[:offset] + struct.pack("<i", number) + whole[offset + 4 :])
            assert str(path) in refusal(load, path)


def test_unknown_tensors_and_types_are_refused(tmp_path: Path, load: Load) -> None:
    model = make_model("gpt2")
    model.tensors["model/h0/extra"] = model.tensors["model/ln_f/g"]
    path = written(tmp_path / "model.bin", model)
    assert "1 unknown tensors, such as 'model/h0/extra'" in refusal(load, path)
    whole = make_model("gpt2").to_bytes()
    at = whole.index(b"model/ln_f/g") - 8
    path.write_bytes(whole[:at] + struct.pack("<i", 4) + whole[at + 4 :])
    assert "has the unknown type 4" in refusal(load, path)


def test_old_quantisations_are_refused(tmp_path: Path, load: Load) -> None:
    """ctransformers would read the blocks in their new layout."""
    model = make_model("gpt2")
    model.ftype = 1002  # q4_0 of version 1
    data = model.to_bytes()
    name = b"model/wte"
    at = data.index(name) - 20
    rows, columns = model.tensors["model/wte"].shape
    quantised = struct.pack("<3i2i", 2, len(name), 2, columns, rows) + name
    quantised += bytes(rows * columns // 32 * 18)
    end = at + 20 + len(name) + model.tensors["model/wte"].nbytes
    path = tmp_path / "model.bin"
    path.write_bytes(data[:at] + quantised + data[end:])
    message = refusal(load, path)
    assert "quantised in an old way (quantisation version 1)" in message
    assert str(path) in message


def test_a_wrong_model_type_is_refused_with_the_known_ones(tmp_path: Path, load: Load) -> None:
    path = written(tmp_path / "model.bin", make_model("gpt2"))
    message = refusal(load, path, stoker.ConfigError, model_type="gpt5")
    assert "model_type = 'gpt5' is not known; use one of: gpt2, gptj" in message
    assert "read as gptj" in refusal(load, path, model_type="gptj")


def test_settings_that_make_no_sense_are_refused(tmp_path: Path, load: Load) -> None:
    path = written(tmp_path / "model.bin", make_model("gpt2"))
    assert "lanes = 33" in refusal(load, path, stoker.ConfigError, lanes=33)
    assert "context = 0" in refusal(load, path, stoker.ConfigError, context=0)
    assert "cannot be read" in refusal(load, path, stoker.ConfigError, chat_template="absent")


# ----------------------------------------------------------------------------- memory and lanes


def test_memory_is_counted_for_each_lane(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = load("gpt2", lanes=1).info, load("gpt2", lanes=3).info
    assert three.weights_bytes == 3 * one.weights_bytes
    assert three.kv_bytes == 3 * one.kv_bytes == 3 * 2 * 2 * 128 * 32 * 4
    assert one.settings["weights"] == "read for each lane"
    mapped = load("llama", lanes=3, context=64).info
    assert mapped.settings["weights"] == "mapped once"
    assert mapped.weights_bytes == sum(t.nbytes for t in make_model("llama").tensors.values())
    assert mapped.kv_bytes == 3 * 2 * 2 * 64 * 32 * 2

    shared = 256 * 2**20
    each = one.weights_bytes + one.kv_bytes
    monkeypatch.setattr(machine, "available_memory", lambda: shared + 2 * each)
    with pytest.raises(stoker.OutOfMemoryError, match=r"each of 3 lanes takes .*lower the number"):
        load("gpt2", lanes=3)
    assert load("gpt2", lanes=2).info.num_lanes == 2
    assert load("gpt2", lanes=3, check_memory=False).info.num_lanes == 3
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * shared + 6 * each)
    assert load("gpt2", lanes=None).info.num_lanes == 3  # half of the free memory
    monkeypatch.setattr(machine, "available_memory", lambda: 2 * shared + 100 * each)
    assert load("gpt2", lanes=None).info.num_lanes == backend._AUTO_LANES


def test_context_lengths(load: Load) -> None:
    assert load("gpt2").info.context_length == 128
    assert load("gpt2", context=50).info.context_length == 50
    longer = load("gpt2", context=500).info
    assert longer.context_length == 128
    assert "has room for no more" in longer.warnings[0]
    assert load("llama", context=300).info.context_length == 300
    assert "may exceed" in load("llama", context=4096).info.warnings[0]


def test_facts_of_the_loaded_model(load: Load, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    info = load("gpt2", half=True, chat_template=str(template), batch_size=100).info
    assert info.vocab_size == len(TOKENS)
    assert info.end_token_ids == {TOKENS.index(b"<|endoftext|>")}
    assert info.bos_token == info.eos_token == "<|endoftext|>"
    assert info.chat_template == "{{ messages[0].content }}"
    assert info.settings["batch_size"] == "96"  # a multiple of 32
    assert info.settings["threads"] == "1"
    assert info.settings["library"] == find_build(None).parent.name
    can = info.capabilities
    assert can.truncation == "any"
    assert [can.copy_prefix, can.snapshot, can.embed] == [False] * 3
    assert "since 2023" in info.warnings[-1]
    assert load("gpt2", truncation="reset").info.capabilities.truncation == "reset"
    assert load("falcon", truncation="any").info.capabilities.truncation == "reset"
    assert CTransformersBackend().versions()["ctransformers"].startswith("0.2.")


def test_the_plain_build_computes_the_same(load: Load, run: Callable[..., Any]) -> None:
    plain, best = load("gpt2", library="basic"), load("gpt2")
    assert plain.info.settings["library"] == "basic"
    rows = [run(runtime, (0, [1, 2, 3], 0)) for runtime in (plain, best)]
    assert abs(rows[0] - rows[1]).max() < 1e-3


# ----------------------------------------------------------------------------- the self-test


def settings(path: Path, **changes: Any) -> NativeSettings:
    found = NativeSettings(
        model_type="gpt2",
        library=str(find_build(None)),
        context_length=128,
        batch_size=64,
        threads=1,
    )
    return msgspec.structs.replace(found, **changes)


def pretend(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(selftest, "COMMAND", (sys.executable, "-c", code))


@pytest.mark.slow
def test_a_pass_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "model.bin", make_model("gpt2"))
    assert selftest.find_batch_size(path, settings(path)) == (64, "")
    pretend(monkeypatch, "raise SystemExit(3)")
    assert selftest.find_batch_size(path, settings(path)) == (64, "")
    os.utime(path, (1, 1))  # another file
    with pytest.raises(stoker.ModelError, match="refuses it"):
        selftest.find_batch_size(path, settings(path))


@pytest.mark.slow
def test_what_kills_the_library_is_refused_and_kills_nothing_else(tmp_path: Path) -> None:
    """A model of another architecture, past our own checks."""
    path = written(tmp_path / "model.bin", make_model("gpt2"))
    for wrong in ("gptj", "falcon", "unheard-of"):
        with pytest.raises(stoker.ModelError, match=r"ctransformers (refuses it|fails on)"):
            selftest.find_batch_size(path, settings(path, model_type=wrong))


@pytest.mark.slow
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, load: Load) -> None:
    model = make_model("gpt2")
    model.tensors["model/ln_f/g"][3] = float("nan")
    path = written(tmp_path / "model.bin", model)
    assert "logits that are no numbers" in refusal(load, path, self_test=True)


def test_smaller_batches_are_tried_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "model.bin", make_model("gpt2"))
    pretend(
        monkeypatch,
        "import json, os, sys; size = json.loads(sys.argv[3])['batch_size']; "
        "print('the model is loaded', flush=True); size > 4 and os.kill(os.getpid(), 11)",
    )
    assert selftest.find_batch_size(path, settings(path)) == (4, "")
    crash = (
        "import os, sys; sys.stderr.write('not enough space\\n'); sys.stderr.flush(); os.abort()"
    )
    pretend(monkeypatch, crash)
    os.utime(path, (1, 1))
    with pytest.raises(stoker.ModelError, match="SIGABRT in the self-test; it said: not enough"):
        selftest.find_batch_size(path, settings(path))


def test_a_self_test_that_cannot_run_is_a_warning(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "model.bin", make_model("gpt2"))
    monkeypatch.setattr(selftest, "COMMAND", (str(tmp_path / "absent"),))
    runtime = load(path, self_test=True)
    assert "could not be started" in runtime.info.warnings[0]
    pretend(monkeypatch, "raise RuntimeError('broken')")
    assert "RuntimeError: broken" in load(path, self_test=True).info.warnings[0]
