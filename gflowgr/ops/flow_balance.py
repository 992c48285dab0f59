"""The losses that hold flows against each other along a trajectory: detailed and sub-trajectory balance."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._registry import register_composite


def detailed_balance(
    log_probs: Tensor,
    log_flows: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """weights * the sum over steps of (log F(s) + log P_F - log F(s'))^2 (Bengio et al. 2023, eq. 6).

    Args:
        log_probs: (..., T) floats, one row a trajectory.
        log_flows: (..., T + 1) floats, of the states before each step and after the last one (log R).
        mask: (..., T) bool, True = the step counts.
        weights: (...) floats, constants.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, a scalar, or (...) for "none"; differentiable in `log_probs` and `log_flows`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    log_probs, log_flows, mask, weights = _prepared(log_probs, log_flows, mask, weights, reduction)
    return reference.reduce(_detailed_balance(log_probs, log_flows, mask), weights, reduction)


def subtrajectory_balance(
    log_probs: Tensor,
    log_flows: Tensor,
    *,
    lam: float = 0.9,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """weights * the lam-weighted mean of all sub-trajectories' squared residuals (Madan et al. 2023).

    A sub-trajectory of n steps weighs lam^(n - 1) and counts when all its steps do: lam -> 0 is the mean of
    the steps' detailed balance, lam = 1 weighs all alike.

    Args:
        log_probs: (..., T) floats, one row a trajectory.
        log_flows: (..., T + 1) floats, of the states before each step and after the last one (log R).
        lam: above 0.
        mask: (..., T) bool, True = the step counts.
        weights: (...) floats, constants.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, a scalar, or (...) for "none"; differentiable in `log_probs` and `log_flows`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.
    """
    log_probs, log_flows, mask, weights = _prepared(log_probs, log_flows, mask, weights, reduction)
    if not _checks.number("lam", lam) > 0:
        raise ValueError(f"lam is {lam}, needs a finite number above 0")
    loss = _subtrajectory_balance(log_probs, log_flows, lam, mask)
    return reference.reduce(loss, weights, reduction)


def _prepared(
    log_probs: Tensor, log_flows: Tensor, mask: Tensor | None, weights: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    log_probs = _checks.floats("log_probs", log_probs, 1)
    log_probs = log_probs.to(reference.accumulation_dtype(log_probs.dtype))
    log_flows = _checks.floats("log_flows", log_flows, 1)
    _checks.same_device("log_flows", log_flows, log_probs.device)
    _checks.shaped("log_flows", log_flows, torch.Size((*log_probs.shape[:-1], log_probs.shape[-1] + 1)))
    _checks.reduction_name(reduction)
    mask = _checks.mask_like(mask, log_probs)
    if weights is not None:
        weights = _checks.per_trajectory("weights", weights, log_probs.detach().sum(-1))
    return log_probs, log_flows.to(log_probs.dtype), mask, weights


_detailed_balance = register_composite(
    "detailed_balance(Tensor log_probs, Tensor log_flows, Tensor? mask) -> Tensor", reference.detailed_balance
)
_subtrajectory_balance = register_composite(
    "subtrajectory_balance(Tensor log_probs, Tensor log_flows, float lam, Tensor? mask) -> Tensor",
    reference.subtrajectory_balance,
)
