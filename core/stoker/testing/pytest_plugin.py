"""Opt in with ``pytest_plugins = ["stoker.testing.pytest_plugin"]`` in the root ``conftest.py``, or ``-p``.

The suites work without it; with it, ``--stoker-speed`` runs their measurements, too.
"""

from __future__ import annotations

import pytest

__all__ = ["SPEED_OPTION", "pytest_addoption"]

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
