"""Result files: they come back as they were, and a pair that does not belong together is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quality_cells import a_cell

from gflowgr.metrics import ranking_metrics
from gflowgr.quality import results
from gflowgr.quality.results import Cell, load_cells, load_users, save_users

RANKS = st.lists(st.integers(0, 10), min_size=1, max_size=30)


@settings(max_examples=25)
@given(rank=RANKS, seed=st.integers(0, 5), k=st.integers(1, 10))
def test_a_cell_comes_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, rank: list[int], seed: int, k: int
) -> None:
    folder = tmp_path_factory.mktemp("cells")
    cell = a_cell("gflowgr-tb-n1", seed, rank)
    path = cell.save(folder)
    assert path == folder / f"gflowgr-tb-n1-{seed}.json"
    again = Cell.load(path)
    for name, value in vars(cell).items():
        np.testing.assert_array_equal(getattr(again, name), value)
    assert again.test_rank.dtype == again.validation_rank.dtype == np.uint8
    for metric in (f"recall@{k}", f"ndcg@{k}"):
        np.testing.assert_array_equal(again.per_user(metric), cell.per_user(metric))
        np.testing.assert_array_equal(again.per_user(metric, "validation"), cell.per_user(metric)[::-1])
    assert sorted(file.name for file in folder.iterdir()) == [f"{cell.name}.json", f"{cell.name}.npz"]


@settings(max_examples=25)
@given(rank=RANKS, k=st.integers(1, 10))
def test_per_user_is_what_the_lists_give(rank: list[int], k: int) -> None:
    lists = torch.arange(1, 11).repeat(len(rank), 1)
    for user, place in enumerate(rank):
        if place:
            lists[user, place - 1] = 0
    measured = ranking_metrics(lists, torch.zeros(len(rank), dtype=torch.long), [k, 10], num_items=11)
    cell = a_cell(rank=rank)
    for metric in (f"recall@{k}", f"ndcg@{k}"):
        np.testing.assert_allclose(cell.per_user(metric), measured.per_user[metric].numpy(), rtol=1e-15)


@pytest.mark.parametrize("metric", ["recall@0", "recall@11", "ndcg@", "diversity@10", "recall@5 "])
def test_only_what_the_ranks_know_is_per_user(metric: str) -> None:
    with pytest.raises(ValueError, match="metric needs recall@k or ndcg@k"):
        a_cell().per_user(metric)
    with pytest.raises(ValueError, match="part needs"):
        a_cell().per_user("ndcg@10", "train")  # type: ignore[arg-type]


def test_what_is_not_defined_is_null(tmp_path: Path) -> None:
    cell = a_cell()
    path = a_cell(test={**cell.test, "nll": float("nan")}).save(tmp_path)
    assert json.loads(path.read_text())["test"]["nll"] is None
    assert Cell.load(path).test["nll"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"test": {"recall@10": 0.74}},
        {"test": {"ndcg@5": 0.3}},
        {"test": {"ndcg@10": None}},
        {"validation": {"ndcg@10": 0.3}},
        {"num_users": 5},
        {"num_users": "4"},
        {"row": "sasrec"},
        {"row": "../sft"},
        {"seed": 1},
        {"seed": "0"},
        {"test": None},
        {"budget": {"steps": -1}},
        {"grid": {"points": 6}},
        {"format": "gflowgr.quality/2"},
        {"surprise": 1},
    ],
)
def test_a_tampered_file_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    path = a_cell().save(tmp_path)
    document = json.loads(path.read_text())
    for name, value in change.items():
        merged = isinstance(value, dict) and name in ("test", "validation")
        document[name] = {**document[name], **value} if merged else value
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"sft-0\.json"):
        Cell.load(path)


@settings(max_examples=25)
@given(rank=RANKS, user=st.integers(0, 29), place=st.integers(0, 10))
def test_one_user_moved_by_one_place_is_found(
    tmp_path_factory: pytest.TempPathFactory, rank: list[int], user: int, place: int
) -> None:
    folder = tmp_path_factory.mktemp("cells")
    path = a_cell(rank=rank).save(folder)
    user %= len(rank)
    moved = np.array(rank, dtype=np.uint8)
    moved[user] = place
    np.savez(path.with_suffix(".npz"), test_rank=moved, validation_rank=np.array(rank[::-1], dtype=np.uint8))
    if place == rank[user]:
        assert Cell.load(path).test_rank.tolist() == rank
    else:
        with pytest.raises(ValueError, match=r"sft-0\.json.*sft-0\.npz.*the ranks give"):
            Cell.load(path)


def test_files_mixed_up_are_found(tmp_path: Path) -> None:
    one = a_cell(seed=0, rank=[1, 2, 0]).save(tmp_path)
    a_cell(seed=1, rank=[0, 0, 4]).save(tmp_path).with_suffix(".npz").replace(one.with_suffix(".npz"))
    with pytest.raises(ValueError, match=r"sft-0\.npz"):
        Cell.load(one)
    with pytest.raises(ValueError, match=r"sft-1\.npz: no such file"):
        Cell.load(tmp_path / "sft-1.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"PK\x03\x04 short"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = a_cell().save(tmp_path)
    path.with_suffix(".npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"sft-0\.npz"):
        Cell.load(path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sft-0\.json"):
        Cell.load(path)
    with pytest.raises(FileNotFoundError):
        Cell.load(tmp_path / "none-0.json")


def test_a_kill_leaves_a_whole_cell_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_cell(rank=[1, 1]).save(tmp_path)

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(results, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            a_cell(rank=[0, 2]).save(tmp_path)
    assert load_cells(tmp_path) == []
    a_cell(rank=[0, 2]).save(tmp_path)
    assert [cell.test_rank.tolist() for cell in load_cells(tmp_path)] == [[0, 2]]


def test_a_folder_holds_cells_of_one_data_set(tmp_path: Path) -> None:
    save_users(tmp_path, [3, 4], [1, 1])
    for row, seed in (("sft", 10), ("sft", 2), ("sasrec", 0)):
        a_cell(row, seed, [1, 0]).save(tmp_path)
    assert [cell.name for cell in load_cells(tmp_path)] == ["sasrec-0", "sft-2", "sft-10"]
    a_cell("dpo", 0, [1, 0, 0]).save(tmp_path)
    with pytest.raises(ValueError, match=r"scientific with 2 users.*scientific with 3 users"):
        load_cells(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_cells(tmp_path / "beauty")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"test_rank": np.zeros(4, dtype=np.int64)},
            TypeError,
            "test_rank needs an array of uint8, got int64",
        ),
        ({"test_rank": [1, 0, 3, 10]}, TypeError, "got list"),
        ({"test_rank": np.array([1, 0, 3, 11], dtype=np.uint8)}, ValueError, "places 0 .. 10, got 11"),
        ({"test_rank": np.array([1, 0, 3], dtype=np.uint8)}, ValueError, r"shape \(4,\), got \(3,\)"),
        ({"test": {"recall@10": 0.75}}, ValueError, "test lacks ndcg@10"),
        ({"row": "a/b"}, ValueError, "row needs a name"),
        ({"seed": -1}, ValueError, "seed needs an integer"),
        ({"num_items": 0}, ValueError, "num_items needs an integer"),
        ({"built_on": "sasrec"}, ValueError, "built_on needs a list"),
        ({"built_on": [1]}, ValueError, "built_on needs a list"),
        ({"budget": {"steps": 1}}, ValueError, "budget needs steps, contexts"),
    ],
)
def test_a_cell_that_cannot_be_is_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        a_cell(**change)


def test_users_come_back(tmp_path: Path) -> None:
    path = save_users(tmp_path, torch.tensor([3, 20]).numpy(), np.array([7, 0], dtype=np.int16))
    users = load_users(tmp_path)
    assert users.history_length.dtype == users.target_popularity.dtype == np.int32
    assert (users.history_length.tolist(), users.target_popularity.tolist()) == ([3, 20], [7, 0])
    np.savez(path, history_length=users.history_length)
    with pytest.raises(ValueError, match=r"users\.npz: needs the arrays"):
        load_users(tmp_path)
    np.savez(path, history_length=users.history_length, target_popularity=np.zeros(3, dtype=np.int32))
    with pytest.raises(ValueError, match=r"users\.npz: .*same users, got 2 and 3"):
        load_users(tmp_path)


@pytest.mark.parametrize("popularity", [[0.5, 1.0], [2**31, 0], [-1, 0], [1], [[1, 2]]])
def test_users_that_cannot_be_are_refused(tmp_path: Path, popularity: list[Any]) -> None:
    with pytest.raises(ValueError, match="target_popularity"):
        save_users(tmp_path, [1, 2], popularity)
    assert list(tmp_path.iterdir()) == []
