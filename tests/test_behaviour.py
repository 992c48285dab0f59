"""Behaviour policies against their definition in plain floats, and random numbers by counter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from core_cases import backends, device_of
from filter_cases import Filtered, filtered
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from search_cases import behaviour_by_definition
from torch import Tensor

from gflowgr import PrefixTrie, ops
from gflowgr.ops._random import gumbel, random_bits, uniform
from gflowgr.ops.behaviour import Behaviour, draw_children, proposal_log_probs

TRIE = PrefixTrie(torch.tensor([[0, 1, 2], [0, 1, 3], [0, 2, 2], [1, 0, 0], [1, 0, 0], [2, 3, 1], [3, 0, 0]]))


@st.composite
def behaviours(draw: st.DrawFn) -> Behaviour:
    return Behaviour(
        temperature=draw(st.sampled_from((1.0, 0.3, 2.5)) | st.floats(0.05, 20)),
        top_k=draw(st.none() | st.integers(1, 9)),
        top_p=draw(st.none() | st.just(1.0) | st.floats(0.01, 0.99)),
        epsilon=draw(st.sampled_from((0.0, 0.0, 1.0)) | st.floats(0, 1)),
        epsilon_over=draw(st.sampled_from(("children", "items"))),
    )


@st.composite
def policies(draw: st.DrawFn) -> list[float]:
    """log-probs of children, some of them hidden, many of them alike."""
    # Quarters tie exactly, and 1/7 keeps their masses off the bounds of a nucleus.
    value = st.integers(-8, 8).map(lambda number: number / 4 + 1 / 7) | st.just(-math.inf)
    logits = draw(st.lists(value, min_size=1, max_size=9))
    total = math.fsum(math.exp(logit) for logit in logits)
    return [logit - math.log(total) if total else logit for logit in logits]


@settings(max_examples=300)
@given(policies(), behaviours(), st.data())
def test_a_proposal_is_what_its_definition_says(
    policy: list[float], behaviour: Behaviour, data: st.DataObject
) -> None:
    counts = [data.draw(st.integers(1, 50)) for _ in policy]
    expected = behaviour_by_definition(policy, behaviour, counts)
    log_probs = torch.tensor([policy], dtype=torch.float64)
    proposal = proposal_log_probs(log_probs, behaviour, torch.tensor([counts]))
    assert proposal.dtype == torch.float64
    torch.testing.assert_close(proposal[0].exp().tolist(), expected, rtol=0, atol=1e-12)


def test_ties_go_to_the_lower_child() -> None:
    even = torch.full((4,), 0.25).log()
    assert proposal_log_probs(even, Behaviour(top_k=2)).exp().tolist() == [0.5, 0.5, 0, 0]
    assert proposal_log_probs(even, Behaviour(top_p=0.4)).exp().tolist() == [0.5, 0.5, 0, 0]
    # The child that crosses is included.
    uneven = torch.tensor([0.1, 0.6, 0.3]).log()
    kept = proposal_log_probs(uneven, Behaviour(top_p=0.61)).isfinite()
    assert kept.tolist() == [False, True, True]


def test_epsilon_reaches_what_was_cut_off_and_nothing_that_is_hidden() -> None:
    policy = torch.tensor([0.7, 0.3, 0.0]).log()
    proposal = proposal_log_probs(policy, Behaviour(top_k=1, epsilon=0.2)).exp()
    torch.testing.assert_close(proposal, torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64))
    counts = torch.tensor([1, 3, 5])
    over_items = Behaviour(epsilon=1.0, epsilon_over="items")
    proposal = proposal_log_probs(policy, over_items, counts).exp()
    torch.testing.assert_close(proposal, torch.tensor([0.25, 0.75, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="item_count is None"):
        proposal_log_probs(policy, over_items)


@given(policies(), st.floats(0, 1, exclude_max=True))
def test_children_are_drawn_by_inverting_the_distribution(policy: list[float], number: float) -> None:
    drawn = int(draw_children(torch.tensor(policy, dtype=torch.float64), torch.tensor(number).double()))
    mass = [math.exp(value) for value in policy]
    if not any(mass):
        assert drawn == 0
        return
    assert mass[drawn] > 0
    target = float(torch.tensor(number)) * math.fsum(mass)
    assert math.fsum(mass[:drawn]) <= target + 1e-12 and target < math.fsum(mass[: drawn + 1]) + 1e-12


@pytest.mark.parametrize(
    ("given_", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, needs"),
        ({"temperature": "hot"}, TypeError, "temperature is a str"),
        ({"top_k": 0}, ValueError, "top_k is 0, needs at least 1"),
        ({"top_k": 2.0}, TypeError, "top_k is a float"),
        ({"top_k": True}, TypeError, "top_k is a bool"),
        ({"top_p": 0.0}, ValueError, "top_p is 0.0"),
        ({"top_p": 1.5}, ValueError, "top_p is 1.5"),
        ({"epsilon": -0.1}, ValueError, "epsilon is -0.1"),
        ({"epsilon": math.nan}, ValueError, "epsilon is nan"),
        ({"epsilon_over": "leaves"}, ValueError, "epsilon_over is 'leaves'"),
    ],
)
def test_bad_settings_name_themselves(given_: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Behaviour(**given_)
    with pytest.raises(error, match=message):
        ops.trie_sample(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), TRIE, **given_)


@pytest.mark.parametrize("backend", backends("trie_child_log_probs"))
@settings(max_examples=60)
@given(case=filtered(), behaviour=behaviours())
def test_a_step_is_drawn_from_its_proposal(backend: str, case: Filtered, behaviour: Behaviour) -> None:
    device = device_of(backend)
    trie = case.trie(device)
    nodes = case.nodes((case.contexts, 5)).to(device)
    logits = case.normals((case.contexts, 5, case.width)).to(device)
    seeds = torch.arange(case.contexts, device=device) - 1
    tokens, reached, log_probs = ops.trie_sample(
        logits,
        nodes,
        trie,
        temperature=behaviour.temperature,
        top_k=behaviour.top_k,
        top_p=behaviour.top_p,
        epsilon=behaviour.epsilon,
        epsilon_over=behaviour.epsilon_over,
        seeds=seeds,
        step=3,
        item_filter=case.filter(trie),
        backend=backend,
    )
    numbers = uniform(seeds.unsqueeze(1), 3, torch.arange(5, device=device))
    for context in range(case.contexts):
        left = case.left(context)
        for place in range(5):
            node = int(nodes[context, place])
            policy = case.policy(context, logits[context, place].tolist(), node)
            drawn = int(tokens[context, place])
            if not policy:
                assert (drawn, int(reached[context, place])) == (-1, -1)
                assert float(log_probs[context, place]) == 0
                continue
            children = case.children(context, node)
            assert children[drawn] == int(reached[context, place])
            torch.testing.assert_close(float(log_probs[context, place]), policy[drawn], rtol=0, atol=1e-9)
            counts = [
                len({case.kept[item] for item in case.oracle.under(child)} & left)
                for child in children.values()
            ]
            q = behaviour_by_definition(list(policy.values()), behaviour, counts)
            position, number = list(policy).index(drawn), float(numbers[context, place])
            assert q[position] > 0
            assert sum(q[:position]) <= number + 1e-9 and number < sum(q[: position + 1]) + 1e-9


@pytest.mark.parametrize("backend", backends("trie_sample"))
@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.5}])
def test_a_seeded_step_does_not_depend_on_its_batch(backend: str, knobs: dict[str, float]) -> None:
    device = device_of(backend)
    trie, generator = TRIE.to(device), torch.Generator().manual_seed(0)
    nodes = torch.randint(0, trie.num_nodes, (40,), generator=generator).to(device)
    logits = torch.randn(40, 4, generator=generator, dtype=torch.float64).to(device)
    seeds = torch.randint(-(2**63), 2**63 - 1, (40,), generator=generator).to(device)

    def drawn(rows: Tensor, step: int = 0) -> Tensor:
        return ops.trie_sample(
            logits[rows], nodes[rows], trie, seeds=seeds[rows], step=step, backend=backend, **knobs
        )[1]

    whole, order = drawn(torch.arange(40)), torch.randperm(40, generator=generator)
    assert torch.equal(drawn(order), whole[order])
    assert torch.equal(torch.cat([drawn(torch.tensor([row])) for row in range(40)]), whole)
    assert not torch.equal(drawn(torch.arange(40), step=1), whole)
    # As in one row of several draws, where the place takes part.
    several = ops.trie_sample(
        logits[:1].expand(5, -1).unsqueeze(0),
        nodes[:1].expand(1, 5),
        trie,
        seeds=seeds[:1],
        backend=backend,
        **knobs,
    )[1]
    assert several[0, 0] == whole[0]


def test_knobs_that_cut_nothing_off_draw_as_the_fused_kernel_does() -> None:
    generator = torch.Generator().manual_seed(1)
    nodes = torch.randint(0, TRIE.num_nodes, (500,), generator=generator)
    logits = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    for temperature in (1.0, 0.4):
        fused, made = (
            ops.trie_sample(logits, nodes, TRIE, temperature=temperature, seeds=torch.arange(500), top_k=k)
            for k in (None, 9)
        )
        for one, other in zip(fused, made, strict=True):
            torch.testing.assert_close(one, other)


def test_the_chance_of_a_step_is_found_as_documented() -> None:
    generator = torch.Generator().manual_seed(4)
    nodes = torch.zeros(4000, dtype=torch.int64)
    logits = torch.randn(4, generator=generator).expand(4000, -1)
    behaviour = Behaviour(temperature=0.7, top_k=2, epsilon=0.2)
    _, reached, _ = ops.trie_sample(
        logits, nodes, TRIE, temperature=0.7, top_k=2, epsilon=0.2, seeds=torch.arange(4000)
    )
    proposal = proposal_log_probs(ops.trie_child_log_probs(logits, nodes, TRIE), behaviour)
    chance = proposal.gather(1, (reached - TRIE.first_child[nodes]).unsqueeze(1)).exp().squeeze(1)
    # Each of the 4 children counts 1 / q as often as it is drawn.
    often = (1 / chance).sum() / 4000
    assert abs(float(often) - 4) < 4 * float((1 / chance).std()) / math.sqrt(4000)


def test_gradients_are_those_of_the_policy_whatever_draws() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    nodes = torch.zeros(3, dtype=torch.int64)
    tokens, _, log_probs = ops.trie_sample(
        leaves[0], nodes, TRIE, top_k=2, epsilon=0.5, seeds=torch.arange(3)
    )
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (log_probs * weight).sum().backward()
    expected = leaves[1].log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    (expected * weight).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_seeds_of_the_wrong_kind_name_themselves() -> None:
    logits, nodes = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)

    def sample(**given: Any) -> Any:
        return ops.trie_sample(logits, nodes, TRIE, **given)

    with pytest.raises(ValueError, match=r"seeds has shape \(3,\), needs \(2, 3\) or its first axes"):
        sample(seeds=torch.arange(3))
    with pytest.raises(TypeError, match=r"seeds has dtype torch\.float32"):
        sample(seeds=torch.zeros(2))
    with pytest.raises(TypeError, match="seeds is a int"):
        sample(seeds=4)
    with pytest.raises(ValueError, match="generator and seeds are both given"):
        sample(seeds=torch.arange(2), generator=torch.Generator())
    with pytest.raises(ValueError, match="step is -1"):
        sample(seeds=torch.arange(2), step=-1)


def _by_big_integers(seed: int, *places: int) -> int:
    """SplitMix64 as published, in integers of any size, once for the seed and once for each place."""
    mask = (1 << 64) - 1

    def mixed(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    bits = mixed((seed + 0x9E3779B97F4A7C15) & mask)
    for place in places:
        bits = mixed((bits + (place + 1) * 0x9E3779B97F4A7C15) & mask)
    return bits


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31), st.integers(-(2**31), 2**31), st.booleans())
def test_random_bits_are_those_of_the_published_generator(
    seed: int, place: int, other: int, tensors: bool
) -> None:
    at = (torch.tensor([place]), torch.tensor([other])) if tensors else (place, other)
    found = random_bits(torch.tensor([seed]), *at)
    assert int(found) % (1 << 64) == _by_big_integers(seed, place, other)
    assert float(uniform(torch.tensor([seed]), *at)) == (_by_big_integers(seed, place, other) >> 11) / 2**53


def test_the_first_number_of_seed_zero_is_the_published_one() -> None:
    assert int(random_bits(torch.tensor([0]))) % (1 << 64) == 0xE220A8397B1DCDAF


def _seeds() -> Tensor:
    return torch.arange(1 << 14) + 12345


NUMBERS: dict[str, Callable[..., Tensor]] = {
    "neighbouring seeds": lambda make: make(_seeds(), 0, 0),
    "steps": lambda make: make(torch.tensor(7), _seeds(), 0),
    "draws": lambda make: make(torch.tensor(-7), 2, _seeds()),
    "items": lambda make: make(torch.tensor(7), -1 - _seeds()),
}


@pytest.mark.parametrize("numbers", NUMBERS)
def test_low_and_high_bits_are_uniform_and_neighbours_are_independent(numbers: str) -> None:
    bits = NUMBERS[numbers](random_bits)
    for shift in (0, 4, 11, 12, 32, 60):
        counts = torch.bincount((bits >> shift) & 15, minlength=16)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    number = NUMBERS[numbers](uniform)
    assert float(number.min()) >= 0 and float(number.max()) < 1
    assert stats.kstest(number.numpy(), "uniform").pvalue > 1e-4
    for lag in (1, 2, 64):
        correlation = torch.corrcoef(torch.stack([number[:-lag], number[lag:]]))[0, 1]
        assert abs(float(correlation)) < 4 / math.sqrt(number.numel())
    pairs = (number[:-1] * 16).long() * 16 + (number[1:] * 16).long()
    assert stats.chisquare(torch.bincount(pairs, minlength=256).numpy()).pvalue > 1e-4
    # Each bit of a neighbour changes half of the time.
    changed = bits[:-1] ^ bits[1:]
    flips = torch.stack([(changed >> place) & 1 for place in range(64)]).double().mean(1)
    assert float((flips - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(changed.numel())


def test_no_two_places_share_their_bits() -> None:
    grid = torch.arange(32)
    bits = random_bits(grid.view(-1, 1, 1) - 16, grid.view(-1, 1) - 16, grid)
    assert bits.unique().numel() == 32**3


def test_gumbel_noise_is_gumbel_distributed_and_finite() -> None:
    noise = gumbel(_seeds(), 5)
    assert bool(noise.isfinite().all())
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 1e-4


def test_knobs_and_seeds_compile_as_one_graph() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    nodes, seeds = torch.tensor([0, 1, 2, 0, -1, 5]), torch.arange(6)

    def step(logits: Tensor, nodes: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.trie_sample(
            logits, nodes, TRIE, top_k=3, top_p=0.9, epsilon=0.1, epsilon_over="items", seeds=seeds, step=1
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for made, plain in zip(compiled(logits, nodes, seeds), step(logits, nodes, seeds), strict=True):
        torch.testing.assert_close(made, plain)
