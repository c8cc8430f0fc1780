"""Request parameters that are not served: refused in strict mode, named in a warning header otherwise.

A parameter that asks for nothing (``null``, ``"tools": []``, ``"logprobs": false``) needs neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from stoker.api.request_schemas import (
    AllowedTools,
    CalledFunction,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    ContentPart,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    Prediction,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
    ToolCallParam,
    ToolChoiceParam,
    ToolChoiceTool,
    ToolParam,
)
from stoker.errors import InvalidRequestError
from stoker.router import WARNING_HEADER

__all__ = [
    "CHAT_FIELDS",
    "COMPLETION_FIELDS",
    "LABELS",
    "Ignored",
    "KnownFields",
    "check_parameters",
    "find_ignored",
    "warning_header",
]

LABELS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
"""Fields that change nothing in the answer."""

# Parameters of the OpenAI API, or of servers like it, that this server does not serve.
_UNSUPPORTED = {
    "audio", "bad_words", "detail", "file", "function_call", "functions", "guided_decoding_backend",
    "guided_whitespace_pattern", "image_url", "include_obfuscation", "input_audio", "length_penalty",
    "modalities", "moderation", "prompt_cache_options", "prompt_cache_retention", "store", "structural_tag",
    "use_beam_search", "verbosity", "web_search_options",
}  # fmt: skip

# Values that ask for what happens anyway, beside null, false and empty ones.
_AS_SERVED: dict[str, Sequence[Any]] = {
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "length_penalty": (1,),
}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})

_list = msgspec.json.Decoder(list[msgspec.Raw])
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])

_MAX_NAMED = 8
_MAX_NAME = 64
_MAX_NOTHING = 64  # a longer value asks for something, and need not be decoded


class Ignored(msgspec.Struct, frozen=True):
    """A parameter that asks for something that is not served.

    Attributes:
        name: Its path in the body.
        kind: ``"unsupported"`` for what other servers know, ``"unknown"`` for the rest.
    """

    name: str
    kind: str


class KnownFields(msgspec.Struct, frozen=True):
    """The fields that an object in a body may have.

    Attributes:
        names: The fields that are served, as clients spell them.
        within: Those of the objects in it, or in lists in it, by the field that holds them. What is there
            but no object, such as a text, has no fields.
        unsupported: Fields, beside those of OpenAI's generating endpoints, that servers like this one know.
    """

    names: frozenset[str]
    within: Mapping[str, KnownFields] = {}
    unsupported: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        *kinds: type[msgspec.Struct],
        also: Iterable[str] = (),
        within: Mapping[str, KnownFields] | None = None,
        unsupported: Iterable[str] = (),
    ) -> KnownFields:
        """The fields of structs.

        Args:
            kinds: The structs that such an object is decoded into.
            also: More fields that are served.
            within: See the class.
            unsupported: See the class.
        """
        names = {name for kind in kinds for name in kind.__struct_encode_fields__}
        return cls(frozenset(names.union(also)), within or {}, frozenset(unsupported))


_SHARED = {
    "stream_options": KnownFields.of(StreamOptions),
    "response_format": KnownFields.of(
        ResponseFormat, within={"json_schema": KnownFields.of(JsonSchemaFormat)}
    ),
    "structured_outputs": KnownFields.of(StructuredOutputs),
}
_NAMED = {"function": KnownFields.of(NamedFunction)}
_PARTS = KnownFields.of(ContentPart)

CHAT_FIELDS = KnownFields.of(
    ChatRequest,
    also=LABELS,
    within={
        **_SHARED,
        "messages": KnownFields.of(
            ChatMessage,
            within={
                "content": _PARTS,
                "tool_calls": KnownFields.of(
                    ToolCallParam, within={"function": KnownFields.of(CalledFunction)}
                ),
            },
        ),
        "tools": KnownFields.of(ToolParam, within={"function": KnownFields.of(FunctionDefinition)}),
        "tool_choice": KnownFields.of(
            ToolChoiceParam,
            within={
                **_NAMED,
                "allowed_tools": KnownFields.of(
                    AllowedTools, within={"tools": KnownFields.of(ToolChoiceTool, within=_NAMED)}
                ),
            },
        ),
        "prediction": KnownFields.of(Prediction, within={"content": _PARTS}),
    },
)
"""What ``/v1/chat/completions`` serves."""

COMPLETION_FIELDS = KnownFields.of(CompletionRequest, also=LABELS, within=_SHARED)
"""What ``/v1/completions`` serves."""


def check_parameters(
    raw: Mapping[str, msgspec.Raw], known: KnownFields, *, strict: bool
) -> dict[str, str]:
    """Refuse a body's parameters that are not served, or name them in a header.

    Args:
        raw: The body's fields, undecoded.
        known: What the endpoint serves.
        strict: Whether to refuse them.

    Returns:
        Headers for the answer.

    Raises:
        InvalidRequestError: In strict mode; it names the first one.
    """
    ignored = find_ignored(raw, known)
    if not ignored:
        return {}
    if strict:
        raise _refusal(ignored[0])
    return {WARNING_HEADER: warning_header(ignored)}


def find_ignored(
    raw: Mapping[str, msgspec.Raw], known: KnownFields, prefix: str = ""
) -> list[Ignored]:
    """The parameters of an object that would be ignored, in their order; those of inner objects follow.

    Args:
        raw: The object's fields, undecoded; well-formed JSON.
        known: The fields it may have.
        prefix: Where it is in the body, with a dot at the end.
    """
    found = [
        Ignored(prefix + name, _kind(name, known))
        for name, value in raw.items()
        if name not in known.names and not _asks_nothing(name, value)
    ]
    for name, inner in known.within.items():
        if name in raw:
            found += _find_within(raw[name], inner, f"{prefix}{name}.")
    return found


def _find_within(value: msgspec.Raw, known: KnownFields, prefix: str) -> list[Ignored]:
    """The same for a value that may be an object, or a list that may hold some."""
    if _starts_with(value, b"{"):
        return find_ignored(_object.decode(value), known, prefix)
    found: list[Ignored] = []
    if _starts_with(value, b"["):
        for index, item in enumerate(_list.decode(value)):
            if _starts_with(item, b"{"):
                found += find_ignored(_object.decode(item), known, f"{prefix}{index}.")
    return found


def _starts_with(value: msgspec.Raw, character: bytes) -> bool:
    return memoryview(value)[:1] == character


def _kind(name: str, known: KnownFields) -> str:
    return "unsupported" if name in _UNSUPPORTED or name in known.unsupported else "unknown"


def _asks_nothing(name: str, raw: msgspec.Raw) -> bool:
    if len(bytes(raw)) > _MAX_NOTHING:
        return False
    try:
        value = msgspec.json.decode(raw)
    except msgspec.DecodeError:  # such as 1e999, which is no number where one is wanted
        return False
    # By type too: 0 == False, but "logprobs": 0 asks for the log-probability of each token.
    if any(type(value) is type(nothing) and value == nothing for nothing in _NOTHING):
        return True
    return any(value == as_served for as_served in _AS_SERVED.get(name, ()))


def _refusal(ignored: Ignored) -> InvalidRequestError:
    return InvalidRequestError(
        f"{ignored.kind} parameter {_printable(ignored.name)}; remove it, or set server.strict to false",
        param=ignored.name,
        code=f"{ignored.kind}_parameter",
    )


def warning_header(ignored: Sequence[Ignored]) -> str:
    """The value of ``x-stoker-warning``: printable ASCII of bounded length, whatever the names hold."""
    parts = [f"{i.kind} parameter {_printable(i.name)} ignored" for i in ignored[:_MAX_NAMED]]
    if len(ignored) > _MAX_NAMED:
        parts.append(f"and {len(ignored) - _MAX_NAMED} more")
    return "; ".join(parts)


def _printable(name: str) -> str:
    short = name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 3] + "..."
    return ascii(short)
