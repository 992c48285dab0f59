"""The logits of a range of tokens: a language model's head, sliced to the columns that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

Scaling = Callable[[Any, Tensor], Tensor]


def _unscaled(config: Any, values: Tensor) -> Tensor:
    return values


def _t5_states(config: Any, states: Tensor) -> Tensor:
    """A T5 whose embeddings are its head scales the states in front of it."""
    scaled = getattr(config, "scale_decoder_outputs", None)
    scaled = config.tie_word_embeddings if scaled is None else scaled
    return states * config.d_model**-0.5 if scaled else states


def _soft_capped(config: Any, logits: Tensor) -> Tensor:
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


# What a family does to the states before its head and to the logits behind it. A family that is not here,
# such as mT5, whose scaling depends on the version of transformers, is asked for its logits itself.
_AROUND_HEADS: dict[str, tuple[Scaling, Scaling]] = {
    **dict.fromkeys(
        (
            "gemma",
            "gpt2",
            "gpt_neox",
            "llama",
            "mistral",
            "olmo2",
            "phi3",
            "qwen2",
            "qwen3",
            "smollm3",
        ),
        (_unscaled, _unscaled),
    ),
    "t5": (_t5_states, _unscaled),
    **dict.fromkeys(("gemma2", "gemma3_text"), (_unscaled, _soft_capped)),
    "granite": (_unscaled, lambda config, logits: logits / config.logits_scaling),
    "cohere": (_unscaled, lambda config, logits: logits * config.logit_scale),
}


def splits_off_its_head(model: PreTrainedModel) -> bool:
    """Whether `head_logits` knows what the model makes of its last hidden states."""
    hooked = hasattr(model, "_hf_hook") or bool(model._forward_hooks) or bool(model._forward_pre_hooks)
    return model.config.model_type in _AROUND_HEADS and not hooked


def head_logits(model: PreTrainedModel, states: Tensor, low: int, high: int) -> Tensor:
    """The model's logits of the tokens low..high: (..., D) last hidden states -> (..., high - low + 1).

    Only these rows of the head are multiplied, unless it is more than a matrix: under an adapter, or hooked.
    """
    before, after = _AROUND_HEADS[model.config.model_type]
    head = model.get_output_embeddings()
    states = before(model.config, states)
    if _is_a_matrix(head):
        bias = None if head.bias is None else head.bias[low : high + 1]
        logits = F.linear(states, head.weight[low : high + 1], bias)
    else:
        logits = head(states)[..., low : high + 1]
    return after(model.config, logits)


def _is_a_matrix(head: nn.Module) -> bool:
    hooked = hasattr(head, "_hf_hook") or bool(head._forward_hooks) or bool(head._forward_pre_hooks)
    # Subclasses and parametrised layers may do more than their weights say.
    return type(head) is nn.Linear and not hooked
