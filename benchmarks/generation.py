"""Times generation against transformers' own: same model, same inputs, same beams, in turns.

    python benchmarks/generation.py --codes letter.npy --write

Two models: the T5 of TIGER and LETTER (4 + 4 layers, d_model 128), and a Llama-style decoder of 50 M
parameters that reads prompts of 200 tokens. Both are untrained, which changes nothing about the work. The
catalogue is shaped like Amazon Beauty's unless `--codes` names a file.

Before anything is timed, every score is held against a plain forward over the item that it belongs to, and
our lists against those of transformers: no rank of ours may be worse. They may be better, since a beam that
has one item left is done and frees its place. Times are medians of rounds in which all take turns.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessorList

from gflowgr import contexts, decoding, generation, ops
from gflowgr.backbones import GenerativeRecommender, build_decoder, build_t5
from gflowgr.bench import read_codes, shaped_codes
from gflowgr.bench.table import append_rows, machine
from gflowgr.scoring import log_shares
from gflowgr.semantic_ids import SemanticIds

COLUMNS = (
    "date", "commit", "device", "cpu", "torch", "transformers", "gflowgr", "model", "parameters", "users",
    "beams", "input_tokens", "items", "threads", "what", "median_ms", "p20_ms", "p80_ms", "users_per_second",
    "ratio",
)  # fmt: skip
PREFIX, PROCESSOR, OURS = "HF, prefix function", "HF, our processor", "gflowgr"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    name: str
    model: GenerativeRecommender
    history: Tensor
    beams: int

    @property
    def prompt_length(self) -> int:
        return 1 if self.model.is_encoder_decoder else self.inputs["input_ids"].shape[1]

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.model.inputs(self.history)

    def by_transformers(self, processor: bool) -> tuple[Tensor, Tensor]:
        """Tokens (B, k, L) and their scores (B, k)."""
        trie, length = self.model.trie, self.prompt_length
        how: dict[str, Any] = {
            # The full softmax is normalised over the allowed tokens again, or scores would not be log P_F.
            "prefix_allowed_tokens_fn": generation.prefix_allowed_tokens(trie, length),
            "renormalize_logits": True,
        }
        if processor:
            how = {"logits_processor": LogitsProcessorList([generation.TrieLogitsProcessor(trie, length)])}
        output = self.model.transformer.generate(
            **self.inputs,
            num_beams=self.beams,
            num_return_sequences=self.beams,
            max_new_tokens=self.model.semantic_ids.length,
            do_sample=False,
            length_penalty=0.0,
            output_scores=True,
            return_dict_in_generate=True,
            **how,
        )
        tokens = output.sequences[:, length:].unflatten(0, (-1, self.beams))
        return tokens, output.sequences_scores.unflatten(0, (-1, self.beams))

    def by_us(self) -> generation.Generated:
        return generation.generate(
            self.model, self.history, num_items=self.beams, num_beams=self.beams, batch_size=len(self.history)
        )

    def reading(self) -> Any:
        """The encoder, or the prompt, without anything written."""
        transformer = self.model.transformer
        reads = transformer.get_encoder() if self.model.is_encoder_decoder else transformer.base_model
        return reads(**self.inputs)

    def exact(self, tokens: Tensor) -> Tensor:
        """log P_F of token sequences (B, k, L), by one forward without a cache."""
        trie, item_of = self.model.trie, self.model.trie.first_item
        items = self.model.trie.item_order[item_of[trie.walk(tokens)[..., -1]].long()].long()
        policy = self.model(self.history, items)
        return ops.trie_token_log_probs(policy.logits, tokens, trie).sum(-1)


def check(case: Case) -> None:
    """Raises unless all scores are exact and no rank of ours is worse than that of transformers."""
    ours, trie = case.by_us(), case.model.trie
    shares = log_shares(trie)[0].to(ours.log_probs)
    for name, (tokens, scores) in {
        OURS: (case.model.tokens(ours.items), ours.log_probs - shares[ours.items]),
        PREFIX: case.by_transformers(processor=False),
        PROCESSOR: case.by_transformers(processor=True),
    }.items():
        error = float((case.exact(tokens) - scores).abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"{case.name}: a score of {name} is off by {error:.2g}")
        if name == OURS:
            continue
        same = better = 0
        # transformers knows sequences, not items, of which several may have the same one.
        counts = trie.item_count[trie.walk(tokens)[..., -1]]
        for row, mine in enumerate(ours.log_probs.tolist()):
            of_sequences = zip(scores[row].tolist(), counts[row].tolist(), strict=True)
            theirs = [score - math.log(count) for score, count in of_sequences for _ in range(count)]
            for rank, (own, score) in enumerate(zip(mine, sorted(theirs, reverse=True), strict=False)):
                if own < score - TOLERANCE:
                    raise SystemExit(f"{case.name}: {name} finds a better item at rank {rank} of row {row}")
                same += abs(own - score) <= TOLERANCE
                better += own > score + TOLERANCE
        print(f"  {name}: {same} ranks have our score, {better} a lower one, none a higher one")


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds + 1):
        for name in order:
            began = time.perf_counter()
            calls[name]()
            if turn:
                times[name].append((time.perf_counter() - began) * 1e3)
        order.append(order.pop(0))
    return times


@contextmanager
def sections(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the milliseconds of reading, steps and heads in the calls within."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            before, began = sum(spent.values()), time.perf_counter()
            result = function(*args, **options)
            inner = sum(spent.values()) - before
            spent[name] += (time.perf_counter() - began) * 1e3 - inner
            return result

        return call

    with (
        mock.patch.object(contexts, "tree_writer", timed("reading", contexts.tree_writer)),
        mock.patch.object(decoding.TreeWriter, "extend", timed("steps", decoding.TreeWriter.extend)),
        mock.patch.object(decoding, "head_logits", timed("head", decoding.head_logits)),
    ):
        yield


def profile(case: Case, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of our sections in each round."""
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        spent = {"reading": 0.0, "steps": 0.0, "head": 0.0}
        began = time.perf_counter()
        with sections(spent):
            case.by_us()
        spent["policy and search"] = (time.perf_counter() - began) * 1e3 - sum(spent.values())
        for name, milliseconds in spent.items():
            found[f"gflowgr: {name}"].append(milliseconds)
    return found


def measure(case: Case, rounds: int) -> list[dict[str, str]]:
    """Prints the table of a case; its rows."""
    parameters = sum(parameter.numel() for parameter in case.model.parameters())
    setting = {
        "model": case.name,
        "parameters": str(parameters),
        "users": str(len(case.history)),
        "beams": str(case.beams),
        "input_tokens": str(case.inputs["input_ids"].shape[1]),
        "items": str(case.model.semantic_ids.num_items),
        "threads": str(torch.get_num_threads()),
    }
    print(", ".join(f"{value} {name}" for name, value in setting.items()))
    with torch.no_grad():
        check(case)
        alone = "encoder alone" if case.model.is_encoder_decoder else "prompt alone"
        times = in_turns(
            {
                PREFIX: lambda: case.by_transformers(processor=False),
                PROCESSOR: lambda: case.by_transformers(processor=True),
                OURS: case.by_us,
                alone: case.reading,
            },
            rounds,
        )
        times |= profile(case, rounds)
    base, rows = float(np.median(times[PREFIX])), []
    print(f"  {'':<27}{'median ms':>10}{'p20':>9}{'p80':>9}{'users/s':>9}{'x faster':>9}")
    for name, milliseconds in times.items():
        low, middle, high = np.quantile(milliseconds, [0.2, 0.5, 0.8])
        rate, ratio = 1e3 * len(case.history) / middle, base / middle
        print(f"  {name:<27}{middle:>10.1f}{low:>9.1f}{high:>9.1f}{rate:>9.1f}{ratio:>9.2f}")
        figures = {
            "median_ms": middle,
            "p20_ms": low,
            "p80_ms": high,
            "users_per_second": rate,
            "ratio": ratio,
        }
        rows.append(setting | {"what": name} | {key: f"{value:.6g}" for key, value in figures.items()})
    return rows


def histories(num_items: int, users: int, width: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, num_items, (users, width)))


def cases(options: argparse.Namespace) -> Iterator[Case]:
    codes = read_codes(options.codes) if options.codes else shaped_codes(12101, 256, (197, 40, 1.47, 1.03), 0)
    semantic_ids = SemanticIds(codes, 256)
    if "t5" in options.models:
        users = histories(semantic_ids.num_items, options.users, 20)
        yield Case("t5", build_t5(semantic_ids).eval(), users, options.beams)
    if "decoder" in options.models:
        width = 200 // semantic_ids.length
        decoder = build_decoder(
            semantic_ids, layers=12, d_model=512, heads=8, d_ff=2048, history_length=width
        )
        users = histories(semantic_ids.num_items, options.decoder_users, width)
        yield Case("decoder", decoder.eval(), users, options.beams)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("t5", "decoder"), default=["t5", "decoder"])
    parser.add_argument("--users", type=int, default=16, help="of the T5, in one batch")
    parser.add_argument("--decoder-users", type=int, default=2, help="of the decoder, in one batch")
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--codes", help="a .npy file of semantic IDs instead of made ones")
    parser.add_argument("--write", action="store_true", help="append to benchmarks/results/generation.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine(torch.device("cpu")) | {"transformers": transformers.__version__}
    for case in cases(options):
        rows = [where | row for row in measure(case, options.rounds)]
        if options.write:
            table = Path(__file__).parent / "results" / "generation.csv"
            append_rows(table, [{name: row[name] for name in COLUMNS} for row in rows], COLUMNS)


if __name__ == "__main__":
    main()
