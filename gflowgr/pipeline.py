"""The steps behind the command line as Python calls: prepare, tokenize, train, evaluate, recommend, trie."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch

from gflowgr.data import InteractionLog, k_core, read_log
from gflowgr.folders import (
    INTERACTIONS,
    ITEMS,
    SEMANTIC_IDS,
    TRIE,
    DataFolder,
    Items,
    put_in_place,
    read_table,
    remove,
    require_free,
    write_text,
    written,
)
from gflowgr.quality.run_users import (
    BY_TEACHER_WEIGHT,
    METRICS,
    SETTINGS,
    TEACHER_WEIGHT,
    save_run_users,
)
from gflowgr.semantic_ids import (
    SemanticIds,
    count_collisions,
    embed_sentences,
    embed_text,
    quantise,
    resolve_collisions,
)
from gflowgr.trie import PrefixTrie

if TYPE_CHECKING:
    import pandas

    from gflowgr.adaptive import WeightSchedule
    from gflowgr.assembly import Plan
    from gflowgr.backbones import GenerativeRecommender
    from gflowgr.collaborative import CollaborativeModel, Recommender
    from gflowgr.config import GFlowGRConfig
    from gflowgr.data import Examples, Split
    from gflowgr.metrics import Metrics
    from gflowgr.trainer import GFlowGRTrainer

CHECKPOINT = "checkpoint"
COLLABORATIVE = "collaborative.safetensors"
LOG = "log.json"
RANKING = "ranking.json"
DATA_DIGEST = "data.sha256"

# Settings of a trainer that neither trains nor saves, so that nothing of what that needs has to be there.
_ONLY_RANKING = {
    "objective": "sft",
    "flows": "exact",
    "num_trajectories": 1,
    "rollout_share": 0.0,
    "rollout_beyond": 0,
    "rollout_reuse": 0,
    "reward_candidates": 0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
}

PathLike: TypeAlias = "str | os.PathLike[str]"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` kept of a log."""

    users: int
    items: int
    interactions: int
    dropped_interactions: int
    items_without_title: int


def prepare(
    log: PathLike | pandas.DataFrame,
    output: PathLike,
    *,
    items: PathLike | pandas.DataFrame | None = None,
    user: str = "user_id",
    item: str = "item_id",
    timestamp: str = "timestamp",
    rating: str | None = None,
    behaviour: str | None = None,
    behaviour_values: Mapping[Any, float] | None = None,
    title: str = "title",
    text: Sequence[str] = (),
    k: int = 5,
    overwrite: bool = False,
) -> Prepared:
    """Reads a log of interactions, keeps its k-core, and writes a data folder.

    Args:
        log: a .csv, .tsv or .parquet file or a DataFrame; `user`, `item`, `timestamp`, `rating`, `behaviour`
            and `behaviour_values` as for `gflowgr.data.read_log`.
        output: the folder to make.
        items: a table with a row an item: a column named as `item`, one named as `title`, and those of
            `text`.
        title: the column of titles.
        text: the columns whose words describe an item, put together in that order; by default the title.
        k: users and items with fewer interactions are dropped.
        overwrite: whether a folder that is there may be replaced.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `read_log` and `k_core`; a column of the items is
            missing, an item is there twice, or `output` is in the way.
    """
    require_free(output, overwrite, INTERACTIONS)
    whole = read_log(
        log,
        user=user,
        item=item,
        timestamp=timestamp,
        rating=rating,
        behaviour=behaviour,
        behaviour_values=behaviour_values,
    )
    kept = k_core(whole, k)
    table = _read_items(items, kept, item, title, text)
    with written(output) as folder:
        folder.mkdir()
        kept.save(folder / INTERACTIONS)
        table.save(folder / ITEMS)
    untitled = sum(shown == str(item_id) for shown, item_id in zip(table.titles, table.ids, strict=True))
    return Prepared(kept.num_users, kept.num_items, len(kept), len(whole) - len(kept), untitled)


def _read_items(
    items: PathLike | pandas.DataFrame | None, log: InteractionLog, item: str, title: str, text: Sequence[str]
) -> Items:
    ids = log.item_ids
    if items is None:
        return Items(ids, [str(item_id) for item_id in ids], [None] * len(ids))
    frame = read_table(items, [item, title, *text])
    frame = frame.set_index(frame[item].astype(str))
    if frame.index.has_duplicates:
        raise ValueError(
            f"items: the item {frame.index[frame.index.duplicated()][0]!r} has more than one row"
        )
    frame = frame.reindex([str(item_id) for item_id in ids])
    if frame[item].isna().all():
        raise ValueError(f"items: no row for any item of the log, whose first is {str(ids[0])!r}")
    texts = [_joined(row) for row in frame[list(text) or [title]].itertuples(index=False)]
    titles = [_joined([name]) or str(item_id) for name, item_id in zip(frame[title], ids, strict=True)]
    return Items(ids, titles, texts)


def _joined(cells: Sequence[Any]) -> str | None:
    words = [str(cell).strip() for cell in cells if cell is not None and cell == cell and str(cell).strip()]
    return " ".join(words) or None


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize` made: `codebook_sizes` by level, and how many items shared their codes at first.

    `source` is "codes", "embeddings", "sentences", "text" or "interactions", what the codes come from.
    """

    source: str
    items: int
    codebook_sizes: tuple[int, ...]
    vocab_size: int
    nodes: int
    colliding_items: int
    largest_collision: int


def tokenize(
    data: PathLike,
    *,
    codes: PathLike | None = None,
    embeddings: PathLike | np.ndarray | None = None,
    sentences: str | None = None,
    rows: Literal["item-id", "order"] = "item-id",
    dimensions: int = 64,
    levels: int = 3,
    codebook_size: int = 256,
    collisions: Literal["extra-level", "multiplicity"] = "extra-level",
    first_token: int = 3,
    seed: int = 0,
    overwrite: bool = False,
) -> Tokenized:
    """Gives the items of a data folder semantic IDs and writes them and their trie there.

    The codes are ready-made (`codes`), or come by residual quantisation from embeddings: given ones
    (`embeddings`), those of a sentence-transformers model (`sentences`), or TF-IDF and SVD of the texts.
    Where no item has a text they are an ALS's factors of the interactions, without the last two of each user,
    which "leave-one-out" holds out; for a division by time give embeddings or codes that know nothing held
    out.

    Args:
        data: the folder.
        codes: a .npy file of integers (items, levels), -1 at the tail of shorter rows.
        embeddings: a .npy file or an array of numbers (items, dimensions).
        sentences: name or folder of a model.
        rows: what a row of `codes` or `embeddings` is: the item of that id, which needs ids that are whole
            numbers from 0, or the item at that place in the folder's list of items.
        dimensions: of the text's SVD or the factors.
        levels: codes an item, before collisions are resolved.
        codebook_size: codes a level.
        collisions: what becomes of items with equal codes: one more level tells them apart, or they share.
        first_token: the first token that is a code; a pretrained model's vocabulary size for such a model.
        seed: of SVD and k-means.
        overwrite: whether semantic IDs that are there may be replaced.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `gflowgr.semantic_ids`; more than one source of codes; no
            text for `sentences`, or neither text nor enough interactions; semantic IDs are in the way.
    """
    folder = DataFolder.load(data)
    if folder.semantic_ids is not None and not overwrite:
        raise ValueError(f"{folder.path} has semantic IDs already; allow to overwrite them")
    given = {"codes": codes, "embeddings": embeddings, "sentences": sentences}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        raise ValueError(f"needs one source of codes, got {' and '.join(chosen)}")
    if codes is not None:
        raw = SemanticIds.from_npy(codes).codes.numpy()
        raw = raw[_wanted_rows(folder, os.fspath(codes), rows, len(raw))]
        source = "codes"
    else:
        points, source = _embeddings(folder, embeddings, sentences, rows, dimensions, seed)
        raw = quantise(points, levels=levels, codes=codebook_size, seed=seed)
    found = count_collisions(raw)
    resolved = resolve_collisions(raw, collisions) if found.colliding else raw
    longer = resolved.shape[1] > raw.shape[1]
    semantic_ids = SemanticIds(resolved, first_token=first_token, extra_level=longer)
    trie = semantic_ids.trie()
    semantic_ids.save(folder.path / SEMANTIC_IDS)
    trie.save(folder.path / TRIE)
    return Tokenized(
        source,
        semantic_ids.num_items,
        semantic_ids.codebook_sizes,
        semantic_ids.vocab_size,
        trie.num_nodes,
        found.colliding,
        found.largest_group,
    )


def _embeddings(
    folder: DataFolder,
    embeddings: PathLike | np.ndarray | None,
    sentences: str | None,
    rows: str,
    dimensions: int,
    seed: int,
) -> tuple[np.ndarray, str]:
    """A row for each item, and what it comes from."""
    if embeddings is not None:
        points, source = _read_array(embeddings)
        return points[_wanted_rows(folder, source, rows, len(points))], "embeddings"
    texts = folder.items.texts
    wordless = all(text is None for text in texts)
    if sentences is not None:
        if wordless:
            raise ValueError(f"{folder.path} has no text of its items for sentences: prepare it with items")
        return embed_sentences(texts, sentences), "sentences"
    if not wordless:
        return embed_text(texts, dimensions, seed), "text"
    try:
        return embed_interactions(folder.log, dimensions, seed), "interactions"
    except ValueError as error:
        raise ValueError(
            f"{folder.path} has no text of its items, and its interactions give no codes ({error}): prepare "
            "it with items, or give codes or embeddings"
        ) from error


def embed_interactions(log: InteractionLog, dimensions: int = 64, seed: int = 0) -> np.ndarray:
    """Embeds items by who took them: directions of an ALS's factors, float32 (num_items, `dimensions`).

    It is fitted to the training part of "leave-one-out" alone: semantic IDs must not know what is held out.
    Items without an interaction there have rows of zeros.
    """
    from gflowgr.collaborative import ALS
    from gflowgr.data import split

    sequences = split(log, max_future=0).sequences
    factors = ALS.fit(sequences, log.num_items, factors=dimensions, seed=seed, progress=False).item_factors
    return torch.nn.functional.normalize(factors).numpy()


def _read_array(embeddings: PathLike | np.ndarray) -> tuple[np.ndarray, str]:
    if isinstance(embeddings, np.ndarray):
        return embeddings, "embeddings"
    source = os.fspath(embeddings)
    try:
        array = np.load(source, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{source}: not a readable .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2:
        raise ValueError(f"{source}: needs one array of shape (items, dimensions)")
    return array, source


def _wanted_rows(folder: DataFolder, source: str, rows: str, count: int) -> np.ndarray:
    """The rows of a file that are the folder's items, in their order."""
    ids = folder.log.item_ids
    if rows == "order":
        if count != len(ids):
            raise ValueError(
                f"{source} has {count} rows, needs {len(ids)}, one for each item of {folder.path / ITEMS}"
            )
        return np.arange(count)
    if rows != "item-id":
        raise ValueError(f'rows needs to be "item-id" or "order", got {rows!r}')
    if ids.dtype.kind not in "iu":
        raise ValueError(
            f"{source}: a row for each item id needs ids that are whole numbers, got {str(ids[0])!r}; "
            f'rows="order" takes them in the order of {ITEMS}'
        )
    outside = (ids < 0) | (ids >= count)
    if outside.any():
        raise ValueError(
            f"{source}: item {ids[outside][0]} has no row, there are {count} ({outside.sum()} such items)"
        )
    return ids


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What `train` made, beside the files.

    Attributes:
        path: the run's folder.
        recommender: the trained model, with the weights that were best on validation by default.
        validation: metrics of the validation part, ranked as the settings say: by the model alone, or by it
            and its teacher.
        test: the same of the test part.
        teacher_weight: that the teacher had in both, 0 where the model ranked alone.
        by_teacher_weight: NDCG of the validation part by the teacher's weight, as "0.5", where that chose it
            among `gflowgr.ensemble.WEIGHTS`.
        history: the trainer's log, an entry a logged step.
        seconds: of training alone, evaluations in between included.
        collaborative_seconds: of fitting the collaborative recommender, 0 where none was fitted.
    """

    path: Path
    recommender: GenerativeRecommender
    validation: Metrics
    test: Metrics
    teacher_weight: float
    by_teacher_weight: dict[str, float] | None
    history: list[dict[str, float]]
    seconds: float
    collaborative_seconds: float


def train(
    data: PathLike,
    output: PathLike,
    settings: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Any] = (),
) -> TrainedRun:
    """Trains a recommender on a data folder and writes a run's folder.

    The run grows in `<output>.partial` and gets its name once it is whole. After a kill or an error `resume`
    goes on from the last checkpoint in there; settings and data other than those it began with are refused.
    Before the first checkpoint it begins anew with the teacher in there, and only what the teacher was fitted
    with has to be the same. An error before there is a teacher or a checkpoint leaves nothing.

    Under `torchrun` or `accelerate launch` the first process fits the teacher and writes the folder, which
    all have to see; the others wait for it.

    Args:
        data: a folder that `prepare` and `tokenize` made.
        output: the folder to make: checkpoint, config.yaml, log.json, metrics.json, users.npz, items.parquet;
            ranking.json, where the validation part chose the teacher's weight;
            and, where the sampler adapts or replays, its weights in each step (schedule.json) and their
            figure (schedule.svg).
        settings: sections as in `gflowgr.assembly.Plan`; nothing for the defaults.
        resume: whether to go on with a run that was interrupted.
        overwrite: whether a run that is there, whole or interrupted, may be replaced.
        callbacks: of transformers' trainer, whose own printing they replace where there are any.

    Raises:
        FileNotFoundError, TypeError, ValueError: settings or data that cannot serve; nothing to resume.
        FloatingPointError: a loss that is not finite.
    """
    output = Path(output)
    require_free(output, overwrite, SETTINGS)
    settings = {**(settings or {}), "data": str(Path(data).resolve())}
    if Path(data).resolve().is_relative_to(output.resolve()):
        raise ValueError(f"output {output} holds the data folder {data}, needs another place")
    _check_settings(settings)
    folder = DataFolder.load(data, tokenized=True)
    partial = output.with_name(f"{output.name}.partial")
    fitted = fit(folder, settings, partial, resume=resume, overwrite=overwrite, callbacks=callbacks)
    weight, chosen_by = fitted.teacher_weight, None
    if weight is None:
        weight, chosen_by, validation = _weighed(fitted)
    else:
        validation = _ranked(fitted.trainer, fitted.parts.validation, fitted.teacher, weight)
    test = _ranked(fitted.trainer, fitted.parts.test, fitted.teacher, weight)
    run = TrainedRun(
        output,
        fitted.trainer.policy.recommender,
        validation,
        test,
        weight,
        chosen_by,
        fitted.trainer.state.log_history,
        fitted.seconds,
        fitted.collaborative_seconds,
    )
    if fitted.trainer.is_world_process_zero():
        sampler = fitted.trainer.sampler
        if sampler is not None and sampler.mixture is not None:
            _write_schedule(partial, sampler.mixture)
        _finish(partial, run, folder.items, fitted.parts)
    fitted.trainer.accelerator.wait_for_everyone()
    return run


def _write_schedule(partial: Path, schedule: WeightSchedule) -> None:
    from gflowgr.adaptive import SCHEDULE
    from gflowgr.report import chart_svg

    schedule.save(partial / SCHEDULE)
    write_text((partial / SCHEDULE).with_suffix(".svg"), chart_svg(schedule.chart()))


def _check_settings(settings: Mapping[str, Any]) -> None:
    from gflowgr.assembly import Plan

    if Plan.of(settings).split.get("held_out", 2) == 1:
        raise ValueError("split.held_out is 1, which leaves nothing to test on, needs 2")


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained model that nobody has measured yet.

    Attributes:
        trainer: done, with the best weights on validation by default.
        parts: what it was trained on, and what it can be measured on.
        teacher: the collaborative recommender, where one was asked.
        teacher_weight: of the teacher where both rank, None where the validation part chooses it.
        seconds: of training alone, evaluations in between included.
        collaborative_seconds: of fitting the collaborative recommender, 0 where none was fitted.
    """

    trainer: GFlowGRTrainer
    parts: Split
    teacher: CollaborativeModel | None
    teacher_weight: float | None
    seconds: float
    collaborative_seconds: float


def fit(
    folder: DataFolder,
    settings: Mapping[str, Any],
    partial: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Any] = (),
) -> Fitted:
    """Trains a recommender; `partial` holds its checkpoints. Arguments and errors as `train`'s.

    It looks at the training and the validation part alone.
    """
    import transformers

    from gflowgr import collaborative
    from gflowgr.assembly import Plan
    from gflowgr.trainer import GFlowGRTrainer, check_parts, check_rollout_room

    plan = Plan.of(settings)
    assert folder.semantic_ids is not None
    parts = plan.divide(folder.log)
    config = plan.config(partial)
    transformers.set_seed(config.seed)
    recommender = plan.build_model(folder.semantic_ids, config.seed)
    reward, sampler = plan.build_reward(folder.semantic_ids), plan.build_sampler(parts, config)
    rows = plan.training_rows(parts, recommender, config)
    # What cannot be should not show only once there is a teacher, which may take longer than all the rest.
    has_collaborative = plan.collaborative is not None
    check_parts(recommender, config, rows, reward, sampler, has_collaborative=has_collaborative)
    leads = config.process_index == 0
    checkpoint = _decided_by_first(
        leads, lambda: _open_partial(partial, settings, folder.digest(), resume, overwrite)
    )
    try:
        check_rollout_room(config, rows, parts.num_items)
        began = time.perf_counter()
        scorer = _fit_collaborative(plan, parts, config, partial / COLLABORATIVE)
        collaborative_seconds = time.perf_counter() - began
        if isinstance(scorer, collaborative.TRAINED):
            scorer.to(config.device)
        trainer = GFlowGRTrainer(
            recommender,
            config,
            rows,
            parts.validation,
            reward_model=reward,
            sampler=sampler,
            collaborative=plan.share_prefixes(scorer, rows),
            callbacks=list(callbacks),
        )
        if callbacks:
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - began
    except Exception:
        # Where there is nothing to go on from, nothing should be left behind.
        if leads and not _checkpoints(partial):
            _remove_checkpoints(partial)
            if not (partial / COLLABORATIVE).is_file():
                remove(partial)
        raise
    return Fitted(trainer, parts, scorer, plan.teacher_weight, seconds, collaborative_seconds)


def _decided_by_first(leads: bool, decide: Callable[[], Path | None]) -> Path | None:
    """What `decide` gives in the first of several processes, for all of them; or what it raises."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if leads:
        try:
            outcome[0] = decide()
        except (OSError, ValueError) as error:
            outcome[1] = error
    checkpoint, refusal = broadcast_object_list(outcome)
    if refusal is not None:
        raise refusal
    assert checkpoint is None or isinstance(checkpoint, Path)
    return checkpoint


def _open_partial(
    partial: Path, settings: Mapping[str, Any], digest: str, resume: bool, overwrite: bool
) -> Path | None:
    """Makes or checks the folder of a run in progress, and finds the checkpoint to go on from."""
    from gflowgr.settings import read_yaml, to_yaml

    if not resume:
        if overwrite:
            remove(partial)
        if partial.exists():
            raise ValueError(f"{partial} holds an interrupted run; resume it, or allow to overwrite it")
        partial.mkdir(parents=True)
        write_text(partial / SETTINGS, to_yaml(settings))
        write_text(partial / DATA_DIGEST, digest)
        return None
    if not (partial / SETTINGS).is_file():
        raise FileNotFoundError(f"{partial} holds no run to resume")
    checkpoints = _checkpoints(partial)
    before, now = read_yaml(partial / SETTINGS), settings
    if not checkpoints:
        before, now = _behind_teacher(before), _behind_teacher(now)
    changed = [key for key in {*before, *now} if before.get(key) != now.get(key)]
    if changed:
        key = sorted(changed)[0]
        raise ValueError(
            f"{partial} was begun with other settings: {key} was {before.get(key)!r}, is {now.get(key)!r}"
        )
    # A run that was begun before digests were kept has none.
    if (partial / DATA_DIGEST).is_file() and (partial / DATA_DIGEST).read_text(encoding="utf-8") != digest:
        raise ValueError(f"{partial} was begun with other data: {settings['data']} has changed since")
    if not checkpoints:
        _remove_checkpoints(partial)
        write_text(partial / SETTINGS, to_yaml(settings))
        return None
    return checkpoints[-1]


def _behind_teacher(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that the collaborative recommender depends on."""
    seed = (settings.get("training") or {}).get("seed")
    return {
        **{name: settings.get(name) for name in ("data", "split", "collaborative")},
        "training.seed": seed,
    }


def _checkpoints(partial: Path) -> list[Path]:
    """Checkpoints of the trainer, oldest first; one is whole once its state is written, which comes last."""
    found = [path for path in partial.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _remove_checkpoints(partial: Path) -> None:
    """All of them, and those that an error or a kill left half written."""
    for path in partial.glob("checkpoint-*"):
        remove(path)


def _fit_collaborative(
    plan: Plan, parts: Split, config: GFlowGRConfig, path: Path
) -> CollaborativeModel | None:
    """The recommender of a run, which the first process fits and the others wait for."""
    from gflowgr import collaborative

    if plan.collaborative is None:
        # One that earlier settings asked for.
        if config.process_index == 0:
            remove(path)
        return None
    # No barrier: its patience ends after `ddp_timeout`, and a fit may take longer.
    while config.process_index and not path.is_file():
        if not path.parent.is_dir():
            raise RuntimeError(f"the first process gave up before {path} was there")
        time.sleep(0.5)
    if path.is_file():
        return plan.load_collaborative(path, parts, str(path))
    model = plan.build_collaborative(parts, config.seed, config.device)
    assert isinstance(model, collaborative.Recommender)
    model.save(path)
    return model


def _finish(partial: Path, run: TrainedRun, items: Items, parts: Split) -> None:
    run.recommender.save_pretrained(partial / CHECKPOINT)
    items.save(partial / ITEMS)
    write_text(partial / LOG, json.dumps(run.history, indent=1))
    metrics = {
        "validation": run.validation.to_dict(),
        "test": run.test.to_dict(),
        TEACHER_WEIGHT: run.teacher_weight,
        "seconds": {"training": run.seconds, "collaborative": run.collaborative_seconds},
    }
    write_text(partial / METRICS, json.dumps(metrics, indent=1))
    if run.by_teacher_weight is not None:
        chosen = {TEACHER_WEIGHT: run.teacher_weight, BY_TEACHER_WEIGHT: run.by_teacher_weight}
        write_text(partial / RANKING, json.dumps(chosen, indent=1))
    save_run_users(partial, parts, run.validation, run.test)
    _remove_checkpoints(partial)
    remove(partial / DATA_DIGEST)
    put_in_place(partial, run.path)


def evaluate(
    run: PathLike,
    data: PathLike | None = None,
    *,
    part: Literal["validation", "test"] = "test",
    output: PathLike | None = None,
    teacher_weight: float | None = None,
    **training: Any,
) -> Metrics:
    """Ranks the whole catalogue for each user of a part and measures the lists.

    Args:
        run: a folder that `train` made.
        data: the data folder, by default the one it was trained on.
        part: "validation" or "test".
        output: where to write the metrics with their confidence intervals as JSON; by default nowhere.
        teacher_weight: of the recommender that the run learned from, which ranks together with its model (see
            `gflowgr.ensemble`), from 0, the model alone, to 1; by default what the run's settings say, or
            what its validation part chose.
        training: changes of the run's training settings, such as `eval_num_beams` or `exclude_history`.

    Raises:
        FileNotFoundError: no run, no data, or no teacher where it is asked.
        ValueError: the data have other items or another trie than the run, a setting does not exist, or the
            teacher cannot rank together with the model.
    """
    from gflowgr.assembly import Plan
    from gflowgr.backbones import GenerativeRecommender
    from gflowgr.settings import merge, read_yaml
    from gflowgr.trainer import GFlowGRTrainer

    if part not in ("validation", "test"):
        raise ValueError(f'part needs to be "validation" or "test", got {part!r}')
    path = _run_folder(run)
    settings = read_yaml(path / SETTINGS)
    kept: dict[str, Any] = {name: settings[name] for name in ("split", "training") if name in settings}
    plan = Plan.of(merge(kept, {"training": {**training, **_ONLY_RANKING}}))
    folder = DataFolder.load(settings["data"] if data is None else data, tokenized=True)
    if not np.array_equal(Items.load(path / ITEMS).ids.astype(str), folder.log.item_ids.astype(str)):
        raise ValueError(
            f"{folder.path} has other items than {path}, needs the catalogue that it was trained on"
        )
    recommender = GenerativeRecommender.load(path / CHECKPOINT, folder.semantic_ids)
    trainer = GFlowGRTrainer(recommender, plan.config(path), None)
    weight = _teacher_weight_of(path, teacher_weight)
    teacher = _teacher_of(path, trainer.args.device) if weight else None
    metrics = _ranked(trainer, getattr(plan.divide(folder.log), part), teacher, weight)
    if output is not None:
        write_text(output, json.dumps({"part": part, TEACHER_WEIGHT: weight, **metrics.to_dict()}, indent=1))
    return metrics


def _weighed(fitted: Fitted) -> tuple[float, dict[str, float], Metrics]:
    """The teacher's weight that is best on the validation part, NDCG of each, and the metrics of the best."""
    from gflowgr.collaborative import Recommender
    from gflowgr.ensemble import best_weight, by_weight, rank_by_weight

    assert isinstance(fitted.teacher, Recommender)
    recommender, options = fitted.trainer.policy.recommender, _listing(fitted.trainer.args)
    measured = rank_by_weight(recommender, fitted.teacher, fitted.parts.validation, **options)
    best = best_weight(measured)
    return best, by_weight(measured), measured[best]


def _ranked(
    trainer: GFlowGRTrainer, examples: Examples, teacher: CollaborativeModel | None, teacher_weight: float
) -> Metrics:
    if not teacher_weight:
        return trainer.rank(examples)
    from gflowgr.collaborative import Recommender
    from gflowgr.ensemble import rank_together

    assert isinstance(teacher, Recommender)
    recommender = trainer.policy.recommender
    options = _listing(trainer.args)
    return rank_together(recommender, teacher, examples, teacher_weight=teacher_weight, **options)


def _listing(args: GFlowGRConfig) -> dict[str, Any]:
    """How lists are made where they are measured."""
    return {
        "num_items": args.eval_num_items,
        "num_beams": args.eval_num_beams,
        "exclude_history": args.exclude_history,
        "batch_size": args.per_device_eval_batch_size,
    }


@dataclass(frozen=True)
class Recommendation:
    """An item for a user: its own id, its title, and the probability that it comes next.

    Where a teacher ranks, too, it is the weighted geometric mean of both probabilities.
    """

    item_id: str
    title: str
    probability: float


def recommend(
    run: PathLike,
    history: Sequence[Any],
    *,
    num_items: int = 10,
    num_beams: int | None = None,
    exclude_history: bool = True,
    exclude: Sequence[Any] = (),
    teacher_weight: float | None = None,
) -> tuple[list[str], list[Recommendation]]:
    """What a run's model recommends to someone who had these items.

    Args:
        run: a folder that `train` made.
        history: ids, titles or unique parts of titles, oldest first.
        num_items: how many to recommend.
        num_beams: width of the search, by default that of `gflowgr.generation.generate`.
        exclude_history: whether to leave the history's own items out.
        exclude: what else to leave out; ids or titles, as in `history`. Probabilities are over the rest.
        teacher_weight: of the recommender that the run learned from, as for `evaluate`.

    Returns:
        The titles that `history` was understood as, and the recommendations, best first.

    Raises:
        FileNotFoundError: no run, or no teacher where it is asked.
        ValueError: an item that the catalogue lacks, or several fit it; or as `evaluate`.
    """
    from gflowgr.backbones import GenerativeRecommender
    from gflowgr.generation import generate

    path = _run_folder(run)
    items = Items.load(path / ITEMS)
    if not history:
        raise ValueError("history needs at least one item, got none")
    found = items.find(history)
    recommender = GenerativeRecommender.load(path / CHECKPOINT).eval()
    options: dict[str, Any] = {
        "num_items": num_items,
        "num_beams": num_beams,
        "exclude": [items.find(exclude)] if exclude else None,
        "exclude_history": exclude_history,
    }
    weight = _teacher_weight_of(path, teacher_weight)
    if not weight:
        generated = generate(recommender, torch.tensor([found]), **options)
    else:
        from gflowgr.ensemble import generate_together

        generated = generate_together(
            recommender,
            _teacher_of(path, recommender.device),
            torch.tensor([found]),
            teacher_weight=weight,
            **options,
        )
    recommendations = [
        Recommendation(str(items.ids[item]), items.titles[item], math.exp(log_prob))
        for item, log_prob in zip(generated.items[0].tolist(), generated.log_probs[0].tolist(), strict=True)
        if item >= 0
    ]
    return [items.titles[item] for item in found], recommendations


def teacher_weight(run: PathLike) -> float:
    """What weight a run's teacher has where it ranks unless told otherwise, 0 where its model ranks alone.

    Raises:
        FileNotFoundError: no run, or the file is gone that says what its validation part chose.
        ValueError: that file says no weight.
    """
    return _teacher_weight_of(_run_folder(run))


def _teacher_weight_of(run: Path, given: float | None = None) -> float:
    from gflowgr.assembly import teacher_weight_of
    from gflowgr.ensemble import check_teacher_weight
    from gflowgr.settings import read_yaml

    weight = teacher_weight_of(read_yaml(run / SETTINGS)) if given is None else given
    if weight is not None:
        return weight
    path = run / RANKING
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is gone, which says what weight of the teacher is best on validation; give a "
            "teacher_weight"
        )
    try:
        weight = json.loads(path.read_text(encoding="utf-8"))[TEACHER_WEIGHT]
        check_teacher_weight(TEACHER_WEIGHT, weight)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: says no weight of the teacher: {error!r}") from error
    return float(weight)


def _teacher_of(run: Path, device: torch.device) -> Recommender:
    from gflowgr import collaborative

    if not (run / COLLABORATIVE).is_file():
        raise FileNotFoundError(
            f"{run} has no {COLLABORATIVE}, a teacher to rank beside its model; a teacher_weight of 0 needs "
            "none"
        )
    teacher = collaborative.load(run / COLLABORATIVE)
    return teacher.to(device) if isinstance(teacher, collaborative.TRAINED) else teacher


def _run_folder(run: PathLike) -> Path:
    path = Path(run)
    if not (path / CHECKPOINT).is_dir() or not (path / SETTINGS).is_file():
        raise FileNotFoundError(
            f"{path} is no run's folder (it has no {CHECKPOINT}); 'gflowgr train' makes one"
        )
    return path


def build_trie(
    codes: PathLike, output: PathLike, *, first_token: int = 3, overwrite: bool = False
) -> PrefixTrie:
    """Builds the prefix trie of ready-made codes (.npy) and writes it.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `SemanticIds.from_npy`; `output` is in the way.
    """
    require_free(output, overwrite)
    trie = SemanticIds.from_npy(codes, first_token=first_token).trie()
    trie.save(output)
    return trie


@dataclass(frozen=True)
class TrieLevel:
    """The nodes of one depth that are no leaves: how many children they have, and how many have just one."""

    depth: int
    nodes: int
    mean_children: float
    max_children: int
    forced: float


def inspect_trie(trie: PrefixTrie) -> list[TrieLevel]:
    """The shape of a trie, level by level."""
    children = trie.first_child.diff().long()
    levels = []
    for depth in range(trie.max_depth):
        counts = children[trie.level_offsets[depth] : trie.level_offsets[depth + 1]]
        inner = counts[counts > 0]
        levels.append(
            TrieLevel(
                depth,
                len(counts),
                float(inner.float().mean()),
                int(inner.max()),
                float((inner == 1).float().mean()),
            )
        )
    return levels
