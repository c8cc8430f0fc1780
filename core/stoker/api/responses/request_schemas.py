"""The bodies of requests for responses, as structs: what is decoded and shown in the schema."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from stoker.api.request_schemas import (
    AllowedMode,
    FormatType,
    FunctionType,
    Metadata,
    Penalty,
    PositiveInt,
    ServiceTier,
    Share,
    StopText,
    StopTexts,
    StructuredOutputs,
    ToolChoiceMode,
    ToolChoiceType,
    ToolName,
    TopLogprobs,
)

__all__ = [
    "AllowedTool",
    "InputItem",
    "InputPart",
    "InputTokensRequest",
    "ReasoningOptions",
    "ResponseRequest",
    "ResponseStreamOptions",
    "ResponseTextFormat",
    "ResponseTextOptions",
    "ResponseTool",
    "ResponseToolChoice",
]

_INT32 = 2**31 - 1
_INT64 = 2**63 - 1
_Id = Annotated[str, Meta(min_length=1, max_length=256)]

# As in the other requests: any text is decoded, and what is possible is shown.
_ItemRole = Annotated[
    str, Meta(extra_json_schema={"enum": ["user", "assistant", "system", "developer"]})
]
_ItemType = Annotated[
    str,
    Meta(
        extra_json_schema={
            "enum": [
                "message",
                "function_call",
                "function_call_output",
                "reasoning",
                "item_reference",
            ]
        }
    ),
]
_PartType = Annotated[
    str,
    Meta(
        extra_json_schema={
            "enum": [
                "input_text",
                "output_text",
                "text",
                "refusal",
                "summary_text",
                "reasoning_text",
            ]
        }
    ),
]
_Truncation = Annotated[str, Meta(extra_json_schema={"enum": ["auto", "disabled"]})]


class InputPart(msgspec.Struct, kw_only=True):
    """A part of an item: ``input_text``, ``output_text``, ``refusal``, ``summary_text``, ..."""

    type: _PartType
    text: str | None = None
    refusal: str | None = None


class InputItem(msgspec.Struct, kw_only=True):
    """An item of a conversation.

    Attributes:
        type: ``message`` (also if there is none but a ``role``), ``function_call``, ``function_call_output``,
            ``reasoning`` or ``item_reference``.
        id: The item's id, if it has one; of a reference, the id of a stored item.
        status: How it ended.
        role: Of a message: ``user``, ``assistant``, ``system`` or ``developer``.
        content: Of a message: text or parts; of reasoning: its parts.
        call_id: Of a call and its output: what ties them together.
        name: Of a call: the function.
        arguments: Of a call: the text of a JSON object.
        output: Of a call's output: text or parts.
        summary: Of reasoning: its summary, taken where there is no ``content``.
    """

    type: _ItemType | None = None
    id: _Id | None = None
    status: str | None = None
    role: _ItemRole | None = None
    content: str | list[InputPart] | None = None
    call_id: _Id | None = None
    name: ToolName | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None


_Items = Annotated[list[InputItem], Meta(max_length=10_000)]


class ResponseTool(msgspec.Struct, kw_only=True):
    """A tool; only those of type ``function`` are served.

    Attributes:
        type: ``function``.
        name: Letters, digits, ``_`` and ``-``.
        description: What it does.
        parameters: The JSON schema of its arguments.
        strict: Refuse a schema with keywords that cannot be enforced.
    """

    type: FunctionType
    name: ToolName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AllowedTool(msgspec.Struct, kw_only=True):
    """A tool that is allowed."""

    type: FunctionType
    name: ToolName | None = None


class ResponseToolChoice(msgspec.Struct, kw_only=True):
    """Which tools: ``type`` is ``function`` (that one must be called) or ``allowed_tools``.

    Attributes:
        type: Which of the two.
        name: The function that must be called.
        mode: Of allowed tools: ``auto`` or ``required``.
        tools: The allowed tools.
    """

    type: ToolChoiceType
    name: ToolName | None = None
    mode: AllowedMode | None = None
    tools: Annotated[list[AllowedTool], Meta(min_length=1)] | None = None


class ResponseTextFormat(msgspec.Struct, kw_only=True, rename={"schema_": "schema"}):
    """What the text must look like.

    Attributes:
        type: ``text``, ``json_object`` or ``json_schema``.
        name: Of a schema: for people.
        description: Of a schema: for people.
        schema_: The schema.
        strict: Refuse a schema with keywords that cannot be enforced, instead of leaving those out.
    """

    type: FormatType
    name: Annotated[str, Meta(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseTextOptions(msgspec.Struct, kw_only=True):
    """How the text is to be: ``format``."""

    format: ResponseTextFormat | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True):
    """How to think: ``effort`` is handed to the chat template."""

    effort: str | None = None


class ResponseStreamOptions(msgspec.Struct, kw_only=True):
    """Options of a streamed response; none that this server serves."""


class ResponseRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /v1/responses``; ``null`` means the default.

    Attributes:
        model: A served model's id; by default the first served model.
        input: A user's text, or items; after a ``previous_response_id`` it may be left out.
        instructions: A system message before everything else; not carried over to following responses.
        previous_response_id: A stored response that this one follows.
        store: Whether the response can be asked for, and followed, later; it can by default.
        background: Answer at once, and run on without the client.
        stream: Answer with server-sent events.
        stream_options: Options of a streamed response.
        max_output_tokens: Most tokens to generate, reasoning included; by default up to the context length.
        max_tool_calls: Most calls of built-in tools, of which there are none.
        temperature: 0 always takes the likeliest token.
        top_p: Keep the likeliest tokens up to this probability mass.
        top_logprobs: Tell the log-probability of each token, and of so many of the likeliest at its place.
        include: ``message.output_text.logprobs`` tells log-probabilities.
        tools: The functions that the model may call.
        tool_choice: ``none``, ``auto``, ``required``, one of them, or some.
        parallel_tool_calls: Whether it may make several calls in one response; it may by default.
        text: How the text is to be.
        reasoning: How to think.
        truncation: ``auto`` leaves out the oldest items where all do not fit; ``disabled`` refuses then.
        service_tier: ``flex`` runs after others and ``priority`` before, under such a policy.
        metadata: Handed to middleware, and given back.
        user: Who asks, for the log and for observers.
        safety_identifier: The same; ``user``'s new name.
        prompt_cache_key: Given back; prefixes are found by what is in them.
        top_k: Keep the k likeliest tokens; 0 or -1 is off.
        min_p: Drop tokens less likely than this share of the likeliest one.
        repetition_penalty: Makes tokens of prompt and output less likely; 1 is off.
        presence_penalty: Subtracted once from each token seen in the output.
        frequency_penalty: Subtracted from a token for each time it was seen in the output.
        logit_bias: Added to the logits of tokens: token ids to -100..100.
        seed: Makes the draws reproducible.
        stop: Up to 4 strings that end the text; they are not part of it.
        structured_outputs: What the text must look like, in vLLM's words.
        chat_template_kwargs: More names for the chat template.
        priority: Lower runs first, under a policy that knows priorities.
        timeout: Give up after so many seconds.
        cache_salt: Only requests with the same salt reuse each other's KV.
    """

    model: str | None = None
    input: Annotated[str | _Items | None, Meta(examples=["Hello"])] = None
    instructions: str | None = None
    previous_response_id: _Id | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: PositiveInt | None = None
    max_tool_calls: PositiveInt | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_logprobs: TopLogprobs | None = None
    include: Annotated[list[str], Meta(max_length=32)] | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoiceMode | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseTextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: _Truncation | None = None
    service_tier: ServiceTier | None = None
    metadata: Metadata | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Meta(max_length=512)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-_INT64 - 1, le=_INT64)] | None = None
    stop: StopText | StopTexts | None = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Annotated[int, Meta(ge=-_INT32, le=_INT32)] | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None


class InputTokensRequest(msgspec.Struct, kw_only=True):
    """The body of ``POST /v1/responses/input_tokens``: what of a response's request makes its prompt."""

    model: str | None = None
    input: Annotated[str | _Items | None, Meta(examples=["Hello"])] = None
    instructions: str | None = None
    previous_response_id: _Id | None = None
    tools: Annotated[list[ResponseTool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoiceMode | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: ResponseTextOptions | None = None
    reasoning: ReasoningOptions | None = None
    truncation: _Truncation | None = None
    chat_template_kwargs: dict[str, Any] | None = None
