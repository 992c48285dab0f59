"""The prefix trie of a catalogue: plain arrays in breadth-first order that every backend reads."""

from __future__ import annotations

import operator
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.numpy_trie import ARRAYS, FORMAT, as_rows, fingerprint, read_arrays

try:
    from gflowgr import _core
except ImportError:
    _core = None  # type: ignore[assignment]


class PrefixTrie:
    """The token sequences of a catalogue as a tree; a node is a prefix, node 0 the empty one.

    Nodes are numbered breadth first and siblings ascend by token, so the children of `n` are the nodes
    `first_child[n] .. first_child[n + 1] - 1`, and the items at or under `n` are the contiguous range
    `item_order[first_item[n] : first_item[n] + item_count[n]]`.

    Args:
        sequences: (N, L) integers (a tensor, an array or nested lists), row i the tokens of item i as the
            model emits them. -1 pads the tail of rows shorter than L. Rows may collide, and one may be a
            prefix of another; only a stop token of yours lets a policy choose to end at such an inner node.

    Attributes:
        first_child: int32 (num_nodes + 1,).
        token: int32 (num_nodes,), the token on the edge into a node; token[0] = -1.
        item_count: int32 (num_nodes,), items at or under a node, collisions counted.
        item_node: int32 (N,), the node at which an item ends.
        item_order: int32 (N,), items in trie order.
        first_item: int32 (num_nodes,), where a node's items begin in `item_order`.
        max_token: the largest token.
        max_children: the largest number of children of a node.
        token_ranges: for each depth, the smallest and the largest token that leads from it to the next.
        level_offsets: nodes of depth d are level_offsets[d] .. level_offsets[d + 1] - 1.

    Raises:
        TypeError: `sequences` are not integers.
        ValueError: no item, no level, an empty row, a token below -1 or a -1 that is not at a row's tail.
    """

    first_child: Tensor
    token: Tensor
    first_item: Tensor
    item_count: Tensor
    item_order: Tensor
    item_node: Tensor

    # Tensors made in inference mode could not be saved for a backward pass.
    @torch.inference_mode(False)
    def __init__(self, sequences: Any) -> None:
        rows = _as_rows(sequences)
        arrays = _core.build_trie(rows) if _core else build_with_numpy(rows)
        self._adopt({name: torch.from_numpy(array) for name, array in arrays.items()})

    def _adopt(self, arrays: dict[str, Tensor]) -> None:
        for name in ARRAYS:
            setattr(self, name, arrays[name])
        self._parent: Tensor | None = None
        self.max_token = int(self.token.max())
        self.max_children = int((self.first_child[1:] - self.first_child[:-1]).max())
        offsets = [0, 1]
        while offsets[-1] > offsets[-2]:
            offsets.append(int(self.first_child[offsets[-1]]))
        self.level_offsets = tuple(offsets[:-1])
        self.token_ranges = tuple(
            (int(tokens.min()), int(tokens.max()))
            for tokens in map(
                self.token.__getitem__, map(slice, self.level_offsets[1:-1], self.level_offsets[2:])
            )
        )

    @property
    def num_items(self) -> int:
        return self.item_node.numel()

    @property
    def num_nodes(self) -> int:
        return self.token.numel()

    @property
    def max_depth(self) -> int:
        return len(self.level_offsets) - 2

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(getattr(self, name).nbytes for name in ARRAYS)

    @property
    def device(self) -> torch.device:
        return self.token.device

    @property
    def parent(self) -> Tensor:
        """int32 (num_nodes,), the parent of each node, -1 for the root; made on first use."""
        # No cached_property: before Python 3.12 it takes a lock, which torch.compile cannot trace.
        if self._parent is None:
            self._parent = self._parents()
        return self._parent

    def _parents(self) -> Tensor:
        nodes = torch.arange(self.num_nodes, dtype=torch.int32, device=self.device)
        counts = (self.first_child[1:] - self.first_child[:-1]).long()
        parents = torch.repeat_interleave(nodes, counts, output_size=self.num_nodes - 1)
        return torch.cat([parents.new_full((1,), -1), parents])

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the arrays: two tries with the same one hold the same catalogue."""
        return fingerprint({name: getattr(self, name).cpu().numpy() for name in ARRAYS})

    def __repr__(self) -> str:
        return (
            f"PrefixTrie(num_items={self.num_items}, num_nodes={self.num_nodes}, "
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
        return self.token[int(self.first_child[node]) : int(self.first_child[node + 1])]

    def items(self, node: int) -> Tensor:
        """The items that end exactly at a node: int32, ascending."""
        node = self._checked(node)
        below = self.item_count[int(self.first_child[node]) : int(self.first_child[node + 1])].sum()
        first = int(self.first_item[node])
        return self.item_order[first : first + int(self.item_count[node] - below)]

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
        if torch.device(device) == self.device:
            return self
        moved = object.__new__(PrefixTrie)
        moved.__dict__.update({k: v for k, v in self.__dict__.items() if not isinstance(v, Tensor)})
        for name in ARRAYS:
            setattr(moved, name, getattr(self, name).to(device))
        moved._parent = None
        return moved

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; an older file at `path` stays whole until the new one is.

        Raises:
            FileNotFoundError: the folder of `path` does not exist.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path is {os.fspath(path)!r}, in a folder that does not exist")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        arrays = {name: getattr(self, name).cpu().contiguous() for name in ARRAYS}
        try:
            save_file(arrays, temporary, {"format": FORMAT, "fingerprint": self.fingerprint})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: str | os.PathLike[str]) -> PrefixTrie:
        """Reads what `save` wrote; the arrays are views of the mapped file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is foreign, truncated or damaged.
        """
        trie = object.__new__(cls)
        trie._adopt(read_arrays(path, "pt"))
        return trie


def _as_rows(sequences: Any) -> np.ndarray:
    if isinstance(sequences, Tensor):
        if sequences.is_floating_point() or sequences.is_complex():
            raise TypeError(f"sequences has dtype {sequences.dtype}, needs integers")
        sequences = sequences.detach().cpu().numpy()
    return as_rows(sequences)


def build_with_numpy(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What the C++ core builds, in NumPy: used without the extension, and to test it."""
    bad = (rows < -1).any(1) | (rows[:, 0] < 0) | ((rows[:, :-1] < 0) & (rows[:, 1:] >= 0)).any(1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"sequences has the row {row}: {rows[row].tolist()}, needs tokens, then only -1")
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    lengths = (ordered >= 0).sum(1)
    node, item_node = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    differs = np.arange(len(rows)) == 0
    token, first_item, item_count, fanout = [np.array([-1])], [np.array([0])], [np.array([len(rows)])], []
    level, next_level = 0, 1
    for depth in range(rows.shape[1]):
        alive = lengths > depth
        differs[1:] |= ordered[1:, depth] != ordered[:-1, depth]
        begin = np.flatnonzero(differs & alive)
        fanout.append(np.bincount(node[begin] - level, minlength=next_level - level))
        node = np.where(alive, next_level + np.cumsum(differs & alive) - 1, -1)
        token.append(ordered[begin, depth])
        first_item.append(begin)
        item_count.append(np.bincount(node[alive] - next_level, minlength=len(begin)))
        item_node[lengths == depth + 1] = node[lengths == depth + 1]
        level, next_level = next_level, next_level + len(begin)
    fanout.append(np.zeros(next_level - level, dtype=np.int64))
    by_item = np.empty(len(rows), dtype=np.int64)
    by_item[order] = item_node
    arrays = {
        "first_child": 1 + np.concatenate([[0], np.cumsum(np.concatenate(fanout))]),
        "token": np.concatenate(token),
        "first_item": np.concatenate(first_item),
        "item_count": np.concatenate(item_count),
        "item_order": order,
        "item_node": by_item,
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}
