"""The C++ core's ops on CPU tensors: allocates results and hands over addresses, shapes and strides.

Shapes here are fixed: logits (B, T, V) with any strides, tokens and nodes (B, T) int64, start (B,) int64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr import _core
from gflowgr.ops._filters import NO_FILTER
from gflowgr.ops._memory import zeros
from gflowgr.reference import accumulation_dtype

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def _address(values: Tensor | None, dtype: torch.dtype) -> int:
    """Where contiguous values of that dtype lie on the CPU, 0 for none: the core believes what it is told."""
    if values is None:
        return 0
    if values.dtype != dtype or values.device.type != "cpu" or not values.is_contiguous():
        found = f"{values.dtype} on {values.device}, strides {tuple(values.stride())}"
        raise TypeError(f"an argument is {found}; the C++ core needs {dtype} on the CPU, contiguous")
    return values.data_ptr()


def _trie(first_child: Tensor, token: Tensor) -> tuple[int, int, int]:
    return _address(first_child, torch.int32), _address(token, torch.int32), token.numel()


def _items(first_item: Tensor, item_count: Tensor, item_order: Tensor, items: int) -> tuple[int, ...]:
    return (*(_address(array, torch.int32) for array in (first_item, item_count, item_order)), items)


def _filter(row_filter: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    offsets, hidden, allowed, allowed_set = row_filter or NO_FILTER
    if offsets is None:
        return (0,) * 6
    return (
        _address(offsets, torch.int64),
        _address(hidden, torch.int32),
        _address(allowed, torch.int32),
        _address(allowed_set, torch.int64),
        offsets.numel() - 1,
        0 if allowed is None else allowed.shape[1],
    )


def _logits(logits: Tensor, first_token: int = 0) -> tuple[int, ...]:
    if logits.device.type != "cpu" or logits.dtype not in _DTYPES:
        raise TypeError(f"logits are {logits.dtype} on {logits.device}, the C++ core needs floats on the CPU")
    return (logits.data_ptr(), _DTYPES[logits.dtype], *logits.shape, *logits.stride(), first_token)


def _sums(logits: Tensor, shape: torch.Size) -> Tensor:
    return logits.new_empty(shape, dtype=accumulation_dtype(logits.dtype))


def trie_walk(tokens: Tensor, start: Tensor, first_child: Tensor, token: Tensor) -> Tensor:
    tokens, start = tokens.contiguous(), start.contiguous()
    nodes = torch.empty_like(tokens)
    _core.walk(
        _trie(first_child, token),
        _address(tokens, torch.int64),
        _address(start, torch.int64),
        tokens.shape[0],
        tokens.shape[1],
        _address(nodes, torch.int64),
        torch.get_num_threads(),
    )
    return nodes


def trie_log_softmax(
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    *row_filter: Tensor | None,
) -> Tensor:
    nodes = nodes.contiguous()
    out = _sums(logits, logits.shape)
    _core.log_softmax(
        _trie(first_child, token),
        _filter(row_filter),
        _logits(logits),
        _address(nodes, torch.int64),
        _address(out, out.dtype),
        torch.get_num_threads(),
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
    *row_filter: Tensor | None,
) -> Tensor:
    if grad.dtype != accumulation_dtype(dtype):
        raise TypeError(f"grad is {grad.dtype}, needs {accumulation_dtype(dtype)} for logits in {dtype}")
    nodes, log_probs = nodes.contiguous(), log_probs.contiguous()
    grad_logits = zeros(grad.shape, dtype, grad.device)
    _core.log_softmax_backward(
        _trie(first_child, token),
        _filter(row_filter),
        _logits(grad),
        _DTYPES[dtype],
        _address(log_probs, accumulation_dtype(dtype)),
        _address(nodes, torch.int64),
        _address(grad_logits, grad_logits.dtype),
        torch.get_num_threads(),
    )
    return grad_logits


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
    nodes = nodes.contiguous()
    out = _sums(logits, torch.Size((*nodes.shape, width)))
    _core.child_log_probs(
        _trie(first_child, token),
        _filter(row_filter),
        _logits(logits, first_token),
        _address(nodes, torch.int64),
        width,
        _address(out, out.dtype),
        torch.get_num_threads(),
    )
    return out


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
    grad, nodes = grad.contiguous(), nodes.contiguous()
    grad_logits = zeros(logits.shape, logits.dtype, logits.device)
    _core.child_log_probs_backward(
        _trie(first_child, token),
        _filter(row_filter),
        _logits(logits, first_token),
        _address(nodes, torch.int64),
        width,
        _address(grad, accumulation_dtype(logits.dtype)),
        _address(grad_logits, grad_logits.dtype),
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
    *row_filter: Tensor | None,
) -> Tensor:
    tokens, start = tokens.contiguous(), start.contiguous()
    out = _sums(logits, tokens.shape)
    _core.token_log_probs(
        _trie(first_child, token),
        _filter(row_filter),
        _logits(logits, first_token),
        _address(tokens, torch.int64),
        _address(start, torch.int64),
        _address(out, out.dtype),
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
    *row_filter: Tensor | None,
) -> Tensor:
    grad, tokens, start = grad.contiguous(), tokens.contiguous(), start.contiguous()
    grad_logits = zeros(logits.shape, logits.dtype, logits.device)
    _core.token_log_probs_backward(
        _trie(first_child, token),
        _filter(row_filter),
        _logits(logits, first_token),
        _address(tokens, torch.int64),
        _address(start, torch.int64),
        _address(grad, accumulation_dtype(logits.dtype)),
        _address(grad_logits, grad_logits.dtype),
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
    *row_filter: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    nodes, uniform = nodes.contiguous(), uniform.contiguous()
    tokens, reached, log_probs = (
        torch.empty_like(nodes),
        torch.empty_like(nodes),
        _sums(logits, nodes.shape),
    )
    _core.sample(
        _trie(first_child, token),
        _filter(row_filter),
        _logits(logits),
        _address(nodes, torch.int64),
        _address(uniform, torch.float64),
        temperature,
        _address(tokens, torch.int64),
        _address(reached, torch.int64),
        _address(log_probs, log_probs.dtype),
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
        _address(log_probs, log_probs.dtype),
        _address(mask, torch.bool),
        log_probs.shape[0],
        log_probs.shape[1],
        tuple(_address(each, log_probs.dtype) for each in (log_rewards, log_z, weights, loss, residual)),
    )
    return loss, residual


def trajectory_balance_backward(grad_residual: Tensor, mask: Tensor | None, steps: int) -> Tensor:
    grad_residual = grad_residual.contiguous()
    mask = None if mask is None else mask.contiguous()
    grad_log_probs = grad_residual.new_empty(grad_residual.shape[0], steps)
    _core.trajectory_balance_backward(
        _DTYPES[grad_residual.dtype],
        _address(grad_residual, grad_residual.dtype),
        _address(mask, torch.bool),
        grad_residual.shape[0],
        steps,
        _address(grad_log_probs, grad_residual.dtype),
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
        _address(tokens, torch.int64),
        _address(start, torch.int64),
        tuple(
            _address(each, accumulation_dtype(logits.dtype))
            for each in (log_rewards, log_z, weights, loss, residual)
        ),
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
        _items(first_item, item_count, item_order, items),
        _DTYPES[log_rewards.dtype],
        _address(log_rewards, log_rewards.dtype),
        batch,
        _address(out, out.dtype),
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
        _items(first_item, item_count, item_order, items),
        _DTYPES[log_rewards.dtype],
        _address(grad, log_rewards.dtype),
        _address(log_rewards, log_rewards.dtype),
        _address(log_flows, log_rewards.dtype),
        batch,
        _address(grad_rewards, log_rewards.dtype),
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
        _address(nodes, torch.int64),
        _address(log_flows, accumulation_dtype(logits.dtype)),
        nodes.numel() // max(log_flows.shape[0], 1),
        _address(out, out.dtype),
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
        _address(nodes, torch.int64),
        _address(log_flows, accumulation_dtype(logits.dtype)),
        nodes.numel() // max(log_flows.shape[0], 1),
        _address(grad, accumulation_dtype(logits.dtype)),
        _address(grad_logits, grad_logits.dtype),
        _address(grad_flows if needs_grad_flows else None, log_flows.dtype),
        torch.get_num_threads(),
    )
    return grad_logits, grad_flows
