"""Predicted outputs make steps fewer, whatever they say, and never change a token."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import Usage
from stoker.config import SpeculationConfig
from stoker.engine.ngram import NgramDrafter
from stoker.engine.prediction import PredictedText
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime, Submitted
from stoker_plugins.fcfs import FirstComeFirstServed


def run(
    predicted: Any = (), *, drafts: bool = True, adaptive: bool = False, **sampling: Any
) -> tuple[Submitted, int]:
    harness = EngineHarness(
        FirstComeFirstServed(),
        runtime=ScriptedRuntime(lanes=2, context_length=600, options=ScriptedOptions()),
        drafter=NgramDrafter(2, 4) if drafts else None,
        speculation=SpeculationConfig(adaptive=adaptive, max_draft_tokens=6),
    )
    request = harness.submit("hello", predicted=predicted, **({"max_tokens": 200} | sampling))
    return request, harness.run()


def usage(request: Submitted) -> Usage:
    last = request.finish()
    assert last is not None
    assert last.usage is not None
    return last.usage


def test_a_right_prediction_is_accepted_whole() -> None:
    plain, plain_steps = run()
    predicted, steps = run(plain.text())
    assert predicted.text() == plain.text()
    assert plain_steps > 150
    assert steps <= 200 // 7 + 3
    assert usage(predicted).rejected_prediction_tokens <= 6
    assert usage(predicted).accepted_prediction_tokens >= 200 - steps
    assert usage(plain).accepted_prediction_tokens == usage(plain).rejected_prediction_tokens == 0
    assert usage(predicted).completion_tokens == 200


def test_after_an_edit_the_place_is_found_again() -> None:
    plain, plain_steps = run()
    text = plain.text()
    edited = text[:50] + "SOMETHING ELSE" + text[60:100] + text[115:]
    predicted, steps = run(edited)
    assert predicted.text() == text
    assert steps < plain_steps / 3
    assert usage(predicted).rejected_prediction_tokens > 0


@pytest.mark.parametrize("predicted", ["x", "nothing of the kind at all", [300_000, -5], [257] * 9])
def test_a_wrong_prediction_changes_nothing(predicted: Any) -> None:
    plain, _ = run(drafts=False)
    wrong, _ = run(predicted)
    assert wrong.text() == plain.text()
    assert usage(wrong).accepted_prediction_tokens <= 2


def test_without_a_drafter_a_prediction_is_of_no_use() -> None:
    plain, _ = run(drafts=False)
    predicted, _ = run(plain.text(), drafts=False)
    assert predicted.text() == plain.text()
    assert usage(predicted).accepted_prediction_tokens == 0


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_prediction_gives_the_same_tokens(seed: int) -> None:
    rng = random.Random(seed)
    sampling: dict[str, Any] = {
        "max_tokens": rng.randint(1, 60),
        "temperature": rng.choice([0.0, 1.5]),
        "seed": seed,
        "stop": rng.choice([(), ("e",), ("th", "zz")]),
        "logprobs": rng.choice([None, 1]),
    }
    plain, _ = run(drafts=False, **sampling)
    text = list(plain.text().encode())
    for _ in range(rng.randint(0, 3)):
        at = rng.randint(0, len(text))
        text[at : at + rng.randint(0, 5)] = rng.choices(b"etaoin ", k=rng.randint(0, 5))
    predicted, _ = run(text, adaptive=rng.random() < 0.3, **sampling)
    assert predicted.text() == plain.text()
    assert predicted.finish_reason == plain.finish_reason
    assert [e for d in predicted.deltas for e in d.logprobs] == [
        e for d in plain.deltas for e in d.logprobs
    ]


def by_hand(prediction: list[int], tail: list[int], used: int, least: int) -> int | None:
    """The place after the longest end of the output, the first behind what was used or else the last."""
    for n in range(len(tail), least - 1, -1):
        places = [
            at
            for at in range(n, len(prediction))
            if prediction[at - n : at] == tail[len(tail) - n :]
        ]
        if places:
            return next((at for at in places if at >= used), places[-1])
    return None


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    prediction=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    output=st.lists(st.integers(0, 2), max_size=40),
)
def test_the_place_is_the_one_of_the_definition(prediction: list[int], output: list[int]) -> None:
    text = PredictedText(prediction, 2, 4)
    at: int | None = 0
    used = 0
    for length in range(len(output) + 1):
        if length:
            follows = (
                at is not None and at < len(prediction) and prediction[at] == output[length - 1]
            )
            at = at + 1 if follows and at is not None else None
            if at is None:
                at = by_hand(prediction, output[max(0, length - 4) : length], used, 2)
        used = max(used, at or 0)
        found = text.lookup(np.array(output[:length], np.int32), 5).tolist()
        assert found == ([] if at is None else prediction[at : at + 5])
