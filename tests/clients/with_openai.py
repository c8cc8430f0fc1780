"""The ``openai`` package: ``python tests/clients/with_openai.py``, with a server on port 8000."""

import asyncio
import json
from typing import Any

from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field
from show import BASE_URL, MODEL, show

client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")


def plain() -> str | None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three colors."}],
        temperature=0,
        max_tokens=30,
    )
    return answer.choices[0].message.content


def streamed() -> list[str]:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three colors."}],
        temperature=0,
        max_tokens=30,
        stream=True,
    )
    return [chunk.choices[0].delta.content or "" for chunk in stream]


def stream_helper() -> list[str]:
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "Name three colors."}],
        temperature=0,
        max_tokens=30,
    ) as stream:
        return [event.delta for event in stream if event.type == "content.delta"]


def asynchronous() -> list[str]:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{BASE_URL}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "Name three colors."}],
                temperature=0,
                max_tokens=30,
                stream=True,
            )
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

    return asyncio.run(ask())


def tool_call() -> dict[str, Any]:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is the weather in Paris?"}],
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "description": "The weather in a city.",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string", "maxLength": 20}},
                        "required": ["city"],
                        "additionalProperties": False,
                    },
                },
            }
        ],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
    )
    call = (answer.choices[0].message.tool_calls or [])[0]
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


class City(BaseModel):
    name: str = Field(max_length=20)
    large: bool


def structured() -> dict[str, Any]:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_format=City,
        temperature=0,
    )
    city = answer.choices[0].message.parsed
    return city.model_dump()


def by_responses() -> str:
    answer = client.responses.create(
        model=MODEL, input="Name three colors.", temperature=0, max_output_tokens=30
    )
    return answer.output_text


def responses_streamed() -> list[str]:
    with client.responses.stream(
        model=MODEL, input="Name three colors.", temperature=0, max_output_tokens=30
    ) as stream:
        return [event.delta for event in stream if event.type == "response.output_text.delta"]


def embedded() -> list[list[float]]:
    answer = client.embeddings.create(model=MODEL, input=["red", "blue"])
    return [item.embedding for item in answer.data]


if __name__ == "__main__":
    show(
        *(plain, streamed, stream_helper, asynchronous, tool_call, structured),
        *(by_responses, responses_streamed, embedded),
    )
