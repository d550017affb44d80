"""D2O (Wan et al., 2024): evict by accumulated attention, merge what is similar enough."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kvrepro.attention import Step
from kvrepro.methods.base import Method, option
from kvrepro.slots import Slots, add_at, compact, select


def nearest_kept(slots: Slots, keep: Tensor) -> tuple[Tensor, Tensor]:
    """For every slot, the kept slot whose key is most similar to its own.

    Args:
        slots: `S` slots a head.
        keep: `[B, H_kv, S]` bool.

    Returns:
        Cosine similarity `[B, H_kv, S]` float32, and the index of that slot `[B, H_kv, S]` int64.
    """
    unit = normalize(slots.keys.float(), dim=-1)
    cosine = (unit @ unit.transpose(2, 3)).masked_fill(~keep.unsqueeze(2), -torch.inf)
    best = cosine.max(dim=3)
    return best.values, best.indices


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

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Evict by accumulated mass; merge keys and values of similar evicted tokens, weighted by cosine."""
        keep = select(slots, slots.stats["mass"], budget, self.sinks, self.recent_of(budget))
        evicted = slots.valid & ~keep
        similarity, target = nearest_kept(slots, keep)
        threshold, slots = self._threshold(slots, similarity, evicted)
        weight = similarity.clamp_min(0.0) * (evicted & (similarity >= threshold.unsqueeze(2)))
        total = 1.0 + torch.zeros_like(weight).scatter_add(2, target, weight)  # a kept slot has cosine 1 with itself
        merged = {}
        for name in ("keys", "values"):
            x = getattr(slots, name)
            wide = x.float() if x.dtype != torch.float64 else x
            merged[name] = (add_at(wide, target, weight.unsqueeze(-1) * wide) / total.unsqueeze(-1)).to(x.dtype)
        count = torch.where(weight > 0, slots.cardinality, 0)
        cardinality = slots.cardinality.scatter_add(2, target, count)
        return compact(dataclasses.replace(slots, cardinality=cardinality, **merged), keep, budget)

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
