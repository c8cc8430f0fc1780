"""Opt in with ``pytest_plugins = ["stoker.testing.pytest_plugin"]`` in the root ``conftest.py``, or ``-p``.

The suites work without it; with it, ``--stoker-speed`` runs their measurements, too, and a check that ends
in an exception shows what it is about: what the suites find wrong says so by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator

import pytest

__all__ = ["SPEED_OPTION", "pytest_addoption", "pytest_runtest_makereport"]

SPEED_OPTION = "--stoker-speed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for measurements."""
    group = parser.getgroup("stoker", "stoker conformance")
    group.addoption(
        SPEED_OPTION,
        action="store_true",
        default=False,
        help="also run the measurements of stoker's conformance suites, on an idle machine",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the docstring of a conformance test to the report of an exception."""
    report = yield
    test = getattr(item, "function", None)
    if (
        report.when == "call"
        and call.excinfo is not None
        and isinstance(call.excinfo.value, Exception)
        and str(getattr(test, "__module__", "")).startswith("stoker.testing.conformance")
    ):
        report.sections.append(("what it checks", inspect.getdoc(test) or ""))
    return report
