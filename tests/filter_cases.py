"""Filters for the tests, and what they mean by brute force: sets of items and dicts of children."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from core_cases import catalogues, wide_catalogues
from core_oracle import DictTrie, log_sum_exp
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import ItemFilter, ItemSets, PrefixTrie


@dataclass(frozen=True)
class Filtered:
    """A catalogue, some of whose items were removed, and a filter for each context of a batch."""

    rows: list[list[int]]
    removed: frozenset[int]
    exclude: list[list[int]] | None
    sets: list[list[int]]
    set_of_row: list[int] | None
    form: str
    contexts: int
    seed: int

    @cached_property
    def kept(self) -> list[int]:
        return [item for item in range(len(self.rows)) if item not in self.removed]

    @cached_property
    def oracle(self) -> DictTrie:
        return DictTrie([self.rows[item] for item in self.kept])

    def trie(self, device: torch.device) -> PrefixTrie:
        return PrefixTrie(self.rows).remove(sorted(self.removed)).to(device)

    def filter(self, trie: PrefixTrie) -> ItemFilter:
        return ItemFilter(
            trie, self.given_exclude(), self.given_allow(partial(ItemSets, trie)), rows=self.contexts
        )

    def given_exclude(self) -> Any:
        """In the form in which a caller may give it."""
        if self.exclude is None or self.form == "lists":
            return self.exclude
        width = max(map(len, self.exclude), default=0)
        padded = [row + [-1] * (width - len(row)) for row in self.exclude]
        given = torch.tensor(padded, dtype=torch.int64).view(self.contexts, width)
        return given.numpy() if self.form == "array" else given

    def given_allow(self, prepare: Callable[[Any], Any]) -> Any:
        """Likewise; some of the forms `prepare` their sets first."""
        if not self.sets:
            return None
        sets: list[Any] = self.sets
        if self.form == "masks":
            sets = [torch.tensor([item in one for item in range(len(self.rows))]) for one in self.sets]
        elif self.form == "tensors":
            sets = [torch.tensor(one, dtype=torch.int32) for one in self.sets]
        if self.set_of_row is None:
            return prepare(sets[:1]) if self.form == "array" else sets[0]
        if self.form == "lists":
            return [sets[number] for number in self.set_of_row]
        return (prepare(sets) if self.form == "array" else sets), self.set_of_row

    def left(self, context: int) -> set[int]:
        """The items that a context may get."""
        items = set(self.kept)
        if self.sets:
            items &= set(self.sets[0 if self.set_of_row is None else self.set_of_row[context]])
        return items - set(self.exclude[context] if self.exclude is not None else [])

    def available(self, context: int, node: int) -> bool:
        return bool({self.kept[item] for item in self.oracle.under(node)} & self.left(context))

    def children(self, context: int, node: int) -> dict[int, int]:
        """token -> child node, of those that are available."""
        kids = self.oracle.children(node)
        return {token: child for token, child in kids.items() if self.available(context, child)}

    def policy(
        self, context: int, logits: list[float], node: int, temperature: float = 1.0
    ) -> dict[int, float]:
        """token -> log-prob over the available children; an only one has 0 whatever its logit."""
        tokens = list(self.children(context, node))
        if len(tokens) < 2:
            return dict.fromkeys(tokens, 0.0)
        values = [logits[token] / temperature for token in tokens]
        peak = max(values)
        total = log_sum_exp([value - peak for value in values])
        return {token: value - peak - total for token, value in zip(tokens, values, strict=True)}

    @property
    def width(self) -> int:
        return max(map(max, self.rows)) + 2

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def nodes(self, shape: tuple[int, ...]) -> Tensor:
        """Nodes on the trie and some off it: (contexts, ...)."""
        return torch.randint(-1, len(self.oracle) + 1, shape, generator=self.generator)

    def normals(self, shape: tuple[int, ...], scale: float = 2.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale


@st.composite
def filtered(draw: st.DrawFn) -> Filtered:
    rows = draw(st.one_of(catalogues(), catalogues(max_items=30), wide_catalogues()))
    contexts = draw(st.integers(1, 4))
    item = st.integers(0, len(rows) - 1)
    # Many items, so that whole subtrees, and whole rows, are left out.
    some = st.lists(item, max_size=2 * min(len(rows), 40))
    everything = st.just(list(range(len(rows))))
    items = st.one_of(
        some, some, everything, st.sets(item, max_size=40).map(lambda s: sorted(set(range(len(rows))) - s))
    )
    exclude = draw(st.none() | st.lists(items, min_size=contexts, max_size=contexts))
    sets = draw(st.lists(items, max_size=3))
    set_of_row = None
    if sets and draw(st.booleans()):
        set_of_row = draw(st.lists(st.integers(0, len(sets) - 1), min_size=contexts, max_size=contexts))
    return Filtered(
        rows=rows,
        removed=frozenset(draw(st.sets(item, max_size=min(3, len(rows) - 1)))),
        exclude=exclude,
        sets=sets,
        set_of_row=set_of_row,
        form=draw(st.sampled_from(("lists", "tensors", "masks", "array"))),
        contexts=contexts,
        seed=draw(st.integers(0, 2**31)),
    )
