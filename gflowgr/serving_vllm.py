"""vLLM's processor: `--logits-processors gflowgr.serving_vllm:TrieLogitsProcessor`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gflowgr.serving import configured

try:
    _Base: Any = importlib.import_module("vllm.v1.sample.logits_processor").LogitsProcessor
except ImportError:
    # vLLM only loads subclasses of its own; without it the class can be tested.
    _Base = object


class TrieLogitsProcessor(_Base):
    """Keeps the requests that ask for it (`extra_args={"gflowgr": 1}`) on the catalogue's trie.

    It follows `vllm.v1.sample.logits_processor.LogitsProcessor`: one object serves the whole batch, and rows
    are added, removed and moved through `update_state`.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._constraint = configured()
        # vLLM appends to these lists itself.
        self._written: dict[int, Sequence[int]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for a request that this processor cannot serve."""
        _asks(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Greedy decoding has to stay on the trie, too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows a change of the batch: removals, then additions, then moves (either way round)."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._written.pop(row, None)
        for row, sampling_params, _, written in batch_update.added:
            self._written.pop(row, None)
            if _asks(sampling_params):
                self._written[row] = written
        for source, target, direction in batch_update.moved:
            moved, replaced = self._written.pop(source, None), self._written.pop(target, None)
            if moved is not None:
                self._written[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self._written[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Log-probs in the place of the logits, in the rows that ask for it.

        Raises:
            ValueError: see `CatalogueConstraint.log_probs`.
        """
        if self._written:
            rows = list(self._written)
            log_probs = self._constraint.log_probs(logits[rows], list(self._written.values()))
            logits[rows] = log_probs.to(logits.dtype)
        return logits


def _asks(sampling_params: Any) -> bool:
    wish = (sampling_params.extra_args or {}).get("gflowgr", False)
    if wish not in (0, 1):
        raise ValueError(f"gflowgr is {wish!r}, needs 0 or 1")
    return bool(wish)
