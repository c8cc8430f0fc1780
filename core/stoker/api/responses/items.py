"""Items: read from a request, and turned into the messages of a chat."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from stoker.api.request_schemas import CalledFunction, ChatMessage, ToolCallParam
from stoker.api.responses.answer_schemas import (
    FunctionCallItem,
    FunctionOutputItem,
    Item,
    MessageItem,
    MessagePart,
    ReasoningItem,
    ReasoningText,
    SummaryText,
)
from stoker.api.responses.request_schemas import InputItem, InputPart
from stoker.errors import InvalidRequestError

__all__ = ["Turn", "new_id", "read_input", "to_messages"]

_ROLES = ("user", "assistant", "system", "developer")
_UNSERVED_PARTS = ("input_image", "input_file", "input_audio")
_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def new_id(prefix: str) -> str:
    """An id that nobody guesses: ``resp_...``, ``msg_...``."""
    return f"{prefix}_{secrets.token_hex(24)}"


def read_input(
    given: str | Sequence[InputItem] | None, references: Mapping[str, Item]
) -> list[Item]:
    """The items of a request's input, each with an id.

    Args:
        given: The input.
        references: The items that references among them stand for, by id.

    Raises:
        InvalidRequestError: One of them is malformed; names it by its index.
    """
    if given is None:
        return []
    if isinstance(given, str):
        part = MessagePart(type="input_text", text=given)
        return [MessageItem(id=new_id("msg"), role="user", content=[part])]
    return [_read(item, f"input.{i}", references) for i, item in enumerate(given)]


def _read(item: InputItem, where: str, references: Mapping[str, Item]) -> Item:
    kind = item.type or ("message" if item.role is not None else "item_reference")
    if kind == "item_reference":
        return _referred(item, where, references)
    reader = _READERS.get(kind)
    if reader is None:
        raise _invalid(
            f"items of type {kind[:50]!r} are not supported; use one of {', '.join(_TYPES)}",
            f"{where}.type",
        )
    return reader(item, where)


def _referred(item: InputItem, where: str, references: Mapping[str, Item]) -> Item:
    if item.id is None:
        what = "id" if item.type else "type"
        raise _missing(f"{where}.{what}")
    found = references.get(item.id)
    if found is None:
        raise InvalidRequestError(
            f"'{where}.id': no item {item.id[:64]!r} is stored; send the item itself",
            param=f"{where}.id",
            code="item_not_found",
        )
    return found


def _read_message(item: InputItem, where: str) -> Item:
    role = item.role
    if role is None:
        raise _missing(f"{where}.role")
    if role not in _ROLES:
        raise _invalid(
            f"unknown role {role[:50]!r}; use one of {', '.join(_ROLES)}", f"{where}.role"
        )
    if item.content is None:
        raise _missing(f"{where}.content")
    own: Literal["input_text", "output_text"] = "input_text"
    if role == "assistant":
        own = "output_text"
    return MessageItem(
        id=item.id or new_id("msg"),
        role=cast(Any, role),
        status=_status(item, where),
        content=_read_parts(item.content, f"{where}.content", own),
    )


def _read_parts(
    content: str | Sequence[InputPart], where: str, own: Literal["input_text", "output_text"]
) -> list[MessagePart]:
    """Parts of a message, all of the type that its role has: clients mix them up."""
    if isinstance(content, str):
        return [_part(own, content)]
    parts = []
    for i, part in enumerate(content):
        at = f"{where}.{i}"
        if part.type == "refusal" and own == "output_text":
            if part.refusal is None:
                raise _missing(f"{at}.refusal")
            parts.append(MessagePart(type="refusal", refusal=part.refusal))
        elif part.type in {"input_text", "output_text", "text"}:
            if part.text is None:
                raise _missing(f"{at}.text")
            parts.append(_part(own, part.text))
        elif part.type in _UNSERVED_PARTS:
            raise _invalid(f"{at!r} is {part.type}, which this model cannot take; send text", at)
        else:
            raise _invalid(
                f"parts of type {part.type[:50]!r} are not supported; use {own}", f"{at}.type"
            )
    return parts


def _part(kind: Literal["input_text", "output_text"], text: str) -> MessagePart:
    if kind == "input_text":
        return MessagePart(type=kind, text=text)
    return MessagePart(type=kind, text=text, annotations=[], logprobs=[])


def _read_call(item: InputItem, where: str) -> Item:
    for name in ("call_id", "name", "arguments"):
        if getattr(item, name) is None:
            raise _missing(f"{where}.{name}")
    return FunctionCallItem(
        id=item.id or new_id("fc"),
        call_id=item.call_id or "",
        name=item.name or "",
        arguments=item.arguments or "",
        status=_status(item, where),
    )


def _read_output(item: InputItem, where: str) -> Item:
    if item.call_id is None:
        raise _missing(f"{where}.call_id")
    if item.output is None:
        raise _missing(f"{where}.output")
    output = item.output
    return FunctionOutputItem(
        id=item.id or new_id("fco"),
        call_id=item.call_id,
        output=output
        if isinstance(output, str)
        else _read_parts(output, f"{where}.output", "input_text"),
        status=_status(item, where),
    )


def _read_reasoning(item: InputItem, where: str) -> Item:
    content = item.content if item.content is not None else []
    if isinstance(content, str):
        raise _invalid(f"'{where}.content' of reasoning has to be a list", f"{where}.content")
    return ReasoningItem(
        id=item.id or new_id("rs"),
        summary=[
            SummaryText(text=_text_of(part, "summary_text", f"{where}.summary.{i}"))
            for i, part in enumerate(item.summary or ())
        ],
        content=[
            ReasoningText(text=_text_of(part, "reasoning_text", f"{where}.content.{i}"))
            for i, part in enumerate(content)
        ],
        status=_status(item, where),
    )


def _text_of(part: InputPart, kind: str, where: str) -> str:
    if part.type != kind:
        raise _invalid(f"'{where}.type' is {part.type[:50]!r}; it has to be {kind}", where)
    if part.text is None:
        raise _missing(f"{where}.text")
    return part.text


def _status(item: InputItem, where: str) -> Any:
    if item.status not in {None, "in_progress", "completed", "incomplete"}:
        raise _invalid(
            f"'{where}.status' is {str(item.status)[:50]!r}; use in_progress, completed or incomplete",
            f"{where}.status",
        )
    return item.status or "completed"


_READERS: Mapping[str, Callable[[InputItem, str], Item]] = {
    "message": _read_message,
    "function_call": _read_call,
    "function_call_output": _read_output,
    "reasoning": _read_reasoning,
}


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{param!r} is missing", param=param, code="missing_required_parameter"
    )


# --------------------------------------------------------------------------- messages


@dataclass(slots=True)
class Turn:
    """A message of a chat, and the items that it was made of.

    Attributes:
        message: The message.
        origin: Where the item with its content came from, in the client's words.
        calls: The same for each of its calls.
    """

    message: ChatMessage
    origin: str
    calls: list[str] = field(default_factory=list)


def to_messages(items: Sequence[tuple[str, Item]]) -> list[Turn]:
    """A chat's messages; what an assistant thought, said and called at once is one of them.

    Args:
        items: The items, each with where it came from.
    """
    turns: list[Turn] = []
    open_turn: Turn | None = None  # an assistant's message that may go on
    for origin, item in items:
        if isinstance(item, FunctionOutputItem):
            open_turn = None
            turns.append(Turn(_output_message(item), origin))
            continue
        if isinstance(item, MessageItem) and item.role != "assistant":
            open_turn = None
            message = ChatMessage(role=item.role, content=_joined(item.content))
            turns.append(Turn(message, origin))
            continue
        if open_turn is None or not _goes_on(open_turn.message, item):
            open_turn = Turn(ChatMessage(role="assistant"), origin)
            turns.append(open_turn)
        _add(open_turn, item, origin)
    return turns


def _goes_on(message: ChatMessage, item: Item) -> bool:
    """Whether an item belongs to an assistant's message: it thinks first, then says, then calls."""
    if isinstance(item, FunctionCallItem):
        return True
    if isinstance(item, ReasoningItem):
        return message.content is None and not message.tool_calls
    return message.content is None and not message.tool_calls


def _add(turn: Turn, item: Item, origin: str) -> None:
    message = turn.message
    if isinstance(item, FunctionCallItem):
        function = CalledFunction(name=item.name, arguments=item.arguments)
        message.tool_calls = [
            *(message.tool_calls or ()),
            ToolCallParam(id=item.call_id, function=function),
        ]
        turn.calls.append(origin)
    elif isinstance(item, ReasoningItem):
        thought = item.content or item.summary
        text = "".join(part.text for part in thought)
        message.reasoning_content = (message.reasoning_content or "") + text or None
    elif isinstance(item, MessageItem):
        message.content = _joined(item.content)
        turn.origin = origin


def _output_message(item: FunctionOutputItem) -> ChatMessage:
    output = item.output if isinstance(item.output, str) else _joined(item.output)
    return ChatMessage(role="tool", content=output, tool_call_id=item.call_id)


def _joined(parts: Sequence[MessagePart]) -> str:
    return "\n".join(part.text or part.refusal or "" for part in parts)  # UNSET is false
