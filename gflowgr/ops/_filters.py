"""An item filter among the arguments of an op."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from gflowgr import reference

FilterArrays: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
# In a schema; all four are None where nothing is filtered, and the last two where every item is allowed.
SCHEMA = "Tensor? hidden_offsets, Tensor? hidden_nodes, Tensor? allowed, Tensor? allowed_set"
NO_FILTER: FilterArrays = (None, None, None, None)


def arrays_of(item_filter: reference.RowFilter | None) -> FilterArrays:
    if item_filter is None:
        return NO_FILTER
    return (
        item_filter.hidden_offsets,
        item_filter.hidden_nodes,
        item_filter.allowed,
        item_filter.allowed_set,
    )
