"""Random numbers by counter: each is a function of its seed and its place alone.

So a draw depends neither on the rows beside it nor on threads, devices or how many were drawn before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators": SplitMix64.
_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST_FACTOR = _signed(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = _signed(0x94D049BB133111EB)


def random_bits(seeds: Tensor, *places: Tensor | int) -> Tensor:
    """64 random bits of each place of each seed, as int64; the arguments broadcast.

    Every argument is absorbed by one step of SplitMix64 that starts from the hash of those before it.
    Products and sums wrap around.
    """
    bits = _mixed(seeds.long() + _GOLDEN_GAMMA)
    for place in places:
        # From 1 on: under place 0 alone, bits of 0 would stay so.
        offset = (place + 1) * _GOLDEN_GAMMA
        bits = _mixed(bits + (_signed(offset % (1 << 64)) if isinstance(offset, int) else offset))
    return bits


def uniform(seeds: Tensor, *places: Tensor | int) -> Tensor:
    """float64 in [0, 1) with 53 random bits."""
    return _shifted_right(random_bits(seeds, *places), 11).double() * 2.0**-53


def gumbel(seeds: Tensor, *places: Tensor | int) -> Tensor:
    """float64 of the standard Gumbel distribution, always finite: 52 bits in the open interval (0, 1)."""
    inside = (_shifted_right(random_bits(seeds, *places), 12).double() + 0.5) * 2.0**-52
    return -(-inside.log()).log()


def _mixed(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted_right(bits, 30)) * _FIRST_FACTOR
    bits = (bits ^ _shifted_right(bits, 27)) * _SECOND_FACTOR
    return bits ^ _shifted_right(bits, 31)


def _shifted_right(bits: Tensor, by: int) -> Tensor:
    """As if unsigned: the shift of a signed integer repeats its sign."""
    return torch.bitwise_right_shift(bits, by) & ((1 << (64 - by)) - 1)
