"""The batch that llama.cpp decodes, as numpy views over its C arrays, made once."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Batch"]


class Batch:
    """A ``llama_batch`` with one sequence per token.

    Args:
        lib: The module of llama.cpp's C functions.
        capacity: Most tokens.
        lanes: Sequence ids are below this.
    """

    def __init__(self, lib: Any, capacity: int, lanes: int) -> None:
        self.capacity = capacity
        self._tokens = np.zeros(capacity, np.int32)
        self._positions = np.zeros(capacity, np.int32)
        self._logits = np.zeros(capacity, np.int8)
        self._one = np.ones(capacity, np.int32)
        # A token's sequence ids are an array of its own in C: here a pointer into this one.
        self._sequence_ids = np.arange(lanes, dtype=np.int32)
        self._lane_pointers = self._sequence_ids.ctypes.data + 4 * np.arange(lanes, dtype=np.uintp)
        self._pointers = np.zeros(capacity, np.uintp)
        # llama.cpp gets the struct by value and only reads; numpy owns all of the memory.
        self.struct = struct = lib.llama_batch()
        struct.token = _pointer(self._tokens, ctypes.c_int32)
        struct.pos = _pointer(self._positions, ctypes.c_int32)
        struct.n_seq_id = _pointer(self._one, ctypes.c_int32)
        struct.seq_id = _pointer(self._pointers, ctypes.POINTER(ctypes.c_int32))
        struct.logits = _pointer(self._logits, ctypes.c_int8)

    def fill(
        self,
        token_ids: NDArray[np.int32],
        positions: NDArray[np.int32],
        lanes: NDArray[np.int32],
        wants_logits: NDArray[np.bool_],
    ) -> None:
        """Set the batch's tokens; arrays of one length, at most ``capacity``."""
        count = len(token_ids)
        self.struct.n_tokens = count
        self._tokens[:count] = token_ids
        self._positions[:count] = positions
        self._logits[:count] = wants_logits
        self._lane_pointers.take(lanes, out=self._pointers[:count])


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))
