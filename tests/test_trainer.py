"""The trainer: learns with every objective on both backbones, resumes, and says why when it stops."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import TrainerCallback

from gflowgr import ops
from gflowgr.config import GFlowGRConfig
from gflowgr.semantic_ids import SemanticIds
from gflowgr.trainer import GFlowGRTrainer

sys.path.insert(0, str(Path(__file__).parent))
import training_fixtures as fixtures

SETTINGS = [
    {"objective": "sft"},
    {"objective": "tb", "sft_weight": 1.0, "flows": "learned", "num_trajectories": 4},
    {"objective": "tb", "flows": "exact", "num_trajectories": 3},
    {"objective": "tb", "flows": "estimated", "num_trajectories": 4},
    {"objective": "vargrad", "num_trajectories": 4},
    {"objective": "db", "flows": "learned", "num_trajectories": 2},
    {"objective": "subtb", "flows": "exact", "num_trajectories": 2},
    {"objective": "flow_matching"},
    {"objective": "flow_matching", "num_trajectories": 4},
    {"objective": "s_dpo", "num_trajectories": 3},
    {"objective": "item_kl", "num_trajectories": 4},
]


@pytest.mark.parametrize("backbone", ["decoder", "t5"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_training_lowers_the_loss(tmp_path, backbone, settings) -> None:
    run = fixtures.trainer(tmp_path, backbone=backbone, max_steps=40, **settings)
    run.train()
    curve = fixtures.losses(run)
    assert len(curve) == 40 and all(map(math.isfinite, curve))
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


@pytest.mark.parametrize("objective", ["sft", "flow_matching", "tb"])
def test_whole_histories_train_too(tmp_path, objective) -> None:
    run = fixtures.trainer(tmp_path, histories=True, max_steps=40, objective=objective)
    run.train()
    curve = fixtures.losses(run)
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


def test_data_seed_and_nothing_else_orders_the_rows(tmp_path) -> None:
    def order(**settings: object) -> list[int]:
        run = fixtures.trainer(
            tmp_path, histories=True, train_sampling_strategy="group_by_length", **settings
        )
        return list(run._get_train_sampler())

    assert order(seed=1, data_seed=5) == order(seed=2, data_seed=5) == order(seed=5)
    assert order(seed=1, data_seed=5) != order(seed=1, data_seed=6)


def test_a_whole_history_costs_what_its_windows_cost(tmp_path) -> None:
    """The same contexts, once in one pass and once a window each, have the same losses."""
    data, _ = fixtures.world()
    cases = (("sft", 0.0), ("flow_matching", 0.0), ("flow_matching", 0.4), ("tb", 0.0), ("tb", 0.4))
    losses = {}
    for objective, future_scale in cases:
        whole = fixtures.trainer(tmp_path, histories=True, objective=objective, future_scale=future_scale)
        single = fixtures.trainer(tmp_path, objective=objective, future_scale=future_scale)
        single.policy.load_state_dict(whole.policy.state_dict())
        device = single.args.device
        histories = {name: value[:4].to(device) for name, value in data.histories.tensors().items()}
        users = data.histories.user[:4]
        windows = torch.isin(data.train.user, users)
        examples = {name: value[windows].to(device) for name, value in data.train.tensors().items()}
        # A truncated history would make a difference.
        assert int((histories["items"] >= 0).sum(1).max()) <= 6
        a = whole.compute_loss(whole.model, histories)
        b = single.compute_loss(single.model, examples)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        losses[objective, future_scale] = a.item()
    for objective in ("flow_matching", "tb"):
        assert abs(losses[objective, 0.4] - losses[objective, 0.0]) > 1e-3


@pytest.mark.parametrize("options", [{"histories": True, "rollout_reuse": 1}, {"rollout_reuse": 0}])
def test_later_items_are_among_the_candidates_and_share_the_reward(tmp_path, options) -> None:
    """Whatever the recommender picks, nothing that an observed item is worth gets lost."""
    candidates = {"objective": "flow_matching", "rollout_share": 0.25, "future_scale": 0.5, **options}
    run = fixtures.trainer(tmp_path, reward_candidates=8, **candidates)
    run.policy.train()
    inputs = run.data_collator([run.train_dataset[i] for i in range(16)])
    contexts, _ = run._contexts({name: value.to(run.args.device) for name, value in inputs.items()})
    rewards = contexts.rewards
    assert rewards.candidates.shape[1] == 8
    term = run.reward_model(rewards).terms["interaction"]
    worth = torch.where(rewards.future >= 0, 0.5 * rewards.future_value, 0.0).sum(1) + rewards.value
    # Nobody in this log meets an item again, so that all that a context is worth has a place.
    torch.testing.assert_close(term.sum(1), worth)
    assert (rewards.future_value > 0).sum(1).max() >= 3


def test_too_few_candidates_for_the_later_items_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="reward_candidates is 5, needs more than the 5 later items"):
        fixtures.trainer(tmp_path, future_scale=0.5, reward_candidates=5, objective="flow_matching")


def test_child_flow_matching_reaches_the_reward_distribution(tmp_path) -> None:
    """P(item | user) is proportional to the reward after training, in total variation over the catalogue."""
    # Twelve trajectories of a pool of 23: all states of the tree are visited sooner or later.
    settings = {"objective": "flow_matching", "num_trajectories": 12, "lr_scheduler_type": "cosine"}
    run = fixtures.trainer(tmp_path, max_steps=300, logging_steps=100, **settings)
    examples = run.train_dataset.select(range(16))
    run.train_dataset = examples
    run.train()
    inputs = {name: value.to(run.args.device) for name, value in examples.tensors().items()}
    contexts, _ = run._contexts(inputs)
    target = run.reward_model(contexts.rewards).log_rewards.softmax(-1)
    recommender = run.policy.recommender.eval()
    every_item = torch.arange(fixtures.NUM_ITEMS, device=target.device).expand(16, -1)
    with torch.no_grad():
        logits = recommender(inputs["history"], every_item).logits
        tokens = recommender.tokens(every_item)
        learned = ops.trie_token_log_probs(logits, tokens, recommender.trie).sum(-1).exp()
    torch.testing.assert_close(learned.sum(-1), torch.ones_like(learned[:, 0]), rtol=0, atol=1e-5)
    assert float((learned - target).abs().sum(-1).mean() / 2) < 0.05


def test_the_policys_own_items_do_not_depend_on_the_rest_of_the_batch(tmp_path) -> None:
    run = fixtures.trainer(tmp_path, objective="tb", num_trajectories=3)
    chosen = torch.arange(12)
    batch = {name: value[chosen].to(run.args.device) for name, value in run.train_dataset.tensors().items()}
    whole = run._policy_items(batch)(4)
    assert len({tuple(row) for row in whole.tolist()}) > 6
    for part in (chosen[8:], chosen[:8].flip(0)):
        some = run._policy_items({name: value[part] for name, value in batch.items()})(4)
        assert torch.equal(some, whole[part])


def test_what_is_logged(tmp_path) -> None:
    run = fixtures.trainer(
        tmp_path, objective="tb", sft_weight=1.0, num_trajectories=4, max_steps=4, report_to="tensorboard"
    )
    run.train()
    entry = next(entry for entry in run.state.log_history if "loss" in entry)
    expected = {"loss", "sft_loss", "gfn_loss", "log_z", "residual", "entropy", "off_history_share", "nll"}
    expected |= {f"reward/{term}" for term in ("interaction", "collaborative", "similarity")}
    expected |= {"time_share/sampler", "time_share/forward", "time_share/loss", "drawn/collaborative"}
    assert expected <= set(entry)
    assert all(math.isfinite(entry[name]) for name in expected)
    shares = [value for name, value in entry.items() if name.startswith("time_share/")]
    assert all(0 <= share <= 1 for share in shares) and sum(shares) <= 1
    assert any(Path(tmp_path).rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS[1],
        SETTINGS[7],
        # Both measure against the policy before training, which the checkpoint's is no longer.
        {"objective": "s_dpo", "num_trajectories": 3, "preference_beta": 1.0},
        {"objective": "grpo", "num_trajectories": 4, "kl_weight": 1.0},
    ],
    ids=["paper", "default", "s_dpo", "grpo"],
)
def test_a_killed_run_resumes_to_the_same_losses(tmp_path, settings) -> None:
    whole = fixtures.trainer(tmp_path / "whole", max_steps=12, **settings)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 12}
    killed = fixtures.trainer(tmp_path / "killed", **options, **settings)
    killed.add_callback(_StopAt(5))
    killed.train()
    resumed = fixtures.trainer(tmp_path / "killed", **options, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-5"))
    assert fixtures.losses(resumed) == pytest.approx(fixtures.losses(whole), rel=1e-5)
    for a, b in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backbone", ["decoder", "t5"])
def test_recomputed_activations_change_no_loss(tmp_path, backbone) -> None:
    curves = []
    known = {setting.name for setting in dataclasses.fields(GFlowGRConfig)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    for recompute in (False, True):
        run = fixtures.trainer(
            tmp_path, backbone=backbone, max_steps=3, **({name: True} if recompute else {})
        )
        run.train()
        curves.append(fixtures.losses(run))
        checkpointed = any(getattr(m, "gradient_checkpointing", False) for m in run.policy.modules())
        assert checkpointed == recompute
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["tb", "s_dpo"])
def test_two_processes_train_like_one_with_twice_the_batch(tmp_path, objective) -> None:
    script = Path(__file__).parent / "distributed_training.py"
    curves = []
    for processes, batch in ((1, 16), (2, 8)):
        output = tmp_path / f"{processes}.json"
        # What `accelerate launch` runs for several GPUs; on CPUs it would want an MPI.
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        done = subprocess.run(
            [*launch, str(script), str(tmp_path / str(processes)), str(batch), str(output), objective],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append(json.loads(output.read_text()))
    assert len(curves[0]) == 6
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_with_its_cause(tmp_path) -> None:
    run = fixtures.trainer(tmp_path, objective="flow_matching")
    broken, parameter = next(iter(run.policy.named_parameters()))
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=rf"step 0.*{broken}"):
        run.train()


def test_a_reward_of_nan_names_its_term(tmp_path) -> None:
    run = fixtures.trainer(tmp_path, objective="tb", num_trajectories=2)
    run.reward_model.terms["interaction"] = lambda context, items: torch.full(items.shape, float("nan"))
    with pytest.raises(ValueError, match=r"'interaction'.*NaN"):
        run.train()


def test_a_checkpoint_of_another_trie_is_refused(tmp_path) -> None:
    run = fixtures.trainer(tmp_path, objective="sft", max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    data, semantic_ids = fixtures.world()
    other = SemanticIds(semantic_ids.codes.flip(0))
    another = GFlowGRTrainer(fixtures.tiny(other), fixtures.config(tmp_path, objective="sft"), data.train)
    with pytest.raises(ValueError, match="another trie"):
        another.policy.load_weights(tmp_path / "saved")


def test_learned_flows_have_their_own_learning_rate(tmp_path) -> None:
    run = fixtures.trainer(tmp_path, objective="tb", flows="learned", flow_learning_rate=0.03)
    run.train()
    head = {id(p) for p in run.policy.flow_head.parameters()}
    groups = run.optimizer.param_groups
    rates = {group["lr"] for group in groups if {id(p) for p in group["params"]} & head}
    assert rates == {0.03}
    assert sum(len(group["params"]) for group in groups) == len(list(run.policy.parameters()))


def test_evaluation_ranks_the_whole_catalogue(tmp_path) -> None:
    run = fixtures.trainer(tmp_path, objective="sft", max_steps=120, learning_rate=2e-2, logging_steps=50)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_ndcg@10"] > before["eval_ndcg@10"] + 0.2
    assert after["eval_nll"] < before["eval_nll"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward_model": None}, "reward_model is None"),
        ({"sampler": None}, "sampler is None"),
        ({"num_items": 7}, "needs the semantic IDs' 24"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, change, message) -> None:
    data, semantic_ids = fixtures.world()
    args = fixtures.config(tmp_path, objective="tb", num_trajectories=2)
    parts = {
        "reward_model": fixtures.rewards(semantic_ids),
        "sampler": fixtures.TrajectorySampler(change.pop("num_items", 24), num_trajectories=2),
        "collaborative": fixtures.Popularity.fit(data.sequences, 24),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        GFlowGRTrainer(fixtures.tiny(semantic_ids), args, data.train, **parts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "fm"}, "objective is 'fm', needs one of"),
        ({"objective": "flow_matching", "flows": "learned"}, "flows is 'learned', needs"),
        ({"objective": "db", "flows": "estimated"}, "flows is 'estimated', needs"),
        ({"objective": "vargrad", "num_trajectories": 1}, "num_trajectories is 1, needs at least 2"),
        ({"gfn_weight": -1.0}, "gfn_weight is -1.0, needs 0 or more"),
        ({"kl_weight": math.nan}, "kl_weight is nan, needs 0 or more"),
        ({"objective": "s_dpo", "num_trajectories": 1}, "num_trajectories is 1, needs at least 2"),
        ({"objective": "item_kl", "num_trajectories": 1}, "num_trajectories is 1, needs at least 2"),
        ({"objective": "grpo", "num_trajectories": 2}, "num_trajectories is 2, needs at least 3"),
        ({"preference_beta": 0.0}, "preference_beta is 0.0, needs a number above 0"),
        ({"objective": "s_dpo", "num_trajectories": 2, "flows": "learned"}, "flows is 'learned', needs"),
    ],
)
def test_settings_that_cannot_work_are_named(tmp_path, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        fixtures.config(tmp_path, **settings)


def test_an_unknown_setting_suggests_the_nearest(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"'num_trajectory', which does not exist; did you mean 'num_trajectories'"
    ):
        GFlowGRConfig.from_mapping({"output_dir": str(tmp_path), "num_trajectory": 3})


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        control.should_training_stop = state.global_step >= self.step
        return control
