"""Profiles: they come back as they were written, last in line, and only where they belong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stoker import __version__
from stoker.config import Config, ModelConfig, PerformanceConfig, SchedulerConfig
from stoker.discovery import load_plugins
from stoker.errors import ConfigError
from stoker.profiles import (
    ModelFingerprint,
    Profile,
    ProfileSetting,
    Weights,
    fingerprint,
    profile_path,
    read_profile,
    this_machine,
    write_profile,
)
from stoker.server import Server, build_server
from stoker.tuned import apply_profile, choose_profile
from stoker.types import LocalModel

VERSIONS = {"stoker": __version__}
WIDE = ProfileSetting(name="kernel", value="wide", options={"kernel": "wide"})
BUDGET = ProfileSetting(name="step_tokens", value="256", scheduler={"max_num_batched_tokens": 256})


@pytest.fixture(autouse=True)
def _data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def local(tmp_path: Path) -> LocalModel:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(range(256)) * 20_000)
    return LocalModel(
        path=path, model_id="a model", reference=str(path), size_bytes=path.stat().st_size
    )


def profile_of(local: LocalModel, **changes: Any) -> Profile:
    facts: dict[str, Any] = {
        "machine": this_machine(),
        "model": fingerprint(local),
        "backend": "scripted",
        "versions": VERSIONS,
        "load": "agents",
        "date": "2026-01-02T03:04:05+00:00",
        "settings": [WIDE, BUDGET],
    }
    return Profile(**(facts | changes))


def choose(local: LocalModel, wanted: str = "auto") -> Profile | None:
    return choose_profile(wanted, local, "scripted", VERSIONS)


# ------------------------------------------------------------------ files


def test_a_profile_comes_back_as_it_was_written(local: LocalModel) -> None:
    profile = profile_of(local, figures={"speed": 1.5})
    path = write_profile(profile)
    assert path == profile_path(profile.machine, profile.model)
    assert read_profile(path) == profile
    assert choose(local) == profile
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing half-written


def test_a_newer_profile_takes_the_place_of_the_older(local: LocalModel) -> None:
    write_profile(profile_of(local))
    newer = profile_of(local, load="throughput")
    write_profile(newer)
    assert choose(local) == newer


def test_off_is_off(local: LocalModel) -> None:
    write_profile(profile_of(local))
    assert choose(local, "off") is None


def test_the_fingerprint_sees_start_end_and_size(local: LocalModel) -> None:
    first = fingerprint(local).digest
    content = bytearray(local.path.read_bytes())
    content[-1] ^= 1
    local.path.write_bytes(content)
    last = fingerprint(local).digest
    content[3] ^= 1
    local.path.write_bytes(content)
    assert len({first, last, fingerprint(local).digest}) == 3
    longer = msgspec.structs.replace(local, size_bytes=local.size_bytes + 1)
    assert fingerprint(longer) != fingerprint(local)


def test_a_folder_has_a_fingerprint_too(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    local = LocalModel(path=folder, model_id="folder", reference=str(folder), size_bytes=2)
    before = fingerprint(local).digest
    (folder / "config.json").write_text("[]")
    assert fingerprint(local).digest != before


# ------------------------------------------------------------------ what does not hold good


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"versions": {"stoker": "0.0.0"}}, f"with stoker 0.0.0, and this is {__version__}"),
        ({"versions": {**VERSIONS, "acme": "1"}}, "with acme 1, and this is none"),
        ({"backend": "other"}, "with the backend other"),
    ],
)
def test_a_stale_profile_is_named_once_and_ignored(
    local: LocalModel, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], why: str
) -> None:
    path = write_profile(profile_of(local, **changes))
    assert choose(local) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    assert why in record.getMessage()


def test_a_profile_of_another_machine_is_named_and_ignored(
    local: LocalModel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = msgspec.structs.replace(this_machine(), cpu="Another 9000", cores=99)
    path = write_profile(profile_of(local, machine=other))
    assert choose(local) is None
    assert "made on another machine" in caplog.text
    caplog.clear()
    assert choose(local, str(path)) is None  # also where it is named
    assert "Another 9000, 99 cores" in caplog.text


def test_a_profile_of_another_model_is_not_used_though_it_is_named(
    local: LocalModel, caplog: pytest.LogCaptureFixture
) -> None:
    other = ModelFingerprint(name="other", size_bytes=1, digest="0" * 64)
    path = write_profile(profile_of(local, model=other))
    assert choose(local) is None
    assert choose(local, str(path)) is None
    assert "another model (other)" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": 1}',
        b"\xff\xfe",
        b"null",
    ],
)
def test_a_corrupt_profile_is_ignored_unless_it_is_named(
    local: LocalModel, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = write_profile(profile_of(local))
    path.write_bytes(content)
    assert choose(local) is None
    (record,) = caplog.records
    assert f"{path}: is no profile" in record.getMessage()
    with pytest.raises(ConfigError, match="is no profile"):
        choose(local, str(path))


def test_a_profile_with_impossible_budgets_is_corrupt(local: LocalModel) -> None:
    for scheduler in ({"max_num_batched_tokens": -1}, {"policy": 1}, {"target_step_s": 0}):
        setting = ProfileSetting(name="x", value="y", scheduler=scheduler)
        path = write_profile(profile_of(local, settings=[setting]))
        with pytest.raises(ConfigError, match="is no setting of a profile"):
            read_profile(path)


def test_another_format_and_a_missing_file_are_said(local: LocalModel, tmp_path: Path) -> None:
    path = write_profile(profile_of(local, format=2))
    with pytest.raises(ConfigError, match="format 2"):
        read_profile(path)
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        choose(local, str(tmp_path / "none.json"))


# ------------------------------------------------------------------ precedence


def test_a_profile_comes_after_all_that_is_set(local: LocalModel) -> None:
    scheduler = SchedulerConfig()
    tuned = apply_profile(profile_of(local), local, scheduler, set_options={})
    assert tuned.options == {"kernel": "wide"}
    assert tuned.scheduler.max_num_batched_tokens == 256
    assert tuned.label == "agents, tuned 2026-01-02"

    tuned = apply_profile(profile_of(local), local, scheduler, set_options={"kernel": "plain"})
    assert tuned.options == {}
    other = SchedulerConfig(max_num_batched_tokens=300)
    tuned = apply_profile(profile_of(local), local, other, set_options={})
    assert tuned.scheduler == other
    keys = {"scheduler.max_num_batched_tokens"}  # set, to the default
    tuned = apply_profile(profile_of(local), local, scheduler, set_options={}, set_keys=keys)
    assert tuned.scheduler == scheduler


def test_what_was_measured_together_is_taken_together_or_not_at_all(local: LocalModel) -> None:
    kv = ProfileSetting(
        name="kv_type",
        value="q8_0",
        options={"kv_type_k": "q8_0", "kv_type_v": "q8_0"},
        requires={"flash_attention": ["auto", "on"]},
    )
    profile = profile_of(local, settings=[kv])
    scheduler = SchedulerConfig()
    for user_set, taken in (
        ({}, True),
        ({"flash_attention": "on"}, True),
        ({"flash_attention": "off"}, False),  # q8_0 values would not work
        ({"kv_type_k": "f16"}, False),  # or it would be f16/q8_0, which nobody measured
    ):
        tuned = apply_profile(profile, local, scheduler, set_options=user_set)
        assert bool(tuned.options) is taken, user_set


def test_other_weights_are_loaded_while_they_are_what_they_were(
    local: LocalModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.q8_0.gguf"
    path.write_bytes(b"GGUF" * 100)
    other = msgspec.structs.replace(local, path=path, size_bytes=400)
    weights = Weights(type="q8_0", path=str(path), digest=fingerprint(other).digest)
    profile = profile_of(local, weights=weights)
    tuned = apply_profile(profile, local, SchedulerConfig(), set_options={})
    assert tuned.local.path == path
    assert tuned.local.model_id == local.model_id
    assert tuned.label.endswith("weights requantised to q8_0")
    path.write_bytes(b"GGUG" * 100)
    tuned = apply_profile(profile, local, SchedulerConfig(), set_options={})
    assert tuned.local == local
    assert "requantised" not in tuned.label
    assert "it has changed" in caplog.text


# ------------------------------------------------------------------ in a server


def scripted_profile(**changes: Any) -> Profile:
    local = LocalModel(path=Path("tiny"), model_id="tiny", reference="scripted:tiny")
    return profile_of(local, **changes)


def serve(config: Config, origins: dict[str, str] | None = None) -> Server:
    plugins = load_plugins(only=[])
    if origins is None:
        return build_server(config, plugins)
    server = Server(config, plugins)
    server.origins = origins
    server.build()
    return server


def settings_of(server: Server) -> dict[str, str]:
    (model,) = server.models()
    server.stop()
    return dict(model.info.settings)


def config(**changes: Any) -> Config:
    return Config(models=[ModelConfig(model="scripted:tiny")], **changes)


@pytest.mark.slow
def test_a_server_takes_the_profile_and_names_it() -> None:
    assert "profile" not in settings_of(serve(config()))
    write_profile(scripted_profile())
    settings = settings_of(serve(config()))
    assert settings["kernel"] == "wide"
    assert settings["profile"] == "agents, tuned 2026-01-02"
    assert settings["max_num_batched_tokens"] == "256"
    off = config(performance=PerformanceConfig(profile="off"))
    assert "profile" not in settings_of(serve(off))


@pytest.mark.slow
def test_settings_of_file_environment_and_flags_win_in_a_server() -> None:
    write_profile(scripted_profile())
    section = config(plugins={"scripted": {"kernel": "slow"}})
    assert settings_of(serve(section))["kernel"] == "slow"
    entry = Config(models=[ModelConfig(model="scripted:tiny", options={"kernel": "slow"})])
    assert settings_of(serve(entry))["kernel"] == "slow"
    origins = {"scheduler.max_num_batched_tokens": "stoker.toml", "server.port": "default"}
    settings = settings_of(serve(config(), origins))
    assert "max_num_batched_tokens" not in settings
    assert settings["kernel"] == "wide"


@pytest.mark.slow
def test_a_profile_that_the_backend_refuses_does_not_stop_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nonsense = ProfileSetting(name="kernel", value="x", options={"no_such_option": 1})
    write_profile(scripted_profile(settings=[nonsense]))
    settings = settings_of(serve(config()))
    assert "profile" not in settings
    assert "the profile cannot be used" in caplog.text
