"""KVMerger (Wang et al., 2024): merge runs of similar keys with Gaussian weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvrepro import kernels
from kvrepro.attention import Step
from kvrepro.methods.base import Method, option
from kvrepro.slots import Slots, compact, mix, partition, protected, take, top, total_at, uniform

_PIVOT_STREAM = 2
#: Rounds of the circular definition of sigma; it has converged to six digits by then.
_PRINTED_ROUNDS = 30


@dataclass(frozen=True)
class KVMerger(Method):
    """Merge contiguous runs of similar keys into their most attended member, with weights falling by distance."""

    name: ClassVar[str] = "kvmerger"
    title: ClassVar[str] = "KVMerger"
    kind: ClassVar[str] = "merging"
    paper: ClassVar[str] = "Model Tells You Where to Merge: Adaptive KV Cache Merging for LLMs on Long-Context Tasks"
    url: ClassVar[str] = "https://arxiv.org/abs/2407.08454"
    statistics: ClassVar[tuple[str, ...]] = ("mass",)
    accumulates: ClassVar[tuple[str, ...]] = ("mass",)
    whole_numbers: ClassVar[tuple[str, ...]] = ("sinks",)

    recent: int | float | None = option(None, "second-hand: 0.17 of the length at a 50 % budget: 0.34 of the budget")
    topk: int | float | None = option(None, "second-hand: 0.12 of the length at a 50 % budget: 0.24 of the budget")
    epsilon: float = option(0.75, "second-hand: cosine above 0.75, for both budgets")
    sigma: str | float = option(
        "mean_dist", "ours: scale free; 'printed' is circular, 5.0 the best fixed (second-hand)"
    )
    pivot: str = option("attention", "second-hand: the most attended member", ("attention", "random"))
    weights: str = option("gaussian", "second-hand: Gaussian kernel", ("gaussian", "mean"))
    mass: str = option(
        "values",
        "second-hand: the merged value is |S| times the mean; 'attention' (ours) gives the pivot's logit + log |S| "
        "instead, 'none' (ours) neither",
        ("values", "attention", "none"),
    )
    budget_mode: str = option(
        "exact",
        "ours: cut the least similar pairs until the budget is met; 'threshold' merges above epsilon whatever results",
        ("exact", "threshold"),
    )
    reduce: str = option("mean", "ours: attention of a KV head is the mean of its group", ("mean", "max", "sum"))
    shared_sets: bool = option(False, "ours: sets are chosen for each KV head", (True, False))
    skip_layers: bool = option(False, "second-hand: the first two layers and the last may be left whole", (True, False))
    block: int | None = option(None, "ours: while decoding, free this many slots at a time; None is budget / 16")

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        for name in ("recent", "topk"):
            if isinstance(getattr(self, name), float):
                self.require_number(name, 0.0, 0.99)  # a share of the budget
            else:
                self.require_whole(name, 0)
        self.require_whole("block", 1)
        self.require_number("epsilon", -1.0, 1.0)
        if self.sigma not in ("mean_dist", "printed"):
            if isinstance(self.sigma, str):
                raise ValueError(
                    f"{self.name}: sigma={self.sigma!r} is not valid; choose 'mean_dist', 'printed' or a number above 0"
                )
            self.require_number("sigma", 1e-6, 1e6)

    @property
    def cardinality_bias(self) -> bool:
        """Whether |S| enters through the logits."""
        return self.mass == "attention"

    @property
    def bounded(self) -> bool:
        """Whether the slots are held to the budget."""
        return self.budget_mode == "exact"

    @property
    def counts_passes(self) -> bool:
        """With a fixed threshold every pass ends with a merge; the largest sum of a group depends on what is summed."""
        return not self.bounded or self.reduce == "max"

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """Chunks of a prompt are; while decoding, slots are freed a block at a time."""
        return self.bounded and arrived > 1

    def leaves(self, budget: int) -> int | None:
        """A block less than the slots that are one too many; a fixed threshold leaves what it leaves."""
        return budget + 1 - self.block_of(budget) if self.bounded else None

    def recent_of(self, budget: int) -> int:
        """0.34 of the budget unless set; at least the newest token."""
        return max(1, _slots(self.recent, 0.34, budget))

    def topk_of(self, budget: int) -> int:
        """Slots protected for their accumulated attention: 0.24 of the budget unless set."""
        return _slots(self.topk, 0.24, budget)

    def block_of(self, budget: int) -> int:
        """Slots freed at a time while decoding."""
        return max(1, budget // 16) if self.block is None else self.block

    def check(self, budget: int) -> None:
        """Check that runs can be merged: each protected slot can split a run in two.

        Raises:
            ValueError: fewer than recent + 2 topk + 1 slots, or a block that leaves less.
        """
        super().check(budget)
        need = self.sinks + self.recent_of(budget) + 2 * self.topk_of(budget) + 1
        if budget - self.block_of(budget) + 1 < need:
            raise ValueError(
                f"{self.name}: a budget of {budget} slots, less a block of {self.block_of(budget)}, is below "
                f"sinks + recent + 2 topk + 1 = {need}; lower recent, topk or block, or raise the budget"
            )

    def layer_budget(self, budget: int, layer: int, layers: int) -> int | None:
        """The budget, or None for the layers that are left whole."""
        return None if self.skip_layers and layer in (0, 1, layers - 1) else budget

    def due(self, size: int, budget: int, arrived: int, since: int) -> bool:
        """On overflow; with a fixed threshold after each prompt pass and every block of decoded tokens."""
        if self.bounded:
            return size > budget
        return arrived > 1 or since >= self.block_of(budget)

    def reduce_group(self, mass: Tensor) -> Tensor:
        """`[B, H_kv, G, S]` -> `[B, H_kv, S]` by mean, max or sum over the group."""
        return mass.amax(dim=2) if self.reduce == "max" else getattr(mass, self.reduce)(dim=2)

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Find the merging sets, merge each into its pivot."""
        decoding = step.queries.shape[3] == 1
        goal = self.leaves(budget) if decoding and self.bounded else budget
        link = self.links(slots, budget, goal)
        pivot, share = self._members(slots, link, step)
        stays = self._stays(slots, pivot)
        slots = dataclasses.replace(slots, ragged=slots.ragged or not self.bounded)
        size = int(stays.sum(dim=2).max()) if slots.ragged else min(goal, slots.size)
        return self._melt(slots, pivot, share, stays, size)

    def links(self, slots: Slots, budget: int, goal: int) -> Tensor:
        """Which neighbours belong to one merging set.

        Args:
            slots: `S` slots a head.
            budget: slots that the protected shares refer to.
            goal: slots to reach a head (budget mode "exact").

        Returns:
            `[B, H_kv, S - 1]` bool: slot i and slot i + 1 are joined.
        """
        mass = slots.stats["mass"]
        similarity = neighbours(slots.keys)
        if self.shared_sets:
            mass = mass.mean(dim=1, keepdim=True).expand_as(mass)
            similarity = similarity.mean(dim=1, keepdim=True).expand_as(similarity)
        safe = protected(slots, self.sinks, self.recent_of(budget))
        safe = top(mass, slots.valid, self.topk_of(budget), safe)
        free = slots.valid & ~safe
        possible = free[..., :-1] & free[..., 1:]
        if not self.bounded:
            return possible & (similarity > self.epsilon)
        count = slots.valid.sum(dim=2, keepdim=True)
        excess = torch.where(count > budget, count - goal, 0)  # a row of a batch that still fits waits
        # A run of n slots with m of its n - 1 links kept becomes n - m slots: each link saves one.
        return top(similarity, possible, excess)

    def merge(self, slots: Slots, link: Tensor, step: Step) -> tuple[Slots, Tensor]:
        """Merge each set into its pivot.

        Args:
            slots: `S` slots a head.
            link: `[B, H_kv, S - 1]` bool, from `links`.
            step: the pass (seed and layer for random pivots).

        Returns:
            Slots of the same length with the pivots' keys, values, cardinalities and attention updated, and
            `[B, H_kv, S]` bool that marks the slots that stay.
        """
        pivot, share = self._members(slots, link, step)
        stays = self._stays(slots, pivot)
        left = self._melt(dataclasses.replace(slots, ragged=True), pivot, share, stays, slots.size)
        _, place = partition(stays)

        def back(old: Tensor, new: Tensor) -> Tensor:
            """What stays, where it was."""
            return torch.where(stays if old.dim() == 3 else stays.unsqueeze(-1), take(new, place), old)

        full = dataclasses.replace(
            slots,
            keys=back(slots.keys, left.keys),
            values=back(slots.values, left.values),
            cardinality=back(slots.cardinality, left.cardinality),
            stats={name: back(side, left.stats[name]) for name, side in slots.stats.items()},
        )
        return full, stays

    def _members(self, slots: Slots, link: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """`[B, H_kv, S]` int64, the pivot of each slot's set, and `[B, H_kv, S]`, the slot's share in the set."""
        group = torch.nn.functional.pad((~link).cumsum(dim=2), (1, 0))  # [B, H, S]: index of the slot's set
        pivot = self._pivots(slots, group, step).gather(2, group)
        weight = self._weights(slots, group, pivot).masked_fill(~slots.valid, 0.0)
        return pivot, weight / _sum(weight, group).gather(2, group).clamp_min(torch.finfo(weight.dtype).tiny)

    def _stays(self, slots: Slots, pivot: Tensor) -> Tensor:
        """`[B, H_kv, S]` bool: the slots that are their own set's pivot."""
        return (torch.arange(slots.size, device=pivot.device) == pivot) & slots.valid

    def _melt(self, slots: Slots, pivot: Tensor, share: Tensor, stays: Tensor, size: int) -> Slots:
        """The pivots alone, `size` a head, each with the keys, values, tokens and attention of its set."""
        order, place = partition(stays)
        target = place.gather(2, pivot) - (slots.size - size)
        target = torch.where(slots.valid & (target >= 0), target, size)
        cardinality = total_at(slots.cardinality, target, size)
        in_value = share
        if self.mass == "values":  # stored as |S| times a mean: undo it before averaging, redo it with the set's size
            in_value = share * cardinality.gather(2, target) / slots.cardinality.clamp_min(1)
        content = mix(slots, target, (share, in_value), size, runs=True)
        left = compact(slots, stays, size, order=order, content=content, whole=not slots.ragged)
        cardinality = cardinality[..., :size]
        stats = {**left.stats, "mass": total_at(slots.stats["mass"], target, size)[..., :size]}
        if self.cardinality_bias and "bias" in stats:
            # The bias comes beside log |S|: a set weighs what its members did, the sum of c e^bias.
            weight = total_at(slots.cardinality * slots.stats["bias"].exp(), target, size)[..., :size]
            merged = cardinality > left.cardinality
            stats["bias"] = torch.where(merged, (weight / cardinality.clamp_min(1)).log(), stats["bias"])
        return dataclasses.replace(left, cardinality=cardinality, stats=stats)

    def _pivots(self, slots: Slots, group: Tensor, step: Step) -> Tensor:
        """`[B, H_kv, S]` int64: the slot index of each set's pivot, by set index."""
        score = slots.stats["mass"]
        if self.pivot == "random":
            heads = torch.arange(group.shape[1], device=group.device)[None, :, None]
            score = uniform(self.seed, step.layer, heads, slots.positions, _PIVOT_STREAM)
        score = score.masked_fill(~slots.valid, -1.0)
        best = torch.full_like(score, -torch.inf).scatter_reduce(2, group, score, "amax")
        place = torch.arange(slots.size, device=group.device).expand_as(group)
        first = torch.where(score == best.gather(2, group), place, slots.size)
        return torch.full_like(group, slots.size).scatter_reduce(2, group, first, "amin").clamp_max(slots.size - 1)

    def _weights(self, slots: Slots, group: Tensor, target: Tensor) -> Tensor:
        """`[B, H_kv, S]`: unnormalised weights g = exp(-|k_p - k|^2 / 2 sigma^2), 1 for the pivot."""
        wide = torch.promote_types(slots.keys.dtype, torch.float32)
        if self.weights == "mean":
            return torch.ones(target.shape, dtype=wide, device=target.device)
        distance = distances(slots.keys, target)
        size = _sum(torch.ones_like(distance), group).gather(2, group)
        tiny = torch.finfo(wide).tiny
        if self.sigma == "printed":
            sigma = torch.ones_like(distance)
            for _ in range(_PRINTED_ROUNDS):  # sigma = sum g / (sqrt(2) |S|), with g = g(sigma): iterated as printed
                g = (-distance.square() / (2 * sigma.square()).clamp_min(tiny)).exp()
                sigma = _sum(g, group).gather(2, group) / (2**0.5 * size)
            return (-distance.square() / (2 * sigma.square()).clamp_min(tiny)).exp()
        if self.sigma == "mean_dist":
            spread = _sum(distance, group).gather(2, group) / (size - 1).clamp_min(1.0)  # over the other members
            return (-distance.square() / spread.square().clamp_min(tiny)).exp()
        return (-distance.square() / (2 * float(self.sigma) ** 2)).exp()


def _slots(value: int | float | None, share: float, budget: int) -> int:
    """Slots from a number, a share of the budget, or the default share."""
    if isinstance(value, int):
        return value
    return int((share if value is None else value) * budget)


def _sum(x: Tensor, group: Tensor) -> Tensor:
    """`[B, H, S]`: sums of `x` over each set, by set index."""
    return torch.zeros_like(x).scatter_add(2, group, x)


def neighbours(keys: Tensor) -> Tensor:
    """`[B, H, S - 1]` float32: cosine similarity of neighbouring keys `[B, H, S, d]`."""
    if kernels.covers(keys) and keys.shape[2] > 1:
        from kvrepro.kernels import merging

        return merging.neighbours(keys)
    return cosine_similarity(keys[:, :, :-1].float(), keys[:, :, 1:].float(), dim=-1)


def distances(keys: Tensor, target: Tensor) -> Tensor:
    """`[B, H, S]`, float32 at least: distance of each key `[B, H, S, d]` from that of the slot `target` `[B, H, S]`."""
    if kernels.covers(keys):
        from kvrepro.kernels import merging

        return merging.distance(keys, target)
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return (wide - take(wide, target)).norm(dim=-1)
