"""What a configuration must satisfy beyond its types: ranges, unique names, tenants that add up."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from stoker.config import Config, TenantConfig
from stoker.errors import ConfigError
from stoker.keys import is_digest, key_owner_problem
from stoker.tenants import EVERYBODY_ELSE, is_tenant_name

__all__ = ["check_config", "tables"]

_WEIGHT = (1e-6, 1e6)
_COUNT = (0, math.inf)

# Least and greatest value of each number. ``math.inf`` means: no upper limit, but finite.
_RANGES: dict[str, tuple[float, float]] = {
    "server.port": (0, 65535),
    "server.max_body_bytes": (1, math.inf),
    "server.body_timeout_s": (0.001, math.inf),
    "server.max_connections": (0, math.inf),
    "server.drain_timeout_s": (0, math.inf),
    "server.reload_s": (0, math.inf),
    "server.max_unread_tokens": (1, math.inf),
    "server.reader_timeout_s": (0.001, math.inf),
    "server.keep_alive_s": (0, math.inf),
    "server.history": _COUNT,
    "server.stalled_after_s": (1, math.inf),
    "models.lanes": (1, math.inf),
    "models.context": (1, math.inf),
    "models.weight": _WEIGHT,
    "scheduler.max_num_batched_tokens": (1, math.inf),
    "scheduler.max_prefill_tokens_while_decoding": (1, math.inf),
    "scheduler.target_step_s": (0, math.inf),
    "admission.max_queue_requests": (1, math.inf),
    "admission.max_queue_tokens": (1, math.inf),
    "admission.max_queue_s": (0, math.inf),
    "admission.queue_timeout_s": (0, math.inf),
    "admission.request_timeout_s": (0, math.inf),
    "admission.max_concurrent_requests": _COUNT,
    "admission.max_n": (1, math.inf),
    "tenants.weight": _WEIGHT,
    "tenants.requests_per_minute": _COUNT,
    "tenants.tokens_per_minute": _COUNT,
    "tenants.tokens_per_day": _COUNT,
    "tenants.max_concurrent_requests": _COUNT,
    "tenants.max_queue_requests": _COUNT,
    "tenants.max_queue_tokens": _COUNT,
    "tenants.reserved_lanes": _COUNT,
    "tenants.reserved_kv": (0, 1),
    "tenants.cache_floor_tokens": _COUNT,
    "cache.ttl_s": (0, math.inf),
    "cache.max_tokens": _COUNT,
    "cache.max_bytes": _COUNT,
    "cache.insert_every": (1, math.inf),
    "cache.host_bytes": _COUNT,
    "cache.disk_bytes": _COUNT,
    "speculation.max_draft_tokens": (1, 64),
    "speculation.min_ngram": (1, 16),
    "speculation.max_ngram": (1, 16),
    "responses.max_responses": _COUNT,
    "responses.max_bytes": (1, math.inf),
    "responses.ttl_s": (1, math.inf),
    "responses.max_background": _COUNT,
    "performance.threads": (1, math.inf),
}
_NOT_EMPTY = (
    *(
        "server.host",
        "models.model",
        "models.id",
        "models.backend",
        "models.draft_model",
        "models.tool_format",
    ),
    "scheduler.policy",
    "cache.eviction",
    "performance.profile",
    "responses.path",
)

_Problem = tuple[str, str]
"""A dotted key and what is wrong with it."""


def check_config(config: Config, origin_of: Callable[[str], str]) -> None:
    """Refuse what the types alone let through.

    Args:
        config: The configuration.
        origin_of: Where a dotted key was read, for the message.

    Raises:
        ConfigError: Names the first key that is wrong, and its origin.
    """
    for dotted, problem in _problems(config):
        raise ConfigError(f"{dotted}: {problem} (from {origin_of(dotted)})")
    if "" in config.server.api_keys:
        raise ConfigError("server.api_keys: a key must not be empty")
    ids = [model.id for model in config.models]
    for index, name in enumerate(ids):
        if name is not None and name in ids[:index]:
            raise ConfigError(f"models[{index}].id: {name!r} is used twice")


def tables(config: Config) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every table of a configuration: its section, its dotted name, and what is in it."""
    for section, content in msgspec.to_builtins(config).items():
        if isinstance(content, list):
            for index, entry in enumerate(content):
                yield section, f"{section}[{index}]", entry
        elif section == "plugins":
            for name, entry in content.items():
                yield section, f"plugins.{name}", entry
        else:
            yield section, section, content


def _problems(config: Config) -> Iterator[_Problem]:
    for section, where, table in tables(config):
        if section == "plugins":
            continue  # what they may be only the plugin knows
        for field, value in table.items():
            problem = _problem(f"{section}.{field}", value)
            if problem:
                yield f"{where}.{field}", problem
    for index, network in enumerate(config.server.trusted_proxies):
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            yield f"server.trusted_proxies[{index}]", f"not an address or a network: {error}"
    speculation = config.speculation
    if speculation.min_ngram > speculation.max_ngram:
        yield (
            "speculation.min_ngram",
            f"{speculation.min_ngram} is more than max_ngram, which is {speculation.max_ngram}",
        )
    yield from _problems_of_tenants(config.tenants)


def _problem(key: str, value: Any) -> str | None:
    if key in _NOT_EMPTY and value == "":
        return "must not be empty"
    if key not in _RANGES or value is None:
        return None
    least, greatest = _RANGES[key]
    if not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if value < least:
        return f"must be at least {least:g}, got {value}"
    if value > greatest:
        return f"must be at most {greatest:g}, got {value}"
    return None


def _problems_of_tenants(tenants: list[TenantConfig]) -> Iterator[_Problem]:
    names: set[str] = set()
    owners: dict[str, str] = {}
    reserved_kv = 0.0
    for index, tenant in enumerate(tenants):
        where = f"tenants[{index}]"
        if tenant.name != EVERYBODY_ELSE and not is_tenant_name(tenant.name):
            yield (
                f"{where}.name",
                (
                    f"{tenant.name!r} is no tenant's name: letters, digits and ._- only, 64 at most "
                    f"(or {EVERYBODY_ELSE!r} for all that have no entry)"
                ),
            )
        if tenant.name in names:
            yield f"{where}.name", f"{tenant.name!r} is used twice"
        names.add(tenant.name)
        if tenant.name == EVERYBODY_ELSE:
            yield from _problems_of_everybody(tenant, where)
        yield from _problems_of_keys(tenant, where, owners)
        reserved_kv += tenant.reserved_kv
        if reserved_kv > 1 + 1e-9:  # shares such as 0.1 do not add up exactly
            yield (
                f"{where}.reserved_kv",
                f"all tenants together reserve {reserved_kv:g} of the KV memory; at most 1 is there",
            )


def _problems_of_everybody(tenant: TenantConfig, where: str) -> Iterator[_Problem]:
    for field in ("keys", "reserved_lanes", "reserved_kv", "cache_floor_tokens"):
        if getattr(tenant, field):
            yield (
                f"{where}.{field}",
                (
                    f"{EVERYBODY_ELSE!r} stands for many tenants and cannot have this; give the one "
                    "that is meant an entry of its own"
                ),
            )


def _problems_of_keys(
    tenant: TenantConfig, where: str, owners: dict[str, str]
) -> Iterator[_Problem]:
    if tenant.keys and (problem := key_owner_problem(tenant.name)):
        yield f"{where}.keys", problem
    for index, digest in enumerate(tenant.keys):
        if not is_digest(digest):  # what it is instead may be a key: it is not shown
            yield (
                f"{where}.keys[{index}]",
                (
                    "must be a key's digest, 'sha256:' and 64 lower-case hex digits, and not the key "
                    f"itself; `stoker keys new {tenant.name}` makes a key and prints its digest"
                ),
            )
        if owners.setdefault(digest, tenant.name) != tenant.name:
            yield f"{where}.keys[{index}]", f"the same key belongs to {owners[digest]!r} already"
