"""The options of `gflowgr bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gflowgr.bench.cases import CASES
from gflowgr.bench.checks import WrongResultError
from gflowgr.bench.configurations import CONFIGURATIONS
from gflowgr.bench.plans import DTYPES, plan
from gflowgr.bench.profiling import profile
from gflowgr.bench.runs import run
from gflowgr.ops._registry import BACKENDS


def build_parser() -> argparse.ArgumentParser:
    """The options of `gflowgr bench`, named as the arguments of `plan`."""
    about = "; ".join(f"{each.name}: {each.about}" for each in CONFIGURATIONS.values())
    parser = argparse.ArgumentParser(
        prog="gflowgr bench",
        description="Times each op beside plain PyTorch, paired in one run. Every implementation is first "
        "checked against the float64 definition; a wrong one is refused and the exit code is 1.",
        epilog=f"Configurations: {about}. The ratio is an implementation's time over the op's in the same "
        "round; limit is the least time in which this machine could move the bytes (and, for the head, "
        "multiply), over the time taken.",
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help=f"some of {', '.join(CASES)}; default: all")
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="NAME",
        help="some of the configurations below; default: each op's usual ones",
    )
    parser.add_argument("--rows", type=int, help="rows of logits in a batch (a trajectory of L tokens has L)")
    parser.add_argument("--vocab", type=int, help="columns of the logits")
    parser.add_argument("--hidden", type=int, help="width of the head, for trie_linear_token_log_probs")
    parser.add_argument(
        "--depth", type=int, metavar="D", help="decoding: all rows at nodes of depth D; default: random ones"
    )
    parser.add_argument(
        "--codes",
        metavar="FILE.npy",
        help="codes (N, L) of your own instead of synthetic ones; on configuration 1 unless asked otherwise",
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="catalogues of 10^4 .. 10^7 items at the same rows, of configuration 4 unless asked otherwise",
    )
    parser.add_argument("--dtype", nargs="+", metavar="DTYPE", help=f"some of {', '.join(DTYPES)}")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument(
        "--backend", default="auto", help=f"one of {', '.join(BACKENDS)}; default: %(default)s"
    )
    parser.add_argument("--compile", action="store_true", help="time baselines under torch.compile, too")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", help="CPU threads; default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=20, help="paired rounds; default: %(default)s")
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        help="no more rounds, once three are made, after this time for an op in a pass; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, help="of the inputs; default: another one each time")
    parser.add_argument(
        "--profile",
        metavar="FOLDER",
        help="instead: one op on one configuration beside its definition under torch.profiler; prints the "
        "top kernels and allocations, writes a Chrome trace and an HTML page into the folder",
    )
    parser.add_argument(
        "--plot",
        nargs="?",
        const=".",
        metavar="CHECKOUT",
        help="instead: make the README's table and the figures of docs/ from benchmarks/results/ops.csv",
    )
    parser.add_argument(
        "--check", action="store_true", help="with --plot: see whether README and table agree"
    )
    parser.add_argument("--output", metavar="FILE.csv", help="append the table to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `gflowgr bench`: 0 when all went well, 1 when a result was wrong, 2 for a wrong argument."""
    arguments = vars(build_parser().parse_args(argv))
    folder, checkout, check = (arguments.pop(name) for name in ("profile", "plot", "check"))
    write = partial(print, flush=True)
    try:
        if checkout is not None:
            return _plot(Path(checkout), check, write)
        if check:
            raise ValueError("check goes with plot")
        planned = plan(**arguments)
        if folder is not None:
            profile(planned, Path(folder), write)
            return 0
    except ValueError as error:
        print(f"gflowgr bench: error: {error}", file=sys.stderr)
        return 2
    except WrongResultError as error:
        print(f"gflowgr bench: {error}", file=sys.stderr)
        return 1
    report = run(planned, write)
    if report.refused:
        print(
            f"gflowgr bench: {len(report.refused)} result(s) were wrong and are not reported", file=sys.stderr
        )
    return 1 if report.refused else 0


def _plot(checkout: Path, check: bool, write: Callable[[str], None]) -> int:
    from gflowgr.bench.plots import disagreement, plot

    if not check:
        plot(checkout, write)
        return 0
    found = disagreement(checkout)
    if found:
        print(f"gflowgr bench: {found}", file=sys.stderr)
    return 1 if found else 0
