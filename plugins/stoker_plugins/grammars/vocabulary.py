"""Any model's vocabulary, as llguidance wants it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from llguidance import LLTokenizer

if TYPE_CHECKING:
    from stoker import RuntimeInfo, Tokenizer

__all__ = ["build_tokenizer"]

logger = logging.getLogger("stoker.grammars")

_MAX_FORCED = 400  # characters: the rest of a forced text is tokenized again at each of its tokens


def build_tokenizer(tokenizer: Tokenizer, info: RuntimeInfo) -> LLTokenizer:
    """A trie over a model's tokens; takes about 0.2 s and 25 MB for 49,152 of them.

    Args:
        tokenizer: The model's.
        info: The size of its vocabulary and its end tokens.
    """
    vocabulary = _Vocabulary(tokenizer, info)
    built = LLTokenizer(
        cast(Any, vocabulary), n_vocab=len(vocabulary.tokens), eos_token=vocabulary.end_tokens
    )
    vocabulary.greedy = built.greedy_tokenize
    return built


class _Vocabulary:
    """A vocabulary with the attributes that ``LLTokenizer`` reads.

    Attributes:
        tokens: The bytes of each token; of a control token its name; nothing of one that has neither.
        special_token_ids: Tokens that are no text, so that a grammar has to name them to allow them.
        end_tokens: The end tokens.
        greedy: Tokens of a text, the longest that fits first.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, info: RuntimeInfo) -> None:
        self._tokenizer = tokenizer
        size = info.vocab_size
        names = {token: name for name, token in tokenizer.special_tokens.items()}
        self.tokens = [_bytes_of(tokenizer, token, names.get(token)) for token in range(size)]
        self.end_tokens = sorted(token for token in info.end_token_ids if 0 <= token < size)
        for token in self.end_tokens:
            if token not in names:
                names[token] = f"<|end-{token}|>"
                self.tokens[token] = names[token].encode()
        if not self.end_tokens:
            # There has to be one: beyond the vocabulary, where nobody can sample it.
            self.end_tokens = [size]
            names[size] = "<|end|>"
            self.tokens.append(b"<|end|>")
        self.special_token_ids = sorted(token for token in names if 0 <= token < len(self.tokens))
        self.eos_token_id = self.end_tokens[0]
        self.greedy: Callable[[str], list[int]] | None = None

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text that a grammar forces: the model's own, if they are that text and no other."""
        if len(text) > _MAX_FORCED:
            return self._by_length(text)
        try:
            tokens = self._tokenizer.encode(text, add_special=False, parse_special=False)
            # Some put a space before the first word, or know bytes that the text has not.
            if b"".join(map(self._tokenizer.token_bytes, tokens)) == text.encode():
                return tokens
        except Exception as error:  # noqa: BLE001 - a tokenizer may raise anything
            logger.debug("the tokenizer failed for %r: %r", text, error)
        return self._by_length(text)

    def _by_length(self, text: str) -> list[int]:
        return [] if self.greedy is None else self.greedy(text)


def _bytes_of(tokenizer: Tokenizer, token: int, name: str | None) -> bytes:
    if name is not None:
        return name.encode("utf-8", "replace")
    try:
        return tokenizer.token_bytes(token)
    except (
        IndexError,
        KeyError,
        ValueError,
    ):  # a hole: the logits have more columns than there are tokens
        return b""
