"""Trajectory balance whose log Z is each group's own estimate: VarGrad, from log-probs or from logits."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks, _filters
from gflowgr.ops._registry import kernels_of, register, register_composite, resolve_backend
from gflowgr.ops.trie_token_log_probs import token_log_probs_backward


def log_partition_variance(
    log_probs: Tensor,
    log_rewards: Tensor,
    *,
    group_size: int,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Trajectory balance with log Z estimated by each group's mean (Zhang et al. 2023, VarGrad).

    Args:
        log_probs: (B, T) floats; `group_size` consecutive rows are trajectories of one context.
        log_rewards: (B,) floats.
        group_size: divides B.
        mask: (B, T) bool, True = counts.
        weights: (B,) floats, constants.
        reduction: "mean", "sum" or "none".

    Returns:
        The loss, a scalar, or (B,) for "none". Its gradient is that of `trajectory_balance` at the best
        log Z.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device, or a group is not whole.
    """
    log_probs = _checks.floats("log_probs", log_probs, 2)
    log_probs = log_probs.to(reference.accumulation_dtype(log_probs.dtype))
    _checks.reduction_name(reduction)
    mask = _checks.mask_like(mask, log_probs)
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, needs (B, T)")
    like = log_probs.detach().sum(-1)
    group_size = _whole_groups(group_size, like.shape[0], "log_probs")
    log_rewards = _checks.per_trajectory("log_rewards", log_rewards, like)
    weights = None if weights is None else _checks.per_trajectory("weights", weights, like)
    loss = _variance(log_probs, log_rewards, group_size, mask)
    return reference.reduce(loss, weights, reduction)


def trie_log_partition_variance(
    logits: Tensor,
    tokens: Tensor,
    trie: _checks.CatalogueTrie,
    log_rewards: Tensor,
    *,
    group_size: int,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`log_partition_variance` of `trie_token_log_probs(logits, tokens, trie)`: one pass over the children.

    Args:
        logits: (B, T, V) float32, float64, bfloat16 or float16, any strides.
        tokens: (B, T) integers, -1 pads the tail; `group_size` consecutive rows belong to one context.
        trie: on the device of `logits`, tokens below V.
        log_rewards: (B,) floats.
        group_size: divides B.
        weights: (B,) floats, constants.
        reduction: "mean", "sum" or "none".
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        The loss, a scalar, or (B,) for "none"; differentiable in `logits` and `log_rewards`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary, or a group is not
            whole.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 3)
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, needs (B, T, V)")
    tokens = _checks.integers("tokens", tokens, logits.shape[:-1])
    _checks.same_device("tokens", tokens, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    _checks.reduction_name(reduction)
    group_size = _whole_groups(group_size, logits.shape[0], "logits")
    like = logits.new_empty((), dtype=reference.accumulation_dtype(logits.dtype)).expand(logits.shape[0])
    log_rewards = _checks.per_trajectory("log_rewards", log_rewards, like)
    weights = None if weights is None else _checks.per_trajectory("weights", weights, like).detach()
    start = _checks.start_nodes(0, tokens)
    backend = resolve_backend(backend, "trie_log_partition_variance", logits.device)
    if backend == "torch":
        log_probs = reference.trie_token_log_probs(logits, tokens, trie, start)
        loss = reference.log_partition_variance(log_probs, log_rewards, group_size, None)
    else:
        arrays = (trie.first_child, trie.narrow_token, trie.max_children)
        loss, _ = _trie_variance(logits, tokens, start, *arrays, log_rewards, group_size, backend)
    return reference.reduce(loss, weights, reduction)


def _whole_groups(group_size: int, rows: int, name: str) -> int:
    if not hasattr(group_size, "__index__") or group_size < 1 or rows % group_size:
        raise ValueError(f"group_size is {group_size}, needs a divisor of the {rows} rows of {name}")
    return operator.index(group_size)


def _forward(
    logits: Tensor,
    tokens: Tensor,
    start: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    log_rewards: Tensor,
    group_size: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and what each trajectory's estimate of log Z is above its group's."""
    log_probs = kernels_of(backend).trie_token_log_probs(
        logits, tokens, start, first_child, token, max_children, 0
    )
    deviation = _above_group_mean(log_rewards - log_probs.sum(-1), group_size)
    return deviation.square(), deviation


def _above_group_mean(values: Tensor, group_size: int) -> Tensor:
    groups = values.unflatten(0, (-1, group_size)) if values.numel() else values.view(0, group_size)
    return (groups - groups.mean(-1, keepdim=True)).flatten()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, tokens, start, first_child, token, ctx.max_children, _, ctx.group_size, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], logits, tokens, start, first_child, token)


def _backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 9
    deviation, logits, tokens, *arrays = ctx.saved_tensors
    # A deviation's gradient reaches the estimates less the group's mean of it.
    grad = _above_group_mean(2 * deviation * grad_loss, ctx.group_size)
    grad_logits = None
    if ctx.needs_input_grad[0]:
        each = (-grad).unsqueeze(-1).expand(tokens.shape)
        grad_logits = token_log_probs_backward(
            each, logits, tokens, *arrays, ctx.max_children, 0, *_filters.NO_FILTER, ctx.backend
        )
    return grad_logits, *(None,) * 5, grad, None, None


_variance = register_composite(
    "log_partition_variance(Tensor log_probs, Tensor log_rewards, int group_size, Tensor? mask) -> Tensor",
    reference.log_partition_variance,
)
_trie_variance = register(
    "trie_log_partition_variance(Tensor logits, Tensor tokens, Tensor start, Tensor first_child, "
    "Tensor token, int max_children, Tensor log_rewards, int group_size, str backend) -> (Tensor, Tensor)",
    lambda logits, tokens, start, first_child, token, max_children, log_rewards, *_: (
        log_rewards.new_empty(log_rewards.shape),
        log_rewards.new_empty(log_rewards.shape),
    ),
    implementation=_forward,
    setup_context=_setup_context,
    backward=_backward,
)
