"""What the OpenAPI document says of the routes: they read and write their bodies themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from litestar.openapi.spec import (
    Link,
    OpenAPIFormat,
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)

__all__ = [
    "AFTER",
    "BINARY",
    "FROM_BATCH",
    "FROM_FILE",
    "ORDER",
    "PURPOSE",
    "UPLOAD",
    "json_body",
    "limit_parameter",
    "operation",
]

_STRING = Schema(type=OpenAPIType.STRING)


def _query(name: str, description: str, schema: Schema) -> Parameter:
    return Parameter(name=name, param_in="query", description=description, schema=schema)


AFTER = _query("after", "The id that the page before ended with.", _STRING)
ORDER = _query(
    "order", "By creation.", Schema(type=OpenAPIType.STRING, enum=["asc", "desc"], default="desc")
)
PURPOSE = _query(
    "purpose",
    "Only files of this purpose.",
    Schema(type=OpenAPIType.STRING, enum=["batch", "batch_output"]),
)


def limit_parameter(default: int, most: int) -> Parameter:
    """The size of a page."""
    schema = Schema(type=OpenAPIType.INTEGER, minimum=1, maximum=most, default=default)
    return _query("limit", "Most entries of a page.", schema)


UPLOAD = RequestBody(
    required=True,
    content={
        "multipart/form-data": OpenAPIMediaType(
            schema=Schema(
                type=OpenAPIType.OBJECT,
                required=["file", "purpose"],
                properties={
                    "file": Schema(
                        type=OpenAPIType.STRING,
                        format=OpenAPIFormat.BINARY,
                        description="JSON objects, one a line.",
                    ),
                    "purpose": Schema(type=OpenAPIType.STRING, enum=["batch"]),
                    "expires_after": Reference(
                        ref="#/components/schemas/FileExpiration",
                        description="As JSON; or in two fields, expires_after[anchor] and "
                        "expires_after[seconds].",
                    ),
                },
            )
        )
    },
)
BINARY = OpenAPIResponse(
    description="The file's content",
    content={
        "application/octet-stream": OpenAPIMediaType(
            schema=Schema(type=OpenAPIType.STRING, format=OpenAPIFormat.BINARY)
        )
    },
)


def _links(
    parameter: str, *operation_ids: str, value: str = "$response.body#/id"
) -> dict[str, Link | Reference]:
    return {name: Link(operation_id=name, parameters={parameter: value}) for name in operation_ids}


FROM_FILE = {
    **_links("path.file_id", "get_file", "get_file_content", "delete_file"),
    "create_batch": Link(
        operation_id="create_batch",
        request_body={
            "input_file_id": "$response.body#/id",
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        },
    ),
}
"""What can be done with a file."""

FROM_BATCH = {
    **_links("path.batch_id", "get_batch", "cancel_batch"),
    **_links("path.file_id", "get_file", value="$response.body#/input_file_id"),
}
"""What can be done with a batch."""


def json_body(name: str) -> RequestBody:
    """A body that is the struct of this name."""
    return RequestBody(required=True, content={"application/json": _media(name)})


def _media(name: str) -> OpenAPIMediaType:
    return OpenAPIMediaType(schema=Reference(ref=f"#/components/schemas/{name}"))


def operation(
    answer: str | OpenAPIResponse,
    *,
    body: RequestBody | None = None,
    parameters: Sequence[Parameter] = (),
    links: Mapping[str, Link | Reference] | None = None,
) -> type[Operation]:
    """An operation.

    Args:
        answer: The name of the struct that it answers with, or more than that.
        body: What it takes.
        parameters: Beside those in the path.
        links: Where one can go from its answer.
    """
    success = (
        OpenAPIResponse(description="Success", content={"application/json": _media(answer)})
        if isinstance(answer, str)
        else answer
    )
    error = OpenAPIResponse(
        description="An error", content={"application/json": _media("ErrorBody")}
    )

    @dataclass
    class RouteOperation(Operation):
        def __post_init__(self) -> None:
            self.parameters = [*(self.parameters or []), *parameters]
            success.links = dict(links) if links else None
            self.responses = {"200": success, "default": error}
            if body is not None:
                self.request_body = body

    return RouteOperation
