"""What the backend offers to a tuner, and files with weights of other types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import stoker
from stoker_backend_gguf import tuning
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.gguf_header import read_header
from stoker_backend_gguf.options import GgufOptions
from stoker_backend_gguf.runtime import GgufRuntime


@pytest.fixture
def local(model_path: Path) -> stoker.LocalModel:
    return stoker.LocalModel(
        path=model_path,
        model_id="model",
        reference=str(model_path),
        size_bytes=model_path.stat().st_size,
    )


def test_every_value_is_made_of_options_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    model = stoker.LocalModel(path=Path("x.gguf"), model_id="x", reference="x")
    found = GgufBackend().tunables(model)
    names = {tunable.name for tunable in found}
    assert names == {
        *("kv_type", "kv_unified", "threads", "batch_threads", "waiting", "flash_attention"),
        *("n_ubatch", "extra_buffers"),
    }
    known = {field.name for field in msgspec.structs.fields(GgufOptions)}
    for tunable in found:
        labels = [value.label for value in tunable.values]
        assert tunable.default in labels
        assert len(set(labels)) == len(labels)
        for value in tunable.values:
            msgspec.convert(dict(value.options), GgufOptions, strict=True)
            assert set(value.requires) <= known


def test_the_defaults_are_what_the_options_default_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    defaults = GgufOptions()
    model = stoker.LocalModel(path=Path("x.gguf"), model_id="x", reference="x")
    for tunable in GgufBackend().tunables(model):
        if "threads" in tunable.name:  # by default the usable cores
            continue
        (value,) = [value for value in tunable.values if value.label == tunable.default]
        assert all(getattr(defaults, key) == wanted for key, wanted in value.options.items())


def test_what_the_environment_decides_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    model = stoker.LocalModel(path=Path("x.gguf"), model_id="x", reference="x")
    assert "waiting" not in {tunable.name for tunable in GgufBackend().tunables(model)}


def test_versions_name_the_bindings_and_their_libraries() -> None:
    versions = GgufBackend().versions()
    assert versions["stoker-backend-gguf"]
    assert versions["llama-cpp-python"]
    assert len(versions["llama.cpp libraries"]) == 12


@pytest.mark.parametrize(
    ("flags", "hinted"),
    [({"avx2"}, True), ({"avx2", "amx_int8"}, False), (set(), False)],
)
def test_the_hint_depends_on_the_cpu(
    local: stoker.LocalModel, monkeypatch: pytest.MonkeyPatch, flags: set[str], hinted: bool
) -> None:
    monkeypatch.setattr(tuning.machine, "cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(tuning.platform, "machine", lambda: "x86_64")
    offer = GgufBackend().requantization(local)
    assert offer is not None
    assert (offer.current, offer.lossy_source) == ("q4_1", True)
    assert "q4_1" not in offer.types
    assert bool(offer.hint) is hinted
    assert set(offer.faster) <= set(offer.types)
    assert bool(offer.faster) is hinted


def test_an_unknown_type_and_a_folder_that_is_not_there_are_refused(
    local: stoker.LocalModel, tmp_path: Path
) -> None:
    with pytest.raises(stoker.ModelError, match="q9 is no type to turn weights into: q8_0"):
        GgufBackend().requantize(local, "q9", tmp_path / "x.gguf")


@pytest.mark.model
@pytest.mark.slow
def test_weights_as_q8_0_say_nearly_the_same(
    local: stoker.LocalModel,
    tmp_path: Path,
    load: Callable[..., GgufRuntime],
    run: Callable[..., np.ndarray[Any, Any]],
) -> None:
    target = tmp_path / "model.q8_0.gguf"
    GgufBackend().requantize(local, "q8_0", target)
    assert read_header(target).metadata["general.file_type"] == 7
    assert target.stat().st_size > 1.3 * local.size_bytes
    own, other = load(lanes=1), load(path=target, lanes=1)
    text = "The baker weighed the flour twice and wrote the number down before he"
    tokens = own.tokenizer.encode(text, add_special=True, parse_special=False)
    rows = [run(runtime, (0, tokens, 0), every=True) for runtime in (own, other)]
    wanted, got = (row - np.logaddexp.reduce(row, axis=1, keepdims=True) for row in rows)
    divergence = (np.exp(wanted) * (wanted - got)).sum(axis=1)
    assert 0 <= divergence.mean() < 0.02
    assert (wanted.argmax(axis=1) == got.argmax(axis=1)).mean() > 0.8
