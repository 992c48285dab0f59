"""Which children a row may go to, in kernels that take an item filter.

Its arguments are `hidden_nodes`, None without a filter, with the part `low .. high - 1` of it that lies
among a row's children, and `allowed`, None where every item is, with the place `bits` at which the row's set
begins.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lower_bound(values, low, high, wanted):
    """The first place in `low .. high - 1` whose value is not below `wanted`, `high` where there is none."""
    while tl.max(high - low) > 0:
        middle = (low + high) // 2
        open_range = low < high
        below = open_range & (tl.load(values + middle, mask=open_range, other=0) < wanted)
        low = tl.where(below, middle + 1, low)
        high = tl.where(open_range & (below == 0), middle, high)
    return low


@triton.jit
def filter_of_rows(
    index, exists, share, first, end, hidden_offsets, hidden_nodes, allowed, allowed_set, words
):
    """`low`, `high` and `bits` of the rows `index`, of which `share` have one row of the filter."""
    low = first
    high = end
    bits = first
    if hidden_offsets is not None:
        row = index // share
        begin = tl.load(hidden_offsets + row, mask=exists, other=0)
        stop = tl.load(hidden_offsets + row + 1, mask=exists, other=0)
        low = lower_bound(hidden_nodes, begin, stop, first)
        high = lower_bound(hidden_nodes, low, stop, end)
        if allowed is not None:
            bits = tl.load(allowed_set + row, mask=exists, other=0) * words
    return low, high, bits


@triton.jit
def available(child, exists, hidden_nodes, low, high, allowed, bits):
    """Those of the children (ROWS, BLOCK) that exist and are available."""
    if hidden_nodes is not None:
        # In 32 bits, which count the hidden children of a node; mostly there are none.
        among = (hidden_nodes + low)[:, None]
        number = child.to(tl.int32)
        count = (high - low).to(tl.int32)[:, None]
        place = lower_bound(among, number * 0, count + number * 0, number)
        found = tl.load(among + place, mask=exists & (place < count), other=-1)
        exists = exists & (found != number)
        if allowed is not None:
            word = tl.load(allowed + bits[:, None] + child // 32, mask=exists, other=0)
            exists = exists & (((word >> (child % 32).to(tl.int32)) & 1) == 1)
    return exists


@triton.jit
def if_available(child, hidden_nodes, low, high, allowed, bits):
    """One child for each row, -1 where it is not available; it may be -1 before."""
    if hidden_nodes is not None:
        there = available(child[:, None], child[:, None] >= 0, hidden_nodes, low, high, allowed, bits)
        child = tl.where(tl.max(there.to(tl.int32), 1) > 0, child, -1)
    return child


@triton.jit
def choices(first, end, hidden_nodes, low, high, allowed, bits, BLOCK: tl.constexpr):
    """`end`, or `first` where one child is available at most, and the first available one, or `end`.

    In the first case nothing is to choose, and no logit is read.
    """
    count = end - first
    leader = first
    if hidden_nodes is not None:
        count = first * 0
        leader = end
        for offset in range(0, tl.max(end - first, 0).to(tl.int32), BLOCK):
            child = (first + offset)[:, None] + tl.arange(0, BLOCK)[None, :]
            exists = available(child, child < end[:, None], hidden_nodes, low, high, allowed, bits)
            count += tl.sum(exists.to(tl.int64), 1)
            leader = tl.minimum(leader, tl.min(tl.where(exists, child, end[:, None]), 1))
    return tl.where(count > 1, end, first), leader
