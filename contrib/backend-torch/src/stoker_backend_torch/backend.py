"""The backend: looks at a model, chooses settings, loads it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import stoker
from stoker_backend_torch.checkpoint import is_checkpoint, open_checkpoint
from stoker_backend_torch.manners import quiet
from stoker_backend_torch.openmp import prepare_openmp
from stoker_backend_torch.options import TorchOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["TorchBackend"]


class TorchBackend(stoker.Backend):
    """Loads models in Hugging Face's format through transformers."""

    def accepts(self, model: stoker.LocalModel) -> bool:
        """Whether it is a folder with a configuration, a safetensors file in one, or a GGUF file."""
        return is_checkpoint(model.path)

    def load(self, model: stoker.LocalModel, settings: stoker.LoadSettings) -> stoker.Runtime:
        """Check the files, choose settings, load the model.

        Raises:
            ConfigError: A setting cannot be, such as a device that is not there.
            ModelError: The model is incomplete, damaged, of an unknown kind, or needs consent.
            OutOfMemoryError: Its weights and KV memory exceed the free memory.
        """
        options = settings.options if settings.options is not None else TorchOptions()
        checkpoint = open_checkpoint(
            model.path,
            trust_remote_code=options.trust_remote_code,
            allow_pickle=options.allow_pickle,
        )
        wait_policy, openmp_warning = prepare_openmp(options.omp_wait_policy)
        # torch and transformers take seconds to import, and must come after OpenMP's settings; and torch
        # must have set up its logging before that can be redirected.
        from stoker_backend_torch import devices  # noqa: PLC0415 - heavy

        device = devices.choose_device(options.device)
        with quiet():
            from stoker_backend_torch import loading  # noqa: PLC0415 - heavy

        return loading.load_runtime(
            model,
            checkpoint,
            settings,
            options,
            device=device,
            extra_settings={"omp_wait_policy": wait_policy},
            warnings=[openmp_warning] if openmp_warning else [],
        )

    def tunables(self, model: stoker.LocalModel) -> Sequence[stoker.Tunable]:
        """The type that is computed in, and 8-bit weights where torchao is installed."""
        from stoker_backend_torch import devices  # noqa: PLC0415 - torch, as in load

        device = devices.choose_device("auto")
        if device.type != "cpu":  # there the automatic type has no rival
            return ()
        natural = str(devices.choose_dtype("auto", device)).removeprefix("torch.")
        found = [
            stoker.Tunable(
                name="dtype",
                summary="The type that is computed in",
                values=[
                    stoker.TunableValue(label=name, options={"dtype": name})
                    for name in ("bfloat16", "float32")
                ],
                default=natural,
                changes_quality=True,
            )
        ]
        if find_spec("torchao") is not None:
            found.append(
                stoker.Tunable(
                    name="weights",
                    summary="Bits of the linear layers' weights",
                    values=[
                        stoker.TunableValue(label=name, options={"weights": name})
                        for name in ("as_is", "int8")
                    ],
                    default="as_is",
                    group="memory",
                    changes_quality=True,
                )
            )
        return found

    def diagnose(self, models: Sequence[stoker.LocalModel]) -> Sequence[stoker.Finding]:
        """See ``diagnosis.diagnose``."""
        from stoker_backend_torch.diagnosis import diagnose  # noqa: PLC0415 - as seldom as it is asked for

        return diagnose(models)

    def versions(self) -> Mapping[str, str]:
        """Of the libraries that compute."""
        found = {}
        for package in ("torch", "transformers", "torchao"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found
