"""The HTTP connection, as far as an answer must know it: how to break it off.

ASGI has no word for that, and closing a connection first waits until everything was sent: for a client that
has stopped reading, for ever.
"""

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["HttpProtocol", "break_off"]

_EXTENSION = "stoker.connection"


class HttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, whose requests can break off their connection."""

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["extensions"] = {_EXTENSION: {"break_off": self.transport.abort}}


def break_off(scope: Any) -> bool:
    """Break off a request's connection, sent or not; returns whether the server can do that."""
    connection = (scope.get("extensions") or {}).get(_EXTENSION)
    if connection is None:
        return False
    connection["break_off"]()
    return True
