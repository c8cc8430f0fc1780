"""Keys and tenants change while ``stoker serve`` runs."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow

QUICK = '[server]\ntenant_keys_file = "keys.toml"\nreload_s = 0.2\n'
ON_SIGNAL = '[server]\ntenant_keys_file = "keys.toml"\nreload_s = 0\n'
SLOW = "[[models]]\nmodel = 'scripted:m'\noptions = {step_s = 0.01}\n"


@pytest.fixture
def keys(tmp_path: Path) -> Any:
    """Runs ``stoker keys ...`` in the server's folder; returns what it printed."""

    def run(*arguments: str) -> str:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
        command = [sys.executable, "-m", "stoker", "keys", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run


def first_key(keys: Any) -> str:
    return str(keys("new", "first", "--file", "keys.toml"))


def status(served: Any, key: str, **headers: str) -> int:
    response = httpx.get(
        f"{served.url}/v1/models", headers={"authorization": f"Bearer {key}", **headers}
    )
    return response.status_code


def is_healthy(served: Any) -> bool:
    return httpx.get(f"{served.url}/health").json()["status"] == "ok"


def test_a_new_key_works_and_a_revoked_one_does_not_without_a_restart(
    serve: Any, keys: Any
) -> None:
    first = first_key(keys)
    with serve("scripted:m", config=QUICK) as served:
        assert status(served, first) == 200
        assert status(served, "wrong") == 401
        second = keys("new", "second", "--name", "laptop")
        served.wait_for(lambda: status(served, second) == 200)
        assert status(served, first) == 200
        for line in keys("list").splitlines():
            if "first" in line or "second" in line:
                keys("revoke", line.split()[0])
        served.wait_for(lambda: status(served, first) == 401)
        served.wait_for(lambda: status(served, second) == 401)
        # The last key is gone: nobody gets in, as nobody would expect a revoked key to open all doors.
        served.wait_for(lambda: "no key is left" in served.log.read_text())
        assert httpx.get(f"{served.url}/v1/models").status_code == 401
        assert is_healthy(served)
        third = keys("new", "third")
        served.wait_for(lambda: status(served, third) == 200)
        log = served.log.read_text()
        assert "configuration read again: tenants none; keys 2" in log
        assert not any(key in log for key in (first, second, third))
        assert "Traceback" not in log


def test_a_signal_reads_again_and_requests_in_flight_go_on(serve: Any, keys: Any) -> None:
    first = first_key(keys)
    body = {"prompt": "hello", "max_tokens": 150, "temperature": 0}
    with (
        serve(config=ON_SIGNAL + SLOW) as served,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        headers = {"authorization": f"Bearer {first}"}

        def complete() -> httpx.Response:
            url = f"{served.url}/v1/completions"
            return httpx.post(url, json=body, headers=headers, timeout=60)

        def is_running() -> bool:
            lines = httpx.get(f"{served.url}/metrics", headers=headers).text.splitlines()
            (line,) = [line for line in lines if line.startswith("stoker_num_requests_running{")]
            return float(line.rsplit(" ", 1)[1]) == 1

        truth = complete().json()["choices"][0]["text"]
        second = keys("new", "second")
        assert status(served, second) == 401  # nobody looks
        running = pool.submit(complete)
        served.wait_for(is_running)
        served.process.send_signal(signal.SIGHUP)
        served.wait_for(lambda: status(served, second) == 200)
        assert running.result().json()["choices"][0]["text"] == truth
        assert len(truth) == 150
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        assert "Traceback" not in served.log.read_text()


def test_a_broken_file_keeps_it_serving_and_a_good_one_is_taken(
    serve: Any, keys: Any, tmp_path: Path
) -> None:
    first = first_key(keys)
    file = tmp_path / "stoker.toml"
    with serve("scripted:m", config=QUICK) as served:
        assert status(served, first, **{"x-stoker-tenant": "a"}) == 403
        file.write_text(QUICK + "[[tenants]]\nname = 'a'\nweight = 0\n")
        served.wait_for(lambda: "tenants[0].weight: must be at least" in served.log.read_text())
        assert status(served, first) == 200
        assert is_healthy(served)
        file.write_text(
            QUICK + 'trusted_proxies = ["127.0.0.1"]\nstrict = true\n[[tenants]]\nname = "a"\n'
        )
        served.wait_for(lambda: status(served, first, **{"x-stoker-tenant": "a"}) == 200)
        # A header of a client cannot make it another machine.
        forwarded = {"x-stoker-tenant": "a", "x-forwarded-for": "10.0.0.1"}
        assert status(served, first, **forwarded) == 200
        served.wait_for(lambda: "needs a restart: server.strict" in served.log.read_text())
        log = served.log.read_text()
        assert log.count("everything stays as it was") == 1
        assert "configuration read again: tenants a; keys 1" in log
        assert "Traceback" not in log


def test_x_forwarded_for_makes_nobody_a_trusted_proxy(serve: Any) -> None:
    with serve("scripted:m", config='[server]\ntrusted_proxies = ["10.0.0.1"]\n') as served:
        forwarded = {"x-stoker-tenant": "a", "x-forwarded-for": "10.0.0.1"}
        assert status(served, "none", **forwarded) == 403
        assert status(served, "none") == 200
