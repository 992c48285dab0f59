"""Answers known by exact enumeration, which every implementation of a GFlowNet on a tree must give."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from core_cases import backends, device_of
from torch import Tensor

from gflowgr import PrefixTrie, ops

BACKENDS = [*backends("trie_log_flows")]
CONTEXTS = 5
BATCH = 64


def logits_of_flows(trie: PrefixTrie, log_flows: Tensor, width: int) -> Tensor:
    """P_F = F(child) / F(parent) as logits (..., num_nodes, V): log F of each child at its token."""
    logits = log_flows.new_full((*log_flows.shape[:-1], trie.num_nodes, width), -math.inf)
    children = torch.arange(1, trie.num_nodes, device=trie.device)
    logits[..., trie.parent[1:].long(), trie.token[1:].long()] = log_flows[..., children]
    return logits


def visited(trie: PrefixTrie, tokens: Tensor) -> Tensor:
    """The nodes (..., T + 1) of paths (..., T), the root first."""
    after = trie.walk(tokens)
    return torch.cat([torch.zeros_like(after[..., :1]), after], -1)


def item_probabilities(logits: Tensor, tokens: Tensor, trie: PrefixTrie) -> Tensor:
    """The probability of each item (..., N) under a policy (..., num_nodes, V)."""
    steps = logits[..., visited(trie, tokens)[:, :-1], :]
    return ops.trie_token_log_probs(steps, tokens.expand(steps.shape[:-1]), trie).sum(-1).exp()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_binary_tree_whose_rewards_are_its_leaves_numbers(backend: str) -> None:
    device = device_of(backend)
    rows = torch.tensor([[leaf >> 2 & 1, leaf >> 1 & 1, leaf & 1] for leaf in range(8)], device=device)
    trie = PrefixTrie(rows).to(device)
    flows = ops.trie_log_flows(torch.arange(8.0, 16.0, device=device).log(), trie, backend=backend)
    assert flows[0].item() == pytest.approx(math.log(92), abs=1e-6) == pytest.approx(4.52179, abs=1e-5)
    assert (flows[1] - flows[0]).exp().item() == pytest.approx(0.413043, abs=1e-6)
    at_root = torch.zeros((), dtype=torch.int64, device=device)
    root = ops.trie_log_softmax(flows[[1, 2]], at_root, trie, backend=backend)
    assert root[0].exp().item() == pytest.approx(38 / 92, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_strings(backend: str) -> None:
    """log R = -(number of wrong bits): Z = (1 + 1/e)^8, each bit is right with probability e / (1 + e)."""
    device = device_of(backend)
    bits = torch.tensor([[number >> bit & 1 for bit in range(8)] for number in range(256)], device=device)
    trie = PrefixTrie(bits + 2 * torch.arange(8, device=device)).to(device)
    target = torch.tensor([1, 0, 0, 1, 1, 1, 0, 1], device=device)
    flows = ops.trie_log_flows(-(bits != target).float().sum(-1), trie, backend=backend)
    assert flows[0].item() == pytest.approx(8 * math.log1p(math.exp(-1)), abs=1e-5)
    assert flows[0].item() == pytest.approx(2.506094, abs=1e-5)
    inner = torch.arange(trie.level_offsets[-2], device=device)
    logits = logits_of_flows(trie, flows, 16)
    policy = ops.trie_log_softmax(logits[inner], inner, trie, backend=backend).exp()
    depth = torch.bucketize(inner, torch.tensor(trie.level_offsets, device=device), right=True) - 1
    right = policy.gather(1, (2 * depth + target[depth]).unsqueeze(1))
    torch.testing.assert_close(right, torch.full_like(right, 0.731059), rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_policy_of_the_flows_balances_everything(backend: str) -> None:
    """Residuals below 1e-5 in float32, gradients 0, and the items' probabilities sum to 1 and are R / Z."""
    device = device_of(backend)
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 6, (60, 3))).unique(dim=0)
    trie, tokens = PrefixTrie(rows).to(device), rows.to(device)
    log_rewards = torch.randn(len(rows), generator=torch.Generator().manual_seed(0)).to(device) * 2
    flows = ops.trie_log_flows(log_rewards, trie, backend=backend)
    nodes = visited(trie, tokens)
    logits = logits_of_flows(trie, flows, 6)[nodes[:, :-1]].requires_grad_()
    log_probs = ops.trie_token_log_probs(logits, tokens, trie, backend=backend)
    assert log_probs.exp().prod(-1).sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(log_probs.sum(-1).exp(), log_rewards.softmax(-1), rtol=0, atol=1e-6)

    log_z = flows[0].detach().clone().requires_grad_()
    losses = {
        "tb": ops.trajectory_balance(log_probs, log_rewards, log_z, reduction="none", backend=backend),
        "fused tb": ops.trie_trajectory_balance(
            logits, tokens, trie, log_rewards, log_z, reduction="none", backend=backend
        ),
        "db": ops.detailed_balance(log_probs, flows[nodes], reduction="none"),
        "subtb": ops.subtrajectory_balance(log_probs, flows[nodes], reduction="none"),
        "vargrad": ops.log_partition_variance(log_probs, log_rewards, group_size=len(rows), reduction="none"),
    }
    for name, loss in losses.items():
        assert loss.shape == (len(rows),)
        assert loss.sqrt().max() < 1e-5, name
        for grad in torch.autograd.grad(loss.sum(), (logits, log_z), retain_graph=True, allow_unused=True):
            assert grad is None or grad.abs().max() < 1e-4, name
    divergence = ops.flow_matching(logits, nodes[:, :-1], trie, flows, reduction="none", backend=backend)
    assert divergence.abs().max() < 1e-6
    assert torch.autograd.grad(divergence.sum(), logits)[0].abs().max() < 1e-6
    # A policy that is off by one logit is not balanced, so the above says something.
    spoilt = logits.detach().clone()
    spoilt[..., 0] += 0.5
    loss = ops.trie_trajectory_balance(
        spoilt, tokens, trie, log_rewards, log_z, reduction="sum", backend=backend
    )
    assert loss > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_vargrad_has_the_gradient_of_trajectory_balance_at_the_best_z(backend: str) -> None:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(12, 4, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    log_rewards = torch.randn(12, generator=generator, dtype=torch.float64).to(device)
    estimate = (log_rewards - log_probs.sum(-1)).detach().unflatten(0, (3, 4)).mean(-1)
    best = estimate.repeat_interleave(4)
    balance = ops.trajectory_balance(log_probs, log_rewards, best, backend=backend)
    variance = ops.log_partition_variance(log_probs, log_rewards, group_size=4)
    torch.testing.assert_close(variance, balance)
    torch.testing.assert_close(*(torch.autograd.grad(loss, log_probs)[0] for loss in (variance, balance)))
    for other in (best - 0.1, best + 0.1):
        assert ops.trajectory_balance(log_probs, log_rewards, other, backend=backend) > balance


def trained_total_variation(objective: str, device: torch.device, log_z: str = "exact") -> float:
    """Half the sum of |P - R / Z| after 500 steps of a tabular policy, mean over 5 rewards side by side.

    Three levels, 8-ary, 300 leaves, log R ~ N(0, 2^2), a logit for each edge, Adam at .05, 64 trajectories a
    step and context, drawn from the policy itself.
    """
    generator = torch.Generator(device).manual_seed(0)
    leaves = np.random.default_rng(0).permutation(8**3)[:300]
    rows = torch.from_numpy(np.stack([leaves // 64, leaves // 8 % 8, leaves % 8], 1)).to(device)
    trie = PrefixTrie(rows).to(device)
    item_of = torch.full((trie.num_nodes,), -1, device=device)
    item_of[trie.item_node.long()] = torch.arange(300, device=device)
    log_rewards = 2 * torch.randn(CONTEXTS, 300, generator=generator, device=device)
    flows = ops.trie_log_flows(log_rewards, trie)
    table = torch.zeros(CONTEXTS, trie.num_nodes, 8, device=device, requires_grad=True)
    learned_z = torch.zeros(CONTEXTS, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [table]}, {"params": [learned_z], "lr": 0.5}], lr=0.05)
    context = torch.arange(CONTEXTS, device=device).repeat_interleave(BATCH)
    for _ in range(500):
        node, path = torch.zeros_like(context), []
        nodes = [node]
        for _ in range(3):
            token, node, _ = ops.trie_sample(table.detach()[context, node], node, trie, generator=generator)
            path.append(token)
            nodes.append(node)
        visits, tokens = torch.stack(nodes, 1), torch.stack(path, 1)
        logits = table[context.unsqueeze(1), visits[:, :-1]]
        rewards, state_flows = log_rewards[context, item_of[node]], flows[context.unsqueeze(1), visits]
        log_probs = ops.trie_token_log_probs(logits, tokens, trie)
        if objective == "tb":
            z = learned_z[context] if log_z == "learned" else state_flows[:, 0]
            loss = ops.trie_trajectory_balance(logits, tokens, trie, rewards, z)
        elif objective == "vargrad":
            loss = ops.log_partition_variance(log_probs, rewards, group_size=BATCH)
        elif objective == "db":
            loss = ops.detailed_balance(log_probs, state_flows)
        else:
            logits, states = (values.unflatten(0, (CONTEXTS, BATCH)) for values in (logits, visits[:, :-1]))
            loss = ops.flow_matching(logits, states, trie, flows)
        optimizer.zero_grad()
        # Adam's step does not depend on the scale, so the mean over all contexts trains each as alone.
        loss.backward()
        optimizer.step()
    learned = item_probabilities(table.detach(), rows, trie)
    torch.testing.assert_close(learned.sum(-1), torch.ones(CONTEXTS, device=device))
    return 0.5 * (learned - log_rewards.softmax(-1)).abs().sum(-1).mean().item()


@pytest.mark.parametrize(
    ("objective", "log_z", "threshold"),
    [
        ("tb", "exact", 0.02),
        ("tb", "learned", 0.02),
        ("vargrad", "", 0.02),
        ("db", "exact", 0.01),
        ("flow_matching", "exact", 0.002),
    ],
)
def test_a_tabular_policy_learns_the_rewards(
    objective: str, log_z: str, threshold: float, device: torch.device
) -> None:
    assert trained_total_variation(objective, device, log_z) < threshold


def test_two_contexts_keep_their_own_z_and_distribution(device: torch.device) -> None:
    """One policy with a context: opposite rewards come out as opposite distributions, each with its Z."""
    rows = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=device)
    trie = PrefixTrie(rows).to(device)
    log_rewards = torch.tensor([[0.0, 1.0, 2.0, 3.0], [4.0, 2.0, 0.0, -2.0]], device=device)
    table = torch.zeros(2, trie.num_nodes, 2, device=device, requires_grad=True)
    log_z = torch.zeros(2, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([table, log_z], lr=0.1)
    steps = visited(trie, rows)[:, :-1]
    for _ in range(400):
        loss = ops.trie_trajectory_balance(
            table[:, steps], rows.expand(2, 4, 2), trie, log_rewards, log_z.unsqueeze(1).expand(2, 4)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(log_z.detach(), log_rewards.logsumexp(-1), rtol=0, atol=1e-2)
    probabilities = item_probabilities(table.detach(), rows, trie)
    torch.testing.assert_close(probabilities, log_rewards.softmax(-1), rtol=0, atol=1e-2)
    assert (log_z[0] - log_z[1]).abs() > 0.5
    assert (probabilities[0] - probabilities[1]).abs().sum() > 1
    flows = ops.trie_log_flows(log_rewards, trie)
    torch.testing.assert_close(flows[:, 0], log_rewards.logsumexp(-1))
