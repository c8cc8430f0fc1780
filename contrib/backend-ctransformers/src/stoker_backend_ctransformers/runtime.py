"""The runtime: a ragged step as one evaluation after the other, lanes as instances of the model."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from stoker import EngineError, Runtime, RuntimeInfo, StepInput, StepOutput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stoker_backend_ctransformers.native import Instance
    from stoker_backend_ctransformers.tokenizer import LegacyTokenizer

__all__ = ["EXACT_BLOCK", "CTransformersRuntime"]

EXACT_BLOCK = 32
"""ggml adds products up in groups of 32 cells of KV; what remains, in a way that depends on how much it is.
See ``Capabilities.exact_block`` and ``exact_tail``."""


class CTransformersRuntime(Runtime):
    """A loaded model. Made by ``CTransformersBackend.load``.

    Args:
        instances: One for each lane; closed with the runtime.
        tokenizer: The tokenizer; closed with the runtime.
        info: Its facts; ``capabilities.truncation`` says what ``truncate`` does.
        batch_size: Most tokens computed at once; a multiple or a divisor of ``EXACT_BLOCK``.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        tokenizer: LegacyTokenizer,
        info: RuntimeInfo,
        *,
        batch_size: int,
    ) -> None:
        self.info = info
        self.tokenizer: LegacyTokenizer = tokenizer
        self._instances = list(instances)
        self._lengths = [0] * len(self._instances)
        self._batch_size = batch_size
        self._rewinds = info.capabilities.truncation == "any"
        self._logits = np.empty((0, info.vocab_size), np.float32)

    def step(self, step: StepInput) -> StepOutput:
        """Compute one ragged forward pass, lane by lane; ``no_room`` if a lane would overflow.

        Raises:
            EngineError: The step is malformed (nothing changed), or ctransformers failed (its lane is back
                where it was, or empty where it cannot go back; those after it were not touched).
        """
        self._check_open()
        total = len(step.token_ids)
        if total == 0:
            return StepOutput(logits=self._logits[:0])
        edges = [0, *(np.flatnonzero(np.diff(step.lanes)) + 1).tolist(), total]
        runs = [(int(step.lanes[start]), start, end) for start, end in pairwise(edges)]
        self._check(step, runs)
        limit = self.info.context_length
        if any(self._lengths[lane] + end - start > limit for lane, start, end in runs):
            return StepOutput(logits=self._logits[:0], no_room=True)

        rows = int(np.count_nonzero(step.wants_logits))
        if rows > len(self._logits):
            self._logits = np.empty((rows, self.info.vocab_size), np.float32)
        row = 0
        for lane, start, end in runs:
            wanted = np.flatnonzero(step.wants_logits[start:end]).tolist()
            length = self._lengths[lane]
            # Should this fail, what cannot go back to where it was is empty.
            self._lengths[lane] = length if self._rewinds else 0
            self._compute(
                lane,
                length,
                step.token_ids[start:end],
                wanted,
                self._logits[row : row + len(wanted)],
            )
            self._lengths[lane] = length + end - start
            row += len(wanted)
        return StepOutput(logits=self._logits[:rows])

    def truncate(self, lane: int, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` tokens of a lane, or none where ``truncation`` is ``reset``.

        Returns:
            Tokens kept.
        """
        self._check_open()
        length = self._lengths[lane]
        if num_tokens < length:
            # Nothing to do in the instance: each evaluation says at which position it goes on.
            self._lengths[lane] = max(num_tokens, 0) if self._rewinds else 0
        return self._lengths[lane]

    def close(self) -> None:
        """Free all instances. May be called twice."""
        self.tokenizer.close()
        for instance in self._instances:
            instance.close()
        self._instances.clear()

    # ------------------------------------------------------------------ computing

    def _compute(
        self,
        lane: int,
        first: int,
        tokens: NDArray[np.int32],
        wanted: Sequence[int],
        logits: NDArray[np.float32],
    ) -> None:
        """Compute a lane's tokens; only the last row of an evaluation has logits, so it is cut after each."""
        instance, end = self._instances[lane], len(tokens)
        start = 0
        for row, index in enumerate(wanted):
            self._evaluate(instance, tokens[start : index + 1], first + start)
            logits[row] = instance.logits()
            start = index + 1
        if start < end:
            self._evaluate(instance, tokens[start:], first + start)
        # Such cuts have changed the last bits of the KV, which other prompts may find later: once more,
        # unless there is no whole block: then it is a draft, or so short that it does not matter.
        block = -first % EXACT_BLOCK
        last = end - (first + end) % EXACT_BLOCK
        cuts = [index + 1 for index in wanted if block < index + 1 < end]
        if self._rewinds and block < last and any((first + cut) % EXACT_BLOCK for cut in cuts):
            self._evaluate(instance, tokens[block:last], first + block)
            if last < end:
                self._evaluate(instance, tokens[last:], first + last)

    def _evaluate(self, instance: Instance, tokens: NDArray[np.int32], position: int) -> None:
        """Evaluate in batches that end at multiples of the batch size, wherever they begin."""
        start, size = 0, self._batch_size
        while start < len(tokens):
            end = min(len(tokens), start + size - (position + start) % size)
            instance.evaluate(tokens[start:end], position + start)
            start = end

    # ------------------------------------------------------------------ checks

    def _check(self, step: StepInput, runs: Sequence[tuple[int, int, int]]) -> None:
        lanes = [lane for lane, _, _ in runs]
        if len(set(lanes)) < len(lanes):
            raise EngineError("the rows of a lane are not together")
        if not all(0 <= lane < len(self._instances) for lane in lanes):
            raise EngineError(f"a step for lanes {lanes}; there are {len(self._instances)}")
        if int(step.token_ids.min()) < 0 or int(step.token_ids.max()) >= self.info.vocab_size:
            # ctransformers would read beyond its memory.
            raise EngineError(f"a token is not within the vocabulary of {self.info.vocab_size}")
        for lane, start, end in runs:
            length = self._lengths[lane]
            if not np.array_equal(
                step.positions[start:end], np.arange(length, length + end - start)
            ):
                raise EngineError(
                    f"rows of lane {lane} do not continue at position {length}: "
                    f"{step.positions[start:end][:4].tolist()}"
                )

    def _check_open(self) -> None:
        if not self._instances:
            raise EngineError(f"{self.info.name} is closed")
