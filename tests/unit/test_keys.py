"""Keys of tenants: the file, and the ring that knows whose key it is."""

from __future__ import annotations

import datetime
import ipaddress
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker import keys as keys_module
from stoker.api.auth import KeyRing
from stoker.config import Config, ServerConfig, TenantConfig
from stoker.errors import (
    AuthenticationError,
    ConfigError,
    InvalidRequestError,
    PermissionDeniedError,
)
from stoker.keys import TenantKey, add_key, digest_of, read_keys, revoke_key

TODAY = datetime.date(2024, 2, 29)
SECRET = "sk-stoker-nobody-may-see-this"
ONE, TWO = "a" * 64, "a" * 8 + "b" * 56  # digests with the same id


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


# --------------------------------------------------------------------------- the file


def test_a_key_is_made_kept_as_digest_and_revoked(file: Path) -> None:
    key, entry = add_key(file, "team-a", "laptop", TODAY)
    other, _ = add_key(file, "b", "", TODAY)
    assert key.startswith("sk-stoker-")
    assert len(key) >= len("sk-stoker-") + 43  # 32 bytes
    assert key != other
    assert entry == TenantKey(tenant="team-a", digest=digest_of(key), label="laptop", created=TODAY)
    assert key not in file.read_text()
    assert [found.tenant for found in read_keys(file)] == ["team-a", "b"]
    assert read_keys(file)[0] == entry
    assert revoke_key(file, entry.id) == entry
    assert [found.tenant for found in read_keys(file)] == ["b"]


def test_only_its_owner_may_read_it_and_nothing_is_left_beside(file: Path) -> None:
    add_key(file, "a", "", TODAY)
    file.chmod(0o644)
    _, entry = add_key(file, "a", "", TODAY)
    assert file.stat().st_mode & 0o777 == 0o600
    revoke_key(file, entry.id)
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.slow
@given(label=st.text(max_size=100).filter(str.isprintable))
def test_any_printable_label_survives(tmp_path_factory: pytest.TempPathFactory, label: str) -> None:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    _, entry = add_key(file, "a", label, TODAY)
    assert read_keys(file) == [entry]


def test_entries_by_hand_survive(file: Path) -> None:
    file.write_text(
        f'# by hand\n[[keys]]\ntenant = "a"\ndigest = "sha256:{ONE}"\n'
        f'[[keys]]\ncreated = "2024-02-29"\nlabel = "q\\"uote"\ntenant = "b"\ndigest = "sha256:{TWO}"\n'
    )
    by_hand = read_keys(file)
    assert by_hand[1] == TenantKey(
        tenant="b", digest=f"sha256:{TWO}", label='q"uote', created=TODAY
    )
    _, entry = add_key(file, "c", "", TODAY)
    assert read_keys(file) == [*by_hand, entry]


def test_a_link_stays_a_link(tmp_path: Path, file: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(file)
    add_key(link, "a", "", TODAY)
    assert link.is_symlink()
    assert len(read_keys(file)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("keys = 3", "keys: Expected a list, got int"),
        ("[[key]]", "key: unknown setting"),
        (f'[[keys]]\ntenant = "a"\ndigest = "{SECRET}"', r"keys\[0\].digest: must be 'sha256:'"),
        (f'[[keys]]\ntenant = "a"\nkey = "{SECRET}"', r"keys\[0\].key: unknown setting"),
        (f'[[keys]]\ntenant = "*"\ndigest = "sha256:{ONE}"', r"keys\[0\].tenant: a tenant's name"),
        (f'[[keys]]\ntenant = "anonymous"\ndigest = "sha256:{ONE}"', r"keys\[0\].tenant: 'anony"),
        ('[[keys]]\ntenant = "a"', r"keys\[0\]: missing required field digest"),
        (
            "".join(f'[[keys]]\ntenant = "{t}"\ndigest = "sha256:{ONE}"\n' for t in "ab"),
            r"keys\[1\].digest: the same key belongs to 'a' already",
        ),
        (
            f'[[keys]]\ntenant = "a"\nlabel = "two\\nlines"\ndigest = "sha256:{ONE}"',
            r"keys\[0\].label: must be at most 100 printable",
        ),
        ("[[keys]", "not valid TOML"),
    ],
)
def test_mistakes_are_named_and_change_nothing(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    actions: list[Callable[[], object]] = [
        lambda: read_keys(file),
        lambda: add_key(file, "a", "", TODAY),
        lambda: revoke_key(file, "aaaaaaaa"),
    ]
    for action in actions:
        with pytest.raises(ConfigError, match=expected) as caught:
            action()
        assert str(file) in str(caught.value)
        assert SECRET not in str(caught.value)
    assert file.read_text() == text
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("tenant", ["", "*", "a b", "anonymous", "x" * 65])
def test_who_cannot_have_a_key(file: Path, tenant: str) -> None:
    with pytest.raises(ConfigError, match="cannot have a key"):
        add_key(file, tenant, "", TODAY)
    assert not file.exists()


def test_ids_that_mean_none_or_several(file: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        revoke_key(file, "aaaaaaaa")
    assert list(file.parent.iterdir()) == []
    file.write_text(
        f'[[keys]]\ntenant = "a"\ndigest = "sha256:{ONE}"\n'
        f'[[keys]]\ntenant = "b"\ndigest = "sha256:{TWO}"\n'
    )
    for unknown in ("", "a", "aaaaaaa", "bbbbbbbb", "sha256:"):
        with pytest.raises(ConfigError, match="no key with the id"):
            revoke_key(file, unknown)
    with pytest.raises(ConfigError, match=f"2 keys have the id 'aaaaaaaa'.*{TWO}"):
        revoke_key(file, "aaaaaaaa")
    assert len(read_keys(file)) == 2
    assert revoke_key(file, "AAAAAAAAB").tenant == "b"
    assert revoke_key(file, f"sha256:{ONE}").tenant == "a"
    assert read_keys(file) == []


def test_writers_at_the_same_time_lose_nothing(file: Path) -> None:
    start = threading.Barrier(8)
    failures: list[ConfigError] = []

    def work(tenant: str) -> None:
        start.wait()
        try:
            for _ in range(5):
                add_key(file, tenant, "", TODAY)
        except ConfigError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    tenants = [entry.tenant for entry in read_keys(file)]
    assert sorted(tenants) == sorted(f"t{n}" for n in range(8) for _ in range(5))


def test_a_lock_that_somebody_left_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_LOCK_TIMEOUT_S", 0.0)
    lock = file.with_name(file.name + ".lock")
    lock.touch()
    with pytest.raises(ConfigError, match=r"keys\.toml\.lock exists.*delete it"):
        add_key(file, "a", "", TODAY)
    assert lock.exists()
    lock.unlink()
    add_key(file, "a", "", TODAY)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        add_key(tmp_path / "none" / "keys.toml", "a", "", TODAY)


# --------------------------------------------------------------------------- the ring


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode())]


def named(*names: str) -> list[tuple[bytes, bytes]]:
    return [(b"x-stoker-tenant", name.encode("latin-1")) for name in names]


def test_every_key_is_its_tenants(file: Path, tmp_path: Path) -> None:
    from_file, _ = add_key(file, "c", "", TODAY)
    plain = tmp_path / "plain"
    plain.write_text("of-default-too\n")
    ring = KeyRing.load(
        Config(
            server=ServerConfig(
                api_keys=["of-default"], api_keys_file=str(plain), tenant_keys_file=str(file)
            ),
            tenants=[TenantConfig(name="b", keys=[digest_of("of-b"), digest_of("of-b-too")])],
        )
    )
    assert len(ring) == 5
    owners = {
        "of-default": "default",
        "of-default-too": "default",
        "of-b": "b",
        "of-b-too": "b",
        from_file: "c",
    }
    for key, tenant in owners.items():
        assert ring.identify("/v1/models", bearer(key), "10.0.0.1") == tenant
        assert ring.identify("/v1/models", [(b"x-api-key", key.encode())], None) == tenant
        with pytest.raises(AuthenticationError, match="wrong"):
            ring.identify("/v1/models", bearer(key + "x"), None)
        with pytest.raises(AuthenticationError, match="wrong"):
            ring.identify("/v1/models", bearer(digest_of(key)), None)
    with pytest.raises(AuthenticationError, match="required"):
        ring.identify("/v1/models", [], "10.0.0.1")
    assert ring.identify("/health", [], "10.0.0.1") == "anonymous"


def test_without_keys_all_are_anonymous() -> None:
    ring = KeyRing.load(Config())
    assert not ring.is_required
    assert ring.identify("/v1/models", [], None) == "anonymous"
    assert ring.identify("/v1/models", bearer("any"), None) == "anonymous"


def test_when_the_last_key_is_gone_nobody_gets_in(file: Path) -> None:
    file.write_text("")
    rings = [
        KeyRing.load(Config(), was_required=True),
        KeyRing.load(Config(server=ServerConfig(tenant_keys_file=str(file)))),
    ]
    for ring in rings:
        assert ring.is_required
        assert len(ring) == 0
        for headers in ([], bearer("any"), bearer("")):
            with pytest.raises(AuthenticationError):
                ring.identify("/v1/models", headers, None)
        assert ring.identify("/ready", [], None) == "anonymous"


def test_a_key_of_two_tenants_is_refused_wherever_it_stands(file: Path) -> None:
    key, entry = add_key(file, "a", "", TODAY)
    server = ServerConfig(tenant_keys_file=str(file))
    tenants = [TenantConfig(name="b", keys=[entry.digest])]
    with pytest.raises(ConfigError, match=r"tenant_keys_file.*'a' is also a key of 'b'"):
        KeyRing.load(Config(server=server, tenants=tenants))
    with pytest.raises(ConfigError, match=r"tenants\[0\].keys.*'b' is also.*'default'") as caught:
        KeyRing.load(Config(server=ServerConfig(api_keys=[key]), tenants=tenants))
    assert key not in str(caught.value)
    same = [TenantConfig(name="a", keys=[entry.digest])]
    assert len(KeyRing.load(Config(server=server, tenants=same))) == 1


def test_a_missing_file_stops_the_start(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"tenant_keys_file.*no such file.*stoker keys new"):
        KeyRing.load(Config(server=ServerConfig(tenant_keys_file=str(file))))


PROXIES = [ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::1")]


@pytest.mark.parametrize("host", ["10.1.2.3", "::ffff:10.1.2.3", "fd00::1", "fd00:0::1"])
def test_a_trusted_proxy_names_the_tenant(host: str) -> None:
    ring = KeyRing(proxies=PROXIES)
    assert ring.identify("/v1/models", named("team-a"), host) == "team-a"
    assert ring.identify("/v1/models", [], host) == "anonymous"
    for names in (
        [
            "",
        ],
        ["a b"],
        ["*"],
        ["x" * 65],
        ["ü"],
        ["a", "b"],
        ["a", "a"],
    ):
        with pytest.raises(InvalidRequestError, match="x-stoker-tenant") as caught:
            ring.identify("/v1/models", named(*names), host)
        assert caught.value.param == "x-stoker-tenant"


@pytest.mark.parametrize("host", ["10.2.0.1", "::1", "fd00::2", "localhost", "", None])
def test_nobody_else_does(host: str | None) -> None:
    for ring in (KeyRing(), KeyRing(proxies=PROXIES)):
        with pytest.raises(PermissionDeniedError, match="trusted_proxies"):
            ring.identify("/v1/models", named("team-a"), host)


def test_a_proxy_needs_a_key_if_there_are_any() -> None:
    ring = KeyRing({digest_of("of-a"): "a"}, PROXIES)
    with pytest.raises(AuthenticationError):
        ring.identify("/v1/models", named("b"), "10.1.0.1")
    with pytest.raises(AuthenticationError):
        ring.identify("/v1/models", [*named("b"), *bearer("wrong")], "10.1.0.1")
    assert ring.identify("/v1/models", [*named("b"), *bearer("of-a")], "10.1.0.1") == "b"
    assert ring.identify("/v1/models", bearer("of-a"), "10.1.0.1") == "a"
    with pytest.raises(PermissionDeniedError):
        ring.identify("/v1/models", [*named("b"), *bearer("of-a")], "10.2.0.1")
