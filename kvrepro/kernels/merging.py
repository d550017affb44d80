"""One-shot compression on a GPU: choose slots, compare keys, and sum the members of each merge, every byte read once.

What bounds each kernel at Llama-3.1-8B's shape (8 KV heads, d = 128, bfloat16), 32,768 slots of which 8,192 stay:

| kernel | reads and writes | flops | floor on an H100 (3.0 TB/s, 800 TFLOP/s) |
|---|---|---|---|
| `top`, `partition` | scores, 1 MB, 5 times and by each tile; marks by each tile (from L2) | | 0.03 ms, latency |
| `by_token` | a token's place in each head, 16 reads from L2 one after another | | latency |
| `neighbours`, `distance`, `project` | keys once, 67 MB | | 0.022 ms each |
| `nearest` | keys twice, 118 MB; the kept ones again from L2, 3.2 GB by tiles of 128 | 4.1e11 | 0.52 ms |
| `settle` | 12 bytes a slot, a head's similarities once a program from L2 | | 0.005 ms, latency |
| `mix`, `merge` | keys and values once, 134 MB; what is kept, 34 MB | | 0.056 ms |

No program's work grows with the length of a merge: `mix` cuts the list of members in chunks of equal size, and the sums
of a merge that crosses chunks are put together afterwards. Only whole numbers are added atomically, so that the same
input gives the same bits. The twins are in the code that calls them: `slots`, `methods.d2o`, `keepkv` and `kvmerger`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrepro.kernels import on_its_device

#: Evicted slots and kept slots of a tile of `nearest`, slots that a tile of the other kernels holds (all heads' of
#: `by_token`), warps.
CONFIG = {
    "queries": 128, "kept": 128, "nearest_warps": 8, "nearest_stages": 2,
    "nearest_registers": 0, "rows": 64, "row_warps": 4, "settle": 1024, "chunk": 32,
    "exact_chunk": 16, "mix_warps": 8, "held": 4096, "bits": 8,
    "tile": 1024, "part": 512, "looked_for": 1024, "scan": 4096, "scan_warps": 4,
}  # fmt: skip
#: Chunks' sums that `_bridge` reads at once.
_SPAN = 32


@triton.jit
def _sortable(score_ptr, candidate_ptr, taken_ptr, index, inside, TAKEN: tl.constexpr):
    """Scores as integers of the same order: NaN is above all, -0 is 0, no candidate is -inf, outside is least."""
    score = tl.load(score_ptr + index, mask=inside, other=0.0).to(tl.float32)
    candidate = tl.load(candidate_ptr + index, mask=inside, other=0) != 0
    if TAKEN:
        candidate &= tl.load(taken_ptr + index, mask=inside, other=0) == 0
    score = tl.where(candidate, score, -float("inf"))
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(inside, tl.where(score == score, bits, 0x7FFFFFFF), -2147483648), candidate


@triton.jit
def _histogram(key, lowest, LEFT: tl.constexpr, BITS: tl.constexpr):
    """How many keys have each value of the BITS bits before the LEFT last ones, above `lowest`.

    Keys outside the range in question count as its ends, so that sums from the right are how many keys are so high.
    """
    if LEFT + BITS == 32:
        place = (key >> LEFT) + (1 << (BITS - 1))
    else:
        place = (tl.minimum(tl.maximum(key, lowest), lowest + ((1 << (LEFT + BITS)) - 1)) - lowest) >> LEFT
    return tl.histogram(place, 1 << BITS)


@triton.jit
def _raised(lowest, counts, count, LEFT: tl.constexpr, BITS: tl.constexpr):
    """`lowest` with the highest value of these bits that `count` keys reach."""
    reached = (tl.cumsum(counts, 0, reverse=True) >= count) & (tl.arange(0, 1 << BITS) > 0)
    return lowest + (tl.sum(reached.to(tl.int32), 0) << LEFT)


@triton.jit
def _store_marks(out_ptr, taken_ptr, index, marked, inside, TAKEN: tl.constexpr):
    """The marks, and those that there were."""
    marks = marked.to(tl.uint8)
    if TAKEN:
        marks |= tl.load(taken_ptr + index, mask=inside, other=0)
    tl.store(out_ptr + index, marks, mask=inside)


@triton.jit
def _top(
    score_ptr, candidate_ptr, taken_ptr, count_ptr, out_ptr, size,
    BLOCK: tl.constexpr, BITS: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """Grid (B * H), for rows that fit one block: the count-th highest score, some bits at a time, then the marks."""
    first = tl.program_id(0).to(tl.int64) * size
    count = tl.load(count_ptr + tl.program_id(0)).to(tl.int32)
    slot = tl.arange(0, BLOCK)
    key, candidate = _sortable(score_ptr, candidate_ptr, taken_ptr, first + slot, slot < size, TAKEN)
    lowest = tl.full([], -2147483648, tl.int32)
    for left in tl.static_range(32 - BITS, -1, -BITS):
        lowest = _raised(lowest, _histogram(key, lowest, left, BITS), count, left, BITS)
    # Of the slots that equal the lowest score that is marked, so many are not, counted from the left.
    ties = tl.sum((key >= lowest).to(tl.int32), 0) - count
    tie = (key == lowest).to(tl.int32)
    marked = (key > lowest) | ((tie > 0) & (tl.cumsum(tie, 0) > ties))
    _store_marks(out_ptr, taken_ptr, first + slot, marked & candidate, slot < size, TAKEN)


@triton.jit
def _found(counts_ptr, rows, count, LEFT: tl.constexpr, BITS: tl.constexpr):
    """The count-th highest key as far as the histograms of its bits before the LEFT last ones are known."""
    lowest = tl.full([], -2147483648, tl.int32)
    row = tl.program_id(1)
    for left in tl.static_range(32 - BITS, LEFT - 1, -BITS):
        counts = tl.load(counts_ptr + row * (1 << BITS) + tl.arange(0, 1 << BITS))
        lowest = _raised(lowest, counts, count, left, BITS)
        row += rows
    return lowest


@triton.jit
def _count_digits(
    score_ptr, candidate_ptr, taken_ptr, count_ptr, counts_ptr, size, rows,
    LEFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, B * H): add a tile to the histogram of the BITS bits before the LEFT last ones."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.program_id(1).to(tl.int64) * size + slot
    key, _ = _sortable(score_ptr, candidate_ptr, taken_ptr, index, slot < size, TAKEN)
    count = tl.load(count_ptr + tl.program_id(1)).to(tl.int32)
    lowest = _found(counts_ptr, rows, count, LEFT + BITS, BITS)
    counts = _histogram(key, lowest, LEFT, BITS)
    row = (32 // BITS - 1 - LEFT // BITS) * rows + tl.program_id(1)
    tl.atomic_add(counts_ptr + row * (1 << BITS) + tl.arange(0, 1 << BITS), counts, mask=counts > 0)


@triton.jit
def _mark(
    score_ptr, candidate_ptr, taken_ptr, count_ptr, counts_ptr, out_ptr, size, rows,
    BITS: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, B * H): the marks as in `_top`; each program counts its row's ties for itself, from L2."""
    first = tl.program_id(1).to(tl.int64) * size
    count = tl.load(count_ptr + tl.program_id(1)).to(tl.int32)
    lowest = _found(counts_ptr, rows, count, 0, BITS)
    reach, passed = tl.zeros([SCAN], tl.int32), tl.zeros([SCAN], tl.int32)
    for start in range(0, size, SCAN):
        other = start + tl.arange(0, SCAN)
        key, _ = _sortable(score_ptr, candidate_ptr, taken_ptr, first + other, other < size, TAKEN)
        reach += ((key >= lowest) & (other < size)).to(tl.int32)
        passed += ((key == lowest) & (other < tl.program_id(0) * BLOCK)).to(tl.int32)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key, candidate = _sortable(score_ptr, candidate_ptr, taken_ptr, first + slot, slot < size, TAKEN)
    tie = (key == lowest).to(tl.int32)
    later = tl.sum(passed, 0) + tl.cumsum(tie, 0) > tl.sum(reach, 0) - count
    marked = (key > lowest) | ((tie > 0) & later)
    _store_marks(out_ptr, taken_ptr, first + slot, marked & candidate, slot < size, TAKEN)


@on_its_device
def top(score: Tensor, candidates: Tensor, count: Tensor | int, taken: Tensor | None = None) -> Tensor:
    """Mark the highest scores of each head; see `slots.top`.

    Args:
        score: `[B, H, S]`, float32 or narrower.
        candidates: `[B, H, S]` bool.
        count: how many to mark, one number or `[B, H, 1]`.
        taken: `[B, H, S]` bool, marked before.

    Returns:
        `[B, H, S]` bool.
    """
    b, h, size = score.shape
    if not isinstance(count, Tensor):
        count = torch.full((b, h, 1), count, dtype=torch.int64, device=score.device)
    out = torch.empty((b, h, size), dtype=torch.uint8, device=score.device)
    candidates = candidates.contiguous().view(torch.uint8)
    before = candidates if taken is None else taken.contiguous().view(torch.uint8)
    given = score.contiguous(), candidates, before, count.expand(b, h, 1).contiguous()
    how = {"BITS": CONFIG["bits"], "TAKEN": taken is not None}
    bits, tile, warps = CONFIG["bits"], CONFIG["tile"], CONFIG["scan_warps"]
    if size <= CONFIG["held"]:
        block = max(16, triton.next_power_of_2(size))
        _top[(b * h,)](*given, out, size, BLOCK=block, **how, num_warps=min(16, max(4, block // 256)))
        return out.view(torch.bool)
    counts = torch.zeros((32 // bits, b * h, 1 << bits), dtype=torch.int32, device=score.device)
    grid = (triton.cdiv(size, tile), b * h)
    for left in range(32 - bits, -1, -bits):
        _count_digits[grid](*given, counts, size, b * h, LEFT=left, BLOCK=tile, **how, num_warps=warps)
    _mark[grid](*given, counts, out, size, b * h, BLOCK=tile, SCAN=CONFIG["scan"], **how, num_warps=warps)
    return out.view(torch.bool)


@triton.jit
def _by_token(
    score_ptr, pos_ptr, out_ptr, heads, size, STEPS: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (tiles, B * H): each slot's token is looked for in all heads of the row at once, by bisection."""
    row = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.arange(0, HEADS)
    token = tl.load(pos_ptr + row * size + slot, mask=slot < size, other=-2)
    known = (head < heads)[:, None] & (slot < size)[None, :]
    first = (row // heads * heads + head)[:, None] * size
    low = tl.zeros([HEADS, BLOCK], tl.int32)
    high = low + size
    for _ in range(STEPS):
        middle = (low + high) // 2
        earlier = tl.load(pos_ptr + first + middle, mask=known & (middle < size), other=2147483647) < token[None, :]
        low, high = tl.where(earlier, middle + 1, low), tl.where(earlier, high, middle)
    same = tl.load(pos_ptr + first + low, mask=known & (low < size), other=-2) == token[None, :]
    same = known & same
    total = tl.sum(tl.load(score_ptr + first + low, mask=same, other=0.0), 0)
    tl.store(out_ptr + row * size + slot, total / tl.maximum(tl.sum(same.to(tl.float32), 0), 1.0), mask=slot < size)


@on_its_device
def by_token(score: Tensor, positions: Tensor) -> Tensor:
    """The mean of a score `[B, H, S]` float32 over the heads that hold a slot of the same token.

    Args:
        score: `[B, H, S]` float32.
        positions: `[B, H, S]` int32, ascending in each head; -1 for an empty slot, in front.

    Returns:
        `[B, H, S]` float32.
    """
    b, h, size = score.shape
    out = torch.empty((b, h, size), dtype=torch.float32, device=score.device)
    heads = triton.next_power_of_2(h)
    tile = max(1, CONFIG["looked_for"] // heads)
    _by_token[(triton.cdiv(size, tile), b * h)](
        score.contiguous(), positions.contiguous(), out, h, size, STEPS=size.bit_length(), HEADS=heads, BLOCK=tile
    )
    return out


@triton.jit
def _partition(keep_ptr, order_ptr, place_ptr, size, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """Grid (tiles, B * H): where each slot goes, and what comes to each place.

    Each program counts its row's marks for itself: they are read from L2 and that takes less than another launch.
    """
    first = tl.program_id(1).to(tl.int64) * size
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    marks, earlier = tl.zeros([SCAN], tl.int32), tl.zeros([SCAN], tl.int32)
    for start in range(0, size, SCAN):
        other = start + tl.arange(0, SCAN)
        mark = (tl.load(keep_ptr + first + other, mask=other < size, other=0) != 0).to(tl.int32)
        marks += mark
        earlier += tl.where(other < tl.program_id(0) * BLOCK, mark, 0)
    inside = slot < size
    mark = (tl.load(keep_ptr + first + slot, mask=inside, other=0) != 0).to(tl.int32)
    before = tl.sum(earlier, 0) + tl.cumsum(mark, 0) - mark
    place = tl.where(mark > 0, size - tl.sum(marks, 0) + before, slot - before)
    tl.store(place_ptr + first + slot, place.to(tl.int64), mask=inside)
    tl.store(order_ptr + first + place, slot.to(tl.int64), mask=inside)


@on_its_device
def partition(keep: Tensor) -> tuple[Tensor, Tensor]:
    """The unmarked slots, then the marked ones, both in order; see `slots.partition`.

    Args:
        keep: `[B, H, S]` bool.

    Returns:
        The slot at each place and the place of each slot, `[B, H, S]` int64 both.
    """
    order, place = torch.empty(2, *keep.shape, dtype=torch.int64, device=keep.device)
    b, h, size = keep.shape
    tile, scan = (min(CONFIG[name], max(16, triton.next_power_of_2(size))) for name in ("part", "scan"))
    _partition[(triton.cdiv(size, tile), b * h)](
        keep.contiguous().view(torch.uint8), order, place, size, BLOCK=tile, SCAN=scan, num_warps=CONFIG["scan_warps"]
    )
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


@on_its_device
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


@on_its_device
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
def _project(k_ptr, vector_ptr, out_ptr, k_b, k_h, k_s, heads, size, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (tiles, B * H): `scale` times the dot product of each slot's key with its head's vector."""
    head = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < size
    dim = tl.arange(0, D)
    row = k_ptr + head // heads * k_b + head % heads * k_h + slot.to(tl.int64)[:, None] * k_s + dim[None, :]
    keys = tl.load(row, mask=inside[:, None], other=0.0).to(tl.float32)
    vector = tl.load(vector_ptr + head * D + dim).to(tl.float32)
    tl.store(out_ptr + head * size + slot, tl.sum(keys * vector[None, :], 1) * scale, mask=inside)


@on_its_device
def project(keys: Tensor, vector: Tensor, scale: float) -> Tensor:
    """`[B, H, S]` float32: `scale` times the dot products of keys `[B, H, S, d]` with a vector a head, `[B, H, d]`."""
    b, h, size, d = keys.shape
    keys, strides = _strided(keys)
    out = torch.empty((b, h, size), dtype=torch.float32, device=keys.device)
    _project[(triton.cdiv(size, CONFIG["rows"]), b * h)](
        keys, vector.contiguous(), out, *strides, h, size, float(scale),
        D=d, BLOCK=CONFIG["rows"], num_warps=CONFIG["row_warps"],
    )  # fmt: skip
    return out


@triton.jit
def _pack(
    k_ptr, index_ptr, valid_ptr, out_ptr, inverse_ptr, k_b, k_h, k_s, index_h, heads, kept, padded,
    D: tl.constexpr, BLOCK: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, B * H): the kept keys side by side, and 1 / norm of each; 0 where empty."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < padded
    row = head * padded + place
    dim = tl.arange(0, D)[None, :]
    valid = place < kept
    if MARKED:
        valid = valid & (tl.load(valid_ptr + head * kept + place, mask=valid, other=0) != 0)
    slot = tl.load(index_ptr + head * index_h + place, mask=valid, other=0)
    source = k_ptr + head // heads * k_b + head % heads * k_h + slot[:, None] * k_s + dim
    key = tl.load(source, mask=valid[:, None], other=0.0)
    wide = key.to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), 1e-12)
    tl.store(out_ptr + row[:, None] * D + dim, key, mask=inside[:, None])
    tl.store(inverse_ptr + row, tl.where(valid, inverse, 0.0), mask=inside)


@triton.jit
def _nearest(
    k_ptr, gone_ptr, kept_ptr, inverse_ptr, pair_ptr, k_b, k_h, k_s, gone_h, heads, gone, padded, mask,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of evicted slots, B * H): the first of the two neighbouring places that hold the best; -1 if none do.

    A row of the product lies in four threads, column 8 j + 2 t + i in thread t: all but the last maximum is over what
    one thread holds. The lowest bits of a pair's score say which j it is, so that one maximum finds score and place;
    `_choose` takes the better one of the pair. Where `EXACT`, j is found beside the score.
    """
    head = tl.program_id(1).to(tl.int64)
    groups: tl.constexpr = BN // 8
    place = tl.program_id(0) * BM + tl.arange(0, BM)
    column, dim = tl.arange(0, BN), tl.arange(0, D)
    inside = place < gone
    slot = tl.load(gone_ptr + head * gone_h + place, mask=inside, other=0)
    row = k_ptr + head // heads * k_b + head % heads * k_h + slot[:, None] * k_s + dim[None, :]
    query = tl.load(row, mask=inside[:, None], other=0.0)
    best = tl.full([BM, 4], -2.9e38, tl.float32)
    group = tl.full([BM, 4], -1, tl.int32)
    code = (groups - 1 - tl.arange(0, groups))[None, :, None]  # of equal scores the first
    for start in tl.range(0, padded, BN, num_stages=STAGES):
        key = tl.load(kept_ptr + (head * padded + start + column)[None, :] * D + dim[:, None])
        inverse = tl.load(inverse_ptr + head * padded + start + column)
        score = tl.dot(query, key, input_precision="ieee") * inverse[None, :]
        if not WHOLE:
            score = tl.where((inverse > 0)[None, :], score, -3.0e38)
        pairs = tl.max(tl.reshape(score, [BM, groups, 4, 2]), 3)
        if EXACT:
            top, index = tl.max(pairs, 1, return_indices=True)
        else:
            # `mask` is -groups. As an argument it is in a register, and (a & b) | c is one instruction.
            coded = (pairs.to(tl.int32, bitcast=True) & mask) | code
            bits = tl.max(coded.to(tl.float32, bitcast=True), 1).to(tl.int32, bitcast=True)
            top = (bits & mask).to(tl.float32, bitcast=True)
            index = groups - 1 - (bits & (groups - 1))
        higher = top > best
        best = tl.where(higher, top, best)
        group = tl.where(higher, start + index * 8, group)
    most = tl.max(best, 1)
    pair = tl.where(group >= 0, group + 2 * tl.arange(0, 4)[None, :], -1)
    pair = tl.min(tl.where(best == most[:, None], pair, 2147483647), 1)
    tl.store(pair_ptr + head * gone + place, pair, mask=inside)


@triton.jit
def _choose(
    k_ptr, gone_ptr, kept_ptr, inverse_ptr, pair_ptr, best_ptr, index_ptr, k_b, k_h, k_s, gone_h, kept_h, heads, gone,
    kept, padded, D: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of evicted slots, B * H): the better one of two places, and its cosine in float32."""
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < gone
    first = k_ptr + head // heads * k_b + head % heads * k_h + tl.arange(0, D)[None, :]
    pair = tl.load(pair_ptr + head * gone + place, mask=inside, other=-1)
    slot = tl.load(gone_ptr + head * gone_h + place, mask=inside, other=0)
    query = tl.load(first + slot[:, None] * k_s, mask=inside[:, None], other=0.0).to(tl.float32)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    index = tl.zeros([BLOCK], tl.int32)
    for i in tl.static_range(2):
        other = pair + i
        live = (pair >= 0) & (other < kept)
        if not WHOLE:
            live = live & (tl.load(inverse_ptr + head * padded + other, mask=live, other=0.0) > 0)
        slot = tl.load(kept_ptr + head * kept_h + other, mask=live, other=0)
        key = tl.load(first + slot[:, None] * k_s, mask=live[:, None], other=0.0).to(tl.float32)
        cosine = tl.sum(query * key, 1) / tl.maximum(tl.sqrt(tl.sum(key * key, 1)), 1e-12)
        higher = live & (cosine > best)
        best = tl.where(higher, cosine, best)
        index = tl.where(higher, other, index)
    norm = tl.maximum(tl.sqrt(tl.sum(query * query, 1)), 1e-12)
    tl.store(best_ptr + head * gone + place, best / norm, mask=inside)
    tl.store(index_ptr + head * gone + place, index, mask=inside)


@on_its_device
def nearest(keys: Tensor, gone: Tensor, kept: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The most similar kept slot of each evicted one; see `d2o.nearest_kept`.

    The cosine is that of the chosen slot in float32. 16-bit keys are compared through scores that carry a place in
    their last bits: the chosen slot's cosine is within 2^-18 of the highest.

    Args:
        keys: `[B, H, S, d]`.
        gone: `[B, H, E]` int64, the slots that ask.
        kept: `[B, H, K]` int64, the slots that may answer.
        valid: `[B, H, K]` bool, which of those hold something; None: all.

    Returns:
        Cosine similarity `[B, H, E]` float32, and the place in `kept` `[B, H, E]` int32, of equal ones the first (where
        their cosine is negative, any of them).
    """
    b, h, _, d = keys.shape
    (e,), (n,) = gone.shape[2:], kept.shape[2:]
    keys, strides = _strided(keys)
    (gone, gone_h), (kept, kept_h) = _indexed(gone), _indexed(kept)
    exact = keys.dtype == torch.float32
    # Wide rows take smaller tiles: what the tiles are set for is rows of 256 bytes. Without tensor cores a thread's
    # registers hold less.
    shrink = max(1, d * keys.element_size() // 256)
    bm, bn = (CONFIG[side] // shrink for side in ("queries", "kept"))
    bm, bn = max(16, bm // 2 if exact else bm), max(16, bn)
    padded = triton.cdiv(n, bn) * bn
    device, marks = keys.device, None if valid is None else valid.contiguous().view(torch.uint8)
    packed = torch.empty((b * h * padded, d), dtype=keys.dtype, device=device)
    inverse = torch.empty((b, h, padded), dtype=torch.float32, device=device)
    _pack[(triton.cdiv(padded, CONFIG["rows"]), b * h)](
        keys, kept, marks, packed, inverse, *strides, kept_h, h, n, padded,
        D=d, BLOCK=CONFIG["rows"], MARKED=valid is not None, num_warps=CONFIG["row_warps"],
    )  # fmt: skip
    pair, index = torch.empty((2, b, h, e), dtype=torch.int32, device=device)
    best = torch.empty((b, h, e), dtype=torch.float32, device=device)
    limit = {"maxnreg": CONFIG["nearest_registers"]} if CONFIG["nearest_registers"] and keys.is_cuda else {}
    whole = valid is None and padded == n
    _nearest[(triton.cdiv(e, bm), b * h)](
        keys, gone, packed, inverse, pair, *strides, gone_h, h, e, padded, -(bn // 8),
        D=d, BM=bm, BN=bn, EXACT=exact, WHOLE=whole,
        STAGES=CONFIG["nearest_stages"] if shrink == 1 else 2, num_warps=CONFIG["nearest_warps"], **limit,
    )  # fmt: skip
    rows = CONFIG["rows"] // 2
    _choose[(triton.cdiv(e, rows), b * h)](
        keys, gone, kept, inverse, pair, best, index, *strides, gone_h, kept_h, h, e, n, padded,
        D=d, BLOCK=rows, WHOLE=whole, num_warps=CONFIG["row_warps"],
    )  # fmt: skip
    return best, index


@triton.jit
def _settle(
    order_ptr, keep_ptr, cardinality_ptr, similarity_ptr, nearest_ptr, old_ptr, target_ptr, weight_ptr, new_ptr,
    bar, alpha, size, gone, RUNNING: tl.constexpr, RAGGED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of places, B * H): where the slot at each place of `order` goes, and its weight.

    Each program forms its head's mean for itself: that is read from L2 and takes less than another launch.
    """
    head = tl.program_id(1).to(tl.int64)
    first = head * size
    kept = size - gone
    if RUNNING:
        total = tl.zeros([WIDE], tl.float32)
        count = tl.zeros([WIDE], tl.int32)
        for start in range(0, gone, WIDE):
            place = start + tl.arange(0, WIDE)
            live = place < gone
            if RAGGED:
                slot = tl.load(order_ptr + first + place, mask=live, other=0)
                live = live & (tl.load(keep_ptr + first + slot, mask=live, other=1) == 0)
                live = live & (tl.load(cardinality_ptr + first + slot, mask=live, other=0) > 0)
            total += tl.load(similarity_ptr + head * gone + place, mask=live, other=0.0)
            count += live.to(tl.int32)
        number = tl.sum(count, 0)
        mean = tl.sum(total, 0) / tl.maximum(number, 1).to(tl.float32)
        old = tl.load(old_ptr + head)
        moved = tl.where(old != old, mean, alpha * old + (1 - alpha) * mean)
        bar = tl.where(number > 0, moved, old)
        if tl.program_id(0) == 0:
            tl.store(new_ptr + head, bar)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    evicted = place < gone
    slot = tl.load(order_ptr + first + place, mask=inside, other=0)
    similarity = tl.load(similarity_ptr + head * gone + place, mask=evicted, other=0.0)
    goes = tl.load(nearest_ptr + head * gone + place, mask=evicted, other=0)
    joins = (similarity >= bar) & (similarity > 0) if RUNNING else similarity > bar
    stays = place >= gone
    if RAGGED:
        keep = tl.load(keep_ptr + first + slot, mask=inside, other=0) != 0
        joins = joins & (keep == 0) & (tl.load(cardinality_ptr + first + slot, mask=inside, other=0) > 0)
        stays = stays & keep
    goes = tl.where(evicted, tl.where(joins, goes, kept), tl.where(stays, place - gone, kept))
    goes = goes.to(target_ptr.dtype.element_ty) + (head * (kept + 1)).to(target_ptr.dtype.element_ty)
    tl.store(target_ptr + first + slot, goes, mask=inside)
    if RUNNING:
        tl.store(weight_ptr + first + slot, tl.where(evicted, similarity, 1.0), mask=inside)


@on_its_device
def settle(
    order: Tensor,
    keep: Tensor,
    cardinality: Tensor,
    similarity: Tensor,
    nearest: Tensor,
    bar: tuple[Tensor, float] | float,
    *,
    ragged: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Where every slot goes; see `d2o.Eviction`, whose fields the arguments are.

    Args:
        order: `[B, H, S]` int64.
        keep: `[B, H, S]` bool.
        cardinality: `[B, H, S]` int32.
        similarity: `[B, H, E]` float32.
        nearest: `[B, H, E]` int32.
        bar: what joins is more similar than this; or D2O's threshold so far `[B, H]` float32, NaN if none, and alpha.
        ragged: some slots may be empty.

    Returns:
        The place each slot goes to, as `merge` takes it; and for D2O a slot's weight `[B, H, S]` float32, which is its
        similarity or 1 for a kept one, and the new threshold `[B, H]`, else None twice.
    """
    b, h, size = order.shape
    gone = similarity.shape[2]
    running = not isinstance(bar, float)
    places = b * h * (size - gone + 1)
    target = torch.empty(order.shape, dtype=torch.int32 if places < 2**31 else torch.int64, device=order.device)
    weight = torch.empty(order.shape, dtype=torch.float32, device=order.device) if running else None
    old, alpha = bar if running else (None, 0.0)
    new = torch.empty((b, h), dtype=torch.float32, device=order.device) if running else None
    block = CONFIG["settle"]
    _settle[(triton.cdiv(size, block), b * h)](
        order, keep.contiguous().view(torch.uint8), cardinality.contiguous(), similarity, nearest,
        old.contiguous() if running else None, target, weight, new, 0.0 if running else bar, alpha, size, gone,
        RUNNING=running, RAGGED=ragged, BLOCK=block, WIDE=4 * block, num_warps=8,
    )  # fmt: skip
    return target, weight, new


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
def _stretch(mass, moment, votes, top):
    """KeepKV's factor on a merged key, from the sums of w, w l and p, w relative to e^top; see `keepkv._stretch`."""
    mean = moment / mass
    factor = (tl.log(mass / votes) + top) / tl.where(mean == 0, 1.0, mean)
    return tl.where((factor >= 0.5) & (factor <= 2.0), factor, 1.0)


@triton.jit
def _sums(
    k_ptr, v_ptr, member_ptr, target_ptr, first_ptr, second_ptr, out_k_ptr, out_v_ptr, out_n_ptr, part_k_ptr,
    part_v_ptr, part_ptr, crossing_ptr, k_b, k_h, k_s, v_b, v_h, v_s, heads, size, rows, base, chunks,
    D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, LISTED: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
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
    row = tl.arange(0, CHUNK)
    goes = tl.where(live, target - low, -1)[None, :] == row[:, None]
    place = low + row
    first = left & (row == 0)
    last = right & (place == high) & (first == 0)
    whole = (place <= high) & (first == 0) & (last == 0)
    out = head * rows + place
    part = ((head * chunks + chunk) * 2).to(tl.int64) + last.to(tl.int64)

    weight = tl.load(first_ptr + head * size + slot, mask=live, other=0.0)
    second = tl.load(second_ptr + head * size + slot, mask=live, other=0)
    if KIND == "sums":
        for_k = tl.where(goes, weight[None, :], 0.0)
        for_v = tl.where(goes, second[None, :], 0.0)
    else:
        votes = tl.sum(tl.where(goes, second[None, :], 0), 1)
        for_v = tl.where(goes, weight[None, :], 0.0)
        if KIND == "votes":
            moment = for_v
            top = tl.max(tl.where(goes, weight[None, :], -float("inf")), 1)
            fall = tl.exp(tl.where(goes, weight[None, :] - top[:, None], -float("inf")))
            for_v = second[None, :].to(tl.float32) * fall
            moment = tl.sum(for_v * moment, 1)
        mass = tl.sum(for_v, 1)
        # A slot that nothing joins keeps its bits: w / w need not be 1 here.
        lone = whole & (tl.sum(goes.to(tl.int32), 1) == 1)
        share = 1.0 / tl.where(whole, mass, 1.0)
        for_v = tl.where(lone[:, None], goes.to(tl.float32), for_v * share[:, None])
        for_k = for_v
        tl.store(out_n_ptr + out, votes, mask=whole)
        tl.store(part_ptr + part * 4, mass, mask=first | last)
        tl.store(part_ptr + part * 4 + 1, votes.to(tl.float32), mask=first | last)  # exact below 2^24 tokens
        if KIND == "votes":
            tl.store(part_ptr + part * 4 + 2, moment, mask=first | last)
            tl.store(part_ptr + part * 4 + 3, top, mask=first | last)
            several = whole & (lone == 0)
            mass, top = tl.where(several, mass, 1.0), tl.where(several, top, 0.0)
            stretch = _stretch(mass, moment, tl.where(several, votes, 1).to(tl.float32), top)
            for_k = for_v * tl.where(several, stretch, 1.0)[:, None]

    dim = tl.arange(0, D)[None, :]
    x = tl.load(k_ptr + b * k_b + h * k_h + slot[:, None] * k_s + dim, mask=live[:, None], other=0.0)
    total = _weigh(for_k, x, PRECISION)
    tl.store(out_k_ptr + out[:, None] * D + dim, total.to(out_k_ptr.dtype.element_ty), mask=whole[:, None])
    tl.store(part_k_ptr + part[:, None] * D + dim, total, mask=(first | last)[:, None])

    dim = tl.arange(0, DV)[None, :]
    x = tl.load(v_ptr + b * v_b + h * v_h + slot[:, None] * v_s + dim, mask=live[:, None], other=0.0)
    total = _weigh(for_v, x, PRECISION)
    tl.store(out_v_ptr + out[:, None] * DV + dim, total.to(out_v_ptr.dtype.element_ty), mask=whole[:, None])
    tl.store(part_v_ptr + part[:, None] * DV + dim, total, mask=(first | last)[:, None])

    note = crossing_ptr + (head * chunks + chunk) * 2
    tl.store(note, tl.where(left, low, -1).to(tl.int32))
    tl.store(note + 1, tl.where(right & (both == 0), high, -1).to(tl.int32))


@triton.jit
def _bridge(
    part_k_ptr, part_v_ptr, part_ptr, crossing_ptr, out_k_ptr, out_v_ptr, out_n_ptr, rows, chunks,
    D: tl.constexpr, DV: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr,
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
        mass = tl.zeros([], tl.float32)
        votes = tl.zeros([], tl.float32)
        moment = tl.zeros([], tl.float32)
        top = tl.full([], -float("inf"), tl.float32)
        end = chunk + 1
        while end > 0:
            place = end - SPAN + tl.arange(0, SPAN)
            known = place >= 0
            # A merge leaves a left part in each chunk it came into, and one right part where it began.
            middle = tl.load(note + place * 2, mask=known, other=-1) == target
            begins = tl.load(note + place * 2 + 1, mask=known, other=-1) == target
            part = (head * chunks + place) * 2 + begins.to(tl.int64)
            member = middle | begins
            some_k = tl.load(part_k_ptr + part[:, None] * D + dim, mask=member[:, None], other=0.0)
            some_v = tl.load(part_v_ptr + part[:, None] * DV + dim_v, mask=member[:, None], other=0.0)
            if KIND == "votes":  # sums relative to different maxima are brought to the highest
                tops = tl.load(part_ptr + part * 4 + 3, mask=member, other=-float("inf"))
                highest = tl.maximum(top, tl.max(tops, 0))
                fall = tl.exp(tops - highest)
                rest = tl.exp(top - highest)
                some_k, some_v = some_k * fall[:, None], some_v * fall[:, None]
                total_k, total_v = total_k * rest, total_v * rest
                mass = mass * rest + tl.sum(tl.load(part_ptr + part * 4, mask=member, other=0.0) * fall, 0)
                moment = moment * rest + tl.sum(tl.load(part_ptr + part * 4 + 2, mask=member, other=0.0) * fall, 0)
                top = highest
            elif KIND == "means":
                mass += tl.sum(tl.load(part_ptr + part * 4, mask=member, other=0.0), 0)
            if KIND != "sums":
                votes += tl.sum(tl.load(part_ptr + part * 4 + 1, mask=member, other=0.0), 0)
            total_k += tl.sum(some_k, 0)
            total_v += tl.sum(some_v, 0)
            end = tl.where(tl.max(begins.to(tl.int32), 0) > 0, 0, end - SPAN)
        out = head * rows + target
        if KIND != "sums":
            tl.store(out_n_ptr + out, votes.to(tl.int32))
            total_k, total_v = total_k / mass, total_v / mass
        if KIND == "votes":
            total_k = total_k * _stretch(mass, moment, votes, top)
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
    b, h, s, _ = keys.shape
    member, target = None, target.contiguous()
    if not runs:
        head = torch.arange(b * h, device=keys.device).view(b, h, 1) * (size + 1)
        flat = (target + head).flatten()
        flat = flat.to(torch.int32) if b * h * (size + 1) < 2**31 else flat
        target, member = flat.sort(stable=True)  # one sort of all heads: a head's slots stay together
    return _summed(keys, values, target, member, (key_weight, value_weight), size, whole, "sums")[:2]


def merge(
    keys: Tensor,
    values: Tensor,
    target: Tensor,
    weight: Tensor,
    cardinality: Tensor,
    size: int,
    *,
    whole: bool,
    votes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted means of the keys and values that go to each place; see `d2o.merge` and `keepkv.merge`.

    Args:
        keys: `[B, H, S, d]`.
        values: `[B, H, S, d_v]`.
        target: `[B, H, S]` int32 or int64, the place each slot goes to, `size` for those that go nowhere, counted on
            from head to head by `size + 1`. The places that get something are consecutive.
        weight: `[B, H, S]` float32, a slot's weight, or its logit if `votes`.
        cardinality: `[B, H, S]` int32.
        size: number of places.
        whole: every place gets something; the others are set to 0.
        votes: weights are KeepKV's, cardinality times e^logit, and merged keys are stretched.

    Returns:
        Keys `[B, H, size, d]` and values `[B, H, size, d_v]` in their types, and cardinalities `[B, H, size]` int32.
    """
    target, member = target.flatten().sort(stable=True)
    kind = "votes" if votes else "means"
    return _summed(keys, values, target, member, (weight, cardinality), size, whole, kind)


@on_its_device
def _summed(
    keys: Tensor,
    values: Tensor,
    target: Tensor,
    member: Tensor | None,
    weights: tuple[Tensor, Tensor],
    size: int,
    whole: bool,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `_sums` and `_bridge`.

    Args:
        keys: `[B, H, S, d]`.
        values: `[B, H, S, d_v]`.
        target: `[B, H, S]`, or where sorted `[B * H * S]` and counted on from head to head by `size + 1`.
        member: `[B * H * S]` int64, the slots in the targets' order; None if that is their own.
        weights: `[B, H, S]` each, as `mix` takes them, or weight and cardinality as `merge` does.
        size: number of places.
        whole: every place gets something.
        kind: "sums" for `mix`, "means" or "votes" for `merge`.

    Returns:
        Keys, values and, of `merge`, cardinalities of the places.
    """
    b, h, s, d = keys.shape
    dv, device = values.shape[3], keys.device
    precision = _precision(keys.dtype)
    chunk = CONFIG["chunk"] if precision != "ieee" else CONFIG["exact_chunk"]
    (keys, k_strides), (values, v_strides) = _strided(keys), _strided(values)
    new = torch.empty if whole else torch.zeros
    out_k = new((b, h, size, d), dtype=keys.dtype, device=device)
    out_v = new((b, h, size, dv), dtype=values.dtype, device=device)
    out_n = new((b, h, size) if kind != "sums" else (0,), dtype=torch.int32, device=device)
    chunks = triton.cdiv(s, chunk)
    part_k = torch.empty((b * h, chunks, 2, d), dtype=torch.float32, device=device)
    part_v = torch.empty((b * h, chunks, 2, dv), dtype=torch.float32, device=device)
    part = torch.empty((b * h, chunks, 2, 4) if kind != "sums" else (0,), dtype=torch.float32, device=device)
    crossing = torch.empty((b * h, chunks, 2), dtype=torch.int32, device=device)
    first, second = (x.contiguous() for x in weights)
    listed = member is not None
    _sums[(chunks, b * h)](
        keys, values, member, target, first, second, out_k, out_v, out_n, part_k, part_v, part, crossing,
        *k_strides, *v_strides, h, s, size, size + 1 if listed else 0, chunks,
        D=d, DV=dv, CHUNK=chunk, LISTED=listed, KIND=kind, PRECISION=precision, num_warps=CONFIG["mix_warps"],
    )  # fmt: skip
    _bridge[(chunks, b * h)](
        part_k, part_v, part, crossing, out_k, out_v, out_n, size, chunks,
        D=d, DV=dv, SPAN=_SPAN, KIND=kind, num_warps=4,
    )  # fmt: skip
    return out_k, out_v, out_n


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
