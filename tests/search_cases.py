"""A writer whose policy is a table, and what searches over it mean: in plain lists."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from filter_cases import Filtered
from torch import Tensor

from gflowgr import PrefixTrie
from gflowgr.ops.behaviour import Behaviour


class TableWriter:
    """Writes by a row of logits for each node of a small trie.

    Args:
        trie: of the nodes.
        table: (B, num_nodes, V).
    """

    def __init__(self, trie: PrefixTrie, table: Tensor) -> None:
        self.trie, self.table, self.depth = trie, table, 0
        self.nodes = torch.zeros(table.shape[0], 1, dtype=torch.int64, device=table.device)
        self.asked: list[int] = []

    @property
    def logits(self) -> Tensor:
        low, high = self.trie.token_ranges[self.depth]
        rows = self.nodes.unsqueeze(-1).expand(-1, -1, self.table.shape[-1])
        return self.table.gather(1, rows)[..., low : high + 1]

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        low, high = self.trie.token_ranges[self.depth]
        assert bool(((tokens >= low) & (tokens <= high)).all())
        assert bool(((parents >= 0) & (parents < self.nodes.shape[1])).all())
        self.nodes = (
            self.trie.walk(tokens.unsqueeze(-1), self.nodes.gather(1, parents)).squeeze(-1).clamp(min=0)
        )
        self.depth += 1
        self.asked.append(tokens.shape[1])
        return self.logits


def behaviour_by_definition(
    log_probs: Sequence[float], behaviour: Behaviour, item_count: Sequence[int]
) -> list[float]:
    """The probabilities that `behaviour` draws children with, from log P_F over them."""
    there = [child for child, value in enumerate(log_probs) if value > -math.inf]
    if not there:
        return [0.0] * len(log_probs)
    peak = max(log_probs)
    mass = {child: math.exp((log_probs[child] - peak) / behaviour.temperature) for child in there}
    ranked = sorted(there, key=lambda child: (-mass[child], child))[: behaviour.top_k]
    if behaviour.top_p is not None and behaviour.top_p < 1:
        whole, reached, kept = math.fsum(mass[child] for child in ranked), 0.0, []
        for child in ranked:
            kept.append(child)
            reached += mass[child]
            if reached >= behaviour.top_p * whole:
                break
        ranked = kept
    total = math.fsum(mass[child] for child in ranked)
    weight = {child: item_count[child] if behaviour.epsilon_over == "items" else 1 for child in there}
    return [
        (1 - behaviour.epsilon) * (mass[child] / total if child in ranked else 0.0)
        + behaviour.epsilon * weight.get(child, 0) / sum(weight.values())
        for child in range(len(log_probs))
    ]


class Oracle:
    """One context of a filtered catalogue, under a table of logits by node."""

    def __init__(self, case: Filtered, context: int, table: Sequence[Sequence[float]]) -> None:
        self.case, self.context, self.table = case, context, table
        self.left = case.left(context)

    def items(self, node: int) -> list[int]:
        """At or under a node, of those that the context may get, in the order of the trie."""
        under = self.case.oracle.under(node)
        found = [(self.case.oracle.paths[item], self.case.kept[item]) for item in under]
        return [item for _, item in sorted(found) if item in self.left]

    def ending_at(self, node: int) -> list[int]:
        return [self.case.kept[i] for i in self.case.oracle.ending_at(node) if self.case.kept[i] in self.left]

    def end(self, item: int) -> int:
        path = self.case.oracle.paths[self.case.kept.index(item)]
        return self.case.oracle.number[path]

    def steps(self, node: int) -> dict[int, float]:
        """child node -> log P_F."""
        policy = self.case.policy(self.context, list(self.table[node]), node)
        return {self.case.oracle.children(node)[token]: value for token, value in policy.items()}

    def log_prob(self, item: int) -> float:
        """Of the item: an equal part of what its tokens have."""
        path, node, total = self.case.oracle.paths[self.case.kept.index(item)], 0, 0.0
        for token in path:
            child = self.case.oracle.children(node)[token]
            total, node = total + self.steps(node)[child], child
        return total - math.log(len(self.ending_at(node)))

    def draws(self, behaviour: Behaviour) -> dict[int, float]:
        """item -> the probability that one draw gives it."""
        chances: dict[int, float] = {}
        open_nodes = [(0, 1.0)]
        while open_nodes:
            node, chance = open_nodes.pop()
            steps = self.steps(node)
            for item in () if steps else self.ending_at(node):
                chances[item] = chance / len(self.ending_at(node))
            counts = [len(self.items(child)) for child in steps]
            q = behaviour_by_definition(list(steps.values()), behaviour, counts)
            open_nodes += [(child, chance * each) for child, each in zip(steps, q, strict=True)]
        return {item: chance for item, chance in chances.items() if chance > 0}

    def beam_search(self, num_items: int, num_beams: int) -> list[tuple[float, int]]:
        """(log-prob, item), best first."""
        beams, found = [(0.0, 0)], []
        while beams:
            longer = [
                (score + step, child) for score, node in beams for child, step in self.steps(node).items()
            ]
            kept = sorted(longer, key=lambda beam: -beam[0])[:num_beams]
            beams = []
            for score, node in kept:
                decided = len({self.end(item) for item in self.items(node)}) == 1
                ending = self.items(node) if decided else self.ending_at(node)
                found += [(score - math.log(len(ending)), item) for item in ending]
                beams += [] if decided else [(score, node)]
        return sorted(found, key=lambda entry: -entry[0])[:num_items]
