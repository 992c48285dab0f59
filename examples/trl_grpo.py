"""TRL's GRPO: items drawn under the catalogue's trie, and log-probs from the same policy.

Stock TRL draws from the whole vocabulary and normalises over it. Here `rollout_func` draws by `trie_sample`,
the one overridden method scores by `trie_token_log_probs`. Advantages, clipping and KL stay TRL's.

    python examples/trl_grpo.py
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # `rollout_func` is experimental in TRL

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from gflowgr import PrefixTrie, ops

USERS, LEVELS, CODES = 4, 3, 4
ITEMS = torch.cartesian_prod(*[torch.arange(CODES)] * LEVELS)[::2] + CODES * torch.arange(LEVELS)
WORDS = [*(f"code{n}" for n in range(LEVELS * CODES)), *(f"user{n}" for n in range(USERS)), "<pad>", "<eos>"]


class TrieGRPOTrainer(GRPOTrainer):
    trie = PrefixTrie(ITEMS)

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor, None]:
        logits = model(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep + 1).logits[
            :, :-1
        ]
        tokens = input_ids[:, -logits_to_keep:]
        log_probs = ops.trie_token_log_probs(logits, tokens, self.trie)
        root = torch.zeros_like(tokens[:, :1])
        before = torch.cat([root, self.trie.walk(tokens)[:, :-1]], 1)
        policy = ops.trie_log_softmax(logits.detach(), before, self.trie)
        return log_probs, torch.special.entr(policy.exp()).sum(-1), None


@torch.no_grad()
def rollout(prompts: list[str], trainer: TrieGRPOTrainer) -> dict[str, Any]:
    """Draws one item per prompt (TRL repeats each prompt `num_generations` times)."""
    prompt_ids = trainer.processing_class(prompts, return_tensors="pt").input_ids
    ids, nodes, log_probs = prompt_ids, torch.zeros(len(prompts), dtype=torch.int64), []
    for _ in range(LEVELS):
        tokens, nodes, log_prob = ops.trie_sample(trainer.model(ids).logits[:, -1], nodes, trainer.trie)
        ids, log_probs = torch.cat([ids, tokens.unsqueeze(1)], 1), [*log_probs, log_prob]
    drawn = ids[:, -LEVELS:].tolist()
    return {"prompt_ids": prompt_ids.tolist(), "completion_ids": drawn,
            "logprobs": torch.stack(log_probs, 1).tolist()}  # fmt: skip


def likes(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """User n wants items whose first code is n."""
    return [float(f"user{ids[0]}" == prompt) for prompt, ids in zip(prompts, completion_ids, strict=True)]


def main() -> None:
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=2, pad_token_id=WORDS.index("<pad>"))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder, max_steps=40, per_device_train_batch_size=32, num_generations=8, learning_rate=1e-2,
            max_completion_length=LEVELS, logging_steps=1, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        trainer = TrieGRPOTrainer(
            LlamaForCausalLM(config), likes, arguments, processing_class=tokenizer, rollout_func=rollout,
            train_dataset=Dataset.from_dict({"prompt": [f"user{n % USERS}" for n in range(256)]}),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    print(f"mean reward {first:.2f} -> {last:.2f} over {len(rewards)} steps")
    assert first < 0.6 and last > 0.9


if __name__ == "__main__":
    main()
