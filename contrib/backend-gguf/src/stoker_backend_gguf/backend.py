"""The backend: checks a file, chooses settings, tries them, loads the model."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec

import stoker
from stoker import machine
from stoker_backend_gguf import diagnosis, tuning
from stoker_backend_gguf.embedder import GgufEmbedder, plan_embedding
from stoker_backend_gguf.gguf_header import MAGIC, GgufHeader, check_files
from stoker_backend_gguf.kernels import describe_exactness
from stoker_backend_gguf.kv_size import kv_bytes_per_token
from stoker_backend_gguf.native import (
    NativeContext,
    NativeModel,
    NativeSettings,
    prepare_tiles,
)
from stoker_backend_gguf.options import GgufOptions
from stoker_backend_gguf.runtime import GgufRuntime
from stoker_backend_gguf.selftest import run_selftest
from stoker_backend_gguf.tokenizer import GgufTokenizer
from stoker_backend_gguf.waiting import prepare_openmp, spin_control

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["REBUILD", "GgufBackend"]

_AUTO_LANES = 16
_AUTO_CONTEXT = 4096
_MAX_LANES = 256
_CELL_PADDING = 256  # llama.cpp rounds the cells of a sequence up to this
REBUILD = (
    "CMAKE_ARGS=\"-DCMAKE_C_FLAGS='-fno-tree-dse -fno-dse' -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'\" "
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python "
    "(in a checkout of stoker: make setup)"
)
"""How to build llama.cpp so that its AMX kernels work."""


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a model will be loaded with.

    Attributes:
        native: Settings of the model and its context.
        context_length: Most tokens of one lane.
        capacity: Most tokens of all lanes.
        kv_bytes: Estimated size of the KV memory.
        warnings: What the user should know.
    """

    native: NativeSettings
    context_length: int
    capacity: int
    kv_bytes: int
    warnings: tuple[str, ...] = ()


class GgufBackend(stoker.Backend):
    """Loads GGUF files through llama.cpp's low-level functions."""

    def accepts(self, model: stoker.LocalModel) -> bool:
        """Whether it is named like a GGUF file or starts like one."""
        if model.path.suffix.lower() == ".gguf":
            return True
        try:
            with model.path.open("rb") as file:
                return file.read(len(MAGIC)) == MAGIC
        except OSError:
            return False

    def load(self, model: stoker.LocalModel, settings: stoker.LoadSettings) -> GgufRuntime:
        """Check the file, try it in a child process, load it.

        Raises:
            ConfigError: Two options contradict each other.
            ModelError: The file is broken, or llama.cpp refuses it or crashes on it.
            OutOfMemoryError: Its weights and KV memory exceed the free memory.
        """
        path = model.path
        options = settings.options if settings.options is not None else GgufOptions()
        _check_options(settings, options)
        header, weights_bytes = check_files(path)
        try:
            plan = _make_plan(path, header, weights_bytes, settings, options)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise stoker.ModelError(f"{path} has metadata that make no sense: {error}") from error

        wait_policy, openmp_warning = prepare_openmp(
            options.omp_wait_policy, options.omp_spin_count
        )
        found = (openmp_warning, prepare_tiles(exact=options.exact_kernels))
        warnings = [*plan.warnings, *(warning for warning in found if warning)]
        native = plan.native
        if options.self_test:
            native, tried = _try_out(path, native)
            warnings += tried
        with contextlib.ExitStack() as on_failure:
            weights = NativeModel(path, native)
            on_failure.callback(weights.close)
            context = _make_context(path, weights, native)
            on_failure.callback(context.close)
            tokenizer = GgufTokenizer(weights)
            info = _describe(model, header, plan, native, weights, tokenizer)
            embedding = plan_embedding(
                header,
                options,
                int(weights.lib.llama_model_n_embd_out(weights.pointer)),
                plan.context_length,
            )
            info = msgspec.structs.replace(
                info,
                settings={**info.settings, "omp_wait_policy": wait_policy},
                warnings=warnings,
                embedding=embedding,
                capabilities=msgspec.structs.replace(
                    info.capabilities, embed=embedding is not None
                ),
            )
            embedder = None
            if embedding is not None:
                embedder = GgufEmbedder(
                    path,
                    weights,
                    native,
                    embedding,
                    vocab_size=tokenizer.vocab_size,
                    kv_bytes_per_token=kv_bytes_per_token(header, "f16", "f16"),
                    check_memory=options.check_memory,
                )
            window = 0 if native.swa_full else int(weights.lib.llama_model_n_swa(weights.pointer))
            runtime = GgufRuntime(
                weights,
                context,
                tokenizer,
                info,
                unified=native.kv_unified,
                window=window,
                n_ubatch=min(native.n_ubatch, native.n_batch),
                threads=(native.threads, native.batch_threads),
                spin_control=spin_control(),
                embedder=embedder,
            )
            on_failure.pop_all()
        return runtime

    def tunables(self, model: stoker.LocalModel) -> Sequence[stoker.Tunable]:
        """See ``tuning.tunables``."""
        return tuning.tunables(model)

    def versions(self) -> Mapping[str, str]:
        """See ``tuning.versions``."""
        return tuning.versions()

    def diagnose(self, models: Sequence[stoker.LocalModel]) -> Sequence[stoker.Finding]:
        """See ``diagnosis.diagnose``."""
        return diagnosis.diagnose([model.path for model in models], _trial, rebuild=REBUILD)

    def requantization(self, model: stoker.LocalModel) -> stoker.Requantization | None:
        """See ``tuning.requantization``."""
        return tuning.requantization(model)

    def requantize(self, model: stoker.LocalModel, type_name: str, target: Path) -> None:
        """See ``tuning.requantize``."""
        tuning.requantize(model, type_name, target)


# --------------------------------------------------------------------------- choosing


def _check_options(settings: stoker.LoadSettings, options: GgufOptions) -> None:
    if options.kv_type_v == "q8_0" and options.flash_attention == "off":
        raise stoker.ConfigError("kv_type_v = 'q8_0' needs flash_attention = 'auto' or 'on'")
    if options.kv_tokens is not None and not options.kv_unified:
        raise stoker.ConfigError("kv_tokens needs kv_unified = true")
    if settings.lanes is not None and not 1 <= settings.lanes <= _MAX_LANES:
        raise stoker.ConfigError(f"lanes = {settings.lanes} is not within 1 to {_MAX_LANES}")
    if settings.context_length is not None and settings.context_length < 1:
        raise stoker.ConfigError(f"context = {settings.context_length} is not positive")


def _make_plan(
    path: Path,
    header: GgufHeader,
    weights_bytes: int,
    settings: stoker.LoadSettings,
    options: GgufOptions,
) -> _Plan:
    """Choose lanes, context and threads, and check that the memory holds them."""
    warnings: tuple[str, ...] = ()
    trained = int(header.get("context_length", 0)) or _AUTO_CONTEXT
    context = settings.context_length or min(trained, _AUTO_CONTEXT)
    if context > trained:
        warnings = (
            f"The context of {context} tokens exceeds the {trained} that the model was trained with.",
        )
    per_token = kv_bytes_per_token(header, options.kv_type_k, options.kv_type_v)
    available = machine.available_memory()
    padded = -(-context // _CELL_PADDING) * _CELL_PADDING
    lane_bytes = padded * per_token
    fitting = (available // 2 - weights_bytes) // lane_bytes if lane_bytes else _AUTO_LANES
    lanes = settings.lanes or max(1, min(_AUTO_LANES, fitting))
    cells = lanes * padded
    if options.kv_unified:
        cells = -(-(options.kv_tokens or lanes * context) // _CELL_PADDING) * _CELL_PADDING
        context = min(context, cells)
    kv_bytes = cells * per_token
    # Layers on a GPU need its memory, not the machine's; llama.cpp says if that does not suffice.
    if options.check_memory and not options.gpu_layers and weights_bytes + kv_bytes > available:
        cure = "use a smaller model or a smaller quantization of it"
        if weights_bytes < available:
            cure = "lower the context or the number of lanes"
        raise stoker.OutOfMemoryError(
            f"{path} does not fit: its weights take {machine.format_bytes(weights_bytes)} and the KV "
            f"memory of {lanes} lanes with {context} tokens {machine.format_bytes(kv_bytes)}, but only "
            f"{machine.format_bytes(available)} of memory are free; {cure}"
        )
    threads = settings.threads or options.threads or machine.usable_cores()
    native = NativeSettings(
        lanes=lanes,
        cells=cells,
        n_batch=settings.max_step_tokens + lanes,
        n_ubatch=options.n_ubatch,
        threads=threads,
        batch_threads=settings.threads or options.batch_threads or threads,
        kv_type_k=options.kv_type_k,
        kv_type_v=options.kv_type_v,
        flash_attention=options.flash_attention,
        kv_unified=options.kv_unified,
        swa_full=options.swa_full,
        use_mmap=options.use_mmap,
        use_mlock=options.use_mlock,
        gpu_layers=options.gpu_layers,
        use_extra_buffers=options.use_extra_buffers and not options.exact_kernels,
        exact_kernels=options.exact_kernels,
    )
    return _Plan(
        native=native,
        context_length=context,
        capacity=cells if options.kv_unified else lanes * context,
        kv_bytes=kv_bytes,
        warnings=warnings,
    )


# --------------------------------------------------------------------------- trying


def _trial(path: Path) -> tuple[NativeSettings, list[str]]:
    """What a model would be loaded with by default, tried; and what to warn of.

    Raises:
        ModelError: It cannot be loaded.
    """
    header, weights_bytes = check_files(path)
    plan = _make_plan(path, header, weights_bytes, stoker.LoadSettings(), GgufOptions())
    native, warnings = _try_out(path, plan.native)
    return native, [*plan.warnings, *warnings]


def _try_out(path: Path, native: NativeSettings) -> tuple[NativeSettings, list[str]]:
    """Run the self-test; if it crashes, once more without the extra buffers.

    Returns:
        The settings that work, and what to warn of.
    """
    outcome = run_selftest(path, native)
    crash = outcome.crash
    if crash and crash != "SIGKILL" and native.use_extra_buffers:
        native = msgspec.structs.replace(native, use_extra_buffers=False)
        outcome = run_selftest(path, native)
    if outcome.refused:
        raise stoker.ModelError(outcome.refused)
    if outcome.crash == "SIGKILL":
        raise stoker.OutOfMemoryError(
            f"{path}: the self-test was killed (SIGKILL), most likely because memory ran out; "
            "use a smaller model"
        )
    if outcome.crash:
        raise stoker.ModelError(
            f"{path}: llama.cpp fails on this model ({outcome.crash} in the self-test), with and "
            "without its extra buffers; try another version of llama-cpp-python or another file"
        )
    if outcome.problem:
        return native, [f"The self-test of the model says nothing: {outcome.problem}."]
    if not crash:
        return native, []
    cause = "the AMX kernels" if "amx_tile" in machine.cpu_flags() else "kernels for this CPU"
    warning = (
        "llama.cpp's extra CPU buffers are off, which makes prefill 4 to 5 times slower: with them "
        f"the self-test failed ({crash}). The known cause is gcc 12, which miscompiles {cause}. "
        f"Rebuild it: {REBUILD}."
    )
    return native, [warning]


def _make_context(path: Path, weights: NativeModel, native: NativeSettings) -> NativeContext:
    lib, pointer = weights.lib, weights.pointer
    if lib.llama_model_has_encoder(pointer) or lib.llama_model_is_diffusion(pointer):
        raise stoker.ModelError(f"{path} is no decoder-only language model; it cannot be served")
    if lib.llama_vocab_n_tokens(weights.vocab) == 0:
        raise stoker.ModelError(f"{path} has no vocabulary; it cannot turn text into tokens")
    return NativeContext(path, weights, native)


# --------------------------------------------------------------------------- describing


def _describe(
    model: stoker.LocalModel,
    header: GgufHeader,
    plan: _Plan,
    native: NativeSettings,
    weights: NativeModel,
    tokenizer: GgufTokenizer,
) -> stoker.RuntimeInfo:
    """The facts of the loaded model."""
    lib, pointer = weights.lib, weights.pointer
    template = lib.llama_model_chat_template(pointer, None)
    stateful = lib.llama_model_is_recurrent(pointer) or lib.llama_model_is_hybrid(pointer)
    sliding = lib.llama_model_n_swa(pointer) > 0
    exact = not stateful and (native.swa_full or not sliding)
    exactness = describe_exactness(header.tensor_types, native, on_gpu=weights.on_gpu)
    return stoker.RuntimeInfo(
        name=str(header.metadata.get("general.name") or header.architecture or model.model_id),
        vocab_size=tokenizer.vocab_size,
        context_length=plan.context_length,
        num_lanes=native.lanes,
        kv_capacity_tokens=plan.capacity,
        max_step_tokens=native.n_batch - native.lanes,
        end_token_ids=tokenizer.end_token_ids,
        chat_template=template.decode("utf-8", "replace") if template else None,
        bos_token=tokenizer.text_of(lib.llama_vocab_bos(weights.vocab)),
        eos_token=tokenizer.text_of(lib.llama_vocab_eos(weights.vocab)),
        device="gpu" if weights.on_gpu else "cpu",
        weights_bytes=int(lib.llama_model_size(pointer)),
        kv_bytes=plan.kv_bytes,
        capabilities=stoker.Capabilities(
            truncation="any" if exact else "reset",
            copy_prefix=exact,
            # llama.cpp writes no more than the window of such layers: too little to truncate later.
            snapshot=not (exact and sliding),
            lane_locality=not native.kv_unified,
            exact_block=exactness.block,
            exact_from=exactness.start,
            exact_tail="any" if exactness.any_tail else "whole",
            shares_kv=native.kv_unified,
        ),
        settings={
            "architecture": header.architecture,
            "threads": str(native.threads),
            "batch_threads": str(native.batch_threads),
            "kv_type": f"{native.kv_type_k}/{native.kv_type_v}",
            "kv": "unified" if native.kv_unified else "partitioned",
            "n_batch": str(native.n_batch),
            "n_ubatch": str(min(native.n_ubatch, native.n_batch)),
            "flash_attention": native.flash_attention,
            "extra_buffers": "on" if native.use_extra_buffers else "off",
            "kernels": "exact" if native.exact_kernels else "fast",
            "gpu_layers": str(native.gpu_layers if native.gpu_layers is not None else -1)
            if weights.on_gpu
            else "0",
        },
        fingerprint=f"llama-cpp-python {version('llama-cpp-python')}",
    )
