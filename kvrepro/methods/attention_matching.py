"""Attention Matching (Zweiger et al., 2026): a merge as a fit of the attention's mass and output."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvrepro.attention import Step
from kvrepro.fit import MARGIN, best_weights, fit_values, mixed
from kvrepro.methods.base import Method, option
from kvrepro.slots import Slots, compact, protected, top, uniform

#: Streams of the two uniform numbers that a normal one is made of.
_RADIUS, _ANGLE = 3, 4


@dataclass(frozen=True)
class AttentionMatching(Method):
    """Keep the most attended keys, and fit biases and values that give the whole cache's attention mass and output.

    For each KV head, on reference queries: the kept keys' weights e^bias come from non-negative least squares, so that
    they carry the whole cache's mass, then their values from ridge regression, so that they give its output. The "whole
    cache" is what the slots hold when they overflow: fitted slots of earlier rounds, and the tokens since. A head that
    cannot be fitted, or whose fit is no better on held-out queries, keeps its slots as they are (plain eviction).
    `slots.state["fallbacks"]` counts these for each head.

    Ours: a share of the slots, `newest`, goes to what the newest query attends to, the same in all heads, because a
    text's own queries do not ask for what a question at its end asks for; and the ridge on a slot's value is divided by
    (1 - peak)^2, its peak being the highest attention that a reference query gives it.

    The paper's reference queries are those of the context read twice, or of questions that the model asks itself. Both
    need further passes of the model, which a method here does not have: they are those of the tokens just read, moved
    to future positions. While decoding they are the last `window` queries.

    It makes no promise that a CUDA graph can hold `compress` (`steady`, `leaves`): graphs of factorisations have not
    been tried on a GPU. Between two compressions steps are captured all the same.
    """

    name: ClassVar[str] = "attention_matching"
    title: ClassVar[str] = "Attention Matching"
    kind: ClassVar[str] = "merging"
    paper: ClassVar[str] = "Fast KV Compaction via Attention Matching (2026)"
    url: ClassVar[str] = "https://arxiv.org/abs/2602.16284"
    accumulates: ClassVar[tuple[str, ...]] = ("bias",)
    needs_rotation: ClassVar[bool] = True
    whole_numbers: ClassVar[tuple[str, ...]] = ("sinks", "recent", "window", "rounds")

    recent: int | None = option(None, "ours: the newest token only (None), which few queries have seen")
    keys: str = option(
        "rms",
        "second-hand: the highest root mean square attention of the reference queries; 'mass' (ours) takes their mean",
        ("rms", "mass"),
    )
    newest: float = option(
        0.5,
        "ours: this share of the slots to choose goes to what the newest query attends to most, averaged over the "
        "layer's heads as TOVA does; the rest goes by `keys`",
    )
    queries: str = option(
        "prompt",
        "ours: the pass's own queries at future positions; 'gaussian' draws from a Gaussian fitted to them",
        ("prompt", "gaussian"),
    )
    count: int = option(1024, "ours: reference queries a query head, the last ones of the pass")
    ahead: int = option(128, "ours: they stand at the next 128 positions, in turns")
    window: int | None = option(None, "ours: reference queries while decoding; None is budget / 16, at most 32")
    rounds: int = option(30, "ours: rounds at most of the fit of biases; 0 fits none")
    ridge: float = option(
        0.01,
        "ours: the least ridge, as a share of a slot's mean square of attention; a head takes it, 10 or 100 times it, "
        "whichever is best on held-out queries",
    )
    block: int | None = option(None, "ours: while decoding, free this many slots at a time; None is budget / 16")

    def __post_init__(self) -> None:
        """Check the options' values."""
        super().__post_init__()
        for name in ("count", "ahead", "block"):
            self.require_whole(name, 1)
        self.require_number("ridge", 1e-9, 1e9)
        self.require_number("newest", 0, 1)

    def recent_of(self, budget: int) -> int:
        """The newest token, and `recent` tokens where that is more."""
        return max(1, self.recent or 0)

    def window_of(self, budget: int) -> int:
        """The observation window: a query head's query takes half a slot's bytes, so it is narrow (ours)."""
        return min(32, budget // 16) if self.window is None else min(self.window, budget)

    def block_of(self, budget: int) -> int:
        """Slots freed at a time while decoding."""
        return max(1, budget // 16) if self.block is None else self.block

    def check(self, budget: int) -> None:
        """Check that there is a choice, and room for a block.

        Raises:
            ValueError: fewer than sinks + recent + 1 slots, or a block that leaves less.
        """
        super().check(budget)
        need = self.sinks + self.recent_of(budget) + 1
        if budget - self.block_of(budget) + 1 < need:
            raise ValueError(
                f"{self.name}: a budget of {budget} slots, less a block of {self.block_of(budget)}, is below "
                f"sinks + recent + 1 = {need}; lower sinks, recent or block, or raise the budget"
            )

    def initial_state(self, slots: Slots) -> dict[str, Tensor]:
        """No head has fallen back yet."""
        return {"fallbacks": slots.positions.new_zeros(slots.positions.shape[:2], dtype=torch.float32)}

    def compress(self, slots: Slots, budget: int, step: Step) -> Slots:
        """Choose the slots that stay, then fit them to what the reference queries get from all."""
        goal = budget + 1 - self.block_of(budget) if step.queries.shape[3] == 1 else budget
        asked = self.reference(slots, step, budget)
        whole = _look(asked, slots, self.keys)
        now = _look(step.last(1), slots, "mass").score.mean(dim=1, keepdim=True).expand_as(whole.score)
        keep, size = self._kept(slots, whole.score, now, budget, goal)
        left = compact(slots, keep, size)
        cut = keep.sum(dim=2) < slots.valid.sum(dim=2)  # [B, H]: a row of a batch that still fits stays as it is
        values, bias, good = self.fit(left, asked, whole)
        changed = good & cut
        known = slots.state or self.initial_state(slots)
        return dataclasses.replace(
            left,
            values=torch.where(changed[..., None, None], values, left.values),
            stats={**left.stats, "bias": left.stats["bias"] + torch.where(changed[..., None], bias, 0.0)},
            state={"fallbacks": known["fallbacks"] + (cut & ~good).float()},
        )

    def _kept(self, slots: Slots, score: Tensor, now: Tensor, budget: int, goal: int) -> tuple[Tensor, int]:
        """Which slots stay, `goal` of those of a row that exceeds the budget.

        Args:
            slots: all.
            score: `[B, H_kv, S]`, by the reference queries.
            now: `[B, H_kv, S]`, by the newest query.
            budget: slots that a row may have.
            goal: slots that are left of a row with more.

        Returns:
            `[B, H_kv, S]` bool, and slots a head.
        """
        safe = protected(slots, self.sinks, self.recent_of(budget))
        count = slots.valid.sum(dim=2, keepdim=True)
        wanted = torch.where(count > budget, goal, count)
        free = wanted - safe.sum(dim=2, keepdim=True)
        first = (free * self.newest).int()
        keep = safe | top(now, slots.valid & ~safe, first)
        keep = keep | top(score, slots.valid & ~keep, free - first)
        waits = slots.ragged and goal < budget
        return keep, int(wanted.max()) if waits else min(goal, slots.size)

    def reference(self, slots: Slots, step: Step, budget: int) -> Step:
        """The step whose queries are fitted to: `[B, H_kv, G, m, d]`, behind the newest token, so that they see all.

        In each row the first half of the queries that count stands in the first m // 2 places, the others in the rest:
        the fit's two halves. Places that are left over have the position -1.
        """
        queries, places = step.queries, step.query_positions
        if queries.shape[3] < self.window_of(budget):
            queries, places = step.window_queries, step.window_positions
        queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
        newest = slots.positions.amax(dim=(1, 2))[:, None]  # [B, 1]
        if self.queries == "gaussian":
            plain = _turned(step, queries, -places.clamp_min(0))
            queries = self._drawn(plain, places >= 0, step.layer)
            rank = torch.arange(self.count, dtype=torch.int32, device=places.device).expand(len(places), -1)
            old, empty = torch.zeros_like(rank), (newest < 0).expand_as(rank)
        else:
            queries, places = queries[:, :, :, -self.count :], places[:, -self.count :]
            rank, empty = _in_halves(places)
            source = rank + places.shape[1] - (places >= 0).sum(dim=1, keepdim=True)  # padding is in front
            index = source.clamp_min(0)
            if slots.ragged:
                queries = queries.gather(3, index[:, None, None, :, None].expand_as(queries))
            old = places.gather(1, index)
        place = (newest + 1 + rank.clamp_min(0) % self.ahead).to(torch.int32)
        turned = _turned(step, queries, place - old)
        return dataclasses.replace(step, queries=turned, query_positions=place.masked_fill(empty, -1), view=None)

    def _drawn(self, queries: Tensor, valid: Tensor, layer: int) -> Tensor:
        """`[B, H_kv, G, count, d]`: draws from the Gaussian of each query head's `[B, H_kv, G, n, d]`; valid `[B, n]`.

        The draws depend on seed, layer and head, not on the row or on how it is padded.
        """
        _, h, g, _, d = queries.shape
        weight = valid[:, None, None, :, None].to(torch.float64)
        total = weight.sum(dim=3, keepdim=True).clamp_min(1.0)
        mean = (queries * weight).sum(dim=3, keepdim=True) / total
        off = (queries - mean) * weight
        spread = off.mT @ off / total + 1e-9 * torch.eye(d, dtype=weight.dtype, device=weight.device)
        factor, failed = torch.linalg.cholesky_ex(spread)
        factor = torch.where((failed == 0)[..., None, None], factor, 0.0)
        heads = torch.arange(h * g * self.count, device=queries.device)[:, None]
        dims = torch.arange(d, device=queries.device)
        radius, angle = (uniform(self.seed, layer, heads, dims, stream) for stream in (_RADIUS, _ANGLE))
        normal = (-2 * (1 - radius).log()).sqrt() * (2 * math.pi * angle).cos()
        return (mean + normal.view(h, g, self.count, d).double() @ factor.mT).to(queries.dtype)

    def fit(self, left: Slots, asked: Step, whole: _Whole) -> tuple[Tensor, Tensor, Tensor]:
        """What the kept slots should have.

        Args:
            left: the slots that stay, as they were.
            asked: the reference queries.
            whole: what they get from all slots.

        Returns:
            Values `[B, H_kv, S, d_v]`, what is to be added to the biases `[B, H_kv, S]`, and `[B, H_kv]` bool: the head
            could be fitted, and on the second half of the queries, values fitted to the first half have a smaller
            error than the slots as they were.
        """
        parts = [(found - whole.lse[:, :, :, part, None]).exp() for part, found in asked.logits(left)]
        share = torch.cat(parts, dim=3)  # [B, H, G, m, S]: of the whole mass
        weights = best_weights(share, self.rounds)
        p = _normalised(share * weights[:, :, None, None])
        # What a query looks at alone should answer it as it is: a slot moves the less, the higher its peak.
        loose = 1 - p.amax(dim=(2, 3))  # [B, H, S]
        rest, start = whole.output - mixed(p, left.values), torch.zeros_like(left.values)
        ridges = [self.ridge * factor for factor in (1, 10, 100)]
        found = fit_values(p * loose[:, :, None, None], rest, start, ridges)
        before, biased = (_missed(x, left.values, whole.output) for x in (_normalised(share), p))
        values = (left.values + loose[..., None] * found.values).to(left.values.dtype)
        bias = weights.log().to(left.stats["bias"].dtype)
        sound = values.isfinite().all(-1).all(-1) & bias.isfinite().all(-1)
        return values, bias, sound & (biased - found.gain < (1 - MARGIN) * before)


@dataclass(frozen=True)
class _Whole:
    """What reference queries get from all slots.

    Attributes:
        lse: `[B, H_kv, G, m]`, log-sum-exp of their logits; +inf for a place without a query.
        output: `[B, H_kv, G, m, d_v]`.
        score: `[B, H_kv, S]`, attention to each slot, or its square, summed over the queries.
    """

    lse: Tensor
    output: Tensor
    score: Tensor


def _look(asked: Step, slots: Slots, keys: str) -> _Whole:
    """Let the reference queries attend to all slots, a block of them at a time."""
    normals, outputs, score = [], [], 0.0
    for _, logits in asked.logits(slots):
        lse = logits.logsumexp(dim=-1)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        p = (logits - lse.unsqueeze(-1)).exp()
        score = score + (p if keys == "mass" else p.square()).sum(dim=(2, 3))
        outputs.append(mixed(p, slots.values))
        normals.append(lse)
    return _Whole(torch.cat(normals, dim=3), torch.cat(outputs, dim=3), score)


def _in_halves(places: Tensor) -> tuple[Tensor, Tensor]:
    """Which of a row's queries stands in each place, so that both halves have half of what counts.

    Args:
        places: `[B, m]`, positions of the queries, -1 in front for what is none.

    Returns:
        `[B, m]` int32, its rank among those that count, and `[B, m]` bool, that there is none.
    """
    m = places.shape[1]
    column = torch.arange(m, dtype=torch.int32, device=places.device)
    count = (places >= 0).sum(dim=1, keepdim=True, dtype=torch.int32)
    first = column < m // 2
    rank = torch.where(first, column - m // 2 + count // 2, column - m + count)
    return rank, rank < torch.where(first, 0, count // 2)


def _turned(step: Step, queries: Tensor, shift: Tensor) -> Tensor:
    """Queries `[B, H_kv, G, m, d]` moved by `shift` positions `[B, m]`."""
    flat = queries.flatten(1, 2)
    return step.rotation.rotate(flat, shift[:, None].expand(flat.shape[:3]).contiguous()).view(queries.shape)


def _normalised(share: Tensor) -> Tensor:
    """Shares of the whole mass `[..., S]` as attention: rows sum to 1, those of zeros stay."""
    return share / share.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(share.dtype).tiny)


def _missed(p: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """`[B, H_kv]` float64: squared error of the second half of the queries, attention `[B, H_kv, G, m, S]`."""
    half = p.shape[3] // 2
    return (mixed(p[:, :, :, half:], values) - target[:, :, :, half:]).double().square().sum(dim=(2, 3, 4))
