"""Traditional recommenders: what a sampler draws from, what a reward scores with, and the rows to beat.

All share one interface, `CollaborativeModel`; whatever has `num_items` and `scores` serves as
well.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from gflowgr.data import batches_of_like_length
from gflowgr.item_sets import request

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

FILE_FORMAT = "gflowgr.collaborative"
# Bounds the one large temporary of SASRec's training, the logits, to 64 MiB in float32.
LOGITS_PER_CHUNK = 2**24
_TINY = torch.finfo(torch.float32).tiny

Model = TypeVar("Model", bound="Recommender")


@runtime_checkable
class CollaborativeModel(Protocol):
    """What the sampler and the reward need of a recommender."""

    num_items: int

    def scores(self, histories: Tensor) -> Tensor:
        """(B, H) item ids, oldest first, right-padded with -1 -> (B, N) float32, higher is better."""
        ...


class SequencesLike(Protocol):
    """Training sequences: user u's items, in time order, are `items[offsets[u] : offsets[u + 1]]`."""

    @property
    def offsets(self) -> np.ndarray: ...

    @property
    def items(self) -> np.ndarray: ...


class ExamplesLike(Protocol):
    """Contexts and targets: `history` (n, H), right-padded with -1, and `target` (n,), both int64."""

    @property
    def history(self) -> Tensor: ...

    @property
    def target(self) -> Tensor: ...


class Recommender(ABC):
    """A fitted recommender that scores the whole catalogue and can be saved.

    `is_distribution`: whether a softmax of the scores is what it takes for the next item's probability.
    """

    name: ClassVar[str]
    is_distribution: ClassVar[bool] = False
    num_items: int
    rows_per_batch: ClassVar[int] = 1024

    @torch.no_grad()
    def scores(self, histories: Tensor) -> Tensor:
        """Score every item for every history.

        `histories` (B, H), any integer dtype, oldest first, right-padded with -1; a row of -1 alone is a
        user without history. Returns (B, N) float32 on the device of `histories`, finite, higher is
        better. Raises TypeError or ValueError on another shape, dtype, padding, or an id outside the
        catalogue.
        """
        _check_histories(histories, self.num_items)
        out = torch.empty(histories.shape[0], self.num_items, device=histories.device)
        lengths = (histories >= 0).sum(1)
        # Rows of like length share a batch, so that short histories do not pay for the padding of long ones.
        order = torch.argsort(lengths, stable=True)
        for start in range(0, len(order), self.rows_per_batch):
            rows = order[start : start + self.rows_per_batch]
            width = int(lengths[rows].max())
            out[rows] = self._scores(histories[rows, :width].long()).to(out)
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to `path` (safetensors), through a temporary file and a rename."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        config = json.dumps({"num_items": self.num_items, **self._config()}, sort_keys=True)
        metadata = {
            "format": FILE_FORMAT,
            "version": "1",
            "model": self.name,
            "config": config,
            "digest": _digest(self.name, config, tensors),
        }
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(save(tensors, metadata))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls: type[Model], path: str | os.PathLike[str]) -> Model:
        """Read a model of this class; ValueError for another class's file, a foreign or a damaged one."""
        model = load(path)
        if not isinstance(model, cls):
            raise ValueError(f"path: {os.fspath(path)} holds a {model.name} model, need {cls.name}")
        return model

    @abstractmethod
    def _scores(self, histories: Tensor) -> Tensor: ...

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]: ...

    def _config(self) -> dict[str, Any]:
        return {}

    @classmethod
    @abstractmethod
    def _restore(cls: type[Model], tensors: dict[str, Tensor], config: dict[str, Any]) -> Model: ...


def best_items(scores: Tensor, num_items: int, exclude: Any = None) -> Tensor:
    """The items of the highest scores, best first.

    Args:
        scores: (B, N).
        num_items: k, items a row.
        exclude: what a row must not get: (B, E) items with -1 for padding, or B lists of items.

    Returns:
        (B, k) int64; -1 where a row has fewer.
    """
    if exclude is not None:
        hidden = torch.from_numpy(request(exclude, None, *scores.shape).excluded).to(scores.device)
        scores = scores.reshape(-1).index_fill(0, hidden, -torch.inf).view_as(scores)
    best = scores.topk(min(num_items, scores.shape[1]))
    items = best.indices.masked_fill(best.values.isneginf(), -1)
    return torch.nn.functional.pad(items, (0, num_items - items.shape[1]), value=-1)


class Popularity(Recommender):
    """The same list for everyone: log of each item's smoothed share of the interactions.

    `counts` (N,) int64. A softmax of the scores at temperature 1 is the share itself, with one
    interaction added to every item so that unseen items stay possible.
    """

    name = "popularity"
    is_distribution = True

    def __init__(self, counts: Tensor) -> None:
        self.num_items = counts.shape[0]
        self.counts = counts
        self._log_share = torch.log((counts + 1).double() / (counts.sum() + self.num_items)).float()

    @classmethod
    def fit(cls, sequences: SequencesLike, num_items: int, *, seed: int = 0) -> Popularity:
        """Count interactions; `seed` is there for the common interface, nothing is drawn."""
        _, items = _check_sequences(sequences, num_items)
        return cls(torch.from_numpy(np.bincount(items, minlength=num_items)))

    def _scores(self, histories: Tensor) -> Tensor:
        return self._log_share.expand(histories.shape[0], -1)

    def _tensors(self) -> dict[str, Tensor]:
        return {"counts": self.counts}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> Popularity:
        return cls(tensors["counts"])


class ItemKNN(Recommender):
    """Item neighbours by co-occurrence; a history's score is the sum of its items' neighbours, recent first.

    Similarity of i and j: sum over their common users of `log(1 + U / length)^2`, divided by
    `(count_i * count_j) ** popularity_exponent` (.5 is the cosine, less favours popular items). An item is
    not its own neighbour. The i-th latest item of a history weighs `recency ** i`. Histories without
    neighbours score 0 everywhere. Needs the library implicit to fit, not to score.
    """

    name = "item-knn"

    def __init__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        similarity: np.ndarray,
        *,
        num_items: int,
        recency: float,
    ) -> None:
        from scipy.sparse import csr_matrix

        self.num_items = int(num_items)
        self.recency = float(recency)
        self.similarity = csr_matrix((similarity, indices, indptr), shape=(num_items, num_items))

    @classmethod
    def fit(
        cls,
        sequences: SequencesLike,
        num_items: int,
        *,
        seed: int = 0,
        neighbours: int = 100,
        popularity_exponent: float = 0.3,
        recency: float = 0.6,
        progress: bool = True,
    ) -> ItemKNN:
        """Find each item's `neighbours` most similar items; nothing is drawn, `seed` has no effect."""
        _check_positive("neighbours", neighbours, integer=True)
        _check_number(
            "popularity_exponent", popularity_exponent, lambda x: 0.0 <= x <= 1.0, "a number in [0, 1]"
        )
        _check_number("recency", recency, lambda x: 0.0 < x <= 1.0, "a number in (0, 1]")
        from scipy.sparse import diags

        matrix = _interaction_matrix(sequences, num_items)
        lengths = np.maximum(np.asarray(matrix.sum(1)).ravel(), 1.0)
        counts = np.maximum(np.asarray(matrix.sum(0)).ravel(), 1.0)
        weighted = (
            diags(np.log1p(matrix.shape[0] / lengths)) @ matrix.sqrt() @ diags(counts**-popularity_exponent)
        )
        with _implicit_library(cls.name) as library:
            # One more than asked for, since the library counts an item among its own neighbours.
            model = library.nearest_neighbours.ItemItemRecommender(
                K=neighbours + 1, num_threads=torch.get_num_threads()
            )
            model.fit(weighted.tocsr(), show_progress=progress)
        similarity = _without_self(model.similarity.tocsr(), neighbours)
        similarity.sort_indices()
        return cls(
            similarity.indptr.astype(np.int64),
            similarity.indices.astype(np.int64),
            similarity.data.astype(np.float32),
            num_items=num_items,
            recency=recency,
        )

    def neighbours(self, histories: Tensor) -> csr_matrix:
        """The scores (B, N) without their zeros."""
        from scipy.sparse import csr_matrix

        array = histories.cpu().numpy()
        rows, columns = np.nonzero(array >= 0)
        age = (array >= 0).sum(1)[rows] - 1 - columns
        weights = np.power(self.recency, age).astype(np.float32)
        queries = csr_matrix((weights, (rows, array[rows, columns])), shape=(len(array), self.num_items))
        return queries @ self.similarity

    def _scores(self, histories: Tensor) -> Tensor:
        return torch.from_numpy(self.neighbours(histories).toarray())

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "indptr": torch.from_numpy(self.similarity.indptr.astype(np.int64)),
            "indices": torch.from_numpy(self.similarity.indices.astype(np.int64)),
            "similarity": torch.from_numpy(self.similarity.data),
        }

    def _config(self) -> dict[str, Any]:
        return {"recency": self.recency}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> ItemKNN:
        arrays = [tensors[name].numpy() for name in ("indptr", "indices", "similarity")]
        return cls(*arrays, num_items=config["num_items"], recency=config["recency"])


class ALS(Recommender):
    """Matrix factorisation for implicit feedback by alternating least squares (Hu, Koren and Volinsky 2008).

    A history is folded in: its user factors are the exact least-squares solution against the item factors
    (equation 4 of the paper, confidence = `alpha` times the number of interactions, as in the library),
    so users need not have been seen in training. An empty history scores 0 everywhere. Needs the library
    implicit to fit, not to score.
    """

    name = "als"
    rows_per_batch = 256

    def __init__(self, item_factors: Tensor, *, alpha: float, regularization: float) -> None:
        self.num_items = item_factors.shape[0]
        self.item_factors = item_factors
        self.alpha = float(alpha)
        self.regularization = float(regularization)
        identity = torch.eye(item_factors.shape[1], dtype=item_factors.dtype)
        self._gram = item_factors.T @ item_factors + regularization * identity

    @classmethod
    def fit(
        cls,
        sequences: SequencesLike,
        num_items: int,
        *,
        seed: int = 0,
        factors: int = 64,
        alpha: float = 10.0,
        regularization: float = 1.0,
        iterations: int = 15,
        progress: bool = True,
    ) -> ALS:
        """Factorise the users x items matrix of interaction counts; deterministic by `seed`."""
        _check_positive("factors", factors, integer=True)
        _check_positive("alpha", alpha)
        _check_positive("regularization", regularization)
        _check_positive("iterations", iterations, integer=True)
        matrix = _interaction_matrix(sequences, num_items)
        with _implicit_library(cls.name) as library:
            model = library.cpu.als.AlternatingLeastSquares(
                factors=factors,
                alpha=alpha,
                regularization=regularization,
                iterations=iterations,
                random_state=seed,
                num_threads=torch.get_num_threads(),
            )
            model.fit(matrix.astype(np.float32), show_progress=progress)
        return cls(torch.from_numpy(model.item_factors), alpha=alpha, regularization=regularization)

    def _scores(self, histories: Tensor) -> Tensor:
        histories = histories.to(self.item_factors.device)
        same = (histories[:, :, None] == histories[:, None, :]) & (histories >= 0)[:, :, None]
        first = ~same.tril(-1).any(2) & (histories >= 0)
        confidence = torch.where(first, self.alpha * same.sum(2), 0.0)
        vectors = self.item_factors[histories.clamp(min=0)]
        extra = torch.where(first, confidence - 1.0, 0.0)
        system = self._gram + vectors.mT @ (extra[:, :, None] * vectors)
        wanted = (confidence[:, :, None] * vectors).sum(1)
        return torch.linalg.solve(system, wanted) @ self.item_factors.T

    def _tensors(self) -> dict[str, Tensor]:
        return {"item_factors": self.item_factors}

    def _config(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "regularization": self.regularization}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> ALS:
        return cls(tensors["item_factors"], alpha=config["alpha"], regularization=config["regularization"])


class SASRec(Recommender):
    """Causal self-attention over the history (Kang and McAuley 2018), trained with the full cross-entropy.

    Pre-norm blocks and tied item embeddings. A learned start vector stands before the first item, so a user
    without history has a prediction of their own. The scores are logits: their softmax is the model's
    distribution over the catalogue. The last `max_history` items of a longer history are read.
    """

    name = "sasrec"
    is_distribution = True
    rows_per_batch = 256

    def __init__(self, network: SASRecNetwork) -> None:
        self.network = network.eval().requires_grad_(False)
        self.num_items = network.num_items
        self.training_log: list[dict[str, float]] = []

    @classmethod
    def fit(
        cls,
        sequences: SequencesLike,
        num_items: int,
        *,
        validation: ExamplesLike | None = None,
        seed: int = 0,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: float = 0.4,
        max_history: int = 50,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 128,
        epochs: int = 50,
        patience: int = 5,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> SASRec:
        """Train on whole sequences, every item after its predecessors a target.

        With `validation` training stops when NDCG@10 has not risen for `patience` epochs and the best
        epoch's weights are kept; without it all `epochs` are run. Deterministic by `seed` on a CPU; the
        global random state is as before afterwards. `training_log` of the model holds the steps, loss (nats
        a target) and NDCG@10 of each epoch. Raises ValueError for an empty log, ids outside the catalogue or
        bad settings, FloatingPointError when the loss is no longer finite.
        """
        offsets, items = _check_sequences(sequences, num_items)
        for name, value in (("batch_size", batch_size), ("epochs", epochs), ("patience", patience)):
            _check_positive(name, value, integer=True)
        _check_positive("learning_rate", learning_rate)
        if validation is not None:
            _check_validation(validation, num_items)
        device = torch.device(device)
        with _private_random_state(seed, device):
            network = SASRecNetwork(num_items, hidden_size, num_layers, num_heads, dropout, max_history)
            model = cls(network.to(device))
            trainer = _SASRecTrainer(
                model,
                _causal_windows(offsets, items, max_history),
                learning_rate,
                weight_decay,
                batch_size,
            )
            model.training_log = trainer.run(validation, epochs, patience, progress)
        return model

    def to(self, device: str | torch.device) -> SASRec:
        """Move the network; scores come back on the device of the histories."""
        self.network.to(device)
        return self

    def _scores(self, histories: Tensor) -> Tensor:
        histories = _latest(histories, self.network.max_history).to(self.network.start.device)
        states = self.network(histories)
        last = (histories >= 0).sum(1)
        return self.network.logits(states[torch.arange(len(states), device=states.device), last])

    def _tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def _config(self) -> dict[str, Any]:
        return self.network.config

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> SASRec:
        # Building the network draws initial weights, which must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            network = SASRecNetwork(**config)
        network.load_state_dict(tensors)
        return cls(network)


class SASRecNetwork(nn.Module):
    """Item and position embeddings, pre-norm blocks, a final norm; the logits reuse the item embedding."""

    def __init__(
        self,
        num_items: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        max_history: int,
    ) -> None:
        super().__init__()
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
            ("num_heads", num_heads),
            ("max_history", max_history),
        ):
            _check_positive(name, value, integer=True)
        if hidden_size % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, need a divisor of hidden_size = {hidden_size}")
        _check_number("dropout", dropout, lambda x: 0.0 <= x < 1.0, "a number in [0, 1)")
        self.config = {
            "num_items": int(num_items),
            "hidden_size": int(hidden_size),
            "num_layers": int(num_layers),
            "num_heads": int(num_heads),
            "dropout": float(dropout),
            "max_history": int(max_history),
        }
        self.num_items = int(num_items)
        self.max_history = int(max_history)
        self.item_embedding = nn.Embedding(num_items, hidden_size)
        self.position_embedding = nn.Embedding(max_history + 1, hidden_size)
        self.start = nn.Parameter(torch.empty(hidden_size))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.start, std=0.02)

    def forward(self, histories: Tensor) -> Tensor:
        """(B, T) -> (B, T + 1, hidden_size): the state before the first item, then after each item."""
        # Padding stands on the right, where a causal model cannot look back from, so it needs no mask.
        items = self.item_embedding(histories.clamp(min=0))
        start = self.start.expand(items.shape[0], 1, -1)
        states = torch.cat([start, items], dim=1) + self.position_embedding.weight[: items.shape[1] + 1]
        states = self.dropout(states)
        for block in self.blocks:
            states = block(states)
        return self.norm(states)

    def logits(self, states: Tensor) -> Tensor:
        return states @ self.item_embedding.weight.T


class _Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.feed_forward_norm = nn.LayerNorm(hidden_size)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, states: Tensor) -> Tensor:
        batch, length, width = states.shape
        projected = self.query_key_value(self.attention_norm(states))
        heads = projected.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        dropout = self.dropout.p if self.training else 0.0
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True
        )
        states = states + self.dropout(self.output(attended.transpose(1, 2).reshape(batch, length, width)))
        return states + self.dropout(self.feed_forward(self.feed_forward_norm(states)))


class _SASRecTrainer:
    """One training run; draws from the global random state, which the caller has made its own."""

    def __init__(
        self,
        model: SASRec,
        windows: tuple[Tensor, Tensor],
        learning_rate: float,
        weight_decay: float,
        batch_size: int,
    ) -> None:
        self.model = model
        self.histories, self.targets = windows
        self.lengths = (self.histories >= 0).sum(1)
        self.batch_size = batch_size
        decayed = [p for p in model.network.parameters() if p.dim() > 1]
        others = [p for p in model.network.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=learning_rate,
        )
        self.num_batches = math.ceil(len(self.histories) / batch_size)
        # Divided by the mean over all batches, not by each batch's own count, every target weighs the same.
        self.targets_per_batch = max(1.0, float((self.targets >= 0).sum()) / self.num_batches)

    def run(
        self, validation: ExamplesLike | None, epochs: int, patience: int, progress: bool
    ) -> list[dict[str, float]]:
        network = self.model.network
        log: list[dict[str, float]] = []
        best, best_state, waited = -1.0, None, 0
        if validation is not None:
            # Scores come back on the histories' device, and a whole catalogue's are a lot to carry.
            device = network.start.device
            history, target = validation.history.to(device), validation.target.to(device)
        with _progress_bar(epochs * self.num_batches, "SASRec", progress) as bar:
            for epoch in range(1, epochs + 1):
                network.train().requires_grad_(True)
                batches = batches_of_like_length(self.lengths, self.batch_size)
                loss = sum(self._step(rows, bar) for rows in batches) / self.num_batches
                network.eval().requires_grad_(False)
                entry = {"epoch": float(epoch), "steps": float(self.num_batches), "loss": loss}
                if validation is not None:
                    entry["ndcg@10"] = _ndcg(self.model, history, target)
                log.append(entry)
                bar.set_postfix({name: f"{value:.4g}" for name, value in entry.items()})
                if validation is None:
                    continue
                if entry["ndcg@10"] > best:
                    best, waited = entry["ndcg@10"], 0
                    best_state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
                else:
                    waited += 1
                if waited == patience:
                    break
        if best_state is not None:
            network.load_state_dict(best_state)
        return log

    def _step(self, rows: Tensor, bar: Any) -> float:
        network = self.model.network
        width = int(self.lengths[rows].max())
        histories = self.histories[rows, :width].to(network.start.device)
        targets = self.targets[rows, : width + 1].to(network.start.device)
        states = network(histories)[targets >= 0]
        targets = targets[targets >= 0]
        # The logits' gradient is taken chunk by chunk, so that they never exist for all targets at once.
        leaf = states.detach().requires_grad_(True)
        total = 0.0
        rows_per_chunk = max(1, LOGITS_PER_CHUNK // network.num_items)
        for part, wanted in zip(leaf.split(rows_per_chunk), targets.split(rows_per_chunk), strict=True):
            loss = (
                functional.cross_entropy(network.logits(part), wanted, reduction="sum")
                / self.targets_per_batch
            )
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise FloatingPointError(f"SASRec: the training loss became {total}; lower learning_rate")
        states.backward(leaf.grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        bar.update(1)
        return total


class Mixture(Recommender):
    """Half a SASRec, half item neighbours: what either alone does not know.

    The scores are logs of `(1 - neighbour_weight) p_s + neighbour_weight p_n`, `p_s` the softmax of SASRec's
    scores and `p_n` in proportion to item kNN's to the power of `sharpness`. Where a history has no
    neighbours SASRec speaks alone. A softmax of the scores at temperature 1 is the mixture itself.
    """

    name = "mixture"
    is_distribution = True
    rows_per_batch = SASRec.rows_per_batch

    def __init__(
        self, sasrec: SASRec, item_knn: ItemKNN, *, neighbour_weight: float = 0.5, sharpness: float = 1.5
    ) -> None:
        if sasrec.num_items != item_knn.num_items:
            raise ValueError(f"item_knn has {item_knn.num_items} items, needs {sasrec.num_items} like sasrec")
        _check_number(
            "neighbour_weight", neighbour_weight, lambda x: 0.0 <= x < 1.0, "a number from 0 to below 1"
        )
        _check_positive("sharpness", sharpness)
        self.num_items = sasrec.num_items
        self.sasrec = sasrec
        self.item_knn = item_knn
        self.neighbour_weight = float(neighbour_weight)
        self.sharpness = float(sharpness)

    @classmethod
    def fit(
        cls,
        sequences: SequencesLike,
        num_items: int,
        *,
        validation: ExamplesLike | None = None,
        seed: int = 0,
        neighbour_weight: float = 0.5,
        sharpness: float = 1.5,
        max_history: int = 50,
        sasrec: Mapping[str, Any] | None = None,
        item_knn: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> Mixture:
        """Fit both; `sasrec` and `item_knn` are further options of their own `fit`."""
        neighbours = ItemKNN.fit(sequences, num_items, seed=seed, progress=progress, **(item_knn or {}))
        network = SASRec.fit(
            sequences,
            num_items,
            validation=validation,
            seed=seed,
            max_history=max_history,
            device=device,
            progress=progress,
            **(sasrec or {}),
        )
        return cls(network, neighbours, neighbour_weight=neighbour_weight, sharpness=sharpness)

    def to(self, device: str | torch.device) -> Mixture:
        """Move SASRec's network; the neighbours stay on the CPU."""
        self.sasrec.to(device)
        return self

    def mixed(self, logits: Tensor, histories: Tensor) -> Tensor:
        """(B, N) scores from SASRec's and the histories (B, H) that they are of."""
        # Few items are neighbours, so all that can be done with these alone is.
        found = self.item_knn.neighbours(histories)
        found.data **= self.sharpness
        total = np.maximum(np.asarray(found.sum(1)).ravel(), _TINY)
        found.data *= np.repeat(self.neighbour_weight / total, np.diff(found.indptr)).astype(np.float32)
        place = np.repeat(np.arange(len(total)) * self.num_items, np.diff(found.indptr)) + found.indices
        mixed = logits.float().softmax(1).mul_(1 - self.neighbour_weight)
        place, share = (torch.from_numpy(array).to(mixed.device) for array in (place, found.data))
        mixed.view(-1).index_add_(0, place, share)
        return mixed.clamp_(_TINY).log_()

    def _scores(self, histories: Tensor) -> Tensor:
        return self.mixed(self.sasrec._scores(histories), histories)

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{part.name}/{name}": tensor
            for part in (self.sasrec, self.item_knn)
            for name, tensor in part._tensors().items()
        }

    def _config(self) -> dict[str, Any]:
        parts = {
            part.name: {"num_items": self.num_items, **part._config()}
            for part in (self.sasrec, self.item_knn)
        }
        return {"neighbour_weight": self.neighbour_weight, "sharpness": self.sharpness, **parts}

    @classmethod
    def _restore(cls, tensors: dict[str, Tensor], config: dict[str, Any]) -> Mixture:
        def part(model: type[Model]) -> Model:
            own = {
                name.removeprefix(f"{model.name}/"): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{model.name}/")
            }
            return model._restore(own, config[model.name])

        return cls(
            part(SASRec),
            part(ItemKNN),
            neighbour_weight=config["neighbour_weight"],
            sharpness=config["sharpness"],
        )


MODELS: dict[str, type[Recommender]] = {
    model.name: model for model in (Popularity, ItemKNN, ALS, SASRec, Mixture)
}
# Those that are trained step by step: they stop early by the validation part and have a device.
TRAINED = (SASRec, Mixture)


def build(
    name: str,
    sequences: SequencesLike,
    num_items: int,
    *,
    validation: ExamplesLike | None = None,
    seed: int = 0,
    **options: Any,
) -> Recommender:
    """Fit the recommender `name`, one of `MODELS`, with its fit's `options`.

    `validation` goes to the models that stop early by it (SASRec, alone or in a mixture); the others have
    nothing to choose.
    Raises ValueError for an unknown name, TypeError for an option that the model does not have.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"name: got {name!r}, need one of {', '.join(MODELS)}{hint}")
    if MODELS[name] in TRAINED:
        options["validation"] = validation
    return MODELS[name].fit(sequences, num_items, seed=seed, **options)  # type: ignore[attr-defined]


def load(path: str | os.PathLike[str]) -> Recommender:
    """Read any saved recommender; ValueError for a foreign, truncated or altered file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} is not a file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FILE_FORMAT:
                raise ValueError(f"path: {path} was not saved by gflowgr.collaborative")
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"path: {path} is not a readable safetensors file ({error})") from error
    name, config = metadata.get("model", ""), metadata.get("config", "")
    if metadata.get("version") != "1" or name not in MODELS:
        raise ValueError(
            f"path: {path} holds model {name!r} in version {metadata.get('version')}, need version 1"
        )
    if metadata.get("digest") != _digest(name, config, tensors):
        raise ValueError(f"path: {path} is damaged: its contents do not match its digest")
    return MODELS[name]._restore(tensors, json.loads(config))


def _digest(name: str, config: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps([name, config]).encode())
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _ndcg(model: Recommender, history: Tensor, target: Tensor, k: int = 10) -> float:
    total = 0.0
    for rows in torch.arange(len(target), device=target.device).split(model.rows_per_batch):
        scores = model.scores(history[rows])
        wanted = scores.gather(1, target[rows, None])
        # Ties count against the target: a model that scores all alike must not look perfect.
        rank = (scores >= wanted).sum(1)
        total += float(torch.where(rank <= k, 1.0 / torch.log2(rank + 1.0), 0.0).sum())
    return total / len(target)


def _latest(histories: Tensor, count: int) -> Tensor:
    lengths = (histories >= 0).sum(1, keepdim=True)
    width = min(count, histories.shape[1])
    columns = (lengths - width).clamp(min=0) + torch.arange(width, device=histories.device)
    return histories.gather(1, columns)


def _causal_windows(offsets: np.ndarray, items: np.ndarray, max_history: int) -> tuple[Tensor, Tensor]:
    """Histories (n, max_history) and targets (n, max_history + 1), -1 where there is none.

    State t has read the first t items of its row. A sequence is cut so that each item is a target once; the
    later pieces of a long one begin with an item that was a target before, which gives them a context.
    """
    starts, ends = [], []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        first = begin
        while first < end:
            starts.append(first)
            ends.append(min(first + max_history + 1, end))
            if ends[-1] == end:
                break
            first = ends[-1] - 1
    column = np.arange(max_history + 1)
    position = np.array(starts)[:, None] + column
    inside = position < np.array(ends)[:, None]
    targets = np.where(inside, items[np.minimum(position, len(items) - 1)], -1)
    histories = np.where(inside[:, 1:], targets[:, :-1], -1)
    continued = ~np.isin(np.array(starts), offsets[:-1])
    targets[continued, 0] = -1
    return torch.from_numpy(histories), torch.from_numpy(targets)


def _interaction_matrix(sequences: SequencesLike, num_items: int) -> Any:
    offsets, items = _check_sequences(sequences, num_items)
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(items)), items, offsets), shape=(len(offsets) - 1, num_items))
    matrix.sum_duplicates()
    return matrix


def _without_self(similarity: Any, neighbours: int) -> Any:
    similarity.setdiag(0)
    similarity.eliminate_zeros()
    # A popular neighbour can be nearer than the item is to itself, which then was not among the nearest.
    full = np.flatnonzero(np.diff(similarity.indptr) > neighbours)
    entries = similarity.indptr[full, None] + np.arange(neighbours + 1)
    similarity.data[entries[np.arange(len(full)), similarity.data[entries].argmin(1)]] = 0
    similarity.eliminate_zeros()
    return similarity


@contextmanager
def _implicit_library(model: str) -> Iterator[ModuleType]:
    try:
        import implicit
        import implicit.cpu.als
        import implicit.nearest_neighbours
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError(f"{model} needs the library implicit: pip install 'gflowgr[train]'") from error
    # The library's own threads and those of a BLAS underneath would fight for the same cores.
    with threadpool_limits(limits=1, user_api="blas"):
        yield implicit


@contextmanager
def _private_random_state(seed: int, device: torch.device) -> Iterator[None]:
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device}, need a CPU or CUDA device (move the fitted model with to())")
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(int(seed))
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(int(seed))
        yield


def _progress_bar(total: int, description: str, enabled: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs the library tqdm: pip install 'gflowgr[train]'") from error
    return tqdm(total=total, desc=description, unit="batch", disable=not enabled)


def _check_sequences(sequences: SequencesLike, num_items: int) -> tuple[np.ndarray, np.ndarray]:
    _check_positive("num_items", num_items, integer=True)
    offsets, items = np.asarray(sequences.offsets), np.asarray(sequences.items)
    for name, array in (("sequences.offsets", offsets), ("sequences.items", items)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"{name}: got {array.dtype} of shape {array.shape}, need a 1-D integer array")
    if len(items) == 0:
        raise ValueError("sequences: got no interactions, need at least one")
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
        raise ValueError(f"sequences.offsets: need to rise from 0 to the number of items, {len(items)}")
    if items.min() < 0 or items.max() >= num_items:
        raise ValueError(
            f"sequences.items: got ids from {items.min()} to {items.max()}, "
            f"need 0 to num_items - 1 = {num_items - 1}"
        )
    return offsets, items


def _check_histories(histories: Tensor, num_items: int) -> None:
    if not isinstance(histories, Tensor) or histories.is_floating_point() or histories.dtype == torch.bool:
        got = histories.dtype if isinstance(histories, Tensor) else type(histories).__name__
        raise TypeError(f"histories: got {got}, need a tensor of integers")
    if histories.dim() != 2:
        raise ValueError(f"histories: got shape {tuple(histories.shape)}, need (B, H)")
    if histories.numel() == 0:
        return
    if int(histories.min()) < -1 or int(histories.max()) >= num_items:
        raise ValueError(
            f"histories: got ids from {int(histories.min())} to {int(histories.max())}, "
            f"need -1 (padding) to num_items - 1 = {num_items - 1}"
        )
    if bool(((histories[:, 1:] >= 0) & (histories[:, :-1] < 0)).any()):
        raise ValueError("histories: got an item after padding (-1), need padding on the right only")


def _check_validation(validation: ExamplesLike, num_items: int) -> None:
    _check_histories(validation.history, num_items)
    target = validation.target
    if len(target) == 0 or target.shape != validation.history.shape[:1]:
        raise ValueError(
            f"validation: got targets of shape {tuple(target.shape)} for histories of shape "
            f"{tuple(validation.history.shape)}, need one target a history and at least one"
        )
    if int(target.min()) < 0 or int(target.max()) >= num_items:
        raise ValueError(f"validation.target: got an id outside 0 to num_items - 1 = {num_items - 1}")


def _check_positive(name: str, value: object, integer: bool = False) -> None:
    kind: type = Integral if integer else Real
    need = "a positive integer" if integer else "a positive number"
    _check_number(name, value, lambda x: isinstance(value, kind) and 0.0 < x < math.inf, need)


def _check_number(name: str, value: object, is_allowed: Callable[[float], bool], need: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not is_allowed(float(value)):
        raise ValueError(f"{name}: got {value!r}, need {need}")
