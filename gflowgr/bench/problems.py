"""A configuration on a device in a dtype, and the inputs that are drawn for each op."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gflowgr import PrefixTrie, ops, reference
from gflowgr.bench.configurations import Configuration

Inputs = dict[str, Tensor]

FLOW_CONTEXTS = 16  # of one call of trie_log_flows: each holds a flow for every node of the catalogue


@dataclass(frozen=True)
class Problem:
    """One configuration on one device in one dtype: what inputs are drawn for and implementations read.

    `compiles` says that baselines under torch.compile were asked for.
    """

    configuration: Configuration
    sequences: Tensor
    trie: PrefixTrie
    dtype: torch.dtype
    backend: str
    generator: torch.Generator
    compiles: bool = False

    @property
    def device(self) -> torch.device:
        return self.generator.device

    @property
    def sums(self) -> torch.dtype:
        return reference.accumulation_dtype(self.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Trajectories and steps."""
        return self.configuration.contexts * self.configuration.group_size, self.configuration.levels

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        drawn = torch.randn(
            shape, generator=self.generator, device=self.device, dtype=reference.accumulation_dtype(dtype)
        )
        return drawn.mul_(scale).to(dtype)

    def items(self, count: int) -> Tensor:
        return torch.randint(len(self.sequences), (count,), generator=self.generator, device=self.device)

    def paths(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (n, L) of items and the node before each."""
        tokens = self.sequences[items].long()
        after = reference.trie_walk(tokens, torch.zeros_like(items), self.trie)
        return tokens, torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)


def _forbidden(problem: Problem, nodes: Tensor, padding: Tensor | None = None) -> Tensor:
    """Bool (..., V), True off the children of each node; all False where there is nothing to predict."""
    width = problem.configuration.vocab
    _, tokens, exists = reference.children(nodes, problem.trie)
    forbidden = torch.ones(*nodes.shape, width + 1, dtype=torch.bool, device=nodes.device)
    forbidden = forbidden.scatter_(-1, torch.where(exists, tokens, width), False)[..., :width].contiguous()
    return forbidden if padding is None else forbidden.masked_fill_(padding.unsqueeze(-1), False)


def _positions(problem: Problem) -> tuple[Tensor, Tensor]:
    """Nodes (rows,) on the way to random items, and the tokens (rows, L) that lead there, -1 after them."""
    rows, depth = problem.configuration.decode_rows, problem.configuration.depth
    if depth is None:
        tokens, before = problem.paths(problem.items(rows))
        reached = torch.rand(rows, generator=problem.generator, device=problem.device)
        depths = (reached * (tokens >= 0).sum(-1)).long()
    else:
        longer = torch.nonzero(problem.sequences[:, depth] >= 0).squeeze(1)
        chosen = torch.randint(len(longer), (rows,), generator=problem.generator, device=problem.device)
        tokens, before = problem.paths(longer[chosen])
        depths = torch.full((rows,), depth, device=problem.device)
    behind = torch.arange(tokens.shape[1], device=problem.device) < depths.unsqueeze(1)
    return before.gather(1, depths.unsqueeze(1)).squeeze(1), tokens.where(behind, -1)


def decode_inputs(problem: Problem) -> Inputs:
    """Rows at states of random items, at one depth or, as a beam meets them over the levels, at any."""
    rows, width = problem.configuration.decode_rows, problem.configuration.vocab
    nodes, _ = _positions(problem)
    forbidden = _forbidden(problem, nodes)
    grad = problem.normal(rows, width, dtype=problem.sums).masked_fill_(forbidden, 0.0)
    return {
        "logits": problem.normal(rows, width, scale=2.0), "nodes": nodes, "forbidden": forbidden, "grad": grad
    }  # fmt: skip


def sample_inputs(problem: Problem) -> Inputs:
    """The same without a gradient, and what the constrained decoders of others read."""
    rows, width = problem.configuration.decode_rows, problem.configuration.vocab
    nodes, prefixes = _positions(problem)
    forbidden = _forbidden(problem, nodes)
    return {
        "logits": problem.normal(rows, width, scale=2.0),
        "nodes": nodes,
        "prefixes": prefixes,
        "forbidden": forbidden,
        "bitmask": _bitmask(~forbidden),
    }


def _bitmask(allowed: Tensor) -> Tensor:
    """Bool (rows, V) as int32 (rows, ceil(V / 32)), the token 32 w + b in bit b of word w."""
    packed = np.packbits(allowed.cpu().numpy(), axis=1, bitorder="little")
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return torch.from_numpy(padded.view("<i4")).to(allowed.device)


def token_inputs(problem: Problem) -> Inputs:
    tokens, nodes = problem.paths(problem.items(problem.shape[0]))
    return {
        "logits": problem.normal(*problem.shape, problem.configuration.vocab, scale=2.0),
        "tokens": tokens,
        "nodes": nodes,
        "forbidden": _forbidden(problem, nodes, tokens < 0),
        "grad": problem.normal(*problem.shape, dtype=problem.sums),
    }


def trie_balance_inputs(problem: Problem) -> Inputs:
    inputs, trajectories = token_inputs(problem), problem.shape[0]
    del inputs["grad"]
    inputs["log_rewards"] = problem.normal(trajectories, dtype=problem.sums)
    return inputs | {"log_z": problem.normal(trajectories, dtype=problem.sums)}


def head_inputs(problem: Problem) -> Inputs:
    width, size = problem.configuration.vocab, problem.configuration.hidden
    tokens, nodes = problem.paths(problem.items(problem.shape[0]))
    return {
        "hidden": problem.normal(*problem.shape, size),
        "weight": problem.normal(width, size, scale=2.0 / math.sqrt(size)),
        "tokens": tokens,
        "nodes": nodes,
        "grad": problem.normal(*problem.shape, dtype=problem.sums),
    }


def reward_inputs(problem: Problem) -> Inputs:
    contexts = min(problem.configuration.contexts, FLOW_CONTEXTS)
    return {
        "log_rewards": problem.normal(contexts, problem.trie.num_items, dtype=problem.sums),
        "grad": problem.normal(contexts, problem.trie.num_nodes, dtype=problem.sums),
    }


def balance_inputs(problem: Problem) -> Inputs:
    trajectories, steps = problem.shape
    return {
        "log_probs": -problem.normal(trajectories, steps, dtype=problem.sums).abs_(),
        "log_rewards": problem.normal(trajectories, dtype=problem.sums),
        "log_z": problem.normal(trajectories, dtype=problem.sums),
    }


def flow_inputs(problem: Problem) -> Inputs:
    trajectories, steps = problem.shape
    return {
        "log_probs": -problem.normal(trajectories, steps, dtype=problem.sums).abs_(),
        "log_flows": problem.normal(trajectories, steps + 1, dtype=problem.sums),
    }


def flow_matching_inputs(problem: Problem) -> Inputs:
    contexts, width = problem.configuration.contexts, problem.configuration.vocab
    tokens, nodes = problem.paths(problem.items(problem.shape[0]))
    nodes = nodes.where(tokens >= 0, 0).view(contexts, -1)
    log_rewards = problem.normal(contexts, problem.trie.num_items, dtype=problem.sums)
    log_flows = ops.trie_log_flows(log_rewards, problem.trie)
    child, child_tokens, exists = reference.children(nodes, problem.trie)
    flows = log_flows.unsqueeze(1).expand(*nodes.shape, -1).gather(-1, child).where(exists, -torch.inf)
    target = log_flows.new_zeros(*nodes.shape, width + 1)
    target.scatter_(-1, torch.where(exists, child_tokens, width), flows.softmax(-1))
    return {
        "logits": problem.normal(*nodes.shape, width, scale=2.0),
        "nodes": nodes,
        "log_flows": log_flows,
        "forbidden": _forbidden(problem, nodes),
        "target": target[..., :width].contiguous(),
        "negative_entropy": target.xlogy(target).sum(-1),
    }


def catalogue_inputs(problem: Problem) -> Inputs:
    order = torch.randperm(len(problem.sequences), generator=problem.generator)
    return {"sequences": problem.sequences[order].long()}
