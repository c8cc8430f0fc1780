"""The runtime computes what transformers' own forward pass does, however the tokens come."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    CONFIGS,
    CONTEXT,
    LANES,
    VOCABULARY,
    build_step,
    forward,
    make_model,
    make_runtime,
)

import stoker
from stoker_backend_torch.attention import attach
from stoker_backend_torch.compiling import find_layers, plain_layers
from stoker_backend_torch.kv import ContiguousKv
from stoker_backend_torch.packing import PackedLinear, pack_linear_layers
from stoker_backend_torch.probe import look_at
from stoker_backend_torch.ragged import RaggedBatch, find_runs, group_decodes
from stoker_backend_torch.runtime import TorchRuntime

TOLERANCE = 2e-5  # float32
TEXT = np.random.default_rng(7).integers(3, VOCABULARY, 60).tolist()
OTHER = np.random.default_rng(8).integers(3, VOCABULARY, 60).tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest) -> tuple[TorchRuntime, Any, Any]:
    """A runtime, and the truth about two texts."""
    model = make_model(request.param)
    truth, other = forward(model, TEXT), forward(model, OTHER)
    assert np.abs(truth).max() > 0.1
    return make_runtime(model), truth, other


@pytest.fixture(autouse=True)
def _empty_lanes(request: pytest.FixtureRequest) -> None:
    if "case" in request.fixturenames:
        runtime = request.getfixturevalue("case")[0]
        for lane in range(runtime.info.num_lanes):
            runtime.truncate(lane, 0)


def run(runtime: TorchRuntime, *rows: Any, every: bool = False) -> np.ndarray[Any, Any]:
    output = runtime.step(build_step(*rows, every=every))
    assert not output.no_room
    return output.logits.copy()


def close(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(got, want, atol=TOLERANCE * np.abs(want).max() + 1e-6, rtol=0)


def test_alone(case: Any) -> None:
    runtime, truth, _ = case
    close(run(runtime, (3, TEXT, 0), every=True), truth)


def test_only_wanted_rows_in_the_order_of_the_step(case: Any) -> None:
    runtime, truth, other = case
    rows = run(runtime, (4, TEXT[:20], 0), (1, OTHER[:1], 0), (2, OTHER[:9], 0))
    close(rows, np.stack([truth[19], other[0], other[8]]))


def test_in_chunks_beside_others(case: Any) -> None:
    runtime, truth, other = case
    found = [run(runtime, (5, OTHER[:20], 0), (3, TEXT[:13], 0), every=True)[20:]]
    found.append(
        run(
            runtime,
            (1, OTHER[:7], 0),
            (3, TEXT[13:14], 13),
            (5, OTHER[20:21], 20),
            every=True,
        )[7:8]
    )
    mixed = run(runtime, (3, TEXT[14:40], 14), (0, TEXT[:1], 0), (5, OTHER[21:22], 21), every=True)
    found.append(mixed[:26])
    close(mixed[26], truth[0])
    close(mixed[27], other[21])
    for at in range(40, 60):  # decodes of lanes 0, 1, 3: lane 2 is idle between them
        step = run(
            runtime,
            (0, TEXT[at - 39 : at - 38], at - 39),
            (3, TEXT[at : at + 1], at),
            (1, OTHER[at - 33 : at - 32], at - 33),
        )
        close(step[0], truth[at - 39])
        close(step[2], other[at - 33])
        found.append(step[1:2])
    close(np.concatenate(found), truth)


def test_after_copies_truncations_and_snapshots(case: Any) -> None:
    runtime, truth, other = case
    run(runtime, (3, TEXT, 0), (4, OTHER[:30], 0))
    runtime.copy_prefix(3, 4, 30)
    close(run(runtime, (4, TEXT[30:], 30), every=True), truth[30:])
    assert runtime.truncate(4, 33) == 33
    close(run(runtime, (4, TEXT[33:35], 33), every=True), truth[33:35])
    saved = runtime.snapshot(4)
    assert runtime.truncate(4, 0) == 0
    close(run(runtime, (4, OTHER[:40], 0), every=True), other[:40])
    assert runtime.restore(1, saved) == 35
    close(run(runtime, (1, TEXT[35:], 35), every=True), truth[35:])
    # The lane it was copied from did not notice.
    runtime.truncate(3, 59)
    close(run(runtime, (3, TEXT[59:], 59)), truth[59:])


def test_what_does_not_fit_or_makes_no_sense_changes_nothing(case: Any) -> None:
    runtime, truth, _ = case
    run(runtime, (2, TEXT[:10], 0))
    long = (TEXT * 3)[: CONTEXT + 1]
    assert runtime.step(build_step((2, long[10:], 10))).no_room
    for rows, message in [
        (((2, TEXT[:1], 9),), "lane 2 continues at position 9 but holds 10"),
        (((LANES, TEXT[:1], 0),), f"outside 0 to {LANES - 1}"),
        (((2, TEXT[10:11], 10), (1, TEXT[:1], 0), (2, TEXT[11:12], 11)), "several places"),
        (((1, TEXT * 5, 0),), "exceeds 256"),
    ]:
        with pytest.raises(stoker.EngineError, match=message):
            runtime.step(build_step(*rows))
    with pytest.raises(stoker.EngineError, match="holds 10 tokens; 11 cannot be copied"):
        runtime.copy_prefix(2, 1, 11)
    close(run(runtime, (2, TEXT[10:12], 10), every=True), truth[10:12])


@pytest.mark.parametrize("way", ["prompt", "copy", "snapshot"])
def test_a_lane_of_numbers_that_are_none_does_not_spoil_the_next_sequence(way: str) -> None:
    model = make_model("gemma3")
    truth = forward(model, TEXT[:12])
    runtime = make_runtime(model)
    memory = runtime._memory
    assert isinstance(memory, ContiguousKv)
    run(runtime, (1, TEXT[:8], 0), (2, OTHER[:40], 0))
    saved = runtime.snapshot(1)
    for part in (*memory._keys, *memory._values):  # as after an overflow
        part[2, 3:40] = float("nan")
    runtime.truncate(2, 0)
    if way == "prompt":
        run(runtime, (2, TEXT[:8], 0))
    elif way == "copy":
        runtime.copy_prefix(1, 2, 8)
    else:
        runtime.restore(2, saved)
    run(runtime, (3, OTHER[:30], 0))
    for at in range(8, 12):  # beside a longer one, whose call looks at as much of all lanes
        both = run(runtime, (2, TEXT[at : at + 1], at), (3, OTHER[22 + at : 23 + at], 22 + at))
        close(both[0], truth[at])


def test_a_snapshot_of_something_else_is_refused() -> None:
    runtime = make_runtime(make_model("llama"))
    run(runtime, (0, TEXT[:5], 0))
    saved = runtime.snapshot(0)
    with pytest.raises(stoker.EngineError, match="no snapshot"):
        runtime.restore(1, b"something else")
    with pytest.raises(stoker.EngineError, match="damaged"):
        runtime.restore(1, saved[:-1])
    assert runtime.truncate(1, 9) == 0
    runtime.close()
    runtime.close()
    with pytest.raises(stoker.EngineError, match="closed"):
        run(runtime, (0, TEXT[:5], 0))


def test_bfloat16_is_as_near_as_its_precision() -> None:
    model = make_model("gemma3", torch.bfloat16)
    truth = forward(model, TEXT)
    runtime = make_runtime(model)
    first = run(runtime, (0, TEXT[:30], 0), (1, OTHER[:3], 0), every=True)[:30]
    rest = [
        run(runtime, (0, TEXT[at : at + 1], at), (1, OTHER[:1], at - 27))[:1]
        for at in range(30, 60)
    ]
    got = np.concatenate([first, *rest])
    # Two kernels of eight bits of precision, through four layers.
    assert np.abs(got - truth).max() < 0.1 * truth.std() + 0.05 * np.abs(truth).max()
    agree = got.argmax(1) == truth.argmax(1)
    margin = np.sort(truth, 1)[:, -1] - np.sort(truth, 1)[:, -2]
    assert agree[margin > 0.2 * truth.std()].all()


@pytest.mark.parametrize("share", [True, False])
def test_packed_layers_give_the_same_logits(share: bool) -> None:
    model = make_model("llama")
    truth = forward(model, TEXT)
    assert pack_linear_layers(model, share=share) == 4 * 7 + 1
    assert isinstance(model.lm_head, PackedLinear)
    layer = model.model.layers[1]
    assert (type(layer.self_attn.k_proj) is PackedLinear) == (not share)
    runtime = make_runtime(model)
    close(run(runtime, (0, TEXT[:40], 0), every=True), truth[:40])
    close(run(runtime, (0, TEXT[40:41], 40), (1, TEXT[:1], 0), every=True), truth[[40, 0]])


def test_layers_share_a_product_only_of_the_same_input() -> None:
    torch.manual_seed(3)
    names = ("q_proj", "k_proj", "v_proj")
    parent = torch.nn.Module()
    for name in names:
        setattr(parent, name, torch.nn.Linear(8, 4))
    plain = {name: getattr(parent, name) for name in names}
    assert pack_linear_layers(parent) == 3
    one, other = torch.randn(2, 8), torch.randn(2, 8)
    with torch.inference_mode():
        # In their order, out of it, some of them, and with other inputs in between.
        for name, rows in [
            *((name, one) for name in names),
            ("v_proj", one),
            ("q_proj", other),
            ("k_proj", one),
            ("v_proj", other),
            ("k_proj", other),
        ]:
            got = getattr(parent, name)(rows)
            torch.testing.assert_close(got, plain[name](rows), rtol=1e-5, atol=1e-5)


def test_what_our_attention_cannot_do_is_refused() -> None:
    model = make_model("llama")
    attention = model.model.layers[1].self_attn
    plain = attention.forward

    def biased(*args: Any, **kwargs: Any) -> Any:
        if model.config._attn_implementation == "stoker":  # as one that passes on less would be
            cos, sin = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = cos, -sin
        return plain(*args, **kwargs)

    attention.forward = biased
    with pytest.raises(stoker.ModelError, match=r"tiny: .*LlamaForCausalLM.* other logits"):
        look_at(model, "tiny", VOCABULARY)
    attach(model, None)
    with pytest.raises(stoker.EngineError, match="no KV memory"):
        model(torch.tensor([TEXT[:4]]))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=LANES),
    st.randoms(use_true_random=False),
)
def test_a_batch_has_every_row_once(parts: list[tuple[int, bool]], random: Any) -> None:
    lanes = random.sample(range(LANES), len(parts))
    starts = [random.randrange(20) for _ in parts]
    rows = [
        (lane, TEXT[:count], start)
        for lane, start, (count, _) in zip(lanes, starts, parts, strict=True)
    ]
    step = build_step(*rows, every=True)
    lengths = np.zeros(LANES, np.int64)
    lengths[lanes] = starts
    batch = RaggedBatch.of(step, find_runs(step, lengths, 256))
    order = np.arange(len(step.token_ids)) if batch.order is None else batch.order
    assert sorted(order.tolist()) == list(range(len(step.token_ids)))
    assert (step.token_ids[order] == batch.token_ids).all()
    assert (step.positions[order] == batch.positions).all()
    assert (order[batch.wanted] == np.flatnonzero(step.wants_logits)).all()
    covered = [*batch.decodes, *batch.runs]
    assert sorted(i for part in covered for i in range(part.start, part.stop)) == list(
        range(len(order))
    )
    for decodes in batch.decodes:
        assert (decodes.lanes == batch.lanes[decodes.start : decodes.stop]).all()
        assert (decodes.lengths == batch.positions[decodes.start : decodes.stop] + 1).all()


def test_lanes_of_very_different_lengths_are_not_computed_together() -> None:
    lanes = np.arange(4)
    together = group_decodes(lanes, np.array([900, 910, 905, 900]))
    assert [(group.start, group.stop) for group in together] == [(0, 4)]
    apart = group_decodes(lanes, np.array([20, 30, 4000, 4000]))
    assert [(group.start, group.stop) for group in apart] == [(0, 2), (2, 4)]
    gap = group_decodes(np.array([0, 40]), np.array([2000, 2000]))
    assert len(gap) == 2
    assert not group_decodes(np.array([], np.int64), np.array([], np.int64))


def test_tokens_drawn_by_the_runtime_are_its_logits_greatest() -> None:
    model = make_model("qwen3")
    truth = forward(copy.deepcopy(model), TEXT)
    runtime = make_runtime(model, samples=True)
    runtime.step(build_step((0, TEXT[:9], 0), (1, TEXT[:4], 0)))
    zeros = np.zeros(2)
    drawn = runtime.sample(
        stoker.SampleInput(
            rows=np.arange(2, dtype=np.int32),
            temperature=zeros,
            top_k=np.zeros(2, np.int32),
            top_p=zeros + 1,
            min_p=zeros,
            draws=zeros + 0.5,
        )
    )
    assert drawn.tolist() == truth[[8, 3]].argmax(1).tolist()


def test_each_model_keeps_its_number_of_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = make_runtime(make_model("llama"))
        torch.set_num_threads(2)
        second = make_runtime(make_model("llama"))
        with ThreadPoolExecutor(1) as loop:  # of both, as the models of one device have
            for runtime, threads in ((first, 1), (second, 2), (first, 1)):
                runtime.truncate(0, 0)
                loop.submit(run, runtime, (0, TEXT[:4], 0)).result()
                assert loop.submit(torch.get_num_threads).result() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_what_is_compiled_for_steps_is_not_compiled_for_texts_to_embed() -> None:
    model = make_model("llama")
    truth = forward(model, TEXT[:9])

    def compiler(*_: Any) -> Any:
        raise RuntimeError("it is compiled")

    for layer in find_layers(model):
        layer.compile(backend=compiler, dynamic=True)
    with plain_layers(model):
        close(forward(model, TEXT[:9]), truth)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="it is compiled"):
        forward(model, TEXT[:9])


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of torch's own modules, when it compiles
def test_compiled_layers_give_the_same_logits() -> None:
    model = make_model("gemma3")
    truth = forward(model, TEXT)
    pack_linear_layers(model, share=False)
    runtime = make_runtime(model)
    assert runtime.compile() > 0
    close(run(runtime, (0, TEXT[:40], 0), every=True), truth[:40])
    close(run(runtime, (0, TEXT[40:41], 40), (1, TEXT[:1], 0), every=True), truth[[40, 0]])
    runtime.close()
