"""How kernels are compiled and launched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

MAX_BLOCK = 1024


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit`, compiled once for each dtype and `tl.constexpr`.

    Triton would specialise on arguments that are 1, divisible by 16 or aligned, so again for other batch
    sizes and lengths; nothing here is faster for it, because the children of a node begin anywhere.
    """
    parameters = inspect.signature(function).parameters.values()
    runtime = [parameter.name for parameter in parameters if parameter.annotation != "tl.constexpr"]
    return triton.jit(function, do_not_specialize=runtime)


def launch(function: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Runs `programs` programs on the device of the first argument, whichever device is the current one."""
    # A grid without programs is an error to CUDA.
    if programs:
        with torch.cuda.device_of(arguments[0]):
            # Triton's default differs between versions; without fusion a result is what the code says.
            function[(programs,)](*arguments, enable_fp_fusion=False, **options)


def block_of(max_children: int) -> dict[str, int]:
    """The options of a kernel that reads children in blocks: one for most nodes, several for wider ones."""
    block = min(max(triton.next_power_of_2(max_children), 32), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(block // 128, 1)}


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sums(like: Tensor, shape: torch.Size) -> Tensor:
    """An uninitialised result of `shape`, on the device of `like`, in the dtype that its sums run in."""
    return torch.empty(shape, dtype=sums_dtype(like.dtype), device=like.device)


def strided(values: Tensor | None, dims: int = 1) -> tuple[Tensor | int | None, ...]:
    """A tensor and its strides, so that an expanded scalar needs no copy; zeros where there is none."""
    return (None, *[0] * dims) if values is None else (values, *values.stride())
