"""Serving without torch: the trie, its policy and its sampler on NumPy arrays.

python examples/without_torch.py
"""

from __future__ import annotations

import sys

import numpy as np

from gflowgr.numpy_trie import NumpyTrie

LEVELS, CODES, ITEMS, DRAWS = 3, 4, 40, 20_000
VOCABULARY = LEVELS * CODES


def model(prefixes: np.ndarray) -> np.ndarray:
    """Stands for whatever runtime serves the logits: any function of the tokens so far, (R, t) -> (R, V)."""
    phase = (prefixes + 1) @ np.arange(1, prefixes.shape[1] + 1)
    return np.sin(phase[:, None] + 1.7 * np.arange(VOCABULARY)).astype(np.float32) * 2


def recommend(trie: NumpyTrie, rows: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Items drawn from the policy, and their log-probs: one call of the model and one of the core a level."""
    prefixes, nodes = np.zeros((rows, 0), np.int64), np.zeros(rows, np.int64)
    log_probs = np.zeros(rows)
    for _ in range(LEVELS):
        tokens, nodes, step = trie.sample(model(prefixes), nodes, generator)
        prefixes, log_probs = np.c_[prefixes, tokens], log_probs + step
    assert (trie.walk(prefixes)[:, -1] == nodes).all()
    return np.array([trie.items(node)[0] for node in nodes]), log_probs


def brute_force(items: np.ndarray) -> np.ndarray:
    """log P of every item: at each level a softmax over the tokens with which some item goes on."""
    log_probs = np.zeros(len(items))
    for index, item in enumerate(items):
        for level, token in enumerate(item):
            allowed = sorted({int(other[level]) for other in items if (other[:level] == item[:level]).all()})
            logits = model(item[None, :level]).astype(np.float64)[0, allowed]
            log_probs[index] += logits[allowed.index(token)] - np.log(np.exp(logits).sum())
    return log_probs


def main() -> None:
    generator = np.random.default_rng(0)
    codes = generator.choice(CODES**LEVELS, ITEMS, replace=False)
    items = np.stack(np.unravel_index(codes, [CODES] * LEVELS), 1) + CODES * np.arange(LEVELS)
    trie = NumpyTrie(items)
    drawn, log_probs = recommend(trie, DRAWS, generator)

    exact = brute_force(items)
    error = np.abs(log_probs - exact[drawn]).max()
    frequency = np.bincount(drawn, minlength=ITEMS) / DRAWS
    distance = np.abs(frequency - np.exp(exact)).sum() / 2
    print(f"{DRAWS} items drawn from {trie.num_items}: log-probs within {error:.1e} of brute force,")
    print(f"frequencies {distance:.4f} in total variation from the probabilities")
    assert error < 1e-5
    # Twice the distance that this many draws have from their own distribution on average.
    assert distance < 2 * np.sqrt(np.exp(exact) / (2 * np.pi * DRAWS)).sum()
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
