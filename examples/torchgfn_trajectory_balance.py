"""torchgfn's trajectory balance on a catalogue, and ours on the trajectories that it drew: the same numbers.

python examples/torchgfn_trajectory_balance.py
"""

from __future__ import annotations

import torch
from gfn.env import DiscreteEnv
from gfn.estimators import DiscretePolicyEstimator
from gfn.gflownet import TBGFlowNet
from gfn.preprocessors import EnumPreprocessor
from gfn.samplers import Sampler
from gfn.states import DiscreteStates
from gfn.utils.modules import Tabular
from torch import Tensor, nn

from gflowgr import PrefixTrie, ops

LEVELS, CODES, ITEMS, STEPS = 3, 3, 20, 300
VOCABULARY = LEVELS * CODES


class Catalogue(DiscreteEnv):
    """A prefix trie as torchgfn has environments: states are its nodes, actions tokens, then one to exit."""

    def __init__(self, trie: PrefixTrie, log_rewards: Tensor) -> None:
        self.trie = trie
        self.log_reward_of_node = torch.full((trie.num_nodes,), -torch.inf)
        self.log_reward_of_node[trie.item_node.long()] = log_rewards
        self.allowed = torch.zeros(trie.num_nodes, VOCABULARY + 1, dtype=torch.bool)
        self.allowed[trie.parent[1:].long(), trie.token[1:].long()] = True
        self.allowed[:, -1] = ~self.allowed.any(-1)
        super().__init__(VOCABULARY + 1, torch.zeros(1, dtype=torch.int64), (1,), sf=torch.tensor([-1]))

    def make_states_class(self) -> type[DiscreteStates]:
        allowed = self.allowed

        class Nodes(super().make_states_class()):  # type: ignore[misc]
            def _compute_forward_masks(self) -> Tensor:
                return allowed[self.tensor.squeeze(-1).clamp(min=0)]

            def _compute_backward_masks(self) -> Tensor:
                return allowed.new_ones(*self.batch_shape, VOCABULARY)

        return Nodes

    def step(self, states: DiscreteStates, actions: object) -> DiscreteStates:
        reached = self.trie.walk(actions.tensor, start=states.tensor.squeeze(-1))
        return self.States(reached)

    def backward_step(self, states: DiscreteStates, actions: object) -> DiscreteStates:
        return self.States(self.trie.parent[states.tensor].long())

    def log_reward(self, states: DiscreteStates) -> Tensor:
        return self.log_reward_of_node[states.tensor.squeeze(-1)]


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    codes = torch.cartesian_prod(*[torch.arange(CODES)] * LEVELS)[torch.randperm(CODES**LEVELS)[:ITEMS]]
    trie, log_rewards = PrefixTrie(codes + CODES * torch.arange(LEVELS)), torch.randn(ITEMS)
    env = Catalogue(trie, log_rewards)
    nodes = EnumPreprocessor(lambda states: states.tensor.squeeze(-1))
    estimator = DiscretePolicyEstimator(Tabular(trie.num_nodes, VOCABULARY + 1), env.n_actions, nodes)
    theirs = TBGFlowNet(estimator, None, init_logZ=0.0, constant_pb=True)
    table, log_z = nn.Parameter(torch.zeros(trie.num_nodes, VOCABULARY)), nn.Parameter(torch.tensor(0.0))
    optimisers = [torch.optim.Adam(p, lr=0.05) for p in (list(theirs.parameters()), [table, log_z])]

    gap = 0.0
    for _ in range(STEPS):
        trajectories = Sampler(estimator).sample_trajectories(env, n=32)
        their_loss = theirs.loss(env, trajectories)
        tokens = trajectories.actions.tensor[:LEVELS].squeeze(-1).T
        visited = trajectories.states.tensor[: LEVELS + 1].squeeze(-1).T
        reward = env.log_reward_of_node[visited[:, -1]]
        loss = ops.trie_trajectory_balance(table[visited[:, :-1]], tokens, trie, reward, log_z)
        gap = max(gap, abs(float(their_loss.detach() / loss.detach()) - 1))
        for optimiser, each in zip(optimisers, (their_loss, loss), strict=True):
            optimiser.zero_grad()
            each.backward()
            optimiser.step()

    their_log_z, our_log_z, exact = (x.item() for x in (theirs.logZ, log_z, log_rewards.logsumexp(0)))
    print(f"losses at most {gap:.1e} apart (relative) over {STEPS} steps of two optimisers")
    print(f"log Z: torchgfn {their_log_z:.4f}, ours {our_log_z:.4f}, exact {exact:.4f}")
    assert gap < 1e-9 and abs(their_log_z - our_log_z) < 1e-9
    assert abs(our_log_z - exact) < 0.01


if __name__ == "__main__":
    main()
