"""Speculative decoding: several tokens of a sequence in one step, guessed first and verified then.

A drafter guesses; the guesses ride in the same step behind the sequence's pending token; ``sampler.verify``
keeps those that the model would have chosen anyway. So the output is that of decoding one by one, token for
token, and only the number of steps changes. What is decided here is who drafts how much.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.draft_costs import DraftCostModel
from stoker.engine.draft_length import Acceptance, choose_lengths
from stoker.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from stoker.config import SpeculationConfig
    from stoker.engine.advance import Advance
    from stoker.engine.drafters import Drafter
    from stoker.engine.plan import Plan
    from stoker.engine.scheduler import Scheduler
    from stoker.engine.sequence import Sequence
    from stoker.interfaces import RuntimeInfo

__all__ = ["Speculator", "StepDrafts"]

logger = logging.getLogger("stoker.engine")

_OWN_MEMORY = 16.0  # tokens that a sequence's acceptance remembers
_SHARED_MEMORY = 200.0  # the same for the model
_FREE_PRIOR = 0.3  # acceptance before anything is known, of guesses that cost nothing
_MODEL_PRIOR = 0.7  # and of a draft model's
_FIRST_ROWS = 8  # most draft tokens of a step while nobody knows what they cost
_PROBE_TOKENS = 4  # draft tokens of a probe that costs nothing to guess
_DEAR_PROBE_TOKENS = 1  # and of one that does
_PROBE_AFTER = 64  # steps without drafts before the first probe; then twice as many, and so on
_PROBE_AFTER_MOST = 4096
_REFRESH_AFTER = (
    32  # steps with drafts in a row before one without: it shows what they are compared with
)
_PROBE_RATE = 0.4  # below, a guess whose acceptance is known anyway needs no probe
_FORCED_RATE = 0.999  # acceptance of what a grammar leaves no choice about
_REST = 32  # steps without drafts after a step with drafts found no room or failed


@dataclass(slots=True)
class StepDrafts:
    """What one step's drafts came to.

    Attributes:
        num_drafts: Sequences that had one.
        num_draft_tokens: Their tokens.
        accepted: By sequence id, how many of them became output.
        accepted_per_position: Of those, how many were the first, second, ... of their draft.
        num_shapes: Different numbers of draft tokens among the step's decodes, less one.
        spent_s: Seconds spent on guessing.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    accepted: dict[int, int] = field(default_factory=dict)
    accepted_per_position: list[int] = field(default_factory=list)
    num_shapes: int = 0
    spent_s: float = 0.0


class Speculator:
    """Drafts for one model's steps; on the loop's thread.

    Args:
        model: The served model's id, for the log.
        drafter: Who guesses.
        config: How much.
        info: The model's facts.
        scheduler: Its budgets, KV and costs.
        clock: Monotonic seconds.

    Attributes:
        step: What the drafts of the step at hand, or the last one, came to.
        num_errors: How often the drafter failed so far: once, since it is then switched off.
    """

    def __init__(
        self,
        model: str,
        drafter: Drafter,
        config: SpeculationConfig,
        info: RuntimeInfo,
        scheduler: Scheduler,
        clock: Callable[[], float],
    ) -> None:
        self._model = model
        self._drafter: Drafter | None = drafter
        self._max_tokens = config.max_draft_tokens
        block = scheduler.lanes.blocks.block
        if block > 1:
            # With its pending token a draft is a piece that must stay shorter than a block.
            self._max_tokens = min(self._max_tokens, block - 2)
        self._adaptive = config.adaptive
        self._vocab_size = info.vocab_size
        self._ends = info.end_token_ids
        self._scheduler = scheduler
        self._clock = clock
        self._is_free = drafter.is_free
        prior = _FREE_PRIOR if drafter.is_free else _MODEL_PRIOR
        self._shared = Acceptance(_SHARED_MEMORY, prior)
        self._own: dict[int, Acceptance] = {}
        self._guesses: dict[int, list[int]] = {}  # what was guessed for the step, computed or not
        self._forced: set[int] = set()  # of those, what a grammar leaves no choice about
        self._costs = DraftCostModel()
        self._drafted_steps = 0
        self._quiet_steps = 0
        self._probe_after = _PROBE_AFTER
        self._rest = 0
        self._next_rest = _REST
        self._banned: set[int] = set()
        self.step = StepDrafts()
        self.num_errors = 0

    # ------------------------------------------------------------------ before a step

    def draft(self, plan: Plan) -> None:
        """Add drafts to a plan that has its room, as far as they pay and fit into what is left."""
        self.step = StepDrafts()
        self._guesses = {}
        self._forced = set()
        drafter = self._drafter
        if drafter is None or not plan.decodes:
            return
        if self._rest:
            self._rest -= 1
            return
        limits = self._limits(plan)
        if not limits:
            return
        sequences = [s for s in plan.decodes if s.sequence_id in limits]
        started_s = self._clock()
        try:
            chosen = self._draft(drafter, sequences, limits, plan)
        except Exception as error:  # noqa: BLE001 - it only saves time: the model answers without
            self.switch_off(error)
            return
        finally:
            self.step.spent_s = self._clock() - started_s
        if chosen:
            self._put(chosen, plan)

    def _limits(self, plan: Plan) -> dict[int, int]:
        """Most draft tokens of each sequence, if any: a step gives one token more than it has drafts."""
        limits = {}
        for sequence in plan.decodes:
            limit = min(self._max_tokens, sequence.max_tokens - sequence.num_output - 1)
            if limit > 0 and sequence.sequence_id not in self._banned:
                limits[sequence.sequence_id] = limit
        return limits

    def _draft(
        self, drafter: Drafter, sequences: list[Sequence], limits: dict[int, int], plan: Plan
    ) -> dict[int, list[int]]:
        """The draft of each sequence that gets one."""
        max_rows = self._room(plan)
        if self._is_free:
            guesses = self._checked(self._proposed(drafter, sequences, limits), sequences, limits)
            self._guesses = guesses
            able = [s for s in sequences if s.sequence_id in guesses]
            limits = {key: len(guess) for key, guess in guesses.items()}
            lengths = self._lengths(able, limits, plan, max_rows)
            return {key: guesses[key][:length] for key, length in lengths.items()}
        lengths = self._lengths(sequences, limits, plan, max_rows)
        if not lengths:
            return {}
        able = [s for s in sequences if s.sequence_id in lengths]
        self._guesses = self._checked(self._proposed(drafter, able, lengths), able, lengths)
        return self._guesses

    def _proposed(
        self, drafter: Drafter, sequences: list[Sequence], limits: Mapping[int, int]
    ) -> Mapping[int, NDArray[np.int32]]:
        """What the drafter guesses, but what a grammar forces where it leaves no choice."""
        proposed = drafter.propose(sequences, limits)
        forced = {
            sequence.sequence_id: np.asarray(tokens, np.int32)
            for sequence in sequences
            if sequence.constraint is not None and (tokens := sequence.constraint.forced())
        }
        self._forced = set(forced)
        return {**proposed, **forced} if forced else proposed

    def _room(self, plan: Plan) -> int:
        """Draft tokens that the step's budget and the KV memory have room for."""
        scheduler = self._scheduler
        used = plan.num_tokens
        free = scheduler.lanes.capacity_tokens - scheduler.lanes.used_tokens
        return min(scheduler.token_budget, free) - used

    def _checked(
        self,
        proposed: Mapping[int, NDArray[np.int32]],
        sequences: Iterable[Sequence],
        limits: Mapping[int, int],
    ) -> dict[int, list[int]]:
        """What was proposed, cut to what may be computed: token ids, as many as wanted, and no end."""
        guesses = {}
        for sequence in sequences:
            draft = proposed.get(sequence.sequence_id)
            if draft is None:
                continue
            tokens: list[int] = draft[: limits[sequence.sequence_id]].tolist()
            ends = () if sequence.sampling.ignore_eos else self._ends
            for at, token in enumerate(tokens):
                # An end token is not computed either: nothing would follow it.
                if not 0 <= token < self._vocab_size or token in ends:
                    del tokens[at:]
                    break
            if tokens and sequence.constraint is not None:
                del tokens[sequence.constraint.count_valid(tokens) :]
            if tokens:
                guesses[sequence.sequence_id] = tokens
        return guesses

    def _put(self, chosen: dict[int, list[int]], plan: Plan) -> None:
        plan.drafts = {key: np.asarray(tokens, np.int32) for key, tokens in chosen.items()}
        # What idle lanes retain yields to drafts: their room would be needed a few steps later anyway.
        if not self._scheduler.lanes.make_room(plan.num_tokens):
            plan.drafts = {}
            return
        step = self.step
        step.num_drafts = len(chosen)
        step.num_draft_tokens = sum(map(len, chosen.values()))
        lengths = {len(tokens) for tokens in chosen.values()}
        step.num_shapes = len(lengths) - (len(plan.decodes) == len(chosen))
        step.accepted_per_position = [0] * max(lengths)

    # ------------------------------------------------------------------ how much

    def _lengths(
        self, sequences: list[Sequence], limits: Mapping[int, int], plan: Plan, max_rows: int
    ) -> dict[int, int]:
        """The draft length of each sequence that is to have a draft, at most its limit."""
        if not sequences or max_rows <= 0:
            return {}
        wanted = [limits[s.sequence_id] for s in sequences]
        if not self._adaptive:
            return _in_turn(sequences, wanted, max_rows)
        num_decodes = len(plan.decodes)
        depth_s = 0.0 if self._drafter is None else self._drafter.depth_s
        cost = self._costs.cost(num_decodes, self._scheduler.costs.cost.prefill_s, depth_s)
        self._drafted_steps += 1
        if cost is None or self._drafted_steps > _REFRESH_AFTER:
            # Drafts are measured against steps without, and those must not be of long ago.
            self._drafted_steps = 0
            return {}
        if not self._costs.knows_drafts(num_decodes):
            max_rows = min(max_rows, _FIRST_ROWS)
        shared = self._shared.rate()
        rates = [self._rate(s, shared) for s in sequences]
        lengths = choose_lengths(num_decodes, rates, wanted, cost, max_rows)
        if any(lengths):
            self._quiet_steps, self._probe_after = 0, _PROBE_AFTER
            return {s.sequence_id: k for s, k in zip(sequences, lengths, strict=True) if k}
        return self._probe(sequences, rates, wanted, max_rows)

    def _rate(self, sequence: Sequence, shared: float) -> float:
        """The acceptance to expect of a sequence's draft."""
        if sequence.sequence_id in self._forced:
            return _FORCED_RATE
        own = self._own.get(sequence.sequence_id)
        return shared if own is None else own.rate(shared)

    def _probe(
        self, sequences: list[Sequence], rates: list[float], wanted: list[int], max_rows: int
    ) -> dict[int, int]:
        """Now and then, and ever more rarely, a short draft: what is known may not be true any more."""
        self._drafted_steps = 0
        self._quiet_steps += 1
        if self._quiet_steps < self._probe_after:
            return {}
        at = max(range(len(rates)), key=rates.__getitem__)
        if self._is_free and rates[at] < _PROBE_RATE:
            return {}
        self._quiet_steps = 0
        self._probe_after = min(2 * self._probe_after, _PROBE_AFTER_MOST)
        length = _PROBE_TOKENS if self._is_free else _DEAR_PROBE_TOKENS
        return {sequences[at].sequence_id: min(length, wanted[at], max_rows)}

    # ------------------------------------------------------------------ after a step

    def measure(self, num_prefill_tokens: int, num_decodes: int, seconds: float) -> float:
        """Learn from how long the step took.

        Args:
            num_prefill_tokens: Its prompt tokens.
            num_decodes: Its sequences that decoded.
            seconds: How long it took.

        Returns:
            How long it would have taken without drafts.
        """
        step = self.step
        seconds -= step.spent_s
        if num_decodes and not num_prefill_tokens:
            self._costs.observe(num_decodes, seconds, step.num_draft_tokens, step.num_shapes)
        if not step.num_draft_tokens:
            return seconds
        added_s = self._costs.added_s(num_decodes, step.num_draft_tokens, step.num_shapes)
        return max(0.0, seconds - added_s)

    def settle(self, sequence: Sequence, tokens: list[int], done: Advance, plan: Plan) -> bool:
        """Learn what a draft was worth, and take out of the lane what was not accepted.

        Args:
            sequence: A sequence that got tokens.
            tokens: What was sampled for it: what was accepted of its draft, and one more.
            done: What became of it.
            plan: The step.

        Returns:
            Whether the lane holds what the sequence says; if not, it has to be computed again.
        """
        self._learn(sequence, tokens)
        draft = plan.drafts.get(sequence.sequence_id)
        if draft is None:
            return True
        self._next_rest = _REST
        self._count(sequence, len(draft), min(len(tokens) - 1, done.num_tokens))
        if done.error is not None:
            return True  # its lane is emptied anyway
        computed = sequence.num_computed + len(draft)
        # As without drafts, all but the last token: also where it ended in the middle of its draft.
        kept = sequence.num_computed = sequence.num_tokens - 1
        sequence.num_known = max(sequence.num_known, kept)
        if kept == computed:
            return True
        try:
            self._scheduler.lanes.rewind(sequence)
        except EngineError:
            sequence.num_computed = 0
        if sequence.num_computed == kept:
            return True
        self._banned.add(sequence.sequence_id)
        return False

    def _learn(self, sequence: Sequence, tokens: list[int]) -> None:
        guess = self._guesses.get(sequence.sequence_id)
        if guess is None or sequence.sequence_id in self._forced:
            return
        # The token after the last accepted one is a trial as well, also if its guess was not computed.
        seen = min(len(guess), len(tokens))
        right = 0
        while right < seen and guess[right] == tokens[right]:
            right += 1
        own = self._own.get(sequence.sequence_id)
        if own is None:
            own = self._own[sequence.sequence_id] = Acceptance(_OWN_MEMORY)
        own.observe(right, rejected=right < seen)
        self._shared.observe(right, rejected=right < seen)

    def _count(self, sequence: Sequence, num_drafted: int, num_accepted: int) -> None:
        sequence.facts.draft_tokens += num_drafted
        sequence.facts.accepted_tokens += num_accepted
        is_predicted = (
            self._drafter is not None
            and sequence.sequence_id in self._drafter.predicted
            and sequence.sequence_id not in self._forced
        )
        if is_predicted:
            sequence.facts.accepted_prediction += num_accepted
            sequence.facts.rejected_prediction += num_drafted - num_accepted
        step = self.step
        step.accepted[sequence.sequence_id] = num_accepted
        for position in range(num_accepted):
            step.accepted_per_position[position] += 1

    def take_back(self, plan: Plan) -> None:
        """A step with drafts found no room or failed: do without for a while, longer each time."""
        plan.drafts = {}
        self._guesses = {}
        self.step = StepDrafts(spent_s=self.step.spent_s)
        self._rest = self._next_rest
        self._next_rest = min(2 * self._next_rest, _PROBE_AFTER_MOST)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        key = sequence.sequence_id
        self._own.pop(key, None)
        self._guesses.pop(key, None)
        self._banned.discard(key)
        if self._drafter is None:
            return
        try:
            self._drafter.forget(key)
        except Exception as error:  # noqa: BLE001 - see draft
            self.switch_off(error)

    def switch_off(self, error: Exception) -> None:
        """Go on without drafts, for good."""
        self.num_errors += 1
        name = type(self._drafter).__name__
        logger.error(
            "model %s: speculative decoding is off from now on: %s failed: %r",
            self._model,
            name,
            error,
            exc_info=error,
        )
        self._drafter = None
        self._guesses = {}


def _in_turn(sequences: list[Sequence], wanted: list[int], max_rows: int) -> dict[int, int]:
    """All that is wanted, for as many as there is room for."""
    lengths = {}
    for sequence, length in zip(sequences, wanted, strict=True):
        length = min(length, max_rows)
        if length:
            lengths[sequence.sequence_id] = length
            max_rows -= length
    return lengths
