"""`gflowgr bench`: times every op beside plain PyTorch, paired in one run, after checking that it is right.

What is measured is a row of `CASES` on a row of `CONFIGURATIONS`; a baseline is a function in a case.
"""

from __future__ import annotations

import argparse
import csv
import gc
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import gflowgr
from gflowgr import PrefixTrie, ops, reference
from gflowgr.ops._registry import BACKENDS, HAS_CPP, resolve_backend
from gflowgr.trie import build_with_numpy

Inputs = dict[str, Tensor]
Call = Callable[["Problem", Inputs], Any]
TimedCall = Callable[[Inputs], Any]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
PASSES = ("forward", "forward+backward")
COLUMNS = (
    "date", "commit", "device", "cpu", "torch", "triton", "gflowgr",
    "op", "config", "dtype", "backend", "baseline", "threads", "pass",
    "median_ms", "p20_ms", "p80_ms", "ratio", "peak_bytes", "bytes_moved", "share_of_limit",
)  # fmt: skip
# Largest error relative to the largest value of a tensor: a few roundings of its dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
ROTATED_BYTES = (
    64 * 2**20
)  # what the input sets of a case should add up to: beyond the usual last-level cache
BLOCK_MS = 2.0  # a timed block repeats a short call until it lasts this long
WARM_UP_MS = 200.0  # an implementation is warm after three calls or this long
LEAST_ROUNDS = 3
FLOW_CONTEXTS = 16  # of one call of trie_log_flows: each holds a flow for every node of the catalogue


@dataclass(frozen=True)
class Configuration:
    """A catalogue and the sizes of a batch. Without `fanout`, codes are Zipf(.7) at each level."""

    name: str
    about: str
    items: int
    levels: int
    codes: int
    vocab: int
    decode_rows: int
    contexts: int
    group_size: int
    hidden: int
    dtypes: tuple[str, ...] = ("float32",)
    fanout: tuple[float, ...] | None = None
    shared_tokens: bool = False
    codes_file: str | None = None
    overrides: str = ""

    @property
    def label(self) -> str:
        return self.name + self.overrides

    def with_rows(self, rows: int) -> Configuration:
        group_size = min(self.group_size, max(1, rows // self.levels))
        contexts = max(1, rows // (self.levels * group_size))
        overrides = f"{self.overrides}:rows={rows}"
        return replace(self, decode_rows=rows, contexts=contexts, group_size=group_size, overrides=overrides)

    def with_vocab(self, vocab: int) -> Configuration:
        return replace(self, vocab=vocab, overrides=f"{self.overrides}:vocab={vocab}")

    def with_hidden(self, hidden: int) -> Configuration:
        return replace(self, hidden=hidden, overrides=f"{self.overrides}:hidden={hidden}")

    def with_codes(self, path: str, codes: np.ndarray) -> Configuration:
        return replace(
            self,
            items=codes.shape[0],
            levels=codes.shape[1],
            codes=int(codes.max()) + 1,
            codes_file=path,
            overrides=f"{self.overrides}:codes={Path(path).stem}",
        )


# Fan-outs are the mean children per node, level by level, of public semantic IDs: LETTER's for Beauty (1) and
# Yelp (5), residual k-means of a few thousand items (2). The batches of 2 and 5 are one context's, so that a
# run of everything takes minutes on two cores; --rows gives larger ones.
_LLM_VOCABULARY = 151_936
_BEAUTY, _OFFICE, _YELP = (197.0, 40.0, 1.47, 1.03), (256.0, 8.0, 1.75), (256.0, 62.0, 1.21, 1.004)
_ALL_CONFIGURATIONS = (
    Configuration(
        "1", "TIGER/LETTER, Beauty", 12_101, 4, 256, 1_024, 16 * 20, 256, 4, 128, fanout=_BEAUTY
    ),
    Configuration(
        "2", "MiniOneRec, whole LLM vocabulary", 3_686, 3, 256, _LLM_VOCABULARY, 50, 1, 16, 256,
        ("bfloat16",), _OFFICE,
    ),
    Configuration(
        "4", "YouTube/STATIC at a million items", 1_000_000, 8, 2_048, 2_048, 2 * 70, 2, 16, 256,
        shared_tokens=True,
    ),
    Configuration(
        "5", "TB fine-tuning, whole LLM vocabulary", 20_000, 4, 256, _LLM_VOCABULARY, 16, 1, 16, 256,
        ("bfloat16", "float32"), _YELP,
    ),
    Configuration(
        "5-sliced", "TB fine-tuning, sliced vocabulary", 20_000, 4, 256, 1_024, 16 * 20, 16, 16, 256,
        fanout=_YELP,
    ),
)  # fmt: skip
CONFIGURATIONS = {configuration.name: configuration for configuration in _ALL_CONFIGURATIONS}


def catalogue(configuration: Configuration, seed: int = 0) -> np.ndarray:
    """Token sequences (N, L) int64, -1 padded: the codes, set apart by level unless the levels share tokens.

    Codes of separate levels take the vocabulary's last tokens, as tokens added to a language model do.
    """
    if configuration.codes_file is not None:
        codes = read_codes(configuration.codes_file)
    elif configuration.fanout is not None:
        codes = shaped_codes(configuration.items, configuration.codes, configuration.fanout, seed)
    else:
        codes = zipf_codes(configuration.items, configuration.levels, configuration.codes, seed)
    offsets = level_offsets(configuration)
    return np.where(codes < 0, -1, codes + offsets)


def level_offsets(configuration: Configuration) -> np.ndarray:
    """The first token of each level: int64 (L,)."""
    shared = configuration.shared_tokens
    needed = configuration.codes if shared else configuration.codes * configuration.levels
    if needed > configuration.vocab:
        raise ValueError(
            f"vocab is {configuration.vocab}, needs at least {needed} for the codes of configuration "
            f"{configuration.label}"
        )
    steps = np.arange(configuration.levels)
    return 0 * steps if shared else configuration.vocab - needed + configuration.codes * steps


def read_codes(path: str) -> np.ndarray:
    """Codes (N, L) int64 of an .npy file, -1 padding the tails of shorter rows."""
    try:
        codes = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"codes is {path!r}, needs an .npy file of integers (N, L): {error}") from error
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.ndim != 2 or not codes.size:
        found = f"{codes.dtype} {codes.shape}" if isinstance(codes, np.ndarray) else "an archive"
        raise ValueError(f"codes {path!r} holds {found}, needs integers (N, L)")
    if codes.min() < -1:
        raise ValueError(
            f"codes {path!r} holds {codes.min()}, needs codes from 0 on, and -1 at the tails of rows"
        )
    return codes.astype(np.int64)


def zipf_codes(items: int, levels: int, codes: int, seed: int, exponent: float = 0.7) -> np.ndarray:
    """Codes (N, L), each drawn with probability proportional to rank^-exponent, ranks shuffled by level."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, codes + 1, dtype=np.float64) ** -exponent)
    drawn = np.searchsorted(cumulative, rng.random((items, levels)) * cumulative[-1], side="right")
    return np.column_stack([rng.permutation(codes)[drawn[:, level]] for level in range(levels)])


def shaped_codes(items: int, codes: int, fanout: Sequence[float], seed: int) -> np.ndarray:
    """Codes (N, L) whose trie has these mean children per node at each level, skewed; the rest collide."""
    rng = np.random.default_rng(seed)
    prefixes = np.zeros((1, 0), dtype=np.int64)
    for mean in fanout:
        nodes = min(round(mean * len(prefixes)), items, codes * len(prefixes))
        children = _skewed_counts(len(prefixes), nodes, codes, rng)
        parents = np.repeat(np.arange(len(prefixes)), children)
        prefixes = np.column_stack([prefixes[parents], _distinct_codes(children, codes, rng)])
    collisions = prefixes[rng.integers(len(prefixes), size=items - len(prefixes))]
    return rng.permutation(np.concatenate([prefixes, collisions]))


def _skewed_counts(parents: int, total: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """At least 1 and at most `most` for each parent, `total` in sum, log-normally uneven."""
    weights = rng.lognormal(sigma=1.5, size=parents)
    counts = np.ones(parents, dtype=np.int64)
    while (left := total - int(counts.sum())) > 0:
        share = np.where(counts < most, weights, 0.0)
        counts = np.minimum(counts + rng.multinomial(left, share / share.sum()), most)
    return counts


def _distinct_codes(children: np.ndarray, codes: int, rng: np.random.Generator) -> np.ndarray:
    """For each parent that many different codes, the popular ones more often (Gumbel top-k over Zipf(.7))."""
    popularity = -0.7 * np.log(1.0 + rng.permutation(codes))
    chunks = []
    for begin in range(0, len(children), 4096):
        counts = children[begin : begin + 4096]
        keys = popularity + rng.gumbel(size=(len(counts), codes))
        chunks.append(np.argsort(-keys, axis=1)[np.arange(codes) < counts[:, None]])
    return np.concatenate(chunks)


@cache
def _catalogue_of(configuration: Configuration) -> tuple[np.ndarray, PrefixTrie]:
    sequences = catalogue(configuration)
    return sequences, PrefixTrie(sequences)


@dataclass(frozen=True)
class Problem:
    """One configuration on one device in one dtype: what inputs are drawn for and implementations read."""

    configuration: Configuration
    sequences: Tensor
    trie: PrefixTrie
    dtype: torch.dtype
    backend: str
    generator: torch.Generator

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
        tokens = self.sequences[items]
        after = reference.trie_walk(tokens, torch.zeros_like(items), self.trie)
        return tokens, torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)


def _forbidden(problem: Problem, nodes: Tensor, padding: Tensor | None = None) -> Tensor:
    """Bool (..., V), True off the children of each node; all False where there is nothing to predict."""
    width = problem.configuration.vocab
    _, tokens, exists = reference.children(nodes, problem.trie)
    forbidden = torch.ones(*nodes.shape, width + 1, dtype=torch.bool, device=nodes.device)
    forbidden = forbidden.scatter_(-1, torch.where(exists, tokens, width), False)[..., :width].contiguous()
    return forbidden if padding is None else forbidden.masked_fill_(padding.unsqueeze(-1), False)


def decode_inputs(problem: Problem) -> Inputs:
    """Rows at states of random items and depths, as a beam meets them over the levels."""
    rows, width = problem.configuration.decode_rows, problem.configuration.vocab
    tokens, before = problem.paths(problem.items(rows))
    depth = torch.rand(rows, generator=problem.generator, device=problem.device) * (tokens >= 0).sum(-1)
    nodes = before.gather(1, depth.long().unsqueeze(1)).squeeze(1)
    forbidden = _forbidden(problem, nodes)
    grad = problem.normal(rows, width, dtype=problem.sums).masked_fill_(forbidden, 0.0)
    return {
        "logits": problem.normal(rows, width, scale=2.0), "nodes": nodes, "forbidden": forbidden, "grad": grad
    }  # fmt: skip


def sample_inputs(problem: Problem) -> Inputs:
    inputs = decode_inputs(problem)
    del inputs["grad"]
    return inputs


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
    return {
        "sequences": problem.sequences[torch.randperm(len(problem.sequences), generator=problem.generator)]
    }


# The baselines. Masks and dense targets come ready made, in the baselines' favour.


def _masked_log_softmax(inputs: Inputs) -> Tensor:
    logits = inputs["logits"].masked_fill(inputs["forbidden"], -torch.inf)
    return torch.log_softmax(logits, -1, dtype=reference.accumulation_dtype(logits.dtype))


def _masked_token_log_probs(inputs: Inputs) -> Tensor:
    tokens = inputs["tokens"]
    chosen = _masked_log_softmax(inputs).gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(tokens < 0, 0.0)


def floor(problem: Problem, inputs: Inputs) -> Tensor:
    """The unmasked log_softmax over the same logits; one column of it unless the op's result is dense."""
    log_probs = torch.log_softmax(inputs["logits"], -1)
    dense = "grad" in inputs and inputs["grad"].shape == log_probs.shape
    return log_probs if dense else log_probs.select(-1, 0)


def masked_log_softmax(problem: Problem, inputs: Inputs) -> Tensor:
    return _masked_log_softmax(inputs)


def masked_token_log_probs(problem: Problem, inputs: Inputs) -> Tensor:
    return _masked_token_log_probs(inputs)


def masked_sample(problem: Problem, inputs: Inputs) -> tuple[Tensor, None, Tensor]:
    """Draws the token only; the step to its node, which the op takes too, is left out."""
    log_probs = _masked_log_softmax(inputs)
    tokens = torch.multinomial(log_probs.exp(), 1, generator=problem.generator)
    return tokens.squeeze(-1), None, log_probs.gather(-1, tokens).squeeze(-1)


def masked_trajectory_balance(problem: Problem, inputs: Inputs) -> Tensor:
    total = _masked_token_log_probs(inputs).sum(-1)
    return (inputs["log_z"] + total - inputs["log_rewards"]).square().mean()


def masked_flow_matching(problem: Problem, inputs: Inputs) -> Tensor:
    log_probs = _masked_log_softmax(inputs).masked_fill(inputs["forbidden"], 0.0)
    return (inputs["negative_entropy"] - (inputs["target"] * log_probs).sum(-1)).mean()


def full_head(problem: Problem, inputs: Inputs) -> Tensor:
    """The whole head and the softmax over the whole vocabulary, as supervised fine-tuning has it."""
    logits = F.linear(inputs["hidden"], inputs["weight"])
    log_probs = torch.log_softmax(logits, -1, dtype=problem.sums)
    return log_probs.gather(-1, inputs["tokens"].clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _nbytes(inputs: Inputs, *names: str) -> int:
    return sum(inputs[name].nbytes for name in names)


def _children_read(problem: Problem, nodes: Tensor, bytes_each: int) -> int:
    """The pointers of each row's node, and token and value of each child where there is a choice."""
    first, end = reference.child_range(nodes, problem.trie)
    counts = end - first
    return int(counts[counts > 1].sum()) * (4 + bytes_each) + 8 * nodes.numel()


def policy_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Children's logits, tokens and results; backward the same again and the dense gradient."""
    nodes, logits = inputs["nodes"], inputs["logits"]
    forward = _children_read(problem, nodes, logits.element_size()) + nodes.numel() * (
        8 + problem.sums.itemsize
    )
    return 2 * forward + logits.nbytes if backward else forward


def log_softmax_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    logits, nodes = inputs["logits"], inputs["nodes"]
    forward = _children_read(problem, nodes, logits.element_size()) + logits.numel() * problem.sums.itemsize
    again = _children_read(problem, nodes, 2 * problem.sums.itemsize) + logits.nbytes
    return forward + again if backward else forward


def sample_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    return policy_bytes(problem, inputs, backward) + 3 * 8 * inputs["nodes"].numel()


def flow_matching_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    flows = _children_read(problem, inputs["nodes"], problem.sums.itemsize - 4)
    return policy_bytes(problem, inputs, backward) + (2 * flows if backward else flows)


def head_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Hidden states and the head's rows of the trie's tokens; backward again, and both whole gradients."""
    rows = torch.unique(problem.trie.token[1:]).numel()
    read = inputs["hidden"].nbytes + rows * inputs["weight"][0].nbytes + _nbytes(inputs, "tokens", "grad")
    return 2 * read + _nbytes(inputs, "hidden", "weight") if backward else read


def head_operations(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Multiplications and additions of a head sliced to each depth's tokens."""
    trajectories, size = inputs["hidden"].shape[0], inputs["hidden"].shape[-1]
    forward = sum(2 * trajectories * size * (high - low + 1) for low, high in problem.trie.token_ranges)
    return 3 * forward if backward else forward


def log_flows_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    """Rewards and flows, and the trie once; backward reads both and the gradient, and writes the rewards'."""
    values, flows = inputs["log_rewards"].nbytes, inputs["grad"].nbytes
    arrays = problem.trie.item_order.nbytes + problem.trie.first_child.nbytes
    return 3 * values + 3 * flows + 2 * arrays if backward else values + flows + arrays


def _plain_bytes(*names: str) -> Callable[[Problem, Inputs, bool], int]:
    """Every input once and a gradient for each."""
    return lambda problem, inputs, backward: _nbytes(inputs, *names) * (2 if backward else 1)


def catalogue_bytes(problem: Problem, inputs: Inputs, backward: bool) -> int:
    return inputs["sequences"].nbytes + problem.trie.nbytes


class WrongResultError(RuntimeError):
    """An implementation differs from the float64 definition, so its time means nothing."""


def _in_float64(inputs: Inputs) -> Inputs:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def _with_gradients(case: Case, inputs: Inputs) -> Inputs:
    return {name: value.detach().requires_grad_(name in case.gradients) for name, value in inputs.items()}


def _upstream(result: Tensor, inputs: Inputs) -> Tensor:
    given = inputs.get("grad")
    return torch.ones_like(result) if given is None or given.shape != result.shape else given.to(result.dtype)


def _differentiated(case: Case, call: Call, problem: Problem, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The result, and the gradient of each input that is differentiated."""
    inputs = _with_gradients(case, inputs)
    result = call(problem, inputs)
    if not result.requires_grad:
        raise WrongResultError("the result has no gradient")
    wanted = [inputs[name] for name in case.gradients]
    gradients = torch.autograd.grad(result, wanted, _upstream(result, inputs), allow_unused=True)
    return result.detach(), *gradients


def expected(case: Case, problem: Problem, inputs: Inputs) -> tuple[Tensor | None, ...] | None:
    """What the definition gives at float64, for `check`; None where a case has its own way."""
    if case.verify is not None:
        return None
    return _differentiated(case, case.definition, problem, _in_float64(inputs))


def check(
    case: Case, call: Call, problem: Problem, inputs: Inputs, exact: tuple[Tensor | None, ...] | None
) -> None:
    """Compares results and gradients of `call` with `exact`, those of the definition at float64.

    Raises:
        WrongResultError: they differ by more than a few roundings; the message says what and by how much.
    """
    if case.verify is not None:
        return case.verify(call, problem, inputs)
    assert exact is not None
    found = _differentiated(case, call, problem, inputs)
    for name, got, wanted in zip(("the result", *case.gradients), found, exact, strict=True):
        what = name if name == "the result" else f"the gradient of {name}"
        if got is None or wanted is None:
            raise WrongResultError(f"{what} is missing")
        _compare(what, got, wanted, problem.dtype if case.rounds_logits else got.dtype)
    return None


def _compare(what: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    if got.shape != wanted.shape:
        raise WrongResultError(f"{what} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
    errors, sizes = [], []
    # In pieces that stay in the cache: the tensors can be as large as the vocabulary times the batch.
    for ours, exact in zip(got.flatten().split(2**18), wanted.flatten().split(2**18), strict=True):
        ours, finite = ours.double(), exact.isfinite()
        if not bool((finite | (ours == exact)).all()):
            raise WrongResultError(f"{what} is not infinite where the definition is")
        errors.append(torch.where(finite, ours - exact, 0.0).abs().max())
        sizes.append(torch.where(finite, exact, 0.0).abs().max())
    error, largest = float(torch.stack(errors).max()), float(torch.stack(sizes).max())
    allowed = TOLERANCE[dtype] * largest
    if not error <= allowed:
        raise WrongResultError(f"{what} is off by {error:.3g}, {allowed:.3g} is allowed")


def check_sample(call: Call, problem: Problem, inputs: Inputs) -> None:
    """Draws must be children, lead to their nodes, carry their log-probs and agree with the definition's."""
    exact, nodes = _in_float64(inputs), inputs["nodes"]
    state = problem.generator.get_state()
    tokens, reached, log_probs = call(problem, inputs)
    problem.generator.set_state(state)
    wanted_tokens = _reference_sample(problem, exact)[0]
    walked = reference.trie_walk(tokens.unsqueeze(-1), nodes, problem.trie).squeeze(-1)
    if (walked < 0).any():
        raise WrongResultError("a draw is no child of its node")
    wanted = reference.trie_log_softmax(exact["logits"], nodes, problem.trie).gather(-1, tokens.unsqueeze(-1))
    _compare("log_probs", log_probs, wanted.squeeze(-1), log_probs.dtype)
    if reached is None:
        return
    if not torch.equal(reached, walked):
        raise WrongResultError("a draw leads to another node than the one returned")
    agreement = float((tokens == wanted_tokens).double().mean())
    if agreement < 0.98:
        raise WrongResultError(
            f"only {agreement:.1%} of the draws are those of the definition at the same seed"
        )


def check_build(call: Call, problem: Problem, inputs: Inputs) -> None:
    built = call(problem, inputs)
    for name, wanted in build_with_numpy(inputs["sequences"].numpy()).items():
        got = built[name] if isinstance(built, dict) else getattr(built, name).numpy()
        if not np.array_equal(got, wanted):
            raise WrongResultError(f"the array {name} differs from the definition's")


@dataclass(frozen=True)
class Baseline:
    """Something to be timed beside the op; `checked` says that it computes the same."""

    run: Call
    checked: bool = True


@dataclass(frozen=True)
class Case:
    """An op: its inputs, the call that is measured, the definition that it is checked against, its baselines.

    `configs` are where it is measured unless asked otherwise, `gradients` the inputs that are differentiated.
    `kernel` is the op whose backends serve it, if another; `only_backend` that of an op without a choice.
    `verify` replaces the comparison with `definition`, `builds_trie` says that the memory is the trie's.
    `rounds_logits` marks results that cannot be more exact than logits in the inputs' dtype.
    """

    op: str
    configs: tuple[str, ...]
    inputs: Callable[[Problem], Inputs]
    candidate: Call
    definition: Call
    bytes_moved: Callable[[Problem, Inputs, bool], int]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    operations: Callable[[Problem, Inputs, bool], int] | None = None
    takes_logits: bool = True
    rounds_logits: bool = False
    kernel: str | None = None
    only_backend: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    verify: Callable[[Call, Problem, Inputs], None] | None = None
    builds_trie: bool = False


def _start(inputs: Inputs) -> Tensor:
    return torch.zeros_like(inputs["tokens"][:, 0])


def _reference_trie_balance(problem: Problem, x: Inputs) -> Tensor:
    log_probs = reference.trie_token_log_probs(x["logits"], x["tokens"], problem.trie, _start(x))
    residual = reference.trajectory_balance_residual(log_probs, x["log_rewards"], x["log_z"], None)
    return residual.square().mean()


def _reference_sample(problem: Problem, x: Inputs) -> tuple[Tensor, ...]:
    uniform = torch.rand(
        x["nodes"].shape, generator=problem.generator, device=problem.device, dtype=torch.float64
    )
    return reference.trie_sample(x["logits"], x["nodes"], problem.trie, uniform, 1.0)


_FLOOR = Baseline(floor, checked=False)
_ALL_CASES = (
    Case(
        "trie_log_softmax",
        ("1", "2", "4"),
        decode_inputs,
        lambda p, x: ops.trie_log_softmax(x["logits"], x["nodes"], p.trie, backend=p.backend),
        lambda p, x: reference.trie_log_softmax(x["logits"], x["nodes"], p.trie),
        log_softmax_bytes,
        {"dense_mask": Baseline(masked_log_softmax), "floor": _FLOOR},
        ("logits",),
    ),
    Case(
        "trie_sample",
        ("1", "2", "4"),
        sample_inputs,
        lambda p, x: ops.trie_sample(
            x["logits"], x["nodes"], p.trie, generator=p.generator, backend=p.backend
        ),
        _reference_sample,
        sample_bytes,
        {"dense_mask": Baseline(masked_sample), "floor": _FLOOR},
        verify=check_sample,
    ),
    Case(
        "trie_token_log_probs",
        ("1", "2", "5", "5-sliced"),
        token_inputs,
        lambda p, x: ops.trie_token_log_probs(x["logits"], x["tokens"], p.trie, backend=p.backend),
        lambda p, x: reference.trie_token_log_probs(x["logits"], x["tokens"], p.trie, _start(x)),
        policy_bytes,
        {"dense_mask": Baseline(masked_token_log_probs), "floor": _FLOOR},
        ("logits",),
    ),
    Case(
        "trie_linear_token_log_probs",
        ("1", "2", "5"),
        head_inputs,
        lambda p, x: ops.trie_linear_token_log_probs(
            x["hidden"], x["weight"], x["tokens"], p.trie, backend=p.backend
        ),
        lambda p, x: reference.trie_linear_token_log_probs(
            x["hidden"], x["weight"], x["tokens"], p.trie, None, _start(x)
        ),
        head_bytes,
        {"lm_head": Baseline(full_head, checked=False)},
        ("hidden", "weight"),
        operations=head_operations,
        rounds_logits=True,
        kernel="trie_token_log_probs",
    ),
    Case(
        "trie_trajectory_balance",
        ("1", "2", "5", "5-sliced"),
        trie_balance_inputs,
        lambda p, x: ops.trie_trajectory_balance(
            x["logits"], x["tokens"], p.trie, x["log_rewards"], x["log_z"], backend=p.backend
        ),
        _reference_trie_balance,
        policy_bytes,
        {"dense_mask": Baseline(masked_trajectory_balance), "floor": _FLOOR},
        ("logits", "log_z"),
    ),
    Case(
        "flow_matching",
        ("1", "5", "5-sliced"),
        flow_matching_inputs,
        lambda p, x: ops.flow_matching(x["logits"], x["nodes"], p.trie, x["log_flows"], backend=p.backend),
        lambda p, x: reference.flow_matching(x["logits"], x["nodes"], p.trie, x["log_flows"]).mean(),
        flow_matching_bytes,
        {"dense_mask": Baseline(masked_flow_matching), "floor": _FLOOR},
        ("logits",),
    ),
    Case(
        "trie_log_flows",
        ("1", "5-sliced"),
        reward_inputs,
        lambda p, x: ops.trie_log_flows(x["log_rewards"], p.trie, backend=p.backend),
        lambda p, x: reference.trie_log_flows(x["log_rewards"], p.trie),
        log_flows_bytes,
        gradients=("log_rewards",),
        takes_logits=False,
    ),
    Case(
        "trajectory_balance",
        ("1", "5-sliced"),
        balance_inputs,
        lambda p, x: ops.trajectory_balance(x["log_probs"], x["log_rewards"], x["log_z"], backend=p.backend),
        lambda p, x: (
            reference.trajectory_balance_residual(x["log_probs"], x["log_rewards"], x["log_z"], None)
            .square()
            .mean()
        ),
        _plain_bytes("log_probs", "log_rewards", "log_z"),
        gradients=("log_probs", "log_z"),
        takes_logits=False,
    ),
    Case(
        "log_partition_variance",
        ("1", "5-sliced"),
        balance_inputs,
        lambda p, x: ops.log_partition_variance(
            x["log_probs"], x["log_rewards"], group_size=p.configuration.group_size
        ),
        lambda p, x: reference.log_partition_variance(
            x["log_probs"], x["log_rewards"], p.configuration.group_size, None
        ).mean(),
        _plain_bytes("log_probs", "log_rewards"),
        gradients=("log_probs",),
        takes_logits=False,
        only_backend="torch",
    ),
    Case(
        "detailed_balance",
        ("1", "5-sliced"),
        flow_inputs,
        lambda p, x: ops.detailed_balance(x["log_probs"], x["log_flows"]),
        lambda p, x: reference.detailed_balance(x["log_probs"], x["log_flows"], None).mean(),
        _plain_bytes("log_probs", "log_flows"),
        gradients=("log_probs", "log_flows"),
        takes_logits=False,
        only_backend="torch",
    ),
    Case(
        "subtrajectory_balance",
        ("1", "5-sliced"),
        flow_inputs,
        lambda p, x: ops.subtrajectory_balance(x["log_probs"], x["log_flows"]),
        lambda p, x: reference.subtrajectory_balance(x["log_probs"], x["log_flows"], 0.9, None).mean(),
        _plain_bytes("log_probs", "log_flows"),
        gradients=("log_probs", "log_flows"),
        takes_logits=False,
        only_backend="torch",
    ),
    Case(
        "trie_build",
        ("4",),
        catalogue_inputs,
        lambda p, x: PrefixTrie(x["sequences"]),
        lambda p, x: build_with_numpy(x["sequences"].numpy()),
        catalogue_bytes,
        takes_logits=False,
        only_backend="cpp" if HAS_CPP else "torch",
        devices=("cpu",),
        verify=check_build,
        builds_trie=True,
    ),
)
CASES = {case.op: case for case in _ALL_CASES}


@dataclass(frozen=True)
class Measurement:
    """One implementation of one case: a row of the table. `baseline` is "" for the op itself."""

    op: str
    config: str
    dtype: str
    backend: str
    baseline: str
    threads: int
    direction: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    peak_bytes: int
    bytes_moved: int
    share_of_limit: float


@dataclass(frozen=True)
class Report:
    measurements: list[Measurement]
    refused: list[str]


def _block_ms(call: TimedCall, sets: Sequence[Inputs], first: int, count: int, cuda: bool) -> float:
    """Milliseconds a call, over `count` calls that take the input sets in turn."""
    if cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for index in range(first, first + count):
            call(sets[index % len(sets)])
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / count
    started = time.perf_counter_ns()
    for index in range(first, first + count):
        call(sets[index % len(sets)])
    return (time.perf_counter_ns() - started) / count / 1e6


def paired_rounds(
    calls: Mapping[str, TimedCall], sets: Sequence[Inputs], rounds: int, seconds: float, cuda: bool
) -> dict[str, list[float]]:
    """Milliseconds a call of each implementation in each round; a round runs all, another one first.

    Rounds end after `seconds`, but not before the third.
    """
    repeats = {name: _warm_up(call, sets, cuda) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collects = gc.isenabled()
    gc.disable()
    started = time.perf_counter()
    try:
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
                break
            for name in order:
                times[name].append(_block_ms(calls[name], sets, turn * repeats[name], repeats[name], cuda))
            order.append(order.pop(0))
    finally:
        if collects:
            gc.enable()
    return times


def _warm_up(call: TimedCall, sets: Sequence[Inputs], cuda: bool) -> int:
    """Calls until it is warm; how many calls make a timed block."""
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < WARM_UP_MS:
        taken.append(_block_ms(call, sets, len(taken), 1, cuda))
    return max(1, math.ceil(BLOCK_MS / max(taken[-1], 1e-6)))


def peak_bytes(run: Callable[[], Any], cuda: bool) -> int:
    """The most memory that tensors made by `run` held at once."""
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with _silent_stderr(), torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            run()
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in trace if event.get("name") == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler's C++ logs two lines each time, past Python's sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(sink)
        os.close(kept)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a millisecond that a copy reads and writes here, at the number of threads in force."""
    source = torch.zeros(128 * 2**20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = paired_rounds({"copy": lambda _: target.copy_(source)}, [{}], 9, 2.0, device.type == "cuda")[
        "copy"
    ]
    return 2 * source.nbytes / statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a millisecond that a square matrix product does here."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.ones(size, size, dtype=dtype, device=device)
    times = paired_rounds({"matmul": lambda _: left @ left}, [{}], 5, 2.0, device.type == "cuda")["matmul"]
    return 2 * size**3 / statistics.median(times)


def _input_sets(case: Case, problem: Problem, rounds: int) -> list[Inputs]:
    sets = [_with_gradients(case, case.inputs(problem))]
    size = sum(value.nbytes for value in sets[0].values())
    wanted = min(max(3, math.ceil(ROTATED_BYTES / max(size, 1))), 16, max(rounds, 2))
    return sets + [_with_gradients(case, case.inputs(problem)) for _ in range(wanted - 1)]


def _timed_call(case: Case, run: Call, problem: Problem, backward: bool) -> TimedCall:
    def forward(inputs: Inputs) -> None:
        with torch.no_grad():
            run(problem, inputs)

    def both(inputs: Inputs) -> None:
        result = run(problem, inputs)
        wanted = [inputs[name] for name in case.gradients]
        torch.autograd.grad(result, wanted, _upstream(result, inputs), allow_unused=True)

    return both if backward else forward


@dataclass(frozen=True)
class Limits:
    """What this machine does at a number of threads: bytes and operations a millisecond."""

    bandwidth: float
    rate: Callable[[torch.dtype], float]

    def least_ms(self, case: Case, problem: Problem, inputs: Inputs, backward: bool) -> float:
        moving = case.bytes_moved(problem, inputs, backward) / self.bandwidth
        if case.operations is None:
            return moving
        return max(moving, case.operations(problem, inputs, backward) / self.rate(problem.dtype))


def limits_here(device: torch.device, threads: int) -> Limits:
    torch.set_num_threads(threads)
    return Limits(copy_bandwidth(device), cache(partial(_matmul_rate_at, device, threads)))


def _matmul_rate_at(device: torch.device, threads: int, dtype: torch.dtype) -> float:
    torch.set_num_threads(threads)
    return matmul_rate(device, dtype)


def measure(
    case: Case, problem: Problem, threads: int, rounds: int, seconds: float, limits: Limits
) -> list[Measurement]:
    """Checks the op and its baselines on one fresh input, then times them on others, in turn.

    Raises:
        WrongResultError: the op or a baseline is wrong; nothing of the case is reported then.
    """
    runs = {"": case.candidate, "reference": case.definition}
    runs |= {name: baseline.run for name, baseline in case.baselines.items()}
    inputs = case.inputs(problem)
    exact = expected(case, problem, inputs)
    for name, run in runs.items():
        if name in case.baselines and not case.baselines[name].checked:
            continue
        try:
            check(case, run, problem, inputs, exact)
        except WrongResultError as error:
            raise WrongResultError(f"{name or 'the op'}: {error}") from error
    del inputs, exact
    cuda = problem.device.type == "cuda"
    label = problem.configuration.label + (f":nodes={problem.trie.num_nodes}" if case.builds_trie else "")
    sets = _input_sets(case, problem, rounds)
    found = []
    for direction in PASSES if case.gradients else PASSES[:1]:
        backward = direction != "forward"
        calls = {name: _timed_call(case, run, problem, backward) for name, run in runs.items()}
        times = paired_rounds(calls, sets, rounds, seconds, cuda)
        least = limits.least_ms(case, problem, sets[0], backward)
        for name, taken in times.items():
            median = statistics.median(taken)
            once = partial(calls[name], sets[0])
            peak = problem.trie.nbytes if case.builds_trie else peak_bytes(once, cuda)
            found.append(
                Measurement(
                    op=case.op,
                    config=label,
                    dtype=str(problem.dtype).removeprefix("torch."),
                    backend=problem.backend,
                    baseline=name,
                    threads=threads,
                    direction=direction,
                    median_ms=median,
                    p20_ms=float(np.quantile(taken, 0.2)),
                    p80_ms=float(np.quantile(taken, 0.8)),
                    ratio=statistics.median(mine / own for mine, own in zip(taken, times[""], strict=True)),
                    peak_bytes=peak,
                    bytes_moved=case.bytes_moved(problem, sets[0], backward),
                    share_of_limit=least / median,
                )
            )
    return found


@dataclass(frozen=True)
class Job:
    """A case on a configuration, in a dtype, by a backend."""

    configuration: Configuration
    case: Case
    dtype: torch.dtype
    backend: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.op} on configuration {self.configuration.label}, {dtype}, {self.backend}"


@dataclass(frozen=True)
class Plan:
    """What a run measures, after its arguments are found good; `skipped` says what cannot be and why."""

    jobs: list[Job]
    skipped: list[str]
    device: torch.device
    threads: tuple[int, ...]
    rounds: int
    seconds: float
    output: Path | None
    seed: int


def plan(
    *,
    op: Sequence[str] | None = None,
    config: Sequence[str] | None = None,
    rows: int | None = None,
    vocab: int | None = None,
    hidden: int | None = None,
    codes: str | os.PathLike[str] | None = None,
    dtype: Sequence[str] | None = None,
    device: str | None = None,
    backend: str = "auto",
    threads: Sequence[int] | None = None,
    rounds: int = 20,
    seconds: float = 2.0,
    output: str | os.PathLike[str] | None = None,
    seed: int | None = None,
) -> Plan:
    """Checks the arguments of `benchmark`.

    Raises:
        ValueError: an argument, what it is and what it needs.
    """
    for name, given, known in (
        ("op", op, CASES),
        ("config", config, CONFIGURATIONS),
        ("dtype", dtype, DTYPES),
    ):
        for value in given or ():
            if value not in known:
                raise ValueError(f"{name} is {value!r}, needs some of {', '.join(known)}")
    numbers = (("rows", rows), ("vocab", vocab), ("hidden", hidden), ("rounds", rounds))
    for name, number in (*numbers, *(("threads", count) for count in threads or ())):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, needs at least 1")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}, needs a number above 0")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, needs one of {', '.join(BACKENDS)}")
    place = _device(device)
    configurations = {}
    for name in config or CONFIGURATIONS:
        chosen = CONFIGURATIONS[name]
        if codes is not None:
            chosen = chosen.with_codes(os.fspath(codes), read_codes(os.fspath(codes)))
        chosen = chosen if rows is None else chosen.with_rows(rows)
        chosen = chosen if vocab is None else chosen.with_vocab(vocab)
        chosen = chosen if hidden is None else chosen.with_hidden(hidden)
        level_offsets(chosen)
        if codes is not None:
            _catalogue_of(chosen)
        configurations[name] = chosen
    everywhere = op is not None and config is not None
    jobs, skipped = [], []
    for name, chosen in configurations.items():
        for case in map(CASES.__getitem__, op or CASES):
            if not (everywhere or name in case.configs):
                continue
            try:
                served_by = _backend_of(case, backend, place)
            except RuntimeError as error:
                skipped.append(str(error))
                continue
            jobs += [Job(chosen, case, each, served_by) for each in _dtypes_of(case, dtype or chosen.dtypes)]
    if not jobs:
        raise ValueError(f"op, config and backend leave nothing to measure: {'; '.join(skipped)}")
    default_threads = (1, 2) if place.type == "cpu" and (os.cpu_count() or 1) > 1 else (1,)
    return Plan(
        jobs=jobs,
        skipped=list(dict.fromkeys(skipped)),
        device=place,
        threads=tuple(dict.fromkeys(threads or default_threads)),
        rounds=rounds,
        seconds=seconds,
        output=None if output is None else _appendable(Path(output)),
        seed=int.from_bytes(os.urandom(4), "little") if seed is None else seed,
    )


def _dtypes_of(case: Case, names: Sequence[str]) -> list[torch.dtype]:
    """The dtypes to measure in; what follows the logits is at least float32."""
    dtypes = (DTYPES[name] for name in names)
    return list(dict.fromkeys(d if case.takes_logits else reference.accumulation_dtype(d) for d in dtypes))


def _backend_of(case: Case, wanted: str, device: torch.device) -> str:
    if case.only_backend is None:
        return resolve_backend(wanted, case.kernel or case.op, device)
    if wanted not in ("auto", case.only_backend):
        raise RuntimeError(f"{case.op} has the backend {case.only_backend} only, not {wanted}")
    if device.type not in case.devices:
        raise RuntimeError(f"{case.op} runs on {' or '.join(case.devices)}, not on {device}")
    return case.only_backend


def problem_of(job: Job, device: torch.device, seed: int) -> Problem:
    """The inputs' source: the same catalogue each time, and the same draws for the same seed."""
    sequences, trie = _catalogue_of(job.configuration)
    generator = torch.Generator(device).manual_seed(seed)
    return Problem(
        job.configuration,
        torch.from_numpy(sequences).to(device),
        trie.to(device),
        job.dtype,
        job.backend,
        generator,
    )


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, needs cpu or cuda") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, needs cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but this PyTorch sees no CUDA device")
    return place


def _appendable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"output is {str(path)!r}, needs a file in a folder that exists")
    if path.is_dir() or (path.exists() and _header(path) != list(COLUMNS)):
        raise ValueError(
            f"output {str(path)!r} is no table of benchmarks, whose first line is {','.join(COLUMNS)}"
        )
    return path


def _header(path: Path) -> list[str]:
    with path.open(newline="", errors="replace") as file:
        return next(csv.reader(file), [])


def append_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Appends to the table at `path`, or makes it; an interruption leaves the table as it was."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    before = path.read_bytes() if path.exists() else b""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(before + text.getvalue().encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def machine(device: torch.device) -> dict[str, str]:
    """The columns that say where and with what a run was made."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gflowgr": gflowgr.__version__,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout that this file runs from, "" when it is installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "gflowgr", "kernels", "csrc")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def csv_row(measurement: Measurement, where: Mapping[str, str]) -> dict[str, str]:
    values = {"pass": measurement.direction, **vars(measurement)}
    texts = {
        name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()
    }
    return {name: where[name] if name in where else texts[name] for name in COLUMNS}


_LINE = "{:<27} {:<16} {:<9} {:<7} {:<16} {:>3}  {:<11}{:>10}{:>10}{:>10}{:>9}{:>10}{:>10}{:>8}"
_TITLES = (
    "op", "config", "dtype", "backend", "pass", "thr", "",
    "median ms", "p20", "p80", "ratio", "peak", "moves", "limit",
)  # fmt: skip


def table_line(measurement: Measurement) -> str:
    """A line of the printed table; a baseline's does not repeat what the op's above it says."""
    m = measurement
    what = ("",) * 6 if m.baseline else (m.op, m.config, m.dtype, m.backend, m.direction, m.threads)
    times = (f"{value:.4g}" for value in (m.median_ms, m.p20_ms, m.p80_ms))
    rest = (f"{m.ratio:.2f}x", _size(m.peak_bytes), _size(m.bytes_moved), f"{m.share_of_limit:.1%}")
    return _LINE.format(*what, m.baseline or "gflowgr", *times, *rest)


def _trie_line(trie: PrefixTrie) -> str:
    each_node, each_item = trie.nbytes / trie.num_nodes, trie.nbytes / trie.num_items
    sizes = f"{each_node:.1f} bytes a node, {each_item:.1f} an item"
    return f"  {trie.num_items} items, {trie.num_nodes} nodes: {sizes}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def run(plan: Plan, write: Callable[[str], None] = print) -> Report:
    """Measures what `plan` asks for, hands `write` the table line by line and appends it to `plan.output`."""
    where = machine(plan.device)
    versions = ("gflowgr", "commit", "torch", "triton")
    write(", ".join(f"{name} {where[name] or 'none'}" for name in versions))
    write(f"{where['cpu']}; device {where['device']}; {plan.rounds} rounds; seed {plan.seed}")
    report = Report([], [])
    before = torch.get_num_threads()
    try:
        limits = {threads: limits_here(plan.device, threads) for threads in plan.threads}
        for threads, limit in limits.items():
            write(f"{threads} thread(s): a copy moves {limit.bandwidth / 1e6:.3g} GB/s")
        for skipped in plan.skipped:
            write(f"not measured: {skipped}")
        write("\n" + _LINE.format(*_TITLES))
        for job in plan.jobs:
            problem = problem_of(job, plan.device, plan.seed)
            for threads in plan.threads:
                torch.set_num_threads(threads)
                problem.generator.manual_seed(plan.seed)
                try:
                    found = measure(job.case, problem, threads, plan.rounds, plan.seconds, limits[threads])
                except WrongResultError as error:
                    report.refused.append(f"{job}, {threads} thread(s), seed {plan.seed}: {error}")
                    write(f"REFUSED {report.refused[-1]}")
                    continue
                report.measurements.extend(found)
                write("\n".join(map(table_line, found)))
                if job.case.builds_trie:
                    write(_trie_line(problem.trie))
                if plan.output is not None:
                    append_rows(plan.output, [csv_row(measurement, where) for measurement in found])
    finally:
        torch.set_num_threads(before)
    return report


def benchmark(*, write: Callable[[str], None] = print, **arguments: Any) -> Report:
    """What `gflowgr bench` does: `run(plan(**arguments), write)`; `plan` says what the arguments are."""
    return run(plan(**arguments), write)


def build_parser() -> argparse.ArgumentParser:
    """The options of `gflowgr bench`, named as the arguments of `plan`."""
    about = "; ".join(f"{each.name}: {each.about}" for each in CONFIGURATIONS.values())
    parser = argparse.ArgumentParser(
        prog="gflowgr bench",
        description="Times each op beside plain PyTorch, paired in one run. Every implementation is first "
        "checked against the float64 definition; a wrong one is refused and the exit code is 1.",
        epilog=f"Configurations: {about}. The ratio is an implementation's time over the op's in the same "
        "round; limit is the least time in which this machine could move the bytes (and, for the head, "
        "multiply), over the time taken.",
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help=f"some of {', '.join(CASES)}; default: all")
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="NAME",
        help="some of the configurations below; default: each op's usual ones",
    )
    parser.add_argument("--rows", type=int, help="rows of logits in a batch (a trajectory of L tokens has L)")
    parser.add_argument("--vocab", type=int, help="columns of the logits")
    parser.add_argument("--hidden", type=int, help="width of the head, for trie_linear_token_log_probs")
    parser.add_argument("--codes", metavar="FILE.npy", help="real codes (N, L) instead of synthetic ones")
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help=f"some of {', '.join(DTYPES)}")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument(
        "--backend", default="auto", help=f"one of {', '.join(BACKENDS)}; default: %(default)s"
    )
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="CPU threads; default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=20, help="paired rounds; default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="no more rounds, once three are made, after this time for an op in a pass; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, help="of the inputs; default: another one each time")
    parser.add_argument("--output", metavar="FILE.csv", help="append the table to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `gflowgr bench`: 0 when all is measured, 1 when a result was wrong, 2 for a wrong argument."""
    arguments = vars(build_parser().parse_args(argv))
    try:
        planned = plan(**arguments)
    except ValueError as error:
        print(f"gflowgr bench: error: {error}", file=sys.stderr)
        return 2
    report = run(planned, partial(print, flush=True))
    if report.refused:
        print(
            f"gflowgr bench: {len(report.refused)} result(s) were wrong and are not reported", file=sys.stderr
        )
    return 1 if report.refused else 0
