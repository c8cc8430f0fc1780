"""The asyncio side of the engine: submit a request, read its deltas, abort it.

The loop's thread hands over what a step produced with one ``call_soon_threadsafe`` per step and event loop;
``deliver`` then sorts it into the streams. A reader gets all that has piled up since it last looked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

from stoker.errors import EngineError
from stoker.interfaces import CacheReport, DeltaStream
from stoker.types import Delta, Request, RequestRecord, SequenceTrace

if TYPE_CHECKING:
    from stoker.engine.embedding import EmbeddingEngine
    from stoker.engine.embedding_jobs import EmbeddingStream
    from stoker.engine.loop import EngineLoop
    from stoker.engine.model_engine import ModelEngine
    from stoker.engine.sequence import Sequence
    from stoker.errors import RequestError
    from stoker.interfaces import (
        CacheEntry,
        EmbeddingInfo,
        EngineSnapshot,
        LoadSnapshot,
        RuntimeInfo,
        SchedulingPolicy,
        SnapshotStore,
        TenantLoad,
        Tokenizer,
    )

__all__ = ["EngineClient", "RequestStream", "deliver"]

_MAX_BATCH = 256  # deltas that a reader gets at once


class RequestStream(DeltaStream):
    """The deltas of one request: an asynchronous iterator of non-empty batches.

    It belongs to the event loop that created it. It ends after the last of the request's sequences.

    Args:
        request: The request.
        loop: The engine loop to tell about an abort.

    Attributes:
        event_loop: Where its reader lives.
        records: One record for each sequence that has ended; written by the engine's thread.
        aborted: Whether the reader has gone; read by the engine's thread.
        sequences: Its sequences, once the engine has made them.
        num_sent: Deltas that the engine has handed over; written by its thread.
        num_read: Of those, how many the reader is done with; written on its event loop.
    """

    __slots__ = (
        "_loop",
        "_num_open",
        "_over",
        "_pending",
        "_waiter",
        "aborted",
        "event_loop",
        "num_read",
        "num_sent",
        "records",
        "request",
        "sequences",
    )

    def __init__(self, request: Request, loop: EngineLoop) -> None:
        self.request: Request = request
        self.event_loop = asyncio.get_running_loop()
        self.records: list[RequestRecord] = []
        self.aborted = False
        self.sequences: tuple[Sequence, ...] = ()
        self.num_sent = 0
        self.num_read = 0
        self._loop = loop
        self._pending: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._num_open = request.n
        self._over = asyncio.Event()

    def push(self, delta: Delta) -> None:
        """Add a delta; on the reader's event loop only."""
        self._pending.append(delta)
        if delta.finish_reason is not None:
            self._num_open -= 1
            if self._num_open == 0:
                self._over.set()
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield batches of deltas until every sequence has ended."""
        while True:
            if not self._pending:
                if self._num_open <= 0 or self.aborted:
                    return
                self._waiter = self.event_loop.create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None
            batch, self._pending = self._pending, []
            if len(batch) > _MAX_BATCH:
                # In pieces: what lies in a piece counts as unread until it was sent.
                self._pending = batch[_MAX_BATCH:]
                del batch[_MAX_BATCH:]
            if batch:
                yield batch
                # Only now: while the reader was busy sending it, it was not read.
                self.num_read += len(batch)
                self._loop.reader_moved()

    def traces(self) -> list[SequenceTrace]:
        """What has happened to each of its sequences so far; from any thread."""
        now_s = self._loop.clock()
        if self.sequences:
            return [sequence.trace(now_s) for sequence in self.sequences]
        return [self._unseen(now_s) for _ in range(self.request.n)]

    def _unseen(self, now_s: float) -> SequenceTrace:
        """The trace of a sequence that still lies in the inbox."""
        waited_s = now_s - self.request.arrival_s
        return SequenceTrace(
            status="waiting",
            queue_s=waited_s,
            total_s=waited_s,
            prompt_tokens=len(self.request.prompt_token_ids),
        )

    def cancel(self, error: RequestError) -> None:
        """End it with an error that its reader is told; does nothing after its end."""
        if not self.aborted and self._num_open > 0:
            self._loop.post_cancel(self, error)

    async def wait_until_over(self) -> None:
        """Wait until every sequence has ended and its record is there, also after an abort."""
        await self._over.wait()

    def abort(self) -> None:
        """Stop generating. May be called twice, and after the end."""
        if self.aborted or self._num_open <= 0:
            return
        self.aborted = True
        self._loop.post_abort(self)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def deliver(batch: Iterable[tuple[RequestStream, Delta]]) -> None:
    """Sort what a step produced into the streams; runs on their event loop."""
    for stream, delta in batch:
        stream.push(delta)


class EngineClient:
    """A served model, as the router sees it.

    Args:
        engine: The model's engine.
        loop: The loop of its device.
        store: The engine's store of snapshots, if it has one.
        embedder: What embeds, if the model can.
    """

    def __init__(
        self,
        engine: ModelEngine,
        loop: EngineLoop,
        store: SnapshotStore | None = None,
        embedder: EmbeddingEngine | None = None,
    ) -> None:
        self._engine = engine
        self._loop = loop
        self._store = store
        self._embedder = embedder

    @property
    def info(self) -> RuntimeInfo:
        """The runtime's facts."""
        return self._engine.runtime.info

    @property
    def tokenizer(self) -> Tokenizer:
        """The runtime's tokenizer."""
        return self._engine.runtime.tokenizer

    @property
    def max_total_tokens(self) -> int:
        """Most tokens of prompt and output together."""
        return self._engine.max_total_tokens

    def submit(self, request: Request) -> RequestStream:
        """Put a request into the loop's inbox; returns its deltas.

        Raises:
            UnavailableError: The loop has ended.
        """
        stream = RequestStream(request, self._loop)
        self._engine.count_submitted(request)
        try:
            self._loop.post_submit(self._engine, stream)
        except BaseException:
            self._engine.count_withdrawn(request)
            raise
        return stream

    @property
    def embedding(self) -> EmbeddingInfo | None:
        """How the model embeds; ``None`` if it cannot."""
        return None if self._embedder is None else self._embedder.info

    def embed(self, request: Request) -> EmbeddingStream:
        """Put a request's ``inputs`` into the loop's inbox; returns where their vectors will be.

        Raises:
            EngineError: The model has no embedder: ``embedding`` says so.
            UnavailableError: The loop has ended.
        """
        if self._embedder is None:
            raise EngineError(f"{self.info.name} does not embed")
        return self._embedder.post(request, self._loop)

    def load(self) -> LoadSnapshot:
        """How busy the model is."""
        return self._engine.load()

    def tenant_load(self, tenant: str) -> TenantLoad:
        """How much of the queue a tenant takes."""
        return self._engine.tenant_load(tenant)

    def snapshot(self) -> EngineSnapshot:
        """What the model is doing now."""
        return self._engine.snapshot()

    @property
    def policy(self) -> SchedulingPolicy:
        """Who orders its requests."""
        return self._engine.policy

    def cache_report(self) -> CacheReport:
        """What became of its prefix cache."""
        return CacheReport(
            lanes=self._engine.scheduler.lanes.stats(),
            store=None if self._store is None else self._store.stats(),
        )

    def cache_entries(self) -> list[CacheEntry]:
        """The prefixes that its idle lanes and its store of snapshots keep."""
        return self._engine.scheduler.lanes.entries()

    async def clear_cache(self) -> int:
        """Drop the prefixes that are kept, but for pinned ones; returns how many that were.

        Raises:
            UnavailableError: The loop has ended.
        """
        lanes = self._engine.scheduler.lanes
        return await asyncio.wrap_future(self._loop.post_call(lanes.clear))

    def pin(self, tokens: Iterable[int]) -> None:
        """Keep the KV of a prefix once a request has computed it; before that request is submitted."""
        self._engine.scheduler.lanes.pin(tokens)

    def cache_counts(self) -> tuple[int, int]:
        """Prompt tokens looked up in retained KV, and how many of them were found."""
        lanes = self._engine.scheduler.lanes
        return lanes.query_tokens, lanes.hit_tokens
