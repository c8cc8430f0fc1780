"""Reads the configuration again while the server runs: tenants and keys change, requests go on.

It happens on SIGHUP and when one of the files changes: the configuration file that was used, and the files of
keys. What cannot be used changes nothing and is logged; what would need a restart is named in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stoker.api.auth import KeyRing
from stoker.checks import tables
from stoker.config import Config, ServerConfig
from stoker.errors import StokerError

__all__ = ["Reloader", "needs_restart"]

logger = logging.getLogger("stoker.reload")

_HOT = {
    "server.api_keys",
    "server.api_keys_file",
    "server.tenant_keys_file",
    "server.trusted_proxies",
}
_SETTLE_S = 0.1  # a file that is being written is let alone until it has been the same for so long
_MAX_LOOKS = 100
_LEAST_INTERVAL_S = 0.05

_Signature = tuple[int, int, int] | None


class Reloader:
    """Watches files from its construction on, and acts once it was started.

    Make it before anything is read from the files that it watches, or a change in between goes unseen.

    Args:
        config: What the server was started with.
        load: Reads the configuration again, as at the start; called on another thread.
        apply: Takes the new tenants and keys, on the event loop.
        config_file: The file that was used, if any.
    """

    def __init__(
        self,
        config: Config,
        load: Callable[[], Config],
        apply: Callable[[Config, KeyRing], None],
        config_file: Path | None = None,
    ) -> None:
        self._config = config
        self._load = load
        self._apply = apply
        self._config_file = config_file
        self._keys = KeyRing()
        self._files = self._files_of(config.server)
        self._seen = _look(self._files)
        self._restart_for: list[str] = []
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, keys: KeyRing) -> None:
        """Begin to act; to be called on the event loop.

        Args:
            keys: The keys that are in force.
        """
        self._keys = keys
        self._task = asyncio.ensure_future(self._watch())

    async def stop(self) -> None:
        """Stop to act; may be called twice."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._task = None

    def ask(self) -> None:
        """Have everything read again soon, changed or not; to be called on the event loop."""
        self._asked.set()

    async def reload(self) -> bool:
        """Read everything again now.

        Returns:
            Whether it could be used; if not, everything stays as it was and the log says why.
        """
        try:
            config, keys = await asyncio.to_thread(self._read)
        except StokerError as error:
            logger.error("configuration not read again, everything stays as it was: %s", error)
            return False
        except Exception:
            # A fault of ours must not end the watch: the next change may be a key that is revoked.
            logger.exception("configuration not read again, everything stays as it was")
            return False
        self._keys = keys
        self._apply(config, keys)
        names = ", ".join(tenant.name for tenant in config.tenants) or "none"
        logger.info("configuration read again: tenants %s; keys %d", names, len(keys))
        if keys.is_required and not keys:
            logger.warning("no key is left, so every request is refused until there is one")
        self._report(needs_restart(self._config, config))
        return True

    def _report(self, names: list[str]) -> None:
        if names and names != self._restart_for:
            logger.warning("changed, but needs a restart: %s", ", ".join(names))
        self._restart_for = names

    def _read(self) -> tuple[Config, KeyRing]:
        # The files are looked at before they are read: what changes in between is read once more.
        self._seen = _look(self._files)
        config = self._load()
        self._files = self._files_of(config.server)
        known = self._seen
        self._seen = _look(file for file in self._files if file not in known) | {
            file: known[file] for file in self._files if file in known
        }
        return config, KeyRing.load(config, was_required=self._keys.is_required)

    async def _watch(self) -> None:
        interval_s = self._config.server.reload_s
        timeout_s = max(interval_s, _LEAST_INTERVAL_S) if interval_s else None
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), timeout_s)
            if self._asked.is_set() or await self._has_changed():
                self._asked.clear()
                await self.reload()

    async def _has_changed(self) -> bool:
        now = await asyncio.to_thread(_look, self._files)
        if now == self._seen:
            return False
        for _ in range(_MAX_LOOKS):
            await asyncio.sleep(_SETTLE_S)
            before, now = now, await asyncio.to_thread(_look, self._files)
            if now == before:
                break
        return True

    def _files_of(self, server: ServerConfig) -> list[Path]:
        named = [server.api_keys_file, server.tenant_keys_file]
        files = [Path(name).expanduser() for name in named if name is not None]
        return files if self._config_file is None else [self._config_file, *files]


def needs_restart(running: Config, new: Config) -> list[str]:
    """Dotted names of the settings that differ and cannot change while the server runs."""
    before, after = _cold_settings(running), _cold_settings(new)
    missing = object()
    names = {**before, **after}
    return [name for name in names if before.get(name, missing) != after.get(name, missing)]


def _cold_settings(config: Config) -> dict[str, Any]:
    settings = {
        f"{where}.{field}": value
        for section, where, table in tables(config)
        if section != "tenants"
        for field, value in table.items()
    }
    return {name: value for name, value in settings.items() if name not in _HOT}


def _look(files: Iterable[Path]) -> dict[Path, _Signature]:
    """What tells that a file is another than before; ``None`` for one that is not there."""
    return {file: _signature(file) for file in files}


def _signature(file: Path) -> _Signature:
    try:
        found = file.stat()
    except OSError:
        return None
    # A change of content changes mtime; one of owner or mode, which may make it readable, ctime.
    return max(found.st_mtime_ns, found.st_ctime_ns), found.st_size, found.st_ino
