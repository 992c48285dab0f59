"""What a run's folder keeps of each user, so that runs can be compared on the same users later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflowgr.quality.results import (
    USERS,
    PathLike,
    Users,
    as_int32,
    check_means,
    load_arrays,
    places_of,
    save_arrays,
)
from gflowgr.settings import read_yaml, section

if TYPE_CHECKING:
    from gflowgr.data import Split
    from gflowgr.metrics import Metrics

SETTINGS = "config.yaml"
METRICS = "metrics.json"
# Of the recommender that ranked beside the model, in the metrics.
TEACHER_WEIGHT = "teacher_weight"
# NDCG of the validation part by that weight, where it was chosen so.
BY_TEACHER_WEIGHT = "validation_by_teacher_weight"
_RANKS = ("validation_rank", "test_rank")
_ABOUT_USERS = ("history_length", "target_popularity")


@dataclass(frozen=True, eq=False)
class RunUsers:
    """The users of a run.

    Attributes:
        places: length of the lists that the ranks are places in.
        num_items: items in the catalogue.
        validation_rank: uint8 or uint16, place of each validation target, 1 the top, 0 not in the list.
        test_rank: the same of the test part, (U,).
        users: about the test contexts.
        teacher_weight: of the recommender that ranked beside the model, 0 where none did.
        exclude_history: whether lists leave out what users took before.
    """

    places: int
    num_items: int
    validation_rank: np.ndarray
    test_rank: np.ndarray
    users: Users
    teacher_weight: float
    exclude_history: bool


def save_run_users(folder: PathLike, parts: Split, validation: Metrics, test: Metrics) -> Path:
    """Writes users.npz into a run's folder: validation_rank, test_rank, history_length, target_popularity."""
    popularity = np.bincount(parts.sequences.items, minlength=parts.num_items)
    path = Path(folder) / USERS
    save_arrays(
        path,
        {
            "validation_rank": _small(validation),
            "test_rank": _small(test),
            "history_length": as_int32("history", (parts.test.history >= 0).sum(dim=1).numpy()),
            "target_popularity": as_int32("popularity", popularity[parts.test.target.numpy()]),
        },
    )
    return path


def load_run_users(folder: PathLike) -> RunUsers:
    """Reads what `save_run_users` wrote, and checks it against the metrics beside it.

    Raises:
        FileNotFoundError: the folder lacks users.npz, metrics.json or config.yaml.
        ValueError: a file is damaged, or the two are not of one run; the message names them.
    """
    folder = Path(folder)
    arrays = load_arrays(folder / USERS, (*_RANKS, *_ABOUT_USERS))
    try:
        document = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        stated = {part: _values(document[part]) for part in ("validation", "test")}
        num_items = int(document["test"]["num_items"])
        teacher_weight = float(document.get(TEACHER_WEIGHT, 0.0))
    except (UnicodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / METRICS}: not the metrics of a run: {error!r}") from error
    try:
        users = Users(*(arrays[name] for name in _ABOUT_USERS))
        places = places_of(stated["test"])
        for part in ("validation", "test"):
            check_ranks(part, arrays[f"{part}_rank"], places)
            check_means(part, stated[part], arrays[f"{part}_rank"], places)
        if len(users) != len(arrays["test_rank"]):
            raise ValueError(f"history_length has {len(users)} users, test_rank {len(arrays['test_rank'])}")
    except ValueError as error:
        raise ValueError(f"{folder / USERS} and {METRICS}: {error}") from error
    ranks = arrays["validation_rank"], arrays["test_rank"]
    training = section(read_yaml(folder / SETTINGS), "training")
    exclude_history = bool(training.get("exclude_history", False))
    return RunUsers(places, num_items, *ranks, users, teacher_weight, exclude_history)


def check_ranks(part: str, rank: np.ndarray, places: int) -> None:
    """Raises ValueError unless these are places of users in lists of that length."""
    if rank.dtype not in (np.uint8, np.uint16) or rank.ndim != 1 or not len(rank):
        raise ValueError(f"{part}_rank needs uint8 or uint16 (users,), got {rank.dtype} {rank.shape}")
    if rank.max() > places:
        raise ValueError(f"{part}_rank needs places 0 .. {places}, got {rank.max()}")


def _small(metrics: Metrics) -> np.ndarray:
    rank = metrics.rank.numpy()
    return rank.astype(np.uint8 if rank.max() < 256 else np.uint16)


def _values(part: Any) -> dict[str, float | None]:
    return {name: metric["value"] for name, metric in part["metrics"].items()}
