"""Adaptive weights in training: what they are told, logged, resumed, replayed and shared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import TrainerCallback

from gflowgr.adaptive import SCHEDULE
from gflowgr.sampling import STRATEGIES, Draw, TrajectorySampler
from gflowgr.scoring import score_all

sys.path.insert(0, str(Path(__file__).parent))
import training_fixtures as fixtures

MIXTURE = {"collaborative": 0.5, "policy": 0.25, "random": 0.25}

ADAPTS = {"objective": "tb", "num_trajectories": 4, "logging_steps": 1}


def adaptive_run(
    folder: Path, adapt: dict[str, Any] | None = None, **settings: Any
) -> fixtures.GFlowGRTrainer:
    options = {"strategies": MIXTURE, "adapt": adapt or {}}
    return fixtures.trainer(folder, sampler_options=options, **{**ADAPTS, **settings})


def rows_of(run: fixtures.GFlowGRTrainer) -> np.ndarray:
    assert run.sampler is not None and run.sampler.mixture is not None
    return np.array(run.sampler.mixture.rows)


@pytest.mark.parametrize("objective", ["tb", "flow_matching"])
@pytest.mark.parametrize("to", ["residual", "mass"])
def test_a_trainers_yields_are_those_of_the_whole_catalogues_scores(tmp_path, objective, to) -> None:
    run = adaptive_run(tmp_path, {"to": to}, objective=objective, learning_rate=0.0, max_steps=3)
    expected = []
    sampler, draw = run.sampler, run.sampler.draw

    def drawing(**inputs: Any) -> Draw:
        drawn = draw(**inputs)
        recommender = run.policy.recommender
        rows = run.train_dataset.index.cpu().tolist()
        chosen = [rows.index(number) for number in inputs["index"].tolist()]
        batch = {
            name: value[chosen].to(run.args.device) for name, value in run.train_dataset.tensors().items()
        }
        sampler.draw = draw
        with torch.no_grad():
            contexts, _ = run._contexts(batch)
            log_p = score_all(recommender, batch["history"]).gather(1, drawn.items)
            log_r = run.reward_model(contexts.rewards).log_rewards.log_softmax(-1).gather(1, drawn.items)
        sampler.draw = drawing
        figure = (log_p - log_r).square() if to == "residual" else log_r.exp()
        expected.append(
            {
                f"yield/{name}": float(figure[:, 1:][drawn.strategy[:, 1:] == number].mean())
                for number, name in enumerate(STRATEGIES)
                if (drawn.strategy[:, 1:] == number).any()
            }
        )
        return drawn

    sampler.draw = drawing
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == len(expected) == 3
    for step, (entry, wanted) in enumerate(zip(logged, expected, strict=True)):
        assert {name for name in entry if name.startswith("yield/")} == set(wanted)
        assert {name: entry[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)
        weights = {name: entry[f"weight/{name}"] for name in MIXTURE}
        by_name = dict(zip(STRATEGIES, sampler.weights_at(step), strict=True))
        assert weights == pytest.approx({name: by_name[name] for name in MIXTURE})
    means = {name: expected[0][f"yield/{name}"] * MIXTURE[name] for name in MIXTURE}
    for name, weight in MIXTURE.items():
        at_one = sampler.weights_at(1)[STRATEGIES.index(name)]
        assert at_one == pytest.approx(0.1 * weight + 0.9 * means[name] / sum(means.values()), rel=1e-3)


def test_a_killed_run_resumes_with_its_weights(tmp_path) -> None:
    whole = adaptive_run(tmp_path / "whole", max_steps=9)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9}
    killed = adaptive_run(tmp_path / "killed", **options)
    killed.add_callback(_StopAt(4))
    killed.train()
    assert len(rows_of(killed)) == 5
    resumed = adaptive_run(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))
    assert len(rows_of(resumed)) == 10
    np.testing.assert_allclose(rows_of(resumed), rows_of(whole), rtol=1e-5)
    assert fixtures.losses(resumed) == pytest.approx(fixtures.losses(whole), rel=1e-5)


def test_a_replayed_run_is_the_adaptive_run(tmp_path) -> None:
    run = adaptive_run(tmp_path, max_steps=6)
    run.train()
    run.sampler.mixture.save(tmp_path / SCHEDULE)
    assert (np.ptp(rows_of(run), axis=0) > 0.02).all()
    options = {"strategies": MIXTURE, "replay": tmp_path / SCHEDULE}
    again = fixtures.trainer(tmp_path, sampler_options=options, **{**ADAPTS, "max_steps": 6})
    again.train()
    fixed = fixtures.trainer(tmp_path, sampler_options={"strategies": MIXTURE}, **{**ADAPTS, "max_steps": 6})
    fixed.train()
    assert fixtures.losses(again) == pytest.approx(fixtures.losses(run), rel=1e-6)
    assert fixtures.losses(fixed) != pytest.approx(fixtures.losses(run), rel=1e-3)
    kept, replayed = (
        [{k: v for k, v in e.items() if k.startswith(("weight/", "drawn/"))} for e in each.state.log_history]
        for each in (run, again)
    )
    assert replayed == kept


def test_accumulated_batches_adapt_once_a_step_and_training_anew_starts_anew(tmp_path) -> None:
    settings = {"gradient_accumulation_steps": 2, "learning_rate": 0.0, "max_steps": 3}
    run = adaptive_run(tmp_path, {"rate": 1.0}, **settings)
    run.train()
    first = rows_of(run)
    assert first.shape == (4, 3)
    # With a rate of 1 only the last step's draws count: 2 batches of 16 contexts with 3 drawn slots.
    assert run.sampler.mixture.counts.sum() == 2 * 16 * 3
    run.train()
    assert np.array_equal(rows_of(run), first)


def test_a_sampler_that_adapts_needs_rewards(tmp_path) -> None:
    data, semantic_ids = fixtures.world()
    args = fixtures.config(tmp_path, objective="sft", num_trajectories=3)
    sampler = TrajectorySampler(24, num_trajectories=3, strategies=MIXTURE, adapt={})
    with pytest.raises(ValueError, match=r"reward_model is None, needs.*adapts"):
        fixtures.GFlowGRTrainer(fixtures.tiny(semantic_ids), args, data.train, sampler=sampler)


@pytest.mark.slow
def test_two_processes_adapt_like_one_with_twice_the_batch(tmp_path) -> None:
    script = Path(__file__).parent / "distributed_training.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for processes, batch in ((1, 16), (2, 8)):
        arguments = [str(tmp_path / str(processes)), str(batch), str(tmp_path / f"{processes}.json"), "adapt"]
        done = subprocess.run(
            [*torchrun, f"--nproc_per_node={processes}", str(script), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("1.json.0", "2.json.0", "2.json.1")
    )
    assert first == second
    assert len(alone["weights"]) == 7
    assert np.array(first["weights"]) == pytest.approx(np.array(alone["weights"]), rel=1e-4)
    assert np.ptp(np.array(alone["weights"]), axis=0).max() > 0.02


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        control.should_training_stop = state.global_step >= self.step
        return control
