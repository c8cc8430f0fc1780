"""The backend under stoker's conformance suite, with tiny models of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import stoker_backend_ctransformers
from legacy_ggml import make_model
from stoker import LoadSettings, LocalModel
from stoker.testing import BackendConformance, BackendUnderTest
from stoker_backend_ctransformers.options import CTransformersOptions


def under_test(folder: Path, architecture: str, **options: Any) -> BackendUnderTest:
    (info,) = stoker_backend_ctransformers.stoker_register_backends()
    path = folder / f"{architecture}.bin"
    path.write_bytes(make_model(architecture).to_bytes())
    return BackendUnderTest(
        info=info,
        model=LocalModel(path=path, model_id="tiny", reference=str(path)),
        settings=LoadSettings(
            lanes=3,
            context_length=128,
            threads=1,
            max_step_tokens=128,
            options=CTransformersOptions(self_test=False, **options),
        ),
    )


class TestGpt2(BackendConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendUnderTest:
        return under_test(tmp_path, "gpt2")


class TestLlama(BackendConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendUnderTest:
        return under_test(tmp_path, "llama")


class TestFalcon(BackendConformance):
    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendUnderTest:
        return under_test(tmp_path, "falcon")


class TestReset(BackendConformance):
    """With ``truncation = "reset"``: what the core does without going back in a lane."""

    @pytest.fixture
    def backend(self, tmp_path: Path) -> BackendUnderTest:
        return under_test(tmp_path, "gpt_neox", truncation="reset")
