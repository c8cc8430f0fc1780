"""A smaller model of the same vocabulary guesses tokens for a larger one.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (ICML 2023), with greedy drafts,
and batched: each sequence of the target has a lane in the draft model, too, and all that want a draft get
their tokens in common steps. What the target rejected is truncated, what the draft model has not seen yet is
caught up on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np

from stoker.engine.device_sampling import likeliest_tokens
from stoker.engine.drafters import Drafter
from stoker.engine.prefix_tree import common_prefix
from stoker.engine.sequence import NO_LANE
from stoker.errors import EngineError, ModelError
from stoker.types import StepInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.sequence import Sequence
    from stoker.interfaces import Runtime, Tokenizer

__all__ = ["DraftModelDrafter", "check_draft_model"]

_MAX_CATCH_UP = 256  # tokens of a catch-up step: the streams that run wait for it
_COST_RATE = 0.2  # how far one step moves what is believed of its cost
_NUM_SAMPLES = 256  # tokens that are compared, spread over the vocabulary
_OUTLIER = 4.0  # a step that takes more than so many times as long as they do counts as that many


class _Mirror:
    """A sequence's lane in the draft model, and the tokens whose KV it holds."""

    __slots__ = ("lane", "length", "sequence", "tokens")

    def __init__(self, sequence: Sequence, lane: int, context_length: int) -> None:
        self.sequence = sequence
        self.lane = lane
        self.length = 0
        self.tokens = np.empty(min(context_length, len(sequence.tokens)), np.int32)


class DraftModelDrafter(Drafter):
    """Drafts with a second runtime; on the thread of the loop that drives the target's.

    Args:
        runtime: The draft model. Nobody else may use it; who loaded it closes it.
        clock: Monotonic seconds.
    """

    def __init__(self, runtime: Runtime, clock: Callable[[], float]) -> None:
        self._runtime = runtime
        self._clock = clock
        info = runtime.info
        self._context_length = info.context_length
        self._max_step_tokens = info.max_step_tokens
        self._mirrors: dict[int, _Mirror] = {}
        self._free = list(range(info.num_lanes))[::-1]
        self._max_mirrors = info.num_lanes

    def propose(
        self, sequences: Rows[Sequence], limits: Mapping[int, int]
    ) -> dict[int, NDArray[np.int32]]:
        """What the draft model would say, greedily; nothing yet for those it is still catching up on."""
        self._release_lost()
        wanted: dict[int, int] = {}
        for sequence in sequences:
            key = sequence.sequence_id
            room = self._context_length - sequence.num_tokens
            if min(limits[key], room) > 0 and self._follow(sequence):
                wanted[key] = min(limits[key], room)
        drafts: dict[int, list[int]] = {key: [] for key in wanted}
        ready = self._catch_up(drafts)
        while ready:
            ready = [key for key in ready if len(drafts[key]) < wanted[key]]
            if not ready or not self._extend(ready, drafts):
                break
        return {key: np.array(draft, np.int32) for key, draft in drafts.items() if draft}

    def forget(self, sequence_id: int) -> None:
        """Free the lane of a sequence that has ended."""
        mirror = self._mirrors.pop(sequence_id, None)
        if mirror is not None:
            self._free.append(mirror.lane)
            self._truncate(mirror, 0)

    # ------------------------------------------------------------------ lanes

    def _release_lost(self) -> None:
        """Free the lanes of sequences that were preempted."""
        for key, mirror in list(self._mirrors.items()):
            if mirror.sequence.lane == NO_LANE:
                self.forget(key)

    def _follow(self, sequence: Sequence) -> bool:
        """Give a sequence a lane, if there is one, and take out of it what is not its text any more."""
        mirror = self._mirrors.get(sequence.sequence_id)
        if mirror is None:
            if not self._free or len(self._mirrors) >= self._max_mirrors:
                return False
            mirror = _Mirror(sequence, self._free.pop(), self._context_length)
            self._mirrors[sequence.sequence_id] = mirror
        # The last token must be computed in any case: its logits are wanted.
        shared = common_prefix(
            mirror.tokens[: mirror.length], sequence.tokens[: sequence.num_tokens - 1]
        )
        if shared < mirror.length:
            self._truncate(mirror, shared)
        return True

    def _truncate(self, mirror: _Mirror, num_tokens: int) -> None:
        kept = int(self._runtime.truncate(mirror.lane, num_tokens))
        if kept != num_tokens:
            raise EngineError(f"truncate({mirror.lane}, {num_tokens}) kept {kept} tokens")
        mirror.length = kept

    # ------------------------------------------------------------------ steps

    def _catch_up(self, drafts: dict[int, list[int]]) -> list[int]:
        """Compute tokens that the lanes have not seen, those with the fewest first.

        Returns:
            The sequences that are up to date now and have the first token of their draft.
        """
        behind = [self._mirrors[key] for key in drafts]
        behind.sort(key=lambda m: m.sequence.num_tokens - m.length)
        budget = min(self._max_step_tokens, max(_MAX_CATCH_UP, len(behind)))
        runs: list[tuple[_Mirror, NDArray[np.int32]]] = []
        ready: list[int] = []
        for mirror in behind:
            sequence = mirror.sequence
            count = min(budget, sequence.num_tokens - mirror.length)
            if count <= 0:
                break
            budget -= count
            end = mirror.length + count
            runs.append((mirror, sequence.tokens[mirror.length : end]))
            if end == sequence.num_tokens:
                ready.append(sequence.sequence_id)
        done = bool(runs) and self._step(runs, ready, drafts)
        return ready if done else []

    def _extend(self, ready: list[int], drafts: dict[int, list[int]]) -> bool:
        """One more token for each of these sequences; returns whether there was room."""
        runs = [(self._mirrors[key], np.array(drafts[key][-1:], np.int32)) for key in ready]
        return self._step(runs, ready, drafts)

    def _step(
        self,
        runs: list[tuple[_Mirror, NDArray[np.int32]]],
        ready: list[int],
        drafts: dict[int, list[int]],
    ) -> bool:
        """Compute tokens of several lanes, and add the likeliest next token where that is wanted."""
        runs = sorted(runs, key=lambda run: run[0].lane)  # runtimes batch neighbours best
        step = _step_input(runs, set(ready))
        started_s = self._clock()
        output = self._runtime.step(step)
        if output.no_room:
            self._shrink()
            return False
        likeliest = iter(likeliest_tokens(self._runtime, output, len(ready)))
        if len(step.token_ids) <= 2 * len(runs):  # a step as they are when all are up to date
            self._learn_cost(self._clock() - started_s)
        for mirror, tokens in runs:
            end = mirror.length + len(tokens)
            mirror.tokens[mirror.length : end] = tokens
            mirror.length = end
            if mirror.sequence.sequence_id in ready:
                drafts[mirror.sequence.sequence_id].append(next(likeliest))
        return True

    def _learn_cost(self, seconds: float) -> None:
        if not self.depth_s:
            self.depth_s = seconds
            return
        self.depth_s += _COST_RATE * (min(seconds, _OUTLIER * self.depth_s) - self.depth_s)

    def _shrink(self) -> None:
        """The KV memory is full: follow fewer sequences from now on.

        Raises:
            EngineError: It cannot even hold one.
        """
        if len(self._mirrors) <= 1:
            raise EngineError("the draft model's KV memory cannot hold a single sequence")
        self._max_mirrors = len(self._mirrors) - 1
        longest = max(self._mirrors.values(), key=lambda mirror: mirror.length)
        self.forget(longest.sequence.sequence_id)


def _step_input(runs: list[tuple[_Mirror, NDArray[np.int32]]], ready: set[int]) -> StepInput:
    counts = [len(tokens) for _, tokens in runs]
    ends = np.cumsum(counts)
    wants_logits = np.zeros(int(ends[-1]), np.bool_)
    wants_logits[ends - 1] = [mirror.sequence.sequence_id in ready for mirror, _ in runs]
    return StepInput(
        np.concatenate([tokens for _, tokens in runs]),
        np.concatenate([np.arange(m.length, m.length + len(t), dtype=np.int32) for m, t in runs]),
        np.repeat(np.array([mirror.lane for mirror, _ in runs], np.int32), counts),
        wants_logits,
    )


def check_draft_model(target: Runtime, draft: Runtime, target_name: str, draft_name: str) -> None:
    """Refuse a draft model that does not fit its target.

    Args:
        target: The model that is served.
        draft: The one that is to guess for it.
        target_name: What the target is called in the error.
        draft_name: What the draft model is called there.

    Raises:
        ModelError: They have different vocabularies, or one of them cannot take tokens back, or only embeds.
    """
    pair = f"the draft model {draft_name} does not fit {target_name}"
    for name, runtime in ((target_name, target), (draft_name, draft)):
        if not runtime.info.capabilities.generates:
            raise ModelError(f"{pair}: {name} only embeds; leave models.draft_model out")
    sizes = draft.info.vocab_size, target.info.vocab_size
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{pair}: it has {sizes[0]} tokens, the model {sizes[1]}; choose one of the same family"
        )
    token = _first_difference(target.tokenizer, draft.tokenizer, sizes[1])
    if token is not None:
        raise ModelError(
            f"{pair}: token {token} is {_shown(draft.tokenizer, token)} in one and "
            f"{_shown(target.tokenizer, token)} in the other; choose one of the same family"
        )
    for name, runtime in ((target_name, target), (draft_name, draft)):
        if runtime.info.capabilities.truncation != "any":
            raise ModelError(
                f"{pair}: {name} cannot take single tokens back out of its memory, as speculative "
                "decoding needs it; leave models.draft_model out"
            )


def _first_difference(target: Tokenizer, draft: Tokenizer, vocab_size: int) -> int | None:
    """A special token or a sample token that the two do not agree on; ``None`` if they agree on all."""
    ours, theirs = target.special_tokens, draft.special_tokens
    if dict(ours) != dict(theirs):
        odd = set(ours.items()) ^ set(theirs.items())
        return min(token for _, token in odd)
    samples = np.linspace(0, vocab_size - 1, min(vocab_size, _NUM_SAMPLES)).astype(int)
    for token in map(int, samples):
        if target.token_bytes(token) != draft.token_bytes(token):
            return token
    return None


def _shown(tokenizer: Tokenizer, token: int) -> str:
    names = [name for name, special in tokenizer.special_tokens.items() if special == token]
    return repr(names[0]) if names else repr(tokenizer.token_bytes(token))
