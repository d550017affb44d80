"""A merge as a fit: Attention Matching."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict

import numpy as np

from .base import Array, Chunk, Oracle, Slot, read_positions, rotate
from .evicting import SnapKV
from .kvmerger import KVMerger
from .pairs import PairMerging


class AttentionMatching(Oracle):
    """arXiv 2602.16284: the most attended keys, their biases by non-negative least squares, their values by ridge."""

    def __init__(
        self,
        *,
        keys: str = "rms",
        newest: float | None = None,
        heads: str | None = None,
        least: float = 0.1,
        queries: str = "prompt",
        count: int = 2048,
        fitted: int = 64,
        ahead: int = 128,
        window: int = 2,
        rounds: int = 10,
        ridge: float = 0.01,
        block: int = 1,
        base: Oracle | None = None,
        **common: object,
    ) -> None:
        super().__init__(**common)
        self.base, self.log_cardinality = base, base is not None and base.log_cardinality
        self.power, self.greedy = 1 if keys == "mass" else 2, keys == "greedy"
        self.queries, self.count, self.fits, self.ahead = queries, count, fitted, ahead
        self.window = max(window, base.window) if isinstance(base, SnapKV) else window
        self.rounds, self.ridge, self.block, self.least = rounds, ridge, block, least
        self.pooled = base is None and heads != "same"
        self.newest = (0.25 if self.pooled else 0.5) if newest is None else newest
        self.rooms: list[int] | None = None  # of each head, once slots are shared out
        self.waiting: Chunk | None = None
        self.past: list[list[tuple[int, Array]]] = [[] for _ in range(self.group * len(self.heads))]
        self.fallbacks = [0] * len(self.heads)

    def feed(self, queries: Array, keys: Array, values: Array) -> Array:
        """Remember all queries and where they stood."""
        for g, past in enumerate(self.past):
            past.extend((self.seen + i, np.asarray(query, dtype=np.float64)) for i, query in enumerate(queries[g]))
        return super().feed(queries, keys, values)

    def due(self, arrived: int) -> bool:
        """On overflow, which the base must see too: some free a block while decoding."""
        if self.base is not None:
            self.base.heads, self.base.budget = self.heads, self.budget
            self.base.due(arrived)
        rooms = self.rooms or [self.budget] * len(self.heads)
        return any(len(slots) > room for slots, room in zip(self.heads, rooms, strict=True))

    def compress(self, chunk: Chunk) -> None:
        """What stays of all heads, then a fit for each; the first time, all layers wait for the last one."""
        if not self.pooled or self.rooms is not None or len(chunk.positions) == 1:
            self.settle(chunk)
            return
        self.waiting = chunk
        if self is self.peers[-1]:
            self.share_out()
            for peer in self.peers:
                peer.settle(peer.waiting)

    def share_out(self) -> None:
        """Each head's fewest slots; the rest go to what is attended to most, in whatever head it is."""
        fewest = max(int(self.least * self.budget), self.sinks + max(1, self.recent) + self.block)
        fewest = min(self.budget, fewest)
        pool = []
        for peer in self.peers:
            for head, slots in enumerate(peer.heads):
                score = peer.look(head, slots, peer.waiting)[-1]
                safe = [*range(self.sinks), *range(len(slots) - max(1, self.recent), len(slots))]
                score[safe] = math.inf
                pool += [(peer, head, value) for value in sorted(score, reverse=True)[fewest:]]
            peer.rooms = [fewest] * len(peer.heads)
        given = (self.budget - fewest) * len(self.peers) * len(self.heads)
        for peer, head, _ in sorted(pool, key=lambda entry: -entry[2])[:given]:
            peer.rooms[head] += 1

    def settle(self, chunk: Chunk) -> None:
        """Bring every head to what it may hold, less a block while decoding."""
        self.seen_now = self.now(chunk) if self.base is None else {}
        freed = self.block - 1 if len(chunk.positions) == 1 else 0
        left = None if self.base is None else self.left_by_base(self.base, chunk, self.budget - freed)
        for head, slots in enumerate(self.heads):
            room = self.budget if self.rooms is None else self.rooms[head]
            if len(slots) > room:
                self.heads[head] = self.fitted(head, slots, chunk, room - freed, None if left is None else left[head])

    def left_by_base(self, base: Oracle, chunk: Chunk, goal: int) -> list[list[Slot]]:
        """The base's choice from copies of the slots; it keeps sums of values where it has pairs."""
        sums = isinstance(base, PairMerging)
        copies = [[dataclasses.replace(slot) for slot in slots] for slots in self.heads]
        for slot in (slot for slots in copies if sums for slot in slots):
            slot.value = slot.value * slot.cardinality
        base.heads = copies
        if not isinstance(base, PairMerging | KVMerger):
            base.budget = goal
        if isinstance(base, SnapKV):
            base.kept_queries = [past[-base.window :] for past in self.past]
        base.compress(chunk)
        for slot in (slot for slots in base.heads if sums for slot in slots):
            slot.value = slot.value / slot.cardinality
        return base.heads

    def reference(self, head: int, slots: list[Slot], chunk: Chunk) -> list[list[Array]]:
        """For each query head of the group its reference queries, at positions behind the newest token."""
        taken = max(self.window, len(chunk.positions))
        group = [self.past[g][-taken:] for g in range(head * self.group, (head + 1) * self.group)]
        if self.queries == "gaussian":
            plain = [[rotate(query, -place, self.inv_freq) for place, query in past] for past in group]
            group = [[(0, x) for x in self.drawn(head * self.group + g, np.array(q))] for g, q in enumerate(plain)]
        newest = slots[-1].position
        return [
            [
                rotate(query, newest + 1 + i % self.ahead - place, self.inv_freq)
                for i, (place, query) in [*enumerate(past[j] for j in reversed(evenly(len(past), self.count)))][::-1]
            ]
            for past in group
        ]

    def drawn(self, query_head: int, queries: Array) -> list[Array]:
        """Draws from the Gaussian with the mean and the covariance of one head's queries [n, d]."""
        d = queries.shape[1]
        off = queries - queries.mean(0)
        factor = np.linalg.cholesky(off.T @ off / len(queries) + 1e-9 * np.eye(d))
        draws = []
        for i in range(self.count):
            normal = np.zeros(d)
            for j in range(d):
                u, v = (self.draw(query_head * self.count + i, j, stream) for stream in (3, 4))
                normal[j] = math.sqrt(-2 * math.log(1 - u)) * math.cos(2 * math.pi * v)
            draws.append(queries.mean(0) + factor @ normal)
        return draws

    def look(self, head: int, slots: list[Slot], chunk: Chunk) -> tuple[list[list[Array]], list[float], list, Array]:
        """The reference queries, the sums of their masses, what they get from all slots, and the slots' scores."""
        group = self.reference(head, slots, chunk)
        asked = [query for queries in group for query in queries]
        totals, outputs, score = [], [], np.zeros(len(slots))
        for query in asked:
            masses = self.masses(query, slots, chunk.read_keys[head])
            totals.append(sum(masses))
            outputs.append(sum(x * slot.value for x, slot in zip(masses, slots, strict=True)) / totals[-1])
            score += (np.array(masses) / totals[-1]) ** self.power
        if len(group[0]) < len(chunk.positions):  # what the others looked at is near
            at = {slot.position: x for slot, x in zip(slots, score, strict=True)}
            beside = [[at[p] for p in range(slot.position - 1, slot.position + 2) if p in at] for slot in slots]
            score = np.array([np.mean(near) for near in beside])
        return group, totals, outputs, score

    def fitted(self, head: int, slots: list[Slot], chunk: Chunk, goal: int, left: list[Slot] | None) -> list[Slot]:
        """Choose; unless decoding, fit on the first half of the queries, judge on the second, fit on all."""
        group, totals, outputs, score = self.look(head, slots, chunk)
        asked = [query for queries in group for query in queries]
        # The queries that are fitted to: evenly spread ones of each query head, the newest among them.
        n, spread = len(group[0]), evenly(len(group[0]), self.fits)
        chosen = [g * n + i for g in range(self.group) for i in spread]
        first = np.array([i < len(spread) // 2 for _ in range(self.group) for i in range(len(spread))])
        asked, totals, outputs = ([x[i] for i in chosen] for x in (asked, totals, outputs))
        if left is None:
            all_shares = np.array([self.masses(q, slots, chunk.read_keys[head]) for q in asked])
            now = np.array([np.mean(self.seen_now[slot.position]) for slot in slots])
            left = self.chosen(slots, score, now, goal, all_shares / np.array(totals)[:, None])
        if len(chunk.positions) == 1:
            return left
        places = read_positions(left, self.positions)
        keys = [rotate(s.key, place - s.position, self.inv_freq) for s, place in zip(left, places, strict=True)]
        share = np.array([self.masses(q, left, keys) for q in asked]) / np.array(totals)[:, None]
        target, start = np.array(outputs), np.array([slot.value for slot in left])
        weights = self.weights(share, first)
        biased, plain = (x / x.sum(1, keepdims=True) for x in (share * weights, share))
        loose = 1 - biased.max(0)
        tried = [self.values(biased[first], target[first], start, loose, self.ridge * f) for f in (1, 10, 100)]
        errors = [(((biased @ values - target)[~first]) ** 2).sum() for values in tried]
        best = int(np.argmin(errors))
        if errors[best] < (1 - 1e-6) * ((plain @ start - target)[~first] ** 2).sum():
            values = self.values(biased, target, start, loose, self.ridge * 10**best)
            for slot, value, weight in zip(left, values, weights, strict=True):
                slot.value, slot.bias = value, slot.bias + math.log(weight)
        else:
            self.fallbacks[head] += 1
        return left

    def now(self, chunk: Chunk) -> dict[int, list[float]]:
        """The newest query's attention to each token, of the heads that hold it.

        It is the newest of the reference queries; where those are drawn it is the text's own, as it attended.
        """
        seen: dict[int, list[float]] = defaultdict(list)
        for g in range(self.group * len(self.heads)):
            head = g // self.group
            slots = self.heads[head]
            if self.queries == "gaussian":
                shares = chunk.probabilities[g][-1]
            else:
                newest = self.reference(head, slots, chunk)[g % self.group][-1]
                masses = self.masses(newest, slots, chunk.read_keys[head])
                shares = [mass / sum(masses) for mass in masses]
            for slot, share in zip(slots, shares, strict=True):
                seen[slot.position].append(share)
        return seen

    def masses(self, query: Array, slots: list[Slot], keys: list[Array]) -> list[float]:
        """e^logit of each slot."""
        return [math.exp(self.logit(query, key, slot)) for key, slot in zip(keys, slots, strict=True)]

    def chosen(self, slots: list[Slot], score: Array, now: Array, goal: int, share: Array) -> list[Slot]:
        """Sinks, the newest ones, what the newest query attends to most, and what the reference queries do."""
        free = list(range(self.sinks, len(slots) - max(1, self.recent)))
        count = goal - (len(slots) - len(free))
        first = sorted(free, key=lambda j: -now[j])[: int(count * self.newest)]
        free = [j for j in free if j not in first]
        if self.greedy:
            safe = [j for j in range(len(slots)) if j not in free]
            stays = pursuit(share, safe, count - len(first))
            return [slots[j] for j in sorted(stays)]
        dropped = sorted(free, key=lambda j: score[j])[: len(slots) - goal]
        return [slot for j, slot in enumerate(slots) if j not in dropped]

    def weights(self, share: Array, first: Array) -> Array:
        """Early-stopped non-negative least squares of share @ w = 1."""
        errors = [((share[~first] @ w - 1) ** 2).sum() for w in self.path(share[first])]
        best = next(k for k, error in enumerate(errors) if error <= min(errors) + 1e-6 * errors[0])
        return np.maximum(self.path(share)[best], 1e-8)

    def path(self, share: Array) -> list[Array]:
        """Accelerated projected gradient from 1, columns scaled to length 1."""
        length = np.sqrt((share**2).sum(0))
        if not len(share):
            return [np.ones_like(length)] * (self.rounds + 1)
        scaled = share / length
        stride = 1 / (scaled.T @ scaled).sum(1).max()
        now = ahead = before = length
        found = [now / length]
        for k in range(self.rounds):
            before, now = now, np.maximum(ahead - stride * (scaled.T @ (scaled @ ahead - 1)), 0)
            ahead = now + k / (k + 3) * (now - before)
            found.append(now / length)
        return found

    def values(self, p: Array, target: Array, start: Array, loose: Array, ridge: float) -> Array:
        """min |P V - O|^2 + r |(V - V_0) / (1 - peak)|^2, r a share of the mean square of a column of P (1 - peak)."""
        if not len(p):
            return start
        scaled = p * loose
        pull = ridge * (scaled**2).sum() / p.shape[1]
        change = np.linalg.solve(scaled.T @ scaled + pull * np.eye(p.shape[1]), scaled.T @ (target - p @ start))
        return start + loose[:, None] * change


def evenly(n: int, most: int) -> list[int]:
    """At most `most` of n places, evenly spread, the last among them."""
    some = min(n, most)
    return [n - 1 - (some - 1 - i) * n // some for i in range(some)]


def pursuit(share: Array, chosen: list[int], count: int, rounds: int = 64) -> list[int]:
    """Orthogonal matching pursuit of share @ w = 1: `chosen` and `count` more columns, count / rounds at a time."""
    picks, stays, weight = math.ceil(count / rounds), list(chosen), dict.fromkeys(chosen, 1.0)
    while len(stays) < len(chosen) + count:
        for _ in range(3):
            carried = [sum(row[j] * weight[j] for j in stays) for row in share]
            weight = {
                j: weight[j]
                * sum(row[j] for row in share)
                / sum(row[j] * c for row, c in zip(share, carried, strict=True))
                for j in stays
            }
        lack = [1 - 0.999 * sum(row[j] * weight[j] for j in stays) for row in share]
        free = [j for j in range(share.shape[1]) if j not in stays]
        gain = {j: sum(row[j] * x for row, x in zip(share, lack, strict=True)) for j in free}
        now = min(picks, len(chosen) + count - len(stays))
        for j in sorted(free, key=lambda j: gain[j])[-now:]:  # of equal ones the later
            stays.append(j)
            weight[j] = 1.0
    return stays
