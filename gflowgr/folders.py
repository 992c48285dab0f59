"""The folders that the command line reads and writes, and how they come about whole or not at all."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gflowgr.data import DIALECTS, InteractionLog
from gflowgr.semantic_ids import SemanticIds

if TYPE_CHECKING:
    import pandas

INTERACTIONS = "interactions.parquet"
ITEMS = "items.parquet"
SEMANTIC_IDS = "semantic_ids.safetensors"
TRIE = "trie.safetensors"


@dataclass(frozen=True, eq=False)
class Items:
    """What is known of each item of a catalogue, row i that of item i.

    Attributes:
        ids: (N,) the log's own ids.
        titles: what to show people; the id where there is no title.
        texts: what to embed, None where there is nothing.
    """

    ids: np.ndarray
    titles: list[str]
    texts: list[str | None]

    def __len__(self) -> int:
        return len(self.titles)

    def find(self, names: Sequence[Any]) -> list[int]:
        """The items meant by ids, titles or unique parts of titles, in that order of precedence.

        Raises:
            ValueError: nothing fits a name, or several items do.
        """
        by_id = {str(item_id): item for item, item_id in enumerate(self.ids)}
        lowered = [title.lower() for title in self.titles]
        return [self._find_one(str(name).strip(), by_id, lowered) for name in names]

    def _find_one(self, name: str, by_id: dict[str, int], lowered: list[str]) -> int:
        if name in by_id:
            return by_id[name]
        wanted = name.lower()
        same = [item for item, title in enumerate(lowered) if title == wanted]
        found = same or [item for item, title in enumerate(lowered) if wanted and wanted in title]
        if len(found) == 1:
            return found[0]
        if found:
            shown = ", ".join(f"{self.titles[item]!r} (id {self.ids[item]})" for item in found[:5])
            raise ValueError(f"item {name!r} fits {len(found)} titles, give an id: {shown}")
        near = [
            self.titles[lowered.index(title)] for title in difflib.get_close_matches(wanted, lowered, n=3)
        ]
        hint = f"; the nearest titles are {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"item {name!r} is neither an id nor a title of the catalogue{hint}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one parquet file."""
        import pandas

        frame = pandas.DataFrame({"item_id": self.ids, "title": self.titles, "text": self.texts})
        with written(path) as temporary:
            frame.to_parquet(temporary, index=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Items:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else.
        """
        frame = read_table(path, ["item_id", "title", "text"])
        texts = [text if isinstance(text, str) else None for text in frame["text"]]
        return cls(frame["item_id"].to_numpy(), [str(title) for title in frame["title"]], texts)


@dataclass(frozen=True, eq=False)
class DataFolder:
    """A log, its items and, once tokenized, their semantic IDs."""

    path: Path
    log: InteractionLog
    items: Items
    semantic_ids: SemanticIds | None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, tokenized: bool = False) -> DataFolder:
        """Reads a folder that `prepare` wrote.

        Args:
            path: the folder.
            tokenized: whether semantic IDs are needed.

        Raises:
            FileNotFoundError: there is no such folder, or semantic IDs are needed and missing.
            ValueError: a file is damaged, or the files are not of one catalogue.
        """
        path = Path(path)
        if not (path / INTERACTIONS).is_file():
            raise FileNotFoundError(
                f"{path} is no data folder (it has no {INTERACTIONS}); 'gflowgr prepare' makes one"
            )
        log, items = InteractionLog.load(path / INTERACTIONS), Items.load(path / ITEMS)
        if len(items) != log.num_items or not np.array_equal(items.ids.astype(str), log.item_ids.astype(str)):
            raise ValueError(f"{path}: {ITEMS} does not list the items of {INTERACTIONS}")
        if not (path / SEMANTIC_IDS).is_file():
            if tokenized:
                raise FileNotFoundError(f"{path} has no semantic IDs; 'gflowgr tokenize {path}' makes them")
            return cls(path, log, items, None)
        semantic_ids = SemanticIds.load(path / SEMANTIC_IDS)
        if semantic_ids.num_items != log.num_items:
            raise ValueError(
                f"{path}: {SEMANTIC_IDS} holds {semantic_ids.num_items} items, {INTERACTIONS} {log.num_items}"
            )
        return cls(path, log, items, semantic_ids)

    def digest(self) -> str:
        """A digest of the interactions, the item ids and their codes: what a run is of."""
        log, digest = self.log, hashlib.sha256()
        for column in (log.user, log.item, log.timestamp, log.value):
            digest.update(np.ascontiguousarray(column).data)
        digest.update("\0".join(map(str, log.item_ids)).encode())
        if self.semantic_ids is not None:
            digest.update(self.semantic_ids.tokens.numpy().data)
        return digest.hexdigest()


def read_table(
    source: str | os.PathLike[str] | pandas.DataFrame, columns: Sequence[str] = ()
) -> pandas.DataFrame:
    """A DataFrame as it is, or the table of a .csv, .tsv (all text) or .parquet file, which has `columns`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `source` is neither a path nor a DataFrame.
        ValueError: the file cannot be read, ends in something else, or a column is missing.
    """
    import pandas

    if isinstance(source, (str, os.PathLike)):
        where, frame = str(source), _read_file(Path(source))
    elif isinstance(source, pandas.DataFrame):
        where, frame = "the DataFrame", source
    else:
        raise TypeError(f"a table needs to be a path or a DataFrame, got {type(source).__name__}")
    present = [str(column) for column in frame.columns]
    for column in columns:
        if column not in present:
            nearest = difflib.get_close_matches(column, present, n=1)
            hint = f", the nearest is {nearest[0]!r}" if nearest else ""
            raise ValueError(f"{where}: no column {column!r}{hint}; the columns are {present}")
    return frame


def _read_file(path: Path) -> pandas.DataFrame:
    import pandas
    import pyarrow

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    try:
        if path.suffix == ".parquet":
            return pandas.read_parquet(path)
        if path.suffix in DIALECTS:
            # "NA" and "null" are names like others; what is missing is empty.
            return pandas.read_csv(
                path,
                **DIALECTS[path.suffix],
                dtype=str,
                encoding="utf-8-sig",
                keep_default_na=False,
                na_values=[""],
            )
    except (
        pyarrow.ArrowException,
        pandas.errors.ParserError,
        pandas.errors.EmptyDataError,
        UnicodeError,
    ) as error:
        raise ValueError(f"{path}: not a readable table: {str(error).strip()}") from error
    raise ValueError(f"{path}: a table needs to end in .csv, .tsv or .parquet")


def require_free(path: str | os.PathLike[str], overwrite: bool, mark: str | None = None) -> None:
    """Raises ValueError if something is at `path` that may not be replaced.

    A folder that is replaced goes with all that is in it, so that only one is which holds a file `mark`.
    """
    path = Path(path)
    occupied = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if occupied and not overwrite:
        raise ValueError(f"{path} exists already; choose another place or allow to overwrite it")
    if occupied and path.is_dir() and not (mark and (path / mark).is_file()):
        what = f"no {mark}" if mark else "other files"
        raise ValueError(f"{path} is a folder with {what} in it, which is not overwritten; remove it before")


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path for a file, or for a folder that is made there, which then takes the place of `path`.

    After an error `path` is what it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        put_in_place(temporary, path)
    finally:
        remove(temporary)


def put_in_place(source: Path, target: Path) -> None:
    """Renames `source` to `target`; what was there before goes only after that."""
    if not target.is_dir():
        os.replace(source, target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.replace(target, old)
    os.replace(source, target)
    remove(old)


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file through a temporary name."""
    with written(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
