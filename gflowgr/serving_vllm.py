"""vLLM's processors, one for each of its model runners: `--logits-processors gflowgr.serving_vllm:...`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gflowgr.serving import CatalogueConstraint, Wish, configured


def _base(module: str) -> Any:
    """vLLM only loads subclasses of its own; without it the classes can be tested."""
    try:
        return importlib.import_module(module).LogitsProcessor
    except ImportError:
        return object


class TrieLogitsProcessor(_base("vllm.v1.sample.logits_processor")):  # type: ignore[misc]
    """For the V1 model runner: keeps requests with `extra_args={"gflowgr": 1}` on the catalogue's trie.

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


class TrieLogitsProcessorV2(_base("vllm.v1.worker.gpu.sample.logits_processor.interface")):  # type: ignore[misc]
    """For Model Runner V2: the same, from tokens that stay on the device.

    It follows that module's `LogitsProcessor`: requests keep a slot, rows of logits name theirs each step.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self._constraint, self._states = configured(), req_states
        self._wishes: dict[int, Wish] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raises ValueError for a request that this processor cannot serve."""
        _wish(sampling_params, configured())

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Takes a request into a slot, whatever was there before; whether it asks for the catalogue."""
        self._wishes.pop(req_idx, None)
        wish = _wish(sampling_params, self._constraint)
        if wish is not None:
            self._wishes[req_idx] = wish
        return wish is not None

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Log-probs in the place of the logits, in the rows that ask for it.

        Raises:
            ValueError: a request has several rows, as with speculative decoding; or see
                `CatalogueConstraint.log_probs_after`.
        """
        slots_of_rows = [int(slot) for slot in ctx.idx_mapping_np]
        asking = [row for row, slot in enumerate(slots_of_rows) if slot in self._wishes]
        if not asking:
            return logits
        if len(slots_of_rows) != len(logits):
            raise ValueError(
                f"logits has {len(logits)} rows for {len(slots_of_rows)} requests, needs one each; "
                "speculative decoding is not supported"
            )
        rows = torch.tensor(asking).to(logits.device, non_blocking=True)
        slots = ctx.expanded_idx_mapping[rows].long()
        written, prompts = self._states.all_token_ids.gpu, self._states.prompt_len.gpu[slots].long()
        # A prompt that is read in parts has rows before its end, whose draws are dropped.
        lengths = (ctx.pos[rows].long() + 1 - prompts).clamp(0, self._constraint.longest)
        steps = torch.arange(self._constraint.longest, device=logits.device)
        columns = (prompts.unsqueeze(1) + steps).clamp(max=written.shape[1] - 1)
        paths = written[slots.unsqueeze(1), columns].masked_fill(steps >= lengths.unsqueeze(1), -1)
        wishes = [self._wishes[slots_of_rows[row]] for row in asking]
        log_probs = self._constraint.log_probs_after(logits[rows], paths, lengths, wishes)
        logits[rows] = log_probs.to(logits.dtype)
        return logits


def _wish(sampling_params: Any, constraint: CatalogueConstraint) -> Wish | None:
    """What a request asks for, None if it does not ask for the catalogue."""
    parameters = sampling_params.extra_args or {}
    asks = parameters.get("gflowgr", 0)
    if asks not in (0, 1):
        raise ValueError(f"gflowgr is {asks!r}, needs 0 or 1")
    return constraint.wish(parameters) if asks else None
