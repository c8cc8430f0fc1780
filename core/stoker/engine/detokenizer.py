"""Tokens to text, one token at a time: whole characters only, and never any part of a stop string.

A character's bytes may be spread over several tokens, and so may a stop string. Text that could still turn
out to be the beginning of a stop string is held back until it cannot.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

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

    Attributes:
        stopped: Whether a stop string was found; nothing may be pushed after that.
    """

    __slots__ = ("_decoder", "_held", "_partial", "_stop", "_token_text", "stopped")

    def __init__(self, token_text: TokenText, stop: tuple[str, ...] = ()) -> None:
        self._token_text = token_text
        self._stop = stop
        self._held = ""
        self._partial = False  # whether the decoder holds part of a character
        self._decoder = _new_decoder("replace")
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that is certain now."""
        text = None if self._partial else self._token_text(token)
        if text is None:
            text = self._decoder.decode(self._token_text.token_bytes(token))
            self._partial = bool(self._decoder.getstate()[0])
        if not self._stop:
            return text
        return self._search(self._held + text) if text else ""

    def finish(self) -> str:
        """The text that was still held back when the sequence ended for another reason."""
        if self.stopped:
            return ""
        tail = self._decoder.decode(b"", final=True)
        self._partial = False
        if not self._stop:
            return tail
        text = self._search(self._held + tail)
        text, self._held = text + self._held, ""
        return text

    def _search(self, text: str) -> str:
        """Cut at the first stop string, or hold back what may become one."""
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning, but not the whole, of ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - size :]):
            return size
    return 0
