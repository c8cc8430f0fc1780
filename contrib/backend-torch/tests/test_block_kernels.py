"""What reads blocks where they are, as far as that can be tried without a GPU, and which of it is taken."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT, LANES, VOCABULARY, build_step, forward, make_model, make_runtime
from torch.nn.attention.flex_attention import flex_attention

from stoker_backend_torch import choosing
from stoker_backend_torch.attention import LayerCall
from stoker_backend_torch.block_attention import BlockAttention, BlockStep, GatheredAttention
from stoker_backend_torch.block_kernels import FlashAttention, FlexAttention, compile_flex
from stoker_backend_torch.blocks import BlockTables
from stoker_backend_torch.choosing import (
    AttentionShape,
    GuardedAttention,
    choose_attention,
    choose_block_size,
    is_same,
)
from stoker_backend_torch.graphs import DecodeGraphs, Recording, batch_sizes
from stoker_backend_torch.kv import LayerShape
from stoker_backend_torch.options import TorchOptions
from stoker_backend_torch.ragged import Run
from stoker_backend_torch.runtime import TorchRuntime

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
BLOCK, BLOCKS = 16, 9
TEXT = np.random.default_rng(7).integers(3, VOCABULARY, 60).tolist()
# torch says once that it computes step by step, which is what these tests want of it.
stepwise = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def numbers(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def block_step(lengths: list[int], tables: list[list[int]], runs: list[Run]) -> BlockStep:
    table = np.array(tables, np.int32)
    return BlockStep(
        num_decodes=len(lengths) - len(runs),
        runs=runs,
        tables=table,
        lengths=np.array(lengths, np.int64),
        device_tables=torch.from_numpy(table),
        device_lengths=torch.tensor(lengths, dtype=torch.int32),
    )


# ---------------------------------------------------------------------- flex


@pytest.mark.slow
@stepwise
@pytest.mark.parametrize("window", [0, 5, 18])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks"])
def test_flex_attention_sees_what_it_should(window: int, kind: str) -> None:
    step = block_step(
        [33, 20, 1, 41, 4],
        [[5, 2, 7], [5, 3, 8], [6, 8, 8], [1, 0, 4], [3, 8, 8]],
        [Run(3, 14, 3, 30), Run(14, 18, 4, 0)],
    )
    call = LayerCall(
        scaling=0.3,
        window=window,
        softcap=1.5 if kind == "softcap" else 0.0,
        sinks=numbers(4, seed=9) if kind == "sinks" else None,
    )
    keys, values = numbers(BLOCKS, BLOCK, 2, 8, seed=1), numbers(BLOCKS, BLOCK, 2, 6, seed=2)
    flex, gathered = (
        FlexAttention(flex_attention, BLOCKS, BLOCK),
        GatheredAttention(CPU, torch.float32),
    )
    found = []
    for attention in (flex, gathered):
        attention.begin(step)
        found.append(attention.attend(numbers(18, 4, 8), keys, values, call))
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=1e-5)


@pytest.mark.slow
def test_flex_attention_is_compiled_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = []

    def backend(graph: Any, _: Any) -> Any:
        programs.append(graph)
        return graph

    arguments: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **how: arguments.update(how) or function)
    compile_flex()
    monkeypatch.undo()
    compute = torch.compile(flex_attention, backend=backend, **arguments)
    flex, gathered = (
        FlexAttention(compute, BLOCKS, BLOCK),
        GatheredAttention(CPU, torch.float32),
    )
    keys, values = numbers(BLOCKS, BLOCK, 2, 8, seed=1), numbers(BLOCKS, BLOCK, 2, 8, seed=2)
    query = numbers(140, 4, 8)
    counts = []
    with torch.inference_mode():
        for shift in range(3):
            for lengths, run_rows in (([9], 0), ([3, 9, 20], 0), ([3, 17, 40], 5), ([1, 140], 135)):
                run_rows += shift * (run_rows > 0)
                lengths = [length + shift for length in lengths]
                count = len(lengths) - (run_rows > 0)
                runs = [Run(count, count + run_rows, count, lengths[-1] - run_rows)]
                table = [[(7 * i + j) % BLOCKS for j in range(BLOCKS)] for i in range(len(lengths))]
                step = block_step(lengths, table, runs if run_rows else [])
                for attention in (flex, gathered):
                    attention.begin(step)
                for window in (0, 4 + shift):
                    call = LayerCall(scaling=0.3, window=window)
                    rows = query[: count + run_rows]
                    got = flex.attend(rows, keys, values, call)
                    torch.testing.assert_close(got, gathered.attend(rows, keys, values, call))
            counts.append(len(programs))
    # Lengths, positions and windows are no reason to compile again.
    assert counts[0] == counts[2] <= 6


# ---------------------------------------------------------------------- flash


def flash_like(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: list[int],
    counts: list[int],
    how: dict[str, Any],
) -> torch.Tensor:
    """What flash-attn documents, row by row: the last query of a sequence sees its last key."""
    left, right = how["window_size"]
    assert how["causal"]
    assert right == (0 if left >= 0 else -1)
    rows, at = [], 0
    for table, length, count in zip(how["block_table"], lengths, counts, strict=True):
        key, value = (part[table.long()].flatten(0, 1) for part in (keys, values))
        for own in range(length - count, length):
            first = max(0, own - left) if left >= 0 else 0
            group = query.shape[1] // keys.shape[2]
            near = key[first : own + 1].repeat_interleave(group, 1)
            scores = torch.einsum("hd,shd->hs", query[at], near) * how["softmax_scale"]
            if how["softcap"]:
                scores = how["softcap"] * torch.tanh(scores / how["softcap"])
            there = value[first : own + 1].repeat_interleave(group, 1)
            rows.append(torch.einsum("hs,shd->hd", scores.softmax(-1), there))
            at += 1
    return torch.stack(rows)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package flash_attn with the functions that are used, on the CPU."""

    def with_cache(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        cache_seqlens: torch.Tensor,
        **how: Any,
    ) -> torch.Tensor:
        assert query.shape[1] == 1
        assert cache_seqlens.dtype == torch.int32
        lengths = cache_seqlens.tolist()
        return flash_like(query[:, 0], keys, values, lengths, [1] * len(query), how)[:, None]

    def varlen(
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **how: Any,
    ) -> torch.Tensor:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        counts, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max_seqlen_q, max_seqlen_k) == (max(counts), max(lengths))
        return flash_like(query, keys, values, lengths, counts, how)

    package = SimpleNamespace(flash_attn_varlen_func=varlen, flash_attn_with_kvcache=with_cache)
    monkeypatch.setitem(sys.modules, "flash_attn", package)  # type: ignore[arg-type] # enough of a module


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_flash_attention_is_told_what_it_should(window: int, softcap: float) -> None:
    call = LayerCall(scaling=0.3, window=window, softcap=softcap)
    keys, values = numbers(BLOCKS, BLOCK, 2, 8, seed=1), numbers(BLOCKS, BLOCK, 2, 8, seed=2)
    tables = [[5, 2, 7], [5, 3, 8], [1, 0, 4]]
    for lengths, runs in (([33, 20, 41], []), ([33, 20, 41], [Run(2, 13, 2, 30)])):
        step = block_step(lengths, tables, runs)
        query = numbers(13 if runs else 3, 4, 8)
        flashy, gathered = FlashAttention(CPU), GatheredAttention(CPU, torch.float32)
        flashy.begin(step)
        gathered.begin(step)
        got = flashy.attend(query, keys, values, call)
        torch.testing.assert_close(got, gathered.attend(query, keys, values, call))
    with pytest.raises(ValueError, match="sinks"):
        flashy.attend(query, keys, values, LayerCall(scaling=1.0, sinks=torch.zeros(4)))


# ---------------------------------------------------------------------- the choice


@pytest.mark.usefixtures("flash")
def test_blocks_are_as_large_as_attention_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(choosing.importlib.util, "find_spec", lambda _: found[-1])
    half = torch.bfloat16
    for is_there, want in ((True, 256), (None, 128)):
        found.append(is_there)
        assert choose_block_size(TorchOptions(), CUDA, half) == want
    found.append(True)
    assert choose_block_size(TorchOptions(), CUDA, torch.float32) == 128
    assert choose_block_size(TorchOptions(), CPU, half) == 0
    assert choose_block_size(TorchOptions(kv="contiguous"), CUDA, half) == 0
    assert choose_block_size(TorchOptions(kv="paged"), CPU, half) == 16
    assert choose_block_size(TorchOptions(kv="paged", block_size=32), CUDA, half) == 32


def choose(*, sinks: bool = False, **options: Any) -> tuple[BlockAttention, list[str]]:
    shape = AttentionShape([LayerShape(2, 8, 8)] * 3, 4, has_sinks=sinks)
    return choose_attention(TorchOptions(**options), shape, 10, 16, torch.float32, CPU)


def test_attention_that_does_not_work_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, warnings = choose()
    assert (attention.name, warnings) == ("gathered", [])
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention, warnings = choose(attention="flash")
    assert attention.name == "gathered"
    assert "flash does not work here (import of flash_attn halted" in warnings[0]
    monkeypatch.setattr(choosing, "compile_flex", lambda: lambda query, *_, **__: query * 0)
    attention, warnings = choose(attention="flex")
    assert attention.name == "gathered"
    assert warnings == [
        "Attention by flex does not work here (it gives other numbers than plain attention)."
    ]


@pytest.mark.slow
@stepwise
@pytest.mark.usefixtures("flash")
def test_attention_that_works_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "compile_flex", lambda: flex_attention)
    for name in ("flex", "flash"):
        attention, warnings = choose(attention=name)
        assert (attention.name, attention.is_static, warnings) == (name, True, [])
    assert choose(attention="flex", sinks=True)[0].name == "flex"
    attention, warnings = choose(attention="flash", sinks=True)
    assert (attention.name, warnings) == (
        "gathered",
        ["Attention by flash does not work here (flash-attn knows no sinks)."],
    )


def test_attention_that_fails_later_is_left_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Fails(GatheredAttention):
        name = "new"
        is_static = True

        def attend(self, *_: Any) -> torch.Tensor:
            raise RuntimeError("no such kernel")

    keys, values = numbers(BLOCKS, BLOCK, 2, 8, seed=1), numbers(BLOCKS, BLOCK, 2, 8, seed=2)
    step = block_step([33, 20], [[5, 2, 7], [5, 3, 8]], [])
    plain = GatheredAttention(CPU, torch.float32)
    guarded = GuardedAttention(Fails(CPU, torch.float32), plain)
    assert guarded.is_static
    want = GatheredAttention(CPU, torch.float32)
    want.begin(step)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            guarded.begin(step)
            call = LayerCall(scaling=1.0)
            got = guarded.attend(numbers(2, 4, 8), keys, values, call)
            assert torch.equal(got, want.attend(numbers(2, 4, 8), keys, values, call))
    assert [record.getMessage() for record in caplog.records] == [
        "attention by new failed (no such kernel); from now on it is gathered"
    ]
    assert (guarded.name, guarded.is_static) == ("gathered", False)


def test_numbers_that_are_none_are_not_the_same() -> None:
    assert is_same(torch.ones(3), torch.ones(3))
    assert not is_same(torch.tensor([1.0, torch.nan]), torch.ones(2))
    assert not is_same(torch.ones(2), torch.tensor([1.0, torch.nan]))


# ---------------------------------------------------------------------- recorded steps


class Anew(Recording):
    """A recording that computes anew, into the same memory."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self._compute = compute
        self.output = compute().clone()
        self.num_replays = 0

    def replay(self) -> None:
        self.output.copy_(self._compute())
        self.num_replays += 1


@pytest.fixture(scope="module")
def recorded() -> tuple[TorchRuntime, DecodeGraphs, list[Anew], np.ndarray[Any, Any]]:
    """A runtime with recorded steps, the recordings, and the truth."""
    model = make_model("gemma3")
    truth = forward(model, TEXT)
    tables = BlockTables(LANES, CONTEXT, 400, BLOCK)
    runtime = make_runtime(model, tables=tables)
    memory: Any = runtime._memory
    made: list[Anew] = []

    def record(compute: Callable[[], torch.Tensor]) -> Anew:
        made.append(Anew(compute))
        return made[-1]

    memory.attention = FlexAttention(flex_attention, tables.num_blocks + 1, BLOCK)
    graphs = DecodeGraphs(model, memory, CPU, record)
    graphs.prepare()
    runtime._graphs = graphs
    return runtime, graphs, made, truth


def test_sizes_of_batches() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(8) == [1, 2, 4, 8]


@pytest.mark.slow
@stepwise
def test_recorded_steps_say_what_the_model_does(recorded: Any) -> None:
    runtime, graphs, made, truth = recorded
    assert graphs.sizes == [1, 2, 4, 6]
    memory = runtime._memory
    before = [one.num_replays for one in made]
    output = runtime.step(build_step((4, TEXT[:30], 0), (1, TEXT[:20], 0), (0, TEXT[:17], 0)))
    assert [one.num_replays for one in made] == before  # longer runs are not for recordings
    for at in range(3):
        output = runtime.step(
            build_step(
                (4, TEXT[30 + at : 31 + at], 30 + at),
                (0, TEXT[17 + at : 18 + at], 17 + at),
                (1, TEXT[20 + at : 21 + at], 20 + at),
            )
        )
        want = truth[[30 + at, 17 + at, 20 + at]]
        np.testing.assert_allclose(output.logits, want, atol=2e-5 * np.abs(want).max(), rtol=0)
    assert [one.num_replays for one in made] == [n + 3 * (i == 2) for i, n in enumerate(before)]
    # The row of nobody wrote to nobody's block only.
    check = runtime.step(build_step((0, TEXT[20:28], 20), (2, TEXT[:9], 0))).logits
    np.testing.assert_allclose(check, truth[[27, 8]], atol=2e-5 * np.abs(truth).max(), rtol=0)
    assert memory.tables.references[memory.tables.scratch] == 0


@pytest.mark.slow
@stepwise
@pytest.mark.parametrize("fault", ["raises", "ignores its buffers"])
def test_recordings_that_do_not_work_are_not_used(
    recorded: Any, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    runtime, _, _, _ = recorded

    class Broken(Anew):
        def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
            if fault == "raises":
                raise RuntimeError("operation not permitted")
            super().__init__(compute)

        def replay(self) -> None:
            """Nothing."""

    graphs = DecodeGraphs(runtime._model, runtime._memory, CPU, Broken)
    with caplog.at_level(logging.WARNING):
        graphs.prepare()
    assert graphs.sizes == []
    reason = "operation not permitted" if fault == "raises" else "gives other logits"
    assert reason in caplog.text
    assert len(caplog.records) == 1


def test_attention_that_gathers_is_never_recorded(recorded: Any) -> None:
    runtime = make_runtime(make_model("llama"), tables=BlockTables(LANES, CONTEXT, 400, BLOCK))
    assert runtime.record() == []
    memory: Any = runtime._memory
    graphs = DecodeGraphs(runtime._model, memory, CPU, Anew)
    graphs.prepare()
    assert graphs.sizes == []


# ---------------------------------------------------------------------- loading


@pytest.mark.slow
def test_a_model_is_loaded_with_paged_memory(load: Callable[..., Any], tiny_folder: Path) -> None:
    runtime = load(tiny_folder, lanes=3, context=100, kv="paged", kv_tokens=150, dtype="float32")
    info = runtime.info
    assert info.settings["kv"] == "paged, 16 tokens a block"
    assert info.settings["attention"] == "gathered"
    assert (info.num_lanes, info.context_length, info.kv_capacity_tokens) == (3, 100, 150)
    assert info.capabilities.shares_kv
    assert not info.capabilities.lane_locality
    assert info.kv_bytes == runtime._memory.num_bytes
    tokens = [token % 200 for token in TEXT[:50]]
    first = runtime.step(build_step((0, tokens, 0))).logits.copy()
    runtime.copy_prefix(0, 2, 49)
    again = runtime.step(build_step((2, tokens[49:], 49))).logits
    np.testing.assert_allclose(again, first, atol=1e-5)
    contiguous = load(tiny_folder, lanes=3, context=100, kv_tokens=150, dtype="float32")
    assert contiguous.info.context_length == 50
    assert contiguous.info.kv_bytes == contiguous._memory.num_bytes
    assert "50 tokens instead of 100" in contiguous.info.warnings[0]
    np.testing.assert_allclose(contiguous.step(build_step((1, tokens, 0))).logits, first, atol=1e-5)
