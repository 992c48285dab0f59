"""Gradients of every op: against the reference in float64, against finite differences, exact zeros."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import PrefixTrie, ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Call = Callable[..., Tensor]
Case = tuple[World, tuple[int, ...], torch.dtype, str, str]
ROWS = [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6], [7, 0, -1], [7, 3, -1], [7, 9, -1]]


def gradients(call: Call, inputs: list[Tensor], grad_output: Tensor) -> tuple[Tensor, ...]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    output = call(*leaves)
    return torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


# Each maker returns the op as a function of a backend, then of its differentiable inputs; these inputs; and
# the shape of its result.


def log_softmax_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    nodes = laid_out(world.nodes(shape), layout)
    logits = logits_at(world, nodes, dtype, layout, device)
    trie, given = world.trie(device), any_integers(world, nodes, layout, device)
    return (
        lambda backend: lambda logits: ops.trie_log_softmax(logits, given, trie, backend=backend),
        [logits],
        logits.shape,
    )


def token_log_probs_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    tokens, start = laid_out(world.tokens(shape), layout), laid_out(world.nodes(shape[:-1]), layout)
    logits = path_logits(world, tokens, start, dtype, layout, device)
    trie, given = world.trie(device), any_integers(world, tokens, layout, device)
    start = start.to(device)
    return (
        lambda backend: (
            lambda logits: ops.trie_token_log_probs(logits, given, trie, start=start, backend=backend)
        ),
        [logits],
        shape,
    )


def linear_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    trie, tokens = world.trie(device), world.tokens(shape).to(device)
    inputs = [world.normals(size, 1.0) for size in ((*shape, 4), (world.width, 4), (world.width,))]
    head = {"scale": 0.5 if world.seed % 2 else 1.0, "softcap": 2.0 if world.seed % 3 else None}
    return (
        lambda backend: (
            lambda hidden, weight, bias: ops.trie_linear_token_log_probs(
                hidden, weight, tokens, trie, bias, **head, backend=backend
            )
        ),
        [laid_out(values.to(dtype).to(device), layout) for values in inputs],
        shape,
    )


def trajectory_balance_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    lead = shape[:-1]
    mask = laid_out(world.coin(shape, 0.7).to(device), layout) if world.seed % 2 else None
    weights = world.normals(lead).abs().to(device) if world.seed % 3 else None
    inputs = [world.normals(shape), world.normals(lead), world.normals(lead if world.seed % 5 else ())]
    return (
        lambda backend: (
            lambda log_probs, log_rewards, log_z: ops.trajectory_balance(
                log_probs, log_rewards, log_z, mask=mask, weights=weights, reduction="none", backend=backend
            )
        ),
        [laid_out(values.to(dtype).to(device), layout) for values in inputs],
        lead,
    )


def trie_trajectory_balance_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    lead = shape[:-1]
    tokens = laid_out(world.paths(shape), layout)
    logits = path_logits(world, tokens, torch.zeros(lead, dtype=torch.int64), dtype, layout, device)
    trie, given = world.trie(device), any_integers(world, tokens, layout, device)
    weights = world.normals(lead).abs().to(device) if world.seed % 3 else None
    others = [world.normals(lead), world.normals(lead if world.seed % 5 else ())]
    return (
        lambda backend: (
            lambda logits, log_rewards, log_z: ops.trie_trajectory_balance(
                logits, given, trie, log_rewards, log_z, weights=weights, reduction="none", backend=backend
            )
        ),
        [logits, *(laid_out(values.to(dtype).to(device), layout) for values in others)],
        lead,
    )


def trie_log_partition_variance_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    group_size, steps = 1 + world.seed % 3, shape[-1]
    shape = (group_size * math.prod(shape[:-1]), steps)
    tokens = laid_out(world.paths(shape), layout)
    start = torch.zeros(shape[:1], dtype=torch.int64)
    logits = path_logits(world, tokens, start, dtype, layout, device)
    trie, given = world.trie(device), any_integers(world, tokens, layout, device)
    weights = world.normals(shape[:1]).abs().to(device) if world.seed % 5 else None
    options = {"group_size": group_size, "weights": weights, "reduction": "none"}
    return (
        lambda backend: (
            lambda logits, log_rewards: ops.trie_log_partition_variance(
                logits, given, trie, log_rewards, **options, backend=backend
            )
        ),
        [logits, laid_out(world.normals(shape[:1]).to(dtype).to(device), layout)],
        shape[:1],
    )


def log_flows_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    rewards = world.normals((*shape, len(world.rows)))
    rewards = torch.where(world.coin(rewards.shape, 0.3), -math.inf, rewards).to(dtype).to(device)
    trie = world.trie(device)
    return (
        lambda backend: lambda rewards: ops.trie_log_flows(rewards, trie, backend=backend),
        [laid_out(rewards, layout)],
        (*shape, trie.num_nodes),
    )


def flow_matching_case(
    world: World, shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: torch.device
) -> Any:
    nodes = laid_out(world.nodes(shape), layout)
    logits = logits_at(world, nodes, dtype, layout, device)
    trie, given = world.trie(device), any_integers(world, nodes, layout, device)
    lead = shape[: max(len(shape) - world.seed % 3, 0)]
    flows = world.normals((*lead, trie.num_nodes))
    flows = torch.where(world.coin(flows.shape, 0.2), -math.inf, flows).to(sums(dtype)).to(device)
    return (
        lambda backend: (
            lambda logits, flows: ops.flow_matching(
                logits, given, trie, flows, reduction="none", backend=backend
            )
        ),
        [logits, laid_out(flows, layout)],
        shape,
    )


CASES = {
    "trie_log_softmax": log_softmax_case,
    "trie_token_log_probs": token_log_probs_case,
    "trie_linear_token_log_probs": linear_case,
    "trajectory_balance": trajectory_balance_case,
    "trie_trajectory_balance": trie_trajectory_balance_case,
    "trie_log_partition_variance": trie_log_partition_variance_case,
    "trie_log_flows": log_flows_case,
    "flow_matching": flow_matching_case,
}
ON_PATHS = (
    "trie_token_log_probs",
    "trie_linear_token_log_probs",
    "trajectory_balance",
    "trie_trajectory_balance",
    "trie_log_partition_variance",
)


def kernels_for(op: str) -> list[Any]:
    return [pytest.param(op, *backend.values, marks=backend.marks) for backend in backends(op)]


@pytest.mark.parametrize(("op", "backend"), [pair for op in CASES for pair in kernels_for(op)])
def test_gradients_are_those_of_the_reference(op: str, backend: str) -> None:
    """In any dtype, with random grad_output under any strides, 0 among them.

    The float64 reference sees the same inputs without what must not be read: in ours these columns are NaN
    and infinite, and the gradient there must be exactly 0, as at forced, padded and off-trie steps.
    """

    def check(case: Case) -> None:
        world, shape, dtype, layout, grad_layout = case
        device = device_of(backend)
        make, inputs, result = CASES[op](world, shape, dtype, layout, device)
        clean = [torch.where(value.isnan(), 0.0, value.double()) for value in inputs]
        if op != "trie_log_flows":
            clean = [torch.where(v.isinf() & (v.shape[-1:] == (world.width,)), 0.0, v) for v in clean]
        grad_output = laid_out(world.normals(result, 1.0).to(sums(dtype)).to(device), grad_layout)
        exact = gradients(make("torch"), clean, grad_output)
        yardstick = gradients(make("torch"), inputs, grad_output)
        ours = gradients(make(backend), inputs, grad_output)
        for value, got, wanted, other in zip(inputs, ours, exact, yardstick, strict=True):
            assert got.dtype == value.dtype
            assert got.shape == value.shape
            zero = wanted == 0
            if op not in ("trajectory_balance", "trie_linear_token_log_probs"):
                assert (got[zero] == 0).all()
            assert_close(got, wanted.cpu(), other, slack=32)

    shape = st.tuples(leading_shapes, st.integers(0, 4)).map(lambda pair: (*pair[0], pair[1]))
    catalogue = st.builds(World, catalogues(), st.integers(0, 3), st.integers(0, 2**31))
    shapes = shape if op in ON_PATHS else leading_shapes
    cases = st.tuples(catalogue if op == "trie_log_flows" else worlds, shapes, floats, layouts, layouts)
    for_all(cases, backend, check)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("op", CASES)
def test_gradients_are_those_of_finite_differences(op: str, backend: str) -> None:
    device = device_of(backend)
    for seed in (1, 2, 3, 5, 7):
        world = World(ROWS, 0, seed)
        shape = (2, 3) if op in ON_PATHS else (3,)
        make, inputs, _ = CASES[op](world, shape, torch.float64, "contiguous", device)
        # Finite differences want finite numbers everywhere.
        leaves = [value.nan_to_num(0.0, 0.0, 0.0).requires_grad_() for value in inputs]
        call = make(backend)

        def finite(*values: Tensor, call: Call = call) -> Tensor:
            output = call(*values)
            return torch.where(output.isfinite(), output, 0.0)

        # On a GPU sums of several terms have no fixed order.
        assert torch.autograd.gradcheck(finite, leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_composite_losses_by_finite_differences(masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    log_probs, flows = (
        torch.randn(4, 3 + more, generator=generator, dtype=torch.float64).requires_grad_() for more in (0, 1)
    )
    rewards, weights = (torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(4, 3, generator=generator) < 0.7 if masked else None
    options = {"mask": mask, "weights": weights}
    assert torch.autograd.gradcheck(lambda p, f: ops.detailed_balance(p, f, **options), (log_probs, flows))
    assert torch.autograd.gradcheck(
        lambda p, f: ops.subtrajectory_balance(p, f, **options), (log_probs, flows)
    )
    assert torch.autograd.gradcheck(
        lambda p, r: ops.log_partition_variance(p, r, group_size=2, **options),
        (log_probs, rewards.requires_grad_()),
    )


def test_composite_losses_ignore_what_the_mask_hides() -> None:
    mask = torch.tensor([[True, False, True], [False, True, True]])
    for spoiler in (math.nan, math.inf, -math.inf):
        log_probs = torch.where(mask, torch.randn(2, 3), spoiler).requires_grad_()
        flows = torch.randn(2, 4).requires_grad_()
        losses = {
            "detailed_balance": ops.detailed_balance(log_probs, flows, mask=mask),
            "subtrajectory_balance": ops.subtrajectory_balance(log_probs, flows, mask=mask),
            "log_partition_variance": ops.log_partition_variance(
                log_probs, flows[:, 0], group_size=2, mask=mask
            ),
        }
        for name, loss in losses.items():
            for grad in torch.autograd.grad(loss, (log_probs, flows)):
                assert grad.isfinite().all(), name
        (grad,) = torch.autograd.grad(ops.detailed_balance(log_probs, flows, mask=mask), log_probs)
        assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("backend", backends("trie_sample"))
def test_a_draw_has_the_gradient_of_its_token(backend: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    for dtype in FLOATS:
        for layout in LAYOUTS:
            world = World(ROWS, 0, 11)
            nodes = world.nodes((4, 3))
            logits = logits_at(world, nodes, dtype, layout, device).requires_grad_()
            nodes = nodes.to(device)
            generator = torch.Generator(device).manual_seed(0)
            tokens, reached, log_probs = ops.trie_sample(
                logits, nodes, trie, temperature=0.7, generator=generator, backend=backend
            )
            assert not tokens.requires_grad
            assert not reached.requires_grad
            grad_output = laid_out(world.normals((4, 3), 1.0).to(log_probs.dtype).to(device), layout)
            (ours,) = torch.autograd.grad(log_probs, logits, grad_output)
            same = ops.trie_token_log_probs(
                logits.unsqueeze(-2), tokens.unsqueeze(-1), trie, start=nodes, backend="torch"
            )
            (exact,) = torch.autograd.grad(same, logits, grad_output.unsqueeze(-1))
            assert ours.isfinite().all()
            assert_close(ours, exact.double().cpu(), exact)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("op", "backend"), [*kernels_for("trajectory_balance"), *kernels_for("trie_trajectory_balance")]
)
def test_weights_are_constants_and_the_rest_is_not(op: str, backend: str, reduction: str) -> None:
    """d/d log Z is 2 * weights * residual, over B for the mean, and d/d log R its negative."""
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    tokens = torch.tensor([[1, 2, 5], [4, 5, 6], [7, 9, -1]], device=device)
    logits = torch.randn(3, 3, 10, device=device, dtype=torch.float64)
    log_probs = ops.trie_token_log_probs(logits, tokens, trie, backend="torch")
    weights = torch.tensor([0.5, 2.0, 0.0], device=device, dtype=torch.float64, requires_grad=True)
    for shape in ((3,), ()):
        rewards = torch.randn(3, device=device, dtype=torch.float64, requires_grad=True)
        log_z = torch.randn(shape, device=device, dtype=torch.float64, requires_grad=True)
        options = {"weights": weights, "reduction": reduction, "backend": backend}
        if op == "trajectory_balance":
            loss = ops.trajectory_balance(log_probs, rewards, log_z, **options)
        else:
            loss = ops.trie_trajectory_balance(logits, tokens, trie, rewards, log_z, **options)
        residual = (log_z + log_probs.sum(-1) - rewards).detach()
        slope = 2 * weights.detach() * residual / (3 if reduction == "mean" else 1)
        loss.sum().backward()
        assert weights.grad is None
        torch.testing.assert_close(rewards.grad, -slope)
        torch.testing.assert_close(log_z.grad, slope if shape else slope.sum())


def test_weights_are_constants_of_the_composite_losses() -> None:
    log_probs, flows = torch.randn(4, 3, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    weights = torch.rand(4, requires_grad=True)
    for loss in (
        ops.detailed_balance(log_probs, flows, weights=weights),
        ops.subtrajectory_balance(log_probs, flows, weights=weights),
        ops.log_partition_variance(log_probs, flows[:, 0], group_size=2, weights=weights),
    ):
        loss.backward()
        assert weights.grad is None


@pytest.mark.parametrize(("op", "backend"), [pair for op in CASES for pair in kernels_for(op)])
def test_gradients_of_nothing(op: str, backend: str) -> None:
    """No rows, no steps: gradients of the right shape, and zero."""
    device = device_of(backend)
    shapes = [(0, 3), (3, 0), (0, 0), (2, 0, 3), (0,)] if op in ON_PATHS else [(0,), (0, 3), (3, 0)]
    for shape in shapes:
        make, inputs, result = CASES[op](World(ROWS, 0, 1), shape, torch.float32, "contiguous", device)
        for value, grad in zip(
            inputs, gradients(make(backend), inputs, torch.ones(result, device=device)), strict=True
        ):
            assert grad.shape == value.shape
            if op not in ("trajectory_balance", "trie_trajectory_balance", "trie_log_partition_variance"):
                assert (grad == 0).all()


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_only_what_needs_a_gradient_gets_one(backend: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    tokens = torch.tensor([[1, 2, 5], [4, 5, 6]], device=device)
    logits = torch.randn(2, 3, 10, device=device)
    assert not ops.trie_token_log_probs(logits, tokens, trie, backend=backend).requires_grad
    log_z = torch.zeros((), device=device, requires_grad=True)
    loss = ops.trie_trajectory_balance(
        logits, tokens, trie, torch.zeros(2, device=device), log_z, backend=backend
    )
    loss.backward()
    assert log_z.grad is not None
    with torch.no_grad():
        assert not ops.trie_token_log_probs(
            logits.requires_grad_(), tokens, trie, backend=backend
        ).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_gradients_round_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    """Where P_F is exactly 1 and 0 the gradient is grad_output itself, so the cast is seen alone.

    Values on, beside and between the own ones of the dtype, subnormal, past the largest; infinite and NaN
    ones where no backend multiplies them by 0 first.
    """
    device = device_of(backend)
    interpreted = backend == "triton" and device.type == "cpu"
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 where the hardware rounds")
    info = torch.finfo(dtype)
    bits = torch.arange(0, 2**16 - 1, 5000 if interpreted else 7, dtype=torch.int32)
    every, after = (number.to(torch.int16).view(dtype).float() for number in (bits, bits + 1))
    inside = every.isfinite() & after.isfinite()
    every, halfway = every[inside], (every / 2 + after / 2)[inside]
    extremes = torch.tensor([info.max, info.max * (1 + info.eps / 8), 0.0, -0.0])
    values = torch.cat([every, halfway, halfway * (1 + 2**-20), halfway * (1 - 2**-20), every / 3, extremes])
    if backend == "cpp":
        values = torch.cat([values, torch.tensor([math.inf, -math.inf, math.nan])])
    values = values.to(device)
    trie = PrefixTrie([[0], [1]]).to(device)
    logits = torch.tensor([0.0, -math.inf], dtype=dtype, device=device).expand(len(values), 1, 2)
    tokens = torch.ones(len(values), 1, dtype=torch.int64, device=device)
    (grad,) = gradients(
        lambda logits: ops.trie_token_log_probs(logits, tokens, trie, backend=backend),
        [logits],
        values.unsqueeze(-1),
    )
    torch.testing.assert_close(grad[:, 0, 1], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad[:, 0, 0], (-values).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_every_narrow_number_is_read_as_it_is(backend: str, dtype: torch.dtype) -> None:
    """All 65,536 of them, beside a child at 0."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    logits = torch.stack([every, torch.zeros_like(every)], -1)
    root = torch.zeros(len(every), dtype=torch.int64)
    ours = ops.trie_log_softmax(logits, root, PrefixTrie([[0], [1]]), backend=backend)
    exact = logits.double().log_softmax(-1)
    assert_close(ours, exact, slack=2)
    # Small differences of x show in the other child's log-prob only; x itself is their difference.
    finite = every.isfinite() & (every.abs() < 8)
    torch.testing.assert_close((ours[:, 0] - ours[:, 1])[finite], every.float()[finite], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("children", [2, 16, 41])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["cpp"])
def test_small_probabilities_keep_their_digits(backend: str, dtype: torch.dtype, children: int) -> None:
    """The gradient beside a taken child at 0 is -P_F of the others, right to a few digits down to 1e-37."""
    others = torch.linspace(-86, -0.01, 20 * (children - 1), dtype=torch.float64).to(dtype).view(20, -1)
    logits = torch.cat([torch.zeros(20, 1, dtype=dtype), others], 1).unsqueeze(1)
    tokens, trie = torch.zeros(20, 1, dtype=torch.int64), PrefixTrie([[token] for token in range(children)])
    (grad,) = gradients(
        lambda logits: ops.trie_token_log_probs(logits, tokens, trie, backend=backend),
        [logits],
        torch.ones(20, 1),
    )
    exact = -logits.double().softmax(-1)[..., 1:]
    torch.testing.assert_close(grad[..., 1:].double(), exact, rtol=6 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_a_path_that_leaves_the_trie_keeps_the_gradients_before(backend: str) -> None:
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    logits = torch.randn(1, 3, 10, device=device)
    good, lost = torch.tensor([[1, 2, 5]], device=device), torch.tensor([[1, 9, 5]], device=device)
    grads = []
    for tokens in (good, lost):
        (grad,) = gradients(
            lambda logits, tokens=tokens: ops.trie_token_log_probs(logits, tokens, trie, backend=backend),
            [logits],
            torch.tensor([[1.0, 2.0, 3.0]], device=device),
        )
        grads.append(grad)
    assert torch.equal(grads[0][0, 0], grads[1][0, 0])
    assert grads[0][0, 0].abs().sum() > 0
    assert (grads[1][0, 1:] == 0).all()


@pytest.mark.parametrize("backend", backends("trie_log_softmax"))
def test_several_gradients_at_once(backend: str) -> None:
    """As `is_grads_batched` takes them: the gradient that comes in stands for all of them."""
    trie = PrefixTrie(ROWS).to(device_of(backend))
    tokens = torch.tensor([[1, 2, 5], [7, 3, -1]], device=trie.device)
    logits = torch.randn(2, 3, 10, dtype=torch.float64, device=trie.device)

    def of_paths(logits: Tensor) -> Tensor:
        return ops.trie_token_log_probs(logits, tokens, trie, backend=backend).sum(1)

    jacobian = torch.autograd.functional.jacobian
    assert_close(jacobian(of_paths, logits, vectorize=True), jacobian(of_paths, logits))


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_gradients_sum_to_zero_over_the_children(backend: str) -> None:
    """A shift of all logits changes no log-prob."""
    device = device_of(backend)
    trie = PrefixTrie(ROWS).to(device)
    nodes = torch.arange(trie.num_nodes, device=device)
    logits = torch.randn(trie.num_nodes, 10, device=device, dtype=torch.float64) * 20
    (grad,) = gradients(
        lambda logits: ops.trie_log_softmax(logits, nodes, trie, backend=backend),
        [logits],
        torch.randn(trie.num_nodes, 10, device=device, dtype=torch.float64),
    )
    assert np.allclose(grad.sum(-1).cpu(), 0, atol=1e-12)
    assert grad.abs().sum() > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", backends("trie_log_flows"))
def test_gradients_of_flows_of_many_children(backend: str, dtype: torch.dtype) -> None:
    """Kernels take many children by vectors or in chunks; some items collide and some carry nothing."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 40, (600, 2), generator=generator)
    trie = PrefixTrie(rows).to(device)
    rewards = 3.0 * torch.randn(2, 600, generator=generator, dtype=dtype)
    rewards[torch.rand(2, 600, generator=generator) < 0.1] = -math.inf
    grad = torch.randn(2, trie.num_nodes, generator=generator, dtype=dtype).to(device)
    found = []
    for values, kernel in ((rewards.to(device), backend), (rewards.double().to(device), "torch")):
        leaf = values.clone().requires_grad_()
        ops.trie_log_flows(leaf, trie, backend=kernel).backward(grad.to(values.dtype).nan_to_num())
        found.append(leaf.grad)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(found[0].double(), found[1], rtol=tolerance, atol=tolerance)
