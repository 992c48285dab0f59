"""The C++ core on NumPy arrays, for processes that serve and have no torch."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gflowgr.item_sets import SetBits, find_hidden, ids_of_sets, request, set_bits
from gflowgr.trie_arrays import ARRAYS, Arrays, Levels, addresses, as_rows, build, levels_of
from gflowgr.trie_file import read

_NO_FILTER = (0,) * 6
_DTYPES = {"float32": 0, "float64": 1, "float16": 3}


@dataclass(frozen=True)
class NumpySets:
    """What `NumpyTrie.item_sets` makes: sets of items, prepared once for many filters."""

    bits: SetBits
    trie: NumpyTrie

    @property
    def num_sets(self) -> int:
        return self.bits.num_sets


@dataclass(frozen=True)
class NumpyFilter:
    """What `NumpyTrie.filter` makes: what each row of a batch must not get, ready for the core."""

    hidden_offsets: NDArray[np.int64]
    hidden_nodes: NDArray[np.int32]
    bits: SetBits | None
    set_of_row: NDArray[np.int64] | None
    trie: NumpyTrie

    @property
    def num_rows(self) -> int:
        return self.hidden_offsets.size - 1

    def addresses(self) -> tuple[int, ...]:
        """As the core takes them."""
        hidden = (self.hidden_offsets.ctypes.data, self.hidden_nodes.ctypes.data)
        if self.bits is None or self.set_of_row is None:
            return (*hidden, 0, 0, self.num_rows, 0)
        nodes = self.bits.nodes
        return (*hidden, nodes.ctypes.data, self.set_of_row.ctypes.data, self.num_rows, nodes.shape[1])


class NumpyTrie:
    """A catalogue's prefix trie, with the ops that serving needs; imports neither torch nor Triton.

    Nodes, tokens and items are those of `gflowgr.PrefixTrie`, whose saved files it reads. `R` stands for any
    leading shape.

    Args:
        sequences: (N, L) integers, row i the tokens of item i as the model emits them, -1 pads tails.
        threads: that a call may use.

    Attributes:
        first_child, narrow_token, item_node, node_items: as in `PrefixTrie`.

    Raises:
        ImportError: the C++ core is not compiled.
        TypeError, ValueError: as `PrefixTrie`.
    """

    first_child: NDArray[np.int32]
    narrow_token: NDArray[Any]
    item_node: NDArray[np.int32]
    node_items: NDArray[np.int32]

    def __init__(self, sequences: Any, *, threads: int = 1) -> None:
        self._core = _compiled_core()
        arrays = build(as_rows(sequences))
        self._adopt(arrays, levels_of(arrays), threads)

    def _adopt(self, arrays: Arrays, levels: Levels, threads: int) -> None:
        self.threads = threads
        for name in ARRAYS:
            setattr(self, name, arrays[name])
        self._most_token = max(levels.largest_token)
        self._levels = levels
        self._arrays, self._ending = addresses(arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, threads: int = 1, verify: bool | None = None) -> NumpyTrie:
        """Maps what `PrefixTrie.save` wrote; `verify` as of `PrefixTrie.load`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is foreign, truncated or damaged.
        """
        trie = object.__new__(cls)
        trie._core = _compiled_core()
        saved = read(path, verify)
        trie._adopt(saved.arrays, saved.levels, threads)
        return trie

    def __getstate__(self) -> dict[str, Any]:
        # Neither the core nor addresses mean anything elsewhere.
        arrays = {name: getattr(self, name) for name in ARRAYS}
        return {"arrays": arrays, "levels": self._levels, "threads": self.threads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._core = _compiled_core()
        self._adopt(**state)

    @property
    def num_items(self) -> int:
        return self.item_node.size

    @property
    def num_nodes(self) -> int:
        return self.narrow_token.size

    def items(self, node: int) -> NDArray[np.int32]:
        """The items that end exactly at a node, ascending."""
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node is {node}, needs 0 .. {self.num_nodes - 1}")

        def end_of(rank: int) -> int:
            return int(self.item_node[self.node_items[rank]])

        ranks = range(self.node_items.size)
        return self.node_items[bisect_left(ranks, node, key=end_of) : bisect_right(ranks, node, key=end_of)]

    def walk(self, tokens: Any, start: Any = 0) -> NDArray[np.int64]:
        """The node after each token, -1 from the first off the trie on: (R, T), int or (R) -> (R, T)."""
        tokens = _integers("tokens", tokens)
        if tokens.ndim < 1:
            raise ValueError("tokens has shape (), needs at least one dimension")
        start = _integers(
            "start", np.broadcast_to(start, tokens.shape[:-1]) if np.ndim(start) == 0 else start
        )
        if start.shape != tokens.shape[:-1]:
            raise ValueError(f"start has shape {start.shape}, needs {tokens.shape[:-1]}")
        nodes = np.empty_like(tokens)
        self._core.walk(
            self._arrays, tokens.ctypes.data, start.ctypes.data, start.size, tokens.shape[-1],
            nodes.ctypes.data, self.threads,
        )  # fmt: skip
        return nodes

    def filter(self, exclude: Any = None, allow: Any = None, rows: int | None = None) -> NumpyFilter:
        """What each row of a batch must not get, for `log_softmax` and `sample` at every step.

        Args:
            exclude, allow, rows: as of `gflowgr.ItemFilter`; sets prepared before are those of `item_sets`.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or names no item.
        """
        asked = request(exclude, allow, rows, self.num_items)
        bits = None
        if isinstance(asked.sets, list):
            bits = set_bits(self._core, self._arrays, self._ending, asked.sets)
        elif isinstance(asked.sets, NumpySets) and asked.sets.trie is self:
            bits = asked.sets.bits
        elif asked.sets is not None:
            raise ValueError("allow has sets of another trie, needs what item_sets of this trie returns")
        found = find_hidden(self._core, self._arrays, self._ending, asked, bits, self.threads)
        return NumpyFilter(*found, bits, asked.set_of_row, self)

    def item_sets(self, sets: Any) -> NumpySets:
        """Sets of items, prepared once for the `allow` of many filters.

        Args:
            sets: each a list or an array of items, or an array of bools (N,).

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or names no item.
        """
        ids = ids_of_sets("sets", sets, self.num_items)
        return NumpySets(set_bits(self._core, self._arrays, self._ending, ids), self)

    def log_softmax(
        self, logits: NDArray[Any], nodes: Any, *, item_filter: NumpyFilter | None = None
    ) -> NDArray[Any]:
        """log_softmax over the (available) children of each row's node, -inf elsewhere.

        Args:
            logits: (R, V) float32, float64 or float16; tokens of the trie below V.
            nodes: (R) integers.
            item_filter: of this trie; its row b filters all of `logits[b]`.

        Returns:
            (R, V) float32, float64 for float64 logits.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape or vocabulary.
        """
        rows, nodes = self._rows(logits, nodes)
        out = np.empty(logits.shape, dtype=_sums(rows))
        self._core.log_softmax(
            self._arrays,
            self._filter(item_filter, logits),
            _raw(rows),
            nodes.ctypes.data,
            out.ctypes.data,
            self.threads,
        )
        return out

    def sample(
        self,
        logits: NDArray[Any],
        nodes: Any,
        generator: np.random.Generator,
        *,
        temperature: float = 1.0,
        item_filter: NumpyFilter | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        """Draws a child of each row's node from softmax(logits / temperature) over its children.

        One uniform number a row inverts the CDF, so the generator's seed fixes the draws.

        Args:
            logits: (R, V) float32, float64 or float16; tokens of the trie below V.
            nodes: (R) integers.
            generator: NumPy's.
            temperature: above 0.
            item_filter: of this trie; its row b filters all of `logits[b]`.

        Returns:
            tokens and nodes reached, int64 (R), and their log-probs at temperature 1, float32 (float64 for
            float64 logits). A row with nothing to draw (a leaf, -1, no available child) gives -1, -1 and 0.

        Raises:
            TypeError, ValueError: an argument has the wrong type, shape, vocabulary or range.
        """
        rows, nodes = self._rows(logits, nodes)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}, needs a finite number above 0")
        uniform = np.asarray(generator.random(nodes.shape))
        tokens, reached = np.empty_like(nodes), np.empty_like(nodes)
        log_probs = np.empty(nodes.shape, dtype=_sums(rows))
        self._core.sample(
            self._arrays, self._filter(item_filter, logits), _raw(rows), nodes.ctypes.data,
            uniform.ctypes.data, temperature, tokens.ctypes.data, reached.ctypes.data,
            log_probs.ctypes.data, self.threads,
        )  # fmt: skip
        return tokens, reached, log_probs

    def _filter(self, item_filter: NumpyFilter | None, logits: NDArray[Any]) -> tuple[int, ...]:
        if item_filter is None:
            return _NO_FILTER
        if not isinstance(item_filter, NumpyFilter):
            raise TypeError(
                f"item_filter is a {type(item_filter).__name__}, needs what NumpyTrie.filter returns"
            )
        if item_filter.trie is not self:
            raise ValueError("item_filter is of another trie, needs one of this trie")
        if logits.ndim < 2 or item_filter.num_rows != logits.shape[0]:
            raise ValueError(
                f"item_filter has {item_filter.num_rows} rows, needs as many as logits, {logits.shape[:-1]}"
            )
        return item_filter.addresses()

    def _rows(self, logits: NDArray[Any], nodes: Any) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """`logits` as (1, R, V), a view wherever strides allow, and `nodes` as the core reads them."""
        if not isinstance(logits, np.ndarray):
            raise TypeError(f"logits is a {type(logits).__name__}, needs a numpy.ndarray")
        if logits.dtype.name not in _DTYPES or not logits.dtype.isnative:
            raise TypeError(f"logits has dtype {logits.dtype}, needs one of {', '.join(_DTYPES)}")
        nodes = _integers("nodes", nodes)
        if logits.ndim < 1 or logits.shape[:-1] != nodes.shape:
            raise ValueError(f"nodes has shape {nodes.shape}, needs {logits.shape[:-1]} like logits' rows")
        most = self._most_token
        if most >= logits.shape[-1]:
            raise ValueError(
                f"logits has {logits.shape[-1]} columns, needs more than the largest token, {most}"
            )
        if not logits.flags.aligned or any(stride % logits.itemsize for stride in logits.strides):
            logits = np.ascontiguousarray(logits)
        return logits.reshape(1, nodes.size, logits.shape[-1]), nodes


def _compiled_core() -> ModuleType:
    try:
        from gflowgr import _core
    except ImportError as error:
        raise ImportError(
            "the C++ extension is not compiled; reinstall with `pip install .` and a C++20 compiler"
        ) from error
    return _core


def _raw(rows: NDArray[Any]) -> tuple[int, ...]:
    strides = (stride // rows.itemsize for stride in rows.strides)
    return (rows.ctypes.data, _DTYPES[rows.dtype.name], *rows.shape, *strides, 0)


def _sums(rows: NDArray[Any]) -> type[np.floating[Any]]:
    return np.float64 if rows.dtype == np.float64 else np.float32


def _integers(name: str, values: Any) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {array.dtype}, needs integers")
    return np.ascontiguousarray(array, dtype=np.int64).reshape(array.shape)
