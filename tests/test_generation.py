"""Generation against an exhaustive oracle that knows no trie, no cache and no beams."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import BatchEncoding, LogitsProcessorList

import gflowgr
from gflowgr.backbones import GenerativeRecommender, add_lora, build_decoder, build_t5
from gflowgr.decoding import TreeWriter
from gflowgr.filters import ItemFilter
from gflowgr.generation import (
    TrieLogitsProcessor,
    generate,
    prefix_allowed_tokens,
    sample,
    score_all,
    target_log_probs,
)
from gflowgr.semantic_ids import EOS, SemanticIds

BACKBONES = ("t5", "llama")


def tiny(backbone: str, semantic_ids: SemanticIds, **options: Any) -> GenerativeRecommender:
    """A model whose policies are far from uniform."""
    shape = {
        "layers": 1,
        "d_model": 16,
        "heads": 2,
        "d_ff": 32,
        "history_length": 4,
        "dropout": 0.0,
    } | options
    if backbone == "t5":
        return build_t5(semantic_ids, d_kv=8, **shape).double()
    model = build_decoder(semantic_ids, **shape).double()
    with torch.no_grad():
        model.transformer.get_input_embeddings().weight.mul_(20)
    return model


def catalogue(
    num_items: int, levels: int, codes: int, seed: int = 0, unequal: bool = False, distinct: bool = False
) -> SemanticIds:
    generator = torch.Generator().manual_seed(seed)
    if distinct:
        number = torch.randperm(codes**levels, generator=generator)[:num_items]
        rows = torch.stack([number // codes**level % codes for level in range(levels)], 1)
    else:
        rows = torch.randint(0, codes, (num_items, levels), generator=generator)
    if unequal:
        lengths = torch.randint(1, levels + 1, (num_items, 1), generator=generator)
        rows = rows.masked_fill(torch.arange(levels) >= lengths, -1)
    return SemanticIds(rows, codebook_sizes=codes)


def histories(num_items: int, contexts: int = 3, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(-1, num_items, (contexts, width), generator=torch.Generator().manual_seed(seed))


class Oracle:
    """log P_F of every prefix of every item that a row may get, by softmax over the tokens that follow it.

    Items with the same tokens have equal parts of it.
    """

    def __init__(
        self,
        model: GenerativeRecommender,
        history: Tensor,
        temperature: float = 1.0,
        hidden: list[set[int]] | None = None,
    ) -> None:
        self.ids = [tuple(t for t in row if t >= 0) for row in model.semantic_ids.tokens.tolist()]
        everything = torch.arange(len(self.ids)).expand(history.shape[0], -1)
        with torch.no_grad():
            logits = model.eval()(history, everything).logits / temperature
        self.children: list[dict[tuple[int, ...], set[int]]] = []
        self.prefixes: list[dict[tuple[int, ...], float]] = []
        self.available = [
            [item for item in range(len(self.ids)) if hidden is None or item not in hidden[row]]
            for row in range(history.shape[0])
        ]
        self.items = torch.full(everything.shape, -math.inf)
        for row, available in zip(logits, self.available, strict=True):
            follow: dict[tuple[int, ...], set[int]] = defaultdict(set)
            for item in available:
                for depth, token in enumerate(self.ids[item]):
                    follow[self.ids[item][:depth]].add(token)
            known = {(): 0.0}
            for item in available:
                tokens = self.ids[item]
                for depth, token in enumerate(tokens):
                    children = sorted(follow[tokens[:depth]])
                    step = row[item, depth, children].log_softmax(-1)[children.index(token)]
                    known[tokens[: depth + 1]] = known[tokens[:depth]] + float(step)
                alike = sum(self.ids[other] == tokens for other in available)
                self.items[len(self.prefixes), item] = known[tokens] - math.log(alike)
            self.children.append(follow)
            self.prefixes.append(known)

    def items_under(self, row: int, prefix: tuple[int, ...]) -> list[int]:
        return [item for item in self.available[row] if self.ids[item][: len(prefix)] == prefix]

    def beam_search(self, row: int, num_items: int, beams: int) -> list[float]:
        """Log-probs of the best items found, in plain lists."""
        found, alive, known = [], [()], self.prefixes[row]
        while alive:
            candidates = [(*prefix, token) for prefix in alive for token in self.children[row][prefix]]
            candidates = sorted(candidates, key=known.__getitem__, reverse=True)[:beams]
            alive = []
            for prefix in candidates:
                under = self.items_under(row, prefix)
                decided = len({self.ids[item] for item in under}) == 1
                ending = under if decided else [item for item in under if self.ids[item] == prefix]
                found += [known[prefix] - math.log(len(ending)) for _ in ending]
                alive += [] if decided else [prefix]
        return sorted(found, reverse=True)[:num_items]


def known_items(history: Tensor, exclude: bool) -> list[set[int]]:
    return [{item for item in row if item >= 0} if exclude else set() for row in history.tolist()]


catalogues = st.tuples(
    st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.booleans()
)


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(max_examples=12)
@given(catalogues, st.booleans(), st.integers(1, 35), st.data())
def test_as_many_beams_as_items_give_the_exact_ranking(
    backbone: str, shape: tuple[Any, ...], exclude: bool, num_items: int, data: st.DataObject
) -> None:
    semantic_ids = catalogue(*shape)
    model = tiny(backbone, semantic_ids)
    history = histories(semantic_ids.num_items, seed=shape[3])
    known = known_items(history, exclude)
    oracle = Oracle(model, history, hidden=known)
    scores = score_all(model, history, exclude_history=exclude, num_paths=data.draw(st.integers(1, 9)))
    torch.testing.assert_close(scores, oracle.items.double(), rtol=0, atol=1e-5)
    beams = max(num_items, semantic_ids.num_items)
    generated = generate(model, history, num_items=num_items, num_beams=beams, exclude_history=exclude)
    assert generated.items.shape == generated.log_probs.shape == (3, num_items)
    for row in range(3):
        items = [item for item in generated.items[row].tolist() if item >= 0]
        allowed = oracle.available[row]
        assert len(items) == len(set(items)) == min(num_items, len(allowed))
        assert not known[row] & set(items)
        best = scores[row, allowed].sort(descending=True).values[:num_items]
        torch.testing.assert_close(generated.log_probs[row, : len(items)], best, rtol=0, atol=1e-6)
        torch.testing.assert_close(scores[row, items], best, rtol=0, atol=1e-6)
        assert (generated.items[row, len(items) :] == -1).all()
        assert (generated.log_probs[row, len(items) :] == -math.inf).all()


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(max_examples=12)
@given(catalogues, st.booleans(), st.integers(1, 6), st.integers(0, 3))
def test_few_beams_find_what_a_search_in_plain_lists_finds(
    backbone: str, shape: tuple[Any, ...], exclude: bool, num_items: int, more: int
) -> None:
    semantic_ids = catalogue(*shape)
    model = tiny(backbone, semantic_ids)
    history = histories(semantic_ids.num_items, seed=shape[3] + 1)
    oracle = Oracle(model, history, hidden=known_items(history, exclude))
    generated = generate(
        model, history, num_items=num_items, num_beams=num_items + more, exclude_history=exclude
    )
    for row in range(3):
        items = [item for item in generated.items[row].tolist() if item >= 0]
        assert len(items) == len(set(items)) == min(num_items, len(oracle.available[row]))
        log_probs = generated.log_probs[row, : len(items)]
        assert torch.equal(log_probs, log_probs.sort(descending=True).values)
        torch.testing.assert_close(log_probs, oracle.items[row, items].double(), rtol=0, atol=1e-5)
        expected = oracle.beam_search(row, num_items, num_items + more)
        torch.testing.assert_close(log_probs, torch.tensor(expected).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_history_of_favourites_takes_no_beam(backbone: str) -> None:
    model = tiny(backbone, catalogue(40, 3, 4, distinct=True))
    context = histories(40, contexts=1)
    favourites = generate(model, context, num_items=12).items[0].tolist()
    history = torch.tensor([favourites[:6] + context[0].tolist()])
    model.history_length = 5
    expected = Oracle(model, history, hidden=known_items(history, True)).beam_search(0, 3, 3)
    generated = generate(model, history, num_items=3, num_beams=3, exclude_history=True)
    torch.testing.assert_close(generated.log_probs[0], torch.tensor(expected).double(), rtol=0, atol=1e-5)


def test_items_of_the_same_tokens_stand_together_in_their_order() -> None:
    semantic_ids = SemanticIds([[0, 1], [1, 0], [0, 1], [1, 1], [0, 1], [1, 0]])
    model = tiny("llama", semantic_ids)
    history = histories(6)
    generated = generate(model, history, num_items=6)
    for row in generated.items.tolist():
        places = [row.index(item) for item in (0, 2, 4)]
        assert places == list(range(places[0], places[0] + 3))
        assert row.index(5) == row.index(1) + 1
    assert generate(model, history, num_items=2).items.tolist() == generated.items[:, :2].tolist()
    without = generate(model, torch.tensor([[2, -1]]), num_items=6, exclude_history=True).items[0].tolist()
    assert sorted(without) == [-1, 0, 1, 3, 4, 5] and without.index(4) == without.index(0) + 1


@pytest.mark.parametrize("backbone", BACKBONES)
def test_results_depend_neither_on_batches_nor_on_dropout_nor_on_the_mode(backbone: str) -> None:
    semantic_ids = catalogue(40, 3, 5)
    model = tiny(backbone, semantic_ids, dropout=0.3).train()
    model.model.get_decoder().eval()
    modes = {name: module.training for name, module in model.named_modules()}
    history = histories(40, contexts=9)
    together = generate(model, history, num_items=5)
    for batch_size in (1, 2, 4):
        apart = generate(model, history, num_items=5, batch_size=batch_size, progress=True)
        assert torch.equal(apart.items, together.items)
        torch.testing.assert_close(apart.log_probs, together.log_probs, rtol=0, atol=1e-6)
    assert not together.log_probs.requires_grad
    for results in (
        sample(model, history, 3).log_probs,
        score_all(model, history),
        target_log_probs(model, history, history[:, 0].clamp(min=0)),
    ):
        assert not results.requires_grad
    assert modes == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_model_is_asked_only_where_there_is_a_choice(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    extend = TreeWriter.extend

    def counted(self: TreeWriter, tokens: Tensor, parents: Tensor) -> Tensor:
        asked.append(tokens.shape[1])
        return extend(self, tokens, parents)

    monkeypatch.setattr(TreeWriter, "extend", counted)
    chains = SemanticIds([[0, 1, 2], [1, 1, 0], [2, 0, 1]])
    generate(tiny(backbone, chains), torch.tensor([[0]]), num_items=3)
    sample(tiny(backbone, chains), torch.tensor([[0]]), 7)
    assert asked == []
    # One of the three subtrees forks, at its second step: one beam is extended, once.
    forks = SemanticIds([[0, 1, 2], [1, 1, 0], [2, 0, 1], [2, 1, 1]])
    generate(tiny(backbone, forks), torch.tensor([[0]]), num_items=3)
    assert asked == [1]


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_follow_the_policy(backbone: str, temperature: float) -> None:
    semantic_ids = catalogue(14, 3, 3, seed=4)
    assert len({tuple(row) for row in semantic_ids.codes.tolist()}) < 14
    model = tiny(backbone, semantic_ids)
    history = histories(14, contexts=2)
    drawn = sample(
        model,
        history.repeat(10, 1),
        300,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    items, log_probs = (part.view(10, 2, 300).transpose(0, 1).flatten(1) for part in drawn[:2])
    exact = Oracle(model, history).items.double()
    torch.testing.assert_close(log_probs, exact.gather(1, items), rtol=0, atol=1e-5)
    tempered = Oracle(model, history, temperature)
    for row in range(2):
        expected = 3000 * tempered.items[row].double().exp()
        torch.testing.assert_close(expected.sum(), torch.tensor(3000.0).double(), rtol=1e-5, atol=0)
        counts = torch.bincount(items[row], minlength=14).double()
        often = expected >= 5
        observed = torch.cat([counts[often], counts[~often].sum().view(1)])
        wanted = torch.cat([expected[often], expected[~often].sum().view(1)])
        statistic = ((observed - wanted).square() / wanted.clamp(min=1e-9))[wanted > 1e-6].sum()
        assert statistic < stats.chi2.ppf(1 - 1e-4, int(often.sum()))


def test_a_seed_fixes_the_samples() -> None:
    model, history = tiny("llama", catalogue(30, 3, 4)), histories(30)

    def draw(seed: int) -> Tensor:
        return sample(model, history, 20, generator=torch.Generator().manual_seed(seed)).items

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_samples_pass_by_items_that_others_continue(backbone: str) -> None:
    semantic_ids = SemanticIds([[0, -1, -1], [0, 1, -1], [0, 1, 1], [0, 2, 0], [1, -1, -1], [1, 1, 1]])
    model = tiny(backbone, semantic_ids)
    drawn = sample(model, histories(6), 200, generator=torch.Generator().manual_seed(0))
    assert set(drawn.items.flatten().tolist()) == {2, 3, 5}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_target_log_probs_are_those_of_the_whole_catalogue(backbone: str) -> None:
    semantic_ids = catalogue(30, 3, 4, unequal=True)
    model, history = tiny(backbone, semantic_ids), histories(30, contexts=7)
    target = torch.arange(3, 24, 3)
    expected = score_all(model, history, batch_size=2).gather(1, target.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(
        target_log_probs(model, history, target, batch_size=3), expected, rtol=0, atol=1e-5
    )


def transformers_generate(
    model: GenerativeRecommender, history: Tensor, num_items: int, **options: Any
) -> tuple[Tensor, Tensor]:
    """Tokens (B, k, steps) that transformers' beam search writes, and its scores."""
    inputs = model.inputs(history)
    prompt_length = 1 if model.is_encoder_decoder else inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model.eval().transformer.generate(
            **inputs,
            num_beams=num_items,
            num_return_sequences=num_items,
            max_new_tokens=model.semantic_ids.length + 1,
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            output_scores=True,
            return_dict_in_generate=True,
            **{name: value(model.trie, prompt_length) for name, value in options.items()},
        )
    sequences = output.sequences[:, prompt_length:].view(history.shape[0], num_items, -1)
    return sequences, output.sequences_scores.view(history.shape[0], num_items)


def items_of(model: GenerativeRecommender, tokens: Tensor) -> list[int]:
    """The item that each written row is, which has to end by EOS; -1 for what is none."""
    written = [row[: row.index(EOS)] if EOS in row else [] for row in tokens.tolist()]
    ids = [[t for t in row if t >= 0] for row in model.semantic_ids.tokens.tolist()]
    return [ids.index(row) if row in ids else -1 for row in written]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_transformers_generate_with_our_processor_agrees(backbone: str) -> None:
    semantic_ids = catalogue(20, 3, 4, distinct=True)
    model, history = tiny(backbone, semantic_ids), histories(20)
    ours = generate(model, history, num_items=20)
    tokens, scores = transformers_generate(
        model,
        history,
        20,
        logits_processor=lambda trie, length: LogitsProcessorList([TrieLogitsProcessor(trie, length)]),
    )
    assert [items_of(model, row) for row in tokens] == ours.items.tolist()
    torch.testing.assert_close(scores.double(), ours.log_probs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_transformers_generate_with_our_prefix_function_writes_items_only(backbone: str) -> None:
    semantic_ids = catalogue(20, 3, 4, distinct=True, unequal=False)
    model, history = tiny(backbone, semantic_ids), histories(20)
    tokens, _ = transformers_generate(model, history, 5, prefix_allowed_tokens_fn=prefix_allowed_tokens)
    for row in tokens:
        items = items_of(model, row)
        assert len(set(items)) == 5 and -1 not in items


def test_the_processor_renormalises_and_ends_leaves_and_strays() -> None:
    semantic_ids = SemanticIds([[0, 1], [0, 2], [3, -1]], codebook_sizes=4)
    trie = semantic_ids.trie()
    first, second = semantic_ids.tokens[0].tolist()
    scores = torch.randn(4, semantic_ids.vocab_size, generator=torch.Generator().manual_seed(0))
    prompt = torch.full((4, 2), EOS)
    at_root = TrieLogitsProcessor(trie, 2)(prompt, scores)
    torch.testing.assert_close(at_root.exp().sum(-1), torch.ones(4))
    assert set(at_root[0].isfinite().nonzero().flatten().tolist()) == {first, int(semantic_ids.tokens[2, 0])}
    written = torch.tensor(
        [[first, second], [int(semantic_ids.tokens[2, 0]), EOS], [EOS, EOS], [first, first]]
    )
    ended = TrieLogitsProcessor(trie, 2)(torch.cat([prompt, written], 1), scores)
    assert (ended[:, EOS] == 0).all() and ended.isfinite().sum() == 4
    allowed = prefix_allowed_tokens(trie, 2)
    assert allowed(0, torch.tensor([7, 7])) == trie.children(0).tolist()
    assert allowed(0, torch.tensor([7, 7, first])) == semantic_ids.tokens[:2, 1].tolist()
    assert allowed(0, torch.tensor([7, 7, first, second])) == [EOS]
    assert allowed(0, torch.tensor([7, 7, first, first])) == [EOS]


def test_no_contexts_give_no_results() -> None:
    model = tiny("llama", catalogue(10, 2, 4))
    nothing = torch.empty(0, 4, dtype=torch.long)
    assert generate(model, nothing, num_items=3).items.shape == (0, 3)
    assert score_all(model, nothing).shape == (0, 10)
    assert target_log_probs(model, nothing, torch.empty(0, dtype=torch.long)).shape == (0,)
    assert sample(model, nothing, 5).items.shape == (0, 5)
    tokens = torch.empty(0, 7, dtype=torch.long)
    assert generate(model.model, tokens, model.trie, num_items=3, exclude=[]).items.shape == (0, 3)


def test_a_single_item_is_certain() -> None:
    model = tiny("t5", SemanticIds([[1, 0, 2]]))
    generated = generate(model, torch.tensor([[0], [-1]]), num_items=2)
    assert generated.items.tolist() == [[0, -1], [0, -1]]
    assert generated.log_probs.tolist() == [[0.0, -math.inf]] * 2
    assert sample(model, torch.tensor([[0]]), 3).items.tolist() == [[0, 0, 0]]
    without = generate(model, torch.tensor([[0], [-1]]), num_items=1, exclude_history=True)
    assert without.items.tolist() == [[-1], [0]]


def test_bad_arguments_name_themselves() -> None:
    model, history = tiny("llama", catalogue(10, 2, 4)), histories(10)
    for options, why in (
        ({"num_items": 0}, "num_items is 0"),
        ({"num_items": 5, "num_beams": 4}, "num_beams is 4"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=why):
            generate(model, history, **options)
    with pytest.raises(ValueError, match="num_samples is 0"):
        sample(model, history, 0)
    with pytest.raises(ValueError, match="temperature is 0"):
        sample(model, history, 2, temperature=0.0)
    for function in (generate, score_all, lambda m, h: sample(m, h, 2)):
        with pytest.raises(TypeError, match=r"history is torch\.float64"):
            function(model, history.double())
        with pytest.raises(ValueError, match=r"needs 0 \.\. 9, or -1"):
            function(model, history + 10)
        with pytest.raises(ValueError, match="the item -100, needs 0"):
            function(model, torch.full_like(history, -100))
        with pytest.raises(ValueError, match="history has shape"):
            function(model, history[0])
    with pytest.raises(ValueError, match="target has 2"):
        target_log_probs(model, history, torch.zeros(2, dtype=torch.long))
    # Padding among the targets would otherwise count as certain.
    with pytest.raises(ValueError, match="target has the item -1, needs items of the catalogue"):
        target_log_probs(model, history, torch.full((len(history),), -1))


def remapped(semantic_ids: SemanticIds, kept: list[int]) -> SemanticIds:
    """A catalogue of some of the items, with the tokens they had."""
    return SemanticIds(
        semantic_ids.codes[kept],
        codebook_sizes=semantic_ids.codebook_sizes,
        first_token=semantic_ids.first_token,
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("by", ["exclude", "allow"])
def test_a_filter_leaves_what_a_catalogue_without_those_items_has(backbone: str, by: str) -> None:
    semantic_ids = catalogue(40, 3, 4, unequal=True)
    model, history = tiny(backbone, semantic_ids), histories(40)
    kept = [item for item in range(40) if item % 3]
    options: dict[str, Any] = {"allow": kept} if by == "allow" else {"exclude": [list(range(0, 40, 3))] * 3}
    smaller = remapped(semantic_ids, kept).trie()
    inputs = model.inputs(history)
    filtered = generate(model, history, num_items=27, num_beams=30, **options)
    alone = generate(model.model, inputs, smaller, num_items=27, num_beams=30)
    renamed = torch.where(alone.items < 0, -1, torch.tensor(kept)[alone.items])
    assert torch.equal(filtered.items.sort().values, renamed.sort().values)
    torch.testing.assert_close(filtered.log_probs, alone.log_probs, rtol=0, atol=1e-6)
    scores, of_smaller = score_all(model, history, **options), score_all(model.model, inputs, smaller)
    torch.testing.assert_close(scores[:, kept], of_smaller, rtol=0, atol=1e-6)
    assert scores[:, ::3].isneginf().all()
    for method in ("sample", "sample_without_replacement"):
        drawn = generate(model, history, num_items=9, method=method, seeds=torch.arange(3), **options)
        assert set(drawn.items.flatten().tolist()) <= set(kept)
        if method == "sample":
            expected = scores.gather(1, drawn.items)
            torch.testing.assert_close(drawn.log_probs, expected, rtol=0, atol=1e-6)


def test_filters_of_rows_come_back_to_their_rows() -> None:
    semantic_ids = catalogue(30, 3, 4, distinct=True)
    model, history = tiny("llama", semantic_ids), histories(30, contexts=7)
    mine = [[row, row + 10] for row in range(7)]
    known = [{item for item in row if item >= 0} | set(mine[i]) for i, row in enumerate(history.tolist())]
    expected = Oracle(model, history, hidden=known).items.double()
    for exclude in (mine, torch.tensor(mine), torch.tensor(mine).numpy()):
        scores = score_all(model, history, exclude=exclude, exclude_history=True, batch_size=2)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    generated = generate(model, history, exclude=mine, exclude_history=True, num_items=5, batch_size=3)
    for row, items in enumerate(generated.items.tolist()):
        assert not known[row] & set(items) and -1 not in items
    sets = (torch.arange(30).view(2, 15).tolist(), [0, 1, 0, 1, 1, 0, 0])
    shared = generate(model, history, allow=sets, num_items=5, batch_size=2).items
    assert torch.equal(shared // 15, torch.tensor(sets[1]).unsqueeze(1).expand(-1, 5))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_transformers_model_generates_as_its_recommender_does(backbone: str) -> None:
    semantic_ids = catalogue(40, 3, 5)
    model, history = tiny(backbone, semantic_ids), histories(40, contexts=5)
    inputs = model.inputs(history)
    expected = generate(model, history, num_items=6)
    read = BatchEncoding(inputs)
    for batch_size in (2, 64):
        ours = gflowgr.generate(model.model.train(), read, model.trie, num_items=6, batch_size=batch_size)
        assert torch.equal(ours.items, expected.items) and model.model.training
        torch.testing.assert_close(ours.log_probs, expected.log_probs, rtol=0, atol=1e-6)
    scores = score_all(model.model, inputs, semantic_ids.trie(), num_paths=7)
    torch.testing.assert_close(scores, score_all(model, history), rtol=0, atol=1e-6)
    assert (
        generate(model, history, semantic_ids.trie(), num_items=6).items.tolist() == expected.items.tolist()
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_probabilities_of_a_catalogue_sum_to_one(backbone: str) -> None:
    semantic_ids = catalogue(300, 4, 6, distinct=True)
    model, history = tiny(backbone, semantic_ids).float(), histories(300)
    for num_paths in (5, 1000):
        scores = score_all(model, history, num_paths=num_paths)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.exp().sum(1), torch.ones(3), rtol=0, atol=1e-5)
        filtered = score_all(model, history, exclude_history=True, num_paths=num_paths)
        torch.testing.assert_close(filtered.exp().sum(1), torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", ["sample", "sample_without_replacement"])
def test_a_context_s_seed_fixes_its_draws_whatever_its_batch(backbone: str, method: str) -> None:
    model, history = tiny(backbone, catalogue(30, 3, 4)), histories(30, contexts=7)
    seeds = torch.arange(7) * 11
    options: dict[str, Any] = {"method": method, "num_items": 5, "temperature": 0.7}
    together = generate(model, history, seeds=seeds, **options)
    apart = generate(model, history.flip(0), seeds=seeds.flip(0), batch_size=2, **options)
    assert torch.equal(apart.items.flip(0), together.items)
    generator = torch.Generator().manual_seed(3)
    drawn = generate(model, history, generator=generator, **options)
    again = generate(model, history, generator=generator.manual_seed(3), batch_size=1, **options)
    assert torch.equal(drawn.items, again.items)
    if method == "sample_without_replacement":
        assert all(len(set(row)) == 5 for row in together.items.tolist())
        assert together.log_inclusion is not None and together.log_inclusion.shape == (7, 5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_finds_the_exhaustive_best(backbone: str) -> None:
    model, history = tiny(backbone, catalogue(30, 3, 4, distinct=True)).bfloat16(), histories(30)
    generated, scores = generate(model, history, num_items=30, num_beams=30), score_all(model, history)
    assert generated.log_probs.dtype == scores.dtype == torch.float32
    torch.testing.assert_close(generated.log_probs, scores.gather(1, generated.items), rtol=0, atol=0.1)
    assert (generated.items.sort().values == torch.arange(30)).all()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapted_model_generates_by_its_adapter(backbone: str) -> None:
    model, history = tiny(backbone, catalogue(20, 3, 4, distinct=True)), histories(20)
    before = generate(model, history, num_items=20)
    adapted = add_lora(model, r=2)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    after = generate(adapted.model, adapted.inputs(history), adapted.trie, num_items=20)
    expected = Oracle(adapted, history).items.double().sort(descending=True).values
    torch.testing.assert_close(after.log_probs, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(after.log_probs, before.log_probs, atol=1e-2)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_our_processor_keeps_filters_in_transformers_generate(backbone: str) -> None:
    semantic_ids = catalogue(20, 3, 4, distinct=True)
    model, history = tiny(backbone, semantic_ids), histories(20)
    exclude = [[0, 5, 7], [], list(range(0, 20, 2))]
    ours = generate(model, history, num_items=10, num_beams=10, exclude=exclude)
    item_filter = ItemFilter(model.trie, exclude=exclude)
    tokens, scores = transformers_generate(
        model,
        history,
        10,
        logits_processor=lambda trie, length: LogitsProcessorList(
            [TrieLogitsProcessor(trie, length, item_filter=item_filter)]
        ),
    )
    assert [items_of(model, row) for row in tokens] == ours.items.tolist()
    torch.testing.assert_close(scores.double(), ours.log_probs, rtol=0, atol=1e-5)
    tokens, _ = transformers_generate(
        model,
        history,
        5,
        prefix_allowed_tokens_fn=lambda trie, length: prefix_allowed_tokens(
            trie, length, item_filter=item_filter
        ),
    )
    for row, rest in zip(tokens, exclude, strict=True):
        items = items_of(model, row)
        assert len(set(items)) == 5 and -1 not in items and not set(items) & set(rest)
    with pytest.raises(ValueError, match="scores has 4 rows, needs as many for each of 3"):
        TrieLogitsProcessor(model.trie, 1, item_filter=item_filter)(
            torch.zeros(4, 1).long(), torch.zeros(4, 99)
        )


def test_the_processor_serves_groups_of_beams_as_it_serves_all() -> None:
    semantic_ids = catalogue(20, 3, 4, distinct=True)
    trie, tokens = semantic_ids.trie(), semantic_ids.tokens[:12, :2]
    item_filter = ItemFilter(trie, exclude=[[0, 4], [], list(range(5, 15))])
    processor = TrieLogitsProcessor(trie, 1, item_filter=item_filter)
    written = torch.cat([torch.zeros(12, 1, dtype=torch.long), tokens], 1)
    scores = torch.randn(12, semantic_ids.vocab_size, generator=torch.Generator().manual_seed(0))
    everything = processor(written, scores).view(3, 4, -1)
    for group in (slice(0, 2), slice(2, 4)):
        rows = torch.arange(12).view(3, 4)[:, group].flatten()
        assert torch.equal(processor(written[rows], scores[rows]).view(3, 2, -1), everything[:, group])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_transformers_sampling_with_our_processor_follows_the_policy(backbone: str) -> None:
    semantic_ids = catalogue(6, 2, 4, distinct=True)
    model, history = tiny(backbone, semantic_ids), histories(6, contexts=1)
    inputs = model.inputs(history)
    length = 1 if model.is_encoder_decoder else inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    tokens = model.eval().transformer.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=600,
        max_new_tokens=3,
        logits_processor=LogitsProcessorList([TrieLogitsProcessor(model.trie, length)]),
    )
    counts = torch.bincount(torch.tensor(items_of(model, tokens[:, length:])), minlength=6).double()
    expected = 600 * score_all(model, history)[0].exp()
    often = expected >= 5
    statistic = ((counts - expected).square() / expected)[often].sum()
    assert statistic < stats.chi2.ppf(1 - 1e-4, int(often.sum()))


def test_what_does_not_belong_together_is_refused() -> None:
    semantic_ids = catalogue(10, 2, 4)
    model, history = tiny("llama", semantic_ids), histories(10)
    inputs, trie = model.inputs(history), model.trie
    for arguments, options, kind, why in (
        ((model.model, inputs), {}, ValueError, "trie is None"),
        ((model.model, {}, trie), {}, ValueError, "needs input_ids"),
        (
            (model.model, dict(inputs) | {"attention_mask": [[1]]}, trie),
            {},
            TypeError,
            "inputs has an attention_mask of list",
        ),
        ((model.model, inputs, semantic_ids), {}, TypeError, "trie is a SemanticIds"),
        ((model.model, inputs, SemanticIds([[50]]).trie()), {}, ValueError, "trie has the token 53"),
        ((model.model, inputs, trie), {"exclude_history": True}, ValueError, "exclude_history needs"),
        ((model, history), {"method": "best"}, ValueError, "method is 'best'"),
        ((model, history), {"top_k": 3}, ValueError, "draws nothing"),
        ((model, history), {"seeds": torch.arange(3)}, ValueError, "draws nothing"),
        ((model, history), {"method": "sample", "num_beams": 20}, ValueError, "needs method='beam'"),
        ((model, history), {"method": "sample", "seeds": torch.arange(2)}, ValueError, r"integers \(3,\)"),
        ((model, history), {"exclude": [[1]]}, ValueError, "exclude has 1 row"),
        ((model, history), {"exclude": [[1]], "exclude_history": True}, ValueError, "exclude has 1 row"),
        ((torch.nn.Linear(1, 1), inputs, trie), {}, TypeError, "model is a Linear"),
    ):
        with pytest.raises(kind, match=why):
            generate(*arguments, **options)
    with pytest.raises(ValueError, match="num_paths is 0"):
        score_all(model, history, num_paths=0)


@pytest.mark.parametrize("name", ["num_items", "num_beams", "batch_size"])
def test_numbers_that_are_no_integers_are_named(name: str) -> None:
    model = tiny("t5", catalogue(5, 2, 3))
    for value in (2.5, "2", True):
        with pytest.raises(TypeError, match=rf"{name} is {value!r}, needs an integer"):
            generate(model, histories(5), **{name: value})
