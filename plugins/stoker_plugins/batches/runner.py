"""Runs the batches: takes them up, starts requests in idle capacity, writes answers, ends them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from functools import partial

import msgspec

from stoker import HttpAnswer, RequestTooLargeError, ServerContext, StokerError, UnavailableError
from stoker_plugins.batches.active import ActiveBatch, finish, move_to, write
from stoker_plugins.batches.archive import Archive, Store, now
from stoker_plugins.batches.database import BatchRecord
from stoker_plugins.batches.idle import LOWEST_PRIORITY, IdleCapacity
from stoker_plugins.batches.inputs import InputLimits, InputLine, InputRequest, read_request, scan
from stoker_plugins.batches.options import BatchesOptions
from stoker_plugins.batches.results import Result, make_result, recover, refusal
from stoker_plugins.batches.schemas import Batch, BatchError

__all__ = ["BatchRunner"]

logger = logging.getLogger("stoker.batches")

_TICK_S = 0.05  # how often to look for idle capacity while there is work
_SWEEP_S = 60.0  # how often to look for what has expired
_RETRY_OPEN_S = 5.0  # how often to try a directory that another server uses
_MAX_ATTEMPTS = 3
_RETRY_S = 0.5  # after a failure; twice as long after each further one
_MAX_STALLS = (
    5  # times that a batch is taken up without getting anywhere: it may be what kills the server
)
_MIN_WAIT_S, _MAX_WAIT_S = 0.2, 60.0
_ENDINGS = {
    "cancelled": ("batch_cancelled", "the batch was cancelled before this request was done"),
    "expired": (
        "batch_expired",
        "the batch's completion window ended before this request was done",
    ),
    "failed": ("batch_failed", "the batch failed before this request was done"),
}


class BatchRunner:
    """Runs all batches of a server, in its event loop.

    Args:
        context: The server.
        archive: Files and batches on disk.
        options: How much to run at once.
    """

    def __init__(self, context: ServerContext, archive: Archive, options: BatchesOptions) -> None:
        self._context = context
        self._archive = archive
        self._options = options
        self._idle = IdleCapacity(context, options)
        self._active: dict[str, ActiveBatch] = {}
        self._new: list[BatchRecord] = []
        self._turns: deque[ActiveBatch] = deque()  # those with requests to start, in turn
        self._running: dict[asyncio.Task[None], str] = {}  # with their models, as they were started
        self._lives: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._is_stopping = False

    # ------------------------------------------------------------------ for the routes

    def submit(self, record: BatchRecord) -> None:
        """Run a batch that is in the database."""
        self._new.append(record)
        self._wake.set()

    def current(self, batch: Batch) -> Batch:
        """A batch as it is at this moment, if it is being run."""
        active = self._active.get(batch.id)
        if active is None:
            return batch
        active.batch.request_counts.completed = active.progress.counts.completed
        active.batch.request_counts.failed = active.progress.counts.failed
        return active.batch

    async def cancel(self, batch_id: str) -> None:
        """Cancel a batch if it is being run and has no end yet."""
        self._take_in()
        active = self._active.get(batch_id)
        if active is None or active.outcome is not None:
            return
        if active.batch.status in {"validating", "in_progress"}:
            move_to(active.batch, "cancelling")
            active.end_early("cancelled")
            await self._archive.run(_save, active.record)

    # ------------------------------------------------------------------ the service

    @contextlib.asynccontextmanager
    async def service(self) -> AsyncIterator[None]:
        """Run batches while this is entered; leaving it aborts what runs, which is run again later."""
        main = asyncio.create_task(self._main())
        try:
            yield
        finally:
            self._is_stopping = True
            tasks = [main, *self._running, *self._lives]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for active in self._active.values():
                await self._write(active)
                active.record.num_stalls = 0  # this end was nobody's fault
                await self._archive.run(_save, active.record)
            await self._archive.close()

    async def _main(self) -> None:
        await self._open()
        next_sweep_s = time.monotonic() + _SWEEP_S
        while True:
            self._wake.clear()
            try:
                self._take_in()
                self._give_way()
                self._start_requests()
                for active in list(self._active.values()):
                    await self._write(active)
                if time.monotonic() >= next_sweep_s:
                    next_sweep_s = time.monotonic() + _SWEEP_S
                    await self._sweep()
            except Exception:
                logger.exception("a round of the batches failed; they go on")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S if self._active else _SWEEP_S):
                    await self._wake.wait()

    async def _open(self) -> None:
        """Take up what an earlier process left; waits for a directory that another one still uses."""
        is_told = False
        while self._archive.is_used():
            try:
                self._new += await self._archive.run(Store.take_up)
                return
            except UnavailableError as error:
                if not is_told:
                    logger.warning("batches are not served yet: %s", error)
                is_told = True
            except Exception:
                logger.exception("the batches of an earlier process cannot be taken up")
                return
            await asyncio.sleep(_RETRY_OPEN_S)

    async def _sweep(self) -> None:
        """Delete what has expired, and take up again what could not go on."""
        if self._archive.is_used():
            known = set(self._active)
            await self._archive.run(Store.sweep)
            found = await self._archive.run(lambda store: store.database.open_batches())
            self._new += [record for record in found if record.batch.id not in known]

    def _take_in(self) -> None:
        new, self._new = self._new, []
        for record in new:
            if record.batch.id not in self._active:
                active = ActiveBatch(record, self._archive.files / record.batch.input_file_id)
                self._active[record.batch.id] = active
                life = asyncio.create_task(self._live(active))
                self._lives.add(life)
                life.add_done_callback(self._lives.discard)

    # ------------------------------------------------------------------ the life of a batch

    async def _live(self, active: ActiveBatch) -> None:
        try:
            await self._prepare(active)
            if active.outcome is None:
                await self._run_requests(active)
            await self._end(active)
        except UnavailableError as error:
            if not self._is_stopping:  # the next sweep takes it up again
                logger.warning("the batch %s waits: %s", active.batch.id, error)
        except Exception:
            # Its state on disk is what it was, from which it is taken up again.
            logger.exception("the batch %s cannot go on", active.batch.id)
        finally:
            if not self._is_stopping:
                self._active.pop(active.batch.id, None)

    async def _prepare(self, active: ActiveBatch) -> None:
        """Check its input, and find out what is done already."""
        batch, record = active.batch, active.record
        is_new = batch.status == "validating"
        if batch.status == "cancelling":
            active.outcome = "cancelled"
        limits = self._limits(batch) if is_new else _no_limits(batch)
        try:
            found = await asyncio.to_thread(scan, active.path, limits, lambda: self._is_stopping)
        except OSError as error:
            active.fail([BatchError(code="input_file_unreadable", message=str(error))])
            return
        if found.errors:
            active.fail(found.errors)
            return
        await self._archive.run(_recover, active)
        done = active.progress.done
        pairs = zip(found.lines, found.custom_ids, strict=True)
        active.pending.extend(line for line, custom_id in pairs if custom_id not in done)
        batch.request_counts.total = len(found.lines)
        batch.model = batch.model or found.model
        if not is_new:
            record.num_stalls += 1
            if record.num_stalls > _MAX_STALLS and active.outcome is None:
                active.fail([_stalled()])
        elif active.outcome is None:
            move_to(active.batch, "in_progress")
        await self._archive.run(_save, record)

    def _limits(self, batch: Batch) -> InputLimits:
        return InputLimits(
            endpoint=batch.endpoint,
            models=tuple(model.model_id for model in self._context.models()),
            max_requests=self._options.max_requests,
            max_body_bytes=self._context.config.server.max_body_bytes,
        )

    async def _run_requests(self, active: ActiveBatch) -> None:
        """Have its requests run until all are done, or it ends early."""
        self._turns.append(active)
        self._wake.set()
        try:
            while not active.is_done and active.outcome is None:
                active.changed.clear()
                left_s = (active.batch.expires_at or math.inf) - now()
                if left_s <= 0:
                    active.end_early("expired")
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, _SWEEP_S)):
                        await active.changed.wait()
        finally:
            self._turns.remove(active)
        if active.running:
            await asyncio.wait(tuple(active.running))

    async def _end(self, active: ActiveBatch) -> None:
        """Account for what was not done, and show the files."""
        outcome = active.outcome or "completed"
        await self._write(active)
        if outcome == "completed":
            move_to(active.batch, "finalizing")
            await self._archive.run(_save, active.record)
        elif active.batch.request_counts.total:
            try:
                await self._archive.run(_refuse_rest, active, *_ENDINGS[outcome])
            except (OSError, StokerError) as error:
                logger.warning("the errors of %s could not be written: %s", active.batch.id, error)
        self.current(active.batch)
        # A copy: nobody may be told that it is over before its files are there.
        record = msgspec.json.decode(msgspec.json.encode(active.record), type=BatchRecord)
        move_to(record.batch, outcome)
        if active.progress.done:
            record.batch.usage = active.progress.usage
        await self._archive.run(finish, record, self._options.ttl_s)
        active.record = record

    # ------------------------------------------------------------------ requests

    def _give_way(self) -> None:
        """Abort requests, the latest first, for others that wait for a lane."""
        left = {model: self._idle.num_to_yield(model) for model in set(self._running.values())}
        for task, model in reversed(self._running.items()):
            if left[model] > 0:
                left[model] -= 1
                task.cancel()

    def _start_requests(self) -> None:
        """Start what idle capacity there is for, from each batch in turn."""
        room = self._options.concurrency - len(self._running)
        models = {active.batch.model or "" for active in self._turns} if room > 0 else set()
        free = {model: self._idle.num_startable(model) for model in models}
        num_idle = 0
        while room > 0 and num_idle < len(self._turns):
            active = self._turns[0]
            self._turns.rotate(-1)
            model = active.batch.model or ""
            if free[model] > 0 and _has_work(active):
                self._start(active)
                free[model] -= 1
                room -= 1
                num_idle = 0
            else:
                num_idle += 1

    def _start(self, active: ActiveBatch) -> None:
        line = active.pending.popleft()
        task = asyncio.create_task(self._run(active, line))
        active.running[task] = line
        self._running[task] = active.batch.model or ""
        task.add_done_callback(partial(self._ran, active))

    def _ran(self, active: ActiveBatch, task: asyncio.Task[None]) -> None:
        line = active.running.pop(task)
        del self._running[task]
        if task.cancelled():  # it gave way, or it never began
            active.pending.appendleft(line)
        elif (error := task.exception()) is not None:
            logger.error("a request of %s failed", active.batch.id, exc_info=error)
            active.pending.append(line)
            active.not_before_s = time.monotonic() + _MAX_WAIT_S
        active.changed.set()
        self._wake.set()

    async def _run(self, active: ActiveBatch, line: InputLine) -> None:
        """Ask for one answer. Nothing is awaited once it is there: either it counts, or it never was."""
        request = await asyncio.to_thread(_read, active, line)
        line_id = f"batch_req_{uuid.uuid4().hex}"
        answer = await self._context.ask(
            "POST",
            active.batch.endpoint,
            bytes(request.body),
            tenant=active.record.tenant,
            priority=LOWEST_PRIORITY,
            headers={"content-type": "application/json", "x-request-id": line_id},
        )
        wait_s = _retry_after_s(answer)
        if wait_s is not None:
            active.pending.appendleft(line)
            active.not_before_s = time.monotonic() + wait_s
        elif _is_worth_retrying(answer) and active.attempts.get(line, 0) + 1 < _MAX_ATTEMPTS:
            active.attempts[line] = active.attempts.get(line, 0) + 1
            active.pending.append(line)
            active.not_before_s = time.monotonic() + _RETRY_S * 2.0 ** active.attempts[line]
        else:
            active.attempts.pop(line, None)
            active.results.append(_result(line_id, request.custom_id, answer))

    async def _write(self, active: ActiveBatch) -> None:
        """Bring results to disk: all there are in one go, which is one fsync for many under load."""
        results, active.results = active.results, []
        if not results:
            return
        active.num_writing += 1
        try:
            # Whoever stops waiting does not stop the writing, or nobody knew what was written.
            await asyncio.shield(self._archive.run(write, active, results))
        except (OSError, RequestTooLargeError) as error:
            logger.warning("the results of %s cannot be written: %s", active.batch.id, error)
            active.fail([BatchError(code="storage_full", message=f"no room for results: {error}")])
        finally:
            active.num_writing -= 1
        active.record.num_stalls = 0
        active.changed.set()


def _no_limits(batch: Batch) -> InputLimits:
    """What a file may hold that was checked before, whatever this server's limits are."""
    return InputLimits(batch.endpoint, (batch.model or "",), sys.maxsize, 2**31)


def _has_work(active: ActiveBatch) -> bool:
    return bool(
        active.pending and active.outcome is None and time.monotonic() >= active.not_before_s
    )


def _read(active: ActiveBatch, line: InputLine) -> InputRequest:
    with active.path.open("rb") as file:
        return read_request(file, line)


def _retry_after_s(answer: HttpAnswer) -> float | None:
    """After how long to try again what was refused for now only; ``None`` for anything else."""
    if answer.status_code not in {429, 503} or answer.headers.get("x-should-retry") == "false":
        return None
    try:
        wait_s = float(answer.headers["retry-after-ms"]) / 1e3
    except (KeyError, ValueError):
        wait_s = 1.0
    return min(max(wait_s, _MIN_WAIT_S), _MAX_WAIT_S)


def _is_worth_retrying(answer: HttpAnswer) -> bool:
    """Whether another attempt may go better: the server's fault, or its time limits."""
    return answer.status_code == 408 or (answer.status_code >= 500 and answer.status_code != 501)


def _result(line_id: str, custom_id: str, answer: HttpAnswer) -> Result:
    try:
        return make_result(line_id, custom_id, answer)
    except ValueError as error:
        return refusal(line_id, custom_id, "invalid_response", str(error))


def _save(store: Store, record: BatchRecord) -> None:
    store.database.save_batch(record)


def _recover(store: Store, active: ActiveBatch) -> None:
    record = active.record
    recover(store.path(record.output_id), active.progress, is_success=True)
    recover(store.path(record.error_id), active.progress, is_success=False)


def _refuse_rest(store: Store, active: ActiveBatch, code: str, message: str) -> None:
    """Write an error line for every request that has no result."""
    group: list[Result] = []
    with active.path.open("rb") as file:
        while active.pending:
            request = read_request(file, active.pending.popleft())
            line_id = f"batch_req_{uuid.uuid4().hex}"
            group.append(refusal(line_id, request.custom_id, code, message))
            if len(group) == 1000 or not active.pending:
                write(store, active, group)
                group.clear()


def _stalled() -> BatchError:
    return BatchError(
        code="no_progress",
        message=f"{_MAX_STALLS} times the server ended before any request of this batch was done; "
        "one of them may be what ended it",
    )
