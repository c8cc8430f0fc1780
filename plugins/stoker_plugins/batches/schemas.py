"""The bodies of ``/v1/files`` and ``/v1/batches``, field by field as OpenAI has them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = [
    "Batch",
    "BatchEndpoint",
    "BatchError",
    "BatchErrors",
    "BatchInputDetails",
    "BatchList",
    "BatchOutputDetails",
    "BatchRequestCounts",
    "BatchStatus",
    "BatchUsage",
    "CreateBatch",
    "DeletedFile",
    "FileExpiration",
    "FileList",
    "FileObject",
]

BatchEndpoint = Literal[
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"
]
BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]


class FileExpiration(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """When a file is deleted.

    Attributes:
        anchor: What the time counts from: the file's creation.
        seconds: How long it is kept: an hour to 30 days.
    """

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=3600, le=2_592_000)]


class FileObject(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A file."""

    id: str
    object: Literal["file"] = msgspec.field(default_factory=lambda: "file")
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = msgspec.field(default_factory=lambda: "processed")
    expires_at: int | None = None


class FileList(msgspec.Struct, kw_only=True):
    """A page of files; the ids are empty if there are none."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str
    last_id: str
    has_more: bool


class DeletedFile(msgspec.Struct, kw_only=True):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class CreateBatch(msgspec.Struct, kw_only=True):
    """The body of ``POST /v1/batches``.

    Attributes:
        input_file_id: An uploaded file, one request a line.
        endpoint: Where all of its requests go.
        completion_window: What is not done in this time expires.
        metadata: Up to 16 pairs of the client's own.
        output_expires_after: When the files that the batch writes are deleted.
    """

    input_file_id: str
    endpoint: BatchEndpoint
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: FileExpiration | None = None


class BatchError(msgspec.Struct, kw_only=True):
    """What is wrong with an input file.

    Attributes:
        code: For programs.
        message: For people.
        param: The field of the line that is wrong.
        line: The line, from 1.
    """

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(msgspec.Struct, kw_only=True):
    """Everything that is wrong with an input file, or the beginning of it."""

    object: Literal["list"] = "list"
    data: list[BatchError]


class BatchRequestCounts(msgspec.Struct, kw_only=True):
    """How many requests a batch has, and how many of them are done."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchInputDetails(msgspec.Struct, kw_only=True):
    """Of the input tokens, those that did not have to be computed."""

    cached_tokens: int = 0


class BatchOutputDetails(msgspec.Struct, kw_only=True):
    """Of the output tokens, those that are reasoning."""

    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, kw_only=True):
    """Tokens of all answers of a batch."""

    input_tokens: int = 0
    input_tokens_details: BatchInputDetails = msgspec.field(default_factory=BatchInputDetails)
    output_tokens: int = 0
    output_tokens_details: BatchOutputDetails = msgspec.field(default_factory=BatchOutputDetails)
    total_tokens: int = 0


class Batch(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A batch; times are seconds since 1970, and what is not known yet is left out."""

    id: str
    object: Literal["batch"] = msgspec.field(default_factory=lambda: "batch")
    endpoint: BatchEndpoint
    model: str | None = None
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"]
    status: BatchStatus
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: BatchRequestCounts
    usage: BatchUsage | None = None
    metadata: dict[str, str] | None = None


class BatchList(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A page of batches; without batches there are no ids."""

    object: Literal["list"] = msgspec.field(default_factory=lambda: "list")
    data: list[Batch]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool
