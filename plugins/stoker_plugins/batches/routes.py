"""Puts the parts together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stoker import ServerContext
from stoker_plugins.batches.archive import Archive
from stoker_plugins.batches.batch_routes import batch_routes
from stoker_plugins.batches.file_routes import file_routes
from stoker_plugins.batches.options import BatchesOptions
from stoker_plugins.batches.runner import BatchRunner

__all__ = ["make_routes"]


def make_routes(context: ServerContext, options: BatchesOptions | None = None) -> Sequence[Any]:
    """The handlers of files and batches, and the service that runs batches.

    Args:
        context: The server.
        options: ``[plugins.batches]``.
    """
    options = options or BatchesOptions()
    archive = Archive(options)
    runner = BatchRunner(context, archive, options)
    context.while_serving(runner.service)
    return [
        *file_routes(context, archive, options),
        *batch_routes(context, archive, runner, options),
    ]
