"""What the response cache stores, for how long, and which requests are the same to it."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker import Delta, FinishReason, InvalidRequestError, Request, SamplingParams, ServedModel
from stoker.testing import FakeClock, ScriptedRuntime
from stoker_plugins.response_cache.accounts import merged
from stoker_plugins.response_cache.answers import replay
from stoker_plugins.response_cache.keys import (
    IRRELEVANT,
    directives_of,
    is_repeatable,
    request_key,
)
from stoker_plugins.response_cache.options import ResponseCacheOptions
from stoker_plugins.response_cache.store import AnswerStore, StoredAnswer, StoredSequence

SERVED = ServedModel(
    model_id="m", reference="r", backend="b", created=1, size_bytes=2, info=ScriptedRuntime().info
)


def sequence(text: str = "text") -> StoredSequence:
    return StoredSequence(text, FinishReason.STOP, len(text))


def request(**fields: Any) -> Request:
    sampling = SamplingParams(**{"temperature": 0.0} | fields.pop("sampling", {}))
    return Request(
        **{"request_id": "r", "model": "m", "prompt_token_ids": [1, 2], "sampling": sampling}
        | fields
    )


def key(served: ServedModel = SERVED, *, per_tenant: bool = True, **fields: Any) -> bytes:
    return request_key(request(**fields), served, per_tenant=per_tenant)


# --------------------------------------------------------------------------- keys

HASHED = {
    *("model", "prompt_token_ids", "sampling", "n", "endpoint", "inputs", "shown_tokens"),
    "cache_salt",  # keeps apart what its sender wants kept apart
    "grammar",  # cannot be compared: such a request has no key
}
WANTS_MORE = {"wants_token_ids", "wants_progress"}
SAMPLING_WANTS_MORE = {"logprobs", "prompt_logprobs"}
SAMPLING = {
    *("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "seed", "stop", "ignore_eos"),
    *("typical_p", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n"),
    *("dry_sequence_breakers", "xtc_probability", "xtc_threshold"),
    *("stop_token_ids", "include_stop", "min_tokens"),
}


def test_of_every_field_somebody_has_decided_whether_it_changes_the_answer() -> None:
    assert set(Request.__struct_fields__) <= HASHED | IRRELEVANT | WANTS_MORE
    assert set(SamplingParams.__struct_fields__) <= SAMPLING | SAMPLING_WANTS_MORE
    assert not HASHED & IRRELEVANT


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_token_ids": [1, 2, 3]},
        {"prompt_token_ids": [2, 1]},
        {"n": 2},
        {"endpoint": "chat"},
        {"tenant": "other"},
        *(
            {"sampling": {name: value}}
            for name, value in {
                "max_tokens": 5,
                "temperature": 0.5,
                "top_p": 0.5,
                "top_k": 3,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "presence_penalty": 0.1,
                "frequency_penalty": 0.1,
                "logit_bias": {3: 1.0},
                "seed": 4,
                "stop": ("x",),
                "ignore_eos": True,
                "typical_p": 0.9,
                "dry_multiplier": 0.8,
                "dry_base": 2.0,
                "dry_allowed_length": 3,
                "dry_penalty_last_n": 64,
                "dry_sequence_breakers": ("x",),
                "xtc_probability": 0.5,
                "xtc_threshold": 0.2,
                "stop_token_ids": (3,),
                "include_stop": True,
                "min_tokens": 2,
            }.items()
        ),
    ],
    ids=str,
)
def test_what_changes_the_answer_changes_the_key(change: dict[str, Any]) -> None:
    assert key(**change) != key()


def test_what_does_not_change_the_answer_does_not_change_the_key() -> None:
    other = {"request_id": "x", "priority": 3, "arrival_s": 1.0, "deadline_s": 2.0}
    other |= {"headers": {"a": "b"}, "metadata": {"limits.ticket": object()}}
    assert key(**other) == key()
    assert key(prompt_token_ids=(1, 2)) == key()
    assert key(predicted_token_ids=(1, 2)) == key()
    assert key(per_tenant=False, tenant="a") == key(per_tenant=False, tenant="b")
    bias = [{"logit_bias": {1: 1.0, 2: 2.0}}, {"logit_bias": {2: 2.0, 1: 1.0}}]
    assert key(sampling=bias[0]) == key(sampling=bias[1])


def test_another_model_under_the_same_name_has_other_answers() -> None:
    for change in ({"reference": "x"}, {"backend": "x"}, {"created": 9}, {"size_bytes": 9}):
        assert key(msgspec.structs.replace(SERVED, **change)) != key()


def test_greedy_and_seeded_requests_are_repeatable() -> None:
    assert is_repeatable(request())
    assert is_repeatable(request(sampling={"temperature": 1.0, "seed": 0}))
    assert not is_repeatable(request(sampling={"temperature": 1.0}))


@pytest.mark.parametrize("name", sorted(WANTS_MORE))
def test_who_wants_more_than_text_has_it_computed(name: str) -> None:
    assert not is_repeatable(request(**{name: True}))


@pytest.mark.parametrize("name", sorted(SAMPLING_WANTS_MORE))
def test_who_wants_log_probabilities_has_them_computed(name: str) -> None:
    assert not is_repeatable(request(sampling={name: 0}))


@pytest.mark.parametrize("stop", [None, "END", 7])
def test_what_ended_a_stored_answer_is_told_again(stop: str | int | None) -> None:
    stored = StoredAnswer((StoredSequence("text", FinishReason.STOP, 4, stop),), 0.0)
    assert replay(stored, request()).endings[0].stop == stop


def test_what_a_request_may_say() -> None:
    assert directives_of(request()) == frozenset()
    headers = {"x-stoker-cache": " No-Cache ,no-store, "}
    assert directives_of(request(headers=headers)) == {"no-cache", "no-store"}
    with pytest.raises(InvalidRequestError, match="'max-age=3'; it may say no-cache or no-store"):
        directives_of(request(headers={"x-stoker-cache": "max-age=3"}))


@pytest.mark.parametrize(
    "options", [{"max_bytes": 0}, {"ttl_s": 0}, {"eviction": "x"}, {"isolation": "x"}, {"size": 1}]
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(options, ResponseCacheOptions)


# --------------------------------------------------------------------------- answers


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 8192, 10_000])
def test_a_stored_answer_is_told_as_it_was(length: int) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    stored = StoredAnswer((sequence(text), sequence("other")), 0.0)
    answer = replay(stored, request(n=2))
    assert answer.is_over
    for index, wanted in enumerate((text, "other")):
        deltas = [delta for delta in answer.deltas if delta.index == index]
        assert "".join(delta.text for delta in deltas) == wanted
        assert max(len(delta.text) for delta in deltas) <= 4096
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason is FinishReason.STOP
        assert sum(delta.num_tokens for delta in deltas) == len(wanted)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.text("ab", max_size=3)), max_size=30))
def test_merging_deltas_loses_nothing(parts: list[tuple[int, str]]) -> None:
    deltas = [Delta(index=index, text=text, num_tokens=1) for index, text in parts]
    after = merged(deltas)
    assert len(after) == len({delta.index for delta in deltas})
    for delta in after:
        own = [d for d in deltas if d.index == delta.index]
        assert delta.text == "".join(d.text for d in own)
        assert delta.num_tokens == len(own)


# --------------------------------------------------------------------------- the store


def test_an_answer_is_kept_for_its_time_and_no_longer() -> None:
    clock = FakeClock()
    store = AnswerStore(10_000, 60.0, "lru", clock)
    assert store.put(b"a", (sequence(),))
    clock.advance(30)
    assert store.put(b"b", (sequence(),))
    clock.advance(29.9)
    assert store.get(b"a") is not None
    clock.advance(0.1)
    assert store.get(b"a") is None
    assert store.get(b"b") is not None
    assert len(store) == 1
    clock.advance(30)
    store.expire()
    assert (len(store), store.size_bytes) == (0, 0)
    assert store.evictions == {"capacity": 0, "expired": 2}


def test_storing_again_makes_it_young_again() -> None:
    clock = FakeClock()
    store = AnswerStore(10_000, 60.0, "fifo", clock)
    store.put(b"a", (sequence("old"),))
    clock.advance(50)
    store.put(b"a", (sequence("new"),))
    clock.advance(50)
    found = store.get(b"a")
    assert found is not None
    assert found.sequences[0].text == "new"
    assert len(store) == 1


@pytest.mark.parametrize(("eviction", "goes"), [("lru", b"b"), ("lfu", b"c"), ("fifo", b"a")])
def test_who_goes_when_there_is_no_room(eviction: Any, goes: bytes) -> None:
    size = StoredAnswer((sequence(),), 0.0).size_bytes
    store = AnswerStore(3 * size, 60.0, eviction, FakeClock())
    for name in (b"a", b"b", b"c"):
        store.put(name, (sequence(),))
    for name in (b"b", b"b", b"a", b"a", b"c"):
        assert store.get(name) is not None
    store.put(b"d", (sequence(),))
    assert {name for name in (b"a", b"b", b"c") if store.get(name) is None} == {goes}
    assert store.evictions["capacity"] == 1


def test_what_can_never_fit_evicts_nobody() -> None:
    store = AnswerStore(2000, 60.0, "lru", FakeClock())
    assert store.put(b"a", (sequence(),))
    assert not store.put(b"b", (sequence("x" * 2000),))
    assert store.get(b"a") is not None
    assert store.get(b"b") is None


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    eviction=st.sampled_from(["lru", "lfu", "fifo"]),
    max_bytes=st.integers(1, 5000),
    actions=st.lists(
        st.tuples(
            st.sampled_from(["put", "get", "wait"]), st.integers(0, 9), st.text(max_size=1500)
        ),
        max_size=60,
    ),
)
def test_the_bounds_always_hold(
    eviction: Any, max_bytes: int, actions: list[tuple[str, int, str]]
) -> None:
    clock = FakeClock()
    store = AnswerStore(max_bytes, 10.0, eviction, clock)
    model: dict[bytes, tuple[str, float]] = {}  # what was stored last, and when
    for action, number, text in actions:
        name = bytes([number])
        if action == "put":
            if store.put(name, (sequence(text),)):
                model[name] = (text, clock())
            else:
                model.pop(name, None)
        elif action == "wait":
            clock.advance(number)
        else:
            found = store.get(name)
            if found is not None:
                assert (found.sequences[0].text, found.stored_s) == model[name]
                assert clock() - found.stored_s < 10
        assert 0 <= store.size_bytes <= max_bytes
        assert (store.size_bytes == 0) == (len(store) == 0)
    clock.advance(10)
    store.expire()
    assert (len(store), store.size_bytes) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("eviction", ["lru", "lfu", "fifo"])
@pytest.mark.parametrize("length", [0, 100, 2000])
def test_it_takes_no_more_memory_than_it_says(eviction: Any, length: int) -> None:
    store = AnswerStore(10**9, 1e9, eviction, FakeClock())
    num_answers = 500
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(num_answers):
            text = f"{number:08}" + "x" * length
            tokens = 100_000 + number
            name = number.to_bytes(32, "big")
            store.put(name, (StoredSequence(text, FinishReason.STOP, tokens),))
            for _ in range(number):  # each so often as no other: the most that lfu has to remember
                store.get(name)
        del text, name, tokens
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= store.size_bytes <= 3 * taken
