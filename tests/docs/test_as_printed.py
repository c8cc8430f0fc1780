"""What a reader copies from the pages works as printed: the tutorial, the README's configuration."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def block(page: Path, language: str) -> str:
    """The first code block of a language on a page."""
    found = re.search(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def stoker(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    return subprocess.run(
        [sys.executable, "-m", "stoker", *arguments],
        cwd=folder,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def test_the_tutorials_package_installs_and_is_found(tmp_path: Path) -> None:
    page = ROOT / "docs" / "plugins.md"
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "shortest_prompt.py").write_text(block(page, "python"))
    (source / "pyproject.toml").write_text(block(page, "toml"))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "--quiet")
    offline += ("--target", str(site))
    subprocess.run([sys.executable, "-m", "pip", "install", *offline, "."], cwd=source, check=True)
    listed = stoker(tmp_path, "plugins", "--json", PYTHONPATH=str(site))
    (row,) = [r for r in json.loads(listed.stdout) if r["name"] == "shortest-prompt"]
    assert (row["distribution"], row["status"]) == ("stoker-policy-shortest-prompt", "available")
    environment = {"PYTHONPATH": str(site), "STOKER_SCHEDULER_POLICY": "shortest-prompt"}
    assert stoker(tmp_path, "config", "--check", **environment).returncode == 0
    assert (
        stoker(tmp_path, "config", "--check", STOKER_SCHEDULER_POLICY="shortest-prompt").returncode
        == 2
    )


@pytest.mark.contrib  # it asks for the policy `priority`
def test_the_readmes_configuration_is_valid(tmp_path: Path) -> None:
    (tmp_path / "stoker.toml").write_text(block(ROOT / "README.md", "toml"))
    (tmp_path / "keys.txt").write_text("a-secret-key\n")
    checked = stoker(tmp_path, "config", "--check")
    assert checked.returncode == 0, checked.stderr
    shown = stoker(tmp_path, "config").stdout
    assert "a-secret-key" not in shown
    for setting in ("priority", "small", "./another.gguf", "ageing_s"):
        assert setting in shown


def test_the_readmes_tenants_and_keys_work(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tenants,) = [text for text in blocks if "[[tenants]]" in text]
    (tmp_path / "stoker.toml").write_text(tenants)
    made = stoker(tmp_path, "keys", "new", "chat")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("sk-stoker-")
    checked = stoker(tmp_path, "config", "--check")
    assert checked.returncode == 0, checked.stderr
    listed = json.loads(stoker(tmp_path, "keys", "list", "--json").stdout)
    assert [key["tenant"] for key in listed] == ["chat"]
    assert made.stdout.strip() not in (tmp_path / "stoker-keys.toml").read_text()
    assert stoker(tmp_path, "keys", "revoke", listed[0]["id"]).returncode == 0
    assert json.loads(stoker(tmp_path, "keys", "list", "--json").stdout) == []
