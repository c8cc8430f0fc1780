"""Pieces of grammars in llguidance's Lark notation: literals, markers, and calls with their arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stoker import Tool, ToolChoice
from stoker_plugins.tool_formats.schemas import closed

__all__ = [
    "GAP",
    "MORE",
    "allowed",
    "alternatives",
    "arguments",
    "free_text",
    "json_calls",
    "literal",
    "marker",
    "repeated",
]

GAP = r"[ \n]{0,4}"
"""Whitespace between the parts of a call where a model may begin one by itself."""
MORE = "{0,15}"
"""How many more calls an output may make after one: a small model that has to call would never end."""
# Compact JSON, or with one space where people put one: a small model cannot lose itself in whitespace.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def allowed(tools: Sequence[Tool], choice: ToolChoice) -> list[Tool]:
    """The tools that may be called."""
    return [tool for tool in tools if not choice.names or tool.name in choice.names]


def literal(text: str) -> str:
    """A terminal that is this text."""
    return json.dumps(text, ensure_ascii=False)


def marker(text: str, special_tokens: Mapping[str, int]) -> str:
    """What a marker is in a rule: its token where it is a control token, else its text."""
    token = special_tokens.get(text)
    return literal(text) if token is None else f"<[{token}]>"


def alternatives(names: Sequence[str]) -> str:
    """Any one of these rules."""
    return " | ".join(names)


def repeated(item: str, separator: str, choice: ToolChoice) -> str:
    """One item, or several with a separator where several are allowed."""
    return f"{item} ({separator} {item}){MORE}" if choice.parallel else item


def arguments(name: str, schema: Mapping[str, Any], *, is_object: bool = True) -> str:
    """The rule ``name``: JSON that satisfies a tool's parameters.

    The schema is the root of its own grammar, so that ``$ref`` leads to where it should.

    Args:
        name: The rule's name.
        schema: What the JSON has to satisfy.
        is_object: Whether it is a tool's arguments; otherwise it is any value.
    """
    shape: dict[str, Any] = closed(schema, is_object=is_object)
    if is_object and not schema:
        shape = _NO_ARGUMENTS
    shape = {**shape, "x-guidance": {**shape.get("x-guidance", {}), **_LAYOUT}}
    return f"{name}: %json {json.dumps(shape, ensure_ascii=False)}\n"


def json_calls(tools: Sequence[Tool], key: str = "arguments") -> str:
    """The rule ``body``: ``{"name": ..., "arguments": ...}`` of one of the tools."""
    rules = [f"body: {alternatives([f'body_{i}' for i in range(len(tools))])}\n"]
    for i, tool in enumerate(tools):
        head = f'{{"name": "{tool.name}", "{key}": '
        rules.append(f'body_{i}: {literal(head)} arguments_{i} "}}"\n')
        rules.append(arguments(f"arguments_{i}", tool.parameters))
    return "".join(rules)


def free_text(*calls: str) -> str:
    """The terminal ``TEXT``: anything that does not begin with one of these expressions."""
    beginnings = "|".join(calls)
    return f"TEXT: /(.|\\n)*/ & ~/({beginnings})(.|\\n)*/\n"
