"""What a case is: an op, its inputs, its definition, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gflowgr.bench.problems import Inputs, Problem

Call = Callable[[Problem, Inputs], Any]


@dataclass(frozen=True)
class Baseline:
    """Something to be timed beside the op.

    `run` takes the problem and the inputs and, where there is `prepare`, what that made of all input sets
    outside the timing: an index of the catalogue, a compiled function. `checked` says that it computes the
    same as the op. `obstacle` says why it cannot run here, or nothing.
    """

    run: Callable[..., Any]
    checked: bool = True
    prepare: Callable[[Problem, Sequence[Inputs]], Any] | None = None
    obstacle: Callable[[Problem], str | None] = lambda problem: None

    def ready(self, problem: Problem, sets: Sequence[Inputs]) -> Call:
        if self.prepare is None:
            return self.run
        prepared = self.prepare(problem, sets)
        return lambda problem, inputs: self.run(problem, inputs, prepared)


@dataclass(frozen=True)
class Case:
    """An op: its inputs, the call that is measured, the definition that it is checked against, its baselines.

    `configs` are where it is measured unless asked otherwise, `gradients` the inputs that are differentiated.
    `only_backend` is that of an op without a choice.
    `verify` replaces the comparison with `definition`, `builds_trie` says that the memory is the trie's.
    `decodes` marks a step of decoding, whose rows may be asked to stand at one depth.
    `rounds_logits` marks results that cannot be more exact than logits in the inputs' dtype.
    """

    op: str
    configs: tuple[str, ...]
    inputs: Callable[[Problem], Inputs]
    candidate: Call
    definition: Call
    bytes_moved: Callable[[Problem, Inputs, bool], int]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    gradients: tuple[str, ...] = ()
    operations: Callable[[Problem, Inputs, bool], int] | None = None
    takes_logits: bool = True
    rounds_logits: bool = False
    only_backend: str | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    verify: Callable[[Call, Problem, Inputs], None] | None = None
    builds_trie: bool = False
    decodes: bool = False

    def offered(self, problem: Problem) -> tuple[dict[str, Baseline], list[str]]:
        """The baselines that run here, and for each other one its name and why not."""
        obstacles = {name: baseline.obstacle(problem) for name, baseline in self.baselines.items()}
        runs = {name: self.baselines[name] for name, obstacle in obstacles.items() if not obstacle}
        return runs, [f"{name} beside {self.op}: {why}" for name, why in obstacles.items() if why]
