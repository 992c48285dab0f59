"""benchmarks/generation.py at a small size: its check passes, and fails on wrong scores and worse lists."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gflowgr.backbones import build_decoder, build_t5
from gflowgr.bench.table import append_rows
from gflowgr.search import Generated
from gflowgr.semantic_ids import SemanticIds

ROOT = Path(__file__).parent.parent


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generation_benchmark", ROOT / "benchmarks/generation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()


def case(backbone: str) -> Any:
    generator = torch.Generator().manual_seed(0)
    semantic_ids = SemanticIds(torch.randint(0, 4, (40, 3), generator=generator), codebook_sizes=4)
    build = build_t5 if backbone == "t5" else build_decoder
    model = build(semantic_ids, layers=1, d_model=16, heads=2, d_ff=32, history_length=4).eval()
    return benchmark.Case(backbone, model, benchmark.histories(40, 3, 4), beams=5)


@pytest.mark.parametrize("backbone", ["t5", "decoder"])
def test_a_row_for_everything_that_is_timed(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = benchmark.measure(case(backbone), rounds=1)
    printed = capsys.readouterr().out
    assert printed.count("none a higher one") == 2
    names = [row["what"] for row in rows]
    assert {"HF, prefix function", "HF, our processor", "gflowgr"} <= set(names)
    assert all(name in printed for name in names)
    spent = {row["what"]: float(row["median_ms"]) for row in rows}
    assert all(value > 0 for value in spent.values())
    where = {name: "x" for name in benchmark.COLUMNS if name not in rows[0]}
    append_rows(tmp_path / "table.csv", [where | row for row in rows], benchmark.COLUMNS)
    with (tmp_path / "table.csv").open(newline="") as file:
        assert [row["what"] for row in csv.DictReader(file)] == names


def test_wrong_scores_and_worse_lists_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = case("t5")
    ours = small.by_us()
    with torch.no_grad():
        monkeypatch.setattr(
            benchmark.Case, "by_us", lambda self: Generated(ours.items, ours.log_probs + 0.01)
        )
        with pytest.raises(SystemExit, match="a score of gflowgr is off by"):
            benchmark.check(small)
        last = Generated(ours.items[:, -1:].expand(-1, 5), ours.log_probs[:, -1:].expand(-1, 5))
        monkeypatch.setattr(benchmark.Case, "by_us", lambda self: last)
        with pytest.raises(SystemExit, match="finds a better item"):
            benchmark.check(small)
