"""Log-probs of given tokens from hidden states and the head's weight: its rows of the trie, no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._memory import zeros
from gflowgr.ops._registry import kernels_of, register, resolve_backend
from gflowgr.ops.trie_walk import trie_walk


def trie_linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    trie: _checks.CatalogueTrie,
    bias: Tensor | None = None,
    *,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
    sparse_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`trie_token_log_probs` from hidden states and the head's weight, without the (..., T, V) logits.

    Each depth multiplies by the rows of its own token range only: with disjoint codebooks a depth costs its
    codebook's size, not the vocabulary's. Nothing is kept for the backward pass, which multiplies again. On
    the CPU, forced steps are left out of both passes. Prefer this to `trie_token_log_probs` wherever the loss
    is the head's only reader.

    Args:
        hidden: (..., T, D); `hidden[..., t, :]` predicts `tokens[..., t]`.
        weight: (V, D), the head, of the dtype of `hidden` (under autocast any). It may be tied to the
            embeddings.
        tokens: (..., T) integers, as in `trie_token_log_probs`.
        trie: on the device of `hidden`, tokens from `first_token` to below `first_token` + V.
        bias: (V,) of that dtype, or None.
        first_token: the token of the first row of `weight`, when that is a part of a head: its rows of the
            trie's tokens, or those rows with an adapter's low-rank product added.
        scale: what the head's product is multiplied by.
        softcap: c in c * tanh(logits / c), above 0, or None.
        sparse_grad: gives `weight` and `bias` a sparse gradient of the trie's rows, which SGD, SparseAdam
            and accumulation take, and which holds V / (rows of the trie) times less. Not by "torch".
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        (..., T) float32 (float64 for float64), differentiable in `hidden`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, vocabulary or range.
        RuntimeError: `backend` cannot serve here.
    """
    hidden = _checks.floats("hidden", hidden, 2)
    weight = _checks.floats("weight", weight, 2)
    _checks.shaped("weight", weight, torch.Size((weight.shape[0], hidden.shape[-1])))
    if bias is not None:
        _checks.shaped("bias", _checks.floats("bias", bias, 1), weight.shape[:1])
    kind = hidden.device.type
    # Older compilers cannot trace the first question, whose answer is yes wherever they compile.
    known = torch.compiler.is_dynamo_compiling() or torch.amp.is_autocast_available(kind)
    autocast = known and torch.is_autocast_enabled(kind)
    if autocast and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    else:
        _checks.same_dtype("weight", weight, hidden.dtype)
        _checks.same_dtype("bias", weight if bias is None else bias, hidden.dtype)
    tokens = _checks.integers("tokens", tokens, hidden.shape[:-1])
    for name, value in (("tokens", tokens), ("weight", weight), ("bias", weight if bias is None else bias)):
        _checks.same_device(name, value, hidden.device)
    first_token = _checks.at_least("first_token", first_token, 0)
    _checks.trie_for(trie, hidden.device, first_token + weight.shape[0])
    if trie.token_ranges and min(low for low, _ in trie.token_ranges) < first_token:
        raise ValueError(
            f"first_token is {first_token}, needs at most the trie's smallest token, "
            f"{min(low for low, _ in trie.token_ranges)}"
        )
    _checks.number("scale", scale)
    if softcap is not None and not _checks.number("softcap", softcap) > 0:
        raise ValueError(f"softcap is {softcap}, needs a finite number above 0, or None")
    backend = resolve_backend(backend, "trie_linear_token_log_probs", hidden.device)
    if backend == "torch":
        if sparse_grad:
            raise ValueError("sparse_grad is True, needs the backend cpp or triton, not torch")
        start = _checks.start_nodes(0, tokens)
        return reference.trie_linear_token_log_probs(
            hidden, weight, tokens, trie, bias, start, first_token, scale, softcap
        )
    rows = hidden.shape[:-2].numel()
    log_probs = _linear(
        hidden.reshape(rows, *hidden.shape[-2:]),
        weight,
        bias,
        tokens.reshape(rows, tokens.shape[-1]),
        trie_walk(tokens, trie).reshape(rows, tokens.shape[-1]),
        trie.first_child,
        trie.narrow_token,
        trie.max_children,
        [low for low, _ in trie.token_ranges],
        [high for _, high in trie.token_ranges],
        first_token,
        float(scale),
        softcap,
        sparse_grad,
        backend,
    )
    return _checks.in_shape(log_probs, tokens.shape)


class _Step(NamedTuple):
    """One depth: the rows that choose there, from which nodes, and the head's rows that they choose from."""

    depth: int
    rows: Tensor | slice
    chooses: Tensor | None
    tokens: Tensor
    start: Tensor
    head: slice
    low: int


def _steps(
    tokens: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    lowest: Sequence[int],
    highest: Sequence[int],
    first_token: int,
    backend: str,
) -> Iterator[_Step]:
    before = torch.cat([torch.zeros_like(nodes[:, :1]), nodes[:, :-1]], 1)
    inner = before.clamp(min=0)
    chooses = (nodes >= 0) & (first_child[inner + 1] - first_child[inner] > 1)
    wanted = torch.where(nodes >= 0, tokens, -1)
    for depth in range(min(tokens.shape[1], len(lowest))):
        # How many rows choose is known to the host for the CPU alone. Elsewhere all rows come along, with
        # zeros for the states that do not count.
        here = chooses[:, depth]
        rows, mask = (
            (here.nonzero().squeeze(1), None) if backend == "cpp" else (slice(None), here.unsqueeze(1))
        )
        head, low = slice(lowest[depth] - first_token, highest[depth] + 1 - first_token), lowest[depth]
        yield _Step(depth, rows, mask, wanted[rows, depth : depth + 1], before[rows, depth], head, low)


def _head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, step: _Step, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """States (n, D) and head (W, D) of a depth, and their logits (n, W)."""
    states, head = hidden[step.rows, step.depth], weight[step.head].to(hidden.dtype)
    states = states if step.chooses is None else torch.where(step.chooses, states, 0.0)
    logits = F.linear(states, head, None if bias is None else bias[step.head].to(hidden.dtype))
    return states, head, reference.scaled_and_capped(logits, scale, softcap)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    lowest: Sequence[int],
    highest: Sequence[int],
    first_token: int,
    scale: float,
    softcap: float | None,
    sparse_grad: bool,
    backend: str,
) -> Tensor:
    log_probs = hidden.new_zeros(tokens.shape, dtype=reference.accumulation_dtype(hidden.dtype))
    padding = (tokens < 0).long().cumsum(-1) > 0
    log_probs.masked_fill_((nodes < 0) & ~padding, -torch.inf)
    kernels = kernels_of(backend)
    for step in _steps(tokens, nodes, first_child, lowest, highest, first_token, backend):
        _, _, logits = _head(hidden, weight, bias, step, scale, softcap)
        chosen = kernels.trie_token_log_probs(
            logits.unsqueeze(1), step.tokens, step.start, first_child, token, max_children, step.low
        ).squeeze(1)
        if backend != "cpp":
            on_path = nodes[:, step.depth] >= 0
            chosen = torch.where(on_path, chosen, log_probs[:, step.depth])
        log_probs[step.rows, step.depth] = chosen
    return log_probs


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    lowest: Sequence[int],
    highest: Sequence[int],
    first_token: int,
    scale: float,
    softcap: float | None,
    sparse_grad: bool,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    base, size = _rows_of(lowest, highest, first_token) if sparse_grad else (0, weight.shape[0])
    nothing, device = torch.Size((0,)), hidden.device
    width = torch.Size((size, weight.shape[1]))
    grad_hidden = zeros(hidden.shape if needed[0] else nothing, hidden.dtype, device)
    grad_weight = zeros(width if needed[1] else nothing, weight.dtype, device, few=True)
    grad_bias = zeros(
        width[:1] if needed[2] else nothing, weight.dtype if bias is None else bias.dtype, device
    )
    kernels = kernels_of(backend)
    for step in _steps(tokens, nodes, first_child, lowest, highest, first_token, backend):
        states, head, logits = _head(hidden, weight, bias, step, scale, softcap)
        grad_logits = kernels.trie_token_log_probs_backward(
            grad[step.rows, step.depth].unsqueeze(1),
            logits.unsqueeze(1),
            step.tokens,
            step.start,
            first_child,
            token,
            max_children,
            step.low,
        ).squeeze(1)
        if softcap is not None:
            grad_logits = grad_logits * (1 - (logits / softcap).square())
        if scale != 1:
            grad_logits = grad_logits * scale
        own = slice(step.head.start - base, step.head.stop - base)
        if needed[0]:
            grad_hidden[step.rows, step.depth] = grad_logits @ head
        if needed[1]:
            grad_weight[own] += grad_logits.T @ states
        if needed[2]:
            grad_bias[own] += grad_logits.sum(0)
    return grad_hidden, grad_weight, grad_bias


def _rows_of(lowest: Sequence[int], highest: Sequence[int], first_token: int) -> tuple[int, int]:
    """The first row of the head that the trie has a token for, and how many there are up to the last."""
    return min(lowest) - first_token, max(highest) + 1 - min(lowest)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.settings = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, needed = ctx.saved_tensors[1], ctx.needs_input_grad[:3]
    *settings, backend = ctx.settings
    _, lowest, highest, first_token, _, _, sparse_grad = settings
    found = _linear_backward(grad, *ctx.saved_tensors, *settings, list(needed), backend)
    gradients: list[Tensor | None] = [g if need else None for g, need in zip(found, needed, strict=True)]
    if sparse_grad:
        base, size = _rows_of(lowest, highest, first_token)
        rows = torch.arange(base, base + size, device=weight.device).unsqueeze(0)
        for index, shape in ((1, weight.shape), (2, weight.shape[:1])):
            values = gradients[index]
            if values is not None:
                gradients[index] = torch.sparse_coo_tensor(
                    rows, values, shape, is_coalesced=True, check_invariants=False
                )
    return *gradients, *[None] * (4 + len(ctx.settings))


def _fake_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    lowest, highest, first_token, _, _, sparse_grad, needed, _ = rest[-8:]
    size = _rows_of(lowest, highest, first_token)[1] if sparse_grad else weight.shape[0]
    return (
        hidden.new_empty(hidden.shape if needed[0] else (0,)),
        weight.new_empty((size, weight.shape[1]) if needed[1] else (0,)),
        (weight if bias is None else bias).new_empty((size,) if needed[2] else (0,)),
    )


_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor nodes, Tensor first_child, "
    "Tensor token, int max_children, int[] lowest, int[] highest, int first_token, float scale, "
    "float? softcap, bool sparse_grad"
)
_linear = register(
    f"trie_linear_token_log_probs({_ARGUMENTS}, str backend) -> Tensor",
    lambda hidden, weight, bias, tokens, *_: hidden.new_empty(
        tokens.shape, dtype=reference.accumulation_dtype(hidden.dtype)
    ),
    implementation=_forward,
    setup_context=_setup_context,
    backward=_gradients,
)
_linear_backward = register(
    f"trie_linear_token_log_probs_backward(Tensor grad, {_ARGUMENTS}, bool[] needed, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _fake_backward,
    implementation=_backward,
)
