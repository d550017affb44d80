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
        order: `[B, H_kv, S]` int64, the evicted slots and then the kept ones (`slots.partition`).
        place: `[B, H_kv, S]` int64, each kept slot's place among the `size` that stay; `size` for all others.
        gone: `[B, H_kv, E]` int64, the slots that are not among those that stay; E = S - size.
        evicted: `[B, H_kv, E]` bool, they hold something.
        similarity: `[B, H_kv, E]` float32, the cosine with the most similar kept key.
        nearest: `[B, H_kv, E]` int64, that slot's place.
        size: slots that stay.
    """

    order: Tensor
    place: Tensor
    gone: Tensor
    evicted: Tensor
    similarity: Tensor
    nearest: Tensor
    size: int

    def target(self, joins: Tensor) -> Tensor:
        """`[B, H_kv, S]` int64: the place each slot goes to, given which of the evicted join `[B, H_kv, E]`."""
        return self.place.scatter(2, self.gone, torch.where(joins, self.nearest, self.size))

    def spread(self, weight: Tensor) -> Tensor:
        """`[B, H_kv, S]`: the weight `[B, H_kv, E]` of each evicted slot, 1 for the others."""
        return weight.new_ones(self.place.shape).scatter_(2, self.gone, weight)


def evict(slots: Slots, keep: Tensor, budget: int) -> Eviction:
    """Find for every evicted slot the kept slot whose key is most similar to its own.

    Args:
        slots: `S` slots a head.
        keep: `[B, H_kv, S]` bool, filled slots, at most `budget` a head.
        budget: slots a head may keep.
    """
    size = min(budget, slots.size)
    order, place = partition(keep)
    gone, kept = order.split([slots.size - size, size], dim=2)
    valid, evicted = (torch.ones_like(index, dtype=torch.bool) for index in (kept, gone))
    if slots.ragged:
        valid, evicted = keep.gather(2, kept), (slots.valid & ~keep).gather(2, gone)
    similarity, nearest = nearest_kept(slots.keys, gone, kept, valid)
    return Eviction(
        order=order,
        place=torch.where(keep, place - gone.shape[2], size),
        gone=gone,
        evicted=evicted,
        similarity=similarity,
        nearest=nearest,
        size=size,
    )


def nearest_kept(keys: Tensor, gone: Tensor, kept: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """For every evicted slot, the kept slot whose key is most similar to its own.

    Args:
        keys: `[B, H_kv, S, d]`.
        gone: `[B, H_kv, E]` int64, the evicted slots.
        kept: `[B, H_kv, K]` int64, the kept ones.
        valid: `[B, H_kv, K]` bool, those of them that hold something.

    Returns:
        Cosine similarity `[B, H_kv, E]` float32, -inf where nothing is kept, and the place in `kept`
        `[B, H_kv, E]` int64, of equal ones the first.
    """
    if kernels.covers(keys) and gone.numel() and kept.numel():
        from kvrepro.kernels import merging

        return merging.nearest(keys, gone, kept, valid)
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

    def split(self, layers: list[Slots], budget: int) -> list[int]:
        """Each layer's slots, given the mean (ours; the paper says: by the variance of attention's column sums).

        A layer whose attention is spread evenly needs more slots: shares are exp(-f / mean f), f the squared
        coefficient of variation of accumulated attention, mixed with an equal share so that none falls below half.

        Args:
            layers: the slots of the layers that share, before compression.
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
        threshold, slots = self._threshold(slots, plan.similarity, plan.evicted)
        joins = plan.evicted & (plan.similarity >= threshold.unsqueeze(2)) & (plan.similarity > 0)
        target = plan.target(joins)
        weight = plan.spread(plan.similarity)  # a kept slot has cosine 1 with itself
        weight = weight / total_at(weight, target, plan.size).gather(2, target)
        content = mix(slots, target, (weight, weight), plan.size)
        cardinality = total_at(slots.cardinality, target, plan.size)[..., : plan.size]
        left = compact(slots, keep, budget, order=plan.order, content=content, whole=not slots.ragged)
        return dataclasses.replace(left, cardinality=cardinality)

    def _threshold(self, slots: Slots, similarity: Tensor, evicted: Tensor) -> tuple[Tensor, Slots]:
        """The running threshold `[B, H_kv]` after this eviction; it starts at the first eviction's mean similarity."""
        number = evicted.sum(dim=2)
        mean = similarity.masked_fill(~evicted, 0.0).sum(dim=2) / number.clamp_min(1)
        old = slots.state.get("threshold", torch.full_like(mean, torch.nan))  # not set yet
        moved = torch.where(old.isnan(), mean, self.alpha * old + (1 - self.alpha) * mean)
        new = torch.where(number > 0, moved, old)
        return new, dataclasses.replace(slots, state={"threshold": new})


def _unevenness(slots: Slots) -> float:
    """The squared coefficient of variation of a layer's accumulated attention."""
    mass = slots.stats["mass"][slots.valid]
    return float(mass.var(correction=0) / mass.mean().square())
