"""One layer, one sequence, plain loops: what every oracle shares.

An oracle is the executable specification of a method. It is written from the papers' equations, keeps a Python list of
slots for every KV head, and is fed chunk by chunk with the queries, keys and values a real layer would see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvrepro.slots import uniform

Array = NDArray[np.float64]


@dataclass
class Slot:
    """One entry of the compressed cache; the key is rotated (RoPE) to `position`."""

    key: Array  # [d]
    value: Array  # [d]
    position: int
    cardinality: int = 1
    stats: dict[str, Any] = field(default_factory=lambda: {"mass": 0.0, "count": 0})
    bias: float = 0.0  # added to the logit


def rotate(vector: Array, offset: float, inv_freq: Array) -> Array:
    """Turn the pairs (i, i + d/2) by offset * inv_freq[i] radians: what moving a key by `offset` positions means."""
    half = len(inv_freq)
    turned = vector.copy()
    for i in range(half):
        angle = offset * inv_freq[i]
        turned[i] = vector[i] * math.cos(angle) - vector[i + half] * math.sin(angle)
        turned[i + half] = vector[i + half] * math.cos(angle) + vector[i] * math.sin(angle)
    return turned


def softmax(logits: list[float]) -> list[float]:
    """The textbook softmax, shifted by the maximum."""
    top = max(logits)
    powers = [math.exp(logit - top) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def cosine(a: Array, b: Array) -> float:
    """Cosine of the angle between two vectors."""
    return float(np.dot(a, b)) / (math.sqrt(float(np.dot(a, a))) * math.sqrt(float(np.dot(b, b))))


def greedy_pairs(scores: list[float], n: int) -> list[int]:
    """Left ends i of n pairs (i, i + 1): lowest score first, a pair is taken if both its slots are still free."""
    free = [True] * (len(scores) + 1)
    chosen: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: scores[i]):
        if len(chosen) < n and math.isfinite(scores[i]) and free[i] and free[i + 1]:
            free[i] = free[i + 1] = False
            chosen.append(i)
    return sorted(chosen)


def column_sums(queries: Array, keys: Array, scale: float, first: int) -> Array:
    """Mass each key gets from all queries of one head: queries [c, d], keys [S, d]; query i sees keys 0 … first + i."""
    sums = np.zeros(len(keys))
    for i, query in enumerate(queries):
        probabilities = softmax([float(np.dot(query, key)) * scale for key in keys[: first + i + 1]])
        for j, probability in enumerate(probabilities):
            sums[j] += probability
    return sums


def read_positions(slots: list[Slot], mode: str) -> list[int]:
    """Where each slot's key stands when it is read; the newest token always keeps its own position."""
    newest = slots[-1].position
    if mode == "original":
        return [slot.position for slot in slots]
    if mode == "cache":  # rank in the cache
        return [newest - (len(slots) - 1) + rank for rank in range(len(slots))]
    if mode == "cardinality":  # inclusive running sum of the tokens each slot stands for
        running = [sum(slot.cardinality for slot in slots[: i + 1]) - 1 for i in range(len(slots))]
        return [newest - running[-1] + total for total in running]
    raise ValueError(mode)


@dataclass
class Chunk:
    """What a method may look at after the chunk's attention."""

    queries: Array  # [H_q, c, d]
    positions: list[int]  # of the queries
    read_keys: list[list[Array]]  # [H_kv][S]: the keys as they were read, rotated to their reading positions
    probabilities: list[list[list[float]]]  # [H_q][c][visible slots]
    outputs: Array  # [H_q, c, d]
    normals: list[list[float]]  # [H_q][c]: log of the sum of the exponentials of a query's logits


class Oracle:
    """The full cache; a method overrides `compress` (whole layer) or `compress_head` (one KV head)."""

    log_cardinality = False  # attention counts a slot `cardinality` times
    reduce = "mean"  # accumulated attention of the G query heads of one KV head

    def __init__(
        self,
        *,
        query_heads: int,
        kv_heads: int,
        inv_freq: Array,
        budget: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        layer: int = 0,
        sinks: int = 0,
        recent: int = 0,
        positions: str = "original",
        seed: int = 0,
    ) -> None:
        self.group = query_heads // kv_heads
        self.inv_freq = np.asarray(inv_freq, dtype=np.float64)
        self.scale = scale or (2 * len(self.inv_freq)) ** -0.5
        self.softcap = softcap
        self.budget, self.layer = budget, layer
        self.sinks, self.recent, self.positions, self.seed = sinks, recent, positions, seed
        self.heads: list[list[Slot]] = [[] for _ in range(kv_heads)]
        self.peers: list[Oracle] = [self]  # the oracles of all layers
        self.seen = 0

    def feed(self, queries: Array, keys: Array, values: Array) -> Array:
        """One forward: queries [H_q, c, d], keys and values [H_kv, c, d] after RoPE -> attention output [H_q, c, d]."""
        queries, keys, values = (np.asarray(x, dtype=np.float64) for x in (queries, keys, values))
        arrived = keys.shape[1]
        for h, slots in enumerate(self.heads):
            for i in range(arrived):
                slots.append(Slot(keys[h, i].copy(), values[h, i].copy(), self.seen + i))
        self.seen += arrived
        chunk = self.attend(queries, [self.seen - arrived + i for i in range(arrived)])
        if self.budget is not None:
            self.accumulate(chunk)
            if self.due(arrived):
                self.compress(chunk)
        return chunk.outputs

    def due(self, arrived: int) -> bool:
        """Whether to compress after a pass of `arrived` tokens."""
        return len(self.heads[0]) > self.budget

    def attend(self, queries: Array, positions: list[int]) -> Chunk:
        """Causal attention of queries at `positions` to all slots, written out."""
        read_keys = []
        for slots in self.heads:
            places = read_positions(slots, self.positions)
            read_keys.append(
                [
                    rotate(slot.key, place - slot.position, self.inv_freq)
                    for slot, place in zip(slots, places, strict=True)
                ]
            )
        outputs = np.zeros_like(queries)
        probabilities: list[list[list[float]]] = []
        normals: list[list[float]] = []
        for g in range(len(queries)):
            slots, keys = self.heads[g // self.group], read_keys[g // self.group]
            probabilities.append([])
            normals.append([])
            for i, query in enumerate(queries[g]):
                visible = [j for j, slot in enumerate(slots) if slot.position <= positions[i]]
                logits = [self.logit(query, keys[j], slots[j]) for j in visible]
                normals[g].append(math.log(sum(math.exp(x) for x in logits)))
                row = softmax(logits)
                outputs[g, i] = sum(row[j] * self.read_value(slots[j]) for j in visible)
                probabilities[g].append(row)
        return Chunk(queries, positions, read_keys, probabilities, outputs, normals)

    def logit(self, query: Array, key: Array, slot: Slot) -> float:
        """Scaled (and capped) dot product, with log c where a slot counts as c tokens."""
        dot = float(np.dot(query, key)) * self.scale
        if self.softcap is not None:
            dot = self.softcap * math.tanh(dot / self.softcap)
        return dot + slot.bias + (math.log(slot.cardinality) if self.log_cardinality else 0.0)

    def merged_bias(self, members: list[Slot]) -> float:
        """Beside log c: the slot made of `members` weighs what they did, Σ c e^bias."""
        weight = sum(slot.cardinality * math.exp(slot.bias) for slot in members)
        return math.log(weight / sum(slot.cardinality for slot in members))

    def read_value(self, slot: Slot) -> Array:
        """The value attention mixes."""
        return slot.value

    def group_rows(self, head: int, chunk: Chunk) -> list[list[float]]:
        """All rows of attention to the slots of one KV head: every query of every query head that shares it."""
        return [row for g in range(head * self.group, (head + 1) * self.group) for row in chunk.probabilities[g]]

    def accumulate(self, chunk: Chunk) -> None:
        """Accumulated attention of every slot, and how many queries could see it."""
        for h, slots in enumerate(self.heads):
            group = range(h * self.group, (h + 1) * self.group)
            for j, slot in enumerate(slots):
                per_head = [sum(row[j] for row in chunk.probabilities[g] if j < len(row)) for g in group]
                mass = {"mean": sum(per_head) / self.group, "max": max(per_head), "sum": sum(per_head)}
                slot.stats["mass"] += mass[self.reduce]
                slot.stats["count"] += sum(1 for position in chunk.positions if slot.position <= position)

    def compress(self, chunk: Chunk) -> None:
        """Bring every KV head to the budget."""
        for h, slots in enumerate(self.heads):
            self.heads[h] = self.compress_head(h, slots, chunk)

    def compress_head(self, head: int, slots: list[Slot], chunk: Chunk) -> list[Slot]:
        """Bring one KV head to the budget."""
        raise NotImplementedError

    def free(self, slots: list[Slot]) -> list[int]:
        """Indices of the slots that are neither sinks nor recent."""
        return list(range(self.sinks, len(slots) - self.recent))

    def draw(self, head: int, position: int, stream: int = 0) -> float:
        """The package's counter-based uniform number for one token."""
        return float(uniform(self.seed, self.layer, torch.tensor(head), torch.tensor(position), stream))


def keep(slots: list[Slot], chosen: list[int]) -> list[Slot]:
    """The chosen slots in chronological order."""
    return [slots[i] for i in sorted(chosen)]


def without(slots: list[Slot], dropped: list[int]) -> list[Slot]:
    """All but the dropped slots."""
    return [slot for i, slot in enumerate(slots) if i not in dropped]
