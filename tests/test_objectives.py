"""The losses on trajectories against exact enumeration, and what they share."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gflowgr import PrefixTrie, ops
from gflowgr.objectives import TrajectoryBatch, diagnostics, gfn_loss, sft_loss

CONTEXTS, TRAJECTORIES, CODES, LEVELS = 3, 4, 3, 3
BALANCES = [
    ("tb", "exact"),
    ("tb", "estimated"),
    ("vargrad", "exact"),
    ("db", "exact"),
    ("subtb", "exact"),
    ("flow_matching", "exact"),
]


def catalogue() -> PrefixTrie:
    paths = [
        [level * CODES + code for level, code in enumerate(path)]
        for path in itertools.product(range(CODES), repeat=LEVELS)
    ]
    # Uneven: some subtrees lose items, and two items collide.
    kept = [path for number, path in enumerate(paths) if number % 4 != 1]
    return PrefixTrie([*kept, kept[0]])


def logits_of_flows(trie: PrefixTrie, tokens: torch.Tensor, log_flows: torch.Tensor) -> torch.Tensor:
    """Logits whose policy is F(child) / F(parent) along each trajectory."""
    contexts, trajectories, length = tokens.shape
    logits = torch.zeros(contexts, trajectories, length, CODES * LEVELS)
    before = torch.cat([torch.zeros(contexts, trajectories, 1, dtype=torch.long), trie.walk(tokens)], -1)
    for c, k, t in itertools.product(range(contexts), range(trajectories), range(length)):
        node = int(before[c, k, t])
        first, end = int(trie.first_child[node]), int(trie.first_child[node + 1])
        logits[c, k, t, trie.children(node).long()] = log_flows[c, first:end]
    return logits


@pytest.fixture
def setting() -> tuple[PrefixTrie, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    trie = catalogue()
    rewards = torch.randn(CONTEXTS, trie.num_items, generator=generator)
    paths = torch.stack(
        [
            torch.tensor(_path(trie, int(node)))
            for node in trie.item_node[torch.randint(trie.num_items, (12,), generator=generator)]
        ]
    )
    return trie, rewards, paths.view(CONTEXTS, TRAJECTORIES, LEVELS)


@st.composite
def tries(draw: st.DrawFn) -> list[list[int]]:
    """Rows of 1 to 3 tokens, some of them equal, some the beginning of others, padded with -1."""
    rows = draw(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=12))
    return [row + [-1] * (3 - len(row)) for row in rows]


def _path(trie: PrefixTrie, node: int) -> list[int]:
    path: list[int] = []
    while node:
        path.insert(0, int(trie.token[node]))
        node = int(trie.parent[node])
    return path


@pytest.mark.parametrize(("objective", "flows"), BALANCES)
def test_the_flows_policy_is_a_minimum_of_every_balance(setting, objective, flows) -> None:
    trie, rewards, tokens = setting
    log_flows = ops.trie_log_flows(rewards, trie)
    logits = logits_of_flows(trie, tokens, log_flows).requires_grad_()
    loss = gfn_loss(TrajectoryBatch(logits, tokens, trie, log_flows), objective, flows, 0.9)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-9
    assert float(logits.grad.abs().max()) < 1e-5


@pytest.mark.parametrize(("objective", "flows"), BALANCES)
def test_any_other_policy_has_a_positive_loss(setting, objective, flows) -> None:
    trie, rewards, tokens = setting
    log_flows = ops.trie_log_flows(rewards, trie)
    logits = logits_of_flows(trie, tokens, log_flows) + torch.randn(
        CONTEXTS, TRAJECTORIES, LEVELS, CODES * LEVELS, generator=torch.Generator().manual_seed(0)
    )
    assert float(gfn_loss(TrajectoryBatch(logits, tokens, trie, log_flows), objective, flows, 0.9)) > 0.05


@pytest.mark.parametrize("objective", ["tb", "db", "subtb"])
def test_learned_flows_that_are_right_are_as_good_as_exact_ones(setting, objective) -> None:
    trie, rewards, tokens = setting
    log_flows = ops.trie_log_flows(rewards, trie)
    logits = torch.randn(*tokens.shape, CODES * LEVELS, generator=torch.Generator().manual_seed(1))
    exact = TrajectoryBatch(logits, tokens, trie, log_flows)
    learned = TrajectoryBatch(logits, tokens, trie, log_flows, exact.exact_log_flows[..., :-1])
    torch.testing.assert_close(
        gfn_loss(learned, objective, "learned", 0.9), gfn_loss(exact, objective, "exact", 0.9)
    )


def test_log_reward_of_a_trajectory_sums_the_items_that_collide(setting) -> None:
    trie, rewards, _ = setting
    colliding = torch.tensor(_path(trie, int(trie.item_node[0]))).expand(CONTEXTS, 1, LEVELS)
    batch = TrajectoryBatch(
        torch.zeros(CONTEXTS, 1, LEVELS, CODES * LEVELS), colliding, trie, ops.trie_log_flows(rewards, trie)
    )
    expected = torch.logaddexp(rewards[:, 0], rewards[:, trie.num_items - 1])
    torch.testing.assert_close(batch.log_rewards[:, 0], expected)


def test_shorter_items_end_at_their_own_state() -> None:
    trie = PrefixTrie([[0, 2, 4], [0, 3, -1], [1, 2, 4]])
    rewards = torch.tensor([[0.1, 0.7, -0.4]])
    tokens = torch.tensor([[[0, 3, -1], [1, 2, 4]]])
    batch = TrajectoryBatch(torch.randn(1, 2, 3, 5), tokens, trie, ops.trie_log_flows(rewards, trie))
    torch.testing.assert_close(batch.log_rewards, rewards[:, 1:])
    shorter = TrajectoryBatch(batch.logits[..., :2, :], tokens[..., :2], trie, batch.log_flows)
    for objective in ("tb", "db", "subtb", "flow_matching"):
        first = TrajectoryBatch(batch.logits[:, :1], tokens[:, :1], trie, batch.log_flows)
        cut = TrajectoryBatch(shorter.logits[:, :1], tokens[:, :1, :2], trie, batch.log_flows)
        torch.testing.assert_close(
            gfn_loss(first, objective, "exact", 0.9), gfn_loss(cut, objective, "exact", 0.9)
        )


def test_supervised_loss_reads_the_observed_item_only(setting) -> None:
    trie, _, tokens = setting
    logits = torch.randn(
        *tokens.shape, CODES * LEVELS, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    loss = sft_loss(TrajectoryBatch(logits, tokens, trie))
    loss.backward()
    expected = -ops.trie_token_log_probs(logits[:, 0], tokens[:, 0], trie).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    assert not logits.grad[:, 1:].any() and logits.grad[:, 0].any()


def test_a_leaf_that_several_trajectories_reach_is_found_once(setting) -> None:
    trie, rewards, tokens = setting
    log_flows = ops.trie_log_flows(rewards, trie)
    colliding = torch.tensor(_path(trie, int(trie.item_node[0]))).expand(CONTEXTS, 1, LEVELS)
    tokens = torch.cat([colliding, tokens[:, 1:], tokens[:, 1:], colliding], 1)
    batch = TrajectoryBatch(torch.zeros(*tokens.shape, CODES * LEVELS), tokens, trie, log_flows)
    expected = 0.0
    for context in range(CONTEXTS):
        paths = [tuple(path) for path in tokens[context].tolist()]
        assert batch.repeated[context].tolist() == [path in paths[:k] for k, path in enumerate(paths)]
        items = [tuple(_path(trie, int(node))) for node in trie.item_node]
        shares = rewards[context].softmax(-1)
        expected += sum(float(shares[i]) for i, path in enumerate(items) if path in paths) / CONTEXTS
    assert diagnostics(batch)["reward_mass_found"] == pytest.approx(expected, rel=1e-5)


def test_diagnostics_tell_the_policys_entropy_and_the_mass_found(setting) -> None:
    trie, rewards, tokens = setting
    log_flows = ops.trie_log_flows(rewards, trie)
    uniform = TrajectoryBatch(torch.zeros(*tokens.shape, CODES * LEVELS), tokens, trie, log_flows)
    figures = diagnostics(uniform)
    fan_out = (trie.first_child[1:] - trie.first_child[:-1]).float()
    expected = fan_out[uniform.nodes[:, 0, :-1]].log().sum(-1).mean()
    assert figures["entropy"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["log_z"] == pytest.approx(float(rewards.logsumexp(-1).mean()), rel=1e-5)
    assert figures["reward_mass_found"] > 0


@settings(max_examples=60, deadline=None)
@given(rows=tries(), seed=st.integers(0, 2**32 - 1), learned=st.booleans())
def test_rewards_of_candidates_are_a_catalogue_in_which_nothing_else_has_one(
    rows: list[list[int]], seed: int, learned: bool
) -> None:
    """In float64 against the dense flows: loss, both gradients, flows along the trajectories, log Z."""
    generator = torch.Generator().manual_seed(seed)
    trie = PrefixTrie(rows)
    sequences, contexts, trajectories = trie.sequences().long(), 3, 2
    kept = int(torch.randint(1, trie.num_items + 1, (), generator=generator))
    candidates = torch.stack(
        [torch.randperm(trie.num_items, generator=generator)[:kept] for _ in range(contexts)]
    )
    # Far apart, so that a sum that is not scaled would overflow or vanish.
    rewards = 300 * torch.randn(contexts, kept, generator=generator, dtype=torch.float64)
    shape = (contexts, trajectories, trie.max_depth, trie.max_token + 1)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = sequences[torch.randint(trie.num_items, (contexts, trajectories), generator=generator)]
    rewards.requires_grad_(learned)
    nothing = torch.full((contexts, trie.num_items), -torch.inf, dtype=torch.float64)
    flows = ops.trie_log_flows(nothing.scatter(1, candidates, rewards), trie)
    dense = TrajectoryBatch(logits, tokens, trie, flows)
    sparse = TrajectoryBatch(
        logits, tokens, trie, candidates=sequences[candidates], candidate_log_rewards=rewards
    )
    torch.testing.assert_close(sparse.log_z, dense.log_z)
    torch.testing.assert_close(sparse.exact_log_flows, dense.exact_log_flows)
    wanted = [logits, rewards] if learned else [logits]
    expected = gfn_loss(dense, "flow_matching", "exact", 0.9)
    found = gfn_loss(sparse, "flow_matching", "exact", 0.9)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, wanted), torch.autograd.grad(expected, wanted), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)
