"""Settings that hold for any data set: what `gflowgr train --recipe` begins with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gflowgr.settings import merge, section

_COMMON: dict[str, Any] = {
    "split": {"method": "leave-one-out", "max_history": 20},
    "model": {"kind": "decoder", "layers": 2, "d_model": 128, "heads": 4},
    "training": {
        "num_train_epochs": 40,
        "per_device_train_batch_size": 128,
        "eval_strategy": "steps",
        "eval_steps": 0.1,
    },
}
# What makes it GFlowGR, whatever model and budget: child flow matching with exact flows, and a teacher
# that goes on with every history, with half of them from somewhere within. The reward is a mixture of
# distributions, so that its weights say how much mass each term has. What the teacher knows of rare items the
# model does not learn, so that both rank together.
OBJECTIVE: dict[str, Any] = {
    "reward": {
        "fusion": "mixture",
        "terms": {
            "collaborative": {"normalisation": "softmax", "temperature": 0.5},
            "interaction": {},
        },
        "weights": {"collaborative": 0.5, "interaction": 0.5},
    },
    "training": {
        "objective": "flow_matching",
        "flows": "exact",
        "rollout_share": 0.5,
        "rollout_temperature": 0.5,
        "rollout_beyond": 2,
        "rollout_epsilon": 0.3,
        "rollout_reuse": 4,
        "reward_candidates": 128,
    },
    "ranking": {"teacher_weight": "validation"},
}
# From scratch: it need not begin with a supervised model. What a history goes on by are contexts, too: with
# three quarters of the histories it takes as many steps as SFT.
GFLOWGR = merge(
    merge(_COMMON, OBJECTIVE),
    {
        "model": {"dropout": 0.1},
        "collaborative": {"model": "mixture"},
        "training": {"learning_rate": 2e-3, "num_train_epochs": 30, "per_device_train_batch_size": 96},
    },
)
# Supervised fine-tuning alone: the row that every other has to beat.
SFT = merge(_COMMON, {"model": {"dropout": 0.3}, "training": {"objective": "sft", "learning_rate": 1e-3}})
RECIPES = {"gflowgr": GFLOWGR, "sft": SFT}


def adapted(recipe: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe under settings that go before it.

    Where they name another kind of model, or a teacher's file, the recipe's options of its own do not apply.
    """
    own = dict(recipe)
    for name, choice in (("model", "kind"), ("collaborative", "path"), ("collaborative", "model")):
        chosen = section(settings, name).get(choice)
        if chosen is not None and chosen != section(recipe, name).get(choice):
            own.pop(name, None)
    return merge(own, settings)
