"""Milliseconds of several implementations, paired in rounds, and the speed of the machine."""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from gflowgr.bench.case import Call, Case
from gflowgr.bench.checks import upstream, with_gradients
from gflowgr.bench.problems import Inputs, Problem

TimedCall = Callable[[Inputs], Any]

ROTATED_BYTES = 64 * 2**20  # what a case's input sets should add up to: beyond the usual last-level cache
BLOCK_MS = 2.0  # a timed block repeats a short call until it lasts this long
WARM_UP_MS = 200.0  # an implementation is warm after three calls or this long
LEAST_ROUNDS = 3


def _block_ms(call: TimedCall, sets: Sequence[Inputs], first: int, count: int, cuda: bool) -> float:
    """Milliseconds a call, over `count` calls that take the input sets in turn."""
    if cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for index in range(first, first + count):
            call(sets[index % len(sets)])
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / count
    started = time.perf_counter_ns()
    for index in range(first, first + count):
        call(sets[index % len(sets)])
    return (time.perf_counter_ns() - started) / count / 1e6


def paired_rounds(
    calls: Mapping[str, TimedCall], sets: Sequence[Inputs], rounds: int, seconds: float, cuda: bool
) -> dict[str, list[float]]:
    """Milliseconds a call of each implementation in each round; a round runs all, another one first.

    Rounds end after `seconds`, but not before the third.
    """
    repeats = {name: _warm_up(call, sets, cuda) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    collects = gc.isenabled()
    gc.disable()
    started = time.perf_counter()
    try:
        for turn in range(rounds):
            if turn >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
                break
            for name in order:
                times[name].append(_block_ms(calls[name], sets, turn * repeats[name], repeats[name], cuda))
            order.append(order.pop(0))
    finally:
        if collects:
            gc.enable()
    return times


def _warm_up(call: TimedCall, sets: Sequence[Inputs], cuda: bool) -> int:
    """Calls until it is warm; how many calls make a timed block."""
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < WARM_UP_MS:
        taken.append(_block_ms(call, sets, len(taken), 1, cuda))
    return max(1, math.ceil(BLOCK_MS / max(taken[-1], 1e-6)))


# Implementations that are captured, unless they wait for the device after all.
CAPTURABLE = ("", "floor", "dense_mask", "eager_tb", "padded_csr", "searchsorted")


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Whatever waits for the GPU in here raises a RuntimeError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(call: TimedCall, sets: Sequence[Inputs], generator: torch.Generator) -> TimedCall:
    """The same as the replay of a CUDA graph for each input set: what the device does, without its launches.

    Raises:
        RuntimeError: the call, which has to be warm, waits for the device.
    """
    # A capture that fails leaves the allocator and the generator as they should not be.
    with waiting_is_an_error():
        for inputs in sets:
            call(inputs)
    graphs = {}
    for inputs in sets:
        graphs[id(inputs)] = graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            call(inputs)
    return lambda inputs: graphs[id(inputs)].replay()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a millisecond that a copy reads and writes here, at the number of threads in force."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    times = paired_rounds({"copy": lambda _: target.copy_(source)}, [{}], 9, 2.0, device.type == "cuda")[
        "copy"
    ]
    return 2 * source.nbytes / statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a millisecond that a square matrix product does here."""
    size = 8192 if device.type == "cuda" else 1024
    # Of random numbers: a GPU multiplies ones and zeros faster.
    left = torch.randn(size, size, device=device).to(dtype)
    times = paired_rounds({"matmul": lambda _: left @ left}, [{}], 5, 2.0, device.type == "cuda")["matmul"]
    return 2 * size**3 / statistics.median(times)


def input_sets(case: Case, problem: Problem, rounds: int) -> list[Inputs]:
    sets = [with_gradients(case, case.inputs(problem))]
    size = sum(value.nbytes for value in sets[0].values())
    wanted = min(max(3, math.ceil(ROTATED_BYTES / max(size, 1))), 16, max(rounds, 2))
    return sets + [with_gradients(case, case.inputs(problem)) for _ in range(wanted - 1)]


def timed_call(case: Case, run: Call, problem: Problem, backward: bool) -> TimedCall:
    def forward(inputs: Inputs) -> None:
        with torch.no_grad():
            run(problem, inputs)

    def both(inputs: Inputs) -> None:
        result = run(problem, inputs)
        wanted = [inputs[name] for name in case.gradients]
        torch.autograd.grad(result, wanted, upstream(result, inputs), allow_unused=True)

    return both if backward else forward


@dataclass(frozen=True)
class Limits:
    """What this machine does at a number of threads: bytes and operations a millisecond."""

    bandwidth: float
    rate: Callable[[torch.dtype], float]

    def least_ms(self, case: Case, problem: Problem, inputs: Inputs, backward: bool) -> float:
        moving = case.bytes_moved(problem, inputs, backward) / self.bandwidth
        if case.operations is None:
            return moving
        return max(moving, case.operations(problem, inputs, backward) / self.rate(problem.dtype))


def limits_here(device: torch.device, threads: int) -> Limits:
    torch.set_num_threads(threads)
    return Limits(copy_bandwidth(device), cache(partial(_matmul_rate_at, device, threads)))


def _matmul_rate_at(device: torch.device, threads: int, dtype: torch.dtype) -> float:
    torch.set_num_threads(threads)
    return matmul_rate(device, dtype)
