"""A comparison of recommenders as one HTML file that needs nothing from outside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from gflowgr.folders import write_text
from gflowgr.page import (
    ACCENT,
    COLOURS,
    GREY,
    NONE,
    PLAIN,
    TO,
    blank_axes,
    brief,
    definitions,
    embed,
    listed,
    metric_name,
    name_rows,
    number,
    page,
    percent,
    signed,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOWER_IS_BETTER = ("gini", "nll")


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """A model of the comparison.

    Attributes:
        name: short, unique.
        description: one sentence: what it is and what it was trained on.
        metrics: by name, such as "ndcg@10".
        contexts: training contexts seen, None where that says nothing.
        seconds: of its own training.
        total_seconds: with the training of all that it builds on.
    """

    name: str
    description: str
    metrics: dict[str, Estimate]
    contexts: int | None
    seconds: float
    total_seconds: float


@dataclass(frozen=True)
class Comparison:
    """The subject minus another model, on the same users."""

    other: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Chart:
    """Lines over training: for each model its (x, y) points."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Item:
    """An item as it is shown."""

    title: str
    detail: str = ""


@dataclass(frozen=True)
class Example:
    """A user, what was held out, and what each model recommends; `hits` has the target's place, or None."""

    user: str
    history: list[Item]
    target: Item
    recommended: dict[str, list[Item]]
    hits: dict[str, int | None]


@dataclass(frozen=True)
class Report:
    """Everything on the page.

    Attributes:
        title: of the page.
        facts: a sentence on the data.
        subject: name of the row that the verdict is about.
        control: name of the row that had the same budget without the method.
        metric: the metric that decides, higher is better.
        level: confidence of all intervals.
        rows: the models, in the order of the table.
        comparisons: the subject against every other row, in `metric`.
        charts: training curves.
        mass: reward mass found, by strategy.
        mass_note: how that was measured.
        time_shares: for each trained model its parts, which sum to 1.
        examples: users.
        examples_note: how they were chosen.
        notes: how to read it, a paragraph each.
        settings: by group.
        versions: of the software and machine.
    """

    title: str
    facts: str
    subject: str
    control: str
    metric: str
    level: float
    rows: list[Row]
    comparisons: list[Comparison]
    charts: list[Chart]
    mass: dict[str, Estimate]
    mass_note: str
    time_shares: dict[str, dict[str, float]]
    examples: list[Example]
    examples_note: str
    notes: list[str]
    settings: dict[str, dict[str, Any]]
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if len(set(names)) != len(names):
            raise ValueError(f"rows need names of their own, got {names}")
        for role in ("subject", "control"):
            if getattr(self, role) not in names:
                raise ValueError(f"{role} is {getattr(self, role)!r}, needs one of {names}")
        others = sorted(comparison.other for comparison in self.comparisons)
        if others != sorted(set(names) - {self.subject}):
            raise ValueError(f"comparisons need each other row once, got {others}")
        for row in self.rows:
            if self.metric not in row.metrics:
                raise ValueError(f"row {row.name!r} lacks the metric {self.metric!r} that decides")

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)

    def to_json(self) -> str:
        """The same as data."""
        return json.dumps({"verdict": verdict(self), **asdict(self)}, indent=1, ensure_ascii=False)


def write(report: Report, path: str | os.PathLike[str]) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, render(report))


def verdict(report: Report) -> list[str]:
    """Whether the subject leads, and what it gains over the control: two sentences."""
    return [_lead(report), _gain(report)]


def _lead(report: Report) -> str:
    best = max(report.comparisons, key=lambda comparison: -comparison.mean)
    subject = number(report.row(report.subject).metrics[report.metric].value)
    other = number(report.row(best.other).metrics[report.metric].value)
    metric, interval = metric_name(report.metric), _interval(report, best)
    if best.low > 0 and all(comparison.low > 0 for comparison in report.comparisons):
        return (
            f"{report.subject} leads: its {metric} of {subject} is above that of every other model, by "
            f"{signed(best.mean)} over the next best, {best.other} ({interval})."
        )
    if best.mean > 0:
        unsure = [comparison.other for comparison in report.comparisons if comparison.low <= 0]
        return (
            f"{report.subject} has the highest {metric}, {subject}, but is not safely ahead of "
            f"{listed(unsure)}: the difference to {best.other} is {signed(best.mean)} ({interval})."
        )
    if best.high < 0:
        return (
            f"{report.subject} does not lead: {best.other} has the higher {metric}, {other} against "
            f"{subject}, a difference of {signed(best.mean)} ({interval})."
        )
    return (
        f"{report.subject} does not lead: {best.other} has {metric} {other} against {subject}; the "
        f"difference, {signed(best.mean)} ({interval}), is within chance."
    )


def _gain(report: Report) -> str:
    control = next(c for c in report.comparisons if c.other == report.control)
    base = report.row(report.control).metrics[report.metric].value
    share = f", {control.mean / base:+.0%}".replace("-", "\N{MINUS SIGN}") if base else ""
    what = f"Over {report.control}, which had the same budget, it "
    if control.low > 0:
        what += "gains"
    elif control.high < 0:
        what += "loses"
    else:
        what += "shows no sure difference:"
    gain = f"{signed(control.mean)} {metric_name(report.metric)}{share}"
    return f"{what} {gain} ({_interval(report, control)})."


def render(report: Report) -> str:
    """The page as one string of HTML."""
    sections = [
        _verdict_section(report),
        _results_section(report),
        _charts_section(report),
        f'<div class="pair">{_mass_section(report)}{_time_section(report)}</div>',
        _examples_section(report),
        _reading_section(report),
        _settings_section(report),
    ]
    return page(report.title, report.facts, sections)


def _verdict_section(report: Report) -> str:
    paragraphs = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict(report))
    return f'<section class="verdict" aria-label="Verdict">{paragraphs}</section>'


def _results_section(report: Report) -> str:
    names = list(dict.fromkeys(name for row in report.rows for name in row.metrics))
    head = "".join(f'<th scope="col">{_metric_heading(name)} {_arrow(name)}</th>' for name in names)
    head += '<th scope="col">contexts seen</th><th scope="col">seconds</th>'
    body = []
    for row in report.rows:
        cells = "".join(_metric_cell(report, row, name) for name in names)
        contexts = NONE if row.contexts is None else f"{row.contexts / 1000:,.0f} k"
        in_all = ""
        if row.total_seconds > row.seconds:
            in_all = f"<small>{row.total_seconds:,.0f} in all</small>"
        cells += f"<td>{contexts}</td><td>{row.seconds:,.0f}{in_all}</td>"
        subject = ' class="subject"' if row.name == report.subject else ""
        body.append(f'<tr{subject}><th scope="row">{escape(row.name)}</th>{cells}</tr>')
    described = "".join(f"<dt>{escape(r.name)}</dt><dd>{escape(r.description)}</dd>" for r in report.rows)
    whiskers = "".join(_whisker_figure(report, name) for name in _headline_metrics(report, names))
    return (
        "<section><h2>Results</h2>"
        f'<div class="plots">{whiskers}</div>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Results table">'
        f'<table id="results"><caption><span>Test users. Below each mean its {report.level:.0%} bootstrap '
        "interval; the best value is bold; arrows say which way is better.</span></caption>"
        f'<thead><tr><th scope="col">model</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        f"<details><summary>What each model is</summary><dl>{described}</dl></details></section>"
    )


def _headline_metrics(report: Report, names: Sequence[str]) -> list[str]:
    """The metric that decides, and recall at the same cut-off beside it."""
    recall = "recall@" + report.metric.partition("@")[2]
    return [report.metric, recall] if recall in names and recall != report.metric else [report.metric]


def _whisker_figure(report: Report, name: str) -> str:
    estimates = {row.name: row.metrics[name] for row in report.rows if name in row.metrics}
    metric = metric_name(name)
    return embed(
        _whiskers(estimates, report.subject, metric),
        f"{metric} of each model with its interval",
        f"{metric} on the test users; the line is the {report.level:.0%} bootstrap interval.",
    )


def _metric_cell(report: Report, row: Row, name: str) -> str:
    estimate = row.metrics.get(name)
    if estimate is None or estimate.value is None:
        return f"<td>{NONE}</td>"
    known = [r.metrics[name].value for r in report.rows if name in r.metrics]
    values = [value for value in known if value is not None]
    best = min(values) if _lower_is_better(name) else max(values)
    small = ""
    if estimate.low is not None and estimate.high is not None:
        small = f"<small>{brief(estimate.low)}{TO}{brief(estimate.high)}</small>"
    marked = ' class="best"' if estimate.value == best else ""
    return f"<td{marked}>{number(estimate.value)}{small}</td>"


def _charts_section(report: Report) -> str:
    if not report.charts:
        return ""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(_drawn_models(report))}
    figures = "".join(
        embed(_lines(chart, colours), f"{chart.y_label} over {chart.x_label}", chart.title)
        for chart in report.charts
    )
    return f'<section><h2>Training</h2><div class="plots">{figures}</div></section>'


def _drawn_models(report: Report) -> list[str]:
    drawn = {name for chart in report.charts for name in chart.lines}
    return sorted(drawn, key=lambda name: (name != report.subject, name))


def _mass_section(report: Report) -> str:
    if not report.mass:
        return ""
    values = ", ".join(f"{name} {percent(estimate.value)}" for name, estimate in report.mass.items())
    figure = embed(_bars(report.mass), f"Reward mass found by each strategy: {values}", report.mass_note)
    return f"<section><h2>Reward mass found by each sampler</h2>{figure}</section>"


def _examples_section(report: Report) -> str:
    if not report.examples:
        return ""
    articles = "".join(_example(example) for example in report.examples)
    return f"<section><h2>Recommendations</h2><p>{escape(report.examples_note)}</p>{articles}</section>"


def _example(example: Example) -> str:
    history = ", ".join(escape(item.title) for item in example.history)
    lists = "".join(_list(name, items, example.hits[name]) for name, items in example.recommended.items())
    detail = f' <span class="soft">({escape(example.target.detail)})</span>' if example.target.detail else ""
    return (
        f"<article><h3>{escape(example.user)}</h3>"
        f'<p><span class="soft">Watched, latest last:</span> {history}<br>'
        f'<span class="soft">Held out, to be found:</span> '
        f"<strong>{escape(example.target.title)}</strong>{detail}</p>"
        f'<div class="lists">{lists}</div></article>'
    )


def _list(name: str, items: Sequence[Item], hit: int | None) -> str:
    rows = "".join(_list_item(item, place == hit) for place, item in enumerate(items))
    return f"<div><h4>{escape(name)}</h4><ol>{rows}</ol></div>"


def _list_item(item: Item, hit: bool) -> str:
    title = escape(item.title)
    shown = f'<span class="hit">✓ {title}</span>' if hit else title
    detail = f"<small>{escape(item.detail)}</small>" if item.detail else ""
    return f"<li>{shown}{detail}</li>"


def _time_section(report: Report) -> str:
    if not report.time_shares:
        return ""
    words = "; ".join(
        f"{name}: " + ", ".join(f"{part} {percent(share)}" for part, share in shares.items())
        for name, shares in report.time_shares.items()
    )
    caption = "Share of a training step's time, evaluations left out."
    figure = embed(_stacked(report.time_shares), f"Time shares. {words}", caption)
    return f"<section><h2>Where the time goes</h2>{figure}</section>"


def _reading_section(report: Report) -> str:
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return f"<section><h2>How to read this</h2>{paragraphs}</section>"


def _settings_section(report: Report) -> str:
    groups = {**report.settings, "Versions": report.versions}
    blocks = "".join(
        f"<details><summary>{escape(name)}</summary><dl>{definitions(values)}</dl></details>"
        for name, values in groups.items()
    )
    return f"<section><h2>Settings and versions</h2>{blocks}</section>"


def chart_svg(chart: Chart) -> str:
    """A chart as the text of an SVG file, the same for the same numbers."""
    return svg(_lines(chart, dict(zip(chart.lines, COLOURS, strict=False)))).decode()


def _whiskers(estimates: Mapping[str, Estimate], subject: str, metric: str) -> Figure:
    figure, axes = blank_axes(4.9, 0.7 + 0.3 * len(estimates))
    for place, (name, estimate) in enumerate(estimates.items()):
        colour = ACCENT if name == subject else PLAIN
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [place, place], color=colour, linewidth=2, alpha=0.55)
        if estimate.value is not None:
            axes.plot([estimate.value], [place], "o", color=colour, markersize=6)
    name_rows(axes, list(estimates))
    axes.set_xlim(left=0)
    axes.grid(axis="x", color="#eceef1")
    axes.set_xlabel(metric)
    return figure


def _lines(chart: Chart, colours: Mapping[str, str]) -> Figure:
    figure, axes = blank_axes(4.9, 3.4)
    for name in colours:
        if name in chart.lines:
            x, y = zip(*chart.lines[name], strict=True)
            single = len(x) == 1
            axes.plot(x, y, color=colours[name], linewidth=1.6, marker="o" if single else None, label=name)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    axes.grid(color="#eceef1")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, labelcolor="#1d2126")
    return figure


def _bars(mass: Mapping[str, Estimate]) -> Figure:
    figure, axes = blank_axes(4.9, 0.7 + 0.3 * len(mass))
    widest = max(estimate.value or 0.0 for estimate in mass.values()) or 1.0
    for place, estimate in enumerate(mass.values()):
        value = estimate.value or 0.0
        axes.barh(place, value, color=PLAIN, height=0.62)
        end = value if estimate.high is None else estimate.high
        if estimate.low is not None and estimate.high is not None:
            axes.plot([estimate.low, estimate.high], [place, place], color="#1d2126", linewidth=1)
        axes.text(end + widest * 0.015, place, percent(value), va="center", fontsize=9, color="#1d2126")
    name_rows(axes, list(mass))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.grid(axis="x", color="#eceef1")
    axes.set_xlabel("share of the context's reward")
    return figure


def _stacked(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    figure, axes = blank_axes(4.9, 1.3 + 0.32 * len(shares))
    parts = list(dict.fromkeys(part for row in shares.values() for part in row))
    left = dict.fromkeys(shares, 0.0)
    for colour, part in zip((PLAIN, "#7fa3c7", ACCENT, "#e3a57f", "#c9ced6", GREY), parts, strict=False):
        widths = [row.get(part, 0.0) for row in shares.values()]
        axes.barh(range(len(shares)), widths, left=list(left.values()), color=colour, height=0.62, label=part)
        left = {name: left[name] + width for name, width in zip(left, widths, strict=True)}
    name_rows(axes, list(shares))
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _interval(report: Report, comparison: Comparison) -> str:
    return f"{report.level:.0%} interval {signed(comparison.low)} to {signed(comparison.high)}"


def _metric_heading(name: str) -> str:
    """The name, which may break before its cut-off."""
    return escape(metric_name(name)).replace("@", "<wbr>@")


def _lower_is_better(name: str) -> bool:
    return name.partition("@")[0] in LOWER_IS_BETTER


def _arrow(name: str) -> str:
    if _lower_is_better(name):
        return '<span title="lower is better">↓</span>'
    return '<span title="higher is better">↑</span>'
