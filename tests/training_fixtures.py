"""A small world to train in: regular users, a tiny catalogue, tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gflowgr.backbones import GenerativeRecommender, build_decoder, build_t5
from gflowgr.collaborative import Popularity
from gflowgr.config import GFlowGRConfig
from gflowgr.data import InteractionLog, Split, split
from gflowgr.objectives import REWARDED
from gflowgr.rewards import CollaborativeReward, InteractionReward, RewardModel, SimilarityReward
from gflowgr.sampling import TrajectorySampler
from gflowgr.semantic_ids import SemanticIds
from gflowgr.trainer import GFlowGRTrainer

NUM_ITEMS, NUM_USERS = 24, 40


def world(num_users: int = NUM_USERS) -> tuple[Split, SemanticIds]:
    """Users who walk through the catalogue by a fixed stride, so that the next item can be learned."""
    rng = np.random.default_rng(0)
    users, items = [], []
    for user in range(num_users):
        start, stride = rng.integers(NUM_ITEMS), rng.choice([1, 5])
        length = rng.integers(5, 9)
        users += [user] * length
        items += [(start + stride * step) % NUM_ITEMS for step in range(length)]
    seen = np.unique(items)
    assert len(seen) == NUM_ITEMS
    log = InteractionLog(
        user=np.array(users),
        item=np.array(items),
        timestamp=np.arange(len(users), dtype=np.float64),
        value=rng.choice([1.0, 4.0], len(users)).astype(np.float32),
        user_ids=np.arange(num_users),
        item_ids=np.arange(NUM_ITEMS),
    )
    codes = np.stack([np.arange(NUM_ITEMS) // 6, np.arange(NUM_ITEMS) % 6 // 2, np.arange(NUM_ITEMS) % 2], 1)
    return split(log, max_history=6), SemanticIds(codes)


def tiny(semantic_ids: SemanticIds, backbone: str = "decoder", dropout: float = 0.0) -> GenerativeRecommender:
    if backbone == "t5":
        return build_t5(
            semantic_ids, layers=1, d_model=16, heads=2, d_kv=8, d_ff=32, dropout=dropout, history_length=6
        )
    return build_decoder(
        semantic_ids, layers=1, d_model=16, heads=2, d_ff=32, dropout=dropout, history_length=6
    )


def rewards(
    semantic_ids: SemanticIds, fusion: str = "mixture", future_scale: float = 0.0, **kwargs: Any
) -> RewardModel:
    return RewardModel(
        {
            "interaction": InteractionReward(future_scale=future_scale),
            "collaborative": CollaborativeReward(),
            "similarity": SimilarityReward(semantic_ids.codes),
        },
        num_items=semantic_ids.num_items,
        fusion=fusion,
        **kwargs,
    )


def config(folder: Path | str, **settings: Any) -> GFlowGRConfig:
    return GFlowGRConfig(
        **{
            "output_dir": str(folder),
            "max_steps": 8,
            "per_device_train_batch_size": 16,
            "learning_rate": 2e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            "seed": 5,
            **settings,
        }
    )


def trainer(
    folder: Path | str,
    *,
    backbone: str = "decoder",
    histories: bool = False,
    fusion: str = "mixture",
    future_scale: float = 0.0,
    sampler_options: dict[str, Any] | None = None,
    recommender: GenerativeRecommender | None = None,
    **settings: Any,
) -> GFlowGRTrainer:
    data, semantic_ids = world()
    args = config(folder, **settings)
    sampler = None
    if args.num_trajectories > 1 and args.objective != "grpo":
        sampler = TrajectorySampler(
            NUM_ITEMS, num_trajectories=args.num_trajectories, seed=args.seed, **(sampler_options or {})
        )
    return GFlowGRTrainer(
        tiny(semantic_ids, backbone) if recommender is None else recommender,
        args,
        data.histories if histories else data.train,
        data.validation,
        reward_model=rewards(semantic_ids, fusion, future_scale) if args.objective in REWARDED else None,
        sampler=sampler,
        collaborative=None if args.objective == "sft" else Popularity.fit(data.sequences, NUM_ITEMS),
    )


def losses(run: GFlowGRTrainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
