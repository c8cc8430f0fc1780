"""Reasoning is told from the answer, however the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker import CallPiece, OutputParser, Piece, ReasoningPiece, TextPiece, Tool, ToolChoice
from stoker.reasoning import MARKS, ReasoningParser, find_marks, is_open
from stoker.testing import ScriptedTokenizer, read_output
from stoker_plugins.tool_formats.hermes import Hermes

THINK = MARKS[0]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def calls() -> OutputParser:
    return Hermes().parser([Tool(name="now")], ToolChoice(), constrained=False)


def parse(text: str, *, thinking: bool = False, tools: bool = False) -> list[Piece]:
    parser = ReasoningParser(THINK, is_open=thinking, inner=calls() if tools else None)
    return read_output(parser, [text])


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "answer"),
    [
        ("hello", False, "", "hello"),
        ("  hello ", False, "", "  hello "),
        ("<think>\na b\n</think>\n\nhello", False, "a b", "hello"),
        ("\n<think>a</think>hello ", False, "a", "hello "),
        ("<think>\n\n</think>\n\nhello", False, "", "hello"),
        ("<think>a < b </thin", False, "a < b </thin", ""),
        ("<thin", False, "", "<thin"),
        ("so: <think>a</think>", False, "", "so: <think>a</think>"),
        ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
        ("\na b</think>\nhello", True, "a b", "hello"),
        ("a b", True, "a b", ""),
        ("</think>hello", True, "", "hello"),
        ("", True, "", ""),
    ],
)
def test_what_is_reasoning(text: str, thinking: bool, reasoning: str, answer: str) -> None:
    expected = [ReasoningPiece(reasoning)] if reasoning else []
    assert parse(text, thinking=thinking) == [*expected, *([TextPiece(answer)] if answer else [])]


def test_calls_follow_reasoning_and_calls_in_it_are_thoughts() -> None:
    text = f"<think>I could {CALL}</think>\nwell\n{CALL}"
    assert parse(text, tools=True) == [
        ReasoningPiece(f"I could {CALL}"),
        TextPiece("well"),
        CallPiece(0, "{}", "now"),
    ]


PARTS = st.sampled_from(
    ["<think>", "</think>", "<", "think>", "</", " ", "\n", "a", "\u00e9", CALL]
)


@pytest.mark.slow
@given(
    st.lists(PARTS, max_size=10),
    st.lists(st.integers(0, 500), max_size=8),
    st.booleans(),
    st.booleans(),
)
def test_pieces_are_the_same_however_the_text_was_cut(
    parts: list[str], places: list[int], thinking: bool, tools: bool
) -> None:
    text = "".join(parts)
    whole = parse(text, thinking=thinking, tools=tools)
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    for some in ([text[a:b] for a, b in itertools.pairwise(borders)], list(text)):
        parser = ReasoningParser(THINK, is_open=thinking, inner=calls() if tools else None)
        assert read_output(parser, some) == whole


def test_marks_are_found_in_templates_and_vocabularies() -> None:
    class Magistral(ScriptedTokenizer):
        special_tokens = {"[THINK]": 1, "[/THINK]": 2}  # type: ignore[assignment]  # noqa: RUF012

    plain = ScriptedTokenizer()
    assert find_marks("auto", "... </think> ...", plain) == THINK
    assert find_marks("auto", "{{ messages }}", plain) is None
    assert find_marks("auto", None, plain) is None
    assert find_marks("auto", None, Magistral()) == ("[THINK]", "[/THINK]")
    assert find_marks("on", None, plain) == THINK
    assert find_marks("off", "</think>", plain) is None


def test_whether_an_answer_begins_within_the_reasoning() -> None:
    assert is_open(THINK, "<|assistant|><think>\n")
    assert not is_open(THINK, "<|assistant|><think>\n\n</think>\n\n")
    assert not is_open(THINK, "<|assistant|>")
    assert is_open(THINK, "...<think>a", "<think>a")
    assert not is_open(THINK, "<think>", "<think>a</think>b")
