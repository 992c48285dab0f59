"""The most memory that a call holds, as PyTorch and as the system sees it."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], cuda: bool) -> int:
    """The most memory that tensors made by `run` held at once."""
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler,
    ):
        run()
    trace = chrome_trace(profiler)["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in trace if event.get("name") == "[memory]"
    )
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def chrome_trace(profiler: torch.profiler.profile) -> dict[str, Any]:
    """What a profiler recorded, in the format of chrome://tracing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace: dict[str, Any] = json.loads(path.read_text())
    return trace


def peak_rss_bytes(run: Callable[[], Any], repeats: int = 3) -> int:
    """By how much the process's resident memory grew at most during `run`, 0 where the system does not tell.

    Linux keeps the high-water mark and lets a process reset its own. The allocator's free pages go back
    first, else what `run` takes of them would not show; the least of several calls is told, since whatever
    else the process does can only add to it. The system counts in batches, of some hundred kB.
    """
    growths = []
    for _ in range(repeats):
        _return_free_memory()
        if not _reset_high_water_mark():
            return 0
        before = _resident_bytes("VmRSS")
        run()
        growths.append(_resident_bytes("VmHWM") - before)
    return max(0, min(growths))


def _return_free_memory() -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


@contextmanager
def silent_stderr() -> Iterator[None]:
    """The profiler's C++ logs two lines each time, past Python's sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(sink)
        os.close(kept)
