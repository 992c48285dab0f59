"""`transformers.Trainer` with a loss of ours in `compute_loss`: the same curve as the dense mask gives.

python examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from gflowgr import PrefixTrie, ops

LEVELS, CODES, HISTORY = 3, 8, 4
ITEMS = torch.cartesian_prod(*[torch.arange(CODES)] * LEVELS)[::3] + CODES * torch.arange(LEVELS)


class TrieTrainer(Trainer):
    """Fine-tunes on the last item of each sequence under the catalogue's policy."""

    trie = PrefixTrie(ITEMS)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], logits_to_keep=LEVELS + 1)
        log_probs = self.log_probs(outputs.logits[:, :-1], inputs["input_ids"][:, -LEVELS:])
        loss = -log_probs.sum(-1).mean()
        return (loss, outputs) if return_outputs else loss

    def log_probs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        return ops.trie_token_log_probs(logits, tokens, self.trie)


class DenseMaskTrainer(TrieTrainer):
    """The same by what training code does without the op: a mask over the vocabulary for every token."""

    def log_probs(self, logits: Tensor, tokens: Tensor) -> Tensor:
        before = torch.stack([(tokens[:, None, :t] == ITEMS[:, :t]).all(-1) for t in range(LEVELS)], 1)
        allowed = torch.zeros_like(logits)
        for level in range(LEVELS):
            allowed[:, level].index_add_(1, ITEMS[:, level], before[:, level].to(logits.dtype))
        masked = logits.float().masked_fill(allowed == 0, -torch.inf)
        return masked.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def histories(users: int) -> list[dict[str, Tensor]]:
    """Users who walk through the catalogue by a fixed stride, so that the next item can be learned."""
    start, stride = torch.randint(len(ITEMS), (users, 1)), torch.randint(1, 3, (users, 1))
    walked = (start + stride * torch.arange(HISTORY + 1)) % len(ITEMS)
    return [{"input_ids": ITEMS[row].flatten()} for row in walked]


def losses(trainer_class: type[TrieTrainer], folder: str) -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LEVELS * CODES, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    arguments = TrainingArguments(
        folder, max_steps=60, per_device_train_batch_size=32, learning_rate=1e-2, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    trainer = trainer_class(LlamaForCausalLM(config), arguments, train_dataset=histories(512))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours, dense = losses(TrieTrainer, folder), losses(DenseMaskTrainer, folder)
    gap = max(abs(a - b) for a, b in zip(ours, dense, strict=True))
    print(f"loss {ours[0]:.3f} -> {ours[-1]:.3f}; at most {gap:.1e} from the dense mask's")
    assert ours[-1] < 0.7 * ours[0]
    assert gap < 1e-4


if __name__ == "__main__":
    main()
