"""Times the blocks of docs/use_the_ops_in_your_trainer.md: training code before the ops, and with them.

    python benchmarks/ops_in_a_trainer.py --threads 1            # prints the page's table
    python benchmarks/ops_in_a_trainer.py --threads 1 --write    # and puts it into the page

Both blocks of a section are compared first, results and gradients, and a difference ends the run. Memory is
read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gflowgr import PrefixTrie, ops
from gflowgr.bench import shaped_codes

PAGE = Path(__file__).parent.parent / "docs" / "use_the_ops_in_your_trainer.md"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->\n"
# What has a gradient in a training step; the blocks read them by these names.
LEAVES = ("logits", "hidden", "weight", "log_z", "log_rewards_of_items")
DRAWN = "A step of sampling"


@dataclass(frozen=True)
class Section:
    """A heading of the page with its two blocks, each of which assigns `result` last."""

    title: str
    result: str
    before: CodeType
    after: CodeType
    leaves: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """The sizes of a batch: paths of a catalogue under a vocabulary, and a head of some width."""

    vocabulary: int
    batch: int
    dtype: torch.dtype
    items: int = 12_101
    codes: int = 256
    hidden: int = 256

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.batch} x 4 tokens, V = {self.vocabulary:,}, {kind}"


SETTINGS = (
    Setting(151_936, 16, torch.bfloat16),
    Setting(151_936, 16, torch.float32),
    Setting(1_024, 256, torch.float32),
)


def sections() -> list[Section]:
    """The page's pairs of blocks, in its order."""
    found = []
    for text in PAGE.read_text("utf-8").split("\n## ")[1:]:
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        if len(blocks) != 2:
            continue
        title, trees = text.partition("\n")[0], [ast.parse(block) for block in blocks]
        names = [_last_assigned(tree) for tree in trees]
        if names[0] != names[1]:
            raise ValueError(f"{PAGE.name}: {title!r} assigns {names[0]} before and {names[1]} after")
        read = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
        made = {name for tree in trees for name in _assigned(tree)}
        codes = [compile(tree, f"{PAGE.name}, {title}", "exec") for tree in trees]
        found.append(Section(title, names[0], *codes, tuple(n for n in LEAVES if n in read - made)))
    return found


def _assigned(tree: ast.Module) -> Iterator[str]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for node in ast.walk(statement.targets[0]):
                if isinstance(node, ast.Name):
                    yield node.id


def _last_assigned(tree: ast.Module) -> str:
    return list(_assigned(tree))[-1]


def inputs_of(setting: Setting, seed: int = 0) -> dict[str, Any]:
    """What the blocks read, by name."""
    draw = torch.Generator().manual_seed(seed)
    codes = shaped_codes(setting.items, setting.codes, (197, 40, 1.47, 1.03), seed)
    items = torch.from_numpy(codes) + setting.codes * torch.arange(codes.shape[1])
    trie = PrefixTrie(items)
    counts = (trie.first_child[1:] - trie.first_child[:-1]).long().unsqueeze(-1)
    offset = torch.arange(trie.max_children).expand(trie.num_nodes, -1)
    offset = torch.where(offset < counts, offset, 0)
    child = (trie.first_child[:-1].long().unsqueeze(-1) + offset).clamp(max=trie.num_nodes - 1)
    tokens = items[torch.randint(setting.items, (setting.batch,), generator=draw)]
    shape = (*tokens.shape, setting.vocabulary)
    made = {
        "logits": torch.randn(shape, generator=draw).to(setting.dtype),
        "hidden": torch.randn(*tokens.shape, setting.hidden, generator=draw).to(setting.dtype),
        "weight": (torch.randn(setting.vocabulary, setting.hidden, generator=draw) / 16).to(setting.dtype),
        "log_z": torch.tensor(0.5),
        "log_rewards_of_items": torch.randn(setting.batch, setting.items, generator=draw),
    }
    return {
        **{name: value.requires_grad_() for name, value in made.items()},
        "torch": torch, "F": F, "ops": ops, "PrefixTrie": PrefixTrie,
        "items": items, "trie": trie, "tokens": tokens, "children": trie.token[child].long(),
        "nodes": F.pad(trie.walk(tokens), (1, 0))[:, :-1],
        "paths": F.pad(trie.walk(items), (1, 0)),
        "log_rewards": torch.randn(setting.batch, generator=draw),
        "log_flows": ops.trie_log_flows(made["log_rewards_of_items"].detach(), trie),
    }  # fmt: skip


def step(section: Section, code: CodeType, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Runs a block and the backward pass from its result; gives the result and the leaves' gradients."""
    names = dict(inputs)
    with torch.set_grad_enabled(section.title != DRAWN):
        exec(code, names)
    result: Tensor = names[section.result]
    if section.title == DRAWN:
        allowed = inputs["children"][inputs["nodes"][:, -1]]
        if not (names["drawn"].unsqueeze(-1) == allowed).any(-1).all():
            raise ValueError(f"{section.title}: a token that is no child was drawn")
        return result, []
    return result.detach(), list(torch.autograd.grad(result.sum(), [inputs[n] for n in section.leaves]))


def check(section: Section, inputs: dict[str, Any]) -> None:
    """Raises AssertionError unless both blocks give the same result and gradients; draws differ by nature."""
    before, after = (step(section, code, inputs) for code in (section.before, section.after))
    if section.title == DRAWN:
        return
    torch.testing.assert_close(after[0], before[0], rtol=1e-3, atol=1e-4, check_dtype=False)
    for ours, theirs in zip(after[1], before[1], strict=True):
        scale = float(theirs.abs().max())
        tolerance = max(1e-4, 2 * torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def paired_ms(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Milliseconds of each call in each round, in turns, after one round to warm up."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for which in range(len(calls)) if turn % 2 else reversed(range(len(calls))):
            began = time.perf_counter()
            calls[which]()
            if turn:
                times[which].append((time.perf_counter() - began) * 1e3)
    return times


def peak_mib(call: Callable[[], Any]) -> float:
    """How far `call` raises the process's resident memory above what it held, the least of three calls."""
    rises = []
    for _ in range(3):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        call()
        rises.append((_status("VmHWM") - before) / 1024)
    return max(0.0, min(rises))


def _status(field: str) -> int:
    return int(re.findall(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[0])


def table(settings: tuple[Setting, ...], rounds: int) -> str:
    """The page's table: medians in milliseconds, their ratio within rounds, and memory."""
    lines = [
        "| | setting | before, ms | after, ms | times faster | before, MiB | after, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    reads_no_vocabulary = set()
    for setting in settings:
        inputs = inputs_of(setting)
        for section in sections():
            if "log_rewards_of_items" in section.leaves:
                if section.title in reads_no_vocabulary:
                    continue
                reads_no_vocabulary.add(section.title)
                what = f"{setting.batch} contexts, {setting.items:,} items, float32"
            else:
                what = str(setting)
            check(section, inputs)
            calls = [partial(step, section, code, inputs) for code in (section.before, section.after)]
            before, after = paired_ms(calls, rounds)
            ratio = float(np.median(np.divide(before, after)))
            memory = [peak_mib(call) for call in calls]
            times = f"{np.median(before):.3g} | {np.median(after):.3g} | {ratio:.3g}"
            lines.append(f"| {section.title} | {what} | {times} | {memory[0]:.1f} | {memory[1]:.1f} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines) + "\n"


def write(text: str) -> None:
    """Puts the table between the page's marks; the old page stays whole until the new one is."""
    page = PAGE.read_text("utf-8")
    head, rest = page.split(BEGIN)
    temporary = PAGE.with_name(f".{PAGE.name}.{os.getpid()}.tmp")
    temporary.write_text(head + BEGIN + text + END + rest.split(END)[1], "utf-8")
    os.replace(temporary, PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, help="paths a step, instead of each setting's own number")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = SETTINGS
    if options.batch:
        settings = tuple(replace(setting, batch=options.batch) for setting in settings)
    where = f"CPU ({platform.machine()}), {options.threads} thread(s), torch {torch.__version__}"
    text = table(settings, options.rounds) + f"\nMedians of {options.rounds} rounds in turns. {where}.\n"
    print(text)
    if options.write:
        write(text)


if __name__ == "__main__":
    main()
