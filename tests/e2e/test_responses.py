"""Responses as users meet them: with the real model, over restarts, and after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pydantic
import pytest

from openai_schemas import check
from responses_http import PATH, create, stream, text_of

if TYPE_CHECKING:
    from conftest import Serve

MODEL = "SmolLM2-135M-Instruct"
SLOW = """
[[models]]
model = "scripted:slow"
options = { step_s = 0.02 }
"""


class Capital(pydantic.BaseModel):
    """A capital."""

    country: str
    capital: str


@pytest.mark.slow
def test_responses_outlive_the_server_and_a_killed_one_fails_what_ran(serve: Serve) -> None:
    with serve(config=SLOW) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        whole = create(client)
        running = create(client, background=True, max_output_tokens=900)
        served.wait_for(
            lambda: client.get(f"{PATH}/{running['id']}").json()["status"] == "in_progress"
        )
        served.process.kill()
        served.process.wait()
    with serve(config=SLOW) as served, httpx.Client(base_url=served.url, timeout=30) as client:
        assert client.get(f"{PATH}/{whole['id']}").json() == whole
        failed = client.get(f"{PATH}/{running['id']}").json()
        check("Response", failed)
        assert failed["status"] == "failed"
        assert "the server stopped" in failed["error"]["message"]
        create(client, previous_response_id=whole["id"])


@pytest.fixture
def client(real_server: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=real_server.url, timeout=60) as client:
        yield client


@pytest.fixture
def sdk(real_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0)


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_answers_and_is_followed(client: httpx.Client) -> None:
    body = {"input": "Name three colors.", "max_output_tokens": 40}
    response = create(client, **body)
    assert response["status"] == "completed"
    assert "Red" in text_of(response)
    events = stream(client, **body)
    assert events[-1]["type"] == "response.completed"
    assert text_of(events[-1]["response"]) == text_of(response)
    chat = [
        {"role": "user", "content": "Name three colors."},
        {"role": "assistant", "content": text_of(response)},
        {"role": "user", "content": "Name one more."},
    ]
    follow = create(
        client, input="Name one more.", previous_response_id=response["id"], max_output_tokens=12
    )
    same = create(client, input=chat, max_output_tokens=12)
    assert text_of(follow) == text_of(same)
    # What it follows has been computed before.
    assert follow["usage"]["input_tokens_details"]["cached_tokens"] > 0


@pytest.mark.model
@pytest.mark.slow
def test_the_real_model_fills_in_a_format_and_calls(sdk: openai.OpenAI) -> None:
    parsed = sdk.responses.parse(
        model=MODEL,
        input="What is the capital of France?",
        text_format=Capital,
        temperature=0,
        max_output_tokens=100,
    )
    assert isinstance(parsed.output_parsed, Capital)
    called = sdk.responses.create(
        model=MODEL,
        input="What is the weather in Paris?",
        tools=[
            {
                "type": "function",
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "maxLength": 20}},
                    "required": ["city"],
                    "additionalProperties": False,
                },
                "strict": True,
            }
        ],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=100,
    )
    (call,) = called.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"]
