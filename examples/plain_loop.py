"""A plain PyTorch loop: trajectory balance until each user's policy is that user's rewards, normalised.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gflowgr import PrefixTrie, ops

USERS, LEVELS, CODES, ITEMS = 2, 3, 4, 40
VOCABULARY = LEVELS * CODES


class Policy(nn.Module):
    """A recurrent decoder: the user's embedding starts it, each token of the item's path moves it on."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.user, self.token = nn.Embedding(USERS, width), nn.Embedding(VOCABULARY, width)
        self.cell, self.head = nn.GRU(width, width, batch_first=True), nn.Linear(width, VOCABULARY)
        self.log_z = nn.Embedding(USERS, 1)

    def forward(self, user: Tensor, tokens: Tensor) -> Tensor:
        """Logits of the tokens of a path and of the one after it: (B,), (B, t) -> (B, t + 1, V)."""
        seen = torch.cat([self.user(user).unsqueeze(1), self.token(tokens)], 1)
        return self.head(self.cell(seen)[0])


@torch.no_grad()
def sample_paths(policy: Policy, user: Tensor, trie: PrefixTrie, temperature: float) -> Tensor:
    """Token paths of items, drawn from the policy step by step: (B,) -> (B, L)."""
    nodes, tokens = torch.zeros_like(user), user.new_empty(len(user), 0)
    for _ in range(LEVELS):
        logits = policy(user, tokens)[:, -1]
        drawn, nodes, _ = ops.trie_sample(logits, nodes, trie, temperature=temperature)
        tokens = torch.cat([tokens, drawn.unsqueeze(1)], 1)
    return tokens


def main() -> None:
    torch.manual_seed(0)
    codes = torch.cartesian_prod(*[torch.arange(CODES)] * LEVELS)[torch.randperm(CODES**LEVELS)[:ITEMS]]
    items = codes + CODES * torch.arange(LEVELS)
    trie = PrefixTrie(items)
    log_rewards = torch.randn(USERS, ITEMS)
    item_of_node = torch.zeros(trie.num_nodes, dtype=torch.int64)
    item_of_node[trie.item_node.long()] = torch.arange(ITEMS)

    policy = Policy()
    slow = [parameter for name, parameter in policy.named_parameters() if not name.startswith("log_z")]
    optimiser = torch.optim.Adam(
        [{"params": slow}, {"params": policy.log_z.parameters(), "lr": 0.05}], lr=5e-3
    )
    for _ in range(400):
        user = torch.randint(USERS, (64,))
        tokens = sample_paths(policy, user, trie, temperature=1.5)
        reached = item_of_node[trie.walk(tokens)[:, -1]]
        loss = ops.trie_trajectory_balance(
            policy(user, tokens[:, :-1]), tokens, trie, log_rewards[user, reached], policy.log_z(user)[:, 0]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    for user in range(USERS):
        with torch.no_grad():
            logits = policy(torch.full((ITEMS,), user), items[:, :-1])
        log_probs = ops.trie_token_log_probs(logits, items, trie).sum(-1)
        distance = float((log_probs.exp() - log_rewards[user].softmax(-1)).abs().sum() / 2)
        print(f"user {user}: total variation from R / Z is {distance:.4f}")
        assert distance < 0.01


if __name__ == "__main__":
    main()
