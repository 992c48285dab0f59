"""A generative recommender and the one that it learned from, asked together: they err in different places."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.backbones import GenerativeRecommender
from gflowgr.collaborative import ExamplesLike, Recommender
from gflowgr.contexts import Contexts
from gflowgr.decoding import evaluating
from gflowgr.generation import Generated, generate, target_log_probs
from gflowgr.metrics import Metrics, ranking_metrics
from gflowgr.ops._checks import at_least


@torch.no_grad()
def generate_together(
    recommender: GenerativeRecommender,
    teacher: Recommender,
    history: Tensor,
    *,
    teacher_weight: float = 0.5,
    num_items: int = 10,
    num_beams: int | None = None,
    exclude: Any = None,
    exclude_history: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Generated:
    """The items of the highest `(1 - w) P_F(item | history) + w P_C(item | history)`, best first.

    P_F is the generative recommender's policy, P_C the softmax of the teacher's scores. The `num_beams` best
    items of either are looked at, with both probabilities exact; with all items as beams the lists are exact.

    Args:
        recommender: left in the mode it was in.
        teacher: of the same catalogue, one whose scores are those of a distribution
            (`Recommender.is_distribution`).
        history: (B, H) items, oldest first, right-padded with -1.
        teacher_weight: w, from 0 to 1.
        num_items: k, items a context.
        num_beams: at least k, by default max(20, k).
        exclude, exclude_history: what a context must not get, as in `generate`; both probabilities are over
            the rest.
        batch_size: contexts at a time.
        progress: show bars.

    Returns:
        items and natural logarithms of their mixed probabilities (B, k), on the device of `history`; -1 and
        -inf where there are fewer.

    Raises:
        TypeError, ValueError: an argument cannot serve, or the two are of different catalogues.
    """
    num_items = at_least("num_items", num_items, 1)
    num_beams = max(20, num_items) if num_beams is None else at_least("num_beams", num_beams, num_items)
    _check(recommender, teacher, teacher_weight)
    written = generate(
        recommender,
        history,
        num_items=num_beams,
        num_beams=num_beams,
        exclude=exclude,
        exclude_history=exclude_history,
        batch_size=batch_size,
        progress=progress,
    ).items
    contexts = Contexts(recommender, history, None)
    item_filter = contexts.item_filter(exclude, None, exclude_history)
    items = torch.full((len(contexts), num_items), -1, device=history.device)
    log_probs = torch.full(items.shape, -torch.inf, device=history.device)
    everything = torch.arange(teacher.num_items, device=recommender.device)
    with evaluating(recommender):
        for rows in contexts.batches(batch_size, "rank", progress):
            rows = rows.to(history.device)
            here = history[rows].to(recommender.device)
            chosen = None if item_filter is None else item_filter.select(rows.to(recommender.device))
            scores = teacher.scores(here)
            if chosen is not None:
                scores = scores.masked_fill(chosen.hides(everything.expand(len(rows), -1)), -torch.inf)
            theirs = scores.softmax(1)
            best = scores.topk(min(num_beams, teacher.num_items))
            candidates = torch.cat(
                [best.indices.masked_fill(best.values.isneginf(), -1), written[rows].to(best.indices)], 1
            )
            known = candidates.clamp(min=0)
            logits = recommender(here, known).logits
            ours = ops.trie_token_log_probs(
                logits, recommender.tokens(known), recommender.trie, item_filter=chosen
            )
            mixed = teacher_weight * theirs.gather(1, known) + (1 - teacher_weight) * ours.sum(-1).exp()
            twice = (candidates[:, :, None] == candidates[:, None, :]).tril(-1).any(2)
            mixed = mixed.masked_fill(twice | (candidates < 0), -1.0)
            found = mixed.topk(num_items)
            # Fewer than asked for, where hardly anything is left.
            none = found.values < 0
            items[rows] = candidates.gather(1, found.indices).masked_fill(none, -1).to(items)
            log_probs[rows] = found.values.log().masked_fill(none, -torch.inf).to(log_probs)
    return Generated(items, log_probs)


def rank_together(
    recommender: GenerativeRecommender,
    teacher: Recommender,
    examples: ExamplesLike,
    *,
    teacher_weight: float = 0.5,
    num_items: int = 10,
    num_beams: int | None = None,
    exclude_history: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Metrics:
    """What `GFlowGRTrainer.rank` measures, of both together; arguments and errors as `generate_together`."""
    began = time.perf_counter()
    generated = generate_together(
        recommender,
        teacher,
        examples.history,
        teacher_weight=teacher_weight,
        num_items=num_items,
        num_beams=num_beams,
        exclude_history=exclude_history,
        batch_size=batch_size,
        progress=progress,
    )
    ours = target_log_probs(recommender, examples.history, examples.target, batch_size=batch_size)
    theirs = torch.cat(
        [
            teacher.scores(examples.history[rows]).log_softmax(1).gather(1, examples.target[rows, None])[:, 0]
            for rows in torch.arange(len(examples.target)).split(batch_size)
        ]
    )
    # In logarithms, as either may be too small for its exponential; log 0 is -inf, which weighs nothing.
    weights = torch.tensor([1 - teacher_weight, teacher_weight], dtype=ours.dtype).log()
    metrics = ranking_metrics(
        generated.items,
        examples.target,
        ks=sorted({min(5, num_items), num_items}),
        num_items=recommender.semantic_ids.num_items,
        codes=recommender.semantic_ids.codes,
        target_log_probs=torch.logaddexp(ours + weights[0], theirs.to(ours) + weights[1]),
    )
    return replace(metrics, seconds=time.perf_counter() - began)


def _check(recommender: GenerativeRecommender, teacher: Recommender, teacher_weight: float) -> None:
    if (
        not isinstance(teacher_weight, (int, float))
        or not 0 <= teacher_weight <= 1
        or math.isnan(teacher_weight)
    ):
        raise ValueError(f"teacher_weight is {teacher_weight!r}, needs a number from 0 to 1")
    if not teacher.is_distribution:
        raise ValueError(
            f"teacher is {teacher.name}, whose scores are no distribution, needs sasrec or mixture"
        )
    if teacher.num_items != recommender.semantic_ids.num_items:
        raise ValueError(
            f"teacher has {teacher.num_items} items, needs {recommender.semantic_ids.num_items} like "
            "recommender"
        )
