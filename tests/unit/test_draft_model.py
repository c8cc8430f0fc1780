"""A second model guesses for the first: its lanes follow, and whatever it does the text stays."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import Capabilities, ModelError, StepInput
from stoker.config import SchedulerConfig, SpeculationConfig
from stoker.engine.draft_model import DraftModelDrafter, check_draft_model
from stoker.testing import (
    EngineHarness,
    Fault,
    FaultyRuntime,
    ScriptedOptions,
    ScriptedRuntime,
    ScriptedTokenizer,
    Submitted,
)
from stoker_plugins.fcfs import FirstComeFirstServed

ALWAYS = SpeculationConfig(adaptive=False, max_draft_tokens=5)


class Pair:
    """A target and a draft model in one engine."""

    def __init__(
        self,
        draft: Any = None,
        *,
        lanes: int = 3,
        scheduler: SchedulerConfig | None = None,
        speculation: SpeculationConfig = ALWAYS,
        target: ScriptedOptions | None = None,
    ) -> None:
        self.target = ScriptedRuntime(lanes=lanes, context_length=400, options=target)
        self.draft = draft or ScriptedRuntime(lanes=lanes, context_length=400)
        self.harness = EngineHarness(FirstComeFirstServed(), runtime=self.target)
        self.drafter = DraftModelDrafter(self.draft, self.harness.clock)
        self.harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=self.target,
            drafter=self.drafter,
            speculation=speculation,
            scheduler=scheduler,
        )

    def truth(self, request: Submitted) -> str:
        prompt = list(request.request.prompt_token_ids)
        return self.target.expected_text(prompt, request.request.sampling.max_tokens or 0)

    def check_mirrors(self) -> None:
        """What the drafter believes of its lanes is so, and none is lost."""
        inner = getattr(self.draft, "inner", self.draft)
        mirrors = self.drafter._mirrors.values()
        lanes = [mirror.lane for mirror in mirrors]
        assert sorted(lanes + self.drafter._free) == list(range(inner.info.num_lanes))
        for mirror in mirrors:
            assert inner._lengths[mirror.lane] == mirror.length
        for lane in self.drafter._free:
            assert inner._lengths[lane] == 0


def drafted(requests: list[Submitted]) -> tuple[int, int]:
    traces = [trace for request in requests for trace in request.traces()]
    return sum(t.draft_tokens for t in traces), sum(t.accepted_tokens for t in traces)


def test_the_same_model_is_always_right() -> None:
    pair = Pair()
    requests = [pair.harness.submit(f"prompt {i}", max_tokens=40 + i) for i in range(5)]
    while pair.harness.engine.has_work:
        pair.harness.step()
        pair.check_mirrors()
    assert [r.text() for r in requests] == [pair.truth(r) for r in requests]
    computed, accepted = drafted(requests)
    assert accepted == computed > 100
    assert sorted(pair.drafter._free) == [0, 1, 2]
    assert not pair.draft._lengths.any()


def test_its_logits_stay_on_its_device() -> None:
    draft = ScriptedRuntime(lanes=3, context_length=400, options=ScriptedOptions(samples=True))
    pair = Pair(draft)
    requests = [pair.harness.submit(f"prompt {i}", max_tokens=40 + i) for i in range(5)]
    pair.harness.run()
    assert [r.text() for r in requests] == [pair.truth(r) for r in requests]
    computed, accepted = drafted(requests)
    assert accepted == computed > 100
    assert draft.num_fetched_rows == 0


def test_another_model_is_sometimes_right() -> None:
    options = {"period": 10, "surprise_every": 0}
    draft = ScriptedRuntime(lanes=3, context_length=400, options=ScriptedOptions(**options))
    pair = Pair(draft, target=ScriptedOptions(period=10, surprise_every=4))
    requests = [pair.harness.submit(f"prompt {i} " * 3, max_tokens=60) for i in range(4)]
    while pair.harness.engine.has_work:
        pair.harness.step()
        pair.check_mirrors()
    assert [r.text() for r in requests] == [pair.truth(r) for r in requests]
    computed, accepted = drafted(requests)
    assert 0.2 * computed < accepted < 0.9 * computed


def test_it_catches_up_on_a_long_prompt_in_pieces() -> None:
    pieces: list[int] = []
    draft = ScriptedRuntime(lanes=1, context_length=2000)
    draft.before_step = lambda step: pieces.append(len(step.token_ids))
    pair = Pair(draft, lanes=1)
    pair.target = pair.harness.runtime  # type: ignore[assignment]
    request = pair.harness.submit("x" * 300, max_tokens=60)
    pair.harness.run()
    assert request.text() == pair.truth(request)
    assert pieces[:2] == [256, 301 + 1 - 256]
    assert drafted([request])[1] > 30


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_life_has_the_same_text_and_the_lanes_follow(seed: int) -> None:
    dice = random.Random(seed)
    surprise = dice.choice([0, 3])
    draft = ScriptedRuntime(
        lanes=dice.randint(1, 3),
        context_length=dice.choice([40, 400]),
        max_step_tokens=dice.choice([3, 512]),
        options=ScriptedOptions(
            period=8, kv_capacity_tokens=dice.choice([None, 60]), surprise_every=surprise
        ),
    )
    pair = Pair(
        draft,
        target=ScriptedOptions(period=8),
        speculation=SpeculationConfig(
            adaptive=dice.random() < 0.5, max_draft_tokens=dice.randint(1, 8)
        ),
        scheduler=SchedulerConfig(max_num_batched_tokens=dice.randint(4, 60)),
    )
    harness = pair.harness
    requests = [
        harness.submit(f"{i} text " * dice.randint(1, 5), max_tokens=dice.randint(1, 50))
        for i in range(dice.randint(1, 6))
    ]
    aborted = set()
    while harness.engine.has_work:
        move = dice.random()
        running = list(harness.engine.scheduler.running.values())
        if move < 0.05 and running:
            harness.engine.scheduler.preempt(dice.choice(running), "policy")
        elif move < 0.07:
            gone = dice.choice(requests)
            aborted.add(gone.request.request_id)
            harness.abort(gone)
        else:
            harness.step()
        speculator = harness.engine.speculator
        assert speculator is not None
        if speculator.num_errors == 0:
            pair.check_mirrors()
    for request in requests:
        if request.request.request_id in aborted:
            assert pair.truth(request).startswith(request.text())
        else:
            assert request.text() == pair.truth(request)


@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("fault", list(Fault))
def test_a_draft_model_that_goes_wrong_costs_nobody_anything(fault: Fault, samples: bool) -> None:
    turns = iter(range(10**6))

    def script(step: StepInput) -> Fault | None:
        return fault if next(turns) >= 5 else None

    options = ScriptedOptions(samples=samples)
    inner = ScriptedRuntime(lanes=3, context_length=400, options=options)
    pair = Pair(FaultyRuntime(inner, script))
    requests = [pair.harness.submit(f"prompt {i}", max_tokens=40) for i in range(3)]
    pair.harness.run()
    assert [r.text() for r in requests] == [pair.truth(r) for r in requests]


def test_with_too_little_kv_it_follows_fewer() -> None:
    draft = ScriptedRuntime(
        lanes=3, context_length=400, options=ScriptedOptions(kv_capacity_tokens=120)
    )
    pair = Pair(draft)
    requests = [pair.harness.submit(f"prompt {i}", max_tokens=80) for i in range(3)]
    pair.harness.run()
    assert [r.text() for r in requests] == [pair.truth(r) for r in requests]
    assert drafted(requests)[1] > 20
    assert pair.harness.engine.speculator is not None
    assert pair.harness.engine.speculator.num_errors == 0
    assert pair.drafter._max_mirrors < 3


def test_if_not_even_one_fits_it_is_switched_off() -> None:
    draft = ScriptedRuntime(
        lanes=1, context_length=400, options=ScriptedOptions(kv_capacity_tokens=20)
    )
    pair = Pair(draft, lanes=1)
    request = pair.harness.submit("a prompt that is longer than that", max_tokens=30)
    pair.harness.run()
    assert request.text() == pair.truth(request)
    assert pair.harness.engine.speculator is not None
    assert pair.harness.engine.speculator.num_errors == 1


def test_its_guesses_take_as_long_as_they_take() -> None:
    pair = Pair(lanes=1)
    clock = pair.harness.fake_clock
    drafter = DraftModelDrafter(pair.draft, clock)
    pair.draft.before_step = lambda step: clock.advance(0.002)
    harness = EngineHarness(
        FirstComeFirstServed(), runtime=pair.target, clock=clock, drafter=drafter
    )
    harness.submit("prompt", max_tokens=60)
    harness.run()
    assert drafter.depth_s == pytest.approx(0.002)


# --------------------------------------------------------------------------- which models fit together


class OtherTokenizer(ScriptedTokenizer):
    def token_bytes(self, token_id: int) -> bytes:
        return b"?" if token_id == 97 else super().token_bytes(token_id)


class OtherNames(ScriptedTokenizer):
    @property
    def special_tokens(self) -> Mapping[str, int]:
        return {**super().special_tokens, "<|end|>": 258, "<|user|>": 257}


def test_models_of_one_vocabulary_fit() -> None:
    check_draft_model(ScriptedRuntime(), ScriptedRuntime(), "large", "small")


def test_models_that_do_not_fit_are_refused_by_name() -> None:
    target, draft = ScriptedRuntime(), ScriptedRuntime()
    draft.info = msgspec.structs.replace(draft.info, vocab_size=300)
    with pytest.raises(ModelError, match=r"small does not fit large: it has 300 tokens.* 261"):
        check_draft_model(target, draft, "large", "small")
    draft = ScriptedRuntime()
    draft.tokenizer = OtherTokenizer()
    with pytest.raises(ModelError, match=r"token 97 is b'\?' in one and b'a' in the other"):
        check_draft_model(target, draft, "large", "small")
    draft.tokenizer = OtherNames()
    with pytest.raises(ModelError, match=r"token 257 is '<\|user\|>' in one and '<\|end\|>'"):
        check_draft_model(target, draft, "large", "small")
    for stuck, name in ((target, "large"), (draft, "small")):
        draft.tokenizer = ScriptedTokenizer()
        can = stuck.info.capabilities
        stuck.info = msgspec.structs.replace(
            stuck.info, capabilities=Capabilities(truncation="reset")
        )
        with pytest.raises(ModelError, match=f"{name} cannot take single tokens back"):
            check_draft_model(target, draft, "large", "small")
        stuck.info = msgspec.structs.replace(stuck.info, capabilities=can)


def test_drafts_are_arrays_of_token_ids() -> None:
    pair = Pair(lanes=1)
    request = pair.harness.submit("hello", max_tokens=20)
    pair.harness.step()
    (sequence,) = request.sequences
    (draft,) = pair.drafter.propose([sequence], {sequence.sequence_id: 4}).values()
    assert draft.dtype == np.int32
    assert len(draft) == 4
