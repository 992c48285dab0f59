"""Losses of a batch of trajectories: supervised fine-tuning and the GFlowNet balance conditions.

C contexts, K trajectories of each (column 0 the observed item), L tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.trie import PrefixTrie

BALANCES = ("tb", "vargrad", "db", "subtb", "flow_matching")
BASELINES = ("s_dpo", "grpo", "item_kl")
OBJECTIVES = ("sft", *BALANCES, *BASELINES)
REWARDED = (*BALANCES, "grpo", "item_kl")
FLOWS = ("exact", "learned", "estimated")


@dataclass
class TrajectoryBatch:
    """What the losses read.

    Args:
        logits: (C, K, L, V), `logits[..., t, :]` predicts `tokens[..., t]`.
        tokens: (C, K, L) int64, -1 pads tails.
        trie: the catalogue.
        log_flows: (C, num_nodes), the rewards' flows in closed form.
        learned_log_flows: (C, K, L), of the state before each token, from a head; None unless flows are
            learned.
        reference_logits: as `logits`, of the policy as it was before training; None where no loss asks.
        candidates: (C, M, L) int64, the tokens of the only items with a reward, instead of `log_flows`.
        candidate_log_rewards: (C, M), theirs.
    """

    logits: Tensor
    tokens: Tensor
    trie: PrefixTrie
    log_flows: Tensor | None = None
    learned_log_flows: Tensor | None = None
    reference_logits: Tensor | None = None
    candidates: Tensor | None = None
    candidate_log_rewards: Tensor | None = None

    @cached_property
    def log_probs(self) -> Tensor:
        """log P_F of each token, (C, K, L); 0 on padding."""
        return ops.trie_token_log_probs(self.logits, self.tokens, self.trie)

    @cached_property
    def reference_log_probs(self) -> Tensor:
        """log P_ref of each token, (C, K, L), normalised over the trie as `log_probs` are."""
        assert self.reference_logits is not None
        return ops.trie_token_log_probs(self.reference_logits, self.tokens, self.trie)

    @cached_property
    def log_ratios(self) -> Tensor:
        """log P_F - log P_ref of each trajectory's item, (C, K)."""
        return (self.log_probs - self.reference_log_probs).sum(-1)

    @cached_property
    def mask(self) -> Tensor:
        return self.tokens >= 0

    @cached_property
    def nodes(self) -> Tensor:
        """The state before each token and after the last one, (C, K, L + 1); -1 past the end."""
        root = self.tokens.new_zeros(*self.tokens.shape[:-1], 1)
        return torch.cat([root, self.trie.walk(self.tokens)], -1)

    @cached_property
    def exact_log_flows(self) -> Tensor:
        """log F along each trajectory, (C, K, L + 1); the end's value fills what lies past it."""
        if self.candidates is not None:
            assert self.candidate_log_rewards is not None
            rewards = self.candidate_log_rewards[:, None, None].masked_fill(
                ~self.candidates_under, -torch.inf
            )
            return rewards.logsumexp(-1)
        assert self.log_flows is not None
        contexts, trajectories, states = self.nodes.shape
        last = self.mask.sum(-1, keepdim=True)
        position = torch.minimum(torch.arange(states, device=last.device), last)
        along = self.nodes.gather(-1, position.expand(self.nodes.shape)).clamp(min=0)
        return self.log_flows.gather(1, along.flatten(1)).view(contexts, trajectories, states)

    @cached_property
    def candidates_under(self) -> Tensor:
        """Whether a candidate lies under a state of a trajectory, (C, K, L + 1, M)."""
        assert self.candidates is not None
        tokens = self.tokens.unsqueeze(-1)
        same = (tokens == self.candidates.mT.unsqueeze(1)) | (tokens < 0)
        under = torch.ones_like(same[:, :, :1])
        return torch.cat([under, same.cumprod(2).bool()], 2)

    @cached_property
    def rewarded(self) -> bool:
        """Whether rewards are known."""
        return self.log_flows is not None or self.candidates is not None

    @cached_property
    def log_z(self) -> Tensor:
        """The exact log Z of each context, (C,)."""
        if self.candidate_log_rewards is not None:
            return self.candidate_log_rewards.logsumexp(-1)
        assert self.log_flows is not None
        return self.log_flows[:, 0]

    @cached_property
    def log_rewards(self) -> Tensor:
        """log R of the item (or the colliding items) that each trajectory ends at, (C, K)."""
        return self.exact_log_flows[..., -1]

    @cached_property
    def repeated(self) -> Tensor:
        """Whether an earlier trajectory of the context ends at the same leaf, (C, K)."""
        ends = self.nodes.gather(-1, self.mask.sum(-1, keepdim=True)).squeeze(-1)
        return (ends.unsqueeze(-1) == ends.unsqueeze(-2)).tril(-1).any(-1)

    @cached_property
    def mass_shares(self) -> Tensor:
        """The share of its context's reward that each trajectory's end holds, (C, K), without gradient."""
        return (self.log_rewards - self.log_z[:, None]).detach().exp()

    @cached_property
    def squared_residuals(self) -> Tensor:
        """(log Z + log P_F - log R)^2 of each trajectory under the exact Z, (C, K), without gradient.

        Whatever the objective is, all of them have their optimum where this is 0: for child flow matching it
        is the square of the summed log-ratios p* / P_F along the trajectory.
        """
        return (self.log_z[:, None] + self.log_probs.sum(-1) - self.log_rewards).detach().square()

    def flows_along(self, flows: str) -> Tensor:
        """log F of the states of each trajectory, (C, K, L + 1), log R at its end."""
        if flows == "exact":
            return self.exact_log_flows
        assert self.learned_log_flows is not None
        ends = self.log_rewards.unsqueeze(-1)
        inner = torch.where(self.mask, self.learned_log_flows, ends)
        return torch.cat([inner, ends], -1)


def sft_loss(batch: TrajectoryBatch) -> Tensor:
    """The observed item's negative log-likelihood in nats, mean over contexts."""
    return -batch.log_probs[:, 0].sum(-1).mean()


def gfn_loss(batch: TrajectoryBatch, objective: str, flows: str, subtb_lambda: float) -> Tensor:
    """The GFlowNet loss, mean over contexts and trajectories (Malkin et al. 2022, Madan et al. 2023)."""
    trajectories = batch.tokens.shape[1]
    if objective == "flow_matching":
        if batch.candidates is not None:
            return _flow_matching_on_candidates(batch).sum() / (batch.tokens.shape[0] * trajectories)
        assert batch.log_flows is not None
        states = torch.where(batch.mask, batch.nodes[..., :-1], -1)
        divergence = ops.flow_matching(batch.logits, states, batch.trie, batch.log_flows, reduction="sum")
        return divergence / (batch.tokens.shape[0] * trajectories)
    if objective == "vargrad" or flows == "estimated":
        return ops.log_partition_variance(
            batch.log_probs.flatten(0, 1), batch.log_rewards.flatten(), group_size=trajectories
        )
    log_flows = batch.flows_along(flows)
    if objective == "tb":
        return ops.trajectory_balance(batch.log_probs, batch.log_rewards, log_flows[..., 0])
    if objective == "db":
        return ops.detailed_balance(batch.log_probs, log_flows, mask=batch.mask)
    if objective == "subtb":
        return ops.subtrajectory_balance(batch.log_probs, log_flows, lam=subtb_lambda, mask=batch.mask)
    raise ValueError(f"objective is {objective!r}, needs one of {', '.join(BALANCES)}")


def _flow_matching_on_candidates(batch: TrajectoryBatch) -> Tensor:
    """KL(p* || P_F) over the children of each state, (C, K, L), from the candidates' rewards alone.

    What `ops.flow_matching` is with the flows of a catalogue in which no other item has a reward; O(M L) a
    context instead of O(N). A state without a candidate, or where nothing is to be chosen, has 0.
    """
    assert batch.candidates is not None and batch.candidate_log_rewards is not None
    token = batch.candidates.mT.unsqueeze(1)
    under = batch.candidates_under[..., :-1, :] & batch.mask.unsqueeze(-1) & (token >= 0)
    log_rewards = batch.candidate_log_rewards[:, None, None].masked_fill(~under, -torch.inf)
    # Relative to the largest, so that rewards of any size can be summed.
    scale = log_rewards.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(log_rewards.dtype).min)
    rewards = (log_rewards - scale).exp()
    shares = rewards / rewards.sum(-1, keepdim=True).clamp(min=torch.finfo(rewards.dtype).tiny)
    # Where a candidate goes on from the state; one that ends there has no share.
    token = token.expand(shares.shape).clamp(min=0)
    policy = ops.trie_log_softmax(
        batch.logits, torch.where(batch.mask, batch.nodes[..., :-1], -1), batch.trie
    )
    target = torch.zeros_like(policy).scatter_add(-1, token, shares.to(policy.dtype)).gather(-1, token)
    carries = shares > 0
    gap = torch.where(carries, target, 1.0).log() - torch.where(carries, policy.gather(-1, token), 0.0)
    return (shares * gap).sum(-1)


@torch.no_grad()
def diagnostics(batch: TrajectoryBatch) -> dict[str, float]:
    """Figures to watch: log Z, the mean squared balance residual, the entropy along the observed items."""
    figures: dict[str, float] = {}
    if batch.rewarded:
        log_z = batch.log_z
        figures["log_z"] = float(log_z.mean())
        # An item that no candidate shares its leaf with has no reward.
        residuals = batch.squared_residuals[batch.log_rewards > -torch.inf]
        if len(residuals):
            figures["residual"] = float(residuals.mean())
        found = torch.logsumexp(batch.log_rewards.masked_fill(batch.repeated, -torch.inf), -1) - log_z
        figures["reward_mass_found"] = float(found.exp().mean())
    if batch.learned_log_flows is not None:
        figures["learned_log_z"] = float(batch.learned_log_flows[..., 0].mean())
    observed = batch.nodes[:, 0, :-1]
    policy = ops.trie_log_softmax(batch.logits[:, 0], torch.where(batch.mask[:, 0], observed, -1), batch.trie)
    entropy = -(policy.exp() * policy.clamp(min=torch.finfo(policy.dtype).min)).sum(-1)
    figures["entropy"] = float(entropy.sum(-1).mean())
    figures["nll"] = float(-batch.log_probs[:, 0].sum(-1).mean())
    return figures
