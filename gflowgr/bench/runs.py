"""A run: every implementation checked, then timed in turns, its memory taken, and its row written."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from gflowgr.bench import memory, timing
from gflowgr.bench.case import Call, Case
from gflowgr.bench.checks import WrongResultError, check, expected
from gflowgr.bench.plans import Plan, plan, problem_of
from gflowgr.bench.problems import Inputs, Problem
from gflowgr.bench.table import (
    GRAPH,
    LINE,
    TITLES,
    Measurement,
    append_rows,
    csv_row,
    machine,
    table_line,
    trie_line,
)

PASSES = ("forward", "forward+backward")
LONG_MS = 1000.0  # memory is taken of one such call, of several shorter ones


@dataclass(frozen=True)
class Report:
    """What was measured, which results were wrong, and what could not be measured and why."""

    measurements: list[Measurement] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def implementations(case: Case, problem: Problem, sets: list[Inputs]) -> dict[str, Call]:
    """The op (""), its definition and the baselines that run here, ready for these inputs."""
    offered, _ = case.offered(problem)
    ready = {name: baseline.ready(problem, sets) for name, baseline in offered.items()}
    return {"": case.candidate, "reference": case.definition, **ready}


def check_all(case: Case, problem: Problem, runs: dict[str, Call], inputs: Inputs) -> None:
    """Compares each implementation that claims to compute the same with the definition at float64.

    Raises:
        WrongResultError: the op or a baseline is wrong; the message says which.
    """
    exact = expected(case, problem, inputs)
    for name, run in runs.items():
        if name in case.baselines and not case.baselines[name].checked:
            continue
        try:
            check(case, run, problem, inputs, exact)
        except WrongResultError as error:
            raise WrongResultError(f"{name or 'the op'}: {error}") from error


def measure(
    case: Case, problem: Problem, threads: int, rounds: int, seconds: float, limits: timing.Limits
) -> list[Measurement]:
    """Checks the op and its baselines on one fresh input, then times them on others, in turn.

    Raises:
        WrongResultError: the op or a baseline is wrong; nothing of the case is reported then.
    """
    fresh = case.inputs(problem)
    sets = timing.input_sets(case, problem, rounds)
    runs = implementations(case, problem, [fresh, *sets])
    check_all(case, problem, runs, fresh)
    del fresh
    # Garbage that is collected while memory is taken would hide what a call takes.
    gc.collect()
    cuda = problem.device.type == "cuda"
    label = problem.configuration.label + (f":nodes={problem.trie.num_nodes}" if case.builds_trie else "")
    found = []
    for direction in PASSES if case.gradients else PASSES[:1]:
        backward = direction != "forward"
        calls = {name: timing.timed_call(case, run, problem, backward) for name, run in runs.items()}
        times = {
            (direction, name): taken
            for name, taken in timing.paired_rounds(calls, sets, rounds, seconds, cuda).items()
        }
        if cuda:
            replays = _replayed(f"{case.op}, {direction}", calls, sets, problem, rounds, seconds)
            times |= {(direction + GRAPH, name): taken for name, taken in replays.items()}
        least = limits.least_ms(case, problem, sets[0], backward)
        peaks = {
            name: problem.trie.nbytes if case.builds_trie else memory.peak_bytes(partial(call, sets[0]), cuda)
            for name, call in calls.items()
        }
        for (timed, name), taken in times.items():
            median = statistics.median(taken)
            once = partial(calls[name], sets[0])
            resident = 0 if cuda else memory.peak_rss_bytes(once, repeats=1 if median > LONG_MS else 3)
            found.append(
                Measurement(
                    op=case.op,
                    config=label,
                    dtype=str(problem.dtype).removeprefix("torch."),
                    backend=problem.backend,
                    baseline=name,
                    threads=threads,
                    direction=timed,
                    median_ms=median,
                    p20_ms=float(np.quantile(taken, 0.2)),
                    p80_ms=float(np.quantile(taken, 0.8)),
                    ratio=statistics.median(
                        mine / own for mine, own in zip(taken, times[timed, ""], strict=True)
                    ),
                    peak_bytes=peaks[name],
                    peak_rss_bytes=resident,
                    bytes_moved=case.bytes_moved(problem, sets[0], backward),
                    share_of_limit=least / median,
                )
            )
    return found


def _replayed(
    what: str,
    calls: dict[str, timing.TimedCall],
    sets: list[Inputs],
    problem: Problem,
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Milliseconds of the calls that can be captured; none if the op itself cannot."""
    graphs = {}
    for name in timing.CAPTURABLE:
        if name not in calls:
            continue
        try:
            graphs[name] = timing.captured(calls[name], sets, problem.generator)
        except RuntimeError as error:
            warnings.warn(f"{what}, {name or 'the op'}: not captured, {error}", stacklevel=2)
            if not name:
                return {}
    return timing.paired_rounds(graphs, sets, rounds, seconds, True)


def run(plan: Plan, write: Callable[[str], None] = print) -> Report:
    """Measures what `plan` asks for, hands `write` the table line by line and appends it to `plan.output`."""
    where = machine(plan.device)
    versions = ("gflowgr", "commit", "torch", "triton")
    write(", ".join(f"{name} {where[name] or 'none'}" for name in versions))
    write(f"{where['cpu']}; device {where['device']}; {plan.rounds} rounds; seed {plan.seed}")
    report = Report(skipped=list(plan.skipped))
    before = torch.get_num_threads()
    try:
        limits = {threads: timing.limits_here(plan.device, threads) for threads in plan.threads}
        for threads, limit in limits.items():
            write(f"{threads} thread(s): a copy moves {limit.bandwidth / 1e6:.3g} GB/s")
        for skipped in plan.skipped:
            write(f"not measured: {skipped}")
        write("\n" + LINE.format(*TITLES))
        for job in plan.jobs:
            problem = problem_of(job, plan.device, plan.seed, plan.compiles)
            for missing in job.case.offered(problem)[1]:
                if missing not in report.skipped:
                    report.skipped.append(missing)
                    write(f"not measured: {missing}")
            for threads in plan.threads:
                torch.set_num_threads(threads)
                problem.generator.manual_seed(plan.seed)
                try:
                    found = measure(job.case, problem, threads, plan.rounds, plan.seconds, limits[threads])
                except WrongResultError as error:
                    report.refused.append(f"{job}, {threads} thread(s), seed {plan.seed}: {error}")
                    write(f"REFUSED {report.refused[-1]}")
                    continue
                report.measurements.extend(found)
                write("\n".join(map(table_line, found)))
                if job.case.builds_trie:
                    write(trie_line(problem.trie))
                if plan.output is not None:
                    append_rows(plan.output, [csv_row(measurement, where) for measurement in found])
    finally:
        torch.set_num_threads(before)
    return report


def benchmark(*, write: Callable[[str], None] = print, **arguments: Any) -> Report:
    """What `gflowgr bench` does: `run(plan(**arguments), write)`; `plan` says what the arguments are."""
    return run(plan(**arguments), write)
