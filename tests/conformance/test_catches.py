"""The suites catch what they are for: plugins with one mistake each fail the right tests, and no others."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.slow


def failures(module: str, report: Path, *arguments: str) -> tuple[dict[str, set[str]], str]:
    """For each class of a module of broken plugins, the tests that fail; and what pytest printed."""
    command = [sys.executable, "-m", "pytest", str(HERE / f"{module}.py"), f"--junitxml={report}"]
    command += ["-q", "--tb=line", "-p", "no:cacheprovider", "-p", "stoker.testing.pytest_plugin"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    failed: dict[str, set[str]] = defaultdict(set)
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.attrib["classname"].rsplit(".", 1)[-1]
        failed[name] |= set()
        if case.find("failure") is not None or case.find("error") is not None:
            failed[name].add(case.attrib["name"])
    return dict(failed), done.stdout


def expected(module: str) -> dict[str, set[str]]:
    """What each class of such a module says of itself."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(module, HERE / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return {name: set(kind.fails) for name, kind in vars(loaded).items() if name.startswith("Test")}


# What takes long, and the classes that it is for; the others are spared it.
SLOW = {
    "test_name_is_unique": "Heavy",
    "test_entry_module_is_light": "Heavy",
    "test_factory_builds_what_it_says": "SharesOneObject",
    "test_a_long_queue_is_served": "DropsOne",
    "test_state_stays_bounded": "RemembersEverybody",
    "test_every_client_gets_its_own_answer": "KeepsTheLast or NeverGivesBack",
}
SPARED = " or ".join(f"({test} and not ({kept}))" for test, kept in SLOW.items())


@pytest.mark.parametrize(
    "module", ["broken_backends", "broken_policies", "broken_middleware", "broken_observers"]
)
def test_exactly_the_right_tests_fail(module: str, tmp_path: Path) -> None:
    want = expected(module)
    got, printed = failures(module, tmp_path / "report.xml", "-k", f"not ({SPARED})")
    # Without the option the measurement is skipped.
    assert got == {name: tests - {"test_batching_pays"} for name, tests in want.items()}, printed


def test_batching_that_loses_fails_when_asked_for(tmp_path: Path) -> None:
    arguments = ("--stoker-speed", "-k", "test_batching_pays and (ByItself or Overrides)")
    got, _ = failures("broken_backends", tmp_path / "report.xml", *arguments)
    assert got["TestEveryLaneByItself"] == {"test_batching_pays"}
