"""Inputs for the tests of the core: catalogues, memory layouts, backends, and how close is close enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from core_oracle import DictTrie
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gflowgr import PrefixTrie
from gflowgr.ops import _registry

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
INTEGERS = (*SIGNED, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")

# Triton's interpreter takes about a second where the others take a millisecond.
EXAMPLES = {"cpp": 50, "torch": 30, "triton": 3}


def device_of(backend: str) -> torch.device:
    """Where a backend is tested: the C++ core on the CPU, the others on a GPU where there is one."""
    if backend != "cpp" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backends(op: str) -> list[Any]:
    """The backends that have a kernel for `op`, as parameters; Triton is skipped where it cannot run."""
    names = ["torch"]
    names += ["cpp"] * (op in _registry.CPP_OPS)
    names += ["triton"] * (op in _registry.TRITON_OPS)
    return [pytest.param(name, marks=_skip_triton(op) if name == "triton" else ()) for name in sorted(names)]


def _skip_triton(op: str) -> tuple[Any, ...]:
    obstacle = _registry.why_not("triton", op, device_of("triton"))
    return () if obstacle is None else (pytest.mark.skip(reason=obstacle),)


def for_all(strategy: st.SearchStrategy[Any], backend: str, check: Callable[[Any], None]) -> None:
    """Runs `check` on as many examples as the backend's speed allows."""

    @settings(max_examples=EXAMPLES[backend])
    @given(strategy)
    def run(case: Any) -> None:
        check(case)

    run()


@st.composite
def catalogues(
    draw: st.DrawFn,
    tokens: st.SearchStrategy[int] = st.integers(0, 9),  # noqa: B008
    max_items: int = 12,
    max_levels: int = 4,
) -> list[list[int]]:
    """(N, L) rows: few distinct tokens, so that items collide and are prefixes of one another."""
    levels = draw(st.integers(1, max_levels))
    alphabet = draw(st.lists(tokens, min_size=1, max_size=5, unique=True))
    path = st.lists(st.sampled_from(alphabet), min_size=1, max_size=levels)
    return [row + [-1] * (levels - len(row)) for row in draw(st.lists(path, min_size=1, max_size=max_items))]


@st.composite
def wide_catalogues(draw: st.DrawFn) -> list[list[int]]:
    """Nodes with up to 150 children, so that kernels take several blocks of them."""
    numbers = np.random.default_rng(draw(st.integers(0, 2**16)))
    return numbers.integers(0, [150, 70], (260, 2)).tolist()


@dataclass(frozen=True)
class World:
    """A catalogue as our trie and as the oracle's, and the seed of whatever else a test draws."""

    rows: list[list[int]]
    extra_width: int
    seed: int

    @cached_property
    def oracle(self) -> DictTrie:
        return DictTrie(self.rows)

    def trie(self, device: torch.device) -> PrefixTrie:
        return PrefixTrie(self.rows).to(device)

    @property
    def width(self) -> int:
        """The vocabulary's size."""
        return max(map(max, self.rows)) + 1 + self.extra_width

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def normals(self, shape: tuple[int, ...], scale: float = 3.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale

    def coin(self, shape: tuple[int, ...], chance: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < chance

    def nodes(self, shape: tuple[int, ...]) -> Tensor:
        """Nodes on the trie, with some -1 and some past its end."""
        nodes = self.integers(0, len(self.oracle), shape)
        off = torch.where(self.coin(shape), -1, len(self.oracle))
        return torch.where(self.coin(shape, 0.1), off, nodes)

    def tokens(self, shape: tuple[int, ...]) -> Tensor:
        """Paths of items, some spoilt by a random token or cut by a -1 that more tokens follow."""
        paths = torch.tensor([path + [-1] * shape[-1] for path in self.rows])[:, : shape[-1]]
        tokens = paths[self.integers(0, len(self.rows), shape[:-1])]
        tokens = torch.where(self.coin(shape, 0.1), self.integers(0, self.width, shape), tokens)
        return torch.where(self.coin(shape, 0.07), -1, tokens)

    def paths(self, shape: tuple[int, ...]) -> Tensor:
        """Paths of items, padded or cut short, never off the trie."""
        paths = torch.tensor([path + [-1] * shape[-1] for path in self.rows])[:, : shape[-1]]
        paths = paths[self.integers(0, len(self.rows), shape[:-1])]
        return torch.where(self.coin(shape, 0.1).cumsum(-1) > 0, -1, paths)


worlds = st.builds(
    World,
    rows=st.one_of(catalogues(), catalogues(), wide_catalogues()),
    extra_width=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
# (), (R,), (B, T) and (A, B, T), with zeros among them.
leading_shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.sampled_from(LAYOUTS)
floats = st.sampled_from(FLOATS)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` under other strides ("expanded": its first row everywhere, by a stride of 0)."""
    if layout == "contiguous" or values.dim() == 0:
        return values.contiguous()
    if layout == "transposed":
        backwards = tuple(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout == "sliced":
        # What lies between must not be read.
        around = values.new_full(
            [2 * size + 1 for size in values.shape], math.nan if values.is_floating_point() else 77
        )
        inside = around[tuple(slice(1, 2 * size + 1, 2) for size in values.shape)]
        return inside.copy_(values)
    lead = (slice(0, 1),) * max(values.dim() - 1, 1)
    return values[lead].contiguous().expand(values.shape)


def integer_dtypes(values: Tensor) -> list[torch.dtype]:
    """The integer dtypes that hold `values`."""
    if values.numel() == 0:
        return list(INTEGERS)
    low, high = int(values.min()), int(values.max())
    return [dtype for dtype in INTEGERS if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max]


def spoilt(
    logits: Tensor, read: Callable[[tuple[int, ...]], list[int]], generator: torch.Generator
) -> Tensor:
    """`logits` with NaN and infinities in every column that a row is not to read."""
    spoilt = torch.tensor([math.nan, math.inf, -math.inf], dtype=logits.dtype)
    result = spoilt[torch.randint(0, 3, logits.shape, generator=generator)]
    for row in np.ndindex(logits.shape[:-1]):
        columns = read(row)
        result[row][columns] = logits[row][columns]
    return result


def sums(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def any_integers(world: World, values: Tensor, layout: str, device: torch.device) -> Tensor:
    """`values` in some integer dtype that holds them, under a layout."""
    dtypes = integer_dtypes(values)
    dtype = dtypes[int(world.integers(0, len(dtypes), ()))]
    return laid_out(values, layout).to(dtype).to(device)


def choices(world: World, node: int) -> list[int]:
    """The columns that a row at `node` may read: none where there is nothing to choose."""
    tokens = list(world.oracle.children(node))
    return tokens if len(tokens) > 1 else []


def logits_at(world: World, nodes: Tensor, dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    """Logits (..., V) with NaN and infinities in all columns that a row at that node must not read."""
    values = world.normals((*nodes.shape, world.width))
    if layout == "expanded":
        # Rows share their columns here, so none can be spoilt.
        return laid_out(values, layout).to(dtype).to(device)
    values = spoilt(values, lambda row: choices(world, int(nodes[row])), world.generator)
    return laid_out(values.to(dtype).to(device), layout)


def path_logits(
    world: World, tokens: Tensor, start: Tensor, dtype: torch.dtype, layout: str, device: torch.device
) -> Tensor:
    """The same for item paths: logits (..., T, V)."""
    nodes = torch.full(tokens.shape, -1)
    for row in np.ndindex(tokens.shape[:-1]):
        walked = world.oracle.walk(tokens[row].tolist(), int(start[row]))
        nodes[row] = torch.tensor([int(start[row]), *walked])[:-1]
    return logits_at(world, nodes, dtype, layout, device)


def assert_close(ours: Tensor, exact: Any, yardstick: Tensor | None = None, *, slack: float = 8.0) -> None:
    """Our error against `exact` (float64) is at most that of `yardstick`, plus a few units in the last place.

    Infinities and NaN must be where they are in `exact`.
    """
    exact = torch.as_tensor(exact, dtype=torch.float64).reshape(ours.shape)
    got = ours.detach().double().cpu()
    finite = exact.isfinite()
    torch.testing.assert_close(got[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)
    assert got[finite].isfinite().all(), (got, exact)
    if not finite.any():
        return
    error = (got - exact)[finite].abs().max().item()
    allowed = slack * torch.finfo(ours.dtype).eps * max(1.0, exact[finite].abs().max().item())
    if yardstick is not None:
        allowed += (yardstick.detach().double().cpu().reshape(ours.shape) - exact)[finite].abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
