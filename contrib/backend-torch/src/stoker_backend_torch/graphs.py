"""CUDA graphs: a step of one token a lane is recorded once for each of a few batch sizes, and replayed.

A small model's decode step is hundreds of kernels that each take less time than it takes to start them; a
replay starts all of them at once. A recording always has the same shapes and the same memory: a step is put
into buffers, filled up to the next size with rows of nobody, which write to the pool's scratch block.

This has not been run on a GPU by this project so far: its sizes and buffers are tested with a recording that
computes anew. A recording that fails, or says something else than the model does, is not used.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stoker_backend_torch.block_attention import BlockStep
from stoker_backend_torch.choosing import is_same

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from stoker_backend_torch.paged import PagedKv
    from stoker_backend_torch.ragged import RaggedBatch

__all__ = ["CudaRecording", "DecodeGraphs", "Recording", "batch_sizes"]

logger = logging.getLogger("stoker.torch")


class Recording(ABC):
    """A computation that can be repeated.

    Attributes:
        output: What it computes; the same memory each time.
    """

    output: torch.Tensor

    @abstractmethod
    def replay(self) -> None:
        """Compute again, with what the buffers hold now."""


class CudaRecording(Recording):
    """A CUDA graph.

    Args:
        compute: What to record; run a few times before, so that nothing is compiled or allocated any more.
    """

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = compute()

    def replay(self) -> None:
        """See ``Recording.replay``."""
        self._graph.replay()


@dataclass(frozen=True, slots=True)
class _Buffers:
    """A step of decodes on the device, of one size B.

    Attributes:
        token_ids: ``int64[1, B]``.
        positions: ``int64[1, B]``.
        slots: ``int64[B]``.
        tables: ``int32[B, W]``.
        lengths: ``int32[B]``.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor


def batch_sizes(num_lanes: int) -> list[int]:
    """1, 2, 4, 8 and so on, up to the number of lanes, which is the last one."""
    sizes = [1]
    while sizes[-1] < num_lanes:
        sizes.append(min(2 * sizes[-1], num_lanes))
    return sizes


class DecodeGraphs:
    """The recordings of one model.

    Args:
        model: transformers' model, attached to its memory.
        memory: Its memory; how it attends is static.
        device: Where they are.
        record: Makes a recording.
    """

    def __init__(
        self,
        model: Any,
        memory: PagedKv,
        device: torch.device,
        record: Callable[[Callable[[], torch.Tensor]], Recording] = CudaRecording,
    ) -> None:
        self._model = model
        self._memory = memory
        self._device = device
        self._record = record
        self._recordings: dict[int, tuple[_Buffers, Recording]] = {}

    @property
    def sizes(self) -> list[int]:
        """The batch sizes that are recorded."""
        return list(self._recordings)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Record all sizes, with rows of nobody; without any if one fails, with a warning."""
        try:
            for size in batch_sizes(len(self._memory.tables.lengths)):
                # The greatest first would need the least memory, but the least tells soonest what fails.
                self._prepare(size)
        except Exception as error:  # noqa: BLE001 - whatever it is, steps work without
            self._recordings.clear()
            logger.warning("decode steps are not recorded as CUDA graphs: %s", error)

    @torch.inference_mode()
    def run(self, batch: RaggedBatch) -> torch.Tensor | None:
        """Compute a step that has room.

        Returns:
            The wanted rows' logits, ``[R, vocab]``, until the next call; ``None`` if it is no step for a
            recording.
        """
        count = len(batch.token_ids)
        size = next((size for size in self._recordings if size >= count), None)
        if size is None or batch.runs or not len(batch.wanted):
            return None
        buffers, recording = self._recordings[size]
        self._fill(buffers, batch)
        recording.replay()
        rows = recording.output
        if np.array_equal(batch.wanted, np.arange(count)):
            return rows[:count]
        return rows[torch.from_numpy(batch.wanted).to(self._device)]

    def close(self) -> None:
        """Let go of the recordings."""
        self._recordings.clear()
        self._model = None

    def _prepare(self, size: int) -> None:
        buffers = self._buffers(size)

        def compute() -> torch.Tensor:
            self._memory.begin_at(
                BlockStep(
                    num_decodes=size,
                    runs=(),
                    tables=np.empty((0, 0), np.int32),
                    lengths=np.empty(0, np.int64),
                    device_tables=buffers.tables,
                    device_lengths=buffers.lengths,
                ),
                buffers.slots,
            )
            output = self._model(
                input_ids=buffers.token_ids, position_ids=buffers.positions, use_cache=False
            )
            logits: torch.Tensor = output.logits[0]
            return logits

        recording = self._record(compute)
        # Other tokens than those it was recorded with: a recording that ignores its buffers is found out.
        buffers.token_ids.fill_(1)
        want = compute().clone()
        recording.replay()
        if not is_same(recording.output, want):
            raise RuntimeError(f"a graph of {size} rows gives other logits than the model")
        self._recordings[size] = buffers, recording

    def _buffers(self, size: int) -> _Buffers:
        tables = self._memory.tables

        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=self._device)

        return _Buffers(
            token_ids=full(1, size),
            positions=full(1, size),
            slots=full(size, value=tables.scratch * tables.block_size),
            tables=full(size, tables.tables.shape[1], value=tables.scratch, dtype=torch.int32),
            lengths=full(size, value=1, dtype=torch.int32),
        )

    def _fill(self, buffers: _Buffers, batch: RaggedBatch) -> None:
        """Put a step into the first rows; the rest is a token of nobody's, in the scratch block."""
        size, tables = len(buffers.slots), self._memory.tables

        def put(buffer: torch.Tensor, values: NDArray[np.integer], rest: int) -> None:
            padded = np.full((size, *values.shape[1:]), rest, values.dtype)
            padded[: len(values)] = values
            buffer.copy_(torch.from_numpy(padded).view(buffer.shape))

        put(buffers.token_ids, batch.token_ids, 0)
        put(buffers.positions, batch.positions, 0)
        put(
            buffers.slots,
            tables.slots(batch.lanes, batch.positions),
            tables.scratch * tables.block_size,
        )
        put(buffers.tables, tables.tables[batch.lanes], tables.scratch)
        put(buffers.lengths, tables.lengths[batch.lanes].astype(np.int32), 1)
