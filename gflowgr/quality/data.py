"""A data set of the table: interactions and semantic IDs, and how long a training on it takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from gflowgr.data import InteractionLog, read_log
from gflowgr.folders import DataFolder, Items, read_table, written
from gflowgr.semantic_ids import SemanticIds, embed_text, quantise, resolve_collisions

# Codes that are made here, as `gflowgr tokenize` makes them unless told otherwise.
FROM_TEXT = "text"


@dataclass(frozen=True)
class DataSet:
    """Which of its semantic IDs a data set is run with, and its budget.

    Attributes:
        name: of the data set.
        codes: file name of the semantic IDs, without ending; "text" for our own from the items' texts.
        epochs: of a training from scratch, on whole histories.
        extra_steps: of a training that goes on, on single contexts.
        t5_epochs: of a T5 from scratch, on single contexts.
        folder: where its files are, by default in one of its name.
        collisions: whether items that share their codes stay together on one leaf ("multiplicity") or get one
            more code ("extra-level").
        left_out: of each user's latest items, so many are gone. Without the last one a table's test items are
            the validation items of the data set itself, after an item that nobody was trained with: where
            settings can be compared that train on what validation asks.
    """

    name: str
    codes: str
    epochs: int
    extra_steps: int
    t5_epochs: int
    folder: str = ""
    collisions: Literal["multiplicity", "extra-level"] = "multiplicity"
    left_out: int = 0

    @property
    def tokenizer(self) -> str:
        """What made the semantic IDs, in words for a result file."""
        return self.codes if self.collisions == "multiplicity" else f"{self.codes}, {self.collisions}"

    def load(self, root: Path, work: Path) -> DataFolder:
        """Reads `interactions.parquet` and `semantic_ids/<codes>.npy` or `items.parquet` under its folder.

        Codes that are made here are made once and kept in `work`: another machine would cluster otherwise.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: ids that do not number the rows of the codes.
        """
        folder = root / (self.folder or self.name)
        log = read_log(folder / "interactions.parquet")
        if self.codes == FROM_TEXT:
            texts = _texts(folder, log)
            digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]
            kept = work / self.name / f"semantic_ids-{digest}.npy"
            if not kept.is_file():
                made = quantise(embed_text(texts))
                with written(kept) as temporary, temporary.open("wb") as file:
                    np.save(file, made)
            codes = SemanticIds.from_npy(kept).codes.numpy()
        else:
            codes = SemanticIds.from_npy(folder / "semantic_ids" / f"{self.codes}.npy").codes.numpy()
        if not np.array_equal(log.item_ids, np.arange(len(codes))):
            raise ValueError(f"{folder}: needs items 0 .. {len(codes) - 1}, a row of {self.codes}.npy each")
        longer = self.collisions == "extra-level"
        semantic_ids = SemanticIds(resolve_collisions(codes, self.collisions), extra_level=longer)
        for _ in range(self.left_out):
            log = log.without_last()
        names = [str(item) for item in log.item_ids]
        return DataFolder(folder, log, Items(log.item_ids, names, [None] * len(names)), semantic_ids)


def _texts(folder: Path, log: InteractionLog) -> list[str | None]:
    """Of the log's items, in their order.

    Raises:
        ValueError: an item is missing, or is there twice.
    """
    table = read_table(folder / "items.parquet", ["item_id", "text"]).sort_values("item_id")
    if not np.array_equal(table["item_id"], log.item_ids):
        raise ValueError(
            f"{folder / 'items.parquet'}: needs one row for each of the log's items and no other"
        )
    return list(table["text"])


_SCIENTIFIC = DataSet("scientific", "rqkmeans_unique", epochs=40, extra_steps=300, t5_epochs=12)
DATA_SETS = {
    data.name: data
    for data in (
        _SCIENTIFIC,
        replace(_SCIENTIFIC, name="scientific-rehearsal", folder="scientific", left_out=1),
        # The same log under other tokenizers.
        replace(_SCIENTIFIC, name="scientific-rqvae", codes="rqvae", folder="scientific"),
        replace(
            _SCIENTIFIC,
            name="scientific-rqvae-resolved",
            codes="rqvae",
            folder="scientific",
            collisions="extra-level",
        ),
        replace(
            _SCIENTIFIC,
            name="scientific-text",
            codes=FROM_TEXT,
            folder="scientific",
            collisions="extra-level",
        ),
        DataSet("beauty", "letter", epochs=30, extra_steps=500, t5_epochs=6),
        DataSet("instruments", "letter", epochs=16, extra_steps=500, t5_epochs=6),
        DataSet("yelp", "letter", epochs=12, extra_steps=500, t5_epochs=6),
    )
}
