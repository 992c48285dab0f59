"""vLLM's processor: `--logits-processors gflowgr.serving_vllm:TrieLogitsProcessor`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gflowgr.serving import CatalogueConstraint, Wish, configured

try:
    _Base: Any = importlib.import_module("vllm.v1.sample.logits_processor").LogitsProcessor
except ImportError:
    # vLLM only loads subclasses of its own; without it the class can be tested.
    _Base = object


class TrieLogitsProcessor(_Base):
    """Keeps the requests that ask for it (`extra_args={"gflowgr": 1}`) on the catalogue's trie.

    `gflowgr_exclude` and `gflowgr_allow` beside it, lists of items, filter that request alone.

    It follows `vllm.v1.sample.logits_processor.LogitsProcessor`: one object serves the whole batch, and rows
    are added, removed and moved through `update_state`.
    """

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        self._constraint = configured()
        # vLLM appends to these lists itself.
        self._rows: dict[int, tuple[Sequence[int], Wish]] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for a request that this processor cannot serve."""
        _wish(sampling_params, configured())

    def is_argmax_invariant(self) -> bool:
        """Greedy decoding has to stay on the trie, too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows a change of the batch: removals, then additions, then moves (either way round)."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, sampling_params, _, written in batch_update.added:
            self._rows.pop(row, None)
            wish = _wish(sampling_params, self._constraint)
            if wish is not None:
                self._rows[row] = (written, wish)
        for source, target, direction in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and direction.name == "SWAP":
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """Log-probs in the place of the logits, in the rows that ask for it.

        Raises:
            ValueError: see `CatalogueConstraint.log_probs`.
        """
        if self._rows:
            rows = list(self._rows)
            written, wishes = zip(*self._rows.values(), strict=True)
            log_probs = self._constraint.log_probs(logits[rows], written, wishes)
            logits[rows] = log_probs.to(logits.dtype)
        return logits


def _wish(sampling_params: Any, constraint: CatalogueConstraint) -> Wish | None:
    """What a request asks for, None if it does not ask for the catalogue."""
    parameters = sampling_params.extra_args or {}
    asks = parameters.get("gflowgr", 0)
    if asks not in (0, 1):
        raise ValueError(f"gflowgr is {asks!r}, needs 0 or 1")
    return constraint.wish(parameters) if asks else None
