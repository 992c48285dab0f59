"""Exact log-probabilities of items: of the whole catalogue, level by level, and of one item a context."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.backbones import GenerativeRecommender
from gflowgr.contexts import Contexts
from gflowgr.decoding import Mark, TreeWriter, evaluating
from gflowgr.filters import ItemFilter
from gflowgr.ops._checks import at_least
from gflowgr.reference import accumulation_dtype, token_of
from gflowgr.trie import PrefixTrie


def score_all(
    model: Any,
    inputs: Any,
    trie: PrefixTrie | None = None,
    *,
    exclude: Any = None,
    allow: Any = None,
    exclude_history: bool = False,
    batch_size: int = 16,
    num_paths: int = 256,
    progress: bool = False,
) -> Tensor:
    """log P_F of every item of the catalogue: (B, N), on the device of the inputs.

    Exact: every prefix that leaves a choice is written once. Items with the same tokens have equal parts of
    their probability, so that those of a row sum to 1 where no item is a prefix of another.

    Args:
        model, inputs, trie, exclude, allow, exclude_history: as in `generate`; an item that a context must
            not get has -inf, and the others the policy over what is left.
        batch_size: contexts at a time.
        num_paths: prefixes at a time. Memory grows with it times the depth, not with the catalogue, but for
            the result and a number for each node.
        progress: show a bar.

    Raises:
        TypeError, ValueError: as `generate`.
    """
    batch_size, num_paths = at_least("batch_size", batch_size, 1), at_least("num_paths", num_paths, 1)
    contexts = Contexts(model, inputs, trie)
    item_filter = contexts.item_filter(exclude, allow, exclude_history)
    trie = contexts.trie
    scores = torch.empty(len(contexts), trie.num_items, dtype=contexts.dtype, device=contexts.device)
    everything = torch.arange(trie.num_items, device=trie.device)
    shares = log_shares(trie)
    undecided = _undecided(trie)
    with evaluating(model):
        for rows in contexts.batches(batch_size, "score", progress):
            chosen = None if item_filter is None else item_filter.select(rows.to(trie.device))
            writer = contexts.writer(rows, num_paths)
            of_nodes = _node_log_probs(writer, trie, chosen, undecided, num_paths)
            ended = trie.item_node.long()
            of_items = of_nodes[:, ended.clamp(min=0)].masked_fill(ended < 0, -torch.inf)
            if chosen is not None:
                hidden = chosen.hides(everything.expand(len(rows), -1))
                of_items = of_items.masked_fill(hidden, -torch.inf)
                shares = log_shares(trie, ~hidden)
            scores[rows.to(scores.device)] = (of_items + shares).to(scores)
    return scores


def target_log_probs(
    model: GenerativeRecommender, history: Tensor, target: Tensor, *, batch_size: int = 64
) -> Tensor:
    """log P_F of one item of each context, as `score_all` defines it: (B, H), (B,) -> (B,)."""
    history, target = model.checked("history", history), model.checked("target", target.unsqueeze(-1))
    if target.shape[0] != history.shape[0]:
        raise ValueError(f"target has {target.shape[0]} rows, needs {history.shape[0]} like history")
    if target.device.type == "cpu" and bool((target < 0).any()):
        raise ValueError(f"target has the item {int(target.min())}, needs items of the catalogue, 0 or above")
    contexts = Contexts(model, history, None)
    scores = torch.empty(len(contexts), dtype=contexts.dtype, device=history.device)
    shares = log_shares(model.trie)[0]
    with evaluating(model):
        for rows in contexts.batches(batch_size, "score", False):
            rows = rows.to(history.device)
            items = target[rows].to(model.device)
            policy = model(history[rows].to(model.device), items)
            log_probs = ops.trie_token_log_probs(policy.logits, model.tokens(items), model.trie)
            # No item has no probability; what lies on a device is not looked at before.
            of_items = log_probs.sum((1, 2)) + shares[items[:, 0].clamp(min=0)]
            scores[rows] = of_items.masked_fill(items[:, 0] < 0, torch.nan).to(scores)
    return scores


def log_shares(trie: PrefixTrie, available: Tensor | None = None) -> Tensor:
    """Log of the part that each item has of its tokens' probability: float64 (B, N), (1, N) for all items.

    It is one over the number of available items (B, N) with the same tokens.
    """
    node = trie.item_node.long().clamp(min=0)
    if available is None:
        available = torch.ones(1, trie.num_items, dtype=torch.bool, device=trie.device)
    # A removed item has no node, and must not count at another's.
    available = available & (trie.item_node >= 0)
    count = torch.zeros(len(available), trie.num_nodes, device=available.device)
    return -count.index_add(1, node, available.float())[:, node].clamp(min=1).double().log()


def _undecided(trie: PrefixTrie) -> Tensor:
    """Which nodes have more than one leaf under them, so that a choice is left: bool (num_nodes,)."""
    leaves = (trie.first_child[1:] == trie.first_child[:-1]).long()
    for begin, end in reversed(list(pairwise(trie.level_offsets[1:]))):
        leaves = leaves.index_add(0, trie.parent[begin:end].long(), leaves[begin:end])
    return leaves > 1


class _Chunk(NamedTuple):
    """Nodes (n,) of one depth to be written, the paths that they continue, and where the writer stood."""

    mark: Mark
    nodes: Tensor
    parents: Tensor


def _node_log_probs(
    writer: TreeWriter, trie: PrefixTrie, item_filter: ItemFilter | None, undecided: Tensor, num_paths: int
) -> Tensor:
    """log P_F of every prefix: (B, num_nodes); under a hidden one it means nothing.

    Undecided nodes are written in chunks of one depth, the chunks depth first: so the cache holds the
    ancestors of one chunk at a time.
    """
    batch = writer.logits.shape[0]
    dtype = accumulation_dtype(writer.logits.dtype)
    of_nodes = torch.zeros(batch, trie.num_nodes, dtype=dtype, device=trie.device)
    logits, nodes = writer.logits, torch.zeros(1, dtype=torch.int64, device=trie.device)
    waiting: list[_Chunk] = []
    while True:
        first, counts = trie.first_child[nodes].long(), trie.first_child.diff()[nodes].long()
        log_probs = ops.trie_child_log_probs(
            logits,
            nodes.expand(batch, -1),
            trie,
            item_filter=item_filter,
            first_token=trie.token_ranges[writer.mark.depth][0],
            width=int(counts.max()),
        )
        parents = torch.arange(len(nodes), device=trie.device).repeat_interleave(counts)
        place = torch.arange(len(parents), device=trie.device) - (counts.cumsum(0) - counts)[parents]
        children = first[parents] + place
        of_nodes[:, children] = of_nodes[:, nodes][:, parents] + log_probs[:, parents, place]
        on = undecided[children].nonzero().squeeze(1)
        for some in on.split(num_paths) if len(on) else ():
            waiting.append(_Chunk(writer.mark, children[some], parents[some]))
        if not waiting:
            break
        mark, nodes, parents = waiting.pop()
        writer.rewind(mark)
        logits = writer.extend(token_of(nodes, trie).expand(batch, -1), parents.expand(batch, -1))
    for begin, end in pairwise(trie.level_offsets[1:]):
        above = trie.parent[begin:end].long()
        forced = ~undecided[above]
        of_nodes[:, begin:end][:, forced] = of_nodes[:, above[forced]]
    return of_nodes
