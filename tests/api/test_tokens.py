"""``/tokenize``, ``/detokenize``, ``/apply-template``, what is never served, and ``/v1/models``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import openai
import pytest

from openai_schemas import check
from stoker.api.unserved import UNSERVED

if TYPE_CHECKING:
    from conftest import Running

BEGIN, MODEL = 256, "org/scripted"
END, USER, ASSISTANT = 257, 258, 259
MESSAGES = [{"role": "user", "content": "hi <|end|>"}]
RENDERED = "<|begin|><|user|>hi <|end|><|end|><|assistant|>"
RENDERED_TOKENS = [BEGIN, USER, *b"hi <|end|>", END, ASSISTANT]


def ask(client: httpx.Client, path: str, **fields: Any) -> Any:
    response = client.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_what_harnesses_ask_of_a_tokenizer(client: httpx.Client) -> None:
    info = client.get("/tokenizer_info").json()
    assert (info["model"], info["bos_token"], info["eos_token"]) == (MODEL, "<|begin|>", "<|end|>")
    assert info["model_max_length"] == 1024
    assert info["chat_template"]
    assert client.get("/tokenizer_info", params={"model": MODEL}).json() == info
    missing = client.get("/tokenizer_info", params={"model": "another"})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"prompt": "ab"}, [BEGIN, *b"ab"]),
        ({"content": "ab"}, [*b"ab"]),
        ({"prompt": "ab", "add_special_tokens": False}, [*b"ab"]),
        ({"content": "ab", "add_special": True}, [BEGIN, *b"ab"]),
        ({"content": "ab", "add_special": True, "add_special_tokens": True}, [BEGIN, *b"ab"]),
        ({"content": "a<|end|>"}, [*b"a", END]),
        ({"content": "a<|end|>", "parse_special": False}, [*b"a<|end|>"]),
        ({"content": ""}, []),
        ({"messages": MESSAGES}, RENDERED_TOKENS),
        ({"messages": MESSAGES, "add_special_tokens": False, "model": MODEL}, RENDERED_TOKENS),
    ],
)
def test_tokens(client: httpx.Client, fields: dict[str, Any], tokens: list[int]) -> None:
    body = ask(client, "/tokenize", **fields)
    assert body["tokens"] == tokens
    assert body["count"] == len(tokens)
    assert body["max_model_len"] == 1024
    assert body["token_strs"] is None


def test_texts_and_pieces(client: httpx.Client) -> None:
    body = ask(client, "/tokenize", content="é<|end|>a", with_pieces=True, return_token_strs=True)
    assert body["tokens"] == [
        {"id": 0xC3, "piece": [0xC3]},
        {"id": 0xA9, "piece": [0xA9]},
        {"id": END, "piece": "<|end|>"},
        {"id": ord("a"), "piece": "a"},
    ]
    assert body["token_strs"] == ["\ufffd", "\ufffd", "<|end|>", "a"]


def test_long_texts(client: httpx.Client) -> None:
    tokens = ask(client, "/tokenize", content="x" * 100_000)["tokens"]
    assert tokens == [ord("x")] * 100_000
    assert ask(client, "/detokenize", tokens=tokens)["content"] == "x" * 100_000


def test_texts_of_tokens(client: httpx.Client) -> None:
    tokens = [BEGIN, *"naïve ☃".encode(), END, 0xFF]
    text = "<|begin|>naïve ☃<|end|>\ufffd"
    assert ask(client, "/detokenize", tokens=tokens) == {"prompt": text, "content": text}
    assert ask(client, "/detokenize", tokens=[])["content"] == ""


def test_prompts_of_messages(client: httpx.Client) -> None:
    assert ask(client, "/apply-template", messages=MESSAGES) == {"prompt": RENDERED}
    long = [{"role": "user", "content": "y" * 50_000}]
    assert "y" * 50_000 in ask(client, "/apply-template", messages=long)["prompt"]


def test_whatever_shapes_a_prompt(client: httpx.Client) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    messages = [*MESSAGES, {"role": "assistant", "content": "he"}]
    shapes: list[dict[str, Any]] = [
        {},
        {"tools": [tool]},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
    ]
    texts = set()
    for fields in shapes:
        text = ask(client, "/apply-template", messages=messages, **fields)["prompt"]
        tokens = ask(client, "/tokenize", messages=messages, **fields)["tokens"]
        assert ask(client, "/detokenize", tokens=tokens)["content"] == text
        answer = ask(client, "/v1/chat/completions", messages=messages, max_tokens=1, **fields)
        assert answer["usage"]["prompt_tokens"] == len(tokens)
        texts.add(text)
    assert len(texts) == len(shapes)
    assert any("weather" in text for text in texts)
    assert any(text.endswith("he") for text in texts)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "content": "a"}, "content"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        (
            "/tokenize",
            {"content": "a", "add_special": True, "add_special_tokens": False},
            "add_special",
        ),
        ("/tokenize", {"messages": MESSAGES, "add_special": True}, "add_special"),
        ("/tokenize", {"messages": MESSAGES, "parse_special": True}, "parse_special"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": [{"role": "god", "content": "a"}]}, "messages.0.role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, 261]}, "tokens.1"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": []}, "messages"),
    ],
)
def test_bad_requests_are_named(
    client: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    response = client.post(path, json=fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/apply-template"])
def test_what_is_not_served_is_named(
    client: httpx.Client, strict_server: Running, path: str
) -> None:
    given = {"/tokenize": {"content": "a"}, "/detokenize": {"tokens": [1]}}
    body = {**given.get(path, {"messages": MESSAGES}), "colour": 1}
    assert "'colour'" in client.post(path, json=body).headers["x-stoker-warning"]
    strict = httpx.post(f"{strict_server.url}{path}", json=body)
    assert (strict.status_code, strict.json()["error"]["param"]) == (400, "colour")
    missing = client.post(path, json={**body, "model": "other"})
    assert missing.status_code == 404


# --------------------------------------------------------------------------- never served


@pytest.mark.parametrize("name", sorted(UNSERVED))
def test_what_is_never_served_says_so(client: httpx.Client, name: str) -> None:
    for method, path in (("POST", f"/v1/{name}"), ("GET", f"/v1/{name}/some/thing")):
        response = client.request(method, path)
        assert response.status_code == 501
        error = response.json()["error"]
        assert error["code"] == "endpoint_not_supported"
        assert error["message"].startswith(f"{method} {path}: ")
        assert UNSERVED[name] in error["message"]


def test_openais_client_does_not_try_again(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5) as client:
        with pytest.raises(openai.InternalServerError, match="does not serve speech") as caught:
            client.audio.speech.create(model=MODEL, voice="alloy", input="hello")
        assert caught.value.status_code == 501
        assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
        with pytest.raises(openai.InternalServerError, match="images"):
            client.images.generate(prompt="a cat")
        with pytest.raises(openai.InternalServerError, match="fine-tuning"):
            client.fine_tuning.jobs.list()
        with pytest.raises(openai.InternalServerError, match="moderation"):
            client.moderations.create(input="hello")


# --------------------------------------------------------------------------- models


def test_models_are_as_openai_describes_them(server: Running, client: httpx.Client) -> None:
    check("ListModelsResponse", client.get("/v1/models").json())
    check("Model", client.get(f"/v1/models/{MODEL}").json())
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        (model,) = client.models.list().data
        assert client.models.retrieve(model.id) == model
    assert model.id == MODEL
    assert model.object == "model"
    assert isinstance(model.created, int)
    assert isinstance(model.owned_by, str)


def test_the_document_describes_these_endpoints(client: httpx.Client) -> None:
    document = client.get("/schema/openapi.json").json()
    paths = document["paths"]
    for path in ("/v1/embeddings", "/v1/rerank", "/tokenize", "/detokenize", "/apply-template"):
        assert "requestBody" in paths[path]["post"]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/embeddings", {"input": ["a"], "encoding_format": "base64"}),
        ("/v1/embeddings", {}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "return_documents": False}),
        ("/tokenize", {"content": "é", "with_pieces": True, "return_token_strs": True}),
        ("/detokenize", {"tokens": [1]}),
        ("/detokenize", {"tokens": [1000]}),
        ("/apply-template", {"messages": MESSAGES}),
    ]
    for path, body in bodies:
        response = client.post(path, json=body)
        responses = paths[path]["post"]["responses"]
        described = responses.get(str(response.status_code), responses["default"])
        schema = described["content"]["application/json"]["schema"]
        jsonschema.validate(response.json(), {**schema, "components": document["components"]})
    assert not any(path.startswith(f"/v1/{name}") for name in UNSERVED for path in paths)
    for name in ("EmbeddingRequest", "EmbeddingList", "Rerank", "Tokenization"):
        assert name in document["components"]["schemas"]
