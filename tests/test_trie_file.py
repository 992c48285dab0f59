"""Saved tries: mapped, whole whatever happens, and refused when they are not what was saved."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from core_cases import catalogues
from hypothesis import given, settings
from hypothesis import strategies as st
from trie_cases import ROWS, any_token, assert_is, assert_same

from gflowgr import PrefixTrie, trie_arrays, trie_file
from gflowgr.numpy_trie import NumpyTrie
from gflowgr.trie_arrays import ARRAYS
from gflowgr.trie_file import FORMAT

Tamper = Callable[[dict[str, np.ndarray]], None]


def arrays_of(trie: PrefixTrie) -> dict[str, np.ndarray]:
    return {name: getattr(trie, name).numpy().copy() for name in ARRAYS}


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

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(trie_file.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        PrefixTrie(ROWS).save(path)
    assert_is(PrefixTrie.load(path), [[1]])
    assert os.listdir(tmp_path) == ["trie"]


def test_threads_that_save_to_one_path_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synchronise = tmp_path / "trie", os.fsync

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(trie_file.os, "fsync", synchronise)
        other = threading.Thread(target=PrefixTrie([[1]]).save, args=(path,))
        other.start()
        other.join()
        assert_is(PrefixTrie.load(path), [[1]])
        synchronise(descriptor)

    monkeypatch.setattr(trie_file.os, "fsync", interrupted)
    trie = PrefixTrie(ROWS)
    trie.save(path)
    assert_same(PrefixTrie.load(path, verify=True), trie)
    assert os.listdir(tmp_path) == ["trie"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_save_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    PrefixTrie([[1]]).save(path)
    child = os.fork()
    if child == 0:

        def die(descriptor: int) -> None:
            os.truncate(descriptor, 100)
            os.kill(os.getpid(), signal.SIGKILL)

        try:
            trie_file.os.fsync = die
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
    # What says when it was written may change: then all is checked, and all is as it was.
    assert refused > 0.9 * len(damaged)


def test_refuses_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"hello", b"\xff" * 4096, os.urandom(4096), b"\x80\x02}q\x00."):
        path.write_bytes(content)
        refuse(path, "")
    arrays = arrays_of(PrefixTrie(ROWS))
    safetensors.numpy.save_file(arrays, path)
    refuse(path, "its format is None, needs 'gflowgr.PrefixTrie/2'")
    save_as_trie(arrays, path, format="gflowgr.PrefixTrie/9")
    refuse(path, r"its format is 'gflowgr.PrefixTrie/9', needs 'gflowgr.PrefixTrie/2'")
    safetensors.numpy.save_file({"weight": np.zeros(3)}, path, {"format": "pt"})
    refuse(path, r"its format is 'pt'")


def save_as_trie(
    arrays: dict[str, np.ndarray], path: Path, fingerprint: str | None = None, **metadata: str
) -> None:
    """A file that claims to hold a trie, with the fingerprint of what it does hold."""
    levels = trie_arrays.levels_of(arrays_of(PrefixTrie(ROWS)))
    if fingerprint is None:
        fingerprint = trie_arrays.fingerprint(arrays) if set(ARRAYS) <= set(arrays) else ""
    described = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "levels": json.dumps(levels._asdict()),
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(contiguous, path, described | metadata)


def test_refuses_missing_and_further_arrays(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    for name in ARRAYS:
        arrays = arrays_of(PrefixTrie(ROWS))
        del arrays[name]
        save_as_trie(arrays, path)
        refuse(path, r"it holds \[.*\], needs \[.*\]")
    save_as_trie(arrays_of(PrefixTrie(ROWS)) | {"extra": np.zeros(1, dtype=np.int32)}, path)
    refuse(path, r"it holds \[.*'extra'.*\]")


def test_refuses_arrays_of_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    save_as_trie(arrays_of(PrefixTrie(ROWS)), path, PrefixTrie([[1]]).fingerprint)
    refuse(path, "its arrays do not match its fingerprint")


def put(name: str, index: int, value: int) -> Tamper:
    return lambda arrays: arrays[name].__setitem__(index, value)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Tamper:
    return lambda arrays: arrays.__setitem__(name, change(arrays[name]))


def swapped(name: str, one: int, other: int) -> Tamper:
    def swap(arrays: dict[str, np.ndarray]) -> None:
        arrays[name][[one, other]] = arrays[name][[other, one]]

    return swap


def arrays(first_child: list[int], tokens: list[int], item_node: list[int], node_items: list[int]) -> Tamper:
    made = {
        "first_child": np.array(first_child, dtype=np.int32),
        "narrow_token": np.array(tokens, dtype=np.uint16),
        "item_node": np.array(item_node, dtype=np.int32),
        "node_items": np.array(node_items, dtype=np.int32),
    }
    return lambda arrays: arrays.update(made)


# ROWS have first_child [1 3 5 6 6 6 6], narrow_token [65535 1 4 2 3 5], item_node [3 4 2 5 5], and
# node_items [2 0 1 3 4].
INCONSISTENT = [
    (replaced("narrow_token", lambda a: a.astype(np.int64)), "narrow_token is described by .*'I64'"),
    (replaced("item_node", lambda a: a.reshape(1, -1)), "item_node is described by .* needs I32 or U16"),
    (replaced("node_items", lambda a: a.astype(np.float32)), "node_items is described by .*'F32'"),
    (replaced("node_items", lambda a: a.astype(np.uint16)), r"node_items is uint16 of shape \(5,\)"),
    (replaced("first_child", lambda a: a[:-1]), "first_child has 6 entries, needs 7"),
    (replaced("first_child", lambda a: np.append(a, a[-1:])), "first_child has 8 entries, needs 7"),
    (replaced("node_items", lambda a: a[:-1]), "node_items does not hold each item that is present once"),
    (arrays([1, 1], [65535], [], []), "it has 1 nodes and 0 items, needs at least 2 and 1"),
    (put("first_child", 0, 0), "first_child does not span the nodes"),
    (put("first_child", 6, 5), "first_child does not span the nodes"),
    (put("first_child", 6, 2**31 - 1), "first_child does not span the nodes"),
    (put("first_child", 2, 2), "first_child decreases"),
    (put("first_child", 1, -7), "first_child decreases"),
    (put("first_child", 3, 99), "first_child decreases"),
    (arrays([1, 1, 2], [65535, 0], [1], [0]), "a node comes before its parent"),
    (put("narrow_token", 0, 0), "the root has a token"),
    (replaced("narrow_token", lambda a: a.astype(np.int32)), "the root has a token"),
    (
        replaced("narrow_token", lambda a: np.array([-1, *a[1:]], dtype=np.int32)),
        "narrow_token is int32, though uint16 would hold all tokens",
    ),
    (
        replaced("narrow_token", lambda a: np.array([-1, 1, 70_000, 2, -3, 5], dtype=np.int32)),
        "narrow_token has a negative entry",
    ),
    (swapped("narrow_token", 3, 4), "siblings are not in ascending order"),
    (swapped("narrow_token", 1, 2), "siblings are not in ascending order"),
    (put("narrow_token", 4, 2), "siblings are not in ascending order"),
    (put("item_node", 0, 6), "item_node leaves the trie"),
    (put("item_node", 0, 0), "item_node leaves the trie"),
    (put("item_node", 0, -2), "item_node leaves the trie"),
    (put("item_node", 0, -1), "node_items does not hold each item that is present once"),
    (put("node_items", 0, 5), "node_items leaves the catalogue"),
    (put("node_items", 0, -1), "node_items leaves the catalogue"),
    (put("node_items", 0, 1), "node_items does not hold each item that is present once"),
    (swapped("node_items", 0, 1), "node_items is not in the order of the nodes"),
    (swapped("node_items", 3, 4), "the items of a node are not in ascending order"),
    (arrays([1, 3, 3, 3], [65535, 0, 1], [1], [0]), "a leaf has no item"),
]


@pytest.mark.parametrize(
    ("tamper", "message"), INCONSISTENT, ids=[message[:50] for _, message in INCONSISTENT]
)
def test_refuses_inconsistent_arrays(tamper: Tamper, message: str, tmp_path: Path) -> None:
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
    arrays[name][place % arrays[name].size] = value % 2**16 if arrays[name].dtype == np.uint16 else value
    path = tmp_path_factory.getbasetemp() / "tampered"
    try:
        trie_arrays.verify(arrays)
    except ValueError:
        return
    levels = trie_arrays.levels_of(arrays)
    trie_file.write(path, arrays, levels, trie_arrays.fingerprint(arrays))
    loaded = PrefixTrie.load(path, verify=True)
    prefixes: list[list[int]] = [[]]
    for node in range(1, loaded.num_nodes):
        prefixes.append([*prefixes[int(loaded.parent[node])], int(loaded.token[node])])
    present = [item for item, node in enumerate(loaded.item_node.tolist()) if node >= 0]
    items = [prefixes[int(loaded.item_node[item])] for item in present]
    rebuilt = PrefixTrie([path + [-1] * (loaded.max_depth - len(path)) for path in items])
    for derived in ("first_child", "narrow_token", "parent", "item_count", "first_item"):
        assert torch.equal(getattr(loaded, derived), getattr(rebuilt, derived))
    assert loaded.node_items.tolist() == [present[item] for item in rebuilt.node_items.tolist()]


def test_reads_what_safetensors_writes_and_the_other_way_round(tmp_path: Path) -> None:
    trie = PrefixTrie(ROWS)
    save_as_trie(arrays_of(trie), tmp_path / "theirs")
    assert_same(PrefixTrie.load(tmp_path / "theirs"), trie)
    trie.save(tmp_path / "ours")
    for name, array in safetensors.numpy.load_file(tmp_path / "ours").items():
        np.testing.assert_array_equal(array, getattr(trie, name).numpy())


def test_levels_that_are_not_those_of_the_arrays_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    arrays = arrays_of(PrefixTrie(ROWS))
    levels = trie_arrays.levels_of(arrays)._asdict()
    for name, value in (("offsets", (0, 1, 2, 6)), ("largest_token", (4, 4)), ("most_children", (2,))):
        save_as_trie(arrays, path, levels=json.dumps(levels | {name: value}))
        refuse(path, "its levels")
    for text in (
        "",
        "[]",
        "{}",
        json.dumps(levels | {"more": []}),
        json.dumps(levels | {"offsets": [0, "1"]}),
    ):
        save_as_trie(arrays, path, levels=text)
        refuse(path, "level")


def test_an_untouched_file_is_trusted_and_any_other_checked(tmp_path: Path) -> None:
    """Then no array is read: loading takes the same time whatever the size."""
    path = tmp_path / "trie"
    trie = PrefixTrie(ROWS)
    trie.save(path)
    saved = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert path.stat().st_mtime_ns > saved.st_mtime_ns
    for load in (PrefixTrie.load, NumpyTrie.load):
        with pytest.raises(ValueError, match="is not a saved PrefixTrie"):
            load(path)
    os.utime(path, ns=(saved.st_atime_ns, saved.st_mtime_ns))
    assert PrefixTrie.load(path).fingerprint == trie.fingerprint
    for load in (PrefixTrie.load, NumpyTrie.load):
        with pytest.raises(ValueError, match="is not a saved PrefixTrie"):
            load(path, verify=True)


def test_a_changed_header_is_never_trusted(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    PrefixTrie(ROWS).save(path)
    saved, content = path.stat(), path.read_bytes()
    for old, new in (
        (b'\\"largest_token\\": [4, 5]', b'\\"largest_token\\": [4, 4]'),
        (b"[0, 28]", b"[28, 0]"),
    ):
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))
        os.utime(path, ns=(saved.st_atime_ns, saved.st_mtime_ns))
        refuse(path, "")


def test_writing_to_a_loaded_trie_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "trie"
    PrefixTrie(ROWS).save(path)
    content = path.read_bytes()
    PrefixTrie.load(path).item_node.zero_()
    assert path.read_bytes() == content
    assert_is(PrefixTrie.load(path), ROWS)
