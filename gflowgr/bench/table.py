"""The table of measurements: its columns, its file, its lines on the screen."""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import gflowgr
from gflowgr import PrefixTrie

COLUMNS = (
    "date", "commit", "device", "cpu", "torch", "triton", "gflowgr",
    "op", "config", "dtype", "backend", "baseline", "threads", "pass",
    "median_ms", "p20_ms", "p80_ms", "ratio", "peak_bytes", "peak_rss_bytes", "bytes_moved", "share_of_limit",
)  # fmt: skip

GRAPH = ", graph"  # ends a pass that is the replay of a captured CUDA graph


@dataclass(frozen=True)
class Measurement:
    """One implementation of one case: a row of the table. `baseline` is "" for the op itself."""

    op: str
    config: str
    dtype: str
    backend: str
    baseline: str
    threads: int
    direction: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    peak_bytes: int
    peak_rss_bytes: int
    bytes_moved: int
    share_of_limit: float


def appendable(path: Path) -> Path:
    if not path.parent.is_dir():
        raise ValueError(f"output is {str(path)!r}, needs a file in a folder that exists")
    if path.is_dir() or (path.exists() and _header(path) != list(COLUMNS)):
        raise ValueError(
            f"output {str(path)!r} is no table of benchmarks, whose first line is {','.join(COLUMNS)}"
        )
    return path


def _header(path: Path) -> list[str]:
    with path.open(newline="", errors="replace") as file:
        return next(csv.reader(file), [])


def append_rows(path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str] = COLUMNS) -> None:
    """Appends to the table at `path`, or makes it; an interruption leaves the table as it was."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    writer.writerows(rows)
    before = path.read_bytes() if path.exists() else b""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(before + text.getvalue().encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def machine(device: torch.device) -> dict[str, str]:
    """The columns that say where and with what a run was made."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "gflowgr": gflowgr.__version__,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the checkout that this file runs from, "" when it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "gflowgr", "kernels", "csrc")
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def csv_row(measurement: Measurement, where: Mapping[str, str]) -> dict[str, str]:
    values = {"pass": measurement.direction, **vars(measurement)}
    texts = {
        name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in values.items()
    }
    return {name: where[name] if name in where else texts[name] for name in COLUMNS}


LINE = "{:<27} {:<16} {:<9} {:<7} {:<16} {:>3}  {:<17}{:>10}{:>10}{:>10}{:>9}{:>10}{:>10}{:>10}{:>8}"
TITLES = (
    "op", "config", "dtype", "backend", "pass", "thr", "",
    "median ms", "p20", "p80", "ratio", "peak", "rss", "moves", "limit",
)  # fmt: skip


def table_line(measurement: Measurement) -> str:
    """A line of the printed table; a baseline's does not repeat what the op's above it says."""
    m = measurement
    what = ("",) * 6 if m.baseline else (m.op, m.config, m.dtype, m.backend, m.direction, m.threads)
    times = (f"{value:.4g}" for value in (m.median_ms, m.p20_ms, m.p80_ms))
    sizes = map(size, (m.peak_bytes, m.peak_rss_bytes, m.bytes_moved))
    rest = (f"{m.ratio:.2f}x", *sizes, f"{m.share_of_limit:.1%}")
    return LINE.format(*what, m.baseline or "gflowgr", *times, *rest)


def trie_line(trie: PrefixTrie) -> str:
    each_node, each_item = trie.nbytes / trie.num_nodes, trie.nbytes / trie.num_items
    sizes = f"{each_node:.1f} bytes a node, {each_item:.1f} an item"
    return f"  {trie.num_items} items, {trie.num_nodes} nodes: {sizes}"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
