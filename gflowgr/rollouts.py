"""Contexts that nobody was seen in: a recommender goes on with a history from some point on."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from gflowgr.collaborative import LOGITS_PER_CHUNK, CollaborativeModel
from gflowgr.data import Histories

# Rows of a batch's histories, the place that was drawn, and the items (R, M) it was drawn among, with scores.
Note = Callable[[Tensor, int, Tensor, Tensor], None]
_ROWS = 512


@torch.no_grad()
def roll_out(
    model: CollaborativeModel,
    histories: dict[str, Tensor],
    generator: torch.Generator,
    temperature: float = 1.0,
    among: int = 0,
    note: Note | None = None,
    beyond: int | Tensor = 0,
    keep: Tensor | None = None,
    epsilon: float = 0.0,
) -> dict[str, Tensor]:
    """Whole histories of which the latter part, of random length, is drawn from `model` instead.

    Of a history of n items the first 1 to n - 1 stay, each number as likely, or up to n where the rollout
    goes beyond them; every further item is drawn from the softmax of the model's scores after those before
    it, among the items that the history lacks. A drawn item is worth 0: no user was seen to take it.

    Args:
        model: the recommender.
        histories: "items" (B, W) int64, oldest first, -1 on the right; "value" (B, W), their worth.
        generator: of the draws, on the device of the items.
        temperature: what the scores are divided by.
        among: draws among so many items of the highest scores; 0 is the whole catalogue.
        note: called after each place with the rows drawn there, the place, and the items that were drawn
            among with their scores, (R, `among`) each.
        beyond: items by which a rollout is longer than its history, as far as the row has room; (B,) int64
            or one number for all.
        keep: (B,) bool, rows of which all items stay; none by default.
        epsilon: the share of drawn items that are any of the catalogue which the history lacks: users often
            take what no recommender would have picked, and a policy is asked after it all the same.

    Returns:
        both, of the same shape; rows of one item are as they were where the rollout goes no further.
    """
    items = histories["items"]
    lengths = (items >= 0).sum(1)
    share = torch.rand(len(items), generator=generator, device=items.device)
    end = torch.where(lengths > 0, (lengths + beyond).clamp(max=items.shape[1]), 0)
    kept = 1 + (share * (lengths - 1 + (end > lengths).long())).long()
    if keep is not None:
        kept = torch.where(keep, lengths, kept)
    column = torch.arange(items.shape[1], device=items.device)
    drawn = (column >= kept[:, None]) & (column < end[:, None])
    items = items.masked_fill(drawn, -1)
    for position in range(1, items.shape[1]):
        rows = drawn[:, position].nonzero()[:, 0]
        if not len(rows):
            continue
        past = items[rows, :position]
        scores = model.scores(past).to(items.device, torch.float32)
        best = None
        if among:
            scores, best = scores.topk(min(among, scores.shape[1]))
            unseen = scores.masked_fill((best[:, :, None] == past[:, None, :]).any(2), -torch.inf)
        else:
            unseen = scores.scatter(1, past, -torch.inf)
        # Whoever has had all of them has to repeat an item.
        unseen = torch.where(unseen.amax(1, keepdim=True) > -torch.inf, unseen, scores)
        mass = (unseen / temperature).softmax(1).cumsum(1)
        point = torch.rand(len(rows), 1, generator=generator, device=items.device) * mass[:, -1:]
        # Rounding may put the point on the end of the line.
        chosen = torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[1] - 1)
        picked = (chosen if best is None else best.gather(1, chosen))[:, 0]
        if epsilon:
            strays = torch.rand(len(rows), generator=generator, device=items.device) < epsilon
            anything = torch.randint(model.num_items, (len(rows),), generator=generator, device=items.device)
            picked = torch.where(strays & (anything[:, None] != past).all(1), anything, picked)
        items[rows, position] = picked
        if note is not None and best is not None:
            note(rows, position, best, scores)
    return {"items": items, "value": histories["value"].masked_fill(drawn, 0)}


def make_room(histories: dict[str, Tensor], beyond: Tensor) -> dict[str, Tensor]:
    """Whole histories of which the oldest items are gone where the row lacks room for `beyond` (B,) more.

    Two items stay in any case.
    """
    items, value = histories["items"], histories["value"]
    width = items.shape[1]
    length = (items >= 0).sum(1)
    over = (length + beyond - width).clamp(min=0).minimum((length - 2).clamp(min=0))
    source = over[:, None] + torch.arange(width, device=items.device)
    known, source = source < width, source.clamp(max=width - 1)
    return {
        "items": items.gather(1, source).masked_fill(~known, -1),
        "value": value.gather(1, source).masked_fill(~known, 0),
    }


def roll_out_window(
    model: CollaborativeModel,
    examples: dict[str, Tensor],
    generator: torch.Generator,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """The same for contexts with one target each, which is drawn, too; what follows it is unknown.

    Args:
        model: the recommender.
        examples: "history" (B, H), at least one item each, "target" (B,), "value" (B,), "future" and
            "future_value" (B, F).
        generator: of the draws.
        temperature: what the scores are divided by.
    """
    end = (examples["history"] >= 0).sum(1, keepdim=True)
    items = functional.pad(examples["history"], (0, 1), value=-1)
    items = items.scatter(1, end, examples["target"][:, None])
    value = torch.zeros(items.shape, dtype=examples["value"].dtype, device=items.device)
    rolled = roll_out(model, {"items": items, "value": value}, generator, temperature)["items"]
    return {
        "history": rolled.scatter(1, end, -1)[:, :-1],
        "target": rolled.gather(1, end)[:, 0],
        "value": torch.zeros_like(examples["value"]),
        "future": torch.full_like(examples["future"], -1),
        "future_value": torch.zeros_like(examples["future_value"]),
    }


@torch.no_grad()
def best_items(scores: Tensor, wanted: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The items of each row's highest scores, those wanted in any case: ids and scores, (R, count) each.

    `wanted` (R, W) int64, the first a real item, -1 pads; the order of the result means nothing.
    """
    wanted = torch.where(wanted < 0, wanted[:, :1], wanted)
    first = scores.scatter(1, wanted, torch.inf)
    items = first.topk(min(count, scores.shape[1]), dim=1).indices
    return items, scores.gather(1, items)


class RolloutPool:
    """Rollouts of whole histories drawn ahead, and what the recommender would pick in each of their contexts.

    A recommender does not change while the policy learns from it, so that it need not be asked again each
    time a history comes up: a history has `copies` rollouts, and a context keeps the recommender's
    `candidates` best items with their scores, 8 bytes each, in a mapped file without a name.

    A share of each history's rollouts begins after a random item of it, the others keep all of it. Both go
    `beyond` the user's last item. Where a row has no room for that its oldest items make some, and are
    targets of no rollout. A row that the user's next row goes on with ends where it does: what came then is
    known.

    Args:
        model: the recommender; one that shares the work of growing histories saves most of it.
        histories: that training will ask for.
        copies: rollouts of each.
        share: of the rollouts that begin at a random item; of each history's as near as its copies allow.
        candidates: best items kept of a context, which rollouts are drawn among, the target one of them
            unless it is any of the catalogue; 0 keeps none, and rollouts are drawn from the whole catalogue.
        temperature: of the draws, as `roll_out`'s.
        generator: of the draws; on the device that the pool is filled on, where the recommender best is.
        later: of the items after a target, so many are among the candidates in any case.
        beyond: items that are drawn after a user's last one.
        epsilon: share of drawn items that are any of the catalogue.
        folder: where the file is; the system's for temporary files by default.
        advance: called with the number of histories each time some are done.

    Raises:
        ValueError: there are no histories, or two rows have one index.
        OSError: the folder has no room for the file.
    """

    def __init__(
        self,
        model: CollaborativeModel,
        histories: Histories,
        *,
        copies: int,
        share: float,
        candidates: int,
        temperature: float,
        generator: torch.Generator,
        later: int = 0,
        beyond: int = 0,
        epsilon: float = 0.0,
        folder: str | os.PathLike[str] | None = None,
        advance: Callable[[int], Any] = lambda done: None,
    ) -> None:
        if not len(histories):
            raise ValueError("histories has no rows, needs one at least")
        if len(histories.index.unique()) < len(histories):
            raise ValueError("histories has rows of one index, needs another for each")
        self.copies = copies
        self._later = later
        self._row = torch.full((int(histories.index.max()) + 1,), -1)
        self._row[histories.index] = torch.arange(len(histories))
        self._beyond = histories.further(beyond)
        rows = make_room({"items": histories.items, "value": histories.value}, self._beyond)
        lengths = (rows["items"] >= 0).sum(1)
        contexts = ((lengths + self._beyond).clamp(max=rows["items"].shape[1]) - 1).clamp(min=0)
        self._begin = contexts.cumsum(0) - contexts
        self._items = rows["items"].repeat(copies, 1, 1)
        self._value = rows["value"].repeat(copies, 1, 1)
        kept = min(candidates, model.num_items)
        shape = (copies, int(contexts.sum()), kept)
        require_room(histories, copies=copies, candidates=kept, beyond=beyond, folder=folder)
        self._candidates = _mapped(shape, np.int32, folder) if kept else None
        self._scores = _mapped(shape, np.float32, folder) if kept else None
        self._rows_at_once = max(1, min(_ROWS, LOGITS_PER_CHUNK // model.num_items))
        # Spread over a history's copies, so that hardly any lacks one that keeps all of it.
        offset = torch.rand(len(lengths), 1, generator=generator, device=generator.device).cpu()
        steps = (torch.arange(1 + copies) * share + offset).floor()
        self._keeps = (steps[:, 1:] == steps[:, :-1]).T
        for some in lengths.argsort(stable=True).split(self._rows_at_once):
            self._fill(model, some, temperature, epsilon, generator)
            advance(len(some))

    def _fill(
        self,
        model: CollaborativeModel,
        rows: Tensor,
        temperature: float,
        epsilon: float,
        generator: torch.Generator,
    ) -> None:
        beyond, device = self._beyond[rows], generator.device
        width = max(2, int(((self._items[0, rows] >= 0).sum(1) + beyond).max()))
        part = {"items": self._items[0, rows, :width], "value": self._value[0, rows, :width]}
        part = {name: column.to(device) for name, column in part.items()}
        begin = self._begin[rows]
        if self._candidates is not None:
            place, past, ahead = _growing(part["items"], 1 + self._later)
            context = begin[place[:, 0].cpu()] + place[:, 1].cpu()
            for some in torch.arange(len(context)).split(self._rows_at_once):
                scores = model.scores(past[some]).to(past.device, torch.float32)
                best = best_items(scores, ahead[some], self._candidates.shape[2])
                self._keep(slice(None), context[some], *best)
        for copy in range(self.copies):

            def note(drawn: Tensor, position: int, items: Tensor, scores: Tensor, copy: int = copy) -> None:
                self._keep(copy, begin[drawn.cpu()] + position - 1, items, scores)

            among = 0 if self._candidates is None else self._candidates.shape[2]
            keep = self._keeps[copy, rows].to(device)
            rolled = roll_out(
                model, part, generator, temperature, among, note, beyond.to(device), keep, epsilon
            )
            self._items[copy, rows, :width] = rolled["items"].cpu()
            self._value[copy, rows, :width] = rolled["value"].cpu()

    def _keep(self, copy: int | slice, context: Tensor, items: Tensor, scores: Tensor) -> None:
        assert self._candidates is not None and self._scores is not None
        self._candidates[copy, context] = items.to("cpu", torch.int32)
        self._scores[copy, context] = scores.cpu()

    def histories(self, index: Tensor, copy: Tensor, width: int) -> dict[str, Tensor]:
        """Histories by their index, "items" and "value" (B, width); `copy` (B,) says which of theirs."""
        rows = self._row[index]
        return {"items": self._items[copy, rows, :width], "value": self._value[copy, rows, :width]}

    def candidates(self, index: Tensor, copy: Tensor) -> tuple[Tensor, Tensor] | None:
        """Best items and scores (C, M) of these histories' contexts, in order; None if none are kept."""
        if self._candidates is None or self._scores is None:
            return None
        rows = self._row[index]
        contexts = ((self._items[copy, rows] >= 0).sum(1) - 1).clamp(min=0)
        row = torch.arange(len(rows)).repeat_interleave(contexts)
        place = torch.arange(len(row)) - (contexts.cumsum(0) - contexts)[row]
        context = self._begin[rows][row] + place
        return self._candidates[copy[row], context].long(), self._scores[copy[row], context]


def require_room(
    histories: Histories,
    *,
    copies: int,
    candidates: int,
    beyond: int,
    folder: str | os.PathLike[str] | None = None,
) -> None:
    """Raises OSError if `folder` lacks room for a `RolloutPool`."""
    contexts = round(histories.contexts(beyond) * len(histories))
    size = 8 * copies * candidates * contexts
    place = os.fspath(folder or tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    if size > free:
        raise OSError(
            f"the candidates of all rollouts take {_bytes(size)}, {place!r} has {_bytes(free)}; "
            "a larger rollout_reuse or fewer reward_candidates take less, rollout_reuse=0 takes none"
        )


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"


def _mapped(shape: tuple[int, ...], dtype: type[np.generic], folder: str | os.PathLike[str] | None) -> Tensor:
    """Zeros that the system may write out where memory is short; the file goes with the last who reads it."""
    if not math.prod(shape):
        return torch.from_numpy(np.empty(shape, dtype))
    with tempfile.TemporaryFile(dir=folder) as file:
        return torch.from_numpy(np.memmap(file, dtype, "w+", shape=shape))


def _growing(items: Tensor, ahead: int) -> tuple[Tensor, Tensor, Tensor]:
    """All contexts of histories (B, W): row and place (C, 2), what came before and comes next.

    (C, W - 1) and (C, ahead), -1 where there is none.
    """
    place = (items[:, 1:] >= 0).nonzero()
    past = items[place[:, 0], :-1]
    past = past.masked_fill(torch.arange(past.shape[1], device=past.device) > place[:, 1:], -1)
    padded = functional.pad(items, (0, ahead), value=-1)
    column = place[:, 1:] + 1 + torch.arange(ahead, device=items.device)
    return place, past, padded[place[:, :1], column]
