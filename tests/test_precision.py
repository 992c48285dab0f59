"""How exact the ops are: against float64, no worse than PyTorch in the same dtype, and at the extremes.

The yardstick is what training code does without the ops: a dense mask, `masked_fill(-inf)`, `log_softmax`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from core_cases import backends, device_of, sums
from torch import Tensor

from gflowgr import PrefixTrie, ops
from gflowgr.ops import _registry

BACKENDS = ("torch", "cpp", "triton")
HALF = (torch.bfloat16, torch.float16)
Call = Callable[[list[Tensor]], Tensor]


def masked_log_softmax(logits: Tensor, nodes: Tensor, trie: PrefixTrie, dtype: torch.dtype) -> Tensor:
    """log_softmax in `dtype` over the children of `nodes`, each of which has some: the dense mask."""
    parents, tokens = trie.parent[1:].long(), trie.token[1:].long()
    allowed = torch.zeros(trie.num_nodes, logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed[parents, tokens] = True
    return logits.masked_fill(~allowed[nodes], -math.inf).log_softmax(-1, dtype=dtype)


@dataclass(frozen=True)
class Problem:
    """Item paths on a catalogue, and what the ops need beside logits."""

    trie: PrefixTrie
    tokens: Tensor
    width: int
    backend: str

    @property
    def nodes(self) -> Tensor:
        """The node before each token."""
        root = torch.zeros_like(self.tokens[..., :1])
        return torch.cat([root, self.trie.walk(self.tokens, backend="torch")[..., :-1]], -1)

    @property
    def log_flows(self) -> Tensor:
        numbers = torch.arange(self.trie.num_nodes, device=self.tokens.device)
        return torch.sin(numbers.float()) * 3

    @property
    def log_rewards(self) -> Tensor:
        return torch.linspace(-2, 1, self.tokens.shape[0], device=self.tokens.device)


def problem_of(backend: str, items: Tensor, rows: Tensor, width: int) -> Problem:
    device = device_of(backend)
    return Problem(PrefixTrie(items).to(device), items[rows].to(device), width, backend)


def catalogue(backend: str, rows: int) -> Problem:
    """Items like real ones: wide at the first level, narrow below, many forced last steps."""
    draw = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 40, (300, 3), generator=draw) + 40 * torch.arange(3)
    return problem_of(backend, codes, torch.randint(0, 300, (rows,), generator=draw), 128)


# Each op as a function of its differentiable inputs, twice: ours, and PyTorch's with the softmax in `dtype`.


def _token_log_probs(problem: Problem) -> tuple[Call, Callable[[torch.dtype], Call]]:
    def ours(leaves: list[Tensor]) -> Tensor:
        return ops.trie_token_log_probs(leaves[0], problem.tokens, problem.trie, backend=problem.backend)

    def plain(dtype: torch.dtype) -> Call:
        return lambda leaves: _chosen(leaves[0], problem, dtype)

    return ours, plain


def _chosen(logits: Tensor, problem: Problem, dtype: torch.dtype) -> Tensor:
    dense = masked_log_softmax(logits, problem.nodes, problem.trie, dtype)
    return dense.gather(-1, problem.tokens.unsqueeze(-1)).squeeze(-1)


def _linear_token_log_probs(problem: Problem) -> tuple[Call, Callable[[torch.dtype], Call]]:
    def ours(leaves: list[Tensor]) -> Tensor:
        hidden, weight, bias = leaves
        return ops.trie_linear_token_log_probs(
            hidden, weight, problem.tokens, problem.trie, bias, backend=problem.backend
        )

    def plain(dtype: torch.dtype) -> Call:
        return lambda leaves: _chosen(F.linear(*leaves), problem, dtype)

    return ours, plain


def _log_softmax(problem: Problem) -> tuple[Call, Callable[[torch.dtype], Call]]:
    def ours(leaves: list[Tensor]) -> Tensor:
        return ops.trie_log_softmax(leaves[0], problem.nodes, problem.trie, backend=problem.backend)

    def plain(dtype: torch.dtype) -> Call:
        return lambda leaves: masked_log_softmax(leaves[0], problem.nodes, problem.trie, dtype)

    return ours, plain


def _sample(problem: Problem) -> tuple[Call, Callable[[torch.dtype], Call]]:
    drawn: list[Tensor] = []

    def ours(leaves: list[Tensor]) -> Tensor:
        generator = torch.Generator(problem.tokens.device).manual_seed(1)
        tokens, _, log_probs = ops.trie_sample(
            leaves[0], problem.nodes, problem.trie, generator=generator, backend=problem.backend
        )
        drawn[:] = [tokens]
        return log_probs

    def plain(dtype: torch.dtype) -> Call:
        def of(leaves: list[Tensor]) -> Tensor:
            dense = masked_log_softmax(leaves[0], problem.nodes, problem.trie, dtype)
            return dense.gather(-1, drawn[0].unsqueeze(-1)).squeeze(-1)

        return of

    return ours, plain


def _trajectory_balance(problem: Problem) -> tuple[Call, Callable[[torch.dtype], Call]]:
    def ours(leaves: list[Tensor]) -> Tensor:
        return ops.trie_trajectory_balance(
            leaves[0], problem.tokens, problem.trie, problem.log_rewards, 0.5,
            reduction="none", backend=problem.backend,
        )  # fmt: skip

    def plain(dtype: torch.dtype) -> Call:
        def of(leaves: list[Tensor]) -> Tensor:
            log_probs = _chosen(leaves[0], problem, dtype)
            return (0.5 + log_probs.sum(-1) - problem.log_rewards.to(dtype)).square()

        return of

    return ours, plain


def _flow_matching(problem: Problem) -> tuple[Call, Callable[[torch.dtype], Call]]:
    def ours(leaves: list[Tensor]) -> Tensor:
        return ops.flow_matching(
            leaves[0],
            problem.nodes,
            problem.trie,
            problem.log_flows,
            reduction="none",
            backend=problem.backend,
        )

    def plain(dtype: torch.dtype) -> Call:
        def of(leaves: list[Tensor]) -> Tensor:
            nodes, trie = problem.nodes, problem.trie
            dense = torch.full((trie.num_nodes, problem.width), -math.inf, device=nodes.device)
            dense[trie.parent[1:].long(), trie.token[1:].long()] = problem.log_flows[1:]
            target = dense[nodes].log_softmax(-1, dtype=dtype)
            log_probs = masked_log_softmax(leaves[0], nodes, trie, dtype)
            finite = target != -math.inf
            gap = torch.where(finite, target, 0.0) - torch.where(finite, log_probs, 0.0)
            return (target.exp() * gap).sum(-1)

        return of

    return ours, plain


OPS: dict[str, Callable[[Problem], tuple[Call, Callable[[torch.dtype], Call]]]] = {
    "trie_token_log_probs": _token_log_probs,
    "trie_linear_token_log_probs": _linear_token_log_probs,
    "trie_log_softmax": _log_softmax,
    "trie_sample": _sample,
    "trie_trajectory_balance": _trajectory_balance,
    "flow_matching": _flow_matching,
}


def pairs(*, head: bool = True) -> list[Any]:
    """Every op with logits, on each backend that serves it; those from hidden states if `head`."""
    found = []
    for op in OPS:
        if op == "trie_linear_token_log_probs" and not head:
            continue
        # The head's kernels are those of the log-probs.
        kernels = "trie_token_log_probs" if op == "trie_linear_token_log_probs" else op
        found += [pytest.param(op, *each.values, marks=each.marks) for each in backends(kernels)]
    return found


def leaves_of(op: str, problem: Problem, scale: float) -> list[Tensor]:
    """float64 inputs: logits, or what a head of 16 makes them from."""
    draw = torch.Generator().manual_seed(11)
    shape = problem.tokens.shape
    shapes = [(*shape, problem.width)]
    if op == "trie_linear_token_log_probs":
        shapes = [(*shape, 16), (problem.width, 16), (problem.width,)]
        scale = math.sqrt(scale / 4)
    values = [torch.randn(size, generator=draw, dtype=torch.float64) * scale for size in shapes]
    return [value.to(problem.tokens.device) for value in values]


def evaluated(call: Call, leaves: list[Tensor], grad_output: Tensor | None) -> list[Tensor]:
    """The result and the gradients as float64 on the CPU; infinite results get no gradient from above."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = call(leaves)
    if grad_output is None:
        draw = torch.Generator().manual_seed(5)
        grad_output = torch.randn(output.shape, generator=draw, dtype=torch.float64)
    upstream = torch.where(output.isfinite(), grad_output.to(output.device), 0.0).to(output.dtype)
    gradients = torch.autograd.grad(output, leaves, upstream)
    return [value.detach().double().cpu() for value in (output, *gradients)]


def exact_and_plain(
    op: str, problem: Problem, leaves: list[Tensor], dtypes: tuple[torch.dtype, ...]
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
    """Our results, float64's, and PyTorch's with the softmax in each of `dtypes`."""
    ours, plain = OPS[op](problem)
    got = evaluated(ours, leaves, None)
    exact = evaluated(plain(torch.float64), [leaf.double() for leaf in leaves], None)
    return got, exact, [evaluated(plain(dtype), leaves, None) for dtype in dtypes]


def errors(values: list[Tensor], exact: list[Tensor]) -> list[tuple[float, float]]:
    """The root mean square and the largest error of the result and of each gradient."""
    found = []
    for value, wanted in zip(values, exact, strict=True):
        finite = wanted.isfinite()
        torch.testing.assert_close(value[~finite], wanted[~finite], rtol=0, atol=0, equal_nan=True)
        gap = (value - wanted)[finite].abs()
        found.append((gap.square().mean().sqrt().item(), gap.max().item()))
    return found


def assert_within(
    op: str,
    problem: Problem,
    leaves: list[Tensor],
    got: list[Tensor],
    exact: list[Tensor],
    yardsticks: list[list[Tensor]],
) -> None:
    """Our error is at most 1.1 times that of PyTorch, and a few roundings of float32.

    The root mean square is held against the best yardstick, the largest error against any: that one is a
    matter of luck between two that are equally exact.
    """
    ours = errors(got, exact)
    theirs = [errors(yardstick, exact) for yardstick in yardsticks]
    # The interpreter truncates float32 to bfloat16, where a GPU rounds to the nearest.
    interpreted = problem.backend == "triton" and not torch.cuda.is_available()
    truncates = interpreted and leaves[0].dtype == torch.bfloat16
    # BLAS sums another shape's products in another order.
    head = op == "trie_linear_token_log_probs"
    for index, (error, wanted) in enumerate(zip(ours, exact, strict=True)):
        what = "result" if index == 0 else f"gradient {index}"
        peak = wanted[wanted.isfinite()].abs().max().item()
        floor = (16 if head else 4) * torch.finfo(torch.float32).eps * max(1.0, peak)
        if truncates and index:
            unit = torch.finfo(torch.bfloat16).eps
            worst = max(each[index][1] for each in theirs) + unit * peak if head else floor
            torch.testing.assert_close(got[index], wanted, rtol=unit, atol=worst)
            continue
        for kind, (name, which) in enumerate((("root mean square", min), ("largest", max))):
            allowed = 1.1 * which(each[index][kind] for each in theirs) + floor
            assert error[kind] <= allowed, f"{what}: {name} error {error[kind]:.3g}, allowed {allowed:.3g}"


def rows_for(backend: str, rows: int) -> int:
    """Triton's interpreter takes milliseconds a row."""
    return rows if backend != "triton" or torch.cuda.is_available() else max(2, rows // 16)


@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("op", "backend"), pairs())
def test_half_precision_is_as_exact_as_pytorchs(
    op: str, backend: str, dtype: torch.dtype, scale: float
) -> None:
    """Against a softmax in that dtype, and against one in float32 over the same inputs."""
    problem = catalogue(backend, rows_for(backend, 128))
    leaves = [leaf.to(dtype) for leaf in leaves_of(op, problem, scale)]
    assert_within(op, problem, leaves, *exact_and_plain(op, problem, leaves, (dtype, torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("op", "backend"), pairs(head=False))
def test_peaked_and_extreme_logits(op: str, backend: str, dtype: torch.dtype) -> None:
    """p -> 1 on one child by ever more, values near the largest of the dtype, all alike, some at -inf."""
    big = min(torch.finfo(dtype).max / 8, 1e30)
    patterns = [
        [10.0, 0, 0, 0, 0, 0], [40.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 600.0], [17.0, 17, 0, 0, 0, 0],
        [big] * 6, [-big] * 6, [1e-3] * 6, [big, big, 0, 0, 0, 0],
        [0, 0, 1, -math.inf, -math.inf, -math.inf], [4, -math.inf, 20, -math.inf, 2, 3],
    ]  # fmt: skip
    items = torch.tensor([[token, 9] for token in range(6)] + [[0, 8]])
    problem = problem_of(backend, items, torch.zeros(len(patterns), dtype=torch.int64), 10)
    logits = torch.zeros(len(patterns), 2, 10, dtype=dtype)
    logits[:, 0, :6] = torch.tensor(patterns, dtype=dtype)
    if op == "flow_matching":
        # A child of mass that the policy cannot reach is an infinite divergence, with no gradient to compare.
        logits[:, 0, :6] = logits[:, 0, :6].clamp(min=-1e4)
    leaves = [logits.to(problem.tokens.device)]
    got, exact, plain = exact_and_plain(op, problem, leaves, (torch.float32,))
    assert not any(value.isnan().any() for value in got)
    assert_within(op, problem, leaves, got, exact, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize(("op", "backend"), pairs())
def test_one_child_costs_nothing_whatever_its_logit(op: str, backend: str, dtype: torch.dtype) -> None:
    """A forced step reads no logit: a result of exactly 0 (for TB the residual of the rest), gradient 0."""
    items = torch.tensor([[3, 5, 7]])
    problem = problem_of(backend, items, torch.zeros(4, dtype=torch.int64), 8)
    ours, _ = OPS[op](problem)
    # Of the head, no hidden state is spoilt: 0 times NaN is NaN in any product for the weight's gradient.
    spoilers = (0.0,) if op == "trie_linear_token_log_probs" else (math.nan, math.inf, -math.inf, 0.0)
    for spoiler in spoilers:
        leaves = leaves_of(op, problem, 1.0)
        if spoiler:
            leaves[0] = torch.full_like(leaves[0], spoiler)
        output, *gradients = evaluated(ours, [leaf.to(dtype) for leaf in leaves], None)
        if op == "trie_log_softmax":
            assert (output.isfinite().sum(-1) == 1).all()
            output = output[output.isfinite()]
        if op == "trie_trajectory_balance":
            wanted = (0.5 - problem.log_rewards.cpu().to(sums(dtype))).double().square()
            torch.testing.assert_close(output, wanted, rtol=1e-6, atol=0)
        else:
            assert not output.any()
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("op", "backend"), pairs())
def test_rows_off_the_trie(op: str, backend: str, dtype: torch.dtype) -> None:
    """Without a child there is no policy: -inf, or nothing to draw or match, and no gradient at all."""
    items = torch.tensor([[0, 5, 7], [1, 5, 7], [1, 6, 7]])
    problem = problem_of(backend, items, torch.tensor([0, 1, 2]), 8)
    off = problem.tokens.clone()
    off[:, 0] = 2
    problem = Problem(problem.trie, off, 8, backend)
    ours, _ = OPS[op](problem)
    leaves = [leaf.to(dtype) for leaf in leaves_of(op, problem, 1.0)]
    if op == "trie_trajectory_balance":
        assert ours(leaves).isposinf().all()
        return
    output, *gradients = evaluated(ours, leaves, None)
    if op in ("trie_token_log_probs", "trie_linear_token_log_probs"):
        assert output.isneginf().all()
    elif op == "trie_log_softmax":
        assert output[:, 1:].isneginf().all() and output[:, 0, :2].isfinite().all()
    else:
        assert not output[:, 1:].any()
    for gradient in gradients[:1]:
        assert not gradient[:, 1:].any()
    if op.endswith("token_log_probs"):
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("op", "backend"), pairs())
def test_8192_children(op: str, backend: str, dtype: torch.dtype) -> None:
    """Sums of thousands of terms are no worse than PyTorch's."""
    items = torch.stack([torch.arange(8192), 8192 + torch.arange(8192) % 3], 1)
    rows = torch.arange(rows_for(backend, 32)) * 37
    problem = problem_of(backend, items, rows, 8195)
    leaves = [leaf.to(dtype) for leaf in leaves_of(op, problem, 2.0)]
    assert_within(op, problem, leaves, *exact_and_plain(op, problem, leaves, (dtype, torch.float32)))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("op", "backend"), pairs())
def test_few_children_among_151936(op: str, backend: str, dtype: torch.dtype) -> None:
    """One child, then two, in a language model's vocabulary whose other columns are NaN and are not read."""
    vocabulary = 151_936
    items = torch.tensor([[vocabulary - 1, 7], [vocabulary - 1, vocabulary - 2]])
    problem = problem_of(backend, items, torch.tensor([0, 1]), vocabulary)
    ours, _ = OPS[op](problem)
    leaves = [leaf.to(dtype) for leaf in leaves_of(op, problem, 1.0)]
    if op != "trie_linear_token_log_probs":
        read = leaves[0][..., [7, vocabulary - 2, vocabulary - 1]].clone()
        leaves[0].fill_(math.nan)
        leaves[0][..., [7, vocabulary - 2, vocabulary - 1]] = read
    output, *gradients = evaluated(ours, leaves, None)
    small = torch.tensor([[2, 0], [2, 1]])
    little = problem_of(backend, small, torch.tensor([0, 1]), 3)
    flows = OPS[op](Problem(little.trie, little.tokens, 3, "torch"))[0]
    columns = [7, vocabulary - 2, vocabulary - 1]
    if op == "trie_linear_token_log_probs":
        compact = [leaves[0], leaves[1][columns], leaves[2][columns]]
    else:
        compact = [leaves[0][..., columns]]
    if op == "trie_log_softmax":
        assert (output.isfinite().sum(-1) == torch.tensor([1, 2])).all()
        output = output[..., columns]
        draw = torch.zeros(2, 2, vocabulary, dtype=torch.float64)
        draw[..., columns] = 1.0
        gradients = evaluated(ours, leaves, draw)[1:]
        wanted = evaluated(flows, [leaf.double() for leaf in compact], torch.ones(2, 2, 3))
    else:
        wanted = evaluated(flows, [leaf.double() for leaf in compact], None)
    tolerance: dict[str, float] = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(output, wanted[0], **tolerance)
    assert not gradients[0][:, 0].any()
    if op == "trie_linear_token_log_probs":
        got = [gradients[0], gradients[1][columns], gradients[2][columns]]
        others = [
            gradient.sum() - value.sum() for gradient, value in zip(gradients[1:], got[1:], strict=True)
        ]
        assert all(abs(other) < 1e-9 for other in others)
    else:
        got = [gradients[0][..., columns]]
        assert int((gradients[0] != 0).sum()) == int((got[0] != 0).sum())
    for value, exact in zip(got, wanted[1:], strict=True):
        torch.testing.assert_close(value, exact, **tolerance)


@pytest.mark.slow
def test_a_trainers_losses_are_the_same_on_every_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GFlowGRTrainer, 50 steps of trajectory balance and SFT, each op on the backend that the run is for."""
    fixtures = pytest.importorskip("training_fixtures", reason="the extra 'train' is not installed")
    resolve = _registry.resolve_backend
    served: set[tuple[str, str]] = set()
    curves: dict[str, list[float]] = {}
    obstacles = {name: _registry.why_not(name, "trie_token_log_probs", device_of(name)) for name in BACKENDS}
    for name in [name for name, obstacle in obstacles.items() if obstacle is None]:

        def preferred(backend: str, op: str, device: torch.device, name: str = name) -> str:
            obstacle = _registry.why_not(name, op, device)
            used = resolve(name if backend == "auto" and obstacle is None else backend, op, device)
            served.add((op, used))
            return used

        for module in [module for key, module in sys.modules.items() if key.startswith("gflowgr.ops.")]:
            if hasattr(module, "resolve_backend"):
                monkeypatch.setattr(module, "resolve_backend", preferred)
        run = fixtures.trainer(
            tmp_path / name, objective="tb", flows="exact", sft_weight=1.0, num_trajectories=2, max_steps=50,
            per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
        )  # fmt: skip
        run.train()
        curves[name] = fixtures.losses(run)
        assert ("trie_token_log_probs", name) in served and ("trajectory_balance", name) in served
    expected = torch.tensor(curves["torch"])
    assert len(expected) == 50 and expected[-10:].mean() < 0.95 * expected[:10].mean()
    for losses in curves.values():
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=1e-4, atol=1e-4)
