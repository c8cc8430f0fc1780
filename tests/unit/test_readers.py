"""Readers that do not read cost the others nothing, and themselves at most their request."""

from __future__ import annotations

import pytest

from stoker import FinishReason, SlowReaderError
from stoker.engine.readers import ReaderLimits
from stoker.testing import EngineHarness, ScriptedRuntime, Submitted
from stoker_plugins.fcfs import FirstComeFirstServed


@pytest.fixture
def harness() -> EngineHarness:
    return EngineHarness(
        FirstComeFirstServed(),
        runtime=ScriptedRuntime(lanes=2, context_length=2000),
        reader_limits=ReaderLimits(max_unread_tokens=20, timeout_s=5.0),
    )


def truth(harness: EngineHarness, request: Submitted) -> str:
    assert isinstance(harness.runtime, ScriptedRuntime)
    tokens = list(request.request.prompt_token_ids)
    return harness.runtime.expected_text(tokens, request.request.sampling.max_tokens or 0)


def read(request: Submitted) -> None:
    request.num_read = request.num_sent


def test_it_is_paused_and_its_lane_serves_others(harness: EngineHarness) -> None:
    stalled = harness.submit("nobody reads this", max_tokens=500)
    other = harness.submit("somebody reads this", max_tokens=500)
    waiting = harness.submit("and this", max_tokens=30)
    stalled.reads = False
    for _ in range(60):
        harness.step()
    assert harness.engine.load().num_paused == 1
    assert len(stalled.deltas) == 21
    assert waiting.finish_reason is FinishReason.LENGTH
    assert harness.engine.has_work, "the other one runs"
    assert stalled.finish() is None
    assert other.finish() is None


def test_it_goes_on_where_it_was_when_its_reader_reads_again(harness: EngineHarness) -> None:
    stalled = harness.submit("slowly read", max_tokens=100)
    stalled.reads = False
    for _ in range(1000):
        if stalled.finish() is not None:
            break
        harness.step()
        if not harness.engine.has_work:
            harness.fake_clock.advance(1.0)
            read(stalled)
    assert stalled.text() == truth(harness, stalled)
    (trace,) = stalled.traces()
    assert {p.reason for p in trace.preemptions} == {"reader"}
    assert trace.num_preemptions == 4
    assert trace.paused_s >= 4.0
    assert trace.status == "finished"


def test_a_reader_that_reads_nothing_at_all_is_dropped(harness: EngineHarness) -> None:
    stalled = harness.submit("gone but connected", n=2, max_tokens=500)
    stalled.reads = False
    for _ in range(60):
        harness.step()
    assert not harness.engine.has_work
    harness.fake_clock.advance(3.0)
    harness.step()
    assert stalled.finish() is None
    stalled.num_read += 1  # a sign of life
    harness.step()
    harness.fake_clock.advance(4.0)
    harness.step()
    assert stalled.finish() is None
    harness.fake_clock.advance(2.0)
    harness.step()
    for index in range(2):
        last = stalled.finish(index)
        assert last is not None
        assert isinstance(last.error, SlowReaderError)
    assert harness.engine.load().num_paused == 0
    assert harness.engine.scheduler.lanes.num_free == 2


def test_a_paused_request_can_be_aborted_and_still_has_its_deadline(
    harness: EngineHarness,
) -> None:
    first = harness.submit("a", max_tokens=500)
    second = harness.submit("b", max_tokens=500, deadline_s=harness.clock() + 2.0)
    first.reads = second.reads = False
    for _ in range(40):
        harness.step()
    assert harness.engine.load().num_paused == 2
    harness.abort(first)
    assert first.finish_reason is FinishReason.ABORT
    harness.fake_clock.advance(3.0)
    harness.step()
    assert second.finish_reason is FinishReason.ERROR
    assert harness.engine.load().num_paused == 0
