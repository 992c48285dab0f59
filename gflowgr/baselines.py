"""Losses that GFlowNet training is compared with: preferences, policy gradients, distillation.

C contexts, K trajectories of each (column 0 the observed item), L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr.objectives import BASELINES, TrajectoryBatch

# Keeps an advantage finite in a group of almost equal rewards.
_EPSILON = 1e-6


def baseline_loss(
    batch: TrajectoryBatch, objective: str, *, preference_beta: float, kl_weight: float
) -> Tensor:
    """The loss of one of `BASELINES`, mean over contexts; ValueError for another name."""
    if objective == "s_dpo":
        return s_dpo_loss(batch, preference_beta)
    if objective == "grpo":
        return grpo_loss(batch, kl_weight)
    if objective == "item_kl":
        return item_kl_loss(batch)
    raise ValueError(f"objective is {objective!r}, needs one of {', '.join(BASELINES)}")


def s_dpo_loss(batch: TrajectoryBatch, beta: float) -> Tensor:
    """Softmax DPO: column 0 is preferred to all other columns; a scalar in nats.

    `-log sigmoid(-log sum_j exp(beta * (ratio_j - ratio_0)))`, j over columns 1.., where `ratio` is
    log P_F - log P_ref of an item, both over the trie: the cross-entropy of column 0 in a softmax over
    `beta * ratio`. With K = 2 it is DPO (arXiv 2305.18290). With columns 1.. drawn by the policy and an SFT
    term beside it, it is a step of self-play as in SPRec (arXiv 2412.09243).

    Source: S-DPO (arXiv 2406.09215).
    """
    ratios = beta * batch.log_ratios
    return torch.logsumexp(ratios - ratios[:, :1], -1).mean()


def grpo_loss(batch: TrajectoryBatch, kl_weight: float) -> Tensor:
    """Group relative policy optimisation on columns 1.., independent draws of the policy; a scalar.

    A draw's advantage is its reward, centred and divided by the standard deviation of its group. Every step
    draws anew, so the policy that drew is the one that is trained, and the ratio of the two is 1 in value
    and the policy gradient in its derivative; there is nothing to clip. Tokens are averaged within a
    trajectory, and `kl_weight` times `kl_estimates` is added.

    Column 0, the observed item, is no draw and takes no part. No gradient goes into the rewards.

    Source: GRPO (arXiv 2402.03300), equations 3 and 4.
    """
    log_probs = batch.log_probs[:, 1:]
    advantages = group_advantages(batch.log_rewards[:, 1:].detach().exp())
    loss = -advantages.unsqueeze(-1) * (log_probs - log_probs.detach()).exp()
    if kl_weight:
        loss = loss + kl_weight * kl_estimates(log_probs, batch.reference_log_probs[:, 1:])
    return _mean_of_tokens(loss, batch.mask[:, 1:]).mean()


def item_kl_loss(batch: TrajectoryBatch) -> Tensor:
    """Distillation at item level: cross-entropy of log P_F under the reward of a context's trajectories.

    `-sum_k p_k log P_F(x_k)`, where p is the reward divided by its sum over the distinct items of the
    context's K trajectories (colliding items are one, with their summed reward), and P_F is over the whole
    catalogue. With all items as trajectories it is `KL(R / Z || P_F)` up to the entropy of R / Z, and so has
    that KL's gradient; with fewer, what was not drawn counts as having no reward. No gradient goes into the
    rewards.
    """
    log_rewards = batch.log_rewards.detach().masked_fill(batch.repeated, -torch.inf)
    return -(log_rewards.softmax(-1) * batch.log_probs.sum(-1)).sum(-1).mean()


def group_advantages(rewards: Tensor) -> Tensor:
    """(C, G) rewards, centred and scaled within each row; exactly 0 where all of a row are equal."""
    # Relative to one of the group, equal rewards are exactly 0, and so is what rounding leaves of them.
    rewards = rewards - rewards[:, :1]
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, correction=0, keepdim=True) + _EPSILON)


def kl_estimates(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """An estimate of KL(policy || reference) from each drawn token: `r - log r - 1`, `r = P_ref / P_F`.

    Unbiased and never negative (the "k3" estimator, equation 4 of arXiv 2402.03300).
    """
    difference = reference_log_probs - log_probs
    return torch.expm1(difference) - difference


@torch.no_grad()
def baseline_diagnostics(batch: TrajectoryBatch, objective: str) -> dict[str, float]:
    """Figures to watch: how far preferences hold; the group's reward and its distance from the reference."""
    figures: dict[str, float] = {}
    if objective == "s_dpo" and batch.reference_logits is not None:
        margins = batch.log_ratios[:, :1] - batch.log_ratios[:, 1:]
        figures["preference_margin"] = float(margins.mean())
        figures["preference_accuracy"] = float((margins > 0).float().mean())
    if objective == "grpo" and batch.rewarded:
        rewards = batch.log_rewards[:, 1:].exp()
        figures["group_reward"] = float(rewards.mean())
        # A group of equal rewards has no gradient but the penalty's.
        figures["groups_of_equal_reward"] = float((rewards == rewards[:, :1]).all(-1).float().mean())
        if batch.reference_logits is not None:
            estimates = kl_estimates(batch.log_probs[:, 1:], batch.reference_log_probs[:, 1:])
            figures["kl_to_reference"] = float(_mean_of_tokens(estimates, batch.mask[:, 1:]).mean())
    return figures


def _mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(-1) / mask.sum(-1)
