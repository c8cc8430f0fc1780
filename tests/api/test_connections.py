"""Hostile connections: heads and bodies that trickle or flood, pipelines, and HTTP that is none.

After each of them the server serves, and nothing is left behind; a well-behaved stream runs beside them all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from stoker.api.connection import bounded_protocol

if TYPE_CHECKING:
    from conftest import Running

pytestmark = pytest.mark.slow

TEXT = "/v1/completions"
PATIENCE_S = 0.4
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def quick(start_server: Callable[..., Running]) -> Running:
    """Loses its patience soon; keeps streams running for a while."""
    return start_server(
        {"step_s": 0.002}, server={"body_timeout_s": PATIENCE_S, "max_connections": 40}
    )


@pytest.fixture(autouse=True)
def untouched(quick: Running, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A stream beside the attack gets every token; afterwards nothing is left, and nothing went wrong."""
    body = {
        "prompt": "good",
        "max_tokens": 100,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    texts: list[str] = []
    began = threading.Event()

    def stream() -> None:
        with httpx.stream("POST", quick.url + TEXT, json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    texts.append(json.loads(line[6:])["choices"][0]["text"])
                began.set()

    reader = threading.Thread(target=stream)
    reader.start()
    began.wait(30)
    yield
    reader.join(60)
    assert "".join(texts) == quick.expected("good", 100)
    quick.check_still_serves()
    protocols = quick._uvicorn.server_state
    quick.wait_until(lambda: not protocols.connections and not protocols.tasks)
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def connect(quick: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", quick.port), timeout=30)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def trickle(connection: socket.socket, piece: bytes) -> bytes:
    """Send a little again and again, until the server closes; what it answered."""
    connection.settimeout(PATIENCE_S / 8)
    answer = b""
    for _ in range(1000):
        try:
            connection.sendall(piece)
            more = connection.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return answer
        if not more:
            return answer
        answer += more
    raise AssertionError("the server goes on for ever")


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    """The error object of a raw answer that closes the connection."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:500]
    assert b"connection: close" in head.lower()
    assert b"content-type: application/json" in head.lower()
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# --------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("path", [b"/v1/completions", b"/v1/files", b"/v1/responses", b"/tokenize"])
def test_a_body_that_trickles_ends_in_408(quick: Running, path: bytes) -> None:
    kind = b"multipart/form-data; boundary=x" if path == b"/v1/files" else b"application/json"
    with connect(quick) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: %s\r\ncontent-length: 100000\r\n\r\n"
            % (path, kind)
        )
        error = error_of(trickle(connection, b" "), 408)
    assert error["code"] == "request_timeout"
    assert error["type"] == "timeout_error"


@pytest.mark.slow
def test_a_chunked_body_that_trickles_too(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        assert error_of(trickle(connection, b"1\r\n \r\n"), 408)["code"] == "request_timeout"


@pytest.mark.slow
def test_a_body_that_does_not_come_at_all(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 9\r\n\r\n")
        answer = read_all(connection)
    proceed, _, rest = answer.partition(b"\r\n\r\n")
    assert proceed == b"HTTP/1.1 100 Continue"
    assert error_of(rest, 408)["code"] == "request_timeout"


@pytest.mark.slow
def test_a_slow_but_steady_body_is_fine(start_server: Callable[..., Running]) -> None:
    server = start_server(server={"body_timeout_s": 2.0})
    body = json.dumps({"prompt": "hi", "max_tokens": 3}).encode() + b" " * 100_000

    def pieces() -> Iterator[bytes]:
        waiter = threading.Event()
        for start in range(0, len(body), 10_000):  # longer than the patience in all
            waiter.wait(0.25)
            yield body[start : start + 10_000]

    headers = {"content-type": "application/json"}
    response = httpx.post(server.url + TEXT, content=pieces(), headers=headers)
    assert response.status_code == 200, response.text


@pytest.mark.slow
def test_a_head_that_trickles_ends_in_408(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(HEAD)
        assert error_of(trickle(connection, b"x: y\r\n"), 408)["code"] == "request_timeout"
    with connect(quick) as connection:  # the second request of a connection
        connection.sendall(GET)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(HEAD)
        assert error_of(trickle(connection, b"x: y\r\n"), 408)["code"] == "request_timeout"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"\r\n"])
def test_silent_connections_are_closed(quick: Running, sent: bytes) -> None:
    with connect(quick) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 408"))


@pytest.mark.slow
@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\n", b"POST /nothing HTTP/1.1\r\n"])
def test_a_body_that_goes_on_after_the_answer_ends_the_connection(
    quick: Running, head: bytes
) -> None:
    with connect(quick) as connection:
        connection.sendall(head + b"host: x\r\ncontent-length: 100000\r\n\r\n")
        assert trickle(connection, b" ").startswith((b"HTTP/1.1 200", b"HTTP/1.1 404"))


@pytest.mark.slow
def test_many_slow_clients_at_once(quick: Running) -> None:
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(quick)) for _ in range(30)]
        for number, connection in enumerate(slow):
            half = HEAD + (b"content-length: 50\r\n\r\n{" if number % 2 else b"x: ")
            connection.sendall(half)
        assert httpx.get(quick.url + "/health").status_code == 200
        for connection in slow:
            assert error_of(read_all(connection), 408)["code"] == "request_timeout"


# --------------------------------------------------------------------------- much


@pytest.mark.parametrize(
    "flood",
    [
        b"x-%d: " + b"y" * 1000 + b"\r\n",
        b"a%d: b\r\n",
        b"y" * 50_000,  # one endless header
    ],
    ids=["many", "small", "long"],
)
def test_a_flood_of_headers_ends_in_431(quick: Running, flood: bytes) -> None:
    sent = 0
    with connect(quick) as connection:
        connection.sendall(HEAD + (b"x: " if flood.startswith(b"yy") else b""))
        with contextlib.suppress(ConnectionError):
            while sent < 100_000_000:
                piece = b"".join(
                    flood % number if b"%d" in flood else flood for number in range(sent, sent + 50)
                )
                connection.sendall(piece)
                sent += len(piece)
        answer = read_all(connection)
    # It was not read to its end, so the answer may be lost on the way.
    assert answer == b"" or error_of(answer, 431)["code"] == "headers_too_large"
    assert sent < 50_000_000


@pytest.mark.parametrize(
    "head",
    [
        b"GET /%s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"x" * 70_000),
        b"GET /health?%s HTTP/1.1\r\nhost: x\r\n\r\n" % (b"x" * 70_000),
        b"GET /health HTTP/1.1\r\nx: %s\r\n\r\n" % (b"x" * 70_000),
        b"GET /health HTTP/1.1\r\n%s\r\n" % b"".join(b"h%d: y\r\n" % i for i in range(300)),
    ],
    ids=["path", "query", "header", "headers"],
)
def test_a_large_head_ends_in_431(quick: Running, head: bytes) -> None:
    with connect(quick) as connection:
        connection.sendall(head)
        assert error_of(read_all(connection), 431)["code"] == "headers_too_large"


def test_a_head_below_the_limits_is_fine(quick: Running) -> None:
    headers = {f"h{i}": "x" * 200 for i in range(200)}
    assert httpx.get(quick.url + "/health", headers=headers).status_code == 200
    response = httpx.get(quick.url + "/" + "x" * 60_000)
    assert response.status_code == 404


@pytest.mark.parametrize(
    "endless", [b"x: y\r\n" * 5000, b"x" * 30_000], ids=["trailers", "trailer"]
)
def test_endless_trailers_end_the_connection(quick: Running, endless: bytes) -> None:
    with connect(quick) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\nt: ")
        for _ in range(1000):
            connection.sendall(endless)
        raise AssertionError("all was taken")


def test_endless_chunk_extensions_end_the_connection(quick: Running) -> None:
    with connect(quick) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n1;")
        for _ in range(1000):
            connection.sendall(b"x" * 30_000)
        raise AssertionError("all was taken")


def test_trailers_change_nothing(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(
            HEAD + b'transfer-encoding: chunked\r\n\r\n14\r\n{"prompt": "hi there\r\n'
            b'13\r\n", "max_tokens": 1}\r\n0\r\nx-request-id: mine\r\n\r\n'
        )
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"x-request-id: mine" not in answer


def test_a_pipeline_is_answered_in_order_up_to_its_bound(quick: Running) -> None:
    with connect(quick) as connection:
        connection.sendall(GET * 10 + b"GET /no HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 10
    assert answer.count(b"HTTP/1.1 404") == 1
    with connect(quick) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(GET * 20_000)
        assert read_all(connection).count(b"HTTP/1.1") < 20_000


def test_garbage_after_a_request_does_not_get_into_its_answer(quick: Running) -> None:
    body = b'{"prompt": "hi", "max_tokens": 200, "ignore_eos": true, "stream": true}'
    with connect(quick) as connection:
        connection.sendall(
            HEAD + b"content-length: %d\r\n\r\n%s\x00\x01garbage\r\n\r\n" % (len(body), body)
        )
        assert read_all(connection).count(b"HTTP/1.1") <= 1


def test_without_a_setting_files_bound_the_connections() -> None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = bounded_protocol(1.0, 0).max_connections
    assert most == (0 if soft == resource.RLIM_INFINITY else max(16, soft - 128))
    assert bounded_protocol(1.0, 7).max_connections == 7


def test_more_connections_than_allowed_get_503(start_server: Callable[..., Running]) -> None:
    server = start_server(server={"max_connections": 5})
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(20)]
        answers = []
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(GET.replace(b"host", b"connection: close\r\nhost"))
            answers.append(read_all(connection))
    refused = [answer for answer in answers if not answer.startswith(b"HTTP/1.1 200")]
    assert 5 < len(refused) < 16
    for answer in filter(None, refused):
        assert error_of(answer, 503)["code"] == "too_many_connections"
    server.check_still_serves()


# --------------------------------------------------------------------------- strange

STRANGE = [
    b"CONNECT example.com:443 HTTP/1.1\r\nhost: example.com:443\r\n\r\n",
    b"GET http://example.com HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /%ff%fe%00 HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models/%c0%ae%c0%ae%2f HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/requests/%ff?%ff=%fe&=&&;; HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/models/..%2f..%2fetc HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /v1/files/%00/content HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/1.0\r\n\r\n",
    b"GET /health HTTP/2.0\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/1.1\nhost: x\n\n",
    b"GET /health HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n",
    b"GET /health HTTP/1.1\r\nhost : x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nx: a\r\n b\r\n\r\n",
    b"GET /health HTTP/1.1\r\nx: a\x00b\r\n\r\n",
    b"GET /health HTTP/1.1\r\n: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nx\xff: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nx: \xff\xfe\r\n\r\n",
    b"GET /v1/models HTTP/1.1\r\nauthorization: \xff\xfe\r\nx-request-id: \xff\r\n\r\n",
    b"GET /health HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"GET /health HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    b"BREW /health HTTP/1.1\r\nhost: x\r\n\r\n",
    b"TRACE /health HTTP/1.1\r\nhost: x\r\n\r\n",
    b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\n",
    HEAD + b"content-length: 0x10\r\n\r\n",
    HEAD + b"content-length: +5\r\n\r\nhello",
    HEAD + b"content-length: 5, 5\r\n\r\nhello",
    HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
    HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: gzip, chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\n-1\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n",
    HEAD + b"content-type: text/plain\r\ncontent-length: 2\r\n\r\n{}",
    HEAD + b"content-encoding: identity\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}",
]


def test_strange_requests_get_an_answer_or_a_closed_connection(quick: Running) -> None:
    for request in STRANGE:
        check_strange(quick, request)


def check_strange(quick: Running, request: bytes) -> None:
    with connect(quick) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    if not answer:
        return
    status = int(answer.split(b" ", 2)[1])
    assert status < 500, (request, answer)
    assert answer.startswith(b"HTTP/1.1 ")
    if status >= 400 and not request.startswith(b"HEAD"):
        body = answer.partition(b"\r\n\r\n")[2]
        assert b'"error"' in body, answer


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "identity, gzip"]
)
def test_bombs_are_not_unpacked(quick: Running, encoding: str) -> None:
    import gzip

    bomb = gzip.compress(b'{"prompt": "' + b"x" * 50_000_000 + b'"}')
    headers = {"content-type": "application/json", "content-encoding": encoding}
    for path in (TEXT, "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/embeddings",
                 "/tokenize", "/v1/batches"):  # fmt: skip
        response = httpx.post(quick.url + path, content=bomb, headers=headers)
        assert response.status_code == 400, (path, response.text)
        assert "encoding" in response.text or path == "/v1/batches"
