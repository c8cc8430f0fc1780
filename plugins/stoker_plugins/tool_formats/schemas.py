"""Tools' parameter schemas, made fit to generate from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["closed"]

# Where a schema holds others: under each name, in a list, or by itself.
_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = (
    "items",
    "additionalProperties",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
)
# Beside these an object's properties are not all that it may have.
_COMBINING = ("allOf", "not", "if", "dependentSchemas", "unevaluatedProperties")
_BESIDE_PROPERTIES = ("$ref", "$dynamicRef", "anyOf", "oneOf", "patternProperties")


def closed(schema: Mapping[str, Any], *, is_object: bool = True) -> dict[str, Any]:
    """A schema of objects that have no other properties than the ones it names.

    JSON Schema lets an object have any further properties unless it says otherwise. Nobody who describes a
    function's arguments means that, and a model that may invent some does. What satisfies the result
    satisfies the original; a schema that combines others in ways that might contradict stays as it is.

    Args:
        schema: The schema of a tool's arguments.
        is_object: Whether it describes an object even where it does not say so.
    """
    root = {"type": "object", **schema} if is_object else dict(schema)
    return _close(root) if all(map(_is_plain, _schemas(root))) else root


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas inside it."""
    waiting = [schema]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, Mapping):
            continue
        yield current
        waiting += [current[key] for key in _SINGLE if key in current]
        for key in _LISTS:
            waiting += current[key] if isinstance(current.get(key), list) else []
        for key in _BY_NAME:
            waiting += current[key].values() if isinstance(current.get(key), Mapping) else []


def _is_plain(schema: Mapping[str, Any]) -> bool:
    if any(key in schema for key in _COMBINING):
        return False
    return "properties" not in schema or not any(key in schema for key in _BESIDE_PROPERTIES)


def _close(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    result = dict(schema)
    for key in _SINGLE:
        if key in result:
            result[key] = _close(result[key])
    for key in _LISTS:
        if isinstance(result.get(key), list):
            result[key] = [_close(item) for item in result[key]]
    for key in _BY_NAME:
        if isinstance(result.get(key), Mapping):
            result[key] = {name: _close(item) for name, item in result[key].items()}
    if "properties" in result:
        result.setdefault("additionalProperties", False)
    return result
