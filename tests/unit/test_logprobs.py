"""What deltas tell of tokens: log-probabilities of the raw logits, ids, what ended the output."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import Delta, FinishReason
from stoker.config import SpeculationConfig
from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.ledger import OutputLedger
from stoker.engine.logprobs import LEAST_LOGPROB, LogprobTeller, TokenNames
from stoker.engine.ngram import NgramDrafter
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker.testing.scripted import ScriptedTokenizer
from stoker.types import TokenLogprob
from stoker_plugins.fcfs import FirstComeFirstServed

END = 257
CHOSEN = 8 - math.log(math.exp(8) + 260)  # of the scripted model's own choice
OTHER = -math.log(math.exp(8) + 260)


def make(**options: Any) -> EngineHarness:
    runtime = ScriptedRuntime(
        lanes=4, context_length=600, options=ScriptedOptions(**({"end_every": 0} | options))
    )
    return EngineHarness(FirstComeFirstServed(), runtime=runtime)


def told(request: Submitted, index: int = 0) -> list[TokenLogprob]:
    return [entry for d in request.deltas if d.index == index for entry in d.logprobs]


def last(request: Submitted) -> Delta:
    delta = request.finish()
    assert delta is not None
    return delta


# --------------------------------------------------------------------------- the numbers


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), vocab=st.sampled_from([3, 50, 3000]), num_top=st.integers(0, 20))
def test_entries_are_those_of_an_obvious_log_softmax(seed: int, vocab: int, num_top: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(scale=rng.uniform(0.1, 30), size=(7, vocab)).astype(np.float32)
    tokens = rng.integers(0, min(vocab, 256), 7).tolist()
    entries = LogprobTeller(TokenNames(ScriptedTokenizer())).of_rows(rows, tokens, num_top)
    for row, token, entry in zip(rows.astype(float), tokens, entries, strict=True):
        logprobs = row - (row.max() + math.log(np.exp(row - row.max()).sum()))
        assert entry.token_id == token
        assert entry.data == bytes((token,))
        assert entry.logprob == pytest.approx(logprobs[token], abs=1e-4)
        best = np.argsort(-row, kind="stable")[:num_top]
        assert [top.token_id for top in entry.top] == best.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(logprobs[best], abs=1e-4)


def test_infinite_logits_make_finite_numbers() -> None:
    rows = np.array([[0.0, -np.inf, 1.0]], np.float32)
    entry = LogprobTeller(TokenNames(ScriptedTokenizer())).of_rows(rows, [1], 3)[0]
    assert entry.logprob == LEAST_LOGPROB
    assert entry.top[-1].logprob == LEAST_LOGPROB


def test_every_token_has_its_entry_and_plain_requests_have_none() -> None:
    harness = make()
    plain = harness.submit("hello", max_tokens=20)
    asking = harness.submit("hello", max_tokens=20, logprobs=2, wants_token_ids=True)
    only = harness.submit("hello", max_tokens=20, logprobs=0, n=2)
    harness.run()
    assert plain.text() == asking.text() == only.text(1)
    assert all(d.logprobs == () == d.token_ids for d in plain.deltas)
    assert last(plain).cumulative_logprob is None
    entries = told(asking)
    assert b"".join(entry.data for entry in entries).decode() == asking.text()
    assert [e.token_id for e in entries] == [t for d in asking.deltas for t in d.token_ids]
    assert all(e.logprob == pytest.approx(CHOSEN, abs=1e-4) for e in entries)
    assert all(e.top[0].token_id == e.token_id and len(e.top) == 2 for e in entries)
    assert all(e.top[1].logprob == pytest.approx(OTHER, abs=1e-4) for e in entries)
    assert last(asking).cumulative_logprob == pytest.approx(20 * CHOSEN, abs=1e-3)
    assert told(only) == told(only, 1) == [structs_without_top(entry) for entry in entries]
    assert harness.engine._logprobs.num_asking == 0


def structs_without_top(entry: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(token_id=entry.token_id, data=entry.data, logprob=entry.logprob)


def test_logits_are_raw_whatever_the_request_makes_of_them() -> None:
    harness = make()
    plain = harness.submit("hello", max_tokens=10, logprobs=1)
    bent = harness.submit(
        "hello",
        max_tokens=10,
        logprobs=1,
        logit_bias={ord("!"): 100.0},
        temperature=0.5,
        repetition_penalty=3.0,
    )
    harness.run()
    assert bent.text() == "!" * 10
    assert all(e.logprob == pytest.approx(OTHER, abs=1e-4) for e in told(bent))
    assert told(bent)[0].top == told(plain)[0].top


def test_with_drafts_every_accepted_token_has_its_entry() -> None:
    def run(*, drafts: bool) -> tuple[Submitted, int]:
        runtime = ScriptedRuntime(
            lanes=4, context_length=600, options=ScriptedOptions(period=7, surprise_every=9)
        )
        harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=runtime,
            drafter=NgramDrafter(2, 4) if drafts else None,
            speculation=SpeculationConfig(adaptive=False, max_draft_tokens=6),
        )
        asking = harness.submit(
            "hello world", max_tokens=90, logprobs=3, wants_token_ids=True, stop=("eta", "zz")
        )
        harness.submit("another one", max_tokens=90)
        return asking, harness.run()

    (slow, slow_steps), (quick, quick_steps) = run(drafts=False), run(drafts=True)
    assert quick_steps < slow_steps
    assert told(slow) == told(quick)
    assert [t for d in slow.deltas for t in d.token_ids] == [
        t for d in quick.deltas for t in d.token_ids
    ]
    assert last(slow).cumulative_logprob == pytest.approx(last(quick).cumulative_logprob)


# --------------------------------------------------------------------------- endings


def test_end_tokens_have_no_entry_but_an_id() -> None:
    harness = make(end_every=6)
    asking = harness.submit("hello", max_tokens=200, logprobs=1, wants_token_ids=True)
    harness.run()
    ids = [t for d in asking.deltas for t in d.token_ids]
    assert asking.finish_reason is FinishReason.STOP
    assert last(asking).stop is None
    assert ids[-1] == END
    assert [e.token_id for e in told(asking)] == ids[:-1]
    assert last(asking).usage.completion_tokens == len(ids)  # type: ignore[union-attr]


def test_control_tokens_that_go_by_are_told_by_name() -> None:
    harness = make(end_every=6)
    asking = harness.submit("hello", max_tokens=60, logprobs=0, ignore_eos=True)
    harness.run()
    assert [e.data for e in told(asking) if e.token_id == END] == [
        b"<|end|>" for e in told(asking) if e.token_id == END
    ]
    assert len(told(asking)) == 60


@pytest.mark.parametrize("include_stop", [False, True])
def test_stop_tokens_end_the_output(include_stop: bool) -> None:
    harness = make()
    plain = harness.submit("hello", max_tokens=60)
    harness.run()
    letter = plain.text()[20]
    first = plain.text().index(letter)
    asking = harness.submit(
        "hello",
        max_tokens=60,
        stop_token_ids=(ord(letter),),
        include_stop=include_stop,
        logprobs=0,
        wants_token_ids=True,
    )
    harness.run()
    assert asking.text() == plain.text()[: first + include_stop]
    assert (last(asking).finish_reason, last(asking).stop) == (FinishReason.STOP, ord(letter))
    assert len(told(asking)) == first + include_stop
    assert len([t for d in asking.deltas for t in d.token_ids]) == first + 1


def test_the_stop_string_that_ended_the_output_is_told() -> None:
    harness = make()
    plain = harness.submit("hello", max_tokens=60)
    harness.run()
    stop = plain.text()[30:34]
    before = plain.text().index(stop)
    found = harness.submit("hello", max_tokens=60, stop=("nowhere", stop))
    kept = harness.submit("hello", max_tokens=60, stop=(stop,), include_stop=True, logprobs=0)
    harness.run()
    assert (found.text(), last(found).stop) == (plain.text()[:before], stop)
    assert (kept.text(), last(kept).stop) == (plain.text()[: before + 4], stop)
    assert len(told(kept)) == before + 4


def test_nothing_ends_the_output_before_min_tokens() -> None:
    harness = make(end_every=5)
    free = harness.submit("hello", max_tokens=100, ignore_eos=True)
    early = harness.submit("hello", max_tokens=100)
    late = harness.submit("hello", max_tokens=100, min_tokens=50, wants_token_ids=True)
    harness.run()
    assert last(early).usage.completion_tokens < 50  # type: ignore[union-attr]
    ids = [t for d in late.deltas for t in d.token_ids]
    assert len(ids) > 50
    assert ids.index(END) == len(ids) - 1 >= 50 - 1
    letter = free.text()[0]
    strings = harness.submit(
        "hello", max_tokens=100, ignore_eos=True, min_tokens=40, stop=(letter,)
    )
    tokens = harness.submit(
        "hello", max_tokens=100, min_tokens=40, stop_token_ids=tuple(b"etaoin shrdlu")
    )
    harness.run()
    assert last(strings).usage.completion_tokens >= 40  # type: ignore[union-attr]
    assert last(strings).stop == letter
    assert last(tokens).usage.completion_tokens >= 40  # type: ignore[union-attr]


# --------------------------------------------------------------------------- held back with the text


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(0, len(data)), max_size=12)) | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(
    st.data(),
    st.text("abé€😀", max_size=24),
    st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3),
    st.booleans(),
    st.integers(0, 12),
)
def test_entries_come_with_their_text(
    data: st.DataObject, text: str, stop: list[str], include_stop: bool, min_tokens: int
) -> None:
    pieces = data.draw(cut(text.encode()))
    for at in sorted(data.draw(st.sets(st.integers(0, len(pieces)), max_size=4)), reverse=True):
        pieces.insert(at, b"")  # a control token
    detokenizer = Detokenizer(
        TokenText(lambda token: pieces[token]),
        tuple(stop),
        include_stop=include_stop,
        min_tokens=min_tokens,
    )
    ledger = OutputLedger(wants_token_ids=False)
    out, entries = "", []
    for token, piece in enumerate(pieces):
        entry = TokenLogprob(token_id=token, data=piece, logprob=-1.0)
        out += ledger.push(token, entry, detokenizer)
        entries += ledger.release(detokenizer)
        if detokenizer.stopped:
            break
        # What was told is out: its text, with the whole of the character that it is a part of.
        assert out.encode().startswith(b"".join(e.data for e in entries))
    tail = detokenizer.finish()
    entries += ledger.finish(tail, detokenizer)
    raw = (out + tail).encode()
    assert [e.token_id for e in entries] == list(range(len(entries)))
    if not detokenizer.stopped:
        assert len(entries) == len(pieces)
        return
    assert b"".join(e.data for e in entries).startswith(raw)  # nothing of the text is without
    bytes_before = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    for e in entries:  # and nothing is told that begins behind it
        assert bytes_before[e.token_id] < len(raw) or not e.data
