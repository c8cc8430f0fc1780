"""``instructor``: ``python tests/clients/with_instructor.py``, with a server on port 8000."""

from typing import Any

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field
from show import BASE_URL, MODEL, show

openai_client = OpenAI(base_url=f"{BASE_URL}/v1", api_key="none")


class City(BaseModel):
    """A city; ``forbid`` keeps a small model from adding fields of its own."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    large: bool


def structured() -> dict[str, Any]:
    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
    city = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_model=City,
        temperature=0,
    )
    return city.model_dump()


def structured_by_tools() -> dict[str, Any]:
    client = instructor.from_openai(openai_client, mode=instructor.Mode.TOOLS)
    city = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_model=City,
        temperature=0,
    )
    return city.model_dump()


def structured_and_streamed() -> list[dict[str, Any]]:
    client = instructor.from_openai(openai_client, mode=instructor.Mode.JSON_SCHEMA)
    cities = client.chat.completions.create_partial(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me about Paris."}],
        response_model=City,
        temperature=0,
    )
    return [city.model_dump() for city in cities]


if __name__ == "__main__":
    show(structured, structured_by_tools, structured_and_streamed)
