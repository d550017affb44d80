"""One decoding step over fixed slots: attend, count the attention, let one slot go, all in place.

Two launches. `_attend` walks over the slots in splits (flash decoding): it writes the new token into the free slot,
turns keys to their in-cache positions, and leaves each split's partial output and, where the method asks for attention,
the logits. `_settle` joins the splits; beside that, other programs add the probabilities to the slots' sums, and the
last of a KV head finds the slot that leaves and merges its value into its right neighbour's or into the next ones'.
Where the newest query's attention is averaged over a layer's heads, the last program of a row does so for them all.

The twin is `static.step_reference`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrepro.kernels import on_its_device, processors
from kvrepro.kernels.rotation import cos_sin

if TYPE_CHECKING:
    from kvrepro.static import StaticSlots

_LOG2E = tl.constexpr(1.4426950408889634)
#: How a slot's score is formed; the lowest leaves.
SCORES = {"none": 0, "age": 1, "mass": 2, "mean": 3, "last": 4}
#: What becomes of the value that leaves.
MERGES = {"": 0, "right": 1, "next": 2}
#: Slots a tile of `_attend` holds, slots counted, scanned and added to at a time by `_settle`, most splits a head is
#: cut into, warps, stages of the pipeline.
CONFIG = {
    "tile": 64,
    "settle_tile": 512,
    "scan_tile": 4096,
    "pass_tile": 16,
    "splits": 64,
    "attend_warps": 4,
    "settle_warps": 4,
    "stages": 3,
}


@triton.jit
def _attend(
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, pos_ptr, place_ptr, card_ptr, free_ptr, filled_ptr, newest_ptr,
    freq_ptr, bias_ptr, logit_ptr, acc_ptr, max_ptr, sum_ptr,
    first_ptr, region_ptr, window_ptr, at_ptr, q_b, q_h, new_k_b, new_k_h, new_v_b, new_v_h, heads, wide, span, width,
    scale, softcap,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, ROTATE: tl.constexpr,
    STATS: tl.constexpr, CAPPED: tl.constexpr, BIASED: tl.constexpr, OWN: tl.constexpr, WINDOW: tl.constexpr,
    EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one KV head: grid (B * H_kv, splits)."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // heads, head % heads
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    half: tl.constexpr = D // 2
    group, low, dim = tl.arange(0, GP), tl.arange(0, half), tl.arange(0, D)
    free = tl.load(free_ptr + head)
    filled = tl.load(filled_ptr + head)
    newest = tl.load(newest_ptr + b)
    first, size = tl.load(first_ptr + head), tl.load(region_ptr + head)
    # Keys are read in halves: rotary embedding pairs dimension j with j + d / 2.
    q_row = q_ptr + b * q_b + (h * G + group) * q_h
    q_low = tl.load(q_row[:, None] + low[None, :], mask=group[:, None] < G, other=0.0)
    q_high = tl.load(q_row[:, None] + half + low[None, :], mask=group[:, None] < G, other=0.0)
    if WINDOW:
        noted = (window_ptr + ((head * G + group) * width + tl.load(at_ptr)) * D)[:, None]
        real = (group[:, None] < G) & (split == 0)
        tl.store(noted + low[None, :], q_low, mask=real)
        tl.store(noted + half + low[None, :], q_high, mask=real)
    new_k = new_k_ptr + b * new_k_b + h * new_k_h
    new_low, new_high = tl.load(new_k + low), tl.load(new_k + half + low)
    new_v = tl.load(new_v_ptr + b * new_v_b + h * new_v_h + dim)
    if ROTATE:
        freq = tl.load(freq_ptr + low)
    best = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, D], tl.float32)
    for start in tl.range(split * span, tl.minimum((split + 1) * span, size), BLOCK, num_stages=STAGES):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < size
        is_new = slot == free
        row = first + slot
        k_low = tl.load(k_ptr + row[:, None] * D + low[None, :], mask=inside[:, None], other=0.0)
        k_high = tl.load(k_ptr + row[:, None] * D + half + low[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(v_ptr + row[:, None] * D + dim[None, :], mask=inside[:, None], other=0.0)
        k_low = tl.where(is_new[:, None], new_low[None, :], k_low)
        k_high = tl.where(is_new[:, None], new_high[None, :], k_high)
        v = tl.where(is_new[:, None], new_v[None, :], v)
        valid = inside & (slot <= filled)
        if ROTATE:
            place = tl.load(place_ptr + row, mask=inside, other=0)
            position = tl.load(pos_ptr + row, mask=inside, other=0)
            shift = tl.where(valid & (is_new == 0), newest - (filled - place) - position, 0)
            if tl.max(tl.abs(shift), 0) > 0:
                angle = shift.to(tl.float32)[:, None] * freq[None, :]
                cos, sin = cos_sin(angle)
                turned = k_low.to(tl.float32) * cos - k_high.to(tl.float32) * sin
                k_high = (k_high.to(tl.float32) * cos + k_low.to(tl.float32) * sin).to(k_high.dtype)
                k_low = turned.to(k_low.dtype)
        logit = tl.dot(q_low, tl.trans(k_low), input_precision=precision)
        logit = (logit + tl.dot(q_high, tl.trans(k_high), input_precision=precision)) * scale
        if CAPPED:
            ratio = tl.exp2(-2.0 * tl.abs(logit) / softcap * _LOG2E)
            tanh = (1.0 - ratio) / (1.0 + ratio)
            logit = softcap * tl.where(logit < 0, -tanh, tanh)
        logit *= _LOG2E
        if BIASED:
            tokens = tl.load(card_ptr + row, mask=valid & (is_new == 0), other=1)
            logit += tl.log2(tokens.to(tl.float32))[None, :]
        if OWN:
            own = tl.load(bias_ptr + row, mask=valid & (is_new == 0), other=0.0)
            logit += (own * _LOG2E)[None, :]
        logit = tl.where(valid[None, :], logit, -float("inf"))
        if STATS:
            out_row = (head * G + group) * wide
            tl.store(logit_ptr + out_row[:, None] + slot[None, :], logit, mask=(group[:, None] < G) & inside[None, :])
        higher = tl.maximum(best, tl.max(logit, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(logit - safe[:, None])
        fade = tl.exp2(best - safe)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=precision)
        best = higher
    if (free >= split * span) & (free < (split + 1) * span):
        row = (first + free) * D
        tl.store(k_ptr + row + low, new_low)
        tl.store(k_ptr + row + half + low, new_high)
        tl.store(v_ptr + row + dim, new_v)
    part = (head * tl.num_programs(1) + split) * G + group
    tl.store(max_ptr + part, best, mask=group < G)
    tl.store(sum_ptr + part, total, mask=group < G)
    tl.store(acc_ptr + part[:, None] * D + dim[None, :], acc, mask=group[:, None] < G)


@triton.jit
def _join(
    out_ptr, acc_ptr, max_ptr, sum_ptr, head, role, splits, G: tl.constexpr, D: tl.constexpr, SP: tl.constexpr
):  # fmt: skip
    """The output of one query head from its splits."""
    part, dim = tl.arange(0, SP), tl.arange(0, D)
    index = (head * splits + part) * G + role
    best = tl.load(max_ptr + index, mask=part < splits, other=-float("inf"))
    weight = tl.exp2(best - tl.max(best, 0))
    total = tl.sum(weight * tl.load(sum_ptr + index, mask=part < splits, other=0.0), 0)
    acc = tl.load(acc_ptr + index[:, None] * D + dim[None, :], mask=part[:, None] < splits, other=0.0)
    out = tl.sum(weight[:, None] * acc, 0) / total
    tl.store(out_ptr + (head * G + role) * D + dim, out.to(out_ptr.dtype.element_ty))


@triton.jit
def _count(
    logit_ptr, max_ptr, sum_ptr, place_ptr, mass_ptr, count_ptr, last_ptr, low_ptr, where_ptr, at_ptr,
    head, first, piece, pieces, free, filled, size, wide, sinks, recent, splits,
    G: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, SCORE: tl.constexpr,
    MASS: tl.constexpr, COUNT: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Add this step's attention to a block of slots, or note it, and the one with the lowest score among them."""
    part, group = tl.arange(0, SP), tl.arange(0, GP)
    index = (head * splits + part[:, None]) * G + group[None, :]
    known = (part[:, None] < splits) & (group[None, :] < G)
    best = tl.load(max_ptr + index, mask=known, other=-float("inf"))
    top = tl.where(group < G, tl.max(best, 0), 0.0)
    sums = tl.load(sum_ptr + index, mask=known, other=0.0)
    lse = top + tl.log2(tl.where(group < G, tl.sum(tl.exp2(best - top[None, :]) * sums, 0), 1.0))
    slot = piece * BLOCK + tl.arange(0, BLOCK)
    valid = (slot < size) & (slot <= filled)
    old = valid & (slot != free)
    logit = tl.load(
        logit_ptr + (head * G + group)[:, None] * wide + slot[None, :],
        mask=(group[:, None] < G) & valid[None, :], other=-float("inf"),
    )  # fmt: skip
    seen = tl.sum(tl.exp2(logit - lse[:, None]), 0) / G
    score = seen
    if LAST:
        tl.store(last_ptr + first + slot, seen, mask=valid)
    if MASS:
        score += tl.load(mass_ptr + first + slot, mask=old, other=0.0)
        tl.store(mass_ptr + first + slot, score, mask=valid)
    if COUNT:
        count = tl.load(count_ptr + first + slot, mask=old, other=0.0) + 1.0
        tl.store(count_ptr + first + slot, count, mask=valid)
        if SCORE == 3:
            score /= count
    if (SCORE == 2) | (SCORE == 3):
        place = tl.load(place_ptr + first + slot, mask=old, other=filled)
        candidate = valid & (place >= sinks) & (place <= filled - recent)
        score = tl.where(candidate, score, float("inf"))
        low = tl.min(score, 0)
        # Of equal scores the earlier slot leaves, as in `slots.top`.
        where = tl.min(tl.where(candidate & (score == low), place, 2147483647), 0)
        tl.store(low_ptr + head * pieces + piece, low)
        tl.store(where_ptr + head * pieces + piece, where)
        tl.store(at_ptr + head * pieces + piece, tl.sum(tl.where(candidate & (place == where), slot, 0), 0))


@triton.jit
def _average(
    last_ptr, place_ptr, first_ptr, base, heads, free, filled, size, sinks, recent, BLOCK: tl.constexpr
):  # fmt: skip
    """Average a row's newest attention over its heads from `base` on; place and index of the slot with the lowest."""
    least, leaves, victim = float("inf"), 2147483647, 0
    for start in range(0, tl.minimum(filled + 1, size), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        valid = (slot < size) & (slot <= filled)
        total = tl.zeros([BLOCK], tl.float32)
        for k in range(0, heads):
            first = tl.load(first_ptr + base + k)
            total += tl.load(last_ptr + first + slot, mask=valid, other=0.0, cache_modifier=".cg")
        mean = total / heads
        for k in range(0, heads):
            first = tl.load(first_ptr + base + k)
            tl.store(last_ptr + first + slot, mean, mask=valid)
        row = tl.load(first_ptr + base) + slot
        place = tl.load(place_ptr + row, mask=valid & (slot != free), other=filled)
        candidate = valid & (place >= sinks) & (place <= filled - recent)
        score = tl.where(candidate, mean, float("inf"))
        low = tl.min(score, 0)
        where = tl.min(tl.where(candidate & (score == low), place, 2147483647), 0)
        at = tl.sum(tl.where(candidate & (place == where), slot, 0), 0)
        better = (low < least) | ((low == least) & (where < leaves))
        least, leaves, victim = (
            tl.where(better, low, least),
            tl.where(better, where, leaves),
            tl.where(better, at, victim),
        )
    return leaves, victim


@triton.jit
def _mix(x):
    """MurmurHash3's finaliser in uint32; `slots._mix`."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _note(state, counter):
    """One more number in the hash."""
    return _mix(state ^ (counter.to(tl.uint32) * 0x9E3779B1 + 0x7F4A7C15))


@triton.jit
def _uniform(seed, stream, layer, head, position):
    """`slots.uniform`, bit for bit; all five are integers of 32 or 64 bits."""
    state = _note(_note(_mix(seed.to(tl.uint32)), stream), layer)
    state = _note(_note(state, head), position)
    return (state >> 8).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _pass_on(
    v_ptr, pos_ptr, mass_ptr, near_ptr, h, first, victim, number, targets, seed, stream, layer,
    D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add a share of the victim's value to each of the next `number` slots', or to none, at random."""
    dim = tl.arange(0, D)
    total = 0.0
    for start in range(0, number, TILE):
        k = start + tl.arange(0, TILE)
        near = tl.load(near_ptr + k, mask=k < number, other=0, cache_modifier=".cg")
        total += tl.sum(tl.load(mass_ptr + first + near, mask=k < number, other=0.0, cache_modifier=".cg"), 0)
    mass = tl.load(mass_ptr + first + victim, cache_modifier=".cg")
    chance = mass / tl.maximum(total / tl.maximum(number, 1), 1.1754943508222875e-38)
    if _uniform(seed, stream, layer, h, tl.load(pos_ptr + first + victim)) < chance:
        left = tl.load(v_ptr + (first + victim) * D + dim)
        share = (left.to(tl.float32) / targets).to(left.dtype).to(tl.float32)
        for start in range(0, number, TILE):
            k = start + tl.arange(0, TILE)
            near = tl.load(near_ptr + k, mask=k < number, other=0, cache_modifier=".cg")
            row = v_ptr + (first + near)[:, None] * D + dim[None, :]
            old = tl.load(row, mask=(k < number)[:, None], other=0.0)
            tl.store(row, (old.to(tl.float32) + share[None, :]).to(old.dtype), mask=(k < number)[:, None])


@triton.jit
def _let_go(
    v_ptr, pos_ptr, place_ptr, card_ptr, mass_ptr, count_ptr, free_ptr, low_ptr, where_ptr, at_ptr, near_ptr,
    head, h, first, pieces, size, filled, leaves, victim, targets, seed, stream, layer,
    D: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr, SCORE: tl.constexpr, MERGE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Free the slot with the lowest score of all, its value joined to others' where the rule merges.

    `leaves` is its place, where age decides, and `victim` its index, where the row's heads decided together.
    """
    right = 0
    if (SCORE == 2) | (SCORE == 3):
        piece = tl.arange(0, PP)
        there = piece < pieces
        low = tl.load(low_ptr + head * pieces + piece, mask=there, other=float("inf"), cache_modifier=".cg")
        where = tl.load(where_ptr + head * pieces + piece, mask=there, other=2147483647, cache_modifier=".cg")
        at = tl.load(at_ptr + head * pieces + piece, mask=there, other=0, cache_modifier=".cg")
        leaves = tl.min(tl.where(low == tl.min(low, 0), where, 2147483647), 0)
        victim = tl.sum(tl.where(there & (where == leaves), at, 0), 0)
    for start in range(0, size, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        place = tl.load(place_ptr + first + slot, mask=slot < size, other=-1, cache_modifier=".cg")
        if SCORE == 1:
            victim += tl.sum(tl.where(place == leaves, slot, 0), 0)
        if MERGE == 1:
            right += tl.sum(tl.where(place == leaves + 1, slot, 0), 0)
        if MERGE == 2:
            after = place - leaves - 1
            tl.store(near_ptr + head * targets + after, slot, mask=(slot < size) & (after >= 0) & (after < targets))
        tl.store(place_ptr + first + slot, place - 1, mask=(slot < size) & (place > leaves))
    if MERGE == 1:
        dim = tl.arange(0, D)
        a = tl.load(mass_ptr + first + victim, cache_modifier=".cg")
        a /= tl.load(count_ptr + first + victim, cache_modifier=".cg")
        c = tl.load(mass_ptr + first + right, cache_modifier=".cg")
        c /= tl.load(count_ptr + first + right, cache_modifier=".cg")
        left_v = tl.load(v_ptr + (first + victim) * D + dim)
        right_v = tl.load(v_ptr + (first + right) * D + dim)
        mixed = (a * left_v.to(tl.float32) + c * right_v.to(tl.float32)) / tl.maximum(a + c, 1e-37)
        mixed = tl.where((a > 0) & (c > 0), mixed, right_v.to(tl.float32))
        tl.store(v_ptr + (first + right) * D + dim, mixed.to(v_ptr.dtype.element_ty))
        tokens = tl.load(card_ptr + first + victim) + tl.load(card_ptr + first + right)
        tl.store(card_ptr + first + right, tokens)
    if MERGE == 2:
        tl.debug_barrier()  # the slots noted above are read by other threads
        _pass_on(
            v_ptr, pos_ptr, mass_ptr, near_ptr + head * targets, h, first, victim,
            tl.minimum(filled - leaves, targets), targets, seed, stream, layer, D, TILE,
        )  # fmt: skip
    tl.store(free_ptr + head, victim)


@triton.jit(do_not_specialize=["targets", "seed", "stream", "layer"])
def _settle(
    out_ptr, acc_ptr, max_ptr, sum_ptr, logit_ptr, v_ptr, pos_ptr, place_ptr, card_ptr, mass_ptr, count_ptr, last_ptr,
    free_ptr, filled_ptr, newest_ptr, bias_ptr, low_ptr, where_ptr, at_ptr, near_ptr, done_ptr,
    first_ptr, region_ptr, budget_ptr, heads, wide, sinks, recent, splits, pieces, targets, seed, stream, layer,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, SP: tl.constexpr, PP: tl.constexpr, BLOCK: tl.constexpr,
    SCAN: tl.constexpr, SCORE: tl.constexpr, MERGE: tl.constexpr, TILE: tl.constexpr,
    MASS: tl.constexpr, COUNT: tl.constexpr, LAST: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Grid (B * H_kv, G + pieces): G programs join a query head's splits, the others settle the slots.

    Each of them counts a block of slots; the one that is done last lets a slot go.
    """
    head, role = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if role < G:
        _join(out_ptr, acc_ptr, max_ptr, sum_ptr, head, role, splits, G, D, SP)
    else:
        free = tl.load(free_ptr + head)
        filled = tl.load(filled_ptr + head)
        first, size = tl.load(first_ptr + head), tl.load(region_ptr + head)
        base, number = head, 1  # the heads that the last program settles
        if LAST:
            base, number = head // heads * heads, heads
        ready = True
        if MASS | LAST:
            _count(
                logit_ptr, max_ptr, sum_ptr, place_ptr, mass_ptr, count_ptr, last_ptr, low_ptr, where_ptr, at_ptr,
                head, first, role - G, pieces, free, filled, size, wide, sinks, recent, splits,
                G, GP, SP, BLOCK, SCORE, MASS, COUNT, LAST,
            )  # fmt: skip
            tl.debug_barrier()  # what all threads wrote comes before the sign that it is there
            ready = tl.atomic_add(done_ptr + base, 1, sem="acq_rel") == number * pieces - 1
        if ready:
            tl.store(done_ptr + base, 0)
            leaves, victim = sinks, 0
            if LAST:
                leaves, victim = _average(
                    last_ptr, place_ptr, first_ptr, base, heads, free, filled, size, sinks, recent, SCAN
                )  # fmt: skip
                tl.debug_barrier()  # places are read above and written below by other threads
            for k in range(0, number):
                mine = base + k
                first = tl.load(first_ptr + mine)
                tl.store(pos_ptr + first + free, tl.load(newest_ptr + head // heads))
                tl.store(card_ptr + first + free, 1)
                tl.store(place_ptr + first + free, filled)
                if OWN:
                    tl.store(bias_ptr + first + free, 0.0)
                tl.debug_barrier()
                if (SCORE > 0) & (filled >= tl.load(budget_ptr + mine)):
                    _let_go(
                        v_ptr, pos_ptr, place_ptr, card_ptr, mass_ptr, count_ptr, free_ptr, low_ptr, where_ptr, at_ptr,
                        near_ptr, mine, mine % heads, first, pieces, size, filled, leaves, victim, targets, seed,
                        stream, layer, D, PP, SCAN, SCORE, MERGE, TILE,
                    )  # fmt: skip
                else:
                    tl.store(free_ptr + mine, filled + 1)
                    tl.store(filled_ptr + mine, filled + 1)


@on_its_device
def step(
    slots: StaticSlots,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    softcap: float | None,
    window: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend with one new token a row, and settle, in place; see `static.step`.

    Args:
        slots: the fixed slots.
        queries: `[B, H_kv, G, d]`.
        keys: `[B, H_kv, d]`.
        values: `[B, H_kv, d]`.
        scale: factor on the logits.
        softcap: cap on the logits, or None.
        window: where the queries are noted, if they are.

    Returns:
        `[B, H_kv, G, d]` in the queries' dtype.
    """
    b, h, g, d = queries.shape
    size = slots.size
    tile = CONFIG["tile"]
    splits = min(triton.cdiv(size, tile), max(1, triton.cdiv(2 * processors(queries), b * h)), CONFIG["splits"])
    span = triton.cdiv(triton.cdiv(size, tile), splits) * tile
    splits = triton.cdiv(size, span)
    mass, count, last = (slots.counting and x.numel() > 0 for x in (slots.mass, slots.count, slots.last))
    own = slots.bias.numel() > 0
    new = queries.new_empty
    acc = new(b, h, splits, g, d, dtype=torch.float32)
    best, total = new(2, b, h, splits, g, dtype=torch.float32)
    logits = new(b, h, g, size if mass or last else 0, dtype=torch.float32)
    out = new(b, h, g, d)
    groups = max(16, triton.next_power_of_2(g))
    flat = queries.reshape(b, h * g, d)
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    noted, at = (flat, slots.free) if window is None else window
    _attend[(b * h, splits)](
        flat, keys, values, slots.keys, slots.values, slots.positions, slots.place, slots.cardinality, slots.free,
        slots.filled, slots.newest, slots.frequencies, slots.bias, logits, acc, best, total,
        slots.first, slots.regions, noted, at, flat.stride(0), flat.stride(1), keys.stride(0), keys.stride(1),
        values.stride(0), values.stride(1), h, size, span, noted.shape[-2], scale, softcap or 0.0,
        G=g, GP=groups, D=d, BLOCK=tile, ROTATE=slots.turns, STATS=mass or last, CAPPED=softcap is not None,
        BIASED=slots.biased, OWN=own, WINDOW=window is not None, EXACT=queries.dtype == torch.float32,
        STAGES=CONFIG["stages"], num_warps=CONFIG["attend_warps"],
    )  # fmt: skip
    block = CONFIG["settle_tile"]
    pieces = triton.cdiv(size, block) if mass or last else 1
    low, where, at = new(b, h, pieces, dtype=torch.float32), *new(2, b, h, pieces, dtype=torch.int32)
    rule = slots.rule
    targets = rule.targets if rule.merge == "next" else 0
    near = new(b, h, targets, dtype=torch.int32)
    _settle[(b * h, g + pieces)](
        out, acc, best, total, logits, slots.values, slots.positions, slots.place, slots.cardinality, slots.mass,
        slots.count, slots.last, slots.free, slots.filled, slots.newest, slots.bias, low, where, at, near, slots.done,
        slots.first, slots.regions, slots.budget, h, size, rule.sinks, rule.recent, splits, pieces,
        targets, _signed(rule.seed), rule.stream, slots.layer,
        G=g, GP=triton.next_power_of_2(g), D=d, SP=max(2, triton.next_power_of_2(splits)),
        PP=max(2, triton.next_power_of_2(pieces)), BLOCK=block,
        SCAN=min(CONFIG["scan_tile"], max(16, triton.next_power_of_2(size))),
        SCORE=SCORES[rule.score], MERGE=MERGES[rule.merge], TILE=CONFIG["pass_tile"],
        MASS=mass, COUNT=count, LAST=last, OWN=own,
        num_warps=CONFIG["settle_warps"],
    )  # fmt: skip
    return out


def _signed(x: int) -> int:
    """The int32 with the last 32 bits of `x`."""
    return (x + (1 << 31)) % (1 << 32) - (1 << 31)
