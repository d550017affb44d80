"""Turn keys by a number of positions, and find that number; twins: `rope.Rotation.rotate`, `attention.Step.shift`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvrepro.kernels import on_its_device

#: Slots whose shift a program of `_shift` finds, and slots that it looks at at a time.
TILE, SCAN = 4096, 4096


@triton.jit
def cos_sin(angle):
    """Cosine and sine to 1e-6, without the slow path that libraries keep for huge angles.

    Whole turns go in three exact pieces of 2 pi, the quarter of the rest into Taylor series, and twice the angle twice.
    """
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    rest = ((angle - turns * 6.28125) - turns * 1.93500518798828125e-3) - turns * 3.0199159819567e-7
    x = rest * 0.25
    y = x * x
    sin = x * (1.0 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880)))))
    cos = 1.0 + y * (-0.5 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320))))
    sin, cos = 2.0 * sin * cos, 1.0 - 2.0 * sin * sin
    return 1.0 - 2.0 * sin * sin, 2.0 * sin * cos


@triton.jit
def turn(low, high, angle):
    """Both halves of keys turned by `angle` radians, in float32."""
    cos, sin = cos_sin(angle)
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def _rotate(
    k_ptr, shift_ptr, freq_ptr, out_ptr, k_b, k_h, k_s, heads, size, D: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid (blocks of slots, B * H)."""
    head = tl.program_id(1).to(tl.int64)
    half: tl.constexpr = D // 2
    slot, dim = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, half)
    inside = slot < size
    known = inside[:, None]
    source = k_ptr + head // heads * k_b + head % heads * k_h + slot[:, None] * k_s + dim[None, :]
    low, high = tl.load(source, mask=known, other=0.0), tl.load(source + half, mask=known, other=0.0)
    shift = tl.load(shift_ptr + head * size + slot, mask=inside, other=0)
    angle = shift.to(tl.float32)[:, None] * tl.load(freq_ptr + dim)[None, :]
    new_low, new_high = turn(low.to(tl.float32), high.to(tl.float32), angle)
    moved = shift[:, None] != 0  # what is not moved keeps its bits
    kind: tl.constexpr = out_ptr.dtype.element_ty
    target = out_ptr + (head * size + slot[:, None]) * D + dim[None, :]
    tl.store(target, tl.where(moved, new_low.to(kind), low), mask=known)
    tl.store(target + half, tl.where(moved, new_high.to(kind), high), mask=known)


@triton.jit
def _shift(place_ptr, card_ptr, out_ptr, size, BY_TOKENS: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """Grid (tiles, B * H): each program finds its row's newest position and sums for itself, from L2."""
    row = tl.program_id(1).to(tl.int64) * size
    newest = tl.full([SCAN], -2147483648, tl.int32)
    whole, earlier = tl.zeros([SCAN], tl.int32), tl.zeros([SCAN], tl.int32)
    for start in range(0, size, SCAN):
        other = start + tl.arange(0, SCAN)
        inside = other < size
        newest = tl.maximum(newest, tl.load(place_ptr + row + other, mask=inside, other=-2147483648))
        tokens = tl.load(card_ptr + row + other, mask=inside, other=0)
        weight = tokens if BY_TOKENS else (tokens > 0).to(tl.int32)
        whole += weight
        earlier += tl.where(other < tl.program_id(0) * BLOCK, weight, 0)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < size
    tokens = tl.load(card_ptr + row + slot, mask=inside, other=0)
    weight = tokens if BY_TOKENS else (tokens > 0).to(tl.int32)
    there = tl.max(newest, 0) - tl.sum(whole, 0) + tl.sum(earlier, 0) + tl.cumsum(weight, 0)
    moved = there - tl.load(place_ptr + row + slot, mask=inside, other=0)
    tl.store(out_ptr + row + slot, tl.where(tokens > 0, moved, 0), mask=inside)


@on_its_device
def shift(positions: Tensor, cardinality: Tensor, by_tokens: bool) -> Tensor:
    """`[B, H, S]` int32: by how many positions each slot is moved; see `attention.Step.shift`.

    Args:
        positions: `[B, H, S]` int32.
        cardinality: `[B, H, S]` int32.
        by_tokens: a slot stands at the running sum of cardinalities, else at that of slots.
    """
    out = torch.empty_like(positions, memory_format=torch.contiguous_format)
    b, h, size = positions.shape
    block, scan = (min(most, max(16, triton.next_power_of_2(size))) for most in (TILE, SCAN))
    _shift[(triton.cdiv(size, block), b * h)](
        positions.contiguous(), cardinality.contiguous(), out, size,
        BY_TOKENS=by_tokens, BLOCK=block, SCAN=scan, num_warps=8,
    )  # fmt: skip
    return out


@on_its_device
def rotate(keys: Tensor, shift: Tensor, frequencies: Tensor) -> Tensor:
    """Keys `[B, H, S, d]` moved by `shift` `[B, H, S]` positions, all of their dimensions rotated.

    Args:
        keys: as the model rotated them.
        shift: int32 or int64.
        frequencies: `[d / 2]`, radians per position.

    Returns:
        `[B, H, S, d]` in the keys' dtype.
    """
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    b, h, size, d = keys.shape
    out = keys.new_empty(b, h, size, d)
    block = 16 if d > 128 else 32
    _rotate[(triton.cdiv(size, block), b * h)](
        keys, shift.expand(b, h, size).contiguous(), frequencies.to(keys.device, torch.float32), out,
        *keys.stride()[:3], h, size, D=d, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out
