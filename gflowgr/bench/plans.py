"""What a run is to measure: its arguments, checked, and the jobs that follow from them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gflowgr import reference
from gflowgr.bench.case import Case
from gflowgr.bench.cases import CASES
from gflowgr.bench.configurations import (
    CONFIGURATIONS,
    Configuration,
    catalogue_of,
    level_offsets,
    read_codes,
)
from gflowgr.bench.problems import Problem
from gflowgr.bench.table import appendable
from gflowgr.ops._registry import BACKENDS, resolve_backend

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
SWEPT_OPS = ("trie_sample", "trie_token_log_probs")
SWEPT_CONFIGURATIONS = ("4",)
SWEPT_ITEMS = (10**4, 10**5, 10**6, 10**7)
SWEPT_BYTES = 30  # a token of the catalogue: what building and measuring takes at the most


@dataclass(frozen=True)
class Job:
    """A case on a configuration, in a dtype, by a backend."""

    configuration: Configuration
    case: Case
    dtype: torch.dtype
    backend: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.op} on configuration {self.configuration.label}, {dtype}, {self.backend}"


@dataclass(frozen=True)
class Plan:
    """What a run measures, after its arguments are found good; `skipped` says what cannot be and why."""

    jobs: list[Job]
    skipped: list[str]
    device: torch.device
    threads: tuple[int, ...]
    rounds: int
    seconds: float
    output: Path | None
    seed: int
    compiles: bool


def plan(
    *,
    op: Sequence[str] | None = None,
    config: Sequence[str] | None = None,
    rows: int | None = None,
    vocab: int | None = None,
    hidden: int | None = None,
    depth: int | None = None,
    codes: str | os.PathLike[str] | None = None,
    sweep: bool = False,
    dtype: Sequence[str] | None = None,
    device: str | None = None,
    backend: str = "auto",
    compile: bool = False,
    threads: Sequence[int] | None = None,
    rounds: int = 20,
    seconds: float = 2.0,
    output: str | os.PathLike[str] | None = None,
    seed: int | None = None,
) -> Plan:
    """Checks the arguments of `benchmark`.

    Raises:
        ValueError: an argument, what it is and what it needs.
    """
    for name, given, known in (
        ("op", op, CASES),
        ("config", config, CONFIGURATIONS),
        ("dtype", dtype, DTYPES),
    ):
        for value in given or ():
            if value not in known:
                raise ValueError(f"{name} is {value!r}, needs some of {', '.join(known)}")
    numbers = (("rows", rows), ("vocab", vocab), ("hidden", hidden), ("rounds", rounds))
    for name, number in (*numbers, *(("threads", count) for count in threads or ())):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}, needs at least 1")
    if depth is not None and depth < 0:
        raise ValueError(f"depth is {depth}, needs at least 0")
    if sweep and codes is not None:
        raise ValueError("sweep draws catalogues of its own, so it goes without codes")
    if not seconds > 0:
        raise ValueError(f"seconds is {seconds}, needs a number above 0")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, needs one of {', '.join(BACKENDS)}")
    place = _device(device)
    everywhere = (op is not None and config is not None) or sweep
    jobs: list[Job] = []
    skipped: list[str] = []
    # With codes of one's own the configurations differ in little else than the vocabulary.
    usual = SWEPT_CONFIGURATIONS if sweep else ("1",) if codes is not None else tuple(CONFIGURATIONS)
    for name in config or usual:
        chosen = CONFIGURATIONS[name]
        if codes is not None:
            chosen = chosen.with_codes(os.fspath(codes), read_codes(os.fspath(codes)))
        chosen = chosen if rows is None else chosen.with_rows(rows)
        chosen = chosen if vocab is None else chosen.with_vocab(vocab)
        chosen = chosen if hidden is None else chosen.with_hidden(hidden)
        chosen = chosen if depth is None else chosen.at_depth(depth)
        level_offsets(chosen)
        if codes is not None:
            _check_depth(chosen)
        for sized in _swept(chosen, skipped) if sweep else (chosen,):
            for case in map(CASES.__getitem__, op or (SWEPT_OPS if sweep else CASES)):
                if not (everywhere or name in case.configs):
                    continue
                try:
                    served_by = _backend_of(case, backend, place, depth)
                except RuntimeError as error:
                    skipped.append(str(error))
                    continue
                dtypes = _dtypes_of(case, dtype or sized.dtypes)
                jobs += [Job(sized, case, each, served_by) for each in dtypes]
    if not jobs:
        raise ValueError(f"op, config and backend leave nothing to measure: {'; '.join(skipped)}")
    default_threads = (1, 2) if place.type == "cpu" and (os.cpu_count() or 1) > 1 else (1,)
    return Plan(
        jobs=jobs,
        skipped=list(dict.fromkeys(skipped)),
        device=place,
        threads=tuple(dict.fromkeys(threads or default_threads)),
        rounds=rounds,
        seconds=seconds,
        output=None if output is None else appendable(Path(output)),
        seed=int.from_bytes(os.urandom(4), "little") if seed is None else seed,
        compiles=compile,
    )


def _check_depth(configuration: Configuration) -> None:
    """Builds the trie of codes that a user gave, and finds whether anything is as deep as asked for."""
    sequences, trie = catalogue_of(configuration)
    if configuration.depth is not None and not (sequences[:, configuration.depth] >= 0).any():
        raise ValueError(f"depth is {configuration.depth}, needs less than the {trie.max_depth} of the codes")


def _swept(configuration: Configuration, skipped: list[str]) -> Iterator[Configuration]:
    """The configuration at each size that there is memory for."""
    available = _available_bytes()
    for items in SWEPT_ITEMS:
        needed = items * configuration.levels * SWEPT_BYTES
        if available is not None and needed > available:
            skipped.append(
                f"{items} items need {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} are free"
            )
            continue
        yield configuration.with_items(items)


def _available_bytes() -> int | None:
    """Memory that is free or can be made so, None where the system does not tell."""
    information = Path("/proc/meminfo")
    for line in information.read_text().splitlines() if information.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _dtypes_of(case: Case, names: Sequence[str]) -> list[torch.dtype]:
    """The dtypes to measure in; what follows the logits is at least float32."""
    dtypes = (DTYPES[name] for name in names)
    return list(dict.fromkeys(d if case.takes_logits else reference.accumulation_dtype(d) for d in dtypes))


def _backend_of(case: Case, wanted: str, device: torch.device, depth: int | None) -> str:
    if depth is not None and not case.decodes:
        raise RuntimeError(f"{case.op} follows whole items, so it has no depth")
    if case.only_backend is None:
        return resolve_backend(wanted, case.op, device)
    if wanted not in ("auto", case.only_backend):
        raise RuntimeError(f"{case.op} has the backend {case.only_backend} only, not {wanted}")
    if device.type not in case.devices:
        raise RuntimeError(f"{case.op} runs on {' or '.join(case.devices)}, not on {device}")
    return case.only_backend


def problem_of(job: Job, device: torch.device, seed: int, compiles: bool = False) -> Problem:
    """The inputs' source: the same catalogue each time, and the same draws for the same seed."""
    sequences, trie = catalogue_of(job.configuration)
    generator = torch.Generator(device).manual_seed(seed)
    return Problem(
        job.configuration,
        torch.from_numpy(sequences).to(device),
        trie.to(device),
        job.dtype,
        job.backend,
        generator,
        compiles,
    )


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, needs cpu or cuda") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, needs cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but this PyTorch sees no CUDA device")
    return place
