"""A request on its way: what the router hands to the API, to be read or aborted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from stoker.engine.embedding_jobs import EmbeddingStream
from stoker.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from stoker.history import TrackedRequest
    from stoker.interfaces import DeltaStream, OutputParser, ServedModel
    from stoker.types import Delta, Request

__all__ = ["Generation"]


class Generation:
    """One running request.

    Args:
        request: As the engine sees it.
        model: The model that serves it.
        stream: Its deltas.
        tracked: The API request it belongs to.
        new_parser: Makes what tells calls and reasoning from an output's text; ``None`` if all is text.
        on_end: Awaited once when the last delta was read or the reader left.
    """

    def __init__(
        self,
        request: Request,
        model: ServedModel,
        stream: DeltaStream,
        tracked: TrackedRequest,
        on_end: Callable[[Generation], Awaitable[None]],
        new_parser: Callable[[], OutputParser] | None = None,
    ) -> None:
        self.request = request
        self.model = model
        self.stream = stream
        self.tracked = tracked
        self.new_parser = new_parser
        self._on_end = on_end

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield non-empty batches of deltas of any of the request's sequences until all have ended."""
        try:
            async for batch in self.stream:
                yield batch
        finally:
            self.abort()

    def vectors(self) -> NDArray[np.float32]:
        """What became of the request's inputs, ``float32[len(inputs), width]``, once it has ended well.

        Raises:
            EngineError: It is no request to embed.
        """
        if not isinstance(self.stream, EmbeddingStream):
            raise EngineError(f"the request {self.request.request_id} was not embedded")
        return self.stream.vectors

    def abort(self) -> None:
        """Stop it; may be called twice, and after the end."""
        self.stream.abort()
        on_end, self._on_end = self._on_end, _nothing
        if on_end is not _nothing:
            task = asyncio.ensure_future(on_end(self))
            _ending.add(task)
            task.add_done_callback(_ending.discard)


_ending: set[asyncio.Future[None]] = set()  # keeps the tasks alive until they are done


async def _nothing(_: Generation) -> None:
    return
