"""Snapshots out of lanes and back, with a real store: what is wanted is not lost on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.engine.snapshot_disk import SnapshotDirectory
from stoker.engine.snapshot_store import StoreLimits, TieredStore
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime
from stoker_plugins.fcfs import FirstComeFirstServed

LENGTH = 60
BYTES = 8 * (LENGTH + 5)  # a little more than a snapshot of one prompt and its answer
WAIT_S = 30.0


def prompt(number: int) -> str:
    return f"{number:03}" + "x" * (LENGTH - 3)


def harness(store: TieredStore, lanes: int = 1) -> EngineHarness:
    runtime = ScriptedRuntime(lanes=lanes, options=ScriptedOptions(snapshot=True))
    return EngineHarness(FirstComeFirstServed(), runtime=runtime, store=store)


def ask(engine: EngineHarness, number: int) -> tuple[str, int]:
    submitted = engine.submit(prompt(number), max_tokens=4)
    engine.run()
    usage = submitted.deltas[-1].usage
    assert usage is not None
    return submitted.text(), usage.cached_tokens


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_what_is_evicted_for_a_restore_does_not_push_out_what_is_restored() -> None:
    """There is room for two: the third one's snapshot takes the room of the first, which is just wanted."""
    store = TieredStore(StoreLimits(2 * BYTES))
    engine = harness(store)
    fresh = [ask(engine, number) for number in range(3)]
    text, cached = ask(engine, 0)
    assert text == fresh[0][0]
    assert cached == LENGTH - 1
    stats = engine.engine.scheduler.lanes.stats()
    assert stats.hits_by_way["restore"] == 1
    assert stats.num_store_errors == 0


def test_reading_from_disk_begins_while_a_request_waits(folder: Path) -> None:
    store = TieredStore(
        StoreLimits(0, 10**6), fingerprint="0" * 32, directory=SnapshotDirectory(folder, "0" * 32)
    )
    engine = harness(store)
    fresh = [ask(engine, number) for number in range(4)]
    running = engine.submit(prompt(3), max_tokens=200)
    engine.step()
    waiting = engine.submit(prompt(0), max_tokens=4)
    found = store.match(engine.engine.scheduler.waiting.copy().popitem()[1].tokens, "")
    assert found is not None
    assert store.is_ready(found.key, WAIT_S)
    engine.run()
    assert running.finish() is not None
    assert waiting.text() == fresh[0][0]
    usage = waiting.deltas[-1].usage
    assert usage is not None
    assert usage.cached_tokens == LENGTH - 1
    store.close()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_texts_are_right_whatever_is_kept_where(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        on_disk = data.draw(st.booleans(), label="disk")
        store = TieredStore(
            StoreLimits(data.draw(st.sampled_from([0, BYTES, 3 * BYTES])), 10**6 if on_disk else 0),
            fingerprint="0" * 32,
            directory=SnapshotDirectory(Path(name), "0" * 32) if on_disk else None,
        )
        engine = harness(store, lanes=data.draw(st.integers(1, 3)))
        asked = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=12))
        submitted = []
        for number in asked:
            submitted.append((number, engine.submit(prompt(number), max_tokens=4)))
            for _ in range(data.draw(st.integers(0, 3))):
                engine.step()
        engine.run()
        runtime = engine.runtime
        assert isinstance(runtime, ScriptedRuntime)
        for number, one in submitted:
            tokens = list(one.request.prompt_token_ids)
            assert one.text() == runtime.expected_text(tokens, 4), number
        assert engine.engine.scheduler.lanes.stats().num_store_errors == 0
        store.close()
