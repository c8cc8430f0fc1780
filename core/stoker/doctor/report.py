"""The results of conformance suites as lines for people."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stoker.doctor.conformance import CheckResult

__all__ = ["report_lines"]

_MARKS = {"passed": "ok", "skipped": "skipped", "failed": "FAILED"}
_MOST_NAMES = 7
_INDENT = " " * 11


def report_lines(
    results: Sequence[CheckResult], width: int | None = None, *, tracebacks: bool = False
) -> Iterator[str]:
    """A line for each check, and below it what is wrong and what to do.

    Checks that were skipped, or that failed, for one reason share it.

    Args:
        results: What came of the checks.
        width: Where to break lines; ``None`` breaks none.
        tracebacks: Whether to show where exceptions came from, and what was logged.
    """
    for target in dict.fromkeys(result.target for result in results):
        yield target
        mine = [result for result in results if result.target == target]
        told = set()
        for result in mine:
            if (reason := _reason(result)) not in told:
                told.add(reason)
                alike = [other.check for other in mine if _reason(other) == reason]
                yield from _check(result, alike, width, tracebacks=tracebacks)
        yield ""


def _check(
    result: CheckResult, alike: Sequence[str], width: int | None, *, tracebacks: bool
) -> Iterator[str]:
    names = _names(alike)
    yield from _wrapped(names[0], width, f"  {_MARKS[result.outcome]:<9}")
    for line in result.details():
        yield from _wrapped(line, width)
    if len(names) > _MOST_NAMES:
        yield from _wrapped(f"(and {len(alike) - 1} other checks)", width)
    elif len(names) > 1:
        yield from _wrapped(f"(and so: {'; '.join(names[1:])})", width)
    if tracebacks:
        more = (*result.traceback.splitlines(), *result.log.splitlines())
        yield from (_INDENT + line for line in more)


def _reason(result: CheckResult) -> tuple[str, str]:
    """What checks that are told together have in common; the cases of one if there is nothing to tell."""
    return result.outcome, result.message or _without_case(result.check)


def _without_case(check: str) -> str:
    return check.partition(" [")[0]


def _names(checks: Sequence[str]) -> list[str]:
    """The names of checks; the cases of one are counted."""
    counts = Counter(map(_without_case, checks))
    names = {_without_case(check): check for check in checks}
    return [
        f"{name} ({count} cases)" if count > 1 else names[name] for name, count in counts.items()
    ]


def _wrapped(text: str, width: int | None, start: str = _INDENT) -> list[str]:
    if width is None:
        return [start + text]
    return textwrap.wrap(
        text,
        width,
        initial_indent=start,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
