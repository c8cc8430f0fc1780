"""What a look at an installation found: the lines of ``stoker doctor``."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ["Finding"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One line of ``stoker doctor``.

    Attributes:
        level: ``ok``; ``note``: worth knowing; ``warning``: it works, but slower or less safely than it
            could; ``problem``: what was asked for does not work. Only problems make the command fail.
        topic: What it is about, in a word or two: ``memory``, ``gguf self-test``.
        message: What was found, one sentence.
        cure: What to do about it, if something can be done.
    """

    level: Literal["ok", "note", "warning", "problem"]
    topic: str
    message: str
    cure: str = ""
