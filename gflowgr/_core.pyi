"""The compiled core. Arrays are handed over as addresses (`Tensor.data_ptr()`); 0 stands for one left out."""

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

# first_child, token, bytes of a token, number of nodes
_Trie: TypeAlias = tuple[int, ...]
# item_node, node_items, number of items present, of all
_Catalogue: TypeAlias = tuple[int, ...]
# first_item, item_count, item_order, number of items
_Items: TypeAlias = tuple[int, ...]
# data, dtype (0 float32, 1 float64, 2 bfloat16, 3 float16), shape (B, T, V), strides, first token
_Logits: TypeAlias = tuple[int, ...]
# hidden_offsets, hidden_nodes, allowed, allowed_set, rows, words of a set; all 0 for no filter
_Filter: TypeAlias = tuple[int, ...]
# log_rewards, log_z, weights, loss, residual
_Balance: TypeAlias = tuple[int, ...]

def build_trie(rows: NDArray[np.int32] | NDArray[np.int64]) -> dict[str, NDArray[Any]]: ...
def add_items(
    trie: _Trie, catalogue: _Catalogue, rows: NDArray[np.int32] | NDArray[np.int64]
) -> dict[str, NDArray[Any]]: ...
def remove_items(
    trie: _Trie, catalogue: _Catalogue, removed: int, count: int, /
) -> dict[str, NDArray[Any]]: ...
def levels(trie: _Trie, /) -> tuple[list[int], list[int], list[int], list[int]]: ...
def walk(
    trie: _Trie, tokens: int, start: int, batch: int, steps: int, nodes: int, threads: int, /
) -> None: ...
def log_softmax(
    trie: _Trie, filter: _Filter, logits: _Logits, nodes: int, out: int, threads: int, /
) -> None: ...
def log_softmax_backward(
    trie: _Trie,
    filter: _Filter,
    grad: _Logits,
    dtype: int,
    log_probs: int,
    nodes: int,
    grad_logits: int,
    threads: int,
    /,
) -> None: ...
def child_log_probs(
    trie: _Trie, filter: _Filter, logits: _Logits, nodes: int, places: int, out: int, threads: int, /
) -> None: ...
def child_log_probs_backward(
    trie: _Trie,
    filter: _Filter,
    logits: _Logits,
    nodes: int,
    places: int,
    grad: int,
    grad_logits: int,
    threads: int,
    /,
) -> None: ...
def allow(
    trie: _Trie, catalogue: _Catalogue, members: int, count: int, item_bits: int, node_bits: int, /
) -> None: ...
def hidden_nodes(
    trie: _Trie,
    catalogue: _Catalogue,
    offsets: int,
    excluded: int,
    rows: int,
    sets: list[tuple[int, int]],
    threads: int,
    /,
) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...
def token_log_probs(
    trie: _Trie, filter: _Filter, logits: _Logits, tokens: int, start: int, out: int, threads: int, /
) -> None: ...
def token_log_probs_backward(
    trie: _Trie,
    filter: _Filter,
    logits: _Logits,
    tokens: int,
    start: int,
    grad: int,
    grad_logits: int,
    threads: int,
    /,
) -> None: ...
def sample(
    trie: _Trie,
    filter: _Filter,
    logits: _Logits,
    nodes: int,
    uniform: int,
    temperature: float,
    out_tokens: int,
    out_nodes: int,
    out_log_probs: int,
    threads: int,
    /,
) -> None: ...
def trajectory_balance(
    dtype: int, log_probs: int, mask: int, batch: int, steps: int, balance: _Balance, /
) -> None: ...
def trajectory_balance_backward(
    dtype: int, grad_residual: int, mask: int, batch: int, steps: int, grad_log_probs: int, /
) -> None: ...
def trie_trajectory_balance(
    trie: _Trie, logits: _Logits, tokens: int, start: int, balance: _Balance, threads: int, /
) -> None: ...
def log_flows(
    trie: _Trie,
    items: _Items,
    dtype: int,
    log_rewards: int,
    batch: int,
    out: int,
    threads: int,
    /,
) -> None: ...
def log_flows_backward(
    trie: _Trie,
    items: _Items,
    dtype: int,
    grad: int,
    log_rewards: int,
    flows: int,
    batch: int,
    grad_rewards: int,
    threads: int,
    /,
) -> None: ...
def flow_matching(
    trie: _Trie,
    logits: _Logits,
    nodes: int,
    flows: int,
    rows_per_flow: int,
    divergence: int,
    threads: int,
    /,
) -> None: ...
def flow_matching_backward(
    trie: _Trie,
    logits: _Logits,
    nodes: int,
    flows: int,
    rows_per_flow: int,
    grad: int,
    grad_logits: int,
    grad_flows: int,
    threads: int,
    /,
) -> None: ...
