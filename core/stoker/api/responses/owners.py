"""Which process works on a response: whether it still does, when another one looks."""

import psutil

__all__ = ["is_alive", "this_process"]


def this_process() -> str:
    """What tells this process from others, also later ones of the same number."""
    process = psutil.Process()
    return f"{process.pid}:{process.create_time():.2f}"


def is_alive(owner: str) -> bool:
    """Whether the process of that name still runs."""
    pid, _, created = owner.partition(":")
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 1.0
    except (psutil.Error, ValueError):
        return False
