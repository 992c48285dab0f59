"""Semantic IDs: item texts to embeddings, embeddings to codes, codes to tokens of a model's vocabulary."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from gflowgr.trie import PrefixTrie

PAD, EOS, BOS = 0, 1, 2

_FORMAT = "gflowgr.SemanticIds/1"
_STARTS = 8


def embed_text(texts: Sequence[str | None], dimensions: int = 64, seed: int = 0) -> np.ndarray:
    """Embeds texts by TF-IDF and truncated singular value decomposition (latent semantic analysis).

    The vocabulary is that of `texts`. Rows have length 1; a missing text (None, NaN or nothing but blanks)
    gives a row of zeros.

    Args:
        texts: N strings.
        dimensions: the most columns to return; there are fewer if the vocabulary or N is smaller.
        seed: of the randomised decomposition.

    Returns:
        float32 (N, D).

    Raises:
        ImportError: scikit-learn is missing.
        TypeError: a text is neither a string nor missing.
        ValueError: `dimensions` is below 1, or no text holds a word.
    """
    try:
        from sklearn.decomposition import TruncatedSVD
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.preprocessing import normalize
    except ImportError as error:
        raise ImportError("embed_text needs scikit-learn: pip install 'gflowgr[train]'") from error

    _require_at_least("dimensions", dimensions, 1)
    rows = _as_texts(texts)
    # Words of one letter or digit count, so that "Part 2" and "Part 3" differ.
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        weights = vectorizer.fit_transform(rows)
    except ValueError as error:
        raise ValueError(f"texts needs at least one word, got none in {len(rows)} texts") from error
    if weights.shape[1] == 1:
        # There is nothing to decompose, and scikit-learn insists on two columns.
        return weights.toarray().astype(np.float32)
    decomposition = TruncatedSVD(n_components=min(dimensions, *weights.shape), random_state=seed)
    # Texts that are all alike have no variance, and the explained share of it, unused here, is 0 / 0.
    with np.errstate(invalid="ignore", divide="ignore"):
        embeddings = decomposition.fit_transform(weights)
    return normalize(embeddings).astype(np.float32)


def embed_sentences(
    texts: Sequence[str | None],
    model: str = "sentence-transformers/all-MiniLM-L6-v2",
    *,
    batch_size: int = 64,
    device: str | None = None,
) -> np.ndarray:
    """Embeds texts by a model of the library sentence-transformers.

    Args:
        texts: N strings; a missing one (None, NaN or nothing but blanks) gives a row of zeros.
        model: name or folder of the model.
        batch_size: texts a forward pass.
        device: where to run, by default wherever the library finds best.

    Returns:
        float32 (N, D), rows of length 1.

    Raises:
        ImportError: sentence-transformers is missing.
        TypeError: a text is neither a string nor missing.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "embed_sentences needs sentence-transformers: pip install 'gflowgr[text]'"
        ) from error

    rows = _as_texts(texts)
    encoder = SentenceTransformer(model, device=device)
    encoded = encoder.encode(rows, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=True)
    present = np.array([bool(row) for row in rows])
    return np.where(present[:, None], encoded, 0).astype(np.float32)


def quantise(embeddings: Any, levels: int = 3, codes: int = 256, seed: int = 0) -> np.ndarray:
    """Residual quantisation by k-means (faiss): each level codes what the levels before it left over.

    Each level is chosen greedily, so items close to each other share their first codes; equal ones share all.
    A level has as many codes as asked for, or the largest power of two up to the number of items.

    Args:
        embeddings: (N, D) numbers.
        levels: codes an item.
        codes: size of each codebook, a power of two.
        seed: of the k-means.

    Returns:
        int64 (N, levels), 0 .. codes - 1.

    Raises:
        ImportError: faiss is missing.
        ValueError: no item, no dimension, a value that is not finite, or `levels` or `codes` out of range.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("quantise needs faiss: pip install 'gflowgr[train]'") from error

    _require_at_least("levels", levels, 1)
    _require_at_least("codes", codes, 2)
    if codes & (codes - 1):
        raise ValueError(f"codes needs to be a power of two, got {codes}")
    points = _as_embeddings(embeddings)
    bits = min(codes.bit_length() - 1, max(1, len(points).bit_length() - 1))
    quantizer = faiss.ResidualQuantizer(points.shape[1], levels, bits)
    # A wider beam would trade the closeness of items with a common prefix for a smaller error overall.
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.max_beam_size = 1
    quantizer.cp.seed = seed
    # From one start k-means with few codes often puts two groups together; the best of several seldom does.
    quantizer.cp.nredo = _STARTS
    # Catalogues often have fewer than the 39 points a centroid below which faiss warns at each level.
    quantizer.cp.min_points_per_centroid = 1
    quantizer.train(np.resize(points, (max(len(points), 2**bits), points.shape[1])))
    # Rounding inside a batch depends on the place in it: equal items are coded once, lest they come apart.
    distinct, item = np.unique(points, axis=0, return_inverse=True)
    rows = faiss.unpack_bitstrings(quantizer.compute_codes(distinct), levels, bits)
    return rows[item.reshape(-1)].astype(np.int64)


def resolve_collisions(
    codes: Any, method: Literal["extra-level", "multiplicity"] = "extra-level"
) -> np.ndarray:
    """Decides what becomes of items with equal codes.

    Args:
        codes: (N, L) integers, -1 pads the tail of shorter rows.
        method: "extra-level" appends one code to every row, 0 for the first item of its kind, then 1, 2 ..
            (TIGER, arXiv 2305.05065), so that rows become distinct; "multiplicity" leaves such items on one
            leaf.

    Returns:
        int64 (N, L + 1) or (N, L).

    Raises:
        TypeError, ValueError: as SemanticIds does; `method` is neither.
    """
    codes = _as_codes(codes).numpy()
    if method == "multiplicity":
        return codes
    if method != "extra-level":
        raise ValueError(f'method needs to be "extra-level" or "multiplicity", got {method!r}')
    _, group, size = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(size.cumsum() - size, size)
    longer = np.pad(codes, ((0, 0), (0, 1)), constant_values=-1)
    longer[np.arange(len(codes)), (codes >= 0).sum(axis=1)] = rank
    return longer


@dataclass(frozen=True)
class Collisions:
    """How many items share their codes with another.

    Attributes:
        num_items: items.
        distinct: different rows of codes.
        colliding: items that share theirs.
        largest_group: the most items on one row of codes.
    """

    num_items: int
    distinct: int
    colliding: int
    largest_group: int


def count_collisions(codes: Any) -> Collisions:
    """Counts the items that share their codes; takes what SemanticIds takes."""
    codes = _as_codes(codes).numpy()
    sizes = np.unique(codes, axis=0, return_counts=True)[1]
    return Collisions(len(codes), len(sizes), int(sizes[sizes > 1].sum()), int(sizes.max()))


class SemanticIds:
    """The codes of a catalogue and the tokens they are in a model's vocabulary.

    Each level has a token range of its own: `first_token` .. for level 0, behind it level 1, and so on.

    Args:
        codes: (N, L) integers, row i the codes of item i, -1 pads the tail of rows shorter than L.
        codebook_sizes: codes of each level, one number for all or one a level; by default as many as occur.
        first_token: the first token that is a code; those before are special (PAD, EOS, BOS).
        extra_level: whether an item's last code only tells it apart, as the one of `resolve_collisions` does.

    Attributes:
        codes: int64 (N, L).
        tokens: int64 (N, L), -1 where codes are -1.
        codebook_sizes: L sizes.
        first_token: as given.
        extra_level: as given.

    Raises:
        TypeError: codes are not integers.
        ValueError: no item, no level, an item without codes, a -1 that is not at a row's tail, a code outside
            its codebook, or an item of one code with `extra_level`.
    """

    def __init__(
        self,
        codes: Any,
        codebook_sizes: int | Sequence[int] | None = None,
        first_token: int = 3,
        *,
        extra_level: bool = False,
    ) -> None:
        self.codes = _as_codes(codes)
        self.codebook_sizes = _as_codebook_sizes(codebook_sizes, self.codes)
        _require_at_least("first_token", first_token, BOS + 1)
        self.first_token = int(first_token)
        offsets = torch.tensor([0, *self.codebook_sizes[:-1]]).cumsum(0) + self.first_token
        self.tokens = torch.where(self.codes >= 0, self.codes + offsets, -1)
        self.extra_level = bool(extra_level)
        if self.extra_level and (self.length == 1 or bool((self.codes[:, 1] < 0).any())):
            raise ValueError("extra_level needs two codes an item or more, got an item with one")
        self._trie: PrefixTrie | None = None

    @property
    def content_codes(self) -> Tensor:
        """int64 (N, L), or (N, L - 1) with an extra level: the codes that say something of an item.

        They are what similar items have in common; the extra level's codes are equal by chance.
        """
        if not self.extra_level:
            return self.codes
        last = (self.codes >= 0).sum(1, keepdim=True) - 1
        return self.codes.scatter(1, last, -1)[:, :-1]

    @property
    def num_items(self) -> int:
        return self.codes.shape[0]

    @property
    def length(self) -> int:
        """Codes of the longest item, L."""
        return self.codes.shape[1]

    @property
    def vocab_size(self) -> int:
        """Tokens a model needs: the special ones and all codebooks."""
        return self.first_token + sum(self.codebook_sizes)

    def trie(self) -> PrefixTrie:
        """The prefix trie of `tokens`, made on the first call."""
        if self._trie is None:
            from gflowgr.trie import PrefixTrie

            self._trie = PrefixTrie(self.tokens)
        return self._trie

    @classmethod
    def from_npy(
        cls,
        path: str | os.PathLike[str],
        codebook_sizes: int | Sequence[int] | None = None,
        first_token: int = 3,
        *,
        items: Any = None,
    ) -> SemanticIds:
        """Reads ready-made codes as they are.

        Args:
            path: a .npy file of (N, L) integers of any width.
            codebook_sizes: as above.
            first_token: as above.
            items: integers, the rows of the file that are items 0, 1 .., such as `log.item_ids` after a
                filter; by default all rows in order.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: the file is no such array, an item has no row in it, or as above.
        """
        path = Path(path)
        try:
            codes = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path}: not a readable .npy file of integers: {error}") from error
        if not isinstance(codes, np.ndarray):
            raise ValueError(f"{path}: not a .npy file but an archive of several arrays")
        try:
            if items is not None:
                codes = _pick_rows(codes, items)
            return cls(codes, codebook_sizes, first_token)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes codes and what else it was made of to a safetensors file."""
        path = Path(path)
        metadata = {
            "format": _FORMAT,
            "codebook_sizes": json.dumps(self.codebook_sizes),
            "first_token": str(self.first_token),
            "extra_level": json.dumps(self.extra_level),
        }
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            save_file({"codes": self.codes}, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SemanticIds:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is foreign, truncated or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of semantic IDs")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"needs format {_FORMAT!r}, got {metadata.get('format')!r}")
                sizes, first_token = json.loads(metadata["codebook_sizes"]), int(metadata["first_token"])
                extra_level = json.loads(metadata.get("extra_level", "false"))
                return cls(file.get_tensor("codes"), sizes, first_token, extra_level=extra_level)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a file of semantic IDs: {error}") from error


def _require_at_least(name: str, value: int, smallest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} needs to be an integer, got {value!r}")
    if value < smallest:
        raise ValueError(f"{name} needs to be at least {smallest}, got {value}")


def _as_texts(texts: Sequence[str | None]) -> list[str]:
    rows = []
    for item, text in enumerate(texts):
        if text is None or (isinstance(text, float) and np.isnan(text)):
            text = ""
        if not isinstance(text, str):
            raise TypeError(f"texts needs strings, got {text!r} for item {item}")
        rows.append(text.strip())
    if not rows:
        raise ValueError("texts needs at least one item, got none")
    return rows


def _as_embeddings(embeddings: Any) -> np.ndarray:
    points = np.ascontiguousarray(embeddings, dtype=np.float32)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(f"embeddings needs the shape (items, dimensions), got {points.shape}")
    finite = np.isfinite(points).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"embeddings needs finite numbers, item {finite.argmin()} has others "
            f"({(~finite).sum()} such items)"
        )
    return points


def _as_codes(codes: Any) -> Tensor:
    """int64 (N, L) on the CPU, after the checks that SemanticIds documents."""
    array = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else np.asarray(codes)
    if array.dtype.kind not in "iu":
        raise TypeError(f"codes needs integers, got {array.dtype}")
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"codes needs the shape (items, levels), got {array.shape}")
    rows = array.astype(np.int64)
    if rows.min() < -1:
        item, level = np.argwhere(rows < -1)[0]
        raise ValueError(f"codes needs numbers from 0 on, or -1, got {rows[item, level]} for item {item}")
    if (rows[:, 0] < 0).any() and (empty := (rows < 0).all(axis=1)).any():
        raise ValueError(f"codes needs a code for each item, item {empty.argmax()} has none")
    gap = (rows[:, :-1] < 0) & (rows[:, 1:] >= 0)
    if gap.any():
        item = gap.any(axis=1).argmax()
        raise ValueError(
            f"codes needs -1 at the tail of a row only, got {rows[item].tolist()} for item {item}"
        )
    return torch.from_numpy(rows)


def _as_codebook_sizes(sizes: int | Sequence[int] | None, codes: Tensor) -> tuple[int, ...]:
    levels = codes.shape[1]
    largest = codes.amax(0)
    if sizes is None:
        # A level of nothing but padding still needs a range, or it would share its first token with the next.
        return tuple(max(1, int(code) + 1) for code in largest)
    given = (sizes,) * levels if isinstance(sizes, (int, np.integer)) else tuple(sizes)
    if len(given) != levels:
        raise ValueError(f"codebook_sizes needs one size for each of the {levels} levels, got {len(given)}")
    for level, size in enumerate(given):
        _require_at_least(f"codebook_sizes[{level}]", size, 1)
        if largest[level] >= size:
            item = int(codes[:, level].argmax())
            raise ValueError(
                f"codes of level {level} need to be below codebook_sizes[{level}] = {size}, "
                f"got {largest[level]} for item {item}"
            )
    return tuple(int(size) for size in given)


def _pick_rows(codes: np.ndarray, items: Any) -> np.ndarray:
    rows = np.asarray(items)
    if rows.dtype.kind not in "iu" or rows.ndim != 1:
        raise TypeError(f"items needs a list of integers, got {rows.dtype} of shape {rows.shape}")
    outside = (rows < 0) | (rows >= len(codes))
    if outside.any():
        raise ValueError(
            f"item {rows[outside.argmax()]} has no codes, there are {len(codes)} rows "
            f"({outside.sum()} such items)"
        )
    return codes[rows]
