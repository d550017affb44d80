"""Methods that merge evicted slots into kept ones: WeightedKV, CaM, D2O, KeepKV."""

from __future__ import annotations

import math

from .base import Array, Chunk, Oracle, Slot, cosine, keep, without


def convex(vectors: list[Array], weights: list[float]) -> Array:
    """Σ w v / Σ w."""
    return sum(weight * vector for weight, vector in zip(weights, vectors, strict=True)) / sum(weights)


class WeightedKV(Oracle):
    """arXiv 2503.01330, Alg. 1: drop the key with the lowest mean attention, merge its value to the right."""

    def __init__(self, *, merge: bool = True, **common: object) -> None:
        super().__init__(**common)
        self.merge = merge

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """Evict the excess slots with the lowest ā; each run of them joins the first kept slot on its right."""
        mean = [slot.stats["mass"] / slot.stats["count"] for slot in slots]  # ā = a / n, a temporary
        mergeable = range(self.sinks, len(slots) - max(self.recent, 1))  # the newest is never evicted
        evicted = sorted(mergeable, key=lambda j: mean[j])[: len(slots) - self.budget]
        kept: list[Slot] = []
        run: list[int] = []
        for j, slot in enumerate(slots):
            run.append(j)
            if j in evicted:
                continue
            if self.merge and len(run) > 1:
                slot.value = convex([slots[i].value for i in run], [mean[i] for i in run])
                slot.cardinality = sum(slots[i].cardinality for i in run)
            kept.append(slot)  # key, a and n of the kept slot stay as they are
            run = []
        return kept


class CaM(Oracle):
    """StreamingLLM's cache; the slot that leaves the middle is spread over the next 16 by chance."""

    def __init__(self, *, targets: int = 16, **common: object) -> None:
        super().__init__(**common)
        self.targets = targets

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """Oldest first, one after another."""
        while len(slots) > self.sinks + self.recent:
            leaving = slots.pop(self.sinks)
            following = slots[self.sinks : self.sinks + self.targets]
            mean = sum(slot.stats["mass"] for slot in following) / len(following)
            p = min(max(leaving.stats["mass"] / mean, 0.0), 1.0)
            if self.draw(head, leaving.position, stream=1) < p:  # M ~ Bernoulli(p)
                for slot in following:
                    slot.value = slot.value + leaving.value / self.targets
        return slots


def split_by_mass(oracle: Oracle, slots: list[Slot]) -> tuple[list[int], list[int]]:
    """Indices of the slots that stay and of those that leave: the lightest free ones leave."""
    newest_stays = range(oracle.sinks, len(slots) - max(oracle.recent, 1))
    evicted = sorted(newest_stays, key=lambda j: slots[j].stats["mass"])[: len(slots) - oracle.budget]
    return [j for j in range(len(slots)) if j not in evicted], sorted(evicted)


def most_similar(slots: list[Slot], j: int, kept: list[int]) -> tuple[int, float]:
    """The kept slot whose key has the largest cosine with slot j's."""
    best = max(kept, key=lambda i: cosine(slots[j].key, slots[i].key))
    return best, cosine(slots[j].key, slots[best].key)


class D2O(Oracle):
    """Evicted slots join their most similar kept slot when they pass a running threshold."""

    def __init__(self, *, alpha: float = 0.5, **common: object) -> None:
        super().__init__(**common)
        self.alpha = alpha
        self.threshold: list[float | None] = [None] * len(self.heads)

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """Cosine-weighted mean of keys and of values; the kept slot's own weight is 1."""
        kept, evicted = split_by_mass(self, slots)
        nearest = {e: most_similar(slots, e, kept) for e in evicted}
        mean = sum(similarity for _, similarity in nearest.values()) / len(nearest)
        old = self.threshold[head]
        self.threshold[head] = mean if old is None else self.alpha * old + (1 - self.alpha) * mean
        for c in kept:
            # As float32 numbers: a single evicted slot's similarity is its own mean, and equal passes.
            guests = [e for e in evicted if nearest[e][0] == c and nearest[e][1] >= self.threshold[head] - 1e-7]
            weights = [1.0] + [max(nearest[e][1], 0.0) for e in guests]
            slots[c].key = convex([slots[j].key for j in [c, *guests]], weights)
            slots[c].value = convex([slots[j].value for j in [c, *guests]], weights)
            slots[c].cardinality += sum(slots[e].cardinality for e, w in zip(guests, weights[1:], strict=True) if w > 0)
        return keep(slots, kept)


class KeepKV(Oracle):
    """Votes p; a merge leaves the current step's output as it was. Attention ∝ p e^{q·k}."""

    log_cardinality = True  # the votes

    def __init__(self, *, threshold: float = 0.8, **common: object) -> None:
        super().__init__(**common)
        self.threshold = threshold

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """The lightest free slots leave, each into its most similar kept slot or nowhere."""
        heads = range(head * self.group, (head + 1) * self.group)
        query = sum(chunk.queries[g, -1] for g in heads) / self.group
        kept, evicted = split_by_mass(self, slots)
        nearest = {e: most_similar(slots, e, kept) for e in evicted}
        for c in kept:
            guests = [e for e in evicted if nearest[e][0] == c and nearest[e][1] > self.threshold]
            if guests:
                logits = [float(query @ chunk.read_keys[head][j]) * self.scale for j in [c, *guests]]
                fold([slots[j] for j in [c, *guests]], logits)
        return without(slots, evicted)


def fold(members: list[Slot], logits: list[float]) -> None:
    """KeepKV's merge with w = p s, s = e^{q·k}, into the first member.

    v = Σ w v / Σ w;  k = Σ w k · ln(Σ w / Σ p) / Σ w ln s;  p = Σ p.
    """
    w = [slot.cardinality * math.exp(logit) for slot, logit in zip(members, logits, strict=True)]
    votes = sum(slot.cardinality for slot in members)
    mean_logit = sum(x * logit for x, logit in zip(w, logits, strict=True)) / sum(w)
    stretch = math.log(sum(w) / votes) / mean_logit
    if not 0.5 <= stretch <= 2.0:  # the mean logit is too near 0 for the division (this project's decision)
        stretch = 1.0
    first = members[0]
    first.value = convex([slot.value for slot in members], w)
    first.key = stretch * convex([slot.key for slot in members], w)
    first.cardinality = votes
