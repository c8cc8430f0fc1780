"""Hermes' form of tool calls, and the generic one: grammar, parser, wording."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import CallPiece, Piece, TextPiece, Tool, ToolChoice
from stoker.testing import ByteVocabulary, read_output
from stoker_plugins.tool_formats.hermes import Generic, Hermes

WEATHER = Tool(
    name="get_weather",
    description="The weather in a city",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "unit": {"type": "string", "enum": ["c", "f"]},
        },
        "required": ["city"],
    },
)
ADD = Tool(
    name="add",
    parameters={
        "type": "object",
        "properties": {
            "a": {"type": "integer", "minimum": 0, "maximum": 99},
            "b": {"type": "number", "minimum": 0, "maximum": 9},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "maxItems": 2},
        },
        "required": ["a", "b"],
    },
)
NOW = Tool(name="now")
TOOLS = [WEATHER, ADD, NOW]

PLAIN = ByteVocabulary()
MARKED = ByteVocabulary(["<tool_call>", "</tool_call>", "<other>"])
AUTO, REQUIRED = ToolChoice(), ToolChoice(mode="required")
ONE = ToolChoice(mode="required", parallel=False)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
SUM = '<tool_call>\n{"name": "add", "arguments": {"a":1,"b":2.5}}\n</tool_call>'


def calls_of(pieces: Iterable[Piece]) -> list[tuple[str, Any]]:
    """Names and decoded arguments."""
    return [(p.name, json.loads(p.arguments)) for p in pieces if isinstance(p, CallPiece)]


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(p.text for p in pieces if isinstance(p, TextPiece))


def cut(text: str, at: Sequence[int]) -> list[str]:
    """A text cut at these places."""
    borders = [0, *sorted({place % (len(text) + 1) for place in at}), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


places = st.lists(st.integers(0, 10_000), max_size=20)


def openai_call(name: str, arguments: Mapping[str, Any], call_id: str = "call_1") -> dict[str, Any]:
    """A call of an assistant's message, as formats get it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def grammar(choice: ToolChoice, tokens: ByteVocabulary = PLAIN) -> str:
    return Hermes().grammar(TOOLS, choice, tokens.special_tokens)


def parse(text: str, choice: ToolChoice = AUTO, *, constrained: bool = True) -> list[Piece]:
    return read_output(Hermes().parser(TOOLS, choice, constrained=constrained), [text])


@pytest.mark.parametrize("tokens", [PLAIN, MARKED], ids=["text", "control tokens"])
def test_required_means_calls_and_nothing_else(tokens: ByteVocabulary) -> None:
    for text in (CALL, f"{CALL}\n{SUM}", CALL + SUM):
        assert tokens.accepts(grammar(REQUIRED, tokens), text)
    for text in ("", "hello", f"hello {CALL}", f"{CALL} bye", CALL.replace("city", "town")):
        assert not tokens.accepts(grammar(REQUIRED, tokens), text)
    assert tokens.accepts(grammar(ONE, tokens), CALL)
    assert not tokens.accepts(grammar(ONE, tokens), CALL + SUM)


@pytest.mark.parametrize("tokens", [PLAIN, MARKED], ids=["text", "control tokens"])
def test_auto_leaves_text_free_until_a_call_begins(tokens: ByteVocabulary) -> None:
    free = grammar(AUTO, tokens)
    for text in ("", 'Use {"name": "x"} or <tool>, \u00e9\n\n', f"Let me see.\n{CALL}", CALL + SUM):
        assert tokens.accepts(free, text), text
    for text in ("<tool_call> I would", f"{CALL} so it is", CALL.replace("get_weather", "rm")):
        assert not tokens.accepts(free, text)
    single = grammar(ToolChoice(parallel=False), tokens)
    assert tokens.accepts(single, f"Look: {CALL}")
    assert not tokens.accepts(single, CALL + SUM)


def test_only_the_tools_that_may_be_called_can_be() -> None:
    named = ToolChoice(mode="required", names=("add",))
    assert PLAIN.accepts(grammar(named), SUM)
    assert not PLAIN.accepts(grammar(named), CALL)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("choice", [REQUIRED, ONE], ids=["some", "one"])
def test_whatever_a_model_writes_under_the_grammar_is_a_valid_call(
    choice: ToolChoice, seed: int
) -> None:
    text, ended = MARKED.write(grammar(choice, MARKED), seed)
    pieces = parse(text, choice)
    schemas = {tool.name: tool.parameters or {} for tool in TOOLS}
    assert text_of(pieces) == ""
    if ended:
        for name, arguments in calls_of(pieces):
            jsonschema.validate(arguments, schemas[name])


@pytest.mark.parametrize("constrained", [True, False])
def test_text_and_calls_are_told_apart(constrained: bool) -> None:
    pieces = parse(f"Let me see.\n\n{CALL}\n{SUM}\n", constrained=constrained)
    assert pieces == [
        TextPiece("Let me see."),
        CallPiece(0, '{"city": "Oslo"}', "get_weather"),
        CallPiece(1, '{"a":1,"b":2.5}', "add"),
    ]


def test_text_between_and_after_calls_is_kept() -> None:
    pieces = parse(f"one {CALL} two {SUM}  three ", constrained=False)
    assert text_of(pieces) == "one\ntwo\nthree "
    assert [name for name, _ in calls_of(pieces)] == ["get_weather", "add"]


def test_arguments_come_as_they_are_written() -> None:
    parser = Hermes().parser(TOOLS, AUTO, constrained=True)
    head, tail = CALL[:-28], CALL[-28:]
    assert list(parser.push(head[:30])) == []
    first = list(parser.push(head[30:]))
    assert first[0] == CallPiece(0, "", "get_weather")
    streamed = [parser.push(character) for character in tail]
    assert sum(len(pieces) for pieces in streamed) > 8
    assert list(parser.finish()) == []


MALFORMED = [
    '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>',
    '<tool_call>\n{"name": "add", "arguments": {"a": 1,}}\n</tool_call>',
    '<tool_call>\n{"name": "add", "arguments": [1]}\n</tool_call>',
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}\n</tool_call>',
    '<tool_call>\n{"name": 3}\n</tool_call>',
    "<tool_call>\n</tool_call>",
    "<tool_call>{}",
    "<tool_call>",
    '<tool_call>{"name": "add", "arguments": "{"}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": ' + "[" * 5000 + "]" * 5000 + "}}</tool_call>",
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_no_call_is_given_back_as_text(text: str) -> None:
    for whole in (text, f"look: \n{text}", f" {text}\n\nend"):
        assert parse(whole, constrained=False) == [TextPiece(whole)]


def test_unconstrained_models_may_write_calls_their_own_way() -> None:
    for text in (
        '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>',
        '<tool_call> {"name": "get_weather", "parameters": {"city": "Oslo"}} </tool_call>',
        '<tool_call>\n{"name":"get_weather","arguments":"{\\"city\\": \\"Oslo\\"}"}',
        '<tool_call>{"id": 1, "name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>',
    ):
        assert calls_of(parse(text, constrained=False)) == [("get_weather", {"city": "Oslo"})], text
    assert calls_of(parse('<tool_call>{"name": "now"}</tool_call>', constrained=False)) == [
        ("now", {})
    ]


def test_where_only_one_call_is_allowed_the_second_is_text() -> None:
    pieces = parse(CALL + SUM, ToolChoice(parallel=False), constrained=False)
    assert calls_of(pieces) == [("get_weather", {"city": "Oslo"})]
    assert text_of(pieces) == SUM


def test_an_output_that_ends_within_a_call_gives_what_came() -> None:
    whole = parse(CALL)[0]
    assert isinstance(whole, CallPiece)
    for length in range(len(CALL)):
        pieces = parse(CALL[:length])
        if calls := [p for p in pieces if isinstance(p, CallPiece)]:
            assert pieces == calls
            assert calls[0].name == "get_weather"
            assert whole.arguments.startswith(calls[0].arguments)
        else:  # a complete opening tag is no text any more
            assert text_of(pieces) == (CALL[:length] if length < len("<tool_call>") else "")
            assert parse(CALL[:length], REQUIRED) == []
        assert text_of(parse(CALL[:length], constrained=False)) in {CALL[:length], ""}


PARTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<tool_", "call>", CALL, SUM, *MALFORMED[:5]),
        *(" ", "\n", "\n\n", "text", "{", "}", '"', "\\", "\\u00e9", "\u00e9", "\U0001f600", "<"),
        *('{"name": "add", "arguments": {"a": 1, "b": "}\\"{"}}', '"name"', ":", '"add"', "[", "]"),
    ]
)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(PARTS, max_size=10), places, st.booleans())
def test_pieces_are_the_same_however_the_text_was_cut(
    parts: list[str], at: list[int], constrained: bool
) -> None:
    text = "".join(parts)
    whole = parse(text, constrained=constrained)
    for some in (cut(text, at), list(text)):
        parser = Hermes().parser(TOOLS, AUTO, constrained=constrained)
        assert read_output(parser, some) == whole
    if not constrained and not any(isinstance(piece, CallPiece) for piece in whole):
        assert text_of(whole) == text
    if not constrained:
        calls_of(whole)  # complete calls are valid JSON


def test_a_model_that_knows_no_tools_is_told_of_them() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Oslo?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                openai_call("get_weather", {"city": "Oslo"}),
                openai_call("now", {}, "call_2"),
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "name": "get_weather", "content": "rain"},
        {"role": "tool", "tool_call_id": "call_2", "name": "now", "content": "noon"},
        {"role": "user", "content": "And now?"},
    ]
    given = [dict(message) for message in messages]
    told = Generic().prepare(messages, TOOLS, AUTO)
    assert messages == given
    assert [m["role"] for m in told] == ["system", "user", "assistant", "user"]
    system = told[0]["content"]
    assert system.startswith("Be brief.\n\n")
    for word in ("get_weather", "The weather in a city", '"city"', "<tool_call>", '"add"'):
        assert word in system
    assert told[2]["content"] == (
        f'{CALL}\n<tool_call>\n{{"name": "now", "arguments": {{}}}}\n</tool_call>'
    )
    assert calls_of(parse(told[2]["content"])) == [("get_weather", {"city": "Oslo"}), ("now", {})]
    assert told[3]["content"] == (
        "<tool_response>\nrain\n</tool_response>\n<tool_response>\nnoon\n</tool_response>\nAnd now?"
    )


def test_the_choice_is_put_in_words_and_tools_without_history_stay_out() -> None:
    def told(choice: ToolChoice) -> str:
        return str(Generic().prepare([{"role": "user", "content": "x"}], [ADD, NOW], choice)[0])

    assert "Answer by calling the function add." in told(
        ToolChoice(mode="required", names=("add",))
    )
    assert "one or more functions" in told(REQUIRED)
    assert "exactly one function" in told(ONE)
    assert "of these: add, now" in told(ToolChoice(names=("add", "now")))
    plain = [{"role": "user", "content": "x"}]
    assert Generic().prepare(plain, [], AUTO) == plain


def test_which_models_write_so() -> None:
    assert Hermes().suits("{{ '<tool_call>' }}{{ tools }}", {})
    assert not Hermes().suits("{{ messages }}", {"<tool_call>": 1})
    assert not Hermes().suits(None, {})
    assert Generic().suits(None, {})


def test_weather_is_described() -> None:
    assert WEATHER.description in str(Generic().prepare([], [WEATHER], AUTO))
