"""Whole characters only, and no part of a stop string, however the bytes are cut into tokens."""

from __future__ import annotations

import itertools

import pytest
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


@pytest.mark.slow
@settings(max_examples=300)
@given(st.data(), st.text(max_size=30))
def test_text_comes_out_whole_however_it_is_cut(data: st.DataObject, text: str) -> None:
    deltas, stopped = push_all(data.draw(cut(text.encode())))
    assert "".join(deltas) == text
    assert not stopped
    assert "\ufffd" not in "".join(deltas) or "\ufffd" in text


@pytest.mark.slow
@settings(max_examples=300)
@given(st.data(), st.binary(max_size=30))
def test_any_bytes_at_all_decode_as_python_does(data: st.DataObject, raw: bytes) -> None:
    deltas, _ = push_all(data.draw(cut(raw)))
    assert "".join(deltas) == raw.decode("utf-8", "replace")


@pytest.mark.slow
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
    # It is a real one, nothing of it leaks, and nothing before it is lost.
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


# --------------------------------------------------------------------------- byte fallback

# A vocabulary as models with byte fallback have it: pieces of text, and a token for each byte.
VOCABULARY = [bytes((byte,)) for byte in range(256)]
VOCABULARY += [piece.encode() for piece in (" the", "é", "€", "😀", "日本", "ab", "\ufffd")]
VOCABULARY += [b"", b"\xe2\x82", b"\xac", b"a\xf0\x9f", b"\x98\x80b"]
likely_tokens = st.one_of(
    st.integers(0, len(VOCABULARY) - 1), st.integers(192, len(VOCABULARY) - 1)
)


SURROGATES = range(0xA0, 0xC0)


def complete(raw: bytes) -> str:
    """The text of the bytes but for a last character that may still become whole."""
    for back in (1, 2, 3):
        start = len(raw) - back
        if start >= 0 and raw[start] >= 0xC0:
            try:
                raw[start:].decode()
            except UnicodeDecodeError as error:
                # Half a surrogate is never right, but the decoder waits for its third byte to say so.
                is_surrogate = (
                    raw[start] == 0xED and len(raw) == start + 2 and raw[-1] in SURROGATES
                )
                if error.reason == "unexpected end of data" or is_surrogate:
                    return raw[:start].decode("utf-8", "replace")
            break
    return raw.decode("utf-8", "replace")


@pytest.mark.slow
@settings(max_examples=800)
@given(st.lists(likely_tokens, max_size=40))
def test_any_tokens_give_the_text_of_their_bytes_as_soon_as_it_is_certain(
    tokens: list[int],
) -> None:
    detokenizer = Detokenizer(TokenText(VOCABULARY.__getitem__))
    text, raw = "", b""
    for token in tokens:
        text += detokenizer.push(token)
        raw += VOCABULARY[token]
        assert text == complete(raw)
        assert detokenizer.is_partial == (complete(raw) != raw.decode("utf-8", "replace"))
    assert text + detokenizer.finish() == raw.decode("utf-8", "replace")


@pytest.mark.slow
@settings(max_examples=300)
@given(st.text(max_size=30), st.data())
def test_valid_text_never_has_a_replacement_before_its_end(text: str, data: st.DataObject) -> None:
    detokenizer = Detokenizer(TokenText(VOCABULARY.__getitem__))
    raw = text.encode()
    cut_off = data.draw(st.integers(0, len(raw)))
    out = "".join(detokenizer.push(byte) for byte in raw[:cut_off])
    assert text.startswith(out)
    tail = detokenizer.finish()
    assert tail == (
        "" if text.startswith(raw[:cut_off].decode("utf-8", "ignore") + tail) else "\ufffd"
    )


# --------------------------------------------------------------------------- stop strings


def expected(text: str, stop: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that is complete first; of several the longest."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return min(starts), end
    return None


@pytest.mark.slow
@settings(max_examples=500)
@given(
    st.data(),
    st.text("ab\u00e9\u20ac", max_size=30),
    st.lists(st.text("ab\u00e9\u20ac", min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
)
def test_which_stop_string_ends_the_output_does_not_depend_on_tokens(
    data: st.DataObject, text: str, stop: list[str], include_stop: bool
) -> None:
    pieces = data.draw(cut(text.encode()))
    detokenizer = Detokenizer(TokenText(pieces.__getitem__), tuple(stop), include_stop=include_stop)
    out = ""
    for token in range(len(pieces)):
        out += detokenizer.push(token)
        if detokenizer.stopped:
            break
    out += detokenizer.finish()
    found = expected(text, stop)
    if found is None:
        assert (out, detokenizer.stopped, detokenizer.stop_string) == (text, False, None)
        return
    start, end = found
    assert out == text[: end if include_stop else start]
    assert detokenizer.stop_string == text[start:end]


@pytest.mark.slow
@settings(max_examples=500)
@given(
    st.text("ab\u00e9", max_size=20),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 12),
    st.booleans(),
)
def test_a_stop_string_that_is_complete_before_min_tokens_is_text(
    text: str, stop: list[str], min_tokens: int, include_stop: bool
) -> None:
    raw = text.encode()  # a token for each byte
    detokenizer = Detokenizer(
        TokenText(VOCABULARY.__getitem__),
        tuple(stop),
        include_stop=include_stop,
        min_tokens=min_tokens,
    )
    out, count = "", 0
    for byte in raw:
        out += detokenizer.push(byte)
        count += 1
        if detokenizer.stopped:
            break
    out += detokenizer.finish()
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts and len(text[:end].encode()) >= min_tokens:
            assert count == len(text[:end].encode())
            assert out == text[: end if include_stop else min(starts)]
            return
    assert (out, detokenizer.stopped) == (text, False)
