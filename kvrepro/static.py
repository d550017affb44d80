"""Slots in fixed storage, written in place: decoding at a constant budget without a copy.

While decoding, one token comes and one slot goes. The storage has one slot more than the budget: the new token is
written into the free one, the queries attend to all, and the slot that leaves becomes the free one. Slots are in no
order; each one's `place` says where it stands in time. No shape depends on the data and nothing is allocated anew, so
that a whole decoding step can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvrepro import kernels
from kvrepro.methods.base import StepRule
from kvrepro.rope import Rotation
from kvrepro.slots import Slots, take


@dataclass
class StaticSlots:
    """One layer's slots in fixed storage.

    Attributes:
        keys: `[B, H_kv, S, d]`, as the model rotated them; S is the budget + 1.
        values: `[B, H_kv, S, d]`.
        positions: `[B, H_kv, S]` int32, the token's index in its row's text.
        cardinality: `[B, H_kv, S]` int32, tokens the slot stands for.
        place: `[B, H_kv, S]` int32, the slot's rank in time among the filled ones.
        mass: `[B, H_kv, S]` float32, attention received so far (where the rule asks for it, else empty).
        count: `[B, H_kv, S]` float32, queries that saw the slot (likewise).
        free: `[B, H_kv]` int32, the slot the next token is written into.
        filled: `[B, H_kv]` int32, slots in use; they are the first ones until the budget is reached.
        newest: `[B]` int32, position of the token that comes next.
        frequencies: `[d / 2]` float32, the model's rotary frequencies; empty where keys stay where they were.
        rule: how a slot is let go.
        budget: slots a head may hold.
        names: the side vectors the method keeps.
        turns: keys are turned to in-cache positions when they are read.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    cardinality: Tensor
    place: Tensor
    mass: Tensor
    count: Tensor
    free: Tensor
    filled: Tensor
    newest: Tensor
    frequencies: Tensor
    rule: StepRule
    budget: int
    names: tuple[str, ...]
    turns: bool

    @property
    def size(self) -> int:
        """Slots of the storage: budget + 1."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, side vectors included."""
        return sum(x.numel() * x.element_size() for x in vars(self).values() if isinstance(x, Tensor))


def freeze_shape(
    slots: Slots, budget: int, rule: StepRule, newest: Tensor, names: tuple[str, ...], rotation: Rotation | None
) -> StaticSlots:
    """Move slots into fixed storage.

    Args:
        slots: at most `budget` slots a head.
        budget: slots a head may hold.
        rule: how a slot is let go.
        newest: `[B]` int32, position of the next token of each row; shared by all layers and advanced by the caller.
        names: side vectors the method keeps ("mass", "count").
        rotation: the model's rotation if keys are read at in-cache positions, else None.

    Returns:
        Storage of `budget + 1` slots, the filled ones first, in order.
    """
    b, h, size, _ = slots.keys.shape
    order = slots.valid.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    filled = slots.valid.sum(dim=2).to(torch.int32)
    floats = torch.float32

    def widen(x: Tensor, fill: int = 0) -> Tensor:
        """The slots in order, in storage of budget + 1."""
        wide = x.new_full((b, h, budget + 1, *x.shape[3:]), fill)
        wide[:, :, :size] = take(x, order)
        return wide

    def side(name: str) -> Tensor:
        """A side vector, or nothing."""
        if name not in names:
            return torch.empty(0, dtype=floats, device=filled.device)
        return widen(slots.stats.get(name, torch.zeros_like(slots.positions, dtype=floats)))

    place = torch.arange(budget + 1, dtype=torch.int32, device=filled.device).expand(b, h, -1).contiguous()
    turns = rotation is not None
    return StaticSlots(
        keys=widen(slots.keys),
        values=widen(slots.values),
        positions=widen(slots.positions, -1),
        cardinality=widen(slots.cardinality),
        place=place,
        mass=side("mass"),
        count=side("count"),
        free=filled.clone(),
        filled=filled,
        newest=newest,
        frequencies=rotation.inv_freq.to(filled.device, floats) if turns else torch.empty(0, device=filled.device),
        rule=rule,
        budget=budget,
        names=names,
        turns=turns,
    )


def thaw(static: StaticSlots) -> Slots:
    """The slots of fixed storage in chronological order, as the methods know them."""
    index = torch.arange(static.size, device=static.free.device)
    valid = (index != static.free.unsqueeze(-1)) & (index <= static.filled.unsqueeze(-1))
    # Empty slots stand in front; the storage may be wider than what is filled.
    order = torch.where(valid, static.positions, -1).argsort(dim=2, stable=True)[..., -int(static.filled.max()) :]
    kept = valid.gather(2, order)
    sides = {name: getattr(static, name).gather(2, order).masked_fill(~kept, 0) for name in static.names}
    return Slots(
        keys=take(static.keys, order),
        values=take(static.values, order),
        positions=static.positions.gather(2, order).masked_fill(~kept, -1),
        cardinality=static.cardinality.gather(2, order).masked_fill(~kept, 0),
        stats=sides,
        dense=False,
        ragged=not bool(kept.all()),
    )


def step(
    static: StaticSlots, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attend with one new token a row, then let one slot go where the budget is exceeded; in place.

    Args:
        static: the slots.
        queries: `[B, H_kv, G, d]`, as the model rotated them.
        keys: `[B, H_kv, d]`, the new token's.
        values: `[B, H_kv, d]`.
        scale: factor on the logits.
        softcap: cap on the logits, or None.

    Returns:
        `[B, H_kv, G, d]`, the attention output.
    """
    half_turn = not static.turns or 2 * static.frequencies.numel() == queries.shape[-1]
    if queries.shape[-1] >= 32 and half_turn and kernels.covers(queries, keys, values):
        from kvrepro.kernels import decode

        return decode.step(static, queries, keys, values, scale, softcap)
    return step_reference(static, queries, keys, values, scale, softcap)


def step_reference(
    static: StaticSlots, queries: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """`step` in PyTorch: what runs without a GPU, and what the kernel is tested against."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    _write(static, keys, values)
    valid = torch.arange(static.size, device=keys.device) <= static.filled.unsqueeze(-1)
    logits = queries.to(wide) @ _read_keys(static, valid).to(wide).transpose(2, 3) * scale  # [B, H, G, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    p = torch.softmax(logits.masked_fill(~valid.unsqueeze(2), -torch.inf), dim=-1)
    out = p.to(values.dtype) @ static.values
    if static.mass.numel():
        static.mass += p.mean(dim=2).float()
    if static.count.numel():
        static.count += valid
    _settle(static, valid)
    return out.to(queries.dtype)


def _write(static: StaticSlots, keys: Tensor, values: Tensor) -> None:
    """Put the new token into the free slot."""
    free = static.free.long().unsqueeze(-1)  # [B, H, 1]
    row = free.unsqueeze(-1).expand(*free.shape, keys.shape[-1])
    static.keys.scatter_(2, row, keys.unsqueeze(2))
    static.values.scatter_(2, row, values.unsqueeze(2))
    static.positions.scatter_(2, free, static.newest[:, None, None].expand(free.shape))
    static.cardinality.scatter_(2, free, 1)
    static.place.scatter_(2, free, static.filled.unsqueeze(-1))
    for side in (static.mass, static.count):
        if side.numel():
            side.scatter_(2, free, 0.0)


def _read_keys(static: StaticSlots, valid: Tensor) -> Tensor:
    """`[B, H_kv, S, d]`: the keys where the query sees them."""
    if not static.turns:
        return static.keys
    shift = static.newest[:, None, None] - (static.filled.unsqueeze(-1) - static.place) - static.positions
    return Rotation(static.frequencies).rotate(static.keys, shift.masked_fill(~valid, 0))


def _settle(static: StaticSlots, valid: Tensor) -> None:
    """Let one slot of each full head go; its value joins the right neighbour's where the rule merges."""
    rule, filled = static.rule, static.filled.unsqueeze(-1)
    full = (filled >= static.budget) & (rule.score != "none")  # [B, H, 1]
    leaves = _leaving(static, valid)  # [B, H, 1]: the place of the slot that leaves
    victim = (static.place == leaves).to(torch.int8).argmax(dim=2, keepdim=True)
    if rule.merge:
        right = (static.place == leaves + 1).to(torch.int8).argmax(dim=2, keepdim=True)
        _join(static, victim, right, full)
    static.place -= ((static.place > leaves) & full).to(torch.int32)
    static.filled += (~full).squeeze(-1).to(torch.int32)
    static.free.copy_(torch.where(full.squeeze(-1), victim.squeeze(-1).to(torch.int32), static.filled))


def _leaving(static: StaticSlots, valid: Tensor) -> Tensor:
    """`[B, H_kv, 1]` int32: the place of the slot with the lowest score; of equal ones the earliest."""
    rule = static.rule
    if rule.score in ("none", "age"):
        return torch.full_like(static.free, rule.sinks).unsqueeze(-1)
    score = static.mass if rule.score == "mass" else static.mass / static.count.clamp_min(1.0)
    candidate = valid & (static.place >= rule.sinks) & (static.place <= static.filled.unsqueeze(-1) - rule.recent)
    score = score.masked_fill(~candidate, torch.inf)
    lowest = candidate & (score == score.amin(dim=2, keepdim=True))
    return torch.where(lowest, static.place, torch.iinfo(torch.int32).max).amin(dim=2, keepdim=True)


def _join(static: StaticSlots, victim: Tensor, right: Tensor, full: Tensor) -> None:
    """The convex combination of two slots' values by mean attention, into the right one (WeightedKV, Alg. 1)."""
    mean = static.mass / static.count.clamp_min(1.0)
    a, c = mean.gather(2, victim).unsqueeze(-1), mean.gather(2, right).unsqueeze(-1)  # [B, H, 1, 1]
    left, old = take(static.values, victim), take(static.values, right)
    mixed = ((a * left + c * old) / (a + c).clamp_min(1e-37)).to(old.dtype)
    joined = full.unsqueeze(-1) & (a > 0) & (c > 0)
    row = right.unsqueeze(-1).expand_as(old)
    static.values.scatter_(2, row, torch.where(joined, mixed, old))
    tokens = static.cardinality.gather(2, victim) * full
    static.cardinality.scatter_add_(2, right, tokens.to(torch.int32))
