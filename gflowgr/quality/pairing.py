"""Differences between two rows of the table on the same users and the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gflowgr.metrics import Difference, paired_bootstrap
from gflowgr.quality.results import Cell, Part


@dataclass(frozen=True)
class Paired:
    """What one row has over another.

    Attributes:
        seeds: that both rows were run with; the difference is over these alone.
        base: mean of the other row over users and these seeds.
        difference: the row minus the other, a user's mean over the seeds, with its interval over users.
    """

    seeds: tuple[int, ...]
    base: float
    difference: Difference

    @property
    def leads(self) -> bool:
        """Whether the interval excludes 0 on the positive side."""
        return self.difference.low > 0


def common_seeds(row: Sequence[Cell], other: Sequence[Cell]) -> list[int]:
    """The seeds that both rows were run with, ascending."""
    return sorted({cell.seed for cell in row} & {cell.seed for cell in other})


def mean_over_seeds(
    cells: Sequence[Cell], metric: str, seeds: Sequence[int], part: Part = "test"
) -> np.ndarray:
    """Float64 (num_users,): each user's mean over those cells that have one of these seeds."""
    return np.mean([cell.per_user(metric, part) for cell in cells if cell.seed in seeds], axis=0)


def paired_difference(
    row: Sequence[Cell], other: Sequence[Cell], metric: str, part: Part = "test"
) -> Paired | None:
    """The row minus the other with a 95 % paired bootstrap interval over users; None without a common seed.

    Seeds that only one of the rows has are left out: teacher, order of the data and initialisation come with
    the seed, and a row with more seeds should not win or lose by them.

    Raises:
        ValueError: the rows are of different users, or of a single one.
    """
    seeds = common_seeds(row, other)
    if not seeds:
        return None
    ours, theirs = (mean_over_seeds(cells, metric, seeds, part) for cells in (row, other))
    return Paired(tuple(seeds), float(theirs.mean()), paired_bootstrap(ours, theirs))
