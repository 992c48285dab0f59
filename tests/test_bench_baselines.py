"""What `gflowgr bench` puts beside the ops: that each baseline is what its name says."""

from __future__ import annotations

import csv
import importlib.util
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gflowgr import bench, reference
from gflowgr.bench import baselines, checks, configurations, memory, plans, timing
from gflowgr.bench.problems import Inputs, Problem

CODES = np.array([[a, b, c] for a in range(4) for b in range(a + 1) for c in range(0, 5, 1 + b)])
RAGGED = np.array([[0, 1, 2], [0, 2, -1], [1, -1, -1], [0, 1, 3], [2, 0, -1]])


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e7)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e8)
    monkeypatch.setattr(timing, "BLOCK_MS", 0.01)
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1)


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def saved(codes: np.ndarray) -> str:
        np.save(tmp_path / "small.npy", codes)
        return str(tmp_path / "small.npy")

    return saved


def problem(op: str, codes: str, **options: Any) -> tuple[bench.Case, Problem]:
    settings: dict[str, Any] = {"rows": 24, "vocab": 70, "hidden": 8, "device": "cpu", **options}
    planned = plans.plan(op=[op], config=["1"], codes=codes, **settings)
    return planned.jobs[0].case, plans.problem_of(planned.jobs[0], planned.device, 0, planned.compiles)


def checked(case: bench.Case, given: Problem, name: str) -> None:
    inputs = case.inputs(given)
    call = case.baselines[name].ready(given, [inputs])
    checks.check(case, call, given, inputs, checks.expected(case, given, inputs))


@pytest.mark.parametrize("codes", [CODES, RAGGED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", ["trie_sample", "trie_token_log_probs", "trie_trajectory_balance"])
def test_baselines_that_claim_so_compute_the_same(op: str, dtype: str, codes: np.ndarray, save: Any) -> None:
    case, given = problem(op, save(codes), dtype=[dtype])
    offered, _ = case.offered(given)
    claimed = [name for name, baseline in offered.items() if baseline.checked]
    assert "padded_csr" in claimed
    for name in claimed:
        checked(case, given, name)


def test_padding_goes_to_the_widest_node_of_the_levels_where_rows_stand(save: Any) -> None:
    path = save(CODES)
    case, given = problem("trie_sample", path)
    assert baselines.level_widths(given, []) == [4, 4, 5]
    for depth, width in enumerate((4, 4, 5)):
        case, given = problem("trie_sample", path, depth=depth)
        assert baselines.widest_level(given, [case.inputs(given)]) == width
        checked(case, given, "padded_csr")


def test_candidates_are_exact_once_they_are_the_whole_vocabulary(save: Any) -> None:
    case, given = problem("trie_sample", save(CODES))
    wide = replace(given, configuration=replace(given.configuration, beam=35))
    inputs = case.inputs(wide)
    tokens, nodes, log_probs = case.baselines["searchsorted"].ready(wide, [inputs])(wide, inputs)
    assert torch.equal(reference.trie_walk(tokens[:, None], inputs["nodes"], wide.trie)[:, 0], nodes)
    dense = reference.trie_log_softmax(inputs["logits"].double(), inputs["nodes"], wide.trie)
    torch.testing.assert_close(log_probs.double(), dense.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)


def test_candidates_are_children_or_none(save: Any) -> None:
    case, given = problem("trie_sample", save(CODES))
    few = replace(given, configuration=replace(given.configuration, beam=2))
    inputs = case.inputs(few)
    tokens, nodes, log_probs = case.baselines["searchsorted"].ready(few, [inputs])(few, inputs)
    walked = reference.trie_walk(tokens.unsqueeze(-1), inputs["nodes"], few.trie).squeeze(-1)
    top = inputs["logits"].topk(4).indices
    alive = tokens >= 0
    assert alive.any() and not alive.all()
    assert torch.equal(walked, nodes)
    assert (top == tokens.unsqueeze(1)).any(1)[alive].all()
    assert (log_probs <= 0).all() and (log_probs[~alive] == 0).all()


def test_the_bitmask_has_a_bit_for_each_child(save: Any) -> None:
    case, given = problem("trie_sample", save(CODES))
    inputs = case.inputs(given)
    assert inputs["bitmask"].dtype == torch.int32 and inputs["bitmask"].shape == (24, 3)
    for row in range(24):
        words = inputs["bitmask"][row].tolist()
        bits = {token for token in range(96) if words[token // 32] >> token % 32 & 1}
        assert bits == set(given.trie.children(int(inputs["nodes"][row])).tolist())


def test_the_dict_trie_leads_from_a_prefix_to_the_children_of_its_node(save: Any) -> None:
    case, given = problem("trie_sample", save(RAGGED))
    inputs = case.inputs(given)
    root = baselines.prefix_dict(given, [inputs])
    for prefix, node in zip(inputs["prefixes"].tolist(), inputs["nodes"].tolist(), strict=True):
        place = root
        for token in prefix:
            if token >= 0:
                place = place[token]
        assert list(place) == given.trie.children(node).tolist()


@pytest.mark.parametrize("codes", [CODES, RAGGED])
def test_rows_stand_at_the_depth_asked_for(codes: np.ndarray, save: Any) -> None:
    for depth in range(3):
        case, given = problem("trie_log_softmax", save(codes), depth=depth)
        nodes = case.inputs(given)["nodes"]
        begin, end = given.trie.level_offsets[depth : depth + 2]
        assert ((nodes >= begin) & (nodes < end)).all()
        assert (given.trie.first_child[nodes + 1] > given.trie.first_child[nodes]).all()
        assert given.configuration.label == f"1:codes=small:rows=24:vocab=70:hidden=8:depth={depth}"


def test_a_depth_needs_levels_and_an_op_that_decodes(save: Any) -> None:
    with pytest.raises(ValueError, match="depth is 3, needs less than the 3 levels"):
        problem("trie_sample", save(CODES), depth=3)
    with pytest.raises(ValueError, match="depth is -1, needs at least 0"):
        problem("trie_sample", save(CODES), depth=-1)
    with pytest.raises(ValueError, match="depth is 2, needs less than the 2 of the codes"):
        problem("trie_sample", save(np.array([[0, 1, -1], [1, -1, -1]])), depth=2)
    with pytest.raises(ValueError, match="trie_token_log_probs follows whole items"):
        problem("trie_token_log_probs", save(CODES), depth=1)
    planned = plans.plan(config=["1"], depth=1, device="cpu")
    assert {job.case.op for job in planned.jobs} == {"trie_sample", "trie_log_softmax"}


def test_onerec_is_a_configuration() -> None:
    onerec = bench.CONFIGURATIONS["3"]
    assert (onerec.items, onerec.levels, onerec.codes, onerec.vocab) == (1_520_000, 3, 8192, 24_576)
    assert (onerec.decode_rows, onerec.beam) == (400, 50)
    assert list(bench.CONFIGURATIONS) == ["1", "2", "3", "4", "5", "5-sliced"]


def test_what_cannot_run_is_named(
    save: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "xgrammar" else found(name, *rest)
    )
    arguments = ["--config", "1", "--codes", save(CODES), "--rows", "12", "--vocab", "20", "--device", "cpu"]
    arguments += ["--hidden", "8", "--threads", "1", "--rounds", "2", "--op", "trie_sample"]
    assert bench.main([*arguments, "trie_linear_token_log_probs", "trie_trajectory_balance"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "not measured: xgrammar beside trie_sample: xgrammar is not installed",
        "not measured: liger_kernel beside trie_linear_token_log_probs: it runs on cuda only",
        "not measured: cut_cross_entropy beside trie_linear_token_log_probs: it runs on cuda only",
        "not measured: compiled_tb beside trie_trajectory_balance: torch.compile takes its time",
    ):
        assert line in printed


def test_a_dtype_without_a_kernel_is_an_obstacle(save: Any) -> None:
    _, given = problem("trie_sample", save(CODES), dtype=["float64"])
    dtypes = (torch.float32,)
    assert baselines.needs("torch", dtypes=dtypes)(given) == "it has no kernel for torch.float64"
    assert baselines.needs("torch")(given) is None


def test_compiling_needs_a_compiler(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, given = problem("trie_trajectory_balance", save(CODES), compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert baselines.needs_compiler(given) == "torch.compile finds no C++ compiler"


@pytest.mark.slow
# Inductor itself still calls what torch.jit no longer wants called.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_trajectory_balance_computes_the_same(save: Any) -> None:
    case, given = problem("trie_trajectory_balance", save(CODES), compile=True)
    assert "compiled_tb" in case.offered(given)[0]
    checked(case, given, "compiled_tb")


def head_problem(save: Any) -> tuple[Problem, Inputs, torch.Tensor]:
    """A head's inputs, padding among them, and its log-probs over the whole vocabulary, 0 at the padding."""
    case, given = problem("trie_linear_token_log_probs", save(RAGGED))
    inputs = case.inputs(given)
    tokens = inputs["tokens"]
    assert (tokens < 0).any()
    log_probs = (inputs["hidden"] @ inputs["weight"].T).log_softmax(-1)
    wanted = log_probs.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(tokens < 0, 0.0)
    return given, inputs, wanted


def test_liger_gets_its_arguments_in_its_order(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loss:
        """The documented interface, in plain PyTorch."""

        def __init__(self, ignore_index: int, reduction: str) -> None:
            self.options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}

        def __call__(self, lin_weight: torch.Tensor, _input: torch.Tensor, target: torch.Tensor) -> Any:
            return F.cross_entropy(_input @ lin_weight.T, target, **self.options)

    module: Any = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    given, inputs, wanted = head_problem(save)
    found = baselines.liger_head(given, inputs, baselines.liger_loss(given, [inputs]))
    torch.testing.assert_close(found, wanted.sum())


def test_cut_cross_entropy_gets_its_arguments_in_its_order(
    save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def linear_cross_entropy(
        e: torch.Tensor, c: torch.Tensor, targets: torch.Tensor, *, ignore_index: int, reduction: str
    ) -> torch.Tensor:
        logits = (e @ c.T).flatten(0, -2)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)
        return loss.view_as(targets)

    module: Any = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = linear_cross_entropy
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", module)
    given, inputs, wanted = head_problem(save)
    torch.testing.assert_close(baselines.cut_head(given, inputs), wanted)


def test_a_sweep_measures_one_shape_on_catalogues_of_several_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "SWEPT_ITEMS", (30, 90))
    output = tmp_path / "table.csv"
    arguments = ["--sweep", "--device", "cpu", "--threads", "1", "--rounds", "2", "--seconds", "0.01"]
    assert bench.main([*arguments, "--rows", "16", "--output", str(output)]) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"trie_sample", "trie_token_log_probs"}
    assert {row["config"] for row in rows} == {"4:rows=16:items=30", "4:rows=16:items=90"}


def test_a_sweep_leaves_out_what_the_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_available_bytes", lambda: 10**6 * 8 * plans.SWEPT_BYTES)
    planned = plans.plan(sweep=True, device="cpu")
    assert {job.configuration.items for job in planned.jobs} == {10**4, 10**5, 10**6}
    assert any("10000000 items need" in each for each in planned.skipped)
    with pytest.raises(ValueError, match="sweep draws catalogues of its own"):
        plans.plan(sweep=True, codes="codes.npy")


def test_ten_million_items_are_drawn_and_kept_in_four_bytes_a_token() -> None:
    catalogue = configurations.catalogue(bench.CONFIGURATIONS["4"].with_items(50))
    assert catalogue.dtype == np.int32 and catalogue.shape == (50, 8)


@pytest.mark.skipif(not memory._reset_high_water_mark(), reason="no high-water mark here")
def test_resident_memory_counts_the_pages_that_are_touched() -> None:
    size = 64 * 2**20
    touched = memory.peak_rss_bytes(lambda: torch.empty(size, dtype=torch.uint8).fill_(1))
    untouched = memory.peak_rss_bytes(lambda: torch.empty(size, dtype=torch.uint8))
    assert math.isclose(touched, size, rel_tol=0.1)
    assert untouched < size / 4


def test_resident_memory_is_zero_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    assert memory.peak_rss_bytes(lambda: torch.ones(2**22)) == 0
