"""One cell of the table: a row on a data set with a seed, trained, measured, and written to its files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from gflowgr import collaborative, pipeline
from gflowgr.adaptive import WeightSchedule
from gflowgr.backbones import GenerativeRecommender
from gflowgr.bench.table import machine
from gflowgr.collaborative import Recommender, best_items
from gflowgr.config import GFlowGRConfig
from gflowgr.data import Examples, Split, split
from gflowgr.ensemble import best_weight, by_weight, rank_by_weight, rank_together
from gflowgr.folders import DataFolder, remove
from gflowgr.metrics import Metrics, ranking_metrics
from gflowgr.quality.data import DataSet
from gflowgr.quality.grids import chosen_settings, grid_of
from gflowgr.quality.results import SCHEDULES, Cell, save_users
from gflowgr.quality.rows import ROWS
from gflowgr.quality.run_users import BY_TEACHER_WEIGHT
from gflowgr.recipes import SFT
from gflowgr.settings import merge
from gflowgr.trainer import GFlowGRTrainer

PLACES = 10
MAX_HISTORY = 20
# Candidates of each side of an ensemble.
_CANDIDATES = 20

_COMMON: dict[str, Any] = {
    "split": {"max_history": MAX_HISTORY},
    "training": {
        "eval_strategy": "steps",
        "eval_steps": 1 / 3,
        "eval_num_items": PLACES,
        "bf16": True,
        "disable_tqdm": True,
        "logging_steps": 50,
    },
}
# What a backbone from scratch has in common, whatever it is trained for.
_FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "decoder": {"model": {"kind": "decoder", "layers": 2, "d_model": 128, "heads": 4}},
    "wide": {"model": {"kind": "decoder", "layers": 2, "d_model": 256, "heads": 8}},
    "large": {"model": {"kind": "decoder", "layers": 6, "d_model": 256, "heads": 8}},
    "t5": {
        "model": {
            "kind": "t5",
            "layers": 4,
            "d_model": 128,
            "heads": 6,
            "d_kv": 64,
            "d_ff": 1024,
            # T5's own, whatever the recipe's decoder needs.
            "dropout": 0.1,
        },
        "training": {"per_device_train_batch_size": 256, "learning_rate": 1e-3},
    },
}
_FURTHER = {"per_device_train_batch_size": 256, "learning_rate": 3e-4}


@dataclass(frozen=True)
class Place:
    """Where things are: the data sets' folders, what may be thrown away, and the result files."""

    data: Path
    work: Path
    results: Path

    def checkpoint(self, data_set: str, row: str, seed: int) -> Path:
        """A run's folder, or a fitted recommender's file."""
        ending = ".safetensors" if ROWS[row].kind in ("scorer", "mixture") else ""
        return self.work / data_set / f"{row}-{seed}{ending}"

    def result(self, data_set: str, row: str, seed: int) -> Path:
        return self.results / data_set / f"{row}-{seed}.json"

    def schedule(self, data_set: str, row: str, seed: int) -> Path:
        """Of a sampler that adapts: its weights in each step."""
        return self.results / data_set / SCHEDULES / f"{row}-{seed}.json"


def settings_of(row_name: str, data_set: DataSet, seed: int, place: Place) -> dict[str, Any]:
    """Everything that a run is given; paths are those of this machine."""
    row = ROWS[row_name]
    if row.kind in ("scorer", "mixture"):
        return merge(row.settings, chosen_settings(row_name, data_set.name, place.results))
    if row.kind == "unseen":
        return dict(row.settings)
    if row.kind == "ensemble":
        return {"mean": "geometric", "candidates": _CANDIDATES, **row.settings}
    common = merge(_COMMON, {"training": {"seed": seed, "use_cpu": device().type == "cpu"}})
    if row.kind == "further":
        assert row.start is not None
        folder = place.checkpoint(data_set.name, row.start, seed)
        going_on = {
            "contexts": "windows",
            "model": {"kind": "checkpoint", "folder": str(folder)},
            "training": {**_FURTHER, "max_steps": data_set.extra_steps},
        }
        settings = merge(merge(common, going_on), row.settings)
    else:
        epochs = data_set.t5_epochs if row.kind == "t5" else data_set.epochs
        # A data set's are those of SFT.
        epochs *= row.settings["training"]["num_train_epochs"] / SFT["training"]["num_train_epochs"]
        settings = merge(row.settings, merge(common, {"training": {"num_train_epochs": epochs}}))
        settings = merge(settings, _FROM_SCRATCH[row.kind])
    settings.pop("collaborative", None)
    if row.teacher is not None:
        path = place.checkpoint(data_set.name, row.teacher, seed)
        settings["collaborative"] = {"path": str(path)}
    return merge(settings, chosen_settings(row.like or row_name, data_set.name, place.results))


def run(row_name: str, data_set: DataSet, seed: int, place: Place) -> Cell:
    """Trains and measures a cell whose `built_on` are there, and writes its result and its checkpoint.

    A run that was killed goes on from its last checkpoint.

    Raises:
        FileNotFoundError: data are missing, or what the row is built on.
        ValueError: data that do not fit the row.
    """
    row = ROWS[row_name]
    folder = data_set.load(place.data, place.work)
    settings = settings_of(row_name, data_set, seed, place)
    for needed in row.built_on:
        if not place.checkpoint(data_set.name, needed, seed).exists():
            raise FileNotFoundError(f"{row_name} needs {needed} of seed {seed} first")
    kinds = {
        "scorer": _run_scorer,
        "mixture": _run_scorer,
        "ensemble": _run_ensemble,
        "unseen": _rank_unseen,
    }
    measure = kinds.get(row.kind, _run_model)
    measured = measure(row_name, data_set, seed, place, settings, folder)
    settings = {**settings, **measured.chosen}
    cell = _cell(row_name, data_set, seed, place, settings, folder, measured)
    if measured.schedule is not None:
        schedule = place.schedule(data_set.name, row_name, seed)
        schedule.parent.mkdir(parents=True, exist_ok=True)
        measured.schedule.save(schedule)
    cell.save(place.results / data_set.name)
    parts = measured.parts
    popularity = np.bincount(parts.sequences.items, minlength=parts.num_items)
    save_users(
        place.results / data_set.name,
        (parts.test.history >= 0).sum(1).numpy(),
        popularity[parts.test.target.numpy()],
    )
    return cell


@dataclass(frozen=True)
class _Measured:
    parts: Split
    validation: Metrics
    test: Metrics
    steps: int = 0
    contexts: float = 0.0
    seconds: float = 0.0
    schedule: WeightSchedule | None = None
    chosen: Mapping[str, Any] = field(default_factory=dict)


def _run_scorer(
    row: str, data_set: DataSet, seed: int, place: Place, settings: Mapping[str, Any], folder: DataFolder
) -> _Measured:
    began = time.process_time()
    is_mixture = ROWS[row].kind == "mixture"
    model = _mixture(row, data_set, seed, place) if is_mixture else fit_scorer(settings, folder, seed)
    seconds = time.process_time() - began
    path = place.checkpoint(data_set.name, row, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(path)
    parts = split(folder.log, max_history=MAX_HISTORY)
    # A mixture is of recommenders whose own cells count their steps.
    log: list[dict[str, float]] = model.training_log if isinstance(model, collaborative.SASRec) else []
    return _Measured(
        parts,
        _rank_scores(model, parts.validation, folder),
        _rank_scores(model, parts.test, folder),
        steps=round(sum(entry["steps"] for entry in log)),
        contexts=len(log) * len(parts.sequences.items),
        seconds=seconds,
    )


def _mixture(row: str, data_set: DataSet, seed: int, place: Place) -> collaborative.Mixture:
    """Of the two recommenders that the row is built on."""
    item_knn, sasrec = (place.checkpoint(data_set.name, part, seed) for part in ROWS[row].built_on)
    parts = collaborative.SASRec.load(sasrec), collaborative.ItemKNN.load(item_knn)
    return collaborative.Mixture(*parts).to(device())


def fit_scorer(settings: Mapping[str, Any], folder: DataFolder, seed: int) -> Recommender:
    """Fits on a log from which the test items are gone."""
    parts = split(folder.log.without_last(), max_history=MAX_HISTORY, held_out=1)
    options = dict(settings["collaborative"])
    name = options.pop("model")
    if collaborative.MODELS[name] in collaborative.TRAINED:
        options = {"max_history": MAX_HISTORY, "device": device(), **options}
    if name != "popularity":
        options["progress"] = False
    return collaborative.build(
        name, parts.sequences, parts.num_items, validation=parts.validation, seed=seed, **options
    )


def _rank_scores(
    model: Recommender, part: Examples, folder: DataFolder, exclude_history: bool = False
) -> Metrics:
    assert folder.semantic_ids is not None
    best, of_target = [], []
    for rows in torch.arange(len(part)).split(1024):
        here = part.select(rows)
        scores = model.scores(here.history)
        of_target.append(scores.log_softmax(1).gather(1, here.target[:, None])[:, 0])
        best.append(best_items(scores, PLACES, here.taken() if exclude_history else None))
    return ranking_metrics(
        torch.cat(best),
        part.target,
        num_items=model.num_items,
        codes=folder.semantic_ids.content_codes,
        target_log_probs=torch.cat(of_target) if model.is_distribution else None,
    )


def device() -> torch.device:
    """Where cells run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


_CLOCK = "processor_seconds"


class Clock(transformers.TrainerCallback):
    """Processor time of the steps alone, with those before a kill, and a line at each evaluation."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint's log comes back with it.
        self.seconds = max((entry[_CLOCK] for entry in state.log_history if _CLOCK in entry), default=0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self.began

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        state.log_history.append({_CLOCK: self.seconds, "step": state.global_step})
        found = (metrics or {}).get(f"eval_ndcg@{PLACES}")
        if found is not None:
            print(
                f"{self.title}: step {state.global_step} of {state.max_steps}, "
                f"validation NDCG@{PLACES} {found:.4f}",
                flush=True,
            )


def _run_model(
    row: str, data_set: DataSet, seed: int, place: Place, settings: Mapping[str, Any], folder: DataFolder
) -> _Measured:
    target = place.checkpoint(data_set.name, row, seed)
    partial = target.with_name(f"{target.name}.partial")
    resume = any(partial.glob("checkpoint-*/trainer_state.json"))
    if not resume:
        remove(partial)
    clock = Clock(f"{data_set.name} {row} seed {seed}")
    fitted = pipeline.fit(folder, settings, partial, resume=resume, callbacks=[clock])
    trainer, parts = fitted.trainer, fitted.parts
    trainer.policy.recommender.save_pretrained(target / pipeline.CHECKPOINT)
    rows = trainer.train_dataset
    steps = trainer.state.max_steps
    contexts_a_row = 1.0
    if not isinstance(rows, Examples):
        contexts_a_row = rows.contexts(trainer.args.rollout_beyond)
    measured = _Measured(
        parts,
        trainer.rank(parts.validation),
        trainer.rank(parts.test),
        steps=steps,
        contexts=steps * trainer.args.per_device_train_batch_size * contexts_a_row,
        seconds=clock.seconds,
        schedule=None if trainer.sampler is None else trainer.sampler.mixture,
    )
    remove(partial)
    return measured


def _run_ensemble(
    row: str, data_set: DataSet, seed: int, place: Place, settings: Mapping[str, Any], folder: DataFolder
) -> _Measured:
    start, teacher = ROWS[row].built_on
    checkpoint = place.checkpoint(data_set.name, start, seed) / pipeline.CHECKPOINT
    recommender = GenerativeRecommender.load(checkpoint).eval().to(device())
    scorer = collaborative.load(place.checkpoint(data_set.name, teacher, seed))
    if isinstance(scorer, collaborative.TRAINED):
        scorer.to(device())
    parts = split(folder.log, max_history=MAX_HISTORY)
    options: dict[str, Any] = {
        "num_items": PLACES,
        "num_beams": settings["candidates"],
        "exclude_history": settings.get("exclude_history", False),
    }
    weights = settings["teacher_weights"]
    measured = rank_by_weight(recommender, scorer, parts.validation, teacher_weights=weights, **options)
    best = best_weight(measured)
    test = rank_together(recommender, scorer, parts.test, teacher_weight=best, **options)
    chosen = {"teacher_weight": best, BY_TEACHER_WEIGHT: by_weight(measured)}
    return _Measured(parts, measured[best], test, chosen=chosen)


def _rank_unseen(
    row: str, data_set: DataSet, seed: int, place: Place, settings: Mapping[str, Any], folder: DataFolder
) -> _Measured:
    start = ROWS[row].start
    assert start is not None
    checkpoint = place.checkpoint(data_set.name, start, seed)
    parts = split(folder.log, max_history=MAX_HISTORY)
    if ROWS[start].kind in ("scorer", "mixture"):
        scorer = collaborative.load(checkpoint)
        if isinstance(scorer, collaborative.TRAINED):
            scorer.to(device())
        validation, test = (
            _rank_scores(scorer, part, folder, settings["exclude_history"])
            for part in (parts.validation, parts.test)
        )
        return _Measured(parts, validation, test)
    args = GFlowGRConfig(
        str(checkpoint),
        objective="sft",
        eval_num_items=PLACES,
        use_cpu=device().type == "cpu",
        report_to="none",
        exclude_history=settings["exclude_history"],
    )
    trainer = GFlowGRTrainer(GenerativeRecommender.load(checkpoint / pipeline.CHECKPOINT), args)
    return _Measured(parts, trainer.rank(parts.validation), trainer.rank(parts.test))


def _cell(
    row_name: str,
    data_set: DataSet,
    seed: int,
    place: Place,
    settings: Mapping[str, Any],
    folder: DataFolder,
    measured: _Measured,
) -> Cell:
    row = ROWS[row_name]
    total = measured.seconds
    for needed in _everything_behind(row_name):
        total += Cell.load(place.result(data_set.name, needed, seed)).budget["seconds"]
    where = machine(device())
    tuned = row.like or row_name
    return Cell(
        dataset=data_set.name,
        row=row_name,
        seed=seed,
        settings=_portable({**settings, "semantic_ids": data_set.tokenizer}, place),
        grid=grid_of(tuned, data_set.name, place.results),
        built_on=row.built_on,
        budget={
            "steps": measured.steps,
            "contexts": round(measured.contexts),
            "seconds": round(measured.seconds, 1),
            "total_seconds": round(total, 1),
        },
        num_users=len(measured.parts.test),
        num_items=folder.log.num_items,
        validation=measured.validation.summary(),
        test=measured.test.summary(),
        commit=where["commit"],
        device=where["cpu"] if where["device"] == "cpu" else where["device"],
        versions={name: where[name] for name in ("gflowgr", "torch")}
        | {"transformers": transformers.__version__},
        validation_rank=measured.validation.rank.numpy().astype(np.uint8),
        test_rank=measured.test.rank.numpy().astype(np.uint8),
    )


def _everything_behind(row: str) -> set[str]:
    """What the row is built on, and that on, once each."""
    found = set(ROWS[row].built_on)
    return found.union(*map(_everything_behind, found))


def _portable(settings: Any, place: Place) -> Any:
    """Without this machine's folders in the paths."""
    if isinstance(settings, Mapping):
        return {key: _portable(value, place) for key, value in settings.items()}
    if isinstance(settings, str):
        return settings.replace(f"{place.work}/", "")
    return settings
