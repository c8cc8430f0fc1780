"""Answers that several may read: stored ones, and those that are still being generated."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stoker import (
    Delta,
    DeltaStream,
    FinishReason,
    Request,
    RequestError,
    RequestRecord,
    SequenceTrace,
    Usage,
)
from stoker_plugins.response_cache.store import StoredAnswer, StoredSequence

if TYPE_CHECKING:
    from stoker_plugins.response_cache.reader import Reader

__all__ = ["Answer", "Flight", "replay"]

logger = logging.getLogger("stoker.response_cache")

_MAX_CHARS = 4096  # of one delta: clients read events into buffers of bounded size


class Answer:
    """What a request is answered with. This one is complete.

    Args:
        leader: The request that the engine computes it for; ``None`` if it does not.

    Attributes:
        deltas: What has come so far; only ever appended to.
        endings: The last delta of each sequence that has ended well, by index.
        failure: The delta that says what went wrong.
        is_over: Whether nothing more will come.
    """

    def __init__(self, leader: Request | None = None) -> None:
        self.leader = leader
        self.deltas: list[Delta] = []
        self.endings: dict[int, Delta] = {}
        self.failure: Delta | None = None
        self.is_over = True

    def join(self, reader: Reader) -> None:
        """Tell a reader of what comes."""

    def leave(self, reader: Reader, error: RequestError | None = None) -> bool:
        """A reader needs no more of it; returns whether the answer goes on all the same."""
        return True

    def want(self) -> None:
        """A reader has read all there is."""

    def engine_traces(self) -> Sequence[SequenceTrace]:
        """What the engine tells of its sequences."""
        return ()

    def engine_records(self) -> Sequence[RequestRecord]:
        """What the engine told of those that have ended."""
        return ()


class Flight(Answer):
    """An answer that is being generated: read once from the engine, by any number of readers from here.

    It goes as fast as the fastest reader. The engine is asked for more when one of them has read all there
    is; if none does, the engine sees a reader that does not read, and pauses or ends the request as it
    would for a single one. Everything that came stays here until the end, for those who join: as much as
    one answer, however many read it and however slowly.

    Args:
        key: What its request is known by.
        request: The request.
        stream: Where it comes from.
        on_end: Called when nobody may join any more: its last reader has left, and when it is over.
    """

    def __init__(
        self,
        key: bytes,
        request: Request,
        stream: DeltaStream,
        on_end: Callable[[Flight], None],
    ) -> None:
        super().__init__(request)
        self.key = key
        self.request = request
        self.stream = stream
        self.is_over = False
        self._on_end = on_end
        self._readers: dict[Reader, None] = {}
        self._wanted = asyncio.Event()
        self._is_patient = True  # whether it waits until more is wanted
        self._watching = asyncio.ensure_future(self._watch())
        self._running = asyncio.ensure_future(self._run())

    @property
    def is_complete(self) -> bool:
        """Whether every sequence has ended well."""
        return len(self.endings) == self.request.n

    def may_join(self, request: Request) -> bool:
        """Whether an identical request may wait for this answer.

        A more urgent one must not wait in the queue behind a less urgent one.
        """
        if self.failure is not None:
            return False
        return bool(self.deltas) or self.request.priority <= request.priority

    def join(self, reader: Reader) -> None:
        """Tell a reader of what comes."""
        self._readers[reader] = None

    def leave(self, reader: Reader, error: RequestError | None = None) -> bool:
        """A reader needs no more of it; the last one ends it. Returns whether it goes on, or is over.

        Args:
            reader: Who leaves.
            error: What the reader was told, if it did not just go away.
        """
        if self.is_over or len(self._readers) > 1 or reader not in self._readers:
            self._readers.pop(reader, None)
            return True
        # It stays a reader, to be told when the engine is done with it.
        self._on_end(self)
        if error is None:
            self.stream.abort()
        else:
            self.stream.cancel(error)
        self._hurry()
        return False

    def want(self) -> None:
        """A reader has read all there is."""
        self._wanted.set()

    def engine_traces(self) -> Sequence[SequenceTrace]:
        """What the engine tells of its sequences."""
        return self.stream.traces()

    def engine_records(self) -> Sequence[RequestRecord]:
        """What the engine told of those that have ended."""
        return self.stream.records

    def stored(self) -> tuple[StoredSequence, ...]:
        """What to remember of it once it is complete."""
        texts: list[list[str]] = [[] for _ in range(self.request.n)]
        for delta in self.deltas:
            texts[delta.index].append(delta.text)
        return tuple(
            StoredSequence("".join(texts[index]), _reason(ending), _tokens(ending), ending.stop)
            for index, ending in sorted(self.endings.items())
        )

    async def _run(self) -> None:
        try:
            async for batch in self.stream:
                if self.failure is None:
                    self._take(batch)
                self._wanted.clear()
                self._wake()
                if self._is_patient:
                    await self._wanted.wait()
            await self.stream.wait_until_over()  # an abort takes until the next step
        except Exception as error:
            logger.exception("the stream of request %s failed", self.request.request_id)
            index = next((i for i in range(self.request.n) if i not in self.endings), 0)
            self.failure = Delta(index=index, finish_reason=FinishReason.ERROR, error=error)
            self.stream.abort()
        finally:
            self.is_over = True
            self._watching.cancel()
            self._on_end(self)
            # Those who cannot use what became of it look for another answer now.
            for reader in list(self._readers):
                reader.on_end()

    def _take(self, batch: Sequence[Delta]) -> None:
        for delta in batch:
            if delta.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                self.failure = delta
                self.stream.abort()  # its other sequences are of no use by themselves
                self._hurry()
                return
            if delta.finish_reason is not None:
                self.endings[delta.index] = delta
            self.deltas.append(delta)

    async def _watch(self) -> None:
        """Once the engine is done there is nothing to hold back."""
        await self.stream.wait_until_over()
        self._hurry()

    def _hurry(self) -> None:
        self._is_patient = False
        self._wanted.set()

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake()


def replay(stored: StoredAnswer, request: Request) -> Answer:
    """A stored answer, as deltas for a request that asks for it again."""
    answer = Answer()
    for index, sequence in enumerate(stored.sequences):
        text = sequence.text
        last_at = max(0, (len(text) - 1) // _MAX_CHARS * _MAX_CHARS)
        for start in range(0, last_at, _MAX_CHARS):
            answer.deltas.append(Delta(index=index, text=text[start : start + _MAX_CHARS]))
        ending = Delta(
            index=index,
            text=text[last_at:],
            num_tokens=sequence.completion_tokens,
            finish_reason=sequence.finish_reason,
            stop=sequence.stop,
            usage=Usage(
                prompt_tokens=len(request.prompt_token_ids),
                completion_tokens=sequence.completion_tokens,
            ),
        )
        answer.deltas.append(ending)
        answer.endings[index] = ending
    return answer


def _reason(ending: Delta) -> FinishReason:
    return FinishReason.STOP if ending.finish_reason is None else ending.finish_reason


def _tokens(ending: Delta) -> int:
    return 0 if ending.usage is None else ending.usage.completion_tokens
