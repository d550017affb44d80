"""WeightedKV (Yuan et al., ICASSP 2025): drop keys, merge values into the right neighbour by average attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro import kernels
from kvrepro.attention import Step
from kvrepro.methods.base import POSITIONS, Method, StepRule, option
from kvrepro.slots import Slots, compact, join_right, mix, next_kept, partition, select, total_at


@dataclass(frozen=True)
class WeightedKV(Method):
    """Discard the key with the least average attention and merge its value into its right neighbour's.

    Algorithm 1 of the paper, one token at a time; a prompt given in chunks of c tokens is compressed once a chunk,
    and c = 1 is the paper's algorithm.
    """

    name: ClassVar[str] = "weightedkv"
    title: ClassVar[str] = "WeightedKV"
    kind: ClassVar[str] = "merging"
    paper: ClassVar[str] = "WeightedKV: Attention Scores Weighted Key-Value Cache Merging for LLMs (ICASSP 2025)"
    url: ClassVar[str] = "https://arxiv.org/abs/2503.01330"
    statistics: ClassVar[tuple[str, ...]] = ("mass",)
    accumulates: ClassVar[tuple[str, ...]] = ("mass", "count")

    sinks: int = option(4, "paper: 4 sinks in the experiments")
    recent: int | None = option(None, "paper: sinks + recent = budget / 2 (508 of 1024, 124 of 256)")
    positions: str = option("cache", "ours: the finite perplexity at 16k on a 4k model implies it", POSITIONS)
    merge: bool = option(
        True, "paper: merge; False evicts the value with its key (the paper's ablation)", (True, False)
    )

    def recent_of(self, budget: int) -> int:
        """`budget / 2 - sinks` unless set; at least the newest token, which Algorithm 1 never evicts."""
        return max(1, budget // 2 - self.sinks) if self.recent is None else max(1, self.recent)

    def mean_attention(self, slots: Slots) -> Tensor:
        """`[B, H_kv, S]`: attention accumulated by each slot over the number of queries that saw it (Alg. 1)."""
        return slots.stats["mass"] / slots.stats["count"].clamp_min(1.0)

    def step_rule(self, budget: int) -> StepRule | None:
        """The slot with the least mean attention goes, and its value joins its right neighbour's (Alg. 1)."""
        if self.positions == "cardinality":
            return None
        return StepRule("mean", merge="right" if self.merge else "", sinks=self.sinks, recent=self.recent_of(budget))

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Evict the slots with the least mean attention; each run of evicted values joins the slot on its right."""
        mean = self.mean_attention(slots)
        keep = select(slots, mean, budget, self.sinks, self.recent_of(budget))
        if self.merge and kernels.covers(slots.keys, slots.values):
            return _joined(slots, keep, mean, budget)
        return compact(join_right(slots, keep, mean) if self.merge else slots, keep, budget)


def _joined(slots: Slots, keep: Tensor, weights: Tensor, size: int) -> Slots:
    """`join_right` and `compact` in one, for the kernels: every value is read once.

    Args:
        slots: `S` slots a head; the last one of each head is kept.
        keep: `[B, H_kv, S]` bool, at most `size` filled slots a head.
        weights: `[B, H_kv, S]`, not negative; where no two of a run are above 0, the kept value stays as it is.
        size: slots a head afterwards.
    """
    keep = keep & slots.valid
    order, place = partition(keep)
    target = place.gather(2, next_kept(keep).clamp_max(slots.size - 1)) - (slots.size - size)
    target = torch.where(slots.valid, target, size)
    weights = weights.masked_fill(~slots.valid, 0)
    total = total_at(weights, target, size).gather(2, target)
    joined = total_at((weights > 0).to(torch.int32), target, size).gather(2, target) > 1
    share = torch.where(joined & (total > 0), weights / total.clamp_min(torch.finfo(total.dtype).tiny), keep)
    content = mix(slots, target, (keep, share), size, runs=True)
    left = compact(slots, keep, size, order=order, content=content, whole=not slots.ragged)
    cardinality = total_at(slots.cardinality, target, size)[..., :size]
    return dataclasses.replace(left, cardinality=cardinality)
