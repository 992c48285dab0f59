"""How kernels are compiled and launched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# What 32 bits count, and the programs of a grid.
MOST_ROWS = 2**31 - 1


class Tile(NamedTuple):
    """Rows a program, columns of them at a time, and the warps that share the tile."""

    ROWS: int
    BLOCK: int
    num_warps: int


# All tiles are chosen by reasoning, and so that the registers suffice; no GPU has tuned them yet.

# The tile of a kernel that reads children, by the largest number of children in the trie. A warp has 64 to
# 128 children, two to four a lane, and the rows of a narrow trie share one.
CHILD_TILES = {
    4: Tile(16, 4, 1),
    8: Tile(8, 8, 1),
    16: Tile(4, 16, 1),
    32: Tile(2, 32, 1),
    64: Tile(1, 64, 1),
    128: Tile(1, 128, 1),
    256: Tile(1, 256, 2),
    512: Tile(1, 512, 4),
}
WIDEST_CHILD_TILE = Tile(1, 1024, 8)
# The other kernels, each with one tile whatever its sizes.
# A walk is not told how wide the trie is.
WALK_TILE = Tile(1, 512, 2)
TRAJECTORY_TILE = Tile(32, 16, 4)
SHARED_FLOWS_TILE = Tile(8, 64, 2)
# Nodes x items under them, and items x contexts.
FLOWS_TILE = Tile(16, 16, 4)
ITEM_TILE = Tile(32, 16, 4)
# Its columns are the items whose rewards are summed once, for all the nodes above them.
CHUNK_TILE = Tile(4, 256, 4)


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit`, compiled once for each dtype and `tl.constexpr`.

    Triton would specialise on arguments that are 1, divisible by 16 or aligned, so again for other batch
    sizes and lengths; nothing here is faster for it, because the children of a node begin anywhere.
    """
    parameters = inspect.signature(function).parameters.values()
    runtime = [parameter.name for parameter in parameters if parameter.annotation != "tl.constexpr"]
    return triton.jit(function, do_not_specialize=runtime)


def launch(function: Any, rows: int, *arguments: Any, most_rows: int = MOST_ROWS, **options: Any) -> None:
    """Runs a program for every `ROWS` rows, or for each, on the device of the first argument, current or not.

    Raises:
        ValueError: more rows than the kernel counts.
    """
    if rows > most_rows:
        raise ValueError(f"{rows} rows came to the kernel, needs {most_rows} at most; split the batch")
    programs = triton.cdiv(rows, options.get("ROWS", 1))
    # A grid without programs is an error to CUDA.
    if programs:
        with torch.cuda.device_of(arguments[0]):
            # Triton's default differs between versions; without fusion a result is what the code says.
            function[(programs,)](*arguments, enable_fp_fusion=False, **options)


@cache
def child_tile(max_children: int) -> dict[str, int]:
    """The options of a kernel that reads children: one block for most nodes, several for wider ones."""
    fitting = (tile for widest, tile in CHILD_TILES.items() if max_children <= widest)
    return next(fitting, WIDEST_CHILD_TILE)._asdict()


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums(like: Tensor, shape: torch.Size) -> Tensor:
    """An uninitialised result of `shape`, on the device of `like`, in the dtype that its sums run in."""
    return torch.empty(shape, dtype=sums_dtype(like.dtype), device=like.device)


def filter_arguments(row_filter: tuple[Tensor | None, ...], rows: int) -> tuple[Tensor | int | None, ...]:
    """An item filter's arrays, the words of a set, and how many rows of the kernel one of its rows serves."""
    offsets, hidden, allowed, allowed_set = row_filter or (None,) * 4
    words = 0 if allowed is None else allowed.shape[1]
    share = 1 if offsets is None else max(rows // max(offsets.numel() - 1, 1), 1)
    return offsets, hidden, allowed, allowed_set, words, share


def strided(values: Tensor | None, dims: int = 1) -> tuple[Tensor | int | None, ...]:
    """A tensor and its strides, so that an expanded scalar needs no copy; zeros where there is none."""
    return (None, *[0] * dims) if values is None else (values, *values.stride())
