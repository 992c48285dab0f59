"""What callers write today instead of an op, in plain PyTorch or by the library that they would call.

Masks, dense targets and whatever depends on the catalogue alone come ready made, in the baselines' favour.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowgr import reference
from gflowgr.bench.problems import Inputs, Problem

Draws = tuple[Tensor, Tensor | None, Tensor]


def needs(
    *modules: str, devices: Sequence[str] = ("cpu", "cuda"), dtypes: Sequence[torch.dtype] | None = None
) -> Callable[[Problem], str | None]:
    """Why a baseline that imports these cannot run on a problem."""

    def obstacle(problem: Problem) -> str | None:
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if problem.device.type not in devices:
            return f"it runs on {' or '.join(devices)} only"
        if dtypes is not None and problem.dtype not in dtypes:
            return f"it has no kernel for {problem.dtype}"
        return f"{' and '.join(missing)} is not installed" if missing else None

    return obstacle


def needs_compiler(problem: Problem) -> str | None:
    """Why torch.compile is left out of a problem."""
    if not problem.compiles:
        return "torch.compile takes its time, ask for it with --compile"
    if problem.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile finds no C++ compiler"
    return None


def _masked_log_softmax(logits: Tensor, forbidden: Tensor) -> Tensor:
    masked = logits.masked_fill(forbidden, -torch.inf)
    return torch.log_softmax(masked, -1, dtype=reference.accumulation_dtype(logits.dtype))


def _masked_token_log_probs(logits: Tensor, forbidden: Tensor, tokens: Tensor) -> Tensor:
    log_probs = _masked_log_softmax(logits, forbidden)
    chosen = log_probs.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.masked_fill(tokens < 0, 0.0)


def _dense_balance(
    logits: Tensor, forbidden: Tensor, tokens: Tensor, log_rewards: Tensor, log_z: Tensor
) -> Tensor:
    total = _masked_token_log_probs(logits, forbidden, tokens).sum(-1)
    return (log_z + total - log_rewards).square().mean()


_BALANCE_INPUTS = ("logits", "forbidden", "tokens", "log_rewards", "log_z")


def _draw(problem: Problem, log_probs: Tensor) -> Tensor:
    """An index (rows, 1) from each row, by inverting its CDF: far quicker than torch.multinomial."""
    cumulative = log_probs.exp().cumsum(-1)
    rows, size = cumulative.shape
    uniform = torch.rand(rows, 1, generator=problem.generator, device=problem.device, dtype=torch.float64)
    # Below 1 by a rounding, so that the target stays below the sum.
    target = (uniform * (1 - torch.finfo(cumulative.dtype).eps)).to(cumulative.dtype) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=size - 1)


def _drawn_token(problem: Problem, log_probs: Tensor) -> Draws:
    """A token only; the step to its node, which the op takes too, is left out."""
    tokens = _draw(problem, log_probs)
    return tokens.squeeze(-1), None, log_probs.gather(-1, tokens).squeeze(-1)


def floor(problem: Problem, inputs: Inputs) -> Tensor:
    """The unmasked log_softmax over the same logits; one column of it unless the op's result is dense."""
    log_probs = torch.log_softmax(inputs["logits"], -1)
    dense = "grad" in inputs and inputs["grad"].shape == log_probs.shape
    return log_probs if dense else log_probs.select(-1, 0)


def masked_log_softmax(problem: Problem, inputs: Inputs) -> Tensor:
    return _masked_log_softmax(inputs["logits"], inputs["forbidden"])


def masked_token_log_probs(problem: Problem, inputs: Inputs) -> Tensor:
    return _masked_token_log_probs(inputs["logits"], inputs["forbidden"], inputs["tokens"])


def masked_sample(problem: Problem, inputs: Inputs) -> Draws:
    return _drawn_token(problem, masked_log_softmax(problem, inputs))


def masked_flow_matching(problem: Problem, inputs: Inputs) -> Tensor:
    log_probs = masked_log_softmax(problem, inputs).masked_fill(inputs["forbidden"], 0.0)
    return (inputs["negative_entropy"] - (inputs["target"] * log_probs).sum(-1)).mean()


def eager_trajectory_balance(problem: Problem, inputs: Inputs) -> Tensor:
    return _dense_balance(*(inputs[name] for name in _BALANCE_INPUTS))


def masked_log_partition_variance(problem: Problem, inputs: Inputs) -> Tensor:
    log_probs = masked_token_log_probs(problem, inputs)
    group_size = problem.configuration.group_size
    return reference.log_partition_variance(log_probs, inputs["log_rewards"], group_size, None).mean()


def compile_balance(problem: Problem, sets: Sequence[Inputs]) -> Callable[..., Tensor]:
    # What an earlier configuration left behind would count against the limit of recompilations.
    torch.compiler.reset()
    return torch.compile(_dense_balance, fullgraph=True, dynamic=False)


def compiled_trajectory_balance(problem: Problem, inputs: Inputs, compiled: Callable[..., Tensor]) -> Tensor:
    return compiled(*(inputs[name] for name in _BALANCE_INPUTS))


def level_widths(problem: Problem, sets: Sequence[Inputs]) -> list[int]:
    """The largest number of children at each level."""
    counts = problem.trie.first_child.diff()
    offsets = problem.trie.level_offsets
    return [int(counts[begin:end].max()) for begin, end in pairwise(offsets[:-1])]


def widest_level(problem: Problem, sets: Sequence[Inputs]) -> int:
    """The largest number of children at any of the levels where rows stand."""
    ends = torch.tensor(problem.trie.level_offsets[1:], device=problem.device)
    depths = torch.cat([torch.bucketize(inputs["nodes"], ends, right=True) for inputs in sets]).unique()
    widths = level_widths(problem, sets)
    return max(widths[depth] for depth in depths.tolist())


def _padded_log_probs(
    problem: Problem, logits: Tensor, nodes: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """First child (rows, 1), and tokens and log-probs of the children, (rows, width), -inf at the padding."""
    trie = problem.trie
    first, end = trie.first_child[nodes].unsqueeze(1), trie.first_child[nodes + 1].unsqueeze(1)
    child = first + torch.arange(width, dtype=first.dtype, device=first.device)
    tokens = trie.token[child.clamp(max=trie.num_nodes - 1)].long()
    values = logits.gather(1, tokens).to(reference.accumulation_dtype(logits.dtype))
    return first, tokens, values.masked_fill(child >= end, -torch.inf).log_softmax(-1)


def padded_sample(problem: Problem, inputs: Inputs, width: int) -> Draws:
    first, tokens, log_probs = _padded_log_probs(problem, inputs["logits"], inputs["nodes"], width)
    drawn = _draw(problem, log_probs)
    reached = (first + drawn).squeeze(1)
    return tokens.gather(1, drawn).squeeze(1), reached, log_probs.gather(1, drawn).squeeze(1)


def padded_token_log_probs(problem: Problem, inputs: Inputs, widths: Sequence[int]) -> Tensor:
    """Level by level, as each has another width; the nodes along the paths come ready made."""
    chosen = []
    rows = (inputs[name].unbind(1) for name in ("logits", "tokens", "nodes"))
    for logits, token, node, width in zip(*rows, widths, strict=True):
        _, tokens, log_probs = _padded_log_probs(problem, logits, node.clamp(min=0), width)
        place = (tokens == token.unsqueeze(1)).int().argmax(1, keepdim=True)
        chosen.append(log_probs.gather(1, place).squeeze(1).masked_fill(token < 0, 0.0))
    return torch.stack(chosen, 1)


def padded_trajectory_balance(problem: Problem, inputs: Inputs, widths: Sequence[int]) -> Tensor:
    total = padded_token_log_probs(problem, inputs, widths).sum(-1)
    return (inputs["log_z"] + total - inputs["log_rewards"]).square().mean()


def edge_keys(problem: Problem, sets: Sequence[Inputs]) -> Tensor:
    """node * V + token of every edge, ascending: int64 (num_nodes - 1,), that of node n at n - 1."""
    trie = problem.trie
    # In place: ten million items have 600 MB of keys.
    return trie.parent[1:].long().mul_(problem.configuration.vocab).add_(trie.token[1:])


def candidates_sample(problem: Problem, inputs: Inputs, keys: Tensor) -> Draws:
    """Draws among the children that are within the row's 2 * beam largest logits; -1 where there are none."""
    width, beam = problem.configuration.vocab, problem.configuration.beam
    values, tokens = inputs["logits"].topk(min(2 * beam, width), -1)
    wanted = inputs["nodes"].unsqueeze(1) * width + tokens
    place = torch.searchsorted(keys, wanted).clamp_(max=keys.numel() - 1)
    exists = keys[place] == wanted
    values = values.to(problem.sums).masked_fill(~exists, -torch.inf)
    log_probs = (values - values.logsumexp(-1, keepdim=True)).nan_to_num(nan=-torch.inf)
    drawn = _draw(problem, log_probs)
    alive = exists.gather(1, drawn).squeeze(1)
    picked = (each.gather(1, drawn).squeeze(1) for each in (tokens, place + 1, log_probs))
    token, node, log_prob = picked
    return token.where(alive, -1), node.where(alive, -1), log_prob.where(alive, 0.0)


def prefix_dict(problem: Problem, sets: Sequence[Inputs]) -> dict[int, Any]:
    """A trie of dicts by token, of the paths to the rows' nodes and all their children.

    The nodes that no row meets are left out: a million items in dicts would take gigabytes.
    """
    trie, root = problem.trie.to("cpu"), dict[int, Any]()
    for inputs in sets:
        for prefix, node in zip(inputs["prefixes"].tolist(), inputs["nodes"].tolist(), strict=True):
            place = root
            for token in prefix:
                if token < 0:
                    break
                place = place.setdefault(token, {})
            for token in trie.children(node).tolist():
                place.setdefault(token, {})
    return root


def prefix_processor(problem: Problem, sets: Sequence[Inputs]) -> Callable[[Tensor, Tensor], Tensor]:
    """transformers' processor for `generate(prefix_allowed_tokens_fn=...)`."""
    from transformers import PrefixConstrainedLogitsProcessor

    root = prefix_dict(problem, sets)

    def allowed(batch: int, prefix: Tensor) -> list[int]:
        place = root
        for token in prefix.tolist():
            if token < 0:
                break
            place = place[token]
        return list(place)

    beams = math.gcd(problem.configuration.beam, problem.configuration.decode_rows)
    processor: Callable[[Tensor, Tensor], Tensor] = PrefixConstrainedLogitsProcessor(allowed, beams)
    return processor


def prefix_sample(problem: Problem, inputs: Inputs, processor: Callable[[Tensor, Tensor], Tensor]) -> Draws:
    scores = processor(inputs["prefixes"], inputs["logits"].to(problem.sums))
    return _drawn_token(problem, scores.log_softmax(-1))


def bitmask_sample(problem: Problem, inputs: Inputs) -> Draws:
    """In place on a copy of the logits; `generate`, too, makes one for its processors."""
    from xgrammar import apply_token_bitmask_inplace

    logits = inputs["logits"].to(torch.float32, copy=True)
    apply_token_bitmask_inplace(logits, inputs["bitmask"], vocab_size=problem.configuration.vocab)
    return _drawn_token(problem, logits.log_softmax(-1))


def full_head(problem: Problem, inputs: Inputs) -> Tensor:
    """The whole head and the softmax over the whole vocabulary, as supervised fine-tuning has it."""
    logits = F.linear(inputs["hidden"], inputs["weight"])
    log_probs = torch.log_softmax(logits, -1, dtype=problem.sums)
    return log_probs.gather(-1, inputs["tokens"].clamp(min=0).unsqueeze(-1)).squeeze(-1)


def liger_loss(problem: Problem, sets: Sequence[Inputs]) -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Callable[..., Tensor] = LigerFusedLinearCrossEntropyLoss(ignore_index=-1, reduction="sum")
    return loss


def liger_head(problem: Problem, inputs: Inputs, loss: Callable[..., Tensor]) -> Tensor:
    """The sum of the log-probs over the whole vocabulary; it makes its gradients in the forward pass."""
    return -loss(inputs["weight"], inputs["hidden"].flatten(0, -2), inputs["tokens"].flatten())


def cut_head(problem: Problem, inputs: Inputs) -> Tensor:
    """The whole vocabulary's log-probs without its logits in memory."""
    from cut_cross_entropy import linear_cross_entropy

    log_probs: Tensor = -linear_cross_entropy(
        inputs["hidden"], inputs["weight"], inputs["tokens"], ignore_index=-1, reduction="none"
    )
    return log_probs
