"""PrefixTrie: what it holds, in which memory, and what it refuses."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import INTEGERS, LAYOUTS, World, backends, catalogues, device_of, for_all, laid_out, worlds
from hypothesis import given
from hypothesis import strategies as st
from trie_cases import LARGEST, ROWS, any_token, assert_is, assert_same

from gflowgr import PrefixTrie, trie_arrays
from gflowgr.trie_arrays import ARRAYS, build_with_numpy, levels_with_numpy


@given(catalogues(any_token))
def test_holds_what_brute_force_finds(rows: list[list[int]]) -> None:
    assert_is(PrefixTrie(rows), rows)


@pytest.mark.parametrize(
    "rows",
    [
        [[0]],
        [[LARGEST]],
        [[7, -1, -1]],
        [[3], [1], [3], [2]],
        [[5, 5, 5]] * 4,
        [[1, -1, -1], [1, 1, -1], [1, 1, 1]],
        [[2, 1], [1, -1], [2, -1], [1, 9]],
    ],
    ids=["one item", "largest token", "one item, padded", "one level", "all collide", "chain", "prefixes"],
)
def test_small_catalogues(rows: list[list[int]]) -> None:
    assert_is(PrefixTrie(rows), rows)


@given(catalogues(any_token))
def test_numpy_builds_what_the_core_builds(rows: list[list[int]]) -> None:
    assert trie_arrays._core is not None
    for dtype in (np.int32, np.int64):
        array = np.array(rows, dtype=dtype)
        ours, theirs = trie_arrays.build(array), build_with_numpy(array)
        for name in ARRAYS:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
            assert ours[name].dtype == theirs[name].dtype
        assert trie_arrays.levels_of(ours) == levels_with_numpy(theirs)
        deepest = int((array >= 0).any(0).sum())
        np.testing.assert_array_equal(trie_arrays.sequences_of(ours), array[:, :deepest])


@pytest.mark.parametrize("high", [3, 300, 70_000, LARGEST])
def test_numpy_builds_what_the_core_builds_at_size(high: int) -> None:
    """Tokens of one, two and more 16-bit digits, offsets included."""
    numbers = np.random.default_rng(high)
    rows = numbers.integers(max(0, high - 200_000), high + 1, (3000, 4))
    rows[:, 0] //= 2
    rows[np.arange(4) >= numbers.integers(1, 5, (3000, 1))] = -1
    ours, theirs = trie_arrays.build(rows), build_with_numpy(rows)
    assert ours["narrow_token"].dtype == (np.uint16 if rows.max() < 2**16 else np.int32)
    for name in ARRAYS:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert trie_arrays.levels_of(ours) == levels_with_numpy(theirs)


def test_is_built_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = PrefixTrie(ROWS)
    monkeypatch.setattr(trie_arrays, "_core", None)
    assert_same(PrefixTrie(ROWS), expected)
    with pytest.raises(ValueError, match=r"sequences has the row 1: \[-1, 2\], needs tokens, then only -1"):
        PrefixTrie([[1, 2], [-1, 2]])


def test_takes_any_integers_in_any_form() -> None:
    expected = PrefixTrie(ROWS)
    unpadded = [[1, 2], [1, 3], [4, 6], [4, 5], [4, 5]]
    for dtype in INTEGERS:
        signed = torch.iinfo(dtype).min < 0
        tensor = torch.tensor(ROWS if signed else unpadded, dtype=dtype)
        wanted = expected if signed else PrefixTrie(unpadded)
        for values in (tensor, tensor.numpy(), tensor.tolist(), tuple(map(tuple, tensor.tolist()))):
            assert_same(PrefixTrie(values), wanted)
        assert_same(PrefixTrie(tensor.to(dtype).requires_grad_(False)), wanted)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded"])
def test_takes_any_strides(layout: str) -> None:
    assert_same(PrefixTrie(laid_out(torch.tensor(ROWS), layout)), PrefixTrie(ROWS))
    assert_same(PrefixTrie(laid_out(torch.tensor(ROWS), layout).numpy()), PrefixTrie(ROWS))


def test_takes_numpy_views_that_run_backwards_and_stand_still() -> None:
    array = np.array(ROWS)
    assert_same(PrefixTrie(array[::-1]), PrefixTrie(ROWS[::-1]))
    assert_same(PrefixTrie(np.broadcast_to(array[0], (5, 2))), PrefixTrie([ROWS[0]] * 5))
    frozen = np.array(ROWS)
    frozen.flags.writeable = False
    assert_same(PrefixTrie(frozen), PrefixTrie(ROWS))


def test_the_input_is_left_alone_and_not_kept() -> None:
    rows = torch.tensor(ROWS)
    trie = PrefixTrie(rows)
    assert rows.tolist() == ROWS
    rows.fill_(9)
    assert_is(trie, ROWS)


def test_arrays_are_those_that_the_core_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, np.ndarray] = {}
    core = trie_arrays._core

    class Recorder:
        levels = core.levels

        @staticmethod
        def build_trie(rows: np.ndarray) -> dict[str, np.ndarray]:
            made.update(core.build_trie(rows))
            return made

    monkeypatch.setattr(trie_arrays, "_core", Recorder)
    trie = PrefixTrie(ROWS)
    for name in ARRAYS:
        assert getattr(trie, name).data_ptr() == made[name].__array_interface__["data"][0]


@pytest.mark.parametrize("backend", backends("trie_walk"))
def test_walk(backend: str) -> None:
    def check(case: tuple[World, tuple[int, ...], str]) -> None:
        world, shape, layout = case
        device = device_of(backend)
        trie = world.trie(device)
        tokens = laid_out(world.tokens(shape).to(device), layout)
        starts = world.nodes(shape[:-1]).to(device)
        walked = trie.walk(tokens, backend=backend)
        from_starts = trie.walk(tokens, starts, backend=backend)
        assert walked.dtype == from_starts.dtype == torch.int64
        assert walked.shape == from_starts.shape == shape
        for row in np.ndindex(shape[:-1]):
            assert walked[row].tolist() == world.oracle.walk(tokens[row].tolist())
            assert from_starts[row].tolist() == world.oracle.walk(tokens[row].tolist(), int(starts[row]))
        for token in (2**31 - 1, 2**31, 2**40, 2**62):
            assert trie.walk([token, 0], backend=backend).tolist() == [-1, -1]

    shapes = st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple)
    for_all(st.tuples(worlds, shapes, st.sampled_from(LAYOUTS)), backend, check)


def test_walk_takes_lists_arrays_and_any_start() -> None:
    trie = PrefixTrie(ROWS)
    assert trie.walk([4, 5]).tolist() == [2, 5]
    assert trie.walk(np.array([[4, 5], [1, 9]], dtype=np.uint8)).tolist() == [[2, 5], [1, -1]]
    assert trie.walk([5], start=2).tolist() == [5]
    assert trie.walk([[5], [2]], torch.tensor([2, 1], dtype=torch.int16)).tolist() == [[5], [3]]
    assert trie.walk([4, -1, 4]).tolist() == [2, -1, -1]
    assert trie.walk([4], start=-1).tolist() == trie.walk([4], start=99).tolist() == [-1]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_walk_takes_any_integers(dtype: torch.dtype) -> None:
    trie = PrefixTrie(ROWS)
    assert trie.walk(torch.tensor([[4, 5], [1, 7]], dtype=dtype)).tolist() == [[2, 5], [1, -1]]


def test_children_and_items_take_integers_of_the_trie_only() -> None:
    trie = PrefixTrie(ROWS)
    assert trie.children(np.int64(2)).tolist() == [5]
    assert trie.items(torch.tensor(5)).tolist() == [3, 4]
    for method in (trie.children, trie.items):
        for node in (-1, trie.num_nodes, 10**12):
            with pytest.raises(ValueError, match=rf"node is {node}, needs 0 \.\. 5"):
                method(node)
        for node in (1.5, "1", None):
            with pytest.raises(TypeError, match=r"node is .*, needs an integer"):
                method(node)


def test_moves_between_devices(device: torch.device) -> None:
    trie = PrefixTrie(ROWS)
    fingerprint, parent = trie.fingerprint, trie.parent
    assert trie.to("cpu") is trie
    assert trie.to(torch.device("cpu")) is trie
    # A device without its number is one with it, as "cuda" is.
    assert trie.to("cpu:0") is trie
    there = trie.to(device)
    assert_same(there, trie)
    assert there.device == device
    assert there.parent.device == device
    assert torch.equal(there.parent.cpu(), parent)
    assert_same(there.to("cpu"), trie)
    nowhere = trie.to("meta")
    assert nowhere.device.type == nowhere.parent.device.type == "meta"
    assert trie.device.type == "cpu"
    assert (nowhere.num_nodes, nowhere.level_offsets) == (trie.num_nodes, trie.level_offsets)
    assert nowhere.fingerprint == trie.fingerprint == fingerprint


def test_tells_catalogues_apart() -> None:
    catalogues = (ROWS, ROWS[::-1], ROWS[:-1], [[1, 2], [1, 3], [4, -1], [4, 5], [4, 6]], [[1]], [[2]])
    assert len({PrefixTrie(rows).fingerprint for rows in catalogues}) == len(catalogues)
    assert PrefixTrie(ROWS).fingerprint == PrefixTrie(np.array(ROWS)).fingerprint
    assert "num_items=5" in repr(PrefixTrie(ROWS))


def test_survives_pickling() -> None:
    assert_same(pickle.loads(pickle.dumps(PrefixTrie(ROWS))), PrefixTrie(ROWS))


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([], ValueError, r"sequences has shape \(0,\), needs \(N, L\) with at least one item"),
        (np.zeros((0, 3), dtype=int), ValueError, r"sequences has shape \(0, 3\)"),
        (np.zeros((3, 0), dtype=int), ValueError, r"sequences has shape \(3, 0\)"),
        ([1, 2, 3], ValueError, r"sequences has shape \(3,\), needs \(N, L\)"),
        (np.zeros((2, 2, 2), dtype=int), ValueError, r"sequences has shape \(2, 2, 2\)"),
        ([[1, 2], [3]], ValueError, r"sequences has rows of different lengths, needs \(N, L\) with -1"),
        ([[1.0, 2.0]], TypeError, r"sequences has dtype float64, needs integers"),
        (torch.ones(2, 2), TypeError, r"sequences has dtype (torch\.)?float32, needs integers"),
        (
            torch.ones(2, 2, dtype=torch.bfloat16),
            TypeError,
            r"sequences has dtype torch.bfloat16, needs integers",
        ),
        ([[True, False]], TypeError, r"sequences has dtype bool, needs integers"),
        (torch.ones(2, 2, dtype=torch.bool), TypeError, r"sequences has dtype bool, needs integers"),
        ([["a", "b"]], TypeError, r"sequences has dtype <U1, needs integers"),
        ([[2**70]], TypeError, r"sequences has dtype object, needs integers"),
        (None, TypeError, r"sequences has dtype object, needs integers"),
        ([[1, 2], [-1, -1]], ValueError, r"sequences has the row 1: \[-1, -1\], needs tokens, then only -1"),
        ([[1, 2, 3], [1, -1, 3]], ValueError, r"sequences has the row 1: \[1, -1, 3\], needs tokens"),
        ([[-1, 2]], ValueError, r"sequences has the row 0: \[-1, 2\]"),
        ([[1, -2]], ValueError, r"sequences has the row 0: \[1, -2\]"),
        ([[1, -(2**40)]], ValueError, r"sequences has the row 0: \[1, -1099511627776\]"),
        ([[1, 2**31 - 1]], ValueError, r"sequences has the token 2147483647, needs tokens below 2\*\*31 - 1"),
        ([[1, 2**40]], ValueError, r"sequences has the token 1099511627776"),
        (np.array([[2**63]], dtype=np.uint64), ValueError, r"sequences has the token 9223372036854775808"),
    ],
)
@pytest.mark.parametrize("builder", ["core", "numpy"])
def test_refuses(
    builder: str, sequences: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if builder == "numpy":
        monkeypatch.setattr(trie_arrays, "_core", None)
    with pytest.raises(error, match=message):
        PrefixTrie(sequences)


def test_levels_of_a_large_catalogue() -> None:
    """A shape like real ones: what brute force over nodes would be slow for."""
    rows = np.random.default_rng(0).integers(0, 64, (5000, 4)) + 64 * np.arange(4)
    trie = PrefixTrie(rows)
    for depth in range(5):
        prefixes = np.unique(rows[:, :depth], axis=0) if depth else np.zeros((1, 0))
        assert trie.level_offsets[depth + 1] - trie.level_offsets[depth] == len(prefixes)
    walked = trie.walk(rows)
    assert torch.equal(walked[:, -1].int(), trie.item_node)
    assert torch.equal(trie.token[walked], torch.from_numpy(rows).int())
    assert math.prod(walked.shape) == int((walked >= 0).sum())
