"""Two runs compared: every number against plain Python, what does not fit is refused, and a readable page."""

from __future__ import annotations

import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_cells import a_cell, metrics_of
from test_report import CHROMIUM, NASTY, Page, browse

from gflowgr import cli
from gflowgr.metrics import paired_bootstrap
from gflowgr.page import number
from gflowgr.quality.compare import Comparison, compare, quantile_groups, rank_changes
from gflowgr.quality.compare_page import render, verdict, write
from gflowgr.quality.compare_text import text_tables
from gflowgr.quality.results import Users, save_users
from gflowgr.quality.rows import ALL_EARLIER
from gflowgr.quality.runs import Run, load_run

USERS = 90
RNG = np.random.default_rng(0)
RANKS = RNG.integers(0, 11, size=(8, USERS))
ABOUT = Users(
    RNG.integers(3, 21, size=USERS).astype(np.int32), RNG.geometric(0.1, size=USERS).astype(np.int32)
)


def a_run(*ranks: np.ndarray, seeds: tuple[int | None, ...] = (None,), **changes: Any) -> Run:
    values: dict[str, Any] = {"name": "a run", "dataset": None, "num_items": 40, "places": 10}
    values |= {"users": ABOUT, "excluded": ""}
    return Run(ranks=dict(zip(seeds, ranks, strict=True)), **{**values, **changes})


def gain_of(place: int, k: int) -> float:
    return 1 / math.log2(1 + place) if 1 <= place <= k else 0.0


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 5))
def test_groups_are_ranges_of_values(values: list[int], count: int) -> None:
    groups = quantile_groups(np.array(values), count).tolist()
    assert all(0 <= group < count for group in groups)
    pairs = sorted(zip(values, groups, strict=True))
    assert [group for _, group in pairs] == sorted(groups)
    assert len(set(pairs)) == len(set(values))


@given(st.permutations(range(23)), st.integers(1, 6))
def test_groups_of_distinct_values_are_equally_large(values: list[int], count: int) -> None:
    sizes = np.bincount(quantile_groups(np.array(values), count), minlength=count)
    assert sizes.max() - sizes.min() <= 1


@settings(max_examples=50)
@given(
    st.integers(1, 12).flatmap(
        lambda users: st.lists(
            st.tuples(*[st.lists(st.integers(0, 7), min_size=users, max_size=users)] * 2),
            min_size=1,
            max_size=3,
        )
    ),
    st.integers(1, 7),
)
def test_rank_changes_count_every_user_once(pairs: list[tuple[list[int], list[int]]], k: int) -> None:
    changes = rank_changes([(np.array(a, dtype=np.uint8), np.array(b, dtype=np.uint8)) for a, b in pairs], k)
    want = dict.fromkeys([*range(1 - k, k), "a", "b", "neither"], 0.0)
    for pair in pairs:
        for a, b in zip(*pair, strict=True):
            in_a, in_b = 1 <= a <= k, 1 <= b <= k
            kind: int | str = b - a if in_a and in_b else "a" if in_a else "b" if in_b else "neither"
            want[kind] += 1 / len(pairs)
    got = {**changes.both, "a": changes.only_a, "b": changes.only_b, "neither": changes.neither}
    assert got == pytest.approx(want)
    assert sum(got.values()) == pytest.approx(len(pairs[0][0]))


def test_every_number_is_that_of_its_users() -> None:
    ours, theirs = RANKS[:2]
    found = compare(a_run(ours), a_run(theirs))
    assert [c.metric for c in found.metrics] == ["recall@5", "recall@10", "ndcg@5", "ndcg@10"]
    for compared in found.metrics:
        name, _, k = compared.metric.partition("@")
        values = [
            [float(1 <= p <= int(k)) if name == "recall" else gain_of(p, int(k)) for p in rank.tolist()]
            for rank in (ours, theirs)
        ]
        assert compared.a.value == pytest.approx(statistics.fmean(values[0]))
        assert compared.b.value == pytest.approx(statistics.fmean(values[1]))
        want = paired_bootstrap(np.array(values[0]), np.array(values[1]))
        got = compared.difference
        assert (got.value, got.low, got.high) == pytest.approx((want.mean, want.low, want.high))
    for groups, about in (
        (found.by_length, ABOUT.history_length),
        (found.by_popularity, ABOUT.target_popularity),
    ):
        assert sum(group.users for group in groups) == USERS
        for group in groups:
            members = [user for user in range(USERS) if group.low <= about[user] <= group.high]
            assert len(members) == group.users
            assert [c.metric for c in group.metrics] == ["ndcg@10", "recall@10"]
            for index, rank in ((0, ours), (1, theirs)):
                value = (group.metrics[0].a, group.metrics[0].b)[index].value
                assert value == pytest.approx(statistics.fmean(gain_of(rank[user], 10) for user in members))
    assert [group.name for group in found.by_popularity] == ["head", "middle", "tail"]
    assert [group.low for group in found.by_popularity] == sorted(
        (group.low for group in found.by_popularity), reverse=True
    )
    assert len(found.by_length) == 4
    assert [group.low for group in found.by_length] == sorted(group.low for group in found.by_length)


def test_rows_are_compared_over_the_seeds_that_both_have() -> None:
    a = a_run(*RANKS[:3], seeds=(0, 1, 5))
    b = a_run(*RANKS[3:6], seeds=(5, 7, 1))
    found = compare(a, b)
    assert found.seeds == "averaged over the common seeds 1, 5"
    compared = found.compared("ndcg@10")
    for rows, estimate in (([1, 2], compared.a), ([5, 3], compared.b)):
        places = RANKS[rows].ravel().tolist()
        assert estimate.value == pytest.approx(statistics.fmean(gain_of(place, 10) for place in places))
    want = rank_changes([(RANKS[1], RANKS[5]), (RANKS[2], RANKS[3])], 10)
    assert found.changes == want
    with pytest.raises(ValueError, match="no seed in common"):
        compare(a, a_run(RANKS[3], seeds=(2,)))


def test_a_row_against_a_single_run_is_the_mean_of_its_seeds() -> None:
    found = compare(a_run(*RANKS[:3], seeds=(0, 1, 5), name="row"), a_run(RANKS[4]))
    assert found.seeds == "row is averaged over 3 seeds"
    want = statistics.fmean(gain_of(place, 10) for place in RANKS[:3].ravel().tolist())
    assert found.compared("ndcg@10").a.value == pytest.approx(want)
    assert compare(a_run(RANKS[0]), a_run(RANKS[1])).seeds == ""


def test_shorter_lists_give_fewer_metrics() -> None:
    long = a_run(np.where(RANKS[0] == 10, 200, RANKS[0]), places=255)
    short = a_run(np.where(RANKS[1] > 7, 0, RANKS[1]), places=7)
    tiny = a_run(np.where(RANKS[2] > 3, 0, RANKS[2]), places=3)
    assert [c.metric for c in compare(long, a_run(RANKS[1])).metrics][-1] == "ndcg@10"
    found = compare(long, short)
    assert [c.metric for c in found.metrics] == ["recall@5", "ndcg@5"]
    assert found.deciding == "ndcg@5"
    assert [c.metric for c in compare(tiny, short).metrics] == ["recall@3", "ndcg@3"]
    assert found.compared("recall@5").a.value == pytest.approx(
        statistics.fmean(float(1 <= place <= 5) for place in RANKS[0].tolist())
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 41}, "number of items 40 and 41"),
        ({"dataset": "beauty"}, "data set scientific and beauty"),
        (
            {"users": Users(ABOUT.history_length[1:], ABOUT.target_popularity[1:])},
            "number of users 90 and 89",
        ),
        (
            {"users": Users(ABOUT.history_length, np.roll(ABOUT.target_popularity, 1))},
            "target_popularity differs for [0-9]+ of 90 users",
        ),
        (
            {
                "users": Users(
                    ABOUT.history_length + np.eye(1, USERS, 4, dtype=np.int32)[0], ABOUT.target_popularity
                )
            },
            "history_length differs for 1 of 90 users",
        ),
    ],
)
def test_runs_of_different_data_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"are of different data: {message}"):
        compare(a_run(RANKS[0], dataset="scientific"), a_run(RANKS[1], **change))


@pytest.mark.parametrize("longest", [4, 12])
def test_histories_may_be_cut_at_different_lengths(longest: int) -> None:
    cut = Users(ABOUT.history_length.clip(max=longest), ABOUT.target_popularity)
    whole, shorter = a_run(RANKS[0]), a_run(RANKS[1], users=cut)
    want = compare(whole, a_run(RANKS[1])).by_length
    assert compare(whole, shorter).by_length == want
    assert [(group.low, group.high) for group in compare(shorter, whole).by_length] == [
        (group.low, group.high) for group in want
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ("all earlier items", "", "lists of A leave out all earlier items, those of B leave out nothing"),
        ("", "the history", "lists of A leave out nothing, those of B leave out the history"),
        ("the history", "the history", ""),
    ],
)
def test_lists_that_leave_out_other_items_are_said_to(ours: str, theirs: str, words: str) -> None:
    found = compare(a_run(RANKS[0], excluded=ours), a_run(RANKS[1], excluded=theirs))
    assert found.excluded == words
    facts = "90 users, 40 items" + (f"; {words}" if words else "")
    assert text_tables(found)[0][0] == facts
    assert facts in " ".join(Page(render(found)).words)


def test_what_lists_leave_out_comes_with_a_run(results: Path, tmp_path: Path) -> None:
    folder = a_trained_run(tmp_path / "run", RANKS[1])
    for said, excluded in (("", ""), ("exclude_history: false", ""), ("exclude_history: true", ALL_EARLIER)):
        (folder / "config.yaml").write_text(f"training: {{{said}}}")
        assert load_run(folder).excluded == excluded
    scientific = results / "scientific"
    for stored, excluded in (
        ({}, ""),
        ({"training": {"exclude_history": True}}, "the history"),
        ({"exclude_history": True, "excluded": ALL_EARLIER}, ALL_EARLIER),
    ):
        replace(a_cell("sft-unseen", 0, RANKS[0].tolist()), settings=stored).save(scientific)
        assert load_run("scientific/sft-unseen", results).excluded == excluded
    replace(a_cell("sft-unseen", 1, RANKS[0].tolist()), settings={"exclude_history": True}).save(scientific)
    with pytest.raises(ValueError, match=r"seeds 0 and 1 were not measured alike: one .* has no excluded"):
        load_run("scientific/sft-unseen", results)


def test_a_group_of_one_user_has_no_interval() -> None:
    about = Users(np.array([3, 3, 9], dtype=np.int32), np.array([1, 1, 1], dtype=np.int32))
    ranks = np.array([[1, 0, 2], [0, 0, 1]])
    found = compare(a_run(ranks[0], users=about), a_run(ranks[1], users=about))
    alone = found.by_length[-1].metrics[0]
    assert (alone.difference.low, alone.difference.high) == (None, None)
    assert alone.difference.value == pytest.approx(1 / math.log2(3) - 1)
    assert [group.name for group in found.by_popularity] == ["middle"]
    Page(render(found))
    assert text_tables(found)[1][1][-1][-1] == ""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "scientific"
    for row, seed, index in (("sft", 0, 0), ("sft", 1, 1), ("gflowgr", 1, 2), ("gflowgr", 2, 3)):
        a_cell(row, seed, RANKS[index].tolist()).save(folder)
    save_users(folder, ABOUT.history_length, ABOUT.target_popularity)
    return tmp_path


def a_trained_run(folder: Path, rank: np.ndarray, **changes: Any) -> Path:
    """What `gflowgr train` leaves of its results."""
    folder.mkdir()
    values = {name: {"value": value} for name, value in metrics_of(rank.tolist()).items()}
    part = {"num_users": len(rank), "num_items": 40, "metrics": values}
    (folder / "metrics.json").write_text(json.dumps({"validation": part, "test": part}))
    ranks = {"validation_rank": rank.astype(np.uint8), "test_rank": rank.astype(np.uint8)}
    np.savez(folder / "users.npz", **{**ranks, **vars(ABOUT), **changes})
    (folder / "config.yaml").write_text("training: {seed: 1}")
    return folder


def test_runs_are_found_by_file_row_and_folder(results: Path, tmp_path: Path) -> None:
    row = load_run("scientific/gflowgr", results)
    assert {seed: rank.tolist() for seed, rank in row.ranks.items()} == {
        1: RANKS[2].tolist(),
        2: RANKS[3].tolist(),
    }
    cell = load_run(results / "scientific" / "sft-1.json")
    trained = load_run(a_trained_run(tmp_path / "run", RANKS[1]))
    for run in (cell, trained):
        assert [rank.tolist() for rank in run.ranks.values()] == [RANKS[1].tolist()]
        assert (run.places, run.num_items) == (10, 40)
    assert compare(cell, trained).compared("ndcg@10").difference.value == 0
    found = compare(row, trained)
    assert found.compared("ndcg@10").b.value == pytest.approx(metrics_of(RANKS[1].tolist())["ndcg@10"])


def test_the_command_prints_and_writes(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    argv = ["scientific/gflowgr", "scientific/sft", "--results", str(results), "--output", str(page)]
    assert cli.main(["compare", *argv]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("A: scientific/gflowgr\nB: scientific/sft\n")
    assert "90 users, 40 items; seed 1 of both\n" in printed
    found = compare(load_run("scientific/gflowgr", results), load_run("scientific/sft", results))
    for compared in found.metrics:
        name = compared.metric.replace("recall", "R").replace("ndcg", "N")
        numbers = re.search(rf"^{name} +([.0-9]+) +([.0-9]+) +([^ ]+)  (.*)$", printed, re.M)
        assert numbers is not None
        shown = [float(value.replace("\N{MINUS SIGN}", "-")) for value in numbers.groups()[:3]]
        assert shown == pytest.approx(
            [compared.a.value, compared.b.value, compared.difference.value], abs=5.1e-5
        )
    assert all(f"\n{name} " in printed for name in ("head", "middle", "tail", "history", "target"))
    assert page.read_text(encoding="utf-8") == render(found)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (("scientific/gflow", "scientific/sft"), "no results of row 'gflow' in .*, there are gflowgr, sft"),
        (("beauty/sft", "scientific/sft"), "'beauty/sft' is no result file .*DATASET/ROW in"),
        (("nothing", "scientific/sft"), "'nothing' is no result file"),
        (("nothing.json", "scientific/sft"), "nothing.json"),
        (("{tmp}", "scientific/sft"), "users.npz: no such file"),
        (("{tmp}/other", "scientific/sft"), "of different data: number of users 89 and 90"),
        (("{tmp}/mixed", "scientific/sft"), "users.npz and metrics.json: .*the ranks give"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    runs: tuple[str, str],
    message: str,
    results: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fewer = {name: values[1:] for name, values in vars(ABOUT).items()}
    a_trained_run(tmp_path / "other", RANKS[0][1:], **fewer)
    a_trained_run(tmp_path / "mixed", RANKS[0], test_rank=RANKS[1].astype(np.uint8))
    filled = [run.replace("{tmp}", str(tmp_path)) for run in runs]
    assert cli.main(["compare", *filled, "--results", str(results)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said)


def test_a_users_file_of_other_users_is_refused(results: Path) -> None:
    save_users(results / "scientific", [1, 2], [1, 2])
    with pytest.raises(ValueError, match=r"users\.npz has 2 users, sft-0 90"):
        load_run("scientific/sft", results)


def a_comparison() -> Comparison:
    up = np.where(np.arange(USERS) % 3 == 0, 1, RANKS[0])
    return compare(a_run(up, name=f"up {NASTY}"), a_run(RANKS[0], name="down"))


def test_the_verdict_is_what_the_interval_says() -> None:
    ahead = a_comparison()
    compared = ahead.compared("ndcg@10")
    assert compared.difference.low is not None and compared.difference.low > 0
    assert verdict(ahead).startswith("A is ahead of B: NDCG@10 .")
    up = np.where(np.arange(USERS) % 3 == 0, 1, RANKS[0])
    assert verdict(compare(a_run(RANKS[0]), a_run(up))).startswith("A is behind B: NDCG@10 .")
    assert verdict(compare(a_run(up), a_run(up))).startswith("No sure difference: NDCG@10 .")
    nothing = compare(a_run(RANKS[0]), a_run(RANKS[0] * 0))
    assert "%, " not in verdict(nothing)


def test_the_page_needs_nothing_from_outside_and_says_all_in_words() -> None:
    text = render(a_comparison())
    page = Page(text)
    sources = [value or "" for _, name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert len(sources) == 6
    assert all(source.startswith("data:") for source in sources)
    assert "@import" not in text
    assert "<script" not in text
    assert NASTY in "".join(page.words)
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(pictures) == 5
    assert all(pictures)


def test_the_page_shows_the_numbers_of_the_comparison(tmp_path: Path) -> None:
    found = a_comparison()
    words = " ".join(Page(render(found)).words)
    for group in (*found.by_length, *found.by_popularity):
        assert f"{group.users} users" in words
        for compared in group.metrics:
            assert number(compared.a.value) in words
    assert f"A alone lists it for {found.changes.only_a:.0f}, B alone for {found.changes.only_b:.0f}" in words
    for name in ("a", "b"):
        write(found, tmp_path / f"{name}.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    other = replace(found, changes=rank_changes([(RANKS[2], RANKS[3])], 10))
    assert render(other) != render(found)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it_without_a_complaint(tmp_path: Path, width: int) -> None:
    question = """<script>addEventListener("load", () => {
      const page = document.documentElement, pictures = [...document.images];
      page.dataset.pictures = pictures.filter(p => p.complete && p.naturalWidth > 0).length;
      page.dataset.overflow = page.scrollWidth - innerWidth;
      page.dataset.rows = document.querySelectorAll("#metrics tbody tr").length;
    });</script>"""
    path = tmp_path / "compare.html"
    path.write_text(render(a_comparison()).replace("</body>", question + "</body>"), encoding="utf-8")
    seen = browse(path, tmp_path / "profile", width)
    assert seen.returncode == 0, seen.stderr
    assert "CONSOLE" not in seen.stderr
    asked = dict(re.findall(r'data-(pictures|overflow|rows)="([^"]*)"', seen.stdout))
    assert (asked["pictures"], asked["rows"]) == ("5", "4")
    assert int(asked["overflow"]) <= 0
