"""Triton kernels of the ops: one family a file, each with its launchers; they know torch and triton only.

Every launcher has the name and the arguments of the op it serves. Logits are (B, T, V) with any strides,
tokens and nodes (B, T) int64, start (B,) int64.
"""

from .flow_matching import flow_matching, flow_matching_backward
from .trajectory_balance import trajectory_balance, trajectory_balance_backward
from .trie_child_log_probs import trie_child_log_probs, trie_child_log_probs_backward
from .trie_log_flows import trie_log_flows, trie_log_flows_backward
from .trie_log_softmax import trie_log_softmax, trie_log_softmax_backward
from .trie_sample import trie_sample
from .trie_token_log_probs import trie_token_log_probs, trie_token_log_probs_backward
from .trie_trajectory_balance import trie_trajectory_balance
from .trie_walk import trie_walk

__all__ = [
    "flow_matching",
    "flow_matching_backward",
    "trajectory_balance",
    "trajectory_balance_backward",
    "trie_child_log_probs",
    "trie_child_log_probs_backward",
    "trie_log_flows",
    "trie_log_flows_backward",
    "trie_log_softmax",
    "trie_log_softmax_backward",
    "trie_sample",
    "trie_token_log_probs",
    "trie_token_log_probs_backward",
    "trie_trajectory_balance",
    "trie_walk",
]
