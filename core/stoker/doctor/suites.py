"""The child of ``stoker.doctor.conformance``: builds the suites, and reports to a file, line by line.

It is a pytest plugin for its own runs alone (``-p stoker.doctor.suites``). The file keeps what passed if
the process does not survive a check.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stoker import testing
from stoker.discovery import Plugins, load_plugins
from stoker.doctor.conformance import CheckResult, Target
from stoker.interfaces import LoadSettings

__all__ = ["make_suites"]

_LABEL = "stoker_label"  # the attribute of a suite that says what it is over

_SPEED = "a measurement: --speed runs it"

# Names, because a suite brings all that it needs: the policies' one hypothesis, the middleware's a server.
_SUITES: Mapping[str, tuple[str, str]] = {
    "backend": ("BackendConformance", "BackendUnderTest"),
    "policy": ("PolicyConformance", "PolicyUnderTest"),
    "middleware": ("MiddlewareConformance", "MiddlewareUnderTest"),
    "observer": ("ObserverConformance", "ObserverUnderTest"),
}


def make_suites() -> dict[str, type]:
    """A test class for each target, by a name that pytest collects."""
    targets = msgspec.json.decode(
        Path("targets.json").read_bytes(),
        type=list[Target],
        dec_hook=lambda kind, value: kind(value),
    )
    plugins = load_plugins()
    return {f"Test_{index}": _suite(target, plugins) for index, target in enumerate(targets)}


def _suite(target: Target, plugins: Plugins) -> type:
    suite, subject = (getattr(testing, name) for name in _SUITES[target.kind])
    info: Any = plugins.require(target.kind, target.name)
    given: dict[str, Any] = {"info": info}
    if target.kind == "backend":
        options = None if info.options is None else msgspec.convert(target.options, info.options)
        given["model"] = target.model
        given["settings"] = LoadSettings(
            lanes=4, context_length=256, max_step_tokens=128, options=options
        )
    under_test = subject(**given)

    @pytest.fixture(name=target.kind)
    def fill_in(self: Any) -> Any:
        return under_test

    members = {target.kind: fill_in, _LABEL: target.label, "__module__": __name__}
    return type("Test", (suite,), members)


# --------------------------------------------------------------------------- reporting


def _write(**event: Any) -> None:
    with Path("report.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(event) + b"\n")


def _target(item: pytest.Item) -> str:
    return str(getattr(getattr(item, "cls", None), _LABEL, ""))


def _name(item: pytest.Item) -> str:
    """``test_keeps_order[two]`` as ``keeps order [two]``."""
    words, bracket, case = item.name.removeprefix("test_").partition("[")
    return words.replace("_", " ") + (f" {bracket}{case}" if bracket else "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nobody has written these classes, so nobody overrides anything."""
    items[:] = [item for item in items if item.name != "test_no_test_is_overridden"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A check begins."""
    _write(begins=_name(item), target=_target(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A check has ended, or could not begin, or left a mess."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        document = getattr(getattr(item, "function", None), "__doc__", None) or ""
        error = call.excinfo.value if call.excinfo is not None else None
        result = CheckResult(
            target=_target(item),
            check=_name(item),
            outcome=report.outcome,
            message=_message(report, call),
            advice=document if report.when == "call" else "",
            seconds=round(report.duration, 3),
            traceback=str(report.longrepr) if isinstance(error, Exception) else "",
            log=report.caplog if report.failed else "",
        )
        _write(result=result)
    return report


def _message(report: pytest.TestReport, call: pytest.CallInfo[None]) -> str:
    """Why it was skipped, or what was wrong."""
    if report.outcome == "passed" or call.excinfo is None:
        return ""
    error = call.excinfo.value
    if not isinstance(error, Exception):  # the suite's own words
        said = str(getattr(error, "msg", None) or error)
        return _SPEED if "--stoker-speed" in said else said
    last = call.excinfo.traceback[-1]
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    return f"{call.excinfo.exconly(tryshort=True)} ({last.path}:{last.lineno + 1}){notes}"
