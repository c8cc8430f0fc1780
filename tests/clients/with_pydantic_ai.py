"""``pydantic-ai``: ``python tests/clients/with_pydantic_ai.py``, with a server on port 8000."""

import asyncio
from typing import Any

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from show import BASE_URL, MODEL, show

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=f"{BASE_URL}/v1", api_key="none"))
settings = {"temperature": 0, "max_tokens": 60, "parallel_tool_calls": False}


def plain() -> str:
    return Agent(model, model_settings=settings).run_sync("Name three colors.").output


def streamed() -> list[str]:
    async def ask() -> list[str]:
        agent = Agent(model, model_settings=settings)
        async with agent.run_stream("Name three colors.") as answer:
            return [text async for text in answer.stream_text(delta=True, debounce_by=None)]

    return asyncio.run(ask())


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    large: bool


def structured() -> dict[str, Any]:
    agent = Agent(model, output_type=NativeOutput(City), model_settings=settings)
    return agent.run_sync("Tell me about Paris.").output.model_dump()


def tool_call() -> dict[str, Any]:
    # What an agent's answer must look like is a tool to it, which the model has to call.
    agent = Agent(model, output_type=City, model_settings=settings)
    answer = agent.run_sync("Tell me about Paris.")
    (call,) = answer.all_messages()[1].tool_calls
    return {"name": call.tool_name, "arguments": call.args_as_dict()}


if __name__ == "__main__":
    show(plain, streamed, structured, tool_call)
