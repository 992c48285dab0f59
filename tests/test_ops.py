"""The value of every op, on every backend, against brute force in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import core_oracle as oracle
import numpy as np
import pytest
import torch
from core_cases import (
    FLOATS,
    LAYOUTS,
    World,
    any_integers,
    assert_close,
    backends,
    catalogues,
    device_of,
    floats,
    for_all,
    laid_out,
    layouts,
    leading_shapes,
    logits_at,
    path_logits,
    sums,
    worlds,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import PrefixTrie, ops
from gflowgr.ops._filters import NO_FILTER

pytestmark = pytest.mark.usefixtures("poisoned_memory")

path_shapes = st.tuples(leading_shapes, st.integers(0, 5)).map(lambda pair: (*pair[0], pair[1]))
KERNELS = [backend for backend in backends("trie_token_log_probs") if backend.values[0] != "torch"]
ROWS = [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6], [7, 0, -1], [7, 3, -1], [7, 9, -1]]


def row_of(logits: Tensor, row: tuple[int, ...]) -> Any:
    return logits[row].double().tolist()


def in_pytorch(logits: Tensor, world: World, node: int) -> dict[int, float]:
    """The yardstick: torch.log_softmax over the children's logits, in the dtype of our results."""
    tokens = list(world.oracle.children(node))
    values = (
        logits.cpu()[tokens].to(sums(logits.dtype)).log_softmax(-1) if len(tokens) > 1 else torch.zeros(1)
    )
    return dict(zip(tokens, values.tolist(), strict=False))


def dense(policy: dict[int, float], width: int) -> list[float]:
    return [policy.get(token, -math.inf) for token in range(width)]


@pytest.mark.parametrize("backend", backends("trie_log_softmax"))
def test_log_softmax(backend: str) -> None:
    def check(case: tuple[World, tuple[int, ...], torch.dtype, str]) -> None:
        world, shape, dtype, layout = case
        device = device_of(backend)
        nodes = laid_out(world.nodes(shape), layout)
        logits = logits_at(world, nodes, dtype, layout, device)
        trie = world.trie(device)
        ours = ops.trie_log_softmax(logits, any_integers(world, nodes, layout, device), trie, backend=backend)
        assert ours.dtype == sums(dtype)
        assert ours.shape == logits.shape
        for row in np.ndindex(shape):
            node = int(nodes[row])
            exact = world.oracle.policy(row_of(logits, row), node)
            yardstick = in_pytorch(logits[row], world, node)
            assert_close(
                ours[row], dense(exact, world.width), torch.tensor(dense(yardstick, world.width)).double()
            )
            if len(exact) == 1:
                assert ours[row].max() == 0.0

    for_all(st.tuples(worlds, leading_shapes, floats, layouts), backend, check)


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_token_log_probs(backend: str) -> None:
    def check(case: tuple[World, tuple[int, ...], torch.dtype, str, bool]) -> None:
        world, shape, dtype, layout, from_root = case
        device = device_of(backend)
        tokens = laid_out(world.tokens(shape), layout)
        start = torch.zeros(shape[:-1], dtype=torch.int64) if from_root else world.nodes(shape[:-1])
        logits = path_logits(world, tokens, start, dtype, layout, device)
        options = {} if from_root else {"start": any_integers(world, start, layout, device)}
        if layout == "expanded" and not from_root:
            start = laid_out(start, layout)
        given = any_integers(world, tokens, layout, device)
        ours = ops.trie_token_log_probs(logits, given, world.trie(device), backend=backend, **options)
        assert ours.dtype == sums(dtype)
        assert ours.shape == shape
        for row in np.ndindex(shape[:-1]):
            path, node = tokens[row].tolist(), int(start[row])
            exact = world.oracle.token_log_probs(row_of(logits, row), path, node)
            before = [node, *world.oracle.walk(path, node)][: len(path)]
            yardstick = [
                in_pytorch(logits[(*row, t)], world, before[t]).get(path[t], value)
                for t, value in enumerate(exact)
            ]
            yardstick = [value if math.isfinite(value) else 0.0 for value in yardstick]
            assert_close(ours[row], exact, torch.tensor(yardstick).double())
            # Forced and padded steps, whatever their logits.
            assert all(
                value == 0.0 for value, wanted in zip(ours[row].tolist(), exact, strict=True) if wanted == 0
            )

    for_all(st.tuples(worlds, path_shapes, floats, layouts, st.booleans()), backend, check)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [b for b in backends("trie_token_log_probs") if b.values[0] != "torch"])
def test_columns_may_begin_at_another_token(backend: str, layout: str) -> None:
    """What the level-sliced head hands over: column c of the logits is token first_token + c."""
    device = device_of(backend)
    trie = PrefixTrie([[13, 17], [14, 17], [15, 13], [15, 16]]).to(device)
    tokens = torch.tensor([[13, 17], [15, 16], [15, 13]], device=device)
    start = torch.zeros(3, dtype=torch.int64, device=device)
    full = laid_out(torch.randn(3, 2, 20, device=device, dtype=torch.float64), layout)
    sliced = laid_out(full[..., 13:18].clone(), layout)
    results = []
    for logits, first_token in ((full, 0), (sliced, 13)):
        leaf = logits.detach().requires_grad_()
        arguments = (trie.first_child, trie.token, trie.max_children, first_token, *NO_FILTER, backend)
        log_probs = torch.ops.gflowgr.trie_token_log_probs(leaf, tokens, start, *arguments)
        log_probs.backward(torch.tensor([1.0, -2.0], device=device, dtype=torch.float64).expand(3, 2))
        results.append((log_probs.detach(), leaf.grad))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1][..., 13:18], rtol=0, atol=0)


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_an_int_start_serves_every_row(backend: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    logits, tokens = torch.randn(2, 2, 10, device=device), torch.tensor([[2, 5], [3, 1]], device=device)
    start = torch.full((2,), 1, device=device)
    one, each = (ops.trie_token_log_probs(logits, tokens, trie, start=s, backend=backend) for s in (1, start))
    assert torch.equal(one, each)
    assert one[0, 1] == 0.0
    assert one[1, 1] == -math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_linear_token_log_probs(backend: str, dtype: torch.dtype) -> None:
    def check(case: tuple[World, tuple[int, ...], str, bool]) -> None:
        world, shape, layout, with_bias = case
        device, dimensions = device_of(backend), 5
        tokens = laid_out(world.tokens(shape), layout)
        hidden = laid_out(world.normals((*shape, dimensions), 1.0).to(dtype).to(device), layout)
        weight = laid_out(world.normals((world.width, dimensions), 1.0).to(dtype).to(device), layout)
        bias = (
            laid_out(world.normals((world.width,), 1.0).to(dtype).to(device), layout) if with_bias else None
        )
        ours = ops.trie_linear_token_log_probs(
            hidden,
            weight,
            any_integers(world, tokens, layout, device),
            world.trie(device),
            bias,
            backend=backend,
        )
        assert ours.dtype == sums(dtype)
        assert ours.shape == shape
        exact_logits = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
        same_dtype = torch.nn.functional.linear(hidden, weight, bias)
        for row in np.ndindex(shape[:-1]):
            path = tokens[row].tolist()
            exact = world.oracle.token_log_probs(row_of(exact_logits, row), path)
            yardstick = torch.tensor(world.oracle.token_log_probs(row_of(same_dtype, row), path)).double()
            largest = float(exact_logits.abs().max()) if exact else 0.0
            rounding = 8 * largest * torch.finfo(dtype).eps / torch.finfo(ours.dtype).eps
            assert_close(ours[row], exact, yardstick, slack=8 + rounding)

    for_all(st.tuples(worlds, path_shapes, layouts, st.booleans()), backend, check)


def test_linear_reads_the_rows_of_the_children_only() -> None:
    """A head whose other rows are NaN gives what a clean one does: the level's slice is all that is read."""
    rows = [[10, 20], [11, 21], [10, 21]]
    weight = torch.full((40, 4), math.nan)
    for low, high in ((10, 12), (20, 22)):
        weight[low:high] = torch.randn(high - low, 4)
    log_probs = ops.trie_linear_token_log_probs(
        torch.randn(3, 2, 4), weight, torch.tensor(rows), PrefixTrie(rows)
    )
    assert log_probs.isfinite().all()


def test_linear_never_makes_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is as wide as the vocabulary."""
    widths = []
    linear = torch.nn.functional.linear

    def watched(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        widths.append(weight.shape[0])
        return linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    rows = torch.tensor([[3, 503], [4, 504], [3, 504]])
    ops.trie_linear_token_log_probs(torch.randn(3, 2, 4), torch.randn(1000, 4), rows, PrefixTrie(rows))
    assert widths == [2, 2]


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_linear_takes_part_of_a_head(backend: str) -> None:
    """Rows that begin at another token, scaled and capped as Gemma does, give what the whole head does."""
    device = device_of(backend)
    rows = torch.tensor([[30, 40], [31, 41], [30, 41], [33, 42]], device=device)
    hidden, weight, bias = (torch.randn(*shape, device=device) for shape in ((4, 2, 6), (50, 6), (50,)))
    logits = 3.0 * torch.tanh(0.7 * torch.nn.functional.linear(hidden, weight, bias) / 3.0)
    trie = PrefixTrie(rows).to(device)
    ours = ops.trie_linear_token_log_probs(
        *(hidden, weight[30:43], rows, trie, bias[30:43]),
        **{"first_token": 30, "scale": 0.7, "softcap": 3.0, "backend": backend},
    )
    torch.testing.assert_close(ours, ops.trie_token_log_probs(logits, rows, trie))
    with pytest.raises(ValueError, match="first_token is 31, needs at most the trie's smallest token, 30"):
        ops.trie_linear_token_log_probs(hidden, weight[31:43], rows, trie, first_token=31, backend=backend)
    with pytest.raises(ValueError, match="trie has the token 42"):
        ops.trie_linear_token_log_probs(hidden, weight[30:42], rows, trie, first_token=30, backend=backend)
    with pytest.raises(TypeError, match=r"first_token is .*, needs an integer"):
        ops.trie_linear_token_log_probs(hidden, weight, rows, trie, first_token=1.5, backend=backend)
    with pytest.raises(ValueError, match="sparse_grad is True, needs the backend cpp or triton"):
        ops.trie_linear_token_log_probs(hidden, weight, rows, trie, sparse_grad=True, backend="torch")
    with pytest.raises(ValueError, match="softcap is 0"):
        ops.trie_linear_token_log_probs(hidden, weight, rows, trie, softcap=0.0, backend=backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_linear_gives_a_sparse_gradient(backend: str) -> None:
    """Of the trie's rows alone, with the dense one's values; it adds up and an optimiser takes it."""
    device = device_of(backend)
    rows = torch.tensor([[30, 40], [31, 41], [30, 41], [33, 42]], device=device)
    trie = PrefixTrie(rows).to(device)
    hidden, leaves = torch.randn(4, 2, 6, device=device), []
    for sparse_grad in (False, True, True):
        torch.manual_seed(0)
        weight, bias = (torch.randn(*shape, device=device).requires_grad_() for shape in ((50, 6), (50,)))
        options = {"sparse_grad": sparse_grad, "backend": backend}
        ops.trie_linear_token_log_probs(hidden, weight, rows, trie, bias, **options).sum().backward()
        leaves.append((weight, bias))
    for dense, sparse in zip(leaves[0], leaves[1], strict=True):
        assert sparse.grad.is_sparse
        assert sparse.grad._nnz() == 13
        torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    weight, bias = leaves[2]
    ops.trie_linear_token_log_probs(
        hidden, weight, rows, trie, bias, sparse_grad=True, backend=backend
    ).sum().backward()
    torch.testing.assert_close(weight.grad.to_dense(), 2 * leaves[0][0].grad)
    before = weight.detach().clone()
    torch.optim.SGD([weight, bias], lr=1.0).step()
    torch.testing.assert_close(before - weight.detach(), 2 * leaves[0][0].grad)


# Sampling


@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_sample_inverts_the_distribution(backend: str) -> None:
    """Each draw is the child where the exact CDF crosses the row's uniform number, but for rounding."""

    def check(case: tuple[World, tuple[int, ...], torch.dtype, str, float]) -> None:
        world, shape, dtype, layout, temperature = case
        device = device_of(backend)
        nodes = laid_out(world.nodes(shape), layout)
        logits = logits_at(world, nodes, dtype, layout, device)
        generator = torch.Generator(device).manual_seed(world.seed)
        tokens, reached, log_probs = ops.trie_sample(
            logits,
            any_integers(world, nodes, layout, device),
            world.trie(device),
            temperature=temperature,
            generator=generator,
            backend=backend,
        )
        generator.manual_seed(world.seed)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device)
        assert tokens.dtype == reached.dtype == torch.int64
        assert log_probs.dtype == sums(dtype)
        assert tokens.shape == reached.shape == log_probs.shape == shape
        for row in np.ndindex(shape):
            node = int(nodes[row])
            children = world.oracle.children(node)
            if not children:
                assert (int(tokens[row]), int(reached[row]), float(log_probs[row])) == (-1, -1, 0.0)
                continue
            token = int(tokens[row])
            assert int(reached[row]) == children[token]
            values = row_of(logits, row)
            assert_close(log_probs[row], world.oracle.policy(values, node)[token])
            cumulative = np.cumsum(
                [0.0] + [math.exp(p) for p in world.oracle.policy(values, node, temperature).values()]
            )
            place = list(children).index(token)
            assert cumulative[place] - 1e-5 <= float(uniform[row]) <= cumulative[place + 1] + 1e-5

    temperatures = st.sampled_from([0.3, 1.0, 2.5])
    for_all(st.tuples(worlds, leading_shapes, floats, layouts, temperatures), backend, check)


def chi_square_survival(statistic: float, degrees: int) -> float:
    """The probability that a chi-square variable exceeds `statistic`."""
    return float(torch.special.gammaincc(torch.tensor(degrees / 2.0), torch.tensor(statistic / 2.0)))


@pytest.mark.parametrize("backend", backends("trie_sample"))
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_draws_follow_the_distribution(backend: str, temperature: float) -> None:
    """Chi-square over whole items at level 1e-4, seeds 0 and 1.

    That the test can fail: the same draws are refused for distributions that give one item 4 % more,
    that forget the temperature, or that are uniform.
    """
    device = device_of(backend)
    rows = [[a, 10 + b] for a in range(4) for b in range(a + 1)]
    trie, world = PrefixTrie(rows).to(device), World(rows, 0, 0)
    table = torch.randn(trie.num_nodes, 14, generator=torch.Generator().manual_seed(5)).to(device) / 2
    # The interpreter is too slow for many draws; that each one inverts the CDF is tested above.
    interpreted = backend == "triton" and device.type == "cpu"
    draws = 120 if interpreted else 20_000

    def exactly(temperature: float) -> list[float]:
        probabilities = []
        for path in rows:
            nodes = [0, *world.oracle.walk(path)]
            steps = zip(nodes, path, strict=False)
            log_probs = [world.oracle.policy(row_of(table, (n,)), n, temperature)[t] for n, t in steps]
            probabilities.append(math.exp(sum(log_probs)))
        assert math.isclose(sum(probabilities), 1.0)
        return probabilities

    for seed in (0,) if interpreted else (0, 1):
        generator = torch.Generator(device).manual_seed(seed)
        node = torch.zeros(draws, dtype=torch.int64, device=device)
        for _ in range(2):
            _, node, _ = ops.trie_sample(
                table[node], node, trie, temperature=temperature, generator=generator, backend=backend
            )
        counts = torch.bincount(node, minlength=trie.num_nodes)[trie.item_node.long()].tolist()
        assert sum(counts) == draws

        def survival(probabilities: list[float], counts: list[int] = counts) -> float:
            expected = [probability * draws for probability in probabilities]
            statistic = sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))
            return chi_square_survival(statistic, len(expected) - 1)

        exact = exactly(temperature)
        assert survival(exact) > 1e-4
        if not interpreted:
            assert survival([1 / len(exact)] * len(exact)) < 1e-4
            shifted = [*(0.96 * p for p in exact[:-1]), exact[-1] + 0.04 * (1 - exact[-1])]
            assert survival(shifted) < 1e-4
            if temperature != 1:
                assert survival(exactly(1.0)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [15, 16, 17, 127, 129, 1000])
@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_sample_inverts_the_distribution_of_many_children(
    backend: str, width: int, dtype: torch.dtype
) -> None:
    """Kernels add up many children in blocks; each draw is where the exact distribution function passes."""
    device = device_of(backend)
    rows = 16 if backend == "triton" else 500
    seeded = torch.Generator().manual_seed(width)
    logits = 3.0 * torch.randn(rows, width, generator=seeded)
    logits[torch.rand(rows, width, generator=seeded) < 0.3] = -math.inf
    logits = logits.to(dtype).to(device)
    trie = PrefixTrie(torch.arange(width).unsqueeze(1)).to(device)
    for temperature in (1.0, 3.0):
        generator = torch.Generator(device).manual_seed(0)
        root = torch.zeros(rows, dtype=torch.int64, device=device)
        options = {"temperature": temperature, "generator": generator, "backend": backend}
        tokens = ops.trie_sample(logits, root, trie, **options)[0]
        generator.manual_seed(0)
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64, device=device)
        mass = (logits.double() / temperature).softmax(-1)
        reached = mass.cumsum(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        own = mass.gather(1, tokens.unsqueeze(1)).squeeze(1)
        assert (own > 0).all()
        assert (uniform <= reached + 1e-5).all()
        assert (uniform >= reached - own - 1e-5).all()


@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_a_seed_fixes_the_draws(backend: str, threads: Any) -> None:
    device = device_of(backend)
    rows = np.random.default_rng(0).integers(0, 40, (200, 2)).tolist()
    trie = PrefixTrie(rows).to(device)
    count = 32 if backend == "triton" else 3000
    logits = torch.randn(count, 40, generator=torch.Generator().manual_seed(0)).to(device)
    nodes = torch.randint(0, 20, (count,), generator=torch.Generator().manual_seed(1)).to(device)

    def draw(seed: int) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return list(ops.trie_sample(logits, nodes, trie, generator=generator, backend=backend))

    threads(1)
    first, again, other = draw(3), draw(3), draw(4)
    threads(2)
    with_two = draw(3)
    for one, same, parallel in zip(first, again, with_two, strict=True):
        assert torch.equal(one, same)
        assert torch.equal(one, parallel)
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(7)
    one = ops.trie_sample(logits, nodes, trie, backend=backend)[0]
    torch.manual_seed(7)
    assert torch.equal(one, ops.trie_sample(logits, nodes, trie, backend=backend)[0])


@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_draws_only_what_is_possible(backend: str) -> None:
    """A child at -inf is never drawn, and a row without a distribution draws a child with log-prob NaN."""
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    count = 40 if backend == "triton" else 2000
    logits = torch.zeros(count, 10, device=device)
    logits[:, 7] = -math.inf
    root = torch.zeros(count, dtype=torch.int64, device=device)
    tokens, _, log_probs = ops.trie_sample(logits, root, trie, backend=backend)
    assert set(tokens.tolist()) == {1, 4}
    assert_close(log_probs, [-math.log(2)] * count)
    for spoiler in (math.nan, -math.inf):
        for columns in ([1, 4, 7], [1], [7]):
            row = torch.zeros(1, 10, device=device)
            row[:, columns] = spoiler
            token, node, log_prob = ops.trie_sample(row, root[:1], trie, backend=backend)
            assert trie.walk(token, backend="torch").tolist() == node.tolist()
            assert int(node) >= 1
            assert math.isnan(log_prob) == (math.isnan(spoiler) or len(columns) == 3)


# Flows and losses


@pytest.mark.parametrize("backend", backends("trie_log_flows"))
def test_log_flows(backend: str) -> None:
    def check(case: tuple[World, tuple[int, ...], torch.dtype, str]) -> None:
        world, shape, dtype, layout = case
        device = device_of(backend)
        rewards = world.normals((*shape, len(world.rows)), 4.0)
        rewards = torch.where(world.coin(rewards.shape, 0.3), -math.inf, rewards).to(dtype)
        rewards = laid_out(rewards.to(device), layout)
        ours = ops.trie_log_flows(rewards, world.trie(device), backend=backend)
        assert ours.dtype == sums(dtype)
        assert ours.shape == (*shape, len(world.oracle))
        for row in np.ndindex(shape):
            assert_close(ours[row], world.oracle.log_flows(row_of(rewards, row)))

    small = st.builds(World, catalogues(), st.integers(0, 3), st.integers(0, 2**31))
    for_all(st.tuples(small, leading_shapes, floats, layouts), backend, check)


@pytest.mark.parametrize("backend", backends("trie_log_flows"))
def test_log_flows_of_a_wide_catalogue_and_extreme_rewards(backend: str) -> None:
    device = device_of(backend)
    rows = np.random.default_rng(0).integers(0, 30, (400, 3)).tolist()
    world = World(rows, 0, 0)
    for scale, shift in ((0.0, 0.0), (50.0, 300.0), (1.0, -500.0), (1e30, 0.0)):
        rewards = (world.normals((2, len(rows)), scale) + shift).float().to(device)
        ours = ops.trie_log_flows(rewards, world.trie(device), backend=backend)
        for row in range(2):
            assert_close(ours[row], world.oracle.log_flows(row_of(rewards, (row,))), slack=16)


@pytest.mark.parametrize("backend", backends("trie_log_flows"))
def test_log_flows_show_a_broken_reward(backend: str) -> None:
    """NaN and +inf reach every node above their item, and no other."""
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    for spoiler in (math.nan, math.inf):
        rewards = torch.zeros(len(ROWS), device=device)
        rewards[3] = spoiler
        flows = ops.trie_log_flows(rewards, trie, backend=backend)
        above = {0, *trie.walk(torch.tensor([4, 5, 6], device=device)).tolist()}
        assert {n for n, flow in enumerate(flows.tolist()) if not math.isfinite(flow)} == above


@pytest.mark.parametrize("backend", backends("flow_matching"))
def test_flow_matching(backend: str) -> None:
    def check(case: tuple[World, tuple[int, ...], torch.dtype, str, int]) -> None:
        world, shape, dtype, layout, shared = case
        device = device_of(backend)
        nodes = laid_out(world.nodes(shape), layout)
        logits = logits_at(world, nodes, dtype, layout, device)
        lead = shape[: max(len(shape) - shared, 0)]
        flows = world.normals((*lead, len(world.oracle)), 2.0)
        flows = torch.where(world.coin(flows.shape, 0.2), -math.inf, flows).to(sums(dtype))
        flows = laid_out(flows.to(device), layout)
        ours = ops.flow_matching(
            logits,
            any_integers(world, nodes, layout, device),
            world.trie(device),
            flows,
            reduction="none",
            backend=backend,
        )
        assert ours.dtype == sums(dtype)
        assert ours.shape == shape
        for row in np.ndindex(shape):
            row_flows = row_of(flows, row[: len(lead)])
            exact = world.oracle.flow_matching(row_of(logits, row), int(nodes[row]), row_flows)
            assert_close(ours[row], exact, slack=64)

    for_all(st.tuples(worlds, leading_shapes, floats, layouts, st.integers(0, 3)), backend, check)


@pytest.mark.parametrize("backend", backends("flow_matching"))
def test_flow_matching_shows_broken_flows(backend: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie([[1], [2], [3]]).to(device)
    for others in (-math.inf, 0.0, math.nan):
        for place in (1, 2, 3):
            flows = torch.full((4,), others, device=device)
            flows[place] = math.nan
            root = torch.zeros((), dtype=torch.int64, device=device)
            assert ops.flow_matching(
                torch.zeros(4, device=device), root, trie, flows, backend=backend
            ).isnan()


@pytest.mark.parametrize("backend", backends("flow_matching"))
def test_flow_matching_is_zero_where_the_policy_matches(backend: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    flows = ops.trie_log_flows(torch.randn(len(ROWS), device=device, dtype=torch.float64), trie)
    nodes = torch.arange(trie.num_nodes, device=device)
    logits = torch.full((trie.num_nodes, 10), math.nan, dtype=torch.float64, device=device)
    for node in range(trie.num_nodes):
        first, end = trie.first_child[node : node + 2].tolist()
        logits[node, trie.children(node).long()] = flows[first:end]
    assert ops.flow_matching(logits, nodes, trie, flows, reduction="sum", backend=backend).abs() < 1e-12


def reduced(
    losses: Sequence[float], weights: Sequence[float] | None, shape: tuple[int, ...]
) -> dict[str, Any]:
    """The three reductions of weights * loss; the mean of nothing is NaN, as PyTorch has it."""
    values = [loss * weight for loss, weight in zip(losses, weights or [1.0] * len(losses), strict=True)]
    total = math.fsum(values)
    return {
        "none": torch.tensor(values, dtype=torch.float64).reshape(shape),
        "sum": total,
        "mean": total / len(values) if values else math.nan,
    }


def rows_of(values: Tensor, steps: bool) -> list[Any]:
    """One entry a trajectory: its steps, or its number."""
    values = values.double() if values.is_floating_point() else values
    return (values.reshape(-1, values.shape[-1]) if steps else values.reshape(-1)).tolist()


balance_cases = st.tuples(
    worlds,
    path_shapes,
    floats,
    layouts,
    st.booleans(),
    st.booleans(),
    st.sampled_from(["scalar", "number", "each"]),
)


def some_log_z(
    world: World, kind: str, lead: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Any:
    log_z = world.normals(lead if kind == "each" else ()).to(dtype).to(device)
    return float(log_z) if kind == "number" else log_z


@pytest.mark.parametrize("backend", backends("trajectory_balance"))
def test_trajectory_balance(backend: str) -> None:
    def check(case: tuple[World, tuple[int, ...], torch.dtype, str, bool, bool, str]) -> None:
        world, shape, dtype, layout, masked, weighted, kind = case
        device, lead = device_of(backend), shape[:-1]
        log_probs = world.normals(shape).to(dtype)
        mask = laid_out(world.coin(shape, 0.6), layout).to(device) if masked else None
        if mask is not None and layout != "expanded":
            # What does not count may be anything.
            log_probs = torch.where(
                mask.cpu(), log_probs, torch.where(world.coin(shape), math.nan, -math.inf)
            )
        log_probs = laid_out(log_probs.to(dtype).to(device), layout)
        rewards = laid_out(world.normals(lead).to(dtype).to(device), layout)
        weights = laid_out(world.normals(lead).abs().to(device), layout).to(sums(dtype)) if weighted else None
        log_z = some_log_z(world, kind, lead, dtype, device)
        each_z = torch.as_tensor(log_z, dtype=torch.float64).cpu().expand(lead)
        exact = (
            [
                oracle.trajectory_balance(p, r, z, m)
                for p, r, z, m in zip(
                    rows_of(log_probs, True),
                    rows_of(rewards, False),
                    rows_of(each_z, False),
                    rows_of(mask, True) if mask is not None else [None] * rewards.numel(),
                    strict=True,
                )
            ]
            if shape[-1]
            else [(z - r) ** 2 for z, r in zip(rows_of(each_z, False), rows_of(rewards, False), strict=True)]
        )
        wanted = reduced(exact, rows_of(weights, False) if weights is not None else None, lead)
        for reduction, value in wanted.items():
            ours = ops.trajectory_balance(
                log_probs, rewards, log_z, mask=mask, weights=weights, reduction=reduction, backend=backend
            )
            assert ours.dtype == sums(dtype)
            assert ours.shape == (lead if reduction == "none" else ())
            assert_close(ours, value, slack=64)

    for_all(balance_cases, backend, check)


@pytest.mark.parametrize("backend", backends("trie_trajectory_balance"))
def test_trie_trajectory_balance(backend: str) -> None:
    def check(case: tuple[World, tuple[int, ...], torch.dtype, str, bool, bool, str]) -> None:
        world, shape, dtype, layout, _, weighted, kind = case
        device, lead = device_of(backend), shape[:-1]
        tokens = laid_out(world.tokens(shape), layout)
        logits = path_logits(world, tokens, torch.zeros(lead, dtype=torch.int64), dtype, layout, device)
        rewards = laid_out(world.normals(lead).to(dtype).to(device), layout)
        weights = (
            laid_out(0.1 + world.normals(lead).abs().to(device), layout).to(sums(dtype)) if weighted else None
        )
        log_z = some_log_z(world, kind, lead, dtype, device)
        each_z = torch.as_tensor(log_z, dtype=torch.float64).cpu().expand(lead)
        exact = []
        for row in np.ndindex(lead):
            log_probs = world.oracle.token_log_probs(row_of(logits, row), tokens[row].tolist())
            exact.append(oracle.trajectory_balance(log_probs, float(rewards[row]), float(each_z[row])))
        wanted = reduced(exact, rows_of(weights, False) if weights is not None else None, lead)
        for reduction, value in wanted.items():
            ours = ops.trie_trajectory_balance(
                logits,
                any_integers(world, tokens, layout, device),
                world.trie(device),
                rewards,
                log_z,
                weights=weights,
                reduction=reduction,
                backend=backend,
            )
            assert ours.dtype == sums(dtype)
            assert ours.shape == (lead if reduction == "none" else ())
            assert_close(ours, value, slack=64)

    for_all(balance_cases, backend, check)


@given(balance_cases, st.integers(1, 3))
def test_log_partition_variance(case: tuple[Any, ...], group_size: int) -> None:
    world, shape, dtype, layout, masked, weighted, _ = case
    shape = (group_size * (shape[0] if len(shape) > 1 else 1), shape[-1])
    log_probs = laid_out(world.normals(shape).to(dtype), layout)
    rewards = laid_out(world.normals(shape[:1]).to(dtype), layout)
    mask = laid_out(world.coin(shape, 0.6), layout) if masked else None
    weights = laid_out(world.normals(shape[:1]).abs(), layout).to(sums(dtype)) if weighted else None
    exact = oracle.log_partition_variance(
        log_probs.double().tolist(),
        rewards.double().tolist(),
        group_size,
        None if mask is None else mask.tolist(),
    )
    for reduction, value in reduced(exact, None if weights is None else weights.tolist(), shape[:1]).items():
        ours = ops.log_partition_variance(
            log_probs, rewards, group_size=group_size, mask=mask, weights=weights, reduction=reduction
        )
        assert ours.dtype == sums(dtype)
        assert_close(ours, value, slack=64)


@pytest.mark.parametrize("lam", [None, 0.9, 0.2, 1.0, 1.5])
def test_detailed_and_subtrajectory_balance(lam: float | None) -> None:
    """lam = None is detailed balance."""

    @given(balance_cases)
    def run(case: tuple[Any, ...]) -> None:
        world, shape, dtype, layout, masked, weighted, _ = case
        lead = shape[:-1]
        mask = laid_out(world.coin(shape, 0.7), layout) if masked else None
        log_probs = world.normals(shape)
        if mask is not None and layout != "expanded":
            log_probs = torch.where(mask, log_probs, math.nan)
        log_probs = laid_out(log_probs.to(dtype), layout)
        flows = laid_out(world.normals((*lead, shape[-1] + 1)).to(dtype), layout)
        weights = laid_out(world.normals(lead).abs(), layout).to(sums(dtype)) if weighted else None
        exact = []
        for row in np.ndindex(lead):
            arguments = (row_of(log_probs, row), row_of(flows, row))
            row_mask = None if mask is None else mask[row].tolist()
            exact.append(
                oracle.detailed_balance(*arguments, row_mask)
                if lam is None
                else oracle.subtrajectory_balance(*arguments, lam, row_mask)
            )
        wanted = reduced(exact, None if weights is None else weights.reshape(-1).tolist(), lead)
        for reduction, value in wanted.items():
            options = {"mask": mask, "weights": weights, "reduction": reduction}
            if lam is None:
                ours = ops.detailed_balance(log_probs, flows, **options)
            else:
                ours = ops.subtrajectory_balance(log_probs, flows, lam=lam, **options)
            assert ours.dtype == sums(dtype)
            assert ours.shape == (lead if reduction == "none" else ())
            assert_close(ours, value, slack=128)

    run()


def test_subtrajectory_balance_defaults_to_lam_0_9() -> None:
    log_probs, flows = torch.randn(3, 4), torch.randn(3, 5)
    assert torch.equal(
        ops.subtrajectory_balance(log_probs, flows), ops.subtrajectory_balance(log_probs, flows, lam=0.9)
    )


# Extremes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_peaked_logits(backend: str, dtype: torch.dtype) -> None:
    """p -> 1 on one child, values near the largest of the dtype, children at -inf, logits all alike."""
    device = device_of(backend)
    rows = [[t, 9] for t in range(6)] + [[0, 8]]
    trie, world = PrefixTrie(rows).to(device), World(rows, 0, 0)
    big = min(torch.finfo(dtype).max / 4, 1e30)
    patterns = [
        [40.0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 600.0],
        [big, -big, 0, 0, 0, 0],
        [big, big, big, big, big, big],
        [-big] * 6,
        [-math.inf, 0, 1, -math.inf, 2, 3],
        [-math.inf, -math.inf, -math.inf, -math.inf, -math.inf, 5],
        [1e-3] * 6,
    ]
    for pattern in patterns:
        logits = torch.zeros(6, 2, 10, dtype=dtype, device=device)
        logits[:, 0, :6] = torch.tensor(pattern, dtype=dtype)
        tokens = torch.tensor([[t, 9] for t in range(6)], device=device)
        ours = ops.trie_token_log_probs(logits, tokens, trie, backend=backend)
        for row in range(6):
            exact = world.oracle.token_log_probs(row_of(logits, (row,)), tokens[row].tolist())
            assert_close(ours[row], exact, slack=4)
        root = torch.zeros(6, dtype=torch.int64, device=device)
        full = ops.trie_log_softmax(logits[:, 0], root, trie, backend=backend)
        torch.testing.assert_close(full.gather(1, tokens[:, :1])[:, 0], ours[:, 0], equal_nan=True)


@pytest.mark.parametrize("values", [[math.nan, 0, 0], [0, 0, math.nan], [-math.inf] * 3, [0, math.inf, 0]])
@pytest.mark.parametrize("backend", backends("trie_log_softmax"))
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, in the interpreter
def test_children_without_a_distribution_are_nan(backend: str, values: list[float]) -> None:
    """As torch.log_softmax has it: what is broken must show."""
    device = device_of(backend)
    trie = PrefixTrie([[1], [2], [3]]).to(device)
    logits = torch.tensor([[0.0, *values]], device=device)
    root = torch.zeros(1, dtype=torch.int64, device=device)
    assert ops.trie_log_softmax(logits, root, trie, backend=backend)[:, 1:].isnan().all()
    assert ops.trie_sample(logits, root, trie, backend=backend)[2].isnan().all()
    for token in (1, 2, 3):
        tokens = torch.tensor([token], device=device)
        assert ops.trie_token_log_probs(logits, tokens, trie, backend=backend).isnan()
        assert ops.trie_trajectory_balance(logits, tokens, trie, 0.0, 0.0, backend=backend).isnan()
    if backend != "triton":
        assert ops.flow_matching(logits, root, trie, torch.zeros(4, device=device), backend=backend).isnan()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", backends("trie_log_softmax"))
def test_arguments_are_left_alone(backend: str, layout: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    logits = laid_out(torch.randn(3, 2, 10, device=device), layout)
    tokens = laid_out(torch.tensor([[4, 5], [1, 3], [7, -1]], device=device), layout)
    before, strides = (logits.clone(), tokens.clone()), logits.stride()
    ops.trie_log_softmax(logits, trie.walk(tokens), trie, backend=backend)
    ops.trie_token_log_probs(logits, tokens, trie, backend=backend)
    ops.trie_sample(logits, trie.walk(tokens), trie, backend=backend)
    assert torch.equal(logits, before[0])
    assert torch.equal(tokens, before[1])
    assert logits.stride() == strides


@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_without_a_distribution_the_first_child_is_drawn(backend: str) -> None:
    device = device_of(backend)
    logits = torch.tensor([[math.nan, 1.0, 2.0], [1.0, math.nan, 2.0], [1.0, 2.0, math.nan]], device=device)
    trie = PrefixTrie([[0], [1], [2]]).to(device)
    root = torch.zeros(3, dtype=torch.int64, device=device)
    assert ops.trie_sample(logits, root, trie, backend=backend)[0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", backends("trie_log_flows"))
def test_a_broken_reward_shows_in_the_gradient(backend: str) -> None:
    """Of every item that shares a flow with it."""
    device = device_of(backend)
    trie = PrefixTrie([[0, 0], [0, 1], [1, 0], [1, 1]]).to(device)
    rewards = torch.tensor([[0.0, math.nan, 1.0, 2.0]], device=device, requires_grad=True)
    ops.trie_log_flows(rewards, trie, backend=backend)[:, 0].sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.isnan().all()


@pytest.mark.parametrize("backend", KERNELS)
def test_linear_leaves_padding_out_of_the_gradient(backend: str) -> None:
    """States behind padding and forced steps may be NaN: they reach no gradient."""
    device = device_of(backend)
    rows = torch.tensor([[0, 3, 7], [0, 4, 6], [1, 3, 6], [2, 5, -1]], device=device)
    trie = PrefixTrie(rows).to(device)
    hidden, weight = torch.randn(4, 3, 5, device=device), torch.randn(8, 5, device=device).requires_grad_()
    hidden[3, 1:] = math.nan
    hidden[2, 1:] = math.nan
    ops.trie_linear_token_log_probs(hidden, weight, rows, trie, backend=backend).sum().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("backend", backends("flow_matching"))
def test_flow_matching_reads_no_logit_where_nothing_is_to_be_chosen(backend: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie([[0], [2]]).to(device)
    logits = torch.full((1, 4), -math.inf, device=device, requires_grad=True)
    flows = torch.full((1, trie.num_nodes), -math.inf, device=device)
    nodes = torch.zeros(1, dtype=torch.int64, device=device)
    loss = ops.flow_matching(logits, nodes, trie, flows, reduction="sum", backend=backend)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad.tolist() == [[0.0] * 4]
