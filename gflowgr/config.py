"""The settings of a training run."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from transformers import TrainingArguments

from gflowgr.objectives import BASELINES, FLOWS, OBJECTIVES


@dataclass
class GFlowGRConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what GFlowGR adds: `L = sft_weight * L_SFT + gfn_weight * L_GFN`.

    A baseline takes the place of L_GFN: "s_dpo" (arXiv 2406.09215), "grpo" (arXiv 2402.03300) or "item_kl",
    see `gflowgr.baselines`.

    The default is child flow matching with exact flows. Its reward, a mixture of distributions, already holds
    the observed item's share, so no SFT term stands beside it. The paper's form is `objective="tb"` with
    `sft_weight=1`, `flows="learned"` and a reward model of fusion "sum".
    """

    objective: str = field(
        default="flow_matching",
        metadata={
            "help": "The GFlowNet loss, a baseline's, or supervised fine-tuning alone: one of "
            f"{', '.join(OBJECTIVES)}."
        },
    )
    flows: str = field(
        default="exact",
        metadata={
            "help": "Where log Z and the flows come from: 'exact' (closed form), 'learned' (a head with its "
            "own learning rate) or 'estimated' (the mean over a context's trajectories; trajectory balance "
            "only)."
        },
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Weight of the supervised loss on the observed item."}
    )
    gfn_weight: float = field(
        default=1.0, metadata={"help": "Weight of the objective's loss (the paper's lambda)."}
    )
    num_trajectories: int = field(
        default=1, metadata={"help": "Trajectories a context, the observed item included (the paper's N)."}
    )
    subtb_lambda: float = field(
        default=0.9, metadata={"help": "Weight ratio of sub-trajectories one step longer."}
    )
    flow_learning_rate: float = field(
        default=1e-2, metadata={"help": "Learning rate of learned log Z and flows."}
    )
    rollout_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of histories, or of windows, of which the recommender draws the latter part, from "
            "a random item on."
        },
    )
    rollout_temperature: float = field(
        default=1.0,
        metadata={"help": "What the recommender's scores are divided by before it draws an item."},
    )
    rollout_epsilon: float = field(
        default=0.0,
        metadata={
            "help": "Share of drawn items that are any of the catalogue which the history lacks: users take "
            "much that no recommender would have picked, and the policy is asked after it all the same. They "
            "are for flow matching, which learns what comes after them; a loss on the drawn item would learn "
            "to draw them, too. It counts for whole histories, not for windows."
        },
    )
    rollout_beyond: int = field(
        default=0,
        metadata={
            "help": "Items that the recommender draws after a user's last one: with 2 the policy is trained "
            "where it will be asked, after all that it knows of a user and one item more. A row that is full "
            "loses its oldest items for them. It counts for whole histories, not for windows."
        },
    )
    rollout_reuse: int = field(
        default=0,
        metadata={
            "help": "How often a rollout of a whole history is used on average: all that a run needs are "
            "drawn at its first step, among the items that can have a reward; 0 draws anew in every step "
            "from the whole catalogue, as is always done for windows."
        },
    )
    reward_candidates: int = field(
        default=0,
        metadata={
            "help": "Items that can have a reward in a context, the recommender's best and the observed one; "
            "0 is the whole catalogue. It counts for flow matching with one trajectory: every other loss "
            "asks for rewards of items that nobody can foresee."
        },
    )
    preference_beta: float = field(
        default=0.1,
        metadata={
            "help": "How much a log-ratio to the reference counts in 's_dpo': .1 is usual for DPO, the "
            "authors of S-DPO take 1."
        },
    )
    kl_weight: float = field(
        default=0.04,
        metadata={"help": "Weight of 'grpo's KL to the policy as it was before training; .04 as published."},
    )
    eval_num_items: int = field(default=10, metadata={"help": "Length of the lists that evaluation ranks."})
    eval_num_beams: int = field(default=20, metadata={"help": "Beams of the evaluation's search."})
    exclude_history: bool = field(
        default=False,
        metadata={"help": "Leave out of lists all that a user took before, read by the model or not."},
    )

    # What a recommender needs other defaults for than a language model.
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep: the batch is read by name."})
    learning_rate: float = field(default=1e-3, metadata={"help": "The initial learning rate."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate's schedule."})
    train_sampling_strategy: str = field(
        default="group_by_length",
        metadata={"help": "How rows form batches: histories of like length ('group_by_length') or 'random'."},
    )
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Contexts a step and device."})
    per_device_eval_batch_size: int = field(
        default=256, metadata={"help": "Users a batch of the evaluation."}
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            given = getattr(self, each.name, each.default)
            kind = each.type.__name__ if isinstance(each.type, type) else str(each.type)
            # A path may stand for a text.
            if given is not each.default and "str" not in kind:
                check_kind(each.name, given, kind)
        super().__post_init__()
        choices = {"objective": OBJECTIVES, "flows": FLOWS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, needs one of {', '.join(allowed)}")
        if self.flows == "estimated" and self.objective not in ("sft", "tb", "vargrad"):
            raise ValueError(
                f"flows is 'estimated', needs objective 'tb' or 'vargrad', not {self.objective!r}"
            )
        if self.flows == "learned" and self.objective in ("flow_matching", "vargrad", *BASELINES):
            raise ValueError(
                f"flows is 'learned', needs objective 'tb', 'db' or 'subtb', not {self.objective!r}"
            )
        groups = self.objective in ("vargrad", "s_dpo", "item_kl") or (
            self.objective == "tb" and self.flows == "estimated"
        )
        # The observed item is no part of GRPO's group, and a group of one has no relative reward.
        at_least = 3 if self.objective == "grpo" else 2 if groups else 1
        if self.num_trajectories < at_least:
            raise ValueError(f"num_trajectories is {self.num_trajectories}, needs at least {at_least} here")
        for name in ("sft_weight", "gfn_weight", "kl_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, needs 0 or more")
        if not 0 < self.preference_beta < math.inf:
            raise ValueError(f"preference_beta is {self.preference_beta}, needs a number above 0")

        for name in ("rollout_share", "rollout_epsilon"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, needs a number from 0 to 1")
        if not 0 < self.rollout_temperature < math.inf:
            raise ValueError(f"rollout_temperature is {self.rollout_temperature}, needs a number above 0")
        for name in ("rollout_beyond", "rollout_reuse", "reward_candidates"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, needs 0 or more")
        if self.eval_num_items < 1:
            raise ValueError(f"eval_num_items is {self.eval_num_items}, needs at least 1")
        if self.eval_num_beams < self.eval_num_items:
            raise ValueError(
                f"eval_num_beams is {self.eval_num_beams}, needs at least eval_num_items, "
                f"{self.eval_num_items}"
            )

    @property
    def candidates(self) -> int:
        """`reward_candidates` where they count, else 0."""
        alone = self.objective == "flow_matching" and self.num_trajectories == 1
        return self.reward_candidates if alone else 0

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> GFlowGRConfig:
        """The config of a mapping such as a YAML file's; an unknown key raises with the nearest known one."""
        check_keys(settings, [f.name for f in fields(cls) if f.init], "training")
        return cls(**settings)


def check_keys(settings: Mapping[str, Any], known: list[str], where: str) -> None:
    """Raises ValueError for a key that does not exist, with the nearest one that does."""
    for key in settings:
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f"; did you mean {nearest[0]!r}?" if nearest else f", needs one of {', '.join(sorted(known))}"
            )
            raise ValueError(f"{where} has the key {key!r}, which does not exist{hint}")


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "None": (type(None), "null"),
    "bool": (bool, "true or false"),
    "int": (Integral, "an integer"),
    "float": (Real, "a number"),
    "str": (str, "a text"),
    "Mapping": (Mapping, "keys with values"),
    "dict": (Mapping, "keys with values"),
    "Sequence": ((list, tuple), "a list"),
    "list": ((list, tuple), "a list"),
}


def check_kind(name: str, value: Any, annotation: str) -> None:
    """Raises TypeError or ValueError for a value that an annotation such as "int | None" does not allow.

    What stands in brackets is not looked at, but for a Literal's choices. An annotation that names anything
    else allows everything.
    """
    needs = []
    # Bars inside of brackets part nothing.
    for part in re.split(r"\s*\|\s*(?![^\[]*\])", annotation):
        kind, _, inner = part.partition("[")
        if kind == "Literal":
            choices = ast.literal_eval(f"({inner.removesuffix(']')},)")
            if value in choices:
                return
            needs.append(f"one of {', '.join(map(str, choices))}")
            continue
        if kind not in _KINDS:
            return
        kinds, words = _KINDS[kind]
        if isinstance(value, kinds) and (kind == "bool" or not isinstance(value, bool)):
            return
        needs.append(words)
    error = ValueError if "Literal" in annotation else TypeError
    raise error(f"{name} is {value!r}, needs {' or '.join(needs)}")
