"""From a configured model to a loaded runtime: found, given to a backend, with what was tuned for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import msgspec

from stoker import __version__
from stoker.config import Config, ModelConfig
from stoker.discovery import Plugins, resolve_model
from stoker.errors import ModelError, StokerError
from stoker.interfaces import Backend, BackendInfo, LoadSettings, Runtime
from stoker.tuned import Tuned, apply_profile, choose_profile
from stoker.types import LocalModel

__all__ = ["Loaded", "ModelLoader"]

logger = logging.getLogger("stoker.loader")


class Loaded(msgspec.Struct, frozen=True):
    """A loaded model.

    Attributes:
        local: Its file.
        backend: The backend's name.
        runtime: What computes it.
        tuned: What it was loaded with.
    """

    local: LocalModel
    backend: str
    runtime: Runtime
    tuned: Tuned


class ModelLoader:
    """Loads models, and closes all of them.

    Args:
        config: The configuration.
        plugins: Where backends and model sources come from.
        origins: Where each setting was read, so that a profile overrides none; empty if nobody says.
        clock: Monotonic seconds.

    Attributes:
        runtimes: All that are loaded.
    """

    def __init__(
        self,
        config: Config,
        plugins: Plugins,
        origins: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._plugins = plugins
        self._origins = origins
        self._clock = clock
        self.runtimes: list[Runtime] = []

    def load(self, model: ModelConfig, *, profile: bool = True) -> Loaded:
        """Find a model and load it.

        Args:
            model: Which, and how.
            profile: Whether to use what ``stoker tune`` found for it.

        Raises:
            StokerError: It is not there, no backend can load it, or the one that should fails.
        """
        local = resolve_model(model.model, self._plugins, progress=True)
        info = self._backend_for(model, local)
        started_s = self._clock()
        runtime, tuned = self._load_tuned(model, local, info, profile=profile)
        self.runtimes.append(runtime)
        local = tuned.local
        logger.info("loaded %s in %.1f s", local.path.name, self._clock() - started_s)
        for warning in runtime.info.warnings:
            logger.warning("%s", warning)
        return Loaded(local, info.name, runtime, tuned)

    def close(self) -> None:
        """Free every model; may be called twice."""
        for runtime in self.runtimes:
            runtime.close()
        self.runtimes.clear()

    def _backend_for(self, model: ModelConfig, local: LocalModel) -> BackendInfo:
        """The backend that is named, or the first by order that accepts the model."""
        if model.backend != "auto":
            return cast(BackendInfo, self._plugins.require("backend", model.backend))
        backends = cast(list[BackendInfo], self._plugins.active("backend", self._config))
        for info in sorted(backends, key=lambda info: info.order):
            if info.factory().accepts(local):
                return info
        have = ", ".join(info.name for info in backends) or "none"
        raise ModelError(
            f"no installed backend can load {local.path.name} (installed: {have}); {_cure(local.path)}"
        )

    def _load_tuned(
        self, model: ModelConfig, local: LocalModel, info: BackendInfo, *, profile: bool
    ) -> tuple[Runtime, Tuned]:
        """Load a model with its profile, or without where that does not work."""
        config, backend = self._config, info.factory()
        untuned = Tuned(local=local, scheduler=config.scheduler)
        wanted = config.performance.profile if profile else "off"
        versions = {"stoker": __version__, **backend.versions()}
        found = choose_profile(wanted, local, info.name, versions) if wanted != "off" else None
        if found is None:
            return self._load(model, info, backend, untuned), untuned
        user_set = {**config.plugins.get(info.name, {}), **model.options}
        threads = config.performance.threads
        if threads is not None:
            user_set |= {"threads": threads, "batch_threads": threads}
        set_keys = {key for key, origin in self._origins.items() if origin != "default"}
        tuned = apply_profile(
            found, local, config.scheduler, set_options=user_set, set_keys=set_keys
        )
        try:
            return self._load(model, info, backend, tuned), tuned
        except StokerError as error:
            logger.warning("the profile cannot be used (%s); loading without it", error)
        return self._load(model, info, backend, untuned), untuned

    def _load(
        self, model: ModelConfig, info: BackendInfo, backend: Backend, tuned: Tuned
    ) -> Runtime:
        options = {**tuned.options, **model.options}
        runtime = backend.load(
            tuned.local,
            LoadSettings(
                lanes=model.lanes,
                context_length=model.context,
                threads=self._config.performance.threads,
                max_step_tokens=tuned.scheduler.max_num_batched_tokens,
                options=self._plugins.options(info, self._config, extra=options),
            ),
        )
        if tuned.label:
            configured = msgspec.structs.asdict(self._config.scheduler)
            changed = msgspec.structs.asdict(tuned.scheduler).items() - configured.items()
            settings = {
                **runtime.info.settings,
                **{key: str(value) for key, value in sorted(changed)},
            }
            settings["profile"] = tuned.label
            runtime.info = msgspec.structs.replace(runtime.info, settings=settings)
        return runtime


def _cure(path: Path) -> str:
    """What to install for a model, by the look of it."""
    if path.is_dir() or path.suffix.lower() == ".safetensors":
        return "for folders with config.json and safetensors: pip install stoker-backend-torch"
    if path.suffix.lower() in {".bin", ".ggml"}:
        return "for GGML files from before GGUF: pip install stoker-backend-ctransformers"
    return "for GGUF files: pip install stoker-backend-gguf"
