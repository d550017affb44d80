"""KeepKV (Tian et al., AAAI 2026): merges that leave the present step's output as it was."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro.attention import Step
from kvrepro.methods.base import Method, option
from kvrepro.methods.d2o import nearest_kept
from kvrepro.slots import Slots, add_at, compact, select


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

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Evict by accumulated mass (ours); merge what is similar, preserving the newest query's attention.

        With votes p, logits l (of the mean query of a group: ours), w = p e^l over the members of a merge:
        p* = sum p, v* = sum w v / sum w, k* = (sum w k / sum w) * ln(sum w / sum p) / (sum w l / sum w), so that
        q.k* is the logit at which p* votes carry the merged mass (paper, for two members; the sum is the same).
        """
        keep = select(slots, slots.stats["mass"], budget, self.sinks, self.recent_of(budget))
        similarity, nearest = nearest_kept(slots, keep)
        joins = slots.valid & ~keep & (similarity > self.threshold)
        place = torch.arange(slots.size, device=keep.device).expand_as(keep)
        target = torch.where(joins, nearest, place)
        member = joins | keep
        logits = self._logits(slots, step)
        # Weights relative to the largest logit: only their ratios matter, and e^l must not overflow.
        top = logits.masked_fill(~member, -torch.inf).amax(dim=2, keepdim=True)
        votes = slots.cardinality.to(logits.dtype).masked_fill(~member, 0.0)
        weight = votes * (logits - top).exp()

        def total(x: Tensor) -> Tensor:
            """Sums over the members of each target, `[B, H_kv, S]`."""
            return torch.zeros_like(x).scatter_add(2, target, x)

        mass, p = total(weight), total(votes)
        tiny = torch.finfo(mass.dtype).tiny
        wanted = (mass.clamp_min(tiny) / p.clamp_min(1.0)).log() + top
        mean = total(weight * logits.masked_fill(~member, 0.0)) / mass.clamp_min(tiny)
        merged = (total(joins.to(mass.dtype)) > 0) & (mass > tiny)
        slots = self._combine(slots, target, weight, mass, merged, _stretch(wanted, mean))
        cardinality = torch.where(keep, p.round().to(slots.cardinality.dtype), slots.cardinality)
        return compact(dataclasses.replace(slots, cardinality=cardinality), keep, budget)

    def _logits(self, slots: Slots, step: Step) -> Tensor:
        """`[B, H_kv, S]`: logits of the newest query, averaged over the query heads of a group."""
        query = step.queries[:, :, :, -1].mean(dim=2)  # [B, H_kv, d]
        wide = torch.promote_types(query.dtype, torch.float32)
        return (step.read_keys(slots).to(wide) @ query.to(wide).unsqueeze(-1)).squeeze(-1) * step.scale

    def _combine(
        self, slots: Slots, target: Tensor, weight: Tensor, mass: Tensor, merged: Tensor, stretch: Tensor
    ) -> Slots:
        """Keys and values of the merged slots; the others keep their bits."""
        new = {}
        for name, scale in (("keys", stretch), ("values", torch.ones_like(stretch))):
            x = getattr(slots, name)
            sums = add_at(torch.zeros_like(x, dtype=weight.dtype), target, weight.unsqueeze(-1) * x)
            mean = sums / mass.clamp_min(torch.finfo(mass.dtype).tiny).unsqueeze(-1)
            new[name] = torch.where(merged.unsqueeze(-1), (mean * scale.unsqueeze(-1)).to(x.dtype), x)
        return dataclasses.replace(slots, **new)


def _stretch(wanted: Tensor, mean: Tensor) -> Tensor:
    """The factor wanted / mean on a merged key; 1 outside [1/2, 2], where the mean logit is too near 0 (ours)."""
    factor = wanted / torch.where(mean == 0, torch.ones_like(mean), mean)
    return torch.where((factor >= 0.5) & (factor <= 2.0), factor, torch.ones_like(factor))
