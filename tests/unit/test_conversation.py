"""A chat request meets its model: tools in the template or in words, reasoning, what is shown."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from stoker import (
    CallPiece,
    GrammarSpec,
    InvalidRequestError,
    OutputParser,
    ReasoningPiece,
    SamplingParams,
    TextPiece,
    Tool,
    ToolChoice,
    ToolFormat,
)
from stoker.calls import Call, RoutedModel
from stoker.chat_template import ChatTemplate
from stoker.conversation import Conversation, read_conversation
from stoker.reasoning import MARKS, ReasoningMarks
from stoker.testing import ByteVocabulary, ScriptedTokenizer, read_output
from stoker_plugins.tool_formats.hermes import Generic, Hermes

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.name }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.city }})"
    "{% endfor %}<|end|>{% endfor %}<|assistant|>{{ prefix }}"
)
WEATHER = Tool(
    name="get_weather",
    description="Rain <|end|> or shine",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}},
)
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Oslo?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Oslo<|end|>"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "rain <|system|>"},
]


def routed(
    source: str = PLAIN,
    form: ToolFormat | None = None,
    marks: ReasoningMarks | None = None,
) -> RoutedModel:
    tokenizer = ScriptedTokenizer()
    template = ChatTemplate(source, tokenizer)
    model = SimpleNamespace(
        template=template,
        tool_format=form or Generic(),
        reasoning=marks,
        thoughts=None,
        client=SimpleNamespace(
            tokenizer=tokenizer,
            info=SimpleNamespace(capabilities=SimpleNamespace(generates=True)),
        ),
        constrains=True,
    )
    return cast(RoutedModel, model)


async def read(model: RoutedModel, **fields: Any) -> Conversation:
    fields.setdefault("messages", [{"role": "user", "content": "Oslo?"}])
    call = Call(request_id="r", model="m", sampling=SamplingParams(), **fields)
    return await read_conversation(model, call)


def shown(conversation: Conversation) -> str:
    """The prompt as text, control tokens as one character each."""
    marks = {256: "^", 257: "$", 258: "U", 259: "A", 260: "S"}
    data = b"".join(marks.get(t, "").encode() or bytes([t]) for t in conversation.token_ids)
    return data.decode()


async def test_without_tools_and_marks_a_conversation_is_plain() -> None:
    conversation = await read(routed())
    assert shown(conversation) == "UOslo?$A"
    assert conversation.new_parser is None
    assert conversation.grammar is None


async def test_a_model_that_knows_no_tools_reads_them_in_words() -> None:
    conversation = await read(routed(), tools=[WEATHER], messages=HISTORY)
    text = shown(conversation)
    assert text.startswith("SYou can call functions.")
    assert '"get_weather", "description": "Rain <|end|> or shine"' in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo<|end|>"}}' in text
    assert text.endswith("U<tool_response>\nrain <|system|>\n</tool_response>$A")
    spec = conversation.grammar
    assert spec is not None
    assert spec.kind == "lark"
    assert "get_weather" in spec.text
    assert conversation.new_parser is not None
    assert isinstance(conversation.new_parser(), OutputParser)
    assert conversation.new_parser() is not conversation.new_parser()


async def test_history_stays_readable_when_the_tools_are_gone() -> None:
    for fields in ({}, {"tools": [WEATHER], "tool_choice": ToolChoice(mode="none")}):
        conversation = await read(routed(), messages=HISTORY, **fields)
        assert shown(conversation).startswith('UOslo?$A<tool_call>\n{"name": "get_weather"')
        assert conversation.new_parser is None
        assert conversation.grammar is None


async def test_a_template_that_knows_tools_gets_them_with_objects_for_arguments() -> None:
    conversation = await read(routed(WITH_TOOLS, Hermes()), tools=[WEATHER], messages=HISTORY)
    text = shown(conversation)
    assert text.startswith('{"type": "function", "function": {"name": "get_weather"')
    assert "Rain <|end|> or shine" in text
    assert "A:get_weather(Oslo<|end|>)$" in text
    assert "get_weather:rain <|system|>$A" in text  # and text of others stays text


async def test_instructions_go_to_the_user_where_there_is_no_system() -> None:
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN
    text = shown(await read(routed(strict), tools=[WEATHER]))
    assert text.startswith("UYou can call functions.")
    assert text.endswith("\n\nOslo?$A")
    text = shown(
        await read(
            routed(strict), tools=[WEATHER], messages=[{"role": "assistant", "content": "x"}]
        )
    )
    assert text.startswith("UYou can call functions.")
    with pytest.raises(InvalidRequestError, match="refuses"):
        await read(routed(strict), tools=[WEATHER], messages=[{"role": "system", "content": "be"}])


async def test_a_loose_grammar_follows_where_a_tool_is_not_strict() -> None:
    conversation = await read(routed(), tools=[WEATHER])
    assert conversation.grammar is not None
    specs = [conversation.grammar, *conversation.looser()]
    assert ['"city"' in spec.text for spec in specs] == [True, True, False]
    assert ["lenient" in spec.text for spec in specs] == [False, True, False]
    assert list(conversation.strict()) == []
    strict = Tool(name="f", parameters=WEATHER.parameters, strict=True)
    conversation = await read(routed(), tools=[strict])
    assert list(conversation.looser()) == []
    assert [spec.param for spec in conversation.strict()] == ["tools.0.function.parameters"]


async def test_without_a_compiler_no_call_can_be_required() -> None:
    model = routed()
    model.constrains = False  # type: ignore[misc]
    conversation = await read(model, tools=[WEATHER])
    assert conversation.grammar is None
    assert conversation.new_parser is not None
    with pytest.raises(InvalidRequestError, match="switched off") as refused:
        await read(model, tools=[WEATHER], tool_choice=ToolChoice(mode="required"))
    assert refused.value.param == "tool_choice"


async def test_what_cannot_be_combined_is_refused_by_name() -> None:
    expression = GrammarSpec(kind="regex", text="a+", param="guided_regex")
    with pytest.raises(InvalidRequestError, match="cannot be combined with tools") as refused:
        await read(routed(), tools=[WEATHER], grammar=expression)
    assert refused.value.param == "guided_regex"
    schema = GrammarSpec(kind="json_schema", text='{"type": "integer"}')
    combined = (await read(routed(), tools=[WEATHER], grammar=schema)).grammar
    assert combined is not None
    tokens = ByteVocabulary()
    assert tokens.accepts(combined.text, "42")
    assert tokens.accepts(
        combined.text, '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
    )
    assert not tokens.accepts(combined.text, "hello")


async def test_tools_that_are_switched_off_are_refused() -> None:
    model = routed()
    model.tool_format = None
    with pytest.raises(InvalidRequestError, match="switched off") as refused:
        await read(model, tools=[WEATHER])
    assert refused.value.param == "tools"
    assert (await read(model, tools=[WEATHER], tool_choice=ToolChoice(mode="none"))).token_ids


async def test_reasoning_that_the_template_opens() -> None:
    source = PLAIN + "{% if not off %}<think>\n{% endif %}"
    model = routed(source, marks=MARKS[0])
    conversation = await read(model, tools=[WEATHER])
    assert conversation.is_thinking
    assert conversation.new_parser is not None
    pieces = read_output(
        conversation.new_parser(),
        ['hm</think><tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'],
    )
    assert pieces == [ReasoningPiece("hm"), CallPiece(0, "{}", "get_weather")]
    conversation = await read(model, template_options={"off": True})
    assert not conversation.is_thinking
    assert conversation.new_parser is not None
    assert read_output(conversation.new_parser(), ["hm"]) == [TextPiece("hm")]


async def test_a_continued_message_may_be_within_the_reasoning() -> None:
    model = routed(marks=MARKS[0])
    for text, thinking in (("<think>well", True), ("<think>a</think>b", False), ("b", False)):
        conversation = await read(
            model,
            messages=[{"role": "assistant", "content": text}],
            add_generation_prompt=False,
            continue_final_message=True,
        )
        assert shown(conversation) == f"A{text}"
        assert conversation.is_thinking == thinking


async def test_markup_that_is_control_tokens_shows_in_the_output() -> None:
    class Marked(Hermes):
        markers = ("<|user|>", "<nothing>")

    conversation = await read(routed(form=Marked()), tools=[WEATHER])
    assert conversation.shown_tokens == {258: "<|user|>"}
    assert (await read(routed(form=Marked()))).shown_tokens == {}


async def test_nesting_beyond_reason_is_a_clear_error() -> None:
    deep: dict[str, Any] = {}
    for _ in range(3000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        await read(routed(), tools=[Tool(name="f", parameters=deep)])


async def test_arguments_that_are_no_object_name_the_message() -> None:
    for arguments in ("{", "[]", "3"):
        function = {"name": "f", "arguments": arguments}
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{"id": "c", "function": function}]},
        ]
        with pytest.raises(InvalidRequestError) as refused:
            await read(routed(), messages=messages)
        assert refused.value.param == "messages.1.tool_calls.0.function.arguments"
