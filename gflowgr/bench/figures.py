"""The figures of docs/, drawn from the results."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
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


def _whole(results: Iterable[Result]) -> list[Result]:
    """Of each setting, the pass that goes furthest; the sweep and the trie's construction aside."""
    chosen: dict[tuple[str, ...], Result] = {}
    for each in results:
        if SWEPT not in each.config and each.op != "trie_build":
            key = (each.op, each.config, each.dtype, each.device)
            if key not in chosen or each.direction == "forward+backward":
                chosen[key] = each
    return list(chosen.values())


def _name(each: Result, devices: int) -> str:
    where = f", {each.device}" if devices > 1 else ""
    return f"{each.op}, {each.config}, {each.dtype}{where}"


def speed_figure(results: Iterable[Result]) -> Figure | None:
    """How many times longer others take than the op, for each configuration."""
    chosen = [each for each in _whole(results) if len(each.rows) > 1]
    kinds: dict[str, Callable[[Result], str | None]] = {
        "definition in plain PyTorch": lambda each: "reference" if "reference" in each.rows else None,
        "dense mask": lambda each: each.dense,
        "best other baseline": lambda each: each.rival,
    }
    points = {
        label: {row: each.ratio(name) for row, each in enumerate(chosen) if (name := pick(each)) is not None}
        for label, pick in kinds.items()
    }
    return _dots(chosen, points, "times the op's own time (forward and backward where there is one)", 1.0)


def memory_figure(results: Iterable[Result]) -> Figure | None:
    """Peak memory of the op, its definition and the dense mask, for each configuration."""
    chosen = [each for each in _whole(results) if len(each.rows) > 1]
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
    for place, (kind, values) in enumerate(points.items()):
        axes.plot(
            list(values.values()),
            list(values),
            "o^s"[place],
            color=_colours()[place],
            markersize=5.5,
            label=kind,
        )
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
    """Milliseconds a call against the size of the catalogue, a panel for each op and pass."""
    panels: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for each in results:
        if SWEPT in each.config:
            panels[each.op, each.direction].append(each)
    if not panels:
        return None
    figure, places = _panels(len(panels))
    for axes, ((op, direction), swept) in zip(places, panels.items(), strict=True):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for each in swept:
            items = int(each.config.partition(SWEPT)[2].partition(":")[0])
            for name, row in each.rows.items():
                lines[name].append((items, float(row["median_ms"])))
        for place, (name, line) in enumerate(lines.items()):
            x, y = zip(*sorted(line), strict=True)
            axes.plot(
                x, y, "o-", markersize=4, linewidth=2.4 if not name else 1.2,
                color=_colours()[place % len(_colours())], label=name or "gflowgr",
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(f"{op}, {direction}", fontsize=9, color="#1d2126")
        axes.set_xlabel("items of the catalogue")
        axes.set_ylabel("ms a call")
        axes.grid(color="#eceef1")
        axes.legend(frameon=False, fontsize=7)
    return figure


def _colours() -> tuple[str, ...]:
    from gflowgr.report import COLOURS, GREY

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
