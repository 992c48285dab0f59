"""Who sees whom among the positions of a batch, and how attention is told."""

from __future__ import annotations

import torch
from torch import Tensor


def causal(real: Tensor) -> Tensor:
    """Who sees whom (B, P, P) in a padded prompt; padding sees itself, as no row may see nothing."""
    width = real.shape[1]
    lower = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
    itself = torch.eye(width, dtype=torch.bool, device=real.device)
    return (lower & real.unsqueeze(1)) | itself


def positions_of(real: Tensor) -> Tensor:
    """Positions (B, P) of a prompt's tokens, of which padding counts none."""
    return (real.cumsum(1) - 1).clamp(min=0)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (B, queries, keys) as what attention adds to its scores: (B, 1, queries, keys)."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
