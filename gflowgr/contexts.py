"""What items are generated for: the model, the trie and the inputs, checked and cut in batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from gflowgr.backbones import GenerativeRecommender
from gflowgr.decoding import TreeWriter, read_inputs, transformer_of, tree_writer
from gflowgr.filters import ItemFilter
from gflowgr.item_sets import request
from gflowgr.trie import PrefixTrie

# Deeper levels seldom leave a choice, so the model is seldom asked there; the cache grows where it is.
_LEVELS_WITH_ROOM = 8


class Contexts:
    """B contexts, of a recommender that reads histories or of any transformers model that reads tokens.

    Args:
        model: `GenerativeRecommender`, or a transformers model, plain or under PEFT.
        inputs: histories (B, H) of a recommender; of another model as `tree_writer` takes them.
        trie: the catalogue; by default that of the recommender.

    Attributes:
        device: of the inputs, where results go.
        trie: on the model's device.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or they do not belong together.
    """

    def __init__(self, model: Any, inputs: Any, trie: PrefixTrie | None) -> None:
        self.model = model
        self.recommender = model if isinstance(model, GenerativeRecommender) else None
        transformer = self.recommender.transformer if self.recommender else transformer_of(model)
        if trie is None and self.recommender is None:
            raise ValueError("trie is None, needs the PrefixTrie of the catalogue, as model has none")
        trie = self.recommender.trie if trie is None and self.recommender else trie
        if not isinstance(trie, PrefixTrie):
            raise TypeError(f"trie is a {type(trie).__name__}, needs a PrefixTrie")
        if trie.max_token >= transformer.config.vocab_size:
            raise ValueError(
                f"trie has the token {trie.max_token}, needs tokens below the model's vocabulary of "
                f"{transformer.config.vocab_size}"
            )
        self.trie = trie.to(transformer.device)
        self.dtype = torch.float64 if transformer.dtype == torch.float64 else torch.float32
        if self.recommender is not None:
            self._history = self.recommender.checked("history", inputs)
            self.device, self._lengths = self._history.device, (self._history >= 0).sum(-1)
        else:
            self._tokens, self._real = read_inputs(transformer, inputs)
            given = inputs if isinstance(inputs, Tensor) else inputs["input_ids"]
            self.device, self._lengths = given.device, self._real.sum(-1)

    def __len__(self) -> int:
        return len(self._lengths)

    def item_filter(self, exclude: Any, allow: Any, exclude_history: bool) -> ItemFilter | None:
        """What the rows may get; None where nothing is kept from them."""
        if exclude_history:
            if self.recommender is None:
                raise ValueError("exclude_history needs a GenerativeRecommender, which reads histories")
            exclude = self._history if exclude is None else self._with_history(exclude)
        if exclude is None and allow is None:
            return None
        return ItemFilter(self.trie, exclude=exclude, allow=allow, rows=len(self))

    def _with_history(self, exclude: Any) -> list[list[int]]:
        asked = request(exclude, None, len(self), self.trie.num_items)
        known: list[list[int]] = self._history.tolist()
        for entry in asked.excluded.tolist():
            known[entry // self.trie.num_items].append(entry % self.trie.num_items)
        return known

    def seeds(self, seeds: Any, generator: torch.Generator | None) -> Tensor:
        """The seed of each row, as given or drawn: int64 (B,), on the model's device."""
        if seeds is None:
            device = "cpu" if generator is None else generator.device
            seeds = torch.randint(2**62, (len(self),), generator=generator, device=device)
        elif generator is not None:
            raise ValueError("seeds and generator are both given, needs one of them")
        seeds = torch.as_tensor(seeds)
        if seeds.is_floating_point() or seeds.dtype == torch.bool or seeds.shape != (len(self),):
            raise ValueError(
                f"seeds has dtype {seeds.dtype}, shape {tuple(seeds.shape)}, needs integers ({len(self)},)"
            )
        return seeds.to(self.trie.device, torch.int64)

    def batches(self, batch_size: int, name: str, progress: bool) -> Iterator[Tensor]:
        """Rows of each batch; inputs of like length go together, which leaves little padding."""
        order = self._lengths.cpu().argsort(stable=True)
        with tqdm(total=len(order), desc=name, unit=" contexts", disable=not progress) as bar:
            for rows in order.split(batch_size) if len(order) else ():
                yield rows
                bar.update(len(rows))

    def writer(self, rows: Tensor, paths: int) -> TreeWriter:
        """Reads some of the contexts, and is ready to write `paths` paths for each."""
        offsets = self.trie.level_offsets
        sizes = [end - begin for begin, end in pairwise(offsets[1:-1])]
        capacity = sum(min(paths, size) for size in sizes[:_LEVELS_WITH_ROOM])
        if self.recommender is not None:
            inputs = self.recommender.inputs(self._history[rows.to(self.device)])
        else:
            rows = rows.to(self._tokens.device)
            inputs = _trimmed(self._tokens[rows], self._real[rows])
        return tree_writer(
            self.recommender.model if self.recommender else self.model,
            inputs,
            self.trie.token_ranges,
            capacity=capacity,
        )


def _trimmed(tokens: Tensor, real: Tensor) -> dict[str, Tensor]:
    """Without the columns at either end that are padding in every row."""
    read = real.any(0).nonzero()
    columns = slice(int(read[0]), int(read[-1]) + 1)
    return {"input_ids": tokens[:, columns], "attention_mask": real[:, columns].long()}
