"""The backend under stoker's conformance suite, with small random models of two kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CONFIGS

import stoker_backend_torch
from stoker import LoadSettings, LocalModel
from stoker.testing import BackendConformance, BackendUnderTest
from stoker_backend_torch.options import TorchOptions


def under_test(path: Path, **options: Any) -> BackendUnderTest:
    (info,) = stoker_backend_torch.stoker_register_backends()
    return BackendUnderTest(
        info=info,
        model=LocalModel(path=path, model_id="model", reference=str(path)),
        settings=LoadSettings(
            lanes=3,
            context_length=128,
            max_step_tokens=64,
            threads=1,
            options=TorchOptions(**options),
        ),
        num_tokens=5,
    )


@pytest.fixture(scope="session")
def gemma_folder(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Gemma 3, with sliding windows of 8 tokens."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny-gemma", CONFIGS["gemma3"]())


class TestContiguous(BackendConformance):
    @pytest.fixture
    def backend(self, tiny_folder: Path) -> BackendUnderTest:
        return under_test(tiny_folder, dtype="float32", kv="contiguous")


class TestSlidingWindow(BackendConformance):
    @pytest.fixture
    def backend(self, gemma_folder: Path) -> BackendUnderTest:
        return under_test(gemma_folder, dtype="float32", kv="contiguous", embeddings=False)


class TestPaged(BackendConformance):
    @pytest.fixture
    def backend(self, gemma_folder: Path) -> BackendUnderTest:
        """Less memory than all lanes could fill."""
        return under_test(
            gemma_folder, dtype="float32", kv="paged", kv_tokens=200, embeddings=False
        )


class TestDrawnOnTheDevice(BackendConformance):
    @pytest.fixture
    def backend(self, tiny_folder: Path) -> BackendUnderTest:
        return under_test(tiny_folder, sampling="device", embeddings=False)
