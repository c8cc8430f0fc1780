"""Logging: JSON or pretty lines on standard error, each with the request it belongs to.

Prompts, answers and keys are never logged. What a client sent and a line shows (a path, a model's name) has
its control characters escaped, so that nobody can forge a line.
"""

from __future__ import annotations

import contextvars
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from stoker.config import LoggingConfig

__all__ = ["CURRENT_REQUEST", "RequestContext", "setup_logging"]

_QUIET = ("httpcore", "httpx", "litestar", "uvicorn")  # they say at INFO what nobody asked for
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != 9}
_COLOURS = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}


class RequestContext:
    """What log lines say of the HTTP request in whose context they are written.

    Args:
        request_id: The ``x-request-id`` of the answer.

    Attributes:
        tenant: Who asks.
        model: The model that serves it, once known.
        prompt_tokens: Tokens of the prompt, once known.
        completion_tokens: Tokens generated, once known.
        error: What an unexpected end was due to.
        user: Who asks, in the tenant's own words.
        priority: The priority that whatever it starts gets, whatever it asks for; ``None`` leaves that to it.
    """

    __slots__ = (
        "completion_tokens",
        "error",
        "model",
        "priority",
        "prompt_tokens",
        "request_id",
        "tenant",
        "user",
    )

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.tenant = "anonymous"
        self.model: str | None = None
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.error: str | None = None
        self.user = ""
        self.priority: int | None = None


CURRENT_REQUEST: contextvars.ContextVar[RequestContext | None] = contextvars.ContextVar(
    "stoker_request", default=None
)


class _StderrHandler(logging.StreamHandler[Any]):
    """Our handler, told apart from others so that it can be replaced; follows ``sys.stderr``."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class JsonFormatter(logging.Formatter):
    """One JSON object for each line; a record's ``fields`` (a dict) become keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = CURRENT_REQUEST.get()
        if request is not None:
            line["request_id"] = request.request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()


class PrettyFormatter(logging.Formatter):
    """Lines for people.

    Args:
        colour: Whether to use terminal colours.
    """

    def __init__(self, *, colour: bool) -> None:
        super().__init__()
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it if there is one."""
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        level = f"{record.levelname:<7}"
        if self._colour and record.levelname in _COLOURS:
            level = f"\x1b[{_COLOURS[record.levelname]}m{level}\x1b[0m"
        line = f"{time} {level} {record.name}: {record.getMessage().translate(_ESCAPES)}"
        request = CURRENT_REQUEST.get()
        if request is not None:
            line += f" [{request.request_id}]"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def setup_logging(config: LoggingConfig) -> None:
    """Write log lines to standard error as ``[logging]`` says; may be called again to change that."""
    terminal = sys.stderr.isatty()
    pretty = config.format == "pretty" or (config.format == "auto" and terminal)
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(PrettyFormatter(colour=terminal) if pretty else JsonFormatter())
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _StderrHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    level = getattr(logging, config.level.upper())
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(level if level <= logging.DEBUG else logging.WARNING)
    logging.captureWarnings(True)
