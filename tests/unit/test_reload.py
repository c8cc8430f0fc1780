"""Reading the configuration again: what changes, what does not, what is said."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from stoker.api.auth import KeyRing
from stoker.config import Config, ModelConfig, ServerConfig, TenantConfig
from stoker.errors import AuthenticationError
from stoker.keys import add_key, digest_of, revoke_key
from stoker.reload import Reloader, needs_restart
from stoker.settings import load_config

pytestmark = pytest.mark.slow  # it waits for files to be looked at


TODAY = datetime.date(2024, 2, 29)
DEADLINE_S = 20.0


class Site:
    """A folder with a configuration, and what a server made of it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "stoker.toml"
        self.keys_file = folder / "keys.toml"
        self.keys_file.touch()
        self.applied: list[tuple[Config, KeyRing]] = []
        self.applied_on: list[threading.Thread] = []
        self.num_loads = 0
        self.reloader: Reloader | None = None

    def write(self, tenants: str = "", server: str = "", rest: str = "") -> None:
        keys = f'tenant_keys_file = "{self.keys_file}"\n'
        text = f"[server]\n{keys}reload_s = 0.05\n{server}\n{rest}\n{tenants}"
        replacement = self.file.with_suffix(".new")
        replacement.write_text(text)
        replacement.replace(self.file)

    def load(self) -> Config:
        self.num_loads += 1
        return load_config(str(self.file), {}, {})[0]

    def start(self) -> Reloader:
        config = self.load()
        self.reloader = Reloader(config, self.load, self._apply, self.file)
        self.reloader.start(KeyRing.load(config))
        return self.reloader

    def _apply(self, config: Config, keys: KeyRing) -> None:
        self.applied.append((config, keys))
        self.applied_on.append(threading.current_thread())

    def weights(self) -> dict[str, float]:
        return {tenant.name: tenant.weight for tenant in self.applied[-1][0].tenants}

    def tenant_of(self, key: str) -> str:
        return self.applied[-1][1].identify("/x", [(b"x-api-key", key.encode())], None)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    site.write()
    yield site
    if site.reloader is not None:
        await site.reloader.stop()
        await site.reloader.stop()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.005)


def entry(name: str, weight: float) -> str:
    return f'[[tenants]]\nname = "{name}"\nweight = {weight}\n'


async def test_a_changed_file_is_noticed_and_taken_as_a_whole(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    site.start()
    site.write(entry("a", 2) + entry("b", 3), server='api_keys = ["one"]')
    await until(lambda: bool(site.applied))
    assert site.weights() == {"a": 2.0, "b": 3.0}
    assert site.tenant_of("one") == "default"
    assert site.applied_on == [threading.main_thread()]
    assert "configuration read again: tenants a, b; keys 1" in caplog.messages
    assert not any("restart" in message for message in caplog.messages)


async def test_keys_come_and_go_with_their_file(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.start()
    key, kept = add_key(site.keys_file, "team-a", "", TODAY)
    await until(lambda: bool(site.applied))
    assert site.tenant_of(key) == "team-a"
    revoke_key(site.keys_file, kept.id)
    await until(lambda: len(site.applied) == 2)
    with pytest.raises(AuthenticationError, match="wrong"):
        site.tenant_of(key)
    assert "no key is left, so every request is refused until there is one" in caplog.messages


async def test_when_all_keys_leave_the_configuration_the_server_stays_closed(site: Site) -> None:
    site.file.write_text('[server]\napi_keys = ["one"]\nreload_s = 0.05\n')
    reloader = site.start()
    site.file.write_text("[server]\nreload_s = 0.05\n")
    await until(lambda: bool(site.applied))
    for _ in range(2):  # it is not forgotten when it is read once more
        with pytest.raises(AuthenticationError):
            site.tenant_of("one")
        assert await reloader.reload()
    assert len(site.applied[-1][1]) == 0


async def test_a_server_that_was_open_closes_with_its_first_key(site: Site) -> None:
    site.file.write_text("[server]\nreload_s = 0.05\n")
    site.start()
    site.file.write_text('[server]\nreload_s = 0.05\napi_keys = ["one"]\n')
    await until(lambda: bool(site.applied))
    with pytest.raises(AuthenticationError):
        site.tenant_of("two")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda site: site.file.write_text("[server"), "not valid TOML"),
        (lambda site: site.write(entry("a", 0)), r"tenants[0].weight: must be at least"),
        (lambda site: site.write('[[tenants]]\nname = "a"\nwait = 1'), "tenants[0].wait: unknown"),
        (lambda site: site.keys_file.write_text("[[keys]]\n"), "keys[0]: missing required"),
        (lambda site: site.file.unlink(), "there is no such configuration file"),
        (lambda site: site.keys_file.unlink(), "tenant_keys_file"),
    ],
)
async def test_what_is_broken_changes_nothing_and_is_said_once(
    site: Site,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[Site], None],
    message: str,
) -> None:
    site.start()
    break_it(site)
    await until(lambda: bool(caplog.records))
    num_loads = site.num_loads
    await asyncio.sleep(0.3)  # several looks later
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert message in record.getMessage()
    assert "\n" not in record.getMessage()
    assert record.exc_info is None
    assert (site.applied, site.num_loads) == ([], num_loads)
    site.keys_file.touch()
    site.keys_file.write_text("")
    site.write(entry("a", 5))
    await until(lambda: bool(site.applied) and bool(site.applied[-1][0].tenants))
    assert site.weights() == {"a": 5.0}


async def test_a_fault_of_ours_does_not_end_the_watch(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reloader = site.start()

    def fail() -> Config:
        raise RuntimeError("a bug")

    monkeypatch.setattr(reloader, "_load", fail)
    site.write(entry("a", 2))
    await until(lambda: bool(caplog.records))
    assert "RuntimeError: a bug" in caplog.text
    monkeypatch.undo()
    site.write(entry("a", 3))
    await until(lambda: bool(site.applied))
    assert site.weights() == {"a": 3.0}


async def test_asking_reads_again_without_a_change(site: Site) -> None:
    config = msgspec.structs.replace(site.load(), server=ServerConfig(reload_s=0.0))
    reloader = Reloader(config, site.load, site._apply, site.file)
    site.reloader = reloader
    reloader.start(KeyRing())
    site.write(entry("a", 2))
    await asyncio.sleep(0.2)
    assert site.applied == []  # nobody looks
    reloader.ask()
    await until(lambda: bool(site.applied))
    assert site.weights() == {"a": 2.0}
    reloader.ask()
    await until(lambda: len(site.applied) == 2)


async def test_what_changes_before_it_starts_is_noticed(site: Site) -> None:
    config = site.load()
    reloader = Reloader(config, site.load, site._apply, site.file)
    site.reloader = reloader
    key, _ = add_key(site.keys_file, "a", "", TODAY)  # while the model is loaded
    reloader.start(KeyRing())
    await until(lambda: bool(site.applied))
    assert site.tenant_of(key) == "a"


async def test_another_file_of_keys_is_watched_from_then_on(site: Site, tmp_path: Path) -> None:
    reloader = site.start()
    other = tmp_path / "other.toml"
    site.file.write_text(f'[server]\nreload_s = 0.05\ntenant_keys_file = "{other}"\n')
    assert not await reloader.reload()  # there is none yet
    key, _ = add_key(other, "b", "", TODAY)
    await until(lambda: bool(site.applied))
    assert site.tenant_of(key) == "b"
    num_applied = len(site.applied)
    add_key(site.keys_file, "a", "", TODAY)
    await asyncio.sleep(0.2)
    assert len(site.applied) == num_applied


async def test_a_file_of_the_same_size_and_time_that_was_replaced_is_noticed(site: Site) -> None:
    site.write(entry("a", 1.5))
    site.start()
    times = site.file.stat()
    replacement = site.file.with_suffix(".new")
    replacement.write_text(site.file.read_text().replace("1.5", "2.5"))
    os.utime(replacement, ns=(times.st_atime_ns, times.st_mtime_ns))
    replacement.replace(site.file)
    await until(lambda: bool(site.applied))
    assert site.weights() == {"a": 2.5}


async def test_what_needs_a_restart_is_said_once(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    reloader = site.start()
    site.write(server="port = 9000", rest='[plugins.x]\ny = 1\n[[models]]\nmodel = "m"\nlanes = 3')
    assert await reloader.reload()
    assert await reloader.reload()

    def said() -> list[str]:
        return [message for message in caplog.messages if "restart" in message]

    everything = "server.port, models[0].model, models[0].lanes, plugins.x.y"
    assert said() == [f"changed, but needs a restart: {everything}"]
    site.write()
    assert await reloader.reload()
    site.write(server="port = 9000")
    assert await reloader.reload()
    assert said()[1:] == ["changed, but needs a restart: server.port"]


def test_what_can_change_while_it_runs_needs_no_restart() -> None:
    hot = Config(
        server=ServerConfig(
            api_keys=["x"],
            api_keys_file="f",
            tenant_keys_file="g",
            trusted_proxies=["10.0.0.1"],
        ),
        tenants=[TenantConfig(name="a", keys=[digest_of("x")])],
    )
    assert needs_restart(Config(), hot) == []
    models = [ModelConfig(), ModelConfig(id="second")]
    changed = needs_restart(Config(models=models[:1]), Config(models=models))
    assert "models[1].id" in changed
    assert all(name.startswith("models[1].") for name in changed)
    assert needs_restart(Config(models=models), Config(models=models[:1])) == changed
