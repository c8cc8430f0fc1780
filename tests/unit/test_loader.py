"""Which backend loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

import stoker
from stoker.config import Config, ModelConfig
from stoker.discovery import Plugins, load_plugins
from stoker.loader import ModelLoader
from stoker.testing import ScriptedBackend


class Backend(ScriptedBackend):
    """Accepts what its constructor says."""

    def __init__(self, *suffixes: str) -> None:
        super().__init__()
        self.suffixes = suffixes

    def accepts(self, model: stoker.LocalModel) -> bool:
        return model.path.suffix in self.suffixes


class Installed:
    """Plugins of which only the backends are ours."""

    def __init__(self, **backends: tuple[int, ScriptedBackend]) -> None:
        self._backends = [
            stoker.BackendInfo(
                api_version=1, name=name, summary=name, factory=lambda made=made: made, order=order
            )
            for name, (order, made) in backends.items()
        ]
        self._others: Any = load_plugins()

    def active(self, kind: str, config: Config) -> Any:
        return self._backends if kind == "backend" else self._others.active(kind, config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._others, name)


def load(path: Path, **backends: tuple[int, ScriptedBackend]) -> str:
    plugins = cast(Plugins, Installed(**backends))
    loader = ModelLoader(Config(), plugins, {})
    try:
        return loader.load(ModelConfig(model=str(path))).backend
    finally:
        loader.close()


def test_the_lowest_order_that_accepts_a_model_loads_it(tmp_path: Path) -> None:
    file, folder = tmp_path / "m.gguf", tmp_path / "m"
    file.write_bytes(b"GGUF")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    all_rounder, specialist = (200, Backend(".gguf", "")), (100, Backend(".gguf"))
    assert load(file, all_rounder=all_rounder, specialist=specialist) == "specialist"
    assert load(folder, all_rounder=all_rounder, specialist=specialist) == "all_rounder"
    assert load(file, all_rounder=all_rounder) == "all_rounder"


def test_what_to_install_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    for name, package in {
        "m.gguf": "stoker-backend-gguf",
        "ggml-model.bin": "stoker-backend-ctransformers",
        "folder": "stoker-backend-torch",
    }.items():
        if name != "folder":
            (tmp_path / name).write_bytes(b"....")
        with pytest.raises(stoker.ModelError, match=rf"\(installed: none\).* install {package}$"):
            load(tmp_path / name)
