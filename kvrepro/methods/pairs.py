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
from torch.nn.functional import pad

from kvrepro import kernels
from kvrepro.attention import Observation, Step, observe
from kvrepro.methods.base import POSITIONS, Method, option
from kvrepro.slots import Slots, has_kernel, partition, rank, take, top

#: Discount of a pair's score by its place in the cache, e^(-place / GAMMA) (AsymKV's code).
GAMMA = 4096 / math.log(512)
#: The released codes cap a slot's cardinality here.
MAX_CARDINALITY = 5
#: Queries that judge: all of a pass as long as the codes' chunk, the last ones of a longer pass.
CHUNK, LAST = 512, 64


@dataclass(frozen=True)
class Choice:
    """Pairs to merge, the same for all heads.

    Attributes:
        chosen: `[B, 1, S - 1]` bool, pair (i, i + 1) is merged: slot i leaves, slot i + 1 stands for both.
        order: `[B, 1, S]` int64, the slots that stay or are empty, then those that leave, each part in order.
        count: pairs of each row, a number or `[B, 1, 1]` int64.
        most: no row has more pairs.
    """

    chosen: Tensor
    order: Tensor
    count: Tensor | int
    most: int

    def kept(self, heads: int) -> Tensor:
        """`[B, heads, S - most]` int64: the slots that stay, behind empty ones in rows that merge less than `most`."""
        size = self.order.shape[2] - self.most
        if isinstance(self.count, int):
            kept = self.order[..., :size]
        else:
            kept = self.order.gather(2, torch.arange(size, device=self.order.device) + self.most - self.count)
        return kept.expand(-1, heads, -1)


@dataclass(frozen=True)
class PairMerging(Method):
    """Merge the pairs of neighbours with the lowest attention until the cache fits."""

    kind: ClassVar[str] = "merging"
    cardinality_bias: ClassVar[bool] = True
    needs_rotation: ClassVar[bool] = True
    observes: ClassVar[bool] = True

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
    queries: int | None = option(
        None, "code: all queries of a chunk of up to 512 judge; of a longer pass the last 64 (ours, for speed)"
    )
    block: int | None = option(
        None, "ours: while decoding (where the codes append without end) free a sixteenth of the budget at a time"
    )

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        self.require_whole("queries", 1)
        self.require_whole("block", 1)

    def judges(self, step: Step) -> Step:
        """The pass as the queries see it that judge the pairs."""
        n = step.queries.shape[3]
        return step.last(self.queries or (n if n <= CHUNK else LAST))

    def sinks_of(self, budget: int) -> int:
        """32, or an eighth of a small budget, unless set."""
        return min(32, budget // 8) if self.sinks is None else self.sinks

    def recent_of(self, budget: int) -> int:
        """A quarter of the budget unless set; at least the newest token."""
        return max(1, budget // 4 if self.recent is None else self.recent)

    def block_of(self, budget: int) -> int:
        """Slots freed at a time while decoding, by default no more than one round merges."""
        if self.block is not None:
            return self.block
        return max(1, min(budget // 16, (budget - self.sinks_of(budget) - self.recent_of(budget)) // 3))

    def check(self, budget: int) -> None:
        """Check that a block can be freed in one round.

        Raises:
            ValueError: too few slots, or too large a block.
        """
        super().check(budget)
        most = self._sure(budget + 1, budget)
        if self.block_of(budget) > most:
            raise ValueError(
                f"{self.name}: block={self.block} is not valid with a budget of {budget} slots, where one round merges "
                f"{most} pairs; lower block, sinks or recent, or raise the budget"
            )

    def weigh(self, slots: Slots, step: Step, seen: Observation, choice: Choice) -> Tensor:
        """The share of the left key in each merged pair.

        Args:
            slots: `S` slots a head.
            step: the queries that judge.
            seen: what they saw.
            choice: the pairs that will be merged; what is returned for others does not count.

        Returns:
            `[B, H_kv, S - 1, 1]`, or `[B, H_kv, S - 1, d]` for a share of its own in each dimension.
        """
        raise NotImplementedError

    @property
    def by_cardinality(self) -> bool:
        """Whether a pair's cardinality raises its score, which protects merged slots from merging again."""
        return True

    def merge_stats(self, slots: Slots, share: Tensor) -> dict[str, Tensor]:
        """Side vectors of the pairs' merged slots, each `[B, H_kv, S - 1, ...]`: sums unless a method knows better.

        A bias comes beside log cardinality: a merged slot weighs what its parts did, sum c e^bias.
        """
        merged = {name: x[:, :, :-1] + x[:, :, 1:] for name, x in slots.stats.items()}
        if "bias" in merged:
            tokens = slots.cardinality.to(merged["bias"].dtype)
            weight = slots.stats["bias"] + tokens.log()
            total = (tokens[:, :, :-1] + tokens[:, :, 1:]).log()
            merged["bias"] = torch.logaddexp(weight[:, :, :-1], weight[:, :, 1:]) - total
        return merged

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """The rounds and their sizes follow from the numbers of slots; while decoding, if one slot goes at a time."""
        return arrived > 1 or self.block_of(budget) == 1

    def leaves(self, budget: int) -> int | None:
        """A block less than the slots that are one too many; one slot at a time is `steady`."""
        return budget + 1 - self.block_of(budget) if self.block_of(budget) > 1 else None

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Merge pairs in rounds until the cache fits; while decoding, until a block of slots is free.

        The queries look once (ours; the codes pick all pairs at once). In later rounds a merged slot has received what
        its parts received, and output and log-sum-exp are still those of that look.
        """
        goal = budget + 1 - self.block_of(budget) if step.queries.shape[3] == 1 else budget
        step = self.judges(step)
        if slots.ragged and goal < budget:
            return self._free_in_full_rows(slots, budget, goal, step)
        ragged = slots.ragged
        seen = observe(step, slots)
        while slots.size > goal:
            most = min(self._sure(slots.size, budget), slots.size - goal)
            count = most
            if ragged:
                filled = _filled(slots)
                count = torch.minimum(self._sure_of(filled, budget), filled - goal).clamp_min(0)
            slots, seen = self._round(slots, budget, count, most, step, seen)
        return dataclasses.replace(slots, ragged=ragged)  # rows that were full are full again

    def _free_in_full_rows(self, slots: Slots, budget: int, goal: int, step: Step) -> Slots:
        """While decoding, bring the rows of a batch that exceed the budget to `goal` slots; the others wait."""
        while slots.size > budget:
            slots = slots.pad(slots.size + slots.size - goal)  # a row that loses more than others is filled up
            filled = _filled(slots)
            count = torch.minimum(self._sure_of(filled, budget), filled - goal).masked_fill(filled <= budget, 0)
            size = int((filled - count).max())
            slots, _ = self._round(slots, budget, count, slots.size - size, step, observe(step, slots))
        return dataclasses.replace(slots, ragged=True)

    def scores(self, slots: Slots, budget: int, mass: Tensor) -> Tensor:
        """`[B, 1, S - 1]`: what merging each pair would cost, +inf where it must not be merged (code).

        Attention `mass` `[B, H_kv, S]` of the pass's queries, over both slots and all heads, discounted by place, times
        the pair's cardinality (`by_cardinality`).
        """
        if kernels.covers(slots.keys, slots.values):
            from kvrepro.kernels import pairs

            ends = self.sinks_of(budget), self.recent_of(budget)
            return pairs.scores(mass, slots, *ends, GAMMA, self.by_cardinality)
        mass = mass.sum(dim=1, keepdim=True)  # [B, 1, S]
        place = rank(slots)[:, :1]
        score = (mass[..., :-1] + mass[..., 1:]) * (-place[..., :-1] / GAMMA).exp()
        if self.by_cardinality:
            tokens = slots.cardinality[:, :1].float()
            score = score * (tokens[..., :-1] + tokens[..., 1:])
        count = slots.valid.sum(dim=2, keepdim=True)[:, :1]
        free = slots.valid[:, :1] & (place >= self.sinks_of(budget)) & (place < count - self.recent_of(budget))
        return score.masked_fill(~(free[..., :-1] & free[..., 1:]), torch.inf)

    def _sure(self, size: int, budget: int) -> int:
        """Pairs that any choice is sure to find in a row of `size` filled slots.

        A greedy matching takes at least a third of a path's pairs, since each one it takes rules out two at most.

        Raises:
            ValueError: there are none.
        """
        pairs = size - self.sinks_of(budget) - self.recent_of(budget) - 1
        if pairs < 1:
            raise ValueError(
                f"{self.name}: no pair is left to merge with a budget of {budget}, sinks={self.sinks_of(budget)} "
                f"and recent={self.recent_of(budget)}; raise the budget or protect less"
            )
        return -(-pairs // 3) if self.overlap == "disjoint" else pairs

    def _sure_of(self, filled: Tensor, budget: int) -> Tensor:
        """`[B, 1, 1]` int64: `_sure` of each row; 0 where there is no pair."""
        pairs = (filled - (self.sinks_of(budget) + self.recent_of(budget) + 1)).clamp_min(0)
        return (pairs + 2) // 3 if self.overlap == "disjoint" else pairs

    def _round(
        self, slots: Slots, budget: int, count: Tensor | int, most: int, step: Step, seen: Observation
    ) -> tuple[Slots, Observation]:
        """One round: slots, `most` a head less, and what the queries saw of them; `count` as in `Choice`."""
        score = self.scores(slots, budget, seen.mass)
        allowed = greedy_pairs(score) if self.overlap == "disjoint" else torch.isfinite(score)
        chosen = top(-score, allowed, count)
        choice = Choice(chosen, partition(pad(chosen, (0, 1)))[0], count, most)
        share = self.weigh(slots, step, seen, choice)
        return self._merge(slots, step, seen, choice, share)

    def _merge(
        self, slots: Slots, step: Step, seen: Observation, choice: Choice, share: Tensor
    ) -> tuple[Slots, Observation]:
        """The slots that stay, the chosen pairs merged, and the attention to them.

        Keys are combined before rotary embedding and stand at the right slot's position. The codes keep sums of values:
        with a capped cardinality the mean that is kept here grows beyond the mean.
        """
        kept = choice.kept(slots.keys.shape[1])

        def merged(x: Tensor, pairs: Tensor) -> Tensor:
            """What stays of `x`, with `pairs` `[B, H_kv, S - 1, ...]` at the right slot of each chosen pair."""
            pick = choice.chosen if x.dim() == 3 else choice.chosen.unsqueeze(-1)
            return take(torch.cat([x[:, :, :1], torch.where(pick, pairs, x[:, :, 1:])], dim=2), kept)

        stats = {n: merged(slots.stats[n], x) for n, x in self.merge_stats(slots, share).items()}
        cap = MAX_CARDINALITY if self.variant == "released" else None
        if kernels.covers(slots.keys, slots.values) and step.rotation.covers(slots.keys.shape[-1]):
            from kvrepro.kernels import pairs

            content, mass = pairs.merge(
                slots, seen.mass, choice, share, cap, step.rotation.frequencies(slots.keys.device)
            )
        else:
            keys, values, tokens = self._merged_pairs(slots, step, share, cap)
            content = {
                "keys": merged(slots.keys, keys),
                "values": merged(slots.values, values),
                "positions": slots.positions.gather(2, kept),
                "cardinality": merged(slots.cardinality, tokens),
            }
            mass = merged(seen.mass, seen.mass[:, :, :-1] + seen.mass[:, :, 1:])
        left = Slots(**content, stats=stats, state=slots.state, dense=False, ragged=slots.ragged)
        return left, dataclasses.replace(seen, mass=mass)

    def _merged_pairs(self, slots: Slots, step: Step, share: Tensor, cap: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value `[B, H_kv, S - 1, d]` and cardinality `[B, H_kv, S - 1]` that each pair would have, merged."""
        wide = torch.promote_types(slots.keys.dtype, torch.float32)
        plain = step.rotation.rotate(slots.keys.to(wide), -slots.positions)
        mixed = share * plain[:, :, :-1] + (1 - share) * plain[:, :, 1:]
        keys = step.rotation.rotate(mixed, slots.positions[:, :, 1:]).to(slots.keys.dtype)
        tokens = slots.cardinality[:, :, :-1] + slots.cardinality[:, :, 1:]
        tokens = tokens if cap is None else tokens.clamp_max(cap)
        left, right = (slots.cardinality[:, :, part].unsqueeze(-1) for part in (slice(0, -1), slice(1, None)))
        sums = slots.values[:, :, :-1].to(wide) * left + slots.values[:, :, 1:].to(wide) * right
        values = (sums / tokens.clamp_min(1).unsqueeze(-1)).to(slots.values.dtype)
        return keys, values, tokens


def _filled(slots: Slots) -> Tensor:
    """`[B, 1, 1]` int64: filled slots of each row."""
    return slots.valid[:, :1].sum(dim=2, keepdim=True)


def greedy_pairs(score: Tensor) -> Tensor:
    """The pairs of neighbours a greedy matching takes: lowest score first, no slot twice.

    On a path the greedy choice has a closed form. Walk from a pair down the falling scores to its local minimum: the
    minimum is taken, its neighbour is not, the next is, and so on. A pair is taken when its distance to the minimum
    it falls to is even on each side. (Of equal scores the left pair goes first.)

    Args:
        score: `[..., P]`, the score of pair (i, i+1); +inf forbids it.

    Returns:
        `[..., P]` bool.
    """
    size = score.shape[-1]
    if size and score.dtype == torch.float32 and has_kernel(score):
        from kvrepro.kernels import pairs

        return pairs.greedy(score)
    index = torch.arange(size, device=score.device)
    left_first = torch.zeros_like(score, dtype=torch.bool)
    left_first[..., 1:] = score[..., :-1] <= score[..., 1:]
    right_first = torch.zeros_like(score, dtype=torch.bool)
    right_first[..., :-1] = score[..., 1:] < score[..., :-1]
    start = torch.where(left_first, 0, index).cummax(dim=-1).values
    end = torch.where(right_first, size, index).flip(-1).cummin(dim=-1).values.flip(-1)
    return ((index - start) % 2 == 0) & ((end - index) % 2 == 0) & torch.isfinite(score)
