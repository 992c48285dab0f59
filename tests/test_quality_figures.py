from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from quality_fixtures import USERS, cell_of

from gflowgr.adaptive import WeightSchedule
from gflowgr.quality.figures import ABLATIONS, ablations, overview, write_figures
from gflowgr.quality.results import SCHEDULES
from gflowgr.quality.rows import ROWS
from gflowgr.quality.table import make_table, read_tables


def test_every_ablation_is_a_row() -> None:
    assert all(row in ROWS for rows in ABLATIONS.values() for row in rows)


def test_rows_lie_at_their_accuracy_and_coverage_the_best_on_top() -> None:
    cells = [cell_of("sft", 3, 0.6), cell_of("gflowgr", 1, 0.4), cell_of("gflowgr-tb-n1", 2)]
    accuracy, coverage = overview(make_table("toys", cells)).axes
    assert [label.get_text() for label in accuracy.get_yticklabels()] == ["gflowgr", "sft"]
    assert accuracy.get_ylim()[0] > accuracy.get_ylim()[1]

    def points(axes: Axes) -> list[tuple[float, float]]:
        lines = [line for line in axes.lines if line.get_marker() == "o"]
        return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]

    gains = [(USERS - 1) / USERS / np.log2(1.0 + rank) for rank in (1, 3)]
    assert points(accuracy) == [(pytest.approx(gains[0]), 0), (pytest.approx(gains[1]), 1)]
    assert points(coverage) == [(0.4, 0), (0.6, 1)]


def test_ablations_are_differences_to_continued_fine_tuning() -> None:
    cells = [cell_of("sft-continued", 3), cell_of("gflowgr-tb", 1), cell_of("gflowgr-tb-n1", 7)]
    figure = ablations("toys", cells)
    assert figure is not None
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["trajectories: tb-n1", "trajectories: tb"]
    middles = [line.get_xdata() for line in axes.lines if line.get_marker() == "o"]
    shares = [(USERS - 1) / USERS * (1 / np.log2(1 + rank) - 0.5) for rank in (7, 1)]
    assert [float(np.asarray(middle).ravel()[0]) for middle in middles[:2]] == pytest.approx(shares)


def test_nothing_is_drawn_of_ablations_that_were_not_run() -> None:
    assert ablations("toys", [cell_of("sft-continued", 3), cell_of("gflowgr-tb", 1)]) is None
    assert ablations("toys", [cell_of("gflowgr-tb-n1", 3), cell_of("gflowgr-tb", 1)]) is None


def test_the_files_are_the_same_for_the_same_results(tmp_path: Path) -> None:
    for row, rank in (("sft", 3), ("sft-continued", 4), ("gflowgr-tb", 1), ("gflowgr-tb-adaptive", 2)):
        cell_of(row, rank).save(tmp_path / "results" / "toys")
    schedule = tmp_path / "results" / "toys" / SCHEDULES / "gflowgr-tb-adaptive-0.json"
    schedule.parent.mkdir()
    for kept in (schedule, schedule.with_name("of-no-cell-0.json")):
        WeightSchedule(["policy", "random"], [[0.5, 0.5], [0.4, 0.6]]).save(kept)
    tables = read_tables(tmp_path / "results")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        written = write_figures(tables, tmp_path / "results", folder)
        names = ["quality-toys.svg", "ablations-toys.svg", "schedule-toys-gflowgr-tb-adaptive-0.svg"]
        assert [path.name for path in written] == names
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
        assert ElementTree.fromstring(path.read_bytes()).tag.endswith("svg")
