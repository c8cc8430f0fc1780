"""Steps, lanes and their ends; what the conformance suite does not ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import stoker
from legacy_ggml import ARCHITECTURES, CONTEXT
from stoker_backend_ctransformers.runtime import EXACT_BLOCK

Load = Callable[..., Any]
Run = Callable[..., Any]
PROMPT = [(17 * i + 5) % 250 for i in range(100)]


def test_a_full_lane_is_no_room_and_changes_nothing(
    load: Load, run: Run, build_step: Callable[..., Any]
) -> None:
    runtime = load("gpt2")
    run(runtime, (0, PROMPT, 0))
    row = run(runtime, (1, PROMPT[:5], 0))
    over = build_step((1, [1], 5), (0, [1] * (CONTEXT - 99), 100))
    output = runtime.step(over)
    assert output.no_room
    assert output.logits.shape == (0, runtime.info.vocab_size)
    # Lane 1 comes first in that step, and was not computed either.
    runtime.truncate(1, 4)
    np.testing.assert_array_equal(run(runtime, (1, PROMPT[4:5], 4)), row)
    assert not runtime.step(build_step((0, [1] * (CONTEXT - 100), 100))).no_room


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"falcon"}))
def test_truncation_is_exact(architecture: str, load: Load, run: Run) -> None:
    runtime = load(architecture)
    run(runtime, (0, PROMPT, 0))
    assert runtime.truncate(0, 64) == 64
    run(runtime, (0, [9] * 20, 64))  # other tokens, where the old ones' keys lay
    assert runtime.truncate(0, 64) == 64
    assert runtime.truncate(0, 1000) == 64
    again = run(runtime, (0, PROMPT[64:], 64))
    fresh = run(runtime, (1, PROMPT[:64], 0)), run(runtime, (1, PROMPT[64:], 64))
    np.testing.assert_array_equal(again, fresh[1])


def test_reset_keeps_all_or_nothing(load: Load, run: Run) -> None:
    runtime = load("gpt2", truncation="reset")
    first = run(runtime, (0, PROMPT, 0))
    assert runtime.truncate(0, 100) == 100
    assert runtime.truncate(0, 99) == 0
    np.testing.assert_array_equal(run(runtime, (0, PROMPT, 0)), first)
    assert runtime.truncate(1, 5) == 0


def test_a_lane_that_failed_and_cannot_go_back_is_empty(
    load: Load, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for architecture, kept in (("falcon", 0), ("gpt2", 5)):
        runtime = load(architecture)
        first = run(runtime, (0, PROMPT[:20], 0))
        runtime.truncate(0, 0)
        run(runtime, (0, PROMPT[:5], 0))
        with monkeypatch.context() as broken:
            failed = {"ctransformers_llm_batch_eval": lambda *_: False}
            broken.setattr(runtime._instances[0], "_model", type("Failing", (), failed)())
            with pytest.raises(stoker.EngineError, match="failed on 3 tokens at 5"):
                run(runtime, (0, PROMPT[5:8], 5))
        assert runtime.truncate(0, 5) == kept
        again = run(runtime, (0, PROMPT[kept:20], kept))
        np.testing.assert_allclose(again, first, atol=1e-4)


def test_scoring_leaves_kv_as_a_plain_prefill_does(load: Load, run: Run) -> None:
    """Each row's logits need an evaluation of their own, which rounds otherwise."""
    runtime = load("gpt2")
    plain, scored = (run(runtime, (lane, PROMPT, 0), every=lane == 1) for lane in (0, 1))
    np.testing.assert_allclose(scored[-1:], plain, atol=1e-5)
    rows = run(runtime, (0, [3], 100), (1, [3], 100))
    np.testing.assert_array_equal(rows[0], rows[1])


@pytest.mark.parametrize("batch_size", [1, 5, 16, 32, 70, 512])
def test_batches_of_any_size_keep_the_promise(batch_size: int, load: Load, run: Run) -> None:
    runtime = load("gpt2", batch_size=batch_size)
    rows = []
    for lane, cuts in enumerate(([64, 32], [32, 32, 32], [96])):
        start = 0
        for count in cuts:
            run(runtime, (lane, PROMPT[start : start + count], start))
            start += count
        assert start % EXACT_BLOCK == 0
        rows.append(run(runtime, (lane, PROMPT[start:], start))[0])
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


def test_malformed_steps_change_nothing(
    load: Load, run: Run, build_step: Callable[..., Any]
) -> None:
    runtime = load("gpt2")
    row = run(runtime, (0, PROMPT[:5], 0))
    bad = [
        ((0, [1], 4), "do not continue at position 5"),
        ((0, [1], 6), "do not continue at position 5"),
        ((7, [1], 0), "there are 3"),
        ((1, [runtime.info.vocab_size], 0), "not within the vocabulary"),
        ((1, [-1], 0), "not within the vocabulary"),
    ]
    for rows, message in bad:
        with pytest.raises(stoker.EngineError, match=message):
            runtime.step(build_step(rows))
    with pytest.raises(stoker.EngineError, match="not together"):
        runtime.step(build_step((0, [1], 5), (1, [1], 0), (0, [1], 6)))
    runtime.truncate(0, 4)
    np.testing.assert_array_equal(run(runtime, (0, PROMPT[4:5], 4)), row)


def test_nothing_can_be_done_after_closing(load: Load, build_step: Callable[..., Any]) -> None:
    runtime = load("gpt2")
    runtime.close()
    runtime.close()
    with pytest.raises(stoker.EngineError, match="closed"):
        runtime.step(build_step((0, [1], 0)))
    with pytest.raises(stoker.EngineError, match="closed"):
        runtime.truncate(0, 0)


def test_two_models_at_once_do_not_disturb_each_other(load: Load, run: Run) -> None:
    """Instances of one architecture share a buffer for intermediate results."""
    small, other, llama = load("gpt2"), load("gpt2", half=True), load("llama")
    alone = [run(runtime, (0, PROMPT[:40], 0)) for runtime in (small, other, llama)]
    for start in range(0, 40, 10):
        rows = [
            run(runtime, (1, PROMPT[start : start + 10], start))
            for runtime in (small, other, llama)
        ]
    for row, expected in zip(rows, alone, strict=True):
        np.testing.assert_allclose(row, expected, atol=1e-3)
