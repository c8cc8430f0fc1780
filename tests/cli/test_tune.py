"""``stoker tune`` as its users meet it: the planted best is found, crashes are answers, ``serve`` uses it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stoker import LocalModel, __version__
from stoker.profiles import Profile, ProfileSetting, fingerprint, this_machine, write_profile

pytestmark = pytest.mark.slow  # starts processes

COMMAND = [sys.executable, "-P", "-m", "stoker"]
QUICK = ("--only", "kernel", "--run-seconds", "0.25", "--budget", "2")


class Cli:
    """Runs ``stoker`` in a folder of its own, with a model whose steps take time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
        self.environ["XDG_DATA_HOME"] = str(self.data)
        (folder / "stoker.toml").write_text("[plugins.scripted]\nstep_s = 0.008\n")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=240)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def profiles(self) -> list[Path]:
        return sorted((self.data / "stoker" / "profiles").glob("*"))

    def banner(self, *arguments: str) -> str:
        """What ``serve`` writes until it is ready."""
        process = self.start("serve", "scripted:tiny", "--port", "0", *arguments)
        seen = ""
        assert process.stderr is not None
        for line in process.stderr:
            seen += line
            if re.search(r"http://\S+/v1", line):
                break
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        return seen


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


def test_the_planted_best_is_found_and_served(cli: Cli) -> None:
    before = cli.banner()
    assert "tuned" not in before
    plot = ("--plot", "plot.png") if importlib.util.find_spec("matplotlib") else ()
    done = cli("tune", "scripted:tiny", *QUICK, "--json", "report.json", *plot)
    assert done.returncode == 0, done.stderr
    report = json.loads((cli.folder / "report.json").read_text())
    verdicts = {row["value"]: row["verdict"] for row in report["rows"]}
    assert report["settings"] == {"kernel": "wide"}
    assert verdicts["broken"] == "crashes here (SIGSEGV)"
    assert verdicts["blurred"].startswith("other answers: KL 1.")
    assert verdicts["slow"] == "slower"
    assert report["final"]["accepted"]
    assert report["complete"]
    for words in ("kernel", "wide", "crashes here (SIGSEGV)", "█", "beside a busy process"):
        assert words in done.stdout
    if plot:
        assert (cli.folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    (profile,) = cli.profiles()
    assert str(profile) in done.stdout
    banner = cli.banner()
    assert re.search(r"profile +interactive, tuned \d{4}-\d\d-\d\d; stoker tune --show", banner)
    assert "kernel wide" in banner
    assert "tuned" not in cli.banner("--no-profile")
    # What the user sets wins, and the profile's file is still there.
    (cli.folder / "stoker.toml").write_text("[plugins.scripted]\nkernel = 'slow'\n")
    assert "kernel slow" in cli.banner()
    profile.write_text("{")
    broken = cli.banner()
    assert len(re.findall("is no profile", broken)) == 1
    assert "tuned" not in broken.replace("stoker tune", "")


def test_a_dry_run_measures_nothing_and_set_options_are_not_tuned(cli: Cli) -> None:
    done = cli("tune", "scripted:tiny", "--dry-run", "--load", "agents")
    assert done.returncode == 0
    assert "kernel: plain, or slow, broken, blurred, wide" in done.stdout
    assert "step_tokens: 512, or 1024" in done.stdout
    (cli.folder / "stoker.toml").write_text(
        "[scheduler]\ntarget_step_s = 0.2\n[plugins.scripted]\nkernel = 'slow'\n"
    )
    done = cli("tune", "scripted:tiny", "--dry-run")
    assert "kernel: not tuned: kernel is set (stoker.toml)" in done.stdout
    assert "step_time: not tuned: scheduler.target_step_s is set (stoker.toml)" in done.stdout
    refused = cli("tune", "scripted:tiny", "--only", "kernel")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--only kernel: cannot be tuned" in refused.stderr
    assert cli.profiles() == []


def test_wrong_wishes_are_refused_in_one_line(cli: Cli) -> None:
    for arguments, words in (
        (("--only", "kernal"), "--only kernal: there is nothing of this name; kernel"),
        (("--requantize", "q8_0"), "--requantize q8_0: the backend scripted cannot write this"),
        (("--load", "games"), "'games' is not one of"),
        (("--backend", "nope"), "there is no backend 'nope'"),
        (("--json", "/nonexistent/report.json", *QUICK, "--budget", "0.1"), "cannot be written"),
    ):
        done = cli("tune", "scripted:tiny", *arguments)
        assert done.returncode == 2, arguments
        assert words in done.stderr.splitlines()[-1]


def test_nothing_better_writes_nothing(cli: Cli) -> None:
    quick = ("--run-seconds", "0.1", "--budget", "0.3")
    done = cli("tune", "scripted:tiny", "--only", "step_time", *quick)
    assert done.returncode == 0, done.stderr
    assert "no profile was written: nothing is clearly better than the defaults" in done.stdout
    assert cli.profiles() == []
    assert "there is no profile" in cli("tune", "--show").stdout


def test_a_model_that_crashes_with_its_defaults_is_said(cli: Cli) -> None:
    (cli.folder / "stoker.toml").write_text("[plugins.scripted]\nkernel = 'broken'\n")
    done = cli("tune", "scripted:tiny", "--only", "step_tokens")
    assert done.returncode == 1
    assert "cannot be measured: crashes here (SIGSEGV)" in done.stderr


def test_ctrl_c_shows_what_is_known_and_writes_nothing_silently(cli: Cli) -> None:
    process = cli.start("tune", "scripted:tiny", *QUICK)
    assert process.stderr is not None
    for line in process.stderr:
        if "kernel slow: pair 1" in line:
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; this is what is known so far" in errors
    assert "slower" in output
    assert cli.profiles() == []


def test_profiles_are_shown_and_forgotten(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(cli.data))
    local = LocalModel(path=Path("tiny"), model_id="tiny", reference="scripted:tiny")
    wide = ProfileSetting(name="kernel", value="wide", options={"kernel": "wide"})
    write_profile(
        Profile(
            machine=this_machine(),
            model=fingerprint(local),
            backend="scripted",
            versions={"stoker": __version__},
            load="interactive",
            date="2026-01-02T03:04:05+00:00",
            settings=[wide],
            complete=False,
        )
    )
    shown = cli("tune", "--show").stdout
    assert "tiny with scripted: interactive, tuned" in shown
    assert "kernel = wide" in shown
    assert "was not checked against the defaults" in shown
    assert cli("tune", "--show", "scripted:other").stdout.startswith("there is no profile")
    assert "kernel = wide" in cli("tune", "--show", "scripted:tiny").stdout
    assert "deleted" in cli("tune", "--forget", "scripted:tiny").stdout
    assert cli.profiles() == []
    assert "there is no profile of tiny" in cli("tune", "--forget", "scripted:tiny").stdout
