"""The table of results, read back: the latest run of each op in each setting."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from gflowgr.bench.table import COLUMNS, GRAPH

DENSE = ("dense_mask", "eager_tb")
# What stands beside an op for another reason than to be beaten: less than the task, or something approximate.
NO_RIVALS = ("reference", "floor", "searchsorted", *DENSE)
SWEPT = ":items="


@dataclass(frozen=True)
class Result:
    """An op in one setting, by the latest run of it: the rows of the op ("") and of what stood beside it."""

    op: str
    config: str
    dtype: str
    direction: str
    device: str
    rows: dict[str, dict[str, str]]

    @property
    def own(self) -> dict[str, str]:
        return self.rows[""]

    def ratio(self, name: str) -> float:
        return float(self.rows[name]["ratio"])

    @property
    def dense(self) -> str | None:
        return next((name for name in DENSE if name in self.rows), None)

    @property
    def rival(self) -> str | None:
        """The fastest of the other baselines."""
        others = [name for name in self.rows if name and name not in NO_RIVALS]
        return min(others, key=self.ratio, default=None)

    def memory(self, name: str) -> int:
        """Peak bytes: of what PyTorch and the system tell, the larger, so that neither hides any."""
        return max(int(self.rows[name]["peak_bytes"]), int(self.rows[name]["peak_rss_bytes"]))


def read_results(path: Path, threads: int = 1) -> list[Result]:
    """The latest run's rows of each op, configuration, dtype and pass on each device, in the table's order.

    Without replays of CUDA graphs.

    Raises:
        ValueError: there is no such table, or it has other columns.
    """
    if not path.is_file():
        raise ValueError(f"plot needs the table {path}, which is no file")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"plot: {path} has not the columns {','.join(COLUMNS)}")
        rows = [row for row in reader if row["threads"] == str(threads)]
    settings: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        device = row["cpu"] if row["device"] == "cpu" else row["device"]
        settings[row["op"], row["config"], row["dtype"], row["pass"], device].append(row)
    results = []
    for key, found in settings.items():
        latest = max(row["date"] for row in found)
        run = {row["baseline"]: row for row in found if row["date"] == latest}
        # Figures and README compare calls as users make them.
        if "" in run and not key[3].endswith(GRAPH):
            op, config, dtype, direction, device = key
            results.append(Result(op, config, dtype, direction, device, run))
    return results
