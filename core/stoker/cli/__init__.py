"""The command line: ``stoker``."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 is success, 1 a failure at run time, 2 a usage or configuration error.
    """
    from stoker.cli.root import run

    return run(argv)
