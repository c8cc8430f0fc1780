"""The runner of batches on a server that answers as a test says, and its files after a crash."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import (
    EngineSnapshot,
    HttpAnswer,
    LoadSnapshot,
    Observer,
    Request,
    SamplingParams,
    SchedulingPolicy,
    ServedModel,
    ServerContext,
    StepCost,
    TenantConfig,
    TenantLoad,
    UnavailableError,
)
from stoker.config import Config
from stoker.testing import ScriptedRuntime
from stoker_plugins.batches import runner as runner_module
from stoker_plugins.batches.archive import Archive, Store, now
from stoker_plugins.batches.database import BatchRecord, StoredFile
from stoker_plugins.batches.idle import LOWEST_PRIORITY, IdleCapacity
from stoker_plugins.batches.inputs import InputLimits, read_request, scan
from stoker_plugins.batches.options import BatchesOptions
from stoker_plugins.batches.results import Progress, append, make_result, recover, refusal
from stoker_plugins.batches.runner import BatchRunner
from stoker_plugins.batches.schemas import Batch, BatchRequestCounts, FileObject

OVER = {"completed", "failed", "expired", "cancelled"}
Answer = Callable[[str], Awaitable[HttpAnswer]]


def answer(status: int, body: Any = None, **headers: str) -> HttpAnswer:
    content = json.dumps({"usage": None} if body is None else body).encode()
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return HttpAnswer(status_code=status, headers=names, body=content)


class Context(ServerContext):
    """A server that does what the test says."""

    def __init__(self, *answers: HttpAnswer | Exception, lanes: int = 4) -> None:
        self.config = Config()
        self.observers: Mapping[str, Observer] = {}
        self.load_now = LoadSnapshot(num_free_lanes=lanes)
        self.waiting: list[Request] = []
        self.answers = list(answers)
        self.asked: list[tuple[str, str, int | None]] = []
        self.hold: asyncio.Event | None = None
        self.hold_from = 0  # requests before it are not held
        self.num_now = self.most_at_once = 0
        self._lanes = lanes

    def models(self) -> Sequence[ServedModel]:
        info = ScriptedRuntime(lanes=self._lanes).info
        return [
            ServedModel(
                model_id="m", reference="m", backend="b", created=0, size_bytes=0, info=info
            )
        ]

    def load(self, model: str) -> LoadSnapshot:
        return self.load_now

    def tenant_load(self, model: str, tenant: str) -> TenantLoad:
        return TenantLoad()

    def snapshot(self, model: str) -> EngineSnapshot:
        return EngineSnapshot(
            now_s=100.0,
            num_lanes=self._lanes,
            waiting=self.waiting,
            running=[],
            cost=StepCost(),
            output_ratio=1.0,
            mean_output_tokens=1.0,
            max_prefill_tokens=1,
        )

    def policy(self, model: str) -> SchedulingPolicy:
        raise KeyError(model)

    def tenant(self, name: str) -> TenantConfig:
        return TenantConfig(name=name)

    @property
    def uptime_s(self) -> float:
        return 1.0

    async def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        tenant: str,
        priority: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> HttpAnswer:
        self.asked.append((json.loads(body)["prompt"], tenant, priority))
        self.num_now += 1
        self.most_at_once = max(self.most_at_once, self.num_now)
        try:
            if self.hold is not None and len(self.asked) > self.hold_from:
                await self.hold.wait()
            await asyncio.sleep(0)
            found = self.answers.pop(0) if self.answers else answer(200)
        finally:
            self.num_now -= 1
        if isinstance(found, Exception):
            raise found
        return found


class Bench:
    """A runner at work on one directory."""

    def __init__(self, context: Context, folder: Path, **options: Any) -> None:
        self.context = context
        self.options = BatchesOptions(directory=str(folder), **options)
        self.archive = Archive(self.options)
        self.runner = BatchRunner(context, self.archive, self.options)

    async def submit(self, name: str, num_lines: int) -> None:
        lines = [
            {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions"}
            | {"body": {"prompt": f"p{i}"}}
            for i in range(num_lines)
        ]
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file_id = f"file-{name}"

        def prepare(store: Store) -> BatchRecord:
            store.path(file_id).write_bytes(content)
            file = FileObject(
                id=file_id,
                bytes=len(content),
                created_at=now(),
                filename="x",
                purpose="batch",
                expires_at=now() + 9999,
            )
            store.add(StoredFile(tenant="t", file=file))
            batch = Batch(
                id=name,
                endpoint="/v1/completions",
                input_file_id=file_id,
                completion_window="24h",
                status="validating",
                created_at=now(),
                expires_at=now() + 9999,
                request_counts=BatchRequestCounts(),
            )
            record = BatchRecord(
                tenant="t",
                batch=batch,
                output_id=f"file-{name}-out",
                error_id=f"file-{name}-err",
                output_ttl_s=9999,
            )
            store.database.add_batch(record)
            return record

        self.runner.submit(await self.archive.run(prepare))

    async def find(self, name: str) -> Batch:
        found = await self.archive.run(lambda store: store.database.find_batch("t", name))
        assert found is not None
        return self.runner.current(found)

    async def wait(self, name: str) -> Batch:
        while (batch := await self.find(name)).status not in OVER:
            await asyncio.sleep(0.01)
        return batch

    def lines(self, name: str, kind: str) -> dict[str, Any]:
        path = self.archive.files / f"file-{name}-{kind}"
        if not path.exists():
            return {}
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found = {line["custom_id"]: line for line in lines}
        assert len(found) == len(lines)
        return found


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


# --------------------------------------------------------------------------- answers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries do not take their time."""
    monkeypatch.setattr(runner_module, "_MIN_WAIT_S", 0.0)
    monkeypatch.setattr(runner_module, "_MAX_WAIT_S", 0.01)
    monkeypatch.setattr(runner_module, "_RETRY_S", 0.001)


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("answers", "num_asked", "status"),
    [
        ([answer(429, retry_after_ms="5")] * 5 + [answer(200)], 6, 200),
        ([answer(503)] * 5 + [answer(200)], 6, 200),
        ([answer(500), answer(408), answer(200)], 3, 200),
        ([answer(500), answer(502), answer(504)], 3, 504),
        ([answer(429, x_should_retry="false")], 1, 429),
        ([answer(400)], 1, 400),
        ([answer(499)], 1, 499),
        ([answer(501)], 1, 501),
        ([KeyError("a bug"), answer(200)], 2, 200),
    ],
)
async def test_what_is_asked_for_again_and_what_is_the_result(
    tmp_path: Path, answers: list[Any], num_asked: int, status: int
) -> None:
    bench = Bench(Context(*answers), tmp_path)
    async with bench.runner.service():
        await bench.submit("b", 1)
        batch = await bench.wait("b")
    assert batch.status == "completed"
    assert bench.context.asked == [("p0", "t", LOWEST_PRIORITY)] * num_asked
    kind = "out" if status == 200 else "err"
    assert bench.lines("b", kind)["r0"]["response"]["status_code"] == status
    assert batch.request_counts.completed == (status == 200)
    assert batch.request_counts.failed == (status != 200)


async def test_an_answer_that_is_no_json_is_an_error_line(tmp_path: Path) -> None:
    strange = HttpAnswer(status_code=200, headers={}, body=b"<html>")
    bench = Bench(Context(strange), tmp_path)
    async with bench.runner.service():
        await bench.submit("b", 1)
        await bench.wait("b")
    assert bench.lines("b", "err")["r0"]["error"]["code"] == "invalid_response"


async def test_usage_is_summed_up_under_either_name(tmp_path: Path) -> None:
    chat = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    chat |= {"prompt_tokens_details": {"cached_tokens": 2}}  # type: ignore[dict-item]
    responses = {"input_tokens": 10, "output_tokens": 20, "total_tokens": 30}
    responses |= {"output_tokens_details": {"reasoning_tokens": 5}}  # type: ignore[dict-item]
    answers = [answer(200, {"usage": used}) for used in (chat, responses, "much", {"x": 1})]
    bench = Bench(Context(*answers), tmp_path)
    async with bench.runner.service():
        await bench.submit("b", 4)
        usage = (await bench.wait("b")).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (13, 24, 37)
    assert usage.input_tokens_details.cached_tokens == 2
    assert usage.output_tokens_details.reasoning_tokens == 5


@pytest.mark.slow
async def test_no_more_than_allowed_at_once_and_one_lane_stays_free(tmp_path: Path) -> None:
    bench = Bench(Context(lanes=4), tmp_path / "1", concurrency=2)
    async with bench.runner.service():
        await bench.submit("b", 20)
        await bench.wait("b")
    assert bench.context.most_at_once == 2
    bench = Bench(Context(lanes=1), tmp_path / "2")  # the only lane is not left free for ever
    async with bench.runner.service():
        await bench.submit("b", 3)
        await bench.wait("b")
    context = Context(lanes=3)
    context.hold = asyncio.Event()
    bench = Bench(context, tmp_path / "3")
    async with bench.runner.service():
        await bench.submit("b", 5)
        await until(lambda: context.num_now == 2)
        context.load_now = LoadSnapshot(num_free_lanes=1)
        await asyncio.sleep(0.2)
        assert context.num_now == 2
        context.hold.set()
        context.load_now = LoadSnapshot(num_free_lanes=3, num_waiting=1)
        await until(lambda: context.num_now == 0)
        await asyncio.sleep(0.2)
        assert len(context.asked) == 2
        context.load_now = LoadSnapshot(num_free_lanes=3)
        await bench.wait("b")


# --------------------------------------------------------------------------- idle capacity


def waiting(age_s: float, *, n: int = 1, priority: int = 0) -> Request:
    return Request(
        request_id="r",
        model="m",
        prompt_token_ids=[1],
        sampling=SamplingParams(),
        n=n,
        priority=priority,
        arrival_s=100.0 - age_s,
    )


def test_who_waits_for_more_than_a_moment_is_given_way() -> None:
    context, clock = Context(), [0.0]
    idle = IdleCapacity(context, BatchesOptions(give_way_s=0.1), lambda: clock[0])
    assert idle.num_startable("m") == 3
    assert idle.num_startable("other") == 0
    context.load_now = LoadSnapshot(num_waiting=3)
    context.waiting = [waiting(0.05), waiting(9.0, priority=LOWEST_PRIORITY)]
    assert idle.num_to_yield("m") == 0
    context.waiting += [waiting(0.2, n=2), waiting(0.15)]
    assert idle.num_to_yield("m") == 3
    assert idle.num_to_yield("m") == 0  # what was given up takes its time to arrive
    clock[0] = 0.5
    assert idle.num_to_yield("m") == 3
    context.load_now = LoadSnapshot(num_free_lanes=4)
    assert (idle.num_to_yield("m"), idle.num_startable("m")) == (0, 0)
    clock[0] = 2.0
    assert idle.num_startable("m") == 3


def test_a_model_without_lanes_has_none_to_spare_or_to_give_up() -> None:
    context = Context(lanes=0)
    idle = IdleCapacity(context, BatchesOptions(concurrency=5, give_way_s=0.1))
    assert idle.num_startable("m") == 5
    context.load_now = LoadSnapshot(num_waiting=1)
    context.waiting = [waiting(9.0)]
    assert (idle.num_to_yield("m"), idle.num_startable("m")) == (0, 0)


# --------------------------------------------------------------------------- stopping and crashing


async def test_a_stop_aborts_at_once_and_the_next_start_goes_on(tmp_path: Path) -> None:
    context = Context(lanes=9)
    bench = Bench(context, tmp_path)
    async with bench.runner.service():
        context.hold, context.hold_from = asyncio.Event(), 10
        await bench.submit("b", 20)
        await until(lambda: context.num_now == 8)
    assert context.num_now == 0
    context.hold = None
    again = Bench(context, tmp_path)
    async with again.runner.service():
        batch = await again.wait("b")
    assert batch.status == "completed"
    assert batch.request_counts.completed == 20
    assert len(again.lines("b", "out")) == 20


@pytest.mark.parametrize("crashes", [True, False])
async def test_a_batch_that_ends_the_server_again_and_again_is_given_up(
    tmp_path: Path, *, crashes: bool
) -> None:
    context = Context()
    for number in range(7):
        context.hold = asyncio.Event()
        bench = Bench(context, tmp_path)
        with contextlib.suppress(UnavailableError):  # what a crash looks like from inside
            async with bench.runner.service():
                if number == 0:
                    await bench.submit("b", 2)
                if number < 6:
                    await until(lambda: context.num_now == 2)
                if crashes:
                    await bench.archive.close()
    context.hold = None
    if not crashes:
        bench = Bench(context, tmp_path)
        async with bench.runner.service():
            assert (await bench.wait("b")).status == "completed"
        return
    bench = Bench(context, tmp_path)
    async with bench.runner.service():
        batch = await bench.wait("b")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data[0].code == "no_progress"
    assert {line["error"]["code"] for line in bench.lines("b", "err").values()} == {"batch_failed"}


@pytest.mark.slow
async def test_a_model_that_is_gone_is_waited_for(tmp_path: Path) -> None:
    context = Context()
    context.hold = asyncio.Event()
    bench = Bench(context, tmp_path)
    async with bench.runner.service():
        await bench.submit("b", 1)
        await until(lambda: context.num_now == 1)
    other = Context()
    other.models = list  # type: ignore[method-assign]
    bench = Bench(other, tmp_path)
    async with bench.runner.service():
        await asyncio.sleep(0.3)
        assert (await bench.find("b")).status == "in_progress"
    assert other.asked == []
    bench = Bench(Context(), tmp_path)
    async with bench.runner.service():
        assert (await bench.wait("b")).status == "completed"


async def test_results_that_find_no_room_fail_the_batch(tmp_path: Path) -> None:
    context = Context(*[answer(200, {"text": "x" * 9000})] * 5)
    bench = Bench(context, tmp_path, max_total_bytes=24_000, concurrency=1)
    async with bench.runner.service():
        await bench.submit("b", 5)
        batch = await bench.wait("b")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data[0].code == "storage_full"
    assert len(bench.lines("b", "out")) == 2
    assert batch.output_file_id is not None


async def test_an_input_file_that_is_gone_fails_the_batch(tmp_path: Path) -> None:
    context = Context()
    context.hold = asyncio.Event()
    bench = Bench(context, tmp_path)
    async with bench.runner.service():
        await bench.submit("b", 2)
        await until(lambda: context.num_now == 2)
    (tmp_path / "files" / "file-b").unlink()
    bench = Bench(context, tmp_path)
    async with bench.runner.service():
        batch = await bench.wait("b")
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data[0].code == "input_file_unreadable"


async def test_what_expires_is_deleted_and_what_was_left_half_done_too(tmp_path: Path) -> None:
    bench = Bench(Context(), tmp_path)

    def add(store: Store) -> None:
        for name, expires in (("old", -1), ("new", 999)):
            store.path(f"file-{name}").write_bytes(b"x")
            file = FileObject(
                id=f"file-{name}",
                bytes=1,
                created_at=0,
                filename="x",
                purpose="batch",
                expires_at=now() + expires,
            )
            store.add(StoredFile(tenant="t", file=file))
        store.path("file-upload-that-was-cut-off").write_bytes(b"x")

    await bench.archive.run(add)
    await bench.archive.close()
    bench = Bench(Context(), tmp_path)
    async with bench.runner.service():
        await until(lambda: len(list((tmp_path / "files").iterdir())) == 1)
    assert (tmp_path / "files" / "file-new").exists()


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 300)), max_size=20), st.data())
def test_whatever_a_crash_cuts_off_the_whole_lines_before_it_count(
    sizes: list[tuple[bool, int]], data: st.DataObject
) -> None:
    import tempfile

    lines = []
    for number, (is_answer, size) in enumerate(sizes):
        name = f"r{number}"
        if is_answer:
            body = {"text": "\n\u00e4" * size, "usage": {"total_tokens": 1}}
            lines.append(make_result("id", name, answer(200, body)).line)
        else:
            lines.append(refusal("id", name, "code", "x" * size).line)
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
    num_whole = sum(end <= cut for end in ends)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results"
        tail = data.draw(st.sampled_from([b"", b"\0" * 100, b'{"id": 1}\n{}\n']))
        path.write_bytes(whole[:cut] + (tail if cut in (0, *ends) else b""))
        progress = Progress()
        size = recover(path, progress, is_success=True)
        assert progress.done == {f"r{i}" for i in range(num_whole)}
        assert progress.counts.completed == num_whole
        assert path.stat().st_size == size == sum(map(len, lines[:num_whole]))
        append(path, lines[num_whole:])
        assert path.read_bytes() == whole


def test_all_requests_of_a_file_are_for_one_model(tmp_path: Path) -> None:
    def line(custom_id: str, **body: Any) -> str:
        what = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
        return json.dumps(what) + "\n"

    path = tmp_path / "in.jsonl"
    path.write_text(line("1", model="b") + line("2") + line("3", model="b") + line("4", model="a"))
    limits = InputLimits("/v1/completions", ("a", "b"), 10, 1000)
    found = scan(path, limits, lambda: False)
    assert found.model == "b"
    assert [(error.line, error.code) for error in found.errors] == [
        (2, "mismatched_model"),
        (4, "mismatched_model"),
    ]
    path.write_text(line("1") + line("2", model="a") + "\n" + line("3").strip())
    found = scan(path, limits, lambda: False)
    assert (found.model, found.errors, found.custom_ids) == ("a", [], ["1", "2", "3"])
    with path.open("rb") as file:
        assert [read_request(file, place).custom_id for place in found.lines] == ["1", "2", "3"]
    assert scan(path, limits, lambda: True).lines == []


def test_a_missing_file_has_no_results(tmp_path: Path) -> None:
    progress = Progress()
    assert recover(tmp_path / "none", progress, is_success=True) == 0
    assert progress.done == set()
