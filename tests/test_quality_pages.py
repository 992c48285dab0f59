"""The tables that pages show between their marks, and that the committed pages show the committed results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from quality_fixtures import USERS, cell_of

from gflowgr import cli
from gflowgr.page import NONE, number, signed, signed_percent
from gflowgr.quality.results import Cell, save_users
from gflowgr.quality.standings import NOT_RUN, places, standings, summary
from gflowgr.quality.table import make_table, read_tables
from gflowgr.quality.table_text import NOTE, blocks, markdown, markdown_of_all, rewrite

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": ["summary"], "docs/recipe.md": ["summary"], "docs/results.md": ["table", "standings"]}


# Each row: its seeds, with the target's place and how many users miss theirs.
RESULTS = {
    "sft": {0: (5, 10), 1: (6, 12), 2: (1, 0)},
    "sasrec": {0: (4, 8), 1: (4, 9)},
    "mixture": {0: (3, 5), 1: (3, 6)},
    "gflowgr": {0: (3, 6), 1: (4, 6), 3: (1, 0)},
    "sft-ensemble": {0: (2, 5), 1: (3, 4)},
    "gflowgr-ensemble": {0: (2, 3), 1: (2, 2)},
    "sft-longer": {0: (5, 9)},
    "gflowgr-longer": {0: (2, 4)},
    "gflowgr-longer-ensemble": {0: (1, 4)},
    "gflowgr-unseen": {0: (2, 5)},
    "sft-unseen": {0: (3, 9)},
    "mixture-unseen": {0: (1, 5)},
}


def ndcg(row: str, *seeds: int) -> float:
    return float(np.mean([(USERS - missed) / USERS / np.log2(1 + rank) for rank, missed in _of(row, seeds)]))


def recall(row: str, *seeds: int) -> float:
    return float(np.mean([(USERS - missed) / USERS for _, missed in _of(row, seeds)]))


def _of(row: str, seeds: Sequence[int]) -> list[tuple[int, int]]:
    return [RESULTS[row][seed] for seed in seeds]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of results."""
    return _saved(
        tmp_path,
        [
            cell_of(row, rank, seed=seed, missed=missed)
            for row, seeds in RESULTS.items()
            for seed, (rank, missed) in seeds.items()
        ],
    )


def _saved(folder: Path, cells: Sequence[Cell]) -> Path:
    for cell in cells:
        cell.save(folder / "toys")
    save_users(folder / "toys", np.ones(USERS, np.int64), np.ones(USERS, np.int64))
    return folder


def _rows(markdown: str) -> list[list[str]]:
    lines = [line.strip("| ") for line in markdown.splitlines() if line.startswith("|")]
    return [line.split(" | ") for line in lines if not line.startswith("---")]


def test_the_summary_has_means_over_the_seeds_in_common(folder: Path) -> None:
    titles, base, longer = _rows(summary(places(folder)))
    assert titles == [
        *("data set", "seeds", "SFT", "SASRec", "the teacher", "GFlowGR alone"),
        *("SFT with the teacher", "GFlowGR with its teacher"),
    ]

    def shown(row: str, *seeds: int) -> str:
        return f"{number(ndcg(row, *seeds))} ({number(recall(row, *seeds))})"

    rows = ["sft", "sasrec", "mixture", "gflowgr", "sft-ensemble", "gflowgr-ensemble"]
    means = [shown(row, 0, 1) for row in rows]
    assert base == ["`toys`", "2", *means[:-1], f"**{means[-1]}**"]
    # Nothing is the best of a line that lacks a row.
    rows = ["sft-longer", "sasrec", "mixture", "gflowgr-longer", "gflowgr-longer-ensemble"]
    means = [shown(row, 0) for row in rows]
    assert longer == ["`toys`, twice the steps", "1", *means[:-1], NONE, means[-1]]


def test_the_standings_have_differences_with_intervals(folder: Path) -> None:
    measures = {"N@10": ndcg, "R@10": recall}
    parts = re.split(r"\*\*(GFlowGR .*?), (.@10) over …\*\*", standings(places(folder)))[1:]
    found = {(who, metric): _rows(table) for who, metric, table in zip(*[iter(parts)] * 3, strict=True)}
    assert list(found) == [
        (who, metric) for metric in measures for who in ("GFlowGR alone", "GFlowGR with its teacher")
    ]

    def begins(cell: str, metric: str, row: str, other: str, *seeds: int) -> None:
        mine, theirs = (measures[metric](name, *seeds) for name in (row, other))
        mean = signed(mine - theirs)
        assert cell.replace("*", "").startswith(mean + " "), (metric, row, other)
        low, high = (float(end) for end in re.findall(r"[-+]\.\d+", cell.replace("\N{MINUS SIGN}", "-"))[-2:])
        assert low <= mine - theirs <= high and ("**" in cell) == (low > 0 or high < 0), (metric, row, other)
        if other.startswith("sft") and not other.startswith("sft-ensemble"):
            assert f"({signed_percent((mine - theirs) / theirs)})" in cell

    for metric in measures:
        titles, base, longer, unseen = found["GFlowGR alone", metric]
        assert titles == ["data set", "SFT", "SASRec", "item kNN", "its teacher"]
        assert base[0] == "`toys`" and base[3] == NONE
        begins(base[1], metric, "gflowgr", "sft", 0, 1)
        begins(base[2], metric, "gflowgr", "sasrec", 0, 1)
        begins(base[4], metric, "gflowgr", "mixture", 0, 1)
        assert longer[0] == "`toys`, twice the steps"
        begins(longer[1], metric, "gflowgr-longer", "sft-longer", 0)
        begins(longer[4], metric, "gflowgr-longer", "mixture", 0)
        assert unseen[0] == "`toys`, without the history" and unseen[2] == NONE
        begins(unseen[1], metric, "gflowgr-unseen", "sft-unseen", 0)
        begins(unseen[4], metric, "gflowgr-unseen", "mixture-unseen", 0)
        titles, base, longer = found["GFlowGR with its teacher", metric]
        assert titles == ["data set", "SFT", "its teacher", "SFT with the same teacher", "itself alone"]
        begins(base[1], metric, "gflowgr-ensemble", "sft", 0, 1)
        begins(base[2], metric, "gflowgr-ensemble", "mixture", 0, 1)
        begins(base[3], metric, "gflowgr-ensemble", "sft-ensemble", 0, 1)
        begins(base[4], metric, "gflowgr-ensemble", "gflowgr", 0, 1)
        begins(longer[1], metric, "gflowgr-longer-ensemble", "sft-longer", 0)
        assert longer[3] == NONE
        begins(longer[4], metric, "gflowgr-longer-ensemble", "gflowgr-longer", 0)


@pytest.mark.parametrize("rows", [["sft"], ["sft", "gflowgr-unseen"]])
def test_without_the_model_there_is_no_summary(tmp_path: Path, rows: list[str]) -> None:
    results = _saved(tmp_path, [cell_of(row, 3) for row in rows])
    found = blocks(read_tables(results), results)
    assert found["summary"] == NOT_RUN
    assert (found["standings"] == NOT_RUN) == (rows == ["sft"])


def test_a_page_gets_what_it_has_marks_for(tmp_path: Path) -> None:
    table = make_table("toys", [cell_of("sft", 3), cell_of("gflowgr", 1)])
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    given = {"summary": "short", "table": markdown_of_all([table])}
    for _ in range(2):
        rewrite(page, given)
        assert page.read_text() == (
            f"before\n<!-- table -->\n{markdown(table)}\n\n{NOTE}\n<!-- /table -->\nafter\n"
        )
    page.write_text("<!-- summary -->\n<!-- /summary -->\n<!-- table --><!-- /table -->")
    rewrite(page, {"summary": "short", "table": "long"})
    assert page.read_text() == (
        "<!-- summary -->\nshort\n<!-- /summary -->\n<!-- table -->\nlong\n<!-- /table -->"
    )


def test_the_command_fills_each_page_that_it_is_given(folder: Path, tmp_path: Path) -> None:
    pages = [tmp_path / "short.md", tmp_path / "long.md"]
    pages[0].write_text("<!-- summary -->\n<!-- /summary -->\n")
    pages[1].write_text("<!-- table -->\n<!-- /table -->\n<!-- standings -->\n<!-- /standings -->\n")
    assert cli.main(["table", "--results", str(folder), "--page", *map(str, pages)]) == 0
    now = blocks(read_tables(folder), folder)
    assert now["summary"] in pages[0].read_text() and "### toys" not in pages[0].read_text()
    assert now["table"] in pages[1].read_text() and now["standings"] in pages[1].read_text()


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table -->",
        "<!-- /table -->",
        "<!-- /table --> <!-- table -->",
        "<!-- table --> <!-- /table --> <!-- table --> <!-- /table -->",
    ],
)
def test_a_mark_needs_its_other(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="once each, in this order"):
        rewrite(page, {"table": "long"})
    assert page.read_text() == text


def test_a_page_without_marks_is_told_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no marks, needs one of <!-- table --> and its end"):
        rewrite(page, {"table": "long"})


def test_the_committed_pages_show_the_committed_results(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results" / "quality"
    now = blocks(read_tables(results), results)
    for name, shown in PAGES.items():
        copy = tmp_path / "page.md"
        copy.write_text((ROOT / name).read_text())
        rewrite(copy, {block: now[block] for block in shown})
        assert all(f"<!-- {block} -->" in copy.read_text() for block in shown)
        assert copy.read_text() == (ROOT / name).read_text(), f"{name}: gflowgr table --page {name}"
