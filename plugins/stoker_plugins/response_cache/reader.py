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
from stoker_plugins.response_cache.accounts import Account, at_no_cost, record_of
from stoker_plugins.response_cache.answers import Answer
from stoker_plugins.response_cache.given import Given

__all__ = ["Reader"]

logger = logging.getLogger("stoker.response_cache")


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
        self._given = Given(request.n)
        self._has_moved = False
        self._error: Exception | None = None
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
                news = self._news(batch)
                if news:
                    yield news
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

    def _news(self, batch: Sequence[Delta]) -> list[Delta]:
        """What of a batch to give the client."""
        news = self._given.take(batch, self._clock(), leads=self._leads)
        if self._given.differs:
            error = UnavailableError(
                "this answer was shared with an identical request that failed, and a second attempt "
                "began differently; send the request again",
                code="shared_answer_failed",
            )
            self._end_with(error)
        return news

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
            self._last = self._failed(failure)
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
        self._limit = 0 if self._given.differs else len(self._answer.deltas)
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
        if self._leads and not self._given.differs and (was_over or not goes_on):
            return  # the engine's own account of it is the true one
        self._frozen = self.traces()
        self._over.set()

    def _ended_well(self) -> Mapping[int, Delta]:
        """The last deltas of sequences that have ended well, and are for this client."""
        given = self._given
        return given.endings if given.differs else self._answer.endings | given.endings

    def _endings(self, reason: FinishReason, error: Exception | None = None) -> list[Delta]:
        """Last deltas of all other sequences."""
        num_prompt = len(self._request.prompt_token_ids)
        ended = self._ended_well()
        return [
            Delta(
                index=index,
                finish_reason=reason,
                error=error,
                usage=Usage(prompt_tokens=num_prompt, completion_tokens=self._given.tokens[index]),
            )
            for index in range(self._request.n)
            if index not in ended
        ]

    def _failed(self, failure: Delta) -> list[Delta]:
        """Last deltas when the answer has failed: first the one that tells why."""
        others = {delta.index: delta for delta in self._endings(FinishReason.ABORT)}
        if not others:
            return []
        index = failure.index if failure.index in others else min(others)
        del others[index]
        failure = msgspec.structs.replace(failure, index=index)
        return [failure if self._leads else at_no_cost(failure), *others.values()]

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
        if isinstance(error, SlowReaderError) and not self._given.is_empty:
            return False  # none of those who shared it has read, so it has not either
        return not self._has_moved

    def _move(self) -> None:
        self._has_moved = True
        try:
            answer = self._find_another(self._request)
        except Exception as error:
            if not isinstance(error, RequestError):
                logger.exception("request %s: no second answer", self._request.request_id)
            self._end_with(error)
            return
        self._answer = answer
        self._position = 0
        self._given.begin_again()
        answer.join(self)
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
        if self._leads and not self._left:
            return list(engine)
        endings = self._ended_well()
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
                self._given.tokens[index],
                self._given.first_s[index],
            )
            for index in range(self._request.n)
        ]
