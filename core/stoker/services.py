"""What plugins run beside the server: started before the first request, stopped before the last is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

__all__ = ["Service", "Services"]

logger = logging.getLogger("stoker.plugins")

Service = Callable[[], AbstractAsyncContextManager[Any]]
"""Makes what is entered when the server starts to serve, and left when it stops or drains."""


class Services:
    """Enters and leaves services, each in a task of its own. One that fails costs the others nothing."""

    def __init__(self) -> None:
        self._services: list[Service] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping: asyncio.Event | None = None

    def add(self, service: Service) -> None:
        """Take in one more; before the start."""
        self._services.append(service)

    async def start(self) -> None:
        """Enter all of them; returns when all have been."""
        if self._stopping is not None:
            return
        self._stopping = asyncio.Event()
        for service in self._services:
            entered = asyncio.Event()
            self._tasks.append(asyncio.create_task(_run(service, entered, self._stopping)))
            await entered.wait()

    async def stop(self) -> None:
        """Leave all of them; may be called twice, also while the first call still waits."""
        if self._stopping is None:
            return
        self._stopping.set()
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _run(service: Service, entered: asyncio.Event, stopping: asyncio.Event) -> None:
    try:
        async with service():
            entered.set()
            await stopping.wait()
    except Exception:
        logger.exception("a plugin's service failed; the server goes on without it")
    finally:
        entered.set()
