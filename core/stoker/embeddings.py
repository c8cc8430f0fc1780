"""From texts to requests that are embedded, and from pooled vectors to embeddings. Executes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stoker.calls import Call, RoutedModel
from stoker.errors import ContextLengthError, InvalidRequestError
from stoker.types import Request

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stoker.config import AdmissionConfig
    from stoker.interfaces import EmbeddingInfo, Tokenizer

__all__ = ["EmbedCall", "Inputs", "check_dimensions", "embedding_request", "unit_vectors"]

Inputs = Sequence[str | list[int]]
"""Texts, or token ids, to embed."""

_OFF_THREAD_CHARS = 20_000  # tokenizing more than this would hold up the event loop


class EmbedCall(Call, kw_only=True):
    """What the API hands over to be embedded.

    Attributes:
        inputs: At least one, none of them empty.
        names: The request field of each input, for error messages: ``input.3``.
        dimensions: Numbers of each vector that are wanted; ``None`` for all.
    """

    inputs: Inputs
    names: Sequence[str]
    dimensions: int | None = None


async def embedding_request(
    routed: RoutedModel, call: EmbedCall, *, priority: int, now_s: float, admission: AdmissionConfig
) -> Request:
    """The request that a call stands for.

    Args:
        routed: Its model.
        call: The call.
        priority: Lower runs first.
        now_s: Its arrival.
        admission: Timeouts.

    Raises:
        InvalidRequestError: The model does not embed, or not so many dimensions; or an input is empty, too
            long, or holds what is not a token.
    """
    embedding = routed.client.embedding
    if embedding is None:
        raise InvalidRequestError(
            f"the model {routed.served.model_id!r} does not make embeddings; use one that does",
            param="model",
            code="embeddings_not_supported",
        )
    check_dimensions(embedding, call.dimensions, routed.served.model_id)
    tokenizer = routed.client.tokenizer
    if sum(len(item) for item in call.inputs if isinstance(item, str)) < _OFF_THREAD_CHARS:
        inputs = _encode(tokenizer, call.inputs)
    else:
        inputs = await asyncio.to_thread(_encode, tokenizer, call.inputs)
    for tokens, item, name in zip(inputs, call.inputs, call.names, strict=True):
        _check_input(tokens, name, embedding.max_input_tokens)
        if not isinstance(item, str):
            _check_vocabulary(tokens, name, routed.client.info.vocab_size)
    timeouts = [t for t in (call.timeout_s, admission.request_timeout_s) if t]
    queue_timeout_s = admission.queue_timeout_s
    return Request(
        request_id=call.request_id,
        model=routed.served.model_id,
        prompt_token_ids=[token for tokens in inputs for token in tokens],
        inputs=inputs,
        sampling=call.sampling,
        priority=priority,
        tenant=call.tenant,
        arrival_s=now_s,
        queue_deadline_s=now_s + queue_timeout_s if queue_timeout_s else None,
        deadline_s=now_s + min(timeouts) if timeouts else None,
        endpoint=call.endpoint,
        headers=call.headers,
        user=call.user,
        metadata={},
        response_headers={},
    )


def _encode(tokenizer: Tokenizer, inputs: Inputs) -> list[list[int]]:
    # What is embedded is mostly others' text: control tokens in it stay text.
    return [
        tokenizer.encode(item, add_special=True, parse_special=False)
        if isinstance(item, str)
        else item
        for item in inputs
    ]


def _check_input(tokens: Sequence[int], name: str, most: int) -> None:
    if not tokens:
        raise InvalidRequestError(f"{name!r} is empty", param=name, code="invalid_value")
    if len(tokens) > most:
        raise ContextLengthError(
            f"{name!r} has {len(tokens)} tokens; this model embeds at most {most} at once; cut it into "
            "pieces",
            param=name,
        )


def _check_vocabulary(tokens: Sequence[int], name: str, vocab_size: int) -> None:
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise InvalidRequestError(
                f"{name!r} holds token id {token}, which is not in the vocabulary of "
                f"{vocab_size} tokens",
                param=name,
                code="invalid_value",
            )


def check_dimensions(embedding: EmbeddingInfo, dimensions: int | None, model: str) -> None:
    """Refuse a number of dimensions that a model's vectors cannot have.

    Raises:
        InvalidRequestError: It is larger than the vectors, or cutting them would leave no embedding.
    """
    if dimensions in {None, embedding.width}:
        return
    if dimensions is not None and dimensions > embedding.width:
        why = f"the vectors of {model!r} have {embedding.width}"
    elif not embedding.truncatable:
        why = (
            f"{model!r} was not trained so that the first numbers of a vector are an embedding by "
            f"themselves (Matryoshka); leave 'dimensions' out, or ask for all {embedding.width}"
        )
    else:
        return
    raise InvalidRequestError(
        f"'dimensions' is {dimensions}, but {why}", param="dimensions", code="invalid_value"
    )


def unit_vectors(pooled: NDArray[Any], dimensions: int | None = None) -> NDArray[np.float32]:
    """Pooled vectors, cut to their first numbers if that is wanted, of length 1.

    Args:
        pooled: ``float32[n, width]``.
        dimensions: How many numbers to keep.

    Returns:
        ``float32[n, dimensions]``; a vector of zeros has no direction and stays as it is.
    """
    kept = np.asarray(pooled, np.float64)[:, :dimensions]  # squares of large numbers need the room
    length = np.linalg.norm(kept, axis=1, keepdims=True)
    return (kept / np.where(length > 0, length, 1.0)).astype(np.float32)
