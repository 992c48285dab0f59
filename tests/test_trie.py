"""PrefixTrie: what it holds, in which memory, what it refuses, and what becomes of its files."""

from __future__ import annotations

import math
import os
import pickle
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from core_cases import INTEGERS, LAYOUTS, World, backends, catalogues, device_of, for_all, laid_out, worlds
from core_oracle import DictTrie
from hypothesis import given, settings
from hypothesis import strategies as st

import gflowgr.trie
from gflowgr import PrefixTrie
from gflowgr.trie import build_with_numpy

ARRAYS = ("first_child", "token", "first_item", "item_count", "item_order", "item_node")
ROWS = [[1, 2], [1, 3], [4, -1], [4, 5], [4, 5]]
LARGEST = 2**31 - 2
any_token = st.one_of(st.integers(0, 9), st.integers(LARGEST - 5, LARGEST), st.integers(0, LARGEST))


def arrays_of(trie: PrefixTrie) -> dict[str, torch.Tensor]:
    return {name: getattr(trie, name).clone() for name in ARRAYS}


def assert_same(one: PrefixTrie, other: PrefixTrie) -> None:
    for name in ARRAYS:
        assert torch.equal(getattr(one, name).cpu(), getattr(other, name).cpu()), name
    assert one.fingerprint == other.fingerprint
    assert (one.level_offsets, one.token_ranges) == (other.level_offsets, other.token_ranges)
    assert (one.max_token, one.max_children, one.max_depth) == (
        other.max_token,
        other.max_children,
        other.max_depth,
    )


def assert_is(trie: PrefixTrie, rows: list[list[int]]) -> None:
    """The trie is the one that brute force finds in `rows`."""
    oracle = DictTrie(rows)
    nodes = range(len(oracle))
    assert (trie.num_items, trie.num_nodes, trie.max_depth) == (len(rows), len(oracle), oracle.depth)
    for name in ARRAYS:
        assert getattr(trie, name).dtype == torch.int32
    ends = [max(oracle.children(node).values(), default=None) for node in nodes]
    fanout = [len(oracle.children(node)) for node in nodes]
    assert trie.first_child.tolist() == [1 + sum(fanout[:node]) for node in range(len(oracle) + 1)]
    for node in nodes:
        first, end = trie.first_child[node : node + 2].tolist()
        assert list(range(first, end)) == list(oracle.children(node).values())
        assert ends[node] in (None, end - 1)
        assert trie.children(node).tolist() == list(oracle.children(node))
        assert trie.items(node).tolist() == oracle.ending_at(node)
        begin = int(trie.first_item[node])
        count = int(trie.item_count[node])
        assert count == len(oracle.under(node))
        assert sorted(trie.item_order[begin : begin + count].tolist()) == oracle.under(node)
    assert trie.token.tolist() == [prefix[-1] if prefix else -1 for prefix in oracle.prefixes]
    assert trie.item_node.tolist() == [oracle.number[path] for path in oracle.paths]
    assert trie.item_order.tolist() == sorted(range(len(rows)), key=lambda item: oracle.paths[item])
    assert trie.parent.dtype == torch.int32
    assert trie.parent.tolist() == oracle.parent
    depths = [len(prefix) for prefix in oracle.prefixes]
    assert trie.level_offsets == tuple(sum(d < depth for d in depths) for depth in range(oracle.depth + 2))
    levels = [{prefix[-1] for prefix in oracle.prefixes if len(prefix) == d + 1} for d in range(oracle.depth)]
    assert trie.token_ranges == tuple((min(tokens), max(tokens)) for tokens in levels)
    assert trie.max_token == max(max(tokens) for tokens in levels)
    assert trie.max_children == max(fanout)
    assert trie.nbytes == 4 * (4 * len(oracle) + 1 + 2 * len(rows))


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
    assert gflowgr.trie._core is not None
    for dtype in (np.int32, np.int64):
        array = np.array(rows, dtype=dtype)
        ours, theirs = gflowgr.trie._core.build_trie(array), build_with_numpy(array)
        for name in ARRAYS:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
            assert ours[name].dtype == theirs[name].dtype == np.int32


@pytest.mark.parametrize("high", [3, 300, 70_000, LARGEST])
def test_numpy_builds_what_the_core_builds_at_size(high: int) -> None:
    """Tokens of one, two and more 16-bit digits, offsets included."""
    numbers = np.random.default_rng(high)
    rows = numbers.integers(max(0, high - 200_000), high + 1, (3000, 4))
    rows[:, 0] //= 2
    rows[np.arange(4) >= numbers.integers(1, 5, (3000, 1))] = -1
    ours, theirs = gflowgr.trie._core.build_trie(rows), build_with_numpy(rows)
    for name in ARRAYS:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_is_built_without_the_core(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = PrefixTrie(ROWS)
    monkeypatch.setattr(gflowgr.trie, "_core", None)
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
    core = gflowgr.trie._core

    class Recorder:
        @staticmethod
        def build_trie(rows: np.ndarray) -> dict[str, np.ndarray]:
            made.update(core.build_trie(rows))
            return made

    monkeypatch.setattr(gflowgr.trie, "_core", Recorder)
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
        monkeypatch.setattr(gflowgr.trie, "_core", None)
    with pytest.raises(error, match=message):
        PrefixTrie(sequences)


# Files


@settings(max_examples=30)
@given(rows=catalogues(any_token))
def test_loads_what_it_saved(rows: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("trie") / "trie.safetensors"
    trie = PrefixTrie(rows)
    trie.save(path)
    loaded = PrefixTrie.load(str(path))
    assert_same(loaded, trie)
    assert_is(loaded, rows)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel does not show its mappings here")
def test_loads_without_copying(tmp_path: Path) -> None:
    PrefixTrie(ROWS).save(tmp_path / "trie")
    trie = PrefixTrie.load(tmp_path / "trie")
    mappings = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [[int(end, 16) for end in m[0].split("-")] for m in mappings if m[-1] == str(tmp_path / "trie")]
    assert ranges
    for name in ARRAYS:
        array = getattr(trie, name)
        assert any(
            low <= array.data_ptr() and array.data_ptr() + array.nbytes <= high for low, high in ranges
        ), name


def test_a_loaded_trie_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    PrefixTrie(ROWS).save(path)
    loaded = PrefixTrie.load(path)
    PrefixTrie([[1]]).save(path)
    assert_is(loaded, ROWS)
    path.unlink()
    assert_is(loaded, ROWS)


def test_saves_a_trie_from_any_device(device: torch.device, tmp_path: Path) -> None:
    PrefixTrie(ROWS).to(device).save(tmp_path / "trie")
    assert_same(PrefixTrie.load(tmp_path / "trie"), PrefixTrie(ROWS))


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trie"
    PrefixTrie([[1]]).save(path)

    def half(arrays: Any, target: Path, metadata: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        PrefixTrie(ROWS).save(path)
    assert_is(PrefixTrie.load(path), [[1]])
    assert os.listdir(tmp_path) == ["trie"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_save_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    PrefixTrie([[1]]).save(path)
    child = os.fork()
    if child == 0:
        write = safetensors.torch.save_file

        def die(arrays: Any, target: Path, metadata: Any) -> None:
            write(arrays, target, metadata)
            os.truncate(target, 100)
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            safetensors.torch.save_file = die
            PrefixTrie(ROWS).save(path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert_is(PrefixTrie.load(path), [[1]])


def test_save_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path is '.*none/trie', in a folder that does not exist"):
        PrefixTrie(ROWS).save(tmp_path / "none" / "trie")


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"path is '{path}', which is not a file"):
            PrefixTrie.load(path)


def refuse(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=rf"path '{path}' is not a saved PrefixTrie: .*{message}"):
        PrefixTrie.load(path)


def test_refuses_a_file_cut_anywhere(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    PrefixTrie(ROWS).save(whole)
    content = whole.read_bytes()
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        refuse(cut, "")
    cut.write_bytes(content + b"\0")
    refuse(cut, "")


def test_refuses_a_file_with_damaged_bytes(tmp_path: Path) -> None:
    """Flipping a bit of every byte, and overwriting runs of them: never a crash, never another trie."""
    path = tmp_path / "trie"
    trie = PrefixTrie(ROWS)
    trie.save(path)
    content, numbers = path.read_bytes(), random.Random(0)
    damaged = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << numbers.randrange(8)
        damaged.append(flipped)
    for _ in range(200):
        noisy = bytearray(content)
        first = numbers.randrange(len(content))
        run = numbers.randbytes(numbers.randint(1, 16))[: len(content) - first]
        noisy[first : first + len(run)] = run
        damaged.append(noisy)
    refused = 0
    for candidate in damaged:
        path.write_bytes(candidate)
        try:
            assert_same(PrefixTrie.load(path), trie)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.99 * len(damaged)


def test_refuses_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"hello", b"\xff" * 4096, os.urandom(4096), b"\x80\x02}q\x00."):
        path.write_bytes(content)
        refuse(path, "")
    arrays = arrays_of(PrefixTrie(ROWS))
    safetensors.torch.save_file(arrays, path)
    refuse(path, r"its format is None, needs 'gflowgr.PrefixTrie/1'")
    safetensors.torch.save_file(arrays, path, {"format": "gflowgr.PrefixTrie/9"})
    refuse(path, r"its format is 'gflowgr.PrefixTrie/9', needs 'gflowgr.PrefixTrie/1'")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    refuse(path, r"its format is 'pt'")


def save_as_trie(arrays: dict[str, torch.Tensor], path: Path, fingerprint: str | None = None) -> None:
    """A file that claims to hold a trie, with the fingerprint of what it does hold."""
    if fingerprint is None:
        claimed = object.__new__(PrefixTrie)
        claimed.__dict__.update({name: array.contiguous() for name, array in arrays.items()})
        fingerprint = claimed.fingerprint if set(ARRAYS) <= set(arrays) else ""
    contiguous = {name: array.contiguous() for name, array in arrays.items()}
    safetensors.torch.save_file(
        contiguous, path, {"format": "gflowgr.PrefixTrie/1", "fingerprint": fingerprint}
    )


def test_refuses_missing_and_further_arrays(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    for name in ARRAYS:
        arrays = arrays_of(PrefixTrie(ROWS))
        del arrays[name]
        save_as_trie(arrays, path)
        refuse(path, r"it holds \[.*\], needs \[.*\]")
    save_as_trie(arrays_of(PrefixTrie(ROWS)) | {"extra": torch.zeros(1)}, path)
    refuse(path, r"it holds \[.*'extra'.*\]")


def test_refuses_arrays_of_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    save_as_trie(arrays_of(PrefixTrie(ROWS)), path, PrefixTrie([[1]]).fingerprint)
    refuse(path, "its arrays do not match its fingerprint")


def put(name: str, index: int, value: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda arrays: arrays[name].__setitem__(index, value)


def replaced(
    name: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda arrays: arrays.__setitem__(name, change(arrays[name]))


def swapped(name: str, one: int, other: int) -> Callable[[dict[str, torch.Tensor]], None]:
    def swap(arrays: dict[str, torch.Tensor]) -> None:
        arrays[name][[one, other]] = arrays[name][[other, one]]

    return swap


def only_a_root(arrays: dict[str, torch.Tensor]) -> None:
    arrays.update({name: torch.zeros(0, dtype=torch.int32) for name in ("item_node", "item_order")})
    lone = {"first_child": [1, 1], "token": [-1], "first_item": [0], "item_count": [0]}
    arrays.update({name: torch.tensor(values, dtype=torch.int32) for name, values in lone.items()})


def its_own_child(arrays: dict[str, torch.Tensor]) -> None:
    circle = {"first_child": [1, 1, 2], "token": [-1, 0], "first_item": [0, 0], "item_count": [1, 1]}
    circle |= {"item_node": [1], "item_order": [0]}
    arrays.update({name: torch.tensor(values, dtype=torch.int32) for name, values in circle.items()})


# ROWS have first_child [1 3 5 6 6 6 6], token [-1 1 4 2 3 5], item_count [5 2 3 1 1 2],
# first_item [0 0 2 0 1 3], item_node [3 4 2 5 5] and item_order [0 1 2 3 4].
INCONSISTENT = [
    (replaced("token", torch.Tensor.long), r"token is int64 of shape \(6,\), needs int32 \(n,\)"),
    (
        replaced("token", lambda a: a.reshape(1, -1)),
        r"token is int32 of shape \(1, 6\), needs int32 \(n,\)",
    ),
    (replaced("item_order", torch.Tensor.float), r"item_order is float32"),
    (replaced("first_child", lambda a: a[:-1]), "first_child has 6 entries, needs 7"),
    (replaced("first_child", lambda a: torch.cat([a, a[-1:]])), "first_child has 8 entries, needs 7"),
    (replaced("first_item", lambda a: a[:-1]), "first_item has 5 entries, needs 6"),
    (replaced("item_count", lambda a: a[:-1]), "item_count has 5 entries, needs 6"),
    (replaced("item_order", lambda a: a[:-1]), "item_order has 4 entries, needs 5"),
    (only_a_root, "it has 1 nodes and 0 items, needs at least 2 and 1"),
    (put("first_child", 0, 0), "first_child does not span the nodes"),
    (put("first_child", 6, 5), "first_child does not span the nodes"),
    (put("first_child", 6, 2**31 - 1), "first_child does not span the nodes"),
    (put("first_child", 2, 2), "first_child decreases"),
    (put("first_child", 1, -7), "first_child decreases"),
    (put("first_child", 3, 99), "first_child decreases"),
    (its_own_child, "a node comes before its parent"),
    (put("token", 0, 0), "token has a negative entry"),
    (put("token", 3, -1), "token has a negative entry"),
    (swapped("token", 3, 4), "siblings are not in ascending order"),
    (put("token", 4, 2), "siblings are not in ascending order"),
    (put("item_node", 0, 6), "item_node leaves the trie"),
    (put("item_node", 0, 0), "item_node leaves the trie"),
    (put("item_node", 0, -1), "item_node leaves the trie"),
    (put("item_order", 0, 5), "item_order leaves the catalogue"),
    (put("item_order", 0, -1), "item_order leaves the catalogue"),
    (put("item_order", 0, 1), "item_order is no permutation"),
    (put("item_count", 3, 0), "item_count has an empty node"),
    (put("item_count", 0, 6), "item_count has an empty node"),
    (put("item_count", 1, 1), "item_count is not the sum of the children's"),
    (put("item_node", 2, 1), "item_count is not the sum of the children's"),
    (put("first_item", 0, 1), "first_item is not where the items begin"),
    (put("first_item", 5, 2), "first_item is not where the items begin"),
    (swapped("item_order", 0, 1), "item_order is out of order"),
    (swapped("item_order", 2, 3), "item_order is out of order"),
    (swapped("item_order", 3, 4), "the items of a node are not in ascending order"),
]


@pytest.mark.parametrize(
    ("tamper", "message"), INCONSISTENT, ids=[message[:50] for _, message in INCONSISTENT]
)
def test_refuses_inconsistent_arrays(
    tamper: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    arrays = arrays_of(PrefixTrie(ROWS))
    tamper(arrays)
    save_as_trie(arrays, tmp_path / "trie")
    refuse(tmp_path / "trie", message)


@given(
    rows=catalogues(),
    name=st.sampled_from(ARRAYS),
    place=st.integers(0, 10**6),
    value=st.integers(-2, 16),
)
def test_what_loads_is_a_trie(
    rows: list[list[int]], name: str, place: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Arrays with any one entry changed are refused, or are exactly the trie of some other catalogue."""
    arrays = arrays_of(PrefixTrie(rows))
    arrays[name][place % arrays[name].numel()] = value
    path = tmp_path_factory.getbasetemp() / "tampered"
    save_as_trie(arrays, path)
    try:
        loaded = PrefixTrie.load(path)
    except ValueError:
        return
    prefixes: list[list[int]] = [[]]
    for node in range(1, loaded.num_nodes):
        prefixes.append([*prefixes[int(loaded.parent[node])], int(loaded.token[node])])
    items = [prefixes[node] for node in loaded.item_node.tolist()]
    assert_is(loaded, [path + [-1] * (loaded.max_depth - len(path)) for path in items])


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
