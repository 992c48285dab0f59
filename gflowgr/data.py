"""Interaction logs and the examples made of them: reading, k-core, splits, windows and whole histories."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from gflowgr.ops._random import random_bits

if TYPE_CHECKING:
    import pandas

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zip", ".zst")
# How pandas reads a table whose name ends so. A .tsv has no quotes, where a title that begins with one would
# take in all rows up to the next that does.
DIALECTS: dict[str, dict[str, Any]] = {
    ".csv": {"sep": ","},
    ".tsv": {"sep": "\t", "quoting": csv.QUOTE_NONE},
}
# Later items of the same user that a context knows unless told otherwise.
MAX_FUTURE = 5


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """Who interacted with what, when, and what it was worth, by user and in time order.

    Args:
        user: (n,) int64, 0 .. num_users - 1, ascending.
        item: (n,) int64, 0 .. num_items - 1.
        timestamp: (n,) float64, ascending within a user, in the log's own unit (seconds for dates).
        value: (n,) float32, what the interaction was worth: a rating, a behaviour's value or 1.
        user_ids: (num_users,) the log's own user ids, indexed by ours.
        item_ids: (num_items,) the log's own item ids, indexed by ours.

    Raises:
        ValueError: no interaction, fields of different length, an index out of range, or rows out of order.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    value: np.ndarray
    user_ids: np.ndarray
    item_ids: np.ndarray

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in ("user", "item", "timestamp", "value")}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"an InteractionLog needs fields of one length, got {lengths}")
        if not len(self.user):
            raise ValueError("an InteractionLog needs at least one interaction, got an empty log")
        for name, index, size in (("user", self.user, self.num_users), ("item", self.item, self.num_items)):
            if index.min() < 0 or index.max() >= size:
                raise ValueError(
                    f"{name} needs indices 0 .. {size - 1} of {name}_ids, got {index.min()} .. {index.max()}"
                )
        same_user = self.user[1:] == self.user[:-1]
        ordered = np.where(
            same_user, self.timestamp[1:] >= self.timestamp[:-1], self.user[1:] > self.user[:-1]
        )
        if not ordered.all():
            row = ordered.argmin() + 1
            raise ValueError(f"an InteractionLog needs rows sorted by user and timestamp, row {row} is not")

    def __len__(self) -> int:
        return len(self.user)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def without_last(self) -> InteractionLog:
        """Without the last interaction of each user; users and items keep their numbers."""
        kept = np.r_[self.user[1:] == self.user[:-1], False]
        user, item, timestamp, value = (
            column[kept] for column in (self.user, self.item, self.timestamp, self.value)
        )
        return InteractionLog(user, item, timestamp, value, self.user_ids, self.item_ids)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one parquet file in the log's own ids, for `load` and any other reader of parquet.

        Raises:
            ValueError: ids out of order or without an interaction, which such a file cannot tell.
        """
        for name, index, ids in (("user", self.user, self.user_ids), ("item", self.item, self.item_ids)):
            if not np.all(ids[:-1] < ids[1:]) or len(np.unique(index)) != len(ids):
                raise ValueError(
                    f"{name}_ids need to ascend and each to have an interaction for a log to be saved"
                )
        path = Path(path)
        frame = _import_pandas().DataFrame(
            {
                "user_id": self.user_ids[self.user],
                "item_id": self.item_ids[self.item],
                "timestamp": self.timestamp,
                "value": self.value,
            }
        )
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            frame.to_parquet(temporary, index=False)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> InteractionLog:
        """Reads what `save` wrote: the same arrays, and the same indices for the same ids.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not such a log.
        """
        path = Path(path)
        _require_file(path)
        columns = _Columns(
            user="user_id", item="item_id", timestamp="timestamp", rating="value", behaviour=None
        )
        return _to_log(_read_parquet(path, columns), str(path), columns, None)


def read_log(
    source: str | os.PathLike[str] | pandas.DataFrame,
    *,
    user: str = "user_id",
    item: str = "item_id",
    timestamp: str = "timestamp",
    rating: str | None = None,
    behaviour: str | None = None,
    behaviour_values: Mapping[Any, float] | None = None,
) -> InteractionLog:
    """Reads an interaction log and numbers its users and items in the order of their sorted ids.

    Ids are whole numbers or strings. The text of a csv or tsv file has no types: a column that holds nothing
    but whole numbers without leading zeros becomes one of numbers, any other stays text. Equal timestamps of
    a user keep the order of the rows.

    Args:
        source: a .csv, .tsv (both may be compressed) or .parquet file, or a DataFrame.
        user: name of the column of user ids.
        item: name of the column of item ids.
        timestamp: name of the column of times: numbers of any unit, or dates, which become seconds since 1970
            UTC.
        rating: name of the column of the interactions' values, numbers from 0 on.
        behaviour: name of the column that says what the user did; needs `behaviour_values` for each kind.
        behaviour_values: what each behaviour is worth, for example `{"liked": 10, "clicked": 1}`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `source` is neither a path nor a DataFrame, or ids are neither whole numbers nor strings.
        ValueError: a missing column, an empty log, an empty cell, a timestamp that does not parse, a rating
            below 0 or not a number, an unknown behaviour; the message names file, column, row (counted from
            1, without the header) and what was expected.
    """
    if rating is not None and behaviour is not None:
        raise ValueError(
            f"give either rating or behaviour, got rating={rating!r} and behaviour={behaviour!r}"
        )
    if (behaviour is None) != (behaviour_values is None):
        raise ValueError(
            "behaviour and behaviour_values need each other, "
            f"got behaviour={behaviour!r} and behaviour_values={behaviour_values!r}"
        )
    columns = _Columns(user, item, timestamp, rating, behaviour)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        _require_file(path)
        name, frame = str(path), _read_file(path, columns)
    elif isinstance(source, _import_pandas().DataFrame):
        name, frame = "the DataFrame", source
        columns.check(name, [str(column) for column in source.columns])
    else:
        raise TypeError(f"source needs to be a path or a pandas DataFrame, got {type(source).__name__}")
    return _to_log(frame, name, columns, behaviour_values)


def k_core(log: InteractionLog, k: int = 5) -> InteractionLog:
    """Drops users and items with fewer than `k` interactions until none is left; renumbers the rest in order.

    Repeated interactions with an item count each.

    Raises:
        ValueError: `k` is below 1, or nothing is left.
    """
    _require_at_least("k", k, 1)
    keep = _core_rows(log, k)
    if not len(keep):
        largest = next(smaller for smaller in range(k - 1, 0, -1) if len(_core_rows(log, smaller)))
        raise ValueError(
            f"k_core(k={k}) leaves nothing of the {len(log)} interactions of {log.num_users} users with "
            f"{log.num_items} items; the largest k that leaves something is {largest}"
        )
    users, user = np.unique(log.user[keep], return_inverse=True)
    items, item = np.unique(log.item[keep], return_inverse=True)
    return InteractionLog(
        user, item, log.timestamp[keep], log.value[keep], log.user_ids[users], log.item_ids[items]
    )


_Rows = TypeVar("_Rows", bound="_TensorRows")


class _TensorRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A data set of which every field is a tensor with one row an example, or a list, which no batch has."""

    index: Tensor

    def _all(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: value for name, value in values.items() if value is not None}

    def tensors(self) -> dict[str, Tensor]:
        """The fields that batches have, by name."""
        return {name: value for name, value in self._all().items() if isinstance(value, Tensor)}

    def __post_init__(self) -> None:
        lengths = {name: len(field) for name, field in self._all().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{type(self).__name__} needs fields of one length, got {lengths}")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: field[row] for name, field in self.tensors().items()}

    def __getitems__(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        picked = torch.as_tensor(rows, dtype=torch.int64)
        columns = {name: field[picked].unbind() for name, field in self.tensors().items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def select(self: _Rows, rows: Sequence[int] | Tensor) -> _Rows:
        """The given rows as a data set of their own; `index` still tells what each was."""
        picked = torch.as_tensor(rows, dtype=torch.int64)
        chosen = {
            name: field[picked] if isinstance(field, Tensor) else [field[row] for row in picked.tolist()]
            for name, field in self._all().items()
        }
        return type(self)(**chosen)


@dataclass(frozen=True, eq=False)
class Examples(_TensorRows):
    """Contexts, each with the item that came next.

    Attributes:
        index: (n,) int64, 0 .. n - 1, which identifies an example whatever the order it is drawn in.
        user: (n,) int64.
        history: (n, H) int64, the items before the target, oldest first, -1 on the right.
        target: (n,) int64.
        value: (n,) float32, what the interaction with the target was worth.
        future: (n, F) int64, the items that follow the target in the same part of the user's log, in order,
            each once and none of them the target, -1 on the right.
        future_value: (n, F) float32, what those were worth, 0 on the right.
        earlier: for each example all items before the target, of which `history` has the latest. `split`
            gives them for validation and test part.
    """

    index: Tensor
    user: Tensor
    history: Tensor
    target: Tensor
    value: Tensor
    future: Tensor
    future_value: Tensor
    earlier: Sequence[np.ndarray] | None = None

    def taken(self) -> Sequence[np.ndarray] | Tensor:
        """What no list may hold where nobody takes an item twice: `earlier`, or the histories without it.

        `generate` and the like take it as what to `exclude`.
        """
        return self.history if self.earlier is None else self.earlier


@dataclass(frozen=True, eq=False)
class Histories(_TensorRows):
    """Whole training histories for causal training, where every item but a row's first is a target.

    A history longer than a row goes on in further rows. Neighbours share one item, so that each item but the
    user's first is a target exactly once; the latest row is the full one, because its contexts look most like
    those that will be asked for. Users with a single training item have no row.

    Attributes:
        index: (n,) int64, 0 .. n - 1.
        user: (n,) int64.
        items: (n, W) int64, oldest first, -1 on the right.
        value: (n, W) float32, 0 on the right.
    """

    index: Tensor
    user: Tensor
    items: Tensor
    value: Tensor

    def further(self, beyond: int) -> Tensor:
        """(n,) int64: `beyond` for the latest row of each user that is there, 0 for the others."""
        last = self.index.new_full((int(self.user.max()) + 1,), -1)
        last = last.scatter_reduce(0, self.user, self.index, "amax")
        return torch.where(self.index == last[self.user], beyond, 0)

    def contexts(self, beyond: int = 0) -> float:
        """Contexts of a row on average, where the latest row of each user goes `beyond` items further."""
        length = (self.items >= 0).sum(1) + self.further(beyond)
        return float((length.clamp(max=self.items.shape[1]) - 1).sum()) / len(self)


@dataclass(frozen=True, eq=False)
class Sequences:
    """The training part of all users: user u has items[offsets[u] : offsets[u + 1]], in time order.

    Attributes:
        offsets: (num_users + 1,) int64.
        items: (n,) int64.
        values: (n,) float32.
    """

    offsets: np.ndarray
    items: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Split:
    """A log divided into training, validation and test part."""

    train: Examples
    validation: Examples
    test: Examples
    histories: Histories
    sequences: Sequences
    num_items: int


def split(
    log: InteractionLog,
    method: Literal["leave-one-out", "time"] = "leave-one-out",
    *,
    max_history: int = 20,
    max_future: int = MAX_FUTURE,
    max_items: int | None = None,
    held_out: int = 2,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
) -> Split:
    """Divides a log so that no part sees what came after it.

    "leave-one-out" (LETTER, arXiv 2405.07314): a user's last item is the test target, the one before it the
    validation target, the rest is training. "time": two moments divide the whole log, so that the last
    `test_fraction` of the interactions and the `validation_fraction` before them come after everything
    trained on; interactions at the same moment stay together. A user's target is then the first item of each
    part, and users whom a part meets for the first time have no history and no example in it.

    Every item but the first of a user's training part is a training target. Histories reach back over the
    parts: that of the test target holds the validation target.

    Args:
        log: the interactions.
        method: "leave-one-out" or "time".
        max_history: the latest items that a history keeps.
        max_future: the following items that an example keeps, 0 for none.
        max_items: row length of the whole histories, by default max_history + 1.
        held_out: items of a user that are no training targets, "leave-one-out" only: 2, or 1 for a log that
            has no test item any more, whose last one is then the validation target and whose test part is
            empty.
        validation_fraction: share of the interactions, "time" only.
        test_fraction: share of the interactions, "time" only.

    Raises:
        ValueError: an argument out of range, a user with fewer than 3 interactions ("leave-one-out"), or a
            part without any example.
    """
    _require_at_least("max_history", max_history, 1)
    _require_at_least("max_future", max_future, 0)
    max_items = max_history + 1 if max_items is None else max_items
    _require_at_least("max_items", max_items, 2)
    if held_out not in (1, 2) or (held_out == 1 and method != "leave-one-out"):
        raise ValueError(f'held_out needs to be 2, or 1 with method "leave-one-out", got {held_out}')
    if method == "leave-one-out":
        part = _parts_leaving_one_out(log, held_out)
    elif method == "time":
        part = _parts_by_time(log, validation_fraction, test_fraction)
    else:
        raise ValueError(f'method needs to be "leave-one-out" or "time", got {method!r}')

    windows = _Windows(log, part, max_history, max_future)
    has_history = windows.row > windows.user_start
    opens_part = np.r_[True, (log.user[1:] != log.user[:-1]) | (part[1:] != part[:-1])]
    targets = {
        "training": has_history & (part == 0),
        "validation": has_history & (part == 1) & opens_part,
        "test": has_history & (part == 2) & opens_part,
    }
    for name, chosen in targets.items():
        if not chosen.any() and (name != "test" or held_out == 2):
            raise ValueError(
                f"split(method={method!r}): no example for the {name} part, which needs a user with an "
                f"interaction in it and an earlier one, got {len(log)} interactions of {log.num_users} users"
            )
    train, validation, test = (
        windows.examples(np.flatnonzero(chosen), with_earlier=name != "training")
        for name, chosen in targets.items()
    )
    training = part == 0
    offsets = np.r_[0, np.bincount(log.user[training], minlength=log.num_users).cumsum()]
    sequences = Sequences(offsets, log.item[training], log.value[training])
    return Split(train, validation, test, _histories(sequences, max_items), sequences, log.num_items)


def collate(examples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks examples into a batch: a dictionary of the same fields with the batch in front.

    Whole histories are cut to the longest of the batch, but to no fewer than two columns.
    """
    if not examples:
        raise ValueError("examples needs at least one example to collate, got none")
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    if "items" in batch:
        width = max(2, int((batch["items"] >= 0).sum(1).max()))
        batch |= {name: batch[name][:, :width] for name in ("items", "value")}
    return batch


def batches_of_like_length(
    lengths: Tensor, batch_size: int, generator: torch.Generator | None = None
) -> list[Tensor]:
    """Rows (int64) of each batch, in random order: every row once, little padding in any batch.

    Rows are sorted by length within large random groups, so that users still mix anew in every epoch.
    """
    order = torch.randperm(len(lengths), generator=generator)
    groups = [group[lengths[group].argsort(stable=True)] for group in order.split(32 * batch_size)]
    batches = [rows for group in groups for rows in group.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class LikeLengths(torch.utils.data.Sampler[int]):
    """Rows one after the other such that batches of `batch_size` hold histories of like length.

    The order is a function of `seed` and the epoch, which a data loader sets.
    """

    def __init__(self, dataset: Examples | Histories, batch_size: int, seed: int) -> None:
        rows = dataset.history if isinstance(dataset, Examples) else dataset.items
        self.lengths = (rows >= 0).sum(1)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # A CPU's generator reads the lower half of a seed only, so that both have to be in there.
        word = int(random_bits(torch.tensor(self.seed), self.epoch))
        generator = torch.Generator().manual_seed(word)
        batches = batches_of_like_length(self.lengths, self.batch_size, generator)
        # A short batch anywhere but at the end would shift the borders of all that follow.
        batches.sort(key=lambda rows: len(rows) < self.batch_size)
        return iter(torch.cat(batches).tolist())


def _parts_leaving_one_out(log: InteractionLog, held_out: int) -> np.ndarray:
    counts = np.bincount(log.user, minlength=log.num_users)
    needed = held_out + 1
    if (counts < needed).any():
        first = counts.argmin()
        raise ValueError(
            f'split(method="leave-one-out") needs {needed} interactions of each user, '
            f"{(counts < needed).sum()} of {log.num_users} users have fewer: user "
            f"{_shown(log.user_ids[first])} has {counts[first]}; k_core(log, {needed}) drops them"
        )
    left = counts.cumsum()[log.user] - 1 - np.arange(len(log))
    return np.maximum(held_out - left, 0)


def _parts_by_time(log: InteractionLog, validation_fraction: float, test_fraction: float) -> np.ndarray:
    fractions = {"validation_fraction": validation_fraction, "test_fraction": test_fraction}
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise ValueError(f"{name} needs to lie between 0 and 1, got {fraction}")
    if validation_fraction + test_fraction >= 1:
        raise ValueError(
            f"validation_fraction and test_fraction need to add up to less than 1, got {fractions}"
        )
    moments = np.quantile(log.timestamp, [1 - validation_fraction - test_fraction, 1 - test_fraction])
    return np.searchsorted(moments, log.timestamp, side="right")


class _Windows:
    """Looks up histories and futures around rows of a log."""

    def __init__(self, log: InteractionLog, part: np.ndarray, max_history: int, max_future: int) -> None:
        self.log = log
        self.max_history = max_history
        self.max_future = max_future
        self.row = np.arange(len(log))
        self.user_start = np.searchsorted(log.user, log.user)
        same_part = (log.user[1:] == log.user[:-1]) & (part[1:] == part[:-1])
        ends = np.r_[np.flatnonzero(~same_part) + 1, len(log)]
        self.part_end = np.repeat(ends, np.diff(ends, prepend=0))

    def examples(self, rows: np.ndarray, with_earlier: bool) -> Examples:
        log = self.log
        length = np.minimum(rows - self.user_start[rows], self.max_history)
        columns = np.arange(self.max_history)
        before = np.where(columns < length[:, None], (rows - length)[:, None] + columns, -1)
        after = self._following(rows)
        return Examples(
            index=torch.arange(len(rows)),
            user=torch.from_numpy(log.user[rows]),
            history=torch.from_numpy(_pick(log.item, before, -1)),
            target=torch.from_numpy(log.item[rows]),
            value=torch.from_numpy(log.value[rows]),
            future=torch.from_numpy(_pick(log.item, after, -1)),
            future_value=torch.from_numpy(_pick(log.value, after, 0)),
            earlier=[log.item[self.user_start[row] : row] for row in rows] if with_earlier else None,
        )

    def _following(self, rows: np.ndarray) -> np.ndarray:
        """(n, max_future) rows of the next distinct items in the same part but the row's own, -1 for none.

        All parts at once, from their ends: a row's own item moves to the front of the items after it, so that
        a step keeps the nearest `max_future` + 1, however often a user takes the same ones again.
        """
        found = np.full((len(rows), self.max_future), -1)
        if not self.max_future or not len(rows):
            return found
        place = np.full(len(self.log), -1)
        place[rows] = np.arange(len(rows))
        ends, lengths = np.unique(self.part_end, return_counts=True)
        order = np.flatnonzero(np.isin(ends, self.part_end[rows]))
        order = order[np.argsort(-lengths[order], kind="stable")]
        ends, lengths = ends[order], lengths[order]
        nearest = np.full((len(ends), self.max_future + 1), -1)
        columns = np.arange(self.max_future)
        # Longest first, so that those which reach so far are the first.
        reaches = np.searchsorted(-lengths, -np.arange(1, lengths[0] + 1), side="right")
        for distance, reach in enumerate(reaches, 1):
            row, later = ends[:reach] - distance, nearest[:reach]
            same = (later >= 0) & (self.log.item[later] == self.log.item[row, None])
            left_out = np.where(same.any(1), same.argmax(1), self.max_future)
            others = later[np.arange(reach)[:, None], columns + (columns >= left_out[:, None])]
            wanted = place[row] >= 0
            found[place[row[wanted]]] = others[wanted]
            later[:, 0], later[:, 1:] = row, others
        return found


def _pick(source: np.ndarray, rows: np.ndarray, padding: int) -> np.ndarray:
    return np.where(rows >= 0, source[rows], np.asarray(padding, dtype=source.dtype))


def _histories(sequences: Sequences, max_items: int) -> Histories:
    stride = max_items - 1
    lengths = np.diff(sequences.offsets)
    pieces = -(-np.maximum(lengths - 1, 0) // stride)
    user = np.repeat(np.arange(len(lengths)), pieces)
    left = np.cumsum(pieces)[user] - 1 - np.arange(len(user))
    stop = sequences.offsets[user + 1] - left * stride
    start = np.maximum(sequences.offsets[user], stop - max_items)
    columns = start[:, None] + np.arange(max_items)
    rows = np.where(columns < stop[:, None], columns, -1)
    return Histories(
        index=torch.arange(len(user)),
        user=torch.from_numpy(user),
        items=torch.from_numpy(_pick(sequences.items, rows, -1)),
        value=torch.from_numpy(_pick(sequences.values, rows, 0)),
    )


def _core_rows(log: InteractionLog, k: int) -> np.ndarray:
    rows = np.arange(len(log))
    while True:
        user, item = log.user[rows], log.item[rows]
        enough = (np.bincount(user, minlength=1)[user] >= k) & (np.bincount(item, minlength=1)[item] >= k)
        if enough.all():
            return rows
        rows = rows[enough]


@dataclass(frozen=True)
class _Columns:
    user: str
    item: str
    timestamp: str
    rating: str | None
    behaviour: str | None

    @property
    def names(self) -> list[str]:
        return [name for name in dataclasses.astuple(self) if name is not None]

    def check(self, source: str, present: Sequence[str]) -> None:
        twice = {name for name in self.names if self.names.count(name) > 1}
        if twice:
            raise ValueError(f"each role needs a column of its own, got {dataclasses.asdict(self)}")
        for role, name in dataclasses.asdict(self).items():
            if name is None:
                continue
            if name not in present:
                lower = {column.lower(): column for column in present}
                nearest = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
                hint = f", the nearest is {lower[nearest[0]]!r}" if nearest else ""
                raise ValueError(
                    f"{source}: no column {name!r} ({role}){hint}; the columns are {list(present)}"
                )
            if list(present).count(name) > 1:
                raise ValueError(
                    f"{source}: {list(present).count(name)} columns are called {name!r}, needs one"
                )


def _require_at_least(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} needs to be an integer, got {value!r}")
    if value < smallest:
        raise ValueError(f"{name} needs to be at least {smallest}, got {value}")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such interaction log")


def _import_pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("interaction logs need pandas: pip install 'gflowgr[train]'") from error
    return pandas


def _read_file(path: Path, columns: _Columns) -> pandas.DataFrame:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    if suffix == ".parquet":
        return _read_parquet(path, columns)
    if suffix not in DIALECTS:
        raise ValueError(f"{path}: an interaction log needs to end in .csv, .tsv or .parquet")
    return _read_text(path, DIALECTS[suffix], columns)


def _read_parquet(path: Path, columns: _Columns) -> pandas.DataFrame:
    pandas = _import_pandas()
    import pyarrow
    import pyarrow.parquet

    try:
        columns.check(str(path), pyarrow.parquet.read_schema(path).names)
        return pandas.read_parquet(path, columns=columns.names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error


def _read_text(path: Path, dialect: Mapping[str, Any], columns: _Columns) -> pandas.DataFrame:
    pandas = _import_pandas()
    # All is read as text, so that an error can show what stands in the file and no id loses a leading zero.
    options = {**dialect, "dtype": str, "keep_default_na": False}
    try:
        # As a row, since pandas gives a column that is there twice another name.
        header = pandas.read_csv(path, header=None, nrows=1, **options)
        columns.check(str(path), header.iloc[0].tolist())
        with warnings.catch_warnings():
            # With index_col=False pandas only warns of rows longer than the header, and cuts them off.
            warnings.simplefilter("error", pandas.errors.ParserWarning)
            frame = pandas.read_csv(path, index_col=False, **options)[columns.names]
    except pandas.errors.EmptyDataError as error:
        raise ValueError(f"{path}: the file is empty, expected a header line and interactions") from error
    except pandas.errors.ParserWarning as error:
        raise ValueError(f"{path}: rows have more fields than the header has columns") from error
    except (pandas.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable table of UTF-8 text: {str(error).strip()}") from error
    for name in (columns.user, columns.item):
        if frame[name].str.fullmatch("0|-?[1-9][0-9]{0,17}").all():
            frame[name] = frame[name].astype(np.int64)
    return frame


def _to_log(
    frame: pandas.DataFrame, source: str, columns: _Columns, behaviour_values: Mapping[Any, float] | None
) -> InteractionLog:
    if not len(frame):
        raise ValueError(f"{source}: an empty log, expected at least one interaction")
    for name in columns.names:
        empty = (frame[name].isna() | frame[name].isin([""])).to_numpy()
        if empty.any():
            _fail_at_row(source, name, empty, frame[name], "a value")
    user, user_ids = _number_ids(frame[columns.user], source)
    item, item_ids = _number_ids(frame[columns.item], source)
    timestamp = _parse_timestamps(frame[columns.timestamp], source)
    value = np.ones(len(frame), dtype=np.float32)
    if columns.rating is not None:
        value = _parse_ratings(frame[columns.rating], source)
    elif columns.behaviour is not None:
        value = _parse_behaviours(frame[columns.behaviour], source, behaviour_values or {})
    order = np.lexsort((timestamp, user))
    return InteractionLog(user[order], item[order], timestamp[order], value[order], user_ids, item_ids)


def _number_ids(column: pandas.Series, source: str) -> tuple[np.ndarray, np.ndarray]:
    pandas = _import_pandas()
    kind = pandas.api.types.infer_dtype(column, skipna=False)
    if kind == "categorical":
        kind = pandas.api.types.infer_dtype(column.cat.categories, skipna=False)
    if kind == "floating" and (column % 1 == 0).all():
        # A column of whole numbers with a hole in it was read as floats, even once the hole is filtered out.
        column, kind = column.astype(np.int64), "integer"
    if kind not in ("integer", "string"):
        raise TypeError(
            f"{source}, column {column.name!r}: ids need to be whole numbers or strings, got {kind} values"
        )
    largest = column.to_numpy().max() if kind == "integer" else 0
    if largest > np.iinfo(np.int64).max:
        raise ValueError(f"{source}, column {column.name!r}: ids need to fit 64-bit integers, got {largest}")
    codes, ids = pandas.factorize(column.to_numpy(dtype=np.int64 if kind == "integer" else object))
    order = np.argsort(ids)
    rank = np.empty(len(ids), dtype=np.int64)
    rank[order] = np.arange(len(ids))
    return rank[codes], ids[order]


def _parse_timestamps(column: pandas.Series, source: str) -> np.ndarray:
    pandas = _import_pandas()
    readings = [np.asarray(_parse_numbers(column))]
    if not pandas.api.types.is_numeric_dtype(column) and np.isnan(readings[0]).any():
        with warnings.catch_warnings():
            # Without one format for all rows pandas warns and guesses; what it cannot read comes out empty.
            warnings.simplefilter("ignore", UserWarning)
            for options in ({"format": "ISO8601"}, {}):
                dates = pandas.to_datetime(column, errors="coerce", utc=True, **options)
                microseconds = dates.dt.tz_localize(None).to_numpy().astype("datetime64[us]")
                seconds = microseconds.astype(np.int64) / 1e6
                readings.append(np.where(np.isnat(microseconds), np.nan, seconds))
    timestamps = min(readings, key=lambda reading: np.isnan(reading).sum())
    unreadable = np.isnan(timestamps)
    if unreadable.any():
        _fail_at_row(
            source, column.name, unreadable, column, "a number or a date such as 2024-05-31 18:30:00"
        )
    return timestamps


def _parse_ratings(column: pandas.Series, source: str) -> np.ndarray:
    ratings = _parse_numbers(column)
    wrong = ~(ratings >= 0)
    if wrong.any():
        _fail_at_row(source, column.name, wrong, column, "a number from 0 on")
    return ratings.astype(np.float32)


def _parse_behaviours(
    column: pandas.Series, source: str, behaviour_values: Mapping[Any, float]
) -> np.ndarray:
    worth = {str(name): float(value) for name, value in behaviour_values.items()}
    for name, value in worth.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"behaviour_values[{name!r}] needs to be a number from 0 on, got {value}")
    values = column.astype(str).map(worth).to_numpy(dtype=np.float32)
    unknown = np.isnan(values)
    if unknown.any():
        _fail_at_row(source, column.name, unknown, column, f"one of behaviour_values, {sorted(worth)}")
    return values


def _parse_numbers(column: pandas.Series) -> np.ndarray:
    """(n,) float64, NaN for all that is not a finite number."""
    pandas = _import_pandas()
    if pandas.api.types.is_datetime64_any_dtype(column) or pandas.api.types.is_bool_dtype(column):
        return np.full(len(column), np.nan)
    numbers = pandas.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _fail_at_row(source: str, name: Any, wrong: np.ndarray, column: pandas.Series, expected: str) -> None:
    first = int(wrong.argmax())
    count = f" ({wrong.sum()} such rows)" if wrong.sum() > 1 else ""
    raise ValueError(
        f"{source}, column {name!r}, row {first + 1}: "
        f"got {_shown(column.iloc[first])}, expected {expected}{count}"
    )


def _shown(value: Any) -> str:
    return repr(value.item() if isinstance(value, np.generic) else value)
