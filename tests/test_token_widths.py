"""Tokens are stored in 16 bits where they fit: a catalogue of large tokens is served as its small twin is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core_cases import backends, device_of
from torch import Tensor

from gflowgr import ItemFilter, PrefixTrie, ops

SHIFT = 2**16
ROWS = torch.randint(0, 6, (60, 3), generator=torch.Generator().manual_seed(0))
START = torch.tensor([[0, 1, 2], [3, 0, 9]])

# Each op on logits (2, 3, V), tokens (2, 3), a trie and a filter.
Op = Callable[[Tensor, Tensor, PrefixTrie, str], Tensor]
OPS: dict[str, Op] = {
    "trie_walk": lambda logits, tokens, trie, backend: trie.walk(tokens, backend=backend).double(),
    "trie_log_softmax": lambda logits, tokens, trie, backend: ops.trie_log_softmax(
        logits, START.to(logits.device), trie, backend=backend
    )[..., -6:],
    "trie_child_log_probs": lambda logits, tokens, trie, backend: ops.trie_child_log_probs(
        logits, START.to(logits.device), trie, backend=backend, item_filter=ItemFilter(trie, [[0, 1], [2]])
    ),
    "trie_token_log_probs": lambda logits, tokens, trie, backend: ops.trie_token_log_probs(
        logits, tokens, trie, backend=backend
    ),
    "trie_sample": lambda logits, tokens, trie, backend: torch.stack(
        [
            part.double() - (SHIFT if trie.max_token >= SHIFT and number == 0 else 0)
            for number, part in enumerate(
                ops.trie_sample(
                    logits,
                    START.to(logits.device),
                    trie,
                    backend=backend,
                    generator=torch.Generator(logits.device).manual_seed(0),
                )
            )
        ]
    ),
    "trie_trajectory_balance": lambda logits, tokens, trie, backend: ops.trie_trajectory_balance(
        logits, tokens, trie, torch.ones(2, device=logits.device), 0.0, reduction="none", backend=backend
    ),
    "trie_log_partition_variance": lambda logits, tokens, trie, backend: ops.trie_log_partition_variance(
        logits,
        tokens,
        trie,
        torch.ones(2, device=logits.device),
        group_size=2,
        reduction="none",
        backend=backend,
    ),
    "flow_matching": lambda logits, tokens, trie, backend: ops.flow_matching(
        logits,
        START.to(logits.device),
        trie,
        ops.trie_log_flows(torch.zeros(2, 60, device=logits.device), trie, backend=backend),
        reduction="none",
        backend=backend,
    ),
}


@pytest.mark.parametrize(
    ("op", "backend"),
    [pytest.param(op, *case.values, marks=case.marks) for op in OPS for case in backends(op)],
)
def test_large_tokens_are_served_as_small_ones(op: str, backend: str) -> None:
    device = device_of(backend)
    small, large = PrefixTrie(ROWS).to(device), PrefixTrie(ROWS + SHIFT).to(device)
    assert (small.narrow_token.dtype, large.narrow_token.dtype) == (torch.uint16, torch.int32)
    assert torch.equal(small.first_child, large.first_child)
    logits = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1)).to(device)
    wide = torch.zeros(2, 3, SHIFT + 6, device=device)
    wide[..., SHIFT:] = logits
    logits.requires_grad_()
    wide.requires_grad_()
    tokens = ROWS[[3, 41]].to(device)
    ours, theirs = OPS[op](logits, tokens, small, backend), OPS[op](wide, tokens + SHIFT, large, backend)
    torch.testing.assert_close(ours, theirs)
    if ours.requires_grad:
        finite = ~ours.isinf()
        grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2)).to(ours)
        for out in (ours, theirs):
            (torch.where(finite, out, 0.0) * grad).sum().backward()
        torch.testing.assert_close(logits.grad, wide.grad[..., SHIFT:])
        assert not wide.grad[..., :SHIFT].any()
