"""Compiles the grammars that requests ask for: off the event loop, each once, within a time limit."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

from stoker.errors import EngineError, InvalidRequestError, UnavailableError

if TYPE_CHECKING:
    from stoker.grammar import Grammar, GrammarSpec
    from stoker.interfaces import GrammarCompiler

__all__ = ["GrammarService"]

logger = logging.getLogger("stoker.grammars")

_T = TypeVar("_T")

_MAX_THREADS = 2  # compiling takes milliseconds; the rest of the machine is the model's
_MAX_STUCK = 4  # threads that did not come back in time, before nothing is compiled any more
_PREPARE_LIMIT_S = 60.0


class GrammarService:
    """The grammars of one model; belongs to one event loop.

    Grammars are kept, the least recently used go first. Requests that ask for the same one while it is
    compiled wait for it together. A compiler that does not come back in time costs a thread, not the server:
    its request is refused, what it was asked for is not tried again, and a few such threads are let be.

    Args:
        compiler: Compiles; ``None`` if structured outputs are switched off.
        time_limit_s: Most seconds for one grammar.
        max_entries: Most grammars to keep.
        max_chars: Most characters of text they may come from, in sum.

    Attributes:
        num_compiled: Grammars compiled so far.
        num_stuck: Threads that have not come back in time.
    """

    def __init__(
        self,
        compiler: GrammarCompiler | None = None,
        *,
        time_limit_s: float = 5.0,
        max_entries: int = 256,
        max_chars: int = 2_000_000,
    ) -> None:
        self._compiler = compiler
        self._time_limit_s = time_limit_s
        self._max_entries = max_entries
        self._max_chars = max_chars
        self._kept: OrderedDict[GrammarSpec, Grammar] = OrderedDict()
        self._kept_chars = 0
        self._too_slow: OrderedDict[GrammarSpec, None] = OrderedDict()
        self._flights: dict[GrammarSpec, asyncio.Task[Grammar]] = {}
        self._slots = asyncio.Semaphore(_MAX_THREADS)
        self._preparing: asyncio.Task[None] | None = None
        self.num_stuck = 0
        self.num_compiled = 0

    @property
    def is_on(self) -> bool:
        """Whether there is a compiler."""
        return self._compiler is not None

    async def get(self, spec: GrammarSpec) -> Grammar:
        """The compiled grammar.

        Raises:
            InvalidRequestError: It is malformed, too large, takes too long, or not supported; or structured
                outputs are switched off.
            UnavailableError: Too many others did not come back.
        """
        if self._compiler is None:
            raise InvalidRequestError(
                "structured outputs are switched off here (server.grammar = none); "
                f"send the request without {spec.param}",
                param=spec.param,
            )
        kept = self._kept.get(spec)
        if kept is not None:
            self._kept.move_to_end(spec)
            return kept
        flight = self._flights.get(spec)
        if flight is None:
            flight = self._flights[spec] = asyncio.create_task(self._compile(self._compiler, spec))
            flight.add_done_callback(partial(self._landed, spec))
        # Who leaves must not take the others' grammar along.
        return await asyncio.shield(flight)

    async def _compile(self, compiler: GrammarCompiler, spec: GrammarSpec) -> Grammar:
        if spec in self._too_slow:
            raise self._takes_too_long(spec)
        if self._preparing is None or (self._preparing.done() and self._preparing.exception()):
            self._preparing = asyncio.create_task(self._prepare(compiler))
        await self._preparing
        async with self._slots:
            if self.num_stuck >= _MAX_STUCK:
                raise UnavailableError(
                    "no grammar can be compiled now: earlier ones are not finished; retry later, "
                    f"or send the request without {spec.param}",
                    param=spec.param,
                )
            try:
                grammar = await self._in_thread(lambda: compiler.compile(spec), self._time_limit_s)
            except TimeoutError:
                self._too_slow[spec] = None
                if len(self._too_slow) > self._max_entries:
                    self._too_slow.popitem(last=False)
                raise self._takes_too_long(spec) from None
        self.num_compiled += 1
        self._keep(spec, grammar)
        return grammar

    async def _prepare(self, compiler: GrammarCompiler) -> None:
        try:
            await self._in_thread(compiler.prepare, _PREPARE_LIMIT_S)
        except TimeoutError:
            raise EngineError("the grammar compiler did not get ready in time") from None

    async def _in_thread(self, work: Callable[[], _T], limit_s: float) -> _T:
        """What ``work`` returns or raises, on a thread that nobody waits for when the process ends.

        Raises:
            TimeoutError: It did not come back; the thread counts as stuck until it does.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()

        def settle(result: _T | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(cast(_T, result))

        def run() -> None:
            result: _T | None = None
            error: BaseException | None = None
            try:
                result = work()
            except Exception as failure:  # noqa: BLE001 - it is raised where it is waited for
                error = failure
            except BaseException as failure:  # noqa: BLE001 - a panic of native code is one of these
                error = EngineError(f"the grammar compiler failed: {type(failure).__name__}")
            with contextlib.suppress(RuntimeError):  # the event loop may be gone
                loop.call_soon_threadsafe(settle, result, error)

        thread = threading.Thread(target=run, name="stoker-grammar", daemon=True)
        thread.start()
        done, _ = await asyncio.wait({future}, timeout=limit_s)
        if done:
            return future.result()
        self.num_stuck += 1
        logger.warning("a grammar did not compile within %g s; its thread is left alone", limit_s)
        _lower_priority(thread)
        future.add_done_callback(self._came_back)
        raise TimeoutError

    def _came_back(self, future: asyncio.Future[_T]) -> None:
        self.num_stuck -= 1
        if not future.cancelled():
            future.exception()  # or asyncio would complain that nobody looked

    def _landed(self, spec: GrammarSpec, flight: asyncio.Task[Grammar]) -> None:
        del self._flights[spec]
        if not flight.cancelled():
            flight.exception()  # everybody who waited may have left

    def _keep(self, spec: GrammarSpec, grammar: Grammar) -> None:
        self._kept[spec] = grammar
        self._kept_chars += len(spec.text)
        while len(self._kept) > self._max_entries or (
            self._kept_chars > self._max_chars and len(self._kept) > 1
        ):
            oldest, _ = self._kept.popitem(last=False)
            self._kept_chars -= len(oldest.text)

    def _takes_too_long(self, spec: GrammarSpec) -> InvalidRequestError:
        return InvalidRequestError(
            f"{spec.param} takes longer than {self._time_limit_s:g} s to compile; make it simpler: fewer "
            "alternatives, smaller bounds, less nesting",
            param=spec.param,
        )


def _lower_priority(thread: threading.Thread) -> None:
    """Let everybody else go first, where the system has priorities for threads."""
    if sys.platform == "linux" and thread.native_id is not None:
        with contextlib.suppress(OSError):  # it came back in this moment
            os.setpriority(os.PRIO_PROCESS, thread.native_id, 19)
