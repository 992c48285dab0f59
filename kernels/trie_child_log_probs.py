"""The forward policy over the children of nodes, one column a child, and its gradient."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._filter import choices, filter_of_rows, lower_bound
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
def _child_log_probs(
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    first_token: tl.int32,
    columns: tl.int64,
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
    lowest = first_token.to(tl.int64)
    row = logits_row(logits, batch, step, batch_stride, step_stride) - lowest * token_stride
    node = tl.load(nodes + index, mask=row_exists, other=-1)
    begin, stop = children(node, first_child, num_nodes)
    # Tokens ascend, so the children that have a column lie together.
    first = lower_bound(token, begin, stop, lowest)
    end = lower_bound(token, first, stop, lowest + columns)
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
        log_prob = tl.where(chooses, values - peak[:, None] - log_total[:, None], 0.0)
        place = child - begin[:, None]
        tl.store(log_probs + (index * width)[:, None] + place, log_prob, mask=exists & (place < width))


def trie_child_log_probs(
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    first_token: int,
    width: int,
    *row_filter: Tensor | None,
) -> Tensor:
    shape = (*nodes.shape, width)
    log_probs = torch.full(shape, -torch.inf, dtype=sums_dtype(logits.dtype), device=logits.device)
    launch(
        _child_log_probs,
        nodes.numel(),
        logits,
        *logits.stride(),
        first_token,
        logits.shape[-1],
        nodes.contiguous(),
        first_child,
        token,
        token.numel(),
        *filter_arguments(row_filter, nodes.numel()),
        log_probs,
        nodes.numel(),
        nodes.shape[1],
        width,
        **child_tile(max_children),
    )
    return log_probs


@kernel
def _child_log_probs_backward(
    grad,
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    first_token: tl.int32,
    columns: tl.int64,
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
    sums: tl.constexpr = grad.dtype.element_ty
    index, row_exists = rows_of_program(rows, ROWS)
    batch, step = quotient_and_rest(index, steps)
    lowest = first_token.to(tl.int64)
    row = logits_row(logits, batch, step, batch_stride, step_stride) - lowest * token_stride
    node = tl.load(nodes + index, mask=row_exists, other=-1)
    begin, stop = children(node, first_child, num_nodes)
    first = lower_bound(token, begin, stop, lowest)
    end = lower_bound(token, first, stop, lowest + columns)
    low, high, bits = filter_of_rows(
        index, row_exists, share, first, end, hidden_offsets, hidden_nodes, allowed, allowed_set, words
    )
    end, _leader = choices(first, end, hidden_nodes, low, high, allowed, bits, BLOCK)
    peak, log_total = peak_and_log_total(
        row, token_stride, first, end, token, sums, BLOCK, hidden_nodes, low, high, allowed, bits
    )
    grad_row = (grad + index * width - begin)[:, None]
    total = tl.zeros((ROWS,), sums)
    for offset in range(0, most(first, end), BLOCK):
        child, _, exists = child_block(
            first + offset, end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        asked = exists & (child < begin[:, None] + width)
        total += tl.sum(tl.load(grad_row + child, mask=asked, other=0.0), 1)
    out = (grad_logits + index * columns - lowest)[:, None]
    for offset in range(0, most(first, end), BLOCK):
        child, tokens, exists = child_block(
            first + offset, end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        slope = tl.load(grad_row + child, mask=exists & (child < begin[:, None] + width), other=0.0)
        values = child_logits(row, token_stride, tokens, exists, sums)
        probability = tl.exp(values - peak[:, None] - log_total[:, None])
        tl.store(out + tokens, slope - probability * total[:, None], mask=exists)


def trie_child_log_probs_backward(
    grad: Tensor,
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    first_token: int,
    width: int,
    *row_filter: Tensor | None,
) -> Tensor:
    grad_logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(
        _child_log_probs_backward,
        nodes.numel(),
        grad.contiguous(),
        logits,
        *logits.stride(),
        first_token,
        logits.shape[-1],
        nodes.contiguous(),
        first_child,
        token,
        token.numel(),
        *filter_arguments(row_filter, nodes.numel()),
        grad_logits,
        nodes.numel(),
        nodes.shape[1],
        width,
        **child_tile(max_children),
    )
    return grad_logits
