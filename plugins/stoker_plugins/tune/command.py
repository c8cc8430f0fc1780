"""The command ``stoker tune``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from stoker import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress

    from stoker.profiles import Profile, Weights
    from stoker_plugins.tune.host import Host
    from stoker_plugins.tune.report import Report
    from stoker_plugins.tune.session import Session, Wishes
    from stoker_plugins.tune.target import Target

__all__ = ["command"]

_INTERRUPTED = 130


@click.command("tune")
@click.argument("model", required=False)
@click.option(
    "--load",
    type=click.Choice(["interactive", "throughput", "agents"]),
    default="interactive",
    show_default=True,
    help="What the model will be used for.",
)
@click.option(
    "--budget",
    type=click.FloatRange(min=0.1),
    default=10.0,
    show_default=True,
    metavar="MINUTES",
    help="How long to search.",
)
@click.option(
    "--run-seconds",
    type=click.FloatRange(min=0.1, max=60),
    default=2.0,
    show_default=True,
    help="How long one run of the load takes; longer on noisy machines.",
)
@click.option("--only", multiple=True, metavar="NAME", help="Tune only this; may be repeated.")
@click.option(
    "--requantize",
    multiple=True,
    metavar="TYPE",
    help="Also try the weights in this type, e.g. q8_0; may be repeated.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(min=0),
    default=0.02,
    show_default=True,
    help="Largest mean KL divergence, in nats, from what the model says with the defaults.",
)
@click.option("--plot", metavar="FILE", help="Also draw the result (needs the extra `plots`).")
@click.option("--json", "json_file", metavar="FILE", help="Also write everything as JSON.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured, and measure nothing.")
@click.option("--yes", is_flag=True, help="Do not ask: also take other weights if they are better.")
@click.option("--backend", help="Backend that loads the model.  [default: auto]")
@click.option("--show", is_flag=True, help="Show the profiles there are, and end.")
@click.option("--forget", is_flag=True, help="Delete the model's profile, and end.")
@click.option("--config", "config_path", metavar="FILE", help="Configuration file.")
@click.option("--worker", is_flag=True, hidden=True)
@click.pass_obj
def command(host: Host, /, worker: bool, **flags: Any) -> int:
    """Measure what settings are best for a model on this machine.

    Each setting is measured in a process of its own under a short version of the chosen load, against the
    best so far, in turns. What is clearly better, and leaves the model saying the same, goes into a profile
    that `stoker serve` picks up where nothing else is set. MODEL is what `stoker serve` takes.
    """
    if worker:
        from stoker_plugins.tune.worker import serve_job

        return serve_job(host, sys.stdin.buffer, sys.stdout.buffer)
    if flags["show"]:
        return _show(host, flags)
    if flags["forget"]:
        return _forget(host, flags)
    return _tune(host, flags)


def _tune(host: Host, flags: dict[str, Any]) -> int:
    from stoker_plugins.tune.search import Rules
    from stoker_plugins.tune.session import Session, Wishes
    from stoker_plugins.tune.target import find_target

    if flags["plot"]:
        from stoker_plugins.tune.plot import check

        check()
    target = find_target(host, flags["config_path"], flags["model"], flags["backend"])
    _check_names(target, flags)
    wishes = Wishes(
        load=flags["load"],
        budget_s=60 * flags["budget"],
        run_s=flags["run_seconds"],
        only=flags["only"],
        requantize=[name.lower() for name in flags["requantize"]],
        rules=Rules(max_kl=flags["max_kl"]),
    )
    if flags["dry_run"]:
        _print_plan(target, wishes)
        return 0
    with _Teller() as teller:
        session = Session(target, wishes, teller.tell)
        try:
            session.run()
        except KeyboardInterrupt:
            teller.stop()
            return _after_interrupt(session, flags)
        except BaseException:
            session.close()
            raise
    return _finish(session, flags, interrupted=False)


def _check_names(target: Target, flags: dict[str, Any]) -> None:
    from stoker_plugins.tune.space import WEIGHTS

    known = [*target.space.dimensions, WEIGHTS]
    for name in flags["only"]:
        if name in target.skipped:
            raise ConfigError(f"--only {name}: cannot be tuned: {target.skipped[name]}")
        if name not in known:
            raise ConfigError(f"--only {name}: there is nothing of this name; {', '.join(known)}")
    if not flags["requantize"]:
        return
    offer = target.backend.requantization(target.local)
    types = list(offer.types) if offer is not None else []
    for name in flags["requantize"]:
        if name.lower() not in types:
            raise ConfigError(
                f"--requantize {name}: the backend {target.backend_name} cannot write this; "
                f"it can write: {', '.join(types) or 'none'}"
            )


def _print_plan(target: Target, wishes: Wishes) -> None:
    from stoker_plugins.tune.loads import LOADS

    click.echo(f"model    {target.local.model_id} ({target.local.path})")
    click.echo(f"backend  {target.backend_name}")
    click.echo(f"load     {wishes.load}: {LOADS[wishes.load].summary}")
    click.echo(f"budget   {wishes.budget_s / 60:g} minutes")
    for dimension in target.space.dimensions.values():
        if wishes.only and dimension.name not in wishes.only:
            continue
        others = ", ".join(label for label in dimension.values if label != dimension.default)
        click.echo(f"{dimension.name}: {dimension.default}, or {others}  ({dimension.summary})")
    for name, why in target.skipped.items():
        click.echo(f"{name}: not tuned: {why}")
    for name in wishes.requantize:
        click.echo(f"weights: {name}")


# --------------------------------------------------------------------------- the end of it


def _after_interrupt(session: Session, flags: dict[str, Any]) -> int:
    click.echo("interrupted; this is what is known so far", err=True)
    _finish(session, flags, interrupted=True)
    return _INTERRUPTED


def _finish(session: Session, flags: dict[str, Any], *, interrupted: bool) -> int:
    """Show what was found, write what was asked for, and keep what the user wants kept."""
    kept = None
    try:
        report = session.report
        _add_notes(session)
        _print(report)
        if session.weights is not None and not interrupted and _wants_weights(session, flags):
            kept = session.weights[1]
        if _wants_profile(session, flags, interrupted=interrupted, weights=kept is not None):
            report.profile = str(_write(session, with_weights=kept is not None))
            click.echo(f"profile written: {report.profile}")
            click.echo("`stoker serve` uses it from now on; `--no-profile` serves without it.")
        elif not interrupted and session.weights is None:
            click.echo("no profile was written: nothing is clearly better than the defaults")
        if flags["json_file"]:
            _write_json(report, Path(flags["json_file"]))
        if flags["plot"]:
            from stoker_plugins.tune.plot import draw

            draw(report, Path(flags["plot"]))
    finally:
        session.close(keep=kept)
    return 0


def _add_notes(session: Session) -> None:
    offer = session.target.backend.requantization(session.target.local)
    report = session.report
    if offer is None:
        return
    if report.weights and offer.lossy_source:
        report.notes.append(
            f"The weights were {offer.current} already; turning the full weights into another type "
            "would lose less than turning these."
        )
    for name, size in report.weights.items():
        own = session.target.local.size_bytes
        report.notes.append(f"weights {name}: {size / 1e6:.1f} MB (own: {own / 1e6:.1f} MB)")
    if offer.hint and not report.weights and (alone := report.defaults.get("alone")):
        types = " ".join(f"--requantize {name}" for name in offer.faster[:3])
        report.notes.append(
            f"{offer.hint} They prefill {alone.prefill_tokens_per_s:.0f} tokens/s here and decode "
            f"{alone.decode_tokens_per_s:.0f}; `stoker tune {types}` measures whether others are faster."
        )


def _print(report: Report) -> None:
    from rich.console import Console

    from stoker_plugins.tune.report import print_report

    console = Console(highlight=False, soft_wrap=True)
    if not sys.stdout.isatty():
        console = Console(width=160, highlight=False)
    print_report(report, console)


def _wants_weights(session: Session, flags: dict[str, Any]) -> bool:
    if session.weights is None:
        return False
    name, local = session.weights
    if flags["yes"]:
        return True
    question = f"Serve this model with its weights as {name} ({local.size_bytes / 1e6:.1f} MB)?"
    if sys.stdin.isatty():
        return click.confirm(question, default=False, err=True)
    click.echo(f"weights {name} are better, but were not kept: --yes says that they may be")
    return False


def _wants_profile(
    session: Session, flags: dict[str, Any], *, interrupted: bool, weights: bool
) -> bool:
    if not session.best and not weights:
        return False
    if not interrupted:
        return True
    if flags["yes"]:
        return True
    question = "Write a profile of what was better so far? It was not checked as a whole."
    return sys.stdin.isatty() and click.confirm(question, default=False, err=True)


def _write(session: Session, *, with_weights: bool) -> Path:
    from stoker.profiles import profile_path, read_profile, write_profile

    profile = _profile(session, with_weights=with_weights)
    path = profile_path(profile.machine, profile.model)
    older = None
    if path.exists():
        with contextlib.suppress(ConfigError):
            older = read_profile(path).weights
    written = write_profile(profile)
    if older is not None and (profile.weights is None or profile.weights.path != older.path):
        _delete_weights(older)
    return written


def _delete_weights(weights: Weights) -> None:
    """Delete a file that this command has made; no other."""
    from stoker.profiles import data_folder

    path = Path(weights.path)
    if path.parent == data_folder() / "weights" and path.exists():
        path.unlink()
        click.echo(f"deleted {path}")


def _profile(session: Session, *, with_weights: bool) -> Profile:
    from stoker.profiles import Profile, Weights, fingerprint

    target, report = session.target, session.report
    weights = None
    speed, quality = 1.0, None
    if report.final is not None and session.best:
        speed, quality = report.final.speed or 1.0, report.final.quality
    if with_weights and session.weights is not None:
        name, local = session.weights
        weights = Weights(type=name, path=str(local.path), digest=fingerprint(local).digest)
        row = next(r for r in report.rows if r.setting == "weights" and r.value == name)
        speed, quality = speed * (row.speed or 1.0), row.quality
    figures = {"speed": speed}
    if quality is not None:
        figures |= {"kl_mean": quality.kl_mean, "kl_max": quality.kl_max, "top1": quality.top1}
    return Profile(
        machine=target.machine,
        model=target.model_fingerprint,
        backend=target.backend_name,
        versions=dict(target.versions),
        load=report.load,
        date=report.date,
        settings=target.space.settings(session.best),
        weights=weights,
        figures=figures,
        complete=report.complete,
    )


def _write_json(report: Report, path: Path) -> None:
    import msgspec

    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from error


# --------------------------------------------------------------------------- profiles there are


def _show(host: Host, flags: dict[str, Any]) -> int:
    from stoker.profiles import data_folder, profile_path, read_profile

    files = sorted((data_folder() / "profiles").glob("*.json"))
    if flags["model"]:
        target = _find(host, flags)
        wanted = profile_path(target.machine, target.model_fingerprint)
        files = [file for file in files if file == wanted]
    for file in files:
        try:
            _print_profile(file, read_profile(file))
        except ConfigError as error:
            click.echo(f"{error}", err=True)
    if not files:
        click.echo("there is no profile; `stoker tune` makes one")
    return 0


def _print_profile(file: Path, profile: Profile) -> None:
    click.echo(f"{profile.model.name} with {profile.backend}: {profile.label}")
    click.echo(f"  file      {file}")
    click.echo(f"  machine   {profile.machine.cpu}, {profile.machine.cores} cores")
    click.echo(f"  versions  {', '.join(f'{k} {v}' for k, v in profile.versions.items())}")
    for setting in profile.settings:
        click.echo(f"  {setting.name} = {setting.value}")
    if profile.weights is not None:
        click.echo(f"  weights   {profile.weights.type}: {profile.weights.path}")
    click.echo("  figures   " + ", ".join(f"{k} {v:.3g}" for k, v in profile.figures.items()))
    if not profile.complete:
        click.echo("  the search was interrupted; the whole was not checked against the defaults")


def _forget(host: Host, flags: dict[str, Any]) -> int:
    from stoker.profiles import profile_path, read_profile

    target = _find(host, flags)
    path = profile_path(target.machine, target.model_fingerprint)
    if not path.exists():
        click.echo(f"there is no profile of {target.local.model_id} for this machine")
        return 0
    try:
        weights = read_profile(path).weights
    except ConfigError:
        weights = None  # a broken one can be forgotten, too
    path.unlink(missing_ok=True)
    click.echo(f"deleted {path}")
    if weights is not None:
        _delete_weights(weights)
    return 0


def _find(host: Host, flags: dict[str, Any]) -> Target:
    from stoker_plugins.tune.target import find_target

    return find_target(host, flags["config_path"], flags["model"], flags["backend"])


# --------------------------------------------------------------------------- progress


class _Teller:
    """Progress on standard error: a bar on a terminal, else a line for each new thing."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: Any = None
        self._last = ""

    def __enter__(self) -> Self:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
            # Slowly: what is drawn costs time on the cores that are measured.
            self._progress = Progress(*columns, console=console, refresh_per_second=1)
            self._progress.start()
            self._task = self._progress.add_task("", total=1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away; may be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def tell(self, doing: str, share: float) -> None:
        """Show what is being done and the share of the budget that is spent."""
        if self._progress is not None:
            self._progress.update(self._task, description=doing, completed=share)
        elif doing != self._last:
            click.echo(doing, err=True)
        self._last = doing
