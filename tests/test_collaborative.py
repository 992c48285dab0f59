"""The traditional recommenders against their formulas, and what training, saving and bad input do."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from gflowgr import collaborative
from gflowgr.collaborative import (
    ALS,
    CollaborativeModel,
    ItemKNN,
    Mixture,
    Popularity,
    Recommender,
    SASRec,
    best_items,
    build,
    load,
)

NUM_ITEMS = 24


@dataclass
class Log:
    offsets: np.ndarray
    items: np.ndarray

    @classmethod
    def of(cls, users: list[list[int]]) -> Log:
        offsets = np.cumsum([0, *map(len, users)])
        return cls(offsets, np.array([item for user in users for item in user], dtype=np.int64))

    def users(self) -> list[list[int]]:
        return [self.items[a:b].tolist() for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]


@dataclass
class Contexts:
    history: Tensor
    target: Tensor


def padded(histories: list[list[int]], width: int | None = None) -> Tensor:
    width = max(map(len, histories)) if width is None else width
    return torch.tensor([history + [-1] * (width - len(history)) for history in histories])


def clustered_log(seed: int, users: int = 120) -> Log:
    """Each user stays in one of three groups of eight items; the next item is mostly the successor."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(users):
        group, place = rng.integers(3), rng.integers(8)
        row = []
        for _ in range(rng.integers(3, 9)):
            row.append(int(8 * group + place))
            place = (place + 1) % 8 if rng.random() < 0.9 else rng.integers(8)
        out.append(row)
    return Log.of(out)


def contexts_of(log: Log) -> Contexts:
    users = log.users()
    return Contexts(padded([user[:-1] for user in users]), torch.tensor([user[-1] for user in users]))


def hit_rate(model: Recommender, contexts: Contexts, k: int) -> float:
    top = model.scores(contexts.history).topk(k).indices
    return float((top == contexts.target[:, None]).any(1).float().mean())


QUICK = {
    "popularity": {},
    "item-knn": {"progress": False},
    "als": {"progress": False, "factors": 8, "iterations": 3},
    "sasrec": {"progress": False, "hidden_size": 16, "epochs": 2, "max_history": 6},
    "mixture": {"progress": False, "max_history": 6, "sasrec": {"hidden_size": 16, "epochs": 2}},
}


@pytest.fixture(scope="module", params=list(QUICK))
def fitted(request: pytest.FixtureRequest) -> Recommender:
    return build(request.param, clustered_log(0), NUM_ITEMS, seed=1, **QUICK[request.param])


def test_every_model_scores_any_history_and_rows_do_not_depend_on_their_batch(fitted: Recommender) -> None:
    assert isinstance(fitted, CollaborativeModel)
    histories = padded([[3], [], [1, 2, 3, 4, 5, 6, 7], [9, 9, 9], [23, 0]], width=9)
    scores = fitted.scores(histories)
    assert scores.shape == (5, NUM_ITEMS)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scores.isfinite().all()
    for row in range(5):
        torch.testing.assert_close(fitted.scores(histories[row : row + 1])[0], scores[row])
        real = histories[row][histories[row] >= 0]
        torch.testing.assert_close(fitted.scores(real[None])[0], scores[row])
    torch.testing.assert_close(fitted.scores(histories.int()), scores)
    assert fitted.scores(histories[:0]).shape == (0, NUM_ITEMS)


def test_more_rows_than_a_batch_holds(fitted: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 7, (40, 1), generator=generator)
    histories = torch.randint(NUM_ITEMS, (40, 6), generator=generator).masked_fill(
        torch.arange(6) >= lengths, -1
    )
    whole = fitted.scores(histories)
    monkeypatch.setattr(type(fitted), "rows_per_batch", 7)
    torch.testing.assert_close(fitted.scores(histories), whole)


def test_saved_models_come_back_as_they_were(fitted: Recommender, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    before = torch.get_rng_state()
    fitted.save(path)
    loaded = load(path)
    assert type(loaded) is type(fitted)
    assert torch.equal(torch.get_rng_state(), before)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    histories = padded([[3, 4, 5], [], [20]])
    assert torch.equal(loaded.scores(histories), fitted.scores(histories))
    assert torch.equal(type(fitted).load(path).scores(histories), fitted.scores(histories))
    other = Popularity if not isinstance(fitted, Popularity) else ItemKNN
    with pytest.raises(ValueError, match=f"path: .* holds a {fitted.name} model, need {other.name}"):
        other.load(path)


def test_settings_computed_with_numpy_can_be_saved(tmp_path: Path) -> None:
    count, rate = np.int64, np.float32
    for name, options in (
        ("item-knn", {"recency": rate(0.5), "neighbours": count(5), "progress": False}),
        ("als", {"alpha": rate(2), "factors": count(4), "progress": False}),
        ("sasrec", {"hidden_size": count(8), "dropout": rate(0.25), "epochs": count(1), "progress": False}),
    ):
        model = build(name, clustered_log(0), count(NUM_ITEMS), seed=count(1), **options)
        model.save(tmp_path / name)
        assert torch.equal(load(tmp_path / name).scores(padded([[3]])), model.scores(padded([[3]])))


def test_damaged_files_are_refused(fitted: Recommender, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fitted.save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.safetensors"
    for cut in rng.integers(0, len(whole), 20):
        damaged.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="path: "):
            load(damaged)
    for place in rng.integers(0, len(whole), 60):
        changed = bytearray(whole)
        changed[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match="path: "):
            load(damaged)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"counts": torch.ones(3)}, foreign)
    with pytest.raises(ValueError, match=r"was not saved by gflowgr\.collaborative"):
        load(foreign)
    foreign.write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load(foreign)
    with pytest.raises(FileNotFoundError, match="missing"):
        load(tmp_path / "missing")


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    Popularity(torch.tensor([1, 2])).save(path)
    before = path.read_bytes()

    def refuse(source: Path, target: Path) -> None:
        assert source.stat().st_size > 0
        raise OSError("read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="read-only"):
        Popularity(torch.tensor([3, 4])).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_popularity_is_the_smoothed_share_of_interactions() -> None:
    model = Popularity.fit(Log.of([[0, 2, 2], [2]]), 4)
    shares = torch.softmax(model.scores(padded([[1]])), 1)
    torch.testing.assert_close(shares, torch.tensor([[2, 1, 4, 1]]) / 8)


@given(st.data())
def test_the_best_items_are_those_of_the_highest_scores_that_may_be_listed(data: st.DataObject) -> None:
    rows, items = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    k = data.draw(st.integers(1, items + 2))
    scores = torch.stack([torch.randperm(items).float() for _ in range(rows)])
    exclude = data.draw(st.lists(st.lists(st.integers(0, items - 1)), min_size=rows, max_size=rows))
    expected = []
    for row, hidden in zip(scores.tolist(), exclude, strict=True):
        left = sorted(set(range(items)) - set(hidden), key=lambda item: -row[item])
        expected.append((left + [-1] * k)[:k])
    before = scores.clone()
    assert best_items(scores, k, exclude).tolist() == expected
    assert best_items(scores, k, padded(exclude)).tolist() == expected
    everything = [order + [-1] * (k - items) for order in scores.argsort(1, descending=True)[:, :k].tolist()]
    assert best_items(scores, k).tolist() == everything
    assert torch.equal(scores, before)


def test_item_knn_follows_its_formula() -> None:
    # Item 0 is nearer to each of items 1, 2 and 3 than to itself; item 5 has no neighbour.
    users = [[0, *[1] * 9, *[2] * 8, *[3] * 7], [1, 2, 4], [1, 3], [3, 3, 1, 4, 4], [2, 4]]
    counts = np.zeros((5, 6))
    for user, items in enumerate(users):
        for item in items:
            counts[user, item] += 1
    similarity = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            for user in range(5):
                weight = math.log(1 + 5 / counts[user].sum()) ** 2
                similarity[i, j] += weight * math.sqrt(counts[user, i] * counts[user, j])
            similarity[i, j] /= max(1.0, counts[:, i].sum() * counts[:, j].sum()) ** 0.4
    assert similarity[0, 0] < similarity[0, 1:4].min()
    np.fill_diagonal(similarity, 0)
    model = ItemKNN.fit(Log.of(users), 6, neighbours=6, popularity_exponent=0.4, recency=0.5, progress=False)
    expected = np.stack(
        [0.25 * similarity[0] + 0.5 * similarity[3] + similarity[1], similarity[5], np.zeros(6)]
    )
    np.testing.assert_allclose(model.scores(padded([[0, 3, 1], [5], []])), expected, rtol=1e-5, atol=1e-7)

    nearest = ItemKNN.fit(Log.of(users), 6, neighbours=2, popularity_exponent=0.4, progress=False)
    for item in range(5):
        kept = nearest.scores(padded([[item]]))[0].numpy()
        best = np.argsort(-similarity[item])[:2]
        assert similarity[item][best[1]] > 1.001 * np.sort(similarity[item])[-3]
        assert set(np.flatnonzero(kept)) == set(best)
        np.testing.assert_allclose(kept[best], similarity[item][best], rtol=1e-5)


def test_a_mixture_is_one_of_distributions() -> None:
    log, options = clustered_log(0), dict(QUICK["mixture"])
    model = build("mixture", log, NUM_ITEMS, seed=1, neighbour_weight=0.3, sharpness=2.0, **options)
    assert isinstance(model, Mixture)
    sasrec = build("sasrec", log, NUM_ITEMS, seed=1, **QUICK["sasrec"])
    item_knn = build("item-knn", log, NUM_ITEMS, progress=False)
    histories = padded([[3, 4, 5], [20], []])
    found = model.scores(histories).double().exp()
    similarity = item_knn.scores(histories).double() ** 2
    share = similarity / similarity.sum(1, keepdim=True)
    expected = 0.7 * sasrec.scores(histories).double().softmax(1) + 0.3 * share
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-6)
    # No history, no neighbours: SASRec alone, up to a factor.
    torch.testing.assert_close(
        model.scores(histories).softmax(1)[2], sasrec.scores(histories).softmax(1)[2], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match=r"neighbour_weight: got 1\.0, need a number from 0 to below 1"):
        Mixture(sasrec, item_knn, neighbour_weight=1.0)
    with pytest.raises(ValueError, match="item_knn has 9 items, needs 24 like sasrec"):
        Mixture(sasrec, build("item-knn", Log.of([[0, 1], [1, 2]]), 9, progress=False))


def test_als_folds_a_history_in_by_the_exact_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    model = ALS(factors, alpha=3.0, regularization=0.5)
    histories = [[1, 2, 3], [7], [4, 4, 9, 4], []]
    for history, scores in zip(histories, model.scores(padded(histories)), strict=True):
        confidence = torch.ones(10, dtype=torch.float64)
        preference = torch.zeros(10, dtype=torch.float64)
        for item in set(history):
            confidence[item] = 3.0 * history.count(item)
            preference[item] = 1.0
        system = factors.T @ (confidence[:, None] * factors) + 0.5 * torch.eye(4)
        user = torch.linalg.solve(system, factors.T @ (confidence * preference))
        torch.testing.assert_close(scores, (factors @ user).float())


def test_als_agrees_with_the_library_on_new_users() -> None:
    from implicit.cpu.als import AlternatingLeastSquares
    from scipy.sparse import csr_matrix

    log = clustered_log(2)
    model = ALS.fit(
        log, NUM_ITEMS, seed=5, factors=6, alpha=4.0, regularization=0.3, iterations=3, progress=False
    )
    reference = AlternatingLeastSquares(factors=6, alpha=4.0, regularization=0.3, iterations=3, num_threads=1)
    reference.item_factors = model.item_factors.numpy()
    histories = [[1, 2, 2], [17], [9, 10, 11, 3]]
    rows = np.repeat(np.arange(3), [len(history) for history in histories])
    user_items = csr_matrix((np.ones(8, np.float32), (rows, np.concatenate(histories))), shape=(3, NUM_ITEMS))
    user_items.sum_duplicates()
    factors = reference.recalculate_user(np.arange(3), user_items)
    expected = torch.from_numpy(factors @ reference.item_factors.T)
    torch.testing.assert_close(model.scores(padded(histories)), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["item-knn", "als"])
def test_fitting_does_not_warn_about_blas_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import implicit.utils
    from threadpoolctl import threadpool_info, threadpool_limits

    monkeypatch.setattr(implicit.utils, "_checked_blas_config", False)
    with threadpool_limits(limits=2, user_api="blas"):
        build(name, clustered_log(0), NUM_ITEMS, **QUICK[name])
        threads = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert all(count == 2 for count in threads)


def test_models_learn_what_popularity_cannot() -> None:
    train, test = clustered_log(0, users=300), contexts_of(clustered_log(1))
    popularity = hit_rate(Popularity.fit(train, NUM_ITEMS), test, 3)
    for name in ("item-knn", "als"):
        assert hit_rate(build(name, train, NUM_ITEMS, progress=False), test, 8) > 0.9
    sasrec = SASRec.fit(
        train,
        NUM_ITEMS,
        hidden_size=32,
        epochs=20,
        max_history=10,
        dropout=0.1,
        learning_rate=3e-3,
        progress=False,
    )
    # The successor is right nine times in ten; only a model of order can know it.
    assert hit_rate(sasrec, test, 1) > 0.75
    assert hit_rate(sasrec, test, 3) > 2 * popularity
    losses = [entry["loss"] for entry in sasrec.training_log]
    assert losses[-1] < 0.7 * losses[0]


def test_same_seed_same_sasrec_and_the_global_random_states_stay() -> None:
    log = clustered_log(3, users=40)
    options = {"hidden_size": 16, "epochs": 2, "max_history": 5, "batch_size": 16, "progress": False}
    torch.manual_seed(1)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = SASRec.fit(log, NUM_ITEMS, seed=4, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(2)
    second = SASRec.fit(log, NUM_ITEMS, seed=4, **options)
    other = SASRec.fit(log, NUM_ITEMS, seed=5, **options)
    histories = padded([[1, 2], [9]])
    assert torch.equal(first.scores(histories), second.scores(histories))
    assert first.training_log == second.training_log
    assert not torch.equal(first.scores(histories), other.scores(histories))
    als = [ALS.fit(log, NUM_ITEMS, seed=seed, factors=4, progress=False).item_factors for seed in (1, 1, 2)]
    assert torch.equal(als[0], als[1])
    assert not torch.equal(als[0], als[2])


def test_the_loss_is_the_full_cross_entropy_over_every_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout and in one batch, the first epoch's loss is that of the initial weights."""
    log = Log.of([[1, 2, 3], [4], [5, 6]])
    options = {"hidden_size": 8, "max_history": 4, "dropout": 0.0, "progress": False, "seed": 6}
    # An optimiser that does not move leaves the initial weights to look at.
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: None)
        initial = SASRec.fit(log, 8, epochs=1, **options)
    total = 0.0
    for user in log.users():
        for position, item in enumerate(user):
            total -= float(torch.log_softmax(initial.scores(padded([user[:position]], 4)), 1)[0, item])
    assert initial.training_log[0]["loss"] == pytest.approx(total / 6, rel=1e-5)

    # Cutting the logits into pieces changes nothing, in loss or gradient.
    whole = SASRec.fit(log, 8, epochs=3, **options)
    monkeypatch.setattr(collaborative, "LOGITS_PER_CHUNK", 16)
    pieces = SASRec.fit(log, 8, epochs=3, **options)
    assert whole.training_log[2]["loss"] < whole.training_log[0]["loss"]
    torch.testing.assert_close(pieces.scores(padded([[1, 2]])), whole.scores(padded([[1, 2]])))


def test_sasrec_looks_back_only_and_reads_the_latest_items() -> None:
    model = SASRec.fit(clustered_log(0), NUM_ITEMS, hidden_size=16, epochs=1, max_history=4, progress=False)
    states = model.network(torch.tensor([[1, 2, 3, 4], [1, 2, 9, 10]]))
    torch.testing.assert_close(states[0, :3], states[1, :3])
    assert not torch.allclose(states[0, 3], states[1, 3])
    long = model.scores(padded([[7, 8, 1, 2, 3, 4], [5]]))
    torch.testing.assert_close(long, model.scores(padded([[1, 2, 3, 4], [5]])))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 14), min_size=1, max_size=6).filter(any), st.integers(1, 5))
def test_windows_make_every_item_a_target_once_after_its_latest_predecessors(
    lengths: list[int], max_history: int
) -> None:
    users = [[100 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    log = Log.of(users)
    histories, targets = collaborative._causal_windows(log.offsets, log.items, max_history)
    assert histories.shape == (len(targets), max_history)
    assert targets.shape[1] == max_history + 1
    found = []
    for history, target in zip(histories.tolist(), targets.tolist(), strict=True):
        for place, item in enumerate(target):
            if item < 0:
                continue
            found.append(item)
            context = history[:place]
            # Consecutive items of the same user that end just before the target; none only for a first item.
            assert context == list(range(item - place, item))
            assert (place == 0) == (item % 100 == 0)
    assert sorted(found) == sorted(log.items.tolist())


def test_early_stopping_keeps_the_best_epoch() -> None:
    train, validation = clustered_log(0, users=60), contexts_of(clustered_log(1, users=60))
    options = {"hidden_size": 16, "max_history": 8, "learning_rate": 0.03, "dropout": 0.0, "progress": False}
    model = SASRec.fit(train, NUM_ITEMS, validation=validation, epochs=60, patience=3, **options)
    scores = [entry["ndcg@10"] for entry in model.training_log]
    best = int(np.argmax(scores))
    assert len(scores) == best + 1 + 3 < 60
    wanted = 0.0
    for row, target in zip(model.scores(validation.history), validation.target, strict=True):
        rank = int((row >= row[target]).sum())
        wanted += 1 / math.log2(rank + 1) if rank <= 10 else 0.0
    assert scores[best] == pytest.approx(wanted / 60, abs=1e-6)

    unwatched = SASRec.fit(train, NUM_ITEMS, epochs=4, **options)
    assert [entry["epoch"] for entry in unwatched.training_log] == [1, 2, 3, 4]
    assert "ndcg@10" not in unwatched.training_log[0]


def test_the_validation_score_is_ndcg_at_10_with_ties_against_the_target() -> None:
    ladder = Popularity(torch.arange(NUM_ITEMS, 0, -1))
    everyone = Contexts(torch.full((NUM_ITEMS, 1), -1), torch.arange(NUM_ITEMS))
    expected = sum(1 / math.log2(rank + 1) for rank in range(1, 11)) / NUM_ITEMS
    assert collaborative._ndcg(ladder, everyone.history, everyone.target) == pytest.approx(expected)
    flat = Popularity(torch.ones(NUM_ITEMS, dtype=torch.int64))
    assert collaborative._ndcg(flat, everyone.history, everyone.target) == 0.0


def test_a_loss_that_is_not_finite_stops_training_by_name() -> None:
    with pytest.raises(FloatingPointError, match=r"SASRec: the training loss became (nan|inf)"):
        SASRec.fit(clustered_log(0), NUM_ITEMS, learning_rate=1e30, epochs=3, hidden_size=8, progress=False)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    SASRec.fit(clustered_log(0, users=10), NUM_ITEMS, hidden_size=8, epochs=2)
    assert "SASRec: 100%" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["item-knn", "als"])
def test_a_missing_library_is_named_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit", None)
    with pytest.raises(
        ImportError, match=rf"{name} needs the library implicit: pip install 'gflowgr\[train\]'"
    ):
        build(name, clustered_log(0), NUM_ITEMS)


def test_build_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"name: got 'sasrek'.*did you mean 'sasrec'"):
        build("sasrek", clustered_log(0), NUM_ITEMS)
    with pytest.raises(TypeError, match="neighbors"):
        build("item-knn", clustered_log(0), NUM_ITEMS, neighbors=3)
    contexts = contexts_of(clustered_log(1))
    built = build("sasrec", clustered_log(0), NUM_ITEMS, validation=contexts, seed=1, **QUICK["sasrec"])
    assert "ndcg@10" in built.training_log[0]


@pytest.mark.parametrize("name", list(QUICK))
@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        (Log(np.array([0, 0]), np.array([], dtype=np.int64)), ValueError, "sequences: got no interactions"),
        (
            Log.of([[0, 24]]),
            ValueError,
            "sequences.items: got ids from 0 to 24, need 0 to num_items - 1 = 23",
        ),
        (Log.of([[-1, 2]]), ValueError, "sequences.items: got ids from -1"),
        (
            Log(np.array([0, 3]), np.array([1, 2])),
            ValueError,
            "sequences.offsets: need to rise from 0 to .* 2",
        ),
        (Log(np.array([0, 2, 1, 2]), np.array([1, 2])), ValueError, "sequences.offsets: need to rise"),
        (Log(np.array([0, 1]), np.array([1.5])), TypeError, "sequences.items: got float64"),
    ],
)
def test_logs_that_cannot_be_used_are_refused(
    name: str, log: Log, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(name, log, NUM_ITEMS, **QUICK[name])


@pytest.mark.parametrize(
    ("histories", "error", "message"),
    [
        (torch.tensor([[0.0]]), TypeError, "histories: got torch.float32"),
        ([[0]], TypeError, "histories: got list"),
        (torch.tensor([0]), ValueError, r"histories: got shape \(1,\), need \(B, H\)"),
        (torch.tensor([[24]]), ValueError, r"histories: got ids from 24 to 24, need -1 \(padding\) to .* 23"),
        (torch.tensor([[-2]]), ValueError, "histories: got ids from -2"),
        (torch.tensor([[-1, 3]]), ValueError, "histories: got an item after padding"),
    ],
)
def test_histories_that_cannot_be_scored_are_refused(
    histories: object, error: type[Exception], message: str
) -> None:
    model = Popularity(torch.ones(NUM_ITEMS, dtype=torch.int64))
    with pytest.raises(error, match=message):
        model.scores(histories)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 10, "num_heads": 3}, "num_heads: got 3, need a divisor of hidden_size = 10"),
        ({"num_layers": 0}, "num_layers: got 0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"learning_rate": -1.0}, "learning_rate: got -1.0"),
        ({"epochs": 1.5}, "epochs: got 1.5"),
        ({"patience": True}, "patience: got True"),
        ({"device": "meta"}, "device: got meta"),
        (
            {"validation": Contexts(torch.tensor([[1]]), torch.tensor([24]))},
            "validation.target: got an id outside 0 to num_items - 1 = 23",
        ),
        (
            {"validation": Contexts(torch.tensor([[1]]), torch.tensor([1, 2]))},
            r"validation: got targets of shape \(2,\)",
        ),
    ],
)
def test_sasrec_settings_that_cannot_work_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SASRec.fit(clustered_log(0), NUM_ITEMS, progress=False, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("item-knn", {"neighbours": 0}, "neighbours: got 0"),
        ("item-knn", {"popularity_exponent": 1.5}, "popularity_exponent: got 1.5"),
        ("item-knn", {"recency": 0.0}, "recency: got 0.0"),
        ("als", {"factors": 0}, "factors: got 0"),
        ("als", {"alpha": math.nan}, "alpha: got nan"),
        ("als", {"regularization": 0.0}, "regularization: got 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, clustered_log(0), NUM_ITEMS, **options)
