"""`gflowgr bench --profile`: what the op and its definition do from the first microsecond to the last."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gflowgr.bench import memory, timing
from gflowgr.bench.checks import WrongResultError
from gflowgr.bench.plans import Job, Plan, problem_of
from gflowgr.bench.problems import Inputs
from gflowgr.bench.runs import PASSES, check_all
from gflowgr.bench.table import machine, size

_MARK = "measured: "
_WARM_UP = "warm-up: "
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_SHOWN = 12


@dataclass(frozen=True)
class Span:
    """A stretch of work: milliseconds from the call's begin, how deep it is nested, and on what it ran.

    `self_ms` leaves out what is nested in it.
    """

    name: str
    start_ms: float
    end_ms: float
    depth: int
    lane: str
    self_ms: float


@dataclass(frozen=True)
class Allocations:
    """What an operator allocated: how often, and bytes in sum."""

    name: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Trace:
    """One call under the profiler; `held` are (milliseconds, bytes held from then on)."""

    duration_ms: float
    spans: list[Span]
    held: list[tuple[float, int]]
    allocations: list[Allocations]

    @property
    def peak_bytes(self) -> int:
        return max((held for _, held in self.held), default=0)

    def kernels(self) -> list[tuple[str, int, float]]:
        """Name, calls and milliseconds of each kernel, longest first: the device's own where there is one."""
        lanes = {span.lane for span in self.spans}
        device = [span for span in self.spans if span.lane == "device"] if "device" in lanes else self.spans
        calls: dict[str, int] = defaultdict(int)
        taken: dict[str, float] = defaultdict(float)
        for span in device:
            calls[span.name] += 1
            taken[span.name] += span.self_ms
        return sorted(((name, calls[name], taken[name]) for name in calls), key=lambda row: -row[2])


@dataclass(frozen=True)
class Profiled:
    """An implementation: its times without the profiler, and one call with it."""

    name: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_rss_bytes: int
    share_of_limit: float
    trace: Trace


@dataclass(frozen=True)
class Comparison:
    """The op and its definition on one job: what the page shows."""

    job: Job
    direction: str
    threads: int
    least_ms: float
    bytes_moved: int
    operations: int
    bandwidth: float
    rate: float | None
    profiled: tuple[Profiled, ...]
    where: dict[str, str]


def profile(plan: Plan, folder: Path, write: Callable[[str], None] = print) -> Comparison:
    """Measures the first job of a plan, and writes a Chrome trace and a page into `folder`.

    Raises:
        ValueError: the plan is not of one op and one configuration.
        WrongResultError: the op differs from its definition.
    """
    from gflowgr.bench.profile_page import render
    from gflowgr.folders import write_text

    if len({(job.case.op, job.configuration.label) for job in plan.jobs}) != 1:
        raise ValueError(f"profile takes one op and one configuration, and was asked for {len(plan.jobs)}")
    job = plan.jobs[0]
    before = torch.get_num_threads()
    try:
        comparison, events = _compare(plan, job)
    finally:
        torch.set_num_threads(before)
    name = _file_name(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.trace.json", json.dumps(events))
    write_text(folder / f"{name}.html", render(comparison))
    for line in summary(comparison):
        write(line)
    write(f"\n{folder / name}.html: the page; {folder / name}.trace.json: for chrome://tracing or Perfetto")
    return comparison


def _file_name(job: Job) -> str:
    dtype = str(job.dtype).removeprefix("torch.")
    words = f"{job.case.op}-{job.configuration.label}-{dtype}"
    return "".join(letter if letter.isalnum() or letter in "-_=" else "-" for letter in words)


def _compare(plan: Plan, job: Job) -> tuple[Comparison, dict[str, Any]]:
    case, threads = job.case, plan.threads[0]
    problem = problem_of(job, plan.device, plan.seed)
    cuda = plan.device.type == "cuda"
    limits = timing.limits_here(plan.device, threads)
    torch.set_num_threads(threads)
    runs = {"gflowgr": case.candidate, "reference": case.definition}
    try:
        check_all(case, problem, runs, case.inputs(problem))
    except WrongResultError as error:
        raise WrongResultError(f"{job}, seed {plan.seed}: {error}") from error
    sets = timing.input_sets(case, problem, plan.rounds)
    backward = bool(case.gradients)
    calls = {name: timing.timed_call(case, run, problem, backward) for name, run in runs.items()}
    times = timing.paired_rounds(calls, sets, plan.rounds, plan.seconds, cuda)
    events = record(calls, sets[0], cuda)
    least = limits.least_ms(case, problem, sets[0], backward)
    profiled = [
        Profiled(
            name=name,
            median_ms=statistics.median(taken),
            p20_ms=float(np.quantile(taken, 0.2)),
            p80_ms=float(np.quantile(taken, 0.8)),
            peak_rss_bytes=0 if cuda else memory.peak_rss_bytes(partial(calls[name], sets[0])),
            share_of_limit=least / statistics.median(taken),
            trace=read_trace(events, name, cuda),
        )
        for name, taken in times.items()
    ]
    comparison = Comparison(
        job=job,
        direction=PASSES[backward],
        threads=threads,
        least_ms=least,
        bytes_moved=case.bytes_moved(problem, sets[0], backward),
        operations=case.operations(problem, sets[0], backward) if case.operations else 0,
        bandwidth=limits.bandwidth,
        rate=limits.rate(problem.dtype) if case.operations else None,
        profiled=tuple(profiled),
        where=machine(plan.device),
    )
    return comparison, events


def record(calls: Mapping[str, timing.TimedCall], inputs: Inputs, cuda: bool) -> dict[str, Any]:
    """A Chrome trace of each call, once to warm up and once marked as measured."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        memory.silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler,
    ):
        for mark in (_WARM_UP, _MARK):
            for name, call in calls.items():
                with torch.profiler.record_function(mark + name):
                    call(inputs)
                    if cuda:
                        torch.cuda.synchronize()
    return memory.chrome_trace(profiler)


def read_trace(events: Mapping[str, Any], name: str, cuda: bool) -> Trace:
    """What one marked call did, out of a Chrome trace."""
    complete = [event for event in events["traceEvents"] if event.get("ph") == "X"]
    mark = next(
        event for event in complete if event["name"] == _MARK + name and event.get("cat") == "user_annotation"
    )
    begin, end = mark["ts"], mark["ts"] + mark["dur"]
    inside = [event for event in complete if begin <= event["ts"] and event["ts"] + event["dur"] <= end]
    lanes: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in inside:
        if event.get("cat") == "cpu_op":
            lanes["cpu", event["tid"]].append(event)
        elif event.get("cat") in _DEVICE_WORK:
            lanes["device", event["tid"]].append(event)
    spans = [span for lane in lanes for span in _nested(lane[0], lanes[lane], begin)]
    changes = [
        (event["ts"], event["args"]["Bytes"])
        for event in events["traceEvents"]
        if event.get("name") == "[memory]"
        and begin <= event["ts"] <= end
        and (event["args"]["Device Type"] != 0) == cuda
    ]
    changes.sort(key=lambda change: change[0])
    held, steps = 0, [(0.0, 0)]
    for moment, change in changes:
        held += change
        steps.append(((moment - begin) / 1e3, held))
    on_host = [span for span in spans if span.lane == "cpu"]
    allocated = [((moment - begin) / 1e3, change) for moment, change in changes if change > 0]
    return Trace(mark["dur"] / 1e3, spans, steps, _allocations(on_host, allocated))


def _nested(lane: str, events: Sequence[Mapping[str, Any]], begin: float) -> list[Span]:
    """Spans of one thread or stream, the ones that contain others first."""
    spans: list[tuple[str, float, float, int]] = []
    inner: list[float] = []
    open_spans: list[int] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        start, end = (event["ts"] - begin) / 1e3, (event["ts"] + event["dur"] - begin) / 1e3
        while open_spans and spans[open_spans[-1]][2] <= start:
            open_spans.pop()
        if open_spans:
            inner[open_spans[-1]] += end - start
        spans.append((event["name"], start, end, len(open_spans)))
        inner.append(0.0)
        open_spans.append(len(spans) - 1)
    return [
        Span(name, start, end, depth, lane, max(0.0, end - start - nested))
        for (name, start, end, depth), nested in zip(spans, inner, strict=True)
    ]


def _allocations(spans: Sequence[Span], allocated: Sequence[tuple[float, int]]) -> list[Allocations]:
    """Allocations by the innermost operator in which they were made, largest first."""
    found: dict[str, list[int]] = defaultdict(list)
    for moment, nbytes in allocated:
        around = [span for span in spans if span.start_ms <= moment <= span.end_ms]
        name = max(around, key=lambda span: span.depth).name if around else "outside of operators"
        found[name].append(nbytes)
    rows = [Allocations(name, len(each), sum(each)) for name, each in found.items()]
    return sorted(rows, key=lambda row: -row.nbytes)


def summary(comparison: Comparison) -> list[str]:
    """What the command prints."""
    lines = [
        f"{comparison.job}, {comparison.direction}, {comparison.threads} thread(s)",
        f"the least that it moves is {size(comparison.bytes_moved)}; a copy here moves "
        f"{comparison.bandwidth / 1e6:.3g} GB/s",
    ]
    if comparison.rate is not None:
        lines.append(
            f"the least that it computes is {comparison.operations / 1e9:.3g} GFLOP; a square product here "
            f"does {comparison.rate / 1e6:.3g} GFLOP/s"
        )
    for each in comparison.profiled:
        lines.append(
            f"\n{each.name}: {each.median_ms:.4g} ms ({each.p20_ms:.4g} .. {each.p80_ms:.4g}), "
            f"{each.share_of_limit:.1%} of the limit, peak {size(each.trace.peak_bytes)} in tensors, "
            f"{size(each.peak_rss_bytes)} resident"
        )
        lines.append(f"  {'self ms':>10} {'calls':>6}  kernel")
        kernels = each.trace.kernels()[:_SHOWN]
        lines += [f"  {taken:>10.4f} {calls:>6}  {name}" for name, calls, taken in kernels]
        lines.append(f"  {'allocated':>10} {'times':>6}  by")
        rows = each.trace.allocations[:_SHOWN]
        lines += [f"  {size(row.nbytes):>10} {row.count:>6}  {row.name}" for row in rows]
    return lines
