"""The rows of the quality table: what each trains, on what it is built, and what is chosen for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gflowgr.ensemble import WEIGHTS
from gflowgr.quality.results import TOGETHER, UNSEEN
from gflowgr.recipes import GFLOWGR, OBJECTIVE, SFT
from gflowgr.settings import merge


@dataclass(frozen=True)
class Row:
    """A method of the table.

    Attributes:
        kind: "scorer" is a recommender of `gflowgr.collaborative`, "mixture" one made of those of `start` and
            `teacher`; "decoder", "wide" (twice as wide), "large" (deeper, too) and "t5" a model from scratch;
            "further" a model that goes on from the checkpoint of `start`; "ensemble" the geometric mean of
            the probabilities of `start` and `teacher`; "unseen" what `start` is, in lists without the items
            of the history.
        settings: what distinguishes it, as `gflowgr.assembly.Plan` takes it; of what trains nothing, how it
            ranks.
        start: the row whose checkpoint it starts from.
        teacher: the row whose recommender is behind its reward, sampler or rollouts.
        grid: settings to choose from on the validation part: dotted name -> values.
        like: the row whose choice it shares, where it has no grid of its own.
    """

    kind: Literal["scorer", "mixture", "decoder", "wide", "large", "t5", "further", "ensemble", "unseen"]
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: str | None = None
    teacher: str | None = None
    grid: Mapping[str, list[Any]] = field(default_factory=dict)
    like: str | None = None

    @property
    def built_on(self) -> list[str]:
        return [row for row in (self.start, self.teacher) if row is not None]

    def points(self) -> list[dict[str, Any]]:
        """Every combination of the grid."""
        combinations = itertools.product(*self.grid.values())
        return [dict(zip(self.grid, values, strict=True)) for values in combinations]


# A row's model ranks alone: what the recipe ranks by beside it is in rows of its own.
_RECIPE, _OBJECTIVE = (
    {name: options for name, options in recipe.items() if name != "ranking"}
    for recipe in (GFLOWGR, OBJECTIVE)
)
ALL_EARLIER = "all earlier items"
_EXCLUDING = {"exclude_history": True, "excluded": ALL_EARLIER}
# Whoever ranks with a teacher: its weight is the best of these on the validation part.
_TOGETHER = {"teacher_weights": list(WEIGHTS)}


def _scorer(model: str, **options: Any) -> Row:
    return Row("scorer", {"collaborative": {"model": model, **options}})


# Of what goes on from a supervised model: a preference that is pushed too hard undoes what it knew.
_RATES: dict[str, list[Any]] = {"training.learning_rate": [3e-5, 1e-4, 3e-4]}


def _further(
    objective: str, teacher: str | None = None, sections: Mapping[str, Any] | None = None, **training: Any
) -> Row:
    settings = {**(sections or {}), "training": {"objective": objective, **training}}
    return Row("further", settings, start="sft", teacher=teacher, grid=_RATES)


_TERMS: dict[str, dict[str, Any]] = {
    "interaction": {},
    "collaborative": {"normalisation": "standardised"},
    "similarity": {},
}


def _paper(
    *,
    without: str | None = None,
    sections: Mapping[str, Any] | None = None,
    like: str | None = "gflowgr-tb",
    **training: Any,
) -> Row:
    """GFlowGR as the paper has it (arXiv 2506.16114), but for what is given."""
    literal = {
        "reward": {
            "fusion": "sum",
            "terms": {name: options for name, options in _TERMS.items() if name != without},
        },
        "sampler": {"strategies": "collaborative", "schedule": "curriculum"},
        "training": {
            "objective": "tb",
            "flows": "learned",
            "sft_weight": 1.0,
            "gfn_weight": 1.0,
            "num_trajectories": 3,
        },
    }
    settings = merge(merge(literal, sections or {}), {"training": training})
    grid = _RATES if like is None else {}
    return Row("further", settings, start="sft", teacher="sasrec", grid=grid, like=like)


def _on_t5(like: str, row: Row) -> Row:
    """The same from a T5, at the learning rate that was chosen for the decoder."""
    return replace(row, start="t5-sft", grid={}, like=like)


_BUDGET = ("num_train_epochs", "per_device_train_batch_size")


def _within(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which histories end where they do, all draws are the teacher's, and the budget is SFT's."""
    budget = {name: SFT["training"][name] for name in _BUDGET if name in settings["training"]}
    newer = ("rollout_beyond", "rollout_epsilon")
    training = {name: value for name, value in settings["training"].items() if name not in newer}
    return {**settings, "training": {**training, **budget}}


def _longer(settings: Mapping[str, Any], times: int = 2) -> dict[str, Any]:
    """The same with so many times the steps."""
    return merge(
        settings, {"training": {"num_train_epochs": times * settings["training"]["num_train_epochs"]}}
    )


_RANDOM = {"sampler": {"strategies": "random"}}
_POLICY = {"sampler": {"strategies": "policy"}}


# Adapters of a model that was trained before, both rows with the same steps on whole histories.
_LORA = {
    "contexts": "histories",
    "model": {"lora": {"r": 16, "alpha": 32}},
    "training": {"learning_rate": 2e-3, "per_device_train_batch_size": 128},
}
_ROLLOUTS = {
    name: value
    for name, value in _RECIPE["training"].items()
    if name.startswith("rollout") or name == "reward_candidates" or name in _BUDGET
}
# Here a drawn item is a target, which any of the catalogue would only spoil.
_ROLLOUTS["rollout_epsilon"] = 0.0
# The recipe's first form: a SASRec alone as teacher, and rollouts that end where the history does.
_FIRST_REWARD = {
    "fusion": "mixture",
    "terms": {"collaborative": {"normalisation": "softmax", "temperature": 0.5}, "interaction": {}},
    "weights": {"collaborative": 0.4, "interaction": 0.6},
}
_FIRST = _within({**_RECIPE, "reward": _FIRST_REWARD, "collaborative": {"model": "sasrec"}})
# Label smoothing over items, not codes: a tenth of the target is spread over the catalogue.
_SMOOTHED = merge(
    SFT,
    {
        "reward": {
            "terms": {"interaction": {}, "uniform": {}},
            "weights": {"interaction": 0.9, "uniform": 0.1},
        },
        "training": {"objective": "flow_matching"},
    },
)
# As many points for the supervised model as for ours.
_SFT_GRID = {"model.dropout": [0.2, 0.3, 0.4]}
_GFLOWGR_GRID = {"reward.weights.interaction": [0.25, 0.5, 1.0]}
_FIRST_GRID = {"reward.weights.interaction": [0.27, 0.6, 1.2]}
# A T5 sees one context a row, and fewer epochs of them: what it needs is not what a decoder needs.
_T5_GRID = {"model.dropout": [0.0, 0.1, 0.2]}

ROWS: dict[str, Row] = {
    "popularity": _scorer("popularity"),
    "item-knn": _scorer("item-knn"),
    "sasrec": _scorer("sasrec"),
    "mixture": Row("mixture", {"collaborative": {"model": "mixture"}}, start="item-knn", teacher="sasrec"),
    "sft": Row("decoder", SFT, grid=_SFT_GRID),
    # Whether it was given too few steps.
    "sft-longer": Row("decoder", _longer(SFT), like="sft"),
    "sft-longest": Row("decoder", _longer(SFT, times=4), like="sft"),
    "sft-continued": _further("sft"),
    "sft-smoothed": Row("decoder", _SMOOTHED, like="sft"),
    "sft-smoothed-longer": Row("decoder", _longer(_SMOOTHED), like="sft"),
    "sft-rollouts-sasrec": Row(
        "decoder", _within(merge(SFT, {"training": _ROLLOUTS})), teacher="sasrec", like="sft"
    ),
    "sft-rollouts": Row("decoder", merge(SFT, {"training": _ROLLOUTS}), teacher="mixture", like="sft"),
    "ensemble": Row("ensemble", _TOGETHER, start="sft", teacher="sasrec"),
    "dpo": _further("s_dpo", None, _RANDOM, num_trajectories=2),
    "s-dpo": _further("s_dpo", None, _RANDOM, num_trajectories=4),
    "sprec": _further("s_dpo", None, _POLICY, num_trajectories=2, sft_weight=1.0),
    "grpo": _further(
        "grpo",
        None,
        {**_POLICY, "reward": {"fusion": "sum", "terms": {"interaction": {}, "similarity": {}}}},
        num_trajectories=9,
    ),
    "item-kl": _further(
        "item_kl",
        "sasrec",
        {
            "reward": _FIRST_REWARD,
            "sampler": {"strategies": "collaborative", "schedule": "constant", "pool_size": 15},
        },
        num_trajectories=16,
    ),
    "gflowgr-tb": _paper(like=None),
    "gflowgr-db": _paper(objective="db"),
    "gflowgr-vargrad": _paper(objective="vargrad", flows="exact"),
    "gflowgr-subtb": _paper(objective="subtb"),
    "gflowgr-flows": Row(
        "decoder",
        merge(_FIRST, {"training": {"rollout_share": 0.0}}),
        teacher="sasrec",
        like="gflowgr-sasrec",
    ),
    "gflowgr-sasrec": Row("decoder", _FIRST, teacher="sasrec", grid=_FIRST_GRID),
    "gflowgr-within": Row("decoder", _within(_RECIPE), teacher="mixture", like="gflowgr"),
    "gflowgr-epsilon0": Row(
        "decoder", merge(_RECIPE, {"training": {"rollout_epsilon": 0.0}}), teacher="mixture", like="gflowgr"
    ),
    "gflowgr-sasrec-teacher": Row(
        "decoder", {**_RECIPE, "collaborative": {"model": "sasrec"}}, teacher="sasrec", like="gflowgr"
    ),
    "gflowgr": Row("decoder", _RECIPE, teacher="mixture", grid=_GFLOWGR_GRID),
    "gflowgr-longer": Row("decoder", _longer(_RECIPE), teacher="mixture", like="gflowgr"),
    "gflowgr-longest": Row("decoder", _longer(_RECIPE, times=4), teacher="mixture", like="gflowgr"),
    "gflowgr-tb-n1": _paper(num_trajectories=1),
    "gflowgr-tb-n5": _paper(num_trajectories=5),
    "gflowgr-tb-lambda0.02": _paper(gfn_weight=0.02),
    "gflowgr-tb-lambda0.1": _paper(gfn_weight=0.1),
    "gflowgr-tb-lambda10": _paper(gfn_weight=10.0),
    "gflowgr-tb-no-interaction": _paper(without="interaction"),
    "gflowgr-tb-no-collaborative": _paper(without="collaborative"),
    "gflowgr-tb-no-similarity": _paper(without="similarity"),
    "gflowgr-tb-random": _paper(sections={"sampler": {"strategies": "random", "schedule": "constant"}}),
    "gflowgr-tb-adaptive": _paper(
        sections={
            "sampler": {"strategies": {"collaborative": 0.5, "policy": 0.25, "random": 0.25}, "adapt": {}}
        }
    ),
    "gflowgr-tb-weights": _paper(sections={"reward": {"fusion": "weights"}}),
    "gflowgr-tb-mlp": _paper(sections={"reward": {"fusion": "mlp"}}),
    "t5-sft": Row("t5", SFT, grid=_T5_GRID),
    "t5-sft-continued": _on_t5("sft-continued", _further("sft")),
    "t5-s-dpo": _on_t5("s-dpo", _further("s_dpo", None, _RANDOM, num_trajectories=4)),
    "t5-gflowgr-tb": _on_t5("gflowgr-tb", _paper()),
    "t5-gflowgr": Row("t5", _within(_RECIPE), teacher="mixture", grid=_T5_GRID),
    "wide-sft": Row("wide", _longer(SFT), like="sft"),
    "wide-gflowgr": Row("wide", _longer(_RECIPE), teacher="mixture", like="gflowgr"),
    "large-sft": Row("large", SFT),
    "lora-sft": Row("further", merge(_further("sft").settings, _LORA), start="large-sft"),
    "lora-gflowgr": Row(
        "further",
        merge(_within({**_OBJECTIVE, "reward": _FIRST_REWARD}), _LORA),
        start="large-sft",
        teacher="sasrec",
    ),
}

# Ranked together with the teacher.
_LENGTHS = [f"{method}{length}" for method in ("sft", "gflowgr") for length in ("", "-longer", "-longest")]
ROWS |= {row + TOGETHER: Row("ensemble", _TOGETHER, start=row, teacher="mixture") for row in _LENGTHS}

# Lists without the items of the history, as a shop shows them where nobody takes an item twice.
_RANKED_TWICE = [
    *("item-knn", "sasrec", "mixture", "sft-continued", "sft-rollouts", "dpo", "s-dpo", "grpo"),
    *("gflowgr-sasrec-teacher", *_LENGTHS),
]
ROWS |= {row + UNSEEN: Row("unseen", _EXCLUDING, start=row) for row in _RANKED_TWICE}
ROWS |= {
    name + UNSEEN: replace(row, settings={**row.settings, **_EXCLUDING})
    for name, row in ROWS.items()
    if row.kind == "ensemble"
}

# The table's own rows, without ablations, other backbones and what takes four times as long.
MAIN = [
    name
    for name in ROWS
    if not name.startswith(("gflowgr-tb-", "t5-", "wide-", "large-", "lora-")) and "-longest" not in name
]
