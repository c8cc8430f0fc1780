"""Probes of the parameters of tools."""

from __future__ import annotations

from typing import Any

from api.compatibility.cases import works
from api.compatibility.harness import CHAT, MESSAGES, RESPONSES, Ask

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}
NAMES = ("get_weather", "get_time")
QUESTION = "What is the weather in Paris?"


def tools_of(ask: Ask) -> list[dict[str, Any]]:
    """Two tools, as the endpoint writes them."""
    if ask.endpoint is MESSAGES:
        return [{"name": name, "input_schema": SCHEMA} for name in NAMES]
    functions = [{"name": name, "parameters": SCHEMA} for name in NAMES]
    if ask.endpoint is RESPONSES:
        return [{"type": "function", **function} for function in functions]
    return [{"type": "function", "function": function} for function in functions]


def calling(ask: Ask, choice: Any, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
    """The calls of an answer that has to have one at most."""
    if ask.endpoint is MESSAGES:
        choice = {**choice, "disable_parallel_tool_use": True}
    else:
        fields = {"parallel_tool_calls": False, **fields}
    answer = ask(about=QUESTION, tokens=60, tools=tools_of(ask), tool_choice=choice, **fields)
    return answer.calls


@works("tools", CHAT, RESPONSES, MESSAGES)
def tools(ask: Ask) -> None:
    must = {"type": "any"} if ask.endpoint is MESSAGES else "required"
    ((name, arguments),) = calling(ask, must)
    assert name in NAMES
    assert list(arguments) == ["city"]
    assert len(arguments["city"]) <= 12


@works("tool_choice", CHAT, RESPONSES, MESSAGES)
def tool_choice(ask: Ask) -> None:
    for wanted in NAMES:
        named: dict[str, Any] = {"type": "function", "name": wanted}
        if ask.endpoint is CHAT:
            named = {"type": "function", "function": {"name": wanted}}
        elif ask.endpoint is MESSAGES:
            named = {"type": "tool", "name": wanted}
        ((name, _),) = calling(ask, named)
        assert name == wanted
    never = {"type": "none"} if ask.endpoint is MESSAGES else "none"
    assert ask(about=QUESTION, tools=tools_of(ask), tool_choice=never).calls == []


@works("parallel_tool_calls", CHAT, RESPONSES)
def parallel_tool_calls(ask: Ask) -> None:
    question = "What is the weather in Paris, and in Rome?"
    given = {"about": question, "tokens": 100, "tools": tools_of(ask), "tool_choice": "required"}
    assert len(ask(**given, parallel_tool_calls=False).calls) == 1
    assert len(ask(**given, parallel_tool_calls=True).calls) > 1
