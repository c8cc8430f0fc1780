"""Runs loads: one target after the other, round after round."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from stoker_plugins.bench.figures import Figures, Objectives, figures
from stoker_plugins.bench.target import Answer, Target
from stoker_plugins.bench.workload import Load, Session

__all__ = ["Experiment", "Plan", "Round", "Texts", "run_load", "run_plan"]

MakeLoad = Callable[[str], Load]
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        loads: By name: makes the load of a seed.
        rounds: How often each load runs on each target.
        seed: What all prompts and arrivals are drawn from.
        objectives: What goodput is counted by.
        max_seconds: After so long a round sends nothing more, and waits for what runs.
        max_in_flight: Most requests of an open loop at once.
        compare_texts: Whether to compare the answers of the targets.
    """

    loads: dict[str, MakeLoad]
    rounds: int = 3
    seed: int = 0
    objectives: Objectives | None = None
    max_seconds: float | None = None
    max_in_flight: int = 512
    compare_texts: bool = False


@dataclass(slots=True)
class Texts:
    """How the answers of a target compare with the first target's.

    Attributes:
        compared: Requests that both answered.
        identical: Of those, with the same text.
    """

    compared: int = 0
    identical: int = 0


@dataclass(slots=True)
class Round:
    """One load, once, on one target.

    Attributes:
        number: From 0.
        total: Of all answers.
        groups: By group, where the load has several.
        ttft_ms: Of each complete answer, for distributions.
        is_whole: Whether it ran to its end.
    """

    number: int
    total: Figures
    groups: dict[str, Figures]
    ttft_ms: list[float]
    is_whole: bool = True


@dataclass(slots=True)
class Experiment:
    """One load on all targets.

    Attributes:
        name: Of the load.
        rounds: By target.
        texts: By target, for all but the first; empty if they are not compared.
    """

    name: str
    rounds: dict[str, list[Round]]
    texts: dict[str, Texts] = field(default_factory=dict)

    def counted(self, target: str) -> list[Round]:
        """The rounds that count: the whole ones, or else what there is."""
        rounds = self.rounds[target]
        return [each for each in rounds if each.is_whole] or rounds


async def run_plan(
    plan: Plan, targets: Sequence[Target], results: list[Experiment], progress: Progress
) -> None:
    """Measure: every load in turn on each target, round after round.

    Args:
        plan: What.
        targets: Where; they must be prepared.
        results: Filled as it goes, so that what was measured is there if this is cancelled.
        progress: Told what runs.
    """
    for name, make_load in plan.loads.items():
        experiment = Experiment(name, {target.name: [] for target in targets})
        results.append(experiment)
        for number in range(plan.rounds):
            first_texts: dict[int, str] | None = None
            for target in targets:
                label = f"{name}: round {number + 1} of {plan.rounds}, {target.name}"
                progress(label)
                load = make_load(f"{plan.seed} {number}{target.salt}")
                answers = await _run_round(plan, target, load, number, experiment, progress, label)
                if not plan.compare_texts:
                    continue
                texts = {
                    number: "".join(answer.texts)
                    for number, answer in answers.items()
                    if answer.texts is not None and not answer.failure
                }
                if first_texts is None:
                    first_texts = texts
                else:
                    _compare(experiment.texts.setdefault(target.name, Texts()), first_texts, texts)


def _compare(total: Texts, first: dict[int, str], other: dict[int, str]) -> None:
    for number in first.keys() & other.keys():
        total.compared += 1
        total.identical += first[number] == other[number]


async def _run_round(
    plan: Plan,
    target: Target,
    load: Load,
    number: int,
    experiment: Experiment,
    progress: Progress,
    label: str,
) -> dict[int, Answer]:
    """Run one round and keep its figures, also of one that is broken off; returns its answers by number."""
    answers: dict[int, Answer] = {}

    def done(index: int, answer: Answer) -> None:
        answers[index] = answer
        progress(f"{label}, {len(answers)} answers")

    cpu_s = time.process_time()
    is_whole = False
    try:
        await run_load(
            target,
            load,
            done,
            max_seconds=plan.max_seconds,
            max_in_flight=plan.max_in_flight,
            keep_text=plan.compare_texts,
        )
        is_whole = True
    finally:
        cpu_s = time.process_time() - cpu_s
        ordered = [answers[index] for index in sorted(answers)]
        if ordered:
            experiment.rounds[target.name].append(
                _summed_up(number, ordered, plan.objectives, load.gap_group, cpu_s, is_whole)
            )
    return answers


def _summed_up(
    number: int,
    answers: list[Answer],
    objectives: Objectives | None,
    gap_group: str,
    cpu_s: float,
    is_whole: bool,
) -> Round:
    names = sorted({answer.group for answer in answers})
    groups = {}
    if len(names) > 1:
        for name in names:
            groups[name] = figures([a for a in answers if a.group == name], objectives)
    return Round(
        number,
        figures(answers, objectives, gap_group=gap_group, cpu_s=cpu_s),
        groups,
        [(a.stamps[0] - a.due_s) * 1e3 for a in answers if not a.failure],
        is_whole,
    )


Done = Callable[[int, Answer], None]


async def run_load(
    target: Target,
    load: Load,
    done: Done,
    *,
    max_seconds: float | None = None,
    max_in_flight: int = 512,
    keep_text: bool = False,
) -> None:
    """Send a load to a target.

    Sessions with a time are sent at that time whatever else runs (open loop), at most ``max_in_flight`` at
    once; the others by ``concurrency`` clients, each of which sends when its last answer has ended (closed
    loop).

    Args:
        target: Where to.
        load: What.
        done: Called with the number and the answer of each request that is over.
        max_seconds: When to send no more.
        max_in_flight: See above.
        keep_text: Whether answers keep their texts.
    """
    start_s = time.perf_counter()
    stop_s = start_s + (max_seconds or float("inf"))
    numbers = itertools.count()

    async def play(session: Session, due_s: float | None = None) -> None:
        # Numbered when it begins, in the order in which sessions are drawn: the same for every target.
        own_numbers = [next(numbers) for _ in session.shots]
        for number, shot in zip(own_numbers, session.shots, strict=True):
            # Sampled texts differ by chance: there is nothing to compare.
            keep = keep_text and not shot.extra.get("temperature")
            done(number, await target.ask(shot, due_s, keep_text=keep))
            due_s = None
            if time.perf_counter() >= stop_s:
                return

    async def client() -> None:
        while time.perf_counter() < stop_s and (session := next(sessions, None)) is not None:
            await play(session)

    session = next(load.sessions, None)
    if session is None:
        return
    sessions = itertools.chain((session,), load.sessions)
    async with _closing(asyncio.TaskGroup()) as tasks:
        if session.at_s is None:
            for _ in range(load.concurrency):
                tasks.create_task(client())
            return
        gate = asyncio.Semaphore(max_in_flight)
        session = next(sessions, None)
        while session is not None and (due_s := start_s + (session.at_s or 0.0)) < stop_s:
            await asyncio.sleep(due_s - time.perf_counter())
            await gate.acquire()
            task = tasks.create_task(play(session, due_s))
            task.add_done_callback(lambda _: gate.release())
            # Drawn now, while there is time: a long prompt takes milliseconds.
            session = next(sessions, None)


@contextlib.asynccontextmanager
async def _closing(group: asyncio.TaskGroup) -> AsyncIterator[asyncio.TaskGroup]:
    """The group; an error of one task as itself, not wrapped."""
    try:
        async with group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
