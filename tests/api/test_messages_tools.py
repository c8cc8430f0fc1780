"""``/v1/messages`` with tools: calls, their results, and what may be chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import anthropic
import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Running

MODEL = "org/scripted"
HI: list[Any] = [{"role": "user", "content": "what is the weather?"}]
TOOLS: list[Any] = [
    {
        "name": name,
        "description": f"The {name}.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
    for name in ("weather", "time")
]
ONCE = {"disable_parallel_tool_use": True}


@pytest.fixture
def official(server: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as official:
        yield official


def ask(official: anthropic.Anthropic, choice: Any, messages: Any = HI) -> Any:
    """The message, which comes plain and streamed; checks that they are the same but for ids."""
    fields: Any = {"model": MODEL, "max_tokens": 200, "messages": messages, "tools": TOOLS}
    fields |= {"tool_choice": choice, "extra_body": {"temperature": 0}}
    plain = official.messages.create(**fields)
    with official.messages.stream(**fields) as stream:
        parts: list[Any] = [event for event in stream if event.type == "input_json"]
        streamed = stream.get_final_message()
    assert without_ids(plain) == without_ids(streamed)
    assert plain.stop_reason == streamed.stop_reason
    if any(block.type == "tool_use" for block in plain.content):
        assert len(parts) > 3  # they come as they are generated
    return plain


def without_ids(message: Any) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in block.to_dict().items() if k not in {"id", "parsed_output"}}
        for block in message.content
    ]


@pytest.mark.parametrize("name", ["weather", "time"])
def test_a_named_tool(official: anthropic.Anthropic, name: str) -> None:
    message = ask(official, {"type": "tool", "name": name, **ONCE})
    (block,) = message.content
    assert (block.type, block.name) == ("tool_use", name)
    assert set(block.input) == {"city"}
    assert message.stop_reason == "tool_use"


def test_any_tool(official: anthropic.Anthropic) -> None:
    message = ask(official, {"type": "any", **ONCE})
    (block,) = message.content
    assert block.name in {"weather", "time"}
    assert message.stop_reason == "tool_use"


@pytest.mark.parametrize("kind", ["auto", "none"])
def test_a_model_that_calls_nothing(official: anthropic.Anthropic, kind: str) -> None:
    message = ask(official, {"type": kind})
    assert [block.type for block in message.content] == ["text"]
    assert message.stop_reason == "max_tokens"


def test_a_result_is_answered(official: anthropic.Anthropic, client: httpx.Client) -> None:
    called = ask(official, {"type": "any", **ONCE})
    result = {
        "type": "tool_result",
        "tool_use_id": called.content[0].id,
        "content": [{"type": "text", "text": "rain"}],
    }
    history = [*HI, called.to_param(), {"role": "user", "content": [result]}]
    answer = ask(official, {"type": "auto"}, history)
    (call,) = called.content
    function = {"name": call.name, "arguments": json.dumps(call.input)}
    chat = client.post(
        "/v1/chat/completions",
        json={
            "max_tokens": 50,
            "temperature": 0,
            "messages": [
                *HI,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"id": call.id, "type": "function", "function": function}],
                },
                {"role": "tool", "tool_call_id": call.id, "content": "rain"},
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": tool["name"],
                        "description": tool["description"],
                        "parameters": tool["input_schema"],
                    },
                }
                for tool in TOOLS
            ],
        },
    )
    assert chat.status_code == 200, chat.text
    assert answer.content[0].text.startswith(chat.json()["choices"][0]["message"]["content"])


def test_tools_are_counted(official: anthropic.Anthropic) -> None:
    counted = official.messages.count_tokens(model=MODEL, messages=HI, tools=TOOLS)
    usage = ask(official, {"type": "auto"}).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    none = official.messages.count_tokens(
        model=MODEL, messages=HI, tools=TOOLS, tool_choice={"type": "none"}
    )
    assert none.input_tokens < counted.input_tokens
