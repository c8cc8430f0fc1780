"""A grammar after reasoning: whatever is thought, the answer follows the grammar, and nothing else does."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import pytest

from stoker import GrammarSpec, Matcher, RuntimeInfo, Tokenizer
from stoker.reasoning import MARKS, ReasoningParser
from stoker.testing import read_output
from stoker.thoughts import AfterReasoning, ThoughtTokens
from stoker_plugins.grammars.compiler import LlguidanceCompiler

THINK = MARKS[0]
END = 256
WORDS = [
    "think",
    "</",
    "</think>",
    "k>\n",
    ">{",
    ">\n\n",
    ">\n{",
    "nk>{",
    "x</think>1",
    "  ",
    '{"a"',
    "<th",
]


class Words(Tokenizer):
    """Bytes, an end, some longer tokens, and perhaps the marks as control tokens."""

    def __init__(self, *, control: bool) -> None:
        words = [w for w in WORDS if not (control and "</think>" in w)]
        self.pieces = [bytes([i]) for i in range(256)] + [b""]
        self.pieces += [word.encode() for word in words]
        names = list(THINK) if control else []
        self.names = {"<end>": END} | {n: len(self.pieces) + i for i, n in enumerate(names)}
        self.pieces += [b""] * len(names)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self.names

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


class Model:
    def __init__(self, *, control: bool, spec: GrammarSpec) -> None:
        self.tokenizer = Words(control=control)
        size = len(self.tokenizer.pieces)
        self.info = RuntimeInfo(
            name="words",
            vocab_size=size,
            context_length=99,
            num_lanes=1,
            kv_capacity_tokens=99,
            max_step_tokens=9,
            end_token_ids=frozenset({END}),
        )
        self.tokens = ThoughtTokens(THINK, self.tokenizer, self.info)
        self.inner = LlguidanceCompiler(self.tokenizer, self.info).compile(spec)

    def start(self, *, thinking: bool) -> Matcher:
        return AfterReasoning(self.inner, self.tokens, is_thinking=thinking).start()

    def allowed(self, matcher: Matcher) -> list[int]:
        size = self.info.vocab_size
        mask = np.zeros((size + 31) // 32, np.int32)
        matcher.fill_mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[:size]
        return [int(token) for token in np.flatnonzero(bits)]

    def text(self, tokens: list[int]) -> str:
        return b"".join(map(self.tokens.data, tokens)).decode("utf-8", "replace")

    def write(self, text: str, *, thinking: bool) -> Matcher:
        """A matcher that has accepted a text, byte by byte, marks as their tokens where they have one."""
        matcher = self.start(thinking=thinking)
        while text:
            mark = next((m for m in THINK if text.startswith(m)), "")
            if mark in self.tokenizer.names:
                assert matcher.accept(self.tokenizer.names[mark]), text
                text = text[len(mark) :]
            else:
                assert matcher.accept(ord(text[0])), text
                text = text[1:]
        return matcher


OBJECT = GrammarSpec(
    kind="lark",
    text='start: "{\\"a\\": " /[0-9]{1,3}/ "}" | "<tag>" | "{\\"a\\"" ',
)


@pytest.fixture(params=[True, False], ids=["control tokens", "spelled"], scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    return Model(control=request.param, spec=OBJECT)


def test_the_answer_follows_the_grammar_with_and_without_reasoning(model: Model) -> None:
    for text in ('<think>any {"thing"</think>\n\n{"a": 12}', '{"a": 12}', "<tag>"):
        matcher = model.write(text, thinking=False)
        assert model.allowed(matcher) == [END]
    matcher = model.write('so </thin ...</think>{"a": 12}', thinking=True)
    assert model.allowed(matcher) == [END]


def test_nothing_but_the_grammar_begins_an_answer(model: Model) -> None:
    for text in ("<think>a</think>", "<think></think>\n"):
        matcher = model.write(text, thinking=False)
        assert not matcher.accept(ord("x"))
        assert not matcher.accept(END)
    matcher = model.start(thinking=False)
    assert not matcher.accept(ord("x"))
    matcher = model.write("a", thinking=True)
    assert not matcher.accept(END)


@pytest.mark.slow
def test_masks_say_what_may_be_accepted(model: Model) -> None:
    texts = (
        *("", "<", "<t", "<think>", "<think>a</thi", "<think>a</", "<think>a</think"),
        *("<think></think>", "<think></think> ", '<think></think>{"a', '{"a": 1', "<tag"),
    )
    for text in texts:
        if not model.tokenizer.names.keys().isdisjoint(THINK) and text in {"<t", "<"}:
            continue
        for token in range(model.info.vocab_size):
            matcher = model.write(text, thinking=False)
            may = token in model.allowed(matcher)
            assert matcher.count_valid([token]) == int(may), (text, model.tokens.data(token), may)
            assert matcher.accept(token) == may


@pytest.mark.parametrize("seed", range(40))
def test_any_walk_ends_in_a_valid_answer_and_can_be_taken_back(model: Model, seed: int) -> None:
    chance = random.Random(seed)
    thinking = chance.random() < 0.5
    matcher, tokens = model.start(thinking=thinking), list[int]()
    masks: list[list[int]] = []
    closing = [ord(c) for c in "</think>"] + [
        t for t in range(257, model.info.vocab_size) if t != model.tokenizer.names.get("<think>")
    ]
    while True:
        allowed = model.allowed(matcher)
        likely = [t for t in closing if t in allowed]
        masks.append(allowed)
        token = chance.choice(likely if likely and chance.random() < 0.9 else allowed)
        if token == END or len(tokens) > 300:
            break
        assert matcher.accept(token)
        tokens.append(token)
        if chance.random() < 0.2:
            back = chance.randint(1, min(6, len(tokens)))
            matcher.rollback(back)
            assert model.allowed(matcher) == masks[-back]
            del tokens[-back:], masks[-back:]
    if len(tokens) <= 300:
        parser = ReasoningParser(THINK, is_open=thinking)
        pieces = read_output(parser, [model.text(tokens)])
        assert pieces
        answer = model.write(pieces[-1].text, thinking=False)  # type: ignore[union-attr]
        assert END in model.allowed(answer)


def test_what_is_forced_and_complete_is_the_answers(model: Model) -> None:
    matcher = model.write("hm", thinking=True)
    assert list(matcher.forced()) == []
    assert not matcher.is_complete
    matcher = model.write("hm</think><", thinking=True)
    assert model.text(list(matcher.forced())).startswith("ta")
    assert model.write("<tag>", thinking=False).is_complete
