"""Rewards of items in a context: the terms, how they are fused, and what is kept apart for the log."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

# Below the smallest normal number a reciprocal overflows; a total that small counts as none.
TINY = torch.finfo(torch.float32).tiny
# Favoured by trial runs on sparse logs, where most of the gain is the recommender's knowledge.
DEFAULT_WEIGHTS = {"collaborative": 0.8, "interaction": 0.2}
FUSIONS = ("mixture", "sum", "weights", "mlp")
NORMALISATIONS = ("softmax", "standardised", "unit")


@dataclass(frozen=True)
class RewardContext:
    """What is known of a batch of contexts.

    `history` (B, H) int64, right-padded with -1; `target` (B,) int64, the observed item, and `value`
    (B,) float, what the interaction was worth; `future` (B, F) int64 and `future_value` (B, F) float,
    the user's later items, padded with -1, or None; `scores` (B, N) float, a recommender's, or None.
    With `candidates` (B, M) int64, distinct items, these alone can have a reward, and `scores` (B, M) are
    theirs.
    Raises ValueError for shapes that do not fit together.
    """

    history: Tensor
    target: Tensor
    value: Tensor
    future: Tensor | None = None
    future_value: Tensor | None = None
    scores: Tensor | None = None
    candidates: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.target.shape
        if self.target.dim() != 1:
            raise ValueError(f"target: got shape {tuple(size)}, need (B,)")
        if self.value.shape != size:
            raise ValueError(f"value: got shape {tuple(self.value.shape)}, need {tuple(size)}, one a target")
        if self.history.dim() != 2 or self.history.shape[0] != size[0]:
            raise ValueError(f"history: got shape {tuple(self.history.shape)}, need ({size[0]}, H)")
        if (self.future is None) != (self.future_value is None):
            raise ValueError("future, future_value: need both or neither")
        if self.future is not None and self.future_value is not None:
            if self.future.dim() != 2 or self.future.shape[0] != size[0]:
                raise ValueError(f"future: got shape {tuple(self.future.shape)}, need ({size[0]}, F)")
            if self.future_value.shape != self.future.shape:
                raise ValueError(
                    f"future_value: got shape {tuple(self.future_value.shape)}, "
                    f"need future's {tuple(self.future.shape)}"
                )
        if self.scores is not None and (self.scores.dim() != 2 or self.scores.shape[0] != size[0]):
            raise ValueError(f"scores: got shape {tuple(self.scores.shape)}, need ({size[0]}, N)")
        if self.candidates is None:
            return
        if self.candidates.dim() != 2 or self.candidates.shape[0] != size[0]:
            raise ValueError(f"candidates: got shape {tuple(self.candidates.shape)}, need ({size[0]}, M)")
        if self.scores is not None and self.scores.shape != self.candidates.shape:
            raise ValueError(
                f"scores: got shape {tuple(self.scores.shape)}, need that of the candidates, "
                f"{tuple(self.candidates.shape)}"
            )


# (context, items (B, K)) -> (B, K) floating, finite and not negative. For the whole catalogue the items are
# one row of all ids, expanded to (B, N) without copying.
RewardTerm: TypeAlias = Callable[[RewardContext, Tensor], Tensor]


@dataclass(frozen=True)
class Rewards:
    """`log_rewards` (B, K) or (B, N) float32, and every term's own value, same shape, before any fusion."""

    log_rewards: Tensor
    terms: dict[str, Tensor]


class InteractionReward:
    """r_a: what the observed interaction was worth; 0 for items the user was not seen with.

    The target earns its `value`, a later item of the log `future_scale` times its own. That is 0 unless set:
    in a mixture later items share this term's mass with the target. Training on whole histories knows the
    next five items of the row. `mapping` turns logged values into rewards first (say `{1.0: 1.0, 2.0: 10.0}`
    where the log writes 1 for a click and 2 for a like); a value that it lacks raises ValueError. GFlowGR
    (arXiv 2506.16114), interaction reward; the later items are not in the paper.
    """

    def __init__(self, mapping: Mapping[float, float] | None = None, *, future_scale: float = 0.0) -> None:
        _check_number("future_scale", future_scale, least=0.0)
        if mapping is not None and not (isinstance(mapping, Mapping) and mapping):
            raise ValueError(f"mapping: got {mapping or 'none'}, need the reward of each logged value")
        for value, reward in (mapping or {}).items():
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"mapping: got the logged value {value!r}, need a number")
            _check_number(f"mapping[{value}]", reward, least=0.0)
        self.mapping = None if mapping is None else dict(mapping)
        self.future_scale = future_scale

    def __call__(self, context: RewardContext, items: Tensor) -> Tensor:
        target_reward = self._rewards("value", context.value)
        reward = torch.where(items == context.target[:, None], target_reward[:, None], 0.0)
        if context.future is None or context.future_value is None or self.future_scale == 0.0:
            return reward
        later = self._later_rewards(context)
        # Latest column first, so that the earliest mention of an item is the one that stays, as in
        # catalogue().
        for column in reversed(range(later.shape[1])):
            same = items == context.future[:, column, None]
            reward = torch.where(same, later[:, column, None], reward)
        return torch.where(items == context.target[:, None], target_reward[:, None], reward)

    def catalogue(self, context: RewardContext, num_items: int) -> Tensor:
        """The same for all items, (B, N): a few scattered values instead of comparisons with every item."""
        target_reward = self._rewards("value", context.value)
        reward = target_reward.new_zeros(len(target_reward), num_items)
        if context.future is not None and context.future_value is not None and self.future_scale > 0.0:
            later = self._later_rewards(context)
            for column in reversed(range(later.shape[1])):
                item = context.future[:, column]
                known = (item >= 0).nonzero().squeeze(1)
                reward[known, item[known]] = later[known, column]
        return reward.scatter(1, context.target[:, None], target_reward[:, None])

    def _later_rewards(self, context: RewardContext) -> Tensor:
        assert context.future is not None and context.future_value is not None
        known = context.future >= 0
        rewards = torch.zeros_like(context.future_value, dtype=torch.float32)
        rewards[known] = self.future_scale * self._rewards("future_value", context.future_value[known])
        return rewards

    def _rewards(self, name: str, values: Tensor) -> Tensor:
        values = values.float()
        if self.mapping is None:
            return values
        logged = values.new_tensor(sorted(self.mapping))
        rewards = values.new_tensor([self.mapping[value] for value in sorted(self.mapping)])
        position = torch.searchsorted(logged, values).clamp(max=len(logged) - 1)
        # What nobody was seen to take is worth nothing, whatever else the log knows.
        unknown = (logged[position] != values) & (values != 0.0)
        if bool(unknown.any()):
            raise ValueError(
                f"{name}: got {float(values[unknown][0])}, which the mapping lacks; "
                f"it has {sorted(self.mapping)}"
            )
        return torch.where(logged[position] == values, rewards[position], 0.0)


class UniformReward:
    """The same for every item: in a mixture beside the observed item this is label smoothing over items."""

    def __call__(self, context: RewardContext, items: Tensor) -> Tensor:
        return torch.ones(items.shape, device=items.device)


class CollaborativeReward:
    """r_y: a recommender's scores (`context.scores`) made non-negative, row by row.

    `"softmax"`: probabilities at `temperature` (for scores that are logits, such as SASRec's).
    `"standardised"`: the logistic function of the score's z-value over `temperature`, in (0, 1).
    `"unit"`: the lowest score goes to 0, the highest to 1, linearly (for scores that are sums of
    similarities). A row of equal scores has no opinion: all its items get the same value. A score of -inf
    gives 0. Raises ValueError where there are no scores, or a NaN or +inf among them.
    """

    def __init__(self, normalisation: str = "softmax", *, temperature: float = 1.0) -> None:
        if normalisation not in NORMALISATIONS:
            near = _near(normalisation, NORMALISATIONS)
            raise ValueError(f"normalisation: got {normalisation!r}, need one of {NORMALISATIONS}{near}")
        _check_number("temperature", temperature, above=0.0)
        self.normalisation = normalisation
        self.temperature = temperature

    def __call__(self, context: RewardContext, items: Tensor) -> Tensor:
        normalised = self._normalised(context)
        return normalised if items is context.candidates else normalised.gather(1, items)

    def catalogue(self, context: RewardContext, num_items: int) -> Tensor:
        """The same for all items, (B, N)."""
        return self._normalised(context)

    def _normalised(self, context: RewardContext) -> Tensor:
        if context.scores is None:
            raise ValueError("scores: got None, the collaborative reward needs (B, N)")
        scores = context.scores.float()
        highest = scores.amax(1, keepdim=True)
        if not bool((highest < math.inf).all()):
            raise ValueError("scores: got NaN or +inf, need numbers (or -inf for an item without reward)")
        if not bool((highest > -math.inf).all()):
            raise ValueError("scores: got a row of -inf alone, need a number in each row")
        if self.normalisation == "softmax":
            return torch.softmax(scores if self.temperature == 1.0 else scores / self.temperature, dim=1)
        barred = scores == -math.inf
        if self.normalisation == "unit":
            lowest = scores.masked_fill(barred, math.inf).amin(1, keepdim=True)
            span = highest - lowest
            unit = torch.where(span > 0, (scores - lowest) / span.clamp(min=TINY), 1.0)
            return unit.masked_fill(barred, 0.0)
        finite = scores.masked_fill(barred, 0.0)
        count = (~barred).sum(1, keepdim=True)
        centred = (finite - finite.sum(1, keepdim=True) / count).masked_fill(barred, 0.0)
        deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
        z = centred / deviation.clamp(min=TINY)
        return torch.sigmoid(z / self.temperature).masked_fill(barred, 0.0)


class SimilarityReward(nn.Module):
    """r_sim: in how many positions an item's code equals the target's; L for the target itself.

    `codes` (N, L) integers, the items' semantic IDs; positions padded with -1 never count.
    GFlowGR (arXiv 2506.16114), similarity reward.
    """

    codes_by_level: Tensor

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        if codes.dim() != 2 or codes.is_floating_point() or codes.dtype == torch.bool or codes.numel() == 0:
            raise ValueError(f"codes: got {codes.dtype} of shape {tuple(codes.shape)}, need integers (N, L)")
        # One contiguous row a level, narrow: the comparison over a whole catalogue is bound by memory.
        self.register_buffer("codes_by_level", codes.T.to(torch.int32).contiguous(), persistent=False)

    def forward(self, context: RewardContext, items: Tensor) -> Tensor:
        return self._count(context, lambda level: level[items])

    def catalogue(self, context: RewardContext, num_items: int) -> Tensor:
        """The same for all items, (B, N)."""
        if self.codes_by_level.shape[1] != num_items:
            raise ValueError(
                f"codes: got {self.codes_by_level.shape[1]} items, need the catalogue's {num_items}"
            )
        return self._count(context, lambda level: level[None, :])

    def _count(self, context: RewardContext, codes_of: Callable[[Tensor], Tensor]) -> Tensor:
        total: Tensor | None = None
        for level in self.codes_by_level:
            wanted = level[context.target]
            # -2 equals neither a code nor the padding.
            equal = (codes_of(level) == torch.where(wanted < 0, -2, wanted)[:, None]).to(torch.uint8)
            total = equal if total is None else total.add_(equal)
        assert total is not None
        return total.float()


class RewardModel(nn.Module):
    """Fuses reward terms into log R(x | u), keeping each term apart for the log.

    `terms` maps a name to a `RewardTerm`. A term may also have `catalogue(context, num_items)` that
    gives (B, N) at once; terms that are modules are registered, so that `to(device)` takes them along.

    Fusions, for terms `t_k` and weights `w_k`:

    * `"mixture"` (default): `R(x) = sum_k w_k p_k(x)`, `p_k(x) = t_k(x) / sum_x' t_k(x')` over the
      whole catalogue. The weights say how much mass each term has, whatever its unit. They are at least 0
      and are divided by their sum. When not given they are `DEFAULT_WEIGHTS` for terms of exactly
      those names, and equal otherwise. A term that is 0 everywhere in a context says nothing there: its
      share goes to the other terms in proportion to their weights (without any, all items get the floor
      alone).
    * `"sum"`: `R(x) = sum_k w_k t_k(x)`, with weights of 1 the paper's literal form. A term with little
      at each of many items outweighs one with much at a single item.
    * `"weights"`: as `"mixture"`, with learned weights.
    * `"mlp"`: a small network reads `log(1 + N p_k(x))` of every term; its positive outputs are
      normalised over the catalogue. Its weights are kept positive: an item that is ahead of another in
      every term is so in the reward.

    What keeps learned fusions honest. A balance loss only compares log R with log Z + log P_F, so whatever
    moves R towards what the policy already does lowers it. First, the scale: a common factor of all rewards
    only shifts Z, so the loss does not determine it, be Z exact, estimated or learned, and it drifts. Hence
    learned rewards are distributions by construction (softmax weights over distributions, or one
    normalisation over the catalogue). Second, the shape: the reward may still drop the terms that the policy
    finds hard. Hence half of the mass stays, by default, with the fixed mixture of `weights` (`anchor`); only
    the rest is learned. The parameters are ordinary ones: put the model inside the wrapped module that the
    optimiser sees.

    R is never below `floor`, in the unit of the fused reward (probability for all but `"sum"`), since
    most items of most terms are 0; keep `floor * N` well under 1. `scale` multiplies R: it adds
    log(scale) to log Z and leaves the distribution as it is.

    Raises ValueError for unknown fusions or weights that do not fit the terms; and, naming the term, for a
    term that returns another shape, a dtype that is not floating, NaN, infinite or negative values.

    Source: GFlowGR (arXiv 2506.16114), reward model, for "sum" and the idea of learned weights and MLP;
    everything normalised is not in the paper.
    """

    def __init__(
        self,
        terms: Mapping[str, RewardTerm],
        *,
        num_items: int,
        fusion: str = "mixture",
        weights: Mapping[str, float] | None = None,
        floor: float = 1e-8,
        scale: float = 1.0,
        anchor: float = 0.5,
        hidden_size: int = 8,
    ) -> None:
        super().__init__()
        if not terms:
            raise ValueError("terms: got none, need at least one")
        for name, term in terms.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"terms: got the name {name!r}, need an identifier")
            if not callable(term):
                raise TypeError(f"terms: {name!r} is a {type(term).__name__}, need a callable")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion: got {fusion!r}, need one of {FUSIONS}{_near(fusion, FUSIONS)}")
        _check_number("num_items", num_items, least=1, kind=Integral)
        _check_number("floor", floor, above=0.0)
        _check_number("scale", scale, above=0.0)
        _check_number("anchor", anchor, least=0.0, most=1.0)
        self.terms = dict(terms)
        self.term_modules = nn.ModuleDict({n: t for n, t in terms.items() if isinstance(t, nn.Module)})
        self.num_items = int(num_items)
        self.fusion = fusion
        self.floor = floor
        self.scale = scale
        self.anchor = anchor
        self.weights = _term_weights(weights, tuple(terms), normalise=fusion != "sum")
        if fusion == "weights":
            # Starts at the given weights; a weight of 0 starts small instead, or it could never be learned.
            start = torch.tensor([max(self.weights[name], 1e-3) for name in terms])
            self.weight_logits = nn.Parameter(start.log())
        elif fusion == "mlp":
            self.mlp = _PositiveMLP(len(terms), hidden_size)

    @property
    def reads_future(self) -> bool:
        """Whether a term rewards later items of the user's log."""
        return any(getattr(term, "future_scale", 0.0) > 0.0 for term in self.terms.values())

    def forward(self, context: RewardContext, items: Tensor | None = None) -> Rewards:
        """Log-rewards of `items` (B, K) int64, or of the whole catalogue: (B, K) or (B, N), float32.

        All fusions but "sum" normalise over the catalogue, so they evaluate every term on all of it even
        for a few items. A context with candidates knows no other items: they are its catalogue, and the
        log-rewards are theirs, (B, M). Reads one flag a term back to the host, to raise for a term that
        misbehaves.
        """
        self._check(context, items)
        if items is not None and self.fusion == "sum":
            terms = {name: self._on_items(name, context, items) for name in self.terms}
            return Rewards(self._log(self._weighted(terms)), terms)
        terms = {name: self._on_catalogue(name, context) for name in self.terms}
        log_rewards = self._log(self._fuse(terms))
        if items is None:
            return Rewards(log_rewards, terms)
        return Rewards(
            log_rewards.gather(1, items), {name: term.gather(1, items) for name, term in terms.items()}
        )

    def mixture_weights(self) -> dict[str, float]:
        """The weight of each term as it stands, learned part included; for the log ("mlp": the anchor's)."""
        if self.fusion == "weights":
            return dict(zip(self.terms, self._learned_weights().tolist(), strict=True))
        return dict(self.weights)

    def _fuse(self, terms: dict[str, Tensor]) -> Tensor:
        if self.fusion == "sum":
            return self._weighted(terms)
        totals = {name: term.sum(1, keepdim=True) for name, term in terms.items()}
        fixed = torch.tensor([self.weights[name] for name in terms], device=next(iter(terms.values())).device)
        if self.fusion == "mixture":
            return _mixture(terms, totals, fixed)
        if self.fusion == "weights":
            return _mixture(terms, totals, self._learned_weights())
        shares = [self.num_items * term / _nonzero(totals[name]) for name, term in terms.items()]
        with torch.autocast(shares[0].device.type, enabled=False):
            learned = self.mlp(torch.log1p(torch.stack(shares)))
        learned = learned / learned.sum(1, keepdim=True)
        return self.anchor * _mixture(terms, totals, fixed) + (1.0 - self.anchor) * learned

    def _learned_weights(self) -> Tensor:
        fixed = self.weight_logits.new_tensor(list(self.weights.values()))
        return self.anchor * fixed + (1.0 - self.anchor) * torch.softmax(self.weight_logits.float(), 0)

    def _weighted(self, terms: dict[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum(0)

    def _log(self, reward: Tensor) -> Tensor:
        log_reward = reward.clamp(min=self.floor).log()
        return log_reward if self.scale == 1.0 else log_reward + math.log(self.scale)

    def _on_items(self, name: str, context: RewardContext, items: Tensor) -> Tensor:
        return self._checked(name, self.terms[name](context, items), tuple(items.shape))

    def _on_catalogue(self, name: str, context: RewardContext) -> Tensor:
        shape = (len(context.target), self.num_items)
        term = self.terms[name]
        if context.candidates is not None:
            return self._on_items(name, context, context.candidates)
        if hasattr(term, "catalogue"):
            return self._checked(name, term.catalogue(context, self.num_items), shape)
        items = torch.arange(self.num_items, device=context.target.device).expand(shape)
        return self._checked(name, term(context, items), shape)

    def _checked(self, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(value, Tensor):
            raise ValueError(
                f"terms: {name!r} returned a {type(value).__name__}, need a tensor of shape {shape}"
            )
        if tuple(value.shape) != shape:
            raise ValueError(f"terms: {name!r} returned shape {tuple(value.shape)}, need {shape}")
        if not value.is_floating_point():
            raise ValueError(f"terms: {name!r} returned {value.dtype}, need a floating dtype")
        value = value.float()
        if value.numel() == 0:
            return value
        lowest, highest = value.detach().aminmax()
        # A larger value could make the sum over the catalogue overflow.
        limit = torch.finfo(torch.float32).max / self.num_items
        if not bool((lowest >= 0.0) & (highest < limit)):
            if math.isnan(float(lowest)):
                got = f"NaN in {int(value.isnan().sum())} of {value.numel()} places"
            else:
                got = f"values from {float(lowest):g} to {float(highest):g}"
            raise ValueError(
                f"terms: {name!r} returned {got}, need numbers of at least 0 and below {limit:.3g}"
            )
        return value

    def _check(self, context: RewardContext, items: Tensor | None) -> None:
        size = len(context.target)
        if context.candidates is not None and items is not None:
            raise ValueError("items: got some beside candidates, need None, as only candidates are rewarded")
        no_candidates = context.candidates is None
        if no_candidates and context.scores is not None and context.scores.shape[1] != self.num_items:
            raise ValueError(
                f"scores: got shape {tuple(context.scores.shape)}, need (B, N) = {(size, self.num_items)}"
            )
        if items is None:
            return
        if items.is_floating_point() or items.dtype == torch.bool:
            raise TypeError(f"items: got {items.dtype}, need a tensor of integers")
        if items.dim() != 2 or items.shape[0] != size:
            raise ValueError(f"items: got shape {tuple(items.shape)}, need ({size}, K)")
        if items.numel() and (int(items.min()) < 0 or int(items.max()) >= self.num_items):
            raise ValueError(
                f"items: got ids from {int(items.min())} to {int(items.max())}, "
                f"need 0 to {self.num_items - 1}"
            )


class _PositiveMLP(nn.Module):
    """Two layers with positive weights and a positive output: never decreasing in any input."""

    def __init__(self, num_terms: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(num_terms, hidden_size)
        self.output = nn.Linear(hidden_size, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(terms, B, N) -> (B, N)."""
        # Terms first makes both layers one matrix product over all items, several times faster than last.
        flat = features.flatten(1)
        hidden = torch.addmm(self.hidden.bias[:, None], functional.softplus(self.hidden.weight), flat)
        weight = functional.softplus(self.output.weight)
        output = torch.addmm(self.output.bias[:, None], weight, functional.elu(hidden))
        return functional.softplus(output).view(features.shape[1:])


def _mixture(terms: dict[str, Tensor], totals: dict[str, Tensor], weights: Tensor) -> Tensor:
    active = torch.cat(
        [weight * (totals[name] >= TINY) for name, weight in zip(terms, weights, strict=True)], dim=1
    )
    shares = active / _nonzero(active.sum(1, keepdim=True))
    columns = shares.split(1, dim=1)
    fused: Tensor | None = None
    for (name, term), column in zip(terms.items(), columns, strict=True):
        factor = column / _nonzero(totals[name])
        fused = term * factor if fused is None else torch.addcmul(fused, term, factor)
    assert fused is not None
    return fused


def _nonzero(total: Tensor) -> Tensor:
    return torch.where(total >= TINY, total, 1.0)


def _term_weights(
    weights: Mapping[str, float] | None, names: tuple[str, ...], *, normalise: bool
) -> dict[str, float]:
    if weights is None:
        is_default = normalise and set(names) == set(DEFAULT_WEIGHTS)
        given = {name: DEFAULT_WEIGHTS[name] if is_default else 1.0 for name in names}
    else:
        for name in weights:
            if name not in names:
                raise ValueError(f"weights: got {name!r}, need one for each of {names}{_near(name, names)}")
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"weights: got none for {missing}, need one for each of {names}")
        for name in names:
            _check_number(f"weights[{name!r}]", weights[name], least=0.0)
        given = {name: float(weights[name]) for name in names}
    total = sum(given.values())
    if total == 0.0:
        raise ValueError("weights: got 0 for every term, need one above 0")
    return {name: weight / total for name, weight in given.items()} if normalise else given


def _check_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    kind: type = Real,
) -> None:
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    number = float(value) if is_number else math.nan  # type: ignore[arg-type]
    if not (math.isfinite(number) and least <= number <= most and number > above):
        bounds = {"at least": least, "above": above, "at most": most}
        need = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound))
        raise ValueError(
            f"{name}: got {value!r}, need {'an integer' if kind is Integral else 'a number'} {need}"
        )


def _near(name: object, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
