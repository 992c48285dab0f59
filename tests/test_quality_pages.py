"""The tables that pages show between their marks, and that the committed pages show the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from quality_fixtures import USERS, cell_of

from gflowgr.page import NONE
from gflowgr.quality.results import Cell, save_users
from gflowgr.quality.standings import places, standings, summary
from gflowgr.quality.table import make_table, read_tables
from gflowgr.quality.table_text import NOTE, blocks, markdown, markdown_of_all, rewrite

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/recipe.md", "docs/results.md")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of results: GFlowGR leads SFT, its teacher leads both, and with it GFlowGR leads all."""
    places = {"sft": 3, "mixture": 1, "gflowgr": 2, "sft-ensemble": 2, "gflowgr-ensemble": 1, "sasrec": 4}
    return _saved(
        tmp_path,
        [
            *(cell_of(row, rank) for row, rank in places.items()),
            cell_of("gflowgr", 4, seed=1),
            cell_of("gflowgr-longer", 1),
            cell_of("gflowgr-unseen", 1),
            cell_of("sft-unseen", 2),
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
    assert titles[2:] == [
        "SFT", "SASRec", "the teacher", "GFlowGR alone", "SFT with the teacher", "GFlowGR with its teacher"
    ]  # fmt: skip
    share = (USERS - 1) / USERS
    gain = {rank: share / np.log2(1 + rank) for rank in (1, 2, 3, 4)}
    alone = (gain[2] + gain[4]) / 2

    def shown(ndcg: float, best: bool = False) -> str:
        text = f"{ndcg:.4f} ({share:.4f})".replace("0.", ".")
        return f"**{text}**" if best else text

    assert base[:2] == ["`toys`", "2"]
    assert base[2:] == [
        shown(gain[3]),
        shown(gain[4]),
        shown(gain[1], best=True),
        shown(alone),
        shown(gain[2]),
        shown(gain[1], best=True),
    ]
    assert longer[:3] == ["`toys`, twice the steps", "1", NONE]
    assert longer[4:] == [shown(gain[1], best=True), shown(gain[1], best=True), NONE, NONE]


def test_the_standings_have_differences_with_intervals(folder: Path) -> None:
    text = standings(places(folder))
    alone, together, *_ = text.split("**GFlowGR with its teacher, N@10 over …**")
    titles, base, longer, unseen = _rows(alone)
    assert titles == ["data set", "SFT", "SASRec", "item kNN", "its teacher"]
    share = (USERS - 1) / USERS
    # Seed 1 was run by GFlowGR alone.
    over_sft = share * (1 / np.log2(3) - 1 / np.log2(4))
    assert base[1].startswith(f"**+{over_sft:.4f}**".replace("0.", ".") + " (+26.2%) [+.")
    assert base[3] == NONE and base[4].startswith("**\N{MINUS SIGN}.")
    assert longer[0] == "`toys`, twice the steps" and longer[1] == NONE
    # The mean over users and nobody's interval: the teacher has every target at the same place.
    assert longer[4] == "+.0000 [+.0000, +.0000]"
    assert unseen[0] == "`toys`, without the history" and unseen[1].startswith("**+.")
    assert _rows(together.partition("R@10")[0])[1][2] == "+.0000 [+.0000, +.0000]"


def test_a_folder_without_gflowgr_has_the_tables_alone(tmp_path: Path) -> None:
    results = _saved(tmp_path, [cell_of("sft", 3)])
    assert list(blocks(read_tables(results), results)) == ["table"]


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


@pytest.mark.parametrize("text", ["<!-- table -->", "<!-- /table -->", "<!-- /table --> <!-- table -->"])
def test_a_mark_needs_its_other(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="needs both, in this order"):
        rewrite(page, {"table": "long"})
    assert page.read_text() == text


def test_a_page_without_marks_is_told_so(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no marks, needs <!-- table -->"):
        rewrite(page, {"table": "long"})


def test_the_committed_pages_show_the_committed_results(tmp_path: Path) -> None:
    results = ROOT / "benchmarks" / "results" / "quality"
    now = blocks(read_tables(results), results)
    for number, name in enumerate(PAGES):
        copy = tmp_path / f"{number}.md"
        copy.write_text((ROOT / name).read_text())
        rewrite(copy, now)
        assert copy.read_text() == (ROOT / name).read_text(), f"{name}: gflowgr table --page {name}"
