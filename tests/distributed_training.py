"""Run by `accelerate launch` in a test: trains with a batch a process and writes the losses of process 0.

With "adapt" the sampler's weights adapt, and every process writes its own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import training_fixtures as fixtures

_TB: dict[str, Any] = {"objective": "tb", "flows": "learned", "sft_weight": 1.0}
_ADAPTIVE = {"strategies": {"collaborative": 1, "policy": 1, "random": 1}, "adapt": {}}
RUNS: dict[str, dict[str, Any]] = {
    "tb": _TB,
    "s_dpo": {"objective": "s_dpo", "preference_beta": 1.0},
    "adapt": {**_TB, "sampler_options": _ADAPTIVE},
}


def main(folder: str, batch: int, output: str, run_name: str) -> None:
    run = fixtures.trainer(
        folder,
        **RUNS[run_name],
        num_trajectories=3,
        max_steps=6,
        per_device_train_batch_size=batch,
        dataloader_drop_last=True,
    )
    run.train()
    if run_name == "adapt":
        assert run.sampler is not None and run.sampler.mixture is not None
        run.sampler.mixture.save(f"{output}.{run.args.process_index}")
    if run.args.process_index == 0:
        Path(output).write_text(json.dumps(fixtures.losses(run)))
    run.accelerator.wait_for_everyone()
    # Gloo's threads can abort or hang a process on its way out; what was to be shown is written by now.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
