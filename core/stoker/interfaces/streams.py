"""What a request is answered with: a stream of deltas, whoever makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from stoker.types import Delta, Request, RequestRecord, SequenceTrace

if TYPE_CHECKING:
    from stoker.errors import RequestError

__all__ = ["DeltaStream"]


class DeltaStream(ABC):
    """The deltas of one request, of all its sequences.

    The engine makes one for every request that is submitted; middleware may put another in its place
    (``Middleware.submit``). All methods are called on the event loop's thread.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def request(self) -> Request:
        """The request."""

    @property
    @abstractmethod
    def records(self) -> Sequence[RequestRecord]:
        """One record for each sequence that has ended."""

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield non-empty batches until every sequence has had its last delta, or ``abort`` was called.

        Asking for the next batch says that the one before was dealt with, such as sent.
        """

    @abstractmethod
    def abort(self) -> None:
        """Stop: the reader has gone. May be called twice, and after the end."""

    @abstractmethod
    def cancel(self, error: RequestError) -> None:
        """End it with an error that its reader is told; does nothing after the end."""

    @abstractmethod
    async def wait_until_over(self) -> None:
        """Wait until nothing more is made for it and its records are there, also after an abort."""

    @abstractmethod
    def traces(self) -> list[SequenceTrace]:
        """What has happened to each of its sequences so far."""
