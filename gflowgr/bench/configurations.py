"""The catalogues and batch sizes that are measured, and where a catalogue comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from gflowgr import PrefixTrie


@dataclass(frozen=True)
class Configuration:
    """A catalogue and the sizes of a batch. Without `fanout`, codes are Zipf(.7) at each level.

    `depth` is where decoding rows stand, None for all depths; `beam` is how many of them share a context.
    """

    name: str
    about: str
    items: int
    levels: int
    codes: int
    vocab: int
    decode_rows: int
    beam: int
    contexts: int
    group_size: int
    hidden: int
    dtypes: tuple[str, ...] = ("float32",)
    fanout: tuple[float, ...] | None = None
    shared_tokens: bool = False
    codes_file: str | None = None
    depth: int | None = None
    overrides: str = ""

    @property
    def label(self) -> str:
        return self.name + self.overrides

    def with_rows(self, rows: int) -> Configuration:
        group_size = min(self.group_size, max(1, rows // self.levels))
        contexts = max(1, rows // (self.levels * group_size))
        overrides = f"{self.overrides}:rows={rows}"
        return replace(self, decode_rows=rows, contexts=contexts, group_size=group_size, overrides=overrides)

    def with_vocab(self, vocab: int) -> Configuration:
        return replace(self, vocab=vocab, overrides=f"{self.overrides}:vocab={vocab}")

    def with_hidden(self, hidden: int) -> Configuration:
        return replace(self, hidden=hidden, overrides=f"{self.overrides}:hidden={hidden}")

    def with_items(self, items: int) -> Configuration:
        return replace(self, items=items, overrides=f"{self.overrides}:items={items}")

    def at_depth(self, depth: int) -> Configuration:
        if depth >= self.levels:
            raise ValueError(
                f"depth is {depth}, needs less than the {self.levels} levels of configuration {self.label}"
            )
        return replace(self, depth=depth, overrides=f"{self.overrides}:depth={depth}")

    def with_codes(self, path: str, codes: np.ndarray) -> Configuration:
        return replace(
            self,
            items=codes.shape[0],
            levels=codes.shape[1],
            codes=int(codes.max()) + 1,
            codes_file=path,
            overrides=f"{self.overrides}:codes={Path(path).stem}",
        )


# Fan-outs are the mean children per node, level by level, of public semantic IDs: LETTER's for Beauty (1) and
# Yelp (5), residual k-means of a few thousand items (2). The batches of 2 and 5 are one context's, so that a
# run of everything takes minutes on two cores; --rows gives larger ones.
_LLM_VOCABULARY = 151_936
_BEAUTY, _OFFICE, _YELP = (197.0, 40.0, 1.47, 1.03), (256.0, 8.0, 1.75), (256.0, 62.0, 1.21, 1.004)
_ALL_CONFIGURATIONS = (
    Configuration(
        "1", "TIGER/LETTER, Beauty", 12_101, 4, 256, 1_024, 16 * 20, 20, 256, 4, 128, fanout=_BEAUTY
    ),
    Configuration(
        "2", "MiniOneRec, whole LLM vocabulary", 3_686, 3, 256, _LLM_VOCABULARY, 50, 50, 1, 16, 256,
        ("bfloat16",), _OFFICE,
    ),
    Configuration(
        "3", "OneRec, RecIF", 1_520_000, 3, 8_192, 24_576, 8 * 50, 50, 8, 16, 256,
    ),
    Configuration(
        "4", "YouTube/STATIC at a million items", 1_000_000, 8, 2_048, 2_048, 2 * 70, 70, 2, 16, 256,
        shared_tokens=True,
    ),
    Configuration(
        "5", "TB fine-tuning, whole LLM vocabulary", 20_000, 4, 256, _LLM_VOCABULARY, 16, 16, 1, 16, 256,
        ("bfloat16", "float32"), _YELP,
    ),
    Configuration(
        "5-sliced", "TB fine-tuning, sliced vocabulary", 20_000, 4, 256, 1_024, 16 * 20, 20, 16, 16, 256,
        fanout=_YELP,
    ),
)  # fmt: skip
CONFIGURATIONS = {configuration.name: configuration for configuration in _ALL_CONFIGURATIONS}


def catalogue(configuration: Configuration, seed: int = 0) -> np.ndarray:
    """Token sequences (N, L) int32, -1 padded: the codes, set apart by level unless the levels share tokens.

    Codes of separate levels take the vocabulary's last tokens, as tokens added to a language model do.
    """
    if configuration.codes_file is not None:
        codes = read_codes(configuration.codes_file)
    elif configuration.fanout is not None:
        codes = shaped_codes(configuration.items, configuration.codes, configuration.fanout, seed)
    else:
        codes = zipf_codes(configuration.items, configuration.levels, configuration.codes, seed)
    codes = codes.astype(np.int32, copy=False)
    return np.add(codes, level_offsets(configuration), out=codes, where=codes >= 0, casting="same_kind")


def level_offsets(configuration: Configuration) -> np.ndarray:
    """The first token of each level: int64 (L,)."""
    shared = configuration.shared_tokens
    needed = configuration.codes if shared else configuration.codes * configuration.levels
    if needed > configuration.vocab:
        raise ValueError(
            f"vocab is {configuration.vocab}, needs at least {needed} for the codes of configuration "
            f"{configuration.label}"
        )
    steps = np.arange(configuration.levels)
    return 0 * steps if shared else configuration.vocab - needed + configuration.codes * steps


def read_codes(path: str) -> np.ndarray:
    """Codes (N, L) int64 of an .npy file, -1 padding the tails of shorter rows."""
    try:
        codes = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"codes is {path!r}, needs an .npy file of integers (N, L): {error}") from error
    if not isinstance(codes, np.ndarray) or codes.dtype.kind not in "iu" or codes.ndim != 2 or not codes.size:
        found = f"{codes.dtype} {codes.shape}" if isinstance(codes, np.ndarray) else "an archive"
        raise ValueError(f"codes {path!r} holds {found}, needs integers (N, L)")
    if codes.min() < -1:
        raise ValueError(
            f"codes {path!r} holds {codes.min()}, needs codes from 0 on, and -1 at the tails of rows"
        )
    return codes.astype(np.int64)


def zipf_codes(items: int, levels: int, codes: int, seed: int, exponent: float = 0.7) -> np.ndarray:
    """Codes (N, L) int32, each of probability proportional to rank^-exponent, ranks shuffled by level."""
    rng = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, codes + 1, dtype=np.float64) ** -exponent)
    drawn = np.empty((items, levels), dtype=np.int32)
    # A level at a time: ten million items at once would need gigabytes of float64.
    for level in range(levels):
        ranks = np.searchsorted(cumulative, rng.random(items) * cumulative[-1], side="right")
        drawn[:, level] = rng.permutation(codes)[ranks]
    return drawn


def shaped_codes(items: int, codes: int, fanout: Sequence[float], seed: int) -> np.ndarray:
    """Codes (N, L) whose trie has these mean children per node at each level, skewed; the rest collide."""
    rng = np.random.default_rng(seed)
    prefixes = np.zeros((1, 0), dtype=np.int64)
    for mean in fanout:
        nodes = min(round(mean * len(prefixes)), items, codes * len(prefixes))
        children = _skewed_counts(len(prefixes), nodes, codes, rng)
        parents = np.repeat(np.arange(len(prefixes)), children)
        prefixes = np.column_stack([prefixes[parents], _distinct_codes(children, codes, rng)])
    collisions = prefixes[rng.integers(len(prefixes), size=items - len(prefixes))]
    return rng.permutation(np.concatenate([prefixes, collisions]))


def _skewed_counts(parents: int, total: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """At least 1 and at most `most` for each parent, `total` in sum, log-normally uneven."""
    weights = rng.lognormal(sigma=1.5, size=parents)
    counts = np.ones(parents, dtype=np.int64)
    while (left := total - int(counts.sum())) > 0:
        share = np.where(counts < most, weights, 0.0)
        counts = np.minimum(counts + rng.multinomial(left, share / share.sum()), most)
    return counts


def _distinct_codes(children: np.ndarray, codes: int, rng: np.random.Generator) -> np.ndarray:
    """For each parent that many different codes, the popular ones more often (Gumbel top-k over Zipf(.7))."""
    popularity = -0.7 * np.log(1.0 + rng.permutation(codes))
    chunks = []
    for begin in range(0, len(children), 4096):
        counts = children[begin : begin + 4096]
        keys = popularity + rng.gumbel(size=(len(counts), codes))
        chunks.append(np.argsort(-keys, axis=1)[np.arange(codes) < counts[:, None]])
    return np.concatenate(chunks)


@lru_cache(maxsize=1)
def catalogue_of(configuration: Configuration) -> tuple[np.ndarray, PrefixTrie]:
    """Its sequences and their trie; the last ones are kept, which large catalogues leave memory for."""
    sequences = catalogue(configuration)
    return sequences, PrefixTrie(sequences)
