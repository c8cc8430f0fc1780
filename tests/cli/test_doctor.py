"""`stoker doctor` as its users meet it: in a process of its own, with other people's plugins around."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import stoker
from stoker.config import Config
from stoker.discovery import Plugins
from stoker.doctor import conformance
from stoker.doctor.conformance import CheckResult, Target, find_targets
from stoker.doctor.report import report_lines
from stoker.testing import ScriptedBackend, ScriptedSource

pytestmark = pytest.mark.slow  # starts processes

ACME = """
import os, signal
import stoker


class Acme(stoker.Backend):
    def accepts(self, model):
        return model.path.name == "acme"

    def load(self, model, settings):
        raise stoker.ModelError(f"{model.path}: not today")

    def diagnose(self, models):
        print("what libraries print is no answer")
        level = "problem" if models else "note"
        return [stoker.Finding(level=level, topic="acme", message=f"{len(models)} models", cure="Wait.")]


class Crashing(Acme):
    def diagnose(self, models):
        os.kill(os.getpid(), signal.SIGSEGV)


@stoker.hookimpl
def stoker_register_backends():
    return [
        stoker.BackendInfo(api_version=1, name="acme", summary="Fine", factory=Acme),
        stoker.BackendInfo(api_version=1, name="crashing", summary="Not fine", factory=Crashing),
    ]
"""


class Doctor:
    """Runs ``stoker doctor`` in a folder of its own, where the plugin `acme` is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        installed = folder / "site"
        about = installed / "acme_things-1.0.dist-info"
        about.mkdir(parents=True)
        (installed / "acme_plugin.py").write_text(ACME)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-things\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text("[stoker]\nthird-party = acme_plugin\n")
        path = os.pathsep.join(filter(None, [str(installed), os.environ.get("PYTHONPATH", "")]))
        self.environ = {
            **{
                k: v
                for k, v in os.environ.items()
                if not k.startswith(("STOKER_", "OMP_", "GOMP_"))
            },
            "PYTHONPATH": path,
            "STOKER_PLUGINS": "third-party",
            "XDG_DATA_HOME": str(folder / "data"),
        }

    def __call__(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stoker", "doctor", *arguments],
            env={**self.environ, **environ},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def findings(self, *arguments: str, **environ: str) -> tuple[int, dict[str, dict[str, Any]]]:
        """The exit code, and the last finding of each topic."""
        done = self(*arguments, "--json", **environ)
        assert done.stderr == ""
        answer = json.loads(done.stdout)
        assert answer["ok"] == (done.returncode == 0)
        return done.returncode, {found["topic"]: found for found in answer["findings"]}


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


# ------------------------------------------------------------------ the environment


def test_a_sound_installation_has_no_problem(doctor: Doctor) -> None:
    (doctor.folder / "stoker.toml").write_text(
        '[server]\nport = 0\n[[models]]\nmodel = "scripted:tiny"\n'
    )
    code, found = doctor.findings()
    assert code == 0
    assert {"python", "cpu", "memory", "disk", "threads", "company", "plugins"} <= found.keys()
    assert "stoker.toml is valid" in found["configuration"]["message"]
    assert "tiny" in found["models"]["message"]
    assert "loaded by scripted" in found["models"]["message"]
    assert (found["acme"]["level"], found["acme"]["message"]) == ("note", "0 models")
    crashed = found["crashing"]  # nothing asks for it
    assert crashed["level"] == "warning"
    assert "SIGSEGV" in crashed["message"]


def test_problems_do_not_hide_each_other(doctor: Doctor) -> None:
    (doctor.folder / "acme").write_text("a model")
    (doctor.folder / "stoker.toml").write_text('[server]\nprot = 0\n[[models]]\nmodel = "acme"\n')
    done = doctor("--model", "acme", OMP_WAIT_POLICY="active", STOKER_SERVER_PORT="0")
    assert done.returncode == 1
    assert "server.prot: unknown setting" in done.stdout
    assert "PROBLEM   acme            1 models" in done.stdout
    assert "-> Wait." in done.stdout
    assert "OMP_WAIT_POLICY=active" in done.stdout
    assert "problems, " in done.stdout.splitlines()[-1]


# ------------------------------------------------------------------ conformance


def test_what_is_wrong_is_told_with_what_to_do(doctor: Doctor) -> None:
    (doctor.folder / "acme").write_text("a model")
    done = doctor("acme", "--model", "acme", "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert not answer["ok"]
    outcomes = {(check["target"], check["check"]): check for check in answer["checks"]}
    assert outcomes["backend acme", "accepts its model"]["outcome"] == "passed"
    assert {target for target, _ in outcomes} == {"backend acme"}  # not all that the plugin offers
    loaded = outcomes["backend acme", "info is consistent"]
    assert loaded["outcome"] == "failed"
    assert "not today" in loaded["message"]
    assert "Error: " in loaded["message"] + loaded["traceback"]
    tried = [check for check in answer["checks"] if check["traceback"]]
    assert len(tried) == 1  # the others were not loaded again
    shown = doctor("acme", "--model", "acme").stdout
    assert "Traceback" not in shown
    assert shown.count("not today") < 4


def result(check: str, outcome: str, message: str = "", **more: str) -> CheckResult:
    return msgspec.convert(
        {"target": "policy unruly", "check": check, "outcome": outcome, "message": message, **more},
        CheckResult,
    )


def test_results_are_told_with_their_advice() -> None:
    document = "It drops.\n\n        To fix: keep\n        all.\n    "
    results = [
        result("keeps all", "failed", "One is missing.", advice=document),
        result(
            "keeps some", "failed", "Two are missing.\nLook again.", advice=document, log="a\nb\n"
        ),
        result("raises", "failed", "Oh: no (x.py:1)\na note", advice=document, traceback="x.py"),
        result("is quick [one]", "skipped", "No."),
        result("is quick [two]", "skipped", "No."),
        result("is early [one]", "skipped", "No."),
        result("is light", "passed"),
        result("is fine [one]", "passed"),
        result("is fine [two]", "passed"),
    ]
    assert list(report_lines(results)) == [
        "policy unruly",
        "  FAILED   keeps all",
        "           One is missing.",
        "           It drops.",
        "           To fix: keep all.",
        "  FAILED   keeps some",
        "           Two are missing.",
        "           Look again.",
        "           Logged last: b",
        "  FAILED   raises",
        "           Oh: no (x.py:1)",
        "           a note",
        "           It drops.",
        "           To fix: keep all.",
        "  skipped  is quick (2 cases)",
        "           No.",
        "           (and so: is early [one])",
        "  ok       is light",
        "  ok       is fine (2 cases)",
        "",
    ]
    assert "           x.py" in report_lines(results, tracebacks=True)
    assert max(map(len, report_lines(results, 30))) <= 30


def test_names_that_lead_nowhere(doctor: Doctor) -> None:
    done = doctor("scirpted")
    assert done.returncode == 2
    assert "there is no plugin 'scirpted'" in done.stderr
    assert "Did you mean 'scripted'?" in done.stderr


INFO = stoker.BackendInfo(api_version=1, name="scripted", summary="", factory=ScriptedBackend)
SOURCE = stoker.ModelSourceInfo(api_version=1, name="scripted", summary="", factory=ScriptedSource)


def test_backends_need_a_model() -> None:
    plugins = Plugins.of(INFO, SOURCE)
    with pytest.raises(stoker.ConfigError, match="--model REF"):
        find_targets("scripted", plugins, Config())
    with pytest.raises(stoker.ConfigError, match="there is no plugin 'nonsense'"):
        find_targets("nonsense", plugins, Config())
    with pytest.raises(stoker.ConfigError, match="offers nothing that there is a suite for"):
        find_targets("of", Plugins.of(SOURCE), Config())
    (target,) = find_targets("stoker", plugins, Config(), "scripted:tiny")
    assert (target.label, target.lacks_model) == ("backend scripted", False)
    (result,) = conformance.run_suites([Target(kind="backend", name="scripted")])
    assert (result.outcome, "--model REF" in result.message) == ("skipped", True)


def test_without_pytest_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformance, "_NEEDED", ("pytest", "no_such_module_anywhere"))
    with pytest.raises(stoker.StokerError, match=r'no_such_module_anywhere: pip install "stoker\['):
        conformance.run_suites([])


def test_a_process_that_dies_is_a_failed_check(tmp_path: Path) -> None:
    report = tmp_path / "report.jsonl"
    with pytest.raises(stoker.StokerError, match=r"was killed by SIGSEGV: no such luck"):
        conformance._read_report(report, -11, "no such luck")
    report.write_text('{"begins": "close twice", "target": "backend acme"}\n')
    (result,) = conformance._read_report(report, -11, "")
    assert isinstance(result, CheckResult)
    assert (result.target, result.check, result.outcome) == (
        "backend acme",
        "close twice",
        "failed",
    )
    assert "SIGSEGV" in result.message
