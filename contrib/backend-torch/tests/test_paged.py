"""KV in blocks: what transformers' own forward pass says, whatever is shared, copied, cut or refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny_models import (
    CONTEXT,
    LANES,
    VOCABULARY,
    build_step,
    forward,
    make_model,
    make_runtime,
)
from torch import nn

import stoker
from stoker.config import CacheConfig
from stoker.testing import EngineHarness
from stoker_backend_torch.attention import KvMemory, attend
from stoker_backend_torch.block_attention import GatheredAttention, group_by_length
from stoker_backend_torch.blocks import BlockTables, blocks_for
from stoker_backend_torch.kv import ContiguousKv, LayerShape
from stoker_backend_torch.paged import PagedKv
from stoker_backend_torch.runtime import TorchRuntime
from stoker_plugins.fcfs import FirstComeFirstServed

CPU = torch.device("cpu")
BLOCK = 4
TEXT = np.random.default_rng(7).integers(3, VOCABULARY, 60).tolist()
OTHER = np.random.default_rng(8).integers(3, VOCABULARY, 60).tolist()
Case = tuple[TorchRuntime, BlockTables, Any, Any]


@pytest.fixture(scope="module", params=["llama", "gemma3", "gemma2", "gpt_oss"])
def shared(request: pytest.FixtureRequest) -> Case:
    """A runtime, its tables, and the truth about two texts."""
    model = make_model(request.param)
    truth, other = forward(model, TEXT), forward(model, OTHER)
    tables = BlockTables(LANES, CONTEXT, 260, BLOCK)
    return make_runtime(model, tables=tables), tables, truth, other


@pytest.fixture
def case(shared: Case) -> Case:
    """The same with empty lanes."""
    for lane in range(LANES):
        shared[0].truncate(lane, 0)
    assert shared[1].num_free == shared[1].num_blocks
    return shared


def run(runtime: TorchRuntime, *rows: Any, every: bool = False) -> np.ndarray[Any, Any]:
    output = runtime.step(build_step(*rows, every=every))
    assert not output.no_room
    return output.logits.copy()


def close(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> None:
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max() + 1e-6, rtol=0)


# ---------------------------------------------------------------------- against transformers


def test_alone_and_in_chunks_beside_others(case: Case) -> None:
    runtime, _, truth, other = case
    close(run(runtime, (3, TEXT, 0), every=True), truth)
    runtime.truncate(3, 0)
    found = [run(runtime, (5, OTHER[:20], 0), (3, TEXT[:13], 0), every=True)[20:]]
    found.append(run(runtime, (3, TEXT[13:41], 13), (0, TEXT[:1], 0), every=True)[:28])
    for at in range(41, 60):  # decodes of 3 lanes, one of them much shorter
        step = run(
            runtime,
            (5, OTHER[at - 21 : at - 20], at - 21),
            (3, TEXT[at : at + 1], at),
            (0, TEXT[at - 40 : at - 39], at - 40),
        )
        close(step[[0, 2]], np.stack([other[at - 21], truth[at - 40]]))
        found.append(step[1:2])
    close(np.concatenate(found), truth)


def test_after_copies_truncations_and_snapshots(case: Case) -> None:
    runtime, tables, truth, other = case
    run(runtime, (3, TEXT, 0), (4, OTHER[:30], 0))
    used = tables.num_blocks - tables.num_free
    runtime.copy_prefix(3, 4, 30)  # the middle of a block
    assert tables.num_blocks - tables.num_free == used - 8  # lane 4's own, and nothing new
    close(run(runtime, (4, TEXT[30:], 30), every=True), truth[30:])
    assert runtime.truncate(4, 33) == 33
    close(run(runtime, (4, TEXT[33:35], 33), every=True), truth[33:35])
    saved = runtime.snapshot(4)
    assert runtime.truncate(4, 0) == 0
    close(run(runtime, (4, OTHER[:40], 0), every=True), other[:40])
    assert runtime.restore(1, saved) == 35
    close(run(runtime, (1, TEXT[35:], 35), every=True), truth[35:])
    runtime.copy_prefix(3, 3, 50)
    runtime.copy_prefix(3, 0, 50)
    runtime.copy_prefix(3, 5, 50)
    # All three write into the block that they share; the truth is the same for each.
    rows = run(
        runtime,
        (0, TEXT[50:51], 50),
        (3, OTHER[:1], 50),
        (5, TEXT[50:53], 50),
        (2, OTHER[:1], 0),
    )
    close(rows[[0, 2, 3]], np.stack([truth[50], truth[52], other[0]]))


def test_a_snapshot_fits_every_kind_of_memory() -> None:
    text, more = TEXT[:21], TEXT[21:24]
    truth = forward(make_model("gemma3"), TEXT[:24])
    paged = make_runtime(make_model("gemma3"), tables=BlockTables(LANES, CONTEXT, 100, 16))
    contiguous = make_runtime(make_model("gemma3"))
    for source, target in ((paged, contiguous), (contiguous, paged)):
        source.truncate(0, 0)
        run(source, (0, text, 0))
        assert target.restore(2, source.snapshot(0)) == 21
        close(run(target, (2, more, 21), every=True), truth[21:])


def test_no_room_changes_nothing(case: Case) -> None:
    runtime, tables, truth, other = case
    run(runtime, (0, TEXT, 0), (1, OTHER, 0))
    run(runtime, (2, TEXT[:60], 0), (3, OTHER[:60], 0))
    saved = runtime.snapshot(0)
    before = tables.tables.copy(), tables.lengths.copy(), tables.num_free
    assert runtime.step(build_step((4, TEXT[:20], 0), (0, TEXT[:1], 60))).no_room
    assert runtime.restore(5, saved) == 0
    assert (tables.tables == before[0]).all()
    assert (tables.lengths == before[1]).all()
    assert tables.num_free == before[2]
    with pytest.raises(stoker.EngineError, match="damaged"):
        runtime.restore(5, saved[:-1])
    close(run(runtime, (4, TEXT[:20], 0), every=True), truth[:20])  # 260: exactly full
    runtime.truncate(1, 20)
    close(run(runtime, (1, OTHER[20:], 20), every=True), other[20:])


def test_numbers_that_are_none_stay_where_they_are() -> None:
    model = make_model("llama")
    truth = forward(model, TEXT[:9])
    tables = BlockTables(2, 16, 16, BLOCK)
    runtime = make_runtime(model, lanes=2, context=16, tables=tables)
    memory: Any = runtime._memory
    run(runtime, (0, TEXT[:16], 0))
    for pool in memory._pools:
        pool[:, : tables.num_blocks] = torch.nan
    runtime.truncate(0, 0)
    close(run(runtime, (0, TEXT[:3], 0), (1, TEXT[:9], 0)), truth[[2, 8]])
    close(run(runtime, (0, TEXT[3:4], 3)), truth[[3]])


# ---------------------------------------------------------------------- any sequence of operations


class Toy(nn.Module):
    """Two layers of attention, one with a sliding window, and nothing else: quick."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.vectors = torch.randn(VOCABULARY, 8, generator=generator)
        self.places = torch.randn(CONTEXT, 8, generator=generator)
        self.mixes = torch.randn(2, 8, 16, generator=generator)
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for index, layer in enumerate(self.layers):
            layer.layer_idx = index
        self.fails = False

    @property
    def base_model(self) -> Toy:
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        rows = self.vectors[input_ids[0]] + self.places[position_ids[0]]
        for layer, mix, window in zip(self.layers, self.mixes, (None, 5), strict=True):
            mixed = rows @ mix
            query = (mixed[:, :8] + rows).view(1, -1, 2, 4).transpose(1, 2)
            key = mixed[:, 8:12].reshape(1, -1, 1, 4).transpose(1, 2)
            value = mixed[:, 12:].reshape(1, -1, 1, 4).transpose(1, 2)
            out, _weights = attend(layer, query, key, value, None, sliding_window=window)
            rows = rows + out.reshape(-1, 8)
            if self.fails:
                raise RuntimeError("as ordered")
        rows = rows if logits_to_keep is None else rows[logits_to_keep]
        return SimpleNamespace(logits=(rows @ self.vectors.T)[None])


class Letters(stoker.Tokenizer):
    """A letter for each token."""

    @property
    def special_tokens(self) -> dict[str, int]:
        """None."""
        return {}

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return [ord(letter) - 256 for letter in text]

    def token_bytes(self, token_id: int) -> bytes:
        return chr(256 + token_id).encode()


def toy_runtime(lanes: int, context: int, tables: BlockTables | None, capacity: int) -> Any:
    shapes = [LayerShape(1, 4, 4)] * 2
    memory: KvMemory = ContiguousKv(shapes, lanes, context, torch.float32, CPU)
    if tables is not None:
        attention = GatheredAttention(CPU, torch.float32)
        memory = PagedKv(shapes, tables, attention, torch.float32, CPU)
    info = stoker.RuntimeInfo(
        name="toy",
        vocab_size=VOCABULARY,
        context_length=context,
        num_lanes=lanes,
        kv_capacity_tokens=capacity,
        max_step_tokens=64,
        end_token_ids=frozenset({2}),
        capabilities=stoker.Capabilities(
            copy_prefix=True, snapshot=True, shares_kv=tables is not None
        ),
    )
    loaded: Any = SimpleNamespace(
        model=Toy(), tokenizer=Letters(), device=CPU, dtype=torch.float32, weights_bytes=0
    )
    return TorchRuntime(loaded, info, memory)


def check_tables(tables: BlockTables) -> None:
    """Nothing leaks: every block is free, or held by as many lanes as are counted."""
    held = -(-tables.lengths // tables.block_size)
    used = [int(block) for row, n in zip(tables.tables, held, strict=True) for block in row[:n]]
    counts = np.bincount(used, minlength=tables.num_blocks + 1)
    assert (counts == tables.references).all()
    assert sorted([*tables._free, *set(used)]) == list(range(tables.num_blocks))
    for row, n in zip(tables.tables, held, strict=True):
        assert (row[n:] == tables.scratch).all()
        assert tables.scratch not in row[:n]


class PagedMachine(RuleBasedStateMachine):
    """Paged memory that is too small for all, beside a contiguous one that is not."""

    LANES, CONTEXT, CAPACITY, BLOCK = 4, 24, 50, 4
    lanes = st.integers(0, LANES - 1)
    counts = st.integers(0, CONTEXT)

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(self.LANES, self.CONTEXT, self.CAPACITY, self.BLOCK)
        self.runtime = toy_runtime(self.LANES, self.CONTEXT, self.tables, self.CAPACITY)
        self.oracle = toy_runtime(self.LANES, self.CONTEXT, None, self.LANES * self.CONTEXT)
        self.lengths = [0] * self.LANES
        self.saved: list[tuple[int, bytes, bytes]] = []

    @rule(parts=st.dictionaries(lanes, st.integers(1, 9), min_size=1), seed=st.integers(0, 99))
    def step(self, parts: dict[int, int], seed: int) -> None:
        tokens = np.random.default_rng(seed).integers(3, VOCABULARY, 64).tolist()
        parts = {lane: min(n, self.CONTEXT - self.lengths[lane]) for lane, n in parts.items()}
        rows = [
            (lane, tokens[at : at + n], self.lengths[lane])
            for at, (lane, n) in enumerate(parts.items())
            if n
        ]
        if not rows:
            return
        step = build_step(*rows, every=True)
        before = self.tables.tables.copy(), self.tables.num_free
        output = self.runtime.step(step)
        if output.no_room:
            assert sum(self.lengths) + len(step.token_ids) > self.CAPACITY
            assert (self.tables.tables == before[0]).all()
            assert self.tables.num_free == before[1]
            return
        close(output.logits, self.oracle.step(step).logits)
        for lane, n in parts.items():
            self.lengths[lane] += n

    @rule(lane=lanes, count=counts)
    def truncate(self, lane: int, count: int) -> None:
        kept = self.runtime.truncate(lane, count)
        assert kept == self.oracle.truncate(lane, count) == min(count, self.lengths[lane])
        self.lengths[lane] = kept

    @rule(source=lanes, into=lanes, count=counts)
    def copy_prefix(self, source: int, into: int, count: int) -> None:
        count = min(count, self.lengths[source])
        free = self.tables.num_free
        self.runtime.copy_prefix(source, into, count)
        self.oracle.copy_prefix(source, into, count)
        assert self.tables.num_free >= free
        self.lengths[into] = count

    @rule(lane=lanes)
    def snapshot(self, lane: int) -> None:
        self.saved.append(
            (self.lengths[lane], self.runtime.snapshot(lane), self.oracle.snapshot(lane))
        )

    @precondition(lambda self: self.saved)
    @rule(lane=lanes, at=st.integers(0, 9))
    def restore(self, lane: int, at: int) -> None:
        length, saved, oracle_saved = self.saved[at % len(self.saved)]
        self.lengths[lane] = 0
        kept = self.runtime.restore(lane, saved)
        if kept == length:
            assert self.oracle.restore(lane, oracle_saved) == length
        else:
            assert kept == 0
            assert sum(self.lengths) + length > self.CAPACITY
            self.oracle.truncate(lane, 0)
        self.lengths[lane] = kept

    @rule(lane=lanes)
    def fail(self, lane: int) -> None:
        count = min(7, self.CONTEXT - self.lengths[lane], self.CAPACITY - sum(self.lengths))
        if count <= 0:
            return
        self.runtime._model.fails = True
        with pytest.raises(RuntimeError, match="as ordered"):
            self.runtime.step(build_step((lane, TEXT[:count], self.lengths[lane])))
        self.runtime._model.fails = False

    @invariant()
    def nothing_leaks(self) -> None:
        check_tables(self.tables)
        assert self.tables.lengths.tolist() == self.lengths
        assert self.tables.num_tokens <= self.CAPACITY


TestPagedMachine = PagedMachine.TestCase
TestPagedMachine.pytestmark = [pytest.mark.slow]
TestPagedMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("capacity", [1, 3, 4, 17, 50, 96])
def test_tokens_fit_in_any_distribution(capacity: int) -> None:
    rng = np.random.default_rng(capacity)
    for _ in range(40):
        tables = BlockTables(4, 24, capacity, BLOCK)
        assert tables.num_blocks == blocks_for(4, 24, capacity, BLOCK) <= 24
        for _ in range(12):
            lanes = np.flatnonzero(rng.random(4) < 0.6)
            lanes = lanes[tables.lengths[lanes] < 24]
            starts = tables.lengths[lanes]
            ends = np.minimum(starts + rng.integers(1, 6, len(lanes)), 24)
            room = tables.lengths.sum() + (ends - starts).sum() <= capacity
            assert (tables.extend(lanes, ends) is not None) == room
            check_tables(tables)


def test_lanes_of_similar_length_are_one_call() -> None:
    groups = group_by_length(np.array([100, 4000, 90, 3990, 110]))
    assert [group.tolist() for group in groups] == [[1, 3], [0, 2, 4]]
    assert group_by_length(np.array([], np.int64)) == []
    together = group_by_length(np.array([5, 70, 60]))
    assert [group.tolist() for group in together] == [[0, 1, 2]]


# ---------------------------------------------------------------------- through the engine


def texts(capacity: int, **cache: Any) -> tuple[list[str], EngineHarness, BlockTables]:
    tables = BlockTables(5, 60, capacity, BLOCK)
    runtime = toy_runtime(5, 60, tables, capacity)
    harness = EngineHarness(FirstComeFirstServed(), runtime=runtime, cache=CacheConfig(**cache))
    prompts = [TEXT[:20] + OTHER[at : at + 3 * at] for at in range(7)]
    submitted = [
        harness.submit(prompt, max_tokens=30, temperature=0.8, seed=5) for prompt in prompts
    ]
    harness.run()
    check_tables(tables)
    assert all(one.finish_reason is not None for one in submitted)
    return [one.text() for one in submitted], harness, tables


@pytest.mark.slow
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_everybody_finishes_in_a_pool_that_is_too_small_for_all(prefix_reuse: bool) -> None:
    plenty, _, _ = texts(300, prefix_reuse=prefix_reuse)
    scarce, harness, _ = texts(80, prefix_reuse=prefix_reuse)
    assert scarce == plenty
    assert len(set(plenty)) > 1
    assert harness.engine.scheduler.num_preemptions > 0
