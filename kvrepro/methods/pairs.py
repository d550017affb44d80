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

from kvrepro import kernels
from kvrepro.attention import Observation, Step, observe
from kvrepro.methods.base import POSITIONS, Method, option
from kvrepro.slots import Slots, compact, greedy_pairs, partition, rank, take, top

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
    queries: int = option(512, "code: a chunk's 512 queries judge; of a longer pass the last 512 (ours)")

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        self.require_whole("queries", 1)

    def sinks_of(self, budget: int) -> int:
        """32, or an eighth of a small budget, unless set."""
        return min(32, budget // 8) if self.sinks is None else self.sinks

    def recent_of(self, budget: int) -> int:
        """A quarter of the budget unless set; at least the newest token."""
        return max(1, budget // 4 if self.recent is None else self.recent)

    def weigh(self, slots: Slots, step: Step, seen: Observation, chosen: Tensor, most: int) -> Tensor:
        """The share of the left key in each merged pair.

        Args:
            slots: `S` slots a head.
            step: the queries that judge.
            seen: their attention to the slots.
            chosen: `[B, H_kv, S - 1]` bool, the pairs that will be merged; what is returned for others does not count.
            most: no head has more chosen pairs.

        Returns:
            `[B, H_kv, S - 1, 1]`, or `[B, H_kv, S - 1, d]` for a share of its own in each dimension.
        """
        raise NotImplementedError

    def merge_stats(self, slots: Slots, share: Tensor) -> dict[str, Tensor]:
        """Side vectors of the pairs' merged slots, each `[B, H_kv, S - 1, ...]`: sums unless a method knows better."""
        return {name: x[:, :, :-1] + x[:, :, 1:] for name, x in slots.stats.items()}

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """Where one round is sure to find the pairs it needs."""
        return arrived <= self._sure(budget + arrived, budget)

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Merge pairs in rounds until the cache fits; each round looks at the attention to the present slots."""
        step = step.last(self.queries)
        ragged = slots.ragged
        while slots.size > budget:
            before = slots.size
            slots = self._round(slots, budget, step)
            if slots.size == before:
                raise ValueError(
                    f"{self.name}: no pair is left to merge with a budget of {budget}, sinks={self.sinks_of(budget)} "
                    f"and recent={self.recent_of(budget)}; raise the budget or protect less"
                )
        return dataclasses.replace(slots, ragged=ragged)  # rows that were full are full again

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
        seen = observe(step, slots)
        score = self.scores(slots, budget, seen.mass)
        excess = (slots.valid.sum(dim=2, keepdim=True)[:, :1] - budget).clamp_min(0)
        allowed = greedy_pairs(score) if self.overlap == "disjoint" else torch.isfinite(score)
        chosen = top(-score, allowed, excess).expand(-1, slots.keys.shape[1], -1)  # [B, H, S - 1]
        keep = slots.valid & ~torch.nn.functional.pad(chosen, (0, 1))
        fewest, size = self._size_after(slots, budget, keep)
        share = self.weigh(slots, step, seen, chosen, slots.size - fewest)
        total = slots.cardinality[:, :, :-1] + slots.cardinality[:, :, 1:]
        stored = total.clamp_max(MAX_CARDINALITY) if self.variant == "released" else total
        order, _ = partition(keep)
        content = self._content(slots, step, chosen, share, stored, order[..., -size:])
        merged = dataclasses.replace(
            slots,
            ragged=slots.ragged or fewest < size,
            cardinality=_at_right(slots.cardinality, chosen, stored),
            stats={n: _at_right(slots.stats[n], chosen, x) for n, x in self.merge_stats(slots, share).items()},
        )
        return compact(merged, keep, size, order=order, content=content)

    def _sure(self, size: int, budget: int) -> int:
        """Pairs that a round is sure to merge of `size` slots: a greedy matching takes at least a third of a path's."""
        pairs = max(0, size - self.sinks_of(budget) - self.recent_of(budget) - 1)
        return -(-pairs // 3) if self.overlap == "disjoint" else pairs

    def _size_after(self, slots: Slots, budget: int, keep: Tensor) -> tuple[int, int]:
        """The fewest and the most slots a head keeps in a round; asks the device only if it must."""
        least = budget + 1 if slots.ragged else slots.size  # slots of a row that must let some go
        if slots.size - budget <= self._sure(least, budget):
            return budget, budget
        fewest, most = (int(x) for x in keep.sum(dim=2).aminmax())
        return fewest, most

    def _content(
        self, slots: Slots, step: Step, chosen: Tensor, share: Tensor, stored: Tensor, order: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, H_kv, n, d]` of the slots `order` `[B, H_kv, n]`, the chosen pairs merged.

        Keys are combined before rotary embedding and stand at the right slot's position. The codes keep sums of values:
        with a capped cardinality (`stored`) the mean that is kept here grows beyond the mean.
        """
        if kernels.covers(slots.keys, slots.values) and step.rotation.covers(slots.keys.shape[-1]):
            from kvrepro.kernels import pairs

            return pairs.merge(slots, chosen, share, stored, order, step.rotation.inv_freq)
        wide = torch.promote_types(slots.keys.dtype, torch.float32)
        plain = step.rotation.rotate(slots.keys.to(wide), -slots.positions)
        mixed = share * plain[:, :, :-1] + (1 - share) * plain[:, :, 1:]
        keys = step.rotation.rotate(mixed, slots.positions[:, :, 1:]).to(slots.keys.dtype)
        left, right = (slots.cardinality[:, :, part].unsqueeze(-1) for part in (slice(0, -1), slice(1, None)))
        sums = slots.values[:, :, :-1].to(wide) * left + slots.values[:, :, 1:].to(wide) * right
        values = (sums / stored.clamp_min(1).unsqueeze(-1)).to(slots.values.dtype)
        return (
            take(_at_right(slots.keys, chosen, keys), order),
            take(_at_right(slots.values, chosen, values), order),
        )


def _at_right(x: Tensor, chosen: Tensor, merged: Tensor) -> Tensor:
    """`x` with the right slot of each chosen pair replaced by `merged` (`[B, H, S - 1, ...]`)."""
    pick = chosen if x.dim() == 3 else chosen.unsqueeze(-1)
    return torch.cat([x[:, :, :1], torch.where(pick, merged, x[:, :, 1:])], dim=2)
