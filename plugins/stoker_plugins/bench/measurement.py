"""One run of ``stoker bench``: prepares the targets, measures, reports."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stoker.errors import ConfigError
from stoker_plugins.bench import scenarios
from stoker_plugins.bench.document import document
from stoker_plugins.bench.options import TargetSpec
from stoker_plugins.bench.report import print_report, remarks, table_of
from stoker_plugins.bench.runner import Experiment, MakeLoad, Plan, run_plan
from stoker_plugins.bench.target import Target
from stoker_plugins.bench.traces import Scale, TraceRow, read_trace, trace_load
from stoker_plugins.bench.workload import Lengths, custom_load

__all__ = ["Measurement"]

_INTERRUPTED = 130  # what shells report for SIGINT
_BUSY_PERCENT = 25.0

Progress = Callable[[str], None]


class Measurement:
    """One run of the command.

    Args:
        options: Its options, checked.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        if options["seed"] is None:
            # A server still knows the prompts of the last run: the same ones would be cached.
            options["seed"] = secrets.randbelow(1_000_000)
        self._notes: list[str] = []
        self._trace: list[TraceRow] = []
        if options["trace"] is not None:
            self._trace = read_trace(options["trace"], options["limit"] or 64)

    def run(self) -> int:
        """Measure and report; returns the exit code."""
        started = datetime.datetime.now(datetime.UTC)
        targets = self._targets()
        results: list[Experiment] = []
        with _status() as progress:
            is_interrupted = _run(self._measure(targets, results, progress))
        results = [each for each in results if any(each.rounds.values())]
        if not results:
            if is_interrupted:
                return _INTERRUPTED
            raise ConfigError(
                "nothing was sent: --max-seconds is shorter than the time to the first request"
            )
        self._report(targets, results, started, is_interrupted=is_interrupted)
        if is_interrupted:
            return _INTERRUPTED
        failed = any(
            not any(r.total.completed for r in each.rounds[t.name])
            for each in results
            for t in targets
        )
        return 1 if failed else 0

    def _targets(self) -> list[Target]:
        specs: Sequence[TargetSpec] = self._options["targets"]
        names = {spec.name for spec in specs}
        common, own = None, {}
        for text in self._options["api_keys"]:
            name, separator, key = text.partition("=")
            if separator and name in names:
                own[name] = key
            else:
                common = text
        targets = []
        for spec in specs:
            target = Target(
                spec.name,
                spec.url,
                spec.model,
                api_key=own.get(spec.name, common),
                is_chat=self._options["endpoint"] == "chat",
                timeout_s=self._options["timeout"],
            )
            targets.append(target)
        return targets

    async def _measure(
        self, targets: Sequence[Target], results: list[Experiment], progress: Progress
    ) -> None:
        extras = ("top_k",) if "sampled" in self._options["names"] else ()
        known: dict[tuple[str, str], int] = {}
        for target in targets:
            progress(f"asking {target.name}")
            await target.prepare(extras)
            twins = known.setdefault((target.url, target.model), 0)
            known[target.url, target.model] += 1
            if twins and not self._options["compare_texts"]:
                # The same server again: the same prompts would come from its cache.
                target.salt = f" again {twins}"
        self._notes = _busy_note()
        plan = await self._plan(targets[0])
        for target in targets:
            progress(f"warming up {target.name}")
            await self._warm_up(target)
        await run_plan(plan, targets, results, progress)

    async def _warm_up(self, target: Target) -> None:
        sessions = scenarios.scenario(
            "decode64", f"warm-up {self._options['seed']}{target.salt}"
        ).sessions
        for _ in range(self._options["warm_up"]):
            (shot,) = next(sessions).shots
            await target.ask(shot)

    async def _plan(self, first: Target) -> Plan:
        options = self._options
        return Plan(
            await self._loads(first),
            rounds=options["rounds"],
            seed=options["seed"],
            objectives=options["slo"],
            max_seconds=options["max_seconds"],
            max_in_flight=options["max_in_flight"],
            compare_texts=options["compare_texts"],
        )

    async def _loads(self, first: Target) -> dict[str, MakeLoad]:
        """The loads by name, each made from a seed."""
        options = self._options
        extra = {} if options["temperature"] is None else {"temperature": options["temperature"]}
        if options["trace"] is not None:
            rows = self._trace
            scale = Scale(
                options["speedup"] or 1.0,
                options["length_scale"] or 1.0,
                options["max_prompt_tokens"],
                options["max_output_tokens"],
            )
            words = await first.measure_words()
            name = Path(options["trace"]).name
            return {
                name: lambda seed: trace_load(rows, seed, scale=scale, words=words, extra=extra)
            }
        if options["concurrency"] is None and options["rate"] is None:
            chosen = options["names"] or scenarios.DEFAULT
            return {name: _scenario(name) for name in chosen}
        return {"own load": await self._own_load(first, extra)}

    async def _own_load(self, first: Target, extra: dict[str, Any]) -> MakeLoad:
        options = self._options
        words = await first.measure_words()
        prompt = options["prompt_tokens"] or Lengths.parse("128")
        output = options["output_tokens"] or Lengths.parse("64")
        return lambda seed: custom_load(
            seed,
            prompt=prompt,
            output=output,
            words=words,
            shared_prefix=options["shared_prefix"] or 0,
            concurrency=options["concurrency"] or 1,
            rate=options["rate"],
            limit=options["limit"] or 64,
            extra=extra,
        )

    def _report(
        self,
        targets: Sequence[Target],
        results: Sequence[Experiment],
        started: datetime.datetime,
        *,
        is_interrupted: bool,
    ) -> None:
        tables = [table_of(each, targets) for each in results]
        notes = self._notes + remarks(targets, results, is_interrupted=is_interrupted)
        options = self._options
        print_report(tables, notes, options["seed"])
        if options["json_path"] is None and not options["plots"]:
            return
        data = document(
            targets, results, started=started, options=self._shown(), is_interrupted=is_interrupted
        )
        if options["json_path"] is not None:
            options["json_path"].write_bytes(
                msgspec.json.format(msgspec.json.encode(data), indent=1) + b"\n"
            )
        for path in options["plots"]:
            from stoker_plugins.bench.plots import write_plot

            on = f"{data.machine['cpu']}, {data.machine['usable_cores']} cores"
            about = f"{data.started}, {on}, stoker {data.stoker_version}"
            write_plot(path, results, tables, notes, about)

    def _shown(self) -> dict[str, Any]:
        """The options as they were given, without keys and paths."""
        hidden = {"api_keys", "json_path", "plots", "targets"}
        shown = {name: value for name, value in self._options.items() if name not in hidden}
        if shown["trace"] is not None:
            shown["trace"] = Path(shown["trace"]).name
        for name in ("prompt_tokens", "output_tokens"):
            shown[name] = shown[name] and shown[name].text
        return {name: value for name, value in shown.items() if value is not None}


def _scenario(name: str) -> MakeLoad:
    return lambda seed: scenarios.scenario(name, seed)


def _run(main: Coroutine[Any, Any, None]) -> bool:
    """Run it; whether it was interrupted."""
    try:
        from uvloop import new_event_loop
    except ImportError:  # not on Windows, not on every Python
        from asyncio import new_event_loop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(main)
        except KeyboardInterrupt:
            return True
    return False


@contextlib.contextmanager
def _status() -> Iterator[Progress]:
    """A line on a terminal's standard error that says what runs."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("") as status:
        yield status.update


def _busy_note() -> list[str]:
    """A remark if something else computes already."""
    import psutil

    busy = psutil.cpu_percent(0.2)
    if busy <= _BUSY_PERCENT:
        return []
    return [f"the machine was busy before the start ({busy:.0f} % of its cores): trust ratios only"]
