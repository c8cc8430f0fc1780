"""What makes two requests the same, and which requests have the same answer every time."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import msgspec

from stoker import InvalidRequestError, Request, ServedModel

__all__ = ["CACHE_HEADER", "IRRELEVANT", "directives_of", "is_repeatable", "request_key"]

CACHE_HEADER = "x-stoker-cache"
"""On a request: ``no-cache`` or ``no-store``. On an answer: ``hit``, ``miss``, ``joined`` or ``skip``."""

IRRELEVANT = frozenset(
    {
        *("request_id", "priority", "arrival_s", "queue_deadline_s", "deadline_s"),
        *("headers", "metadata", "response_headers", "user"),
        "tenant",  # hashed by itself where tenants are kept apart
        "predicted_token_ids",  # only how soon it comes depends on it
    }
)
"""Fields of ``Request`` that do not change its answer. All others are hashed, those of later versions too."""

_DIRECTIVES = frozenset({"no-cache", "no-store"})
_encoder = msgspec.json.Encoder(order="deterministic")


def is_repeatable(request: Request) -> bool:
    """Whether the same request should get the same answer again: greedy, or drawn with its own seed.

    What tells more than its text is not kept, so who wants to know more has it computed.
    """
    sampling = request.sampling
    wants_more = (
        sampling.logprobs is not None
        or sampling.prompt_logprobs is not None
        or request.wants_token_ids
        or request.wants_progress
    )
    return not wants_more and (sampling.temperature == 0 or sampling.seed is not None)


def request_key(request: Request, served: ServedModel, *, per_tenant: bool) -> bytes:
    """A digest that requests share if they have the same answer by right.

    Args:
        request: As the engine would get it.
        served: The model that is loaded under its ``model``.
        per_tenant: Whether tenants are kept apart.

    Raises:
        TypeError: A field holds what cannot be compared.
    """
    fields: dict[str, Any] = {
        name: value
        for name, value in msgspec.structs.asdict(request).items()
        if name not in IRRELEVANT
    }
    if request.grammar is not None:
        fields["grammar"] = request.grammar.spec
    # Whatever sequence of integers a middleware made of it, equal ones must look equal.
    tokens = array("q", fields.pop("prompt_token_ids"))
    identity: list[Any] = [served.reference, served.backend, served.created, served.size_bytes]
    tenant = request.tenant if per_tenant else None
    rest = msgspec.to_builtins([identity, tenant, fields, len(tokens)], str_keys=True)
    return hashlib.blake2b(_encoder.encode(rest) + tokens.tobytes(), digest_size=32).digest()


def directives_of(request: Request) -> frozenset[str]:
    """What a request's own ``x-stoker-cache`` header says.

    Raises:
        InvalidRequestError: It says something else.
    """
    header = request.headers.get(CACHE_HEADER)
    if header is None:
        return frozenset()
    said = frozenset(part.strip().lower() for part in header.split(",") if part.strip())
    if unknown := sorted(said - _DIRECTIVES):
        raise InvalidRequestError(
            f"the header {CACHE_HEADER} says {unknown[0][:64]!r}; it may say no-cache or no-store",
            param=CACHE_HEADER,
            code="invalid_header",
        )
    return said
