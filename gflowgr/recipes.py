"""Settings that hold for any data set: what `gflowgr train --recipe` begins with."""

from __future__ import annotations

from typing import Any

# Child flow matching with exact flows, from scratch. The reward is a mixture of distributions, so that its
# weights say how much mass each term has.
GFLOWGR: dict[str, Any] = {
    "model": {"dropout": 0.1},
    "reward": {
        "fusion": "mixture",
        "terms": {"collaborative": {"normalisation": "softmax", "temperature": 0.6}, "interaction": {}},
        "weights": {"collaborative": 0.8, "interaction": 0.2},
    },
    "training": {
        "objective": "flow_matching",
        "flows": "exact",
        "rollout_share": 0.5,
        "rollout_temperature": 0.6,
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 64,
    },
}
# Supervised fine-tuning alone: the row that every other has to beat.
SFT: dict[str, Any] = {
    "model": {"dropout": 0.2},
    "training": {"objective": "sft", "learning_rate": 1e-3, "per_device_train_batch_size": 64},
}
RECIPES = {"gflowgr": GFLOWGR, "sft": SFT}
