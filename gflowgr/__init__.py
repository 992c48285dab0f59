"""Fused trie operations and a trainer for fine-tuning generative recommenders with GFlowNets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gflowgr import ops
    from gflowgr.filters import ItemFilter, ItemSets
    from gflowgr.generation import generate
    from gflowgr.trie import PrefixTrie

__version__ = "0.1.0"
__all__ = ["ItemFilter", "ItemSets", "PrefixTrie", "generate", "ops"]

# On first use, so that `gflowgr.numpy_trie` needs no torch, and the ops no transformers.
_HOMES = {
    "ItemFilter": "filters",
    "ItemSets": "filters",
    "PrefixTrie": "trie",
    "generate": "generation",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"gflowgr.{_HOMES[name]}"), name)
    if name == "ops":
        return importlib.import_module("gflowgr.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
