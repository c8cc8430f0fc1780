"""What all suites have in common: how they fail, and that nobody turns a test off in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import msgspec
import pytest

from stoker.interfaces import Descriptor

__all__ = ["Conformance", "check", "default_options", "fail"]

_KIT = "stoker.testing.conformance"
_GUARD = "test_no_test_is_overridden"


def fail(problem: str, advice: str = "") -> NoReturn:
    """Fail the test; ``advice`` says what to do about the problem."""
    text = f"{problem}\n{advice}" if advice else problem
    # The exception that a test has caught is in the text if it matters.
    raise pytest.fail.Exception(text, pytrace=False) from None


def check(condition: object, problem: str, advice: str = "") -> None:
    """Fail the test unless a condition holds."""
    if not condition:
        fail(problem, advice)


def default_options(info: Descriptor) -> Any:
    """The options of a plugin whose section is empty; ``None`` if it takes none."""
    return None if info.options is None else msgspec.convert({}, info.options)


class Conformance:
    """Base of the suites: no test of a suite may be overridden in silence."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if _GUARD in vars(cls) and not cls.__module__.startswith(_KIT):
            raise TypeError(f"{cls.__name__}.{_GUARD} is what watches over the others: leave it be")

    def test_no_test_is_overridden(self) -> None:
        """A test of the suite is overridden or switched off.

        To fix: remove the override. Where the plugin cannot pass, say so where everybody sees it::

            @pytest.mark.xfail(reason="why, in a sentence", strict=True)
            def test_the_test(self, ...):
                super().test_the_test(...)
        """
        for owner, name in _overrides(type(self)):
            check(
                _is_declared(vars(owner)[name]),
                f"{owner.__name__}.{name} overrides a test of the conformance suite",
                "Remove it, or mark it with @pytest.mark.xfail(reason=..., strict=True) and call super().",
            )


def _overrides(suite: type) -> Iterator[tuple[type, str]]:
    """Each class that is no part of the kit, with each test of the kit that it has, too."""
    kit = [owner for owner in suite.__mro__ if owner.__module__.startswith(_KIT)]
    names = {name for owner in kit for name in vars(owner) if name.startswith("test_")}
    for owner in suite.__mro__:
        if owner not in kit:
            yield from ((owner, name) for name in vars(owner) if name in names)


def _is_declared(override: Any) -> bool:
    marks = [mark for mark in getattr(override, "pytestmark", ()) if mark.name == "xfail"]
    return any(mark.kwargs.get("reason") and mark.kwargs.get("strict") is True for mark in marks)
