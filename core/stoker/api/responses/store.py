"""The store of responses: SQLite on a thread of its own. What goes wrong there harms no generation."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from stoker.api.responses.answer_schemas import FailureDetails, Item
from stoker.api.responses.builder import now
from stoker.api.responses.database import Database, StoredResponse
from stoker.api.responses.owners import this_process
from stoker.api.responses.records import KeptResponse, from_stored, to_stored
from stoker.errors import InvalidRequestError, RequestNotFoundError, UnavailableError
from stoker.profiles import data_folder

if TYPE_CHECKING:
    from stoker.config import ResponsesConfig

__all__ = ["ResponseStore"]

logger = logging.getLogger("stoker.responses")

T = TypeVar("T")

_MAX_CHAIN = 1000
_MAX_CHAIN_BYTES = 16 * 2**20
_MAX_WAITING = 1000  # writes; a disk that hangs must not fill the memory
_LOST = "the server stopped while this response was being generated; ask for it again"


class ResponseStore:
    """Keeps responses, each for its tenant only.

    It opens its file when it is first needed. A file that is broken is set aside, and one that cannot be
    opened leaves the memory; both with a warning.

    Args:
        config: Where, and how much.
    """

    def __init__(self, config: ResponsesConfig) -> None:
        self._config = config
        self._executor = ThreadPoolExecutor(1, "stoker-responses")
        self._database: Database | None = None
        self._num_waiting = 0
        self._owner = this_process()
        self._is_closed = False

    @property
    def is_on(self) -> bool:
        """Whether anything is kept at all."""
        return self._config.max_responses > 0

    # ------------------------------------------------------------------ from the event loop

    def put(
        self, kept: KeptResponse, tenant: str, *, is_running: bool = False
    ) -> asyncio.Future[str]:
        """Keep a response; returns at once. What is asked for from now on finds it.

        Args:
            kept: The response, as it is now.
            tenant: Whose it is.
            is_running: Whether this process still works on it.

        Returns:
            Becomes why it could not be kept; empty if it was.
        """
        loop = asyncio.get_running_loop()
        if self._num_waiting >= _MAX_WAITING:
            logger.warning("response %s is not stored: the disk is too slow", kept.response.id)
            full: asyncio.Future[str] = loop.create_future()
            full.set_result("the disk is too slow")
            return full
        stored = to_stored(kept, tenant, self._owner if is_running else None)
        item_ids = [item.id for item in (*kept.input, *kept.response.output)]
        self._num_waiting += 1
        written = self._executor.submit(self._put, stored, item_ids)
        written.add_done_callback(self._count)
        return asyncio.wrap_future(written, loop=loop)

    def _count(self, _: Future[str]) -> None:
        self._num_waiting -= 1

    async def get(self, response_id: str, tenant: str) -> KeptResponse:
        """A tenant's response.

        Raises:
            RequestNotFoundError: The tenant has none of that id.
            UnavailableError: The store cannot be read.
        """
        kept = await self._ask(lambda database: _read(database.get(response_id, tenant)))
        if kept is None:
            raise RequestNotFoundError(
                f"no response {response_id[:64]!r} is stored: it was not, was deleted, or has expired",
                param="response_id",
                code="response_not_found",
            )
        return kept

    async def history(self, response_id: str, tenant: str) -> list[KeptResponse]:
        """A tenant's response and all that it follows, the first one first.

        Raises:
            InvalidRequestError: One of them is not stored, or they are too many.
            UnavailableError: The store cannot be read.
        """

        def read(database: Database) -> tuple[int, list[KeptResponse]]:
            chain = database.chain(response_id, tenant, _MAX_CHAIN, _MAX_CHAIN_BYTES)
            size = sum(len(stored.input) + len(stored.output) for stored in chain)
            return size, [from_stored(stored) for stored in chain]

        size, chain = await self._ask(read)
        previous = chain[0].response.previous_response_id if chain else response_id
        if previous is None:
            return chain
        if len(chain) >= _MAX_CHAIN or size >= _MAX_CHAIN_BYTES:
            raise InvalidRequestError(
                f"the conversation before {response_id[:64]!r} is too long to follow; send what matters "
                "of it as 'input'",
                param="previous_response_id",
                code="invalid_value",
            )
        raise InvalidRequestError(
            f"previous response {previous[:64]!r} is not stored: it was not, was deleted, or has expired",
            param="previous_response_id",
            code="previous_response_not_found",
        )

    async def item(self, item_id: str, tenant: str) -> Item | None:
        """A tenant's stored item.

        Raises:
            UnavailableError: The store cannot be read.
        """
        kept = await self._ask(lambda database: _read(database.holder(item_id, tenant)))
        if kept is None:
            return None
        items = [*kept.input, *kept.response.output]
        return next((item for item in items if item.id == item_id), None)

    async def delete(self, response_id: str, tenant: str) -> bool:
        """Forget a tenant's response; returns whether there was one.

        Raises:
            UnavailableError: The store cannot be written.
        """
        return await self._ask(lambda database: database.delete(response_id, tenant))

    async def close(self) -> None:
        """Write what waits, and let go of the file; may be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        await asyncio.get_running_loop().run_in_executor(self._executor, self._close)
        self._executor.shutdown(wait=False)

    async def _ask(self, question: Callable[[Database], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, self._try, question)
        except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
            logger.warning("the store of responses failed: %s", error)
            raise UnavailableError(
                "the store of responses cannot be used now; the server's log says why"
            ) from error

    # ------------------------------------------------------------------ on its thread

    def _put(self, stored: StoredResponse, item_ids: Sequence[str]) -> str:
        try:
            self._try(lambda database: database.put(stored, item_ids))
        except (sqlite3.Error, OSError, ValueError) as error:
            logger.warning("response %s is not stored: %s", stored.id, error)
            return str(error)
        return ""

    def _try(self, work: Callable[[Database], T]) -> T:
        """Do something; with a fresh file if the one there turns out to be broken."""
        try:
            return work(self._opened())
        except sqlite3.DatabaseError as error:
            if type(error) is not sqlite3.DatabaseError:
                raise  # such as a full disk: the file is all right
            self._close()
            self._set_aside(self._path(), error)
            return work(self._opened())

    def _opened(self) -> Database:
        if self._database is None:
            self._database = self._open()
            self._fail_abandoned(self._database)
        return self._database

    def _open(self) -> Database:
        path = self._path()
        try:
            return self._connect(path)
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:
                self._set_aside(path, error)
                return self._connect(path)
            problem: Exception = error
        except OSError as error:
            problem = error
        logger.warning(
            "%s cannot be opened (%s): responses are kept in memory only; set responses.path to a file "
            "that can be written",
            path,
            problem,
        )
        return self._connect(":memory:")

    def _connect(self, path: str) -> Database:
        config = self._config
        return Database(
            path,
            max_responses=config.max_responses,
            max_bytes=config.max_bytes,
            ttl_s=config.ttl_s,
        )

    def _path(self) -> str:
        path = self._config.path
        if path == ":memory:":
            return path
        return str(Path(path).expanduser() if path else data_folder() / "responses.sqlite3")

    @staticmethod
    def _set_aside(path: str, error: Exception) -> None:
        if path == ":memory:":
            return
        aside = f"{path}.broken-{now()}"
        logger.warning(
            "%s cannot be read (%s): it is now %s, and responses stored before are not found",
            path,
            error,
            aside,
        )
        for end in ("-wal", "-shm"):
            Path(path + end).unlink(missing_ok=True)
        Path(path).rename(aside)

    def _fail_abandoned(self, database: Database) -> None:
        """Responses that ran when a server was killed will never be whole: whoever asks is told so."""
        for stored in database.abandoned():
            try:
                self._fail(database, stored)
            except (sqlite3.OperationalError, ValueError, msgspec.MsgspecError) as error:
                logger.warning("response %s cannot be marked as failed: %s", stored.id, error)

    @staticmethod
    def _fail(database: Database, stored: StoredResponse) -> None:
        kept = from_stored(stored)
        kept.response.status = "failed"
        kept.response.error = FailureDetails(code="server_error", message=_LOST)
        kept.events = None
        ids = [item.id for item in (*kept.input, *kept.response.output)]
        database.put(to_stored(kept, stored.tenant), ids)

    def _close(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            database.close()


def _read(stored: StoredResponse | None) -> KeptResponse | None:
    return None if stored is None else from_stored(stored)
