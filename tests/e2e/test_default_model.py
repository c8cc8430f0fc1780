"""The main job on real input: the default model, through the real command, with the official client."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

COLORS = [{"role": "user", "content": "Name three colors."}]
MODEL = "SmolLM2-135M-Instruct"
SUBJECTS = (
    "rivers engines paper gardens winter signals copper bridges windows letters markets oceans forests "
    "candles mirrors ladders valleys harbors thunder pockets silver meadows cotton planets baskets hammers "
    "lanterns orchards compasses feathers islands journeys"
).split()


@pytest.fixture
def client(real_server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="none", max_retries=0)


def is_red_blue_green(text: str | None) -> bool:
    return [word.strip(" .") for word in (text or "").split() if word.strip(" .").isalpha()] == [
        "Red",
        "Blue",
        "Green",
    ]


def test_three_colors_plain(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=COLORS, temperature=0)  # type: ignore[arg-type]
    assert is_red_blue_green(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_three_colors_streamed(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=COLORS,  # type: ignore[arg-type]
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert is_red_blue_green(text)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5


async def test_three_colors_with_the_asynchronous_client(real_server: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{real_server.url}/v1", api_key="none") as client:
        plain = await client.chat.completions.create(model=MODEL, messages=COLORS, temperature=0)  # type: ignore[arg-type]
        assert is_red_blue_green(plain.choices[0].message.content)
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=COLORS,  # type: ignore[arg-type]
            temperature=0,
            stream=True,
        )
        text = "".join([c.choices[0].delta.content or "" async for c in stream])
        assert is_red_blue_green(text)
        assert [m.id async for m in client.models.list()] == [MODEL]


def test_completions_endpoint_continues_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="One, two, three, four,", temperature=0, max_tokens=6
    )
    assert "five" in answer.choices[0].text


def test_a_prompt_that_was_rendered_by_the_client_is_the_conversation(
    client: openai.OpenAI,
) -> None:
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nName three colors.<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=30)
    assert is_red_blue_green(answer.choices[0].text)
    assert answer.usage is not None
    chat = client.chat.completions.create(model=MODEL, messages=COLORS, max_tokens=1)  # type: ignore[arg-type]
    assert chat.usage is not None
    assert answer.usage.prompt_tokens == chat.usage.prompt_tokens


def test_a_conversation_finds_its_history_in_kv(client: openai.OpenAI) -> None:
    history: list[dict[str, str]] = [
        {"role": "user", "content": "Write a sentence about the moon."}
    ]
    first = client.chat.completions.create(
        model=MODEL,
        messages=history,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=24,
    )
    history.append({"role": "assistant", "content": first.choices[0].message.content or ""})
    history.append({"role": "user", "content": "And one about the sun."})
    second = client.chat.completions.create(
        model=MODEL,
        messages=history,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=24,
    )
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens or 0
    assert first.usage is not None
    assert cached >= first.usage.prompt_tokens


def test_greedy_text_equals_the_bindings_own_completion(serve: Any, model_path: Path) -> None:
    """For 20 prompts, alone, on the same rendered prompt and the same flash-attention setting.

    Without prefix reuse, because a prompt that is computed in other pieces may be rounded otherwise.
    """
    import llama_cpp

    reference = llama_cpp.Llama(
        str(model_path), n_ctx=2048, n_threads=2, flash_attn=True, verbose=False, logits_all=False
    )
    with serve("--context", "2048", config="[cache]\nprefix_reuse = false\n") as served:
        different = _compare_greedy(served.url, reference)
    reference.close()
    assert different == []


def _compare_greedy(url: str, reference: Any) -> list[tuple[str, str, str]]:
    """Subject, the bindings' text and ours, where they differ."""
    different = []
    for subject in SUBJECTS[:20]:
        text = f"Write a sentence about {subject}."
        prompt = (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
            f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )
        reference.reset()
        completion = reference.create_completion(prompt, max_tokens=12, temperature=0.0)
        expected = completion["choices"][0]["text"]
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        got = answer["choices"][0]["message"]["content"]
        if got != expected:
            different.append((subject, expected, got))
    return different


async def test_32_streams_at_once_belong_each_to_its_own_prompt(real_server: Any) -> None:
    """Batching may flip a near tie (docs/architecture.md); it must never mix conversations."""
    prompts = [f"Write a sentence about {subject}." for subject in SUBJECTS]
    assert len(prompts) == 32

    async def ask(client: httpx.AsyncClient, prompt: str) -> str:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 12,
            "temperature": 0,
            "stream": True,
        }
        text = ""
        url = f"{real_server.url}/v1/chat/completions"
        async with client.stream("POST", url, json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text

    async with httpx.AsyncClient(timeout=120) as client:
        alone = [await ask(client, prompt) for prompt in prompts]
        together = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
    equal = sum(one == many for one, many in zip(alone, together, strict=True))
    mixed = [
        (prompts[at], text)
        for at, text in enumerate(together)
        if text != alone[at] and text in alone
    ]
    assert mixed == []
    # A text that parted at a near tie still is about its own subject, as far as this model's are.
    assert equal >= 16, f"only {equal} of 32 texts are equal; batching should rarely flip a token"


def test_closing_16_streams_midway_frees_their_lanes(real_server: Any) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "stream": True}
    with httpx.Client(timeout=60) as http:
        streams = []
        for number in range(16):
            json_body = body | {"prompt": f"{number}. Once upon a time"}
            request = http.build_request(
                "POST", f"{real_server.url}/v1/completions", json=json_body
            )
            streams.append(http.send(request, stream=True))
        readers = [stream.iter_bytes() for stream in streams]
        for reader in readers:
            next(reader)
        assert real_server.metric("stoker_num_requests_running") == 16
        before = real_server.metric("stoker_request_success_total")
        for stream in streams:
            stream.close()
    real_server.wait_for(lambda: real_server.metric("stoker_num_requests_running") == 0)
    assert real_server.metric("stoker_kv_cache_usage_ratio") == 0
    assert real_server.metric("stoker_request_success_total") == before + 16
    generated = real_server.metric("stoker_generation_tokens_total")
    httpx.get(f"{real_server.url}/health")
    assert real_server.metric("stoker_generation_tokens_total") == generated


def test_control_tokens_in_user_text_open_no_turn(real_server: Any) -> None:
    """The template writes three <|im_start|>; what the user types costs several tokens of text each."""

    def prompt_tokens(text: str) -> int:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0}
        answer = httpx.post(f"{real_server.url}/v1/chat/completions", json=body, timeout=60)
        return int(answer.json()["usage"]["prompt_tokens"])

    plain = prompt_tokens("x")
    assert prompt_tokens("x<|im_end|>") >= plain + 4
    assert prompt_tokens("x<|im_start|>system\n") >= plain + 6
