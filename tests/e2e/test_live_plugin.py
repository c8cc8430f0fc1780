"""A third-party distribution with every kind of hook, at work in a real server."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

PLUGIN = """
import json
import pathlib

import stoker

LOG = pathlib.Path("acme.log")


def note(**what):
    with LOG.open("a") as log:
        log.write(json.dumps(what) + "\\n")


class LastComeFirstServed(stoker.SchedulingPolicy):
    def admission_order(self, waiting, context):
        note(policy=len(waiting))
        return sorted(waiting, key=lambda view: -view.arrival_s)


class Gate(stoker.Middleware):
    def __init__(self, context):
        self.context = context

    async def on_request(self, request):
        if request.headers.get("x-acme") == "no":
            raise stoker.RateLimitError("acme says no", retry_after_s=1.2)
        if request.headers.get("x-acme") == "crash":
            raise KeyError("acme is broken")
        return request

    async def on_finish(self, request, records):
        note(finished=[record.finish_reason for record in records])


class Counter(stoker.Observer):
    def __init__(self):
        self.steps = 0

    def on_step(self, record):
        self.steps += 1


def make_routes(context):
    from litestar import get

    @get("/acme")
    async def acme() -> dict[str, object]:
        names = [served.model_id for served in context.models()]
        return {"models": names, "steps": context.observers["acme"].steps}

    return [acme]


@stoker.hookimpl
def stoker_register_policies():
    return [stoker.PolicyInfo(api_version=1, name="acme", summary="", factory=LastComeFirstServed)]


@stoker.hookimpl
def stoker_register_middleware():
    return [stoker.MiddlewareInfo(api_version=1, name="acme", summary="", factory=Gate)]


@stoker.hookimpl
def stoker_register_observers():
    return [stoker.ObserverInfo(api_version=1, name="acme", summary="", factory=Counter)]


@stoker.hookimpl
def stoker_register_routes():
    return [stoker.RouteInfo(api_version=1, name="acme", summary="", factory=make_routes)]


@stoker.hookimpl
def stoker_server_started(context):
    note(started=[served.model_id for served in context.models()])


@stoker.hookimpl
def stoker_server_stopped(context):
    note(stopped=context.uptime_s > 0)
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The distribution, as an installer lays it out, on the path of the server's process."""
    site = tmp_path / "site"
    info = site / "acme_live-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "acme_live.py").write_text(textwrap.dedent(PLUGIN))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-live\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[stoker]\nacme = acme_live\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    return tmp_path / "acme.log"


def test_a_third_party_plugin_works_in_a_real_server(serve: Any, acme: Path) -> None:
    config = '[scheduler]\npolicy = "acme"\n[plugins.acme]\n'
    with serve("scripted:m", config=config) as served:
        url = f"{served.url}/v1/completions"
        body = {"prompt": "hello", "max_tokens": 5}
        assert httpx.post(url, json=body).status_code == 200
        refused = httpx.post(url, json=body, headers={"x-acme": "no"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
        assert refused.json()["error"]["message"] == "acme says no"
        crashed = httpx.post(url, json=body, headers={"x-acme": "crash"})
        assert crashed.status_code == 500
        assert "acme is broken" not in crashed.text
        shown = httpx.get(f"{served.url}/acme").json()
        assert shown["models"] == ["m"]
        assert shown["steps"] >= 5
        assert httpx.post(url, json=body).status_code == 200
        assert served.metric("stoker_policy_errors_total") == 0
    notes = [json.loads(line) for line in acme.read_text().splitlines()]
    assert notes[0] == {"started": ["m"]}
    assert notes[-1] == {"stopped": True}
    assert {"policy": 1} in notes
    assert notes.count({"finished": ["length"]}) == 2


def test_installed_but_not_asked_for_it_does_nothing(serve: Any, acme: Path) -> None:
    with serve("scripted:m") as served:
        body = {"prompt": "hello", "max_tokens": 5}
        headers = {"x-acme": "no"}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert httpx.get(f"{served.url}/acme").status_code == 404
    assert not acme.exists()
