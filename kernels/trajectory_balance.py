"""Trajectory balance from log-probs: weights * residual^2, residual = log Z + sum of log P_F - log R."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import TRAJECTORY_TILE, kernel, launch, strided
from ._trie import rows_of_program

# A tile of trajectories x steps, whatever the length: paths of 4 tokens and of hundreds share one kernel.
OPTIONS = {
    "ROWS": TRAJECTORY_TILE.ROWS,
    "STEPS": TRAJECTORY_TILE.BLOCK,
    "num_warps": TRAJECTORY_TILE.num_warps,
}


@triton.jit
def settle(
    batch,
    exists,
    log_probability,
    log_rewards,
    log_rewards_stride,
    log_z,
    log_z_stride,
    weights,
    weights_stride,
    loss,
    residual,
):
    """Writes loss and residual of trajectories from the log-probability of each."""
    gap = tl.load(log_z + batch * log_z_stride, mask=exists, other=0.0) + log_probability
    gap -= tl.load(log_rewards + batch * log_rewards_stride, mask=exists, other=0.0)
    squared = gap * gap
    if weights is not None:
        squared *= tl.load(weights + batch * weights_stride, mask=exists, other=0.0)
    tl.store(residual + batch, gap, mask=exists)
    tl.store(loss + batch, squared, mask=exists)


@triton.jit
def tile(begin, size, SIZE: tl.constexpr):
    """Indices from `begin` on as int64, and which of them are below `size`."""
    index = begin + tl.arange(0, SIZE).to(tl.int64)
    return index, index < size


@kernel
def _balance(
    log_probs,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    mask,
    mask_batch_stride: tl.int64,
    mask_step_stride: tl.int64,
    batches: tl.int64,
    steps: tl.int32,
    log_rewards,
    log_rewards_stride: tl.int64,
    log_z,
    log_z_stride: tl.int64,
    weights,
    weights_stride: tl.int64,
    loss,
    residual,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    batch, exists = rows_of_program(batches, ROWS)
    total = tl.zeros((ROWS,), loss.dtype.element_ty)
    for begin in range(0, steps, STEPS):
        step, inside = tile(begin, steps, STEPS)
        counts = exists[:, None] & inside[None, :]
        if mask is not None:
            flags = mask + batch[:, None] * mask_batch_stride + step[None, :] * mask_step_stride
            counts = counts & tl.load(flags, mask=counts, other=False)
        values = log_probs + batch[:, None] * batch_stride + step[None, :] * step_stride
        total += tl.sum(tl.load(values, mask=counts, other=0.0), 1)
    settle(
        batch,
        exists,
        total,
        log_rewards,
        log_rewards_stride,
        log_z,
        log_z_stride,
        weights,
        weights_stride,
        loss,
        residual,
    )


def trajectory_balance(
    log_probs: Tensor, log_rewards: Tensor, log_z: Tensor, mask: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    batches, steps = log_probs.shape
    loss, residual = log_probs.new_empty(batches), log_probs.new_empty(batches)
    launch(
        _balance,
        batches,
        log_probs,
        *log_probs.stride(),
        *strided(mask, 2),
        batches,
        steps,
        *strided(log_rewards),
        *strided(log_z),
        *strided(weights),
        loss,
        residual,
        **OPTIONS,
    )
    return loss, residual


@kernel
def _balance_backward(
    grad_residual,
    grad_stride: tl.int64,
    mask,
    mask_batch_stride: tl.int64,
    mask_step_stride: tl.int64,
    batches: tl.int64,
    steps: tl.int32,
    grad_log_probs,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    batch, exists = rows_of_program(batches, ROWS)
    slope = tl.load(grad_residual + batch * grad_stride, mask=exists, other=0.0)
    for begin in range(0, steps, STEPS):
        step, inside = tile(begin, steps, STEPS)
        writes = exists[:, None] & inside[None, :]
        values = tl.broadcast_to(slope[:, None], (ROWS, STEPS))
        if mask is not None:
            flags = mask + batch[:, None] * mask_batch_stride + step[None, :] * mask_step_stride
            values = tl.where(tl.load(flags, mask=writes, other=False), values, 0.0)
        tl.store(grad_log_probs + batch[:, None] * steps + step[None, :], values, mask=writes)


def trajectory_balance_backward(grad_residual: Tensor, mask: Tensor | None, steps: int) -> Tensor:
    batches = grad_residual.shape[0]
    grad_log_probs = grad_residual.new_empty(batches, steps)
    launch(
        _balance_backward,
        batches,
        *strided(grad_residual),
        *strided(mask, 2),
        batches,
        steps,
        grad_log_probs,
        **OPTIONS,
    )
    return grad_log_probs
