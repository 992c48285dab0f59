"""Trajectory balance straight from logits: walk, log-probs, residual and loss in one kernel."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ._launch import child_tile, kernel, launch, strided
from ._trie import rows_of_program, step_log_prob
from .trajectory_balance import settle


@kernel
def _trie_balance(
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    tokens,
    start,
    first_child,
    token,
    num_nodes: tl.int32,
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
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = loss.dtype.element_ty
    batch, exists = rows_of_program(batches, ROWS)
    path = tokens + batch * steps
    row = logits + batch * batch_stride
    node = tl.load(start + batch, mask=exists, other=-1)
    total = tl.zeros((ROWS,), sums)
    padding = node != node
    for step in range(steps):
        wanted = tl.load(path + step, mask=exists, other=-1)
        padding = padding | (wanted < 0)
        log_prob, node = step_log_prob(
            row, token_stride, wanted, node, first_child, token, num_nodes, sums, BLOCK
        )
        total += tl.where(padding, 0.0, log_prob)
        row += step_stride
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


def trie_trajectory_balance(
    logits: Tensor,
    tokens: Tensor,
    start: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    log_rewards: Tensor,
    log_z: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batches, steps = tokens.shape
    loss, residual = log_rewards.new_empty(batches), log_rewards.new_empty(batches)
    launch(
        _trie_balance,
        batches,
        logits,
        *logits.stride(),
        tokens.contiguous(),
        start.contiguous(),
        first_child,
        token,
        token.numel(),
        batches,
        steps,
        *strided(log_rewards),
        *strided(log_z),
        *strided(weights),
        loss,
        residual,
        **child_tile(max_children),
    )
    return loss, residual
