"""What a reader asks first, how GFlowGR stands on each data set: tables of markdown made from the cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gflowgr.page import NONE, number, signed, signed_percent
from gflowgr.quality.pairing import mean_over_seeds, paired_difference
from gflowgr.quality.results import TOGETHER, UNSEEN, Cell, PathLike, load_cells
from gflowgr.quality.table import BASELINE, SUBJECT, TEACHER, teacher_of

LENGTHS = {"": "", "-longer": ", twice the steps", "-longest": ", four times the steps"}
LISTS = {"": "", UNSEEN: ", without the history"}
METRICS = {"ndcg@10": "N@10", "recall@10": "R@10"}
NEIGHBOURS = "item-knn"
NOT_RUN = "GFlowGR was not run."
SUMMARY_NOTE = (
    "NDCG@10 (Recall@10) on the test part, means over the seeds that all of a line have; the best of a whole "
    "line bold. SFT is supervised fine-tuning, with as many steps as GFlowGR; the teacher is what GFlowGR "
    "learned from, SASRec with item neighbours."
)
STANDINGS_NOTE = (
    "Differences over the seeds that both have, with the 95 % paired bootstrap interval over users; bold "
    "where it excludes 0."
)


@dataclass(frozen=True)
class Place:
    """Where GFlowGR was run: a data set, a number of steps, and lists with or without the history."""

    data_set: str
    length: str
    lists: str
    rows: Mapping[str, Sequence[Cell]]

    @property
    def name(self) -> str:
        return f"`{self.data_set}`{LENGTHS[self.length]}{LISTS[self.lists]}"

    def cells(self, row: str) -> Sequence[Cell]:
        return self.rows.get(row + self.lists, [])

    @property
    def alone(self) -> Sequence[Cell]:
        return self.cells(SUBJECT + self.length)

    @property
    def together(self) -> Sequence[Cell]:
        return self.cells(SUBJECT + self.length + TOGETHER)

    @property
    def teacher(self) -> Sequence[Cell]:
        """What the model learned from."""
        return self.cells(teacher_of(self.rows.get(SUBJECT + self.length, self.alone)))

    @property
    def others(self) -> dict[str, Sequence[Cell]]:
        """What the model alone stands against, by title."""
        return {
            "SFT": self.cells(BASELINE + self.length),
            "SASRec": self.cells(TEACHER),
            "item kNN": self.cells(NEIGHBOURS),
            "its teacher": self.teacher,
        }

    @property
    def others_together(self) -> dict[str, Sequence[Cell]]:
        """What model and teacher together stand against."""
        return {
            "SFT": self.cells(BASELINE + self.length),
            "its teacher": self.teacher,
            "SFT with the same teacher": self.cells(BASELINE + self.length + TOGETHER),
            "itself alone": self.alone,
        }


def places(results: PathLike) -> list[Place]:
    """All that a folder of results has of GFlowGR, lists without the history last.

    Raises:
        ValueError: a damaged file.
    """
    folders = sorted({path.parent for path in Path(results).glob("*/*.npz")})
    return sorted(_places(folders), key=lambda place: place.lists)


def _places(folders: Sequence[Path]) -> Iterator[Place]:
    for folder in folders:
        rows: dict[str, list[Cell]] = {}
        for cell in load_cells(folder):
            rows.setdefault(cell.row, []).append(cell)
        for length in LENGTHS:
            for lists in LISTS:
                place = Place(folder.name, length, lists, rows)
                if place.alone:
                    yield place


def summary(all_places: Sequence[Place]) -> str:
    """Means of what matters most, a line for each data set and number of steps."""
    lines = []
    for place in all_places:
        if place.lists:
            continue
        columns = {
            "SFT": place.others["SFT"],
            "SASRec": place.others["SASRec"],
            "the teacher": place.teacher,
            "GFlowGR alone": place.alone,
            "SFT with the teacher": place.others_together["SFT with the same teacher"],
            "GFlowGR with its teacher": place.together,
        }
        seeds = {cell.seed for cell in place.alone}
        for cells in columns.values():
            # A row without any of them is left out of the line.
            seeds = seeds & {cell.seed for cell in cells} or seeds
        means = {title: _means(cells, sorted(seeds)) for title, cells in columns.items()}
        found = [mean for mean in means.values() if mean is not None]
        best = max(found) if len(found) == len(means) else None
        shown = [_mean_cell(mean, best) for mean in means.values()]
        line = {"data set": place.name, "seeds": str(len(seeds))}
        lines.append(line | dict(zip(means, shown, strict=True)))
    return f"{_markdown(lines)}\n\n{SUMMARY_NOTE}" if lines else NOT_RUN


def standings(all_places: Sequence[Place]) -> str:
    """Differences: of the model alone, and with its teacher beside it, to what each stands against."""
    parts = []
    for metric, title in METRICS.items():
        alone = [_differences(p.name, p.alone, p.others, metric) for p in all_places]
        together = [
            _differences(p.name, p.together, p.others_together, metric) for p in all_places if p.together
        ]
        for heading, lines in (("GFlowGR alone", alone), ("GFlowGR with its teacher", together)):
            if lines:
                parts.append(f"**{heading}, {title} over …**\n\n{_markdown(lines)}")
    return "\n\n".join([*parts, STANDINGS_NOTE]) if parts else NOT_RUN


def _means(cells: Sequence[Cell], seeds: Sequence[int]) -> tuple[float, float] | None:
    if not {cell.seed for cell in cells}.intersection(seeds):
        return None
    first, second = (float(mean_over_seeds(cells, metric, seeds).mean()) for metric in METRICS)
    return first, second


def _mean_cell(found: tuple[float, float] | None, best: tuple[float, float] | None) -> str:
    if found is None:
        return NONE
    text = f"{number(found[0])} ({number(found[1])})"
    return f"**{text}**" if found == best else text


def _differences(
    name: str, ours: Sequence[Cell], others: Mapping[str, Sequence[Cell]], metric: str
) -> dict[str, str]:
    """A line: ours minus each other, of SFT with the share of its mean as well."""
    line = {"data set": name}
    for title, cells in others.items():
        paired = paired_difference(ours, cells, metric)
        if paired is None:
            line[title] = NONE
            continue
        found = paired.difference
        mean = signed(found.mean)
        if found.low > 0 or found.high < 0:
            mean = f"**{mean}**"
        share = f" ({signed_percent(found.mean / paired.base)})" if title == "SFT" and paired.base else ""
        line[title] = f"{mean}{share} [{signed(found.low)}, {signed(found.high)}]"
    return line


def _markdown(lines: Sequence[Mapping[str, str]]) -> str:
    titles = list(lines[0])
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *([line[t] for t in titles] for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
