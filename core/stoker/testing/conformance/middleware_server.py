"""The server that middleware is tried in: the scripted model, and two probes around the one under test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from stoker.config import Config
from stoker.discovery import Plugins, load_plugins
from stoker.errors import RateLimitError
from stoker.interfaces import (
    BackendInfo,
    LoadSettings,
    Middleware,
    MiddlewareInfo,
    ModelSourceInfo,
    Observer,
    ObserverInfo,
)
from stoker.testing.conformance.subjects import MiddlewareUnderTest
from stoker.testing.scripted import ScriptedBackend, ScriptedRuntime, ScriptedSource
from stoker.testing.scripted_options import ScriptedOptions
from stoker.types import LocalModel, Request, RequestRecord, StepInput

__all__ = ["MODEL", "ORDER", "Stage"]

MODEL = "conformance"
_LAST = 1_000_000


class ORDER:
    """What a request may tell the probe to do."""

    HEADER: Final = "x-conformance"
    REFUSE: Final = "refuse"
    CRASH: Final = "crash"


class Probe(Middleware):
    """The last middleware before the engine: sees what the one under test lets pass, and does as told.

    Attributes:
        seen: Ids of the requests that came so far.
        ended: Ids of those that are over.
        records: What became of their sequences.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.ended: list[str] = []
        self.records: list[RequestRecord] = []

    async def on_request(self, request: Request) -> Request:
        """Take note, or do as the header says."""
        order = request.headers.get(ORDER.HEADER)
        if order == ORDER.REFUSE:
            raise RateLimitError("refused on purpose", code="refused_by_the_suite", retry_after_s=1)
        if order == ORDER.CRASH:
            raise RuntimeError("failed on purpose")
        self.seen.append(request.request_id)
        return request

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        """Take note of the end."""
        self.ended.append(request.request_id)
        self.records += records


class Listener(Observer):
    """An observer that notes refusals.

    Attributes:
        refused: The codes of what was refused.
    """

    def __init__(self) -> None:
        self.refused: list[str] = []

    def on_refuse(self, model: str, tenant: str, code: str) -> None:
        """Take note."""
        self.refused.append(code)


class Stage:
    """Plugins and configuration of servers around a middleware.

    Args:
        middleware: What is under test.

    Attributes:
        plugins: The middleware, the probes, the scripted model and the policies.
        probe: The last middleware.
        observer: Notes refusals.
        fails: Whether the model fails.
    """

    def __init__(self, middleware: MiddlewareUnderTest) -> None:
        self._middleware = middleware
        self.reset()
        fcfs = load_plugins(only=[]).require("policy", "fcfs")
        self.plugins = Plugins.of(
            fcfs,
            *(info for info in middleware.policies if info.name != fcfs.name),
            msgspec.structs.replace(middleware.info, active_by_default=False),
            MiddlewareInfo(
                api_version=1,
                name="conformance-probe",
                summary="Sees what passes",
                factory=lambda _: self.probe,
                active_by_default=True,
                order=_LAST,
            ),
            ObserverInfo(
                api_version=1,
                name="conformance-listener",
                summary="Notes refusals",
                factory=lambda: self.observer,
                active_by_default=True,
            ),
            BackendInfo(
                api_version=1,
                name="scripted",
                summary="The scripted model, which can fail",
                factory=lambda: _Backend(self),
                options=ScriptedOptions,
            ),
            ModelSourceInfo(
                api_version=1, name="scripted", summary="scripted:name", factory=ScriptedSource
            ),
        )

    def reset(self) -> None:
        """Forget what was seen; for the next server."""
        self.probe = Probe()
        self.observer = Listener()
        self.fails = False

    def has_seen_more_than(self, count: int) -> bool:
        """Whether more requests than these have got past all middleware."""
        return len(self.probe.seen) > count

    def config(self, more: Mapping[str, Any] | None = None) -> Config:
        """The configuration: the suite's model, the middleware's sections, and ``more`` on top."""
        model = {
            "model": f"scripted:{MODEL}",
            "lanes": 4,
            "context": 1024,
            "options": {"step_s": 0.003},
        }
        name = self._middleware.info.name
        raw: dict[str, Any] = {
            "models": [model],
            "responses": {"path": ":memory:"},
            **self._middleware.config,
            **(more or {}),
        }
        raw["plugins"] = {name: dict(self._middleware.options), **raw.get("plugins", {})}
        return msgspec.convert(raw, Config)


class _Backend(ScriptedBackend):
    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def load(self, model: LocalModel, settings: LoadSettings) -> ScriptedRuntime:
        runtime = super().load(model, settings)
        runtime.before_step = self._before_step
        return runtime

    def _before_step(self, step: StepInput) -> None:
        if self._stage.fails:
            raise RuntimeError("failed on purpose")
