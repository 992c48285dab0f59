"""Run by `accelerate launch` in a test: trains with a batch a process and writes the losses of process 0."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import training_fixtures as fixtures

OBJECTIVES = {
    "tb": {"flows": "learned", "sft_weight": 1.0},
    "s_dpo": {"preference_beta": 1.0},
}


def main(folder: str, batch: int, output: str, objective: str) -> None:
    run = fixtures.trainer(
        folder,
        objective=objective,
        **OBJECTIVES[objective],
        num_trajectories=3,
        max_steps=6,
        per_device_train_batch_size=batch,
        dataloader_drop_last=True,
    )
    run.train()
    if run.args.process_index == 0:
        Path(output).write_text(json.dumps(fixtures.losses(run)))
    run.accelerator.wait_for_everyone()
    # Gloo's threads can abort or hang a process on its way out; what was to be shown is written by now.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
