from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowgr import metrics as metrics_module
from gflowgr.metrics import Metrics, bootstrap_interval, paired_bootstrap, ranking_metrics


@st.composite
def rankings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Lists of distinct items with empty slots anywhere, targets, size of the catalogue."""
    num_items = draw(st.integers(2, 12))
    slots = draw(st.integers(1, 6))
    users = draw(st.integers(1, 7))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    lists = np.full((users, slots), -1)
    for row in lists:
        filled = generator.permutation(slots)[: generator.integers(0, min(slots, num_items) + 1)]
        row[filled] = generator.permutation(num_items)[: len(filled)]
    return torch.from_numpy(lists), torch.from_numpy(generator.integers(num_items, size=users)), num_items


def expected_metrics(
    lists: list[list[int]], targets: list[int], k: int, num_items: int
) -> dict[str, list[float] | float]:
    recall, ndcg = [], []
    shown = [0] * num_items
    for row, target in zip(lists, targets, strict=True):
        for item in row[:k]:
            if item >= 0:
                shown[item] += 1
        recall.append(1.0 if target in row[:k] else 0.0)
        ndcg.append(1 / math.log2(2 + row.index(target)) if target in row[:k] else 0.0)
    total = sum(shown)
    differences = sum(abs(a - b) for a in shown for b in shown)
    return {
        "recall": recall,
        "ndcg": ndcg,
        "coverage": sum(count > 0 for count in shown) / num_items,
        "gini": differences / (2 * num_items * total) if total else math.nan,
    }


def close(got: torch.Tensor, want: object) -> None:
    torch.testing.assert_close(
        got,
        torch.as_tensor(want, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
        equal_nan=True,
    )


def expected_diversity(lists: list[list[int]], k: int, similarity: np.ndarray) -> list[float]:
    result = []
    for row in lists:
        pairs = list(combinations([item for item in row[:k] if item >= 0], 2))
        result.append(1 - sum(similarity[a, b] for a, b in pairs) / len(pairs) if pairs else math.nan)
    return result


class TestRankingMetrics:
    @settings(deadline=None)
    @given(rankings())
    def test_equal_plain_python(self, ranking: tuple[torch.Tensor, torch.Tensor, int]) -> None:
        lists, targets, num_items = ranking
        ks = range(1, lists.shape[1] + 1)
        got = ranking_metrics(lists, targets, ks, num_items=num_items)
        found = zip(lists.tolist(), targets.tolist(), strict=True)
        assert got.rank.tolist() == [row.index(item) + 1 if item in row else 0 for row, item in found]
        for k in ks:
            want = expected_metrics(lists.tolist(), targets.tolist(), k, num_items)
            for name in ("recall", "ndcg"):
                close(got.per_user[f"{name}@{k}"], want[name])
            for name in ("coverage", "gini"):
                assert got.overall[f"{name}@{k}"] == pytest.approx(want[name], rel=1e-9, nan_ok=True)

    def test_by_hand(self) -> None:
        lists = torch.tensor([[4, 2, 0], [1, 3, 4], [3, 0, 2]], dtype=torch.int32)
        got = ranking_metrics(lists, torch.tensor([2, 1, 4]), ks=(3, 1, 3), num_items=5).summary()
        assert set(got) == {f"{name}@{k}" for name in ("recall", "ndcg", "coverage", "gini") for k in (1, 3)}
        assert got["recall@1"] == pytest.approx(1 / 3)
        assert got["recall@3"] == pytest.approx(2 / 3)
        assert got["ndcg@1"] == pytest.approx(1 / 3)
        assert got["ndcg@3"] == pytest.approx((1 / math.log2(3) + 1) / 3)
        assert got["coverage@1"] == pytest.approx(3 / 5)
        assert got["coverage@3"] == 1

    def test_gini_from_equal_shares_to_one_item_for_all(self) -> None:
        everything = torch.arange(10)[:, None]
        targets = torch.zeros(10, dtype=torch.int64)
        assert ranking_metrics(everything, targets, [1], num_items=10).overall["gini@1"] == pytest.approx(0)
        one = torch.full((10, 1), 3)
        assert ranking_metrics(one, targets, [1], num_items=10).overall["gini@1"] == pytest.approx(0.9)

    @settings(deadline=None)
    @given(rankings(), st.integers(1, 4), st.integers(0, 10**6))
    def test_diversity_of_codes(
        self, ranking: tuple[torch.Tensor, torch.Tensor, int], levels: int, seed: int
    ) -> None:
        lists, targets, num_items = ranking
        generator = np.random.default_rng(seed)
        codes = generator.integers(0, 3, size=(num_items, levels))
        lengths = generator.integers(1, levels + 1, size=num_items)
        codes[np.arange(levels) >= lengths[:, None]] = -1
        similarity = np.zeros((num_items, num_items))
        for a in range(num_items):
            for b in range(num_items):
                equal = sum(x == y for x, y in zip(codes[a], codes[b], strict=True) if x >= 0)
                similarity[a, b] = equal / max(lengths[a], lengths[b])
        ks = range(1, lists.shape[1] + 1)
        got = ranking_metrics(lists, targets, ks, num_items=num_items, codes=torch.from_numpy(codes))
        for k in ks[1:]:
            close(got.per_user[f"diversity@{k}"], expected_diversity(lists.tolist(), k, similarity))
        assert "diversity@1" not in got.per_user

    @settings(deadline=None)
    @given(rankings(), st.integers(0, 10**6))
    def test_diversity_of_embeddings(
        self, ranking: tuple[torch.Tensor, torch.Tensor, int], seed: int
    ) -> None:
        lists, targets, num_items = ranking
        embeddings = np.random.default_rng(seed).normal(size=(num_items, 3))
        embeddings[0] = 0
        lengths = np.linalg.norm(embeddings, axis=1)
        similarity = embeddings @ embeddings.T / np.maximum(np.outer(lengths, lengths), 1e-30)
        ks = range(1, lists.shape[1] + 1)
        got = ranking_metrics(
            lists, targets, ks, num_items=num_items, embeddings=torch.from_numpy(embeddings)
        )
        for k in ks[1:]:
            close(got.per_user[f"diversity@{k}"], expected_diversity(lists.tolist(), k, similarity))

    def test_many_users_are_measured_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        generator = torch.Generator().manual_seed(0)
        lists = torch.stack([torch.randperm(20, generator=generator)[:4] for _ in range(25)])
        targets = torch.randint(20, (25,), generator=generator)
        codes = torch.randint(3, (20, 3), generator=generator)
        whole = ranking_metrics(lists, targets, [4], num_items=20, codes=codes)
        monkeypatch.setattr(metrics_module, "_USERS_AT_ONCE", 7)
        pieces = ranking_metrics(lists, targets, [4], num_items=20, codes=codes)
        assert torch.equal(whole.per_user["diversity@4"], pieces.per_user["diversity@4"])
        assert len(pieces.per_user["diversity@4"]) == 25

    def test_items_count_not_leaves(self) -> None:
        # Items 0 and 1 share their codes: recommending one is no hit on the other.
        codes = torch.tensor([[0, 0], [0, 0], [1, 1]])
        got = ranking_metrics(
            torch.tensor([[1, 2]]), torch.tensor([0]), [1, 2], num_items=3, codes=codes
        ).summary()
        assert got["recall@1"] == got["recall@2"] == 0
        assert got["coverage@2"] == pytest.approx(2 / 3)

    def test_likelihood_of_the_target(self) -> None:
        lists, targets = torch.tensor([[0], [1]]), torch.tensor([0, 0])
        log_probs = torch.tensor([-1.5, -0.5])
        got = ranking_metrics(lists, targets, [1], num_items=2, target_log_probs=log_probs)
        assert got.per_user["nll"].tolist() == [1.5, 0.5]
        assert got.summary()["nll"] == 1

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"recommended": torch.zeros(2, 3)}, TypeError, "recommended needs integers, got torch.float32"),
            ({"target": torch.tensor([True, False])}, TypeError, "target needs integers, got torch.bool"),
            ({"recommended": torch.tensor([1, 2])}, ValueError, r"\(users, slots\).*\(2,\)"),
            ({"target": torch.tensor([[1], [2]])}, ValueError, r"\(users,\).*\(2, 1\)"),
            ({"recommended": torch.zeros(0, 3, dtype=torch.int64)}, ValueError, r"\(0, 3\)"),
            ({"target": torch.tensor([1, 2, 3])}, ValueError, "same users, got 2 and 3"),
            ({"target": torch.tensor([1, 5])}, ValueError, r"target needs items 0 \.\. 4, got 1 \.\. 5"),
            ({"target": torch.tensor([1, -1])}, ValueError, r"got -1 \.\. 1"),
            ({"recommended": torch.tensor([[0, 1, 5], [1, 2, 3]])}, ValueError, r"-1 \.\. 4, got 0 \.\. 5"),
            ({"recommended": torch.tensor([[0, 1, 2], [3, 1, 3]])}, ValueError, r"\[3, 1, 3\] for user 1"),
            ({"ks": (1, 4)}, ValueError, r"cut-offs 1 \.\. 3.*\[1, 4\]"),
            ({"ks": (0, 1)}, ValueError, r"\[0, 1\]"),
            ({"ks": ()}, ValueError, r"got \[\]"),
            ({"codes": torch.zeros(4, 2)}, ValueError, "codes needs one row for each of 5 items"),
            ({"embeddings": torch.zeros(5)}, ValueError, "embeddings needs one row for each of 5 items"),
            ({"codes": torch.ones(5, 2), "embeddings": torch.ones(5, 2)}, ValueError, "got both"),
            ({"target_log_probs": torch.tensor([-1.0, -math.inf])}, ValueError, "1 of them not finite"),
            ({"target_log_probs": torch.tensor([-1.0])}, ValueError, r"shape \(2,\), got shape \(1,\)"),
        ],
    )
    def test_bad_input(self, change: dict, error: type[Exception], words: str) -> None:
        good = {
            "recommended": torch.tensor([[0, 1, -1], [1, -1, -1]]),
            "target": torch.tensor([1, 2]),
            "ks": (1, 3),
            "num_items": 5,
        }
        ranking_metrics(**good)
        with pytest.raises(error, match=words):
            ranking_metrics(**(good | change))


class TestMetrics:
    def measured(self) -> Metrics:
        lists = torch.tensor([[0, 1], [2, -1], [-1, -1]])
        codes = torch.tensor([[0, 1], [0, 2], [1, 1]])
        return ranking_metrics(lists, torch.tensor([1, 1, 1]), [2], num_items=3, codes=codes)

    def test_means_leave_out_users_without_the_metric(self) -> None:
        summary = self.measured().summary()
        assert summary["diversity@2"] == 0.5
        assert summary["recall@2"] == pytest.approx(1 / 3)

    def test_json(self) -> None:
        got = json.loads(json.dumps(self.measured().to_dict(level=0.99), allow_nan=False))
        assert (got["num_users"], got["num_items"], got["level"]) == (3, 3, 0.99)
        recall = got["metrics"]["recall@2"]
        assert recall["value"] == pytest.approx(1 / 3)
        assert recall["interval"] == [0, 1]
        assert got["metrics"]["diversity@2"]["interval"] == [0.5, 0.5]
        assert got["metrics"]["coverage@2"] == {"value": 1, "interval": None}

    def test_json_has_no_numbers_for_what_is_not_defined(self) -> None:
        empty = torch.full((2, 2), -1)
        codes = torch.zeros(3, 1, dtype=torch.int64)
        got = ranking_metrics(empty, torch.tensor([0, 1]), [2], num_items=3, codes=codes).to_dict()
        assert json.dumps(got, allow_nan=False)
        assert got["metrics"]["gini@2"] == {"value": None, "interval": None}
        assert got["metrics"]["diversity@2"] == {"value": None, "interval": None}
        assert got["metrics"]["coverage@2"]["value"] == 0
        assert got["metrics"]["recall@2"] == {"value": 0, "interval": [0, 0]}


class TestBootstrap:
    @pytest.mark.parametrize("level", [0.5, 0.95])
    def test_agrees_with_the_exact_distribution_of_a_share(self, level: float) -> None:
        # The mean of resampled zeros and ones is Binomial(U, p) / U, whose quantiles are known.
        values = torch.cat([torch.ones(30), torch.zeros(90)])
        cumulated = np.cumsum(
            [math.comb(120, hits) * 0.25**hits * 0.75 ** (120 - hits) for hits in range(121)]
        )
        low, high = bootstrap_interval(values, level=level, samples=20_000)
        assert abs(low - np.searchsorted(cumulated, (1 - level) / 2) / 120) <= 1 / 120 + 1e-9
        assert abs(high - np.searchsorted(cumulated, (1 + level) / 2) / 120) <= 1 / 120 + 1e-9

    def test_covers_the_true_mean_as_often_as_it_says(self) -> None:
        generator = np.random.default_rng(0)
        covered = 0
        for trial in range(300):
            low, high = bootstrap_interval(
                generator.normal(1, 2, size=80), level=0.8, samples=200, seed=trial
            )
            covered += low <= 1 <= high
        # 300 trials at .8 have a standard deviation of 7; a bound at 4 of them fails once in 10,000.
        assert abs(covered - 240) < 28

    def test_a_seed_gives_the_same_again(self) -> None:
        values = np.random.default_rng(0).random(50)
        assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
        assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)

    @pytest.mark.parametrize("kept", [0, 50_000_000])
    def test_means_of_users_drawn_again_whether_the_draws_are_kept_or_not(
        self, kept: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metrics_module, "_KEPT_DRAWS", kept)
        values = np.random.default_rng(2).normal(size=300)
        generator = np.random.default_rng(7)
        means = [values[generator.integers(300, size=300)].mean() for _ in range(50)]
        for _ in range(2):
            found = bootstrap_interval(values, samples=50, seed=7)
            assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), rel=1e-12)

    def test_leaves_out_users_without_a_number(self) -> None:
        values = [0.0, math.nan, 1.0, 2.0]
        assert bootstrap_interval(values) == bootstrap_interval([0.0, 1.0, 2.0])
        with pytest.raises(ValueError, match="at least one user"):
            bootstrap_interval([math.nan])

    def test_pairs_remove_what_users_have_in_common(self) -> None:
        generator = np.random.default_rng(0)
        users = generator.normal(0, 10, size=400)
        better = users + 0.3 + generator.normal(0, 0.5, size=400)
        worse = users + generator.normal(0, 0.5, size=400)
        paired = paired_bootstrap(torch.from_numpy(better), worse)
        assert paired.low > 0
        assert paired.mean == pytest.approx((better - worse).mean())
        assert paired.standard_error == pytest.approx(np.std(better - worse, ddof=1) / 20)
        # The percentile interval of a mean over many users is close to the normal one.
        assert paired.high - paired.low == pytest.approx(2 * 1.96 * paired.standard_error, rel=0.1)
        assert paired.low < paired.mean < paired.high
        mirrored = paired_bootstrap(worse, better)
        assert (mirrored.low, mirrored.high) == pytest.approx((-paired.high, -paired.low))

    def test_pairs_leave_out_users_without_a_number_in_either(self) -> None:
        a, b = [1.0, math.nan, 3.0, 5.0], [0.0, 1.0, math.nan, 2.0]
        assert paired_bootstrap(a, b) == paired_bootstrap([1.0, 5.0], [0.0, 2.0])

    @pytest.mark.parametrize(
        ("a", "b", "options", "words"),
        [
            ([1.0, 2.0], [1.0], {}, "same users, got 2 and 1"),
            ([1.0, math.nan], [1.0, 2.0], {}, "two users in common, got 1"),
            ([[1.0, 2.0]], [1.0, 2.0], {}, r"a needs the shape \(users,\), got \(1, 2\)"),
            ([1.0, 2.0], [1.0, 2.0], {"level": 1}, "level needs to lie between 0 and 1, got 1"),
            ([1.0, 2.0], [1.0, 2.0], {"samples": 0}, "samples needs to be at least 1, got 0"),
        ],
    )
    def test_bad_input(self, a: list, b: list, options: dict, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            paired_bootstrap(a, b, **options)
