"""Weights that follow yields: by their formula, written and read back, and through the sampler."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.adaptive import SCHEDULE, AdaptiveWeights, WeightSchedule
from gflowgr.sampling import STRATEGIES, Draw, TrajectorySampler

MIXTURE = {"collaborative": 0.5, "policy": 0.25, "random": 0.25}


@st.composite
def learners(draw: st.DrawFn) -> tuple[dict[str, float], float, float, np.ndarray]:
    """Weights, rate, floor, and (steps, S, 2) sums and numbers of yields, with strategies left undrawn."""
    size = draw(st.integers(2, 4))
    weights = draw(st.lists(st.floats(0.01, 5), min_size=size, max_size=size))
    cell = st.one_of(st.just((0.0, 0)), st.tuples(st.floats(0, 100), st.integers(1, 50)))
    row = st.lists(cell, min_size=size, max_size=size)
    steps = np.array(draw(st.lists(row, min_size=1, max_size=8)), dtype=np.float64)
    share = st.floats(0.01, 1)
    return dict(zip(STRATEGIES[1:], weights, strict=False)), draw(share), draw(share), steps


@given(learners())
def test_weights_are_the_formulas(case: tuple[dict[str, float], float, float, np.ndarray]) -> None:
    given_weights, rate, explore, steps = case
    learner = AdaptiveWeights(given_weights, rate=rate, explore=explore)
    total = sum(given_weights.values())
    start = [weight / total for weight in given_weights.values()]
    assert learner.at(0) == pytest.approx(start)
    for step, row in enumerate(steps):
        learner.learn(step, row[:, 0], row[:, 1])
        means: list[float | None] = []
        for strategy in range(len(start)):
            kept = [
                ((1 - rate) ** (step - past), *steps[past, strategy])
                for past in range(step + 1)
                if steps[past, strategy, 1] and (1 - rate) ** (step - past) > 0
            ]
            number = sum(old * count for old, _, count in kept)
            means.append(sum(old * sums for old, sums, _ in kept) / number if number else None)
        known = [(w, m) for w, m in zip(start, means, strict=True) if m is not None]
        average = sum(w * m for w, m in known) / sum(w for w, _ in known) if known else 1.0
        filled = [average if mean is None else mean for mean in means]
        matched = [w * m for w, m in zip(start, filled, strict=True)]
        expected = [
            explore * w + (1 - explore) * (part / sum(matched) if sum(matched) > 0 else w)
            for w, part in zip(start, matched, strict=True)
        ]
        weights = learner.at(step + 1)
        assert weights == pytest.approx(expected, rel=1e-6, abs=1e-12)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (weights >= explore * np.array(start) * (1 - 1e-12)).all()


def test_weights_of_a_step_worked_out_by_hand() -> None:
    learner = AdaptiveWeights({"a": 2, "b": 1, "c": 1, "unused": 0}, rate=0.5, explore=0.2)
    # Means 2 and 3, so .5 * 2 to .25 * 3 share the .75 that a and b have; c was not drawn and keeps its .25.
    learner.learn(0, np.array([4.0, 6.0, 0.0]), np.array([2.0, 2.0, 0.0]))
    assert learner.at(1) == pytest.approx([0.1 + 0.6 * 4 / 7, 0.05 + 0.6 * 3 / 7, 0.25])
    # a: (4 / 2 + 10) / (2 / 2 + 1) = 6, b keeps 3, c 0.
    learner.learn(1, np.array([10.0, 0.0, 0.0]), np.array([1.0, 0.0, 8.0]))
    assert learner.at(2) == pytest.approx([0.1 + 0.8 * 0.8, 0.05 + 0.8 * 0.2, 0.05])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_strategy_that_stays_the_best_ends_with_the_most_weight_whatever_the_unit(scale: float) -> None:
    rng = np.random.default_rng(0)
    means = np.array([1.0, 4.0, 2.0])
    learner = AdaptiveWeights({"a": 1, "b": 1, "c": 1}, rate=0.02, explore=0.1)
    for step in range(600):
        counts = rng.multinomial(64, learner.at(step))
        drawn = zip(means, counts, strict=True)
        sums = np.array([rng.exponential(mean, count).sum() for mean, count in drawn])
        learner.learn(step, scale * sums, counts.astype(float))
    tail = np.mean(learner.rows[300:], axis=0)
    assert tail.argmax() == 1
    assert tail == pytest.approx(0.1 / 3 + 0.9 * means / means.sum(), abs=0.02)


def test_a_strategy_that_becomes_the_best_is_found_out() -> None:
    learner = AdaptiveWeights({"a": 1, "b": 1}, rate=0.1, explore=0.1)
    for step in range(80):
        best = 0 if step < 40 else 1
        learner.learn(step, 10 * np.where(np.arange(2) == best, 9.0, 1.0), np.full(2, 10.0))
    assert learner.at(40)[0] == pytest.approx(0.05 + 0.9 * 0.9)
    assert learner.at(80)[1] == pytest.approx(0.05 + 0.9 * 0.9, abs=0.02)


def test_batches_of_a_step_count_as_one() -> None:
    whole, parts = (AdaptiveWeights({"a": 1, "b": 2}, rate=0.3) for _ in range(2))
    for step in range(3):
        first, second = (np.array([1.0 + step, 2.0]), np.array([3.0, 1.0])), (np.array([5.0, 0]), np.ones(2))
        whole.learn(step, first[0] + second[0], first[1] + second[1])
        parts.learn(step, *first)
        parts.learn(step, *second)
    assert np.array(parts.rows) == pytest.approx(np.array(whole.rows))
    with pytest.raises(ValueError, match="step: got 1, need 3"):
        parts.learn(1, np.ones(2), np.ones(2))


def test_a_schedule_is_written_exactly_and_goes_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    yields = rng.exponential(size=(9, 3))
    whole, first, second = (AdaptiveWeights(MIXTURE) for _ in range(3))
    for step, row in enumerate(yields):
        whole.learn(step, row, np.full(3, 7.0))
        if step < 5:
            first.learn(step, row, np.full(3, 7.0))
    first.save(tmp_path / SCHEDULE)
    read = WeightSchedule.load(tmp_path / SCHEDULE)
    assert read.strategies == ("collaborative", "policy", "random")
    assert np.array_equal(read.rows, first.rows)
    second.resume(tmp_path / SCHEDULE)
    for step in range(5, 9):
        second.learn(step, yields[step], np.full(3, 7.0))
    assert np.array_equal(second.rows, whole.rows)
    second.restart()
    assert len(second.rows) == 1 and not second.sums.any() and not second.counts.any()


def test_a_schedule_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such schedule"):
        WeightSchedule.load(tmp_path / SCHEDULE)
    (tmp_path / SCHEDULE).write_text('{"format": "gflowgr.quality/1"}')
    with pytest.raises(ValueError, match="not a schedule"):
        WeightSchedule.load(tmp_path / SCHEDULE)
    AdaptiveWeights({"random": 1, "policy": 2}).save(tmp_path / SCHEDULE)
    with pytest.raises(ValueError, match=r"has the strategies.*'random', 'policy'"):
        AdaptiveWeights({"random": 1, "policy": 1}).resume(tmp_path / SCHEDULE)
    WeightSchedule(("random", "policy"), [[0.5, 0.5]]).save(tmp_path / SCHEDULE)
    with pytest.raises(ValueError, match="need one that was learned"):
        AdaptiveWeights({"random": 1, "policy": 1}).resume(tmp_path / SCHEDULE)


@pytest.mark.parametrize("row", [[0.5, 0.4], [1.5, -0.5], [1.0], [math.nan, 1.0]])
def test_rows_that_are_no_weights_are_refused(row: list[float]) -> None:
    with pytest.raises(ValueError, match="for step 1, need a weight of at least 0 for each of a, b"):
        WeightSchedule(("a", "b"), [[0.5, 0.5], row])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to": "reward"}, "to: got 'reward', need one of residual, mass"),
        ({"rate": 0.0}, "rate: got 0.0, need a number above 0"),
        ({"rate": math.nan}, "rate: got nan"),
        ({"explore": 1.1}, "explore: got 1.1"),
        ({"explore": True}, "explore: got True"),
        ({"strategies": {"a": 1, "b": 0}}, "strategies: got a, need at least two"),
    ],
)
def test_settings_that_cannot_work_name_themselves(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveWeights(**{"strategies": {"a": 1, "b": 1}, **settings})


@pytest.mark.parametrize("broken", [math.inf, math.nan, -1.0])
def test_a_yield_that_is_none_is_refused(broken: float) -> None:
    with pytest.raises(ValueError, match="need finite yields"):
        AdaptiveWeights({"a": 1, "b": 1}).learn(0, np.array([1.0, broken]), np.ones(2))


def test_totals_leave_the_target_out_and_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    strategy = torch.randint(1, 5, (9, 4), generator=generator).to(torch.int8)
    strategy[:, 0] = 0
    yields = torch.rand(9, 4, generator=generator)
    totals = Draw(torch.zeros(9, 4, dtype=torch.int64), strategy).totals(yields)
    for number in range(5):
        chosen = [
            float(yields[row, slot])
            for row in range(9)
            for slot in (1, 2, 3)
            if strategy[row, slot] == number
        ]
        assert totals[:, number].tolist() == pytest.approx([sum(chosen), len(chosen)])
    parts = [Draw(strategy[a:b].long(), strategy[a:b]).totals(yields[a:b]) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(parts[0] + parts[1], totals)
    with pytest.raises(ValueError, match="yields: got shape"):
        Draw(strategy.long(), strategy).totals(yields[:, 1:])


def a_draw(sampler: TrajectorySampler, step: int, rows: int = 2_000) -> Draw:
    return sampler.draw(
        step=step,
        total_steps=10,
        index=torch.arange(rows),
        target=torch.zeros(rows, dtype=torch.int64),
        history=torch.full((rows, 1), -1),
        scores=torch.randn(rows, 200, generator=torch.Generator().manual_seed(2)),
        policy_items=lambda count: torch.arange(100, 105).expand(rows, -1),
    )


def test_a_sampler_draws_by_the_steps_weights_and_a_replay_draws_the_same(tmp_path: Path) -> None:
    sampler = TrajectorySampler(200, strategies=MIXTURE, adapt={"rate": 0.5}, seed=4)
    draws = []
    for step in range(4):
        draws.append(a_draw(sampler, step))
        shares = draws[-1].shares()
        # Four standard deviations of a share of 6,000 slots.
        expected = dict(zip(STRATEGIES[1:], sampler.weights_at(step)[1:], strict=True))
        assert shares == pytest.approx(expected, abs=4 * 0.5 / 6_000**0.5)
        yields = torch.where(draws[-1].strategy == STRATEGIES.index("policy"), 6.0, 1.0)
        sampler.learn(step, draws[-1].totals(yields))
    assert sampler.weights_at(4)[STRATEGIES.index("policy")] == pytest.approx(0.025 + 0.9 * 6 / 9)
    assert sampler.weights_at(4)[STRATEGIES.index("observed")] == 0
    assert sampler.mixture is not None
    sampler.mixture.save(tmp_path / SCHEDULE)
    replay = TrajectorySampler(200, strategies=MIXTURE, replay=tmp_path / SCHEDULE, seed=4)
    for step in (3, 0, 2, 1):
        again = a_draw(replay, step)
        assert torch.equal(again.items, draws[step].items)
        assert torch.equal(again.strategy, draws[step].strategy)
    fixed = a_draw(TrajectorySampler(200, strategies=MIXTURE, seed=4), 3)
    assert not torch.equal(fixed.items, draws[3].items)
    with pytest.raises(ValueError, match="step: got 5, but weights are known of 5 steps"):
        a_draw(replay, 5)
    with pytest.raises(ValueError, match="learn: this sampler's weights do not adapt"):
        replay.learn(0, draws[0].totals(torch.ones(2_000, 4)))


def test_a_replay_that_does_not_fit_is_named() -> None:
    schedule = WeightSchedule(("random", "policy"), [[0.5, 0.5]])
    with pytest.raises(ValueError, match="got both, need one"):
        TrajectorySampler(9, strategies=MIXTURE, adapt={}, replay=schedule)
    with pytest.raises(ValueError, match=r"a schedule of random, policy, need.*collaborative, policy"):
        TrajectorySampler(9, strategies=MIXTURE, replay=schedule)


def test_the_chart_has_each_strategys_weights() -> None:
    pytest.importorskip("matplotlib")
    from gflowgr.report import chart_svg

    schedule = WeightSchedule(("random", "policy"), [[0.5, 0.5], [0.25, 0.75]])
    chart = schedule.chart()
    assert chart.lines == {"random": [(0, 0.5), (1, 0.25)], "policy": [(0, 0.5), (1, 0.75)]}
    drawn = chart_svg(chart)
    assert drawn == chart_svg(chart) and "<svg" in drawn
    assert drawn != chart_svg(WeightSchedule(("random", "policy"), [[0.5, 0.5], [0.3, 0.7]]).chart())
