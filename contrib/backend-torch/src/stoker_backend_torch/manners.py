"""Keeps transformers and its friends quiet: what they say goes to our log, and their bars become lines."""

from __future__ import annotations

import contextlib
import logging
import time
import warnings
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["progress", "quiet"]

logger = logging.getLogger("stoker.backend.torch")

_PERIOD_S = 2.0  # between lines of progress


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what transformers and its friends say to our log, at ``DEBUG``, and nothing to the terminal."""
    theirs = [logging.getLogger(name) for name in ("transformers", "torchao", "torch")]
    forward = _Forward()
    before = [(log, log.handlers, log.propagate) for log in theirs]
    for log in theirs:
        log.handlers, log.propagate = [forward], False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for log, handlers, propagate in before:
                log.handlers, log.propagate = handlers, propagate
            for warning in caught:
                logger.debug("%s", warning.message)


class _Forward(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logger.debug("%s: %s", record.name, " ".join(record.getMessage().split()))


@contextlib.contextmanager
def progress(name: str) -> Iterator[None]:
    """Log lines instead of transformers' progress bars."""

    def count(_factory: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        return _Progress(name, arguments[0] if arguments else options.get("iterable"))

    # Heavy, and there only by now. The second knows no hook.
    from transformers import modeling_gguf_pytorch_utils as gguf  # noqa: PLC0415 - heavy
    from transformers.utils import logging as theirs  # noqa: PLC0415 - heavy

    gguf_bar, gguf.tqdm = gguf.tqdm, lambda *items, **options: count(None, items, options)
    before = theirs.set_tqdm_hook(count)
    try:
        yield
    finally:
        theirs.set_tqdm_hook(before)
        gguf.tqdm = gguf_bar


class _Progress:
    """Iterates like tqdm's bars, and logs now and then how far it is."""

    def __init__(self, name: str, items: Any) -> None:
        self._name = name
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        total = len(self._items) if hasattr(self._items, "__len__") else 0
        due_s = time.monotonic() + _PERIOD_S
        for done, item in enumerate(self._items, 1):
            yield item
            if total and time.monotonic() >= due_s:
                due_s = time.monotonic() + _PERIOD_S
                logger.info("loading the weights of %s: %d %%", self._name, 100 * done // total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __getattr__(self, _name: str) -> Any:  # whatever else a bar can do has no effect
        return lambda *_arguments, **_options: None
