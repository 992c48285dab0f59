"""Fuzzing of saved tries: bits flipped, bytes cut, moved and spliced, numbers in the header changed.

A changed file has to be refused with a ValueError that names it, or to load as exactly one of the catalogues
that were saved. `python tests/fuzz/files.py --seconds 60 --seed 1`; a finding leaves its file behind.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gflowgr import PrefixTrie

CATALOGUES = (
    [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6]],
    [[0]],
    [[300, 70000], [2, 9], [300, 4]],
    [[7] * 40],
    [[item % 5, item % 7, item] for item in range(60)],
)
EDGES = (0, 1, 2**7, 2**8 - 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def flip(data: bytearray, other: bytes, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, other: bytes, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def remove_slice(data: bytearray, other: bytes, rng: random.Random) -> None:
    begin = rng.randrange(len(data))
    del data[begin : begin + rng.choice((1, 2, 4, 8, 64))]


def insert(data: bytearray, other: bytes, rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))


def splice(data: bytearray, other: bytes, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at:] = other[rng.choice((at, rng.randrange(len(other)))) :]


def repeat_slice(data: bytearray, other: bytes, rng: random.Random) -> None:
    begin, size = rng.randrange(len(data)), rng.choice((4, 8, 64))
    at = rng.randrange(len(data))
    data[at : at + size] = data[begin : begin + size]


def write_number(data: bytearray, other: bytes, rng: random.Random) -> None:
    """An edge case in the place of an aligned binary number."""
    size = rng.choice((4, 8))
    at = rng.randrange(max(1, len(data) // size)) * size
    data[at : at + size] = (rng.choice(EDGES) % 2 ** (8 * size)).to_bytes(size, "little")


def write_decimal(data: bytearray, other: bytes, rng: random.Random) -> None:
    """Another number in the place of one of the header's."""
    numbers = list(re.finditer(rb"\d+", bytes(data)))
    if numbers:
        found = rng.choice(numbers)
        near = int(found[0][:18]) + rng.choice((-1, 1, 4))
        data[found.start() : found.end()] = str(rng.choice((near, *EDGES))).encode()


MUTATIONS: tuple[Callable[[bytearray, bytes, random.Random], None], ...] = (
    flip, cut, remove_slice, insert, splice, repeat_slice, write_number, write_decimal,
)  # fmt: skip


def saved(folder: Path) -> dict[str, bytes]:
    """The files of all catalogues, by the fingerprints of their tries."""
    files = {}
    for number, rows in enumerate(CATALOGUES):
        trie = PrefixTrie(rows)
        trie.save(folder / f"{number}")
        files[trie.fingerprint] = (folder / f"{number}").read_bytes()
    return files


def mutants(files: list[bytes], rng: random.Random) -> Iterator[bytes]:
    while True:
        data = bytearray(rng.choice(files))
        for _ in range(rng.choice((1, 1, 2, 4))):
            if data:
                rng.choice(MUTATIONS)(data, rng.choice(files), rng)
        yield bytes(data)


def finding(path: Path, fingerprints: set[str]) -> str | None:
    """What is wrong with the way in which the file at `path` loads, None where nothing is."""
    try:
        trie = PrefixTrie.load(path)
        # Where loading maps the file only, its content is checked when that is asked for.
        getattr(trie, "verify", lambda: None)()
    except ValueError as error:
        return None if path.name in str(error) else f"refused without the file's name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    # Of the arrays, not what the file says of them.
    trie.__dict__.pop("fingerprint", None)
    return None if trie.fingerprint in fingerprints else "another catalogue than any that was saved"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    end, runs = time.monotonic() + options.seconds, 0
    with tempfile.TemporaryDirectory() as folder:
        files = saved(Path(folder))
        path = Path(folder) / "mutant.safetensors"
        for data in mutants(list(files.values()), random.Random(seed)):
            if time.monotonic() > end:
                break
            path.write_bytes(data)
            wrong = finding(path, set(files))
            if wrong:
                kept = Path(tempfile.gettempdir()) / f"finding-{seed}-{runs}.safetensors"
                kept.write_bytes(data)
                print(f"{kept}: {wrong}", file=sys.stderr)
                return 1
            runs += 1
    print(f"{runs} changed files, seed {seed}: none got through")
    return 0


if __name__ == "__main__":
    sys.exit(main())
