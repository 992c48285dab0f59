"""A catalogue split by first token, so that each part's trie fits a machine of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.trie import PrefixTrie, rows_of


class Shards(NamedTuple):
    """S tries that together are one: P_F(item) = P_F(first token), from the root, times P_F(rest | shard).

    Below its first token an item has the same siblings in its shard as in the whole, so only the first step
    needs to know of all shards, and that takes a trie of one level.

    Attributes:
        root: a trie of one level, the catalogue's first tokens; its node c + 1 is the c-th of them.
        shard_of: int64 (first tokens,), the shard that holds the items of each.
        tries: the S shards' tries, of whole sequences; at a shard's own root the policy is another.
        items: for each shard, int64, its items' numbers in the catalogue.
    """

    root: PrefixTrie
    shard_of: Tensor
    tries: tuple[PrefixTrie, ...]
    items: tuple[Tensor, ...]

    def of_tokens(self, first_tokens: Tensor) -> Tensor:
        """The shards (int64) of first tokens of any shape, -1 for those that begin no item."""
        nodes = self.root.walk(first_tokens.unsqueeze(-1)).squeeze(-1)
        return torch.where(nodes < 0, -1, self.shard_of[(nodes - 1).clamp(min=0)])

    def token_log_probs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """What `ops.trie_token_log_probs` gives with the whole catalogue's trie: (B, T, V), (B, T) -> (B, T).

        Each shard sees only the rows that are its own; where shards are machines, those are the rows to send.
        """
        first = ops.trie_token_log_probs(logits[:, :1], tokens[:, :1], self.root)
        rest = first.new_zeros(tokens[:, 1:].shape)
        shard_of_row = self.of_tokens(tokens[:, 0])
        # Off the root, or padding from the start on: no shard, but the same rules.
        rest = rest.masked_fill((shard_of_row < 0).unsqueeze(1) & _before_padding(tokens)[:, 1:], -torch.inf)
        for shard, trie in enumerate(self.tries):
            rows = (shard_of_row == shard).nonzero().squeeze(1)
            start = trie.walk(tokens[rows, :1]).squeeze(1)
            found = ops.trie_token_log_probs(logits[rows, 1:], tokens[rows, 1:], trie, start=start)
            rest = rest.index_copy(0, rows, found)
        return torch.cat([first, rest], 1)


def split(sequences: Any, num_shards: int) -> Shards:
    """Splits a catalogue into shards of about as many items each, whole first tokens together.

    Args:
        sequences: (N, L) integers as for `PrefixTrie`.
        num_shards: S, at most the number of first tokens.

    Raises:
        TypeError, ValueError: `sequences` make no trie, or there are fewer first tokens than shards.
    """
    rows = rows_of(sequences)
    root = PrefixTrie(rows[:, :1])
    counts = root.item_count[1:].long()
    if not 1 <= num_shards <= counts.numel():
        raise ValueError(f"num_shards is {num_shards}, needs 1 .. {counts.numel()}, the first tokens")
    shard_of = torch.empty_like(counts)
    filled = torch.zeros(num_shards, dtype=torch.int64)
    # The largest first, each into the emptiest shard.
    for token in counts.argsort(descending=True, stable=True).tolist():
        shard = int(filled.argmin())
        shard_of[token] = shard
        filled[shard] += counts[token]
    shard_of_item = shard_of[root.item_node.long() - 1]
    items = tuple((shard_of_item == shard).nonzero().squeeze(1) for shard in range(num_shards))
    return Shards(root, shard_of, tuple(PrefixTrie(rows[part.numpy()]) for part in items), items)


def best_of(candidates: list[tuple[Tensor, Tensor]], num_best: int) -> tuple[Tensor, Tensor]:
    """The best of what shards found for the same contexts: merges lists of any lengths, best first.

    Args:
        candidates: from each shard, identities (B, k) of any integer dtype (numbered for the whole catalogue)
            and their log-probs (B, k), -inf for none.
        num_best: how many to keep.

    Returns:
        (B, min(num_best, sum of k)) identities and log-probs; ties go to the earlier shard.
    """
    identities = torch.cat([found for found, _ in candidates], 1)
    scores = torch.cat([found for _, found in candidates], 1)
    log_probs, order = scores.sort(dim=1, descending=True, stable=True)
    return identities.gather(1, order[:, :num_best]), log_probs[:, :num_best]


def _before_padding(tokens: Tensor) -> Tensor:
    return (tokens >= 0).cummin(1).values
