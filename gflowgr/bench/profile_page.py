"""The page of a profile: one HTML file with everything in it."""

from __future__ import annotations

import math
import zlib
from html import escape
from typing import TYPE_CHECKING

from gflowgr.bench.table import size
from gflowgr.page import ACCENT, COLOURS, page

if TYPE_CHECKING:
    from gflowgr.bench.profiling import Comparison, Profiled, Span

WIDTH, LEFT, RIGHT = 1100, 64, 12
ROW = 22
ROWS = 10  # of a table
LETTER = 6.6  # pixels of a label's letter
NO_BREAK = "\N{NO-BREAK SPACE}"
_SUBJECT = ' class="subject"'
TITLES = {"gflowgr": "gflowgr", "reference": "definition in plain PyTorch"}
EXTRA_STYLE = """
section h3 { margin-top: 1.4rem; } header p.facts { max-width: none; } .wide + .wide { margin-top: 1.4rem; }
svg { display: block; width: 100%; min-width: 900px; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: #59616b; } svg .label { fill: #fff; pointer-events: none; }
svg .axis { stroke: #b9c0c9; } svg .grid { stroke: #eceef1; }
.wide td:first-child { white-space: normal; overflow-wrap: anywhere; max-width: 34ch; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
"""


def render(comparison: Comparison) -> str:
    """The page as one string of HTML."""
    job = comparison.job
    dtype = str(job.dtype).removeprefix("torch.")
    facts = (
        f"Configuration {job.configuration.label} ({job.configuration.about}), {dtype}, "
        f"{comparison.direction}, backend {job.backend}, {comparison.where['device']}, "
        f"{comparison.threads} thread{'s' if comparison.threads > 1 else ''}"
    )
    sections = [
        _verdict(comparison),
        _measured(comparison),
        _timelines(comparison),
        _memory(comparison),
        _tables(comparison),
        _reading(comparison),
    ]
    return page(f"{job.case.op} beside its definition", facts, sections, EXTRA_STYLE)


def _verdict(comparison: Comparison) -> str:
    own, other = comparison.profiled
    ratio = other.median_ms / own.median_ms
    speed = f"{ratio:.1f} times faster than" if ratio >= 1 else f"{1 / ratio:.1f} times slower than"
    return (
        f'<section class="verdict" aria-label="Verdict"><p>{duration(own.median_ms)} a call: {speed} the '
        f"definition in plain PyTorch, which takes {duration(other.median_ms)}.</p>"
        f"<p>Tensors hold {size(own.trace.peak_bytes)} at most, those of the definition "
        f"{size(other.trace.peak_bytes)}. It runs at {own.share_of_limit:.1%} of what this machine could do, "
        f"the definition at {other.share_of_limit:.1%}.</p></section>"
    )


def duration(milliseconds: float) -> str:
    """A duration in its unit, to three digits."""
    for limit, factor, unit in ((1e-3, 1e6, "ns"), (1.0, 1e3, "\N{MICRO SIGN}s"), (1e3, 1.0, "ms")):
        if milliseconds < limit:
            return f"{milliseconds * factor:.3g}{NO_BREAK}{unit}"
    return f"{milliseconds / 1e3:.3g}{NO_BREAK}s"


def _measured(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr{_SUBJECT if each.name == 'gflowgr' else ''}>"
        f'<th scope="row">{escape(TITLES[each.name])}</th><td>{duration(each.median_ms)}'
        f"<small>{duration(each.p20_ms)} .. {duration(each.p80_ms)}</small></td>"
        f"<td>{size(each.trace.peak_bytes)}</td><td>{size(each.peak_rss_bytes)}</td>"
        f"<td>{sum(row.count for row in each.trace.allocations)}</td>"
        f"<td>{each.share_of_limit:.1%}</td></tr>"
        for each in comparison.profiled
    )
    limit = (
        f"It must move {size(comparison.bytes_moved)}; a copy here moves "
        f"{size(comparison.bandwidth * 1e3)} a second"
    )
    if comparison.rate is not None:
        limit += (
            f". It must do {comparison.operations / 1e9:.3g} GFLOP; a square matrix product here does "
            f"{comparison.rate / 1e6:.3g} GFLOP/s"
        )
    limit += f". So no call can take less than {duration(comparison.least_ms)}, inputs in the cache aside."
    return (
        '<section><h2>Measured</h2><div class="scroll" tabindex="0" role="region" aria-label="Measurements">'
        '<table id="measured"><caption><span>Medians without the profiler, in turns in one process; below '
        "them the 20th and 80th percentile.</span></caption>"
        '<thead><tr><th scope="col">implementation</th><th scope="col">a call</th><th scope="col">peak of '
        'tensors</th><th scope="col">growth of resident memory</th><th scope="col">allocations</th>'
        f'<th scope="col">share of the limit</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f"<h3>Share of the physical limit</h3><p>{escape(limit)}</p>{_limit_bars(comparison)}</section>"
    )


def _limit_bars(comparison: Comparison) -> str:
    longest = max(each.median_ms for each in comparison.profiled)
    bars = [("the limit", comparison.least_ms, "#2f7d4f")]
    bars += [(_short(each), each.median_ms, _colour_of(each)) for each in comparison.profiled]
    left, room = 90, WIDTH - 90 - 90
    shapes = []
    for row, (name, taken, colour) in enumerate(bars):
        top, width = row * 28 + 4, max(1.0, room * taken / max(longest, comparison.least_ms))
        shapes.append(
            f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{left}" y="{top}" width="{width:.1f}" height="20" fill="{colour}"/>'
            f'<text x="{left + width + 6:.1f}" y="{top + 14}">{duration(taken)}</text>'
        )
    words = "; ".join(f"{name} {duration(taken)}" for name, taken, _ in bars)
    return _svg(len(bars) * 28 + 4, "".join(shapes), f"Times: {words}", "limit")


def _timelines(comparison: Comparison) -> str:
    panels = "".join(
        f"<h3>{_key(_colour_of(each))}{escape(TITLES[each.name])}: {duration(each.trace.duration_ms)} under "
        f"the profiler</h3>{_timeline(each)}"
        for each in comparison.profiled
    )
    return (
        "<section><h2>Timelines</h2><p>One call of each, every one on its own scale. A box is an operator, "
        "and those below it are what it calls; point at one for its name and time. The profiler itself takes "
        f"time, of short operators more than they do.</p>{panels}</section>"
    )


def _timeline(each: Profiled) -> str:
    trace = each.trace
    if not trace.spans:
        return '<p class="soft">No operator of PyTorch ran.</p>'
    room = WIDTH - LEFT - RIGHT
    scale = room / max(trace.duration_ms, 1e-9)
    lanes = sorted({span.lane for span in trace.spans})
    shapes, top = [], 6
    for lane in lanes:
        spans = [span for span in trace.spans if span.lane == lane]
        rows = max(span.depth for span in spans) + 1
        shapes.append(f'<text x="{LEFT - 8}" y="{top + 15}" text-anchor="end">{escape(lane)}</text>')
        shapes += [_box(span, top, scale) for span in spans]
        top += rows * ROW + 6
    axis = _time_axis(trace.duration_ms, scale, top)
    words = f"Timeline of {TITLES[each.name]}, {len(trace.spans)} operators in {duration(trace.duration_ms)}"
    return _svg(top + 24, "".join(shapes) + axis, words, f"timeline-{each.name}")


def _box(span: Span, top: float, scale: float) -> str:
    x, y = LEFT + span.start_ms * scale, top + span.depth * ROW
    width = max(0.6, (span.end_ms - span.start_ms) * scale)
    letters = int((width - 8) / LETTER)
    name = span.name.removeprefix("aten::")
    shown = name if len(name) <= letters else name[: letters - 1] + "\N{HORIZONTAL ELLIPSIS}"
    label = f'<text class="label" x="{x + 4:.1f}" y="{y + 14}">{escape(shown)}</text>' if letters >= 4 else ""
    taken = f"{duration(span.end_ms - span.start_ms)}, of it {duration(span.self_ms)} its own"
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 2}" rx="2" '
        f'fill="{_colour_of_name(span.name)}"><title>{escape(span.name)}\n{taken}</title></rect>{label}'
    )


def _short(each: Profiled) -> str:
    return TITLES[each.name].partition(" ")[0]


def _colour_of(each: Profiled) -> str:
    return ACCENT if each.name == "gflowgr" else COLOURS[1]


def _colour_of_name(name: str) -> str:
    """Ours in the accent; others always in the same colour."""
    others = COLOURS[1:]
    return ACCENT if "gflowgr" in name else others[zlib.crc32(name.encode()) % len(others)]


def _key(colour: str) -> str:
    return f'<span class="key" style="background:{colour}"></span>'


def _ticks(largest: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to at most `largest`."""
    if largest <= 0:
        return [0.0]
    unit = 10.0 ** math.floor(math.log10(largest / most))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * most >= largest)
    return [step * count for count in range(int(largest / step + 1e-9) + 1)]


def _time_axis(whole: float, scale: float, top: float) -> str:
    marks = "".join(
        f'<line class="axis" x1="{LEFT + tick * scale:.1f}" x2="{LEFT + tick * scale:.1f}" y1="{top}" '
        f'y2="{top + 4}"/><text x="{LEFT + tick * scale:.1f}" y="{top + 16}" text-anchor="middle">'
        f"{duration(tick) if tick else '0'}</text>"
        for tick in _ticks(whole)
    )
    line = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top}" y2="{top}"/>'
    return line + marks


def _memory(comparison: Comparison) -> str:
    highest = max(each.trace.peak_bytes for each in comparison.profiled)
    panels = "".join(
        f"<h3>{_key(_colour_of(each))}{escape(TITLES[each.name])}: peak {size(each.trace.peak_bytes)}</h3>"
        f"{_memory_chart(each, highest)}"
        for each in comparison.profiled
    )
    return (
        "<section><h2>Memory over time</h2><p>Bytes that tensors made by the call hold, its inputs not "
        f"counted, over the same times as above and on one scale of bytes.</p>{panels}</section>"
    )


def _memory_chart(each: Profiled, highest: int) -> str:
    height, top = 120, 8
    trace, room = each.trace, WIDTH - LEFT - RIGHT
    scale = room / max(trace.duration_ms, 1e-9)
    upward = height / max(highest, 1)
    grid = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{top + height - tick * upward:.1f}" '
        f'y2="{top + height - tick * upward:.1f}"/><text x="{LEFT - 6}" '
        f'y="{top + height - tick * upward + 4:.1f}" text-anchor="end">{size(tick)}</text>'
        for tick in _ticks(float(highest), 3)
    )
    path = [f"M{LEFT} {top + height}"]
    for moment, held in trace.held:
        path.append(f"H{LEFT + moment * scale:.2f}V{top + height - max(held, 0) * upward:.2f}")
    path.append(f"H{WIDTH - RIGHT}V{top + height}Z")
    colour = _colour_of(each)
    area = (
        f'<path d="{"".join(path)}" fill="{colour}" fill-opacity=".25" stroke="{colour}" stroke-width="1.5"/>'
    )
    axis = _time_axis(trace.duration_ms, scale, top + height)
    words = f"Memory held by {TITLES[each.name]}, at most {size(trace.peak_bytes)}"
    return _svg(top + height + 24, grid + area + axis, words, f"memory-{each.name}")


def _svg(height: float, content: str, words: str, identity: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(words, quote=True)}">'
        f'<svg id="{identity}" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(words, quote=True)}">{content}</svg></div>'
    )


def _tables(comparison: Comparison) -> str:
    halves = "".join(
        f"<section><h2>{_key(_colour_of(each))}{escape(TITLES[each.name])}</h2>{_kernels(each)}"
        f"{_allocations(each)}</section>"
        for each in comparison.profiled
    )
    return f'<div class="pair">{halves}</div>'


def _share(part: float, whole: float) -> str:
    share = part / whole if whole else 0.0
    return "&lt;1%" if 0 < share < 0.005 else f"{share:.0%}"


def _kernels(each: Profiled) -> str:
    kernels = each.trace.kernels()
    whole = sum(taken for _, _, taken in kernels)
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{calls}</td><td>{duration(taken)}</td>"
        f"<td>{_share(taken, whole)}</td></tr>"
        for name, calls, taken in kernels[:ROWS]
    )
    return (
        '<div class="scroll wide" tabindex="0" role="region" aria-label="Top kernels"><table><caption><span>'
        "Top kernels by their own time, what they call left out.</span></caption><thead><tr>"
        '<th scope="col">kernel</th><th scope="col">calls</th><th scope="col">own time</th>'
        f'<th scope="col">share</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _allocations(each: Profiled) -> str:
    rows = "".join(
        f"<tr><td>{escape(row.name)}</td><td>{row.count}</td><td>{size(row.nbytes)}</td></tr>"
        for row in each.trace.allocations[:ROWS]
    )
    return (
        '<div class="scroll wide" tabindex="0" role="region" aria-label="Allocations"><table><caption><span>'
        "Allocations by the operator that made them.</span></caption><thead><tr>"
        '<th scope="col">operator</th><th scope="col">times</th><th scope="col">bytes in sum</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _reading(comparison: Comparison) -> str:
    paragraphs = (
        "The limit is the time in which this machine could move the bytes that the task must read and write, "
        "whatever the implementation, at the speed of a large copy measured in the same run; for a head, or "
        "the time of its multiplications at the speed of a square product, if that is longer. A share "
        "can exceed 100% where inputs stay in the cache, which a large copy does not.",
        "Tensors are what PyTorch's allocator knows of. Memory that a kernel of ours takes elsewhere, or "
        "pages that are zero until they are written, show in the growth of resident memory, which the system "
        "counts (on Linux, for the CPU; 0 elsewhere).",
    )
    facts = {
        name: comparison.where[name] or "none"
        for name in ("date", "commit", "device", "cpu", "torch", "triton", "gflowgr")
    }
    definitions = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    words = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return (
        f"<section><h2>How to read this</h2>{words}"
        f"<details><summary>Versions</summary><dl>{definitions}</dl></details></section>"
    )
