"""Items added and removed: the arrays are those of a trie built anew of the items that are present."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from gflowgr import PrefixTrie
from gflowgr.trie_arrays import build_with_numpy

Rows = Sequence[Sequence[int]]


def rebuilt(rows: Rows, present: Sequence[int]) -> dict[str, np.ndarray]:
    """The arrays of the present items, under the numbers that they have among all."""
    levels = max(len(rows[item]) for item in present)
    table = np.full((len(present), levels), -1, dtype=np.int64)
    for at, item in enumerate(present):
        table[at, : len(rows[item])] = rows[item]
    arrays = build_with_numpy(table)
    item_node = np.full(len(rows), -1, dtype=np.int32)
    item_node[list(present)] = arrays["item_node"]
    return arrays | {"item_node": item_node, "node_items": np.array(present)[arrays["node_items"]]}


def require_same(trie: PrefixTrie, rows: Rows, present: Sequence[int]) -> None:
    for name, wanted in rebuilt(rows, present).items():
        found = getattr(trie, name).numpy()
        assert found.tolist() == wanted.tolist(), name
        if name == "narrow_token":
            assert found.dtype == wanted.dtype


@pytest.mark.parametrize(
    "added", [[[0]], [[9]], [[5]], [[5, 6]], [[5, 6, 7]], [[5, 6, 7, 8, 9]], [[1], [5, 1]]]
)
def test_added_rows_may_be_shorter_or_longer_than_the_trie_is_deep(added: list[list[int]]) -> None:
    """Rows with fewer levels than the trie left its last level unwritten; a fuzzer found it."""
    rows = [[5, 6, 7], [5, 8, 2**31 - 5]]
    levels = max(map(len, added))
    padded = [row + [-1] * (levels - len(row)) for row in added]
    trie = PrefixTrie(rows).add(padded)
    require_same(trie, rows + added, range(len(rows + added)))
    back = trie.remove(range(len(rows), len(rows + added)))
    require_same(back, rows + added, range(len(rows)))
    assert back.max_depth == 3 and trie.max_depth == max(3, levels)


def test_tokens_widen_and_come_back() -> None:
    rows = [[1, 2], [65535, 3], [65536, 4]]
    trie = PrefixTrie(rows[:2])
    wide = trie.add(rows[2:])
    assert trie.narrow_token.dtype == torch.uint16 and wide.narrow_token.dtype == torch.int32
    require_same(wide, rows, [0, 1, 2])
    require_same(wide.remove([2]), rows, [0, 1])
    require_same(wide.remove([0]), rows, [1, 2])


def test_a_version_outlives_those_it_was_made_of() -> None:
    rows = [[1, 2], [1, 3], [4, 5]]
    trie = PrefixTrie(rows[:2])
    versions = [trie, trie.add(rows[2:]), trie.add(rows[2:]).remove([0])]
    del trie
    require_same(versions[0], rows[:2], [0, 1])
    require_same(versions[1], rows, [0, 1, 2])
    require_same(versions[2], rows, [1, 2])


def test_one_item_stays() -> None:
    with pytest.raises(ValueError, match="needs to leave at least one"):
        PrefixTrie([[1, 2], [1, 3]]).remove([1, 0])
