"""Trajectory balance straight from logits: walk, log-probs, residual and loss in one kernel."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ._launch import block_of, kernel, launch, strided
from ._trie import step_log_prob
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
    steps: tl.int32,
    log_rewards,
    log_rewards_stride: tl.int64,
    log_z,
    log_z_stride: tl.int64,
    weights,
    weights_stride: tl.int64,
    loss,
    residual,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = loss.dtype.element_ty
    batch = tl.program_id(0).to(tl.int64)
    path = tokens + batch * steps
    offset = batch * batch_stride
    node = tl.load(start + batch)
    total = tl.full((), 0.0, sums)
    padding = node != node
    for step in range(steps):
        wanted = tl.load(path + step)
        padding = padding | (wanted < 0)
        log_prob, node = step_log_prob(
            logits + offset, token_stride, wanted, node, first_child, token, num_nodes, sums, BLOCK
        )
        total += tl.where(padding, 0.0, log_prob)
        offset += step_stride
    settle(
        batch,
        batch >= 0,
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
        steps,
        *strided(log_rewards),
        *strided(log_z),
        *strided(weights),
        loss,
        residual,
        **block_of(max_children),
    )
    return loss, residual
