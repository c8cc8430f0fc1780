"""The llguidance plugin: every kind of grammar, over any vocabulary, in the engine's loop."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import jsonschema
import numpy as np
import pytest

from stoker import Capabilities, GrammarSpec, InvalidRequestError, RuntimeInfo, Tokenizer
from stoker.testing import ScriptedRuntime
from stoker.testing.harness import EngineHarness, Submitted
from stoker.types import FinishReason, StepInput, StepOutput
from stoker_plugins.grammars.compiler import LlguidanceCompiler, LlguidanceGrammar
from stoker_plugins.grammars.options import LlguidanceOptions
from stoker_plugins.policies.fcfs import FirstComeFirstServed

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ç"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


class RandomRuntime(ScriptedRuntime):
    """Logits that are noise, by position and lane's KV: whatever is not masked may come."""

    def step(self, step: StepInput) -> StepOutput:
        output = super().step(step)
        if output.no_room:
            return output
        logits = output.logits.copy()
        for row in logits:
            seed = int(row.argmax()) * 7919 + self.num_steps * 104729
            row[:] = np.random.default_rng(seed).normal(0, 3, len(row))
            row[[ord(c) for c in '"}],: ']] += 3  # so that it comes to an end
        return StepOutput(logits)


def schema_spec(schema: Any, **fields: Any) -> GrammarSpec:
    return GrammarSpec(kind="json_schema", text=json.dumps(schema), **fields)


@pytest.fixture(scope="module")
def compiler() -> LlguidanceCompiler:
    runtime = ScriptedRuntime()
    return LlguidanceCompiler(runtime.tokenizer, runtime.info)


def make(runtime: ScriptedRuntime | None = None, **options: Any) -> EngineHarness:
    return EngineHarness(
        FirstComeFirstServed(), runtime=runtime or RandomRuntime(lanes=4), **options
    )


def allowed(grammar: LlguidanceGrammar, text: bytes = b"") -> set[int]:
    """The tokens that may come after a text."""
    matcher = grammar.start()
    assert all(matcher.accept(byte) for byte in text)
    mask = np.zeros(9, np.int32)
    matcher.fill_mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def check(submitted: Submitted, schema: Any = PERSON) -> None:
    """What has stopped is valid."""
    for index in range(submitted.request.n):
        end = submitted.finish(index)
        assert end is not None
        assert end.error is None
        if end.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(submitted.text(index)), schema)
        else:
            assert end.finish_reason is FinishReason.LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_noise_under_a_schema_is_valid(compiler: LlguidanceCompiler, temperature: float) -> None:
    harness = make()
    grammar = compiler.compile(schema_spec(PERSON))
    sent = [
        harness.submit(
            f"{i}", grammar=grammar, n=2, seed=i, temperature=temperature, max_tokens=400
        )
        for i in range(6)
    ]
    free = harness.submit("free", max_tokens=30, temperature=1.0)
    harness.run()
    for submitted in sent:
        check(submitted)
    assert sum(s.finish_reason is FinishReason.STOP for s in sent) >= 4
    assert free.finish() is not None


def test_it_stops_when_complete_without_an_end_token(compiler: LlguidanceCompiler) -> None:
    harness = make(ScriptedRuntime(lanes=1))  # which never writes an end token
    grammar = compiler.compile(GrammarSpec(kind="choice", text='["yes", "no", "naïve"]'))
    sent = [harness.submit("q", grammar=grammar, ignore_eos=eos, seed=1) for eos in (False, True)]
    harness.run()
    for submitted in sent:
        assert submitted.finish_reason is FinishReason.STOP
        assert submitted.text() in {"yes", "no", "naïve"}


def test_bias_cannot_break_out(compiler: LlguidanceCompiler) -> None:
    harness = make()
    grammar = compiler.compile(GrammarSpec(kind="regex", text="[0-9]{3}-[a-f]{2}"))
    sent = harness.submit(
        "q",
        grammar=grammar,
        logit_bias={ord("z"): 100.0, 257: 100.0, 258: 100.0, ord("7"): 50.0},
        presence_penalty=2.0,
        repetition_penalty=1.5,
        temperature=1.0,
    )
    harness.run()
    assert re.fullmatch(r"7[0-9]{2}-[a-f]{2}", sent.text())


def test_control_tokens_come_only_where_named(compiler: LlguidanceCompiler) -> None:
    anything = compiler.compile(GrammarSpec(kind="regex", text="(?s:.*)"))
    assert {256, 258, 259, 260}.isdisjoint(allowed(anything))
    assert 257 in allowed(anything)  # the end token
    named = compiler.compile(GrammarSpec(kind="lark", text='start: <|user|> "a" <|system|>'))
    assert allowed(named) == {258}
    # As text they are text.
    text = compiler.compile(GrammarSpec(kind="lark", text='start: "<|user|>"'))
    assert allowed(text) == {ord("<")}


def test_end_tokens_come_exactly_where_it_can_end(compiler: LlguidanceCompiler) -> None:
    grammar = compiler.compile(GrammarSpec(kind="regex", text="ab*"))
    assert 257 not in allowed(grammar)
    assert allowed(grammar, b"a") == {ord("b"), 257}


def follows(grammar: LlguidanceGrammar, text: str) -> bool:
    matcher = grammar.start()
    return all(matcher.accept(byte) for byte in text.encode()) and matcher.is_complete


def test_json_is_compact_unless_told_otherwise(compiler: LlguidanceCompiler) -> None:
    spec = schema_spec(
        {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}
    )
    compact = compiler.compile(spec)
    assert follows(compact, '{"a":[1,2]}')
    assert follows(compact, '{"a": [1, 2]}')
    assert not follows(compact, '{"a":  [1]}')
    assert not follows(compact, '{ "a": [1]}')
    runtime = ScriptedRuntime()
    options = LlguidanceOptions(whitespace=r"\x20|\n[\x20\t]{0,40}")
    indented = LlguidanceCompiler(runtime.tokenizer, runtime.info, options).compile(spec)
    assert follows(indented, json.dumps({"a": [1, {"b": 2}]}, indent=4))
    assert follows(indented, '{"a":[1,2]}')


class Holes(Tokenizer):
    """A vocabulary with duplicates, empty tokens and ids that it does not know."""

    special_tokens: ClassVar = {"<end>": 3, "<x>": 4}
    pieces: ClassVar = [
        b"a",
        b"",
        b"a",
        b"<end>",
        b"",
        b"b",
        b"ab",
        b"\xff",
        b"{",
        b"}",
        b'"',
        b":",
        b" ",
    ]

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raise RuntimeError("it does not want to")

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.special_tokens.values() else self.pieces[token_id]


@pytest.mark.parametrize("ends", [frozenset({3}), frozenset({1, 3}), frozenset()])
@pytest.mark.parametrize("size", [13, 31, 32, 40])
def test_vocabularies_with_holes(size: int, ends: frozenset[int]) -> None:
    info = RuntimeInfo(
        name="holes",
        vocab_size=max(size, 13),
        context_length=64,
        num_lanes=1,
        kv_capacity_tokens=64,
        max_step_tokens=64,
        end_token_ids=ends,
        capabilities=Capabilities(),
    )
    compiler = LlguidanceCompiler(Holes(), info)
    matcher = compiler.compile(GrammarSpec(kind="regex", text="(ab|a)b?")).start()
    mask = np.zeros((info.vocab_size + 31) // 32, np.int32)
    matcher.fill_mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=info.vocab_size)
    assert set(np.flatnonzero(bits).tolist()) == {0, 2, 6}
    assert matcher.accept(2)
    assert not matcher.accept(4)
    matcher.fill_mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=info.vocab_size)
    assert set(np.flatnonzero(bits).tolist()) == {5} | ends
    assert matcher.accept(5)
    assert not matcher.is_complete
    assert matcher.accept(5)
    assert matcher.is_complete


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (schema_spec({"type": "object", "not": {}}), "not"),
        (schema_spec({"$ref": "http://example.org/x"}), "example.org"),
        (schema_spec({"$ref": "#"}), "there is no text"),
        (schema_spec({"type": "strin"}), "strin"),
        (GrammarSpec(kind="json_schema", text="{", param="x"), "x is not JSON"),
        (GrammarSpec(kind="json_schema", text="[]"), "JSON schema"),
        (GrammarSpec(kind="regex", text="(a", param="guided_regex"), "guided_regex"),
        (GrammarSpec(kind="regex", text="(?=a)b"), "look-around"),
        (GrammarSpec(kind="choice", text="[1]"), "list of strings"),
        (GrammarSpec(kind="choice", text="[]"), "at least one"),
        (GrammarSpec(kind="choice", text="{"), "not JSON"),
        (GrammarSpec(kind="gbnf", text="foo ::= bar", param="grammar"), "grammar is not a GBNF"),
        (GrammarSpec(kind="gbnf", text="root ::= " + "(" * 90 + "a"), "GBNF"),
        (GrammarSpec(kind="lark", text="start: foo"), "foo"),
        (GrammarSpec(kind="lark", text="start: <|nonsense|>"), "nonsense"),
        (GrammarSpec(kind="json_schema", text="[" * 5000), "deep"),
        (GrammarSpec(kind="regex", text="a" * 300_000), "300,000 bytes"),
    ],
)
def test_bad_specs_say_why(compiler: LlguidanceCompiler, spec: GrammarSpec, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)) as caught:
        compiler.compile(spec)
    assert caught.value.param == spec.param
    assert "<state>" not in str(caught.value)
    assert "verbose" not in str(caught.value)
