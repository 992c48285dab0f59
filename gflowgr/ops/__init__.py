"""The fused ops: one public function each, over a C++, a Triton and a plain PyTorch backend.

`B` batch, `T` tokens of an item path, `V` vocabulary, `N` items; `...` any leading shape.
"""

from gflowgr.ops.flow_balance import detailed_balance, subtrajectory_balance
from gflowgr.ops.flow_matching import flow_matching
from gflowgr.ops.log_partition_variance import log_partition_variance, trie_log_partition_variance
from gflowgr.ops.trajectory_balance import trajectory_balance, trie_trajectory_balance
from gflowgr.ops.trie_child_log_probs import trie_child_log_probs
from gflowgr.ops.trie_linear_token_log_probs import trie_linear_token_log_probs
from gflowgr.ops.trie_log_flows import trie_log_flows
from gflowgr.ops.trie_log_softmax import trie_log_softmax
from gflowgr.ops.trie_sample import trie_sample
from gflowgr.ops.trie_token_log_probs import trie_token_log_probs
from gflowgr.ops.trie_walk import trie_walk

__all__ = [
    "detailed_balance",
    "flow_matching",
    "log_partition_variance",
    "subtrajectory_balance",
    "trajectory_balance",
    "trie_child_log_probs",
    "trie_linear_token_log_probs",
    "trie_log_flows",
    "trie_log_partition_variance",
    "trie_log_softmax",
    "trie_sample",
    "trie_token_log_probs",
    "trie_trajectory_balance",
    "trie_walk",
]
