"""``stoker keys``, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stoker.keys import digest_of

pytestmark = pytest.mark.slow  # starts processes

COMMAND = [sys.executable, "-c", "import stoker.cli, sys; sys.exit(stoker.cli.main())", "keys"]


class Keys:
    """Runs ``stoker keys`` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            env=self.environ,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def list(self, *arguments: str) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self("list", "--json", *arguments).stdout)
        return found


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def configure(keys: Keys) -> None:
    (keys.folder / "stoker.toml").write_text('[server]\ntenant_keys_file = "mine.toml"\n')


def test_a_key_is_printed_once_listed_and_revoked(keys: Keys) -> None:
    configure(keys)
    made = keys("new", "team-a", "--name", "laptop")
    assert made.returncode == 0
    (key,) = made.stdout.splitlines()  # fit for KEY=$(stoker keys new team-a)
    assert key.startswith("sk-stoker-")
    digest = digest_of(key)
    assert digest in made.stderr
    assert key not in made.stderr
    assert key not in (keys.folder / "mine.toml").read_text()
    (listed,) = keys.list()
    assert (listed["id"], listed["tenant"], listed["label"]) == (digest[7:15], "team-a", "laptop")
    assert listed["created"][:2] == "20"
    table = keys("list")
    assert all(word in table.stdout for word in (listed["id"], "team-a", "laptop", "created"))
    assert table.stderr == ""
    revoked = keys("revoke", listed["id"])
    assert (revoked.returncode, revoked.stderr) == (0, "")
    assert revoked.stdout == f"revoked {listed['id']} of team-a (laptop)\n"
    assert keys.list() == []


def test_without_a_configured_file_it_says_how_to_use_the_one_it_made(keys: Keys) -> None:
    made = keys("new", "a")
    assert made.returncode == 0
    assert 'tenant_keys_file = "stoker-keys.toml"' in made.stderr
    assert (keys.folder / "stoker-keys.toml").exists()
    other = keys("new", "a", "--file", "other.toml")
    assert "tenant_keys_file" not in other.stderr
    assert len(keys.list("--file", "other.toml")) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("revoke", "12345678"), "mine.toml: there is no such file"),
        (("list",), "mine.toml: the file of tenants' keys cannot be read"),
        (("new", "a b"), "'a b' cannot have a key"),
        (("new", "*"), "'*' cannot have a key"),
        (("new", "a", "--name", "x" * 101), "at most 100 printable characters"),
        (("new",), "Missing argument 'TENANT'"),
        ((), "Missing command"),
        (("list", "--config", "none.toml"), "there is no such configuration file"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    keys: Keys, arguments: tuple[str, ...], message: str
) -> None:
    configure(keys)
    done = keys(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("stoker: error: ")
    assert message in line
    assert [path.name for path in keys.folder.iterdir()] == ["stoker.toml"]


def test_processes_at_the_same_time_lose_no_key(keys: Keys) -> None:
    configure(keys)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda n: keys("new", f"t{n}"), range(8)))
    assert [done.returncode for done in made] == [0] * 8
    assert sorted(entry["tenant"] for entry in keys.list()) == [f"t{n}" for n in range(8)]
    ids = {digest_of(done.stdout.strip())[7:15] for done in made}
    assert ids == {entry["id"] for entry in keys.list()}


def test_the_configuration_shows_tenants(keys: Keys) -> None:
    digest = digest_of("a key")
    (keys.folder / "stoker.toml").write_text(
        f'[[tenants]]\nname = "a"\nweight = 2\nkeys = ["{digest}"]\n'
    )
    command = [*COMMAND[:-1], "config"]
    done = subprocess.run(
        command, env=keys.environ, cwd=keys.folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    row = next(line.split() for line in done.stdout.splitlines() if "tenants[0].weight" in line)
    assert row == ["tenants[0].weight", "2.0", "stoker.toml"]
    assert digest[:15] in done.stdout
    assert digest not in done.stdout
