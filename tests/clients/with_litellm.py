"""``litellm``: ``python tests/clients/with_litellm.py``, with a server on port 8000."""

import json
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would look for prices on the internet

import litellm
from pydantic import BaseModel, Field
from show import BASE_URL, MODEL, show

AT = {"model": "openai/" + MODEL, "api_base": f"{BASE_URL}/v1", "api_key": "none"}


def plain() -> str:
    answer = litellm.completion(
        **AT,
        messages=[{"role": "user", "content": "Name three colors."}],
        temperature=0,
        max_tokens=30,
    )
    return answer.choices[0].message.content


def streamed() -> list[str]:
    stream = litellm.completion(
        **AT,
        messages=[{"role": "user", "content": "Name three colors."}],
        temperature=0,
        max_tokens=30,
        stream=True,
    )
    return [chunk.choices[0].delta.content or "" for chunk in stream]


def tool_call() -> dict[str, Any]:
    answer = litellm.completion(
        **AT,
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
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        temperature=0,
    )
    (call,) = answer.choices[0].message.tool_calls
    return {"name": call.function.name, "arguments": json.loads(call.function.arguments)}


class City(BaseModel):
    name: str = Field(max_length=20)
    large: bool


def structured() -> dict[str, Any]:
    answer = litellm.completion(
        **AT,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_format=City,
        temperature=0,
    )
    return City.model_validate_json(answer.choices[0].message.content).model_dump()


def embedded() -> list[list[float]]:
    answer = litellm.embedding(**AT, input=["red", "blue"])
    return [item["embedding"] for item in answer.data]


if __name__ == "__main__":
    show(plain, streamed, tool_call, structured, embedded)
