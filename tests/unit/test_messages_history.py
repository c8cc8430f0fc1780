"""Anthropic's blocks into chat messages."""

from __future__ import annotations

from typing import Any

import msgspec

from stoker.api.messages_history import read_history
from stoker.api.messages_schemas import MessagesPrompt

ASK = {"role": "user", "content": "ask"}


def read(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The chat messages, without what is not set."""
    body = msgspec.convert({"messages": list(messages), **fields}, MessagesPrompt)
    return [
        {k: v for k, v in msgspec.to_builtins(message).items() if v is not None}
        for message in read_history(body)
    ]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def use(call_id: str, **arguments: Any) -> dict[str, Any]:
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in arguments.items()}
    return {"type": "tool_use", "id": call_id, "name": "f", "input": raw}


def result(call_id: str, content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **fields}


def call(call_id: str, arguments: str = "{}") -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def test_messages_of_one_role_are_one() -> None:
    assert read(ASK, {"role": "user", "content": [text("more"), text("")]}) == [
        {"role": "user", "content": "ask\nmore"}
    ]
    answered = read(
        ASK,
        {"role": "assistant", "content": "so"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, text("on")]},
        ASK,
    )
    assert answered[1] == {"role": "assistant", "content": "so\non", "reasoning_content": "hm"}


def test_instructions_stay_where_they_are() -> None:
    messages = read(ASK, {"role": "system", "content": "now"}, ASK, system=[text("a"), text("b")])
    assert [message["content"] for message in messages] == ["a\nb", "ask", "now", "ask"]
    assert [m["role"] for m in messages] == ["system", "user", "system", "user"]
    assert read(ASK, system="") == [ASK]


def test_calls_and_their_results() -> None:
    messages = read(
        ASK,
        {"role": "assistant", "content": [text("let me see"), use("1", x=[1, "ä"]), use("2")]},
        {
            "role": "user",
            "content": [
                result("1", [text("a"), text("b")]),
                result("2", "broke", is_error=True),
                text("and?"),
            ],
        },
        {"role": "user", "content": "well?"},
    )
    assert messages[1:] == [
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [call("1", '{"x":[1,"ä"]}'), call("2")],
        },
        {"role": "tool", "content": "a\nb", "tool_call_id": "1"},
        {"role": "tool", "content": "Error: broke", "tool_call_id": "2"},
        {"role": "user", "content": "and?\nwell?"},
    ]
    alone = read(
        ASK,
        {"role": "assistant", "content": [use("1")]},
        {"role": "user", "content": [result("1")]},
    )
    assert alone[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call("1")]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
    ]


def test_an_open_end() -> None:
    begun = {"role": "assistant", "content": [text("so ")]}
    assert read(ASK, begun)[-1] == {"role": "assistant", "content": "so "}
    for nothing in ("", [], [text("")], [{"type": "redacted_thinking", "data": "x"}]):
        assert read(ASK, {"role": "assistant", "content": nothing}) == [ASK]
