"""Reward terms and their fusion against loops over items, and what happens to terms that misbehave."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.rewards import (
    CollaborativeReward,
    InteractionReward,
    RewardContext,
    RewardModel,
    SimilarityReward,
    UniformReward,
)


def random_context(seed: int, rows: int = 5, num_items: int = 9, future: int = 3) -> RewardContext:
    generator = torch.Generator().manual_seed(seed)

    def items(low: int, *shape: int) -> Tensor:
        return torch.randint(low, num_items, shape, generator=generator)

    return RewardContext(
        history=items(-1, rows, 4),
        target=items(0, rows),
        value=torch.rand(rows, generator=generator) * 5,
        future=items(-1, rows, future),
        future_value=torch.rand(rows, future, generator=generator) * 5,
        scores=torch.randn(rows, num_items, generator=generator),
    )


def random_codes(seed: int, num_items: int = 9, levels: int = 3) -> Tensor:
    return torch.randint(0, 3, (num_items, levels), generator=torch.Generator().manual_seed(seed))


def catalogue_items(rows: int, num_items: int) -> Tensor:
    return torch.arange(num_items).expand(rows, -1)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), future_scale=st.sampled_from([0.0, 0.5, 2.0]))
def test_interaction_pays_the_target_its_value_and_later_items_a_share(
    seed: int, future_scale: float
) -> None:
    context = random_context(seed)
    term = InteractionReward(future_scale=future_scale)
    expected = torch.zeros(5, 9)
    for row in range(5):
        for column in (2, 1, 0):
            item = int(context.future[row, column])
            if item >= 0:
                expected[row, item] = future_scale * context.future_value[row, column]
        expected[row, context.target[row]] = context.value[row]
    torch.testing.assert_close(term(context, catalogue_items(5, 9)), expected)
    torch.testing.assert_close(term.catalogue(context, 9), expected)
    some = torch.tensor([[3, 0], [8, 8], [1, 2], [5, 4], [0, 7]])
    torch.testing.assert_close(term(context, some), expected.gather(1, some))


def test_interaction_maps_logged_behaviours_to_rewards() -> None:
    term = InteractionReward({2.0: 10.0, 1.0: 1.0, 0.0: 0.0}, future_scale=0.1)
    context = RewardContext(
        history=torch.full((2, 1), -1),
        target=torch.tensor([0, 1]),
        value=torch.tensor([2.0, 1.0]),
        future=torch.tensor([[2, -1], [-1, -1]]),
        # The padding's value is in no mapping and must not be looked up.
        future_value=torch.tensor([[2.0, 99.0], [99.0, 99.0]]),
    )
    expected = torch.tensor([[10.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(term.catalogue(context, 3), expected)
    torch.testing.assert_close(term(context, catalogue_items(2, 3)), expected)
    unknown = RewardContext(context.history, context.target, torch.tensor([2.0, 3.0]))
    with pytest.raises(
        ValueError, match=r"value: got 3.0, which the mapping lacks; it has \[0.0, 1.0, 2.0\]"
    ):
        term.catalogue(unknown, 3)


@pytest.mark.parametrize(
    ("mapping", "of_nothing"), [({1.0: 1.0, 4.0: 10.0}, 0.0), ({0.0: 3.0, 4.0: 10.0}, 3.0)]
)
def test_what_nobody_took_is_worth_nothing_unless_the_mapping_says_otherwise(
    mapping: dict[float, float], of_nothing: float
) -> None:
    context = RewardContext(
        history=torch.tensor([[1], [2], [3]]),
        target=torch.tensor([0, 1, 2]),
        value=torch.tensor([0.0, 4.0, 0.0]),
        future=torch.tensor([[3], [3], [-1]]),
        future_value=torch.tensor([[4.0], [0.0], [0.0]]),
    )
    term = InteractionReward(mapping, future_scale=0.5)
    expected = torch.zeros(3, 5)
    expected[0, 0] = expected[2, 2] = of_nothing
    expected[1, 1], expected[0, 3], expected[1, 3] = 10.0, 5.0, 0.5 * of_nothing
    assert torch.equal(term(context, catalogue_items(3, 5)), expected)
    assert torch.equal(term.catalogue(context, 5), expected)


@pytest.mark.parametrize("value", [0.5, -0.0001, 2.0, 9.0])
def test_other_values_than_0_have_to_be_in_the_mapping(value: float) -> None:
    context = RewardContext(
        history=torch.tensor([[1], [1]]), target=torch.tensor([0, 2]), value=torch.tensor([0.0, value])
    )
    with pytest.raises(ValueError, match=r"value: got .*, which the mapping lacks; it has \[1\.0, 4\.0\]"):
        InteractionReward({4.0: 10.0, 1.0: 1.0}).catalogue(context, 3)


def test_a_target_of_value_0_leaves_the_mass_to_the_other_terms() -> None:
    context = random_context(3)
    context = dataclasses.replace(context, value=torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    model = RewardModel(
        {"collaborative": CollaborativeReward(), "interaction": InteractionReward({1.0: 2.0})},
        num_items=9,
        floor=1e-12,
    )
    reward = model(context).log_rewards.double().exp()
    assert context.scores is not None
    expected = context.scores.double().softmax(1)
    taken = context.value > 0
    expected[taken] = 0.8 * expected[taken]
    expected[taken, context.target[taken]] += 0.2
    torch.testing.assert_close(reward, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_uniform_term_beside_the_observed_item_is_label_smoothing(share: float) -> None:
    context = random_context(4)
    model = RewardModel(
        {"interaction": InteractionReward(), "uniform": UniformReward()},
        num_items=9,
        weights={"interaction": 1 - share, "uniform": share},
        floor=1e-12,
    )
    rewards = model(context)
    policy = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    smoothed = torch.nn.functional.cross_entropy(policy, context.target, label_smoothing=share)
    expected = -(rewards.log_rewards.double().exp() * policy.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(smoothed, expected, rtol=1e-5, atol=0)
    assert torch.equal(rewards.terms["uniform"], torch.ones(5, 9))


@pytest.mark.parametrize("columns", [1, 4, 9])
def test_a_uniform_term_knows_neither_context_nor_item(columns: int) -> None:
    items = torch.randint(0, 9, (5, columns), generator=torch.Generator().manual_seed(1))
    assert torch.equal(UniformReward()(random_context(0), items), torch.ones(5, columns))
    alone = RewardModel({"uniform": UniformReward()}, num_items=9)
    log_rewards = alone(random_context(0)).log_rewards
    torch.testing.assert_close(log_rewards, torch.full((5, 9), -math.log(9)), rtol=1e-5, atol=0)


def test_later_items_earn_nothing_unless_asked_to() -> None:
    context = random_context(10)
    reward = InteractionReward().catalogue(context, 9)
    assert torch.equal(reward.sum(1), context.value)
    assert torch.equal(reward.gather(1, context.target[:, None])[:, 0], context.value)
    assert torch.equal(InteractionReward()(context, catalogue_items(5, 9)), reward)


def test_interaction_without_later_items_pays_the_target_alone() -> None:
    context = RewardContext(torch.full((1, 2), -1), torch.tensor([1]), torch.tensor([4.0]))
    assert InteractionReward().catalogue(context, 3).tolist() == [[0.0, 4.0, 0.0]]


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(1, 5), ragged=st.booleans())
def test_similarity_counts_equal_positions(seed: int, levels: int, ragged: bool) -> None:
    codes = random_codes(seed, levels=levels)
    if ragged:
        codes[::2, levels // 2 :] = -1
    context = random_context(seed)
    term = SimilarityReward(codes)
    expected = torch.zeros(5, 9)
    for row in range(5):
        for item in range(9):
            for level in range(levels):
                wanted = codes[context.target[row], level]
                expected[row, item] += float(wanted >= 0 and wanted == codes[item, level])
    assert torch.equal(term.catalogue(context, 9), expected)
    assert torch.equal(term(context, catalogue_items(5, 9)), expected)
    some = torch.tensor([[3, 0], [8, 8], [1, 2], [5, 4], [0, 7]])
    assert torch.equal(term(context, some), expected.gather(1, some))
    if not ragged:
        assert (expected.gather(1, context.target[:, None]) == levels).all()


def test_similarity_of_wide_codes_is_not_narrowed() -> None:
    codes = torch.tensor([[5, 70_000], [5 + 65_536, 70_000 + 256]])
    context = RewardContext(torch.full((1, 1), -1), torch.tensor([0]), torch.tensor([1.0]))
    assert SimilarityReward(codes).catalogue(context, 2).tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_collaborative_normalisations(temperature: float) -> None:
    context = random_context(1)
    scores = context.scores
    items = torch.tensor([[3, 0], [8, 8], [1, 2], [5, 4], [0, 7]])
    for name, expected in (
        ("softmax", (scores / temperature).exp() / (scores / temperature).exp().sum(1, keepdim=True)),
        (
            "standardised",
            1
            / (
                1
                + (
                    -(scores - scores.mean(1, keepdim=True))
                    / scores.std(1, keepdim=True, correction=0)
                    / temperature
                ).exp()
            ),
        ),
        (
            "unit",
            (scores - scores.amin(1, keepdim=True))
            / (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True)),
        ),
    ):
        term = CollaborativeReward(name, temperature=temperature)
        torch.testing.assert_close(term.catalogue(context, 9), expected)
        torch.testing.assert_close(term(context, items), expected.gather(1, items))


@pytest.mark.parametrize("normalisation", ["softmax", "standardised", "unit"])
def test_collaborative_with_barred_items_equals_the_rest_alone(normalisation: str) -> None:
    context = random_context(2)
    barred = context.scores.clone()
    barred[:, [0, 4]] = -torch.inf
    rest = [1, 2, 3, 5, 6, 7, 8]
    term = CollaborativeReward(normalisation)
    reward = term.catalogue(RewardContext(context.history, context.target, context.value, scores=barred), 9)
    alone = RewardContext(context.history, context.target, context.value, scores=context.scores[:, rest])
    assert (reward[:, [0, 4]] == 0).all()
    torch.testing.assert_close(reward[:, rest], term.catalogue(alone, 7))


@pytest.mark.parametrize(
    ("normalisation", "value"), [("softmax", 0.25), ("standardised", 0.5), ("unit", 1.0)]
)
def test_equal_scores_are_no_opinion(normalisation: str, value: float) -> None:
    context = RewardContext(
        torch.full((1, 1), -1), torch.tensor([0]), torch.tensor([1.0]), scores=torch.full((1, 4), 7.0)
    )
    reward = CollaborativeReward(normalisation).catalogue(context, 4)
    torch.testing.assert_close(reward, torch.full((1, 4), value))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (None, r"scores: got None, the collaborative reward needs \(B, N\)"),
        (torch.tensor([[0.0, torch.nan]]), "scores: got NaN"),
        (torch.tensor([[0.0, torch.inf]]), r"scores: got NaN or \+inf"),
        (torch.full((1, 2), -torch.inf), "scores: got a row of -inf alone"),
    ],
)
def test_collaborative_refuses_scores_without_meaning(scores: Tensor | None, message: str) -> None:
    context = RewardContext(torch.full((1, 1), -1), torch.tensor([0]), torch.tensor([1.0]), scores=scores)
    with pytest.raises(ValueError, match=message):
        CollaborativeReward().catalogue(context, 2)


def all_terms(codes: Tensor) -> dict:
    return {
        "interaction": InteractionReward(),
        "collaborative": CollaborativeReward(),
        "similarity": SimilarityReward(codes),
    }


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), weights=st.lists(st.floats(0.05, 1), min_size=3, max_size=3))
def test_a_mixture_gives_each_term_the_mass_of_its_weight(seed: int, weights: list[float]) -> None:
    context = random_context(seed)
    terms = all_terms(random_codes(seed))
    named = dict(zip(terms, weights, strict=True))
    rewards = RewardModel(terms, num_items=9, weights=named, floor=1e-30)(context)
    expected = torch.zeros(5, 9, dtype=torch.float64)
    for name, weight in named.items():
        raw = terms[name](context, catalogue_items(5, 9)).double()
        torch.testing.assert_close(rewards.terms[name], raw.float())
        expected += weight / sum(weights) * raw / raw.sum(1, keepdim=True)
    assert rewards.log_rewards.dtype == torch.float32
    torch.testing.assert_close(rewards.log_rewards.exp(), expected.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rewards.log_rewards.exp().sum(1), torch.ones(5))


def test_a_terms_unit_does_not_matter_in_a_mixture() -> None:
    context = random_context(3)
    plain = RewardModel({"a": CollaborativeReward("unit"), "b": InteractionReward()}, num_items=9)
    scaled = RewardModel(
        {"a": lambda c, i: 1e4 * CollaborativeReward("unit")(c, i), "b": InteractionReward()}, num_items=9
    )
    torch.testing.assert_close(plain(context).log_rewards, scaled(context).log_rewards)


def test_a_term_that_says_nothing_leaves_its_share_to_the_others() -> None:
    context = random_context(4)
    silent = {"none": lambda c, i: torch.zeros(i.shape)}
    with_silent = RewardModel(
        {"collaborative": CollaborativeReward(), "interaction": InteractionReward(), **silent},
        num_items=9,
        weights={"collaborative": 0.4, "interaction": 0.1, "none": 0.5},
    )(context)
    default = RewardModel(
        {"interaction": InteractionReward(), "collaborative": CollaborativeReward()}, num_items=9
    )(context)
    torch.testing.assert_close(with_silent.log_rewards, default.log_rewards)
    nothing = RewardModel(silent, num_items=9, floor=1e-3)(context)
    torch.testing.assert_close(nothing.log_rewards, torch.full((5, 9), math.log(1e-3)))


def test_default_weights_are_for_the_default_terms_and_equal_otherwise() -> None:
    pair = {"interaction": InteractionReward(), "collaborative": CollaborativeReward()}
    assert RewardModel(pair, num_items=9).mixture_weights() == {"interaction": 0.2, "collaborative": 0.8}
    assert RewardModel(pair, num_items=9, fusion="sum").weights == {"interaction": 1.0, "collaborative": 1.0}
    three = RewardModel(all_terms(random_codes(0)), num_items=9).mixture_weights()
    assert three == pytest.approx(dict.fromkeys(three, 1 / 3))


def test_sum_is_the_papers_literal_form() -> None:
    context = random_context(5)
    terms = all_terms(random_codes(5))
    rewards = RewardModel(terms, num_items=9, fusion="sum", scale=2.0)(context)
    expected = sum(term(context, catalogue_items(5, 9)) for term in terms.values())
    torch.testing.assert_close(rewards.log_rewards, (2.0 * expected).log())
    doubled = RewardModel(
        terms,
        num_items=9,
        fusion="sum",
        weights={"interaction": 2, "collaborative": 0, "similarity": 0},
        floor=1e-9,
    )(context)
    expected = 2 * terms["interaction"](context, catalogue_items(5, 9))
    torch.testing.assert_close(doubled.log_rewards, expected.clamp(min=1e-9).log())


@pytest.mark.parametrize("fusion", ["mixture", "sum", "weights", "mlp"])
def test_rewards_of_items_are_those_of_the_catalogue(fusion: str) -> None:
    context = random_context(6)
    model = RewardModel(all_terms(random_codes(6)), num_items=9, fusion=fusion)
    items = torch.tensor([[3, 0], [8, 8], [1, 2], [5, 4], [0, 7]])
    whole, some = model(context), model(context, items)
    torch.testing.assert_close(some.log_rewards, whole.log_rewards.gather(1, items))
    for name in model.terms:
        torch.testing.assert_close(some.terms[name], whole.terms[name].gather(1, items))


def test_floor_and_scale() -> None:
    context = RewardContext(torch.full((1, 1), -1), torch.tensor([1]), torch.tensor([3.0]))
    model = RewardModel({"interaction": InteractionReward()}, num_items=3, floor=1e-4, scale=5.0)
    expected = torch.tensor([[5e-4, 5.0, 5e-4]]).log()
    torch.testing.assert_close(model(context).log_rewards, expected)


def test_learned_weights_start_as_given_and_keep_their_anchor_however_far_they_are_pushed() -> None:
    context = random_context(7)
    terms = all_terms(random_codes(7))
    given_weights = {"interaction": 0.2, "collaborative": 0.7, "similarity": 0.1}
    fixed = RewardModel(terms, num_items=9, weights=given_weights)(context).log_rewards
    model = RewardModel(terms, num_items=9, weights=given_weights, fusion="weights", anchor=0.25)
    torch.testing.assert_close(model(context).log_rewards, fixed)
    optimiser = torch.optim.Adam(model.parameters(), lr=1.0)
    for _ in range(50):
        optimiser.zero_grad()
        # A loss that would have the interaction term gone.
        model(context).log_rewards.gather(1, context.target[:, None]).sum().backward()
        optimiser.step()
    learned = model.mixture_weights()
    assert sum(learned.values()) == pytest.approx(1.0)
    assert learned["interaction"] == pytest.approx(0.25 * 0.2, abs=1e-3)
    torch.testing.assert_close(model(context).log_rewards.exp().sum(1), torch.ones(5))


@pytest.mark.parametrize("seed", range(5))
def test_the_mlp_is_a_distribution_that_keeps_the_order_of_the_terms_and_its_anchor(seed: int) -> None:
    torch.manual_seed(seed)
    context = random_context(seed)
    terms = all_terms(random_codes(seed))
    model = RewardModel(terms, num_items=9, fusion="mlp", anchor=0.5)
    free = RewardModel(terms, num_items=9, fusion="mlp", anchor=0.0)
    with torch.no_grad():
        for parameter in model.mlp.parameters():
            parameter.normal_(std=2.0)
    free.load_state_dict(model.state_dict())
    rewards, learned = model(context), free(context).log_rewards.exp()
    torch.testing.assert_close(learned.sum(1), torch.ones(5))
    mixture = RewardModel(terms, num_items=9)(context).log_rewards.exp()
    torch.testing.assert_close(rewards.log_rewards.exp(), 0.5 * mixture + 0.5 * learned)

    stacked = torch.stack(list(rewards.terms.values()))
    ahead = (stacked[:, :, :, None] > stacked[:, :, None, :]).any(0)
    ahead &= (stacked[:, :, :, None] >= stacked[:, :, None, :]).all(0)
    assert ahead.sum() > 30
    assert (learned[:, :, None] > learned[:, None, :])[ahead].all()

    rewards.log_rewards.gather(1, context.target[:, None]).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.mlp.parameters())


def test_parameters_and_state_are_those_of_the_fusion_alone() -> None:
    terms = all_terms(random_codes(0))
    assert list(RewardModel(terms, num_items=9).parameters()) == []
    assert RewardModel(terms, num_items=9).state_dict() == {}
    assert list(RewardModel(terms, num_items=9, fusion="weights").state_dict()) == ["weight_logits"]


def test_a_users_term_sees_the_context_and_the_items() -> None:
    context = random_context(9)

    def cheapness(seen: RewardContext, items: Tensor) -> Tensor:
        assert seen is context
        return 1.0 / (1.0 + items)

    rewards = RewardModel({"cheapness": cheapness}, num_items=9, fusion="sum")(context)
    torch.testing.assert_close(rewards.log_rewards, -torch.log1p(torch.arange(9.0)).expand(5, -1))


def spoiled(value: float) -> Tensor:
    values = torch.ones(5, 9)
    values[2, 3] = value
    return values


@pytest.mark.parametrize("fusion", ["mixture", "sum"])
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (spoiled(math.nan), "'bad' returned NaN in 1 of 45 places"),
        (spoiled(-0.5), "'bad' returned values from -0.5 to 1, need numbers of at least 0"),
        (spoiled(math.inf), "'bad' returned values from 1 to inf"),
        (torch.ones(5, 8), r"'bad' returned shape \(5, 8\), need \(5, 9\)"),
        (torch.ones(9), r"'bad' returned shape \(9,\), need \(5, 9\)"),
        (torch.ones(5, 9, dtype=torch.int64), "'bad' returned torch.int64, need a floating dtype"),
        ([1.0], "'bad' returned a list, need a tensor"),
    ],
)
def test_a_term_that_misbehaves_is_named(fusion: str, returned: object, message: str) -> None:
    model = RewardModel(
        {"good": lambda c, i: torch.ones(i.shape), "bad": lambda c, i: returned}, num_items=9, fusion=fusion
    )
    with pytest.raises(ValueError, match=message):
        model(random_context(0))


def test_half_precision_terms_are_welcome() -> None:
    model = RewardModel({"half": lambda c, i: torch.ones(i.shape, dtype=torch.float16)}, num_items=9)
    rewards = model(random_context(0))
    torch.testing.assert_close(rewards.log_rewards, torch.full((5, 9), -math.log(9)))


TERM = {"interaction": InteractionReward()}


@pytest.mark.parametrize(
    ("terms", "settings_", "message"),
    [
        ({}, {}, "terms: got none"),
        ({"a.b": InteractionReward()}, {}, "terms: got the name 'a.b'"),
        (TERM, {"fusion": "mixtrue"}, "fusion: got 'mixtrue'.*did you mean 'mixture'"),
        (TERM, {"weights": {"interacton": 1.0}}, "weights: got 'interacton'.*did you mean 'interaction'"),
        (TERM, {"weights": {}}, r"weights: got none for \['interaction'\]"),
        (
            TERM,
            {"weights": {"interaction": -1.0}},
            r"weights\['interaction'\]: got -1.0, need a number at least 0",
        ),
        (TERM, {"weights": {"interaction": 0.0}}, "weights: got 0 for every term"),
        (TERM, {"floor": 0.0}, "floor: got 0.0, need a number above 0"),
        (TERM, {"floor": "1e-8"}, "floor: got '1e-8', need a number above 0"),
        (TERM, {"scale": math.nan}, "scale: got nan"),
        (TERM, {"anchor": 1.5}, "anchor: got 1.5, need a number at least 0 and at most 1"),
        (TERM, {"num_items": 0}, "num_items: got 0"),
    ],
)
def test_settings_that_cannot_work_name_themselves(terms: dict, settings_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardModel(terms, **{"num_items": 9, **settings_})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InteractionReward({}), "mapping: got none"),
        (lambda: InteractionReward({"like": 1.0}), "mapping: got the logged value 'like', need a number"),
        (lambda: InteractionReward({1.0: -1.0}), r"mapping\[1.0\]: got -1.0, need a number at least 0"),
        (lambda: InteractionReward(future_scale=math.inf), "future_scale: got inf"),
        (lambda: CollaborativeReward(temperature=0), "temperature: got 0, need a number above 0"),
        (lambda: CollaborativeReward("sofmax"), "normalisation: got 'sofmax'.*did you mean 'softmax'"),
        (lambda: SimilarityReward(torch.ones(3)), r"codes: got torch.float32 of shape \(3,\), need integers"),
    ],
)
def test_terms_that_cannot_work_name_their_setting(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value": torch.zeros(4)}, r"value: got shape \(4,\), need \(5,\)"),
        ({"target": torch.zeros(5, 1, dtype=torch.int64)}, r"target: got shape \(5, 1\)"),
        ({"history": torch.zeros(4, 2)}, r"history: got shape \(4, 2\), need \(5, H\)"),
        ({"future_value": None}, "future, future_value: need both or neither"),
        ({"future_value": torch.zeros(5, 2)}, r"future_value: got shape \(5, 2\), need future's \(5, 3\)"),
        ({"scores": torch.zeros(4, 9)}, r"scores: got shape \(4, 9\), need \(5, N\)"),
    ],
)
def test_contexts_that_do_not_fit_together_name_the_field(fields: dict, message: str) -> None:
    good = random_context(0)
    named = {
        name: getattr(good, name)
        for name in ("history", "target", "value", "future", "future_value", "scores")
    }
    with pytest.raises(ValueError, match=message):
        RewardContext(**{**named, **fields})


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), ValueError, r"items: got shape \(4, 2\), need \(5, K\)"),
        (torch.zeros(5, 2), TypeError, "items: got torch.float32"),
        (torch.full((5, 1), 9), ValueError, "items: got ids from 9 to 9, need 0 to 8"),
        (torch.full((5, 1), -1), ValueError, "items: got ids from -1"),
    ],
)
def test_items_that_cannot_be_scored_are_refused(items: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RewardModel(TERM, num_items=9)(random_context(0), items)


def test_scores_and_codes_of_another_catalogue_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scores: got shape \(5, 9\), need \(B, N\) = \(5, 8\)"):
        RewardModel({"collaborative": CollaborativeReward()}, num_items=8)(random_context(0))
    with pytest.raises(ValueError, match="codes: got 4 items, need the catalogue's 9"):
        RewardModel({"similarity": SimilarityReward(random_codes(0, 4))}, num_items=9)(random_context(0))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), kept=st.integers(1, 9))
@pytest.mark.parametrize("normalisation", ["softmax", "unit", "standardised"])
def test_candidates_are_the_whole_catalogue_of_their_context(
    normalisation: str, seed: int, kept: int
) -> None:
    whole = random_context(seed)
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.stack([torch.randperm(9, generator=generator)[:kept] for _ in range(5)])
    scores = whole.scores.gather(1, candidates)
    context = dataclasses.replace(whole, scores=scores, candidates=candidates)
    model = RewardModel(
        {"collaborative": CollaborativeReward(normalisation), "interaction": InteractionReward()}, num_items=9
    )
    found = model(context)
    # In the dense form a score of -inf takes an item out of the recommender's sight.
    barred = torch.full((5, 9), -torch.inf).scatter(1, candidates, scores)
    expected = model(dataclasses.replace(whole, scores=barred))
    seen = (candidates == context.target[:, None]).any(1)
    torch.testing.assert_close(
        found.terms["collaborative"], expected.terms["collaborative"].gather(1, candidates)
    )
    torch.testing.assert_close(found.log_rewards[seen], expected.log_rewards.gather(1, candidates)[seen])
    # Where the target is no candidate, its share goes to the other term.
    alone = RewardModel({"collaborative": CollaborativeReward(normalisation)}, num_items=9)(context)
    torch.testing.assert_close(found.log_rewards[~seen], alone.log_rewards[~seen])


def test_candidates_that_do_not_fit() -> None:
    context = random_context(0)
    for candidates, match in (
        (torch.zeros(4, 2, dtype=torch.long), r"candidates: got shape \(4, 2\), need \(5, M\)"),
        (torch.zeros(5, dtype=torch.long), r"candidates: got shape \(5,\), need \(5, M\)"),
        (
            torch.zeros(5, 2, dtype=torch.long),
            r"scores: got shape \(5, 9\), need that of the candidates, \(5, 2\)",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(context, candidates=candidates)
    model = RewardModel({"interaction": InteractionReward()}, num_items=9)
    few = dataclasses.replace(context, scores=None, candidates=catalogue_items(5, 3))
    with pytest.raises(ValueError, match="items: got some beside candidates"):
        model(few, catalogue_items(5, 2))
