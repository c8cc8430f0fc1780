"""Drafts are made where they pay: on a clock that moves by what a step costs."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import pytest

from stoker import StepInput
from stoker.config import SpeculationConfig
from stoker.engine.draft_costs import DraftCostModel
from stoker.engine.draft_length import DraftCost
from stoker.engine.drafters import Drafter
from stoker.engine.ngram import NgramDrafter
from stoker.engine.sequence import Sequence
from stoker.testing import EngineHarness, FakeClock, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins.fcfs import FirstComeFirstServed

BASE_S, ROW_S = 0.004, 0.0032  # as measured for a 135M model on two cores
WORDS = "".join(random.Random(3).choices("abcdefghijklmnopqrstuvwxyz ", k=60))


class Machine:
    """An engine whose steps take a base and so much for each row."""

    def __init__(
        self,
        drafter: Drafter | None,
        *,
        lanes: int = 1,
        period: int = 60,
        surprise_every: int = 0,
        row_s: float = ROW_S,
        **speculation: Any,
    ) -> None:
        self.clock = FakeClock()
        self.row_s = row_s
        self.rows: list[int] = []
        self.runtime = ScriptedRuntime(
            lanes=lanes,
            context_length=4000,
            options=ScriptedOptions(period=period, surprise_every=surprise_every),
        )
        self.runtime.before_step = self.spend
        self.harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=self.runtime,
            clock=self.clock,
            drafter=drafter,
            speculation=SpeculationConfig(**speculation),
        )

    def spend(self, step: StepInput) -> None:
        self.rows.append(len(step.token_ids))
        self.clock.advance(BASE_S + self.row_s * len(step.token_ids))

    def serve(self, prompts: list[str], max_tokens: int) -> tuple[float, list[Submitted]]:
        """Tokens per second from the first to the last token, and the requests."""
        requests = [self.harness.submit(prompt, max_tokens=max_tokens) for prompt in prompts]
        while not all(request.deltas for request in requests):
            self.harness.step()
        started_s = self.clock()
        before = sum(delta.num_tokens for request in requests for delta in request.deltas)
        self.harness.run()
        after = sum(delta.num_tokens for request in requests for delta in request.deltas)
        return (after - before) / (self.clock() - started_s), requests


def test_a_copied_text_alone_gets_half_as_many_tokens_again_per_second() -> None:
    plain, (expected,) = Machine(None).serve([WORDS], 300)
    drafted, (request,) = Machine(NgramDrafter(2, 4)).serve([WORDS], 300)
    assert request.text() == expected.text()
    assert drafted >= 1.5 * plain


def test_a_busy_batch_of_copies_is_no_slower_and_hardly_drafts() -> None:
    prompts = [f"{i}{WORDS}"[:60] for i in range(16)]
    plain, _ = Machine(None, lanes=16).serve(prompts, 200)
    drafted, _ = Machine(NgramDrafter(2, 4), lanes=16).serve(prompts, 200)
    assert drafted >= 0.99 * plain
    machine = Machine(NgramDrafter(2, 4), lanes=16, surprise_every=5)
    drafted, requests = machine.serve(prompts, 200)
    assert drafted >= 0.99 * plain
    assert sum(t.draft_tokens for r in requests for t in r.traces()) < 100


def test_a_free_text_is_not_slowed_down() -> None:
    plain, _ = Machine(None, period=0).serve([WORDS], 600)
    machine = Machine(NgramDrafter(1, 3), period=0, min_ngram=1)
    drafted, (request,) = machine.serve([WORDS], 600)
    assert drafted >= 0.99 * plain
    assert request.traces()[0].draft_tokens < 30


def test_a_crowd_drafts_where_rows_are_cheap() -> None:
    """As on a device that is bound by memory: a row costs next to nothing, even in a batch of 16."""
    prompts = [f"{i}{WORDS}"[:60] for i in range(16)]
    plain, _ = Machine(None, lanes=16, row_s=0.00001).serve(prompts, 200)
    drafted, _ = Machine(NgramDrafter(2, 4), lanes=16, row_s=0.00001).serve(prompts, 200)
    assert drafted >= 3 * plain


def test_a_copy_is_found_again_after_a_long_free_text() -> None:
    """What was guessed is compared even when nothing was drafted, so nothing has to be tried out for it."""
    machine = Machine(NgramDrafter(2, 4), period=0)
    machine.serve([WORDS], 1500)
    machine.runtime.options = ScriptedOptions(period=60)
    machine.runtime._tokens = np.zeros((1, 4000), np.int64)
    _, (request,) = machine.serve([WORDS], 200)
    (trace,) = request.traces()
    assert trace.num_decode_steps < 80


def test_when_the_crowd_is_gone_the_one_that_stays_is_drafted_for() -> None:
    machine = Machine(NgramDrafter(2, 4), lanes=16)
    machine.serve([f"{i}{WORDS}"[:60] for i in range(16)], 100)
    _, (request,) = machine.serve([WORDS], 200)
    assert request.traces()[0].num_decode_steps < 90


def test_costs_that_were_wrong_are_probed_ever_more_rarely() -> None:
    machine = Machine(NgramDrafter(2, 4))
    speculator = machine.harness.engine.speculator
    assert speculator is not None
    for _ in range(10):
        speculator._costs.observe(1, BASE_S + ROW_S, 0, 0)
    for _ in range(50):
        speculator._costs.observe(1, 10.0, 8, 0)  # something went badly wrong
    assert speculator._costs.added_s(1, 1, 0) > 2 * ROW_S
    _, (request,) = machine.serve([WORDS], 3000)
    (trace,) = request.traces()
    assert trace.accepted_tokens > 100, "it has found out that drafts pay"


def test_without_adaptivity_drafts_are_as_long_as_they_may_be() -> None:
    machine = Machine(NgramDrafter(2, 4), adaptive=False, max_draft_tokens=5)
    machine.serve([WORDS], 120)
    assert max(machine.rows[1:]) == 6
    assert machine.rows.count(6) > 8


class Guesser(Drafter):
    """Not free: right with a probability, and each token costs time on the machine's clock."""

    def __init__(self, share_right: float, cost_s: float) -> None:
        self.share_right = share_right
        self.depth_s = cost_s
        self.dice = random.Random(5)
        self.machine: Machine
        self.num_calls = 0

    def propose(
        self, sequences: Rows[Sequence], limits: Mapping[int, int]
    ) -> dict[int, np.ndarray[Any, Any]]:
        self.num_calls += 1
        self.machine.clock.advance(self.depth_s * max(limits.values()))
        drafts = {}
        for sequence in sequences:
            limit = limits[sequence.sequence_id]
            known = sequence.tokens[: sequence.num_tokens].tolist()
            right = list(self.machine.runtime.expected_text(known, limit).encode())
            drafts[sequence.sequence_id] = np.array(
                [t if self.dice.random() < self.share_right else 0 for t in right], np.int32
            )
        return drafts

    def forget(self, sequence_id: int) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("share_right", "cost_s"), [(0.95, 0.0003), (0.2, 0.001), (0.9, 0.02)])
def test_a_drafter_that_costs_time_is_never_a_loss(share_right: float, cost_s: float) -> None:
    plain, _ = Machine(None, period=0).serve([WORDS], 800)
    guesser = Guesser(share_right, cost_s)
    machine = guesser.machine = Machine(guesser, period=0)
    drafted, _ = machine.serve([WORDS], 800)
    assert drafted >= 0.97 * plain
    if cost_s < 0.001:
        assert drafted >= 1.4 * plain
    else:
        assert guesser.num_calls < 60


# --------------------------------------------------------------------------- what drafts cost


def fitted(cost_of: Callable[[int, int, int], float]) -> DraftCostModel:
    dice = random.Random(1)
    model = DraftCostModel()
    for _ in range(3000):
        decodes = dice.randint(4, 7)
        lengths = [dice.choice([0, 0, 4, 8]) for _ in range(decodes)]
        if dice.random() < 0.3:
            lengths = [0] * decodes
        shapes = len(set(lengths)) - 1
        seconds = cost_of(decodes, sum(lengths), shapes) * dice.uniform(0.95, 1.05)
        model.observe(decodes, seconds, sum(lengths), shapes)
    return model


def test_the_cost_of_draft_rows_and_lengths_is_found() -> None:
    def cost_of(n: int, rows: int, shapes: int) -> float:
        return 0.01 + 0.003 * n + 0.002 * rows + 0.006 * shapes + 0.01 * (rows > 0)

    model = fitted(cost_of)
    cost = model.cost(6, 1.0, 0.5)
    assert cost is not None
    assert cost.step_s == pytest.approx(0.028, rel=0.05)
    assert cost.row_s == pytest.approx(0.002, rel=0.15)
    assert cost.start_s + cost.shape_s == pytest.approx(0.016, rel=0.2)
    assert cost.depth_s == 0.5
    assert model.added_s(6, 10, 1) == pytest.approx(0.036, rel=0.15)


def test_before_the_first_draft_a_guess_is_believed() -> None:
    model = DraftCostModel()
    assert model.cost(1, 0.001, 0.0) is None, "not even a step's time is known"
    for _ in range(5):
        model.observe(1, 0.007, 0, 0)
    assert not model.knows_drafts(1)
    assert model.cost(1, 0.001, 0.0) == DraftCost(0.007, 0.001)
    model.observe(1, 0.023, 8, 0)
    assert model.knows_drafts(1)
    cost = model.cost(1, 0.001, 0.0)
    assert cost is not None
    assert cost.row_s == pytest.approx(0.002)
    for _ in range(5):
        model.observe(9, 0.03, 0, 0)
    crowd = model.cost(9, 0.001, 0.0)
    assert crowd is not None
    assert crowd.row_s == pytest.approx(0.002), "what it costs elsewhere is the better guess"


def test_steps_that_hang_do_not_upset_it() -> None:
    model = DraftCostModel()
    for _ in range(50):
        model.observe(1, 0.007, 0, 0)
    model.observe(1, 60.0, 8, 0)
    cost = model.cost(1, 0.0, 0.0)
    assert cost is not None
    assert cost.row_s < 0.02
    for _ in range(5):
        model.observe(1, 0.023, 8, 0)
    cost = model.cost(1, 0.0, 0.0)
    assert cost is not None
    assert cost.row_s == pytest.approx(0.002, rel=0.6)
    model.observe(1, 60.0, 0, 0)
    cost = model.cost(1, 0.0, 0.0)
    assert cost is not None
    assert cost.step_s < 0.02
