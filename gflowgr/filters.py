"""Which items each context must not get, in the form that every backend reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gflowgr.item_sets import WORD, Request, SetBits, find_hidden, ids_of_sets, request, set_bits
from gflowgr.ops._checks import CatalogueTrie, is_on, same_device, trie_for
from gflowgr.trie_arrays import ARRAYS, addresses

try:
    from gflowgr import _core
except ImportError:
    _core = None  # type: ignore[assignment]


class ItemSets:
    """Sets of items (in stock, of a category, of a region), prepared once for filters of many batches.

    Args:
        trie: the catalogue. The sets serve this trie only, on its device.
        sets: each a list or a tensor of items, or a tensor of bools (N,).

    Attributes:
        num_sets: G.
        items: int32 (G, ceil(N / 32)), a bit an item.
        nodes: int32 (G, ceil(num_nodes / 32)), a bit a node: an item of the set is at or under it.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or names an item that there is not.
    """

    items: Tensor
    nodes: Tensor

    # Tensors made in inference mode could not be saved for a backward pass.
    @torch.inference_mode(False)
    def __init__(self, trie: CatalogueTrie, sets: Sequence[Any]) -> None:
        device = getattr(trie, "device", torch.device("cpu"))
        trie_for(trie, device)
        self._trie, self.num_items, self.num_nodes = trie, trie.num_items, trie.num_nodes
        ids = ids_of_sets("sets", sets, trie.num_items)
        if _in_core(trie):
            bits = set_bits(_core, *_addresses(trie), ids)
            self.items, self.nodes = torch.from_numpy(bits.items), torch.from_numpy(bits.nodes)
            return
        self.items = _no_bits(len(ids), self.num_items, device)
        self.nodes = _no_bits(len(ids), self.num_nodes, device)
        for number, members in enumerate(ids):
            flags = torch.zeros(self.num_items, dtype=torch.bool, device=device)
            flags[torch.from_numpy(members).to(device)] = True
            self.items[number] = _packed(flags)
            self.nodes[number] = _packed(_counts_under(flags, trie) > 0)

    @property
    def num_sets(self) -> int:
        return len(self.items)

    def serves(self, trie: CatalogueTrie) -> bool:
        """Whether the sets are of that catalogue."""
        return self._trie is trie or self._trie.is_same(trie)

    @property
    def device(self) -> torch.device:
        return self.items.device

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> ItemSets:
        """The same sets on another device; themselves when they are there already."""
        if is_on(self.device, device):
            return self
        moved = object.__new__(ItemSets)
        moved.__dict__.update(self.__dict__)
        moved.items, moved.nodes = self.items.to(device), self.nodes.to(device)
        return moved


class ItemFilter:
    """Exact filters of a batch: items that a context must not get, and those that it may get at all.

    A child of a node is *available* to a row if an item that the row may get is at or under it. The ops that
    take an `item_filter` sample and normalise over the available children, so a prefix whose items are all
    filtered is gone at every depth, and a walk from the root ends at an item that its row may get, if there
    is one. Building costs in proportion to the filter times the trie's depth.

    Args:
        trie: the catalogue. The filter serves this trie only, on its device.
        exclude: what rows must not get (bought already): (B, E) integers, -1 pads, or a list of B lists.
        allow: what rows may get (in stock, of a category): a set of items for all rows, a set for each row,
            or `(sets, set_of_row)` with `set_of_row` (B,) integers, so that a few large sets serve many rows.
            A set is a list or a tensor of items, or a tensor of bools (N,). `ItemSets` in place of sets were
            prepared before, and cost nothing here.
        rows: B, where neither of them tells it.

    Attributes:
        num_rows: B.
        hidden_offsets: int64 (B + 1,); row b's hidden nodes are
            `hidden_nodes[hidden_offsets[b] : hidden_offsets[b + 1]]`.
        hidden_nodes: int32, ascending in a row: the nodes with excluded items at or under them and no other
            items that the row may get.
        allowed: int32 (G, ceil(num_nodes / 32)), for each set a bit a node: an item of the set is at or
            under it. None without `allow`.
        allowed_set: int64 (B,), the set of each row; None without `allow`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or names an item that there is not.
    """

    hidden_offsets: Tensor
    hidden_nodes: Tensor
    allowed: Tensor | None
    allowed_set: Tensor | None
    _allowed_items: Tensor | None

    # Tensors made in inference mode could not be saved for a backward pass.
    @torch.inference_mode(False)
    def __init__(
        self, trie: CatalogueTrie, exclude: Any = None, allow: Any = None, rows: int | None = None
    ) -> None:
        device = getattr(trie, "device", torch.device("cpu"))
        trie_for(trie, device)
        asked = request(exclude, allow, rows, trie.num_items)
        self._trie, self.num_items, self.num_nodes = trie, trie.num_items, trie.num_nodes
        self._item_node = trie.item_node
        self._excluded = torch.from_numpy(asked.excluded).to(device)
        sets = _sets_for(trie, asked)
        self.allowed = self._allowed_items = self.allowed_set = None
        if sets is not None and asked.set_of_row is not None:
            self.allowed, self._allowed_items = sets.nodes, sets.items
            self.allowed_set = torch.from_numpy(asked.set_of_row).to(device)
        if not _in_core(trie):
            self._find_hidden(trie, asked.rows)
            return
        bits = None if sets is None else SetBits(sets.items.numpy(), sets.nodes.numpy())
        found = find_hidden(_core, *_addresses(trie), asked, bits, torch.get_num_threads())
        self.hidden_offsets, self.hidden_nodes = (torch.from_numpy(array) for array in found)

    def _find_hidden(self, trie: CatalogueTrie, rows: int) -> None:
        """What the C++ core does for a trie on the CPU: by counting, which finds the same on any device."""
        row, item = self._excluded // self.num_items, self._excluded % self.num_items
        node = trie.item_node[item].long()
        kept = node >= 0
        if self._allowed_items is not None and self.allowed_set is not None:
            kept &= _bit(self._allowed_items, self.allowed_set[row], item)
        excluded, left_out = _counts(row[kept], node[kept], trie)
        row, node = excluded // self.num_nodes, excluded % self.num_nodes
        total = trie.item_count[node].long()
        if self._allowed_items is not None and self.allowed_set is not None:
            for number, words in enumerate(self._allowed_items):
                mine = self.allowed_set[row] == number
                total[mine] = _counts_under(_unpacked(words, self.num_items), trie)[node[mine]]
        hidden = left_out == total
        bounds = torch.arange(rows + 1, device=trie.device)
        self.hidden_offsets = torch.searchsorted(row[hidden], bounds)
        self.hidden_nodes = node[hidden].to(torch.int32)

    @property
    def num_rows(self) -> int:
        # Of a tensor, so that what is compiled for one batch size serves others.
        return self.hidden_offsets.shape[0] - 1

    @property
    def device(self) -> torch.device:
        return self.hidden_nodes.device

    def __repr__(self) -> str:
        return (
            f"ItemFilter(num_rows={self.num_rows}, hidden_nodes={self.hidden_nodes.numel()}, "
            f"allowed_sets={0 if self.allowed is None else len(self.allowed)}, device={self.device})"
        )

    @property
    def excluded_items(self) -> Tensor:
        """int64, ascending: row * num_items + item for every excluded item."""
        return self._excluded

    @property
    def allowed_items(self) -> Tensor | None:
        """int32 (G, ceil(num_items / 32)), for each set a bit an item; None without `allow`."""
        return self._allowed_items

    def hides(self, items: Tensor) -> Tensor:
        """Which items the rows must not get: (B, K) integers -> (B, K) bool.

        What is no item, such as -1, is hidden too. Reads nothing back to the host.
        """
        if not isinstance(items, Tensor) or items.is_floating_point() or items.dtype == torch.bool:
            kind = f"has dtype {items.dtype}" if isinstance(items, Tensor) else f"is a {type(items).__name__}"
            raise TypeError(f"items {kind}, needs integers")
        if items.dim() != 2 or items.shape[0] != self.num_rows:
            raise ValueError(f"items has shape {tuple(items.shape)}, needs ({self.num_rows}, K)")
        items = items.to(self.device, torch.int64)
        inside = (items >= 0) & (items < self.num_items)
        item = torch.where(inside, items, 0)
        row = torch.arange(self.num_rows, device=self.device).unsqueeze(1)
        key = row * self.num_items + item
        sentinel = self._excluded.new_full((1,), -1)
        hidden = torch.cat([self._excluded, sentinel])[torch.searchsorted(self._excluded, key)] == key
        hidden |= ~inside | (self._item_node[item] < 0)
        if self._allowed_items is not None and self.allowed_set is not None:
            hidden |= ~_bit(self._allowed_items, self.allowed_set.unsqueeze(1), item)
        return hidden

    def serves(self, trie: CatalogueTrie) -> bool:
        """Whether the filter is of that catalogue: nodes have other numbers in a changed one."""
        return self._trie is trie or self._trie.is_same(trie)

    @torch.inference_mode(False)
    def select(self, rows: Any) -> ItemFilter:
        """The filter whose row i is this one's row `rows[i]`: (K,) integers, in any order, with repeats."""
        rows = torch.as_tensor(rows, device=self.device)
        if not rows.numel():
            rows = rows.long()
        if rows.is_floating_point() or rows.dtype == torch.bool or rows.dim() != 1:
            raise TypeError(f"rows has dtype {rows.dtype}, shape {tuple(rows.shape)}, needs integers (K,)")
        if bool(((rows < 0) | (rows >= self.num_rows)).any()):
            raise ValueError(f"rows has an entry outside 0 .. {self.num_rows - 1}")
        rows = rows.long()
        chosen = self._like()
        chosen.hidden_offsets, chosen.hidden_nodes = _gathered(self.hidden_offsets, self.hidden_nodes, rows)
        bounds = torch.arange(self.num_rows + 1, device=self.device) * self.num_items
        offsets, excluded = _gathered(torch.searchsorted(self._excluded, bounds), self._excluded, rows)
        lengths = offsets[1:] - offsets[:-1]
        row = torch.arange(rows.numel(), device=self.device).repeat_interleave(lengths)
        chosen._excluded = row * self.num_items + excluded % self.num_items
        chosen.allowed_set = None if self.allowed_set is None else self.allowed_set[rows]
        return chosen

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> ItemFilter:
        """The same filter on another device; itself when it is there already."""
        if is_on(self.device, device):
            return self
        moved = self._like()
        for name, value in vars(self).items():
            setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
        return moved

    def _like(self) -> ItemFilter:
        other = object.__new__(ItemFilter)
        other.__dict__.update(self.__dict__)
        return other


def _in_core(trie: CatalogueTrie) -> bool:
    return _core is not None and trie.device.type == "cpu"


def _sets_for(trie: CatalogueTrie, asked: Request) -> ItemSets | None:
    if asked.sets is None:
        return None
    if isinstance(asked.sets, list):
        return ItemSets(trie, asked.sets)
    if not isinstance(asked.sets, ItemSets):
        raise TypeError(f"allow has a {type(asked.sets).__name__}, needs gflowgr.ItemSets or lists of items")
    sets = asked.sets
    if not sets.serves(trie):
        raise ValueError(
            f"allow has sets of another trie, of {sets.num_items} items and {sets.num_nodes} nodes, needs "
            f"those of this trie, which has {trie.num_items} and {trie.num_nodes}"
        )
    same_device("allow", sets, trie.device)
    return sets


def _addresses(trie: CatalogueTrie) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A trie and its items as the C++ core takes them."""
    arrays = {name: getattr(trie, name).numpy() for name in ARRAYS}
    return addresses(arrays)


def _ancestors(row: Tensor, node: Tensor, trie: CatalogueTrie) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a row and a node, then those of the parents, up to the root."""
    while node.numel():
        yield row, node
        node = trie.parent[node].long()
        row, node = row[node >= 0], node[node >= 0]


def _counts(row: Tensor, end: Tensor, trie: CatalogueTrie) -> tuple[Tensor, Tensor]:
    """row * num_nodes + node, ascending, of all nodes at or above the ends of items, and how often each."""
    keys = [row * trie.num_nodes + node for row, node in _ancestors(row, end, trie)]
    keys = keys or [end.new_zeros(0)]
    found, count = torch.cat(keys).unique(return_counts=True)
    return found, count


def _counts_under(flags: Tensor, trie: CatalogueTrie) -> Tensor:
    """How many of the flagged items (N,) are at or under each node."""
    before = torch.cat([flags.new_zeros(1, dtype=torch.int64), flags[trie.item_order.long()].cumsum(0)])
    first = trie.first_item.long()
    return before[first + trie.item_count] - before[first]


def _no_bits(sets: int, size: int, device: torch.device) -> Tensor:
    return torch.zeros(sets, -(-size // WORD), dtype=torch.int32, device=device)


def _packed(flags: Tensor) -> Tensor:
    """Flags (n,) as a bit set, int32 (ceil(n / 32),)."""
    padded = torch.zeros(-(-flags.numel() // WORD) * WORD, dtype=torch.int64, device=flags.device)
    padded[: flags.numel()] = flags
    words = (padded.view(-1, WORD) << torch.arange(WORD, device=flags.device)).sum(1)
    # The highest bit is an int32's sign.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpacked(words: Tensor, size: int) -> Tensor:
    bits = (words.unsqueeze(1) >> torch.arange(WORD, device=words.device)) & 1
    return bits.flatten()[:size] == 1


def _bit(words: Tensor, index: Tensor, member: Tensor) -> Tensor:
    """Whether `member` is in the bit set `words[index]`."""
    return (words[index, member // WORD] >> (member % WORD)) & 1 == 1


def _gathered(offsets: Tensor, values: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The offsets and the values of some rows of ragged ones."""
    lengths = (offsets[1:] - offsets[:-1])[rows]
    new = torch.cat([offsets.new_zeros(1), lengths.cumsum(0)])
    shift = (offsets[rows] - new[:-1]).repeat_interleave(lengths)
    return new, values[torch.arange(shift.numel(), device=values.device) + shift]
