"""The NumPy front of the C++ core, held against `PrefixTrie` and the ops on tensors."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import World, worlds
from filter_cases import Filtered, filtered
from hypothesis import given
from hypothesis import strategies as st

from gflowgr import PrefixTrie, ops
from gflowgr.numpy_trie import ARRAYS, NumpyTrie
from gflowgr.ops._filters import NO_FILTER

pytest.importorskip("gflowgr._core", reason="the C++ extension is not compiled")

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "unaligned")
ROWS = [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6]]


def laid_out(values: np.ndarray, layout: str) -> np.ndarray:
    """The same numbers (for "expanded" the first row's) under other strides."""
    if layout == "transposed":
        return np.asfortranarray(values)
    if layout == "sliced":
        wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan, dtype=values.dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    if layout == "expanded" and values.size:
        return np.broadcast_to(values.reshape(-1, values.shape[-1])[0], values.shape)
    if layout == "unaligned":
        raw = np.zeros(values.nbytes + 1, dtype=np.uint8)
        moved = raw[1:].view(values.dtype).reshape(values.shape)
        moved[...] = values
        return moved
    return values


@given(worlds, SHAPES, st.sampled_from(LAYOUTS), st.sampled_from((np.float32, np.float64, np.float16)))
def test_policy_and_draws_are_the_ops(world: World, shape: tuple[int, ...], layout: str, dtype: Any) -> None:
    trie, ours = world.trie(torch.device("cpu")), NumpyTrie(world.rows)
    nodes = world.nodes(shape)
    logits = laid_out(world.normals((*shape, world.width)).numpy().astype(dtype), layout)
    tensor = torch.from_numpy(logits.copy())

    log_probs = ours.log_softmax(logits, nodes.numpy())
    expected = ops.trie_log_softmax(tensor, nodes, trie, backend="torch").numpy()
    assert log_probs.dtype == expected.dtype
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-6)

    tokens, reached, drawn = ours.sample(logits, nodes.numpy(), np.random.default_rng(0), temperature=0.7)
    uniform = torch.from_numpy(np.asarray(np.random.default_rng(0).random(shape)))
    paths, flat = tensor.reshape(1, -1, world.width), nodes.reshape(1, -1)
    expected_tokens, expected_nodes, expected_drawn = torch.ops.gflowgr.trie_sample(
        paths,
        flat,
        trie.first_child,
        trie.token,
        trie.max_children,
        uniform.reshape(1, -1),
        0.7,
        *NO_FILTER,
        "cpp",
    )
    assert tokens.shape == reached.shape == drawn.shape == shape
    np.testing.assert_array_equal(tokens.ravel(), expected_tokens[0])
    np.testing.assert_array_equal(reached.ravel(), expected_nodes[0])
    np.testing.assert_array_equal(drawn.ravel(), expected_drawn[0])


@given(worlds, SHAPES.filter(len), st.booleans())
def test_walk_and_items(world: World, shape: tuple[int, ...], from_anywhere: bool) -> None:
    ours, tokens = NumpyTrie(world.rows), world.tokens(shape)
    start = world.nodes(shape[:-1]) if from_anywhere else torch.zeros(shape[:-1], dtype=torch.int64)
    trie = world.trie(torch.device("cpu"))
    walked = ours.walk(tokens.numpy().astype(np.int32), start.numpy() if from_anywhere else 0)
    np.testing.assert_array_equal(walked, trie.walk(tokens, start=start, backend="torch"))
    for node in range(0, trie.num_nodes, 7):
        np.testing.assert_array_equal(ours.items(node), trie.items(node))


@given(filtered().filter(lambda case: not case.removed), SHAPES)
def test_filtered_policy_and_draws_are_the_ops(case: Filtered, inner: tuple[int, ...]) -> None:
    trie, ours = case.trie(torch.device("cpu")), NumpyTrie(case.rows)
    item_filter = case.filter(trie)
    numpy_filter = ours.filter(case.given_exclude(), case.given_allow(ours.item_sets), rows=case.contexts)
    nodes = case.nodes((case.contexts, *inner))
    logits = case.normals((*nodes.shape, case.width)).numpy()
    tensor = torch.from_numpy(logits)
    np.testing.assert_allclose(
        ours.log_softmax(logits, nodes.numpy(), item_filter=numpy_filter),
        ops.trie_log_softmax(tensor, nodes, trie, item_filter=item_filter, backend="torch"),
    )
    drawn = ours.sample(logits, nodes.numpy(), np.random.default_rng(0), item_filter=numpy_filter)
    for row in np.ndindex(*nodes.shape):
        children = case.children(row[0], int(nodes[row]))
        token = int(drawn[0][row])
        assert int(drawn[1][row]) == children.get(token, -1)
        policy = case.policy(row[0], logits[row].tolist(), int(nodes[row]))
        np.testing.assert_allclose(drawn[2][row], policy[token] if children else 0.0, atol=1e-12)
        assert bool(children) == (token >= 0)


def test_loads_what_a_prefix_trie_saves(tmp_path: Path) -> None:
    saved = PrefixTrie(ROWS)
    saved.save(tmp_path / "trie.safetensors")
    loaded = NumpyTrie.load(tmp_path / "trie.safetensors", threads=2)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name).numpy())
    assert (loaded.num_items, loaded.num_nodes) == (saved.num_items, saved.num_nodes)
    np.testing.assert_array_equal(loaded.walk([4, 5, 6]), saved.walk(torch.tensor([4, 5, 6])))


def test_refuses_files_that_are_no_trie(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "trie.safetensors"
    with pytest.raises(FileNotFoundError, match=r"trie\.safetensors"):
        NumpyTrie.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="its format is None"):
        NumpyTrie.load(path)
    PrefixTrie(ROWS).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="fingerprint"):
        NumpyTrie.load(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is not a saved PrefixTrie"):
        NumpyTrie.load(path)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda trie: NumpyTrie([[1.0]]), TypeError, "sequences has dtype float64"),
        (lambda trie: NumpyTrie([[1, -1, 2]]), ValueError, "sequences"),
        (lambda trie: trie.walk([1.0]), TypeError, "tokens has dtype float64"),
        (lambda trie: trie.walk(3), ValueError, r"tokens has shape \(\)"),
        (lambda trie: trie.walk([[1, 2]], [0, 0]), ValueError, r"start has shape \(2,\), needs \(1,\)"),
        (lambda trie: trie.log_softmax([0.0] * 7, 0), TypeError, "logits is a list"),
        (lambda trie: trie.log_softmax(np.zeros(7, np.int64), 0), TypeError, "logits has dtype int64"),
        (lambda trie: trie.log_softmax(np.zeros(7, ">f4"), 0), TypeError, "logits has dtype >f4"),
        (lambda trie: trie.log_softmax(np.zeros(6), 0), ValueError, "logits has 6 columns, needs more than"),
        (lambda trie: trie.log_softmax(np.zeros((2, 7)), [0]), ValueError, r"nodes has shape \(1,\)"),
        (lambda trie: trie.log_softmax(np.zeros(7), 0.0), TypeError, "nodes has dtype float64"),
        (
            lambda trie: trie.sample(np.zeros(7), 0, np.random.default_rng(), temperature=0.0),
            ValueError,
            "temperature is 0.0",
        ),
        (lambda trie: trie.items(-1), ValueError, "node is -1"),
        (lambda trie: trie.item_sets([[0], [5]]), ValueError, r"sets\[1\] has the item 5"),
        (
            lambda trie: trie.filter(allow=NumpyTrie(ROWS).item_sets([[0]]), rows=1),
            ValueError,
            "allow has sets of another trie",
        ),
        (lambda trie: trie.filter([[5]]), ValueError, "exclude has the item 5"),
        (
            lambda trie: trie.log_softmax(np.zeros((2, 7)), [0, 0], item_filter=trie.filter(rows=3)),
            ValueError,
            "item_filter has 3 rows",
        ),
        (
            lambda trie: trie.log_softmax(
                np.zeros((2, 7)), [0, 0], item_filter=NumpyTrie(ROWS).filter(rows=2)
            ),
            ValueError,
            "item_filter is of another trie",
        ),
        (
            lambda trie: trie.log_softmax(np.zeros((2, 7)), [0, 0], item_filter=[[0], [1]]),
            TypeError,
            "item_filter is a list",
        ),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(NumpyTrie(ROWS))


def test_importing_it_imports_no_torch() -> None:
    code = (
        "import sys; from gflowgr.numpy_trie import NumpyTrie; NumpyTrie([[0]]).walk([0]); "
        "assert not {'torch', 'triton'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_package_still_offers_its_names() -> None:
    code = (
        "import gflowgr; from gflowgr import *; assert gflowgr.ops is ops; "
        "assert PrefixTrie is gflowgr.PrefixTrie; assert not hasattr(gflowgr, 'nothing')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_survives_pickling_and_copying() -> None:
    trie = NumpyTrie([[1, 2], [1, 3], [4, 5]])
    logits = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    for other in (pickle.loads(pickle.dumps(trie)), copy.deepcopy(trie)):
        del trie
        trie = other
        assert trie.walk([[1, 3], [4, 9]]).tolist() == [[1, 4], [2, -1]]
        assert np.isneginf(trie.log_softmax(logits, [0, 1, 2])).sum() == 13
