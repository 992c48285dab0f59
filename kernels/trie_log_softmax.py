"""The forward policy as a dense distribution, and its gradient."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._filter import choices, filter_of_rows
from ._launch import child_tile, filter_arguments, kernel, launch, sums_dtype
from ._trie import (
    child_block,
    child_logits,
    children,
    logits_row,
    most,
    peak_and_log_total,
    quotient_and_rest,
    rows_of_program,
)


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
    hidden_offsets,
    hidden_nodes,
    allowed,
    allowed_set,
    words: tl.int64,
    share: tl.int64,
    log_probs,
    rows: tl.int64,
    steps: tl.int32,
    width: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = log_probs.dtype.element_ty
    index, row_exists = rows_of_program(rows, ROWS)
    batch, step = quotient_and_rest(index, steps)
    row = logits_row(logits, batch, step, batch_stride, step_stride)
    out = (log_probs + index * width)[:, None]
    first, end = children(tl.load(nodes + index, mask=row_exists, other=-1), first_child, num_nodes)
    low, high, bits = filter_of_rows(
        index, row_exists, share, first, end, hidden_offsets, hidden_nodes, allowed, allowed_set, words
    )
    choice_end, _leader = choices(first, end, hidden_nodes, low, high, allowed, bits, BLOCK)
    peak, log_total = peak_and_log_total(
        row, token_stride, first, choice_end, token, sums, BLOCK, hidden_nodes, low, high, allowed, bits
    )
    for offset in range(0, most(first, end), BLOCK):
        child, tokens, exists = child_block(
            first + offset, end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        chooses = exists & (child < choice_end[:, None])
        values = child_logits(row, token_stride, tokens, chooses, sums)
        log_prob = values - peak[:, None] - log_total[:, None]
        tl.store(out + tokens, tl.where(chooses, log_prob, 0.0), mask=exists)


def trie_log_softmax(
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    *row_filter: Tensor | None,
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
        *filter_arguments(row_filter, nodes.numel()),
        log_probs,
        nodes.numel(),
        *logits.shape[1:],
        **child_tile(max_children),
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
    hidden_offsets,
    hidden_nodes,
    allowed,
    allowed_set,
    words: tl.int64,
    share: tl.int64,
    grad_logits,
    rows: tl.int64,
    steps: tl.int32,
    width: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = log_probs.dtype.element_ty
    index, row_exists = rows_of_program(rows, ROWS)
    batch, step = quotient_and_rest(index, steps)
    row = logits_row(grad, batch, step, batch_stride, step_stride)
    first, end = children(tl.load(nodes + index, mask=row_exists, other=-1), first_child, num_nodes)
    low, high, bits = filter_of_rows(
        index, row_exists, share, first, end, hidden_offsets, hidden_nodes, allowed, allowed_set, words
    )
    choice_end, _leader = choices(first, end, hidden_nodes, low, high, allowed, bits, BLOCK)
    grad_row = row[:, None]
    log_probs_row = (log_probs + index * width)[:, None]
    out = (grad_logits + index * width)[:, None]
    total = tl.zeros((ROWS,), sums)
    for offset in range(0, most(first, choice_end), BLOCK):
        _, tokens, exists = child_block(
            first + offset, choice_end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        total += tl.sum(tl.load(grad_row + tokens * token_stride, mask=exists, other=0.0).to(sums), 1)
    for offset in range(0, most(first, choice_end), BLOCK):
        _, tokens, exists = child_block(
            first + offset, choice_end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        slope = tl.load(grad_row + tokens * token_stride, mask=exists, other=0.0).to(sums)
        probability = tl.exp(tl.load(log_probs_row + tokens, mask=exists, other=0.0))
        tl.store(out + tokens, slope - probability * total[:, None], mask=exists)


def trie_log_softmax_backward(
    grad: Tensor,
    log_probs: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    dtype: torch.dtype,
    *row_filter: Tensor | None,
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
        *filter_arguments(row_filter, nodes.numel()),
        grad_logits,
        nodes.numel(),
        *grad.shape[1:],
        **child_tile(max_children),
    )
    return grad_logits
