"""The runtime: a ragged step as few ``llama_decode`` calls, lanes as llama.cpp's sequences."""

from __future__ import annotations

import ctypes
import struct
import zlib
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from stoker import EngineError, Runtime, RuntimeInfo, StepInput, StepOutput
from stoker_backend_gguf.batch import Batch
from stoker_backend_gguf.native import take_errors
from stoker_backend_gguf.passes import plan_passes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from stoker_backend_gguf.embedder import GgufEmbedder
    from stoker_backend_gguf.native import NativeContext, NativeModel
    from stoker_backend_gguf.tokenizer import GgufTokenizer
    from stoker_backend_gguf.waiting import SpinControl

__all__ = ["GgufRuntime"]

_NO_ROOM = 1
_UNBOUNDED = 2**31
_SNAPSHOT = struct.Struct("<4sII")  # magic, fingerprint of the model and its KV types, tokens
_SNAPSHOT_MAGIC = b"SKV1"
# What one more ubatch costs, in tokens at short context, and how much KV slows a token as much as itself.
# From decode steps of a 135M model on two CPUs: a base of 3.3 to 5.6 rows, a row doubling in 190 tokens.
_SPLIT_COST = 4.0
_TOKENS_PER_COST = 192.0


class GgufRuntime(Runtime):
    """A loaded model. Made by ``GgufBackend.load``.

    Args:
        model: The weights; closed with the runtime.
        context: The KV memory; closed with the runtime.
        tokenizer: Its tokenizer.
        info: Its facts; ``capabilities.truncation`` says what the memory allows.
        unified: One KV memory for all lanes.
        window: Tokens that a sliding-window layer keeps, if it does not keep all; else 0.
        n_ubatch: Most tokens that llama.cpp computes at once.
        threads: Threads of steps with one token a lane, and of others.
        spin_control: Told of every step.
        embedder: What embeds, if anything does; closed with the runtime.
    """

    def __init__(
        self,
        model: NativeModel,
        context: NativeContext,
        tokenizer: GgufTokenizer,
        info: RuntimeInfo,
        *,
        unified: bool,
        window: int,
        n_ubatch: int,
        threads: tuple[int, int],
        spin_control: SpinControl | None = None,
        embedder: GgufEmbedder | None = None,
    ) -> None:
        self.info = info
        self.tokenizer: GgufTokenizer = tokenizer
        self._lib = model.lib
        self._model = model
        self._context = context
        self._unified = unified or info.num_lanes == 1
        self._window = window
        self._exact = info.capabilities.truncation == "any"
        self._lengths = np.zeros(info.num_lanes, np.int32)
        # Never more than llama.cpp takes, which is capped by the KV memory.
        self._batch = Batch(model.lib, model.lib.llama_n_batch(context.pointer), info.num_lanes)
        self._gathered = np.empty((0, info.vocab_size), np.float32)
        self._n_ubatch = n_ubatch
        self._threads = threads
        self._given_up = 0
        self._spin_control = spin_control
        self._embedder = embedder
        self._no_logits = np.empty((0, info.vocab_size), np.float32)
        settings = repr(
            (info.name, info.vocab_size, info.weights_bytes, info.settings.get("kv_type"))
        )
        self._fingerprint = zlib.crc32(settings.encode())

    def step(self, step: StepInput) -> StepOutput:
        """Compute one ragged forward pass; ``no_room`` if a lane or the KV memory would overflow.

        Raises:
            EngineError: The step is malformed (nothing changed), or llama.cpp failed (the step's lanes
                are back where they were, or empty where the memory cannot go back).
        """
        total = len(step.token_ids)
        self._check_open()
        if total == 0:
            return StepOutput(logits=self._no_logits)
        if total > self.info.max_step_tokens:
            raise EngineError(f"a step of {total} tokens exceeds {self.info.max_step_tokens}")
        starts = np.concatenate(([0], np.flatnonzero(np.diff(step.lanes)) + 1))
        lanes = step.lanes[starts]
        firsts = step.positions[starts]
        ends = firsts + np.diff(starts, append=total)
        self._check_runs(lanes, firsts)
        if total > self._batch.capacity or np.any(ends > self.info.context_length):
            return StepOutput(logits=self._no_logits, no_room=True)

        passes = [list(range(len(lanes)))]
        if not self._unified and self._exact:
            lengths = ends - firsts
            passes = plan_passes(
                lengths.tolist(), self._n_ubatch, self._tails(step, starts, lengths)
            )
        if len(passes) == 1:
            logits = self._pass(step, lanes, ends)
        else:
            logits = self._passes(step, starts, lanes, ends, passes)
        if logits is None:
            return StepOutput(logits=self._no_logits, no_room=True)
        if self._spin_control is not None:
            self._share_cores(self._spin_control)
        return StepOutput(logits=logits)

    def _tails(
        self, step: StepInput, starts: NDArray[np.intp], lengths: NDArray[np.int32]
    ) -> list[int]:
        """Runs that give the same bits only by themselves: ends of prompts, where company changes kernels."""
        if self.info.capabilities.exact_tail == "any":
            return []
        # More than one row, no whole blocks; and more than one row of logits means a draft.
        is_tail = (lengths > 1) & (lengths % self.info.capabilities.exact_block != 0)
        is_tail &= np.add.reduceat(step.wants_logits.astype(np.int32), starts) <= 1
        return np.flatnonzero(is_tail).tolist()

    def truncate(self, lane: int, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` tokens of a lane; where that is impossible, keep none.

        Returns:
            Tokens kept.
        """
        self._check_open()
        length = int(self._lengths[lane])
        if num_tokens >= length:
            return length
        keep = max(num_tokens, 0)
        if self._window:
            # The next token looks back one window: were cells in it given up already?
            first = self._lib.llama_memory_seq_pos_min(self._context.memory, lane)
            keep = keep if first <= max(0, keep - self._window) else 0
        if keep and not self._remove(lane, keep):
            keep = 0
        if not keep:
            self._remove(lane, 0)
        self._lengths[lane] = keep
        return keep

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Make the first ``num_tokens`` tokens of ``source``'s KV the whole of ``target``'s.

        Raises:
            EngineError: The source is shorter, or there is no room.
        """
        if not self.info.capabilities.copy_prefix:
            super().copy_prefix(source, target, num_tokens)
        self._check_open()
        if num_tokens > self._lengths[source]:
            raise EngineError(
                f"lane {source} holds {self._lengths[source]} tokens; {num_tokens} cannot be copied"
            )
        if source == target:
            self.truncate(target, num_tokens)
            return
        self.truncate(target, 0)
        if num_tokens == 0:
            return
        if not self._unified and self.info.capabilities.snapshot:
            # Between partitions seq_cp copies all of the context's cells, and not before the next
            # decode: a snapshot or a restore in between would see wrong KV. Reading and writing the
            # state copies what is used, at once.
            if not self._write_state(target, np.frombuffer(self._read_state(source), np.uint8)):
                raise EngineError(f"lane {source} could not be copied: {take_errors()}")
        else:
            # Partitions are copied whole or not at all.
            start, end = (0, num_tokens) if self._unified else (-1, -1)
            memory = self._context.memory
            self._lib.llama_memory_seq_cp(memory, source, target, start, end)
            self._lengths[target] = num_tokens if self._unified else self._lengths[source]
        self.truncate(target, num_tokens)

    def snapshot(self, lane: int) -> bytes:
        """A lane's KV, to be kept in host memory."""
        if not self.info.capabilities.snapshot:
            return super().snapshot(lane)
        self._check_open()
        head = _SNAPSHOT.pack(_SNAPSHOT_MAGIC, self._fingerprint, int(self._lengths[lane]))
        return self._read_state(lane, head) if self._lengths[lane] else head

    def restore(self, lane: int, snapshot: bytes) -> int:
        """Put a snapshot's KV into a lane.

        Returns:
            Its number of tokens; 0, and an empty lane, if there is no room for it.

        Raises:
            EngineError: It is not a snapshot of this model with these KV types.
        """
        if not self.info.capabilities.snapshot:
            return super().restore(lane, snapshot)
        self._check_open()
        head = snapshot[: _SNAPSHOT.size].ljust(_SNAPSHOT.size, b"\0")
        magic, fingerprint, num_tokens = _SNAPSHOT.unpack(head)
        if magic != _SNAPSHOT_MAGIC or fingerprint != self._fingerprint:
            raise EngineError("this is no snapshot of this model with these KV types")
        self.truncate(lane, 0)
        if num_tokens > self.info.context_length:
            return 0
        if num_tokens:
            self._write_state(lane, np.frombuffer(snapshot, np.uint8, offset=_SNAPSHOT.size))
        return int(self._lengths[lane])

    def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """One vector for each input, pooled as ``info.embedding`` says."""
        (vectors,) = (v for v in self.embed_in_pieces(inputs, _UNBOUNDED) if v is not None)
        return vectors

    def embed_in_pieces(
        self, inputs: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[NDArray[np.float32] | None]:
        """The same with pauses: no more than ``max_tokens`` between two, or one chunk of llama.cpp's."""
        if self._embedder is None:
            yield super().embed(inputs)
            return
        self._check_open()
        for vectors in self._embedder.pieces(inputs, max_tokens):
            if self._spin_control is not None:
                self._share_cores(self._spin_control)
                self._embedder.set_threads(max(1, self._threads[1] - self._given_up))
            yield vectors

    def close(self) -> None:
        """Free the KV memory and the weights. May be called twice."""
        self.tokenizer.close()
        if self._embedder is not None:
            self._embedder.close()
        self._context.close()
        self._model.close()

    # ----------------------------------------------------------------- a step's parts

    def _share_cores(self, control: SpinControl) -> None:
        """Compute with as many threads as there are cores that nobody else keeps busy."""
        control.look(max(self._threads))
        given_up = control.num_given_up
        if given_up != self._given_up:
            self._given_up = given_up
            decode, batch = (max(1, count - given_up) for count in self._threads)
            self._lib.llama_set_n_threads(self._context.pointer, decode, batch)

    def _check_runs(self, lanes: NDArray[np.int32], firsts: NDArray[np.int32]) -> None:
        """Every run of a lane's rows must continue where the lane's KV ends."""
        if lanes.min() < 0 or lanes.max() >= self.info.num_lanes:
            raise EngineError(f"a step names a lane outside 0 to {self.info.num_lanes - 1}")
        if not np.array_equal(firsts, self._lengths[lanes]):
            wrong = int(np.flatnonzero(firsts != self._lengths[lanes])[0])
            lane = int(lanes[wrong])
            raise EngineError(
                f"lane {lane} continues at position {firsts[wrong]} but holds {self._lengths[lane]} tokens"
            )

    def _passes(
        self,
        step: StepInput,
        starts: NDArray[np.intp],
        lanes: NDArray[np.int32],
        ends: NDArray[np.int32],
        passes: list[list[int]],
    ) -> NDArray[np.float32] | None:
        """Compute a step in several passes; ``None`` if there is no room for one of them."""
        spans = [slice(*span) for span in pairwise([*starts.tolist(), len(step.token_ids)])]
        out_rows = np.cumsum(step.wants_logits) - 1
        count = int(out_rows[-1]) + 1
        if len(self._gathered) < count:
            self._gathered = np.empty((count, self.info.vocab_size), np.float32)
        gathered = self._gathered[:count]
        firsts = ends - np.diff(starts, append=len(step.token_ids))
        for runs in passes:
            rows = np.concatenate([np.arange(spans[run].start, spans[run].stop) for run in runs])
            part = StepInput(
                step.token_ids[rows],
                step.positions[rows],
                step.lanes[rows],
                step.wants_logits[rows],
            )
            logits = None
            try:
                logits = self._pass(part, lanes[runs], ends[runs])
            finally:
                if logits is None:  # the passes before this one are not to have happened either
                    self._lengths[lanes] = firsts
                    self._roll_back(lanes.tolist())
            if logits is None:
                return None
            if len(logits) == count and runs is passes[-1]:
                return logits  # only this pass wants any, and none after it overwrites them
            gathered[out_rows[rows[part.wants_logits]]] = logits
        result = gathered.view()
        result.flags.writeable = False
        return result

    def _pass(
        self, step: StepInput, lanes: NDArray[np.int32], ends: NDArray[np.int32]
    ) -> NDArray[np.float32] | None:
        """One ``llama_decode``: the logits, or ``None`` if there is no room, and nothing changed.

        Args:
            step: Its rows.
            lanes: The lane of each of its runs.
            ends: Tokens in each of those lanes afterwards.

        Raises:
            EngineError: llama.cpp failed; the lanes are back where they were.
        """
        bridges = self._bridges(lanes)[: self._batch.capacity - len(step.token_ids)]
        order = self._fill(step, lanes, bridges)
        code = self._lib.llama_decode(self._context.pointer, self._batch.struct)
        if code == _NO_ROOM:  # it changed nothing, and logged that as an error
            take_errors()
            return None
        if code:
            self._roll_back([*lanes.tolist(), *bridges])
            raise EngineError(f"llama.cpp could not compute a step (code {code}): {take_errors()}")
        for lane in bridges:
            self._remove(lane, int(self._lengths[lane]))
        self._lengths[lanes] = ends
        return self._logits(step.wants_logits, order)

    def _bridges(self, lanes: NDArray[np.int32]) -> list[int]:
        """Idle lanes to compute a throw-away token for, so that llama.cpp does not split the step.

        With partitioned KV it computes only lanes with consecutive numbers together: lanes 0, 2, 4 would
        be three passes over the weights. A token in lanes 1 and 3, removed afterwards, makes them one.
        """
        if self._unified or not self._exact:
            return []
        busy = np.sort(lanes)
        if busy[-1] - busy[0] + 1 == len(busy):
            return []
        bridges: list[int] = []
        for before, after in pairwise(busy.tolist()):
            idle = self._lengths[before + 1 : after]
            if (
                len(idle)
                and len(idle) + idle.sum() / _TOKENS_PER_COST <= _SPLIT_COST
                and idle.max() < self.info.context_length
            ):
                bridges.extend(range(before + 1, after))
        return bridges

    def _fill(
        self, step: StepInput, lanes: NDArray[np.int32], bridges: list[int]
    ) -> NDArray[np.intp] | None:
        """Fill the batch, by ascending lanes where llama.cpp wants that.

        Returns:
            For each row of the batch its row in the step, if the order is another one.
        """
        columns = (step.token_ids, step.positions, step.lanes, step.wants_logits)
        ascending = self._unified or bool(np.all(lanes[1:] > lanes[:-1]))
        if ascending and not bridges:
            self._batch.fill(*columns)
            return None
        token_ids, positions, all_lanes, wants = columns
        if bridges:
            count = len(bridges)
            token_ids = np.append(token_ids, np.zeros(count, np.int32))
            positions = np.append(positions, self._lengths[bridges])
            all_lanes = np.append(all_lanes, np.asarray(bridges, np.int32))
            wants = np.append(wants, np.zeros(count, np.bool_))
        order = np.argsort(all_lanes, kind="stable")
        self._batch.fill(token_ids[order], positions[order], all_lanes[order], wants[order])
        # Bridges want no logits, so their rows do not matter.
        return None if ascending else order[order < len(step.token_ids)]

    def _logits(
        self, wants: NDArray[np.bool_], order: NDArray[np.intp] | None
    ) -> NDArray[np.float32]:
        """The step's logits: llama.cpp's own memory, or a copy if rows have to change places."""
        count = int(np.count_nonzero(wants))
        if count == 0:
            return self._no_logits
        pointer = self._lib.llama_get_logits(self._context.pointer)
        logits = np.ctypeslib.as_array(pointer, (count, self.info.vocab_size))
        if order is not None and count > 1:
            rows = np.argsort(order[wants[order]])
            logits = logits.take(rows, axis=0)
        logits.flags.writeable = False
        return logits

    def _roll_back(self, lanes: list[int]) -> None:
        """After a failed decode: bring lanes back to the length they are known to have had."""
        for lane in lanes:
            known = int(self._lengths[lane])
            last = self._lib.llama_memory_seq_pos_max(self._context.memory, lane)
            self._lengths[lane] = last + 1
            self.truncate(lane, known)

    # ----------------------------------------------------------------- a lane's memory

    def _remove(self, lane: int, start: int) -> bool:
        """Remove a lane's cells from ``start`` on; false where the memory cannot cut there."""
        return bool(self._lib.llama_memory_seq_rm(self._context.memory, lane, start, -1))

    def _read_state(self, lane: int, head: bytes = b"") -> bytes:
        """A lane's state behind a head; written where it stays: it is large, and fresh memory is slow."""
        size = self._lib.llama_state_seq_get_size(self._context.pointer, lane)
        state: bytes = _new_bytes(None, len(head) + size)
        address = ctypes.cast(ctypes.c_char_p(state), ctypes.c_void_p).value or 0
        ctypes.memmove(address, head, len(head))
        start = ctypes.cast(address + len(head), ctypes.POINTER(ctypes.c_uint8))
        written = self._lib.llama_state_seq_get_data(self._context.pointer, start, size, lane)
        return state if written == size else state[: len(head) + written]

    def _write_state(self, lane: int, state: NDArray[np.uint8]) -> bool:
        """Put a state into an empty lane; if it does not fit, the lane stays empty."""
        read = self._lib.llama_state_seq_set_data(
            self._context.pointer, _bytes_pointer(state), len(state), lane
        )
        if not read:
            self._remove(lane, 0)
        self._lengths[lane] = 1 + self._lib.llama_memory_seq_pos_max(self._context.memory, lane)
        return bool(read)

    def _check_open(self) -> None:
        if not self._context.pointer:
            raise EngineError(f"the model {self.info.name} is closed")


# Bytes whose contents are to be filled in before anybody else sees them, as CPython's C API offers it.
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype = ctypes.py_object
_new_bytes.argtypes = (ctypes.c_char_p, ctypes.c_ssize_t)


def _bytes_pointer(array: NDArray[np.uint8]) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))  # type: ignore[return-value]
