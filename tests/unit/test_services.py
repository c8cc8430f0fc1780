"""What plugins run beside the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from stoker.services import Service, Services


def noting(name: str, notes: list[str], *, fails: str = "") -> Service:
    @asynccontextmanager
    async def service() -> AsyncIterator[None]:
        if fails == "start":
            raise KeyError(name)
        notes.append(f"{name} on")
        try:
            async with asyncio.timeout(None):  # belongs to the task that entered it
                yield
        finally:
            notes.append(f"{name} off")
            if fails == "stop":
                raise KeyError(name)

    return service


@pytest.mark.parametrize("fails", ["", "start", "stop"])
async def test_services_are_entered_and_left_and_one_that_fails_hurts_nobody(
    fails: str, caplog: pytest.LogCaptureFixture
) -> None:
    notes: list[str] = []
    services = Services()
    services.add(noting("a", notes, fails=fails))
    services.add(noting("b", notes))
    await services.start()
    await services.start()
    before = ["b on"] if fails == "start" else ["a on", "b on"]
    assert notes == before
    await asyncio.gather(services.stop(), services.stop())
    await services.stop()
    assert sorted(notes[len(before) :]) == [note.replace("on", "off") for note in before]
    assert ("a plugin's service failed" in caplog.text) == bool(fails)


async def test_who_stops_what_was_never_started_waits_for_nothing() -> None:
    services = Services()
    services.add(noting("a", []))
    await services.stop()
