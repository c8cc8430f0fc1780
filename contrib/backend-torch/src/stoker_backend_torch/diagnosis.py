"""What ``stoker doctor`` says of torch: its devices and types, what else is installed, how threads wait."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import stoker
from stoker_backend_torch.checkpoint import open_checkpoint
from stoker_backend_torch.openmp import prepare_openmp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["diagnose"]

_OPTIONAL = {
    "gguf": "GGUF files: pip install 'stoker-backend-torch[gguf]'",
    "torchao": "weights = \"int8\": pip install 'stoker-backend-torch[int8]'",
}


def diagnose(models: Sequence[stoker.LocalModel]) -> Sequence[stoker.Finding]:
    """The libraries, the device and type that ``auto`` means, packed layers, and each model's files.

    Args:
        models: Models on the disk.
    """
    policy, too_late = prepare_openmp("passive")  # before torch, which reads it
    try:
        return [
            *_libraries(),
            *_devices(),
            stoker.Finding(
                level="warning" if too_late else "ok",
                topic="torch threads",
                message=too_late or f"OpenMP's threads wait by the policy {policy!r}.",
            ),
            *map(_model, models),
        ]
    except ImportError as error:
        return [
            stoker.Finding(
                level="problem",
                topic="torch",
                message=f"torch or transformers cannot be imported: {error}.",
                cure="pip install torch, then pip install stoker-backend-torch",
            )
        ]


def _libraries() -> Iterator[stoker.Finding]:
    found = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    yield stoker.Finding(level="ok", topic="torch", message=f"{found}.")
    for package, purpose in _OPTIONAL.items():
        try:
            version(package)
        except PackageNotFoundError:
            yield stoker.Finding(
                level="note",
                topic="torch",
                message=f"{package} is not installed.",
                cure=f"only for {purpose}",
            )


def _devices() -> Iterator[stoker.Finding]:
    import torch  # noqa: PLC0415 - takes seconds, and must come after OpenMP's settings

    from stoker_backend_torch.devices import choose_device, choose_dtype  # noqa: PLC0415 - heavy
    from stoker_backend_torch.packing import pack_linear_layers  # noqa: PLC0415 - heavy

    device = choose_device("auto")
    dtype = choose_dtype("auto", device)
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        yield stoker.Finding(
            level="ok", topic="torch device", message=f"Models run on {device}, in {name}."
        )
        return
    is_slow = dtype == torch.float32
    yield stoker.Finding(
        level="note" if is_slow else "ok",
        topic="torch device",
        message=f"No GPU that torch can use; models run on the CPU, in {name}."
        + (" It has no instructions for bfloat16 (AMX, AVX512-BF16)." if is_slow else ""),
    )
    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=dtype))
    is_packed = pack_linear_layers(layer) == 1
    yield stoker.Finding(
        level="ok" if is_packed else "warning",
        topic="torch kernels",
        message="Linear layers can be packed for this CPU."
        if is_packed
        else "Linear layers cannot be packed for this CPU: steps of few tokens take about twice as long.",
        cure="" if is_packed else "use a build of torch with oneDNN (MKLDNN)",
    )


def _model(model: stoker.LocalModel) -> stoker.Finding:
    try:
        open_checkpoint(model.path, trust_remote_code=False, allow_pickle=False)
    except stoker.StokerError as error:
        return stoker.Finding(level="problem", topic="torch model", message=f"{error}")
    return stoker.Finding(
        level="ok", topic="torch model", message=f"The files of {model.model_id} are complete."
    )
