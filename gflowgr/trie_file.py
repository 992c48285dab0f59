"""Saved tries: a safetensors file whose arrays are mapped into memory, not read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gflowgr.trie_arrays import ARRAYS, Arrays, Levels, fingerprint, levels_of, verify

FORMAT = "gflowgr.PrefixTrie/2"
_DTYPES: dict[str, np.dtype[Any]] = {"I32": np.dtype("<i4"), "U16": np.dtype("<u2")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000
# The narrow numbers last, so that all are aligned.
_ORDER = ("first_child", "item_node", "node_items", "narrow_token")


class Saved(NamedTuple):
    """What a file holds; the arrays are its pages, copied where somebody writes to them."""

    arrays: Arrays
    levels: Levels
    fingerprint: str


def write(path: str | os.PathLike[str], arrays: Arrays, levels: Levels, fingerprint: str) -> None:
    """Writes a file; an older one at `path` stays whole until the new one is.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path is {os.fspath(path)!r}, in a folder that does not exist")
    # A time that any later change of the file comes after: while the file bears it, it holds what was saved.
    written = time.time_ns() - 1_000_000_000
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "levels": json.dumps(levels._asdict()),
            "written": str(written),
        }
    }
    end = 0
    for name in _ORDER:
        begin, end = end, end + arrays[name].nbytes
        dtype = _NAMES[arrays[name].dtype.newbyteorder("<")]
        header[name] = {"dtype": dtype, "shape": [arrays[name].size], "data_offsets": [begin, end]}
    header["__metadata__"]["digest"] = _digest(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in _ORDER:
                file.write(np.ascontiguousarray(arrays[name], dtype=_DTYPES[header[name]["dtype"]]).data)
            file.flush()
            os.fsync(file.fileno())
        os.utime(temporary, ns=(written, written))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | os.PathLike[str], check: bool | None = None) -> Saved:
    """Maps a file that `write` wrote.

    Args:
        path: of the file.
        check: whether to read it all and compare it with its fingerprint; None does unless the file was not
            touched since `write`, by its time of modification.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is foreign, truncated or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path is {os.fspath(path)!r}, which is not a file")
    try:
        return _read(path, check)
    except ValueError as error:
        raise ValueError(f"path {os.fspath(path)!r} is not a saved PrefixTrie: {error}") from error


def _read(path: str | os.PathLike[str], check: bool | None) -> Saved:
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        length = int.from_bytes(file.read(8), "little")
        if status.st_size < 8 or not 2 <= length <= min(status.st_size - 8, _LONGEST_HEADER):
            raise ValueError(f"it has {status.st_size} bytes, which is no safetensors file")
        if length % 8:
            raise ValueError(f"its header has {length} bytes, needs a multiple of 8 for arrays to be aligned")
        entries, metadata = _parsed(file.read(length))
        pages = _mapped(file)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is {metadata.get('format')!r}, needs {FORMAT!r}")
    if set(entries) != set(ARRAYS):
        raise ValueError(f"it holds {sorted(entries)}, needs {sorted(ARRAYS)}")
    spans = {name: _span(name, entry) for name, entry in entries.items()}
    arrays, expected = {}, 8 + length
    for name, (dtype, begin, end) in sorted(spans.items(), key=lambda named: named[1][1]):
        if 8 + length + begin != expected or expected % dtype.itemsize:
            raise ValueError(f"{name} is not where the array before it ends, or not aligned")
        expected += end - begin
        if expected > status.st_size:
            raise ValueError(f"it has {status.st_size} bytes, {name} ends at {expected}: it is truncated")
        arrays[name] = np.asarray(pages[expected - (end - begin) : expected]).view(dtype)
    if expected != status.st_size:
        raise ValueError(f"it has {status.st_size} bytes, needs {expected}")
    claimed = str(metadata.get("fingerprint"))
    levels = _levels(metadata.get("levels"))
    # Arrays of a trusted file are not looked at, so what says where they are has to be as it was written.
    own = {name: value for name, value in metadata.items() if name != "digest"}
    whole = metadata.get("digest") == _digest({"__metadata__": own, **entries})
    untouched = whole and metadata.get("written") == str(status.st_mtime_ns)
    if check or (check is None and not untouched):
        verify(arrays)
        if fingerprint(arrays) != claimed:
            raise ValueError("its arrays do not match its fingerprint, so it is damaged")
        if levels_of(arrays) != levels:
            raise ValueError("its levels are not those of its arrays, so it is damaged")
    return Saved(arrays, levels, claimed)


def _mapped(file: BinaryIO) -> NDArray[np.uint8]:
    try:
        return np.memmap(file, dtype=np.uint8, mode="c")
    except OSError as error:
        # Callers that get by with less memory catch one type, whether memory or address space runs out.
        if error.errno == errno.ENOMEM:
            raise MemoryError(f"path {file.name!r} cannot be mapped: {error}") from error
        raise


def _parsed(text: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        metadata.get("format")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError("its header is not one of safetensors with metadata") from error
    return entries, metadata


def _digest(header: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16).hexdigest()


def _span(name: str, entry: Any) -> tuple[np.dtype[Any], int, int]:
    """An array's dtype, and where its bytes begin and end behind the header."""
    try:
        dtype, (size,), (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        holds = all(type(number) is int for number in (size, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is described by {entry!r}, needs I32 or U16 numbers in a row") from error
    if not holds or begin < 0 or end - begin != size * dtype.itemsize:
        raise ValueError(f"{name} has {size} numbers of {dtype.itemsize} bytes from {begin} to {end}")
    return dtype, begin, end


def _levels(text: Any) -> Levels:
    try:
        fields = json.loads(text)
        levels = Levels(**{name: tuple(values) for name, values in fields.items()})
        depths = {len(levels.offsets) - 2, *map(len, levels[1:])}
        holds = len(depths) == 1 and all(type(number) is int for values in levels for number in values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError("it does not tell its levels") from error
    if not holds or len(levels.offsets) < 3:
        raise ValueError("its levels do not fit together")
    return levels
