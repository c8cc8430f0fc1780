"""``stoker doctor``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from stoker.cli.common import (
    State,
    config_option,
    json_option,
    line_width,
    print_json,
    print_table,
)
from stoker.errors import ConfigError, PluginError, StokerError

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.doctor.conformance import CheckResult, Target
    from stoker.interfaces import Finding

__all__ = ["command"]

_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "problem": "PROBLEM"}


@click.command("doctor")
@click.argument("plugin", required=False)
@click.option(
    "--model",
    metavar="REF",
    help="A model to look at, too; with PLUGIN the one that a backend is tried with.",
)
@click.option("--speed", is_flag=True, help="With PLUGIN: also measure. Nothing else should run.")
@json_option
@config_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    plugin: str | None,
    config_path: str | None,
    model: str | None,
    speed: bool,
    as_json: bool,
) -> int:
    """Check this machine and installation, or a plugin's conformance.

    Without PLUGIN: CPU, memory, disk, threads, plugins, configuration, models, address, and what the backends
    say of themselves. With PLUGIN (its name in `stoker plugins`, or that of a backend, policy, middleware or
    observer): runs the conformance suites of what it offers. Ends with 1 if there is a problem.
    """
    state = State.of(ctx)
    if plugin is not None:
        return _conformance(state, plugin, config_path, model, speed=speed, as_json=as_json)
    findings = _say_so(_examine(state, config_path, model), as_json=as_json)
    counts = Counter(finding.level for finding in findings)
    if as_json:
        print_json({"ok": not counts["problem"], "findings": findings})
    else:
        _print(findings)
        click.echo(
            f"{_count(counts['problem'], 'problem')}, {_count(counts['warning'], 'warning')}."
        )
    return 1 if counts["problem"] else 0


# --------------------------------------------------------------------------- the environment


def _examine(state: State, config_path: str | None, extra: str | None) -> Iterator[Finding]:
    """Everything that there is to look at, in the order of the table."""
    import os

    from stoker.doctor import asking, installation, machine, threads
    from stoker.machine import available_memory, read_limits, usable_cores

    limits = read_limits()
    yield from machine.check_python()
    yield from machine.check_cpu(limits=limits)
    yield from machine.check_memory(limits)
    yield from machine.check_disk(installation.folders(state.plugins))
    config, finding = _configuration(state, config_path)
    cores = usable_cores(limits)
    yield from threads.check_threads(os.environ, config.performance.threads, cores)
    yield from threads.check_company(cores)
    yield from installation.check_plugins(state.plugins.listing(config))
    yield finding
    yield installation.check_port(config.server.host, config.server.port, _running(config))
    found = installation.find_models(config, state.plugins, extra)
    yield from installation.check_models(found, available_memory(limits))
    models = [(model.backend, model.local) for model in found if model.backend and model.local]
    yield from asking.ask_backends(state.plugins, config, models)


def _configuration(state: State, path: str | None) -> tuple[Config, Finding]:
    """The configuration, or the defaults if it is wrong, and what to say of it."""
    from stoker.config import Config
    from stoker.interfaces import Finding

    try:
        file = state.config_file(path)
        config, _ = state.config(path)
    except ConfigError as error:
        wrong = Finding(level="problem", topic="configuration", message=f"{error}.")
        return Config(), wrong
    where = str(file) if file is not None else "There is no stoker.toml: the defaults"
    try:
        state.plugins.check(config)
    except (ConfigError, PluginError) as error:
        return config, Finding(level="problem", topic="configuration", message=f"{error}.")
    valid = "is valid" if file is not None else "are in force"
    return config, Finding(level="ok", topic="configuration", message=f"{where} {valid}.")


def _running(config: Config) -> list[str] | None:
    from stoker.cli.remote import find_server

    try:
        return find_server(config, None, None).models_if_running()
    except StokerError:  # a file of keys that cannot be read: the configuration's finding says so
        return None


def _say_so(findings: Iterable[Finding], *, as_json: bool) -> list[Finding]:
    """All findings; meanwhile a line that it takes a moment, where somebody looks."""
    if as_json or not sys.stderr.isatty():
        return list(findings)
    from rich.console import Console

    found: list[Finding] = []
    with Console(stderr=True).status("Looking ...") as status:
        for finding in findings:
            found.append(finding)
            status.update(f"Looking ... {finding.topic}")
    return found


def _print(findings: Sequence[Finding]) -> None:
    rows = []
    for finding in findings:
        rows.append([_MARKS[finding.level], finding.topic, finding.message])
        if finding.cure:
            rows.append(["", "", f"-> {finding.cure}"])
    print_table(["", "topic", "finding"], rows)


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


# --------------------------------------------------------------------------- a plugin's conformance


def _conformance(
    state: State,
    plugin: str,
    config_path: str | None,
    model: str | None,
    *,
    speed: bool,
    as_json: bool,
) -> int:
    from stoker.doctor import conformance
    from stoker.doctor.report import report_lines

    config, _ = state.config(config_path)
    targets = conformance.find_targets(plugin, state.plugins, config, model)
    results = _while_looking(targets, speed=speed, as_json=as_json)
    counts = Counter(result.outcome for result in results)
    good = bool(counts["passed"]) and not counts["failed"]
    if as_json:
        print_json({"ok": good, "checks": results})
        return 0 if good else 1
    for line in report_lines(results, line_width(), tracebacks=state.debug):
        click.echo(line)
    click.echo(
        f"{plugin}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped."
    )
    return 0 if good else 1


def _while_looking(targets: Sequence[Target], *, speed: bool, as_json: bool) -> list[CheckResult]:
    """The results; meanwhile which check runs, where somebody looks."""
    from stoker.doctor.conformance import run_suites

    if as_json or not sys.stderr.isatty():
        return run_suites(targets, speed=speed)
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("Checking ...") as status:
        return run_suites(
            targets,
            speed=speed,
            on_check=lambda target, check: status.update(
                escape(f"Checking {target}: {check.partition(' [')[0]}")
            ),
        )
