"""Bad input gets an OpenAI error object that names what is wrong, and the server goes on serving."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from conftest import Running

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
JSON = {"content-type": "application/json"}
USER = {"role": "user", "content": "hi"}


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of an answer, whose shape is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER], "max_tokens": 4, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"prompt": "hi", "max_tokens": 4, **fields}


# What is sent, which parameter is named, and a word of the message.
FIELDS: list[tuple[str, dict[str, Any], str | None, str]] = [
    (CHAT, {}, "messages", "missing"),
    (CHAT, {"messages": []}, "messages", "length"),
    (CHAT, {"messages": None}, "messages", "array"),
    (CHAT, {"messages": "hi"}, "messages", "array"),
    (CHAT, {"messages": [[]]}, "messages.0", "object"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role", "missing"),
    (CHAT, {"messages": [USER, {"role": "wizard", "content": "x"}]}, "messages.1.role", "wizard"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "int"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "null"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content", "null"),
    (CHAT, {"messages": [{"role": "user", "content": "a\0b"}]}, "messages.0.content", "NUL"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0",
        "image_url",
    ),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages.0.content.0.text",
        "missing",
    ),
    (CHAT, chat(max_completion_tokens=5), "max_completion_tokens", "differ"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options", "stream"),
    (TEXT, {}, "prompt", "missing"),
    (TEXT, text(prompt=""), "prompt", "empty"),
    (TEXT, text(prompt=[]), "prompt", "empty"),
    (TEXT, text(prompt=["a", ""]), "prompt.1", "empty"),
    (TEXT, text(prompt=[[]]), "prompt.0", "empty"),
    (TEXT, text(prompt=[1, "a"]), "prompt.0", "mixes"),
    (TEXT, text(prompt=[1, True]), "prompt.1", "bool"),
    (TEXT, text(prompt=[-1]), "prompt", "-1"),
    (TEXT, text(prompt=[100_000]), "prompt", "100000"),
    (TEXT, text(prompt="a\0b"), "prompt", "NUL"),
    (TEXT, text(prompt=["x"] * 600), "prompt", "600"),
    (TEXT, text(temperature=-0.1), "temperature", ">= 0"),
    (TEXT, text(temperature=2.1), "temperature", "<= 2"),
    (TEXT, text(temperature="hot"), "temperature", "str"),
    (TEXT, text(temperature=True), "temperature", "bool"),
    (TEXT, text(top_p=0), "top_p", "> 0"),
    (TEXT, text(top_p=1.1), "top_p", "<= 1"),
    (TEXT, text(top_k=-2), "top_k", ">= -1"),
    (TEXT, text(top_k=1.5), "top_k", "float"),
    (TEXT, text(min_p=1.5), "min_p", "<= 1"),
    (TEXT, text(repetition_penalty=0), "repetition_penalty", ">="),
    (TEXT, text(presence_penalty=2.5), "presence_penalty", "<= 2"),
    (TEXT, text(frequency_penalty=-2.5), "frequency_penalty", ">= -2"),
    (TEXT, text(max_tokens=0), "max_tokens", "nothing to answer"),
    (TEXT, text(max_tokens=10**30), "max_tokens", "<="),
    (TEXT, text(max_tokens="4"), "max_tokens", "str"),
    (TEXT, text(n=0), "n", ">= 1"),
    (TEXT, text(n=17), "n", "16"),
    (TEXT, text(n=True), "n", "bool"),
    (TEXT, text(seed=10**30), "seed", "<="),
    (TEXT, text(seed=1.5), "seed", "float"),
    (TEXT, text(logit_bias={"5": 101}), "logit_bias", "<= 100"),
    (TEXT, text(logit_bias={"five": 1}), "logit_bias", "five"),
    (TEXT, text(logit_bias={"-5": 1}), "logit_bias", "-5"),
    (TEXT, text(logit_bias={"99999999999999999999": 1}), "logit_bias", "999"),
    (TEXT, text(logit_bias={"100000": 1}), "logit_bias", "100000"),
    (TEXT, text(logit_bias=[1]), "logit_bias", "array"),
    (TEXT, text(stop=""), "stop", "empty"),
    (TEXT, text(stop=["a", ""]), "stop", "empty"),
    (TEXT, text(stop=list("abcde")), "stop", "5"),
    (TEXT, text(stop=5), "stop", "int"),
    (TEXT, text(stream="yes"), "stream", "str"),
    (TEXT, text(timeout=0), "timeout", "> 0"),
    (TEXT, text(priority=1.5), "priority", "float"),
    (TEXT, text(model=5), "model", "int"),
]


@pytest.mark.parametrize(("path", "body", "param", "word"), FIELDS)
def test_wrong_fields(
    server: Running, path: str, body: dict[str, Any], param: str | None, word: str
) -> None:
    error = check_error(httpx.post(server.url + path, json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert word in error["message"]
    server.check_still_serves()


BODIES: list[tuple[bytes, str]] = [
    (b"", "empty"),
    (b"{", "cannot be parsed"),
    (b'{"prompt": "hi"} x', "trailing"),
    (b'{"prompt": "hi", "temperature": NaN}', "invalid character"),
    (b"[]", "object"),
    (b'"hi"', "object"),
    (b'{"prompt": "\xff\xfe"}', "UTF-8"),
    (b'{"unknown": "\xff\xfe", "prompt": "hi"}', "UTF-8"),
    (b'{"prompt": "\\ud800"}', "lone surrogate"),
    (b'{"prompt": "\\ud800x"}', "lone surrogate"),
    (b'{"prompt": "\\udc00"}', "lone surrogate"),
    (b'{"prompt": "hi", "unknown": "\\udc00"}', "lone surrogate"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "`array`"),
    (b'{"prompt": "hi", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"prompt": "hi", "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "nested too deeply"),
    (b"[" * 100_000, "object"),
]


@pytest.mark.parametrize(("body", "word"), BODIES, ids=range(len(BODIES)))
def test_malformed_bodies(server: Running, body: bytes, word: str) -> None:
    error = check_error(httpx.post(server.url + TEXT, content=body, headers=JSON), 400)
    assert error["type"] == "invalid_request_error"
    assert word in error["message"]
    server.check_still_serves()


@pytest.mark.parametrize("type_", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_wrong_content_type(server: Running, type_: str | None) -> None:
    headers = {} if type_ is None else {"content-type": type_}
    response = httpx.post(server.url + TEXT, content=json.dumps(text()), headers=headers)
    assert "application/json" in check_error(response, 400)["message"]
    server.check_still_serves()


@pytest.mark.parametrize(
    "type_", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"]
)
def test_right_content_types(server: Running, type_: str) -> None:
    headers = {"content-type": type_}
    response = httpx.post(server.url + TEXT, content=json.dumps(text()), headers=headers)
    assert response.status_code == 200


def test_compressed_body_is_refused(server: Running) -> None:
    headers = {**JSON, "content-encoding": "gzip"}
    response = httpx.post(server.url + TEXT, content=b"\x1f\x8b", headers=headers)
    assert "gzip" in check_error(response, 400)["message"]


def test_unknown_model(server: Running) -> None:
    for path, body in ((CHAT, chat(model="other")), (TEXT, text(model="other\0\n"))):
        error = check_error(httpx.post(server.url + path, json=body), 404)
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
    server.check_still_serves()


@pytest.mark.parametrize("stream", [False, True])
def test_beyond_the_context(server: Running, stream: bool) -> None:
    long = {"role": "user", "content": "x" * 5000}
    for path, body in (
        (CHAT, {"messages": [long], "stream": stream}),
        (CHAT, chat(max_tokens=1024, stream=stream)),
        (TEXT, {"prompt": "x" * 5000, "stream": stream}),
        (TEXT, text(max_tokens=2**31 - 1, stream=stream)),
    ):
        error = check_error(httpx.post(server.url + path, json=body), 400)
        assert error["code"] == "context_length_exceeded"
    server.check_still_serves()


def test_large_body(server: Running) -> None:
    body = b'{"prompt": "' + b"x" * 10_000_000 + b'"}'
    error = check_error(httpx.post(server.url + TEXT, content=body, headers=JSON), 413)
    assert error["code"] == "request_too_large"

    def chunks() -> Any:  # without a content-length
        for start in range(0, len(body), 100_000):
            yield body[start : start + 100_000]

    check_error(httpx.post(server.url + TEXT, content=chunks(), headers=JSON), 413)
    server.check_still_serves()


def test_body_at_the_limit(strict_server: Running) -> None:
    def padded(size: int) -> bytes:
        body = json.dumps(text()).encode()
        return body + b" " * (size - len(body))

    url = strict_server.url + TEXT
    assert httpx.post(url, content=padded(10_000), headers=JSON).status_code == 200
    check_error(httpx.post(url, content=padded(10_001), headers=JSON), 413)


def test_announced_large_body_is_refused_before_it_is_sent(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000000000000\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 413"
    server.check_still_serves()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", CHAT),
        ("PUT", TEXT),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("PATCH", "/v1/models/org/scripted"),
    ],
)
def test_wrong_method(server: Running, method: str, path: str) -> None:
    response = httpx.request(method, server.url + path)
    error = check_error(response, 405)
    assert error["code"] == "method_not_allowed"
    assert response.headers["allow"]
    server.check_still_serves()


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/nonsense", "/schema/nonsense", "/%ff%00", "/../x"]
)
def test_unknown_path(server: Running, path: str) -> None:
    error = check_error(httpx.get(server.url + path), 404)
    assert error["code"] == "not_found"
    server.check_still_serves()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # somebody tries TLS
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        bytes(range(256)) * 64,
    ],
)
def test_garbage_on_the_socket(server: Running, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while piece := connection.recv(4096):
                answer += piece
        except ConnectionResetError:
            pass
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
    server.check_still_serves()


def test_client_that_leaves_within_its_body(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b'content-length: 1000\r\n\r\n{"prompt": '
        )
    server.check_still_serves()


# --------------------------------------------------------------------------- what is not served


def test_unknown_parameters_are_named_in_a_header(server: Running) -> None:
    body = chat(functions=[{"name": "f"}], frobnicate=1, **{"bad\r\nname: ü": "x" * 9999})
    response = httpx.post(server.url + CHAT, json=body)
    assert response.status_code == 200
    warning = response.headers["x-stoker-warning"]
    assert "unsupported parameter 'functions' ignored" in warning
    assert "unknown parameter 'frobnicate' ignored" in warning
    assert "bad\\r\\nname: \\xfc" in warning
    streamed = httpx.post(server.url + CHAT, json={**body, "stream": True})
    assert streamed.headers["x-stoker-warning"] == warning


def test_the_warning_header_is_bounded(server: Running) -> None:
    body = chat(**{f"{i}{'x' * 500}": 1 for i in range(500)})
    response = httpx.post(server.url + CHAT, json=body)
    assert response.status_code == 200
    assert "and 492 more" in response.headers["x-stoker-warning"]
    assert len(response.headers["x-stoker-warning"]) < 2000


def test_nested_parameters_are_named_too(server: Running) -> None:
    parts = [{"type": "text", "text": "hi", "image_url": "x"}]
    message = {**USER, "content": parts, "frob": 1}
    options = {"include_usage": True, "frob": 1}
    body = {"messages": [message], "max_tokens": 2, "stream": True, "stream_options": options}
    warning = httpx.post(server.url + CHAT, json=body).headers["x-stoker-warning"]
    assert "unsupported parameter 'messages.0.content.0.image_url'" in warning
    assert "unknown parameter 'messages.0.frob'" in warning
    assert "unknown parameter 'stream_options.frob'" in warning


def test_strict_mode_refuses_them(strict_server: Running) -> None:
    url = strict_server.url
    error = check_error(httpx.post(url + CHAT, json=chat(functions=[1], frob=1)), 400)
    assert (error["param"], error["code"]) == ("functions", "unsupported_parameter")
    error = check_error(httpx.post(url + TEXT, json=text(frob=1)), 400)
    assert (error["param"], error["code"]) == ("frob", "unknown_parameter")
    error = check_error(httpx.post(url + TEXT, json=text(functions=[1])), 400)
    assert error["param"] == "functions"
    error = check_error(httpx.post(url + TEXT, json=text(max_completion_tokens=4)), 400)
    assert error["param"] == "max_completion_tokens"
    strict_server.check_still_serves()


def test_what_asks_for_nothing_is_fine_in_strict_mode(strict_server: Running) -> None:
    body = chat(
        tools=[], tool_choice="auto", parallel_tool_calls=True, response_format={"type": "text"},
        logprobs=False, top_logprobs=None, store=False, metadata={"a": "b"}, user="me", functions=None,
        modalities=["text"], service_tier="auto", temperature=None, stop=None, logit_bias=None,
        stream_options=None, max_tokens=None, max_completion_tokens=4, n=None, seed=None, model=None,
    )  # fmt: skip
    response = httpx.post(strict_server.url + CHAT, json=body)
    assert response.status_code == 200, response.text
    assert "x-stoker-warning" not in response.headers
    body = text(best_of=1, echo=False, suffix=None, logprobs=None, user="me")
    assert httpx.post(strict_server.url + TEXT, json=body).status_code == 200
