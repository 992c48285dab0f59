"""Catalogue-constrained decoding inside serving engines; which of them runs is no matter here.

The server says in its environment which catalogue it serves: `GFLOWGR_TRIE` is the file that
`PrefixTrie.save` wrote, `GFLOWGR_EOS` the token that ends an item. vLLM's processor is in
`gflowgr.serving_vllm`, for vLLM takes only subclasses of its own; SGLang's is here.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowgr import ops
from gflowgr.filters import ItemFilter
from gflowgr.trie import PrefixTrie

TRIE_VARIABLE, EOS_VARIABLE = "GFLOWGR_TRIE", "GFLOWGR_EOS"
_PARAMETERS = ("gflowgr_exclude", "gflowgr_allow")


class Wish(NamedTuple):
    """What a request must not get, and what it may get at all: items; `allow` None allows every item."""

    exclude: tuple[int, ...] = ()
    allow: tuple[int, ...] | None = None


class CatalogueConstraint:
    """The forward policy P_F on rows of logits, each from what its request has written so far.

    Args:
        trie: on any device.
        eos: the token that ends an item: certain at a leaf, impossible before it.

    Raises:
        TypeError, ValueError: `eos` is not a token.
    """

    def __init__(self, trie: PrefixTrie, eos: int) -> None:
        if isinstance(eos, bool) or not isinstance(eos, int):
            raise TypeError(f"eos is {eos!r}, needs a token")
        if eos < 0:
            raise ValueError(f"eos is {eos}, needs a token, 0 or above")
        self.trie, self.eos = trie, eos
        self._on = {trie.device: trie}
        self._filtered: tuple[object, ItemFilter | None] = (None, None)
        self._wishes: dict[tuple[int, ...], tuple[object, Wish]] = {}

    def wish(self, parameters: Mapping[str, Any]) -> Wish:
        """What a request's parameters `gflowgr_exclude` and `gflowgr_allow` (lists of items) ask for.

        Raises:
            ValueError: one of them is no list of items of the catalogue.
        """
        lists = []
        for name in _PARAMETERS:
            items = parameters.get(name)
            if items is not None:
                is_list = isinstance(items, (list, tuple))
                if not is_list or not all(
                    type(item) is int and 0 <= item < self.trie.num_items for item in items
                ):
                    raise ValueError(
                        f"{name} is {items!r}, needs a list of items, 0 .. {self.trie.num_items - 1}"
                    )
                items = tuple(items)
            lists.append(items)
        return Wish(lists[0] or (), lists[1])

    def wishes(self, rows: Sequence[Mapping[str, Any]]) -> list[Wish]:
        """The same of each request of a batch; lists that came in the batch before are not read again."""
        before, now, found = self._wishes, {}, []
        for row in rows:
            lists = tuple(map(row.get, _PARAMETERS))
            # As long as they are kept, no others have their ids.
            key = tuple(map(id, lists))
            now[key] = before.get(key) or (lists, self.wish(row))
            found.append(now[key][1])
        self._wishes = now
        return found

    def log_probs(
        self, logits: Tensor, written: Sequence[Sequence[int]], wishes: Sequence[Wish] | None = None
    ) -> Tensor:
        """log P_F of the next token of each row; `eos` where no item is left below: at a leaf, off the trie.

        Args:
            logits: (R, V), tokens of the trie and `eos` below V.
            written: the tokens that each of the R rows has written of its item.
            wishes: R, what to filter from each row's policy; nothing by default.

        Returns:
            (R, V) float32 (float64 for float64 logits), -inf for tokens that lead to no item. Dividing by a
            temperature afterwards gives what dividing the logits before would.

        Raises:
            ValueError: a shape or the vocabulary does not fit, or a row holds a placeholder for a token.
        """
        lengths = [min(len(tokens), self.longest) for tokens in written]
        paths = torch.full((len(written), max(lengths, default=0)), -1)
        for row, tokens in enumerate(written):
            path = torch.as_tensor(tokens[: lengths[row]], dtype=torch.long)
            if (path < 0).any():
                raise ValueError(
                    f"row {row} has written {list(tokens)}: a token is not known yet; switch asynchronous "
                    "scheduling off"
                )
            paths[row, : len(path)] = path
        counts = torch.tensor(lengths, dtype=torch.long)
        return self.log_probs_after(logits, paths.to(logits.device), counts.to(logits.device), wishes)

    def log_probs_after(
        self, logits: Tensor, paths: Tensor, lengths: Tensor, wishes: Sequence[Wish] | None = None
    ) -> Tensor:
        """The same from tensors on the device of `logits`, which is not waited for.

        Args:
            logits: (R, V).
            paths: (R, T) integers, the first `lengths[r]` of row r are what it has written; T may end at
                `longest`, the depth from which on every row is off the trie.
            lengths: (R,) integers, at most T.
            wishes: R.
        """
        if logits.dim() != 2 or logits.shape[0] != len(paths):
            raise ValueError(f"logits has shape {tuple(logits.shape)}, needs ({len(paths)}, V)")
        if self.eos >= logits.shape[1]:
            raise ValueError(f"eos is {self.eos}, needs a token below {logits.shape[1]}, the vocabulary")
        if logits.device not in self._on:
            self._on[logits.device] = self.trie.to(logits.device)
        trie = self._on[logits.device]
        # The root in front, so that a row that has written nothing has a last node, too.
        nodes = F.pad(trie.walk(paths), (1, 0)).gather(1, lengths.unsqueeze(1)).squeeze(1)
        item_filter = None if wishes is None else self._filter(tuple(wishes), trie)
        log_probs = ops.trie_log_softmax(logits, nodes, trie, item_filter=item_filter)
        ended = log_probs.isneginf().all(1)
        log_probs[:, self.eos] = torch.where(ended, 0.0, log_probs[:, self.eos])
        return log_probs

    @property
    def longest(self) -> int:
        """As many tokens as need to be looked at: one more than any item has."""
        return self.trie.max_depth + 1

    def _filter(self, wishes: tuple[Wish, ...], trie: PrefixTrie) -> ItemFilter | None:
        """The rows' filter; a batch asks for the same one until a request comes or goes."""
        # Read once: another thread may put its own batch in its place at any time.
        asked, item_filter = self._filtered
        if asked != (wishes, trie.device):
            item_filter = None
            if any(wish != Wish() for wish in wishes):
                sets = list(dict.fromkeys(wish.allow for wish in wishes))
                allow = None
                if sets != [None]:
                    every = torch.ones(trie.num_items, dtype=torch.bool)
                    members = [every if items is None else list(items) for items in sets]
                    allow = (members, [sets.index(wish.allow) for wish in wishes])
                item_filter = ItemFilter(trie, [list(wish.exclude) for wish in wishes], allow)
            self._filtered = ((wishes, trie.device), item_filter)
        return item_filter


def configured() -> CatalogueConstraint:
    """The constraint that the environment names; a process loads it once.

    Raises:
        ValueError: a variable is missing or no token, or the file is no saved trie.
        FileNotFoundError: there is no such file.
    """
    path, eos = os.environ.get(TRIE_VARIABLE), os.environ.get(EOS_VARIABLE)
    if not path:
        raise ValueError(f"{TRIE_VARIABLE} is not set, needs the path of a saved PrefixTrie")
    if eos is None or not eos.isdecimal():
        raise ValueError(f"{EOS_VARIABLE} is {eos!r}, needs the token that ends an item")
    return _loaded(path, int(eos))


@lru_cache(maxsize=1)
def _loaded(path: str, eos: int) -> CatalogueConstraint:
    return CatalogueConstraint(PrefixTrie.load(path), eos)


class SGLangTrieProcessor:
    """What SGLang calls a custom logit processor: `custom_logit_processor=SGLangTrieProcessor.to_str()`.

    SGLang makes it anew from that text for every batch, so it holds nothing.
    """

    def __call__(
        self, logits: Tensor, custom_param_list: Sequence[Mapping[str, Any] | None] | None = None
    ) -> Tensor:
        """Log-probs in the place of the logits (R, V) of those requests that ask for the processor.

        SGLang puts the request itself under "__req__" among each row's parameters; `gflowgr_exclude` and
        `gflowgr_allow` among them filter that row.

        Raises:
            ValueError: a row comes without its request, or see `CatalogueConstraint.log_probs`.
        """
        rows = list(custom_param_list or ())
        if not all(row and "__req__" in row for row in rows) or len(rows) != logits.shape[0]:
            raise ValueError(
                f"custom_param_list has {len(rows)} entries for {logits.shape[0]} rows, needs one for each, "
                "with its request under '__req__'; speculative decoding is not supported"
            )
        constraint = configured()
        written = [row["__req__"].output_ids for row in rows if row]
        wishes = constraint.wishes([row for row in rows if row])
        return logits.copy_(constraint.log_probs(logits, written, wishes))

    @classmethod
    def to_str(cls) -> str:
        """The class as SGLang's server reads it: by reference, so gflowgr has to be installed there."""
        return json.dumps({"callable": pickle.dumps(cls, protocol=4).hex()})
