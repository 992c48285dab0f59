"""Figures of the table: accuracy against coverage, and what each part of the paper's recipe is worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gflowgr.page import ACCENT, GREY, PLAIN, blank_axes, name_rows, svg
from gflowgr.quality.pairing import paired_difference
from gflowgr.quality.results import Cell, load_cells
from gflowgr.quality.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is varied, and the rows that show it; "gflowgr-tb" is the paper's own choice in each group.
ABLATIONS = {
    "trajectories": ("gflowgr-tb-n1", "gflowgr-tb", "gflowgr-tb-n5"),
    "weight of the loss": (
        "gflowgr-tb-lambda0.02",
        "gflowgr-tb-lambda0.1",
        "gflowgr-tb",
        "gflowgr-tb-lambda10",
    ),
    "reward": (
        "gflowgr-tb",
        "gflowgr-tb-no-interaction",
        "gflowgr-tb-no-collaborative",
        "gflowgr-tb-no-similarity",
    ),
    "sampler": ("gflowgr-tb", "gflowgr-tb-random", "gflowgr-tb-adaptive"),
    "fusion": ("gflowgr-tb", "gflowgr-tb-weights", "gflowgr-tb-mlp"),
    "objective": ("gflowgr-tb", "gflowgr-db", "gflowgr-subtb", "gflowgr-vargrad"),
}
CONTROL = "sft-continued"


def write_figures(tables: Sequence[Table], results: Path, folder: Path) -> list[Path]:
    """Writes `quality-<dataset>.svg`, and `ablations-<dataset>.svg` where there are ablations."""
    written = []
    for table in tables:
        cells = load_cells(results / table.dataset)
        figures = {"quality": trade_off(table), "ablations": ablations(table.dataset, cells)}
        for kind, figure in figures.items():
            if figure is not None:
                path = folder / f"{kind}-{table.dataset}.svg"
                path.write_bytes(svg(figure))
                written.append(path)
    return written


def trade_off(table: Table) -> Figure:
    """Every row by coverage@10 and NDCG@10, means over its seeds."""
    figure, axes = blank_axes(8.0, 5.0)
    for line in table.lines:
        accuracy, coverage = line.metrics["ndcg@10"], line.metrics["coverage@10"]
        if line.row.startswith("gflowgr-tb-") or accuracy is None or coverage is None:
            continue
        colour = ACCENT if line.row == "gflowgr" else PLAIN if line.row.startswith("gflowgr") else GREY
        axes.plot(coverage.mean, accuracy.mean, "o", color=colour, markersize=6)
        axes.annotate(
            line.row,
            (coverage.mean, accuracy.mean),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
            color=colour,
        )
    axes.set_xlabel("coverage@10: share of the catalogue in anyone's list")
    axes.set_ylabel(f"test NDCG@10, {table.dataset}")
    return figure


def ablations(data_set: str, cells: Sequence[Cell]) -> Figure | None:
    """NDCG@10 of each variant minus that of continued supervised fine-tuning, with 95 % intervals."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.row, []).append(cell)
    shown = [(group, row) for group, names in ABLATIONS.items() for row in names if row in rows]
    if CONTROL not in rows or len({row for _, row in shown}) < 2:
        return None
    figure, axes = blank_axes(8.0, 0.5 + 0.27 * len(shown))
    for place, (_, row) in enumerate(shown):
        paired = paired_difference(rows[row], rows[CONTROL], "ndcg@10")
        if paired is None:
            continue
        difference = paired.difference
        colour = ACCENT if row == "gflowgr-tb" else PLAIN
        axes.plot([difference.low, difference.high], [place, place], color=colour, linewidth=1.5)
        axes.plot(difference.mean, place, "o", color=colour, markersize=5)
    axes.axvline(0, color=GREY, linewidth=0.8)
    name_rows(axes, [f"{group}: {row.removeprefix('gflowgr-')}" for group, row in shown])
    axes.set_xlabel(f"test NDCG@10 over {CONTROL}, {data_set}")
    return figure
