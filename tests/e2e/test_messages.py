"""Anthropic's API on the default model, through the real command, with the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

MODEL = "SmolLM2-135M-Instruct"
COLORS: Any = {
    "model": MODEL,
    "max_tokens": 30,
    "messages": [{"role": "user", "content": "Name three colors."}],
    "extra_body": {"temperature": 0},
}
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class City(pydantic.BaseModel):
    name: str
    is_large: bool


@pytest.fixture
def client(real_server: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=real_server.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_what_chat_completions_answer(client: anthropic.Anthropic, real_server: Any) -> None:
    chat = httpx.post(
        f"{real_server.url}/v1/chat/completions",
        json={"messages": COLORS["messages"], "max_tokens": 30, "temperature": 0},
        timeout=60,
    ).json()
    expected = chat["choices"][0]["message"]["content"]
    message = client.messages.create(**COLORS)
    assert text_of(message) == expected
    assert message.stop_reason == "end_turn"
    usage = message.usage
    total = usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert total == chat["usage"]["prompt_tokens"]
    assert usage.output_tokens == chat["usage"]["completion_tokens"]
    counted = client.messages.count_tokens(model=MODEL, messages=COLORS["messages"])
    assert counted.input_tokens == total
    with client.messages.stream(**COLORS) as stream:
        assert "".join(stream.text_stream) == expected
        assert stream.get_final_message().stop_reason == "end_turn"


def test_prefill(client: anthropic.Anthropic) -> None:
    whole = text_of(client.messages.create(**COLORS))
    begun = whole[: whole.index("\n") + 1] if "\n" in whole else whole[:4]
    messages = [*COLORS["messages"], {"role": "assistant", "content": begun}]
    rest = text_of(client.messages.create(**COLORS | {"messages": messages}))
    assert rest
    assert not rest.startswith(begun)


def test_a_tool_is_called_and_its_result_read(client: anthropic.Anthropic) -> None:
    question = {"role": "user", "content": "What is the weather in Paris?"}
    asked: Any = {"model": MODEL, "max_tokens": 80, "tools": [WEATHER]}
    choice: Any = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(
        **asked, messages=[question], tool_choice=choice, extra_body={"temperature": 0}
    ) as stream:
        message = stream.get_final_message()
    (block,) = message.content
    assert block.type == "tool_use"
    assert block.name == "get_weather"
    assert isinstance(block.input["city"], str)
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny, 20 degrees."}
    history: Any = [question, message.to_param(), {"role": "user", "content": [result]}]
    answer = client.messages.create(**asked, messages=history, tool_choice={"type": "none"})
    assert text_of(answer).strip()


def test_structured_output(client: anthropic.Anthropic) -> None:
    parsed = client.messages.parse(
        model=MODEL,
        max_tokens=200,
        messages=[{"role": "user", "content": "Tell me about Paris as JSON."}],
        output_format=City,
        extra_body={"temperature": 0},
    )
    assert isinstance(parsed.parsed_output, City)
    assert City.model_validate(json.loads(text_of(parsed))) == parsed.parsed_output


async def test_many_at_once(real_server: Any) -> None:
    async with anthropic.AsyncAnthropic(
        base_url=real_server.url, api_key="none", max_retries=0
    ) as client:

        async def ask() -> str:
            async with client.messages.stream(**COLORS) as stream:
                return await stream.get_final_text()

        answers = await asyncio.gather(*(ask() for _ in range(4)))
    assert len(set(answers)) == 1
