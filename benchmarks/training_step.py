"""Times a GFlowGR training step against a supervised one: same model, same batches, in turns.

    python benchmarks/training_step.py --backbone t5 --batch 64 --threads 2

The model is the T5 of TIGER and LETTER (4 + 4 layers, d_model 128) or a decoder of its width; the catalogue
is shaped like Amazon Beauty's unless `--codes` names a file. A step is draw, forward, loss, backward and
optimiser.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import torch

from gflowgr.backbones import build_decoder, build_t5
from gflowgr.bench import read_codes, shaped_codes
from gflowgr.collaborative import SASRec, SASRecNetwork
from gflowgr.config import GFlowGRConfig
from gflowgr.data import Examples
from gflowgr.rewards import CollaborativeReward, InteractionReward, RewardModel, SimilarityReward
from gflowgr.sampling import TrajectorySampler
from gflowgr.semantic_ids import SemanticIds
from gflowgr.trainer import GFlowGRTrainer

RECIPES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft"},
    "tb, learned Z": {"objective": "tb", "flows": "learned", "sft_weight": 1.0},
    "tb, exact Z": {"objective": "tb", "flows": "exact", "sft_weight": 1.0},
    "flow matching": {"objective": "flow_matching"},
}


def examples(num_items: int, batch: int, history: int) -> Examples:
    rng = np.random.default_rng(0)
    return Examples(
        index=torch.arange(batch),
        user=torch.arange(batch),
        history=torch.from_numpy(rng.integers(0, num_items, (batch, history))),
        target=torch.from_numpy(rng.integers(0, num_items, batch)),
        value=torch.ones(batch),
        future=torch.full((batch, 1), -1),
        future_value=torch.zeros(batch, 1),
    )


def trainer_of(
    recipe: str, trajectories: int, semantic_ids: SemanticIds, options: argparse.Namespace
) -> GFlowGRTrainer:
    settings = dict(RECIPES[recipe])
    supervised = settings["objective"] == "sft"
    settings["num_trajectories"] = 1 if supervised else trajectories
    items = semantic_ids.num_items
    teacher = SASRec(
        SASRecNetwork(items, hidden_size=64, num_layers=2, num_heads=2, dropout=0.0, max_history=20)
    )
    build = build_t5 if options.backbone == "t5" else build_decoder
    return GFlowGRTrainer(
        build(semantic_ids),
        GFlowGRConfig(
            tempfile.mkdtemp(), report_to="none", use_cpu=not torch.cuda.is_available(), **settings
        ),
        examples(items, options.batch, 20),
        reward_model=None if supervised else RewardModel(
            {"interaction": InteractionReward(), "collaborative": CollaborativeReward(),
             "similarity": SimilarityReward(semantic_ids.codes)},
            num_items=items,
        ),
        sampler=None if settings["num_trajectories"] == 1 else TrajectorySampler(
            items, num_trajectories=trajectories
        ),
        collaborative=None if supervised else teacher,
    )  # fmt: skip


class Run:
    """A trainer's step without the trainer's loop."""

    def __init__(self, trainer: GFlowGRTrainer) -> None:
        self.trainer = trainer
        self.trainer.state.max_steps, self.trainer.state.logging_steps = 1000, 10**6
        self.trainer.model.train()
        self.optimizer = trainer.create_optimizer()
        self.inputs = {
            name: value.to(trainer.args.device) for name, value in trainer.train_dataset.tensors().items()
        }

    def step(self) -> float:
        began = time.perf_counter()
        self.trainer.compute_loss(self.trainer.model, self.inputs).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", choices=("t5", "decoder"), default="t5")
    parser.add_argument("--batch", type=int, default=64, help="contexts a step")
    parser.add_argument("--trajectories", type=int, default=4, help="N, the observed item included")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--codes", help="a .npy file of semantic IDs instead of made ones")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    codes = read_codes(options.codes) if options.codes else shaped_codes(12101, 256, (197, 40, 1.47, 1.03), 0)
    semantic_ids = SemanticIds(codes, 256)
    cases = [
        (recipe, n) for recipe in RECIPES for n in ((1,) if recipe == "sft" else (1, options.trajectories))
    ]
    cases = [case for case in cases if case != ("tb, learned Z", 1) and case != ("tb, exact Z", 1)]
    runs = {case: Run(trainer_of(*case, semantic_ids, options)) for case in cases}
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for round_number in range(options.rounds + 1):
        for case, run in runs.items():
            seconds = run.step()
            if round_number:
                times[case].append(seconds)
    setting = f"{options.backbone}, {options.batch} contexts, {semantic_ids.num_items} items"
    print(f"{setting}, {options.threads} threads")
    print(f"{'recipe':<16} {'N':>2} {'median ms':>10} {'p20':>8} {'p80':>8} {'x SFT':>6}")
    base = float(np.median(times["sft", 1]))
    for (recipe, n), seconds in times.items():
        low, middle, high = np.quantile(seconds, [0.2, 0.5, 0.8])
        figures = f"{middle * 1e3:>10.0f} {low * 1e3:>8.0f} {high * 1e3:>8.0f} {middle / base:>6.2f}"
        print(f"{recipe:<16} {n:>2} {figures}")


if __name__ == "__main__":
    main()
