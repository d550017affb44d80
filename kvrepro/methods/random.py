"""Random eviction: what any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvrepro.attention import Step
from kvrepro.methods.base import Method
from kvrepro.slots import Slots, compact, select, uniform


@dataclass(frozen=True)
class Random(Method):
    """Keep a uniformly random subset of all tokens seen, drawn per head."""

    name: ClassVar[str] = "random"
    title: ClassVar[str] = "Random eviction"
    kind: ClassVar[str] = "eviction"

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Each token has one random priority for life; keep the highest, which is a uniform sample at every step."""
        heads = torch.arange(slots.keys.shape[1], device=slots.keys.device)[None, :, None]
        priority = uniform(self.seed, step.layer, heads, slots.positions)
        return compact(slots, select(slots, priority, budget, self.sinks, self.recent_of(budget)), budget)
