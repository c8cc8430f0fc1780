"""A plugin's conformance, for its users: the suites of ``stoker.testing`` over whatever a plugin offers.

Nothing is asked of the plugin's authors: the suites are built from its descriptors, with default options.
They run under pytest in a process of their own (``stoker.doctor.suites``), so that a backend that crashes is
a failed check.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from stoker.decoding import did_you_mean
from stoker.doctor.installation import find_models
from stoker.errors import ConfigError, StokerError
from stoker.interfaces import BackendInfo
from stoker.types import LocalModel

if TYPE_CHECKING:
    from stoker.config import Config
    from stoker.discovery import PluginListing, Plugins

__all__ = ["KINDS", "CheckResult", "Target", "find_targets", "run_suites"]

KINDS = ("backend", "policy", "middleware", "observer")
"""What there are suites for."""

_LIMIT_S = 1800.0
_LOOK_S = 0.2
_TIMED_OUT = -1000  # no signal has this number
_NEEDS_MODEL = "it needs a model to be tried with: --model REF"
_NEEDED = ("pytest", "hypothesis")
_STARTER = "from stoker.doctor.suites import make_suites\nglobals().update(make_suites())\n"
_COMMAND: Sequence[str] = (
    *(sys.executable, "-P", "-m", "pytest", "-q", "--tb=short", "-p", "stoker.doctor.suites"),
    *(
        "-p",
        "stoker.testing.pytest_plugin",
        "-p",
        "no:cacheprovider",
        "-c",
        "pytest.ini",
        "--rootdir",
        ".",
        "test_conformance.py",
    ),
)


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Something to run a suite over.

    Attributes:
        kind: One of ``KINDS``.
        name: The descriptor's name.
        model: What a backend is tried with.
        options: The backend's options, as its section of the configuration has them.
    """

    kind: str
    name: str
    model: LocalModel | None = None
    options: dict[str, Any] = {}

    @property
    def label(self) -> str:
        """How tables call it."""
        return f"{self.kind} {self.name}"

    @property
    def lacks_model(self) -> bool:
        """Whether it cannot be tried for want of a model."""
        return self.kind == "backend" and self.model is None


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one check of a suite.

    Attributes:
        target: What was checked: ``policy fair``.
        check: Which check.
        outcome: ``passed``, ``failed`` or ``skipped``.
        message: What was wrong, or why it was skipped; of an exception the text, and where it was raised.
        advice: What the check says about how to mend it; nothing if it could not begin.
        seconds: How long it took.
        traceback: Where an exception came from.
        log: What was logged, where it failed.
    """

    target: str
    check: str
    outcome: Literal["passed", "failed", "skipped"]
    message: str = ""
    advice: str = ""
    seconds: float = 0.0
    traceback: str = ""
    log: str = ""

    def details(self) -> list[str]:
        """What to print below it, a paragraph each: what is wrong, and what to do about it.

        Most failures bring an advice of their own, after the first line of the message.
        """
        if self.outcome == "passed":
            return []
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        has_advice = len(lines) > 1
        logged = self.log.strip().splitlines()
        if logged and logged[-1].strip():
            lines.append(f"Logged last: {logged[-1].strip()}")
        if self.outcome == "failed" and (self.traceback or not has_advice):
            paragraphs = inspect.cleandoc(self.advice).split("\n\n")
            lines += [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]
        return lines


class _Event(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the child's report: a check that begins, or its result."""

    begins: str = ""
    target: str = ""
    result: CheckResult | None = None


# --------------------------------------------------------------------------- what to run


def find_targets(
    name: str, plugins: Plugins, config: Config, model: str | None = None
) -> list[Target]:
    """What a plugin offers that there are suites for.

    Args:
        name: Of an entry point or a distribution, for all it offers; or of a single backend, policy,
            middleware or observer.
        plugins: All plugins.
        config: For the options of backends, and for the models to try them with.
        model: The model to try a backend with; by default a configured one that it loads, or the default
            model.

    Raises:
        ConfigError: There is no such plugin, nothing of it has a suite, or a backend has no model.
        PluginError: The plugin is broken or refused.
        ModelError: The model is not there.
    """
    rows = plugins.listing(config)
    fitting = [row for row in rows if name in (row.name, row.distribution)]
    offered = [pair for row in fitting for pair in _offers(row)]
    if not fitting:
        offered = [pair for row in rows for pair in _offers(row) if pair[1] == name]
    if not offered:
        raise ConfigError(_nothing(name, rows, fitting))
    for kind, found in offered:
        plugins.require(kind, found)  # broken, refused and contested ones raise
    targets = [
        _backend(found, plugins, config, model)
        if kind == "backend"
        else Target(kind=kind, name=found)
        for kind, found in offered
    ]
    if len(targets) == 1 and targets[0].lacks_model:
        raise ConfigError(f"{targets[0].label}: {_NEEDS_MODEL}")
    return targets


def _offers(row: PluginListing) -> list[tuple[str, str]]:
    return [(kind, name) for kind in KINDS for name in row.provides.get(kind, ())]


def _nothing(name: str, rows: Sequence[PluginListing], fitting: Sequence[PluginListing]) -> str:
    for row in fitting:
        if row.reason is not None:
            return row.reason
        return f"the plugin {name!r} offers nothing that there is a suite for: {', '.join(KINDS)}"
    known = {row.name for row in rows} | {found for row in rows for _, found in _offers(row)}
    return (
        f"there is no plugin {name!r}, and no {', '.join(KINDS[:-1])} or {KINDS[-1]} of that name."
        f"{did_you_mean(name, sorted(known))} `stoker plugins` lists what is installed."
    )


def _backend(name: str, plugins: Plugins, config: Config, model: str | None) -> Target:
    """A backend and a model that it loads, if there is one."""
    info = plugins.require("backend", name)
    options = {k: v for k, v in config.plugins.get(name, {}).items() if k != "enabled"}
    plugins.options(info, config)  # refuses wrong ones
    if model is not None:
        from stoker.discovery import resolve_model  # noqa: PLC0415 - only where it may fetch

        local = resolve_model(model, plugins, progress=True)
    else:
        backend = info.factory() if isinstance(info, BackendInfo) else None
        here = [found.local for found in find_models(config, plugins) if found.local is not None]
        fitting = [found for found in here if backend is not None and backend.accepts(found)]
        if not fitting:
            return Target(kind="backend", name=name)
        local = fitting[0]
    local = msgspec.structs.replace(local, path=local.path.absolute())
    return Target(kind="backend", name=name, model=local, options=options)


# --------------------------------------------------------------------------- running


def run_suites(
    targets: Sequence[Target],
    *,
    speed: bool = False,
    on_check: Callable[[str, str], None] | None = None,
) -> list[CheckResult]:
    """Run the suites in a child process.

    Args:
        targets: What to run them over.
        speed: Whether to run their measurements, too.
        on_check: Told now and then what is being checked: the target and the check.

    Raises:
        StokerError: pytest or hypothesis is missing, or the child did nothing useful.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StokerError(
            f'the conformance suites need {" and ".join(missing)}: pip install "stoker[testing]"'
        )
    results = [
        CheckResult(target=target.label, check="all", outcome="skipped", message=_NEEDS_MODEL)
        for target in targets
        if target.lacks_model
    ]
    targets = [target for target in targets if not target.lacks_model]
    if not targets:
        return results
    with tempfile.TemporaryDirectory(prefix="stoker-doctor-") as name:
        folder = Path(name)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "test_conformance.py").write_text(_STARTER)
        (folder / "targets.json").write_bytes(msgspec.json.encode(targets, enc_hook=str))
        code, output = _run_child(folder, ["--stoker-speed"] if speed else [], on_check)
        return results + _read_report(folder / "report.jsonl", code, output)


def _run_child(
    folder: Path, more: Sequence[str], on_check: Callable[[str, str], None] | None
) -> tuple[int, str]:
    """Its exit code, and what it printed."""
    environ = {
        **os.environ,
        "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        # The suites bring all they need; other people's pytest plugins would only change how they run.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    environ.pop("PYTEST_ADDOPTS", None)
    if path := environ.get("PYTHONPATH"):  # its folders may be relative to ours
        environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, path.split(os.pathsep)))
    printed = folder / "printed"
    with (
        printed.open("wb") as output,
        subprocess.Popen(  # noqa: S603 - our own interpreter and pytest
            [*_COMMAND, *more],
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as child,
    ):
        try:
            code = _wait(child, folder / "report.jsonl", on_check)
        except BaseException:
            child.kill()
            raise
    return code, printed.read_bytes().decode("utf-8", "replace")


def _wait(
    child: subprocess.Popen[bytes], report: Path, on_check: Callable[[str, str], None] | None
) -> int:
    """Its exit code; ``_TIMED_OUT`` if it had to be stopped."""
    end_s = time.monotonic() + _LIMIT_S
    while time.monotonic() < end_s:
        try:
            return child.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            events = _events(report) if on_check is not None else []
        begun = [event for event in events if event.begins]
        if on_check is not None and begun:
            on_check(begun[-1].target, begun[-1].begins)
    child.kill()
    return _TIMED_OUT


def _events(report: Path) -> list[_Event]:
    """What the child has reported so far; a line that is being written is none yet."""
    lines = report.read_bytes().splitlines(keepends=True) if report.exists() else []
    return [msgspec.json.decode(line, type=_Event) for line in lines if line.endswith(b"\n")]


def _read_report(path: Path, code: int, output: str) -> list[CheckResult]:
    """The results, and whatever ended the child before its time."""
    events = _events(path)
    results = [event.result for event in events if event.result is not None]
    if code not in (0, 1):  # 1: some failed
        names = {number.value: number.name for number in signal.Signals}
        how = f"ended with code {code}" if code >= 0 else f"was killed by {names.get(-code, -code)}"
        if code == _TIMED_OUT:
            how = f"did not end within {_LIMIT_S:.0f} s"
        last = events[-1] if events else _Event()
        if not last.begins:
            raise StokerError(
                f"the suites could not be run: pytest {how}: {output.strip()[-2000:]}"
            )
        results.append(
            CheckResult(
                target=last.target,
                check=last.begins,
                outcome="failed",
                message=f"The process {how} during this check.",
                advice="Nothing that follows was checked.",
            )
        )
    return results
