"""SnapKV (Li et al., 2024): the last queries of the prompt choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from kvrepro.attention import Step, causal_logits, softmax
from kvrepro.methods.base import Method, option
from kvrepro.slots import Slots, compact, select


@dataclass(frozen=True)
class SnapKV(Method):
    """Keep an observation window of the last tokens, and what its queries attend to most, smoothed over neighbours.

    The paper compresses the prompt once and lets the cache grow while decoding. Here a budget is a hard bound: while
    decoding, the last `window` queries choose again whenever a head overflows.
    """

    name: ClassVar[str] = "snapkv"
    title: ClassVar[str] = "SnapKV"
    kind: ClassVar[str] = "eviction"
    paper: ClassVar[str] = "SnapKV: LLM Knows What You are Looking for Before Generation (NeurIPS 2024)"
    url: ClassVar[str] = "https://arxiv.org/abs/2404.14469"

    window: int = option(32, "code: 32 queries; at most half of the budget (ours)")
    kernel: int = option(7, "code: max-pooling over 7 neighbours")
    positions: str = option("original", "code: as the model numbered the tokens", ("original",))

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        self.require_whole("window", 1)
        self.require_whole("kernel", 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"{self.name}: kernel={self.kernel} is not valid; give an odd number")

    def window_of(self, budget: int) -> int:
        """The observation window, at most half of the budget."""
        return max(1, min(self.window, budget // 2))

    def recent_of(self, budget: int) -> int:
        """The window itself stays, and `recent` tokens where that is more."""
        return max(self.window_of(budget), self.recent or 0)

    def votes(self, slots: Slots, step: Step) -> Tensor:
        """`[B, H_kv, S]`: attention of the window's queries, summed over them, averaged over the group, pooled."""
        logits = causal_logits(
            step.window_queries,
            step.window_positions,
            step.read_keys(slots),
            slots.positions,
            step.bias(slots),
            step.scale,
            step.softcap,
        )
        vote = softmax(logits).sum(dim=3).mean(dim=2)  # [B, H_kv, S]
        # Only the prefix is pooled: the window's own large votes must not spill over to their neighbours.
        inside = (
            slots.positions
            >= step.window_positions.masked_fill(step.window_positions < 0, torch.iinfo(torch.int32).max).amin(dim=1)[
                :, None, None
            ]
        )
        return max_pool1d(vote.masked_fill(inside, 0.0), self.kernel, stride=1, padding=self.kernel // 2)

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Keep the window and the best of the rest by vote."""
        return compact(
            slots, select(slots, self.votes(slots, step), budget, self.sinks, self.recent_of(budget)), budget
        )
