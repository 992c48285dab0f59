"""Both together against the definition: every item's two probabilities, mixed, sorted."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.backbones import GenerativeRecommender, build_decoder, build_t5
from gflowgr.collaborative import ItemKNN, Popularity, Recommender
from gflowgr.ensemble import best_weight, candidates, generate_together, rank_by_weight, rank_together
from gflowgr.generation import generate, score_all
from gflowgr.semantic_ids import SemanticIds

NUM_ITEMS = 30


class Fixed(Recommender):
    """Logits that depend on the latest item alone."""

    name = "fixed"
    is_distribution = True

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.num_items = logits, logits.shape[1]

    def _scores(self, histories: Tensor) -> Tensor:
        latest = histories.gather(1, (histories >= 0).sum(1, keepdim=True) - 1)[:, 0]
        return self.logits[latest]

    def _tensors(self) -> dict[str, Tensor]:
        return {"logits": self.logits}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], config: object) -> Fixed:
        return cls(tensors["logits"])


def a_model(backbone: str, dropout: float = 0.0) -> GenerativeRecommender:
    """Of a catalogue in which some items share their codes; it reads less of a history than there may be."""
    generator = torch.Generator().manual_seed(0)
    semantic_ids = SemanticIds(torch.randint(0, 4, (NUM_ITEMS, 3), generator=generator), codebook_sizes=4)
    assert len(semantic_ids.codes.unique(dim=0)) < NUM_ITEMS
    shape = {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 32, "history_length": 4, "dropout": dropout}
    torch.manual_seed(0)
    if backbone == "t5":
        return build_t5(semantic_ids, d_kv=8, **shape).double().eval()
    model = build_decoder(semantic_ids, **shape).double()
    with torch.no_grad():
        model.transformer.get_input_embeddings().weight.mul_(20)
    return model.eval()


@pytest.fixture(scope="module", params=["t5", "llama"])
def recommender(request: pytest.FixtureRequest) -> GenerativeRecommender:
    return a_model(request.param)


@pytest.fixture(scope="module")
def teacher() -> Fixed:
    return Fixed(3 * torch.randn(NUM_ITEMS, NUM_ITEMS, generator=torch.Generator().manual_seed(1)))


def some_histories(seed: int, contexts: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(0, NUM_ITEMS, (contexts, 5), generator=generator)
    lengths = torch.randint(1, 6, (contexts, 1), generator=generator)
    return items.masked_fill(torch.arange(5) >= lengths, -1)


def defined(
    recommender: GenerativeRecommender, teacher: Recommender, history: Tensor, weight: float, hide: bool
) -> Tensor:
    ours = score_all(recommender, history, exclude_history=hide).exp()
    theirs = teacher.scores(history).double()
    if hide:
        for row, items in enumerate(history.tolist()):
            theirs[row, [item for item in items if item >= 0]] = -torch.inf
    return ours ** (1 - weight) * theirs.softmax(1) ** weight


@given(
    seed=st.integers(0, 2**16),
    weight=st.floats(0, 1),
    hide=st.booleans(),
    batch_size=st.integers(1, 7),
)
@settings(deadline=None, max_examples=30)
def test_lists_of_everything_are_exact(
    recommender: GenerativeRecommender,
    teacher: Fixed,
    seed: int,
    weight: float,
    hide: bool,
    batch_size: int,
) -> None:
    history = some_histories(seed)
    found = generate_together(
        recommender,
        teacher,
        history,
        teacher_weight=weight,
        num_items=NUM_ITEMS,
        exclude_history=hide,
        batch_size=batch_size,
    )
    expected = defined(recommender, teacher, history, weight, hide)
    for row in range(len(history)):
        seen = set(history[row].tolist()) if hide else set()
        items = [item for item in found.items[row].tolist() if item >= 0]
        assert sorted(items) == [item for item in range(NUM_ITEMS) if item not in seen]
        probabilities = found.log_probs[row, : len(items)].double().exp()
        assert torch.allclose(probabilities, expected[row, items], rtol=1e-4, atol=1e-9)
        assert (probabilities.diff() <= 0).all()
        assert found.log_probs[row, len(items) :].isneginf().all()


def test_few_beams_look_at_the_best_of_either(recommender: GenerativeRecommender, teacher: Fixed) -> None:
    history = some_histories(3, contexts=20)
    found = generate_together(recommender, teacher, history, num_items=4, num_beams=4)
    written = generate(recommender, history, num_items=4, num_beams=4).items
    expected = defined(recommender, teacher, history, 0.5, False)
    theirs = teacher.scores(history).topk(4).indices
    for row in range(len(history)):
        candidates = list({*written[row].tolist(), *theirs[row].tolist()})
        best = expected[row, candidates].sort(descending=True).values[:4]
        assert torch.allclose(found.log_probs[row].double().exp(), best, rtol=1e-4)


def test_what_is_excluded_comes_from_neither(recommender: GenerativeRecommender, teacher: Fixed) -> None:
    history = some_histories(4)
    best = generate_together(recommender, teacher, history, num_items=3).items
    again = generate_together(recommender, teacher, history, num_items=10, exclude=best)
    assert not (again.items[:, :, None] == best[:, None, :]).any()
    everything = [list(range(NUM_ITEMS))] * len(history)
    nothing = generate_together(recommender, teacher, history, exclude=everything)
    assert (nothing.items == -1).all() and nothing.log_probs.isneginf().all()


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_lists_are_measured_but_for_the_likelihood(
    recommender: GenerativeRecommender, teacher: Fixed, weight: float
) -> None:
    history = some_histories(5, contexts=9)
    target = torch.arange(9)
    examples = SimpleNamespace(history=history, target=target)
    metrics = rank_together(recommender, teacher, examples, teacher_weight=weight)
    expected = defined(recommender, teacher, history, weight, False)
    places = (expected > expected.gather(1, target[:, None])).sum(1) + 1
    assert metrics.summary()["recall@10"] == pytest.approx(float((places <= 10).double().mean()))
    # Geometric means add up to less than 1, so that they are no likelihood.
    assert "nll" not in metrics.summary()


def test_the_best_weight_is_that_of_the_highest_ndcg(
    recommender: GenerativeRecommender, teacher: Fixed
) -> None:
    examples = SimpleNamespace(history=some_histories(9, contexts=12), target=torch.arange(12))
    weights = [1.0, 0.0, 0.25]
    measured = rank_by_weight(recommender, teacher, examples, teacher_weights=weights, num_items=4)
    assert list(measured) == weights
    places = {}
    for weight, metrics in measured.items():
        one = rank_together(recommender, teacher, examples, teacher_weight=weight, num_items=4)
        assert metrics.rank.tolist() == one.rank.tolist() and metrics.summary() == one.summary()
        listed = [place for place in metrics.rank.tolist() if place]
        places[weight] = sum(1 / math.log2(place + 1) for place in listed)
    assert best_weight(measured) == max(places, key=lambda weight: places[weight])
    assert len(set(places.values())) > 1
    # Of equals the one that asks least of the teacher.
    assert best_weight({0.75: measured[0.25], 0.5: measured[0.25]}) == 0.5


def test_dropout_plays_no_part_and_the_mode_stays(teacher: Fixed) -> None:
    model, history = a_model("llama", dropout=0.5), some_histories(6)
    still = generate_together(model, teacher, history)
    model.train()
    found = generate_together(model, teacher, history)
    assert model.training
    assert torch.equal(found.log_probs, still.log_probs) and torch.equal(found.items, still.items)


def test_what_is_improbable_keeps_its_order(recommender: GenerativeRecommender) -> None:
    steep = Fixed(-400.0 * torch.arange(NUM_ITEMS).expand(NUM_ITEMS, -1))
    found = generate_together(recommender, steep, some_histories(8), teacher_weight=1.0)
    assert (found.items == torch.arange(10)).all() and found.log_probs.isfinite().all()


def test_nobody_gets_nothing(recommender: GenerativeRecommender, teacher: Fixed) -> None:
    found = generate_together(recommender, teacher, torch.empty(0, 5, dtype=torch.int64))
    assert found.items.shape == (0, 10)


def test_errors_name_the_argument(recommender: GenerativeRecommender, teacher: Fixed) -> None:
    history = some_histories(7)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"teacher_weight is .* from 0 to 1"):
            generate_together(recommender, teacher, history, teacher_weight=weight)
        with pytest.raises(ValueError, match=r"teacher_weight is .* from 0 to 1"):
            rank_by_weight(recommender, teacher, SimpleNamespace(), teacher_weights=[0.5, weight])
    with pytest.raises(ValueError, match="teacher_weights is empty"):
        rank_by_weight(recommender, teacher, SimpleNamespace(), teacher_weights=[])
    with pytest.raises(ValueError, match="num_beams is 0, needs at least 1"):
        candidates(recommender, teacher, history, num_beams=0)
    wrong: Any
    for wrong in ("half", True):
        with pytest.raises(TypeError, match=r"teacher_weight is .*, needs a number"):
            generate_together(recommender, teacher, history, teacher_weight=wrong)
    for wrong in (None, object()):
        with pytest.raises(TypeError, match=r"teacher is a \w+, needs a Recommender"):
            generate_together(recommender, wrong, history)
    with pytest.raises(ValueError, match="num_beams is 3, needs at least num_items, 5"):
        generate_together(recommender, teacher, history, num_items=5, num_beams=3)
    with pytest.raises(ValueError, match="teacher has 7 items, needs 30"):
        generate_together(recommender, Popularity(torch.ones(7, dtype=torch.int64)), history)
    with pytest.raises(ValueError, match="item-knn, whose scores are no distribution"):
        empty = torch.zeros(NUM_ITEMS + 1, dtype=torch.int64).numpy()
        neighbours = ItemKNN(empty, empty[:0], empty[:0].astype("float32"), num_items=NUM_ITEMS, recency=0.6)
        generate_together(recommender, neighbours, history)
