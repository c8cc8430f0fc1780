"""``/v1/messages``: what it refuses, in Anthropic's words and with the client's names for things."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Running

MODEL = "org/scripted"
PATH = "/v1/messages"
HI = [{"role": "user", "content": "hi there"}]
BODY = {"model": MODEL, "max_tokens": 6, "messages": HI}
CALL = {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}}
CALLED = {"role": "assistant", "content": [CALL]}
SCHEMA = {"type": "object", "properties": {}}
TOOL = {"name": "f", "input_schema": SCHEMA}


def check_error(response: httpx.Response, status: int, kind: str) -> Any:
    """Check that it is an error in Anthropic's words; returns what is in it."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    assert body["error"]["type"] == kind
    assert body["error"]["message"]
    return body["error"]


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def after_call(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*HI, CALLED, {"role": "user", "content": list(blocks)}]}


def assistant(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [*HI, {"role": "assistant", "content": list(blocks)}, *HI]}


MALFORMED: list[tuple[str, dict[str, Any]]] = [
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": "6"}),
    ("messages", {"messages": []}),
    ("messages", {"messages": [{"role": "assistant", "content": ""}]}),
    ("messages.0.role", {"messages": [{"role": "tool", "content": "x"}]}),
    ("messages.0.content", {"messages": [{"role": "user"}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": "a\0b"}]}),
    ("messages.0.content.0.type", user({"text": "x"})),
    ("messages.0.content.0.text", user({"type": "text"})),
    ("messages.0.content.1.text", user({"type": "text", "text": ""}, {"type": "text", "text": 3})),
    ("messages.0.content.0.type", user({"type": "image", "source": {"type": "base64"}})),
    ("messages.0.content.0.type", user({"type": "document"})),
    ("messages.0.content.0.type", user(CALL)),
    ("messages.0.content.0.type", user({"type": "thinking", "thinking": "x"})),
    (
        "messages.0.content.0.tool_use_id",
        user({"type": "tool_result", "tool_use_id": "a", "content": "x"}),
    ),
    ("messages.2.content.0.tool_use_id", after_call({"type": "tool_result", "content": "x"})),
    (
        "messages.2.content.0.content.0.type",
        after_call({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}),
    ),
    ("messages.1.content.0.type", assistant({"type": "server_tool_use", "id": "x"})),
    ("messages.1.content.0.id", assistant({**CALL, "id": None})),
    ("messages.1.content.0.name", assistant({**CALL, "name": None})),
    ("messages.1.content.0.input", assistant({**CALL, "input": None})),
    ("messages.1.content.0.input", assistant({**CALL, "input": "{}"})),
    ("messages.1.content.1.id", assistant(CALL, CALL)),
    ("messages.1.content.0.thinking", assistant({"type": "thinking", "signature": "x"})),
    ("messages.1", {"messages": [*HI, CALLED]}),
    ("system.0.type", {"system": [{"type": "image"}]}),
    ("system.0.text", {"system": [{"type": "text", "text": "\0"}]}),
    ("temperature", {"temperature": 1.5}),
    ("top_p", {"top_p": 0}),
    ("top_k", {"top_k": -1}),
    ("stop_sequences.0", {"stop_sequences": [""]}),
    ("stop_sequences", {"stop_sequences": ["x"] * 65}),
    ("tools.0.type", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
    ("tools.0.name", {"tools": [{"name": "a b", "input_schema": SCHEMA}]}),
    ("tools.1.name", {"tools": [TOOL, TOOL]}),
    ("tools.0.input_schema", {"tools": [{"name": "f"}]}),
    ("tools.0.input_schema.type", {"tools": [{"name": "f", "input_schema": {"type": "array"}}]}),
    ("tools.0.description", {"tools": [{**TOOL, "description": "\0"}]}),
    ("tool_choice", {"tool_choice": {"type": "any"}}),
    ("tool_choice.type", {"tools": [TOOL], "tool_choice": {"type": "required"}}),
    ("tool_choice.name", {"tools": [TOOL], "tool_choice": {"type": "tool"}}),
    ("tool_choice.name", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}),
    ("tool_choice.name", {"tools": [TOOL], "tool_choice": {"type": "auto", "name": "f"}}),
    ("thinking.type", {"thinking": {"type": "always"}}),
    ("thinking.display", {"thinking": {"type": "adaptive", "display": "loud"}}),
    ("output_config.effort", {"output_config": {"effort": "none"}}),
    ("output_config.format.type", {"output_config": {"format": {"type": "xml"}}}),
    ("output_config.format.schema", {"output_config": {"format": {"type": "json_schema"}}}),
    (
        "output_config.format.schema",
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
    ),
    (
        "output_format",
        {
            "output_format": {"type": "json_schema", "schema": SCHEMA},
            "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        },
    ),
    ("service_tier", {"service_tier": "priority"}),
    ("speed", {"speed": "fast"}),
    ("metadata.user_id", {"metadata": {"user_id": 7}}),
]


@pytest.mark.parametrize(("param", "fields"), MALFORMED)
def test_malformed_requests(client: httpx.Client, param: str, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        error = check_error(
            client.post(PATH, json=BODY | fields | {"stream": stream}),
            400,
            "invalid_request_error",
        )
        assert error["details"]["param"] == param
        assert param in error["message"]


@pytest.mark.parametrize("path", [PATH, f"{PATH}/count_tokens"])
def test_bodies_that_are_none(client: httpx.Client, path: str) -> None:
    headers = {"content-type": "application/json"}
    deep = b'{"messages":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
    for content in (b"", b"{", b"[]", b"\xff", b'"x"', deep, b'{"messages": 1}'):
        response = client.post(path, content=content, headers=headers)
        check_error(response, 400, "invalid_request_error")
    check_error(client.post(path, content=b"{}"), 400, "invalid_request_error")
    huge = b'{"model": "%s", "max_tokens": 1, "messages": %s}' % (
        MODEL.encode(),
        json.dumps([*HI, {**CALLED, "content": [{**CALL, "input": {"x": "HUGE"}}]}, *HI])
        .replace('"HUGE"', "1e999")
        .encode(),
    )
    error = check_error(
        client.post(path, content=huge, headers=headers), 400, "invalid_request_error"
    )
    assert error["details"]["param"] == "messages.1.content.0.input"


def test_missing_fields(client: httpx.Client) -> None:
    for name in ("max_tokens", "messages"):
        body = {key: value for key, value in BODY.items() if key != name}
        error = check_error(client.post(PATH, json=body), 400, "invalid_request_error")
        assert error["details"] == {"error_code": "missing_required_parameter", "param": name}
        assert error["message"] == f"'{name}' is missing"


def test_prompts_that_are_too_long(client: httpx.Client) -> None:
    body = BODY | {"messages": [{"role": "user", "content": "x" * 2000}]}
    error = check_error(client.post(PATH, json=body), 400, "invalid_request_error")
    assert error["details"]["error_code"] == "context_length_exceeded"


def test_other_errors(client: httpx.Client, server: Running) -> None:
    check_error(client.post(PATH, json=BODY | {"model": "no"}), 404, "not_found_error")
    check_error(
        client.post(f"{PATH}/count_tokens", json={"model": "no", "messages": HI}),
        404,
        "not_found_error",
    )
    check_error(client.get(PATH), 405, "invalid_request_error")
    check_error(client.post(f"{PATH}/batches", json={}), 404, "not_found_error")
    check_error(
        client.get("/v1/models/no", headers={"anthropic-version": "1"}), 404, "not_found_error"
    )
    # Others are told in OpenAI's words.
    for path in ("/v1/models/no", "/v1/message"):
        assert set(client.get(path).json()) == {"error"}
    server.check_still_serves()


def test_unknown_and_unserved_parameters(client: httpx.Client, strict_server: Running) -> None:
    fields: dict[str, Any] = {
        "mcp_servers": [{"type": "url"}],
        "container": "x",
        "nonsense": 1,
        "system": [{"type": "text", "text": "x", "citations": [{"type": "char_location"}]}],
    }
    response = client.post(PATH, json=BODY | fields)
    assert response.status_code == 200
    assert response.headers["x-stoker-warning"] == (
        "unsupported parameter 'mcp_servers' ignored; unsupported parameter 'container' ignored; "
        "unknown parameter 'nonsense' ignored; unsupported parameter 'system.0.citations' ignored"
    )
    for name, value in fields.items():
        answer = httpx.post(f"{strict_server.url}{PATH}", json=BODY | {name: value})
        error = check_error(answer, 400, "invalid_request_error")
        assert error["details"]["param"].startswith(name)
    thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}}
    answer = httpx.post(f"{strict_server.url}{PATH}", json=BODY | thinking)
    error = check_error(answer, 400, "invalid_request_error")
    assert error["details"]["param"] == "thinking.budget_tokens"


def test_what_the_official_client_sends_is_known(strict_server: Running) -> None:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    with anthropic.Anthropic(base_url=strict_server.url, api_key="none", max_retries=0) as official:
        message = official.messages.create(
            model=MODEL,
            max_tokens=3,
            messages=[
                *HI,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": ""},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "let me see", "cache_control": None},
                        {**CALL, "cache_control": {"type": "ephemeral", "ttl": "5m"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "a",
                            "is_error": False,
                            "content": "1",
                        }
                    ],
                },
            ],
            system=[{"type": "text", "text": "be", "cache_control": {"type": "ephemeral"}}],
            tools=[
                {
                    "name": "f",
                    "type": "custom",
                    "description": "does it",
                    "input_schema": SCHEMA,
                    "strict": True,
                    "cache_control": {"type": "ephemeral"},
                }
            ],
            tool_choice={"type": "auto", "disable_parallel_tool_use": True},
            thinking={"type": "disabled"},
            metadata={"user_id": "x"},
            service_tier="standard_only",
            stop_sequences=["x"],
            output_config={"effort": "low"},
        )
        assert message.usage.output_tokens
        with pytest.raises(anthropic.RequestTooLargeError) as caught:
            official.messages.create(
                model=MODEL, max_tokens=3, messages=[{"role": "user", "content": "x" * 20_000}]
            )
    assert caught.value.type == "request_too_large"
    assert caught.value.error_code == "request_too_large"


@pytest.mark.slow
def test_keys(start_server: Any) -> None:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    server = start_server(server={"api_keys": ["secret"]})
    server.auth = {"x-api-key": "secret"}
    check_error(httpx.post(f"{server.url}{PATH}", json=BODY), 401, "authentication_error")
    models = httpx.get(f"{server.url}/v1/models", headers={"anthropic-version": "1"})
    check_error(models, 401, "authentication_error")
    assert set(httpx.get(f"{server.url}/v1/models").json()) == {"error"}
    for key in ({"api_key": "secret"}, {"auth_token": "secret"}):
        with anthropic.Anthropic(base_url=server.url, max_retries=0, **key) as official:
            assert official.messages.create(model=MODEL, max_tokens=1, messages=HI).content
            assert official.models.list().data
    with (
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as official,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        official.messages.create(model=MODEL, max_tokens=1, messages=HI)
    assert caught.value.type == "authentication_error"
    assert caught.value.request_id
    elsewhere = {"x-api-key": "secret", "x-stoker-tenant": "other"}
    response = httpx.post(f"{server.url}{PATH}", json=BODY, headers=elsewhere)
    check_error(response, 403, "permission_error")


def test_an_error_within_a_stream(slow_server: Running) -> None:
    import anthropic  # its import takes seconds, and is not needed to collect tests

    """A request that is cancelled through the API while it streams."""
    seen: list[str] = []
    with anthropic.Anthropic(base_url=slow_server.url, api_key="none", max_retries=0) as official:
        stream = official.messages.create(
            **BODY | {"max_tokens": 900},
            stream=True,
            extra_headers={"x-request-id": "to-be-cancelled"},
        )
        seen += [next(stream).type for _ in range(4)]
        httpx.delete(f"{slow_server.url}/v1/requests/to-be-cancelled").raise_for_status()
        with pytest.raises(anthropic.APIStatusError) as caught:
            seen += [event.type for event in stream]
    assert seen[0] == "message_start"
    assert "message_stop" not in seen
    assert caught.value.type == "invalid_request_error"
    assert caught.value.error_code == "request_cancelled"


def test_a_server_that_stops(start_server: Any) -> None:
    server = start_server()
    server.server.router.draining = True
    try:
        response = httpx.post(f"{server.url}{PATH}", json=BODY)
    finally:
        server.server.router.draining = False
    check_error(response, 503, "overloaded_error")
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.slow
def test_deadlines_and_full_queues(start_server: Any) -> None:
    server = start_server({"step_s": 0.02}, admission={"request_timeout_s": 0.2})
    body = BODY | {"max_tokens": 900}
    check_error(httpx.post(f"{server.url}{PATH}", json=body), 408, "timeout_error")
    with httpx.stream("POST", f"{server.url}{PATH}", json=body | {"stream": True}) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-2] == "event: error"
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "timeout_error"
