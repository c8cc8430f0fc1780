"""The bodies of requests to ``/v1/messages``, Anthropic's API, as structs: what is decoded and shown.

Content blocks of all kinds are one struct: which fields a kind needs is checked where messages are read, so
that an error can say what is missing and where.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stoker.api.request_schemas import NaturalInt, Share, StopString, ToolName

__all__ = [
    "CacheControl",
    "InputBlock",
    "InputMessage",
    "JsonOutputFormat",
    "MessagesMetadata",
    "MessagesPrompt",
    "MessagesRequest",
    "MessagesTool",
    "MessagesToolChoice",
    "OutputConfig",
    "ResultBlock",
    "ThinkingConfig",
]

_MAX_STOP_SEQUENCES = 64

# Decoded as any text, so that the error of another one can say what to do; shown as what is possible.
TextType = Annotated[str, Meta(extra_json_schema={"enum": ["text"]})]
BlockType = Annotated[
    str,
    Meta(
        extra_json_schema={
            "enum": ["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
        }
    ),
]
Role = Annotated[str, Meta(extra_json_schema={"enum": ["user", "assistant", "system"]})]
ToolType = Annotated[str, Meta(extra_json_schema={"enum": ["custom"]})]
ChoiceType = Annotated[str, Meta(extra_json_schema={"enum": ["auto", "any", "tool", "none"]})]
ThinkingType = Annotated[str, Meta(extra_json_schema={"enum": ["enabled", "disabled", "adaptive"]})]
ThinkingDisplay = Annotated[str, Meta(extra_json_schema={"enum": ["summarized", "omitted"]})]
FormatType = Annotated[str, Meta(extra_json_schema={"enum": ["json_schema"]})]
Effort = Annotated[str, Meta(extra_json_schema={"enum": ["low", "medium", "high", "xhigh", "max"]})]
Speed = Annotated[str, Meta(extra_json_schema={"enum": ["standard"]})]
ServiceTier = Annotated[str, Meta(extra_json_schema={"enum": ["auto", "standard_only"]})]


class CacheControl(msgspec.Struct, kw_only=True):
    """A mark where Anthropic's cache ends a prefix. Here every prefix is looked up and kept anyway."""

    type: str
    ttl: str | None = None


class ResultBlock(msgspec.Struct, kw_only=True):
    """A part of a tool's result; ``type`` is ``text``."""

    type: TextType
    text: str | None = None
    cache_control: CacheControl | None = None


class InputBlock(msgspec.Struct, kw_only=True):
    """A content block.

    Attributes:
        type: In a user's message ``text`` or ``tool_result``; in an assistant's ``text``, ``tool_use``,
            ``thinking`` or ``redacted_thinking``.
        text: Of ``text``.
        id: Of ``tool_use``: the call's id.
        name: Of ``tool_use``: the tool's name.
        input: Of ``tool_use``: the arguments.
        tool_use_id: Of ``tool_result``: the call that it is the result of.
        content: Of ``tool_result``: text, or parts of type ``text``.
        is_error: Of ``tool_result``: whether the tool failed.
        thinking: Of ``thinking``: what the assistant thought; handed to the chat template.
        signature: Of ``thinking``: taken, and not looked at.
        data: Of ``redacted_thinking``: taken, and not looked at.
        cache_control: Taken; see there.
    """

    type: BlockType
    text: str | None = None
    id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    name: ToolName | None = None
    input: dict[str, msgspec.Raw] | None = None
    tool_use_id: str | None = None
    content: str | list[ResultBlock] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    cache_control: CacheControl | None = None


class InputMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation.

    Attributes:
        role: ``user``, ``assistant``, or ``system`` for instructions on the way.
        content: Text, or content blocks.
    """

    role: Role
    content: str | list[InputBlock]


class MessagesTool(msgspec.Struct, kw_only=True):
    """A tool that the client runs.

    Attributes:
        name: Letters, digits, ``_`` and ``-``.
        description: What it does.
        input_schema: The JSON schema of its arguments.
        type: ``custom``, or left out.
        strict: Refuse a schema with keywords that cannot be enforced.
        cache_control: Taken; see there.
        eager_input_streaming: Taken: arguments always come as soon as they are generated.
    """

    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: ToolType | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None


class MessagesToolChoice(msgspec.Struct, kw_only=True):
    """Whether the model has to call a tool.

    Attributes:
        type: ``auto``, ``any`` (one of them), ``tool`` (that one) or ``none``.
        name: With ``tool``: which.
        disable_parallel_tool_use: At most one call in an answer.
    """

    type: ChoiceType
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(msgspec.Struct, kw_only=True):
    """Whether the model thinks before it answers, if its chat template lets one choose.

    Attributes:
        type: ``enabled``, ``disabled``, or ``adaptive`` for the template's default.
        display: ``summarized``: tell what it thought (all of it); ``omitted``: only that it did.
    """

    type: ThinkingType
    display: ThinkingDisplay | None = None


class JsonOutputFormat(msgspec.Struct, kw_only=True, rename={"schema_": "schema"}):
    """What the answer must look like.

    Attributes:
        type: ``json_schema``.
        schema_: The schema.
    """

    type: FormatType
    schema_: dict[str, Any] | None = None


class OutputConfig(msgspec.Struct, kw_only=True):
    """How to answer.

    Attributes:
        effort: ``low``, ``medium``, ``high``, ``xhigh`` or ``max``; handed to the chat template.
        format: What the answer must look like.
    """

    effort: Effort | None = None
    format: JsonOutputFormat | None = None


class MessagesMetadata(msgspec.Struct, kw_only=True):
    """``user_id``: who asks, for the log and for observers."""

    user_id: Annotated[str, Meta(max_length=512)] | None = None


class MessagesPrompt(msgspec.Struct, kw_only=True):
    """The body of ``POST /v1/messages/count_tokens``: what becomes the prompt.

    Attributes:
        model: A served model's id; by default the first served model.
        messages: The conversation. Consecutive messages of one role are one; an assistant's message at the
            end is continued.
        system: Instructions: text, or blocks of type ``text``.
        tools: The tools that the model may call.
        tool_choice: Whether it has to.
        thinking: Whether it thinks first.
        output_config: How to answer.
        output_format: The same as ``output_config.format``; its former name.
        cache_control: Taken; see there.
        speed: ``standard``.
    """

    model: str | None = None
    messages: Annotated[
        list[InputMessage], Meta(min_length=1, examples=[[{"role": "user", "content": "Hello"}]])
    ]
    system: str | list[ResultBlock] | None = None
    tools: Annotated[list[MessagesTool], Meta(max_length=128)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: JsonOutputFormat | None = None
    cache_control: CacheControl | None = None
    speed: Speed | None = None


class MessagesRequest(MessagesPrompt, kw_only=True):
    """The body of ``POST /v1/messages``.

    Attributes:
        max_tokens: Most tokens to generate; fewer if the model's context ends before. 0 only reads the
            prompt, so that it is in the cache.
        stop_sequences: Texts that end the answer; they are not part of it.
        stream: Answer with server-sent events.
        temperature: 0 always takes the likeliest token.
        top_p: Keep the likeliest tokens up to this probability mass.
        top_k: Keep the k likeliest tokens; 0 is off.
        metadata: Who asks.
        service_tier: ``auto`` or ``standard_only``; there is one tier.
    """

    max_tokens: NaturalInt
    stop_sequences: (
        Annotated[
            list[Annotated[StopString, Meta(min_length=1)]], Meta(max_length=_MAX_STOP_SEQUENCES)
        ]
        | None
    ) = None
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: NaturalInt | None = None
    metadata: MessagesMetadata | None = None
    service_tier: ServiceTier | None = None
