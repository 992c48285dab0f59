"""Contexts that nobody was seen in: a recommender goes on with a history from some point on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gflowgr.collaborative import CollaborativeModel


@torch.no_grad()
def roll_out(
    model: CollaborativeModel,
    histories: dict[str, Tensor],
    generator: torch.Generator,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Whole histories of which the latter part, of random length, is drawn from `model` instead.

    Of a history of n items the first 1 to n - 1 stay, each number as likely; every further item is drawn from
    the softmax of the model's scores after those before it, among the items that the history lacks. A drawn
    item is worth 0: no user was seen to take it.

    Args:
        model: the recommender.
        histories: "items" (B, W) int64, oldest first, -1 on the right; "value" (B, W), their worth.
        generator: of the draws, on the device of the items.
        temperature: what the scores are divided by.

    Returns:
        both, of the same shape; rows of one item are as they were.
    """
    items = histories["items"]
    lengths = (items >= 0).sum(1)
    share = torch.rand(len(items), generator=generator, device=items.device)
    kept = 1 + (share * (lengths - 1)).long()
    column = torch.arange(items.shape[1], device=items.device)
    drawn = (column >= kept[:, None]) & (column < lengths[:, None])
    items = items.masked_fill(drawn, -1)
    for position in range(1, items.shape[1]):
        rows = drawn[:, position].nonzero()[:, 0]
        if not len(rows):
            continue
        past = items[rows, :position]
        scores = model.scores(past).to(items.device, torch.float32)
        unseen = scores.scatter(1, past, -torch.inf)
        # Whoever has had the whole catalogue has to repeat an item.
        scores = torch.where(unseen.amax(1, keepdim=True) > -torch.inf, unseen, scores)
        mass = (scores / temperature).softmax(1).cumsum(1)
        point = torch.rand(len(rows), 1, generator=generator, device=items.device) * mass[:, -1:]
        # Rounding may put the point on the end of the line.
        chosen = torch.searchsorted(mass, point, right=True).clamp(max=mass.shape[1] - 1)
        items[rows, position] = chosen[:, 0]
    return {"items": items, "value": histories["value"].masked_fill(drawn, 0)}


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
