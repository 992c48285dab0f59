"""Log-probs of given tokens under the forward policy, from logits or from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._registry import register, register_composite, resolve_backend
from gflowgr.ops.trie_walk import trie_walk


def trie_token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    trie: _checks.CatalogueTrie,
    *,
    start: int | Tensor = 0,
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
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., T) float32 (float64 for float64 logits), differentiable in `logits`. A forced token (an only
        child) has log-prob exactly 0 and no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 2)
    tokens = _checks.integers("tokens", tokens, logits.shape[:-1])
    _checks.same_device("tokens", tokens, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    start = _checks.start_nodes(start, tokens)
    backend = resolve_backend(backend, "trie_token_log_probs", logits.device)
    if backend == "torch":
        return reference.trie_token_log_probs(logits, tokens, trie, start)
    paths = _checks.as_paths(logits)
    return torch.ops.gflowgr.trie_token_log_probs(
        paths,
        tokens.reshape(paths.shape[:-1]),
        start.reshape(paths.shape[0]),
        trie.first_child,
        trie.token,
        trie.max_children,
        0,
        backend,
    ).view(tokens.shape)


def trie_linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    trie: _checks.CatalogueTrie,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """`trie_token_log_probs` from hidden states and the head's weight, without the (..., T, V) logits.

    Each depth multiplies by the rows of its own token range only: with disjoint codebooks a depth costs its
    codebook's size, not the vocabulary's.

    Args:
        hidden: (..., T, D); `hidden[..., t, :]` predicts `tokens[..., t]`.
        weight: (V, D), the head, of the dtype of `hidden` (under autocast any).
        tokens: (..., T) integers, as in `trie_token_log_probs`.
        trie: on the device of `hidden`, tokens below V.
        bias: (V,) of that dtype, or None.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., T) float32 (float64 for float64), differentiable in `hidden`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary.
        RuntimeError: `backend` cannot serve here.
    """
    hidden = _checks.floats("hidden", hidden, 2)
    weight = _checks.floats("weight", weight, 2)
    _checks.shaped("weight", weight, torch.Size((weight.shape[0], hidden.shape[-1])))
    if bias is not None:
        _checks.shaped("bias", _checks.floats("bias", bias, 1), weight.shape[:1])
    kind = hidden.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        _checks.same_dtype("weight", weight, hidden.dtype)
        _checks.same_dtype("bias", weight if bias is None else bias, hidden.dtype)
    tokens = _checks.integers("tokens", tokens, hidden.shape[:-1])
    for name, value in (("tokens", tokens), ("weight", weight), ("bias", weight if bias is None else bias)):
        _checks.same_device(name, value, hidden.device)
    _checks.trie_for(trie, hidden.device, weight.shape[0])
    start = _checks.start_nodes(0, tokens)
    backend = resolve_backend(backend, "trie_token_log_probs", hidden.device)
    if backend == "torch":
        return reference.trie_linear_token_log_probs(hidden, weight, tokens, trie, bias, start)
    rows = hidden.shape[:-2].numel()
    return torch.ops.gflowgr.trie_linear_token_log_probs(
        hidden.reshape(rows, *hidden.shape[-2:]),
        weight,
        tokens.reshape(rows, tokens.shape[-1]),
        bias,
        trie_walk(tokens, trie).reshape(rows, tokens.shape[-1]),
        trie.first_child,
        trie.token,
        trie.max_children,
        [low for low, _ in trie.token_ranges],
        [high for _, high in trie.token_ranges],
        backend,
    ).view(tokens.shape)


def _sliced_head(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    lowest: Sequence[int],
    highest: Sequence[int],
    backend: str,
) -> Tensor:
    padding = (tokens < 0).long().cumsum(-1) > 0
    tokens = torch.where(padding, -1, tokens)
    # One slice of the weight that every depth slices again: its gradient is made once, not once a depth.
    base, size = min(lowest), max(highest) + 1 - min(lowest)
    weight = weight.narrow(0, base, size)
    bias = None if bias is None else bias.narrow(0, base, size)
    log_probs: list[Tensor] = []
    for depth in range(tokens.shape[1]):
        if depth >= len(lowest):
            log_probs.append(torch.where(padding[:, depth], 0.0, -torch.inf).to(log_probs[0].dtype))
            continue
        low, width = lowest[depth], highest[depth] + 1 - lowest[depth]
        logits = F.linear(
            hidden[:, depth],
            weight.narrow(0, low - base, width),
            None if bias is None else bias.narrow(0, low - base, width),
        )
        start = nodes[:, depth - 1] if depth else torch.zeros_like(nodes[:, 0])
        step = torch.ops.gflowgr.trie_token_log_probs(
            logits.unsqueeze(1),
            tokens[:, depth : depth + 1],
            start,
            first_child,
            token,
            max_children,
            low,
            backend,
        )
        log_probs.append(step.squeeze(1))
    if not log_probs:
        # No step, no element: only the ties that autograd looks for.
        return F.linear(hidden, weight, bias).sum(-1).to(reference.accumulation_dtype(hidden.dtype))
    return torch.stack(log_probs, 1)


def _fake(
    logits: Tensor,
    tokens: Tensor,
    start: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    first_token: int,
    backend: str,
) -> Tensor:
    return logits.new_empty(tokens.shape, dtype=reference.accumulation_dtype(logits.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_children, ctx.first_token, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_logits = torch.ops.gflowgr.trie_token_log_probs_backward(
        grad, *ctx.saved_tensors, ctx.max_children, ctx.first_token, ctx.backend
    )
    return grad_logits, None, None, None, None, None, None, None


register(
    "trie_token_log_probs(Tensor logits, Tensor tokens, Tensor start, Tensor first_child, Tensor token, "
    "int max_children, int first_token, str backend) -> Tensor",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
register(
    "trie_token_log_probs_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor start, "
    "Tensor first_child, Tensor token, int max_children, int first_token, str backend) -> Tensor",
    lambda grad, logits, *_: logits.new_empty(logits.shape),
)
register_composite(
    "trie_linear_token_log_probs(Tensor hidden, Tensor weight, Tensor tokens, Tensor? bias, Tensor nodes, "
    "Tensor first_child, Tensor token, int max_children, int[] lowest, int[] highest, str backend) -> Tensor",
    _sliced_head,
)
