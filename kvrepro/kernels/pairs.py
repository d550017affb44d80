"""Pairs of neighbouring slots: what merging each costs, which are taken, the closed form of a key's share, the merge.

All heads of a layer merge the same pairs, so that choices are made once a row. Empty slots stand in front of a row. The
twins are in `methods.pairs` and `methods.kvslimmer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrepro.kernels import on_its_device
from kvrepro.kernels.prefill import LOG2E, as_bias, in_rows, log2_unit, logits, tiles_for
from kvrepro.kernels.rotation import turn
from kvrepro.slots import Slots

if TYPE_CHECKING:
    from kvrepro.attention import View
    from kvrepro.methods.pairs import Choice

#: By (kernel, head size is above 128): tiles of `_shares` as in `prefill`; kept slots of a tile of `_merge`, warps.
CONFIG = {
    ("shares", False): (64, 64, 4, 2),
    ("shares", True): (32, 32, 4, 2),
    ("merge", False): (16, 2),
    ("merge", True): (8, 2),
}
#: Pairs of a tile of `_greedy`.
GREEDY_TILE = 1024
_UNCAPPED = torch.iinfo(torch.int32).max


@triton.jit
def _scores(
    mass_ptr, card_ptr, empty_ptr, out_ptr, heads, size, sinks, recent, gamma,
    RAGGED: tl.constexpr, BY_CARDINALITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of pairs, B)."""
    b = tl.program_id(1).to(tl.int64)
    left = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = left < size - 1
    total = tl.zeros([BLOCK], tl.float32)
    row = mass_ptr + b * heads * size + left
    for _ in range(heads):
        total += tl.load(row, mask=inside, other=0.0) + tl.load(row + 1, mask=inside, other=0.0)
        row += size
    empty = tl.load(empty_ptr + b).to(tl.int32) if RAGGED else 0
    score = total * tl.exp(-(left - empty).to(tl.float32) / gamma)
    if BY_CARDINALITY:
        card = card_ptr + b * heads * size + left
        tokens = tl.load(card, mask=inside, other=0) + tl.load(card + 1, mask=inside, other=0)
        score *= tokens.to(tl.float32)
    free = (left >= empty + sinks) & (left + 1 < size - recent)
    tl.store(out_ptr + b * (size - 1) + left, tl.where(free, score, float("inf")), mask=inside)


@triton.jit
def _larger(a, b):
    """The larger of two."""
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    """The smaller of two."""
    return tl.minimum(a, b)


@triton.jit
def _begins(score_ptr, index, pairs):
    """Each pair's own index where a falling run begins, else -1; and the scores."""
    score = tl.load(score_ptr + index, mask=index < pairs, other=float("inf"))
    before = tl.load(score_ptr + index - 1, mask=(index < pairs) & (index > 0), other=float("inf"))
    return tl.where((index > 0) & (before <= score), -1, index), score


@triton.jit
def _ends(score_ptr, index, pairs):
    """Each pair's own index where a rising run ends, else `pairs`."""
    score = tl.load(score_ptr + index, mask=index < pairs, other=float("inf"))
    after = tl.load(score_ptr + index + 1, mask=index + 1 < pairs, other=float("inf"))
    return tl.where((index >= pairs) | ((index + 1 < pairs) & (after < score)), pairs, index)


@triton.jit
def _greedy(score_ptr, taken_ptr, pairs, BLOCK: tl.constexpr):
    """Grid (tiles, rows): see `methods.pairs.greedy_pairs`.

    A program follows the runs that reach into its tile from other tiles to where they begin and end.
    """
    score_ptr += tl.program_id(1).to(tl.int64) * pairs
    first = tl.program_id(0) * BLOCK
    index = first + tl.arange(0, BLOCK)
    begins, score = _begins(score_ptr, index, pairs)
    begun = tl.full([], -1, tl.int32)
    back = first
    while (begun < 0) & (back > 0):
        back -= BLOCK
        earlier, _ = _begins(score_ptr, back + tl.arange(0, BLOCK), pairs)
        begun = tl.max(earlier, 0)
    ended = pairs + tl.zeros([], tl.int32)
    ahead = first + BLOCK
    while (ended == pairs) & (ahead < pairs):
        ended = tl.min(_ends(score_ptr, ahead + tl.arange(0, BLOCK), pairs), 0)
        ahead += BLOCK
    start = tl.maximum(tl.associative_scan(begins, 0, _larger), begun)
    end = tl.minimum(tl.associative_scan(_ends(score_ptr, index, pairs), 0, _smaller, reverse=True), ended)
    taken = ((index - start) % 2 == 0) & ((end - index) % 2 == 0) & (score < float("inf"))
    tl.store(taken_ptr + tl.program_id(1).to(tl.int64) * pairs + index, taken, mask=index < pairs)


@triton.jit
def _shares(
    q_ptr, k_ptr, v_ptr, o_ptr, bias_ptr, lse_ptr, place_ptr, asks_ptr, order_ptr, count_ptr, mass_ptr, out_ptr,
    q_b, q_h, q_n, o_b, o_h, o_n, k_b, k_h, k_s, v_b, v_h, v_s, heads, groups, n, size, most, scale, softcap,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of pairs, B * H_kv): second derivatives by BN pairs' logits, their norms summed over all queries."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    count = tl.load(count_ptr + b).to(tl.int32) if RAGGED else most
    pair = tl.program_id(0) * BN + tl.arange(0, BN)
    real = pair < count
    dim = tl.arange(0, D)
    left = tl.load(order_ptr + b * size + size - count + pair, mask=real, other=0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    k1 = tl.load(k_ptr + left[:, None] * k_s + dim[None, :])
    k2 = tl.load(k_ptr + (left[:, None] + 1) * k_s + dim[None, :])
    v1 = tl.load(v_ptr + left[:, None] * v_s + dim[None, :])
    v2 = tl.load(v_ptr + (left[:, None] + 1) * v_s + dim[None, :])
    w1, w2 = v1.to(tl.float32), v2.to(tl.float32)
    vv1, vv2, uu = tl.sum(w1 * w1, 1), tl.sum(w2 * w2, 1), tl.sum((w1 + w2) * (w1 + w2), 1)
    slot = head * size + left
    place1, place2 = tl.load(place_ptr + slot), tl.load(place_ptr + slot + 1)
    bias1, bias2 = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    if BIAS:
        bias1, bias2 = tl.load(bias_ptr + slot) * LOG2E, tl.load(bias_ptr + slot + 1) * LOG2E
    n11, n22, n12 = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    q_ptr += b * q_b + h * groups * q_h
    o_ptr += b * o_b + h * groups * o_h
    unit = log2_unit(scale, BIAS, CAPPED)
    for start in range(0, groups * n, BM):
        row = start + tl.arange(0, BM)
        there = row < groups * n
        g, i = (row // n).to(tl.int64), row % n
        q = tl.load(q_ptr + (g * q_h + i * q_n)[None, :] + dim[:, None], mask=there[None, :], other=0.0)
        o = tl.load(o_ptr + (g * o_h + i * o_n)[None, :] + dim[:, None], mask=there[None, :], other=0.0)
        asks = tl.load(asks_ptr + b * n + i, mask=there, other=-1)
        lse = tl.load(lse_ptr + head * groups * n + row, mask=there, other=float("inf")) * LOG2E
        wide = o.to(tl.float32)
        oo = tl.sum(wide * wide, 0)
        s1 = logits(tl.dot(k1, q, input_precision=PRECISION), bias1[:, None], scale, softcap, BIAS, CAPPED)
        p1 = tl.exp2(s1 * unit - lse[None, :])
        p1 = tl.where(place1[:, None] <= asks[None, :], p1, 0.0)
        o1 = tl.dot(v1, o, input_precision=PRECISION)
        away = tl.sqrt(tl.maximum(vv1[:, None] - 2.0 * o1 + oo[None, :], 0.0))
        n11 += tl.sum(p1 * tl.abs(1.0 - 2.0 * p1) * away, 1)
        s2 = logits(tl.dot(k2, q, input_precision=PRECISION), bias2[:, None], scale, softcap, BIAS, CAPPED)
        p2 = tl.exp2(s2 * unit - lse[None, :])
        p2 = tl.where(place2[:, None] <= asks[None, :], p2, 0.0)
        o2 = tl.dot(v2, o, input_precision=PRECISION)
        away = tl.sqrt(tl.maximum(vv2[:, None] - 2.0 * o2 + oo[None, :], 0.0))
        n22 += tl.sum(p2 * tl.abs(1.0 - 2.0 * p2) * away, 1)
        both = tl.sqrt(tl.maximum(uu[:, None] - 4.0 * (o1 + o2) + 4.0 * oo[None, :], 0.0))
        n12 += tl.sum(p1 * p2 * both, 1)
    got1, got2 = tl.load(mass_ptr + slot), tl.load(mass_ptr + slot + 1)
    by_attention = tl.where(got1 + got2 > 0, got1 / tl.maximum(got1 + got2, 1.1754943508222875e-38), 0.5)
    total = n11 - 2.0 * n12 + n22
    known = total > 1e-6 * (n11 + n22)
    share = tl.minimum(tl.maximum((n11 - n12) / tl.where(known, total, 1.0), 0.0), 1.0)
    tl.store(out_ptr + head * (size - 1) + left, tl.where(known, share, by_attention), mask=real)


@triton.jit
def _merge(
    k_ptr, v_ptr, place_ptr, card_ptr, mass_ptr, chosen_ptr, share_ptr, order_ptr, count_ptr, freq_ptr,
    out_k_ptr, out_v_ptr, out_place_ptr, out_card_ptr, out_mass_ptr,
    k_b, k_h, k_s, v_b, v_h, v_s, heads, size, most, cap,
    D: tl.constexpr, BLOCK: tl.constexpr, PER_DIM: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of kept slots, B * H_kv)."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    kept = size - most
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < kept
    first = most - tl.load(count_ptr + b).to(tl.int32) if RAGGED else 0
    half: tl.constexpr = D // 2
    low, dim = tl.arange(0, half), tl.arange(0, D)
    right = tl.load(order_ptr + b * size + first + place, mask=there, other=0).to(tl.int64)
    left = tl.maximum(right - 1, 0)
    merged = there & (right > 0) & (tl.load(chosen_ptr + b * (size - 1) + left, mask=there, other=0) != 0)
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    known, both = there[:, None], merged[:, None]
    r_low = tl.load(k_ptr + right[:, None] * k_s + low[None, :], mask=known, other=0.0)
    r_high = tl.load(k_ptr + right[:, None] * k_s + half + low[None, :], mask=known, other=0.0)
    l_low = tl.load(k_ptr + left[:, None] * k_s + low[None, :], mask=both, other=0.0).to(tl.float32)
    l_high = tl.load(k_ptr + left[:, None] * k_s + half + low[None, :], mask=both, other=0.0).to(tl.float32)
    freq = tl.load(freq_ptr + low)
    l_at = tl.load(place_ptr + head * size + left, mask=merged, other=0)
    r_at = tl.load(place_ptr + head * size + right, mask=there, other=0)
    pair = head * (size - 1) + left
    # Rotations are linear: with one share for all dimensions only the left key turns, by the distance.
    if PER_DIM:
        s_low = tl.load(share_ptr + pair[:, None] * D + low[None, :], mask=both, other=0.0)
        s_high = tl.load(share_ptr + pair[:, None] * D + half + low[None, :], mask=both, other=0.0)
        l_low, l_high = turn(l_low, l_high, -l_at.to(tl.float32)[:, None] * freq[None, :])
        forth = r_at.to(tl.float32)[:, None] * freq[None, :]
        p_low, p_high = turn(r_low.to(tl.float32), r_high.to(tl.float32), -forth)
        m_low, m_high = turn(s_low * l_low + (1 - s_low) * p_low, s_high * l_high + (1 - s_high) * p_high, forth)
    else:
        share = tl.load(share_ptr + pair, mask=merged, other=0.0)[:, None]
        l_low, l_high = turn(l_low, l_high, (r_at - l_at).to(tl.float32)[:, None] * freq[None, :])
        m_low = share * l_low + (1 - share) * r_low.to(tl.float32)
        m_high = share * l_high + (1 - share) * r_high.to(tl.float32)
    kind: tl.constexpr = out_k_ptr.dtype.element_ty
    one = head * kept + place
    out = one[:, None] * D
    tl.store(out_k_ptr + out + low[None, :], tl.where(both, m_low.to(kind), r_low), mask=known)
    tl.store(out_k_ptr + out + half + low[None, :], tl.where(both, m_high.to(kind), r_high), mask=known)
    r_v = tl.load(v_ptr + right[:, None] * v_s + dim[None, :], mask=known, other=0.0)
    l_v = tl.load(v_ptr + left[:, None] * v_s + dim[None, :], mask=both, other=0.0).to(tl.float32)
    l_card = tl.load(card_ptr + head * size + left, mask=merged, other=0)
    r_card = tl.load(card_ptr + head * size + right, mask=there, other=0)
    tokens = tl.minimum(l_card + r_card, cap)
    m_v = l_v * l_card.to(tl.float32)[:, None] + r_v.to(tl.float32) * r_card.to(tl.float32)[:, None]
    m_v = m_v / tl.maximum(tokens, 1).to(tl.float32)[:, None]
    tl.store(out_v_ptr + out + dim[None, :], tl.where(both, m_v.to(kind), r_v), mask=known)
    l_mass = tl.load(mass_ptr + head * size + left, mask=merged, other=0.0)
    r_mass = tl.load(mass_ptr + head * size + right, mask=there, other=0.0)
    tl.store(out_place_ptr + one, r_at, mask=there)
    tl.store(out_card_ptr + one, tl.where(merged, tokens, r_card), mask=there)
    tl.store(out_mass_ptr + one, l_mass + r_mass, mask=there)


@on_its_device
def scores(mass: Tensor, slots: Slots, sinks: int, recent: int, gamma: float, by_cardinality: bool) -> Tensor:
    """What merging each pair would cost; see `methods.pairs.PairMerging.scores`.

    Args:
        mass: `[B, H_kv, S]` float32, attention to each slot.
        slots: the slots.
        sinks: first filled slots that are not merged.
        recent: last slots that are not merged.
        gamma: places over which the score falls to 1 / e.
        by_cardinality: multiply by the pair's cardinality.

    Returns:
        `[B, 1, S - 1]` float32, +inf where a pair must not be merged.
    """
    b, h, size = mass.shape
    out = mass.new_empty(b, 1, size - 1, dtype=torch.float32)
    empty = (slots.cardinality[:, 0] == 0).sum(dim=1) if slots.ragged else out
    _scores[(triton.cdiv(size - 1, 256), b)](
        mass.contiguous(), slots.cardinality.contiguous(), empty, out, h, size, sinks, recent, gamma,
        RAGGED=slots.ragged, BY_CARDINALITY=by_cardinality, BLOCK=256, num_warps=4,
    )  # fmt: skip
    return out


@on_its_device
def shares(view: View, positions: Tensor, asks: Tensor, mass: Tensor, choice: Choice) -> Tensor:
    """The left key's share in each chosen pair, (|c11| - |c12|) / (|c11| - 2 |c12| + |c22|), over all queries.

    Args:
        view: queries with their output and log-sum-exp, and keys, values and bias of the present slots.
        positions: `[B, H_kv, S]` int32; a query sees the slots at or before its own position.
        asks: `[B, n]` int32, the queries' positions.
        mass: `[B, H_kv, S]` float32, attention to each slot; decides where the norms say nothing.
        choice: the pairs.

    Returns:
        `[B, H_kv, S - 1]` float32; pairs that were not chosen hold whatever was there.
    """
    queries, keys, values, output = (in_rows(x) for x in (view.queries, view.keys, view.values, view.output))
    (b, hq, n, _), (h, size) = queries.shape, keys.shape[1:3]
    out = mass.new_empty(b, h, size - 1, dtype=torch.float32)
    tiles = tiles_for("shares", queries, hq // h * n, CONFIG)
    ragged = not isinstance(choice.count, int)
    _shares[(triton.cdiv(choice.most, tiles["BN"]), b * h)](
        queries, keys, values, output, as_bias(view.bias, queries), view.lse.contiguous(),
        positions.contiguous(), asks.contiguous(), choice.order.contiguous(), choice.count if ragged else out,
        mass.contiguous(), out,
        *queries.stride()[:3], *output.stride()[:3], *keys.stride()[:3], *values.stride()[:3],
        h, hq // h, n, size, choice.most, view.scale, view.softcap or 0.0,
        BIAS=view.bias is not None, CAPPED=view.softcap is not None, RAGGED=ragged, **tiles,
    )  # fmt: skip
    return out


@on_its_device
def greedy(score: Tensor) -> Tensor:
    """`methods.pairs.greedy_pairs` for scores `[..., P]` float32: the pairs a greedy matching takes, bool."""
    score = score.contiguous()
    taken = torch.empty(score.shape, dtype=torch.int8, device=score.device)
    pairs = score.shape[-1]
    block = min(GREEDY_TILE, max(16, triton.next_power_of_2(pairs)))
    _greedy[(triton.cdiv(pairs, block), score.numel() // pairs)](score, taken, pairs, BLOCK=block, num_warps=4)
    return taken.view(torch.bool)


@on_its_device
def merge(
    slots: Slots, mass: Tensor, choice: Choice, share: Tensor, cap: int | None, frequencies: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """What is kept, the chosen pairs merged into their right slots.

    Args:
        slots: `S` slots a head, all of whose key dimensions are rotated.
        mass: `[B, H_kv, S]` float32, adds up in a merge.
        choice: the pairs.
        share: `[B, H_kv, S - 1, 1 or d]` float32, of the left key before rotary embedding.
        cap: largest cardinality that is stored, and that a merged value's sum is divided by.
        frequencies: `[d / 2]`, radians per position.

    Returns:
        Keys, values, positions and cardinality, by the names `Slots` has for them, and the mass.
    """
    keys, values = in_rows(slots.keys), in_rows(slots.values)
    b, h, size, d = keys.shape
    kept = size - choice.most
    out = {"keys": keys.new_empty(b, h, kept, d), "values": values.new_empty(b, h, kept, d)}
    out |= {name: getattr(slots, name).new_empty(b, h, kept) for name in ("positions", "cardinality")}
    out_mass = mass.new_empty(b, h, kept)
    ragged = not isinstance(choice.count, int)
    block, warps = CONFIG["merge", d > 128]
    _merge[(triton.cdiv(kept, block), b * h)](
        keys, values, slots.positions.contiguous(), slots.cardinality.contiguous(), mass.contiguous(),
        choice.chosen.contiguous().view(torch.uint8), share.float().contiguous(), choice.order.contiguous(),
        choice.count if ragged else out_mass, frequencies.to(keys.device, torch.float32),
        *out.values(), out_mass,
        *keys.stride()[:3], *values.stride()[:3], h, size, choice.most, _UNCAPPED if cap is None else cap,
        D=d, BLOCK=block, PER_DIM=share.shape[-1] > 1, RAGGED=ragged, num_warps=warps,
    )  # fmt: skip
    return out, out_mass
