"""Items out of a generative recommender: beams, draws, draws without replacement."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gflowgr.contexts import Contexts
from gflowgr.decoding import evaluating
from gflowgr.ops._checks import at_least
from gflowgr.ops.behaviour import Behaviour
from gflowgr.processors import TrieLogitsProcessor, prefix_allowed_tokens
from gflowgr.scoring import score_all, target_log_probs
from gflowgr.search import Generated, beam_search, draw, draw_without_replacement
from gflowgr.trie import PrefixTrie

__all__ = [
    "Generated",
    "TrieLogitsProcessor",
    "generate",
    "prefix_allowed_tokens",
    "sample",
    "score_all",
    "target_log_probs",
]
METHODS = ("beam", "sample", "sample_without_replacement")


def generate(
    model: Any,
    inputs: Any,
    trie: PrefixTrie | None = None,
    *,
    num_items: int = 10,
    method: str = "beam",
    num_beams: int | None = None,
    exclude: Any = None,
    allow: Any = None,
    exclude_history: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    epsilon: float = 0.0,
    epsilon_over: str = "children",
    seeds: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Generated:
    """Items for each context, as a model writes them: the best, or draws from its policy.

    "beam": the most probable items, by `beam_search`. "sample": independent draws, by `draw`.
    "sample_without_replacement": distinct items, by `draw_without_replacement`. The encoder or the prompt
    runs once for a context; where one item is left the model is not asked.

    Args:
        model: a `GenerativeRecommender`, or a transformers model, plain or under LoRA: T5 or decoder-only.
            Left in the mode it was in.
        inputs: for a recommender histories (B, H), items, oldest first, -1 is padding, on any device. For
            another model a mapping with `input_ids` and `attention_mask` (B, S), padded on any side, or
            `input_ids` alone.
        trie: of the catalogue, its tokens those of the model; by default the recommender's. On another device
            than the model's it is copied there in every call.
        num_items: k, results a context.
        method: "beam", "sample" or "sample_without_replacement".
        num_beams: of beam search: prefixes to keep at each depth, by default max(20, k).
        exclude: items that a context must not get: (B, E) integers, -1 pads, or B lists.
        allow: the items that contexts may get, as `ItemFilter` takes them. Others are as if they were not in
            the trie: no beam is spent on them, and log-probabilities are over what is left.
        exclude_history: exclude the items of a recommender's histories.
        temperature, top_k, top_p, epsilon, epsilon_over: of draws, see `Behaviour`.
        seeds: of draws: integers (B,); a context's draws then depend on its own seed and inputs alone.
        generator: of draws: what seeds are drawn from where none are given; on any device.
        batch_size: contexts at a time; it changes no result.
        progress: show a bar.

    Returns:
        items and log-probabilities (B, k), on the device of the inputs.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or is of another method.
    """
    num_items = at_least("num_items", num_items, 1)
    batch_size = at_least("batch_size", batch_size, 1)
    behaviour = Behaviour(temperature, top_k, top_p, epsilon, epsilon_over)
    paths = num_items
    if method == "beam":
        paths = max(20, num_items) if num_beams is None else at_least("num_beams", num_beams, 1)
        if paths < num_items:
            raise ValueError(f"num_beams is {num_beams}, needs at least num_items, {num_items}")
        if not behaviour.is_policy or seeds is not None or generator is not None:
            raise ValueError(
                "method is 'beam', which draws nothing, so it needs no behaviour, seeds or generator"
            )
    elif method not in METHODS:
        raise ValueError(f"method is {method!r}, needs one of {METHODS}")
    elif num_beams is not None:
        raise ValueError(f"num_beams is {num_beams}, needs method='beam'")
    contexts = Contexts(model, inputs, trie)
    item_filter = contexts.item_filter(exclude, allow, exclude_history)
    row_seeds = None if method == "beam" else contexts.seeds(seeds, generator)

    def of_batch(rows: Tensor) -> Generated:
        writer = contexts.writer(rows, paths)
        rows = rows.to(contexts.trie.device)
        chosen = None if item_filter is None else item_filter.select(rows)
        if method == "beam":
            return beam_search(
                writer, contexts.trie, num_items=num_items, num_beams=paths, item_filter=chosen
            )
        search = draw if method == "sample" else draw_without_replacement
        return search(
            writer,
            contexts.trie,
            num_samples=num_items,
            item_filter=chosen,
            behaviour=behaviour,
            seeds=None if row_seeds is None else row_seeds[rows],
        )

    with evaluating(model):
        found = [(rows, of_batch(rows)) for rows in contexts.batches(batch_size, "generate", progress)]
    return _in_order(found, contexts, num_items)


def sample(
    model: Any,
    inputs: Any,
    num_samples: int,
    trie: PrefixTrie | None = None,
    **options: Any,
) -> Generated:
    """Draws items from the policy, independently: `generate` with method "sample" and `num_samples` items."""
    num_samples = at_least("num_samples", num_samples, 1)
    return generate(model, inputs, trie, num_items=num_samples, method="sample", **options)


def _in_order(found: list[tuple[Tensor, Generated]], contexts: Contexts, num_items: int) -> Generated:
    if not found:
        nothing = torch.empty(0, num_items, dtype=contexts.dtype, device=contexts.device)
        return Generated(nothing.long(), nothing)
    back = torch.cat([rows for rows, _ in found]).argsort()
    parts = zip(*(part for _, part in found), strict=True)
    whole: list[Any] = [
        None if part[0] is None else torch.cat(part)[back.to(part[0].device)] for part in parts
    ]
    return Generated(*whole).to(contexts.device)
