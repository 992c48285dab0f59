"""A catalogue as NumPy arrays: built, changed and checked, by the C++ core or, without it, by NumPy."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    from gflowgr import _core
except ImportError:
    _core = None  # type: ignore[assignment]

# Nodes in breadth-first order, the root first. The children of n are first_child[n] .. first_child[n+1] - 1.
# narrow_token is the token on the edge into a node, uint16 if all fit, else int32. item_node is where each
# item ends, -1 for one that was removed; node_items has those that were not, sorted by (node, item).
ARRAYS = ("first_child", "narrow_token", "item_node", "node_items")

Arrays = dict[str, NDArray[Any]]
_LARGEST = 2**31 - 1
_LARGEST_NARROW = 2**16 - 1


class Levels(NamedTuple):
    """What can be told of a trie depth by depth.

    Attributes:
        offsets: where the nodes of each depth begin, and after the last, where they end.
        most_children: the most children of a node of each depth that has any.
        smallest_token: on the edges that lead on from each such depth.
        largest_token: the same.
    """

    offsets: tuple[int, ...]
    most_children: tuple[int, ...]
    smallest_token: tuple[int, ...]
    largest_token: tuple[int, ...]


def as_rows(sequences: Any) -> np.ndarray:
    """`sequences` as a C-contiguous int32 or int64 array (N, L), checked for all but its content."""
    try:
        rows = np.asarray(sequences)
    except ValueError as error:
        raise ValueError(
            "sequences has rows of different lengths, needs (N, L) with -1 at the tails"
        ) from error
    if rows.size and rows.dtype.kind not in "iu":
        raise TypeError(f"sequences has dtype {rows.dtype}, needs integers")
    if rows.ndim != 2 or 0 in rows.shape:
        raise ValueError(
            f"sequences has shape {rows.shape}, needs (N, L) with at least one item and one level"
        )
    # Before anything that takes time or memory in proportion: such rows may be one number, broadcast.
    if max(rows.shape) > _LARGEST:
        raise ValueError(f"sequences has shape {rows.shape}, needs at most 2**31 - 1 rows and levels")
    if rows.max() >= _LARGEST:
        raise ValueError(f"sequences has the token {rows.max()}, needs tokens below 2**31 - 1")
    return np.ascontiguousarray(rows, dtype=np.int32 if rows.dtype.itemsize <= 4 else np.int64)


def build(rows: np.ndarray) -> Arrays:
    """The arrays of what `as_rows` returned."""
    return _core.build_trie(rows) if _core else build_with_numpy(rows)


def add(arrays: Arrays, rows: np.ndarray) -> Arrays:
    """The same catalogue with more items, which get the next numbers."""
    if _core:
        return _core.add_items(*addresses(arrays), rows)
    own = sequences_of(arrays)
    joined = np.full((len(own) + len(rows), max(own.shape[1], rows.shape[1])), -1, dtype=np.int64)
    joined[: len(own), : own.shape[1]] = own
    joined[len(own) :, : rows.shape[1]] = rows
    return _rebuilt(joined, np.append(arrays["item_node"] >= 0, np.ones(len(rows), dtype=bool)))


def remove(arrays: Arrays, items: NDArray[np.int64]) -> Arrays:
    """The same catalogue without some items, each named once and present; others keep their numbers."""
    if _core:
        return _core.remove_items(*addresses(arrays), items.ctypes.data, items.size)
    present = arrays["item_node"] >= 0
    present[items] = False
    if not present.any():
        raise ValueError("items has all that the trie holds, needs to leave at least one")
    return _rebuilt(sequences_of(arrays), present)


def _rebuilt(rows: np.ndarray, present: NDArray[np.bool_]) -> Arrays:
    (numbers,) = present.nonzero()
    arrays = build_with_numpy(rows[present])
    item_node = np.full(len(rows), -1, dtype=np.int32)
    item_node[numbers] = arrays["item_node"]
    return arrays | {"item_node": item_node, "node_items": numbers[arrays["node_items"]].astype(np.int32)}


def addresses(arrays: Arrays) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A trie and its items as the core takes them; `arrays` has to outlive their use."""
    first_child, token, item_node, node_items = (arrays[name] for name in ARRAYS)
    trie = (first_child.ctypes.data, token.ctypes.data, token.itemsize, token.size)
    return trie, (item_node.ctypes.data, node_items.ctypes.data, node_items.size, item_node.size)


def levels_of(arrays: Arrays) -> Levels:
    if _core:
        return Levels(*map(tuple, _core.levels(addresses(arrays)[0])))
    return levels_with_numpy(arrays)


def levels_with_numpy(arrays: Arrays) -> Levels:
    first_child, token = arrays["first_child"], arrays["narrow_token"]
    offsets = [0, 1]
    while offsets[-1] < token.size:
        offsets.append(int(first_child[offsets[-1]]))
    depths = range(len(offsets) - 2)
    fanout = np.diff(first_child)
    tokens = [token[offsets[depth + 1] : offsets[depth + 2]] for depth in depths]
    return Levels(
        tuple(offsets),
        tuple(int(fanout[offsets[depth] : offsets[depth + 1]].max()) for depth in depths),
        tuple(int(each.min()) for each in tokens),
        tuple(int(each.max()) for each in tokens),
    )


def sequences_of(arrays: Arrays) -> NDArray[np.int64]:
    """The rows that the items were built from, (N, L); all -1 for one that was removed."""
    offsets, first_child = np.array(levels_of(arrays).offsets), arrays["first_child"]
    node = arrays["item_node"].astype(np.int64)
    rows = np.full((node.size, len(offsets) - 2), -1, dtype=np.int64)
    for depth in range(rows.shape[1], 0, -1):
        (here,) = ((node >= offsets[depth]) & (node < offsets[depth + 1])).nonzero()
        rows[here, depth - 1] = arrays["narrow_token"][node[here]]
        level = first_child[offsets[depth - 1] : offsets[depth]]
        node[here] = offsets[depth - 1] + np.searchsorted(level, node[here], side="right") - 1
    return rows


def build_with_numpy(rows: np.ndarray) -> Arrays:
    """What the C++ core builds, in NumPy: used without the extension, and to test it."""
    bad = (rows < -1).any(1) | (rows[:, 0] < 0) | ((rows[:, :-1] < 0) & (rows[:, 1:] >= 0)).any(1)
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"sequences has the row {row}: {rows[row].tolist()}, needs tokens, then only -1")
    order = np.lexsort(rows.T[::-1])
    ordered = rows[order]
    lengths = (ordered >= 0).sum(1)
    node, ends = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    differs = np.arange(len(rows)) == 0
    token, fanout = [np.array([-1])], []
    level, next_level = 0, 1
    for depth in range(rows.shape[1]):
        alive = lengths > depth
        differs[1:] |= ordered[1:, depth] != ordered[:-1, depth]
        begin = np.flatnonzero(differs & alive)
        fanout.append(np.bincount(node[begin] - level, minlength=next_level - level))
        node = np.where(alive, next_level + np.cumsum(differs & alive) - 1, -1)
        token.append(ordered[begin, depth])
        ends[lengths == depth + 1] = node[lengths == depth + 1]
        level, next_level = next_level, next_level + len(begin)
    fanout.append(np.zeros(next_level - level, dtype=np.int64))
    tokens = np.concatenate(token)
    item_node = np.empty(len(rows), dtype=np.int32)
    item_node[order] = ends
    return {
        "first_child": (1 + np.concatenate([[0], np.cumsum(np.concatenate(fanout))])).astype(np.int32),
        "narrow_token": tokens.astype(np.uint16 if tokens.max() <= _LARGEST_NARROW else np.int32),
        "item_node": item_node,
        "node_items": item_node.argsort(kind="stable").astype(np.int32),
    }


def fingerprint(arrays: Arrays) -> str:
    """A digest of the arrays: two tries with the same one hold the same catalogue."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ARRAYS:
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name}:{array.dtype.name}:{array.size};".encode())
        digest.update(array.data)
    return digest.hexdigest()


def verify(arrays: Arrays) -> None:
    """Raises ValueError unless the arrays are those of some trie."""
    for name, array in arrays.items():
        wanted = (np.uint16, np.int32) if name == "narrow_token" else (np.int32,)
        if array.dtype not in wanted or array.ndim != 1:
            kinds = " or ".join(np.dtype(kind).name for kind in wanted)
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, needs {kinds} (n,)")
    first_child, token, item_node, node_items = (arrays[name] for name in ARRAYS)
    nodes, items = token.size, item_node.size
    if first_child.size != nodes + 1:
        raise ValueError(f"first_child has {first_child.size} entries, needs {nodes + 1}")
    if nodes < 2 or items < 1:
        raise ValueError(f"it has {nodes} nodes and {items} items, needs at least 2 and 1")

    def require(holds: Any, what: str) -> None:
        if not np.all(holds):
            raise ValueError(what)

    require([first_child[0] == 1, first_child[-1] == nodes], "first_child does not span the nodes")
    require(first_child[1:] >= first_child[:-1], "first_child decreases")
    require(first_child[:-1] > np.arange(nodes), "a node comes before its parent")
    root = _LARGEST_NARROW if token.dtype == np.uint16 else -1
    require([token[0] == root], "the root has a token")
    require(token[1:] >= 0, "narrow_token has a negative entry")
    require(
        token.dtype == np.uint16 or token.max() > _LARGEST_NARROW,
        "narrow_token is int32, though uint16 would hold all tokens",
    )
    opens = np.zeros(nodes + 1, dtype=bool)
    opens[first_child] = True
    require((token[1:-1] < token[2:]) | opens[2:nodes], "siblings are not in ascending order")
    require((item_node >= -1) & (item_node != 0) & (item_node < nodes), "item_node leaves the trie")
    require((node_items >= 0) & (node_items < items), "node_items leaves the catalogue")
    times = np.bincount(node_items, minlength=items)
    require(times == (item_node >= 0), "node_items does not hold each item that is present once")
    ends = item_node[node_items]
    require(ends[1:] >= ends[:-1], "node_items is not in the order of the nodes")
    ascends = (node_items[1:] > node_items[:-1]) | (ends[1:] > ends[:-1])
    require(ascends, "the items of a node are not in ascending order")
    leads_on = first_child[1:] > first_child[:-1]
    leads_on[ends] = True
    require(leads_on, "a leaf has no item")
