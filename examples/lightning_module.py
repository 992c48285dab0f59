"""Lightning: the closed-form flows of a reward and a KL over the children, in a `training_step`.

python examples/lightning_module.py
"""

from __future__ import annotations

import logging
import warnings

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gflowgr import PrefixTrie, ops

USERS, LEVELS, CODES, ITEMS, WIDTH = 16, 3, 4, 40, 64


class FlowMatching(lightning.LightningModule):
    """Per-user policies whose flows are those of the rewards: no sampling, no learned Z."""

    def __init__(self, items: Tensor, log_rewards: Tensor) -> None:
        super().__init__()
        self.items, self.log_rewards = items, log_rewards
        self.trie = PrefixTrie(items)
        self.user, self.token = nn.Embedding(USERS, WIDTH), nn.Embedding(LEVELS * CODES, WIDTH)
        self.cell, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, LEVELS * CODES)
        self.curve: list[float] = []

    def forward(self, user: Tensor, tokens: Tensor) -> Tensor:
        seen = torch.cat([self.user(user).unsqueeze(1), self.token(tokens[:, :-1])], 1)
        return self.head(self.cell(seen)[0])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        user, item = batch
        tokens = self.items[item]
        log_flows = ops.trie_log_flows(self.log_rewards[user], self.trie)
        before = torch.cat([torch.zeros_like(user).unsqueeze(1), self.trie.walk(tokens)[:, :-1]], 1)
        loss = ops.flow_matching(self(user, tokens), before, self.trie, log_flows)
        self.curve.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=5e-3)


def main() -> None:
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    codes = torch.cartesian_prod(*[torch.arange(CODES)] * LEVELS)[torch.randperm(CODES**LEVELS)[:ITEMS]]
    items, log_rewards = codes + CODES * torch.arange(LEVELS), 2 * torch.randn(USERS, ITEMS)
    module = FlowMatching(items, log_rewards)
    pairs = torch.cartesian_prod(torch.arange(USERS), torch.arange(ITEMS))
    trainer = lightning.Trainer(
        max_epochs=30, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*pairs.T), batch_size=64, shuffle=True))

    user, item = pairs.T
    with torch.no_grad():
        log_probs = ops.trie_token_log_probs(module(user, items[item]), items[item], module.trie).sum(-1)
    distance = (log_probs.exp().view(USERS, ITEMS) - log_rewards.softmax(-1)).abs().sum(-1).mean() / 2
    print(f"KL {module.curve[0]:.3f} -> {module.curve[-1]:.4f} nats a step; total variation {distance:.4f}")
    assert module.curve[-1] < 0.05 * module.curve[0]
    assert distance < 0.05


if __name__ == "__main__":
    main()
