"""Does the model still say the same? Its next-token distributions over a text, against a reference's.

The measure is the Kullback-Leibler divergence of the reference from the candidate, sum over tokens of
p_ref * (log p_ref - log p_cand), at each position of the text: what llama.cpp's ``perplexity
--kl-divergence`` prints for quantised weights. Unlike perplexity it does not need the text to be a good one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker import StepInput
from stoker_plugins.tune.messages import Quality

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker import Runtime

__all__ = ["compare", "distributions", "num_positions"]

_CHUNK = 64  # tokens of a step: what follows reads KV that was stored, as decoding does
_MAX_POSITIONS = 384
_MAX_BYTES = 128 * 2**20  # of distributions


def num_positions(vocab_size: int, num_tokens: int, context_length: int) -> int:
    """How many positions to look at: as many as the text, the context and the memory have."""
    return max(
        1, min(_MAX_POSITIONS, num_tokens, context_length - 1, _MAX_BYTES // (4 * vocab_size))
    )


def distributions(runtime: Runtime, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Log-probabilities of the next token after each position of a text, ``float32[T, vocab]``.

    Lane 0 of the runtime is used, and left empty.

    Raises:
        RuntimeError: The KV memory has no room for the text, or logits are no numbers.
    """
    runtime.truncate(0, 0)
    count = len(tokens)
    found = np.empty((count, runtime.info.vocab_size), np.float32)
    chunk = min(_CHUNK, runtime.info.max_step_tokens)
    for start in range(0, count, chunk):
        end = min(start + chunk, count)
        step = StepInput(
            token_ids=np.asarray(tokens[start:end], np.int32),
            positions=np.arange(start, end, dtype=np.int32),
            lanes=np.zeros(end - start, np.int32),
            wants_logits=np.ones(end - start, np.bool_),
        )
        output = runtime.step(step)
        if output.no_room:
            raise RuntimeError(f"there is no room for a text of {count} tokens")
        found[start:end] = _log_softmax(output.logits)
    runtime.truncate(0, 0)
    if not np.isfinite(found.max(axis=1)).all():
        raise RuntimeError("the logits are no numbers")
    return found


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[Any]:
    shifted: NDArray[Any] = logits - logits.max(axis=1, keepdims=True)
    total: NDArray[Any] = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def compare(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> Quality:
    """How far ``candidate`` is from ``reference``, both ``float32[T, vocab]`` of log-probabilities.

    Raises:
        ValueError: They are of different shapes.
    """
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: {reference.shape} and {candidate.shape}")
    divergences = np.empty(len(reference), np.float64)
    same = 0
    for row, (wanted, got) in enumerate(zip(reference, candidate, strict=True)):
        expected = wanted.astype(np.float64)
        weights = np.exp(expected)
        possible = weights > 0  # where the reference says "never", the candidate may say anything
        terms = weights[possible] * (expected[possible] - got[possible])
        divergences[row] = max(0.0, float(terms.sum()))
        same += int(wanted.argmax() == got.argmax())
    return Quality(
        kl_mean=float(divergences.mean()),
        kl_max=float(divergences.max()),
        top1=same / len(reference),
        positions=len(reference),
    )
