"""Cells of a data set that nobody ran: what tests of the tables are made from."""

from __future__ import annotations

import numpy as np

from gflowgr.quality.results import Cell
from gflowgr.quality.rows import ROWS

USERS = 40


def cell_of(row: str, rank: int, coverage: float = 0.5, seed: int = 0, missed: int = 1) -> Cell:
    """Everyone's target at one place, but for the first users, whose targets are not in the list."""
    ranks = np.full(USERS, rank, dtype=np.uint8)
    ranks[:missed] = 0
    gain = float(np.where(ranks > 0, 1 / np.log2(1.0 + np.maximum(ranks, 1)), 0).mean())
    metrics = {"recall@10": (USERS - missed) / USERS, "ndcg@10": gain, "coverage@10": coverage}
    return Cell(
        dataset="toys",
        row=row,
        seed=seed,
        settings={},
        grid=None,
        built_on=list(ROWS[row].built_on),
        budget={"steps": 1, "contexts": 1, "seconds": 1.0, "total_seconds": 1.0},
        num_users=USERS,
        num_items=30,
        validation=metrics,
        test=metrics,
        commit="",
        device="",
        versions={},
        validation_rank=ranks,
        test_rank=ranks,
    )
