"""The full cache: the yardstick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvrepro.methods.base import Method, StepRule


@dataclass(frozen=True)
class Full(Method):
    """Keep everything. A budget is accepted and ignored, so that sweeps can treat it like the other methods."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full cache"
    kind: ClassVar[str] = "baseline"
    unlimited: ClassVar[bool] = True

    def step_rule(self, budget: int) -> StepRule:
        """Nothing ever goes."""
        return StepRule("none")
