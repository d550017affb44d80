"""PyramidKV (Cai et al., 2024): SnapKV with budgets that fall from layer to layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from kvrepro.methods.base import option
from kvrepro.methods.snapkv import SnapKV


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's choice with more slots for low layers and fewer for high ones; the mean over layers is the budget."""

    name: ClassVar[str] = "pyramidkv"
    title: ClassVar[str] = "PyramidKV"
    paper: ClassVar[str] = "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (2024)"
    url: ClassVar[str] = "https://arxiv.org/abs/2406.02069"

    beta: int = option(20, "code: the top layer chooses (budget - window) / 20 slots")

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        self.require_whole("beta", 1)

    def layer_budget(self, budget: int, layer: int, layers: int) -> int:
        """An arithmetic sequence whose sum over layers is exactly `budget * layers`."""
        if layers == 1:
            return budget
        fixed = self.recent_of(budget) + self.sinks + 1
        free = budget - fixed
        low = free / self.beta
        slope = 2 * (free - low) / (layers - 1)

        def upto(n: int) -> int:
            """Free slots of the first n layers, rounded; differences of it lose nothing to rounding."""
            return round(n * (2 * free - low) - slope * n * (n - 1) / 2)

        return fixed + upto(layer + 1) - upto(layer)

    def resolve(self, budget: int) -> PyramidKV:
        """One window for all layers (code): at most half of the mean budget (ours)."""
        return dataclasses.replace(self, window=max(1, min(self.window, budget // 2)))

    def window_of(self, budget: int) -> int:
        """The observation window; `resolve` has fixed it for all layers."""
        return max(1, min(self.window, budget - self.sinks - 1))
