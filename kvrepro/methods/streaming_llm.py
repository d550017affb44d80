"""StreamingLLM (Xiao et al., 2024): attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvrepro.attention import Step
from kvrepro.methods.base import POSITIONS, Method, StepRule, option
from kvrepro.slots import Slots, compact, protected


@dataclass(frozen=True)
class StreamingLLM(Method):
    """Keep the first tokens and the most recent ones."""

    name: ClassVar[str] = "streaming_llm"
    title: ClassVar[str] = "StreamingLLM"
    kind: ClassVar[str] = "eviction"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks (ICLR 2024)"
    url: ClassVar[str] = "https://arxiv.org/abs/2309.17453"

    sinks: int = option(4, "code: 4 sinks")
    recent: int | None = option(None, "code: everything but the sinks")
    positions: str = option("cache", "code: positions are places in the cache", POSITIONS)

    def step_rule(self, budget: int) -> StepRule | None:
        """The oldest slot after the sinks goes."""
        if self.recent is not None or self.positions == "cardinality":
            return None
        return StepRule("age", sinks=self.sinks, recent=budget - self.sinks)

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """Without `recent` a full layer lets one slot go at each step."""
        return self.recent is None

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Keep `sinks` first and `budget - sinks` last slots; `recent` asks for fewer."""
        recent = budget - self.sinks if self.recent is None else self.recent
        return compact(slots, protected(slots, self.sinks, recent), self.sinks + recent)
