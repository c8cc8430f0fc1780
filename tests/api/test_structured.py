"""Structured outputs over HTTP: every way to ask for a shape, bad shapes, hostile ones."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import pytest

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog"]},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 20}, "maxItems": 2},
    },
    "required": ["name", "kind", "ages"],
    "additionalProperties": False,
}
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 200, "temperature": 1.0}


def ask(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json={**CHAT, **body})


def answer(client: httpx.Client, **body: Any) -> str:
    response = ask(client, **body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "stop"
    content: str = choice["message"]["content"]
    return content


def schema_format(schema: Any, *, strict: bool = True) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": strict},
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": schema_format(SCHEMA)},
        {"response_format": schema_format(SCHEMA, strict=False)},
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
        {"json_schema": SCHEMA},
    ],
)
def test_a_schema_by_any_name(client: httpx.Client, fields: dict[str, Any]) -> None:
    jsonschema.validate(json.loads(answer(client, seed=1, **fields)), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "expression"),
    [
        ({"guided_regex": r"\d{4}-\d{2}"}, "[0-9]{4}-[0-9]{2}"),
        ({"guided_choice": ["rot", "grün"]}, "rot|grün"),
        ({"grammar": 'root ::= "a" [0-9]{2} "z"'}, "a[0-9]{2}z"),
        ({"guided_grammar": 'start: "x" /[a-c]{3}/'}, "x[a-c]{3}"),
        ({"structured_outputs": {"regex": "(ab){2}"}}, "abab"),
    ],
)
def test_other_shapes(client: httpx.Client, fields: dict[str, Any], expression: str) -> None:
    assert re.fullmatch(expression, answer(client, seed=2, **fields))


def test_any_object(client: httpx.Client) -> None:
    bias = {str(ord("}")): 9}  # or noise would go on for ever
    text = answer(client, response_format={"type": "json_object"}, logit_bias=bias, seed=4)
    assert isinstance(json.loads(text), dict)


def test_streamed_and_several(client: httpx.Client) -> None:
    body = {**CHAT, "response_format": schema_format(SCHEMA), "n": 3, "seed": 5, "stream": True}
    texts = ["", "", ""]
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] += choice["delta"].get("content") or ""
    plain = ask(client, **{**body, "stream": False}).json()["choices"]
    assert [choice["message"]["content"] for choice in plain] == texts
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_cut_off_by_max_tokens(client: httpx.Client) -> None:
    response = ask(client, response_format=schema_format(SCHEMA), max_tokens=5)
    (choice,) = response.json()["choices"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"response_format": schema_format({"not": {}})},
            "response_format.json_schema.schema",
            '"not"',
        ),
        ({"guided_json": {"type": "nonsense"}}, "guided_json", "nonsense"),
        ({"guided_regex": "(?=a)"}, "guided_regex", "look-around"),
        ({"guided_regex": "(a{1000}){1000}"}, "guided_regex", "1,000,000 elements"),
        ({"grammar": "root ::= nowhere"}, "grammar", "nowhere"),
        ({"guided_grammar": "start: <|nobody|>"}, "guided_grammar", "nobody"),
        ({"guided_choice": ["x" * 5000]}, "guided_choice", "5,000 characters"),
        (
            {"guided_json": {"type": "string", "enum": ["x" * 300_000]}},
            "guided_json",
            "bytes long",
        ),
    ],
)
def test_a_bad_shape_is_400_and_names_its_field(
    client: httpx.Client, fields: dict[str, Any], param: str, reason: str
) -> None:
    response = ask(client, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert reason in error["message"]


def test_what_is_not_enforced_is_told(client: httpx.Client) -> None:
    loose = {**SCHEMA, "not": {"const": 1}}
    response = ask(client, response_format=schema_format(loose, strict=False), seed=1)
    assert response.status_code == 200
    assert '"not"' in response.headers["x-stoker-warning"]


def test_switched_off(start_server: Callable[..., Any]) -> None:
    server = start_server(server={"grammar": "none"})
    with httpx.Client(base_url=server.url) as client:
        response = ask(client, guided_regex="a")
        assert response.status_code == 400
        assert "switched off" in response.json()["error"]["message"]
        assert ask(client).status_code == 200


HOSTILE: list[dict[str, Any]] = [
    {"guided_regex": "(" * 60 + "a" + "{9})" * 60},
    {"guided_regex": "(x+x+)+y"},
    {"guided_regex": "(.*a){30}b"},
    {"guided_regex": "[ab]*a[ab]{500}c"},
    {"guided_json": {"type": "string", "minLength": 10**9}},
    {"guided_json": {"type": "array", "minItems": 10**9}},
    {"guided_json": {"enum": [f"value {i}" for i in range(10_000)]}},
    {"guided_json": {"multipleOf": 999_983, "type": "integer"}},
    {"guided_json": {"patternProperties": {f"^a{i}_.*x.*$": {} for i in range(2000)}}},
    {
        "guided_json": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        }
    },
    {"guided_json": {"$ref": "http://127.0.0.1:1/schema"}},
    {"guided_json": {"$ref": "file:///etc/passwd"}},
    {
        "guided_json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(8)]} for i in range(8)
            ]
        }
    },
    {"guided_grammar": 'start: a\na: a a a | "x" | ""'},
    {
        "guided_grammar": "start: r0\n"
        + "\n".join(f'r{i}: r{i + 1} r{i + 1} | ""' for i in range(30))
        + '\nr30: "a" | ""'
    },
    {"grammar": "root ::= " + "[a-z]?" * 3000},
    {"grammar": "root ::= " + "(" * 5000},
    {"grammar": "root ::= root root | root"},
    {"guided_choice": [f"{i} of very many" for i in range(10_000)]},
]


@pytest.mark.slow
async def test_hostile_shapes_are_their_own_trouble(server: Any) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

        async def send(fields: dict[str, Any]) -> httpx.Response:
            body = {**CHAT, "max_tokens": 40, "seed": 1, **fields}
            return await client.post("/v1/chat/completions", json=body)

        sent = [asyncio.create_task(send(fields)) for fields in HOSTILE]
        good = await asyncio.gather(*(send({"guided_regex": "[a-c]{5}"}) for _ in range(10)))
        for response in good:
            assert re.fullmatch("[a-c]{5}", response.json()["choices"][0]["message"]["content"])
        for fields, response in zip(HOSTILE, await asyncio.gather(*sent), strict=True):
            assert response.status_code in {200, 400}, (str(fields)[:80], response.text)
    server.check_still_serves()
