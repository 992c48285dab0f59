"""Memory of results."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Bytes from which on it pays to go round by NumPy.
_LARGE = 2**20


def zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, which on the CPU costs nothing where nothing is written.

    The gradient of logits is zero but for a few columns a row. `torch.zeros` writes all of it, and most of
    that time goes into page faults; NumPy takes large arrays from the system, which hands out pages that are
    zero already and makes them real when they are first written. Such a tensor's storage cannot be resized.
    """
    size = shape.numel() * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(size, np.uint8)).view(dtype).view(shape)
