"""``stoker tune`` on the real default model: short, and judged by what it says, never by how fast it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.model, pytest.mark.slow]


def tune(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STOKER_")}
    environment["XDG_DATA_HOME"] = str(folder / "data")
    (folder / "stoker.toml").write_text("[[models]]\nlanes = 4\ncontext = 512\n")
    report = folder / "report.json"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "stoker", "tune", *arguments, "--json", str(report)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(report.read_text())


def test_a_short_tuning_of_kv_types_and_of_requantised_weights(tmp_path: Path) -> None:
    only = ("--only", "extra_buffers", "--only", "kv_type", "--only", "weights")
    quick = ("--budget", "0.2", "--run-seconds", "0.1", "--requantize", "q8_0")
    done, report = tune(tmp_path, *only, *quick)
    assert report["model"] == "SmolLM2-135M-Instruct"
    assert report["backend"] == "gguf"
    assert report["defaults"]["alone"]["tokens_per_s"] > 0
    assert report["rows"], done.stderr
    row, weights = report["rows"][0], report["rows"][-1]
    assert (row["setting"], row["value"]) == ("kv_type", "bf16")
    if row["quality"] is not None:  # on a busy machine the time may be up before
        assert 0 <= row["quality"]["kl_mean"] < 0.02
        assert row["quality"]["top1"] > 0.9
    # Other weights are looked at whatever the budget, and not kept unasked.
    assert (weights["setting"], weights["value"]) == ("weights", "q8_0")
    assert weights["quality"] is not None, weights["verdict"]
    assert 0 < weights["quality"]["kl_mean"] < 0.02
    assert 130e6 < report["weights"]["q8_0"] < 160e6
    assert "turning the full weights into another type would lose less" in done.stdout
    assert list((tmp_path / "data").rglob("*.gguf")) == []
    profiles = list((tmp_path / "data").rglob("*.json"))
    assert bool(profiles) == bool(report["profile"])
