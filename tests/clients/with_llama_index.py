"""LlamaIndex's ``OpenAILike``: ``python tests/clients/with_llama_index.py``, with a server on port 8000."""

from typing import Any

from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field
from show import BASE_URL, MODEL, show

llm = OpenAILike(
    model=MODEL,
    api_base=f"{BASE_URL}/v1",
    api_key="none",
    is_chat_model=True,
    is_function_calling_model=True,
    should_use_structured_outputs=True,
    context_window=2048,
    temperature=0,
    max_tokens=60,
)


def plain() -> str:
    return llm.complete("Name three colors.").text


def streamed() -> list[str]:
    return [part.delta or "" for part in llm.stream_complete("Name three colors.")]


class Place(BaseModel):
    city: str = Field(max_length=20)


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


def tool_call() -> dict[str, Any]:
    tool = FunctionTool.from_defaults(get_weather, fn_schema=Place)
    answer = llm.chat_with_tools(
        [tool], user_msg="What is the weather in Paris?", tool_required=True
    )
    (call,) = llm.get_tool_calls_from_response(answer)
    return {"name": call.tool_name, "arguments": call.tool_kwargs}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    large: bool


def structured() -> dict[str, Any]:
    return llm.as_structured_llm(City).complete("Tell me about Paris.").raw.model_dump()


def embedded() -> list[list[float]]:
    embeddings = OpenAILikeEmbedding(
        model_name=MODEL, api_base=f"{BASE_URL}/v1", api_key="none", embed_batch_size=10
    )
    return embeddings.get_text_embedding_batch(["red", "blue"])


if __name__ == "__main__":
    show(plain, streamed, tool_call, structured, embedded)
