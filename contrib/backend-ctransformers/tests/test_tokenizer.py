"""Tokens and bytes: as ctransformers' own functions have it, but for what those cannot do."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

import stoker
from legacy_ggml import TOKENS, make_model
from stoker_backend_ctransformers.tokenizer import LegacyTokenizer

Load = Callable[..., Any]
TEXTS = (
    "hello world, the end",
    " hello  world\n\n\tthe   ing's they'll 'tis I'm we've",
    "of12ld34 3.14159 -- !!?? the",
    "naïve café, Grüße, ½ µm",
    "日本語とrussian русский 👩‍👩‍👧",
    "   ",
    "\n",
    "tab\tand\r\nline\x0b\x0cend ",
    "<|endoftext|> is text here",
)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "mpt"])
def test_words_are_cut_as_ctransformers_cuts_them(architecture: str, load: Load) -> None:
    runtime = load(architecture, lanes=1)
    native = runtime._instances[0]
    letters = "ab the,of ing er 1 2\n\t'sllé世"
    dice = random.Random(1)
    texts = [*TEXTS, *("".join(dice.choices(letters, k=60)) for _ in range(100))]
    for text in texts:
        tokens = runtime.tokenizer.encode(text, add_special=True, parse_special=False)
        assert tokens == native.tokenize(text.encode(), add_bos=False)
        assert runtime.tokenizer.decode(tokens) == text


def test_tokens_have_the_bytes_of_the_file(load: Load) -> None:
    tokenizer = load("gpt2", lanes=1).tokenizer
    end = TOKENS.index(b"<|endoftext|>")
    assert [tokenizer.token_bytes(i) for i in range(end)] == TOKENS[:end]
    assert tokenizer.token_bytes(end) == b""
    assert tokenizer.special_tokens == {"<|endoftext|>": end}
    assert tokenizer.encode("\0", add_special=False, parse_special=False) == [0]


def test_control_tokens_are_parsed_only_where_wanted(load: Load) -> None:
    tokenizer = load("gpt2", lanes=1).tokenizer
    end = TOKENS.index(b"<|endoftext|>")
    text = "a<|endoftext|>b<|endoftext|>"
    tokens = tokenizer.encode(text, add_special=False, parse_special=True)
    assert tokens == [ord("a"), end, ord("b"), end]
    assert end not in tokenizer.encode(text, add_special=True, parse_special=False)


def test_llama_begins_texts_with_its_token_and_a_space(load: Load) -> None:
    tokenizer = load("llama", lanes=1).tokenizer
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.end_token_ids == {2}
    text = "old wörld\0world"
    tokens = tokenizer.encode(text, add_special=False, parse_special=False)
    assert tokenizer.decode(tokens) == text
    assert 3 in tokens  # the NUL byte, at which C strings end
    begun = tokenizer.encode(text, add_special=True, parse_special=False)
    assert begun[:2] == [1, 3 + ord(" ")]
    assert tokenizer.decode(begun) == " " + text
    assert tokenizer.encode("</s>", add_special=False, parse_special=True) == [2]
    assert tokenizer.encode("", add_special=False, parse_special=False) == []


def test_long_words_cost_time_in_proportion(load: Load) -> None:
    """``std::regex`` takes minutes for these; where they are longer, it overflows the stack."""
    tokenizer = load("gpt2", lanes=1).tokenizer
    for text in ("a" * 100_000, " " * 100_000, "!" * 100_000):
        tokens = tokenizer.encode(text, add_special=True, parse_special=True)
        assert tokenizer.decode(tokens) == text


def test_missing_bytes_are_left_out_with_a_warning(tmp_path: Any, load: Load) -> None:
    model = make_model("gpt2")
    model.tokens[ord("z")] = b"<|pad|>"
    path = tmp_path / "model.bin"
    path.write_bytes(model.to_bytes())
    runtime = load(path)
    assert "no token for 1 of the 256 bytes" in runtime.info.warnings[0]
    tokens = runtime.tokenizer.encode("a zebra", add_special=True, parse_special=False)
    assert runtime.tokenizer.decode(tokens) == "a ebra"


def test_a_vocabulary_without_an_end_token_is_warned_of(tmp_path: Any, load: Load) -> None:
    model = make_model("gpt2")
    model.tokens[-1] = b" end"
    path = tmp_path / "model.bin"
    path.write_bytes(model.to_bytes())
    info = load(path).info
    assert info.end_token_ids == frozenset()
    assert "no end token" in info.warnings[0]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_threads_may_encode_at_once_and_closing_waits(architecture: str, load: Load) -> None:
    runtime = load(architecture, lanes=1)
    text = "hello world, the ending of the world " * 20
    expected = runtime.tokenizer.encode(text, add_special=True, parse_special=True)
    wrong: list[object] = []

    def work() -> None:
        try:
            for _ in range(200):
                got = runtime.tokenizer.encode(text, add_special=True, parse_special=True)
                if got != expected:
                    wrong.append(got)
        except stoker.EngineError:
            return  # closed meanwhile

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    if architecture == "llama":
        runtime.close()
    for thread in threads:
        thread.join()
    assert not wrong
    if architecture == "llama":
        with pytest.raises(stoker.EngineError, match="closed"):
            runtime.tokenizer.encode("x", add_special=False, parse_special=False)


def test_odd_vocabularies_have_no_tokens_that_are_not_theirs() -> None:
    file: Any = SimpleNamespace(
        tokens=(b"a", b"<|\xff|>", b"<|x|>"),
        architecture=SimpleNamespace(tokenizer="native", name="falcon"),
    )
    instance: Any = SimpleNamespace(eos_token_id=11)  # the library's default
    tokenizer = LegacyTokenizer(file, instance)
    assert tokenizer.special_tokens == {"<|x|>": 2}
    assert tokenizer.token_bytes(1) == b"<|\xff|>"
    assert not tokenizer.end_token_ids
