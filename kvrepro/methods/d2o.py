"""D2O (Wan et al., 2024): evict by accumulated attention, merge what is similar enough."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvrepro import kernels
from kvrepro.attention import Step
from kvrepro.methods.base import Method, option
from kvrepro.slots import Slots, compact, mix, partition, select, take, total_at

#: Similarities that the twin holds at once, in elements.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Eviction:
    """What a choice of kept slots leaves, and where each evicted slot could go.

    Attributes:
        keep: `[B, H_kv, S]` bool, the choice.
        order: `[B, H_kv, S]` int64, the evicted slots and then the kept ones (`slots.partition`).
        place: `[B, H_kv, S]` int64, each slot's place in `order`.
        evicted: `[B, H_kv, E]` bool, of the first E = S - size slots in `order`, those that hold something; None: all.
        similarity: `[B, H_kv, E]` float32, the cosine with the most similar kept key.
        nearest: `[B, H_kv, E]` int64 or int32, that slot's place among the `size` that stay.
        size: slots that stay.
    """

    keep: Tensor
    order: Tensor
    place: Tensor
    evicted: Tensor | None
    similarity: Tensor
    nearest: Tensor
    size: int

    @property
    def gone(self) -> Tensor:
        """`[B, H_kv, E]` int64: the slots that are not among those that stay."""
        return self.order[..., : self.similarity.shape[2]]

    @property
    def exists(self) -> Tensor:
        """`[B, H_kv, E]` bool: `evicted` written out."""
        return torch.ones_like(self.nearest, dtype=torch.bool) if self.evicted is None else self.evicted

    def target(self, joins: Tensor) -> Tensor:
        """`[B, H_kv, S]` int64: the place each slot goes to, given which of the evicted join `[B, H_kv, E]`.

        What goes nowhere has the target `size`.
        """
        stays = torch.where(self.keep, self.place - joins.shape[2], self.size)
        return stays.scatter(2, self.gone, torch.where(joins, self.nearest, self.size).long())

    def spread(self, weight: Tensor) -> Tensor:
        """`[B, H_kv, S]`: the weight `[B, H_kv, E]` of each evicted slot, 1 for the others."""
        return weight.new_ones(self.order.shape).scatter_(2, self.gone, weight)


def evict(slots: Slots, keep: Tensor, budget: int) -> Eviction:
    """Find for every evicted slot the kept slot whose key is most similar to its own.

    Args:
        slots: `S` slots a head.
        keep: `[B, H_kv, S]` bool, filled slots, at most `budget` a head; as many as fit where no slot is empty.
        budget: slots a head may keep.
    """
    size = min(budget, slots.size)
    order, place = partition(keep)
    gone, kept = order.split([slots.size - size, size], dim=2)
    valid = evicted = None
    if slots.ragged:
        valid, evicted = keep.gather(2, kept), (slots.valid & ~keep).gather(2, gone)
    return Eviction(keep, order, place, evicted, *nearest_kept(slots.keys, gone, kept, valid), size)


def nearest_kept(keys: Tensor, gone: Tensor, kept: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """For every evicted slot, the kept slot whose key is most similar to its own.

    Args:
        keys: `[B, H_kv, S, d]`.
        gone: `[B, H_kv, E]` int64, the evicted slots.
        kept: `[B, H_kv, K]` int64, the kept ones.
        valid: `[B, H_kv, K]` bool, those of them that hold something; None: all.

    Returns:
        Cosine similarity `[B, H_kv, E]` float32, -inf where nothing is kept, and the place in `kept`
        `[B, H_kv, E]` int64 or int32, of equal ones the first.
    """
    if kernels.covers(keys) and gone.numel() and kept.numel():
        from kvrepro.kernels import merging

        return merging.nearest(keys, gone, kept, valid)
    valid = torch.ones_like(kept, dtype=torch.bool) if valid is None else valid
    unit = normalize(take(keys, kept).float(), dim=-1).transpose(2, 3)
    similarity = torch.empty(gone.shape, dtype=torch.float32, device=keys.device)
    nearest = torch.empty_like(gone)
    rows = max(1, _BLOCK // max(1, valid.numel()))
    for start in range(0, gone.shape[2], rows):
        part = gone[..., start : start + rows]
        cosine = normalize(take(keys, part).float(), dim=-1) @ unit
        best = cosine.masked_fill_(~valid.unsqueeze(2), -torch.inf).max(dim=3)
        similarity[..., start : start + rows], nearest[..., start : start + rows] = best.values, best.indices
    return similarity, nearest


@dataclass(frozen=True)
class Merged:
    """What is at each place after a merge.

    Attributes:
        keys: `[B, H_kv, size, d]`.
        values: `[B, H_kv, size, d_v]`.
        cardinality: `[B, H_kv, size]` int32.
    """

    keys: Tensor
    values: Tensor
    cardinality: Tensor

    def fill(self, slots: Slots, plan: Eviction) -> Slots:
        """The kept ones of `slots` with these contents."""
        content = (self.keys, self.values)
        left = compact(slots, plan.keep, plan.size, order=plan.order, content=content, whole=not slots.ragged)
        return dataclasses.replace(left, cardinality=self.cardinality)


def merge(slots: Slots, plan: Eviction, old: Tensor, alpha: float) -> tuple[Merged, Tensor]:
    """Merge what passes the threshold, weighted by cosine; a kept slot has cosine 1 with itself.

    Args:
        slots: `S` slots a head.
        plan: which of them are evicted.
        old: `[B, H_kv]` float32, the threshold before this eviction; NaN: none yet.
        alpha: its weight in the running mean.

    Returns:
        The merged slots, and the threshold: the running mean, which starts at the first eviction's mean similarity.
    """
    if kernels.covers(slots.keys, slots.values) and plan.size:
        from kvrepro.kernels import merging

        target, weight, new = merging.settle(
            plan.order, plan.keep, slots.cardinality, plan.similarity, plan.nearest, (old, alpha), ragged=slots.ragged
        )
        found = merging.merge(
            slots.keys, slots.values, target, weight, slots.cardinality, plan.size, whole=not slots.ragged, votes=False
        )
        return Merged(*found), new
    evicted, similarity = plan.exists, plan.similarity
    number = evicted.sum(dim=2)
    mean = similarity.masked_fill(~evicted, 0.0).sum(dim=2) / number.clamp_min(1)
    moved = torch.where(old.isnan(), mean, alpha * old + (1 - alpha) * mean)
    new = torch.where(number > 0, moved, old)
    target = plan.target(evicted & (similarity >= new.unsqueeze(2)) & (similarity > 0))
    weight = plan.spread(similarity)
    weight = weight / total_at(weight, target, plan.size).gather(2, target)
    keys, values = mix(slots, target, (weight, weight), plan.size)
    return Merged(keys, values, total_at(slots.cardinality, target, plan.size)[..., : plan.size]), new


@dataclass(frozen=True)
class D2O(Method):
    """H2O's choice; an evicted token is merged into its most similar kept one if it passes a running threshold."""

    name: ClassVar[str] = "d2o"
    title: ClassVar[str] = "D2O"
    kind: ClassVar[str] = "merging"
    paper: ClassVar[str] = "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference (ICLR 2025)"
    url: ClassVar[str] = "https://arxiv.org/abs/2406.13035"
    statistics: ClassVar[tuple[str, ...]] = ("mass",)
    accumulates: ClassVar[tuple[str, ...]] = ("mass",)

    sinks: int = option(4, "code: 4 sinks")
    recent: int | None = option(None, "ours: half of what the sinks leave (None)")
    alpha: float = option(0.5, "code: weight of the old threshold in its running mean; 1 - alpha of the new similarity")
    layer_budgets: str = option(
        "uniform",
        "ours: a budget is a bound on every layer; 'variance' (code) splits the sum by the variance of attention",
        ("uniform", "variance"),
    )
    whole_layers: bool = option(
        False,
        "ours: a budget is a bound on every layer; True (code) leaves layers 0, 1 and the last whole",
        (True, False),
    )

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        self.require_number("alpha", 0.0, 1.0)

    @property
    def shares_layers(self) -> bool:
        """Whether the layers' budgets depend on what all layers attend to."""
        return self.layer_budgets == "variance"

    def recent_of(self, budget: int) -> int:
        """Half of what the sinks leave unless set."""
        return max(1, (budget - self.sinks) // 2) if self.recent is None else self.recent

    def initial_state(self, slots: Slots) -> dict[str, Tensor]:
        """No threshold yet: NaN."""
        shape = slots.positions.shape[:2]
        return {"threshold": slots.positions.new_full(shape, torch.nan, dtype=torch.float32)}

    def layer_budget(self, budget: int, layer: int, layers: int) -> int | None:
        """The budget, or None for the layers that stay whole."""
        return None if self.whole_layers and layer in (0, 1, layers - 1) else budget

    def split(self, layers: list[Slots], steps: list[Step], budget: int) -> list[int]:
        """Each layer's slots, given the mean (ours; the paper says: by the variance of attention's column sums).

        A layer whose attention is spread evenly needs more slots: shares are exp(-f / mean f), f the squared
        coefficient of variation of accumulated attention, mixed with an equal share so that none falls below half.

        Args:
            layers: the slots of the layers that share, before compression.
            steps: not needed.
            budget: mean slots a head and layer.

        Returns:
            One budget a layer; their sum is `budget` times the number of layers.
        """
        spread = torch.tensor([_unevenness(slots) for slots in layers])
        share = torch.softmax(-spread / spread.mean().clamp_min(1e-9), dim=0)
        floor = max(self.sinks + self.recent_of(budget) + 1, budget // 2)
        ends = ((budget - floor) * len(layers) * share.cumsum(0)).round().long()  # rounded so that nothing is lost
        return [floor + int(n) for n in ends.diff(prepend=torch.zeros(1, dtype=torch.long))]

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Evict by accumulated mass; merge keys and values of similar evicted tokens, weighted by cosine."""
        keep = select(slots, slots.stats["mass"], budget, self.sinks, self.recent_of(budget))
        plan = evict(slots, keep, budget)
        old = (slots.state or self.initial_state(slots))["threshold"]
        merged, threshold = merge(slots, plan, old, self.alpha)
        return dataclasses.replace(merged.fill(slots, plan), state={"threshold": threshold})


def _unevenness(slots: Slots) -> float:
    """The squared coefficient of variation of a layer's accumulated attention."""
    mass = slots.stats["mass"][slots.valid]
    return float(mass.var(correction=0) / mass.mean().square())
