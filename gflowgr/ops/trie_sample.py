"""One step of sampling under the forward policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks, _filters
from gflowgr.ops._item_ranks import ItemRanks
from gflowgr.ops._random import uniform as seeded_uniform
from gflowgr.ops._registry import register, resolve_backend
from gflowgr.ops.behaviour import Behaviour, draw_children, proposal_log_probs
from gflowgr.ops.trie_child_log_probs import trie_child_log_probs
from gflowgr.ops.trie_token_log_probs import token_log_probs_backward


def trie_sample(
    logits: Tensor,
    nodes: Tensor,
    trie: _checks.CatalogueTrie,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    epsilon: float = 0.0,
    epsilon_over: str = "children",
    generator: torch.Generator | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    item_filter: _checks.CatalogueFilter | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a child of each row's node from softmax(logits / temperature) over its children.

    One uniform number a row inverts the CDF, so a generator's seed fixes the draws whatever the number of
    threads, and backends agree but for rounding. Without `top_k`, `top_p` and `epsilon` a step is one kernel.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides.
        nodes: (...) integers.
        trie: on the device of `logits`, tokens below V.
        temperature: above 0.
        top_k, top_p, epsilon, epsilon_over: as in `gflowgr.ops.behaviour.Behaviour`.
        generator: of the device of `logits`; None takes the device's default one, as it must inside
            `torch.compile`, which knows no other.
        seeds: integers of the shape of `nodes`, or of its first axes, in place of a generator. A draw is then
            a function of its row's logits and node, of the seed, the step and, where one seed serves several
            rows, the row's place among them; nothing else in the batch matters.
        step: the number of the step in its trajectory, so that a seed serves all of them.
        item_filter: row b filters all of `logits[b]`: draws and log-probs are over the available children.
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        tokens int64 (...), nodes int64 (...) reached by them, and log_probs (...) float32 (float64 for
        float64): the draw's log-prob under the policy at temperature 1, whatever drew it, differentiable in
        `logits`. What it was drawn with is `proposal_log_probs` of `gflowgr.ops.behaviour`, applied to
        `trie_child_log_probs`, at the place `node reached - trie.first_child[node]`.
        A row with nothing to draw (a leaf, -1, or no available child) gives -1, -1 and 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device, vocabulary or range.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 1)
    nodes = _checks.integers("nodes", nodes, logits.shape[:-1])
    _checks.same_device("nodes", nodes, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    _checks.filter_for(item_filter, trie, logits, 2)
    behaviour = Behaviour(temperature, top_k, top_p, epsilon, epsilon_over)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is a {type(generator).__name__}, needs a torch.Generator or None")
    if generator is not None and generator.device.type != logits.device.type:
        raise ValueError(f"generator is of {generator.device}, needs {logits.device} like logits")
    if generator is not None and seeds is not None:
        raise ValueError("generator and seeds are both given, needs one of them")
    # The compiler knows no torch.rand that takes both a generator, even None, and a shape of any size.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    uniform = (
        torch.rand(nodes.shape, device=logits.device, dtype=torch.float64, **source)
        if seeds is None
        else _seeded(seeds, nodes, step)
    )
    if behaviour.truncates or behaviour.epsilon:
        return _by_behaviour(logits, nodes, trie, uniform, behaviour, item_filter, backend)
    backend = resolve_backend(backend, "trie_sample", logits.device)
    if backend == "torch":
        return reference.trie_sample(logits, nodes, trie, uniform, temperature, item_filter)
    paths = _checks.as_paths(logits.unsqueeze(0) if logits.dim() == 1 else logits)
    rows = paths.shape[:-1]
    tokens, reached, log_probs = _sample(
        paths,
        nodes.reshape(rows),
        trie.first_child,
        trie.narrow_token,
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


def _seeded(seeds: Tensor, nodes: Tensor, step: int) -> Tensor:
    """A number in [0, 1) for each node, by the seed of its row and its place in it."""
    shape = _checks.tensor("seeds", seeds).shape
    if shape != nodes.shape[: len(shape)]:
        raise ValueError(f"seeds has shape {tuple(shape)}, needs {tuple(nodes.shape)} or its first axes")
    seeds = _checks.integers("seeds", seeds, shape)
    _checks.same_device("seeds", seeds, nodes.device)
    rest = nodes.shape[len(shape) :]
    place = torch.arange(rest.numel(), device=nodes.device).view(rest)
    return seeded_uniform(seeds.view(*shape, *[1] * len(rest)), _checks.at_least("step", step, 0), place)


def _by_behaviour(
    logits: Tensor,
    nodes: Tensor,
    trie: _checks.CatalogueTrie,
    uniform: Tensor,
    behaviour: Behaviour,
    item_filter: _checks.CatalogueFilter | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = trie_child_log_probs(logits, nodes, trie, item_filter=item_filter, backend=backend)
    first, _ = reference.child_range(nodes, trie)
    item_count = None
    if behaviour.counts_items:
        child = first.unsqueeze(-1) + torch.arange(log_probs.shape[-1], device=first.device)
        child = child.clamp(max=trie.num_nodes - 1)
        begin, end = ItemRanks(trie, item_filter).under(child.flatten(1) if child.dim() > 2 else child)
        item_count = (end - begin).view(child.shape)
    drawn = draw_children(proposal_log_probs(log_probs.detach(), behaviour, item_count), uniform)
    alive = (log_probs != -torch.inf).any(-1)
    reached = torch.where(alive, first + drawn, -1)
    tokens = reference.token_of(reached.clamp(min=0), trie)
    chosen = log_probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
    return torch.where(alive, tokens, -1), reached, torch.where(alive, chosen, 0.0)


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
