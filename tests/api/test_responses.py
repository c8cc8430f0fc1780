"""``/v1/responses`` over real HTTP: shapes by OpenAI's own schemas, events, histories, refusals."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from openai_schemas import check
from responses_http import PATH, create, decoded, refused, stream, text_of
from stoker.api.request_schemas import ChatMessage
from stoker.api.responses.items import Turn
from stoker.api.responses.truncation import fitting

if TYPE_CHECKING:
    from conftest import Running

WARNING = "x-stoker-warning"
NUMBER: dict[str, Any] = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "pick", "parameters": NUMBER, "strict": True}


def chat_text(client: httpx.Client, messages: list[dict[str, str]], num_tokens: int = 5) -> str:
    """What a chat completion of the same conversation says."""
    body = {"messages": messages, "max_tokens": num_tokens, "temperature": 0}
    answer = client.post("/v1/chat/completions", json=body).json()
    return str(answer["choices"][0]["message"]["content"])


# --------------------------------------------------------------------------- shapes


def test_a_response_is_what_a_chat_with_its_items_says(client: httpx.Client) -> None:
    response = create(client, instructions="be brief", metadata={"a": "b"}, user="ann")
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    assert text_of(response) == chat_text(client, messages)
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["id"].startswith("resp_")
    assert response["model"] == "org/scripted"
    assert response["instructions"] == "be brief"
    assert response["metadata"] == {"a": "b"}
    assert response["user"] == "ann"
    assert response["usage"]["output_tokens"] == 5
    assert response["temperature"] == 0
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "medium"}


def test_a_stream_tells_the_same_as_the_response(client: httpx.Client) -> None:
    response = create(client, max_output_tokens=8)
    events = stream(client, max_output_tokens=8)
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta",) * 8,
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    deltas = [e["delta"] for e in events if e["type"] == "response.output_text.delta"]
    assert "".join(deltas) == text_of(response) == text_of(events[-1]["response"])
    varying = {"id", "created_at", "output", "usage"}
    assert {k: v for k, v in events[-1]["response"].items() if k not in varying} == {
        k: v for k, v in response.items() if k not in varying
    }


def test_an_answer_that_ends_by_itself_is_completed(client: httpx.Client) -> None:
    text = chat_text(client, [{"role": "user", "content": "hi"}], 20)
    response = create(client, max_output_tokens=20, stop=text[10:13])
    assert response["status"] == "completed"
    assert response["incomplete_details"] is None
    assert response["completed_at"] >= response["created_at"]
    assert text_of(response) == text[: text.index(text[10:13])]


def test_items_become_messages(client: httpx.Client) -> None:
    response = create(
        client,
        input=[
            {"role": "developer", "content": "be brief"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
            {
                "type": "message",
                "role": "assistant",
                "id": "msg_mine",
                "status": "completed",
                "content": [{"type": "output_text", "text": "two", "annotations": []}],
            },
            {"role": "user", "content": [{"type": "input_text", "text": "a"}] * 2},
        ],
    )
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "a\na"},
    ]
    assert text_of(response) == chat_text(client, messages)


def test_log_probabilities_are_told_where_they_are_asked_for(client: httpx.Client) -> None:
    response = create(client, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = response["output"][0]["content"]
    assert "".join(item["token"] for item in part["logprobs"]) == part["text"]
    assert all(len(item["top_logprobs"]) == 2 for item in part["logprobs"])
    assert create(client)["output"][0]["content"][0]["logprobs"] == []
    events = stream(client, include=["message.output_text.logprobs"])
    told = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [item["token"] for some in told for item in some] == list(part["text"])


def test_a_format_is_followed(client: httpx.Client) -> None:
    wanted = {"type": "json_schema", "name": "pick", "schema": NUMBER, "strict": True}
    response = create(client, max_output_tokens=60, text={"format": wanted}, seed=3, temperature=1)
    if response["status"] == "completed":
        assert json.loads(text_of(response))["n"] in {1, 2, 3}
    assert response["text"]["format"] == wanted
    assert text_of(create(client, text={"format": {"type": "json_object"}})).startswith("{")


def test_calls_are_items(client: httpx.Client) -> None:
    body = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "pick"}}
    response = create(client, **body, max_output_tokens=200)
    (call,) = response["output"]
    assert call["type"] == "function_call"
    assert call["name"] == "pick"
    assert json.loads(call["arguments"])["n"] in {1, 2, 3}
    assert call["call_id"].startswith("call_")
    events = stream(client, **body, max_output_tokens=200)
    deltas = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
    assert "".join(deltas) == events[-1]["response"]["output"][0]["arguments"]
    assert response["tools"] == [TOOL | {"description": None}]
    # What the call came to goes back, with the items of the response or by its id.
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}
    asked = {"role": "user", "content": "hi"}
    one = create(client, tools=[TOOL], input=[asked, *response["output"], result])
    other = create(client, tools=[TOOL], input=[result], previous_response_id=response["id"])
    assert text_of(one) == text_of(other)


def test_some_tools_may_be_all_that_are_allowed(client: httpx.Client) -> None:
    other = {"type": "function", "name": "other", "parameters": {}}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{"type": "function", "name": "pick"}],
    }
    response = create(
        client,
        tools=[other, TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        max_output_tokens=200,
    )
    assert [item["name"] for item in response["output"]] == ["pick"]
    assert response["tool_choice"] == choice
    assert response["parallel_tool_calls"] is False


def test_tokens_are_counted_as_they_would_be_generated_from(client: httpx.Client) -> None:
    for body in ({"input": "hi"}, {"input": "hi", "instructions": "be brief", "tools": [TOOL]}):
        counted = client.post(f"{PATH}/input_tokens", json=body)
        check("TokenCountsResource", counted.json())
        assert counted.json()["input_tokens"] == create(client, **body)["usage"]["input_tokens"]
    bad = client.post(f"{PATH}/input_tokens", json={"input": "hi", "conversation": "c"})
    assert bad.json()["error"]["param"] == "conversation"
    bad = client.post(f"{PATH}/input_tokens", json={"input": "hi", "truncation": "some"})
    assert bad.json()["error"]["param"] == "truncation"


# --------------------------------------------------------------------------- histories


def test_a_response_is_kept_and_deleted(client: httpx.Client) -> None:
    response = create(client)
    assert client.get(f"{PATH}/{response['id']}").json() == response
    events = stream(client)
    told = events[-1]["response"]
    assert client.get(f"{PATH}/{told['id']}").json() == told
    gone = client.delete(f"{PATH}/{response['id']}")
    assert gone.json() == {"id": response["id"], "object": "response", "deleted": True}
    for answer in (
        client.get(f"{PATH}/{response['id']}"),
        client.delete(f"{PATH}/{response['id']}"),
        client.post(f"{PATH}/{response['id']}/cancel"),
        client.get(f"{PATH}/{response['id']}/input_items"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "response_not_found"
    not_kept = create(client, store=False)
    assert not_kept["store"] is False
    assert client.get(f"{PATH}/{not_kept['id']}").status_code == 404
    error = refused(client, previous_response_id=not_kept["id"])
    assert error["code"] == "previous_response_not_found"


def test_a_response_follows_others_without_their_instructions(client: httpx.Client) -> None:
    first = create(client, instructions="be brief", input="one")
    second = create(client, input="two", previous_response_id=first["id"])
    third = create(client, input="three", instructions="x", previous_response_id=second["id"])
    messages = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": text_of(first)},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": text_of(second)},
        {"role": "user", "content": "three"},
    ]
    assert text_of(third) == chat_text(client, messages)
    assert third["previous_response_id"] == second["id"]
    # Two may follow the same one.
    other = create(client, input="three", instructions="x", previous_response_id=second["id"])
    assert text_of(other) == text_of(third)


def test_what_a_response_was_made_from_is_listed_in_pages(client: httpx.Client) -> None:
    first = create(client, input="one")
    second = create(
        client,
        input=[{"role": "user", "content": f"{number}"} for number in range(3)],
        previous_response_id=first["id"],
    )
    path = f"{PATH}/{second['id']}/input_items"
    everything = client.get(path, params={"order": "asc"}).json()
    check("ResponseItemList", everything)
    texts = [item["content"][0]["text"] for item in everything["data"]]
    assert texts == ["one", text_of(first), "0", "1", "2"]
    assert everything["has_more"] is False
    found: list[Any] = []
    after: dict[str, str] = {}
    while True:
        page = client.get(path, params={"limit": "2", **after}).json()
        check("ResponseItemList", page)
        found += page["data"]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert found == everything["data"][::-1]
    for query in ({"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "nobody"}):
        answer = client.get(path, params=query)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(query))


def test_stored_items_can_be_referred_to(client: httpx.Client) -> None:
    first = create(client, input="one")
    said = first["output"][0]
    follow = {"role": "user", "content": "two"}
    asked = {"role": "user", "content": "one"}
    one = create(client, input=[asked, {"type": "item_reference", "id": said["id"]}, follow])
    other = create(client, input=[asked, said, follow])
    assert text_of(one) == text_of(other)
    error = refused(client, input=[{"id": "msg_nobody"}])
    assert (error["param"], error["code"]) == ("input.0.id", "item_not_found")


@pytest.mark.slow
def test_a_call_that_was_cut_off_is_no_part_of_what_follows(client: httpx.Client) -> None:
    body = {"tools": [TOOL], "tool_choice": {"type": "function", "name": "pick"}}
    whole = create(client, **body, max_output_tokens=200)
    for num_tokens in range(1, whole["usage"]["output_tokens"]):
        cut = create(client, **body, max_output_tokens=num_tokens)
        assert cut["status"] == "incomplete"
        create(client, input="go on", previous_response_id=cut["id"])


def test_tenants_see_their_own_only(start_server: Callable[..., Running]) -> None:
    server = start_server(server={"api_keys": ["k"], "trusted_proxies": ["127.0.0.1"]})

    def client_of(tenant: str) -> httpx.Client:
        headers = {"authorization": "Bearer k", "x-stoker-tenant": tenant}
        return httpx.Client(base_url=server.url, headers=headers, timeout=60)

    with client_of("ann") as ann, client_of("bob") as bob:
        response = create(ann)
        assert ann.get(f"{PATH}/{response['id']}").status_code == 200
        for answer in (
            bob.get(f"{PATH}/{response['id']}"),
            bob.delete(f"{PATH}/{response['id']}"),
            bob.get(f"{PATH}/{response['id']}/input_items"),
        ):
            assert answer.status_code == 404
        assert refused(bob, previous_response_id=response["id"])["code"] == (
            "previous_response_not_found"
        )
        reference = {"type": "item_reference", "id": response["output"][0]["id"]}
        assert refused(bob, input=[reference])["code"] == "item_not_found"
        assert ann.get(f"{PATH}/{response['id']}").status_code == 200


def test_the_oldest_items_are_left_out_where_all_do_not_fit(client: httpx.Client) -> None:
    items = [
        {"role": role, "content": f"{number:03} " + "x" * 96}
        for number in range(10)
        for role in ("user", "assistant")
    ]
    items.append({"role": "user", "content": "last"})
    assert refused(client, input=items)["code"] == "context_length_exceeded"
    body = {"input": items, "truncation": "auto", "instructions": "keep", "max_output_tokens": 5}
    answer = client.post(PATH, json=body | {"temperature": 0})
    assert answer.status_code == 200, answer.text
    assert "oldest messages are left out" in answer.headers[WARNING]
    left_out = int(answer.headers[WARNING].split("the ")[1].split(" ")[0])
    assert left_out % 2 == 0
    messages = [{"role": "system", "content": "keep"}, *items[left_out:]]
    assert text_of(answer.json()) == chat_text(client, messages)
    # One more exchange would not have fitted.
    messages = [{"role": "system", "content": "keep"}, *items[left_out - 2 :]]
    more = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 5})
    assert more.json()["error"]["code"] == "context_length_exceeded"
    assert answer.json()["truncation"] == "auto"
    too_long = [{"role": "user", "content": "x" * 2000}]
    assert refused(client, input=too_long, truncation="auto")["param"] == "input"
    assert WARNING not in client.post(PATH, json=body | {"input": "short"}).headers


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": "a\0"}, "input"),
        ({"input": [{"role": "user", "content": "a\0"}]}, "input.0.content"),
        ({"instructions": "a\0"}, "instructions"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user"}]}, "input.0.content"),
        ({"input": [{"type": "message", "content": "x"}]}, "input.0.role"),
        ({"input": [{"type": "computer_call"}]}, "input.0.type"),
        ({"input": [{}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "x"}]}]}, "input.0.content.0.type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input.0.content.0.text",
        ),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input.0.name"),
        (
            {
                "input": [
                    {"role": "assistant", "content": "let me see"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{"},
                ]
            },
            "input.1.arguments",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": "1"}]},
            "input.0.call_id",
        ),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input.0.call_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"background": True, "store": False}, "background"),
        ({"include": ["nonsense"]}, "include.0"),
        ({"truncation": "middle"}, "truncation"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "mcp", "server_url": "http://x"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tools": [TOOL, TOOL]}, "tools.1.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.tools"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "never",
                    "tools": [{"type": "function", "name": "pick"}],
                },
            },
            "tool_choice.mode",
        ),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        (
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "a",
                        "schema": {"type": "nonsense"},
                        "strict": True,
                    }
                }
            },
            "text.format.schema",
        ),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"service_tier": "first"}, "service_tier"),
        ({"metadata": {"a": 1}}, "metadata.a"),
    ],
)
def test_what_is_wrong_is_named_in_the_words_of_responses(
    client: httpx.Client, body: dict[str, Any], param: str
) -> None:
    error = refused(client, **body)
    if param != "metadata.a":
        assert error["param"] == param
    assert "messages" not in error["message"]
    assert "max_tokens" not in error["message"]
    assert "response_format" not in error["message"]


def test_what_is_not_served_is_named(server: Running, client: httpx.Client) -> None:
    body = {
        "input": [{"role": "user", "content": "hi", "phase": "commentary"}],
        "max_output_tokens": 1,
        "reasoning": {"effort": "low", "summary": "auto"},
        "include": ["reasoning.encrypted_content", "web_search_call.results"],
        "text": {"verbosity": "low"},
        "moderation": {"model": "x"},
        "nonsense": 1,
    }
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    warning = answer.headers[WARNING]
    for name in (
        *("input.0.phase", "reasoning.summary", "text.verbosity", "moderation", "nonsense"),
        "reasoning.encrypted_content",
    ):
        assert name in warning
    assert "web_search" not in warning
    assert answer.json()["reasoning"] == {"effort": "low", "summary": None}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nonsense", 1),
        ("moderation", {"model": "x"}),
        ("include", ["reasoning.encrypted_content"]),
    ],
)
def test_what_is_not_served_is_refused_in_strict_mode(
    strict_server: Running, field: str, value: Any
) -> None:
    with httpx.Client(base_url=strict_server.url) as client:
        error = refused(client, **{field: value})
        assert field in error["param"]
        create(client, include=["message.output_text.logprobs"], prompt_cache_key="k")


def test_a_server_that_stores_nothing_says_so(start_server: Callable[..., Running]) -> None:
    server = start_server(responses={"max_responses": 0})
    with httpx.Client(base_url=server.url) as client:
        response = create(client)
        assert response["store"] is False
        assert client.get(f"{PATH}/{response['id']}").status_code == 404
        answer = client.post(PATH, json={"input": "hi", "max_output_tokens": 1, "store": True})
        assert "stores no responses" in answer.headers[WARNING]
        assert refused(client, background=True)["param"] == "background"


def test_a_response_that_cannot_be_stored_is_answered_with_a_warning(
    start_server: Callable[..., Running],
) -> None:
    server = start_server(responses={"path": ":memory:", "max_bytes": 600})
    with httpx.Client(base_url=server.url) as client:
        answer = client.post(PATH, json={"input": "hi", "max_output_tokens": 5})
        assert answer.status_code == 200
        assert "the response is not stored" in answer.headers[WARNING]
        assert stream(client)[-1]["type"] == "response.incomplete"
        answer = client.post(PATH, json={"input": "hi", "background": True})
        assert answer.status_code == 503
        server.wait_until_idle()


def test_what_fails_after_its_beginning_is_an_event(start_server: Callable[..., Running]) -> None:
    server = start_server({"step_s": 0.002})
    num_steps = 0

    def fail(_: Any) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 5:
            raise RuntimeError("the device is gone")

    with httpx.Client(base_url=server.url) as client:
        server.runtime.before_step = fail
        events = stream(client, max_output_tokens=50)
        assert events[-1]["type"] == "response.failed"
        response = events[-1]["response"]
        assert response["status"] == "failed"
        assert response["error"]["code"] == "server_error"
        assert text_of(response)
        assert client.get(f"{PATH}/{response['id']}").json() == response
        num_steps = 4
        answer = client.post(PATH, json={"input": "other", "max_output_tokens": 5})
        assert answer.status_code == 500
        server.runtime.before_step = None
        create(client)
    server.wait_until_idle()


@pytest.mark.slow
def test_an_error_after_a_comment_still_has_a_beginning(
    start_server: Callable[..., Running],
) -> None:
    server = start_server(server={"keep_alive_s": 0.05})

    def fail(_: Any) -> None:
        time.sleep(0.3)
        raise RuntimeError("the device is gone")

    server.runtime.before_step = fail
    with httpx.Client(base_url=server.url, timeout=30) as client:
        answer = client.post(PATH, json={"input": "hi", "stream": True})
        assert answer.text.startswith(": keep-alive")
        assert [event["type"] for event in decoded(answer.text)] == [
            "response.created", "response.in_progress", "response.failed",
        ]  # fmt: skip
    server.runtime.before_step = None


def test_items_that_are_sent_again_are_listed_once(client: httpx.Client) -> None:
    first = create(client, input="one")
    again = [first["output"][0], {"role": "user", "content": "two"}]
    second = create(client, input=again, previous_response_id=first["id"])
    listed = client.get(f"{PATH}/{second['id']}/input_items").json()["data"]
    assert [item["role"] for item in listed] == ["user", "assistant", "user"]


def test_enormous_histories_are_cut_without_counting_all_of_them() -> None:
    turns = [
        Turn(ChatMessage(role="user", content=f"{number}" + "x" * 10_000), f"input.{number}")
        for number in range(100)
    ]
    counted: list[int] = []

    async def count(some: Sequence[Turn]) -> int:
        counted.append(len(some))
        return sum(len(str(turn.message.content)) for turn in some)

    left = asyncio.run(fitting(turns, count, 300))
    assert [turn.origin for turn in left] == ["input.99"]
    assert max(counted) <= 8
