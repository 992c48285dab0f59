"""What tries and ops mean, by brute force: prefixes in a dict, sums over items, plain Python floats.

Shares no code and no data structure with the package, so agreement is evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NONE = -math.inf


def log_sum_exp(values: Sequence[float]) -> float:
    peak = max(values, default=NONE)
    return (
        peak if math.isinf(peak) else peak + math.log(math.fsum(math.exp(value - peak) for value in values))
    )


class DictTrie:
    """The trie of (N, L) rows: `prefixes[n]` is the prefix that node n stands for."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.paths = [tuple(token for token in row if token >= 0) for row in rows]
        prefixes = {path[:depth] for path in self.paths for depth in range(len(path) + 1)}
        self.prefixes = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
        self.number = {prefix: node for node, prefix in enumerate(self.prefixes)}
        self.parent = [self.number[prefix[:-1]] if prefix else -1 for prefix in self.prefixes]
        self._children: dict[int, dict[int, int]] = {node: {} for node in range(len(self.prefixes))}
        for node, prefix in enumerate(self.prefixes):
            if prefix:
                self._children[self.parent[node]][prefix[-1]] = node
        self.depth = max(map(len, prefixes))

    def __len__(self) -> int:
        return len(self.prefixes)

    def children(self, node: int) -> dict[int, int]:
        """token -> child node, ascending; none for a node off the trie."""
        return self._children.get(node, {})

    def ending_at(self, node: int) -> list[int]:
        return [item for item, path in enumerate(self.paths) if path == self.prefixes[node]]

    def under(self, node: int) -> list[int]:
        prefix = self.prefixes[node]
        return [item for item, path in enumerate(self.paths) if path[: len(prefix)] == prefix]

    def walk(self, tokens: Sequence[int], start: int = 0) -> list[int]:
        nodes = []
        for token in tokens:
            start = self.children(start).get(token, -1)
            nodes.append(start)
        return nodes

    def policy(self, logits: Sequence[float], node: int, temperature: float = 1.0) -> dict[int, float]:
        """token -> log-prob over the children of a node; an only child has 0 whatever its logit."""
        tokens = list(self.children(node))
        if len(tokens) == 1:
            return {tokens[0]: 0.0}
        values = [logits[token] / temperature for token in tokens]
        # Relative to the peak, so that even logits whose spacing exceeds log 2 keep their log-probs.
        peak = max(values, default=0.0)
        total = log_sum_exp([value - peak for value in values])
        return {token: value - peak - total for token, value in zip(tokens, values, strict=True)}

    def token_log_probs(
        self, logits: Sequence[Sequence[float]], tokens: Sequence[int], start: int = 0
    ) -> list[float]:
        log_probs: list[float] = []
        for row, token in zip(logits, tokens, strict=True):
            if token < 0:
                return log_probs + [0.0] * (len(tokens) - len(log_probs))
            log_probs.append(self.policy(row, start).get(token, NONE))
            start = self.children(start).get(token, -1)
        return log_probs

    def log_flows(self, log_rewards: Sequence[float]) -> list[float]:
        return [log_sum_exp([log_rewards[item] for item in self.under(node)]) for node in range(len(self))]

    def flow_matching(self, logits: Sequence[float], node: int, log_flows: Sequence[float]) -> float:
        children = self.children(node)
        flows = {token: log_flows[child] for token, child in children.items()}
        total = log_sum_exp(list(flows.values()))
        if len(children) < 2 or total == NONE:
            return 0.0
        policy = self.policy(logits, node)
        return math.fsum(
            math.exp(flow - total) * (flow - total - policy[token])
            for token, flow in flows.items()
            if flow > NONE
        )


def trajectory_balance(
    log_probs: Sequence[float], log_reward: float, log_z: float, mask: Sequence[bool] | None = None
) -> float:
    counted = [
        value for value, counts in zip(log_probs, mask or [True] * len(log_probs), strict=True) if counts
    ]
    return (log_z + sum(counted) - log_reward) ** 2


def log_partition_variance(
    log_probs: Sequence[Sequence[float]],
    log_rewards: Sequence[float],
    group_size: int,
    mask: Sequence[Sequence[bool]] | None = None,
) -> list[float]:
    losses = []
    for first in range(0, len(log_rewards), group_size):
        group = range(first, first + group_size)
        estimates = [
            log_rewards[i] - sum(p for t, p in enumerate(log_probs[i]) if mask is None or mask[i][t])
            for i in group
        ]
        mean = sum(estimates) / group_size
        losses += [(estimate - mean) ** 2 for estimate in estimates]
    return losses


def detailed_balance(
    log_probs: Sequence[float], log_flows: Sequence[float], mask: Sequence[bool] | None = None
) -> float:
    return sum(
        (log_flows[t] + log_probs[t] - log_flows[t + 1]) ** 2
        for t in range(len(log_probs))
        if mask is None or mask[t]
    )


def subtrajectory_balance(
    log_probs: Sequence[float], log_flows: Sequence[float], lam: float, mask: Sequence[bool] | None = None
) -> float:
    total = norm = 0.0
    for i in range(len(log_probs)):
        for j in range(i + 1, len(log_probs) + 1):
            if mask is None or all(mask[i:j]):
                residual = log_flows[i] + sum(log_probs[i:j]) - log_flows[j]
                total += lam ** (j - i - 1) * residual**2
                norm += lam ** (j - i - 1)
    return total / norm if norm else 0.0
