"""Nodes along token paths."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.ops import _checks
from gflowgr.ops._registry import register, resolve_backend


def trie_walk(
    tokens: Tensor, trie: _checks.CatalogueTrie, *, start: int | Tensor = 0, backend: str = "auto"
) -> Tensor:
    """The node after each token, -1 from the first token off the trie on.

    Args:
        tokens: (..., T) integers.
        start: the node to set out from, an int or integers (...).

    Returns:
        int64 (..., T).
    """
    shape = _checks.tensor("tokens", tokens).shape
    if not shape:
        raise ValueError("tokens has no dimension, needs (..., T)")
    tokens = _checks.integers("tokens", tokens, shape)
    _checks.trie_for(trie, tokens.device)
    start = _checks.start_nodes(start, tokens)
    backend = resolve_backend(backend, "trie_walk", tokens.device)
    if backend == "torch":
        return reference.trie_walk(tokens, start, trie)
    paths = tokens.reshape(start.numel(), shape[-1])
    return _walk(paths, start.reshape(-1), trie.first_child, trie.narrow_token, backend).view(shape)


_walk = register(
    "trie_walk(Tensor tokens, Tensor start, Tensor first_child, Tensor token, str backend) -> Tensor",
    lambda tokens, start, first_child, token, backend: torch.empty_like(
        tokens, memory_format=torch.contiguous_format
    ),
)
