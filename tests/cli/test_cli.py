"""The command line as its users meet it: in processes of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker import __version__
from stoker.discovery import CORE_COMMANDS

pytestmark = pytest.mark.slow  # starts processes

COMMAND = [sys.executable, "-c", "import stoker.cli, sys; sys.exit(stoker.cli.main())"]


class Cli:
    """Runs ``stoker`` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}

    def __call__(
        self, *arguments: str, stdin: str = "", **environ: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *arguments],
            env={**self.environ, **environ},
            cwd=self.folder,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *arguments],
            env=self.environ,
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def fails(self, code: int, *arguments: str, **environ: str) -> str:
        """The one line on standard error of a command that ends with ``code``."""
        done = self(*arguments, **environ)
        assert (done.returncode, done.stdout) == (code, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("stoker: error: ")
        return line

    def configure(self, text: str) -> None:
        (self.folder / "stoker.toml").write_text(text)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@contextlib.contextmanager
def serving(cli: Cli, *arguments: str) -> Iterator[str]:
    """A real server with the scripted model on a free port; yields its address."""
    process = cli.start("serve", "scripted:tiny", "--port", "0", *arguments)
    assert process.stderr is not None
    try:
        seen = ""
        for line in process.stderr:
            seen += line
            if match := re.search(r"(http://\S+)/v1", line):
                yield match[1]
                break
        else:
            pytest.fail(f"the server did not start: {seen}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


# ------------------------------------------------------------------ help, exit codes


def test_help_lists_every_command(cli: Cli) -> None:
    done = cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name in CORE_COMMANDS:
        assert re.search(rf"^  {name}\s+\w", done.stdout, re.MULTILINE)
        described = cli(name, "--help")
        assert described.returncode == 0
        assert f"stoker {name}" in described.stdout


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"stoker {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, stoker.cli\n"
        "code = stoker.cli.main(['--help'])\n"
        "heavy = {'litestar', 'uvicorn', 'numpy', 'jinja2', 'httpx', 'rich', 'llama_cpp', 'torch',\n"
        "         'huggingface_hub', 'prometheus_client', 'psutil', 'stoker.engine.loop'}\n"
        "print(sorted(heavy & set(sys.modules)), code, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "[] 0\n"


def test_usage_errors_are_one_line_and_exit_2(cli: Cli) -> None:
    assert "no command 'serv'. Did you mean 'serve'?" in cli.fails(2, "serv")
    assert "--prot" in cli.fails(2, "serve", "--prot", "1")
    assert "'x' is not a valid integer" in cli.fails(2, "serve", "--port", "x")
    assert "Missing argument 'REFERENCE'" in cli.fails(2, "pull")


def test_configuration_errors_exit_2(cli: Cli) -> None:
    assert "server.port: must be at most 65535" in cli.fails(2, "serve", "--port", "70000")
    assert "no policy 'fifo'" in cli.fails(2, "serve", "--policy", "fifo")
    assert "no backend 'x'" in cli.fails(2, "serve", "--backend", "x")
    assert "no such configuration file" in cli.fails(2, "config", "--config", "none.toml")
    assert "Did you mean 'STOKER_SERVER_PORT'" in cli.fails(2, "config", STOKER_SERVER_PROT="1")
    cli.configure("[server]\nprot = 1\n")
    for command in ("serve", "config", "plugins", "models", "chat"):
        assert "server.prot: unknown setting (from stoker.toml)" in cli.fails(2, command)


def test_failures_at_run_time_exit_1(cli: Cli) -> None:
    assert "nope.gguf: there is no such file" in cli.fails(1, "pull", "nope.gguf")
    assert "nope.gguf: there is no such file" in cli.fails(1, "serve", "nope.gguf")
    assert "no model source has the scheme 'ftp'" in cli.fails(1, "serve", "ftp:x")
    assert "no server answers" in cli.fails(1, "chat", "--url", "http://127.0.0.1:9", "-m", "x")
    assert "no server answers" in cli.fails(1, "models", "--url", "127.0.0.1:9")


def test_debug_shows_the_traceback(cli: Cli) -> None:
    for arguments in (["-v", "pull", "nope"], ["pull", "nope", "--debug"]):
        done = cli(*arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("stoker: error: nope: ")


def test_a_reader_that_leaves_is_no_error(cli: Cli) -> None:
    process = cli.start("config")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, error = process.communicate(timeout=30)
    assert error == ""


# ------------------------------------------------------------------ config, plugins, pull, models


def test_config_shows_origins_and_masks_secrets(cli: Cli) -> None:
    cli.configure('[server]\napi_keys = ["s3cret"]\nport = 1\n')
    done = cli("config", "--json", STOKER_SERVER_PORT="2")
    data = json.loads(done.stdout)
    assert data["config"]["server"]["port"] == 2
    assert data["origins"]["server.port"] == "environment STOKER_SERVER_PORT"
    assert data["origins"]["server.api_keys"] == "stoker.toml"
    assert data["origins"]["server.host"] == "default"
    table = cli("config", "--check").stdout
    assert "s3cret" not in done.stdout + table
    assert re.search(r"server.port +1 +stoker.toml", table)
    assert "The configuration is valid." in table


def test_plugins_lists_the_bundled(cli: Cli) -> None:
    rows = json.loads(cli("plugins", "--json").stdout)
    bundled = next(row for row in rows if row["distribution"] == "stoker")
    assert bundled["status"] == "active"
    assert "fcfs" in bundled["provides"]["policy"]
    shown = cli("plugins").stdout
    assert re.search(r"^builtin +active +stoker \S+, import [\d.]+ ms$", shown, re.MULTILINE)
    assert re.search(r"^    policy +fcfs, ", shown, re.MULTILINE)
    assert not re.search(r" $", shown, re.MULTILINE)


def test_pull_prints_path_and_size(cli: Cli) -> None:
    (cli.folder / "tiny.gguf").write_bytes(b"GGUF" * 500)
    done = cli("pull", "tiny.gguf")
    assert (done.returncode, done.stdout) == (0, "tiny.gguf  2.0 kB\n")


def test_models_lists_what_can_be_served(cli: Cli) -> None:
    (cli.folder / "here.Q4_0.gguf").write_bytes(b"GGUF")
    cli.configure(
        '[server]\nport = 9\n[[models]]\nid = "mine"\nmodel = "here.Q4_0.gguf"\n'
        '[[models]]\nmodel = "gone.gguf"\n'
    )
    rows = {row["reference"]: row for row in json.loads(cli("models", "--json").stdout)}
    assert rows["here.Q4_0.gguf"]["id"] == "mine"
    assert rows["here.Q4_0.gguf"]["configured"] is True
    assert rows["here.Q4_0.gguf"]["size_bytes"] == 4
    assert rows["here.Q4_0.gguf"]["loaded"] is None
    assert "no such file" in rows["gone.gguf"]["problem"]
    table = cli("models").stdout
    assert re.search(r"mine +here.Q4_0.gguf +4 B", table)


# ------------------------------------------------------------------ chat


def test_chat_with_a_local_model(cli: Cli) -> None:
    done = cli("chat", "scripted:tiny", "--max-tokens", "5", "-m", "hello", "--temperature", "0")
    assert done.returncode == 0, done.stderr
    answer = done.stdout
    assert answer.strip()
    # Through a pipe: each line is a message; commands are not sent.
    piped = cli(
        *("chat", "scripted:tiny", "--max-tokens", "5", "--temperature", "0"),
        stdin="hello\n/help\n/nonsense\n/clear\nhello\n\n/quit\nnever sent\n",
    )
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == answer * 2  # cleared, so the same conversation again
    assert "/clear forgets" in piped.stderr
    assert "no command /nonsense" in piped.stderr


def test_chat_remembers_and_has_a_system_message(cli: Cli) -> None:
    options = ("chat", "scripted:tiny", "--max-tokens", "8", "--temperature", "0")
    twice = cli(*options, stdin="hello\nhello\n").stdout.splitlines()
    assert len(twice) == 2
    assert twice[0] != twice[1]  # the second prompt holds the first exchange
    system = cli(*options, "--system", "be brief", stdin="hello\n").stdout.splitlines()
    assert system != twice[:1]


def test_chat_and_models_ask_a_server(cli: Cli) -> None:
    with serving(cli, "--api-key", "right") as url:
        local = cli("chat", "scripted:tiny", "--max-tokens", "5", "-m", "hello", "--seed", "7")
        options = ("chat", "--max-tokens", "5", "-m", "hello", "--seed", "7", "--url")
        done = cli(*options, url, "--api-key", "right")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == local.stdout  # one router, one loop, whichever way in
        assert cli(*options, f"{url}/v1", STOKER_API_KEY="right").stdout == local.stdout
        assert "answered 401" in cli.fails(1, *options, url, "--api-key", "wrong")
        assert (
            "the model 'nope' is not served"
            in cli("chat", "nope", "--url", url, "--api-key", "right", "-m", "x").stderr
        )
        listed = cli("models", "--json", "--url", url, "--api-key", "right")
        rows = {row["id"]: row for row in json.loads(listed.stdout)}
        assert rows["tiny"]["loaded"] is True
        # A server at the configured address is found, and told the configured key.
        cli.configure(f'[server]\nport = {url.rpartition(":")[2]}\napi_keys = ["right"]\n')
        rows = {row["id"]: row for row in json.loads(cli("models", "--json").stdout)}
        assert rows["tiny"]["loaded"] is True
        found = cli(*options[:-1])
        assert found.stdout == local.stdout
        # Another server is not told the configured key.
        assert "answered 401" in cli.fails(1, "models", "--url", url)


def test_a_context_that_is_full_is_said_and_the_chat_goes_on(cli: Cli) -> None:
    cli.configure("[[models]]\nmodel = 'scripted:tiny'\ncontext = 64\n")
    done = cli(*("chat", "scripted:tiny", "--max-tokens", "4"), stdin=f"{'long ' * 100}\nshort\n")
    assert done.returncode == 1  # something failed, and nobody was there to see it
    assert "context" in done.stderr
    assert done.stdout.strip()


def test_ctrl_c_stops_the_answer_and_not_the_program(cli: Cli) -> None:
    cli.configure("[plugins.scripted]\nstep_s = 0.02\n")
    process = cli.start("chat", "scripted:tiny")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    first = process.stdout.read(
        1
    )  # it has begun to answer, and would go on for thousands of tokens
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate("/help\n", timeout=30)
    assert process.returncode == 0, error
    assert "(stopped)" in error
    assert "/clear forgets" in error
    assert first
    assert len(rest) < 2000
