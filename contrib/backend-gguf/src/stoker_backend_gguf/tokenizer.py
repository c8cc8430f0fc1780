"""Text to token ids and back, by the vocabulary inside the model."""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from itertools import compress, repeat
from typing import TYPE_CHECKING

from stoker import EngineError, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stoker_backend_gguf.native import NativeModel

__all__ = ["GgufTokenizer"]

_PIECE_BYTES = 256
_OVERFLOW = -(2**31)
# Some vocabularies hold markup as "user defined" tokens, which llama.cpp parses out of any text.
_MARKUP = re.compile(r"<[^<>\s]+>")
# HTML elements are text that users may write, and such vocabularies were trained to see them as tokens.
_HTML = re.compile(
    r"</?(a|b|blockquote|body|br|caption|code|dd|div|dl|dt|em|h[1-6]|head|hr|html|i|img|li|ol|p|pre|s|span|"
    r"strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)/?>"
)


class GgufTokenizer(Tokenizer):
    """The tokenizer of a loaded model.

    Args:
        model: The model whose vocabulary it uses, until ``close``.
    """

    def __init__(self, model: NativeModel) -> None:
        self._lib = lib = model.lib
        self._vocab = vocab = model.vocab
        # Calls into the library, for which ``close`` waits. They do not wait for each other: a long text may
        # take seconds, and llama.cpp's tokenizers keep no state.
        self._calls = threading.Condition()
        self._num_calls = 0
        self.vocab_size: int = lib.llama_vocab_n_tokens(vocab)
        self._pieces: list[bytes | None] = [None] * self.vocab_size
        ids = range(self.vocab_size)
        attributes = list(map(lib.llama_vocab_get_attr, repeat(vocab), ids))
        self.end_token_ids = frozenset(
            compress(ids, map(lib.llama_vocab_is_eog, repeat(vocab), ids))
        )
        control, user_defined = lib.LLAMA_TOKEN_ATTR_CONTROL, lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        self._special: dict[str, int] = {}
        markup: dict[str, int] = {}
        for token in compress(ids, map((control | user_defined).__and__, attributes)):
            text = self.text_of(token)
            if attributes[token] & control:
                self._special[text] = token
            elif _MARKUP.fullmatch(text) and not _HTML.fullmatch(text):
                markup[text] = token
        self._special.pop("", None)
        self._special.update(markup)
        self._markup_ids = frozenset(markup.values())
        self._markup = re.compile("|".join(map(re.escape, sorted(markup, key=len, reverse=True))))

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text, and "user defined" ones that look like markup but HTML's."""
        return self._special

    def text_of(self, token_id: int) -> str:
        """The text of a token as the vocabulary spells it, e.g. ``<|im_end|>``; empty if ``token_id`` < 0."""
        if token_id < 0:
            return ""
        return (self._lib.llama_vocab_get_text(self._vocab, token_id) or b"").decode(
            "utf-8", "replace"
        )

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``; lone surrogates become ``?``.

        Args:
            text: Any text.
            add_special: Add the tokens the model wants around a text (BOS, ...).
            parse_special: Turn the text of the tokens in ``special_tokens`` into them.

        Raises:
            EngineError: The model is closed.
        """
        tokens = self._encode(text, add_special, parse_special)
        if parse_special or self._markup_ids.isdisjoint(tokens):
            return tokens
        # llama.cpp parsed markup although it should not: cut each after its first character.
        cuts = [match.start() + 1 for match in self._markup.finditer(text)]
        tokens = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            tokens += self._encode(text[start:end], add_special and start == 0, False)
        return tokens

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the output; empty for control tokens."""
        piece = self._pieces[token_id]
        return self._make_piece(token_id) if piece is None else piece

    def close(self) -> None:
        """Let go of the model, after which ``encode`` raises ``EngineError``."""
        with self._calls:
            self._vocab = None
            self._calls.wait_for(lambda: not self._num_calls)

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode("utf-8", "replace")
        room = len(data) + 8  # a token has at least one byte, but for those that are added
        while True:
            tokens = (ctypes.c_int32 * room)()
            with self._open_vocab() as vocab:
                count: int = self._lib.llama_tokenize(
                    vocab, data, len(data), tokens, room, add_special, parse_special
                )
            if count >= 0:
                return tokens[:count]
            if -count <= room or count == _OVERFLOW:
                raise EngineError(f"llama.cpp cannot tokenize a text of {len(data):,} bytes")
            room = -count

    def _make_piece(self, token_id: int) -> bytes:
        size = _PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self._open_vocab() as vocab:
                length = self._lib.llama_token_to_piece(vocab, token_id, buffer, size, 0, False)
            if length >= 0:
                break
            size = -length
        piece = self._pieces[token_id] = buffer.raw[:length]
        return piece

    @contextlib.contextmanager
    def _open_vocab(self) -> Iterator[object]:
        """The vocabulary, which stays until the call that needs it is over."""
        with self._calls:
            vocab = self._vocab
            if vocab is None:
                raise EngineError("the model of this tokenizer is closed")
            self._num_calls += 1
        try:
            yield vocab
        finally:
            with self._calls:
                self._num_calls -= 1
                self._calls.notify_all()
