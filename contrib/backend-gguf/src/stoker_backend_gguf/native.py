"""The border to llama.cpp: environment, library, log, and models and contexts as owned handles.

Only the bindings' low-level functions are used. ``lib`` below is the module ``llama_cpp.llama_cpp``.
"""

from __future__ import annotations

import collections
import importlib.util
import logging
import os
import threading
from pathlib import Path
from typing import Any, Literal

import msgspec

from stoker import ModelError
from stoker import OutOfMemoryError as StokerOutOfMemoryError
from stoker_backend_gguf.options import KvType

__all__ = [
    "NativeContext",
    "NativeModel",
    "NativeSettings",
    "library",
    "library_folder",
    "prepare_tiles",
    "take_errors",
]

logger = logging.getLogger("stoker.backend.gguf")

_KV_TYPES: dict[KvType, int] = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}  # enum ggml_type
_FLASH_ATTENTION = {
    "auto": "LLAMA_FLASH_ATTN_TYPE_AUTO",
    "on": "LLAMA_FLASH_ATTN_TYPE_ENABLED",
    "off": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
}
_LOAD_MODES = {
    (False, False): "LLAMA_LOAD_MODE_NONE",
    (True, False): "LLAMA_LOAD_MODE_MMAP",
    (False, True): "LLAMA_LOAD_MODE_MLOCK",
    (True, True): "LLAMA_LOAD_MODE_MMAP_MLOCK",
}
_LOG_ERROR, _LOG_CONTINUED = 4, 5
_TILES = "GGML_CPU_TILED_MM"

_lock = threading.Lock()
_errors: collections.deque[str] = collections.deque(maxlen=8)
# llama.cpp keeps a bare pointer to the callback, so it has to live as long as the process does.
_state: dict[str, Any] = {}


class NativeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a model and a context are made with; the self-test's child gets them as JSON.

    Attributes:
        lanes: Sequences.
        cells: KV cells in all, over all lanes.
        n_batch: Most tokens of one decode call.
        n_ubatch: Most tokens computed at once.
        threads: Threads for decoding.
        batch_threads: Threads for prefill.
        kv_type_k: How keys are stored.
        kv_type_v: How values are stored.
        flash_attention: ``auto``, ``on`` or ``off``.
        kv_unified: One KV memory for all lanes.
        swa_full: Keep all of the context of sliding-window layers.
        use_mmap: Map the file.
        use_mlock: Lock the weights into memory.
        gpu_layers: Layers on a GPU, -1 for all, ``None`` for all if there is one.
        use_extra_buffers: Repack weights for matrix instructions.
    """

    lanes: int
    cells: int
    n_batch: int
    n_ubatch: int
    threads: int
    batch_threads: int
    kv_type_k: KvType
    kv_type_v: KvType
    flash_attention: Literal["auto", "on", "off"]
    kv_unified: bool
    swa_full: bool
    use_mmap: bool
    use_mlock: bool
    gpu_layers: int | None
    use_extra_buffers: bool
    exact_kernels: bool = False


def prepare_tiles(*, exact: bool) -> str | None:
    """Switch ggml's tiles of K-quants off, or leave them on; that holds for the whole process.

    Returns:
        A warning if it came too late, because another model has computed already.
    """
    if "exact" not in _state and _TILES in os.environ:
        return None  # the user has decided
    if _state.setdefault("exact", exact) == exact:
        if exact:
            os.environ[_TILES] = "0"
        return None
    return (
        "exact_kernels holds for a whole process, and another model was loaded before with the other "
        "setting: set it in [plugins.gguf], for all"
    )


def library() -> Any:
    """The module of llama.cpp's C functions, loaded and initialised once for the process.

    Raises:
        ModelError: llama-cpp-python is not installed or its library does not load.
    """
    with _lock:
        if "lib" not in _state:
            _state["lib"] = _load_library()
        return _state["lib"]


def library_folder() -> Path | None:
    """Where the bindings find llama.cpp's shared libraries; ``None`` if they are not installed."""
    named = os.environ.get("LLAMA_CPP_LIB_PATH")
    if named is not None:
        return Path(named)
    spec = importlib.util.find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    return Path(places[0]) / "lib" if places else None


def take_errors() -> str:
    """What llama.cpp logged as errors since the last call, in one line; empty if nothing."""
    lines = list(dict.fromkeys(_errors))
    _errors.clear()
    return "; ".join(lines)


def _load_library() -> Any:
    try:
        import llama_cpp.llama_cpp as lib  # noqa: PLC0415 - heavy, and reads the environment
    except (ImportError, OSError, RuntimeError) as error:
        raise ModelError(
            f"llama-cpp-python cannot be loaded ({error}); reinstall it: "
            "pip install --force-reinstall --no-cache-dir llama-cpp-python"
        ) from error
    callback = lib.llama_log_callback(_on_log)
    _state["log_callback"] = callback
    lib.llama_log_set(callback, None)
    lib.llama_backend_init()
    return lib


def _on_log(level: int, text: bytes, _user_data: object) -> None:
    """llama.cpp's log, on whatever thread it comes; must not raise."""
    if level < _LOG_ERROR or level == _LOG_CONTINUED:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", text.decode("utf-8", "replace").rstrip())
        return
    line = " ".join(text.decode("utf-8", "replace").split())
    logger.debug("%s", line)
    if line:
        _errors.append(line)


class NativeModel:
    """A loaded ``llama_model``; free it with ``close``, which may be called twice."""

    def __init__(self, path: Path, settings: NativeSettings) -> None:
        """Load a model.

        Raises:
            ModelError: llama.cpp refuses the file; quotes its reason.
            OutOfMemoryError: Its buffers could not be allocated.
        """
        self.lib = lib = library()
        params = lib.llama_model_default_params()
        params.load_mode = getattr(lib, _LOAD_MODES[settings.use_mmap, settings.use_mlock])
        params.use_extra_bufts = settings.use_extra_buffers
        self.on_gpu = bool(lib.llama_supports_gpu_offload()) and settings.gpu_layers != 0
        wanted = -1 if settings.gpu_layers is None else settings.gpu_layers
        params.n_gpu_layers = wanted if self.on_gpu else 0
        _errors.clear()
        self.pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise _refusal(path, "cannot load it")
        self.vocab = lib.llama_model_get_vocab(self.pointer)

    def metadata(self, key: str) -> str:
        """A metadata value of the model as text; empty if it is not there."""
        import ctypes  # noqa: PLC0415 - only here

        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = self.lib.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if needed < size:
                return buffer.value.decode("utf-8", "replace")
            size = needed + 1

    def close(self) -> None:
        """Free the weights."""
        if self.pointer:
            self.lib.llama_model_free(self.pointer)
            self.pointer = self.vocab = None


class NativeContext:
    """A ``llama_context`` with its KV memory; free it with ``close``, before its model."""

    def __init__(
        self,
        path: Path,
        model: NativeModel,
        settings: NativeSettings,
        *,
        embeddings: bool = False,
    ) -> None:
        """Make a context.

        Args:
            path: The model file, for messages.
            model: The weights.
            settings: What to make it with.
            embeddings: Whether it hands out embeddings of tokens, unpooled, instead of logits.

        Raises:
            ModelError: llama.cpp refuses, or the model has no KV memory and cannot generate text.
            OutOfMemoryError: Its buffers could not be allocated.
        """
        self.lib = lib = model.lib
        params = lib.llama_context_default_params()
        params.n_ctx = settings.cells
        params.n_seq_max = settings.lanes
        params.n_batch = settings.n_batch
        params.n_ubatch = min(settings.n_ubatch, settings.n_batch)
        params.n_threads = settings.threads
        params.n_threads_batch = settings.batch_threads
        params.type_k = _KV_TYPES[settings.kv_type_k]
        params.type_v = _KV_TYPES[settings.kv_type_v]
        params.flash_attn_type = getattr(lib, _FLASH_ATTENTION[settings.flash_attention])
        params.kv_unified = settings.kv_unified
        params.swa_full = settings.swa_full
        params.embeddings = embeddings
        if embeddings:
            params.pooling_type = lib.LLAMA_POOLING_TYPE_NONE
        params.no_perf = True
        _errors.clear()
        self.pointer = lib.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise _refusal(path, "cannot make a context for it")
        self.memory = lib.llama_get_memory(self.pointer)
        if not self.memory:
            self.close()
            raise ModelError(f"{path} has no KV memory: it does not generate text")

    def close(self) -> None:
        """Free the context and its KV memory."""
        if self.pointer:
            self.lib.llama_free(self.pointer)
            self.pointer = self.memory = None


def _refusal(path: Path, what: str) -> ModelError:
    reason = take_errors() or "it does not say why; set the log level to debug"
    kind = StokerOutOfMemoryError if "alloc" in reason else ModelError
    return kind(f"{path}: llama.cpp {what}: {reason}")
