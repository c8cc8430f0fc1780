"""Fixtures: tiny models in files of their own, loaded, and small steps over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stoker
from legacy_ggml import make_model
from stoker_backend_ctransformers.backend import CTransformersBackend
from stoker_backend_ctransformers.options import CTransformersOptions
from stoker_backend_ctransformers.runtime import CTransformersRuntime

Rows = tuple[int, Sequence[int], int]  # lane, token ids, position of the first
LANES = 3


@pytest.fixture(autouse=True)
def _cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Callable[..., CTransformersRuntime]]:
    """Load a model: ``load("gpt2", lanes=2)`` or ``load(path)``; all are closed at the end."""
    loaded: list[CTransformersRuntime] = []

    def make(
        model: str | Path = "gpt2",
        *,
        half: bool = False,
        lanes: int | None = LANES,
        context: int | None = None,
        max_step_tokens: int = 512,
        **options: Any,
    ) -> CTransformersRuntime:
        if isinstance(model, str):
            path = tmp_path / f"{model}{'-f16' if half else ''}.bin"
            path.write_bytes(make_model(model).to_bytes(half=half))
        else:
            path = model
        settings = stoker.LoadSettings(
            lanes=lanes,
            context_length=context,
            threads=1,
            max_step_tokens=max_step_tokens,
            options=CTransformersOptions(**{"self_test": False, **options}),
        )
        local = stoker.LocalModel(path=path, model_id="tiny", reference=str(path))
        loaded.append(CTransformersBackend().load(local, settings))
        return loaded[-1]

    yield make
    for runtime in loaded:
        runtime.close()


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

    def step(
        runtime: CTransformersRuntime, *rows: Rows, every: bool = False
    ) -> np.ndarray[Any, Any]:
        output = runtime.step(build_step(*rows, every=every))
        assert not output.no_room
        return output.logits.copy()

    return step
