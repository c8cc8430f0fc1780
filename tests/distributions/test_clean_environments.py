"""Each distribution of contrib/ alone with stoker in an environment of its own, installed by pip.

Nothing is compiled: llama-cpp-python comes from pip's cache, where ``make setup`` has put it. What is to be
installed is gathered once; each environment then takes of it what its distribution says that it needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.contrib, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
# Distribution, the name that `stoker plugins` lists, and what it alone brings along.
ALL = [
    ("stoker-backend-gguf", "gguf", "llama_cpp"),
    ("stoker-backend-torch", "torch", "torch"),
    ("stoker-backend-ctransformers", "ctransformers", "ctransformers"),
    ("stoker-policy-priority", "priority", ""),
]
HEAVY = ["llama_cpp", "torch", "transformers", "ctransformers"]
TORCH = os.environ.get("TORCH", "torch==2.13.0")
# Runs in the environment: what can be imported, whether the entry module is light, and that every module
# finds what it imports.
LOOK = """
import importlib, importlib.util, json, pkgutil, sys
package, heavy = sys.argv[1], sys.argv[2:]
there = [name for name in heavy if importlib.util.find_spec(name)]
entry = importlib.import_module(package)
loaded = [name for name in (*heavy, "numpy", "litestar") if name in sys.modules]
modules = [m.name for m in pkgutil.walk_packages(entry.__path__, package + ".")]
for name in modules:
    importlib.import_module(name)
print(json.dumps({"there": there, "loaded": loaded, "modules": modules}))
"""


def run(*command: str | Path, folder: Path) -> str:
    """Standard output of a command that succeeds, run where no sources are in sight."""
    hidden = ("PYTHONPATH", "STOKER_", "PYTEST_")
    done = subprocess.run(
        command,
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        | {"XDG_DATA_HOME": str(folder / "data"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def pip(*arguments: str | Path, folder: Path) -> str:
    return run(sys.executable, "-m", "pip", *arguments, folder=folder)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheels of all our distributions and of all that they need."""
    folder = tmp_path_factory.mktemp("wheels")
    if "llama_cpp_python" not in pip("cache", "list", "llama_cpp_python", folder=folder):
        pytest.skip("pip's cache has no wheel of llama-cpp-python, and compiling one takes minutes")
    projects = [ROOT, *sorted(path.parent for path in ROOT.glob("contrib/*/pyproject.toml"))]
    ours = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    pip(*ours, "--wheel-dir", folder, *projects, folder=folder)
    built = sorted(folder.glob("*.whl"))
    assert len(built) == len(ALL) + 1, "a distribution of contrib/ is in no test here"
    # Without isolation a build would fail at once for want of its tools, instead of taking minutes.
    theirs = ("wheel", "--quiet", "--no-build-isolation", "--find-links", folder)
    pip(*theirs, "--wheel-dir", folder, TORCH, *built, folder=folder)
    return folder


@pytest.mark.parametrize(("distribution", "plugin", "library"), ALL, ids=[row[1] for row in ALL])
def test_installed_alone(
    wheels: Path, tmp_path: Path, distribution: str, plugin: str, library: str
) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "environment", folder=tmp_path)
    programs = tmp_path / "environment" / "bin"
    into = ("--python", programs / "python")
    offline = ("--quiet", "--no-compile", "--no-index", "--find-links", wheels)
    pip(*into, "install", *offline, distribution, folder=tmp_path)
    pip(*into, "check", folder=tmp_path)
    listed = json.loads(run(programs / "stoker", "plugins", "--json", folder=tmp_path))
    found = {row["name"]: (row["distribution"], row["status"]) for row in listed}
    status = "available" if plugin == "priority" else "active"
    assert found == {"builtin": ("stoker", "active"), plugin: (distribution, status)}
    assert "serve" in run(programs / "stoker", "--help", folder=tmp_path)
    package = distribution.replace("-", "_")
    seen = json.loads(run(programs / "python", "-c", LOOK, package, *HEAVY, folder=tmp_path))
    expected = {library} | ({"transformers"} if library == "torch" else set())
    assert set(seen["there"]) == expected - {""}
    assert seen["loaded"] == []
    assert seen["modules"] or plugin == "priority"
