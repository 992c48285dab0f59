"""Which backend serves an op, and how an op becomes one of `torch.ops.gflowgr`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

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
        "trie_token_log_probs",
        "trie_sample",
        "trie_log_flows",
        "trajectory_balance",
        "trie_trajectory_balance",
        "flow_matching",
    }
)
TRITON_OPS = frozenset(
    {
        "trie_walk",
        "trie_log_softmax",
        "trie_token_log_probs",
        "trie_sample",
        "trie_log_flows",
        "trajectory_balance",
        "trie_trajectory_balance",
        "flow_matching",
    }
)

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


def kernels_of(backend: str) -> ModuleType:
    """The module that holds a backend's functions, one of the same name and arguments for each op."""
    return importlib.import_module({"cpp": "gflowgr.ops._cpp", "triton": "gflowgr.kernels"}[backend])


def register(
    schema: str,
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers an op whose last argument names the backend; the backend's function of that name runs it."""
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        return getattr(kernels_of(args[-1]), name)(*args[:-1])

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"gflowgr::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"gflowgr::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )


def register_composite(schema: str, definition: Callable[..., Any]) -> None:
    """Registers an op that is made of others: autograd and the compiler see through it."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(schema.partition("(")[0], definition, "CompositeImplicitAutograd")
