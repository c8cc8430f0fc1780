"""Devices, types, memory, and what is made of them: lanes and contexts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import stoker
from stoker_backend_torch import devices, openmp, planning
from stoker_backend_torch.options import TorchOptions
from stoker_backend_torch.planning import Plan, make_plan, max_context

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


# ----------------------------------------------------------------------------- devices and types


@pytest.mark.usefixtures("two_gpus")
def test_the_best_device_is_chosen_and_others_can_be() -> None:
    assert devices.choose_device("auto") == torch.device("cuda:0")
    assert devices.choose_device("cuda") == torch.device("cuda:0")
    assert devices.choose_device("cuda:1") == torch.device("cuda:1")
    assert devices.choose_device("cpu") == CPU


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["cuda:2", "gpu", "", "cpu:1", "mps", "meta"])
def test_devices_that_are_not_there_are_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(stoker.ConfigError, match=r"one of auto, cuda:0, cuda:1, cpu$") as caught:
        devices.choose_device(name)
    assert repr(name) in str(caught.value)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_it_is_mps_or_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.choose_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("auto") == torch.device("mps")
    assert devices.choose_device("mps") == torch.device("mps")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("sse avx512f avx512_bf16", torch.bfloat16),
        ("sse amx_bf16 amx_tile", torch.bfloat16),
        ("asimd bf16", torch.bfloat16),
        ("sse avx2 avx512f", torch.float32),
        ("", torch.float32),
    ],
)
def test_cpus_compute_in_what_they_have_instructions_for(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: torch.dtype
) -> None:
    monkeypatch.setattr(devices, "cpu_flags", lambda: frozenset(flags.split()))
    assert devices.choose_dtype("auto", CPU) == expected
    assert devices.choose_dtype("float16", CPU) == torch.float16


def test_gpus_compute_in_what_they_support(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native
        )
        assert devices.choose_dtype("auto", torch.device("cuda:0")) == expected
    assert devices.choose_dtype("auto", torch.device("mps")) == torch.float16


# ----------------------------------------------------------------------------- memory


def test_memory_of_the_cpu_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_memory", lambda: 1_500_000)
    assert devices.free_memory(CPU) == 1_500_000


def test_what_torch_keeps_for_itself_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert devices.free_memory(torch.device("cuda:0")) == 1200


@pytest.mark.slow
def test_bytes_of_a_token(llama_config: Callable[..., Any]) -> None:
    import transformers

    per_token = devices.kv_bytes_per_token
    assert per_token(llama_config(), torch.bfloat16) == 2 * 2 * (8 + 8) * 2
    assert per_token(llama_config(head_dim=16), torch.float32) == 2 * 2 * (16 + 16) * 4
    gpt2 = transformers.GPT2Config(n_layer=3, n_head=4, n_embd=32)
    assert per_token(gpt2, torch.float16) == 3 * 4 * (8 + 8) * 2
    latent = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, hidden_size=64, head_dim=8,
        kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    )  # fmt: skip
    assert per_token(latent, torch.bfloat16) == 2 * 4 * (24 + 12) * 2
    uneven = SimpleNamespace(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=[1, 3], head_dim=8
    )
    assert per_token(uneven, torch.bfloat16) == 4 * 16 * 2


# ----------------------------------------------------------------------------- lanes and contexts


def rotary(length: int, **changes: Any) -> SimpleNamespace:
    """The part of a configuration that says how long texts may be."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, **changes}
    return SimpleNamespace(max_position_embeddings=length, rope_parameters=rope)


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, llama_config: Callable[..., Any]) -> Callable[..., Plan]:
    """``plan(free=..., lanes=..., config={...}, options)``: of a model of 100 MB with 1 kB a token."""

    def make(
        *,
        free: int = GIB,
        lanes: int | None = None,
        context: int | None = None,
        config: Any = None,
        device: torch.device = CPU,
        block_size: int = 0,
        **options: Any,
    ) -> Plan:
        monkeypatch.setattr(planning, "free_memory", lambda _: free)
        return make_plan(
            Path("m"),
            config or rotary(2048),
            stoker.LoadSettings(lanes=lanes, context_length=context),
            TorchOptions(**options),
            weights_bytes=100_000_000,
            kv_bytes_per_token=1000,
            device=device,
            block_size=block_size,
        )

    return make


def test_lanes_are_what_half_of_the_free_memory_holds(plan: Callable[..., Plan]) -> None:
    found = plan(free=2 * (100_000_000 + 5 * 2_048_000) + 1000)
    assert (found.num_lanes, found.context_length, found.kv_bytes) == (5, 2048, 5 * 2_048_000)
    assert plan(free=100 * GIB).num_lanes == 16
    assert plan(free=103_000_000).num_lanes == 1
    # A GPU is there for models, and computes more of them at once.
    assert plan(free=100 * GIB, device=torch.device("cuda:0")).num_lanes == 64
    assert plan(free=100 * GIB, lanes=100, context=10).kv_capacity_tokens == 1000
    assert plan(free=100 * GIB, lanes=10, kv_tokens=5000).kv_capacity_tokens == 5000


def test_what_does_not_fit_is_refused_with_the_numbers(plan: Callable[..., Plan]) -> None:
    with pytest.raises(stoker.OutOfMemoryError) as caught:
        plan(free=110_000_000, lanes=8)
    message = str(caught.value)
    assert "m does not fit: its weights take 100.0 MB" in message
    assert "8 lanes with 2048 tokens 16.4 MB" in message
    assert "only 110.0 MB of the memory of cpu are free; lower the context" in message
    with pytest.raises(stoker.OutOfMemoryError, match="use a smaller model"):
        plan(free=50_000_000)
    assert plan(free=50_000_000, check_memory=False).num_lanes == 1


def test_lanes_with_memory_of_their_own_share_out_what_may_be_used(
    plan: Callable[..., Plan],
) -> None:
    found = plan(kv_tokens=5000)  # two of 2048 tokens
    assert (found.num_lanes, found.context_length, found.kv_capacity_tokens) == (2, 2048, 4096)
    assert found.kv_bytes == 4_096_000
    found = plan(kv_tokens=500)
    assert (found.num_lanes, found.context_length, found.warnings) == (1, 500, ())
    found = plan(lanes=4, context=2000, kv_tokens=5000)
    assert (found.num_lanes, found.context_length, found.kv_bytes) == (4, 1250, 5_000_000)
    assert "1250 tokens instead of 2000: kv_tokens = 5000" in found.warnings[0]
    with pytest.raises(
        stoker.ConfigError, match="kv_tokens = 3 is less than a token for each of 4"
    ):
        plan(lanes=4, kv_tokens=3)


def test_lanes_that_share_blocks_may_be_more_than_the_memory_holds(
    plan: Callable[..., Plan],
) -> None:
    # Of half of the memory: the weights, and 16 blocks in which lanes end.
    found = plan(free=2 * (100_000_000 + 10_256_000), block_size=16)
    assert (found.num_lanes, found.context_length) == (16, 2048)
    assert (found.kv_capacity_tokens, found.block_size) == (10_000, 16)
    assert 10_000_000 < found.kv_bytes <= 10_256_000 + 16_000
    found = plan(lanes=40, kv_tokens=1000, block_size=16)
    assert (found.num_lanes, found.context_length, found.kv_capacity_tokens) == (40, 1000, 1000)
    assert plan(lanes=2, context=100, kv_tokens=1000, block_size=16).kv_capacity_tokens == 200
    assert plan(free=50_000_000, block_size=16, check_memory=False).kv_capacity_tokens == 2048
    with pytest.raises(
        stoker.OutOfMemoryError, match=r"900000 tokens in blocks .* lower kv_tokens"
    ):
        plan(free=600_000_000, lanes=500, kv_tokens=900_000, block_size=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lanes": 0}, "lanes = 0"),
        ({"lanes": 5000}, "lanes = 5000"),
        ({"context": 0}, "context = 0"),
    ],
)
def test_settings_that_cannot_be(
    plan: Callable[..., Plan], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(stoker.ConfigError, match=message):
        plan(**settings)


def test_contexts_follow_the_model(plan: Callable[..., Plan]) -> None:
    assert plan(config=rotary(100_000)).context_length == 4096
    longer = plan(context=3000)
    assert longer.context_length == 3000
    assert "exceeds the 2048 that the model was trained with" in longer.warnings[0]
    # Positions from a table end where the table does.
    table = plan(config=SimpleNamespace(max_position_embeddings=512), context=600)
    assert table.context_length == 512
    assert "no positions beyond it" in table.warnings[0]
    assert plan(config=SimpleNamespace(), context=600).warnings == ()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_factors_that_depend_on_the_length_bound_the_context(
    plan: Callable[..., Plan], kind: str
) -> None:
    config = rotary(2048, rope_type=kind, original_max_position_embeddings=512)
    found = plan(config=config)
    assert found.context_length == 512
    assert "512 tokens instead of 2048" in found.warnings[0]
    assert "texts of different lengths" in found.warnings[0]
    assert not plan(config=config, context=500).warnings
    assert max_context(rotary(2048, rope_type=kind))[0] == 2048
    assert max_context(rotary(2048, rope_type="linear")) == (2048, "")
    # Some models have other settings for each kind of layer.
    each = {"full_attention": config.rope_parameters, "sliding_attention": {"rope_type": "default"}}
    nested = SimpleNamespace(max_position_embeddings=2048, rope_parameters=each)
    assert max_context(nested)[0] == 512


# ----------------------------------------------------------------------------- OpenMP


def in_a_process(code: str, **environ: str) -> list[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environ}, capture_output=True, check=True, text=True,
    )  # fmt: skip
    return done.stdout.split("\n")


def test_openmp_is_told_before_it_is_loaded() -> None:
    code = (
        "import os; from stoker_backend_torch.openmp import prepare_openmp as p; print(*p('passive'), "
        "os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT')); print(*p('active'))"
    )
    assert in_a_process(code)[:2] == ["passive None passive 300", "passive None"]
    assert in_a_process(code, OMP_WAIT_POLICY="ACTIVE")[0] == "active None ACTIVE None"


def test_openmp_that_is_loaded_already_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(openmp, "_chosen", [])
    assert openmp.prepare_openmp("default") == ("default", None)
    policy, warning = openmp.prepare_openmp("passive")
    assert policy == "default"
    assert warning is not None
    assert "set OMP_WAIT_POLICY=PASSIVE" in warning
    assert "OMP_WAIT_POLICY" not in os.environ


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    openmp.set_threads(1)
    assert (torch.get_num_threads(), torch.get_num_interop_threads()) == (1, 1)
    openmp.set_threads(before)
