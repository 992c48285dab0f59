from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from gflowgr import ensemble, trainer
from gflowgr.adaptive import WeightSchedule
from gflowgr.assembly import Plan
from gflowgr.data import split
from gflowgr.metrics import Metrics, ranking_metrics
from gflowgr.quality import cells, grids, tuning
from gflowgr.quality.cells import Place
from gflowgr.quality.data import DATA_SETS, DataSet
from gflowgr.quality.grids import base_of, best_point, chosen_settings, read_grid
from gflowgr.quality.reproduce import Task, missing, reproduce
from gflowgr.quality.results import load_cells, load_users
from gflowgr.quality.rows import MAIN, ROWS
from gflowgr.recipes import RECIPES
from gflowgr.semantic_ids import embed_text, quantise, resolve_collisions
from gflowgr.settings import merge, read_yaml

TINY = DataSet("tiny", "codes", epochs=2, extra_steps=3, t5_epochs=1)
USERS, ITEMS = 40, 30


def write_data(root: Path, seed: int = 0) -> None:
    """Sequences in which the next item mostly follows from the one before."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(USERS):
        item = int(random.integers(ITEMS))
        for position in range(int(random.integers(5, 9))):
            rows.append((user, item, position))
            item = (item + int(random.choice([1, 1, 1, 7]))) % ITEMS
    present = {item for _, item, _ in rows}
    rows += [(0, item, 100 + item) for item in range(ITEMS) if item not in present]
    folder = root / TINY.name
    (folder / "semantic_ids").mkdir(parents=True)
    frame = pandas.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    frame.to_parquet(folder / "interactions.parquet", index=False)
    codes = np.stack([np.arange(ITEMS) // 6, np.arange(ITEMS) % 6], 1)
    np.save(folder / "semantic_ids" / "codes.npy", codes.astype(np.int16))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models and recommenders of a size that trains in a second."""
    tiny = {"layers": 1, "d_model": 16, "heads": 2}
    scratch = {
        "decoder": {"model": {"kind": "decoder", **tiny}},
        "wide": {"model": {"kind": "decoder", **tiny, "d_model": 32}},
        "large": {"model": {"kind": "decoder", **tiny, "d_model": 32}},
        "t5": {"model": {"kind": "t5", **tiny, "d_kv": 8, "d_ff": 32}},
    }
    monkeypatch.setattr(cells, "_FROM_SCRATCH", scratch)
    sasrec = ROWS["sasrec"].settings["collaborative"]
    monkeypatch.setitem(sasrec, "epochs", 2)
    monkeypatch.setitem(sasrec, "hidden_size", 16)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    write_data(tmp_path / "data")
    return Place(tmp_path / "data", tmp_path / "work", tmp_path / "results")


def run(place: Place, *rows: str, seed: int = 0) -> None:
    for row in rows:
        cells.run(row, TINY, seed, place)


def before(row: str) -> list[str]:
    """All that a row is built on, and that on, each once and in order."""
    names = [name for needed in ROWS[row].built_on for name in (*before(needed), needed)]
    return list(dict.fromkeys(names))


# One of each kind that does something of its own; the rest of the table differs in settings alone.
KINDS = ["popularity", "item-knn", "ensemble", "sft-smoothed", "sft-rollouts", "sprec", "grpo", "gflowgr"]
KINDS += ["mixture-unseen", "sft-unseen", "ensemble-unseen"]


class TestCells:
    @pytest.mark.parametrize("row", KINDS)
    def test_a_row_runs(self, place: Place, row: str) -> None:
        run(place, *before(row))
        cell = cells.run(row, TINY, 0, place)
        assert cell.num_users == USERS
        assert cell.built_on == ROWS[row].built_on
        assert str(place.work) not in json.dumps(dict(cell.settings))
        assert {kept.name for kept in load_cells(place.results / "tiny")} >= {f"{row}-0"}
        users = load_users(place.results / "tiny")
        assert len(users) == USERS and users.history_length.min() >= 3

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
    @pytest.mark.parametrize("row", [name for name in ROWS if name not in KINDS])
    def test_every_other_row_runs(self, place: Place, row: str) -> None:
        run(place, *before(row), row)

    @pytest.mark.parametrize("row", ["sasrec", "sft", "ensemble"])
    def test_lists_without_the_history_have_nothing_of_it(
        self, place: Place, row: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(place, *before(row), row)
        seen = []

        def measure(items: Tensor, target: Tensor, **options: Any) -> Metrics:
            part = next(part for part in (parts.validation, parts.test) if torch.equal(part.target, target))
            assert part.earlier is not None
            lists = zip(items.tolist(), part.earlier, strict=True)
            seen.append(any(set(listed) & set(taken.tolist()) for listed, taken in lists))
            return ranking_metrics(items, target, **options)

        # Also what is too long ago for a model to read.
        monkeypatch.setattr(cells, "MAX_HISTORY", 2)
        parts = split(TINY.load(place.data, place.work).log, max_history=cells.MAX_HISTORY)
        for module in (cells, trainer, ensemble):
            monkeypatch.setattr(module, "ranking_metrics", measure)
        run(place, f"{row}-unseen")
        assert len(seen) >= 2 and not any(seen)
        seen.clear()
        # It is the setting that keeps them out.
        if row == "ensemble":
            run(place, row)
        else:
            whole, kept = TINY.load(place.data, place.work), {"exclude_history": False}
            cells._rank_unseen(f"{row}-unseen", TINY, 0, place, kept, whole)
        assert len(seen) >= 2 and all(seen)

    @pytest.mark.parametrize("row", ["sft-ensemble", "gflowgr-ensemble-unseen"])
    def test_validation_chooses_the_weight_of_a_teacher(
        self, place: Place, row: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = []

        def ranked(*args: Any, teacher_weight: float, **options: Any) -> Metrics:
            seen.append(teacher_weight)
            return ensemble.rank_together(*args, teacher_weight=teacher_weight, **options)

        run(place, *before(row))
        monkeypatch.setattr(cells, "rank_together", ranked)
        cell = cells.run(row, TINY, 0, place)
        by_weight = cell.settings["validation_by_teacher_weight"]
        assert [float(weight) for weight in by_weight] == list(ensemble.WEIGHTS)
        best = max(by_weight.values())
        assert seen == [cell.settings["teacher_weight"]] and by_weight[f"{seen[0]:g}"] == best
        assert cell.validation["ndcg@10"] == pytest.approx(best)

    def test_weights_that_adapt_are_kept_of_every_step(self, place: Place) -> None:
        run(place, *before("gflowgr-tb-adaptive"), "gflowgr-tb-adaptive")
        schedule = WeightSchedule.load(place.schedule("tiny", "gflowgr-tb-adaptive", 0))
        assert set(schedule.strategies) == {"collaborative", "policy", "random"}
        assert len(schedule.rows) == TINY.extra_steps + 1  # and those of a step to come

    def test_the_budget_counts_what_it_is_built_on(self, place: Place) -> None:
        run(place, "sft", "sft-continued")
        start, continued = load_cells(place.results / "tiny")
        assert start.budget["steps"] == 2
        assert continued.budget["steps"] == 3 and continued.budget["contexts"] == 3 * 256
        total = start.budget["total_seconds"] + continued.budget["seconds"]
        assert continued.budget["total_seconds"] == pytest.approx(total, abs=0.11)

    def test_the_budget_counts_what_two_are_built_on_once(self) -> None:
        behind = {"gflowgr", "mixture", "sasrec", "item-knn"}
        assert cells._everything_behind("gflowgr-ensemble") == behind

    def test_what_a_row_is_built_on_has_to_be_there(self, place: Place) -> None:
        with pytest.raises(FileNotFoundError, match="gflowgr needs mixture of seed 0 first"):
            run(place, "gflowgr")

    def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Every step takes a second.
        monkeypatch.setattr(cells, "time", SimpleNamespace(process_time=itertools.count().__next__))
        run(place, "sft")
        whole = load_cells(place.results / "tiny")[0]
        shutil.rmtree(place.work)

        def kill(self: Any, *arguments: Any, **named: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(cells.Clock, "on_save", kill, raising=False)
            with pytest.raises(KeyboardInterrupt):
                run(place, "sft")
        assert list(place.work.glob("tiny/sft-0.partial/checkpoint-*"))
        run(place, "sft")
        again = load_cells(place.results / "tiny")[0]
        assert dict(again.test) == dict(whole.test)
        assert again.budget["seconds"] == whole.budget["seconds"] == whole.budget["steps"] == 2
        assert (again.test_rank == whole.test_rank).all()
        assert not list(place.work.glob("tiny/*.partial"))

    def test_seeds_differ(self, place: Place) -> None:
        run(place, "sft")
        run(place, "sft", seed=1)
        first, second = load_cells(place.results / "tiny")
        assert dict(first.test) != dict(second.test)


class TestTuning:
    @pytest.fixture(autouse=True)
    def two_points(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for row in ("sft", "gflowgr"):
            grid = {"training.learning_rate": [1e-3, 1e-2]}
            monkeypatch.setitem(ROWS, row, replace(ROWS[row], grid=grid))

    @pytest.mark.parametrize("row", ["sft", "gflowgr"])
    def test_test_items_change_nothing(self, tmp_path: Path, row: str) -> None:
        found = []
        for name, shuffled in (("plain", None), ("test", 1), ("validation", 2)):
            place = Place(tmp_path / name / "data", tmp_path / name / "work", tmp_path / name / "results")
            write_data(place.data)
            if shuffled is not None:
                shuffle_items(place.data / "tiny" / "interactions.parquet", shuffled)
            tune(place, row)
            points = read_grid(row, "tiny", place.results)
            found.append([(point["settings"], point["validation"]) for point in points])
        assert found[0] == found[1]
        # The same check sees a change where there is one to see.
        assert found[0] != found[2]

    def test_the_choice_is_used_once_the_grid_is_whole(self, place: Place) -> None:
        assert chosen_settings("sft", "tiny", place.results) == {}
        tune(place, "sft")
        points = read_grid("sft", "tiny", place.results)
        assert [point["settings"]["training.learning_rate"] for point in points] == [1e-3, 1e-2]
        best = max(points, key=lambda point: point["validation"]["ndcg@10"])
        rate = best["settings"]["training.learning_rate"]
        assert chosen_settings("sft", "tiny", place.results) == {"training": {"learning_rate": rate}}
        cell = cells.run("sft", TINY, 0, place)
        assert cell.settings["training"]["learning_rate"] == rate
        assert cell.grid == {"file": "tuning/sft.json", "points": 2}
        path = place.results / "tiny" / "tuning" / "sft.json"
        document = json.loads(path.read_text())
        path.write_text(json.dumps({**document, "points": document["points"][:1]}))
        assert chosen_settings("sft", "tiny", place.results) == {}

    def test_the_most_accurate_point_is_chosen_the_earlier_of_equals(self) -> None:
        points = [
            {"settings": {"a": name}, "validation": {"ndcg@10": ndcg}}
            for name, ndcg in (("low", 0.4), ("first", 0.9), ("equal", 0.9))
        ]
        assert best_point(points) == {"a": "first"}

    def test_points_of_other_settings_do_not_count(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tune(place, "sft")
        assert chosen_settings("sft", "tiny", place.results) != {}
        row = ROWS["sft"]
        for changes, known in (
            # What the grid chooses, its default may be anything.
            ({"training": {"learning_rate": 0.5}}, True),
            ({"training": {"weight_decay": 0.5}}, False),
        ):
            monkeypatch.setitem(ROWS, "sft", replace(row, settings=merge(row.settings, changes)))
            assert (chosen_settings("sft", "tiny", place.results) != {}) is known
        tune(place, "sft")
        points = read_grid("sft", "tiny", place.results)
        assert len(points) == 4 and len({point["base"] for point in points}) == 2
        assert chosen_settings("sft", "tiny", place.results) != {}


def tried(point: dict[str, Any]) -> dict[str, Any]:
    """What a point of the supervised model's grid could have come to."""
    return {"settings": point, "base": base_of("sft"), "seed": 0, "validation": {"ndcg@10": 0.1}}


def tune(place: Place, row: str) -> None:
    """Tries what is left of a row's grid."""
    run(place, *before(row))
    for point in grids.untried(row, "tiny", place.results):
        grids.add_point(row, "tiny", place.results, tuning.try_point(row, point, TINY, 0, place))


def shuffle_items(path: Path, from_the_end: int) -> None:
    """Deals the users' last (1) or last but one (2) items out among them."""
    frame = pandas.read_parquet(path).sort_values(["user_id", "timestamp"]).reset_index(drop=True)
    rows = frame.groupby("user_id").tail(from_the_end).groupby("user_id").head(1).index
    frame.loc[rows, "item_id"] = frame.loc[rows, "item_id"].sample(frac=1, random_state=0).to_numpy()
    frame.to_parquet(path, index=False)


class TestMissing:
    @pytest.fixture(autouse=True)
    def known(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(DATA_SETS, "tiny", TINY)

    def test_what_a_row_needs_comes_before_it(self, place: Place) -> None:
        tasks = missing(["tiny"], ["gflowgr-tb", "sft"], [3], place)
        names = [task.row for task in tasks]
        assert sorted(names) == ["gflowgr-tb", "sasrec", "sft"]
        for task, waits_for in tasks.items():
            assert {needed.row for needed in waits_for} == set(ROWS[task.row].built_on)
            assert all(names.index(needed.row) < names.index(task.row) for needed in waits_for)

    def test_a_result_that_is_there_is_not_made_again(self, place: Place) -> None:
        run(place, "sft")
        assert missing(["tiny"], ["sft"], [0], place) == {}
        assert [task.row for task in missing(["tiny"], ["sft-continued"], [0], place)] == ["sft-continued"]
        shutil.rmtree(place.work)
        assert missing(["tiny"], ["sft"], [0], place) == {}
        names = [task.row for task in missing(["tiny"], ["sft-continued"], [0], place)]
        assert names == ["sft", "sft-continued"]

    def test_grids_come_first(self, place: Place) -> None:
        tasks = missing(["tiny"], ["sft-smoothed", "gflowgr-flows"], [1, 2], place, tune=True)
        points = [task for task in tasks if task.point]
        assert points == [
            Task("tiny", row, 1, tuple(point.items()))
            for row in ("sft", "gflowgr-sasrec")
            for point in ROWS[row].points()
        ]
        for task, waits_for in tasks.items():
            if task.row == "gflowgr-flows":
                assert set(waits_for) >= {point for point in points if point.row == "gflowgr-sasrec"}
        for point in ROWS["sft"].points()[:2]:
            grids.add_point("sft", "tiny", place.results, tried(point))
        left = missing(["tiny"], ["sft"], [1], place, tune=True)
        assert [dict(task.point) for task in left] == [*ROWS["sft"].points()[2:], {}]

    def test_unknown_names(self, place: Place) -> None:
        with pytest.raises(ValueError, match="did you mean 'gflowgr'"):
            missing(["tiny"], ["gflowgrr"], [0], place)
        with pytest.raises(ValueError, match="dataset has the key 'tinny'"):
            missing(["tinny"], ["sft"], [0], place)


class TestReproduce:
    def test_tasks_run_in_order_and_a_failure_takes_its_followers_along(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # In processes of their own the small data set is unknown, so each of them fails at once.
        first, second = Task("tiny", "sft", 0), Task("tiny", "sft-continued", 0)
        said: list[str] = []
        with pytest.raises(KeyError, match="tiny"):
            reproduce({first: [], second: [first]}, place, jobs=2, say=said.append)
        assert said[-1] == "tiny sft-continued seed 0: left out, what it needs has failed"

    def test_points_are_tried_side_by_side_and_the_cell_takes_the_best(
        self, place: Place, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(DATA_SETS, "tiny", TINY)
        module = sys.modules["gflowgr.quality.reproduce"]
        monkeypatch.setattr(module, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
        grid = {"training.learning_rate": [1e-3, 1e-2]}
        monkeypatch.setitem(ROWS, "sft", replace(ROWS["sft"], grid=grid))
        both = Barrier(2, timeout=60)

        def together(row: str, point: dict[str, Any], *rest: Any) -> dict[str, Any]:
            # Nobody passes alone, and the first of the grid comes last.
            both.wait()
            if point == ROWS["sft"].points()[0]:
                sleep(0.5)
            return tried(point)

        monkeypatch.setattr(tuning, "try_point", together)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        tasks = missing(["tiny"], ["sft"], [0], place, tune=True)
        reproduce(tasks, place, jobs=2, say=lambda line: None)
        points = read_grid("sft", "tiny", place.results)
        assert [point["settings"] for point in points] == ROWS["sft"].points()
        (cell,) = load_cells(place.results / "tiny")
        assert cell.grid == {"file": "tuning/sft.json", "points": 2}
        best = best_point(points)["training.learning_rate"]
        assert cell.settings["training"]["learning_rate"] == best

    def test_a_killed_run_leaves_no_process_that_goes_on(self, tmp_path: Path) -> None:
        script = tmp_path / "long.py"
        script.write_text(
            "import multiprocessing, os, sys, time\n"
            "from concurrent.futures import ProcessPoolExecutor\n"
            "from gflowgr.quality.reproduce import _end_with_parent\n"
            "def work():\n"
            "    print(os.getpid(), flush=True)\n"
            "    time.sleep(600)\n"
            "if __name__ == '__main__':\n"
            "    context = multiprocessing.get_context('spawn')\n"
            "    pool = ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)\n"
            "    pool.submit(work).result()\n"
        )
        with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout is not None
            worker = int(parent.stdout.readline())
            os.kill(worker, 0)
            parent.kill()
            # The pipe's other end closes with the last of them.
            left, _ = parent.communicate(timeout=60)
            assert left == ""


class TestTokenizers:
    def test_given_codes_share_a_leaf_or_get_a_level(self, place: Place) -> None:
        codes = np.stack([np.arange(ITEMS) // 6, np.arange(ITEMS) % 6], 1)
        codes[1] = codes[0]
        np.save(place.data / "tiny" / "semantic_ids" / "codes.npy", codes.astype(np.int16))
        shared = TINY.load(place.data, place.work).semantic_ids
        assert shared is not None and shared.codes.shape == (ITEMS, 2)
        data = replace(TINY, name="other", folder="tiny", collisions="extra-level")
        resolved = data.load(place.data, place.work).semantic_ids
        assert resolved is not None and resolved.codes[:2].tolist() == [[0, 0, 0], [0, 0, 1]]
        assert resolved.content_codes.tolist() == shared.codes.tolist()
        assert data.tokenizer == "codes, extra-level" and TINY.tokenizer == "codes"

    def test_a_rehearsal_asks_for_the_validation_items(self, place: Place) -> None:
        rehearsal = replace(TINY, name="rehearsal", folder="tiny", left_out=1)
        asked, real = (split(data.load(place.data, place.work).log) for data in (rehearsal, TINY))
        assert torch.equal(asked.test.target, real.validation.target)
        assert torch.equal(asked.test.history, real.validation.history)
        # After an item that nobody was trained with.
        assert len(asked.sequences.items) == len(real.sequences.items) - len(real.test)

    def test_our_own_codes_come_from_the_texts_of_the_items(self, place: Place) -> None:
        texts = [f"word{item % 5} word{item % 7} of {item % 3}" for item in range(ITEMS)]
        table = pandas.DataFrame({"item_id": range(ITEMS), "text": texts})
        table.sample(frac=1.0, random_state=0).to_parquet(place.data / "tiny" / "items.parquet")
        ours = replace(TINY, codes="text", collisions="extra-level")
        wanted = resolve_collisions(quantise(embed_text(texts)))
        loaded = ours.load(place.data, place.work).semantic_ids
        assert loaded is not None and np.array_equal(loaded.codes.numpy(), wanted)
        (kept,) = (place.work / "tiny").glob("semantic_ids-*.npy")
        np.save(kept, np.load(kept)[::-1])
        again = ours.load(place.data, place.work).semantic_ids
        assert again is not None and not np.array_equal(again.codes.numpy(), wanted), "made once, then kept"
        table.assign(text=texts[::-1]).to_parquet(place.data / "tiny" / "items.parquet")
        other = ours.load(place.data, place.work).semantic_ids
        assert other is not None and len(list((place.work / "tiny").glob("semantic_ids-*.npy"))) == 2
        table[1:].to_parquet(place.data / "tiny" / "items.parquet")
        with pytest.raises(ValueError, match="needs one row for each of the log's items"):
            ours.load(place.data, place.work)


def test_rows_are_built_on_rows() -> None:
    for name, row in ROWS.items():
        assert all(other in ROWS for other in row.built_on), name
        assert row.like is None or ROWS[row.like].grid, name
    assert set(MAIN) <= set(ROWS)


COMMITTED = Path(__file__).parent.parent / "benchmarks" / "results" / "quality"


@pytest.mark.parametrize(
    "path",
    sorted(COMMITTED.glob("*/tuning/*.json")),
    ids=lambda path: f"{path.parent.parent.name}-{path.stem}",
)
def test_what_the_committed_grids_chose_is_what_rows_have(path: Path) -> None:
    chosen = json.loads(path.read_text(encoding="utf-8"))["chosen"]
    data_set, row = path.parent.parent.name, path.stem
    assert grids.chosen_settings(row, data_set, COMMITTED) == grids.nested(chosen)


@pytest.mark.parametrize(
    "name",
    [name for name, row in ROWS.items() if row.kind not in ("scorer", "mixture", "ensemble", "unseen")],
)
def test_the_settings_of_a_row_are_a_plan(name: str, place: Place) -> None:
    settings = cells.settings_of(name, TINY, 0, place)
    # What ranks together is a row of its own.
    assert "ranking" not in settings
    if "collaborative" in settings:
        settings["collaborative"] = {"model": "popularity"}
    assert Plan.of(settings).config(place.work).seed == 0


def test_rollouts_of_the_control_are_ours() -> None:
    ours, control = (ROWS[name].settings["training"] for name in ("gflowgr", "sft-rollouts"))
    names = {name for name in ours if name.startswith("rollout")} - {"rollout_epsilon"}
    names |= {"reward_candidates", "num_train_epochs", "per_device_train_batch_size"}
    assert len(names) == 7 and all(control[name] == ours[name] for name in names)
    # To the control a random item would be a target.
    assert control["rollout_epsilon"] == 0 < ours["rollout_epsilon"]


def test_ours_and_the_supervised_model_have_grids_of_one_size() -> None:
    assert len(ROWS["sft"].points()) == len(ROWS["gflowgr"].points()) > 1


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_config_of_a_recipe_is_the_recipe(name: str) -> None:
    config = Path(__file__).parents[1] / "configs" / f"{name}.yaml"
    assert read_yaml(config) == RECIPES[name]
