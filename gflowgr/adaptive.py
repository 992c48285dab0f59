"""Weights of a sampler's strategies that follow what each yields: learned, written, replayed and charted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflowgr.folders import write_text

if TYPE_CHECKING:
    from gflowgr.report import Chart

YIELDS = ("residual", "mass")
SCHEDULE = "schedule.json"
_FORMAT = "gflowgr.schedule/1"


class WeightSchedule:
    """The weights of a mixture's strategies in each step of a run.

    `strategies` are S names, `rows` the S weights of each step from 0 on.

    Raises:
        ValueError: a row that has another length, a weight below 0 or not finite, or a sum that is not 1.
    """

    def __init__(self, strategies: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
        self.strategies = tuple(strategies)
        self.rows = [np.asarray(row, dtype=np.float64) for row in rows]
        for step, row in enumerate(self.rows):
            # Written as "not at least 0", so that NaN is caught, too.
            if row.shape != (len(self.strategies),) or not (row >= 0).all() or abs(row.sum() - 1) > 1e-9:
                raise ValueError(
                    f"rows: got {row.tolist()} for step {step}, need a weight of at least 0 for each of "
                    f"{', '.join(self.strategies)}, which sum to 1"
                )

    def at(self, step: int) -> np.ndarray:
        """The weights (S,) of a step; ValueError for a step whose weights are not known (yet)."""
        if not 0 <= step < len(self.rows):
            raise ValueError(f"step: got {step}, but weights are known of {len(self.rows)} steps from 0 on")
        return self.rows[step]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, exactly."""
        write_text(path, json.dumps(self._content()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> WeightSchedule:
        """Reads what a run has written; its weights are those numbers and change no more."""
        content = _read(path)
        return WeightSchedule(content["strategies"], content["weights"])

    def chart(self) -> Chart:
        """A line for each strategy: its weight over the steps."""
        from gflowgr.report import Chart

        lines = {
            name: [(float(step), float(row[column])) for step, row in enumerate(self.rows)]
            for column, name in enumerate(self.strategies)
        }
        return Chart("Weights of the sampler's strategies.", "step", "weight", lines)

    def _content(self) -> dict[str, Any]:
        weights = [row.tolist() for row in self.rows]
        return {"format": _FORMAT, "strategies": list(self.strategies), "weights": weights}


class AdaptiveWeights(WeightSchedule):
    """Weights that grow with what a strategy's draws have yielded.

    Step 0 has the given weights w. From then on, with m_s the mean yield of strategy s's draws so far,
    each draw discounted by `1 - rate` for every step since,

        weight_s = explore * w_s + (1 - explore) * w_s m_s / sum_t w_t m_t

    so strategies that yield alike keep the given weights, no unit of the yield matters, and none falls below
    `explore` times its own. A strategy without a draw so far counts as yielding what the others do on
    average. This is probability matching with a floor (Thierens, "An adaptive pursuit strategy for allocating
    operator probabilities", GECCO 2005), around given weights rather than equal ones, on the discounted means
    of Garivier and Moulines ("On upper-confidence bound policies for switching bandit problems", ALT 2011).
    It matches rather than maximises (as EXP3 would) because a yield falls where it is drawn: a residual is
    what is left to learn.

    Args:
        strategies: names with their weights w, at least two above 0; those of weight 0 are left out.
        to: what counts as yield: "residual", the squared balance residual of the drawn trajectory, or
            "mass", its share of the context's reward. Short trials on held-out contexts (synthetic logs, two
            seeds, and MovieLens, one): under trajectory balance "residual" came closer to the reward's
            distribution in total variation and in the residual of random and of the policy's own items than
            fixed weights and the curriculum did, but stayed behind the curriculum in KL(reward || policy).
            Under child flow matching, whose loss is bounded and no squared residual, take "mass": "residual"
            sends it to unlikely items, to no use.
        rate: how fast old draws are forgotten; above 0, at most 1.
        explore: the share of the weights that stays as given; above 0, at most 1.

    Raises:
        ValueError: a setting that cannot serve.
    """

    def __init__(
        self,
        strategies: Mapping[str, float],
        *,
        to: str = "residual",
        rate: float = 0.1,
        explore: float = 0.1,
    ) -> None:
        if to not in YIELDS:
            raise ValueError(f"to: got {to!r}, need one of {', '.join(YIELDS)}")
        for name, value in (("rate", rate), ("explore", explore)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise ValueError(f"{name}: got {value!r}, need a number above 0 and at most 1")
        given = {name: weight for name, weight in strategies.items() if weight > 0}
        if len(given) < 2:
            raise ValueError(
                f"strategies: got {', '.join(given) or 'none'}, need at least two to adapt between"
            )
        total = math.fsum(given.values())
        super().__init__(list(given), [[weight / total for weight in given.values()]])
        self.to, self.rate, self.explore = to, rate, explore
        self.restart()

    def restart(self) -> None:
        """Forgets everything but the given weights."""
        del self.rows[1:]
        self.sums, self.counts = np.zeros(len(self.strategies)), np.zeros(len(self.strategies))

    def learn(self, step: int, sums: np.ndarray, counts: np.ndarray) -> None:
        """Sets the weights of step `step + 1` by the yields of `step`; a step's batches may come one by one.

        `sums` (S,) holds the sum of the yields of each strategy's draws, `counts` (S,) their number. Raises
        ValueError for sums that are not finite or below 0, and for a step other than the last or its
        predecessor, whose weights are settled.
        """
        if not np.isfinite(sums).all() or (sums < 0).any():
            raise ValueError(f"sums: got {sums.tolist()}, need finite yields of at least 0 (a reward of 0?)")
        if step == len(self.rows) - 1:
            self.sums, self.counts = (1 - self.rate) * self.sums, (1 - self.rate) * self.counts
            self.rows.append(self.rows[0])
        elif step != len(self.rows) - 2:
            raise ValueError(f"step: got {step}, need {len(self.rows) - 1}, the last with weights")
        self.sums, self.counts = self.sums + sums, self.counts + counts
        self.rows[-1] = self._weights()

    def _weights(self) -> np.ndarray:
        given, drawn = self.rows[0], self.counts > 0
        matched = given[drawn] * self.sums[drawn] / self.counts[drawn]
        if matched.sum() == 0:
            return given
        weights = given.copy()
        weights[drawn] = matched / matched.sum() * given[drawn].sum()
        return self.explore * given + (1 - self.explore) * weights

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Goes on from what `save` wrote; ValueError if that run had other strategies or weights."""
        content = _read(path)
        saved = WeightSchedule(content["strategies"], content["weights"])
        if saved.strategies != self.strategies or not np.array_equal(saved.at(0), self.rows[0]):
            raise ValueError(
                f"{os.fspath(path)}: has the strategies {saved.strategies} with the weights {saved.at(0)}, "
                f"need {self.strategies} with {self.rows[0]}"
            )
        if "sums" not in content:
            raise ValueError(f"{os.fspath(path)}: holds a replayed schedule, need one that was learned")
        self.rows = saved.rows
        self.sums, self.counts = np.array(content["sums"]), np.array(content["counts"])

    def _content(self) -> dict[str, Any]:
        return {**super()._content(), "sums": self.sums.tolist(), "counts": self.counts.tolist()}


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such schedule of a sampler's weights")
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    known = isinstance(content, dict) and content.get("format") == _FORMAT
    if not known or not {"strategies", "weights"} <= set(content):
        raise ValueError(f"{os.fspath(path)}: not a schedule of a sampler's weights ({_FORMAT})")
    return content
