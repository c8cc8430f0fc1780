"""The backend under stoker's conformance suite, with the real default model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import stoker_backend_gguf
from stoker import LoadSettings, LocalModel
from stoker.testing import BackendConformance, BackendUnderTest
from stoker_backend_gguf.options import GgufOptions

pytestmark = pytest.mark.model


def under_test(path: Path, **options: Any) -> BackendUnderTest:
    (info,) = stoker_backend_gguf.stoker_register_backends()
    return BackendUnderTest(
        info=info,
        model=LocalModel(path=path, model_id="model", reference=str(path)),
        settings=LoadSettings(
            lanes=3,
            context_length=128,
            max_step_tokens=64,
            options=GgufOptions(self_test=False, **options),
        ),
        num_tokens=5,
    )


class TestPartitioned(BackendConformance):
    @pytest.fixture
    def backend(self, model_path: Path) -> BackendUnderTest:
        return under_test(model_path)


class TestUnified(BackendConformance):
    @pytest.fixture
    def backend(self, model_path: Path) -> BackendUnderTest:
        return under_test(model_path, kv_unified=True, kv_tokens=256, embeddings=False)
