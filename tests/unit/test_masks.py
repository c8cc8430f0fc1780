"""Grammars in the loop: whatever the model says and the scheduler does, what stops is valid."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker.config import SchedulerConfig, SpeculationConfig
from stoker.engine.ngram import NgramDrafter
from stoker.errors import EngineError, InvalidRequestError
from stoker.grammar import Grammar, GrammarSpec, Matcher
from stoker.testing import ScriptedRuntime
from stoker.testing.harness import EngineHarness, Submitted
from stoker.testing.scripted_options import ScriptedOptions
from stoker.types import FinishReason, StepInput, StepOutput
from stoker_plugins.grammars.compiler import LlguidanceCompiler
from stoker_plugins.policies.fcfs import FirstComeFirstServed

_TINY = ScriptedRuntime()
COMPILER = LlguidanceCompiler(_TINY.tokenizer, _TINY.info)
CLOSERS = [ord(character) for character in '"}],']


class NoiseRuntime(ScriptedRuntime):
    """Its logits are noise that depends on what is in the lane, and only on that."""

    def step(self, step: StepInput) -> StepOutput:
        output = super().step(step)
        if output.no_room:
            return output
        rows = step.wants_logits
        states = self._states[step.lanes[rows], step.positions[rows] + 1]
        noise = np.empty_like(output.logits)
        for row, state in zip(noise, states.tolist(), strict=True):
            row[:] = np.random.default_rng(state).normal(0, 3, len(row))
            row[CLOSERS] += 4  # so that it comes to an end
        return StepOutput(noise)


def make(*, lanes: int = 3, capacity: int | None = None, speculates: bool = False) -> EngineHarness:
    options = ScriptedOptions(kv_capacity_tokens=capacity)
    speculation = SpeculationConfig(adaptive=False, max_draft_tokens=4)
    return EngineHarness(
        FirstComeFirstServed(),
        runtime=NoiseRuntime(lanes=lanes, context_length=600, options=options),
        scheduler=SchedulerConfig(max_num_batched_tokens=32),
        drafter=NgramDrafter(2, 4) if speculates else None,
        speculation=speculation if speculates else None,
    )


def compiled(schema: Any) -> Grammar:
    return COMPILER.compile(GrammarSpec(kind="json_schema", text=json.dumps(schema)))


def check(submitted: Submitted, schema: Any) -> int:
    """Whatever has stopped is valid; returns how many have."""
    stopped = 0
    for index in range(submitted.request.n):
        end = submitted.finish(index)
        assert end is not None
        assert end.error is None
        if end.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(submitted.text(index)), schema)
            stopped += 1
        else:
            assert end.finish_reason is FinishReason.LENGTH
    return stopped


KEYS = st.sampled_from(["a", "b", "key", "größe", "名", "with space", 'quo"te', "a/b"])
LEAVES = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.builds(
        lambda low, span: {"type": "integer", "minimum": low, "maximum": low + span},
        st.integers(-1000, 1000),
        st.integers(0, 500),
    ),
    st.builds(
        lambda low, span: {"type": "string", "minLength": low, "maxLength": low + span},
        st.integers(0, 5),
        st.integers(0, 9),
    ),
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-c]{2,4}$"},
            {"type": "string", "format": "date"},
            {"type": "string", "pattern": r"^\d{3}-\d{2}$"},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 60},
            {"enum": ["x", 1, None, "ü", [1, 2]]},
            {"const": {"k": [True, "v"]}},
            {"type": ["integer", "null"]},
        ]
    ),
)


def objects(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in required if name in properties],
        "additionalProperties": False,
    }


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(
            objects,
            st.dictionaries(KEYS, inner, max_size=4),
            st.lists(KEYS, max_size=3, unique=True),
        ),
        st.builds(
            lambda items, low, span: {
                "type": "array",
                "items": items,
                "minItems": low,
                "maxItems": low + span,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 3),
        ),
        st.builds(
            lambda items: {"type": "array", "prefixItems": items, "items": False, "minItems": 1},
            st.lists(inner, min_size=1, max_size=3),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda inner: {"$defs": {"x": inner}, "type": "array", "items": {"$ref": "#/$defs/x"}},
            inner.filter(lambda schema: "$defs" not in json.dumps(schema)),
        ),
    ),
    max_leaves=8,
)


def has_nested_definitions(schema: dict[str, Any]) -> bool:
    # References are resolved from the root: the strategy's own definitions only work there.
    text = json.dumps(schema)
    return "$defs" in text and (text.count("$defs") != 2 or "$defs" not in schema)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    schema=SCHEMAS.filter(lambda schema: not has_nested_definitions(schema)),
    temperature=st.sampled_from([0.0, 0.7, 2.0]),
    n=st.integers(1, 3),
    speculates=st.booleans(),
    sampling=st.sampled_from(
        [
            {},
            {"min_tokens": 30},
            {"ignore_eos": True},
            {"top_p": 0.3, "typical_p": 0.5, "min_p": 0.1},
            {"top_k": 2, "repetition_penalty": 1.3},
            {"presence_penalty": 2.0, "frequency_penalty": 2.0},
            {"logit_bias": {257: 100.0, ord("x"): 100.0, 258: 50.0}},
            {"dry_multiplier": 2.0, "xtc_probability": 0.9, "xtc_threshold": 0.05},
        ]
    ),
)
def test_any_schema_under_noise_is_followed(
    schema: dict[str, Any],
    temperature: float,
    n: int,
    speculates: bool,
    sampling: dict[str, Any],
) -> None:
    harness = make(speculates=speculates, capacity=900)
    grammar = compiled(schema)
    sent = [
        harness.submit(
            f"p{i}",
            grammar=grammar,
            n=n,
            seed=i,
            temperature=temperature,
            max_tokens=250,
            **sampling,
        )
        for i in range(2)
    ]
    harness.submit("free", max_tokens=20, temperature=1.0)
    harness.run()
    for submitted in sent:
        check(submitted, schema)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    expression=st.sampled_from(
        [
            "[a-f0-9]{8}-[a-f0-9]{4}",
            "(yes|no|maybe)( indeed)?",
            r"\d{1,3}(\.\d{1,3}){3}",
            "[ä-ü]{2,5}",
            "(ab|ba)*c",
            "[^a-z]{3}",
            "(foo|bar){2,3}baz",
            "x?",
        ]
    ),
    seed=st.integers(0, 1000),
)
def test_any_expression_under_noise_is_followed(expression: str, seed: int) -> None:
    harness = make()
    grammar = COMPILER.compile(GrammarSpec(kind="regex", text=expression))
    sent = harness.submit("p", grammar=grammar, seed=seed, temperature=1.5, max_tokens=60)
    harness.run()
    if sent.finish_reason is FinishReason.STOP:
        assert re.fullmatch(expression, sent.text(), re.ASCII)


LIST = 'root ::= item ("," item)*\nitem ::= [a-z]{1,3} | "\\"" [0-9]+ "\\"" # or a number\n'


@pytest.mark.parametrize("seed", range(8))
def test_gbnf_and_choices_are_followed(seed: int) -> None:
    harness = make()
    items = COMPILER.compile(GrammarSpec(kind="gbnf", text=LIST))
    words = ["red", "rot", 'a "quoted" one', "two\nlines", "日本語", "reddish"]
    choice = COMPILER.compile(GrammarSpec(kind="choice", text=json.dumps(words)))
    listed = harness.submit("p", grammar=items, seed=seed, temperature=1.0, max_tokens=200)
    chosen = harness.submit("p", grammar=choice, seed=seed, temperature=1.0, max_tokens=200)
    harness.run()
    assert chosen.finish_reason is FinishReason.STOP
    assert chosen.text() in words
    if listed.finish_reason is FinishReason.STOP:
        item = r'([a-z]{1,3}|"[0-9]+")'
        assert re.fullmatch(f"{item}(,{item})*", listed.text())


RECORDS = {
    "type": "array",
    "minItems": 3,
    "maxItems": 3,
    "items": objects(
        {"identifier": {"type": "integer"}, "description": {"type": "string", "maxLength": 12}},
        ["identifier", "description"],
    ),
}


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    capacity=st.sampled_from([None, 450, 300]),
    speculates=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0]),
)
def test_crowds_preemption_and_drafts_change_nothing(
    capacity: int | None, speculates: bool, temperature: float
) -> None:
    grammar = compiled(RECORDS)
    sampling: dict[str, Any] = {"grammar": grammar, "temperature": temperature, "max_tokens": 220}
    alone = []
    for i in range(4):
        harness = make()
        alone.append(harness.submit(f"prompt {i}", seed=i, **sampling))
        harness.run()
    crowd = make(capacity=capacity, speculates=speculates, lanes=4)
    sent = [crowd.submit(f"prompt {i}", seed=i, **sampling) for i in range(4)]
    crowd.run()
    assert [s.text() for s in sent] == [s.text() for s in alone]
    assert sum(check(s, RECORDS) for s in sent) >= 1
    if capacity == 300:
        assert any(trace.num_preemptions for s in sent for trace in s.traces())


def test_what_is_forced_is_drafted_and_saves_steps() -> None:
    steps = []
    for speculates in (False, True):
        harness = make(speculates=speculates)
        sent = harness.submit("p", grammar=compiled(RECORDS), seed=3, max_tokens=220)
        steps.append(harness.run())
        check(sent, RECORDS)
    assert steps[1] < 0.75 * steps[0]


def test_a_stop_string_ends_it_before_its_grammar_does() -> None:
    harness = make()
    grammar = COMPILER.compile(GrammarSpec(kind="regex", text="abcdef"))
    sent = harness.submit("p", grammar=grammar, stop=("cd",))
    harness.run()
    assert sent.text() == "ab"
    assert sent.finish_reason is FinishReason.STOP


class Stubborn(Grammar):
    """A grammar that fails when its output is so long."""

    def __init__(self, error: Exception | None, after: int) -> None:
        self.spec = GrammarSpec(kind="regex", param="guided_regex")
        self.error = error
        self.after = after

    def start(self) -> Matcher:
        if self.error is not None and self.after < 0:
            raise self.error
        return _StubbornMatcher(self)


class _StubbornMatcher(Matcher):
    is_complete = False

    def __init__(self, grammar: Stubborn) -> None:
        self.grammar = grammar
        self.tokens: list[int] = []

    def fill_mask(self, mask: np.ndarray[Any, Any]) -> None:
        if len(self.tokens) >= self.grammar.after:
            if self.grammar.error is not None:
                raise self.grammar.error
            mask[:] = 0
            return
        mask[:] = -1

    def accept(self, token: int) -> bool:
        self.tokens.append(token)
        return True

    def rollback(self, num_tokens: int) -> None:
        del self.tokens[len(self.tokens) - num_tokens :]

    def count_valid(self, tokens: Any) -> int:
        return len(tokens)

    def forced(self) -> tuple[int, ...]:
        return ()


@pytest.mark.parametrize("after", [-1, 0, 3])
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequestError("too complex", param="guided_regex"), InvalidRequestError),
        (RuntimeError("a bug"), EngineError),
        (None, InvalidRequestError),
    ],
)
@pytest.mark.parametrize("speculates", [False, True])
def test_a_grammar_that_fails_ends_its_own_request(
    error: Exception | None, expected: type[Exception], after: int, speculates: bool
) -> None:
    harness = make(speculates=speculates)
    bad = harness.submit("bad", grammar=Stubborn(error, after), max_tokens=20, ignore_eos=True)
    good = harness.submit("good", grammar=compiled({"enum": ["fine"]}))
    free = harness.submit("free", max_tokens=8, ignore_eos=True)
    harness.run()
    end = bad.finish()
    assert end is not None
    assert end.finish_reason is FinishReason.ERROR
    assert isinstance(end.error, expected)
    assert end.usage is not None
    assert end.usage.completion_tokens == max(after, 0)
    assert good.text() == '"fine"'
    assert free.finish_reason is FinishReason.LENGTH
    assert harness.engine.num_runtime_errors == 0


@pytest.mark.parametrize("samples", [False, True])
def test_bits_beyond_the_vocabulary_are_no_tokens(
    samples: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_mask(self: _StubbornMatcher, mask: np.ndarray[Any, Any]) -> None:
        mask[:] = 0
        if len(self.tokens) < 3:
            mask[3] = -1
        else:
            mask[8] = (-1 << 5) | 1 << (257 % 32)  # the end token, and what follows the last one

    monkeypatch.setattr(_StubbornMatcher, "fill_mask", fill_mask)
    runtime = ScriptedRuntime(options=ScriptedOptions(samples=samples))
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime)
    request = harness.submit("x", grammar=Stubborn(None, 0), max_tokens=20, ignore_eos=True)
    harness.run()
    assert len(request.text()) == 3
    assert request.finish_reason is FinishReason.STOP


def test_what_takes_too_long_of_everybodys_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.engine.masks._FREE_S", -1.0)
    harness = make()
    slow = harness.submit("slow", grammar=compiled({"enum": ["fine"]}))
    free = harness.submit("free", max_tokens=8, ignore_eos=True)
    harness.run()
    end = slow.finish()
    assert end is not None
    assert isinstance(end.error, InvalidRequestError)
    assert "too long" in str(end.error)
    assert free.finish_reason is FinishReason.LENGTH
