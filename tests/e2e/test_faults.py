"""A third-party plugin that does everything wrong, in a real server: the server keeps serving."""

from __future__ import annotations

import concurrent.futures
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from stoker.testing import ScriptedRuntime

pytestmark = pytest.mark.slow

PLUGIN = """
import asyncio
import pathlib
import time

import stoker

RAISES, GARBAGE, SLOW = 7, 8, 9  # priorities, to tell the policy what to do


def note(word):
    with pathlib.Path("faulty.log").open("a") as log:
        log.write(word + "\\n")


class Faulty(stoker.SchedulingPolicy):
    def admission_order(self, waiting, context):
        asked = {view.priority for view in waiting}
        if RAISES in asked:
            raise ZeroDivisionError("a bug in admission_order")
        if GARBAGE in asked:
            return "nonsense"
        if SLOW in asked:
            time.sleep(1.0)
        return waiting

    def explain(self, admitted, context):
        raise KeyError("a bug in explain")


class Door(stoker.Middleware):
    def __init__(self, context):
        pass

    async def on_request(self, request):
        word = request.headers.get("x-faulty")
        if word == "raise":
            raise ZeroDivisionError("a bug in on_request")
        if word == "nothing":
            return None
        if word == "hang":
            note("hangs")
            try:
                await asyncio.sleep(3600)
            finally:
                note("let go")
        return request

    async def on_finish(self, request, records):
        if request.headers.get("x-faulty") == "late":
            note("fails at the end")
            raise ZeroDivisionError("a bug in on_finish")


class Watcher(stoker.Observer):
    def on_step(self, record):
        raise OSError("a bug in an observer")

    def on_finish(self, record):
        raise OSError("a bug in an observer")


@stoker.hookimpl
def stoker_register_policies():
    return [stoker.PolicyInfo(api_version=1, name="faulty", summary="", factory=Faulty)]


@stoker.hookimpl
def stoker_register_middleware():
    return [stoker.MiddlewareInfo(api_version=1, name="faulty", summary="", factory=Door)]


@stoker.hookimpl
def stoker_register_observers():
    return [stoker.ObserverInfo(api_version=1, name="faulty", summary="", factory=Watcher)]
"""

RAISES, GARBAGE, SLOW = 7, 8, 9


class Faulty:
    """A server with the faulty plugin.

    Args:
        served: The server.
        notes: What the plugin writes down.
    """

    def __init__(self, served: Any, notes: Path) -> None:
        self.served = served
        self.url = f"{served.url}/v1/completions"
        self._notes = notes

    def notes(self) -> list[str]:
        return self._notes.read_text().splitlines() if self._notes.exists() else []

    def log(self) -> str:
        text: str = self.served.log.read_text()
        return text

    def ask(
        self, prompt: str, headers: dict[str, str] | None = None, **fields: Any
    ) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 20, "temperature": 0.0} | fields
        return httpx.post(self.url, json=body, headers=headers, timeout=60)

    def assert_answers(self, prompts: list[str], **fields: Any) -> None:
        """Ask several at once; each gets the model's own text."""
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: self.ask(prompt, **fields), prompts))
        runtime = ScriptedRuntime()
        expected = [
            runtime.expected_text(
                runtime.tokenizer.encode(prompt, add_special=True, parse_special=True), 20
            )
            for prompt in prompts
        ]
        assert [answer.json()["choices"][0]["text"] for answer in answers] == expected

    def assert_well(self) -> None:
        self.assert_answers(["are you well?"])
        health = httpx.get(f"{self.served.url}/health")
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        assert httpx.get(f"{self.served.url}/ready").status_code == 200
        self.served.wait_for(lambda: self.served.metric("stoker_num_requests_running") == 0)
        assert self.served.metric("stoker_num_requests_waiting") == 0


@pytest.fixture
def faulty(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    site = tmp_path / "site"
    info = site / "acme_faulty-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_faulty.py").write_text(textwrap.dedent(PLUGIN))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-faulty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[stoker]\nfaulty = acme_faulty\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    config = '[scheduler]\npolicy = "faulty"\n[plugins.faulty]\n'
    with serve("scripted:m", "--lanes", "4", config=config) as served:
        yield Faulty(served, tmp_path / "faulty.log")


def test_a_policy_that_raises_or_returns_nonsense_is_counted(faulty: Faulty) -> None:
    """Every admission costs one failure of ``explain``, and perhaps one of the order."""
    for priority in (RAISES, GARBAGE):
        before = faulty.served.metric("stoker_policy_errors_total")
        faulty.assert_answers([f"prompt {i}" for i in range(12)], priority=priority)
        after = faulty.served.metric("stoker_policy_errors_total")
        assert (
            after - before >= 12 + 3
        )  # 12 explanations, and four lanes admit 12 in three turns or more
    faulty.assert_well()
    assert "policy Faulty.admission_order failed" in faulty.log()
    assert faulty.served.metric("stoker_runtime_errors_total") == 0


def test_a_policy_that_takes_a_second_slows_down_and_is_warned_of(faulty: Faulty) -> None:
    faulty.assert_answers(["a", "b", "c"], priority=SLOW)
    faulty.assert_well()
    (line,) = [
        line for line in faulty.log().splitlines() if "in which nothing was computed" in line
    ]
    assert "policy Faulty.admission_order took 1." in line


def test_middleware_that_raises_or_returns_nothing_fails_its_own_request(faulty: Faulty) -> None:
    for word in ("raise", "nothing"):
        refused = faulty.ask("x", {"x-faulty": word})
        assert refused.status_code == 500
        error = refused.json()["error"]
        assert error["code"] == "internal_error"
        assert "bug" not in error["message"]
        streamed = faulty.ask("x", {"x-faulty": word}, stream=True)
        assert streamed.status_code == 500
        faulty.assert_answers(["another"])
    late = faulty.ask("x", {"x-faulty": "late"})
    assert late.status_code == 200
    faulty.served.wait_for(lambda: "fails at the end" in faulty.notes())
    faulty.assert_well()
    log = faulty.log()
    assert "Door.on_request returned NoneType, not a Request" in log
    assert "a bug in on_request" in log
    assert "middleware Door.on_finish failed" in log


@pytest.mark.parametrize("stream", [True, False])
def test_middleware_that_hangs_is_let_go_when_its_client_leaves(
    faulty: Faulty, stream: bool
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            faulty.url,
            json={"prompt": "x", "stream": stream},
            headers={"x-faulty": "hang"},
            timeout=0.5,
        )
    faulty.assert_answers([f"prompt {i}" for i in range(8)])
    faulty.served.wait_for(lambda: faulty.notes() == ["hangs", "let go"])
    faulty.assert_well()


def test_an_observer_that_raises_costs_nobody_anything(faulty: Faulty) -> None:
    faulty.assert_answers([f"prompt {i}" for i in range(8)])
    faulty.assert_well()
    # Those after it are told all the same.
    assert faulty.served.metric("stoker_generation_tokens_total") == 9 * 20
    assert "observer Watcher failed" in faulty.log()
