"""Assembles a server from a configuration and plugins, and takes it down in order.

configuration + plugins -> models -> engines -> loops -> router -> HTTP application
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, cast

import msgspec

from stoker.api.app import build_app
from stoker.api.in_process import Caller, call
from stoker.chat_template import ChatTemplate
from stoker.config import Config, ModelConfig, TenantConfig
from stoker.discovery import Plugins
from stoker.engine.client import EngineClient
from stoker.engine.draft_model import DraftModelDrafter, check_draft_model
from stoker.engine.embedding import EmbeddingEngine
from stoker.engine.loop import EngineLoop
from stoker.engine.model_engine import ModelEngine
from stoker.engine.ngram import NgramDrafter
from stoker.engine.readers import ReaderLimits
from stoker.errors import ConfigError
from stoker.history import History
from stoker.interfaces import (
    CacheReport,
    EngineSnapshot,
    EvictionStrategy,
    GrammarCompiler,
    HttpAnswer,
    LoadSnapshot,
    MiddlewareInfo,
    Observer,
    ObserverInfo,
    PolicyInfo,
    RouteInfo,
    Runtime,
    SchedulingPolicy,
    ServedModel,
    ServerContext,
    SnapshotStore,
    TenantLoad,
    ToolFormat,
)
from stoker.loader import ModelLoader
from stoker.reasoning import find_marks
from stoker.router import RoutedModel, Router
from stoker.services import Services
from stoker.stores import build_store
from stoker.structured import GrammarService
from stoker.tenants import Tenants
from stoker.thoughts import ThoughtTokens
from stoker.warm_up import WarmUp, read_warm_up

if TYPE_CHECKING:
    from stoker.api.access import Application
    from stoker.api.auth import KeyRing
    from stoker.engine.drafters import Drafter

__all__ = ["Server", "build_server"]

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
        warm_up: What is computed before anybody asks.
        loops: One loop for each device.
        tenants: Their settings; they change when the configuration is read again.
        origins: Where each setting was read, so that a profile overrides none; empty if nobody says.
    """

    router: Router
    app: Application
    warm_up: WarmUp

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.config = config
        self.plugins = plugins
        self.clock: Callable[[], float] = time.monotonic
        self.observers: Mapping[str, Observer] = {}
        self.loops: dict[str, EngineLoop] = {}
        self.tenants = Tenants(config.tenants)
        self.origins: Mapping[str, str] = {}
        self._loader = ModelLoader(config, plugins, self.origins, self.clock)
        self._stores: list[SnapshotStore] = []
        self._services = Services()
        self._stopped = False

    # ------------------------------------------------------------------ ServerContext

    def models(self) -> Sequence[ServedModel]:
        """The models served, in configured order."""
        return self.router.models()

    def load(self, model: str) -> LoadSnapshot:
        """How busy a model is."""
        return self.router.load(model)

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        """How much of a model's queue a tenant takes."""
        return self.router.tenant_load(model, tenant)

    def snapshot(self, model: str) -> EngineSnapshot:
        """What a model is doing now."""
        return self.router.snapshot(model)

    def cache(self, model: str) -> CacheReport:
        """What became of a model's prefix cache."""
        return self.router.cache(model)

    def policy(self, model: str) -> SchedulingPolicy:
        """The policy that schedules a model."""
        return self.router.policy(model)

    def tenant(self, name: str) -> TenantConfig:
        """A tenant's settings, as they are now."""
        return self.tenants.get(name)

    @property
    def uptime_s(self) -> float:
        """Seconds since the server was assembled."""
        return self.router.uptime_s

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        tenant: str,
        priority: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> HttpAnswer:
        """Ask the API as a tenant."""
        app = cast(Any, self.app)
        return await call(app, Caller(tenant, priority), method, path, body, headers)

    def while_serving(self, service: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        """Have something run beside the server."""
        self._services.add(service)

    # ------------------------------------------------------------------ assembly

    def build(self) -> None:
        """Load the models and wire everything up; on failure nothing is left behind.

        Raises:
            StokerError: A plugin, a setting or a model is wrong; the message says which.
        """
        self.plugins.check(self.config)
        self._loader = ModelLoader(self.config, self.plugins, self.origins, self.clock)
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
        lines = read_warm_up(self.config)  # before loading, which takes its time
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
            observers=list(self.observers.values()),
            tenants=self.tenants,
            history=History(self.config.server.history),
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
        self.warm_up = WarmUp(self.config, lines, routed, self.clock)
        self.router.is_warm = lambda: self.warm_up.is_done
        self.app = build_app(
            self.config,
            self.router,
            route_handlers=handlers,
            on_startup=[self.warm_up.start, self._services.start],
            on_shutdown=[self._services.stop, self.warm_up.stop],
        )
        if self.app.keys.is_required and not self.app.keys:
            logger.warning("there is no key yet: `stoker keys new TENANT` makes one")

    def _make(self, info: Any, *arguments: Any) -> Any:
        """What a descriptor's factory builds, with its options if it takes any."""
        options = self.plugins.options(info, self.config)
        return info.factory(*arguments) if options is None else info.factory(*arguments, options)

    def _eviction(self) -> EvictionStrategy | None:
        """A strategy of the kind that is asked for; ``None`` for the core's own."""
        info = self.plugins.eviction(self.config)
        return None if info is None else cast(EvictionStrategy, self._make(info))

    def _grammar_compiler(self, runtime: Runtime) -> GrammarCompiler | None:
        """What compiles grammars for a model; ``None`` if that is switched off, or it writes nothing."""
        info = self.plugins.grammar(self.config)
        if info is None or not runtime.info.capabilities.generates:
            return None
        return cast(GrammarCompiler, self._make(info, runtime.tokenizer, runtime.info))

    def _load_model(self, model: ModelConfig) -> RoutedModel:
        config = self.config
        loaded = self._loader.load(model)
        local, runtime = loaded.local, loaded.runtime
        drafter = self._drafter_for(model, runtime)
        if runtime.info.capabilities.generates:
            self._check_reservations(runtime.info.num_lanes)
        served = ServedModel(
            model_id=model.id or local.model_id,
            reference=model.model,
            backend=loaded.backend,
            created=int(local.path.stat().st_mtime) if local.path.exists() else 0,
            size_bytes=local.size_bytes,
            info=runtime.info,
        )
        policy_info = cast(PolicyInfo, self.plugins.require("policy", config.scheduler.policy))
        store = build_store(
            config.cache,
            runtime.info,
            local,
            loaded.backend,
            self._eviction(),
            self.clock,
        )
        if store is not None:
            self._stores.append(store)
        loop = self.loops.get(runtime.info.device)
        if loop is None:
            loop = self.loops[runtime.info.device] = EngineLoop(runtime.info.device, self.clock)
        engine = ModelEngine(
            served.model_id,
            runtime,
            self._make(policy_info),
            loaded.tuned.scheduler,
            config.cache,
            list(self.observers.values()),
            self.clock,
            tenants=self.tenants,
            weight=model.weight,
            reader_limits=ReaderLimits(
                config.server.max_unread_tokens, config.server.reader_timeout_s
            ),
            eviction=self._eviction(),
            store=store,
            drafter=drafter,
            speculation=config.speculation,
        )
        loop.engines.append(engine)
        embedder: EmbeddingEngine | None = None
        if runtime.info.capabilities.embed:
            embedder = EmbeddingEngine(engine, self.tenants)
            loop.embedders.append(embedder)
        template = ChatTemplate(
            runtime.info.chat_template,
            runtime.tokenizer,
            bos_token=runtime.info.bos_token,
            eos_token=runtime.info.eos_token,
        )
        client = EngineClient(engine, loop, store, embedder)
        marks = find_marks(model.reasoning, runtime.info.chat_template, runtime.tokenizer)
        return RoutedModel(
            served,
            client,
            template,
            heartbeat_s=lambda: loop.heartbeat_s,
            grammars=GrammarService(self._grammar_compiler(runtime)),
            tool_format=self._tool_format(model, runtime),
            reasoning=marks,
            thoughts=None
            if marks is None
            else ThoughtTokens(marks, runtime.tokenizer, runtime.info),
        )

    def _tool_format(self, model: ModelConfig, runtime: Runtime) -> ToolFormat | None:
        """How a model writes tool calls: as it is told, or as the first format that suits it."""
        special = runtime.tokenizer.special_tokens
        for info in self.plugins.tool_formats(self.config, model):
            form = cast(ToolFormat, self._make(info))
            if model.tool_format == info.name or form.suits(runtime.info.chat_template, special):
                return form
        return None

    def _drafter_for(self, model: ModelConfig, runtime: Runtime) -> Drafter | None:
        """Who guesses tokens for a model, if anybody does."""
        config = self.config.speculation
        if model.draft_model is not None:
            # As many lanes and as much context as the model itself has.
            lanes, context = runtime.info.num_lanes, runtime.info.context_length
            wanted = ModelConfig(
                model=model.draft_model, backend=model.backend, lanes=lanes, context=context
            )
            draft = self._loader.load(wanted, profile=False).runtime
            check_draft_model(runtime, draft, model.model, model.draft_model)
            return DraftModelDrafter(draft, self.clock)
        can = runtime.info.capabilities
        if config.method == "none" or can.truncation != "any" or not can.generates:
            return None
        return NgramDrafter(config.min_ngram, config.max_ngram)

    def _check_reservations(self, num_lanes: int) -> None:
        """Refuse reservations that would leave nobody else a lane, ever."""
        reserved = sum(tenant.reserved_lanes for tenant in self.config.tenants)
        if reserved < num_lanes:
            return
        what = f"tenants: {reserved} lanes are reserved of a model that has {num_lanes}"
        if not self.config.scheduler.lend_reserved:
            raise ConfigError(
                f"{what}, and with scheduler.lend_reserved = false no other tenant would ever get one; "
                "reserve fewer, or give the model more lanes"
            )
        logger.warning("%s; the others live on what these leave idle", what)

    def apply(self, config: Config, keys: KeyRing) -> None:
        """Take the tenants and keys of a configuration that was read again; all else stays.

        Args:
            config: The new configuration.
            keys: Its keys.
        """
        self.tenants.replace(config.tenants)
        self.app.keys = keys
        self.config = msgspec.structs.replace(self.config, tenants=config.tenants)

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
        await self._services.stop()
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
        for store in self._stores:
            store.close()
        self._stores.clear()
        self._loader.close()


def build_server(config: Config, plugins: Plugins) -> Server:
    """A server with its models loaded, not yet started.

    Raises:
        StokerError: A plugin, a setting or a model is wrong; the message says which.
    """
    server = Server(config, plugins)
    server.build()
    return server
