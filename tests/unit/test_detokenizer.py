"""Whole characters only, and no part of a stop string, however the bytes are cut into tokens."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.engine.detokenizer import Detokenizer, TokenText


def push_all(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The deltas of a sequence of byte pieces, the last from ``finish``, and whether it stopped."""
    detokenizer = Detokenizer(TokenText(lambda token: pieces[token]), stop)
    deltas = []
    for token in range(len(pieces)):
        deltas.append(detokenizer.push(token))
        if detokenizer.stopped:
            return deltas, True
    deltas.append(detokenizer.finish())
    return deltas, detokenizer.stopped


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[bytes]:
    places = sorted(draw(st.sets(st.integers(0, len(data)), max_size=12)) | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


@settings(max_examples=300)
@given(st.data(), st.text(max_size=30))
def test_text_comes_out_whole_however_it_is_cut(data: st.DataObject, text: str) -> None:
    deltas, stopped = push_all(data.draw(cut(text.encode())))
    assert "".join(deltas) == text
    assert not stopped
    assert "\ufffd" not in "".join(deltas) or "\ufffd" in text


@settings(max_examples=300)
@given(st.data(), st.binary(max_size=30))
def test_any_bytes_at_all_decode_as_python_does(data: st.DataObject, raw: bytes) -> None:
    deltas, _ = push_all(data.draw(cut(raw)))
    assert "".join(deltas) == raw.decode("utf-8", "replace")


@settings(max_examples=500)
@given(
    st.data(),
    st.text("ab\u00e9", max_size=30),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_output_ends_before_the_first_stop_string(
    data: st.DataObject, text: str, stop: list[str]
) -> None:
    deltas, stopped = push_all(data.draw(cut(text.encode())), tuple(stop))
    out = "".join(deltas)
    found = [at for s in stop if (at := text.find(s)) >= 0]
    assert stopped == bool(found)
    if not found:
        assert out == text
        return
    # Which stop string is seen first depends on where tokens end, but it is always a real one,
    # nothing of it leaks, and nothing before it is lost.
    assert text.startswith(out)
    assert not any(s in out for s in stop)
    assert any(text.startswith(s, len(out)) for s in stop)
    first_seen = min(text.find(s) + len(s) for s in stop if s in text)
    assert len(out) < first_seen


def test_a_beginning_of_a_stop_string_is_held_back_and_then_let_go() -> None:
    pieces = [b"Hello", b" EN", b"D", b"LESS", b" EN"]
    deltas, stopped = push_all(pieces, ("END.", "\n"))
    assert deltas == ["Hello", " ", "", "ENDLESS", " ", "EN"]
    assert not stopped


def test_a_stop_string_within_one_token_cuts_the_token() -> None:
    deltas, stopped = push_all([b"one\ntwo"], ("\n",))
    assert (deltas, stopped) == (["one"], True)
