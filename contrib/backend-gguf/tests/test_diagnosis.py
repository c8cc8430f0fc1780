"""What the backend tells `stoker doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest

import stoker
from stoker_backend_gguf import backend as backend_module
from stoker_backend_gguf import diagnosis
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.diagnosis import diagnose, judge_build
from stoker_backend_gguf.native import NativeSettings
from stoker_backend_gguf.selftest import Outcome

AMX = frozenset({"avx", "avx2", "amx_int8", "amx_tile"})


def test_a_build_for_this_cpu_is_fine() -> None:
    (finding,) = judge_build(
        "CPU : AVX = 1 | AVX2 = 1 | OPENMP = 1 | ", frozenset({"avx", "avx2"}), "x"
    )
    assert finding.level == "ok"
    assert "built with AVX, AVX2, OpenMP" in finding.message
    assert [f.level for f in judge_build("CPU : AVX = 1", frozenset(), "x")] == ["ok"]


def test_a_build_without_what_the_cpu_has_is_slow_and_one_with_more_crashes() -> None:
    _, slow = judge_build("AVX = 1 | AVX2 = 1 | AMX_INT8 = 0 | ", AMX, "make it")
    assert slow.level == "warning"
    assert "AMX_INT8 (prompts and batches" in slow.message
    assert slow.cure == "Build it on this machine: make it."
    _, fatal = judge_build("AVX = 1 | AVX2 = 1 | AVX512 = 1 | ", frozenset({"avx", "avx2"}), "x")
    assert fatal.level == "problem"
    assert "SIGILL" in fatal.message


def settings(*, extra: bool = True) -> NativeSettings:
    return NativeSettings(
        lanes=1,
        cells=256,
        n_batch=1,
        n_ubatch=1,
        threads=1,
        batch_threads=1,
        kv_type_k="f16",
        kv_type_v="f16",
        flash_attention="auto",
        kv_unified=False,
        swa_full=True,
        use_mmap=True,
        use_mlock=False,
        gpu_layers=0,
        use_extra_buffers=extra,
    )


@pytest.fixture
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def llama_print_system_info() -> bytes:
            return b"AVX2 = 1"

        @staticmethod
        def llama_supports_gpu_offload() -> bool:
            return True

    monkeypatch.setattr(diagnosis, "library", Library)
    monkeypatch.setattr(diagnosis, "prepare_openmp", lambda _: ("adaptive", None))
    monkeypatch.setattr(diagnosis, "cpu_flags", lambda: AMX)


@pytest.mark.usefixtures("_no_library")
def test_the_self_test_says_whether_the_amx_kernels_work() -> None:
    def tried(outcome: tuple[NativeSettings, list[str]] | Exception) -> stoker.Finding:
        def trial(_: Path) -> tuple[NativeSettings, list[str]]:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return diagnose([Path("small.gguf")], trial, rebuild="x")[-1]

    assert tried((settings(), [])).message == "small.gguf loads and computes, with the AMX kernels."
    trapped = tried((settings(extra=False), ["Buffers are off. Rebuild it: pip install x."]))
    assert (trapped.level, trapped.cure) == ("warning", "Rebuild it: pip install x.")
    assert trapped.message == "small.gguf: Buffers are off."
    refused = tried(stoker.ModelError("small.gguf: too new"))
    assert (refused.level, refused.message) == ("problem", "small.gguf: too new.")
    assert diagnose([], lambda _: (settings(), []), rebuild="x")[-1].level == "note"


def test_a_crash_with_the_extra_buffers_is_the_trap(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def crashes(_: Path, native: NativeSettings) -> Outcome:
        return Outcome(crash="SIGSEGV" if native.use_extra_buffers else "")

    monkeypatch.setattr(backend_module, "run_selftest", crashes)
    native, (warning,) = backend_module._try_out(tmp_path / "small.gguf", settings())
    assert not native.use_extra_buffers
    assert f"Rebuild it: {backend_module.REBUILD}." in warning


@pytest.mark.model
def test_the_real_library_and_the_default_model(model_path: Path) -> None:
    model = stoker.LocalModel(path=model_path, model_id="small", reference=str(model_path))
    findings = GgufBackend().diagnose([model])
    assert findings[0].topic == "gguf"
    assert "llama-cpp-python" in findings[0].message
    assert findings[-1].level in ("ok", "warning")
    assert model_path.name in findings[-1].message
