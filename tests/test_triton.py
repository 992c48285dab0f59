"""The Triton kernels against the float64 reference, and what only they have: blocks, offsets, versions."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from core_cases import FLOATS, World, catalogues, laid_out, spoilt, wide_catalogues, worlds
from filter_cases import Filtered, filtered
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import ItemFilter, PrefixTrie, ops, reference
from gflowgr.bench.timing import waiting_is_an_error
from gflowgr.ops._filters import arrays_of

pytest.importorskip("triton")
from gflowgr.kernels import _launch

from gflowgr import kernels

runs = pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a CUDA device or TRITON_INTERPRET=1",
)
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
LAYOUTS = st.sampled_from(("contiguous", "transposed", "sliced", "expanded", "one logit"))
SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 5))
# Children over three blocks of the largest size, the last one of few.
WIDE = 2 * 1024 + 3


def arrays(trie: PrefixTrie) -> tuple[Tensor, Tensor, int]:
    return trie.first_child, trie.token, trie.max_children


def item_arrays(trie: PrefixTrie) -> tuple[Tensor, ...]:
    return trie.first_child, trie.token, trie.first_item, trie.item_count, trie.item_order


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """A few roundings of the dtype; `dtype` is that of a result, or of a gradient."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return {
        "rtol": torch.finfo(dtype).eps * (1 if narrow else 64),
        "atol": 2e-12 if dtype == torch.float64 else 2e-6,
    }


def close(ours: Tensor, exact: Tensor, magnitude: float = 1.0) -> None:
    """`magnitude` is that of numbers whose difference a result is."""
    limits = tolerance(ours.dtype)
    limits["atol"] *= magnitude
    torch.testing.assert_close(ours, exact.to(ours.dtype), equal_nan=True, **limits)


def sums(dtype: torch.dtype) -> torch.dtype:
    return reference.accumulation_dtype(dtype)


def logits_of(world: World, shape: tuple[int, ...], layout: str, dtype: torch.dtype, scale: float) -> Tensor:
    """Logits of any scale, a tenth of them -inf, which the narrow dtypes hold exactly."""
    values = world.normals(shape, scale).clamp(-6e4, 6e4)
    values = torch.where(world.coin(shape, 0.1), -math.inf, values).to(dtype)
    if layout == "one logit" and values.numel():
        return values[..., :1].contiguous().expand(shape)
    return laid_out(values, "contiguous" if layout == "one logit" else layout)


def choices(world: World, nodes: Tensor) -> Any:
    """The columns that a row at `nodes` may read: those of the children, where there are two or more."""

    def read(row: tuple[int, ...]) -> list[int]:
        children = list(world.oracle.children(int(nodes[row])))
        return children if len(children) > 1 else []

    return read


def gradient(output: Tensor, wanted: Tensor, grad: Tensor) -> Tensor:
    (result,) = torch.autograd.grad(output, wanted, grad)
    return result


@runs
@few
@given(worlds, SHAPES, LAYOUTS, st.sampled_from(FLOATS), st.sampled_from((1.0, 30.0, 3e3)), st.booleans())
def test_token_log_probs(
    poisoned_memory: None,
    device: torch.device,
    world: World,
    shape: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    scale: float,
    stride_0: bool,
) -> None:
    trie = world.trie(torch.device("cpu"))
    logits = logits_of(world, (*shape, world.width), layout, dtype, scale)
    tokens, start = world.tokens(shape), torch.where(world.coin(shape[:1]), 0, world.nodes(shape[:1]))
    exact = logits.double().requires_grad_()
    expected = reference.trie_token_log_probs(exact, tokens, trie, start)
    grad = world.normals((1, 1) if stride_0 else shape[::-1]).to(sums(dtype))
    grad = grad.expand(shape) if stride_0 else grad.mT

    trie = trie.to(device)
    logits, tokens, start, grad = (each.to(device) for each in (logits, tokens, start, grad))
    ours = kernels.trie_token_log_probs(logits, tokens, start, *arrays(trie), 0)
    assert ours.dtype == sums(dtype)
    close(ours.cpu(), expected)
    ours = kernels.trie_token_log_probs_backward(grad, logits, tokens, start, *arrays(trie), 0)
    assert ours.dtype == dtype and ours.shape == logits.shape
    close(ours.cpu(), gradient(expected, exact, grad.cpu().double()))


@runs
@few
@given(worlds, SHAPES, LAYOUTS, st.sampled_from(FLOATS), st.sampled_from((1.0, 30.0, 3e3)), st.booleans())
def test_log_softmax(
    poisoned_memory: None,
    device: torch.device,
    world: World,
    shape: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    scale: float,
    stride_0: bool,
) -> None:
    trie, nodes = world.trie(torch.device("cpu")), world.nodes(shape)
    logits = logits_of(world, (*shape, world.width), layout, dtype, scale)
    exact = logits.double().requires_grad_()
    expected = reference.trie_log_softmax(exact, nodes, trie)
    grad = world.normals((*shape, world.width)).to(sums(dtype))
    grad = laid_out(grad, "expanded" if stride_0 else "transposed")

    trie = trie.to(device)
    logits, nodes, grad = (each.to(device) for each in (logits, nodes, grad))
    ours = kernels.trie_log_softmax(logits, nodes, *arrays(trie))
    assert ours.dtype == sums(dtype)
    close(ours.cpu(), expected)
    ours = kernels.trie_log_softmax_backward(grad, ours, nodes, *arrays(trie), dtype)
    assert ours.dtype == dtype and ours.shape == logits.shape
    close(ours.cpu(), gradient(expected, exact, grad.cpu().double()))


@runs
@few
@given(worlds, SHAPES, LAYOUTS, st.sampled_from(FLOATS), st.sampled_from((0.05, 0.7, 1.0, 4.0)))
def test_sample(
    poisoned_memory: None,
    device: torch.device,
    world: World,
    shape: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    temperature: float,
) -> None:
    trie, nodes = world.trie(torch.device("cpu")), world.nodes(shape)
    logits = logits_of(world, (*shape, world.width), layout, dtype, 2.0)
    uniform = torch.rand(shape, generator=world.generator, dtype=torch.float64)
    child, _, exists, log_probs = reference.child_log_probs(logits.double(), nodes, trie)
    mass = (log_probs / temperature).softmax(-1).nan_to_num(0.0)
    cumulative = mass.cumsum(-1)

    moved = trie.to(device)
    tokens, reached, drawn_log_probs = (
        each.cpu()
        for each in kernels.trie_sample(
            logits.to(device), nodes.to(device), *arrays(moved), uniform.to(device), temperature
        )
    )
    alive = exists.any(-1)
    assert (
        (tokens[~alive] == -1).all()
        and (reached[~alive] == -1).all()
        and (drawn_log_probs[~alive] == 0).all()
    )
    assert torch.equal(trie.token[reached[alive]].long(), tokens[alive])
    hit = (child == reached.unsqueeze(-1)) & exists
    assert torch.equal(hit.sum(-1), alive.long())
    close(drawn_log_probs[alive], log_probs[hit])
    # The CDF encloses the uniform number, but for roundings; without a distribution it is the first child.
    some = alive & (mass.sum(-1) > 0)
    slack = tolerance(sums(dtype))["atol"]
    upper = torch.where(hit, cumulative, 0.0).sum(-1)
    lower = upper - torch.where(hit, mass, 0.0).sum(-1)
    assert (lower <= uniform + slack)[some].all() and (upper >= uniform - slack)[some].all()
    assert (torch.where(hit, log_probs, 0.0).sum(-1) > -math.inf)[some].all()
    first, _ = reference.child_range(nodes, trie)
    assert torch.equal(reached[alive & ~some], first[alive & ~some])


@runs
def test_every_set_of_children_may_be_hidden(device: torch.device) -> None:
    trie = PrefixTrie([[token] for token in (0, 1, 2, 4, 5)])
    exclude = [[item for item in range(5) if subset >> item & 1] for subset in range(32)]
    logits, roots = torch.randn(32, 1, 6), torch.zeros(32, 1, dtype=torch.int64)
    item_filter = ItemFilter(trie, exclude)
    expected = reference.trie_child_log_probs(logits, roots, trie, 0, 5, item_filter)
    here = [None if each is None else each.to(device) for each in arrays_of(item_filter)]
    found = kernels.trie_child_log_probs(
        logits.to(device), roots.to(device), *arrays(trie.to(device)), 0, 5, *here
    )
    torch.testing.assert_close(found.cpu(), expected)


@runs
@few
@given(filtered(), st.integers(0, 3), LAYOUTS, st.sampled_from(FLOATS), st.integers(0, 2))
def test_item_filters(
    poisoned_memory: None,
    device: torch.device,
    case: Filtered,
    steps: int,
    layout: str,
    dtype: torch.dtype,
    spare: int,
) -> None:
    """All that take one, forward and backward, against the definition."""
    trie = case.trie(torch.device("cpu"))
    item_filter, nodes = case.filter(trie), case.nodes((case.contexts, steps))
    logits = case.normals((*nodes.shape, case.width), 3.0).to(dtype)
    if layout != "one logit":
        logits = laid_out(logits, layout)
    first = trie.first_child[nodes.clamp(0, trie.num_nodes - 1)].clamp(max=trie.num_nodes - 1)
    tokens, start = trie.token[first.long()].long(), case.nodes((case.contexts,))
    exact = logits.double().requires_grad_()
    width = max(trie.max_children - spare, 1)
    expected = (
        reference.trie_log_softmax(exact, nodes, trie, item_filter),
        reference.trie_child_log_probs(exact, nodes, trie, 0, width, item_filter),
        reference.trie_token_log_probs(exact, tokens, trie, start, 0, item_filter),
    )
    dense_grad, child_grad, token_grad = (
        case.normals(tuple(each.shape)).to(sums(dtype)) for each in expected
    )

    moved = trie.to(device)
    here = [None if each is None else each.to(device) for each in arrays_of(item_filter)]
    logits, nodes, tokens, start = (each.to(device) for each in (logits, nodes, tokens, start))
    kids = arrays(moved)
    dense = kernels.trie_log_softmax(logits, nodes, *kids, *here)
    by_child = kernels.trie_child_log_probs(logits, nodes, *kids, 0, width, *here)
    by_token = kernels.trie_token_log_probs(logits, tokens, start, *kids, 0, *here)
    for ours, wanted in zip((dense, by_child, by_token), expected, strict=True):
        assert ours.dtype == sums(dtype)
        close(ours.cpu(), wanted)
    gradients = (
        kernels.trie_log_softmax_backward(dense_grad.to(device), dense, nodes, *kids, dtype, *here),
        kernels.trie_child_log_probs_backward(child_grad.to(device), logits, nodes, *kids, 0, width, *here),
        kernels.trie_token_log_probs_backward(token_grad.to(device), logits, tokens, start, *kids, 0, *here),
    )
    grads = (dense_grad, child_grad, token_grad)
    for ours, wanted, grad in zip(gradients, expected, grads, strict=True):
        assert ours.dtype == dtype and ours.shape == logits.shape
        close(ours.cpu(), gradient(wanted, exact, grad.double()), 8.0)


@runs
@few
@given(worlds, SHAPES, LAYOUTS, st.sampled_from(FLOATS), st.booleans())
def test_trie_trajectory_balance(
    poisoned_memory: None,
    device: torch.device,
    world: World,
    shape: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    weighted: bool,
) -> None:
    trie, batch = world.trie(torch.device("cpu")), shape[:1]
    logits = logits_of(world, (*shape, world.width), layout, dtype, 2.0)
    tokens, start = world.tokens(shape), torch.where(world.coin(batch), 0, world.nodes(batch))
    log_rewards, log_z = world.normals(batch), world.normals(()).expand(batch)
    weights = (
        torch.rand(2 * batch[0], generator=world.generator, dtype=torch.float64)[::2] if weighted else None
    )
    log_rewards, log_z = log_rewards.to(sums(dtype)), log_z.to(sums(dtype))
    weights = None if weights is None else weights.to(sums(dtype))
    log_probs = reference.trie_token_log_probs(logits.double(), tokens, trie, start)
    residual = reference.trajectory_balance_residual(log_probs, log_rewards.double(), log_z.double(), None)

    trie = trie.to(device)
    loss, ours = kernels.trie_trajectory_balance(
        *(each.to(device) for each in (logits, tokens, start)),
        *arrays(trie),
        log_rewards.to(device),
        log_z.to(device),
        None if weights is None else weights.to(device),
    )
    assert loss.dtype == ours.dtype == sums(dtype)
    close(ours.cpu(), residual)
    close(loss.cpu(), residual.square() if weights is None else weights.double() * residual.square())


@runs
@few
@given(worlds, SHAPES, st.sampled_from(("contiguous", "transposed", "sliced", "expanded")))
def test_walk(
    poisoned_memory: None, device: torch.device, world: World, shape: tuple[int, int], layout: str
) -> None:
    trie, batch = world.trie(torch.device("cpu")), shape[:1]
    tokens = laid_out(world.tokens(shape), layout)
    start = laid_out(torch.where(world.coin(batch), 0, world.nodes(batch)), layout)
    ours = kernels.trie_walk(tokens.to(device), start.to(device), *arrays(trie.to(device))[:2])
    assert torch.equal(ours.cpu(), reference.trie_walk(tokens, start, trie))


@runs
@pytest.mark.filterwarnings("ignore:invalid value encountered in (subtract|reduce):RuntimeWarning")
@few
@given(
    worlds,
    st.integers(0, 3),
    st.sampled_from((0, 1, 4, 19)),
    LAYOUTS,
    st.sampled_from(FLOATS),
    st.sampled_from((1.0, 30.0)),
    st.booleans(),
)
def test_flow_matching(
    poisoned_memory: None,
    device: torch.device,
    world: World,
    contexts: int,
    sharing: int,
    layout: str,
    dtype: torch.dtype,
    scale: float,
    stride_0: bool,
) -> None:
    """A row of flows serves 19 rows at most, so that they come in several tiles, many at one node."""
    shape, trie = (contexts, sharing), world.trie(torch.device("cpu"))
    nodes = torch.where(world.coin(shape, 0.4), 0, world.nodes(shape))
    logits = logits_of(world, (*shape, world.width), layout, dtype, scale)
    flows = world.normals((contexts, trie.num_nodes))
    flows = torch.where(world.coin(flows.shape, 0.2), -math.inf, flows).to(sums(dtype))
    flows = laid_out(flows, "contiguous" if layout == "one logit" else layout)
    exact, exact_flows = logits.double().requires_grad_(), flows.double().requires_grad_()
    expected = reference.flow_matching(exact, nodes, trie, exact_flows)
    grad = world.normals((1, 1) if stride_0 else shape[::-1]).to(sums(dtype))
    grad = grad.expand(shape) if stride_0 else grad.mT
    grads = torch.autograd.grad(expected, (exact, exact_flows), grad.double())

    trie = trie.to(device)
    logits, nodes, flows, grad = (each.to(device) for each in (logits, nodes, flows, grad))
    ours = kernels.flow_matching(logits, nodes, *arrays(trie), flows)
    assert ours.dtype == sums(dtype) and ours.shape == shape
    close(ours.cpu(), expected)
    ours, ours_flows = kernels.flow_matching_backward(grad, logits, nodes, *arrays(trie), flows, True)
    assert ours.dtype == dtype and ours.shape == logits.shape
    assert ours_flows.dtype == flows.dtype and ours_flows.shape == flows.shape
    close(ours.cpu(), grads[0])
    # A divergence that is infinite or NaN spoils the gradient of its node's flows, and of nothing else.
    defined, got = grads[1].isfinite(), ours_flows.cpu()
    close(got[defined], grads[1][defined], magnitude=scale)
    assert not got[~defined & (flows.cpu() > -math.inf)].isfinite().any()
    alone, nothing = kernels.flow_matching_backward(grad, logits, nodes, *arrays(trie), flows, False)
    torch.testing.assert_close(alone, ours, rtol=0, atol=0, equal_nan=True)
    assert nothing.numel() == 0


@runs
@few
@given(
    st.builds(World, st.one_of(catalogues(), wide_catalogues()), st.just(0), st.integers(0, 2**31)),
    # Tiles of the gradient hold 16 contexts.
    st.sampled_from((0, 1, 17)),
    st.sampled_from(("contiguous", "transposed", "sliced", "expanded")),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from((1.0, 30.0)),
    st.booleans(),
)
def test_log_flows(
    poisoned_memory: None,
    device: torch.device,
    world: World,
    batch: int,
    layout: str,
    dtype: torch.dtype,
    scale: float,
    stride_0: bool,
) -> None:
    trie = world.trie(torch.device("cpu"))
    rewards = world.normals((batch, trie.num_items), scale)
    rewards = laid_out(torch.where(world.coin(rewards.shape, 0.3), -math.inf, rewards).to(dtype), layout)
    exact = rewards.double().requires_grad_()
    expected = reference.trie_log_flows(exact, trie)
    grad = laid_out(world.normals((batch, trie.num_nodes)).to(dtype), "expanded" if stride_0 else layout)

    moved = trie.to(device)
    rewards, grad = rewards.to(device), grad.to(device)
    ours = kernels.trie_log_flows(rewards, *item_arrays(moved))
    assert ours.dtype == dtype
    close(ours.cpu(), expected)
    ours = kernels.trie_log_flows_backward(grad, rewards, ours, *item_arrays(moved))
    assert ours.dtype == dtype and ours.shape == rewards.shape
    # The definition cannot differentiate where no reward is left; there no share is, either.
    close(ours.cpu(), gradient(expected, exact, grad.cpu().double()).nan_to_num(0.0))


@runs
def test_children_without_flow_are_left_alone(device: torch.device) -> None:
    """In a tile with rows that have flow; NaN shows what is read where nothing is to match."""
    trie = PrefixTrie([[token] for token in range(3)]).to(device)
    nodes = torch.zeros(3, 1, dtype=torch.int64, device=device)
    flows = torch.zeros(3, 4, device=device)
    flows[1] = -math.inf
    logits = torch.tensor([[0.0, 0, 0], [math.nan, 2, 3], [0, 0, math.log(2)]], device=device)[:, None]
    grad = torch.ones(3, 1, device=device)
    ours = kernels.flow_matching(logits, nodes, *arrays(trie), flows)
    close(ours.cpu(), torch.tensor([[0.0], [0.0], [math.log(4 / 3) - math.log(2) / 3]]))
    grad_logits, grad_flows = kernels.flow_matching_backward(grad, logits, nodes, *arrays(trie), flows, True)
    third, gain = 1 / 3, math.log(2) / 9
    close(grad_logits[:, 0].cpu(), torch.tensor([[0.0] * 3, [0.0] * 3, [0.25 - third] * 2 + [0.5 - third]]))
    close(grad_flows.cpu(), torch.tensor([[0.0] * 4, [0.0] * 4, [0, gain, gain, -2 * gain]]))


@runs
@pytest.mark.parametrize("items", [255, 256, 257, 1100])
def test_flows_over_several_chunks_of_items(device: torch.device, items: int) -> None:
    """Ranges that begin and end inside, at and between chunks of 256 items; some chunks without reward."""
    generator = torch.Generator().manual_seed(items)
    first = torch.cat([torch.zeros(items - 60, dtype=torch.int64), torch.arange(1, 61) // 2])
    second = torch.randint(0, 40, (items,), generator=generator)
    trie = PrefixTrie(torch.stack([first, second], 1)[torch.randperm(items, generator=generator)])
    rewards = torch.randn(2, items, generator=generator, dtype=torch.float64) * 5
    rewards[0, trie.item_order[200:900].long()] = -math.inf
    moved = trie.to(device)
    ours = kernels.trie_log_flows(rewards.to(device), *item_arrays(moved)).cpu()
    close(ours, reference.trie_log_flows(rewards, trie))
    single = trie.item_count == 1
    assert torch.equal(ours[:, single], rewards[:, trie.item_order[trie.first_item[single].long()].long()])


@runs
def test_the_gradient_of_shared_flows_is_the_same_every_time(device: torch.device) -> None:
    """Dozens of rows at one node of many children: no result may depend on which program comes first."""
    trie = PrefixTrie([[token, 0] for token in range(70)] + [[0, token] for token in range(1, 3)])
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randint(0, 2, (1, 60), generator=generator)
    logits = torch.randn(1, 60, 70, generator=generator)
    flows = torch.randn(1, trie.num_nodes, generator=generator)
    grad = torch.randn(1, 60, generator=generator)
    exact = flows.double().requires_grad_()
    expected = gradient(reference.flow_matching(logits.double(), nodes, trie, exact), exact, grad.double())
    moved, inputs = trie.to(device), [each.to(device) for each in (grad, logits, nodes)]
    ours, *again = (
        kernels.flow_matching_backward(*inputs, *arrays(moved), flows.to(device), True)[1].cpu()
        for _ in range(5 if torch.cuda.is_available() else 2)
    )
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(ours, other) for other in again)


@runs
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.builds(World, st.just([[0]]), st.just(0), st.integers(0, 2**31)),
    # Tiles hold 32 trajectories of 16 steps.
    st.tuples(st.sampled_from((0, 1, 32, 70)), st.sampled_from((0, 3, 16, 37))),
    st.sampled_from(("contiguous", "transposed", "sliced", "expanded")),
    st.sampled_from((torch.float32, torch.float64)),
    st.booleans(),
    st.booleans(),
)
def test_trajectory_balance(
    poisoned_memory: None,
    device: torch.device,
    world: World,
    shape: tuple[int, int],
    layout: str,
    dtype: torch.dtype,
    masked: bool,
    weighted: bool,
) -> None:
    batch = shape[:1]
    mask = laid_out(world.coin(shape), layout) if masked else None
    log_probs = laid_out(world.normals(shape).to(dtype), layout)
    if mask is not None and layout != "expanded":
        log_probs = torch.where(mask, log_probs, world.coin(shape).to(dtype) / 0)  # inf and NaN
    log_rewards, log_z = world.normals(batch).to(dtype), world.normals(()).to(dtype).expand(batch)
    weights = world.normals(batch).square().to(dtype) if weighted else None
    exact = log_probs.double().requires_grad_()
    residual = reference.trajectory_balance_residual(exact, log_rewards.double(), log_z.double(), mask)
    grad = world.normals(batch).to(dtype)

    def moved(each: Tensor | None) -> Tensor | None:
        return None if each is None else each.to(device)

    loss, ours = kernels.trajectory_balance(*map(moved, (log_probs, log_rewards, log_z, mask, weights)))
    close(ours.cpu(), residual)
    close(loss.cpu(), residual.square() if weights is None else weights.double() * residual.square())
    ours = kernels.trajectory_balance_backward(moved(grad), moved(mask), shape[1])
    assert ours.shape == shape and ours.dtype == dtype
    close(ours.cpu(), gradient(residual, exact, grad.double()))


@runs
def test_padding_misses_and_forced_steps_by_hand(device: torch.device) -> None:
    """The root has 0 and 1, 0 has only 2, which has 3 and 4; 1 ends. NaN where no kernel may look."""
    trie = PrefixTrie([[0, 2, 3], [0, 2, 4], [1, -1, -1]]).to(device)
    nan, half = math.nan, math.log(0.5)
    choice, last = [1.0, 1.0, nan, nan, nan], [nan, nan, nan, 2.0, 2.0]
    logits = torch.tensor([choice, [nan] * 5, last], device=device).expand(7, 3, 5)
    tokens = torch.tensor(
        [[0, 2, 3], [0, 2, -1], [0, -1, 3], [-1, 2, 3], [1, 2, 3], [0, 3, -1], [2**40, 2, 3]], device=device
    )
    start, grad = torch.zeros(7, dtype=torch.int64, device=device), torch.ones(7, 3, device=device)
    none = -math.inf
    expected = [[half, 0, half], [half, 0, 0], [half, 0, 0], [0, 0, 0], [half, none, none], [half, none, 0]]
    expected.append([none] * 3)
    ours = kernels.trie_token_log_probs(logits, tokens, start, *arrays(trie), 0)
    close(ours.cpu(), torch.tensor(expected))
    ours = kernels.trie_token_log_probs_backward(grad, logits, tokens, start, *arrays(trie), 0)
    written = torch.zeros(7, 3, 5)
    written[[0, 1, 2, 4, 5], 0, :2] = torch.tensor([[0.5, -0.5]])
    written[4, 0, :2] = torch.tensor([-0.5, 0.5])
    written[0, 2, 3:] = torch.tensor([0.5, -0.5])
    assert torch.equal(ours.cpu(), written)
    zeros = torch.zeros(7, device=device)
    _, residual = kernels.trie_trajectory_balance(logits, tokens, start, *arrays(trie), zeros, zeros, None)
    close(residual.cpu(), torch.tensor([2 * half, half, half, 0, none, none, none]))


@runs
@few
@given(worlds, st.sampled_from(FLOATS))
def test_no_other_column_is_read(
    poisoned_memory: None, device: torch.device, world: World, dtype: torch.dtype
) -> None:
    """NaN and infinities at forced steps, off the trie, in padding and beside the children change nothing."""
    shape, trie = (3, 4), world.trie(torch.device("cpu"))
    logits, tokens = world.normals((*shape, world.width)).to(dtype), world.tokens(shape)
    start = world.nodes(shape[:1])
    after = reference.trie_walk(tokens, start, trie)
    before = torch.where(after >= 0, torch.cat([start[:, None], after], -1)[:, :-1], -1)
    dirty = spoilt(logits, choices(world, before), world.generator)
    dirty_rows = spoilt(logits, choices(world, after), world.generator)
    grad, uniform = world.normals(shape).to(sums(dtype)), torch.rand(shape, dtype=torch.float64)
    flows = world.normals((shape[0], trie.num_nodes)).to(sums(dtype)).to(device)
    moved = trie.to(device)
    tokens, start, grad, uniform, after = (each.to(device) for each in (tokens, start, grad, uniform, after))

    def results(by_path: Tensor, by_row: Tensor) -> list[Tensor]:
        by_path, by_row = by_path.to(device), by_row.to(device)
        zeros = grad.new_zeros(shape[0])
        dense = kernels.trie_log_softmax(by_row, after, *arrays(moved))
        return [
            kernels.trie_token_log_probs(by_path, tokens, start, *arrays(moved), 0),
            kernels.trie_token_log_probs_backward(grad, by_path, tokens, start, *arrays(moved), 0),
            *kernels.trie_trajectory_balance(by_path, tokens, start, *arrays(moved), zeros, zeros, None),
            dense,
            kernels.trie_log_softmax_backward(
                by_row.to(sums(dtype)), dense, after, *arrays(moved), torch.float64
            ),
            *kernels.trie_sample(by_row, after, *arrays(moved), uniform, 1.0),
            kernels.flow_matching(by_row, after, *arrays(moved), flows),
            *kernels.flow_matching_backward(grad, by_row, after, *arrays(moved), flows, True),
        ]

    for clean, same in zip(results(logits, logits), results(dirty, dirty_rows), strict=True):
        assert torch.equal(clean, same)


def wide(device: torch.device) -> PrefixTrie:
    return PrefixTrie([[token, 0] for token in range(WIDE)] + [[0, token] for token in range(1, 3)]).to(
        device
    )


@runs
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "low, high",
    [(0, 0), (0, 1024), (0, WIDE - 1), (1024, 2048), (5, WIDE)],
    ids=["all finite", "first block", "all but the last", "middle block", "all but five"],
)
def test_children_over_several_blocks(device: torch.device, dtype: torch.dtype, low: int, high: int) -> None:
    """Blocks whose logits are all -inf, first, in between or last, and a peak that rises block by block."""
    trie = wide(torch.device("cpu"))
    logits = (
        torch.randn(1, 2, WIDE, generator=torch.Generator().manual_seed(0)) + torch.arange(WIDE) / 1000
    ).to(dtype)
    logits[0, 0, low:high] = -math.inf
    last = WIDE - 1 if high < WIDE else 4
    tokens, start = torch.tensor([[last, 0]]), torch.tensor([0])
    exact = logits.double().requires_grad_()
    expected = reference.trie_token_log_probs(exact, tokens, trie, start)
    grad = torch.tensor([[1.5, -2.0]], dtype=sums(dtype))
    nodes = torch.tensor([[0, 1]])
    dense = reference.trie_log_softmax(logits.double(), nodes, trie)
    moved = trie.to(device)
    logits, tokens, start, grad, nodes = (each.to(device) for each in (logits, tokens, start, grad, nodes))
    close(kernels.trie_token_log_probs(logits, tokens, start, *arrays(moved), 0).cpu(), expected)
    ours = kernels.trie_token_log_probs_backward(grad, logits, tokens, start, *arrays(moved), 0)
    close(ours.cpu(), gradient(expected, exact, grad.cpu().double()))
    close(kernels.trie_log_softmax(logits, nodes, *arrays(moved)).cpu(), dense)
    rewards = torch.zeros(1, dtype=sums(dtype), device=device)
    _, residual = kernels.trie_trajectory_balance(
        logits, tokens, start, *arrays(moved), rewards, rewards, None
    )
    close(residual.cpu(), expected.sum(-1))

    mass = (dense[0, 0] / 0.7).softmax(-1)
    levels = torch.tensor([0.0, 1e-9, 0.02, 0.5, 0.97, 1 - 2**-53], dtype=torch.float64, device=device)
    rows = logits[:, :1].expand(1, len(levels), WIDE)
    at_root = torch.zeros(1, len(levels), dtype=torch.int64, device=device)
    drawn, reached, log_probs = kernels.trie_sample(rows, at_root, *arrays(moved), levels[None], 0.7)
    drawn = drawn[0].cpu()
    assert torch.equal(reached[0].cpu(), drawn + 1)
    close(log_probs[0].cpu(), dense[0, 0, drawn])
    upper = mass.cumsum(-1)[drawn]
    slack = tolerance(sums(dtype))["atol"]
    assert (upper - mass[drawn] <= levels.cpu() + slack).all() and (upper >= levels.cpu() - slack).all()
    with_mass = (logits[0, 0].cpu() > -math.inf).nonzero()
    assert drawn[0] == with_mass[0]


@runs
def test_the_gradient_of_the_dense_distribution_over_several_blocks(device: torch.device) -> None:
    trie, nodes = wide(torch.device("cpu")), torch.tensor([[0]])
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(1, 1, WIDE, generator=generator, dtype=torch.float64).requires_grad_()
    grad = torch.randn(1, 1, WIDE, generator=generator, dtype=torch.float64)
    log_probs = reference.trie_log_softmax(exact, nodes, trie)
    moved = trie.to(device)
    ours = kernels.trie_log_softmax_backward(
        grad.to(device), log_probs.detach().to(device), nodes.to(device), *arrays(moved), torch.float64
    )
    close(ours.cpu(), gradient(log_probs, exact, grad))


@runs
def test_the_sampler_never_draws_a_child_without_mass(device: torch.device) -> None:
    """At both ends of the CDF, at exact steps of it, and with a target that rounds to the total."""
    trie = PrefixTrie([[token] for token in range(8)]).to(device)
    logits = torch.full((1, 1, 8), -math.inf, device=device)
    logits[..., [1, 2, 4, 6]] = 0.0
    uniform = torch.tensor([[0.0, 0.25 - 2**-53, 0.25, 0.5, 0.75, 1 - 2**-53, 1.0]], dtype=torch.float64)
    nodes = torch.zeros(1, 7, dtype=torch.int64, device=device)
    tokens, _, log_probs = kernels.trie_sample(
        logits.expand(1, 7, 8), nodes, *arrays(trie), uniform.to(device), 0.5
    )
    assert tokens.tolist() == [[1, 1, 2, 4, 6, 6, 6]]
    close(log_probs.cpu(), torch.full((1, 7), math.log(0.25), dtype=torch.float64))


@runs
@pytest.mark.parametrize("spoiler", [math.nan, -math.inf])
def test_a_node_without_a_distribution(device: torch.device, spoiler: float) -> None:
    """A NaN among the children, or -inf at all, is NaN as from log_softmax; the sampler takes the first."""
    trie = PrefixTrie([[token] for token in range(3)]).to(device)
    logits = torch.tensor([[[1.0, spoiler, 2.0] if math.isnan(spoiler) else [spoiler] * 3]], device=device)
    node, zero = torch.zeros(1, 1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
    assert kernels.trie_log_softmax(logits, node, *arrays(trie)).isnan().all()
    assert kernels.trie_token_log_probs(logits, node, node[0], *arrays(trie), 0).isnan().all()
    _, residual = kernels.trie_trajectory_balance(logits, node, node[0], *arrays(trie), zero, zero, None)
    assert residual.isnan().all()
    tokens, reached, log_probs = kernels.trie_sample(logits, node, *arrays(trie), node.double() + 0.9, 1.0)
    assert (tokens.item(), reached.item()) == (0, 1) and log_probs.isnan().all()


@runs
def test_columns_that_begin_at_another_token(device: torch.device) -> None:
    """`first_token` says which token column 0 is, as for the head's rows of one depth."""
    trie = PrefixTrie([[100 + token] for token in (0, 2, 3, 7)]).to(device)
    logits = torch.randn(3, 1, 8, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.tensor([[100], [107], [101]], device=device)
    start, grad = torch.zeros(3, dtype=torch.int64, device=device), torch.ones(3, 1, device=device)
    padded = torch.cat([logits.new_full((3, 1, 100), math.nan), logits], -1)
    ours = kernels.trie_token_log_probs(logits, tokens, start, *arrays(trie), 100)
    assert torch.equal(ours, kernels.trie_token_log_probs(padded, tokens, start, *arrays(trie), 0))
    assert ours.isfinite().tolist() == [[True], [True], [False]]
    ours = kernels.trie_token_log_probs_backward(grad, logits, tokens, start, *arrays(trie), 100)
    same = kernels.trie_token_log_probs_backward(grad, padded, tokens, start, *arrays(trie), 0)
    assert torch.equal(ours, same[..., 100:]) and (same[..., :100] == 0).all()


@runs
def test_offsets_beyond_32_bits(device: torch.device) -> None:
    """Rows, steps and columns that lie more than 2**31 elements apart."""
    try:
        # Untouched pages of it are never made.
        memory = torch.empty(3 * 2**31 + 4096, dtype=torch.float16, device=device)
    except RuntimeError as error:
        pytest.skip(f"cannot map 12 GB: {error}")
    trie = PrefixTrie([[0, 0], [0, 1], [1, 0], [1, 1]]).to(device)
    for stride in ((2**31 + 5, 64, 1), (64, 2**31 + 5, 1), (64, 256, 2**31 + 5)):
        logits = memory.as_strided((2, 2, 2), stride, 7)
        logits.copy_(torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0)))
        near = logits.contiguous()
        tokens = torch.tensor([[0, 1], [1, 0]], device=device)
        start, per_path = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(2, device=device)
        for kernel, grads, after in (
            (kernels.trie_log_softmax, (), (tokens, *arrays(trie))),
            (kernels.trie_token_log_probs, (), (tokens, start, *arrays(trie), 0)),
            (
                kernels.trie_token_log_probs_backward,
                (per_path[:, None] + 1,),
                (tokens[:, :1], start, *arrays(trie), 0),
            ),
            (kernels.trie_trajectory_balance, (), (tokens, start, *arrays(trie), per_path, per_path, None)),
            (kernels.trie_sample, (), (tokens, *arrays(trie), tokens.double() / 2, 1.0)),
        ):
            steps = after[0].shape[1]
            far, expected = (kernel(*grads, values[:, :steps], *after) for values in (logits, near))
            torch.testing.assert_close(far, expected, rtol=0, atol=0)


def every_kernel(trie: PrefixTrie, logits: Tensor, tokens: Tensor, nodes: Tensor) -> dict[str, Tensor]:
    """All results on one batch, as (B, ...)."""
    batch, steps, _ = logits.shape
    start = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    per_token, per_path = logits[..., 0].to(sums(logits.dtype)), start.to(sums(logits.dtype)) + 0.5
    dense = kernels.trie_log_softmax(logits, nodes, *arrays(trie))
    drawn, reached, drawn_log_probs = kernels.trie_sample(
        logits, nodes, *arrays(trie), per_token.double().sigmoid(), 0.7
    )
    loss, residual = kernels.trie_trajectory_balance(
        logits, tokens, start, *arrays(trie), per_path, per_path * 2, per_path
    )
    flows = kernels.trie_log_flows(per_path[:, None].expand(batch, trie.num_items), *item_arrays(trie))
    grad_policy, grad_flows = kernels.flow_matching_backward(
        per_token, logits, nodes, *arrays(trie), flows, True
    )
    balance, gap = kernels.trajectory_balance(per_token, per_path, per_path * 2, tokens > 0, per_path)
    return {
        "log_probs": kernels.trie_token_log_probs(logits, tokens, start, *arrays(trie), 0),
        "grad_logits": kernels.trie_token_log_probs_backward(
            per_token, logits, tokens, start, *arrays(trie), 0
        ),
        "dense": dense,
        "grad_dense": kernels.trie_log_softmax_backward(
            logits.to(dense.dtype), dense, nodes, *arrays(trie), logits.dtype
        ),
        "drawn": drawn,
        "reached": reached,
        "drawn_log_probs": drawn_log_probs,
        "walked": kernels.trie_walk(tokens, start, *arrays(trie)[:2]),
        "flows": flows,
        "grad_rewards": kernels.trie_log_flows_backward(
            flows, per_path[:, None].expand(batch, trie.num_items), flows, *item_arrays(trie)
        ),
        "divergence": kernels.flow_matching(logits, nodes, *arrays(trie), flows),
        "grad_policy": grad_policy,
        "grad_flows": grad_flows,
        "fused_loss": loss,
        "fused_residual": residual,
        "loss": balance,
        "residual": gap,
        "grad_log_probs": kernels.trajectory_balance_backward(gap, tokens > 0, steps),
    }


def batch_of(
    world: World, shape: tuple[int, int], device: torch.device
) -> tuple[PrefixTrie, Tensor, Tensor, Tensor]:
    logits = world.normals((*shape, world.width)).float()
    return (world.trie(device), *(x.to(device) for x in (logits, world.tokens(shape), world.nodes(shape))))


@runs
@settings(max_examples=3)
@given(worlds)
def test_a_row_is_the_same_alone_and_in_any_batch(device: torch.device, world: World) -> None:
    """Bit for bit, which also says that one run is like the next."""
    trie, logits, tokens, nodes = batch_of(world, (3, 2), device)
    together = every_kernel(trie, logits, tokens, nodes)
    for row in range(3):
        one = slice(row, row + 1)
        for name, alone in every_kernel(trie, logits[one], tokens[one], nodes[one]).items():
            torch.testing.assert_close(alone, together[name][one], rtol=0, atol=0, msg=name)


@runs
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(device: torch.device, shape: tuple[int, int]) -> None:
    world = World([[0, 1], [1, 0], [1, 1]], extra_width=1, seed=0)
    results = every_kernel(*batch_of(world, shape, device))
    assert all(result.shape[:1] == shape[:1] for result in results.values())
    assert (results["fused_residual"] == 0.5).all() and (results["residual"] == 0.5).all()
    assert (results["fused_loss"] == 0.125).all()


@runs
@settings(max_examples=3)
@given(worlds, st.sampled_from((torch.float32, torch.float64)))
def test_through_the_ops(device: torch.device, world: World, dtype: torch.dtype) -> None:
    """The backend that users name: forward and backward, against the reference on the same device."""
    trie, logits, tokens, nodes = batch_of(world, (2, 3), device)
    logits = logits.to(dtype)
    log_rewards = torch.full((2,), -1.0, dtype=dtype, device=device)

    def results(backend: str) -> list[Tensor]:
        leaf = logits.clone().requires_grad_()
        outputs = [
            ops.trie_token_log_probs(leaf, tokens, trie, backend=backend),
            ops.trie_log_softmax(leaf, nodes, trie, backend=backend),
            ops.trie_sample(
                leaf, nodes, trie, generator=torch.Generator(device).manual_seed(1), backend=backend
            )[2],
            ops.trie_trajectory_balance(
                leaf, tokens, trie, log_rewards, 0.5, reduction="none", backend=backend
            ),
            ops.trajectory_balance(leaf[..., 0], log_rewards, 0.5, mask=tokens > 0, backend=backend),
        ]
        grads = []
        for output in outputs:
            weights = torch.where(
                output.isfinite(), torch.arange(output.numel()).view_as(output).to(output), 0.0
            )
            # A path off the trie has an infinite loss, whose gradient is infinite too.
            finite = torch.where(output.isfinite(), output, 0.0)
            grads += torch.autograd.grad(finite, leaf, weights, retain_graph=True)
        return [*outputs, *grads]

    for ours, exact in zip(results("triton"), results("torch"), strict=True):
        torch.testing.assert_close(ours, exact, equal_nan=True, rtol=1e-4, atol=1e-5)


@on_cuda
def test_more_rows_than_a_grid_is_wide(device: torch.device) -> None:
    """65,535 is the limit of a grid's second and third axis."""
    world = World([[0, 1], [0, 2], [1, 0], [1, 1]], extra_width=0, seed=0)
    trie, logits, tokens, nodes = batch_of(world, (70_000, 2), device)
    close(
        kernels.trie_log_softmax(logits, nodes, *arrays(trie)),
        reference.trie_log_softmax(logits, nodes, trie),
    )
    start = torch.zeros(70_000, dtype=torch.int64, device=device)
    close(
        kernels.trie_token_log_probs(logits, tokens, start, *arrays(trie), 0),
        reference.trie_token_log_probs(logits, tokens, trie, start),
    )


def test_more_rows_than_a_kernel_counts() -> None:
    with pytest.raises(ValueError, match="2147483648 rows came to the kernel, needs 2147483647 at most"):
        _launch.launch(None, 2**31, torch.zeros(1))


@on_cuda
def test_a_captured_graph_gives_the_same_results(device: torch.device) -> None:
    """On another stream than the default one, and on new numbers in the tensors that were captured."""
    trie, logits, tokens, nodes = batch_of(World([[0, 1], [1, 0], [1, 1]], 0, 0), (4, 2), device)
    every_kernel(trie, logits, tokens, nodes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every_kernel(trie, logits, tokens, nodes)
    logits.copy_(torch.randn_like(logits))
    graph.replay()
    for name, expected in every_kernel(trie, logits, tokens, nodes).items():
        torch.testing.assert_close(captured[name], expected, rtol=0, atol=0, equal_nan=True, msg=name)


@on_cuda
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    arguments = batch_of(World([[0, 1], [1, 0], [1, 1]], extra_width=0, seed=0), (4, 2), device)
    every_kernel(*arguments)
    with waiting_is_an_error():
        every_kernel(*arguments)


@pytest.mark.parametrize(
    "sm, dtype",
    [
        pytest.param(sm, dtype, marks=() if (sm, dtype) == (90, "bfloat16") else pytest.mark.slow)
        for sm in (80, 90, 100)
        for dtype in ("bfloat16", "float32", "float64", "float16")
    ],
)
def test_every_kernel_compiles_once(sm: int, dtype: str, tmp_path: Path) -> None:
    """In a process of its own, because the interpreter is chosen when Triton is imported.

    One version serves all batch sizes, lengths, strides and alignments. None is short of registers: the
    assembler may park up to eight of them outside the loops, where that lets more programs run at once.
    """
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--sm", str(sm), "--dtype", dtype],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in compiled}) == 17 and len(compiled) == 51
    for row in compiled:
        assert row["sm"] == sm and row["versions"] == 1, row
        assert row["stack"] <= 32 and row["local"] == 0, row
        assert row["reg"] <= 128, row
