"""The trajectory sampler against brute force: what may be drawn, how often, and what a draw depends on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from gflowgr.sampling import STRATEGIES, Draw, TrajectorySampler, policy_seeds

OBSERVED, RANDOM, COLLABORATIVE, POLICY = (
    STRATEGIES.index(name) for name in ("observed", "random", "collaborative", "policy")
)
NOTHING = torch.full((1, 3), -1)


def draw_one(
    sampler: TrajectorySampler, repeats: int, target: int, history: list[int], step: int = 0, **inputs: object
) -> Draw:
    """The same context `repeats` times, told apart by its example index alone."""
    return sampler.draw(
        step=step,
        total_steps=10,
        index=torch.arange(repeats),
        target=torch.full((repeats,), target),
        history=torch.tensor([history]).expand(repeats, -1),
        **inputs,  # type: ignore[arg-type]
    )


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's test at a level of 1e-4; the seeds are fixed, so it is passed or failed for good."""
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    expected = counts.sum() * probabilities[possible]
    statistic = ((counts[possible] - expected) ** 2 / expected).sum()
    assert statistic < chi2.ppf(1 - 1e-4, possible.sum() - 1)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, object]:
    num_items = draw(st.integers(1, 12))
    rows = draw(st.integers(0, 6))
    item = st.integers(0, num_items - 1)
    padded = st.integers(-1, num_items - 1)
    score = st.one_of(st.sampled_from([0.0, 1.0, -np.inf]), st.floats(-3, 3, width=32))

    def table(element: st.SearchStrategy, width: int, dtype: torch.dtype) -> torch.Tensor:
        cells = draw(st.lists(element, min_size=rows * width, max_size=rows * width))
        return torch.tensor(cells, dtype=dtype).reshape(rows, width)

    policy = table(padded, draw(st.integers(1, 5)), torch.int64)
    return {
        "num_items": num_items,
        "num_trajectories": draw(st.integers(1, num_items)),
        "strategies": draw(
            st.dictionaries(st.sampled_from(STRATEGIES[1:]), st.floats(0.1, 1), min_size=1, max_size=4)
        ),
        "schedule": draw(st.sampled_from(["curriculum", "constant"])),
        "inputs": {
            "step": draw(st.integers(0, 5)),
            "total_steps": 5,
            "index": torch.arange(rows) + draw(st.integers(0, 100)),
            "target": table(item, 1, torch.int64)[:, 0],
            "history": table(padded, draw(st.integers(0, 4)), torch.int64),
            "future": table(padded, draw(st.integers(0, 3)), torch.int64),
            "scores": table(score, num_items, torch.float32),
            "policy_items": lambda count: policy,
        },
        "policy": policy,
    }


@settings(max_examples=300, deadline=None)
@given(batches())
def test_every_draw_is_distinct_and_labelled_by_what_filled_it(batch: dict) -> None:
    sampler = TrajectorySampler(
        batch["num_items"],
        num_trajectories=batch["num_trajectories"],
        strategies=batch["strategies"],
        schedule=batch["schedule"],
        seed=3,
    )
    inputs = batch["inputs"]
    draw = sampler.draw(**inputs)
    assert draw.items.dtype == torch.int64
    assert draw.strategy.dtype == torch.int8
    assert draw.items.shape == draw.strategy.shape == (len(inputs["target"]), batch["num_trajectories"])
    assert torch.equal(draw.items[:, 0], inputs["target"])
    for row, (items, strategies) in enumerate(zip(draw.items.tolist(), draw.strategy.tolist(), strict=True)):
        assert strategies[0] == STRATEGIES.index("target")
        assert len(set(items)) == len(items)
        assert all(0 <= item < batch["num_items"] for item in items)
        seen = set(inputs["history"][row].tolist()) | set(inputs["future"][row].tolist())
        for item, strategy in zip(items[1:], strategies[1:], strict=True):
            if strategy == OBSERVED:
                assert item in seen
            elif strategy == RANDOM:
                assert item not in seen
            elif strategy == COLLABORATIVE:
                assert inputs["scores"][row, item] > -np.inf
            else:
                assert strategy == POLICY
                assert item in batch["policy"][row].tolist()


def test_a_draw_depends_on_seed_step_and_example_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, num_items = 64, 300
    inputs = {
        "index": torch.randperm(10_000, generator=generator)[:rows],
        "target": torch.randint(num_items, (rows,), generator=generator),
        "history": torch.randint(-1, num_items, (rows, 6), generator=generator),
        "future": torch.randint(-1, num_items, (rows, 3), generator=generator),
        "scores": torch.randn(rows, num_items, generator=generator),
    }
    policy = torch.randint(num_items, (rows, 6), generator=generator)
    mixture = {"observed": 1.0, "random": 1.0, "collaborative": 2.0, "policy": 1.0}
    sampler = TrajectorySampler(num_items, num_trajectories=5, strategies=mixture, seed=9)
    whole = sampler.draw(step=4, total_steps=9, policy_items=lambda count: policy, **inputs)

    twin = TrajectorySampler(num_items, num_trajectories=5, strategies=mixture, seed=9)
    order = torch.randperm(rows, generator=generator)
    for part in order.split(7):
        some = twin.draw(
            step=4,
            total_steps=9,
            policy_items=lambda count, part=part: policy[part],
            **{name: tensor[part] for name, tensor in inputs.items()},
        )
        assert torch.equal(some.items, whole.items[part])
        assert torch.equal(some.strategy, whole.strategy[part])

    wider = {**inputs, "history": torch.nn.functional.pad(inputs["history"], (0, 4), value=-1)}
    padded = sampler.draw(step=4, total_steps=9, policy_items=lambda count: policy, **wider)
    assert torch.equal(padded.items, whole.items)

    other_step = sampler.draw(step=5, total_steps=9, policy_items=lambda count: policy, **inputs)
    other_seed = TrajectorySampler(num_items, num_trajectories=5, strategies=mixture, seed=10).draw(
        step=4, total_steps=9, policy_items=lambda count: policy, **inputs
    )
    for other in (other_step, other_seed):
        assert (other.items != whole.items).any(1).float().mean() > 0.9


def test_a_draw_leaves_the_global_random_states_alone() -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    draw_one(TrajectorySampler(50, strategies="random"), 10, 3, [1, -1])
    assert torch.equal(before, torch.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()


def test_random_items_are_uniform_over_what_the_user_was_not_seen_with() -> None:
    sampler = TrajectorySampler(12, num_trajectories=4, strategies="random", seed=1)
    draw = draw_one(sampler, 20_000, 5, [0, 7, 7, -1], future=torch.tensor([[11, -1]]).expand(20_000, -1))
    allowed = np.ones(12)
    allowed[[5, 0, 7, 11]] = 0
    for slot in range(1, 4):
        assert_follows(np.bincount(draw.items[:, slot], minlength=12), allowed / allowed.sum())
    # Without replacement, an ordered pair of slots is uniform over the ordered pairs of distinct items.
    pairs = Counter(map(tuple, draw.items[:, 1:3].tolist()))
    counts = np.array([pairs[a, b] for a in range(12) for b in range(12)])
    possible = np.array([float(a != b and allowed[a] * allowed[b] > 0) for a in range(12) for b in range(12)])
    assert_follows(counts, possible / possible.sum())


def test_random_items_follow_popularity_without_replacement() -> None:
    popularity = torch.tensor([5.0, 0.0, 1.0, 2.0, 8.0, 4.0, 100.0])
    sampler = TrajectorySampler(7, num_trajectories=3, strategies="random", popularity=popularity, seed=2)
    draw = draw_one(sampler, 20_000, 6, [4, -1])
    weight = popularity.double().numpy().copy()
    weight[[6, 4]] = 0
    first = weight / weight.sum()
    assert_follows(np.bincount(draw.items[:, 1], minlength=7), first)
    second = np.zeros(7)
    for item in np.flatnonzero(first):
        rest = weight.copy()
        rest[item] = 0
        second += first[item] * rest / rest.sum()
    assert_follows(np.bincount(draw.items[:, 2], minlength=7), second)


def test_an_item_without_popularity_is_drawn_when_nothing_else_is_left() -> None:
    sampler = TrajectorySampler(
        3, num_trajectories=3, strategies="random", popularity=np.array([1.0, 0.0, 1.0])
    )
    assert {frozenset(row) for row in draw_one(sampler, 50, 0, [-1]).items.tolist()} == {frozenset({0, 1, 2})}


def test_a_catalogue_that_was_seen_whole_still_fills_every_slot_and_says_with_what() -> None:
    draw = draw_one(TrajectorySampler(4, num_trajectories=4, strategies="random"), 30, 2, [0, 1, -1])
    for items, strategies in zip(draw.items.tolist(), draw.strategy.tolist(), strict=True):
        assert sorted(items) == [0, 1, 2, 3]
        assert [strategy == RANDOM for strategy in strategies] == [item == 3 for item in items]


def test_observed_items_are_uniform_over_the_future_and_shortage_falls_to_random_visibly() -> None:
    future = torch.tensor([[8, 2, 8, 9, -1]]).expand(9_000, -1)
    draw = draw_one(
        TrajectorySampler(10, num_trajectories=2, strategies="observed"), 9_000, 9, [1], future=future
    )
    assert (draw.strategy[:, 1] == OBSERVED).all()
    wanted = np.zeros(10)
    wanted[[8, 2]] = 0.5
    assert_follows(np.bincount(draw.items[:, 1], minlength=10), wanted)

    draw = draw_one(
        TrajectorySampler(10, num_trajectories=4, strategies="observed"), 50, 9, [1], future=future[:50]
    )
    assert all(Counter(row) == {OBSERVED: 2, RANDOM: 1} for row in draw.strategy[:, 1:].tolist())
    assert draw.shares() == pytest.approx(
        {"observed": 2 / 3, "random": 1 / 3, "collaborative": 0.0, "policy": 0.0}
    )


def window_oracle(scores: np.ndarray, target: int, pool: int, picks: int, progress: float) -> set[int]:
    ranked = [item for item in np.argsort(-scores, kind="stable") if item != target][:pool][::-1]
    width = min(len(ranked), max(picks, -(-len(ranked) // 2)))
    first = round(progress * (len(ranked) - width))
    return set(ranked[first : first + width])


@settings(max_examples=60, deadline=None)
@given(
    num_items=st.integers(8, 2_000),
    num_trajectories=st.integers(2, 6),
    extra=st.integers(0, 20),
    step=st.integers(0, 12),
    seed=st.integers(0, 2**32),
)
def test_collaborative_picks_come_from_the_window_of_the_pool(
    num_items: int, num_trajectories: int, extra: int, step: int, seed: int
) -> None:
    scores = torch.from_numpy(
        np.random.default_rng(seed).permutation(num_items * 3)[: num_items * 3].astype(np.float32)
    )
    scores = scores.reshape(3, num_items)
    target = scores.argmax(1)
    pool = num_trajectories - 1 + extra
    sampler = TrajectorySampler(
        num_items, num_trajectories=num_trajectories, pool_size=max(1, pool), seed=seed
    )
    draw = sampler.draw(
        step=step,
        total_steps=11,
        index=torch.arange(3),
        target=target,
        history=NOTHING.expand(3, -1),
        scores=scores,
    )
    assert (draw.strategy[:, 1:] == COLLABORATIVE).all()
    progress = min(1.0, step / 10)
    for row in range(3):
        allowed = window_oracle(scores[row].numpy(), int(target[row]), pool, num_trajectories - 1, progress)
        assert set(draw.items[row, 1:].tolist()) <= allowed


def test_picks_are_uniform_in_the_window_and_constant_uses_the_whole_pool() -> None:
    scores = torch.arange(20.0).expand(20_000, -1)
    for schedule, step, allowed in (
        ("curriculum", 0, range(12, 16)),
        ("curriculum", 9, range(15, 19)),
        ("constant", 0, range(12, 19)),
    ):
        draw = draw_one(
            TrajectorySampler(20, schedule=schedule, seed=4), 20_000, 19, [-1], step=step, scores=scores
        )
        wanted = np.zeros(20)
        wanted[list(allowed)] = 1 / len(allowed)
        for slot in range(1, 4):
            assert_follows(np.bincount(draw.items[:, slot], minlength=20), wanted)


def test_the_curriculum_runs_from_easy_to_hard() -> None:
    scores = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    sampler = TrajectorySampler(500, num_trajectories=4, pool_size=50)
    target = torch.zeros(200, dtype=torch.int64)
    means = []
    for step in range(0, 101, 10):
        draw = sampler.draw(
            step=step,
            total_steps=101,
            index=torch.arange(200),
            target=target,
            history=NOTHING.expand(200, -1),
            scores=scores,
        )
        means.append(float(scores.gather(1, draw.items[:, 1:]).mean()))
    assert means == sorted(means)
    assert means[-1] - means[0] > 0.5
    assert sampler.progress(0, 101) == 0.0
    assert sampler.progress(100, 101) == sampler.progress(500, 101) == 1.0


def test_items_tied_with_the_pools_edge_are_not_drawn_by_their_number() -> None:
    scores = torch.zeros(400, 40)
    scores[:, [30, 35]] = torch.tensor([1.0, 2.0])
    draw = draw_one(
        TrajectorySampler(40, num_trajectories=4, schedule="constant"), 400, 7, [-1], scores=scores
    )
    for items, strategies in zip(draw.items.tolist(), draw.strategy.tolist(), strict=True):
        collaborative = {item for item, s in zip(items, strategies, strict=True) if s == COLLABORATIVE}
        assert collaborative == {30, 35}
        assert strategies.count(RANDOM) == 1
    assert len(set(draw.items[draw.strategy == RANDOM].tolist())) > 30


def test_a_score_of_minus_infinity_bars_an_item() -> None:
    scores = torch.full((50, 10), -torch.inf)
    scores[:, [3, 4]] = torch.tensor([0.5, 0.7])
    draw = draw_one(TrajectorySampler(10, num_trajectories=3), 50, 4, [-1], scores=scores)
    assert (draw.items[draw.strategy == COLLABORATIVE] == 3).all()
    assert draw.shares()["collaborative"] == 0.5


def test_policy_items_are_taken_in_order_without_repeats_the_target_or_blanks() -> None:
    asked = []

    def policy_items(count: int) -> torch.Tensor:
        asked.append(count)
        return torch.tensor([[6, 9, -1, 6, 2, 3]])

    draw = draw_one(
        TrajectorySampler(10, num_trajectories=3, strategies="policy"), 1, 9, [-1], policy_items=policy_items
    )
    assert asked == [3]
    assert draw.items.tolist() == [[9, 6, 2]]
    short = draw_one(
        TrajectorySampler(10, num_trajectories=4, strategies="policy"),
        1,
        9,
        [-1],
        policy_items=lambda count: torch.tensor([[9, 6, 6]]),
    )
    assert short.strategy.tolist() == [[0, POLICY, RANDOM, RANDOM]]
    assert short.items[0, 1] == 6


def test_the_policy_is_asked_even_when_no_slot_needs_it() -> None:
    asked = []

    def policy_items(count: int) -> torch.Tensor:
        asked.append(count)
        return torch.zeros(1, 1, dtype=torch.int64)

    sampler = TrajectorySampler(10, num_trajectories=1, strategies={"policy": 0.5, "random": 0.5})
    draw_one(sampler, 1, 0, [-1], policy_items=policy_items)
    assert asked == [1]


def test_a_mixture_gives_every_strategy_its_weight() -> None:
    rows = 6_000
    sampler = TrajectorySampler(
        1_000, num_trajectories=3, strategies={"random": 5, "collaborative": 3, "policy": 2}, seed=5
    )
    scores = torch.randn(rows, 1_000, generator=torch.Generator().manual_seed(1))
    policy = torch.arange(100, 105).expand(rows, -1)
    draw = draw_one(sampler, rows, 0, [-1], scores=scores, policy_items=lambda count: policy)
    counts = np.bincount(draw.strategy[:, 1:].flatten(), minlength=5)
    assert_follows(counts, np.array([0.0, 0.0, 0.5, 0.3, 0.2]))
    # The slots of one row choose on their own.
    both = Counter(map(tuple, draw.strategy[:, 1:].tolist()))
    weights = {RANDOM: 0.5, COLLABORATIVE: 0.3, POLICY: 0.2}
    pairs = [(a, b) for a in weights for b in weights]
    assert_follows(np.array([both[p] for p in pairs]), np.array([weights[a] * weights[b] for a, b in pairs]))


def test_seeds_of_the_policys_draws_are_each_examples_own() -> None:
    index = torch.arange(500)
    seeds = policy_seeds(3, 7, index)
    assert seeds.dtype == torch.int64 and (seeds >= 0).all() and len(seeds.unique()) == 500
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy_seeds(3, 7, index[order]), seeds[order])
    for other in (policy_seeds(3, 8, index), policy_seeds(4, 7, index)):
        assert not torch.isin(other, seeds).any()


def test_an_empty_batch_gives_an_empty_draw() -> None:
    draw = TrajectorySampler(500).draw(
        step=0,
        total_steps=1,
        index=torch.zeros(0, dtype=torch.int64),
        target=torch.zeros(0, dtype=torch.int64),
        history=torch.zeros(0, 3, dtype=torch.int64),
        scores=torch.zeros(0, 500),
    )
    assert draw.items.shape == (0, 4)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_trajectories": 11}, "num_trajectories: got 11, need at most the catalogue's 10 items"),
        ({"num_trajectories": 0}, "num_trajectories: got 0"),
        ({"strategies": "colaborative"}, "did you mean 'collaborative'"),
        ({"strategies": "target"}, "strategies: got 'target'"),
        ({"strategies": {}}, "strategies: got no strategy"),
        ({"strategies": {"random": -1.0}}, "strategies: got weight -1.0 for 'random'"),
        ({"strategies": {"random": float("nan")}}, "strategies: got weight nan"),
        ({"schedule": "constnat"}, "schedule: got 'constnat'.*did you mean 'constant'"),
        ({"pool_size": 2}, "pool_size: got 2, need an integer of at least 3"),
        ({"popularity": torch.ones(9)}, r"popularity: got shape \(9,\), need \(10,\)"),
        ({"popularity": torch.full((10,), torch.nan)}, "popularity: need finite"),
    ],
)
def test_settings_that_cannot_work_name_themselves(settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrajectorySampler(10, **settings_)


@pytest.mark.parametrize(
    ("strategies", "inputs", "error", "message"),
    [
        ("collaborative", {}, ValueError, "scores: got None, need it for strategy 'collaborative'"),
        ("observed", {}, ValueError, "future: got None, need it for strategy 'observed'"),
        ("policy", {}, ValueError, "policy_items: got None"),
        ("collaborative", {"scores": torch.zeros(2, 9)}, ValueError, r"scores: got shape \(2, 9\)"),
        ("collaborative", {"scores": torch.full((2, 10), torch.nan)}, ValueError, "scores: got NaN"),
        (
            "collaborative",
            {"scores": torch.zeros(2, 10, dtype=torch.int64)},
            TypeError,
            "scores: got torch.int64",
        ),
        ("random", {"target": torch.tensor([0, 10])}, ValueError, "target: got ids from 0 to 10"),
        ("random", {"target": torch.tensor([0, -1])}, ValueError, "target: got ids from -1"),
        ("random", {"target": torch.tensor([0.0, 1.0])}, TypeError, "target: got torch.float32"),
        ("random", {"index": torch.tensor([0])}, ValueError, r"index: got shape \(1,\), need \(2\)"),
        ("random", {"history": torch.tensor([[-2], [0]])}, ValueError, "history: got ids from -2"),
        ("random", {"step": -1}, ValueError, "step: got -1"),
        ("random", {"total_steps": 0}, ValueError, "total_steps: got 0"),
        (
            "policy",
            {"policy_items": lambda count: torch.zeros(3, 1, dtype=torch.int64)},
            ValueError,
            r"policy_items: got shape \(3, 1\), need \(2, any\)",
        ),
    ],
)
def test_inputs_that_cannot_work_name_themselves(
    strategies: str, inputs: dict, error: type[Exception], message: str
) -> None:
    usable = {
        "step": 0,
        "total_steps": 1,
        "index": torch.arange(2),
        "target": torch.tensor([0, 1]),
        "history": torch.full((2, 1), -1),
    }
    with pytest.raises(error, match=message):
        TrajectorySampler(10, strategies=strategies).draw(**{**usable, **inputs})


@pytest.mark.parametrize("strategy", STRATEGIES[1:4])
def test_every_strategy_draws_anew_in_each_step(strategy: str) -> None:
    sampler = TrajectorySampler(60, strategies=strategy, schedule="constant", pool_size=30)
    inputs = {"scores": torch.arange(60.0).expand(40, -1), "future": torch.arange(30).expand(40, -1)}
    first, second = (draw_one(sampler, 40, 59, [-1], step=step, **inputs).items for step in (1, 2))
    assert (first != second).any(1).float().mean() > 0.9


@pytest.mark.parametrize("columns", [1_000, 1_023, 1_024, 1_055])
def test_the_best_items_of_a_long_row_are_found_in_its_last_columns_too(columns: int) -> None:
    scores = torch.arange(float(columns)).repeat(2, 1)
    scores[1] = scores[1].flip(0)
    draw = TrajectorySampler(columns, num_trajectories=2, pool_size=1).draw(
        step=0,
        total_steps=1,
        index=torch.arange(2),
        target=torch.tensor([columns - 1, 0]),
        history=NOTHING.expand(2, -1),
        scores=scores,
    )
    assert draw.items.tolist() == [[columns - 1, columns - 2], [0, 1]]


def test_nan_is_found_in_a_long_row_too() -> None:
    scores = torch.zeros(2, 5_000)
    scores[1, 4_321] = torch.nan
    with pytest.raises(ValueError, match="scores: got NaN"):
        draw_one(TrajectorySampler(5_000), 2, 0, [-1], scores=scores)
