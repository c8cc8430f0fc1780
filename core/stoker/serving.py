"""A server as a process: HTTP, signals, and the configuration that is read again."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from stoker.api.connection import bounded_protocol
from stoker.banner import print_banner
from stoker.errors import ConfigError
from stoker.logs import setup_logging
from stoker.reload import Reloader
from stoker.server import Server

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.discovery import Plugins

__all__ = ["serve"]

logger = logging.getLogger("stoker.server")


class _HttpServer(uvicorn.Server):
    """Uvicorn whose first signal drains, whose second cancels what runs, and whose third just ends."""

    def __init__(
        self,
        config: uvicorn.Config,
        server: Server,
        announce: Callable[[str], None],
        reloader: Reloader | None = None,
    ) -> None:
        super().__init__(config)
        self._server = server
        self._announce = announce
        self._reloader = reloader
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_signals = 0
        self._draining: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self._watch(self._loop)
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._reloader is None:
            return
        self._reloader.start(self._server.app.keys)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if sys.platform != "win32" and in_main_thread:  # nobody else may have signal handlers
            loop.add_signal_handler(signal.SIGHUP, self._reloader.ask)

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        if self._reloader is not None:
            await self._reloader.stop()
        await super().shutdown(sockets)

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


def serve(
    config: Config,
    plugins: Plugins,
    reload: Callable[[], Config] | None = None,
    config_file: Path | None = None,
    origins: Mapping[str, str] | None = None,
) -> int:
    """Serve until a signal; returns the process's exit code.

    Args:
        config: The configuration.
        plugins: What was found.
        reload: Reads the configuration again, on SIGHUP or when a file changes; without it nothing does.
        config_file: The file that the configuration was read from, if any.
        origins: Where each setting was read; what has one is not overridden by a profile.

    Raises:
        StokerError: The server cannot start; the message says why.
    """
    setup_logging(config.logging)
    server = Server(config, plugins)
    server.origins = origins or {}
    # Before the files of keys are read: loading a model takes long enough for them to change.
    reloader = Reloader(config, reload, server.apply, config_file) if reload is not None else None
    server.build()
    try:
        server.start()
        http = _HttpServer(
            uvicorn.Config(
                server.app,
                host=config.server.host,
                port=config.server.port,
                loop="auto",
                http=bounded_protocol(config.server.body_timeout_s, config.server.max_connections),
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # or any local client could pose as a trusted proxy
                timeout_graceful_shutdown=5,
                timeout_keep_alive=75,  # longer than clients keep idle connections
                backlog=2048,
            ),
            server,
            lambda address: print_banner(server, address, server.warm_up.summary),
            reloader,
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
