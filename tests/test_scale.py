"""The page on scale: its table comes from results, and what is beyond them is computed from those."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from gflowgr import PrefixTrie

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None and spec.loader is not None
    sys.modules["scale"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_what_is_measured(scale: ModuleType) -> None:
    rows = scale.catalogue(3000, seed=0)
    trie = PrefixTrie(rows)
    found = scale.measure(3000, repeats=1)
    assert (found.items, found.nodes) == (3000, trie.num_nodes)
    assert found.bytes_of_trie == trie.nbytes <= found.bytes_of_file
    assert min(found.build_seconds, found.save_seconds, found.load_seconds, found.checked_load_seconds) > 0
    assert min(found.add_seconds, found.remove_seconds) > 0


def test_codes_are_skewed_as_the_page_says(scale: ModuleType) -> None:
    counts = np.sort(np.bincount(scale.catalogue(20_000)[:, 3], minlength=scale.CODES))[::-1]
    expected = np.arange(1, scale.CODES + 1) ** -scale.SKEW
    np.testing.assert_allclose(counts[:20].sum() / 20_000, (expected / expected.sum())[:20].sum(), rtol=0.1)


def test_computed_rows_are_the_largest_measured_one_times_the_items(scale: ModuleType) -> None:
    one = scale.Measured(
        "2026-11-24", "m", 10**6, 6 * 10**6, 2**27, 2**27, 0.5, 2**28, 0.25, 0.01, 0.2, 0.03, 0.04
    )
    small = replace(one, items=10**4, nodes=7 * 10**4, build_seconds=0.001)
    lines = scale.table([one, small]).splitlines()
    assert lines[4].startswith("| 10,000 | 7.00 ")
    assert lines[-1].split(" | ")[0] == "| 100,000,000, computed"
    cells = ["12.5 GiB", "50 s", "25 GiB", "25 s", "10 ms", "20 s", "3 s", "4 s |"]
    assert lines[-1].split(" | ")[3:] == cells


def test_the_page_shows_the_results(scale: ModuleType) -> None:
    with scale.RESULTS.open(newline="") as file:
        measured = [
            scale.Measured(
                **{
                    field: value
                    if field in ("date", "machine")
                    else float(value)
                    if "." in value
                    else int(value)
                    for field, value in row.items()
                }
            )
            for row in csv.DictReader(file)
        ]
    assert scale.BEGIN + scale.table(measured) + scale.END in scale.PAGE.read_text("utf-8")
