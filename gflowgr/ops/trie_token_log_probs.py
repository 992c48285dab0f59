"""Log-probs of given tokens under the forward policy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks, _filters
from gflowgr.ops._registry import register, resolve_backend


def trie_token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    trie: _checks.CatalogueTrie,
    *,
    start: int | Tensor = 0,
    item_filter: _checks.CatalogueFilter | None = None,
    backend: str = "auto",
) -> Tensor:
    """log P_F of each token of item paths: log_softmax over the children of the node before it.

    Reads the children's logits only, so it costs a few dozen loads a row whatever the vocabulary. What
    remains is the dense gradient of `logits`; `trie_linear_token_log_probs` does without that too.

    Args:
        logits: (..., T, V) float32, float64, bfloat16 or float16, any strides; `logits[..., t, :]` predicts
            `tokens[..., t]`.
        tokens: (..., T) integers. From the first -1 on (padding): log-prob 0, no gradient. A token that is
            not a child, and what follows it: log-prob -inf, gradient 0.
        trie: on the device of `logits`, tokens below V.
        start: the node before the first token, an int or integers (...).
        item_filter: row b filters all of `logits[b]`, which has three dimensions or more: log_softmax over
            the available children, and a token that leads to no available one is not a child.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., T) float32 (float64 for float64 logits), differentiable in `logits`. A forced token (an only
        available child) has log-prob exactly 0 and no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 2)
    tokens = _checks.integers("tokens", tokens, logits.shape[:-1])
    _checks.same_device("tokens", tokens, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    _checks.filter_for(item_filter, trie, logits, 3)
    start = _checks.start_nodes(start, tokens)
    backend = resolve_backend(backend, "trie_token_log_probs", logits.device)
    if backend == "torch":
        return reference.trie_token_log_probs(logits, tokens, trie, start, 0, item_filter)
    paths = _checks.as_paths(logits)
    log_probs = _token_log_probs(
        paths,
        tokens.reshape(paths.shape[:-1]),
        start.reshape(paths.shape[0]),
        trie.first_child,
        trie.token,
        trie.max_children,
        0,
        *_filters.arrays_of(item_filter),
        backend,
    )
    return _checks.in_shape(log_probs, tokens.shape)


def _fake(logits: Tensor, tokens: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(tokens.shape, dtype=reference.accumulation_dtype(logits.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_children, ctx.first_token, offsets, hidden, allowed, sets, ctx.backend = inputs
    ctx.save_for_backward(*tensors, offsets, hidden, allowed, sets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, tokens, start, first_child, token, *row_filter = ctx.saved_tensors
    grad_logits = token_log_probs_backward(
        *(grad, logits, tokens, start, first_child, token, ctx.max_children, ctx.first_token),
        *row_filter,
        ctx.backend,
    )
    return grad_logits, *[None] * 11


_token_log_probs = register(
    "trie_token_log_probs(Tensor logits, Tensor tokens, Tensor start, Tensor first_child, Tensor token, "
    f"int max_children, int first_token, {_filters.SCHEMA}, str backend) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
token_log_probs_backward = register(
    "trie_token_log_probs_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor start, "
    f"Tensor first_child, Tensor token, int max_children, int first_token, {_filters.SCHEMA}, "
    "str backend) -> Tensor",
    lambda grad, logits, *_: logits.new_empty(logits.shape),
)
