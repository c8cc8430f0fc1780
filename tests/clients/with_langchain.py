"""``langchain-openai``: ``python tests/clients/with_langchain.py``, with a server on port 8000."""

from typing import Any

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field
from show import BASE_URL, MODEL, show

model = ChatOpenAI(
    base_url=f"{BASE_URL}/v1", api_key="none", model=MODEL, temperature=0, max_tokens=60
)


def plain() -> str:
    return model.invoke("Name three colors.").text


def streamed() -> list[str]:
    return [chunk.text for chunk in model.stream("Name three colors.")]


@tool
def get_weather(city: str = Field(max_length=20)) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


def tool_call() -> dict[str, Any]:
    with_tools = model.bind_tools([get_weather], tool_choice="required", parallel_tool_calls=False)
    (call,) = with_tools.invoke("What is the weather in Paris?").tool_calls
    return {"name": call["name"], "arguments": call["args"]}


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    large: bool


def structured() -> dict[str, Any]:
    return model.with_structured_output(City).invoke("Tell me about Paris.").model_dump()


def embedded() -> list[list[float]]:
    embeddings = OpenAIEmbeddings(
        base_url=f"{BASE_URL}/v1",
        api_key="none",
        model=MODEL,
        check_embedding_ctx_length=False,  # it would count tokens as OpenAI's models do
    )
    return embeddings.embed_documents(["red", "blue"])


if __name__ == "__main__":
    show(plain, streamed, tool_call, structured, embedded)
