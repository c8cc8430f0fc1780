"""Sliding-window memory, on a tiny Gemma 3 of random weights that the test writes itself."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

LAYERS, WIDTH, HEADS, HEAD, FEED, WINDOW = 6, 32, 2, 32, 64, 64
VOCAB = 256 + 4
TOKENS = np.random.default_rng(3).integers(10, VOCAB, 701).tolist()
EXACT = {"kv_type_k": "f32", "kv_type_v": "f32", "flash_attention": "off"}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, value: Any) -> bytes:
    """A metadata pair of the GGUF type that fits the Python value."""
    if isinstance(value, list):
        kind = {str: 8, int: 5, float: 6}[type(value[0])]
        items = b"".join(
            text(item) if kind == 8 else struct.pack("<i" if kind == 5 else "<f", item)
            for item in value
        )
        body = struct.pack("<IIQ", 9, kind, len(value)) + items
    elif isinstance(value, str):
        body = struct.pack("<I", 8) + text(value)
    else:
        kind, code = (6, "f") if isinstance(value, float) else (4, "I")
        body = struct.pack(f"<I{code}", kind, value)
    return text(key) + body


def write_model(path: Path) -> None:
    """A Gemma 3 in 32-bit floats, with one token for each byte."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (WIDTH,),
            "attn_q": (HEADS * HEAD, WIDTH),
            "attn_k": (HEAD, WIDTH),
            "attn_v": (HEAD, WIDTH),
            "attn_output": (WIDTH, HEADS * HEAD),
            "attn_q_norm": (HEAD,),
            "attn_k_norm": (HEAD,),
            "post_attention_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (FEED, WIDTH),
            "ffn_up": (FEED, WIDTH),
            "ffn_down": (WIDTH, FEED),
            "post_ffw_norm": (WIDTH,),
        }.items():
            shapes[f"blk.{layer}.{name}"] = shape
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    metadata = {
        "general.architecture": "gemma3",
        "general.name": "tiny",
        "gemma3.context_length": 1024,
        "gemma3.embedding_length": WIDTH,
        "gemma3.block_count": LAYERS,
        "gemma3.feed_forward_length": FEED,
        "gemma3.attention.head_count": HEADS,
        "gemma3.attention.head_count_kv": 1,
        "gemma3.attention.key_length": HEAD,
        "gemma3.attention.value_length": HEAD,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6,
        "gemma3.attention.sliding_window": WINDOW,
        "gemma3.rope.freq_base": 1e6,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": specials + [f"<0x{byte:02X}>" for byte in range(256)],
        "tokenizer.ggml.scores": [0.0] * VOCAB,
        "tokenizer.ggml.token_type": [3, 3, 3, 2] + [6] * 256,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata))
    head += b"".join(pair(key, value) for key, value in metadata.items())
    random, data = np.random.default_rng(0), b""
    for name, shape in shapes.items():
        head += text(f"{name}.weight") + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), 0, len(data))
        weights = random.normal(0.0 if len(shape) > 1 else 1.0, 0.3, shape).astype("<f4")
        data += weights.tobytes().ljust(-(-weights.nbytes // 32) * 32, b"\0")
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + data)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_model(path)
    return path


@pytest.fixture(params=[False, True], ids=["partitioned", "unified"])
def whole(request, load, tiny):
    """All of the context is kept, so that truncation is exact."""
    runtime = load(path=tiny, lanes=3, swa_full=True, kv_unified=request.param, **EXACT)
    yield runtime
    runtime.close()


def prefill(run, runtime, lane: int, count: int) -> None:
    for start in range(0, count, 50):
        run(runtime, (lane, TOKENS[start : min(start + 50, count)], start))


def after(run, runtime, lane: int, count: int) -> np.ndarray[Any, Any]:
    """Logits of one more token in a lane of ``count`` tokens."""
    logits: np.ndarray[Any, Any] = run(runtime, (lane, [TOKENS[count]], count))[0]
    return logits


def assert_same(got, want) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [299, 250, 100, 40])
def test_kept_whole_any_truncation_is_exact(whole, run, keep):
    assert (whole.info.capabilities.truncation, whole.info.capabilities.copy_prefix) == (
        "any",
        True,
    )
    prefill(run, whole, 1, keep)
    want = after(run, whole, 1, keep)
    prefill(run, whole, 0, 300)
    assert whole.truncate(0, keep) == keep
    assert_same(after(run, whole, 0, keep), want)


@pytest.mark.parametrize("keep", [300, 100])
def test_kept_whole_copies_can_be_truncated(whole, run, keep):
    prefill(run, whole, 0, 300)
    whole.copy_prefix(0, 2, keep)
    prefill(run, whole, 1, keep)
    want = after(run, whole, 1, keep)
    assert whole.truncate(2, 999) == keep
    assert_same(after(run, whole, 2, keep), want)
    assert whole.truncate(2, 40) == 40
    assert whole.truncate(1, 40) == 40
    assert_same(after(run, whole, 2, 40), after(run, whole, 1, 40))


def test_kept_whole_there_are_no_snapshots(whole):
    # llama.cpp writes only the window of such layers, which a later truncation could not undo.
    with pytest.raises(TypeError, match="snapshot"):
        whole.snapshot(0)
    with pytest.raises(TypeError, match="snapshot"):
        whole.restore(0, b"")


@pytest.mark.slow
def test_window_only_memory_truncates_exactly_or_starts_over(load, tiny, run):
    runtime = load(path=tiny, lanes=3, context=1024, swa_full=False, n_ubatch=50, **EXACT)
    can = runtime.info.capabilities
    assert (can.truncation, can.copy_prefix, can.snapshot) == ("reset", False, True)
    kept = {}
    for keep in (700, 699, 690, 300, 20, 0):
        runtime.truncate(0, 0)
        prefill(run, runtime, 0, 700)
        kept[keep] = runtime.truncate(0, keep)
        assert kept[keep] in {keep, 0}
        if kept[keep] < keep:
            prefill(run, runtime, 0, keep)
        runtime.truncate(1, 0)
        prefill(run, runtime, 1, keep)
        assert_same(after(run, runtime, 0, keep), after(run, runtime, 1, keep))
    assert kept == {700: 700, 699: 699, 690: 690, 300: 0, 20: 0, 0: 0}
    with pytest.raises(TypeError, match="copy_prefix"):
        runtime.copy_prefix(0, 1, 3)


def test_window_only_snapshots_work_and_know_what_they_lack(load, tiny, run):
    runtime = load(path=tiny, lanes=3, swa_full=False, **EXACT)
    prefill(run, runtime, 0, 299)
    snapshot = runtime.snapshot(0)
    want = after(run, runtime, 0, 299)
    assert runtime.restore(2, snapshot) == 299
    assert_same(after(run, runtime, 2, 299), want)
    assert runtime.truncate(2, 100) == 0


def test_idle_lanes_are_not_touched_where_their_memory_could_not_be_undone(load, tiny):
    runtime = load(path=tiny, lanes=3, swa_full=False, **EXACT)
    assert runtime._bridges(np.array([0, 2], np.int32)) == []
