"""Where usage is counted: in this process, or in a storage that several servers share.

The shared one is a storage of the library ``limits``, used for its counters only: its own windows cannot give
back what was charged (docs/decisions/0006-limits.md).
"""

from __future__ import annotations

import asyncio
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stoker import ConfigError

__all__ = [
    "Change",
    "Counters",
    "CountersError",
    "LocalCounters",
    "SharedCounters",
    "make_counters",
]

_MIN_SWEEP = 256
_REDIS_OPTIONS = {"implementation": "redispy", "key_prefix": "stoker"}


class CountersError(Exception):
    """A storage did not answer; says which and why."""


class Change(NamedTuple):
    """An amount to add to a counter.

    Attributes:
        key: The counter's name.
        amount: What to add; may be negative.
        expire_s: How long the counter is of use.
    """

    key: str
    amount: int
    expire_s: float


class Counters(ABC):
    """Named counters.

    Attributes:
        clock: Seconds; the same for everybody who shares the counters.
    """

    clock: Callable[[], float]

    @abstractmethod
    async def get(self, keys: Sequence[str]) -> Sequence[int]:
        """The counters' values; 0 where there is none.

        Raises:
            CountersError: The storage did not answer.
        """

    @abstractmethod
    async def add(self, changes: Sequence[Change]) -> Sequence[int]:
        """Change counters; returns their values after that.

        Raises:
            CountersError: The storage did not answer; some may have been changed.
        """


class LocalCounters(Counters):
    """Counters of this process. Its methods never wait, so that nothing comes between two of them.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._values: dict[str, tuple[int, float]] = {}
        self._sweep_at = _MIN_SWEEP

    async def get(self, keys: Sequence[str]) -> Sequence[int]:
        """The counters' values; 0 where there is none."""
        return [self._values.get(key, (0, 0.0))[0] for key in keys]

    async def add(self, changes: Sequence[Change]) -> Sequence[int]:
        """Change counters; returns their values after that."""
        now_s = self.clock()
        if len(self._values) >= self._sweep_at:
            self._values = {k: v for k, v in self._values.items() if v[1] > now_s}
            self._sweep_at = max(_MIN_SWEEP, 2 * len(self._values))
        values: list[int] = []
        for key, amount, expire_s in changes:
            value = self._values.get(key, (0, 0.0))[0] + amount
            self._values[key] = (value, now_s + expire_s)
            values.append(value)
        return values


class SharedCounters(Counters):
    """Counters in a storage of the library ``limits``, by the wall clock.

    Args:
        uri: What the library takes, such as ``async+redis://host:6379``.
        timeout_s: How long an answer may take.
        clock: Seconds; servers that share a storage need about the same.

    Raises:
        ConfigError: There is no such storage, or what it needs is not installed.
    """

    def __init__(
        self,
        uri: str,
        timeout_s: float,
        # Windows begin at the same moments on every server; a monotonic clock starts anywhere.
        clock: Callable[[], float] = time.time,  # noqa: TID251 - servers share windows of the day
    ) -> None:
        # The rest of it may hold a password.
        what = f"plugins.limits.storage: {uri.partition(':')[0]}"
        try:
            from limits import errors, storage
            from limits.aio.storage import Storage
        except ImportError as error:
            raise ConfigError(
                f"{what} needs the library 'limits'; install it with: pip install 'stoker[redis]'"
            ) from error
        options = _REDIS_OPTIONS if uri.startswith("async+redis") else {}
        try:
            made = storage.storage_from_string(uri, wrap_exceptions=True, **options)
        except errors.ConfigurationError as error:
            raise ConfigError(
                f"{what}: there is no such storage, or its client is not installed; "
                "async+memory and async+redis (pip install 'stoker[redis]') are known to work"
            ) from error
        if not isinstance(made, Storage):
            raise ConfigError(f"{what} would block the server; write async+ before it")
        self.clock = clock
        self._storage = made
        self._timeout_s = timeout_s
        self._errors = (errors.StorageError, OSError, TimeoutError)

    async def get(self, keys: Sequence[str]) -> Sequence[int]:
        """The counters' values; 0 where there is none."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.gather(*map(self._storage.get, keys))
        except self._errors as error:
            raise CountersError(_reason(error)) from error

    async def add(self, changes: Sequence[Change]) -> Sequence[int]:
        """Change counters; returns their values after that."""
        work = (self._storage.incr(key, math.ceil(s), amount) for key, amount, s in changes)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.gather(*work)
        except self._errors as error:
            raise CountersError(_reason(error)) from error


def make_counters(uri: str, timeout_s: float) -> Counters:
    """The counters that ``[plugins.limits] storage`` names.

    Raises:
        ConfigError: There is no such storage, or what it needs is not installed.
    """
    if uri in ("async+memory://", "memory://"):
        return LocalCounters()
    return SharedCounters(uri, timeout_s)


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
