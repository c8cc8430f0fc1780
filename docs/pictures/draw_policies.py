"""The pictures and the table of docs/policies.md: one trace under every policy.

    python docs/pictures/draw_policies.py            make them anew
    python docs/pictures/draw_policies.py --table    print the table only

The engine is the real one, the runtime is the scripted one, and the clock is moved by what a step would cost
on a small CPU: 30 ms, and 3 ms for each prompt token, and 5 ms for each sequence that decodes. The trace is
made up: three tenants share six lanes. Everything is seeded, so the files only change when scheduling does.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stoker import SchedulingPolicy, StepInput
from stoker.testing import EngineHarness, FakeClock, ScriptedRuntime, Submitted
from stoker_plugins.policies.deadline import EarliestDeadlineFirst
from stoker_plugins.policies.fair import FairShare
from stoker_plugins.policies.fcfs import FirstComeFirstServed
from stoker_plugins.policies.options import TokenBudgetOptions
from stoker_plugins.policies.token_budget import TokenBudget
from stoker_policy_priority import Options, Priority

POLICIES: dict[str, Callable[[], SchedulingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "token-budget": lambda: TokenBudget(TokenBudgetOptions(ageing_tokens_per_s=20)),
    "fair": FairShare,
    "deadline": EarliestDeadlineFirst,
    "priority": lambda: Priority(Options()),
}
TENANTS = ("chat", "flood", "batch")
LANES = 6
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Arrival:
    """A request of the trace; times in seconds from its start."""

    at_s: float
    tenant: str
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    timeout_s: float | None = None


def trace() -> list[Arrival]:
    """Somebody chats; somebody sends twelve long prompts at once; and there are jobs with deadlines."""
    rng = random.Random(3)
    arrivals = [Arrival(2.0, "flood", rng.randrange(500, 800), 32) for _ in range(12)]
    at_s = 0.5
    while at_s < 30:
        arrivals.append(Arrival(at_s, "chat", rng.randrange(40, 60), 16, priority=-4))
        at_s += rng.uniform(1.5, 3.0)
    for at_s in (1.0, 7.0, 13.0, 19.0, 25.0):
        size = rng.randrange(150, 300)
        arrivals += [Arrival(at_s, "batch", size, 48, priority=-2, timeout_s=18.0)]
    return sorted(arrivals, key=lambda a: a.at_s)


@dataclass
class Served:
    """What became of a request: spans of time in a lane, with what it did there.

    Attributes:
        arrival: The request.
        spans: ``(start, end, lane, kind)``; kind is ``prefill``, ``decode`` or ``idle``.
        first_s: When its first token came.
        end_s: When it ended.
        is_missed: Whether its deadline ended it.
        num_preemptions: How often it lost its lane.
    """

    arrival: Arrival
    spans: list[tuple[float, float, int, str]] = field(default_factory=list)
    first_s: float | None = None
    end_s: float = 0.0
    is_missed: bool = False
    num_preemptions: int = 0

    def add(self, start_s: float, end_s: float, lane: int, kind: str) -> None:
        """Note a step; steps of the same kind that follow each other are one span."""
        if self.spans and self.spans[-1][1:] == (start_s, lane, kind):
            start_s = self.spans.pop()[0]
        self.spans.append((start_s, end_s, lane, kind))


def cost_s(step: StepInput) -> float:
    """Seconds that a step would take."""
    counts = np.bincount(step.lanes)
    decodes = int((counts == 1).sum())
    return 0.030 + 0.003 * (len(step.lanes) - decodes) + 0.005 * decodes


def play(policy: SchedulingPolicy) -> list[Served]:
    """Run the trace; requests in order of arrival."""
    clock = FakeClock(0.0)
    runtime = ScriptedRuntime(lanes=LANES)
    harness = EngineHarness(policy, runtime=runtime, clock=clock)
    rng = random.Random(5)
    todo = trace()
    served: dict[str, tuple[Served, Submitted]] = {}

    def before_step(step: StepInput) -> None:
        start_s = clock.now_s
        clock.advance(cost_s(step))
        counts = np.bincount(step.lanes, minlength=LANES)
        for sequence in harness.engine.scheduler.running.values():
            count = int(counts[sequence.lane])
            kind = "idle" if not count else "decode" if count == 1 else "prefill"
            one, _ = served[sequence.request.request_id]
            one.add(start_s, clock.now_s, sequence.lane, kind)

    runtime.before_step = before_step
    while todo or harness.engine.has_work:
        if not harness.engine.has_work:
            clock.now_s = max(clock.now_s, todo[0].at_s)
        while todo and todo[0].at_s <= clock.now_s:
            arrival = todo.pop(0)
            now_s, clock.now_s = clock.now_s, arrival.at_s  # it came while a step ran
            timeout_s = arrival.timeout_s
            submitted = harness.submit(
                [rng.randrange(97, 123) for _ in range(arrival.prompt_tokens)],
                tenant=arrival.tenant,
                priority=arrival.priority,
                max_tokens=arrival.output_tokens,
                deadline_s=None if timeout_s is None else arrival.at_s + timeout_s,
            )
            clock.now_s = now_s
            served[submitted.request.request_id] = (Served(arrival), submitted)
        harness.step()
        for one, submitted in served.values():
            _look(one, submitted, clock.now_s)
    if harness.engine.scheduler.policy.num_errors:
        raise RuntimeError(f"{type(policy).__name__} failed")
    return [one for one, _ in served.values()]


def _look(one: Served, submitted: Submitted, now_s: float) -> None:
    if one.first_s is None and any(delta.num_tokens for delta in submitted.deltas):
        one.first_s = now_s
    if submitted.records and not one.end_s:
        (record,) = submitted.records
        one.end_s = now_s
        one.is_missed = record.error is not None
        one.num_preemptions = record.num_preemptions


# --------------------------------------------------------------------------- numbers


def p95(values: list[float]) -> float:
    """The smallest value that 95 % of them do not exceed."""
    ordered = sorted(values)
    return ordered[-(-95 * len(ordered) // 100) - 1]


def row(name: str, served: list[Served]) -> str:
    """A policy's line of the table."""
    cells = [f"`{name}`"]
    for tenant in ("chat", "flood"):
        waits = [s.first_s - s.arrival.at_s for s in served if _is_of(s, tenant) and s.first_s]
        cells.append(f"{p95(waits):.1f}")
    jobs = [s for s in served if s.arrival.tenant == "batch"]
    cells.append(f"{sum(s.is_missed for s in jobs)} of {len(jobs)}")
    cells.append(f"{sum(s.num_preemptions for s in served)}")
    cells.append(f"{max(s.end_s for s in served):.1f}")
    return "| " + " | ".join(cells) + " |"


def _is_of(one: Served, tenant: str) -> bool:
    return one.arrival.tenant == tenant


def table() -> str:
    """The table of the page."""
    head = (
        "| policy | chat: p95 to first token, s | flood: p95 to first token, s | batch: deadlines missed "
        "| preemptions | all done after, s |\n|---|---|---|---|---|---|\n"
    )
    return head + "".join(row(name, play(make())) + "\n" for name, make in POLICIES.items())


# --------------------------------------------------------------------------- pictures

WIDTH, LEFT, TOP, LANE, LINE = 960, 70, 58, 20, 6
SPAN_S = 60.0
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #3b3b3b }
.title { font-size: 15px; font-weight: 600 }
.axis { stroke: #8888; stroke-width: 1 }
.chat { fill: #1b9e77; stroke: #1b9e77 }
.flood { fill: #d97a1f; stroke: #d97a1f }
.batch { fill: #7a74d1; stroke: #7a74d1 }
.prefill { stroke: none; fill-opacity: 1 }
.decode { stroke: none; fill-opacity: .55 }
.idle { stroke: none; fill-opacity: .15 }
.wait { stroke-width: 1.2 }
.missed { stroke: #d03030; stroke-width: 2; fill: none }
@media (prefers-color-scheme: dark) { text { fill: #d5d5d5 } }
"""


def x(seconds: float) -> str:
    """Where a moment is."""
    return f"{LEFT + seconds * (WIDTH - LEFT - 10) / SPAN_S:.1f}"


def _rect(start_s: float, end_s: float, y: int, height: int, classes: str) -> str:
    width = float(x(end_s)) - float(x(start_s))
    return (
        f'<rect class="{classes}" x="{x(start_s)}" y="{y}" width="{width:.1f}" height="{height}"/>'
    )


def _waits(one: Served) -> Iterator[tuple[float, float]]:
    """When it had no lane."""
    since_s = one.arrival.at_s
    for start_s, end_s, _, _ in one.spans:
        if start_s > since_s:
            yield since_s, start_s
        since_s = end_s
    if one.end_s > since_s:
        yield since_s, one.end_s


def _legend() -> Iterator[str]:
    at = LEFT
    for tenant, what in (
        ("chat", "chat: a short message now and then"),
        ("flood", "flood: 12 long prompts at once"),
        ("batch", "batch: jobs with a deadline"),
    ):
        yield f'<rect class="{tenant}" x="{at}" y="31" width="12" height="12"/>'
        yield f'<text x="{at + 17}" y="41">{what}</text>'
        at += 235
    yield f'<text x="{at}" y="41">full: prefill, pale: decode</text>'


def _axis(top: int, bottom: int) -> Iterator[str]:
    for second in range(0, int(SPAN_S) + 1, 5):
        yield f'<path class="axis" d="M{x(second)} {top}V{bottom}"/>'
        yield f'<text x="{x(second)}" y="{bottom + 15}" text-anchor="middle">{second} s</text>'


def picture(name: str, served: list[Served]) -> str:
    """The picture of a policy: lanes above, below a line for each request, thin while it waits."""
    lanes_end = TOP + LANES * LANE
    top = lanes_end + 14
    bottom = top + LINE * len(served) + 2 * LINE
    body: list[str] = [f'<text class="title" x="{LEFT}" y="20">{name}</text>', *_legend()]
    body += _axis(TOP, bottom)
    for lane in range(LANES):
        body.append(f'<text x="4" y="{TOP + lane * LANE + 14}">lane {lane + 1}</text>')
    for one in served:
        for start_s, end_s, lane, kind in one.spans:
            y = TOP + lane * LANE + 2
            body.append(_rect(start_s, end_s, y, LANE - 4, f"{one.arrival.tenant} {kind}"))
    y = top
    for tenant in TENANTS:
        own = [one for one in served if one.arrival.tenant == tenant]
        body.append(f'<text x="4" y="{y + 12}">{tenant}</text>')
        for one in own:
            body += _request(one, y)
            y += LINE
        y += LINE
    return _svg(bottom + 24, name, body)


def _request(one: Served, y: int) -> Iterator[str]:
    middle = y + 2
    for start_s, end_s in _waits(one):
        yield f'<path class="{one.arrival.tenant} wait" d="M{x(start_s)} {middle}H{x(end_s)}"/>'
    for start_s, end_s, _, kind in one.spans:
        yield _rect(start_s, end_s, y, LINE - 2, f"{one.arrival.tenant} {kind}")
    if one.is_missed:
        at = float(x(one.end_s))
        yield f'<path class="missed" d="M{at - 3:.1f} {y - 1}l6 6m0 -6l-6 6"/>'


def _svg(height: int, name: str, body: Iterable[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">\n'
        f"<title>One trace under the policy {name}</title>\n<style>{STYLE}</style>\n"
    )
    return head + "\n".join(body) + "\n</svg>\n"


def main() -> None:
    """Write the pictures, and the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the table only")
    args = parser.parse_args()
    if not args.table:
        for name, make in POLICIES.items():
            (FOLDER / f"policy-{name}.svg").write_text(picture(name, play(make())))
        page = FOLDER.parent / "policies.md"
        head, mark, rest = page.read_text().partition(
            "<!-- table: docs/pictures/draw_policies.py -->\n"
        )
        end = rest[rest.index("<!-- end of table -->") :]
        page.write_text(f"{head}{mark}{table()}{end}")
    sys.stdout.write(table())


if __name__ == "__main__":
    main()
