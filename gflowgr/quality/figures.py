"""Figures of the table: accuracy and coverage of its rows, and what each part of the paper's form gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gflowgr.adaptive import WeightSchedule
from gflowgr.folders import write_text
from gflowgr.page import ACCENT, GREY, PLAIN, axes_side_by_side, blank_axes, metric_name, name_rows, svg
from gflowgr.quality.pairing import paired_difference
from gflowgr.quality.results import SCHEDULES, Cell, load_cells
from gflowgr.quality.table import DECIDING, SUBJECT, Spread, Table
from gflowgr.report import chart_svg

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
SHOWN = (DECIDING, "coverage@10")


def write_figures(tables: Sequence[Table], results: Path, folder: Path) -> list[Path]:
    """Writes `quality-<dataset>.svg`, and where there are ablations or samplers that adapt,
    `ablations-<dataset>.svg` and `schedule-<dataset>-<row>-<seed>.svg`."""
    written = []
    for table in tables:
        cells = load_cells(results / table.dataset)
        figures = {"quality": overview(table), "ablations": ablations(table.dataset, cells)}
        for kind, figure in figures.items():
            if figure is not None:
                path = folder / f"{kind}-{table.dataset}.svg"
                path.write_bytes(svg(figure))
                written.append(path)
        for cell in cells:
            schedule = results / table.dataset / SCHEDULES / f"{cell.name}.json"
            if schedule.is_file():
                path = folder / f"schedule-{table.dataset}-{cell.name}.svg"
                write_text(path, chart_svg(WeightSchedule.load(schedule).chart()))
                written.append(path)
    return written


def overview(table: Table) -> Figure:
    """NDCG@10 and coverage@10 of every row but the ablations, means and deviations over seeds, best first."""
    lines = [line for line in table.lines if not line.row.startswith("gflowgr-tb-") and not line.unseen]
    lines = [line for line in lines if line.metrics[DECIDING] is not None]
    lines.sort(key=lambda line: -_mean(line.metrics[DECIDING]))
    figure, row = axes_side_by_side(8.0, 0.6 + 0.23 * len(lines), len(SHOWN))
    for axes, metric in zip(row, SHOWN, strict=True):
        for place, line in enumerate(lines):
            spread = line.metrics[metric]
            if spread is None:
                continue
            colour = ACCENT if line.row == SUBJECT else PLAIN if SUBJECT in line.row else GREY
            axes.errorbar(
                spread.mean, place, xerr=spread.deviation or 0.0, fmt="o", color=colour, markersize=5
            )
        axes.grid(axis="x", color="#eceef1")
        axes.set_xlabel(f"test {metric_name(metric)}, {table.dataset}")
        axes.set_xlim(left=0)
    name_rows(row[0], [line.row for line in lines])
    for axes in row[1:]:
        axes.tick_params(axis="y", length=0)
        axes.set_axisbelow(True)
    return figure


def _mean(spread: Spread | None) -> float:
    assert spread is not None
    return spread.mean


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
