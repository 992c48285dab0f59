"""Two runs on the same users: differences in each metric, by length of history and by popularity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gflowgr.metrics import bootstrap_interval, paired_bootstrap
from gflowgr.quality.results import metric_of_ranks
from gflowgr.quality.runs import Run, require_same_data
from gflowgr.report import Estimate

KS = (5, 10)
LENGTH_GROUPS = 4
POPULARITY = ("tail", "middle", "head")


@dataclass(frozen=True)
class Compared:
    """A metric of both, and A minus B; intervals are over users, 95 %, None for a single user."""

    metric: str
    a: Estimate
    b: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Group:
    """Users who have something in common.

    Attributes:
        name: of the group, "" where the range says enough.
        low: smallest value in it of what it is made by.
        high: largest value.
        users: how many.
        metrics: NDCG and recall at the largest cut-off, for them alone.
    """

    name: str
    low: int
    high: int
    users: int
    metrics: list[Compared]

    @property
    def range(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class RankChanges:
    """Where the targets stand in A's lists against B's, in users; averages over pairs of seeds.

    Attributes:
        both: users for each number of places by which A has the target further up, where both list it.
        only_a: users whose target A alone lists.
        only_b: users whose target B alone lists.
        neither: users whose target none of them lists.
    """

    both: dict[int, float]
    only_a: float
    only_b: float
    neither: float


@dataclass(frozen=True)
class Comparison:
    """All of it.

    Attributes:
        a: name of the first run.
        b: name of the second.
        seeds: what was averaged, in words.
        excluded: what their lists leave out, where that differs, in words.
        num_users: users of the test part.
        num_items: items in the catalogue.
        places: length of the lists that both have.
        metrics: recall and NDCG at the cut-offs.
        by_length: users by the length of their history, shortest first.
        by_popularity: users by the popularity of their target, most popular first.
        changes: of the targets' places.
    """

    a: str
    b: str
    seeds: str
    excluded: str
    num_users: int
    num_items: int
    places: int
    metrics: list[Compared]
    by_length: list[Group]
    by_popularity: list[Group]
    changes: RankChanges

    def compared(self, metric: str) -> Compared:
        return next(compared for compared in self.metrics if compared.metric == metric)

    @property
    def deciding(self) -> str:
        """NDCG at the largest cut-off."""
        return next(c.metric for c in reversed(self.metrics) if c.metric.startswith("ndcg"))


def compare(a: Run, b: Run) -> Comparison:
    """Compares two runs user by user.

    Two rows are compared over the seeds that both have, seed by seed; a row and a single run, or two single
    runs, each by what they have. Users are grouped by quantiles, those with equal values together: by length
    of their history into four, by the target's popularity in the training part into head, middle and tail,
    about a third of the test targets each, since result files know the popularity of targets alone. The usual
    thirds of the training interactions would be the same if the test users chose as all did in training.

    Raises:
        ValueError: runs of different data, or rows without a common seed.
    """
    require_same_data(a, b)
    pairs, seeds = _pairs(a, b)
    places = min(a.places, b.places)
    ks = [k for k in KS if k <= places] or [places]
    names = [f"{name}@{k}" for name in ("recall", "ndcg") for k in ks]
    values = {
        name: (
            _mean([first for first, _ in pairs], name, places),
            _mean([other for _, other in pairs], name, places),
        )
        for name in names
    }
    shown = [f"ndcg@{ks[-1]}", f"recall@{ks[-1]}"]
    popularity = a.users.target_popularity
    # Of histories that are cut the longer say more.
    length = np.maximum(a.users.history_length, b.users.history_length)

    def group(name: str, values_of: np.ndarray, members: np.ndarray) -> Group:
        metrics = [_compared(metric, *(part[members] for part in values[metric])) for metric in shown]
        low, high = int(values_of[members].min()), int(values_of[members].max())
        return Group(name, low, high, int(members.sum()), metrics)

    return Comparison(
        a.name,
        b.name,
        seeds,
        _difference_in_lists(a, b),
        len(a.users),
        a.num_items,
        places,
        [_compared(name, *values[name]) for name in names],
        [group("", length, members) for _, members in _members(length, LENGTH_GROUPS)],
        [
            group(POPULARITY[index], popularity, members)
            for index, members in reversed(_members(popularity, len(POPULARITY)))
        ],
        rank_changes(pairs, ks[-1]),
    )


def quantile_groups(values: np.ndarray, count: int) -> np.ndarray:
    """Which of `count` groups of about equal size each value falls in, ascending; equal values fall together.

    A group is empty where many values are equal.
    """
    _, position, sizes = np.unique(values, return_inverse=True, return_counts=True)
    middle = (np.cumsum(sizes) - sizes / 2) / len(values)
    return np.minimum((middle * count).astype(int), count - 1)[position]


def rank_changes(pairs: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> RankChanges:
    """How the places of the targets in the first k differ, averaged over pairs of ranks (U,)."""
    both = np.zeros(2 * k - 1)
    only_a = only_b = neither = 0.0
    for first, other in pairs:
        ours, theirs = (np.where(rank <= k, rank, 0).astype(np.int64) for rank in (first, other))
        listed = (ours > 0) & (theirs > 0)
        both += np.bincount((theirs - ours)[listed] + k - 1, minlength=2 * k - 1) / len(pairs)
        only_a += float(((ours > 0) & (theirs == 0)).sum()) / len(pairs)
        only_b += float(((ours == 0) & (theirs > 0)).sum()) / len(pairs)
        neither += float(((ours == 0) & (theirs == 0)).sum()) / len(pairs)
    return RankChanges({change - k + 1: float(n) for change, n in enumerate(both)}, only_a, only_b, neither)


def _pairs(a: Run, b: Run) -> tuple[list[tuple[np.ndarray, np.ndarray]], str]:
    """The ranks to set against each other, and in words which they are."""
    if None in a.ranks or None in b.ranks:
        pairs = [(ours, theirs) for ours in a.ranks.values() for theirs in b.ranks.values()]
        several = [
            f"{run.name} is averaged over {len(run.ranks)} seeds" for run in (a, b) if len(run.ranks) > 1
        ]
        return pairs, "".join(several)
    seeds = sorted(seed for seed in a.ranks.keys() & b.ranks.keys() if seed is not None)
    if not seeds:
        raise ValueError(
            f"{a.name} and {b.name} have no seed in common: {sorted(map(str, a.ranks))} and "
            f"{sorted(map(str, b.ranks))}"
        )
    named = ", ".join(map(str, seeds))
    words = f"averaged over the common seeds {named}" if len(seeds) > 1 else f"seed {named} of both"
    return [(a.ranks[seed], b.ranks[seed]) for seed in seeds], words


def _difference_in_lists(a: Run, b: Run) -> str:
    if a.excluded == b.excluded:
        return ""
    ours, theirs = (f"leave out {run.excluded or 'nothing'}" for run in (a, b))
    return f"lists of A {ours}, those of B {theirs}"


def _mean(ranks: Sequence[np.ndarray], metric: str, places: int) -> np.ndarray:
    return np.mean([metric_of_ranks(metric, rank, places) for rank in ranks], axis=0)


def _members(values: np.ndarray, count: int) -> list[tuple[int, np.ndarray]]:
    groups = quantile_groups(values, count)
    return [(int(index), groups == index) for index in np.unique(groups)]


def _compared(metric: str, a: np.ndarray, b: np.ndarray) -> Compared:
    if len(a) < 2:
        return Compared(metric, Estimate(float(a[0])), Estimate(float(b[0])), Estimate(float(a[0] - b[0])))
    difference = paired_bootstrap(a, b)
    return Compared(
        metric,
        Estimate(float(a.mean()), *bootstrap_interval(a)),
        Estimate(float(b.mean()), *bootstrap_interval(b)),
        Estimate(difference.mean, difference.low, difference.high),
    )
