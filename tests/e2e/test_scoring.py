"""What ``/v1/completions`` tells of a prompt's tokens is what llama.cpp itself says of the same file.

The texts are those that bench/lm_eval scores with lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import llama_cpp
import numpy as np
import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]

TASKS = Path(__file__).parents[2] / "bench" / "lm_eval"
TOLERANCE = 1e-2  # per token
PIECE = 16  # up to so many rows llama.cpp rounds in one and the same way


def texts() -> Iterator[tuple[str, str]]:
    """Contexts and what follows them."""
    for line in (TASKS / "prose.jsonl").read_text().splitlines():
        yield "", json.loads(line)["text"]
    for line in (TASKS / "facts.jsonl").read_text().splitlines()[:2]:
        fact = json.loads(line)
        yield from ((fact["question"], f" {choice}") for choice in fact["choices"])


@pytest.fixture(scope="module")
def llama(model_path: Path) -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(
        str(model_path), logits_all=True, n_ctx=512, n_threads=2, flash_attn=True, verbose=False
    )
    yield llama
    llama.close()


def theirs(llama: llama_cpp.Llama, tokens: list[int]) -> np.ndarray[Any, Any]:
    """The log-probabilities of all tokens but the first."""
    llama.reset()
    for start in range(0, len(tokens), PIECE):
        llama.eval(tokens[start : start + PIECE])
    rows = np.array(llama.scores[: len(tokens) - 1], dtype=np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    told: np.ndarray[Any, Any] = rows[np.arange(len(tokens) - 1), tokens[1:]]
    return told


def test_texts_are_as_likely_as_llama_cpp_says(real_server: Any, llama: llama_cpp.Llama) -> None:
    with httpx.Client(base_url=real_server.url, timeout=120) as client:
        for context, text in texts():
            before = llama.tokenize(context.encode(), add_bos=False) or [llama.token_bos()]
            tokens = before + llama.tokenize(text.encode(), add_bos=False)
            # As lm-eval asks: token ids, and one token that it throws away.
            body = {"prompt": tokens, "echo": True, "logprobs": 1, "max_tokens": 1}
            answer = client.post("/v1/completions", json=body | {"temperature": 0})
            assert answer.status_code == 200, answer.text
            told = answer.json()["choices"][0]["logprobs"]
            assert told["token_logprobs"][0] is None
            assert len(told["token_logprobs"]) == len(tokens) + 1
            ours = np.array(told["token_logprobs"][1:-1])
            expected = theirs(llama, tokens)
            at = len(before) - 1
            assert abs((ours - expected)[at:].mean()) < TOLERANCE, text
            # The likeliest token at each place is never less likely than the one that is there.
            for value, top in zip(ours, told["top_logprobs"][1:-1], strict=True):
                assert max(top.values()) >= value
