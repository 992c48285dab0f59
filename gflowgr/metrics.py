"""Ranking metrics over items, with bootstrap confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_USERS_AT_ONCE = 4096
# Numbers of a byte that a bootstrap may keep for the next one.
_KEPT_DRAWS = 50_000_000


# Metrics of lists of a length, and those of which less is better.
OF_LISTS = ("recall", "ndcg", "coverage", "gini", "diversity")
LOWER_IS_BETTER = ("gini", "nll")


@dataclass(frozen=True, eq=False)
class Metrics:
    """What `ranking_metrics` found.

    Attributes:
        num_users: users, one target each.
        num_items: items in the catalogue.
        per_user: float64 (num_users,) for each of "recall@k", "ndcg@k", "diversity@k" and "nll"; NaN where a
            metric is not defined for a user.
        overall: one number over all users for each of "coverage@k" and "gini@k".
        rank: int64 (num_users,), the target's place in the list of a user, 1 for the first item, 0 where the
            list does not hold it.
        seconds: that making the lists took; None where nobody measured it.
    """

    num_users: int
    num_items: int
    per_user: dict[str, Tensor]
    overall: dict[str, float]
    rank: Tensor
    seconds: float | None = None

    def summary(self) -> dict[str, float]:
        """Every metric as one number, those of users as their mean over the users it is defined for."""
        means = {name: float(values.nanmean()) for name, values in self.per_user.items()}
        return means | self.overall

    def intervals(
        self, *, level: float = 0.95, samples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """A bootstrap confidence interval for the mean of each metric of users that is defined for any."""
        return {
            name: bootstrap_interval(values, level=level, samples=samples, seed=seed)
            for name, values in self.per_user.items()
            if not values.isnan().all()
        }

    def to_dict(self, *, level: float = 0.95, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
        """Summary and intervals as what JSON can hold, None for what is not defined."""
        intervals = self.intervals(level=level, samples=samples, seed=seed)
        values = {
            name: {
                "value": value if math.isfinite(value) else None,
                "interval": list(intervals[name]) if name in intervals else None,
            }
            for name, value in self.summary().items()
        }
        return {"num_users": self.num_users, "num_items": self.num_items, "level": level, "metrics": values}


@dataclass(frozen=True)
class Difference:
    """The mean difference between two runs on the same users.

    Attributes:
        mean: of the first run minus the second.
        low: lower end of the confidence interval.
        high: upper end.
        standard_error: of the mean, over users.
    """

    mean: float
    low: float
    high: float
    standard_error: float


def ranking_metrics(
    recommended: Tensor,
    target: Tensor,
    ks: Sequence[int] = (5, 10),
    *,
    num_items: int,
    codes: Tensor | None = None,
    embeddings: Tensor | None = None,
    target_log_probs: Tensor | None = None,
) -> Metrics:
    """Measures lists of recommended items, one list and one target a user.

    * recall@k: 1 if the target is among the first k items, else 0.
    * ndcg@k: 1 / log2(1 + rank of the target) if that is at most k, else 0.
    * coverage@k: share of the catalogue that is in anyone's first k items.
    * gini@k: Gini coefficient of how often each item of the catalogue is among the first k, those that never
      are included; 0 if all are as often, towards 1 the fewer items share the lists.
    * diversity@k: 1 - mean similarity of the pairs among the first k items, for k from 2 on and users with 2
      items or more. Similarity is the share of positions with equal codes if `codes` are given, the cosine if
      `embeddings` are (0 with an embedding of zeros).
    * nll: - log-probability of the target.

    Args:
        recommended: integers (U, K), best first, K at least the largest k; -1 is an empty slot.
        target: integers (U,).
        ks: the cut-offs.
        num_items: items of the catalogue.
        codes: integers (num_items, L), -1 pads tails; leave out a level that only tells collisions apart.
        embeddings: floats (num_items, D), instead of codes.
        target_log_probs: floats (U,), natural logarithm.

    Raises:
        TypeError: items are not integers.
        ValueError: mismatched shapes, no user, an item outside the catalogue or twice in a list, a k below 1
            or above K, both codes and embeddings, or a log-probability that is not finite.
    """
    recommended, target = _as_items("recommended", recommended, 2), _as_items("target", target, 1)
    ks = sorted(set(ks))
    _check_lists(recommended, target, ks, num_items)
    if codes is not None and embeddings is not None:
        raise ValueError("give codes or embeddings to measure diversity by, got both")

    places = torch.arange(1, recommended.shape[1] + 1)
    hit = recommended == target[:, None]
    gains = hit / torch.log2(1 + places.double())
    per_user: dict[str, Tensor] = {}
    overall: dict[str, float] = {}
    for k in ks:
        per_user[f"recall@{k}"] = hit[:, :k].any(dim=1).double()
        per_user[f"ndcg@{k}"] = gains[:, :k].sum(dim=1)
        shown = recommended[:, :k]
        counts = torch.bincount(shown[shown >= 0], minlength=num_items)
        overall[f"coverage@{k}"] = int((counts > 0).sum()) / num_items
        overall[f"gini@{k}"] = _gini(counts)
    if codes is not None:
        similarity = partial(_code_similarity, codes=_as_features("codes", codes, num_items))
        per_user |= _diversity(recommended, ks, similarity)
    elif embeddings is not None:
        features = _as_features("embeddings", embeddings, num_items).double()
        similarity = partial(_cosine_similarity, directions=torch.nn.functional.normalize(features, dim=1))
        per_user |= _diversity(recommended, ks, similarity)
    if target_log_probs is not None:
        if target_log_probs.shape != target.shape or not target_log_probs.isfinite().all():
            raise ValueError(
                f"target_log_probs needs finite numbers of shape {tuple(target.shape)}, "
                f"got shape {tuple(target_log_probs.shape)}, "
                f"{int((~target_log_probs.isfinite()).sum())} of them not finite"
            )
        per_user["nll"] = -target_log_probs.detach().cpu().double()
    return Metrics(len(target), num_items, per_user, overall, (hit * places).sum(dim=1))


def bootstrap_interval(
    per_user: Any, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over users (Efron & Tibshirani 1993, chapter 13).

    Args:
        per_user: (U,) numbers; users with NaN are left out.
        level: confidence, 0 .. 1.
        samples: times the users are drawn again.
        seed: of the draws.

    Raises:
        ValueError: no user, another shape, or `level` or `samples` out of range.
    """
    values = _as_numbers("per_user", per_user)
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("per_user needs a number for at least one user, got none")
    low, high = _interval(values, level, samples, seed)
    return low, high


def paired_bootstrap(
    a: Any, b: Any, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> Difference:
    """Compares two runs on the same users: the mean of a - b with its percentile bootstrap interval.

    Args:
        a: (U,) numbers of one run, such as `metrics.per_user["ndcg@10"]`.
        b: (U,) numbers of the other, in the same order of users; users with NaN in either are left out.
        level, samples, seed: as for `bootstrap_interval`.

    Raises:
        ValueError: different shapes, fewer than two users, or `level` or `samples` out of range.
    """
    first, second = _as_numbers("a", a), _as_numbers("b", b)
    if first.shape != second.shape:
        raise ValueError(f"a and b need the same users, got {len(first)} and {len(second)} of them")
    difference = first - second
    difference = difference[~np.isnan(difference)]
    if len(difference) < 2:
        raise ValueError(f"a and b need numbers for at least two users in common, got {len(difference)}")
    low, high = _interval(difference, level, samples, seed)
    standard_error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return Difference(float(difference.mean()), low, high, standard_error)


def _interval(values: np.ndarray, level: float, samples: int, seed: int) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ValueError(f"level needs to lie between 0 and 1, got {level}")
    if samples < 1:
        raise ValueError(f"samples needs to be at least 1, got {samples}")
    sums = [(times * values).sum() for times in _draws(len(values), samples, seed)]
    low, high = np.quantile(np.array(sums) / len(values), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _draws(size: int, samples: int, seed: int) -> Iterable[np.ndarray]:
    """How often each sample has each user, (size,); kept, since a table asks for the same ones again."""
    if size * samples > _KEPT_DRAWS:
        return _drawn(size, samples, seed)
    return _kept_draws(size, samples, seed)


@lru_cache(maxsize=4)
def _kept_draws(size: int, samples: int, seed: int) -> np.ndarray:
    # That a sample has one user 256 times does not happen.
    return np.stack([times.astype(np.uint8) for times in _drawn(size, samples, seed)])


def _drawn(size: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        yield np.bincount(generator.integers(size, size=size), minlength=size)


def _gini(counts: Tensor) -> float:
    """Mean absolute difference of all pairs, over twice the mean; NaN if nothing was counted."""
    ascending = counts.sort().values.double()
    n = len(ascending)
    weights = 2 * torch.arange(1, n + 1).double() - n - 1
    total = float(ascending.sum())
    return float((weights * ascending).sum()) / (n * total) if total else math.nan


def _diversity(
    recommended: Tensor, ks: Sequence[int], similarity: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {f"diversity@{k}": [] for k in ks if k > 1}
    for rows in recommended.split(_USERS_AT_ONCE):
        similarities = similarity(rows.clamp(min=0))
        pairs = ((rows >= 0)[:, :, None] & (rows >= 0)[:, None, :]).triu(diagonal=1)
        for k in ks:
            if k > 1:
                chosen = pairs[:, :k, :k]
                total = (similarities[:, :k, :k] * chosen).sum((1, 2))
                parts[f"diversity@{k}"].append(1 - total / chosen.sum((1, 2)))
    return {name: torch.cat(part) for name, part in parts.items()}


def _code_similarity(items: Tensor, codes: Tensor) -> Tensor:
    """(U, K) -> (U, K, K): positions with equal codes, over the positions of the longer of the two."""
    code = codes[items]
    equal = (code[:, :, None] == code[:, None, :]) & (code >= 0)[:, :, None]
    length = (code >= 0).sum(-1)
    return equal.sum(-1).double() / torch.maximum(length[:, :, None], length[:, None, :])


def _cosine_similarity(items: Tensor, directions: Tensor) -> Tensor:
    """(U, K) -> (U, K, K)."""
    direction = directions[items]
    return direction @ direction.mT


def _as_items(name: str, items: Tensor, rank: int) -> Tensor:
    if items.dtype.is_floating_point or items.dtype.is_complex or items.dtype == torch.bool:
        raise TypeError(f"{name} needs integers, got {items.dtype}")
    if items.ndim != rank or not len(items):
        shape = "(users, slots)" if rank == 2 else "(users,)"
        raise ValueError(f"{name} needs the shape {shape} with at least one user, got {tuple(items.shape)}")
    return items.detach().cpu().long()


def _check_lists(recommended: Tensor, target: Tensor, ks: Sequence[int], num_items: int) -> None:
    if len(recommended) != len(target):
        raise ValueError(
            f"recommended and target need the same users, got {len(recommended)} and {len(target)}"
        )
    if not ks or ks[0] < 1 or ks[-1] > recommended.shape[1]:
        raise ValueError(
            f"ks needs cut-offs 1 .. {recommended.shape[1]}, the slots recommended, got {list(ks)}"
        )
    for name, items, smallest in (("recommended", recommended, -1), ("target", target, 0)):
        if items.min() < smallest or items.max() >= num_items:
            got = f"{int(items.min())} .. {int(items.max())}"
            raise ValueError(f"{name} needs items {smallest} .. {num_items - 1}, got {got}")
    ascending = recommended.sort(dim=1).values
    twice = ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)).any(dim=1)
    if twice.any():
        user = int(twice.long().argmax())
        raise ValueError(
            f"recommended needs distinct items in a list, got {recommended[user].tolist()} for user {user}"
        )


def _as_features(name: str, features: Tensor, num_items: int) -> Tensor:
    features = torch.as_tensor(features).detach().cpu()
    if features.ndim != 2 or len(features) != num_items:
        raise ValueError(f"{name} needs one row for each of {num_items} items, got {tuple(features.shape)}")
    return features


def _as_numbers(name: str, values: Any) -> np.ndarray:
    numbers = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"{name} needs the shape (users,), got {numbers.shape}")
    return numbers
