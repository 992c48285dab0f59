"""Language models that write items as semantic IDs: T5 and decoder-only, behind one forward."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from gflowgr.attention_masks import additive, causal, positions_of
from gflowgr.decoding import transformer_of
from gflowgr.ops._checks import at_least
from gflowgr.semantic_ids import BOS, EOS, PAD, SemanticIds
from gflowgr.trie import PrefixTrie

DECODER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_FORMAT = "gflowgr.GenerativeRecommender/1"
_DESCRIPTION, _IDS, _BASE = "gflowgr.json", "semantic_ids.safetensors", "base"


class Policy(NamedTuple):
    """What a forward returns: K trajectories a context, or W items of a whole history.

    Attributes:
        logits: (B, K, L, V) or (B, W, L, V); `logits[..., l, :]` predicts token l of the item, and means
            nothing where that token is -1.
        context: (B, D) or (B, W, D), the state of the model when it starts to write.
        hidden: (B, K, L, D) or (B, W, L, D), the states behind `logits`, which a learned flow reads.
    """

    logits: Tensor
    context: Tensor
    hidden: Tensor


class GenerativeRecommender(nn.Module):
    """A transformers model that writes items as semantic IDs.

    All work goes through `forward`, so DDP and FSDP wrap it as it is. The prefix trie and the token table
    follow the module's device.

    Args:
        model: T5 or decoder-only, plain or under PEFT; its vocabulary covers `semantic_ids`.
        semantic_ids: of the catalogue.
        history_length: the latest items of a history that the model reads.
        dropout: of embeddings and residual branches, for decoder families that have none of their own.

    Raises:
        TypeError: `model` is no transformers model.
        ValueError: an architecture that cannot serve, a vocabulary or context window that is too small.
    """

    def __init__(
        self,
        model: Any,
        semantic_ids: SemanticIds,
        *,
        history_length: int = 20,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.semantic_ids = semantic_ids
        self.history_length = history_length
        self.dropout = dropout
        self.trains_embeddings = False
        self._by_device: dict[torch.device, tuple[PrefixTrie, Tensor]] = {}
        self._check()
        config = self.config
        self.is_encoder_decoder = bool(config.is_encoder_decoder)
        self._pad = _special_token(config, "pad_token_id", PAD)
        self._eos = _special_token(config, "eos_token_id", EOS)
        self._bos = _special_token(config, "bos_token_id", self._eos)
        self._start = _special_token(config, "decoder_start_token_id", self._pad)
        self._equal_lengths = bool((semantic_ids.tokens >= 0).all())
        if dropout and not self.is_encoder_decoder:
            _add_dropout(self.transformer, dropout)

    def _check(self) -> None:
        transformer_of(self.model)
        if not isinstance(self.semantic_ids, SemanticIds):
            raise TypeError(f"semantic_ids is a {type(self.semantic_ids).__name__}, needs SemanticIds")
        if self.history_length < 1:
            raise ValueError(f"history_length is {self.history_length}, needs at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, needs a number from 0 to below 1")
        config = self.config
        if config.vocab_size < self.semantic_ids.vocab_size:
            raise ValueError(
                f"model has a vocabulary of {config.vocab_size} tokens, "
                f"semantic_ids needs {self.semantic_ids.vocab_size}"
            )
        window = getattr(config, "max_position_embeddings", None)
        needed = (self.history_length + 1) * self.semantic_ids.length
        if not config.is_encoder_decoder and window is not None and needed > window:
            raise ValueError(
                f"history_length {self.history_length} needs {needed} positions, the model has {window}"
            )

    @property
    def transformer(self) -> PreTrainedModel:
        """The transformers model, which PEFT may have adapted in place."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        return self.transformer.config

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def trie(self) -> PrefixTrie:
        """The prefix trie, on the module's device."""
        return self._catalogue(self.device)[0]

    def tokens(self, items: Tensor) -> Tensor:
        """Tokens (..., L) of items (...), -1 where the item or the token is padding."""
        table = self._catalogue(items.device)[1]
        return table[torch.where(items < 0, table.shape[0] - 1, items)]

    def _catalogue(self, device: torch.device) -> tuple[PrefixTrie, Tensor]:
        if device not in self._by_device:
            padding = self.semantic_ids.tokens.new_full((1, self.semantic_ids.length), -1)
            table = torch.cat([self.semantic_ids.tokens, padding]).to(device)
            self._by_device[device] = (self.semantic_ids.trie().to(device), table)
        return self._by_device[device]

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recomputes activations in the backward pass instead of keeping them; arguments as transformers'."""
        model = self.transformer
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs, **options)
        else:
            model.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        model = self.transformer
        if hasattr(model, "activation_checkpointing_disable"):
            model.activation_checkpointing_disable()
        else:
            model.gradient_checkpointing_disable()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`, by which older trainers ask for it."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    def forward(
        self,
        history: Tensor | None = None,
        trajectories: Tensor | None = None,
        *,
        items: Tensor | None = None,
    ) -> Policy:
        """Scores K trajectories of each context, or every item of whole histories.

        The model reads a context once, whatever K. More -1s anywhere in `history` change nothing.

        Args:
            history: (B, H) items, oldest first, -1 is padding.
            trajectories: (B, K) items to score.
            items: (B, W) whole histories, -1 pads their tails, instead of the other two; decoder-only models.
                Item w is predicted from the items before it.

        Raises:
            TypeError, ValueError: an argument is missing, or has the wrong type, shape or range.
        """
        if items is not None:
            if history is not None or trajectories is not None:
                raise ValueError("items came with history or trajectories, needs to be alone")
            return self._score_histories(self.checked("items", items))
        if history is None or trajectories is None:
            raise ValueError("forward got no items, so it needs history and trajectories")
        history = self.checked("history", history)
        trajectories = self.checked("trajectories", trajectories)
        if trajectories.shape[0] != history.shape[0]:
            raise ValueError(
                f"trajectories has {trajectories.shape[0]} rows, needs {history.shape[0]} like history"
            )
        score = self._score_with_encoder if self.is_encoder_decoder else self._score_after_prompt
        return score(history, self.tokens(trajectories))

    def _score_with_encoder(self, history: Tensor, tokens: Tensor) -> Policy:
        """All trajectories of a context are one decoder sequence in which none sees another.

        T5's position bias depends on distances alone, and within a trajectory those are as ever.
        """
        batch, trajectories, length = tokens.shape
        source, mask = self._source(history)
        start = tokens.new_full((batch, trajectories, 1), self._start)
        inputs = torch.cat([start, tokens[..., :-1].masked_fill(tokens[..., :-1] < 0, self._pad)], -1)
        visible = _apart(trajectories, length, tokens.device).expand(batch, -1, -1)
        output = self.transformer(
            input_ids=source,
            attention_mask=mask,
            decoder_input_ids=inputs.flatten(1),
            decoder_attention_mask=additive(visible, self.transformer.dtype),
            output_hidden_states=True,
            use_cache=False,
        )
        logits = output.logits.unflatten(1, (trajectories, length))
        hidden = output.decoder_hidden_states[-1].unflatten(1, (trajectories, length))
        return Policy(logits, _mean(output.encoder_last_hidden_state, mask), hidden)

    def _score_after_prompt(self, history: Tensor, tokens: Tensor) -> Policy:
        """The prompt once, then the trajectories side by side: each sees the prompt and itself alone."""
        batch, trajectories, length = tokens.shape
        prompt, real = self._prompt(history)
        width, written = prompt.shape[1], trajectories * (length - 1)
        written_tokens = tokens[..., :-1].flatten(1)
        inputs = torch.cat([prompt, written_tokens.masked_fill(written_tokens < 0, self._pad)], 1)
        steps = torch.arange(length - 1, device=tokens.device).repeat(trajectories)
        positions = torch.cat([positions_of(real), real.sum(1, keepdim=True) + steps], 1)
        visible = torch.zeros(batch, width + written, width + written, dtype=torch.bool, device=tokens.device)
        visible[:, :width, :width] = causal(real)
        visible[:, width:, :width] = real.unsqueeze(1)
        visible[:, width:, width:] = _apart(trajectories, length - 1, tokens.device)
        # Every trajectory's first token is predicted at the prompt's end, so that position is kept K times.
        own = width + torch.arange(written, device=tokens.device).view(trajectories, length - 1)
        kept = F.pad(own, (1, 0), value=width - 1).flatten()
        output = self.transformer(
            input_ids=inputs,
            attention_mask=additive(visible, self.transformer.dtype),
            position_ids=positions,
            logits_to_keep=kept,
            output_hidden_states=True,
            use_cache=False,
        )
        logits = output.logits.unflatten(1, (trajectories, length))
        states = output.hidden_states[-1]
        return Policy(logits, states[:, width - 1], states[:, kept].unflatten(1, (trajectories, length)))

    def _score_histories(self, items: Tensor) -> Policy:
        if self.is_encoder_decoder:
            raise ValueError(
                "items needs a decoder-only model; an encoder-decoder takes history and trajectories"
            )
        batch, width = items.shape
        window = getattr(self.config, "max_position_embeddings", None)
        if window is not None and width * self.semantic_ids.length > window:
            raise ValueError(
                f"items has {width} columns of {self.semantic_ids.length} tokens, "
                f"the model has {window} positions"
            )
        tokens = self.tokens(items).flatten(1)
        inputs = F.pad(tokens, (1, 0), value=self._bos)
        if not self._equal_lengths:
            inputs = _compact(inputs)
        inputs = inputs[:, :-1]
        output = self.transformer(
            input_ids=inputs.masked_fill(inputs < 0, self._pad), output_hidden_states=True, use_cache=False
        )
        logits, states = output.logits, output.hidden_states[-1]
        if not self._equal_lengths:
            real = tokens >= 0
            before = (real.cumsum(1) - real.long()).clamp(max=inputs.shape[1] - 1).unsqueeze(-1)
            logits = logits.gather(1, before.expand(-1, -1, logits.shape[-1]))
            states = states.gather(1, before.expand(-1, -1, states.shape[-1]))
        shape = (batch, width, self.semantic_ids.length, -1)
        hidden = states.view(shape)
        return Policy(logits.view(shape), hidden[:, :, 0], hidden)

    def inputs(self, history: Tensor) -> dict[str, Tensor]:
        """What a context is to the transformers model: `input_ids` and `attention_mask`, each (B, S)."""
        history = self.checked("history", history)
        tokens, real = self._source(history) if self.is_encoder_decoder else self._prompt(history)
        return {"input_ids": tokens, "attention_mask": real.long()}

    def _source(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's input, history and EOS, right-padded, and its mask."""
        return self._padded(_compact(F.pad(self._history_tokens(history), (0, 1), value=self._eos)))

    def _prompt(self, history: Tensor) -> tuple[Tensor, Tensor]:
        """A decoder's input, BOS and history, left-padded so that all end together, and its mask."""
        tokens = _compact(F.pad(self._history_tokens(history), (1, 0), value=self._bos).flip(1))
        tokens, real = self._padded(tokens)
        return tokens.flip(1), real.flip(1)

    def _history_tokens(self, history: Tensor) -> Tensor:
        real = history >= 0
        later = real.flip(1).cumsum(1).flip(1)
        return self.tokens(history.masked_fill(later > self.history_length, -1)).flatten(1)

    def _padded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Without columns of nothing but padding, where finding them does not wait for a device."""
        longest = 1 + self.history_length * self.semantic_ids.length
        if tokens.device.type == "cpu" and tokens.numel():
            longest = int((tokens >= 0).sum(1).max())
        tokens = tokens[:, :longest]
        real = tokens >= 0
        return tokens.masked_fill(~real, self._pad), real

    def checked(self, name: str, items: Any) -> Tensor:
        """`items` (B, n) as int64; TypeError or ValueError unless they are items of the catalogue or -1."""
        if not isinstance(items, Tensor) or items.dtype.is_floating_point or items.dtype == torch.bool:
            kind = items.dtype if isinstance(items, Tensor) else type(items).__name__
            raise TypeError(f"{name} is {kind}, needs a tensor of integers")
        if items.dim() != 2 or items.shape[1] == 0:
            raise ValueError(f"{name} has shape {tuple(items.shape)}, needs (contexts, at least one item)")
        # Elsewhere than on the CPU a look at the values would wait for the device.
        if items.device.type == "cpu" and items.numel():
            for item in (int(items.min()), int(items.max())):
                if not -1 <= item < self.semantic_ids.num_items:
                    raise ValueError(
                        f"{name} has the item {item}, needs 0 .. {self.semantic_ids.num_items - 1}, or -1"
                    )
        return items.long()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        base_weights: bool = True,
    ) -> None:
        """Writes the model as transformers or PEFT does, the semantic IDs, and what ties them together.

        Args:
            folder: made if it does not exist. Each file appears whole, the one that `load` starts from last.
            state_dict: of this module, gathered by a distributed trainer; by default its own.
            base_weights: under PEFT, whether to save the adapted model too. Without it, `load` takes that
                model from where `from_pretrained` did, as it is there.

        Raises:
            ValueError: `base_weights` is False but the model came from nowhere that can be named.
        """
        folder = Path(folder)
        adapted = hasattr(self.model, "peft_config")
        origin = self.config._name_or_path or None
        if adapted and not base_weights and origin is None:
            raise ValueError("base_weights is False, which needs a model that from_pretrained loaded")
        state = None
        if state_dict is not None:
            state = {key.removeprefix("model."): value for key, value in state_dict.items()}
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        try:
            if adapted:
                self._save_adapter(temporary, state, base_weights)
            else:
                self.model.save_pretrained(temporary, state_dict=state)
            self.semantic_ids.save(temporary / _IDS)
            description = {
                "format": _FORMAT,
                "trie": self.semantic_ids.trie().fingerprint,
                "history_length": self.history_length,
                "dropout": self.dropout,
                "adapted": adapted,
                "trains_embeddings": self.trains_embeddings,
                "base": None if base_weights or not adapted else origin,
            }
            (temporary / _DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
            _move_files(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _save_adapter(self, folder: Path, state: dict[str, Tensor] | None, base_weights: bool) -> None:
        self.model.save_pretrained(folder, state_dict=state, save_embedding_layers=self.trains_embeddings)
        # PEFT's model card is full of blanks, and would take the place of one written by hand.
        (folder / "README.md").unlink(missing_ok=True)
        if base_weights:
            self.transformer.save_pretrained(folder / _BASE, state_dict=_without_adapter(self.model, state))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        semantic_ids: SemanticIds | None = None,
        *,
        dtype: torch.dtype | None = None,
        attention: str | None = None,
        trainable: bool = True,
    ) -> GenerativeRecommender:
        """Reads what `save_pretrained` wrote.

        Args:
            folder: the checkpoint.
            semantic_ids: if given, what the checkpoint has to have been trained on.
            dtype: of the weights; by default as saved.
            attention: transformers' `attn_implementation`.
            trainable: whether an adapter's weights require gradients.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is damaged, or of another trie.
        """
        folder = Path(folder)
        description = _read_description(folder / _DESCRIPTION)
        saved = SemanticIds.load(folder / _IDS)
        if saved.trie().fingerprint != description["trie"]:
            raise ValueError(f"{folder}: {_IDS} does not match {_DESCRIPTION}, the checkpoint is damaged")
        if semantic_ids is not None and semantic_ids.trie().fingerprint != description["trie"]:
            raise ValueError(
                f"{folder}: a checkpoint of another trie: its fingerprint is {description['trie']}, "
                f"that of semantic_ids is {semantic_ids.trie().fingerprint}"
            )
        source = folder
        if description["adapted"]:
            source = description["base"] or folder / _BASE
        model = _load_transformer(source, dtype, attention)
        _extend_vocabulary(model, saved.vocab_size, seed=0)
        if description["adapted"]:
            from peft import PeftModel

            try:
                model = PeftModel.from_pretrained(model, folder, is_trainable=trainable)
            except SafetensorError as error:
                raise ValueError(f"{folder}: its adapter is not readable: {error}") from error
            if description["trains_embeddings"] and trainable:
                _train_embeddings(model.get_base_model())
        recommender = cls(
            model,
            semantic_ids or saved,
            history_length=description["history_length"],
            dropout=description["dropout"],
        )
        recommender.trains_embeddings = description["trains_embeddings"]
        return recommender


def build_t5(
    semantic_ids: SemanticIds,
    *,
    layers: int = 4,
    d_model: int = 128,
    heads: int = 6,
    d_kv: int = 64,
    d_ff: int = 1024,
    dropout: float = 0.1,
    history_length: int = 20,
    seed: int = 0,
    attention: str = "sdpa",
) -> GenerativeRecommender:
    """A T5 from scratch, by default of the shape of TIGER (arXiv 2305.05065) and LETTER (arXiv 2405.07314).

    It reads the tokens of the history and EOS. `layers` counts those of the encoder, and again those of the
    decoder; `attention` is transformers' `attn_implementation`.
    """
    _check_sizes(layers=layers, d_model=d_model, heads=heads, d_kv=d_kv, d_ff=d_ff)
    config = transformers.T5Config(
        vocab_size=semantic_ids.vocab_size,
        d_model=d_model,
        d_kv=d_kv,
        d_ff=d_ff,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=dropout,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    model = _from_config(transformers.AutoModelForSeq2SeqLM, config, seed, attention)
    return GenerativeRecommender(model, semantic_ids, history_length=history_length)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        at_least(name, size, 1)


def build_decoder(
    semantic_ids: SemanticIds,
    *,
    layers: int = 4,
    d_model: int = 128,
    heads: int = 4,
    key_value_heads: int | None = None,
    d_ff: int | None = None,
    dropout: float = 0.1,
    family: str = "llama",
    history_length: int = 20,
    max_positions: int = 2048,
    seed: int = 0,
    attention: str = "sdpa",
) -> GenerativeRecommender:
    """A small decoder-only model from scratch; it reads BOS and the tokens of the history.

    These families only know dropout of attention weights, so `dropout` besides acts on the embeddings and on
    what each attention and feed-forward block adds to the residual, as in the first transformers.

    Args:
        key_value_heads: fewer than `heads` for grouped-query attention.
        d_ff: width of the gated feed-forward layers, by default 4 * d_model.
        family: "llama", "mistral", "qwen2" or "qwen3".
        max_positions: longest sequence in tokens; whole histories need it too.
        attention: transformers' `attn_implementation`.

    Raises:
        ValueError: an unknown family, or sizes that do not fit together.
    """
    if family not in DECODER_FAMILIES:
        raise ValueError(
            f"family is {family!r}, needs one of {DECODER_FAMILIES}, or from_pretrained for others"
        )
    _check_sizes(layers=layers, d_model=d_model, heads=heads, history_length=history_length)
    if d_model % heads:
        raise ValueError(f"d_model is {d_model}, needs a multiple of heads, {heads}")
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=semantic_ids.vocab_size,
        hidden_size=d_model,
        head_dim=d_model // heads,
        intermediate_size=d_ff or 4 * d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads or heads,
        max_position_embeddings=max_positions,
        attention_dropout=dropout,
        sliding_window=None,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    model = _from_config(transformers.AutoModelForCausalLM, config, seed, attention)
    return GenerativeRecommender(model, semantic_ids, history_length=history_length, dropout=dropout)


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    semantic_ids: SemanticIds,
    *,
    history_length: int = 20,
    dropout: float = 0.0,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    seed: int = 0,
) -> GenerativeRecommender:
    """A pretrained T5 or decoder-only model, its vocabulary extended by the tokens of `semantic_ids`.

    Args:
        name_or_path: as transformers takes it.
        semantic_ids: its `first_token` is the size of the model's vocabulary, so that no word becomes a code.
        history_length: the latest items of a history that the model reads.
        dropout: of embeddings and residual branches of a decoder-only model.
        dtype: of the weights; by default as saved.
        attention: transformers' `attn_implementation`.
        seed: of the new embeddings.

    Raises:
        ValueError: `semantic_ids` starts inside the model's vocabulary.
    """
    model = _load_transformer(name_or_path, dtype, attention)
    size = model.config.vocab_size
    if semantic_ids.first_token < size:
        raise ValueError(
            f"semantic_ids starts at token {semantic_ids.first_token}, inside the model's vocabulary; "
            f"make it with first_token={size}"
        )
    _extend_vocabulary(model, semantic_ids.vocab_size, seed)
    recommender = GenerativeRecommender(model, semantic_ids, history_length=history_length, dropout=dropout)
    recommender.trains_embeddings = True
    return recommender


def add_lora(
    model: GenerativeRecommender,
    *,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
) -> GenerativeRecommender:
    """Freezes the model and adds low-rank adapters (LoRA, arXiv 2106.09685) through PEFT.

    Where `from_pretrained` extended the vocabulary, embeddings stay trainable: the new ones know nothing yet.

    Args:
        target_modules: names of the layers to adapt; by default PEFT's choice for the architecture.

    Raises:
        ValueError: the model has adapters already, or PEFT finds no such layers.
    """
    from peft import LoraConfig, get_peft_model

    if hasattr(model.model, "peft_config"):
        raise ValueError("model has adapters already")
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules if target_modules is None else list(target_modules),
        task_type="SEQ_2_SEQ_LM" if model.is_encoder_decoder else "CAUSAL_LM",
    )
    model.model = get_peft_model(model.model, config)
    if model.trains_embeddings:
        _train_embeddings(model.transformer)
    return model


def _special_token(config: Any, name: str, otherwise: int) -> int:
    """A model's own special token; some have several that end a text, some have none."""
    token = getattr(config, name, None)
    if isinstance(token, list):
        token = token[0] if token else None
    return otherwise if token is None else token


def _compact(tokens: Tensor) -> Tensor:
    """Each row's tokens at its front in their order, then its -1s."""
    return tokens.gather(1, (tokens < 0).long().argsort(dim=1, stable=True))


def _apart(trajectories: int, length: int, device: torch.device) -> Tensor:
    """Who sees whom (K * T, K * T) among trajectories laid end to end: each its own past only."""
    one = torch.ones(length, length, device=device).tril()
    return torch.kron(torch.eye(trajectories, device=device), one).bool()


def _mean(states: Tensor, real: Tensor) -> Tensor:
    """Mean over the real positions: (B, S, D), (B, S) -> (B, D)."""
    weight = real.unsqueeze(-1).to(states.dtype)
    return (states * weight).sum(1) / weight.sum(1)


def _add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Dropout on the embeddings and on what each block adds to the residual stream."""
    drop = partial(_drop, rate)
    model.get_input_embeddings().register_forward_hook(drop)
    for layer in model.get_decoder().layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def _drop(rate: float, module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (F.dropout(output[0], rate, module.training), *output[1:])
    return F.dropout(output, rate, module.training)


def _from_config(auto: Any, config: Any, seed: int, attention: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(config, attn_implementation=attention)


def _load_transformer(
    source: str | os.PathLike[str], dtype: torch.dtype | None, attention: str | None
) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(source)
    auto = (
        transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    )
    options = {} if attention is None else {"attn_implementation": attention}
    try:
        model, report = auto.from_pretrained(
            source, config=config, dtype=dtype or "auto", output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ValueError(f"{source}: its weights are not readable: {error}") from error
    # transformers fills in what is missing by random numbers and goes on.
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ValueError(
            f"{source}: {len(absent)} weights are missing or of another shape, such as {absent[0]}"
        )
    return model


def _extend_vocabulary(model: PreTrainedModel, size: int, seed: int) -> None:
    if model.config.vocab_size >= size:
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(size)


def _train_embeddings(model: PreTrainedModel) -> None:
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        embeddings.requires_grad_(True)


def _without_adapter(model: Any, state: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """The adapted model's own weights under the names they had before PEFT."""
    prefix = "base_model.model."
    own = {}
    for key, value in (model.state_dict() if state is None else state).items():
        if ".lora_" in key or ".modules_to_save." in key:
            continue
        for inserted in (".base_layer.", ".original_module."):
            key = key.replace(inserted, ".")
        own[key.removeprefix(prefix)] = value
    return own


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no checkpoint, {path.name} is missing")
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not a readable description: {error}") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise ValueError(f"{path}: needs the format {_FORMAT!r}")
    missing = sorted(
        {"trie", "history_length", "dropout", "adapted", "trains_embeddings", "base"} - set(description)
    )
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing")
    return description


def _move_files(source: Path, target: Path) -> None:
    """Moves all files of a folder into another, the description last: a checkpoint with it is whole."""
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda path: path.name == _DESCRIPTION):
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / file, target / file)
