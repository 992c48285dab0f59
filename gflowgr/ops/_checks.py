"""What every op asks of its arguments before a kernel sees them."""

from __future__ import annotations

import operator
from typing import Any, Protocol

import torch
from torch import Tensor

from gflowgr import reference

REDUCTIONS = ("mean", "sum", "none")
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


class CatalogueFilter(reference.RowFilter, Protocol):
    """What the ops read of an `ItemFilter`."""

    @property
    def num_items(self) -> int: ...
    @property
    def excluded_items(self) -> Tensor: ...
    @property
    def allowed_items(self) -> Tensor | None: ...
    @property
    def num_nodes(self) -> int: ...
    def serves(self, trie: Any) -> bool: ...
    @property
    def device(self) -> torch.device: ...


class CatalogueTrie(reference.ItemTrie, Protocol):
    """What the ops read of a `PrefixTrie`."""

    @property
    def narrow_token(self) -> Tensor: ...
    @property
    def node_items(self) -> Tensor: ...
    @property
    def first_item(self) -> Tensor: ...
    @property
    def item_count(self) -> Tensor: ...
    @property
    def item_order(self) -> Tensor: ...
    @property
    def max_token(self) -> int: ...
    @property
    def max_depth(self) -> int: ...
    @property
    def num_items(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]: ...
    def is_same(self, other: Any) -> bool: ...


def tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, needs a torch.Tensor")
    return value


def floats(name: str, value: Any, dims: int) -> Tensor:
    value = tensor(name, value)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype}, needs one of float32, float64, bfloat16, float16")
    if value.dim() < dims:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, needs at least {dims} dimension(s)")
    return value


def integers(name: str, value: Any, shape: torch.Size) -> Tensor:
    value = tensor(name, value)
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name} has dtype {value.dtype}, needs integers")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, needs {tuple(shape)}")
    return value.to(torch.int64)


def shaped(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, needs {tuple(shape)}")
    return value


def per_trajectory(name: str, value: Any, like: Tensor) -> Tensor:
    """`value`, a number or one float for each trajectory, as a tensor of the shape and dtype of `like`."""
    if isinstance(value, (int, float)):
        return torch.full_like(like, value)
    value = floats(name, value, 0)
    same_device(name, value, like.device)
    if value.dim() and value.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, needs a scalar or {tuple(like.shape)}")
    return value.to(like.dtype).expand(like.shape)


def same_device(name: str, value: Any, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} is on {value.device}, needs {device} like the other arguments")


def is_on(here: torch.device, device: torch.device | str) -> bool:
    """Whether `device` names the device of tensors that say they are `here`: "cuda" is one with a number."""
    return here == torch.device(device) or here == torch.empty(0, device=device).device


def same_dtype(name: str, value: Tensor, dtype: torch.dtype) -> None:
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}, needs {dtype} like the other arguments")


def trie_for(trie: CatalogueTrie, device: torch.device, width: int | None = None) -> None:
    """Checks that `trie` is one, on that device, with tokens below `width`."""
    if not (hasattr(trie, "first_child") and hasattr(trie, "token_ranges")):
        raise TypeError(f"trie is a {type(trie).__name__}, needs a gflowgr.PrefixTrie")
    if trie.device != device:
        raise ValueError(f"trie is on {trie.device}, needs {device}; move it with trie.to({str(device)!r})")
    if width is not None and trie.max_token >= width:
        raise ValueError(
            f"trie has the token {trie.max_token}, needs tokens below the vocabulary's size, {width}"
        )


def at_least(name: str, value: Any, least: int) -> int:
    """An integer that is not below `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}, needs an integer")
    if value < least:
        raise ValueError(f"{name} is {value}, needs at least {least}")
    return operator.index(value)


def columns_for(trie: CatalogueTrie, first_token: int, columns: int) -> None:
    """Checks that columns for the tokens from `first_token` on serve at least one depth of the trie."""
    first_token = at_least("first_token", first_token, 0)
    if not any(first_token <= low and high < first_token + columns for low, high in trie.token_ranges):
        if not first_token:
            trie_for(trie, trie.device, columns)
        raise ValueError(
            f"logits has columns for the tokens {first_token} .. {first_token + columns - 1}, needs those of "
            f"at least one depth's range of tokens: {trie.token_ranges}"
        )


def filter_for(item_filter: CatalogueFilter | None, trie: CatalogueTrie, logits: Tensor, dims: int) -> None:
    """Checks that `item_filter` is one for that trie, with a row for each index of the first dimension."""
    if item_filter is None:
        return
    if not (hasattr(item_filter, "hidden_offsets") and hasattr(item_filter, "num_nodes")):
        raise TypeError(f"item_filter is a {type(item_filter).__name__}, needs a gflowgr.ItemFilter")
    if logits.dim() < dims:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, needs at least {dims} dimensions with an item_filter"
        )
    if item_filter.num_rows != logits.shape[0]:
        raise ValueError(
            f"item_filter has {item_filter.num_rows} rows, needs {logits.shape[0]}, the first size of logits"
        )
    if not item_filter.serves(trie):
        raise ValueError(
            f"item_filter is of another trie, of {item_filter.num_nodes} nodes, needs one of this trie, "
            f"which has {trie.num_nodes}; a filter is to be made anew when the catalogue changes"
        )
    same_device("item_filter", item_filter, logits.device)


def mask_like(mask: Any, like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}, needs torch.bool")
    same_device("mask", mask, like.device)
    return shaped("mask", mask, like.shape)


def reduction_name(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, needs one of {REDUCTIONS}")
    return reduction


def start_nodes(start: int | Tensor, tokens: Tensor) -> Tensor:
    if hasattr(start, "__index__") and not isinstance(start, Tensor):
        start = operator.index(start)
        nodes = tokens.new_zeros(tokens.shape[:-1])
        return nodes.fill_(start) if start else nodes
    start = integers("start", start, tokens.shape[:-1])
    same_device("start", start, tokens.device)
    return start


def number(name: str, value: Any) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}, needs a number")
    if not abs(value) < float("inf"):
        raise ValueError(f"{name} is {value}, needs a finite number")
    return float(value)


def in_shape(value: Tensor, shape: torch.Size) -> Tensor:
    """A view of that shape, or `value` itself if it has it: wrappers such as FSDP2 hook results."""
    return value if value.shape == shape else value.view(shape)


def as_paths(logits: Tensor) -> Tensor:
    """Logits (..., T, V) as (B, T, V); a view wherever the strides allow one."""
    if logits.dim() == 3:
        return logits
    return logits.unsqueeze(0) if logits.dim() == 2 else logits.flatten(0, -3)
