"""Memory of results."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

# Bytes from which on it pays to go past PyTorch's allocator, and past the C library's.
_LARGE, _HUGE = 2**20, 2**25


def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device, *, few: bool = False) -> Tensor:
    """`torch.zeros`, which on the CPU costs little where nothing is written.

    The gradient of logits is zero but for a few columns a row. `torch.zeros` writes all of it, and most of
    that time goes into page faults; the C library's calloc, which NumPy calls, writes what it has held before
    and leaves pages fresh from the system, which are zero already, until they are first written.

    Args:
        few: a small part will be written at all, as of a head's gradient; then pages fresh from the system
            are always the cheapest. The tensor's storage cannot be resized.
    """
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    fresh = few and size >= _HUGE and hasattr(mmap, "MAP_ANONYMOUS")
    memory = _pages(size) if fresh else torch.from_numpy(np.zeros(size, np.uint8))
    return memory.view(dtype).view(shape)


def _pages(size: int) -> Tensor:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Whoever reads the gradient next would otherwise fault at every 4 KiB.
    with suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)
