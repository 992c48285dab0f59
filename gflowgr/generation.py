"""Items out of a generative recommender: beam search over the trie, sampling, scores of a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor

from gflowgr import ops
from gflowgr.backbones import GenerativeRecommender
from gflowgr.reference import accumulation_dtype
from gflowgr.search import Generated
from gflowgr.semantic_ids import EOS
from gflowgr.trie import PrefixTrie


class _Endings(NamedTuple):
    """Where the items of a trie end.

    Attributes:
        own: (num_nodes,), items that end exactly at a node.
        decided: bool (num_nodes,), whether one leaf is under a node, so that every step from it on is forced.
    """

    own: Tensor
    decided: Tensor


def generate(
    model: GenerativeRecommender,
    history: Tensor,
    *,
    num_items: int = 10,
    num_beams: int | None = None,
    exclude_history: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Generated:
    """The most probable items of each context, by beam search over the trie.

    Every beam is a prefix of an item and ends at one, so min(num_items, reachable items) results are certain.
    Beams are ranked by log P_F, the policy that training optimises. Once a prefix has one leaf left the model
    is not asked again, and its beam is free for others. An item that is a prefix of other items competes with
    its own log-probability. With as many beams as items the search is exhaustive.

    Args:
        model: left in the mode it was in.
        history: (B, H) items, oldest first, -1 is padding, on any device.
        num_items: k, results a context.
        num_beams: prefixes to keep at each depth, by default max(20, k).
        exclude_history: leave out the items of `history`, as if the trie did not lead to them: no beam is
            spent on them.
        batch_size: contexts at a time.
        progress: show a bar.

    Returns:
        items and log-probabilities (B, k) on the device of `history`, best first.

    Raises:
        TypeError, ValueError: an argument is out of range, or `history` is no (B, H) of known items.
    """
    beams = max(20, num_items) if num_beams is None else num_beams
    for name, value in (("num_items", num_items), ("num_beams", beams), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}, needs at least 1")
    if beams < num_items:
        raise ValueError(f"num_beams is {beams}, needs at least num_items, {num_items}")
    history = model.checked("history", history)
    with _evaluating(model):
        found = [
            (rows, _beam_search(model, history[rows].to(model.device), num_items, beams, exclude_history))
            for rows in _batches(history, batch_size, "generate", progress)
        ]
    return _in_order(found, history, num_items)


def sample(
    model: GenerativeRecommender,
    history: Tensor,
    num_samples: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Generated:
    """Draws items from the forward policy, independently and with replacement.

    The policy goes on at an inner node, so an item that is a prefix of others is never drawn. Among items of
    the same tokens the draw is uniform.

    Args:
        model: left in the mode it was in.
        history: (B, H) items, oldest first, -1 is padding.
        num_samples: M.
        temperature: above 0, divides the logits of the draw.
        generator: of the model's device.

    Returns:
        items (B, M) and their log-probs under the policy at temperature 1, on the device of `history`.

    Raises:
        TypeError, ValueError: an argument is out of range, or `history` is no (B, H) of known items.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, needs at least 1")
    history = model.checked("history", history)
    if not len(history):
        return _in_order([], history, num_samples)
    with _evaluating(model):
        drawn = _sample(model, history.to(model.device), num_samples, temperature, generator)
    return drawn.to(history.device)


def score_all(model: GenerativeRecommender, history: Tensor, *, batch_size: int = 16) -> Tensor:
    """log P_F of every item of the catalogue: (B, H) -> (B, N).

    For small catalogues: it runs the model on every prefix, in memory of the square of their number.
    """
    history = model.checked("history", history)
    scores = torch.empty(history.shape[0], model.trie.num_items, dtype=_dtype(model), device=history.device)
    with _evaluating(model):
        for rows in _batches(history, batch_size, "score", False):
            scores[rows] = _score_all(model, history[rows].to(model.device)).to(scores)
    return scores


def target_log_probs(
    model: GenerativeRecommender, history: Tensor, target: Tensor, *, batch_size: int = 64
) -> Tensor:
    """log P_F of one item of each context: (B, H), (B,) -> (B,)."""
    history, target = model.checked("history", history), model.checked("target", target.unsqueeze(-1))
    if target.shape[0] != history.shape[0]:
        raise ValueError(f"target has {target.shape[0]} rows, needs {history.shape[0]} like history")
    scores = torch.empty(history.shape[0], dtype=_dtype(model), device=history.device)
    with _evaluating(model):
        for rows in _batches(history, batch_size, "score", False):
            items = target[rows].to(model.device)
            policy = model(history[rows].to(model.device), items)
            log_probs = ops.trie_token_log_probs(policy.logits, model.tokens(items), model.trie)
            scores[rows] = log_probs.sum((1, 2)).to(scores)
    return scores


class TrieLogitsProcessor(LogitsProcessor):
    """Makes transformers' own `generate` follow the forward policy over a trie; ends at a leaf by EOS.

    Args:
        trie: on the device of the scores.
        prompt_length: tokens in front of the generated ones: 1 for T5 (the start token), the width of
            `input_ids` for decoder-only models.
        eos: the model's end token.
    """

    def __init__(self, trie: PrefixTrie, prompt_length: int, eos: int = EOS) -> None:
        self.trie, self.prompt_length, self.eos = trie, prompt_length, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = input_ids[:, self.prompt_length :]
        nodes = F.pad(self.trie.walk(written), (1, 0))[:, -1]
        log_probs = ops.trie_log_softmax(scores, nodes, self.trie)
        ended = log_probs.isneginf().all(-1)
        log_probs[:, self.eos] = torch.where(ended, 0.0, log_probs[:, self.eos])
        return log_probs


def prefix_allowed_tokens(
    trie: PrefixTrie, prompt_length: int, eos: int = EOS
) -> Callable[[int, Tensor], list[int]]:
    """The `prefix_allowed_tokens_fn` of transformers' own `generate`; arguments as in `TrieLogitsProcessor`.

    It is asked for one beam at a time, and its scores are not log P_F for want of renormalising.
    """

    def allowed(batch: int, input_ids: Tensor) -> list[int]:
        written = input_ids[prompt_length:]
        node = int(trie.walk(written)[-1]) if written.numel() else 0
        children = trie.children(node).tolist() if node >= 0 else []
        return children or [eos]

    return allowed


def _beam_search(
    model: GenerativeRecommender, history: Tensor, num_items: int, beams: int, exclude_history: bool
) -> Generated:
    trie = model.trie
    endings = _endings(trie)
    exhausted = _Exhausted(model, history) if exclude_history else None
    context = model.encode(history)
    logits = context.logits.unsqueeze(1)
    nodes = torch.zeros_like(history[:, :1])
    scores = torch.zeros(nodes.shape, dtype=_dtype(model), device=history.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for depth, (low, high) in enumerate(trie.token_ranges):
        # Outside the tokens of this depth all is -inf.
        log_probs = ops.trie_log_softmax(logits, nodes, trie)[..., low : high + 1] + scores.unsqueeze(-1)
        if exhausted is not None:
            exhausted.remove(log_probs, nodes, depth)
        width = min(beams, trie.level_offsets[depth + 2] - trie.level_offsets[depth + 1])
        scores, chosen = log_probs.flatten(1).topk(min(width, log_probs[0].numel()))
        parents, tokens = chosen // log_probs.shape[-1], chosen % log_probs.shape[-1] + low
        nodes = trie.walk(tokens.unsqueeze(-1), nodes.gather(1, parents)).squeeze(-1)
        nodes = torch.where(scores.isneginf(), -1, nodes)
        place = nodes.clamp(min=0)
        count = torch.where(endings.decided[place], trie.item_count[place], endings.own[place])
        found.append((nodes, torch.where(nodes < 0, 0, count), scores))
        going, on = _pack((nodes >= 0) & ~endings.decided[place])
        if going.shape[1] == 0:
            break
        logits, context = model.extend(context, tokens.gather(1, going), parents.gather(1, going))
        nodes = torch.where(on, nodes.gather(1, going), -1)
        scores = scores.gather(1, going)
    ends, counts, log_probs = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    return _best(trie, ends, counts, log_probs, num_items, history if exclude_history else None)


def _best(
    trie: PrefixTrie,
    nodes: Tensor,
    counts: Tensor,
    scores: Tensor,
    num_items: int,
    excluded: Tensor | None,
) -> Generated:
    """The first items of the best ends of beams: the first `counts` items at or under each of `nodes`."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    nodes, counts = nodes.gather(1, order), counts.gather(1, order).long()
    ends = counts.cumsum(1)
    slots = torch.arange(num_items + (0 if excluded is None else excluded.shape[1]), device=nodes.device)
    slots = slots.expand(nodes.shape[0], -1).contiguous()
    filled = slots < ends[:, -1:]
    entry = torch.searchsorted(ends, slots, right=True).clamp(max=nodes.shape[1] - 1)
    rank = slots - (ends - counts).gather(1, entry)
    first = trie.first_item[nodes.gather(1, entry).clamp(min=0)].long()
    items = trie.item_order[torch.where(filled, first + rank, 0)].long()
    items = torch.where(filled, items, -1)
    log_probs = torch.where(filled, scores.gather(1, entry), -torch.inf)
    if excluded is not None:
        known = (items.unsqueeze(2) == excluded.unsqueeze(1)).any(2)
        items, log_probs = items.masked_fill(known, -1), log_probs.masked_fill(known, -torch.inf)
        order = (items < 0).long().argsort(dim=1, stable=True)
        items, log_probs = items.gather(1, order), log_probs.gather(1, order)
    return Generated(items[:, :num_items], log_probs[:, :num_items])


class _Exhausted:
    """The nodes under which a context's history leaves no item, by depth."""

    def __init__(self, model: GenerativeRecommender, history: Tensor) -> None:
        repeated = (history.unsqueeze(2) == history.unsqueeze(1)).tril(-1).any(2)
        self.tokens = model.tokens(history.masked_fill(repeated, -1))
        nodes = model.trie.walk(self.tokens)
        through = (nodes.unsqueeze(1) == nodes.unsqueeze(2)).sum(2)
        self.exhausted = (nodes >= 0) & (through == model.trie.item_count[nodes.clamp(min=0)])
        self.parents = F.pad(nodes, (1, 0))[..., :-1]
        self.first_tokens = [low for low, _ in model.trie.token_ranges]

    def remove(self, log_probs: Tensor, nodes: Tensor, depth: int) -> None:
        """Sets the log-probs (B, n, tokens) of the steps into such nodes to -inf."""
        met = (nodes.unsqueeze(1) == self.parents[..., depth].unsqueeze(2)) & self.exhausted[..., depth, None]
        row, entry, beam = met.nonzero(as_tuple=True)
        log_probs[row, beam, self.tokens[row, entry, depth] - self.first_tokens[depth]] = -torch.inf


def _sample(
    model: GenerativeRecommender,
    history: Tensor,
    num_samples: int,
    temperature: float,
    generator: torch.Generator | None,
) -> Generated:
    trie = model.trie
    endings = _endings(trie)
    context = model.encode(history)
    logits = context.logits.unsqueeze(1).expand(-1, num_samples, -1)
    ends = torch.zeros(history.shape[0], num_samples, dtype=torch.long, device=history.device)
    log_probs = torch.zeros(ends.shape, dtype=_dtype(model), device=history.device)
    going = torch.arange(num_samples, device=history.device).expand(ends.shape)
    parents = nodes = torch.zeros_like(going)
    on = torch.ones_like(going, dtype=torch.bool)
    while True:
        tokens, reached, step = ops.trie_sample(
            logits, nodes, trie, temperature=temperature, generator=generator
        )
        ends = ends.scatter(1, going, torch.where(on, reached, ends.gather(1, going)))
        log_probs = log_probs.scatter_add(1, going, step)
        kept, still = _pack(on & ~endings.decided[reached.clamp(min=0)])
        if kept.shape[1] == 0:
            break
        logits, context = model.extend(context, tokens.gather(1, kept).clamp(min=0), parents.gather(1, kept))
        nodes, going, on = torch.where(still, reached.gather(1, kept), -1), going.gather(1, kept), still
        parents = torch.arange(kept.shape[1], device=history.device).expand(kept.shape)
    for _ in range(trie.max_depth):
        first = trie.first_child[ends]
        ends = torch.where(first < trie.first_child[ends + 1], first, ends).long()
    draw = torch.rand(ends.shape, generator=generator, device=ends.device, dtype=torch.float64)
    rank = (draw * endings.own[ends]).long()
    return Generated(trie.item_order[trie.first_item[ends] + rank].long(), log_probs)


def _score_all(model: GenerativeRecommender, history: Tensor) -> Tensor:
    trie = model.trie
    context = model.encode(history)
    logits = context.logits.unsqueeze(1)
    inner = torch.zeros(1, dtype=torch.long, device=history.device)
    of_nodes = [torch.zeros(history.shape[0], 1, dtype=_dtype(model), device=history.device)]
    for depth in range(trie.max_depth):
        begin, end = trie.level_offsets[depth + 1 : depth + 3]
        nodes = torch.arange(begin, end, device=history.device)
        tokens = trie.token[begin:end].long()
        row = torch.searchsorted(inner, trie.parent[begin:end].long())
        log_probs = ops.trie_log_softmax(logits, inner.expand(history.shape[0], -1), trie)
        before = of_nodes[-1][:, trie.parent[begin:end].long() - trie.level_offsets[depth]]
        of_nodes.append(before + log_probs[:, row, tokens])
        has_children = trie.first_child[nodes + 1] > trie.first_child[nodes]
        if depth + 1 < trie.max_depth:
            inner = nodes[has_children]
            batch = history.shape[0]
            logits, context = model.extend(
                context, tokens[has_children].expand(batch, -1), row[has_children].expand(batch, -1)
            )
    return torch.cat(of_nodes, 1)[:, trie.item_node.long()]


def _dtype(model: GenerativeRecommender) -> torch.dtype:
    """Of log-probabilities."""
    return accumulation_dtype(model.transformer.dtype)


def _pack(active: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (B, n) of each row's active columns, as many as the fullest row has, and which are active."""
    most = int(active.sum(1).max()) if active.numel() else 0
    columns = (~active).long().argsort(dim=1, stable=True)[:, :most]
    return columns, active.gather(1, columns)


_ENDINGS: WeakKeyDictionary[PrefixTrie, _Endings] = WeakKeyDictionary()


def _endings(trie: PrefixTrie) -> _Endings:
    if trie not in _ENDINGS:
        own = torch.bincount(trie.item_node, minlength=trie.num_nodes)
        leaves = (trie.first_child[1:] == trie.first_child[:-1]).long()
        for begin, end in reversed(list(pairwise(trie.level_offsets[1:]))):
            leaves = leaves.index_add(0, trie.parent[begin:end].long(), leaves[begin:end])
        _ENDINGS[trie] = _Endings(own, leaves == 1)
    return _ENDINGS[trie]


@contextmanager
def _evaluating(model: GenerativeRecommender) -> Iterator[None]:
    """No gradients and no dropout, every module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _batches(history: Tensor, batch_size: int, name: str, progress: bool) -> Iterator[Tensor]:
    """Rows of each batch; histories of like length go together, which leaves little padding."""
    order = (history >= 0).sum(-1).argsort(stable=True)
    with tqdm(total=len(order), desc=name, unit=" contexts", disable=not progress) as bar:
        for rows in order.split(batch_size) if len(order) else ():
            yield rows
            bar.update(len(rows))


def _in_order(found: list[tuple[Tensor, Generated]], history: Tensor, num_items: int) -> Generated:
    if not found:
        return Generated(history.new_empty(0, num_items), torch.empty(0, num_items, device=history.device))
    back = torch.cat([rows for rows, _ in found]).argsort()
    items = torch.cat([part.items for _, part in found]).to(history.device)
    log_probs = torch.cat([part.log_probs for _, part in found]).to(history.device)
    return Generated(items[back], log_probs[back])
