"""Flow matching on the children of visited states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._registry import register, resolve_backend


def flow_matching(
    logits: Tensor,
    nodes: Tensor,
    trie: _checks.CatalogueTrie,
    log_flows: Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL(p* || P_F) over the children of each row's node, with p*(c) = F(c) / the sum of F over the children.

    Its gradient with respect to a child's logit is P_F - p*, so it is bounded and needs no sampled reward.

    Args:
        logits: (..., V) float32, float64, bfloat16 or float16, any strides.
        nodes: (...) integers.
        trie: on the device of `logits`, tokens below V.
        log_flows: (..., num_nodes) floats as `trie_log_flows` gives them; its leading shape is that of
            `nodes` or a prefix of it: (B, num_nodes) serves nodes (B, T), (num_nodes,) serves every row.
        reduction: over rows, "mean", "sum" or "none".
        backend: "auto", "cpp", "triton" or "torch".

    Returns:
        The divergence in nats, a scalar, or (...) for "none"; differentiable in `logits` and `log_flows`. It
        is 0, without gradient, for a row with fewer than two children or whose children carry no flow.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or vocabulary.
        RuntimeError: `backend` cannot serve here.
    """
    logits = _checks.floats("logits", logits, 1)
    nodes = _checks.integers("nodes", nodes, logits.shape[:-1])
    _checks.same_device("nodes", nodes, logits.device)
    _checks.trie_for(trie, logits.device, logits.shape[-1])
    _checks.reduction_name(reduction)
    log_flows = _checks.floats("log_flows", log_flows, 1)
    _checks.same_device("log_flows", log_flows, logits.device)
    lead = log_flows.shape[:-1]
    if log_flows.shape[-1] != trie.num_nodes or lead != nodes.shape[: len(lead)]:
        raise ValueError(
            f"log_flows has shape {tuple(log_flows.shape)}, needs a prefix of {tuple(nodes.shape)} and then "
            f"{trie.num_nodes}"
        )
    log_flows = log_flows.to(reference.accumulation_dtype(logits.dtype))
    backend = resolve_backend(backend, "flow_matching", logits.device)
    if backend == "torch":
        return reference.reduce(reference.flow_matching(logits, nodes, trie, log_flows), None, reduction)
    paths = _checks.as_paths(logits.unsqueeze(0) if logits.dim() == 1 else logits)
    divergence = _divergence(
        paths,
        nodes.reshape(paths.shape[:-1]),
        trie.first_child,
        trie.narrow_token,
        trie.max_children,
        log_flows.reshape(lead.numel(), trie.num_nodes),
        backend,
    )
    return reference.reduce(divergence.view(nodes.shape), None, reduction)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, nodes, first_child, token, ctx.max_children, log_flows, ctx.backend = inputs
    ctx.save_for_backward(logits, nodes, first_child, token, log_flows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, log_flows = ctx.saved_tensors
    needed = ctx.needs_input_grad[5]
    grad_logits, grad_flows = _divergence_backward(
        grad, *tensors, ctx.max_children, log_flows, needed, ctx.backend
    )
    return grad_logits, None, None, None, None, grad_flows if needed else None, None


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    nodes: Tensor,
    first_child: Tensor,
    token: Tensor,
    max_children: int,
    log_flows: Tensor,
    needs_grad_flows: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    shape = log_flows.shape if needs_grad_flows else (0,)
    return logits.new_empty(logits.shape), log_flows.new_empty(shape)


_divergence = register(
    "flow_matching(Tensor logits, Tensor nodes, Tensor first_child, Tensor token, int max_children, "
    "Tensor log_flows, str backend) -> Tensor",
    lambda logits, nodes, first_child, token, max_children, log_flows, backend: log_flows.new_empty(
        nodes.shape
    ),
    setup_context=_setup_context,
    backward=_backward,
)
_divergence_backward = register(
    "flow_matching_backward(Tensor grad, Tensor logits, Tensor nodes, Tensor first_child, Tensor token, "
    "int max_children, Tensor log_flows, bool needs_grad_flows, str backend) -> (Tensor, Tensor)",
    _fake_backward,
)
