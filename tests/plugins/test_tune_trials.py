"""The two ends of a measurement: whatever becomes of the child is an answer."""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from stoker.cli.common import State
from stoker.testing import ScriptedRuntime
from stoker_plugins.tune.loads import LOADS, Round
from stoker_plugins.tune.messages import Answer, Job, ModelFile, QualityJob
from stoker_plugins.tune.quality import compare, distributions, num_positions
from stoker_plugins.tune.trials import run_job
from stoker_plugins.tune.worker import text_tokens, work

MODEL = ModelFile(path="x", model_id="x", reference="scripted:x", size_bytes=0)


def job(**changes: Any) -> Job:
    return Job(**({"model": MODEL, "backend": "scripted", "scale": 0.1, "limit_s": 30.0} | changes))


def child(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.fixture
def host() -> State:
    return State(environ={})


# ------------------------------------------------------------------ the parent's side


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashes here (SIGSEGV)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "crashes here (SIGILL)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "memory ran out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGALRM)", "takes too long"),
        ("raise SystemExit('no luck')", "ended with code 1: no luck"),
        ("print('nonsense')", "ended with code 0"),
    ],
)
def test_a_child_that_dies_is_an_answer(code: str, failure: str) -> None:
    answer = run_job(job(), child(code))
    assert failure in answer.failure
    assert answer.runs == {}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_child_that_hangs_is_ended_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stoker_plugins.tune.trials._GRACE_S", 0.0)
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pid)!r}, 'w').write(str(p.pid))\n"
        "time.sleep(60)\n"
    )
    answer = run_job(job(limit_s=4.0), child(code))
    assert answer.failure == "takes longer than 4 s"
    state = Path(f"/proc/{pid.read_text()}/stat")
    deadline = time.monotonic() + 30
    # Gone, or a zombie that nobody has waited for yet.
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.02)


def test_what_the_child_says_is_taken() -> None:
    said = msgspec.json.encode(Answer(lanes=7)).decode()
    assert run_job(job(), child(f"print({said!r})")).lanes == 7


def test_a_command_that_is_not_there_is_an_answer() -> None:
    assert "could not be started" in run_job(job(), ["/nonexistent/python"]).failure


# ------------------------------------------------------------------ the child's side


@pytest.mark.parametrize("load", LOADS)
def test_a_load_runs_and_gives_figures(host: State, load: str) -> None:
    answer = work(host, job(load=load, lanes=4, context=512))
    assert answer.failure == ""
    assert answer.lanes == 4
    figures = answer.runs["alone"]
    assert figures.complete
    assert figures.score > 0
    assert figures.tokens_per_s > 0
    assert 0 < figures.ttft_s <= figures.seconds


@pytest.mark.slow
def test_a_load_in_company_is_given_up_in_time(host: State) -> None:
    sections = {"scripted": {"step_s": 0.01}}
    answer = work(host, job(sections=sections, runs=("beside",), limit_s=0.8, scale=1.0))
    assert not answer.runs["beside"].complete
    assert answer.runs["beside"].score > 0


def test_errors_on_purpose_are_answers(host: State) -> None:
    assert "no backend 'nope'" in work(host, job(backend="nope")).failure
    wrong = work(host, job(options={"kernel": "x"}))
    assert "plugins.scripted.kernel" in wrong.failure
    refused = work(host, job(kind="requantize", type_name="q8_0", target="y"))
    assert "cannot write models of other types" in refused.failure
    hopeless = work(host, job(sections={"scripted": {"kv_capacity_tokens": 8}}))
    assert hopeless.failure == "a context below 64 tokens is too short to measure"


def test_a_setting_that_says_something_else_is_measured_as_such(
    host: State, tmp_path: Path
) -> None:
    reference = str(tmp_path / "reference.npy")
    made = work(host, job(quality=QualityJob(path=reference, write=True)))
    assert (made.failure, made.quality) == ("", None)
    same = work(host, job(options={"kernel": "wide"}, quality=QualityJob(path=reference)))
    assert same.quality is not None
    assert (same.quality.kl_mean, same.quality.top1) == (0.0, 1.0)
    blurred = work(host, job(options={"kernel": "blurred"}, quality=QualityJob(path=reference)))
    assert blurred.quality is not None
    assert blurred.quality.kl_mean > 0.1
    narrow = work(host, job(context=100, quality=QualityJob(path=reference)))
    assert "another than the reference's" in narrow.failure


def test_the_job_is_read_and_the_answer_written(
    host: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stoker_plugins.tune import worker

    monkeypatch.setattr(worker, "_limit", lambda _: None)  # it would limit this very process
    sink = io.BytesIO()
    assert worker.serve_job(host, io.BytesIO(msgspec.json.encode(job())), sink) == 0
    assert msgspec.json.decode(sink.getvalue(), type=Answer).runs["alone"].score > 0


# ------------------------------------------------------------------ quality


def test_the_divergence_is_the_textbooks() -> None:
    p = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    q = np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    with np.errstate(divide="ignore"):
        found = compare(np.log(p).astype(np.float32), np.log(q).astype(np.float32))
    assert found.kl_max == pytest.approx(np.log(2), abs=1e-6)
    assert found.kl_mean == pytest.approx((0.25 * np.log(2) + np.log(2)) / 2, abs=1e-6)
    assert (found.top1, found.positions) == (0.5, 2)
    with pytest.raises(ValueError, match="shapes differ"):
        compare(np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32))


def test_distributions_are_distributions_and_leave_the_lane_empty() -> None:
    runtime = ScriptedRuntime(lanes=1, context_length=300)
    tokens = text_tokens(runtime)[:200]
    found = distributions(runtime, tokens)
    assert found.shape == (200, runtime.info.vocab_size)
    assert np.allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(found, distributions(runtime, tokens))
    with pytest.raises(RuntimeError, match="no room"):
        distributions(ScriptedRuntime(lanes=1, context_length=64), tokens[:64] * 2)


def test_positions_are_bounded_by_text_context_and_memory() -> None:
    assert num_positions(49_152, 700, 2048) == 384
    assert num_positions(49_152, 700, 100) == 99
    assert num_positions(262_144, 700, 2048) == 128
    assert num_positions(10**9, 700, 2048) == 1


def test_rounds_scale_in_length_and_not_in_number() -> None:
    round_ = Round(3, turns=2, shared_tokens=100, prompt_tokens=50, output_tokens=20)
    half = round_.scaled(0.5)
    assert (half.conversations, half.turns) == (3, 2)
    assert (half.shared_tokens, half.prompt_tokens, half.output_tokens) == (50, 25, 10)
    assert round_.scaled(0.001).output_tokens == 4
    assert Round(1, shared_tokens=0).scaled(2).shared_tokens == 0


@pytest.mark.slow
def test_the_worker_leaves_no_core_file_and_goes_first_when_memory_runs_out() -> None:
    """In a child: the limits would stay with the process that runs the tests."""
    code = (
        "import resource, sys\n"
        "from stoker_plugins.tune import worker\n"
        "from stoker_plugins.tune.messages import Job, ModelFile\n"
        "m = ModelFile(path='', model_id='', reference='', size_bytes=0)\n"
        "worker._limit(Job(model=m, backend='x', memory_bytes=2**30))\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE)[0], resource.getrlimit(resource.RLIMIT_DATA)[0],\n"
        "      open('/proc/self/oom_score_adj').read().strip())\n"
    )
    if sys.platform != "linux":
        pytest.skip("Linux's limits")
    import subprocess

    done = subprocess.run(
        child(code), capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.split() == ["0", str(2**30), "900"]


def test_hosts_are_what_commands_get() -> None:
    """The state that the command line hands to plugin commands has what tuning asks of it."""
    state = State(environ={})
    assert SimpleNamespace(**{name: getattr(state, name) for name in ("config", "resolve")})
    assert state.resolve("scripted:x").model_id == "x"
