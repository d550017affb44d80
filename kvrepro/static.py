"""Slots in fixed storage, written in place: decoding at a constant budget without a copy.

While decoding, one token comes and one slot goes. The storage has one slot more than the budget: the new token is
written into the free one, the queries attend to all, and the slot that leaves becomes the free one. Slots are in no
order; each one's `place` says where it stands in time. No shape depends on the data and nothing is allocated anew, so
that a whole decoding step can be captured in a CUDA graph. With the rule "none" no slot leaves: tokens are appended
until the storage is full, and whoever made it takes the slots out (`thaw`, or `full` where every region is full),
compresses, and puts them back (`refill`).

Where heads may hold different numbers of slots, their storage lies one head behind the other, each as long as it needs
(`first`, `regions`). The kernel does not care; PyTorch's code works on a copy with regions of the same length (`even`).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvrepro import kernels
from kvrepro.methods.base import StepRule
from kvrepro.rope import Rotation
from kvrepro.slots import Slots, partition, take, uniform

#: Side vectors that fixed storage holds.
SIDES = ("mass", "count", "bias", "last")
#: What it holds of every slot in any case.
_VECTORS = ("keys", "values", "positions", "cardinality", "place")


@dataclass
class StaticSlots:
    """One layer's slots in fixed storage.

    Attributes:
        keys: `[B, H_kv, S, d]`, as the model rotated them; S is the most slots a head will hold, and one more. Where
            regions differ: `[N + 1, d]`, N their sum; the last row is nobody's. All that is `[B, H_kv, S]` here is then
            `[N + 1]`.
        values: `[B, H_kv, S, d]`.
        positions: `[B, H_kv, S]` int32, the token's index in its row's text.
        cardinality: `[B, H_kv, S]` int32, tokens the slot stands for.
        place: `[B, H_kv, S]` int32, the slot's rank in time among the filled ones. Where slots stand at the running sum
            of cardinalities (rule "none" only), it is `filled` less the tokens of all later slots.
        mass: `[B, H_kv, S]` float32, attention received so far (where the rule asks for it, else empty).
        count: `[B, H_kv, S]` float32, queries that saw the slot (likewise).
        bias: `[B, H_kv, S]` float32, added to the slot's logit (where the method keeps it, else empty).
        last: `[B, H_kv, S]` float32, the newest query's attention, averaged over the layer's query heads (likewise);
            then all heads hold the same slots at the same places.
        free: `[B, H_kv]` int32, the slot the next token is written into.
        filled: `[B, H_kv]` int32, slots in use; they are the first ones until the budget is reached.
        newest: `[B]` int32, position of the token that comes next.
        done: `[B, H_kv]` int32, 0 between steps: where the kernel's programs count themselves.
        frequencies: `[d / 2]` float32, the model's rotary frequencies; empty where keys stay where they were.
        first: `[B, H_kv]` int64, where each head's region starts, in slots.
        regions: `[B, H_kv]` int32, how long it is.
        size: the longest one.
        rule: how a slot is let go.
        budget: `[B, H_kv]` int32, slots a head may hold.
        names: the side vectors the method keeps.
        turns: keys are turned to in-cache positions when they are read.
        biased: a slot's logit is raised by log(cardinality).
        counting: attention is added to mass and count.
        reduce: `[B, H_kv, G, S]` attention -> `[B, H_kv, S]`; None is the mean over the group, all the kernel knows.
        layer: index of the layer, for a rule that draws.
        state: side values of the method, kept for `thaw`.
        dense: as in `Slots`, while nothing has left.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    cardinality: Tensor
    place: Tensor
    mass: Tensor
    count: Tensor
    bias: Tensor
    last: Tensor
    free: Tensor
    filled: Tensor
    newest: Tensor
    done: Tensor
    frequencies: Tensor
    first: Tensor
    regions: Tensor
    size: int
    rule: StepRule
    budget: Tensor
    names: tuple[str, ...]
    turns: bool
    biased: bool = False
    counting: bool = True
    reduce: Callable[[Tensor], Tensor] | None = None
    layer: int = 0
    state: Mapping[str, Tensor] = field(default_factory=dict)
    dense: bool = False

    @property
    def is_even(self) -> bool:
        """Whether all regions are equally long."""
        return self.keys.dim() == 4

    @property
    def vectors(self) -> tuple[str, ...]:
        """The tensors that have a number, or a vector, for each slot of the storage."""
        return (*_VECTORS, *(name for name in SIDES if getattr(self, name).numel()))

    def _table(self) -> Tensor:
        """`[B, H_kv, size]` int64: the row of each slot of uneven storage; the last one, nobody's, beyond a region."""
        slot = torch.arange(self.size, device=self.first.device)
        row = self.first.unsqueeze(-1) + slot
        return torch.where(slot < self.regions.unsqueeze(-1), row, len(self.keys) - 1)

    def even(self) -> StaticSlots:
        """A copy with regions of the same length; what is no slot's tensor is shared, not copied."""
        table = self._table()
        return replace(self, **{name: getattr(self, name)[table] for name in self.vectors})

    def put_back(self, even: StaticSlots) -> None:
        """Take over what has become of a copy (`even`)."""
        table = self._table()
        for name in self.vectors:
            getattr(self, name)[table] = getattr(even, name)
        self.state, self.dense = even.state, even.dense

    @property
    def nbytes(self) -> int:
        """Bytes of the storage, side vectors included."""
        tensors = (*(x for x in vars(self).values() if isinstance(x, Tensor)), *self.state.values())
        return sum(x.numel() * x.element_size() for x in tensors)


def freeze_shape(
    slots: Slots,
    budget: int | Tensor,
    rule: StepRule,
    newest: Tensor,
    names: tuple[str, ...],
    rotation: Rotation | None,
    *,
    room: int | None = None,
    steps: int = 0,
    by_tokens: bool = False,
    biased: bool = False,
    counting: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
    layer: int = 0,
) -> StaticSlots:
    """Move slots into fixed storage.

    Args:
        slots: at most `room` slots a head.
        budget: slots a head may hold; `[B, H_kv]` int32 where that differs.
        rule: how a slot is let go.
        newest: `[B]` int32, position of the next token of each row; shared by all layers and advanced by the caller.
        names: side vectors the method keeps, of `SIDES`.
        rotation: the model's rotation if keys are read at in-cache positions, else None.
        room: the most slots a head will hold; None is the (largest) budget.
        steps: where the budgets differ, the steps that are to come at most: a head is not given room for more.
        by_tokens: in-cache positions count tokens, not slots; for the rule "none".
        biased: see `StaticSlots`.
        counting: see `StaticSlots`.
        reduce: see `StaticSlots`.
        layer: see `StaticSlots`.

    Returns:
        Storage of `room + 1` slots, the filled ones first, in order.
    """
    uneven = isinstance(budget, Tensor)
    if room is None:
        room = int(budget.max()) if uneven else budget
    order = slots.valid.to(torch.int8).argsort(dim=2, descending=True, stable=True)
    filled = slots.valid.sum(dim=2).to(torch.int32)
    cardinality = _widen(slots.cardinality, order, room)
    turns = rotation is not None
    nothing = torch.empty(0, dtype=torch.float32, device=filled.device)
    zeros = torch.zeros_like(slots.positions, dtype=torch.float32)
    sides = {n: _widen(slots.stats.get(n, zeros), order, room) if n in names else nothing for n in SIDES}
    heads = torch.arange(filled.numel(), device=filled.device).view_as(filled)
    made = StaticSlots(
        keys=_widen(slots.keys, order, room),
        values=_widen(slots.values, order, room),
        positions=_widen(slots.positions, order, room, -1),
        cardinality=cardinality,
        place=_places(cardinality, filled, by_tokens),
        **sides,
        free=filled.clone(),
        filled=filled,
        newest=newest,
        done=torch.zeros_like(filled),
        frequencies=rotation.frequencies(filled.device).float() if turns else nothing,
        first=heads * (room + 1),
        regions=torch.full_like(filled, room + 1),
        size=room + 1,
        rule=rule,
        budget=budget if uneven else torch.full_like(filled, budget),
        names=names,
        turns=turns,
        biased=biased,
        counting=counting,
        reduce=reduce,
        layer=layer,
        state=slots.state,
        dense=slots.dense and rule.score == "none",
    )
    return _cut(made, torch.minimum(filled + steps, made.budget) + 1) if uneven else made


def _cut(even: StaticSlots, regions: Tensor) -> StaticSlots:
    """The same slots in regions `[B, H_kv]` of their own lengths."""
    ends = regions.flatten().cumsum(0)
    slot = torch.arange(even.size, device=regions.device)
    inside = slot < regions.unsqueeze(-1)

    def flat(x: Tensor) -> Tensor:
        """`[N + 1, ...]`."""
        return torch.cat([x[inside], x.new_zeros((1, *x.shape[3:]))])

    return replace(
        even,
        **{name: flat(getattr(even, name)) for name in even.vectors},
        first=(ends - regions.flatten()).view_as(regions),
        regions=regions,
        size=int(regions.max()),
    )


def refill(static: StaticSlots, slots: Slots, *, by_tokens: bool) -> None:
    """Put compressed slots, tensors of their own, back into the same storage; what points to it stays valid.

    All of it is work for the device, the same for the same number of slots, so that a CUDA graph can hold it.
    """
    if not static.is_even:
        return _refill_regions(static, slots, by_tokens=by_tokens)
    if slots.ragged:
        order = partition(~slots.valid)[0]
        slots = slots.map(lambda x: take(x, order) if x.dim() > 2 else x)
    static.filled.copy_(slots.valid.sum(dim=2))
    static.free.copy_(static.filled)
    for name, fill in (("keys", 0), ("values", 0), ("positions", -1), ("cardinality", 0)):
        _replace(getattr(static, name), getattr(slots, name), fill)
    for name in static.names:
        _replace(getattr(static, name), slots.stats[name])
    static.place.copy_(_places(static.cardinality, static.filled, by_tokens))
    static.state, static.dense = slots.state, slots.dense


def _refill_regions(static: StaticSlots, slots: Slots, *, by_tokens: bool) -> None:
    """`refill` of uneven storage; what a region holds behind its filled slots stays: nobody looks there."""
    filled = slots.valid.sum(dim=2)
    rank = slots.valid.cumsum(dim=2) - 1  # the place in the region
    row = torch.where(slots.valid, static.first.unsqueeze(-1) + rank, len(static.keys) - 1)
    place = _places(slots.cardinality, filled, by_tokens=True) if by_tokens else rank
    new = {name: getattr(slots, name) for name in ("keys", "values", "positions", "cardinality")}
    for name, x in {**new, **{name: slots.stats[name] for name in static.names}, "place": place}.items():
        storage = getattr(static, name)
        storage[row] = x.to(storage.dtype)
    static.filled.copy_(filled)
    static.free.copy_(static.filled)
    static.state, static.dense = slots.state, slots.dense


def _replace(storage: Tensor, x: Tensor, fill: int = 0) -> None:
    """Put `x` `[B, H, n(, d)]` into the first slots of storage `[B, H, S(, d)]`, `fill` into the others."""
    storage[:, :, : x.shape[2]].copy_(x)
    storage[:, :, x.shape[2] :].fill_(fill)


def _widen(x: Tensor, order: Tensor, room: int, fill: int = 0) -> Tensor:
    """Slots `[B, H, S(, d)]` in `order` `[B, H, S]`, in storage of `room + 1` slots."""
    wide = x.new_full((*x.shape[:2], room + 1, *x.shape[3:]), fill)
    wide[:, :, : x.shape[2]] = take(x, order)
    return wide


def _places(cardinality: Tensor, filled: Tensor, by_tokens: bool) -> Tensor:
    """`[B, H, S]` int32: see `StaticSlots.place`; the slots are in order."""
    if not by_tokens:
        count = torch.arange(cardinality.shape[2], dtype=torch.int32, device=filled.device)
        return count.expand(cardinality.shape).contiguous()
    tokens = cardinality.cumsum(dim=2, dtype=torch.int32)
    return filled.unsqueeze(-1) - 1 - (tokens[..., -1:] - tokens)


def full(static: StaticSlots) -> Slots:
    """The slots of storage that is full in every head, nothing having left it, in order.

    They are the storage's own tensors where it is even, else a copy with a shorter region's empty slots in front.
    """
    found = Slots(
        keys=static.keys,
        values=static.values,
        positions=static.positions,
        cardinality=static.cardinality,
        stats={name: getattr(static, name) for name in static.names},
        state=static.state,
        dense=static.dense,
    )
    if static.is_even:
        return found
    slot = torch.arange(static.size, device=static.first.device) - (static.size - static.regions).unsqueeze(-1)
    row, empty = (static.first.unsqueeze(-1) + slot).clamp_min(0), slot < 0
    return replace(
        found,
        keys=found.keys[row],
        values=found.values[row],
        positions=found.positions[row].masked_fill_(empty, -1),
        cardinality=found.cardinality[row].masked_fill_(empty, 0),
        stats={name: x[row] for name, x in found.stats.items()},
        ragged=True,
    )


def thaw(static: StaticSlots) -> Slots:
    """The slots of fixed storage in chronological order, as the methods know them."""
    if not static.is_even:
        return thaw(static.even())
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
        state=static.state,
        dense=static.dense,
        ragged=not bool(kept.all()),
    )


def step(
    static: StaticSlots,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    window: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend with one new token a row, then let one slot go where the budget is exceeded; in place.

    Args:
        static: the slots.
        queries: `[B, H_kv, G, d]`, as the model rotated them.
        keys: `[B, H_kv, d]`, the new token's.
        values: `[B, H_kv, d]`.
        scale: factor on the logits.
        softcap: cap on the logits, or None.
        window: `[B, H_kv, G, w, d]`, and `[1]` int64, at which of the w places the queries are noted; None notes none.

    Returns:
        `[B, H_kv, G, d]`, the attention output.
    """
    if kernels.covers(queries, keys, values) and not _beyond(static):
        from kvrepro.kernels import decode

        return decode.step(static, queries, keys, values, scale, softcap, window)
    return step_reference(static, queries, keys, values, scale, softcap, window)


def _beyond(static: StaticSlots) -> bool:
    """Whether the decoding kernel does not take these slots; says so once."""
    d, d_v = static.keys.shape[-1], static.values.shape[-1]
    reasons = {
        f"heads of {d} dimensions": d < 32,
        f"keys of {d} dimensions with values of {d_v}": d != d_v,
        "a rotary embedding of a part of the head": static.turns and 2 * static.frequencies.numel() != d,
        "attention reduced over a group otherwise than by its mean": static.counting and static.reduce is not None,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        _say(found[0])
    return bool(found)


@functools.cache
def _say(reason: str) -> None:
    """Warn, once."""
    warnings.warn(f"the decoding kernel does not take {reason}: PyTorch code is used, slower", stacklevel=4)


def step_reference(
    static: StaticSlots,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    window: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`step` in PyTorch: what runs without a GPU, and what the kernel is tested against."""
    if not static.is_even:
        even = static.even()
        out = step_reference(even, queries, keys, values, scale, softcap, window)
        static.put_back(even)
        return out
    if window is not None:
        window[0].index_copy_(3, window[1], queries.unsqueeze(3))
    wide = torch.promote_types(queries.dtype, torch.float32)
    _write(static, keys, values)
    valid = torch.arange(static.size, device=keys.device) <= static.filled.unsqueeze(-1)
    logits = queries.to(wide) @ _read_keys(static, valid).to(wide).transpose(2, 3) * scale  # [B, H, G, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if static.biased:
        logits = logits + static.cardinality.to(wide).log().unsqueeze(2)
    if static.bias.numel():
        logits = logits + static.bias.to(wide).unsqueeze(2)
    p = torch.softmax(logits.masked_fill(~valid.unsqueeze(2), -torch.inf), dim=-1)
    out = p.to(values.dtype) @ static.values
    if static.counting and static.mass.numel():
        static.mass += (p.mean(dim=2) if static.reduce is None else static.reduce(p)).float()
    if static.counting and static.count.numel():
        static.count += valid
    if static.counting and static.last.numel():
        static.last.copy_(p.mean(dim=(1, 2)).unsqueeze(1).expand_as(static.last))
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
    for side in (getattr(static, name) for name in SIDES):
        if side.numel():
            side.scatter_(2, free, 0.0)


def _read_keys(static: StaticSlots, valid: Tensor) -> Tensor:
    """`[B, H_kv, S, d]`: the keys where the query sees them."""
    if not static.turns:
        return static.keys
    shift = static.newest[:, None, None] - (static.filled.unsqueeze(-1) - static.place) - static.positions
    return Rotation(static.frequencies).rotate(static.keys, shift.masked_fill(~valid, 0))


def _settle(static: StaticSlots, valid: Tensor) -> None:
    """Let one slot of each full head go; its value joins others' where the rule merges."""
    rule = static.rule
    if rule.score == "none":
        static.filled += 1
        static.free.copy_(static.filled)
        return
    full = (static.filled >= static.budget).unsqueeze(-1)  # [B, H, 1]
    leaves = _leaving(static, valid)  # [B, H, 1]: the place of the slot that leaves
    victim = (static.place == leaves).to(torch.int8).argmax(dim=2, keepdim=True)
    if rule.merge == "right":
        right = (static.place == leaves + 1).to(torch.int8).argmax(dim=2, keepdim=True)
        _join(static, victim, right, full)
    elif rule.merge == "next":
        _pass_on(static, leaves, victim, full)
    static.place -= ((static.place > leaves) & full).to(torch.int32)
    static.filled += (~full).squeeze(-1).to(torch.int32)
    static.free.copy_(torch.where(full.squeeze(-1), victim.squeeze(-1).to(torch.int32), static.filled))


def _leaving(static: StaticSlots, valid: Tensor) -> Tensor:
    """`[B, H_kv, 1]` int32: the place of the slot with the lowest score; of equal ones the earliest."""
    rule = static.rule
    if rule.score == "age":
        return torch.full_like(static.free, rule.sinks).unsqueeze(-1)
    score = static.last if rule.score == "last" else static.mass
    if rule.score == "mean":
        score = static.mass / static.count.clamp_min(1.0)
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


def _pass_on(static: StaticSlots, leaves: Tensor, victim: Tensor, full: Tensor) -> None:
    """Add a share of the value at place `leaves` to each of the next `targets` slots', or to none, at random (CaM).

    As `CaM.compress`, but for the rounding of float32: there the mean comes of running sums, and a share is the
    difference of two values.
    """
    rule, wide = static.rule, torch.promote_types(static.values.dtype, torch.float32)
    following = (static.place > leaves) & (static.place <= leaves + rule.targets)
    mean = (static.mass * following).sum(dim=2, keepdim=True) / following.sum(dim=2, keepdim=True).clamp_min(1)
    chance = static.mass.gather(2, victim) / mean.clamp_min(torch.finfo(mean.dtype).tiny)  # above 1: always
    heads = torch.arange(victim.shape[1], device=victim.device)[None, :, None]
    draw = uniform(rule.seed, static.layer, heads, static.positions.gather(2, victim), rule.stream)
    gets = following & full & (draw < chance)  # [B, H, S]
    share = (take(static.values, victim).to(wide) / rule.targets).to(static.values.dtype)
    static.values += share.masked_fill(~gets.unsqueeze(-1), 0.0)
