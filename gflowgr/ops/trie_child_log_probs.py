"""The forward policy over the children of nodes, one column a child."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks, _filters
from gflowgr.ops._registry import register, resolve_backend


def trie_child_log_probs(
    logits: Tensor,
    nodes: Tensor,
    trie: _checks.CatalogueTrie,
    *,
    item_filter: _checks.CatalogueFilter | None = None,
    first_token: int = 0,
    width: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """log P_F of the i-th child of each row's node, child i being the node `trie.first_child[node] + i`.

    What `trie_log_softmax` gives, without a column for the tokens that no child has.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides. Column c belongs to the token
            `first_token + c`; a child whose token has no column is not available.
        nodes: (...) integers; a row at a leaf or at -1 comes out as -inf.
        trie: on the device of `logits`.
        item_filter: row b filters all of `logits[b]`; the policy is over the available children.
        first_token: the token of the first column, as a head that is sliced to one depth's
            `trie.token_ranges` has it.
        width: columns of the result, `trie.max_children` by default. Children beyond it are left out of the
            result, not of the policy.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., width) float32 (float64 for float64 logits), differentiable in `logits`; -inf beyond the last
        child and for children that are not available. An only available child has log-prob exactly 0 and no
        gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, range or columns.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 1)
    nodes = _checks.integers("nodes", nodes, logits.shape[:-1])
    _checks.same_device("nodes", nodes, logits.device)
    _checks.trie_for(trie, logits.device)
    _checks.columns_for(trie, first_token, logits.shape[-1])
    _checks.filter_for(item_filter, trie, logits, 2)
    width = trie.max_children if width is None else _checks.at_least("width", width, 1)
    backend = resolve_backend(backend, "trie_child_log_probs", logits.device)
    if backend == "torch":
        return reference.trie_child_log_probs(logits, nodes, trie, first_token, width, item_filter)
    paths = _checks.as_paths(logits.unsqueeze(0) if logits.dim() == 1 else logits)
    log_probs = _child_log_probs(
        paths,
        nodes.reshape(paths.shape[:-1]),
        trie.first_child,
        trie.token,
        trie.max_children,
        first_token,
        width,
        *_filters.arrays_of(item_filter),
        backend,
    )
    return _checks.in_shape(log_probs, torch.Size((*nodes.shape, width)))


def _fake(logits: Tensor, nodes: Tensor, *rest: Any) -> Tensor:
    _, _, _, _, width, *_ = rest
    return logits.new_empty((*nodes.shape, width), dtype=reference.accumulation_dtype(logits.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_children, ctx.first_token, ctx.width, offsets, hidden, allowed, sets, ctx.backend = (
        inputs
    )
    ctx.save_for_backward(*tensors, offsets, hidden, allowed, sets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, nodes, first_child, token, *row_filter = ctx.saved_tensors
    numbers = (ctx.max_children, ctx.first_token, ctx.width)
    grad_logits = _child_log_probs_backward(
        grad, logits, nodes, first_child, token, *numbers, *row_filter, ctx.backend
    )
    return grad_logits, *[None] * 11


_ARGUMENTS = (
    "Tensor logits, Tensor nodes, Tensor first_child, Tensor token, int max_children, int first_token, "
    f"int width, {_filters.SCHEMA}, str backend"
)
_child_log_probs = register(
    f"trie_child_log_probs({_ARGUMENTS}) -> Tensor", _fake, setup_context=_setup_context, backward=_backward
)
_child_log_probs_backward = register(
    f"trie_child_log_probs_backward(Tensor grad, {_ARGUMENTS}) -> Tensor",
    lambda grad, logits, *_: logits.new_empty(logits.shape),
)
