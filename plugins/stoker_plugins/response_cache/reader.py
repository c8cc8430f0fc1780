"""One of those who read an answer: what its client has got, and what becomes of it if the answer fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from stoker import (
    DeadlineError,
    Delta,
    DeltaStream,
    FinishReason,
    Request,
    RequestError,
    RequestRecord,
    SequenceTrace,
    SlowReaderError,
    UnavailableError,
    Usage,
)
from stoker_plugins.response_cache.accounts import Account, at_no_cost, merged, record_of
from stoker_plugins.response_cache.answers import Answer

__all__ = ["Reader"]

logger = logging.getLogger("stoker.response_cache")

_MERGE_ABOVE = 64  # deltas: who has fallen behind, or joins late, gets fewer and larger ones


class Reader(DeltaStream):
    """The deltas of one request, out of an answer that it may share with others.

    If the answer fails for a reason that is not its own (another's deadline, a failed step), it looks for a
    second one. What its client has already got must be the beginning of that; if it is not, the client gets
    an error, never a mixture of two texts.

    Args:
        answer: What it reads.
        request: What it answers.
        find_another: A second answer, if the first one fails.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        answer: Answer,
        request: Request,
        find_another: Callable[[Request], Answer],
        clock: Callable[[], float],
    ) -> None:
        self._request = request
        self._answer = answer
        self._find_another = find_another
        self._clock = clock
        self._position = 0  # how much of the answer's deltas its client has taken
        self._limit: int | None = None  # where it stopped reading them
        self._last: list[Delta] = []  # what it is told instead of more of them
        self._texts: list[list[str]] = [[] for _ in range(request.n)]
        self._tokens = [0] * request.n
        self._first_s: list[float | None] = [None] * request.n
        self._ended: set[int] = set()  # indices whose last delta its client has got
        self._expected: dict[int, str] = {}  # what of a second answer its client has already
        self._has_moved = False
        self._error: Exception | None = None
        self._disowns = (
            False  # whether the second answer is not the one that its client began to read
        )
        self._left = False
        self._aborted = False
        self._frozen: list[SequenceTrace] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._over = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        answer.join(self)
        if answer.is_over:
            self._over.set()
        elif request.deadline_s is not None and not self._leads:
            # The engine keeps the leader's deadlines, not ours. (Whoever came later would also wait
            # longer in the queue, so the leader's limit for that is enough.)
            left_s = max(0.0, request.deadline_s - clock())
            self._timer = asyncio.get_running_loop().call_later(left_s, self._out_of_time)

    @property
    def _leads(self) -> bool:
        """Whether the engine computes the answer for this request."""
        return self._answer.leader is self._request

    # ------------------------------------------------------------------ reading

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield batches of deltas until every sequence has ended."""
        while not self._aborted:
            answer = self._answer
            batch = answer.deltas[self._position : self._limit]
            if batch:
                unseen = self._unseen(batch)
                if unseen:
                    yield unseen
                # Only now: while its client was busy with them they were not read.
                if self._answer is answer:
                    self._position += len(batch)
            elif self._left or answer.is_over:
                break
            else:
                await self._more(answer)
        if self._last and not self._aborted:
            yield self._last

    async def _more(self, answer: Answer) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        answer.want()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        """There may be something to read."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _unseen(self, batch: Sequence[Delta]) -> list[Delta]:
        """What of a batch is news for the client, as it should see it."""
        unseen: list[Delta] = []
        for delta in merged(batch) if len(batch) > _MERGE_ABOVE else batch:
            if delta.index in self._ended:
                continue
            if self._expected:
                known = self._skip_known(delta)
                if known is None:
                    break
                delta = known
            if self._first_s[delta.index] is None:
                self._first_s[delta.index] = self._clock()
            self._tokens[delta.index] += delta.num_tokens
            if not self._leads:
                self._texts[delta.index].append(delta.text)
            if delta.finish_reason is not None:
                self._ended.add(delta.index)
                delta = delta if self._leads else at_no_cost(delta)
            unseen.append(delta)
        return unseen

    def _skip_known(self, delta: Delta) -> Delta | None:
        """A second answer's delta without what the client has; ``None`` if that is not how it began."""
        expected = self._expected.get(delta.index, "")
        length = min(len(expected), len(delta.text))
        is_short = delta.finish_reason is not None and length < len(expected)
        if is_short or delta.text[:length] != expected[:length]:
            error = UnavailableError(
                "this answer was shared with an identical request that failed, and a second attempt "
                "began differently; send the request again",
                code="shared_answer_failed",
            )
            self._disowns = True
            self._end_with(error)
            return None
        self._expected[delta.index] = expected[length:]
        return msgspec.structs.replace(delta, text=delta.text[length:])

    # ------------------------------------------------------------------ its end

    def abort(self) -> None:
        """Stop: the client has gone. The answer goes on while others read it."""
        self._aborted = True
        self._leave(None)
        self.wake()

    def cancel(self, error: RequestError) -> None:
        """End it with an error that its reader is told; the answer goes on while others read it."""
        if not self._left and not self._answer.is_over:
            self._end_with(error)

    async def wait_until_over(self) -> None:
        """Wait until nothing more is generated for it."""
        await self._over.wait()

    def on_end(self) -> None:
        """Nothing more will come of the answer."""
        failure = self._answer.failure
        if not self._left and failure is not None:
            if self._may_move(failure):
                self._move()
                return
            self._error = failure.error
            self._last = self._endings(FinishReason.ABORT)
            # Its own sequence first: that is the error to tell.
            self._last.sort(key=lambda delta: delta.index != failure.index)
            self._last[:1] = [failure if self._leads else at_no_cost(failure)]
        self._over.set()
        self.wake()

    def _out_of_time(self) -> None:
        if not self._left and not self._answer.is_over:
            waited_s = self._clock() - self._request.arrival_s
            self._end_with(
                DeadlineError(
                    f"the request's time ran out after {waited_s:.1f} s, while its answer was generated for "
                    "an identical request, too; raise its timeout, or retry when the server is less busy"
                )
            )

    def _end_with(self, error: Exception) -> None:
        """Leave the answer, and tell the client why once it has read what there is that is for it."""
        self._error = error
        self._limit = 0 if self._disowns else len(self._answer.deltas)
        self._last = self._endings(FinishReason.ERROR, error)
        self._leave(error if isinstance(error, RequestError) else None)
        self.wake()

    def _leave(self, error: RequestError | None) -> None:
        if self._left:
            return
        self._left = True
        if self._timer is not None:
            self._timer.cancel()
        was_over = self._answer.is_over
        goes_on = self._answer.leave(self, error)
        if self._leads and not self._disowns and (was_over or not goes_on):
            return  # the engine's own account of it is the true one
        self._frozen = self.traces()
        self._over.set()

    def _ended_well(self) -> Mapping[int, Delta]:
        """The last deltas of sequences that have ended well, for this request."""
        endings = self._answer.endings
        if not self._disowns:
            return endings
        return {index: endings[index] for index in self._ended}

    def _endings(self, reason: FinishReason, error: Exception | None = None) -> list[Delta]:
        """Last deltas of all other sequences."""
        num_prompt = len(self._request.prompt_token_ids)
        return [
            Delta(
                index=index,
                finish_reason=reason,
                error=error,
                usage=Usage(prompt_tokens=num_prompt, completion_tokens=self._tokens[index]),
            )
            for index in range(self._request.n)
            if index not in self._ended_well()
        ]

    # ------------------------------------------------------------------ a second answer

    def _may_move(self, failure: Delta) -> bool:
        """Whether a failure is not its own, and might not happen again."""
        error = failure.error
        if self._leads or failure.finish_reason is FinishReason.ABORT:
            return False
        if isinstance(error, UnavailableError):  # the server stops
            return False
        if isinstance(error, DeadlineError):  # another's: each ends one of those who share at most
            return True
        if isinstance(error, SlowReaderError) and any(self._texts):
            return False  # none of those who shared it has read, so it has not either
        return not self._has_moved

    def _move(self) -> None:
        self._has_moved = True
        given = ["".join(parts) for parts in self._texts]
        self._expected = {index: text for index, text in enumerate(given) if text}
        self._tokens = [0] * self._request.n
        self._position = 0
        try:
            self._answer = self._find_another(self._request)
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("request %s: no second answer", self._request.request_id)
            self._end_with(error)
            return
        self._answer.join(self)
        if self._answer.is_over:
            self._over.set()
        self.wake()

    # ------------------------------------------------------------------ what is told of it

    @property
    def request(self) -> Request:
        """The request that is answered, not the one that the answer is computed for."""
        return self._request

    @property
    def records(self) -> Sequence[RequestRecord]:
        """One record for each sequence, once it is over."""
        if self._leads and self._frozen is None:
            return self._answer.engine_records()
        if not self._over.is_set():
            return ()
        code = self._error.code if isinstance(self._error, RequestError) else None
        return [record_of(self._request, trace, code) for trace in self.traces()]

    def traces(self) -> list[SequenceTrace]:
        """What has happened to each of its sequences so far."""
        if self._frozen is not None:
            return self._frozen
        answer = self._answer
        engine = answer.engine_traces()
        endings = self._ended_well()
        if self._leads and not self._left:
            return list(engine)
        is_over = self._left or answer.is_over
        outcome = FinishReason.ABORT if self._error is None else FinishReason.ERROR
        account = Account(
            self._request,
            self._clock(),
            None if answer.leader is None else answer.leader.arrival_s,
            outcome if is_over else None,
            self._error,
        )
        return [
            account.trace(
                engine[index] if engine else None,
                endings.get(index),
                self._tokens[index],
                self._first_s[index],
            )
            for index in range(self._request.n)
        ]
