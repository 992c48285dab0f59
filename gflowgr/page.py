"""What the pages of this package share: style, frame, figures, and how numbers stand in them."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ACCENT, PLAIN, GREY = "#b4460f", "#46607e", "#8a8f98"
COLOURS = ("#b4460f", "#1f5f99", "#2f7d4f", "#8250a8", "#a07b00", "#4d4d4d")
NONE = TO = "\N{EN DASH}"
STYLE = """
:root { color-scheme: light; --ink: #1d2126; --soft: #59616b; --line: #dde1e6; --accent: #b4460f; }
* { box-sizing: border-box; }
html { background: #f4f5f7; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.25rem 4rem; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .25rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 75ch; }
.facts, figcaption, caption, .soft { color: var(--soft); font-size: .9rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1.25rem 1.4rem;
  margin-top: 1.25rem; }
.verdict { border-left: 5px solid var(--accent); }
.verdict p:first-child { font-size: 1.2rem; line-height: 1.4; font-weight: 600; }
.verdict p:last-child { margin-bottom: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .6rem; }
caption span { display: block; max-width: min(75ch, calc(100vw - 4.2rem)); position: sticky; left: 0; }
section > figure:last-child { margin: 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr));
  gap: 0 1.25rem; }
th, td { padding: .45rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { white-space: normal; vertical-align: bottom; border-bottom: 2px solid #b9c0c9; font-weight: 600; }
tbody th { font-weight: 500; background: #fff; position: sticky; left: 0; }
tbody tr.subject th, tbody tr.subject td { background: #fdf4ee; }
td small { display: block; color: var(--soft); font-size: .72rem; font-weight: 400; }
td.best { font-weight: 700; }
figure { margin: 0 0 1rem; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { max-width: 75ch; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr));
  gap: 1.25rem; }
article { border-top: 1px solid var(--line); padding-top: 1rem; margin-top: 1rem; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 225px), 1fr)); gap: 1rem; }
.lists h4 { margin: 0 0 .3rem; font-size: .9rem; }
ol, ul { margin: 0; padding-left: 1.4rem; }
.lists li { font-size: .9rem; line-height: 1.35; margin-bottom: .3rem; }
.lists li small { color: var(--soft); display: block; }
.hit { background: #dff2e1; border-radius: 4px; padding: 0 .3rem; margin-left: -.3rem; font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1rem; margin: 0; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
details { margin-top: .75rem; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 560px) {
  body { padding: 1.1rem .75rem 3rem; }
  section { padding: 1rem .9rem; }
  h1 { font-size: 1.4rem; }
  tbody th { white-space: normal; min-width: 8.5rem; }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; }
}
"""


def page(title: str, facts: str, sections: Sequence[str], style: str = "") -> str:
    """A whole page of sections that are HTML; `style` is added to the common one. Empty sections go."""
    title = escape(title)
    parts = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<style>{STYLE}{style}</style>\n</head>\n<body>",
        f'<header><h1>{title}</h1><p class="facts">{escape(facts)}</p></header>\n<main>',
        *sections,
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def svg(figure: Figure) -> bytes:
    """A figure as an SVG file, the same for the same numbers."""
    import matplotlib

    stream = io.BytesIO()
    # A date, or identifiers without a salt of ours, would make every file another.
    with matplotlib.rc_context({"svg.hashsalt": "gflowgr"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def embed(figure: Figure, alt: str, caption: str) -> str:
    """A figure as HTML, with what it shows in words for those who cannot see it."""
    data = base64.b64encode(svg(figure)).decode()
    width, height = (round(inches * 96) for inches in figure.get_size_inches())
    return (
        f'<figure><img src="data:image/svg+xml;base64,{data}" width="{width}" height="{height}" '
        f'alt="{escape(alt, quote=True)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def blank_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Empty axes on a figure of that many inches."""
    figure, (axes,) = axes_side_by_side(width, height, 1)
    return figure, axes


def axes_side_by_side(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """Empty axes with one y axis between them, on a figure of that many inches."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    row = list(figure.subplots(1, count, sharey=True, squeeze=False)[0])
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b9c0c9")
        axes.tick_params(colors="#59616b", labelsize=9, length=3)
        axes.xaxis.label.set(color="#59616b", size=9)
        axes.yaxis.label.set(color="#59616b", size=9)
    return figure, row


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows of a figure that lies on its side, the first on top."""
    axes.set_yticks(range(len(names)), names, color="#1d2126")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_axisbelow(True)


def metric_name(name: str) -> str:
    """As people write it: "NDCG@10"."""
    upper = {"ndcg": "NDCG", "nll": "NLL"}
    word, at, k = name.partition("@")
    return upper.get(word, word.capitalize()) + at + k


def number(value: float | None) -> str:
    """Four decimals, or two from 2 on."""
    if value is None or not math.isfinite(value):
        return NONE
    if abs(value) >= 2:
        return f"{value:.2f}"
    return f"{value:.4f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def brief(value: float) -> str:
    """Three decimals, or two from 2 on."""
    if abs(value) >= 2:
        return f"{value:.2f}"
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def signed(value: float) -> str:
    """Four decimals with the sign, which a difference needs."""
    return f"{value:+.4f}".replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}")


def signed_percent(share: float) -> str:
    """A relative difference in per cent with its sign."""
    return f"{share:+.1%}".replace("-", "\N{MINUS SIGN}")


def percent(value: float | None) -> str:
    """A share in per cent."""
    if value is None:
        return NONE
    return f"{value:.0%}" if value >= 0.1 or value == 0 else f"{value:.1%}"


def listed(names: Sequence[str]) -> str:
    """Names as a part of a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def definitions(values: Mapping[str, Any]) -> str:
    """The entries of a definition list as HTML."""
    return "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in values.items()
    )
