"""Which items a context's trajectories lead to: the observed target first, then K - 1 items by strategy."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gflowgr.adaptive import AdaptiveWeights, WeightSchedule

STRATEGIES = ("target", "observed", "random", "collaborative", "policy")
TARGET, OBSERVED, RANDOM, COLLABORATIVE, POLICY = range(len(STRATEGIES))
SCHEDULES = ("curriculum", "constant")

# One purpose of the random numbers each, so that no two purposes share draws.
STREAM_STRATEGY, STREAM_OBSERVED, STREAM_COLLABORATIVE, STREAM_RANDOM, STREAM_POLICY = range(5)


@dataclass(frozen=True)
class Draw:
    """The items of one batch's trajectories and where each came from.

    `items` (B, K) int64, column 0 the observed target, distinct within a row where a sampler drew them;
    `strategy` (B, K) int8, an index into `STRATEGIES` that names what filled the slot, not what was wished
    for.
    """

    items: Tensor
    strategy: Tensor

    def shares(self) -> dict[str, float]:
        """Share of the drawn slots (column 0 left out) that each strategy filled; for the log."""
        drawn = self.strategy[:, 1:]
        counts = torch.bincount(drawn.flatten().long(), minlength=len(STRATEGIES)).tolist()
        return {name: counts[i] / max(1, drawn.numel()) for i, name in enumerate(STRATEGIES) if i != TARGET}

    def totals(self, yields: Tensor) -> Tensor:
        """Of `yields` (B, K), column 0 left out: the sum and the number for each of `STRATEGIES`.

        (2, 5) float64 on the host; those of a batch's parts add up to those of the batch.
        """
        if yields.shape != self.strategy.shape:
            raise ValueError(f"yields: got shape {tuple(yields.shape)}, need {tuple(self.strategy.shape)}")
        drawn = self.strategy[:, 1:].flatten().long().cpu()
        given = yields[:, 1:].detach().flatten().cpu().double()
        rows = (given, torch.ones_like(given))
        return torch.stack([torch.bincount(drawn, weights=row, minlength=len(STRATEGIES)) for row in rows])


class TrajectorySampler:
    """Draws K distinct items a context, the observed target always first.

    Every other slot picks a strategy by the weights in `strategies` (one name, or a mixture such as
    `{"collaborative": 0.7, "policy": 0.3}`), slot by slot:

    * `observed`: items of the user's later log (`future`), uniformly.
    * `random`: items the user was not seen with (not in `history`, `future` or the slots), uniformly or
      in proportion to `popularity`. In a catalogue that has no such item left, any item not yet in a slot;
      that one is reported as `observed`, which it is.
    * `collaborative`: from the pool of the `pool_size` items besides the target that a recommender
      scores highest (2K - 1 in the paper), by the schedule below. A score of -inf bars an item. Items whose
      score ties with one that the pool has no room for are left out of it: which of them got in would be an
      accident of their numbering (an item-kNN scores most of the catalogue 0).
    * `policy`: the model's own items, in the order in which it gives them.

    The weights are the same in every step, unless `adapt` makes them follow what each strategy yields (the
    arguments of `gflowgr.adaptive.AdaptiveWeights`, told by `learn` after each step), or `replay` gives those
    of another run of the same strategies: a `WeightSchedule` or the file of one.

    A slot that its strategy cannot fill (no later items, too few distinct policy items, a pool cut short by
    ties) falls to `random`, and `Draw.strategy` says so.

    Schedule `"curriculum"`, easy to hard as in the paper: sort the pool by score, ascending. A window
    over it, `max(K - 1, ceil(pool / 2))` items wide, starts at the low end in the first step, ends at the
    high end in the last, and moves linearly with `step / (total_steps - 1)`; its start is rounded to a
    whole item. The picks are uniform without replacement inside the window. `"constant"`: the window is
    the whole pool.

    A draw is a plain function of (seed, step, example index), of that example's own inputs and of the step's
    weights: neither the rest of the batch nor the process matters, so a run can be replayed and sharded. It
    runs in numpy on the host (only the search for the pool runs where `scores` lives).

    Raises ValueError or TypeError for settings that cannot work, K larger than the catalogue among them.
    Source: GFlowGR (arXiv 2506.16114), trajectory sampler; the mixtures are not in the paper.
    """

    def __init__(
        self,
        num_items: int,
        *,
        num_trajectories: int = 4,
        strategies: str | Mapping[str, float] = "collaborative",
        schedule: str = "curriculum",
        pool_size: int | None = None,
        popularity: Tensor | np.ndarray | None = None,
        adapt: Mapping[str, Any] | None = None,
        replay: WeightSchedule | str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> None:
        _check_count("num_items", num_items, 1)
        _check_count("num_trajectories", num_trajectories, 1)
        if num_trajectories > num_items:
            raise ValueError(
                f"num_trajectories: got {num_trajectories}, need at most the catalogue's {num_items} items, "
                "since the items of a context are distinct"
            )
        if schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: got {schedule!r}, need one of {SCHEDULES}{_near(schedule, SCHEDULES)}"
            )
        if pool_size is None:
            pool_size = 2 * num_trajectories - 1
        _check_count("pool_size", pool_size, max(1, num_trajectories - 1))
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
            raise TypeError(f"seed: got {type(seed).__name__}, need an integer")
        self.num_items = num_items
        self.num_trajectories = num_trajectories
        self.schedule = schedule
        self.pool_size = pool_size
        self.seed = int(seed)
        self.weights = _strategy_weights(strategies)
        self.mixture = _mixture(strategies, adapt, replay)
        self._mass, self._cumulative = _integer_masses(popularity, num_items)

    def progress(self, step: int, total_steps: int) -> float:
        """How far the curriculum is: 0 in step 0, 1 from step `total_steps - 1` on."""
        _check_count("step", step, 0)
        _check_count("total_steps", total_steps, 1)
        return min(1.0, step / max(1, total_steps - 1))

    def weights_at(self, step: int) -> np.ndarray:
        """The weight of each of `STRATEGIES` in a step, (5,)."""
        if self.mixture is None:
            return self.weights
        weights = np.zeros(len(STRATEGIES))
        weights[[STRATEGIES.index(name) for name in self.mixture.strategies]] = self.mixture.at(step)
        return weights

    def learn(self, step: int, totals: Tensor) -> None:
        """Adapts the next step's weights to this one's `Draw.totals`, summed over all processes.

        Raises ValueError where the sampler does not adapt, and as `AdaptiveWeights.learn`.
        """
        if not isinstance(self.mixture, AdaptiveWeights):
            raise ValueError("learn: this sampler's weights do not adapt, need one made with adapt")
        sums, counts = totals[:, [STRATEGIES.index(name) for name in self.mixture.strategies]].numpy()
        self.mixture.learn(step, sums, counts)

    def draw(
        self,
        *,
        step: int,
        total_steps: int,
        index: Tensor,
        target: Tensor,
        history: Tensor,
        future: Tensor | None = None,
        scores: Tensor | None = None,
        policy_items: Callable[[int], Tensor] | None = None,
    ) -> Draw:
        """Draw the items of a batch; they come back on the device of `target`.

        `index` (B,) is each example's number in its data set, `target` (B,), `history` (B, H) and
        `future` (B, F) are item ids, padded with -1. `scores` (B, N) floating, without NaN.
        `policy_items(count)` returns (B, M) item ids, -1 for none, ideally `count` distinct ones a row;
        it is called once a draw whenever "policy" has weight, whatever the slots came out as, so that all
        processes of a distributed run call the model alike. A strategy with weight whose input is missing
        raises ValueError.
        """
        progress = self.progress(step, total_steps)
        weights = self.weights_at(step)
        rows = self._rows(index=index, target=target, history=history, future=future)
        index_, target_ = rows["index"], rows["target"]
        items = np.full((len(target_), self.num_trajectories), -1)
        items[:, 0] = target_
        wanted = self._choose_strategies(weights, step, index_)
        filled_by = np.full(items.shape, RANDOM, dtype=np.int8)
        filled_by[:, 0] = TARGET

        if _uses(weights, OBSERVED, future is not None, "future"):
            candidates = rows["future"]
            keys = self._keys(step, index_, STREAM_OBSERVED, candidates)
            filled = _fill(items, wanted == OBSERVED, candidates, _first_seen(candidates), keys)
            filled_by[:, 1:][filled] = OBSERVED
        if _uses(weights, COLLABORATIVE, scores is not None, "scores"):
            assert scores is not None
            candidates, usable = self._pool(scores, target)
            usable &= self._window(usable, progress)
            keys = self._keys(step, index_, STREAM_COLLABORATIVE, candidates)
            filled_by[:, 1:][_fill(items, wanted == COLLABORATIVE, candidates, usable, keys)] = COLLABORATIVE
        if _uses(weights, POLICY, policy_items is not None, "policy_items"):
            assert policy_items is not None
            given = policy_items(self.num_trajectories)
            candidates = self._item_ids("policy_items", given, (len(target_), None), lowest=-1)
            keys = np.broadcast_to(np.arange(candidates.shape[1], dtype=np.uint64), candidates.shape)
            filled = _fill(items, wanted == POLICY, candidates, _first_seen(candidates), keys)
            filled_by[:, 1:][filled] = POLICY
        self._fill_randomly(
            step, index_, items, filled_by, np.concatenate([rows["history"], rows["future"]], axis=1)
        )
        return Draw(torch.from_numpy(items).to(target.device), torch.from_numpy(filled_by).to(target.device))

    def _choose_strategies(self, weights: np.ndarray, step: int, index: np.ndarray) -> np.ndarray:
        slots = np.arange(1, self.num_trajectories)
        uniform = (_hash(self.seed, step, index[:, None], STREAM_STRATEGY, slots) >> np.uint64(11)) * 2.0**-53
        # Weights sum to 1 up to rounding; the last strategy with weight takes the rounding.
        last = np.flatnonzero(weights)[-1]
        return np.minimum(np.searchsorted(np.cumsum(weights), uniform, side="right"), last)

    def _keys(self, step: int, index: np.ndarray, stream: int, items: np.ndarray) -> np.ndarray:
        # Keyed by item, not by column, so that neither padding nor order of the candidates matters.
        return _hash(self.seed, step, index[:, None], stream, items)

    def _pool(self, scores: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The items (B, P) of highest score but the target, ascending, and which of them may be drawn."""
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            raise TypeError(
                f"scores: got {getattr(scores, 'dtype', type(scores).__name__)}, need a floating tensor"
            )
        if scores.shape != (len(target), self.num_items):
            raise ValueError(
                f"scores: got shape {tuple(scores.shape)}, need (B, N) = {(len(target), self.num_items)}"
            )
        # Two more than the pool: the target may be among them, and one outsider shows a tie at the edge.
        values, items = _top_k(scores.detach(), min(self.pool_size + 2, self.num_items))
        values_, items_ = values.float().cpu().numpy(), items.cpu().numpy()
        if np.isnan(values_).any():
            raise ValueError("scores: got NaN, need numbers (or -inf for an item that must not be drawn)")
        target_last = np.argsort(items_ == target.cpu().numpy()[:, None], axis=1, kind="stable")[:, :-1]
        values_, items_ = (
            np.take_along_axis(values_, target_last, 1),
            np.take_along_axis(items_, target_last, 1),
        )
        usable = values_ > -np.inf
        if items_.shape[1] > self.pool_size:
            usable &= values_ != values_[:, -1:]
            items_, usable = items_[:, :-1], usable[:, :-1]
        return items_[:, ::-1], usable[:, ::-1]

    def _window(self, usable: np.ndarray, progress: float) -> np.ndarray:
        if self.schedule == "constant":
            return usable
        size = usable.sum(1, keepdims=True)
        width = np.minimum(size, np.maximum(self.num_trajectories - 1, (size + 1) // 2))
        first = np.rint(progress * (size - width))
        rank = np.cumsum(usable, axis=1) - 1
        return (rank >= first) & (rank < first + width)

    def _fill_randomly(
        self, step: int, index: np.ndarray, items: np.ndarray, filled_by: np.ndarray, seen: np.ndarray
    ) -> None:
        for slot in range(1, self.num_trajectories):
            rows = np.flatnonzero(items[:, slot] < 0)
            if len(rows) == 0:
                continue
            draws = _hash(self.seed, step, index[rows], STREAM_RANDOM, slot)
            chosen, found = self._random_items(draws, np.concatenate([items[rows], seen[rows]], axis=1))
            if not found.all():
                chosen[~found], _ = self._random_items(draws[~found], items[rows[~found]])
                filled_by[rows[~found], slot] = OBSERVED
            items[rows, slot] = chosen

    def _random_items(self, draws: np.ndarray, excluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One item a row outside `excluded` (-1 = none), by mass, and whether there was any.

        Exact and without rejection: the draw is a point on the line of all masses from which the excluded
        items' stretches are cut, and is then pushed right past every stretch that lies at or before it.
        """
        excluded = np.sort(np.where(excluded < 0, self.num_items, excluded), axis=1)
        mass = self._mass[excluded]
        mass[:, 1:][excluded[:, 1:] == excluded[:, :-1]] = 0
        remaining = self._cumulative[-1] - mass.sum(1)
        found = remaining > 0
        point = (draws % np.where(found, remaining, 1).astype(np.uint64)).astype(np.int64)
        cut_start = self._cumulative[excluded] - (np.cumsum(mass, axis=1) - mass)
        point += np.where(cut_start <= point[:, None], mass, 0).sum(1)
        return np.searchsorted(self._cumulative[1:], point, side="right"), found

    def _rows(
        self, *, index: Tensor, target: Tensor, history: Tensor, future: Tensor | None
    ) -> dict[str, np.ndarray]:
        rows = {"target": self._item_ids("target", target, (None,), lowest=0)}
        size = len(rows["target"])
        rows["index"] = _integers("index", index, (size,))
        rows["history"] = self._item_ids("history", history, (size, None), lowest=-1)
        if future is None:
            rows["future"] = np.full((size, 0), -1)
        else:
            rows["future"] = self._item_ids("future", future, (size, None), lowest=-1)
        return rows

    def _item_ids(self, name: str, tensor: Tensor, shape: tuple[int | None, ...], lowest: int) -> np.ndarray:
        array = _integers(name, tensor, shape)
        if array.size and (array.min() < lowest or array.max() >= self.num_items):
            raise ValueError(
                f"{name}: got ids from {array.min()} to {array.max()}, need {lowest} to {self.num_items - 1}"
            )
        return array


def policy_seeds(seed: int, step: int, index: Tensor) -> Tensor:
    """A seed (B,) int64 for each example's own draws from the model in a step, on the device of `index`."""
    seeds = _hash(seed, step, _integers("index", index, (None,)), STREAM_POLICY) >> np.uint64(1)
    return torch.from_numpy(seeds.astype(np.int64)).to(index.device)


def _uses(weights: np.ndarray, strategy: int, given: bool, argument: str) -> bool:
    if weights[strategy] == 0.0:
        return False
    if not given:
        raise ValueError(f"{argument}: got None, need it for strategy {STRATEGIES[strategy]!r}")
    return True


def _fill(
    items: np.ndarray, slots: np.ndarray, candidates: np.ndarray, usable: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """Fill the marked `slots` (B, K - 1) of `items` in place, lowest key first; which ones it filled."""
    if candidates.shape[1] == 0:
        return np.zeros_like(slots)
    usable = usable & (candidates >= 0)
    usable &= ~(candidates[:, :, None] == items[:, None, :]).any(2)
    # The lowest bit makes every usable key lower than that of an unusable candidate.
    order = np.argsort(np.where(usable, keys >> np.uint64(1), np.uint64(2**63)), axis=1, kind="stable")
    nth = np.cumsum(slots, axis=1) - 1
    filled = slots & (nth < usable.sum(1, keepdims=True))
    column = np.take_along_axis(order, np.clip(nth, 0, candidates.shape[1] - 1), 1)
    items[:, 1:][filled] = np.take_along_axis(candidates, column, 1)[filled]
    return filled


def _first_seen(candidates: np.ndarray) -> np.ndarray:
    order = np.argsort(candidates, axis=1, kind="stable")
    ordered = np.take_along_axis(candidates, order, 1)
    first = np.ones(candidates.shape, dtype=bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], 1)
    return first


def _hash(*words: int | np.ndarray) -> np.ndarray:
    """Pseudo-random uint64 from integers that broadcast: SplitMix64's mixer (Steele et al. 2014) per word."""
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        if isinstance(word, np.ndarray):
            word = word.astype(np.uint64)
        else:
            word = np.array([word % 2**64], dtype=np.uint64)
        state = state + np.uint64(0x9E3779B97F4A7C15) + word
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _top_k(scores: Tensor, k: int, group: int = 32) -> tuple[Tensor, Tensor]:
    """`scores.topk(k)`; for a long row it looks only into the k groups of columns with the highest maxima."""
    rows, columns = scores.shape
    whole = columns // group * group
    if k * group * 4 > columns:
        return scores.topk(k)
    # NaN propagates through amax and topk, so that a NaN anywhere still comes out on top.
    best = scores[:, :whole].unflatten(1, (-1, group)).amax(2).topk(k).indices
    inside = (best[:, :, None] * group + torch.arange(group, device=scores.device)).flatten(1)
    rest = torch.arange(whole, columns, device=scores.device).expand(rows, -1)
    candidates = torch.cat([inside, rest], dim=1)
    values, position = scores.gather(1, candidates).topk(k)
    return values, candidates.gather(1, position)


def _strategy_weights(strategies: str | Mapping[str, float]) -> np.ndarray:
    names = STRATEGIES[1:]
    given = {strategies: 1.0} if isinstance(strategies, str) else dict(strategies)
    weights = np.zeros(len(STRATEGIES))
    for name, weight in given.items():
        if name not in names:
            raise ValueError(f"strategies: got {name!r}, need names among {names}{_near(name, names)}")
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0.0 <= weight < math.inf:
            raise ValueError(f"strategies: got weight {weight!r} for {name!r}, need a number of at least 0")
        weights[STRATEGIES.index(name)] = weight
    if weights.sum() == 0.0:
        raise ValueError("strategies: got no strategy with a weight above 0, need at least one")
    return weights / weights.sum()


def _mixture(
    strategies: str | Mapping[str, float],
    adapt: Mapping[str, Any] | None,
    replay: WeightSchedule | str | os.PathLike[str] | None,
) -> WeightSchedule | None:
    if adapt is not None and replay is not None:
        raise ValueError("adapt, replay: got both, need one: replayed weights do not adapt")
    if adapt is not None:
        return adaptive_weights(strategies, adapt)
    if replay is None:
        return None
    schedule = replay if isinstance(replay, WeightSchedule) else WeightSchedule.load(replay)
    weights = _strategy_weights(strategies)
    given = {name for name, weight in zip(STRATEGIES, weights, strict=True) if weight}
    if set(schedule.strategies) != given:
        raise ValueError(
            f"replay: got a schedule of {', '.join(schedule.strategies)}, need the strategies' "
            f"{', '.join(sorted(given))}"
        )
    return schedule


def adaptive_weights(strategies: str | Mapping[str, float], adapt: Mapping[str, Any]) -> AdaptiveWeights:
    """The weights that a sampler of these strategies adapts, in the order of `STRATEGIES`; raises as both."""
    weights = _strategy_weights(strategies).tolist()
    return AdaptiveWeights(dict(zip(STRATEGIES, weights, strict=True)), **adapt)


def _integer_masses(popularity: Tensor | np.ndarray | None, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Each item's mass and their running sum from 0; integers, so that cutting items out is exact.

    The unit is 2^-40 of the total; every item has at least one, so that each can be drawn when it is needed.
    A last, massless entry stands for padding.
    """
    if popularity is None:
        mass = np.ones(num_items, dtype=np.int64)
    else:
        weight = np.asarray(popularity, dtype=np.float64)
        if weight.shape != (num_items,):
            raise ValueError(f"popularity: got shape {weight.shape}, need ({num_items},)")
        if not np.isfinite(weight).all() or (weight < 0).any() or weight.sum() == 0:
            raise ValueError("popularity: need finite numbers of at least 0, one of them above 0")
        mass = np.rint(weight / weight.sum() * 2.0**40).astype(np.int64) + 1
    mass = np.append(mass, 0)
    return mass, np.concatenate([[0], np.cumsum(mass[:-1])])


def _integers(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> np.ndarray:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise TypeError(
            f"{name}: got {getattr(tensor, 'dtype', type(tensor).__name__)}, need a tensor of integers"
        )
    if tensor.dim() != len(shape) or any(
        s not in (None, t) for s, t in zip(shape, tensor.shape, strict=True)
    ):
        need = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, need ({need})")
    return tensor.detach().cpu().numpy().astype(np.int64)


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name}: got {value!r}, need an integer of at least {least}")


def _near(name: object, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
