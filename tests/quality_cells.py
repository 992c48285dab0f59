"""Result cells made of ranks, for the tests of the table and of comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gflowgr.quality.results import Cell


def metrics_of(rank: Sequence[int]) -> dict[str, float | None]:
    """The means by their textbook definition, one user at a time, and some that ranks say nothing of."""
    metrics: dict[str, float | None] = {
        "coverage@10": 0.5,
        "gini@10": 0.75,
        "diversity@10": 0.625,
        "nll": None,
    }
    for k in (5, 10):
        found = [place for place in rank if 1 <= place <= k]
        metrics[f"recall@{k}"] = len(found) / len(rank)
        metrics[f"ndcg@{k}"] = math.fsum(1 / math.log2(1 + place) for place in found) / len(rank)
    return metrics


def a_cell(row: str = "sft", seed: int = 0, rank: Sequence[int] = (1, 0, 3, 10), **changes: Any) -> Cell:
    """A cell whose test ranks are `rank`, and whose validation ranks are those in reverse."""
    validation = list(reversed(rank))
    values: dict[str, Any] = {
        "dataset": "scientific",
        "row": row,
        "seed": seed,
        "settings": {"training": {"max_steps": 3}},
        "grid": {"file": "tuning/sft.json", "points": 6},
        "built_on": [],
        "budget": {"steps": 3, "contexts": 24, "seconds": 1.5, "total_seconds": 2.0},
        "num_users": len(rank),
        "num_items": 40,
        "validation": metrics_of(validation),
        "test": metrics_of(rank),
        "commit": "0123456789ab",
        "device": "Some Processor, 2 cores",
        "versions": {"torch": "2.9"},
        "validation_rank": np.array(validation, dtype=np.uint8),
        "test_rank": np.array(rank, dtype=np.uint8),
    }
    return Cell(**{**values, **changes})
