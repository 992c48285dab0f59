"""The items that each context may get, numbered in trie order: counts under nodes, and the item of a number."""

from __future__ import annotations

from torch import Tensor

from gflowgr.trie import PrefixTrie


class ItemRanks:
    """Ranks of the items available to each row; those under a node are consecutive.

    Args:
        trie: the catalogue.
    """

    def __init__(self, trie: PrefixTrie) -> None:
        self.trie = trie

    def under(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The rank of the first item at or under each node (B, K) and the one past the last; int64."""
        first = self.trie.first_item[nodes].long()
        return self._before(first), self._before(first + self.trie.item_count[nodes])

    def at(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the items that end exactly at each node."""
        first, children = self.trie.first_item[nodes].long(), self.trie.first_child[nodes].long()
        # A node's own items come before those under its children.
        inner = children < self.trie.first_child[nodes + 1]
        below = self.trie.first_item[children.clamp(max=self.trie.num_nodes - 1)].long()
        return self._before(first), self._before(below.where(inner, first + self.trie.item_count[nodes]))

    def items(self, ranks: Tensor) -> Tensor:
        """The items of ranks (B, K) that exist: int64."""
        return self.trie.item_order[self._positions(ranks)].long()

    def _before(self, positions: Tensor) -> Tensor:
        """How many of the first `positions` items of the trie a row may get."""
        return positions

    def _positions(self, ranks: Tensor) -> Tensor:
        """The inverse: where in the trie's order an available item stands."""
        return ranks
