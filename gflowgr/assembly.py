"""From settings to the parts of a training run: data, model, collaborative recommender, reward, sampler."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gflowgr import backbones, collaborative
from gflowgr.adaptive import AdaptiveWeights
from gflowgr.backbones import GenerativeRecommender
from gflowgr.collaborative import CollaborativeModel, Recommender
from gflowgr.config import GFlowGRConfig, check_keys
from gflowgr.data import Examples, Histories, InteractionLog, Split, split
from gflowgr.ensemble import BY_VALIDATION, check_distribution, check_teacher_weight
from gflowgr.metrics import LOWER_IS_BETTER, OF_LISTS
from gflowgr.objectives import REWARDED
from gflowgr.rewards import (
    CollaborativeReward,
    InteractionReward,
    RewardModel,
    SimilarityReward,
    UniformReward,
)
from gflowgr.sampling import TrajectorySampler, adaptive_weights
from gflowgr.semantic_ids import SemanticIds
from gflowgr.settings import check_options, merge, section
from gflowgr.shared_prefixes import SharedPrefixes

SECTIONS = ("data", "split", "contexts", "model", "collaborative", "reward", "sampler", "training", "ranking")
CONTEXTS = ("auto", "windows", "histories")
MODELS: dict[str, Callable[..., GenerativeRecommender]] = {
    "decoder": backbones.build_decoder,
    "t5": backbones.build_t5,
    "pretrained": backbones.from_pretrained,
    "checkpoint": GenerativeRecommender.load,
}
TERMS: dict[str, Callable[..., Any]] = {
    "interaction": InteractionReward,
    "collaborative": CollaborativeReward,
    "similarity": SimilarityReward,
    "uniform": UniformReward,
}

# What a command wants beyond GFlowGRConfig's own defaults: a curve to look at, and the best epoch's weights.
_TRAINING_DEFAULTS = {
    "num_train_epochs": 20,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "logging_steps": 20,
    "warmup_steps": 0.05,
    "report_to": "none",
    "dataloader_pin_memory": torch.cuda.is_available(),
}


@dataclass(frozen=True)
class Plan:
    """The settings of a run, checked as far as they can be without its data.

    Attributes:
        split: of the log, as `gflowgr.data.split` takes it.
        contexts: "windows", "histories", or "auto": histories where model and objective allow them.
        model: "kind", and what that kind's builder takes; "lora" for adapters.
        collaborative: "model" and its options, or the "path" of a saved one; None if nothing asks for scores.
        reward: "terms", each with its options, and what `RewardModel` takes; None where no loss reads it.
        sampler: what `TrajectorySampler` takes; None where it draws nothing.
        training: the fields of `GFlowGRConfig`.
        teacher_weight: of the collaborative recommender, which ranks beside the finished model (see
            `gflowgr.ensemble`); 0 where the model ranks alone, None where the validation part chooses. In the
            settings it is under "ranking", "validation" for None.
    """

    split: dict[str, Any]
    contexts: str
    model: dict[str, Any]
    collaborative: dict[str, Any] | None
    reward: dict[str, Any] | None
    sampler: dict[str, Any] | None
    training: dict[str, Any]
    teacher_weight: float | None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Plan:
        """Checks every key and all values that need no data.

        Raises:
            TypeError, ValueError: a key does not exist (with the nearest that does), or a value cannot serve.
        """
        check_keys(settings, list(SECTIONS), "the settings")
        training = _training_settings(section(settings, "training"))
        config = GFlowGRConfig.from_mapping({"output_dir": os.devnull, **training})
        rewarded = config.objective in REWARDED
        reward = merge({"terms": {"collaborative": {}, "interaction": {}}}, section(settings, "reward"))
        if "terms" in section(settings, "reward"):
            reward["terms"] = section(settings["reward"], "terms")
        sampler = section(settings, "sampler")
        _check_reward(reward)
        _check_sampler(sampler)
        split_settings = section(settings, "split")
        check_options(split, split_settings, "split", ("log", "max_items"))
        contexts = settings.get("contexts") or "auto"
        if contexts not in CONTEXTS:
            raise ValueError(f"contexts is {contexts!r}, needs one of {', '.join(CONTEXTS)}")
        if config.objective == "grpo":
            _check_group_sampler(sampler)
        draws = config.objective not in ("sft", "grpo") and config.num_trajectories > 1
        strategies = sampler.get("strategies", "collaborative")
        teacher_weight = teacher_weight_of(settings)
        wants_scores = (
            (rewarded and "collaborative" in reward["terms"])
            or (draws and "collaborative" in strategies)
            or config.rollout_share > 0
            or (config.rollout_beyond > 0 and contexts != "windows")
            or teacher_weight != 0
        )
        scorer = section(settings, "collaborative")
        _check_collaborative(scorer)
        if teacher_weight != 0 and "path" not in scorer:
            check_distribution("collaborative.model", collaborative.MODELS[scorer.get("model", "sasrec")])
        return cls(
            split=split_settings,
            contexts=contexts,
            model=_checked_model(section(settings, "model")),
            collaborative=scorer if wants_scores else None,
            reward=reward if rewarded else None,
            sampler=sampler if draws else None,
            training=training,
            teacher_weight=teacher_weight,
        )

    def config(self, output: Path) -> GFlowGRConfig:
        """The trainer's arguments."""
        return GFlowGRConfig.from_mapping({"output_dir": str(output), **self.training})

    def divide(self, log: InteractionLog) -> Split:
        """The log's training, validation and test part."""
        return split(log, **self.split)

    def build_model(self, semantic_ids: SemanticIds, seed: int) -> GenerativeRecommender:
        """The model to train."""
        options = dict(self.model)
        kind, lora = options.pop("kind"), options.pop("lora", None)
        if kind == "checkpoint":
            model = GenerativeRecommender.load(_checkpoint_of(options.pop("folder")), semantic_ids, **options)
        else:
            given = {"history_length": self.split.get("max_history", 20), "seed": seed, **options}
            model = MODELS[kind](semantic_ids=semantic_ids, **given)
        return model if lora is None else backbones.add_lora(model, **lora)

    def build_collaborative(
        self, parts: Split, seed: int, device: torch.device | str = "cpu"
    ) -> CollaborativeModel | None:
        """The recommender behind reward and sampler, and the one that ranks beside the model.

        It is fitted to the training part, or read from its file.

        What is trained step by step is fitted on `device`, unless its options name another.
        """
        if self.collaborative is None:
            return None
        options = dict(self.collaborative)
        if "path" in options:
            return self.load_collaborative(options["path"], parts, "collaborative.path")
        name = options.pop("model", "sasrec")
        if collaborative.MODELS[name] in collaborative.TRAINED:
            # Its fit draws random numbers on these two alone; `to` takes it elsewhere afterwards.
            where = device if torch.device(device).type == "cuda" else "cpu"
            options = {"max_history": self.split.get("max_history", 20), "device": where, **options}
        return collaborative.build(
            name, parts.sequences, parts.num_items, validation=parts.validation, **{"seed": seed, **options}
        )

    def load_collaborative(self, path: str | os.PathLike[str], parts: Split, name: str) -> Recommender:
        """A saved one, which has to serve for what is planned; errors call it by `name`.

        Raises:
            ValueError: it is of another catalogue, or no distribution where it ranks beside the model.
        """
        model = collaborative.load(path)
        if model.num_items != parts.num_items:
            raise ValueError(
                f"{name} is a recommender of {model.num_items} items, needs the catalogue's {parts.num_items}"
            )
        if self.teacher_weight != 0:
            check_distribution(name, model)
        return model

    def build_reward(self, semantic_ids: SemanticIds) -> RewardModel | None:
        """The reward of a context's items."""
        if self.reward is None:
            return None
        options = dict(self.reward)
        terms = {}
        for name, given in options.pop("terms").items():
            own = {"codes": semantic_ids.content_codes} if name == "similarity" else {}
            terms[name] = TERMS[name](**own, **(given or {}))
        return RewardModel(terms, num_items=semantic_ids.num_items, **options)

    def build_sampler(self, parts: Split, config: GFlowGRConfig) -> TrajectorySampler | None:
        """What draws the trajectories beside the observed item's."""
        if self.sampler is None:
            return None
        options = dict(self.sampler)
        if options.get("popularity") is True:
            options["popularity"] = np.bincount(parts.sequences.items, minlength=parts.num_items)
        elif not options.get("popularity"):
            options.pop("popularity", None)
        return TrajectorySampler(
            parts.num_items, num_trajectories=config.num_trajectories, seed=config.seed, **options
        )

    def share_prefixes(
        self, scorer: CollaborativeModel | None, rows: Examples | Histories
    ) -> CollaborativeModel | None:
        """The same scores at less cost, where the rows' contexts are each other's beginnings."""
        if isinstance(scorer, collaborative.TRAINED) and isinstance(rows, Histories):
            return SharedPrefixes(scorer)
        return scorer

    def training_rows(
        self, parts: Split, model: GenerativeRecommender, config: GFlowGRConfig
    ) -> Examples | Histories:
        """What is trained on: windows, or whole histories, which are several times cheaper."""
        can_be_whole = not model.is_encoder_decoder and config.num_trajectories == 1
        if self.contexts == "histories" or (self.contexts == "auto" and can_be_whole):
            return parts.histories
        return parts.train


def teacher_weight_of(settings: Mapping[str, Any]) -> float | None:
    """That of the section "ranking", 0 where nothing is said, None where the validation part chooses.

    Raises:
        TypeError, ValueError: it is neither "validation" nor a number from 0 to 1, or the section has another
            key.
    """
    given = section(settings, "ranking")
    check_keys(given, ["teacher_weight"], "ranking")
    weight = given.get("teacher_weight", 0.0)
    if weight == BY_VALIDATION:
        return None
    check_teacher_weight("ranking.teacher_weight", weight, f"{BY_VALIDATION!r} or a number")
    return float(weight)


def _training_settings(given: dict[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(GFlowGRConfig) if field.init]
    known.remove("output_dir")
    check_keys(given, known, "training")
    defaults = dict(_TRAINING_DEFAULTS)
    for name in ("eval_strategy", "save_strategy"):
        # The best of a run can only be known where evaluation and saving keep step.
        if given.get(name) == "no":
            defaults["load_best_model_at_end"] = False
    if "eval_strategy" in given and "save_strategy" not in given:
        defaults["save_strategy"] = given["eval_strategy"]
    if "eval_steps" in given and "save_steps" not in given:
        defaults["save_steps"] = given["eval_steps"]
    if "max_steps" in given:
        defaults.pop("num_train_epochs")
    longest = given.get("eval_num_items", GFlowGRConfig.eval_num_items)
    metric = given.get("metric_for_best_model") or f"eval_ndcg@{longest}"
    defaults["metric_for_best_model"] = metric
    _check_metric(metric, longest)
    defaults["greater_is_better"] = not str(metric).removeprefix("eval_").startswith(LOWER_IS_BETTER)
    return {**defaults, **given}


def _check_metric(metric: object, longest: object) -> None:
    """Raises ValueError for what `GFlowGRTrainer.evaluate` does not measure."""
    if not isinstance(longest, int):
        return
    # A list of one item has no pairs.
    depths = sorted({min(5, longest), longest})
    lists = [f"{name}@{k}" for k in depths for name in OF_LISTS if k > 1 or name != "diversity"]
    known = ", ".join(f"eval_{name}" for name in [*lists, "nll"])
    if f"eval_{str(metric).removeprefix('eval_')}" not in known.split(", "):
        raise ValueError(f"training.metric_for_best_model is {metric!r}, needs one of {known}")


def _checked_model(model: dict[str, Any]) -> dict[str, Any]:
    model.setdefault("kind", "decoder")
    kind = model["kind"]
    if not isinstance(kind, str) or kind not in MODELS:
        raise ValueError(f"model.kind is {kind!r}, needs one of {', '.join(MODELS)}")
    options = {name: value for name, value in model.items() if name not in ("kind", "lora")}
    check_options(MODELS[kind], options, f"model of kind {kind!r}", ("semantic_ids", "history_length"))
    if kind in ("pretrained", "checkpoint"):
        needed = "name_or_path" if kind == "pretrained" else "folder"
        if needed not in options:
            raise ValueError(f"model of kind {kind!r} needs {needed}")
    if "dtype" in options and options["dtype"] is not None:
        dtype = getattr(torch, str(options["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"model.dtype is {options['dtype']!r}, needs a name such as 'bfloat16'")
        model["dtype"] = dtype
    if model.get("lora") is not None:
        check_options(backbones.add_lora, section(model, "lora"), "model.lora", ("model",))
    return model


def _check_collaborative(settings: dict[str, Any]) -> None:
    if "path" in settings:
        check_keys(settings, ["path"], "collaborative with a path")
        if not Path(settings["path"]).is_file():
            raise FileNotFoundError(f"collaborative.path: {settings['path']} is not a file")
        return
    name = settings.get("model", "sasrec")
    if not isinstance(name, str) or name not in collaborative.MODELS:
        raise ValueError(f"collaborative.model is {name!r}, needs one of {', '.join(collaborative.MODELS)}")
    options = {key: value for key, value in settings.items() if key != "model"}
    fit = collaborative.MODELS[name].fit  # type: ignore[attr-defined]
    given = ("sequences", "num_items", "validation")
    check_options(fit, options, f"collaborative of model {name!r}", given)
    if name == collaborative.Mixture.name:
        shared = (*given, "seed", "max_history", "device", "progress")
        for part, model in (("sasrec", collaborative.SASRec), ("item_knn", collaborative.ItemKNN)):
            check_options(model.fit, section(options, part), f"collaborative.{part}", shared)


def _check_sampler(sampler: dict[str, Any]) -> None:
    check_options(TrajectorySampler, sampler, "sampler", ("num_items", "num_trajectories", "seed"))
    if sampler.get("adapt") is not None:
        adapt = section(sampler, "adapt")
        check_options(AdaptiveWeights, adapt, "sampler.adapt", ("strategies",))
        adaptive_weights(sampler.get("strategies", "collaborative"), adapt)
    if sampler.get("replay") is not None and not Path(sampler["replay"]).is_file():
        raise FileNotFoundError(f"sampler.replay: {sampler['replay']} is not a file")


def _check_reward(reward: dict[str, Any]) -> None:
    options = {key: value for key, value in reward.items() if key != "terms"}
    check_options(RewardModel, options, "reward", ("terms", "num_items"))
    terms = section(reward, "terms")
    check_keys(terms, list(TERMS), "reward.terms")
    for name in terms:
        check_options(TERMS[name], section(terms, name), f"reward.terms.{name}", ("codes",))


def _check_group_sampler(sampler: dict[str, Any]) -> None:
    """GRPO's group comes from the policy and nowhere else, so a sampler has nothing to set."""
    for key, value in sampler.items():
        only_policy = value == "policy" or (isinstance(value, Mapping) and set(value) == {"policy"})
        if key != "strategies" or not only_policy:
            raise ValueError(
                f"sampler.{key} is {value!r}, needs no sampler but strategies: policy for objective 'grpo'"
            )


def _checkpoint_of(folder: str | os.PathLike[str]) -> Path:
    """The checkpoint inside a run's folder, or the folder itself."""
    inside = Path(folder) / "checkpoint"
    return inside if inside.is_dir() else Path(folder)
