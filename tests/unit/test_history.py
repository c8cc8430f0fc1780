"""What is remembered of requests, and for how long."""

from __future__ import annotations

from typing import Any, cast

import pytest

from stoker.errors import RequestCancelledError
from stoker.history import History, TrackedRequest
from stoker.types import FinishReason, Request, SamplingParams, SequenceTrace


class Stream:
    """What a tracked request asks of a stream."""

    def __init__(self, n: int = 1) -> None:
        self.request = Request(
            request_id="r", model="m", prompt_token_ids=[1], sampling=SamplingParams(), n=n
        )
        self.statuses = ["waiting"] * n
        self.reasons: list[FinishReason | None] = [None] * n
        self.cancelled_with: Exception | None = None

    def cancel(self, error: Exception) -> None:
        self.cancelled_with = error

    def end(self, *reasons: FinishReason) -> None:
        self.reasons = list(reasons)
        self.statuses = ["finished"] * len(reasons)

    def traces(self) -> list[SequenceTrace]:
        pairs = zip(self.statuses, self.reasons, strict=True)
        return [
            SequenceTrace(
                status=status, finish_reason=reason, queue_s=0.0, total_s=0.0, prompt_tokens=1
            )
            for status, reason in pairs
        ]


def begun(
    history: History, request_id: str = "r", tenant: str = "t", n: int = 1
) -> tuple[TrackedRequest, Stream]:
    tracked = TrackedRequest(request_id, tenant, "m", "chat", 0)
    history.begin(tracked)
    stream = Stream(n)
    tracked.add(cast(Any, stream))
    history.release(tracked)  # it has started
    return tracked, stream


def ended(history: History, request_id: str, tenant: str = "t", n: int = 1) -> TrackedRequest:
    tracked, stream = begun(history, request_id, tenant, n)
    stream.end(*[FinishReason.STOP] * n)
    history.release(tracked)
    return tracked


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        (["waiting", "waiting"], "waiting"),
        (["waiting", "prefill"], "running"),
        (["decode", "finished"], "running"),
        (["paused", "paused"], "running"),
        (["preempted", "waiting"], "running"),
        (["finished", "waiting"], "running"),
    ],
)
def test_the_status_of_what_runs(statuses: list[str], status: str) -> None:
    tracked, stream = begun(History(), n=2)
    stream.statuses = statuses
    assert tracked.status() == status


@pytest.mark.parametrize(
    ("reasons", "status"),
    [
        ([FinishReason.STOP, FinishReason.LENGTH], "finished"),
        ([FinishReason.STOP, FinishReason.ABORT], "aborted"),
        ([FinishReason.ERROR, FinishReason.ABORT], "failed"),
    ],
)
def test_the_status_of_what_ended(reasons: list[FinishReason], status: str) -> None:
    history = History()
    tracked, stream = begun(history, n=2)
    stream.end(*reasons)
    assert tracked.status() == status  # as soon as it is so, not only when everybody has let go
    history.release(tracked)
    assert (tracked.is_over, tracked.status()) == (True, status)


def test_cancelled_is_what_was_cancelled_before_its_end() -> None:
    history = History()
    tracked, stream = begun(history)
    error = RequestCancelledError("enough")
    tracked.cancel(error)
    assert stream.cancelled_with is error
    stream.end(FinishReason.ERROR)
    history.release(tracked)
    assert tracked.status() == "cancelled"
    tracked, stream = begun(history)
    tracked.cancel(error)
    stream.end(FinishReason.STOP)  # it was quicker
    assert tracked.status() == "finished"


def test_it_is_over_when_its_start_and_all_its_generations_are() -> None:
    history = History()
    tracked = TrackedRequest("r", "t", "m", "completion", 0)
    history.begin(tracked)
    streams = [Stream(), Stream()]
    for stream in streams:
        tracked.add(cast(Any, stream))
        stream.end(FinishReason.STOP)
    for _ in range(2):
        history.release(tracked)
        assert not tracked.is_over
        assert history.running("t", "r") == [tracked]
    history.release(tracked)
    assert tracked.is_over
    assert history.running("t", "r") == []
    assert history.find("t", "r") is tracked
    assert len(tracked.traces()) == tracked.num_sequences == 2


def test_the_history_is_bounded() -> None:
    history = History(limit=3)
    for i in range(10):
        ended(history, f"r{i}")
    assert [t.request_id for t in history.recent("t", 100)] == ["r9", "r8", "r7"]
    assert [t.request_id for t in history.recent("t", 2)] == ["r9", "r8"]
    assert history.find("t", "r6") is None
    many = ended(history, "many", n=100)
    assert (len(many.traces()), many.num_sequences) == (16, 100)


def test_without_history_only_what_runs_is_known() -> None:
    history = History(limit=0)
    tracked, _ = begun(history)
    assert history.find("t", "r") is tracked
    history.release(tracked)
    assert history.find("t", "r") is None


def test_tenants_do_not_share_ids() -> None:
    history = History()
    mine, theirs = ended(history, "r", "me"), begun(history, "r", "they")[0]
    assert history.find("me", "r") is mine
    assert history.find("they", "r") is theirs
    assert history.find("nobody", "r") is None
    assert history.recent("me", 10) == [mine]


def test_an_id_stands_for_its_latest_request() -> None:
    history = History()
    first, second = begun(history)[0], begun(history)[0]
    assert history.running("t", "r") == [first, second]
    assert history.find("t", "r") is second
    history.release(second)
    assert history.find("t", "r") is first  # what runs comes before what has ended
    history.release(first)
    assert history.find("t", "r") is first
    assert history.recent("t", 10) == [first]


def test_what_never_started_is_forgotten() -> None:
    history = History()
    tracked = TrackedRequest("r", "t", "m", "chat", 0)
    history.begin(tracked)
    assert tracked.status() == "waiting"
    history.release(tracked)
    assert history.find("t", "r") is None
