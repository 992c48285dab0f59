"""The figures of docs/, drawn from the results."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from gflowgr.bench.results import SWEPT, Result
from gflowgr.bench.table import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def svg(figure: Figure) -> str:
    """A figure as the text of an SVG file."""
    import matplotlib

    stream = io.StringIO()
    # Without a date and with a salt of ours, the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "gflowgr"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    return stream.getvalue()


def drawn_in_rows(results: Iterable[Result]) -> list[Result]:
    """Of each setting, the pass that goes furthest; the sweep and the trie's construction aside."""
    chosen: dict[tuple[str, ...], Result] = {}
    for each in results:
        if SWEPT not in each.config and each.op != "trie_build":
            key = (each.op, each.config, each.dtype, each.device)
            if key not in chosen or each.direction == "forward+backward":
                chosen[key] = each
    return [each for each in chosen.values() if len(each.rows) > 1]


def _name(each: Result, devices: int) -> str:
    where = f", {each.device}" if devices > 1 else ""
    return f"{each.op}, configuration {each.config}, {each.dtype}{where}"


def speed_figure(results: Iterable[Result]) -> Figure | None:
    """How many times longer others take than the op, for each configuration."""
    chosen = drawn_in_rows(results)
    kinds: dict[str, Callable[[Result], str | None]] = {
        "definition in plain PyTorch": lambda each: "reference" if "reference" in each.rows else None,
        "dense mask": lambda each: each.dense,
        "best other baseline": lambda each: each.rival,
    }
    points = {
        label: {row: each.ratio(name) for row, each in enumerate(chosen) if (name := pick(each)) is not None}
        for label, pick in kinds.items()
    }
    return _dots(
        chosen, points, "their time over the op's (forward and backward where there is a backward)", 1.0
    )


def memory_figure(results: Iterable[Result]) -> Figure | None:
    """Peak memory of the op, its definition and the dense mask, for each configuration."""
    chosen = drawn_in_rows(results)
    kinds: dict[str, Callable[[Result], str | None]] = {
        "gflowgr": lambda each: "",
        "definition in plain PyTorch": lambda each: "reference" if "reference" in each.rows else None,
        "dense mask": lambda each: each.dense,
    }
    points = {
        label: {
            row: float(max(each.memory(name), 1))
            for row, each in enumerate(chosen)
            if (name := pick(each)) is not None
        }
        for label, pick in kinds.items()
    }
    return _dots(chosen, points, "peak memory of a call", None)


def _dots(
    chosen: Sequence[Result], points: Mapping[str, Mapping[int, float]], label: str, line: float | None
) -> Figure | None:
    """A row for each result and a dot for each kind, on a logarithmic scale."""
    if not chosen:
        return None
    figure, (axes,) = _panels(1, 9.0, 1.3 + 0.27 * len(chosen))
    ours, *others = _colours()
    free = iter(zip(others, "^sD", strict=False))
    for kind, values in points.items():
        colour, marker = (ours, "o") if kind == "gflowgr" else next(free)
        axes.plot(list(values.values()), list(values), marker, color=colour, markersize=5.5, label=kind)
    axes.set_xscale("log")
    devices = len({each.device for each in chosen})
    axes.set_yticks(
        range(len(chosen)), [_name(each, devices) for each in chosen], color="#1d2126", fontsize=8
    )
    axes.set_ylim(len(chosen) - 0.5, -0.5)
    if line is not None:
        axes.axvline(line, color="#8a8f98", linewidth=1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}\N{MULTIPLICATION SIGN}")
    else:
        axes.xaxis.set_major_formatter(lambda value, _: size(value))
    axes.grid(color="#eceef1")
    axes.set_xlabel(label)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def catalogue_figure(results: Iterable[Result]) -> Figure | None:
    """Milliseconds a call against the size of the catalogue, a panel for each op, pass and device."""
    panels: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for each in results:
        if SWEPT in each.config:
            panels[each.op, each.direction, each.device].append(each)
    if not panels:
        return None
    figure, places = _panels(len(panels), 4.3, 4.0)
    names = list(dict.fromkeys(name for swept in panels.values() for each in swept for name in each.rows))
    colours = dict(zip(names, cycle(_colours()), strict=False))
    shown = {}
    devices = len({device for _, _, device in panels})
    for axes, ((op, direction, device), swept) in zip(places, panels.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for each in swept:
            items = int(each.config.partition(SWEPT)[2].partition(":")[0])
            for name, row in each.rows.items():
                lines[name].append((items, float(row["median_ms"])))
        for name, line in lines.items():
            x, y = zip(*sorted(line), strict=True)
            width = 1.2 if name else 2.4
            (shown[name],) = axes.plot(x, y, "o-", markersize=4, linewidth=width, color=colours[name])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        where = f"\n{device}" if devices > 1 else ""
        axes.set_title(f"{op}, {direction}{where}", fontsize=9, color="#1d2126")
        axes.set_xlabel("items of the catalogue")
        axes.set_ylabel("ms a call")
        axes.grid(color="#eceef1")
    labels = [name or "gflowgr" for name in shown]
    figure.legend(
        list(shown.values()), labels, loc="outside lower center", ncols=8, frameon=False, fontsize=8
    )
    return figure


def _colours() -> tuple[str, ...]:
    """That of gflowgr, then those of others."""
    from gflowgr.page import COLOURS, GREY

    return (*COLOURS, GREY, "#c2185b")


def _panels(count: int, width: float = 4.3, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    FigureCanvasSVG(figure)
    panels = [figure.add_subplot(1, count, place + 1) for place in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b9c0c9")
        axes.tick_params(colors="#59616b", labelsize=8, length=3)
        axes.xaxis.label.set(color="#59616b", size=9)
        axes.yaxis.label.set(color="#59616b", size=9)
        axes.set_axisbelow(True)
    return figure, panels
