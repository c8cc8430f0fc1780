"""The tree says what a scan over everybody's tokens would say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from stoker.engine.prefix_tree import PrefixTree, common_prefix

TOKENS = st.lists(st.integers(0, 2), max_size=12)
HOLDERS = st.integers(0, 5)
SCOPES = st.sampled_from(["", "a", "b"])


def array(tokens: list[int]) -> NDArray[np.int32]:
    return np.array(tokens, np.int32)


class TreeMachine(RuleBasedStateMachine):
    """Holders come, grow and go; the model is a dict of their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = PrefixTree()
        self.model: dict[int, tuple[str, list[int]]] = {}

    @rule(holder=HOLDERS, scope=SCOPES, tokens=TOKENS)
    def insert(self, holder: int, scope: str, tokens: list[int]) -> None:
        self.tree.insert(holder, scope, array(tokens))
        self.model.pop(holder, None)
        if tokens:
            self.model[holder] = (scope, tokens)

    @rule(holder=HOLDERS, more=TOKENS)
    def extend(self, holder: int, more: list[int]) -> None:
        if holder in self.model:
            scope, tokens = self.model[holder]
            self.tree.extend(holder, scope, array(tokens + more))
            self.model[holder] = (scope, tokens + more)

    @rule(holder=HOLDERS)
    def remove(self, holder: int) -> None:
        self.tree.remove(holder)
        self.model.pop(holder, None)

    @rule(scope=SCOPES, tokens=TOKENS)
    def match(self, scope: str, tokens: list[int]) -> None:
        expected = {
            holder: n
            for holder, (where, held) in self.model.items()
            if where == scope and (n := common_prefix(array(held), array(tokens)))
        }
        assert self.tree.match(scope, array(tokens)) == expected

    @invariant()
    def it_is_a_small_tree(self) -> None:
        assert all(self.tree.depth(h) == len(t) for h, (_, t) in self.model.items())
        assert self.tree.num_nodes <= max(0, 2 * len(self.model) - 1)
        assert self.tree.scopes == {scope for scope, _ in self.model.values()}


TestTree = pytest.mark.slow(TreeMachine.TestCase)
TestTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.slow
@given(TOKENS, TOKENS)
def test_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    n = common_prefix(array(a), array(b))
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


def test_what_is_inserted_may_change_afterwards() -> None:
    tree, tokens = PrefixTree(), array([1, 2, 3])
    tree.insert(0, "", tokens)
    tokens[:] = 9
    assert tree.match("", array([1, 2, 3, 4])) == {0: 3}
