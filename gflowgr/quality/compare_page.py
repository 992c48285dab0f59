"""The comparison of two runs as one HTML file that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from gflowgr.folders import write_text
from gflowgr.page import (
    ACCENT,
    GREY,
    PLAIN,
    blank_axes,
    embed,
    metric_name,
    number,
    page,
    percent,
    signed,
    signed_percent,
)
from gflowgr.quality.compare import Compared, Comparison, Group, RankChanges
from gflowgr.quality.compare_text import cells, facts
from gflowgr.quality.results import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEAD = "".join(f'<th scope="col">{title}</th>' for title in ("A", "B", "A \N{MINUS SIGN} B"))
_STYLE = "tbody th small { display: block; color: var(--soft); font-size: .72rem; font-weight: 400; }"


def write(comparison: Comparison, path: PathLike) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, render(comparison))


def render(comparison: Comparison) -> str:
    """The page as one string of HTML."""
    sections = [
        _verdict(comparison),
        _metrics(comparison),
        _groups(
            "By length of the user's history",
            "items in the history",
            comparison.by_length,
            [group.range for group in comparison.by_length],
        ),
        _groups(
            "By popularity of the target",
            "occurrences of the target in training",
            comparison.by_popularity,
            [f"{group.name}, {group.range}" for group in comparison.by_popularity],
        ),
        _changes(comparison),
        _reading(comparison),
    ]
    return page("Two runs compared", facts(comparison), sections, _STYLE)


def verdict(comparison: Comparison) -> str:
    """Which run has the higher NDCG, or that this cannot be told, in one sentence."""
    compared = comparison.compared(comparison.deciding)
    a, b, difference = compared.a.value, compared.b.value, compared.difference
    assert a is not None and b is not None and difference.value is not None
    metric = metric_name(compared.metric)
    if difference.low is None or difference.high is None:
        return f"One user alone: A has {metric} {number(a)}, B {number(b)}."
    share = f", {signed_percent(difference.value / b)}" if b else ""
    interval = f"95% interval {signed(difference.low)} to {signed(difference.high)}"
    how_much = f"{signed(difference.value)}{share} ({interval})"
    if difference.low > 0:
        return f"A is ahead of B: {metric} {number(a)} against {number(b)}, {how_much}."
    if difference.high < 0:
        return f"A is behind B: {metric} {number(a)} against {number(b)}, {how_much}."
    return f"No sure difference: {metric} {number(a)} against {number(b)}, {how_much}."


def _verdict(comparison: Comparison) -> str:
    return (
        f'<section class="verdict" aria-label="Verdict"><p>{escape(verdict(comparison))}</p>'
        f"<dl><dt>A</dt><dd>{escape(comparison.a)}</dd><dt>B</dt><dd>{escape(comparison.b)}</dd></dl></section>"
    )


def _metrics(comparison: Comparison) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(metric_name(compared.metric))}</th>{_cells(compared)}</tr>'
        for compared in comparison.metrics
    )
    return (
        f'<section><h2>Metrics</h2><div class="scroll" tabindex="0" role="region" aria-label="Metrics">'
        f'<table id="metrics"><thead><tr><th scope="col">metric</th>{_HEAD}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _cells(compared: Compared) -> str:
    a, b, difference, interval = map(escape, cells(compared))
    small = f"<small>{interval}</small>" if interval else ""
    return f"<td>{a}</td><td>{b}</td><td>{difference}{small}</td>"


def _groups(title: str, label: str, groups: Sequence[Group], names: Sequence[str]) -> str:
    metrics = [compared.metric for compared in groups[0].metrics]
    figures = "".join(_group_figure(label, groups, names, metric) for metric in metrics)
    rows = ""
    for group, name in zip(groups, names, strict=True):
        for compared in group.metrics:
            head = f'<th scope="row">{escape(name)}<small>{group.users:,} users</small></th>'
            rows += f"<tr>{head}<td>{escape(metric_name(compared.metric))}</td>{_cells(compared)}</tr>"
    return (
        f'<section><h2>{escape(title)}</h2><div class="plots">{figures}</div>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title, quote=True)}">'
        f'<table><thead><tr><th scope="col">{escape(label)}</th><th scope="col">metric</th>'
        f"{_HEAD}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _group_figure(label: str, groups: Sequence[Group], names: Sequence[str], metric: str) -> str:
    chosen = [next(c for c in group.metrics if c.metric == metric) for group in groups]
    shown = metric_name(metric)
    words = "; ".join(
        f"{name}: A {number(c.a.value)}, B {number(c.b.value)}" for name, c in zip(names, chosen, strict=True)
    )
    return embed(
        _group_bars(chosen, names, label, shown),
        f"{shown} by {label}. {words}",
        f"{shown} of A and B by {label}; lines are 95% bootstrap intervals over users.",
    )


def _group_bars(chosen: Sequence[Compared], names: Sequence[str], x_label: str, y_label: str) -> Figure:
    figure, axes = blank_axes(4.9, 3.2)
    width = 0.38
    for label, colour, shift in (("A", ACCENT, -width / 2), ("B", PLAIN, width / 2)):
        estimates = [compared.a if label == "A" else compared.b for compared in chosen]
        heights = [estimate.value or 0.0 for estimate in estimates]
        places = [place + shift for place in range(len(chosen))]
        axes.bar(places, heights, width, color=colour, label=label)
        for place, estimate in zip(places, estimates, strict=True):
            if estimate.low is not None and estimate.high is not None:
                axes.plot([place, place], [estimate.low, estimate.high], color="#1d2126", linewidth=1)
    axes.set_xticks(range(len(chosen)), [name.replace(", ", "\n") for name in names])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(axis="y", color="#eceef1")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return figure


def _changes(comparison: Comparison) -> str:
    changes = comparison.changes
    better = sum(count for change, count in changes.both.items() if change > 0)
    worse = sum(count for change, count in changes.both.items() if change < 0)
    caption = (
        f"Users by the places that A has the target further up than B. Both list it for "
        f"{sum(changes.both.values()):,.0f} users: A further up for {better:,.0f}, B for {worse:,.0f}. "
        f"A alone lists it for {changes.only_a:,.0f}, B alone for {changes.only_b:,.0f}, none of them for "
        f"{changes.neither:,.0f} ({percent(changes.neither / comparison.num_users)}), who are not drawn."
    )
    figure = embed(_change_bars(changes), f"Changes of rank. {caption}", caption)
    return f"<section><h2>Where the targets moved</h2>{figure}</section>"


def _change_bars(changes: RankChanges) -> Figure:
    figure, axes = blank_axes(4.9, 3.2)
    most = max(changes.both)
    # A place apart from the changes, which have a scale.
    edges = {-most - 2: ("B\nalone", changes.only_b, PLAIN), most + 2: ("A\nalone", changes.only_a, ACCENT)}
    for change, count in changes.both.items():
        axes.bar(change, count, 0.8, color=ACCENT if change > 0 else PLAIN if change < 0 else GREY)
    for place, (_, count, colour) in edges.items():
        axes.bar(place, count, 0.8, color=colour)
    step = max(1, most // 3)
    ticks = {
        change: f"{change:+d}" if change else "0" for change in range(-most, most + 1) if change % step == 0
    }
    ticks |= {place: name for place, (name, _, _) in edges.items()}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("places further up in A's list")
    axes.set_ylabel("users")
    axes.grid(axis="y", color="#eceef1")
    axes.set_axisbelow(True)
    return figure


def _reading(comparison: Comparison) -> str:
    notes = [
        "A and B are measured on the same test users. The difference is taken user by user (where there are "
        "several seeds, after averaging over them), and its interval comes from drawing the users again, "
        "1,000 times. It says how much the result owes to these users, not how much another seed would "
        "change it. In the tables it stands below the difference, at 95%.",
        "Groups are quantiles, equal values together. Head, middle and tail hold about a third of the test "
        "targets each, the head those that occur most often in the training part.",
        "Where the interval of a difference contains 0, the data do not tell which run is better there. Of "
        "twenty intervals between runs that are alike, one lies beside 0 by chance.",
    ]
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<section><h2>How to read this</h2>{paragraphs}</section>"
