"""The forward policy inside transformers' own `generate`: a logits processor and a prefix function."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor

from gflowgr import ops, reference
from gflowgr.filters import ItemFilter
from gflowgr.semantic_ids import EOS
from gflowgr.trie import PrefixTrie


class TrieLogitsProcessor(LogitsProcessor):
    """Makes transformers' own `generate` follow the forward policy over a trie; ends at a leaf by EOS.

    With beam search and `length_penalty=0` the scores of sequences are log P_F.

    Args:
        trie: on the device of the scores.
        prompt_length: tokens in front of the generated ones: 1 for T5 (the start token), the width of
            `input_ids` for decoder-only models.
        eos: the model's end token.
        item_filter: which items each context may get, one row a context. Its beams or returned sequences are
            consecutive, as transformers lays them out.
    """

    def __init__(
        self, trie: PrefixTrie, prompt_length: int, eos: int = EOS, *, item_filter: ItemFilter | None = None
    ) -> None:
        self.trie, self.prompt_length, self.eos, self.item_filter = trie, prompt_length, eos, item_filter

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        contexts = len(scores) if self.item_filter is None else self.item_filter.num_rows
        if len(scores) % max(contexts, 1):
            raise ValueError(f"scores has {len(scores)} rows, needs as many for each of {contexts} contexts")
        nodes = F.pad(self.trie.walk(input_ids[:, self.prompt_length :]), (1, 0))[:, -1]
        log_probs = ops.trie_log_softmax(
            scores.view(contexts, -1, scores.shape[-1]),
            nodes.view(contexts, -1),
            self.trie,
            item_filter=self.item_filter,
        ).view(scores.shape)
        ended = log_probs.isneginf().all(-1)
        log_probs[:, self.eos] = torch.where(ended, 0.0, log_probs[:, self.eos])
        return log_probs


def prefix_allowed_tokens(
    trie: PrefixTrie, prompt_length: int, eos: int = EOS, *, item_filter: ItemFilter | None = None
) -> Callable[[int, Tensor], list[int]]:
    """The `prefix_allowed_tokens_fn` of transformers' own `generate`; arguments as in `TrieLogitsProcessor`.

    It is asked for one beam at a time, and its scores are not log P_F for want of renormalising. It remembers
    the latest prefixes that it was asked for.
    """

    @lru_cache(maxsize=2**16)
    def after(row: int, written: tuple[int, ...]) -> list[int]:
        node = trie.walk(torch.tensor([0, *written])[1:])[-1:] if written else torch.zeros(1).long()
        if item_filter is None:
            return (trie.children(int(node)).tolist() if node >= 0 else []) or [eos]
        node = node.to(trie.device).view(1, 1)
        _, tokens, exists = reference.children(node, trie, item_filter.select([row]))
        return tokens[exists].tolist() or [eos]

    def allowed(batch: int, input_ids: Tensor) -> list[int]:
        row = 0 if item_filter is None else batch
        return after(row, tuple(input_ids[prompt_length:].tolist()))

    return allowed
