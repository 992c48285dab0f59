"""What every op means, in plain PyTorch: the oracle of the tests and the `torch` backend.

A trie argument is anything with the attributes `first_child`, `narrow_token`, `max_children` (and
`item_node`, `parent`, `level_offsets` for flows). Shapes: B batch, T tokens, V vocabulary, C `max_children`;
`...` any.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Trie(Protocol):
    """The arrays that an op reads."""

    @property
    def first_child(self) -> Tensor: ...
    @property
    def narrow_token(self) -> Tensor: ...
    @property
    def max_children(self) -> int: ...


class ItemTrie(Trie, Protocol):
    """The arrays that flows read besides."""

    @property
    def item_node(self) -> Tensor: ...
    @property
    def parent(self) -> Tensor: ...
    @property
    def level_offsets(self) -> tuple[int, ...]: ...


class RowFilter(Protocol):
    """What an op reads of an `ItemFilter`, whose row b serves what is under index b of the first axis."""

    @property
    def num_rows(self) -> int: ...
    @property
    def hidden_offsets(self) -> Tensor: ...
    @property
    def hidden_nodes(self) -> Tensor: ...
    @property
    def allowed(self) -> Tensor | None: ...
    @property
    def allowed_set(self) -> Tensor | None: ...


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_of(nodes: Tensor, trie: Trie) -> Tensor:
    """The token on the edge into each node (...), int64."""
    narrow = trie.narrow_token
    if narrow.dtype != torch.uint16:
        return narrow[nodes].long()
    # PyTorch does not index uint16, so its bits are read as int16.
    return narrow.view(torch.int16)[nodes].long() & 0xFFFF


def child_range(nodes: Tensor, trie: Trie) -> tuple[Tensor, Tensor]:
    """The first child of each node and the one past its last; equal for a node off the trie."""
    inside = (nodes >= 0) & (nodes < trie.narrow_token.numel())
    parent = torch.where(inside, nodes.long(), 0)
    first = trie.first_child[parent].long()
    return first, torch.where(inside, trie.first_child[parent + 1].long(), first)


def available(child: Tensor, item_filter: RowFilter) -> Tensor:
    """Which nodes (B, ...) have an item at or under them that row b may get."""
    row = torch.arange(child.shape[0], device=child.device).view(-1, *[1] * (child.dim() - 1))
    entry = torch.arange(item_filter.hidden_nodes.numel(), device=child.device)
    owner = torch.searchsorted(item_filter.hidden_offsets[1:], entry, right=True)
    keys = owner * 2**31 + item_filter.hidden_nodes
    wanted = row * 2**31 + child
    found = torch.cat([keys, keys.new_full((1,), -1)])[torch.searchsorted(keys, wanted)]
    result = found != wanted
    if item_filter.allowed is None or item_filter.allowed_set is None:
        return result
    words = item_filter.allowed[item_filter.allowed_set[row], child // 32]
    return result & ((words >> (child % 32)) & 1 == 1)


def children(
    nodes: Tensor, trie: Trie, item_filter: RowFilter | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Child nodes, their tokens and which of them are there for the row, each (..., C).

    A node off the trie (-1) has none.
    """
    first, end = child_range(nodes, trie)
    child = first.unsqueeze(-1) + torch.arange(trie.max_children, device=nodes.device)
    exists = child < end.unsqueeze(-1)
    child = torch.where(exists, child, 0)
    if item_filter is not None:
        exists = exists & available(child, item_filter)
    return child, torch.where(exists, token_of(child, trie), 0), exists


def trie_walk(tokens: Tensor, start: Tensor, trie: Trie) -> Tensor:
    """The node after each token of (..., T) from the nodes `start` (...); -1 from the first miss on."""
    node, nodes, last = start.long(), [], trie.narrow_token.numel() - 1
    for wanted in tokens.long().unbind(-1):
        low, end = child_range(node, trie)
        high = end
        for _ in range(trie.max_children.bit_length()):
            middle = (low + high) // 2
            below = (middle < high) & (token_of(middle.clamp(max=last), trie) < wanted)
            low, high = torch.where(below, middle + 1, low), torch.where(below, high, middle)
        found = (low < end) & (token_of(low.clamp(max=last), trie) == wanted)
        node = torch.where(found, low, -1)
        nodes.append(node)
    return torch.stack(nodes, -1) if nodes else tokens.long()


def child_log_probs(
    logits: Tensor,
    nodes: Tensor,
    trie: Trie,
    first_token: int = 0,
    item_filter: RowFilter | None = None,
) -> tuple[Tensor, ...]:
    """The forward policy over the children of each row's node: child, token, exists, log-prob, each (..., C).

    `logits[..., c]` belongs to token `first_token + c`; a child without a column is not there. Missing
    children get -inf. A row with fewer than two children has nothing to choose, so its logits are replaced
    before the softmax: no NaN, gradient exactly 0.
    """
    child, tokens, exists = children(nodes, trie, item_filter)
    column, last = tokens - first_token, logits.shape[-1] - 1
    exists = exists & (column >= 0) & (column <= last)
    values = logits.gather(-1, column.clamp(0, last)).to(accumulation_dtype(logits.dtype))
    choice = exists.sum(-1, keepdim=True) > 1
    values = torch.where(exists | ~choice, torch.where(choice, values, 0.0), -torch.inf)
    log_probs = torch.where(choice, values.log_softmax(-1), 0.0)
    return child, tokens, exists, torch.where(exists, log_probs, -torch.inf)


def trie_child_log_probs(
    logits: Tensor,
    nodes: Tensor,
    trie: Trie,
    first_token: int = 0,
    width: int | None = None,
    item_filter: RowFilter | None = None,
) -> Tensor:
    """log P_F of the i-th child of each node, -inf where there is none: (..., V), (...) -> (..., width)."""
    log_probs = child_log_probs(logits, nodes, trie, first_token, item_filter)[-1]
    missing = 0 if width is None else width - trie.max_children
    return F.pad(log_probs, (0, missing), value=-torch.inf)


def trie_log_softmax(
    logits: Tensor, nodes: Tensor, trie: Trie, item_filter: RowFilter | None = None
) -> Tensor:
    """log_softmax over the children of each row's node, -inf elsewhere: (..., V), (...) -> (..., V)."""
    _, tokens, exists, log_probs = child_log_probs(logits, nodes, trie, 0, item_filter)
    dense = log_probs.new_full((*logits.shape[:-1], logits.shape[-1] + 1), -torch.inf)
    return dense.scatter(-1, torch.where(exists, tokens, logits.shape[-1]), log_probs)[..., :-1]


def trie_token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    trie: Trie,
    start: Tensor,
    first_token: int = 0,
    item_filter: RowFilter | None = None,
) -> Tensor:
    """log P_F of each token: (..., T, V), (..., T), start nodes (...) -> (..., T).

    0 from the first -1 on (padding); -inf for a token that is not a child and for what follows it.
    """
    after = trie_walk(tokens, start, trie)
    before = torch.cat([start.long().unsqueeze(-1), after], -1)[..., : tokens.shape[-1]]
    child, _, exists, log_probs = child_log_probs(logits, before, trie, first_token, item_filter)
    taken = exists & (child == after.unsqueeze(-1))
    padding = (tokens < 0).long().cumsum(-1) > 0
    chosen = torch.where(taken, log_probs, 0.0).sum(-1)
    return torch.where(padding, 0.0, torch.where(taken.any(-1), chosen, -torch.inf))


def trie_linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    trie: Trie,
    bias: Tensor | None,
    start: Tensor,
    first_token: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """The same from hidden states and the head's rows: (..., T, D), (V, D), (..., T) -> (..., T)."""
    logits = scaled_and_capped(F.linear(hidden, weight, bias), scale, softcap)
    return trie_token_log_probs(logits, tokens, trie, start, first_token)


def scaled_and_capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """What some heads do to their product: c * tanh(scale * logits / c)."""
    logits = logits if scale == 1 else logits * scale
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def trie_sample(
    logits: Tensor,
    nodes: Tensor,
    trie: Trie,
    uniform: Tensor,
    temperature: float,
    item_filter: RowFilter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws a child of each row's node by inverting the CDF at `uniform` in [0, 1).

    (..., V), (...) -> tokens, nodes, log-probs at temperature 1, each (...); (-1, -1, 0) where none exists.
    """
    child, tokens, exists, log_probs = child_log_probs(logits, nodes, trie, 0, item_filter)
    # From the peak down, which stays finite whatever the temperature.
    peak = log_probs.amax(-1, keepdim=True)
    scaled = ((log_probs - peak).double() / temperature).to(log_probs.dtype)
    mass = scaled.softmax(-1).nan_to_num(0.0)
    cumulative = mass.cumsum(-1)
    reached = (cumulative > uniform.to(mass.dtype).unsqueeze(-1) * cumulative[..., -1:]) & (mass > 0)
    # Rounding can leave the target above the sum; a row of NaN has no mass, and draws its first child.
    places = torch.arange(mass.shape[-1], device=mass.device)
    last_possible = torch.where(mass > 0, places, exists.int().argmax(-1, keepdim=True)).amax(-1)
    drawn = torch.where(reached.any(-1), reached.int().argmax(-1), last_possible).unsqueeze(-1)
    alive = exists.any(-1)
    return (
        torch.where(alive, tokens.gather(-1, drawn).squeeze(-1), -1),
        torch.where(alive, child.gather(-1, drawn).squeeze(-1), -1),
        torch.where(alive, log_probs.gather(-1, drawn).squeeze(-1), 0.0),
    )


def trie_log_flows(log_rewards: Tensor, trie: ItemTrie) -> Tensor:
    """log F(s) = log of the reward sum at or under each node: (..., N) -> (..., num_nodes)."""
    values = log_rewards.to(accumulation_dtype(log_rewards.dtype))
    present = trie.item_node >= 0
    values = torch.where(present, values, -torch.inf)
    flows = _log_sum_into(values, torch.where(present, trie.item_node, 0).long(), trie.parent.numel())
    offsets = trie.level_offsets
    for begin, end in reversed(list(pairwise(offsets[1:]))):
        arriving = _log_sum_into(flows[..., begin:end], trie.parent[begin:end].long(), flows.shape[-1])
        flows = torch.logaddexp(flows, arriving)
    return flows


def _log_sum_into(values: Tensor, index: Tensor, size: int) -> Tensor:
    """log sum exp of the last axis of `values`, grouped by `index` into `size` places, -inf where empty."""
    index = index.expand(values.shape)
    empty = values.new_full((*values.shape[:-1], size), -torch.inf)
    peak = empty.scatter_reduce(-1, index, values.detach(), "amax")
    peak = torch.where(peak.isinf(), 0.0, peak)
    total = torch.zeros_like(peak).scatter_add(-1, index, (values - peak.gather(-1, index)).exp())
    occupied = total != 0
    return torch.where(occupied, torch.where(occupied, total, 1.0).log() + peak, -torch.inf)


def _masked(log_probs: Tensor, mask: Tensor | None) -> Tensor:
    return log_probs if mask is None else torch.where(mask, log_probs, 0.0)


def reduce(per_trajectory: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """`weights * loss`, then the mean, the sum, or as it is."""
    weighted = per_trajectory if weights is None else weights.detach() * per_trajectory
    if reduction == "none":
        return weighted
    return weighted.mean() if reduction == "mean" else weighted.sum()


def trajectory_balance_residual(
    log_probs: Tensor, log_rewards: Tensor, log_z: Tensor, mask: Tensor | None
) -> Tensor:
    """log Z + sum of log P_F - log R: (..., T), (...), (...) -> (...). Malkin et al. 2022, eq. 14."""
    return log_z + _masked(log_probs, mask).sum(-1) - log_rewards


def log_partition_variance(
    log_probs: Tensor, log_rewards: Tensor, group_size: int, mask: Tensor | None
) -> Tensor:
    """(z - mean of z over the group)^2 with z = log R - log P_F: (B, T), (B,) -> (B,). Zhang et al. 2023."""
    estimate = (log_rewards - _masked(log_probs, mask).sum(-1)).unflatten(0, (-1, group_size))
    return (estimate - estimate.mean(-1, keepdim=True)).square().flatten()


def detailed_balance(log_probs: Tensor, log_flows: Tensor, mask: Tensor | None) -> Tensor:
    """Sum over steps of (log F(s) + log P_F - log F(s'))^2: (..., T), (..., T + 1) -> (...)."""
    residual = log_flows[..., :-1] + log_probs - log_flows[..., 1:]
    return _masked(residual, mask).square().sum(-1)


def subtrajectory_balance(log_probs: Tensor, log_flows: Tensor, lam: float, mask: Tensor | None) -> Tensor:
    """lam-weighted mean of the squared residuals of all sub-trajectories (Madan et al. 2023, eq. 12).

    A sub-trajectory counts when every step in it does. (..., T), (..., T + 1) -> (...).
    """
    steps = log_probs.shape[-1]
    total = torch.zeros_like(log_flows[..., 0])
    norm = torch.zeros_like(total)
    for length in range(1, steps + 1):
        counts = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask
        counts = counts.unfold(-1, length, 1).all(-1)
        inside = _masked(log_probs, mask).unfold(-1, length, 1).sum(-1)
        residual = log_flows[..., : steps + 1 - length] + inside - log_flows[..., length:]
        total = total + lam ** (length - 1) * _masked(residual, counts).square().sum(-1)
        norm = norm + lam ** (length - 1) * counts.sum(-1, dtype=norm.dtype)
    return total / norm.clamp(min=torch.finfo(norm.dtype).tiny)


def flow_matching(logits: Tensor, nodes: Tensor, trie: Trie, log_flows: Tensor) -> Tensor:
    """KL(p* || P_F) over the children of each row's node, p*(c) = F(c) / sum of F over the children.

    (..., V), (...), (..., num_nodes) with a leading shape that is a prefix of `nodes`' -> (...). 0 where the
    node has fewer than two children or its children carry no mass.
    """
    child, _, exists = children(nodes, trie)
    size = log_flows.shape[-1]
    flows = log_flows.reshape(*log_flows.shape[:-1], *[1] * (nodes.dim() + 1 - log_flows.dim()), size)
    flows = flows.expand(*nodes.shape, size).gather(-1, child).to(accumulation_dtype(logits.dtype))
    choice = (exists.sum(-1, keepdim=True) > 1) & ((flows != -torch.inf) & exists).any(-1, keepdim=True)
    # Where nothing is to be chosen no logit counts, whatever it is.
    *_, log_probs = child_log_probs(logits, torch.where(choice.squeeze(-1), nodes, -1), trie)
    flows = torch.where(exists | ~choice, torch.where(choice, flows, 0.0), -torch.inf)
    log_target = flows.log_softmax(-1)
    carries = choice & (log_target != -torch.inf)
    gap = torch.where(carries, log_target, 0.0) - torch.where(carries, log_probs, 0.0)
    return (torch.where(carries, log_target, -torch.inf).exp() * gap).sum(-1)
