"""Items as callers name them: lists, padded tensors and masks, as checked tensors of item ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rows_of_items(name: str, given: Any, num_items: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The rows and the items of every entry of (B, E) integers, or of B lists of items, and B.

    Raises:
        TypeError, ValueError: `given` is no such thing, or an item is out of range; the message has `name`.
    """
    if not isinstance(given, (Tensor, np.ndarray)):
        lists = _lists(name, given)
        items = item_ids(name, list(chain.from_iterable(lists)), num_items, device, keep_padding=True)
        lengths = torch.tensor([len(each) for each in lists], dtype=torch.int64, device=device)
        rows = torch.repeat_interleave(torch.arange(len(lists), device=device), lengths)
        return rows[items >= 0], items[items >= 0], len(lists)
    if given.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, needs (B, E) or a list of B lists of items")
    count, width = given.shape
    items = item_ids(name, given.reshape(-1), num_items, device, keep_padding=True)
    rows = torch.arange(count, device=device).repeat_interleave(width)
    return rows[items >= 0], items[items >= 0], count


def item_sets(
    name: str, given: Any, num_items: int, device: torch.device
) -> tuple[list[Tensor], Tensor | None]:
    """Item sets, each as ids, and the set of each row; None where one set serves every row.

    Raises:
        TypeError, ValueError: `given` is no such thing, or an item is out of range; the message has `name`.
    """
    if isinstance(given, tuple):
        if len(given) != 2:
            raise TypeError(f"{name} is a tuple of {len(given)}, needs (sets, the set of each row)")
        sets, of_row = given
        found = [item_ids(f"{name}[0][{i}]", each, num_items, device) for i, each in enumerate(sets)]
        return found, _indices(f"{name}[1]", of_row, len(found), device)
    if _is_one_set(given):
        return [item_ids(name, given, num_items, device)], None
    if isinstance(given, (Tensor, np.ndarray)) and given.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}, needs one dimension for a set, two for rows"
        )
    found = [item_ids(f"{name}[{i}]", each, num_items, device) for i, each in enumerate(given)]
    return found, torch.arange(len(found), device=device)


def item_ids(
    name: str, given: Any, num_items: int, device: torch.device, *, keep_padding: bool = False
) -> Tensor:
    """Integers (n,) in which -1 is padding, or a mask (num_items,), as int64 ids."""
    if isinstance(given, Tensor):
        values = given.detach()
    else:
        array = np.asarray(given)
        values = torch.from_numpy(
            array.astype(np.int64) if array.size == 0 or array.dtype.kind in "iu" else array
        )
    if values.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, needs one dimension")
    if values.dtype == torch.bool and not keep_padding:
        if values.numel() != num_items:
            raise ValueError(f"{name} is a mask of {values.numel()} items, needs {num_items}")
        return values.to(device).nonzero().squeeze(1)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        needed = "integers" if keep_padding else "integers or a mask of bools"
        raise TypeError(f"{name} has dtype {values.dtype}, needs {needed}")
    values = values.to(device, torch.int64)
    wrong = (values < -1) | (values >= num_items)
    if bool(wrong.any()):
        item = int(values[wrong][0])
        raise ValueError(f"{name} has the item {item}, needs 0 .. {num_items - 1}, or -1 for padding")
    return values if keep_padding else values[values >= 0]


def _lists(name: str, given: Any) -> list[Sequence[int]]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(
            f"{name} is a {type(given).__name__}, needs (B, E) integers or a list of lists of items"
        )
    lists = [each.tolist() if isinstance(each, (Tensor, np.ndarray)) else each for each in given]
    for i, each in enumerate(lists):
        if not isinstance(each, Sequence):
            raise TypeError(f"{name}[{i}] is a {type(each).__name__}, needs a list of items")
    return lists


def _is_one_set(given: Any) -> bool:
    if isinstance(given, (Tensor, np.ndarray)):
        return given.ndim == 1
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(
            f"allow is a {type(given).__name__}, needs items, a mask, or one of them for each row"
        )
    first = given[0] if len(given) else 0
    return not (isinstance(first, Sequence) or (isinstance(first, (Tensor, np.ndarray)) and first.ndim))


def _indices(name: str, given: Any, sets: int, device: torch.device) -> Tensor:
    values = torch.as_tensor(given)
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {values.dtype}, needs integers")
    if values.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, needs (B,)")
    if bool(((values < 0) | (values >= sets)).any()):
        raise ValueError(
            f"{name} has the set {int(values.min())} or {int(values.max())}, needs 0 .. {sets - 1}"
        )
    return values.to(device, torch.int64)
