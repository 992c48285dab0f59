"""A catalogue in shards, held against one trie of all of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import PrefixTrie, ops
from gflowgr.shards import Shards, best_of, split

VOCABULARY = 9


@st.composite
def catalogues(draw: st.DrawFn) -> Tensor:
    levels = draw(st.integers(1, 4))
    rows = draw(
        st.lists(
            st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=levels), min_size=2, max_size=30
        )
    )
    return torch.tensor([row + [-1] * (levels - len(row)) for row in rows])


def policy(path: tuple[int, ...], seed: int) -> Tensor:
    """The logits of a model that is a table of prefixes."""
    generator = torch.Generator().manual_seed((hash(path) + seed) % 2**31)
    return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)


@settings(max_examples=60)
@given(catalogues(), st.integers(1, 4), st.integers(0, 1000))
def test_log_probs_and_gradients_are_those_of_one_trie(rows: Tensor, count: int, seed: int) -> None:
    shards = split(rows, min(count, rows[:, 0].unique().numel()))
    torch.manual_seed(seed)
    strange = torch.randint(-1, VOCABULARY, (6, rows.shape[1]))
    tokens = torch.cat([rows, strange])
    logits = torch.randn(*tokens.shape, VOCABULARY, dtype=torch.float64, requires_grad=True)
    whole = ops.trie_token_log_probs(logits, tokens, PrefixTrie(rows))
    parts = shards.token_log_probs(logits, tokens)
    torch.testing.assert_close(parts, whole)
    grad = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, logits, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(parts, logits, grad)[0], expected)


@settings(max_examples=60)
@given(catalogues(), st.integers(1, 4))
def test_every_item_is_in_one_shard_and_shards_are_even(rows: Tensor, count: int) -> None:
    count = min(count, rows[:, 0].unique().numel())
    shards = split(rows, count)
    assert torch.cat(shards.items).sort().values.tolist() == list(range(len(rows)))
    for shard, (trie, items) in enumerate(zip(shards.tries, shards.items, strict=True)):
        assert shards.of_tokens(rows[items, 0]).eq(shard).all()
        assert trie.num_items == len(items) > 0
    largest = int(rows[:, 0].bincount().max())
    sizes = [len(items) for items in shards.items]
    assert max(sizes) - min(sizes) <= largest


def drawn_exactly(
    trie: PrefixTrie, start: list[tuple[tuple[int, ...], float]], seed: int
) -> dict[int, float]:
    """The probability that sampling from those prefixes ends at each leaf's first item, by enumeration."""
    ends: dict[int, float] = {}
    open_paths = list(start)
    while open_paths:
        path, probability = open_paths.pop()
        node = int(trie.walk([path])[0, -1]) if path else 0
        children = trie.children(node).tolist()
        if not children:
            ends[int(trie.items(node)[0])] = probability
            continue
        row = ops.trie_log_softmax(policy(path, seed)[None], torch.tensor([node]), trie)[0].exp()
        open_paths += [((*path, token), probability * float(row[token])) for token in children]
    return ends


@settings(max_examples=30)
@given(catalogues(), st.integers(2, 3), st.integers(0, 1000))
def test_sampling_by_shards_has_the_distribution_of_one_trie(rows: Tensor, count: int, seed: int) -> None:
    shards = split(rows, min(count, rows[:, 0].unique().numel()))
    first = ops.trie_log_softmax(policy((), seed)[None], torch.zeros(1, dtype=torch.long), shards.root)[
        0
    ].exp()
    found: dict[int, float] = {}
    for shard, (trie, items) in enumerate(zip(shards.tries, shards.items, strict=True)):
        mine = [
            token
            for token in shards.root.children(0).tolist()
            if shards.of_tokens(torch.tensor(token)) == shard
        ]
        ends = drawn_exactly(trie, [((token,), float(first[token])) for token in mine], seed)
        found |= {int(items[item]): probability for item, probability in ends.items()}
    expected = drawn_exactly(PrefixTrie(rows), [((), 1.0)], seed)
    assert found.keys() == expected.keys()
    for item, probability in expected.items():
        assert found[item] == pytest.approx(probability, abs=1e-12)
    assert sum(found.values()) == pytest.approx(1)


Beams = list[tuple[tuple[int, ...], float]]


def extensions(trie: PrefixTrie, beams: Beams, width: int, seed: int) -> Beams:
    """The best ways on from those beams, a finished beam being its own."""
    found: Beams = []
    for path, score in beams:
        node = int(trie.walk([path])[0, -1]) if path else 0
        children = trie.children(node).tolist()
        row = ops.trie_log_softmax(policy(path, seed)[None], torch.tensor([node]), trie)[0]
        found += [((*path, token), score + float(row[token])) for token in children] or [(path, score)]
    return sorted(found, key=lambda beam: -beam[1])[:width]


def merged(parts: list[Beams], width: int) -> Beams:
    paths = [path for beams in parts for path, _ in beams]
    numbers = iter(range(len(paths)))
    candidates = [
        (
            torch.tensor([[next(numbers) for _ in beams]], dtype=torch.long),
            torch.tensor([[score for _, score in beams]], dtype=torch.float64),
        )
        for beams in parts
    ]
    chosen, scores = best_of(candidates, width)
    return [(paths[int(number)], float(score)) for number, score in zip(chosen[0], scores[0], strict=True)]


def of_shard(shards: Shards, beams: Beams, shard: int) -> Beams:
    return [beam for beam in beams if int(shards.of_tokens(torch.tensor(beam[0][0]))) == shard]


@settings(max_examples=40)
@given(catalogues(), st.integers(2, 3), st.integers(1, 5), st.integers(0, 1000))
def test_beam_search_merged_in_each_step_is_that_of_one_trie(
    rows: Tensor, count: int, width: int, seed: int
) -> None:
    shards = split(rows, min(count, rows[:, 0].unique().numel()))
    whole_trie = PrefixTrie(rows)
    whole = extensions(whole_trie, [((), 0.0)], width, seed)
    beams = extensions(shards.root, [((), 0.0)], width, seed)
    for _ in range(rows.shape[1] - 1):
        whole = extensions(whole_trie, whole, width, seed)
        parts = [
            extensions(trie, of_shard(shards, beams, n), width, seed) for n, trie in enumerate(shards.tries)
        ]
        beams = merged(parts, width)
    assert [path for path, _ in beams] == [path for path, _ in whole]
    assert [score for _, score in beams] == pytest.approx([score for _, score in whole])


def test_merged_lists_may_be_short() -> None:
    none, one = torch.empty(1, 0), torch.tensor([[-1.0]])
    found, scores = best_of([(none.long(), none), (torch.tensor([[4]]), one), (torch.tensor([[7]]), one)], 3)
    assert (found.tolist(), scores.tolist()) == ([[4, 7]], [[-1.0, -1.0]])


@pytest.mark.parametrize("count", [0, 3])
def test_as_many_shards_as_first_tokens(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_shards is {count}, needs 1 .. 2"):
        split([[1, 2], [3, 4], [1, 5]], count)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_takes_what_a_trie_takes(dtype: type) -> None:
    rows = np.array([[1, 2], [3, 4], [1, 5]], dtype=dtype)
    rows.flags.writeable = False
    assert [trie.sequences().tolist() for trie in split(rows, 2).tries] == [[[1, 2], [1, 5]], [[3, 4]]]


@pytest.mark.parametrize("sequences", [[[1, 2], [3]], [1, 2, 3], [[1.0, 2.0]], []])
def test_names_sequences_that_make_no_trie(sequences: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="sequences has"):
        split(sequences, 1)
