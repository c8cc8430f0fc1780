"""Builds a response piece by piece, and the events that tell of it: both are the same whoever reads them."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from stoker.api.answer_schemas import ChatTokenLogprob, UsageBody
from stoker.api.choices import new_call_id
from stoker.api.logprobs import chat_logprobs
from stoker.api.responses.answer_schemas import (
    FailureDetails,
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    ItemStatus,
    MessageItem,
    MessagePart,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningText,
    ResponseObject,
    ResponseUsage,
)
from stoker.api.responses.items import new_id
from stoker.errors import RequestCancelledError, RequestError, StokerError
from stoker.interfaces import CallPiece, Piece, ReasoningPiece
from stoker.types import TokenLogprob

__all__ = ["ResponseBuilder", "now"]

_encode = msgspec.json.Encoder().encode


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())  # noqa: TID251 - a timestamp in a body


class ResponseBuilder:
    """Takes pieces in and gives out events, as the bytes of server-sent events.

    Args:
        response: The response as it begins; changed as it goes on.
        with_logprobs: Whether texts have log-probabilities.

    Attributes:
        response: The response so far.
    """

    def __init__(self, response: ResponseObject, *, with_logprobs: bool = False) -> None:
        self.response = response
        self._with_logprobs = with_logprobs
        self._num_events = 0
        self._open: _OpenItem | None = None
        self._open_call = -1
        self._held = ""  # white space that nothing has followed yet
        self._logprobs: list[ChatTokenLogprob] = []

    def create(self) -> list[bytes]:
        """The first events: it exists, and runs or waits."""
        kind = "queued" if self.response.status == "queued" else "in_progress"
        return [self._told("response.created"), self._told(f"response.{kind}")]

    def begin(self) -> list[bytes]:
        """It waits no longer."""
        if self.response.status != "queued":
            return []
        self.response.status = "in_progress"
        return [self._told("response.in_progress")]

    def add(self, pieces: Iterable[Piece], logprobs: Sequence[TokenLogprob] = ()) -> list[bytes]:
        """The events of some more output.

        Args:
            pieces: The output.
            logprobs: The log-probabilities of its tokens.
        """
        if self._with_logprobs and logprobs:
            self._logprobs += chat_logprobs(logprobs).content or ()
        events: list[bytes] = []
        for piece in pieces:
            if isinstance(piece, CallPiece):
                events += self._add_call(piece)
            elif isinstance(piece, ReasoningPiece):
                events += self._add_reasoning(piece.text)
            else:
                events += self._add_text(piece.text)
        return events

    def close(self, reason: str) -> list[bytes]:
        """The output is over: the last item's last events.

        Args:
            reason: ``stop`` or ``length``.
        """
        is_whole = reason != "length"
        events: list[bytes] = []
        if not self.response.output:
            events += self._write(self._held)
        events += self._close_item("completed" if is_whole else "incomplete")
        response = self.response
        response.status = "completed" if is_whole else "incomplete"
        if is_whole:
            response.completed_at = now()
        else:
            response.incomplete_details = IncompleteDetails()
        return events

    def end(self, usage: UsageBody) -> bytes:
        """The last event of all, once the tokens are counted."""
        self.response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=usage.prompt_tokens_details.cached_tokens
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                reasoning_tokens=usage.completion_tokens_details.reasoning_tokens
            ),
            total_tokens=usage.total_tokens,
        )
        return self._told(f"response.{self.response.status}")

    def fail(self, error: BaseException) -> bytes:
        """The last event of a response that failed or was cancelled; items stay as they were."""
        response = self.response
        item = self.settle()
        if item is not None:
            item.status = "incomplete"
            self._open = None
        if isinstance(error, RequestCancelledError) and response.background:
            response.status = "cancelled"
        else:
            response.status = "failed"
            response.error = failure(error)
        return self._told("response.failed")

    def settle(self) -> Item | None:
        """Put what has come of the open item into it, so that the response shows it; returns that item."""
        if self._open is None:
            return None
        item, text = self._open.item, "".join(self._open.texts)
        if isinstance(item, MessageItem):
            item.content[0].text, item.content[0].logprobs = text, self._open.logprobs
        elif isinstance(item, ReasoningItem):
            item.content[0].text = text
        elif isinstance(item, FunctionCallItem):
            item.arguments = text
        return item

    # ------------------------------------------------------------------ items

    def _open_message(self) -> "_OpenItem | None":
        return self._open if self._open and isinstance(self._open.item, MessageItem) else None

    def _add_text(self, text: str) -> list[bytes]:
        """Text; white space alone opens no message, for models put it between calls."""
        if self._open_message() is None and not text.strip():
            self._held += text
            return []
        text, self._held = self._held + text, ""
        return self._write(text)

    def _write(self, text: str) -> list[bytes]:
        events: list[bytes] = []
        if self._open_message() is None:
            part = MessagePart(type="output_text", text="", annotations=[], logprobs=[])
            item = MessageItem(id=new_id("msg"), role="assistant", status="in_progress", content=[])
            events += self._open_item(item)
            events.append(self._content("response.content_part.added", part=part))
            item.content.append(part)
        if not text:
            return events
        open_item = self._open_message()
        if open_item is not None:
            logprobs, self._logprobs = self._logprobs, []
            open_item.texts.append(text)
            open_item.logprobs += logprobs
            events.append(
                self._content("response.output_text.delta", delta=text, logprobs=logprobs)
            )
        return events

    def _add_reasoning(self, text: str) -> list[bytes]:
        self._held, self._logprobs = "", []
        events: list[bytes] = []
        if self._open is None or not isinstance(self._open.item, ReasoningItem):
            item = ReasoningItem(id=new_id("rs"), status="in_progress")
            events += self._open_item(item)
            part = ReasoningText(text="")
            events.append(self._content("response.content_part.added", part=part))
            item.content.append(part)
        if self._open is not None:
            self._open.texts.append(text)
        events.append(self._content("response.reasoning_text.delta", delta=text))
        return events

    def _add_call(self, piece: CallPiece) -> list[bytes]:
        self._held, self._logprobs = "", []
        events: list[bytes] = []
        if piece.index != self._open_call:
            item = FunctionCallItem(
                id=new_id("fc"),
                call_id=new_call_id(),
                name=piece.name,
                arguments="",
                status="in_progress",
            )
            events += self._open_item(item)
            self._open_call = piece.index
        if self._open is not None and piece.arguments:
            self._open.texts.append(piece.arguments)
            events.append(
                self._item("response.function_call_arguments.delta", delta=piece.arguments)
            )
        return events

    def _open_item(self, item: Item) -> list[bytes]:
        events = self._close_item("completed")
        self._open = _OpenItem(item)
        self.response.output.append(item)
        events.append(self._tell("response.output_item.added", **self._at(), item=item))
        return events

    def _close_item(self, status: ItemStatus) -> list[bytes]:
        """What is to be told of the open item now that no more comes."""
        item = self.settle()
        if item is None:
            return []
        events: list[bytes] = []
        if isinstance(item, MessageItem):
            part = item.content[0]
            events.append(
                self._content("response.output_text.done", text=part.text, logprobs=part.logprobs)
            )
            events.append(self._content("response.content_part.done", part=part))
        elif isinstance(item, ReasoningItem):
            thought = item.content[0]
            events.append(self._content("response.reasoning_text.done", text=thought.text))
            events.append(self._content("response.content_part.done", part=thought))
        elif isinstance(item, FunctionCallItem):
            what = {"name": item.name, "arguments": item.arguments}
            events.append(self._item("response.function_call_arguments.done", **what))
        item.status = status
        events.append(self._tell("response.output_item.done", **self._at(), item=item))
        self._open = None
        self._open_call = -1
        return events

    # ------------------------------------------------------------------ events

    def _at(self) -> dict[str, Any]:
        return {"output_index": len(self.response.output) - 1}

    def _item(self, kind: str, **fields: Any) -> bytes:
        return self._tell(kind, item_id=self.response.output[-1].id, **self._at(), **fields)

    def _content(self, kind: str, **fields: Any) -> bytes:
        return self._item(kind, content_index=0, **fields)

    def _told(self, kind: str) -> bytes:
        return self._tell(kind, response=self.response)

    def _tell(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encode(event))


class _OpenItem:
    """The item that is being written."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.texts: list[str] = []
        self.logprobs: list[ChatTokenLogprob] = []


def failure(error: BaseException) -> FailureDetails:
    """Why a response failed, as far as its client may know."""
    if isinstance(error, RequestError):
        status = error.status_code
        limited = status == 429
        code: Any = "rate_limit_exceeded" if limited else "server_error"
        return FailureDetails(code=code, message=error.message)
    message = (
        str(error) if isinstance(error, StokerError) else "internal error; see the server's log"
    )
    return FailureDetails(code="server_error", message=message)
