"""Clients from PyPI against one server with the default model: what they return is what the server answers.

Each script runs in the environment that its client is installed in: ours, or one that ``make setup`` makes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "clients.md"
OURS, CLIENTS, OPENAI_2 = "", "clients", "clients-openai2"
CASES = [
    ("openai", OURS),
    ("openai", OPENAI_2),
    ("anthropic", OURS),
    ("litellm", OPENAI_2),
    ("langchain", CLIENTS),
    ("instructor", OPENAI_2),
    ("llama_index", OPENAI_2),
    ("llm", CLIENTS),
    ("pydantic_ai", CLIENTS),
]
COLORS = {
    "messages": [{"role": "user", "content": "Name three colors."}],
    "temperature": 0,
    "max_tokens": 30,
}


def interpreter(environment: str) -> Path:
    """The Python of an environment; the test is skipped where there is none."""
    if environment == OURS:
        return Path(sys.executable)
    path = Path(sys.prefix) / environment / "bin" / "python"
    if not path.exists():
        pytest.skip(f"there is no {path}; make setup makes it")
    return path


@pytest.fixture(scope="module")
def answer(real_server: Any) -> dict[str, Any]:
    """What the server answers without any client."""
    response = httpx.post(f"{real_server.url}/v1/chat/completions", json=COLORS, timeout=60)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize(("client", "environment"), CASES)
def test_client(
    real_server: Any, answer: dict[str, Any], client: str, environment: str, tmp_path: Path
) -> None:
    finished = subprocess.run(
        [interpreter(environment), FOLDER / f"with_{client}.py"],
        env={
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
            "STOKER_URL": real_server.url,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    returned = json.loads(finished.stdout)
    assert returned, "the script shows nothing"
    for name, value in returned.items():
        check(name, value, answer)


def check(name: str, value: Any, answer: dict[str, Any]) -> None:
    """Check what a function of a script returned, by the function's name."""
    text = answer["choices"][0]["message"]["content"]
    if name in {"plain", "by_responses", "by_command"}:
        assert value == text
    elif name in {"streamed", "stream_helper", "asynchronous", "responses_streamed"}:
        assert len(value) > 5
        assert "".join(value) == text
    elif name == "counted":
        assert value == answer["usage"]["prompt_tokens"]
    elif name == "embedded":
        red, blue = value
        assert len(red) == len(blue) > 100
        assert red != blue
        assert sum(x * x for x in red) == pytest.approx(1, abs=1e-3)
    elif name == "tool_call":
        assert value["name"] in {"get_weather", "final_result"}
        assert "Paris" in value["arguments"].values()
    elif name in {"structured", "structured_by_tools"}:
        assert is_city(value)
    elif name == "structured_and_streamed":
        assert value[0] == {"name": None, "large": None}
        assert is_city(value[-1])
    else:
        raise AssertionError(f"nothing here checks {name}")


def is_city(value: dict[str, Any]) -> bool:
    rest = value.keys() - {"name"}
    return value["name"] == "Paris" and (
        (rest == {"large"} and isinstance(value["large"], bool))
        or (rest == {"inhabitants"} and isinstance(value["inhabitants"], int))
    )


def test_every_script_is_run() -> None:
    scripts = {path.stem.removeprefix("with_") for path in FOLDER.glob("with_*.py")}
    assert scripts == {client for client, _ in CASES}


def bare(code: str) -> str:
    """Code without what formatting makes of it, for lines of the page are longer than the scripts'."""
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s+", "", code))


def test_the_pages_examples_are_the_scripts() -> None:
    shown: set[str] = set()
    for section in PAGE.read_text().split("\n## ")[1:]:
        (client,) = re.findall(r"\(\.\./tests/clients/with_(\w+)\.py\)", section)
        script = (FOLDER / f"with_{client}.py").read_text()
        script = script.replace('f"{BASE_URL}', '"http://localhost:8000')
        script = script.replace("BASE_URL", '"http://localhost:8000"')
        script = re.sub(r"\bMODEL\b", '"SmolLM2-135M-Instruct"', script)
        blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        assert blocks, f"no example for {client}"
        for block in blocks:
            assert bare(block) in bare(script), block
        shown.add(client)
    assert shown == {client for client, _ in CASES}
