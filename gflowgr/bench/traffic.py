"""The least that a task must read, write and multiply, whatever the implementation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.bench.problems import Inputs, Problem


def _nbytes(inputs: Inputs, *names: str) -> int:
    return sum(inputs[name].nbytes for name in names)


def _children_read(problem: Problem, nodes: Tensor, bytes_each: int) -> int:
    """The pointers of each row's node, and token and value of each child where there is a choice."""
    first, end = reference.child_range(nodes, problem.trie)
    counts = end - first
    return int(counts[counts > 1].sum()) * (4 + bytes_each) + 8 * nodes.numel()


def policy_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Children's logits, tokens and results; backward the same again and the dense gradient."""
    nodes, logits = inputs["nodes"], inputs["logits"]
    forward = _children_read(problem, nodes, logits.element_size()) + nodes.numel() * (
        8 + problem.sums.itemsize
    )
    return 2 * forward + logits.nbytes if backward else forward


def log_softmax_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    logits, nodes = inputs["logits"], inputs["nodes"]
    forward = _children_read(problem, nodes, logits.element_size()) + logits.numel() * problem.sums.itemsize
    again = _children_read(problem, nodes, 2 * problem.sums.itemsize) + logits.nbytes
    return forward + again if backward else forward


def sample_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    return policy_bytes(problem, inputs, backward) + 3 * 8 * inputs["nodes"].numel()


def flow_matching_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    flows = _children_read(problem, inputs["nodes"], problem.sums.itemsize - 4)
    return policy_bytes(problem, inputs, backward) + (2 * flows if backward else flows)


def head_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Hidden states and the head's rows of the trie's tokens; backward again, and both whole gradients."""
    rows = torch.unique(problem.trie.token[1:]).numel()
    read = inputs["hidden"].nbytes + rows * inputs["weight"][0].nbytes + _nbytes(inputs, "tokens", "grad")
    return 2 * read + _nbytes(inputs, "hidden", "weight") if backward else read


def head_operations(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Multiplications and additions of a head sliced to each depth's tokens."""
    trajectories, size = inputs["hidden"].shape[0], inputs["hidden"].shape[-1]
    forward = sum(2 * trajectories * size * (high - low + 1) for low, high in problem.trie.token_ranges)
    return 3 * forward if backward else forward


def log_flows_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Rewards and flows, and the trie once; backward reads both and the gradient, and writes the rewards'."""
    values, flows = inputs["log_rewards"].nbytes, inputs["grad"].nbytes
    arrays = problem.trie.item_order.nbytes + problem.trie.first_child.nbytes
    return 3 * values + 3 * flows + 2 * arrays if backward else values + flows + arrays


def plain_bytes(*names: str) -> Callable[[Problem, Inputs, bool], int]:
    """Every input once and a gradient for each."""
    return lambda problem, inputs, backward: _nbytes(inputs, *names) * (2 if backward else 1)


def catalogue_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    return inputs["sequences"].nbytes + problem.trie.nbytes
