"""Rolled-out histories against enumeration by hand, and what a training run makes of them."""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor

from gflowgr import rollouts
from gflowgr.rollouts import RolloutPool, best_items, make_room, roll_out, roll_out_window

pytest.importorskip("transformers")

from gflowgr.assembly import Plan
from gflowgr.collaborative import Popularity, SASRec
from gflowgr.data import Examples, Histories
from gflowgr.recipes import GFLOWGR
from gflowgr.shared_prefixes import SharedPrefixes
from gflowgr.trainer import GFlowGRTrainer

sys.path.insert(0, str(Path(__file__).parent))
import training_fixtures as fixtures

OURS = ("objective", "flows", "reward_candidates")


class ByLastItem:
    """A recommender whose scores are a row of a table, that of the last item."""

    def __init__(self, num_items: int, seed: int = 0) -> None:
        self.num_items = num_items
        self.table = torch.randn(num_items, num_items, generator=torch.Generator().manual_seed(seed))

    def scores(self, histories: Tensor) -> Tensor:
        end = (histories >= 0).sum(1, keepdim=True) - 1
        return self.table.to(histories.device)[histories.gather(1, end)[:, 0]]

    def probability(self, item: int, past: list[int]) -> float:
        """Of an item that the past lacks, after it."""
        weights = np.exp(self.table[past[-1]].double().numpy())
        weights[past] = 0
        return float(weights[item] / weights.sum())


def padded(rows: list[list[int]], width: int) -> Tensor:
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_follows(counts: dict[tuple[int, ...], int], probabilities: dict[tuple[int, ...], float]) -> None:
    """Pearson's test at a level of 1e-4; the seeds are fixed, so it is passed or failed for good."""
    assert set(counts) <= set(probabilities)
    assert sum(probabilities.values()) == pytest.approx(1)
    total = sum(counts.values())
    statistic = sum(
        (counts.get(outcome, 0) - total * probability) ** 2 / (total * probability)
        for outcome, probability in probabilities.items()
    )
    assert statistic < chi2.ppf(1 - 1e-4, len(probabilities) - 1)


@st.composite
def histories_of_distinct_items(draw: st.DrawFn) -> tuple[list[list[int]], int]:
    num_items = draw(st.integers(2, 9))
    history = st.integers(1, num_items).flatmap(
        lambda length: st.permutations(range(num_items)).map(lambda order: list(order)[:length])
    )
    return draw(st.lists(history, min_size=1, max_size=6)), num_items


@settings(max_examples=60, deadline=None)
@given(histories_of_distinct_items(), st.integers(0, 1000), st.integers(0, 2), st.data())
def test_a_prefix_stays_and_the_rest_is_drawn_without_repeats(
    histories: tuple[list[list[int]], int], seed: int, spare: int, data: st.DataObject
) -> None:
    rows, num_items = histories
    further = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)))
    keep = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    items = padded(rows, num_items + spare)
    value = torch.where(items >= 0, 1.0 + torch.arange(items.shape[1]), 0.0)
    given_items, given_value = items.clone(), value.clone()
    model = ByLastItem(num_items, seed)
    rolled = roll_out(
        model,
        {"items": items, "value": value},
        seeded(seed),
        beyond=torch.tensor(further),
        keep=torch.tensor(keep),
    )
    assert torch.equal(items, given_items) and torch.equal(value, given_value)
    assert rolled["items"].dtype == items.dtype and rolled["value"].dtype == value.dtype
    for row, new, worth, beyond, stays in zip(
        rows, rolled["items"].tolist(), rolled["value"].tolist(), further, keep, strict=True
    ):
        length = min(len(row) + beyond, items.shape[1])
        drawn = [column for column in range(length) if worth[column] == 0]
        kept = length - len(drawn)
        assert drawn == list(range(kept, length))
        if stays:
            assert kept == len(row)
        else:
            assert 1 <= kept <= max(1, len(row) - (length == len(row)))
        assert new[:kept] == row[:kept] and worth[:kept] == [1.0 + column for column in range(kept)]
        assert len(set(new[:length])) == min(length, num_items)
        assert all(0 <= item < num_items for item in new[:length])
        assert new[length:] == [-1] * (len(new) - length)


def test_draws_follow_the_softmax_of_the_scores_after_what_was_drawn() -> None:
    model, count = ByLastItem(5), 30_000
    items = torch.tensor([[2, 0, 4]]).expand(count, -1)
    rolled = roll_out(model, {"items": items, "value": torch.ones(count, 3)}, seeded(1))
    drawn = (rolled["value"] == 0).sum(1)
    assert_follows(Counter(zip(drawn.tolist(), strict=True)), {(1,): 0.5, (2,): 0.5})
    one = Counter(zip(rolled["items"][drawn == 1, 2].tolist(), strict=True))
    assert_follows(one, {(item,): model.probability(item, [2, 0]) for item in (1, 3, 4)})
    two = Counter(map(tuple, rolled["items"][drawn == 2, 1:].tolist()))
    assert_follows(
        two,
        {
            (first, second): model.probability(first, [2]) * model.probability(second, [2, first])
            for first in (0, 1, 3, 4)
            for second in {0, 1, 3, 4} - {first}
        },
    )


def test_a_rollout_beyond_its_history_may_keep_all_of_it() -> None:
    model, count = ByLastItem(5), 30_000
    items = torch.tensor([[2, 0, -1, -1]]).expand(count, -1)
    value = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(count, -1)
    rolled = roll_out(model, {"items": items, "value": value}, seeded(1), beyond=1)["items"]
    assert (rolled[:, 3] == -1).all()
    drawn = dict[tuple[int, ...], float]()
    for first in (0, 1, 3, 4):
        for second in {0, 1, 3, 4} - {first}:
            # Half of them keep both items, and what they draw is drawn after both.
            probability = 0.5 * model.probability(first, [2]) * model.probability(second, [2, first])
            drawn[2, first, second] = probability + (
                0.5 * model.probability(second, [2, 0]) if first == 0 else 0.0
            )
    assert_follows(Counter(map(tuple, rolled[:, :3].tolist())), drawn)


def test_a_longer_history_keeps_each_number_of_items_as_often() -> None:
    count = 20_000
    items = torch.arange(6).expand(count, -1)
    rolled = roll_out(ByLastItem(9), {"items": items, "value": torch.ones(count, 6)}, seeded(2))
    kept = (rolled["value"] == 1).sum(1).tolist()
    assert_follows(Counter(zip(kept, strict=True)), {(number,): 0.2 for number in range(1, 6)})


def test_whoever_has_had_the_whole_catalogue_repeats_by_the_scores_alone() -> None:
    model, count = ByLastItem(3), 30_000
    items = torch.tensor([[0, 1, 2, 0, 1]]).expand(count, -1)
    rolled = roll_out(model, {"items": items, "value": torch.ones(count, 5)}, seeded(3))
    new = rolled["items"]
    assert (new[:, :3].sort(1).values == torch.arange(3)).all()
    last = new[rolled["value"][:, 4] == 0]
    assert len(last) == count
    for before in range(3):
        softmax = model.table[before].double().softmax(0).tolist()
        chosen = Counter(zip(last[last[:, 3] == before, 4].tolist(), strict=True))
        assert_follows(chosen, {(item,): probability for item, probability in enumerate(softmax)})


def test_a_share_of_the_draws_is_any_item_that_the_history_lacks() -> None:
    model, count = ByLastItem(5), 30_000
    items = torch.tensor([[2, 0, -1]]).expand(count, -1)
    value = torch.tensor([[1.0, 1.0, 0.0]]).expand(count, -1)
    noted: list[Tensor] = []
    rolled = roll_out(
        model,
        {"items": items, "value": value},
        seeded(5),
        among=2,
        note=lambda rows, position, best, scores: noted.append(best),
        beyond=1,
        keep=torch.ones(count, dtype=torch.bool),
        epsilon=0.5,
    )
    # Of five items two are known: three draws in ten are another, and the others stay the recommender's.
    best = model.table[0].topk(2).indices.tolist()
    unseen = [item for item in best if item not in (2, 0)]
    weights = model.table[0][unseen].double().softmax(0).tolist()
    expected = {
        (item,): 0.1 + 0.7 * dict(zip(unseen, weights, strict=True)).get(item, 0) for item in (1, 3, 4)
    }
    assert_follows(Counter(zip(rolled["items"][:, 2].tolist(), strict=True)), expected)
    assert len(noted) == 1 and bool((noted[0].sort(1).values == torch.tensor(sorted(best))).all())
    assert bool((rolled["value"][:, 2] == 0).all())


def test_an_item_barred_by_its_score_is_never_drawn() -> None:
    model = ByLastItem(6)
    model.table[:, 4] = -torch.inf
    items = torch.tensor([[0, 1, 2]]).expand(2000, -1)
    rolled = roll_out(model, {"items": items, "value": torch.ones(2000, 3)}, seeded(4))
    assert set(rolled["items"].flatten().tolist()) == {0, 1, 2, 3, 5}


@settings(max_examples=40, deadline=None)
@given(histories_of_distinct_items(), st.integers(0, 1000))
def test_windows_agree_with_whole_histories(histories: tuple[list[list[int]], int], seed: int) -> None:
    rows, num_items = histories
    rows = [row for row in rows if len(row) > 1] or [[0, 1]]
    model = ByLastItem(num_items, seed)
    whole = {"items": padded(rows, num_items), "value": torch.ones(len(rows), num_items)}
    expected = roll_out(model, whole, seeded(seed))["items"].tolist()
    window = roll_out_window(
        model,
        {
            "history": padded([row[:-1] for row in rows], num_items - 1),
            "target": torch.tensor([row[-1] for row in rows]),
            "value": torch.full((len(rows),), 4.0),
            "future": torch.zeros(len(rows), 3, dtype=torch.int64),
            "future_value": torch.ones(len(rows), 3),
        },
        seeded(seed),
    )
    for number, row in enumerate(rows):
        history, target = expected[number][: len(row) - 1], expected[number][len(row) - 1]
        assert window["history"][number].tolist() == history + [-1] * (num_items - len(row))
        assert window["target"][number] == target
    assert window["history"].shape == (len(rows), num_items - 1)
    # Nobody took the target, and nobody knows what would have followed it.
    assert torch.equal(window["value"], torch.zeros(len(rows)))
    assert torch.equal(window["future"], torch.full((len(rows), 3), -1))
    assert torch.equal(window["future_value"], torch.zeros(len(rows), 3))


def batch_of(run: GFlowGRTrainer, size: int = 16) -> dict[str, Tensor]:
    rows = run.train_dataset
    assert isinstance(rows, (Examples, Histories))
    return {name: column[:size].to(run.args.device) for name, column in rows.tensors().items()}


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("whole", [True, False], ids=["histories", "windows"])
def test_a_steps_share_of_rows_is_rolled_out_and_the_others_are_as_they_were(
    tmp_path: Path, whole: bool, share: float
) -> None:
    run = fixtures.trainer(tmp_path, histories=whole, rollout_share=share)
    inputs = batch_of(run)
    rolled = run._partly_rolled_out(inputs)
    worth = rolled["value"].view(16, -1)
    # The log's own values are 1 and 4; behind a history's end there are zeros anyway.
    known = inputs["value"].view(16, -1) > 0
    chosen = ((worth == 0) & known).any(1)
    assert int(chosen.sum()) == round(16 * share)
    assert rolled.keys() == inputs.keys()
    assert all(torch.equal(rolled[name][~chosen], inputs[name][~chosen]) for name in inputs)
    assert torch.equal(rolled["index"], inputs["index"])
    if not whole:
        assert bool((rolled["future"][chosen] == -1).all())


@settings(max_examples=60, deadline=None)
@given(histories_of_distinct_items(), st.integers(0, 2), st.data())
def test_the_oldest_items_make_room(
    histories: tuple[list[list[int]], int], spare: int, data: st.DataObject
) -> None:
    rows, num_items = histories
    width = num_items + spare
    items = padded(rows, width)
    value = torch.where(items >= 0, 1.0 + torch.arange(width), 0.0)
    beyond = data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows)))
    found = make_room({"items": items, "value": value}, torch.tensor(beyond))
    for number, row in enumerate(rows):
        gone = min(max(0, len(row) + beyond[number] - width), max(0, len(row) - 2))
        assert found["items"][number].tolist() == row[gone:] + [-1] * (width - len(row) + gone)
        left = len(row) - gone
        assert found["value"][number].tolist() == [1.0 + gone + n for n in range(left)] + [0.0] * (
            width - left
        )


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("candidates", [0, 7])
def test_rollouts_drawn_anew_go_beyond_every_users_last_item(
    tmp_path: Path, candidates: int, share: float
) -> None:
    run = fixtures.trainer(
        tmp_path, histories=True, rollout_share=share, rollout_beyond=2, reward_candidates=candidates
    )
    run.policy.train()
    inputs = batch_of(run)
    short = (inputs["items"][:, 6] < 0) & (inputs["items"] >= 0).any(1)
    inputs = {name: column[short] for name, column in inputs.items()}
    shorter = inputs | {name: inputs[name][:, :6] for name in ("items", "value")}
    length = (shorter["items"] >= 0).sum(1)
    assert len(length.unique()) > 2 and length.max() == 6
    rolled = run._partly_rolled_out(shorter)
    assert rolled["items"].shape[1] == 7, "the rows of the data set are that long"
    assert torch.equal((rolled["items"] >= 0).sum(1), (length + 2).clamp(max=7))
    full = length == 6
    # The first item makes room.
    real = shorter["items"].clone()
    real[full, :5] = shorter["items"][full, 1:]
    real[full, 5] = -1
    same = ((rolled["items"][:, :6] == real) | (real < 0)).all(1)
    worth = (rolled["value"] > 0).sum(1)
    whole = worth == (real >= 0).sum(1)
    assert int((~whole).sum()) <= round(share * len(length))
    assert bool(same[whole].all())
    assert share == 0 or not bool(whole.all())
    assert torch.isfinite(run.compute_loss(run.model, shorter))


def test_a_row_that_the_users_next_one_goes_on_with_is_not_gone_beyond(tmp_path: Path) -> None:
    items = padded([[0, 1, 2], [2, 3, 4, 5], [6, 7]], 6)
    rows = Histories(torch.arange(3), torch.tensor([0, 0, 1]), items, (items >= 0).float())
    assert rows.further(2).tolist() == [0, 2, 2]
    assert rows.contexts(2) == (2 + 5 + 3) / 3
    for reuse in (0, 1):
        run = fixtures.trainer(tmp_path, histories=True, rollout_beyond=2, rollout_reuse=reuse)
        run.train_dataset = rows
        run.policy.train()
        contexts, _ = run._contexts(batch_of(run, 3))
        found = contexts.items.cpu()
        assert (found >= 0).sum(1).tolist() == [3, 6, 4]
        assert torch.equal(found[:, :4][items[:, :4] >= 0], items[items >= 0])


@pytest.mark.parametrize("whole", [True, False], ids=["histories", "windows"])
def test_rollouts_are_a_function_of_seed_and_step(tmp_path: Path, whole: bool) -> None:
    def items(seed: int, step: int, random_state: int) -> list[list[int]]:
        run = fixtures.trainer(tmp_path, histories=whole, rollout_share=0.5, seed=seed)
        run.state.global_step = step
        inputs = batch_of(run)
        torch.manual_seed(random_state)
        run.policy.train()
        first, _ = run._contexts(inputs)
        again, _ = run._contexts(inputs)
        assert torch.equal(first.trajectories, again.trajectories)
        return first.trajectories.tolist()

    drawn = items(5, 3, random_state=0)
    assert items(5, 3, random_state=1) == drawn
    assert items(5, 4, random_state=0) != drawn
    assert items(6, 3, random_state=0) != drawn


def test_evaluation_rolls_nothing_out(tmp_path: Path) -> None:
    run = fixtures.trainer(tmp_path, rollout_share=1.0)
    inputs = batch_of(run)
    run.policy.eval()
    contexts, _ = run._contexts(inputs)
    assert torch.equal(contexts.trajectories[:, 0], inputs["target"])
    run.policy.train()
    contexts, _ = run._contexts(inputs)
    assert not torch.equal(contexts.trajectories[:, 0], inputs["target"])


@pytest.mark.parametrize("reuse", [0, 1], ids=["anew", "pool"])
@pytest.mark.parametrize("whole", [True, False], ids=["histories", "windows"])
def test_an_interrupted_run_goes_on_with_the_same_rollouts(tmp_path: Path, whole: bool, reuse: int) -> None:
    options = {"histories": whole, "rollout_share": 0.5, "save_strategy": "steps", "save_steps": 3}
    options |= {"rollout_reuse": reuse, "reward_candidates": 5 * reuse}
    options |= {"rollout_beyond": 1, "rollout_epsilon": 0.3}
    through = fixtures.trainer(tmp_path / "through", max_steps=6, **options)
    through.train()
    resumed = fixtures.trainer(tmp_path / "through", max_steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-3"))
    assert len(fixtures.losses(through)) == 6
    assert fixtures.losses(resumed) == pytest.approx(fixtures.losses(through), rel=1e-5)
    without = fixtures.trainer(tmp_path / "without", max_steps=6, histories=whole)
    without.train()
    assert fixtures.losses(without) != pytest.approx(fixtures.losses(through), rel=1e-2)


def test_rollouts_need_a_recommender(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"collaborative is None, needs a recommender for rollout_share=0\.5"
    ):
        fixtures.trainer(tmp_path, objective="sft", rollout_share=0.5)


@pytest.mark.parametrize("name", ["rollout_share", "rollout_epsilon"])
@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_0_and_1(tmp_path: Path, share: float, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .*, needs a number from 0 to 1"):
        fixtures.config(tmp_path, **{name: share})


def test_a_plan_fits_the_recommender_of_rollouts_for_whatever_objective() -> None:
    sections = {"collaborative": {"model": "popularity"}}
    training = {"objective": "sft", "use_cpu": True}
    assert Plan.of({**sections, "training": training}).collaborative is None
    plan = Plan.of({**sections, "training": {**training, "rollout_share": 0.25}})
    assert plan.reward is None and plan.sampler is None
    data, _ = fixtures.world()
    assert isinstance(plan.build_collaborative(data, seed=0), Popularity)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(1, 12), st.integers(0, 3), st.integers(0, 1000))
def test_the_best_items_are_the_highest_scores_and_those_wanted(
    rows: int, num_items: int, count: int, later: int, seed: int
) -> None:
    count = max(count, 1 + later)
    scores = torch.randn(rows, num_items, generator=seeded(seed))
    kept = scores.clone()
    wanted = torch.randint(-1, num_items, (rows, 1 + later), generator=seeded(seed + 1))
    wanted[:, 0].clamp_(min=0)
    items, values = best_items(scores, wanted, count)
    assert torch.equal(values, scores.gather(1, items)) and torch.equal(scores, kept)
    for row in range(rows):
        expected = set(wanted[row].tolist()) - {-1}
        for item in scores[row].argsort(descending=True).tolist():
            if len(expected) < min(count, num_items):
                expected.add(item)
        assert set(items[row].tolist()) == expected and len(expected) == items.shape[1]


def histories_of(rows: list[list[int]], width: int, user: list[int] | None = None) -> Histories:
    items = padded(rows, width)
    value = torch.where(items >= 0, 1.0 + torch.arange(width), 0.0)
    index = torch.arange(len(rows))
    return Histories(index, index if user is None else torch.tensor(user), items, value)


@settings(max_examples=60, deadline=None)
@given(
    histories_of_distinct_items(),
    st.integers(0, 1000),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5]),
    st.data(),
)
def test_a_pool_holds_rollouts_and_what_the_model_says_of_each_context(
    histories: tuple[list[list[int]], int],
    seed: int,
    copies: int,
    kept: int,
    later: int,
    beyond: int,
    share: float,
    epsilon: float,
    data: st.DataObject,
) -> None:
    later = min(later, max(0, kept - 1))
    rows, num_items = histories
    model = ByLastItem(num_items, seed)
    user = sorted(data.draw(st.lists(st.integers(0, 4), min_size=len(rows), max_size=len(rows))))
    given_rows = histories_of(rows, num_items, user)
    pool = RolloutPool(
        model,
        given_rows,
        copies=copies,
        share=share,
        candidates=kept,
        temperature=0.7,
        generator=seeded(seed),
        later=later,
        beyond=beyond,
        epsilon=epsilon,
    )
    index = torch.arange(len(rows)).flip(0)
    further = torch.tensor([beyond * (user[row] not in user[row + 1 :]) for row in index.tolist()])
    whole = {"items": given_rows.items[index], "value": given_rows.value[index]}
    original, worth = make_room(whole, further).values()
    before = (original >= 0).sum(1)
    length = (before + further).clamp(max=num_items)
    times_whole = torch.zeros(len(rows))
    for number in range(copies):
        copy = torch.full_like(index, number)
        found = pool.histories(index, copy, num_items)
        drawn = (found["value"] == 0) & (found["items"] >= 0)
        assert torch.equal(found["items"][~drawn], original[~drawn])
        assert torch.equal(found["value"][~drawn], worth[~drawn])
        assert torch.equal((found["items"] >= 0).sum(1), length)
        times_whole += drawn.sum(1) == length - before
        if share == 1:
            assert torch.equal(drawn.any(1), (before > 1) | (length > before))
        known = pool.candidates(index, copy)
        if kept == 0:
            assert known is None
            continue
        place = (found["items"][:, 1:] >= 0).nonzero().tolist()
        assert known is not None and len(known[0]) == len(place)
        for (row, at), items, scores in zip(place, *known, strict=True):
            past, target = found["items"][row, : at + 1], found["items"][row, at + 1]
            # Later items of the history itself; what was drawn is no user's, and may be none of the best.
            drawn_here = found["value"][row, at + 1] == 0
            assert target in items or (drawn_here and epsilon > 0)
            best = model.scores(past[None]).topk(min(kept, num_items)).indices[0, :1]
            ahead = best if drawn_here else original[row, at + 1 : at + 2 + later]
            expected = best_items(model.scores(past[None]), ahead[None], kept)
            assert torch.equal(torch.sort(items).values, torch.sort(expected[0][0]).values)
            assert torch.equal(scores, model.table[past[-1]][items])
    # Of two copies one keeps all, of three one or two do, and some that begin later keep all by chance.
    assert bool((times_whole >= copies - math.ceil(copies * share)).all())


@pytest.mark.parametrize("among", [2, 3, 9])
def test_draws_among_the_best_follow_their_softmax(among: int) -> None:
    model, count = ByLastItem(5, seed=3), 20_000
    noted: list[tuple[int, list[list[int]], Tensor]] = []
    rolled = roll_out(
        model,
        {"items": torch.tensor([[2, 0]]).expand(count, -1), "value": torch.ones(count, 2)},
        seeded(4),
        0.5,
        among,
        lambda rows, position, items, scores: noted.append((position, items.tolist(), scores)),
    )
    best = model.table[2].topk(min(among, 5)).indices
    [(position, items, scores)] = noted
    assert position == 1 and items == [best.tolist()] * count
    assert torch.equal(scores, model.table[2][best].expand(count, -1))
    unseen = [item for item in best.tolist() if item != 2]
    weights = (2 * model.table[2][unseen].double()).softmax(0).tolist()
    drawn = Counter(rolled["items"][:, 1].tolist())
    assert_follows(drawn, dict(zip(unseen, weights, strict=True)))


@pytest.mark.parametrize("reuse", [0, 2], ids=["anew", "pool"])
def test_a_step_has_the_share_of_rollouts_and_of_random_items(tmp_path: Path, reuse: int) -> None:
    run = fixtures.trainer(
        tmp_path,
        histories=True,
        rollout_share=0.5,
        rollout_reuse=reuse,
        rollout_beyond=1,
        rollout_epsilon=0.4,
        reward_candidates=3,
    )
    # Its choice is known: the eleventh item on, which no history here has.
    run.collaborative = ByLastItem(fixtures.NUM_ITEMS)
    run.collaborative.table = 100 * torch.eye(fixtures.NUM_ITEMS).roll(11, 1)
    run.policy.train()
    run.state.max_steps = 240
    inputs = {name: column[:40] for name, column in run.train_dataset.tensors().items()}
    length = (inputs["items"] >= 0).sum(1)
    room = length < inputs["items"].shape[1]
    earlier, chosen = [], []
    for run.state.global_step in range(60):
        rolled = (run._from_pool(inputs)[0] if reuse else run._partly_rolled_out(inputs))["items"][room]
        real, end = inputs["items"][room], length[room, None]
        keeps = ((rolled == real) | (real < 0)).all(1)
        earlier.append(~keeps)
        before, drawn = rolled.gather(1, end - 1)[keeps, 0], rolled.gather(1, end)[keeps, 0]
        chosen.append(drawn == (before + 11) % fixtures.NUM_ITEMS)
    # One in three to six of those that begin at a random item keeps all of them by chance.
    assert 0.3 < torch.cat(earlier).float().mean() < 0.45
    # A random item may be the choice as well, or one of the history, in whose place the choice stays.
    assert 0.6 < torch.cat(chosen).float().mean() < 0.72


def test_a_run_draws_the_rollouts_that_it_will_use(tmp_path: Path) -> None:
    run = fixtures.trainer(tmp_path, histories=True, rollout_share=0.5, rollout_reuse=2, max_steps=10)
    run.train()
    assert len(run.train_dataset) == 40
    # Afterwards its file is gone.
    assert run._pool is None
    # An epoch has 3 steps.
    for reuse, steps, accumulation, copies in ((1, 30, 1, 10), (2, 24, 1, 4), (1, 6, 4, 8), (100, 3, 1, 2)):
        run = fixtures.trainer(
            tmp_path,
            histories=True,
            rollout_share=0.5,
            rollout_reuse=reuse,
            gradient_accumulation_steps=accumulation,
        )
        run.state.max_steps = steps
        assert run._filled_pool().copies == copies


def test_a_pool_draws_as_roll_out_does() -> None:
    model, count = ByLastItem(5), 4000
    rows = [[2, 0, 4]] * count
    pool = RolloutPool(
        model, histories_of(rows, 3), copies=5, share=0.6, candidates=0, temperature=1.0, generator=seeded(1)
    )
    index = torch.arange(count).repeat(5)
    found = pool.histories(index, torch.arange(5).repeat_interleave(count), 3)
    drawn = (found["value"] == 0).sum(1)
    assert_follows(Counter(zip(drawn.tolist(), strict=True)), {(0,): 0.4, (1,): 0.3, (2,): 0.3})
    one = Counter(zip(found["items"][drawn == 1, 2].tolist(), strict=True))
    assert_follows(one, {(item,): model.probability(item, [2, 0]) for item in (1, 3, 4)})


def test_shared_prefixes_fill_a_pool_alike() -> None:
    data, _ = fixtures.world()
    model = SASRec.fit(data.sequences, fixtures.NUM_ITEMS, hidden_size=8, epochs=1, progress=False)
    plain, shared = (
        RolloutPool(
            scorer,
            data.histories,
            copies=3,
            share=0.5,
            candidates=6,
            temperature=1.0,
            generator=seeded(0),
            beyond=1,
        )
        for scorer in (model, SharedPrefixes(model))
    )
    index = torch.arange(len(data.histories)).repeat(3)
    copy = torch.arange(3).repeat_interleave(len(data.histories))
    width = data.histories.items.shape[1]
    one, other = plain.histories(index, copy, width), shared.histories(index, copy, width)
    assert torch.equal(one["items"], other["items"])
    torch.testing.assert_close(plain.candidates(index, copy)[1], shared.candidates(index, copy)[1])


@pytest.mark.parametrize("beyond", [0, 2])
def test_a_step_with_a_pool_is_that_of_its_histories_on_the_catalogue(tmp_path: Path, beyond: int) -> None:
    """With all items as candidates and the pool's rollouts as the batch, both ways have one loss."""
    options = {"histories": True, "fusion": "mixture"}
    pooled = fixtures.trainer(
        tmp_path,
        rollout_share=0.5,
        rollout_reuse=3,
        rollout_beyond=beyond,
        reward_candidates=fixtures.NUM_ITEMS,
        **options,
    )
    dense = fixtures.trainer(tmp_path, **options)
    dense.policy.load_state_dict(pooled.policy.state_dict())
    inputs = batch_of(pooled)
    # A recommender to whom contexts are not alike, so that a place that was mistaken would show.
    pooled.collaborative = dense.collaborative = ByLastItem(fixtures.NUM_ITEMS)
    pooled.state.max_steps = 18
    pooled.policy.train()
    contexts, _ = pooled._contexts(inputs)
    length = ((inputs["items"] >= 0).sum(1) + beyond).clamp(max=inputs["items"].shape[1])
    assert torch.equal((contexts.items >= 0).sum(1), length)
    found = pooled.compute_loss(pooled.model, inputs)
    rolled, known = pooled._from_pool(inputs)
    assert known is not None and known[0].shape[1] == fixtures.NUM_ITEMS
    assert torch.equal(rolled["items"], contexts.items)
    torch.testing.assert_close(found, dense.compute_loss(dense.model, rolled), rtol=1e-5, atol=1e-5)


def test_a_pool_knows_histories_by_their_index(tmp_path: Path) -> None:
    options = {"histories": True, "rollout_share": 0.5, "rollout_reuse": 1, "reward_candidates": 7}
    run = fixtures.trainer(tmp_path, **options)
    run.collaborative = ByLastItem(fixtures.NUM_ITEMS)
    order = torch.randperm(40, generator=seeded(5))[:20]
    run.train_dataset = run.train_dataset.select(order)
    run.policy.train()
    inputs = batch_of(run)
    rolled, known = run._from_pool(inputs)
    assert known is not None
    kept = rolled["value"] > 0
    assert torch.equal(rolled["items"][kept], inputs["items"][kept])
    place = (rolled["items"][:, 1:] >= 0).nonzero().tolist()
    assert len(place) == len(known[0])
    for (row, before), items, scores in zip(place, *known, strict=True):
        expected = run.collaborative.table[rolled["items"][row, before]]
        assert torch.equal(scores, expected[items])
        assert rolled["items"][row, before + 1] in items
    for rows, match in (([0, 0], "rows of one index"), ([], "has no rows")):
        some = run.train_dataset.select(torch.tensor(rows, dtype=torch.long))
        with pytest.raises(ValueError, match=match):
            RolloutPool(
                run.collaborative,
                some,
                copies=1,
                share=1.0,
                candidates=0,
                temperature=1.0,
                generator=seeded(0),
            )


def test_a_pool_that_has_no_room_says_what_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = rollouts.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(rollouts.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="larger rollout_reuse or fewer reward_candidates"):
        RolloutPool(
            ByLastItem(5),
            histories_of([[1, 2, 3]], 3),
            copies=1,
            share=1.0,
            candidates=2,
            temperature=1.0,
            generator=seeded(0),
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"rollout_share": 0.0},
        {"objective": "tb", "num_trajectories": 4},
        {"objective": "sft", "rollout_share": 0.0, "rollout_beyond": 0},
        {"rollout_share": 0.0, "reward_candidates": 4},
        {"reward_candidates": 4},
        {"num_trajectories": 4},
        {"max_steps": 3},
        {"rollout_reuse": 0},
        {"rollout_beyond": 0},
        {"rollout_epsilon": 0.0},
        {"reward_candidates": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("whole", [True, False], ids=["histories", "windows"])
def test_any_setting_of_the_recipe_can_be_changed_alone(
    tmp_path: Path, whole: bool, changes: dict[str, Any]
) -> None:
    training = {
        name: value for name, value in GFLOWGR["training"].items() if name in OURS or "rollout" in name
    } | changes
    run = fixtures.trainer(
        tmp_path, histories=whole and "num_trajectories" not in changes, **{"max_steps": 2, **training}
    )
    run.train()
    assert len(fixtures.losses(run)) == run.state.max_steps
    figures = [value for entry in run.state.log_history for value in entry.values()]
    assert all(map(math.isfinite, figures)), run.state.log_history


def test_candidates_without_a_pool_are_chosen_in_every_step(tmp_path: Path) -> None:
    for whole in (True, False):
        run = fixtures.trainer(tmp_path, histories=whole, reward_candidates=fixtures.NUM_ITEMS)
        dense = fixtures.trainer(tmp_path, histories=whole)
        dense.policy.load_state_dict(run.policy.state_dict())
        inputs = batch_of(run)
        a, b = run.compute_loss(run.model, inputs), dense.compute_loss(dense.model, inputs)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        contexts, _ = fixtures.trainer(tmp_path, histories=whole, reward_candidates=4)._contexts(inputs)
        assert contexts.rewards is not None and contexts.rewards.candidates.shape[1] == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollout_reuse": -1}, "rollout_reuse is -1, needs 0 or more"),
        ({"rollout_beyond": -1}, "rollout_beyond is -1, needs 0 or more"),
        ({"reward_candidates": -8}, "reward_candidates is -8, needs 0 or more"),
    ],
)
def test_settings_of_a_pool_that_cannot_be(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixtures.config(tmp_path, **settings)
