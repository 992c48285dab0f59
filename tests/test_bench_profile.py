"""`gflowgr bench --profile`: that the trace is read right, and that the page shows it without help."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gflowgr import bench, ops
from gflowgr.bench import profile_page, profiling, timing

CODES = np.array([[a, b, c] for a in range(4) for b in range(a + 1) for c in range(0, 5, 1 + b)])
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e7)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e8)
    monkeypatch.setattr(timing, "BLOCK_MS", 0.01)
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    np.save(tmp_path / "small.npy", CODES)
    catalogue = ["--codes", str(tmp_path / "small.npy"), "--rows", "12", "--vocab", "20", "--hidden", "8"]
    return [
        *catalogue, "--device", "cpu", "--threads", "1", "--rounds", "2",
        "--profile", str(tmp_path / "profile"), "--config", "1",
    ]  # fmt: skip


def event(name: str, begin: float, duration: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": name, "ts": begin, "dur": duration, "tid": 1, **more}


def memory(moment: float, count: int, device: int = 0) -> dict[str, Any]:
    return {
        "ph": "i",
        "name": "[memory]",
        "ts": moment,
        "tid": 1,
        "args": {"Bytes": count, "Device Type": device},
    }


EVENTS = {
    "traceEvents": [
        event("measured: gflowgr", 1000, 100, cat="user_annotation"),
        event("measured: reference", 2000, 500, cat="user_annotation"),
        event("outer", 1010, 80),
        event("inner", 1020, 30),
        event("inner", 1055, 10),
        event("innermost", 1025, 5),
        event("elsewhere", 2010, 400),
        event("kernel of a device", 1030, 25, cat="kernel", tid=7),
        memory(1022, 100),
        memory(1060, 50),
        memory(1070, -100),
        memory(1095, -50),
        memory(1003, 8),
        memory(2020, 4096),
        memory(1040, 1 << 20, device=1),
    ]
}


def test_a_trace_is_cut_to_the_call_and_nested() -> None:
    trace = profiling.read_trace(EVENTS, "gflowgr", cuda=False)
    assert trace.duration_ms == pytest.approx(0.1)
    found = {(span.name, round(span.start_ms * 1e3)): span for span in trace.spans if span.lane == "cpu"}
    assert {key: span.depth for key, span in found.items()} == {
        ("outer", 10): 0, ("inner", 20): 1, ("innermost", 25): 2, ("inner", 55): 1
    }  # fmt: skip
    own = {key: round(span.self_ms * 1e3) for key, span in found.items()}
    assert own == {("outer", 10): 40, ("inner", 20): 25, ("innermost", 25): 5, ("inner", 55): 10}


def test_memory_is_what_is_held_after_each_change() -> None:
    trace = profiling.read_trace(EVENTS, "gflowgr", cuda=False)
    assert [held for _, held in trace.held] == [0, 8, 108, 158, 58, 8]
    assert trace.peak_bytes == 158
    assert {(row.name, row.count, row.nbytes) for row in trace.allocations} == {
        ("inner", 2, 150), ("outside of operators", 1, 8)
    }  # fmt: skip
    assert profiling.read_trace(EVENTS, "gflowgr", cuda=True).peak_bytes == 1 << 20


def test_kernels_are_those_of_the_device_where_it_has_any() -> None:
    on_device = profiling.read_trace(EVENTS, "gflowgr", cuda=True).kernels()
    assert [(name, calls) for name, calls, _ in on_device] == [("kernel of a device", 1)]
    (row,) = profiling.read_trace(EVENTS, "reference", cuda=False).kernels()
    assert row[:2] == ("elsewhere", 1) and row[2] == pytest.approx(0.4)


def test_time_of_kernels_adds_up_by_name() -> None:
    host = {"traceEvents": [each for each in EVENTS["traceEvents"] if each.get("cat") != "kernel"]}
    rows = profiling.read_trace(host, "gflowgr", cuda=False).kernels()
    assert [(name, calls, round(taken * 1e3)) for name, calls, taken in rows] == [
        ("outer", 1, 40), ("inner", 2, 35), ("innermost", 1, 5)
    ]  # fmt: skip


@pytest.mark.parametrize("op", ["trie_token_log_probs", "trie_linear_token_log_probs", "trie_sample"])
def test_a_profile_prints_kernels_and_writes_trace_and_page(
    op: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*arguments, "--op", op]) == 0
    written = sorted(path.name for path in (tmp_path / "profile").iterdir())
    assert [name.partition(".")[2] for name in written] == ["html", "trace.json"]
    printed = capsys.readouterr().out
    assert "gflowgr: " in printed and "reference: " in printed and "of the limit" in printed
    assert "aten::" in printed and "allocated" in printed
    trace = json.loads((tmp_path / "profile" / written[1]).read_text())
    marks = [each["name"] for each in trace["traceEvents"] if each.get("cat") == "user_annotation"]
    assert marks.count("measured: gflowgr") == marks.count("measured: reference") == 1
    page = (tmp_path / "profile" / written[0]).read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", page)
    assert page.count("<svg") == page.count("</svg>") == 5
    names = {
        each["name"] for each in trace["traceEvents"] if each.get("cat") == "cpu_op" and "::" in each["name"]
    }
    assert sum(name in page for name in names) > len(names) / 2


def test_a_profile_is_of_one_op_and_one_configuration(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main([*arguments, "--op", "trie_sample", "trie_log_softmax"]) == 2
    assert "profile takes one op and one configuration" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


def test_a_wrong_op_is_not_profiled(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = ops.trie_token_log_probs
    monkeypatch.setattr(ops, "trie_token_log_probs", lambda *args, **named: right(*args, **named) - 0.05)
    assert bench.main([*arguments, "--op", "trie_token_log_probs"]) == 1
    assert "the result is off by" in capsys.readouterr().err
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(2e-4, "200 ns"), (0.0123456, "12.3 \N{MICRO SIGN}s"), (3.5, "3.5 ms"), (1234.0, "1.23 s")],
)
def test_durations_have_their_unit(milliseconds: float, text: str) -> None:
    assert profile_page.duration(milliseconds).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize("largest", [0.0, 0.037, 1.0, 26.2, 7e6])
def test_ticks_are_few_and_round(largest: float) -> None:
    ticks = profile_page._ticks(largest)
    assert ticks[0] == 0 and ticks[-1] <= largest and len(ticks) <= 7
    assert largest == 0 or ticks[-1] >= largest / 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_without_a_complaint(width: int, arguments: list[str], tmp_path: Path) -> None:
    assert bench.main([*arguments, "--op", "trie_token_log_probs"]) == 0
    (page,) = (tmp_path / "profile").glob("*.html")
    question = """<script>addEventListener("load", () => {
      const root = document.documentElement;
      root.dataset.overflow = root.scrollWidth - innerWidth;
      root.dataset.charts = [...document.querySelectorAll("svg")].filter(s => s.getBBox().width > 0).length;
    });</script>"""
    page.write_text(page.read_text("utf-8").replace("</body>", question + "</body>"), encoding="utf-8")
    seen = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'browser'}", f"--window-size={width},900",
            "--virtual-time-budget=5000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert seen.returncode == 0, seen.stderr
    assert "CONSOLE" not in seen.stderr
    asked = dict(re.findall(r'data-(overflow|charts)="([^"]*)"', seen.stdout))
    assert asked["charts"] == "5"
    assert int(asked["overflow"]) <= 0
