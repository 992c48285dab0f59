"""Items that come and go: whatever was done to a trie, it is the one that building anew would give."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import catalogues
from hypothesis import given
from hypothesis import strategies as st
from trie_cases import ROWS, any_token, assert_is, assert_same

from gflowgr import ItemFilter, ItemSets, PrefixTrie, ops, reference, trie_arrays, trie_file
from gflowgr.trie_arrays import ARRAYS


def padded(rows: list[list[int]], width: int) -> list[list[int]]:
    return [row[:width] + [-1] * (width - len(row)) for row in rows]


def built_anew(items: list[list[int] | None]) -> dict[str, np.ndarray]:
    """The arrays of the items that are there, under the numbers that they have; None for a removed one."""
    numbers = [number for number, row in enumerate(items) if row is not None]
    present = [row for row in items if row is not None]
    arrays = trie_arrays.build_with_numpy(np.array(padded(present, max(map(len, present)))))
    item_node = np.full(len(items), -1, dtype=np.int32)
    item_node[numbers] = arrays["item_node"]
    node_items = np.array(numbers, dtype=np.int32)[arrays["node_items"]]
    return arrays | {"item_node": item_node, "node_items": node_items}


def assert_holds(trie: PrefixTrie, items: list[list[int] | None]) -> None:
    wanted = built_anew(items)
    for name in ARRAYS:
        found = getattr(trie, name).numpy()
        assert found.dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(found, wanted[name], err_msg=name)
    trie_arrays.verify({name: getattr(trie, name).numpy() for name in ARRAYS})
    assert trie.fingerprint == trie_arrays.fingerprint(wanted)
    levels = trie_arrays.levels_with_numpy(wanted)
    assert (trie.level_offsets, trie.max_children_at) == (levels.offsets, levels.most_children)
    smallest, largest = zip(*trie.token_ranges, strict=True)
    assert (smallest, largest) == (levels.smallest_token, levels.largest_token)
    rows = [[token for token in row if token >= 0] for row in trie.sequences().tolist()]
    assert rows == [[] if row is None else [token for token in row if token >= 0] for row in items]
    assert (trie.num_items, trie.num_present) == (len(items), sum(row is not None for row in items))


@pytest.mark.parametrize("core", ["compiled", "NumPy"])
def test_any_changes_give_what_building_anew_gives(
    core: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if core == "NumPy":
        monkeypatch.setattr(trie_arrays, "_core", None)
    path = tmp_path_factory.mktemp("live") / "trie"
    # Tokens on both sides of what 16 bits hold.
    tokens = st.one_of(st.integers(0, 3), st.integers(2**16 - 2, 2**16 + 1), any_token)

    @given(catalogues(tokens), st.data())
    def check(rows: list[list[int]], data: st.DataObject) -> None:
        trie, items = PrefixTrie(rows), list[Any](rows)
        for _ in range(data.draw(st.integers(1, 5))):
            before, kept = trie, list(items)
            action = data.draw(st.sampled_from(("add", "remove", "save")))
            if action == "add":
                more = data.draw(st.one_of(catalogues(tokens, max_levels=6), st.just(rows)))
                trie, items = trie.add(more), [*items, *more]
            elif action == "save":
                trie.save(path)
                trie = PrefixTrie.load(path, verify=data.draw(st.sampled_from((True, None))))
            else:
                present = [number for number, row in enumerate(items) if row is not None]
                wanted = data.draw(st.lists(st.sampled_from(present), unique=True))
                if len(wanted) == len(present):
                    with pytest.raises(ValueError, match="items has all that the trie holds, needs to leave"):
                        trie.remove(wanted)
                    continue
                trie = trie.remove(wanted)
                items = [None if number in wanted else row for number, row in enumerate(items)]
            assert_holds(trie, items)
            assert_holds(before, kept)

    check()


@pytest.mark.parametrize(
    "added", [[[0]], [[9]], [[5]], [[5, 6]], [[5, 6, 7]], [[5, 6, 7, 8, 9]], [[1, -1], [5, 1]]]
)
def test_added_rows_may_be_shorter_or_longer_than_the_trie_is_deep(added: list[list[int]]) -> None:
    """Rows with fewer levels than the trie left its last level unwritten; a fuzzer found it."""
    rows = [[5, 6, 7], [5, 8, 2**31 - 5]]
    trie = PrefixTrie(rows).add(added)
    assert_holds(trie, [*rows, *added])
    back = trie.remove(range(len(rows), len(rows + added)))
    assert_holds(back, [*rows, *[None] * len(added)])
    assert (back.max_depth, trie.max_depth) == (3, max(3, len(added[0])))


def test_tokens_widen_and_come_back() -> None:
    rows = [[1, 2], [65535, 3], [65536, 4]]
    trie = PrefixTrie(rows[:2])
    wide = trie.add(rows[2:])
    assert (trie.narrow_token.dtype, wide.narrow_token.dtype) == (torch.uint16, torch.int32)
    assert_holds(wide.remove([2]), [*rows[:2], None])
    assert wide.remove([0]).narrow_token.dtype == torch.int32


def test_a_change_of_a_large_catalogue() -> None:
    """Long runs of nodes that stay, and changes at the ends and in the middle of levels."""
    numbers = np.random.default_rng(0)
    rows = numbers.integers(0, 50, (3000, 5))
    rows[np.arange(5) >= numbers.integers(1, 6, (3000, 1))] = -1
    trie = PrefixTrie(rows[:2500]).add(rows[2500:])
    assert_same(trie, PrefixTrie(rows))
    items: list[Any] = rows.tolist()
    removed = numbers.permutation(3000)[:2900]
    for item in removed:
        items[item] = None
    assert_holds(trie.remove(removed), items)
    assert_holds(trie.remove(removed[:10]).remove(torch.from_numpy(removed[10:])), items)
    low, high = np.zeros((1, 5), dtype=int), np.full((1, 7), 2**31 - 2)
    assert_is(
        trie.add(low).add(high), [[*row, -1, -1] for row in [*rows.tolist(), *low.tolist()]] + high.tolist()
    )


def test_removing_nothing_changes_nothing() -> None:
    trie = PrefixTrie(ROWS)
    assert trie.remove([]) is trie
    assert trie.remove(torch.tensor([], dtype=torch.int64)) is trie


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([5], ValueError, r"items has 5, needs 0 \.\. 4"),
        ([-1], ValueError, r"items has -1, needs 0 \.\. 4"),
        ([1, 3, 1], ValueError, "items has 1 more than once"),
        ([[1]], ValueError, r"items has shape \(1, 1\), needs \(M,\)"),
        (2, ValueError, r"items has shape \(\), needs \(M,\)"),
        ([0.5], TypeError, "items has dtype float64, needs integers"),
        (torch.tensor([True, False]), TypeError, "items has dtype bool, needs integers"),
        ([0, 1, 2, 3, 4], ValueError, "items has all that the trie holds, needs to leave at least one"),
    ],
)
def test_refuses_to_remove(items: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PrefixTrie(ROWS).remove(items)


def test_a_removed_item_is_gone_for_good() -> None:
    trie = PrefixTrie(ROWS).remove([3])
    with pytest.raises(ValueError, match="items has 3, which was removed before"):
        trie.remove([0, 3])
    back = trie.add([ROWS[3]])
    assert back.items(int(back.item_node[5])).tolist() == [4, 5]
    assert int(back.item_node[3]) == -1


def test_refuses_to_add_what_it_refuses_to_build_from() -> None:
    trie = PrefixTrie(ROWS)
    with pytest.raises(ValueError, match=r"sequences has the row 1: \[-1, 2\], needs tokens, then only -1"):
        trie.add([[1, 2], [-1, 2]])
    with pytest.raises(ValueError, match=r"sequences has shape \(0, 2\)"):
        trie.add(np.zeros((0, 2), dtype=int))
    with pytest.raises(TypeError, match="sequences has dtype float64"):
        trie.add([[0.5]])


def test_changes_stay_on_their_device(device: torch.device) -> None:
    trie = PrefixTrie(ROWS).to(device)
    changed = trie.add([[7, 7]]).remove([0])
    assert changed.device == device
    assert_same(changed, PrefixTrie(ROWS).add([[7, 7]]).remove([0]))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_rewards_of_removed_items_do_not_count(backend: str) -> None:
    rows = np.random.default_rng(1).integers(0, 4, (40, 3))
    trie = PrefixTrie(rows).remove(range(0, 40, 3))
    present = trie.item_node >= 0
    rewards = torch.randn(2, 40, dtype=torch.float64, requires_grad=True)
    flows = ops.trie_log_flows(rewards, trie, backend=backend)
    alone = PrefixTrie(rows[present.numpy()])
    ours = rewards.detach()[:, present].requires_grad_()
    theirs = reference.trie_log_flows(ours, alone)
    torch.testing.assert_close(flows, theirs)
    grad = torch.randn(flows.shape, dtype=torch.float64)
    flows.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(rewards.grad[:, present], ours.grad)
    assert not rewards.grad[:, ~present].any()


def test_filters_do_not_see_removed_items() -> None:
    trie = PrefixTrie(ROWS).remove([1, 3])
    removed = ItemFilter(trie, exclude=[[0, 1, 3], [4, 3]])
    log_probs = ops.trie_child_log_probs(
        torch.zeros(2, 1, 6), torch.zeros(2, 1, dtype=int), trie, item_filter=removed
    )
    assert log_probs[0, 0].tolist() == [-np.inf, 0.0]
    assert log_probs[1, 0].exp().tolist() == [0.5, 0.5]


def test_a_filter_of_another_state_of_the_catalogue_is_refused() -> None:
    """Nodes have other numbers after a change, though there may be as many of them."""
    trie = PrefixTrie(ROWS)
    changed = trie.add([[1, 4]]).remove([1])
    assert changed.num_nodes == trie.num_nodes
    logits, roots = torch.zeros(1, 1, 6), torch.zeros(1, 1, dtype=torch.int64)
    for other in (trie, PrefixTrie(ROWS)):
        ops.trie_log_softmax(logits, roots, trie, item_filter=ItemFilter(other, exclude=[[0]]))
    with pytest.raises(ValueError, match=r"item_filter is of another trie, .* made anew when the catalogue"):
        ops.trie_log_softmax(logits, roots, changed, item_filter=ItemFilter(trie, exclude=[[0]]))
    with pytest.raises(ValueError, match="allow has sets of another trie"):
        ItemFilter(changed, allow=ItemSets(trie, [[0]]), rows=1)


def test_readers_see_the_old_trie_or_the_new_one() -> None:
    """Threads read while another one publishes changes; version v holds the items [v, 0] .. [v, 30] alone."""
    current = [PrefixTrie([[1, item] for item in range(31)])]
    failures: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            trie = current[0]
            version = int(trie.children(0)[0])
            nodes = trie.walk([[version, item] for item in range(31)])
            present = trie.item_node[trie.item_node >= 0]
            if trie.num_present != 31 or not torch.equal(nodes[:, 1].int(), present):
                failures.append(f"version {version}: {nodes.tolist()}")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for version in range(2, 40):
        wider = current[0].add([[version, item] for item in range(31)])
        current[0] = wider.remove(range(wider.num_items - 62, wider.num_items - 31))
    done.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert current[0].num_items == 39 * 31


def test_a_saved_trie_with_removed_items_comes_back(tmp_path: Path) -> None:
    trie = PrefixTrie(ROWS).remove([0])
    trie.save(tmp_path / "trie")
    for verify in (None, True):
        assert_same(PrefixTrie.load(tmp_path / "trie", verify=verify), trie)
    assert trie_file.read(tmp_path / "trie").fingerprint == trie.fingerprint
