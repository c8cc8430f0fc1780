"""Loading: what is chosen, what is refused, and the self-test."""

from __future__ import annotations

import logging
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

import stoker
import stoker_backend_gguf
from stoker import machine
from stoker_backend_gguf import native, selftest
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.options import GgufOptions

CRASH_WITH_EXTRA_BUFFERS = """
import json, os, signal, sys
if json.loads(sys.argv[3])["use_extra_buffers"]:
    os.kill(os.getpid(), signal.SIGSEGV)
"""
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
MISSING = "import absent_module"


def strings(*texts: str) -> bytes:
    return b"".join(struct.pack("<Q", len(text)) + text.encode() for text in texts)


def small_file(architecture: str) -> bytes:
    pairs = [strings("general.architecture") + struct.pack("<I", 8) + strings(architecture)]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


def local(path: Path) -> stoker.LocalModel:
    return stoker.LocalModel(path=path, model_id=path.stem, reference=str(path))


def refusal(path: Path, kind: type[stoker.StokerError] = stoker.ModelError, **settings) -> str:
    with pytest.raises(kind) as caught:
        GgufBackend().load(local(path), stoker.LoadSettings(**settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------- the entry module


def test_the_plugin_registers_one_backend():
    (info,) = stoker_backend_gguf.stoker_register_backends()
    assert info.name == "gguf"
    assert info.options is GgufOptions
    assert isinstance(info.factory(), GgufBackend)


def test_the_entry_module_is_light():
    code = (
        "import sys, stoker_backend_gguf as p; p.stoker_register_backends(); "
        "print([m for m in ('llama_cpp', 'numpy', 'psutil', 'litestar') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


def test_every_option_is_documented_and_unknown_ones_are_refused():
    for field in msgspec.structs.fields(GgufOptions):
        assert f"        {field.name}: " in (GgufOptions.__doc__ or "")
    with pytest.raises(msgspec.ValidationError, match="treads"):
        msgspec.convert({"treads": 2}, GgufOptions)
    with pytest.raises(msgspec.ValidationError, match="q4_0"):
        msgspec.convert({"kv_type_k": "q4_0"}, GgufOptions)


def test_accepts(tmp_path):
    backend = GgufBackend()
    (tmp_path / "blob").write_bytes(b"GGUF....")
    (tmp_path / "other").write_bytes(b"PK..")
    assert backend.accepts(local(tmp_path / "absent.GGUF"))
    assert backend.accepts(local(tmp_path / "blob"))
    assert not backend.accepts(local(tmp_path / "other"))
    assert not backend.accepts(local(tmp_path / "absent.bin"))
    assert not backend.accepts(local(tmp_path))


# ----------------------------------------------------------------------------- refusals


@pytest.mark.model
@pytest.mark.parametrize("self_test", [True, False])
def test_an_unknown_architecture_is_named(tmp_path, self_test):
    path = tmp_path / "strange.gguf"
    path.write_bytes(small_file("strange-net"))
    message = refusal(path, options=GgufOptions(self_test=self_test))
    assert "strange.gguf" in message
    assert "unknown model architecture: 'strange-net'" in message


@pytest.mark.model
def test_a_header_without_a_model_is_refused(tmp_path):
    path = tmp_path / "hollow.gguf"
    path.write_bytes(small_file("llama"))
    assert "llama.cpp cannot load it" in refusal(path)


@pytest.mark.model
def test_damaged_copies_of_the_real_file(tmp_path, model_path):
    whole = model_path.read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(whole[:-1])
    assert "is truncated" in refusal(path)
    path.write_bytes(b"FUGG" + whole[4:1000])
    assert "not a GGUF file" in refusal(path)


@pytest.mark.model
def test_what_exceeds_the_free_memory_is_refused_with_both_numbers(model_path, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 500_000_000)
    message = refusal(model_path, stoker.OutOfMemoryError, lanes=16, context_length=4096)
    assert "weights take 96.6 MB" in message
    assert "16 lanes with 4096 tokens 1.5 GB" in message
    assert "500.0 MB of memory are free; lower the context or the number of lanes" in message
    monkeypatch.setattr(machine, "available_memory", lambda: 50_000_000)
    assert "use a smaller model" in refusal(model_path, stoker.OutOfMemoryError)


@pytest.mark.model
def test_lanes_and_context_are_chosen_by_the_memory(load, monkeypatch):
    monkeypatch.setattr(machine, "available_memory", lambda: 800_000_000)
    runtime = load(lanes=None, context=None)
    assert runtime.info.context_length == 4096
    assert runtime.info.num_lanes == 3  # of 94 MB each, in half of the memory less the weights
    assert runtime.info.kv_bytes <= 400_000_000
    runtime.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"options": GgufOptions(kv_type_v="q8_0", flash_attention="off")}, "flash_attention"),
        ({"options": GgufOptions(kv_tokens=100)}, "kv_unified"),
        ({"lanes": 0}, "lanes = 0"),
        ({"lanes": 257}, "lanes = 257"),
        ({"context_length": 0}, "context = 0"),
    ],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    assert message in refusal(tmp_path / "x.gguf", stoker.ConfigError, **settings)


@pytest.mark.model
def test_a_context_beyond_training_is_a_warning(load):
    runtime = load(lanes=1, context=8200)
    assert runtime.info.context_length == 8200
    assert "8192 that the model was trained with" in runtime.info.warnings[0]
    runtime.close()


# ----------------------------------------------------------------------------- the self-test


def child(monkeypatch, code: str) -> None:
    monkeypatch.setattr(selftest, "COMMAND", (sys.executable, "-c", code))


@pytest.mark.model
def test_a_crash_falls_back_to_plain_buffers_and_says_why(load, monkeypatch, greedy, partitioned):
    child(monkeypatch, CRASH_WITH_EXTRA_BUFFERS)
    runtime = load(lanes=1, context=256, self_test=True)
    assert runtime.info.settings["extra_buffers"] == "off"
    (warning,) = runtime.info.warnings
    for part in ("SIGSEGV", "gcc 12", "-fno-tree-dse -fno-dse", "make setup", "pip install"):
        assert part in warning
    assert greedy(runtime, [504, 2365], 4) == greedy(partitioned, [504, 2365], 4)
    runtime.close()


@pytest.mark.model
def test_a_model_that_always_crashes_is_refused(model_path, monkeypatch):
    child(monkeypatch, CRASH)
    message = refusal(model_path, lanes=1)
    assert "SIGSEGV" in message
    assert "with and without" in message
    child(monkeypatch, KILLED)
    assert "memory ran out" in refusal(model_path, stoker.OutOfMemoryError, lanes=1)


@pytest.mark.model
def test_a_self_test_that_cannot_run_is_a_warning(load, monkeypatch):
    child(monkeypatch, MISSING)
    runtime = load(lanes=1, context=256, self_test=True)
    assert "absent_module" in runtime.info.warnings[0]
    assert runtime.info.settings["extra_buffers"] == "on"
    runtime.close()
    monkeypatch.setattr(selftest, "COMMAND", ("/nowhere/python",))
    runtime = load(lanes=1, context=256, self_test=True)
    assert "could not be started" in runtime.info.warnings[0]
    runtime.close()


@pytest.mark.model
def test_a_pass_is_remembered_until_something_changes(tmp_path, model_path, monkeypatch):
    settings = native.NativeSettings(
        lanes=4, cells=1024, n_batch=64, n_ubatch=64, threads=2, batch_threads=2,
        kv_type_k="f16", kv_type_v="f16", flash_attention="auto", kv_unified=False,
        swa_full=True, use_mmap=True, use_mlock=False, gpu_layers=None, use_extra_buffers=True,
    )  # fmt: skip
    path = tmp_path / "model.gguf"
    path.symlink_to(model_path)
    assert selftest.run_selftest(path, settings).passed  # the real child
    child(monkeypatch, CRASH)
    assert selftest.run_selftest(path, settings).passed
    more_lanes = msgspec.structs.replace(settings, lanes=8, cells=2048)
    assert selftest.run_selftest(path, more_lanes).passed  # the child has one lane anyway
    other = msgspec.structs.replace(settings, kv_type_k="f32")
    assert selftest.run_selftest(path, other).crash == "SIGSEGV"
    path.unlink()
    path.write_bytes(b"GGUF of another size")
    assert selftest.run_selftest(path, settings).crash == "SIGSEGV"


def test_how_a_child_ends(tmp_path, monkeypatch):
    outcomes = {
        code: selftest._judge(code, b"noise\nthe reason\n") for code in (0, 3, 4, 1, -11, -99)
    }
    assert outcomes[0].passed
    assert outcomes[3].refused == "the reason"
    assert "no numbers" in outcomes[4].crash
    assert outcomes[1].problem == "it ended with code 1: the reason"
    assert outcomes[-11].crash == "SIGSEGV"
    assert outcomes[-99].crash == "signal 99"


# ----------------------------------------------------------------------------- environment, log


@pytest.mark.model
def test_the_log_of_llama_cpp_goes_to_ours_at_debug(load, caplog, capfd):
    with caplog.at_level(logging.DEBUG, logger="stoker.backend.gguf"):
        load(lanes=1, context=256).close()
    lines = [record for record in caplog.records if record.name == "stoker.backend.gguf"]
    assert any("general.architecture" in record.getMessage() for record in lines)
    assert {record.levelno for record in lines} == {logging.DEBUG}
    assert capfd.readouterr() == ("", "")
