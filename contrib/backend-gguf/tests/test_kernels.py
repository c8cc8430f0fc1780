"""Which cuts of a prompt give the same bits: what is promised, and that the real kernels keep it."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

import stoker
from stoker_backend_gguf import kernels
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.kernels import TILE_ROWS, TILES_FROM, Exactness, describe_exactness
from stoker_backend_gguf.native import NativeSettings

pytestmark = pytest.mark.model

TOKENS = np.random.default_rng(7).integers(100, 40_000, 400).tolist()
PLAIN = NativeSettings(
    lanes=2,
    cells=512,
    n_batch=512,
    n_ubatch=512,
    threads=2,
    batch_threads=2,
    kv_type_k="f16",
    kv_type_v="f16",
    flash_attention="auto",
    kv_unified=False,
    swa_full=True,
    use_mmap=True,
    use_mlock=False,
    gpu_layers=None,
    use_extra_buffers=True,
)
Q4_1, Q4_K, BF16 = 3, 12, 30
BLOCKS, WHOLE, ANY = (
    Exactness(TILE_ROWS, TILES_FROM),
    Exactness(TILE_ROWS, any_tail=False),
    Exactness(),
)


@pytest.mark.parametrize(
    ("types", "changes", "want"),
    [
        ({0, Q4_1}, {}, BLOCKS),
        ({0, Q4_1}, {"kv_type_k": "bf16", "kv_type_v": "bf16"}, ANY),
        ({0, Q4_1}, {"flash_attention": "off"}, ANY),
        ({0, Q4_1}, {"n_ubatch": 32}, ANY),
        ({0, Q4_1}, {"kv_unified": True}, ANY),
        ({0, Q4_1, Q4_K}, {}, WHOLE),
        ({0, Q4_K}, {"flash_attention": "off"}, WHOLE),
        ({0, Q4_K}, {"exact_kernels": True, "use_extra_buffers": False}, BLOCKS),
        ({0, BF16}, {"exact_kernels": True, "use_extra_buffers": False}, WHOLE),
    ],
)
def test_what_is_promised(types, changes, want, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(kernels.machine, "cpu_flags", lambda: frozenset({"avx2"}))
    native = msgspec.structs.replace(PLAIN, **changes)
    assert describe_exactness(types, native, on_gpu=False) == want
    assert describe_exactness(types, native, on_gpu=True) == ANY


def test_nothing_is_promised_of_short_pieces_on_cpus_nobody_looked_into(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(kernels.machine, "cpu_flags", lambda: frozenset({"amx_tile"}))
    assert describe_exactness({Q4_1}, PLAIN, on_gpu=False) == WHOLE
    native = msgspec.structs.replace(PLAIN, use_extra_buffers=False)
    assert describe_exactness({Q4_1}, native, on_gpu=False) == BLOCKS
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert describe_exactness({Q4_1}, native, on_gpu=False) == WHOLE


@pytest.fixture(scope="module")
def quantized_file(model_path, tmp_path_factory):
    """A model whose products have other bits with other numbers of rows."""
    target = tmp_path_factory.mktemp("quantized") / "model.gguf"
    model = stoker.LocalModel(path=model_path, model_id="model", reference=str(model_path))
    GgufBackend().requantize(model, "q4_k_m", target)
    return target


def test_with_such_weights_blocks_and_whole_tails_give_the_same_bits(load, quantized_file, run):
    quantized = load(path=quantized_file)
    capabilities = quantized.info.capabilities
    assert (capabilities.exact_block, capabilities.exact_tail) == (64, "whole")

    def prefill(cuts, company=()):
        for lane in range(quantized.info.num_lanes):
            quantized.truncate(lane, 0)
        for start, end in zip([0, *cuts], [*cuts, 205], strict=True):
            logits = run(quantized, (0, TOKENS[start:end], start), *company)[0]
            for lane, _, _ in company:
                quantized.truncate(lane, 0)
        return logits

    want = prefill([192])
    twins = [(1, TOKENS[50:63], 0), (2, TOKENS[70:83], 0)]  # as long as the tail
    for cuts in ([64, 128, 192], [128, 192]):
        np.testing.assert_array_equal(prefill(cuts), want)
        np.testing.assert_array_equal(prefill(cuts, twins), want)
    assert not np.array_equal(prefill([192, 198]), want), "there was nothing to keep apart"


CODE = """
import sys
from pathlib import Path
import numpy as np
import stoker
from stoker_backend_gguf.backend import GgufBackend
from stoker_backend_gguf.options import GgufOptions

path = Path(sys.argv[1])
options = GgufOptions(self_test=False, exact_kernels=True)
model = stoker.LocalModel(path=path, model_id="model", reference=str(path))
backend = GgufBackend()
runtime = backend.load(model, stoker.LoadSettings(lanes=2, context_length=256, options=options))
tokens = np.random.default_rng(7).integers(100, 40_000, 60).astype(np.int32)

def prefill(*cuts):
    runtime.truncate(0, 0)
    for start, end in zip([0, *cuts], [*cuts, 60]):
        rows = np.arange(start, end, dtype=np.int32)
        wants = rows == end - 1
        lanes = np.zeros(len(rows), np.int32)
        logits = runtime.step(stoker.StepInput(tokens[rows], rows, lanes, wants)).logits.copy()
    return logits

for cuts in ([30], [7], [59], [52, 53], [9, 18, 27]):
    assert np.array_equal(prefill(*cuts), prefill()), cuts
print(runtime.info.settings["kernels"], runtime.info.settings["extra_buffers"])
fast = stoker.LoadSettings(lanes=1, context_length=256, options=GgufOptions(self_test=False))
print(backend.load(model, fast).info.warnings)
"""


def test_exact_kernels_give_the_same_bits_whatever_the_cut(quantized_file):
    environ = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(quantized_file)],
        capture_output=True,
        text=True,
        env=environ,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first == "exact off"
    assert "exact_kernels holds for a whole process" in second
