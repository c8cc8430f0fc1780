"""Effort and memory without a clock: operations counted, objects counted."""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from collections.abc import Callable
from typing import Any

from stoker.types import SequenceView

__all__ = ["CountedView", "num_reachable", "operations"]

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_reads = 0


class CountedView(SequenceView, frozen=True, kw_only=True, gc=False):
    """A view that counts how often something of it is looked at or compared."""

    def __getattribute__(self, name: str) -> Any:
        _count()
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        _count()
        return self is other

    def __hash__(self) -> int:
        _count()
        return id(self)


def _count() -> None:
    global _reads  # noqa: PLW0603 - the views have no room for a counter of their own
    _reads += 1


def operations(action: Callable[[], Any]) -> int:
    """How much an action does: calls, Python's and C's, and looks at ``CountedView`` objects.

    It does not depend on the machine, as seconds would.
    """
    calls = 0

    def count(_frame: types.FrameType, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before, reads = sys.getprofile(), _reads
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls + _reads - reads


def num_reachable(root: object) -> int:
    """How many objects hang on an object, classes, functions and modules aside.

    Entries of containers count each: a thousand keys may all have the same value.
    """
    shared = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType)
    seen = {id(root): root}
    todo = [root]
    while todo:
        for found in gc.get_referents(todo.pop()):
            if id(found) not in seen and not isinstance(found, shared):
                seen[id(found)] = found
                todo.append(found)
    entries = [len(found) for found in seen.values() if isinstance(found, _CONTAINERS)]
    return len(seen) + sum(entries)
