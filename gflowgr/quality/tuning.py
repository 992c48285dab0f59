"""Chooses a row's settings on the validation part, on a log from which every test item is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gflowgr import pipeline
from gflowgr.bench.table import machine
from gflowgr.folders import remove
from gflowgr.quality.cells import Clock, Place, device, fit_scorer, settings_of
from gflowgr.quality.data import DataSet
from gflowgr.quality.grids import METRIC, base_of, nested, read_grid, tried_points, write_grid
from gflowgr.quality.rows import ROWS
from gflowgr.settings import merge


def try_point(
    row_name: str, point: Mapping[str, Any], data_set: DataSet, seed: int, place: Place
) -> dict[str, Any]:
    """Trains a row with one point of its grid and measures it on the validation part.

    The test items leave the log before anything else sees it, so that nothing chosen here can depend on them.
    """
    row = ROWS[row_name]
    whole = data_set.load(place.data)
    folder = replace(whole, log=whole.log.without_last())
    settings = settings_of(row_name, data_set, seed, place)
    settings = merge(merge(settings, {"split": {"held_out": 1}}), nested(point))
    name = "-".join([row_name, *(f"{key}={value}" for key, value in point.items())])
    partial = place.work / data_set.name / "tuning" / f"{name}-{seed}.partial"
    if row.teacher is not None:
        # Recommenders are always fitted without the test items, a cell's as well.
        teacher = place.checkpoint(data_set.name, row.teacher, seed)
        if not teacher.is_file():
            teacher = partial.with_name(f"{row.teacher}-{seed}.safetensors")
        if not teacher.is_file():
            teacher.parent.mkdir(parents=True, exist_ok=True)
            fit_scorer(settings_of(row.teacher, data_set, seed, place), whole, seed).save(teacher)
        settings["collaborative"] = {"path": str(teacher)}
    where = machine(device())
    clock = Clock(f"{data_set.name} {name}")
    resume = any(partial.glob("checkpoint-*/trainer_state.json"))
    if not resume:
        remove(partial)
    fitted = pipeline.fit(folder, settings, partial, resume=resume, callbacks=[clock])
    metrics = fitted.trainer.rank(fitted.parts.validation).summary()
    remove(partial)
    return {
        "settings": dict(point),
        "base": base_of(row_name),
        "seed": seed,
        "validation": {name: round(value, 6) for name, value in metrics.items()},
        "steps": fitted.trainer.state.max_steps,
        "seconds": round(clock.seconds, 1),
        "commit": where["commit"],
        "device": where["cpu"] if where["device"] == "cpu" else where["device"],
    }


def untried(row: str, data_set: str, results: Path) -> list[dict[str, Any]]:
    """The points of a row's grid that have not been tried with the settings that the row has now."""
    known = [point["settings"] for point in tried_points(row, data_set, results)]
    return [point for point in ROWS[row].points() if point not in known]


def add_point(row: str, data_set: str, results: Path, point: Mapping[str, Any]) -> None:
    """Writes a point that was tried beside the others, and says what came out."""
    write_grid(row, data_set, results, [*read_grid(row, data_set, results), point])
    found = point["validation"][METRIC]
    print(f"{data_set} {row} {dict(point['settings'])}: validation {METRIC} {found:.4f}", flush=True)


def tune(row: str, data_set: DataSet, seed: int, place: Place) -> None:
    """Tries every point of a row's grid that has not been tried, and writes each as it comes."""
    for point in untried(row, data_set.name, place.results):
        add_point(row, data_set.name, place.results, try_point(row, point, data_set, seed, place))
