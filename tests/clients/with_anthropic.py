"""The ``anthropic`` package: ``python tests/clients/with_anthropic.py``, with a server on port 8000."""

import asyncio
from typing import Any

from anthropic import Anthropic, AsyncAnthropic
from pydantic import BaseModel
from show import BASE_URL, MODEL, show

client = Anthropic(base_url=BASE_URL, api_key="none")
greedy = {"temperature": 0}  # version 2.12 has no argument for it


def plain() -> str:
    answer = client.messages.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three colors."}],
        max_tokens=30,
        extra_body=greedy,
    )
    return "".join(block.text for block in answer.content if block.type == "text")


def streamed() -> list[str]:
    with client.messages.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three colors."}],
        max_tokens=30,
        extra_body=greedy,
    ) as stream:
        return list(stream.text_stream)


def asynchronous() -> list[str]:
    async def ask() -> list[str]:
        async with (
            AsyncAnthropic(base_url=BASE_URL, api_key="none") as client,
            client.messages.stream(
                model=MODEL,
                messages=[{"role": "user", "content": "Name three colors."}],
                max_tokens=30,
                extra_body=greedy,
            ) as stream,
        ):
            return [text async for text in stream.text_stream]

    return asyncio.run(ask())


def tool_call() -> dict[str, Any]:
    answer = client.messages.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[
            {
                "name": "get_weather",
                "description": "The weather in a city.",
                "input_schema": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 20}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
            }
        ],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_tokens=100,
        extra_body=greedy,
    )
    (call,) = (block for block in answer.content if block.type == "tool_use")
    return {"name": call.name, "arguments": call.input}


class City(BaseModel):
    name: str
    inhabitants: int


def structured() -> dict[str, Any]:
    answer = client.messages.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        output_format=City,
        max_tokens=200,
        extra_body=greedy,
    )
    city = answer.parsed_output
    return city.model_dump()


def counted() -> int:
    return client.messages.count_tokens(
        model=MODEL, messages=[{"role": "user", "content": "Name three colors."}]
    ).input_tokens


if __name__ == "__main__":
    show(plain, streamed, asynchronous, tool_call, structured, counted)
