"""A runtime that is deterministic, exact and nearly free: what the engine is tested and measured with.

It is a model of a kind: the next token is a hash of everything in the lane's KV, so that a wrong position, a
mixed-up lane, a stale prefix or a lost token changes the text from there on. Tokens are bytes and a few
control tokens; it writes lower-case letters and spaces. With a ``period`` it repeats what is there, as models
that copy do: what speculative decoding is tested with.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stoker.interfaces import (
    Backend,
    Capabilities,
    EmbeddingInfo,
    LoadSettings,
    ModelSource,
    Runtime,
    RuntimeInfo,
    Tokenizer,
    Tunable,
    TunableValue,
)
from stoker.testing.reference_sampling import reference_sample
from stoker.testing.scripted_options import ScriptedOptions
from stoker.types import DeviceStepOutput, LocalModel, SampleInput, StepInput, StepOutput

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "ScriptedBackend",
    "ScriptedRuntime",
    "ScriptedSource",
    "ScriptedTokenizer",
]

_SPECIAL = {
    "<|begin|>": 256,
    "<|end|>": 257,
    "<|user|>": 258,
    "<|assistant|>": 259,
    "<|system|>": 260,
}
_END = _SPECIAL["<|end|>"]
_BEGIN, _END_TEXT = "<|begin|>", "<|end|>"
_VOCABULARY = 261
_EMBEDDING_WIDTH = 32
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The bytes it writes: hash -> letter. Some are spaces, so that text looks like words.
_LETTERS = np.frombuffer(b"etaoin shrdlu cmfwyp vbgkjq xz etaoin shrdlu", np.uint8).astype(np.int64)
_CONTROL = re.compile("(" + "|".join(map(re.escape, _SPECIAL)) + ")")
_MULTIPLIER = np.uint64(6364136223846793005)  # Knuth's MMIX linear congruential generator
_INCREMENT = np.uint64(1442695040888963407)
_WHOLE_BLOCK = 1 << 20  # above every token id
_MASK64 = (1 << 64) - 1
_SLOWNESS = {"plain": 1.0, "slow": 2.0, "wide": 0.5, "blurred": 0.25, "broken": 1.0}


class ScriptedTokenizer(Tokenizer):
    """Bytes, and control tokens such as ``<|user|>``."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The control tokens."""
        return _SPECIAL

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """One token per byte, or per control token where those are parsed."""
        tokens = [_SPECIAL["<|begin|>"]] if add_special else []
        if not parse_special:
            return tokens + list(text.encode())
        for part in _CONTROL.split(text):
            if part in _SPECIAL:
                tokens.append(_SPECIAL[part])
            else:
                tokens += part.encode()
        return tokens

    def token_bytes(self, token_id: int) -> bytes:
        """The byte; nothing for a control token."""
        return bytes((token_id,)) if token_id < 256 else b""


class ScriptedRuntime(Runtime):
    """The scripted model.

    Args:
        lanes: Sequences at once.
        context_length: Tokens of one lane.
        max_step_tokens: Tokens of one step.
        options: See ``ScriptedOptions``.

    Attributes:
        before_step: Called with every step's input first; may raise, to play a failing runtime.
        num_steps: Steps computed so far.
        before_embed: Called with every piece of inputs that is embedded, as ``before_step`` is.
        num_fetched_rows: With ``samples``, rows of logits that were asked for so far.
    """

    def __init__(
        self,
        *,
        lanes: int = 8,
        context_length: int = 4096,
        max_step_tokens: int = 512,
        options: ScriptedOptions | None = None,
    ) -> None:
        self.options = options = options or ScriptedOptions()
        if not options.generates:
            lanes, context_length = 0, options.max_input_tokens or context_length
        capacity = (options.kv_capacity_tokens or lanes * context_length) if lanes else 0
        self.info = RuntimeInfo(
            name="scripted",
            vocab_size=_VOCABULARY,
            context_length=context_length,
            num_lanes=lanes,
            kv_capacity_tokens=capacity,
            max_step_tokens=max_step_tokens,
            end_token_ids=frozenset({_END}),
            chat_template=_TEMPLATE,
            bos_token=_BEGIN,
            eos_token=_END_TEXT,
            capabilities=Capabilities(
                generates=options.generates,
                truncation="reset" if options.truncation == "reset" else "any",
                copy_prefix=options.copy_prefix,
                snapshot=options.snapshot,
                exact_block=options.exact_block,
                exact_from=options.exact_from,
                exact_tail=options.exact_tail,
                embed=options.embed,
                samples=options.samples,
            ),
            embedding=EmbeddingInfo(
                width=_EMBEDDING_WIDTH,
                max_input_tokens=options.max_input_tokens or context_length,
                pooling="mean",
                max_inputs=16,
                truncatable=options.matryoshka,
            )
            if options.embed
            else None,
            settings={"kind": "deterministic test model"}
            | ({"kernel": options.kernel} if options.kernel != "plain" else {}),
        )
        self.tokenizer = ScriptedTokenizer()
        self.before_step: Callable[[StepInput], None] | None = None
        self.before_embed: Callable[[Sequence[Sequence[int]]], None] | None = None
        self.num_steps = 0
        self.num_fetched_rows = 0
        self._latest = np.empty((0, _VOCABULARY), np.float32)
        # KV: for each lane, the hash of its first n tokens at [lane, n].
        self._states = np.zeros((lanes, context_length + 1), np.uint64)
        self._lengths = np.zeros(lanes, np.int64)
        # With a period, also the tokens themselves.
        self._tokens = np.zeros((lanes, context_length if options.period else 0), np.int64)
        self._one_hot = np.eye(_VOCABULARY, dtype=np.float32) * 8.0
        if options.kernel == "blurred":
            self._one_hot *= 0.5
        self._slowness = _SLOWNESS[options.kernel]

    def step(self, step: StepInput) -> StepOutput:
        """Hash on; logits are 8 for the next token and 0 for all others.

        Raises:
            TypeError: It only embeds; the core should have known.
        """
        if not self.info.capabilities.generates:
            raise TypeError(f"{self.info.name} only embeds")
        if self.before_step is not None:
            self.before_step(step)
        options = self.options
        if options.kernel == "broken":
            os.kill(os.getpid(), signal.SIGSEGV)
        if options.step_s or options.token_s:
            seconds = options.step_s + options.token_s * len(step.token_ids)
            time.sleep(seconds * self._slowness)
        if not self._has_room(step):
            return StepOutput(np.empty((0, _VOCABULARY), np.float32), no_room=True)
        self.num_steps += 1
        states = self._advance(step)[step.wants_logits]
        logits = self.make_logits(states, self._next_tokens(states, self._earlier(step)))
        if not options.samples:
            return StepOutput(logits)
        self._latest = logits
        return DeviceStepOutput(self._fetch)

    def make_logits(
        self, states: NDArray[np.uint64], tokens: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """The rows of a step; for models that say something else after the same text.

        Args:
            states: ``uint64[R]``, the hash of all that is in the lane.
            tokens: ``int64[R]``, the next tokens of the scripted model.

        Returns:
            ``float32[R, vocab]``.
        """
        return self._one_hot[tokens]

    def sample(self, batch: SampleInput) -> NDArray[np.int64]:
        """With ``samples``: draw tokens from the latest step's logits."""
        if not self.info.capabilities.samples:
            super().sample(batch)
        return reference_sample(self._latest, batch)

    def _fetch(self, rows: NDArray[np.intp] | None) -> NDArray[np.float32]:
        logits = self._latest if rows is None else self._latest[rows]
        self.num_fetched_rows += len(logits)
        return logits

    def _has_room(self, step: StepInput) -> bool:
        if np.any(step.positions >= self.info.context_length):
            return False
        return int(self._lengths.sum()) + len(step.token_ids) <= self.info.kv_capacity_tokens

    def _earlier(self, step: StepInput) -> NDArray[np.int64] | None:
        """For each row of logits the token one period before the next one; -1 if there is none."""
        if not self.options.period:
            return None
        self._tokens[step.lanes, step.positions] = step.token_ids
        rows = step.wants_logits
        at = step.positions[rows].astype(np.int64) + 1 - self.options.period
        earlier: NDArray[np.int64] = self._tokens[step.lanes[rows], np.maximum(at, 0)]
        return np.where(at >= 0, earlier, -1)

    def _advance(self, step: StepInput) -> NDArray[np.uint64]:
        """Put the tokens into KV; returns the hash after each, ``uint64[T]``."""
        lanes, positions = step.lanes, step.positions
        if len(np.unique(lanes)) == len(lanes):  # one token a lane: all at once
            self._check_positions(lanes, positions)
            after = _mix(self._states[lanes, positions], step.token_ids)
            self._states[lanes, positions + 1] = after
            self._lengths[lanes] += 1
            return after
        after = np.empty(len(lanes), np.uint64)
        borders = [0, *(np.flatnonzero(np.diff(lanes)) + 1).tolist(), len(lanes)]
        for start, end in itertools.pairwise(borders):
            lane, first = int(lanes[start]), int(positions[start])
            starts = positions[start:end] - np.arange(end - start, dtype=np.int32)
            self._check_positions(lanes[start:end], starts.astype(np.int32))
            state = int(self._states[lane, first])
            kind = self._kind(first, end - start)
            for row, token in enumerate(step.token_ids[start:end].tolist(), start):
                state = _mix_one(state, token ^ kind)
                after[row] = state
            self._states[lane, first + 1 : first + 1 + end - start] = after[start:end]
            self._lengths[lane] += end - start
        return after

    def _kind(self, first: int, length: int) -> int:
        """What a piece's place and length do to its tokens' KV: nothing if it is shorter than a block."""
        block = self.options.exact_block
        if block == 1 or length < (block if self.options.exact_tail == "any" else 2):
            return 0
        if first % block == 0 and length % block == 0:
            return _WHOLE_BLOCK
        return (
            _WHOLE_BLOCK << 1 | first << 32 | length << 48
        )  # as many kinds as there are such pieces

    def _check_positions(self, lanes: NDArray[np.int32], positions: NDArray[np.int32]) -> None:
        if not np.array_equal(self._lengths[lanes], positions):
            raise ValueError(
                f"positions {positions.tolist()} do not continue lanes {lanes.tolist()}, "
                f"which hold {self._lengths[lanes].tolist()} tokens"
            )

    def _next_tokens(
        self, states: NDArray[np.uint64], earlier: NDArray[np.int64] | None
    ) -> NDArray[np.int64]:
        high = (states >> np.uint64(33)).astype(np.int64)
        tokens = _LETTERS[high % len(_LETTERS)]
        if earlier is not None:
            every = self.options.surprise_every
            repeats = high // 7 % every != 0 if every else True
            tokens = np.where((earlier >= 0) & repeats, earlier, tokens)
        if self.options.end_every:
            tokens = np.where(high // 64 % self.options.end_every == 0, _END, tokens)
        return tokens

    def truncate(self, lane: int, num_tokens: int) -> int:
        """Forget what follows the first ``num_tokens`` tokens."""
        length = int(self._lengths[lane])
        keep = min(num_tokens, length)
        if keep != length and self.info.capabilities.truncation == "reset":
            keep = 0
        self._lengths[lane] = keep
        return keep

    def copy_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the hashes."""
        self._states[target, : num_tokens + 1] = self._states[source, : num_tokens + 1]
        if self.options.period:
            self._tokens[target, :num_tokens] = self._tokens[source, :num_tokens]
        self._lengths[target] = num_tokens

    def snapshot(self, lane: int) -> bytes:
        """The hashes."""
        return self._states[lane, : self._lengths[lane] + 1].tobytes()

    def restore(self, lane: int, snapshot: bytes) -> int:
        """Put them back."""
        states = np.frombuffer(snapshot, np.uint64)
        self._states[lane, : len(states)] = states
        self._lengths[lane] = len(states) - 1
        return len(states) - 1

    def embed(self, inputs: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """See ``expected_vector``."""
        if not self.info.capabilities.embed:
            return super().embed(inputs)
        return np.stack([self.expected_vector(tokens) for tokens in inputs])

    def embed_in_pieces(
        self, inputs: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[NDArray[np.float32] | None]:
        """The same, with the pauses of a model that takes ``step_s`` and ``token_s`` for each piece."""
        left = sum(map(len, inputs))
        while left > 0:
            piece = min(left, max(1, max_tokens))
            left -= piece
            if self.before_embed is not None:
                self.before_embed(inputs)
            if self.options.step_s or self.options.token_s:
                time.sleep(self.options.step_s + self.options.token_s * piece)
            if left:
                yield None
        yield self.embed(inputs)

    def expected_vector(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """What this model makes of an input, ``float32[32]``: how often tokens occur, and a bit of hash.

        The hash tells apart what has the same tokens in another order.
        """
        counts = np.bincount(np.asarray(tokens) % _EMBEDDING_WIDTH, minlength=_EMBEDDING_WIDTH)
        bits = np.uint64(self.state_after(list(tokens), 0)) >> np.arange(
            _EMBEDDING_WIDTH, dtype=np.uint64
        )
        return (counts / len(tokens) + 0.01 * (bits & np.uint64(1))).astype(np.float32)

    def close(self) -> None:
        """Nothing to free."""

    def expected_text(self, prompt: list[int], num_tokens: int) -> str:
        """What this model writes after a prompt: the truth that tests compare with."""
        block = self.options.exact_block
        has_blocks = block > 1 and len(prompt) >= self.options.exact_from
        least_tail = 2 if self.options.exact_tail == "whole" else 0
        in_blocks = max(0, len(prompt) - least_tail) // block * block if has_blocks else 0
        tail = self._kind(in_blocks, len(prompt) - in_blocks) if least_tail else 0
        state = np.array([self.state_after(prompt, in_blocks, tail)], np.uint64)
        period, text = self.options.period, list(prompt)
        for _ in range(num_tokens):
            before = text[-period] if 0 < period <= len(text) else -1
            earlier = np.array([before]) if period else None
            token = int(self._next_tokens(state, earlier)[0])
            if token == _END:
                break
            text.append(token)
            state = _mix(state, token)
        return self.tokenizer.decode(text[len(prompt) :])

    @staticmethod
    def state_after(tokens: list[int], num_in_blocks: int, others: int = 0) -> int:
        """What a lane holds after tokens, the first ones computed as whole blocks, the others of a kind."""
        state = 0
        for at, token in enumerate(tokens):
            state = _mix_one(state, token ^ (_WHOLE_BLOCK if at < num_in_blocks else others))
        return state


def _mix(states: NDArray[np.uint64], tokens: NDArray[np.int32] | int) -> NDArray[np.uint64]:
    mixed: NDArray[np.uint64] = (states ^ np.asarray(tokens).astype(np.uint64)) * _MULTIPLIER
    return (mixed + _INCREMENT) ^ (mixed >> np.uint64(29))


def _mix_one(state: int, token: int) -> int:
    """The same for one state, in plain integers: quicker where each needs the one before."""
    mixed = (state ^ token) * int(_MULTIPLIER) & _MASK64
    return (mixed + int(_INCREMENT) & _MASK64) ^ (mixed >> 29)


class ScriptedSource(ModelSource):
    """``scripted:NAME``: there is no file behind it."""

    def resolve(self, reference: str, *, progress: bool = False) -> LocalModel:
        """The scripted model, under the name that follows the scheme."""
        name = reference or "scripted"
        return LocalModel(path=Path(name), model_id=name, reference=f"scripted:{reference}")


class ScriptedBackend(Backend):
    """Serves the scripted model, whatever file it is given."""

    def accepts(self, model: LocalModel) -> bool:
        """What comes from ``scripted:``; other models only if the backend is asked for by name."""
        return model.reference.startswith("scripted:")

    def load(self, model: LocalModel, settings: LoadSettings) -> ScriptedRuntime:
        """Make one."""
        return ScriptedRuntime(
            lanes=settings.lanes or 8,
            context_length=settings.context_length or 4096,
            max_step_tokens=settings.max_step_tokens,
            options=settings.options,
        )

    def tunables(self, model: LocalModel) -> Sequence[Tunable]:
        """Its kernels, of which one is the best: what a tuner has to find."""
        return [
            Tunable(
                name="kernel",
                summary="How the test model computes",
                values=[
                    TunableValue(label=name, options={"kernel": name})
                    for name in ("plain", "slow", "broken", "blurred", "wide")
                ],
                default="plain",
                changes_quality=True,
            )
        ]
