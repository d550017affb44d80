"""Merge chosen pairs of neighbouring slots, and write what is kept in one pass; the twin is `methods.pairs`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrepro.kernels.rotation import turn
from kvrepro.slots import Slots

#: Pairs that `_greedy` looks at at a time.
GREEDY_TILE = 4096


@triton.jit
def _larger(a, b):
    """The larger of two."""
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    """The smaller of two."""
    return tl.minimum(a, b)


@triton.jit
def _greedy(score_ptr, taken_ptr, pairs, BLOCK: tl.constexpr):
    """Grid (rows): see `slots.greedy_pairs`; once from the left for where falling runs start, once from the right."""
    row = tl.program_id(0).to(tl.int64) * pairs
    begun = -1
    for first in range(0, pairs, BLOCK):
        index = first + tl.arange(0, BLOCK)
        inside = index < pairs
        score = tl.load(score_ptr + row + index, mask=inside, other=float("inf"))
        before = tl.load(score_ptr + row + index - 1, mask=inside & (index > 0), other=float("inf"))
        falls = (index > 0) & (before <= score)
        start = tl.maximum(tl.associative_scan(tl.where(falls, -1, index), 0, _larger), begun)
        tl.store(taken_ptr + row + index, (index - start) % 2 == 0, mask=inside)
        begun = tl.max(start, 0)
    tl.debug_barrier()
    ended = pairs
    for back in range(0, pairs, BLOCK):
        place = (tl.cdiv(pairs, BLOCK) - 1) * BLOCK - back + tl.arange(0, BLOCK)
        there = place < pairs
        own = tl.load(score_ptr + row + place, mask=there, other=float("inf"))
        after = tl.load(score_ptr + row + place + 1, mask=place + 1 < pairs, other=float("inf"))
        rises = (place + 1 < pairs) & (after < own)
        end = tl.minimum(
            tl.associative_scan(tl.where(rises | (place >= pairs), pairs, place), 0, _smaller, reverse=True), ended
        )
        even = tl.load(taken_ptr + row + place, mask=there, other=0) != 0
        taken = even & ((end - place) % 2 == 0) & (own < float("inf"))
        tl.store(taken_ptr + row + place, taken, mask=there)
        ended = tl.min(end, 0)


@triton.jit
def _merge(
    k_ptr, v_ptr, pos_ptr, card_ptr, chosen_ptr, share_ptr, stored_ptr, order_ptr, freq_ptr, out_k_ptr, out_v_ptr,
    k_b, k_h, k_s, v_b, v_h, v_s, heads, size, kept,
    D: tl.constexpr, BLOCK: tl.constexpr, PER_DIM: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of kept slots, B * H_kv)."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < kept
    half: tl.constexpr = D // 2
    low, dim = tl.arange(0, half), tl.arange(0, D)
    right = tl.load(order_ptr + head * kept + place, mask=there, other=0).to(tl.int64)
    left = tl.maximum(right - 1, 0)
    pair = head * (size - 1) + left
    merged = there & (right > 0) & (tl.load(chosen_ptr + pair, mask=there, other=0) != 0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    known, both = there[:, None], merged[:, None]
    r_low = tl.load(k_ptr + right[:, None] * k_s + low[None, :], mask=known, other=0.0)
    r_high = tl.load(k_ptr + right[:, None] * k_s + half + low[None, :], mask=known, other=0.0)
    l_low = tl.load(k_ptr + left[:, None] * k_s + low[None, :], mask=both, other=0.0).to(tl.float32)
    l_high = tl.load(k_ptr + left[:, None] * k_s + half + low[None, :], mask=both, other=0.0).to(tl.float32)
    freq = tl.load(freq_ptr + low)
    l_pos = tl.load(pos_ptr + head * size + left, mask=merged, other=0).to(tl.float32)
    r_pos = tl.load(pos_ptr + head * size + right, mask=merged, other=0).to(tl.float32)
    # Rotations are linear: with one share for all dimensions only the left key turns, by the distance.
    if PER_DIM:
        s_low = tl.load(share_ptr + pair[:, None] * D + low[None, :], mask=both, other=0.0)
        s_high = tl.load(share_ptr + pair[:, None] * D + half + low[None, :], mask=both, other=0.0)
        back = -l_pos[:, None] * freq[None, :]
        l_low, l_high = turn(l_low, l_high, back)
        forth = r_pos[:, None] * freq[None, :]
        p_low, p_high = turn(r_low.to(tl.float32), r_high.to(tl.float32), -forth)
        m_low, m_high = turn(s_low * l_low + (1 - s_low) * p_low, s_high * l_high + (1 - s_high) * p_high, forth)
    else:
        share = tl.load(share_ptr + pair, mask=merged, other=0.0)[:, None]
        l_low, l_high = turn(l_low, l_high, (r_pos - l_pos)[:, None] * freq[None, :])
        m_low = share * l_low + (1 - share) * r_low.to(tl.float32)
        m_high = share * l_high + (1 - share) * r_high.to(tl.float32)
    kind: tl.constexpr = out_k_ptr.dtype.element_ty
    out = (head * kept + place)[:, None] * D
    tl.store(out_k_ptr + out + low[None, :], tl.where(both, m_low.to(kind), r_low), mask=known)
    tl.store(out_k_ptr + out + half + low[None, :], tl.where(both, m_high.to(kind), r_high), mask=known)
    r_v = tl.load(v_ptr + right[:, None] * v_s + dim[None, :], mask=known, other=0.0)
    l_v = tl.load(v_ptr + left[:, None] * v_s + dim[None, :], mask=both, other=0.0).to(tl.float32)
    l_card = tl.load(card_ptr + head * size + left, mask=merged, other=0).to(tl.float32)
    r_card = tl.load(card_ptr + head * size + right, mask=merged, other=0).to(tl.float32)
    tokens = tl.maximum(tl.load(stored_ptr + pair, mask=merged, other=1), 1).to(tl.float32)
    m_v = (l_v * l_card[:, None] + r_v.to(tl.float32) * r_card[:, None]) / tokens[:, None]
    tl.store(out_v_ptr + out + dim[None, :], tl.where(both, m_v.to(kind), r_v), mask=known)


def greedy(score: Tensor) -> Tensor:
    """`slots.greedy_pairs` for scores `[..., P]` float32: the pairs a greedy matching takes, bool."""
    score = score.contiguous()
    taken = torch.empty(score.shape, dtype=torch.int8, device=score.device)
    pairs = score.shape[-1]
    block = min(GREEDY_TILE, max(16, triton.next_power_of_2(pairs)))
    _greedy[(score.numel() // pairs,)](score, taken, pairs, BLOCK=block, num_warps=8)
    return taken.view(torch.bool)


def merge(
    slots: Slots, chosen: Tensor, share: Tensor, stored: Tensor, order: Tensor, frequencies: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values of the kept slots, the chosen pairs merged into their right slots.

    Args:
        slots: `S` slots a head, all of whose key dimensions are rotated.
        chosen: `[B, H_kv, S - 1]` bool, the pairs.
        share: `[B, H_kv, S - 1, 1 or d]` float32, of the left key before rotary embedding.
        stored: `[B, H_kv, S - 1]` int32, the number that a merged value's sum is divided by.
        order: `[B, H_kv, n]` int64, the kept slots.
        frequencies: `[d / 2]`, radians per position.

    Returns:
        `[B, H_kv, n, d]` both.
    """
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (slots.keys, slots.values))
    b, h, size, d = keys.shape
    kept = order.shape[2]
    out_k, out_v = keys.new_empty(b, h, kept, d), values.new_empty(b, h, kept, d)
    block = 16 if d > 128 else 32
    _merge[(triton.cdiv(kept, block), b * h)](
        keys, values, slots.positions.contiguous(), slots.cardinality.contiguous(), chosen.contiguous(),
        share.float().contiguous(), stored.contiguous(), order.contiguous(),
        frequencies.to(keys.device, torch.float32), out_k, out_v,
        *keys.stride()[:3], *values.stride()[:3], h, size, kept,
        D=d, BLOCK=block, PER_DIM=share.shape[-1] > 1, num_warps=4,
    )  # fmt: skip
    return out_k, out_v
