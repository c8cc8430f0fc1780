"""``/v1/embeddings`` and ``/v1/rerank`` over real HTTP, with the scripted model."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest

from openai_schemas import check
from stoker.keys import digest_of

if TYPE_CHECKING:
    from conftest import Running

BEGIN, MODEL = 256, "org/scripted"
WIDTH = 32


def expected(server: Running, text: str, dimensions: int | None = None) -> np.ndarray[Any, Any]:
    """The unit vector of a text."""
    return unit(server, [BEGIN, *text.encode()], dimensions)


def unit(server: Running, tokens: list[int], dimensions: int | None = None) -> Any:
    vector = server.runtime.expected_vector(tokens)[:dimensions].astype(np.float64)
    return vector / np.linalg.norm(vector)


def embed(client: httpx.Client, given: Any, **fields: Any) -> Any:
    response = client.post("/v1/embeddings", json={"input": given, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: httpx.Client, path: str = "/v1/embeddings", **fields: Any) -> Any:
    response = client.post(path, json=fields)
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.fixture(scope="module")
def cut(start_server: Callable[..., Running]) -> Running:
    """Its vectors may be cut, and its inputs have at most 50 tokens."""
    return start_server({"matryoshka": True, "max_input_tokens": 50})


@pytest.fixture
def cut_client(cut: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cut.url, timeout=60) as client:
        yield client


@pytest.mark.parametrize(
    ("given", "inputs"),
    [
        ("hello", [[BEGIN, *b"hello"]]),
        (["hello"], [[BEGIN, *b"hello"]]),
        (["a", "bb", "a"], [[BEGIN, *b"a"], [BEGIN, *b"bb"], [BEGIN, *b"a"]]),
        ([104, 105], [[104, 105]]),
        ([[104, 105], [1]], [[104, 105], [1]]),
        (["hi", [104, 105]], [[BEGIN, *b"hi"], [104, 105]]),
        ("<|end|>", [[BEGIN, *b"<|end|>"]]),  # no control token: what is embedded is others' text
    ],
)
def test_each_kind_of_input(
    server: Running, client: httpx.Client, given: Any, inputs: list[list[int]]
) -> None:
    body = embed(client, given)
    check("CreateEmbeddingResponse", body)
    assert (body["object"], body["model"]) == ("list", MODEL)
    assert [item["index"] for item in body["data"]] == list(range(len(inputs)))
    assert {item["object"] for item in body["data"]} == {"embedding"}
    for item, tokens in zip(body["data"], inputs, strict=True):
        np.testing.assert_allclose(item["embedding"], unit(server, tokens), atol=1e-7)
    total = sum(map(len, inputs))
    assert body["usage"] == {"prompt_tokens": total, "total_tokens": total}


def test_base64_holds_the_same_numbers(client: httpx.Client) -> None:
    texts = ["one", "two and more", "drei"]
    numbers = [item["embedding"] for item in embed(client, texts)["data"]]
    coded = embed(client, texts, encoding_format="base64", user="me")["data"]
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in coded]
    np.testing.assert_allclose(decoded, numbers, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1.0, rtol=1e-6)


def test_dimensions_of_vectors_that_may_be_cut(cut: Running, cut_client: httpx.Client) -> None:
    for dimensions in (1, 7, WIDTH):
        vector = embed(cut_client, "some text", dimensions=dimensions)["data"][0]["embedding"]
        assert len(vector) == dimensions
        np.testing.assert_allclose(vector, expected(cut, "some text", dimensions), atol=1e-7)


def test_dimensions_of_vectors_that_may_not(client: httpx.Client) -> None:
    assert len(embed(client, "x", dimensions=WIDTH)["data"][0]["embedding"]) == WIDTH
    error = refused(client, input="x", dimensions=8)
    assert error["param"] == "dimensions"
    assert "Matryoshka" in error["message"]


def test_more_dimensions_than_there_are(cut_client: httpx.Client) -> None:
    error = refused(cut_client, input="x", dimensions=33)
    assert (error["param"], error["code"]) == ("dimensions", "invalid_value")
    assert "have 32" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [[1], []]}, "input.1"),
        ({"input": [1, "a"]}, "input.0"),
        ({"input": ["a", 1]}, "input.1"),
        ({"input": [1, 261]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [["a"]]}, "input.0.0"),
        ({"input": [[1, 2], [3, 10**12]]}, "input.1"),
        ({"input": "a\0b"}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 1.5}, "dimensions"),
        ({"input": ["a", "b" * 50, "c"]}, "input.1"),
        ({"input": "a" * 50}, "input"),
    ],
)
def test_bad_inputs_are_named(cut_client: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert refused(cut_client, **fields)["param"] == param


def test_the_longest_input_and_one_that_is_longer(cut_client: httpx.Client) -> None:
    assert embed(cut_client, "x" * 49)["usage"]["total_tokens"] == 50
    error = refused(cut_client, input=["x", "x" * 50])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input.1")
    assert "51 tokens" in error["message"]
    assert "at most 50" in error["message"]


def test_a_model_that_does_not_embed(start_server: Callable[..., Running]) -> None:
    server = start_server({"embed": False})
    with httpx.Client(base_url=server.url) as client:
        error = refused(client, input="x")
        assert (error["code"], error["param"]) == ("embeddings_not_supported", "model")
        assert refused(client, "/v1/rerank", query="x", documents=["y"])["code"] == error["code"]
    server.check_still_serves()


def test_a_model_that_is_not_there(client: httpx.Client) -> None:
    response = client.post("/v1/embeddings", json={"input": "x", "model": "other"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_what_is_not_served_is_named(client: httpx.Client, strict_server: Running) -> None:
    body = {"input": "x", "input_type": "query", "colour": 1, "user": "me", "dimensions": None}
    response = client.post("/v1/embeddings", json=body)
    warning = response.headers["x-stoker-warning"]
    assert warning == (
        "unsupported parameter 'input_type' ignored; unknown parameter 'colour' ignored"
    )
    strict = httpx.post(f"{strict_server.url}/v1/embeddings", json=body)
    assert strict.status_code == 400
    assert strict.json()["error"]["param"] == "input_type"
    body = {"query": "x", "documents": [{"text": "a", "title": "b"}], "rank_fields": ["title"]}
    warning = client.post("/v1/rerank", json=body).headers["x-stoker-warning"]
    assert "'rank_fields'" in warning
    assert "'documents.0.title'" in warning


def test_a_request_is_known_and_explained(client: httpx.Client) -> None:
    headers = {"x-request-id": "to-embed", "x-stoker-explain": "1"}
    response = client.post("/v1/embeddings", json={"input": ["ab", "c"]}, headers=headers)
    explained = response.headers["x-stoker-explain"]
    assert '"prompt_tokens":5' in explained
    details = client.get("/v1/requests/to-embed").json()
    assert details["status"] == "finished"
    assert details["sequences"][0]["computed_tokens"] == 5


def test_large_answers_are_whole(server: Running, client: httpx.Client) -> None:
    texts = [f"text number {i}" for i in range(2048)]
    body = embed(client, texts)
    assert len(body["data"]) == 2048
    for index in (0, 1, 17, 2047):
        vector = body["data"][index]["embedding"]
        np.testing.assert_allclose(vector, expected(server, texts[index]), atol=1e-7)


@pytest.mark.slow
def test_clients_of_both_kinds_at_once(server: Running) -> None:
    """Everybody gets what is theirs, and requests' inputs share batches."""
    batches = server.server.loops["cpu"].embedders[0].num_batches

    def ask(i: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            if i % 2:
                prompt = f"prompt {i}"
                body = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
                text = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
                assert text == server.expected(prompt, 40)
            else:
                texts = [f"{i} {j}" for j in range(20)]
                for text, item in zip(texts, embed(client, texts)["data"], strict=True):
                    np.testing.assert_allclose(item["embedding"], expected(server, text), atol=1e-7)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(32)))
    # 320 inputs, 16 in a full batch: alone each request would need 2.
    assert server.server.loops["cpu"].embedders[0].num_batches - batches <= 32
    server.wait_until_idle()


@pytest.mark.slow
async def test_a_client_that_goes_away_is_not_embedded_for(
    start_server: Callable[..., Running],
) -> None:
    server = start_server({"token_s": 0.001})
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        texts = ["x" * 500] * 200
        asking = asyncio.ensure_future(client.post("/v1/embeddings", json={"input": texts}))
        while not server.server.router.num_active:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    server.wait_until_idle()
    assert server.server.loops["cpu"].embedders[0].num_batches < 150
    server.check_still_serves()


@pytest.mark.slow
async def test_it_can_be_cancelled_and_times_out(start_server: Callable[..., Running]) -> None:
    server = start_server({"token_s": 0.001})
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        body = {"input": ["x" * 500] * 100}
        headers = {"x-request-id": "cancel-me"}
        asking = asyncio.ensure_future(client.post("/v1/embeddings", json=body, headers=headers))
        while not server.server.router.num_active:
            await asyncio.sleep(0.01)
        cancelled = await client.delete("/v1/requests/cancel-me")
        assert cancelled.json()["cancelled"] is True
        response = await asking
        assert response.json()["error"]["code"] == "request_cancelled"
        late = await client.post("/v1/embeddings", json={**body, "timeout": 0.3})
        assert late.status_code == 408
        assert late.json()["error"]["code"] == "deadline_exceeded"
        assert "of 100 inputs embedded" in late.json()["error"]["message"]
    server.wait_until_idle()


@pytest.mark.slow
def test_the_queue_is_bounded(start_server: Callable[..., Running]) -> None:
    server = start_server(
        {"token_s": 0.0001}, admission={"max_queue_tokens": 20_000, "max_queue_requests": 3}
    )

    def ask(i: int) -> int:
        body = {"input": ["x" * 200] * 20}
        return httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60).status_code

    with ThreadPoolExecutor(24) as pool:
        statuses = list(pool.map(ask, range(24)))
    assert set(statuses) == {200, 429}
    server.wait_until_idle()


@pytest.mark.slow
def test_a_failing_input_hurts_nobody_else(start_server: Callable[..., Running]) -> None:
    server = start_server({"step_s": 0.002})

    def fail(inputs: Any) -> None:
        if any(ord("!") in tokens for tokens in inputs):
            raise RuntimeError("no exclamation marks")

    server.runtime.before_embed = fail

    def ask(i: int) -> httpx.Response:
        text = f"text {i}" + ("!" if i % 4 == 0 else "")
        return httpx.post(f"{server.url}/v1/embeddings", json={"input": ["a", text]}, timeout=60)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(24)))
    for i, answer in enumerate(answers):
        assert answer.status_code == (500 if i % 4 == 0 else 200), answer.text
        if i % 4 == 0:
            assert "RuntimeError" in answer.json()["error"]["message"]
        else:
            vector = answer.json()["data"][1]["embedding"]
            np.testing.assert_allclose(vector, expected(server, f"text {i}"), atol=1e-7)
    server.wait_until_idle()


def test_keys_and_tenants(start_server: Callable[..., Running]) -> None:
    secret = "sk-team-0123456789abcdef"
    tenants = [{"name": "team", "keys": [digest_of(secret)], "tokens_per_minute": 20}]
    server = start_server(tenants=tenants, server={"api_keys": ["sk-other-0123456789abcdef"]})
    url = f"{server.url}/v1/embeddings"
    assert httpx.post(url, json={"input": "x"}).status_code == 401
    headers = {"authorization": f"Bearer {secret}"}
    first = httpx.post(url, json={"input": "0123456789"}, headers=headers)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-tokens"] == "9"
    second = httpx.post(url, json={"input": "0123456789"}, headers=headers)
    assert second.status_code == 429


# --------------------------------------------------------------------------- rerank


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
def test_documents_are_sorted_by_relevance(client: httpx.Client, path: str) -> None:
    documents = ["zzzz", {"text": "a cat sat"}, "the cat sat on a mat", "qqq"]
    response = client.post(path, json={"query": "the cat sat on a mat", "documents": documents})
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["results"][0]["index"] == 2
    assert body["results"][0]["relevance_score"] == pytest.approx(1.0)
    assert body["results"][0]["document"] == {"text": "the cat sat on a mat"}
    scores = [result["relevance_score"] for result in body["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in body["results"]) == [0, 1, 2, 3]
    assert body["usage"]["total_tokens"] == 5 + 20 + 4 + 9 + 20 + 3
    assert body["model"] == MODEL


def test_top_n_and_documents_left_out(server: Running, client: httpx.Client) -> None:
    body = {"query": "ab", "documents": ["xy", "ab", "b"], "top_n": 2, "return_documents": False}
    results = client.post("/v1/rerank", json=body).json()["results"]
    assert [result["index"] for result in results] == [1, 2]
    assert all(result.get("document") is None for result in results)
    score = float(expected(server, "ab") @ expected(server, "b"))
    assert results[1]["relevance_score"] == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": ["a", ""]}, "documents.1"),
        ({"query": "a", "documents": [{"text": ""}]}, "documents.0.text"),
        ({"query": "a", "documents": [{}]}, "documents.0.text"),
        ({"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": ["a"] * 2048}, "documents"),
        ({"query": "a", "documents": ["b", {"text": "a" * 50}]}, "documents.1.text"),
    ],
)
def test_bad_documents_are_named(
    cut_client: httpx.Client, fields: dict[str, Any], param: str
) -> None:
    assert refused(cut_client, "/v1/rerank", **fields)["param"] == param


# --------------------------------------------------------------------------- OpenAI's client


def test_the_openai_client(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.embeddings.create(model=MODEL, input=["one", "two"])  # asks for base64
        for item, text in zip(answer.data, ["one", "two"], strict=True):
            np.testing.assert_allclose(item.embedding, expected(server, text), atol=1e-7)
        floats = client.embeddings.create(model=MODEL, input="one", encoding_format="float")
        np.testing.assert_allclose(floats.data[0].embedding, answer.data[0].embedding, atol=1e-9)
        assert answer.usage.prompt_tokens == 8
        with pytest.raises(openai.BadRequestError, match="Matryoshka"):
            client.embeddings.create(model=MODEL, input="one", dimensions=3)


async def test_the_asynchronous_openai_client(server: Running) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        texts = [f"text {i}" for i in range(10)]
        answers = await asyncio.gather(
            *(client.embeddings.create(model=MODEL, input=text) for text in texts)
        )
    for text, answer in zip(texts, answers, strict=True):
        np.testing.assert_allclose(answer.data[0].embedding, expected(server, text), atol=1e-7)
