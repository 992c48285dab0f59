"""What holds across the ops: threads and forks, 64-bit offsets, missing backends, errors, the poison."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core_cases import backends, device_of
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import gflowgr
from gflowgr import PrefixTrie, ops
from gflowgr.ops import _cpp, _registry

ROWS = [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6], [7, 0, -1], [7, 3, -1], [7, 9, -1]]
WIDTH = 10


def catalogue() -> PrefixTrie:
    return PrefixTrie(np.random.default_rng(0).integers(0, 50, (500, 3)))


def batch(trie: PrefixTrie, rows: int, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """Of many rows, so that the pool takes part."""
    generator = torch.Generator().manual_seed(seed)
    paths = torch.randint(0, 50, (rows, 3), generator=generator)
    nodes = torch.randint(0, trie.num_nodes, (rows, 3), generator=generator)
    logits = torch.randn(rows, 3, 50, generator=generator)
    rewards = torch.randn(rows // 8 + 1, trie.num_items, generator=generator)
    return {
        name: v.to(device)
        for name, v in {"paths": paths, "nodes": nodes, "logits": logits, "r": rewards}.items()
    }


def everything(trie: PrefixTrie, x: dict[str, Tensor], backend: str = "cpp") -> list[Tensor]:
    """The results and gradients of all ops that use threads."""
    logits, rewards = x["logits"].detach().requires_grad_(), x["r"].detach().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    flows = ops.trie_log_flows(rewards, trie, backend=backend)
    results = [
        ops.trie_walk(x["paths"], trie, backend=backend),
        ops.trie_log_softmax(logits, x["nodes"], trie, backend=backend),
        ops.trie_token_log_probs(logits, x["paths"], trie, backend=backend),
        *ops.trie_sample(logits, x["nodes"], trie, generator=generator, backend=backend),
        flows,
        ops.flow_matching(logits, x["nodes"], trie, flows[0], backend=backend, reduction="none"),
        ops.trie_trajectory_balance(logits, x["paths"], trie, 1.0, 0.5, backend=backend, reduction="none"),
    ]
    finite = [torch.where(y.isfinite(), y, 0.0) for y in results if y.requires_grad]
    total = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in finite)
    return [y.detach() for y in results] + list(torch.autograd.grad(total, (logits, rewards)))


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# Threads


def test_results_do_not_depend_on_the_number_of_threads(
    threads: Callable[[int], None], poisoned_memory: None
) -> None:
    """The poison keeps a row that no thread wrote from holding what an earlier run left there."""
    trie = catalogue()
    for rows in (1, 33, 400, 4000):
        x = batch(trie, rows)
        threads(1)
        alone = everything(trie, x)
        for count in (2, 3, 8):
            threads(count)
            assert_equal(everything(trie, x), alone)


def test_python_threads_may_call_at_once(threads: Callable[[int], None]) -> None:
    trie = catalogue()
    batches = [batch(trie, 4000, seed) for seed in range(8)]
    threads(1)
    expected = [everything(trie, x) for x in batches]

    def work(index: int) -> list[Tensor]:
        torch.set_num_threads(2)
        for _ in range(3):
            result = everything(trie, batches[index])
        return result

    with ThreadPoolExecutor(8) as executor:
        for result, wanted in zip(executor.map(work, range(8)), expected, strict=True):
            assert_equal(result, wanted)


class Walks(Dataset[Tensor]):
    """A data set whose workers use the ops with two threads."""

    def __init__(self, trie: PrefixTrie, x: dict[str, Tensor]) -> None:
        self.trie, self.x = trie, x

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(2)
        rows = {
            name: v if name == "r" else v[index * 1000 : (index + 1) * 1000] for name, v in self.x.items()
        }
        return ops.trie_token_log_probs(rows["logits"], rows["paths"], self.trie, backend="cpp")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
# On a single core.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning")
def test_forked_workers_have_a_pool_of_their_own(threads: Callable[[int], None]) -> None:
    """A worker that waited for threads which only its parent has would never answer."""
    trie = catalogue()
    x = batch(trie, 4000)
    threads(2)
    expected = ops.trie_token_log_probs(x["logits"], x["paths"], trie, backend="cpp")
    workers = DataLoader(
        Walks(trie, x), batch_size=1, num_workers=2, multiprocessing_context="fork", timeout=15
    )
    for _ in range(2):
        assert torch.equal(torch.cat([rows.flatten(0, 1) for rows in workers]), expected)
        assert torch.equal(ops.trie_token_log_probs(x["logits"], x["paths"], trie, backend="cpp"), expected)


# More than 2**31 elements


@pytest.fixture
def sparse() -> Iterator[Callable[[int, torch.dtype], Tensor]]:
    """Makes tensors of any size over files with holes: pages that are not touched cost nothing."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:

        def make(size: int, dtype: torch.dtype) -> Tensor:
            path = Path(folder) / f"{len(os.listdir(folder))}"
            path.touch()
            os.truncate(path, size * dtype.itemsize)
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype)

        yield make
        for path in Path(folder).iterdir():
            assert path.stat().st_blocks * 512 < 2**26


HUGE = 2**31 + 4096


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_beyond_32_bits(axis: int, sparse: Callable[[int, torch.dtype], Tensor]) -> None:
    """A stride of batch, step or token past 2**31 elements, in address space that holds nothing."""
    trie = PrefixTrie([[0, 2], [0, 3], [1, 2], [1, 3], [1, 0]])
    shape, stride = [2, 2, 4], [8, 4, 1]
    shape[axis], stride[axis] = shape[axis], HUGE
    logits = sparse((shape[axis] - 1) * HUGE + 32, torch.float16).as_strided(shape, stride)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    logits.copy_(values)
    tokens, nodes = torch.tensor([[0, 3], [1, 0]]), torch.tensor([[0, 1], [2, 0]])
    rewards, flows = torch.randn(2), torch.randn(trie.num_nodes)
    results = []
    for given in (values, logits):
        leaf = given.detach().requires_grad_()
        generator = torch.Generator().manual_seed(0)
        outputs = [
            ops.trie_log_softmax(leaf, nodes, trie, backend="cpp"),
            ops.trie_token_log_probs(leaf, tokens, trie, backend="cpp"),
            ops.trie_trajectory_balance(leaf, tokens, trie, rewards, 0.0, reduction="none", backend="cpp"),
            ops.flow_matching(leaf, nodes, trie, flows, reduction="none", backend="cpp"),
            *ops.trie_sample(leaf, nodes, trie, generator=generator, backend="cpp")[::2],
        ]
        total = sum(torch.where(y.isfinite(), y, 0.0).square().sum() for y in outputs if y.requires_grad)
        results.append([*outputs, *torch.autograd.grad(total, leaf)])
    assert_equal(*results)


def test_gradients_beyond_32_bits(
    sparse: Callable[[int, torch.dtype], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 2**31 elements of gradient: the logits are rows of stride 0, the zeros a file with holes."""
    width = 2**22
    rows = HUGE // width + 2
    assert rows * width > 2**31

    def sparse_zeros(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        small = math.prod(shape) < 2**31
        return torch.zeros(shape, dtype=dtype) if small else sparse(math.prod(shape), dtype).view(shape)

    trie = PrefixTrie([[0], [width - 1]])
    arrays = (trie.first_child, trie.token, trie.max_children)
    logits = torch.zeros(width, dtype=torch.float16).expand(rows, 1, width)
    root, grad = torch.zeros(rows, 1, dtype=torch.int64), torch.arange(1.0, rows + 1).unsqueeze(1)
    # Each row's token, and all its flow, is the first child or the last one by turns.
    last = torch.arange(rows) % 2
    tokens = last.unsqueeze(1) * (width - 1)
    flows = torch.stack([torch.zeros(rows), -last * math.inf, (last - 1) * math.inf], 1).nan_to_num(
        0.0, neginf=-math.inf
    )
    away = torch.stack([grad[:, 0], -grad[:, 0]], 1) / 2 * (1 - 2 * last).unsqueeze(1)
    monkeypatch.setattr(_cpp, "zeros", sparse_zeros)
    from_tokens = _cpp.trie_token_log_probs_backward(grad, logits, tokens, root[:, 0], *arrays, 0)
    from_flows, _ = _cpp.flow_matching_backward(grad, logits, root, *arrays, flows, False)
    for got, wanted in ((from_tokens, away), (from_flows, -away)):
        assert got.numel() > 2**31
        torch.testing.assert_close(torch.stack([got[:, 0, 0], got[:, 0, -1]], 1), wanted.half())


@pytest.mark.slow
def test_a_dense_result_beyond_32_bits() -> None:
    """The dense distribution is the one result that is itself this large; it takes 9 GB for a moment."""
    width = 2**20
    rows = 2**11 + 3
    trie = PrefixTrie([[0], [width - 1]])
    logits = torch.zeros(width, dtype=torch.bfloat16).expand(rows, width)
    dense = ops.trie_log_softmax(logits, torch.zeros(rows, dtype=torch.int64), trie, backend="cpp")
    assert dense.numel() > 2**31
    ends = dense[:, [0, -1]]
    torch.testing.assert_close(ends, torch.full_like(ends, -math.log(2)))
    assert (dense[-1, 1:-1] == -math.inf).all()


# Backends


def test_auto_takes_the_backend_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, other = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
    monkeypatch.setattr(_registry, "HAS_CPP", True)
    monkeypatch.setattr(_registry, "HAS_TRITON", True)
    for op in _registry.CPP_OPS:
        assert _registry.resolve_backend("auto", op, cpu) == "cpp"
        assert _registry.resolve_backend("auto", op, cuda) == (
            "triton" if op in _registry.TRITON_OPS else "torch"
        )
        assert _registry.resolve_backend("auto", op, other) == "torch"
    monkeypatch.setattr(_registry, "HAS_CPP", False)
    monkeypatch.setattr(_registry, "HAS_TRITON", False)
    for device in (cpu, cuda, other):
        assert _registry.resolve_backend("auto", "trie_sample", device) == "torch"


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trie, logits, root = PrefixTrie(ROWS), torch.randn(1, WIDTH), torch.zeros(1, dtype=torch.int64)
    call = partial(ops.trie_log_softmax, logits, root, trie)
    with pytest.raises(
        ValueError, match=r"backend is 'cuda', needs one of \('auto', 'cpp', 'triton', 'torch'\)"
    ):
        call(backend="cuda")
    monkeypatch.setattr(_registry, "TRITON_INTERPRETS", False)
    with pytest.raises(
        RuntimeError,
        match=r"backend='triton' cannot run trie_log_softmax on cpu: Triton needs a CUDA device, or TRITON",
    ):
        call(backend="triton")
    monkeypatch.setattr(_registry, "HAS_TRITON", False)
    with pytest.raises(
        RuntimeError, match=r"backend='triton' .*: Triton is not installed; `pip install triton`"
    ):
        call(backend="triton")
    monkeypatch.setattr(_registry, "TRITON_OPS", frozenset())
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot run trie_log_flows on cpu: .* no kernel for it"
    ):
        ops.trie_log_flows(torch.zeros(len(ROWS)), trie, backend="triton")
    with pytest.raises(
        RuntimeError, match=r"backend='cpp' cannot run .* on meta: the C.. core reads CPU memory only"
    ):
        ops.trie_log_softmax(logits.to("meta"), root.to("meta"), trie.to("meta"), backend="cpp")
    expected = call(backend="cpp")
    monkeypatch.setattr(_registry, "HAS_CPP", False)
    with pytest.raises(
        RuntimeError,
        match=r"backend='cpp' cannot run trie_log_softmax on cpu: the C.. extension is not compiled; rein",
    ):
        call(backend="cpp")
    torch.testing.assert_close(call(), expected)


def test_works_without_the_extension_and_without_triton(tmp_path: Path) -> None:
    """The package's Python files alone: what is missing is named when asked for, everything else works."""
    source = Path(gflowgr.__file__).parent
    package = tmp_path / "gflowgr"
    (package / "ops").mkdir(parents=True)
    for name in ("__init__", "trie", "trie_arrays", "trie_file", "numpy_trie", "item_sets", "reference"):
        (package / f"{name}.py").symlink_to(source / f"{name}.py")
    for file in (source / "ops").glob("*.py"):
        (package / "ops" / file.name).symlink_to(file)
    program = """
import sys
sys.modules["triton"] = None  # import fails, as it does where Triton is not installed
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import gflowgr, torch
from gflowgr import PrefixTrie, ops
assert not ops._registry.HAS_CPP and not ops._registry.HAS_TRITON
trie = PrefixTrie([[1, 2], [1, 3], [4, -1]])
assert trie.walk([[1, 3], [4, 4]]).tolist() == [[1, 4], [2, -1]]
logits = torch.zeros(2, 2, 5)
assert ops.trie_token_log_probs(logits, torch.tensor([[1, 3], [4, -1]]), trie).exp().tolist()[1] == [0.5, 1.0]
for backend, missing in (("cpp", "the C++ extension is not compiled"), ("triton", "Triton is not installed")):
    try:
        ops.trie_token_log_probs(logits, torch.tensor([[1, 3], [4, -1]]), trie, backend=backend)
    except RuntimeError as error:
        assert missing in str(error), error
    else:
        raise AssertionError(backend)
from gflowgr.numpy_trie import NumpyTrie
try:
    NumpyTrie([[1, 2]])
except ImportError as error:
    assert "the C++ extension is not compiled" in str(error), error
else:
    raise AssertionError("NumpyTrie")
print(gflowgr.__file__)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(package / "__init__.py")


# Errors

TRIE = PrefixTrie(ROWS)
GOOD: dict[str, Any] = {
    "logits": torch.zeros(2, 3, WIDTH),
    "hidden": torch.zeros(2, 3, 4),
    "weight": torch.zeros(WIDTH, 4),
    "bias": torch.zeros(WIDTH),
    "tokens": torch.zeros(2, 3, dtype=torch.int64),
    "nodes": torch.zeros(2, 3, dtype=torch.int64),
    "trie": TRIE,
    "log_probs": torch.zeros(2, 3),
    "log_rewards": torch.zeros(2),
    "log_z": torch.zeros(2),
    "log_flows": torch.zeros(2, 4),
}
ARGUMENTS = {
    "trie_walk": ("tokens", "trie"),
    "trie_log_softmax": ("logits", "nodes", "trie"),
    "trie_child_log_probs": ("logits", "nodes", "trie"),
    "trie_token_log_probs": ("logits", "tokens", "trie"),
    "trie_linear_token_log_probs": ("hidden", "weight", "tokens", "trie", "bias"),
    "trie_sample": ("logits", "nodes", "trie"),
    "trie_log_flows": ("log_rewards", "trie"),
    "trajectory_balance": ("log_probs", "log_rewards", "log_z"),
    "trie_trajectory_balance": ("logits", "tokens", "trie", "log_rewards", "log_z"),
    "log_partition_variance": ("log_probs", "log_rewards"),
    "trie_log_partition_variance": ("logits", "tokens", "trie", "log_rewards"),
    "detailed_balance": ("log_probs", "log_flows"),
    "subtrajectory_balance": ("log_probs", "log_flows"),
    "flow_matching": ("logits", "nodes", "trie", "log_flows"),
}
OWN = {
    "trie_log_flows": {"log_rewards": torch.zeros(2, len(ROWS))},
    "flow_matching": {"log_flows": torch.zeros(2, TRIE.num_nodes)},
    "log_partition_variance": {"group_size": 2},
    "trie_log_partition_variance": {"group_size": 2},
}


def call_with(op: str, **changes: Any) -> Any:
    given = {name: GOOD[name] for name in ARGUMENTS[op]} | OWN.get(op, {}) | changes
    positional = [given.pop(name) for name in ARGUMENTS[op]]
    return getattr(ops, op)(*positional, **given)


def bad_arguments() -> Iterator[Any]:
    """(op, argument, value, exception, message) for everything that every op must refuse."""
    meta = torch.device("meta")
    for op, names in ARGUMENTS.items():
        for name in (*names, "mask", "weights"):
            balance = "balance" in op or "variance" in op
            if (name == "mask" and (not balance or op.startswith("trie_"))) or (
                name == "weights" and not balance
            ):
                continue
            good = OWN.get(op, {}).get(name, GOOD.get(name))
            if name == "mask":
                good = torch.ones(2, 3, dtype=torch.bool)
            if name == "weights":
                good = torch.ones(2)
            kinds = {"mask": "torch.bool", "tokens": "integers", "nodes": "integers"}
            if name == "trie":
                yield op, name, ROWS, TypeError, "trie is a list, needs a gflowgr.PrefixTrie"
                yield op, name, None, TypeError, "trie is a NoneType"
                yield (
                    op,
                    name,
                    TRIE.to(meta),
                    ValueError,
                    r"trie is on meta, needs cpu; move it with trie.to\('cpu'\)",
                )
                if op not in ("trie_walk", "trie_log_flows"):
                    large = PrefixTrie([[WIDTH]])
                    wide = "needs tokens below the vocabulary's size, 10"
                    yield op, name, large, ValueError, rf"trie has the token 10, {wide}"
                continue
            lists = good.tolist()
            yield op, name, lists, TypeError, rf"{name} is a list, needs a torch.Tensor"
            if name in kinds:
                for dtype in (
                    torch.float32,
                    torch.complex64,
                    *([torch.bool] if name != "mask" else [torch.int64]),
                ):
                    yield (
                        op,
                        name,
                        good.to(dtype),
                        TypeError,
                        rf"{name} has dtype {dtype}, needs {kinds[name]}",
                    )
            else:
                for dtype in (torch.int64, torch.complex64, torch.bool):
                    yield (
                        op,
                        name,
                        good.to(dtype),
                        TypeError,
                        rf"{name} has dtype {dtype}, needs one of float32",
                    )
            first = names[0]
            if name != first:
                yield op, name, good.to(meta), ValueError, rf"{name} is on meta, needs cpu like the other"
                if name != "weight":  # its first size is the vocabulary's, whatever it is
                    yield (
                        op,
                        name,
                        good[:1],
                        ValueError,
                        rf"{name} has shape \({good[:1].shape[0]}.*needs .*\(",
                    )
                yield op, name, good.unsqueeze(0), ValueError, rf"{name} has shape \(1, .*needs "
            elif name in ("logits", "hidden") or op == "log_partition_variance":
                yield (
                    op,
                    name,
                    good.reshape(-1)[0],
                    ValueError,
                    rf"{name} has shape \(\), needs (at least|\(B, T\))",
                )


CASES = list(bad_arguments())


@pytest.mark.parametrize(
    ("op", "argument", "value", "error", "message"),
    CASES,
    ids=[f"{op}-{name}-{index}" for index, (op, name, *_) in enumerate(CASES)],
)
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_refuses(
    op: str, argument: str, value: Any, error: type[Exception], message: str, backend: str
) -> None:
    options = (
        {}
        if op in ("log_partition_variance", "detailed_balance", "subtrajectory_balance")
        else {"backend": backend}
    )
    with pytest.raises(error, match=message):
        call_with(op, **options, **{argument: value})


@pytest.mark.parametrize(
    ("op", "changes", "error", "message"),
    [
        (
            "trie_walk",
            {"tokens": torch.zeros((), dtype=torch.int64)},
            ValueError,
            r"tokens has no dimension, needs",
        ),
        ("trie_walk", {"start": 1.5}, TypeError, "start is a float, needs a torch.Tensor"),
        ("trie_walk", {"start": torch.zeros(3)}, TypeError, "start has dtype torch.float32, needs integers"),
        ("trie_walk", {"start": torch.zeros(3).long()}, ValueError, r"start has shape \(3,\), needs \(2,\)"),
        ("trie_token_log_probs", {"start": [0, 0]}, TypeError, "start is a list, needs a torch.Tensor"),
        (
            "trie_token_log_probs",
            {"start": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "start is on meta, needs cpu",
        ),
        (
            "trie_sample",
            {"temperature": 0.0},
            ValueError,
            "temperature is 0.0, needs a finite number above 0",
        ),
        ("trie_sample", {"temperature": -1}, ValueError, "temperature is -1, needs"),
        ("trie_sample", {"temperature": math.inf}, ValueError, "temperature is inf, needs"),
        ("trie_sample", {"temperature": math.nan}, ValueError, "temperature is nan, needs"),
        (
            "trie_sample",
            {"temperature": torch.ones(())},
            TypeError,
            "temperature is a Tensor, needs a number",
        ),
        (
            "trie_linear_token_log_probs",
            {"weight": torch.zeros(WIDTH, 5)},
            ValueError,
            r"weight .*\(10, 5\), needs \(10, 4",
        ),
        (
            "trie_linear_token_log_probs",
            {"bias": torch.zeros(9)},
            ValueError,
            r"bias has shape \(9,\), needs \(10,\)",
        ),
        (
            "trie_linear_token_log_probs",
            {"weight": torch.zeros(WIDTH, 4, dtype=torch.float64)},
            TypeError,
            "weight has dtype torch.float64, needs torch.float32 like the other arguments",
        ),
        (
            "trie_linear_token_log_probs",
            {"bias": torch.zeros(WIDTH, dtype=torch.bfloat16)},
            TypeError,
            "bias has dtype torch.bfloat16, needs torch.float32",
        ),
        (
            "log_partition_variance",
            {"group_size": 0},
            ValueError,
            "group_size is 0, needs a divisor of the 2 rows",
        ),
        (
            "log_partition_variance",
            {"group_size": 3},
            ValueError,
            "group_size is 3, needs a divisor of the 2 rows",
        ),
        ("log_partition_variance", {"group_size": 1.0}, ValueError, "group_size is 1.0, needs a divisor"),
        (
            "log_partition_variance",
            {"log_probs": torch.zeros(2, 2, 3)},
            ValueError,
            r"log_probs has shape \(2, 2, 3\)",
        ),
        ("subtrajectory_balance", {"lam": 0.0}, ValueError, "lam is 0.0, needs a finite number above 0"),
        ("subtrajectory_balance", {"lam": math.inf}, ValueError, "lam is inf, needs"),
        ("subtrajectory_balance", {"lam": math.nan}, ValueError, "lam is nan, needs"),
        (
            "flow_matching",
            {"log_flows": torch.zeros(3, TRIE.num_nodes)},
            ValueError,
            r"log_flows has shape \(3, 12\)",
        ),
        (
            "flow_matching",
            {"log_flows": torch.zeros(5)},
            ValueError,
            r"needs a prefix of \(2, 3\) and then 12",
        ),
        (
            "trie_log_flows",
            {"log_rewards": torch.zeros(2, 7)},
            ValueError,
            r"log_rewards .*\(2, 7\), needs \(2, 8\)",
        ),
    ],
)
def test_refuses_what_only_one_op_takes(
    op: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call_with(op, **changes)


@pytest.mark.parametrize(
    "op", [op for op in ARGUMENTS if "balance" in op or "variance" in op or op == "flow_matching"]
)
def test_refuses_unknown_reductions(op: str) -> None:
    with pytest.raises(ValueError, match=r"reduction is 'average', needs one of \('mean', 'sum', 'none'\)"):
        call_with(op, reduction="average")


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_good_arguments_are_good(op: str) -> None:
    """Or what is refused above might be refused for another reason."""
    result = call_with(op)
    assert isinstance(result, Tensor | tuple)


def test_generators_of_another_device_are_refused() -> None:
    logits, nodes = torch.zeros(2, WIDTH, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="generator is of cpu, needs meta like logits"):
        ops.trie_sample(logits, nodes, TRIE.to("meta"), generator=torch.Generator())


# The poison: without it, tests of freshly allocated results would pass by luck.


class Idle:
    """A core whose kernels do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


# The others are made of these.
@pytest.mark.parametrize("op", sorted(_registry.CPP_OPS & set(dir(_cpp))))
def test_what_no_kernel_writes_is_poison(
    op: str, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cpp, "_core", Idle())
    options = (
        {}
        if op.removeprefix("trie_")
        in ("walk", "log_softmax", "child_log_probs", "token_log_probs", "sample", "log_flows")
        else {"reduction": "none"}
    )
    results = call_with(op, backend="cpp", **options)
    for result in results if isinstance(results, tuple) else (results,):
        poison = (
            torch.isnan(result) if result.is_floating_point() else result == torch.iinfo(result.dtype).min
        )
        assert poison.all()


@pytest.mark.parametrize("name", ["trajectory_balance_backward", "trie_log_flows_backward"])
def test_gradients_that_no_kernel_writes_are_poison(
    name: str, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These two allocate without zeroing; the other gradients are zero wherever no child is."""
    monkeypatch.setattr(_cpp, "_core", Idle())
    items = (TRIE.first_child, TRIE.token, TRIE.first_item, TRIE.item_count, TRIE.item_order)
    flows = torch.zeros(2, TRIE.num_nodes)
    arguments = {
        "trajectory_balance_backward": (torch.zeros(2), None, 3),
        "trie_log_flows_backward": (flows, torch.zeros(2, len(ROWS)), flows, *items),
    }[name]
    assert getattr(_cpp, name)(*arguments).isnan().all()


def test_the_poison_is_everywhere(poisoned_memory: None, device: torch.device) -> None:
    like = torch.zeros(2, device=device)
    for made in (
        torch.empty(3, device=device),
        torch.empty((2, 2), dtype=torch.bfloat16, device=device),
        torch.empty_like(like),
        torch.empty_strided((2,), (1,), device=device),
        like.new_empty(4),
    ):
        assert made.isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).min).all()
    assert torch.zeros(3).eq(0).all()


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_any_width_of_the_vocabulary_serves(backend: str) -> None:
    """Also one that ends with the trie's largest token, and one far wider."""
    device = device_of(backend)
    trie = TRIE.to(device)
    tokens = torch.tensor([[7, 9, -1]], device=device)
    logits = torch.randn(1, 3, 5000, device=device)
    log_probs = [
        ops.trie_token_log_probs(logits[..., :width], tokens, trie, backend=backend)
        for width in (10, 11, 5000)
    ]
    assert torch.equal(log_probs[0], log_probs[1])
    assert torch.equal(log_probs[0], log_probs[2])
