"""``/v1/files`` over HTTP: uploads as clients send them, and as they should not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import openai
import pytest

from stoker.keys import digest_of

if TYPE_CHECKING:
    from conftest import Running

SCHEMAS = json.loads((Path(__file__).parents[1] / "data" / "openai_batches.json").read_text())
TENANTS = [
    {"name": "a", "keys": [digest_of("sk-of-a")]},
    {"name": "b", "keys": [digest_of("sk-of-b")]},
]


def check(body: Any, name: str) -> None:
    """An answer is what OpenAI's document says."""
    schema = {"$ref": f"#/components/schemas/{name}", **SCHEMAS}
    jsonschema.validate(body, schema, jsonschema.Draft202012Validator)


@pytest.fixture(scope="module")
def files(
    start_server: Callable[..., Running], tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """Small bounds."""
    folder = tmp_path_factory.mktemp("batches") / "made" / "when needed"
    options = {"directory": str(folder), "max_file_bytes": 100_000, "max_total_bytes": 400_000}
    return start_server(plugins={"batches": options}, tenants=TENANTS)


@pytest.fixture
def http(files: Running) -> Iterator[httpx.Client]:
    key = {"authorization": "Bearer sk-of-a"}
    with httpx.Client(base_url=files.url, timeout=60, headers=key) as client:
        yield client
        for file in client.get("/v1/files").json()["data"]:
            assert client.delete(f"/v1/files/{file['id']}").status_code == 200


@pytest.fixture
def client(files: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{files.url}/v1", api_key="sk-of-a", max_retries=0) as client:
        yield client


def error_of(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["code"], error["param"]


def on_disk(files: Running) -> set[str]:
    options: Any = files.server.config.plugins["batches"]
    return {path.name for path in (Path(options["directory"]) / "files").iterdir()}


@pytest.mark.slow
def test_nothing_is_made_on_disk_before_it_is_needed(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    folder = tmp_path / "batches"
    server = start_server(plugins={"batches": {"directory": str(folder)}})
    empty = httpx.get(f"{server.url}/v1/files").json()
    check(empty, "ListFilesResponse")
    assert empty["data"] == []
    check(httpx.get(f"{server.url}/v1/batches").json(), "ListBatchesResponse")
    for path in ("files/file-1", "files/file-1/content", "batches/batch_1"):
        assert httpx.get(f"{server.url}/v1/{path}").status_code == 404
    assert httpx.delete(f"{server.url}/v1/files/file-1").status_code == 404
    body = {"input_file_id": "f", "endpoint": "/v1/completions", "completion_window": "24h"}
    assert error_of(httpx.post(f"{server.url}/v1/batches", json=body))[0] == 404
    assert not folder.exists()


def test_a_file_is_kept_listed_read_and_deleted(
    files: Running, client: openai.OpenAI, http: httpx.Client
) -> None:
    content = b'{"a": "\xc3\xa4\r\n--"}\n' * 3000
    made = client.files.create(file=("in put\u00e4.jsonl", content), purpose="batch")
    assert (made.bytes, made.filename, made.purpose) == (
        len(content),
        "in put\u00e4.jsonl",
        "batch",
    )
    assert made.expires_at == made.created_at + 30 * 24 * 3600
    check(http.get(f"/v1/files/{made.id}").json(), "OpenAIFile")
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).read() == content
    assert list(client.files.list()) == [made]
    check(http.get("/v1/files").json(), "ListFilesResponse")
    deleted = http.delete(f"/v1/files/{made.id}").json()
    check(deleted, "DeleteFileResponse")
    assert deleted["deleted"]
    for path in (f"/v1/files/{made.id}", f"/v1/files/{made.id}/content"):
        assert error_of(http.get(path)) == (404, "file_not_found", None)
    assert on_disk(files) == set()


def test_pages(client: openai.OpenAI, http: httpx.Client) -> None:
    made = [
        client.files.create(
            file=(f"{i}.jsonl", b"x"),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        for i in range(5)
    ]
    assert made[0].expires_at == made[0].created_at + 3600
    assert [file.id for file in client.files.list(limit=2, order="asc")] == [f.id for f in made]
    assert [f.id for f in client.files.list(limit=3)] == [f.id for f in reversed(made)]
    page = http.get("/v1/files", params={"limit": 2, "after": made[3].id}).json()
    assert [file["id"] for file in page["data"]] == [made[2].id, made[1].id]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (made[2].id, made[1].id, True)
    assert http.get("/v1/files", params={"purpose": "batch_output"}).json()["data"] == []
    for query, param in (
        ({"limit": "0"}, "limit"),
        ({"limit": "x"}, "limit"),
        ({"limit": "99999999999999999999"}, "limit"),
        ({"order": "up"}, "order"),
        ({"purpose": "vision"}, "purpose"),
    ):
        response = http.get("/v1/files", params=query)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert error_of(http.get("/v1/files?after=x")) == (404, "file_not_found", "after")
    assert http.get("/v1/files?colour=1").headers["x-stoker-warning"] == "ignored: colour"


FILE = ("file", ("a.jsonl", b"{}\n"))


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ([("purpose", (None, "batch"))], "missing_required_parameter", "file"),
        ([FILE], "missing_required_parameter", "purpose"),
        ([FILE, ("purpose", (None, "fine-tune"))], "unsupported_value", "purpose"),
        ([("purpose", (None, "assistants")), FILE], "unsupported_value", "purpose"),
        ([("purpose", (None, "batch")), FILE, FILE], None, "file"),
        ([("purpose", (None, "batch"))] * 2 + [FILE], "invalid_value", "purpose"),
        ([("purpose", (None, "x" * 5000)), FILE], "invalid_value", "purpose"),
        ([("purpose", (None, b"\xff")), FILE], "invalid_value", "purpose"),
        *(
            (
                [("purpose", (None, "batch")), ("expires_after[seconds]", (None, seconds)), FILE],
                "invalid_value",
                "expires_after",
            )
            for seconds in ("3600", "x", "")
        ),
        (
            [("purpose", (None, "batch")), ("expires_after", (None, '{"seconds": 1}')), FILE],
            "invalid_value",
            "expires_after",
        ),
        ([(f"f{i}", (None, "")) for i in range(20)], "invalid_multipart", None),
    ],
)
def test_forms_that_are_wrong(
    files: Running, http: httpx.Client, fields: Any, code: str | None, param: str | None
) -> None:
    assert error_of(http.post("/v1/files", files=fields)) == (400, code, param)
    assert on_disk(files) == set()


@pytest.mark.parametrize(
    ("content_type", "body", "code"),
    [
        ("application/json", b"{}", "invalid_content_type"),
        ("multipart/form-data", b"", "invalid_content_type"),
        ("multipart/form-data; boundary=", b"", "invalid_content_type"),
        ("multipart/form-data; boundary=x", b"", "invalid_multipart"),
        ("multipart/form-data; boundary=x", b"nonsense" * 1000, "invalid_multipart"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nhi\r\n--x--", "invalid_multipart"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nno end',
            "invalid_multipart",
        ),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data; name=" + b"y" * 9000,
            "invalid_multipart",
        ),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="\xff\xfe"\r\n\r\nv\r\n--x--',
            "invalid_multipart",
        ),
        ("multipart/form-data; boundary=\xfc", b"--x", "invalid_content_type"),
    ],
)
def test_bodies_that_are_no_forms(
    files: Running, http: httpx.Client, content_type: str, body: bytes, code: str
) -> None:
    headers = {"content-type": content_type.encode("latin-1")}
    response = http.post("/v1/files", content=body, headers=headers)
    assert error_of(response)[:2] == (400, code)
    assert on_disk(files) == set()


def test_a_body_in_tiny_pieces_is_put_together(http: httpx.Client) -> None:
    form = (
        b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="../../etc/a\\"b"\r\n\r\n'
        b"one\r\n--xy\r\ntwo\r\n--xyz\r\n"
        b'Content-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--xyz--\r\n'
    )
    pieces = (form[i : i + 3] for i in range(0, len(form), 3))
    headers = {"content-type": "multipart/form-data; boundary=xyz"}
    made = http.post("/v1/files", content=pieces, headers=headers)
    assert made.status_code == 200, made.text
    assert http.get(f"/v1/files/{made.json()['id']}/content").content == b"one\r\n--xy\r\ntwo"


def test_what_is_too_large_is_refused_and_leaves_nothing(
    files: Running, http: httpx.Client
) -> None:
    form = {"purpose": "batch"}
    large = http.post("/v1/files", data=form, files={"file": b"x" * 100_001})
    assert error_of(large) == (413, "request_too_large", None)

    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(20):
            yield b"y" * 10_000

    headers = {"content-type": "multipart/form-data; boundary=x"}
    streamed = http.post("/v1/files", content=endless(), headers=headers)
    assert error_of(streamed) == (413, "request_too_large", None)
    assert on_disk(files) == set()
    made = [http.post("/v1/files", data=form, files={"file": b"x" * 99_000}) for _ in range(5)]
    assert [response.status_code for response in made] == [200] * 4 + [413]
    assert error_of(made[4]) == (413, "storage_full", None)
    assert len(on_disk(files)) == 4
    assert http.delete(f"/v1/files/{made[0].json()['id']}").status_code == 200
    again = http.post("/v1/files", data=form, files={"file": b"x" * 99_000})
    assert again.status_code == 200


def test_a_client_that_goes_away_leaves_nothing(files: Running, http: httpx.Client) -> None:
    def broken() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhello'
        raise KeyError

    headers = {"content-type": "multipart/form-data; boundary=x"}
    with pytest.raises(KeyError):
        http.post("/v1/files", content=broken(), headers=headers)
    files.wait_until(lambda: not on_disk(files))


def test_nobody_sees_what_another_tenant_has(files: Running, http: httpx.Client) -> None:
    made = http.post("/v1/files", data={"purpose": "batch"}, files={"file": b"{}"}).json()["id"]
    for headers in ({"authorization": "Bearer sk-of-b"},):
        other = httpx.Client(base_url=files.url, headers=headers)
        assert other.get("/v1/files").json()["data"] == []
        assert other.get("/v1/files", params={"after": made}).status_code == 404
        assert other.get(f"/v1/files/{made}").status_code == 404
        assert other.get(f"/v1/files/{made}/content").status_code == 404
        assert other.delete(f"/v1/files/{made}").status_code == 404
        body = {
            "input_file_id": made,
            "endpoint": "/v1/completions",
            "completion_window": "24h",
        }
        refused = other.post("/v1/batches", json=body)
        assert error_of(refused) == (404, "file_not_found", "input_file_id")
        other.close()
    assert http.get(f"/v1/files/{made}").status_code == 200


@pytest.mark.slow
def test_a_strict_server_refuses_what_it_does_not_know(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    plugins = {"batches": {"directory": str(tmp_path)}}
    server = start_server(server={"strict": True}, plugins=plugins)
    form = {"purpose": "batch", "colour": "red"}
    refused = httpx.post(f"{server.url}/v1/files", data=form, files={"file": b"{}"})
    assert error_of(refused) == (400, "unknown_parameter", "colour")
    assert error_of(httpx.get(f"{server.url}/v1/files?a=b"))[2] == "a"


@pytest.mark.slow
def test_two_servers_do_not_share_a_directory(
    start_server: Callable[..., Running], tmp_path: Path
) -> None:
    plugins = {"batches": {"directory": str(tmp_path)}}
    first, second = (start_server(plugins=plugins) for _ in range(2))
    form: dict[str, Any] = {"data": {"purpose": "batch"}, "files": {"file": b"{}"}}
    made = httpx.post(f"{first.url}/v1/files", **form)
    assert made.status_code == 200
    refused = httpx.post(f"{second.url}/v1/files", **form)
    assert refused.status_code == 503
    assert "another server uses" in refused.json()["error"]["message"]
    assert httpx.get(f"{first.url}/v1/files/{made.json()['id']}").status_code == 200
    second.check_still_serves()


def test_the_served_document_describes_the_routes(files: Running) -> None:
    headers = {"authorization": "Bearer sk-of-a"}
    document = httpx.get(f"{files.url}/schema/openapi.json", headers=headers).json()
    assert set(document["paths"]["/v1/files"]) == {"get", "post"}
    assert "multipart/form-data" in document["paths"]["/v1/files"]["post"]["requestBody"]["content"]
    schemas = document["components"]["schemas"]
    text = json.dumps(document)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in schemas
    assert {"Batch", "BatchList", "CreateBatch", "FileObject", "FileList"} <= set(schemas)
