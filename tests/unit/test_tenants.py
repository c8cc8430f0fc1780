"""Tenants: the table, and what the configuration may say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.config import TenantConfig
from stoker.errors import ConfigError
from stoker.keys import digest_of
from stoker.masking import printable
from stoker.settings import load_config
from stoker.tenants import Tenants, is_tenant_name

Write = Callable[[str], str]
KEY = "sk-stoker-a-very-secret-one"
DIGEST = digest_of(KEY)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a configuration file; returns its path."""

    def put(text: str) -> str:
        path = tmp_path / "stoker.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return put


# --------------------------------------------------------------------------- the table


def test_whoever_has_no_entry_has_everybody_elses_settings_under_its_own_name() -> None:
    tenants = Tenants(
        [
            TenantConfig(name="a", weight=3.0),
            TenantConfig(name="*", weight=0.5, requests_per_minute=7),
        ]
    )
    assert tenants.get("a") == TenantConfig(name="a", weight=3.0)
    assert tenants.get("b") == TenantConfig(name="b", weight=0.5, requests_per_minute=7)
    assert [tenant.name for tenant in tenants.configured()] == ["a"]


def test_without_an_entry_for_everybody_else_the_defaults_hold() -> None:
    tenants = Tenants()
    assert tenants.get("b") == TenantConfig(name="b")
    assert tenants.configured() == []


def test_replacing_forgets_what_was() -> None:
    tenants = Tenants([TenantConfig(name="a", weight=3.0), TenantConfig(name="*", weight=2.0)])
    tenants.replace([TenantConfig(name="b", weight=4.0)])
    assert [tenants.get(name).weight for name in ("a", "b", "c")] == [1.0, 4.0, 1.0]


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "x" * 64, "anonymous", "default"])
def test_good_names(name: str) -> None:
    assert is_tenant_name(name)


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a/b", "ä", "*", "a\n", "a,b", "a=b"])
def test_bad_names(name: str) -> None:
    assert not is_tenant_name(name)


# --------------------------------------------------------------------------- the configuration

GOOD = f"""
[server]
trusted_proxies = ["10.0.0.7", "192.168.0.0/16", "fd00::/8"]
[[tenants]]
name = "a"
keys = ["{DIGEST}", "{digest_of("another")}"]
weight = 2
priority_ceiling = -3
reserved_lanes = 2
reserved_kv = 0.7
[[tenants]]
name = "b"
keys = ["{digest_of("of b")}"]
reserved_kv = 0.3
[[tenants]]
name = "anonymous"
tokens_per_day = 5
[[tenants]]
name = "*"
requests_per_minute = 30
"""


def test_a_good_one_is_read_and_every_field_has_an_origin(write: Write) -> None:
    path = write(GOOD)
    config, origins = load_config(path, {}, {})
    assert [tenant.name for tenant in config.tenants] == ["a", "b", "anonymous", "*"]
    assert config.tenants[0].priority_ceiling == -3
    assert origins["tenants[0].weight"] == path
    assert origins["tenants[1].weight"] == "default"
    assert len([name for name in origins if name.startswith("tenants[")]) == 4 * len(
        TenantConfig.__struct_fields__
    )


def test_digests_are_shortened_where_they_are_shown(write: Write) -> None:
    config, _ = load_config(write(GOOD), {}, {})
    shown = printable(config)["tenants"][0]["keys"]
    assert shown[0] == DIGEST[:15] + "..."
    assert DIGEST not in json.dumps(printable(config))


def entries(*texts: str) -> str:
    return "\n".join(f"[[tenants]]\n{text}" for text in texts)


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        (entries("weight = 1"), "tenants[0]: missing required field name"),
        (entries('name = "a"', 'name = "b"\nweight = 0'), "tenants[1].weight: must be at least"),
        (entries('name = "a"\nweight = -1'), "tenants[0].weight: must be at least"),
        (entries('name = "a"\nweight = inf'), "tenants[0].weight: must be a finite number"),
        (entries('name = "a"\nweight = nan'), "tenants[0].weight: must be a finite number"),
        (entries('name = "a"\nwait = 1'), "tenants[0].wait: unknown setting"),
        (entries('name = "a"\nreserved_kv = 1.1'), "tenants[0].reserved_kv: must be at most 1"),
        (entries('name = "a"\nreserved_kv = -0.1'), "tenants[0].reserved_kv: must be at least 0"),
        (entries('name = "a"\nreserved_lanes = -1'), "tenants[0].reserved_lanes: must be at le"),
        (entries('name = "a"\nrequests_per_minute = -1'), "tenants[0].requests_per_minute: must"),
        (entries('name = "a"\ntokens_per_minute = -1'), "tenants[0].tokens_per_minute: must"),
        (entries('name = "a"\ntokens_per_day = -1'), "tenants[0].tokens_per_day: must"),
        (entries('name = "a"\nmax_concurrent_requests = -1'), "tenants[0].max_concurrent_requests"),
        (entries('name = "a"\nmax_queue_requests = -1'), "tenants[0].max_queue_requests: must"),
        (entries('name = "a"\nmax_queue_tokens = -1'), "tenants[0].max_queue_tokens: must"),
        (
            entries('name = "a"\nreserved_kv = 0.6', 'name = "b"\nreserved_kv = 0.5'),
            "tenants[1].reserved_kv: all tenants together reserve 1.1",
        ),
        (entries('name = ""'), "tenants[0].name: '' is no tenant's name"),
        (entries('name = "a b"'), "tenants[0].name: 'a b' is no tenant's name"),
        (entries('name = "a"', 'name = "a"'), "tenants[1].name: 'a' is used twice"),
        (entries('name = "*"', 'name = "*"'), "tenants[1].name: '*' is used twice"),
        (entries(f'name = "*"\nkeys = ["{DIGEST}"]'), "tenants[0].keys: '*' stands for many"),
        (entries('name = "*"\nreserved_lanes = 1'), "tenants[0].reserved_lanes: '*' stands"),
        (entries('name = "*"\nreserved_kv = 0.1'), "tenants[0].reserved_kv: '*' stands"),
        (
            entries(f'name = "anonymous"\nkeys = ["{DIGEST}"]'),
            "tenants[0].keys: 'anonymous' is whoever has no key",
        ),
        (
            entries(f'name = "a"\nkeys = ["{DIGEST}"]', f'name = "b"\nkeys = ["{DIGEST}"]'),
            "tenants[1].keys[0]: the same key belongs to 'a' already",
        ),
        (
            entries(f'name = "a"\nkeys = ["{DIGEST}", "{KEY}"]'),
            "tenants[0].keys[1]: must be a key's digest",
        ),
        (entries(f'name = "a"\nkeys = ["sha256:{KEY}"]'), "stoker keys new a"),
        (entries(f'name = "a"\nkeys = ["{DIGEST[:-1]}"]'), "tenants[0].keys[0]: must be a key's"),
        (entries(f'name = "a"\nkeys = "{KEY}"'), "tenants[0].keys: Expected a list, got str"),
        (
            '[server]\ntrusted_proxies = ["10.0.0.1", "proxy.example"]',
            "server.trusted_proxies[1]: not an address or a network",
        ),
        ('[server]\ntrusted_proxies = ["10.0.0.1/8"]', "has host bits set"),
        ("[server]\nreload_s = -1", "server.reload_s: must be at least 0"),
        ("[server]\nreload_s = nan", "server.reload_s: must be a finite number"),
        ("[server]\nreader_timeout_s = 0", "server.reader_timeout_s: must be at least 0.001"),
        ("[server]\nmax_unread_tokens = 0", "server.max_unread_tokens: must be at least 1"),
        ("[server]\nhistory = -1", "server.history: must be at least 0"),
        ("[scheduler]\ntarget_step_s = -1", "scheduler.target_step_s: must be at least 0"),
        ("[admission]\nmax_concurrent_requests = -1", "admission.max_concurrent_requests: must"),
        ("[[models]]\nweight = 0", "models[0].weight: must be at least"),
    ],
)
def test_mistakes_are_named_with_their_origin_and_no_key_is_shown(
    write: Write, toml: str, expected: str
) -> None:
    path = write(toml)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {}, {})
    assert expected in str(caught.value)
    assert f"(from {path})" in str(caught.value)
    assert KEY not in str(caught.value)


def test_tenants_stand_in_no_environment_variable(write: Write) -> None:
    with pytest.raises(ConfigError, match="no setting is read from this variable"):
        load_config(write(""), {"STOKER_TENANTS_WEIGHT": "1"}, {})
    environ = {"STOKER_SERVER_TRUSTED_PROXIES": "10.0.0.1, ::1"}
    config, _ = load_config(write(""), environ, {})
    assert config.server.trusted_proxies == ["10.0.0.1", "::1"]
