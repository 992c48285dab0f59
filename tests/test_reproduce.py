from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas
import pytest

from gflowgr.quality import cells
from gflowgr.quality.cells import Place
from gflowgr.quality.data import DataSet
from gflowgr.quality.rows import ROWS

TINY = DataSet("tiny", "codes", epochs=2, extra_steps=3, t5_epochs=1)
USERS, ITEMS = 40, 30


def write_data(root: Path, seed: int = 0) -> None:
    """Sequences in which the next item mostly follows from the one before."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(USERS):
        item = int(random.integers(ITEMS))
        for position in range(int(random.integers(5, 9))):
            rows.append((user, item, position))
            item = (item + int(random.choice([1, 1, 1, 7]))) % ITEMS
    present = {item for _, item, _ in rows}
    rows += [(0, item, 100 + item) for item in range(ITEMS) if item not in present]
    folder = root / TINY.name
    (folder / "semantic_ids").mkdir(parents=True)
    frame = pandas.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    frame.to_parquet(folder / "interactions.parquet", index=False)
    codes = np.stack([np.arange(ITEMS) // 6, np.arange(ITEMS) % 6], 1)
    np.save(folder / "semantic_ids" / "codes.npy", codes.astype(np.int16))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and recommenders of a size that trains in a second."""
    sizes = {
        "decoder": {"kind": "decoder", "layers": 1, "d_model": 16, "heads": 2},
        "t5": {"kind": "t5", "layers": 1, "d_model": 16, "heads": 2, "d_kv": 8, "d_ff": 32},
    }
    monkeypatch.setattr(cells, "_SIZES", sizes)
    sasrec = ROWS["sasrec"].settings["collaborative"]
    monkeypatch.setitem(sasrec, "epochs", 2)
    monkeypatch.setitem(sasrec, "hidden_size", 16)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    write_data(tmp_path / "data")
    return Place(tmp_path / "data", tmp_path / "work", tmp_path / "results")


def run(place: Place, *rows: str, seed: int = 0) -> None:
    for row in rows:
        cells.run(row, TINY, seed, place)


class TestCells:
    @pytest.mark.parametrize("row", [name for name in ROWS if name not in ("sasrec", "sft", "t5-sft")])
    def test_every_row_runs(self, place: Place, row: str) -> None:
        for needed in ROWS[row].built_on:
            run(place, needed)
        cell = cells.run(row, TINY, 0, place)
        assert cell.num_users == USERS
        assert cell.built_on == ROWS[row].built_on
        assert str(place.work) not in json.dumps(dict(cell.settings))
