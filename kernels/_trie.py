"""What kernels do on a trie and on the logits of nodes' children.

A program has ROWS rows, and reads the children of their nodes in tiles (ROWS, BLOCK). The children of a node
are the nodes `first .. end - 1`; nodes, tokens and offsets are int64. `row` points to the logits of each row
at token 0, and `sums` is the dtype that sums run in. What one row gets does not depend on the others: they
only lengthen its loops, by steps that add zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._filter import available, choices, if_available


@triton.jit
def rows_of_program(rows, ROWS: tl.constexpr):
    """The rows of this program, and which of them exist."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return index, index < rows


@triton.jit
def quotient_and_rest(index, size):
    """`index // size` and `index % size` by a division of 32 bits, for one of 64 takes several times as long.

    `launch` refuses more rows than they count.
    """
    narrow = index.to(tl.int32)
    quotient = narrow // size
    return quotient.to(tl.int64), (narrow - quotient * size).to(tl.int64)


@triton.jit
def children(node, first_child, num_nodes):
    """`first` and `end` of each node; equal for one off the trie."""
    inside = (node >= 0) & (node < num_nodes)
    first = tl.load(first_child + node, mask=inside, other=0)
    end = tl.load(first_child + node + 1, mask=inside, other=0)
    return first.to(tl.int64), end.to(tl.int64)


@triton.jit
def most(first, end):
    """The largest of the ranges `first .. end - 1`."""
    return tl.max(end - first, 0).to(tl.int32)


@triton.jit
def logits_row(logits, batch, step, batch_stride, step_stride):
    """Points to row (batch, step) of logits (B, T, V) with any strides."""
    return logits + batch * batch_stride + step * step_stride


@triton.jit
def child_block(
    begin, end, token, BLOCK: tl.constexpr, hidden_nodes=None, low=None, high=None, allowed=None, bits=None
):
    """The children from `begin` on, as many as fit: nodes, tokens, and which of them are there."""
    child = begin[:, None] + tl.arange(0, BLOCK)[None, :]
    exists = available(child, child < end[:, None], hidden_nodes, low, high, allowed, bits)
    return child, tl.load(token + child, mask=exists, other=0).to(tl.int64), exists


@triton.jit
def find_child(first, end, wanted, token, BLOCK: tl.constexpr):
    """The child by the token `wanted`, -1 where there is none.

    All children are compared: a binary search would wait for memory once a halving, and this once a block.
    """
    found = tl.zeros((first.shape[0], BLOCK), tl.int64) - 1
    for offset in range(0, most(first, end), BLOCK):
        child, tokens, exists = child_block(first + offset, end, token, BLOCK)
        found = tl.where(exists & (tokens == wanted[:, None]), child, found)
    return tl.max(found, 1)


@triton.jit
def walk(tokens, steps, start, first_child, token, num_nodes, BLOCK: tl.constexpr):
    """The nodes that `steps` tokens lead to, -1 off the trie, and whether a padding is among them."""
    node = start
    padding = node != node
    for step in range(tl.max(steps, 0).to(tl.int32)):
        moves = step < steps
        wanted = tl.load(tokens + step, mask=moves, other=0)
        padding = padding | (wanted < 0)
        first, end = children(tl.where(moves, node, -1), first_child, num_nodes)
        node = tl.where(moves, find_child(first, end, wanted, token, BLOCK), node)
    return node, padding


@triton.jit
def child_logits(row, token_stride, tokens, exists, sums: tl.constexpr):
    """The logits of a block of children, -inf for the missing ones."""
    return tl.load(row[:, None] + tokens * token_stride, mask=exists, other=float("-inf")).to(sums)


@triton.jit
def raise_peak(peak, values):
    """The largest value so far, and the old peak and the values relative to it.

    While all values are -inf they are taken relative to 0, for -inf - -inf would be NaN and spoil the sum.
    """
    highest = tl.maximum(peak, tl.max(values, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return highest, peak - base, values - base[:, None]


@triton.jit
def add_exponentials(peak, total, values):
    """The largest value and the sum of exponentials relative to it, with `values` added."""
    peak, lowered, relative = raise_peak(peak, values)
    return peak, total * tl.exp(lowered) + tl.sum(tl.exp(relative), 1)


@triton.jit
def settle_peak(peak, total):
    """m and s such that the log-prob of a value is the value - m - s, with m near the largest one."""
    # Values that are all at -inf have no distribution: NaN, as from torch.log_softmax.
    log_total = tl.log(tl.where(total == 0.0, float("nan"), total))
    return tl.where(peak == float("-inf"), 0.0, peak), log_total


@triton.jit
def nothing_yet(first, sums: tl.constexpr):
    """A peak and a total of no values, for each row."""
    total = tl.zeros(first.shape, sums)
    return total - float("inf"), total


@triton.jit
def peak_and_log_total(
    row,
    token_stride,
    first,
    end,
    token,
    sums: tl.constexpr,
    BLOCK: tl.constexpr,
    hidden_nodes=None,
    low=None,
    high=None,
    allowed=None,
    bits=None,
):
    """m and s such that the log-prob of a child is its logit - m - s, with m near the largest logit."""
    peak, total = nothing_yet(first, sums)
    for offset in range(0, most(first, end), BLOCK):
        _, tokens, exists = child_block(
            first + offset, end, token, BLOCK, hidden_nodes, low, high, allowed, bits
        )
        peak, total = add_exponentials(peak, total, child_logits(row, token_stride, tokens, exists, sums))
    return settle_peak(peak, total)


@triton.jit
def end_of_choice(first, end):
    """`end`, or `first` where there is one child at most: then nothing is to choose and no logit is read."""
    return tl.where(end - first > 1, end, first)


@triton.jit
def step_log_prob(
    row, token_stride, wanted, node, first_child, token, num_nodes, sums: tl.constexpr, BLOCK: tl.constexpr
):
    """log P_F of the tokens `wanted` at nodes, and the children by them; -inf and -1 where there is none."""
    first, end = children(node, first_child, num_nodes)
    return log_prob_among(row, token_stride, wanted, first, end, token, sums, BLOCK)


@triton.jit
def log_prob_among(
    row,
    token_stride,
    wanted,
    first,
    end,
    token,
    sums: tl.constexpr,
    BLOCK: tl.constexpr,
    hidden_nodes=None,
    low=None,
    high=None,
    allowed=None,
    bits=None,
):
    """The same where the children, and an item filter of theirs, are known."""
    child = find_child(first, end, wanted, token, BLOCK)
    child = if_available(child, hidden_nodes, low, high, allowed, bits)
    choice_end, _leader = choices(first, end, hidden_nodes, low, high, allowed, bits, BLOCK)
    read_end = tl.where(child >= 0, choice_end, first)
    chooses = read_end > first
    peak, log_total = peak_and_log_total(
        row, token_stride, first, read_end, token, sums, BLOCK, hidden_nodes, low, high, allowed, bits
    )
    value = tl.load(row + wanted * token_stride, mask=chooses, other=0.0).to(sums)
    log_prob = tl.where(chooses, value - peak - log_total, 0.0)
    return tl.where(child >= 0, log_prob, float("-inf")), child
