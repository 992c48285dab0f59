"""Every op that is measured: on what, how, and beside what."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr import PrefixTrie, ops, reference
from gflowgr.bench import baselines, problems, traffic
from gflowgr.bench.case import Baseline, Case
from gflowgr.bench.checks import check_build, check_sample, reference_sample
from gflowgr.bench.problems import Inputs, Problem
from gflowgr.ops._registry import HAS_CPP
from gflowgr.trie_arrays import build_with_numpy


def _start(inputs: Inputs) -> Tensor:
    return torch.zeros_like(inputs["tokens"][:, 0])


def _reference_trie_balance(problem: Problem, x: Inputs) -> Tensor:
    log_probs = reference.trie_token_log_probs(x["logits"], x["tokens"], problem.trie, _start(x))
    residual = reference.trajectory_balance_residual(log_probs, x["log_rewards"], x["log_z"], None)
    return residual.square().mean()


def _reference_trie_variance(problem: Problem, x: Inputs) -> Tensor:
    log_probs = reference.trie_token_log_probs(x["logits"], x["tokens"], problem.trie, _start(x))
    group_size = problem.configuration.group_size
    return reference.log_partition_variance(log_probs, x["log_rewards"], group_size, None).mean()


_FLOOR = Baseline(baselines.floor, checked=False)
_LIGER = Baseline(
    baselines.liger_head,
    checked=False,
    prepare=baselines.liger_loss,
    obstacle=baselines.needs("liger_kernel", devices=("cuda",)),
)
_CUT = Baseline(
    baselines.cut_head,
    checked=False,
    obstacle=baselines.needs("cut_cross_entropy", devices=("cuda",), dtypes=(torch.bfloat16, torch.float16)),
)
_XGRAMMAR = Baseline(
    baselines.bitmask_sample,
    obstacle=baselines.needs("xgrammar", dtypes=(torch.float32, torch.bfloat16, torch.float16)),
)
_SAMPLERS = {
    "dense_mask": Baseline(baselines.masked_sample),
    "padded_csr": Baseline(baselines.padded_sample, prepare=baselines.widest_level),
    # Among the largest logits only, so its draws are of another distribution.
    "searchsorted": Baseline(baselines.candidates_sample, checked=False, prepare=baselines.edge_keys),
    "hf_prefix": Baseline(
        baselines.prefix_sample,
        prepare=baselines.prefix_processor,
        obstacle=baselines.needs("transformers"),
    ),
    "xgrammar": _XGRAMMAR,
    "floor": _FLOOR,
}
_ALL_CASES = (
    Case(
        "trie_log_softmax",
        ("1", "2", "3", "4"),
        problems.decode_inputs,
        lambda p, x: ops.trie_log_softmax(x["logits"], x["nodes"], p.trie, backend=p.backend),
        lambda p, x: reference.trie_log_softmax(x["logits"], x["nodes"], p.trie),
        traffic.log_softmax_bytes,
        {"dense_mask": Baseline(baselines.masked_log_softmax), "floor": _FLOOR},
        ("logits",),
        decodes=True,
    ),
    Case(
        "trie_sample",
        ("1", "2", "3", "4"),
        problems.sample_inputs,
        lambda p, x: ops.trie_sample(
            x["logits"], x["nodes"], p.trie, generator=p.generator, backend=p.backend
        ),
        reference_sample,
        traffic.sample_bytes,
        _SAMPLERS,
        verify=check_sample,
        decodes=True,
    ),
    Case(
        "trie_token_log_probs",
        ("1", "2", "5", "5-sliced"),
        problems.token_inputs,
        lambda p, x: ops.trie_token_log_probs(x["logits"], x["tokens"], p.trie, backend=p.backend),
        lambda p, x: reference.trie_token_log_probs(x["logits"], x["tokens"], p.trie, _start(x)),
        traffic.policy_bytes,
        {
            "dense_mask": Baseline(baselines.masked_token_log_probs),
            "padded_csr": Baseline(baselines.padded_token_log_probs, prepare=baselines.level_widths),
            "floor": _FLOOR,
        },
        ("logits",),
    ),
    Case(
        "trie_linear_token_log_probs",
        ("1", "2", "5"),
        problems.head_inputs,
        lambda p, x: ops.trie_linear_token_log_probs(
            x["hidden"], x["weight"], x["tokens"], p.trie, backend=p.backend
        ),
        lambda p, x: reference.trie_linear_token_log_probs(
            x["hidden"], x["weight"], x["tokens"], p.trie, None, _start(x)
        ),
        traffic.head_bytes,
        {
            "lm_head": Baseline(baselines.full_head, checked=False),
            "liger_kernel": _LIGER,
            "cut_cross_entropy": _CUT,
        },
        ("hidden", "weight"),
        operations=traffic.head_operations,
        rounds_logits=True,
    ),
    Case(
        "trie_trajectory_balance",
        ("1", "2", "5", "5-sliced"),
        problems.trie_balance_inputs,
        lambda p, x: ops.trie_trajectory_balance(
            x["logits"], x["tokens"], p.trie, x["log_rewards"], x["log_z"], backend=p.backend
        ),
        _reference_trie_balance,
        traffic.policy_bytes,
        {
            "eager_tb": Baseline(baselines.eager_trajectory_balance),
            "compiled_tb": Baseline(
                baselines.compiled_trajectory_balance,
                prepare=baselines.compile_balance,
                obstacle=baselines.needs_compiler,
            ),
            "padded_csr": Baseline(baselines.padded_trajectory_balance, prepare=baselines.level_widths),
            "floor": _FLOOR,
        },
        ("logits", "log_z"),
    ),
    Case(
        "trie_log_partition_variance",
        ("1", "5-sliced"),
        problems.trie_balance_inputs,
        lambda p, x: ops.trie_log_partition_variance(
            *(x["logits"], x["tokens"], p.trie, x["log_rewards"]),
            group_size=p.configuration.group_size,
            backend=p.backend,
        ),
        _reference_trie_variance,
        traffic.policy_bytes,
        {"dense_mask": Baseline(baselines.masked_log_partition_variance), "floor": _FLOOR},
        ("logits",),
    ),
    Case(
        "flow_matching",
        ("1", "5", "5-sliced"),
        problems.flow_matching_inputs,
        lambda p, x: ops.flow_matching(x["logits"], x["nodes"], p.trie, x["log_flows"], backend=p.backend),
        lambda p, x: reference.flow_matching(x["logits"], x["nodes"], p.trie, x["log_flows"]).mean(),
        traffic.flow_matching_bytes,
        {"dense_mask": Baseline(baselines.masked_flow_matching), "floor": _FLOOR},
        ("logits",),
    ),
    Case(
        "trie_log_flows",
        ("1", "5-sliced"),
        problems.reward_inputs,
        lambda p, x: ops.trie_log_flows(x["log_rewards"], p.trie, backend=p.backend),
        lambda p, x: reference.trie_log_flows(x["log_rewards"], p.trie),
        traffic.log_flows_bytes,
        gradients=("log_rewards",),
        takes_logits=False,
    ),
    Case(
        "trajectory_balance",
        ("1", "5-sliced"),
        problems.balance_inputs,
        lambda p, x: ops.trajectory_balance(x["log_probs"], x["log_rewards"], x["log_z"], backend=p.backend),
        lambda p, x: (
            reference.trajectory_balance_residual(x["log_probs"], x["log_rewards"], x["log_z"], None)
            .square()
            .mean()
        ),
        traffic.plain_bytes("log_probs", "log_rewards", "log_z"),
        gradients=("log_probs", "log_z"),
        takes_logits=False,
    ),
    Case(
        "log_partition_variance",
        ("1", "5-sliced"),
        problems.balance_inputs,
        lambda p, x: ops.log_partition_variance(
            x["log_probs"], x["log_rewards"], group_size=p.configuration.group_size
        ),
        lambda p, x: reference.log_partition_variance(
            x["log_probs"], x["log_rewards"], p.configuration.group_size, None
        ).mean(),
        traffic.plain_bytes("log_probs", "log_rewards"),
        gradients=("log_probs",),
        takes_logits=False,
        only_backend="torch",
    ),
    Case(
        "detailed_balance",
        ("1", "5-sliced"),
        problems.flow_inputs,
        lambda p, x: ops.detailed_balance(x["log_probs"], x["log_flows"]),
        lambda p, x: reference.detailed_balance(x["log_probs"], x["log_flows"], None).mean(),
        traffic.plain_bytes("log_probs", "log_flows"),
        gradients=("log_probs", "log_flows"),
        takes_logits=False,
        only_backend="torch",
    ),
    Case(
        "subtrajectory_balance",
        ("1", "5-sliced"),
        problems.flow_inputs,
        lambda p, x: ops.subtrajectory_balance(x["log_probs"], x["log_flows"]),
        lambda p, x: reference.subtrajectory_balance(x["log_probs"], x["log_flows"], 0.9, None).mean(),
        traffic.plain_bytes("log_probs", "log_flows"),
        gradients=("log_probs", "log_flows"),
        takes_logits=False,
        only_backend="torch",
    ),
    Case(
        "trie_build",
        ("4",),
        problems.catalogue_inputs,
        lambda p, x: PrefixTrie(x["sequences"]),
        lambda p, x: build_with_numpy(x["sequences"].numpy()),
        traffic.catalogue_bytes,
        takes_logits=False,
        only_backend="cpp" if HAS_CPP else "torch",
        devices=("cpu",),
        verify=check_build,
        builds_trie=True,
    ),
)
CASES = {case.op: case for case in _ALL_CASES}
