"""Tokens that the runtime draws: the same as the host's, and logits stay where they are unless asked for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker import EngineError, FinishReason, Request, SampleInput, SamplingParams
from stoker.config import SchedulerConfig, SpeculationConfig
from stoker.engine import sampler
from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.ngram import NgramDrafter
from stoker.engine.sample_inputs import sample_input
from stoker.engine.sequence import Sequence
from stoker.grammar import GrammarSpec
from stoker.testing import (
    EngineHarness,
    Fault,
    FaultyRuntime,
    ScriptedOptions,
    ScriptedRuntime,
    Submitted,
    reference_sample,
)
from stoker_plugins.grammars.compiler import LlguidanceCompiler
from stoker_plugins.policies.fcfs import FirstComeFirstServed

_TINY = ScriptedRuntime()
_COMPILER = LlguidanceCompiler(_TINY.tokenizer, _TINY.info)
WORDS = _COMPILER.compile(GrammarSpec(kind="regex", text="([a-z]{3} ){1,20}[a-z]+[.]"))
_NOISE = np.random.default_rng(5).normal(0, 2, (64, 261)).astype(np.float32)
_NOISE[32:] = _NOISE[32:].round()  # models in bfloat16 have many equal logits


class NoiseRuntime(ScriptedRuntime):
    """Its logits are noise that depends on what is in the lane, and only on that."""

    def make_logits(self, states: Any, tokens: Any) -> Any:
        noise = _NOISE[(states >> np.uint64(40)).astype(np.int64) % len(_NOISE)]
        noise[:, ord("e")] += 3
        return noise


def sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    request = Request(
        request_id="r", model="m", prompt_token_ids=prompt, sampling=SamplingParams(**sampling)
    )
    stream: Any = None  # nobody reads it
    made = Sequence(request, 0, stream, Detokenizer(TokenText(lambda _: b"")), 100)
    for token in output:
        made.append(token)
    return made


def make(
    *,
    samples: bool,
    capacity: int | None = None,
    kind: type[ScriptedRuntime] = NoiseRuntime,
    drafts: bool = False,
) -> EngineHarness:
    options = ScriptedOptions(kv_capacity_tokens=capacity, samples=samples)
    return EngineHarness(
        FirstComeFirstServed(),
        runtime=kind(lanes=4, context_length=200, options=options),
        scheduler=SchedulerConfig(max_num_batched_tokens=24),
        drafter=NgramDrafter(2, 4) if drafts else None,
        speculation=SpeculationConfig(adaptive=False, max_draft_tokens=4),
    )


SAMPLING = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.0, 0.01, 0.7, 1.0, 2.0])},
    optional={
        "top_k": st.sampled_from([1, 2, 7, 40, 260, 261, 100_000]),
        "top_p": st.floats(0.01, 1.0),
        "min_p": st.floats(0.0, 1.0),
        "typical_p": st.sampled_from([0.3, 0.9]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.2, 0.7]),
        "logit_bias": st.dictionaries(st.integers(0, 260), st.floats(-100, 100), max_size=4),
        "dry_multiplier": st.just(1.5),
        "xtc_probability": st.sampled_from([0.5, 1.0]),
        "min_tokens": st.integers(1, 12),
        "stop_token_ids": st.just((ord("e"),)),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 3),
    },
)


def told(request: Submitted) -> list[tuple[Any, ...]]:
    """Everything that a request's reader is told, but for when, and what became of drafts."""
    ends = [request.finish(index) for index in range(request.request.n)]
    drafts = [(trace.draft_tokens, trace.accepted_tokens) for trace in request.traces()]
    return [
        (
            request.text(index),
            None if end is None else (end.finish_reason, end.stop, str(end.error)),
            [t for d in request.deltas if d.index == index for t in d.token_ids],
            [entry for d in request.deltas if d.index == index for entry in d.logprobs],
            drafts,
        )
        for index, end in enumerate(ends)
    ]


def live(harness: EngineHarness, requests: list[dict[str, Any]], seed: int) -> list[Any]:
    """Submit requests now and then and abort some: what each was told."""
    dice = random.Random(seed)
    submitted: list[Submitted] = []
    for request in requests:
        submitted.append(harness.submit(**request))
        for _ in range(dice.randint(0, 6)):
            harness.step()
        if dice.random() < 0.15:
            harness.abort(dice.choice(submitted))
    harness.run(3000)
    return [told(request) for request in submitted]


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    mixes=st.lists(st.tuples(SAMPLING, st.booleans()), min_size=1, max_size=6),
    seed=st.integers(0, 2**40),
    is_tight=st.booleans(),
)
def test_the_tokens_are_those_of_the_host_whatever_is_asked_for(
    mixes: list[tuple[dict[str, Any], bool]], seed: int, is_tight: bool
) -> None:
    requests = [
        {
            "prompt": f"prompt {at} " * (at % 3 + 1),
            "n": 1 + (seed + at) % 2,
            "seed": seed + at,
            "max_tokens": 25,
            "wants_token_ids": True,
            "grammar": WORDS if has_grammar else None,
        }
        | sampling
        for at, (sampling, has_grammar) in enumerate(mixes)
    ]
    capacity = 200 if is_tight else None
    host, device = (live(make(samples=s, capacity=capacity), requests, seed) for s in (False, True))
    assert device == host
    # What is drafted is what comes, but here and there.
    for request, answers in zip(requests, host, strict=True):
        predicted = np.array(answers[0][2])
        predicted[7::11] = ord("?")
        request["predicted"] = predicted.tolist()
    host, device = (
        live(make(samples=s, capacity=capacity, drafts=True), requests, seed) for s in (False, True)
    )
    assert device == host


def test_tight_memory_preempts_and_changes_no_drawn_token() -> None:
    harnesses = [make(samples=True, capacity=capacity) for capacity in (None, 200)]
    found = [
        [h.submit(f"prompt {i}", temperature=1.0, seed=i, max_tokens=60) for i in range(6)]
        for h in harnesses
    ]
    for harness in harnesses:
        harness.run(2000)
    assert [told(r) for r in found[1]] == [told(r) for r in found[0]]
    assert harnesses[1].engine.scheduler.num_preemptions > 0


def fetched(**sampling: Any) -> int:
    """Rows of logits that come to the host for an answer of 10 tokens, beside one that needs none."""
    harness = make(samples=True)
    other = harness.submit("other", temperature=1.0, seed=1, max_tokens=10)
    harness.submit("prompt", max_tokens=10, **{"temperature": 1.0, "seed": 2} | sampling)
    harness.run(100)
    assert other.finish_reason is FinishReason.LENGTH
    assert isinstance(harness.runtime, ScriptedRuntime)
    return harness.runtime.num_fetched_rows


@pytest.mark.parametrize(
    ("sampling", "rows"),
    [
        ({}, 0),
        ({"temperature": 0.0}, 0),
        ({"top_k": 5, "top_p": 0.9, "min_p": 0.1, "logit_bias": {5: 1.0}}, 0),
        ({"repetition_penalty": 1.1, "presence_penalty": 1.0, "min_tokens": 10}, 0),
        ({"grammar": WORDS}, 0),
        ({"logprobs": 0}, 10),
        ({"typical_p": 0.5}, 10),
        ({"typical_p": 0.5, "temperature": 0.0}, 0),
        ({"dry_multiplier": 1.0, "temperature": 0.0}, 10),
        ({"xtc_probability": 1.0}, 10),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.6}, 0),
    ],
)
def test_logits_come_to_the_host_only_for_those_who_read_them(
    sampling: dict[str, Any], rows: int
) -> None:
    assert fetched(ignore_eos=True, **sampling) == rows


@pytest.mark.parametrize(
    ("sampling", "stays"),
    [
        ({"temperature": 0.0}, True),
        ({"top_p": 0.9, "min_p": 0.01, "logit_bias": {5: 1.0}}, True),
        ({"repetition_penalty": 1.2}, False),
        ({"min_tokens": 40}, False),
        ({"typical_p": 0.9}, False),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.02}, False),
    ],
)
def test_drafts_are_verified_on_the_device_where_no_row_depends_on_the_one_before(
    sampling: dict[str, Any], stays: bool
) -> None:
    sampling = {"temperature": 0.7, "seed": 4, "max_tokens": 40, "ignore_eos": True} | sampling
    plain = make(samples=False)
    wanted = plain.submit("some prompt", wants_token_ids=True, **sampling)
    plain.run(100)
    tokens = [token for delta in wanted.deltas for token in delta.token_ids]
    harness = make(samples=True, drafts=True)
    found = harness.submit("some prompt", predicted=tokens, **sampling)
    steps = harness.run(100)
    assert found.text() == wanted.text()
    assert steps < 20
    assert found.traces()[0].accepted_tokens > 10
    assert isinstance(harness.runtime, ScriptedRuntime)
    assert (harness.runtime.num_fetched_rows == 0) == stays


def test_scored_prompts_and_drafts_work_beside_it() -> None:
    answers = []
    for samples in (False, True):
        options = ScriptedOptions(period=7, surprise_every=5, samples=samples)
        harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=ScriptedRuntime(lanes=4, options=options),
            drafter=NgramDrafter(2, 4),
            speculation=SpeculationConfig(adaptive=False),
        )
        requests = [
            harness.submit("abcabcabcabc", max_tokens=40, temperature=0.5, seed=3, logprobs=1),
            harness.submit("score me", max_tokens=4, prompt_logprobs=1),
        ]
        harness.run(200)
        assert requests[0].traces()[0].accepted_tokens > 0
        scores = [d.prompt_logprobs for d in requests[1].deltas if d.prompt_logprobs]
        answers.append(([told(r) for r in requests], scores))
    assert answers[0] == answers[1]


# ---------------------------------------------------------------------- what goes wrong


class Nonsense(ScriptedRuntime):
    """Answers with what ``spoil`` makes of the tokens while lane 0 is among the rows."""

    spoil: Callable[[Any], Any] = staticmethod(lambda tokens: tokens)

    def step(self, step: Any) -> Any:
        self.lanes = step.lanes[step.wants_logits]
        return super().step(step)

    def sample(self, batch: SampleInput) -> Any:
        tokens = super().sample(batch)
        return self.spoil(tokens) if 0 in self.lanes[batch.rows] else tokens


def raises(_: Any) -> Any:
    raise ValueError("scripted")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tokens: tokens[:-1], "not 1 tokens"),
        (lambda tokens: np.append(tokens, 5), "not 1 tokens"),
        (lambda tokens: tokens[:, None], "not 1 tokens"),
        (lambda tokens: tokens.astype(float), "drew float64"),
        (lambda tokens: tokens * np.nan, "drew float64"),
        (lambda tokens: None, "drew object"),
        (lambda tokens: tokens + 261, "its vocabulary has 261"),
        (lambda tokens: tokens * 0 - 2, "drew token -2"),
        (lambda tokens: tokens * 0 - 1, "not finite"),
        (raises, "ValueError"),
    ],
)
def test_nonsense_from_the_device_costs_only_those_whom_it_was_for(
    spoil: Callable[[Any], Any], message: str
) -> None:
    harness = make(samples=True, kind=Nonsense)
    runtime = harness.runtime
    assert isinstance(runtime, Nonsense)
    bad = harness.submit("first, in lane 0", max_tokens=8)
    others = [harness.submit(f"other {i}", max_tokens=8) for i in range(3)]
    for _ in range(4):
        harness.step()
    is_row = message == "not finite"
    # A bad token of one row is that row's; anything else is looked into one by one.
    runtime.spoil = _only_lane_0(runtime, spoil) if is_row else spoil
    harness.run(200)
    end = bad.finish()
    assert end is not None
    assert isinstance(end.error, EngineError)
    assert message in str(end.error)
    for other in others:
        tokens = list(other.request.prompt_token_ids)
        assert other.text() == runtime.expected_text(tokens, 8)
    assert (harness.engine.num_runtime_errors == 0) == is_row


def _only_lane_0(runtime: Nonsense, spoil: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda tokens: np.where(runtime.lanes == 0, spoil(tokens), tokens)


def test_a_bias_on_a_token_that_is_not_there_never_reaches_the_device() -> None:
    harness = make(samples=True, kind=ScriptedRuntime)
    bad = harness.submit("one", logit_bias={261: 1.0})
    good = harness.submit("two", max_tokens=8)
    harness.run(50)
    end = bad.finish()
    assert end is not None
    assert "vocabulary has 261" in str(end.error)
    assert good.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("fault", [Fault.NAN, Fault.INFINITE, Fault.FEW_ROWS, Fault.WIDE])
def test_spoilt_logits_on_the_device_fail_who_they_were_for(fault: Fault) -> None:
    inner = ScriptedRuntime(options=ScriptedOptions(samples=True))
    runtime = FaultyRuntime(inner, lambda step: fault if 0 in step.lanes else None)
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    bad = harness.submit("lane 0", max_tokens=5)
    harness.run(50)
    good = harness.submit("another that goes to another lane", max_tokens=5, cache_salt="x")
    runtime.script = lambda _: None
    harness.run(50)
    end = bad.finish()
    assert end is not None
    assert isinstance(end.error, EngineError)
    assert good.finish_reason is FinishReason.LENGTH


def test_a_runtime_without_the_capability_says_so() -> None:
    with pytest.raises(TypeError, match="no capability samples"):
        ScriptedRuntime().sample(sample_input([0], [sequence([1], [])]))


# ---------------------------------------------------------------------- the reference

_HOST_ONLY = {"typical_p", "dry_multiplier", "xtc_probability", "logit_bias"}


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    vocabulary=st.sampled_from([1, 5, 300, 3000]),
    is_coarse=st.booleans(),
    sampling=SAMPLING.map(lambda s: {k: v for k, v in s.items() if k not in _HOST_ONLY}),
)
def test_the_reference_is_the_cores_own_sampler(
    seed: int, vocabulary: int, is_coarse: bool, sampling: dict[str, Any]
) -> None:
    logits = np.random.default_rng(seed).normal(0, 3, (4, vocabulary)).astype(np.float32)
    if is_coarse:
        logits = logits.round()
    logits[1, 0] = -np.inf
    logits[3, -1] = np.nan
    prompt, output = ([token % vocabulary for token in found] for found in ([0, 4], [1, 2, 2, 3]))
    rows = [sequence(prompt, output, **sampling | {"seed": seed + row}) for row in range(4)]
    batch = sample_input(range(4), rows)
    assert reference_sample(logits, batch).tolist() == sampler.sample(logits, rows)
