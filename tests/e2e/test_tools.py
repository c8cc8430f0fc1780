"""Tools with the default model, whose own template knows none, with the official client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

MODEL = "SmolLM2-135M-Instruct"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city",
            "parameters": WEATHER,
        },
    },
    {"type": "function", "function": {"name": "add", "parameters": ADD, "strict": True}},
]
PARIS: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.fixture
def client(real_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    settings = {"model": MODEL, "messages": PARIS, "tools": TOOLS, "temperature": 0}
    return client.chat.completions.create(**(settings | {"max_tokens": 150} | fields)).choices[0]


def check(calls: Any) -> list[str]:
    """The names of calls, whose arguments are valid."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    return [call.function.name for call in calls]


def test_a_required_call_is_valid_and_about_the_question(client: openai.OpenAI) -> None:
    choice = ask(client, tool_choice="required", parallel_tool_calls=False)
    assert choice.finish_reason == "tool_calls"
    assert check(choice.message.tool_calls) == ["get_weather"]
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] == "Paris"
    assert choice.message.content is None


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_valid_however_the_model_rambles(
    client: openai.OpenAI, seed: int
) -> None:
    choice = ask(client, tool_choice="required", temperature=1.8, seed=seed, max_tokens=120)
    calls = choice.message.tool_calls
    check(calls if choice.finish_reason == "tool_calls" else calls[:-1])
    assert not choice.message.content


def test_a_named_function_is_the_one(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "add"}}
    choice = ask(client, tool_choice=named)
    assert check(choice.message.tool_calls) == ["add"]


def test_free_text_stays_free(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": 'Repeat after me: {"name": "Ada", "parameters": {}}'}]
    choice = ask(client, messages=messages, max_tokens=30)
    assert choice.message.content
    assert not choice.message.tool_calls
    plain = ask(client, tools=openai.omit, max_tokens=30, messages=messages)
    hidden = ask(client, tool_choice="none", max_tokens=30, messages=messages)
    assert hidden.message.content == plain.message.content


def test_streamed_calls_are_the_same_and_come_token_by_token(client: openai.OpenAI) -> None:
    # One call: how many a small model makes may hang on a tie, which drafts may decide.
    plain = ask(client, tool_choice="required", parallel_tool_calls=False)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=PARIS,
        tools=TOOLS,
        temperature=0,
        max_tokens=150,
        tool_choice="required",
        parallel_tool_calls=False,
        stream=True,
    )
    found: dict[int, list[str]] = {}
    num_deltas = 0
    for chunk in stream:
        for call in (chunk.choices[0].delta.tool_calls if chunk.choices else None) or ():
            num_deltas += 1
            name, arguments = found.get(call.index, ["", ""])
            assert call.function is not None
            found[call.index] = [
                name + (call.function.name or ""),
                arguments + (call.function.arguments or ""),
            ]
    expected = [[c.function.name, c.function.arguments] for c in plain.message.tool_calls]
    assert list(found.values()) == expected
    assert num_deltas > 2 * len(expected)


def test_a_conversation_goes_on_with_results(client: openai.OpenAI) -> None:
    call = ask(client, tool_choice="required", parallel_tool_calls=False).message
    history = [
        *PARIS,
        call.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "sunny, 21 degrees"},
    ]
    choice = ask(client, messages=history, max_tokens=60)
    assert "21 degrees" in (choice.message.content or "")
    # Also where the client sends no tools any more.
    assert ask(client, messages=history, tools=openai.omit, max_tokens=20).message.content


def test_with_a_response_format_the_answer_is_a_call_or_follows_it(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    shape = {
        "type": "json_schema",
        "json_schema": {"name": "mood", "schema": schema, "strict": True},
    }
    choice = ask(client, response_format=shape)
    if choice.message.tool_calls:
        check(choice.message.tool_calls)
    else:
        jsonschema.validate(json.loads(choice.message.content), schema)


def test_a_schema_that_cannot_be_enforced(real_server: Any) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)y"}}}
    function = {"name": "f", "parameters": parameters}
    body = {
        "messages": PARIS,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "max_tokens": 40,
    }
    url = f"{real_server.url}/v1/chat/completions"
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 200
    assert "cannot be enforced" in answer.headers["x-stoker-warning"]
    body["tools"] = [{"type": "function", "function": {**function, "strict": True}}]
    answer = httpx.post(url, json=body, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools.0.function.parameters"
