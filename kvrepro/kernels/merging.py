"""One-shot compression on a GPU: choose slots, compare keys, and sum the members of each merge, every byte read once.

What bounds each kernel at Llama-3.1-8B's shape (8 KV heads, d = 128, bfloat16), 32,768 slots of which 8,192 stay:

| kernel | reads and writes | flops | floor on an H100 (3.0 TB/s, 800 TFLOP/s) |
|---|---|---|---|
| `top`, `partition` | 1 MB of scores 18 times (from L2), by one program a head | | 0.03 ms, latency |
| `neighbours`, `distance`, `project` | keys once, 67 MB | | 0.022 ms each |
| `nearest` | keys once, 67 MB; the kept ones again from L2 | 4.1e11 | 0.52 ms |
| `mix` | keys and values once, 134 MB; what is kept, 34 MB | | 0.056 ms |

No program's work grows with the length of a merge: `mix` cuts the list of members in chunks of equal size, and the sums
of a merge that crosses chunks are put together afterwards. Nothing is added atomically here, so that the same input
gives the same bits. The twins are in the code that calls them: `slots`, `methods.d2o`, `keepkv` and `kvmerger`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Evicted slots and kept slots of a tile of `nearest`, slots that a tile of the other kernels holds, warps.
CONFIG = {
    "queries": 128, "kept": 64, "nearest_warps": 4, "nearest_stages": 4, "nearest_registers": 0,
    "rows": 64, "row_warps": 4, "chunk": 64,
    "exact_chunk": 16, "mix_warps": 8, "held": 32768, "scan": 4096, "scan_warps": 16,
}  # fmt: skip
#: Chunks' sums that `_bridge` reads at once.
_SPAN = 32


@triton.jit
def _sortable(score_ptr, candidate_ptr, index, inside):
    """Scores as integers of the same order: NaN is above all, -0 is 0, no candidate is -inf, outside is least."""
    score = tl.load(score_ptr + index, mask=inside, other=0.0).to(tl.float32)
    candidate = tl.load(candidate_ptr + index, mask=inside, other=0) != 0
    score = tl.where(candidate, score, -float("inf"))
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(inside, tl.where(score == score, bits, 0x7FFFFFFF), -2147483648), candidate


@triton.jit
def _top(
    score_ptr, candidate_ptr, count_ptr, out_ptr, size, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Grid (B * H): the count-th highest score by two bits at a time, then the marks; of equal scores the later.

    A row that fits one block is read once and held in registers.
    """
    first = tl.program_id(0).to(tl.int64) * size
    count = tl.load(count_ptr + tl.program_id(0)).to(tl.int32)
    lowest = tl.full([], -2147483648, tl.int32)
    step = tl.full([], 1073741824, tl.int32)
    slot = tl.arange(0, BLOCK)
    if HELD:
        key, candidate = _sortable(score_ptr, candidate_ptr, first + slot, slot < size)
    for _ in range(16):
        ones = tl.zeros([], tl.int32)
        twos = tl.zeros([], tl.int32)
        threes = tl.zeros([], tl.int32)
        for start in range(0, size, BLOCK):
            if not HELD:
                key, candidate = _sortable(score_ptr, candidate_ptr, first + start + slot, start + slot < size)
            ones += tl.sum((key >= lowest + step).to(tl.int32), 0)
            twos += tl.sum((key >= lowest + step + step).to(tl.int32), 0)
            threes += tl.sum((key >= lowest + step + step + step).to(tl.int32), 0)
        lowest += tl.where(ones >= count, step, 0)
        lowest += tl.where(twos >= count, step, 0)
        lowest += tl.where(threes >= count, step, 0)
        step = step >> 2
    ties = -count
    for start in range(0, size, BLOCK):
        if not HELD:
            key, candidate = _sortable(score_ptr, candidate_ptr, first + start + slot, start + slot < size)
        ties += tl.sum((key >= lowest).to(tl.int32), 0)
    # Of the slots that equal the lowest score that is marked, so many are not, counted from the left.
    passed = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        key, candidate = _sortable(score_ptr, candidate_ptr, first + start + slot, start + slot < size)
        tie = (key == lowest).to(tl.int32)
        marked = (key > lowest) | ((tie > 0) & (passed + tl.cumsum(tie, 0) > ties))
        tl.store(out_ptr + first + start + slot, (marked & candidate).to(tl.uint8), mask=start + slot < size)
        passed += tl.sum(tie, 0)


def top(score: Tensor, candidates: Tensor, count: Tensor | int) -> Tensor:
    """Mark the highest scores of each head; see `slots.top`.

    Args:
        score: `[B, H, S]`, float32 or narrower.
        candidates: `[B, H, S]` bool.
        count: how many to mark, one number or `[B, H, 1]`.

    Returns:
        `[B, H, S]` bool.
    """
    b, h, size = score.shape
    if not isinstance(count, Tensor):
        count = torch.full((b, h, 1), count, dtype=torch.int64, device=score.device)
    out = torch.empty((b, h, size), dtype=torch.uint8, device=score.device)
    held = size <= CONFIG["held"]
    block = max(16, triton.next_power_of_2(size)) if held else CONFIG["scan"]
    _top[(b * h,)](
        score.contiguous(), candidates.contiguous().view(torch.uint8), count.expand(b, h, 1).contiguous(), out, size,
        BLOCK=block, HELD=held, num_warps=min(32, max(4, block // 256)),
    )  # fmt: skip
    return out.view(torch.bool)


@triton.jit
def _partition(keep_ptr, order_ptr, place_ptr, size, BLOCK: tl.constexpr):
    """Grid (B * H): where each slot goes, and what comes to each place."""
    first = tl.program_id(0).to(tl.int64) * size
    marks = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        marks += (tl.load(keep_ptr + first + slot, mask=slot < size, other=0) != 0).to(tl.int32)
    dropped = size - tl.sum(marks, 0)
    passed = tl.zeros([], tl.int32)
    for start in range(0, size, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < size
        mark = (tl.load(keep_ptr + first + slot, mask=inside, other=0) != 0).to(tl.int32)
        before = passed + tl.cumsum(mark, 0) - mark
        place = tl.where(mark > 0, dropped + before, slot - before)
        tl.store(place_ptr + first + slot, place.to(tl.int64), mask=inside)
        tl.store(order_ptr + first + place, slot.to(tl.int64), mask=inside)
        passed += tl.sum(mark, 0)


def partition(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The unmarked slots, then the marked ones, both in order; see `slots.partition`.

    Args:
        keep: `[B, H, S]` bool.

    Returns:
        The slot at each place and the place of each slot, `[B, H, S]` int64 both.
    """
    order, place = torch.empty(2, *keep.shape, dtype=torch.int64, device=keep.device)
    b, h, size = keep.shape
    _partition[(b * h,)](
        keep.contiguous().view(torch.uint8), order, place, size,
        BLOCK=min(CONFIG["scan"], max(16, triton.next_power_of_2(size))), num_warps=CONFIG["scan_warps"],
    )  # fmt: skip
    return order, place


@triton.jit
def _neighbours(k_ptr, out_ptr, k_b, k_h, k_s, heads, size, D: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tiles, B * H): cosine of each slot's key and the next one's; both rows from one sweep of the cache."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < size - 1
    row = k_ptr + head // heads * k_b + head % heads * k_h + slot.to(tl.int64)[:, None] * k_s
    row += tl.arange(0, D)[None, :]
    a = tl.load(row, mask=inside[:, None], other=0.0).to(tl.float32)
    c = tl.load(row + k_s, mask=inside[:, None], other=0.0).to(tl.float32)
    norms = tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-8) * tl.maximum(tl.sqrt(tl.sum(c * c, 1)), 1e-8)
    tl.store(out_ptr + head * (size - 1) + slot, tl.sum(a * c, 1) / norms, mask=inside)


def neighbours(keys: Tensor) -> Tensor:
    """`[B, H, S - 1]` float32: cosine of neighbouring keys `[B, H, S, d]`."""
    b, h, size, d = keys.shape
    keys, strides = _strided(keys)
    out = torch.empty((b, h, size - 1), dtype=torch.float32, device=keys.device)
    _neighbours[(triton.cdiv(size, CONFIG["rows"]), b * h)](
        keys, out, *strides, h, size, D=d, BLOCK=CONFIG["rows"], num_warps=CONFIG["row_warps"]
    )
    return out


@triton.jit
def _distance(k_ptr, target_ptr, out_ptr, k_b, k_h, k_s, heads, size, D: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tiles, B * H): Euclidean distance of each slot's key from that of another slot."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < size
    target = tl.load(target_ptr + head * size + slot, mask=inside, other=0)
    first = k_ptr + head // heads * k_b + head % heads * k_h + tl.arange(0, D)[None, :]
    a = tl.load(first + slot.to(tl.int64)[:, None] * k_s, mask=inside[:, None], other=0.0).to(tl.float32)
    c = tl.load(first + target[:, None] * k_s, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out_ptr + head * size + slot, tl.sqrt(tl.sum((a - c) * (a - c), 1)), mask=inside)


def distance(keys: Tensor, target: Tensor) -> Tensor:
    """`[B, H, S]` float32: distance of each key `[B, H, S, d]` from the key of the slot `target` `[B, H, S]` int64."""
    b, h, size, d = keys.shape
    keys, strides = _strided(keys)
    out = torch.empty((b, h, size), dtype=torch.float32, device=keys.device)
    _distance[(triton.cdiv(size, CONFIG["rows"]), b * h)](
        keys, target.contiguous(), out, *strides, h, size, D=d, BLOCK=CONFIG["rows"], num_warps=CONFIG["row_warps"]
    )
    return out


@triton.jit
def _project(k_ptr, vector_ptr, out_ptr, k_b, k_h, k_s, heads, size, D: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tiles, B * H): dot product of each slot's key with its head's vector."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < size
    dim = tl.arange(0, D)
    row = k_ptr + head // heads * k_b + head % heads * k_h + slot.to(tl.int64)[:, None] * k_s + dim[None, :]
    keys = tl.load(row, mask=inside[:, None], other=0.0).to(tl.float32)
    vector = tl.load(vector_ptr + head * D + dim).to(tl.float32)
    tl.store(out_ptr + head * size + slot, tl.sum(keys * vector[None, :], 1), mask=inside)


def project(keys: Tensor, vector: Tensor) -> Tensor:
    """`[B, H, S]` float32: dot products of keys `[B, H, S, d]` with one vector a head, `[B, H, d]`."""
    b, h, size, d = keys.shape
    keys, strides = _strided(keys)
    out = torch.empty((b, h, size), dtype=torch.float32, device=keys.device)
    _project[(triton.cdiv(size, CONFIG["rows"]), b * h)](
        keys, vector.contiguous(), out, *strides, h, size, D=d, BLOCK=CONFIG["rows"], num_warps=CONFIG["row_warps"]
    )
    return out


@triton.jit
def _pack(
    k_ptr, index_ptr, valid_ptr, out_ptr, inverse_ptr, k_b, k_h, k_s, index_h, heads, kept,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, B * H): the kept keys side by side, and 1 / norm of each; NaN, which never wins, where empty."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < kept
    row = head * kept + place
    dim = tl.arange(0, D)[None, :]
    slot = tl.load(index_ptr + head * index_h + place, mask=inside, other=0)
    valid = tl.load(valid_ptr + row, mask=inside, other=0) != 0
    source = k_ptr + head // heads * k_b + head % heads * k_h + slot[:, None] * k_s + dim
    key = tl.load(source, mask=valid[:, None], other=0.0)
    tl.store(out_ptr + row[:, None] * D + dim, key, mask=inside[:, None])
    wide = key.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
    tl.store(inverse_ptr + row, tl.where(valid, 1.0 / norm, float("nan")), mask=inside)


@triton.jit
def _nearest(
    k_ptr, gone_ptr, kept_ptr, inverse_ptr, best_ptr, index_ptr, k_b, k_h, k_s, gone_h, heads, gone, kept,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of evicted slots, B * H): every column of a tile keeps its own best until the end."""
    head = tl.program_id(1).to(tl.int64)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    column, dim = tl.arange(0, BN), tl.arange(0, D)
    inside = place < gone
    slot = tl.load(gone_ptr + head * gone_h + place, mask=inside, other=0)
    row = k_ptr + head // heads * k_b + head % heads * k_h + slot[:, None] * k_s + dim[None, :]
    query = tl.load(row, mask=inside[:, None], other=0.0)
    first = kept_ptr + head * kept * D
    best = tl.full([BM, BN], -float("inf"), tl.float32)
    tile = tl.zeros([BM, BN], tl.int32)
    for start in tl.range(0, kept, BN, num_stages=STAGES):
        other = start + column
        source = first + other[None, :] * D + dim[:, None]
        if EVEN:
            key = tl.load(source)
            inverse = tl.load(inverse_ptr + head * kept + other)
        else:
            key = tl.load(source, mask=other[None, :] < kept, other=0.0)
            inverse = tl.load(inverse_ptr + head * kept + other, mask=other < kept, other=float("nan"))
        cosine = tl.dot(query, key, input_precision=precision) * inverse[None, :]
        higher = cosine > best
        best = tl.where(higher, cosine, best)
        tile = tl.where(higher, start, tile)
    most = tl.max(best, 1)
    index = tl.min(tl.where(best == most[:, None], tile + column[None, :], 2147483647), 1)
    wide = query.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
    tl.store(best_ptr + head * gone + place, most / norm, mask=inside)
    tl.store(index_ptr + head * gone + place, index.to(tl.int64), mask=inside)


def nearest(keys: Tensor, gone: Tensor, kept: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The most similar kept slot of each evicted one; see `d2o.nearest_kept`.

    Args:
        keys: `[B, H, S, d]`.
        gone: `[B, H, E]` int64, the slots that ask.
        kept: `[B, H, K]` int64, the slots that may answer.
        valid: `[B, H, K]` bool, which of those hold something.

    Returns:
        Cosine similarity `[B, H, E]` float32, and the place in `kept` `[B, H, E]` int64, of equal ones the first.
    """
    b, h, _, d = keys.shape
    (e,), (n,) = gone.shape[2:], kept.shape[2:]
    keys, strides = _strided(keys)
    (gone, gone_h), (kept, kept_h) = _indexed(gone), _indexed(kept)
    packed = torch.empty((b, h, n, d), dtype=keys.dtype, device=keys.device)
    inverse = torch.empty((b, h, n), dtype=torch.float32, device=keys.device)
    _pack[(triton.cdiv(n, CONFIG["rows"]), b * h)](
        keys, kept, valid.contiguous().view(torch.uint8), packed, inverse, *strides, kept_h, h, n,
        D=d, BLOCK=CONFIG["rows"], num_warps=CONFIG["row_warps"],
    )  # fmt: skip
    best = torch.empty((b, h, e), dtype=torch.float32, device=keys.device)
    index = torch.empty((b, h, e), dtype=torch.int64, device=keys.device)
    # Wide rows take smaller tiles, so that shared memory holds them: 128 x 256 bytes is what the tiles are set for.
    limit = {"maxnreg": CONFIG["nearest_registers"]} if CONFIG["nearest_registers"] and keys.is_cuda else {}
    shrink = max(1, d * keys.element_size() // 512)
    bm, bn = max(16, CONFIG["queries"] // shrink), max(16, CONFIG["kept"] // shrink)
    _nearest[(triton.cdiv(e, bm), b * h)](
        keys, gone, packed, inverse, best, index, *strides, gone_h, h, e, n,
        D=d, BM=bm, BN=bn, EVEN=n % bn == 0, EXACT=keys.dtype == torch.float32,
        STAGES=CONFIG["nearest_stages"] if shrink == 1 else 2, num_warps=CONFIG["nearest_warps"], **limit,
    )  # fmt: skip
    return best, index


@triton.jit
def _weigh(weights, x, PRECISION: tl.constexpr):
    """`weights @ x` in float32; a bfloat16 `x` meets the three bfloat16 numbers that a weight is the sum of."""
    if PRECISION == "bf16x3":
        high = weights.to(tl.bfloat16)
        rest = weights - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(high, x, tl.dot(middle, x, tl.dot(low, x)))
    else:
        total = tl.dot(weights, x.to(tl.float32), input_precision=PRECISION)
    return total


@triton.jit
def _sums(
    k_ptr, v_ptr, member_ptr, target_ptr, k_weight_ptr, v_weight_ptr, out_k_ptr, out_v_ptr, part_k_ptr, part_v_ptr,
    crossing_ptr, k_b, k_h, k_s, v_b, v_h, v_s, heads, size, rows, base, chunks,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B * H): the sums over a chunk of members; those of merges that go on elsewhere stay partial.

    A chunk's targets are consecutive numbers, so that a matrix with a row a target and a member's weight in its
    target's row forms all sums at once.
    """
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    member = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = member < size
    shift = head * base
    target = (tl.load(target_ptr + head * size + member, mask=inside, other=0) - shift).to(tl.int32)
    live = inside & (target < rows)
    before = tl.load(target_ptr + head * size + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    before = tl.where(chunk > 0, before - shift, -1)
    more = (chunk + 1) * CHUNK < size
    after = tl.load(target_ptr + head * size + (chunk + 1) * CHUNK, mask=more, other=-1)
    after = tl.where(more, after - shift, -1)
    low = tl.min(tl.where(live, target, rows), 0)
    high = tl.max(tl.where(live, target, -1), 0)
    left = (before == low) & (low < rows)
    right = (after == high) & (high >= 0)
    both = left & right & (low == high)

    slot = member.to(tl.int64)
    if LISTED:
        slot = tl.load(member_ptr + head * size + member, mask=inside, other=0) - head * size
    k_weight = tl.load(k_weight_ptr + head * size + slot, mask=live, other=0.0)
    v_weight = tl.load(v_weight_ptr + head * size + slot, mask=live, other=0.0)
    row = tl.arange(0, CHUNK)
    goes = tl.where(live, target - low, -1)[None, :] == row[:, None]
    place = low + row
    first = left & (row == 0)
    last = right & (place == high) & (first == 0)
    whole = (place <= high) & (first == 0) & (last == 0)
    out = head * rows + place
    part = ((head * chunks + chunk) * 2).to(tl.int64) + last.to(tl.int64)

    dim = tl.arange(0, D)[None, :]
    x = tl.load(k_ptr + b * k_b + h * k_h + slot[:, None] * k_s + dim, mask=live[:, None], other=0.0)
    total = _weigh(tl.where(goes, k_weight[None, :], 0.0), x, PRECISION)
    tl.store(out_k_ptr + out[:, None] * D + dim, total.to(out_k_ptr.dtype.element_ty), mask=whole[:, None])
    tl.store(part_k_ptr + part[:, None] * D + dim, total, mask=(first | last)[:, None])

    dim = tl.arange(0, DV)[None, :]
    x = tl.load(v_ptr + b * v_b + h * v_h + slot[:, None] * v_s + dim, mask=live[:, None], other=0.0)
    total = _weigh(tl.where(goes, v_weight[None, :], 0.0), x, PRECISION)
    tl.store(out_v_ptr + out[:, None] * DV + dim, total.to(out_v_ptr.dtype.element_ty), mask=whole[:, None])
    tl.store(part_v_ptr + part[:, None] * DV + dim, total, mask=(first | last)[:, None])

    note = crossing_ptr + (head * chunks + chunk) * 2
    tl.store(note, tl.where(left, low, -1).to(tl.int32))
    tl.store(note + 1, tl.where(right & (both == 0), high, -1).to(tl.int32))


@triton.jit
def _bridge(
    part_k_ptr, part_v_ptr, crossing_ptr, out_k_ptr, out_v_ptr, rows, chunks,
    D: tl.constexpr, DV: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B * H): where a merge that crosses chunks ends, its partial sums are added up."""
    chunk, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    note = crossing_ptr + head * chunks * 2
    target = tl.load(note + chunk * 2)
    following = tl.load(note + chunk * 2 + 2, mask=chunk + 1 < chunks, other=-1)
    if (target >= 0) & (following != target):
        dim, dim_v = tl.arange(0, D)[None, :], tl.arange(0, DV)[None, :]
        total_k = tl.zeros([D], tl.float32)
        total_v = tl.zeros([DV], tl.float32)
        end = chunk + 1
        while end > 0:
            place = end - SPAN + tl.arange(0, SPAN)
            known = place >= 0
            # A merge leaves a left part in each chunk it came into, and one right part where it began.
            middle = tl.load(note + place * 2, mask=known, other=-1) == target
            begins = tl.load(note + place * 2 + 1, mask=known, other=-1) == target
            part = (head * chunks + place) * 2 + begins.to(tl.int64)
            member = (middle | begins)[:, None]
            total_k += tl.sum(tl.load(part_k_ptr + part[:, None] * D + dim, mask=member, other=0.0), 0)
            total_v += tl.sum(tl.load(part_v_ptr + part[:, None] * DV + dim_v, mask=member, other=0.0), 0)
            end = tl.where(tl.max(begins.to(tl.int32), 0) > 0, 0, end - SPAN)
        out = head * rows + target
        tl.store(out_k_ptr + out * D + tl.arange(0, D), total_k.to(out_k_ptr.dtype.element_ty))
        tl.store(out_v_ptr + out * DV + tl.arange(0, DV), total_v.to(out_v_ptr.dtype.element_ty))


def mix(
    keys: Tensor,
    values: Tensor,
    target: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    size: int,
    *,
    runs: bool,
    whole: bool,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the keys and values that go to each place; see `slots.mix`.

    Args:
        keys: `[B, H, S, d]`.
        values: `[B, H, S, d_v]`.
        target: `[B, H, S]` int64, the place each slot goes to; `size` for those that go nowhere. The places that get
            something are consecutive.
        key_weight: `[B, H, S]` float32.
        value_weight: `[B, H, S]` float32.
        size: number of places.
        runs: targets do not fall along the slots, so that nothing has to be sorted.
        whole: every place gets something; the others are set to 0.

    Returns:
        Keys `[B, H, size, d]` and values `[B, H, size, d_v]` in their types.
    """
    b, h, s, d = keys.shape
    dv = values.shape[3]
    device = keys.device
    precision = _precision(keys.dtype)
    chunk = CONFIG["chunk"] if precision != "ieee" else CONFIG["exact_chunk"]
    (keys, k_strides), (values, v_strides) = _strided(keys), _strided(values)
    member = target = target.contiguous()
    if not runs:
        head = torch.arange(b * h, device=device).view(b, h, 1) * (size + 1)
        flat = (target + head).flatten()
        flat = flat.to(torch.int32) if b * h * (size + 1) < 2**31 else flat
        target, member = flat.sort(stable=True)  # one sort of all heads: a head's slots stay together
    new = torch.empty if whole else torch.zeros
    out_k = new((b, h, size, d), dtype=keys.dtype, device=device)
    out_v = new((b, h, size, dv), dtype=values.dtype, device=device)
    chunks = triton.cdiv(s, chunk)
    part_k = torch.empty((b * h, chunks, 2, d), dtype=torch.float32, device=device)
    part_v = torch.empty((b * h, chunks, 2, dv), dtype=torch.float32, device=device)
    crossing = torch.empty((b * h, chunks, 2), dtype=torch.int32, device=device)
    _sums[(chunks, b * h)](
        keys, values, member, target, key_weight.contiguous(), value_weight.contiguous(), out_k, out_v,
        part_k, part_v, crossing, *k_strides, *v_strides, h, s, size, 0 if runs else size + 1, chunks,
        D=d, DV=dv, CHUNK=chunk, LISTED=not runs, PRECISION=precision,
        num_warps=CONFIG["mix_warps"],
    )  # fmt: skip
    _bridge[(chunks, b * h)](part_k, part_v, crossing, out_k, out_v, size, chunks, D=d, DV=dv, SPAN=_SPAN, num_warps=4)
    return out_k, out_v


def _precision(dtype: torch.dtype) -> str:
    """How `_sums` multiplies float32 weights with rows of this type so that nothing is lost."""
    return {torch.bfloat16: "bf16x3", torch.float16: "tf32x3", torch.float32: "ieee"}[dtype]


def _strided(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """`x` `[B, H, S, d]` with its rows in one piece, and the strides of batch row, head and slot."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def _indexed(index: Tensor) -> tuple[Tensor, int]:
    """`index` `[B, H, n]`, a part of each head's list perhaps, and the distance from head to head."""
    if index.stride(2) != 1 or index.stride(0) != index.shape[1] * index.stride(1):
        index = index.contiguous()
    return index, index.stride(1)
