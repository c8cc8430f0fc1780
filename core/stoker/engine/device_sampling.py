"""Tokens drawn where the logits lie: what of a step the runtime samples, and what comes to the host.

A row of logits is as wide as the vocabulary, and bringing it from a device costs more than drawing from it
there. So a runtime that says so (``Capabilities.samples``) is told how to draw, with the uniform numbers that
the core's own sampler would use, and answers with tokens. Logits are fetched for those who read them:
log-probabilities, scored prompts, and the samplers that only the host knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.engine import sampler
from stoker.engine.logprobs import NOTHING
from stoker.engine.sample_inputs import sample_input
from stoker.errors import EngineError
from stoker.types import SampleInput, TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.engine.logprobs import LogprobTeller
    from stoker.engine.masks import GrammarMasks
    from stoker.engine.plan import Plan
    from stoker.engine.sequence import Sequence
    from stoker.interfaces import Runtime
    from stoker.types import StepOutput

__all__ = ["DeviceSampling", "likeliest_tokens"]


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

    def sample(
        self, output: StepOutput, sampled: list[Sequence], plan: Plan
    ) -> tuple[list[list[int]], Mapping[int, list[TokenLogprob]]]:
        """Choose the next tokens of each sequence.

        Args:
            output: What the runtime made of the step.
            sampled: The sequences, in the order of the rows.
            plan: The step; it scores no prompts.

        Returns:
            As from the core's sampler: one token for each, or as many as its draft is right and one more, the
            last perhaps ``NOT_FINITE``; and log-probabilities for those who ask, by sequence id.

        Raises:
            EngineError: The runtime answered with something else.
        """
        drafts = plan.drafts
        spans = _spans(sampled, drafts)
        host = [at for at, s in enumerate(sampled) if _needs_host(s, has_draft=len(spans[at]) > 1)]
        if not host:
            chosen = self._draw(sampled, spans, drafts)
        else:
            chosen = [[sampler.NOT_FINITE]] * len(sampled)
            logits = self._fetch(output, [spans[at] for at in host])
            sequences = [sampled[at] for at in host]
            logits = self._masks.apply(logits, sequences, drafts)
            found = sampler.verify(logits, sequences, drafts)
            device = sorted(set(range(len(sampled))) - set(host))
            if device:
                sequences = [sampled[at] for at in device]
                found += self._draw(sequences, [spans[at] for at in device], drafts)
            for at, tokens in zip(host + device, found, strict=True):
                chosen[at] = tokens
        return chosen, self._entries(output, sampled, spans, chosen, plan)

    def _entries(
        self,
        output: StepOutput,
        sampled: list[Sequence],
        spans: list[range],
        chosen: list[list[int]],
        plan: Plan,
    ) -> Mapping[int, list[TokenLogprob]]:
        if not self._logprobs.num_asking:
            return NOTHING
        asking = [at for at, s in enumerate(sampled) if s.sampling.logprobs is not None]
        if not asking:
            return NOTHING
        return self._logprobs.of_step(
            self._fetch(output, [spans[at] for at in asking]),
            [sampled[at] for at in asking],
            [chosen[at] for at in asking],
            plan,
        )

    def _fetch(self, output: StepOutput, spans: list[range]) -> NDArray[np.float32]:
        rows = [row for span in spans for row in span]
        logits = output.rows(np.array(rows, np.intp))
        wanted = (len(rows), self._vocab_size)
        if logits.shape != wanted:
            raise EngineError(f"the runtime returned logits of shape {logits.shape}, not {wanted}")
        return logits

    def _draw(
        self,
        sequences: list[Sequence],
        spans: list[range],
        drafts: Mapping[int, NDArray[np.int32]],
    ) -> list[list[int]]:
        """The tokens of sequences whose rows do not depend on each other's tokens."""
        if not drafts:
            tokens = self._draw_rows(sample_input([s.start for s in spans], sequences, self._masks))
            return [[token] for token in tokens]
        rows = [row for span in spans for row in span]
        owners = [s for s, span in zip(sequences, spans, strict=True) for _ in span]
        batch = sample_input(rows, owners, self._masks)
        ahead = [row - span.start for span in spans for row in span]
        for at, (owner, offset) in enumerate(zip(owners, ahead, strict=True)):
            if offset and owner.sampling.temperature:
                batch.draws[at] = sampler.uniform(owner.seed, owner.num_tokens + offset)
        drawn = iter(self._draw_rows(batch))
        chosen: list[list[int]] = []
        for sequence, span in zip(sequences, spans, strict=True):
            found = [next(drawn) for _ in span]
            draft = drafts.get(sequence.sequence_id)
            chosen.append(sampler.accepted(found, () if draft is None else draft.tolist()))
        return chosen

    def _draw_rows(self, batch: SampleInput) -> list[int]:
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
        return _checked(self._runtime.sample(batch), len(batch.rows), self._vocab_size)


def _spans(sampled: list[Sequence], drafts: Mapping[int, NDArray[np.int32]]) -> list[range]:
    """The rows of each sequence: one, and one more for each token of its draft."""
    if not drafts:
        return [range(row, row + 1) for row in range(len(sampled))]
    spans: list[range] = []
    start = 0
    for sequence in sampled:
        end = start + 1 + len(drafts.get(sequence.sequence_id, ()))
        spans.append(range(start, end))
        start = end
    return spans


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


def _needs_host(sequence: Sequence, *, has_draft: bool) -> bool:
    """Whether a sequence's next tokens take what devices do not do.

    Those are samplers that only the core has, and, with a draft, all that depends on the tokens before: then
    a row's logits are changed by what was drawn from the row before.
    """
    params, rules = sequence.sampling, sequence.rules
    if rules is not None and (rules.needs_text or has_draft):
        return True
    if has_draft and (sampler.is_penalized(params) or sequence.request.grammar is not None):
        return True
    if params.temperature == 0.0:
        return False
    if params.typical_p < 1.0:
        return True
    if has_draft:
        return params.xtc_probability > 0.0
    return sampler.excludes_top_choices(sequence)
