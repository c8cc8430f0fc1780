"""The bodies of the small endpoints and of errors, as structs: what is encoded and shown in the schema."""

from typing import Literal

import msgspec

from stoker.history import RequestStatus
from stoker.types import SequenceTrace

__all__ = [
    "CancelledRequest",
    "Engine",
    "EngineList",
    "ErrorBody",
    "ErrorDetail",
    "Model",
    "ModelList",
    "Readiness",
    "RequestDetails",
    "RequestList",
    "RequestSummary",
]


class Model(msgspec.Struct, kw_only=True):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "stoker"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """The served models, the default first."""

    object: Literal["list"] = "list"
    data: list[Model]


class Engine(msgspec.Struct, kw_only=True):
    """A served model, in the words of the deprecated engines API."""

    id: str
    object: Literal["engine"] = "engine"
    created: int
    owner: str = "stoker"
    ready: bool


class EngineList(msgspec.Struct, kw_only=True):
    """The served models, in the words of the deprecated engines API."""

    object: Literal["list"] = "list"
    data: list[Engine]


class RequestSummary(msgspec.Struct, kw_only=True):
    """A request of yours.

    Attributes:
        id: The `x-request-id` of its answer.
        created: When it came, in seconds since 1970.
        model: The model that was asked for.
        status: `waiting` (no lane yet), `running`, `finished`, `cancelled` (through the API), `failed`
            (with an error) or `aborted` (its client went away).
    """

    id: str
    object: Literal["request"] = "request"
    created: int
    model: str
    status: RequestStatus


class RequestList(msgspec.Struct, kw_only=True):
    """Your requests, at most 100: those that run, then the last ones that ended; the latest first."""

    object: Literal["list"] = "list"
    data: list[RequestSummary]


class RequestDetails(RequestSummary, kw_only=True):
    """What became of a request, and why.

    Attributes:
        tenant: Whose it is.
        policy: The scheduling policy that decided.
        num_sequences: How many answers were asked for.
        sequences: What the scheduler did with each; of an ended request, with the first 16.
    """

    tenant: str
    policy: str
    num_sequences: int
    sequences: list[SequenceTrace]


class CancelledRequest(msgspec.Struct, kw_only=True):
    """The answer of a cancellation.

    Attributes:
        id: The request.
        cancelled: Whether anything of it still ran; `false` if it had ended already.
    """

    id: str
    object: Literal["request.cancelled"] = "request.cancelled"
    cancelled: bool


class Readiness(msgspec.Struct, kw_only=True):
    """The body of ``/ready``.

    Attributes:
        ready: Whether requests should be sent here.
        status: That of ``/health``, or ``warming``: requests are taken, but the warm-up is not over.
    """

    ready: bool
    status: str


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong.

    Attributes:
        message: For people.
        type: OpenAI's kind of error.
        param: The request field at fault.
        code: For programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, kw_only=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail
