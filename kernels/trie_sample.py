"""One draw a row under the forward policy."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._filter import choices, filter_of_rows
from ._launch import child_tile, filter_arguments, kernel, launch, sums
from ._trie import (
    child_block,
    child_logits,
    children,
    logits_row,
    most,
    nothing_yet,
    quotient_and_rest,
    raise_peak,
    rows_of_program,
)


@kernel
def _sample(
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
    uniform,
    temperature: tl.float64,
    drawn_tokens,
    drawn_nodes,
    log_probs,
    rows: tl.int64,
    steps: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = log_probs.dtype.element_ty
    divisor = tl.full((), temperature, sums)
    index, row_exists = rows_of_program(rows, ROWS)
    batch, step = quotient_and_rest(index, steps)
    row = logits_row(logits, batch, step, batch_stride, step_stride)
    first, end = children(tl.load(nodes + index, mask=row_exists, other=-1), first_child, num_nodes)
    low, high, bits = filter_of_rows(
        index, row_exists, share, first, end, hidden_offsets, hidden_nodes, allowed, allowed_set, words
    )
    choice_end, leader = choices(first, end, hidden_nodes, low, high, allowed, bits, BLOCK)

    # The CDF is summed in float64 whatever the logits: `uniform` has 53 bits, a node thousands of children.
    peak, total = nothing_yet(first, sums)
    mass_total = tl.zeros((ROWS,), tl.float64)
    for offset in range(0, most(first, choice_end), BLOCK):
        _, tokens, exists = child_block(
            first + offset, choice_end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        values = child_logits(row, token_stride, tokens, exists, sums)
        peak, lowered, relative = raise_peak(peak, values)
        total = total * tl.exp(lowered) + tl.sum(tl.exp(relative), 1)
        mass = tl.exp(relative / divisor).to(tl.float64)
        mass_total = mass_total * tl.exp(lowered / divisor).to(tl.float64) + tl.sum(mass, 1)

    # Without a distribution (a NaN, or all at -inf) no child has mass, and the first one is drawn.
    peak = tl.where(total > 0.0, peak, float("nan"))
    target = tl.load(uniform + index, mask=row_exists, other=0.0) * mass_total
    before = tl.zeros((ROWS,), tl.float64)
    drawn = end
    last_possible = leader
    for offset in range(0, most(first, choice_end), BLOCK):
        child, tokens, exists = child_block(
            first + offset, choice_end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        values = child_logits(row, token_stride, tokens, exists, sums)
        mass = tl.exp((values - peak[:, None]) / divisor).to(tl.float64)
        possible = mass > 0.0
        mass = tl.where(possible, mass, 0.0)
        # A parallel scan is not monotonic to the last bit, so a child without mass could seem to reach it.
        reached = possible & (before[:, None] + tl.cumsum(mass, 1) > target[:, None])
        drawn = tl.minimum(drawn, tl.min(tl.where(reached, child, end[:, None]), 1))
        last_possible = tl.maximum(last_possible, tl.max(tl.where(possible, child, leader[:, None]), 1))
        before += tl.sum(mass, 1)
    # Rounding can leave the target above the sum.
    drawn = tl.where(drawn < end, drawn, last_possible)

    alive = leader < end
    chooses = first < choice_end
    drawn_token = tl.where(alive, tl.load(token + drawn, mask=alive, other=0).to(tl.int64), -1)
    value = tl.load(row + drawn_token * token_stride, mask=chooses, other=0.0).to(sums)
    log_prob = value - peak - tl.log(tl.where(total > 0.0, total, 1.0))
    tl.store(drawn_tokens + index, drawn_token, mask=row_exists)
    tl.store(drawn_nodes + index, tl.where(alive, drawn, -1), mask=row_exists)
    tl.store(log_probs + index, tl.where(chooses, log_prob, 0.0), mask=row_exists)


def trie_sample(
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    uniform: Tensor,
    temperature: float,
    *row_filter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    drawn_tokens, drawn_nodes = (
        torch.empty(nodes.shape, dtype=torch.int64, device=logits.device) for _ in range(2)
    )
    log_probs = sums(logits, nodes.shape)
    launch(
        _sample,
        nodes.numel(),
        logits,
        *logits.stride(),
        nodes.contiguous(),
        first_child,
        token,
        token.numel(),
        *filter_arguments(row_filter, nodes.numel()),
        uniform.contiguous(),
        temperature,
        drawn_tokens,
        drawn_nodes,
        log_probs,
        nodes.numel(),
        nodes.shape[1],
        **child_tile(max_children),
    )
    return drawn_tokens, drawn_nodes, log_probs
