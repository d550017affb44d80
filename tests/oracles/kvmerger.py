"""KVMerger (arXiv 2407.08454): contiguous sets of similar keys melt into their pivot."""

from __future__ import annotations

import math

import numpy as np

from .base import Array, Chunk, Oracle, Slot, cosine


def merging_sets(joined: list[bool], total: int) -> list[list[int]]:
    """Scan backward: token i joins the set of its right neighbour when the pair (i, i + 1) is joined."""
    sets = [[total - 1]]
    for i in range(total - 2, -1, -1):
        if joined[i]:
            sets[-1].insert(0, i)
        else:
            sets.append([i])
    return sets[::-1]


def printed_sigma(distances: list[float], rounds: int = 1000) -> float:
    """σ = Σ g_i / (√2 |S|), iterated as printed until it stands still; g_p = 1 counts."""
    sigma = 1.0
    for _ in range(rounds):
        sigma = sum(math.exp(-(x**2) / (2 * sigma**2)) for x in distances) / (math.sqrt(2) * len(distances))
    return sigma


def gaussian_weights(keys: list[Array], pivot: int, sigma: str | float) -> list[float]:
    """g_i = exp(-‖k_p - k_i‖² / 2σ²), w = g / Σ g."""
    distances = [math.sqrt(float(np.dot(keys[pivot] - key, keys[pivot] - key))) for key in keys]
    if sigma == "mean_dist":  # 2σ² = (mean distance of the other members)²
        two_sigma_squared = (sum(distances) / (len(distances) - 1)) ** 2
    elif sigma == "printed":
        two_sigma_squared = 2 * printed_sigma(distances) ** 2
    else:
        two_sigma_squared = 2 * float(sigma) ** 2
    g = [math.exp(-(x**2) / two_sigma_squared) for x in distances]
    return [x / sum(g) for x in g]


class KVMerger(Oracle):
    """Protected: sinks, the most recent and the top-k by accumulated attention."""

    def __init__(
        self,
        *,
        sigma: str | float = "mean_dist",
        epsilon: float = 0.75,
        pivot: str = "attention",
        weights: str = "gaussian",
        mass: str = "values",
        budget_mode: str = "exact",
        topk: int = 0,
        reduce: str = "mean",
        shared_sets: bool = False,
        block: int = 1,
        **common: object,
    ) -> None:
        super().__init__(**common)
        self.sigma, self.epsilon, self.pivot, self.weights = sigma, epsilon, pivot, weights
        self.budget_mode, self.topk, self.reduce, self.shared_sets = budget_mode, topk, reduce, shared_sets
        self.block, self.goal, self.since = block, 0, 0
        self.mass, self.log_cardinality = mass, mass == "attention"  # where |S| goes: into the value or the logit

    def due(self, arrived: int) -> bool:
        """On overflow; with a fixed ε after each prompt pass and every block of decoded tokens."""
        self.since += arrived
        # While decoding a block of slots is freed at a time.
        self.goal = self.budget - self.block + 1 if arrived == 1 else self.budget
        if self.budget_mode == "exact":
            return len(self.heads[0]) > self.budget
        return arrived > 1 or self.since >= self.block

    def compress(self, chunk: Chunk) -> None:
        """Sets, pivots, weights, merge."""
        self.since = 0
        similarity, mass = [], []
        for slots in self.heads:
            similarity.append([cosine(a.key, b.key) for a, b in zip(slots, slots[1:], strict=False)])
            mass.append([slot.stats["mass"] for slot in slots])
        if self.shared_sets:  # one choice for the layer
            similarity = [list(np.mean(similarity, axis=0))] * len(self.heads)
            mass = [list(np.mean(mass, axis=0))] * len(self.heads)
        for h, slots in enumerate(self.heads):
            sets = merging_sets(self.joined(slots, similarity[h], mass[h]), len(slots))
            self.heads[h] = [self.melt(h, [slots[i] for i in members]) for members in sets]

    def joined(self, slots: list[Slot], similarity: list[float], mass: list[float]) -> list[bool]:
        """Which pairs (i, i + 1) end up in one set."""
        free = self.free(slots)
        heavy = sorted(free, key=lambda j: -mass[j])[: self.topk]
        mergeable = [j for j in free if j not in heavy]
        pairs = [i for i in mergeable if i + 1 in mergeable]
        if self.budget_mode == "threshold":
            return [i in pairs and similarity[i] > self.epsilon for i in range(len(slots))]
        # The ε that meets the budget: join the most similar pairs, each saves one slot.
        most = sorted(pairs, key=lambda i: -similarity[i])[: len(slots) - self.goal]
        return [i in most for i in range(len(slots))]

    def melt(self, head: int, members: list[Slot]) -> Slot:
        """k_p ← Σ w k;  v_p ← |S| Σ w v, where a member that was merged before brings back its mean value."""
        scaled = self.mass == "values"
        if len(members) == 1:
            return members[0]
        if self.pivot == "random":
            p = max(range(len(members)), key=lambda i: self.draw(head, members[i].position, stream=2))
        else:
            p = max(range(len(members)), key=lambda i: members[i].stats["mass"])
        keys = [slot.key for slot in members]
        w = gaussian_weights(keys, p, self.sigma) if self.weights == "gaussian" else [1 / len(members)] * len(members)
        tokens = sum(slot.cardinality for slot in members)  # |S|
        means = [slot.value / slot.cardinality if scaled else slot.value for slot in members]
        value = (tokens if scaled else 1) * sum(x * mean for x, mean in zip(w, means, strict=True))
        key = sum(x * k for x, k in zip(w, keys, strict=True))
        mass = sum(slot.stats["mass"] for slot in members)
        bias = self.merged_bias(members) if self.log_cardinality else members[p].bias
        return Slot(key, value, members[p].position, tokens, {**members[p].stats, "mass": mass}, bias)
