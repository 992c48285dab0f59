"""The pipeline on a small log: every step's files, their failures, and what a run says afterwards."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback

from gflowgr import pipeline
from gflowgr.adaptive import WeightSchedule
from gflowgr.assembly import SECTIONS, Plan
from gflowgr.backbones import GenerativeRecommender
from gflowgr.collaborative import ItemKNN, Mixture, Popularity, SASRec, SASRecNetwork
from gflowgr.config import GFlowGRConfig, check_kind
from gflowgr.data import InteractionLog, split
from gflowgr.ensemble import WEIGHTS, rank_together
from gflowgr.folders import DataFolder, Items
from gflowgr.generation import score_all
from gflowgr.quality.run_users import load_run_users
from gflowgr.quality.runs import load_run
from gflowgr.recipes import GFLOWGR, OBJECTIVE, adapted
from gflowgr.settings import merge, override, read_yaml, to_yaml
from gflowgr.shared_prefixes import SharedPrefixes
from gflowgr.trie import PrefixTrie

NUM_ITEMS = 24
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SMALL: dict[str, Any] = {
    "split": {"max_history": 6},
    "model": {"layers": 1, "d_model": 16, "heads": 2},
    "collaborative": {"model": "item-knn", "progress": False},
    "training": {
        "max_steps": 6,
        "eval_steps": 3,
        "eval_strategy": "steps",
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "disable_tqdm": True,
        "use_cpu": True,
    },
}


def a_log() -> pandas.DataFrame:
    """Users who walk through the catalogue by a fixed stride; ids with gaps, rows in no order."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(40):
        start, stride = rng.integers(NUM_ITEMS), rng.choice([1, 5])
        for step in range(rng.integers(6, 10)):
            rows.append(
                (1000 + 3 * user, 2 * int((start + stride * step) % NUM_ITEMS), step, rng.integers(1, 6))
            )
    frame = pandas.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "stars"])
    return frame.sample(frac=1, random_state=0)


def an_items_table() -> pandas.DataFrame:
    words = ["river", "mountain", "forest", "desert"]
    return pandas.DataFrame(
        {
            "item_id": [2 * item for item in reversed(range(NUM_ITEMS))],
            "title": [f"The {words[item % 4]} no. {item}" for item in reversed(range(NUM_ITEMS))],
            "kind": [words[item % 4] for item in reversed(range(NUM_ITEMS))],
        }
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    a_log().to_csv(folder / "log.csv", index=False)
    an_items_table().to_csv(folder / "items.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def prepared(files: Path) -> Path:
    pipeline.prepare(
        files / "log.csv",
        files / "data",
        items=files / "items.csv",
        rating="stars",
        text=["title", "kind"],
        k=3,
    )
    pipeline.tokenize(files / "data", levels=2, codebook_size=4)
    return files / "data"


@pytest.fixture(scope="module")
def trained(prepared: Path) -> pipeline.TrainedRun:
    return pipeline.train(prepared, prepared.parent / "run", SMALL)


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_prepared_items_stand_in_the_order_of_the_log(prepared: Path) -> None:
    folder = DataFolder.load(prepared)
    table = an_items_table().set_index("item_id")
    assert folder.items.titles == [table["title"][item_id] for item_id in folder.log.item_ids]
    assert folder.items.texts[1] == f"{folder.items.titles[1]} {table['kind'][2]}"
    assert len(folder.log) == len(a_log())
    total = a_log()["stars"].sum()
    assert folder.log.value.sum() == pytest.approx(float(total))


def test_prepare_counts_what_it_drops_and_what_has_no_title(tmp_path: Path) -> None:
    log = pandas.concat(
        [a_log(), pandas.DataFrame({"user_id": [1], "item_id": [0], "timestamp": [0], "stars": [1]})]
    )
    items = an_items_table().iloc[3:]
    made = pipeline.prepare(log, tmp_path / "data", items=items, k=3)
    assert (made.dropped_interactions, made.items_without_title) == (1, 3)
    assert (made.users, made.items, made.interactions) == (40, NUM_ITEMS, len(a_log()))
    titles = DataFolder.load(tmp_path / "data").items.titles
    assert sum(title.isdigit() for title in titles) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user": "usr_id"}, "usr_id.*user_id"),
        ({"rating": "star"}, "star.*stars"),
        ({"title": "titel"}, "titel.*title"),
        ({"text": ["kinds"]}, "kinds.*kind"),
        ({"k": 1000}, "k_core"),
        ({"items": "missing.csv"}, "missing.csv"),
        ({"items": 3}, "int"),
    ],
)
def test_prepare_names_what_is_wrong_and_leaves_nothing(
    files: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    options: dict[str, Any] = {"items": files / "items.csv", **change}
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        pipeline.prepare(files / "log.csv", tmp_path / "data", **options)
    assert names_in(tmp_path) == set()


def test_an_item_with_two_rows_is_refused(tmp_path: Path) -> None:
    items = pandas.concat([an_items_table(), an_items_table().tail(1)])
    with pytest.raises(ValueError, match="'0' has more than one row"):
        pipeline.prepare(a_log(), tmp_path / "data", items=items, k=3)


def test_items_of_other_ids_are_refused(tmp_path: Path) -> None:
    items = an_items_table().assign(item_id=lambda frame: frame["item_id"] + 1)
    with pytest.raises(ValueError, match="no row for any item"):
        pipeline.prepare(a_log(), tmp_path / "data", items=items, k=3)


def test_what_is_there_stays_unless_it_may_go(prepared: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    shutil.copytree(prepared, output)
    before = names_in(output)
    with pytest.raises(ValueError, match="exists already"):
        pipeline.prepare(a_log(), output, k=3)
    with pytest.raises(ValueError, match="k_core"):
        pipeline.prepare(a_log(), output, k=1000, overwrite=True)
    assert names_in(output) == before
    pipeline.prepare(a_log(), output, k=3, overwrite=True)
    assert names_in(tmp_path) == {"data", "data/interactions.parquet", "data/items.parquet"}


def test_semantic_ids_and_trie_are_of_one_catalogue(prepared: Path) -> None:
    folder = DataFolder.load(prepared, tokenized=True)
    assert folder.semantic_ids is not None
    trie = PrefixTrie.load(prepared / "trie.safetensors")
    assert trie.fingerprint == folder.semantic_ids.trie().fingerprint
    assert trie.item_node.unique().numel() == NUM_ITEMS
    # The words that tell four kinds apart are what the first codes follow.
    first = folder.semantic_ids.codes[:, 0]
    kinds = torch.arange(NUM_ITEMS) % 4
    assert all(len(first[kinds == kind].unique()) == 1 for kind in range(4))


def test_ready_made_codes_by_id_and_in_order(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    codes = np.stack([np.arange(2 * NUM_ITEMS) // 7, np.arange(2 * NUM_ITEMS) % 7], 1)
    np.save(tmp_path / "codes.npy", codes.astype(np.int16))
    np.save(tmp_path / "ordered.npy", codes[::2])
    with pytest.raises(ValueError, match="already"):
        pipeline.tokenize(data, codes=tmp_path / "codes.npy")
    pipeline.tokenize(data, codes=tmp_path / "codes.npy", overwrite=True)
    by_id = DataFolder.load(data).semantic_ids
    pipeline.tokenize(data, codes=tmp_path / "ordered.npy", rows="order", overwrite=True)
    in_order = DataFolder.load(data).semantic_ids
    assert by_id is not None and in_order is not None
    assert torch.equal(by_id.codes, torch.from_numpy(codes[::2]))
    assert torch.equal(in_order.codes, by_id.codes)
    with pytest.raises(ValueError, match="48 rows, needs 24"):
        pipeline.tokenize(data, codes=tmp_path / "codes.npy", rows="order", overwrite=True)
    with pytest.raises(ValueError, match="item 24 has no row"):
        pipeline.tokenize(data, codes=tmp_path / "ordered.npy", overwrite=True)
    assert torch.equal(DataFolder.load(data).semantic_ids.codes, by_id.codes)  # type: ignore[union-attr]


def test_embeddings_are_quantised_and_collisions_told_apart(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    points = np.repeat(np.eye(2, dtype=np.float32), 12, axis=0)
    options: dict[str, Any] = {"embeddings": points, "rows": "order", "levels": 1, "codebook_size": 2}
    made = pipeline.tokenize(data, **options, overwrite=True)
    assert (made.colliding_items, made.largest_collision, made.codebook_sizes) == (24, 12, (2, 12))
    told_apart = DataFolder.load(data).semantic_ids
    assert told_apart is not None and told_apart.content_codes.shape == (24, 1)
    kept = pipeline.tokenize(data, **options, collisions="multiplicity", overwrite=True)
    assert (kept.codebook_sizes, kept.nodes) == ((2,), 3)
    shared = DataFolder.load(data).semantic_ids
    assert shared is not None and not shared.extra_level


def test_tokenize_needs_one_source_of_codes(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="codes and embeddings"):
        pipeline.tokenize(prepared, codes="a.npy", embeddings="b.npy", overwrite=True)
    pipeline.prepare(a_log(), tmp_path / "data", k=3)
    with pytest.raises(ValueError, match="no text of its items for sentences"):
        pipeline.tokenize(tmp_path / "data", sentences="a model")
    few = a_log().groupby("user_id").head(2)
    pipeline.prepare(few, tmp_path / "few", k=1)
    with pytest.raises(ValueError, match=r"its interactions give no codes \(.*\): prepare it with items"):
        pipeline.tokenize(tmp_path / "few")
    with pytest.raises(FileNotFoundError, match="gflowgr tokenize"):
        pipeline.train(tmp_path / "data", tmp_path / "run", SMALL)
    with pytest.raises(FileNotFoundError, match="gflowgr prepare"):
        pipeline.tokenize(tmp_path / "nothing")


def test_items_without_text_are_coded_by_who_took_them_in_training(tmp_path: Path) -> None:
    """The last two items of each user must not show in the codes, the others must."""
    log = a_log()
    late = log.sort_values("timestamp").groupby("user_id").tail(2).index
    items = log["item_id"].to_numpy()
    rng = np.random.default_rng(1)
    codes = {}
    for name, changed in (("as it is", late[:0]), ("late", late), ("early", log.index.difference(late))):
        other = log.copy()
        other.loc[changed, "item_id"] = rng.permutation(items[log.index.get_indexer(changed)])
        pipeline.prepare(other, tmp_path / name, k=1)
        made = pipeline.tokenize(tmp_path / name, levels=2, codebook_size=8, dimensions=4)
        assert (made.source, made.items) == ("interactions", NUM_ITEMS)
        codes[name] = DataFolder.load(tmp_path / name, tokenized=True).semantic_ids.content_codes  # type: ignore[union-attr]
    assert torch.equal(codes["late"], codes["as it is"])
    assert not torch.equal(codes["early"], codes["as it is"])
    assert pipeline.train(tmp_path / "late", tmp_path / "run", SMALL).test.num_items == NUM_ITEMS


def test_a_run_is_whole_and_its_numbers_can_be_had_again(trained: pipeline.TrainedRun) -> None:
    assert {path.name for path in trained.path.iterdir()} >= {
        "checkpoint",
        "config.yaml",
        "items.parquet",
        "log.json",
        "metrics.json",
        "users.npz",
    }
    assert not list(trained.path.glob("checkpoint-*"))
    assert not list(trained.path.parent.glob("run.partial"))
    written = json.loads((trained.path / "metrics.json").read_text())
    assert written["test"] == trained.test.to_dict()
    again = pipeline.evaluate(trained.path, output=trained.path.parent / "again.json")
    assert again.summary() == pytest.approx(trained.test.summary(), rel=1e-5, nan_ok=True)
    assert json.loads((trained.path.parent / "again.json").read_text())["part"] == "test"
    validation = pipeline.evaluate(trained.path, part="validation")
    assert validation.summary() == pytest.approx(trained.validation.summary(), rel=1e-5, nan_ok=True)


def test_a_run_keeps_what_it_reached_for_each_user(trained: pipeline.TrainedRun, prepared: Path) -> None:
    kept = load_run_users(trained.path)
    assert (kept.places, kept.num_items) == (10, NUM_ITEMS)
    for part, rank in (("validation", kept.validation_rank), ("test", kept.test_rank)):
        measured = getattr(trained, part)
        assert rank.dtype == np.uint8
        assert rank.tolist() == measured.rank.tolist()
        gains = [1 / math.log2(1 + place) if place else 0.0 for place in rank.tolist()]
        assert gains == pytest.approx(measured.per_user["ndcg@10"].tolist())
    log = DataFolder.load(prepared).log
    by_user = [log.item[log.user == user] for user in range(log.num_users)]
    training = np.concatenate([items[:-2] for items in by_user]).tolist()
    assert kept.users.history_length.tolist() == [min(6, len(items) - 1) for items in by_user]
    assert kept.exclude_history is False
    assert kept.users.target_popularity.tolist() == [training.count(items[-1]) for items in by_user]


def test_users_of_another_run_are_refused(trained: pipeline.TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    with np.load(run / "users.npz") as stored:
        arrays = dict(stored)
    for change, message in (
        ({"test_rank": np.roll(arrays["test_rank"], 1) // 2}, "the ranks give"),
        ({"test_rank": arrays["test_rank"][1:]}, "the ranks give|40 users, test_rank 39"),
        (
            {"validation_rank": arrays["test_rank"].astype(np.float32)},
            "validation_rank needs uint8 or uint16",
        ),
        ({"more": arrays["test_rank"]}, "needs the arrays"),
    ):
        np.savez(run / "users.npz", **{**arrays, **change})
        with pytest.raises(ValueError, match=f"users.npz.*({message})"):
            load_run_users(run)
    np.savez(run / "users.npz", **arrays)
    (run / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match=r"metrics\.json: not the metrics of a run"):
        load_run_users(run)


def test_the_best_checkpoint_on_validation_is_kept(trained: pipeline.TrainedRun) -> None:
    seen = [entry["eval_ndcg@10"] for entry in trained.history if "eval_ndcg@10" in entry]
    assert len(seen) >= 2
    assert trained.validation.summary()["ndcg@10"] == pytest.approx(max(seen))


def test_evaluate_refuses_another_catalogue(
    trained: pipeline.TrainedRun, prepared: Path, tmp_path: Path
) -> None:
    other = tmp_path / "data"
    shutil.copytree(prepared, other)
    pipeline.tokenize(other, levels=1, codebook_size=8, overwrite=True)
    with pytest.raises(ValueError, match="another trie"):
        pipeline.evaluate(trained.path, other)
    with pytest.raises(ValueError, match=r"eval_num_beems.*eval_num_beams"):
        pipeline.evaluate(trained.path, eval_num_beems=3)
    with pytest.raises(FileNotFoundError, match="gflowgr train"):
        pipeline.evaluate(tmp_path)


def test_recommendations_are_the_most_probable_items(trained: pipeline.TrainedRun) -> None:
    items = Items.load(trained.path / "items.parquet")
    history = [3, 8, 13]
    names = [str(items.ids[3]), items.titles[8], "no. 13"]
    understood, recommended = pipeline.recommend(
        trained.path, names, num_items=NUM_ITEMS, num_beams=NUM_ITEMS
    )
    assert understood == [items.titles[item] for item in history]
    model = GenerativeRecommender.load(trained.path / "checkpoint").eval()
    expected = score_all(model, torch.tensor([history]), exclude_history=True)[0]
    order = [item for item in expected.argsort(descending=True).tolist() if item not in history]
    assert [row.item_id for row in recommended] == [str(items.ids[item]) for item in order]
    assert [row.probability for row in recommended] == pytest.approx(expected[order].exp().tolist(), rel=1e-4)
    _, with_seen = pipeline.recommend(
        trained.path, names, num_items=NUM_ITEMS, num_beams=NUM_ITEMS, exclude_history=False
    )
    assert sum(row.probability for row in with_seen) == pytest.approx(1.0, abs=1e-4)
    _, without = pipeline.recommend(
        trained.path, names, num_items=NUM_ITEMS, num_beams=NUM_ITEMS, exclude=[names[0], "no. 11"]
    )
    rest = {str(items.ids[item]) for item in range(NUM_ITEMS) if item not in (3, 8, 13, 11)}
    assert {row.item_id for row in without} == rest


def test_the_teacher_ranks_beside_the_model(
    trained: pipeline.TrainedRun, prepared: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="item-knn, whose scores are no distribution"):
        pipeline.evaluate(trained.path, teacher_weight=0.5)
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    (run / pipeline.COLLABORATIVE).unlink()
    with pytest.raises(FileNotFoundError, match="a teacher to rank beside its model; a teacher_weight of 0"):
        pipeline.recommend(run, ["no. 3"], teacher_weight=0.5)

    counts = torch.arange(NUM_ITEMS) ** 3
    teacher = Popularity(counts)
    teacher.save(run / pipeline.COLLABORATIVE)
    items = Items.load(run / "items.parquet")
    _, popular = pipeline.recommend(run, ["no. 23"], num_items=3, teacher_weight=1.0)
    assert [row.item_id for row in popular] == [str(items.ids[item]) for item in (22, 21, 20)]
    model = GenerativeRecommender.load(run / "checkpoint").eval()
    history = torch.tensor([[3, 8]])
    ours = score_all(model, history, exclude_history=True)[0].exp()
    theirs = teacher.scores(history)[0].masked_fill(ours == 0, -torch.inf).softmax(0)
    _, both = pipeline.recommend(run, ["no. 3", "no. 8"], num_items=NUM_ITEMS, teacher_weight=0.25)
    expected = (ours**0.75 * theirs**0.25).sort(descending=True).values[: NUM_ITEMS - 2]
    assert [row.probability for row in both] == pytest.approx(expected.tolist(), rel=1e-4)

    alone = pipeline.evaluate(run, teacher_weight=1.0, exclude_history=True).summary()
    longest = np.bincount(DataFolder.load(prepared).log.user).max() - 1
    assert alone["coverage@10"] <= (10 + longest) / NUM_ITEMS  # the most popular but for one's own


def test_a_mixture_ranks_beside_the_model(
    trained: pipeline.TrainedRun, prepared: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    parts = split(DataFolder.load(prepared).log, max_history=6)
    fitting: dict[str, Any] = {"sasrec": {"hidden_size": 8, "epochs": 1}, "max_history": 3, "progress": False}
    teacher = Mixture.fit(parts.sequences, parts.num_items, validation=parts.validation, **fitting)
    teacher.save(run / pipeline.COLLABORATIVE)
    model = GenerativeRecommender.load(run / "checkpoint")
    both = rank_together(model, teacher, parts.test, teacher_weight=0.7, num_items=3)
    found = pipeline.evaluate(run, teacher_weight=0.7, eval_num_items=3)
    assert found.rank.tolist() == both.rank.tolist()
    assert found.summary() == pytest.approx(both.summary(), rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["the river"], "fits 6 titles"),
        (["The mountian no. 5"], "nearest titles are 'The mountain no. 5'"),
        ([""], "neither an id nor a title"),
        ([], "at least one item"),
    ],
)
def test_recommend_names_an_item_it_does_not_know(
    trained: pipeline.TrainedRun, names: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.recommend(trained.path, names)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("modle.layers=2", "modle.*'model'"),
        ("model.layer=2", "layer.*'layers'"),
        ("model.kind=gru", "gru.*decoder"),
        ("model.kind=checkpoint", "folder"),
        ("model.lora={rank: 3}", "rank"),
        ("split.max_histroy=3", "max_histroy.*'max_history'"),
        ("reward.fussion=sum", "fussion.*'fusion'"),
        ("reward.terms={likeness: {}}", "likeness"),
        ("reward.terms={collaborative: {temprature: 2}}", "temprature.*'temperature'"),
        ("sampler.stratgies=random", "stratgies.*'strategies'"),
        ("sampler.adapt={to: resid}", "to: got 'resid'"),
        ("sampler={strategies: {random: 1, policy: 1}, adapt: {rat: 1}}", "'rat'.*'rate'"),
        ("sampler={strategies: {random: 1, policy: 1}, adapt: {rate: 0}}", "rate: got 0"),
        ("sampler.adapt={}", "strategies: got collaborative, need at least two"),
        ("collaborative.model=bert", "bert.*sasrec"),
        ("collaborative.neighbors=3", "neighbors.*'neighbours'"),
        ("collaborative={model: mixture, sasrec: {hiden_size: 3}}", "hiden_size.*'hidden_size'"),
        ("collaborative={model: mixture, item_knn: {seed: 3}}", "collaborative.item_knn.*seed"),
        ("training.learning_rat=1", "learning_rat.*'learning_rate'"),
        ("training.objective=dpo", "dpo.*flow_matching"),
        ("training.output_dir=x", "output_dir"),
        ("contexts=rows", "rows.*windows"),
        ("model=3", "model needs keys"),
        ("ranking.teacher_wait=0.5", "teacher_wait.*'teacher_weight'"),
        ("ranking.teacher_weight=1.5", r"ranking\.teacher_weight is 1.5, needs to be from 0 to 1"),
        ("ranking.teacher_weight=0.5", r"collaborative\.model is item-knn, whose scores are no distribution"),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_left(
    prepared: Path, tmp_path: Path, pair: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline.train(prepared, tmp_path / "run", override(SMALL, [pair]))
    assert names_in(tmp_path) == set()


POPULAR = ["collaborative={model: popularity}", "ranking.teacher_weight=0.5"]


def test_a_run_ranks_as_its_settings_say(prepared: Path, tmp_path: Path) -> None:
    run = pipeline.train(prepared, tmp_path / "run", override(SMALL, POPULAR))
    assert pipeline.teacher_weight(run.path) == run.teacher_weight == 0.5
    assert json.loads((run.path / "metrics.json").read_text())["teacher_weight"] == 0.5
    assert load_run(run.path).name == f"{run.path}, with its teacher"
    both, alone = pipeline.evaluate(run.path), pipeline.evaluate(run.path, teacher_weight=0.0)
    assert run.test.rank.tolist() == both.rank.tolist() != alone.rank.tolist()
    validation = pipeline.evaluate(run.path, part="validation").rank
    assert run.validation.rank.tolist() == validation.tolist()
    lists = [pipeline.recommend(run.path, ["no. 3"], **given)[1] for given in ({}, {"teacher_weight": 0.5})]
    assert lists[0] == lists[1] != pipeline.recommend(run.path, ["no. 3"], teacher_weight=0.0)[1]


def test_validation_chooses_the_weight_of_the_teacher(prepared: Path, tmp_path: Path) -> None:
    settings = override(SMALL, [*POPULAR, "ranking.teacher_weight=validation", "training.eval_num_items=4"])
    run = pipeline.train(prepared, tmp_path / "run", settings)
    assert run.by_teacher_weight is not None
    measured = {float(weight): ndcg for weight, ndcg in run.by_teacher_weight.items()}
    assert list(measured) == list(WEIGHTS)
    for weight, ndcg in measured.items():
        again = pipeline.evaluate(run.path, part="validation", teacher_weight=weight)
        assert ndcg == pytest.approx(again.summary()["ndcg@4"])
    assert len(set(measured.values())) > 2
    best = max(measured.values())
    assert measured[run.teacher_weight] == best
    assert run.validation.summary()["ndcg@4"] == pytest.approx(best)
    # Whoever asks the run later gets that weight, too.
    assert pipeline.teacher_weight(run.path) == run.teacher_weight
    assert pipeline.evaluate(run.path).rank.tolist() == run.test.rank.tolist()
    pipeline.evaluate(run.path, output=run.path / "metrics.json", teacher_weight=0.0)
    assert pipeline.teacher_weight(run.path) == run.teacher_weight
    ranking = run.path / "ranking.json"
    document = json.loads(ranking.read_text())
    assert document["teacher_weight"] == run.teacher_weight
    assert document["validation_by_teacher_weight"] == run.by_teacher_weight
    lists = [
        pipeline.recommend(run.path, ["no. 3"], teacher_weight=weight)[1]
        for weight in (None, run.teacher_weight)
    ]
    assert lists[0] == lists[1]
    with pytest.raises(TypeError, match=r"ranking\.teacher_weight is 'half', needs 'validation' or a number"):
        Plan.of({"ranking": {"teacher_weight": "half"}})
    for damaged in ("", "[]", "{}", '{"teacher_weight": 2}'):
        ranking.write_text(damaged)
        with pytest.raises(ValueError, match=r"ranking\.json: says no weight of the teacher"):
            pipeline.evaluate(run.path)
    ranking.unlink()
    with pytest.raises(FileNotFoundError, match=r"ranking\.json is gone.*; give a teacher_weight"):
        pipeline.recommend(run.path, ["no. 3"])
    assert pipeline.recommend(run.path, ["no. 3"], teacher_weight=run.teacher_weight)[1] == lists[0]


def test_a_teacher_may_only_rank(prepared: Path, tmp_path: Path) -> None:
    settings = override(SMALL, ["training.objective=sft", *POPULAR])
    run = pipeline.train(prepared, tmp_path / "run", settings)
    other = pipeline.train(prepared, tmp_path / "other", override(SMALL, ["training.objective=sft"]))
    alone = pipeline.evaluate(run.path, teacher_weight=0.0)
    assert alone.rank.tolist() == other.test.rank.tolist() != run.test.rank.tolist()
    saved = override(SMALL, ["training.objective=sft", "ranking.teacher_weight=0.5"])
    knn = tmp_path / "knn.safetensors"
    ItemKNN.fit(split(DataFolder.load(prepared).log).sequences, NUM_ITEMS, progress=False).save(knn)
    with pytest.raises(
        ValueError, match=r"collaborative\.path is item-knn, whose scores are no distribution"
    ):
        pipeline.train(prepared, tmp_path / "third", {**saved, "collaborative": {"path": str(knn)}})


class StopAt(TrainerCallback):
    """A power cut, as far as a trainer can tell."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("power cut")


def test_a_run_cut_off_before_its_first_checkpoint_leaves_nothing(prepared: Path, tmp_path: Path) -> None:
    alone = override(SMALL, ["training.objective=sft"])
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(prepared, tmp_path / "run", alone, callbacks=[StopAt(2)])
    assert names_in(tmp_path) == set()
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        pipeline.train(prepared, tmp_path / "run", alone, resume=True)


def test_a_run_cut_off_before_its_first_checkpoint_keeps_its_teacher(
    prepared: Path, trained: pipeline.TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was wrong with the rest of the settings can be mended, without another teacher."""
    output = tmp_path / "run"
    faster = override(SMALL, ["training.learning_rate=0.5"])
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(prepared, output, faster, callbacks=[StopAt(1)])
    assert names_in(tmp_path / "run.partial") == {"config.yaml", "data.sha256", pipeline.COLLABORATIVE}
    for changed, key in (
        ("split.max_history=5", "split"),
        ("collaborative.model=als", "collaborative"),
        ("training.seed=5", r"training\.seed"),
    ):
        with pytest.raises(ValueError, match=f"begun with other settings: {key}"):
            pipeline.train(prepared, output, override(SMALL, [changed]), resume=True)
    with monkeypatch.context() as patch:
        patch.delattr("gflowgr.assembly.Plan.build_collaborative")
        resumed = pipeline.train(prepared, output, SMALL, resume=True)
    assert resumed.test.summary() == pytest.approx(trained.test.summary(), rel=1e-5, nan_ok=True)
    assert read_yaml(output / "config.yaml")["training"] == SMALL["training"]


@pytest.fixture
def cut_off(prepared: Path, tmp_path: Path) -> Path:
    """The output of a run with item neighbours as teacher, which broke off in its first checkpoint."""
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(prepared, tmp_path / "run", SMALL, callbacks=[StopAt(1)])
    (tmp_path / "run.partial" / "checkpoint-2").mkdir()
    return tmp_path / "run"


def test_a_kept_teacher_has_to_serve_for_the_settings_of_now(prepared: Path, cut_off: Path) -> None:
    partial = cut_off.with_name("run.partial")
    ItemKNN.fit(split(DataFolder.load(prepared).log).sequences, NUM_ITEMS + 1, progress=False).save(
        partial / pipeline.COLLABORATIVE
    )
    with pytest.raises(ValueError, match="a recommender of 25 items, needs the catalogue's 24"):
        pipeline.train(prepared, cut_off, SMALL, resume=True)
    knn = cut_off.with_name("knn.safetensors")
    ItemKNN.fit(split(DataFolder.load(prepared).log).sequences, NUM_ITEMS, progress=False).save(knn)
    given = {**SMALL, "collaborative": {"path": str(knn)}}
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(prepared, cut_off, given, overwrite=True, callbacks=[StopAt(1)])
    weighed = {**given, "ranking": {"teacher_weight": "validation"}}
    with pytest.raises(ValueError, match="is item-knn, whose scores are no distribution"):
        pipeline.train(prepared, cut_off, weighed, resume=True)
    assert pipeline.train(prepared, cut_off, given, resume=True).teacher_weight == 0


def test_a_kept_teacher_that_nothing_asks_for_goes(prepared: Path, cut_off: Path) -> None:
    alone = override(SMALL, ["training.save_steps=1", "training.eval_steps=1", "training.max_steps=1"])
    alone = override(alone, ["training.objective=sft", "training.save_total_limit=null"])
    pipeline.train(prepared, cut_off, alone, resume=True)
    left = {path.name for path in cut_off.iterdir()}
    assert pipeline.COLLABORATIVE not in left
    assert not any(name.startswith("checkpoint-") for name in left)


def test_what_cannot_be_is_found_before_a_teacher_is_fitted(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("gflowgr.assembly.Plan.build_collaborative")
    too_few = override(SMALL, ["training.reward_candidates=2", "training.objective=flow_matching"])
    later = {"terms": {"interaction": {"future_scale": 0.5}, "collaborative": {}}}
    with pytest.raises(ValueError, match="reward_candidates is 2, needs more than"):
        pipeline.train(prepared, tmp_path / "run", {**too_few, "reward": later})
    rewarded = {"reward": {"terms": {"interaction": {}}}}
    with pytest.raises(ValueError, match="collaborative is None, needs a recommender for candidates=12"):
        wanted = override(SMALL, ["training.reward_candidates=12", "training.objective=flow_matching"])
        pipeline.train(prepared, tmp_path / "run", {**wanted, **rewarded})
    pooled = ["training.rollout_share=0.5", "training.rollout_reuse=2", "training.reward_candidates=12"]
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000)
    monkeypatch.setattr("gflowgr.rollouts.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"all rollouts take 0\.\d MB, .* has 0\.0 MB; a larger rollout_reuse"):
        pipeline.train(prepared, tmp_path / "run", override(SMALL, pooled))
    assert names_in(tmp_path) == set()


def test_a_saved_teacher_of_another_catalogue_is_refused_and_not_kept(prepared: Path, tmp_path: Path) -> None:
    sequences = split(DataFolder.load(prepared).log).sequences
    Popularity.fit(sequences, NUM_ITEMS + 1).save(tmp_path / "other.safetensors")
    given = {**SMALL, "collaborative": {"path": str(tmp_path / "other.safetensors")}}
    with pytest.raises(ValueError, match=r"recommender of 25 items, needs the catalogue's 24"):
        pipeline.train(prepared, tmp_path / "run", given)
    assert names_in(tmp_path) == {"other.safetensors"}


@pytest.mark.slow
def test_two_processes_make_one_run(prepared: Path, trained: pipeline.TrainedRun, tmp_path: Path) -> None:
    halved = override(SMALL, ["training.per_device_train_batch_size=4"])
    (tmp_path / "config.yaml").write_text(to_yaml(halved))
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["train", "--data", str(prepared), "--config", str(tmp_path / "config.yaml")]
    command += ["--output", str(tmp_path / "run")]

    def launch(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launched, "-m", "gflowgr", *command, *more],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    # What another run holds is refused by all with the same words, and stays what it is.
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "config.yaml").write_text("theirs: 1")
    refused = launch()
    assert refused.returncode != 0
    # The launcher may end the second process before it has said it.
    said = refused.stderr.count("holds an interrupted run; resume it")
    assert 1 <= said == refused.stderr.count("gflowgr: error: ")
    assert (tmp_path / "run.partial" / "config.yaml").read_text() == "theirs: 1"
    done = launch("--overwrite")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("test part:") == 1
    assert names_in(tmp_path / "run") == names_in(trained.path)
    log = json.loads((tmp_path / "run" / pipeline.LOG).read_text())
    losses = [[entry["loss"] for entry in entries if "loss" in entry] for entries in (log, trained.history)]
    # The mean of two processes' means, whose batches may hold different numbers of contexts.
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert names_in(tmp_path) & {"run", "run.partial"} == {"run"}


def test_a_run_does_not_go_on_with_other_data(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(data, tmp_path / "run", SMALL, callbacks=[StopAt(5)])
    log = InteractionLog.load(data / "interactions.parquet")
    replace(log, item=log.item[::-1].copy()).save(data / "interactions.parquet")
    with pytest.raises(ValueError, match=r"begun with other data: .*data has changed"):
        pipeline.train(data, tmp_path / "run", SMALL, resume=True)


def test_longer_lists_than_a_run_was_chosen_by_can_be_measured(prepared: Path, tmp_path: Path) -> None:
    settings = ["training.metric_for_best_model=eval_recall@7", "training.eval_num_items=7"]
    pipeline.train(prepared, tmp_path / "run", override(SMALL, settings))
    measured = pipeline.evaluate(tmp_path / "run", eval_num_items=12).summary()
    assert {"recall@5", "recall@12"} <= set(measured)


def test_a_run_is_not_measured_on_a_catalogue_of_other_items(
    prepared: Path, trained: pipeline.TrainedRun, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    log, items = InteractionLog.load(data / "interactions.parquet"), Items.load(data / "items.parquet")
    replace(log, item_ids=log.item_ids + 1).save(data / "interactions.parquet")
    replace(items, ids=items.ids + 1).save(data / "items.parquet")
    with pytest.raises(ValueError, match="has other items than"):
        pipeline.evaluate(trained.path, data)


def test_names_that_look_like_nothing_are_names(files: Path, tmp_path: Path) -> None:
    table = an_items_table()
    table.loc[:2, "title"] = ["NA", "null", ""]
    table.to_csv(tmp_path / "items.csv", index=False)
    made = pipeline.prepare(files / "log.csv", tmp_path / "data", items=tmp_path / "items.csv", k=3)
    assert made.items_without_title == 1
    assert {"NA", "null"} < set(Items.load(tmp_path / "data" / "items.parquet").titles)


@pytest.mark.parametrize(
    ("annotation", "right", "wrong"),
    [
        ("int", [0, np.int64(3)], [1.5, True, "1", None]),
        ("float", [1, 0.5, np.float32(2)], ["fast", False, [1.0]]),
        ("bool", [True, False], [0, "maybe", None]),
        ("int | None", [None, 7], ["7", 7.5]),
        ("Mapping[str, int | None] | None", [None, {}, {"a": 1}], [0.5, "a", [1]]),
        ("str | Sequence[str]", ["a", ["a"], ("a", "b")], [1, None]),
        ('Literal["sum", "mlp"] | None', ["sum", "mlp", None], ["mix", 1]),
        # Of what stands for more than a setting can hold nothing is known.
        ("Recommender | int", ["anything", None], []),
    ],
)
def test_values_are_of_the_kind_that_an_argument_takes(
    annotation: str, right: list[Any], wrong: list[Any]
) -> None:
    for value in right:
        check_kind("there", value, annotation)
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=r"^there is .*, needs "):
            check_kind("there", value, annotation)


def test_the_best_of_a_run_is_best_by_its_metric() -> None:
    for metric, better in (("eval_nll", False), ("gini@5", False), ("eval_recall@7", True)):
        plan = Plan.of({"training": {"metric_for_best_model": metric, "eval_num_items": 7}})
        assert plan.config(Path("run")).greater_is_better is better
    assert Plan.of({}).config(Path("run")).greater_is_better
    # One item is no more diverse than another.
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'diversity@1', needs one of .*ndcg@1"):
        Plan.of({"training": {"metric_for_best_model": "diversity@1", "eval_num_items": 1}})


def test_a_config_takes_paths_and_refuses_other_kinds(tmp_path: Path) -> None:
    assert GFlowGRConfig(tmp_path, use_cpu=True, eval_steps=0.1).output_dir == str(tmp_path)
    with pytest.raises(TypeError, match=r"^rollout_beyond is 1\.5, needs an integer"):
        GFlowGRConfig(tmp_path, rollout_beyond=1.5)
    for name, value in (("eval_num_items", 0), ("eval_num_beams", 9)):
        with pytest.raises(ValueError, match=f"^{name} is {value}, needs at least"):
            GFlowGRConfig(tmp_path, **{name: value})


def test_a_recipe_gives_way_to_another_kind_of_model_or_teacher(tmp_path: Path) -> None:
    pretrained = adapted(GFLOWGR, {"model": {"kind": "pretrained", "name_or_path": "a"}})
    assert pretrained["model"] == {"kind": "pretrained", "name_or_path": "a"}
    assert pretrained["reward"] == GFLOWGR["reward"]
    wider = adapted(GFLOWGR, {"model": {"kind": "decoder", "d_model": 7}, "collaborative": None})
    assert wider["model"] == {**GFLOWGR["model"], "d_model": 7}
    for teacher in ({"path": "a"}, {"model": "sasrec"}):
        assert adapted(GFLOWGR, {"collaborative": teacher})["collaborative"] == teacher
    assert adapted(GFLOWGR, {}) == GFLOWGR


def test_data_and_what_is_not_a_run_are_not_overwritten(prepared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    there = names_in(data)
    for output in (data, tmp_path):
        with pytest.raises(ValueError, match=r"no config\.yaml in it, which is not overwritten"):
            pipeline.train(data, output, SMALL, overwrite=True)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match="holds the data folder"):
        pipeline.train(data, tmp_path, SMALL, overwrite=True)
    with pytest.raises(ValueError, match=r"no interactions\.parquet in it"):
        pipeline.prepare(a_log(), tmp_path, k=3, overwrite=True)
    with pytest.raises(ValueError, match="folder with other files in it"):
        pipeline.build_trie(tmp_path / "codes.npy", tmp_path, overwrite=True)
    assert names_in(data) == there


def test_an_interrupted_run_may_be_overwritten(prepared: Path, tmp_path: Path) -> None:
    settings = override(SMALL, ["training.max_steps=4", "training.eval_steps=2"])
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(prepared, tmp_path / "run", settings, callbacks=[StopAt(3)])
    pipeline.train(prepared, tmp_path / "run", settings, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(
    prepared: Path, trained: pipeline.TrainedRun, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(prepared, tmp_path / "run", SMALL, callbacks=[StopAt(5)])
    assert names_in(tmp_path) & {"run", "run.partial"} == {"run.partial"}
    with pytest.raises(ValueError, match="interrupted"):
        pipeline.train(prepared, tmp_path / "run", SMALL)
    with pytest.raises(ValueError, match="other settings: model"):
        pipeline.train(prepared, tmp_path / "run", override(SMALL, ["model.layers=2"]), resume=True)
    resumed = pipeline.train(prepared, tmp_path / "run", SMALL, resume=True)
    losses = [[entry["loss"] for entry in run.history if "loss" in entry] for run in (trained, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert resumed.test.summary() == pytest.approx(trained.test.summary(), rel=1e-5, nan_ok=True)
    assert not (tmp_path / "run.partial").exists()


@pytest.mark.parametrize(
    "pairs",
    [
        ["training.objective=sft"],
        ["model={kind: t5, layers: 1, d_model: 16, heads: 2, d_kv: 8, d_ff: 32}"],
        [
            "model.lora={r: 2}",
            "sampler.strategies=random",
            "sampler.popularity=true",
            "training.num_trajectories=3",
        ],
        [
            "training.objective=tb",
            "training.flows=learned",
            "training.sft_weight=1",
            "training.num_trajectories=3",
            "reward.fusion=sum",
            "reward.terms={interaction: {}, collaborative: {normalisation: unit}, similarity: {}}",
        ],
        ["collaborative={model: sasrec, hidden_size: 8, max_history: 6, epochs: 1, progress: false}"],
        [f"training.{name}={value}" for name, value in OBJECTIVE["training"].items()]
        + ["training.reward_candidates=3"],
    ],
    ids=[
        "sft",
        "t5",
        "lora with drawn trajectories",
        "the paper's tb",
        "sasrec on whole histories",
        "recipe",
    ],
)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_every_kind_of_run_trains(prepared: Path, tmp_path: Path, pairs: list[str]) -> None:
    settings = override(SMALL, [*pairs, "training.max_steps=2", "training.eval_steps=2"])
    run = pipeline.train(prepared, tmp_path / "run", settings)
    assert all(np.isfinite(entry["loss"]) for entry in run.history if "loss" in entry)
    # NaN and infinity are no JSON.
    json.loads((run.path / pipeline.LOG).read_text(), parse_constant=pytest.fail)
    assert pipeline.evaluate(run.path).summary() == pytest.approx(run.test.summary(), rel=1e-5, nan_ok=True)


def test_training_goes_on_from_a_run(prepared: Path, trained: pipeline.TrainedRun, tmp_path: Path) -> None:
    settings = override(
        SMALL,
        [
            f"model={{kind: checkpoint, folder: {trained.path}}}",
            "training.learning_rate=0",
            "training.max_steps=1",
            "contexts=windows",
        ],
    )
    run = pipeline.train(prepared, tmp_path / "run", settings)
    assert run.test.summary() == pytest.approx(trained.test.summary(), rel=1e-5, nan_ok=True)


RULE_AND_SIMILARITY = ["reward.fusion=sum", "reward.terms={interaction: {}, similarity: {}}"]
BASELINES = {
    "s-dpo": ["training.objective=s_dpo", "training.num_trajectories=4", "sampler.strategies=random"],
    "sprec": [
        "training.objective=s_dpo",
        "training.sft_weight=1",
        "training.num_trajectories=2",
        "sampler.strategies=policy",
    ],
    "grpo": ["training.objective=grpo", "training.num_trajectories=5", *RULE_AND_SIMILARITY],
    "item-kl": ["training.objective=item_kl", "training.num_trajectories=5"],
}


@pytest.mark.parametrize("row", BASELINES)
def test_baselines_go_on_from_a_run_by_settings_alone(
    prepared: Path, trained: pipeline.TrainedRun, tmp_path: Path, row: str
) -> None:
    start = [f"model={{kind: checkpoint, folder: {trained.path}}}", "contexts=windows"]
    settings = override(SMALL, [*start, *BASELINES[row], "training.max_steps=4", "training.eval_steps=2"])
    whole = pipeline.train(prepared, tmp_path / "whole", settings)
    with pytest.raises(RuntimeError, match="power cut"):
        pipeline.train(prepared, tmp_path / "run", settings, callbacks=[StopAt(3)])
    run = pipeline.train(prepared, tmp_path / "run", settings, resume=True)
    losses = [[entry["loss"] for entry in r.history if "loss" in entry] for r in (whole, run)]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-5, abs=1e-6)
    # Nobody asks for scores of another recommender, or they are there.
    assert (run.path / pipeline.COLLABORATIVE).exists() == (row == "item-kl")
    assert pipeline.evaluate(run.path).summary() == pytest.approx(run.test.summary(), rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("sampler", "serves"),
    [
        ({}, True),
        ({"strategies": "policy"}, True),
        ({"strategies": {"policy": 2.0}}, True),
        ({"strategies": "collaborative"}, False),
        ({"strategies": {"policy": 1.0, "random": 1.0}}, False),
        ({"schedule": "constant"}, False),
    ],
)
def test_a_group_is_the_policys_whatever_a_sampler_is_told(sampler: dict[str, Any], serves: bool) -> None:
    settings = {"training": {"objective": "grpo", "num_trajectories": 3, "use_cpu": True}, "sampler": sampler}
    if serves:
        assert Plan.of(settings).sampler is None
        return
    with pytest.raises(ValueError, match=r"sampler\.(strategies|schedule) is .*'grpo'"):
        Plan.of(settings)


def test_an_adaptive_run_writes_its_weights_and_can_be_replayed(prepared: Path, tmp_path: Path) -> None:
    pairs = [
        "training.objective=tb",
        "training.num_trajectories=3",
        "sampler.strategies={collaborative: 2, policy: 1, random: 1}",
    ]
    settings = override(SMALL, [*pairs, "sampler.adapt={to: mass, rate: 0.3}"])
    run = pipeline.train(prepared, tmp_path / "run", settings)
    schedule = WeightSchedule.load(run.path / "schedule.json")
    assert set(schedule.strategies) == {"collaborative", "policy", "random"} and len(schedule.rows) == 7
    logged = [entry["weight/policy"] for entry in run.history if "loss" in entry]
    column = schedule.strategies.index("policy")
    assert logged == pytest.approx([row[column] for row in schedule.rows[:6]])
    assert logged[0] == 0.25 and logged[-1] != 0.25
    assert "<svg" in (run.path / "schedule.svg").read_text()
    replay = override(SMALL, [*pairs, f"sampler.replay={run.path / 'schedule.json'}"])
    again = pipeline.train(prepared, tmp_path / "again", replay)
    losses = [[entry["loss"] for entry in each.history if "loss" in entry] for each in (run, again)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    with pytest.raises(FileNotFoundError, match=r"sampler\.replay.*is not a file"):
        Plan.of(override(settings, ["sampler.replay=nowhere.json"]))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configs_of_the_repository_hold_no_wrong_key(path: Path) -> None:
    settings = read_yaml(path)
    assert settings
    Plan.of({key: value for key, value in settings.items() if key in SECTIONS})
    Plan.of(settings)


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"sft", "gflowgr", "paper-tb", "t5", "adaptive"}


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_shared_prefixes_change_no_score(rows: list[list[int]], growing: bool, mixed: bool) -> None:
    torch.manual_seed(0)
    model: SASRec | Mixture = SASRec(SASRecNetwork(10, 8, 1, 2, 0.3, 6))
    if mixed:
        neighbours = ItemKNN(
            np.array([0, 2, 3, 3, 3, 3, 3, 3, 3, 3, 4]),
            np.array([1, 2, 0, 9]),
            np.array([0.5, 0.1, 0.5, 0.2], np.float32),
            num_items=10,
            recency=0.6,
        )
        model = Mixture(model, neighbours)
    if growing:
        rows = [row[:length] for row in rows for length in range(len(row) + 1)]
    histories = torch.full((len(rows), 6), -1)
    for number, row in enumerate(rows):
        histories[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    torch.testing.assert_close(
        SharedPrefixes(model).scores(histories), model.scores(histories), rtol=1e-4, atol=1e-5
    )


def test_shared_prefixes_run_a_growing_history_once() -> None:
    model = SASRec(SASRecNetwork(10, 8, 1, 2, 0.3, 6))
    rows_run = []
    model.network.register_forward_pre_hook(lambda module, inputs: rows_run.append(len(inputs[0])))
    items = torch.tensor([4, 1, 7, 2])
    growing = torch.where(torch.arange(4) <= torch.arange(4)[:, None], items, -1)
    SharedPrefixes(model).scores(torch.cat([growing, growing.flip(1).clamp(min=0)]))
    assert rows_run == [5]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=20))
def test_the_shape_of_a_trie_is_that_of_its_prefixes(rows: list[tuple[int, int, int]]) -> None:
    levels = pipeline.inspect_trie(PrefixTrie(np.array(rows)))
    for depth, level in enumerate(levels):
        prefixes = {row[:depth] for row in rows}
        children = [len({row[depth] for row in rows if row[:depth] == prefix}) for prefix in prefixes]
        assert (level.depth, level.nodes, level.max_children) == (depth, len(prefixes), max(children))
        assert level.mean_children == pytest.approx(np.mean(children))
        assert level.forced == pytest.approx(np.mean([count == 1 for count in children]))


def test_a_trie_is_built_of_codes(tmp_path: Path) -> None:
    np.save(tmp_path / "codes.npy", np.array([[0, 1], [0, 2], [3, 0]]))
    pipeline.build_trie(tmp_path / "codes.npy", tmp_path / "trie.safetensors")
    assert PrefixTrie.load(tmp_path / "trie.safetensors").num_nodes == 6
    with pytest.raises(ValueError, match="exists already"):
        pipeline.build_trie(tmp_path / "codes.npy", tmp_path / "trie.safetensors")


def test_overrides_read_values_as_yaml_and_reach_into_sections() -> None:
    settings = {"a": {"b": 1, "c": 2}, "d": None}
    pairs = ["a.b=1e-3", "e=[1, 2.5e2]", "f=true", "d.x.y=no", "g=", "h=007x"]
    changed = override(settings, pairs)
    assert changed == {
        "a": {"b": 0.001, "c": 2},
        "d": {"x": {"y": False}},
        "e": [1, 250.0],
        "f": True,
        "g": None,
        "h": "007x",
    }
    assert settings == {"a": {"b": 1, "c": 2}, "d": None}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("a", "key=value"),
        ("=1", "key=value"),
        ("a..b=1", "key=value"),
        ("a.b.c=1", "a.b is 1"),
        ("a=[1", "not YAML"),
    ],
)
def test_an_override_that_cannot_be_read_is_named(pair: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        override({"a": {"b": 1}}, [pair])


def test_settings_survive_a_file(tmp_path: Path) -> None:
    settings = merge(SMALL, {"training": {"learning_rate": 1e-5, "report_to": "none"}, "sampler": {"x": {}}})
    (tmp_path / "config.yaml").write_text(to_yaml(settings))
    assert read_yaml(tmp_path / "config.yaml") == settings
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: 1\nb: [2\n")
    (tmp_path / "empty.yaml").write_text("")
    assert read_yaml(tmp_path / "empty.yaml") == {}
    with pytest.raises(ValueError, match="needs keys with values"):
        read_yaml(tmp_path / "list.yaml")
    with pytest.raises(ValueError, match="not YAML at line 3"):
        read_yaml(tmp_path / "broken.yaml")
