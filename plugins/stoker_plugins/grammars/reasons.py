"""llguidance's reasons in the words of somebody who has sent a schema, and what can be done."""

from __future__ import annotations

import re

__all__ = ["in_words"]

_MAX_REASON = 600  # characters of what is passed on
_NOT_FOR_USERS = re.compile(r"\n<(?:state|non-verbose/?)>")
_KNOWN_FORMATS = "date-time, time, date, duration, email, hostname, ipv4, ipv6, uuid and uri"
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), words)
    for pattern, words in (
        (r"NoExtension(Bias)?", "there is no text that it allows"),
        (r"ParserTooComplex", "it is too ambiguous: too much could come next at once"),
        (r"LexerTooComplex", "its expressions are too complex"),
        (
            r"Unimplemented keys: \[(?P<keys>.*)\]",
            "it uses {keys}, which cannot be enforced; leave it out, or send the schema without strict",
        ),
        (
            r"Unknown format: (?P<format>.*)",
            f"the format {{format!r}} is not known; known are {_KNOWN_FORMATS}; leave it out or use pattern",
        ),
        (
            r"oneOf constraints are not supported.*",
            (
                "oneOf cannot be enforced where more than one of its schemas could hold; use anyOf, or tell "
                "them apart by a constant"
            ),
        ),
        (
            r"Resource '(?P<address>[^']*)' is not present.*",
            "$ref to {address!r} leads out of the schema, which is not followed; put what it means in $defs",
        ),
        (r"Pointer '(?P<pointer>[^']*)' does not exist", "$ref to {pointer!r} leads nowhere"),
        (
            r"Unsatisfiable schema: (?P<reason>.*)",
            "nothing can satisfy it: {reason}",
        ),
        (
            r"(parser error: |Parser Error: )?(Current row has|Too many items|too many items).*",
            (
                "it is too ambiguous: too much could come next at once; use fewer optional properties or "
                "alternatives"
            ),
        ),
        (
            r"(lexer error: )?(too many expressions constructed|too many states|fuel exhausted).*",
            "its expressions are too complex; use smaller repetitions and lengths",
        ),
    )
)


def in_words(error: str) -> str:
    """What is wrong, without llguidance's own state."""
    error = _NOT_FOR_USERS.split(error)[0].strip()
    for pattern, words in _REASONS:
        found = pattern.fullmatch(error)
        if found is not None:
            return words.format(**found.groupdict())[:_MAX_REASON]
    return error[:_MAX_REASON]
