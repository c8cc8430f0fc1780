"""The real model under schemas: whatever stops is valid."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jsonschema
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "format": "email", "maxLength": 40},
        "languages": {"type": "array", "items": {"enum": ["de", "en", "日本語"]}, "maxItems": 3},
        "address": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/address"}]},
    },
    "required": ["name", "age", "email", "languages", "address"],
    "additionalProperties": False,
    "$defs": {
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "pattern": "^[A-Z][a-z]{2,12} [0-9]{1,3}$"},
                "zip": {"type": "string", "pattern": r"^\d{5}$"},
            },
            "required": ["street", "zip"],
            "additionalProperties": False,
        }
    },
}
TREE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": -99, "maximum": 99},
        "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    },
    "required": ["value", "children"],
    "additionalProperties": False,
}
EVENT = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "date": {"type": "string", "format": "date"},
        "price": {"type": "number", "minimum": 0, "maximum": 500, "multipleOf": 0.5},
        "tags": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    },
    "required": ["title", "date", "price", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("schema", [PERSON, TREE, EVENT], ids=["person", "tree", "event"])
def test_outputs_of_the_real_model_are_valid(real_server: Any, schema: dict[str, Any]) -> None:
    format_ = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": schema, "strict": True},
    }

    def ask(temperature: float, seed: int) -> list[dict[str, Any]]:
        body = {
            "messages": [{"role": "user", "content": "Answer with a JSON object."}],
            "response_format": format_,
            "temperature": temperature,
            "seed": seed,
            "n": 2 if seed == 1 else 1,
            "max_tokens": 64 if schema is EVENT else 160,
        }
        response = httpx.post(f"{real_server.url}/v1/chat/completions", json=body, timeout=120)
        assert response.status_code == 200, response.text
        choices: list[dict[str, Any]] = response.json()["choices"]
        return choices

    with ThreadPoolExecutor(6) as pool:
        jobs = [
            pool.submit(ask, temperature, seed) for temperature in (0.0, 1.0) for seed in range(3)
        ]
        choices = [choice for job in jobs for choice in job.result()]
    stopped = [choice for choice in choices if choice["finish_reason"] == "stop"]
    assert len(stopped) >= (1 if schema is TREE else len(choices) // 3)  # trees grow and grow
    assert all(choice["finish_reason"] in {"stop", "length"} for choice in choices)
    for choice in stopped:
        jsonschema.validate(
            json.loads(choice["message"]["content"]),
            schema,
            format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
        )
