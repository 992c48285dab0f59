from __future__ import annotations

import inspect
import io
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gflowgr import PrefixTrie, doctor, ops
from gflowgr.ops import _registry

TRIE = PrefixTrie([[0, 1], [0, 2], [3, 4]])
LOGITS = torch.linspace(-1, 1, 10).view(1, 2, 5)
TOKENS = torch.tensor([[0, 2]])
NODES = torch.tensor([0, 1])
LOG_PROBS = torch.tensor([[-0.5, -1.0], [-0.25, -2.0]])
LOG_REWARDS = torch.tensor([0.0, 1.0])

CALLS: dict[str, Callable[..., Any]] = {
    "detailed_balance": lambda **to: ops.detailed_balance(LOG_PROBS, torch.zeros(2, 3), **to),
    "flow_matching": lambda **to: ops.flow_matching(
        LOGITS[0], NODES, TRIE, torch.zeros(TRIE.num_nodes), **to
    ),
    "log_partition_variance": lambda **to: ops.log_partition_variance(
        LOG_PROBS, LOG_REWARDS, group_size=2, **to
    ),
    "subtrajectory_balance": lambda **to: ops.subtrajectory_balance(LOG_PROBS, torch.zeros(2, 3), **to),
    "trajectory_balance": lambda **to: ops.trajectory_balance(
        LOG_PROBS, LOG_REWARDS, torch.tensor(0.5), **to
    ),
    "trie_child_log_probs": lambda **to: ops.trie_child_log_probs(LOGITS[0], NODES, TRIE, **to),
    "trie_linear_token_log_probs": lambda **to: ops.trie_linear_token_log_probs(
        torch.ones(1, 2, 3), torch.ones(5, 3), TOKENS, TRIE, **to
    ),
    "trie_log_flows": lambda **to: ops.trie_log_flows(torch.zeros(1, 3), TRIE, **to),
    "trie_log_partition_variance": lambda **to: ops.trie_log_partition_variance(
        LOGITS, TOKENS, TRIE, torch.zeros(1), group_size=1, **to
    ),
    "trie_log_softmax": lambda **to: ops.trie_log_softmax(LOGITS[0], NODES, TRIE, **to),
    "trie_sample": lambda **to: ops.trie_sample(LOGITS[0], NODES, TRIE, **to),
    "trie_token_log_probs": lambda **to: ops.trie_token_log_probs(LOGITS, TOKENS, TRIE, **to),
    "trie_trajectory_balance": lambda **to: ops.trie_trajectory_balance(
        LOGITS, TOKENS, TRIE, torch.zeros(1), torch.tensor(0.5), **to
    ),
    "trie_walk": lambda **to: ops.trie_walk(TOKENS, TRIE, **to),
}


def printed() -> str:
    file = io.StringIO()
    doctor.print_report(file)
    return file.getvalue()


def test_every_op_is_reported() -> None:
    assert set(doctor.report()["ops"]) == set(ops.__all__) == set(CALLS)


@pytest.mark.parametrize("op", sorted(CALLS))
def test_each_backend_serves_or_refuses_as_reported(op: str) -> None:
    on_cpu = doctor.report()["ops"][op]["cpu"]
    takes_backend = "backend" in inspect.signature(getattr(ops, op)).parameters
    if not takes_backend:
        assert on_cpu["auto"] == "torch"
        assert set(on_cpu["obstacles"]) == {"cpp", "triton"}
        CALLS[op]()
        return
    for backend in ("cpp", "triton"):
        if obstacle := on_cpu["obstacles"].get(backend):
            with pytest.raises(RuntimeError) as refusal:
                CALLS[op](backend=backend)
            assert obstacle in str(refusal.value)
        else:
            CALLS[op](backend=backend)


def test_report_survives_json() -> None:
    found = doctor.report()
    assert json.loads(json.dumps(found)) == found


def test_report_states_this_installation() -> None:
    found = doctor.report()
    # A package's metadata may lack the build.
    assert found["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["cuda"]["build"] == torch.version.cuda
    assert len(found["cuda"]["devices"]) == torch.cuda.device_count()
    if torch.cuda.device_count() == 0:
        assert found["cuda"]["problem"]
        assert {on["cuda"]["auto"] for on in found["ops"].values()} == {None}


def test_table_names_each_op_with_its_backend() -> None:
    found, text = doctor.report(), printed()
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.strip():
            rows.setdefault(line.split()[0], line.split()[1:])
    for op, on in found["ops"].items():
        assert rows[op][0] == on["cpu"]["auto"]
    for name, version in found["versions"].items():
        assert rows[name] == (version or "not installed").split()


def test_missing_extension_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "HAS_CPP", False)
    found = doctor.report()
    assert not found["cpp"]["compiled"]
    assert found["ops"]["trie_sample"]["cpu"]["auto"] == "torch"
    assert "pip install ." in found["ops"]["trie_sample"]["cpu"]["obstacles"]["cpp"]
    assert "pip install ." in printed()


def test_imports_without_extension_or_triton() -> None:
    program = (
        "import sys; sys.modules['gflowgr._core'] = sys.modules['triton'] = None\n"
        "import gflowgr, torch\n"
        "from gflowgr import doctor\n"
        "trie = gflowgr.PrefixTrie([[0, 1], [2, 3]])\n"
        "print(gflowgr.ops.trie_log_softmax(torch.zeros(4), torch.tensor(0), trie).tolist())\n"
        "doctor.print_report()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "[-0.6931471824645996, -inf, -0.6931471824645996, -inf]"
    assert "the C++ extension is not compiled" in done.stdout
    assert "Triton is not installed" in done.stdout
