"""Prompt lookup finds the longest suffix, latest first, without scanning the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.engine.ngram import NgramIndex


def by_hand(text: list[int], limit: int, least: int, most: int) -> list[int]:
    """The definition, by brute force."""
    length = len(text)
    for n in range(min(most, length - 1), least - 1, -1):
        for end in range(length - 1, n - 1, -1):
            if text[end - n : end] == text[length - n :]:
                return [text[end + i % (length - end)] for i in range(limit)]
    return []


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=120),
    least=st.integers(1, 4),
    more=st.integers(0, 3),
    pieces=st.lists(st.sampled_from([1, 1, 1, 2, 7, 30]), min_size=1, max_size=60),
)
def test_it_finds_what_the_definition_says(
    text: list[int], least: int, more: int, pieces: list[int]
) -> None:
    tokens = np.array(text, np.int32)
    index = NgramIndex(least, least + more)
    length = 0
    for piece in pieces:
        length = min(len(text), length + piece)
        found = index.lookup(tokens[:length], 5).tolist()
        assert found == by_hand(text[:length], 5, least, least + more)


def test_a_text_that_repeats_itself_is_continued_with_its_period() -> None:
    tokens = np.array([9, 8, 7, 1, 2, 3, 1, 2, 3, 1, 2], np.int32)
    assert NgramIndex(2, 4).lookup(tokens, 8).tolist() == [3, 1, 2, 3, 1, 2, 3, 1]
    same = np.full(6, 5, np.int32)
    assert NgramIndex(2, 4).lookup(same, 4).tolist() == [5, 5, 5, 5]


def test_nothing_is_found_where_nothing_repeats() -> None:
    assert NgramIndex(1, 3).lookup(np.arange(50, dtype=np.int32), 5).tolist() == []
    assert NgramIndex(2, 3).lookup(np.array([1], np.int32), 5).tolist() == []
    assert NgramIndex(1, 3).lookup(np.array([1, 1], np.int32), 0).tolist() == []


def test_each_token_is_indexed_once() -> None:
    """By what it holds: what was taken in is not looked at again, even if it were another text now."""
    index = NgramIndex(2, 4)
    tokens = np.arange(2000, dtype=np.int32)
    index.lookup(tokens[:1000], 4)
    tokens[:900] = 0
    for length in range(1001, 1050):
        index.lookup(tokens[:length], 4)
    assert [len(last) for last in index._last] == [1047, 1046, 1045]
    assert index._num_indexed == 1048
