"""What can be compared: runs of `gflowgr train`, result files, and rows of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gflowgr.quality.results import PLACES, Cell, PathLike, Users, load_cells, load_users
from gflowgr.quality.rows import ALL_EARLIER
from gflowgr.quality.run_users import load_run_users
from gflowgr.quality.table import RESULTS, require_one_protocol


@dataclass(frozen=True, eq=False)
class Run:
    """What is compared: a run, or a row of the table with its seeds.

    Attributes:
        name: as it is shown.
        dataset: name of the data set, None for a run of `gflowgr train`, which knows a folder only.
        num_items: items in the catalogue.
        places: length of the lists that ranks are places in.
        ranks: of the test targets, (U,) for each seed; a single run stands under None.
        users: about the test contexts.
        excluded: what lists leave out, in words, "" for nothing.
    """

    name: str
    dataset: str | None
    num_items: int
    places: int
    ranks: dict[int | None, np.ndarray]
    users: Users
    excluded: str


def load_run(run: PathLike, results: PathLike = RESULTS) -> Run:
    """Reads a result file (.json), a folder that `gflowgr train` made, or "<dataset>/<row>" in `results`.

    Raises:
        FileNotFoundError: there is nothing of that name, or the file about users is missing.
        ValueError: a damaged file, or one about other users; the message names it.
    """
    path = Path(run)
    if path.suffix == ".json":
        return _of_cells(str(run), [Cell.load(path)], path.parent, single=True)
    if path.is_dir():
        kept = load_run_users(path)
        name = f"{run}, with its teacher" if kept.teacher_weight else str(run)
        excluded = ALL_EARLIER if kept.exclude_history else ""
        return Run(name, None, kept.num_items, kept.places, {None: kept.test_rank}, kept.users, excluded)
    folder = Path(results) / path.parent
    if len(path.parts) != 2 or not folder.is_dir():
        raise FileNotFoundError(
            f"{str(run)!r} is no result file (.json), no folder that 'gflowgr train' made, and no "
            f"DATASET/ROW in {results}"
        )
    cells = load_cells(folder)
    chosen = [cell for cell in cells if cell.row == path.name]
    if not chosen:
        rows = ", ".join(dict.fromkeys(cell.row for cell in cells)) or "none"
        raise ValueError(f"no results of row {path.name!r} in {folder}, there are {rows}")
    require_one_protocol(path.name, chosen)
    return _of_cells(str(run), chosen, folder, single=False)


def _of_cells(name: str, cells: Sequence[Cell], folder: Path, *, single: bool) -> Run:
    users, first = load_users(folder), cells[0]
    if len(users) != first.num_users:
        raise ValueError(f"{folder}: users.npz has {len(users)} users, {first.name} {first.num_users}")
    ranks = {None if single else cell.seed: cell.test_rank for cell in cells}
    return Run(name, first.dataset, first.num_items, PLACES, ranks, users, _excluded(first))


def _excluded(cell: Cell) -> str:
    given = {**cell.settings, **cell.settings.get("training", {})}
    # The first cells that left something out knew no more than this.
    return given.get("excluded", "the history") if given.get("exclude_history") else ""


def require_same_data(a: Run, b: Run) -> None:
    """Raises ValueError, which says in what they differ, unless both runs are of the same users and items.

    Histories may be cut at different lengths.
    """
    for what, first, other in (
        ("data set", a.dataset, b.dataset),
        ("number of users", len(a.users), len(b.users)),
        ("number of items", a.num_items, b.num_items),
    ):
        if None not in (first, other) and first != other:
            raise ValueError(f"{a.name} and {b.name} are of different data: {what} {first} and {other}")
    cut = min(a.users.history_length.max(), b.users.history_length.max())
    for what, limit in (("history_length", cut), ("target_popularity", None)):
        first, other = (np.clip(getattr(run.users, what), None, limit) for run in (a, b))
        differ = first != other
        if differ.any():
            raise ValueError(
                f"{a.name} and {b.name} are of different data: {what} differs for {int(differ.sum())} of "
                f"{len(a.users)} users"
            )
