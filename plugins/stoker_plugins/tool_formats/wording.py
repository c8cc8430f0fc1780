"""Tools, calls and results as text, for models whose own template knows none of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from stoker import Tool, ToolChoice, ToolFormat
from stoker_plugins.tool_formats.reading import dumps

__all__ = ["WordedFormat"]


class WordedFormat(ToolFormat):
    """A format that can be explained to a model in words."""

    @abstractmethod
    def form(self) -> str:
        """What a call looks like, for the model."""

    @abstractmethod
    def write_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls (names and arguments) as the model would have written them."""

    def write_result(self, name: str, content: str) -> str:
        """What a tool returned, as the model gets it to read."""
        return f"<tool_response>\n{content}\n</tool_response>"

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], choice: ToolChoice
    ) -> Sequence[Mapping[str, Any]]:
        """The tools in the system message, calls in the assistant's, results in the user's.

        Every template knows these three roles. Results stand in one message, with what the user says
        next, since many templates insist on turns.
        """
        prepared: list[dict[str, Any]] = []
        after_result = False
        for message in messages:
            role, content = message.get("role"), str(message.get("content") or "")
            if role == "tool":
                content = self.write_result(str(message.get("name") or ""), content)
            if after_result and role in {"tool", "user"}:
                prepared[-1]["content"] += f"\n{content}"
                after_result = role == "tool"
                continue
            after_result = role == "tool"
            if role == "tool":
                prepared.append({"role": "user", "content": content})
            elif message.get("tool_calls"):
                prepared.append({"role": role, "content": self._said(content, message)})
            else:
                prepared.append(dict(message))
        return self._explained(prepared, tools, choice) if tools else prepared

    def _said(self, content: str, message: Mapping[str, Any]) -> str:
        calls = [call["function"] for call in message["tool_calls"]]
        written = self.write_calls([(call["name"], call["arguments"]) for call in calls])
        return f"{content}\n{written}" if content else written

    def _explained(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool], choice: ToolChoice
    ) -> list[dict[str, Any]]:
        text = self._explanation(tools, choice)
        if messages and messages[0].get("role") == "system":
            first = {**messages[0], "content": f"{messages[0].get('content') or ''}\n\n{text}"}
            return [first, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]

    def _explanation(self, tools: Sequence[Tool], choice: ToolChoice) -> str:
        described = "\n".join(
            dumps(
                {
                    "name": tool.name,
                    **({"description": tool.description} if tool.description else {}),
                    "parameters": tool.parameters or {"type": "object", "properties": {}},
                }
            )
            for tool in tools
        )
        return (
            "You can call functions. These are their names, what they do, and the JSON schemas of their "
            f"arguments:\n{described}\n\n{self.form()}\n{_rules(choice)}"
        )


def _rules(choice: ToolChoice) -> str:
    """What was asked of the model, last: what stands before is the same for every request."""
    number = "one or more functions" if choice.parallel else "exactly one function"
    some = f" of these: {', '.join(choice.names)}" if choice.names else ""
    if choice.mode == "required":
        if len(choice.names) == 1:
            return f"Answer by calling the function {choice.names[0]}."
        return f"Answer by calling {number}{some}."
    return (
        f"Call {number}{some} only if that helps to answer; otherwise answer in words. When you are given "
        "the results of your calls, use them to answer."
    )
