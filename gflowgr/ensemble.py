"""A generative recommender and the one that it learned from, asked together: they err in different places."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.backbones import GenerativeRecommender
from gflowgr.collaborative import Recommender
from gflowgr.contexts import Contexts
from gflowgr.data import Examples
from gflowgr.decoding import evaluating
from gflowgr.generation import Generated, generate
from gflowgr.metrics import Metrics, ranking_metrics
from gflowgr.ops._checks import at_least
from gflowgr.scoring import log_shares

# Items whose logits are there at a time, each of as many rows as it has tokens.
_ITEMS_AT_ONCE = 512


# What stands for a teacher's weight in settings where the validation part is to choose, and among what.
# Validation flatters a model that was trained on rollouts, which have asked it the same before, and would ask
# for too little of the teacher: no less than half is a choice.
BY_VALIDATION = "validation"
WEIGHTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Candidates:
    """The best items of a generative recommender and of its teacher, and how probable each finds them.

    Attributes:
        items: (B, C) int64, -1 where there is none.
        ours: (B, C) natural logarithms of the recommender's probabilities, -inf where there is none.
        theirs: (B, C), the teacher's.
    """

    items: Tensor
    ours: Tensor
    theirs: Tensor

    def best(self, teacher_weight: float, num_items: int) -> Generated:
        """Those of the highest weighted geometric means, as `generate_together` gives them."""
        none = self.items < 0
        mixed = _mix(self.ours, self.theirs, teacher_weight)
        # Behind what there is, however improbable.
        found = mixed.nan_to_num(neginf=torch.finfo(mixed.dtype).min).masked_fill(none, -torch.inf)
        found, place = found.topk(num_items)
        none = found.isneginf()
        return Generated(
            self.items.gather(1, place).masked_fill(none, -1),
            mixed.gather(1, place).masked_fill(none, -torch.inf),
        )


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
    """Of the best items of either those of the highest `P_F ** (1 - w) * P_C ** w`, best first.

    P_F(item | history) is the generative recommender's policy, of which items with the same tokens have equal
    parts; P_C is the softmax of the teacher's scores. A geometric mean (a logarithmic opinion pool; Genest &
    Zidek 1986) wants an item that neither finds improbable. Candidates are the `num_beams` best items of
    each: what is further down in both cannot come, however high its mean.

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
        batch_size: contexts at a time; fewer where there are many beams.
        progress: show bars.

    Returns:
        items and natural logarithms of the weighted geometric means of their probabilities (B, k), which add
        up to less than 1 over a catalogue, on the device of `history`; -1 and -inf where there are fewer.

    Raises:
        TypeError, ValueError: an argument cannot serve, or the two are of different catalogues.
    """
    check_teacher_weight("teacher_weight", teacher_weight)
    found = candidates(
        recommender,
        teacher,
        history,
        num_beams=_beams(num_items, num_beams),
        exclude=exclude,
        exclude_history=exclude_history,
        batch_size=batch_size,
        progress=progress,
    )
    return found.best(teacher_weight, num_items)


@torch.no_grad()
def candidates(
    recommender: GenerativeRecommender,
    teacher: Recommender,
    history: Tensor,
    *,
    num_beams: int = 20,
    exclude: Any = None,
    exclude_history: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Candidates:
    """What `generate_together` chooses from: the `num_beams` best items of each, those of both once.

    Arguments and errors are those of `generate_together`; results are on the device of `history`.
    """
    _check(recommender, teacher)
    num_beams = at_least("num_beams", num_beams, 1)
    written = generate(
        recommender,
        history,
        num_items=num_beams,
        num_beams=num_beams,
        exclude=exclude,
        exclude_history=exclude_history,
        batch_size=batch_size,
        progress=progress,
    )
    contexts = Contexts(recommender, history, None)
    trie, item_filter = contexts.trie, contexts.item_filter(exclude, None, exclude_history)
    width = written.items.shape[1] + min(num_beams, trie.num_items)
    items = torch.full((len(contexts), width), -1, device=history.device)
    ours = torch.full(items.shape, -torch.inf, dtype=contexts.dtype, device=history.device)
    theirs = ours.clone()
    everything = torch.arange(trie.num_items, device=trie.device)
    batch_size = min(batch_size, max(1, _ITEMS_AT_ONCE // num_beams))
    with evaluating(recommender):
        for rows in contexts.batches(batch_size, "rank", progress):
            rows = rows.to(history.device)
            here = history[rows].to(trie.device)
            chosen = None if item_filter is None else item_filter.select(rows.to(trie.device))
            scores = teacher.scores(here).to(contexts.dtype)
            hidden = torch.zeros_like(scores, dtype=torch.bool)
            if chosen is not None:
                hidden = chosen.hides(everything.expand(len(rows), -1))
            of_teacher = scores.masked_fill(hidden, -torch.inf).log_softmax(1)
            best = of_teacher.topk(min(num_beams, trie.num_items)).indices
            of_best = ops.trie_token_log_probs(
                recommender(here, best).logits, recommender.tokens(best), trie, item_filter=chosen
            )
            of_best = of_best.sum(-1).to(of_teacher) + log_shares(trie, ~hidden).gather(1, best)
            # Those of both come once, from the policy's list.
            mine = written.items[rows].to(best)
            again = (best[:, :, None] == mine[:, None, :]).any(2) | hidden.gather(1, best)
            found = torch.cat([mine, best.masked_fill(again, -1)], 1)
            none = found < 0
            of_policy = torch.cat([written.log_probs[rows].to(of_teacher), of_best], 1)
            items[rows] = found.to(items)
            ours[rows] = of_policy.masked_fill(none, -torch.inf).to(ours)
            theirs[rows] = of_teacher.gather(1, found.clamp(min=0)).masked_fill(none, -torch.inf).to(theirs)
    return Candidates(items, ours, theirs)


def rank_together(
    recommender: GenerativeRecommender,
    teacher: Recommender,
    examples: Examples,
    *,
    teacher_weight: float = 0.5,
    num_items: int = 10,
    num_beams: int | None = None,
    exclude_history: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> Metrics:
    """What `GFlowGRTrainer.rank` measures, of both together, but for the likelihood.

    Arguments and errors are those of `generate_together`; `exclude_history` is of all that a user took
    before, also where `history` is shorter.
    """
    measured = rank_by_weight(
        recommender,
        teacher,
        examples,
        teacher_weights=[teacher_weight],
        num_items=num_items,
        num_beams=num_beams,
        exclude_history=exclude_history,
        batch_size=batch_size,
        progress=progress,
    )
    return measured[teacher_weight]


def rank_by_weight(
    recommender: GenerativeRecommender,
    teacher: Recommender,
    examples: Examples,
    *,
    teacher_weights: Sequence[float] = WEIGHTS,
    num_items: int = 10,
    num_beams: int | None = None,
    exclude_history: bool = False,
    batch_size: int = 64,
    progress: bool = False,
) -> dict[float, Metrics]:
    """What `rank_together` measures, by the teacher's weight; candidates are searched once for all weights.

    Of a validation part, `best_weight` of it is what weight to rank with. A weight of 0 is the model's
    ranking of what either finds best, not of what its own search finds.
    """
    began = time.perf_counter()
    if not teacher_weights:
        raise ValueError("teacher_weights is empty, needs at least one weight")
    for weight in teacher_weights:
        check_teacher_weight("teacher_weight", weight)
    found = candidates(
        recommender,
        teacher,
        examples.history,
        num_beams=_beams(num_items, num_beams),
        exclude=examples.taken() if exclude_history else None,
        batch_size=batch_size,
        progress=progress,
    )
    measured = {
        weight: ranking_metrics(
            found.best(weight, num_items).items,
            examples.target,
            ks=sorted({min(5, num_items), num_items}),
            num_items=teacher.num_items,
            codes=recommender.semantic_ids.content_codes,
        )
        for weight in teacher_weights
    }
    seconds = time.perf_counter() - began
    return {weight: replace(metrics, seconds=seconds) for weight, metrics in measured.items()}


def best_weight(measured: Mapping[float, Metrics]) -> float:
    """The weight of the highest NDCG over whole lists, the lowest of several."""
    return max(sorted(measured), key=lambda weight: _ndcg(measured[weight]))


def by_weight(measured: Mapping[float, Metrics]) -> dict[str, float]:
    """NDCG by the weight in short, such as "0.5", for a file."""
    return {f"{weight:g}": _ndcg(metrics) for weight, metrics in measured.items()}


def _ndcg(metrics: Metrics) -> float:
    """Over as many places as the lists have."""
    found = {name: value for name, value in metrics.summary().items() if name.startswith("ndcg@")}
    return found[max(found, key=lambda name: int(name.partition("@")[2]))]


def _beams(num_items: int, num_beams: int | None) -> int:
    num_items = at_least("num_items", num_items, 1)
    num_beams = max(20, num_items) if num_beams is None else at_least("num_beams", num_beams, 1)
    if num_beams < num_items:
        raise ValueError(f"num_beams is {num_beams}, needs at least num_items, {num_items}")
    return num_beams


def _mix(ours: Tensor, theirs: Tensor, teacher_weight: float) -> Tensor:
    # What has no weight has no say either where it finds an item impossible.
    if teacher_weight in (0, 1):
        return theirs if teacher_weight else ours
    return (1 - teacher_weight) * ours + teacher_weight * theirs


def _check(recommender: GenerativeRecommender, teacher: Recommender) -> None:
    for name, value, kind in (
        ("recommender", recommender, GenerativeRecommender),
        ("teacher", teacher, Recommender),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"{name} is a {type(value).__name__}, needs a {kind.__name__}")
    check_distribution("teacher", teacher)
    if teacher.num_items != recommender.semantic_ids.num_items:
        raise ValueError(
            f"teacher has {teacher.num_items} items, needs {recommender.semantic_ids.num_items} like "
            "recommender"
        )


def check_teacher_weight(name: str, value: object, needed: str = "a number") -> None:
    """Raises TypeError or ValueError for what is no number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}, needs {needed}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name} is {value!r}, needs to be from 0 to 1")


def check_distribution(name: str, model: Recommender | type[Recommender]) -> None:
    """Raises ValueError for a recommender whose scores say nothing of probabilities."""
    if not model.is_distribution:
        raise ValueError(
            f"{name} is {model.name}, whose scores are no distribution, needs sasrec, mixture or popularity "
            "to rank beside a model"
        )
