"""Result files of one data set: a pair for each row and seed, and one file about the users they share."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from gflowgr.folders import write_text, written

FORMAT = "gflowgr.quality/1"
USERS = "users.npz"
# How the rows end whose lists lack the items of the history, and those that rank beside their teacher.
UNSEEN, TOGETHER = "-unseen", "-ensemble"
# Beside the cells: the weights of samplers that adapt, as `gflowgr.adaptive.WeightSchedule` writes them.
SCHEDULES = "schedules"
# The lists that the ranks are places in.
PLACES = 10
# A sum of a million float64 gains is off by less, and one user's rank moved by one place in ten by more.
_TOLERANCE = 1e-10
_RANKS = ("validation_rank", "test_rank")
_BUDGET = ("steps", "contexts", "seconds", "total_seconds")
_ROW = re.compile(r"[a-z0-9][a-z0-9._+-]*")

PathLike: TypeAlias = "str | os.PathLike[str]"
Part: TypeAlias = Literal["validation", "test"]


@dataclass(frozen=True, eq=False)
class Cell:
    """What one row of the table reached with one seed: all that its two files say.

    Attributes:
        dataset: name of the data set.
        row: name of the method, such as "sft"; also the start of the file names.
        seed: of data order, initialisation and teacher, 0 or more.
        settings: everything that the run was given, as what JSON can hold.
        grid: the tuning that chose the settings, {"file": path, "points": number}; None if nothing was tuned.
        built_on: rows of the same data set and seed that had to run first.
        budget: "steps", "contexts", "seconds" of its own, "total_seconds" with what it is built on.
        num_users: users, the same in both parts.
        num_items: items in the catalogue.
        validation: metrics by the names of `Metrics.summary()`, None (or NaN) where one is not defined.
        test: the same of the test part.
        commit: of the code that ran.
        device: that it ran on.
        versions: of the software, by name.
        validation_rank: uint8 (num_users,), place of the target in the list of 10, 1 the top, 0 not in it.
        test_rank: the same of the test part.

    Raises:
        TypeError: ranks are not uint8 arrays.
        ValueError: a field that cannot be, or recall and NDCG that are not the means of what the ranks give;
            recall@10 and ndcg@10 need to be there.
    """

    dataset: str
    row: str
    seed: int
    settings: Mapping[str, Any]
    grid: Mapping[str, Any] | None
    built_on: list[str]
    budget: Mapping[str, float]
    num_users: int
    num_items: int
    validation: Mapping[str, float | None]
    test: Mapping[str, float | None]
    commit: str
    device: str
    versions: Mapping[str, str]
    validation_rank: np.ndarray
    test_rank: np.ndarray

    def __post_init__(self) -> None:
        if not isinstance(self.row, str) or not _ROW.fullmatch(self.row):
            raise ValueError(f"row needs a name of a-z, 0-9 and . _ + -, got {self.row!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed needs an integer from 0 on, got {self.seed!r}")
        if not isinstance(self.num_items, int) or self.num_items < 1:
            raise ValueError(f"num_items needs an integer from 1 on, got {self.num_items!r}")
        if isinstance(self.built_on, str) or not all(isinstance(row, str) for row in self.built_on):
            raise ValueError(f"built_on needs a list of rows' names, got {self.built_on!r}")
        if self.grid is not None and set(self.grid) != {"file", "points"}:
            raise ValueError(f"grid needs file and points, or to be None, got {dict(self.grid)}")
        if set(self.budget) != set(_BUDGET) or not all(_is_amount(self.budget[name]) for name in _BUDGET):
            raise ValueError(f"budget needs {', '.join(_BUDGET)}, each 0 or more, got {dict(self.budget)}")
        for part, metrics, rank in (
            ("validation", self.validation, self.validation_rank),
            ("test", self.test, self.test_rank),
        ):
            if not isinstance(rank, np.ndarray) or rank.dtype != np.uint8:
                raise TypeError(f"{part}_rank needs an array of uint8, got {_what(rank)}")
            if rank.shape != (self.num_users,) or not len(rank):
                raise ValueError(f"{part}_rank needs the shape ({self.num_users},), got {rank.shape}")
            if rank.max() > PLACES:
                raise ValueError(f"{part}_rank needs places 0 .. {PLACES}, got {rank.max()}")
            check_means(part, metrics, rank, PLACES)

    @property
    def name(self) -> str:
        """Of its files, without ending."""
        return f"{self.row}-{self.seed}"

    def per_user(self, metric: str, part: Part = "test") -> np.ndarray:
        """Float64 (num_users,) of "recall@k" or "ndcg@k", k at most 10, as `gflowgr.metrics.ranking_metrics`.

        Raises:
            ValueError: another metric, or another part.
        """
        if part not in ("validation", "test"):
            raise ValueError(f'part needs to be "validation" or "test", got {part!r}')
        rank = self.validation_rank if part == "validation" else self.test_rank
        return metric_of_ranks(metric, rank, PLACES)

    def save(self, folder: PathLike) -> Path:
        """Writes the pair of files into the data set's folder, and returns the path of the JSON file.

        Each file comes whole or not at all, the JSON last, and an older one of that name goes first: a kill
        at any time leaves a cell that is complete, or none.
        """
        path = Path(folder) / f"{self.name}.json"
        document: dict[str, Any] = {"format": FORMAT}
        for field in fields(self):
            if field.name not in _RANKS:
                document[field.name] = getattr(self, field.name)
        for part in ("validation", "test"):
            document[part] = {name: _defined(value) for name, value in document[part].items()}
        text = json.dumps(document, indent=1, allow_nan=False, default=dict) + "\n"
        path.unlink(missing_ok=True)
        save_arrays(path.with_suffix(".npz"), {name: getattr(self, name) for name in _RANKS})
        write_text(path, text)
        return path

    @classmethod
    def load(cls, path: PathLike) -> Cell:
        """Reads what `save` wrote, given the path of the JSON file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file or the arrays beside it are damaged, do not belong together, or are of
                another format; the message names the file.
        """
        path = Path(path)
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeError) as error:
            raise ValueError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a result file of the format {FORMAT}")
        wanted = {field.name for field in fields(cls)} - set(_RANKS)
        if set(document) != wanted:
            lacks, foreign = sorted(wanted - set(document)), sorted(set(document) - wanted)
            raise ValueError(f"{path}: lacks the fields {lacks}, has the unknown fields {foreign}")
        try:
            arrays: dict[str, Any] = load_arrays(path.with_suffix(".npz"), _RANKS)
            cell = cls(**document, **arrays)
        except (TypeError, AttributeError, FileNotFoundError) as error:
            raise ValueError(f"{path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path} and {path.stem}.npz: {error}") from error
        if cell.name != path.stem:
            raise ValueError(
                f"{path}: holds {cell.row} with seed {cell.seed}, needs the name {cell.name}.json"
            )
        return cell


def load_cells(folder: PathLike) -> list[Cell]:
    """All cells of a data set's folder, in the order of their rows' names and seeds.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a damaged cell, or cells of different data.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of results")
    cells = [Cell.load(path) for path in sorted(folder.glob("*.json"))]
    for cell in cells:
        first, own = _data_of(cells[0]), _data_of(cell)
        if own != first:
            raise ValueError(f"{folder}: {cell.name} is of {own}, {cells[0].name} of {first}")
    return sorted(cells, key=lambda cell: (cell.row, cell.seed))


def _data_of(cell: Cell) -> str:
    return f"{cell.dataset} with {cell.num_users} users and {cell.num_items} items"


@dataclass(frozen=True, eq=False)
class Users:
    """What is known of the test contexts of a data set.

    Attributes:
        history_length: int32 (U,), items in the context.
        target_popularity: int32 (U,), how often the target occurs in the training part.
    """

    history_length: np.ndarray
    target_popularity: np.ndarray

    def __post_init__(self) -> None:
        for name in ("history_length", "target_popularity"):
            values = getattr(self, name)
            if not isinstance(values, np.ndarray) or values.dtype != np.int32 or values.ndim != 1:
                raise ValueError(f"{name} needs int32 of the shape (users,), got {_what(values)}")
            if len(values) and values.min() < 0:
                raise ValueError(f"{name} needs numbers from 0 on, got {values.min()}")
        if len(self.history_length) != len(self.target_popularity):
            raise ValueError(
                "history_length and target_popularity need the same users, got "
                f"{len(self.history_length)} and {len(self.target_popularity)}"
            )

    def __len__(self) -> int:
        return len(self.history_length)


def save_users(folder: PathLike, history_length: Any, target_popularity: Any) -> Path:
    """Writes users.npz into a data set's folder, whole or not at all; two arrays of whole numbers, (U,) each.

    Raises:
        ValueError: arrays that are no whole numbers below 2**31 or not of the same users.
    """
    users = Users(
        as_int32("history_length", history_length), as_int32("target_popularity", target_popularity)
    )
    path = Path(folder) / USERS
    save_arrays(path, vars(users))
    return path


def load_users(folder: PathLike) -> Users:
    """Reads what `save_users` wrote.

    Raises:
        FileNotFoundError: there is no users.npz.
        ValueError: the file is damaged or something else; the message names it.
    """
    path = Path(folder) / USERS
    arrays = load_arrays(path, ("history_length", "target_popularity"))
    try:
        return Users(**arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def metric_of_ranks(metric: str, rank: np.ndarray, places: int) -> np.ndarray:
    """Float64 (U,) of "recall@k" or "ndcg@k", k at most `places`, from places of targets, 0 where not listed.

    Raises:
        ValueError: another metric, or a k outside 1 .. `places`.
    """
    name, k = _parse(metric)
    if name is None or not 1 <= k <= places:
        raise ValueError(f"metric needs recall@k or ndcg@k with k = 1 .. {places}, got {metric!r}")
    found = (rank > 0) & (rank <= k)
    if name == "recall":
        return found.astype(np.float64)
    return np.where(found, 1 / np.log2(1 + np.where(found, rank, 1).astype(np.float64)), 0.0)


def places_of(metrics: Mapping[str, Any]) -> int:
    """Length of the lists, the largest k of a recall@k; raises ValueError if there is none."""
    ks = [k for name, k in map(_parse, metrics) if name == "recall"]
    if not ks:
        raise ValueError(f"needs a recall@k, got {sorted(metrics)}")
    return max(ks)


def check_means(part: str, metrics: Mapping[str, float | None], rank: np.ndarray, places: int) -> None:
    """Checks that each recall and NDCG is the mean of what the ranks give, those at `places` among them.

    Raises:
        ValueError: one is not; the message begins with `part`.
    """
    for required in (f"recall@{places}", f"ndcg@{places}"):
        if required not in metrics:
            raise ValueError(f"{part} lacks {required}")
    for metric, stated in metrics.items():
        name, k = _parse(metric)
        if name is None or k > places:
            continue
        mean = float(metric_of_ranks(metric, rank, places).mean())
        if not isinstance(stated, (int, float)) or not math.isclose(
            stated, mean, rel_tol=0, abs_tol=_TOLERANCE
        ):
            raise ValueError(f"{part} says {metric} = {stated}, but the ranks give {mean}")


def load_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file, which has these and no others.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or holds other arrays; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # NumPy leaves a file open that it takes for an archive and cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(f"{path}: not a readable .npz file: {error}") from error
    if set(arrays) != set(names):
        raise ValueError(f"{path}: needs the arrays {sorted(names)}, has {sorted(arrays)}")
    return arrays


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes an .npz file, whole or not at all."""
    with written(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _parse(metric: str) -> tuple[str | None, int]:
    """("recall" or "ndcg", k), or None where it is neither."""
    found = re.fullmatch(r"(recall|ndcg)@([0-9]{1,9})", metric)
    return (found[1], int(found[2])) if found else (None, 0)


def _defined(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def as_int32(name: str, values: Any) -> np.ndarray:
    """The same numbers as int32; raises ValueError where they are not whole numbers below 2**31."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or (array.size and array.max() >= 2**31):
        raise ValueError(f"{name} needs whole numbers below 2**31, got {_what(values)}")
    return array.astype(np.int32)


def _what(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of the shape {value.shape}"
    return type(value).__name__
