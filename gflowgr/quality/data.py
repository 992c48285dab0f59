"""A data set of the table: interactions and ready-made semantic IDs, and how long a training on it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gflowgr.data import read_log
from gflowgr.folders import DataFolder, Items
from gflowgr.semantic_ids import SemanticIds


@dataclass(frozen=True)
class DataSet:
    """Which of its semantic IDs a data set is run with, and its budget.

    Attributes:
        name: of the data set and its folder.
        codes: file name of the semantic IDs, without ending.
        epochs: of a training from scratch, on whole histories.
        extra_steps: of a training that goes on, on single contexts.
        t5_epochs: of a T5 from scratch, on single contexts.
    """

    name: str
    codes: str
    epochs: int
    extra_steps: int
    t5_epochs: int

    def load(self, root: Path) -> DataFolder:
        """Reads `root/<name>/interactions.parquet` and `root/<name>/semantic_ids/<codes>.npy`.

        Items that share their codes stay together on one leaf.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: ids that do not number the rows of the codes.
        """
        folder = root / self.name
        log = read_log(folder / "interactions.parquet")
        semantic_ids = SemanticIds.from_npy(folder / "semantic_ids" / f"{self.codes}.npy")
        if not np.array_equal(log.item_ids, np.arange(semantic_ids.num_items)):
            raise ValueError(
                f"{folder}: needs items 0 .. {semantic_ids.num_items - 1}, a row of {self.codes}.npy each"
            )
        names = [str(item) for item in log.item_ids]
        return DataFolder(folder, log, Items(log.item_ids, names, [None] * len(names)), semantic_ids)


DATA_SETS = {
    data.name: data
    for data in (
        DataSet("scientific", "rqkmeans_unique", epochs=40, extra_steps=300, t5_epochs=12),
        DataSet("beauty", "letter", epochs=30, extra_steps=500, t5_epochs=6),
        DataSet("instruments", "letter", epochs=16, extra_steps=500, t5_epochs=6),
        DataSet("yelp", "letter", epochs=12, extra_steps=500, t5_epochs=6),
    )
}
