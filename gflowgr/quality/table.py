"""The table of results: a line for each row that was run, and whether GFlowGR leads plain fine-tuning."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gflowgr.page import listed, signed, signed_percent
from gflowgr.quality.data import DATA_SETS
from gflowgr.quality.pairing import Paired, paired_difference
from gflowgr.quality.results import UNSEEN, Cell, PathLike, load_cells

RESULTS = "benchmarks/results/quality"
SUBJECT, BASELINE, TEACHER = "gflowgr", "sft", "sasrec"
DECIDING = "ndcg@10"
METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "coverage@10", "gini@10", "diversity@10")
LOWER_IS_BETTER = ("gini@10",)
ORDER = (
    "popularity", "item-knn", "sasrec", "mixture",
    "sft", "sft-longer", "sft-longest", "sft-continued", "sft-smoothed", "sft-smoothed-longer",
    "sft-rollouts-sasrec", "sft-rollouts",
    "ensemble", "sft-ensemble", "sft-longer-ensemble", "sft-longest-ensemble",
    "dpo", "s-dpo", "sprec", "grpo",
    "item-kl", "gflowgr-tb", "gflowgr-db", "gflowgr-vargrad", "gflowgr-subtb", "gflowgr-flows",
    "gflowgr-sasrec", "gflowgr-within", "gflowgr-sasrec-teacher", "gflowgr",
)  # fmt: skip
BACKBONES = ("", "t5-", "lora-")
# A mixture is made of the others, so that it is the teacher where it stands beside them.
TEACHERS = ("mixture", TEACHER, "item-knn")


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, and the standard deviation where there are two seeds or more."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        row: its name.
        seeds: that it was run with.
        metrics: by the names in `METRICS`, None where one is not defined for every seed.
        device: what its cells ran on: "CPU", a GPU's name, or several.
        budget: means over the seeds of "steps", "contexts", "seconds" and "total_seconds".
        baseline: the row of supervised fine-tuning with the same backbone.
        over_baseline: the difference to it in `DECIDING`; None for that row itself, and where it was not run
            or has no seed in common.
        teacher: the collaborative model that it learned from, sasrec if it learned from none.
        over_teacher: the difference to that one.
    """

    row: str
    seeds: tuple[int, ...]
    metrics: dict[str, Spread | None]
    device: str
    budget: dict[str, float]
    baseline: str
    over_baseline: Paired | None
    teacher: str
    over_teacher: Paired | None

    @property
    def unseen(self) -> bool:
        """Whether its lists lack what a history has."""
        return self.row.endswith(UNSEEN)


@dataclass(frozen=True)
class Table:
    """One data set's lines, in the order to show."""

    dataset: str
    num_users: int
    num_items: int
    lines: list[Line]

    def line(self, row: str) -> Line | None:
        return next((line for line in self.lines if line.row == row), None)

    def best(self, metric: str, unseen: bool = False) -> float | None:
        """The best mean of a metric among the lines that are `unseen`, or among the others."""
        spreads = [line.metrics[metric] for line in self.lines if line.unseen == unseen]
        means = [spread.mean for spread in spreads if spread is not None]
        if not means:
            return None
        return min(means) if metric in LOWER_IS_BETTER else max(means)


@dataclass(frozen=True)
class Verdict:
    """Whether GFlowGR leads supervised fine-tuning on every data set, and the sentence that says so."""

    leads: bool
    sentence: str


def read_tables(results: PathLike = RESULTS, datasets: Sequence[str] = ()) -> list[Table]:
    """The tables of all data sets that a folder holds results of, or of those named, in that order.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no results, a data set without any, a damaged file, or a file in another's folder.
    """
    results = Path(results)
    if not results.is_dir():
        raise FileNotFoundError(f"{results}: no such folder of results; --results names another")
    held = sorted(path.parent.name for path in results.glob("*/*.npz"))
    held = list(dict.fromkeys(held))
    if not held:
        raise ValueError(f"{results} holds no results of any data set; 'gflowgr reproduce' makes them")
    for name in datasets:
        if name not in held:
            raise ValueError(f"no results of data set {name!r} in {results}, there are {', '.join(held)}")
    return [_read_table(results / name) for name in dict.fromkeys(datasets or held)]


def _read_table(folder: Path) -> Table:
    cells = load_cells(folder)
    if cells and cells[0].dataset != folder.name:
        raise ValueError(f"{folder} holds results of {cells[0].dataset}, needs those of {folder.name}")
    return make_table(folder.name, cells)


def make_table(dataset: str, cells: Sequence[Cell]) -> Table:
    """The table of one data set's cells.

    Raises:
        ValueError: a row learned from different teachers, or its seeds had settings of different names.
    """
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row, []).append(cell)
    for row, found in rows.items():
        require_one_protocol(row, found)
    lines = [_line(row, rows) for row in sorted(rows, key=_place)]
    users, items = (cells[0].num_users, cells[0].num_items) if cells else (0, 0)
    return Table(dataset, users, items, lines)


def require_one_protocol(row: str, cells: Sequence[Cell]) -> None:
    """Raises ValueError where a mean would be of what was measured in different ways."""
    first = cells[0]
    for cell in cells:
        names = set(cell.settings) ^ set(first.settings)
        if names:
            raise ValueError(
                f"{cell.dataset}/{row}: seeds {first.seed} and {cell.seed} were not measured alike: one of "
                f"them has no {', '.join(sorted(names))}; remove the older result file and reproduce it"
            )


def _place(row: str) -> tuple[int, int, int, str]:
    """Where a row stands: known ones by backbone and `ORDER`, then variants of GFlowGR, others last."""
    prefix = backbone_of(row)
    name = row[len(prefix) :]
    if name.endswith(UNSEEN):
        return 1, *_place(row.removesuffix(UNSEEN))[1:]
    if name in ORDER:
        return 0, BACKBONES.index(prefix), ORDER.index(name), ""
    if name.startswith(f"{SUBJECT}-"):
        return 0, BACKBONES.index(prefix), len(ORDER), name
    return 2, 0, 0, row


def backbone_of(row: str) -> str:
    """The prefix of a row's name that says its backbone; "" for the small decoder of the full table."""
    return next((prefix for prefix in BACKBONES if prefix and row.startswith(prefix)), "")


def _line(row: str, rows: Mapping[str, list[Cell]]) -> Line:
    cells = rows[row]
    # Such rows stand against one another.
    unseen = UNSEEN if row.endswith(UNSEEN) else ""
    plain = rows.get(row.removesuffix(UNSEEN), cells)
    baseline, teacher = backbone_of(row) + BASELINE + unseen, teacher_of(plain) + unseen
    budget = {name: statistics.fmean(cell.budget[name] for cell in cells) for name in cells[0].budget}
    return Line(
        row,
        tuple(sorted(cell.seed for cell in cells)),
        {metric: _spread([cell.test.get(metric) for cell in cells]) for metric in METRICS},
        ", ".join(sorted({_kind_of(cell.device) for cell in cells})),
        budget,
        baseline,
        _over(row, baseline, rows),
        teacher,
        _over(row, teacher, rows),
    )


def _kind_of(device: str) -> str:
    # Of a processor a cell names the cores as well; which of them it was is in the cell.
    return "CPU" if device.endswith(" cores") or not device else device.removeprefix("NVIDIA ")


def teacher_of(cells: Sequence[Cell]) -> str:
    """The collaborative row that a row's cells are built on, sasrec if there is none.

    Raises:
        ValueError: the seeds of the row differ in it.
    """
    named = {next((name for name in TEACHERS if name in cell.built_on), TEACHER) for cell in cells}
    if len(named) > 1:
        raise ValueError(f"the cells of {cells[0].row} learned from different teachers: {sorted(named)}")
    return named.pop()


def _over(row: str, other: str, rows: Mapping[str, list[Cell]]) -> Paired | None:
    if row == other or other not in rows:
        return None
    return paired_difference(rows[row], rows[other], DECIDING)


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


def verdict(tables: Sequence[Table]) -> Verdict:
    """Whether `gflowgr` leads `sft` in N@10 on each of the tables, in one sentence with the differences.

    It leads where the 95 % paired bootstrap interval of the difference lies above 0. The same log, shorter or
    under another tokenizer, is no further data set, and counts only where there is no other.
    """
    ahead: list[str] = []
    not_ahead: list[str] = []
    for table in [table for table in tables if not _is_derived(table)] or tables:
        line = table.line(SUBJECT)
        if line is not None and line.over_baseline is not None:
            where = f"{table.dataset} ({gain(line.over_baseline)})"
            (ahead if line.over_baseline.leads else not_ahead).append(where)
        else:
            not_ahead.append(f"{table.dataset} ({_missing(table)})")
    question = f"{BASELINE} in N@10 on"
    if not not_ahead:
        return Verdict(True, f"{SUBJECT} leads {question} {listed(ahead)}.")
    if not ahead:
        return Verdict(False, f"{SUBJECT} does not lead {question} {listed(not_ahead)}.")
    return Verdict(
        False, f"{SUBJECT} leads {question} {listed(ahead)}, but does not lead on {listed(not_ahead)}."
    )


def _is_derived(table: Table) -> bool:
    known = DATA_SETS.get(table.dataset)
    return known is not None and bool(known.folder)


def _missing(table: Table) -> str:
    missing = [row for row in (SUBJECT, BASELINE) if table.line(row) is None]
    return f"{' and '.join(missing)} not run" if missing else "no seed that both were run with"


def gain(paired: Paired) -> str:
    """A difference in words: absolute, in per cent of the other's mean, its interval, how many seeds."""
    difference, count = paired.difference, len(paired.seeds)
    share = f" = {signed_percent(difference.mean / paired.base)}" if paired.base else ""
    interval = f"95% interval {signed(difference.low)} to {signed(difference.high)}"
    return f"{signed(difference.mean)}{share}, {interval}, {count} seed{'s' if count > 1 else ''}"
