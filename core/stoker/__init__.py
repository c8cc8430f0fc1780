"""stoker: local-first, plugin-based LLM serving.

This module holds the names a plugin author may import. It imports neither the engine nor the API:
names are resolved on first use, so ``import stoker`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stoker.config import TenantConfig as TenantConfig
    from stoker.errors import *  # noqa: F403
    from stoker.hookspecs import hookimpl as hookimpl
    from stoker.interfaces import *  # noqa: F403
    from stoker.types import *  # noqa: F403

__version__ = "0.1.0"

_HOMES = {
    "stoker.hookspecs": ("hookimpl",),
    "stoker.interfaces": (
        "API_VERSION",
        "MAX_DEFERRED",
        "MAX_PASSED",
        "MAX_VIEWS",
        "Backend",
        "BackendInfo",
        "CacheEntry",
        "CacheReport",
        "CacheStats",
        "CallPiece",
        "Capabilities",
        "CommandInfo",
        "DeltaStream",
        "EmbeddingInfo",
        "EngineSnapshot",
        "Eviction",
        "EvictionInfo",
        "EvictionStrategy",
        "Finding",
        "Grammar",
        "GrammarCompiler",
        "GrammarInfo",
        "GrammarSpec",
        "HttpAnswer",
        "LoadSettings",
        "LoadSnapshot",
        "Matcher",
        "Middleware",
        "MiddlewareInfo",
        "ModelSource",
        "ModelSourceInfo",
        "Observer",
        "ObserverInfo",
        "OutputParser",
        "Piece",
        "PolicyContext",
        "PolicyInfo",
        "ReasoningPiece",
        "Requantization",
        "RouteInfo",
        "Runtime",
        "RuntimeInfo",
        "SchedulingPolicy",
        "ServedModel",
        "ServerContext",
        "SnapshotStore",
        "StepCost",
        "StoreStats",
        "StoredPrefix",
        "TenantLoad",
        "TenantShare",
        "TextPiece",
        "TierUsage",
        "Tokenizer",
        "Tool",
        "ToolChoice",
        "ToolFormat",
        "ToolFormatInfo",
        "Tunable",
        "TunableValue",
    ),
    "stoker.types": (
        "Delta",
        "DeviceStepOutput",
        "FinishReason",
        "LocalModel",
        "Preemption",
        "Request",
        "RequestRecord",
        "SampleInput",
        "SamplingParams",
        "ScheduledTokens",
        "SequenceTrace",
        "SequenceView",
        "StepInput",
        "StepOutput",
        "StepRecord",
        "TokenEdits",
        "TokenLogprob",
        "Usage",
    ),
    "stoker.config": ("TenantConfig",),
    "stoker.errors": (
        "AuthenticationError",
        "ConfigError",
        "ContextLengthError",
        "DeadlineError",
        "EngineError",
        "InvalidRequestError",
        "ModelError",
        "ModelNotFoundError",
        "OutOfMemoryError",
        "PermissionDeniedError",
        "PluginConflictError",
        "PluginContractError",
        "PluginError",
        "PluginLoadError",
        "RateLimitError",
        "RequestCancelledError",
        "RequestError",
        "RequestNotFoundError",
        "RequestTooLargeError",
        "SlowReaderError",
        "StokerError",
        "UnavailableError",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'stoker' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
