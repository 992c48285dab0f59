"""`gflowgr bench`: times every op beside plain PyTorch, paired in one run, after checking that it is right.

What is measured is a row of `cases.CASES` on a row of `configurations.CONFIGURATIONS`; a baseline is a
function in `baselines`, named in a case.
"""

from __future__ import annotations

from gflowgr.bench.case import Baseline, Case
from gflowgr.bench.cases import CASES
from gflowgr.bench.checks import WrongResultError
from gflowgr.bench.command import build_parser, main
from gflowgr.bench.configurations import CONFIGURATIONS, Configuration, read_codes, shaped_codes, zipf_codes
from gflowgr.bench.plans import Plan, plan
from gflowgr.bench.runs import Report, benchmark, run
from gflowgr.bench.table import COLUMNS, Measurement

__all__ = [
    "CASES",
    "COLUMNS",
    "CONFIGURATIONS",
    "Baseline",
    "Case",
    "Configuration",
    "Measurement",
    "Plan",
    "Report",
    "WrongResultError",
    "benchmark",
    "build_parser",
    "main",
    "plan",
    "read_codes",
    "run",
    "shaped_codes",
    "zipf_codes",
]
