"""What a plugin implements, and the descriptors by which it is registered.

Hooks (``stoker.hookspecs``) return descriptors once, at start; from then on the core calls the plain
objects that the descriptors' factories build. Optional methods have bodies, so that a published plugin
survives a new one; what a runtime cannot do is a field of its ``Capabilities``, never an exception.
"""

from __future__ import annotations

from stoker.interfaces.caching import (
    CacheEntry,
    CacheReport,
    CacheStats,
    Eviction,
    EvictionStrategy,
    SnapshotStore,
    StoredPrefix,
    StoreStats,
    TierUsage,
)
from stoker.interfaces.descriptors import (
    API_VERSION,
    BackendInfo,
    CommandInfo,
    Descriptor,
    EvictionInfo,
    MiddlewareInfo,
    ModelSourceInfo,
    ObserverInfo,
    PolicyInfo,
    RouteInfo,
)
from stoker.interfaces.policies import (
    MAX_DEFERRED,
    MAX_PASSED,
    MAX_VIEWS,
    PolicyContext,
    SchedulingPolicy,
    StepCost,
    TenantShare,
)
from stoker.interfaces.runtimes import (
    Backend,
    Capabilities,
    LoadSettings,
    Requantization,
    Runtime,
    RuntimeInfo,
    Tokenizer,
    Tunable,
    TunableValue,
)
from stoker.interfaces.serving import (
    EngineSnapshot,
    LoadSnapshot,
    Middleware,
    ModelSource,
    Observer,
    ServedModel,
    ServerContext,
    TenantLoad,
)
from stoker.interfaces.streams import DeltaStream

__all__ = [
    "API_VERSION",
    "MAX_DEFERRED",
    "MAX_PASSED",
    "MAX_VIEWS",
    "Backend",
    "BackendInfo",
    "CacheEntry",
    "CacheReport",
    "CacheStats",
    "Capabilities",
    "CommandInfo",
    "DeltaStream",
    "Descriptor",
    "EngineSnapshot",
    "Eviction",
    "EvictionInfo",
    "EvictionStrategy",
    "LoadSettings",
    "LoadSnapshot",
    "Middleware",
    "MiddlewareInfo",
    "ModelSource",
    "ModelSourceInfo",
    "Observer",
    "ObserverInfo",
    "PolicyContext",
    "PolicyInfo",
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
    "TierUsage",
    "Tokenizer",
    "Tunable",
    "TunableValue",
]
