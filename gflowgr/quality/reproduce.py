"""`gflowgr reproduce`: runs the cells of the table that are missing, each after what it is built on."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, NamedTuple

import torch
import transformers

from gflowgr.config import check_keys
from gflowgr.quality import cells, grids, tuning
from gflowgr.quality.cells import Place
from gflowgr.quality.data import DATA_SETS
from gflowgr.quality.rows import ROWS


class Task(NamedTuple):
    """A cell to run, or a point of a row's grid to try with a seed, as pairs of a setting and its value."""

    data_set: str
    row: str
    seed: int
    point: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.point)
        return f"{self.data_set} {self.row} seed {self.seed}{settings}"


def missing(
    data_sets: Iterable[str], rows: Sequence[str], seeds: Iterable[int], place: Place, *, tune: bool = False
) -> dict[Task, list[Task]]:
    """What has to run, each with what of that it has to wait for.

    A cell runs if its result is missing, or if its checkpoint is and another cell needs that. With `tune` the
    grids of the rows come first, tried with the first seed.

    Raises:
        ValueError: a row or data set that does not exist.
    """
    check_keys(dict.fromkeys(rows), list(ROWS), "rows")
    check_keys(dict.fromkeys(data_sets), list(DATA_SETS), "dataset")
    seeds = list(seeds)
    tasks: dict[Task, list[Task]] = {}

    def add_grid(data_set: str, row: str) -> list[Task]:
        if not tune or not ROWS[row].grid:
            return []
        points = grids.untried(row, data_set, place.results)
        grid = [Task(data_set, row, seeds[0], tuple(point.items())) for point in points]
        for task in grid:
            if task not in tasks:
                before = [add_cell(data_set, other, seeds[0], True) for other in ROWS[row].built_on]
                tasks[task] = [needed for cells in before for needed in cells]
        return grid

    def add_cell(data_set: str, row: str, seed: int, needed: bool) -> list[Task]:
        task = Task(data_set, row, seed)
        if task in tasks:
            return [task]
        is_there = place.result(data_set, row, seed).is_file()
        if is_there and (not needed or place.checkpoint(data_set, row, seed).exists()):
            return []
        before = add_grid(data_set, ROWS[row].like or row)
        for other in ROWS[row].built_on:
            before += add_cell(data_set, other, seed, True)
        tasks[task] = before
        return [task]

    for data_set in data_sets:
        for seed in seeds:
            for row in rows:
                add_cell(data_set, row, seed, False)
    return tasks


def reproduce(
    tasks: dict[Task, list[Task]], place: Place, *, jobs: int = 1, say: Callable[[str], None] = print
) -> None:
    """Runs all tasks, `jobs` at a time, each on its share of the cores.

    A task that fails takes along those that wait for it; the others still run, then the first error is
    raised.
    """
    waiting = dict(tasks)
    done: set[Task] = set()
    failed: set[Task] = set()
    running: dict[Future[dict[str, Any] | None], Task] = {}
    first_error: BaseException | None = None
    threads = max(1, _cores() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_end_with_parent) as pool:
        while waiting or running:
            for task, before in list(waiting.items()):
                if failed.intersection(before):
                    failed.add(task)
                    say(f"{task}: left out, what it needs has failed")
                    del waiting[task]
                elif done.issuperset(before) and len(running) < jobs:
                    del waiting[task]
                    running[pool.submit(_run, task, place, threads)] = task
                    say(f"{task}: begins, {len(waiting)} to go after it")
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task = running.pop(future)
                error = future.exception() or _keep(task, future.result(), place)
                if error is None:
                    done.add(task)
                    continue
                failed.add(task)
                first_error = first_error or error
                say(f"{task}: {type(error).__name__}: {error}")
    if first_error is not None:
        raise first_error


def _keep(task: Task, point: dict[str, Any] | None, place: Place) -> Exception | None:
    """Writes a point that was tried: here, since processes side by side would overwrite each other's."""
    if point is None:
        return None
    try:
        grids.add_point(task.row, task.data_set, place.results, point)
    except Exception as error:
        return error
    found = point["validation"][grids.METRIC]
    print(f"{task}: validation {grids.METRIC} {found:.4f}", flush=True)
    return None


def _end_with_parent() -> None:
    """Ends this process when the one that began it is killed: the same cell may soon be begun again."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _cores() -> int:
    """That this process may use, which can be fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(task: Task, place: Place, threads: int) -> dict[str, Any] | None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data_set = DATA_SETS[task.data_set]
    if task.point:
        return tuning.try_point(task.row, dict(task.point), data_set, task.seed, place)
    cell = cells.run(task.row, data_set, task.seed, place)
    found: Any = {name: cell.test[name] for name in ("recall@10", "ndcg@10")}
    print(
        f"{task}: test Recall@10 {found['recall@10']:.4f}, NDCG@10 {found['ndcg@10']:.4f}, "
        f"{cell.budget['seconds']:.0f} s of steps",
        flush=True,
    )
    return None
