"""The rarer filters against slow and obvious ones: DRY, typical, XTC, min_tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import Request, SamplingParams
from stoker.config import SpeculationConfig
from stoker.engine import sampler
from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.filters import exclude_top_choices, make_rules, typical
from stoker.engine.ngram import NgramDrafter
from stoker.engine.sequence import Sequence
from stoker.testing import EngineHarness, ScriptedOptions, ScriptedRuntime
from stoker_plugins.fcfs import FirstComeFirstServed

NAMES = [b"a", b"b", b"c", b"ab", b"\n", b"c\nb", b"aa", b"<end>"]
END = 7


def name(token: int) -> bytes:
    return NAMES[token]


def sequence(prompt: list[int], output: list[int] = [], **sampling: Any) -> Sequence:  # noqa: B006
    request = Request(
        request_id="r",
        model="m",
        prompt_token_ids=prompt,
        sampling=SamplingParams(**({"seed": 7, "max_tokens": 3000} | sampling)),
    )
    made = Sequence(request, 0, None, Detokenizer(TokenText(name)), 10_000)  # type: ignore[arg-type]
    made.rules = make_rules(request.sampling, {END}, name)
    for token in output:
        made.append(token)
    return made


# --------------------------------------------------------------------------- DRY


def slow_dry(tokens: list[int], params: SamplingParams) -> dict[int, float]:
    """The penalty of each token, straight from the definition."""
    last_n = params.dry_penalty_last_n
    tokens = tokens[-last_n:] if last_n > 0 else tokens
    breakers = [text.encode() for text in params.dry_sequence_breakers]
    penalties: dict[int, float] = {}
    for token in range(len(NAMES)):
        if any(breaker in NAMES[token] for breaker in breakers):
            continue
        best = -1
        for at in range(len(tokens) - 1):  # a repetition that ends here
            if tokens[at + 1] != token:
                continue
            length = 0
            while length <= at and tokens[at - length] == tokens[len(tokens) - 1 - length]:
                length += 1
            best = max(best, min(length, reach(tokens, breakers)))
        if best >= params.dry_allowed_length and len(tokens) > params.dry_allowed_length:
            exponent = best - params.dry_allowed_length
            if params.dry_base > 1.000001:
                exponent = min(exponent, int(88.7228391 / math.log(params.dry_base)))
            penalties[token] = params.dry_multiplier * params.dry_base**exponent
    return penalties


def reach(tokens: list[int], breakers: list[bytes]) -> int:
    """Tokens at the end of which none has to do with a breaker."""
    text = b"".join(map(name, tokens))
    ends = max((text.rfind(b) + len(b) for b in breakers if b in text), default=0)
    starts = [len(b"".join(map(name, tokens[:at]))) for at in range(len(tokens))]
    return sum(start >= ends for start in starts)


# --------------------------------------------------------------------------- typical and XTC


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 700), mass=st.floats(0.01, 0.999))
def test_typical_keeps_the_least_surprising_about_the_mean(
    seed: int, size: int, mass: float
) -> None:
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.normal(scale=rng.uniform(0, 6), size=size)).astype(np.float32)
    weights[rng.random(size) < 0.1] = 0.0
    weights[rng.integers(size)] = 1.0
    kept = typical(weights, mass)
    p = weights.astype(float) / weights.sum(dtype=float)
    entropy = -sum(x * math.log(x) for x in p if x)
    order = sorted(range(size), key=lambda i: (abs(-math.log(p[i]) - entropy) if p[i] else 1e9, i))
    total, expected = 0.0, []
    for token in order:
        expected.append(token)
        total += p[token]
        if total > mass:
            break
    # Sums in another order may round otherwise just at the border.
    assert len(set(kept.tolist()) ^ set(expected)) <= (abs(total - mass) < 1e-6)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 12), threshold=st.floats(1e-6, 0.5))
def test_xtc_keeps_the_least_likely_of_the_likely(seed: int, size: int, threshold: float) -> None:
    weights = np.random.default_rng(seed).integers(0, 6, size).astype(np.float32)
    weights[0] = 3.0
    total = float(weights.sum())
    ranked = sorted(range(size), key=lambda i: (-weights[i], i))
    likely = [i for i in ranked if float(weights[i]) >= threshold * total]
    expected = sorted(set(range(size)) - set(likely[:-1]))
    kept = exclude_top_choices(weights, threshold)
    assert (list(range(size)) if kept is None else kept.tolist()) == expected


@pytest.mark.slow
def test_xtc_applies_as_often_as_it_should_and_independently_of_the_draw() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    seq = sequence([1], xtc_probability=0.4, xtc_threshold=0.25)
    plain = sequence([1])
    counts = np.zeros((3, 3))
    for _ in range(2500):
        with_xtc, without = sampler.sample(logits, [seq])[0], sampler.sample(logits, [plain])[0]
        counts[without, with_xtc] += 1
        seq.append(with_xtc)
        plain.append(with_xtc)
    shares = counts.sum(axis=0) / 2500
    # With it 0 goes: 1 and 2 share at 3 to 2.
    assert np.abs(shares - [0.5 * 0.6, 0.3 * 0.6 + 0.6 * 0.4, 0.2 * 0.6 + 0.4 * 0.4]).max() < 0.03
    assert counts[0, 0] / counts[0].sum() == pytest.approx(0.6, abs=0.04)
    assert sampler.sample(logits, [sequence([1], xtc_probability=1.0, xtc_threshold=0.51)])


# --------------------------------------------------------------------------- min_tokens


def test_ends_are_forbidden_until_min_tokens() -> None:
    logits = np.zeros((1, len(NAMES)), np.float32)
    logits[0, END], logits[0, 3], logits[0, 5] = 9.0, 8.0, 7.0
    wanted = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (3,)}
    assert sampler.sample(logits, [sequence([1], [], **wanted)]) == [5]
    assert sampler.sample(logits, [sequence([1], [2], **wanted)]) == [5]
    assert sampler.sample(logits, [sequence([1], [2, 2], **wanted)]) == [END]
    assert sampler.sample(logits, [sequence([1], ignore_eos=True, **wanted)]) == [END]
    only = np.full((1, len(NAMES)), -np.inf, np.float32)
    only[0, END] = 1.0
    assert sampler.sample(only, [sequence([1], [], **wanted)]) == [END]


# --------------------------------------------------------------------------- with drafts


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        {"dry_multiplier": 4.0, "temperature": 0.0, "dry_sequence_breakers": (" ",)},
        {"dry_multiplier": 2.0, "temperature": 1.0},
        {"typical_p": 0.3, "temperature": 1.5},
        {"xtc_probability": 0.5, "xtc_threshold": 0.001, "temperature": 1.2},
        {"min_tokens": 60, "temperature": 1.0, "stop": ("e", "t")},
        {
            "typical_p": 0.9,
            "xtc_probability": 0.7,
            "xtc_threshold": 0.01,
            "dry_multiplier": 1.0,
            "top_k": 40,
            "top_p": 0.95,
            "min_p": 0.001,
            "frequency_penalty": 0.2,
        },
    ],
)
def test_the_same_tokens_with_and_without_drafts(sampling: dict[str, Any]) -> None:
    def run(*, drafts: bool) -> list[tuple[int, ...]]:
        runtime = ScriptedRuntime(
            lanes=4,
            context_length=600,
            options=ScriptedOptions(period=7, surprise_every=9, end_every=40),
        )
        harness = EngineHarness(
            FirstComeFirstServed(),
            runtime=runtime,
            drafter=NgramDrafter(2, 4) if drafts else None,
            speculation=SpeculationConfig(adaptive=False, max_draft_tokens=6),
        )
        requests = [
            harness.submit(
                f"hello world {seed}",
                wants_token_ids=True,
                **({"max_tokens": 120, "seed": seed} | sampling),
            )
            for seed in range(3)
        ]
        harness.run()
        return [tuple(t for d in request.deltas for t in d.token_ids) for request in requests]

    assert run(drafts=True) == run(drafts=False)
