"""log F(s) of every node: the log of the summed rewards of the items at or under it, and its gradient.

The items under a node are a range of `item_order`, so a node needs no other node's flow: all are computed
side by side, whatever the depth. Chunks of items are summed beforehand, which bounds the work of the widest
ranges: a node reads the items at its two ends and the chunks in between, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import CHUNK_TILE, FLOWS_TILE, ITEM_TILE, MOST_ROWS, kernel, launch, strided
from ._trie import children, most, nothing_yet, rows_of_program


@triton.jit
def finite_or_zero(peak):
    """What values are taken relative to, so that rewards of +inf sum to +inf, and of -inf to -inf."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def add_parts(peak, total, part_peaks, part_totals):
    """The peak and the total, with parts of the given peaks and totals added."""
    highest = tl.maximum(peak, tl.max(part_peaks, 1))
    base = finite_or_zero(highest)
    relative = part_peaks - base[:, None]
    return highest, total * tl.exp(peak - base) + tl.sum(part_totals * tl.exp(relative), 1)


@triton.jit
def add_items(peak, total, rewards, item_stride, item_order, begin, end, BLOCK: tl.constexpr):
    """The peak and the total, with the rewards of the items at the positions `begin .. end - 1` added."""
    for offset in range(0, most(begin, end), BLOCK):
        position = begin[:, None] + offset + tl.arange(0, BLOCK)[None, :]
        exists = position < end[:, None]
        item = tl.load(item_order + position, mask=exists, other=0).to(tl.int64)
        values = tl.load(rewards[:, None] + item * item_stride, mask=exists, other=float("-inf"))
        peak, total = add_parts(peak, total, values, 1.0)
    return peak, total


@kernel
def _chunk_sums(
    log_rewards,
    batch_stride: tl.int64,
    item_stride: tl.int64,
    item_order,
    items: tl.int32,
    chunks: tl.int64,
    chunk_peaks,
    chunk_totals,
    rows: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index, row_exists = rows_of_program(rows, ROWS)
    begin = index % chunks * BLOCK
    end = tl.where(row_exists, tl.minimum(begin + BLOCK, items), begin)
    rewards = log_rewards + index // chunks * batch_stride
    peak, total = nothing_yet(begin, chunk_totals.dtype.element_ty)
    peak, total = add_items(peak, total, rewards, item_stride, item_order, begin, end, BLOCK)
    tl.store(chunk_peaks + index, peak, mask=row_exists)
    tl.store(chunk_totals + index, total, mask=row_exists)


@kernel
def _log_flows(
    log_rewards,
    batch_stride: tl.int64,
    item_stride: tl.int64,
    first_item,
    item_count,
    item_order,
    num_nodes: tl.int64,
    chunks: tl.int64,
    chunk_peaks,
    chunk_totals,
    log_flows,
    rows: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    index, row_exists = rows_of_program(rows, ROWS)
    batch = index // num_nodes
    node = index % num_nodes
    begin = tl.load(first_item + node, mask=row_exists, other=0).to(tl.int64)
    end = begin + tl.load(item_count + node, mask=row_exists, other=0)
    first_chunk = (begin + CHUNK - 1) // CHUNK
    end_chunk = tl.maximum(end // CHUNK, first_chunk)
    has_chunk = first_chunk < end_chunk
    rewards = log_rewards + batch * batch_stride

    peak, total = nothing_yet(begin, log_flows.dtype.element_ty)
    head_end = tl.where(has_chunk, first_chunk * CHUNK, end)
    peak, total = add_items(peak, total, rewards, item_stride, item_order, begin, head_end, BLOCK)
    for offset in range(0, most(first_chunk, end_chunk), BLOCK):
        chunk = first_chunk[:, None] + offset + tl.arange(0, BLOCK)[None, :]
        exists = chunk < end_chunk[:, None]
        place = batch[:, None] * chunks + chunk
        part_peaks = tl.load(chunk_peaks + place, mask=exists, other=float("-inf"))
        part_totals = tl.load(chunk_totals + place, mask=exists, other=0.0)
        peak, total = add_parts(peak, total, part_peaks, part_totals)
    tail = tl.where(has_chunk, end_chunk * CHUNK, end)
    peak, total = add_items(peak, total, rewards, item_stride, item_order, tail, end, BLOCK)
    log_total = tl.log(tl.where(total == 0.0, 1.0, total))
    flow = tl.where(total == 0.0, float("-inf"), finite_or_zero(peak) + log_total)
    tl.store(log_flows + index, flow, mask=row_exists)


def trie_log_flows(
    log_rewards: Tensor,
    first_child: Tensor,
    token: Tensor,
    first_item: Tensor,
    item_count: Tensor,
    item_order: Tensor,
) -> Tensor:
    batches, items = log_rewards.shape[0], item_order.numel()
    nodes, chunks = token.numel(), triton.cdiv(items, CHUNK_TILE.BLOCK)
    log_flows = log_rewards.new_empty(batches, nodes)
    peaks, totals = log_rewards.new_empty(batches, chunks), log_rewards.new_empty(batches, chunks)
    launch(
        _chunk_sums,
        peaks.numel(),
        *strided(log_rewards, 2),
        item_order,
        items,
        chunks,
        peaks,
        totals,
        peaks.numel(),
        **CHUNK_TILE._asdict(),
    )
    launch(
        _log_flows,
        log_flows.numel(),
        *strided(log_rewards, 2),
        first_item,
        item_count,
        item_order,
        nodes,
        chunks,
        peaks,
        totals,
        log_flows,
        log_flows.numel(),
        CHUNK=CHUNK_TILE.BLOCK,
        # Nodes of all contexts: its divisions have 64 bits.
        most_rows=MOST_ROWS * FLOWS_TILE.ROWS,
        **FLOWS_TILE._asdict(),
    )
    return log_flows


@triton.jit
def child_over(first, end, position, first_item):
    """The child that an item's position is under; below `first` where the item ends at the node itself."""
    low = first
    high = end
    left = most(first, end)
    while left > 0:
        middle = low + (high - low) // 2
        unsure = low < high
        begins = unsure & (tl.load(first_item + middle, mask=unsure, other=0) <= position)
        low = tl.where(begins, middle + 1, low)
        high = tl.where(begins, high, middle)
        left = left // 2
    return low - 1


@kernel
def _log_flows_backward(
    grad,
    grad_batch_stride: tl.int64,
    grad_node_stride: tl.int64,
    log_rewards,
    batch_stride: tl.int64,
    item_stride: tl.int64,
    log_flows,
    flows_batch_stride: tl.int64,
    flows_node_stride: tl.int64,
    first_child,
    num_nodes: tl.int32,
    first_item,
    item_order,
    items: tl.int64,
    batches: tl.int64,
    grad_rewards,
    width: tl.int64,
    ITEMS: tl.constexpr,
    BATCHES: tl.constexpr,
):
    """Each item's reward has the share exp(log R - log F(s)) in the flow of every state s on its path."""
    sums: tl.constexpr = grad_rewards.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    item_tiles = (items + ITEMS - 1) // ITEMS
    position = program % item_tiles * ITEMS + tl.arange(0, ITEMS)
    batch = (program // item_tiles * BATCHES + tl.arange(0, BATCHES))[:, None]
    on_path = position < items
    item = tl.load(item_order + position, mask=on_path, other=0).to(tl.int64)[None, :]
    writes = (batch < batches) & on_path[None, :]
    reward = tl.load(log_rewards + batch * batch_stride + item * item_stride, mask=writes, other=0.0)
    total = tl.zeros((BATCHES, ITEMS), sums)
    node = position - position
    while tl.max(on_path.to(tl.int32), 0) > 0:
        reads = writes & on_path[None, :]
        flows = log_flows + batch * flows_batch_stride + node[None, :] * flows_node_stride
        flow = tl.load(flows, mask=reads, other=0.0)
        slopes = grad + batch * grad_batch_stride + node[None, :] * grad_node_stride
        slope = tl.load(slopes, mask=reads, other=0.0)
        carries = reads & (flow != float("-inf"))
        share = tl.exp(tl.where(carries, reward - tl.where(carries, flow, 0.0), float("-inf")))
        total += tl.where(carries, slope * share, 0.0)
        first, end = children(tl.where(on_path, node, -1), first_child, num_nodes)
        node = child_over(first, end, position, first_item)
        on_path = on_path & (first <= node)
    tl.store(grad_rewards + batch * width + item, total, mask=writes)


def trie_log_flows_backward(
    grad: Tensor,
    log_rewards: Tensor,
    log_flows: Tensor,
    first_child: Tensor,
    token: Tensor,
    first_item: Tensor,
    item_count: Tensor,
    item_order: Tensor,
) -> Tensor:
    batches, items = log_rewards.shape[0], item_order.numel()
    # Nothing is written for items that were removed.
    removed = items < log_rewards.shape[1]
    grad_rewards = (log_rewards.new_zeros if removed else log_rewards.new_empty)(log_rewards.shape)
    launch(
        _log_flows_backward,
        triton.cdiv(items, ITEM_TILE.ROWS) * triton.cdiv(batches, ITEM_TILE.BLOCK),
        *strided(grad, 2),
        *strided(log_rewards, 2),
        *strided(log_flows, 2),
        first_child,
        token.numel(),
        first_item,
        item_order,
        items,
        batches,
        grad_rewards,
        log_rewards.shape[1],
        ITEMS=ITEM_TILE.ROWS,
        BATCHES=ITEM_TILE.BLOCK,
        num_warps=ITEM_TILE.num_warps,
    )
    return grad_rewards
