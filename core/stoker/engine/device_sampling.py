"""Tokens drawn where the logits lie: what of a step the runtime samples, and what comes to the host.

A row of logits is as wide as the vocabulary, and bringing it from a device costs more than drawing from it
there. So a runtime that says so (``Capabilities.samples``) is told how to draw, with the uniform numbers that
the core's own sampler would use, and answers with tokens. Logits are fetched for those who read them:
log-probabilities, scored prompts, drafts, and the samplers that only the host knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.engine import sampler
from stoker.engine.logprobs import NOTHING
from stoker.errors import EngineError
from stoker.types import SampleInput, TokenEdits, TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.logprobs import LogprobTeller
    from stoker.engine.masks import GrammarMasks
    from stoker.engine.plan import Plan
    from stoker.engine.sequence import Sequence
    from stoker.interfaces import Runtime
    from stoker.types import StepOutput

__all__ = ["DeviceSampling", "likeliest_tokens", "sample_input"]

_MOST_TOP_K = (1 << 31) - 1


class DeviceSampling:
    """Samples the steps of one model whose runtime can.

    Args:
        runtime: The model.
        masks: Its grammars' masks.
        logprobs: Tells log-probabilities.
    """

    def __init__(self, runtime: Runtime, masks: GrammarMasks, logprobs: LogprobTeller) -> None:
        self._runtime = runtime
        self._vocab_size = runtime.info.vocab_size
        self._masks = masks
        self._logprobs = logprobs

    @staticmethod
    def takes(plan: Plan) -> bool:
        """Whether a step is for it: drafts and scored prompts need their logits on the host anyway."""
        return not plan.drafts and not plan.num_scored_rows

    def sample(
        self, output: StepOutput, sampled: list[Sequence], plan: Plan
    ) -> tuple[list[list[int]], Mapping[int, list[TokenLogprob]]]:
        """Choose the next token of each sequence.

        Args:
            output: What the runtime made of the step.
            sampled: The sequences, in the order of the rows.
            plan: The step.

        Returns:
            One token for each, ``NOT_FINITE`` as from the core's sampler, and log-probabilities for those who
            ask, by sequence id.

        Raises:
            EngineError: The runtime answered with something else.
        """
        host = [at for at, sequence in enumerate(sampled) if _needs_host(sequence)]
        if not host:
            tokens = self._draw(range(len(sampled)), sampled)
        else:
            tokens = [sampler.NOT_FINITE] * len(sampled)
            on_host = set(host)
            device = [at for at in range(len(sampled)) if at not in on_host]
            if device:
                self._put(tokens, device, self._draw(device, [sampled[at] for at in device]))
            sequences = [sampled[at] for at in host]
            logits = self._masks.apply(self._fetch(output, host), sequences, {})
            self._put(tokens, host, sampler.sample(logits, sequences))
        chosen = [[token] for token in tokens]
        return chosen, self._entries(output, sampled, chosen, plan)

    @staticmethod
    def _put(tokens: list[int], rows: Rows[int], found: Rows[int]) -> None:
        for row, token in zip(rows, found, strict=True):
            tokens[row] = token

    def _entries(
        self, output: StepOutput, sampled: list[Sequence], chosen: list[list[int]], plan: Plan
    ) -> Mapping[int, list[TokenLogprob]]:
        if not self._logprobs.num_asking:
            return NOTHING
        asking = [at for at, s in enumerate(sampled) if s.sampling.logprobs is not None]
        if not asking:
            return NOTHING
        return self._logprobs.of_step(
            self._fetch(output, asking),
            [sampled[at] for at in asking],
            [chosen[at] for at in asking],
            plan,
        )

    def _fetch(self, output: StepOutput, rows: list[int]) -> NDArray[np.float32]:
        logits = output.rows(np.array(rows, np.intp))
        wanted = (len(rows), self._vocab_size)
        if logits.shape != wanted:
            raise EngineError(f"the runtime returned logits of shape {logits.shape}, not {wanted}")
        return logits

    def _draw(self, rows: Rows[int], sequences: list[Sequence]) -> list[int]:
        batch = sample_input(rows, sequences, self._masks)
        edits = (batch.bias, batch.repetition, batch.penalties, batch.forbidden)
        # An index that is out of range can take a whole device down.
        for edit in edits:
            if edit is not None and not (
                edit.tokens.min() >= 0 and edit.tokens.max() < self._vocab_size
            ):
                raise EngineError(
                    f"a request's parameters name a token that the model does not have: its "
                    f"vocabulary has {self._vocab_size}"
                )
        return _checked(self._runtime.sample(batch), len(sequences), self._vocab_size)


def likeliest_tokens(runtime: Runtime, output: StepOutput, num_rows: int) -> list[int]:
    """The likeliest token of each row of a step, drawn where the logits lie.

    Args:
        runtime: What computed the step.
        output: What came of it.
        num_rows: Rows that the step wanted.

    Returns:
        A token for each; any one for a row without a finite maximum.

    Raises:
        EngineError: There are not as many rows, or they do not hold the vocabulary.
    """
    vocab_size = runtime.info.vocab_size
    if runtime.info.capabilities.samples:
        if not num_rows:
            return []
        zeros = np.zeros(num_rows)
        batch = SampleInput(
            rows=np.arange(num_rows, dtype=np.int32),
            temperature=zeros,
            top_k=np.zeros(num_rows, np.int32),
            top_p=np.ones(num_rows),
            min_p=zeros,
            draws=zeros,
        )
        return [max(0, token) for token in _checked(runtime.sample(batch), num_rows, vocab_size)]
    logits, wanted = output.logits, (num_rows, vocab_size)
    if logits.shape != wanted:
        raise EngineError(f"its logits have the shape {logits.shape}, not {wanted}")
    likeliest: list[int] = logits.argmax(axis=1).tolist() if num_rows else []
    return likeliest


def _checked(answer: Any, count: int, vocab_size: int) -> list[int]:
    found = np.asarray(answer)
    if found.shape != (count,) or found.dtype.kind not in "iu":
        raise EngineError(
            f"the runtime drew {found.dtype} of shape {found.shape}, not {count} tokens"
        )
    tokens: list[int] = found.tolist()
    for token in tokens:
        if not sampler.NOT_FINITE <= token < vocab_size:
            raise EngineError(
                f"the runtime drew token {token}, but its vocabulary has {vocab_size}"
            )
    return tokens


def _needs_host(sequence: Sequence) -> bool:
    """Whether a sequence's next token takes a sampler that devices do not have."""
    params = sequence.sampling
    if sequence.rules is not None and sequence.rules.needs_text:
        return True
    if params.temperature == 0.0:
        return False
    return params.typical_p < 1.0 or sampler.excludes_top_choices(sequence)


def sample_input(
    rows: Rows[int], sequences: Rows[Sequence], masks: GrammarMasks | None = None
) -> SampleInput:
    """How to draw the next tokens of sequences.

    Args:
        rows: The row of each among those that the step was to give logits of.
        sequences: N sequences.
        masks: Where to get the masks of those that have a grammar.
    """
    params = [sequence.sampling for sequence in sequences]
    batch = SampleInput(
        rows=np.array(rows, np.int32),
        temperature=np.array([p.temperature for p in params], np.float64),
        top_k=np.array([min(p.top_k, _MOST_TOP_K) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float64),
        draws=np.array(
            [
                sampler.uniform(s.seed, s.num_tokens) if s.sampling.temperature else 0.0
                for s in sequences
            ],
            np.float64,
        ),
    )
    _add_edits(batch, sequences)
    if masks is not None and any(s.request.grammar is not None for s in sequences):
        mask_rows, packed = masks.packed(sequences)
        if mask_rows:
            batch.mask_rows, batch.masks = np.array(mask_rows, np.int32), packed
    return batch


class _EditList:
    """Collects the edits of one kind."""

    __slots__ = ("_rows", "_tokens", "_values")

    def __init__(self) -> None:
        self._rows: list[NDArray[np.int32]] = []
        self._tokens: list[NDArray[np.int64]] = []
        self._values: list[NDArray[np.float32]] = []

    def add(self, row: int, tokens: NDArray[np.int64], values: Any) -> None:
        """Edits of one row; ``values`` is an array, or one for all."""
        if len(tokens):
            self._rows.append(np.full(len(tokens), row, np.int32))
            self._tokens.append(tokens)
            self._values.append(np.broadcast_to(np.asarray(values, np.float32), len(tokens)))

    def whole(self) -> TokenEdits | None:
        """All of them; ``None`` if there are none."""
        if not self._rows:
            return None
        return TokenEdits(
            np.concatenate(self._rows),
            np.concatenate(self._tokens).astype(np.int32),
            np.concatenate(self._values),
        )


def _add_edits(batch: SampleInput, sequences: Rows[Sequence]) -> None:
    lists: tuple[_EditList, _EditList, _EditList, _EditList] | None = None
    for row, sequence in enumerate(sequences):
        params = sequence.sampling
        is_penalized = sampler.is_penalized(params)
        if not (is_penalized or params.logit_bias or sequence.rules is not None):
            continue
        lists = lists or (_EditList(), _EditList(), _EditList(), _EditList())
        bias, repetition, penalties, forbidden = lists
        if params.logit_bias:
            bias.add(row, *sampler.biases(params))
        if is_penalized:
            counts = sampler.counted(sequence)
            if params.repetition_penalty != 1.0:
                repetition.add(row, counts.seen(), params.repetition_penalty)
            if params.presence_penalty or params.frequency_penalty:
                penalties.add(row, *counts.penalties(params))
        if sequence.rules is not None:
            forbidden.add(row, sequence.rules.forbidden(sequence.num_output), 0.0)
    if lists is not None:
        batch.bias, batch.repetition, batch.penalties, batch.forbidden = (
            edits.whole() for edits in lists
        )
