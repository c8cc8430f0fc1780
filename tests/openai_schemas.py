"""OpenAI's own schemas, to check answers against: ``check("CreateChatCompletionResponse", body)``.

They are an extract of OpenAI's specification: see ``tests/data/openai``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

_FILE = Path(__file__).with_name("data") / "openai" / "schemas.json"


@functools.cache
def _definitions() -> dict[str, Any]:
    return json.loads(_FILE.read_text())["$defs"]


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """The validator of a schema, by its name in OpenAI's specification."""
    if name not in _definitions():
        raise KeyError(f"{name} is not in {_FILE}: add it to ROOTS in extract.py and run that")
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": _definitions()})


@functools.cache
def properties(name: str) -> frozenset[str]:
    """The names of the properties of a schema, and of those that it is made of."""
    schema = _definitions()[name]
    names = set(schema.get("properties", ()))
    for part in (*schema.get("allOf", ()), *schema.get("anyOf", ())):
        if "$ref" in part:
            names |= properties(part["$ref"].removeprefix("#/$defs/"))
        else:
            names |= part.get("properties", {}).keys()
    return frozenset(names)


@functools.cache
def _members_by_type(name: str) -> dict[str, str]:
    """Of a schema that is one of several: their names by what their ``type`` may be."""
    members: dict[str, str] = {}
    for member in _definitions()[name].get("anyOf", ()):
        reference = member.get("$ref", "").removeprefix("#/$defs/")
        wanted = _definitions().get(reference, {}).get("properties", {}).get("type", {})
        for value in wanted.get("enum", ()):
            members.setdefault(value, reference)
    return members


def check(name: str, value: Any) -> None:
    """Check a value; of a schema that is one of several, the one with the value's ``type`` is taken.

    Raises:
        AssertionError: It does not conform; the message says where and why.
    """
    if isinstance(value, dict) and isinstance(value.get("type"), str):
        name = _members_by_type(name).get(value["type"], name)
    error = best_match(validator(name).iter_errors(value))
    if error is not None:
        raise AssertionError(f"no {name}: {error.json_path}: {error.message[:1000]}")
