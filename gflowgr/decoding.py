"""transformers models as writers of items: one reading of the inputs, then a tree of cached steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import Cache

from gflowgr.attention_masks import additive, causal, positions_of
from gflowgr.heads import head_logits, splits_off_its_head
from gflowgr.static_cache import cross_attention_cache, rewind, static_cache

ENCODER_DECODERS = ("t5", "mt5")
# Their first position is not 0 but one after the padding token's number.
_FROM_PADDING = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


class Mark(NamedTuple):
    """Where a writer stands; `rewind` takes it back there while the cache still has what was written then.

    Attributes:
        depth: tokens written on each path.
        visible: bool (B, n, T), the cached positions that a path's next token may attend to.
        depths: int64 (T,), tokens on the path up to each cached position; -1 for a prompt.
    """

    depth: int
    visible: Tensor
    depths: Tensor


class TreeWriter:
    """Writes items token by token on many paths of each context.

    The paths of a context form a tree in the cache, where a token attends to its own ancestors: nothing is
    copied or reordered for a path, and the keys and values of the inputs exist once. Made by `tree_writer`.

    Attributes:
        logits: (B, 1, W) of the first token. At depth d the last axis of logits are the tokens
            `token_ranges[d][0]` to `token_ranges[d][1]`, inclusively.
    """

    logits: Tensor

    def __init__(self, transformer: PreTrainedModel, token_ranges: Sequence[tuple[int, int]]) -> None:
        self.transformer, self.token_ranges = transformer, token_ranges
        self._splits_head = splits_off_its_head(transformer)

    def extend(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Writes one more token on n paths of each context and stands at their ends.

        Args:
            tokens: int64 (B, n).
            parents: int64 (B, n), the paths of the step before that they continue.

        Returns:
            logits (B, n, W) of the tokens to follow.

        Raises:
            RuntimeError: in training mode, where gradient checkpointing would drop the cache.
            ValueError: the paths are written to their ends already.
        """
        _require_evaluation(self.transformer)
        depth, visible, depths = self._mark
        if depth + 1 >= len(self.token_ranges):
            raise ValueError(f"paths have all but the last of {depth + 1} tokens, after which no logits come")
        batch, paths = tokens.shape
        own = torch.eye(paths, dtype=torch.bool, device=tokens.device).expand(batch, -1, -1)
        ancestors = visible.gather(1, parents.unsqueeze(-1).expand(-1, -1, visible.shape[-1]))
        # A path's root is at depth 0, and so is the start token that an encoder-decoder writes after.
        written = depths.new_full((paths,), depth + self._first_depth)
        self._mark = Mark(depth + 1, torch.cat([ancestors, own], -1), torch.cat([depths, written]))
        with torch.no_grad():
            return self._logits(self._run(tokens), self.token_ranges[depth + 1])

    @property
    def mark(self) -> Mark:
        return self._mark

    def rewind(self, mark: Mark) -> None:
        """Forgets what was written after `mark`; whatever is written next takes its place in the cache."""
        rewind(self._written, mark.depths.numel())
        self._mark = mark

    _mark: Mark
    _written: Cache
    _first_depth: int

    def _run(self, tokens: Tensor) -> Any:
        """The transformer's output for new tokens (B, n), to which `_mark` applies already."""
        raise NotImplementedError

    def _logits(self, output: Any, token_range: tuple[int, int]) -> Tensor:
        low, high = token_range
        if self._splits_head:
            return head_logits(self.transformer, output.last_hidden_state, low, high)
        logits: Tensor = output.logits[..., low : high + 1]
        return logits


class _EncoderDecoderWriter(TreeWriter):
    """T5's position bias depends on distances alone, so paths may lie side by side in one sequence."""

    _first_depth = 1

    def __init__(
        self,
        transformer: PreTrainedModel,
        source: Tensor,
        real: Tensor,
        token_ranges: Sequence[tuple[int, int]],
        capacity: int,
    ) -> None:
        super().__init__(transformer, token_ranges)
        self._source_mask = real.long()
        self._states = transformer.get_encoder()(
            input_ids=source, attention_mask=self._source_mask, return_dict=True
        ).last_hidden_state
        self._written = static_cache(1 + capacity)
        self._cache = EncoderDecoderCache(self._written, cross_attention_cache())
        batch, device = source.shape[0], source.device
        start = source.new_full((batch, 1), _start_token(transformer.config))
        self._mark = Mark(
            0,
            torch.ones(batch, 1, 1, dtype=torch.bool, device=device),
            torch.zeros(1, dtype=torch.long, device=device),
        )
        self.logits = self._logits(self._decode(start, None), token_ranges[0])

    def _run(self, tokens: Tensor) -> Any:
        paths, depths = tokens.shape[1], self._mark.depths
        mask = additive(self._mark.visible, self.transformer.dtype)
        return self._decode(tokens, mask + self._position_bias_of_tree(depths, paths))

    def _decode(self, tokens: Tensor, mask: Tensor | None) -> Any:
        model = self.transformer
        if not self._splits_head:
            return model(
                encoder_outputs=(self._states,),
                attention_mask=self._source_mask,
                decoder_input_ids=tokens,
                decoder_attention_mask=mask,
                past_key_values=self._cache,
                use_cache=True,
                return_dict=True,
            )
        return model.get_decoder()(
            input_ids=tokens,
            attention_mask=mask,
            encoder_hidden_states=self._states,
            encoder_attention_mask=self._source_mask,
            past_key_values=self._cache,
            use_cache=True,
            return_dict=True,
        )

    def _position_bias_of_tree(self, depths: Tensor, paths: int) -> Tensor:
        """What to add to T5's position bias, which counts cached positions, to make it count depths.

        (1, heads, paths, T) for queries that are the last `paths` of the positions.
        """
        attention = self.transformer.get_decoder().block[0].layer[0].SelfAttention
        size = depths.numel()
        # A decoder's bias depends on the way back to a key alone, so one column of it has them all.
        by_distance = attention.compute_bias(size, 1)[0, :, :, 0]
        places = torch.arange(size, device=depths.device)
        counted = (places[-paths:].unsqueeze(1) - places).clamp(min=0)
        meant = (depths[-paths:].unsqueeze(1) - depths).clamp(min=0)
        return (by_distance[:, meant] - by_distance[:, counted]).unsqueeze(0)


class _DecoderWriter(TreeWriter):
    """Reads a prompt, padded anywhere, and goes on from each row's last real token."""

    _first_depth = 0

    def __init__(
        self,
        transformer: PreTrainedModel,
        prompt: Tensor,
        real: Tensor,
        token_ranges: Sequence[tuple[int, int]],
        capacity: int,
    ) -> None:
        super().__init__(transformer, token_ranges)
        width = prompt.shape[1]
        self._lengths = real.sum(1)
        self._written = static_cache(width + capacity)
        self._mark = Mark(0, real.unsqueeze(1), torch.full((width,), -1, device=prompt.device))
        full = bool(real.all())
        last = real.long().cumsum(1).argmax(1)
        # Without padding the model's own causal mask is right, and attention is faster by it.
        mask = None if full else additive(causal(real), transformer.dtype)
        # One token's logits are asked for, not the whole prompt's, of a model that computes them itself.
        kept = {"logits_to_keep": last.unique()} if "logits_to_keep" in _parameters(transformer) else {}
        output = self._forward(prompt, mask, positions_of(real), {} if self._splits_head else kept)
        if self._splits_head:
            output.last_hidden_state = _row_entries(output.last_hidden_state, last)
        else:
            places = torch.searchsorted(kept["logits_to_keep"], last) if kept else last
            output.logits = _row_entries(output.logits, places)
        self.logits = self._logits(output, token_ranges[0])

    def _run(self, tokens: Tensor) -> Any:
        after_prompt = (self._lengths + self._mark.depth - 1).unsqueeze(1).expand(-1, tokens.shape[1])
        return self._forward(tokens, additive(self._mark.visible, self.transformer.dtype), after_prompt, {})

    def _forward(
        self, tokens: Tensor, mask: Tensor | None, position_ids: Tensor, options: dict[str, Any]
    ) -> Any:
        model = self.transformer.base_model if self._splits_head else self.transformer
        return model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self._written,
            use_cache=True,
            return_dict=True,
            **options,
        )


def tree_writer(
    model: Any, inputs: Any, token_ranges: Sequence[tuple[int, int]], *, capacity: int = 0
) -> TreeWriter:
    """Reads inputs with a model, which is then ready to write.

    Args:
        model: a transformers model, plain or adapted by LoRA: T5, mT5, or a decoder of full attention that
            `position_ids` tell where a token stands (Llama, Mistral, Qwen, Gemma, Phi, OLMo, GPT-2 and most
            others; not BLOOM, MPT, RoBERTa or a state space model).
        inputs: what the model reads: a mapping with `input_ids` (B, S) and, if there is padding on any side,
            `attention_mask` (B, S); or `input_ids` alone, of which the model's padding token is then padding.
        token_ranges: for each depth, the smallest and the largest token that is written there, as a trie's.
        capacity: tokens that a context will write on all its paths, for which room is made at once; more are
            allowed.

    Raises:
        TypeError: `model` is no transformers model, `inputs` are no integers.
        ValueError: an architecture that cannot write a tree of paths, inputs of a wrong shape or with an
            empty row, more positions than the model has or sees at a time.
        RuntimeError: the model is training.
    """
    transformer = transformer_of(model)
    _require_evaluation(transformer)
    tokens, real = read_inputs(transformer, inputs)
    config = transformer.config
    with torch.no_grad():
        if config.is_encoder_decoder:
            return _EncoderDecoderWriter(transformer, tokens, real, token_ranges, capacity)
        _check_window(config, int(real.sum(1).max()) + len(token_ranges) - 1)
        return _DecoderWriter(transformer, tokens, real, token_ranges, capacity)


def transformer_of(model: Any) -> PreTrainedModel:
    """The transformers model in `model`, which PEFT may have adapted in place, if it can write.

    Raises:
        TypeError: there is none.
        ValueError: its architecture, or its adapter, cannot write a tree of paths.
    """
    adapted = hasattr(model, "get_base_model")
    transformer = model.get_base_model() if adapted else model
    if not isinstance(transformer, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}, needs a transformers or PEFT model")
    if adapted and model.active_peft_config.peft_type != "LORA":
        raise ValueError(f"model is adapted by {model.active_peft_config.peft_type}, needs LORA or none")
    config = transformer.config
    if config.is_encoder_decoder and config.model_type not in ENCODER_DECODERS:
        raise ValueError(f"model is a {config.model_type}, needs one of {ENCODER_DECODERS} or a decoder")
    if not config.is_encoder_decoder:
        _require_positions(transformer)
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        # Others take no mask of who sees whom, and paths side by side would see each other.
        raise ValueError(f"model has attn_implementation {attention!r}, needs 'sdpa' or 'eager'")
    if transformer.get_output_embeddings() is None:
        raise ValueError(f"model is a {type(transformer).__name__}, needs one with a language modelling head")
    return transformer


def _require_positions(transformer: PreTrainedModel) -> None:
    """Raises ValueError for a decoder to which `position_ids` and a mask do not say where a token stands.

    Paths side by side share a cache, in which a token's place is not its position.
    """
    config = transformer.config
    layers = {
        *(getattr(config, "layer_types", None) or ()),
        *(getattr(config, "attention_layers", None) or ()),
    }
    other = layers - {"full_attention", "sliding_attention", "global"}
    if other:
        raise ValueError(f"model has layers of {sorted(other)[0]}, needs attention to all positions")
    if config.model_type in _FROM_PADDING:
        raise ValueError(f"model is a {config.model_type}, which counts positions from its padding token on")
    if getattr(config, "alibi", False):
        raise ValueError(f"model is a {config.model_type} with alibi, which takes no position_ids")
    taken = inspect.signature(type(transformer).forward).parameters
    for name in ("position_ids", "past_key_values"):
        if name not in taken:
            raise ValueError(f"model is a {config.model_type}, needs a decoder whose forward takes {name}")


def read_inputs(transformer: PreTrainedModel, inputs: Any) -> tuple[Tensor, Tensor]:
    """`input_ids` (B, S) on the model's device, and which of them are real: bool (B, S)."""
    mask = None
    tokens = inputs
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise ValueError(f"inputs has {sorted(inputs)}, needs input_ids")
        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"inputs has input_ids of {kind}, needs a tensor of integers")
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ValueError(f"inputs has input_ids of shape {tuple(tokens.shape)}, needs (contexts, tokens)")
    if mask is None:
        padding = getattr(transformer.config, "pad_token_id", None)
        ends = getattr(transformer.config, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        real = torch.ones_like(tokens, dtype=torch.bool)
        # A model that pads by its end token leaves no way to tell them apart.
        if padding is not None and padding not in ends:
            real = tokens != padding
    elif not isinstance(mask, Tensor):
        raise TypeError(f"inputs has an attention_mask of {type(mask).__name__}, needs a tensor")
    elif mask.shape != tokens.shape:
        raise ValueError(
            f"inputs has an attention_mask of shape {tuple(mask.shape)}, needs that of input_ids, "
            f"{tuple(tokens.shape)}"
        )
    else:
        real = mask != 0
    if not bool(real.any(1).all()):
        raise ValueError(f"inputs has nothing but padding in row {int(real.any(1).int().argmin())}")
    return tokens.long().to(transformer.device), real.to(transformer.device)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout, every module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _require_evaluation(transformer: PreTrainedModel) -> None:
    if transformer.training:
        raise RuntimeError("writing needs the model in eval mode, it is training")


def _check_window(config: Any, needed: int) -> None:
    names = ["max_position_embeddings"]
    if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        names.append("sliding_window")
    for name in names:
        # 0 and -1 are some families' way to say that there is none.
        window = getattr(config, name, None)
        if window is not None and 0 < window < needed:
            raise ValueError(f"inputs and an item need {needed} positions, the model's {name} is {window}")


def _start_token(config: Any) -> int:
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "pad_token_id", None) if start is None else start
    if start is None:
        raise ValueError("model has no decoder_start_token_id and no pad_token_id, needs one to start with")
    return int(start)


def _parameters(transformer: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(transformer.forward).parameters


def _row_entries(values: Tensor, places: Tensor) -> Tensor:
    """One entry of each row, (B, T, D), (B,) -> (B, 1, D)."""
    return values.gather(1, places.view(-1, 1, 1).expand(-1, 1, values.shape[-1]))
