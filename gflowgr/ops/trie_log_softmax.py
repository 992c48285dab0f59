"""The forward policy as a dense distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks, _filters
from gflowgr.ops._registry import register, resolve_backend


def trie_log_softmax(
    logits: Tensor,
    nodes: Tensor,
    trie: _checks.CatalogueTrie,
    *,
    item_filter: _checks.CatalogueFilter | None = None,
    backend: str = "auto",
) -> Tensor:
    """log_softmax over the children of each row's node, -inf for every other token.

    For losses on given tokens, `trie_token_log_probs` does the same without the dense result.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides.
        nodes: (...) integers; a row at a leaf or at -1 comes out as -inf.
        trie: on the device of `logits`, tokens below V.
        item_filter: row b filters all of `logits[b]`: the log_softmax is over the available children.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., V) float32 (float64 for float64 logits), differentiable in `logits`. A node with one
        (available) child has log-prob exactly 0 there and no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 1)
    nodes = _checks.integers("nodes", nodes, logits.shape[:-1])
    _checks.same_device("nodes", nodes, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    _checks.filter_for(item_filter, trie, logits, 2)
    backend = resolve_backend(backend, "trie_log_softmax", logits.device)
    if backend == "torch":
        return reference.trie_log_softmax(logits, nodes, trie, item_filter)
    paths = _checks.as_paths(logits.unsqueeze(0) if logits.dim() == 1 else logits)
    out = _log_softmax(
        paths,
        nodes.reshape(paths.shape[:-1]),
        trie.first_child,
        trie.token,
        trie.max_children,
        *_filters.arrays_of(item_filter),
        backend,
    )
    return _checks.in_shape(out, logits.shape)


def _fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=reference.accumulation_dtype(logits.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, nodes, first_child, token, ctx.max_children, *row_filter, ctx.backend = inputs
    ctx.dtype = logits.dtype
    ctx.save_for_backward(output, nodes, first_child, token, *row_filter)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    log_probs, nodes, first_child, token, *row_filter = ctx.saved_tensors
    grad_logits = _log_softmax_backward(
        *(grad, log_probs, nodes, first_child, token, ctx.max_children, ctx.dtype),
        *row_filter,
        ctx.backend,
    )
    return grad_logits, *[None] * 9


_log_softmax = register(
    "trie_log_softmax(Tensor logits, Tensor nodes, Tensor first_child, Tensor token, int max_children, "
    f"{_filters.SCHEMA}, str backend) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_log_softmax_backward = register(
    "trie_log_softmax_backward(Tensor grad, Tensor log_probs, Tensor nodes, Tensor first_child, "
    f"Tensor token, int max_children, ScalarType dtype, {_filters.SCHEMA}, str backend) -> Tensor",
    lambda grad, log_probs, nodes, first_child, token, max_children, dtype, *_: grad.new_empty(
        grad.shape, dtype=dtype
    ),
)
