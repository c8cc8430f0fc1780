"""The bodies of ``/v1/embeddings`` and ``/v1/rerank``."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = [
    "Embedding",
    "EmbeddingList",
    "EmbeddingRequest",
    "EmbeddingUsage",
    "Rerank",
    "RerankDocument",
    "RerankRequest",
    "RerankResult",
]

_INT32 = 2**31 - 1

PositiveInt = Annotated[int, Meta(ge=1, le=_INT32)]


class _Embedding(msgspec.Struct, kw_only=True):
    """What requests that embed share; ``null`` means the default.

    Attributes:
        model: A served model's id; by default the first served model.
        priority: Lower runs first.
        timeout: Give up after so many seconds.
    """

    model: str | None = None
    priority: Annotated[int, Meta(ge=-_INT32, le=_INT32)] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None


NonEmpty = Annotated[str, Meta(extra_json_schema={"minLength": 1})]


class EmbeddingRequest(_Embedding, kw_only=True):
    """The body of ``POST /v1/embeddings``.

    Attributes:
        input: Text, token ids, or a list of up to 2048 of either: one vector for each.
        encoding_format: ``float``: a list of numbers. ``base64``: the same as little-endian float32.
        dimensions: Numbers of each vector, for models whose vectors may be cut; by default all.
        user: Who asks, in your own words: for the log.
    """

    input: Annotated[
        NonEmpty
        | Annotated[list[NonEmpty | int | list[int]], Meta(extra_json_schema={"minItems": 1})],
        Meta(examples=["Hello"]),
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: PositiveInt | None = None
    user: str | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """The vector of one input: of length 1; a list of numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct, kw_only=True):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/embeddings``, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class RerankDocument(msgspec.Struct, kw_only=True):
    """A document."""

    text: str


class RerankRequest(_Embedding, kw_only=True):
    """The body of ``POST /v1/rerank``.

    Attributes:
        query: What the documents should be about.
        documents: Up to 2047 texts, or objects with a ``text``.
        top_n: How many of the best to answer with; by default all.
        return_documents: Whether results hold their documents; by default they do.
    """

    query: Annotated[NonEmpty, Meta(examples=["Which?"])]
    documents: Annotated[
        list[NonEmpty | RerankDocument], Meta(min_length=1, examples=[["This.", "That."]])
    ]
    top_n: PositiveInt | None = None
    return_documents: bool | None = None


class RerankResult(msgspec.Struct, kw_only=True):
    """A document's place.

    Attributes:
        index: Which document, in the order of the request.
        relevance_score: Cosine of the angle between its vector and the query's, -1 to 1.
        document: The document, if it is wanted.
    """

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class Rerank(msgspec.Struct, kw_only=True):
    """The answer of ``POST /v1/rerank``, the most relevant document first."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    usage: EmbeddingUsage
