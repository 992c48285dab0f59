"""Both together against the definition: every item's two probabilities, mixed, sorted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.backbones import GenerativeRecommender, build_decoder
from gflowgr.collaborative import ItemKNN, Popularity, Recommender
from gflowgr.ensemble import generate_together, rank_together
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


@pytest.fixture(scope="module")
def recommender() -> GenerativeRecommender:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 4, (NUM_ITEMS, 3), generator=generator)
    shape = {"layers": 1, "d_model": 16, "heads": 2, "d_ff": 32, "history_length": 5, "dropout": 0.0}
    torch.manual_seed(0)
    model = build_decoder(SemanticIds(codes, codebook_sizes=4), **shape).double()
    with torch.no_grad():
        model.transformer.get_input_embeddings().weight.mul_(20)
    return model.eval()


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
    return (1 - weight) * ours + weight * theirs.softmax(1)


@given(
    seed=st.integers(0, 2**16),
    weight=st.floats(0, 1),
    hide=st.booleans(),
    batch_size=st.integers(1, 7),
)
@settings(deadline=None, max_examples=30)
def test_with_all_items_as_beams_the_lists_are_exact(
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
def test_lists_are_measured_with_the_targets_mixed_probability(
    recommender: GenerativeRecommender, teacher: Fixed, weight: float
) -> None:
    history = some_histories(5, contexts=9)
    target = torch.arange(9)
    examples = SimpleNamespace(history=history, target=target)
    metrics = rank_together(recommender, teacher, examples, teacher_weight=weight)
    expected = defined(recommender, teacher, history, weight, False)
    places = (expected > expected.gather(1, target[:, None])).sum(1) + 1
    assert metrics.summary()["recall@10"] == pytest.approx(float((places <= 10).double().mean()))
    nll = -expected.gather(1, target[:, None]).log().mean()
    assert metrics.summary()["nll"] == pytest.approx(float(nll), rel=1e-4)


def test_its_modes_stay(recommender: GenerativeRecommender, teacher: Fixed) -> None:
    recommender.train()
    generate_together(recommender, teacher, some_histories(6))
    assert recommender.training
    recommender.eval()


def test_errors_name_the_argument(recommender: GenerativeRecommender, teacher: Fixed) -> None:
    history = some_histories(7)
    for weight in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(ValueError, match=r"teacher_weight is .* from 0 to 1"):
            generate_together(recommender, teacher, history, teacher_weight=weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_beams is 3, needs at least 5"):
        generate_together(recommender, teacher, history, num_items=5, num_beams=3)
    with pytest.raises(ValueError, match="teacher has 7 items, needs 30"):
        generate_together(recommender, Popularity(torch.ones(7, dtype=torch.int64)), history)
    with pytest.raises(ValueError, match="item-knn, whose scores are no distribution"):
        empty = torch.zeros(NUM_ITEMS + 1, dtype=torch.int64).numpy()
        neighbours = ItemKNN(empty, empty[:0], empty[:0].astype("float32"), num_items=NUM_ITEMS, recency=0.6)
        generate_together(recommender, neighbours, history)
