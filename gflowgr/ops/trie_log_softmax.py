"""The forward policy as a dense distribution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._registry import register, resolve_backend


def trie_log_softmax(
    logits: Tensor, nodes: Tensor, trie: _checks.CatalogueTrie, *, backend: str = "auto"
) -> Tensor:
    """log_softmax over the children of each row's node, -inf for every other token.

    For losses on given tokens, `trie_token_log_probs` does the same without the dense result.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides.
        nodes: (...) integers; a row at a leaf or at -1 comes out as -inf.
        trie: on the device of `logits`, tokens below V.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., V) float32 (float64 for float64 logits), differentiable in `logits`. A node with one child has
        log-prob exactly 0 there and no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 1)
    nodes = _checks.integers("nodes", nodes, logits.shape[:-1])
    _checks.same_device("nodes", nodes, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    backend = resolve_backend(backend, "trie_log_softmax", logits.device)
    if backend == "torch":
        return reference.trie_log_softmax(logits, nodes, trie)
    paths = _checks.as_paths(logits.unsqueeze(0) if logits.dim() == 1 else logits)
    out = _log_softmax(
        paths, nodes.reshape(paths.shape[:-1]), trie.first_child, trie.token, trie.max_children, backend
    )
    return _checks.in_shape(out, logits.shape)


def _fake(
    logits: Tensor, nodes: Tensor, first_child: Tensor, token: Tensor, max_children: int, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape, dtype=reference.accumulation_dtype(logits.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, nodes, first_child, token, ctx.max_children, ctx.backend = inputs
    ctx.dtype = logits.dtype
    ctx.save_for_backward(output, nodes, first_child, token)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = _log_softmax_backward(grad, *ctx.saved_tensors, ctx.max_children, ctx.dtype, ctx.backend)
    return grad_logits, None, None, None, None, None


_log_softmax = register(
    "trie_log_softmax(Tensor logits, Tensor nodes, Tensor first_child, Tensor token, int max_children, "
    "str backend) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
_log_softmax_backward = register(
    "trie_log_softmax_backward(Tensor grad, Tensor log_probs, Tensor nodes, Tensor first_child, "
    "Tensor token, int max_children, ScalarType dtype, str backend) -> Tensor",
    lambda grad, log_probs, nodes, first_child, token, max_children, dtype, backend: grad.new_empty(
        grad.shape, dtype=dtype
    ),
)
