"""What is tuned: a model with the user's settings for it, and the space that is left to search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from stoker import Backend, LocalModel, __version__
from stoker.config import Config, ModelConfig
from stoker.errors import ConfigError
from stoker.profiles import Machine, ModelFingerprint, fingerprint, this_machine
from stoker_plugins.tune.host import Host, backend_for
from stoker_plugins.tune.messages import Job, ModelFile
from stoker_plugins.tune.space import WEIGHTS, Assignment, Space, from_backend, from_core

__all__ = ["Target", "find_target"]


@dataclass(frozen=True, slots=True)
class Target:
    """A model, who runs it, and what about it is free to choose.

    Attributes:
        local: The model.
        model: Its entry in the configuration.
        config: The configuration.
        backend_name: Who loads it.
        backend: The backend itself; it loads nothing in this process.
        space: What may be tuned.
        skipped: What may not, and why.
        machine: This machine.
        model_fingerprint: Which weights it has.
        versions: What a profile would have to match.
    """

    local: LocalModel
    model: ModelConfig
    config: Config
    backend_name: str
    backend: Backend
    space: Space
    skipped: Mapping[str, str]
    machine: Machine
    model_fingerprint: ModelFingerprint
    versions: Mapping[str, str]

    def job(self, assignment: Assignment, files: Mapping[str, LocalModel] | None = None) -> Job:
        """A measurement of an assignment; the caller adds what to measure.

        Args:
            assignment: What to set.
            files: Other weights, by the label of their type.
        """
        local = (files or {}).get(assignment.get(WEIGHTS, ""), self.local)
        names = (self.backend_name, self.config.scheduler.policy)
        return Job(
            model=ModelFile(
                path=str(local.path),
                model_id=local.model_id,
                reference=local.reference,
                size_bytes=local.size_bytes,
            ),
            backend=self.backend_name,
            sections={n: self.config.plugins[n] for n in names if n in self.config.plugins},
            options={**self.space.options(assignment), **self.model.options},
            lanes=self.model.lanes,
            context=self.model.context,
            threads=self.config.performance.threads,
            scheduler=self.space.scheduler(assignment, self.config.scheduler),
        )


def find_target(
    host: Host, config_path: str | None, reference: str | None, backend: str | None
) -> Target:
    """Find the model, its backend, and what of both is not set by the user.

    Args:
        host: Configuration and plugins.
        config_path: The value of ``--config``.
        reference: The model; ``None`` for the configured or default one.
        backend: The value of ``--backend``.

    Raises:
        StokerError: Something is not there or wrong; names it.
    """
    overrides = {"models.model": reference, "models.backend": backend}
    config, origins = host.config(config_path, overrides)
    if len(config.models) > 1:
        names = ", ".join(model.id or model.model for model in config.models)
        raise ConfigError(f"several models are configured; name one of them: {names}")
    model = config.models[0] if config.models else ModelConfig()
    local = host.resolve(model.model)
    info = backend_for(host, config, model.backend, local)
    made = info.factory()
    user_set = _set_by_user(config, origins, model.options, info.name)
    space, skipped = _space(made, local, user_set)
    return Target(
        local=local,
        model=model,
        config=config,
        backend_name=info.name,
        backend=made,
        space=space,
        skipped=skipped,
        machine=this_machine(),
        model_fingerprint=fingerprint(local),
        versions={"stoker": __version__, **made.versions()},
    )


def _set_by_user(
    config: Config, origins: Mapping[str, str], options: Mapping[str, Any], backend: str
) -> dict[str, str]:
    """Keys that are taken, and where they were set."""
    taken = dict.fromkeys(options, "the model's options")
    for key in config.plugins.get(backend, {}):
        taken[key] = origins.get(f"plugins.{backend}.{key}", f"[plugins.{backend}]")
    for key, origin in origins.items():
        if origin != "default" and key.startswith("scheduler."):
            taken[key] = origin
    if config.performance.threads is not None:
        taken |= dict.fromkeys(("threads", "batch_threads"), "performance.threads")
    return taken


def _space(
    backend: Backend, local: LocalModel, taken: Mapping[str, str]
) -> tuple[Space, dict[str, str]]:
    dimensions, skipped = [], {}
    for dimension in (*from_backend(backend.tunables(local)), *from_core()):
        settled = sorted(dimension.keys & taken.keys())
        if settled:
            skipped[dimension.name] = f"{settled[0]} is set ({taken[settled[0]]})"
        else:
            dimensions.append(dimension)
    return Space(dimensions), skipped


def with_weights(target: Target, types: Sequence[str]) -> Target:
    """The target with its weights in other types as one more dimension."""
    from stoker_plugins.tune.space import Dimension, Value

    own = Value("own")
    dimension = Dimension(
        name=WEIGHTS,
        summary="The type of the weights",
        values={"own": own, **{name: Value(name) for name in types}},
        default="own",
        changes_quality=True,
    )
    dimensions = [*target.space.dimensions.values(), dimension]
    fields = {name: getattr(target, name) for name in Target.__dataclass_fields__}
    return Target(**{**fields, "space": Space(dimensions)})


def as_other_weights(local: LocalModel, path: Any) -> LocalModel:
    """A file with the same model's weights, under the model's name."""
    return msgspec.structs.replace(local, path=path, size_bytes=path.stat().st_size)
