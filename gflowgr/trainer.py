"""GFlowNet fine-tuning as a `transformers.Trainer`: draws trajectories, rewards them, and takes the loss."""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl

from gflowgr import generation, ops
from gflowgr.adaptive import SCHEDULE, AdaptiveWeights
from gflowgr.backbones import GenerativeRecommender
from gflowgr.baselines import baseline_diagnostics, baseline_loss
from gflowgr.collaborative import CollaborativeModel
from gflowgr.config import GFlowGRConfig
from gflowgr.data import MAX_FUTURE, Examples, Histories, LikeLengths, collate
from gflowgr.folders import write_text
from gflowgr.metrics import Metrics, ranking_metrics
from gflowgr.objectives import BASELINES, REWARDED, TrajectoryBatch, diagnostics, gfn_loss, sft_loss
from gflowgr.ops._random import random_bits
from gflowgr.reference_policy import ReferencePolicy
from gflowgr.rewards import RewardContext, RewardModel
from gflowgr.rollouts import RolloutPool, best_items, make_room, require_room, roll_out, roll_out_window
from gflowgr.sampling import POLICY, STRATEGIES, TARGET, Draw, TrajectorySampler, policy_seeds

_HEADS = "gflownet_heads.safetensors"
_REFERENCE = "reference.json"
# What a step's random numbers are for, so that another purpose would not share them.
_ROLLOUTS, _POOL = 1, 2


@dataclass(frozen=True)
class ContextBatch:
    """The contexts of a step: C of them, each with its K trajectories.

    Attributes:
        history: (B, H) item ids of windows, or None.
        items: (B, W) item ids of whole histories, or None.
        trajectories: (C, K) item ids, column 0 the observed item.
        rewards: what the reward model reads, C rows; None without a reward model.
    """

    history: Tensor | None
    items: Tensor | None
    trajectories: Tensor
    rewards: RewardContext | None


class PolicyWithRewards(nn.Module):
    """Everything a step has parameters in, behind one forward: DDP and FSDP wrap it as it is.

    Its forward takes a `ContextBatch` and gives the loss and what it was made of. Where the objective
    measures against a reference policy, that is a frozen copy of the recommender as it comes in here.
    """

    def __init__(
        self, recommender: GenerativeRecommender, reward_model: RewardModel | None, args: GFlowGRConfig
    ) -> None:
        super().__init__()
        self.recommender = recommender
        self.reward_model = reward_model
        self.objective, self.flows, self.subtb_lambda = args.objective, args.flows, args.subtb_lambda
        self.preference_beta, self.kl_weight = args.preference_beta, args.kl_weight
        self.sft_weight = 1.0 if args.objective == "sft" else args.sft_weight
        self.gfn_weight = 0.0 if args.objective == "sft" else args.gfn_weight
        learned = args.flows == "learned" and args.objective != "sft"
        self.flow_head = nn.Linear(recommender.config.hidden_size, 1) if learned else None
        if self.flow_head is not None:
            nn.init.zeros_(self.flow_head.weight)
            nn.init.zeros_(self.flow_head.bias)
        measures = args.objective == "s_dpo" or (args.objective == "grpo" and args.kl_weight > 0)
        self.reference = ReferencePolicy(recommender) if measures and self.gfn_weight else None
        self.seconds: dict[str, float] = defaultdict(float)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PolicyWithRewards:
        # `to`, `half` and their like end up here; the reference is no submodule and would stay behind.
        if self.reference is not None:
            self.reference.apply(fn)
        super()._apply(fn, recurse)
        return self

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recomputes the recommender's activations in the backward pass; arguments as transformers'."""
        self.recommender.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        self.recommender.activation_checkpointing_disable()

    # The older names of the same, by which older trainers ask for them.
    gradient_checkpointing_enable = GenerativeRecommender.gradient_checkpointing_enable
    gradient_checkpointing_disable = GenerativeRecommender.gradient_checkpointing_disable

    def forward(self, contexts: ContextBatch) -> dict[str, Any]:
        trie = self.recommender.trie
        with self.clock("forward"):
            tokens = self.recommender.tokens(contexts.trajectories)
            if contexts.items is None:
                policy = self.recommender(contexts.history, contexts.trajectories)
                logits, hidden = policy.logits, policy.hidden
            else:
                policy = self.recommender(items=contexts.items)
                is_target = contexts.items[:, 1:] >= 0
                logits = policy.logits[:, 1:][is_target].unsqueeze(1)
                hidden = policy.hidden[:, 1:][is_target].unsqueeze(1)
        batch = TrajectoryBatch(logits, tokens, trie)
        if self.reference is not None:
            assert contexts.history is not None
            with self.clock("reference"):
                batch.reference_logits = self.reference.logits(contexts.history, contexts.trajectories)
        terms: dict[str, Tensor] = {}
        if self.reward_model is not None and contexts.rewards is not None:
            with self.clock("reward"):
                rewards = self.reward_model(contexts.rewards)
                candidates = contexts.rewards.candidates
                if candidates is None:
                    batch.log_flows = ops.trie_log_flows(rewards.log_rewards, trie)
                else:
                    batch.candidates = self.recommender.tokens(candidates)
                    batch.candidate_log_rewards = rewards.log_rewards
                terms = rewards.terms
            if self.flow_head is not None:
                batch.learned_log_flows = self.flow_head(hidden).squeeze(-1).float()
        with self.clock("loss"):
            sft = sft_loss(batch) if self.sft_weight else None
            gfn = self._objective_loss(batch) if self.gfn_weight else None
            loss = sum(
                weight * part
                for weight, part in ((self.sft_weight, sft), (self.gfn_weight, gfn))
                if part is not None
            )
        return {"loss": loss, "sft_loss": sft, "gfn_loss": gfn, "batch": batch, "terms": terms}

    def _objective_loss(self, batch: TrajectoryBatch) -> Tensor:
        if self.objective in BASELINES:
            return baseline_loss(
                batch, self.objective, preference_beta=self.preference_beta, kl_weight=self.kl_weight
            )
        return gfn_loss(batch, self.objective, self.flows, self.subtb_lambda)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the recommender and, where there are any, the learned flows' and rewards' parameters.

        Of a reference policy only the fingerprint: its weights are those that training began with.
        """
        self.recommender.save_pretrained(folder)
        heads = self._head_state()
        if heads:
            save_file(heads, Path(folder) / _HEADS)
        if self.reference is not None:
            write_text(Path(folder) / _REFERENCE, json.dumps({"fingerprint": self.reference.fingerprint}))

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Takes over what `save_pretrained` wrote, and leaves the reference policy as it is.

        A checkpoint of another catalogue, or one trained against another reference, raises ValueError.
        """
        saved = GenerativeRecommender.load(folder)
        if saved.trie.fingerprint != self.recommender.trie.fingerprint:
            raise ValueError(
                f"checkpoint {os.fspath(folder)!r} was trained on another trie than this catalogue's"
            )
        self._check_reference(Path(folder))
        self.recommender.load_state_dict(saved.state_dict())
        wanted = self._head_state()
        if wanted:
            heads = load_file(Path(folder) / _HEADS)
            if set(heads) != set(wanted):
                raise ValueError(
                    f"checkpoint {os.fspath(folder)!r} has the heads {sorted(heads)}, needs {sorted(wanted)}"
                )
            self.load_state_dict(heads, strict=False)

    def _check_reference(self, folder: Path) -> None:
        if self.reference is None:
            return
        path = folder / _REFERENCE
        found = json.loads(path.read_text())["fingerprint"] if path.is_file() else "none"
        if found != self.reference.fingerprint:
            raise ValueError(
                f"checkpoint {os.fspath(folder)!r} was trained against the reference policy {found}, "
                f"the recommender given here was {self.reference.fingerprint}; "
                "needs the recommender that training began with"
            )

    def _head_state(self) -> dict[str, Tensor]:
        return {
            name: value.detach().cpu().contiguous()
            for name, value in self.state_dict().items()
            if name.startswith(("flow_head.", "reward_model."))
        }


class GFlowGRTrainer(Trainer):
    """Trains a generative recommender with `L = sft_weight * L_SFT + gfn_weight * L_GFN` (arXiv 2506.16114).

    With the objectives "s_dpo" and "grpo" the recommender as it is given here is the reference policy. To
    resume such a run, build the trainer from that same recommender, not from the checkpoint's.

    Args:
        recommender: the policy; trained in place.
        args: the settings.
        train_dataset: `Examples` (one context a row, K trajectories of each), or `Histories` (decoder-only:
            every item of a history is a context with its observed item as the one trajectory, in one pass).
        eval_dataset: `Examples` to rank the whole catalogue for.
        reward_model: needed unless the objective is "sft" or "s_dpo".
        sampler: draws trajectories beside the observed item; needed where `args.num_trajectories` is above 1,
            but for "grpo", whose group is drawn from the policy, each item independently of the others.
        collaborative: gives `scores(histories)` to the sampler and the reward model, where they use them.
        callbacks: of transformers.

    Raises:
        ValueError: settings and parts do not fit each other.
        FloatingPointError: a loss that is not finite, with its cause.
    """

    def __init__(
        self,
        recommender: GenerativeRecommender,
        args: GFlowGRConfig,
        train_dataset: Examples | Histories | None = None,
        eval_dataset: Examples | None = None,
        *,
        reward_model: RewardModel | None = None,
        sampler: TrajectorySampler | None = None,
        collaborative: CollaborativeModel | None = None,
        callbacks: list[Any] | None = None,
    ) -> None:
        has_collaborative = collaborative is not None
        check_parts(
            recommender, args, train_dataset, reward_model, sampler, has_collaborative=has_collaborative
        )
        _check_items("collaborative", collaborative, recommender.semantic_ids.num_items)
        self.reward_model = reward_model
        self.sampler = sampler
        self.collaborative = collaborative
        # Of whole histories; windows say themselves what they know.
        self._later = MAX_FUTURE if reward_model is not None and reward_model.reads_future else 0
        self._pool: RolloutPool | None = None
        self._figures: dict[str, list[float]] = defaultdict(list)
        self._timer = time.perf_counter()
        super().__init__(
            model=PolicyWithRewards(recommender, reward_model, args),
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = False

    @property
    def policy(self) -> PolicyWithRewards:
        """The module under whatever wraps it."""
        unwrapped: PolicyWithRewards = self.accelerator.unwrap_model(self.model)
        return unwrapped

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        with self.policy.clock("sampler"):
            contexts, draw = self._contexts(inputs)
        outputs = model(contexts)
        loss = outputs["loss"]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step}: {self._cause(outputs)}"
            )
        if model.training:
            self._record(outputs, contexts, draw)
        return (loss, outputs) if return_outputs else loss

    def _contexts(self, inputs: dict[str, Tensor]) -> tuple[ContextBatch, Draw | None]:
        """The step's contexts with their trajectories drawn."""
        assert isinstance(self.args, GFlowGRConfig)
        whole, known = "items" in inputs, None
        rolls_out = self.args.rollout_share > 0 or (whole and self.args.rollout_beyond > 0)
        if rolls_out and self.model.training:
            if whole and self.args.rollout_reuse:
                inputs, known = self._from_pool(inputs)
            else:
                inputs = self._partly_rolled_out(inputs)
        single = inputs
        if whole:
            single = _contexts_of_histories(inputs, self.policy.recommender.history_length, self._later)
        scores = self._scores(single["history"]) if known is None else None
        draw = None if whole else self._draw(single, scores)
        if known is None and scores is not None and self.args.candidates:
            ahead = single["target"][:, None]
            if self._later:
                ahead = torch.cat([ahead, single["future"]], 1)
            known = best_items(scores, ahead, self.args.candidates)
        return ContextBatch(
            history=None if whole else inputs["history"],
            items=inputs["items"] if whole else None,
            trajectories=single["target"].unsqueeze(1) if draw is None else draw.items,
            rewards=None if self.reward_model is None else _reward_context(single, scores, known),
        ), draw

    def _partly_rolled_out(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with the recommender going on: with some, which ones is random, from within already."""
        assert self.collaborative is not None
        index = inputs["index"]
        generator = self._generator(index.device, _ROLLOUTS, self.state.global_step)
        chosen = self._chosen_for_rollouts(len(index), generator)
        temperature = self.args.rollout_temperature
        with self.accelerator.autocast():
            if "items" in inputs:
                beyond = self._beyond[index.cpu()].to(index.device)
                room = self._width(inputs) - inputs["items"].shape[1]
                histories = {
                    "items": functional.pad(inputs["items"], (0, room), value=-1),
                    "value": functional.pad(inputs["value"], (0, room)),
                }
                histories = make_room(histories, beyond)
                keep = torch.ones_like(index, dtype=torch.bool).index_fill(0, chosen, False)
                return inputs | roll_out(
                    self.collaborative,
                    histories,
                    generator,
                    temperature,
                    beyond=beyond,
                    keep=keep,
                    epsilon=self.args.rollout_epsilon,
                )
            part = {name: column[chosen] for name, column in inputs.items()}
            part |= roll_out_window(self.collaborative, part, generator, temperature)
        return {name: column.index_copy(0, chosen, part[name]) for name, column in inputs.items()}

    @cached_property
    def _beyond(self) -> Tensor:
        """Items by which the whole history of each index goes on, drawn by the recommender."""
        rows = self.train_dataset
        assert isinstance(rows, Histories)
        beyond = torch.zeros(int(rows.index.max()) + 1, dtype=torch.int64)
        beyond[rows.index] = rows.further(self.args.rollout_beyond)
        return beyond

    def _width(self, inputs: dict[str, Tensor]) -> int:
        """Of whole histories, with the items by which they go on, as far as the rows have room."""
        assert isinstance(self.train_dataset, Histories)
        width = int(inputs["items"].shape[1])
        return max(width, min(width + self.args.rollout_beyond, self.train_dataset.items.shape[1]))

    def _chosen_for_rollouts(self, size: int, generator: torch.Generator) -> Tensor:
        """Which rows of a batch."""
        order = torch.randperm(size, generator=generator, device=generator.device)
        return order[: round(self.args.rollout_share * size)]

    def _from_pool(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor] | None]:
        """The batch with rollouts that were drawn beforehand, and the best items of all contexts."""
        if self._pool is None:
            self._pool = self._filled_pool()
        index, device = inputs["index"].cpu(), inputs["index"].device
        generator = self._generator(torch.device("cpu"), _ROLLOUTS, self.state.global_step)
        copy = torch.randint(self._pool.copies, (len(index),), generator=generator)
        rolled = self._pool.histories(index, copy, self._width(inputs))
        known = self._pool.candidates(index, copy) if self.args.candidates else None
        if known is not None:
            known = known[0].to(device), known[1].to(device)
        return inputs | {name: column.to(device) for name, column in rolled.items()}, known

    def _filled_pool(self) -> RolloutPool:
        rows = self.train_dataset
        assert self.collaborative is not None and isinstance(rows, Histories)
        where = self.args.device if self.args.device.type == "cuda" else rows.items.device
        generator = self._generator(where, _POOL, 0)
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        batches = math.ceil(len(rows) / (self._train_batch_size * self.args.world_size))
        epochs = self.state.max_steps * self.args.gradient_accumulation_steps / batches
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        with (
            tqdm(total=len(rows), desc="Rollouts", unit=" histories", disable=quiet) as bar,
            self.accelerator.autocast(),
        ):
            return RolloutPool(
                self.collaborative,
                rows,
                copies=_rollouts_of_each(self.args, epochs),
                share=self.args.rollout_share,
                candidates=self.args.reward_candidates,
                temperature=self.args.rollout_temperature,
                generator=generator,
                later=self._later,
                beyond=self.args.rollout_beyond,
                epsilon=self.args.rollout_epsilon,
                folder=self.args.output_dir,
                advance=bar.update,
            )

    @torch.no_grad()
    def _scores(self, history: Tensor) -> Tensor | None:
        if self.collaborative is None or (self.sampler is None and self.reward_model is None):
            return None
        with self.accelerator.autocast():
            return self.collaborative.scores(history).to(history.device, torch.float32)

    def _draw(self, inputs: dict[str, Tensor], scores: Tensor | None) -> Draw | None:
        assert isinstance(self.args, GFlowGRConfig)
        if self.args.objective == "grpo":
            return self._group(inputs)
        if self.sampler is None:
            return None
        return self.sampler.draw(
            step=self.state.global_step,
            total_steps=max(self.state.max_steps, 1),
            index=inputs["index"],
            target=inputs["target"],
            history=inputs["history"],
            future=inputs["future"],
            scores=scores,
            policy_items=self._policy_items(inputs),
        )

    def _group(self, inputs: dict[str, Tensor]) -> Draw:
        """GRPO's group: independent draws, which may repeat and may be the observed item.

        Only so is its reward the policy's. The sampler's items are distinct and never the observed one, which
        would hide from the policy each time that it is right.
        """
        assert isinstance(self.args, GFlowGRConfig)
        drawn = self._policy_items(inputs)(self.args.num_trajectories - 1)
        strategy = torch.full((len(drawn), self.args.num_trajectories), POLICY, dtype=torch.int8)
        strategy[:, 0] = TARGET
        items = torch.cat([inputs["target"].unsqueeze(1), drawn], 1)
        return Draw(items, strategy.to(items.device))

    def _policy_items(self, inputs: dict[str, Tensor]) -> Callable[[int], Tensor]:
        """The model's own items, independent draws by a seed of this step and each example."""
        # One seed for a whole batch would give the same draws to the same place on every process.
        seeds = policy_seeds(self.args.seed, self.state.global_step, inputs["index"])

        def draw(count: int) -> Tensor:
            return generation.sample(self.policy.recommender, inputs["history"], count, seeds=seeds).items

        return draw

    def _generator(self, device: torch.device, stream: int, step: int) -> torch.Generator:
        """Random numbers of a step and this process, for one purpose."""
        # A CPU's generator reads the lower half of a seed only, so all that matters has to be mixed into it.
        places = (step, stream, self.args.process_index)
        word = random_bits(torch.tensor(self.args.seed), *places)
        return torch.Generator(device).manual_seed(int(word))

    def _record(self, outputs: dict[str, Any], contexts: ContextBatch, draw: Draw | None) -> None:
        """Keeps this step's figures until the next log."""
        for name in ("sft_loss", "gfn_loss"):
            if outputs[name] is not None:
                self._figures[name].append(float(outputs[name].detach()))
        for name, term in outputs["terms"].items():
            of_target = _of_target(term.detach(), contexts)
            self._figures[f"reward/{name}"].append(float(term.detach().mean()))
            self._figures[f"reward/{name}_of_target"].append(float(of_target.mean()))
        if draw is not None:
            for name, share in draw.shares().items():
                self._figures[f"drawn/{name}"].append(share)
            assert contexts.history is not None
            drawn = draw.items[:, 1:]
            seen = (drawn.unsqueeze(-1) == contexts.history.unsqueeze(1)).any(-1)
            self._figures["off_history_share"].append(float((~seen).float().mean()))
            self._record_mass_found(outputs["batch"], draw)
            self._adapt_sampler(outputs["batch"], draw)
        if (self.state.global_step + 1) % max(int(self.state.logging_steps), 1) == 0:
            batch = outputs["batch"]
            for name, figure in {
                **diagnostics(batch),
                **baseline_diagnostics(batch, self.policy.objective),
            }.items():
                self._figures[name].append(figure)

    def _record_mass_found(self, batch: TrajectoryBatch, draw: Draw) -> None:
        """The share of the reward that a drawn item holds, by the strategy that drew it."""
        if not batch.rewarded:
            return
        for number, name in enumerate(STRATEGIES):
            chosen = batch.mass_shares[draw.strategy == number]
            if chosen.numel():
                self._figures[f"mass_per_draw/{name}"].append(float(chosen.mean()))

    def _adapt_sampler(self, batch: TrajectoryBatch, draw: Draw) -> None:
        """Tells the sampler what its draws yielded, on all processes together, so that all weigh alike."""
        if self.sampler is None:
            return
        step = self.state.global_step
        if self.sampler.mixture is not None:
            for name, weight in zip(STRATEGIES, self.sampler.weights_at(step), strict=True):
                if weight:
                    self._figures[f"weight/{name}"].append(float(weight))
        if self._adaptive is None:
            return
        totals = draw.totals(
            batch.squared_residuals if self._adaptive.to == "residual" else batch.mass_shares
        )
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(self.args.device), reduction="sum").cpu()
        self.sampler.learn(step, totals)
        for name, total, count in zip(STRATEGIES, *totals.tolist(), strict=True):
            if count:
                self._figures[f"yield/{name}"].append(total / count)

    def _cause(self, outputs: dict[str, Any]) -> str:
        """Why a loss is not finite."""
        broken = [name for name, p in self.policy.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            return f"the parameter {broken[0]} is not finite since the last step (lower the learning rate?)"
        batch: TrajectoryBatch = outputs["batch"]
        if not torch.isfinite(batch.logits).all():
            return "the model's logits are not finite though its parameters are"
        if batch.rewarded and not torch.isfinite(batch.log_z).all():
            return "the rewards of a context sum to 0 or overflow, so log Z is not finite (set a floor)"
        if batch.rewarded and batch.candidates is None and not torch.isfinite(batch.log_rewards).all():
            return "a trajectory's reward is 0, so log R is -inf (set a floor)"
        if not torch.isfinite(batch.log_probs).all():
            return "a trajectory leaves the trie or has probability 0"
        return "the loss overflows"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._figures.items()}}
            elapsed = time.perf_counter() - self._timer
            for name, seconds in self.policy.seconds.items():
                logs[f"time_share/{name}"] = seconds / elapsed
            self._figures.clear()
            self.policy.seconds.clear()
            self._timer = time.perf_counter()
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self._timer = time.perf_counter()
        if not resume_from_checkpoint and self._adaptive is not None:
            self._adaptive.restart()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._pool = None
            self.__dict__.pop("_beyond", None)

    @property
    def _adaptive(self) -> AdaptiveWeights | None:
        mixture = None if self.sampler is None else self.sampler.mixture
        return mixture if isinstance(mixture, AdaptiveWeights) else None

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy == "group_by_length":
            # Of all processes together: they wait for each other, and their step is one process's.
            size = self._train_batch_size * self.args.world_size
            args = self.args
            return LikeLengths(dataset, size, args.seed if args.data_seed is None else args.data_seed)
        sampler: torch.utils.data.Sampler[int] | None = super()._get_train_sampler(train_dataset)
        return sampler

    def rank(self, dataset: Examples) -> Metrics:
        """Ranks the whole catalogue for each example and measures the lists.

        With `exclude_history` the lists hold nothing that a user took before, however long ago.
        """
        recommender, args = self.policy.recommender, self.args
        assert isinstance(args, GFlowGRConfig)
        began = time.perf_counter()
        generated = generation.generate(
            recommender,
            dataset.history,
            num_items=args.eval_num_items,
            num_beams=args.eval_num_beams,
            exclude=dataset.taken() if args.exclude_history else None,
            batch_size=args.per_device_eval_batch_size,
        )
        metrics = ranking_metrics(
            generated.items,
            dataset.target,
            ks=sorted({min(5, args.eval_num_items), args.eval_num_items}),
            num_items=recommender.semantic_ids.num_items,
            codes=recommender.semantic_ids.content_codes,
            target_log_probs=generation.target_log_probs(
                recommender, dataset.history, dataset.target, batch_size=args.per_device_eval_batch_size
            ),
        )
        return replace(metrics, seconds=time.perf_counter() - began)

    def evaluate(
        self,
        eval_dataset: Examples | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset is None, needs Examples here or in the trainer's arguments")
        began = time.perf_counter()
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in self.rank(dataset).summary().items()
        }
        metrics[f"{metric_key_prefix}_users_per_second"] = len(dataset) / (time.perf_counter() - began)
        self._timer += time.perf_counter() - began
        self.log({name: value for name, value in metrics.items() if math.isfinite(value)})
        self.control: TrainerControl = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        head = self.policy.flow_head
        assert isinstance(self.args, GFlowGRConfig)
        if head is not None:
            own = {id(p) for p in head.parameters()}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in own]
            optimizer.add_param_group(
                {"params": list(head.parameters()), "lr": self.args.flow_learning_rate, "weight_decay": 0.0}
            )
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        self.policy.save_pretrained(folder)
        if self._adaptive is not None:
            self._adaptive.save(folder / SCHEDULE)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.policy.load_weights(resume_from_checkpoint)
        if self._adaptive is not None:
            self._adaptive.resume(Path(resume_from_checkpoint) / SCHEDULE)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.policy.load_weights(self.state.best_model_checkpoint)


def _contexts_of_histories(inputs: dict[str, Tensor], history_length: int, later: int) -> dict[str, Tensor]:
    """One row for each item of whole histories but a row's first: what came before it, and it as target.

    Its future are the next `later` items of the row.
    """
    items, value = inputs["items"], inputs["value"]
    width = items.shape[1]
    position = torch.arange(1, width, device=items.device).unsqueeze(1)
    slot = torch.arange(min(history_length, width - 1), device=items.device)
    length = position.clamp(max=history_length)
    source = (position - length + slot).clamp(max=width - 1)
    windows = torch.where(slot < length, items[:, source], -1)
    rows = items[:, 1:] >= 0
    after = position + 1 + torch.arange(later, device=items.device)
    return {
        "history": windows[rows],
        "target": items[:, 1:][rows],
        "value": value[:, 1:][rows],
        "future": functional.pad(items, (0, later), value=-1)[:, after][rows],
        "future_value": functional.pad(value, (0, later))[:, after][rows],
    }


def _of_target(term: Tensor, contexts: ContextBatch) -> Tensor:
    """A reward term of the observed items, (C,)."""
    target = contexts.trajectories[:, :1]
    candidates = None if contexts.rewards is None else contexts.rewards.candidates
    if candidates is None:
        return term.gather(1, target)[:, 0]
    return torch.where(candidates == target, term, 0.0).sum(1)


def _reward_context(
    inputs: dict[str, Tensor], scores: Tensor | None, known: tuple[Tensor, Tensor] | None
) -> RewardContext:
    candidates, scores = (None, scores) if known is None else known
    return RewardContext(
        history=inputs["history"],
        target=inputs["target"],
        value=inputs["value"],
        future=inputs["future"],
        future_value=inputs["future_value"],
        scores=scores,
        candidates=candidates,
    )


def _rollouts_of_each(args: GFlowGRConfig, epochs: float) -> int:
    """Rollouts of each history in a process's pool."""
    # How often a process, which sees its share of the rows, sees one of them in the whole run.
    uses = epochs / args.world_size
    # One from within and one that keeps all, where both are wanted.
    fewest = 2 if 0 < args.rollout_share < 1 else 1
    return max(fewest, round(uses / args.rollout_reuse))


def check_rollout_room(
    args: GFlowGRConfig, train_dataset: Examples | Histories | None, num_items: int
) -> None:
    """Raises OSError if the pool of rollouts that training will fill has no room in the output folder."""
    rolls_out = args.rollout_share > 0 or args.rollout_beyond > 0
    if not isinstance(train_dataset, Histories) or not rolls_out or not args.rollout_reuse:
        return
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        batches = math.ceil(len(train_dataset) / (args.train_batch_size * args.world_size))
        epochs = args.max_steps * args.gradient_accumulation_steps / batches
    require_room(
        train_dataset,
        # Each process has a pool of its own.
        copies=_rollouts_of_each(args, epochs) * args.world_size,
        candidates=min(args.reward_candidates, num_items),
        beyond=args.rollout_beyond,
        folder=args.output_dir,
    )


def check_parts(
    recommender: GenerativeRecommender,
    args: GFlowGRConfig,
    train_dataset: Examples | Histories | None,
    reward_model: RewardModel | None,
    sampler: TrajectorySampler | None,
    *,
    has_collaborative: bool,
) -> None:
    """Raises ValueError for parts that do not fit each other, whichever the collaborative recommender."""
    num_items = recommender.semantic_ids.num_items
    if args.objective in REWARDED and args.gfn_weight and reward_model is None:
        raise ValueError(f"reward_model is None, needs a RewardModel for objective {args.objective!r}")
    if reward_model is not None and reward_model.reads_future:
        later = train_dataset.future.shape[1] if isinstance(train_dataset, Examples) else MAX_FUTURE
        if 0 < args.candidates <= later:
            raise ValueError(
                f"reward_candidates is {args.candidates}, needs more than the {later} later items that are "
                "rewarded beside the target, or 0 for the whole catalogue"
            )
    learned = reward_model is not None and next(reward_model.parameters(), None) is not None
    if args.objective in BASELINES and learned:
        raise ValueError(
            f"reward_model has parameters to learn, needs none for objective {args.objective!r} (fusion "
            "'mixture' or 'sum')"
        )
    whole = isinstance(train_dataset, Histories)
    if whole and recommender.is_encoder_decoder:
        raise ValueError("train_dataset is Histories, needs Examples for an encoder-decoder model")
    if whole and args.num_trajectories > 1:
        raise ValueError(f"num_trajectories is {args.num_trajectories}, needs 1 with Histories")
    if args.objective == "grpo" and sampler is not None:
        raise ValueError(
            "sampler is a TrajectorySampler, needs to be None for objective 'grpo', which draws its group "
            "from the policy"
        )
    if not whole and args.num_trajectories > 1 and sampler is None and args.objective != "grpo":
        raise ValueError(
            f"sampler is None, needs a TrajectorySampler for {args.num_trajectories} trajectories"
        )
    if sampler is not None and sampler.num_trajectories != args.num_trajectories:
        raise ValueError(
            f"sampler draws {sampler.num_trajectories} trajectories, "
            f"needs num_trajectories={args.num_trajectories}"
        )
    for name in ("rollout_share", "rollout_beyond", "candidates"):
        counts = whole or name != "rollout_beyond"
        if getattr(args, name) and counts and not has_collaborative:
            raise ValueError(f"collaborative is None, needs a recommender for {name}={getattr(args, name)}")
    if sampler is not None and isinstance(sampler.mixture, AdaptiveWeights) and reward_model is None:
        raise ValueError("reward_model is None, needs a RewardModel for a sampler that adapts to yields")
    for name, part in (("sampler", sampler), ("reward_model", reward_model)):
        _check_items(name, part, num_items)


def _check_items(name: str, part: Any, num_items: int) -> None:
    if part is not None and part.num_items != num_items:
        raise ValueError(f"{name} is for {part.num_items} items, needs the semantic IDs' {num_items}")
