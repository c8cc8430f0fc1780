"""From nothing to a passing plugin: docs/plugin-template is rendered, installed, tested and served."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow  # starts processes

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "docs" / "plugin-template"
KINDS = ("policy", "backend", "middleware", "observer")
CORPUS = "Coal goes in, steam comes out.\n\nThe train goes on, and on, and on.\n"


def render(target: Path, **answers: str) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the copier's own business
        from copier import run_copy

        run_copy(str(TEMPLATE), target, data=answers, defaults=True, quiet=True)
    return target


class Workshop:
    """All four kinds of plugins, rendered, and installed by pip into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.site = folder / "site"
        self.projects = {
            kind: render(folder / kind, kind=kind, name=f"my-{kind}", author="Ada Example")
            for kind in KINDS
        }
        offline = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH", "")]))
        clean = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
        self.environ = {
            **clean,
            "PYTHONPATH": path,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "STOKER_PLUGINS": ",".join(
                f"my-{kind}" for kind in KINDS
            ),  # and nothing else installed
        }
        self.run("-m", "pip", "install", *offline, "--target", str(self.site), *self.rendered)

    @property
    def rendered(self) -> list[str]:
        return [str(project) for project in self.projects.values()]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def serving(self, model: str, config: str) -> Iterator[str]:
        (self.folder / "stoker.toml").write_text(config)
        process = subprocess.Popen(
            [sys.executable, "-m", "stoker", "serve", model, "--port", "0"],
            cwd=self.folder,
            env=self.environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        try:
            seen = ""
            for line in process.stderr:
                seen += line
                if "/v1" in line and "http://" in line:
                    yield "http://" + line.partition("http://")[2].partition("/v1")[0]
                    break
            else:
                pytest.fail(f"the server did not start: {seen}")
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("template"))


def test_the_rendered_projects_tests_pass(workshop: Workshop) -> None:
    projects = workshop.projects
    options = ("-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestDeprecationWarning")
    tests = [f"{kind}/tests" for kind in KINDS]
    shown = workshop.run(
        "-m", "pytest", *options, "-c", str(projects["policy"] / "pyproject.toml"), *tests
    )
    assert " failed" not in shown
    assert " passed" in shown


def test_the_rendered_projects_are_tidy(workshop: Workshop) -> None:
    sources = [
        str(path) for project in workshop.projects.values() for path in project.rglob("*.py")
    ]
    for command in (["check"], ["format", "--check"]):
        workshop.run("-m", "ruff", *command, "--quiet", "--no-cache", *sources)


def test_names_and_summaries_of_any_length_leave_it_tidy(tmp_path: Path) -> None:
    for kind in KINDS:
        answers = {"kind": kind, "name": "a-name-of-22-characters"[:22], "summary": "x" * 75}
        render(tmp_path / kind, **answers, author="Ada Example")
    for command in (["check"], ["format", "--check"]):
        call = [sys.executable, "-m", "ruff", *command, "--quiet", "--no-cache", str(tmp_path)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_doctor_finds_nothing_wrong_with_the_backend(workshop: Workshop) -> None:
    corpus, model = workshop.folder / "text.txt", "doctor.my-backend"
    corpus.write_text(CORPUS)
    train = "from stoker_backend_my_backend.model_file import main; main()"
    workshop.run("-c", train, str(corpus), model)
    workshop.run("-m", "stoker", "doctor", "my-backend", "--model", model)


def test_they_are_listed_and_one_server_runs_them_all(workshop: Workshop) -> None:
    rows = {
        row["name"]: row for row in json.loads(workshop.run("-m", "stoker", "plugins", "--json"))
    }
    for kind in KINDS:
        row = rows[f"my-{kind}"]
        assert (row["distribution"], row["version"]) == (f"stoker-{kind}-my-{kind}", "0.1.0")
        assert row["provides"] == {kind: [f"my-{kind}"]}
        # Any model may ask for a backend; the rest wait for the configuration to name them.
        assert row["status"] == ("active" if kind == "backend" else "available")
    (workshop.folder / "corpus.txt").write_text(CORPUS)
    train = "import sys; from stoker_backend_my_backend.model_file import main; main()"
    workshop.run("-c", train, "corpus.txt", "tiny.my-backend")
    config = (
        '[scheduler]\npolicy = "my-policy"\n[plugins.my-observer]\nfirst_token_s = 0.0\n'
        "[plugins.my-middleware]\nmax_tokens = 5\n"
    )
    with workshop.serving("tiny.my-backend", config) as url:
        body: dict[str, Any] = {
            "model": "tiny.my-backend",
            "messages": [{"role": "user", "content": "What comes out?"}],
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-my-middleware-max-tokens"] == "5"
    assert answer.json()["usage"]["completion_tokens"] <= 5
    assert answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("license_", ["MIT", "BSD-3-Clause", "none"])
def test_the_license_is_a_choice(tmp_path: Path, license_: str) -> None:
    answers = {"kind": "observer", "name": "slow-log", "author": "Ada Example", "license": license_}
    project = render(tmp_path / "project", **answers)
    about = (project / "pyproject.toml").read_text()
    if license_ == "none":
        assert not (project / "LICENSE").exists()
        assert "Private :: Do Not Upload" in about
    else:
        assert "Ada Example" in (project / "LICENSE").read_text()
        assert f'license = "{license_}"' in about


def test_the_license_of_the_template_is_whole() -> None:
    (text,) = TEMPLATE.glob("template/*Apache*")
    assert text.read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("name", "Bad Name"),
        ("name", "too-long-for-lines-of-code"),
        ("distribution", "9-lives"),
        ("summary", 'a "quote"'),
        ("summary", "A sentence."),
        ("email", "nobody"),
    ],
)
def test_answers_that_would_break_the_project_are_refused(
    tmp_path: Path, answer: str, value: str
) -> None:
    answers = {"kind": "policy", "name": "fine", "author": "Ada Example", answer: value}
    with pytest.raises(ValueError, match=answer):
        render(tmp_path / "project", **answers)
