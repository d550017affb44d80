"""Decoding token by token: slots in fixed storage, the whole step in one CUDA graph.

Plain `model.generate` works with every cache. `generate` here does the same faster: on a GPU a step is captured once
and replayed, so that no time goes to Python and launches. Each layer takes its steps in one of four ways:

* in place: the method has a `step_rule`, or nothing ever leaves;
* appended: the method compresses now and then. Steps in between append to fixed storage; when the layer is due, which
  the host knows without asking the GPU, `compress` puts its result back into the storage. Where that is always the same
  work (`leaves`) and all such layers are due at once, the due step is captured too, in a graph of its own; else it runs
  eagerly;
* copied back: the method's `compress` does the same work at every step (`steady`); what it returns is copied into fixed
  storage;
* plain: anything else, one launch after another.

Without a GPU the same steps run one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from kvrepro.adapter import cache_arguments, redirected
from kvrepro.cache import CompressedCache, CompressedLayer
from kvrepro.compiled import compiled
from kvrepro.evaluate import prefill
from kvrepro.fixed import FixedLayer, capture, on_several_devices
from kvrepro.memory import explained
from kvrepro.methods.base import Method, StepRule
from kvrepro.slots import Slots
from kvrepro.static import SIDES, StaticSlots, freeze_shape, full, refill, step, thaw

#: Steps that run before a capture, one of them at least of the kind that is captured: they compile kernels and set up
#: libraries.
_WARM_UP = 2
#: Steps between two looks at whether all rows have ended; on a GPU a look waits for it.
_LOOK = {"cuda": 16}


class _InPlace:
    """A layer that lets one slot go for each token by a rule (`step_rule`), or lets none go."""

    mode = "in place"
    due = False

    def __init__(self, layer: CompressedLayer, rule: StepRule, newest: Tensor, room: int) -> None:
        """Move the layer's slots into fixed storage."""
        self.layer = layer
        layer.static = _freeze(layer, rule, newest, room)
        layer.slots = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """`[B, H_q, 1, d]` from one new token a row: query `[B, H_q, 1, d]`, key and value `[B, H_kv, 1, d]`."""
        return _step(self.layer.static, query, key, value, scale, softcap)

    def taken(self) -> None:
        """A step has been taken."""

    def close(self) -> None:
        """Give the slots back in order."""
        self.layer.slots, self.layer.static = thaw(self.layer.static), None


class _Clock:
    """Where the newest queries stand in the windows of one width, and at which positions: the same in all layers."""

    def __init__(self, places: Tensor) -> None:
        """Start with positions `[B, w]`, the newest last."""
        self.places = places.clone()
        self.newest = torch.full((1,), places.shape[1] - 1, dtype=torch.long, device=places.device)

    def begin(self, positions: Tensor) -> None:
        """Begin a step: its queries, at positions `[B]`, take the place of the oldest ones."""
        self.newest.add_(1).remainder_(self.places.shape[1])
        self.places.index_copy_(1, self.newest, positions[:, None])

    @property
    def order(self) -> Tensor:
        """`[w]` int64: the places, the newest last."""
        width = self.places.shape[1]
        return (self.newest + 1 + torch.arange(width, device=self.places.device)) % width


class _Ring:
    """The observation window in fixed storage: a step writes over the oldest query, which a CUDA graph can hold."""

    def __init__(self, layer: CompressedLayer, clocks: dict[int, _Clock]) -> None:
        """Copy the layer's window, filled up in front with places that hold no query."""
        queries, places = _whole_window(layer)
        if layer.width not in clocks:
            clocks[layer.width] = _Clock(places)
        self._clock = clocks[layer.width]
        self._queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        self.refill(layer)

    @property
    def newest(self) -> tuple[Tensor, Tensor]:
        """The storage `[B, H_kv, G, w, d]`, and `[1]`, the place of this step's queries."""
        return self._queries, self._clock.newest

    def in_order(self) -> tuple[Tensor, Tensor]:
        """Queries `[B, H_kv, G, w, d]` and positions `[B, w]`, the newest last."""
        order = self._clock.order
        return self._queries.index_select(3, order), self._clock.places.index_select(1, order)

    def refill(self, layer: CompressedLayer) -> None:
        """Put the layer's window into the storage."""
        self._queries.index_copy_(3, self._clock.order, _whole_window(layer)[0])


def _whole_window(layer: CompressedLayer) -> tuple[Tensor, Tensor]:
    """The layer's window with empty places in front, as wide as it will be."""
    queries, places = layer.window
    short = layer.width - places.shape[1]
    return pad(queries, (0, 0, short, 0)), pad(places, (short, 0), value=-1)


def _cut_window(layer: CompressedLayer) -> None:
    """Drop the places of the layer's window that are empty in every row; tensors of its own are left."""
    if layer.window is not None:
        queries, places = layer.window
        first = int((places >= 0).any(dim=0).int().argmax())
        layer.window = (queries[:, :, :, first:].clone(), places[:, first:].clone())


class _Appended:
    """A layer that compresses now and then: tokens are appended to fixed storage until it is due."""

    mode = "appended"

    def __init__(self, layer: CompressedLayer, newest: Tensor, room: int, clocks: dict[int, _Clock]) -> None:
        """Move the layer's slots into fixed storage."""
        self.layer = layer
        self._size = layer.fill(layer.slots)
        self._leaves = _leaves(layer)
        self._most = _most(layer)
        self._window = _Ring(layer, clocks) if layer.width else None
        layer.static = _freeze(layer, StepRule("none"), newest, room)
        layer.slots = None

    @property
    def due(self) -> bool:
        """Whether the next token makes the layer compress."""
        layer = self.layer
        return layer.active and layer.method.due(self._size + 1, layer.budget, 1, layer._since + 1)

    @property
    def compresses_in_place(self) -> bool:
        """Whether compressing now is work for the device alone, the same each time."""
        return self._leaves is not None and self._size == self.layer.budget

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """As `_InPlace.attend`; a due layer compresses in place or runs as it would without this class."""
        if self.due and not self.compresses_in_place:
            return self._run(query, key, value, scale, softcap)
        window = None if self._window is None else self._window.newest
        out = _step(self.layer.static, query, key, value, scale, softcap, window)
        if self.due:
            self._compress(query, scale, softcap)
        return out

    def _compress(self, query: Tensor, scale: float, softcap: float | None) -> None:
        """Compress the storage, full now, into itself; nothing here changes what the host keeps from step to step."""
        layer, static = self.layer, self.layer.static
        step = layer._step(query, static.newest[:, None], scale, softcap, static.free.shape[1])
        if self._window is not None:
            queries, places = self._window.in_order()
            step = dataclasses.replace(step, window_queries=queries, window_positions=places)
        slots = layer.method.compress(full(static), layer.budget, dataclasses.replace(step, one_over=True))
        promised = self._most - (layer.budget - self._leaves)
        if slots.size != promised or slots.ragged != (layer.rooms is not None):
            raise RuntimeError(
                f"{layer.method.name} left {slots.size} slots where {promised} were promised; correct its `leaves`"
            )
        refill(static, slots, by_tokens=layer.method.positions == "cardinality")

    def _run(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """Take the slots out and do what a plain forward pass does, see `_InPlace.attend`."""
        self._storage = self.layer.static
        self.layer.slots, self.layer.static = thaw(self._storage), None
        self.layer.row_tokens = self._storage.newest.clone()
        if self._window is not None:  # without this step's query, which the pass adds
            queries, places = self._window.in_order()
            self.layer.window = (queries[:, :, :, :-1], places[:, :-1])
        return _run_layer(self.layer, query, key, value, scale, softcap)

    def taken(self) -> None:
        """A step has been taken: count its token, or put what was compressed outside back into the storage."""
        layer = self.layer
        if layer.static is not None:
            self._size, layer._since = (self._leaves, 0) if self.due else (self._size + 1, layer._since + 1)
        elif _way(layer) is _Appended and (layer.rooms is not None or layer.slots.size < self._storage.size):
            self._size, self._leaves, self._most = layer.fill(layer.slots), _leaves(layer), _most(layer)
            refill(self._storage, layer.slots, by_tokens=layer.method.positions == "cardinality")
            layer.slots, layer.static = None, self._storage
            if self._window is not None:
                self._window.refill(layer)

    def close(self) -> None:
        """Give the slots, and the observation window, back in order."""
        if self.layer.static is not None:
            self.layer.slots, self.layer.static = thaw(self.layer.static), None
            if self._window is not None:
                self.layer.window = self._window.in_order()
            _cut_window(self.layer)


class _CopiedBack:
    """A layer whose method compresses at every step: what its pure functions return is copied into fixed storage."""

    mode = "copied back"
    due = False

    def __init__(self, layer: CompressedLayer) -> None:
        """Fix the layer's tensors; a layer that is not full yet is filled up with empty slots."""
        self.layer = layer
        if layer.slots.size < layer.budget:
            layer.slots = layer.slots.pad(layer.budget)
        if layer.window is not None:
            layer.window = _whole_window(layer)
        self._fixed = FixedLayer(layer)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """As `_InPlace.attend`."""
        out = _run_layer(self.layer, query, key, value, scale, softcap)
        self._fixed.copy_back()
        return out

    def taken(self) -> None:
        """A step has been taken."""

    def close(self) -> None:
        """Drop the slots, and the places of the window, that are still empty in every row."""
        self.layer.slots = _filled(self.layer.slots)
        _cut_window(self.layer)


class _Plain:
    """A layer that runs as it is, its slots growing and shrinking: not for a captured graph."""

    mode = "plain"
    due = False

    def __init__(self, layer: CompressedLayer) -> None:
        """Take the layer as it is."""
        self.layer = layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """As `_InPlace.attend`."""
        return _run_layer(self.layer, query, key, value, scale, softcap)

    def taken(self) -> None:
        """A step has been taken."""

    def close(self) -> None:
        """Nothing to give back."""


_Held = _InPlace | _Appended | _CopiedBack | _Plain


def _hold(layer: CompressedLayer, newest: Tensor, room: int, clocks: dict[int, _Clock]) -> _Held:
    """Take a layer's steps, at most `room` of them, in the way that fits it; `clocks` are those of the windows."""
    way = _way(layer)
    if way is _InPlace:
        rule = layer.method.step_rule(layer.budget) if layer.active else StepRule("none")
        return _InPlace(layer, rule, newest, room)
    return _Appended(layer, newest, room, clocks) if way is _Appended else way(layer)


def _way(layer: CompressedLayer) -> type[_Held]:
    """The way in which a layer, as it is now, takes its steps."""
    method = layer.method
    if not layer.active:
        return _InPlace
    countable = _countable(method)
    ruled = countable and not layer.width and method.positions != "cardinality" and _stands(method, "step_rule")
    if ruled and method.step_rule(layer.budget) is not None:
        return _InPlace
    if method.shares_at(1) and not layer.cache().split:
        return _Plain
    steady = layer.rooms is None and method.bounded and _stands(method, "steady") and method.steady(layer.budget)
    if steady and (layer.slots.size >= layer.budget or not countable):
        return _CopiedBack
    return _Appended if countable else _Plain


def _leaves(layer: CompressedLayer) -> int | None:
    """Slots that the layer's compressions leave (`Method.leaves`).

    None without that promise, with empty slots, or where heads with rooms of their own are not all as near to full.
    """
    method, slots = layer.method, layer.slots
    fixed = method.bounded and _stands(method, "leaves")
    count = method.leaves(layer.budget) if fixed else None
    if count is None or not slots.ragged:
        return count
    held = slots.valid.sum(dim=2)
    lacks = slots.size - held if layer.rooms is None else layer.rooms - held
    expected = 0 if layer.rooms is None else lacks.flatten()[0]
    return count if bool((lacks == expected).all()) else None


def _most(layer: CompressedLayer) -> int:
    """The most slots that a head may hold."""
    return layer.budget if layer.rooms is None else int(layer.rooms.max())


def _countable(method: Method) -> bool:
    """Whether what the method keeps of each pass is what `static.step` adds up: attention and queries, or nothing."""
    return not method.accumulates or (method.sums and set(method.accumulates) <= set(SIDES))


def _stands(method: Method, promise: str) -> bool:
    """Whether a method's promise about `compress` was made by the class that wrote it.

    The promises are `step_rule`, `steady` and `leaves`; a subclass that compresses in its own way must not inherit any.
    """

    def depth(name: str) -> int:
        """How far up the class that defines `name` is."""
        return next(i for i, cls in enumerate(type(method).__mro__) if name in vars(cls))

    return all(depth(promise) <= depth(name) for name in ("compress", "due", "accumulate", "reduce_group"))


def _freeze(layer: CompressedLayer, rule: StepRule, newest: Tensor, room: int) -> StaticSlots:
    """The layer's slots in fixed storage that `room` steps do not overflow."""
    method, slots = layer.method, layer.slots
    most = slots.size + room
    bounded = layer.active and method.bounded
    budget = most
    if layer.rooms is not None:
        budget = layer.rooms if bounded else (slots.valid.sum(dim=2) + room).to(torch.int32)
    elif bounded:
        budget = layer.budget
    return freeze_shape(
        slots,
        budget,
        rule,
        newest,
        tuple(name for name in SIDES if name in slots.stats),
        None if method.positions == "original" else layer.rotation,
        room=None if layer.rooms is not None else min(most, budget),
        steps=room,
        by_tokens=method.positions == "cardinality",
        biased=method.cardinality_bias,
        counting=layer.active,
        layer=layer.layer,
        reduce=None if _averages(method) else method.reduce_group,
    )


def _averages(method: Method) -> bool:
    """Whether one number a KV head is the mean over its group."""
    return float(method.reduce_group(torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1))) == 3.0


def _step(
    static: StaticSlots,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    window: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`static.step` in the shapes the model uses, see `_InPlace.attend`."""
    b, hq, _, d = query.shape
    h = key.shape[1]
    out = step(static, query.reshape(b, h, hq // h, d), key.squeeze(2), value.squeeze(2), scale, softcap, window)
    return out.reshape(b, hq, 1, -1)


def _run_layer(
    layer: CompressedLayer, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """What the layer does in a plain forward pass, see `_InPlace.attend`."""
    layer.update(key, value)
    return layer.attend(layer.module(), query, None, scale, softcap)


def _filled(slots: Slots) -> Slots:
    """The slots without those in front that are empty in every row and head."""
    first = int(slots.valid.any(dim=0).any(dim=0).int().argmax())
    rest = slots.map(lambda x: x[:, :, first:].clone() if x.dim() > 2 else x)
    return dataclasses.replace(rest, ragged=rest.ragged and not bool(rest.valid.all()))


class Decoder:
    """Decoding steps of one model over one cache; a context manager that gives the cache back when it is left.

    Attributes:
        modes: how each compressed layer takes its steps: "in place", "appended", "copied back" or "plain".
        graphed: steps that compress nothing on the host are captured in a CUDA graph.
        replayed: steps that were replayed from a CUDA graph so far.
        replayed_due: those of them at which layers that compress now and then did.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: CompressedCache,
        *,
        room: int,
        attention_mask: Tensor | None = None,
        compile: bool = False,
    ) -> None:
        """Fix the storage of a cache that has read its prompt.

        Args:
            model: the model the cache was made for.
            cache: the cache.
            room: steps that will be taken at most; an unlimited cache reserves this many slots.
            attention_mask: `[B, L]`, 0 marks padding among the tokens read so far. Only models with sliding-window
                layers need it again, whose steps run as a plain forward pass.
            compile: also let `torch.compile` fuse what lies between the model's matrix products (see `compiled`); takes
                some seconds, once a model and batch size.

        Raises:
            ValueError: an empty cache.
        """
        layers = cache.compressed
        if any(layer.slots is None for layer in layers):
            raise ValueError("the cache is empty: read the prompt first, with kvrepro.prefill")
        self._model, self._cache, self._layers = model, cache, layers
        self._room = room
        self._taken = 0
        self._seen = layers[0].seen
        self._newest = layers[0].row_tokens.clone()
        self._mask = torch.ones(self._newest.shape[0], 1, 1, 1, dtype=torch.bool, device=self._newest.device)
        self._read = attention_mask
        self._whole = len(layers) == len(cache.layers) and not on_several_devices(model)
        self._forget()
        self.replayed = self.replayed_due = 0
        self._clocks: dict[int, _Clock] = {}
        self._held = [_hold(x, self._newest, room, self._clocks) if self._whole else _Plain(x) for x in layers]
        self._compiled = functools.partial(compiled, model) if compile else nullcontext
        if self._newest.is_cuda and not self.graphed:
            warnings.warn(
                f"{layers[0].method.name} in {type(model).__name__}, as set up here, holds no constant number of "
                "slots: its steps cannot be captured yet and run one by one",
                stacklevel=2,
            )

    @property
    def modes(self) -> list[str]:
        """How each compressed layer takes its steps now."""
        return [held.mode for held in self._held]

    def __enter__(self) -> Self:
        """The decoder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the slots back to the cache, in order."""
        self._forget()
        for held, layer in zip(self._held, self._layers, strict=True):
            held.close()
            layer.seen = self._seen + self._taken
            layer.row_tokens = self._newest.to(layer.row_tokens.device, copy=True)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """One step: tokens `[B]` in, the next ones' logits `[B, V]` out. For the body of `run`."""
        places = self._newest[:, None].long()
        if not self._whole:
            output = self._plain_pass(tokens[:, None], places)
        else:
            for clock in self._clocks.values():
                clock.begin(self._newest)
            handlers = {layer.module(): held.attend for layer, held in zip(self._layers, self._held, strict=True)}
            with redirected(handlers), self._compiled():
                output = self._model(
                    input_ids=tokens[:, None],
                    position_ids=places,
                    attention_mask=self._mask,
                    use_cache=False,
                    logits_to_keep=1,
                )
        self._newest += 1
        return output.logits[:, -1]

    def _plain_pass(self, tokens: Tensor, places: Tensor) -> Any:
        """The model over its cache, tokens and position ids `[B, 1]`.

        Sliding-window layers keep their own storage, and layers on several devices theirs.
        """
        if self._read is not None:
            self._read = pad(self._read, (0, 1), value=1)
        return self._model(
            input_ids=tokens,
            position_ids=places,
            attention_mask=self._read,
            logits_to_keep=1,
            **cache_arguments(self._model, self._cache),
        )

    def run(
        self,
        body: Callable[[], None],
        steps: int,
        *,
        until: Callable[[], bool] | None = None,
        progress: Callable[[], Any] | None = None,
    ) -> int:
        """Take steps.

        Args:
            body: one step; calls `logits` once and works in place on tensors that exist before. On a GPU it is
                captured after two calls, once again for steps at which layers compress, and replayed, so it must not
                look at values.
            steps: how many.
            until: asked now and then (on a GPU every 16 steps); True ends the run early.
            progress: called after each step.

        Returns:
            The steps taken.

        Raises:
            ValueError: more steps than there is room for.
        """
        if self._taken + steps > self._room:
            raise ValueError(f"{self._taken} + {steps} steps, but room={self._room}; make the decoder with more room")
        look = _LOOK.get(self._newest.device.type, 1)
        self._forget()
        taken = 0
        while taken < steps:
            self._advance(body)
            taken += 1
            if progress is not None:
                progress()
            if until is not None and taken % look == 0 and until():
                break
        return taken

    @property
    def graphed(self) -> bool:
        """Whether steps are captured, those aside at which a layer compresses on the host."""
        return self._newest.is_cuda and not any(isinstance(held, _Plain) for held in self._held)

    def _forget(self) -> None:
        """Start with no graph: what was captured does not fit the next steps."""
        self._replays: dict[str, Callable[[], None]] = {}
        self._warm: Counter[str] = Counter()

    def _kind(self) -> str:
        """What the next step does, which says what graph can hold it.

        "common": nothing is due; "due": all layers that append are, and compress in place; "eager": the host decides.
        """
        due = [held for held in self._held if held.due]
        if not due:
            return "common"
        together = len(due) == self.modes.count("appended")
        return "due" if together and all(held.compresses_in_place for held in due) else "eager"

    def _advance(self, body: Callable[[], None]) -> None:
        """Take one step: from the graph of its kind, which is captured once that has warmed up."""
        kind = self._kind()
        ready = self._warm[kind] >= 1 and self._warm.total() >= _WARM_UP
        if kind != "eager" and kind not in self._replays and ready and self.graphed:
            self._replays[kind] = capture(body, self._newest.device)
        if kind in self._replays:
            self._replays[kind]()
            self.replayed += 1
            self.replayed_due += kind == "due"
        else:
            body()
            self._warm[kind] += 1
        self._taken += 1
        for held in self._held:
            held.taken()
        if kind == "eager" or "plain" in self.modes:
            self._hold_anew()

    def _hold_anew(self) -> None:
        """Layers that have just become full, or have their budget only now, may take their steps in another way."""
        if not self._whole:
            return
        for i, (held, layer) in enumerate(zip(self._held, self._layers, strict=True)):
            thawed = isinstance(held, _Appended) and layer.static is None
            if thawed or (isinstance(held, _Plain) and _way(layer) is not _Plain):
                self._held[i] = _hold(layer, self._newest, self._room - self._taken, self._clocks)
                self._forget()


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompressedCache,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    temperature: float = 0.0,
    compile: bool = False,
) -> Tensor:
    """Read a prompt and go on writing: what `model.generate` does, with fixed storage and, on a GPU, one graph a step.

    Args:
        model: the model the cache was made for.
        input_ids: `[B, L]`.
        cache: from `make_cache`.
        max_new_tokens: tokens to write, at least 1.
        attention_mask: `[B, L]`, 0 marks padding on the left.
        chunk: tokens of the prompt read at a time (see `prefill`).
        eos_token_id: the token, or any of the tokens, that ends a row; None writes all tokens. What follows it in a row
            is the same token.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature) with
            PyTorch's default generator of the device.
        compile: see `Decoder`.

    Returns:
        `[B, L + new]`: the prompt and what was written. The cache holds all of it but the last token; where all rows
        ended early on a GPU, up to 15 tokens more.

    Raises:
        ValueError: fewer than one new token, a negative temperature, or whatever `prefill` and `Decoder` refuse.
        torch.OutOfMemoryError: with what was asked for, and what would fit.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be 1 or more, temperature={temperature} must not be negative"
        )
    input_ids = input_ids.to(model.device)
    mask = None if attention_mask is None else attention_mask.to(model.device)
    logits = prefill(model, input_ids, cache, attention_mask=mask, chunk=chunk).logits[:, -1]
    token = _pick(logits, temperature)
    ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ()), dtype=torch.long)
    ends = ends.to(model.device)
    new = token[:, None].clone()
    if max_new_tokens > 1 and not (len(ends) and bool(torch.isin(token, ends).all())):
        with (
            explained(model, cache, len(token), input_ids.shape[1] + max_new_tokens, chunk),
            Decoder(model, cache, room=max_new_tokens - 1, attention_mask=mask, compile=compile) as decoder,
        ):
            new = torch.cat([new, _write(decoder, token, max_new_tokens - 1, ends, temperature)], dim=1)
    return torch.cat([input_ids, _trim(new, ends) if len(ends) else new], dim=1)


def _write(decoder: Decoder, token: Tensor, steps: int, ends: Tensor, temperature: float) -> Tensor:
    """`[B, n]`: the tokens after `token` `[B]`, n <= steps; n is less if all rows have come to one of `ends` `[e]`."""
    out = torch.zeros(len(token), steps, dtype=token.dtype, device=token.device)
    index = torch.zeros(1, dtype=torch.long, device=token.device)
    ended = torch.isin(token, ends)

    def body() -> None:
        """One token a row."""
        token.copy_(_pick(decoder.logits(token), temperature))
        out.index_copy_(1, index, token[:, None])
        index.add_(1)
        if len(ends):
            ended.logical_or_((token[:, None] == ends).any(dim=1))

    taken = decoder.run(body, steps, until=(lambda: bool(ended.all())) if len(ends) else None)
    return out[:, :taken]


def _pick(logits: Tensor, temperature: float) -> Tensor:
    """`[B]` tokens from logits `[B, V]`: the likeliest, or a draw."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits.float() / temperature, dim=-1)
    # The largest of p / E with E exponential is a draw from p; unlike multinomial it never waits for the GPU.
    return (p / torch.empty_like(p).exponential_(1.0).clamp_min(1e-20)).argmax(dim=-1)


def _trim(new: Tensor, ends: Tensor) -> Tensor:
    """After a row's first end it repeats that token; columns after all rows have ended are cut off; new `[B, n]`."""
    over = torch.isin(new, ends).cumsum(dim=1) > 0
    first = new.gather(1, over.int().argmax(dim=1, keepdim=True))  # of rows that end
    after = torch.cat([torch.zeros_like(over[:, :1]), over[:, :-1]], dim=1)
    length = int((~after).any(dim=0).sum())
    return torch.where(after, first, new)[:, :length]
