"""How OpenMP's threads wait: what is set before the library loads, and what adapts afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stoker_backend_gguf.waiting import SpinControl

ENVIRONMENT = {
    k: v for k, v in os.environ.items() if k not in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
}


def run(code: str, *arguments: str, **more: str) -> object:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**ENVIRONMENT, **more},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PREPARE = """
import json, os
from stoker_backend_gguf import native, waiting
first = waiting.prepare_openmp(<policy>)
native.library()
environ = [os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]
adapts = waiting.spin_control() is not None
print(json.dumps([first, waiting.prepare_openmp('passive'), environ, adapts]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "more", "in_effect", "environ"),
    [
        ("'passive'", {}, "passive", ["passive", "300"]),
        ("'passive', 0", {}, "passive", ["passive", "0"]),
        ("'passive', 300", {"GOMP_SPINCOUNT": "7"}, "passive", ["passive", "7"]),
        ("'active'", {}, "active", ["active", None]),
        ("'passive'", {"OMP_WAIT_POLICY": "ACTIVE"}, "active", ["ACTIVE", None]),
        ("'adaptive'", {"GOMP_SPINCOUNT": "7"}, "passive", ["passive", "7"]),
    ],
)
def test_what_is_set_before_the_library_loads(policy, more, in_effect, environ):
    found = run(PREPARE.replace("<policy>", policy), **more)
    assert found == [[in_effect, None], [in_effect, None], environ, False]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not tell")
def test_the_default_adapts_where_the_kernel_tells_of_company():
    found = run(PREPARE.replace("<policy>", "'adaptive'"))
    assert found == [["adaptive", None], ["adaptive", None], [None, "10000"], True]


@pytest.mark.slow
def test_where_it_cannot_adapt_it_is_passive():
    code = PREPARE.replace("first =", "waiting._TASKS = waiting.Path('/nowhere')\nfirst =")
    found = run(code.replace("<policy>", "'adaptive'"))
    assert found == [["passive", None], ["passive", None], ["passive", "300"], False]


@pytest.mark.slow
def test_a_library_that_is_loaded_already_is_a_warning():
    code = (
        "import json, llama_cpp\n"
        "from stoker_backend_gguf import waiting\n"
        "print(json.dumps(waiting.prepare_openmp('adaptive')))"
    )
    policy, warning = run(code)  # type: ignore[misc]
    assert policy == "default"
    assert "OMP_WAIT_POLICY=PASSIVE" in str(warning)


class Team:
    exists = False

    def make(self) -> None:
        self.exists = True

    def dismiss(self) -> None:
        self.exists = False


class World:
    """Two threads that run for a period and wait for a core for a share of it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.others = 0.0
        self.times = {"1": (5.0, 1.0), "2": (3.0, 9.0)}
        self.team = Team()
        self.control = SpinControl(
            self.team,  # type: ignore[arg-type]  # stands in for threads
            lambda: dict(self.times),
            lambda: self.others,
            lambda: self.now_s,
        )
        self.control.look(2)

    def pass_period(
        self, share: float, others: float = 0.1, ran_s: float = 0.2
    ) -> tuple[bool, int]:
        self.now_s += 0.6
        self.others = others
        for thread, (ran, waited) in self.times.items():
            self.times[thread] = ran + ran_s, waited + ran_s * share / (1 - share)
        self.control.look(2)
        return self.team.exists, self.control.num_given_up


def test_in_company_threads_sleep_and_one_is_given_up_until_the_company_has_left():
    world = World()
    assert world.pass_period(0.02) == (False, 0)
    assert world.pass_period(0.44, others=0.7) == (True, 1)
    for _ in range(20):
        assert world.pass_period(0.0, others=1.0) == (True, 1), (
            "nobody is in its way, but somebody is there"
        )
    for _ in range(7):
        assert world.pass_period(0.02) == (True, 1)
    assert world.pass_period(0.02, others=0.3) == (True, 1), (
        "neither company nor calm: the calm begins anew"
    )
    assert [world.pass_period(0.02)[0] for _ in range(8)] == [True] * 7 + [False]
    assert world.pass_period(0.15, others=0.3) == (False, 0), "and nothing is done about it"


def test_one_thread_is_always_left():
    world = World()
    for _ in range(3):
        assert world.pass_period(0.9, others=5.0) == (True, 1)


def test_threads_that_wait_for_others_of_the_same_process_sleep_but_are_kept():
    world = World()
    for _ in range(20):
        assert world.pass_period(0.4, others=0.0) == (True, 0)
    assert [world.pass_period(0.02, others=0.0)[0] for _ in range(8)] == [True] * 7 + [False]


def test_periods_in_which_nothing_was_computed_and_threads_that_are_new_tell_nothing():
    world = World()
    assert world.pass_period(0.9, others=1.0, ran_s=0.0001) == (False, 0)
    world.times["3"] = (0.0, 1000.0)
    assert world.pass_period(0.02) == (False, 0)
    del world.times["1"]
    assert world.pass_period(0.02) == (False, 0)
    world.now_s += 0.01
    world.times["2"] = (0.0, 1e6)
    world.control.look(2)
    assert not world.team.exists, "it was not time yet"


def test_a_kernel_that_stops_telling_fails_no_step():
    world = World()

    def fail() -> float:
        raise FileNotFoundError("/proc/stat")

    world.control._others = fail
    assert world.pass_period(0.4) == (False, 0)


TEAM = """
import json, os, time
from stoker_backend_gguf import native, waiting
native.library()
team = waiting.SpareTeam(waiting._libgomp())

def settled(wanted):
    for _ in range(500):
        if wanted(len(os.listdir('/proc/self/task'))):
            return True
        time.sleep(0.01)
    return False

before = len(os.listdir('/proc/self/task'))
team.make()
team.make()
grown = settled(lambda n: n > before + 1)
team.dismiss()
team.dismiss()
print(json.dumps([grown, settled(lambda n: n == before), team.exists]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux only")
def test_a_spare_team_comes_and_goes():
    assert run(TEAM) == [True, True, False]


COMPANY = """
import json, os, subprocess, sys, time
from pathlib import Path
import numpy as np
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import stoker
from stoker_backend_gguf import waiting
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.options import GgufOptions

path = Path(sys.argv[1])
model = stoker.LocalModel(path=path, model_id="model", reference=sys.argv[1])
options = GgufOptions(self_test=False)
runtime = GgufBackend().load(model, stoker.LoadSettings(lanes=1, context_length=512, options=options))
control = waiting.spin_control()
busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
end = time.monotonic() + 60
at = 0
while not control.num_given_up and time.monotonic() < end:
    rows = np.array([at % 500], np.int32)
    runtime.truncate(0, int(rows[0]))
    runtime.step(stoker.StepInput(np.array([500], np.int32), rows, np.zeros(1, np.int32), rows >= 0))
    at += 1
for process in busy:
    process.kill()
    process.wait()
runtime.close()
settings = runtime.info.settings
print(json.dumps([settings["omp_wait_policy"], control._team.exists, control.num_given_up]))
"""


@pytest.mark.model
@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not tell")
@pytest.mark.skipif(
    (os.cpu_count() or 1) < 2, reason="one core cannot be shared by threads of one step"
)
def test_a_real_model_notices_company(model_path):
    assert run(COMPANY, str(model_path)) == ["adaptive", True, 1]
