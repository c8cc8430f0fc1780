"""``stoker chat``: a conversation in the terminal, with a server or with a model in this process."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing
from typing import TYPE_CHECKING, Any, Protocol

import click

from stoker.cli.common import State, config_option, report
from stoker.errors import StokerError

if TYPE_CHECKING:
    import asyncio

    from stoker.config import Config
    from stoker.discovery import Plugins

__all__ = ["command"]

_HELP = "/clear forgets the conversation, /quit leaves; Ctrl-C stops an answer."

Message = dict[str, str]


class _Partner(Protocol):
    """Who answers."""

    name: str

    def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        """Yield the pieces of the answer's text."""


class _Remote:
    """A model of a running server."""

    def __init__(self, server: Any, model: str, sampling: dict[str, Any]) -> None:
        self.name = f"{model} at {server.url}"
        self._server = server
        self._body = {"model": model, **sampling}

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        async with aclosing(self._server.chat({**self._body, "messages": messages})) as pieces:
            async for piece in pieces:
                yield piece


class _Local:
    """A model loaded into this process, through the same router and loop as a server's."""

    def __init__(self, router: Any, sampling: dict[str, Any]) -> None:
        self._router = router
        self._sampling = sampling
        self.name = router.models()[0].model_id

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str, None]:
        from stoker.router import Call
        from stoker.types import SamplingParams

        call = Call(
            request_id="chat",
            model=self.name,
            messages=list(messages),
            sampling=SamplingParams(**self._sampling),
            endpoint="chat",
        )
        generation = await self._router.generate(call)
        try:
            async for batch in generation:
                for delta in batch:
                    if delta.text:
                        yield delta.text
                    if delta.error is not None:
                        raise delta.error
        finally:
            generation.abort()


@click.command("chat")
@click.argument("model", required=False)
@click.option("--url", help="Chat with this server; MODEL is then the id of one of its models.")
@click.option("--api-key", envvar="STOKER_API_KEY", help="Key to present to the server.")
@click.option("--system", help="System message.")
@click.option("-m", "--message", help="Send this one message, print the answer and leave.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.7, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", type=int, help="Makes answers reproducible.")
@config_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    config_path: str | None,
    model: str | None,
    url: str | None,
    api_key: str | None,
    system: str | None,
    message: str | None,
    **sampling: Any,
) -> int:
    """Chat with a model in the terminal.

    With --url a server answers; with MODEL alone, that model is loaded here; with neither, the server at
    the configured address if it runs, else the configured or default model. Messages may come from a
    pipe, one a line.
    """
    import asyncio

    state = State.of(ctx)
    chosen = {name: value for name, value in sampling.items() if value is not None}
    config, _ = state.config(config_path, {"models.model": None if url else model})
    opening = [{"role": "system", "content": system}] if system else []
    with ExitStack() as stack:
        partner = _remote_partner(config, model, url, api_key, chosen)
        if partner is None:
            partner = _local_partner(config, state.plugins, chosen, stack)
        # One event loop for the whole conversation; between answers it stands still.
        runner = stack.enter_context(asyncio.Runner())
        return _Conversation(partner, opening, runner).run(message)


def _remote_partner(
    config: Config,
    model: str | None,
    url: str | None,
    api_key: str | None,
    sampling: dict[str, Any],
) -> _Partner | None:
    if url is None and model is not None:
        return None
    from stoker.cli.remote import find_server

    server = find_server(config, url, api_key)
    served = server.models() if url else server.models_if_running()
    if not served:
        return None
    return _Remote(server, model or served[0], sampling)


def _local_partner(
    config: Config, plugins: Plugins, sampling: dict[str, Any], stack: ExitStack
) -> _Partner:
    from stoker.server import build_server

    server = build_server(config, plugins)
    stack.callback(server.stop)
    server.start()
    return _Local(server.router, sampling)


class _Conversation:
    """Reads messages, prints answers, remembers both."""

    def __init__(self, partner: _Partner, opening: list[Message], runner: asyncio.Runner) -> None:
        self._partner = partner
        self._opening = opening
        self._messages = list(opening)
        self._runner = runner

    def run(self, message: str | None) -> int:
        """Hold the conversation; returns the exit code."""
        if message is not None:
            return 0 if self._say(message) else 1
        interactive = sys.stdin.isatty()
        if interactive:
            click.echo(f"Chatting with {self._partner.name}. {_HELP}", err=True)
        failed = False
        for line in _lines(interactive=interactive):
            text = line.strip()
            if text in ("/quit", "/exit"):
                break
            if text == "/clear":
                self._messages = list(self._opening)
            elif text == "/help":
                click.echo(_HELP, err=True)
            elif text.startswith("/"):
                click.echo(f"there is no command {text.split()[0]}. {_HELP}", err=True)
            elif text:
                failed |= not self._say(text)
        return 1 if failed and not interactive else 0

    def _say(self, text: str) -> bool:
        """Send a message and print the answer; whether there was one."""
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            self._runner.run(self._print_answer(pieces))
        except KeyboardInterrupt:
            click.echo(" (stopped)", err=True)
        except StokerError as error:
            self._messages.pop()
            click.echo()
            report(str(error))
            return False
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        click.echo()
        return True

    async def _print_answer(self, pieces: list[str]) -> None:
        # Closed here and now, so that a stopped answer stops being computed.
        async with aclosing(self._partner.answer(self._messages)) as answer:
            async for piece in answer:
                pieces.append(piece)
                click.echo(piece, nl=False)


def _lines(*, interactive: bool) -> Iterator[str]:
    """What the user types, or what the pipe brings, until its end."""
    if not interactive:
        yield from sys.stdin
        return
    import readline  # noqa: F401  # gives input() line editing

    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo(err=True)
            return
        except KeyboardInterrupt:
            click.echo("\n(/quit or Ctrl-D leaves)", err=True)
