"""What the options of ``stoker bench`` are made into, and why they are refused."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from stoker.errors import ConfigError
from stoker_plugins.bench import scenarios

if TYPE_CHECKING:
    from stoker_plugins.bench.figures import Objectives
    from stoker_plugins.bench.workload import Lengths

__all__ = ["TargetSpec", "check", "lengths", "objectives", "scenario_names", "target_specs"]

_DEFAULT_URL = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """A target as the user names it.

    Attributes:
        name: In tables; the URL's host and port if none was given.
        url: Base URL, without a slash at its end.
        model: ``None`` for the server's first.
    """

    name: str
    url: str
    model: str | None

    @classmethod
    def parse(cls, text: str) -> TargetSpec:
        """Understand ``[NAME=]URL[,MODEL]``.

        Raises:
            ValueError: It is no URL.
        """
        before, scheme, after = text.partition("://")
        name = ""
        if "=" in before:
            name, _, before = before.partition("=")
        rest, _, model = f"{before}{scheme}{after}".partition(",")
        url = rest if "://" in rest else f"http://{rest}"
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{text!r} is no target: write NAME=http://HOST:PORT/v1 or add ,MODEL")
        _ = parts.port  # raises if it is no port
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError(f"{parts.hostname}: a base URL has no user, query or fragment")
        path = parts.path.rstrip("/") or "/v1"
        url = f"{parts.scheme}://{parts.netloc}{path}"
        return cls(name.strip() or parts.netloc, url, model.strip() or None)

    def check_local(self) -> None:
        """Refuse a target that is not this machine.

        Raises:
            click.UsageError: It is not.
        """
        host = urlsplit(self.url).hostname or ""
        if not _is_loopback(host):
            raise click.UsageError(
                f"--target {self.name}: {host} is not this machine. Load hurts whoever else uses a server; "
                "--yes-remote says that it is yours to measure"
            )


def _is_loopback(host: str) -> bool:
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return all(
        ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found
    )


def target_specs(
    _ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> list[TargetSpec]:
    """The targets; the default one if there are none."""
    try:
        specs = [TargetSpec.parse(text) for text in values or (f"stoker={_DEFAULT_URL}",)]
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise click.BadParameter("two targets have the same name: name them NAME=URL")
    return specs


def scenario_names(
    _ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]
) -> tuple[str, ...]:
    """The scenarios' names, each once; ``all`` stands for all."""
    names = [name for value in values for name in (scenarios.ALL if value == "all" else (value,))]
    for name in names:
        if (problem := scenarios.check(name)) is not None:
            raise click.BadParameter(problem)
    return tuple(dict.fromkeys(names))


def lengths(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Lengths | None:
    """A distribution of token counts."""
    from stoker_plugins.bench.workload import Lengths

    if value is None:
        return None
    try:
        return Lengths.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def objectives(
    _ctx: click.Context, _parameter: click.Parameter, value: str | None
) -> Objectives | None:
    """Service-level objectives."""
    from stoker_plugins.bench.figures import Objectives

    if value is None:
        return None
    try:
        return Objectives.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_FOR_TRACE = ("speedup", "length_scale", "max_prompt_tokens", "max_output_tokens")
_FOR_OWN = ("prompt_tokens", "output_tokens", "shared_prefix")
_FOR_BOTH = ("limit", "temperature")


def check(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be done, before anything is sent.

    Raises:
        click.UsageError: Options contradict each other.
        ConfigError: What is asked for cannot be written.
    """
    _check_load(options)
    if options["compare_texts"] and len(options["targets"]) < 2:
        raise click.UsageError("--compare-texts needs two targets")
    if not options["yes_remote"]:
        for spec in options["targets"]:
            spec.check_local()
    if options["plots"]:
        from stoker_plugins.bench.plots import check_plot

        for path in options["plots"]:
            check_plot(path)
    for path in (options["json_path"], *options["plots"]):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")


def _check_load(options: Mapping[str, Any]) -> None:
    """One kind of load, and only options that mean something to it."""
    chosen = ["scenario"] if options["names"] else []
    chosen += [name for name in ("concurrency", "rate", "trace") if options[name] is not None]
    if len(chosen) > 1:
        raise click.UsageError(f"--{chosen[0]} and --{chosen[1]} are different loads: choose one")
    load = chosen[0] if chosen else "scenario"
    for names, loads in (
        (_FOR_TRACE, ("trace",)),
        (_FOR_OWN, ("concurrency", "rate")),
        (_FOR_BOTH, ("concurrency", "rate", "trace")),
    ):
        for name in names:
            if options[name] is not None and load not in loads:
                needed = " or ".join(f"--{each}" for each in loads)
                raise click.UsageError(f"--{name.replace('_', '-')} needs {needed}")
