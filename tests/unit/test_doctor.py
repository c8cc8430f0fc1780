"""What `stoker doctor` says of a machine and of an installation."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

import stoker
from stoker.config import Config, ModelConfig
from stoker.discovery import PluginListing, Plugins, load_plugins
from stoker.doctor import asking, installation, machine, threads
from stoker.machine import Limits
from stoker.testing import ScriptedBackend, ScriptedSource


def levels(findings: Sequence[stoker.Finding]) -> list[str]:
    return [finding.level for finding in findings]


# ------------------------------------------------------------------ the machine


def test_cpu_features_and_what_they_mean() -> None:
    none, *_ = machine.check_cpu(["avx", "sse3"], Limits())
    assert none.level == "ok"
    old = list(machine.check_cpu(["avx"], Limits()))[-1]
    assert (old.level, "AVX2" in old.message) == ("warning", True)
    new = list(machine.check_cpu(["avx2", "avx512f", "avx512_vnni", "amx_tile"], Limits()))
    assert "VNNI" in new[-2].message
    assert (new[-1].topic, new[-1].level) == ("amx", "note")
    arm = list(machine.check_cpu(["asimd", "asimddp"], Limits()))[-1]
    assert arm.level == "ok"
    unknown = list(machine.check_cpu([], Limits()))[-1]
    assert unknown.level == "note"


def test_a_containers_limits_are_said() -> None:
    quota = [f.message for f in machine.check_cpu(["avx2"], Limits(cores=0.5))]
    assert any("quota of 0.5 cores" in message for message in quota)
    scant = next(machine.check_memory(Limits(memory=2**31, memory_left=2**20)))
    assert scant.level == "warning"
    assert "2.1 GB by the container's limit" in scant.message
    assert "1.0 MB are free" in scant.message


@pytest.mark.parametrize(
    ("environ", "wanted", "expected"),
    [
        ({}, None, ["ok"]),
        ({}, 9, ["warning", "ok"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None, ["warning"]),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 2, ["note"]),
        ({"OMP_NUM_THREADS": "1"}, None, ["note", "ok"]),
        ({"OMP_NUM_THREADS": "2,1"}, None, ["ok"]),
        ({"OMP_NUM_THREADS": "8"}, None, ["warning", "ok"]),
        ({"OMP_NUM_THREADS": "many"}, None, ["warning", "ok"]),
        ({"GOMP_SPINCOUNT": "infinity"}, None, ["ok", "warning"]),
        ({"GOMP_SPINCOUNT": "300"}, None, ["ok", "note"]),
    ],
)
def test_thread_settings(environ: dict[str, str], wanted: int | None, expected: list[str]) -> None:
    assert levels(list(threads.check_threads(environ, wanted, 2))) == expected


def test_company_is_looked_for_and_python_is_fine() -> None:
    (company,) = threads.check_company(1, look_s=0.01)
    assert company.topic == "company"
    assert next(machine.check_python()).level == "ok"


def test_disk_names_what_shares_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr(machine, "_SCANT_DISK", 0)
    (finding,) = machine.check_disk({"models of hf:": tmp_path / "not" / "there"})
    assert finding.level == "ok"
    assert "models of hf:" in finding.message
    assert str(tmp_path / "data" / "stoker") in finding.message
    monkeypatch.setattr(machine, "_SCANT_DISK", 2**62)
    assert levels(list(machine.check_disk({}))) == ["warning"]
    monkeypatch.setattr(machine, "_NO_DISK", 2**61)
    assert levels(list(machine.check_disk({}))) == ["problem"]


# ------------------------------------------------------------------ the installation


def test_company_matters_only_where_it_takes_our_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[tuple[int, float, str], float]] = []

    def look(cores: int) -> stoker.Finding:
        shown[:] = [{(1, 0.0, "busy"): 0.0, (2, 0.0, "new"): 9.0}, {(1, 0.0, "busy"): 10.0}]
        (finding,) = threads.check_company(cores, look_s=0.0)
        return finding

    monkeypatch.setattr(threads, "_times", lambda: shown.pop(0))
    monkeypatch.setattr(threads.psutil, "cpu_count", lambda: 10**9)
    assert look(10**9).level == "warning"
    assert "busy" in look(1).message
    assert look(1).level == "note"


BACKEND = stoker.BackendInfo(api_version=1, name="scripted", summary="", factory=ScriptedBackend)
SOURCE = stoker.ModelSourceInfo(api_version=1, name="scripted", summary="", factory=ScriptedSource)


class Missing(stoker.ModelSource):
    def resolve(self, reference: str, *, progress: bool = False) -> stoker.LocalModel:
        raise stoker.ModelError(f"{reference}: there is no such file")


class Broken(stoker.Backend):
    def accepts(self, model: stoker.LocalModel) -> bool:
        raise RuntimeError("no such luck")

    def load(self, model: stoker.LocalModel, settings: stoker.LoadSettings) -> stoker.Runtime:
        raise RuntimeError("no such luck")


def plugins() -> Plugins:
    return Plugins.of(
        stoker.BackendInfo(api_version=1, name="broken", summary="", factory=Broken),
        BACKEND,
        SOURCE,
        stoker.ModelSourceInfo(api_version=1, name="file", summary="", factory=Missing),
        stoker.ModelSourceInfo(api_version=1, name="hf", summary="", factory=Missing),
    )


def test_models_are_found_and_nothing_is_fetched() -> None:
    config = Config(
        models=[
            ModelConfig(model="scripted:one"),
            ModelConfig(model="gone.gguf"),
            ModelConfig(model="hf:owner/repository"),
            ModelConfig(model="scripted:two", backend="missing"),
        ]
    )
    found = installation.find_models(config, plugins())
    assert [model.backend for model in found] == ["scripted", None, None, None]
    findings = list(installation.check_models(found, 0))
    assert levels(findings) == ["ok", "problem", "note", "problem"]
    assert "gone.gguf: there is no such file" in findings[1].message
    assert "stoker pull hf:owner/repository" in findings[2].cure
    assert "there is no backend 'missing'" in findings[3].message
    (unaccepted,) = installation.find_models(
        Config(models=[ModelConfig(model="scripted:x")]), Plugins.of(SOURCE)
    )
    assert unaccepted.finding.level == "problem"
    assert "stoker-backend-gguf" in unaccepted.finding.cure


class Parts(Missing):
    def available(self) -> Sequence[stoker.LocalModel]:
        gone = Path("not") / "there.gguf"
        return [stoker.LocalModel(path=gone, model_id="x", reference="pypi:parts", size_bytes=1)]

    def folders(self) -> Sequence[Path]:
        raise RuntimeError("no such luck")


def test_a_model_in_parts_is_left_in_parts() -> None:
    source = stoker.ModelSourceInfo(api_version=1, name="pypi", summary="", factory=Parts)
    (found,) = installation.find_models(
        Config(models=[ModelConfig(model="pypi:parts")]), Plugins.of(source)
    )
    assert (found.local, found.finding.level) == (None, "note")
    assert "put together" in found.finding.message
    assert installation.folders(Plugins.of(source)) == {}


def test_the_sources_name_their_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STOKER_CACHE", str(tmp_path))
    found = installation.folders(load_plugins(only=()))
    assert found["models of pypi:"] == tmp_path
    assert "models of file:" not in found


def test_models_that_exceed_the_memory_are_a_warning() -> None:
    local = stoker.LocalModel(path=Path("x"), model_id="x", reference="x", size_bytes=5)
    fine = stoker.Finding(level="ok", topic="models", message="")
    found = [installation.FoundModel("x", local, "scripted", fine)]
    assert levels(list(installation.check_models(found, 5))) == ["ok"]
    assert levels(list(installation.check_models(found, 4))) == ["ok", "warning"]


def test_refused_plugins_are_told_with_their_reason() -> None:
    def row(name: str, status: str, reason: str | None, import_ms: float = 1.0) -> PluginListing:
        return PluginListing(
            name=name,
            distribution=f"acme-{name}",
            version="1",
            api_version=1,
            status=status,  # type: ignore[arg-type]
            reason=reason,
            provides={},
            import_ms=import_ms,
        )

    findings = list(
        installation.check_plugins(
            [
                row("good", "active", None),
                row("bad", "broken", "plugin 'bad' is broken: RuntimeError: oh"),
                row("thief", "refused", "the name is taken"),
                row("out", "refused", "plugin 'out' is left out by STOKER_PLUGINS"),
                row("slow", "available", None, 400.0),
            ]
        )
    )
    assert levels(findings) == ["ok", "warning", "warning", "note", "note"]
    assert "RuntimeError: oh" in findings[1].message
    assert "400 ms" in findings[4].message


def test_a_port_that_is_taken_is_a_problem_unless_a_server_of_ours_has_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert installation.check_port("127.0.0.1", port, None).level == "problem"
        assert installation.check_port("127.0.0.1", port, ["tiny"]).level == "note"
    assert installation.check_port("127.0.0.1", port, None).level == "ok"
    assert installation.check_port("127.0.0.1", 0, None).level == "ok"
    assert installation.check_port("no-such-host.invalid", 1, None).level == "problem"


# ------------------------------------------------------------------ asking backends


@pytest.mark.slow
def test_what_becomes_of_a_backends_process_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    def ask(code: str, *models: stoker.LocalModel) -> stoker.Finding:
        monkeypatch.setattr(asking, "COMMAND", (sys.executable, "-c", code))
        (finding,) = asking.ask_backend("acme", models)
        return finding

    model = stoker.LocalModel(path=Path("x"), model_id="x", reference="x")
    killed = ask("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", model)
    assert killed.level == "problem"
    assert "SIGKILL" in killed.message
    raised = ask("raise RuntimeError('no such luck')")
    assert raised.level == "warning"  # nothing asks for it
    assert "RuntimeError: no such luck" in raised.message
    assert "its answer is none" in ask("print('hello')").message
    answered = ask("""print('[{"level": "ok", "topic": "acme", "message": "fine"}]')""")
    assert answered == stoker.Finding(level="ok", topic="acme", message="fine")


def test_backends_that_say_nothing_cost_no_process_and_broken_ones_a_warning() -> None:
    def fails() -> stoker.Backend:
        raise ImportError("no library")

    broken = stoker.BackendInfo(api_version=1, name="bad", summary="", factory=fails)
    (finding,) = asking.ask_backends(Plugins.of(BACKEND, broken), Config(), [])
    assert (finding.level, finding.topic) == ("warning", "bad")
    assert "ImportError: no library" in finding.message
