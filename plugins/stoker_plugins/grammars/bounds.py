"""What llguidance would work on for seconds, found before it does: its own limits do not see everything.

Measured with llguidance 1.9 over a vocabulary of 49,152 tokens: an expression of 10,000 elements once its
counted repetitions are written out takes up to 0.02 s a token, one of 100,000 up to 0.13 s and one of a
million 0.7 s and 170 MB; ``multipleOf`` 9,999 compiles in 0.1 s, 99,999 in 3 s, 999,983 in 19 s and a hundred
different ones about 9,000 in minutes; 60, 300 and 2,000 ``patternProperties`` in 0.03 s, 2.3 s and minutes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

__all__ = [
    "MAX_EXPRESSION",
    "MAX_STRING",
    "check_expression",
    "check_lark",
    "check_schema",
    "expanded_size",
]

MAX_EXPRESSION = 10_000
"""Most elements of an expression with its counted repetitions written out."""

MAX_STRING = 4_000
"""Most characters of a constant string."""

_MAX_MULTIPLES = 10_000  # of all ``multipleOf`` in sum
_MAX_MULTIPLE = 10**6
_MAX_PATTERN_PROPERTIES = 64
_MAX_PROPERTIES = 1_000
_ENOUGH = 10**9
_NO_SCHEMAS = frozenset({"const", "enum", "default", "examples"})
_COUNT = re.compile(r"\{(\d{1,9})(?:(,)(\d{0,9}))?\}")
_LARK_EXPRESSION = re.compile(r"/((?:\\.|[^/\\\n])+)/")
_decoder = json.JSONDecoder()


def expanded_size(expression: str) -> int:
    """About how many elements an expression has once its counted repetitions are written out."""
    totals, last, at = [0], 0, 0
    while at < len(expression):
        count = _COUNT.match(expression, at)
        if count is not None:
            times = max(int(count[1]), int(count[3] or 0), 1)
            totals[-1] += last * (times - 1)
            last = min(last * times, _ENOUGH)
            at = count.end()
            continue
        character = expression[at]
        if character == "(":
            totals.append(0)
        elif character == ")" and len(totals) > 1:
            last = min(totals.pop() or 1, _ENOUGH)
            totals[-1] += last
        elif character not in "*+?|)":
            at = _end_of_element(expression, at)
            last = 1
            totals[-1] += 1
            continue
        at += 1
    return min(sum(totals), _ENOUGH)


def _end_of_element(expression: str, at: int) -> int:
    """Where the character, escape or class that begins at ``at`` ends."""
    if expression[at] == "\\":
        return at + 2
    if expression[at] != "[":
        return at + 1
    end = at + 1
    while end < len(expression) and expression[end] != "]":
        end += 2 if expression[end] == "\\" else 1
    return end + 1


def check_expression(expression: str) -> str | None:
    """What makes an expression too large; ``None`` if nothing does."""
    size = expanded_size(expression)
    if size <= MAX_EXPRESSION:
        return None
    return (
        f"the expression {_short(expression)} has about {size:,} elements with its repetitions written out; "
        f"at most {MAX_EXPRESSION:,} are accepted here"
    )


def check_schema(schema: Any) -> str | None:
    """What makes a JSON schema too large; ``None`` if nothing does."""
    total = multiples = 0
    for part in _objects(schema):
        patterns = part.get("patternProperties")
        expressions = list(patterns) if isinstance(patterns, Mapping) else []
        if len(expressions) > _MAX_PATTERN_PROPERTIES:
            return (
                f"patternProperties holds {len(expressions):,} patterns; "
                f"at most {_MAX_PATTERN_PROPERTIES} are accepted here"
            )
        properties = part.get("properties")
        if isinstance(properties, Mapping) and len(properties) > _MAX_PROPERTIES:
            return (
                f"an object has {len(properties):,} properties; "
                f"at most {_MAX_PROPERTIES:,} are accepted here"
            )
        if isinstance(part.get("pattern"), str):
            expressions.append(part["pattern"])
        for expression in expressions:
            if (reason := check_expression(expression)) is not None:
                return reason
            total += expanded_size(expression)
        multiples += _weight(part.get("multipleOf"))
        if multiples > _MAX_MULTIPLES:
            return (
                f"multipleOf is {part['multipleOf']}; at most {_MAX_MULTIPLES:,} in sum are accepted here "
                f"(leaving out zeros at the end and the point), and none above {_MAX_MULTIPLE:,}"
            )
        if any(len(text) > MAX_STRING for text in _constants(part)):
            return f"a constant string is longer than {MAX_STRING:,} characters"
    if total > 10 * MAX_EXPRESSION:
        most = 10 * MAX_EXPRESSION
        return f"its patterns have about {total:,} elements; at most {most:,} are accepted here"
    return None


def check_lark(text: str) -> str | None:
    """What makes a grammar in llguidance's notation too large; ``None`` if nothing does."""
    for expression in _LARK_EXPRESSION.finditer(text):
        if (reason := check_expression(expression[1])) is not None:
            return reason
    at = text.find("%json")
    while at >= 0:
        begin = text.find("{", at)
        at = text.find("%json", at + 5)
        if begin < 0:
            return None
        try:
            schema, _ = _decoder.raw_decode(text, begin)
        except ValueError:
            continue  # comments are allowed there, or it is a mistake that the compiler tells better
        if (reason := check_schema(schema)) is not None:
            return reason
    return None


def _weight(multiple: Any) -> int:
    """How much work a ``multipleOf`` is: the number of remainders to tell apart."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float) or not multiple:
        return 0
    number = Decimal(str(multiple)).normalize()
    if not number.is_finite() or abs(number) > _MAX_MULTIPLE:
        return _ENOUGH
    return int("".join(map(str, number.as_tuple().digits)))


def _constants(part: Mapping[str, Any]) -> Iterator[str]:
    waiting = [part.get("const"), part.get("enum")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, Mapping):
            waiting += value.values()


def _objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    """All objects of a schema that may be schemas themselves."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield part
            waiting += [value for key, value in part.items() if key not in _NO_SCHEMAS]
        elif isinstance(part, list):
            waiting += part


def _short(expression: str) -> str:
    return repr(expression if len(expression) <= 60 else expression[:57] + "...")
