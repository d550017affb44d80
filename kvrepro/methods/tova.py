"""TOVA (Oren et al., 2024): drop what the newest query attends to least."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvrepro.attention import Step
from kvrepro.methods.base import Method, StepRule, option
from kvrepro.slots import Slots, compact, select


@dataclass(frozen=True)
class TOVA(Method):
    """Keep what the newest query attends to most, averaged over all heads; every head of a layer keeps the same."""

    name: ClassVar[str] = "tova"
    title: ClassVar[str] = "TOVA"
    kind: ClassVar[str] = "eviction"
    paper: ClassVar[str] = "Transformers are Multi-State RNNs (EMNLP 2024)"
    url: ClassVar[str] = "https://arxiv.org/abs/2401.06104"
    statistics: ClassVar[tuple[str, ...]] = ("last",)
    accumulates: ClassVar[tuple[str, ...]] = ("last",)

    sinks: int = option(0, "paper: none")
    recent: int | None = option(None, "ours: the newest token only (None), which has not been asked for yet")

    def recent_of(self, budget: int) -> int:
        """The newest token unless set."""
        return 1 if self.recent is None else self.recent

    def accumulate(self, slots: Slots, found: dict[str, Tensor], step: Step) -> Slots:
        """Remember the newest query's attention, averaged over all query heads of the layer."""
        row = found["last"].mean(dim=(1, 2), keepdim=True).squeeze(2).float()  # [B, 1, S]
        return dataclasses.replace(slots, stats={"last": row.expand(-1, slots.keys.shape[1], -1).contiguous()})

    @property
    def sums(self) -> bool:
        """What it notes, `static.step` can note."""
        return type(self).accumulate is TOVA.accumulate

    def step_rule(self, budget: int) -> StepRule | None:
        """The slot that the newest query attends to least goes; cumulative positions are left to `compress`."""
        if self.positions == "cardinality":
            return None
        return StepRule("last", sinks=self.sinks, recent=self.recent_of(budget))

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Keep the `budget` slots the newest query attends to most."""
        return compact(slots, select(slots, slots.stats["last"], budget, self.sinks, self.recent_of(budget)), budget)
