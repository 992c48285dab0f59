"""The blocks of "Use the ops in your trainer" run as they stand, and what each pair computes is the same."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent


def _benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ops_in_a_trainer", ROOT / "benchmarks/ops_in_a_trainer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = _benchmark()
SECTIONS = benchmark.sections()


def small(dtype: torch.dtype) -> dict[str, object]:
    return benchmark.inputs_of(benchmark.Setting(70, 6, dtype, items=300, codes=16, hidden=8), seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.title)
def test_both_blocks_are_the_same(section, dtype: torch.dtype) -> None:
    benchmark.check(section, small(dtype))


def test_every_pair_is_found() -> None:
    page = benchmark.PAGE.read_text("utf-8")
    blocks = re.findall(r"```python\n", page)
    assert len(blocks) == 1 + 2 * len(SECTIONS) and len(SECTIONS) == 6
    assert {name for section in SECTIONS for name in section.leaves} == set(benchmark.LEAVES)


def test_what_the_blocks_read_is_what_the_page_says() -> None:
    inputs = small(torch.float32)
    (setup,) = re.findall(
        r"## What the blocks read.*?```python\n(.*?)```", benchmark.PAGE.read_text("utf-8"), re.DOTALL
    )
    names = {name: inputs[name] for name in ("items", "tokens")}
    exec(setup, names)
    assert names["trie"].fingerprint == inputs["trie"].fingerprint
    assert torch.equal(names["nodes"], inputs["nodes"])
    for node, children in enumerate(inputs["children"].tolist()):
        exact = inputs["trie"].children(node).tolist()
        if exact:
            assert children == exact + exact[:1] * (len(children) - len(exact))


def test_a_pair_that_differs_is_refused() -> None:
    section = SECTIONS[0]
    wrong = compile("log_probs = ops.trie_token_log_probs(logits * 1.01, tokens, trie)", "wrong", "exec")
    with pytest.raises(AssertionError):
        benchmark.check(benchmark.replace(section, after=wrong), small(torch.float32))


def test_the_table_has_every_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = benchmark.PAGE.read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+(?: \| [\d.e+]+){5} \|$", page, re.MULTILINE)
    assert set(rows) == {section.title for section in SECTIONS}

    copy = tmp_path / "page.md"
    copy.write_text(page)
    monkeypatch.setattr(benchmark, "PAGE", copy)
    monkeypatch.setattr(benchmark, "peak_mib", lambda call: 1.0)  # it reads Linux's /proc
    setting = benchmark.Setting(70, 6, torch.float32, items=300, codes=16, hidden=8)
    benchmark.write(benchmark.table((setting,), rounds=1))
    written = copy.read_text("utf-8")
    outside = re.compile(f"{benchmark.BEGIN}.*{benchmark.END}", re.DOTALL)
    assert outside.sub("", written) == outside.sub("", page) and "V = 70" in written
