"""The runtime on the real default model: numbers, lanes, memory."""

from __future__ import annotations

import numpy as np
import pytest

import stoker

pytestmark = pytest.mark.model

TEXTS = [
    "The three primary colors are",
    "Once upon a time, a small dog",
    "def fibonacci(n):",
    "Water boils at a temperature of",
    "The opposite of hot is",
]


@pytest.fixture(scope="session")
def prompts(partitioned):
    return [
        partitioned.tokenizer.encode(text, add_special=True, parse_special=False) for text in TEXTS
    ]


def test_logits_are_llama_cpps_row_by_row(runtime, build_step, prompts):
    # Lanes out of order and with gaps: llama.cpp splits and reorders such a batch. (Runs of uneven length
    # are passes of their own: test_passes.py.)
    length = min(map(len, prompts[:3]))
    rows = [(lane, prompt[:length], 0) for lane, prompt in zip((5, 0, 3), prompts, strict=False)]
    step = build_step(*rows, every=True)
    step.wants_logits[[1, 4, length + 1]] = False
    logits = runtime.step(step).logits
    assert logits.shape == (int(step.wants_logits.sum()), runtime.info.vocab_size)
    assert logits.dtype == np.float32
    assert not logits.flags.writeable
    # Rows of the batch as llama.cpp got it: by lane if partitioned, as given if unified.
    order = np.arange(len(step.lanes))
    if runtime.info.settings["kv"] == "partitioned":
        lanes = np.concatenate([step.lanes, [1, 2, 4]])  # with the lanes between
        order = np.argsort(lanes, kind="stable")
    row_in_batch = {int(row): at for at, row in enumerate(order)}
    for row, got in zip(np.flatnonzero(step.wants_logits), logits, strict=True):
        pointer = runtime._lib.llama_get_logits_ith(
            runtime._context.pointer, row_in_batch[int(row)]
        )
        want = np.ctypeslib.as_array(pointer, (runtime.info.vocab_size,))
        np.testing.assert_array_equal(got, want)


def test_greedy_text_is_that_of_the_bindings_own_completion(load, model_path, greedy, prompts):
    import llama_cpp

    runtime = load(lanes=1)
    llama = llama_cpp.Llama(
        str(model_path), n_ctx=512, n_threads=2, flash_attn=True, verbose=False, logits_all=False
    )
    try:
        for text, prompt in zip(TEXTS, prompts, strict=True):
            answer = llama.create_completion(prompt, max_tokens=12, temperature=0.0)
            tokens = greedy(runtime, prompt, 12)
            ended = tokens[-1] in runtime.info.end_token_ids
            assert (
                runtime.tokenizer.decode(tokens[: len(tokens) - ended])
                == (answer["choices"][0]["text"])
            ), text
    finally:
        llama.close()


def test_prefill_chunks_and_decodes_mix(runtime, run, greedy, prompts):
    alone = [greedy(runtime, prompt, 2, lane=6) for prompt in prompts[:4]]
    for lane in range(8):
        runtime.truncate(lane, 0)
    # Lane 4 and 1 decode while lane 7 prefills in chunks and lane 2 whole.
    tokens: dict[int, list[int]] = {}
    first = run(runtime, (4, prompts[0], 0), (1, prompts[1], 0))
    tokens[4], tokens[1] = ([int(row.argmax())] for row in first)
    cut = 3
    at = {4: len(prompts[0]), 1: len(prompts[1])}
    second = run(
        runtime,
        (4, tokens[4], at[4]),
        (7, prompts[2][:cut], 0),
        (1, tokens[1], at[1]),
        (2, prompts[3], 0),
    )
    tokens[4].append(int(second[0].argmax()))
    tokens[1].append(int(second[2].argmax()))
    tokens[2] = [int(second[3].argmax())]
    third = run(runtime, (7, prompts[2][cut:], cut), (2, tokens[2], len(prompts[3])))
    tokens[7] = [int(third[0].argmax())]
    tokens[2].append(int(third[1].argmax()))
    assert tokens[4] == alone[0][:2]
    assert tokens[1] == alone[1][:2]
    assert tokens[7] == alone[2][:1]
    assert tokens[2] == alone[3][:2]


def test_a_chunked_prefill_agrees_with_a_whole_one(runtime, run):
    tokens = np.random.default_rng(7).integers(100, 40_000, 200).tolist()
    whole = run(runtime, (0, tokens, 0))[0]
    for start in range(0, 200, 64):
        chunked = run(runtime, (1, tokens[start : start + 64], start))[0]
    assert int(whole.argmax()) == int(chunked.argmax())
    assert np.corrcoef(whole, chunked)[0, 1] > 0.999


def test_truncate_and_continue(runtime, run, prompts):
    prompt = prompts[1]
    want = run(runtime, (0, prompt, 0))[0]
    run(runtime, (0, [11, 12, 13], len(prompt)))
    assert runtime.info.capabilities.truncation == "any"
    assert runtime.truncate(0, len(prompt) - 1) == len(prompt) - 1
    got = run(runtime, (0, prompt[-1:], len(prompt) - 1))[0]
    assert int(got.argmax()) == int(want.argmax())
    assert np.corrcoef(got, want)[0, 1] > 0.999
    assert runtime.truncate(0, 10_000) == len(prompt)  # never more than is there
    assert runtime.truncate(0, 0) == 0
    np.testing.assert_array_equal(run(runtime, (0, prompt, 0))[0], want)


def test_idle_lanes_between_busy_ones_keep_their_kv(runtime, run, prompts):
    for lane in range(5):
        run(runtime, (lane, prompts[lane], 0))
    want = run(runtime, (1, [100], len(prompts[1])))[0]
    assert runtime.truncate(1, len(prompts[1])) == len(prompts[1])
    at = {lane: len(prompts[lane]) for lane in range(5)}
    for _ in range(3):  # lanes 1 and 3 are idle and used to bridge the gap
        run(runtime, *((lane, [200], at[lane]) for lane in (4, 0, 2)))
        at = {lane: at[lane] + (lane in {0, 2, 4}) for lane in at}
    got = run(runtime, (1, [100], len(prompts[1])))[0]
    np.testing.assert_array_equal(got, want)


def test_a_gap_that_would_cost_too_much_is_not_bridged(load, run):
    runtime = load(lanes=8, context=512)
    filler = list(range(300, 700))
    run(runtime, (3, filler, 0))
    run(runtime, (4, filler, 0))
    lanes = np.array([0, 2, 5, 7], np.int32)
    assert runtime._bridges(lanes) == [1, 6]
    assert runtime._bridges(lanes[:2]) == [1]
    assert runtime._bridges(np.array([2, 0, 1], np.int32)) == []


def test_copy_prefix(runtime, run, prompts):
    prompt = prompts[1]
    keep = len(prompt) - 2
    run(runtime, (2, prompt, 0))
    run(runtime, (6, prompts[0], 0))  # the target is not empty
    runtime.copy_prefix(2, 6, keep)
    assert runtime.truncate(6, 1_000) == keep
    # The source may go on, and even change, before anybody computed with the copy.
    runtime.truncate(2, 1)
    run(runtime, (2, [55, 66, 77], 1))
    got = run(runtime, (6, prompt[keep:], keep))[0]
    runtime.truncate(2, 0)
    run(runtime, (2, prompt[:keep], 0))
    want = run(runtime, (2, prompt[keep:], keep))[0]
    assert int(got.argmax()) == int(want.argmax())
    assert np.corrcoef(got, want)[0, 1] > 0.999
    runtime.copy_prefix(2, 2, 3)
    assert runtime.truncate(2, 99) == 3
    runtime.copy_prefix(2, 6, 0)
    assert runtime.truncate(6, 99) == 0
    with pytest.raises(stoker.EngineError, match="holds 3 tokens; 4"):
        runtime.copy_prefix(2, 6, 4)


def test_snapshot_and_restore(runtime, run, prompts):
    prompt = prompts[2]
    run(runtime, (0, prompt, 0))
    runtime.copy_prefix(0, 3, len(prompt))
    snapshot = runtime.snapshot(3)  # of a copy that no step has touched yet
    want = run(runtime, (0, [100], len(prompt)))[0]
    runtime.truncate(3, 0)
    run(runtime, (5, prompts[0], 0))
    assert runtime.restore(5, snapshot) == len(prompt)
    np.testing.assert_array_equal(run(runtime, (5, [100], len(prompt)))[0], want)
    assert runtime.restore(5, runtime.snapshot(4)) == 0  # of an empty lane
    for wrong in (b"", b"nonsense" * 9, b"SKV1" + bytes(20)):
        with pytest.raises(stoker.EngineError, match="no snapshot of this model"):
            runtime.restore(5, wrong)
    assert runtime.restore(5, snapshot[:200]) == 0  # cut short: an empty lane
    assert runtime.truncate(5, 99) == 0


def test_no_room_changes_nothing(runtime, run, build_step):
    limit = runtime.info.context_length
    tokens = np.random.default_rng(1).integers(100, 40_000, limit - 1).tolist()
    run(runtime, (0, tokens, 0))
    run(runtime, (1, tokens[:9], 0))
    want = run(runtime, (1, [5], 9))[0]
    assert runtime.truncate(1, 9) == 9
    output = runtime.step(build_step((1, [5], 9), (0, [5, 6], limit - 1)))
    assert output.no_room
    assert output.logits.shape == (0, runtime.info.vocab_size)
    np.testing.assert_array_equal(run(runtime, (1, [5], 9))[0], want)
    run(runtime, (0, [5], limit - 1))  # exactly full is fine


def test_no_room_in_a_small_unified_memory(load, run, build_step):
    runtime = load(lanes=4, context=512, kv_unified=True, kv_tokens=256)
    assert runtime.info.kv_capacity_tokens == 256
    assert runtime.info.context_length == 256
    tokens = list(range(300, 420))
    run(runtime, (0, tokens, 0))
    run(runtime, (1, tokens, 0))
    want = run(runtime, (1, [5], 120))[0]
    assert runtime.truncate(1, 120) == 120
    for rows in (
        [(1, [5], 120), (2, tokens, 0)],
        [(2, tokens[:20], 0)],
        [(lane, tokens, 0) for lane in (2, 3)] + [(0, tokens, 120)],
    ):
        assert runtime.step(build_step(*rows)).no_room
    np.testing.assert_array_equal(run(runtime, (1, [5], 120))[0], want)
    assert runtime.restore(2, runtime.snapshot(0)) == 0  # no room either
    runtime.copy_prefix(0, 2, 120)  # but shared cells cost nothing
    run(runtime, (2, [5], 120))


def test_a_failed_decode_leaves_the_lanes_as_they_were(runtime, run, build_step, prompts):
    lib, context = runtime._lib, runtime._context.pointer
    run(runtime, (0, prompts[0], 0))
    want = run(runtime, (0, [100], len(prompts[0])))[0]
    runtime.truncate(0, len(prompts[0]))
    abort = lib.ggml_abort_callback(lambda _data: True)
    never = lib.ggml_abort_callback(lambda _data: False)
    lib.llama_set_abort_callback(context, abort, None)
    try:
        with pytest.raises(stoker.EngineError, match=r"could not compute a step \(code 2\)"):
            runtime.step(build_step((0, [7, 8], len(prompts[0])), (2, prompts[1], 0)))
    finally:
        lib.llama_set_abort_callback(context, never, None)
    assert runtime.truncate(0, len(prompts[0])) == len(prompts[0])
    assert runtime.truncate(2, 99) == 0
    np.testing.assert_array_equal(run(runtime, (0, [100], len(prompts[0])))[0], want)
    lib.llama_set_abort_callback(context, lib.ggml_abort_callback(), None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, [5], 3)], "lane 0 continues at position 3 but holds 0 tokens"),
        ([(8, [5], 0)], "a lane outside 0 to 7"),
        ([(-1, [5], 0)], "a lane outside 0 to 7"),
        ([(1, [5], 0), (2, [5], 0), (1, [5], 1)], "lane 1 continues at position 1"),
        ([(0, [10**6], 0)], r"code -1\): .*invalid token"),
        ([(0, list(range(600)), 0)], "a step of 600 tokens exceeds 512"),
    ],
)
def test_a_malformed_step_is_refused(runtime, run, build_step, rows, message):
    with pytest.raises(stoker.EngineError, match=message):
        runtime.step(build_step(*rows))
    run(runtime, (0, [5, 6], 0))


def test_a_step_may_want_no_logits_or_hold_no_tokens(runtime, build_step):
    step = build_step((0, [5, 6, 7], 0))
    step.wants_logits[:] = False
    assert runtime.step(step).logits.shape == (0, runtime.info.vocab_size)
    assert runtime.step(build_step()).logits.shape == (0, runtime.info.vocab_size)
    assert runtime.truncate(0, 99) == 3


def test_info(runtime, model_path):
    info = runtime.info
    assert (info.num_lanes, info.context_length, info.kv_capacity_tokens) == (8, 512, 4096)
    assert info.vocab_size == 49_152
    assert info.max_step_tokens == 512
    assert info.end_token_ids == {0, 2, 4}
    assert (info.bos_token, info.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert "<|im_start|>" in info.chat_template
    assert 0 < info.weights_bytes < model_path.stat().st_size
    assert info.kv_bytes == 8 * 512 * 30 * 2 * 192 * 2  # cells, layers, K and V, width, bytes
    assert info.device == "cpu"
    assert info.settings["threads"].isdigit()
    assert list(info.warnings) == []


def test_close_twice_then_nothing_works(load, build_step):
    runtime = load(lanes=2, context=256)
    runtime.close()
    runtime.close()
    with pytest.raises(stoker.EngineError, match="is closed"):
        runtime.step(build_step((0, [5], 0)))
    with pytest.raises(stoker.EngineError, match="is closed"):
        runtime.truncate(0, 0)
    with pytest.raises(stoker.EngineError, match="is closed"):
        runtime.tokenizer.encode("x", add_special=False, parse_special=False)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_type_k": "bf16", "kv_type_v": "bf16"},
        {"kv_type_k": "q8_0", "kv_type_v": "q8_0"},
        {"kv_type_k": "f32", "kv_type_v": "f32", "flash_attention": "off"},
        {"use_mmap": False, "use_extra_buffers": False, "n_ubatch": 16},
    ],
)
def test_other_settings_give_the_same_answer(load, greedy, partitioned, prompts, options):
    runtime = load(lanes=2, context=256, **options)
    assert greedy(runtime, prompts[0], 6, lane=1) == greedy(partitioned, prompts[0], 6)
    runtime.close()
