"""KeepKV (Tian et al., AAAI 2026): merges that leave the present step's output as it was."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro import kernels
from kvrepro.attention import Step
from kvrepro.methods.base import Method, option
from kvrepro.methods.d2o import evict
from kvrepro.slots import Slots, compact, mix, select, total_at


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
        """Evict by accumulated mass (ours); merge what is similar, preserving the newest query's attention.

        With votes p, logits l (of the mean query of a group: ours), w = p e^l over the members of a merge:
        p* = sum p, v* = sum w v / sum w, k* = (sum w k / sum w) * ln(sum w / sum p) / (sum w l / sum w), so that
        q.k* is the logit at which p* votes carry the merged mass (paper, for two members; the sum is the same).
        """
        keep = select(slots, slots.stats["mass"], budget, self.sinks, self.recent_of(budget))
        plan = evict(slots, keep, budget)
        target = plan.target(plan.evicted & (plan.similarity > self.threshold))
        member = target < plan.size
        logits = self._logits(slots, step)
        # Weights relative to the largest logit: only their ratios matter, and e^l must not overflow.
        top = logits.masked_fill(~member, -torch.inf).amax(dim=2, keepdim=True)
        votes = slots.cardinality.to(logits.dtype).masked_fill(~member, 0.0)
        weight = votes * (logits - top).exp()

        def total(x: Tensor) -> Tensor:
            """Sums over the members of each target, `[B, H_kv, size + 1]`."""
            return total_at(x, target, plan.size)

        mass, cardinality = total(weight), total(slots.cardinality)
        p = cardinality.to(mass.dtype)
        tiny = torch.finfo(mass.dtype).tiny
        wanted = (mass.clamp_min(tiny) / p.clamp_min(1.0)).log() + top
        mean = total(weight * logits.masked_fill(~member, 0.0)) / mass.clamp_min(tiny)
        merged = (total(member.to(mass.dtype)) > 1) & (mass > tiny)
        # A slot that nothing joins keeps its bits.
        share = torch.where(merged.gather(2, target), weight / mass.clamp_min(tiny).gather(2, target), keep)
        stretch = torch.where(merged, _stretch(wanted, mean), 1.0).gather(2, target)
        content = mix(slots, target, (share * stretch, share), plan.size)
        left = compact(slots, keep, budget, order=plan.order, content=content, whole=not slots.ragged)
        return dataclasses.replace(left, cardinality=cardinality[..., : plan.size])

    def _logits(self, slots: Slots, step: Step) -> Tensor:
        """`[B, H_kv, S]`: logits of the newest query, averaged over the query heads of a group."""
        query = step.queries[:, :, :, -1].mean(dim=2)  # [B, H_kv, d]
        return project(step.read_keys(slots), query) * step.scale


def project(keys: Tensor, vector: Tensor) -> Tensor:
    """`[B, H_kv, S]`, float32 at least: dot products of keys `[B, H_kv, S, d]` with a vector a head `[B, H_kv, d]`."""
    if kernels.covers(keys, vector):
        from kvrepro.kernels import merging

        return merging.project(keys, vector)
    wide = torch.promote_types(vector.dtype, torch.float32)
    return (keys.to(wide) @ vector.to(wide).unsqueeze(-1)).squeeze(-1)


def _stretch(wanted: Tensor, mean: Tensor) -> Tensor:
    """The factor wanted / mean on a merged key; 1 outside [1/2, 2], where the mean logit is too near 0 (ours)."""
    factor = wanted / torch.where(mean == 0, torch.ones_like(mean), mean)
    return torch.where((factor >= 0.5) & (factor <= 2.0), factor, torch.ones_like(factor))
