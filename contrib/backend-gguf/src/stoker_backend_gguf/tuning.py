"""What of llama.cpp is worth measuring on the user's machine, and turning weights into other types.

Which value is the best depends on the CPU, the model and the load, often in opposite ways: bf16 KV doubles
the decoding of many long sequences on CPUs with bf16 instructions and makes prefill two times slower. So
nothing here guesses; ``stoker tune`` measures.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from stoker import ModelError, Requantization, Tunable, TunableValue, machine
from stoker_backend_gguf import __version__
from stoker_backend_gguf.gguf_header import read_header
from stoker_backend_gguf.native import library, library_folder, take_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stoker import LocalModel

__all__ = ["requantization", "requantize", "tunables", "versions"]

# enum llama_ftype: what most of a file's tensors are.
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11,
    "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
    "iq4_nl": 25, "iq4_xs": 30, "bf16": 32,
}  # fmt: skip
_NAMES = {number: name for name, number in _FILE_TYPES.items()}
# What makes sense to turn a model into: types with kernels of their own on some CPU, good ones first.
_TARGETS = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl", "bf16", "f16")
_LOSSLESS = ("f32", "f16", "bf16")
# Types for which llama.cpp has kernels that multiply whole tiles: by AMX (ggml-cpu/amx), by weights repacked
# for AVX2, AVX-512 or NEON (repack.cpp), by tinyBLAS (llamafile/sgemm.cpp), or from 8 rows on by tiles of
# K-quants (tiled/tiled.cpp). The others multiply row by row.
_K_QUANTS = "q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k"
_X86 = frozenset(f"{_K_QUANTS} q4_0 q8_0 q5_0 iq4_nl iq4_xs f32 f16 bf16".split())
_TILED = {
    "amx": _X86 | {"q4_1"},
    "x86": _X86,
    "arm": frozenset("q4_0 q8_0 q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl f32 f16".split()),
}


def tunables(model: LocalModel) -> list[Tunable]:
    """What to measure, the likeliest gain first.

    Args:
        model: The model; none of what is offered depends on it yet but on the machine.
    """
    flash = {"flash_attention": ("auto", "on")}
    return [
        # No f32: with flash attention llama.cpp turns it into f16 again in every step, at a cost.
        Tunable(
            name="kv_type",
            summary="How keys and values are stored in KV memory",
            default="f16",
            values=[
                _value("f16", kv_type_k="f16", kv_type_v="f16"),
                _value("bf16", kv_type_k="bf16", kv_type_v="bf16"),
                _value("q8_0", flash, kv_type_k="q8_0", kv_type_v="q8_0"),
            ],
            group="memory",
            changes_quality=True,
        ),
        Tunable(
            name="kv_unified",
            summary="One KV memory that all lanes share, or one part for each",
            default="partitioned",
            values=[_value("partitioned", kv_unified=False), _value("unified", kv_unified=True)],
            group="memory",
        ),
        *_threads(machine.usable_cores()),
        *_waiting(),
        Tunable(
            name="flash_attention",
            summary="The fused attention kernel",
            default="auto",
            values=[_value("auto", flash_attention="auto"), _value("off", flash_attention="off")],
            changes_quality=True,
        ),
        Tunable(
            name="n_ubatch",
            summary="Most tokens that llama.cpp computes at once",
            default="512",
            values=[_value(str(count), n_ubatch=count) for count in (512, 256, 128, 64)],
        ),
        Tunable(
            name="extra_buffers",
            summary="Weights repacked for the CPU's matrix instructions",
            default="on",
            values=[_value("on", use_extra_buffers=True), _value("off", use_extra_buffers=False)],
            changes_quality=True,
        ),
    ]


def _value(
    label: str, requires: Mapping[str, Iterable[object]] | None = None, **options: object
) -> TunableValue:
    needs = {key: list(values) for key, values in (requires or {}).items()}
    return TunableValue(label=label, options=options, requires=needs)


def _threads(cores: int) -> list[Tunable]:
    """Threads for decoding and for prefill: all cores, one fewer, half of them, one more."""
    counts = dict.fromkeys(
        count for count in (cores, cores - 1, cores // 2, cores + 1) if count >= 1
    )
    # Unset, batch_threads follows threads; each is to be measured for itself.
    decode = [_value(str(count), threads=count, batch_threads=cores) for count in counts]
    prefill = [_value(str(count), batch_threads=count) for count in counts]
    return [
        Tunable(
            name=name,
            summary=summary,
            default=str(cores),
            values=values,
            depends_on_company=True,
        )
        for name, summary, values in (
            ("threads", "Threads of a step in which every lane has one token", decode),
            ("batch_threads", "Threads of all other steps", prefill),
        )
    ]


def _waiting() -> list[Tunable]:
    """How idle threads wait; what the environment sets wins over any option, so then there is no choice."""
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
        return []
    return [
        Tunable(
            name="waiting",
            summary="What OpenMP's threads do between two pieces of a step",
            default="adaptive",
            values=[
                _value("adaptive", omp_wait_policy="adaptive", omp_spin_count=None),
                _value("adaptive 3000", omp_wait_policy="adaptive", omp_spin_count=3000),
                _value("sleep", omp_wait_policy="passive", omp_spin_count=0),
                _value("spin 300", omp_wait_policy="passive", omp_spin_count=300),
                _value("spin", omp_wait_policy="active", omp_spin_count=None),
            ],
            group="waiting",
            depends_on_company=True,
        )
    ]


def versions() -> dict[str, str]:
    """Versions of this backend, the bindings, and the very libraries that they load."""
    found = {"stoker-backend-gguf": __version__}
    try:
        found["llama-cpp-python"] = metadata.version("llama-cpp-python")
    except metadata.PackageNotFoundError:
        return found
    folder = library_folder()
    if folder is not None:
        try:
            parts = [f"{file.name} {file.stat().st_size}" for file in sorted(folder.iterdir())]
        except OSError:
            return found
        found["llama.cpp libraries"] = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return found


# --------------------------------------------------------------------------- weights of other types


def requantization(model: LocalModel) -> Requantization | None:
    """The type of a file's weights, and those it could be turned into; ``None`` if it is split."""
    header = read_header(model.path)
    if int(header.metadata.get("split.count", 0)) > 1:
        return None
    current = _NAMES.get(int(header.metadata.get("general.file_type", -1)), "unknown")
    kind = _kind_of_cpu()
    tiled = _TILED.get(kind, frozenset())
    types = [name for name in _TARGETS if name != current]
    hint = ""
    better: list[str] = []
    if current in _FILE_TYPES and tiled and current not in tiled:
        better = [name for name in types if name in tiled and name not in _LOSSLESS]
        hint = (
            f"The weights are {current}, for which llama.cpp has no tiled kernel on this CPU; "
            f"for {', '.join(better)} it has."
        )
    return Requantization(
        current=current,
        types=types,
        lossy_source=current not in _LOSSLESS,
        hint=hint,
        faster=better,
    )


def _kind_of_cpu() -> str:
    flags = machine.cpu_flags()
    if platform.machine() in {"aarch64", "arm64"}:
        return "arm"
    if "amx_int8" in flags:
        return "amx"
    return "x86" if "avx2" in flags else ""


def requantize(model: LocalModel, type_name: str, target: Path) -> None:
    """Write a model with weights of another type.

    Raises:
        ModelError: The type is unknown, or llama.cpp refuses.
    """
    if type_name not in _TARGETS:
        raise ModelError(f"{type_name} is no type to turn weights into: {', '.join(_TARGETS)}")
    lib = library()
    params = lib.llama_model_quantize_default_params()
    params.ftype = _FILE_TYPES[type_name]
    params.allow_requantize = True  # the caller was told what it costs
    params.nthread = machine.usable_cores()
    take_errors()
    code = lib.llama_model_quantize(
        os.fsencode(model.path), os.fsencode(target), ctypes.byref(params)
    )
    if code:
        raise ModelError(
            f"{model.path}: llama.cpp cannot turn it into {type_name} (code {code}): "
            f"{take_errors() or 'it does not say why'}"
        )
