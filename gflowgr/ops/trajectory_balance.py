"""Trajectory balance, from log-probs or fused with the forward policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks, _filters
from gflowgr.ops._registry import register, resolve_backend
from gflowgr.ops.trie_token_log_probs import token_log_probs_backward


def trajectory_balance(
    log_probs: Tensor,
    log_rewards: Tensor,
    log_z: Tensor | float,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """weights * (log Z + sum of log P_F - log R)^2 (Malkin et al. 2022, eq. 14, with P_B = 1 on a tree).

    Args:
        log_probs: (..., T) floats, one row a trajectory.
        log_rewards: (...) floats.
        log_z: (...) floats or a scalar.
        mask: (..., T) bool, True = counts.
        weights: (...) floats, constants; "mean" divides by the number of trajectories, not by their sum.
        reduction: "mean", "sum" or "none".
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        The loss, a scalar, or (...) for "none"; differentiable in `log_probs`, `log_rewards` and `log_z`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
        RuntimeError: `backend` cannot serve here.
    """
    log_probs = _checks.floats("log_probs", log_probs, 1)
    log_probs = log_probs.to(reference.accumulation_dtype(log_probs.dtype))
    _checks.reduction_name(reduction)
    mask = _checks.mask_like(mask, log_probs)
    like = log_probs.detach()[..., 0] if log_probs.shape[-1] else log_probs.detach().sum(-1)
    log_rewards = _checks.per_trajectory("log_rewards", log_rewards, like)
    log_z = _checks.per_trajectory("log_z", log_z, like)
    weights = None if weights is None else _checks.per_trajectory("weights", weights, like).detach()
    backend = resolve_backend(backend, "trajectory_balance", log_probs.device)
    if backend == "torch":
        residual = reference.trajectory_balance_residual(log_probs, log_rewards, log_z, mask)
        return reference.reduce(residual.square(), weights, reduction)
    steps = log_probs.shape[-1]
    loss, _ = _balance(
        log_probs.reshape(like.numel(), steps),
        log_rewards.reshape(-1),
        log_z.reshape(-1),
        None if mask is None else mask.reshape(like.numel(), steps),
        None if weights is None else weights.reshape(-1),
        backend,
    )
    return reference.reduce(_checks.in_shape(loss, like.shape), None, reduction)


def trie_trajectory_balance(
    logits: Tensor,
    tokens: Tensor,
    trie: _checks.CatalogueTrie,
    log_rewards: Tensor,
    log_z: Tensor | float,
    *,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`trajectory_balance` of `trie_token_log_probs(logits, tokens, trie)`, in one pass over the children.

    Args:
        logits: (..., T, V) float32, float64, bfloat16 or float16, any strides.
        tokens: (..., T) integers, -1 pads the tail.
        trie: on the device of `logits`, tokens below V.
        log_rewards: (...) floats.
        log_z: (...) floats or a scalar.
        weights: (...) floats, constants.
        reduction: "mean", "sum" or "none".
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        The loss, a scalar, or (...) for "none"; differentiable in `logits`, `log_rewards` and `log_z`. A
        trajectory that leaves the trie has an infinite loss.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 2)
    tokens = _checks.integers("tokens", tokens, logits.shape[:-1])
    _checks.same_device("tokens", tokens, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    _checks.reduction_name(reduction)
    sums = reference.accumulation_dtype(logits.dtype)
    like = logits.new_empty((), dtype=sums).expand(tokens.shape[:-1])
    log_rewards = _checks.per_trajectory("log_rewards", log_rewards, like)
    log_z = _checks.per_trajectory("log_z", log_z, like)
    weights = None if weights is None else _checks.per_trajectory("weights", weights, like).detach()
    start = _checks.start_nodes(0, tokens)
    backend = resolve_backend(backend, "trie_trajectory_balance", logits.device)
    if backend == "torch":
        log_probs = reference.trie_token_log_probs(logits, tokens, trie, start)
        residual = reference.trajectory_balance_residual(log_probs, log_rewards, log_z, None)
        return reference.reduce(residual.square(), weights, reduction)
    paths = _checks.as_paths(logits)
    loss, _ = _trie_balance(
        paths,
        tokens.reshape(paths.shape[:-1]),
        start.reshape(paths.shape[0]),
        trie.first_child,
        trie.token,
        trie.max_children,
        log_rewards.reshape(-1),
        log_z.reshape(-1),
        None if weights is None else weights.reshape(-1),
        backend,
    )
    return reference.reduce(_checks.in_shape(loss, tokens.shape[:-1]), None, reduction)


def _setup_balance(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    log_probs, _, _, mask, weights, ctx.backend = inputs
    ctx.steps = log_probs.shape[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], mask, weights)


def _residual_gradient(residual: Tensor, weights: Tensor | None, grad_loss: Tensor) -> Tensor:
    """What reaches the residual through weights * residual^2."""
    slope = 2 * residual if weights is None else 2 * weights * residual
    return slope.mul_(grad_loss)


def _balance_backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 6
    residual, mask, weights = ctx.saved_tensors
    grad = _residual_gradient(residual, weights, grad_loss)
    needs_log_probs, needs_rewards, needs_log_z, *_ = ctx.needs_input_grad
    return (
        _step_gradient(grad, mask, ctx.steps, ctx.backend) if needs_log_probs else None,
        -grad if needs_rewards else None,
        grad if needs_log_z else None,
        *(None, None, None),
    )


def _setup_trie_balance(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, tokens, start, first_child, token, ctx.max_children, _, _, weights, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], weights, logits, tokens, start, first_child, token)


def _trie_balance_backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    residual, weights, logits, tokens, *arrays = ctx.saved_tensors
    grad = _residual_gradient(residual, weights, grad_loss)
    needs_logits, *_, needs_rewards, needs_log_z, _, _ = ctx.needs_input_grad
    grad_logits = None
    if needs_logits:
        each = grad.unsqueeze(-1).expand(tokens.shape)
        grad_logits = token_log_probs_backward(
            each, logits, tokens, *arrays, ctx.max_children, 0, *_filters.NO_FILTER, ctx.backend
        )
    return (
        grad_logits,
        *(None,) * 5,
        -grad if needs_rewards else None,
        grad if needs_log_z else None,
        *(None, None),
    )


def _fake_pair(log_rewards: Tensor) -> tuple[Tensor, Tensor]:
    return log_rewards.new_empty(log_rewards.shape), log_rewards.new_empty(log_rewards.shape)


_balance = register(
    "trajectory_balance(Tensor log_probs, Tensor log_rewards, Tensor log_z, Tensor? mask, Tensor? weights, "
    "str backend) -> (Tensor, Tensor)",
    lambda log_probs, log_rewards, *_: _fake_pair(log_rewards),
    setup_context=_setup_balance,
    backward=_balance_backward,
)
_step_gradient = register(
    "trajectory_balance_backward(Tensor grad_residual, Tensor? mask, int steps, str backend) -> Tensor",
    lambda grad_residual, mask, steps, backend: grad_residual.new_empty(*grad_residual.shape, steps),
)
_trie_balance = register(
    "trie_trajectory_balance(Tensor logits, Tensor tokens, Tensor start, Tensor first_child, Tensor token, "
    "int max_children, Tensor log_rewards, Tensor log_z, Tensor? weights, str backend) -> (Tensor, Tensor)",
    lambda logits, tokens, start, first_child, token, max_children, log_rewards, *_: _fake_pair(log_rewards),
    setup_context=_setup_trie_balance,
    backward=_trie_balance_backward,
)
