"""One step of sampling under the forward policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks, _filters
from gflowgr.ops._registry import register, resolve_backend
from gflowgr.ops.trie_token_log_probs import token_log_probs_backward


def trie_sample(
    logits: Tensor,
    nodes: Tensor,
    trie: _checks.CatalogueTrie,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    item_filter: _checks.CatalogueFilter | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a child of each row's node from softmax(logits / temperature) over its children.

    One uniform number a row inverts the CDF, so a generator's seed fixes the draws whatever the number of
    threads, and backends agree but for rounding.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides.
        nodes: (...) integers.
        trie: on the device of `logits`, tokens below V.
        temperature: above 0.
        generator: of the device of `logits`; None takes the device's default one, as it must inside
            `torch.compile`, which knows no other.
        item_filter: row b filters all of `logits[b]`: draws and log-probs are over the available children.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        tokens int64 (...), nodes int64 (...) reached by them, and log_probs (...) float32 (float64 for
        float64): the draw's log-prob under the policy at temperature 1, whatever `temperature` drew it,
        differentiable in `logits`. A row with nothing to draw (a leaf, -1, or
        no available child) gives -1, -1 and 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, vocabulary or range.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 1)
    nodes = _checks.integers("nodes", nodes, logits.shape[:-1])
    _checks.same_device("nodes", nodes, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    _checks.filter_for(item_filter, trie, logits, 2)
    if not _checks.number("temperature", temperature) > 0:
        raise ValueError(f"temperature is {temperature}, needs a finite number above 0")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}, needs a torch.Generator or None")
    if generator is not None and generator.device.type != logits.device.type:
        raise ValueError(f"generator is of {generator.device}, needs {logits.device} like logits")
    backend = resolve_backend(backend, "trie_sample", logits.device)
    # The compiler knows no torch.rand that takes both a generator, even None, and a shape of any size.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    uniform = torch.rand(nodes.shape, device=logits.device, dtype=torch.float64, **source)
    if backend == "torch":
        return reference.trie_sample(logits, nodes, trie, uniform, temperature, item_filter)
    paths = _checks.as_paths(logits.unsqueeze(0) if logits.dim() == 1 else logits)
    rows = paths.shape[:-1]
    tokens, reached, log_probs = _sample(
        paths,
        nodes.reshape(rows),
        trie.first_child,
        trie.token,
        trie.max_children,
        uniform.reshape(rows),
        temperature,
        *_filters.arrays_of(item_filter),
        backend,
    )
    return (
        _checks.in_shape(tokens, nodes.shape),
        _checks.in_shape(reached, nodes.shape),
        _checks.in_shape(log_probs, nodes.shape),
    )


def _fake(logits: Tensor, nodes: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = logits.new_empty(nodes.shape, dtype=reference.accumulation_dtype(logits.dtype))
    return nodes.new_empty(nodes.shape), nodes.new_empty(nodes.shape), log_probs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, nodes, first_child, token, ctx.max_children, _, _, *row_filter, ctx.backend = inputs
    tokens, reached, _ = output
    ctx.mark_non_differentiable(tokens, reached)
    ctx.save_for_backward(logits, tokens, nodes, first_child, token, *row_filter)


def _backward(ctx: Any, grad_tokens: None, grad_nodes: None, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, tokens, nodes, first_child, token, *row_filter = ctx.saved_tensors
    # A draw is a path of one step, and its log-prob that of a given token.
    steps = logits.reshape(nodes.numel(), 1, logits.shape[-1])
    grad_logits = token_log_probs_backward(
        grad.reshape(-1, 1),
        steps,
        tokens.reshape(-1, 1),
        nodes.reshape(-1),
        first_child,
        token,
        ctx.max_children,
        0,
        *row_filter,
        ctx.backend,
    )
    return grad_logits.view(logits.shape), *[None] * 11


_sample = register(
    "trie_sample(Tensor logits, Tensor nodes, Tensor first_child, Tensor token, int max_children, "
    f"Tensor uniform, float temperature, {_filters.SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)",
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
