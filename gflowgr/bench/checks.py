"""That an implementation computes what the float64 definition says."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gflowgr import reference
from gflowgr.bench.case import Call, Case
from gflowgr.bench.problems import Inputs, Problem
from gflowgr.trie_arrays import build_with_numpy

# Largest error relative to the largest value of a tensor: a few roundings of its dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}


class WrongResultError(RuntimeError):
    """An implementation differs from the float64 definition, so its time means nothing."""


def _in_float64(inputs: Inputs) -> Inputs:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def with_gradients(case: Case, inputs: Inputs) -> Inputs:
    return {name: value.detach().requires_grad_(name in case.gradients) for name, value in inputs.items()}


def upstream(result: Tensor, inputs: Inputs) -> Tensor:
    given = inputs.get("grad")
    return torch.ones_like(result) if given is None or given.shape != result.shape else given.to(result.dtype)


def _differentiated(case: Case, call: Call, problem: Problem, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """The result, and the gradient of each input that is differentiated."""
    inputs = with_gradients(case, inputs)
    result = call(problem, inputs)
    if not result.requires_grad:
        raise WrongResultError("the result has no gradient")
    wanted = [inputs[name] for name in case.gradients]
    gradients = torch.autograd.grad(result, wanted, upstream(result, inputs), allow_unused=True)
    return result.detach(), *gradients


def expected(case: Case, problem: Problem, inputs: Inputs) -> tuple[Tensor | None, ...] | None:
    """What the definition gives at float64, for `check`; None where a case has its own way."""
    if case.verify is not None:
        return None
    return _differentiated(case, case.definition, problem, _in_float64(inputs))


def check(
    case: Case, call: Call, problem: Problem, inputs: Inputs, exact: tuple[Tensor | None, ...] | None
) -> None:
    """Compares results and gradients of `call` with `exact`, those of the definition at float64.

    Raises:
        WrongResultError: they differ by more than a few roundings; the message says what and by how much.
    """
    if case.verify is not None:
        return case.verify(call, problem, inputs)
    assert exact is not None
    found = _differentiated(case, call, problem, inputs)
    for name, got, wanted in zip(("the result", *case.gradients), found, exact, strict=True):
        what = name if name == "the result" else f"the gradient of {name}"
        if got is None or wanted is None:
            raise WrongResultError(f"{what} is missing")
        _compare(what, got, wanted, problem.dtype if case.rounds_logits else got.dtype)
    return None


def _compare(what: str, got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    if got.shape != wanted.shape:
        raise WrongResultError(f"{what} has shape {tuple(got.shape)}, not {tuple(wanted.shape)}")
    errors, sizes = [], []
    # In pieces that stay in the cache: the tensors can be as large as the vocabulary times the batch.
    for ours, exact in zip(got.flatten().split(2**18), wanted.flatten().split(2**18), strict=True):
        ours, finite = ours.double(), exact.isfinite()
        if not bool((finite | (ours == exact)).all()):
            raise WrongResultError(f"{what} is not infinite where the definition is")
        errors.append(torch.where(finite, ours - exact, 0.0).abs().max())
        sizes.append(torch.where(finite, exact, 0.0).abs().max())
    error, largest = float(torch.stack(errors).max()), float(torch.stack(sizes).max())
    allowed = TOLERANCE[dtype] * largest
    if not error <= allowed:
        raise WrongResultError(f"{what} is off by {error:.3g}, {allowed:.3g} is allowed")


def reference_sample(problem: Problem, inputs: Inputs) -> tuple[Tensor, ...]:
    uniform = torch.rand(
        inputs["nodes"].shape, generator=problem.generator, device=problem.device, dtype=torch.float64
    )
    return reference.trie_sample(inputs["logits"], inputs["nodes"], problem.trie, uniform, 1.0)


def check_sample(call: Call, problem: Problem, inputs: Inputs) -> None:
    """Draws must be children, lead to their nodes, carry their log-probs and agree with the definition's."""
    exact, nodes = _in_float64(inputs), inputs["nodes"]
    state = problem.generator.get_state()
    tokens, reached, log_probs = call(problem, inputs)
    problem.generator.set_state(state)
    wanted_tokens = reference_sample(problem, exact)[0]
    walked = reference.trie_walk(tokens.unsqueeze(-1), nodes, problem.trie).squeeze(-1)
    if (walked < 0).any():
        raise WrongResultError("a draw is no child of its node")
    wanted = reference.trie_log_softmax(exact["logits"], nodes, problem.trie).gather(-1, tokens.unsqueeze(-1))
    _compare("log_probs", log_probs, wanted.squeeze(-1), log_probs.dtype)
    if reached is not None and not torch.equal(reached, walked):
        raise WrongResultError("a draw leads to another node than the one returned")
    agreement = float((tokens == wanted_tokens).double().mean())
    if agreement < 0.98:
        raise WrongResultError(
            f"only {agreement:.1%} of the draws are those of the definition at the same seed"
        )


def check_build(call: Call, problem: Problem, inputs: Inputs) -> None:
    built = call(problem, inputs)
    for name, wanted in build_with_numpy(inputs["sequences"].numpy()).items():
        got = built[name] if isinstance(built, dict) else getattr(built, name).numpy()
        if not np.array_equal(got, wanted):
            raise WrongResultError(f"the array {name} differs from the definition's")
