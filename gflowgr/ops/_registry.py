"""Which backend serves an op, and how an op becomes one of `torch.ops.gflowgr`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "cpp", "triton", "torch")
HAS_CPP = importlib.util.find_spec("gflowgr._core") is not None
HAS_TRITON = (
    importlib.util.find_spec("triton") is not None and importlib.util.find_spec("gflowgr.kernels") is not None
)
TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"

CPP_OPS = frozenset(
    {
        "trie_walk",
        "trie_log_softmax",
        "trie_child_log_probs",
        "trie_token_log_probs",
        "trie_linear_token_log_probs",
        "trie_sample",
        "trie_log_flows",
        "trajectory_balance",
        "trie_trajectory_balance",
        "trie_log_partition_variance",
        "flow_matching",
    }
)
# All of them so far.
TRITON_OPS = CPP_OPS

LIBRARY = torch.library.Library("gflowgr", "DEF")


def resolve_backend(backend: str, op: str, device: torch.device) -> str:
    """The backend that will run `op` on `device`: "cpp", "triton" or "torch".

    Raises:
        ValueError: `backend` has no such name.
        RuntimeError: a backend asked for by name cannot serve; the message says what is missing.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, needs one of {BACKENDS}")
    if backend == "torch":
        return backend
    wanted = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "torch") if backend == "auto" else backend
    obstacle = why_not(wanted, op, device)
    if obstacle is None:
        return wanted
    if backend == "auto":
        return "torch"
    raise RuntimeError(f"backend={backend!r} cannot run {op} on {device}: {obstacle}")


def why_not(backend: str, op: str, device: torch.device) -> str | None:
    """What keeps a backend from running `op` on `device`; None when nothing does."""
    if backend == "torch":
        return None
    if op not in (CPP_OPS if backend == "cpp" else TRITON_OPS):
        return f"the {backend} backend has no kernel for it"
    if backend == "cpp":
        if not HAS_CPP:
            return "the C++ extension is not compiled; reinstall with `pip install .` and a C++20 compiler"
        return None if device.type == "cpu" else "the C++ core reads CPU memory only"
    if not HAS_TRITON:
        return "Triton is not installed; `pip install triton` (Linux)"
    if device.type == "cuda" or TRITON_INTERPRETS:
        return None
    return "Triton needs a CUDA device, or TRITON_INTERPRET=1 set before gflowgr is imported"


@cache
def kernels_of(backend: str) -> ModuleType:
    """The module that holds a backend's functions, one of the same name and arguments for each op."""
    return importlib.import_module({"cpp": "gflowgr.ops._cpp", "triton": "gflowgr.kernels"}[backend])


def register(
    schema: str,
    fake: Callable[..., Any],
    *,
    implementation: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers an op whose last argument names the backend; the backend's function of that name runs it,
    or `implementation`.

    Returns what the package calls: `torch.ops.gflowgr.<op>`, or the backend's function without the dispatcher
    where nobody listens to it. That saves a call about 10 microseconds, and a backward pass 50.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        if implementation is not None:
            # Its dtypes are settled, and a backward may run in another autocast region than its forward did.
            with torch.autocast(args[0].device.type, enabled=False):
                return implementation(*args)
        return getattr(kernels_of(args[-1]), name)(*args[:-1])

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"gflowgr::{name}", fake, lib=LIBRARY)
    differentiable = None
    if setup_context is not None and backward is not None:
        backward = _differentiated_once(backward)
        torch.library.register_autograd(
            f"gflowgr::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
        differentiable = _autograd_function(name, run, setup_context, backward)
    dispatched = getattr(torch.ops.gflowgr, name)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return dispatched(*args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, args)
        if somebody_listens(args):
            return dispatched(*args)
        if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
            return run(*args)
        return dispatched(*args) if differentiable is None else differentiable.apply(*args)

    return call


def _differentiated_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward is an op without one: its derivative would be taken for 0."""

    def once(ctx: Any, *grads: Any) -> Any:
        # Gradients are on inside a backward pass when somebody wants to differentiate it.
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        refuse: Any = torch._C._functions.DelayedError("gflowgr's ops have no second derivative", len(found))
        return refuse(*(None if each is None else each.detach().requires_grad_() for each in found))

    return once


def _autograd_function(
    name: str, run: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *args: Any) -> Any:
        output = run(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """There is no forward-mode derivative, and PyTorch would take it for 0."""
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError(f"{name} has no forward-mode derivative; backend='torch' has one")


def somebody_listens(args: tuple[Any, ...]) -> bool:
    """Whether a mode, a transform, a tracer, the profiler or a tensor's kind needs the dispatcher."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or not all(_is_plain(a) for a in args if isinstance(a, Tensor))
    )


def _is_plain(tensor: Tensor) -> bool:
    """Memory as it seems: no subclass, no pending negation, none that stands for zeros or for several."""
    return (
        type(tensor) in _PLAIN
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        # A gradient under `torch.autograd.grad(is_grads_batched=True)`, which is no transform to see above.
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def register_composite(schema: str, definition: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an op that is made of others: autograd and the compiler see through it."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, definition, "CompositeImplicitAutograd")
    dispatched = getattr(torch.ops.gflowgr, name)

    def call(*args: Any) -> Any:
        listened = torch.compiler.is_compiling() or somebody_listens(args)
        return dispatched(*args) if listened else definition(*args)

    return call
