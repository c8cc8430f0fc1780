"""A chat request and its model: the prompt, what the output must look like, and how it is read.

What the API hands over names tools and a choice; the model has a template, a form in which it writes calls,
and perhaps marks around its reasoning. Here they meet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import msgspec

from stoker.calls import Call, RoutedModel, check_generates, encode_prompt
from stoker.errors import InvalidRequestError
from stoker.grammar import Grammar, GrammarSpec
from stoker.interfaces import Tool
from stoker.pieces import OutputParser
from stoker.reasoning import ReasoningMarks, ReasoningParser, is_open
from stoker.structured import GrammarService
from stoker.template_meter import FULL, QUICK, Allowance, TemplateLimitError
from stoker.thoughts import AfterReasoning, ThoughtTokens
from stoker.tool_grammars import looser_grammars, strict_schemas, tool_grammar

__all__ = ["Conversation", "read_conversation", "render_conversation"]

_T = TypeVar("_T")

_OFF_THREAD_CHARS = 20_000  # what is longer is rendered and tokenized off the event loop
_LOOSE = "tools: parts of their schemas cannot be enforced; check the arguments of their calls"


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a call becomes for its model.

    Attributes:
        token_ids: The prompt.
        grammar: What the output must look like; ``None`` if it is free.
        looser: Makes what is taken instead if that does not compile, the first that does.
        new_parser: Makes what reads one output; ``None`` if it is all text.
        shown_tokens: Control tokens that are part of the output's text, with their text.
        thoughts: What of the vocabulary matters to reasoning that may come before what ``grammar``
            describes; ``None`` if nothing may.
        is_thinking: Whether the output begins within the reasoning.
        strict: Makes the schemas that have to be enforced, each by itself: to see which one cannot.
        warnings: What was asked for and has no effect, in words.
    """

    token_ids: list[int]
    grammar: GrammarSpec | None = None
    looser: Callable[[], Sequence[GrammarSpec]] = tuple
    new_parser: Callable[[], OutputParser] | None = None
    shown_tokens: Mapping[int, str] = field(default_factory=dict)
    thoughts: ThoughtTokens | None = None
    is_thinking: bool = False
    strict: Callable[[], Sequence[GrammarSpec]] = tuple
    warnings: Sequence[str] = ()

    async def compile(self, service: GrammarService) -> tuple[Grammar | None, list[str]]:
        """What the output must look like, and what has no effect or cannot be enforced, in words.

        Args:
            service: Compiles for the model.

        Raises:
            InvalidRequestError: It cannot be compiled; names the field at fault.
        """
        if self.grammar is None:
            return None, list(self.warnings)
        grammar, is_loose = await self._first_that_compiles(self.grammar, service)
        warnings = [*self.warnings, *([_LOOSE] if is_loose else ()), *grammar.warnings]
        if self.thoughts is None:
            return grammar, warnings
        await asyncio.to_thread(self.thoughts.prepare)
        return AfterReasoning(grammar, self.thoughts, is_thinking=self.is_thinking), warnings

    async def _first_that_compiles(
        self, spec: GrammarSpec, service: GrammarService
    ) -> tuple[Grammar, bool]:
        try:
            return await service.get(spec), False
        except InvalidRequestError as error:
            refused = error
        for spec in self.looser():
            with contextlib.suppress(InvalidRequestError):
                return await service.get(spec), True
        for spec in self.strict():
            await service.get(spec)  # raises for the one at fault
        raise refused


async def read_conversation(routed: RoutedModel, call: Call) -> Conversation:
    """What a call becomes for its model.

    Args:
        routed: The model.
        call: The call; one with a ``prompt`` is all text.

    Raises:
        InvalidRequestError: The model, or its template, cannot do what is asked for.
    """
    check_generates(routed)
    if call.messages is None:
        return Conversation(await encode_prompt(routed, call), call.grammar)
    return await _in_time(partial(_read, routed, call), _size(call))


async def render_conversation(routed: RoutedModel, call: Call) -> str:
    """The text of the prompt that a call with messages becomes, for people.

    Raises:
        InvalidRequestError: The model, or its template, cannot do what is asked for.
    """
    check_generates(routed)
    return await _in_time(partial(_render, routed, call), _size(call))


async def _in_time(work: Callable[[Allowance], _T], size: int) -> _T:
    """What is quick at once, the rest without holding up the event loop."""
    if size < _OFF_THREAD_CHARS:
        with contextlib.suppress(TemplateLimitError):
            return work(QUICK)
    return await asyncio.to_thread(work, FULL)


def _size(call: Call) -> int:
    """About how many characters have to be rendered; no more are counted than it takes to be many."""
    size, waiting = 0, [call.messages, call.template_options]
    waiting += [tool.parameters for tool in call.tools]
    size = sum(len(tool.description) for tool in call.tools)
    while waiting and size < _OFF_THREAD_CHARS:
        value: Any = waiting.pop()
        size += len(value) if isinstance(value, str) else 10
        if isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return size


def _read(routed: RoutedModel, call: Call, allowance: Allowance) -> Conversation:
    tools = _told_tools(call)
    try:
        return _read_with(routed, call, tools, allowance)
    except RecursionError:
        raise _too_deep(tools) from None


def _render(routed: RoutedModel, call: Call, allowance: Allowance) -> str:
    tools = _told_tools(call)
    try:
        messages, shown_tools = _for_template(routed, call, tools)
        return routed.template.render(messages, **_settings(call, shown_tools), allowance=allowance)
    except RecursionError:
        raise _too_deep(tools) from None


def _told_tools(call: Call) -> Sequence[Tool]:
    # With ``none`` the model is not told of the tools at all: what it does not know it does not call.
    return () if call.tool_choice.mode == "none" else tuple(call.tools)


def _too_deep(tools: Sequence[Tool]) -> InvalidRequestError:
    return InvalidRequestError(
        "the messages or tools are nested too deeply", param="tools" if tools else "messages"
    )


def _settings(call: Call, shown_tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """What the template is told beside the messages."""
    return {
        "tools": shown_tools,
        "options": call.template_options,
        "add_generation_prompt": call.add_generation_prompt,
        "continue_final_message": call.continue_final_message,
    }


def _read_with(
    routed: RoutedModel, call: Call, tools: Sequence[Tool], allowance: Allowance
) -> Conversation:
    form, marks, special = routed.tool_format, routed.reasoning, _special_tokens(routed)
    messages, shown_tools = _for_template(routed, call, tools)
    settings = _settings(call, shown_tools)
    prompt = routed.template.prompt(messages, **settings, allowance=allowance)
    continued = ""
    if call.continue_final_message and call.messages:
        continued = str(call.messages[-1].get("content") or "")
    is_thinking = marks is not None and is_open(marks, prompt.tail, continued)
    grammar, looser = call.grammar, _no_grammars
    read_calls: Callable[[], OutputParser] | None = None
    if tools and form is not None:
        grammar = tool_grammar(form, tools, call, special, constrains=routed.constrains)
        if grammar is not None:
            looser = partial(looser_grammars, form, tools, call, special)
        read_calls = partial(form.parser, tools, call.tool_choice, constrained=grammar is not None)
    new_parser = read_calls
    if marks is not None:
        new_parser = partial(_reasoning_parser, marks, is_thinking, read_calls)
    visible = [*(form.markers if tools and form is not None else ()), *(marks or ())]
    return Conversation(
        prompt.token_ids,
        grammar,
        looser,
        new_parser,
        {special[text]: text for text in visible if text in special},
        routed.thoughts,
        is_thinking,
        partial(strict_schemas, tools),
        routed.template.unheard(call.template_options),
    )


def _no_grammars() -> Sequence[GrammarSpec]:
    return ()


def _special_tokens(routed: RoutedModel) -> Mapping[str, int]:
    return routed.client.tokenizer.special_tokens


def _reasoning_parser(
    marks: ReasoningMarks, is_thinking: bool, read_calls: Callable[[], OutputParser] | None
) -> OutputParser:
    inner = None if read_calls is None else read_calls()
    return ReasoningParser(marks, is_open=is_thinking, inner=inner)


# --------------------------------------------------------------------------- for the template


def _for_template(
    routed: RoutedModel, call: Call, tools: Sequence[Tool]
) -> tuple[Sequence[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools as the model's template wants them."""
    messages: Sequence[Mapping[str, Any]] = call.messages or ()
    form = routed.tool_format
    if form is None and tools:
        raise InvalidRequestError(
            "tools are switched off for this model (tool_format = none); send the request without them",
            param="tools",
        )
    if form is None or not (tools or any(map(_is_about_tools, messages))):
        return messages, None
    named = _with_names(messages)
    if routed.template.knows_tools:
        return form.adapt(named), [_described(tool) for tool in tools] or None
    prepared = form.prepare(named, tools, call.tool_choice)
    return _without_new_system(routed, messages, prepared), None


def _is_about_tools(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls")) or message.get("role") == "tool"


def _with_names(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have objects for arguments, and whose results have the tool's name."""
    names: dict[str, str] = {}
    result: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        changed = dict(message)
        if message.get("tool_calls"):
            changed["tool_calls"] = [
                _with_arguments(call, f"messages.{i}.tool_calls.{j}")
                for j, call in enumerate(message["tool_calls"])
            ]
            for call in changed["tool_calls"]:
                names[call.get("id") or ""] = call["function"]["name"]
        elif message.get("role") == "tool" and "name" not in message:
            name = names.get(message.get("tool_call_id") or "")
            changed |= {} if name is None else {"name": name}
        result.append(changed)
    return result


def _with_arguments(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments")
    if not isinstance(arguments, Mapping):
        try:
            arguments = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except msgspec.DecodeError as error:
            param = f"{where}.function.arguments"
            raise InvalidRequestError(
                f"{param!r} is not the text of a JSON object: {error}", param=param
            ) from None
    return {**call, "function": {**function, "arguments": arguments}}


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as templates want it, in OpenAI's shape."""
    parameters = tool.parameters or {"type": "object", "properties": {}}
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _without_new_system(
    routed: RoutedModel, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """What the format says in a system message of its own goes to the user, where there can be none."""
    had_one = bool(before) and before[0].get("role") == "system"
    has_one = bool(after) and after[0].get("role") == "system"
    if had_one or not has_one or routed.template.takes_system:
        return after
    text, rest = after[0]["content"], list(after[1:])
    if rest and rest[0].get("role") == "user":
        return [{**rest[0], "content": f"{text}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": text}, *rest]
