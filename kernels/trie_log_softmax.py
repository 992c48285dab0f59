"""The forward policy as a dense distribution, and its gradient."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import block_of, kernel, launch, sums_dtype
from ._trie import child_block, child_logits, children, end_of_choice, logits_row, peak_and_log_total


@kernel
def _log_softmax(
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    nodes,
    first_child,
    token,
    num_nodes: tl.int32,
    log_probs,
    steps: tl.int32,
    width: tl.int32,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = log_probs.dtype.element_ty
    index = tl.program_id(0)
    row = logits_row(logits, index // steps, index % steps, batch_stride, step_stride)
    out = log_probs + index.to(tl.int64) * width
    first, end = children(tl.load(nodes + index), first_child, num_nodes)
    choice_end = end_of_choice(first, end)
    peak, log_total = peak_and_log_total(row, token_stride, first, choice_end, token, sums, BLOCK)
    for begin in range(first, end, BLOCK):
        child, tokens, exists = child_block(begin, end, token, BLOCK)
        values = child_logits(row, token_stride, tokens, child < choice_end, sums)
        tl.store(out + tokens, tl.where(child < choice_end, values - peak - log_total, 0.0), mask=exists)


def trie_log_softmax(
    logits: Tensor, nodes: Tensor, first_child: Tensor, token: Tensor, max_children: int
) -> Tensor:
    log_probs = torch.full(logits.shape, -torch.inf, dtype=sums_dtype(logits.dtype), device=logits.device)
    launch(
        _log_softmax,
        nodes.numel(),
        logits,
        *logits.stride(),
        nodes.contiguous(),
        first_child,
        token,
        token.numel(),
        log_probs,
        *logits.shape[1:],
        **block_of(max_children),
    )
    return log_probs


@kernel
def _log_softmax_backward(
    grad,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    log_probs,
    nodes,
    first_child,
    token,
    num_nodes: tl.int32,
    grad_logits,
    steps: tl.int32,
    width: tl.int32,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = log_probs.dtype.element_ty
    index = tl.program_id(0)
    row = logits_row(grad, index // steps, index % steps, batch_stride, step_stride)
    offset = index.to(tl.int64) * width
    first, end = children(tl.load(nodes + index), first_child, num_nodes)
    choice_end = end_of_choice(first, end)
    total = tl.full((), 0.0, sums)
    for begin in range(first, choice_end, BLOCK):
        _, tokens, exists = child_block(begin, choice_end, token, BLOCK)
        total += tl.sum(tl.load(row + tokens * token_stride, mask=exists, other=0.0).to(sums), 0)
    for begin in range(first, choice_end, BLOCK):
        _, tokens, exists = child_block(begin, choice_end, token, BLOCK)
        slope = tl.load(row + tokens * token_stride, mask=exists, other=0.0).to(sums)
        probability = tl.exp(tl.load(log_probs + offset + tokens, mask=exists, other=0.0))
        tl.store(grad_logits + offset + tokens, slope - probability * total, mask=exists)


def trie_log_softmax_backward(
    grad: Tensor,
    log_probs: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    dtype: torch.dtype,
) -> Tensor:
    grad_logits = torch.zeros(grad.shape, dtype=dtype, device=grad.device)
    launch(
        _log_softmax_backward,
        nodes.numel(),
        grad,
        *grad.stride(),
        log_probs.contiguous(),
        nodes.contiguous(),
        first_child,
        token,
        token.numel(),
        grad_logits,
        *grad.shape[1:],
        **block_of(max_children),
    )
    return grad_logits
