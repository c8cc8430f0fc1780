"""The other tool formats: what their grammars let through, and what their parsers make of it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import CallPiece, Piece, TextPiece, Tool, ToolChoice, ToolFormat
from stoker.config import Config, ModelConfig
from stoker.discovery import load_plugins
from stoker.errors import ConfigError
from stoker.testing import ByteVocabulary, read_output
from stoker_plugins.tool_formats.hermes import Generic, Hermes
from stoker_plugins.tool_formats.llama3 import Llama3
from stoker_plugins.tool_formats.mistral import Mistral
from stoker_plugins.tool_formats.pythonic import Pythonic, read_value

CITY = {"type": "string", "maxLength": 12}
WEATHER = Tool(
    name="get_weather",
    parameters={
        "type": "object",
        "properties": {"city": CITY, "unit": {"enum": ["c", "f"]}, "near": {"$ref": "#/$defs/n"}},
        "required": ["city"],
        "$defs": {"n": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
    },
)
ODD = Tool(
    name="odd.one",
    parameters={
        "type": "object",
        "properties": {"a-b": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["a-b"],
    },
)
OPTIONAL = Tool(
    name="get",
    parameters={
        "properties": {
            "x": {"type": "integer", "minimum": 0, "maximum": 9},
            "y": {"type": ["boolean", "null"]},
            "z": {"const": "z"},
        },
        "required": ["y"],
    },
)
NOW = Tool(name="now")
TOOLS = [WEATHER, OPTIONAL, ODD, NOW]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
AUTO, REQUIRED = ToolChoice(), ToolChoice(mode="required")
ONE = ToolChoice(mode="required", parallel=False)

# A format, its control tokens, calls as it writes them, and text that is no call.
CASES: dict[str, tuple[ToolFormat, list[str], str, str, list[str]]] = {
    "hermes": (
        Hermes(),
        ["<tool_call>", "</tool_call>"],
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        (
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "get", "arguments": {"x": 1, "y": null}}\n</tool_call>'
        ),
        ['{"name": "now", "arguments": {}}', "<tool_cal", "[now()]"],
    ),
    "mistral": (
        Mistral(),
        ["[TOOL_CALLS]"],
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}]',
        (
            '[TOOL_CALLS] [{"name": "now", "arguments": {}}, '
            '{"name": "get", "arguments": {"x": 1, "y": null}}]'
        ),
        ['{"name": "now", "arguments": {}}', "[TOOL]", "[now()]"],
    ),
    "mistral-v11": (
        Mistral(),
        ["[TOOL_CALLS]", "[ARGS]"],
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo"}',
        '[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]get[ARGS]{"x": 1, "y": null}',
        ['{"name": "now", "arguments": {}}', "now"],
    ),
    "llama3": (
        Llama3(),
        ["<|python_tag|>"],
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}',
        '{"name": "now", "parameters": {}}; {"name": "get", "parameters": {"x": 1, "y": null}}',
        [
            *('{"name": "Ada"}', '{"name": "get_w"}', '{"a": 1, "name": "now"}', "{", '{"name"'),
            *('so: {"name": "now", "parameters": {}}', '{"name": 3}', "{}; {}", " {"),
            '\n\n\n\n\n{"name": "now"}',
        ],
    ),
    "pythonic": (
        Pythonic(),
        ["<|python_start|>", "<|python_end|>"],
        '[get_weather(city="Oslo")]',
        "[now(), get(x=1, y=null)]",
        ["[1] says", "[now] is", "[", "[now", "[get_w(x)]", "see [now()]", "now()", "```python\n"],
    ),
}
IDS = list(CASES)


def calls_of(pieces: Iterable[Piece]) -> list[tuple[str, Any]]:
    return [(p.name, json.loads(p.arguments)) for p in pieces if isinstance(p, CallPiece)]


def text_of(pieces: Iterable[Piece]) -> str:
    return "".join(p.text for p in pieces if isinstance(p, TextPiece))


def parse(
    form: ToolFormat, text: str, choice: ToolChoice = AUTO, *, constrained: bool = True
) -> list[Piece]:
    return read_output(form.parser(TOOLS, choice, constrained=constrained), [text])


def vocabularies(case: str) -> list[ByteVocabulary]:
    special = CASES[case][1]
    needs_tokens = case == "mistral-v11"
    return [ByteVocabulary(special), *([] if needs_tokens else [ByteVocabulary()])]


@pytest.mark.parametrize("case", IDS)
def test_calls_are_required_and_nothing_else(case: str) -> None:
    form, _, one, two, others = CASES[case]
    for tokens in vocabularies(case):
        some = form.grammar(TOOLS, REQUIRED, tokens.special_tokens)
        single = form.grammar(TOOLS, ONE, tokens.special_tokens)
        assert tokens.accepts(some, one)
        assert tokens.accepts(some, two)
        assert tokens.accepts(single, one)
        assert not tokens.accepts(single, two)
        for text in ("", *others, f"so: {one}", f"{one} so", one.replace("city", "town")):
            assert not tokens.accepts(some, text), text
        named = form.grammar(
            TOOLS, ToolChoice(mode="required", names=("now",)), tokens.special_tokens
        )
        assert not tokens.accepts(named, one)


@pytest.mark.slow
@pytest.mark.parametrize("case", IDS)
def test_text_is_free_until_a_call_begins(case: str) -> None:
    form, _, one, two, others = CASES[case]
    for tokens in vocabularies(case):
        free = form.grammar(TOOLS, AUTO, tokens.special_tokens)
        for text in ("", "Hello, \u00e9\n\n[x] {y}", one, two, *others):
            assert tokens.accepts(free, text), text
        for text in (f"{one} so", one.replace("city", "town"), one[:-2]):
            assert not tokens.accepts(free, text), text
        single = form.grammar(TOOLS, ToolChoice(parallel=False), tokens.special_tokens)
        assert tokens.accepts(single, one)
        assert not tokens.accepts(single, two)


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("constrained", [True, False])
def test_calls_and_text_are_told_apart(case: str, constrained: bool) -> None:
    form, _, one, two, others = CASES[case]
    oslo = ("get_weather", {"city": "Oslo"})
    assert calls_of(parse(form, one, constrained=constrained)) == [oslo]
    pieces = parse(form, two, constrained=constrained)
    assert calls_of(pieces) == [("now", {}), ("get", {"x": 1, "y": None})]
    assert text_of(pieces) == ""
    for text in others:
        assert parse(form, text, constrained=constrained) == [TextPiece(text)], text
    if case not in {"llama3", "pythonic"}:
        pieces = parse(form, f"so:\n{one}", constrained=constrained)
        assert text_of(pieces) == "so:"
        assert calls_of(pieces) == [oslo]


@pytest.mark.parametrize("case", IDS)
@pytest.mark.parametrize("choice", [REQUIRED, ONE, AUTO], ids=["some", "one", "auto"])
def test_whatever_a_model_writes_is_read_as_valid_calls_or_text(
    case: str, choice: ToolChoice
) -> None:
    form = CASES[case][0]
    tokens = vocabularies(case)[0]
    grammar = form.grammar(TOOLS, choice, tokens.special_tokens)
    for seed in range(6):
        text, ended = tokens.write(grammar, seed, limit=250)
        pieces = parse(form, text, choice)
        if choice.mode == "required":
            assert text_of(pieces) == "", text
            assert pieces or not ended
        elif not any(isinstance(piece, CallPiece) for piece in pieces):
            assert text_of(pieces) == text
        if ended:
            for name, arguments in calls_of(pieces):
                jsonschema.validate(arguments, dict(SCHEMAS[name]) or {"maxProperties": 0})
            if choice == ONE:
                assert len(calls_of(pieces)) == 1


@pytest.mark.parametrize("case", IDS)
def test_arguments_come_as_they_are_written(case: str) -> None:
    form, _, one, *_ = CASES[case]
    parser = form.parser(TOOLS, AUTO, constrained=True)
    found = [parser.push(character) for character in one]
    calls = [list(pieces) for pieces in found if pieces]
    assert len(calls) >= (2 if case == "pythonic" else 10)
    assert list(parser.finish()) == []


@pytest.mark.parametrize("case", IDS)
def test_an_output_that_is_cut_off_within_a_call_gives_what_came(case: str) -> None:
    form, _, _, two, _ = CASES[case]
    whole = [p for p in parse(form, two) if isinstance(p, CallPiece)]
    for length in range(len(two)):
        pieces = parse(form, two[:length], REQUIRED)
        assert text_of(pieces) == "", two[:length]
        for piece, full in zip(pieces, whole, strict=False):
            assert isinstance(piece, CallPiece)
            assert piece.name == full.name
            assert full.arguments.startswith(piece.arguments)
        loose = parse(form, two[:length], constrained=False)
        calls_of(loose)  # those that are given on are whole
        if not any(isinstance(piece, CallPiece) for piece in loose):
            assert text_of(loose) == two[:length]


MALFORMED = {
    "mistral": [
        *("[TOOL_CALLS]", "[TOOL_CALLS][]", "[TOOL_CALLS]rm[ARGS]{}", "[TOOL_CALLS]now[ARGS]{,}"),
        *("[TOOL_CALLS]now{}", '[TOOL_CALLS][{"name": "rm"}]', '[TOOL_CALLS][{"name": "now"'),
    ],
    "llama3": [
        *('{"name": "rm", "parameters": {}}', '{"name": "now", "parameters": []}', "{} {}"),
        '{"name": "now", "parameters": {}',
    ],
    "pythonic": [
        *("[rm()]", "[now(]", "[now()", "[now(1)]", "[now(), rm()]", "[get(x=1 y=2)]", "[get(x)]"),
        *(
            "[get(x=f())]",
            "[get(x={1})]",
            "[get(**[1])]",
            "[get(x=(1)]",
            "[now() now()]",
            "[get(x=)]",
        ),
        *("```tool_code\nrm()\n```", "```tool_code\nnow()", "[get(x=" + "(" * 900 + "1)]"),
        "```tool_code\n```",
    ],
}


@pytest.mark.parametrize(
    ("case", "text"), [(case, text) for case, texts in MALFORMED.items() for text in texts]
)
def test_what_is_no_call_is_given_back(case: str, text: str) -> None:
    for whole in (text, f" {text}\n\nend", f"{text} "):
        assert parse(CASES[case][0], whole, constrained=False) == [TextPiece(whole)]


@pytest.mark.parametrize(
    ("case", "text", "expected"),
    [
        ("mistral", '[TOOL_CALLS]now[CALL_ID]abc123456[ARGS]{"a": 1}', [("now", {"a": 1})]),
        ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}', [("now", {})]),
        ("mistral", '[TOOL_CALLS][{"arguments": {}, "name": "now"}]', [("now", {})]),
        ("llama3", '<|python_tag|>{"name": "now", "parameters": {}}', [("now", {})]),
        ("llama3", '{"type": "function", "name": "now", "parameters": {}}', [("now", {})]),
        ("pythonic", "<|python_start|>[now()]<|python_end|>", [("now", {})]),
        ("pythonic", "```tool_code\nnow()\nget(x=1)\n```", [("now", {}), ("get", {"x": 1})]),
        (
            "pythonic",
            "[get(x='it\\'s, (ok]', y=[1, (2, None)], z={'a': True})]",
            [("get", {"x": "it's, (ok]", "y": [1, [2, None]], "z": {"a": True}})],
        ),
        (
            "pythonic",
            '[odd.one(**{"a-b": 1}), get(x = -1.5)]',
            [("odd.one", {"a-b": 1}), ("get", {"x": -1.5})],
        ),
    ],
)
def test_other_ways_to_write_a_call(case: str, text: str, expected: list[Any]) -> None:
    pieces = parse(CASES[case][0], text, constrained=False)
    assert calls_of(pieces) == expected
    assert text_of(pieces) == ""


@pytest.mark.slow
@pytest.mark.parametrize("case", IDS)
@settings(max_examples=60)
@given(
    st.data(),
    st.lists(st.integers(0, 10_000), max_size=20),
    st.booleans(),
)
def test_pieces_are_the_same_however_the_text_was_cut(
    case: str, data: st.DataObject, places: list[int], constrained: bool
) -> None:
    form, special, one, two, others = CASES[case]
    odd = [
        " ",
        "\n",
        "a",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "\\",
        ",",
        ";",
        "(",
        ")",
        "=",
        "\u00e9",
        "1",
    ]
    parts = [*special, one, two, *others, *MALFORMED.get(case, []), *odd, "```tool_code\n", "```"]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=8)))
    whole = parse(form, text, constrained=constrained)
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    for some in ([text[a:b] for a, b in itertools.pairwise(borders)], list(text)):
        assert read_output(form.parser(TOOLS, AUTO, constrained=constrained), some) == whole
    if not constrained:
        calls_of(whole)
        if not any(isinstance(piece, CallPiece) for piece in whole):
            assert text_of(whole) == text


def test_which_models_write_how() -> None:
    llama = ('"parameters"', {"<|python_tag|>": 1})
    templates: Sequence[tuple[str, str | None, Mapping[str, int]]] = [
        ("hermes", "<tool_call> {{ tools }}", {"<|im_start|>": 1}),
        ("mistral", "[INST]", {"[TOOL_CALLS]": 5}),
        ("mistral", "[TOOL_CALLS] {{ tools }}", {}),
        ("llama3", *llama),
        ("pythonic", "{{ messages }}", {"<start_of_turn>": 1}),
        ("pythonic", "{{ tools }}", {"<|python_start|>": 1}),
        ("generic", "{{ messages }}", {"<|im_start|>": 1}),
        ("generic", None, {}),
    ]
    infos = load_plugins(only=[]).tool_formats(Config(), ModelConfig())
    for expected, template, special in templates:
        suiting = [info.name for info in infos if info.factory().suits(template, special)]
        assert suiting[0] == expected


@pytest.mark.parametrize("case", [*IDS, "generic"])
def test_a_model_that_knows_no_tools_sees_its_own_form(case: str) -> None:
    form = Generic() if case == "generic" else CASES[case][0]
    calls = [
        {"id": "1", "function": {"name": "get_weather", "arguments": {"city": 'O"s'}}},
        {"id": "2", "function": {"name": "odd.one", "arguments": {"a-b": 1}}},
    ]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "rain", "name": "get_weather"},
    ]
    told = form.prepare(messages, TOOLS, AUTO)
    assert [m["role"] for m in told] == ["system", "user", "assistant", "user"]
    said = parse(form, told[2]["content"], constrained=False)
    assert calls_of(said) == [("get_weather", {"city": 'O"s'}), ("odd.one", {"a-b": 1})]
    assert "rain" in told[3]["content"]


def test_mistrals_templates_get_ids_that_they_accept() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [{"id": "call_1", "function": {}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
        {"role": "tool", "tool_call_id": "abcDEF123", "content": ""},
        {"role": "user", "content": ""},
    ]
    first, second, third, last = Mistral().adapt(messages)
    assert first["tool_calls"][0]["id"] == second["tool_call_id"]
    assert second["tool_call_id"].isalnum()
    assert len(second["tool_call_id"]) == 9
    assert third["tool_call_id"] == "abcDEF123"
    assert last == messages[3]
    assert messages[1]["tool_call_id"] == "call_1"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("true", True), ("True", True), ("None", None), ("'a'", "a"), ("(1,)", [1])],
)
def test_values_of_python_and_json(text: str, value: Any) -> None:
    assert read_value(text) == (True, value)


@pytest.mark.parametrize(
    "text", ["", "x", "{1}", "b'a'", "1j", "f()", "(" * 5000, "[" * 5000, "1e999"]
)
def test_what_is_no_value(text: str) -> None:
    assert read_value(text) == (False, None)


def test_a_format_can_be_named_or_switched_off() -> None:
    plugins = load_plugins(only=[])

    def names(tool_format: str) -> list[str]:
        model = ModelConfig(tool_format=tool_format)
        plugins.check(Config(models=[model]))
        return [info.name for info in plugins.tool_formats(Config(), model)]

    assert names("llama3") == ["llama3"]
    assert names("none") == []
    assert names("auto")[-1] == "generic"
    with pytest.raises(ConfigError, match=r"tool_format.*'hermez'.*Did you mean 'hermes'"):
        names("hermez")
