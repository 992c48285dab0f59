"""`gflowgr bench --plot`: that README and figures say what the table of results says."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gflowgr import bench
from gflowgr.bench import figures, plots, results
from gflowgr.bench.table import COLUMNS

ROOT = Path(__file__).parents[1]
README = "# A package\n\nBefore.\n\n<!-- bench:begin -->\nold\n<!-- bench:end -->\n\nAfter.\n"


def row(op: str, baseline: str, ratio: float, **more: object) -> dict[str, str]:
    values: dict[str, object] = {
        "date": "2026-01-02T00:00:00+00:00", "commit": "abc", "device": "cpu", "cpu": "A processor, 2 cores",
        "torch": "2.9", "op": op, "config": "1", "dtype": "float32", "backend": "cpp", "baseline": baseline,
        "threads": 1, "pass": "forward", "median_ms": 0.1234 * ratio, "p20_ms": 0.1 * ratio,
        "p80_ms": 0.2 * ratio, "ratio": ratio, "peak_bytes": 1000, "peak_rss_bytes": 0, "bytes_moved": 10,
        "share_of_limit": 0.5, **more,
    }  # fmt: skip
    return {name: str(values.get(name, "")) for name in COLUMNS}


ROWS = [
    row("trie_sample", "", 1, date="2026-01-01T00:00:00+00:00", median_ms=77),
    row("trie_sample", "reference", 99, date="2026-01-01T00:00:00+00:00"),
    row("trie_sample", "hf_prefix", 1.5, date="2026-01-01T00:00:00+00:00"),
    row("trie_sample", "", 1),
    row("trie_sample", "reference", 8),
    row("trie_sample", "dense_mask", 21.26),
    row("trie_sample", "padded_csr", 4.04),
    row("trie_sample", "xgrammar", 6),
    row("trie_sample", "searchsorted", 2),
    row("trie_sample", "floor", 0.5),
    row("trie_sample", "", 1, threads=2, median_ms=55),
    row("trie_trajectory_balance", "", 1, peak_rss_bytes=5000),
    row("trie_trajectory_balance", "reference", 3),
    row("trie_trajectory_balance", "eager_tb", 5),
    row("trie_log_flows", "", 1, **{"pass": "forward+backward"}),
    row("trie_log_flows", "reference", 3, **{"pass": "forward+backward"}),
    row("trie_sample", "", 1, device="A GPU", median_ms=0.01),
    row("trie_sample", "", 1, device="A GPU", median_ms=0.001, **{"pass": "forward, graph"}),
    row("trie_sample", "", 1, config="4:items=10000", median_ms=66),
    row("trie_sample", "floor", 2, config="4:items=10000"),
    row("trie_sample", "", 1, config="4:items=100000", median_ms=66),
]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs").mkdir()
    write(tmp_path, ROWS)
    return tmp_path


def write(checkout: Path, rows: list[dict[str, str]]) -> None:
    path = checkout / plots.TABLE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def lines(block: str) -> list[list[str]]:
    found = [line for line in block.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found]


def test_the_table_shows_the_latest_run_of_each_setting(checkout: Path) -> None:
    block = plots.readme_table(results.read_results(checkout / plots.TABLE))
    on_gpu, *on_cpu = lines(block)
    assert on_gpu[:1] == ["`trie_sample`"] and on_gpu[4].startswith("0.01 ")
    assert on_cpu == [
        ["`trie_sample`", "1", "float32", "forward", "0.12 (0.1 .. 0.2)", "8", "21", "4 (`padded_csr`)"],
        ["`trie_trajectory_balance`", "1", "float32", "forward", "0.12 (0.1 .. 0.2)", "3", "5", plots.NONE],
        ["`trie_log_flows`", "1", "float32", "forward+backward", "0.12 (0.1 .. 0.2)", "3", *[plots.NONE] * 2],
    ]
    assert block.index("A GPU; torch 2.9") < block.index("A processor, 2 cores; 1 thread, torch 2.9")
    assert "77" not in block and "55" not in block and "66" not in block


def test_plotting_then_checking_agrees_and_a_changed_number_does_not(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    command = ["--plot", str(checkout)]
    assert bench.main([*command, "--check"]) == 1
    assert bench.main(command) == 0
    assert bench.main([*command, "--check"]) == 0
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("# A package\n\nBefore.\n\n<!-- bench:begin -->\n")
    assert readme.endswith("\n<!-- bench:end -->\n\nAfter.\n") and "old" not in readme
    assert bench.main(command) == 0 and (checkout / "README.md").read_text() == readme
    capsys.readouterr()
    (checkout / "README.md").write_text(readme.replace("4 (`padded_csr`)", "40 (`padded_csr`)"))
    assert bench.main([*command, "--check"]) == 1
    assert "README.md does not show the results" in capsys.readouterr().err
    (checkout / "README.md").write_text(readme)
    write(checkout, [*ROWS, row("trie_sample", "", 1, date="2026-02-01T00:00:00+00:00")])
    assert bench.main([*command, "--check"]) == 1


def test_figures_are_named_there_and_the_same_each_time(checkout: Path) -> None:
    pytest.importorskip("matplotlib")
    written = plots.plot(checkout, lambda line: None)
    names = {path.name for path in written}
    assert names == {"README.md", "bench-speed.svg", "bench-memory.svg", "bench-catalogue.svg"}
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (checkout / "README.md").read_text())
    assert len(pictures) == 3
    before = {name: (checkout / name).read_text() for name in pictures}
    for text in before.values():
        assert ElementTree.fromstring(text).tag.endswith("svg") and len(text) < 200_000
    plots.plot(checkout, lambda line: None)
    assert {name: (checkout / name).read_text() for name in pictures} == before
    (checkout / pictures[0]).unlink()
    assert "is missing" in str(plots.disagreement(checkout))


def test_memory_is_the_larger_of_what_pytorch_and_the_system_saw(checkout: Path) -> None:
    found = {each.op: each for each in results.read_results(checkout / plots.TABLE)}
    assert found["trie_trajectory_balance"].memory("") == 5000
    assert found["trie_log_flows"].memory("") == 1000


def test_figures_show_the_backward_pass_where_there_is_one() -> None:
    both = [
        results.Result(
            "op", "1", "float32", direction, "cpu", {"": row("op", "", 1), "reference": row("op", "", 2)}
        )
        for direction in ("forward", "forward+backward")
    ]
    assert [each.direction for each in figures.drawn_in_rows(both)] == ["forward+backward"]
    assert [each.direction for each in figures.drawn_in_rows(reversed(both))] == ["forward+backward"]


def test_an_empty_table_draws_nothing(checkout: Path) -> None:
    write(checkout, [])
    assert plots.plot(checkout, lambda line: None) == [checkout / "README.md"]
    assert "has no rows yet" in (checkout / "README.md").read_text()
    assert plots.disagreement(checkout) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "README.md").unlink(), "needs a checkout with a README.md"),
        (lambda root: (root / "README.md").write_text("# None\n"), "needs a README with the lines"),
        (lambda root: (root / "README.md").write_text(README + README), "once each"),
        (lambda root: (root / plots.TABLE).unlink(), "which is no file"),
        (lambda root: (root / plots.TABLE).write_text("a,b\n"), "has not the columns"),
    ],
)
def test_what_is_no_checkout_exits_with_2(
    checkout: Path, capsys: pytest.CaptureFixture[str], spoil, message: str
) -> None:
    spoil(checkout)
    for more in ([], ["--check"]):
        assert bench.main(["--plot", str(checkout), *more]) == 2
        assert message in capsys.readouterr().err


def test_checking_goes_with_plotting(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--check"]) == 2
    assert "check goes with plot" in capsys.readouterr().err


def test_the_readme_of_the_repository_agrees_with_its_results() -> None:
    if not (ROOT / plots.TABLE).is_file():
        pytest.skip("the tests run outside a checkout")
    assert plots.disagreement(ROOT) is None
