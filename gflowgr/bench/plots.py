"""`gflowgr bench --plot`: the README's table and the figures of docs/, made from the table of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from gflowgr.bench.figures import catalogue_figure, drawn_in_rows, memory_figure, speed_figure, svg
from gflowgr.bench.results import SWEPT, Result, read_results

TABLE = Path("benchmarks", "results", "ops.csv")
README = Path("README.md")
SPEED, CATALOGUE, MEMORY = (Path("docs", f"bench-{what}.svg") for what in ("speed", "catalogue", "memory"))
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
NONE = "\N{EN DASH}"


def readme_table(results: Sequence[Result]) -> str:
    """The README's block: a table for each device, and the figures."""
    shown = headline(results)
    shown.sort(key=lambda each: each.device)
    blocks = [
        _device_table(device, list(group)) for device, group in groupby(shown, key=lambda each: each.device)
    ]
    if not results:
        return f"`{TABLE.as_posix()}` has no rows yet."
    return "\n\n".join([*blocks, *(f"![{words}]({path.as_posix()})" for path, words in _shown(results))])


def headline(results: Sequence[Result]) -> list[Result]:
    """What a newcomer compares: whole steps where there are any, in settings that no option changed."""
    stepped = {(each.op, each.config) for each in results if each.direction == "forward+backward"}
    return [
        each
        for each in results
        if (":" not in each.config or each.op == "trie_build")
        and (each.direction == "forward+backward" or (each.op, each.config) not in stepped)
    ]


def _shown(results: Sequence[Result]) -> list[tuple[Path, str]]:
    """The figures that there are results for, and what each shows."""
    figures = []
    if drawn_in_rows(results):
        figures += [(SPEED, "Speed beside others, for each configuration"), (MEMORY, "Peak memory of a call")]
    if any(SWEPT in each.config for each in results):
        figures.append((CATALOGUE, "Cost of a call against the size of the catalogue"))
    return figures


def _device_table(device: str, results: Sequence[Result]) -> str:
    last = max(results, key=lambda each: each.own["date"]).own
    where = "1 thread, " if last["device"] == "cpu" else ""
    lines = [
        f"{device}; {where}torch {last['torch']}, the last run on {last['date'][:10]}:",
        "",
        "| op | configuration | dtype | pass | ms (p20 .. p80) | times faster than the definition "
        "| than dense mask | than the best other baseline |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for each in results:
        own, rival = each.own, each.rival
        times = f"{_number(own['median_ms'])} ({_number(own['p20_ms'])} .. {_number(own['p80_ms'])})"
        definition = _times(each.ratio("reference")) if "reference" in each.rows else NONE
        dense = _times(each.ratio(each.dense)) if each.dense else NONE
        best = f"{_times(each.ratio(rival))} (`{rival}`)" if rival else NONE
        lines.append(
            f"| `{each.op}` | {each.config} | {each.dtype} | {each.direction} | {times} "
            f"| {definition} | {dense} | {best} |"
        )
    return "\n".join(lines)


def _number(text: str) -> str:
    return f"{float(f'{float(text):.2g}'):g}"


def _times(ratio: float) -> str:
    return f"{float(f'{ratio:.2g}'):g}"


def _replaced(readme: str, block: str) -> str:
    """The README with `block` between the two comments.

    Raises:
        ValueError: the comments are not there, once each and in this order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"plot needs a README with the lines {BEGIN} and {END}, once each, in this order")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def disagreement(checkout: Path) -> str | None:
    """What is wrong when the README's table is not the one that the results give; None when it is.

    Raises:
        ValueError: the checkout lacks the table of results or the place for it.
    """
    readme = _readme(checkout)
    results = read_results(checkout / TABLE)
    if readme != _replaced(readme, readme_table(results)):
        return f"{README} does not show the results of {TABLE}; 'gflowgr bench --plot' makes its table anew"
    missing = [path.as_posix() for path, _ in _shown(results) if not (checkout / path).is_file()]
    return f"{', '.join(missing)} is missing; 'gflowgr bench --plot' draws it" if missing else None


def _readme(checkout: Path) -> str:
    path = checkout / README
    if not path.is_file():
        raise ValueError(f"plot needs a checkout with a {README}, and {str(checkout)!r} has none")
    return path.read_text(encoding="utf-8")


def plot(checkout: Path, write: Callable[[str], None] = print) -> list[Path]:
    """Writes the README's table and the figures that there are results for; which files it wrote.

    Raises:
        ValueError: the checkout lacks the table of results or the place for it.
    """
    from gflowgr.folders import write_text

    results = read_results(checkout / TABLE)
    texts = {checkout / README: _replaced(_readme(checkout), readme_table(results))}
    shown = headline(results)
    for path, figure in (
        (SPEED, speed_figure(shown)),
        (CATALOGUE, catalogue_figure(results)),
        (MEMORY, memory_figure(shown)),
    ):
        if figure is not None:
            texts[checkout / path] = svg(figure)
    for path, text in texts.items():
        write_text(path, text)
        write(f"wrote {path}")
    return list(texts)
