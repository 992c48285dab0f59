"""What every test runs under: Triton's interpreter without a GPU, one thread, a stable hypothesis profile."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Read by Triton and by gflowgr when they are imported, so it is set before either is.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

from hypothesis import HealthCheck, Phase, settings

settings.register_profile(
    "gflowgr",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# For planted defects: the first example that fails is enough, where the smallest can take minutes to find.
settings.register_profile(
    "first-failure", settings.get_profile("gflowgr"), phases=[Phase.explicit, Phase.generate]
)
settings.load_profile(os.environ.get("GFLOWGR_HYPOTHESIS", "gflowgr"))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _poison(allocated: torch.Tensor) -> torch.Tensor:
    """NaN in floats, the smallest value in integers: what no result may hold by chance."""
    if allocated.device.type in ("cpu", "cuda"):
        kind = allocated.dtype
        with torch.no_grad():
            allocated.fill_(
                torch.nan if kind.is_floating_point else kind != torch.bool and torch.iinfo(kind).min
            )
    return allocated


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that Python code leaves uninitialised is poisoned, so that what no kernel writes shows.

    `torch.utils.deterministic.fill_uninitialized_memory` would do so too, but only together with
    deterministic algorithms, which the CUDA kernels under the reference (cumsum, scatter_reduce) lack.
    """

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: _poison(allocate(*args, **options))

    owners: dict[str, Any] = {
        "empty": torch,
        "empty_like": torch,
        "empty_strided": torch,
        "new_empty": torch.Tensor,
    }
    for name, owner in owners.items():
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
