"""The store of responses: whose they are, how long they stay, and what harms it."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from stoker.api.responses import database as database_module
from stoker.api.responses.answer_schemas import MessageItem, MessagePart, ResponseObject
from stoker.api.responses.owners import is_alive, this_process
from stoker.api.responses.records import KeptResponse
from stoker.api.responses.store import ResponseStore
from stoker.config import ResponsesConfig
from stoker.errors import InvalidRequestError, RequestNotFoundError

Open = Callable[..., ResponseStore]


def kept(
    name: str, previous: str | None = None, text: str = "hello", **fields: Any
) -> KeptResponse:
    response = ResponseObject(
        id=name,
        created_at=1,
        model="m",
        status=fields.pop("status", "completed"),
        previous_response_id=previous,
        output=[message(f"{name}-out", text)],
        **fields,
    )
    return KeptResponse(response=response, input=[message(f"{name}-in", "hi", "user")])


def message(name: str, text: str, role: Any = "assistant") -> MessageItem:
    return MessageItem(id=name, role=role, content=[MessagePart(type="output_text", text=text)])


@pytest.fixture
async def open_store(tmp_path: Path) -> AsyncIterator[Open]:
    opened: list[ResponseStore] = []

    def opener(**settings: Any) -> ResponseStore:
        settings.setdefault("path", str(tmp_path / "data" / "responses.sqlite3"))
        opened.append(ResponseStore(ResponsesConfig(**settings)))
        return opened[-1]

    yield opener
    for store in opened:
        await store.close()


async def test_what_is_kept_is_found_by_its_tenant_only(open_store: Open) -> None:
    store = open_store()
    one = kept("r1", metadata={"a": "b"})
    assert await store.put(one, "ann") == ""
    assert await store.get("r1", "ann") == one
    assert await store.item("r1-in", "ann") == one.input[0]
    assert await store.item("r1-out", "ann") == one.response.output[0]
    for wrong in (store.get("r1", "bob"), store.get("r2", "ann")):
        with pytest.raises(RequestNotFoundError, match=r"no response 'r[12]' is stored"):
            await wrong
    assert await store.item("r1-in", "bob") is None
    with pytest.raises(InvalidRequestError, match="is not stored") as caught:
        await store.history("r1", "bob")
    assert caught.value.code == "previous_response_not_found"
    assert not await store.delete("r1", "bob")
    assert await store.delete("r1", "ann")
    assert not await store.delete("r1", "ann")
    assert await store.item("r1-in", "ann") is None


async def test_a_restart_keeps_them_and_nobody_else_may_read_the_file(
    open_store: Open, tmp_path: Path
) -> None:
    store = open_store()
    await store.put(kept("r1"), "ann")
    await store.close()
    file = tmp_path / "data" / "responses.sqlite3"
    assert file.stat().st_mode & 0o077 == 0
    assert (await open_store().get("r1", "ann")).response.id == "r1"


async def test_a_history_is_what_follows_each_other(open_store: Open) -> None:
    store = open_store()
    for number in range(5):
        await store.put(kept(f"r{number}", f"r{number - 1}" if number else None), "ann")
    found = await store.history("r3", "ann")
    assert [one.response.id for one in found] == ["r0", "r1", "r2", "r3"]
    await store.delete("r1", "ann")
    with pytest.raises(InvalidRequestError, match="'r1' is not stored"):
        await store.history("r3", "ann")


async def test_a_history_that_follows_itself_or_has_no_end_is_refused(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    await store.put(kept("a", "b"), "ann")
    await store.put(kept("b", "a"), "ann")
    with pytest.raises(InvalidRequestError, match="too long to follow"):
        await store.history("a", "ann")
    monkeypatch.setattr("stoker.api.responses.store._MAX_CHAIN_BYTES", 100)
    await store.put(kept("c"), "ann")
    await store.put(kept("d", "c"), "ann")
    with pytest.raises(InvalidRequestError, match="too long to follow"):
        await store.history("d", "ann")


async def test_the_oldest_of_whoever_has_most_make_room(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 1000.0
    monkeypatch.setattr(database_module, "_now", lambda: at)
    store = open_store(max_responses=4)
    await store.put(kept("b0"), "bob")
    for number in range(6):
        at += 1
        await store.put(kept(f"a{number}"), "ann")
    assert (await store.get("b0", "bob")).response.id == "b0"
    for gone in ("a0", "a1", "a2"):
        with pytest.raises(RequestNotFoundError):
            await store.get(gone, "ann")
    for there in ("a3", "a4", "a5"):
        await store.get(there, "ann")
    assert await store.item("a0-in", "ann") is None


async def test_what_is_followed_lives_on_and_the_rest_expires(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 1000.0
    monkeypatch.setattr(database_module, "_now", lambda: at)
    store = open_store(ttl_s=100)
    await store.put(kept("r1"), "ann")
    await store.put(kept("r2"), "ann")
    at += 90
    await store.history("r1", "ann")
    at += 20
    await store.get("r1", "ann")
    with pytest.raises(RequestNotFoundError):
        await store.get("r2", "ann")


async def test_bytes_are_limited(open_store: Open) -> None:
    store = open_store(max_bytes=20_000)
    for number in range(10):
        assert await store.put(kept(f"r{number}", text="x" * 5000), "ann") == ""
    await store.get("r9", "ann")
    with pytest.raises(RequestNotFoundError):
        await store.get("r5", "ann")
    assert "20000 are all there are" in await store.put(kept("big", text="x" * 50_000), "ann")
    await store.get("r9", "ann")


@pytest.mark.parametrize(
    "data", [b"no database at all" * 1000, b"SQLite format 3\0" + b"\7" * 5000]
)
async def test_a_broken_file_is_set_aside(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    file = tmp_path / "data" / "responses.sqlite3"
    file.parent.mkdir()
    file.write_bytes(data)
    store = open_store()
    assert await store.put(kept("r1"), "ann") == ""
    await store.get("r1", "ann")
    assert "cannot be read" in caplog.text
    (aside,) = file.parent.glob("*.broken-*")
    assert aside.read_bytes() == data


async def test_a_file_that_breaks_while_it_is_open_is_set_aside(
    open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    await store.put(kept("r1"), "ann")
    database = store._database
    assert database is not None
    database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.connection.execute("PRAGMA writable_schema = ON")
    database.connection.execute("UPDATE sqlite_schema SET rootpage = 4000 WHERE name = 'responses'")
    database.close()
    store._database = None
    assert await store.put(kept("r2"), "ann") == ""
    await store.get("r2", "ann")
    assert "responses stored before are not found" in caplog.text


async def test_a_file_of_another_version_is_left_alone(open_store: Open, tmp_path: Path) -> None:
    file = tmp_path / "data" / "responses.sqlite3"
    file.parent.mkdir()
    with sqlite3.connect(file) as other:
        other.execute("PRAGMA user_version = 99")
    other.close()
    assert await open_store().put(kept("r1"), "ann") == ""
    assert len(list(file.parent.glob("*.broken-*"))) == 1


async def test_without_a_file_responses_stay_in_memory(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    store = open_store(path=str(tmp_path / "file" / "responses.sqlite3"))
    assert await store.put(kept("r1"), "ann") == ""
    await store.get("r1", "ann")
    assert "responses are kept in memory only" in caplog.text


async def test_a_full_disk_loses_what_comes_and_nothing_else(
    open_store: Open, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    await store.put(kept("r1"), "ann")
    database = store._database
    assert database is not None
    (pages,) = database.connection.execute("PRAGMA page_count").fetchone()
    database.connection.execute(f"PRAGMA max_page_count = {pages}")
    assert "full" in await store.put(kept("r2", text="x" * 100_000), "ann")
    assert "response r2 is not stored" in caplog.text
    await store.get("r1", "ann")
    database.connection.execute("PRAGMA max_page_count = 1000000")
    assert await store.put(kept("r3"), "ann") == ""


async def test_what_ran_when_a_server_was_killed_has_failed(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    running = kept("r1", status="in_progress", background=True)
    await store.put(running, "ann", is_running=True)
    await store.put(kept("r2"), "ann")
    # Another server of the same file leaves it alone while the first one lives,
    assert (await open_store().get("r1", "ann")).response.status == "in_progress"
    await store.close()
    monkeypatch.setattr(database_module, "is_alive", lambda owner: False)
    # and a later one knows that nobody will ever end it.
    later = open_store()
    failed = (await later.get("r1", "ann")).response
    assert failed.status == "failed"
    assert failed.error is not None
    assert "the server stopped" in failed.error.message
    assert (await later.get("r2", "ann")).response.status == "completed"
    assert await later.item("r1-in", "ann") is not None


def test_a_process_is_known_by_more_than_its_number() -> None:
    me = this_process()
    assert is_alive(me)
    number = me.partition(":")[0]
    assert not is_alive(f"{number}:1.00")
    assert not is_alive("nonsense")
    assert msgspec.json.decode(msgspec.json.encode(me)) == me
