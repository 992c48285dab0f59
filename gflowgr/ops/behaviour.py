"""The behaviour policy: what draws, where it is not the forward policy itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowgr.ops import _checks

EPSILON_OVER = ("children", "items")


@dataclass(frozen=True)
class Behaviour:
    """How a draw departs from the forward policy, at every step; in the order of the arguments.

    Args:
        temperature: above 0, divides the logits.
        top_k: keep the k most probable children.
        top_p: of those, renormalised, keep the most probable ones until their mass reaches p in (0, 1], the
            one that crosses included (nucleus sampling, Holtzman et al. 2020). At ties the lower child is
            kept first.
        epsilon: in [0, 1], the weight of a uniform draw that is mixed into what is left: it reaches the
            children that were cut off too.
        epsilon_over: "children" makes that draw uniform over the node's children, "items" over the items
            under them.

    Raises:
        TypeError, ValueError: an argument has the wrong type or range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    epsilon: float = 0.0
    epsilon_over: str = "children"

    def __post_init__(self) -> None:
        if not _checks.number("temperature", self.temperature) > 0:
            raise ValueError(f"temperature is {self.temperature}, needs a finite number above 0")
        if self.top_k is not None:
            if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
                raise TypeError(f"top_k is a {type(self.top_k).__name__}, needs an integer or None")
            if self.top_k < 1:
                raise ValueError(f"top_k is {self.top_k}, needs at least 1")
        if self.top_p is not None and not 0 < _checks.number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p is {self.top_p}, needs a number above 0, at most 1")
        if not 0 <= _checks.number("epsilon", self.epsilon) <= 1:
            raise ValueError(f"epsilon is {self.epsilon}, needs a number from 0 to 1")
        if self.epsilon_over not in EPSILON_OVER:
            raise ValueError(f"epsilon_over is {self.epsilon_over!r}, needs one of {EPSILON_OVER}")

    @property
    def truncates(self) -> bool:
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)

    @property
    def is_policy(self) -> bool:
        """Whether it draws from the forward policy as it is."""
        return self.temperature == 1 and not self.truncates and self.epsilon == 0

    @property
    def counts_items(self) -> bool:
        return self.epsilon > 0 and self.epsilon_over == "items"


def proposal_log_probs(log_probs: Tensor, behaviour: Behaviour, item_count: Tensor | None = None) -> Tensor:
    """log of what `behaviour` draws with, from log P_F over the children of each row's node.

    Args:
        log_probs: (..., C), -inf where there is no child to draw, as `trie_child_log_probs` gives them.
        item_count: (..., C) items to be had under each child; needed where `behaviour.counts_items`.

    Returns:
        float64 (..., C), whose exponentials sum to 1; -inf throughout where `log_probs` is.
    """
    policy = log_probs.double()
    if behaviour.is_policy:
        return policy
    proposal = policy
    if behaviour.temperature != 1:
        # From the peak down, which stays finite whatever the temperature.
        peak = policy.amax(-1, keepdim=True)
        proposal = _normalised((policy - peak.masked_fill(peak == -torch.inf, 0.0)) / behaviour.temperature)
        proposal = proposal.masked_fill(policy == -torch.inf, -torch.inf)
    if behaviour.truncates:
        kept = _kept(proposal, behaviour) & (policy != -torch.inf)
        # Again, as under a NaN all of a row is one, what cannot be drawn included.
        proposal = _normalised(proposal.masked_fill(~kept, -torch.inf)).masked_fill(~kept, -torch.inf)
    if behaviour.epsilon == 0:
        return proposal
    weight = torch.zeros_like(policy)
    if behaviour.counts_items:
        if item_count is None:
            raise ValueError("item_count is None, needs the items under each child for epsilon_over='items'")
        weight = item_count.double().log()
    uniform = _normalised(weight.masked_fill(policy == -torch.inf, -torch.inf))
    # Numbers of the host's: a tensor of them would have to be copied, which a device waits for.
    rest = -math.inf if behaviour.epsilon == 1 else math.log1p(-behaviour.epsilon)
    return torch.logaddexp(rest + proposal, math.log(behaviour.epsilon) + uniform)


def draw_children(proposal: Tensor, uniform: Tensor) -> Tensor:
    """Index of the child at which the CDF of `proposal` (..., C) passes `uniform` (...) in [0, 1): int64.

    The first child where none has mass, as under logits that are NaN, and 0 where there is no child.
    """
    return passed(cumulative_mass(proposal), uniform)


def cumulative_mass(proposal: Tensor) -> Tensor:
    """The CDF of `proposal` (..., C) at each child that can be drawn, -inf at the others."""
    mass = proposal.exp().nan_to_num(0.0)
    possible = mass > 0
    massless = ~possible.any(-1, keepdim=True) & (proposal != -torch.inf)
    # Not by the steps of the CDF: a parallel sum may take one where there is no mass.
    return torch.where(possible, mass.cumsum(-1), torch.where(massless, 1.0, -torch.inf))


def passed(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """The first child at which the CDF of `cumulative_mass` (..., C) exceeds `uniform` (...) of its end."""
    target = uniform.unsqueeze(-1) * cumulative.amax(-1, keepdim=True)
    return (cumulative > target).int().argmax(-1)


def _kept(proposal: Tensor, behaviour: Behaviour) -> Tensor:
    """Which children survive `top_k`, then `top_p`."""
    descending, order = proposal.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    kept = rank < (order.shape[-1] if behaviour.top_k is None else behaviour.top_k)
    if behaviour.top_p is not None and behaviour.top_p < 1:
        mass = torch.where(kept, descending.exp(), 0.0).cumsum(-1)
        before = F.pad(mass, (1, 0))[..., :-1]
        # Negated, so that something is left of a row of NaN.
        kept = kept & ~(before >= behaviour.top_p * mass[..., -1:])
    return torch.zeros_like(kept).scatter(-1, order, kept)


def _normalised(values: Tensor) -> Tensor:
    total = values.logsumexp(-1, keepdim=True)
    return torch.where(total == -torch.inf, -torch.inf, values - total)
