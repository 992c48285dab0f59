"""DDP and FSDP2 in two processes: the losses of one process that has the whole batch.

`trie_linear_token_log_probs` reads the head's weight, so it is called in the wrapped module's forward: there
DDP tracks the weight, and FSDP2 has gathered it.

    python examples/ddp_and_fsdp2.py
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gflowgr import PrefixTrie, ops

PROCESSES, USERS, LEVELS, CODES, WIDTH, STEPS, BATCH = 2, 32, 3, 8, 32, 12, 64
ITEMS = torch.cartesian_prod(*[torch.arange(CODES)] * LEVELS)[::3] + CODES * torch.arange(LEVELS)


class Policy(nn.Module):
    """Trajectory balance of item paths, straight from the head's rows: (B,), (B, L), (B,) -> loss."""

    def __init__(self) -> None:
        super().__init__()
        self.trie = PrefixTrie(ITEMS)
        self.user, self.token = nn.Embedding(USERS, WIDTH), nn.Embedding(LEVELS * CODES, WIDTH)
        self.cell, self.head = nn.GRU(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, LEVELS * CODES)
        self.log_z = nn.Parameter(torch.zeros(1))  # FSDP2 shards no scalar

    def forward(self, user: Tensor, tokens: Tensor, log_rewards: Tensor) -> Tensor:
        hidden, _ = self.cell(torch.cat([self.user(user).unsqueeze(1), self.token(tokens[:, :-1])], 1))
        head = self.head
        log_probs = ops.trie_linear_token_log_probs(hidden, head.weight, tokens, self.trie, head.bias)
        return ops.trajectory_balance(log_probs, log_rewards, self.log_z.squeeze())


def train(wrapper: str, rank: int, processes: int) -> list[float]:
    """The mean loss of each step over all processes, each of which has its share of every batch."""
    torch.manual_seed(0)
    module: nn.Module = Policy()
    if wrapper == "ddp":
        module = DistributedDataParallel(module)
    elif wrapper == "fsdp2":
        fully_shard(module, mesh=init_device_mesh("cpu", (processes,)))
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    draw, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        user = torch.randint(USERS, (BATCH,), generator=draw)
        share = user[rank * BATCH // processes : (rank + 1) * BATCH // processes]
        loss = module(share, ITEMS[5 * share], share / USERS)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        mean = loss.detach().clone() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    curves = {wrapper: train(wrapper, rank, PROCESSES) for wrapper in ("ddp", "fsdp2")}
    if rank == 0:
        Path(folder, "losses.json").write_text(json.dumps(curves))
    dist.barrier()
    # Gloo's threads can abort or hang a process on its way out; what was to be shown is written by now.
    os._exit(0)


def main() -> None:
    alone = train("none", 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (folder,), PROCESSES)
        curves = json.loads(Path(folder, "losses.json").read_text())
    for wrapper, losses in curves.items():
        gap = max(abs(a / b - 1) for a, b in zip(losses, alone, strict=True))
        print(f"{wrapper}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, at most {gap:.1e} from one process's")
        assert gap < 1e-4
    assert alone[-1] < 0.5 * alone[0]


if __name__ == "__main__":
    main()
