"""Calls a policy and checks what it returns: a bad policy costs a counter, never the loop."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Views
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from stoker.interfaces import PolicyContext, SchedulingPolicy

if TYPE_CHECKING:
    from stoker.engine.sequence import Sequence
    from stoker.types import SequenceView, StepRecord

__all__ = ["SLOW_CALL_S", "PolicyGuard"]

logger = logging.getLogger("stoker.scheduler")

SLOW_CALL_S = 0.05
"""A call that takes longer is counted and warned of: while a policy thinks, nothing is computed."""

_MAX_WORDS = 200  # characters of an explanation
_WARN_EVERY_S = 60.0

T = TypeVar("T")


class PolicyGuard:
    """A policy whose answers are valid.

    Args:
        policy: The plugin's object.
        clock: Monotonic seconds.

    Attributes:
        may_preempt: Whether the policy ever names victims for a newcomer.
        wants_records: Whether the policy accounts for steps.
        selects_decodes: Whether the policy ever leaves decodes out.
        num_errors: How often the policy raised or returned nonsense.
        num_slow_calls: How often it took longer than ``SLOW_CALL_S``.
        spent_s: Seconds spent in the policy so far.
    """

    def __init__(
        self, policy: SchedulingPolicy, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._policy = policy
        self._clock = clock
        kind = type(policy)
        self.may_preempt = kind.victims is not SchedulingPolicy.victims
        self.selects_decodes = kind.decodes is not SchedulingPolicy.decodes
        self._admits = kind.admits is not SchedulingPolicy.admits
        self._explains = kind.explain is not SchedulingPolicy.explain
        self._shares_prefill = kind.prefill_shares is not SchedulingPolicy.prefill_shares
        self.wants_records = kind.on_step is not SchedulingPolicy.on_step
        self.num_errors = 0
        self.num_slow_calls = 0
        self.spent_s = 0.0
        self._warned_s = -_WARN_EVERY_S

    def admission_order(
        self, waiting: tuple[SequenceView, ...], context: PolicyContext
    ) -> Views[SequenceView]:
        """A permutation of ``waiting``; arrival order if the policy fails."""
        return self._guarded(
            "admission_order",
            lambda: _permutation(self._policy.admission_order(waiting, context), waiting),
            lambda: sorted(waiting, key=_by_arrival),
        )

    def preemption_order(
        self, running: list[SequenceView], context: PolicyContext
    ) -> Views[SequenceView]:
        """A permutation of ``running``; latest arrival first if the policy fails."""
        return self._guarded(
            "preemption_order",
            lambda: _permutation(self._policy.preemption_order(tuple(running), context), running),
            lambda: sorted(running, key=_by_arrival, reverse=True),
        )

    def victims(
        self, candidate: SequenceView, running: list[SequenceView], context: PolicyContext
    ) -> Views[SequenceView]:
        """Some of ``running``; nobody if the policy fails."""
        return self._guarded(
            "victims",
            lambda: _some(self._policy.victims(candidate, tuple(running), context), running),
            list,
        )

    def prefill_shares(
        self, prefilling: list[Sequence], budget: int, context: Callable[[], PolicyContext]
    ) -> Mapping[int, int] | None:
        """Tokens for every prefilling sequence, within the budget; ``None`` for even shares."""
        if not self._shares_prefill:
            return None
        views = tuple(sequence.snapshot() for sequence in prefilling)
        now = context()

        def ask() -> dict[int, int] | None:
            shares = self._policy.prefill_shares(views, budget, now)
            return None if shares is None else _within(shares, prefilling, budget)

        return self._guarded("prefill_shares", ask, _nothing)

    def admits(self, candidate: SequenceView, context: PolicyContext) -> bool:
        """Whether the candidate may start now; yes if the policy fails."""
        if not self._admits:
            return True
        return self._guarded(
            "admits", lambda: _yes_or_no(self._policy.admits(candidate, context)), lambda: True
        )

    def may_pass(self, blocked: SequenceView, context: PolicyContext) -> bool:
        """Whether others may be admitted before a blocked one; no if the policy fails."""
        return self._guarded(
            "may_pass", lambda: _yes_or_no(self._policy.may_pass(blocked, context)), lambda: False
        )

    def decodes(
        self,
        decoding: list[Sequence],
        prefilling: list[Sequence],
        context: Callable[[], PolicyContext],
    ) -> set[int] | None:
        """Ids of the sequences that decode in this step; ``None`` for all."""
        views = tuple(sequence.snapshot() for sequence in decoding)
        others = tuple(sequence.snapshot() for sequence in prefilling)
        now = context()

        def ask() -> set[int] | None:
            chosen = self._policy.decodes(views, others, now)
            return None if chosen is None else {view.sequence_id for view in _some(chosen, views)}

        return self._guarded("decodes", ask, _nothing)

    def explain(self, admitted: SequenceView, context: PolicyContext) -> str:
        """Why a sequence was next, in one short line."""
        if not self._explains:
            return ""
        return self._guarded(
            "explain", lambda: _one_line(self._policy.explain(admitted, context)), str
        )

    def on_step(self, record: StepRecord) -> None:
        """Let the policy account for a step."""
        if self.wants_records:
            self._guarded("on_step", lambda: self._policy.on_step(record), _nothing)

    # ------------------------------------------------------------------ errors and time

    def _guarded(self, method: str, ask: Callable[[], T], fall_back: Callable[[], T]) -> T:
        """What ``ask`` answers; what ``fall_back`` does if it raises."""
        started_s = self._clock()
        try:
            return ask()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
            self._failed(method, error)
            return fall_back()
        finally:
            self._took(method, self._clock() - started_s)

    def _failed(self, method: str, error: BaseException) -> None:
        self.num_errors += 1
        if self.num_errors == 1 or self.num_errors % 1000 == 0:
            logger.error(
                "policy %s.%s failed (%d failures of the policy so far), falling back to "
                "arrival order: %r",
                type(self._policy).__name__,
                method,
                self.num_errors,
                error,
            )

    def _took(self, method: str, seconds: float) -> None:
        self.spent_s += seconds
        if seconds <= SLOW_CALL_S:
            return
        self.num_slow_calls += 1
        now_s = self._clock()
        if now_s - self._warned_s >= _WARN_EVERY_S:
            self._warned_s = now_s
            logger.warning(
                "policy %s.%s took %.3f s, in which nothing was computed (%d calls took more than "
                "%g s so far)",
                type(self._policy).__name__,
                method,
                seconds,
                self.num_slow_calls,
                SLOW_CALL_S,
            )


# What a policy returned, checked: each raises if it is nonsense. The answers are made of the core's own
# views, whatever a policy's look like, and no more of them are taken than there can be.


def _some(chosen: Iterable[SequenceView], given: Views[SequenceView]) -> list[SequenceView]:
    by_id = {view.sequence_id: view for view in given}
    ids = [view.sequence_id for view in itertools.islice(chosen, len(given) + 1)]
    if len(set(ids)) != len(ids):
        raise ValueError("returned a sequence twice")
    if not by_id.keys() >= set(ids):
        raise ValueError("returned a sequence that it was not given")
    return [by_id[sequence_id] for sequence_id in ids]


def _permutation(order: Iterable[SequenceView], given: Views[SequenceView]) -> list[SequenceView]:
    views = _some(order, given)
    if len(views) != len(given):
        raise ValueError("did not return all of the sequences it was given")
    return views


def _within(shares: Mapping[int, Any], prefilling: list[Sequence], budget: int) -> dict[int, int]:
    checked = {
        s.sequence_id: min(_whole(shares.get(s.sequence_id, 0)), s.num_pending) for s in prefilling
    }
    total = sum(checked.values())
    if not 0 < total <= budget or min(checked.values()) < 0:
        raise ValueError(f"shares add up to {total} of a budget of {budget} tokens")
    return checked


def _whole(share: Any) -> int:
    if isinstance(share, str | bytes):
        raise TypeError(f"returned a share that is no number: {share[:50]!r}")
    return int(share)


def _yes_or_no(answer: Any) -> bool:
    if not isinstance(answer, bool | np.bool_):
        raise TypeError(f"returned {type(answer).__name__}, not a bool")
    return bool(answer)


def _one_line(words: Any) -> str:
    if not isinstance(words, str):
        raise TypeError(f"returned {type(words).__name__}, not a str")
    return " ".join(words[: 4 * _MAX_WORDS].split())[:_MAX_WORDS]


def _nothing() -> None:
    return None


def _by_arrival(view: SequenceView) -> tuple[float, int]:
    return view.arrival_s, view.sequence_id
