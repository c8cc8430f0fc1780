"""What a choice of an answer comes to: its deltas read, calls told from text, its parts put together."""

import contextlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stoker.api.answer_schemas import FunctionCall, ToolCall
from stoker.api.run import Run
from stoker.interfaces import CallPiece, OutputParser, Piece, ReasoningPiece, TextPiece
from stoker.types import Delta, TokenLogprob

__all__ = ["Choice", "ChoiceReader", "collect", "new_call_id"]


def new_call_id() -> str:
    """An id for a tool call."""
    return f"call_{secrets.token_hex(12)}"


class ChoiceReader:
    """Reads one choice's deltas.

    Args:
        parser: Tells calls and reasoning from text; ``None`` if all is text.

    Attributes:
        num_calls: Tool calls that have begun so far.
        reasoning_tokens: Tokens of reasoning so far, as near as deltas tell.
    """

    def __init__(self, parser: OutputParser | None) -> None:
        self._parser = parser
        self.num_calls = 0
        self.reasoning_tokens = 0

    def read(self, delta: Delta) -> Sequence[Piece]:
        """What a delta adds; with the last delta, also what was held back."""
        parser = self._parser
        if parser is None:
            return (TextPiece(delta.text),) if delta.text else ()
        pieces = list(parser.push(delta.text)) if delta.text else []
        if delta.finish_reason is not None:
            pieces += parser.finish()
        for piece in pieces:
            if isinstance(piece, CallPiece):
                self.num_calls = max(self.num_calls, piece.index + 1)
        if pieces and all(isinstance(piece, ReasoningPiece) for piece in pieces):
            self.reasoning_tokens += delta.num_tokens
        return pieces

    def reason(self, reason: str) -> str:
        """The finish reason for the client: an answer that ended with calls says so."""
        return "tool_calls" if self.num_calls and reason == "stop" else reason


@dataclass(slots=True)
class Choice:
    """A whole choice.

    Attributes:
        texts: Its text, in parts.
        reasoning: What the model thought first, in parts.
        calls: Its tool calls.
        finish_reason: Why it ended; OpenAI's word.
        stop: The stop string or token that ended it.
        token_ids: Its tokens, if they were asked for.
        logprobs: Their log-probabilities, if they were asked for.
        prompt_logprobs: The prompt's, if they were asked for and it is a generation's first choice.
        reasoning_tokens: Tokens of its reasoning.
    """

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = ""
    stop: str | int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    reasoning_tokens: int = 0

    @property
    def text(self) -> str:
        """Its text."""
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """How likely the model found its tokens, on average."""
        if not self.logprobs:
            return 0.0
        return sum(item.logprob for item in self.logprobs) / len(self.logprobs)

    def add(self, delta: Delta, pieces: Iterable[Piece]) -> None:
        """Take in a delta and what it was read as."""
        for piece in pieces:
            if isinstance(piece, TextPiece):
                self.texts.append(piece.text)
            elif isinstance(piece, ReasoningPiece):
                self.reasoning.append(piece.text)
            elif piece.index == len(self.calls):
                function = FunctionCall(name=piece.name, arguments=piece.arguments)
                self.calls.append(ToolCall(id=new_call_id(), function=function))
            else:
                self.calls[piece.index].function.arguments += piece.arguments
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.stop is not None:
            self.stop = delta.stop


async def collect(run: Run) -> list[Choice]:
    """All choices of a run, once they are whole.

    Raises:
        Exception: One of them did not end well: the error to tell the client.
    """
    choices = [Choice() for _ in range(run.num_choices)]
    readers = [ChoiceReader(run.new_parser(index)) for index in range(run.num_choices)]
    async with contextlib.aclosing(run.batches()) as batches:
        async for offset, batch in batches:
            for delta in batch:
                index = offset + delta.index
                choice, reader = choices[index], readers[index]
                choice.add(delta, reader.read(delta))
                if delta.finish_reason is not None:
                    choice.finish_reason = reader.reason(run.finish(offset, delta))
                    choice.reasoning_tokens = reader.reasoning_tokens
                    run.reasoning_tokens += reader.reasoning_tokens
    return choices
