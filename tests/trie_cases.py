"""Catalogues for the tests of tries, and when a trie is the right one."""

from __future__ import annotations

import torch
from core_oracle import DictTrie
from hypothesis import strategies as st

from gflowgr import PrefixTrie
from gflowgr.trie_arrays import ARRAYS

DERIVED = ("token", "parent", "first_item", "item_count", "item_order")
ROWS = [[1, 2], [1, 3], [4, -1], [4, 5], [4, 5]]
LARGEST = 2**31 - 2
any_token = st.one_of(st.integers(0, 9), st.integers(LARGEST - 5, LARGEST), st.integers(0, LARGEST))


def assert_same(one: PrefixTrie, other: PrefixTrie) -> None:
    for name in (*ARRAYS, *DERIVED):
        assert torch.equal(getattr(one, name).cpu(), getattr(other, name).cpu()), name
    assert one.fingerprint == other.fingerprint
    assert (one.level_offsets, one.token_ranges) == (other.level_offsets, other.token_ranges)
    assert (one.max_token, one.max_children, one.max_depth) == (
        other.max_token,
        other.max_children,
        other.max_depth,
    )


def assert_is(trie: PrefixTrie, rows: list[list[int]]) -> None:
    """The trie is the one that brute force finds in `rows`."""
    oracle = DictTrie(rows)
    nodes = range(len(oracle))
    assert (trie.num_items, trie.num_nodes, trie.max_depth) == (len(rows), len(oracle), oracle.depth)
    for name in (*ARRAYS, *DERIVED):
        narrow = name == "narrow_token" and max(map(max, rows)) < 2**16
        assert getattr(trie, name).dtype == (torch.uint16 if narrow else torch.int32)
    ends = [max(oracle.children(node).values(), default=None) for node in nodes]
    fanout = [len(oracle.children(node)) for node in nodes]
    assert trie.first_child.tolist() == [1 + sum(fanout[:node]) for node in range(len(oracle) + 1)]
    for node in nodes:
        first, end = trie.first_child[node : node + 2].tolist()
        assert list(range(first, end)) == list(oracle.children(node).values())
        assert ends[node] in (None, end - 1)
        assert trie.children(node).tolist() == list(oracle.children(node))
        assert trie.items(node).tolist() == oracle.ending_at(node)
        begin = int(trie.first_item[node])
        count = int(trie.item_count[node])
        assert count == len(oracle.under(node))
        assert sorted(trie.item_order[begin : begin + count].tolist()) == oracle.under(node)
    assert trie.token.tolist() == [prefix[-1] if prefix else -1 for prefix in oracle.prefixes]
    assert trie.item_node.tolist() == [oracle.number[path] for path in oracle.paths]
    assert trie.item_order.tolist() == sorted(range(len(rows)), key=lambda item: oracle.paths[item])
    assert trie.node_items.tolist() == sorted(range(len(rows)), key=lambda item: int(trie.item_node[item]))
    assert trie.narrow_token[1:].tolist() == trie.token[1:].tolist()
    assert trie.parent.tolist() == oracle.parent
    depths = [len(prefix) for prefix in oracle.prefixes]
    assert trie.level_offsets == tuple(sum(d < depth for d in depths) for depth in range(oracle.depth + 2))
    levels = [{prefix[-1] for prefix in oracle.prefixes if len(prefix) == d + 1} for d in range(oracle.depth)]
    assert trie.token_ranges == tuple((min(tokens), max(tokens)) for tokens in levels)
    assert trie.max_token == max(max(tokens) for tokens in levels)
    assert trie.max_children == max(fanout)
    by_depth = [max(fanout[node] for node in nodes if depths[node] == depth) for depth in range(oracle.depth)]
    assert trie.max_children_at == tuple(by_depth)
    assert trie.nbytes == trie.narrow_token.nbytes + 4 * (len(oracle) + 1 + 2 * len(rows))
    assert trie.sequences().tolist() == [[*path, *[-1] * (oracle.depth - len(path))] for path in oracle.paths]
