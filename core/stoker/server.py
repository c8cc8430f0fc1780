"""Assembles a server from a configuration and plugins, runs it, and takes it down in order.

configuration + plugins -> models -> engines -> loops -> router -> HTTP application
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import uvicorn

from stoker.api.app import build_app
from stoker.banner import print_banner
from stoker.chat_template import ChatTemplate
from stoker.config import Config, ModelConfig
from stoker.discovery import Plugins, resolve_model
from stoker.engine.client import EngineClient
from stoker.engine.loop import EngineLoop
from stoker.engine.model_engine import ModelEngine
from stoker.errors import ConfigError, ModelError
from stoker.interfaces import (
    BackendInfo,
    LoadSettings,
    LoadSnapshot,
    MiddlewareInfo,
    Observer,
    ObserverInfo,
    PolicyInfo,
    RouteInfo,
    Runtime,
    ServedModel,
    ServerContext,
)
from stoker.logs import setup_logging
from stoker.router import RoutedModel, Router
from stoker.types import LocalModel

if TYPE_CHECKING:
    from litestar import Litestar

__all__ = ["Server", "build_server", "serve"]

logger = logging.getLogger("stoker.server")

_CANCEL_GRACE_S = 2.0  # for cancelled requests to write their error event


class Server(ServerContext):
    """A server with its models loaded. ``start`` it before its application takes requests.

    Args:
        config: The configuration.
        plugins: What was found.

    Attributes:
        router: What requests go to.
        app: The ASGI application.
        loops: One loop for each device.
    """

    router: Router
    app: Litestar

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config = config
        self.plugins = plugins
        self.clock: Callable[[], float] = time.monotonic
        self.observers: Mapping[str, Observer] = {}
        self.loops: dict[str, EngineLoop] = {}
        self._runtimes: list[Runtime] = []
        self._stopped = False

    # ------------------------------------------------------------------ ServerContext

    def models(self) -> Sequence[ServedModel]:
        """The models served, in configured order."""
        return self.router.models()

    def load(self, model: str) -> LoadSnapshot:
        """How busy a model is."""
        return self.router.load(model)

    @property
    def uptime_s(self) -> float:
        """Seconds since the server was assembled."""
        return self.router.uptime_s

    # ------------------------------------------------------------------ assembly

    def build(self) -> None:
        """Load the models and wire everything up; on failure nothing is left behind.

        Raises:
            StokerError: A plugin, a setting or a model is wrong; the message says which.
        """
        self.plugins.check(self.config)
        try:
            self._build()
        except BaseException:
            self._close_runtimes()
            raise

    def _build(self) -> None:
        self.observers = {
            info.name: self._make(info)
            for info in cast(list[ObserverInfo], self.plugins.active("observer", self.config))
        }
        routed = [self._load_model(model) for model in self.config.models or [ModelConfig()]]
        ids = [model.served.model_id for model in routed]
        if twice := {model_id for model_id in ids if ids.count(model_id) > 1}:
            raise ConfigError(
                f"models: two models have the id {twice.pop()!r}; give one of them another `id`"
            )
        self.router = Router(
            routed=routed,
            middleware=[],
            admission=self.config.admission,
            clock=self.clock,
            stalled_after_s=self.config.server.stalled_after_s,
        )
        infos = self.plugins.active("middleware", self.config)
        self.router.middleware = [
            self._make(info, self) for info in cast(list[MiddlewareInfo], infos)
        ]
        handlers: list[Any] = []
        for route in cast(list[RouteInfo], self.plugins.active("route", self.config)):
            handlers += self._make(route, self)
        self.app = build_app(self.config, self.router, route_handlers=handlers)

    def _make(self, info: Any, *arguments: Any) -> Any:
        """What a descriptor's factory builds, with its options if it takes any."""
        options = self.plugins.options(info, self.config)
        return info.factory(*arguments) if options is None else info.factory(*arguments, options)

    def _load_model(self, model: ModelConfig) -> RoutedModel:
        config = self.config
        local = resolve_model(model.model, self.plugins, progress=True)
        info = self._backend_for(model, local)
        options = self.plugins.options(info, config, extra=model.options)
        started_s = self.clock()
        runtime = info.factory().load(
            local,
            LoadSettings(
                lanes=model.lanes,
                context_length=model.context,
                threads=config.performance.threads,
                max_step_tokens=config.scheduler.max_num_batched_tokens,
                options=options,
            ),
        )
        self._runtimes.append(runtime)
        logger.info("loaded %s in %.1f s", local.path.name, self.clock() - started_s)
        for warning in runtime.info.warnings:
            logger.warning("%s", warning)
        served = ServedModel(
            model_id=model.id or local.model_id,
            reference=model.model,
            backend=info.name,
            created=int(local.path.stat().st_mtime) if local.path.exists() else 0,
            size_bytes=local.size_bytes,
            info=runtime.info,
        )
        policy_info = cast(PolicyInfo, self.plugins.require("policy", config.scheduler.policy))
        loop = self.loops.get(runtime.info.device)
        if loop is None:
            loop = self.loops[runtime.info.device] = EngineLoop(runtime.info.device, self.clock)
        engine = ModelEngine(
            served.model_id,
            runtime,
            self._make(policy_info),
            config.scheduler,
            config.cache,
            list(self.observers.values()),
            self.clock,
        )
        loop.engines.append(engine)
        template = ChatTemplate(
            runtime.info.chat_template,
            runtime.tokenizer,
            bos_token=runtime.info.bos_token,
            eos_token=runtime.info.eos_token,
        )
        return RoutedModel(
            served, EngineClient(engine, loop), template, heartbeat_s=lambda: loop.heartbeat_s
        )

    def _backend_for(self, model: ModelConfig, local: LocalModel) -> BackendInfo:
        """The backend that is named, or the first that accepts the model."""
        if model.backend != "auto":
            return cast(BackendInfo, self.plugins.require("backend", model.backend))
        backends = cast(list[BackendInfo], self.plugins.active("backend", self.config))
        for info in backends:
            if info.factory().accepts(local):
                return info
        have = ", ".join(info.name for info in backends) or "none"
        raise ModelError(
            f"no installed backend can load {local.path.name} (installed: {have}); "
            "for GGUF files: pip install stoker-backend-gguf"
        )

    # ------------------------------------------------------------------ life cycle

    def start(self) -> None:
        """Start the loops and tell the plugins."""
        for loop in self.loops.values():
            loop.start()
        self.plugins.started(self)

    async def drain(self, timeout_s: float | None = None) -> None:
        """Refuse new requests, let running ones finish, cancel the rest.

        Args:
            timeout_s: How long they may take; by default the configured ``drain_timeout_s``.
        """
        self.router.draining = True
        if timeout_s is None:
            timeout_s = self.config.server.drain_timeout_s
        if not await self._idle_within(timeout_s):
            logger.warning("cancelling %d requests that did not finish", self.router.num_active)
        await asyncio.to_thread(self._stop_loops)
        await self._idle_within(_CANCEL_GRACE_S)

    async def _idle_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self.router.idle.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def stop(self) -> None:
        """End what still runs, tell the plugins, free the models. May be called twice."""
        if self._stopped:
            return
        self._stopped = True
        self.router.draining = True
        ended = self._stop_loops()
        self.plugins.stopped(self)
        if ended:
            self._close_runtimes()

    def _stop_loops(self) -> bool:
        ended = [loop.stop() for loop in self.loops.values()]
        if not all(ended):
            # A runtime that still computes cannot be freed under its feet.
            logger.error(
                "a loop did not end in time; its models stay loaded until the process ends"
            )
        return all(ended)

    def _close_runtimes(self) -> None:
        for runtime in self._runtimes:
            runtime.close()
        self._runtimes.clear()


def build_server(config: Config, plugins: Plugins) -> Server:
    """A server with its models loaded, not yet started.

    Raises:
        StokerError: A plugin, a setting or a model is wrong; the message says which.
    """
    server = Server(config, plugins)
    server.build()
    return server


class _UvicornServer(uvicorn.Server):
    """Uvicorn whose first signal drains, whose second cancels what runs, and whose third just ends."""

    def __init__(
        self, config: uvicorn.Config, server: Server, announce: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._server = server
        self._announce = announce
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0
        self._draining: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self._loop is None or self._num_signals > 2:
            self.should_exit = self.force_exit = True
            return
        timeout_s = None if self._num_signals == 1 else 0.0
        if self._num_signals == 1:
            logger.info("%s: draining; send it again to stop at once", signal.Signals(sig).name)
        self._server.router.draining = True
        # A signal handler runs between any two instructions; the loop itself must make the task.
        self._loop.call_soon_threadsafe(self._start_draining, timeout_s)

    def _start_draining(self, timeout_s: float | None) -> None:
        if self._draining is not None:
            self._draining.cancel()
        self._draining = asyncio.ensure_future(self._drain(timeout_s))

    async def _drain(self, timeout_s: float | None) -> None:
        await self._server.drain(timeout_s)
        self.should_exit = True


def serve(config: Config, plugins: Plugins) -> int:
    """Serve until a signal; returns the process's exit code.

    Raises:
        StokerError: The server cannot start; the message says why.
    """
    setup_logging(config.logging)
    server = build_server(config, plugins)
    try:
        server.start()
        http = _UvicornServer(
            uvicorn.Config(
                server.app,
                host=config.server.host,
                port=config.server.port,
                loop="auto",
                http="httptools",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
                timeout_keep_alive=75,  # longer than clients keep idle connections
                backlog=2048,
            ),
            server,
            lambda address: print_banner(server, address),
        )
        try:
            http.run()
        except SystemExit as error:  # uvicorn's way to say that it could not listen
            raise ConfigError(
                f"cannot listen on {config.server.host}:{config.server.port}; "
                "is another server running there? choose another --port"
            ) from error
    finally:
        server.stop()
    return 0
