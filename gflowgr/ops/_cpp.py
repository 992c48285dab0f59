"""The C++ core's ops on CPU tensors: allocates results and hands over addresses, shapes and strides.

Shapes here are fixed: logits (B, T, V) with any strides, tokens and nodes (B, T) int64, start (B,) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr import _core
from gflowgr.ops._memory import zeros
from gflowgr.reference import accumulation_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _trie(first_child: Tensor, token: Tensor) -> tuple[int, int, int]:
    return first_child.data_ptr(), token.data_ptr(), token.numel()


def _logits(logits: Tensor, first_token: int = 0) -> tuple[int, ...]:
    return (logits.data_ptr(), _DTYPES[logits.dtype], *logits.shape, *logits.stride(), first_token)


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _sums(logits: Tensor, shape: torch.Size) -> Tensor:
    return torch.empty(shape, dtype=accumulation_dtype(logits.dtype))


def trie_walk(tokens: Tensor, start: Tensor, first_child: Tensor, token: Tensor) -> Tensor:
    tokens, start = tokens.contiguous(), start.contiguous()
    nodes = torch.empty_like(tokens)
    _core.walk(
        _trie(first_child, token),
        tokens.data_ptr(),
        start.data_ptr(),
        tokens.shape[0],
        tokens.shape[1],
        nodes.data_ptr(),
        torch.get_num_threads(),
    )
    return nodes


def trie_log_softmax(
    logits: Tensor, nodes: Tensor, first_child: Tensor, token: Tensor, max_children: int
) -> Tensor:
    nodes = nodes.contiguous()
    out = _sums(logits, logits.shape)
    _core.log_softmax(
        _trie(first_child, token), _logits(logits), nodes.data_ptr(), out.data_ptr(), torch.get_num_threads()
    )
    return out


def trie_log_softmax_backward(
    grad: Tensor,
    log_probs: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    dtype: torch.dtype,
) -> Tensor:
    nodes, log_probs = nodes.contiguous(), log_probs.contiguous()
    grad_logits = zeros(grad.shape, dtype, grad.device)
    _core.log_softmax_backward(
        _trie(first_child, token),
        _logits(grad),
        _DTYPES[dtype],
        log_probs.data_ptr(),
        nodes.data_ptr(),
        grad_logits.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_logits


def trie_token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    start: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    first_token: int,
) -> Tensor:
    tokens, start = tokens.contiguous(), start.contiguous()
    out = _sums(logits, tokens.shape)
    _core.token_log_probs(
        _trie(first_child, token),
        _logits(logits, first_token),
        tokens.data_ptr(),
        start.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def trie_token_log_probs_backward(
    grad: Tensor,
    logits: Tensor,
    tokens: Tensor,
    start: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    first_token: int,
) -> Tensor:
    grad, tokens, start = grad.contiguous(), tokens.contiguous(), start.contiguous()
    grad_logits = zeros(logits.shape, logits.dtype, logits.device)
    _core.token_log_probs_backward(
        _trie(first_child, token),
        _logits(logits, first_token),
        tokens.data_ptr(),
        start.data_ptr(),
        grad.data_ptr(),
        grad_logits.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_logits


def trie_sample(
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    uniform: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    nodes, uniform = nodes.contiguous(), uniform.contiguous()
    tokens, reached, log_probs = (
        torch.empty_like(nodes),
        torch.empty_like(nodes),
        _sums(logits, nodes.shape),
    )
    _core.sample(
        _trie(first_child, token),
        _logits(logits),
        nodes.data_ptr(),
        uniform.data_ptr(),
        temperature,
        tokens.data_ptr(),
        reached.data_ptr(),
        log_probs.data_ptr(),
        torch.get_num_threads(),
    )
    return tokens, reached, log_probs


def trajectory_balance(
    log_probs: Tensor, log_rewards: Tensor, log_z: Tensor, mask: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    log_probs, log_rewards, log_z = log_probs.contiguous(), log_rewards.contiguous(), log_z.contiguous()
    mask = None if mask is None else mask.contiguous()
    weights = None if weights is None else weights.contiguous()
    loss, residual = torch.empty_like(log_rewards), torch.empty_like(log_rewards)
    _core.trajectory_balance(
        _DTYPES[log_probs.dtype],
        log_probs.data_ptr(),
        _address(mask),
        log_probs.shape[0],
        log_probs.shape[1],
        (log_rewards.data_ptr(), log_z.data_ptr(), _address(weights), loss.data_ptr(), residual.data_ptr()),
    )
    return loss, residual


def trajectory_balance_backward(grad_residual: Tensor, mask: Tensor | None, steps: int) -> Tensor:
    grad_residual = grad_residual.contiguous()
    mask = None if mask is None else mask.contiguous()
    grad_log_probs = torch.empty(grad_residual.shape[0], steps, dtype=grad_residual.dtype)
    _core.trajectory_balance_backward(
        _DTYPES[grad_residual.dtype],
        grad_residual.data_ptr(),
        _address(mask),
        grad_residual.shape[0],
        steps,
        grad_log_probs.data_ptr(),
    )
    return grad_log_probs


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
    tokens, start = tokens.contiguous(), start.contiguous()
    log_rewards, log_z = log_rewards.contiguous(), log_z.contiguous()
    weights = None if weights is None else weights.contiguous()
    loss, residual = torch.empty_like(log_rewards), torch.empty_like(log_rewards)
    _core.trie_trajectory_balance(
        _trie(first_child, token),
        _logits(logits),
        tokens.data_ptr(),
        start.data_ptr(),
        (log_rewards.data_ptr(), log_z.data_ptr(), _address(weights), loss.data_ptr(), residual.data_ptr()),
        torch.get_num_threads(),
    )
    return loss, residual


def trie_log_flows(
    log_rewards: Tensor,
    first_child: Tensor,
    token: Tensor,
    first_item: Tensor,
    item_count: Tensor,
    item_order: Tensor,
) -> Tensor:
    log_rewards = log_rewards.contiguous()
    batch, items = log_rewards.shape
    out = log_rewards.new_empty(batch, token.numel())
    _core.log_flows(
        _trie(first_child, token),
        (first_item.data_ptr(), item_count.data_ptr(), item_order.data_ptr(), items),
        _DTYPES[log_rewards.dtype],
        log_rewards.data_ptr(),
        batch,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


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
    grad, log_rewards, log_flows = grad.contiguous(), log_rewards.contiguous(), log_flows.contiguous()
    batch, items = log_rewards.shape
    grad_rewards = torch.empty_like(log_rewards)
    _core.log_flows_backward(
        _trie(first_child, token),
        (first_item.data_ptr(), item_count.data_ptr(), item_order.data_ptr(), items),
        _DTYPES[log_rewards.dtype],
        grad.data_ptr(),
        log_rewards.data_ptr(),
        log_flows.data_ptr(),
        batch,
        grad_rewards.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_rewards


def flow_matching(
    logits: Tensor, nodes: Tensor, first_child: Tensor, token: Tensor, max_children: int, log_flows: Tensor
) -> Tensor:
    nodes, log_flows = nodes.contiguous(), log_flows.contiguous()
    out = _sums(logits, nodes.shape)
    _core.flow_matching(
        _trie(first_child, token),
        _logits(logits),
        nodes.data_ptr(),
        log_flows.data_ptr(),
        nodes.numel() // max(log_flows.shape[0], 1),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


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
    grad, nodes, log_flows = grad.contiguous(), nodes.contiguous(), log_flows.contiguous()
    grad_logits = zeros(logits.shape, logits.dtype, logits.device)
    shape = log_flows.shape if needs_grad_flows else torch.Size((0,))
    grad_flows = zeros(shape, log_flows.dtype, log_flows.device)
    _core.flow_matching_backward(
        _trie(first_child, token),
        _logits(logits),
        nodes.data_ptr(),
        log_flows.data_ptr(),
        nodes.numel() // max(log_flows.shape[0], 1),
        grad.data_ptr(),
        grad_logits.data_ptr(),
        _address(grad_flows if needs_grad_flows else None),
        torch.get_num_threads(),
    )
    return grad_logits, grad_flows
