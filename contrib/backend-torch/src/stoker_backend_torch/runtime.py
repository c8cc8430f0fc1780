"""The runtime: a ragged step as one call of transformers' model over packed rows; lanes in our own KV."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stoker import (
    DeviceStepOutput,
    EngineError,
    Runtime,
    RuntimeInfo,
    SampleInput,
    StepInput,
    StepOutput,
)
from stoker_backend_torch.attention import KvMemory, attach
from stoker_backend_torch.compiling import compile_layers
from stoker_backend_torch.graphs import DecodeGraphs
from stoker_backend_torch.openmp import keep_threads
from stoker_backend_torch.paged import PagedKv
from stoker_backend_torch.ragged import RaggedBatch, find_runs
from stoker_backend_torch.sampler import TorchSampler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from stoker_backend_torch.embedder import TorchEmbedder
    from stoker_backend_torch.weights import LoadedModel

__all__ = ["TorchRuntime"]

_SNAPSHOT = struct.Struct("<4sII")  # magic, fingerprint of the model and its KV type, tokens
_SNAPSHOT_MAGIC = b"SKT1"


class TorchRuntime(Runtime):
    """A loaded model. Made by ``TorchBackend.load``.

    Args:
        loaded: The model and its tokenizer.
        info: Its facts.
        memory: Its KV memory; the model's attention must be ours.
        embedder: What embeds with it; ``None`` if nothing does.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        info: RuntimeInfo,
        memory: KvMemory,
        embedder: TorchEmbedder | None = None,
    ) -> None:
        self.info = info
        self.tokenizer = loaded.tokenizer
        self._model: Any = loaded.model
        self._device = loaded.device
        self._threads = torch.get_num_threads()  # as set when the model was loaded
        self._memory: KvMemory | None = memory
        self._embedder = embedder
        self._graphs: DecodeGraphs | None = None
        self._lengths = np.zeros(info.num_lanes, np.int64)
        self._sampler: TorchSampler | None = None
        if info.capabilities.samples:
            self._sampler = TorchSampler(loaded.device, info.vocab_size)
        self._logits: torch.Tensor | None = None
        self._no_logits = np.empty((0, info.vocab_size), np.float32)
        self._no_logits.flags.writeable = False
        kind = repr((info.name, info.vocab_size, info.weights_bytes, str(loaded.dtype)))
        self._fingerprint = zlib.crc32(kind.encode())
        attach(self._model, memory)

    def step(self, step: StepInput) -> StepOutput:
        """Compute one ragged forward pass; ``no_room`` if a lane or the memory would overflow.

        Raises:
            EngineError: The step is malformed, or the model gave no finite shape; nothing changed.
        """
        memory = self._open()
        if len(step.token_ids) == 0:
            return StepOutput(logits=self._no_logits)
        starts = find_runs(step, self._lengths, self.info.max_step_tokens)
        if step.token_ids.min() < 0 or step.token_ids.max() >= self.info.vocab_size:
            # A GPU that is asked for what is not there computes no more for the whole process.
            raise EngineError(
                f"a step has a token outside of the vocabulary of {self.info.vocab_size}"
            )
        batch = RaggedBatch.of(step, starts)
        if np.any(batch.ends > self.info.context_length):
            return StepOutput(logits=self._no_logits, no_room=True)
        with torch.inference_mode():
            if not memory.reserve(batch):
                return StepOutput(logits=self._no_logits, no_room=True)
        try:
            self._logits = None if self._graphs is None else self._graphs.run(batch)
            if self._logits is None:
                memory.begin(batch)
                self._logits = self._forward(batch)
        except BaseException:
            # Rows behind a lane's length are nobody's: a pass that failed has changed nothing.
            for lane in batch.touched.tolist():
                memory.truncate(lane, int(self._lengths[lane]))
            raise
        self._lengths[batch.touched] = batch.ends
        if not len(batch.wanted):
            return StepOutput(logits=self._no_logits)
        if self._sampler is not None:
            return DeviceStepOutput(self._fetch)
        return StepOutput(logits=self._fetch(None))

    def sample(self, batch: SampleInput) -> NDArray[np.int64]:
        """Draw tokens from the latest step's logits, on the device."""
        self._open()
        if self._sampler is None:
            raise EngineError(f"{self.info.name} draws no tokens")
        if self._logits is None:
            raise EngineError("there are no logits to draw from")
        tokens: NDArray[np.int64] = self._sampler.sample(self._known(self._logits), batch)
        return tokens

    @torch.inference_mode()
    def _forward(self, batch: RaggedBatch) -> torch.Tensor | None:
        """The wanted rows' logits, ``[R, vocab]``, on the device; ``None`` if none are wanted."""
        keep_threads(self._threads)
        rows = {
            "input_ids": torch.from_numpy(batch.token_ids[None]).to(self._device),
            "position_ids": torch.from_numpy(batch.positions[None]).to(self._device),
            "use_cache": False,
        }
        if not len(batch.wanted):
            self._model.base_model(**rows)  # without its head
            if self._device.type == "cuda":  # or the next step would be charged for this one
                torch.cuda.synchronize(self._device)
            return None
        wanted = torch.from_numpy(batch.wanted).to(self._device)
        logits: torch.Tensor = self._model(**rows, logits_to_keep=wanted).logits[0]
        return logits

    def _fetch(self, rows: NDArray[np.intp] | None) -> NDArray[np.float32]:
        """Rows of the latest step's logits on the host; all of them if none are named."""
        if self._logits is None:
            raise EngineError("the step's logits are gone")
        with torch.inference_mode():
            chosen = self._known(self._logits)
            if rows is not None:
                chosen = chosen[torch.from_numpy(rows).to(self._device)]
            logits: NDArray[np.float32] = chosen.float().cpu().numpy()
        logits.flags.writeable = False
        return logits

    def _known(self, logits: torch.Tensor) -> torch.Tensor:
        """Without the columns of a padded vocabulary, for which there are no tokens."""
        return logits[:, : self.info.vocab_size]

    def compile(self) -> float:
        """Compile the model's layers; the lanes must be empty. Returns the seconds that it took."""
        self._open()

        def warm_up(count: int) -> None:
            self.truncate(0, 0)
            rows = np.arange(min(count, self.info.context_length), dtype=np.int32)
            same = np.zeros_like(rows)
            self.step(StepInput(same, rows, same, rows == rows[-1]))
            self.truncate(0, 0)

        return compile_layers(self._model, self.info.name, warm_up)

    def record(self) -> list[int]:
        """Record decode steps as CUDA graphs, if attention can be recorded; the batch sizes that worked."""
        memory = self._open()
        if not isinstance(memory, PagedKv) or not memory.attention.is_static:
            return []
        graphs = DecodeGraphs(self._model, memory, self._device)
        graphs.prepare()
        self._graphs = graphs if graphs.sizes else None
        return graphs.sizes

    def truncate(self, lane: int, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` tokens of a lane; returns how many there are then."""
        memory = self._open()
        self._lengths[lane] = max(0, min(num_tokens, int(self._lengths[lane])))
        memory.truncate(lane, int(self._lengths[lane]))
        return int(self._lengths[lane])

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Make the first ``num_tokens`` tokens of ``source``'s KV the whole of ``target``'s.

        Raises:
            EngineError: The source is shorter.
        """
        memory = self._open()
        if num_tokens > self._lengths[source]:
            raise EngineError(
                f"lane {source} holds {self._lengths[source]} tokens; {num_tokens} cannot be copied"
            )
        with torch.inference_mode():
            memory.copy_prefix(source, target, num_tokens)
        self._lengths[target] = num_tokens

    def snapshot(self, lane: int) -> bytes:
        """A lane's KV, to be kept in host memory."""
        memory, length = self._open(), int(self._lengths[lane])
        head = _SNAPSHOT.pack(_SNAPSHOT_MAGIC, self._fingerprint, length)
        with torch.inference_mode():
            return head + memory.read(lane, length)

    def restore(self, lane: int, snapshot: bytes) -> int:
        """Put a snapshot's KV into a lane.

        Returns:
            Its number of tokens; 0, and an empty lane, if there is no room for it.

        Raises:
            EngineError: It is not a snapshot of this model with this KV type, or it is damaged.
        """
        memory = self._open()
        head = snapshot[: _SNAPSHOT.size].ljust(_SNAPSHOT.size, b"\0")
        magic, fingerprint, num_tokens = _SNAPSHOT.unpack(head)
        if magic != _SNAPSHOT_MAGIC or fingerprint != self._fingerprint:
            raise EngineError("this is no snapshot of this model with this KV type")
        self.truncate(lane, 0)
        if num_tokens > self.info.context_length:
            return 0
        try:
            with torch.inference_mode():
                if not memory.write(lane, num_tokens, snapshot[_SNAPSHOT.size :]):
                    return 0
        except ValueError as error:
            raise EngineError(f"the snapshot is damaged: {error}") from error
        self._lengths[lane] = num_tokens
        return int(num_tokens)

    def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See ``Runtime.embed``."""
        if self._embedder is None:
            return super().embed(inputs)
        return self._embedder.embed(inputs)

    def embed_in_pieces(
        self, inputs: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[NDArray[np.float32] | None]:
        """See ``Runtime.embed_in_pieces``."""
        if self._embedder is None:
            return super().embed_in_pieces(inputs, max_tokens)
        return self._embedder.pieces(inputs, max_tokens)

    def close(self) -> None:
        """Free the KV memory and the weights. May be called twice."""
        if self._embedder is not None:
            self._embedder.close()
        if self._memory is not None:
            attach(self._model, None)
        if self._graphs is not None:
            self._graphs.close()
        self._graphs = None
        self._memory = None
        self._model = None
        self._logits = None

    def _open(self) -> KvMemory:
        if self._memory is None:
            raise EngineError(f"the model {self.info.name} is closed")
        return self._memory
