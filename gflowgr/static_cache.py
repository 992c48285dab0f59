"""A cache of keys and values that is written in place and can be wound back."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class StaticLayer(CacheLayerMixin):
    """The keys and values of a layer: (B, heads, capacity, d), allocated once and grown only if need be.

    `update` writes after what is there and returns views of all that is written. What lies beyond `length`
    belongs to nobody, so setting `length` back forgets the newest positions without touching memory.
    """

    is_sliding = False

    def __init__(self, capacity: int = 0) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def _allocate(self, states: Tensor) -> Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self.capacity, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            self.capacity = max(end, 2 * self.length)
            if self.is_initialized:
                kept_keys, kept_values = self.keys[:, :, : self.length], self.values[:, :, : self.length]
                self.lazy_initialization(key_states, value_states)
                self.keys[:, :, : self.length], self.values[:, :, : self.length] = kept_keys, kept_values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    # The name of `get_max_length` in the first releases of transformers 5.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.length = 0


class KeptLayer(StaticLayer):
    """Keys and values that are made once, kept as they came."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.length = key_states, value_states, key_states.shape[2]
        self.is_initialized = True
        return key_states, value_states


def cross_attention_cache() -> Cache:
    """A transformers cache of what an encoder's states are to each layer of a decoder."""
    return Cache(layer_class_to_replicate=KeptLayer)


def static_cache(capacity: int) -> Cache:
    """A transformers cache whose layers have room for `capacity` positions from the start."""
    return Cache(layer_class_to_replicate=partial(StaticLayer, capacity))


def rewind(cache: Cache, length: int) -> None:
    """Forgets all but the first `length` positions."""
    for layer in cache.layers:
        layer.length = length
