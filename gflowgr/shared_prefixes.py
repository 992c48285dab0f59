"""A SASRec's scores, or a mixture's, for histories that grow item by item, as whole histories do."""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr.collaborative import Mixture, SASRec


class SharedPrefixes:
    """The same scores as the model's own, with one pass over all rows that begin one another.

    A causal model has met every prefix of a history on its way through it. Where a row is the beginning of
    the next one, only the longer is run, and the shorter's state is read off on the way: for a whole history
    of n items, n times less work for a SASRec; the neighbours' half of a mixture costs what it costs.
    """

    def __init__(self, model: SASRec | Mixture) -> None:
        self.model = model
        self.sasrec = model.sasrec if isinstance(model, Mixture) else model
        self.num_items = model.num_items

    @torch.no_grad()
    def scores(self, histories: Tensor) -> Tensor:
        """(B, H) item ids, oldest first, right-padded with -1 -> (B, N) float32."""
        network = self.sasrec.network
        if histories.shape[0] < 2 or histories.shape[1] > network.max_history:
            return self.model.scores(histories)
        lengths = (histories >= 0).sum(1)
        begins_next = ((histories[:-1] == histories[1:]) | (histories[:-1] < 0)).all(1)
        longest = torch.cat([~begins_next, begins_next.new_ones(1)])
        row = longest.cumsum(0) - longest.long()
        device = network.start.device
        read = histories[longest].to(device)
        states = torch.cat([network(rows) for rows in read.split(self.sasrec.rows_per_batch)])
        logits: Tensor = network.logits(states[row.to(device), lengths.to(device)])
        if isinstance(self.model, Mixture):
            logits = self.model.mixed(logits, histories)
        return logits.to(histories.device)
