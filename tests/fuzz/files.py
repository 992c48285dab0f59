"""Fuzzing of saved tries: bits flipped, bytes cut, moved and spliced, numbers in the header changed.

A changed file has to be refused with a ValueError that names it, or to load as exactly one of the catalogues
that were saved: by default, and when asked to check with the time of modification that `save` gave the file.
`python tests/fuzz/files.py --seconds 60 --seed 1`; a finding leaves its file behind.

`--headers` gives files whose headers alone were changed that time back, and loads them unchecked: what they
load as has to be arrays that the core may walk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gflowgr import PrefixTrie, trie_arrays

CATALOGUES = (
    [[1, 2, 5], [1, 3, -1], [4, -1, -1], [4, 5, 6], [4, 5, 6]],
    [[0]],
    [[300, 70000], [2, 9], [300, 4]],
    [[7] * 40],
    [[item % 5, item % 7, item] for item in range(60)],
    [[item % 3, 65000 + item * 30] for item in range(40)],
)
# Which items of each go again.
REMOVED = {0: [3], 4: [0, 7, 59], 5: [39]}
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
        trie = PrefixTrie(rows).remove(REMOVED.get(number, []))
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


def parts(data: bytes) -> tuple[bytes, bytes]:
    """A saved file's header and its arrays."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def stamp(data: bytes) -> int:
    """The time of modification that `save` gave a file, in nanoseconds."""
    return int(json.loads(parts(data)[0])["__metadata__"]["written"])


def move_boundary(entries: dict[str, Any], rng: random.Random) -> None:
    """The end of one array and the beginning of the next go elsewhere: all sizes stay plausible."""
    names = sorted(set(entries) - {"__metadata__"}, key=lambda name: entries[name]["data_offsets"])
    at = rng.randrange(len(names) - 1)
    before, after = entries[names[at]], entries[names[at + 1]]
    moved = 4 * rng.choice((-8, -2, -1, 1, 2, 8))
    before["data_offsets"][1] += moved
    after["data_offsets"][0] += moved
    for entry in (before, after):
        size = 2 if entry["dtype"] == "U16" else 4
        begin, end = entry["data_offsets"]
        entry["shape"] = [(end - begin) // size]


def change_dtype(entries: dict[str, Any], rng: random.Random) -> None:
    entry = entries[rng.choice(trie_arrays.ARRAYS)]
    size = entry["shape"][0]
    entry["dtype"], entry["shape"] = ("I32", [size // 2]) if entry["dtype"] == "U16" else ("U16", [size * 2])


def change_levels(entries: dict[str, Any], rng: random.Random) -> None:
    levels = json.loads(entries["__metadata__"]["levels"])
    values = rng.choice(list(levels.values()))
    values[rng.randrange(len(values))] = rng.choice((0, 1, 2, 3, 10, 2**31 - 1, -1))
    entries["__metadata__"]["levels"] = json.dumps(levels)


def header_mutants(files: list[bytes], rng: random.Random) -> Iterator[tuple[bytes, int]]:
    """Files whose headers alone were changed, and the times that those were saved at."""
    while True:
        original = rng.choice(files)
        header, arrays = parts(original)
        entries = json.loads(header)
        for _ in range(rng.choice((1, 1, 2))):
            rng.choice((move_boundary, change_dtype, change_levels, lambda entries, rng: None))(entries, rng)
        changed = bytearray(json.dumps(entries).encode())
        if rng.random() < 0.4:
            rng.choice((flip, write_decimal))(changed, header, rng)
        changed += b" " * (-len(changed) % 8)
        yield len(changed).to_bytes(8, "little") + changed + arrays, stamp(original)


def load(path: Path, verify: bool | None) -> PrefixTrie | str | None:
    """What a file loads as; None where it is refused as it should be, else what is wrong."""
    try:
        return PrefixTrie.load(path, verify=verify)
    except ValueError as error:
        return None if path.name in str(error) else f"refused without the file's name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def levels_agree(trie: PrefixTrie, arrays: trie_arrays.Arrays) -> bool:
    levels = trie_arrays.levels_of(arrays)
    ranges = tuple(zip(levels.smallest_token, levels.largest_token, strict=True))
    told = (trie.level_offsets, trie.max_children_at, trie.token_ranges)
    return told == (levels.offsets, levels.most_children, ranges)


def finding(path: Path, fingerprints: set[str], verify: bool | None = None) -> str | None:
    """What is wrong with the way in which the file at `path` loads, None where nothing is."""
    trie = load(path, verify)
    if not isinstance(trie, PrefixTrie):
        return trie
    # Of the arrays, not what the file says of them.
    arrays = trie._arrays()
    found = trie_arrays.fingerprint(arrays)
    if found not in fingerprints or trie.fingerprint != found:
        return "another catalogue than any that was saved"
    return None if levels_agree(trie, arrays) else "levels that are not those of its arrays"


def header_finding(path: Path) -> str | None:
    """What is wrong with what an unchecked file loads as, None where the core may walk it."""
    trie = load(path, None)
    if not isinstance(trie, PrefixTrie):
        return trie
    arrays = trie._arrays()
    try:
        trie_arrays.verify(arrays)
    except ValueError as error:
        return f"arrays that are no trie: {error}"
    return None if levels_agree(trie, arrays) else "levels that are not those of its arrays"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--headers", action="store_true")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    end, runs = time.monotonic() + options.seconds, 0
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        files = saved(Path(folder))
        originals = list(files.values())
        stamps = [stamp(data) for data in originals]
        path = Path(folder) / "mutant.safetensors"
        bodies, headers = mutants(originals, rng), header_mutants(originals, rng)
        while time.monotonic() < end:
            data, written = (
                next(headers) if options.headers or runs % 4 == 0 else (next(bodies), rng.choice(stamps))
            )
            path.write_bytes(data)
            if options.headers:
                os.utime(path, ns=(written, written))
                wrong = header_finding(path)
            else:
                wrong = finding(path, set(files))
                os.utime(path, ns=(written, written))
                wrong = wrong or finding(path, set(files), verify=True)
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
