"""How a trie grows with its catalogue: bytes and times measured; for larger catalogues, computed.

    python benchmarks/scale.py --items 1e4 1e5 1e6            # prints the table
    python benchmarks/scale.py --items 1e4 1e5 1e6 --write    # and writes results/scale.csv and docs/scale.md

Items are LEVELS codes, each drawn from CODES with probability proportional to rank^-SKEW. Memory is read from
Linux's /proc.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np
import torch

from gflowgr import PrefixTrie

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "scale.csv", ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"
LEVELS, CODES, SKEW = 8, 2048, 0.7
COMPUTED = (10_000_000, 100_000_000)
CHANGED = 1000


@dataclass(frozen=True)
class Measured:
    date: str
    machine: str
    items: int
    nodes: int
    bytes_of_trie: int
    bytes_of_file: int
    build_seconds: float
    bytes_of_build: int  # the peak, beside the input
    save_seconds: float
    load_seconds: float
    checked_load_seconds: float  # every byte read
    add_seconds: float  # of CHANGED items
    remove_seconds: float


def catalogue(items: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = np.arange(1, CODES + 1) ** -SKEW
    bounds = np.cumsum(weights / weights.sum())
    rows = np.empty((items, LEVELS), dtype=np.int32)
    for level in range(LEVELS):
        rows[:, level] = rng.permutation(CODES)[np.searchsorted(bounds[:-1], rng.random(items))]
    return rows


def resident(field: str) -> int:
    """Bytes, of a line of /proc/self/status such as VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no line {field}")


def measure(items: int, repeats: int) -> Measured:
    rows = catalogue(items)
    seconds, peak = [], 0
    for _ in range(repeats):
        Path("/proc/self/clear_refs").write_text("5")
        before, start = resident("VmRSS"), time.perf_counter()
        trie = PrefixTrie(rows)
        seconds.append(time.perf_counter() - start)
        peak = max(peak, resident("VmHWM") - before)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trie"
        start = time.perf_counter()
        trie.save(path)
        saved = time.perf_counter()
        PrefixTrie.load(path)
        loaded = time.perf_counter()
        PrefixTrie.load(path, verify=True)
        checked = time.perf_counter()
        size = path.stat().st_size
    new = catalogue(CHANGED, seed=1)
    adds, removes = [], []
    for _ in range(repeats):
        unchanged = time.perf_counter()
        more = trie.add(new)
        added = time.perf_counter()
        more.remove(range(0, items, items // CHANGED)[:CHANGED])
        adds.append(added - unchanged)
        removes.append(time.perf_counter() - added)
    return Measured(
        date=date.today().isoformat(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        items=items,
        nodes=trie.num_nodes,
        bytes_of_trie=trie.nbytes,
        bytes_of_file=size,
        build_seconds=min(seconds),
        bytes_of_build=peak,
        save_seconds=saved - start,
        load_seconds=loaded - saved,
        checked_load_seconds=checked - loaded,
        add_seconds=statistics.median(adds),
        remove_seconds=statistics.median(removes),
    )


def amount(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2g} ms" if seconds < 0.1 else f"{seconds:.2g} s"


def table(measured: Iterable[Measured]) -> str:
    rows = sorted(measured, key=lambda row: row.items)
    last = rows[-1]
    lines = [
        f"{LEVELS} codes of {CODES}, drawn with probability ∝ rank^-{SKEW}; {last.machine}, {last.date}:",
        "",
        "| items | nodes an item | bytes a node | trie | build | peak of the build | save | load "
        f"| load, checked | add {CHANGED:,} | remove {CHANGED:,} |",
        "|" + " --- |" * 11,
    ]
    for row in rows:
        cells = [
            f"{row.items:,}",
            f"{row.nodes / row.items:.2f}",
            f"{row.bytes_of_trie / row.nodes:.2f}",
            amount(row.bytes_of_trie),
            duration(row.build_seconds),
            amount(row.bytes_of_build),
            duration(row.save_seconds),
            duration(row.load_seconds),
            duration(row.checked_load_seconds),
            duration(row.add_seconds),
            duration(row.remove_seconds),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for items in COMPUTED:
        if items <= last.items:
            continue
        times = items / last.items
        cells = [
            f"{items:,}, computed",
            f"{last.nodes / last.items:.2f}",
            f"{last.bytes_of_trie / last.nodes:.2f}",
            amount(last.bytes_of_trie * times),
            duration(last.build_seconds * times),
            amount(last.bytes_of_build * times),
            duration(last.save_seconds * times),
            duration(last.load_seconds),
            duration(last.checked_load_seconds * times),
            duration(last.add_seconds * times),
            duration(last.remove_seconds * times),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def write(measured: list[Measured]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_name(f".{RESULTS.name}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, measured))
    temporary.replace(RESULTS)
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} has no place for the table, needs the lines {BEGIN!r} and {END!r}")
    replace_text(PAGE, f"{before}{BEGIN}{table(measured)}{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=float, nargs="+", default=[1e4, 1e5, 1e6], help="sizes to measure")
    parser.add_argument(
        "--repeats", type=int, default=3, help="builds of each size, of which the fastest counts"
    )
    parser.add_argument("--write", action="store_true", help="write the results and the page's table")
    options = parser.parse_args()
    measured = [measure(int(items), options.repeats) for items in sorted(options.items)]
    print(table(measured), end="")
    if options.write:
        write(measured)


if __name__ == "__main__":
    main()
