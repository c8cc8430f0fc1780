"""Settings: precedence, origins, messages, ranges, secrets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.config import DEFAULT_MODEL, Config
from stoker.errors import ConfigError
from stoker.masking import printable
from stoker.settings import OTHER_VARIABLES, load_config

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a configuration file; returns its path."""

    def put(text: str) -> str:
        path = tmp_path / "stoker.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return put


def test_defaults_serve_the_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, origins = load_config(None, {}, {})
    assert config.server.port == 8000
    assert [model.model for model in config.models] == [DEFAULT_MODEL]
    assert set(origins.values()) == {"default"}
    assert "models[0].model" in origins


def test_the_later_source_wins_and_is_named(write: Write) -> None:
    path = write('[server]\nport = 1\nhost = "file"\n[scheduler]\npolicy = "a"\n')
    environ = {"STOKER_SERVER_PORT": "2", "STOKER_SCHEDULER_POLICY": "b"}
    config, origins = load_config(path, environ, {"server.port": 3, "server.strict": None})
    assert (config.server.port, config.scheduler.policy, config.server.host) == (3, "b", "file")
    assert origins["server.port"] == "flag --port"
    assert origins["scheduler.policy"] == "environment STOKER_SCHEDULER_POLICY"
    assert origins["server.host"] == path
    assert origins["server.strict"] == "default"


@pytest.mark.slow
@given(
    file=st.none() | st.integers(0, 65535),
    environment=st.none() | st.integers(0, 65535),
    flag=st.none() | st.integers(0, 65535),
)
def test_precedence(
    tmp_path_factory: pytest.TempPathFactory,
    file: int | None,
    environment: int | None,
    flag: int | None,
) -> None:
    path = tmp_path_factory.mktemp("settings") / "stoker.toml"
    path.write_text("" if file is None else f"[server]\nport = {file}\n")
    environ = {} if environment is None else {"STOKER_SERVER_PORT": str(environment)}
    config, _ = load_config(str(path), environ, {"server.port": flag})
    given_values = [value for value in (flag, environment, file) if value is not None]
    assert config.server.port == (given_values[0] if given_values else 8000)


def test_the_file_in_the_current_folder_is_read(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("[server]\nport = 9\n")
    monkeypatch.chdir(tmp_path)
    config, origins = load_config(None, {}, {})
    assert config.server.port == 9
    assert origins["server.port"] == "stoker.toml"


def test_stoker_config_names_the_file(write: Write) -> None:
    config, _ = load_config(None, {"STOKER_CONFIG": write("[server]\nport = 9\n")}, {})
    assert config.server.port == 9


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[server]\nprot = 1", "server.prot: unknown setting (from {}). Did you mean 'port'?"),
        ("[sever]\nport = 1", "sever: unknown setting (from {}). Did you mean 'server'?"),
        (
            "[[models]]\n[[models]]\nlanez = 1",
            "models[1].lanez: unknown setting (from {}). Did you mean 'lanes'?",
        ),
        ('[server]\nport = "x"', "server.port: Expected int, got str (from {})"),
        ("[server]\nport = true", "server.port: Expected int, got bool (from {})"),
        ("server = 3", "server: Expected a table, got int (from {})"),
        ("[server]\ncors_origins = [1]", "server.cors_origins[0]: Expected str, got int (from {})"),
        (
            '[logging]\nlevel = "inf"',
            (
                "logging.level: 'inf' is not one of debug, info, warning, error (from {})."
                " Did you mean 'info'?"
            ),
        ),
        ("[server]\nport = 65536", "server.port: must be at most 65535, got 65536 (from {})"),
        (
            "[server]\ndrain_timeout_s = -1",
            "server.drain_timeout_s: must be at least 0, got -1.0 (from {})",
        ),
        (
            "[admission]\nqueue_timeout_s = inf",
            "admission.queue_timeout_s: must be a finite number, got inf (from {})",
        ),
        ("[[models]]\nlanes = 0", "models[0].lanes: must be at least 1, got 0 (from {})"),
        ('[server]\nhost = ""', "server.host: must not be empty (from {})"),
        ('[server]\napi_keys = [""]', "server.api_keys: a key must not be empty"),
        (
            '[[models]]\nid = "a"\n[[models]]\nid = "a"',
            "models[1].id: 'a' is used twice",
        ),
    ],
)
def test_mistakes_in_the_file_are_named(write: Write, toml: str, expected: str) -> None:
    path = write(toml)
    with pytest.raises(ConfigError) as caught:
        load_config(path, {}, {})
    assert str(caught.value) == expected.format(path)


def test_unusable_files(tmp_path: Path, write: Write) -> None:
    with pytest.raises(ConfigError, match=r"no such configuration file"):
        load_config(str(tmp_path / "none.toml"), {}, {})
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 1"):
        load_config(write("x = = 1"), {}, {})
    (tmp_path / "latin.toml").write_bytes(b'x = "\xff"')
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_config(str(tmp_path / "latin.toml"), {}, {})
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_config(str(tmp_path), {}, {})


def test_environment_decodes_every_type(write: Write) -> None:
    environ = {
        "STOKER_SERVER_API_KEYS": "one, two,",
        "STOKER_SERVER_STRICT": "true",
        "STOKER_SERVER_DRAIN_TIMEOUT_S": "1.5",
        "STOKER_PERFORMANCE_THREADS": "3",
        "STOKER_LOGGING_FORMAT": "json",
    }
    config, _ = load_config(write(""), environ, {})
    assert config.server.api_keys == ["one", "two"]
    assert config.server.strict is True
    assert config.server.drain_timeout_s == 1.5
    assert config.performance.threads == 3
    assert config.logging.format == "json"


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("STOKER_SERVER_PROT", "1", "Did you mean 'STOKER_SERVER_PORT'?"),
        ("STOKER_SERVER_PORT", "x", r"server.port: .* \(from environment STOKER_SERVER_PORT\)"),
        ("STOKER_SERVER_PORT", "99999", r"at most 65535.*environment STOKER_SERVER_PORT"),
        ("STOKER_PLUGINS_GGUF_THREADS", "1", "STOKER_PLUGINS__<NAME>__<KEY>"),
        ("STOKER_PLUGINS__GGUF", "1", "STOKER_PLUGINS__<NAME>__<KEY>"),
    ],
)
def test_mistakes_in_the_environment_are_named(
    write: Write, variable: str, value: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(write(""), {variable: value}, {})


def test_variables_that_are_no_settings_are_let_through(write: Write) -> None:
    path = write("")
    config, _ = load_config(path, dict.fromkeys(OTHER_VARIABLES, ""), {})
    assert config == load_config(path, {}, {})[0]


def test_plugin_options_from_the_environment(write: Write) -> None:
    path = write('[plugins.fair-share]\nweight = 1\nname = "kept"\n')
    environ = {
        "STOKER_PLUGINS__FAIR_SHARE__WEIGHT": "2",
        "STOKER_PLUGINS__FAIR_SHARE__TENANT_NAMES": '["a"]',
        "STOKER_PLUGINS__OTHER__NAME": "plain text",
    }
    config, origins = load_config(path, environ, {})
    assert config.plugins == {
        "fair-share": {"weight": 2, "name": "kept", "tenant_names": ["a"]},
        "other": {"name": "plain text"},
    }
    assert origins["plugins.fair-share.name"] == path
    assert origins["plugins.fair-share.weight"] == (
        "environment STOKER_PLUGINS__FAIR_SHARE__WEIGHT"
    )


TWO_MODELS = """
[[models]]
id = "small"
model = "a.gguf"
lanes = 4
[[models]]
id = "large"
model = "b.gguf"
context = 100
"""


@pytest.mark.parametrize("name", ["large", "b.gguf"])
def test_the_model_argument_picks_a_configured_model(write: Write, name: str) -> None:
    path = write(TWO_MODELS)
    config, origins = load_config(path, {}, {"models.model": name, "models.lanes": 2})
    (model,) = config.models
    assert (model.id, model.model, model.context, model.lanes) == ("large", "b.gguf", 100, 2)
    assert origins["models[0].context"] == path
    assert origins["models[0].lanes"] == "flag --lanes"
    assert origins["models[0].backend"] == "default"


def test_the_model_argument_replaces_the_configured_models(write: Write) -> None:
    config, origins = load_config(write(TWO_MODELS), {"STOKER_MODEL": "c.gguf"}, {})
    (model,) = config.models
    assert (model.id, model.model, model.lanes) == (None, "c.gguf", None)
    assert origins["models[0].model"] == "environment STOKER_MODEL"
    assert origins["models[0].lanes"] == "default"
    config, _ = load_config(write(TWO_MODELS), {"STOKER_MODEL": "c"}, {"models.model": "d"})
    assert [model.model for model in config.models] == ["d"]


def test_model_flags_apply_to_every_model(write: Write) -> None:
    config, origins = load_config(write(TWO_MODELS), {"STOKER_MODEL_CONTEXT": "50"}, {})
    assert [model.context for model in config.models] == [50, 50]
    assert origins["models[1].context"] == "environment STOKER_MODEL_CONTEXT"


def test_secrets_are_masked(write: Write) -> None:
    path = write(
        """
        [server]
        api_keys = ["s3cret-1", "s3cret-2"]
        [[models]]
        options = {hub_token = "s3cret-3", threads = 2}
        [plugins.quota]
        max_tokens = 5
        api-key = "s3cret-4"
        [plugins.quota.tenants]
        passwords = ["s3cret-5"]
        url = "redis://user:s3cret-6@host/0"
        tokens = {a = "s3cret-7"}
        """
    )
    config, _ = load_config(path, {}, {})
    shown = json.dumps(printable(config))
    assert "s3cret" not in shown
    data = printable(config)
    assert len(data["server"]["api_keys"]) == 2
    assert data["plugins"]["quota"]["max_tokens"] == 5
    assert data["models"][0]["options"]["threads"] == 2
    assert data["plugins"]["quota"]["tenants"]["url"].endswith("@host/0")
    assert config.server.api_keys == ["s3cret-1", "s3cret-2"]


def test_every_setting_has_an_origin(write: Write) -> None:
    config, origins = load_config(write("[plugins.x]\ny = 1\n"), {}, {})
    assert isinstance(config, Config)
    for section in ("server", "scheduler", "admission", "cache", "performance", "logging"):
        assert any(dotted.startswith(f"{section}.") for dotted in origins)
    assert origins["plugins.x.y"].endswith("stoker.toml")


def test_speculation_is_checked(write: Write) -> None:
    config, _ = load_config(write("[speculation]\nmin_ngram = 3\nmax_ngram = 5\n"), {}, {})
    assert (config.speculation.method, config.speculation.min_ngram) == ("ngram", 3)
    with pytest.raises(ConfigError, match=r"speculation.min_ngram: 5 is more than max_ngram"):
        load_config(write("[speculation]\nmin_ngram = 5\n"), {}, {})
    with pytest.raises(ConfigError, match=r"speculation.max_draft_tokens: must be at most 64"):
        load_config(write("[speculation]\nmax_draft_tokens = 65\n"), {}, {})
    environ = {"STOKER_MODEL_DRAFT_MODEL": "small.gguf"}
    assert load_config(write(""), environ, {})[0].models[0].draft_model == "small.gguf"
