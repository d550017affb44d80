"""Merging neighbours in pairs, as AsymKV and KVSlimmer do: one cache, one choice of pairs, two rules for the key.

Keys are merged before rotary embedding; values are averaged over tokens; attention adds log(cardinality), so that a
merged slot weighs as much as the tokens it stands for. That equals the authors' sum of values over
sum_j c_j e^(s_j), and is stable (ours).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro.attention import Step
from kvrepro.methods.base import POSITIONS, Method, option
from kvrepro.slots import Slots, compact, greedy_pairs, rank, top

#: Discount of a pair's score by its place in the cache, e^(-place / GAMMA) (AsymKV's code).
GAMMA = 4096 / math.log(512)
#: The released codes cap a slot's cardinality here.
MAX_CARDINALITY = 5


@dataclass(frozen=True)
class PairMerging(Method):
    """Merge the pairs of neighbours with the lowest attention until the cache fits."""

    kind: ClassVar[str] = "merging"
    cardinality_bias: ClassVar[bool] = True
    needs_rotation: ClassVar[bool] = True

    sinks: int | None = option(None, "code: 32 sinks; at most an eighth of the budget (ours)")
    recent: int | None = option(
        None, "code: the chunk that is read is not merged, 512 of 2048 slots: a quarter of the budget (ours)"
    )
    positions: str = option("cardinality", "code: a slot stands at the running sum of cardinalities", POSITIONS)
    variant: str = option("paper", "ours: the formulas as printed; 'released' follows the code", ("paper", "released"))
    overlap: str = option(
        "disjoint",
        "ours: no token is lost; 'released' (code) picks all pairs at once, overlapping ones lose tokens",
        ("disjoint", "released"),
    )

    def sinks_of(self, budget: int) -> int:
        """32, or an eighth of a small budget, unless set."""
        return min(32, budget // 8) if self.sinks is None else self.sinks

    def recent_of(self, budget: int) -> int:
        """A quarter of the budget unless set; at least the newest token."""
        return max(1, budget // 4 if self.recent is None else self.recent)

    def observe(self, slots: Slots, step: Step) -> dict[str, Tensor]:
        """What a round needs to know of the pass's attention to the present slots.

        Returns:
            `"mass"` `[B, H_kv, S]`: attention, cardinality included, summed over the pass's queries and the group.
        """
        mass = torch.zeros_like(slots.positions, dtype=torch.promote_types(slots.keys.dtype, torch.float32))
        for _, p in step.blocks(slots):
            mass = mass + p.sum(dim=(2, 3))
        return {"mass": mass}

    def weigh(self, slots: Slots, seen: dict[str, Tensor]) -> Tensor:
        """The share of the left key in each merged pair.

        Args:
            slots: `S` slots a head.
            seen: what `observe` returned.

        Returns:
            `[B, H_kv, S - 1, 1]`, or `[B, H_kv, S - 1, d]` for a share of its own in each dimension.
        """
        raise NotImplementedError

    def merge_stats(self, slots: Slots, share: Tensor) -> dict[str, Tensor]:
        """Side vectors of the pairs' merged slots, each `[B, H_kv, S - 1, ...]`: sums unless a method knows better."""
        return {name: x[:, :, :-1] + x[:, :, 1:] for name, x in slots.stats.items()}

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Merge pairs in rounds until the cache fits; each round looks at the attention to the present slots."""
        while slots.size > budget:
            before = slots.size
            slots = self._round(slots, budget, step)
            if slots.size == before:
                raise ValueError(
                    f"{self.name}: no pair is left to merge with a budget of {budget}, sinks={self.sinks_of(budget)} "
                    f"and recent={self.recent_of(budget)}; raise the budget or protect less"
                )
        return slots

    def scores(self, slots: Slots, budget: int, mass: Tensor) -> Tensor:
        """`[B, 1, S - 1]`: what merging each pair would cost, +inf where it must not be merged (code).

        Attention `mass` `[B, H_kv, S]` of the pass's queries, over both slots and all heads, discounted by place, times
        the pair's cardinality ("released" KVSlimmer leaves the last factor out: `pair_factor`).
        """
        mass = mass.sum(dim=1, keepdim=True)  # [B, 1, S]
        place = rank(slots)[:, :1]
        score = (mass[..., :-1] + mass[..., 1:]) * (-place[..., :-1] / GAMMA).exp() * self.pair_factor(slots)
        count = slots.valid.sum(dim=2, keepdim=True)[:, :1]
        free = slots.valid[:, :1] & (place >= self.sinks_of(budget)) & (place < count - self.recent_of(budget))
        return score.masked_fill(~(free[..., :-1] & free[..., 1:]), torch.inf)

    def pair_factor(self, slots: Slots) -> Tensor:
        """`[B, 1, S - 1]`: the pair's cardinality, which protects merged slots from merging again."""
        cardinality = slots.cardinality[:, :1].float()
        return cardinality[..., :-1] + cardinality[..., 1:]

    def _round(self, slots: Slots, budget: int, step: Step) -> Slots:
        """One round: choose pairs, merge each into its right slot, drop the left one."""
        seen = self.observe(slots, step)
        score = self.scores(slots, budget, seen["mass"])
        excess = (slots.valid.sum(dim=2, keepdim=True)[:, :1] - budget).clamp_min(0)
        allowed = greedy_pairs(score) if self.overlap == "disjoint" else torch.isfinite(score)
        chosen = top(-score, allowed, excess).expand(-1, slots.keys.shape[1], -1)  # [B, H, S - 1]
        share = self.weigh(slots, seen)
        left, right = slots.cardinality[:, :, :-1], slots.cardinality[:, :, 1:]
        total = left + right
        stored = total.clamp_max(MAX_CARDINALITY) if self.variant == "released" else total
        # The codes keep sums of values: with a capped cardinality the mean that is stored here grows beyond the mean.
        sums = slots.values[:, :, :-1] * left.unsqueeze(-1) + slots.values[:, :, 1:] * right.unsqueeze(-1)
        merged = dataclasses.replace(
            slots,
            keys=_at_right(slots.keys, chosen, self._keys(slots, share, step)),
            values=_at_right(slots.values, chosen, (sums / stored.clamp_min(1).unsqueeze(-1)).to(slots.values.dtype)),
            cardinality=_at_right(slots.cardinality, chosen, stored),
            stats={n: _at_right(slots.stats[n], chosen, x) for n, x in self.merge_stats(slots, share).items()},
        )
        keep = slots.valid & ~torch.nn.functional.pad(chosen, (0, 1))
        return compact(merged, keep, int(keep.sum(dim=2).max()))

    def _keys(self, slots: Slots, share: Tensor, step: Step) -> Tensor:
        """`[B, H_kv, S - 1, d]`: the merged keys, combined before rotary embedding, rotated to the right's position."""
        wide = slots.keys.to(torch.promote_types(slots.keys.dtype, torch.float32))
        plain = step.rotation.rotate(wide, -slots.positions)
        mixed = share * plain[:, :, :-1] + (1 - share) * plain[:, :, 1:]
        return step.rotation.rotate(mixed, slots.positions[:, :, 1:]).to(slots.keys.dtype)


def _at_right(x: Tensor, chosen: Tensor, merged: Tensor) -> Tensor:
    """`x` with the right slot of each chosen pair replaced by `merged` (`[B, H, S - 1, ...]`)."""
    pick = chosen if x.dim() == 3 else chosen.unsqueeze(-1)
    return torch.cat([x[:, :, :1], torch.where(pick, merged, x[:, :, 1:])], dim=2)
