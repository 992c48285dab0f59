"""Flow matching on the children: KL(p* || P_F) of each row, with p* the softmax of the children's log-flows.

`rows_per_flow` consecutive rows share a row of log_flows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import SHARED_FLOWS_TILE, child_tile, kernel, launch, strided, sums
from ._trie import (
    add_exponentials,
    child_block,
    child_logits,
    children,
    end_of_choice,
    logits_row,
    most,
    nothing_yet,
    quotient_and_rest,
    rows_of_program,
    settle_peak,
)


@triton.jit
def child_flows(flows, node_stride, child, exists):
    """The log-flows of a block of children, -inf for the missing ones."""
    return tl.load(flows[:, None] + child * node_stride, mask=exists, other=float("-inf"))


@triton.jit
def normalisers(
    row, token_stride, flows, node_stride, first, end, token, sums: tl.constexpr, BLOCK: tl.constexpr
):
    """`settle_peak` of the children's logits and of their log-flows, and where the choice ends.

    It ends where it begins when no child carries flow: then there is nothing to match.
    """
    peak, total = nothing_yet(first, sums)
    flow_peak, flow_total = nothing_yet(first, sums)
    for offset in range(0, most(first, end), BLOCK):
        child, tokens, exists = child_block(first + offset, end, token, BLOCK)
        peak, total = add_exponentials(peak, total, child_logits(row, token_stride, tokens, exists, sums))
        values = child_flows(flows, node_stride, child, exists)
        flow_peak, flow_total = add_exponentials(flow_peak, flow_total, values)
    carries = flow_total != 0.0
    peak, log_total = settle_peak(peak, total)
    flow_peak, flow_log_total = settle_peak(flow_peak, flow_total)
    # Without flow every target is exp(-inf - 0 - 0) = 0, so nothing else needs to ask.
    flow_log_total = tl.where(carries, flow_log_total, 0.0)
    return peak, log_total, flow_peak, flow_log_total, tl.where(carries, end, first)


@triton.jit
def divergence_of(
    row,
    token_stride,
    flows,
    node_stride,
    first,
    end,
    token,
    peak,
    log_total,
    flow_peak,
    flow_log_total,
    sums: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum over the children that carry flow of p* (log p* - log P_F)."""
    divergence = tl.zeros(first.shape, sums)
    for offset in range(0, most(first, end), BLOCK):
        child, tokens, exists = child_block(first + offset, end, token, BLOCK)
        values = child_logits(row, token_stride, tokens, exists, sums)
        targets = child_flows(flows, node_stride, child, exists)
        log_target = targets - flow_peak[:, None] - flow_log_total[:, None]
        carries = exists & (log_target != float("-inf"))
        log_policy = tl.where(carries, values - peak[:, None] - log_total[:, None], 0.0)
        log_target = tl.where(carries, log_target, 0.0)
        gain = tl.exp(log_target) * (log_target - log_policy)
        divergence += tl.sum(tl.where(carries, gain, 0.0), 1)
    return divergence


@kernel
def _flow_matching(
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    nodes,
    first_child,
    token,
    num_nodes: tl.int32,
    log_flows,
    flows_stride: tl.int64,
    node_stride: tl.int64,
    rows_per_flow: tl.int32,
    divergence,
    rows: tl.int64,
    steps: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = divergence.dtype.element_ty
    index, row_exists = rows_of_program(rows, ROWS)
    batch, step = quotient_and_rest(index, steps)
    row = logits_row(logits, batch, step, batch_stride, step_stride)
    group, _ = quotient_and_rest(index, rows_per_flow)
    flows = log_flows + group * flows_stride
    first, end = children(tl.load(nodes + index, mask=row_exists, other=-1), first_child, num_nodes)
    peak, log_total, flow_peak, flow_log_total, end = normalisers(
        row, token_stride, flows, node_stride, first, end_of_choice(first, end), token, sums, BLOCK
    )
    value = divergence_of(
        row,
        token_stride,
        flows,
        node_stride,
        first,
        end,
        token,
        peak,
        log_total,
        flow_peak,
        flow_log_total,
        sums,
        BLOCK,
    )
    tl.store(divergence + index, value, mask=row_exists)


def flow_matching(
    logits: Tensor, nodes: Tensor, first_child: Tensor, token: Tensor, max_children: int, log_flows: Tensor
) -> Tensor:
    divergence = sums(logits, nodes.shape)
    launch(
        _flow_matching,
        nodes.numel(),
        logits,
        *logits.stride(),
        nodes.contiguous(),
        first_child,
        token,
        token.numel(),
        *strided(log_flows, 2),
        nodes.numel() // max(log_flows.shape[0], 1),
        divergence,
        nodes.numel(),
        nodes.shape[1],
        **child_tile(max_children),
    )
    return divergence


@kernel
def _flow_matching_backward(
    grad,
    grad_batch_stride: tl.int64,
    grad_step_stride: tl.int64,
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    nodes,
    first_child,
    token,
    num_nodes: tl.int32,
    log_flows,
    flows_stride: tl.int64,
    node_stride: tl.int64,
    rows_per_flow: tl.int32,
    grad_logits,
    statistics,
    rows: tl.int64,
    steps: tl.int32,
    width: tl.int64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums: tl.constexpr = grad.dtype.element_ty
    index, row_exists = rows_of_program(rows, ROWS)
    batch, step = quotient_and_rest(index, steps)
    row = logits_row(logits, batch, step, batch_stride, step_stride)
    group, _ = quotient_and_rest(index, rows_per_flow)
    flows = log_flows + group * flows_stride
    slope = tl.load(
        logits_row(grad, batch, step, grad_batch_stride, grad_step_stride), mask=row_exists, other=0.0
    )
    first, end = children(tl.load(nodes + index, mask=row_exists, other=-1), first_child, num_nodes)
    peak, log_total, flow_peak, flow_log_total, end = normalisers(
        row, token_stride, flows, node_stride, first, end_of_choice(first, end), token, sums, BLOCK
    )
    out = (grad_logits + index * width)[:, None]
    for offset in range(0, most(first, end), BLOCK):
        child, tokens, exists = child_block(first + offset, end, token, BLOCK)
        values = child_logits(row, token_stride, tokens, exists, sums)
        targets = child_flows(flows, node_stride, child, exists)
        policy = tl.exp(values - peak[:, None] - log_total[:, None])
        target = tl.exp(targets - flow_peak[:, None] - flow_log_total[:, None])
        tl.store(out + tokens, slope[:, None] * (policy - target), mask=exists)
    if statistics is not None:
        divergence = divergence_of(
            row,
            token_stride,
            flows,
            node_stride,
            first,
            end,
            token,
            peak,
            log_total,
            flow_peak,
            flow_log_total,
            sums,
            BLOCK,
        )
        tl.store(statistics + index, slope, mask=row_exists)
        tl.store(statistics + rows + index, peak, mask=row_exists)
        tl.store(statistics + 2 * rows + index, log_total - divergence, mask=row_exists)
        tl.store(statistics + 3 * rows + index, flow_peak, mask=row_exists)
        tl.store(statistics + 4 * rows + index, flow_log_total, mask=row_exists)


@kernel
def _grad_flows(
    logits,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    token_stride: tl.int64,
    nodes,
    first_child,
    token,
    num_nodes: tl.int32,
    log_flows,
    flows_stride: tl.int64,
    node_stride: tl.int64,
    rows_per_flow: tl.int32,
    statistics,
    grad_flows,
    rows: tl.int64,
    steps: tl.int32,
    SHARING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the rows at one node that share their flows, in the program of the first of them.

    So each element of `grad_flows` has one writer and its sum one order. Other rows' programs end when they
    meet an earlier row at their node, which takes a look at `rows_per_flow` nodes at most.
    """
    sums: tl.constexpr = statistics.dtype.element_ty
    leader = tl.program_id(0).to(tl.int64)
    group, rank = quotient_and_rest(leader, rows_per_flow)
    group_end = leader - rank + rows_per_flow
    node = tl.load(nodes + leader)
    first, end = children(node, first_child, num_nodes)
    end = end_of_choice(first, end)
    earlier = leader - rank
    leads = first < end
    while leads & (earlier < leader):
        other = earlier + tl.arange(0, BLOCK)
        same = tl.load(nodes + other, mask=other < leader, other=-1) == node
        leads = tl.max(same.to(tl.int32), 0) == 0
        earlier += BLOCK
    if leads:
        flow_peak = tl.load(statistics + 3 * rows + leader)
        flow_log_total = tl.load(statistics + 4 * rows + leader)
        for begin in range(first, end, BLOCK):
            child = begin + tl.arange(0, BLOCK).to(tl.int64)
            exists = child < end
            tokens = tl.load(token + child, mask=exists, other=0).to(tl.int64)[None, :]
            flows = log_flows + group * flows_stride + child * node_stride
            log_target = tl.load(flows, mask=exists, other=float("-inf")) - flow_peak - flow_log_total
            carries = exists & (log_target != float("-inf"))
            log_target = tl.where(carries, log_target, 0.0)
            total = tl.zeros((BLOCK,), sums)
            for other_begin in range(leader, group_end, SHARING):
                other = other_begin + tl.arange(0, SHARING).to(tl.int64)
                same = tl.load(nodes + other, mask=other < group_end, other=-1) == node
                if tl.max(same.to(tl.int32), 0) > 0:
                    batch, step = quotient_and_rest(other, steps)
                    row = logits_row(logits, batch, step, batch_stride, step_stride)
                    slope = tl.load(statistics + other, mask=same, other=0.0)
                    peak = tl.load(statistics + rows + other, mask=same, other=0.0)
                    shift = tl.load(statistics + 2 * rows + other, mask=same, other=0.0)
                    reads = same[:, None] & carries[None, :]
                    values = child_logits(row, token_stride, tokens, reads, sums)
                    lost = tl.where(reads, values - peak[:, None] - shift[:, None], 0.0)
                    total += tl.sum(slope[:, None] * (log_target[None, :] - lost), 0)
            out = grad_flows + group * num_nodes + child
            tl.store(out, tl.exp(log_target) * total, mask=carries)


def flow_matching_backward(
    grad: Tensor,
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    log_flows: Tensor,
    needs_grad_flows: bool,
) -> tuple[Tensor, Tensor]:
    rows, nodes = nodes.numel(), nodes.contiguous()
    grad_logits = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    # What the second kernel needs of each row: its slope, two sums over logits and two over flows.
    statistics = log_flows.new_empty(5, rows) if needs_grad_flows else None
    inputs = (
        logits,
        *logits.stride(),
        nodes,
        first_child,
        token,
        token.numel(),
        *strided(log_flows, 2),
        rows // max(log_flows.shape[0], 1),
    )
    launch(
        _flow_matching_backward,
        rows,
        grad,
        *grad.stride(),
        *inputs,
        grad_logits,
        statistics,
        rows,
        *logits.shape[1:],
        **child_tile(max_children),
    )
    if statistics is None:
        return grad_logits, log_flows.new_empty(0)
    grad_flows = torch.zeros(log_flows.shape, dtype=log_flows.dtype, device=log_flows.device)
    launch(
        _grad_flows,
        rows,
        *inputs,
        statistics,
        grad_flows,
        rows,
        logits.shape[1],
        SHARING=SHARED_FLOWS_TILE.ROWS,
        BLOCK=SHARED_FLOWS_TILE.BLOCK,
        num_warps=SHARED_FLOWS_TILE.num_warps,
    )
    return grad_logits, grad_flows
