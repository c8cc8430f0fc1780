"""``stoker bench``: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stoker_plugins.bench import scenarios
from stoker_plugins.bench.options import (
    check,
    lengths,
    objectives,
    scenario_names,
    target_specs,
)

__all__ = ["make_command"]


def make_command() -> click.Command:
    """The command, as ``CommandInfo`` wants it."""
    return _command


def _list_scenarios(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    width = max(map(len, scenarios.SUMMARIES))
    for name, summary in scenarios.SUMMARIES.items():
        click.echo(f"{name:{width}}  {summary}")
    ctx.exit()


@click.command("bench", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="[NAME=]URL[,MODEL]",
    callback=target_specs,
    help="Base URL of a server, and the model to ask for; may be repeated: targets are measured in turn, "
    "round after round.  [default: http://127.0.0.1:8000/v1 and its first model]",
)
@click.option(
    "--scenario",
    "names",
    multiple=True,
    metavar="NAME",
    callback=scenario_names,
    help=f"A load with a name, or all; may be repeated.  [default: {', '.join(scenarios.DEFAULT)}]",
)
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_scenarios,
    help="List the scenarios and leave.",
)
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 4096),
    help="A load of your own: so many clients, each sending when its last answer has ended.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, 10_000, min_open=True),
    help="A load of your own: requests a second in a Poisson process, whatever the answers take.",
)
@click.option(
    "--trace", metavar="NAME|FILE", help="Replay a trace: azure-code, azure-conversation, mooncake."
)
@click.option(
    "--limit", type=click.IntRange(1, 100_000), help="Requests of a round.  [default: 64]"
)
@click.option(
    "--prompt-tokens",
    metavar="LENGTH",
    callback=lengths,
    help="64, 16-128, normal:MEAN,DEVIATION or lognormal:MEDIAN,SIGMA.  [default: 128]",
)
@click.option(
    "--output-tokens", metavar="LENGTH", callback=lengths, help="The same.  [default: 64]"
)
@click.option(
    "--shared-prefix",
    type=click.IntRange(1, 1_000_000),
    metavar="TOKENS",
    help="Tokens that all prompts begin with.",
)
@click.option(
    "--temperature", type=click.FloatRange(0, 2), help="[default: 0; scenarios set their own]"
)
@click.option(
    "--speedup",
    type=click.FloatRange(0, 1e6, min_open=True),
    help="Replay a trace so many times faster.",
)
@click.option(
    "--length-scale",
    type=click.FloatRange(0, 100, min_open=True),
    help="Multiply the lengths in a trace.",
)
@click.option("--max-prompt-tokens", type=click.IntRange(1), help="Cut longer prompts of a trace.")
@click.option("--max-output-tokens", type=click.IntRange(1), help="Cut longer answers of a trace.")
@click.option(
    "--slo",
    metavar="NAME=TIME,...",
    callback=objectives,
    help="Count the requests that meet all of: ttft, tpot, itl, gap, e2e (ttft=500ms,itl=100ms).",
)
@click.option(
    "--compare-texts", is_flag=True, help="Count the answers that are the first target's."
)
@click.option(
    "--endpoint", type=click.Choice(["chat", "completions"]), default="chat", show_default=True
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="[NAME=]KEY",
    envvar="STOKER_API_KEY",
    help="Key to present to all targets, or to one.",
)
@click.option(
    "--seed", type=int, help="The same seed sends the same load again.  [default: random]"
)
@click.option(
    "--warm-up",
    type=click.IntRange(0, 100),
    default=2,
    show_default=True,
    help="Requests to each target beforehand, not counted.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(0, min_open=True),
    help="After so long, a round sends nothing more and waits for what runs.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    help="Longest time for one answer, in seconds.",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(1, 4096),
    default=512,
    show_default=True,
    help="Most requests at once of --rate and --trace.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write all figures of all rounds.",
)
@click.option(
    "--plot",
    "plots",
    multiple=True,
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write a picture (.png) or a page (.html); may be repeated.",
)
@click.option("--yes-remote", is_flag=True, help="Send load to targets that are not this machine.")
def _command(**options: Any) -> int:
    """Measure servers that speak the OpenAI API, side by side.

    Without options it measures the server at the default address under a few scenarios. --scenario chooses
    others; --concurrency, --rate or --trace take their place. Every load runs on each target in turn, round
    after round, so that a drift of the machine hits all of them alike. Ctrl-C prints what was measured so
    far.
    """
    check(options)
    # What measures is imported only now, when nothing is left to refuse.
    from stoker_plugins.bench.measurement import Measurement

    return Measurement(options).run()
