"""CaM (Zhang et al., ICML 2024): merge evicted values into the next kept ones, at random."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro.attention import Step
from kvrepro.methods.base import POSITIONS, Method, StepRule, option
from kvrepro.slots import Slots, add_at, compact, protected, rank, take, uniform

_CAM_STREAM = 1
#: Slots whose values are passed on at a time.
BLOCK = 64


@dataclass(frozen=True)
class CaM(Method):
    """StreamingLLM's cache; the value of a leaving token is added to the next ones with a probability by attention.

    The authors' code for perplexity. It evicts one token a step; a chunk's tokens leave one after another, oldest
    first, after the chunk's attention has been counted (ours).
    """

    name: ClassVar[str] = "cam"
    title: ClassVar[str] = "CaM"
    kind: ClassVar[str] = "merging"
    paper: ClassVar[str] = "CaM: Cache Merging for Memory-efficient LLMs Inference (ICML 2024)"
    url: ClassVar[str] = "https://proceedings.mlr.press/v235/zhang24n.html"
    statistics: ClassVar[tuple[str, ...]] = ("mass",)
    accumulates: ClassVar[tuple[str, ...]] = ("mass",)

    sinks: int = option(4, "code: StreamingLLM's 4 sinks")
    positions: str = option("cache", "code: StreamingLLM's cache", POSITIONS)
    targets: int = option(16, "code: the next 16 kept slots")

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        self.require_whole("targets", 1)

    def step_rule(self, budget: int) -> StepRule | None:
        """The oldest slot after the sinks goes, its value to the next `targets` slots or to none."""
        if self.recent is not None or self.positions == "cardinality":
            return None
        return StepRule(
            "age",
            merge="next",
            sinks=self.sinks,
            recent=budget - self.sinks,
            targets=self.targets,
            seed=self.seed,
            stream=_CAM_STREAM,
        )

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """Without `recent` a full layer lets one slot go at each step."""
        return self.recent is None

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Let the oldest non-sink slots leave one by one, each giving v / 16 to the next 16 slots or to none."""
        recent = budget - self.sinks if self.recent is None else self.recent
        keep = protected(slots, self.sinks, recent)
        leaving = slots.valid & ~keep
        count = max(0, slots.size - self.sinks - recent)  # at most: known without asking the GPU
        # The leaving slots of a head are neighbours; bring them and the slots after them to the front, aligned.
        first = torch.where(leaving, rank(slots), slots.size).amin(dim=2, keepdim=True)
        empty = (~slots.valid).sum(dim=2, keepdim=True)  # empty slots stand in front
        offset = torch.arange(count + self.targets, device=slots.keys.device)
        index = first + empty + offset  # [B, H_kv, count + targets]
        inside = index < slots.size
        index = index.clamp_max(slots.size - 1)
        before = take(slots.values, index).masked_fill(~inside.unsqueeze(-1), 0.0)
        before = before.to(torch.promote_types(before.dtype, torch.float32))
        after = self._pour(before, self._merges(slots, index, inside, step) & leaving.gather(2, index), count)
        # Places past the end were clamped onto the last slot: their change is masked, so adding differences is safe.
        change = (after - before).masked_fill(~inside.unsqueeze(-1), 0.0)
        values = add_at(slots.values, index, change.to(slots.values.dtype))
        return compact(dataclasses.replace(slots, values=values), keep, self.sinks + recent)

    def _merges(self, slots: Slots, index: Tensor, inside: Tensor, step: Step) -> Tensor:
        """`[B, H_kv, count + targets]` bool: Bernoulli(clamp(mass / mean mass of the next 16, 0, 1)) for each slot."""
        mass = slots.stats["mass"].gather(2, index).masked_fill(~inside, 0.0)
        pad = torch.nn.functional.pad
        total = pad(mass, (1, self.targets)).cumsum(dim=2)
        number = pad(inside.float(), (1, self.targets)).cumsum(dim=2)
        n = mass.shape[2]
        after, before = slice(self.targets + 1, self.targets + 1 + n), slice(1, n + 1)
        mean = (total[..., after] - total[..., before]) / (number[..., after] - number[..., before]).clamp_min(1.0)
        chance = (mass / mean.clamp_min(torch.finfo(mass.dtype).tiny)).clamp(0.0, 1.0)
        heads = torch.arange(mass.shape[1], device=mass.device)[None, :, None]
        return uniform(self.seed, step.layer, heads, slots.positions.gather(2, index), _CAM_STREAM) < chance

    def _pour(self, values: Tensor, merges: Tensor, count: int) -> Tensor:
        """Pass values on, oldest first: what a slot has received leaves with it.

        Slot e gives merges_e / targets of what it holds to each of the next `targets` slots, a linear recurrence. A
        block of slots at a time, it is x = (1 - L)^-1 y, y being what the block held and got from earlier ones, L the
        block's shares, strictly lower triangular: (1 - L)^-1 = (1 + L) (1 + L^2) (1 + L^4) ..., all terms positive.

        Args:
            values: `[B, H_kv, n, d]`, what the slots hold.
            merges: `[B, H_kv, n]` bool, the slots that pass their values on.
            count: the first so many slots may.

        Returns:
            `[B, H_kv, n, d]`, what they held when it was their turn to leave.
        """
        values = values.clone()
        share = merges.to(values.dtype) / self.targets
        index = torch.arange(values.shape[2], device=values.device)
        for start in range(0, count, BLOCK):
            stop = min(start + BLOCK, count)
            end = min(stop + self.targets, values.shape[2])
            ahead = index[start:end, None] - index[None, start:stop]  # [rows, columns]: row gets from column
            given = ((ahead > 0) & (ahead <= self.targets)) * share[:, :, None, start:stop]  # [B, H, rows, columns]
            held, power, reach = values[:, :, start:stop], given[:, :, : stop - start], 1
            while reach < stop - start:  # L^reach is not 0
                held = held + power @ held
                power, reach = power @ power, 2 * reach
            values[:, :, start:stop] = held
            values[:, :, stop:end] += given[:, :, stop - start :] @ held
        return values
