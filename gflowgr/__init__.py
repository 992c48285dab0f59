"""Fused trie operations and a trainer for fine-tuning generative recommenders with GFlowNets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gflowgr import ops
    from gflowgr.filters import ItemFilter, ItemSets
    from gflowgr.trie import PrefixTrie

__version__ = "0.1.0"
__all__ = ["ItemFilter", "ItemSets", "PrefixTrie", "ops"]


def __getattr__(name: str) -> Any:
    # On first use, so that `gflowgr.numpy_trie` can be imported where torch is not.
    if name == "PrefixTrie":
        return importlib.import_module("gflowgr.trie").PrefixTrie
    if name in ("ItemFilter", "ItemSets"):
        return getattr(importlib.import_module("gflowgr.filters"), name)
    if name == "ops":
        return importlib.import_module("gflowgr.ops")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
