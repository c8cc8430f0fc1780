"""What a plugin implements, and the descriptors by which it is registered.

Hooks (``stoker.hookspecs``) return descriptors once, at start; from then on the core calls the plain
objects that the descriptors' factories build. Optional methods have bodies, so that a published plugin
survives a new one; what a runtime cannot do is a field of its ``Capabilities``, never an exception.
"""

from __future__ import annotations

from stoker.grammar import Grammar, GrammarSpec, Matcher
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
    GrammarInfo,
    MiddlewareInfo,
    ModelSourceInfo,
    ObserverInfo,
    PolicyInfo,
    RouteInfo,
    ToolFormatInfo,
)
from stoker.interfaces.findings import Finding
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
    EmbeddingInfo,
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
    HttpAnswer,
    LoadSnapshot,
    Middleware,
    ModelSource,
    Observer,
    ServedModel,
    ServerContext,
    TenantLoad,
)
from stoker.interfaces.streams import DeltaStream
from stoker.interfaces.structured import GrammarCompiler, Tool, ToolChoice, ToolFormat
from stoker.pieces import CallPiece, OutputParser, Piece, ReasoningPiece, TextPiece

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
    "CallPiece",
    "Capabilities",
    "CommandInfo",
    "DeltaStream",
    "Descriptor",
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
]
