"""Faults on purpose: a runtime and a policy that go wrong when a test says so.

Both wrap another one and are honest until their script tells them not to be. What a fault may cost is the
engine's promise: at most the requests it hits, and a counter.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.interfaces import PolicyContext, Runtime, SchedulingPolicy
from stoker.testing.reference_sampling import reference_sample
from stoker.types import SampleInput, SequenceView, StepInput, StepOutput, StepRecord

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Fault", "FaultyPolicy", "FaultyRuntime"]


class Fault(enum.Enum):
    """How a step goes wrong."""

    RAISE_BEFORE = "raise before"
    """It raises, and no lane has changed."""
    RAISE_MIDWAY = "raise midway"
    """It raises after half of the tokens went into their lanes."""
    RAISE_AFTER = "raise after"
    """It raises when everything was computed."""
    NO_ROOM = "no room"
    """It says that the KV memory is full."""
    NAN = "nan"
    """All logits are NaN."""
    INFINITE = "infinite"
    """One logit of each row is infinite."""
    NO_LOGITS = "no logits"
    """There is no row of logits at all."""
    FEW_ROWS = "few rows"
    """The last row of logits is missing."""
    MANY_ROWS = "many rows"
    """There is a row of logits too many."""
    NARROW = "narrow"
    """The last column of the logits is missing."""
    WIDE = "wide"
    """There is a column too many, and it wins."""


class FaultyRuntime(Runtime):
    """A runtime that fails as its script says.

    Args:
        inner: The runtime that computes.
        script: Asked before every step; what goes wrong in it, or ``None``.
        truncates: Asked before every ``truncate`` with the lane; false makes it raise.

    Attributes:
        num_failed: Steps that went wrong so far.
        num_failed_truncations: Calls of ``truncate`` that raised.
    """

    def __init__(
        self,
        inner: Runtime,
        script: Callable[[StepInput], Fault | None] = lambda _: None,
        truncates: Callable[[int], bool] = lambda _: True,
    ) -> None:
        self.inner = inner
        self.info = inner.info
        self.tokenizer = inner.tokenizer
        self.script = script
        self.truncates = truncates
        self.num_failed = 0
        self.num_failed_truncations = 0
        self._spoilt: NDArray[np.float32] | None = None

    def step(self, step: StepInput) -> StepOutput:
        """Compute a step, or fail.

        Raises:
            RuntimeError: The script wants it.
        """
        self._spoilt = None
        fault = self.script(step)
        if fault is None:
            return self.inner.step(step)
        self.num_failed += 1
        if fault is Fault.NO_ROOM:
            return StepOutput(np.empty((0, self.info.vocab_size), np.float32), no_room=True)
        if fault is Fault.RAISE_MIDWAY:
            self.inner.step(_first_half(step))
        if fault in (Fault.RAISE_BEFORE, Fault.RAISE_MIDWAY):
            raise RuntimeError(f"scripted fault: {fault.value}")
        output = self.inner.step(step)
        if output.no_room:
            return output
        if fault is Fault.RAISE_AFTER:
            raise RuntimeError(f"scripted fault: {fault.value}")
        self._spoilt = _spoilt(output.logits, fault)
        return StepOutput(self._spoilt)

    def sample(self, batch: SampleInput) -> NDArray[Any]:
        """As the inner runtime does, but from what the script has made of the logits."""
        if self._spoilt is not None:
            return reference_sample(self._spoilt, batch)
        return self.inner.sample(batch)

    def truncate(self, lane: int, num_tokens: int) -> int:
        """Keep the first tokens of a lane, or fail.

        Raises:
            RuntimeError: The script wants it.
        """
        if not self.truncates(lane):
            self.num_failed_truncations += 1
            raise RuntimeError("scripted fault: truncate")
        return self.inner.truncate(lane, num_tokens)

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """As the inner runtime does."""
        self.inner.copy_prefix(source, target, num_tokens)

    def close(self) -> None:
        """Close the inner runtime."""
        self.inner.close()


def _first_half(step: StepInput) -> StepInput:
    half = (len(step.token_ids) + 1) // 2
    return StepInput(
        step.token_ids[:half], step.positions[:half], step.lanes[:half], step.wants_logits[:half]
    )


def _spoilt(logits: NDArray[np.float32], fault: Fault) -> NDArray[np.float32]:
    logits = logits.copy()
    if fault is Fault.NAN:
        logits[:] = np.nan
    elif fault is Fault.INFINITE:
        logits[:, 0] = np.inf
    elif fault is Fault.NO_LOGITS:
        logits = logits[:0]
    elif fault is Fault.FEW_ROWS:
        logits = logits[:-1]
    elif fault is Fault.MANY_ROWS:
        logits = np.concatenate([logits, np.zeros((1, logits.shape[1]), np.float32)])
    elif fault is Fault.NARROW:
        logits = logits[:, :-1]
    elif fault is Fault.WIDE:
        logits = np.concatenate([logits, np.full((len(logits), 1), 99, np.float32)], axis=1)
    return logits


class FaultyPolicy(SchedulingPolicy):
    """A policy whose answers a script may spoil.

    ::

        def spoil(method, honest):  # every second answer is nonsense
            answer = honest()
            return None if next(turns) % 2 else answer

        EngineHarness(FaultyPolicy(FirstComeFirstServed(), spoil))

    Args:
        inner: The policy that answers.
        spoil: Called with the method's name and a function that gives the honest answer; returns the
            answer to give, or raises.
    """

    def __init__(
        self, inner: SchedulingPolicy, spoil: Callable[[str, Callable[[], Any]], Any]
    ) -> None:
        self.inner = inner
        self.spoil = spoil

    def _answer(self, method: str, *arguments: Any) -> Any:
        honest = getattr(self.inner, method)
        return self.spoil(method, lambda: honest(*arguments))

    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """The inner policy's order, perhaps spoilt; so are all others."""
        order: Sequence[SequenceView] = self._answer("admission_order", waiting, context)
        return order

    def preemption_order(
        self, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """See ``admission_order``."""
        order: Sequence[SequenceView] = self._answer("preemption_order", running, context)
        return order

    def victims(
        self, candidate: SequenceView, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """See ``admission_order``."""
        chosen: Sequence[SequenceView] = self._answer("victims", candidate, running, context)
        return chosen

    def prefill_shares(
        self, prefilling: Sequence[SequenceView], budget: int, context: PolicyContext
    ) -> Mapping[int, int] | None:
        """See ``admission_order``."""
        shares: Mapping[int, int] | None = self._answer(
            "prefill_shares", prefilling, budget, context
        )
        return shares

    def admits(self, candidate: SequenceView, context: PolicyContext) -> bool:
        """See ``admission_order``."""
        answer: bool = self._answer("admits", candidate, context)
        return answer

    def decodes(
        self,
        decoding: Sequence[SequenceView],
        prefilling: Sequence[SequenceView],
        context: PolicyContext,
    ) -> Sequence[SequenceView] | None:
        """See ``admission_order``."""
        chosen: Sequence[SequenceView] | None = self._answer(
            "decodes", decoding, prefilling, context
        )
        return chosen

    def may_pass(self, blocked: SequenceView, context: PolicyContext) -> bool:
        """See ``admission_order``."""
        answer: bool = self._answer("may_pass", blocked, context)
        return answer

    def explain(self, admitted: SequenceView, context: PolicyContext) -> str:
        """See ``admission_order``."""
        words: str = self._answer("explain", admitted, context)
        return words

    def on_step(self, record: StepRecord) -> None:
        """See ``admission_order``."""
        self._answer("on_step", record)
