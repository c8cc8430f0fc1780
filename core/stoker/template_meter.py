"""How much a template may do: steps, text and time. Whoever wrote a model file wrote its template.

Counting is done where templates can make much of little; see ``template_sandbox``.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

__all__ = ["FULL", "METER", "QUICK", "Allowance", "Meter", "TemplateLimitError"]

_CONTAINERS = (list, tuple, dict, set, frozenset)
_VIEWS: tuple[Any, ...] = (type({}.keys()), type({}.values()), type({}.items()))


class TemplateLimitError(Exception):
    """A template does more than it may."""


class Allowance(NamedTuple):
    """What one rendering may do.

    Attributes:
        steps: Iterations, calls and filters.
        chars: Characters of text, and items of lists, that it may make.
        seconds: How long it may take.
        per_char: How many more steps and characters for each character of what it renders.
    """

    steps: int
    chars: int
    seconds: float
    per_char: int


QUICK = Allowance(20_000, 1_000_000, 0.05, 2)
"""For a rendering on the event loop's thread."""
FULL = Allowance(3_000_000, 20_000_000, 5.0, 50)
"""For a rendering on a thread of its own."""


class Meter:
    """What one rendering may still do.

    Args:
        allowance: What it may do at all.
        given: What it renders.

    Raises:
        TemplateLimitError: That is too much already.
    """

    def __init__(self, allowance: Allowance, given: Any = ()) -> None:
        # Of containers that hold others several times, or would look so when written; kept alive, since
        # an id is only good for as long as its object lives.
        self._weights: dict[int, tuple[int, Any]] = {}
        self._most = allowance.chars
        size = self.weight(given) if given else 0
        more = size * allowance.per_char
        self._steps = allowance.steps + more
        self._chars = self._most = allowance.chars + more
        self._deadline_s = time.monotonic() + allowance.seconds

    def step(self, number: int = 1) -> None:
        """Count steps.

        Raises:
            TemplateLimitError: There are too many.
        """
        self._steps -= number
        if self._steps < 0 or time.monotonic() > self._deadline_s:
            raise TemplateLimitError("it takes too many steps, or too long")

    def make(self, size: int) -> None:
        """Count characters or items that are made, or are about to be.

        Raises:
            TemplateLimitError: There are too many.
        """
        self._chars -= size
        if self._chars < 0:
            raise TemplateLimitError("it makes too much text")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each a step."""
        for item in items:
            self.step()
            yield item

    def weight(self, value: Any) -> int:
        """About how many characters a value has when it is written out.

        A list that holds another one twice has its weight twice, however few objects they are: lists of
        lists of lists are tiny in memory and endless as text.

        Raises:
            TemplateLimitError: It has more than may be made.
        """
        if isinstance(value, str | bytes):
            return len(value) + 2
        if not isinstance(value, _CONTAINERS + _VIEWS):
            return 8
        waiting: list[Any] = [value]
        while waiting:
            current = waiting[-1]
            if id(current) in self._weights:
                waiting.pop()
                continue
            children = [c for c in _children(current) if isinstance(c, _CONTAINERS + _VIEWS)]
            missing = [child for child in children if id(child) not in self._weights]
            if missing:
                if len(waiting) > 100_000:
                    raise TemplateLimitError("its lists are nested too deeply")
                waiting += missing
                continue
            self._weights[id(current)] = (2 + sum(map(self._flat, _children(current))), current)
            if self._weights[id(current)][0] > self._most:
                raise TemplateLimitError("its lists are too large")
            waiting.pop()
        return self._weights[id(value)][0]

    def _flat(self, value: Any) -> int:
        if isinstance(value, str | bytes):
            return len(value) + 4
        found = self._weights.get(id(value))
        return 8 if found is None else found[0] + 2


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, _VIEWS[2]):
        return [part for item in value for part in item]
    return list(value)


METER: ContextVar[Meter] = ContextVar("stoker_template_meter")
"""Of the rendering that runs."""
