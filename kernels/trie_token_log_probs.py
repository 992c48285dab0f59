"""Log-probs of given tokens under the forward policy, and their gradient.

One row for each token, which walks there from the start by itself: a search a level, in trie rows that all
programs share in cache. One for each path would save those searches, but run its softmaxes one after another;
here they run side by side.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._filter import choices, filter_of_rows, if_available
from ._launch import child_tile, filter_arguments, kernel, launch, sums
from ._trie import (
    child_block,
    child_logits,
    children,
    find_child,
    log_prob_among,
    logits_row,
    most,
    peak_and_log_total,
    quotient_and_rest,
    rows_of_program,
    walk,
)


@kernel
def _token_log_probs(
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    first_token: tl.int32,
    tokens,
    start,
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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = log_probs.dtype.element_ty
    index, row_exists = rows_of_program(rows, ROWS)
    batch, step = quotient_and_rest(index, steps)
    step = tl.where(row_exists, step, 0)
    path = tokens + batch * steps
    begin = tl.load(start + batch, mask=row_exists, other=-1)
    node, padding = walk(path, step, begin, first_child, token, num_nodes, BLOCK)
    wanted = tl.load(path + step, mask=row_exists, other=-1)
    row = logits_row(logits, batch, step, batch_stride, step_stride) - first_token.to(tl.int64) * token_stride
    first, end = children(node, first_child, num_nodes)
    low, high, bits = filter_of_rows(
        batch, row_exists, share, first, end, hidden_offsets, hidden_nodes, allowed, allowed_set, words
    )
    log_prob, _ = log_prob_among(
        row, token_stride, wanted, first, end, token, sums, BLOCK, hidden_nodes, low, high, allowed, bits
    )
    tl.store(log_probs + index, tl.where(padding | (wanted < 0), 0.0, log_prob), mask=row_exists)


def trie_token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    start: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    first_token: int,
    *row_filter: Tensor | None,
) -> Tensor:
    log_probs = sums(logits, tokens.shape)
    launch(
        _token_log_probs,
        tokens.numel(),
        logits,
        *logits.stride(),
        first_token,
        tokens.contiguous(),
        start.contiguous(),
        first_child,
        token,
        token.numel(),
        *filter_arguments(row_filter, start.numel()),
        log_probs,
        tokens.numel(),
        tokens.shape[1],
        **child_tile(max_children),
    )
    return log_probs


@kernel
def _token_log_probs_backward(
    grad,
    grad_batch_stride: tl.int64,
    grad_step_stride: tl.int64,
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    first_token: tl.int32,
    tokens,
    start,
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
    step = tl.where(row_exists, step, 0)
    path = tokens + batch * steps
    begin = tl.load(start + batch, mask=row_exists, other=-1)
    node, _ = walk(path, step, begin, first_child, token, num_nodes, BLOCK)
    first, end = children(node, first_child, num_nodes)
    wanted = tl.load(path + step, mask=row_exists, other=-1)
    low, high, bits = filter_of_rows(
        batch, row_exists, share, first, end, hidden_offsets, hidden_nodes, allowed, allowed_set, words
    )
    taken = find_child(first, end, wanted, token, BLOCK)
    taken = if_available(taken, hidden_nodes, low, high, allowed, bits)
    choice_end, _leader = choices(first, end, hidden_nodes, low, high, allowed, bits, BLOCK)
    read_end = tl.where(taken >= 0, choice_end, first)
    row = logits_row(logits, batch, step, batch_stride, step_stride) - first_token.to(tl.int64) * token_stride
    peak, log_total = peak_and_log_total(
        row, token_stride, first, read_end, token, sums, BLOCK, hidden_nodes, low, high, allowed, bits
    )
    slope = tl.load(
        logits_row(grad, batch, step, grad_batch_stride, grad_step_stride), mask=row_exists, other=0.0
    )
    out = (grad_logits + index * width - first_token)[:, None]
    for offset in range(0, most(first, read_end), BLOCK):
        _child, child_tokens, exists = child_block(
            first + offset, read_end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        values = child_logits(row, token_stride, child_tokens, exists, sums)
        # The token's child is `taken`: a row without one reads none. (Triton 3.6 cannot compile a comparison
        # of the nodes here.)
        hit = tl.where(child_tokens == wanted[:, None], 1.0, 0.0).to(sums)
        probability = tl.exp(values - peak[:, None] - log_total[:, None])
        tl.store(out + child_tokens, slope[:, None] * (hit - probability), mask=exists)


def trie_token_log_probs_backward(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    start: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    first_token: int,
    *row_filter: Tensor | None,
) -> Tensor:
    grad_logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(
        _token_log_probs_backward,
        tokens.numel(),
        grad,
        *grad.stride(),
        logits,
        *logits.stride(),
        first_token,
        tokens.contiguous(),
        start.contiguous(),
        first_child,
        token,
        token.numel(),
        *filter_arguments(row_filter, start.numel()),
        grad_logits,
        tokens.numel(),
        *logits.shape[1:],
        **child_tile(max_children),
    )
    return grad_logits
