"""Runs of the baselines: each improves what it should, against the policy that training began with."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor

from gflowgr import generation
from gflowgr.backbones import GenerativeRecommender, add_lora
from gflowgr.rewards import InteractionReward, RewardModel, SimilarityReward
from gflowgr.sampling import POLICY, STRATEGIES
from gflowgr.trainer import GFlowGRTrainer

sys.path.insert(0, str(Path(__file__).parent))
import training_fixtures as fixtures

MEASURED = [
    {"objective": "s_dpo", "num_trajectories": 3, "preference_beta": 1.0},
    {"objective": "grpo", "num_trajectories": 5, "kl_weight": 0.1},
]


def logged(run: GFlowGRTrainer, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def inputs_of(run: GFlowGRTrainer, examples: int = 32) -> dict[str, Tensor]:
    assert run.train_dataset is not None
    return {
        name: value[:examples].to(run.args.device)
        for name, value in run.train_dataset.tensors().items()
        if isinstance(value, Tensor)
    }


def item_log_probs(recommender: GenerativeRecommender, history: Tensor) -> Tensor:
    """log P_F of all items, (C, N), in evaluation mode."""
    return generation.score_all(recommender, history)


def supervised(tmp_path: Path, steps: int = 30) -> GenerativeRecommender:
    """A start that knows something, so that its own draws differ from random ones."""
    run = fixtures.trainer(tmp_path / "sft", objective="sft", max_steps=steps)
    run.train()
    return run.policy.recommender


@pytest.mark.parametrize("backbone", ["decoder", "t5"])
def test_s_dpo_raises_the_margin(tmp_path: Path, backbone: str) -> None:
    run = fixtures.trainer(
        tmp_path, backbone=backbone, sampler_options={"strategies": "random"}, max_steps=60, **MEASURED[0]
    )
    history, target = inputs_of(run)["history"], inputs_of(run)["target"]
    before = item_log_probs(run.policy.recommender, history)
    run.train()
    gained = item_log_probs(run.policy.recommender, history) - before
    of_target = gained.gather(1, target.unsqueeze(1)).squeeze(1)
    assert float((of_target - gained.mean(1)).mean()) > 0.7
    margins = logged(run, "preference_margin")
    # Over seeds, backbones and ways to form batches, sums of ten were 7 to 36.
    assert margins[0] == pytest.approx(0, abs=1e-4) and sum(margins[-10:]) > 6
    assert sum(logged(run, "preference_accuracy")[-10:]) > 6.5
    assert run.reward_model is None


def sum_of_rule_and_similarity(semantic_ids) -> RewardModel:  # type: ignore[no-untyped-def]
    return RewardModel(
        {"interaction": InteractionReward(), "similarity": SimilarityReward(semantic_ids.codes)},
        num_items=fixtures.NUM_ITEMS,
        fusion="sum",
    )


def grpo(tmp_path: Path, kl_weight: float) -> GFlowGRTrainer:
    data, semantic_ids = fixtures.world()
    args = fixtures.config(
        tmp_path, objective="grpo", num_trajectories=9, kl_weight=kl_weight, max_steps=60, learning_rate=5e-3
    )
    return GFlowGRTrainer(
        supervised(tmp_path), args, data.train, reward_model=sum_of_rule_and_similarity(semantic_ids)
    )


def expected_reward(run: GFlowGRTrainer) -> float:
    """Of an item that the policy draws, by enumeration."""
    inputs = inputs_of(run, 64)
    contexts, _ = run._contexts(inputs)
    assert run.reward_model is not None and contexts.rewards is not None
    rewards = run.reward_model(contexts.rewards).log_rewards.exp()
    return float((item_log_probs(run.policy.recommender, inputs["history"]).exp() * rewards).sum(-1).mean())


def test_grpo_raises_the_reward_of_what_the_policy_draws(tmp_path: Path) -> None:
    run = grpo(tmp_path, kl_weight=0.0)
    assert run.policy.reference is None
    before = expected_reward(run)
    run.train()
    assert expected_reward(run) > 1.2 * before
    rewards = logged(run, "group_reward")
    assert sum(rewards[-10:]) > 1.2 * sum(rewards[:10])
    assert not logged(run, "kl_to_reference")
    assert set(logged(run, "drawn/policy")) == {1.0}


def test_grpos_penalty_holds_the_policy_at_its_start(tmp_path: Path) -> None:
    held, loose = grpo(tmp_path / "held", kl_weight=5.0), grpo(tmp_path / "loose", kl_weight=1e-3)
    for run in (held, loose):
        run.train()
        assert logged(run, "kl_to_reference")[0] == pytest.approx(0, abs=1e-5)
    last = [sum(logged(run, "kl_to_reference")[-10:]) for run in (held, loose)]
    assert last[0] < 0.3 * last[1]


def test_grpos_group_are_independent_draws_that_may_be_the_observed_item(tmp_path: Path) -> None:
    run = grpo(tmp_path, kl_weight=0.0)
    inputs = inputs_of(run, 16)
    for name, value in inputs.items():
        inputs[name] = value[:1].expand(1024, *value.shape[1:]).contiguous()
    # One context many times over, told apart by the number that an example's draws are seeded with.
    inputs["index"] = torch.arange(1024, device=inputs["index"].device)
    contexts, _ = run._contexts(inputs)
    drawn = contexts.trajectories[:, 1:]
    assert torch.equal(contexts.trajectories[:, 0], inputs["target"])
    shares = torch.bincount(drawn.flatten(), minlength=fixtures.NUM_ITEMS) / drawn.numel()
    exact = item_log_probs(run.policy.recommender, inputs["history"][:1]).exp()[0].cpu()
    # 8192 draws: five standard errors of any share are below .03.
    assert float((shares.cpu() - exact).abs().max()) < 0.03
    # Two draws of a group are equal as often as independent ones are, whichever two of them.
    equal = (drawn.unsqueeze(1) == drawn.unsqueeze(2)).float().mean(0).cpu()
    by_chance = float(exact.square().sum())
    error = (by_chance * (1 - by_chance) / len(drawn)) ** 0.5
    pairs = equal[torch.triu_indices(8, 8, offset=1).unbind()]
    assert float((pairs - by_chance).abs().max()) < 4.5 * error
    again, _ = run._contexts({name: value[5:9] for name, value in inputs.items()})
    assert torch.equal(again.trajectories, contexts.trajectories[5:9])
    assert float(exact[inputs["target"][0]]) > 0.05 and bool((drawn == inputs["target"][0]).any())


def test_item_kl_comes_closer_to_the_reward(tmp_path: Path) -> None:
    settings = {"objective": "item_kl", "num_trajectories": fixtures.NUM_ITEMS, "max_steps": 120}
    run = fixtures.trainer(tmp_path, sampler_options={"strategies": "random"}, **settings)
    inputs = inputs_of(run)
    contexts, _ = run._contexts(inputs)
    reward = run.reward_model(contexts.rewards).log_rewards.log_softmax(-1)

    def divergence() -> float:
        policy = item_log_probs(run.policy.recommender, inputs["history"])
        return float((reward.exp() * (reward - policy)).sum(-1).mean())

    before = divergence()
    run.train()
    assert divergence() < 0.6 * before


def test_self_play_rejects_what_the_policy_draws(tmp_path: Path) -> None:
    """SPRec: the rejected items are the policy's own, beside the supervised loss."""
    settings = {"objective": "s_dpo", "num_trajectories": 2, "sft_weight": 1.0, "preference_beta": 1.0}
    start = supervised(tmp_path, 10)
    run = fixtures.trainer(
        tmp_path, sampler_options={"strategies": "policy"}, recommender=start, max_steps=40, **settings
    )
    inputs = inputs_of(run)
    _, draw = run._contexts(inputs)
    assert draw is not None
    own = run._policy_items(inputs)(2).tolist()
    by_policy = 0
    for row, target, rejected, strategy in zip(
        own, inputs["target"].tolist(), draw.items[:, 1].tolist(), draw.strategy[:, 1].tolist(), strict=True
    ):
        others = [item for item in row if item != target]
        assert STRATEGIES[strategy] == ("policy" if others else "random")
        if strategy == POLICY:
            assert rejected == others[0]
            by_policy += 1
    assert by_policy > 16
    run.train()
    assert sum(logged(run, "sft_loss")[-5:]) < 0.9 * sum(logged(run, "sft_loss")[:5])


@pytest.mark.parametrize("settings", MEASURED, ids=["s_dpo", "grpo"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_reference_is_the_start_and_nothing_trains_saves_or_drops_it(
    tmp_path: Path, settings: dict[str, object], lora: bool
) -> None:
    _, semantic_ids = fixtures.world()
    start = fixtures.tiny(semantic_ids, dropout=0.3)
    start = add_lora(start, r=2) if lora else start
    names = set(start.state_dict())
    untouched = copy.deepcopy(start).eval()
    run = fixtures.trainer(tmp_path, recommender=start, max_steps=6, **settings)
    policy = run.policy
    assert set(policy.state_dict()) == {f"recommender.{name}" for name in names}
    assert len(list(policy.parameters())) == len(list(start.parameters()))
    run.train()
    assert policy.training and policy.reference is not None
    inputs = inputs_of(run)
    trajectories = inputs["target"].unsqueeze(1)
    logits = policy.reference.logits(inputs["history"], trajectories)
    assert not logits.requires_grad
    expected = untouched.to(logits.device)(inputs["history"], trajectories).logits
    torch.testing.assert_close(logits, expected.detach(), rtol=0, atol=0)
    assert not torch.allclose(logits, start.eval()(inputs["history"], trajectories).logits, atol=1e-3)


def test_the_reference_goes_where_the_module_goes(tmp_path: Path) -> None:
    run = fixtures.trainer(tmp_path, **MEASURED[0])
    inputs = inputs_of(run)
    run.policy.to(torch.float64)
    assert run.policy.reference is not None
    logits = run.policy.reference.logits(inputs["history"], inputs["target"].unsqueeze(1))
    assert logits.dtype == torch.float64


def test_a_run_goes_on_only_against_the_reference_it_began_with(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, **MEASURED[0]}
    fixtures.trainer(tmp_path, max_steps=2, **options).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert not any("reference" in path.name for path in checkpoint.glob("*.safetensors"))
    trained = GenerativeRecommender.load(checkpoint)
    other = fixtures.trainer(tmp_path, recommender=trained, max_steps=4, **options)
    with pytest.raises(ValueError, match="needs the recommender that training began with"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "reference.json").unlink()
    with pytest.raises(ValueError, match="trained against the reference policy none"):
        fixtures.trainer(tmp_path, max_steps=4, **options).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(
    ("settings", "parts", "message"),
    [
        ({"objective": "grpo", "num_trajectories": 3}, {"reward_model": None}, "reward_model is None"),
        (
            {"objective": "grpo", "num_trajectories": 3},
            {"sampler": fixtures.TrajectorySampler(fixtures.NUM_ITEMS, num_trajectories=3)},
            "sampler is a TrajectorySampler, needs to be None for objective 'grpo'",
        ),
        ({"objective": "s_dpo", "num_trajectories": 3}, {"sampler": None}, "sampler is None"),
        (
            {"objective": "item_kl", "num_trajectories": 3},
            {"fusion": "weights"},
            "reward_model has parameters to learn",
        ),
    ],
)
def test_parts_that_cannot_work_are_named(
    tmp_path: Path, settings: dict[str, object], parts: dict[str, object], message: str
) -> None:
    data, semantic_ids = fixtures.world()
    given = {"reward_model": fixtures.rewards(semantic_ids, parts.pop("fusion", "mixture")), **parts}
    with pytest.raises(ValueError, match=message):
        GFlowGRTrainer(
            fixtures.tiny(semantic_ids), fixtures.config(tmp_path, **settings), data.train, **given
        )
