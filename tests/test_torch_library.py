"""The ops as citizens of PyTorch: opcheck, torch.compile, dynamic shapes, autocast, meta tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from core_cases import backends, device_of
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from gflowgr import ItemFilter, PrefixTrie, ops
from gflowgr.bench.timing import waiting_is_an_error
from gflowgr.ops._filters import NO_FILTER, arrays_of

ROWS = [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6], [7, 0, -1], [7, 3, -1], [7, 9, -1]]
WIDTH = 10


@dataclass(frozen=True)
class Inputs:
    """One batch of everything that an op takes."""

    trie: PrefixTrie
    logits: Tensor  # (B, T, V)
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    bias: Tensor  # (V,)
    tokens: Tensor  # (B, T)
    nodes: Tensor  # (B, T)
    log_rewards: Tensor  # (B,)
    log_z: Tensor  # ()
    item_log_rewards: Tensor  # (B, N)
    log_probs: Tensor  # (B, T)
    log_flows: Tensor  # (B, T + 1)
    mask: Tensor  # (B, T)
    weights: Tensor  # (B,)


@cache
def trie_on(device: torch.device) -> PrefixTrie:
    trie = PrefixTrie(ROWS).to(device)
    # Made on first use, which would count as another graph.
    assert trie.parent.device == trie.item_count.device == device
    return trie


def inputs(batch: int, device: torch.device, seed: int = 0, dtype: torch.dtype = torch.float32) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    trie = trie_on(device)

    def normals(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    tokens = torch.tensor(ROWS)[torch.randint(0, len(ROWS), (batch,), generator=generator)].to(device)
    nodes = torch.cat([torch.zeros(batch, 1, dtype=torch.int64, device=device), trie.walk(tokens)[:, :2]], 1)
    return Inputs(
        trie=trie,
        logits=normals(batch, 3, WIDTH),
        hidden=normals(batch, 3, 4),
        weight=normals(WIDTH, 4),
        bias=normals(WIDTH),
        tokens=tokens,
        nodes=nodes,
        log_rewards=normals(batch),
        log_z=normals(),
        item_log_rewards=normals(batch, len(ROWS)),
        log_probs=normals(batch, 3),
        log_flows=normals(batch, 4),
        mask=(torch.rand(batch, 3, generator=generator) < 0.8).to(device),
        weights=torch.rand(batch, generator=generator).to(device, dtype),
    )


def _sample(x: Inputs, backend: str) -> Tensor:
    """So peaked at the largest token that every run draws alike."""
    peaked = x.logits + 100.0 * torch.arange(WIDTH, device=x.logits.device)
    tokens, nodes, log_probs = ops.trie_sample(peaked, x.nodes, x.trie, temperature=0.7, backend=backend)
    return log_probs + nodes + tokens


PUBLIC: dict[str, Callable[[Inputs, str], Tensor]] = {
    "trie_walk": lambda x, backend: ops.trie_walk(x.tokens, x.trie, backend=backend),
    "trie_log_softmax": lambda x, backend: ops.trie_log_softmax(x.logits, x.nodes, x.trie, backend=backend),
    "trie_child_log_probs": lambda x, backend: ops.trie_child_log_probs(
        x.logits, x.nodes, x.trie, backend=backend
    ),
    "trie_token_log_probs": lambda x, backend: ops.trie_token_log_probs(
        x.logits, x.tokens, x.trie, backend=backend
    ),
    "trie_linear_token_log_probs": lambda x, backend: ops.trie_linear_token_log_probs(
        x.hidden, x.weight, x.tokens, x.trie, x.bias, backend=backend
    ),
    "trie_sample": _sample,
    "trie_log_flows": lambda x, backend: ops.trie_log_flows(x.item_log_rewards, x.trie, backend=backend),
    "trajectory_balance": lambda x, backend: ops.trajectory_balance(
        x.log_probs, x.log_rewards, x.log_z, mask=x.mask, weights=x.weights, backend=backend
    ),
    "trie_trajectory_balance": lambda x, backend: ops.trie_trajectory_balance(
        x.logits, x.tokens, x.trie, x.log_rewards, x.log_z, weights=x.weights, backend=backend
    ),
    "flow_matching": lambda x, backend: ops.flow_matching(
        x.logits, x.nodes, x.trie, ops.trie_log_flows(x.item_log_rewards, x.trie), backend=backend
    ),
    "trie_log_partition_variance": lambda x, backend: ops.trie_log_partition_variance(
        x.logits, x.tokens, x.trie, x.log_rewards, group_size=2, weights=x.weights, backend=backend
    ),
    "log_partition_variance": lambda x, backend: ops.log_partition_variance(
        x.log_probs, x.log_rewards, group_size=2, mask=x.mask, weights=x.weights
    ),
    "detailed_balance": lambda x, backend: ops.detailed_balance(
        x.log_probs, x.log_flows, mask=x.mask, weights=x.weights
    ),
    "subtrajectory_balance": lambda x, backend: ops.subtrajectory_balance(
        x.log_probs, x.log_flows, mask=x.mask, weights=x.weights
    ),
}
DIRECT = (
    "trie_walk",
    "trie_log_softmax",
    "trie_child_log_probs",
    "trie_token_log_probs",
    "trie_linear_token_log_probs",
    "trie_sample",
    "trie_log_flows",
    "trajectory_balance",
    "trie_trajectory_balance",
    "trie_log_partition_variance",
    "flow_matching",
)
COMPOSITE = ("log_partition_variance", "detailed_balance", "subtrajectory_balance")


def every_op_and_backend() -> list[Any]:
    pairs = [pytest.param(op, "auto") for op in COMPOSITE]
    for op in PUBLIC:
        if op not in COMPOSITE:
            # Inside a graph the kernels are opaque, so the slow interpreter would show nothing new.
            names = [b for b in backends(op) if b.values[0] != "triton" or torch.cuda.is_available()]
            pairs += [pytest.param(op, *backend.values, marks=backend.marks) for backend in names]
    return pairs


def registered() -> set[str]:
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("gflowgr::") for name in names if name.startswith("gflowgr::")}


def test_every_public_op_is_registered() -> None:
    assert set(PUBLIC) == set(ops.__all__)
    assert set(PUBLIC) <= registered()


def arguments(name: str, backend: str, device: torch.device) -> tuple[Any, ...]:
    """Of the registered op `name`."""
    x = inputs(2, device)
    arrays = (x.trie.first_child, x.trie.narrow_token)
    kids = (*arrays, x.trie.max_children)
    items = (*arrays, x.trie.first_item, x.trie.item_count, x.trie.item_order)
    start = torch.zeros(2, dtype=torch.int64, device=device)
    uniform = torch.rand(2, 3, dtype=torch.float64, device=device)
    rewards = x.item_log_rewards.detach()
    flows = ops.trie_log_flows(rewards, x.trie)
    grad, grads = torch.randn(2, 3, device=device), torch.randn(2, 3, WIDTH, device=device)
    dense = ops.trie_log_softmax(x.logits, x.nodes, x.trie).detach()
    each = (x.log_rewards, x.log_rewards.detach().clone().requires_grad_())
    ranges = ([pair[side] for pair in x.trie.token_ranges] for side in (0, 1))
    head = (x.tokens, x.trie.walk(x.tokens), *kids, *ranges, 0, 0.5, 3.0)
    logits = x.logits.detach()
    some = arrays_of(ItemFilter(trie_on(device), [[0, 6], [7]], allow=[0, 1, 2, 5, 6, 7]))
    return {
        "trie_walk": (x.tokens, start, *arrays, backend),
        "trie_log_softmax": (x.logits, x.nodes, *kids, *some, backend),
        "trie_log_softmax_backward": (grads, dense, x.nodes, *kids, torch.bfloat16, *some, backend),
        "trie_child_log_probs": (x.logits, x.nodes, *kids, 0, 3, *some, backend),
        "trie_child_log_probs_backward": (
            *(torch.randn(2, 3, 3, device=device), logits, x.nodes, *kids, 0, 3),
            *(*some, backend),
        ),
        "trie_token_log_probs": (x.logits, x.tokens, start, *kids, 0, *some, backend),
        "trie_token_log_probs_backward": (
            *(grad, logits, x.tokens, start, *kids, 0),
            *(*NO_FILTER, backend),
        ),
        "trie_linear_token_log_probs": (x.hidden, x.weight, x.bias, *head, False, backend),
        "trie_linear_token_log_probs_backward": (
            *(grad, x.hidden.detach(), x.weight.detach(), x.bias.detach()),
            *(*head, False, [True, True, False], backend),
        ),
        "trie_sample": (x.logits, x.nodes, *kids, uniform, 0.7, *some, backend),
        "trie_log_flows": (x.item_log_rewards, *items, backend),
        "trie_log_flows_backward": (torch.randn_like(flows), rewards, flows, *items, backend),
        "trajectory_balance": (x.log_probs, *each, x.mask, x.weights, backend),
        "trajectory_balance_backward": (torch.randn(2, device=device), x.mask, 3, backend),
        "trie_trajectory_balance": (x.logits, x.tokens, start, *kids, *each, x.weights, backend),
        "trie_log_partition_variance": (x.logits, x.tokens, start, *kids, each[1], 2, backend),
        "flow_matching": (x.logits, x.nodes, *kids, flows.detach().requires_grad_(), backend),
        "flow_matching_backward": (grad, logits, x.nodes, *kids, flows.detach(), True, backend),
        "log_partition_variance": (x.log_probs, x.log_rewards, 2, x.mask),
        "detailed_balance": (x.log_probs, x.log_flows, x.mask),
        "subtrajectory_balance": (x.log_probs, x.log_flows, 0.9, x.mask),
    }[name]


def every_registered_op() -> list[Any]:
    pairs = []
    for name in sorted(registered()):
        kernel = name.removesuffix("_backward")
        served = [] if kernel in COMPOSITE else [b for b in backends(kernel) if b.values[0] != "torch"]
        pairs += [pytest.param(name, *b.values, marks=b.marks) for b in served] or [
            pytest.param(name, "auto")
        ]
    return pairs


@pytest.mark.parametrize(("name", "backend"), every_registered_op())
# The checker's own doing, where a composite op slices a leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_opcheck(name: str, backend: str) -> None:
    op, given = getattr(torch.ops.gflowgr, name), arguments(name, backend, device_of(backend))
    if name != "trie_sample":
        torch.library.opcheck(op, given)
        return
    # opcheck adds up an op's results in the dtype of the first one, here integers, so its last check takes no
    # gradient; the gradient under the compiler is tested below.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, given, test_utils=checks)
    torch.library.opcheck(op, tuple(a.detach() if isinstance(a, Tensor) else a for a in given))


def run(
    call: Callable[[Inputs, str], Tensor], x: Inputs, backend: str
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The result, and the gradient of every input."""
    leaves = {
        name: value for name, value in vars(x).items() if isinstance(value, Tensor) and value.requires_grad
    }
    output = call(x, backend)
    if not output.requires_grad:
        return output, {}
    finite = torch.where(output.isfinite(), output, 0.0).square().sum()
    return output, dict(
        zip(leaves, torch.autograd.grad(finite, list(leaves.values()), allow_unused=True), strict=True)
    )


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert (grad is None) == (other[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, other[1][name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("op", "backend"), every_op_and_backend())
def test_compiles_into_one_graph_for_every_batch_size(op: str, backend: str) -> None:
    """fullgraph=True refuses a graph break, and what was compiled for 6 rows serves 12 and 14."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = PUBLIC[op]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (6, 12, 14):
        x = inputs(batch, device_of(backend), seed=batch)
        assert_same(run(compiled, x, backend), run(call, x, backend))
        compilations.append(counter.frame_count)
    # A first compilation may start over, where PyTorch turns a float into a constant.
    assert compilations[0] in (1, 2)
    assert compilations == compilations[:1] * 3


FILTERED: dict[str, Callable[[Inputs, ItemFilter, str], Tensor]] = {
    "trie_log_softmax": lambda x, f, backend: ops.trie_log_softmax(
        x.logits, x.nodes, x.trie, item_filter=f, backend=backend
    ),
    "trie_child_log_probs": lambda x, f, backend: ops.trie_child_log_probs(
        x.logits, x.nodes, x.trie, item_filter=f, backend=backend
    ),
    "trie_token_log_probs": lambda x, f, backend: ops.trie_token_log_probs(
        x.logits, x.tokens, x.trie, item_filter=f, backend=backend
    ),
    "trie_sample": lambda x, f, backend: ops.trie_sample(
        x.logits + 100.0 * torch.arange(WIDTH, device=x.logits.device),
        x.nodes,
        x.trie,
        item_filter=f,
        backend=backend,
    )[2],
}


def _filtered(call: Callable[..., Tensor], item_filter: ItemFilter, x: Inputs, backend: str) -> Tensor:
    return call(x, item_filter, backend)


@pytest.mark.parametrize(
    ("op", "backend"), [pair for pair in every_op_and_backend() if pair.values[0] in FILTERED]
)
# A filter may by chance hide as many nodes as something else has rows.
@torch.fx.experimental._config.patch(use_duck_shape=False)
def test_filters_compile_into_one_graph_for_every_batch_size(op: str, backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = FILTERED[op]
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for batch in (6, 12, 14):
        x = inputs(batch, device_of(backend), seed=batch)
        exclude = [[number % 8] for number in range(batch)]
        item_filter = ItemFilter(x.trie, exclude, allow=[0, 1, 2, 3, 5, 6, 7])
        results = [
            run(partial(_filtered, function, item_filter), x, backend) for function in (compiled, call)
        ]
        assert_same(*results)
        compilations.append(counter.frame_count)
    # As without a filter, a first compilation may start over.
    assert compilations[0] in (1, 2)
    assert compilations == compilations[:1] * 3


@pytest.mark.slow
# PyTorch's own doing.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_compiles_with_inductor() -> None:
    """All ops in one graph, through code generation and back."""
    torch._dynamo.reset()

    def everything(x: Inputs) -> Tensor:
        return sum(
            torch.where(y.isfinite(), y, 0.0).float().sum() for y in (op(x, "auto") for op in PUBLIC.values())
        )

    x = inputs(4, device_of("auto"))
    compiled = torch.compile(everything, fullgraph=True)
    leaves = [value for value in vars(x).values() if isinstance(value, Tensor) and value.requires_grad]
    results = [(f(x), torch.autograd.grad(f(x), leaves)) for f in (everything, compiled)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_a_fresh_trie_compiles() -> None:
    """What a trie makes on first use may be used first inside a graph."""
    torch._dynamo.reset()
    trie, rewards = PrefixTrie(ROWS), torch.randn(2, len(ROWS))
    compiled = torch.compile(
        lambda rewards: ops.trie_log_flows(rewards, trie, backend="torch"), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(
        compiled(rewards), ops.trie_log_flows(rewards, PrefixTrie(ROWS), backend="torch")
    )
    torch.testing.assert_close(compiled(2 * rewards), ops.trie_log_flows(2 * rewards, trie, backend="torch"))


@pytest.mark.parametrize("backend", backends("trie_token_log_probs"))
def test_autocast(backend: str) -> None:
    """A float32 model under autocast: the head runs in bfloat16, the log-probs come out in float32."""
    device = device_of(backend)
    x = inputs(3, device)
    head = torch.nn.Linear(4, WIDTH, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = head(x.hidden)
        assert logits.dtype == torch.bfloat16
        from_logits = ops.trie_token_log_probs(logits, x.tokens, x.trie, backend=backend)
        from_hidden = ops.trie_linear_token_log_probs(
            x.hidden, head.weight, x.tokens, x.trie, head.bias, backend=backend
        )
        loss = ops.trie_trajectory_balance(logits, x.tokens, x.trie, x.log_rewards, x.log_z, backend=backend)
        dense = ops.trie_log_softmax(logits, x.nodes, x.trie, backend=backend)
        sampled = ops.trie_sample(logits, x.nodes, x.trie, backend=backend)[2]
    for value in (from_logits, from_hidden, loss, dense, sampled):
        assert value.dtype == torch.float32
    torch.testing.assert_close(from_logits, from_hidden, rtol=2e-2, atol=2e-2)
    exact = ops.trie_token_log_probs(head(x.hidden), x.tokens, x.trie, backend=backend)
    torch.testing.assert_close(from_hidden, exact, rtol=5e-2, atol=5e-2)
    grads = torch.autograd.grad(from_hidden.sum() + loss, (head.weight, head.bias, x.hidden, x.log_z))
    assert all(
        grad.dtype == torch.float32 and grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads
    )


class Recorder(TorchDispatchMode):
    """Notes which of our ops the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("op", "backend"),
    [p for p in every_op_and_backend() if "torch" not in p.values and p.values[0] in DIRECT],
)
def test_the_way_past_the_dispatcher_is_the_same(op: str, backend: str) -> None:
    """Who listens sees our ops, forward and backward; what comes out is what comes out unheard."""
    x = inputs(4, device_of(backend))
    unheard = run(PUBLIC[op], x, backend)
    with Recorder() as recorder:
        assert_same(run(PUBLIC[op], x, backend), unheard)
    name = f"gflowgr.{op}.default"
    assert name in recorder.seen
    through = ("trie_trajectory_balance", "trie_log_partition_variance", "trie_sample")
    backward = dict.fromkeys(through, "trie_token_log_probs")
    if op != "trie_walk":
        assert f"gflowgr.{backward.get(op, op)}_backward.default" in recorder.seen
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profiler:
        PUBLIC[op](x, backend)
    assert f"gflowgr::{op}" in {event.key for event in profiler.key_averages()}


def test_tensors_that_are_not_their_memory() -> None:
    """A pending negation and a tensor that stands for zeros are what PyTorch says they are."""
    x = inputs(2, torch.device("cpu"))
    negated = torch.complex(torch.zeros_like(x.logits), x.logits.detach()).conj().imag
    assert negated.is_neg()
    for logits in (negated, torch._efficientzerotensor(x.logits.shape)):
        ours = ops.trie_token_log_probs(logits, x.tokens, x.trie, backend="cpp")
        same = ops.trie_token_log_probs(logits.clone() + 0.0, x.tokens, x.trie, backend="cpp")
        torch.testing.assert_close(ours, same)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_is_traced() -> None:
    x = inputs(2, torch.device("cpu"))
    call = lambda logits: ops.trie_token_log_probs(logits, x.tokens, x.trie, backend="cpp")  # noqa: E731
    traced = torch.jit.trace(call, (x.logits.detach(),), check_trace=False)
    torch.testing.assert_close(traced(2 * x.logits.detach()), call(2 * x.logits.detach()))


def test_another_default_device() -> None:
    """Results lie where the arguments do, whatever device new tensors go to."""
    x = inputs(2, torch.device("cpu"))
    expected = {op: run(PUBLIC[op], x, "auto") for op in PUBLIC if op != "trie_sample"}
    with torch.device("meta"):
        for op, wanted in expected.items():
            assert_same(run(PUBLIC[op], x, "auto"), wanted)


def test_a_trie_of_inference_mode_trains() -> None:
    with torch.inference_mode():
        trie = PrefixTrie(ROWS)
    x = inputs(2, torch.device("cpu"))
    ops.trie_token_log_probs(x.logits, x.tokens, trie, backend="cpp").clamp(min=-9).sum().backward()
    assert x.logits.grad is not None


def test_a_trie_first_used_in_inference_mode_trains() -> None:
    trie = PrefixTrie(ROWS)
    with torch.inference_mode():
        assert trie.token.numel() == trie.parent.numel() == trie.item_count.numel()
    log_rewards = torch.zeros(2, trie.num_items, requires_grad=True)
    for backend in ("cpp", "torch"):
        ops.trie_log_flows(log_rewards, trie, backend=backend).sum().backward()
    assert log_rewards.grad is not None


def test_the_core_refuses_other_memory() -> None:
    """The registered ops take any tensor; the core would read it as what it expects."""
    x = inputs(2, torch.device("cpu"))
    start, arrays = torch.zeros(2, dtype=torch.int64), (x.trie.first_child, x.trie.narrow_token)
    for tokens, given in ((x.tokens.int(), arrays), (x.tokens, (arrays[0].long(), arrays[1]))):
        with pytest.raises(TypeError, match=r"the C\+\+ core needs torch.int(32|64) on the CPU, contiguous"):
            torch.ops.gflowgr.trie_walk(tokens, start, *given, "cpp")
    grad, kids = torch.zeros(2, 3, dtype=torch.float64), (*arrays, x.trie.max_children)
    with pytest.raises(TypeError, match=r"core needs torch\.float32"):
        torch.ops.gflowgr.trie_token_log_probs_backward(
            grad, x.logits.detach(), x.tokens, start, *kids, 0, *NO_FILTER, "cpp"
        )


@pytest.mark.parametrize("listening", [True, False])
def test_second_derivatives_are_refused(listening: bool) -> None:
    """Also where only the ops' inputs, not what comes from above, would carry them."""
    for square in (True, False):
        x = inputs(3, torch.device("cpu"))
        with Recorder() if listening else contextlib.nullcontext():
            log_probs = ops.trie_token_log_probs(x.logits, x.tokens, x.trie, backend="cpp").clamp(min=-9)
            upper = (log_probs.square() if square else log_probs).sum()
            (grad,) = torch.autograd.grad(upper, x.logits, create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative"):
                grad.square().sum().backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_forward_derivatives_are_refused() -> None:
    x = inputs(3, torch.device("cpu"))
    logits = x.logits.detach()

    def call(logits: Tensor, backend: str = "cpp") -> Tensor:
        return ops.trie_token_log_probs(logits, x.tokens, x.trie, backend=backend).clamp(min=-9)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative; backend='torch' has one"):
        torch.func.jvp(call, (logits,), (torch.ones_like(logits),))
    with torch.autograd.forward_ad.dual_level():
        assert call(logits).isfinite().all()
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            call(torch.autograd.forward_ad.make_dual(logits, torch.ones_like(logits)))
    torch.func.jvp(lambda logits: call(logits, "torch"), (logits,), (torch.ones_like(logits),))


def test_backward_in_another_autocast_region() -> None:
    x = inputs(3, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            loss = ops.trie_linear_token_log_probs(x.hidden, x.weight, x.tokens, x.trie, x.bias)
        grads = torch.autograd.grad(loss.clamp(min=-9).sum(), (x.hidden, x.weight, x.bias))
        wide = ops.trie_linear_token_log_probs(x.hidden.double(), x.weight.double(), x.tokens, x.trie)
    assert wide.dtype == torch.float64
    loss = ops.trie_linear_token_log_probs(x.hidden, x.weight, x.tokens, x.trie, x.bias)
    torch.testing.assert_close(
        grads, torch.autograd.grad(loss.clamp(min=-9).sum(), (x.hidden, x.weight, x.bias))
    )


@pytest.mark.parametrize("op", PUBLIC)
def test_reads_nothing_back(op: str) -> None:
    """The meta device has nothing to read: an op that looks at a value, or needs one for a shape, fails."""
    here, there = inputs(4, torch.device("cpu")), inputs(4, torch.device("meta"))
    expected, grads = run(PUBLIC[op], here, "torch")
    output, meta_grads = run(PUBLIC[op], there, "auto")
    assert output.device.type == "meta"
    assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
    for name, grad in grads.items():
        assert (grad is None) == (meta_grads[name] is None)
        assert grad is None or grad.shape == meta_grads[name].shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", PUBLIC)
def test_neither_waits_for_the_device_nor_minds_the_stream(op: str) -> None:
    x = inputs(4, torch.device("cuda", 0))
    expected = run(PUBLIC[op], x, "auto")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with waiting_is_an_error(), torch.cuda.stream(stream):
        result = run(PUBLIC[op], x, "auto")
    stream.synchronize()
    assert_same(result, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("op", PUBLIC)
def test_is_captured_in_a_cuda_graph(op: str) -> None:
    """Forward and backward, replayed on other values than those that were captured."""
    device = torch.device("cuda", 0)
    x, y = inputs(4, device, seed=1), inputs(4, device, seed=2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(PUBLIC[op], x, "auto")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(PUBLIC[op], x, "auto")
    with torch.no_grad():
        for name, value in vars(y).items():
            if isinstance(value, Tensor):
                getattr(x, name).copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, run(PUBLIC[op], y, "auto"))


def test_a_module_with_ops_exports() -> None:
    """The ops stand in an exported graph under their registered names."""
    x = inputs(3, torch.device("cpu"))

    class Scorer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, WIDTH)

        def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
            return ops.trie_token_log_probs(self.head(hidden), tokens, x.trie, backend="cpp")

    scorer = Scorer()
    program = torch.export.export(scorer, (x.hidden.detach(), x.tokens))
    assert "gflowgr.trie_token_log_probs" in str(program.graph)
    ours = program.module()(x.hidden.detach(), x.tokens)
    torch.testing.assert_close(ours, scorer(x.hidden, x.tokens))
    assert not math.isnan(float(ours.detach().nan_to_num(neginf=0.0).sum()))
