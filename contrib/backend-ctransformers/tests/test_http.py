"""A legacy model behind the whole server, asked by OpenAI's client."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openai
import pytest
import uvicorn

from legacy_ggml import make_model
from stoker import LoadSettings, LocalModel
from stoker.config import Config
from stoker.discovery import load_plugins
from stoker.server import build_server
from stoker_backend_ctransformers.backend import CTransformersBackend
from stoker_backend_ctransformers.options import CTransformersOptions

PROMPTS = ["hello world", "the end of the world", "x = 1\n", "naïve café " * 5]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("http") / "gpt2-tiny.bin"
    model = make_model("gpt2")
    # Text that is UTF-8, so that it can be compared: no token of a single byte above ASCII wins.
    model.tensors["model/lm_head"] = model.tensors["model/wte"].copy()
    model.tensors["model/lm_head"][128:256] = 0
    path.write_bytes(model.to_bytes())
    return path


@pytest.fixture(scope="module")
def client(model_file: Path) -> Iterator[openai.OpenAI]:
    raw = {
        "models": [{"model": str(model_file), "id": "tiny", "lanes": 3}],
        "plugins": {"ctransformers": {"self_test": False}},
        "performance": {"threads": 1},
        "responses": {"path": ":memory:"},
    }
    server = build_server(msgspec.convert(raw, Config), load_plugins(only=["ctransformers"]))
    server.start()
    listening = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(server.app, lifespan="on", log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(web.serve(sockets=[listening])))
    thread.start()
    deadline = time.monotonic() + 30
    while not web.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made
    web.should_exit = True
    thread.join()
    listening.close()
    server.stop()


@pytest.fixture(scope="module")
def expected(model_file: Path, build_step: Any) -> dict[str, str]:
    """What the model writes after each prompt, without a server."""
    settings = LoadSettings(lanes=1, threads=1, options=CTransformersOptions(self_test=False))
    local = LocalModel(path=model_file, model_id="tiny", reference="tiny")
    runtime = CTransformersBackend().load(local, settings)
    texts = {}
    for prompt in PROMPTS:
        runtime.truncate(0, 0)
        fresh, position = runtime.tokenizer.encode(prompt, add_special=True, parse_special=False), 0
        made: list[int] = []
        while len(made) < 12 and not runtime.info.end_token_ids.intersection(made):
            best = int(np.argmax(runtime.step(build_step((0, fresh, position))).logits[0]))
            position += len(fresh)
            made.append(best)
            fresh = [best]
        texts[prompt] = runtime.tokenizer.decode(made)
    runtime.close()
    return texts


def test_text_completions(client: openai.OpenAI, expected: dict[str, str]) -> None:
    for prompt, text in expected.items():
        answer = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, temperature=0
        )
        assert answer.choices[0].text == text
    assert len(set(expected.values())) > 1


def test_streams_side_by_side(client: openai.OpenAI, expected: dict[str, str]) -> None:
    """More at once than there are lanes."""

    def ask(prompt: str) -> str:
        stream = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=12, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, PROMPTS * 3)) == [expected[prompt] for prompt in PROMPTS * 3]


def test_chat_uses_the_plain_form_where_a_file_has_no_template(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0
    )
    plain = client.completions.create(
        model="tiny",
        prompt="<|endoftext|>User: hello\n\nAssistant:",
        max_tokens=5,
        temperature=0,
    )
    assert answer.choices[0].message.content == plain.choices[0].text
    assert answer.usage is not None
    assert plain.usage is not None
    assert answer.usage.prompt_tokens == plain.usage.prompt_tokens


def test_what_the_model_cannot_do_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt="a b" * 200, max_tokens=5)
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(model="tiny", input="hello")
    assert 400 <= caught.value.status_code < 500
