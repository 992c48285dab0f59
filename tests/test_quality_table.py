"""The table: means, paired differences and the verdict, against definitions spelt out in plain Python."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_cells import a_cell, metrics_of

from gflowgr import cli
from gflowgr.quality.pairing import common_seeds, paired_difference
from gflowgr.quality.results import Cell
from gflowgr.quality.table import make_table, read_tables, verdict
from gflowgr.quality.table_text import columns, entries, markdown

RNG_RANKS = np.random.default_rng(0).integers(0, 11, size=(12, 60)).tolist()


def gain_of(place: int) -> float:
    return 1 / math.log2(1 + place) if 1 <= place <= 10 else 0.0


def better(rank: list[int], share: float, seed: int = 0) -> list[int]:
    """The same places, but a share of the users has the target on top."""
    lucky = np.random.default_rng(seed).random(len(rank)) < share
    return [1 if up else place for up, place in zip(lucky, rank, strict=True)]


def save_all(folder: Path, cells: list[Cell]) -> None:
    for cell in cells:
        cell.save(folder / cell.dataset)


@settings(max_examples=30)
@given(
    st.integers(2, 12).flatmap(
        lambda users: st.tuples(
            *[
                st.dictionaries(
                    st.integers(0, 3),
                    st.lists(st.integers(0, 10), min_size=users, max_size=users),
                    min_size=1,
                    max_size=4,
                )
            ]
            * 2
        )
    )
)
def test_differences_are_paired_by_seed_and_user(
    ranks: tuple[dict[int, list[int]], dict[int, list[int]]],
) -> None:
    ours, theirs = ([a_cell("x", seed, rank) for seed, rank in row.items()] for row in ranks)
    seeds = [seed for seed in range(4) if seed in ranks[0] and seed in ranks[1]]
    assert common_seeds(ours, theirs) == seeds
    paired = paired_difference(ours, theirs, "ndcg@10")
    if not seeds:
        assert paired is None
        return
    assert paired is not None
    users = range(len(ranks[0][seeds[0]]))
    means = [
        [statistics.fmean(gain_of(row[seed][user]) for seed in seeds) for user in users] for row in ranks
    ]
    differences = [a - b for a, b in zip(*means, strict=True)]
    assert paired.seeds == tuple(seeds)
    assert paired.base == pytest.approx(statistics.fmean(means[1]))
    assert paired.difference.mean == pytest.approx(statistics.fmean(differences))
    assert min(differences) - 1e-12 <= paired.difference.low <= paired.difference.high
    assert paired.difference.high <= max(differences) + 1e-12


def test_the_interval_is_that_of_all_possible_resamples() -> None:
    ours, theirs = [1, 2, 0, 5, 1], [3, 2, 4, 0, 1]
    differences = [gain_of(a) - gain_of(b) for a, b in zip(ours, theirs, strict=True)]
    means = sorted(statistics.fmean(drawn) for drawn in itertools.product(differences, repeat=5))
    paired = paired_difference([a_cell(rank=ours)], [a_cell(rank=theirs)], "ndcg@10")
    assert paired is not None
    # A thousand draws put the ends at quantiles within .015 of .025 and .975, three standard errors.
    for end, share in ((paired.difference.low, 0.025), (paired.difference.high, 0.975)):
        below = sum(mean <= end + 1e-12 for mean in means) / len(means)
        strictly = sum(mean < end - 1e-12 for mean in means) / len(means)
        assert strictly - 0.015 <= share <= below + 0.015


def test_a_line_has_mean_and_deviation_over_seeds() -> None:
    cells = [a_cell("sft", seed, rank) for seed, rank in enumerate(RNG_RANKS[:3])]
    line = make_table("scientific", [*cells, a_cell("sasrec", 4, RNG_RANKS[4])]).line("sft")
    assert line is not None
    for metric in ("recall@5", "recall@10", "ndcg@5", "ndcg@10"):
        values = [metrics_of(rank)[metric] for rank in RNG_RANKS[:3]]
        spread = line.metrics[metric]
        assert spread is not None
        assert spread.mean == pytest.approx(np.mean(values))  # type: ignore[arg-type]
        assert spread.deviation == pytest.approx(np.std(values, ddof=1))  # type: ignore[arg-type]
    assert line.seeds == (0, 1, 2)
    assert line.over_baseline is None
    assert line.over_teacher is None


def test_one_seed_has_no_deviation_and_a_metric_that_a_seed_lacks_no_mean() -> None:
    cell = a_cell(rank=RNG_RANKS[0])
    line = make_table("scientific", [cell]).lines[0]
    assert line.metrics["coverage@10"] is not None
    assert line.metrics["coverage@10"].deviation is None
    lacking = a_cell(seed=1, rank=RNG_RANKS[0], test={**cell.test, "diversity@10": None})
    line = make_table("scientific", [cell, lacking]).lines[0]
    assert line.metrics["diversity@10"] is None
    assert line.metrics["gini@10"] is not None


def test_rows_stand_in_the_order_of_the_field() -> None:
    rows = ["zebra", "lora-sft", "gflowgr-tb-n1", "gflowgr", "t5-gflowgr", "t5-sft", "s-dpo", "item-kl"]
    rows += ["sft-rollouts", "sft", "sasrec", "item-knn", "popularity", "gflowgr-tb", "t5-zebra", "dpo"]
    rows += ["gflowgr-unseen", "sft-unseen", "gflowgr-longer-unseen"]
    table = make_table("scientific", [a_cell(row) for row in rows])
    assert [line.row for line in table.lines] == [
        "popularity", "item-knn", "sasrec", "sft", "sft-rollouts", "dpo", "s-dpo", "item-kl", "gflowgr-tb",
        "gflowgr", "gflowgr-tb-n1", "t5-sft", "t5-gflowgr", "lora-sft",
        "sft-unseen", "gflowgr-unseen", "gflowgr-longer-unseen", "t5-zebra", "zebra",
    ]  # fmt: skip


def test_each_backbone_has_its_own_baseline_and_each_row_its_teacher() -> None:
    ranks = {"sft": 0, "t5-sft": 1, "lora-sft": 2, "sasrec": 3, "item-knn": 4, "mixture": 5}
    ranks |= {"sft-unseen": 7, "mixture-unseen": 8}
    cells = [a_cell(row, 0, RNG_RANKS[index]) for row, index in ranks.items()]
    built = {
        "gflowgr": (["sasrec", "item-knn", "mixture"], "sft", "mixture"),
        "gflowgr-flows": (["item-knn"], "sft", "item-knn"),
        "t5-gflowgr": (["t5-sft", "sasrec"], "t5-sft", "sasrec"),
        "lora-gflowgr": (["lora-sft"], "lora-sft", "sasrec"),
        "gflowgr-unseen": (["gflowgr"], "sft-unseen", "mixture-unseen"),
    }
    cells += [a_cell(row, 0, RNG_RANKS[6], built_on=names) for row, (names, _, _) in built.items()]
    table = make_table("scientific", cells)
    for row, (_, baseline, teacher) in built.items():
        line = table.line(row)
        assert line is not None
        assert line.over_baseline is not None
        assert line.over_teacher is not None
        assert (line.baseline, line.teacher) == (baseline, teacher)
        own = statistics.fmean(map(gain_of, RNG_RANKS[6]))
        for other, paired in ((baseline, line.over_baseline), (teacher, line.over_teacher)):
            base = statistics.fmean(map(gain_of, RNG_RANKS[ranks[other]]))
            assert (paired.base, paired.difference.mean) == pytest.approx((base, own - base))
    with pytest.raises(ValueError, match="gflowgr learned from different teachers"):
        make_table("x", [*cells, a_cell("gflowgr", 1, RNG_RANKS[7], built_on=["sasrec"])])


def test_seeds_that_were_not_measured_alike_have_no_mean() -> None:
    cells = [a_cell("ensemble", seed, settings={"teacher_weight": 0.5}) for seed in (0, 1)]
    assert make_table("x", cells).lines[0].seeds == (0, 1)
    other = a_cell("ensemble", 2, settings={"teacher_weight": 0.5, "teacher_weights": [0.5]})
    with pytest.raises(ValueError, match=r"ensemble: seeds 0 and 2 were not .* no teacher_weights; remove"):
        make_table("x", [*cells, other])


def test_the_best_of_each_column_is_bold() -> None:
    worse, upper = [0] * 60, [1] * 60
    low = {**metrics_of(worse), "gini@10": 0.25}
    cells = [a_cell("sft", 0, worse, test=low), a_cell("gflowgr", 0, upper), a_cell("sasrec", 0, worse)]
    table = make_table("scientific", cells)
    titles = columns()
    best = {
        line.row: {t for t, e in zip(titles, entries(table, line), strict=True) if e.best}
        for line in table.lines
    }
    assert best["gflowgr"] == {"R@5", "R@10", "N@5", "N@10", "coverage@10", "diversity@10"}
    assert best["sft"] == {"gini@10", "coverage@10", "diversity@10"}
    text = markdown(table)
    # Lists without the history stand against each other: the only one is the best, and takes nothing away.
    high = {**metrics_of(upper), "gini@10": 0.25}
    both = make_table("scientific", [*cells, a_cell("sft-unseen", 0, upper, test=high)])
    for line in both.lines:
        found = {t for t, e in zip(titles, entries(both, line), strict=True) if e.best}
        assert line.unseen == (line.row == "sft-unseen")
        assert found == ({*best["gflowgr"], "gini@10"} if line.unseen else best[line.row])
    row = next(line for line in text.splitlines() if line.startswith("| gflowgr "))
    assert row.count("**1.000**") == 4
    assert "**.7500**" not in text
    assert "**.2500**" in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(titles) + 1}


def run_table(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["table", *argv])
    return status, capsys.readouterr().out


def test_the_exit_status_is_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = RNG_RANKS[0]
    lead = [
        a_cell("sft", 0, base),
        a_cell("sasrec", 0, base),
        a_cell("gflowgr", 0, better(base, 0.5), built_on=["sasrec"]),
    ]
    save_all(tmp_path, lead)
    status, text = run_table(capsys, "--results", str(tmp_path))
    own, other = (statistics.fmean(map(gain_of, rank)) for rank in (better(base, 0.5), base))
    sentence = text.rstrip("\n").rpartition("\n")[2]
    assert status == 0
    assert sentence.startswith("gflowgr leads sft in N@10 on scientific (+.")
    assert f"= {own / other - 1:+.1%}, 95% interval +." in sentence
    assert "(no" not in sentence
    # The whole line is there although the output is no terminal and much wider than one.
    assert re.search(r"^gflowgr +1 .* 24 +2 +2 +CPU$", text, re.M)

    # Another tokenizer makes no further data set.
    save_all(tmp_path, [a_cell("sft", 0, base, dataset="scientific-rqvae", device="NVIDIA H200")])
    status, text = run_table(capsys, "--results", str(tmp_path))
    assert status == 0 and "rqvae" not in text.rstrip("\n").rpartition("\n")[2]
    # But it is judged where it is all that was asked for.
    status, text = run_table(capsys, "--results", str(tmp_path), "--dataset", "scientific-rqvae")
    assert status == 1
    assert text.rstrip("\n").endswith(
        "gflowgr does not lead sft in N@10 on scientific-rqvae (gflowgr not run)."
    )
    assert re.search(r"^sft +1 .* H200$", text, re.M)

    save_all(
        tmp_path, [a_cell("sft", 0, base, dataset="beauty"), a_cell("gflowgr", 0, base, dataset="beauty")]
    )
    status, text = run_table(capsys, "--results", str(tmp_path), "--markdown")
    assert status == 1
    assert text.count("\n### ") + text.startswith("### ") == 3
    last = text.rstrip("\n").rpartition("\n")[2]
    assert last.startswith("gflowgr leads sft in N@10 on scientific (+")
    assert "but does not lead on beauty (+.0000 = +0.0%, 95% interval +.0000 to +.0000, 1 seed)." in last
    assert run_table(capsys, "--results", str(tmp_path), "--dataset", "scientific")[0] == 0
    status, text = run_table(capsys, "--results", str(tmp_path), "--dataset", "beauty")
    assert status == 1
    assert "gflowgr does not lead sft in N@10 on beauty (" in text


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ([("sft", 0)], "gflowgr not run"),
        ([("gflowgr", 0)], "sft not run"),
        ([("sasrec", 0)], "gflowgr and sft not run"),
        ([("gflowgr", 0), ("sft", 1)], "no seed that both were run with"),
    ],
)
def test_a_missing_row_is_no_lead(
    cells: list[tuple[str, int]], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_all(tmp_path, [a_cell(row, seed, RNG_RANKS[seed]) for row, seed in cells])
    status, text = run_table(capsys, "--results", str(tmp_path))
    assert status == 1
    assert text.rstrip().endswith(f"gflowgr does not lead sft in N@10 on scientific ({reason}).")


def test_a_loss_or_a_gain_within_chance_is_no_lead() -> None:
    base = RNG_RANKS[0]
    for rank in (base, [0] * 60, [*base[:-1], 1]):
        found = verdict([make_table("x", [a_cell("sft", 0, base), a_cell("gflowgr", 0, rank)])])
        assert not found.leads
        assert "does not lead" in found.sentence


def test_a_row_that_was_not_run_is_absent(tmp_path: Path) -> None:
    save_all(tmp_path, [a_cell("sft")])
    assert [line.row for line in read_tables(tmp_path)[0].lines] == ["sft"]


@pytest.mark.parametrize("width", [80, 300])
def test_a_narrow_terminal_gets_the_table_in_parts(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cells = [a_cell(row, seed, RNG_RANKS[seed]) for row in ("sft", "gflowgr-tb-n1") for seed in (0, 1)]
    save_all(tmp_path, cells)
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": str(width), "LINES": "50"}.items():
        monkeypatch.setenv(name, value)
    _, text = run_table(capsys, "--results", str(tmp_path))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "\x1b[1m" in text
    lines = plain.splitlines()
    table = lines[: next(i for i, line in enumerate(lines) if line.startswith("Test part"))]
    assert max(map(len, table)) <= width
    assert sum(line.startswith("gflowgr-tb-n1 ") for line in table) == (4 if width == 80 else 1)
    assert "…" not in plain
    header = " ".join(line for line in table if line.startswith("row "))
    assert all(title in header for title in columns())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "yelp"], "no results of data set 'yelp' in .*, there are scientific"),
        (["--results", "nowhere"], "nowhere: no such folder of results"),
    ],
)
def test_what_is_not_there_is_an_error(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_all(tmp_path, [a_cell("sft")])
    assert cli.main(["table", "--results", str(tmp_path), *argv]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_files_of_another_data_set_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no results"):
        read_tables(tmp_path)
    a_cell("sft").save(tmp_path / "beauty")
    with pytest.raises(ValueError, match="holds results of scientific, needs those of beauty"):
        read_tables(tmp_path)


def test_a_tampered_cell_stops_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = a_cell("gflowgr").save(tmp_path / "scientific")
    path.write_text(path.read_text().replace('"ndcg@10": 0', '"ndcg@10": 1'))
    assert cli.main(["table", "--results", str(tmp_path)]) == 2
    assert "gflowgr-0.json" in capsys.readouterr().err


def test_the_budget_is_that_of_one_run() -> None:
    budgets: list[dict[str, Any]] = [
        {"steps": 10, "contexts": 2000, "seconds": 4.0, "total_seconds": 6.0},
        {"steps": 10, "contexts": 2000, "seconds": 8.0, "total_seconds": 20.0},
    ]
    table = make_table("x", [a_cell("sft", seed, budget=budget) for seed, budget in enumerate(budgets)])
    shown = dict(zip(columns(), entries(table, table.lines[0]), strict=True))
    assert [shown[name].text for name in ("steps", "contexts", "seconds", "total seconds")] == [
        "10", "2,000", "6", "13",
    ]  # fmt: skip
