"""Fused trie operations and a trainer for fine-tuning generative recommenders with GFlowNets."""

from gflowgr import ops
from gflowgr.trie import PrefixTrie

__version__ = "0.1.0"
__all__ = ["PrefixTrie", "ops"]
