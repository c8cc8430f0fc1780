"""Request parameters that are not served: refused in strict mode, named in a warning header otherwise.

A parameter that asks for nothing (``null``, ``"tools": []``, ``"logprobs": false``) needs neither.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from stoker.api.schemas import ChatMessage, ChatRequest, CompletionRequest, StreamOptions
from stoker.errors import InvalidRequestError

__all__ = ["Ignored", "find_ignored", "refuse", "warning_header"]

# Labels, which change nothing in the answer.
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}

# Parameters of the OpenAI API, or of servers like it, that this server does not serve.
_UNSUPPORTED = {
    "audio", "best_of", "echo", "function_call", "functions", "guided_json", "guided_regex",
    "include_obfuscation", "length_penalty", "logprobs", "modalities", "parallel_tool_calls",
    "prediction", "prompt_cache_retention", "prompt_logprobs", "reasoning_effort", "refusal",
    "response_format", "service_tier", "store", "suffix", "tool_calls", "tool_choice", "tools",
    "top_logprobs", "use_beam_search", "verbosity", "web_search_options",
}  # fmt: skip

# Values that ask for what happens anyway, beside null, false and empty ones.
_AS_SERVED: dict[str, Sequence[Any]] = {
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True,),  # says how, not whether, to call tools
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "top_logprobs": (0,),
    "best_of": (1,),
    "length_penalty": (1,),
}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})

_KNOWN_CHAT = frozenset(ChatRequest.__struct_fields__) | _LABELS
_KNOWN_COMPLETION = frozenset(CompletionRequest.__struct_fields__) | _LABELS
_KNOWN_MESSAGE = frozenset(ChatMessage.__struct_fields__)
_KNOWN_STREAM_OPTIONS = frozenset(StreamOptions.__struct_fields__)

_messages = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
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


def find_ignored(raw: Mapping[str, msgspec.Raw], *, chat: bool) -> list[Ignored]:
    """The parameters of a body that would be ignored, in their order."""
    found = _ignored(raw, _KNOWN_CHAT if chat else _KNOWN_COMPLETION)
    options = raw.get("stream_options")
    if options is not None and bytes(options) != b"null":
        found += _ignored(_object.decode(options), _KNOWN_STREAM_OPTIONS, "stream_options.")
    if chat:
        for index, message in enumerate(_messages.decode(raw["messages"])):
            found += _ignored(message, _KNOWN_MESSAGE, f"messages.{index}.")
    return found


def _ignored(
    raw: Mapping[str, msgspec.Raw], known: frozenset[str], prefix: str = ""
) -> list[Ignored]:
    return [
        Ignored(prefix + name, "unsupported" if name in _UNSUPPORTED else "unknown")
        for name, value in raw.items()
        if name not in known and not _asks_nothing(name, value)
    ]


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


def refuse(ignored: Ignored) -> InvalidRequestError:
    """The error of strict mode."""
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
