"""The prefix cache of a server in a process of its own: what is shown, what stays, what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

SCRIPTED = "[plugins.scripted]\nsnapshot = true\ntoken_s = 0.0005\n"


def complete(served: Any, prompt: str, max_tokens: int = 4, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **fields}
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stoker", "cache", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def prompts(count: int) -> list[str]:
    """Prompts that have nothing in common."""
    return [f"{chr(65 + i)} is number {i} of many, and long. " * 24 for i in range(count)]


def test_the_command_shows_hits_sizes_evictions_and_why(serve: Any) -> None:
    config = f"{SCRIPTED}[cache]\nhost_bytes = 1000000\n"
    with serve("scripted:m", "--lanes", "2", config=config) as served:
        for prompt in (*prompts(5), prompts(5)[4] + "again"):
            complete(served, prompt)
        page = cli("--url", served.url)
        assert page.returncode == 0, page.stderr
        assert "m (eviction lru)" in page.stdout
        assert " of 6 requests, " in page.stdout
        assert "takeover" in page.stdout
        rows = [line.split() for line in page.stdout.splitlines()]
        assert ["lane", "2"] in [row[:2] for row in rows]
        assert ["host", "3"] in [row[:2] for row in rows]
        answer = json.loads(cli("--url", served.url, "--json").stdout)
        totals = answer["data"][0]["totals"]
        assert totals["hit_tokens"] == served.metric("stoker_prefix_cache_hit_tokens_total") > 600
        assert answer["data"][0]["recent"][0]["stored"] is True
        assert served.metric("stoker_prefix_cache_evictions_total") == 3
        dropped = cli("--url", served.url, "--clear")
        assert dropped.stdout == "m: dropped 5 kept prefixes\n"
        assert cached(complete(served, prompts(5)[0])) == 0


def test_what_was_evicted_comes_back_also_after_a_restart(serve: Any, tmp_path: Any) -> None:
    config = f"""{SCRIPTED}
[cache]
host_bytes = 15000
disk_bytes = 10000000
disk_path = "{tmp_path / "snapshots"}"
"""
    with serve("scripted:m", "--lanes", "1", config=config) as served:
        truth = [complete(served, prompt)["choices"][0]["text"] for prompt in prompts(8)]
        # The first one's lane was lost to seven others, and host memory holds no more than two.
        answer = complete(served, prompts(8)[0])
        assert cached(answer) > 700
        assert answer["choices"][0]["text"] == truth[0]
    files = list((tmp_path / "snapshots").glob("*/*.kv"))
    assert len(files) >= 7
    files[0].write_bytes(files[0].read_bytes()[:-5])
    with serve("scripted:m", "--lanes", "1", config=config) as served:
        assert "found)" in served.log.read_text()
        # The cost of computing is not known yet: the first one may be computed anew.
        answers = [complete(served, prompt) for prompt in prompts(8)]
        assert [answer["choices"][0]["text"] for answer in answers] == truth
        assert sum(cached(answer) > 700 for answer in answers) >= 4
        totals = httpx.get(f"{served.url}/v1/cache").json()["data"][0]["totals"]
        assert totals["damaged_files"] == 1
        assert totals["hits_by_way"]["restore"] >= 4
        with serve("scripted:m", "--lanes", "1", config=config) as second:
            totals = httpx.get(f"{second.url}/v1/cache").json()["data"][0]["totals"]
            assert "used by another server" in totals["disk_problem"]
            assert complete(second, prompts(8)[1])["choices"][0]["text"] == truth[1]


def test_a_bad_warm_up_file_is_one_clear_line(tmp_path: Any) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "good"}\n{"messages": 5}\n')
    (tmp_path / "stoker.toml").write_text('[cache]\nwarm_up = ["bad.jsonl"]\n')
    command = [sys.executable, "-m", "stoker", "serve", "scripted:m", "--port", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cache.warm_up[0]: bad.jsonl, line 2" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_on_the_command_line() -> None:
    both = cli("--watch", "--json")
    assert both.returncode == 2
    assert "--watch goes with neither" in both.stderr
    nobody = cli("--url", "http://127.0.0.1:9")
    assert nobody.returncode == 1
    assert "no server answers" in nobody.stderr


@pytest.mark.model
def test_a_real_models_prefix_comes_back_from_host_memory_with_the_same_text(serve: Any) -> None:
    """Two lanes, three long prompts in turn: each takes a lane of another one, and finds its own again."""
    texts = [f"{name} was a sailor who had seen all seas. " * 12 for name in ("Ann", "Bo", "Cy")]
    config = "[cache]\nhost_bytes = 500000000\n"
    with serve("--lanes", "1", "--context", "1024", config=config) as served:
        fresh = [complete(served, text, 16) for text in texts]
        again = [complete(served, text, 16) for text in texts]
        assert [cached(answer) for answer in fresh] == [0, 0, 0]
        assert all(cached(answer) > 50 for answer in again)
        assert [a["choices"][0]["text"] for a in again] == [a["choices"][0]["text"] for a in fresh]
        totals = httpx.get(f"{served.url}/v1/cache").json()["data"][0]["totals"]
        assert totals["hits_by_way"]["restore"] >= 2
        assert totals["store_errors"] == 0
