"""A model's store of snapshots, built from the configuration; and what tells models apart on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from stoker import Capabilities, LocalModel, RuntimeInfo
from stoker.config import CacheConfig
from stoker.engine.eviction import LeastRecentlyUsed
from stoker.engine.snapshot_store import TieredStore
from stoker.stores import build_store, model_fingerprint
from stoker.testing import ScriptedRuntime


def info(snapshot: bool = True, **facts: object) -> RuntimeInfo:
    base = ScriptedRuntime().info
    can = Capabilities(snapshot=snapshot)
    return RuntimeInfo(
        name=str(facts.get("name", base.name)),
        vocab_size=base.vocab_size,
        context_length=base.context_length,
        num_lanes=base.num_lanes,
        kv_capacity_tokens=base.kv_capacity_tokens,
        max_step_tokens=base.max_step_tokens,
        end_token_ids=base.end_token_ids,
        capabilities=can,
        settings=_settings(facts.get("settings")),
        fingerprint=str(facts.get("fingerprint", "")),
    )


def _settings(settings: object) -> Mapping[str, str]:
    return {str(k): str(v) for k, v in settings.items()} if isinstance(settings, dict) else {}


@pytest.fixture
def model(tmp_path: Path) -> LocalModel:
    path = tmp_path / "model.gguf"
    path.write_bytes(np.random.default_rng(1).bytes(3_000_000))
    os.utime(path, (1_000_000, 1_000_000))
    return LocalModel(path=path, model_id="m", reference=str(path))


def build(
    config: CacheConfig, model: LocalModel, facts: RuntimeInfo | None = None
) -> TieredStore | None:
    return build_store(config, facts or info(), model, "b", LeastRecentlyUsed())


def test_no_store_where_it_could_hold_nothing(model: LocalModel) -> None:
    assert build(CacheConfig(host_bytes=0), model) is None
    assert build(CacheConfig(host_bytes=1, prefix_reuse=False), model) is None


def test_a_runtime_without_snapshots_is_said_so(
    model: LocalModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert build(CacheConfig(host_bytes=1), model, info(snapshot=False)) is None
    assert "cannot make snapshots" in caplog.text


def test_the_second_server_runs_without_the_disk_and_says_so(
    model: LocalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CacheConfig(host_bytes=100, disk_bytes=10_000, disk_path=str(tmp_path / "disk"))
    first = build(config, model)
    second = build(config, model)
    assert first is not None
    assert second is not None
    assert set(first.stats().tiers) == {"host", "disk"}
    assert set(second.stats().tiers) == {"host"}
    assert "used by another server" in second.stats().disk_problem
    assert "without snapshots on disk" in caplog.text
    tokens = np.arange(3, dtype=np.int32)
    assert second.put(tokens, "", "t", b"x" * 50, 1.0)
    first.close()
    second.close()
    third = build(config, model)
    assert third is not None
    assert "disk" in third.stats().tiers
    third.close()


def test_the_default_directory_is_in_the_users_cache(
    model: LocalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STOKER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    store = build(CacheConfig(disk_bytes=1000), model)
    assert store is not None
    store.close()
    fingerprint = model_fingerprint(info(), model, "b")
    assert (tmp_path / "xdg" / "stoker" / "snapshots" / fingerprint).is_dir()


def test_anything_that_kv_depends_on_makes_another_fingerprint(model: LocalModel) -> None:
    def fingerprint(**facts: object) -> str:
        return model_fingerprint(info(**facts), model, "b")

    same = fingerprint()
    assert fingerprint() == same
    assert len(same) == 32
    others = {
        fingerprint(name="other"),
        fingerprint(settings={"kv_type": "f16/f16"}),
        fingerprint(settings={"kv_type": "bf16/bf16"}),
        fingerprint(fingerprint="library 2"),
        model_fingerprint(info(), model, "another backend"),
    }
    assert len(others) == 5
    assert same not in others


def test_a_fine_tuning_of_equal_size_and_age_is_another_model(model: LocalModel) -> None:
    same = model_fingerprint(info(), model, "b")
    content = model.path.read_bytes()
    model.path.write_bytes(content[:20_000] + bytes(len(content) - 20_000))
    os.utime(model.path, (1_000_000, 1_000_000))
    assert model_fingerprint(info(), model, "b") != same


def test_a_folder_and_a_model_without_a_file_have_fingerprints(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(b"1")
    of_folder = LocalModel(path=folder, model_id="m", reference="m")
    before = model_fingerprint(info(), of_folder, "b")
    (folder / "weights").write_bytes(b"2")
    assert model_fingerprint(info(), of_folder, "b") != before
    nowhere = LocalModel(path=tmp_path / "none", model_id="m", reference="m")
    assert len(model_fingerprint(info(), nowhere, "b")) == 32
