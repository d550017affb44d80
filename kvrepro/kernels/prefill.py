"""Attention of many queries over slots: the output, and the exact column sums of the attention matrix.

Column sums need queries, keys and each query's log-sum-exp, which fused attention leaves behind: one more product of
queries and keys, and memory that grows with the length, not with its square. The twin is `attention.attend`.

Slots stand in time order and a pass's own tokens are the last ones, so that query i of n over S slots sees the slots
up to S - n + i, unless it is said that all queries see more; what is empty has a bias of -inf.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrepro.kernels import on_its_device, processors

LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def logits(s, bias, scale, softcap, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """Logits in base 2 of products of queries and keys `s`; with neither bias nor cap the products themselves.

    Those are then times `scale` in base 2, which the exponent's subtraction does on the way (`log2_unit`); it is > 0.
    """
    if CAPPED:
        s = s * scale
        ratio = tl.exp2(-2.0 * tl.abs(s) / softcap * LOG2E)
        tanh = (1.0 - ratio) / (1.0 + ratio)
        s = softcap * tl.where(s < 0, -tanh, tanh) * LOG2E
    elif BIAS:
        s = s * (scale * LOG2E)
    if BIAS:
        s += bias
    return s


@triton.jit
def log2_unit(scale, BIAS: tl.constexpr, CAPPED: tl.constexpr):
    """What `logits` are still to be multiplied by."""
    if BIAS or CAPPED:
        return 1.0
    return scale * LOG2E


@triton.jit
def _attend_tile(
    q, k_ptr, v_ptr, bias_ptr, acc, best, total, start, row, past, size, k_s, v_s, scale, softcap,
    D: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of slots of `_attend`."""
    dim = tl.arange(0, D)
    slot = start + tl.arange(0, BN)
    inside = slot < size
    if MASK:
        k = tl.load(k_ptr + slot[None, :] * k_s + dim[:, None], mask=inside[None, :], other=0.0)
    else:
        k = tl.load(k_ptr + slot[None, :] * k_s + dim[:, None])
    bias = tl.load(bias_ptr + slot, mask=inside, other=0.0) * LOG2E if BIAS else tl.zeros([BN], tl.float32)
    s = logits(tl.dot(q, k, input_precision=PRECISION), bias[None, :], scale, softcap, BIAS, CAPPED)
    if MASK:
        s = tl.where(inside[None, :] & (slot[None, :] <= past + row[:, None]), s, -float("inf"))
    unit = log2_unit(scale, BIAS, CAPPED)
    higher = tl.maximum(best, tl.max(s, 1) * unit)
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    p = tl.exp2(s * unit - safe[:, None])
    fade = tl.exp2(best - safe)
    total = total * fade + tl.sum(p, 1)
    if VALUES:
        if MASK:
            v = tl.load(v_ptr + slot[:, None] * v_s + dim[None, :], mask=inside[:, None], other=0.0)
        else:
            v = tl.load(v_ptr + slot[:, None] * v_s + dim[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, k_b, k_h, k_s, v_b, v_h, v_s, heads, groups, n, size, past, span, scale, softcap,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, B * H_q, splits): log-sum-exp of BM queries of one head and, with VALUES, their output.

    A split sees `span` slots, a multiple of BN.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    row = block * BM + tl.arange(0, BM)
    inside = row < n
    dim = tl.arange(0, D)
    q = tl.load(q_ptr + b * q_b + h * q_h + row[:, None] * q_n + dim[None, :], mask=inside[:, None], other=0.0)
    kv = h // groups
    k_ptr += b * k_b + kv * k_h
    v_ptr += b * v_b + kv * v_h
    bias_ptr += (b * (heads // groups) + kv) * size
    best = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    begin = tl.program_id(2) * span
    end = tl.minimum(begin + span, tl.minimum(past + (block + 1) * BM, size))
    whole = tl.minimum(past + block * BM + 1, size) // BN * BN  # slots before it are seen by every row of the block
    whole = tl.maximum(tl.minimum(whole, begin + span), begin)
    for start in range(begin, whole, BN):
        acc, best, total = _attend_tile(
            q, k_ptr, v_ptr, bias_ptr, acc, best, total, start, row, past, size, k_s, v_s, scale, softcap,
            D, BN, False, BIAS, CAPPED, VALUES, PRECISION,
        )  # fmt: skip
    for start in range(whole, end, BN):
        acc, best, total = _attend_tile(
            q, k_ptr, v_ptr, bias_ptr, acc, best, total, start, row, past, size, k_s, v_s, scale, softcap,
            D, BN, True, BIAS, CAPPED, VALUES, PRECISION,
        )  # fmt: skip
    blind = total == 0.0  # a query that sees nothing: output 0, and exp(s - lse) = 0 for whoever reads it later
    lse = tl.where(blind, float("inf"), (best + tl.log2(tl.where(blind, 1.0, total))) * _LN2)
    row += (tl.program_id(2) * tl.num_programs(1) + head) * n
    tl.store(lse_ptr + row, lse, inside)
    if VALUES:
        out = (acc / tl.where(blind, 1.0, total)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * D + dim[None, :], out, inside[:, None])


@triton.jit
def _column_sums(
    q_ptr, k_ptr, bias_ptr, lse_ptr, out_ptr,
    q_b, q_h, q_n, k_b, k_h, k_s, heads, groups, n, size, past, first, last, scale, softcap, power,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of slots, B * H_q): what queries first..last of one head give to BN slots, to a power, summed."""
    block = tl.program_id(0)  # the first slots are seen by most queries: the longest columns first
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    kv = h // groups
    slot = block * BN + tl.arange(0, BN)
    inside = slot < size
    dim = tl.arange(0, D)
    k = tl.load(
        k_ptr + b * k_b + kv * k_h + slot[:, None] * k_s + dim[None, :], mask=inside[:, None], other=0.0
    )  # fmt: skip
    bias = tl.zeros([BN], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + (b * (heads // groups) + kv) * size + slot, mask=inside, other=0.0) * LOG2E
    q_ptr += b * q_b + h * q_h
    lse_ptr += head * n
    acc = tl.zeros([BN, BM], tl.float32)  # summed over the queries of a tile at the end
    unit = log2_unit(scale, BIAS, CAPPED) * power
    begin = tl.maximum(first, tl.minimum(block * BN - past, last))  # earlier queries see none of the block's slots
    cross = tl.minimum(tl.maximum(begin, (block + 1) * BN - past), last)  # later ones see all of them
    middle = tl.minimum(begin + (cross - begin + BM - 1) // BM * BM, last)
    for start in range(begin, middle, BM):
        row = start + tl.arange(0, BM)
        real = row < last
        q = tl.load(q_ptr + row[None, :] * q_n + dim[:, None], mask=real[None, :], other=0.0)
        lse = tl.load(lse_ptr + row, mask=real, other=float("inf")) * (LOG2E * power)
        s = logits(tl.dot(k, q, input_precision=PRECISION), bias[:, None], scale, softcap, BIAS, CAPPED)
        seen = real[None, :] & (slot[:, None] <= past + row[None, :])
        acc += tl.where(seen, tl.exp2(s * unit - lse[None, :]), 0.0)
    for start in range(middle, last, BM):
        row = start + tl.arange(0, BM)
        real = row < last
        q = tl.load(q_ptr + row[None, :] * q_n + dim[:, None], mask=real[None, :], other=0.0)
        lse = tl.load(lse_ptr + row, mask=real, other=float("inf")) * (LOG2E * power)
        s = logits(tl.dot(k, q, input_precision=PRECISION), bias[:, None], scale, softcap, BIAS, CAPPED)
        acc += tl.exp2(s * unit - lse[None, :])
    tl.store(out_ptr + head * size + slot, tl.sum(acc, 1), mask=inside)


@triton.jit
def _shares(
    q_ptr, k_ptr, bias_ptr, lse_ptr, out_ptr, q_b, q_h, q_g, q_n, k_b, k_h, k_s, heads, groups, n, size, scale, softcap,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of slots, blocks of rows, B * H_kv): what BM queries, a group's side by side, give to BN slots."""
    head = tl.program_id(2).to(tl.int64)
    b, h = head // heads, head % heads
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    i, g = row // groups, row % groups
    there, inside, dim = row < groups * n, slot < size, tl.arange(0, D)
    q_ptr += b * q_b + h * q_h
    q = tl.load(q_ptr + (g * q_g + i * q_n)[:, None] + dim[None, :], mask=there[:, None], other=0.0)
    k_ptr += b * k_b + h * k_h
    k = tl.load(k_ptr + slot[None, :] * k_s + dim[:, None], mask=inside[None, :], other=0.0)
    bias = tl.zeros([BN], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + head * size + slot, mask=inside, other=0.0) * LOG2E
    lse = tl.load(lse_ptr + (head * groups + g) * n + i, mask=there, other=float("inf")) * LOG2E
    s = logits(tl.dot(q, k, input_precision=PRECISION), bias[None, :], scale, softcap, BIAS, CAPPED)
    p = tl.exp2(s * log2_unit(scale, BIAS, CAPPED) - lse[:, None])
    out = out_ptr + (head * groups * n + row)[:, None] * size + slot[None, :]
    tl.store(out, p, mask=there[:, None] & inside[None, :])


#: Tiles by (kernel, head size is above 128): queries, slots, warps, stages. "least": slots of a split of `attend`.
#: "few": queries that have tiles of their own, at most.
CONFIG = {
    "least": 1024,
    "few": 64,
    ("attend", False): (128, 64, 8, 3),
    ("attend", True): (64, 32, 4, 2),
    ("log_sum_exp", False): (128, 64, 8, 3),
    ("log_sum_exp", True): (64, 32, 4, 2),
    ("log_sum_exp of few", False): (64, 128, 4, 2),
    ("log_sum_exp of few", True): (64, 32, 4, 2),
    ("column_sums", False): (64, 128, 4, 3),
    ("column_sums", True): (32, 64, 4, 3),
    ("shares", False): (64, 64, 4, 1),
    ("shares", True): (64, 64, 4, 1),
}


def tiles_for(kernel: str, queries: Tensor, rows: int, config: Mapping = CONFIG) -> dict[str, int | str]:
    """Tile sizes and launch settings for `rows` queries."""
    d = queries.shape[-1]
    exact = queries.dtype == torch.float32
    m, n, warps, stages = config[kernel, d > 128]
    if exact:  # twice the bytes in shared memory
        m, n, warps, stages = min(m, 32), min(n, 32), 4, 2
    m = max(16, min(m, triton.next_power_of_2(rows)))
    return {
        "D": d, "BM": m, "BN": n, "PRECISION": "ieee" if exact else "tf32", "num_warps": warps, "num_stages": stages
    }  # fmt: skip


def in_rows(x: Tensor) -> Tensor:
    """`x` with its last dimension dense, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


@on_its_device
def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    past: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention with a bias a slot.

    Args:
        queries: `[B, H_q, n, d]`.
        keys: `[B, H_kv, S, d]`.
        values: `[B, H_kv, S, d]`.
        bias: `[B, H_kv, S]` float32, added to the logits, or None.
        scale: factor on the logits.
        softcap: cap on the logits, or None.
        past: slots before the first query's own; query i sees those up to past + i. None is S - n: the last n slots
            are the queries' own.

    Returns:
        Output `[B, H_q, n, d]` in the queries' dtype and log-sum-exp `[B, H_q, n]` float32; a query that sees nothing
        has output 0 and log-sum-exp +inf.
    """
    queries, keys, values = in_rows(queries), in_rows(keys), in_rows(values)
    parts = splits(queries, keys.shape[2])
    out = queries.new_empty(parts, *queries.shape, dtype=queries.dtype if parts == 1 else torch.float32)
    lse = _attended("attend", queries, keys, values, out, bias, scale, softcap, past)
    if parts == 1:
        return out[0], lse[0]
    lse = lse.masked_fill(lse == torch.inf, -torch.inf)
    total = lse.logsumexp(dim=0)
    total = total.masked_fill(total == -torch.inf, torch.inf)
    return ((lse - total).exp().unsqueeze(-1) * out).sum(dim=0).to(queries.dtype), total


@on_its_device
def log_sum_exp(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    past: int | None = None,
) -> Tensor:
    """The second result of `attend` alone, which takes half the work."""
    kernel = "log_sum_exp" if queries.shape[2] > CONFIG["few"] else "log_sum_exp of few"
    return _attended(kernel, in_rows(queries), in_rows(keys), None, None, bias, scale, softcap, past)[0]


def splits(queries: Tensor, size: int) -> int:
    """Parts that the slots are cut into, so that few queries `[B, H_q, n, d]` over many slots fill the device."""
    b, h, n, _ = queries.shape
    busy = triton.cdiv(n, tiles_for("attend", queries, n)["BM"]) * b * h
    return max(1, min(2 * processors(queries) // max(1, busy), size // CONFIG["least"]))


def _attended(
    kernel: str,
    queries: Tensor,
    keys: Tensor,
    values: Tensor | None,
    out: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    past: int | None,
) -> Tensor:
    """The log-sum-exp `[splits, B, H_q, n]` of `attend`; the outputs of all splits go to `out`, if there are any."""
    b, hq, n, _ = queries.shape
    size = keys.shape[2]
    tiles = tiles_for(kernel, queries, n)
    parts = 1 if out is None else len(out)
    span = triton.cdiv(triton.cdiv(size, parts), tiles["BN"]) * tiles["BN"]
    lse = queries.new_empty(parts, b, hq, n, dtype=torch.float32)
    held = keys if values is None else values
    _attend[(triton.cdiv(n, tiles["BM"]), b * hq, parts)](
        queries, keys, held, as_bias(bias, queries), lse if out is None else out, lse,
        *queries.stride()[:3], *keys.stride()[:3], *held.stride()[:3],
        hq, hq // keys.shape[1], n, size, size - n if past is None else past, span, scale, softcap or 0.0,
        BIAS=bias is not None, CAPPED=softcap is not None, VALUES=values is not None, **tiles,
    )  # fmt: skip
    return lse


@on_its_device
def column_sums(
    queries: Tensor,
    keys: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    first: int = 0,
    past: int | None = None,
    power: int = 1,
) -> Tensor:
    """Attention that each slot receives from the queries from `first` on, or a power of it, summed over them.

    Args:
        queries: `[B, H_q, n, d]`.
        keys: `[B, H_kv, S, d]`.
        lse: `[B, H_q, n]` float32, each query's log-sum-exp; +inf leaves a query out.
        bias: as in `attend`.
        scale: factor on the logits.
        softcap: cap on the logits, or None.
        first: the first query that counts.
        past: as in `attend`.
        power: what attention is raised to before it is summed.

    Returns:
        `[B, H_q, S]` float32.
    """
    queries, keys = in_rows(queries), in_rows(keys)
    b, hq, n, _ = queries.shape
    size = keys.shape[2]
    out = queries.new_empty(b, hq, size, dtype=torch.float32)
    tiles = tiles_for("column_sums", queries, n - first)
    _column_sums[(triton.cdiv(size, tiles["BN"]), b * hq)](
        queries, keys, as_bias(bias, queries), lse.contiguous(), out,
        *queries.stride()[:3], *keys.stride()[:3],
        hq, hq // keys.shape[1], n, size, size - n if past is None else past, first, n, scale, softcap or 0.0,
        power, BIAS=bias is not None, CAPPED=softcap is not None, **tiles,
    )  # fmt: skip
    return out


@on_its_device
def shares(
    queries: Tensor, keys: Tensor, lse: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Attention of queries that see all slots, as it would be if each had the given log-sum-exp.

    Args:
        queries: `[B, H_kv, G, n, d]`.
        keys: `[B, H_kv, S, d]`.
        lse: `[B, H_kv, G, n]`; +inf leaves a query out.
        bias: as in `attend`.
        scale: factor on the logits.
        softcap: cap on the logits, or None.

    Returns:
        `[B, H_kv, n, G, S]` float32.
    """
    queries, keys = in_rows(queries), in_rows(keys)
    b, h, g, n, _ = queries.shape
    size = keys.shape[2]
    out = queries.new_empty(b, h, n, g, size, dtype=torch.float32)
    tiles = tiles_for("shares", queries, n * g)
    _shares[(triton.cdiv(size, tiles["BN"]), triton.cdiv(n * g, tiles["BM"]), b * h)](
        queries, keys, as_bias(bias, queries), lse.float().contiguous(), out,
        *queries.stride()[:4], *keys.stride()[:3], h, g, n, size, scale, softcap or 0.0,
        BIAS=bias is not None, CAPPED=softcap is not None, **tiles,
    )  # fmt: skip
    return out


def as_bias(bias: Tensor | None, queries: Tensor) -> Tensor:
    """The bias as the kernels read it; any tensor where there is none."""
    return queries if bias is None else bias.float().contiguous()
