"""Who holds which prefix: a radix tree over token ids.

The idea is RadixAttention's (Zheng et al. 2023, SGLang), adapted to lanes: there, nodes own pages of KV; here
they remember which *holders* (lanes of a runtime, or sequences) hold the tokens on the way to them. Each
scope has a root of its own, so that a prefix of one scope can never be found from another.

Edges are compared with numpy, never token by token; with ``h`` holders there are less than ``2 * h`` nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PrefixTree", "common_prefix"]

_EMPTY = np.empty(0, np.int32)


def common_prefix(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """Length of the longest common prefix of two token arrays."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    at = int(differs.argmax()) if n else 0
    return at if n and differs[at] else n


class _Node:
    """The end of an edge.

    Attributes:
        edge: The tokens on the edge that leads here, ``int32[n]``.
        parent: Where that edge begins; ``None`` for a root.
        children: By the first token of their edges.
        holders: Who holds all tokens down to here, and perhaps more.
        depth: Tokens from the root down to here.
    """

    __slots__ = ("children", "depth", "edge", "holders", "parent")

    def __init__(self, edge: NDArray[np.int32], parent: _Node | None, holders: set[int]) -> None:
        self.edge = edge
        self.parent = parent
        self.children: dict[int, _Node] = {}
        self.holders = holders
        self.depth: int = len(edge) + (0 if parent is None else parent.depth)


class PrefixTree:
    """Token prefixes and their holders. A holder holds one prefix of one scope, or nothing."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node] = {}
        # Where each holder's prefix ends, and in which scope that is.
        self._ends: dict[int, tuple[str, _Node]] = {}

    @property
    def num_nodes(self) -> int:
        """Nodes below the roots."""
        todo, count = list(self._roots.values()), -len(self._roots)
        while todo:
            todo += todo.pop().children.values()
            count += 1
        return count

    @property
    def scopes(self) -> set[str]:
        """The scopes in which anything is held."""
        return set(self._roots)

    def depth(self, holder: int) -> int:
        """How many tokens a holder holds."""
        end = self._ends.get(holder)
        return 0 if end is None else end[1].depth

    def insert(self, holder: int, scope: str, tokens: NDArray[np.int32]) -> None:
        """Let a holder hold exactly ``tokens``, whatever it held before."""
        self.remove(holder)
        self._grow(holder, scope, tokens)

    def extend(self, holder: int, scope: str, tokens: NDArray[np.int32]) -> None:
        """The same for a holder whose tokens have only grown: what is known already is not compared.

        Args:
            holder: Who.
            scope: Its scope, the same as before.
            tokens: All of its tokens, of which it held the first ``depth(holder)``.
        """
        if len(tokens) > self.depth(holder):
            self._grow(holder, scope, tokens)

    def remove(self, holder: int) -> None:
        """Forget a holder."""
        end = self._ends.pop(holder, None)
        if end is None:
            return
        scope, node = end
        while True:
            node.holders.discard(holder)
            parent = node.parent
            if parent is None:
                if not node.holders:
                    del self._roots[scope]
                return
            if not node.holders:
                del parent.children[int(node.edge[0])]
            else:
                self._merge(node)
            node = parent

    def match(self, scope: str, tokens: NDArray[np.int32]) -> dict[int, int]:
        """How many of the first ``tokens`` each holder of a scope holds; who holds none is left out."""
        shared: dict[int, int] = {}
        node = self._roots.get(scope)
        while node is not None:
            rest = tokens[node.depth :]
            child = node.children.get(int(rest[0])) if len(rest) else None
            if child is None:
                break
            same = common_prefix(child.edge, rest)
            shared |= dict.fromkeys(child.holders, node.depth + same)
            node = child if same == len(child.edge) else None
        return shared

    # ------------------------------------------------------------------ nodes

    def _grow(self, holder: int, scope: str, tokens: NDArray[np.int32]) -> None:
        """Lead a holder from where its prefix ends along ``tokens`` to their end."""
        if not len(tokens):
            return
        end = self._ends.get(holder)
        if end is None:
            node = self._roots.get(scope) or self._roots.setdefault(
                scope, _Node(_EMPTY, None, set())
            )
            node.holders.add(holder)
        else:
            node = end[1]
        was = node
        while node.depth < len(tokens):
            rest = tokens[node.depth :]
            child = node.children.get(int(rest[0]))
            if child is None:
                child = _Node(rest.copy(), node, set())
                node.children[int(rest[0])] = child
            else:
                same = common_prefix(child.edge, rest)
                if same < len(child.edge):
                    child = self._split(child, same)
            child.holders.add(holder)
            node = child
        self._ends[holder] = (scope, node)
        if was is not node and was.parent is not None:
            self._merge(was)

    @staticmethod
    def _split(node: _Node, at: int) -> _Node:
        """Put a node into the edge that leads to ``node``, after ``at`` tokens; returns the new one."""
        parent = node.parent
        if parent is None:
            raise ValueError("a root has no edge to split")
        upper = _Node(node.edge[:at], parent, set(node.holders))
        parent.children[int(node.edge[0])] = upper
        node.edge = node.edge[at:]
        node.parent = upper
        upper.children[int(node.edge[0])] = node
        return upper

    def _merge(self, node: _Node) -> None:
        """Take a node out where nobody's prefix ends and no way forks."""
        if len(node.children) != 1 or node.parent is None:
            return
        (child,) = node.children.values()
        if len(child.holders) != len(node.holders):
            return  # somebody's prefix ends here
        child.edge = np.concatenate([node.edge, child.edge])
        child.parent = node.parent
        node.parent.children[int(child.edge[0])] = child
