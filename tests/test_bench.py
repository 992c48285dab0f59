"""`gflowgr bench`: that it reports what it says, refuses what is wrong, and never what takes how long."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gflowgr import PrefixTrie, bench, ops, reference
from gflowgr.bench import checks, configurations, memory, plans, timing
from gflowgr.bench.case import Call
from gflowgr.bench.problems import Inputs, Problem
from gflowgr.ops._registry import HAS_CPP

CODES = np.array([[a, b, c] for a in range(4) for b in range(a + 1) for c in range(0, 5, 1 + b)])
NUMBERS = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "ratio",
    "peak_bytes",
    "peak_rss_bytes",
    "bytes_moved",
    "share_of_limit",
)
ON_DEVICE = [op for op, case in bench.CASES.items() if "cuda" in case.devices]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's speed is measured by a copy and a product that take seconds; no test looks at it."""
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1e7)
    monkeypatch.setattr(timing, "matmul_rate", lambda device, dtype: 1e8)
    monkeypatch.setattr(timing, "BLOCK_MS", 0.01)
    monkeypatch.setattr(timing, "ROTATED_BYTES", 1)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("codes") / "small.npy"
    np.save(path, CODES.astype(np.int16))
    return str(path)


@pytest.fixture
def options(codes: str) -> list[str]:
    """A run of milliseconds."""
    catalogue = ["--config", "1", "--codes", codes, "--rows", "12", "--vocab", "20"]
    return [*catalogue, "--threads", "1", "--rounds", "2", "--seed", "0"]


def problem(codes: str, op: str, dtype: str = "float32", seed: int = 0) -> tuple[bench.Case, Problem]:
    planned = bench.plan(
        op=[op], config=["1"], codes=codes, rows=12, vocab=20, hidden=8, dtype=[dtype], device="cpu"
    )
    job = planned.jobs[0]
    return job.case, plans.problem_of(job, planned.device, seed)


def check(case: bench.Case, call: Call, given: Problem, inputs: Inputs) -> None:
    checks.check(case, call, given, inputs, checks.expected(case, given, inputs))


def missing() -> set[str]:
    """Baselines that cannot run here: only those that need a GPU, the compiler or an optional package."""
    cannot = set()
    if not torch.cuda.is_available():
        cannot |= {"liger_kernel", "cut_cross_entropy"}
    for package, name in (("xgrammar", "xgrammar"), ("transformers", "hf_prefix")):
        if importlib.util.find_spec(package) is None:
            cannot.add(name)
    return cannot | {"compiled_tb"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_op_is_measured_beside_its_definition_and_its_baselines(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table.csv"
    assert bench.main([*options, "--op", *ON_DEVICE, "--output", str(output)]) == 0
    assert output.read_text().splitlines()[0] == ",".join(bench.COLUMNS)
    rows = rows_of(output)
    for op in ON_DEVICE:
        case = bench.CASES[op]
        passes = ["forward", "forward+backward"] if case.gradients else ["forward"]
        names = ["", "reference", *(name for name in case.baselines if name not in missing())]
        wanted = []
        for each in passes:
            wanted += [(each, name) for name in names]
            if torch.cuda.is_available():
                wanted += [(f"{each}, graph", name) for name in timing.CAPTURABLE if name in names]
        assert [(row["pass"], row["baseline"]) for row in rows if row["op"] == op] == wanted
        assert not case.takes_logits or {"floor", "lm_head"} & case.baselines.keys()
    printed = capsys.readouterr().out
    for row in rows:
        values = {name: float(row[name]) for name in NUMBERS}
        assert all(math.isfinite(value) and value >= 0 for value in values.values()), row
        assert values["p20_ms"] <= values["median_ms"] <= values["p80_ms"]
        assert row["baseline"] or values["ratio"] == 1
        assert (row["config"], row["threads"]) == ("1:codes=small:rows=12:vocab=20", "1")
        assert row["backend"] in ("cpp", "triton", "torch") and row["dtype"] == "float32"
        assert row["date"] and row["cpu"] and row["torch"] == torch.__version__
        assert row["op"] in printed


def test_building_a_trie_reports_the_bytes_of_the_trie(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "table.csv"
    options = [*options, "--device", "cpu", "--op", "trie_build", "--output", str(output)]
    assert bench.main(options) == 0
    trie = PrefixTrie(CODES)
    rows = rows_of(output)
    assert [row["baseline"] for row in rows] == ["", "reference"]
    assert {row["peak_bytes"] for row in rows} == {str(trie.nbytes)}
    assert rows[0]["config"].endswith(f":nodes={trie.num_nodes}")
    assert f"{trie.nbytes / trie.num_nodes:.1f} bytes a node" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_pass_their_checks(options: list[str], tmp_path: Path, dtype: str) -> None:
    output = tmp_path / "table.csv"
    arguments = [*options, "--dtype", dtype, "--output", str(output), "--hidden", "8", "--op"]
    assert (
        bench.main([*arguments, "trie_token_log_probs", "trie_linear_token_log_probs", "trajectory_balance"])
        == 0
    )
    found = {row["op"]: row["dtype"] for row in rows_of(output)}
    sums = "float64" if dtype == "float64" else "float32"
    assert found == {
        "trie_token_log_probs": dtype,
        "trie_linear_token_log_probs": dtype,
        "trajectory_balance": sums,
    }


def test_shorter_items_pass_their_checks(options: list[str], tmp_path: Path) -> None:
    np.save(tmp_path / "ragged.npy", np.array([[0, 1, 2], [0, 2, -1], [1, -1, -1], [0, 1, 3], [2, 0, -1]]))
    options[options.index("--codes") + 1] = str(tmp_path / "ragged.npy")
    assert bench.main([*options, "--op", *ON_DEVICE]) == 0


def test_threads_are_set_stated_and_put_back(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    original = ops.trie_log_softmax

    def watched(*arguments: Any, **named: Any) -> Tensor:
        seen.add(torch.get_num_threads())
        return original(*arguments, **named)

    monkeypatch.setattr(ops, "trie_log_softmax", watched)
    before = torch.get_num_threads()
    output = tmp_path / "table.csv"
    options[options.index("--threads") + 1] = "2"
    assert bench.main([*options, "--op", "trie_log_softmax", "--output", str(output)]) == 0
    assert seen == {2} and {row["threads"] for row in rows_of(output)} == {"2"}
    assert torch.get_num_threads() == before


def test_a_table_only_grows(options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "table.csv"
    options += ["--op", "detailed_balance", "--output", str(output)]
    assert bench.main(options) == 0
    first = output.read_text()
    assert bench.main(options) == 0
    assert output.read_text().startswith(first) and len(rows_of(output)) == 2 * (len(first.splitlines()) - 1)
    assert list(tmp_path.iterdir()) == [output]


def test_the_python_call_reports_what_the_command_does(codes: str) -> None:
    lines: list[str] = []
    report = bench.benchmark(
        write=lines.append,
        op=["trie_sample"],
        config=["1"],
        codes=codes,
        rows=12,
        vocab=20,
        threads=[1],
        rounds=2,
    )
    offered = [name for name in bench.CASES["trie_sample"].baselines if name not in missing()]
    assert [m.baseline for m in report.measurements] == ["", "reference", *offered]
    assert {"dense_mask", "padded_csr", "searchsorted", "floor"} <= set(offered)
    assert not report.refused and lines


def shifted(result: Any) -> Any:
    """The same with its values off by a hundredth."""
    return result * 1.01 if isinstance(result, Tensor) else result


def steeper(result: Tensor) -> Tensor:
    """The same values with gradients off by a hundredth."""
    return result + 0.01 * (result - result.detach()).nan_to_num(0.0)


@pytest.mark.parametrize("op", [op for op, case in bench.CASES.items() if case.gradients])
@pytest.mark.parametrize("spoil", [shifted, steeper])
def test_a_result_or_a_gradient_off_by_a_hundredth_is_refused(
    codes: str, op: str, spoil: Callable[[Any], Any]
) -> None:
    case, given = problem(codes, op)
    inputs = case.inputs(given)
    check(case, case.candidate, given, inputs)
    message = "the result is off" if spoil is shifted else "the gradient of .* is off"
    with pytest.raises(bench.WrongResultError, match=message):
        check(case, lambda p, x: spoil(case.candidate(p, x)), given, inputs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda result: result.where(result.isfinite(), -1e9), "not infinite"),
        (lambda result: result.where(~result.isfinite(), torch.nan), "off by nan"),
        (lambda result: result[:-1], "has shape"),
        (lambda result: result - torch.inf, "off by inf"),
        (lambda result: result.detach(), "has no gradient"),
    ],
)
def test_results_that_are_not_even_close_are_refused(
    codes: str, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    case, given = problem(codes, "trie_log_softmax")
    with pytest.raises(bench.WrongResultError, match=message):
        check(case, lambda p, x: spoil(case.candidate(p, x)), given, case.inputs(given))


def first_child(p: Problem, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Valid draws with the right log-probs, of the wrong distribution."""
    _, tokens, _, log_probs = reference.child_log_probs(x["logits"], x["nodes"], p.trie)
    reached = reference.trie_walk(tokens[..., :1], x["nodes"], p.trie).squeeze(-1)
    return tokens[..., 0], reached, log_probs[..., 0]


def test_a_sampler_of_another_distribution_is_refused(codes: str) -> None:
    case, given = problem(codes, "trie_sample")
    inputs = case.inputs(given)
    check(case, case.candidate, given, inputs)
    with pytest.raises(bench.WrongResultError, match="of the draws are"):
        check(case, first_child, given, inputs)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tokens, nodes, log_probs: (tokens + 1000, nodes, log_probs), "no child"),
        (lambda tokens, nodes, log_probs: (tokens, nodes + 1, log_probs), "another node"),
        (lambda tokens, nodes, log_probs: (tokens, nodes, log_probs - 0.01), "log_probs"),
    ],
)
def test_draws_with_a_wrong_token_node_or_log_prob_are_refused(
    codes: str, spoil: Callable[..., Any], message: str
) -> None:
    case, given = problem(codes, "trie_sample")
    with pytest.raises(bench.WrongResultError, match=message):
        check(case, lambda p, x: spoil(*case.candidate(p, x)), given, case.inputs(given))


def test_a_trie_with_another_array_is_refused(codes: str) -> None:
    case, given = problem(codes, "trie_build")
    inputs = case.inputs(given)
    check(case, case.candidate, given, inputs)

    def wrong(p: Problem, x: Inputs) -> PrefixTrie:
        trie = PrefixTrie(x["sequences"])
        trie.node_items = trie.node_items.flip(0)
        return trie

    with pytest.raises(bench.WrongResultError, match="node_items"):
        check(case, wrong, given, inputs)


def test_a_wrong_op_is_refused_and_the_rest_measured(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.trie_token_log_probs
    monkeypatch.setattr(ops, "trie_token_log_probs", lambda *args, **named: right(*args, **named) - 0.05)
    output = tmp_path / "table.csv"
    arguments = [*options, "--seed", "7", "--output", str(output)]
    assert bench.main([*arguments, "--op", "trie_token_log_probs", "trajectory_balance"]) == 1
    assert {row["op"] for row in rows_of(output)} == {"trajectory_balance"}
    printed = capsys.readouterr()
    assert "REFUSED trie_token_log_probs" in printed.out and "the op: the result is off by" in printed.out
    assert "seed 7" in printed.out and "1 result(s) were wrong" in printed.err


def test_a_wrong_baseline_is_refused(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = bench.CASES["trie_log_softmax"]
    unmasked = bench.Baseline(lambda p, x: torch.log_softmax(x["logits"], -1))
    spoilt = dataclasses.replace(case, baselines={"dense_mask": unmasked})
    monkeypatch.setitem(bench.CASES, case.op, spoilt)
    output = tmp_path / "table.csv"
    assert bench.main([*options, "--op", case.op, "--output", str(output)]) == 1
    assert not output.exists() and "dense_mask: the result" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "trie_lag_softmax"], "op is 'trie_lag_softmax', needs some of trie_log_softmax"),
        (["--config", "6"], "config is '6'"),
        (["--dtype", "int8"], "dtype is 'int8'"),
        (["--rows", "0"], "rows is 0, needs at least 1"),
        (["--rounds", "-1"], "rounds is -1"),
        (["--threads", "1", "0"], "threads is 0"),
        (["--seconds", "nan"], "seconds is nan"),
        (["--config", "1", "--vocab", "1000"], "vocab is 1000, needs at least 1024"),
        (["--device", "abacus"], "device is 'abacus', needs cpu or cuda"),
        (["--device", "meta"], "device is 'meta', needs cpu or cuda"),
        (["--backend", "fortran"], "backend is 'fortran'"),
        (["--backend", "cpp", "--op", "detailed_balance"], "has the backend torch only, not cpp"),
        (["--op", "trie_build", "--config", "1", "--backend", "triton"], "leave nothing to measure"),
        (["--codes", "missing.npy"], "codes is 'missing.npy'"),
        (["--output", "missing/table.csv"], "needs a file in a folder that exists"),
        (["--output", "."], "is no table"),
    ],
)
def test_a_wrong_argument_exits_with_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bench.main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--rows", "many"], ["--wat"], ["--op"]])
def test_what_argparse_finds_wrong_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.ones((3, 2)), "needs integers"),
        (np.ones(3, dtype=int), "needs integers (N, L)"),
        (np.ones((0, 2), dtype=int), "needs integers (N, L)"),
        (np.array([[0, -2]]), "holds -2"),
        (np.array([[-1, 1]]), "row 0"),
        (np.array([["a"]]), "needs integers"),
        (np.array([{"a": 1}]), "needs an .npy file"),
    ],
)
def test_codes_that_are_none_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: np.ndarray, message: str
) -> None:
    np.save(tmp_path / "codes.npy", codes, allow_pickle=True)
    assert bench.main(["--config", "1", "--codes", str(tmp_path / "codes.npy")]) == 2
    assert message in capsys.readouterr().err


def test_a_foreign_file_is_not_appended_to(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("user,item\n1,2\n")
    assert bench.main([*options, "--output", str(foreign)]) == 2
    assert foreign.read_text() == "user,item\n1,2\n" and "is no table" in capsys.readouterr().err


def test_the_synthetic_catalogue_has_the_fanout_asked_for() -> None:
    beauty = bench.CONFIGURATIONS["1"]
    sequences = configurations.catalogue(beauty)
    trie = PrefixTrie(sequences)
    nodes = np.diff(trie.level_offsets)
    assert sequences.shape == (12_101, 4) and sequences.min() == 0 and sequences.max() < beauty.vocab
    np.testing.assert_allclose(nodes[1:] / nodes[:-1], [197, 40, 1.47, 1.03], rtol=0.01)
    children = np.diff(trie.first_child.numpy())
    second = children[trie.level_offsets[1] : trie.level_offsets[2]]
    last = children[trie.level_offsets[3] : trie.level_offsets[4]]
    assert np.quantile(second, 0.9) > 4 * np.median(second) and (last == 1).mean() > 0.9


def test_zipf_codes_are_as_frequent_as_their_ranks_say() -> None:
    codes = bench.zipf_codes(200_000, 2, 50, seed=1)
    wanted = np.arange(1, 51) ** -0.7
    for level in range(2):
        counts = np.sort(np.bincount(codes[:, level], minlength=50))[::-1]
        np.testing.assert_allclose(counts / counts.sum(), wanted / wanted.sum(), atol=0.003)
    assert (np.bincount(codes[:, 0]).argsort() != np.bincount(codes[:, 1]).argsort()).any()


@pytest.mark.parametrize("name", list(bench.CONFIGURATIONS))
def test_tokens_of_every_configuration_fit_its_vocabulary(name: str) -> None:
    configuration = bench.CONFIGURATIONS[name]
    offsets = configurations.level_offsets(configuration)
    assert offsets.min() >= 0 and offsets.max() + configuration.codes == configuration.vocab
    between = np.diff(offsets)
    assert (between == (0 if configuration.shared_tokens else configuration.codes)).all()


def test_bytes_that_must_move_are_those_of_the_children(codes: str) -> None:
    case, given = problem(codes, "trie_token_log_probs", "bfloat16")
    inputs = case.inputs(given)
    forward = 0
    for node in inputs["nodes"].flatten().tolist():
        children = len(given.trie.children(node))
        forward += 8 + 8 + 4 + (children * (2 + 4) if children > 1 else 0)
    assert case.bytes_moved(given, inputs, False) == forward
    assert case.bytes_moved(given, inputs, True) == 2 * forward + inputs["logits"].numel() * 2


def test_the_peak_is_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(3):
            torch.ones(1000)

    def together() -> list[Tensor]:
        return [torch.ones(1000) for _ in range(3)]

    assert memory.peak_bytes(one_after_the_other, cuda=False) == 4000
    assert memory.peak_bytes(together, cuda=False) == 12_000


def test_rounds_are_paired_and_rotate_inputs_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP_MS", 0.0)
    monkeypatch.setattr(timing, "_warm_up", lambda *_: 1)
    calls: list[tuple[str, int]] = []
    sets = [{"number": torch.tensor(index)} for index in range(3)]

    def call(name: str) -> timing.TimedCall:
        return lambda inputs: calls.append((name, int(inputs["number"])))

    times = timing.paired_rounds({name: call(name) for name in "ab"}, sets, 4, 60.0, cuda=False)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2), ("b", 0), ("a", 0)]
    assert [len(each) for each in times.values()] == [4, 4]


def test_no_more_rounds_than_time_allows() -> None:
    times = timing.paired_rounds({"a": lambda _: None}, [{}], 50, 1e-9, cuda=False)
    assert len(times["a"]) == timing.LEAST_ROUNDS


def test_fresh_inputs_differ_from_run_to_run_and_repeat_with_a_seed(codes: str) -> None:
    def logits(seed: int) -> Tensor:
        case, given = problem(codes, "trie_log_softmax", seed=seed)
        return case.inputs(given)["logits"]

    assert torch.equal(logits(3), logits(3)) and not torch.equal(logits(3), logits(4))
    assert bench.plan().seed != bench.plan().seed


def test_the_table_in_the_repository_has_these_columns() -> None:
    table = Path(__file__).parents[1] / "benchmarks" / "results" / "ops.csv"
    if not table.parent.parent.is_dir():
        pytest.skip("the tests run outside a checkout")
    assert table.read_text().splitlines()[0] == ",".join(bench.COLUMNS)


def test_the_op_is_measured_by_the_backend_asked_for(codes: str) -> None:
    wanted = ["torch", "cpp"] if HAS_CPP else ["torch"]
    for backend in wanted:
        planned = bench.plan(op=["trie_sample"], config=["1"], codes=codes, backend=backend, device="cpu")
        assert [job.backend for job in planned.jobs] == [backend]
    everything = bench.plan(backend=wanted[-1], device="cpu")
    assert {job.backend for job in everything.jobs} == {wanted[-1]} and (everything.skipped or not HAS_CPP)
