"""A compressed cache whose slots are held in 8 or 4 bits: fewer bytes a slot beside fewer slots.

After every forward pass a layer's keys and values are packed: asymmetric uniform quantisation, a scale and a zero in
float16 for each group of a slot's dimensions, two 4-bit codes to a byte. In the pass they are unpacked into the model's
type, so every method attends to them, scores them and merges them as always; the pass's own tokens enter it as the
model made them. Positions, cardinalities and side vectors stay as they are.

A slot that a pass left as it was keeps its codes, so nothing drifts however long one decodes; a merged one is packed
anew.

What is ours: keys are packed as they are stored, rotated to their position, in groups along the head's dimensions,
because slots come and go one by one. KIVI (arXiv 2402.02750) packs keys channel by channel over many tokens, where
their outliers lie; KVQuant (arXiv 2401.18079) does so before rotary embedding, and keeps outliers apart.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from kvrepro.attention import Step
from kvrepro.cache import CompressedCache, CompressedLayer
from kvrepro.methods.base import Method, StepRule
from kvrepro.slots import Slots, take
from kvrepro.static import StaticSlots

#: Bits of a code.
BITS = (8, 4)
#: Dimensions that share a scale and a zero with 4 bits, unless said otherwise: KIVI's group size.
GROUP = 32


@dataclass(frozen=True)
class Form:
    """How slots are packed.

    Attributes:
        bits: of a code, 8 or 4.
        group: dimensions of a head that share a scale and a zero.
        residual: newest slots that stay as the model made them, at most.
    """

    bits: int
    group: int
    residual: int


@dataclass(frozen=True)
class Packed:
    """Keys or values of some slots, packed.

    Attributes:
        codes: `[B, H_kv, S, d * bits / 8]` uint8; of two 4-bit codes in a byte the first is the lower half.
        scale: `[B, H_kv, S, groups]` float16, the step from one code to the next.
        zero: `[B, H_kv, S, groups]` float16, what code 0 stands for.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def size(self) -> int:
        """Number of slots a head."""
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scale, self.zero))

    def map(self, function: Callable[[Tensor], Tensor]) -> Packed:
        """Apply `function` to every tensor."""
        return Packed(function(self.codes), function(self.scale), function(self.zero))

    def where(self, mask: Tensor, other: Packed) -> Packed:
        """These slots where `mask` `[B, H_kv, S]`, elsewhere the other's."""
        wide = mask.unsqueeze(-1)
        mine, theirs = ((x.codes, x.scale, x.zero) for x in (self, other))
        return Packed(*(torch.where(wide, a, b) for a, b in zip(mine, theirs, strict=True)))


def pack(x: Tensor, bits: int, group: int) -> Packed:
    """Quantise, slot by slot and group by group.

    Args:
        x: `[B, H_kv, S, d]`.
        bits: of a code, 8 or 4.
        group: dimensions that share a scale and a zero.

    Returns:
        Codes whose values lie within half a step of `x`, what float16 rounds off scale and zero aside.

    Raises:
        ValueError: `group` does not divide the dimensions, or something is not finite in float16.
    """
    _check_group(x.shape[-1], group)
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, group))  # [B, H, S, groups, group]
    low, high = wide.amin(-1), wide.amax(-1)
    scale = ((high - low) / (2**bits - 1)).to(torch.float16)
    zero = low.to(torch.float16)
    if not bool((scale.isfinite() & zero.isfinite()).all()):
        raise ValueError(
            "keys or values are not finite, or beyond float16, in which scales are held: leave this cache unquantised"
        )
    step = torch.where(scale > 0, scale, 1).to(wide.dtype).unsqueeze(-1)
    codes = ((wide - zero.to(wide.dtype).unsqueeze(-1)) / step).round().clamp(0, 2**bits - 1)
    codes = codes.to(torch.uint8).flatten(-2)
    return Packed(codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4, scale, zero)


def unpack(packed: Packed, bits: int, dtype: torch.dtype) -> Tensor:
    """`[B, H_kv, S, d]` in `dtype`: zero + code * scale, formed in float32 (or float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    codes = packed.codes
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    groups = codes.unflatten(-1, (packed.scale.shape[-1], -1)).to(wide)  # [B, H, S, groups, group]
    scale, zero = packed.scale.to(wide).unsqueeze(-1), packed.zero.to(wide).unsqueeze(-1)
    return (groups * scale + zero).flatten(-2).to(dtype)


@dataclass(frozen=True)
class QuantisedSlots:
    """What a quantised layer holds between two passes.

    Attributes:
        keys: all slots' keys but the newest ones'.
        values: their values.
        rest: everything else of all slots; its keys and values are those of the newest slots alone, `[B, H_kv, n, d]`.
    """

    keys: Packed
    values: Packed
    rest: Slots

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes + self.rest.nbytes

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantisedSlots:
        """Apply `function`, which selects or repeats rows, to every tensor."""
        return QuantisedSlots(self.keys.map(function), self.values.map(function), self.rest.map(function))

    def unpacked(self, bits: int) -> Slots:
        """The slots, as the methods know them."""
        newest = (self.rest.keys, self.rest.values)
        keys, values = (
            torch.cat([unpack(packed, bits, last.dtype), last], dim=2)
            for packed, last in zip((self.keys, self.values), newest, strict=True)
        )
        return replace(self.rest, keys=keys, values=values)


def store(slots: Slots, form: Form, before: tuple[QuantisedSlots, Slots] | None = None) -> QuantisedSlots:
    """Pack slots; those that are what they were keep their codes.

    Args:
        slots: the slots, `S` a head.
        form: how to pack them.
        before: what was held, and the same unpacked; None where nothing was.

    Returns:
        All slots packed but the newest `form.residual`; fewer than these stay unpacked where some of them had been
        packed, so that no slot is rounded twice.
    """
    first = max(0, slots.size - form.residual)  # of the slots that stay unpacked
    same = None
    if before is not None and before[0].keys.size > 0:
        same = _unchanged(slots, before[1], before[0].keys.size)
        old = (same.keys | same.values).any(dim=0).any(dim=0).nonzero()
        first = max(first, int(old.max()) + 1 if len(old) else 0)
    keys = pack(slots.keys[:, :, :first], form.bits, form.group)
    values = pack(slots.values[:, :, :first], form.bits, form.group)
    if same is not None:
        index = same.index[:, :, :first]
        keys = before[0].keys.map(lambda x: take(x, index)).where(same.keys[:, :, :first], keys)
        values = before[0].values.map(lambda x: take(x, index)).where(same.values[:, :, :first], values)
    newest = {"keys": slots.keys[:, :, first:].clone(), "values": slots.values[:, :, first:].clone()}
    return QuantisedSlots(keys, values, replace(slots, **newest))


@dataclass(frozen=True)
class _Unchanged:
    """Which slots' keys and values `[B, H_kv, S]` are bit for bit those of the packed slots at `index`."""

    index: Tensor
    keys: Tensor
    values: Tensor


def _unchanged(slots: Slots, old: Slots, packed: int) -> _Unchanged:
    """Find each slot among the first `packed` of the old ones, by its position, and compare."""
    places = old.positions[:, :, :packed].contiguous()
    index = torch.searchsorted(places, slots.positions.contiguous()).clamp_max(packed - 1)
    found = (places.gather(2, index) == slots.positions) & slots.valid

    def equal(new: Tensor, x: Tensor) -> Tensor:
        """`[B, H_kv, S]`."""
        return found & (new == take(x[:, :, :packed], index)).all(dim=-1)

    return _Unchanged(index, equal(slots.keys, old.keys), equal(slots.values, old.values))


class QuantisedLayer(CompressedLayer):
    """A compressed layer whose slots are packed between passes.

    `slots` gives and takes them unpacked, so all code that works on a layer works on this one. Fixed storage (`static`)
    does not: a `Decoder` would hold the slots in the model's type, and is refused.
    """

    def __init__(self, layer: CompressedLayer, form: Form) -> None:
        """An empty layer in the place of `layer`."""
        self.form = form
        super().__init__(layer.method, layer.share, layer.layer, layer.layers, layer.rotation)

    @property
    def slots(self) -> Slots | None:
        """The slots, unpacked; None before the first token."""
        if self._opened:
            return self._open
        return None if self._packed is None else self._packed.unpacked(self.form.bits)

    @slots.setter
    def slots(self, slots: Slots | None) -> None:
        if self._opened:
            self._open = slots
        else:
            self.unpack()
            self._open = slots
            self.pack()

    @property
    def static(self) -> None:
        """No fixed storage."""
        return None

    @static.setter
    def static(self, storage: StaticSlots | None) -> None:
        if storage is not None:
            raise ValueError(
                "kvrepro.generate and Decoder would hold a quantised cache's slots in the model's own type, in fixed "
                "storage; write with model.generate(..., past_key_values=cache)"
            )

    @property
    def newest(self) -> tuple[Tensor, Tensor] | None:
        """Keys and values `[B, H_kv, n, d]` of the slots that are held unpacked; None before the first token."""
        return None if self._packed is None else (self._packed.rest.keys, self._packed.rest.values)

    @property
    def nbytes(self) -> int:
        """Bytes held: codes, scales, zeros, what stays unpacked, side vectors and the observation window."""
        window = 0 if self.window is None else sum(x.numel() * x.element_size() for x in self.window)
        return window + sum(x.nbytes for x in (self._packed, self._open) if x is not None)

    def reset(self) -> None:
        """Forget everything."""
        self._packed: QuantisedSlots | None = None
        self._open: Slots | None = None  # the slots while a pass works on them
        self._before: Slots | None = None  # what `_packed` says, unpacked
        self._opened = False
        super().reset()

    def unpack(self) -> None:
        """Take the slots out for a pass, unless they are."""
        if not self._opened:
            self._open = self._before = self.slots
            self._opened = True

    def pack(self) -> None:
        """Put the slots back after a pass, unless they are."""
        if not self._opened:
            return
        slots, before = self._open, self._before
        if slots is None:
            self._packed = None
        elif slots is not before:
            self._packed = store(slots, self.form, None if before is None else (self._packed, before))
        self._open = self._before = None
        self._opened = False

    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """`CompressedLayer.attend`, on unpacked slots."""
        self.unpack()
        try:
            return super().attend(module, query, mask, scale, softcap)
        finally:
            if not any(layer is self for layer, _ in self.cache()._waiting):  # for `settle_together`
                self.pack()

    def _map(self, function: Any) -> None:
        """Apply `function` to every tensor held: rows move, nothing is rounded."""
        packed, self._packed = self._packed, None
        super()._map(function)  # which finds no slots, and moves the window's rows
        if packed is not None:
            self._packed = packed.map(function)
            self.row_tokens = function(self.row_tokens)


class QuantisedCache(CompressedCache):
    """A compressed cache whose slots are packed; see `quantise`.

    Attributes:
        form: how slots are packed.
    """

    def __init__(self, cache: CompressedCache, form: Form) -> None:
        """Use `quantise`, which checks the cache and the form."""
        super().__init__(cache._config, _unfixed(cache.method), cache.budget, cache.compressed[0].rotation)
        self.form = form
        self.layers = [
            QuantisedLayer(layer, form) if isinstance(layer, CompressedLayer) else layer for layer in self.layers
        ]
        for layer in self.compressed:
            layer.cache = weakref.ref(self)

    def settle_together(self, layer: CompressedLayer, step: Step) -> None:
        """`CompressedCache.settle_together`; slots that waited for it unpacked are packed."""
        super().settle_together(layer, step)
        if not self._waiting:
            for each in self.compressed:
                each.pack()


class _Unfixed:
    """A method without its promises that a layer's work is always the same: what is packed is in no fixed storage."""

    def step_rule(self, budget: int) -> StepRule | None:
        """None is always right."""
        return None

    def steady(self, budget: int, arrived: int = 1) -> bool:
        """False is always right."""
        return False


def _unfixed(method: Method) -> Method:
    """The same method with the same options, as `_Unfixed`."""
    kind = type(type(method).__name__, (_Unfixed, type(method)), {})
    return kind(**{f.name: getattr(method, f.name) for f in fields(method)})


def quantise(cache: CompressedCache, bits: int = 8, *, group: int | None = None, residual: int = 0) -> QuantisedCache:
    """The same cache with its kept slots held in fewer bits.

    Every method works on it unchanged, merging included: a pass sees the slots unpacked, and what it leaves is packed.
    `cache.nbytes` is what is really held. Sliding-window layers stay as transformers makes them, and are counted.

    Args:
        cache: an empty cache, from `make_cache`; it is left as it is.
        bits: of a key's or value's number, 8 or 4.
        group: dimensions of a head that share a scale and a zero of 2 bytes each. None is 32 with 4 bits, KIVI's
            number, where that divides them, and all of them with 8 bits (ours).
        residual: the newest slots of each layer that stay in the model's type, at most; 0 packs all (ours).

    Returns:
        An empty cache for `model.generate`, `prefill` or the model itself. `kvrepro.generate` and `Decoder`, whose
        fixed storage is in the model's type, refuse it where a method would use that.

    Raises:
        ValueError: bits, group or residual that are not valid; a cache that is not compressed, not empty, or quantised;
            a method that gives heads different numbers of slots.
    """
    if not isinstance(cache, CompressedCache):
        raise ValueError(f"a {type(cache).__name__} cannot be quantised here; give a cache from kvrepro.make_cache")
    if isinstance(cache, QuantisedCache):
        raise ValueError(
            f"this cache is quantised already, with bits={cache.form.bits}; make a new one with make_cache"
        )
    if cache.method.shares_heads:
        raise ValueError(
            f"{cache.method.name} gives heads different numbers of slots, which a quantised cache cannot hold without "
            "empty ones; make the cache with heads='same'"
        )
    if cache.get_seq_length() or any(layer.budget is not None for layer in cache.compressed):
        raise ValueError("this cache has begun to read; quantise an empty one, as make_cache returns it")
    if bits not in BITS or not isinstance(bits, int):
        raise ValueError(f"bits={bits!r} is not valid; choose one of {list(BITS)}")
    if isinstance(residual, bool) or not isinstance(residual, int) or residual < 0:
        raise ValueError(f"residual={residual!r} is not valid; give a number of slots, 0 or more")
    config = cache._config
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if group is None:
        group = GROUP if bits == 4 and d % GROUP == 0 else d
    _check_group(d, group)
    return QuantisedCache(cache, Form(bits, group, residual))


def _check_group(d: int, group: int) -> None:
    """Check that groups divide a head of `d` dimensions and fill whole bytes.

    Raises:
        ValueError: they do not.
    """
    valid = [n for n in range(2, d + 1, 2) if d % n == 0]
    if isinstance(group, bool) or group not in valid:
        raise ValueError(f"group={group!r} is not valid for heads of {d} dimensions; choose one of {valid}")
