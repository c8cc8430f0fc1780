"""Embeddings of the default model, through the real command, with the official client."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

MODEL = "SmolLM2-135M-Instruct"
TEXTS = [
    "The cat sat on the mat.",
    "A kitten lay on the rug.",
    "Interest rates rose by half a percent.",
]


@pytest.fixture
def client(real_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0)


def similarity(vectors: list[list[float]]) -> np.ndarray[Any, Any]:
    found = np.array(vectors)
    assert found.shape == (3, 576)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    return found @ found.T


def test_similar_texts_have_similar_vectors(client: openai.OpenAI) -> None:
    coded = client.embeddings.create(model=MODEL, input=TEXTS)  # asks for base64
    plain = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    scores = similarity([item.embedding for item in coded.data])
    assert scores[0, 1] > scores[0, 2]
    assert scores[0, 1] > scores[1, 2]
    np.testing.assert_allclose(
        [item.embedding for item in plain.data], [item.embedding for item in coded.data], atol=1e-6
    )
    assert coded.usage.total_tokens == 22
    with pytest.raises(openai.BadRequestError, match="Matryoshka"):
        client.embeddings.create(model=MODEL, input="x", dimensions=64)


async def test_at_once(real_server: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(client.embeddings.create(model=MODEL, input=text) for text in TEXTS)
        )
    scores = similarity([answer.data[0].embedding for answer in answers])
    assert scores[0, 1] > scores[0, 2]


def test_an_input_longer_than_a_step(client: openai.OpenAI) -> None:
    text = "A sentence about nothing. " * 120
    tokens = client.embeddings.create(model=MODEL, input=text).usage.total_tokens
    assert tokens > 512
    with pytest.raises(openai.BadRequestError, match="at most 2048") as caught:
        client.embeddings.create(model=MODEL, input=["x", text * 4])
    assert caught.value.param == "input.1"


def test_a_job_does_not_stop_a_stream(client: openai.OpenAI, real_server: Any) -> None:
    """While many texts are embedded, a stream brings its tokens between the batches."""
    ended: list[float] = []
    texts = [f"Text number {i} says a few words about the number {i * 7}." for i in range(60)]

    def embed() -> None:
        client.embeddings.create(model=MODEL, input=texts)
        ended.append(time.monotonic())

    job = threading.Thread(target=embed)
    job.start()
    stream = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=12, temperature=0, stream=True
    )
    arrivals = [time.monotonic() for chunk in stream if chunk.choices and chunk.choices[0].text]
    job.join()
    assert sum(arrival < ended[0] for arrival in arrivals) > 5


def test_documents_by_relevance(real_server: Any) -> None:
    body = {
        "model": MODEL,
        "query": "A cat on a mat.",
        "documents": [TEXTS[2], {"text": TEXTS[1]}, TEXTS[0]],
        "top_n": 2,
    }
    results = httpx.post(f"{real_server.url}/v1/rerank", json=body, timeout=60).json()["results"]
    assert [result["index"] for result in results] == [2, 1]


def test_tokens(real_server: Any) -> None:
    def ask(path: str, **fields: Any) -> Any:
        return httpx.post(f"{real_server.url}{path}", json=fields, timeout=60).json()

    text = "naïve ☃ <|im_end|>"
    found = ask("/tokenize", content=text)
    assert ask("/detokenize", tokens=found["tokens"])["content"] == text
    messages = [{"role": "user", "content": "Say hi."}]
    prompt = ask("/apply-template", messages=messages)["prompt"]
    assert prompt.endswith("<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")
    tokens = ask("/tokenize", messages=messages)["tokens"]
    assert ask("/tokenize", content=prompt)["tokens"] == tokens
