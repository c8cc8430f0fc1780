"""The block that ``stoker serve`` prints when it is ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.interfaces import RuntimeInfo, ServedModel, ServerContext

__all__ = ["print_banner"]


def print_banner(context: ServerContext, address: str, warm_up: str = "") -> None:
    """Print model, backend, policy, lanes, KV memory and address to standard error.

    Args:
        context: The server.
        address: Where it answers, without ``/v1``.
        warm_up: What is being computed before anybody asks; empty if nothing is.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for served in context.models():
        for name, value in _rows(served):
            table.add_row(name, value)
    scheduler = context.config.scheduler
    table.add_row("policy", f"{scheduler.policy}, {scheduler.max_num_batched_tokens} tokens a step")
    if snapshots := _snapshots(context):
        table.add_row("snapshots", snapshots)
    if warm_up:
        table.add_row("warm-up", warm_up)
    table.add_row("address", f"{address}/v1")
    if not _has_keys(context.config):
        table.add_row("access", "no API keys: whoever reaches the address may use it")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(table)


def _snapshots(context: ServerContext) -> str:
    """Where evicted KV goes, of each model that has such a place."""
    found = []
    for served in context.models():
        store = context.cache(served.model_id).store
        if store is not None:
            tiers = [f"{_size(tier.capacity_bytes)} {name}" for name, tier in store.tiers.items()]
            held = sum(tier.num_entries for tier in store.tiers.values())
            found.append(f"{', '.join(tiers)} ({held} found)" if held else ", ".join(tiers))
    return "; ".join(found)


def _has_keys(config: Config) -> bool:
    server = config.server
    files = server.api_keys_file or server.tenant_keys_file
    return bool(server.api_keys or files or any(tenant.keys for tenant in config.tenants))


def _rows(served: ServedModel) -> list[tuple[str, str]]:
    info = served.info
    shown = dict(info.settings)
    profile = shown.pop("profile", "")
    settings = ", ".join(f"{name} {value}" for name, value in shown.items())
    tuned = [("profile", f"{profile}; stoker tune --show")] if profile else []
    return [
        ("model", f"{served.model_id} ({info.name}, {_size(info.weights_bytes)})"),
        ("backend", f"{served.backend} on {info.device}" + (f" ({settings})" if settings else "")),
        *_memory(info),
        *tuned,
    ]


def _memory(info: RuntimeInfo) -> list[tuple[str, str]]:
    """What it has room for: texts to go on with, or to embed."""
    if info.capabilities.generates:
        return [
            ("lanes", f"{info.num_lanes} of {info.context_length} tokens"),
            ("KV memory", f"{_size(info.kv_bytes)} for {info.kv_capacity_tokens} tokens"),
        ]
    vectors = f", {info.embedding.width} numbers each" if info.embedding is not None else ""
    return [("embeds", f"texts of up to {info.context_length} tokens{vectors}; writes none")]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
