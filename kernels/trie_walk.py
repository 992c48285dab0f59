"""The node after each token of item paths."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import WALK_TILE, kernel, launch, strided
from ._trie import children, find_child, rows_of_program


@kernel
def _walk(
    tokens,
    batch_stride: tl.int64,
    step_stride: tl.int64,
    start,
    start_stride: tl.int64,
    first_child,
    token,
    num_nodes: tl.int32,
    nodes,
    batches: tl.int64,
    steps: tl.int32,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch, exists = rows_of_program(batches, ROWS)
    node = tl.load(start + batch * start_stride, mask=exists, other=-1)
    path = tokens + batch * batch_stride
    out = nodes + batch * steps
    for _ in range(steps):
        wanted = tl.load(path, mask=exists, other=-1)
        first, end = children(node, first_child, num_nodes)
        node = find_child(first, end, wanted, token, BLOCK)
        tl.store(out, node, mask=exists)
        path += step_stride
        out += 1


def trie_walk(tokens: Tensor, start: Tensor, first_child: Tensor, token: Tensor) -> Tensor:
    nodes = torch.empty(tokens.shape, dtype=torch.int64, device=tokens.device)
    launch(
        _walk,
        tokens.shape[0],
        *strided(tokens, 2),
        *strided(start),
        first_child,
        token,
        token.numel(),
        nodes,
        *tokens.shape,
        **WALK_TILE._asdict(),
    )
    return nodes
