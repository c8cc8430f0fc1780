"""Discovery with entry points made here: what is found, refused, active, and what is said about it."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import importlib_metadata
import msgspec
import pytest

import stoker
from stoker.config import CacheConfig, Config, MetricsConfig, ModelConfig, SchedulerConfig
from stoker.discovery import (
    CORE_COMMANDS,
    HOOKS,
    PluginListing,
    Plugins,
    load_plugins,
    resolve_model,
    split_reference,
)
from stoker.errors import (
    ConfigError,
    ModelError,
    PluginConflictError,
    PluginContractError,
    PluginLoadError,
)

EntryPoint = importlib_metadata.EntryPoint


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    weight: int = 1
    name: str = ""


def policy(name: str, **fields: Any) -> stoker.PolicyInfo:
    return stoker.PolicyInfo(
        **({"api_version": 1} | fields), name=name, summary=name, factory=lambda *_: cast(Any, None)
    )


LRU = stoker.EvictionInfo(
    api_version=1, name="lru", summary="lru", factory=lambda *_: cast(Any, None)
)


def middleware(name: str, **fields: Any) -> stoker.MiddlewareInfo:
    return stoker.MiddlewareInfo(
        api_version=1, name=name, summary=name, factory=lambda *_: cast(Any, None), **fields
    )


class FakeDistribution(importlib_metadata.Distribution):
    def __init__(self, name: str) -> None:
        self._name = name

    def read_text(self, filename: str) -> str | None:
        return f"Name: {self._name}\nVersion: 1.0\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        return Path(path)


class World:
    """Entry points to modules that exist in memory only."""

    def __init__(self) -> None:
        self.entry_points: list[EntryPoint] = []
        self.modules: list[str] = []

    def add(self, distribution: str, name: str, module: str | None = None, **hooks: Any) -> None:
        """A plugin with these hooks; without hooks its module does not exist."""
        module = module or f"fake_{distribution}_{name}".replace("-", "_")
        if hooks:
            made = types.ModuleType(module)
            vars(made).update(hooks)
            sys.modules[module] = made
            self.modules.append(module)
        entry_point = EntryPoint(name, module, "stoker")
        vars(entry_point)["dist"] = FakeDistribution(distribution)
        self.entry_points.append(entry_point)

    def policies(self, distribution: str, name: str, *found: Any, evictions: Any = ()) -> None:
        """A plugin that registers these as its policies."""

        def stoker_register_policies() -> Any:
            return list(found)

        def stoker_register_evictions() -> Any:
            return list(evictions)

        self.add(
            distribution,
            name,
            stoker_register_policies=stoker.hookimpl(stoker_register_policies),
            stoker_register_evictions=stoker.hookimpl(stoker_register_evictions),
        )

    def load(self, only: list[str] | None = None) -> Plugins:
        return load_plugins(self.entry_points, only)

    def row(self, name: str, config: Config | None = None) -> PluginListing:
        (row,) = [row for row in self.load().listing(config) if row.name == name]
        return row


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("STOKER_PLUGINS", raising=False)
    made = World()
    yield made
    for module in made.modules:
        del sys.modules[module]


def register_one(info: Any) -> Callable[[], Any]:
    def stoker_register_policies() -> Any:
        return [info]

    return stoker.hookimpl(stoker_register_policies)


# ------------------------------------------------------------------ what is found


def test_the_installed_plugins_are_found() -> None:
    plugins = load_plugins()
    assert "fcfs" in plugins.policies()
    assert {"file", "hf", "pypi"} <= set(plugins.sources())
    (row,) = [row for row in plugins.listing() if row.distribution == "stoker"]
    assert (row.name, row.status, row.api_version) == ("builtin", "active", stoker.API_VERSION)


def test_a_good_plugin_is_available_then_active(world: World) -> None:
    world.policies("good", "good", policy("fair"))
    plugins = world.load()
    assert plugins.require("policy", "fair").name == "fair"
    assert world.row("good").status == "available"
    config = Config(scheduler=SchedulerConfig(policy="fair"))
    row = world.row("good", config)
    assert (row.status, row.reason, row.provides) == ("active", None, {"policy": ["fair"]})
    assert (row.distribution, row.version) == ("good", "1.0")
    assert row.import_ms >= 0


def test_every_hook_spec_has_a_kind() -> None:
    from stoker import hookspecs
    from stoker.discovery import LIFE_CYCLE

    specs = {name for name in vars(hookspecs) if name.startswith("stoker_")}
    assert specs == {hook for hook, _ in HOOKS.values()} | set(LIFE_CYCLE)


# ------------------------------------------------------------------ what is broken


def test_a_broken_plugin_hurts_nobody_else(world: World) -> None:
    world.add("stoker-policy-bad", "bad")
    world.policies("good", "good", policy("fair"))
    plugins = world.load()
    assert set(plugins.policies()) == {"fair"}
    row = world.row("bad")
    assert row.status == "broken"
    assert row.reason is not None
    assert "ModuleNotFoundError" in row.reason
    assert "stoker-policy-bad 1.0" in row.reason
    with pytest.raises(
        PluginLoadError, match=r"'bad' is asked for, but .*ModuleNotFound"
    ) as caught:
        plugins.require("policy", "bad")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("error", [ValueError("no\nluck"), SystemExit(3)])
def test_a_hook_that_raises_breaks_its_plugin(world: World, error: BaseException) -> None:
    @stoker.hookimpl
    def stoker_register_policies() -> Any:
        raise error

    world.add("p", "raises", stoker_register_policies=stoker_register_policies)
    row = world.row("raises")
    assert row.status == "broken"
    assert row.reason is not None
    assert type(error).__name__ in row.reason
    assert "\n" not in row.reason


def contract_breakers() -> dict[str, tuple[dict[str, Any], str]]:
    @stoker.hookimpl
    def stoker_regster_policies() -> Any:
        return []

    @stoker.hookimpl
    async def stoker_register_policies() -> Any:
        return []

    @stoker.hookimpl(specname="stoker_register_policies")
    def wants_more(config: Any) -> Any:
        return []

    @stoker.hookimpl(specname="stoker_register_policies", wrapper=True)
    def wrapper() -> Any:
        return (yield)

    def undecorated() -> Any:
        return []

    def returning(value: Any) -> dict[str, Any]:
        @stoker.hookimpl(specname="stoker_register_policies")
        def register() -> Any:
            return value

        return {"register": register}

    return {
        "misspelt": (
            {"stoker_regster_policies": stoker_regster_policies},
            "'stoker_regster_policies'.*Did you mean 'stoker_register_policies'",
        ),
        "async": ({"stoker_register_policies": stoker_register_policies}, "async"),
        "argument": ({"wants_more": wants_more}, "config"),
        "wrapper": ({"wrapper": wrapper}, "wrapper"),
        "undecorated": ({"stoker_register_policies": undecorated}, "@stoker.hookimpl"),
        "nothing": ({"unrelated": 1}, "implements no hook"),
        "not-a-list": (returning(policy("x")), "PolicyInfo instead of a list"),
        "wrong-type": (returning([middleware("xx")]), "MiddlewareInfo.*PolicyInfo only"),
        "not-a-descriptor": (returning(["text"]), "a str"),
        "bad-name": (returning([policy("Bad_Name")]), "'Bad_Name' is no name"),
        "one-letter": (returning([policy("x")]), "'x' is no name"),
        "twice": (returning([policy("xx"), policy("xx")]), "'xx' is registered twice"),
        "options": (returning([policy("xx", options=dict)]), "no msgspec.Struct"),
        "too-new": (returning([policy("xx", api_version=99)]), "API 99.*speaks 1.*upgrade stoker"),
        "too-old": (returning([policy("xx", api_version=0)]), "API 0.*speaks 1.*the plugin"),
    }


@pytest.mark.parametrize("name", list(contract_breakers()))
def test_a_plugin_that_breaks_the_contract_is_refused(world: World, name: str) -> None:
    hooks, expected = contract_breakers()[name]
    world.add("stoker-policy-xx", name, **hooks)
    world.policies("good", "good", policy("fair"))
    plugins = world.load()
    (row,) = [row for row in plugins.listing() if row.name == name]
    assert row.status == "refused"
    assert re.search(expected, str(row.reason))
    assert set(plugins.policies()) == {"fair"}


def test_a_refused_plugin_that_is_asked_for_says_why(world: World) -> None:
    world.policies("p", "some-plugin", policy("wanted", api_version=99))
    with pytest.raises(PluginContractError, match=r"policy 'wanted' is asked for.*API 99"):
        world.load().require("policy", "wanted")


# ------------------------------------------------------------------ conflicts


def test_one_entry_point_name_in_two_distributions_refuses_both(world: World) -> None:
    world.policies("first", "same", policy("one"))
    world.policies("second", "same", policy("two"))
    plugins = world.load()
    assert plugins.policies() == {}
    for row in plugins.listing():
        assert row.status == "refused"
        assert row.reason is not None
        assert "first and second" in row.reason


def test_the_bundled_plugin_stands_in_every_conflict(world: World) -> None:
    world.policies("aaa", "builtin", policy("other"))
    world.policies("bbb", "thief", policy("fcfs"))
    world.policies("stoker", "builtin", policy("fcfs"))
    plugins = world.load()
    assert plugins.require("policy", "fcfs").name == "fcfs"
    status = {row.distribution: row.status for row in plugins.listing()}
    assert status == {"stoker": "active", "aaa": "refused", "bbb": "refused"}


def test_a_contested_name_names_both_and_cannot_be_asked_for(world: World) -> None:
    world.policies("good", "good", policy("fair"), policy("calm"), evictions=[LRU])
    world.policies("thief", "thief", policy("fair"))
    plugins = world.load()
    assert [row.status for row in plugins.listing()] == ["available", "refused"]
    with pytest.raises(PluginConflictError) as caught:
        plugins.require("policy", "fair")
    assert "good 1.0" in str(caught.value)
    assert "thief 1.0" in str(caught.value)
    # Nobody else is hurt, and nobody gets one of the two by chance.
    assert set(plugins.policies()) == {"calm"}
    plugins.check(Config(scheduler=SchedulerConfig(policy="calm")))
    # The remedy that the message names.
    assert world.load(only=["thief"]).require("policy", "fair").name == "fair"


def test_one_name_of_two_kinds_is_no_conflict(world: World) -> None:
    world.policies("one", "one", policy("same"))

    @stoker.hookimpl
    def stoker_register_middleware() -> Any:
        return [middleware("same")]

    world.add("two", "two", stoker_register_middleware=stoker_register_middleware)
    assert [row.status for row in world.load().listing()] == ["available", "available"]


def test_a_core_command_cannot_be_replaced(world: World) -> None:
    @stoker.hookimpl
    def stoker_register_commands() -> Any:
        return [
            stoker.CommandInfo(
                api_version=1, name="serve", summary="", factory=lambda: cast(Any, None)
            )
        ]

    world.add("thief", "thief", stoker_register_commands=stoker_register_commands)
    row = world.row("thief")
    assert row.status == "refused"
    assert "stoker's own" in str(row.reason)
    assert "serve" in CORE_COMMANDS


# ------------------------------------------------------------------ STOKER_PLUGINS


def test_stoker_plugins_limits_what_is_loaded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.policies("stoker", "builtin", policy("fcfs"))
    world.policies("aa", "aa", policy("pa"))
    world.policies("bb", "bb", policy("pb"))
    monkeypatch.setenv("STOKER_PLUGINS", "bb")
    assert set(world.load().policies()) == {"fcfs", "pb"}
    monkeypatch.setenv("STOKER_PLUGINS", "")
    plugins = world.load()
    assert set(plugins.policies()) == {"fcfs"}
    with pytest.raises(PluginLoadError, match=r"left out by STOKER_PLUGINS"):
        plugins.require("policy", "aa")
    monkeypatch.setenv("STOKER_PLUGINS", "ba")
    with pytest.raises(ConfigError, match=r"STOKER_PLUGINS: there is no plugin 'ba'"):
        world.load().check(Config())


# ------------------------------------------------------------------ asking


def test_unknown_names_list_what_there_is(world: World) -> None:
    world.policies("p", "p", policy("fair"), policy("fcfs"))
    world.add("broken", "broken")
    with pytest.raises(ConfigError) as caught:
        world.load().require("policy", "fare")
    text = str(caught.value)
    assert "Did you mean 'fair'?" in text
    assert "fair, fcfs" in text
    assert "pip install stoker-policy-fare" in text
    assert "broken" in text
    with pytest.raises(
        ConfigError, match=r"Installed backends: none.*pip install stoker-backend-x"
    ):
        world.load().require("backend", "x")


def test_check_names_the_setting() -> None:
    plugins = Plugins.of(policy("fcfs"), LRU)
    plugins.check(Config())
    with pytest.raises(ConfigError, match=r"^cache.eviction: there is no eviction 'x'"):
        plugins.check(Config(cache=CacheConfig(eviction="x")))
    with pytest.raises(ConfigError, match=r"^scheduler.policy: there is no policy 'x'"):
        plugins.check(Config(scheduler=SchedulerConfig(policy="x")))
    with pytest.raises(ConfigError, match=r"^models\[0\].backend: there is no backend 'x'"):
        plugins.check(Config(models=[ModelConfig(backend="x")]))
    with pytest.raises(ConfigError, match=r"^plugins.fcsf: .*Did you mean 'fcfs'"):
        plugins.check(Config(plugins={"fcsf": {}}))
    with pytest.raises(ConfigError, match=r"^plugins.fcfs.enabled"):
        plugins.check(Config(plugins={"fcfs": {"enabled": "no"}}))


def test_a_section_for_a_broken_plugin_stops_the_start(world: World) -> None:
    world.policies("stoker", "builtin", policy("fcfs"), evictions=[LRU])
    world.add("stoker-quota", "quota")
    plugins = world.load()
    with pytest.raises(PluginLoadError, match=r"quota") as caught:
        plugins.check(Config(plugins={"quota": {}}))
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    plugins.check(Config(plugins={"quota": {"enabled": False}}))


# ------------------------------------------------------------------ options


def test_options_are_decoded_strictly() -> None:
    info = policy("fair", options=Options)
    plugins = Plugins.of(info)
    config = Config(plugins={"fair": {"enabled": True, "weight": 2}})
    assert plugins.options(info, config) == Options(weight=2)
    assert plugins.options(info, config, {"weight": 3, "name": "n"}) == Options(3, "n")
    assert plugins.options(info, Config()) == Options()
    for section, expected in [
        ({"wieght": 2}, r"plugins.fair.wieght: unknown setting. Did you mean 'weight'\?"),
        ({"weight": "2"}, "plugins.fair.weight: Expected int, got str"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            plugins.check(
                Config(plugins={"fair": section}, scheduler=SchedulerConfig(policy="fair"))
            )


def test_options_for_what_takes_none() -> None:
    info = policy("plain")
    plugins = Plugins.of(info)
    assert plugins.options(info, Config(plugins={"plain": {"enabled": True}})) is None
    with pytest.raises(ConfigError, match=r"plugins.plain.x: plain takes no options"):
        plugins.options(info, Config(plugins={"plain": {"x": 1}}))


def test_namesakes_share_a_section() -> None:
    class Other(msgspec.Struct):
        size: int = 0

    one, two = policy("same", options=Options), middleware("same", options=Other)
    plugins = Plugins.of(one, two)
    config = Config(plugins={"same": {"weight": 5, "size": 6}})
    assert plugins.options(one, config) == Options(weight=5)
    assert plugins.options(two, config) == Other(size=6)


# ------------------------------------------------------------------ active


def test_the_configuration_makes_active() -> None:
    bundled = Plugins.of(
        middleware("late", active_by_default=True, order=2),
        middleware("zero", active_by_default=True, order=0),
        middleware("early", active_by_default=True, order=2),
        middleware("opt-in", order=1),
    )

    def names(plugins: Plugins, **sections: Any) -> list[str]:
        config = Config(plugins={name.replace("_", "-"): s for name, s in sections.items()})
        return [info.name for info in plugins.active("middleware", config)]

    assert names(bundled) == ["zero", "early", "late"]
    assert names(bundled, opt_in={}) == ["zero", "opt-in", "early", "late"]
    assert names(bundled, opt_in={"enabled": False}, late={"enabled": False}) == ["zero", "early"]
    foreign = Plugins.of(middleware("foreign", active_by_default=True), distribution="else")
    assert names(foreign) == []
    assert names(foreign, foreign={}) == ["foreign"]


def test_metrics_need_their_own_switch_too() -> None:
    info = stoker.ObserverInfo(
        api_version=1,
        name="metrics",
        summary="",
        factory=lambda: cast(Any, None),
        active_by_default=True,
    )
    plugins = Plugins.of(info)
    assert plugins.active("observer", Config()) == [info]
    assert plugins.active("observer", Config(metrics=MetricsConfig(enabled=False))) == []


# ------------------------------------------------------------------ life cycle


def test_life_cycle_hooks_of_plugins_in_use_are_called_one_by_one(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, Any]] = []

    def plugin(distribution: str, *, fails: bool = False) -> None:
        @stoker.hookimpl
        def stoker_server_started(context: Any) -> None:
            told.append((distribution, context))
            if fails:
                raise ValueError("no luck")

        @stoker.hookimpl
        def stoker_server_stopped() -> None:
            told.append((distribution, None))

        world.add(
            distribution,
            distribution,
            stoker_server_started=stoker_server_started,
            stoker_server_stopped=stoker_server_stopped,
        )

    plugin("aa", fails=True)
    plugin("bb")
    plugin("idle")
    plugins = world.load()
    context = cast(Any, types.SimpleNamespace(config=Config(plugins={"aa": {}, "bb": {}})))
    plugins.started(context)
    assert told == [("aa", context), ("bb", context)]
    assert "'aa'" in caplog.text
    assert "no luck" in caplog.text
    told.clear()
    plugins.stopped(context)
    assert told == [("aa", None), ("bb", None)]


# ------------------------------------------------------------------ references


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("hf:owner/repo", ("hf", "owner/repo")),
        ("HF:owner/repo/x:y.gguf", ("hf", "owner/repo/x:y.gguf")),
        ("file:/tmp/x.gguf", ("file", "/tmp/x.gguf")),
        ("models/x.gguf", ("file", "models/x.gguf")),
        ("C:\\models\\x.gguf", ("file", "C:\\models\\x.gguf")),
        ("c:/models/x.gguf", ("file", "c:/models/x.gguf")),
        ("", ("file", "")),
        ("with\0nul:x", ("file", "with\0nul:x")),
    ],
)
def test_references_are_split_by_scheme(reference: str, expected: tuple[str, str]) -> None:
    assert split_reference(reference) == expected


def test_a_file_whose_name_looks_like_a_reference_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hf:model.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert split_reference("hf:model.gguf") == ("file", "hf:model.gguf")


def test_an_unknown_scheme_lists_the_known() -> None:
    plugins = load_plugins()
    with pytest.raises(ModelError, match=r"'hff'.*Did you mean 'hf'.*file:, hf:, pypi:"):
        resolve_model("hff:owner/repo", plugins)
