"""``/v1/responses`` through OpenAI's own client, sync and async."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

import openai
import pydantic
import pytest

if TYPE_CHECKING:
    from conftest import Running

MODEL = "org/scripted"


class Pick(pydantic.BaseModel):
    """A pick."""

    colour: Literal["red", "green", "blue"]


@pytest.fixture
def sdk(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.slow
def test_create_retrieve_follow_delete(sdk: openai.OpenAI) -> None:
    first = sdk.responses.create(
        model=MODEL,
        instructions="be brief",
        input=[{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        max_output_tokens=16,
        temperature=0,
        metadata={"who": "me"},
    )
    assert first.status == "incomplete"
    assert first.incomplete_details is not None
    assert first.incomplete_details.reason == "max_output_tokens"
    assert first.usage is not None
    assert first.usage.output_tokens == 16
    assert first.output_text
    assert sdk.responses.retrieve(first.id).output_text == first.output_text
    second = sdk.responses.create(
        model=MODEL, input="more", previous_response_id=first.id, max_output_tokens=16
    )
    items = list(sdk.responses.input_items.list(second.id, limit=1, order="asc"))
    assert [getattr(item, "role", None) for item in items] == ["user", "assistant", "user"]
    # A client that keeps the conversation itself sends back what it got.
    sdk.responses.create(
        model=MODEL,
        store=False,
        input=[*first.output, {"role": "user", "content": "more"}],  # type: ignore[list-item]
        max_output_tokens=16,
    )
    sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.responses.create(model=MODEL, input="more", previous_response_id=first.id)
    assert caught.value.code == "previous_response_not_found"
    assert sdk.responses.input_tokens.count(model=MODEL, input="hi").input_tokens == 6


@pytest.mark.slow
def test_stream_helper(sdk: openai.OpenAI) -> None:
    whole = sdk.responses.create(
        model=MODEL, input="hi", max_output_tokens=200, temperature=0, extra_body={"stop": " "}
    )
    assert whole.status == "completed"
    with sdk.responses.stream(
        model=MODEL, input="hi", max_output_tokens=200, temperature=0, extra_body={"stop": " "}
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert final.output_text == whole.output_text
    cut = sdk.responses.create(model=MODEL, input="hi", max_output_tokens=16, stream=True)
    events = list(cut)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.incomplete"


@pytest.mark.slow
def test_parse_gives_the_object(sdk: openai.OpenAI) -> None:
    response = sdk.responses.parse(
        model=MODEL, input="hi", text_format=Pick, max_output_tokens=200, temperature=0
    )
    assert response.status == "completed"
    assert isinstance(response.output_parsed, Pick)
    with sdk.responses.stream(
        model=MODEL, input="hi", text_format=Pick, max_output_tokens=200, temperature=0
    ) as stream:
        final = stream.get_final_response()
    assert final.output_parsed == response.output_parsed


def test_tools_are_called_and_parsed(sdk: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Pick)["function"]
    tools = [{"type": "function", **tool}]
    asked = [{"role": "user", "content": "hi"}]
    with sdk.responses.stream(
        model=MODEL,
        input=asked,  # type: ignore[arg-type]
        tools=tools,  # type: ignore[arg-type]
        tool_choice="required",
        parallel_tool_calls=False,
        max_output_tokens=300,
        temperature=0,
    ) as stream:
        final = stream.get_final_response()
    call = final.output[0]
    assert call.type == "function_call"
    assert json.loads(call.arguments)["colour"] in {"red", "green", "blue"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "yes"}
    answer = sdk.responses.create(
        model=MODEL,
        input=[*asked, call, result],  # type: ignore[list-item]
        tools=tools,  # type: ignore[arg-type]
        max_output_tokens=16,
    )
    assert answer.output


def test_background(sdk: openai.OpenAI) -> None:
    response = sdk.responses.create(
        model=MODEL, input="hi", background=True, stream=True, max_output_tokens=30
    )
    seen = 0
    response_id = ""
    for event in response:
        seen = event.sequence_number
        if event.type == "response.created":
            response_id = event.response.id
        if seen == 5:
            break
    response.close()
    rest = list(sdk.responses.retrieve(response_id, stream=True, starting_after=seen))
    assert rest[0].sequence_number == seen + 1
    assert rest[-1].type == "response.incomplete"
    with sdk.responses.stream(response_id=response_id, starting_after=seen) as stream:
        assert [event.sequence_number for event in stream]
    assert sdk.responses.cancel(response_id).status == "incomplete"


@pytest.mark.slow
async def test_async(start_server: Callable[..., Running]) -> None:
    server = start_server({"step_s": 0.004})
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as sdk:
        responses = await asyncio.gather(
            *(
                sdk.responses.create(model=MODEL, input=f"{number}", max_output_tokens=16)
                for number in range(12)
            )
        )
        assert len({response.id for response in responses}) == 12
        async with sdk.responses.stream(
            model=MODEL, input="hi", text_format=Pick, max_output_tokens=200, temperature=0
        ) as stream:
            async for event in stream:
                assert event.type
            assert isinstance((await stream.get_final_response()).output_parsed, Pick)
        running = await sdk.responses.create(
            model=MODEL, input="hi", background=True, max_output_tokens=900
        )
        assert running.status == "queued"
        assert (await sdk.responses.cancel(running.id)).status == "cancelled"
        listed = [item async for item in sdk.responses.input_items.list(running.id)]
        assert len(listed) == 1
        await sdk.responses.delete(running.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(running.id)
    server.wait_until_idle()
