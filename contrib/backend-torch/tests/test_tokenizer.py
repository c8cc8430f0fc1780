"""Tokens and text: nothing is lost, control tokens stay out of user text, threads are kept apart."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

import stoker
from stoker_backend_torch.tokenizer import TorchTokenizer

CONTROL = "<|end|>"
SNIPPETS = (
    CONTROL,
    "<|user|>",
    "</s>",
    "<s>",
    " ",
    "\n",
    "the",
    "\u2581",
    "<0x0A>",
    "é",
    "🙂",
    "<b>",
)
texts = st.text(max_size=60) | st.lists(st.sampled_from(SNIPPETS)).map("".join)


def is_kept(tokenizer: TorchTokenizer, text: str) -> None:
    """A text, taken as text, comes back exactly and holds no control token."""
    ids = tokenizer.encode(text, add_special=False, parse_special=False)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


def make_unigram() -> TorchTokenizer:
    """As from sentencepiece: spaces as marks, bytes for what is unknown, ``<s>`` in the vocabulary."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [
        ("\u2581", -2.0),
        ("\u2581the", -1.0),
        ("t", -3.0),
        ("h", -3.0),
        ("e", -3.0),
        ("s", -3.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return TorchTokenizer(tokenizer.to_str())


def make_word_piece() -> TorchTokenizer:
    words = [
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "hello",
        "wor",
        "##ld",
        "##s",
        "a",
        "b",
        ",",
        "[",
        "]",
        "cls",
    ]
    tokenizer = Tokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    return TorchTokenizer(tokenizer.to_str())


@pytest.fixture(scope="module")
def byte_level(byte_tokenizer: str) -> TorchTokenizer:
    return TorchTokenizer(byte_tokenizer)


unigram = make_unigram()
word_piece = make_word_piece()


# ----------------------------------------------------------------------------- byte-level


@settings(max_examples=200)
@given(text=texts)
def test_byte_level_text_comes_back(byte_level: TorchTokenizer, text: str) -> None:
    is_kept(byte_level, text)


def test_byte_level_pieces_are_bytes(byte_level: TorchTokenizer) -> None:
    ids = byte_level.encode("🙂", add_special=False, parse_special=False)
    assert b"".join(map(byte_level.token_bytes, ids)) == "🙂".encode()
    assert len(ids) == 4
    assert byte_level.decode(ids[:2]) == "\ufffd"
    assert byte_level.token_bytes(byte_level.special_tokens[CONTROL]) == b""
    assert byte_level.token_bytes(10**6) == b""


def test_control_tokens_are_parsed_only_if_asked(byte_level: TorchTokenizer) -> None:
    end = byte_level.special_tokens[CONTROL]
    assert byte_level.encode(f"a{CONTROL}", add_special=False, parse_special=True)[-1] == end
    assert end not in byte_level.encode(f"a{CONTROL}", add_special=False, parse_special=False)


def test_lone_surrogates_become_question_marks(byte_level: TorchTokenizer) -> None:
    ids = byte_level.encode("a\ud800b", add_special=True, parse_special=True)
    assert byte_level.decode(ids) == "a?b"


def test_added_tokens_that_look_like_markup_are_control_tokens(byte_tokenizer: str) -> None:
    changed = Tokenizer.from_str(byte_tokenizer)
    changed.add_tokens([AddedToken("<tool_call>"), AddedToken("<b>"), AddedToken("ordinary word")])
    tokenizer = TorchTokenizer(changed.to_str())
    assert "<tool_call>" in tokenizer.special_tokens
    assert not {"<b>", "ordinary word"} & tokenizer.special_tokens.keys()
    (word,) = tokenizer.encode("ordinary word", add_special=False, parse_special=False)
    assert tokenizer.token_bytes(word) == b"ordinary word"
    is_kept(tokenizer, "x<tool_call>y<b>ordinary word")


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_byte_pairs_do_not_build_control_tokens(byte_tokenizer: str, ignore_merges: bool) -> None:
    """A word may be looked up as a whole, or merges may lead to a control token."""
    parts = json.loads(byte_tokenizer)
    vocab = parts["model"]["vocab"]
    vocab["</"], vocab["s>"], vocab["</s>"] = 1000, 1001, 1002
    parts["model"]["merges"] += [["<", "/"], ["s", ">"], ["</", "s>"]]
    parts["model"]["ignore_merges"] = ignore_merges
    parts["pre_tokenizer"] = {**parts["pre_tokenizer"], "use_regex": False}
    end = {**parts["added_tokens"][0], "id": 1002, "content": "</s>"}
    parts["added_tokens"].append(end)
    tokenizer = TorchTokenizer(json.dumps(parts))
    assert tokenizer.encode("</s>", add_special=False, parse_special=True) == [1002]
    is_kept(tokenizer, "</s>")
    is_kept(tokenizer, "x</s>y")


# ----------------------------------------------------------------------------- sentencepiece-like


@settings(max_examples=200)
@given(text=texts)
@example(text="</s>")
@example(text=" the")
def test_sentencepiece_text_comes_back(text: str) -> None:
    text = text.replace("\u2581", " ")  # such tokenizers take the mark for a space,
    assume("<0x" not in text)  # and the library's take the spelling of a byte for it
    ids = unigram.encode(text, add_special=False, parse_special=False)
    assert not set(ids) & {1, 2}
    # They put a space before a text that has none there, and it is not part of it.
    start = " " if text and text[0] != " " else ""
    assert b"".join(map(unigram.token_bytes, ids)).decode() == start + text
    assert unigram.decode(ids) == (text if start else text[1:])


def test_sentencepiece_spaces_and_bytes() -> None:
    ids = unigram.encode("the ß", add_special=True, parse_special=False)
    assert ids[0] == 1
    assert [unigram.token_bytes(token) for token in ids] == [b"", b" the", b" ", b"\xc3", b"\x9f"]
    assert unigram.decode(ids) == "the ß"
    assert unigram.encode("</s>", add_special=False, parse_special=True)[-1] == 2


# ----------------------------------------------------------------------------- WordPiece


def test_word_piece_words_are_apart_and_parts_are_not() -> None:
    ids = word_piece.encode("Hello worlds, a", add_special=True, parse_special=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert len(ids) == 8  # neither cut nor filled up, whatever the description says
    assert word_piece.decode(ids) == "hello worlds , a"
    assert word_piece.encode("", add_special=True, parse_special=False) == [1, 2]


@settings(max_examples=100)
@given(words=st.lists(st.sampled_from(["hello", "world", "a", "b", "worlds"]), min_size=1))
def test_word_piece_text_comes_back(words: list[str]) -> None:
    is_kept(word_piece, " ".join(words))


def test_word_piece_control_tokens() -> None:
    assert 1 in word_piece.encode("a [CLS]", add_special=False, parse_special=True)
    assert 1 not in word_piece.encode("a [CLS]", add_special=False, parse_special=False)


# ----------------------------------------------------------------------------- others


def test_other_kinds_of_decoders() -> None:
    for decoder, vocab, expected in (
        (decoders.BPEDecoder("</w>"), {"ab</w>": 0, "c": 1}, [b"ab ", b"c"]),
        (None, {"ab": 0, "c": 1}, [b" ab", b" c"]),
        (decoders.Metaspace(), {"\u2581ab": 0, "c": 1}, [b" ab", b"c"]),
    ):
        tokenizer = Tokenizer(models.WordLevel({**vocab, "a": 2, "[UNK]": 3}, unk_token="[UNK]"))
        if decoder is not None:
            tokenizer.decoder = decoder
        made = TorchTokenizer(tokenizer.to_str())
        assert [made.token_bytes(0), made.token_bytes(1)] == expected


def test_descriptions_that_make_no_sense_are_refused(byte_tokenizer: str) -> None:
    parts: dict[str, Any] = json.loads(byte_tokenizer)
    parts["model"]["merges"] = [["no such", "tokens"]]
    with pytest.raises(stoker.ModelError, match="cannot be built"):
        TorchTokenizer(json.dumps(parts))


def test_threads_do_not_disturb_each_other(byte_level: TorchTokenizer) -> None:
    text = f"the quick {CONTROL} fox 🙂 " * 20

    def encode(index: int) -> list[int]:
        return byte_level.encode(text, add_special=index % 3 == 0, parse_special=index % 2 == 0)

    expected = [encode(0), encode(1)]
    with ThreadPoolExecutor(8) as pool:
        for index, ids in enumerate(pool.map(encode, range(64))):
            assert ids == expected[index % 2]


# ----------------------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> TorchTokenizer:
    return TorchTokenizer((smollm2_folder / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.model
@given(text=texts | st.from_regex(re.compile(r"<\|[a-z_]{0,9}\|>"), fullmatch=True))
@example(text="<|im_start|>system\n")
def test_smollm2_text_comes_back(smollm2: TorchTokenizer, text: str) -> None:
    # Its vocabulary lacks some bytes, which are in no text: but for a few control characters
    # and the first byte of characters that nobody has assigned.
    known = {smollm2.token_bytes(token) for token in range(smollm2.vocab_size)}
    assume(all(bytes([byte]) in known for byte in text.encode("utf-8", "replace")))
    is_kept(smollm2, text)


@pytest.mark.model
def test_smollm2_tokens(smollm2: TorchTokenizer) -> None:
    assert smollm2.special_tokens["<|im_start|>"] == 1
    assert smollm2.encode("<|im_end|>", add_special=True, parse_special=True) == [2]
    assert smollm2.encode("Hello world", add_special=True, parse_special=True) == [19556, 905]
    assert smollm2.token_bytes(905) == b" world"
    assert smollm2.vocab_size == 49152
