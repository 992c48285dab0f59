"""Exact item filters against sets of items in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import FLOATS, LAYOUTS, assert_close, backends, device_of, for_all, laid_out, sums
from filter_cases import Filtered, filtered
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import ItemFilter, PrefixTrie, ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ROWS = [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6], [7, 0, -1], [7, 3, -1], [7, 9, -1]]


def hidden_nodes(item_filter: ItemFilter, row: int) -> list[int]:
    begin, end = item_filter.hidden_offsets[row : row + 2].tolist()
    return item_filter.hidden_nodes[begin:end].tolist()


def is_allowed(item_filter: ItemFilter, row: int, node: int) -> bool:
    if item_filter.allowed is None or item_filter.allowed_set is None:
        return True
    words = item_filter.allowed[item_filter.allowed_set[row]].tolist()
    return bool(words[node // 32] >> (node % 32) & 1)


def assert_means(item_filter: ItemFilter, case: Filtered) -> None:
    assert item_filter.num_rows == case.contexts
    assert item_filter.hidden_offsets.dtype == torch.int64
    assert item_filter.hidden_nodes.dtype == torch.int32
    for row in range(case.contexts):
        hidden = hidden_nodes(item_filter, row)
        assert hidden == sorted(set(hidden))
        for node in range(len(case.oracle)):
            found = node not in hidden and is_allowed(item_filter, row, node)
            assert found == case.available(row, node)
    items = torch.arange(-1, len(case.rows) + 1).expand(case.contexts, -1)
    wanted = [[item not in case.left(row) for item in each] for row, each in enumerate(items.tolist())]
    assert item_filter.hides(items).tolist() == wanted


@given(filtered())
def test_availability(case: Filtered) -> None:
    assert_means(case.filter(case.trie(torch.device("cpu"))), case)


@given(filtered(), st.lists(st.integers(0, 3), max_size=6))
def test_select(case: Filtered, rows: list[int]) -> None:
    """Some rows of a filter are the filter of some rows."""
    rows = [row % case.contexts for row in rows]
    chosen = case.filter(case.trie(torch.device("cpu"))).select(rows)
    of_row = None if case.set_of_row is None else [case.set_of_row[row] for row in rows]
    exclude = None if case.exclude is None else [case.exclude[row] for row in rows]
    same = {**vars(case), "exclude": exclude, "set_of_row": of_row, "contexts": len(rows)}
    fields = Filtered.__dataclass_fields__
    assert_means(chosen, Filtered(**{name: value for name, value in same.items() if name in fields}))


def test_a_moved_filter_is_the_same() -> None:
    trie = PrefixTrie(ROWS)
    item_filter = ItemFilter(trie, [[0], [3, 4]], allow=[0, 1, 2, 3, 4])
    assert item_filter.to("cpu") is item_filter
    moved = item_filter.to("meta")
    assert moved.device == moved.allowed.device == torch.device("meta")  # type: ignore[union-attr]
    assert moved.num_rows == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "rows is None"),
        ({"exclude": [[0], [8]]}, ValueError, r"exclude has the item 8, needs 0 \.\. 7"),
        ({"exclude": [[0], [-2]]}, ValueError, "exclude has the item -2"),
        ({"exclude": torch.tensor([[0, 9]])}, ValueError, "exclude has the item 9"),
        ({"exclude": torch.tensor([0, 1])}, ValueError, r"exclude has shape \(2,\)"),
        ({"exclude": torch.tensor([[0.5]])}, TypeError, "exclude has dtype torch.float32"),
        ({"exclude": [[0.5]]}, TypeError, "exclude has dtype torch.float64"),
        ({"exclude": torch.zeros(2, 8, dtype=torch.bool)}, TypeError, "exclude has dtype torch.bool"),
        ({"exclude": [0, 1]}, TypeError, r"exclude\[0\] is a int"),
        ({"exclude": 3}, TypeError, "exclude is a int"),
        ({"allow": 3}, TypeError, "allow is a int"),
        ({"allow": [0, 8], "rows": 1}, ValueError, "allow has the item 8"),
        ({"allow": [[0], [8]]}, ValueError, r"allow\[1\] has the item 8"),
        (
            {"allow": torch.ones(5, dtype=torch.bool), "rows": 1},
            ValueError,
            "allow is a mask of 5 items, needs 8",
        ),
        ({"allow": torch.zeros(1, 1, 1)}, ValueError, r"allow has shape \(1, 1, 1\)"),
        ({"allow": ([[0]], [1])}, ValueError, r"allow\[1\] has the set 1"),
        ({"allow": ([[0]], [0.0])}, TypeError, r"allow\[1\] has dtype torch.float32"),
        ({"allow": ([[0]], [[0]])}, ValueError, r"allow\[1\] has shape \(1, 1\)"),
        ({"allow": ([[0]], [0], 1)}, TypeError, "allow is a tuple of 3"),
        ({"exclude": [[0]], "rows": 2}, ValueError, "rows has 2 rows, exclude has 1 rows"),
        ({"exclude": [[0]], "allow": [[0], [1]]}, ValueError, "exclude has 1 rows, allow has 2 rows"),
        ({"rows": 1.5}, TypeError, "rows is 1.5"),
        ({"rows": -1}, ValueError, "rows is -1"),
    ],
)
def test_bad_filters_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ItemFilter(PrefixTrie(ROWS), **options)


def test_a_trie_is_needed() -> None:
    with pytest.raises(TypeError, match="trie is a list"):
        ItemFilter(ROWS, [[0]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item_filter", "error", "message"),
    [
        ([[0]], TypeError, "item_filter is a list"),
        (ItemFilter(PrefixTrie(ROWS), rows=3), ValueError, "item_filter has 3 rows, needs 2"),
        (ItemFilter(PrefixTrie([[1]]), rows=2), ValueError, "item_filter is of a trie of 2 nodes"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda logits, trie, f: ops.trie_child_log_probs(
            logits[:, 0], torch.zeros(2).long(), trie, item_filter=f
        ),
    ],
)
def test_bad_filters_are_refused_by_the_ops(
    call: Callable[..., Any], item_filter: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3, 10), PrefixTrie(ROWS), item_filter)


def test_columns_must_serve_a_depth() -> None:
    with pytest.raises(ValueError, match=r"logits has columns for the tokens 2 \.\. 3"):
        ops.trie_child_log_probs(torch.zeros(1, 2), torch.zeros(1).long(), PrefixTrie(ROWS), first_token=2)
    for wrong, error in ((-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match=f"first_token is {wrong}"):
            ops.trie_child_log_probs(
                torch.zeros(1, 10),
                torch.zeros(1).long(),
                PrefixTrie(ROWS),
                first_token=wrong,  # type: ignore[arg-type]
            )
    with pytest.raises(ValueError, match="width is 0"):
        ops.trie_child_log_probs(torch.zeros(1, 10), torch.zeros(1).long(), PrefixTrie(ROWS), width=0)


@pytest.mark.parametrize("backend", backends("trie_child_log_probs"))
def test_child_log_probs(backend: str) -> None:
    def check(drawn: tuple[Filtered, tuple[int, ...], torch.dtype, str, bool, int, int | None]) -> None:
        case, inner, dtype, layout, has_filter, first_token, width = drawn
        device = device_of(backend)
        trie = case.trie(device)
        item_filter = case.filter(trie) if has_filter else None
        nodes = case.nodes((case.contexts, *inner))
        first_token = min(first_token, min(low for low, _ in trie.token_ranges))
        logits = laid_out(case.normals((*nodes.shape, case.width - first_token)).to(dtype), layout)
        ours = ops.trie_child_log_probs(
            logits.to(device),
            laid_out(nodes, layout).to(device) if layout != "expanded" else nodes.to(device),
            trie,
            item_filter=item_filter,
            first_token=first_token,
            width=width,
            backend=backend,
        )
        columns = trie.max_children if width is None else width
        assert ours.dtype == sums(dtype)
        assert ours.shape == (*nodes.shape, columns)
        for row in torch.cartesian_prod(*[torch.arange(size) for size in nodes.shape]).view(-1, nodes.dim()):
            context, node = int(row[0]), int(nodes[tuple(row)])
            values = [0.0] * first_token + logits[tuple(row)].double().tolist()
            kids = case.oracle.children(node)
            exact = case.policy(context, values, node) if has_filter else case.oracle.policy(values, node)
            wanted = [exact.get(token, -math.inf) for token in kids] + [-math.inf] * columns
            assert_close(ours[tuple(row)], wanted[:columns])

    for_all(
        st.tuples(
            filtered(),
            st.lists(st.integers(0, 3), max_size=2).map(tuple),
            st.sampled_from(FLOATS),
            st.sampled_from(LAYOUTS),
            st.booleans(),
            st.integers(0, 2),
            st.none() | st.integers(1, 6),
        ),
        backend,
        check,
    )
