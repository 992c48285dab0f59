"""The policy as it was before training, which preference losses and KL penalties measure against."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from gflowgr.backbones import GenerativeRecommender


class ReferencePolicy:
    """A frozen copy of a recommender, without dropout and without gradients.

    It is no module, so that a module which holds it neither trains nor saves it, and no wrapper sees its
    parameters. Whoever holds it passes `apply` what moves itself.
    """

    def __init__(self, recommender: GenerativeRecommender) -> None:
        # The catalogue never changes, so both may read the same one.
        shared = (recommender.semantic_ids, recommender._by_device)
        self._recommender = copy.deepcopy(recommender, {id(part): part for part in shared})
        self._recommender.requires_grad_(False).eval()

    @torch.no_grad()
    def logits(self, history: Tensor, trajectories: Tensor) -> Tensor:
        """(C, H), (C, K) -> (C, K, L, V), as the recommender's own `Policy.logits`."""
        logits: Tensor = self._recommender(history, trajectories).logits
        return logits

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """What `nn.Module._apply` does: replaces each tensor, to move or to cast it."""
        self._recommender._apply(function)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self._recommender.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()
