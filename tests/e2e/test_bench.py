"""``stoker bench`` against servers as users start them."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # starts processes

CONFIG = """
[logging]
access = false
[[models]]
model = "scripted:tiny"
lanes = 16
context = 16384
"""


@pytest.fixture(scope="module")
def url(serve_once: Callable[..., Any]) -> Any:
    with serve_once(config=CONFIG) as served:
        yield f"{served.url}/v1"


def start(folder: Path, *arguments: str, **environ: str) -> subprocess.Popen[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    return subprocess.Popen(
        [sys.executable, "-m", "stoker", "bench", *arguments],
        cwd=folder,
        env=clean | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def bench(folder: Path, *arguments: str, code: int = 0, **environ: str) -> str:
    process = start(folder, *arguments, **environ)
    out, error = process.communicate(timeout=100)
    assert process.returncode == code, error + out
    return out if code in (0, 130) else error


class Page(HTMLParser):
    """Collects what a page refers to, and its cells."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text.append(data.strip())


def test_two_targets_side_by_side(url: str, tmp_path: Path) -> None:
    out = bench(
        tmp_path,
        *("--target", f"one={url}", "--target", f"other={url},tiny", "--rounds", "2"),
        *("--scenario", "solo", "--scenario", "decode4", "--scenario", "prefix", "--seed", "5"),
        *("--slo", "ttft=30s,itl=30s", "--compare-texts", "--api-key", "one=sk-hidden"),
        *("--json", "o.json", "--plot", "o.png", "--plot", "o.html"),
    )
    for said in (
        "Seed 5.",
        "solo: 2 rounds of 4 requests",
        "decode4: 2 rounds of 8 requests",
        "one / other",
    ):
        assert said in out
    assert re.search(r"goodput, share +1\.000 +1\.000", out)
    assert re.search(r"same text as the first +8 of 8", out)
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["schema"] == "stoker-bench/1"
    assert data["interrupted"] is False
    assert data["machine"]["cores"] >= 1
    assert data["machine"]["memory_bytes"] > 0
    assert (data["options"]["seed"], data["options"]["names"]) == (5, ["solo", "decode4", "prefix"])
    assert [target["model"] for target in data["targets"]] == ["tiny", "tiny"]
    text = (tmp_path / "o.json").read_text()
    assert "sk-hidden" not in text
    assert os.uname().nodename not in text
    solo, decode, prefix = (load["targets"] for load in data["loads"])
    for target in ("one", "other"):
        assert [each["figures"]["output_tokens"] for each in solo[target]["rounds"]] == [384, 384]
        assert [each["figures"]["completed"] for each in decode[target]["rounds"]] == [8, 8]
        assert len(decode[target]["rounds"][0]["ttft_ms"]) == 8
        over = prefix[target]["over_rounds"]
        assert over["cached_tokens"]["median"] > 0.3 * over["prompt_tokens"]["median"]
        assert over["ttft_p50_ms"]["low"] > 0
    assert solo["other"]["texts_identical"] == solo["other"]["texts_compared"] == 8
    assert solo["one"]["ratios_of_first"] == {}
    ratio = solo["other"]["ratios_of_first"]["output_tok_s"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG\r\n")
    page = Page()
    page.feed((tmp_path / "o.html").read_text())
    assert {"svg", "table"} <= page.tags
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert not [link for link in page.links if not link.startswith("#")]
    assert "output tokens/s" in page.text


def test_open_loops_and_traces(url: str, tmp_path: Path) -> None:
    target = ("--target", f"t={url}", "--rounds", "1", "--json", "o.json")
    bench(
        tmp_path,
        *target,
        *("--rate", "80", "--limit", "24", "--prompt-tokens", "100-300", "--output-tokens", "4"),
        *("--shared-prefix", "80", "--temperature", "0.5"),
    )
    (load,) = json.loads((tmp_path / "o.json").read_text())["loads"]
    (only,) = load["targets"]["t"]["rounds"]
    found = only["figures"]
    assert (found["completed"], found["output_tokens"]) == (24, 24 * 4)
    assert 24 * 90 < found["prompt_tokens"] < 24 * 310  # as the server's tokenizer counts them
    assert found["cached_tokens"] > 0
    assert found["lag_max_ms"] >= found["lag_p99_ms"] >= 0
    fitted = ("--speedup", "200", "--length-scale", "0.05", "--max-output-tokens", "6")
    for trace in ("azure-conversation", "azure-code", "mooncake"):
        out = bench(tmp_path, *target, "--trace", trace, *fitted, "--limit", "40")
        assert f"{trace}: 1 round of 40 requests" in out
        assert "failed" not in out
    own = tmp_path / "own.jsonl"
    own.write_text(
        '{"timestamp": 5, "input_length": 30, "output_length": 3, "hash_ids": [1]}\n' * 3
    )
    assert "own.jsonl: 1 round of 3 requests" in bench(tmp_path, *target, "--trace", str(own))


def test_completions_and_clients(url: str, tmp_path: Path) -> None:
    out = bench(
        tmp_path,
        *("--target", f"t={url}", "--rounds", "1", "--endpoint", "completions"),
        *("--concurrency", "3", "--limit", "9", "--output-tokens", "normal:8,3"),
    )
    assert "own load: 1 round of 9 requests" in out
    assert "failed" not in out


def test_requests_that_fail_are_told_by_kind(url: str, tmp_path: Path) -> None:
    long = ("--concurrency", "1", "--limit", "2", "--prompt-tokens", "50000", "--rounds", "1")
    out = start(tmp_path, "--target", f"t={url}", *long).communicate(timeout=60)[0]
    assert "2 of 2 requests failed (http 400 context_length_exceeded: 2)" in out


def test_an_interruption_prints_what_was_measured(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    with serve("scripted:slow", config="[plugins.scripted]\nstep_s = 0.02\n") as served:
        process = start(
            tmp_path,
            *("--target", f"t={served.url}/v1", "--concurrency", "2", "--limit", "100000"),
            *("--output-tokens", "5", "--json", "o.json"),
        )
        served.wait_for(lambda: _finished(served) >= 12)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "output tokens/s" in out
    assert "interrupted: what was measured until then" in out
    data = json.loads((tmp_path / "o.json").read_text())
    assert data["interrupted"] is True
    (only,) = data["loads"][0]["targets"]["t"]["rounds"]
    assert only["whole"] is False
    assert only["figures"]["completed"] >= 4


def _finished(served: Any) -> float:
    return served.metric("stoker_request_success_total")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "nope"], "Invalid value for '--scenario'.*no scenario 'nope'"),
        (["--target", "ftp://x"], "Invalid value for '--target'"),
        (["--target", "http://u:p@127.0.0.1/v1"], "Invalid value for '--target'"),
        (["--target", "http://127.0.0.1:99999/v1"], "Invalid value for '--target'"),
        (["--target", "a=127.0.0.1:1", "--target", "a=127.0.0.1:2"], "the same name"),
        (["--target", "far=http://192.0.2.1/v1"], "--target far: 192.0.2.1 is not this machine"),
        (["--slo", "ttft=soon"], "Invalid value for '--slo'"),
        (["--prompt-tokens", "9-3", "--rate", "1"], "Invalid value for '--prompt-tokens'"),
        (["--prompt-tokens", "9"], "--prompt-tokens needs --concurrency or --rate"),
        (["--speedup", "9", "--rate", "1"], "--speedup needs --trace"),
        (["--limit", "9"], "--limit needs --concurrency or --rate or --trace"),
        (["--rate", "1", "--scenario", "solo"], "--scenario and --rate are different loads"),
        (["--rate", "0"], "Invalid value for '--rate'"),
        (["--rounds", "0"], "Invalid value for '--rounds'"),
        (["--compare-texts"], "--compare-texts needs two targets"),
        (["--plot", "o.pdf"], "must end in .png or .html"),
        (["--json", "no/such/folder.json"], "there is no folder no/such"),
        (["--trace", "nope"], "--trace: nope: No such file"),
    ],
)
def test_bad_options_name_the_field(arguments: list[str], said: str, tmp_path: Path) -> None:
    error = bench(tmp_path, *arguments, code=2)
    (line,) = error.splitlines()
    assert line.startswith("stoker: error: ")
    assert re.search(said, line)


def test_nobody_there_is_one_clear_line(tmp_path: Path) -> None:
    error = bench(tmp_path, "--target", "x=127.0.0.1:9", code=1)
    assert error.splitlines()[-1] == (
        "stoker: error: target x: http://127.0.0.1:9/v1: connection refused; is the server running?"
    )


def test_help_lists_the_command_without_importing_it() -> None:
    code = (
        "import sys, stoker.cli\n"
        "stoker.cli.main(['--help'])\n"
        "print([m for m in sys.modules if m.startswith('stoker_plugins.bench')], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert re.search(r"bench +Measure servers", done.stdout)
    assert done.stderr.strip() == "[]"


def test_matplotlib_is_asked_for_by_name(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "import stoker.cli\n"
        "sys.exit(stoker.cli.main(['bench', '--plot', 'o.png']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "pip install 'stoker[plots]'" in done.stderr


def test_the_scenarios_are_listed(tmp_path: Path) -> None:
    listed = bench(tmp_path, "--list")
    for name in ("solo", "decode8", "prefix", "turns", "mixed", "burst", "copy", "agents"):
        assert re.search(rf"^{name} +\w", listed, re.MULTILINE)


PAGE = Path(__file__).parents[2] / "docs" / "benchmarking.md"
COMMANDS = re.findall(r"^ *stoker (bench.*)$", PAGE.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_pages_commands_work(command: str, url: str, tmp_path: Path) -> None:
    _, *arguments = shlex.split(command)
    here = [re.sub(r"http://127.0.0.1:\d+/v1", url, each) for each in arguments]
    if "--target" not in here:
        here += ["--target", f"stoker={url}"]
    out = bench(tmp_path, *here, "--rounds", "1", "--max-seconds", "1")
    assert "output tokens/s" in out
    assert "requests failed" not in out


def test_the_page_names_every_option_that_needs_explaining() -> None:
    page = PAGE.read_text()
    for option in ("--yes-remote", "--seed", "--compare-texts", "--max-in-flight", "--warm-up"):
        assert option in page
    assert len(COMMANDS) >= 8
