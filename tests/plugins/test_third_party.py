"""Real third-party distributions, built and installed by pip, through the real CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # starts processes

GOOD = '''
import msgspec
import stoker


class Options(msgspec.Struct, forbid_unknown_fields=True):
    limit: int = 10
    api_token: str = ""


class Fair(stoker.SchedulingPolicy):
    def admission_order(self, waiting, context):
        return sorted(waiting, key=lambda view: view.num_prompt_tokens)


class Quota(stoker.Middleware):
    def __init__(self, context, options):
        self.options = options


@stoker.hookimpl
def stoker_register_policies():
    return [stoker.PolicyInfo(api_version=1, name="acme-fair", summary="Fair", factory=Fair)]


@stoker.hookimpl
def stoker_register_middleware():
    return [
        stoker.MiddlewareInfo(
            api_version=1,
            name="acme-quota", summary="Quota", factory=Quota, options=Options
        )
    ]


def make_command():
    import click

    @click.command()
    @click.argument("name")
    def hello(name):
        """Say hello."""
        click.echo(f"hello {name}")

    return hello


@stoker.hookimpl
def stoker_register_commands():
    return [stoker.CommandInfo(api_version=1, name="acme-hello", summary="Say hello", factory=make_command)]
'''

POLICY = """
import stoker

@stoker.hookimpl
def stoker_register_policies():
    return [stoker.PolicyInfo(name="{name}", summary="", factory=object, api_version={version})]
"""

# distribution, entry-point name, source
DISTRIBUTIONS = [
    ("acme-good", "acme", GOOD),
    ("stoker-policy-shattered", "shattered", "raise RuntimeError('no such luck')\n"),
    ("acme-thief", "thief", POLICY.format(name="acme-fair", version=1)),
    (
        "acme-misspelt",
        "misspelt",
        "import stoker\n@stoker.hookimpl\ndef stoker_register_policys():\n    return []\n",
    ),
    ("acme-future", "future", POLICY.format(name="time-travel", version=99)),
    (
        "acme-async",
        "asynchronous",
        "import stoker\n@stoker.hookimpl\nasync def stoker_register_policies():\n    return []\n",
    ),
    ("twin-one", "twin", POLICY.format(name="twin-a", version=1)),
    ("twin-two", "twin", POLICY.format(name="twin-b", version=1)),
]

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "2.5"

[project.entry-points.stoker]
{entry_point} = "{module}"

[tool.hatch.build.targets.wheel]
include = ["{module}.py"]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the distributions."""
    base = tmp_path_factory.mktemp("third-party")
    projects = []
    for name, entry_point, source in DISTRIBUTIONS:
        project = base / name
        project.mkdir()
        module = name.replace("-", "_")
        (project / f"{module}.py").write_text(source)
        (project / "pyproject.toml").write_text(
            PROJECT.format(name=name, entry_point=entry_point, module=module)
        )
        projects.append(str(project))
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    install += ["--no-cache-dir", "--no-compile"]  # pip would keep a wheel of each run for ever
    done = subprocess.run(
        [sys.executable, "-m", "pip", *install, "--target", str(base / "site"), *projects],
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return base / "site"


class Cli:
    """The real command line, with the third-party distributions in sight."""

    def __init__(self, site: Path, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith("STOKER_")},
            "PYTHONPATH": str(site),
        }

    def __call__(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [
                sys.executable,
                "-c",
                "import stoker.cli, sys; sys.exit(stoker.cli.main())",
                *arguments,
            ],
            env={**self.environ, **environ},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def refused(self, *arguments: str, **environ: str) -> str:
        """The one line on standard error of a command that is refused for its configuration."""
        done = self(*arguments, **environ)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        return line

    def configure(self, text: str) -> None:
        (self.folder / "stoker.toml").write_text(text)

    def rows(self, **environ: str) -> dict[str, dict[str, Any]]:
        done = self("plugins", "--json", **environ)
        assert done.returncode == 0, done.stderr
        return {row["distribution"]: row for row in json.loads(done.stdout)}


@pytest.fixture
def cli(site: Path, tmp_path: Path) -> Cli:
    return Cli(site, tmp_path)


def test_every_outcome_is_listed(cli: Cli) -> None:
    rows = cli.rows()
    good = rows["acme-good"]
    assert (good["name"], good["version"], good["api_version"]) == ("acme", "2.5", 1)
    assert (good["status"], good["reason"]) == ("available", None)
    assert good["provides"] == {
        "policy": ["acme-fair"],
        "middleware": ["acme-quota"],
        "command": ["acme-hello"],
    }
    assert rows["stoker"]["status"] == "active"

    def told(distribution: str, status: str, *words: str) -> None:
        row = rows[distribution]
        assert row["status"] == status
        for word in words:
            assert word in row["reason"]

    told("stoker-policy-shattered", "broken", "RuntimeError: no such luck", "'shattered'")
    told("acme-thief", "refused", "'acme-fair'", "acme-good", "acme-thief")
    told("acme-misspelt", "refused", "policys", "Did you mean 'stoker_register_policies'?")
    told("acme-future", "refused", "API 99", "speaks 1", "upgrade stoker")
    told("acme-async", "refused", "async", "def")
    told("twin-one", "refused", "'twin'", "twin-one and twin-two")
    told("twin-two", "refused", "'twin'", "twin-one and twin-two")


def test_the_table_shows_it_too_and_check_fails(cli: Cli) -> None:
    done = cli("plugins")
    assert done.returncode == 0
    told = " ".join(done.stdout.split())  # as it would stand without a margin
    assert "acme-good 2.5" in told
    assert "shattered broken stoker-policy-shattered 2.5" in told
    assert "plugin 'shattered' (stoker-policy-shattered 2.5) is broken: RuntimeError" in told
    assert cli("plugins", "--check").returncode == 1
    assert cli("plugins", "--check", STOKER_PLUGINS="").returncode == 1  # left out is not in use


def test_a_good_plugin_is_configured_and_active(cli: Cli) -> None:
    cli.configure(
        '[scheduler]\npolicy = "acme-fair"\n[plugins.acme-quota]\nlimit = 3\napi_token = "s3cret"\n'
    )
    done = cli("config", "--check", STOKER_PLUGINS="acme")
    assert done.returncode == 0, done.stderr
    assert "valid" in done.stdout
    assert "s3cret" not in done.stdout
    assert cli.rows(STOKER_PLUGINS="acme")["acme-good"]["status"] == "active"


def test_options_of_plugins_are_checked(cli: Cli) -> None:
    cli.configure("[plugins.acme-quota]\nlimitt = 3\n")
    assert "plugins.acme-quota.limitt: unknown setting" in cli.refused("config", "--check")
    cli.configure('[plugins.acme-quota]\nlimit = "many"\n')
    assert "plugins.acme-quota.limit: Expected int, got str" in cli.refused("serve")
    cli.configure("")
    assert "plugins.acme-quota.limit: Expected int" in cli.refused(
        "serve", STOKER_PLUGINS__ACME_QUOTA__LIMIT="many"
    )


def test_a_plugin_command_runs(cli: Cli) -> None:
    done = cli("acme-hello", "world")
    assert (done.returncode, done.stdout) == (0, "hello world\n")
    assert "acme-hello  Say hello" in cli("--help").stdout


def test_what_is_asked_for_and_broken_stops_the_start(cli: Cli) -> None:
    line = cli.refused("serve", "--policy", "shattered")
    assert "policy 'shattered' is asked for" in line
    assert "RuntimeError: no such luck" in line
    line = cli.refused("serve", "--policy", "time-travel")
    assert "API 99" in line
    line = cli.refused("serve", "--policy", "acme-fair")
    assert "acme-good 2.5" in line
    assert "acme-thief 2.5" in line
    line = cli.refused("serve", "--policy", "acme-fari")
    assert "there is no policy 'acme-fari'" in line
    cli.configure("[plugins.shattered]\n")
    assert "no such luck" in cli.refused("config", "--check")
    done = cli("serve", "-v", "--policy", "shattered")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "raise RuntimeError('no such luck')" in done.stderr


def test_the_environment_limits_what_is_loaded(cli: Cli) -> None:
    rows = cli.rows(STOKER_PLUGINS="thief")
    assert rows["acme-thief"]["status"] == "available"
    assert rows["acme-good"]["status"] == "refused"
    assert "left out by STOKER_PLUGINS" in rows["acme-good"]["reason"]
    assert "no plugin 'theif'" in cli.refused("config", "--check", STOKER_PLUGINS="theif")
