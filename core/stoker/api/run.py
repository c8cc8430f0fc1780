"""The generations of one HTTP request: started together, read as one, aborted together."""

import asyncio
import bisect
import contextlib
import math
from collections.abc import AsyncGenerator, Sequence

from stoker.api.answer_schemas import (
    CompletionTokensDetails,
    PromptTokensDetails,
    Timings,
    UsageBody,
)
from stoker.api.errors import ClientDisconnectedError
from stoker.errors import EngineError, SlowReaderError, UnavailableError
from stoker.history import TrackedRequest
from stoker.interfaces import OutputParser
from stoker.logs import CURRENT_REQUEST
from stoker.router import Call, Generation, Router
from stoker.types import Delta, FinishReason

__all__ = ["Run", "start"]

_SHUTDOWN = "server_shutdown"
_SHUTDOWN_PATIENCE_S = 1.0  # less than what the server waits for answers once it has cancelled them

_NAMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Run:
    """Running generations.

    A choice's index is its sequence's index plus the number of sequences of the generations before.

    Args:
        generations: At least one; they share a model.

    Attributes:
        model: The model's id.
        num_choices: Sequences of all generations.
        headers: What middleware wants the answer's headers to be; of several generations, the last wins.
        reasoning_tokens: Of the generated tokens, those that whoever reads told to be reasoning.
    """

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations
        self._offsets = [0]
        self.headers: dict[str, str] = {}
        for generation in generations:
            self._offsets.append(self._offsets[-1] + generation.request.n)
            self.headers |= generation.request.response_headers
        self.num_choices = self._offsets[-1]
        self.model = generations[0].model.model_id
        self._num_open = self.num_choices
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}  # by generation's offset
        self.reasoning_tokens = 0
        self._accepted = self._rejected = 0  # of a prediction

    @property
    def tracked(self) -> TrackedRequest:
        """What is known of the whole request."""
        return self._generations[0].tracked

    def prompt_token_ids(self, index: int) -> list[int]:
        """The prompt of a choice."""
        return list(self._generation(index).request.prompt_token_ids)

    def new_parser(self, index: int) -> OutputParser | None:
        """What tells calls and reasoning from a choice's text; ``None`` if all of it is text."""
        make = self._generation(index).new_parser
        return None if make is None else make()

    @property
    def has_parsers(self) -> bool:
        """Whether some choice has more to tell than text."""
        return any(generation.new_parser is not None for generation in self._generations)

    def prompt_index(self, index: int) -> int:
        """Which of the run's prompts a choice answers."""
        return bisect.bisect_right(self._offsets, index) - 1

    def _generation(self, index: int) -> Generation:
        return self._generations[self.prompt_index(index)]

    def timings(self) -> Timings:
        """How long it took, as of now; of several choices the slowest of each."""
        traces = self.tracked.traces()
        cached = min((trace.cached_tokens for trace in traces), default=0)
        computed = sum(trace.computed_tokens for trace in traces)
        generated = sum(trace.completion_tokens for trace in traces)
        queue_s = max((trace.queue_s for trace in traces), default=0.0)
        first_s = max((trace.time_to_first_token_s or 0.0 for trace in traces), default=0.0)
        prompt_s = max(0.0, first_s - queue_s)
        rates = [trace.tokens_per_s for trace in traces if trace.tokens_per_s]
        after_first = max((trace.completion_tokens - 1 for trace in traces), default=0)
        predicted_s = after_first / min(rates) if rates else 0.0
        return Timings(
            cache_n=cached,
            prompt_n=computed,
            prompt_ms=prompt_s * 1e3,
            prompt_per_token_ms=prompt_s * 1e3 / computed if computed else 0.0,
            prompt_per_second=computed / prompt_s if prompt_s else 0.0,
            predicted_n=generated,
            predicted_ms=predicted_s * 1e3,
            predicted_per_token_ms=predicted_s * 1e3 / after_first if after_first > 0 else 0.0,
            predicted_per_second=sum(rates),
            queue_ms=queue_s * 1e3,
        )

    async def batches(self) -> AsyncGenerator[tuple[int, list[Delta]], None]:
        """Yield batches of deltas, each with what to add to its deltas' indices.

        Raises:
            UnavailableError: They ended before their last sequence did, because the server stops.
        """
        if len(self._generations) == 1:
            async for batch in self._generations[0]:
                yield 0, batch
        else:
            async with contextlib.aclosing(self._interleaved()) as interleaved:
                async for offset, batch in interleaved:
                    yield offset, batch
        if self._num_open:
            raise _stopped()

    async def _interleaved(self) -> AsyncGenerator[tuple[int, list[Delta]], None]:
        # One place: what our reader does not take, the engine must see as not taken.
        queue: asyncio.Queue[tuple[int, list[Delta]] | Exception | None] = asyncio.Queue(1)

        async def pump(offset: int, generation: Generation) -> None:
            try:
                async for batch in generation:
                    await queue.put((offset, batch))
                await queue.put(None)
            except Exception as error:  # noqa: BLE001 - raised below, in the reader
                await queue.put(error)

        pumps = [
            asyncio.ensure_future(pump(offset, generation))
            for offset, generation in zip(self._offsets, self._generations, strict=False)
        ]
        try:
            num_open = len(pumps)
            while num_open:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    yield item
        finally:
            for task in pumps:
                task.cancel()

    async def wait_until_over(self) -> None:
        """Wait until nothing is generated any more, whether or not somebody reads."""
        for generation in self._generations:
            await generation.stream.wait_until_over()

    def patience_s(self, reader_timeout_s: float) -> float:
        """How long its reader may read nothing of what is left, now that it is over."""
        codes = {r.error_code for g in self._generations for r in g.stream.records}
        if SlowReaderError.default_code in codes:
            return 0.0  # that is why it is over
        return min(reader_timeout_s, _SHUTDOWN_PATIENCE_S if _SHUTDOWN in codes else math.inf)

    def finish(self, offset: int, delta: Delta) -> str:
        """Account for a sequence's last delta; returns its ``finish_reason`` for the client.

        Raises:
            Exception: It did not end well: the error to tell the client.
        """
        self._num_open -= 1
        usage = delta.usage
        if usage is not None:
            self._completion_tokens += usage.completion_tokens
            self._accepted += usage.accepted_prediction_tokens
            self._rejected += usage.rejected_prediction_tokens
            # The prompt counts once, and what its first sequence computed the others find cached.
            known = self._cached.get(offset, usage.cached_tokens)
            self._cached[offset] = min(known, usage.cached_tokens)
        if delta.finish_reason is FinishReason.ERROR:
            raise delta.error or EngineError("the generation failed")
        if delta.finish_reason is None or delta.finish_reason is FinishReason.ABORT:
            raise _stopped()
        return _NAMES[delta.finish_reason]

    def usage(self, more_tokens: int = 0) -> UsageBody:
        """Token counts of what has finished so far.

        Args:
            more_tokens: Tokens of what has not.
        """
        prompt = sum(len(g.request.prompt_token_ids) for g in self._generations)
        return UsageBody(
            prompt_tokens=prompt,
            completion_tokens=self._completion_tokens + more_tokens,
            total_tokens=prompt + self._completion_tokens + more_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=self.reasoning_tokens,
                accepted_prediction_tokens=self._accepted,
                rejected_prediction_tokens=self._rejected,
            ),
        )

    def close(self, error: BaseException | None = None) -> None:
        """Abort what still runs, and leave the outcome to the access log; may be called twice.

        Args:
            error: What it ends with, if it is known.
        """
        for generation in self._generations:
            generation.abort()
        context = CURRENT_REQUEST.get()
        if context is None:
            return
        if context.error is None and error is not None:
            context.error = type(error).__name__
        usage = self.usage()
        context.prompt_tokens = usage.prompt_tokens
        if self._num_open == 0:
            context.completion_tokens = usage.completion_tokens
        elif context.error is None:
            context.error = ClientDisconnectedError.__name__


async def start(router: Router, calls: Sequence[Call]) -> Run:
    """Start all of a request's calls, or none.

    Raises:
        RequestError: One of them was refused; the others were aborted.
    """
    run = Run(await router.start(calls))
    context = CURRENT_REQUEST.get()
    if context is not None:
        context.model = run.model
    return run


def _stopped() -> UnavailableError:
    return UnavailableError(
        "the server is shutting down and cancelled this request; send it again later",
        code=_SHUTDOWN,
    )
