"""H2O (Zhang et al., 2023): heavy hitters by accumulated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvrepro.attention import Step
from kvrepro.methods.base import Method, StepRule, option
from kvrepro.slots import Slots, compact, select


@dataclass(frozen=True)
class H2O(Method):
    """Keep the recent tokens, and of the others those that received most attention from all queries so far."""

    name: ClassVar[str] = "h2o"
    title: ClassVar[str] = "H2O"
    kind: ClassVar[str] = "eviction"
    paper: ClassVar[str] = "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of LLMs (NeurIPS 2023)"
    url: ClassVar[str] = "https://arxiv.org/abs/2306.14048"
    statistics: ClassVar[tuple[str, ...]] = ("mass",)
    accumulates: ClassVar[tuple[str, ...]] = ("mass",)

    recent: int | None = option(None, "paper: half of the budget (None); the other half are heavy hitters")

    def recent_of(self, budget: int) -> int:
        """Half of the budget unless set."""
        return budget // 2 if self.recent is None else self.recent

    def step_rule(self, budget: int) -> StepRule | None:
        """The slot with the least accumulated attention goes; cumulative positions are left to `compress`."""
        if self.positions == "cardinality":
            return None
        return StepRule("mass", sinks=self.sinks, recent=self.recent_of(budget))

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Keep the slots with the largest accumulated attention (a sum, not divided by age), and the recent ones."""
        keep = select(slots, slots.stats["mass"], budget, self.sinks, self.recent_of(budget))
        return compact(slots, keep, budget)
