"""`torch.compile(fullgraph=True)` of a training step around the ops: the same curve as in eager mode.

python examples/compiled_step.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gflowgr import PrefixTrie, ops

USERS, LEVELS, CODES, WIDTH, STEPS, BATCH, TRAJECTORIES = 32, 3, 8, 32, 30, 16, 4
ITEMS = torch.cartesian_prod(*[torch.arange(CODES)] * LEVELS)[::3] + CODES * torch.arange(LEVELS)


class Policy(nn.Module):
    """A decoder of one causal attention layer over the user and the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.trie = PrefixTrie(ITEMS)
        self.user, self.token = nn.Embedding(USERS, WIDTH), nn.Embedding(LEVELS * CODES, WIDTH)
        self.project, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, LEVELS * CODES)

    def forward(self, user: Tensor, tokens: Tensor) -> Tensor:
        seen = torch.cat([self.user(user).unsqueeze(1), self.token(tokens[:, :-1])], 1)
        query, key, value = self.project(seen).chunk(3, -1)
        hidden = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True) + seen
        return ops.trie_linear_token_log_probs(hidden, self.head.weight, tokens, self.trie, self.head.bias)


class Step:
    """One step: SFT on each user's item, VarGrad over its trajectories, backward, SGD with momentum."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.parameters = policy, list(policy.parameters())
        self.momentum = [torch.zeros_like(parameter) for parameter in self.parameters]

    def __call__(self, user: Tensor, tokens: Tensor, log_rewards: Tensor) -> Tensor:
        log_probs = self.policy(user, tokens)
        vargrad = ops.log_partition_variance(log_probs, log_rewards, group_size=TRAJECTORIES)
        loss = 0.1 * vargrad - log_probs[::TRAJECTORIES].sum(-1).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_mul_(self.momentum, 0.9)
            torch._foreach_add_(self.momentum, gradients)
            torch._foreach_add_(self.parameters, self.momentum, alpha=-0.05)
        return loss.detach()


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    user = torch.randint(USERS, (BATCH,), generator=draw)
    item = torch.randint(len(ITEMS), (BATCH, TRAJECTORIES), generator=draw)
    item[:, 0] = 5 * user
    log_rewards = -(item - 5 * user.unsqueeze(1)).abs() / 20
    return user.repeat_interleave(TRAJECTORIES), ITEMS[item.flatten()], log_rewards.flatten()


def main() -> None:
    torch.manual_seed(0)
    # Without it, `torch.autograd.grad` ends a graph; the optimisers of torch.optim always do, by design.
    torch._dynamo.config.trace_autograd_ops = True
    policy = Policy()
    eager, twin = Step(policy), Step(copy.deepcopy(policy))
    compiled = torch.compile(twin, fullgraph=True)
    first, gap = 0.0, 0.0
    for step in range(STEPS):
        inputs = batch(step)
        expected, loss = float(eager(*inputs)), float(compiled(*inputs))
        first = expected if step == 0 else first
        gap = max(gap, abs(loss - expected))
    print(f"loss {first:.3f} -> {loss:.3f}; at most {gap:.1e} from eager mode's over {STEPS} steps")
    assert loss < 0.7 * first
    assert gap < 1e-4


if __name__ == "__main__":
    main()
