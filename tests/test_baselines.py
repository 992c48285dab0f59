"""The baselines' losses against formulas written out item by item, in float64."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import PrefixTrie, ops
from gflowgr.baselines import (
    baseline_diagnostics,
    baseline_loss,
    group_advantages,
    grpo_loss,
    item_kl_loss,
    kl_estimates,
    s_dpo_loss,
)
from gflowgr.objectives import TrajectoryBatch

# Three levels, uneven: a forced step, items of two tokens, and the last item collides with the first.
PATHS = [(0, 2, 5), (0, 2, 6), (0, 3, 5), (1, 2, 6), (1, 3), (1, 4, 5), (1, 4, 6), (0, 4), (0, 2, 5)]
VOCABULARY, LEVELS = 7, 3
LEAVES = sorted(set(PATHS))
seeds = st.integers(0, 2**31)


def padded(path: tuple[int, ...]) -> list[int]:
    return [*path, *[-1] * (LEVELS - len(path))]


def token_log_probs(logits: Tensor, path: tuple[int, ...]) -> Tensor:
    """log P of each token of a path, from (L, V) logits: the softmax over what may follow its prefix."""
    log_probs = []
    for depth, token in enumerate(path):
        children = sorted({p[depth] for p in PATHS if p[:depth] == path[:depth] and len(p) > depth})
        log_probs.append(logits[depth, token] - torch.logsumexp(logits[depth, children], 0))
    return torch.stack(log_probs)


class Case:
    """Random logits of policy and reference, random items, and rewards of all items."""

    def __init__(self, seed: int, contexts: int, trajectories: int, *, every_item: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.trie = PrefixTrie([padded(path) for path in PATHS])
        drawn = torch.randint(len(PATHS), (contexts, trajectories), generator=generator)
        if every_item:
            drawn = torch.arange(len(PATHS)).expand(contexts, -1)
        self.paths = [[PATHS[item] for item in row] for row in drawn.tolist()]
        shape = (*drawn.shape, LEVELS, VOCABULARY)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        self.reference_logits = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.log_rewards = torch.randn(contexts, len(PATHS), generator=generator, dtype=torch.float64)
        self.grad_output = torch.rand((), generator=generator, dtype=torch.float64) + 0.5

    def batch(self) -> TrajectoryBatch:
        tokens = torch.tensor([[padded(path) for path in row] for row in self.paths])
        log_flows = ops.trie_log_flows(self.log_rewards, self.trie)
        return TrajectoryBatch(
            self.logits, tokens, self.trie, log_flows, reference_logits=self.reference_logits
        )

    def each(self, logits: Tensor) -> list[list[Tensor]]:
        """The tokens' log-probs of each trajectory of each context."""
        return [
            [token_log_probs(logits[c, k], path) for k, path in enumerate(row)]
            for c, row in enumerate(self.paths)
        ]

    def reward(self, context: int, path: tuple[int, ...]) -> float:
        """Of the leaf: the sum over the items that end there."""
        of_items = self.log_rewards[context].exp().tolist()
        return sum(reward for reward, other in zip(of_items, PATHS, strict=True) if other == path)

    def gradient(self, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss, self.logits, self.grad_output)
        return gradient

    def check(self, loss: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(self.gradient(loss), self.gradient(expected))


@given(seeds, st.integers(1, 3), st.integers(2, 5), st.floats(0.05, 4.0))
def test_s_dpo_is_its_formula(seed: int, contexts: int, trajectories: int, beta: float) -> None:
    case = Case(seed, contexts, trajectories)
    terms = []
    for policy, reference in zip(case.each(case.logits), case.each(case.reference_logits), strict=True):
        ratios = [(p.sum() - r.sum()) for p, r in zip(policy, reference, strict=True)]
        inner = sum(torch.exp(beta * (ratio - ratios[0])) for ratio in ratios[1:])
        terms.append(-torch.log(torch.sigmoid(-torch.log(inner))))
    case.check(s_dpo_loss(case.batch(), beta), torch.stack(terms).mean())


@given(seeds, st.floats(0.05, 4.0))
def test_s_dpo_of_one_rejected_item_is_dpo(seed: int, beta: float) -> None:
    case = Case(seed, 3, 2)
    policy, reference = case.each(case.logits), case.each(case.reference_logits)
    expected = [
        -F.logsigmoid(
            beta * ((chosen.sum() - ref_chosen.sum()) - (rejected.sum() - ref_rejected.sum())),
        )
        for (chosen, rejected), (ref_chosen, ref_rejected) in zip(policy, reference, strict=True)
    ]
    case.check(s_dpo_loss(case.batch(), beta), torch.stack(expected).mean())


def test_s_dpo_stays_finite_where_the_policy_has_gone_far() -> None:
    case = Case(0, 2, 3)
    case.logits = (1e4 * case.logits).detach().requires_grad_()
    loss = s_dpo_loss(case.batch(), 1.0)
    assert torch.isfinite(loss) and torch.isfinite(case.gradient(loss)).all()


@given(seeds, st.integers(1, 3), st.integers(3, 6), st.sampled_from([0.0, 0.04, 1.0]))
def test_grpo_is_its_formula(seed: int, contexts: int, trajectories: int, kl_weight: float) -> None:
    case = Case(seed, contexts, trajectories)
    policy, reference = case.each(case.logits), case.each(case.reference_logits)
    value, gradient = [], []
    for c in range(contexts):
        rewards = [case.reward(c, path) for path in case.paths[c][1:]]
        mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
        for k, reward in enumerate(rewards, start=1):
            advantage = (reward - mean) / deviation if len(set(case.paths[c][1:])) > 1 else 0.0
            ratio = (reference[c][k] - policy[c][k]).exp()
            penalty = kl_weight * (ratio - ratio.log() - 1).mean()
            value.append(-advantage + penalty)
            # The policy gradient: what the ratio of value 1 stands for.
            gradient.append(-advantage * policy[c][k].mean() + penalty)
    loss = grpo_loss(case.batch(), kl_weight)
    torch.testing.assert_close(loss, torch.stack(value).mean(), rtol=1e-4, atol=1e-5)
    learned = case.gradient(loss)
    torch.testing.assert_close(learned, case.gradient(torch.stack(gradient).mean()), rtol=1e-4, atol=1e-5)
    assert not learned[:, 0].any()


def test_a_group_of_equal_rewards_has_no_advantage() -> None:
    rewards = torch.tensor([[0.1, 0.1, 0.1], [1e-8, 1e-8, 1e-8], [0.0, 1.0, 5.0]])
    advantages = group_advantages(rewards)
    assert not advantages[:2].any()
    expected = (rewards[2] - 2) / math.sqrt(14 / 3)
    torch.testing.assert_close(advantages[2], expected, rtol=1e-5, atol=1e-6)


def test_the_kl_estimates_expectation_is_the_kl() -> None:
    """Over all items at the policy's own probabilities: the KL of items, state by state."""
    generator = torch.Generator().manual_seed(1)
    policy, reference = torch.randn(2, LEVELS, VOCABULARY, generator=generator, dtype=torch.float64)
    expected, exact, total = 0.0, 0.0, 0.0
    for path in LEAVES:
        log_probs, reference_log_probs = token_log_probs(policy, path), token_log_probs(reference, path)
        probability = float(log_probs.sum().exp())
        estimates = kl_estimates(log_probs, reference_log_probs)
        assert (estimates >= 0).all()
        expected += probability * float(estimates.sum())
        exact += probability * float((log_probs - reference_log_probs).sum())
        total += probability
    assert total == pytest.approx(1) and expected == pytest.approx(exact)


@given(seeds, st.integers(1, 3), st.integers(2, 6))
def test_item_kl_is_its_formula(seed: int, contexts: int, trajectories: int) -> None:
    case = Case(seed, contexts, trajectories)
    policy = case.each(case.logits)
    terms = []
    for c, row in enumerate(case.paths):
        first = {path: row.index(path) for path in row}
        total = sum(case.reward(c, path) for path in first)
        terms.append(-sum(case.reward(c, path) / total * policy[c][k].sum() for path, k in first.items()))
    case.check(item_kl_loss(case.batch()), torch.stack(terms).mean())


def test_item_kl_of_all_items_is_the_kl_to_the_reward() -> None:
    """Up to the reward's entropy, and in every gradient; the colliding items count as the one they are."""
    case = Case(4, 2, len(PATHS), every_item=True)
    policy = case.each(case.logits)
    divergence, entropy = torch.zeros((), dtype=torch.float64), 0.0
    for c, k in itertools.product(range(2), range(len(PATHS) - 1)):
        share = case.reward(c, PATHS[k]) / float(case.log_rewards[c].exp().sum())
        divergence = divergence + share * (math.log(share) - policy[c][k].sum()) / 2
        entropy -= share * math.log(share) / 2
    case.check(item_kl_loss(case.batch()), divergence + entropy)


@pytest.mark.parametrize("objective", ["grpo", "item_kl"])
def test_no_gradient_goes_into_the_rewards(objective: str) -> None:
    case = Case(2, 2, 4)
    case.log_rewards.requires_grad_()
    loss = baseline_loss(case.batch(), objective, preference_beta=0.1, kl_weight=0.04)
    assert torch.autograd.grad(loss, case.log_rewards, allow_unused=True) == (None,)


def test_figures_of_preferences() -> None:
    case = Case(6, 4, 3)
    figures = baseline_diagnostics(case.batch(), "s_dpo")
    margins = []
    for policy, reference in zip(case.each(case.logits), case.each(case.reference_logits), strict=True):
        ratios = [float((p.sum() - r.sum()).detach()) for p, r in zip(policy, reference, strict=True)]
        margins += [ratios[0] - ratio for ratio in ratios[1:]]
    assert figures["preference_margin"] == pytest.approx(statistics.fmean(margins))
    assert figures["preference_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))


def test_figures_of_groups() -> None:
    case = Case(6, 2, 4)
    case.paths[1] = [PATHS[4], PATHS[1], PATHS[1], PATHS[1]]
    figures = baseline_diagnostics(case.batch(), "grpo")
    policy, reference = case.each(case.logits), case.each(case.reference_logits)
    drawn = [(c, k) for c in range(2) for k in range(1, 4)]
    rewards = [case.reward(c, case.paths[c][k]) for c, k in drawn]
    ratios = [(reference[c][k] - policy[c][k]).exp() for c, k in drawn]
    kl = statistics.fmean(float((ratio - ratio.log() - 1).mean().detach()) for ratio in ratios)
    assert figures["group_reward"] == pytest.approx(statistics.fmean(rewards))
    assert figures["kl_to_reference"] == pytest.approx(kl)
    assert figures["groups_of_equal_reward"] == 0.5


def test_an_unknown_objective_is_named() -> None:
    with pytest.raises(ValueError, match="objective is 'tb', needs one of s_dpo, grpo, item_kl"):
        baseline_loss(Case(0, 1, 2).batch(), "tb", preference_beta=0.1, kl_weight=0.0)
