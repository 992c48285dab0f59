"""Compiles every kernel for a GPU that need not be there: `python compile_kernels.py [sm] [dtype ...]`.

The interpreter accepts code that the compiler refuses. Prints a JSON line for each kernel, dtype and width of
the trie: registers a thread, bytes of stack (spills), and how many versions the launches of different batch
sizes, lengths, strides and alignments ask for. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from gflowgr import PrefixTrie, kernels

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
# Sizes that Triton specialises on by itself: 1, a multiple of 16, and neither.
SHAPES = ((1, 1), (16, 32), (5, 3))


def launches(
    dtype: torch.dtype, batch: int, steps: int, *, children: int, optional: bool
) -> list[tuple[JITFunction, tuple, dict]]:
    """What the launchers would run on tensors of these sizes, odd strides and an odd alignment."""
    recorded = []

    def record(function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        recorded.append((function, args, kwargs))

    trie = PrefixTrie([[first, second] for first in range(children) for second in range(2)])
    arrays = (trie.first_child, trie.token, trie.max_children)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.zeros(batch * steps * children + 1, dtype=dtype)[1:].view(batch, steps, children)
    tokens = torch.zeros(batch, steps, dtype=torch.int64)
    start, per_path = tokens[:, 0], torch.zeros(batch, dtype=sums)
    per_token, uniform = per_path[:, None].expand(tokens.shape), tokens.double()
    mask, weights = (tokens == 0, per_path) if optional else (None, None)
    run, JITFunction.run = JITFunction.run, record
    try:
        kernels.trie_log_softmax(logits, tokens, *arrays)
        kernels.trie_log_softmax_backward(logits.to(sums), logits.to(sums), tokens, *arrays, dtype)
        kernels.trie_token_log_probs(logits, tokens, start, *arrays, 0)
        kernels.trie_token_log_probs_backward(per_token, logits, tokens, start, *arrays, 0)
        kernels.trie_sample(logits, tokens, *arrays, uniform, 0.7)
        kernels.trajectory_balance(per_token, per_path, per_path, mask, weights)
        kernels.trajectory_balance_backward(per_path, mask, steps)
        kernels.trie_trajectory_balance(logits, tokens, start, *arrays, per_path, per_path, weights)
    finally:
        JITFunction.run = run
    return recorded


def version(
    function: JITFunction, args: tuple, kwargs: dict
) -> tuple[dict[str, str], dict[str, Any], dict[str, int]]:
    """The types, the constants and the options that one launch compiles with."""
    values = dict(zip(function.arg_names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in function.arg_names}
    values |= {name: value for name, value in kwargs.items() if name in function.arg_names}
    types, constants = {}, {}
    for parameter in function.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif parameter.do_not_specialize:
            types[parameter.name] = parameter.annotation_type or mangle_type(value)
        else:
            raise AssertionError(f"{function.__name__} specialises on the value of {parameter.name}")
    return types, constants, options


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def main() -> None:
    sm, *names = sys.argv[1:] or ["90"]
    for name in names or DTYPES:
        for children, optional in ((2, True), (200, False), (3000, True)):
            asked = [launches(DTYPES[name], *shape, children=children, optional=optional) for shape in SHAPES]
            for same_kernel in zip(*asked, strict=True):
                versions = [version(*launch) for launch in same_kernel]
                types, constants, options = versions[0]
                source = ASTSource(same_kernel[0][0], types, constants)
                compiled = triton.compile(source, target=GPUTarget("cuda", int(sm), 32), options=options)
                row = {"kernel": source.fn.__name__, "dtype": name, "children": children}
                row |= {"versions": len({repr(item) for item in versions})}
                print(json.dumps(row | resources(compiled.asm["cubin"])), flush=True)


if __name__ == "__main__":
    main()
