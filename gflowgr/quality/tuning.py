"""Chooses a row's settings on the validation part, on a log from which every test item is gone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gflowgr import pipeline
from gflowgr.bench.table import machine
from gflowgr.folders import remove
from gflowgr.quality.cells import Clock, Place, device, settings_of
from gflowgr.quality.data import DataSet
from gflowgr.quality.grids import base_of, nested
from gflowgr.quality.rows import ROWS
from gflowgr.settings import merge


def try_point(
    row_name: str, point: Mapping[str, Any], data_set: DataSet, seed: int, place: Place
) -> dict[str, Any]:
    """Trains a row with one point of its grid and measures it on the validation part.

    The test items leave the log before anything else sees it, so that nothing chosen here can depend on them.
    """
    row = ROWS[row_name]
    whole = data_set.load(place.data, place.work)
    folder = replace(whole, log=whole.log.without_last())
    settings = settings_of(row_name, data_set, seed, place)
    settings = merge(merge(settings, {"split": {"held_out": 1}}), nested(point))
    name = "-".join([row_name, *(f"{key}={value}" for key, value in point.items())])
    partial = place.work / data_set.name / "tuning" / f"{name}-{seed}.partial"
    if row.teacher is not None:
        # A cell's recommender serves here, too: it is fitted without the test items in any case.
        teacher = place.checkpoint(data_set.name, row.teacher, seed)
        if not teacher.is_file():
            raise FileNotFoundError(f"{row_name} needs {row.teacher} of seed {seed} first")
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
