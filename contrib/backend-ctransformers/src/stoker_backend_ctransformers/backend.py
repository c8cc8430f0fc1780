"""The backend: checks a file, finds out what it is, tries it, loads it once for each lane."""

from __future__ import annotations

import contextlib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

import stoker
from stoker import machine
from stoker_backend_ctransformers.architectures import ARCHITECTURES, architecture_of_name
from stoker_backend_ctransformers.legacy_file import MAGICS, LegacyFile, read_file
from stoker_backend_ctransformers.native import Instance, NativeSettings, find_build
from stoker_backend_ctransformers.options import CTransformersOptions
from stoker_backend_ctransformers.runtime import EXACT_BLOCK, CTransformersRuntime
from stoker_backend_ctransformers.selftest import find_batch_size
from stoker_backend_ctransformers.tokenizer import LegacyTokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["CTransformersBackend"]

_AUTO_LANES = 4
_MAX_LANES = 32  # the library has room for 64 tensor contexts; an instance takes up to two
_AUTO_CONTEXT = 2048
_WORKING_BYTES = (
    256 * 2**20
)  # intermediate results: one buffer for all instances of an architecture
_FROZEN = (
    "ctransformers has not been developed since 2023: convert the model to GGUF or to safetensors "
    "where you can (see the README of stoker-backend-ctransformers)."
)


class CTransformersBackend(stoker.Backend):
    """Loads legacy GGML files through ctransformers."""

    def accepts(self, model: stoker.LocalModel) -> bool:
        """Whether it starts like a GGML file from before GGUF."""
        try:
            with model.path.open("rb") as file:
                return file.read(4) in MAGICS
        except OSError:  # a folder, too
            return False

    def load(self, model: stoker.LocalModel, settings: stoker.LoadSettings) -> CTransformersRuntime:
        """Check the file, try it in a child process, load it once for each lane.

        Raises:
            ConfigError: A setting makes no sense.
            ModelError: The file is broken or of an unknown architecture, or ctransformers refuses it or
                crashes on it.
            OutOfMemoryError: Its instances exceed the free memory.
        """
        path = model.path
        options = settings.options if settings.options is not None else CTransformersOptions()
        _check_settings(settings)
        if path.is_dir():
            raise stoker.ModelError(f"{path} is a folder; name the GGML file in it")
        template = _read_template(options.chat_template)
        file = read_file(path, _architectures(path, options.model_type))
        context, warnings = _choose_context(file, settings.context_length)
        lanes = _choose_lanes(path, file, context, settings.lanes, options)
        build = find_build(options.library)
        native = NativeSettings(
            model_type=file.architecture.name,
            library=str(build),
            context_length=context,
            batch_size=_exact_batch_size(options.batch_size),
            # A thread that lost its core to a neighbour, such as the server, is waited for by all others.
            threads=settings.threads or max(1, machine.usable_cores() - 1),
        )
        if options.self_test:
            batch_size, warning = find_batch_size(path, native)
            native = msgspec.structs.replace(native, batch_size=_exact_batch_size(batch_size))
            warnings += [warning] if warning else []
        with contextlib.ExitStack() as on_failure:
            instances = [_load_instance(on_failure, path, native) for _ in range(lanes)]
            if instances[0].vocab_size != len(file.tokens):
                raise stoker.ModelError(
                    f"{path}: ctransformers reads {instances[0].vocab_size} tokens, but the file has "
                    f"{len(file.tokens)}"
                )
            tokenizer = LegacyTokenizer(file, instances[0])
            info = _describe(model, file, tokenizer, native, options, lanes)
            info = msgspec.structs.replace(
                info,
                context_length=min(context, instances[0].context_length),
                kv_capacity_tokens=lanes * min(context, instances[0].context_length),
                max_step_tokens=settings.max_step_tokens,
                chat_template=template,
                warnings=[*warnings, *_warnings(tokenizer), _FROZEN],
            )
            on_failure.pop_all()
        return CTransformersRuntime(instances, tokenizer, info, batch_size=native.batch_size)

    def versions(self) -> Mapping[str, str]:
        """The version of ctransformers."""
        return {"ctransformers": version("ctransformers")}


# --------------------------------------------------------------------------- choosing


def _check_settings(settings: stoker.LoadSettings) -> None:
    if settings.lanes is not None and not 1 <= settings.lanes <= _MAX_LANES:
        raise stoker.ConfigError(f"lanes = {settings.lanes} is not within 1 to {_MAX_LANES}")
    if settings.context_length is not None and settings.context_length < 1:
        raise stoker.ConfigError(f"context = {settings.context_length} is not positive")


def _architectures(path: Path, model_type: str | None) -> Sequence[str]:
    """Which architectures to try: the one asked for, or all, the likeliest first."""
    if model_type is not None:
        name = architecture_of_name(model_type)
        if name is None:
            raise stoker.ConfigError(
                f"model_type = {model_type!r} is not known; use one of: {', '.join(ARCHITECTURES)}"
            )
        return [name]
    hints = [path.stem]
    with contextlib.suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError):
        found = msgspec.json.decode((path.parent / "config.json").read_bytes(), type=_ModelConfig)
        hints = [found.model_type, *found.architectures, path.stem]
    likely = next((name for hint in hints if (name := architecture_of_name(hint))), None)
    others = [name for name in ARCHITECTURES if name != likely]
    return [likely, *others] if likely else others


class _ModelConfig(msgspec.Struct):
    """What a ``config.json`` beside the file says of the architecture."""

    model_type: str = ""
    architectures: list[str] = []


def _read_template(name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise stoker.ConfigError(f"chat_template = {name!r} cannot be read: {error}") from error


def _choose_context(file: LegacyFile, wanted: int | None) -> tuple[int, list[str]]:
    """Most tokens of a lane, and what to warn of."""
    trained = int(file.header.get("n_ctx", _AUTO_CONTEXT))
    if wanted is None or wanted <= trained:
        return min(wanted or _AUTO_CONTEXT, trained), []
    if "n_ctx" in file.header:
        return trained, [f"The context is {trained} tokens: the file has room for no more."]
    return wanted, [f"The context of {wanted} tokens may exceed what the model was trained with."]


def _exact_batch_size(wanted: int) -> int:
    """The next smaller multiple of the exact block, or power of two."""
    if wanted >= EXACT_BLOCK:
        return int(wanted - wanted % EXACT_BLOCK)
    return 1 << (wanted.bit_length() - 1)


def _kv_bytes(file: LegacyFile, context: int) -> int:
    """Bytes of one instance's KV memory."""
    # Examples of ggml make it as large as the file says, whatever context is asked for.
    fixed = not file.architecture.spm and file.architecture.name != "mpt"
    return file.kv_bytes(file["n_ctx"] if fixed else context)


def _memory_needed(file: LegacyFile, context: int) -> tuple[int, int]:
    """Bytes of each instance, and of what all instances share."""
    kv_bytes = _kv_bytes(file, context)
    if file.mapped:  # those instances have buffers for intermediate results of their own, too
        return kv_bytes + _WORKING_BYTES, file.weights_bytes
    return kv_bytes + file.weights_bytes, _WORKING_BYTES


def _choose_lanes(
    path: Path, file: LegacyFile, context: int, wanted: int | None, options: CTransformersOptions
) -> int:
    """How many instances, which the memory has to hold."""
    each, shared = _memory_needed(file, context)
    available = machine.available_memory()
    lanes = wanted or max(1, min(_AUTO_LANES, (available // 2 - shared) // each))
    if options.check_memory and lanes * each + shared > available:
        cure = "lower the number of lanes" if lanes > 1 else "use a smaller quantisation of it"
        text = machine.format_bytes
        raise stoker.OutOfMemoryError(
            f"{path} does not fit: each of {lanes} lanes takes {text(each)} and all together "
            f"{text(shared)} more, but only {text(available)} of memory are free; {cure}"
        )
    return lanes


def _load_instance(
    on_failure: contextlib.ExitStack, path: Path, native: NativeSettings
) -> Instance:
    instance = Instance(path, native)
    on_failure.callback(instance.close)
    return instance


# --------------------------------------------------------------------------- describing


def _describe(
    model: stoker.LocalModel,
    file: LegacyFile,
    tokenizer: LegacyTokenizer,
    native: NativeSettings,
    options: CTransformersOptions,
    lanes: int,
) -> stoker.RuntimeInfo:
    """The facts of the loaded model; the caller adds those that follow from its settings."""
    copies = 1 if file.mapped else lanes
    truncation = options.truncation if file.architecture.rewinds else "reset"
    return stoker.RuntimeInfo(
        name=model.model_id or file.architecture.name,
        vocab_size=len(file.tokens),
        context_length=native.context_length,
        num_lanes=lanes,
        kv_capacity_tokens=lanes * native.context_length,
        max_step_tokens=1,
        end_token_ids=tokenizer.end_token_ids,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        weights_bytes=copies * file.weights_bytes,
        kv_bytes=lanes * _kv_bytes(file, native.context_length),
        capabilities=stoker.Capabilities(
            truncation=truncation, exact_block=EXACT_BLOCK, exact_tail="whole"
        ),
        settings={
            "architecture": file.architecture.name,
            "format": f"{file.magic} {file.version}" if file.version else file.magic,
            "library": Path(native.library).parent.name,
            "threads": str(native.threads),
            "batch_size": str(native.batch_size),
            "weights": "mapped once" if file.mapped else "read for each lane",
        },
        fingerprint=f"ctransformers {version('ctransformers')}",
    )


def _warnings(tokenizer: LegacyTokenizer) -> list[str]:
    warnings = []
    if tokenizer.num_missing_bytes:
        warnings.append(
            f"The vocabulary has no token for {tokenizer.num_missing_bytes} of the 256 bytes; text "
            "made of them is left out of prompts."
        )
    if not tokenizer.end_token_ids:
        warnings.append(
            "The vocabulary has no end token: answers end at max_tokens or stop strings."
        )
    return warnings
