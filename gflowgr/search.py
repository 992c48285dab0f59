"""Search over the trie with anything that writes tokens: beams, draws, draws without replacement."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gflowgr import ops
from gflowgr.filters import ItemFilter
from gflowgr.ops import _checks as checks
from gflowgr.ops._item_ranks import ItemRanks
from gflowgr.ops._random import gumbel, uniform
from gflowgr.ops.behaviour import Behaviour, cumulative_mass, passed, proposal_log_probs
from gflowgr.reference import accumulation_dtype, child_range, token_of
from gflowgr.trie import PrefixTrie

FORWARD_POLICY = Behaviour()

# The noise of steps and of nodes is numbered from 0 on, that of items from -1 down.
_PICK_OF_ITEM = -1


class Generated(NamedTuple):
    """Items of each context, best first or in the order drawn.

    Attributes:
        items: int64 (B, k), -1 where there are fewer than k.
        log_probs: (B, k), log P_F of the item, natural logarithm; -inf where there is no item. Available
            items with the same tokens have equal parts of the tokens' probability.
        log_inclusion: (B, k), see `draw_without_replacement`; None elsewhere.
        log_proposal: (B, k), what `log_probs` is under the behaviour policy that drew; None where that is the
            forward policy itself.
    """

    items: Tensor
    log_probs: Tensor
    log_inclusion: Tensor | None = None
    log_proposal: Tensor | None = None

    def to(self, device: torch.device) -> Generated:
        return Generated(
            self.items.to(device),
            self.log_probs.to(device),
            None if self.log_inclusion is None else self.log_inclusion.to(device),
            None if self.log_proposal is None else self.log_proposal.to(device),
        )


class Writer(Protocol):
    """What writes items token by token for B contexts: a model, and what it has read so far.

    At depth d the columns of logits are the tokens `trie.token_ranges[d][0]` to `trie.token_ranges[d][1]`,
    the last one included.
    """

    @property
    def logits(self) -> Tensor:
        """(B, 1, W) of the first token."""
        ...

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Writes one more token on n paths of each context, which take the place of those of the step before.

        Args:
            tokens: int64 (B, n). Contexts with fewer than n paths fill up with any token of the depth.
            parents: int64 (B, n), the path of the step before that each continues.

        Returns:
            logits (B, n, W') of the token after.
        """
        ...


def beam_search(
    writer: Writer,
    trie: PrefixTrie,
    *,
    num_items: int,
    num_beams: int | None = None,
    item_filter: ItemFilter | None = None,
) -> Generated:
    """The most probable items of each context, best first.

    Every beam is a prefix of an item and ends at one, so min(num_items, available items) results are certain.
    Beams are ranked by log P_F, and in the end the items that they lead to by their own. Once all items under
    a prefix have the same tokens the writer is not asked again, and its beam is free for others. An item that
    is a prefix of other items competes with its own log-probability. With as many beams as items the search
    is exhaustive.

    Args:
        writer: at the root.
        trie: on the writer's device.
        num_items: k, results a context.
        num_beams: prefixes to keep at each depth, by default max(20, k).
        item_filter: the items that each context may get; no beam is spent on others.

    Returns:
        items and log-probabilities (B, k).

    Raises:
        ValueError: an argument is out of range.
    """
    num_beams = max(20, num_items) if num_beams is None else num_beams
    _at_least_one("num_items", num_items)
    if num_beams < num_items:
        raise ValueError(f"num_beams is {num_beams}, needs at least num_items, {num_items}")
    paths = _Paths(writer, trie, item_filter)
    scores = paths.zeros()
    begins, counts, found = [], [], []
    while paths.num_paths:
        values = scores.unsqueeze(-1) + paths.log_probs()
        scores, chosen = _most(values.flatten(1), min(num_beams, paths.nodes_below))
        parents, nodes = paths.children(chosen)
        alive = ~scores.isneginf()
        ends = _Ends(paths.ranks, nodes)
        begins.append(ends.begin)
        counts.append(torch.where(alive, torch.where(ends.decided, ends.under, ends.own), 0))
        found.append(scores)
        columns, on = paths.advance(nodes, parents, alive & ~ends.decided)
        scores = torch.where(on, scores.gather(1, columns), -torch.inf)
    return _best_items(
        paths.ranks, torch.cat(begins, 1), torch.cat(counts, 1), torch.cat(found, 1), num_items
    )


def draw(
    writer: Writer,
    trie: PrefixTrie,
    *,
    num_samples: int,
    item_filter: ItemFilter | None = None,
    behaviour: Behaviour = FORWARD_POLICY,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Draws items of each context from the behaviour policy, independently and with replacement.

    A draw goes on at an inner node, so an item that is a prefix of other available ones is never drawn. Among
    items of the same tokens it is uniform. Draws that have the same prefix share a path of the writer.

    Args:
        writer: at the root.
        trie: on the writer's device.
        num_samples: M.
        item_filter: the items that each context may get; policies are over what it leaves.
        behaviour: what draws in place of the forward policy.
        seeds: integers (B,), one for each context: its draws are then a function of its seed and its logits,
            whatever stands beside it in the batch, and the first of M draws are those of fewer.
        generator: what seeds are drawn from where none are given.

    Returns:
        items and log_probs (B, M); -1 and -inf where a context has no available item. With another behaviour
        than the forward policy log_proposal too: the importance weight of a draw is the exponential of
        log_probs - log_proposal.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.
    """
    _at_least_one("num_samples", num_samples)
    paths = _Paths(writer, trie, item_filter)
    seeds = _seeds_of(paths.nodes, seeds, generator).unsqueeze(1)
    number = torch.arange(num_samples, device=seeds.device)
    path = torch.zeros_like(paths.nodes).expand(-1, num_samples)
    going = torch.ones_like(path, dtype=torch.bool)
    ends = torch.full_like(path, -1)
    log_probs = paths.zeros().expand(path.shape)
    log_proposal = log_probs.double()
    while paths.num_paths:
        policy = paths.log_probs()
        proposal = proposal_log_probs(policy, behaviour, paths.items_below(behaviour))
        cumulative = cumulative_mass(proposal)
        if paths.num_paths > 1:
            cumulative = cumulative.gather(1, path.unsqueeze(-1).expand(-1, -1, paths.width))
        child = passed(cumulative, uniform(seeds, paths.depth, number))
        chosen = path * paths.width + child
        parents, reached = paths.children(chosen)
        step = proposal.flatten(1).gather(1, chosen)
        alive = going & (step != -torch.inf)
        log_probs = log_probs + torch.where(going, policy.flatten(1).gather(1, chosen), 0.0)
        log_proposal = log_proposal + torch.where(going, step, 0.0)
        ends = torch.where(going, torch.where(alive, reached, -1), ends)
        going = alive & ~_Ends(paths.ranks, reached).decided
        # Draws at the same node go on as one path.
        ordered, order = torch.where(going, reached, trie.num_nodes).sort(1)
        first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
        path = torch.zeros_like(path).scatter(1, order, first.cumsum(1) - 1)
        paths.advance(reached.gather(1, order), parents.gather(1, order), first & going.gather(1, order))
        path = torch.where(going, path, 0)
    at_end = _Ends(paths.ranks, ends.clamp(min=0))
    pick = (uniform(seeds, _PICK_OF_ITEM, number) * at_end.under).long()
    items = torch.where(ends < 0, -1, paths.ranks.items(at_end.begin + pick))
    share = at_end.under.clamp(min=1).double().log()
    log_probs, log_proposal = ((part - share).to(log_probs.dtype) for part in (log_probs, log_proposal))
    return Generated(items, log_probs, None, None if behaviour.is_policy else log_proposal)


def draw_without_replacement(
    writer: Writer,
    trie: PrefixTrie,
    *,
    num_samples: int,
    item_filter: ItemFilter | None = None,
    behaviour: Behaviour = FORWARD_POLICY,
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Draws k distinct items of each context, exactly as one after the other without replacement would.

    Stochastic beam search (Kool, van Hoof and Welling 2019): every item has its log-probability plus Gumbel
    noise, and the k largest sums are the draw. They are found down the tree, as the largest sum under a node
    is the node's own log-probability plus Gumbel noise. No item comes twice in a row of the result: it is a
    group free of repetitions. Items of the same tokens are outcomes of their own, each with an equal part of
    the probability of the tokens. An item that is a prefix of other available ones is never drawn.

    With p = exp(log_probs), the sum over a row of p * f(item) / exp(log_inclusion) is an unbiased estimate of
    the sum of p * f over all items that can be drawn.

    Args:
        writer: at the root.
        trie: on the writer's device.
        num_samples: k.
        item_filter: the items that each context may get; policies are over what it leaves.
        behaviour: what draws in place of the forward policy, at every step.
        seeds: integers (B,), one for each context: noise is then a function of the seed and of the node or
            item, so a draw does not depend on what stands beside it in the batch, and the first of k items
            are those of fewer.
        generator: what seeds are drawn from where none are given.

    Returns:
        items (B, k) in the order of the draw, log_probs of each item, and log_inclusion: the log of
        1 - exp(-exp(log q - kappa)) with q the item's probability under what draws and kappa the (k + 1)-th
        largest sum. Fewer than k items with a chance to be drawn: all of them, included for certain, then -1
        and -inf. With another behaviour than the forward policy log_proposal, log q, too.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.
    """
    _at_least_one("num_samples", num_samples)
    paths = _Paths(writer, trie, item_filter)
    seeds = _seeds_of(paths.nodes, seeds, generator).unsqueeze(1)
    going = _Race(paths.nodes, paths.zeros(), paths.zeros().double(), gumbel(seeds, paths.nodes), paths.nodes)
    ended = _Race(*(part[:, :0] for part in going))
    threshold = torch.full_like(going.sums[:, :1], -torch.inf)
    while paths.num_paths:
        policy = paths.log_probs()
        proposal = proposal_log_probs(policy, behaviour, paths.items_below(behaviour))
        parents, nodes = paths.all_children()
        race = ended.joined(going.split(nodes, policy, proposal, gumbel(seeds.unsqueeze(2), nodes), parents))
        race, threshold = race.first(num_samples, threshold)
        unfinished = race.alive & ~_Ends(paths.ranks, race.places).decided
        columns, on = paths.advance(race.places, race.parents, unfinished)
        going, ended = race.at(columns).only(on), race.only(~unfinished)
    race, threshold = _drawn_items(ended, seeds, paths.ranks, num_samples, threshold)
    log_inclusion = torch.where(race.alive, _log_chance(race.log_proposal - threshold), -torch.inf)

    def filled(part: Tensor) -> Tensor:
        part = torch.where(race.alive, part.to(race.log_probs.dtype), -torch.inf)
        return F.pad(part, (0, num_samples - part.shape[1]), value=-torch.inf)

    return Generated(
        F.pad(torch.where(race.alive, race.places, -1), (0, num_samples - race.places.shape[1]), value=-1),
        filled(race.log_probs),
        filled(log_inclusion),
        None if behaviour.is_policy else filled(race.log_proposal),
    )


class _Paths:
    """The prefixes that the writer continues: (B, n) nodes of one depth, -1 where a context has fewer."""

    def __init__(self, writer: Writer, trie: PrefixTrie, item_filter: ItemFilter | None) -> None:
        self.writer, self.trie, self.item_filter = writer, trie, item_filter
        self.ranks = ItemRanks(trie, item_filter)
        self.logits = writer.logits
        self.nodes = torch.zeros(self.logits.shape[:2], dtype=torch.int64, device=self.logits.device)
        self.depth = 0
        self.num_paths, self.width = 1, int(trie.first_child[1] - trie.first_child[0])

    @property
    def nodes_below(self) -> int:
        """How many nodes the next depth has."""
        return self.trie.level_offsets[self.depth + 2] - self.trie.level_offsets[self.depth + 1]

    def zeros(self) -> Tensor:
        """(B, n) in the dtype of log-probabilities."""
        return torch.zeros_like(self.nodes, dtype=accumulation_dtype(self.logits.dtype))

    def log_probs(self) -> Tensor:
        """log P_F of the children: (B, n, width)."""
        return ops.trie_child_log_probs(
            self.logits,
            self.nodes,
            self.trie,
            item_filter=self.item_filter,
            first_token=self.trie.token_ranges[self.depth][0],
            width=self.width,
        )

    def all_children(self) -> tuple[Tensor, Tensor]:
        """The path and the node of every child: (B, n, width); any node where there is no child."""
        path = torch.arange(self.nodes.shape[1], device=self.nodes.device)
        first = child_range(self.nodes, self.trie)[0].unsqueeze(-1)
        nodes = first + torch.arange(self.width, device=first.device)
        return path.view(1, -1, 1).expand(nodes.shape), nodes.clamp(max=self.trie.num_nodes - 1)

    def children(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """The path and the node of children (B, m) by their place among the n * width."""
        parents = chosen // self.width
        first = child_range(self.nodes.gather(1, parents), self.trie)[0]
        return parents, (first + chosen % self.width).clamp(max=self.trie.num_nodes - 1)

    def items_below(self, behaviour: Behaviour) -> Tensor | None:
        """Available items under the children, where `behaviour` asks for them."""
        if not behaviour.counts_items:
            return None
        nodes = self.all_children()[1]
        begin, end = self.ranks.under(nodes.flatten(1))
        return (end - begin).view(nodes.shape)

    def advance(self, nodes: Tensor, parents: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Goes on with the children (B, m) that are `active`.

        Returns:
            columns (B, n), which of the m each new path is, and whether it is one.
        """
        first, end = child_range(torch.where(active, nodes, -1), self.trie)
        sizes = torch.stack([active.sum(1).max(), (end - first).max()]) if active.numel() else first[:0]
        self.num_paths, self.width = sizes.tolist() or (0, 0)
        columns = (~active).long().argsort(dim=1, stable=True)[:, : self.num_paths]
        on = active.gather(1, columns)
        if self.num_paths:
            self.nodes = torch.where(on, nodes.gather(1, columns), -1)
            tokens = token_of(self.nodes.clamp(min=0), self.trie)
            tokens = torch.where(on, tokens, self.trie.token_ranges[self.depth][0])
            self.logits = self.writer.extend(tokens, parents.gather(1, columns))
            self.depth += 1
        return columns, on


class _Ends:
    """What ends at or under nodes (B, m), of the items available to each row.

    Attributes:
        begin: the rank of the first item.
        own: how many end at the node.
        under: how many end at or under it.
        decided: whether they all have the same tokens.
    """

    def __init__(self, ranks: ItemRanks, nodes: Tensor) -> None:
        self.begin, end = ranks.under(nodes)
        self.under = end - self.begin
        self.own = ranks.own_end(nodes) - self.begin
        item_node = ranks.trie.item_node
        first, last = ranks.items(self.begin), ranks.items((end - 1).clamp(min=0))
        self.decided = item_node[first] == item_node[last]


class _Race(NamedTuple):
    """Contenders of a draw without replacement: (B, m) nodes, at last items.

    Attributes:
        places: which node or item.
        log_probs: of the policy.
        log_proposal: of what draws, float64.
        sums: log_proposal plus Gumbel noise, float64: the largest of all under a node; -inf for no contender.
        parents: the path that it came by.
    """

    places: Tensor
    log_probs: Tensor
    log_proposal: Tensor
    sums: Tensor
    parents: Tensor

    @property
    def alive(self) -> Tensor:
        return self.sums != -torch.inf

    def at(self, columns: Tensor) -> _Race:
        return _Race(*(part.gather(1, columns) for part in self))

    def only(self, these: Tensor) -> _Race:
        return self._replace(sums=self.sums.masked_fill(~these, -torch.inf))

    def joined(self, other: _Race) -> _Race:
        return _Race(*(torch.cat(parts, 1) for parts in zip(self, other, strict=True)))

    def first(self, count: int, threshold: Tensor) -> tuple[_Race, Tensor]:
        """The leading `count`, in order, and the largest sum that was ever left behind."""
        sums, order = _most(self.sums, count + 1)
        if sums.shape[1] > count:
            threshold = torch.maximum(threshold, sums[:, count:])
        return self.at(order[:, :count]), threshold

    def split(
        self, places: Tensor, log_probs: Tensor, log_proposal: Tensor, noise: Tensor, parents: Tensor
    ) -> _Race:
        """In place of each contender its parts (B, m, C), whose largest sum is the contender's."""
        log_probs = self.log_probs.unsqueeze(2) + log_probs
        log_proposal = self.log_proposal.unsqueeze(2) + log_proposal
        sums = _with_maximum(log_proposal + noise, self.sums.unsqueeze(2))
        parts = (places, log_probs, log_proposal, sums, parents)
        return _Race(*(part.flatten(1) for part in parts))


def _drawn_items(
    race: _Race, seeds: Tensor, ranks: ItemRanks, count: int, threshold: Tensor
) -> tuple[_Race, Tensor]:
    """The leading items of contenders that are nodes, each with the items of one token sequence."""
    ends = _Ends(ranks, race.places)
    most = max(1, int(torch.where(race.alive, ends.under, 0).max())) if race.places.numel() else 1
    slots = torch.arange(most, device=seeds.device)
    exists = (slots < ends.under.unsqueeze(2)) & race.alive.unsqueeze(2)
    at = torch.where(exists, ends.begin.unsqueeze(2) + slots, 0)
    items = ranks.items(at.flatten(1)).view(at.shape)
    part = -ends.under.unsqueeze(2).clamp(min=1).double().log()
    part = torch.where(exists, part, -torch.inf)
    noise = gumbel(seeds.unsqueeze(2), _PICK_OF_ITEM - items)
    parents = torch.zeros_like(items)
    return race.split(items, part.to(race.log_probs.dtype), part, noise, parents).first(count, threshold)


def _with_maximum(sums: Tensor, maximum: Tensor) -> Tensor:
    """Gumbel variables (.., C) given that the largest of each row is `maximum` (.., 1).

    Kool et al. 2019, appendix B.3: -log(exp(-maximum) - exp(-largest) + exp(-sums)) without overflow.
    """
    possible = sums != -torch.inf
    largest = torch.where(possible, sums, -torch.inf).amax(-1, keepdim=True)
    gap = torch.where(possible, sums - largest, 0.0)
    excess = maximum - sums + _log_one_minus_exp(gap)
    moved = maximum - excess.clamp(min=0) - torch.log1p((-excess.abs()).exp())
    return torch.where(possible & (maximum != -torch.inf), moved, -torch.inf)


def _log_one_minus_exp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) of value <= 0 (Mächler 2012)."""
    near = value > -0.6931471805599453
    return torch.where(near, (-torch.expm1(value)).log(), torch.log1p(-value.exp()))


def _log_chance(gap: Tensor) -> Tensor:
    """log(1 - exp(-exp(gap))), the log-probability that a standard Gumbel variable exceeds -gap."""
    # exp(gap) itself where it is too small to be told from its second power.
    return torch.where(gap < -37, gap, _log_one_minus_exp(-gap.clamp(min=-37).exp()))


def _best_items(ranks: ItemRanks, begin: Tensor, count: Tensor, scores: Tensor, num_items: int) -> Generated:
    """The best items of ends of beams, each with equal parts for its `count` items from rank `begin` on."""
    scores = scores - count.clamp(min=1).to(scores.dtype).log()
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    begin, count = begin.gather(1, order), count.gather(1, order)
    ends = count.cumsum(1)
    slots = torch.arange(num_items, device=begin.device).expand(begin.shape[0], -1).contiguous()
    filled = slots < ends[:, -1:]
    entry = torch.searchsorted(ends, slots, right=True).clamp(max=begin.shape[1] - 1)
    rank = slots - (ends - count).gather(1, entry) + begin.gather(1, entry)
    items = torch.where(filled, ranks.items(torch.where(filled, rank, 0)), -1)
    return Generated(items, torch.where(filled, scores.gather(1, entry), -torch.inf))


def _most(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` of (B, m), or all of them, descending, and where they are."""
    return values.topk(min(count, values.shape[1]))


def _seeds_of(nodes: Tensor, seeds: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if seeds is None:
        bounds = torch.iinfo(torch.int64)
        return torch.randint(
            bounds.min, bounds.max, nodes.shape[:1], generator=generator, device=nodes.device
        )
    if generator is not None:
        raise ValueError("seeds and generator are both given, needs one of them")
    seeds = checks.integers("seeds", seeds, nodes.shape[:1])
    checks.same_device("seeds", seeds, nodes.device)
    return seeds


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, needs at least 1")
