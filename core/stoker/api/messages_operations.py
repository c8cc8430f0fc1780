"""The OpenAPI descriptions of Anthropic's API."""

from dataclasses import dataclass

from litestar.openapi.spec import (
    OpenAPIMediaType,
    OpenAPIResponse,
    OpenAPIType,
    Operation,
    Parameter,
    Reference,
    RequestBody,
    Schema,
)

from stoker.api.openapi import OF_THE_REQUEST

__all__ = ["messages_operation", "models_operation"]

_STRING = Schema(type=OpenAPIType.STRING)
_EVENT = Schema(
    type=OpenAPIType.OBJECT,
    description="An event; `data` is the JSON of an object whose `type` is the event's.",
    properties={
        "event": Schema(
            type=OpenAPIType.STRING,
            enum=[
                *("message_start", "content_block_start", "content_block_delta"),
                *("content_block_stop", "message_delta", "message_stop", "ping", "error"),
            ],
        ),
        "data": _STRING,
    },
    required=["event", "data"],
)
_VERSION = Parameter(
    name="anthropic-version",
    param_in="header",
    description="The version of Anthropic's API; any will do.",
    schema=_STRING,
)
_ASKS_FOR_SHAPE = Parameter(
    name="anthropic-version",
    param_in="header",
    description="Whoever sends it gets the answer of Anthropic's API instead of OpenAI's.",
    schema=_STRING,
)
_PAGING = [
    Parameter(
        name=name, param_in="query", description=f"With `anthropic-version`: {what}", schema=_STRING
    )
    for name, what in (
        ("limit", "most models to list, 1 to 1000; 20 by default."),
        ("after_id", "list those after this one."),
        ("before_id", "list those before this one."),
    )
]


def _json(description: str, *names: str) -> OpenAPIResponse:
    """An answer that is one of some structs."""
    references = [Reference(ref=f"#/components/schemas/{name}") for name in names]
    schema = references[0] if len(references) == 1 else Schema(any_of=references)
    return OpenAPIResponse(
        description=description, content={"application/json": OpenAPIMediaType(schema=schema)}
    )


def messages_operation(request: str, response: str, *, streams: bool = False) -> type[Operation]:
    """An operation that takes the struct named ``request`` and answers with that named ``response``.

    Args:
        request: Name of a schema.
        response: Name of a schema.
        streams: Whether it may answer with server-sent events, too.
    """

    @dataclass
    class MessagesOperation(Operation):
        def __post_init__(self) -> None:
            reference = Reference(ref=f"#/components/schemas/{request}")
            self.parameters = [_VERSION]
            self.request_body = RequestBody(
                content={"application/json": OpenAPIMediaType(schema=reference)}, required=True
            )
            success = _json("The answer", response)
            if streams and success.content is not None:
                success.description = "The answer; with `stream`, server-sent events of its parts"
                success.content["text/event-stream"] = OpenAPIMediaType(schema=_EVENT)
                success.links = dict(OF_THE_REQUEST)
            self.responses = {"200": success, "default": _json("An error", "MessagesErrorBody")}

    return MessagesOperation


def models_operation(response: str, in_anthropics_words: str) -> type[Operation]:
    """An operation that tells of models in the words of whoever asks.

    Args:
        response: Name of a schema.
        in_anthropics_words: Name of the schema of the answer to clients of Anthropic's API.
    """
    lists = response.endswith("List")

    @dataclass
    class ModelsOperation(Operation):
        def __post_init__(self) -> None:
            self.parameters = [
                *(self.parameters or ()),
                _ASKS_FOR_SHAPE,
                *(_PAGING if lists else ()),
            ]
            self.responses = {
                "200": _json("Success", response, in_anthropics_words),
                "default": _json("An error", "ErrorBody", "MessagesErrorBody"),
            }

    return ModelsOperation
