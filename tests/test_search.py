"""Searches over a table of logits against searches in plain lists, and draws against exact chances."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from filter_cases import Filtered, filtered
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from search_cases import Oracle, TableWriter
from torch import Tensor

from gflowgr import ItemFilter, PrefixTrie
from gflowgr.ops.behaviour import Behaviour
from gflowgr.search import Generated, beam_search, draw, draw_without_replacement

# A prefix of another item, a shared leaf, forced steps, depths that differ.
ROWS = [[0, 1, 2], [0, 1, 3], [0, 2], [1, 0, 0], [1, 0, 0], [0, 2, 2], [2]]
FILTERS: dict[str, dict[str, Any]] = {
    "everything": {},
    # Of a shared leaf one item, of an inner end all that goes on, and one of two siblings.
    "excluded": {"exclude": [[3, 5, 0]]},
    "allowed": {"sets": [[6], [1, 2, 3, 4, 5]], "set_of_row": [1], "exclude": [[1, 2]]},
}
BEHAVIOURS = {
    "policy": Behaviour(),
    "tempered": Behaviour(temperature=0.6),
    "top-k": Behaviour(top_k=2),
    "nucleus": Behaviour(temperature=1.5, top_p=0.8),
    "epsilon": Behaviour(top_k=1, epsilon=0.4),
    "epsilon over items": Behaviour(top_p=0.5, epsilon=0.7, epsilon_over="items"),
}


def catalogue(contexts: int = 1, **given: Any) -> Filtered:
    options: dict[str, Any] = {"exclude": None, "sets": [], "set_of_row": None} | given
    return Filtered(
        rows=[row + [-1] * (3 - len(row)) for row in ROWS],
        removed=frozenset(),
        form="lists",
        contexts=contexts,
        seed=3,
        **options,
    )


def table_of(case: Filtered, contexts: int = 1) -> Tensor:
    return case.normals((contexts, len(case.oracle), case.width), scale=1.0)


def repeated(case: Filtered, name: str, contexts: int) -> tuple[Oracle, TableWriter, dict[str, Any]]:
    """One context many times over, which is one large sample in one batch."""
    trie, table = case.trie(torch.device("cpu")), table_of(case)
    item_filter = None if name == "everything" else case.filter(trie).select([0] * contexts)
    writer = TableWriter(trie, table.expand(contexts, -1, -1))
    return Oracle(case, 0, table[0].tolist()), writer, {"trie": trie, "item_filter": item_filter}


def assert_drawn_from(expected: dict[Any, float], counts: dict[Any, int]) -> None:
    """Chi-square at a level of 1e-4; outcomes that are seldom expected are taken together."""
    assert set(counts) <= set(expected)
    total = sum(counts.values())
    often = [key for key, chance in expected.items() if chance * total >= 5]
    observed = [counts.get(key, 0) for key in often]
    wanted = [expected[key] * total for key in often]
    if len(often) < len(expected):
        observed.append(total - sum(observed))
        wanted.append(total - sum(wanted))
    statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True))
    assert math.isclose(sum(expected.values()), 1, rel_tol=1e-9)
    assert statistic < stats.chi2.ppf(1 - 1e-4, max(1, len(wanted) - 1))


def tally(rows: Tensor) -> dict[Any, int]:
    found, counts = rows.unique(dim=0, return_counts=True)
    keys = [row[0] if len(row) == 1 else tuple(row) for row in found.tolist()]
    return dict(zip(keys, counts.tolist(), strict=True))


@settings(max_examples=60)
@given(filtered(), st.integers(1, 12), st.integers(0, 30))
def test_beams_find_what_a_search_in_plain_lists_finds(case: Filtered, num_items: int, more: int) -> None:
    trie, table = case.trie(torch.device("cpu")), table_of(case, case.contexts)
    item_filter = case.filter(trie)
    found = beam_search(
        TableWriter(trie, table),
        trie,
        num_items=num_items,
        num_beams=num_items + more,
        item_filter=item_filter,
    )
    for context in range(case.contexts):
        oracle = Oracle(case, context, table[context].tolist())
        expected = oracle.beam_search(num_items, num_items + more)
        items = [item for item in found.items[context].tolist() if item >= 0]
        assert len(items) == len(set(items)) == len(expected) == min(num_items, len(oracle.left))
        assert found.items[context, len(items) :].tolist() == [-1] * (num_items - len(items))
        wanted = [score for score, _ in expected] + [-math.inf] * (num_items - len(items))
        torch.testing.assert_close(found.log_probs[context].tolist(), wanted, rtol=0, atol=1e-9)
        scores = [oracle.log_prob(item) for item in items]
        torch.testing.assert_close(scores, wanted[: len(items)], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FILTERS)
def test_as_many_beams_as_items_find_all_of_them(name: str) -> None:
    case = catalogue(**FILTERS[name])
    oracle, writer, given = repeated(case, name, 1)
    found = beam_search(writer, num_items=9, **given)
    assert sorted(found.items[0].tolist()) == sorted([*oracle.left] + [-1] * (9 - len(oracle.left)))
    expected = sorted((oracle.log_prob(item) for item in oracle.left), reverse=True)
    torch.testing.assert_close(found.log_probs[0, : len(expected)].tolist(), expected, rtol=0, atol=1e-12)


def test_items_of_the_same_tokens_follow_each_other_in_ascending_order() -> None:
    rows = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1], [1, 0]])
    trie = PrefixTrie(rows)
    table = torch.zeros(1, trie.num_nodes, 2)
    found = beam_search(TableWriter(trie, table), trie, num_items=5)
    assert sorted(found.items[0, :2].tolist()) == [1, 3] and found.items[0, 2:].tolist() == [0, 2, 4]
    torch.testing.assert_close(found.log_probs[0].exp(), torch.tensor([1 / 4, 1 / 4, 1 / 6, 1 / 6, 1 / 6]))
    # The tokens of three come first where each of the three is more probable than any other item.
    table[0, 0, 1] = math.log(2)
    found = beam_search(TableWriter(trie, table), trie, num_items=5)
    assert found.items[0, :3].tolist() == [0, 2, 4]
    torch.testing.assert_close(found.log_probs[0].exp(), torch.tensor([2 / 9, 2 / 9, 2 / 9, 1 / 6, 1 / 6]))


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_behaviour_policy(name: str, behaviour: str) -> None:
    how = BEHAVIOURS[behaviour]
    oracle, writer, given = repeated(catalogue(**FILTERS[name]), name, 20)
    drawn = draw(writer, num_samples=200, behaviour=how, seeds=torch.arange(20), **given)
    expected = oracle.draws(how)
    assert_drawn_from(expected, tally(drawn.items.view(-1, 1)))
    policy = {item: oracle.log_prob(item) for item in expected}
    items = drawn.items.flatten().tolist()
    torch.testing.assert_close(
        drawn.log_probs.flatten().tolist(), [policy[item] for item in items], rtol=0, atol=1e-9
    )
    assert drawn.log_inclusion is None and (drawn.log_proposal is None) == how.is_policy
    if drawn.log_proposal is not None:
        wanted = [math.log(expected[item]) for item in items]
        torch.testing.assert_close(drawn.log_proposal.flatten().tolist(), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("num_samples", [1, 2, 3])
def test_every_ordered_draw_without_replacement_has_its_probability(
    name: str, behaviour: str, num_samples: int
) -> None:
    how = BEHAVIOURS[behaviour]
    oracle, writer, given = repeated(catalogue(**FILTERS[name]), name, 4000)
    drawn = draw_without_replacement(
        writer, num_samples=num_samples, behaviour=how, seeds=torch.arange(4000), **given
    )
    chances = oracle.draws(how)
    size = min(num_samples, len(chances))
    expected = {}
    for outcome in permutations(chances, size):
        chance, rest = 1.0, 1.0
        for item in outcome:
            chance *= chances[item] / rest
            rest -= chances[item]
        missing = (-1,) * (num_samples - size)
        expected[outcome[0] if num_samples == 1 else outcome + missing] = chance
    assert_drawn_from(expected, tally(drawn.items))
    _assert_probabilities_of(drawn, oracle, how)


def _assert_probabilities_of(drawn: Generated, oracle: Oracle, how: Behaviour) -> None:
    policy, chances = oracle.draws(Behaviour()), oracle.draws(how)
    for item in chances:
        here = drawn.items == item
        torch.testing.assert_close(
            drawn.log_probs[here], torch.full_like(drawn.log_probs[here], math.log(policy[item]))
        )
        if drawn.log_proposal is not None:
            proposal = drawn.log_proposal[here]
            torch.testing.assert_close(proposal, torch.full_like(proposal, math.log(chances[item])))
    for part in drawn[1:]:
        assert part is None or bool((part.isneginf() == (drawn.items < 0)).all())


@pytest.mark.parametrize("behaviour", ["policy", "tempered", "epsilon over items"])
@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("num_samples", [1, 2, 4])
def test_inclusion_weights_make_sums_unbiased(name: str, behaviour: str, num_samples: int) -> None:
    how = BEHAVIOURS[behaviour]
    oracle, writer, given = repeated(catalogue(**FILTERS[name]), name, 6000)
    drawn = draw_without_replacement(
        writer, num_samples=num_samples, behaviour=how, seeds=torch.arange(6000) * 7 - 2**40, **given
    )
    values = torch.tensor([3.0, -1.0, 2.0, 0.5, 4.0, -2.0, 1.0], dtype=torch.float64)
    assert drawn.log_inclusion is not None
    there = drawn.items >= 0
    weight = torch.where(there, (drawn.log_probs - drawn.log_inclusion).exp(), 0.0)
    for function in (torch.ones_like(values), values):
        estimates = (weight * function[drawn.items.clamp(min=0)]).sum(1)
        exact = sum(p * float(function[item]) for item, p in oracle.draws(Behaviour()).items())
        error = estimates.std() / math.sqrt(len(estimates))
        assert abs(float(estimates.mean()) - exact) < 4 * float(error) + 1e-9


def test_more_draws_than_items_give_all_of_them_for_certain() -> None:
    _, writer, given = repeated(catalogue(), "everything", 50)
    drawn = draw_without_replacement(writer, num_samples=8, seeds=torch.arange(50), **given)
    # Item 2 is a prefix of item 5.
    assert all(sorted(row) == [-1, -1, 0, 1, 3, 4, 5, 6] for row in drawn.items.tolist())
    assert drawn.log_inclusion is not None
    assert bool((drawn.log_inclusion[:, :6] == 0).all())
    torch.testing.assert_close(drawn.log_probs.exp().sum(1), torch.ones(50, dtype=torch.float64))


def test_a_draw_of_few_items_begins_the_draw_of_many() -> None:
    case = catalogue()
    for search in (draw, draw_without_replacement):
        _, writer, given = repeated(case, "everything", 30)
        trie, table = given["trie"], writer.table
        few, many = (
            search(TableWriter(trie, table), trie, num_samples=count, seeds=torch.arange(30))
            for count in (2, 5)
        )
        assert torch.equal(few.items, many.items[:, :2])


SEARCHES: dict[str, Callable[..., Generated]] = {
    "draw": draw,
    "without replacement": draw_without_replacement,
}


@settings(max_examples=25)
@given(filtered(), st.sampled_from(sorted(SEARCHES)), st.sampled_from(sorted(BEHAVIOURS)), st.randoms())
def test_a_context_with_a_seed_does_not_depend_on_its_batch(
    case: Filtered, search: str, behaviour: str, random: Any
) -> None:
    trie, table = case.trie(torch.device("cpu")), table_of(case, case.contexts)
    item_filter = case.filter(trie)
    seeds = torch.tensor([random.randrange(-(2**63), 2**63) for _ in range(case.contexts)])

    def drawn(rows: list[int]) -> Generated:
        return SEARCHES[search](
            TableWriter(trie, table[rows]),
            trie,
            num_samples=4,
            item_filter=item_filter.select(rows),
            behaviour=BEHAVIOURS[behaviour],
            seeds=seeds[rows],
        )

    batch = drawn(list(range(case.contexts)))
    order = random.sample(range(case.contexts), case.contexts)
    shuffled = drawn(order)
    for place, context in enumerate(order):
        alone = drawn([context])
        for whole, other, single in zip(batch, shuffled, alone, strict=True):
            if whole is not None and other is not None and single is not None:
                torch.testing.assert_close(whole[context], single[0], rtol=0, atol=1e-12)
                torch.testing.assert_close(other[place], single[0], rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(filtered(), st.sampled_from(sorted(BEHAVIOURS)), st.integers(1, 9))
def test_draws_without_replacement_are_distinct_and_available(
    case: Filtered, behaviour: str, num_samples: int
) -> None:
    trie, table = case.trie(torch.device("cpu")), table_of(case, case.contexts)
    drawn = draw_without_replacement(
        TableWriter(trie, table),
        trie,
        num_samples=num_samples,
        item_filter=case.filter(trie),
        behaviour=BEHAVIOURS[behaviour],
        generator=torch.Generator().manual_seed(case.seed),
    )
    for context in range(case.contexts):
        items = [item for item in drawn.items[context].tolist() if item >= 0]
        chances = Oracle(case, context, table[context].tolist()).draws(BEHAVIOURS[behaviour])
        assert len(set(items)) == len(items) == min(num_samples, len(chances))
        assert set(items) <= set(chances)


def test_a_generator_fixes_draws() -> None:
    for search in SEARCHES.values():
        _, writer, given = repeated(catalogue(), "everything", 40)

        def drawn(
            seed: int, search: Any = search, table: Tensor = writer.table, trie: Any = given["trie"]
        ) -> Any:
            generator = torch.Generator().manual_seed(seed)
            return search(TableWriter(trie, table), trie, num_samples=3, generator=generator).items

        assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_the_writer_is_asked_only_where_there_is_a_choice() -> None:
    chains = PrefixTrie([[0, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 4]])
    table = torch.zeros(2, chains.num_nodes, 5)
    whole = TableWriter(chains, table)
    beam_search(whole, chains, num_items=3)
    assert whole.asked == [1, 1, 1]
    for search in SEARCHES.values():
        writer = TableWriter(chains, table)
        search(writer, chains, num_samples=3, seeds=torch.tensor([5, 6]))
        assert writer.asked == [1, 1, 1]
    # Without item 2 the first token decides.
    case = Filtered(
        [[0, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 4]], frozenset(), [[2], [2]], [], None, "lists", 2, 0
    )
    filtered_writer = TableWriter(chains, table)
    found = beam_search(filtered_writer, chains, num_items=3, item_filter=case.filter(chains))
    assert not filtered_writer.asked and sorted(found.items[0].tolist()) == [-1, 0, 1]


def test_draws_with_the_same_prefix_share_a_path() -> None:
    trie = PrefixTrie([[a, b, c] for a in range(2) for b in range(2) for c in range(2)])
    writer = TableWriter(trie, torch.zeros(3, trie.num_nodes, 2))
    draw(writer, trie, num_samples=100, seeds=torch.arange(3))
    assert writer.asked == [2, 4]


def test_many_items_of_the_same_tokens_are_told_apart() -> None:
    trie = PrefixTrie(torch.tensor([[3, 1]] * 3000 + [[0, 2]]))
    table = torch.zeros(2, trie.num_nodes, 4)
    item_filter = ItemFilter(trie, exclude=[[0, 2], [3000]])
    found = beam_search(TableWriter(trie, table), trie, num_items=4, item_filter=item_filter)
    assert found.items[1].tolist() == [0, 1, 2, 3]
    assert set(found.items[0].tolist()) <= {3000, 1, 3, 4, 5}
    for search in SEARCHES.values():
        drawn = search(
            TableWriter(trie, table), trie, num_samples=500, item_filter=item_filter, seeds=torch.arange(2)
        )
        hidden = item_filter.hides(drawn.items)
        assert not bool(hidden.any()) and drawn.items[0].unique().numel() > 100
    assert all(row.unique().numel() == 500 for row in drawn.items)


def test_no_contexts_give_no_results() -> None:
    trie = PrefixTrie(ROWS[0:2])
    table = torch.zeros(0, trie.num_nodes, 4)
    assert beam_search(TableWriter(trie, table), trie, num_items=3).items.shape == (0, 3)
    for search in SEARCHES.values():
        drawn = search(TableWriter(trie, table), trie, num_samples=3)
        assert drawn.items.shape == drawn.log_probs.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_logits_give_float32(dtype: torch.dtype) -> None:
    trie = PrefixTrie(torch.tensor([[0, 1], [0, 2], [1, 1]]))
    table = torch.randn(2, trie.num_nodes, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = beam_search(TableWriter(trie, table), trie, num_items=3)
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(found.log_probs.exp().sum(1), torch.ones(2))
    for search in SEARCHES.values():
        drawn = search(
            TableWriter(trie, table), trie, num_samples=2, behaviour=Behaviour(0.5), seeds=torch.arange(2)
        )
        assert {part.dtype for part in drawn[1:] if part is not None} == {torch.float32}


def test_bad_arguments_name_themselves() -> None:
    trie = PrefixTrie(torch.tensor([[0, 1], [0, 2]]))

    def writer() -> TableWriter:
        return TableWriter(trie, torch.zeros(2, trie.num_nodes, 3))

    with pytest.raises(ValueError, match="num_items is 0"):
        beam_search(writer(), trie, num_items=0)
    with pytest.raises(ValueError, match="num_beams is 2, needs at least num_items, 3"):
        beam_search(writer(), trie, num_items=3, num_beams=2)
    for search in SEARCHES.values():
        with pytest.raises(ValueError, match="num_samples is 0"):
            search(writer(), trie, num_samples=0)
        with pytest.raises(ValueError, match=r"seeds has shape \(3,\), needs \(2,\)"):
            search(writer(), trie, num_samples=1, seeds=torch.arange(3))
        with pytest.raises(TypeError, match=r"seeds has dtype torch\.float32"):
            search(writer(), trie, num_samples=1, seeds=torch.zeros(2))
        with pytest.raises(ValueError, match="seeds and generator are both given"):
            search(writer(), trie, num_samples=1, seeds=torch.arange(2), generator=torch.Generator())
