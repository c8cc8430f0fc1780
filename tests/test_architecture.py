"""What must stay true of the tree as a whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import stoker
from stoker import config

ROOT = Path(__file__).parents[1]
PUBLIC = {
    *(
        "API_VERSION",
        "AuthenticationError",
        "Backend",
        "BackendInfo",
        "Capabilities",
        "CommandInfo",
    ),
    *("ConfigError", "ContextLengthError", "DeadlineError", "Delta", "EngineError", "FinishReason"),
    "DeltaStream",
    "EmbeddingInfo",
    *("InvalidRequestError", "LoadSettings", "LoadSnapshot", "LocalModel", "Middleware"),
    *("MiddlewareInfo", "ModelError", "ModelNotFoundError", "ModelSource", "ModelSourceInfo"),
    *("Observer", "ObserverInfo", "OutOfMemoryError", "PluginConflictError"),
    *("PluginContractError", "PluginError", "PluginLoadError", "PolicyContext", "PolicyInfo"),
    *("RateLimitError", "Request", "RequestError", "RequestRecord", "RequestTooLargeError"),
    *("RouteInfo", "Runtime", "RuntimeInfo", "SamplingParams", "SchedulingPolicy", "SequenceView"),
    *("ServedModel", "ServerContext", "StepInput", "StepOutput", "StepRecord", "StokerError"),
    *("CacheEntry", "CacheStats", "Eviction", "EvictionInfo", "EvictionStrategy", "SnapshotStore"),
    *("CacheReport", "StoreStats", "StoredPrefix", "TierUsage"),
    *("EngineSnapshot", "MAX_DEFERRED", "MAX_PASSED", "MAX_VIEWS", "PermissionDeniedError"),
    *("Preemption", "RequestCancelledError", "RequestNotFoundError", "ScheduledTokens"),
    *("SequenceTrace", "SlowReaderError", "StepCost", "TenantConfig", "TenantLoad", "TenantShare"),
    *("Tokenizer", "UnavailableError", "Usage", "__version__", "hookimpl"),
    *("Requantization", "Tunable", "TunableValue"),
    *("CallPiece", "Grammar", "GrammarCompiler", "GrammarInfo", "GrammarSpec", "Matcher"),
    *("OutputParser", "Piece", "ReasoningPiece", "TextPiece", "TokenLogprob"),
    *("Tool", "ToolChoice", "ToolFormat", "ToolFormatInfo"),
    *("DeviceStepOutput", "Finding", "HttpAnswer", "SampleInput", "TokenEdits"),
}


def loaded_after(code: str) -> set[str]:
    """Top-level and stoker modules that are loaded after ``code`` ran in a fresh interpreter."""
    program = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_public_names_are_pinned_and_resolve() -> None:
    assert set(stoker.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(stoker, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        stoker.nonsense  # noqa: B018


def test_importing_stoker_loads_next_to_nothing() -> None:
    loaded = loaded_after("import stoker")
    assert not loaded & {"numpy", "litestar", "msgspec", "pluggy", "jinja2", "stoker.engine"}


def test_the_testing_kit_loads_when_it_is_used() -> None:
    loaded = loaded_after("import stoker.testing; stoker.testing.BackendUnderTest")
    assert "stoker.testing.conformance.subjects" in loaded
    assert not loaded & {"pytest", "hypothesis", "numpy", "litestar"}


CONTRIB = sorted(path.name for path in ROOT.glob("contrib/*/src/stoker_*") if path.is_dir())


@pytest.mark.parametrize(
    "module",
    [
        "stoker_plugins",
        "stoker.machine",
        *(pytest.param(name, marks=pytest.mark.contrib) for name in CONTRIB),
    ],
)
def test_entry_modules_are_light(module: str) -> None:
    loaded = loaded_after(f"import {module}")
    heavy = {
        "numpy",
        "litestar",
        "llama_cpp",
        "torch",
        "transformers",
        "ctransformers",
        "jinja2",
        "huggingface_hub",
        "prometheus_client",
        "httpx",
        "psutil",
    }
    assert not loaded & heavy


@pytest.mark.slow
def test_the_core_imports_without_any_plugin_or_heavy_library() -> None:
    absent = ("torch", "llama_cpp", "stoker_plugins", "stoker_backend_gguf")
    block = f"import sys\nfor m in {absent}: sys.modules[m] = None\n"
    loaded = loaded_after(block + "import stoker.server, stoker.cli, stoker.testing.harness")
    assert "stoker.engine.loop" in loaded


def test_every_configuration_field_is_documented() -> None:
    for name in config.__all__:
        struct = getattr(config, name)
        for field in struct.__struct_fields__:
            assert re.search(rf"^\s+{field}: ", struct.__doc__ or "", re.MULTILINE), (
                f"{name}.{field}"
            )


def test_no_module_is_too_long_to_hold_in_the_head() -> None:
    for source in (ROOT / "core").rglob("*.py"):
        length = len(source.read_text().splitlines())
        assert length <= 470, f"{source.relative_to(ROOT)} has {length} lines: cut it along a seam"


def test_every_distribution_is_typed_and_licensed() -> None:
    for package in (
        *ROOT.glob("core/stoker"),
        *ROOT.glob("plugins/*"),
        *ROOT.glob("contrib/*/src/*"),
    ):
        if package.is_dir() and not package.name.endswith(".egg-info"):
            assert (package / "py.typed").exists(), package
    for project in (ROOT, *ROOT.glob("contrib/*")):
        assert "Apache License" in (project / "LICENSE").read_text()
        assert 'license = "Apache-2.0"' in (project / "pyproject.toml").read_text()
