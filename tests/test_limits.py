"""Absurd sizes, memory that runs out, files that were cut: a result, or an error that says why."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz import files

from gflowgr import PrefixTrie, ops
from gflowgr.numpy_trie import NumpyTrie
from gflowgr.serving import CatalogueConstraint
from gflowgr.trie_arrays import build_with_numpy

pytest.importorskip("gflowgr._core", reason="the C++ extension is not compiled")

LARGEST = 2**31 - 2
_POLICY = Path("/proc/sys/vm/overcommit_memory")
# An allocation then never fails, and whoever uses it is killed.
OVERCOMMITS = _POLICY.is_file() and _POLICY.read_text().strip() == "1"


@pytest.mark.parametrize(
    ("sequences", "reason"),
    [
        (np.zeros((0, 3), dtype=np.int64), r"sequences has shape \(0, 3\)"),
        (np.zeros((3, 0), dtype=np.int64), r"sequences has shape \(3, 0\)"),
        ([], r"sequences has shape \(0,\)"),
        ([[]], r"sequences has shape \(1, 0\)"),
        (torch.empty(0, 0, dtype=torch.int32), r"sequences has shape \(0, 0\)"),
        ([[2**31 - 1]], "sequences has the token 2147483647"),
        ([[2**62]], f"sequences has the token {2**62}"),
        (np.array([[2**64 - 1]], dtype=np.uint64), f"sequences has the token {2**64 - 1}"),
        ([[-1] * 10_000], r"sequences has the row 0"),
        (np.broadcast_to(np.int8(1), (2**31, 4)), r"sequences has shape \(2147483648, 4\)"),
        (np.broadcast_to(np.int8(1), (2**20, 2**40)), r"sequences has shape"),
    ],
)
@pytest.mark.parametrize("build", [PrefixTrie, NumpyTrie])
def test_refused_by_name(sequences: Any, reason: str, build: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        build(sequences)


def test_the_largest_token() -> None:
    trie = PrefixTrie([[LARGEST, 0, LARGEST], [LARGEST, LARGEST, -1], [0, -1, -1]])
    assert trie.children(0).tolist() == [0, LARGEST]
    assert trie.walk([[LARGEST, 0, LARGEST], [0, LARGEST, 0]]).tolist() == [[2, 3, 5], [1, -1, -1]]
    assert trie.max_token == LARGEST
    with pytest.raises(ValueError, match="trie has the token 2147483646"):
        ops.trie_token_log_probs(torch.zeros(1, 3, 8), torch.zeros(1, 3, dtype=torch.long), trie)


def test_all_items_equal() -> None:
    trie = PrefixTrie(torch.tensor([[5, 6, 7]]).expand(100_000, 3))
    assert (trie.num_nodes, trie.num_items) == (4, 100_000)
    assert trie.items(3).tolist() == list(range(100_000))
    log_probs = ops.trie_token_log_probs(torch.randn(1, 3, 8), torch.tensor([[5, 6, 7]]), trie)
    assert log_probs.tolist() == [[0, 0, 0]]
    log_flows = ops.trie_log_flows(torch.zeros(1, 100_000, dtype=torch.float64), trie)
    torch.testing.assert_close(log_flows, torch.full((1, 4), 100_000, dtype=torch.float64).log())


DEPTH = 10_000


@pytest.fixture(scope="module")
def deep() -> tuple[PrefixTrie, torch.Tensor]:
    """Two items that part at the middle of 10,000 levels, and one that ends there."""
    rows = torch.stack([torch.arange(DEPTH) % 7] * 3)
    rows[1, DEPTH // 2] = 6
    rows[2, DEPTH // 2 :] = -1
    return PrefixTrie(rows), rows


def test_a_deep_chain_is_built_saved_and_walked(
    deep: tuple[PrefixTrie, torch.Tensor], tmp_path: Path
) -> None:
    trie, rows = deep
    assert (trie.max_depth, trie.num_nodes) == (DEPTH, 1 + DEPTH + DEPTH // 2)
    for name, array in build_with_numpy(rows.numpy()).items():
        np.testing.assert_array_equal(getattr(trie, name), array)
    trie.save(tmp_path / "deep")
    assert PrefixTrie.load(tmp_path / "deep").fingerprint == trie.fingerprint
    assert (NumpyTrie.load(tmp_path / "deep").walk(rows[0])[-1]) == trie.item_node[0]
    for backend in ("cpp", "torch"):
        nodes = trie.walk(rows, backend=backend)
        assert nodes[:2, -1].tolist() == trie.item_node[:2].tolist()
        assert trie.items(int(nodes[2, DEPTH // 2 - 1])).tolist() == [2]
    ends = trie.walk(rows[:2])[:, -1].tolist()
    assert [trie.items(node).tolist() for node in ends] == [[0], [1]]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_deep_chain_is_scored(deep: tuple[PrefixTrie, torch.Tensor], backend: str) -> None:
    trie, rows = deep
    logits = torch.randn(2, DEPTH, 7, dtype=torch.float64, requires_grad=True)
    log_probs = ops.trie_token_log_probs(logits, rows[:2], trie, backend=backend)
    # One step of all has a choice.
    fork = logits[:, DEPTH // 2][:, [int(rows[0, DEPTH // 2]), 6]].log_softmax(1)
    torch.testing.assert_close(log_probs.sum(1), torch.stack([fork[0, 0], fork[1, 1]]))
    log_probs.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum((0, 2)).count_nonzero() == 1


@pytest.mark.parametrize(("backend", "depth"), [("cpp", DEPTH), ("torch", 1000)])
def test_flows_of_a_deep_chain(deep: tuple[PrefixTrie, torch.Tensor], backend: str, depth: int) -> None:
    # The definition makes a node of autograd's graph for each level.
    trie = deep[0] if depth == DEPTH else PrefixTrie(deep[1][:2, -depth:])
    log_rewards = torch.randn(1, trie.num_items, dtype=torch.float64, requires_grad=True)
    log_flows = ops.trie_log_flows(log_rewards, trie, backend=backend)
    torch.testing.assert_close(log_flows[:, 0], log_rewards.logsumexp(1))
    log_flows[:, 0].backward()
    torch.testing.assert_close(log_rewards.grad, log_rewards.detach().softmax(1))


def test_a_deep_chain_is_served(deep: tuple[PrefixTrie, torch.Tensor]) -> None:
    trie, rows = deep
    constraint = CatalogueConstraint(trie, 7)
    written = [rows[0].tolist(), rows[1, :-1].tolist(), rows[0].tolist() * 3]
    log_probs = constraint.log_probs(torch.zeros(3, 8), written)
    assert log_probs.argmax(1).tolist() == [7, int(rows[1, -1]), 7]


@pytest.mark.skipif(OVERCOMMITS, reason="the system promises memory that it does not have")
def test_a_result_beyond_all_memory_is_an_error() -> None:
    trie = PrefixTrie([[0, 1], [2, 3]])
    rows = torch.zeros(1, 4).expand(2**40, 4)
    with pytest.raises(RuntimeError, match="allocate"):
        ops.trie_log_softmax(rows, torch.zeros(1, dtype=torch.long).expand(2**40), trie)


def run(script: str, *arguments: str) -> str:
    """A process of its own; a crash or an error in it fails the test."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


SCARCE = """
import resource, sys
import numpy as np, torch
from gflowgr import PrefixTrie, ops

rng = np.random.default_rng(0)
rows = rng.integers(0, 256, (200_000, 6))
trie = PrefixTrie(rows[:1000])
trie.save(sys.argv[1])
logits = torch.zeros(1, 256).expand(100_000, 256)
nodes = torch.zeros(100_000, dtype=torch.long)
steps = {
    "build": lambda: PrefixTrie(rows),
    "flows": lambda: ops.trie_log_flows(torch.zeros(2000, 1000), trie),
    "softmax": lambda: ops.trie_log_softmax(logits, nodes, trie),
    "load": lambda: PrefixTrie.load(sys.argv[1]),
}
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
refused = finished = 0
for name, step in steps.items():
    for spare in (0, 2, 5, 10, 20, 40, 80, 1000):
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (spare << 20), -1))
        try:
            step()
            finished += 1
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "allocate" not in str(error):
                raise
            refused += 1
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        assert trie.walk(rows[:1000]).min() > 0, "what was there before still serves"
print(refused, finished)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's address space limits")
def test_out_of_memory_is_an_error_and_leaves_the_process_whole(tmp_path: Path) -> None:
    refused, finished = map(int, run(SCARCE, str(tmp_path / "trie")).split())
    assert refused >= 8
    assert finished >= 4


WITHOUT_THREADS = """
import resource
import torch
from gflowgr import PrefixTrie, ops

trie = PrefixTrie([[item % 40, item] for item in range(2000)])
logits, nodes = torch.randn(4096, 2000), torch.randint(0, 41, (4096,))
out = torch.empty(4096, 2000)
torch.set_num_threads(1)
expected = ops.trie_sample(logits, nodes, trie, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(5)
# Below what the stack of one more thread takes.
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (3 << 20), -1))
found = ops.trie_sample(logits, nodes, trie, generator=torch.Generator().manual_seed(0), backend="cpp")
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
again = ops.trie_sample(logits, nodes, trie, generator=torch.Generator().manual_seed(0), backend="cpp")
for results in (found, again):
    assert all(map(torch.equal, results, expected))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's address space limits")
def test_no_threads_to_be_had_is_no_error() -> None:
    run(WITHOUT_THREADS)


KILLED = """
import os, random, signal, sys, time
from gflowgr import PrefixTrie

path = sys.argv[1]
tries = [PrefixTrie([[item * step % 211, item] for item in range(20_000)]) for step in (1, 7)]
prints = {trie.fingerprint for trie in tries}
tries[0].save(path)
rng, seen = random.Random(0), set()
for _ in range(25):
    child = os.fork()
    if child == 0:
        while True:
            for trie in tries:
                trie.save(path)
    time.sleep(rng.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    loaded = PrefixTrie.load(path, verify=True)
    assert loaded.fingerprint in prints
    seen.add(loaded.fingerprint)
assert seen == prints, "the children did save"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_during_saves_leave_a_whole_file(tmp_path: Path) -> None:
    run(KILLED, str(tmp_path / "trie"))


@pytest.fixture
def small(tmp_path: Path) -> tuple[bytes, set[str], Path]:
    trie = PrefixTrie(files.CATALOGUES[0])
    path = tmp_path / "small.safetensors"
    trie.save(path)
    return path.read_bytes(), {trie.fingerprint}, path


def test_a_file_cut_anywhere_is_refused(small: tuple[bytes, set[str], Path]) -> None:
    data, _, path = small
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"small\.safetensors"):
            PrefixTrie.load(path)


def test_a_flipped_bit_is_refused_or_without_effect(small: tuple[bytes, set[str], Path]) -> None:
    data, prints, path = small
    rng = random.Random(0)
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        assert files.finding(path, prints) is None


def test_changed_files_are_refused_or_without_effect(tmp_path: Path) -> None:
    originals = files.saved(tmp_path)
    path = tmp_path / "changed.safetensors"
    for number, data in enumerate(files.mutants(list(originals.values()), random.Random(0))):
        path.write_bytes(data)
        assert files.finding(path, set(originals)) is None
        if number == 1500:
            break


def test_arrays_that_are_not_aligned_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shifted.safetensors"
    PrefixTrie([[1, 2], [1, 3]]).save(path)
    header, arrays = files.parts(path.read_bytes())
    path.write_bytes((len(header) + 1).to_bytes(8, "little") + header + b" " + arrays)
    with pytest.raises(ValueError, match=r"shifted.*multiple of 8"):
        PrefixTrie.load(path)


def test_the_fuzzer_sees_a_file_that_got_through(tmp_path: Path) -> None:
    """A checker that finds nothing must be able to find something."""
    path = tmp_path / "other.safetensors"
    PrefixTrie([[9, 9]]).save(path)
    assert (
        files.finding(path, {PrefixTrie([[9, 8]]).fingerprint}) == "another catalogue than any that was saved"
    )
    trie = PrefixTrie.load(path)
    assert files.levels_agree(trie, trie._arrays())
    trie.max_children_at = (1, 2)
    assert not files.levels_agree(trie, trie._arrays())
