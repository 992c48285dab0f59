"""Items as callers name them (lists, padded arrays and tensors, masks) as checked arrays; needs no torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

# Bits of a word of a bit set.
WORD = 32


@dataclass(frozen=True)
class SetBits:
    """Item sets of one trie, prepared: for each a bit an item, and a bit a node at or above one of them.

    `items` is int32 (G, ceil(num_items / 32)), `nodes` int32 (G, ceil(num_nodes / 32)).
    """

    items: NDArray[np.int32]
    nodes: NDArray[np.int32]

    @property
    def num_sets(self) -> int:
        return len(self.items)


class Prepared(Protocol):
    """Item sets that need no more work."""

    @property
    def num_sets(self) -> int: ...


@dataclass(frozen=True)
class Request:
    """What a caller asks of a filter: its rows, what they must not get, what they may.

    `excluded` is row * num_items + item, ascending, without repeats; without `sets`, every item is allowed.
    """

    rows: int
    excluded: NDArray[np.int64]
    sets: list[NDArray[np.int64]] | Prepared | None
    set_of_row: NDArray[np.int64] | None


def request(exclude: Any, allow: Any, rows: int | None, num_items: int) -> Request:
    """The arguments of a filter, checked.

    Raises:
        TypeError, ValueError: one of them is of no such form, names an item out of range, or has other rows.
    """
    counts: dict[str, int] = {} if rows is None else {"rows": _count(rows)}
    excluded = np.zeros(0, dtype=np.int64)
    if exclude is not None:
        row, item, counts["exclude"] = _rows_of_items("exclude", _plain(exclude), num_items)
        excluded = np.unique(row * num_items + item)
    sets, set_of_row = _allowed(allow, num_items)
    if set_of_row is not None:
        counts["allow"] = set_of_row.size
    if not counts:
        raise ValueError("rows is None, needs the number of rows, which neither exclude nor allow tells")
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {count} rows" for name, count in counts.items())
        raise ValueError(f"{found}; needs the same number")
    number = next(iter(counts.values()))
    if sets is not None and set_of_row is None:
        set_of_row = np.zeros(number, dtype=np.int64)
    return Request(number, excluded, sets, set_of_row)


def ids_of_sets(name: str, given: Any, num_items: int) -> list[NDArray[np.int64]]:
    """A list of item sets, each as ids.

    Raises:
        TypeError, ValueError: as `request`.
    """
    given = _plain(given)
    if not (_is_list(given) or isinstance(given, np.ndarray)):
        raise TypeError(f"{name} is a {type(given).__name__}, needs a list of item sets")
    return [_item_ids(f"{name}[{i}]", each, num_items) for i, each in enumerate(given)]


def set_bits(
    core: ModuleType, trie: tuple[int, ...], ending: tuple[int, ...], sets: list[NDArray[np.int64]]
) -> SetBits:
    """Prepares sets by the C++ core, which takes a trie and its items as addresses and sizes."""
    bits = SetBits(_no_bits(len(sets), ending[-1]), _no_bits(len(sets), trie[-1]))
    for members, items, nodes in zip(sets, bits.items, bits.nodes, strict=True):
        core.allow(trie, ending, members.ctypes.data, members.size, items.ctypes.data, nodes.ctypes.data)
    return bits


def find_hidden(
    core: ModuleType,
    trie: tuple[int, ...],
    ending: tuple[int, ...],
    asked: Request,
    bits: SetBits | None,
    threads: int,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The offsets and the hidden nodes of a filter, by the C++ core."""
    of_row: list[tuple[int, int]] = []
    if bits is not None and asked.set_of_row is not None:
        addresses = [
            (items.ctypes.data, nodes.ctypes.data)
            for items, nodes in zip(bits.items, bits.nodes, strict=True)
        ]
        of_row = [addresses[number] for number in asked.set_of_row]
    offsets = np.searchsorted(asked.excluded, np.arange(asked.rows + 1) * ending[-1])
    return core.hidden_nodes(
        trie, ending, offsets.ctypes.data, asked.excluded.ctypes.data, asked.rows, of_row, threads
    )


def _no_bits(sets: int, size: int) -> NDArray[np.int32]:
    return np.zeros((sets, -(-size // WORD)), dtype=np.int32)


def _allowed(
    allow: Any, num_items: int
) -> tuple[list[NDArray[np.int64]] | Prepared | None, NDArray[np.int64] | None]:
    """The sets of `allow`, and the set of each row; None where one set serves every row."""
    if allow is None:
        return None, None
    if hasattr(allow, "num_sets"):
        if allow.num_sets != 1:
            raise ValueError(f"allow has {allow.num_sets} sets, needs one, or (sets, the set of each row)")
        return allow, None
    if isinstance(allow, tuple) and len(allow) == 2 and hasattr(allow[0], "num_sets"):
        return allow[0], _set_numbers("allow[1]", _plain(allow[1]), allow[0].num_sets)
    return _item_sets("allow", _plain(allow), num_items)


def _plain(given: Any) -> Any:
    """Tensors as arrays, also those in a list or a tuple."""
    if isinstance(given, (list, tuple)) and len(given) and not isinstance(given[0], (int, np.integer)):
        return type(given)(_plain(each) for each in given)
    if not hasattr(given, "detach"):
        return given
    # NumPy has no bfloat16; that it is no integer is said below.
    return (given.detach().double() if given.is_floating_point() else given).cpu().numpy()


def _rows_of_items(name: str, given: Any, num_items: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """The rows and the items of every entry of (B, E) integers, or of B lists of items, and B."""
    if isinstance(given, np.ndarray):
        if given.ndim != 2:
            raise ValueError(f"{name} has shape {given.shape}, needs (B, E) or a list of B lists of items")
        count, width = given.shape
        items = _item_ids(name, given.reshape(-1), num_items, padded=True)
        lengths = np.full(count, width)
    else:
        if not _is_list(given):
            kind = type(given).__name__
            raise TypeError(f"{name} is a {kind}, needs (B, E) integers or a list of lists of items")
        count, flat = len(given), _concatenated(name, given)
        items = _item_ids(name, flat, num_items, padded=True)
        lengths = np.array([len(each) for each in given], dtype=np.int64)
    rows = np.repeat(np.arange(count), lengths)
    return rows[items >= 0], items[items >= 0], count


def _concatenated(name: str, lists: Any) -> Any:
    """The entries of all lists one after the other."""
    if len(lists) and all(isinstance(each, np.ndarray) and each.dtype == np.int64 for each in lists):
        return np.concatenate(lists)
    lists = [each.tolist() if isinstance(each, np.ndarray) else each for each in lists]
    for i, each in enumerate(lists):
        if not _is_list(each):
            raise TypeError(f"{name}[{i}] is a {type(each).__name__}, needs a list of items")
    return list(chain.from_iterable(lists))


def _item_sets(
    name: str, given: Any, num_items: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64] | None]:
    """Item sets, each as ids, and the set of each row; None where one set serves every row."""
    if isinstance(given, tuple):
        if len(given) != 2:
            raise TypeError(f"{name} is a tuple of {len(given)}, needs (sets, the set of each row)")
        if not (_is_list(given[0]) or isinstance(given[0], np.ndarray)):
            raise TypeError(f"{name}[0] is a {type(given[0]).__name__}, needs a list of item sets")
        sets = [_item_ids(f"{name}[0][{i}]", each, num_items) for i, each in enumerate(given[0])]
        return sets, _set_numbers(f"{name}[1]", given[1], len(sets))
    if not (isinstance(given, np.ndarray) or _is_list(given)):
        kind = type(given).__name__
        raise TypeError(f"{name} is a {kind}, needs items, a mask, or one of them for each row")
    if isinstance(given, np.ndarray) and given.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {given.shape}, needs one dimension for a set, two for rows")
    first = given[0] if len(given) else 0
    if not (_is_list(first) or np.ndim(first)):
        return [_item_ids(name, given, num_items)], None
    sets = [_item_ids(f"{name}[{i}]", each, num_items) for i, each in enumerate(given)]
    return sets, np.arange(len(sets))


def _item_ids(name: str, given: Any, num_items: int, *, padded: bool = False) -> NDArray[np.int64]:
    """Ids (n,), in which -1 is padding, or a mask (num_items,); `padded` keeps the -1 and takes no mask."""
    values = np.asarray(given)
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}, needs one dimension")
    if values.dtype.kind == "b" and not padded:
        if values.size != num_items:
            raise ValueError(f"{name} is a mask of {values.size} items, needs {num_items}")
        return np.flatnonzero(values)
    if values.size and values.dtype.kind not in "iu":
        needed = "integers" if padded else "integers or a mask of bools"
        raise TypeError(f"{name} has dtype {values.dtype}, needs {needed}")
    wrong = (values < -1) | (values >= num_items)
    if wrong.any():
        item = values[wrong][0]
        raise ValueError(f"{name} has the item {item}, needs 0 .. {num_items - 1}, or -1 for padding")
    values = values.astype(np.int64)
    return np.ascontiguousarray(values if padded else values[values >= 0])


def _set_numbers(name: str, given: Any, sets: int) -> NDArray[np.int64]:
    values = np.asarray(given)
    if values.size and values.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {values.dtype}, needs integers")
    if values.ndim != 1:
        raise ValueError(f"{name} has shape {values.shape}, needs (B,)")
    wrong = (values < 0) | (values >= sets)
    if wrong.any():
        raise ValueError(f"{name} has the set {values[wrong][0]}, needs 0 .. {sets - 1}")
    return values.astype(np.int64)


def _is_list(given: Any) -> bool:
    return isinstance(given, Sequence) and not isinstance(given, str)


def _count(rows: int) -> int:
    try:
        count = operator.index(rows)
    except TypeError as error:
        raise TypeError(f"rows is {rows!r}, needs an integer") from error
    if count < 0:
        raise ValueError(f"rows is {count}, needs at least 0")
    return count
