"""How the endpoints of responses stand in the OpenAPI document, and their query parameters are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from litestar.openapi.spec import (
    OpenAPIMediaType,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)

from stoker.api.incoming import AnyRequest
from stoker.api.openapi import EVENT, json_operation, links_to
from stoker.errors import InvalidRequestError

__all__ = [
    "FOLLOWING",
    "INPUT_ITEMS",
    "RETRIEVAL",
    "TOKEN_COUNT",
    "query_bool",
    "query_int",
    "query_text",
]

_STRING = Schema(type=OpenAPIType.STRING)
_BOOLEAN = Schema(type=OpenAPIType.BOOLEAN)
_MAX_SEQUENCE = 2**31 - 1
_MAX_LIMIT = 100


def _with_query(kind: type[Operation], parameters: Sequence[Parameter]) -> type[Operation]:
    @dataclass
    class QueryOperation(kind):  # type: ignore[misc, valid-type]  # a class made by a function
        def __post_init__(self) -> None:
            super().__post_init__()
            given: list[Any] = list(getattr(self, "parameters", None) or ())
            self.parameters = [*given, *parameters]

    return QueryOperation


def _query(name: str, schema: Schema, description: str) -> Parameter:
    return Parameter(name=name, param_in="query", schema=schema, description=description)


FOLLOWING = links_to(
    "path.response_id", "get_response", "cancel_response", "list_input_items", "delete_response"
)
"""From a response to what can be done with it."""

_RETRIEVED = json_operation("ResponseObject")


@dataclass
class _Retrieval(_RETRIEVED):  # type: ignore[misc, valid-type]  # a class made by a function
    def __post_init__(self) -> None:
        super().__post_init__()
        self.responses["200"].content["text/event-stream"] = OpenAPIMediaType(schema=EVENT)


RETRIEVAL = _with_query(
    _Retrieval,
    [
        _query(
            "stream",
            _BOOLEAN,
            "Follow its events; only of one made with `background` and `stream`.",
        ),
        _query(
            "starting_after",
            Schema(type=OpenAPIType.INTEGER, minimum=0, maximum=_MAX_SEQUENCE),
            "With `stream`: the `sequence_number` after which to begin.",
        ),
    ],
)
"""``GET /v1/responses/{response_id}``."""

INPUT_ITEMS = _with_query(
    json_operation("ItemList"),
    [
        _query(
            "limit",
            Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=_MAX_LIMIT),
            "How many; 20.",
        ),
        _query(
            "order", Schema(type=OpenAPIType.STRING, enum=["asc", "desc"]), "`desc` by default."
        ),
        _query("after", _STRING, "The id of the item after which the list begins."),
    ],
)
"""``GET /v1/responses/{response_id}/input_items``."""


@dataclass
class TOKEN_COUNT(json_operation("InputTokens")):  # type: ignore[misc]  # noqa: N801 - as the others
    """``POST /v1/responses/input_tokens``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        reference = Reference(ref="#/components/schemas/InputTokensRequest")
        self.request_body = RequestBody(
            content={"application/json": OpenAPIMediaType(schema=reference)}, required=True
        )


def query_text(request: AnyRequest, name: str) -> str | None:
    """A query parameter as it came; of several, the last."""
    values = request.query_params.getall(name, [])
    return str(values[-1]) if values else None


def query_bool(request: AnyRequest, name: str) -> bool:
    """A query parameter that is true or false, which is the default.

    Raises:
        InvalidRequestError: It is neither.
    """
    text = query_text(request, name)
    if text is None or text.lower() == "false":
        return False
    if text.lower() == "true":
        return True
    raise _wrong(name, text, "true or false")


def query_int(request: AnyRequest, name: str, least: int, most: int, default: int) -> int:
    """A query parameter that is a number.

    Raises:
        InvalidRequestError: It is none, or out of range.
    """
    text = query_text(request, name)
    if text is None:
        return default
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) < 12 and least <= int(text) <= most:
        return int(text)
    raise _wrong(name, text, f"an integer from {least} to {most}")


def _wrong(name: str, text: str, wanted: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{name!r} is {text[:50]!r}; it has to be {wanted}", param=name, code="invalid_value"
    )
