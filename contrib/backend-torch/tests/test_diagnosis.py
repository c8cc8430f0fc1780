"""What ``stoker doctor`` says of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stoker
from stoker_backend_torch import diagnosis
from stoker_backend_torch.backend import TorchBackend


def test_libraries_device_kernels_and_models(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    models = [
        stoker.LocalModel(path=path, model_id=path.name, reference=str(path))
        for path in (tiny_folder, empty)
    ]
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    found = {
        (finding.topic, finding.level, finding.message)
        for finding in TorchBackend().diagnose(models)
    }
    messages = {topic: message for topic, level, message in found if level == "ok"}
    assert torch.__version__ in messages["torch"]
    assert messages["torch model"] == "The files of tiny-llama are complete."
    (problem,) = (message for _, level, message in found if level == "problem")
    assert "empty" in problem
    assert "config.json" in problem
    if not torch.cuda.is_available():
        assert ("torch kernels", "warning") in {(topic, level) for topic, level, _ in found}


def test_a_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("no such library")

    monkeypatch.setattr(diagnosis, "_devices", fail)
    (finding,) = TorchBackend().diagnose([])
    assert finding.level == "problem"
    assert "no such library" in finding.message
    assert "pip install" in finding.cure
