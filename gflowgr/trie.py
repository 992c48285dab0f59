"""The prefix trie of a catalogue: plain arrays in breadth-first order that every backend reads."""

from __future__ import annotations

import operator
import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gflowgr import ops, trie_arrays, trie_file
from gflowgr.ops._checks import is_on
from gflowgr.trie_arrays import ARRAYS, Arrays, Levels, as_rows


class PrefixTrie:
    """The token sequences of a catalogue as a tree; a node is a prefix, node 0 the empty one.

    Nodes are numbered breadth first and siblings ascend by token, so the children of `n` are the nodes
    `first_child[n] .. first_child[n + 1] - 1`, and the items at or under `n` are the contiguous range
    `item_order[first_item[n] : first_item[n] + item_count[n]]`.

    A trie never changes: `add` and `remove` return another one, so whoever reads, in whatever thread, reads
    one catalogue. Four arrays are stored, about 4 + 2 bytes a node and 8 an item; the others are made of them
    on first use and kept.

    Args:
        sequences: (N, L) integers (a tensor, an array or nested lists), row i the tokens of item i as the
            model emits them. -1 pads the tail of rows shorter than L. Rows may collide, and one may be a
            prefix of another; only a stop token of yours lets a policy choose to end at such an inner node.

    Attributes:
        first_child: int32 (num_nodes + 1,), stored.
        narrow_token: the token on the edge into a node, uint16 (num_nodes,) if all fit and int32 otherwise,
            stored. That of the root, which has none, is the largest uint16, or -1.
        item_node: int32 (N,), the node at which an item ends, -1 for one that was removed; stored.
        node_items: int32 (present items,), sorted by (node at which it ends, item), stored.
        token: int32 (num_nodes,); token[0] = -1.
        parent: int32 (num_nodes,), -1 for the root.
        item_count: int32 (num_nodes,), items at or under a node, collisions counted.
        item_order: int32 (present items,), items in depth-first order.
        first_item: int32 (num_nodes,), where a node's items begin in `item_order`.
        max_token: the largest token.
        max_children: the largest number of children of a node.
        max_children_at: the same for the nodes of each depth.
        token_ranges: for each depth, the smallest and the largest token that leads from it to the next.
        level_offsets: nodes of depth d are level_offsets[d] .. level_offsets[d + 1] - 1.

    Raises:
        TypeError: `sequences` are not integers.
        ValueError: no item, no level, an empty row, a token below -1 or a -1 that is not at a row's tail.
    """

    first_child: Tensor
    narrow_token: Tensor
    item_node: Tensor
    node_items: Tensor

    def __init__(self, sequences: Any) -> None:
        self._adopt(trie_arrays.build(rows_of(sequences)))

    # Tensors made in inference mode could not be saved for a backward pass.
    @torch.inference_mode(False)
    def _adopt(self, arrays: Arrays, levels: Levels | None = None) -> None:
        for name in ARRAYS:
            setattr(self, name, torch.from_numpy(arrays[name]))
        levels = levels or trie_arrays.levels_of(arrays)
        self.level_offsets = levels.offsets
        self.max_children_at = levels.most_children
        self.token_ranges = tuple(zip(levels.smallest_token, levels.largest_token, strict=True))
        self.max_children = max(levels.most_children)
        self.max_token = max(levels.largest_token)
        # What a copy of this trie on another device has, too.
        self._identity = object()
        self._forget()

    def _forget(self) -> None:
        self._kept: dict[str, Any] = {}
        self._fingerprint: str | None = None

    @property
    def num_items(self) -> int:
        """How many numbers items have been given; those of removed ones are not given again."""
        return self.item_node.numel()

    @property
    def num_present(self) -> int:
        """How many items there are."""
        return self.node_items.numel()

    @property
    def num_nodes(self) -> int:
        return self.narrow_token.numel()

    @property
    def max_depth(self) -> int:
        return len(self.level_offsets) - 2

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return sum(getattr(self, name).nbytes for name in ARRAYS)

    @property
    def device(self) -> torch.device:
        return self.first_child.device

    @property
    def token(self) -> Tensor:
        return self._made("token", self._wide_token)

    @property
    def parent(self) -> Tensor:
        return self._made("parent", self._parents)

    @property
    def first_item(self) -> Tensor:
        return self._ranges[0]

    @property
    def item_count(self) -> Tensor:
        return self._ranges[1]

    @property
    def item_order(self) -> Tensor:
        return self._ranges[2]

    @property
    def _ranges(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._made("ranges", self._item_ranges)

    def _made(self, name: str, make: Callable[[], Any]) -> Any:
        """What is made on first use and kept."""
        # No cached_property: before Python 3.12 it takes a lock, which torch.compile cannot trace.
        if name not in self._kept:
            # Tensors made in inference mode could not be saved for a backward pass.
            with torch.inference_mode(False):
                self._kept[name] = make()
        return self._kept[name]

    def _wide_token(self) -> Tensor:
        token = self.narrow_token.to(torch.int32)
        return torch.cat([token.new_full((1,), -1), token[1:]])

    def _parents(self) -> Tensor:
        nodes = torch.arange(self.num_nodes, dtype=torch.int32, device=self.device)
        counts = (self.first_child[1:] - self.first_child[:-1]).long()
        parents = torch.repeat_interleave(nodes, counts, output_size=self.num_nodes - 1)
        return torch.cat([parents.new_full((1,), -1), parents])

    def _item_ranges(self) -> tuple[Tensor, Tensor, Tensor]:
        """first_item, item_count, item_order: counts from the deepest level up, ranges from the root down."""
        ends = self.item_node[self.node_items.long()].long()
        own = torch.zeros_like(self.first_child[1:]).index_add(0, ends, torch.ones_like(self.node_items))
        count, parent = own.clone(), self.parent.long()
        levels = list(pairwise(self.level_offsets[1:]))
        for begin, end in reversed(levels):
            count.index_add_(0, parent[begin:end], count[begin:end].clone())
        first = torch.zeros_like(count)
        before = count.cumsum(0, dtype=torch.int32) - count
        for begin, end in levels:
            above = parent[begin:end]
            eldest = self.first_child[above].long()
            first[begin:end] = first[above] + own[above] + before[begin:end] - before[eldest]
        # An item's rank at its node is its place in node_items less that of the node's first one.
        rank = torch.arange(ends.numel(), device=self.device) - (own.cumsum(0) - own)[ends]
        order = torch.empty_like(self.node_items).scatter(0, first[ends] + rank, self.node_items)
        return first, count, order

    @property
    def fingerprint(self) -> str:
        """A digest of the stored arrays: two tries with the same one hold the same catalogue."""
        if self._fingerprint is None:
            self._fingerprint = trie_arrays.fingerprint(self._arrays())
        return self._fingerprint

    def is_same(self, other: PrefixTrie) -> bool:
        """Whether both hold the same catalogue, on whatever device."""
        return self._identity is other._identity or self.fingerprint == other.fingerprint

    def _arrays(self) -> Arrays:
        return {name: getattr(self, name).cpu().numpy() for name in ARRAYS}

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles no uint16.
        narrow = self.narrow_token.dtype == torch.uint16
        token = self.narrow_token.view(torch.int16) if narrow else self.narrow_token
        return self.__dict__ | {"_kept": {}, "narrow_token": token}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.narrow_token.dtype == torch.int16:
            self.narrow_token = self.narrow_token.view(torch.uint16)

    def __repr__(self) -> str:
        return (
            f"PrefixTrie(num_items={self.num_present}, num_nodes={self.num_nodes}, "
            f"max_depth={self.max_depth}, device={self.device})"
        )

    def walk(self, tokens: Any, start: int | Tensor = 0, *, backend: str = "auto") -> Tensor:
        """The node after each token of `tokens`, -1 from the first token off the trie on.

        Args:
            tokens: (..., T) integers.
            start: the node to set out from, an int or integers (...).

        Returns:
            int64 (..., T).
        """
        return ops.trie_walk(torch.as_tensor(tokens, device=self.device), self, start=start, backend=backend)

    def children(self, node: int) -> Tensor:
        """The tokens that may follow a node, ascending: int32."""
        node = self._checked(node)
        first, end = self.first_child[node : node + 2].tolist()
        return self.narrow_token[first:end].to(torch.int32)

    def items(self, node: int) -> Tensor:
        """The items that end exactly at a node: int32, ascending."""
        node = self._checked(node)

        def end_of(rank: int) -> int:
            return int(self.item_node[self.node_items[rank]])

        ranks = range(self.num_present)
        return self.node_items[bisect_left(ranks, node, key=end_of) : bisect_right(ranks, node, key=end_of)]

    def sequences(self) -> Tensor:
        """The rows of the items: int64 (N, L) on the CPU, -1 at tails, and all over for a removed item."""
        return torch.from_numpy(trie_arrays.sequences_of(self._arrays()))

    def add(self, sequences: Any) -> PrefixTrie:
        """The catalogue with more items; this trie stays as it is.

        It costs about what copying the arrays does, whatever the number of new items, and what comes out is
        what building anew would give: there is nothing to compact.

        Args:
            sequences: (M, L') integers as of `PrefixTrie`; these items get the numbers from `num_items` on.

        Raises:
            TypeError, ValueError: as `PrefixTrie`.
        """
        return self._changed(trie_arrays.add(self._arrays(), rows_of(sequences)))

    def remove(self, items: Any) -> PrefixTrie:
        """The catalogue without some items; this trie stays as it is, and the others keep their numbers.

        A removed item has `item_node` -1, no score or reward of it counts, and its number is not given again.

        Args:
            items: (M,) integers, each once.

        Raises:
            TypeError: `items` are not integers.
            ValueError: one is out of range, named twice or removed already, or none would be left.
        """
        numbers = items.detach().cpu().numpy() if isinstance(items, Tensor) else np.asarray(items)
        if numbers.size and numbers.dtype.kind not in "iu":
            raise TypeError(f"items has dtype {numbers.dtype}, needs integers")
        if numbers.ndim != 1:
            raise ValueError(f"items has shape {numbers.shape}, needs (M,)")
        if not numbers.size:
            return self
        unknown = (numbers < 0) | (numbers >= self.num_items)
        if unknown.any():
            raise ValueError(f"items has {numbers[unknown][0]}, needs 0 .. {self.num_items - 1}")
        numbers, times = np.unique(numbers.astype(np.int64), return_counts=True)
        if times.max() > 1:
            raise ValueError(f"items has {numbers[times > 1][0]} more than once")
        arrays = self._arrays()
        removed = numbers[arrays["item_node"][numbers] < 0]
        if removed.size:
            raise ValueError(f"items has {removed[0]}, which was removed before")
        return self._changed(trie_arrays.remove(arrays, numbers))

    def _changed(self, arrays: Arrays) -> PrefixTrie:
        changed = object.__new__(PrefixTrie)
        changed._adopt(arrays)
        return changed.to(self.device)

    def _checked(self, node: int) -> int:
        try:
            number = operator.index(node)
        except TypeError as error:
            raise TypeError(f"node is {node!r}, needs an integer") from error
        if not 0 <= number < self.num_nodes:
            raise ValueError(f"node is {number}, needs 0 .. {self.num_nodes - 1}")
        return number

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> PrefixTrie:
        """The same trie on another device; itself when it is there already."""
        if is_on(self.device, device):
            return self
        moved = object.__new__(PrefixTrie)
        moved.__dict__.update(self.__dict__)
        moved._forget()
        moved._fingerprint = self._fingerprint
        for name in ARRAYS:
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; an older file at `path` stays whole until the new one is.

        Raises:
            FileNotFoundError: the folder of `path` does not exist.
        """
        smallest, largest = zip(*self.token_ranges, strict=True)
        levels = Levels(self.level_offsets, self.max_children_at, smallest, largest)
        trie_file.write(path, self._arrays(), levels, self.fingerprint)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool | None = None) -> PrefixTrie:
        """Maps what `save` wrote: no array is read before it is used, and processes share the pages.

        Args:
            path: of the file.
            verify: whether to read all of the file and check it. By default it is checked unless it still has
                the time of modification that `save` gave it. A change gives it another, and so does a
                copy that does not keep times (as `cp -p` does); what a disk loses by itself only True finds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is foreign, truncated or damaged.
        """
        saved = trie_file.read(path, verify)
        trie = object.__new__(cls)
        trie._adopt(saved.arrays, saved.levels)
        trie._fingerprint = saved.fingerprint
        return trie


def rows_of(sequences: Any) -> np.ndarray:
    """`as_rows` of what may be a tensor, too."""
    if isinstance(sequences, Tensor):
        if sequences.is_floating_point() or sequences.is_complex():
            raise TypeError(f"sequences has dtype {sequences.dtype}, needs integers")
        sequences = sequences.detach().cpu().numpy()
    return as_rows(sequences)
