"""KeepKV (Tian et al., AAAI 2026): merges that leave the present step's output as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro import kernels
from kvrepro.attention import Step
from kvrepro.methods.base import Method, option
from kvrepro.methods.d2o import Eviction, Merged, evict
from kvrepro.slots import Slots, mix, select, total_at


@dataclass(frozen=True)
class KeepKV(Method):
    """Merge with vote counts, so that key, value and votes together give the newest query the same output."""

    name: ClassVar[str] = "keepkv"
    title: ClassVar[str] = "KeepKV"
    kind: ClassVar[str] = "merging"
    paper: ClassVar[str] = "KeepKV: Achieving Periodic Lossless KV Cache Compression (AAAI 2026)"
    url: ClassVar[str] = "https://arxiv.org/abs/2504.09936"
    statistics: ClassVar[tuple[str, ...]] = ("mass",)
    accumulates: ClassVar[tuple[str, ...]] = ("mass",)
    cardinality_bias: ClassVar[bool] = True

    recent: int | None = option(None, "ours: half of the budget (None)")
    threshold: float = option(0.8, "paper: merge into the most similar kept slot above 0.8, else drop")

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        self.require_number("threshold", -1.0, 1.0)

    def recent_of(self, budget: int) -> int:
        """Half of the budget unless set."""
        return budget // 2 if self.recent is None else self.recent

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Evict by accumulated mass (ours); merge what is similar, preserving the newest query's attention."""
        keep = select(slots, slots.stats["mass"], budget, self.sinks, self.recent_of(budget))
        plan = evict(slots, keep, budget)
        return merge(slots, plan, self._logits(slots, step), self.threshold).fill(slots, plan)

    def _logits(self, slots: Slots, step: Step) -> Tensor:
        """`[B, H_kv, S]`: logits of the newest query, averaged over the query heads of a group."""
        query = step.queries[:, :, :, -1].mean(dim=2)  # [B, H_kv, d]
        return project(step.read_keys(slots), query, step.scale)


def merge(slots: Slots, plan: Eviction, logits: Tensor, threshold: float) -> Merged:
    """Merge what is more similar than a threshold, so that a query's attention to a merged slot is to its members.

    With votes p, logits l (of the mean query of a group: ours), w = p e^l over the members of a merge:
    p* = sum p, v* = sum w v / sum w, k* = (sum w k / sum w) * ln(sum w / sum p) / (sum w l / sum w), so that
    q.k* is the logit at which p* votes carry the merged mass (paper, for two members; the sum is the same).

    Args:
        slots: `S` slots a head.
        plan: which of them are evicted.
        logits: `[B, H_kv, S]`, of the query whose attention is preserved.
        threshold: cosine above which an evicted slot joins its most similar kept one.

    Returns:
        The merged slots.
    """
    if kernels.covers(slots.keys, slots.values) and plan.size:
        from kvrepro.kernels import merging

        found = merging.settle(
            plan.order, plan.keep, slots.cardinality, plan.similarity, plan.nearest, threshold, ragged=slots.ragged
        )
        sums = merging.merge(
            slots.keys, slots.values, found[0], logits, slots.cardinality, plan.size, whole=not slots.ragged, votes=True
        )
        return Merged(*sums)
    target = plan.target(plan.exists & (plan.similarity > threshold))

    def total(x: Tensor) -> Tensor:
        """Sums over the members of each target, `[B, H_kv, size + 1]`."""
        return total_at(x, target, plan.size)

    # Weights relative to a merge's largest logit: only their ratios matter, and e^l must not overflow.
    top = logits.new_full((*target.shape[:2], plan.size + 1), -torch.inf).scatter_reduce_(2, target, logits, "amax")
    weight = slots.cardinality * (logits - top.gather(2, target)).exp()
    mass, cardinality = total(weight), total(slots.cardinality)
    merged = total(torch.ones_like(target)) > 1
    stretch = torch.where(merged, _stretch((mass / cardinality).log() + top, total(weight * logits) / mass), 1.0)
    # A slot that nothing joins keeps its bits.
    share = torch.where(merged.gather(2, target), weight / mass.gather(2, target), plan.keep)
    keys, values = mix(slots, target, (share * stretch.gather(2, target), share), plan.size)
    return Merged(keys, values, cardinality[..., : plan.size])


def project(keys: Tensor, vector: Tensor, scale: float) -> Tensor:
    """`[B, H_kv, S]`, float32 at least: scaled dot products of keys `[B, H_kv, S, d]` with a head's `[B, H_kv, d]`."""
    if kernels.covers(keys, vector):
        from kvrepro.kernels import merging

        return merging.project(keys, vector, scale)
    wide = torch.promote_types(vector.dtype, torch.float32)
    return (keys.to(wide) @ vector.to(wide).unsqueeze(-1)).squeeze(-1) * scale


def _stretch(wanted: Tensor, mean: Tensor) -> Tensor:
    """The factor wanted / mean on a merged key; 1 outside [1/2, 2], where the mean logit is too near 0 (ours)."""
    factor = wanted / torch.where(mean == 0, torch.ones_like(mean), mean)
    return torch.where((factor >= 0.5) & (factor <= 2.0), factor, torch.ones_like(factor))
