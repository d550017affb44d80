"""The slots of one layer's cache, and the few operations that every method is made of.

A slot is one entry of the compressed cache: a key, a value, and what must be known about them. Slots are kept in
chronological order. All functions are pure: they take `Slots` and return new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvrepro import kernels

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Slots:
    """The contents of one layer's cache.

    Attributes:
        keys: `[B, H_kv, S, d]`, rotated to `positions` as the model rotated them (post-RoPE).
        values: `[B, H_kv, S, d_v]`; for a slot that stands for several tokens, their mean unless the method says else.
        positions: `[B, H_kv, S]` int32, the token's index in its own row's text (padding not counted); -1 when empty.
        cardinality: `[B, H_kv, S]` int32, the number of tokens the slot stands for; 0 marks an empty slot.
        stats: named side vectors `[B, H_kv, S]` or `[B, H_kv, S, d]` that a method keeps (attention mass, counts). The
            one named `"bias"` is added to the slot's logit; a new slot's is 0.
        state: named side values `[B, H_kv]`, one a head (a running threshold).
        dense: nothing has been dropped or merged yet, so every slot is one token at its own position.
        ragged: some slots may be empty (padding, or heads that keep different numbers of slots).
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    cardinality: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)
    dense: bool = True
    ragged: bool = False

    @property
    def size(self) -> int:
        """Number of slots a head holds, empty ones included."""
        return self.keys.shape[2]

    @property
    def valid(self) -> Tensor:
        """`[B, H_kv, S]` bool: the slot holds something."""
        return self.cardinality > 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held, side vectors included."""
        tensors = (self.keys, self.values, self.positions, self.cardinality, *self.stats.values(), *self.state.values())
        return sum(t.numel() * t.element_size() for t in tensors)

    def append(self, new: Slots) -> Slots:
        """These slots followed by `new`; a side vector that `new` lacks starts at 0."""

        def arrived(name: str, x: Tensor) -> Tensor:
            """The new slots' side vector."""
            return new.stats[name] if name in new.stats else x.new_zeros(new.positions.shape)

        return Slots(
            keys=torch.cat([self.keys, new.keys], dim=2),
            values=torch.cat([self.values, new.values], dim=2),
            positions=torch.cat([self.positions, new.positions], dim=2),
            cardinality=torch.cat([self.cardinality, new.cardinality], dim=2),
            stats={k: torch.cat([v, arrived(k, v)], dim=2) for k, v in self.stats.items()},
            state=self.state,
            dense=self.dense and new.dense,
            ragged=self.ragged or new.ragged,
        )

    def pad(self, size: int) -> Slots:
        """These slots behind empty ones, `size` in all."""
        more = size - self.size
        pad = torch.nn.functional.pad

        def widen(x: Tensor, fill: float = 0) -> Tensor:
            """`more` empty slots in front."""
            return pad(x, (more, 0) if x.dim() == 3 else (0, 0, more, 0), value=fill)

        return Slots(
            keys=widen(self.keys),
            values=widen(self.values),
            positions=widen(self.positions, -1),
            cardinality=widen(self.cardinality),
            stats={k: widen(v) for k, v in self.stats.items()},
            state=self.state,
            dense=False,
            ragged=self.ragged or more > 0,
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Slots:
        """Apply `function` to every tensor: reordering beams, moving devices."""
        return replace(
            self,
            keys=function(self.keys),
            values=function(self.values),
            positions=function(self.positions),
            cardinality=function(self.cardinality),
            stats={k: function(v) for k, v in self.stats.items()},
            state={k: function(v) for k, v in self.state.items()},
        )


@dataclass(frozen=True)
class FlatSlots:
    """Slots one head after another, without the empty ones: how a layer holds heads of different numbers of slots.

    Attributes:
        rows: the filled slots, N of all rows and heads: keys `[N, d]`, values `[N, d_v]`, all vectors `[N]`.
        count: `[B, H_kv]` int32, how many of them are each head's.
        size: the most a head has.
    """

    rows: Slots
    count: Tensor
    size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return self.rows.nbytes + self.count.numel() * self.count.element_size()

    def spread(self) -> Slots:
        """The slots `[B, H_kv, size, ...]`, each head's behind its empty ones."""
        rows, count = self.rows, self.count.flatten().long()
        number, device = rows.positions.shape[0], count.device
        head = torch.arange(count.numel(), device=device).repeat_interleave(count, output_size=number)
        behind = count.cumsum(0)[head] - torch.arange(number, device=device)  # the slots of the head from this one on
        place = (head + 1) * self.size - behind

        def wide(x: Tensor, fill: int = 0) -> Tensor:
            """Of `[N, ...]`."""
            out = x.new_full((count.numel() * self.size, *x.shape[1:]), fill)
            return out.index_copy_(0, place, x).view(*self.count.shape, self.size, *x.shape[1:])

        return replace(
            rows,
            keys=wide(rows.keys),
            values=wide(rows.values),
            positions=wide(rows.positions, -1),
            cardinality=wide(rows.cardinality),
            stats={name: wide(x) for name, x in rows.stats.items()},
            ragged=True,
        )


def flatten(slots: Slots, keep: Tensor | None = None, count: Tensor | None = None) -> FlatSlots:
    """The filled slots alone, or those that are marked; `spread` gives them back, empty ones in front.

    Args:
        slots: the slots.
        keep: `[B, H_kv, S]` bool, filled slots; None are all that are filled.
        count: `[B, H_kv]` on the host, how many of each head those are; None asks, and makes the host wait for a GPU.

    Returns:
        The slots, in order.
    """
    dense = slots.dense and keep is None
    keep = slots.valid if keep is None else keep
    number = keep.sum(dim=2)
    count = number.cpu() if count is None else count
    total, marked = int(count.sum()), keep.flatten()
    place = torch.arange(len(marked), device=marked.device)
    rank = torch.where(marked, marked.cumsum(0) - 1, total)  # what is not marked goes to one place more
    place = place.new_empty(total + 1).scatter_(0, rank, place)[:total]
    heads, size = keep.shape[1:]
    row = place // size
    turned = ((row // heads) * size + place % size) * heads + row % heads

    def rows(x: Tensor) -> Tensor:
        """Of `[B, H, S, ...]`; a model's own keys and values are `[B, S, H, d]` in memory."""
        if x.dim() == 4 and x.transpose(1, 2).is_contiguous():
            return x.transpose(1, 2).flatten(0, 2).index_select(0, turned)
        return x.flatten(0, 2).index_select(0, place)

    held = replace(
        slots,
        keys=rows(slots.keys),
        values=rows(slots.values),
        positions=rows(slots.positions),
        cardinality=rows(slots.cardinality),
        stats={name: rows(x) for name, x in slots.stats.items()},
        dense=dense,
    )
    return FlatSlots(held, number.to(torch.int32), int(count.max()))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather slots: `x` `[B, H, S]` or `[B, H, S, d]`, `index` `[B, H, n]` -> `[B, H, n]` or `[B, H, n, d]`."""
    if x.dim() == 3:
        return x.gather(2, index)
    return x.gather(2, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


def add_at(x: Tensor, index: Tensor, source: Tensor) -> Tensor:
    """`x` with `source` `[B, H, n(, d)]` added at the slots `index` `[B, H, n]`."""
    if x.dim() == 4:
        index = index.unsqueeze(-1).expand_as(source)
    return x.scatter_add(2, index, source)


def partition(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Put the unmarked slots before the marked ones, both in order.

    Args:
        keep: `[B, H, S]` bool.

    Returns:
        The slot at each place, and the place of each slot, `[B, H, S]` int64 both.
    """
    if has_kernel(keep):
        from kvrepro.kernels import merging

        return merging.partition(keep)
    marked = keep.cumsum(dim=2)
    index = torch.arange(keep.shape[2], device=keep.device).expand_as(marked)
    place = torch.where(keep, keep.shape[2] - marked[..., -1:] + marked - 1, index - marked)
    return torch.empty_like(place).scatter_(2, place, index), place


def compact(
    slots: Slots,
    keep: Tensor,
    size: int,
    *,
    order: Tensor | None = None,
    content: tuple[Tensor, Tensor] | None = None,
    whole: bool = False,
) -> Slots:
    """Keep the marked slots, in order.

    Args:
        slots: the slots, `S` a head.
        keep: `[B, H_kv, S]` bool; at most `size` a head.
        size: slots a head afterwards. Heads that keep fewer get empty slots in front; unless that is because they
            hold fewer, the caller must set `ragged`.
        order: `[B, H_kv, S]` int64, the first result of `partition(keep & slots.valid)` where it is known already.
        content: keys and values of the slots that are left, `[B, H_kv, size, d]`, where they are not those they had.
        whole: it is known that every head keeps `size` filled slots.

    Returns:
        Slots of length `size`.
    """
    keep = keep if whole else keep & slots.valid
    order = (partition(keep)[0] if order is None else order)[..., -size:]
    empty = None if whole else ~keep.gather(2, order)
    keys, values = (take(slots.keys, order), take(slots.values, order)) if content is None else content
    return Slots(
        keys=keys,
        values=values,
        positions=_blank(slots.positions.gather(2, order), empty, -1),
        cardinality=_blank(slots.cardinality.gather(2, order), empty),
        stats={k: _blank(take(v, order), empty) for k, v in slots.stats.items()},
        state=slots.state,
        dense=False,
        ragged=slots.ragged,
    )


def _blank(x: Tensor, empty: Tensor | None, fill: int = 0) -> Tensor:
    """`x` `[B, H, S]` or `[B, H, S, d]`, in place, with `fill` where `empty` `[B, H, S]`; None says that nothing is."""
    if empty is None:
        return x
    return x.masked_fill_(empty if x.dim() == 3 else empty.unsqueeze(-1), fill)


def rank(slots: Slots) -> Tensor:
    """`[B, H_kv, S]` int64: the place of each slot among its head's filled slots, counted from 0."""
    return slots.valid.cumsum(dim=2) - 1


def protected(slots: Slots, sinks: int, recent: int, *, in_front: bool = False) -> Tensor:
    """`[B, H_kv, S]` bool: the first `sinks` and the last `recent` filled slots of each head.

    `in_front`: it is known that a head's empty slots stand in front of all others.
    """
    if not slots.ragged:
        index = torch.arange(slots.size, device=slots.keys.device)
        return ((index < sinks) | (index >= slots.size - recent)).expand(slots.positions.shape)
    if in_front and not sinks:
        return slots.valid & (torch.arange(slots.size, device=slots.keys.device) >= slots.size - recent)
    place = rank(slots)
    count = slots.valid.sum(dim=2, keepdim=True)
    return slots.valid & ((place < sinks) | (place >= count - recent))


def top(score: Tensor, candidates: Tensor, count: Tensor | int, taken: Tensor | None = None) -> Tensor:
    """Mark the `count` candidates with the highest score; the later slot wins a tie.

    Args:
        score: `[B, H, S]`.
        candidates: `[B, H, S]` bool.
        count: how many to mark, one number or `[B, H, 1]`.
        taken: `[B, H, S]` bool, what is marked already: no candidates, and among the marks that are returned.

    Returns:
        `[B, H, S]` bool.
    """
    if has_kernel(score):
        from kvrepro.kernels import merging

        return merging.top(score, candidates, count, taken)
    if taken is not None:
        return taken | top(score, candidates & ~taken, count)
    score = score.masked_fill(~candidates, -torch.inf)
    # Stable ascending order: among equal scores the later slot comes last, so it is the one that is kept.
    order = score.argsort(dim=2, stable=True)
    place = torch.empty_like(order).scatter_(
        2, order, torch.arange(score.shape[2], device=score.device).expand_as(order).contiguous()
    )
    return candidates & (place >= score.shape[2] - count)


def select(slots: Slots, score: Tensor, budget: int, sinks: int, recent: int) -> Tensor:
    """Mark what stays: the protected slots, and those of the rest with the highest score.

    Args:
        slots: `S` slots a head.
        score: `[B, H_kv, S]`, higher is kept.
        budget: slots that may stay.
        sinks: first slots that always stay.
        recent: last slots that always stay.

    Returns:
        `[B, H_kv, S]` bool with at most `budget` marks a head.
    """
    safe = protected(slots, sinks, recent)
    if not slots.ragged:
        return top(score, slots.valid, budget - min(slots.size, sinks + recent), safe)
    free = budget - safe.sum(dim=2, keepdim=True)
    return top(score, slots.valid, free, safe)


def next_kept(keep: Tensor) -> Tensor:
    """`[B, H, S]` int64: the index of the first kept slot at or after each slot; `S` where there is none."""
    size = keep.shape[2]
    index = torch.arange(size, device=keep.device).expand_as(keep)
    marked = torch.where(keep, index, size)
    return marked.flip(2).cummin(dim=2).values.flip(2)


def weighted_join(x: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """Put into every target the convex combination of the slots that go there.

    Args:
        x: `[B, H, S, d]`, what is joined (keys or values).
        weights: `[B, H, S]`, not negative; slots that go nowhere have weight 0.
        target: `[B, H, S]` int64, the slot each one joins (itself when it stays).

    Returns:
        `[B, H, S, d]`: at each target sum(w x) / sum(w); other rows, and targets whose weights sum to 0, unchanged.
    """
    weights = weights.to(_wide(x))
    total = torch.zeros_like(weights).scatter_add(2, target, weights)
    mixed = add_at(torch.zeros_like(x, dtype=weights.dtype), target, weights.unsqueeze(-1) * x)
    # A slot that nobody joins keeps its bits: w v / w need not be v in floating point.
    members = torch.zeros_like(weights).scatter_add(2, target, (weights > 0).to(weights.dtype))
    joined = ((members > 1) & (total > 0)).unsqueeze(-1)
    return torch.where(joined, (mixed / total.unsqueeze(-1).clamp_min(_tiny(total))).to(x.dtype), x)


def mix(
    slots: Slots,
    target: Tensor,
    weights: tuple[Tensor, Tensor],
    size: int,
    *,
    runs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the keys and values that go to each place of a new, smaller cache.

    Args:
        slots: `S` slots a head.
        target: `[B, H_kv, S]` int64, the place each slot goes to; `size` for those that go nowhere. The places that
            get something are consecutive; where `slots` is not ragged, all do.
        weights: `[B, H_kv, S]` each, a slot's weight in the sum of keys and in that of values.
        size: number of places.
        runs: what goes to one place is a run of slots, and the places follow the runs' order.

    Returns:
        Keys `[B, H_kv, size, d]` and values `[B, H_kv, size, d_v]` in their types.
    """
    wide = _wide(slots.keys)
    key_weight, value_weight = (weight.to(wide) for weight in weights)
    if kernels.covers(slots.keys, slots.values):
        from kvrepro.kernels import merging

        return merging.mix(
            slots.keys, slots.values, target, key_weight, value_weight, size, runs=runs, whole=not slots.ragged
        )

    def sums(x: Tensor, weight: Tensor) -> Tensor:
        """`[B, H, size, d]`; what goes nowhere is summed behind the last place and dropped."""
        total = x.new_zeros((*x.shape[:2], size + 1, x.shape[3]), dtype=wide)
        return add_at(total, target, weight.unsqueeze(-1) * x)[:, :, :size].to(x.dtype)

    return sums(slots.keys, key_weight), sums(slots.values, value_weight)


def total_at(x: Tensor, target: Tensor, size: int) -> Tensor:
    """`[B, H, size + 1]`: sums of `x` `[B, H, S]` at `target`; the last one is what goes nowhere (see `mix`)."""
    return x.new_zeros((*x.shape[:2], size + 1)).scatter_add_(2, target, x)


def join_right(slots: Slots, keep: Tensor, weights: Tensor) -> Slots:
    """WeightedKV's merge: each run of evicted values joins the first kept slot on its right.

    Args:
        slots: `S` slots a head; the last one of each head is kept.
        keep: `[B, H_kv, S]` bool.
        weights: `[B, H_kv, S]`, the weight of each value in the convex combination.

    Returns:
        Slots of the same length with the values and cardinalities of the kept ones updated; keys untouched.
    """
    target = next_kept(keep).clamp_max(slots.size - 1)
    weights = weights.masked_fill(~slots.valid, 0)
    values = weighted_join(slots.values, weights, target)
    cardinality = torch.zeros_like(slots.cardinality).scatter_add(2, target, slots.cardinality)
    return replace(slots, values=values, cardinality=torch.where(keep, cardinality, slots.cardinality), dense=False)


def uniform(seed: int, layer: int, head: Tensor, position: Tensor, stream: int = 0) -> Tensor:
    """A uniform number in [0, 1) that depends on these five numbers and nothing else.

    A counter-based draw (the finaliser of MurmurHash3 over the counters) instead of a generator: the same token gets
    the same draw however the prompt is cut into chunks, batched, padded or resumed, and on every device.

    Args:
        seed: the run's seed.
        layer: layer index.
        head: KV head index, integer tensor.
        position: token index, integer tensor that broadcasts with `head`.
        stream: separates independent uses.

    Returns:
        float32 tensor of the broadcast shape.
    """
    state = _mix(torch.zeros_like(position, dtype=torch.int64) + (seed & _MASK32))
    for counter in (stream, layer, head.to(torch.int64), position.to(torch.int64)):
        state = _mix(state ^ ((counter * 0x9E3779B1 + 0x7F4A7C15) & _MASK32))
    return (state >> 8).to(torch.float32) / float(1 << 24)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser in int64 arithmetic."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels take a vector `[B, H, S]`: marks, or scores of a type they know."""
    dtype = x.dtype if x.is_floating_point() else torch.float32
    return kernels.covers(x.new_empty((0, kernels.HEAD_DIMS[0]), dtype=dtype))  # it asks about heads


def _wide(x: Tensor) -> torch.dtype:
    """The type sums over `x` are formed in: float32, or float64 when `x` is."""
    return torch.promote_types(x.dtype, torch.float32)


def _tiny(x: Tensor) -> float:
    """The smallest normal number of `x`'s type."""
    return torch.finfo(x.dtype).tiny
