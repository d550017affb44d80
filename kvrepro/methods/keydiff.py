"""KeyDiff (Park et al., 2025): keep the keys that differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import cosine_similarity, normalize

from kvrepro.attention import Step
from kvrepro.methods.base import Method
from kvrepro.slots import Slots, compact, select


@dataclass(frozen=True)
class KeyDiff(Method):
    """Keep the keys least similar to the mean direction of all keys; needs no attention scores."""

    name: ClassVar[str] = "keydiff"
    title: ClassVar[str] = "KeyDiff"
    kind: ClassVar[str] = "eviction"
    paper: ClassVar[str] = "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference (2025)"
    url: ClassVar[str] = "https://arxiv.org/abs/2504.15364"

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """A step is the same work whatever the slots hold."""
        return True

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Score each slot by -cos(key, mean of the unit keys) and keep the highest."""
        keys = slots.keys.float().masked_fill(~slots.valid.unsqueeze(-1), 0.0)
        anchor = normalize(keys, dim=-1).sum(dim=2, keepdim=True)  # [B, H_kv, 1, d]; cosine ignores its length
        score = -cosine_similarity(keys, anchor, dim=-1)
        return compact(slots, select(slots, score, budget, self.sinks, self.recent_of(budget)), budget)
