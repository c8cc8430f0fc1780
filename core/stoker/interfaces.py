"""What a plugin implements, and the descriptors by which it is registered.

Hooks (``stoker.hookspecs``) return descriptors once, at start; from then on the core calls the plain
objects that the descriptors' factories build. Optional methods have bodies, so that a published plugin
survives a new one; what a runtime cannot do is a field of its ``Capabilities``, never an exception.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from stoker.config import Config
from stoker.types import (
    LocalModel,
    Request,
    RequestRecord,
    SequenceView,
    StepInput,
    StepOutput,
    StepRecord,
)

if TYPE_CHECKING:
    import click
    from numpy.typing import NDArray

__all__ = [
    "API_VERSION",
    "Backend",
    "BackendInfo",
    "Capabilities",
    "CommandInfo",
    "Descriptor",
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
    "RouteInfo",
    "Runtime",
    "RuntimeInfo",
    "SchedulingPolicy",
    "ServedModel",
    "ServerContext",
    "Tokenizer",
]

API_VERSION = 1
"""The plugin API that this stoker speaks. A plugin states the one it was written for."""


# --------------------------------------------------------------------------- runtimes


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime can do beyond ``step``.

    Attributes:
        truncation: ``"any"``: ``truncate`` keeps any number of tokens. ``"reset"``: it may keep fewer
            than asked, down to none (recurrent or sliding-window memory).
        copy_prefix: ``copy_prefix`` works.
        snapshot: ``snapshot`` and ``restore`` work.
        embed: ``embed`` works.
        lane_locality: Steps over neighbouring lanes are quicker than steps over scattered ones.
    """

    truncation: Literal["any", "reset"] = "any"
    copy_prefix: bool = False
    snapshot: bool = False
    embed: bool = False
    lane_locality: bool = False


class RuntimeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The fixed facts of a loaded model.

    Attributes:
        name: The model's own name or architecture, for people.
        vocab_size: Columns of the logits.
        context_length: Most tokens one lane can hold.
        num_lanes: How many sequences can hold KV at once.
        kv_capacity_tokens: Most tokens all lanes together can hold.
        max_step_tokens: Most tokens of one ``StepInput``.
        end_token_ids: Tokens that end a generation.
        chat_template: The model's Jinja chat template; ``None`` if it has none.
        bos_token: Text of the beginning-of-sequence token, for templates; may be empty.
        eos_token: Text of the end-of-sequence token, for templates; may be empty.
        device: Runtimes of one device are driven by one thread, in turn.
        weights_bytes: Size of the weights in memory.
        kv_bytes: Size of the KV memory.
        capabilities: What it can do beyond ``step``.
        settings: The effective settings, for the start-up block: ``{"threads": "2"}``.
        warnings: What the user should know, in full sentences.
    """

    name: str
    vocab_size: int
    context_length: int
    num_lanes: int
    kv_capacity_tokens: int
    max_step_tokens: int
    end_token_ids: frozenset[int]
    chat_template: str | None = None
    bos_token: str = ""
    eos_token: str = ""
    device: str = "cpu"
    weights_bytes: int = 0
    kv_bytes: int = 0
    capabilities: Capabilities = Capabilities()
    settings: Mapping[str, str] = {}
    warnings: Sequence[str] = ()


class Tokenizer(ABC):
    """Text to token ids and back. Called from several threads: keep it free of shared state."""

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text (``"<|im_start|>" -> 1``): what user text must not become."""

    @abstractmethod
    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: Any text.
            add_special: Add the tokens the model wants around a text (BOS, ...).
            parse_special: Turn the text of control tokens into those tokens; if false it stays text.
        """

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds to the output; empty for control tokens."""

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ``token_ids``; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")


class Runtime(ABC):
    """A loaded model that computes: lanes (one KV sequence each) and tokens, nothing else.

    All methods but the tokenizer's are called from one thread.
    """

    info: RuntimeInfo
    tokenizer: Tokenizer

    @abstractmethod
    def step(self, step: StepInput) -> StepOutput:
        """Compute one ragged forward pass.

        If the KV memory cannot hold it, answer ``no_room`` and change nothing. An exception means the
        lanes of this step are in an unknown state; the core truncates them to what it knows and goes on.
        """

    @abstractmethod
    def truncate(self, lane: int, num_tokens: int) -> int:
        """Keep the first ``num_tokens`` tokens of a lane's KV and free the rest.

        Returns:
            How many were kept: ``num_tokens``, or fewer where ``truncation`` is ``"reset"``.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything. May be called twice."""

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Make the first ``num_tokens`` tokens of ``source``'s KV the whole of ``target``'s."""
        raise TypeError(f"{self.info.name} has no capability copy_prefix")

    def snapshot(self, lane: int) -> bytes:
        """A lane's KV, to be kept in host memory."""
        raise TypeError(f"{self.info.name} has no capability snapshot")

    def restore(self, lane: int, snapshot: bytes) -> int:
        """Put a snapshot's KV into a lane; returns its number of tokens."""
        raise TypeError(f"{self.info.name} has no capability snapshot")

    def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[Any]:
        """``float32[len(inputs), width]``, one vector for each token sequence."""
        raise TypeError(f"{self.info.name} has no capability embed")


class LoadSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to load a model; ``None`` means: choose something sane and say so in ``RuntimeInfo.settings``.

    Attributes:
        lanes: How many sequences may hold KV at once.
        context_length: Most tokens of one lane.
        threads: Compute threads.
        max_step_tokens: Most tokens the core will put into one step.
        options: The backend's own options, an instance of ``BackendInfo.options``.
    """

    lanes: int | None = None
    context_length: int | None = None
    threads: int | None = None
    max_step_tokens: int = 512
    options: Any = None


class Backend(ABC):
    """Turns a model on disk into a ``Runtime``."""

    @abstractmethod
    def accepts(self, model: LocalModel) -> bool:
        """Whether this backend can probably load it: a look at names and magic bytes, no more."""

    @abstractmethod
    def load(self, model: LocalModel, settings: LoadSettings) -> Runtime:
        """Load it.

        Raises:
            ModelError: One clear line: truncated, of the wrong format, of an unknown architecture, ...
            OutOfMemoryError: It does not fit.
        """


# --------------------------------------------------------------------------- policies


class PolicyContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a policy may know beyond the sequences.

    Attributes:
        now_s: The clock the sequences' ``arrival_s`` was taken from.
        model: The served model's id.
        num_lanes: Lanes of the runtime.
        num_free_lanes: Lanes that no running sequence holds.
        token_budget: Most tokens of the step that is being planned.
    """

    now_s: float
    model: str
    num_lanes: int
    num_free_lanes: int
    token_budget: int


class SchedulingPolicy(ABC):
    """Decides order. It never allocates: the core validates every ordering and does the rest.

    A method that raises or returns nonsense costs a counter and falls back to arrival order.
    """

    @abstractmethod
    def admission_order(
        self, waiting: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """The waiting sequences, next to be admitted first. A permutation of ``waiting``."""

    def preemption_order(
        self, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """The running sequences, first to lose its lane first, when KV memory runs out.

        A permutation of ``running``. By default the latest arrival goes first.
        """
        return sorted(running, key=lambda view: (view.arrival_s, view.sequence_id), reverse=True)

    def victims(
        self, candidate: SequenceView, running: Sequence[SequenceView], context: PolicyContext
    ) -> Sequence[SequenceView]:
        """Running sequences that may lose their lane so that ``candidate`` gets one, best victim first.

        Asked when no lane is free. By default nobody is preempted for a newcomer.
        """
        return ()

    def prefill_shares(
        self, prefilling: Sequence[SequenceView], budget: int, context: PolicyContext
    ) -> Mapping[int, int] | None:
        """Tokens of this step's prefill budget for each ``sequence_id``; ``None`` shares evenly."""
        return None

    def on_step(self, record: StepRecord) -> None:
        """Account for a step, after it ran."""


# --------------------------------------------------------------------------- around the path


class LoadSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """How busy a model is.

    Attributes:
        num_running: Sequences that hold a lane.
        num_waiting: Sequences in the queue.
        waiting_tokens: Prompt tokens plus requested tokens in the queue.
        tokens_per_s: Tokens computed per second, lately; 0 if unknown.
        kv_tokens_used: KV tokens of running sequences.
        kv_tokens_retained: KV tokens that idle lanes keep for reuse.
        kv_tokens_capacity: KV tokens the runtime can hold.
    """

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    tokens_per_s: float = 0.0
    kv_tokens_used: int = 0
    kv_tokens_retained: int = 0
    kv_tokens_capacity: int = 0


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model that this server serves."""

    model_id: str
    reference: str
    backend: str
    created: int
    size_bytes: int
    info: RuntimeInfo


class ServerContext(ABC):
    """What routes, middleware and start/stop hooks may ask of the running server."""

    config: Config
    observers: Mapping[str, Observer]

    @abstractmethod
    def models(self) -> Sequence[ServedModel]:
        """The models served, in configured order."""

    @abstractmethod
    def load(self, model: str) -> LoadSnapshot:
        """How busy a model is."""

    @property
    @abstractmethod
    def uptime_s(self) -> float:
        """Seconds since the server was assembled."""


class Middleware(ABC):
    """Sees every request before the engine does: admission control and request transforms."""

    async def on_request(self, request: Request) -> Request:
        """Return the request, edited or not; raise a ``RequestError`` to refuse it."""
        return request

    async def on_finish(self, request: Request, records: Sequence[RequestRecord]) -> None:
        """Called once when a request that ``on_request`` let pass is over, however it ended.

        ``records`` has one entry for each sequence; none if another middleware refused the request.
        """


class Observer(ABC):
    """Told what happened, once per step and once per finished sequence, on the loop's thread: be quick."""

    def on_step(self, record: StepRecord) -> None:
        """A step ran."""

    def on_finish(self, record: RequestRecord) -> None:
        """A sequence ended."""


class ModelSource(ABC):
    """Finds models by reference: a scheme and what follows it (``hf:owner/repo``)."""

    @abstractmethod
    def resolve(self, reference: str, *, progress: bool = False) -> LocalModel:
        """The model on disk, fetched if need be.

        Args:
            reference: What follows ``scheme:``.
            progress: Whether to draw a progress bar on standard error.

        Raises:
            ModelError: It is not there; the message says what to do.
        """

    def available(self) -> Sequence[LocalModel]:
        """Models of this source that are on this machine already."""
        return ()


# --------------------------------------------------------------------------- descriptors


class Descriptor(msgspec.Struct, frozen=True, kw_only=True):
    """What every descriptor has.

    Attributes:
        api_version: The plugin API it was written for; a stoker that speaks another one refuses it.
        name: How configuration calls it; unique among its kind.
        summary: One line for ``stoker plugins``.
        options: Struct type of its ``[plugins.<name>]`` section; ``None`` if it takes no options.
    """

    api_version: int
    name: str
    summary: str
    options: type[msgspec.Struct] | None = None


class BackendInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``Backend``. The factory imports what is heavy."""

    factory: Callable[[], Backend]


class PolicyInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``SchedulingPolicy``; one instance is built per model.

    The factory is called with an instance of ``options`` if there is such a type, else with nothing.
    """

    factory: Callable[..., SchedulingPolicy]


class MiddlewareInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``Middleware``; called ``factory(context)`` or ``factory(context, options)``."""

    factory: Callable[..., Middleware]
    active_by_default: bool = False
    order: int = 100
    """Lower sees a request earlier."""


class ObserverInfo(Descriptor, frozen=True, kw_only=True):
    """Registers an ``Observer``; called ``factory()`` or ``factory(options)``."""

    factory: Callable[..., Observer]
    active_by_default: bool = False


class ModelSourceInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a ``ModelSource``; ``name`` is its scheme."""

    factory: Callable[[], ModelSource]


class RouteInfo(Descriptor, frozen=True, kw_only=True):
    """Registers HTTP routes; called ``factory(context)`` or ``factory(context, options)``.

    The factory returns Litestar route handlers.
    """

    factory: Callable[..., Sequence[Any]]
    active_by_default: bool = False


class CommandInfo(Descriptor, frozen=True, kw_only=True):
    """Registers a subcommand of ``stoker``; the factory builds the click command when it is run."""

    factory: Callable[[], click.Command]
