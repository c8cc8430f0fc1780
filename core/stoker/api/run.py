"""The generations of one HTTP request: started together, read as one, aborted together."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence

from stoker.api.errors import ClientDisconnectedError
from stoker.api.schemas import PromptTokensDetails, UsageBody
from stoker.errors import EngineError, UnavailableError
from stoker.logs import CURRENT_REQUEST
from stoker.router import Call, Generation, Router
from stoker.types import Delta, FinishReason

__all__ = ["Run", "start"]

_NAMES = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Run:
    """Running generations.

    A choice's index is its sequence's index plus the number of sequences of the generations before.

    Args:
        generations: At least one; they share a model.

    Attributes:
        model: The model's id.
        num_choices: Sequences of all generations.
    """

    def __init__(self, generations: Sequence[Generation]) -> None:
        self._generations = generations
        self._offsets = [0]
        for generation in generations:
            self._offsets.append(self._offsets[-1] + generation.request.n)
        self.num_choices = self._offsets[-1]
        self.model = generations[0].model.model_id
        self._num_open = self.num_choices
        self._completion_tokens = 0
        self._cached: dict[int, int] = {}  # by generation's offset

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
        queue: asyncio.Queue[tuple[int, list[Delta]] | Exception | None] = asyncio.Queue()

        async def pump(offset: int, generation: Generation) -> None:
            try:
                async for batch in generation:
                    queue.put_nowait((offset, batch))
                queue.put_nowait(None)
            except Exception as error:  # noqa: BLE001 - raised below, in the reader
                queue.put_nowait(error)

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

    def finish(self, offset: int, delta: Delta) -> str:
        """Account for a sequence's last delta; returns its ``finish_reason`` for the client.

        Raises:
            Exception: It did not end well: the error to tell the client.
        """
        self._num_open -= 1
        usage = delta.usage
        if usage is not None:
            self._completion_tokens += usage.completion_tokens
            # The prompt counts once, and what its first sequence computed the others find cached.
            known = self._cached.get(offset, usage.cached_tokens)
            self._cached[offset] = min(known, usage.cached_tokens)
        if delta.finish_reason is FinishReason.ERROR:
            raise delta.error or EngineError("the generation failed")
        if delta.finish_reason is None or delta.finish_reason is FinishReason.ABORT:
            raise _stopped()
        return _NAMES[delta.finish_reason]

    def usage(self) -> UsageBody:
        """Token counts of what has finished so far."""
        prompt = sum(len(g.request.prompt_token_ids) for g in self._generations)
        return UsageBody(
            prompt_tokens=prompt,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
        )

    def close(self) -> None:
        """Abort what still runs, and leave the outcome to the access log; may be called twice."""
        for generation in self._generations:
            generation.abort()
        context = CURRENT_REQUEST.get()
        if context is None:
            return
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
    generations: list[Generation] = []
    try:
        for call in calls:
            generations.append(await router.generate(call))  # noqa: PERF401 - see below
    except BaseException:
        # What has started must be known here, which a comprehension would not tell.
        for generation in generations:
            generation.abort()
        raise
    run = Run(generations)
    context = CURRENT_REQUEST.get()
    if context is not None:
        context.model = run.model
    return run


def _stopped() -> UnavailableError:
    return UnavailableError(
        "the server is shutting down and cancelled this request; send it again later",
        code="server_shutdown",
    )
