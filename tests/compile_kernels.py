"""Compiles every kernel for GPUs that need not be there, which finds what the interpreter lets pass.

    python tests/compile_kernels.py                 # a JSON line for each kernel, dtype and width of trie
    python tests/compile_kernels.py --report        # a table: the worst of each kernel and architecture
    python tests/compile_kernels.py --sm 90 --dtype bfloat16 --children 200

Reported are registers a thread, bytes spilt, bytes of shared memory and of PTX, and how many versions the
launches of different batch sizes, lengths, strides and alignments ask for. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from gflowgr import ItemFilter, PrefixTrie, kernels
from gflowgr.ops._filters import arrays_of

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
ARCHITECTURES = (80, 90, 100)
# A tile of several rows, one block of the children, and several blocks.
WIDTHS = (2, 200, 3000)
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
    arrays = (trie.first_child, trie.narrow_token, trie.max_children)
    item_arrays = (trie.first_child, trie.narrow_token, trie.first_item, trie.item_count, trie.item_order)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.zeros(batch * steps * children + 1, dtype=dtype)[1:].view(batch, steps, children)
    tokens = torch.zeros(batch, steps, dtype=torch.int64)
    start, per_path = tokens[:, 0], torch.zeros(batch, dtype=sums)
    per_token, uniform = per_path[:, None].expand(tokens.shape), tokens.double()
    flows, rewards = (
        per_path[:, None].expand(batch, trie.num_nodes),
        per_path.new_zeros(batch, trie.num_items),
    )
    mask, weights = (tokens == 0, per_path) if optional else (None, None)
    row_filter = arrays_of(ItemFilter(trie, allow=[0], rows=batch) if optional else None)
    run, JITFunction.run = JITFunction.run, record
    try:
        kernels.trie_walk(tokens, start, *arrays[:2])
        kernels.trie_log_softmax(logits, tokens, *arrays, *row_filter)
        dense = logits.to(sums)
        kernels.trie_log_softmax_backward(dense, dense, tokens, *arrays, dtype, *row_filter)
        kernels.trie_child_log_probs(logits, tokens, *arrays, 0, children, *row_filter)
        kernels.trie_child_log_probs_backward(dense, logits, tokens, *arrays, 0, children, *row_filter)
        kernels.trie_token_log_probs(logits, tokens, start, *arrays, 0, *row_filter)
        kernels.trie_token_log_probs_backward(per_token, logits, tokens, start, *arrays, 0, *row_filter)
        kernels.trie_sample(logits, tokens, *arrays, uniform, 0.7, *row_filter)
        kernels.trajectory_balance(per_token, per_path, per_path, mask, weights)
        kernels.trajectory_balance_backward(per_path, mask, steps)
        kernels.trie_trajectory_balance(logits, tokens, start, *arrays, per_path, per_path, weights)
        kernels.flow_matching(logits, tokens, *arrays, flows)
        # With the gradient of the flows, whose kernels contain those of the one without it.
        kernels.flow_matching_backward(per_token, logits, tokens, *arrays, flows, True)
        kernels.trie_log_flows(rewards, *item_arrays)
        kernels.trie_log_flows_backward(flows, rewards, flows, *item_arrays)
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
    """Registers a thread, and bytes of stack and of local memory, which are spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def compiled(sm: int, dtype: str, children: int) -> Iterator[dict[str, Any]]:
    """A row for each kernel; every second width compiles the variants without mask and weights."""
    optional = WIDTHS.index(children) % 2 == 0 if children in WIDTHS else True
    asked = [launches(DTYPES[dtype], *shape, children=children, optional=optional) for shape in SHAPES]
    for same_kernel in zip(*asked, strict=True):
        versions = [version(*launch) for launch in same_kernel]
        types, constants, options = versions[0]
        source = ASTSource(same_kernel[0][0], types, constants)
        binary = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        row = {"kernel": source.fn.__name__, "sm": sm, "dtype": dtype, "children": children}
        row |= {"versions": len({repr(item) for item in versions})} | resources(binary.asm["cubin"])
        yield row | {"shared": binary.metadata.shared, "ptx": len(binary.asm["ptx"])}


def table(rows: list[dict[str, Any]]) -> str:
    """The largest figures over dtypes and widths, for each kernel and architecture."""
    lines = [
        f"Triton {triton.__version__}, worst of {sorted({row['dtype'] for row in rows})} "
        f"x {sorted({row['children'] for row in rows})} children",
        "| kernel | sm | registers | spilt bytes | shared bytes | PTX bytes | versions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, sm in dict.fromkeys((row["kernel"], row["sm"]) for row in rows):
        same = [row for row in rows if (row["kernel"], row["sm"]) == (kernel, sm)]
        worst = {name: max(row[name] for row in same) for name in ("reg", "shared", "ptx", "versions")}
        spilt = max(row["stack"] + row["local"] for row in same)
        lines.append(
            f"| `{kernel}` | {sm} | {worst['reg']} | {spilt} | {worst['shared']} | {worst['ptx']} "
            f"| {worst['versions']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sm", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities")
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--children", type=int, nargs="+", default=WIDTHS, help="widths of the trie")
    parser.add_argument("--report", action="store_true", help="print a table instead of JSON lines")
    arguments = parser.parse_args()
    rows = []
    for sm in arguments.sm:
        for dtype in arguments.dtype:
            for children in arguments.children:
                for row in compiled(sm, dtype, children):
                    rows.append(row)
                    if not arguments.report:
                        print(json.dumps(row), flush=True)
    if arguments.report:
        rows.sort(key=lambda row: row["kernel"])
        print(table(rows))


if __name__ == "__main__":
    main()
