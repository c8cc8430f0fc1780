"""What a request for a response may say: known fields, and what is refused by name."""

from collections.abc import Mapping

import msgspec

from stoker.api.parameters import KnownFields, check_parameters
from stoker.api.request_schemas import StructuredOutputs
from stoker.api.responses.request_schemas import (
    AllowedTool,
    InputItem,
    InputPart,
    InputTokensRequest,
    ReasoningOptions,
    ResponseRequest,
    ResponseStreamOptions,
    ResponseTextFormat,
    ResponseTextOptions,
    ResponseTool,
    ResponseToolChoice,
)
from stoker.errors import InvalidRequestError
from stoker.router import WARNING_HEADER

__all__ = ["LOGPROBS", "check_fields", "check_include", "check_token_fields"]

LOGPROBS = "message.output_text.logprobs"

# They say what the response is made of: without them it would be another one.
_REFUSED = {
    "conversation": "conversations are not kept here; send 'previous_response_id', or all items as 'input'",
    "prompt": "prompt templates are not kept here; send 'instructions' and 'input'",
}
_NOTHING_TO_INCLUDE = frozenset(
    {
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
_UNSUPPORTED = ("context_management", "personality")
_PARTS = KnownFields.of(InputPart, also=("annotations", "logprobs", "parsed"))
_WITHIN = {
    "input": KnownFields.of(
        InputItem,
        # What our own items have, and the clients' libraries add to them.
        also=("parsed_arguments",),
        within={"content": _PARTS, "output": _PARTS, "summary": _PARTS},
        unsupported=("encrypted_content", "phase"),
    ),
    "tools": KnownFields.of(
        ResponseTool, unsupported=("output_schema", "defer_loading", "allowed_callers")
    ),
    "tool_choice": KnownFields.of(
        ResponseToolChoice, within={"tools": KnownFields.of(AllowedTool)}
    ),
    "text": KnownFields.of(
        ResponseTextOptions, within={"format": KnownFields.of(ResponseTextFormat)}
    ),
    "reasoning": KnownFields.of(
        ReasoningOptions, unsupported=("summary", "generate_summary", "mode", "context")
    ),
    "stream_options": KnownFields.of(ResponseStreamOptions),
    "structured_outputs": KnownFields.of(StructuredOutputs),
}
_FIELDS = KnownFields.of(ResponseRequest, also=_REFUSED, within=_WITHIN, unsupported=_UNSUPPORTED)
_TOKEN_FIELDS = KnownFields.of(
    InputTokensRequest, also=_REFUSED, within=_WITHIN, unsupported=_UNSUPPORTED
)


def check_fields(raw: Mapping[str, msgspec.Raw], *, strict: bool) -> dict[str, str]:
    """Headers that name what is ignored of a request for a response.

    Args:
        raw: Its fields.
        strict: Whether such fields are an error.

    Raises:
        InvalidRequestError: It says what cannot be ignored; or anything that would be, if ``strict``.
    """
    _refuse(raw)
    return check_parameters(raw, _FIELDS, strict=strict)


def check_token_fields(raw: Mapping[str, msgspec.Raw], *, strict: bool) -> dict[str, str]:
    """The same for a request to count tokens."""
    _refuse(raw)
    return check_parameters(raw, _TOKEN_FIELDS, strict=strict)


def _refuse(raw: Mapping[str, msgspec.Raw]) -> None:
    for name, why in _REFUSED.items():
        if name in raw and bytes(raw[name]) != b"null":
            raise InvalidRequestError(
                f"{name!r} is not supported: {why}", param=name, code="unsupported_parameter"
            )


def check_include(include: list[str] | None, headers: dict[str, str], *, strict: bool) -> None:
    """Name in the headers what cannot be included.

    Raises:
        InvalidRequestError: There is no such thing; or it cannot be included, if ``strict``.
    """
    for i, name in enumerate(include or ()):
        if name == LOGPROBS or name in _NOTHING_TO_INCLUDE:
            continue  # what a response never has need not be left out
        if name != "reasoning.encrypted_content":
            known = ", ".join(sorted({LOGPROBS, *_NOTHING_TO_INCLUDE}))
            raise InvalidRequestError(
                f"'include' names {name[:64]!r}; it may name {known}",
                param=f"include.{i}",
                code="invalid_value",
            )
        if strict:
            raise InvalidRequestError(
                f"'include' names {name!r}, which is not supported: reasoning is not encrypted here; "
                "remove it, or set server.strict to false",
                param=f"include.{i}",
                code="unsupported_parameter",
            )
        warning = f"include {name} ignored: reasoning is not encrypted here"
        before = headers.get(WARNING_HEADER)
        headers[WARNING_HEADER] = f"{before}, {warning}" if before else warning
