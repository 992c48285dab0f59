"""Flows of a tree in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._registry import register, resolve_backend


def trie_log_flows(log_rewards: Tensor, trie: _checks.CatalogueTrie, *, backend: str = "auto") -> Tensor:
    """log F(s) for every node s: the log of the summed rewards of the items at or under it.

    On a tree the flows that satisfy flow matching are known in closed form (Bengio et al. 2021, section 2);
    `[..., 0]`, the root's, is log Z.

    Args:
        log_rewards: (..., N) floats, column i belongs to item i; -inf is no reward.
        trie: of N items, on the device of `log_rewards`.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., num_nodes) float32 (float64 for float64), differentiable in `log_rewards`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
        RuntimeError: `backend` cannot serve here.
    """
    log_rewards = _checks.floats("log_rewards", log_rewards, 1)
    _checks.trie_for(trie, log_rewards.device)
    shape = log_rewards.shape
    _checks.shaped("log_rewards", log_rewards, torch.Size((*shape[:-1], trie.num_items)))
    log_rewards = log_rewards.to(reference.accumulation_dtype(log_rewards.dtype))
    backend = resolve_backend(backend, "trie_log_flows", log_rewards.device)
    if backend == "torch":
        return reference.trie_log_flows(log_rewards, trie)
    flows = _log_flows(
        log_rewards.reshape(shape[:-1].numel(), shape[-1]),
        trie.first_child,
        trie.narrow_token,
        trie.first_item,
        trie.item_count,
        trie.item_order,
        backend,
    )
    return flows.view(*shape[:-1], trie.num_nodes)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    log_rewards, *arrays, ctx.backend = inputs
    ctx.save_for_backward(log_rewards, output, *arrays)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_rewards = _log_flows_backward(grad, *ctx.saved_tensors, ctx.backend)
    return grad_rewards, None, None, None, None, None, None


_log_flows = register(
    "trie_log_flows(Tensor log_rewards, Tensor first_child, Tensor token, Tensor first_item, "
    "Tensor item_count, Tensor item_order, str backend) -> Tensor",
    lambda log_rewards, first_child, token, *_: log_rewards.new_empty(log_rewards.shape[0], token.shape[0]),
    setup_context=_setup_context,
    backward=_backward,
)
_log_flows_backward = register(
    "trie_log_flows_backward(Tensor grad, Tensor log_rewards, Tensor log_flows, Tensor first_child, "
    "Tensor token, Tensor first_item, Tensor item_count, Tensor item_order, str backend) -> Tensor",
    lambda grad, log_rewards, *_: log_rewards.new_empty(log_rewards.shape),
)
