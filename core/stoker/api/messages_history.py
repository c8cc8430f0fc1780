"""A conversation in Anthropic's blocks into the messages that chat completions have, checked on the way.

What is wrong is named as the client wrote it (``messages.1.content.0.text``), so nothing of it may be left to
be found in the translation, where messages have other places.
"""

from collections.abc import Sequence

import msgspec

from stoker.api.conversation import check_text
from stoker.api.messages_schemas import InputBlock, InputMessage, MessagesPrompt, ResultBlock
from stoker.api.request_schemas import CalledFunction, ChatMessage, ToolCallParam
from stoker.errors import InvalidRequestError

__all__ = ["read_history"]

_ROLES = ("user", "assistant", "system")
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
    "system": ("text",),
}


def read_history(body: MessagesPrompt) -> list[ChatMessage]:
    """The conversation; an assistant's message at its end is to be continued.

    Consecutive messages of one role become one. A tool's result becomes a message of its own. An empty
    message of an assistant at the end is left out: there is nothing to continue.

    Raises:
        InvalidRequestError: Something is wrong with a message.
    """
    history = _History()
    if body.system is not None:
        system = _text(body.system, "system")
        if system:
            history.append(ChatMessage(role="system", content=system))
    for i, message in enumerate(body.messages):
        history.add(message, f"messages.{i}")
    return history.finish(f"messages.{len(body.messages) - 1}")


class _History:
    """The messages so far."""

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._called: set[str] = set()

    def add(self, message: InputMessage, where: str) -> None:
        """Add what a message says."""
        if message.role not in _ROLES:
            raise _invalid(
                f"unknown role {message.role[:50]!r}; use one of {', '.join(_ROLES)}",
                f"{where}.role",
            )
        at = f"{where}.content"
        if isinstance(message.content, str):
            self.append(ChatMessage(role=message.role, content=check_text(message.content, at)))
            return
        for i, block in enumerate(message.content):
            _check_kind(message.role, block, f"{at}.{i}")
        if message.role == "assistant":
            self._add_assistant(message.content, at)
        else:
            self._add_blocks(message.role, message.content, at)

    def append(self, message: ChatMessage) -> None:
        """Add a message, or make it part of the one before it."""
        last = self._messages[-1] if self._messages else None
        if last is None or last.role != message.role or message.role not in {"user", "assistant"}:
            self._messages.append(message)
            return
        last.content = _joined(str(last.content or ""), str(message.content or ""))
        if message.tool_calls:
            last.tool_calls = [*(last.tool_calls or ()), *message.tool_calls]
        if message.reasoning_content:
            last.reasoning_content = _joined(
                last.reasoning_content or "", message.reasoning_content
            )

    def finish(self, where: str) -> list[ChatMessage]:
        """All messages.

        Args:
            where: The field of the last message that was added.
        """
        last = self._messages[-1] if self._messages else None
        if last is not None and last.role == "assistant":
            if last.tool_calls:
                raise _invalid(
                    f"{where!r} ends with the use of a tool; its 'tool_result' has to follow, in a message "
                    "of the role 'user'",
                    where,
                )
            if not last.content:
                self._messages.pop()
        if not any(message.role != "system" for message in self._messages):
            raise _invalid("'messages' says nothing; send a message of the role 'user'", "messages")
        return self._messages

    def _add_blocks(self, role: str, blocks: Sequence[InputBlock], where: str) -> None:
        texts: list[str] = []
        for i, block in enumerate(blocks):
            at = f"{where}.{i}"
            if block.type == "text":
                texts.append(_block_text(block.text, f"{at}.text"))
                continue
            if texts:
                self.append(ChatMessage(role=role, content=_joined(*texts)))
                texts = []
            self._messages.append(self._result(block, at))
        if texts or not blocks:
            self.append(ChatMessage(role=role, content=_joined(*texts)))

    def _result(self, block: InputBlock, where: str) -> ChatMessage:
        at = f"{where}.tool_use_id"
        if block.tool_use_id is None:
            raise _missing(at, "; say which 'tool_use' this is the result of")
        if block.tool_use_id not in self._called:
            raise _invalid(
                f"{at!r} is {block.tool_use_id[:64]!r}, but no assistant message before it has a 'tool_use' "
                "of that id",
                at,
            )
        text = "" if block.content is None else _text(block.content, f"{where}.content")
        if block.is_error:
            text = f"Error: {text}"
        return ChatMessage(role="tool", content=text, tool_call_id=block.tool_use_id)

    def _add_assistant(self, blocks: Sequence[InputBlock], where: str) -> None:
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCallParam] = []
        for i, block in enumerate(blocks):
            at = f"{where}.{i}"
            if block.type == "text":
                texts.append(_block_text(block.text, f"{at}.text"))
            elif block.type == "thinking":
                thoughts.append(_block_text(block.thinking, f"{at}.thinking"))
            elif block.type == "tool_use":
                calls.append(self._call(block, at))
        self.append(
            ChatMessage(
                role="assistant",
                content=_joined(*texts),
                tool_calls=calls or None,
                reasoning_content=_joined(*thoughts) or None,
            )
        )

    def _call(self, block: InputBlock, where: str) -> ToolCallParam:
        if block.id is None:
            raise _missing(f"{where}.id")
        if block.name is None:
            raise _missing(f"{where}.name")
        if block.input is None:
            raise _missing(f"{where}.input", "; send {} for a call without arguments")
        if block.id in self._called:
            raise _invalid(
                f"'{where}.id' is {block.id[:64]!r}, which an earlier 'tool_use' has; give each its own",
                f"{where}.id",
            )
        self._called.add(check_text(block.id, f"{where}.id"))
        arguments = msgspec.json.encode(block.input).decode()
        try:
            msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError) as error:  # such as a number beyond all bounds
            raise _invalid(
                f"'{where}.input' cannot be read: {str(error)[:200]}", f"{where}.input"
            ) from None
        return ToolCallParam(
            id=block.id,
            function=CalledFunction(
                name=check_text(block.name, f"{where}.name"),
                arguments=check_text(arguments, f"{where}.input"),
            ),
        )


def _check_kind(role: str, block: InputBlock, where: str) -> None:
    if block.type not in _BLOCKS[role]:
        raise _invalid(
            f"content blocks of type {block.type[:50]!r} are not supported in a message of the role "
            f"{role!r}; use {', '.join(_BLOCKS[role])}",
            f"{where}.type",
        )


def _text(content: str | Sequence[ResultBlock], where: str) -> str:
    """The text of a text, or of blocks that have to be texts."""
    if isinstance(content, str):
        return check_text(content, where)
    texts = []
    for i, block in enumerate(content):
        if block.type != "text":
            raise _invalid(
                f"content blocks of type {block.type[:50]!r} are not supported here; only 'text' is",
                f"{where}.{i}.type",
            )
        texts.append(_block_text(block.text, f"{where}.{i}.text"))
    return _joined(*texts)


def _block_text(text: str | None, where: str) -> str:
    if text is None:
        raise _missing(where)
    return check_text(text, where)


def _joined(*texts: str) -> str:
    return "\n".join(text for text in texts if text)


def _invalid(message: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code="invalid_value")


def _missing(param: str, why: str = "") -> InvalidRequestError:
    return InvalidRequestError(
        f"{param!r} is missing{why}", param=param, code="missing_required_parameter"
    )
