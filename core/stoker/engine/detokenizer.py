"""Tokens to text, one token at a time: whole characters only, and never any part of a stop string.

A character's bytes may be spread over several tokens, and so may a stop string. Text that could still turn
out to be the beginning of a stop string is held back until it cannot. The stop string that is complete first
ends the output (of several, the longest), so what comes out does not depend on where tokens end.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping

__all__ = ["Detokenizer", "TokenText"]

_new_decoder = codecs.getincrementaldecoder("utf-8")


class TokenText:
    """The text of each token of one model, where it has one by itself; shared by all its sequences.

    Args:
        token_bytes: The tokenizer's ``token_bytes``.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self.token_bytes = token_bytes
        self._texts: dict[int, str | None] = {}
        self._showing: dict[tuple[tuple[int, str], ...], TokenText] = {}

    def showing(self, shown: Mapping[int, str]) -> TokenText:
        """The same, but for control tokens that show as text; kept, since models have few such sets."""
        if not shown:
            return self
        key = tuple(sorted(shown.items()))
        found = self._showing.get(key)
        if found is None:
            data = {token: text.encode() for token, text in shown.items()}
            plain = self.token_bytes

            def token_bytes(token: int) -> bytes:
                return data[token] if token in data else plain(token)

            found = self._showing[key] = TokenText(token_bytes)
        return found

    def __call__(self, token: int) -> str | None:
        """The token's text, or ``None`` if its bytes are only part of some character."""
        try:
            return self._texts[token]
        except KeyError:
            try:
                text: str | None = self.token_bytes(token).decode("utf-8")
            except UnicodeDecodeError:
                text = None
            self._texts[token] = text
            return text


class Detokenizer:
    """The text of one sequence.

    Args:
        token_text: The model's token texts.
        stop: Strings that end the output and are not part of it.
        include_stop: Make them part of it.
        min_tokens: A stop string that is complete with an earlier token than this one is text like any other.

    Attributes:
        stopped: Whether a stop string was found; nothing may be pushed after that.
        stop_string: Which one.
        is_partial: Whether it holds back part of a character.
    """

    __slots__ = (
        "_decoder",
        "_held",
        "_include_stop",
        "_num_deaf",
        "_stop",
        "_token_text",
        "is_partial",
        "stop_string",
        "stopped",
    )

    def __init__(
        self,
        token_text: TokenText,
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._token_text = token_text
        self._stop = stop
        self._include_stop = include_stop
        self._num_deaf = max(0, min_tokens - 1)  # tokens to come that complete no stop string
        self._held = ""
        self._decoder = _new_decoder("replace")
        self.is_partial = False
        self.stopped = False
        self.stop_string: str | None = None

    @property
    def num_held(self) -> int:
        """Characters that are held back because they may be the beginning of a stop string."""
        return len(self._held)

    def continues(self, token: int) -> bool:
        """Whether a token's bytes go on with a character that was begun before, if one was."""
        data = self._token_text.token_bytes(token)
        return not data or 0x80 <= data[0] < 0xC0

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now."""
        text = None if self.is_partial else self._token_text(token)
        if text is None:
            text = self._decoder.decode(self._token_text.token_bytes(token))
            self.is_partial = bool(self._decoder.getstate()[0])
        if not self._stop:
            return text
        if self._num_deaf:
            self._num_deaf -= 1
            return self._hold_back(self._held + text)
        return self._search(text) if text else ""

    def finish(self) -> str:
        """The text that was still held back when the sequence ended for another reason."""
        if self.stopped:
            return ""
        tail = self._decoder.decode(b"", final=True)
        self.is_partial = False
        if not self._stop:
            return tail
        text = self._search(tail)
        text, self._held = text + self._held, ""
        return text

    def _search(self, new: str) -> str:
        """Cut at the first stop string that ends in new text, or hold back what may become one."""
        num_old = len(self._held)
        text = self._held + new
        first: tuple[int, int] | None = None  # its end and its start
        for stop in self._stop:
            at = text.find(stop, max(0, num_old + 1 - len(stop)))
            if at >= 0 and (first is None or (at + len(stop), at) < first):
                first = (at + len(stop), at)
        if first is None:
            return self._hold_back(text)
        end, start = first
        self.stopped = True
        self.stop_string = text[start:end]
        self._held = ""
        return text[: end if self._include_stop else start]

    def _hold_back(self, text: str) -> str:
        """All of the text but the end that may be the beginning of a stop string."""
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning, but not the whole, of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
