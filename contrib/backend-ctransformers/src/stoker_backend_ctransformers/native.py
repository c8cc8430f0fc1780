"""ctransformers' model class as this backend uses it: evaluate at a position, read the last logits.

Its generation loop and its samplers are not used. Each instance is one model with one KV memory.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from stoker import EngineError, ModelError
from stoker.machine import cpu_flags

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Instance", "NativeSettings", "find_build"]


class NativeSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance is made with; the self-test's child gets them as JSON.

    Attributes:
        model_type: The architecture, as ctransformers calls it.
        library: The shared library's file.
        context_length: Most tokens of an instance, where the architecture lets one choose.
        batch_size: Most tokens that are computed at once.
        threads: Compute threads.
    """

    model_type: str
    library: str
    context_length: int
    batch_size: int
    threads: int


def find_build(wanted: str | None) -> Path:
    """The shared library of a build (``avx2``, ``avx``, ``basic``), or of the best one for this CPU.

    Raises:
        ModelError: ctransformers is not installed or brings no build for this platform.
    """
    try:
        import ctransformers.lib as builds  # noqa: PLC0415 - heavy

        compiled_here = (Path(builds.__file__).parent / "lib" / "local").is_dir()
        if wanted is None and not compiled_here and platform.machine() == "x86_64":
            wanted = _best_build(cpu_flags())
        return Path(builds.find_library(wanted))
    except (ImportError, OSError) as error:
        raise ModelError(
            f"ctransformers cannot be loaded ({str(error).splitlines()[0]}); it has builds for Linux and "
            "Windows on x86-64 and for macOS: pip install --force-reinstall ctransformers"
        ) from error


def _best_build(flags: frozenset[str]) -> str | None:
    """The choice of ctransformers itself, without the second that it takes to look at the CPU."""
    if not flags:
        return None  # not Linux: leave it to ctransformers
    if "avx2" in flags:
        return "avx2"
    return "avx" if {"avx", "f16c"} <= flags else "basic"


class Instance:
    """One loaded model with one KV memory. Free it with ``close``, which may be called twice.

    Args:
        path: The model file, of an architecture and format that were checked.
        settings: What to load it with.

    Raises:
        ModelError: ctransformers refuses it.
    """

    def __init__(self, path: Path, settings: NativeSettings) -> None:
        from ctransformers.llm import LLM, Config  # noqa: PLC0415 - heavy

        config = Config(context_length=settings.context_length, mmap=True)
        try:
            self._model: Any = LLM(
                os.fspath(path), settings.model_type, config=config, lib=settings.library
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"{path}: ctransformers cannot load it: {error}") from error
        self.vocab_size = int(self._model.vocab_size)
        self.context_length = int(self._model.context_length)
        self._batch_size = settings.batch_size
        self._threads = settings.threads
        # The first evaluation sets how large the memory for later ones has to be, for each token.
        self.evaluate(np.zeros(1, np.int32), 0)

    def evaluate(self, token_ids: NDArray[np.int32], position: int) -> None:
        """Compute tokens that follow the first ``position`` ones; the KV of those is kept.

        Args:
            token_ids: ``int32[n]``, ids within the vocabulary.
            position: Of the first of them; ``position + n`` is at most the context.

        Raises:
            EngineError: ctransformers failed.
        """
        tokens = np.ascontiguousarray(token_ids, np.int32)
        done = self._model.ctransformers_llm_batch_eval(
            tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int)),
            len(tokens),
            position,
            self._batch_size,
            self._threads,
        )
        if not done:
            raise EngineError(f"ctransformers failed on {len(tokens)} tokens at {position}")

    def logits(self) -> NDArray[np.float32]:
        """``float32[vocab]`` of the last token that was evaluated; a view, valid until the next one is."""
        size = int(self._model.ctransformers_llm_logits_size())
        if size < self.vocab_size:
            raise EngineError(f"ctransformers made {size} logits instead of {self.vocab_size}")
        data = np.ctypeslib.as_array(self._model.ctransformers_llm_logits_data(), (size,))
        return data[size - self.vocab_size :]

    def tokenize(self, text: bytes, *, add_bos: bool) -> list[int]:
        """Token ids of UTF-8 text without NUL bytes; called from any thread, one at a time."""
        tokens = (ctypes.c_int * (len(text) + 8))()
        count = self._model.ctransformers_llm_tokenize(text, add_bos, tokens)
        return list(tokens[:count])

    @property
    def bos_token_id(self) -> int:
        """The beginning-of-sequence token."""
        return int(self._model.bos_token_id)

    @property
    def eos_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self._model.eos_token_id)

    def close(self) -> None:
        """Free the weights and the KV memory."""
        self._model = None  # its finaliser does
