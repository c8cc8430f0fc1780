"""What a backend implements: models that compute lanes and tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from stoker.errors import ModelError
from stoker.interfaces.findings import Finding
from stoker.types import LocalModel, SampleInput, StepInput, StepOutput

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = [
    "Backend",
    "Capabilities",
    "EmbeddingInfo",
    "LoadSettings",
    "Requantization",
    "Runtime",
    "RuntimeInfo",
    "Tokenizer",
    "Tunable",
    "TunableValue",
]


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime can do beyond ``step``.

    Attributes:
        generates: It writes text. If false it only embeds: it has no lanes and no KV memory (``num_lanes``
            and ``kv_capacity_tokens`` are 0), and neither ``step`` nor ``truncate`` is ever called.
        truncation: ``"any"``: ``truncate`` keeps any number of tokens. ``"reset"``: it may keep fewer
            than asked, down to none (recurrent or sliding-window memory).
        copy_prefix: ``copy_prefix`` works.
        snapshot: ``snapshot`` and ``restore`` work.
        embed: ``embed`` works, and ``RuntimeInfo.embedding`` describes it.
        exact_block: Block length B of the promise that a prompt's KV has the same bits however the prompt was
            cut, as long as (1) whole blocks of B tokens, at multiples of B, are computed in chunks that start
            at a multiple of B and are a multiple of B long, and (2) what follows the prompt's last whole
            block, and generated tokens, are computed in pieces shorter than B. 1: any cut will do. 0: nothing
            is promised, since kernels round in other ways for other numbers of rows; prompts are cut at will,
            and a text may turn at a token that is nearly as likely as another.
        exact_from: Prompts of fewer tokens than this have no whole blocks in that sense and are computed in
            pieces shorter than B throughout, so that all of their KV, and that of their answers, is of one
            kind: for runtimes where blocks pay for long prompts only.
        exact_tail: ``"any"``: as above. ``"whole"``: pieces that are no whole blocks differ from each other,
            too, so (2) holds only for what follows a prompt's last whole block as one piece, of 2 to B + 1
            tokens, and for generated tokens one by one.
        shares_kv: ``copy_prefix`` shares memory instead of copying it; a copied token takes no room.
        lane_locality: Steps over neighbouring lanes are quicker than steps over scattered ones.
        samples: ``sample`` works: the logits lie on a device, and tokens are drawn there. ``step`` answers
            with a ``DeviceStepOutput`` then.
    """

    generates: bool = True
    truncation: Literal["any", "reset"] = "any"
    copy_prefix: bool = False
    snapshot: bool = False
    embed: bool = False
    exact_block: int = 1
    exact_from: int = 0
    exact_tail: Literal["any", "whole"] = "any"
    shares_kv: bool = False
    lane_locality: bool = False
    samples: bool = False


class EmbeddingInfo(msgspec.Struct, frozen=True, kw_only=True):
    """How a runtime turns token sequences into vectors.

    Attributes:
        width: Numbers of a vector.
        max_input_tokens: Most tokens of one input.
        pooling: How a vector is made from those of an input's tokens: ``mean``, ``cls`` (the first one's),
            ``last``, or the model's own word. It is the runtime that does it, always in the same way.
        max_inputs: Most inputs of one call.
        truncatable: Whether the first numbers of a vector, brought back to length 1, are an embedding as
            well (Matryoshka representation learning, Kusupati et al. 2022).
    """

    width: int
    max_input_tokens: int
    pooling: str
    max_inputs: int = 64
    truncatable: bool = False


class RuntimeInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The fixed facts of a loaded model.

    Attributes:
        name: The model's own name or architecture, for people.
        vocab_size: Columns of the logits.
        context_length: Most tokens one lane can hold; of a model that only embeds, most of one input.
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
        fingerprint: What else a snapshot depends on, beside the model's files and ``settings``: the version
            of the library that computes it, say.
        embedding: How it embeds, where its capabilities say that it does.
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
    fingerprint: str = ""
    embedding: EmbeddingInfo | None = None


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


def _unable(runtime: Runtime, method: str, capability: str) -> str:
    """Whoever denies a capability is not called, so this one was claimed."""
    lacks = f"{type(runtime).__name__} does not implement {method}()"
    return f"{runtime.info.name} has no capability {capability}: {lacks}"


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
        raise TypeError(_unable(self, "copy_prefix", "copy_prefix"))

    def snapshot(self, lane: int) -> bytes:
        """A lane's KV, to be kept in host memory."""
        raise TypeError(_unable(self, "snapshot", "snapshot"))

    def restore(self, lane: int, snapshot: bytes) -> int:
        """Put a snapshot's KV into a lane; returns its number of tokens."""
        raise TypeError(_unable(self, "restore", "snapshot"))

    def sample(self, batch: SampleInput) -> NDArray[Any]:
        """Draw tokens from the logits of the latest ``step``, where they lie.

        At most one call for each step, and none for a step without wanted rows; not all of them need be
        among the batch's. The logits stay as they are: they may be fetched afterwards. For the engine the
        step is over when this returns.

        Args:
            batch: Rows and parameters; its documentation says what is to be computed.

        Returns:
            ``int64[N]``: a token for each row; -1 for a row without a finite maximum.
        """
        raise TypeError(_unable(self, "sample", "samples"))

    def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[Any]:
        """One vector for each token sequence, pooled as ``RuntimeInfo.embedding`` says.

        The vectors need no particular length: the core brings them to length 1. The lanes are not touched.

        Args:
            inputs: 1 to ``max_inputs`` sequences of 1 to ``max_input_tokens`` tokens.

        Returns:
            ``float32[len(inputs), width]``.
        """
        raise TypeError(_unable(self, "embed", "embed"))

    def embed_in_pieces(
        self, inputs: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[NDArray[Any] | None]:
        """The same, cut into pieces between which the core does other work, such as steps.

        At most one is under way, and it may be closed before its end. Without an implementation of its own a
        runtime embeds in one piece; the core asks for no more than ``max_tokens`` at once anyway, but a
        single input may be longer.

        Args:
            inputs: See ``embed``.
            max_tokens: Most tokens of one piece, as far as the runtime can choose.

        Yields:
            ``None`` after each piece but the last; at last what ``embed`` returns.
        """
        yield self.embed(inputs)


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


class TunableValue(msgspec.Struct, frozen=True, kw_only=True):
    """One value that a ``Tunable`` may have.

    Attributes:
        label: How it is called in tables, e.g. ``"bf16"``.
        options: The backend's options that make it so.
        requires: Where it only works with certain values of other options: option -> those values.
    """

    label: str
    options: Mapping[str, Any] = {}
    requires: Mapping[str, Sequence[Any]] = {}


class Tunable(msgspec.Struct, frozen=True, kw_only=True):
    """Something about a backend that is worth measuring on the user's machine.

    Attributes:
        name: What ``stoker tune --only`` takes.
        summary: One line for people.
        values: What to try, the likeliest gain first; one of them is the default.
        default: The label of the value that is in force when nothing is set.
        group: ``compute``, ``memory`` or ``waiting``; for tables.
        changes_quality: Whether the logits may differ by more than rounding.
        depends_on_company: Whether its worth depends on what else runs on the machine: then it is
            measured alone and beside a busy process.
    """

    name: str
    summary: str
    values: Sequence[TunableValue]
    default: str
    group: str = "compute"
    changes_quality: bool = False
    depends_on_company: bool = False


class Requantization(msgspec.Struct, frozen=True, kw_only=True):
    """What types a model's weights could be turned into.

    Attributes:
        current: The type they have, e.g. ``"q4_1"``.
        types: The types that ``Backend.requantize`` takes.
        lossy_source: Whether they are quantised already, so that turning them loses more than doing so
            from the full weights would.
        hint: One sentence if the current type has no fast kernel on this machine and others have; else
            empty.
        faster: Those others, the one that loses least first.
    """

    current: str
    types: Sequence[str]
    lossy_source: bool = False
    hint: str = ""
    faster: Sequence[str] = ()


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

    def tunables(self, model: LocalModel) -> Sequence[Tunable]:
        """What of this backend's options ``stoker tune`` should measure for a model on this machine."""
        return ()

    def versions(self) -> Mapping[str, str]:
        """What a measurement depends on besides machine and model: ``{"llama-cpp-python": "0.3.36"}``."""
        return {}

    def diagnose(self, models: Sequence[LocalModel]) -> Sequence[Finding]:
        """What ``stoker doctor`` should say about this backend on this machine.

        Its library and how that was built, GPUs, a self-test. Called in a process of its own, which may take
        a minute or two: whatever kills it becomes a finding.

        Args:
            models: The configured models, or the default one, as far as they are on the disk and this backend
                loads them.
        """
        return ()

    def requantization(self, model: LocalModel) -> Requantization | None:
        """What types the model's weights could be turned into; ``None`` if into no other."""
        return None

    def requantize(self, model: LocalModel, type_name: str, target: Path) -> None:
        """Write the model to ``target`` with weights of another type.

        Args:
            model: What to read.
            type_name: One of ``Requantization.types``.
            target: The file to write; it is overwritten.

        Raises:
            ModelError: It cannot be done; one clear line.
        """
        raise ModelError(f"{model.path}: this backend cannot write models of other types")
