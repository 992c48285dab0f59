"""Exact item filters against sets of items in plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import FLOATS, LAYOUTS, assert_close, backends, device_of, for_all, laid_out, sums
from filter_cases import Filtered, filtered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import ItemFilter, ItemSets, PrefixTrie, filters, ops

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


@pytest.fixture(params=["core", "counting"])
def builder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Filters are built by the C++ core, or by counting."""
    if request.param == "counting":
        monkeypatch.setattr(filters, "_core", None)
    elif filters._core is None:
        pytest.skip("the C++ extension is not compiled")
    return request.param


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(filtered())
def test_availability(builder: str, case: Filtered) -> None:
    assert_means(case.filter(case.trie(torch.device("cpu"))), case)


def test_a_larger_catalogue_both_ways(
    monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    """Small sets are marked from below, large ones level by level; rows are shared among threads."""
    generator = torch.Generator().manual_seed(3)
    trie = PrefixTrie(torch.randint(0, 9, (4000, 4), generator=generator))
    # Whole subtrees among them, so that hidden nodes go up to the first level.
    order = trie.item_order.long()
    exclude = [[*order[i * 50 : i * 50 + 700].tolist(), 5, 5, 77] for i in range(40)]
    sets = [order[:20], order[:3000], torch.randperm(4000, generator=generator)[:2000], order[:0]]
    threads(2)
    for allow in (None, (sets, [i % 4 for i in range(40)])):
        both = []
        for core in (filters._core, None):
            monkeypatch.setattr(filters, "_core", core)
            both.append(ItemFilter(trie, exclude, allow))
        for name in ("hidden_offsets", "hidden_nodes", "allowed", "allowed_set", "_allowed_items"):
            torch.testing.assert_close(getattr(both[0], name), getattr(both[1], name), rtol=0, atol=0)
        assert both[0].hidden_nodes.numel() > 100


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
    sets = ItemSets(trie, [[0]])
    assert sets.to("cpu") is sets and sets.to("meta").device == torch.device("meta")
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
        ({"exclude": torch.tensor([[0.5]])}, TypeError, "exclude has dtype float64"),
        ({"exclude": [[0.5]]}, TypeError, "exclude has dtype float64"),
        ({"exclude": torch.zeros(2, 8, dtype=torch.bool)}, TypeError, "exclude has dtype bool"),
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
        ({"allow": ([[0]], [0.0])}, TypeError, r"allow\[1\] has dtype float64"),
        ({"allow": ([[0]], [[0]])}, ValueError, r"allow\[1\] has shape \(1, 1\)"),
        ({"allow": ([[0]], [0], 1)}, TypeError, "allow is a tuple of 3"),
        ({"allow": (0, 1), "rows": 1}, TypeError, r"allow\[0\] is a int, needs a list of item sets"),
        ({"exclude": [[0]], "rows": 2}, ValueError, "rows has 2 rows, exclude has 1 rows"),
        ({"exclude": [[0]], "allow": [[0], [1]]}, ValueError, "exclude has 1 rows, allow has 2 rows"),
        (
            {"allow": ItemSets(PrefixTrie(ROWS), [[0], [1]]), "rows": 1},
            ValueError,
            "allow has 2 sets, needs one",
        ),
        ({"allow": (ItemSets(PrefixTrie(ROWS), [[0]]), [1])}, ValueError, r"allow\[1\] has the set 1"),
        (
            {"allow": ItemSets(PrefixTrie([[1]]), [[0]]), "rows": 1},
            ValueError,
            "allow has sets of another trie, of 1 items and 2 nodes",
        ),
        ({"rows": 1.5}, TypeError, "rows is 1.5"),
        ({"rows": -1}, ValueError, "rows is -1"),
    ],
)
def test_bad_filters_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ItemFilter(PrefixTrie(ROWS), **options)


def test_bad_sets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sets\[1\] has the item 8"):
        ItemSets(PrefixTrie(ROWS), [[0], [8]])
    with pytest.raises(TypeError, match="sets is a int"):
        ItemSets(PrefixTrie(ROWS), 3)  # type: ignore[arg-type]


def test_a_trie_is_needed() -> None:
    with pytest.raises(TypeError, match="trie is a list"):
        ItemFilter(ROWS, [[0]])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item_filter", "error", "message"),
    [
        ([[0]], TypeError, "item_filter is a list"),
        (ItemFilter(PrefixTrie(ROWS), rows=3), ValueError, "item_filter has 3 rows, needs 2"),
        (ItemFilter(PrefixTrie([[1]]), rows=2), ValueError, "item_filter is of another trie, of 2 nodes"),
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda logits, trie, f: ops.trie_log_softmax(logits, logits[..., 0].long(), trie, item_filter=f),
        lambda logits, trie, f: ops.trie_sample(logits, logits[..., 0].long(), trie, item_filter=f),
        lambda logits, trie, f: ops.trie_token_log_probs(logits, logits[..., 0].long(), trie, item_filter=f),
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


def rows_of(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(np.ndindex(shape))


inner_shapes = st.lists(st.integers(0, 3), max_size=2).map(tuple)
floats = st.sampled_from(FLOATS)


@pytest.mark.parametrize("backend", backends("trie_log_softmax"))
def test_log_softmax(backend: str) -> None:
    def check(drawn: tuple[Filtered, tuple[int, ...], torch.dtype, str]) -> None:
        case, inner, dtype, layout = drawn
        device = device_of(backend)
        trie, nodes = case.trie(device), case.nodes((case.contexts, *inner))
        logits = laid_out(case.normals((*nodes.shape, case.width)).to(dtype), layout)
        item_filter = case.filter(trie)
        ours = ops.trie_log_softmax(
            logits.to(device), nodes.to(device), trie, item_filter=item_filter, backend=backend
        )
        for row in rows_of(nodes.shape):
            exact = case.policy(row[0], logits[row].double().tolist(), int(nodes[row]))
            assert_close(ours[row], [exact.get(token, -math.inf) for token in range(case.width)])

    for_all(st.tuples(filtered(), inner_shapes, floats, st.sampled_from(LAYOUTS)), backend, check)


def token_log_probs(case: Filtered, context: int, logits: Any, tokens: list[int], node: int) -> list[float]:
    """By the oracle: a token without an available child, and all after it, -inf; from a -1 on 0."""
    log_probs: list[float] = []
    for row, token in zip(logits, tokens, strict=True):
        if token < 0:
            return log_probs + [0.0] * (len(tokens) - len(log_probs))
        log_probs.append(case.policy(context, row, node).get(token, -math.inf))
        node = case.children(context, node).get(token, -1)
    return log_probs


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_token_log_probs(backend: str) -> None:
    def check(drawn: tuple[Filtered, tuple[int, ...], torch.dtype, str, bool]) -> None:
        case, inner, dtype, layout, from_root = drawn
        device = device_of(backend)
        trie, steps = case.trie(device), len(case.rows[0]) + 1
        shape = (case.contexts, *inner)
        padded = torch.tensor([[*row, -1] for row in case.rows])
        tokens = padded[torch.randint(0, len(padded), shape, generator=case.generator)]
        strays = torch.rand(tokens.shape, generator=case.generator) < 0.05
        tokens = torch.where(
            strays, torch.randint(-1, case.width, tokens.shape, generator=case.generator), tokens
        )
        start = torch.zeros(shape, dtype=torch.int64) if from_root else case.nodes(shape)
        logits = laid_out(case.normals((*shape, steps, case.width)).to(dtype), layout)
        ours = ops.trie_token_log_probs(
            logits.to(device),
            tokens.to(device),
            trie,
            start=0 if from_root else start.to(device),
            item_filter=case.filter(trie),
            backend=backend,
        )
        for row in rows_of(shape):
            given = (logits[row].double().tolist(), tokens[row].tolist(), int(start[row]))
            assert_close(ours[row], token_log_probs(case, row[0], *given))

    for_all(
        st.tuples(filtered(), inner_shapes, floats, st.sampled_from(LAYOUTS), st.booleans()), backend, check
    )


@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_sample(backend: str) -> None:
    """The draw is where the distribution function over the available children passes the uniform number."""

    def check(drawn: tuple[Filtered, tuple[int, ...], torch.dtype, float]) -> None:
        case, inner, dtype, temperature = drawn
        device = device_of(backend)
        trie, nodes = case.trie(device), case.nodes((case.contexts, *inner))
        logits = case.normals((*nodes.shape, case.width)).to(dtype)
        generator = torch.Generator(device).manual_seed(case.seed)
        uniform = torch.rand(nodes.shape, generator=generator, dtype=torch.float64, device=device).cpu()
        generator.manual_seed(case.seed)
        options = {"item_filter": case.filter(trie), "temperature": temperature, "backend": backend}
        tokens, reached, log_probs = ops.trie_sample(
            logits.to(device), nodes.to(device), trie, generator=generator, **options
        )
        for row in rows_of(nodes.shape):
            node, values = int(nodes[row]), logits[row].double().tolist()
            children = case.children(row[0], node)
            token = int(tokens[row])
            if not children:
                assert (token, int(reached[row]), float(log_probs[row])) == (-1, -1, 0.0)
                continue
            assert int(reached[row]) == children[token]
            assert_close(log_probs[row], case.policy(row[0], values, node)[token])
            mass = {k: math.exp(v) for k, v in case.policy(row[0], values, node, temperature).items()}
            below = sum(mass[other] for other in mass if other < token)
            assert below - 1e-5 <= uniform[row] <= below + mass[token] + 1e-5

    for_all(st.tuples(filtered(), inner_shapes, floats, st.sampled_from((0.5, 1.0, 3.0))), backend, check)


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 2.0}, {"top_k": 1}, {"top_k": 2}, {"top_p": 0.5}, {"top_k": 2, "temperature": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_without_a_distribution_the_first_available_child_is_drawn(
    backend: str, options: dict[str, Any]
) -> None:
    trie = PrefixTrie([[0], [1], [2], [3]]).to(device_of(backend))
    item_filter = ItemFilter(trie, [[0, 2], [0, 1]])
    logits = torch.full((2, 4), math.nan, device=trie.device)
    tokens, nodes, log_probs = ops.trie_sample(
        logits,
        torch.zeros(2, dtype=torch.int64, device=trie.device),
        trie,
        item_filter=item_filter,
        backend=backend,
        **options,
    )
    assert tokens.tolist() == [1, 2] and nodes.tolist() == [2, 3]
    assert log_probs.isnan().all()


Call = Callable[[Tensor, Tensor, PrefixTrie, ItemFilter, str], Tensor]
DIFFERENTIABLE: dict[str, Call] = {
    "trie_log_softmax": lambda logits, nodes, trie, f, backend: ops.trie_log_softmax(
        logits, nodes, trie, item_filter=f, backend=backend
    ),
    "trie_child_log_probs": lambda logits, nodes, trie, f, backend: ops.trie_child_log_probs(
        logits, nodes, trie, item_filter=f, backend=backend
    ),
    # A path of the first children from each node.
    "trie_token_log_probs": lambda logits, nodes, trie, f, backend: ops.trie_token_log_probs(
        logits,
        trie.token[trie.first_child[nodes.clamp(0, trie.num_nodes - 1)].clamp(max=trie.num_nodes - 1).long()],
        trie,
        start=nodes[:, 0] if nodes.dim() == 2 else nodes[:, 0, 0],
        item_filter=f,
        backend=backend,
    ),
    "trie_sample": lambda logits, nodes, trie, f, backend: ops.trie_sample(
        logits,
        nodes,
        trie,
        item_filter=f,
        generator=torch.Generator(logits.device).manual_seed(1),
        backend=backend,
    )[2],
}


def by_hand(log_probs: Tensor, grad: Tensor) -> Tensor:
    """grad of the finite entries."""
    return torch.where(log_probs.isfinite(), log_probs, 0.0).mul(grad).sum()


@pytest.mark.parametrize(
    ("op", "backend"),
    [pytest.param(op, *b.values, marks=b.marks) for op in DIFFERENTIABLE for b in backends(op)],
)
def test_gradients(op: str, backend: str) -> None:
    """Against the definition in float64; a draw's against log_softmax over the oracle's children."""

    def check(drawn: tuple[Filtered, torch.dtype, bool]) -> None:
        case, dtype, stride_0 = drawn
        device = device_of(backend)
        trie, call = case.trie(device), DIFFERENTIABLE[op]
        item_filter, nodes = case.filter(trie), case.nodes((case.contexts, 2))
        logits = case.normals((*nodes.shape, case.width)).to(dtype)
        leaf = logits.to(device).requires_grad_()
        ours = call(leaf, nodes.to(device), trie, item_filter, backend)
        exact = logits.double().requires_grad_()
        moved = case.trie(torch.device("cpu"))
        wanted = call(exact, nodes, moved, case.filter(moved), "torch") if op != "trie_sample" else None
        if wanted is None:
            tokens = call_tokens(case, leaf, nodes, trie, item_filter, backend)
            wanted = drawn_log_probs(case, exact, nodes, tokens)
        grad = case.normals((1,) * ours.dim() if stride_0 else tuple(ours.shape)).expand(ours.shape)
        (found,) = torch.autograd.grad(by_hand(ours, grad.to(device, ours.dtype)), leaf)
        (true,) = torch.autograd.grad(by_hand(wanted, grad), exact)
        assert_close(found, true.to(dtype).double(), slack=64)
        for row in rows_of(nodes.shape):
            hidden = set(range(case.width)) - set(case.children(row[0], int(nodes[row])))
            if op != "trie_token_log_probs":
                assert not found[row][sorted(hidden)].any()

    for_all(st.tuples(filtered(), floats, st.booleans()), backend, check)


def call_tokens(
    case: Filtered, logits: Tensor, nodes: Tensor, trie: PrefixTrie, item_filter: ItemFilter, backend: str
) -> Tensor:
    generator = torch.Generator(logits.device).manual_seed(1)
    return ops.trie_sample(
        logits, nodes.to(logits.device), trie, item_filter=item_filter, generator=generator, backend=backend
    )[0].cpu()


def drawn_log_probs(case: Filtered, logits: Tensor, nodes: Tensor, tokens: Tensor) -> Tensor:
    rows = []
    for row in rows_of(nodes.shape):
        children = sorted(case.children(row[0], int(nodes[row])))
        if len(children) < 2:
            rows.append(0.0 * logits[row].sum())
        else:
            rows.append(logits[row][children].log_softmax(-1)[children.index(int(tokens[row]))])
    return torch.stack(rows).view(nodes.shape)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_gradcheck(op: str) -> None:
    """The definition's own gradient against differences."""
    trie = PrefixTrie(ROWS)
    item_filter = ItemFilter(
        trie, [[2, 6], [0, 1, 3], [5, 6, 7]], allow=[[0, 1, 2, 5, 6, 7], range(8), range(7)]
    )
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 2, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    nodes = torch.tensor([[0, 1], [0, 3], [3, 2]])

    def finite(values: Tensor) -> Tensor:
        log_probs = DIFFERENTIABLE[op](values, nodes, trie, item_filter, "torch")
        return torch.where(log_probs.isfinite(), log_probs, 0.0)

    assert torch.autograd.gradcheck(finite, logits)
    assert finite(logits).detach().abs().sum() > 0


@pytest.mark.parametrize("backend", backends("trie_child_log_probs"))
def test_children_beyond_the_width_count(backend: str) -> None:
    """They are left out of the result only: the policy, and the gradient, are over all children."""
    trie = PrefixTrie([[token] for token in range(5)]).to(device_of(backend))
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = logits.clone().to(trie.device).requires_grad_()
    nodes = torch.zeros(1, dtype=torch.int64, device=trie.device)
    ours = ops.trie_child_log_probs(leaf, nodes, trie, width=2, backend=backend)
    exact = logits.clone().requires_grad_()
    wanted = exact.log_softmax(-1)[:, :2]
    assert_close(ours, wanted.detach())
    grad = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    ours.backward(grad.to(trie.device))
    wanted.backward(grad)
    assert_close(leaf.grad, exact.grad)


@pytest.mark.parametrize("backend", backends("trie_child_log_probs"))
def test_children_without_a_column_are_not_available(backend: str) -> None:
    """Nodes of another depth than the sliced head's: nothing outside the columns is read or written."""
    trie = PrefixTrie([[0, 7], [1, 8], [2, 9], [2, 12]]).to(device_of(backend))
    around = torch.full((4, 9), math.nan, dtype=torch.float64, device=trie.device)
    around[:, 2:8] = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    leaf = around[:, 2:8].detach().requires_grad_()
    nodes = torch.tensor([0, 3, 2, -1], device=trie.device)
    ours = ops.trie_child_log_probs(leaf, nodes, trie, first_token=7, backend=backend)
    assert ours[[0, 3]].eq(-math.inf).all()
    assert ours[2].tolist() == [0.0, -math.inf, -math.inf]
    assert_close(ours[1, :2], leaf.detach()[1, [2, 5]].log_softmax(-1).cpu())
    torch.where(ours.isfinite(), ours, 0.0).square().sum().backward()
    assert leaf.grad is not None and not leaf.grad[[0, 2, 3]].any()
    assert leaf.grad[1, [2, 5]].all() and not leaf.grad[1, [0, 1, 3, 4]].any()


def test_a_filter_that_hides_nothing_changes_nothing() -> None:
    trie = PrefixTrie(ROWS)
    logits, nodes = torch.randn(3, 10), torch.tensor([0, 1, 3])
    for item_filter in (ItemFilter(trie, rows=3), ItemFilter(trie, allow=range(8), rows=3)):
        for backend in ("torch", "auto"):
            ours = ops.trie_log_softmax(logits, nodes, trie, item_filter=item_filter, backend=backend)
            assert torch.equal(ours, ops.trie_log_softmax(logits, nodes, trie, backend=backend))


@pytest.mark.parametrize("backend", [b for b in backends("trie_sample") if b.values[0] != "triton"])
def test_no_walk_from_the_root_dies(backend: str) -> None:
    """Whatever is drawn, a walk ends at a node with an item that its row may get, if there is any."""

    @settings(max_examples=30)
    @given(filtered())
    def check(case: Filtered) -> None:
        trie = case.trie(device_of(backend))
        item_filter = case.filter(trie)
        nodes = torch.zeros((case.contexts, 5), dtype=torch.int64, device=trie.device)
        for _ in range(trie.max_depth + 1):
            logits = case.normals((*nodes.shape, case.width)).to(trie.device)
            _, reached, _ = ops.trie_sample(logits, nodes, trie, item_filter=item_filter, backend=backend)
            nodes = torch.where(reached >= 0, reached, nodes)
        for row, each in enumerate(nodes.tolist()):
            for node in each:
                own = {case.kept[item] for item in case.oracle.ending_at(node)}
                assert own & case.left(row) if case.left(row) else node == 0

    check()


@pytest.mark.parametrize("backend", backends("trie_child_log_probs"))
def test_no_rows(backend: str) -> None:
    trie = PrefixTrie(ROWS).to(device_of(backend))
    item_filter = ItemFilter(trie, exclude=[])
    logits = torch.zeros(0, 3, 10, device=trie.device, requires_grad=True)
    nodes = torch.zeros(0, 3, dtype=torch.int64, device=trie.device)
    found = ops.trie_child_log_probs(logits, nodes, trie, item_filter=item_filter, backend=backend)
    assert found.shape == (0, 3, trie.max_children)
    found.sum().backward()
    assert item_filter.select([]).num_rows == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_what_hides_is_asked_of_are_integers(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"items has dtype {dtype}, needs integers"):
        ItemFilter(PrefixTrie(ROWS), rows=1).hides(torch.zeros(1, 2, dtype=dtype))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}])
@pytest.mark.parametrize("temperature", [1e-30, 1e-310])
def test_next_to_no_temperature_draws_the_most_probable_available_child(
    backend: str, options: dict[str, Any], temperature: float
) -> None:
    """A log-probability over such a temperature is beyond all numbers."""
    trie = PrefixTrie([[0], [1], [2], [3]])
    item_filter = ItemFilter(trie, exclude=[[0, 3]])
    logits = torch.tensor([[9.0, 1.0, 1.5, 9.0]])
    tokens, _, _ = ops.trie_sample(
        logits,
        torch.zeros(1, dtype=torch.long),
        trie,
        temperature=temperature,
        item_filter=item_filter,
        backend=backend,
        **options,
    )
    assert tokens.tolist() == [2]
