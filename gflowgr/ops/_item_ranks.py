"""The items that each context may get, numbered in trie order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gflowgr.ops._checks import CatalogueFilter, CatalogueTrie

# Bits of a word of a bit set.
_WORD = 32


class ItemRanks:
    """Ranks of the items available to each row; those under a node are consecutive.

    Args:
        trie: the catalogue.
        item_filter: what is available; everything without one.
    """

    def __init__(self, trie: CatalogueTrie, item_filter: CatalogueFilter | None = None) -> None:
        self.trie = trie
        self._allowed: _Lists | None = None
        self._excluded: _Lists | None = None
        self._skipped: _Lists | None = None
        if item_filter is None:
            return
        self._row = torch.arange(item_filter.num_rows, device=trie.device)
        if item_filter.allowed_items is not None and item_filter.allowed_set is not None:
            self._allowed = _allowed_positions(trie, item_filter.allowed_items)
            self._set = item_filter.allowed_set
        if item_filter.excluded_items.numel():
            self._exclude(item_filter)

    def under(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The rank of the first item at or under each node (B, K) and the one past the last: int64."""
        first = self.trie.first_item[nodes].long()
        return self._before(first), self._before(first + self.trie.item_count[nodes])

    def own_end(self, nodes: Tensor) -> Tensor:
        """The rank past the last item that ends exactly at each node; they are the first ones under it."""
        first, children = self.trie.first_item[nodes].long(), self.trie.first_child[nodes].long()
        inner = children < self.trie.first_child[nodes + 1]
        below = self.trie.first_item[children.clamp(max=self.trie.num_nodes - 1)].long()
        return self._before(torch.where(inner, below, first + self.trie.item_count[nodes]))

    def items(self, ranks: Tensor) -> Tensor:
        """The items of ranks (B, K): int64; any item where a rank has none."""
        positions = ranks if self._skipped is None else ranks + self._skipped.below(self._row, ranks + 1)
        if self._allowed is not None:
            positions = self._allowed.member(self._set, positions)
        return self.trie.item_order[positions.clamp(0, self.trie.item_order.numel() - 1)].long()

    def _before(self, positions: Tensor) -> Tensor:
        """How many of the first `positions` items in trie order a row may get."""
        ranks = positions if self._allowed is None else self._allowed.below(self._set, positions)
        return ranks if self._excluded is None else ranks - self._excluded.below(self._row, ranks)

    def _exclude(self, item_filter: CatalogueFilter) -> None:
        """Takes excluded items out of the ranks of those that are allowed."""
        row = item_filter.excluded_items // item_filter.num_items
        item = item_filter.excluded_items % item_filter.num_items
        counts = self.trie.item_node[item] >= 0
        rank = _positions(self.trie, item)
        if self._allowed is not None:
            which, position = self._set[row], rank.unsqueeze(1)
            rank = self._allowed.below(which, position).squeeze(1)
            counts &= self._allowed.below(which, position + 1).squeeze(1) > rank
        # What counts for no row goes to a list past the last one: to drop it would wait for the device.
        rows, span = len(self._row), self.trie.item_order.numel() + 2
        row = torch.where(counts, row, rows)
        self._excluded = _Lists((row * span + rank).sort().values, rows, span)
        # The available item of rank r comes after every excluded one with at most r available ones before it.
        row, rank = self._excluded.keys // span, self._excluded.keys % span
        available = rank - torch.arange(row.numel(), device=row.device) + self._excluded.offsets[row]
        self._skipped = _Lists(row * span + torch.where(row < rows, available, 0), rows, span)


class _Lists:
    """Ascending lists of numbers below `span`, as the ascending keys list * span + number."""

    def __init__(self, keys: Tensor, lists: int, span: int) -> None:
        self.keys, self.span = keys, span
        self.offsets = torch.searchsorted(keys, torch.arange(lists + 1, device=keys.device) * span)

    def below(self, which: Tensor, bounds: Tensor) -> Tensor:
        """How many numbers of the lists `which` (B,) are below each bound (B, K)."""
        which = which.unsqueeze(1)
        return torch.searchsorted(self.keys, which * self.span + bounds) - self.offsets[which]

    def member(self, which: Tensor, index: Tensor) -> Tensor:
        """Number `index` (B, K) of the lists `which` (B,); any number past a list's end."""
        place = self.offsets[which].unsqueeze(1) + index
        return self.keys[place.clamp(max=self.keys.numel() - 1)] % self.span if self.keys.numel() else index


# Filters of one batch after another share their sets, which are as large as the catalogue.
_ALLOWED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _allowed_positions(trie: CatalogueTrie, sets: Tensor) -> _Lists:
    """Where in trie order the items of each bit set (G, ceil(N / 32)) stand."""
    if sets not in _ALLOWED:
        span = trie.item_order.numel() + 2
        order = trie.item_order.long()
        keys = [
            ((words[order // _WORD] >> (order % _WORD)) & 1).nonzero().squeeze(1) + number * span
            for number, words in enumerate(sets)
        ]
        _ALLOWED[sets] = _Lists(torch.cat(keys), len(sets), span)
    return _ALLOWED[sets]


def _positions(trie: CatalogueTrie, items: Tensor) -> Tensor:
    """Where in trie order items (E,) stand, by bisection of those that end at the same node."""
    low = trie.first_item[trie.item_node[items]].long()
    high = ItemRanks(trie).own_end(trie.item_node[items].long())
    for _ in range(trie.num_items.bit_length()):
        middle = (low + high) // 2
        below = trie.item_order[middle.clamp(max=trie.item_order.numel() - 1)] < items
        low, high = torch.where(below & (low < high), middle + 1, low), torch.where(below, high, middle)
    return low
