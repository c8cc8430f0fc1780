"""Tokens drawn by torch against the core's numpy sampler: the same ones, and what the distribution says."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import Request, SampleInput, SamplingParams
from stoker.engine import sampler
from stoker.engine.detokenizer import Detokenizer, TokenText
from stoker.engine.filters import TokenRules
from stoker.engine.sample_inputs import sample_input
from stoker.engine.sequence import Sequence
from stoker.testing import reference_sample
from stoker_backend_torch import draws
from stoker_backend_torch.sampler import TorchSampler, can_sample_on

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def sequence(**sampling: Any) -> Sequence:
    request = Request(
        request_id="r",
        model="m",
        prompt_token_ids=[0, 3],
        sampling=SamplingParams(**({"seed": 7, "max_tokens": 50} | sampling)),
    )
    stream: Any = None  # nobody reads it
    made = Sequence(request, 0, stream, Detokenizer(TokenText(lambda _: b"")), 100)
    for token in (1, 2, 2, 4):
        made.append(token)
    return made


def drawn(logits: np.ndarray, batch: SampleInput, device: torch.device = CPU) -> list[int]:
    tokens = TorchSampler(device, logits.shape[1]).sample(
        torch.from_numpy(logits).to(device), batch
    )
    assert tokens.dtype == np.int64
    found: list[int] = tokens.tolist()
    return found


def is_rounding(row: np.ndarray, made: Sequence, token: int) -> bool:
    """Whether a token is what the host draws when a boundary is moved by a millionth."""
    params = made.sampling
    draw = sampler.uniform(made.seed, made.num_tokens)
    for by, p, m in itertools.product((-1e-6, 0, 1e-6), repeat=3):
        batch = sample_input([0], [made])
        batch.draws[0] = min(max(draw + by, 0.0), 1.0 - 1e-9)
        batch.top_p[0] = min(params.top_p * (1 + p), 1.0)
        batch.min_p[0] = min(params.min_p * (1 + m), 1.0)
        if reference_sample(row[None], batch)[0] == token:
            return True
    return False


def check(logits: np.ndarray, sequences: list[Sequence], device: torch.device = CPU) -> None:
    """The same tokens as from the core's sampler, but where rounding decides."""
    wanted = sampler.sample(logits, sequences)
    found = drawn(logits, sample_input(range(len(sequences)), sequences), device)
    for row, (ours, host) in enumerate(zip(found, wanted, strict=True)):
        assert ours == host or is_rounding(logits[row], sequences[row], ours), (row, ours, host)


def noise(seed: int, rows: int, vocabulary: int, kind: str) -> np.ndarray:
    """Logits: ``fine`` float32, ``coarse`` with the ties that bfloat16 has, ``flat``, or with holes."""
    logits = np.random.default_rng(seed).normal(0, 3, (rows, vocabulary)).astype(np.float32)
    if kind == "coarse":
        return torch.from_numpy(logits).bfloat16().float().numpy()
    if kind == "flat":
        return (logits > 1).astype(np.float32) * np.float32(0.1)
    if kind == "holes":
        logits[:, ::3] = -np.inf
        logits[:, 1::7] = -0.0
        logits[:, 2::7] = 0.0
    return logits


KINDS = ("fine", "coarse", "flat", "holes")
SAMPLING = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 1e-7, 0.01, 0.7, 1.0, 2.0, 1e4])},
    optional={
        "top_k": st.sampled_from([1, 2, 40, 64, 65, 500, 1999, 100_000]),
        "top_p": st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.5, 0.9, 0.999999])),
        "min_p": st.one_of(st.floats(0.0, 1.0), st.sampled_from([1e-9, 1.0])),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.2, 0.7]),
        "logit_bias": st.dictionaries(st.integers(0, 4), st.floats(-100, 100), max_size=3),
    },
)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    kind=st.sampled_from(KINDS),
    vocabulary=st.sampled_from([5, 64, 100, 261, 2000, 2048, 5000]),
    mixes=st.lists(SAMPLING, min_size=1, max_size=8),
)
def test_any_mix_of_parameters_draws_the_tokens_of_the_host(
    seed: int, kind: str, vocabulary: int, mixes: list[dict[str, Any]]
) -> None:
    logits = noise(seed, len(mixes), vocabulary, kind)
    check(logits, [sequence(**{"seed": seed + at} | mix) for at, mix in enumerate(mixes)])


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_large_vocabularies_draw_the_same(device: torch.device, kind: str) -> None:
    mixes: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "min_p": 0.05},
        {"temperature": 0.7, "top_k": 40, "top_p": 0.95},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.99, "repetition_penalty": 1.1},
    ]
    for vocabulary in (49_152, 50_257):
        logits = noise(3, len(mixes), vocabulary, kind)
        check(logits, [sequence(seed=at, **mix) for at, mix in enumerate(mixes)], device)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("logits_type", [torch.bfloat16, torch.float16])
def test_half_precision_is_drawn_from_in_float32(
    device: torch.device, logits_type: torch.dtype
) -> None:
    logits = torch.from_numpy(noise(9, 6, 3000, "fine")).to(device, logits_type)
    before = logits.clone()
    sequences = [
        sequence(temperature=t, top_p=p, seed=at, presence_penalty=1.0)
        for at, (t, p) in enumerate(itertools.product((0.0, 0.5, 1.0), (0.8, 1.0)))
    ]
    batch = sample_input(range(6), sequences)
    found = TorchSampler(device, 3000).sample(logits, batch)
    assert found.tolist() == sampler.sample(logits.float().cpu().numpy(), sequences)
    assert torch.equal(logits, before)


def test_the_logits_are_not_written_to() -> None:
    logits = torch.from_numpy(noise(1, 2, 300, "fine"))
    before = logits.clone()
    sequences = [sequence(logit_bias={5: 3.0}), sequence(repetition_penalty=1.5, temperature=0.0)]
    batch = sample_input(range(2), sequences)
    batch.mask_rows, batch.masks = np.array([0], np.int32), np.full((1, 10), 0x55, np.int32)
    TorchSampler(CPU, 300).sample(logits, batch)
    assert torch.equal(logits, before)


def test_only_the_rows_asked_for_are_drawn_and_a_slice_of_wider_logits_will_do() -> None:
    wide = torch.from_numpy(noise(2, 5, 320, "fine"))
    logits = wide[:, :300]
    for sampling in ({"temperature": 0.0}, {"top_p": 0.9}, {"logit_bias": {1: 1.0}}, {}):
        sequences = [sequence(seed=at, **sampling) for at in range(2)]
        batch = sample_input([1, 4], sequences)
        wanted = sampler.sample(logits.numpy()[[1, 4]], sequences)
        assert TorchSampler(CPU, 300).sample(logits, batch).tolist() == wanted


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 5}])
def test_rows_without_a_finite_maximum_are_told_and_harm_no_other(sampling: dict[str, Any]) -> None:
    logits = noise(4, 6, 1000, "fine")
    logits[1, 77] = np.nan
    logits[2, 5] = np.inf
    logits[3] = -np.inf
    logits[4] = np.nan
    sequences = [sequence(seed=at, **sampling) for at in range(6)]
    found = drawn(logits, sample_input(range(6), sequences))
    assert found[1:5] == [-1] * 4
    assert found == sampler.sample(logits, sequences)


def test_ties_go_to_the_smallest_ids() -> None:
    logits = np.zeros((1, 4096), np.float32)
    logits[0, 1::2] = -0.0
    assert drawn(logits, sample_input([0], [sequence(temperature=0.0)])) == [0]
    seen = set()
    for seed in range(200):
        seen.update(drawn(logits, sample_input([0], [sequence(top_k=3, seed=seed)])))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("vocabulary", [2050, 2051, 2053, 50_257])
def test_the_last_tokens_of_odd_vocabularies_are_seen(vocabulary: int) -> None:
    for column in (vocabulary - 1, vocabulary - 2):
        logits = noise(12, 1, vocabulary, "fine")
        logits[0, column] = 50.0
        for sampling in ({"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.9}):
            assert drawn(logits, sample_input([0], [sequence(**sampling)])) == [column]


@pytest.mark.parametrize("draw", [0.0, 0.5, 1.0 - 2.0**-53, 1.0])
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.99}, {"top_k": 900}, {"min_p": 0.01}])
def test_a_draw_at_the_end_of_the_range_is_a_possible_token(
    draw: float, sampling: dict[str, Any]
) -> None:
    """1 is no draw, but by rounding it may seem one."""
    logits = noise(6, 1, 998, "holes")
    batch = sample_input([0], [sequence(temperature=2.0, **sampling)])
    batch.draws[0] = draw
    token = drawn(logits, batch)[0]
    assert np.isfinite(logits[0, token])
    assert token == reference_sample(logits, batch)[0]


@pytest.mark.parametrize("vocabulary", [64, 300, 1031])
def test_masks_are_applied_before_anything_else(vocabulary: int) -> None:
    random = np.random.default_rng(8)
    logits = noise(8, 5, vocabulary, "coarse")
    logits[1, 0] = np.nan
    bits = random.random((3, (vocabulary + 31) // 32 * 32)) < 0.1
    bits[1, 0] = False  # of the row that is not a number there
    bits[2] = False
    packed = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    for sampling in ({"temperature": 0.0}, {"logit_bias": {0: 100.0}}, {"top_p": 0.9}):
        sequences = [sequence(seed=at, **sampling) for at in range(5)]
        batch = sample_input(range(5), sequences)
        batch.mask_rows, batch.masks = np.array([0, 1, 3], np.int32), packed
        found = drawn(logits, batch)
        assert found == reference_sample(logits, batch).tolist()
        assert bits[0, found[0]]
        assert bits[1, found[1]]
        assert found[3] == -1, "nothing may come"


def test_forbidden_tokens_come_only_where_nothing_else_can() -> None:
    logits = np.full((3, 40), -np.inf, np.float32)
    logits[0, 7], logits[0, 9] = 5.0, 1.0
    logits[1, 7] = 5.0
    logits[2, 7], logits[2, 8] = 5.0, 4.0
    sequences = [sequence(temperature=t) for t in (1.0, 1.0, 0.0)]
    for made in sequences:
        made.rules = TokenRules(np.array([7, 8], np.int64), 100, None)
    sequences[2].rules = None
    batch = sample_input(range(3), sequences)
    assert drawn(logits, batch) == [9, 7, 7]
    assert sampler.sample(logits, sequences) == [9, 7, 7]


def test_plain_greedy_takes_the_maximum_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: Any) -> None:
        raise AssertionError("a greedy batch needs no more than the maximum")

    monkeypatch.setattr(TorchSampler, "_edited", no_more)
    logits = noise(1, 4, 500, "coarse")
    sequences = [sequence(temperature=0.0, top_p=0.5) for _ in range(4)]
    assert drawn(logits, sample_input(range(4), sequences)) == logits.argmax(axis=1).tolist()


def test_the_vocabulary_is_not_sorted_for_a_head_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    ranked = draws.ranked

    def watched(rows: torch.Tensor, width: int) -> Any:
        widths.append(width)
        return ranked(rows, width)

    monkeypatch.setattr(draws, "ranked", watched)
    peaked, flat = noise(1, 1, 50_000, "fine") * 2, np.zeros((1, 50_000), np.float32)
    logits = np.concatenate([peaked, flat, peaked, peaked])
    samplings: list[dict[str, Any]] = [{"top_p": 0.9}, {"top_p": 0.5}, {"top_k": 20}, {}]
    sequences = [sequence(seed=at, **sampling) for at, sampling in enumerate(samplings)]
    found = drawn(logits, sample_input(range(4), sequences))
    assert found == sampler.sample(logits, sequences)
    # Only the row whose mass is spread over the vocabulary is looked at again, with longer heads.
    assert widths == [64, 512, 4096, 32_768]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.5, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.9},
        {"repetition_penalty": 1.2, "presence_penalty": 0.4, "logit_bias": {4: 1.0}},
        {"temperature": 0.0, "frequency_penalty": 0.4},
    ],
)
@pytest.mark.parametrize("has_mask", [False, True])
def test_nothing_waits_for_the_device_but_the_copy_of_the_tokens(
    sampling: dict[str, Any], has_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device that has no data whoever wants to look at some raises."""
    answers: list[torch.Tensor] = []

    def to_host(tokens: torch.Tensor) -> np.ndarray:
        answers.append(tokens)
        return np.zeros(len(tokens), np.int64)

    monkeypatch.setattr(TorchSampler, "_to_host", staticmethod(to_host))
    logits = torch.empty(4, 3000, device="meta", dtype=torch.bfloat16)
    batch = sample_input(range(3), [sequence(**sampling), sequence(), sequence(**sampling)])
    if has_mask:
        batch.mask_rows, batch.masks = np.array([1], np.int32), np.ones((1, 94), np.int32)
    TorchSampler(torch.device("meta"), 3000).sample(logits, batch)
    (tokens,) = answers
    assert (tokens.device.type, tokens.shape, tokens.dtype) == ("meta", (3,), torch.int64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 1.0, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "presence_penalty": 1.0, "logit_bias": {5: 2.0}},
    ],
)
def test_many_draws_follow_the_distribution(sampling: dict[str, Any]) -> None:
    """Chi-square against the truth; the uniform numbers are the engine's own, by position."""
    count = 20_000
    row = np.random.default_rng(11).normal(0, 2, 60).astype(np.float32)
    made = sequence(**sampling)
    batch = sample_input([0], [made])
    expected = _distribution(row, made)
    repeated = SampleInput(
        rows=np.arange(count, dtype=np.int32),
        **{
            name: np.repeat(getattr(batch, name), count)
            for name in ("temperature", "top_k", "top_p", "min_p")
        },
        draws=np.array([sampler.uniform(7, position) for position in range(count)]),
    )
    adjusted = sampler._adjusted(row, made)
    tokens = drawn(np.repeat(adjusted[None], count, axis=0), repeated)
    seen = np.bincount(tokens, minlength=len(row))
    assert not seen[expected == 0].any()
    usual = expected * count >= 5
    chi_square = float(((seen - expected * count)[usual] ** 2 / (expected * count)[usual]).sum())
    freedom = max(1, int(usual.sum()) - 1)
    # Wilson and Hilferty's normal approximation; 4 standard deviations.
    deviation = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (
        2 / (9 * freedom)
    ) ** 0.5
    assert deviation < 4


def _distribution(row: np.ndarray, made: Sequence) -> np.ndarray:
    """The probabilities, written down from the definitions, in float64."""
    params = made.sampling
    logits = sampler._adjusted(row, made).astype(np.float64) / params.temperature
    chances = np.exp(logits - logits.max())
    order = np.argsort(-chances, kind="stable")
    if params.top_k:
        chances[order[params.top_k :]] = 0
    chances /= chances.sum()
    if params.top_p < 1:
        count = int(np.searchsorted(chances[order].cumsum(), params.top_p)) + 1
        chances[order[count:]] = 0
    chances[chances < params.min_p * chances.max()] = 0
    found: np.ndarray = chances / chances.sum()
    return found


def test_mps_samples_on_the_host() -> None:
    assert can_sample_on(CPU)
    assert can_sample_on(torch.device("cuda:1"))
    assert not can_sample_on(torch.device("mps"))
