"""Log-probabilities of prompts and answers are llama.cpp's own.

How llama.cpp rounds depends on how a prompt is cut, and with quantised activations the smallest difference
grows: the same file gives log-probabilities that differ by 0.04 on average and by up to 0.5 for a single
token between its own kernels. So what must agree token by token is computed here in the same pieces.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np
import pytest

from stoker import StepInput, StepOutput
from stoker.engine import scoring
from stoker.testing import EngineHarness
from stoker.types import TokenLogprob
from stoker_backend_gguf.runtime import GgufRuntime
from stoker_plugins.fcfs import FirstComeFirstServed

pytestmark = [pytest.mark.model, pytest.mark.slow]

TEXT = (
    "The sea is a large body of salt water that covers most of the Earth. It moderates the climate, and it "
    "is home to fish, whales and many other animals. Ships have crossed it for thousands of years, carrying "
    "people, grain, cloth and news from one harbour to the next. Who lives beside it learns to read its "
    "colours: green over sand, blue over depth, grey before rain. "
)
TOLERANCE = 1e-2


def theirs(
    runtime: GgufRuntime, tokens: Sequence[int], pieces: Sequence[int]
) -> np.ndarray[Any, Any]:
    """``float64[len(tokens), vocab]``: the log-probabilities after each token.

    By llama.cpp's C functions alone, in a context of its own with default settings, one call a piece.
    """
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(runtime._model.pointer, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    parts, done = [], 0
    try:
        for piece in pieces:
            batch.n_tokens = piece
            for at in range(piece):
                batch.token[at], batch.pos[at] = tokens[done + at], done + at
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
                batch.logits[at] = 1
            assert llama_cpp.llama_decode(context, batch) == 0
            shape = (piece, runtime.info.vocab_size)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape)
            parts.append(logits.astype(np.float64))
            done += piece
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    assert done == len(tokens)
    rows = np.concatenate(parts)
    for row in rows:  # whole, it would take gigabytes
        row -= row.max() + np.log(np.exp(row - row.max()).sum())
    return rows


class Recorder:
    """A runtime's steps, and how many rows of each lane they had."""

    def __init__(self, runtime: GgufRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces: dict[int, list[int]] = {}
        self._step = runtime.step
        monkeypatch.setattr(runtime, "step", self.step)

    def step(self, step: StepInput) -> StepOutput:
        for lane in np.unique(step.lanes).tolist():
            self.pieces.setdefault(lane, []).append(int((step.lanes == lane).sum()))
        return self._step(step)


def harness_of(runtime: GgufRuntime) -> EngineHarness:
    for lane in range(runtime.info.num_lanes):
        runtime.truncate(lane, 0)
    return EngineHarness(FirstComeFirstServed(), runtime=runtime, clock=time.monotonic)


def check(entries: Sequence[TokenLogprob], expected: np.ndarray[Any, Any]) -> float:
    """Every entry agrees with its row; returns the largest difference."""
    largest = 0.0
    for entry, row in zip(entries, expected, strict=True):
        largest = max(largest, abs(entry.logprob - row[entry.token_id]))
        best = np.sort(np.partition(row, -3)[-3:])[::-1][: len(entry.top)]
        told = np.array([top.logprob for top in entry.top])
        largest = max(largest, float(np.abs(told - best).max()))
    assert largest < TOLERANCE
    return largest


@pytest.mark.parametrize(("repeats", "max_rows"), [(1, 10), (2, 512), (3, 70)])
def test_a_prompt_is_as_likely_as_llama_cpp_says(
    partitioned: GgufRuntime, monkeypatch: pytest.MonkeyPatch, max_rows: int, repeats: int
) -> None:
    monkeypatch.setattr(scoring, "_MAX_LOGITS_BYTES", 4 * partitioned.info.vocab_size * max_rows)
    recorder = Recorder(partitioned, monkeypatch)
    harness = harness_of(partitioned)
    beside = harness.submit("Once upon a time", max_tokens=20, ignore_eos=True)
    harness.step()
    text = (TEXT * repeats)[:-1]
    scored = harness.submit(text, prompt_logprobs=3, max_tokens=0)
    harness.step()
    lane = scored.sequences[0].lane
    harness.run()
    tokens = list(scored.request.prompt_token_ids)
    told = scored.deltas[0].prompt_logprobs
    assert told is not None
    entries = [entry for entry in told if entry is not None]
    assert len(entries) == len(tokens) - 1
    assert b"".join(entry.data for entry in entries).decode() in text
    pieces = recorder.pieces[lane]
    largest = check(entries, theirs(partitioned, tokens, pieces)[:-1])
    whole = theirs(partitioned, tokens, [len(tokens)])[:-1]
    ours = np.array([entry.logprob for entry in entries])
    apart = ours - whole[np.arange(len(ours)), tokens[1:]]
    print(f"same pieces: {largest:.6f} at most; at once: {apart.mean():+.4f} on average")
    assert abs(apart.mean()) < 0.05
    assert len(beside.text()) > 0


def test_an_answer_is_as_likely_as_llama_cpp_says(
    partitioned: GgufRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(partitioned, monkeypatch)
    harness = harness_of(partitioned)
    asked = harness.submit(
        TEXT, max_tokens=40, logprobs=2, temperature=0.8, seed=3, wants_token_ids=True
    )
    harness.step()
    lane = asked.sequences[0].lane
    harness.run()
    entries = [entry for delta in asked.deltas for entry in delta.logprobs]
    output = [token for delta in asked.deltas for token in delta.token_ids]
    tokens = [*asked.request.prompt_token_ids, *output][:-1]
    assert len(entries) >= len(output) - 1
    expected = theirs(partitioned, tokens, recorder.pieces[lane])[-len(output) :]
    print(f"{check(entries, expected[: len(entries)]):.6f} at most")
