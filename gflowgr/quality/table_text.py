"""The table of results as it stands in a terminal and in markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gflowgr.folders import write_text
from gflowgr.page import NONE, number, signed
from gflowgr.quality import standings
from gflowgr.quality.pairing import Paired
from gflowgr.quality.results import PathLike
from gflowgr.quality.table import BASELINE, METRICS, TEACHER, Line, Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_ANY_WIDTH = 10_000
_GAP = 2
TITLES = ("R@5", "R@10", "N@5", "N@10", "coverage@10", "gini@10", "diversity@10")
BUDGET = {"steps": "steps", "contexts": "contexts", "seconds": "seconds", "total_seconds": "total seconds"}
NOTE = (
    "Test part; mean ± standard deviation over seeds, the best mean bold. Differences are in "
    "N@10 over the seeds that both rows have, with the 95% paired bootstrap interval over users; t5- and "
    "lora- rows stand against the sft of their kind, and each row against the teacher that it learned from, "
    "sasrec if none is named; rows that end in -unseen, whose lists lack what a history has, stand against "
    "one another. Steps, contexts and seconds (of processor time) are those of one run, total seconds with "
    "all that it is built on; they compare rows of one device alone."
)


@dataclass(frozen=True)
class Entry:
    """What stands in one place of the table."""

    text: str
    best: bool = False


def columns() -> list[str]:
    """The titles, the row's name first."""
    return ["row", "seeds", *TITLES, f"over {BASELINE}", "over teacher", *BUDGET.values(), "device"]


def entries(table: Table, line: Line) -> list[Entry]:
    """What stands under the titles."""
    shown = [Entry(line.row), Entry(str(len(line.seeds)))]
    for metric in METRICS:
        spread = line.metrics[metric]
        if spread is None:
            shown.append(Entry(NONE))
            continue
        deviation = "" if spread.deviation is None else f" ± {number(spread.deviation)}"
        shown.append(Entry(number(spread.mean) + deviation, spread.mean == table.best(metric, line.unseen)))
    named = "" if line.teacher == TEACHER else f" {line.teacher}"
    shown.append(Entry(_difference(line.over_baseline)))
    shown.append(Entry(_difference(line.over_teacher) + (named if line.over_teacher else "")))
    return [*shown, *(Entry(f"{line.budget[name]:,.0f}") for name in BUDGET), Entry(line.device)]


def _difference(paired: Paired | None) -> str:
    if paired is None:
        return NONE
    difference = paired.difference
    return f"{signed(difference.mean)} [{signed(difference.low)}, {signed(difference.high)}]"


def facts(table: Table) -> str:
    return f"{table.dataset}: {table.num_users:,} users, {table.num_items:,} items"


def markdown(table: Table) -> str:
    """The table in markdown, best values in bold."""
    titles = columns()
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for line in table.lines:
        lines.append([f"**{e.text}**" if e.best else e.text for e in entries(table, line)])
    return "\n".join([f"### {facts(table)}", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def markdown_of_all(tables: list[Table]) -> str:
    """All tables in markdown, and what their numbers are."""
    return "\n\n".join([*map(markdown, tables), NOTE])


def blocks(tables: list[Table], results: PathLike) -> dict[str, str]:
    """What stands between the marks of a page: the tables, and two short ones of the data sets among them."""
    shown = {table.dataset for table in tables}
    places = [place for place in standings.places(results) if place.data_set in shown]
    return {
        "table": markdown_of_all(tables),
        "summary": standings.summary(places),
        "standings": standings.standings(places),
    }


def rewrite(page: Path, blocks: Mapping[str, str]) -> None:
    """Puts each block that a page has marks for between them: `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: the page has marks for none of them, one mark of a pair, or one twice.
    """
    text = page.read_text(encoding="utf-8")
    found = False
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        counts = text.count(begin), text.count(end)
        if counts == (0, 0):
            continue
        if counts != (1, 1) or text.index(end) < text.index(begin):
            raise ValueError(f"{page} needs {begin} and {end} once each, in this order")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text, found = f"{before}{begin}\n{block}\n{end}{after}", True
    if not found:
        wanted = ", ".join(f"<!-- {name} -->" for name in blocks)
        raise ValueError(f"{page} has no marks, needs one of {wanted} and its end")
    write_text(page, text)


def show(tables: list[Table], *, as_markdown: bool = False) -> None:
    """Prints the tables and what their numbers are."""
    from rich.console import Console

    if as_markdown:
        print(markdown_of_all(tables) + "\n")
        return
    console = Console(highlight=False)
    for table in tables:
        print(facts(table))
        # What is no terminal has no width, and a file with half a line of numbers helps nobody.
        width = console.width if console.is_terminal else _ANY_WIDTH
        for shown in _fitting(table, width):
            Console(width=width, highlight=False).print(_rich_table(table, shown))
            print()
    print(textwrap.fill(NOTE, min(console.width, 100)))


def _fitting(table: Table, width: int) -> list[list[int]]:
    """The columns but the row's name in groups, each with the name before it no wider than that."""
    texts = [columns(), *([entry.text for entry in entries(table, line)] for line in table.lines)]
    widths = [_GAP + max(map(len, column)) for column in zip(*texts, strict=True)]
    groups: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        taken = widths[0] + sum(widths[other] for other in groups[-1])
        if groups[-1] and taken + widths[column] > width:
            groups.append([])
        groups[-1].append(column)
    return groups


def _rich_table(table: Table, shown: list[int]) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    titles = columns()
    built = RichTable(box=SIMPLE_HEAD, padding=(0, _GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    built.add_column(titles[0], no_wrap=True)
    for column in shown:
        built.add_column(titles[column], justify="right", no_wrap=True)
    for line in table.lines:
        row = entries(table, line)
        picked = [row[0], *(row[column] for column in shown)]
        built.add_row(*(Text(entry.text, style="bold" if entry.best else "") for entry in picked))
    return built
