"""The bodies of the generating endpoints' requests, as structs: what is decoded and shown in the schema.

Ranges stand in the types, so that the decoder checks them and the schema states them.
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

__all__ = [
    "AllowedTools",
    "CalledFunction",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "ContentPart",
    "FunctionDefinition",
    "GenerationRequest",
    "JsonSchemaFormat",
    "NamedFunction",
    "Prediction",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputs",
    "ToolCallParam",
    "ToolChoiceParam",
    "ToolParam",
]

_INT32 = 2**31 - 1
_INT64 = 2**63 - 1

Penalty = Annotated[float, Meta(ge=-2, le=2)]
PositiveInt = Annotated[int, Meta(ge=1, le=_INT32)]
NaturalInt = Annotated[int, Meta(ge=0, le=_INT32)]
Share = Annotated[float, Meta(ge=0, le=1)]
TopLogprobs = Annotated[int, Meta(ge=0, le=20)]
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]
StopString = Annotated[str, Meta(max_length=4096)]
ToolName = Annotated[str, Meta(min_length=1, max_length=64)]

# Decoded as any text, so that the error of another one can say what to do; shown as what is possible.
Role = Annotated[
    str, Meta(extra_json_schema={"enum": ["system", "developer", "user", "assistant", "tool"]})
]
PartType = Annotated[str, Meta(extra_json_schema={"enum": ["text", "refusal"]})]
FunctionType = Annotated[str, Meta(extra_json_schema={"enum": ["function"]})]
FormatType = Annotated[
    str, Meta(extra_json_schema={"enum": ["text", "json_object", "json_schema"]})
]
ToolChoiceMode = Annotated[str, Meta(extra_json_schema={"enum": ["none", "auto", "required"]})]
ToolChoiceType = Annotated[str, Meta(extra_json_schema={"enum": ["function", "allowed_tools"]})]
AllowedMode = Annotated[str, Meta(extra_json_schema={"enum": ["auto", "required"]})]
PredictionType = Annotated[str, Meta(extra_json_schema={"enum": ["content"]})]
ServiceTier = Annotated[
    str, Meta(extra_json_schema={"enum": ["auto", "default", "flex", "scale", "priority"]})
]
NonEmpty = Annotated[str, Meta(extra_json_schema={"minLength": 1})]
StopText = Annotated[StopString, Meta(extra_json_schema={"minLength": 1})]
StopTexts = Annotated[list[StopText], Meta(extra_json_schema={"maxItems": 4})]


class StreamOptions(msgspec.Struct, kw_only=True):
    """Options of a streamed answer.

    Attributes:
        include_usage: Send one more chunk with the token counts before the end.
        continuous_usage_stats: Every chunk has the token counts so far.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True, rename={"schema_": "schema"}):
    """A JSON schema for the answer.

    Attributes:
        name: For people.
        description: For people.
        schema_: The schema.
        strict: Refuse a schema with keywords that cannot be enforced, instead of leaving those out.
    """

    name: Annotated[str, Meta(max_length=64)] | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """What the answer must look like.

    Attributes:
        type: ``text``, ``json_object`` (any JSON object) or ``json_schema``.
        json_schema: With ``json_schema``: the schema.
    """

    type: FormatType
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """What the answer must look like, in vLLM's words; exactly one of these.

    Attributes:
        json: A JSON schema, or its text.
        regex: A regular expression.
        choice: The possible answers.
        grammar: A grammar in GBNF or Lark.
        json_object: Any JSON object.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """The fields that chat and text completions share; ``null`` means the default.

    Attributes:
        model: A served model's id; by default the first served model.
        n: How many answers.
        stop: Up to 4 strings that end the answer; they are not part of it.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Make what ended the answer part of it.
        min_tokens: Tokens before which nothing ends the answer.
        stream: Answer with server-sent events.
        stream_options: Options of a streamed answer.
        ignore_eos: Go on after an end token.
        temperature: 0 always takes the likeliest token.
        top_p: Keep the likeliest tokens up to this probability mass.
        top_k: Keep the k likeliest tokens; 0 or -1 is off.
        min_p: Drop tokens less likely than this share of the likeliest one.
        typical_p: Keep the tokens nearest to the expected surprise up to this probability mass; 1 is off.
        repetition_penalty: Makes tokens of prompt and output less likely; 1 is off.
        presence_penalty: Subtracted once from each token seen in the output.
        frequency_penalty: Subtracted from a token for each time it was seen in the output.
        dry_multiplier: Strength of the penalty on going on repeating what is there; 0 is off.
        dry_base: Its growth with the length of the repetition.
        dry_allowed_length: The longest repetition that costs nothing.
        dry_penalty_last_n: How many of the last tokens are searched; -1 for all.
        dry_sequence_breakers: Strings that no repetition reaches across.
        xtc_probability: How often all but the last of the likeliest tokens are dropped; 0 is off.
        xtc_threshold: How likely those are at least.
        logit_bias: Added to the logits of tokens: token ids to -100..100.
        seed: Makes the draws reproducible.
        prompt_logprobs: The log-probabilities of the prompt's tokens, and of so many alternatives.
        return_token_ids: Tell the token ids of prompt and answer.
        return_progress: In a stream, tell how far the prompt is.
        timings: Tell how long prompt and answer took.
        timings_per_token: The same; llama-server's name.
        guided_json: A JSON schema that the answer must follow, or its text.
        guided_regex: A regular expression that it must match.
        guided_choice: The possible answers.
        guided_grammar: A grammar that it must follow, in GBNF or Lark.
        structured_outputs: The same, in one object.
        json_schema: A JSON schema that the answer must follow.
        grammar: A grammar that it must follow, in GBNF.
        priority: Lower runs first, under a policy that knows priorities.
        service_tier: ``flex`` runs after others and ``priority`` before, under such a policy.
        timeout: Give up after so many seconds.
        cache_salt: Only requests with the same salt reuse each other's KV.
        user: Who asks, for the log and for observers.
        safety_identifier: The same; ``user``'s new name.
        metadata: Handed to middleware, and given back.
    """

    model: str | None = None
    n: PositiveInt | None = None
    stop: StopText | StopTexts | None = None
    stop_token_ids: Annotated[list[NaturalInt], Meta(max_length=256)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: NaturalInt | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    min_p: Share | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Meta(ge=1, le=100)] | None = None
    dry_allowed_length: NaturalInt | None = None
    dry_penalty_last_n: Annotated[int, Meta(ge=-1, le=_INT32)] | None = None
    dry_sequence_breakers: (
        Annotated[list[Annotated[str, Meta(min_length=1, max_length=64)]], Meta(max_length=32)]
        | None
    ) = None
    xtc_probability: Share | None = None
    xtc_threshold: Share | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-_INT64 - 1, le=_INT64)] | None = None
    prompt_logprobs: TopLogprobs | None = None
    return_token_ids: bool | None = None
    return_progress: bool | None = None
    timings: bool | None = None
    timings_per_token: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: dict[str, Any] | None = None
    grammar: str | None = None
    priority: Annotated[int, Meta(ge=-_INT32, le=_INT32)] | None = None
    service_tier: ServiceTier | None = None
    timeout: Annotated[float, Meta(gt=0)] | None = None
    cache_salt: Annotated[str, Meta(max_length=256)] | None = None
    user: Annotated[str, Meta(max_length=512)] | None = None
    safety_identifier: Annotated[str, Meta(max_length=512)] | None = None
    metadata: Metadata | None = None


# --------------------------------------------------------------------------- chat


class ContentPart(msgspec.Struct, kw_only=True):
    """A part of a message; ``text`` is served, and ``refusal`` in an assistant's message."""

    type: PartType
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    """A function that was called: its arguments are the text of a JSON object."""

    name: ToolName
    arguments: str


class ToolCallParam(msgspec.Struct, kw_only=True):
    """A call that an assistant made."""

    id: Annotated[str, Meta(min_length=1, max_length=256)]
    type: FunctionType = "function"
    function: CalledFunction | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One message of a conversation.

    Attributes:
        role: ``system``, ``developer`` (the same), ``user``, ``assistant`` or ``tool``.
        content: Text, or parts of type ``text``; an assistant's may be ``null``.
        name: Handed to the chat template.
        tool_calls: The calls that an assistant made.
        tool_call_id: Of a ``tool`` message: the call that it is the result of.
        refusal: An assistant's refusal; taken for its content if there is none.
        reasoning_content: What an assistant thought first; handed to the chat template.
    """

    role: Role
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCallParam], Meta(max_length=1024)] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(msgspec.Struct, kw_only=True):
    """A function that the model may call.

    Attributes:
        name: Letters, digits, ``_`` and ``-``.
        description: What it does.
        parameters: The JSON schema of its arguments.
        strict: Refuse a schema with keywords that cannot be enforced.
    """

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolParam(msgspec.Struct, kw_only=True):
    """A tool; only functions are served."""

    type: FunctionType
    function: FunctionDefinition | None = None


class NamedFunction(msgspec.Struct, kw_only=True):
    """A function's name."""

    name: ToolName


class ToolChoiceTool(msgspec.Struct, kw_only=True):
    """A tool that is allowed."""

    type: FunctionType
    function: NamedFunction | None = None


class AllowedTools(msgspec.Struct, kw_only=True):
    """Some of the tools: ``mode`` is ``auto`` or ``required``."""

    mode: AllowedMode
    tools: Annotated[list[ToolChoiceTool], Meta(min_length=1)]


class ToolChoiceParam(msgspec.Struct, kw_only=True):
    """Which tools: ``type`` is ``function`` (that one must be called) or ``allowed_tools``."""

    type: ToolChoiceType
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class Prediction(msgspec.Struct, kw_only=True):
    """What the answer will probably be: ``type`` is ``content``."""

    type: PredictionType
    content: str | list[ContentPart]


class ChatRequest(GenerationRequest, kw_only=True):
    """The body of ``POST /v1/chat/completions``.

    Attributes:
        messages: The conversation.
        max_tokens: Most tokens to generate; by default up to the context length.
        max_completion_tokens: The same; its new name.
        logprobs: Tell the log-probability of each token of the answer.
        top_logprobs: And of so many of the likeliest tokens at its place.
        response_format: What the answer must look like.
        tools: The functions that the model may call.
        tool_choice: ``none``, ``auto``, ``required``, one of them, or some.
        parallel_tool_calls: Whether it may make several calls in one answer; it may by default.
        prediction: What the answer will probably be; such answers come faster.
        reasoning_effort: Handed to the chat template.
        chat_template_kwargs: More names for the chat template.
        add_generation_prompt: Whether the prompt ends with the beginning of an answer; it does by default.
        continue_final_message: Go on where the last message, an assistant's, ends.
    """

    messages: Annotated[
        list[ChatMessage], Meta(min_length=1, examples=[[{"role": "user", "content": "Hello"}]])
    ]
    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[ToolParam], Meta(max_length=128)] | None = None
    tool_choice: ToolChoiceMode | ToolChoiceParam | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """The body of ``POST /v1/completions``.

    Attributes:
        prompt: Text, token ids, or a list of either: one answer (or ``n``) for each.
        suffix: What follows the gap that is to be filled, for models with tokens for that.
        max_tokens: Most tokens to generate, by default up to the context length; 0 with ``echo`` or
            ``prompt_logprobs``: only look at the prompt.
        logprobs: Tell the log-probability of each token, and of so many of the likeliest at its place.
        echo: Put the prompt before the answer.
        best_of: Generate so many answers and give the ``n`` likeliest.
        response_format: What the answer must look like.
    """

    prompt: (
        NonEmpty
        | Annotated[list[NonEmpty | int | list[int]], Meta(extra_json_schema={"minItems": 1})]
    )
    suffix: str | None = None
    max_tokens: NaturalInt | None = None
    logprobs: TopLogprobs | None = None
    echo: bool | None = None
    best_of: PositiveInt | None = None
    response_format: ResponseFormat | None = None
