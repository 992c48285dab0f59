"""The demo in its short form: what it writes is whole, fits together, and can be computed otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gflowgr import collaborative, demo, pipeline
from gflowgr.backbones import GenerativeRecommender
from gflowgr.data import split
from gflowgr.demo_report import ALONE, BESIDE, CONTINUED, OURS, SFT, TB
from gflowgr.ensemble import best_weight, rank_by_weight, rank_together
from gflowgr.folders import DataFolder
from gflowgr.metrics import bootstrap_interval


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "output"
    demo.run(path, short=True)
    return path


def results(output: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((output / "results.json").read_text())
    return data


@pytest.mark.slow
def test_the_short_demo_writes_everything_whole(output: Path) -> None:
    assert {path.name for path in output.iterdir()} == {
        demo.MARK,
        "data",
        "mixture.safetensors",
        "report.html",
        "results.json",
        "runs",
        "sasrec.safetensors",
    }
    assert [path for path in output.rglob("*") if ".tmp" in path.name or ".partial" in path.name] == []
    page = (output / "report.html").read_text()
    for sentence in results(output)["verdict"]:
        assert sentence.replace("'", "&#x27;") in page


@pytest.mark.slow
def test_popularity_is_what_counting_gives(output: Path) -> None:
    log = DataFolder.load(output / "data").log
    ends = np.flatnonzero(np.r_[log.user[1:] != log.user[:-1], True])
    starts = np.r_[0, ends[:-1] + 1]
    training = np.concatenate([log.item[start : end - 1] for start, end in zip(starts, ends, strict=True)])
    counts = np.bincount(training, minlength=log.num_items).astype(float)
    hits = []
    for start, end in zip(starts, ends, strict=True):
        left = counts.copy()
        left[log.item[start:end]] = -1
        target = log.item[end]
        # With ties the rank is anywhere between these.
        hits.append(((left > left[target]).sum() < 10, (left >= left[target]).sum() <= 10))
    surely, perhaps = (np.mean([hit[case] for hit in hits]) for case in (1, 0))
    row = next(row for row in results(output)["rows"] if row["name"] == "Popularity")
    assert surely <= row["metrics"]["recall@10"]["value"] <= perhaps


@pytest.mark.slow
def test_the_rows_are_those_of_the_runs(output: Path) -> None:
    rows = {row["name"]: row for row in results(output)["rows"]}
    folders = {SFT: "sft", CONTINUED: "sft-continued", TB: "gflowgr-tb", OURS: "gflowgr"}
    for name, folder in folders.items():
        again = pipeline.evaluate(output / "runs" / folder)
        summary = again.summary()
        for metric, estimate in rows[name]["metrics"].items():
            expected = pytest.approx(summary[metric], rel=1e-4) if metric in summary else None
            assert estimate["value"] == expected
        interval = bootstrap_interval(again.per_user["ndcg@10"])
        shown = rows[name]["metrics"]["ndcg@10"]
        assert (shown["low"], shown["high"]) == pytest.approx(interval, rel=1e-4)


@pytest.mark.slow
def test_ours_stands_there_with_its_teacher_and_without(output: Path) -> None:
    rows = {row["name"]: row["metrics"] for row in results(output)["rows"]}
    run = output / "runs" / "gflowgr"
    for name, weight in ((OURS, None), (ALONE, 0.0)):
        summary = pipeline.evaluate(run, teacher_weight=weight).summary()
        assert rows[name]["ndcg@10"]["value"] == pytest.approx(summary["ndcg@10"], rel=1e-4)
        assert (rows[name]["nll"]["value"] is None) == (name == OURS)
    found = [rows[name]["ndcg@10"]["value"] for name in (OURS, ALONE, BESIDE, CONTINUED)]
    assert found[0] != found[1] and found[2] != found[3]
    data = DataFolder.load(output / "data", tokenized=True)
    supervised = GenerativeRecommender.load(output / "runs" / "sft-continued" / pipeline.CHECKPOINT)
    parts = split(data.log, max_history=demo.SHORT.history)
    pair = supervised, collaborative.load(output / "mixture.safetensors")
    weight = best_weight(rank_by_weight(*pair, parts.validation, exclude_history=True))
    both = rank_together(*pair, parts.test, teacher_weight=weight, exclude_history=True)
    assert found[2] == pytest.approx(both.summary()["ndcg@10"], rel=1e-4)


@pytest.mark.slow
def test_budgets_are_equal(output: Path) -> None:
    contexts = {row["name"]: row["contexts"] for row in results(output)["rows"]}
    assert contexts[CONTINUED] == contexts[TB] == contexts[BESIDE] and contexts[OURS] == contexts[ALONE]
    assert contexts[OURS] == pytest.approx(contexts[CONTINUED], rel=0.03)
    assert contexts[SFT] < contexts[CONTINUED]


@pytest.mark.slow
def test_examples_show_what_the_model_recommends(output: Path) -> None:
    data = results(output)
    folder = DataFolder.load(output / "data")
    for example in data["examples"]:
        user = list(folder.log.user_ids.astype(str)).index(example["user"].split()[-1])
        items = folder.log.item[folder.log.user == user]
        assert folder.items.titles[items[-1]] == example["target"]["title"]
        taken = [str(folder.log.item_ids[item]) for item in items[:-1]]
        read = taken[-demo.SHORT.history :]
        _, recommended = pipeline.recommend(
            output / "runs" / "gflowgr", read, exclude=taken, num_items=5, num_beams=20
        )
        assert [row.title for row in recommended] == [item["title"] for item in example["recommended"][OURS]]
        for name, place in example["hits"].items():
            titles = [item["title"] for item in example["recommended"][name]]
            assert (titles.index(example["target"]["title"]) if place is not None else None) == place


def test_the_demo_refuses_a_folder_that_is_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="exists already"):
        demo.run(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep me"


def test_the_demo_writes_only_its_own_folder_anew(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "raw.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"with no \.gflowgr-demo in it, which is not overwritten"):
        demo.run(tmp_path, short=True, overwrite=True)
    assert (tmp_path / "data" / "raw.csv").read_text() == "mine"
