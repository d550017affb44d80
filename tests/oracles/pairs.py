"""AsymKV (arXiv 2506.05410) and KVSlimmer (arXiv 2603.00907): adjacent pairs, attention with cardinality.

Values are kept as the papers' codes keep them, as sums: out = Σ e^{s_i} v_i / Σ c_j e^{s_j}.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .base import Array, Chunk, Oracle, Slot, greedy_pairs, rotate

GAMMA = 4096 / math.log(512)


def second_derivatives(
    probability: list[float], values: list[Array], m: int, output: Array | None = None
) -> tuple[Array, Array, Array]:
    """c11, c12, c22 of KVSlimmer: ∂²o/∂s_i∂s_j for the pair (m, m + 1), o = Σ α v unless it is given."""
    if output is None:
        output = sum(a * v for a, v in zip(probability, values, strict=True))
    a, b = probability[m], probability[m + 1]
    c11 = a * (1 - 2 * a) * (values[m] - output)
    c22 = b * (1 - 2 * b) * (values[m + 1] - output)
    c12 = -a * b * (values[m] + values[m + 1] - 2 * output)
    return c11, c12, c22


def left_share(h11: float, h12: float, h22: float, left_mass: float, right_mass: float) -> float:
    """a = (h11 - h12) / (h11 - 2 h12 + h22), clamped to [0, 1]; the attention-weighted mean where that is undefined."""
    denominator = h11 - 2 * h12 + h22
    if denominator <= 1e-6 * (h11 + h22):
        return left_mass / (left_mass + right_mass) if left_mass + right_mass > 0 else 0.5
    return min(max((h11 - h12) / denominator, 0.0), 1.0)


class PairMerging(Oracle):
    """Sinks and the recent are protected; the lowest-scoring pairs merge, in rounds, until the cache fits."""

    log_cardinality = True

    def __init__(self, *, variant: str = "paper", overlap: str = "disjoint", block: int = 1, **common: object) -> None:
        super().__init__(**common)
        self.block, self.goal = block, 0
        self.variant, self.overlap = variant, overlap

    def read_value(self, slot: Slot) -> Array:
        """A slot's probability is c e^s / Σ c e^s; times sum / c it gives e^s sum / Σ c e^s."""
        return slot.value / slot.cardinality

    def due(self, arrived: int) -> bool:
        """On overflow; while decoding a block of slots is freed at a time."""
        self.goal = self.budget - self.block + 1 if arrived == 1 else self.budget
        return super().due(arrived)

    def compress(self, chunk: Chunk) -> None:
        """Rounds of merging, each as large as is sure to be possible; selection is shared by the layer.

        The queries look once: a merged slot has received what its parts received, and in later rounds it is weighed
        against the outputs and the normalisers of that look.
        """
        now = self.attend(chunk.queries, chunk.positions)
        self.received = [[0.0] * len(slots) for slots in self.heads]
        for head, received in enumerate(self.received):
            for row in self.group_rows(head, now):
                for j, probability in enumerate(row):
                    received[j] += probability
        while len(self.heads[0]) > self.goal:
            self.merge(self.choose(), now)
            now = self.weighed_again(now)

    def weighed_again(self, now: Chunk) -> Chunk:
        """The present slots as the same queries see them, without new outputs and normalisers."""
        looked = self.attend(now.queries, now.positions)
        probabilities = [
            [
                [p * math.exp(fresh - old) for p in row]
                for row, fresh, old in zip(rows, looked.normals[g], now.normals[g], strict=True)
            ]
            for g, rows in enumerate(looked.probabilities)
        ]
        return Chunk(now.queries, now.positions, looked.read_keys, probabilities, now.outputs, now.normals)

    def choose(self) -> list[int]:
        """Left ends of the pairs to merge."""
        total = len(self.heads[0])
        mass = [sum(column) for column in zip(*self.received, strict=True)]  # times cardinality: probabilities hold c
        pairs = total - self.sinks - max(self.recent, 1) - 1
        scores = []
        for i in range(total - 1):
            score = (mass[i] + mass[i + 1]) / math.exp(i / GAMMA)
            protected = i < self.sinks or i + 1 >= total - max(self.recent, 1)
            scores.append(math.inf if protected else score * self.cardinality_factor(i))
        if self.overlap == "disjoint":
            return greedy_pairs(scores, min(total - self.goal, math.ceil(pairs / 3)))
        lowest = sorted(range(total - 1), key=lambda i: scores[i])[: total - self.goal]
        return sorted(i for i in lowest if math.isfinite(scores[i]))

    def cardinality_factor(self, i: int) -> float:
        """c_i + c_{i+1}: merged slots are protected from merging again."""
        return self.heads[0][i].cardinality + self.heads[0][i + 1].cardinality

    def merge(self, chosen: list[int], now: Chunk) -> None:
        """All pairs at once, from the slots as they are: the left slot goes, the right one becomes the pair."""
        for h, slots in enumerate(self.heads):
            pairs = {i + 1: self.pair(h, i, slots, now) for i in chosen}
            self.heads[h] = [pairs.get(j, slot) for j, slot in enumerate(slots) if j not in chosen]
            sums = {i + 1: self.received[h][i] + self.received[h][i + 1] for i in chosen}
            self.received[h] = [sums.get(j, x) for j, x in enumerate(self.received[h]) if j not in chosen]

    def pair(self, head: int, i: int, slots: list[Slot], now: Chunk) -> Slot:
        """v* = v_i + v_{i+1}, c* = c_i + c_{i+1} (released: at most 5), k* mixed before RoPE, placed at the right."""
        left, right = slots[i], slots[i + 1]
        share = self.share(head, i, slots, now)
        a, b = (rotate(slot.key, -slot.position, self.inv_freq) for slot in (left, right))
        key = rotate(share * a + (1 - share) * b, right.position, self.inv_freq)
        tokens = left.cardinality + right.cardinality
        if self.variant == "released":
            tokens = min(tokens, 5)
        stats, bias = self.merged_stats(left, right, share), self.merged_bias([left, right])
        return Slot(key, left.value + right.value, right.position, tokens, stats, bias)

    def share(self, head: int, i: int, slots: list[Slot], now: Chunk) -> Any:
        """The weight of the left key."""
        raise NotImplementedError

    def merged_stats(self, left: Slot, right: Slot, share: Any) -> dict[str, Any]:
        """What the merged slot remembers."""
        return dict(right.stats)


class AsymKV(PairMerging):
    """k* = (g_i² ⊙ k_i + g_{i+1}² ⊙ k_{i+1}) / (g_i² + g_{i+1}²), elementwise, on keys before RoPE."""

    def compress(self, chunk: Chunk) -> None:
        """Squared gradients by every key before any merge; a merged slot carries the sum."""
        for h, slots in enumerate(self.heads):
            for j, slot in enumerate(slots):
                slot.stats["fisher"] = self.squared_gradient(h, j, chunk)
        super().compress(chunk)

    def squared_gradient(self, head: int, j: int, chunk: Chunk) -> Array:
        """From the forward pass (this project's): Σ_q α² ‖v - o‖² q², the mean over each rotated pair of dimensions."""
        total = np.zeros_like(self.heads[head][j].key)
        half = len(self.inv_freq)
        for g in range(head * self.group, (head + 1) * self.group):
            for i, row in enumerate(chunk.probabilities[g]):
                if j >= len(row):
                    continue
                away = self.read_value(self.heads[head][j]) - chunk.outputs[g, i]
                q = chunk.queries[g, i]
                for x in range(half):
                    square = (q[x] ** 2 + q[x + half] ** 2) / 2
                    total[x] += row[j] ** 2 * float(away @ away) * square
                    total[x + half] += row[j] ** 2 * float(away @ away) * square
        return total

    def share(self, head: int, i: int, slots: list[Slot], now: Chunk) -> Any:
        """Elementwise; where no gradient is known, by cardinality."""
        left, right = slots[i], slots[i + 1]
        share = np.full_like(left.key, left.cardinality / (left.cardinality + right.cardinality))
        for x in range(len(share)):
            a, b = left.stats["fisher"][x], right.stats["fisher"][x]
            if a + b > np.finfo(np.float32).tiny:
                share[x] = a / (a + b)
        return share

    def merged_stats(self, left: Slot, right: Slot, share: Any) -> dict[str, Any]:
        """The pair's squared gradients add up."""
        return {**right.stats, "fisher": left.stats["fisher"] + right.stats["fisher"]}


class KVSlimmer(PairMerging):
    """k* from the norms of the second derivatives of the attention output."""

    passes = 0

    def accumulate(self, chunk: Chunk) -> None:
        """Released code: α over the non-sinks and a running mean of h = α (1 - 2α) ‖v - o‖₁ over chunks.

        As the code forms it: new / n + (n - 1) / n · old with n = max(1, chunks before this one); the chunk's own
        tokens have no past and take h as it is.
        """
        super().accumulate(chunk)
        if self.variant == "paper":
            return
        n = max(1, self.passes)
        self.passes += 1
        for h, slots in enumerate(self.heads):
            raw = [0.0] * len(slots)
            for row in self.group_rows(h, chunk):
                for j, probability in enumerate(row):
                    raw[j] += probability * (j >= self.sinks)
            for j, slot in enumerate(slots):
                slot.stats["alpha"] = raw[j] / sum(raw) if sum(raw) > 0 else 0.0  # the sinks alone
            for j, slot in enumerate(slots):
                alpha = slot.stats["alpha"]
                now = alpha * (1 - 2 * alpha) * self.distance(slots, j)
                fresh = slot.position >= chunk.positions[0]
                slot.stats["h"] = now if fresh else now / n + (n - 1) / n * slot.stats["h"]

    def distance(self, slots: list[Slot], j: int) -> float:
        """‖v_j - o‖₁ with o = Σ α v, where the code's v are sums over a slot's tokens."""
        output = sum(slot.stats["alpha"] * slot.value for slot in slots)
        return float(np.abs(slots[j].value - output).sum())

    def cardinality_factor(self, i: int) -> float:
        """Released code: the factor collapses to one number."""
        return 1.0 if self.variant == "released" else super().cardinality_factor(i)

    def share(self, head: int, i: int, slots: list[Slot], now: Chunk) -> Any:
        """Gradient-free closed form."""
        if self.variant == "released":
            left, right = slots[i].stats["alpha"], slots[i + 1].stats["alpha"]
            h12 = left * right * (self.distance(slots, i) + self.distance(slots, i + 1))
            return left_share(slots[i].stats["h"], h12, slots[i + 1].stats["h"], left, right)
        # The paper states one query; norms are summed over the chunk's queries and the group's heads.
        norms = np.zeros(3)
        values = [self.read_value(slot) for slot in slots]
        for g in range(head * self.group, (head + 1) * self.group):
            for row, output in zip(now.probabilities[g], now.outputs[g], strict=True):
                c = second_derivatives(row + [0.0] * (len(slots) - len(row)), values, i, output)
                norms += [math.sqrt(float(x @ x)) for x in c]
        return left_share(norms[0], norms[1], norms[2], *self.received[head][i : i + 2])

    def merged_stats(self, left: Slot, right: Slot, share: Any) -> dict[str, Any]:
        """Released code: h* = a² h_m + b² h_{m+1}; attention adds up."""
        stats = dict(right.stats)
        if self.variant == "released":
            stats["h"] = share**2 * left.stats["h"] + (1 - share) ** 2 * right.stats["h"]
            stats["alpha"] = left.stats["alpha"] + right.stats["alpha"]
        return stats
