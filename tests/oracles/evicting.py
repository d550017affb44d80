"""Baselines that only drop slots."""

from __future__ import annotations

import math

import numpy as np

from .base import Array, Chunk, Oracle, Slot, cosine, keep, softmax, without


class StreamingLLM(Oracle):
    """The sinks and the most recent slots."""

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """First `sinks`, last `recent`, fewer where the budget is less."""
        return slots[: self.sinks] + slots[len(slots) - min(self.recent, self.budget - self.sinks) :]


class H2O(Oracle):
    """Heavy hitters by accumulated attention among the non-recent, plus the recent."""

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """The `recent` last and the sinks stay; the rest of the budget goes to the largest sums."""
        lightest_first = sorted(self.free(slots), key=lambda j: slots[j].stats["mass"])
        return without(slots, lightest_first[: len(slots) - self.budget])


class Tova(Oracle):
    """The slot the last query looks at least goes; one choice for the whole layer."""

    def compress(self, chunk: Chunk) -> None:
        """Average the last query's row over all query heads, drop the lowest, never the newest."""
        total = len(self.heads[0])
        score = [sum(rows[-1][j] for rows in chunk.probabilities) / len(chunk.probabilities) for j in range(total)]
        first, last = self.sinks, total - max(self.recent, 1)
        dropped = sorted(range(first, last), key=lambda j: score[j])[: total - self.budget]
        self.heads = [without(slots, dropped) for slots in self.heads]


class SnapKV(Oracle):
    """Attention of the last `window` queries to the prefix, max-pooled along the slots."""

    def __init__(self, *, window: int = 32, kernel: int = 7, **common: object) -> None:
        super().__init__(**common)
        self.window, self.kernel = window, kernel
        self.kept_queries: list[list[tuple[int, Array]]] = [[] for _ in range(self.group * len(self.heads))]

    def feed(self, queries: Array, keys: Array, values: Array) -> Array:
        """Remember the last `window` queries and where they stood before anything is chosen."""
        for g, kept in enumerate(self.kept_queries):
            kept.extend((self.seen + i, np.asarray(query, dtype=np.float64)) for i, query in enumerate(queries[g]))
            del kept[: -self.window]
        return super().feed(queries, keys, values)

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """Sum over the window's queries, average the group, pool, keep the best and the window."""
        prefix = len(slots) - self.window
        votes = np.zeros(prefix)
        for g in range(head * self.group, (head + 1) * self.group):
            for position, query in self.kept_queries[g]:
                visible = [j for j, slot in enumerate(slots) if slot.position <= position]
                row = softmax([self.logit(query, chunk.read_keys[head][j], slots[j]) for j in visible])
                for j, probability in zip(visible, row, strict=True):
                    if j < prefix:
                        votes[j] += probability / self.group
        reach = self.kernel // 2
        pooled = [max(votes[max(0, j - reach) : j + reach + 1]) for j in range(prefix)]
        # Pooling makes ties between neighbours; the later slot wins them.
        best = sorted(range(prefix), key=lambda j: (-pooled[j], -j))[: self.budget - self.window]
        return keep(slots, best + list(range(prefix, len(slots))))


class KeyDiff(Oracle):
    """Keys least similar to the mean direction stay."""

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """Anchor = mean of the unit keys; drop the keys closest to it."""
        anchor = sum(slot.key / math.sqrt(float(np.dot(slot.key, slot.key))) for slot in slots) / len(slots)
        similar = sorted(self.free(slots), key=lambda j: -cosine(slots[j].key, anchor))
        return without(slots, similar[: len(slots) - self.budget])


class Random(Oracle):
    """Every token draws a priority once; the lowest go."""

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """The draw depends on seed, layer, head and position only, so it does not matter how the text was chunked."""
        priority = {j: self.draw(head, slots[j].position) for j in self.free(slots)}
        return without(slots, sorted(priority, key=lambda j: priority[j])[: len(slots) - self.budget])
