"""The compressed cache: transformers' side of it, and the flow of one forward pass through one layer."""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from kvrepro import methods
from kvrepro.adapter import is_prepared, prepare, tag
from kvrepro.attention import Step, attend, look
from kvrepro.methods.base import Method
from kvrepro.rope import Rotation, find_rotation
from kvrepro.slots import FlatSlots, Slots, flatten
from kvrepro.static import StaticSlots, thaw

_UNREACHED = (
    "the model's attention did not reach the cache: call kvrepro.prepare(model) first; a prepared model that "
    "changes the cached keys before attention (multi-head latent attention) is not supported"
)


class CompressedLayer(CacheLayerMixin):
    """One layer's slots, held to its budget after every forward pass.

    Attributes:
        static: the slots in fixed storage instead, while a `Decoder` is at work.
        budget: slots a head may hold, the mean over heads where they differ; None is unlimited; set when the prompt's
            length is known.
        rooms: `[B, H_kv]` int32, the slots each head may hold, where the method has given heads different numbers.
        seen: tokens seen, padding included.
        row_tokens: `[B]` int32, tokens seen of each row, padding not counted.
        window: the last queries `[B, H_kv, G, w, d]` and their positions `[B, w]`, for methods with a window.
        module: the model's attention module that attended last.
        frozen: append and attend, but neither count nor compress (see `CompressedCache.freeze`).
        record: where to note each pass's arguments (see `CompressedCache.record`), or None.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, method: Method, share: int | float | None, layer: int, layers: int, rotation: Rotation | None
    ) -> None:
        """A layer for `method` with a budget `share` (slots, share of the prompt, or None)."""
        self.method = method
        self.share = share
        self.layer = layer
        self.layers = layers
        self.rotation = rotation
        self.cache: weakref.ref[CompressedCache] | None = None
        self.reset()

    # --- what transformers asks of a cache layer -------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: slots come with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens' keys and values `[B, H_kv, n, d]`; `attend` follows with their queries.

        Raises:
            RuntimeError: the pass before this one never reached `attend`: the model is not prepared.
        """
        if self._arrived is not None:
            self._arrived = None
            raise RuntimeError(_UNREACHED)
        self._arrived = (key_states, value_states)
        return tag(key_states.view_as(key_states), self), value_states

    def get_seq_length(self) -> int:
        """Tokens seen, padding included; it drives the model's position ids."""
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """The mask covers the new tokens only: (their number, where they start)."""
        n = query_length if isinstance(query_length, int) else query_length.shape[0]
        return n, self.seen

    def get_max_length(self) -> int:
        """No bound on the tokens seen."""
        return -1

    def get_max_cache_shape(self) -> int:
        """`get_max_length` by the name it had before transformers 5.20."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.budget: int | None = None
        self.rooms: Tensor | None = None
        self.slots = None
        self.static: StaticSlots | None = None
        self.seen = 0
        self.row_tokens: Tensor | None = None
        self.window: tuple[Tensor, Tensor] | None = None
        self.module: weakref.ref[nn.Module] | None = None
        self._since = 0
        self._arrived: tuple[Tensor, Tensor] | None = None
        self.probe: GradientProbe | SecondReading | None = None
        self.frozen = False
        self.record: list[Pass] | None = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch, for beam search; `beam_idx` `[B']`."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`."""
        self._map(lambda x: x[indices])

    def crop(self, *args: Any) -> None:
        """Refused: evicted tokens cannot come back.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a compressed cache cannot be cropped; assisted generation needs a full cache")

    def offload(self) -> None:
        """Refused, like `crop`.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a compressed cache stays on its device; make it with make_cache, without offloading")

    def _map(self, function: Any) -> None:
        """Apply `function` to every tensor held."""
        if self.rooms is not None:
            self.rooms = function(self.rooms)
        slots = self.slots
        if slots is not None:
            self.slots = slots.map(function)
            self.row_tokens = function(self.row_tokens)
        if self.window is not None:
            self.window = (function(self.window[0]), function(self.window[1]))

    # --- reading ---------------------------------------------------------------------------------------------------

    @property
    def slots(self) -> Slots | None:
        """What is held, None before the first token; heads that hold fewer slots than others have empty ones in front.

        What is stored has none: a layer whose heads may hold different numbers of slots takes no bytes for them.
        """
        return self._slots.spread() if isinstance(self._slots, FlatSlots) else self._slots

    @slots.setter
    def slots(self, slots: Slots | FlatSlots | None) -> None:
        uneven = isinstance(slots, Slots) and self.rooms is not None
        self._slots: Slots | FlatSlots | None = flatten(slots) if uneven else slots

    def fill(self, slots: Slots) -> int:
        """Slots a head holds; where each has its own room, the budget and what the fullest one has beyond it."""
        if self.rooms is None:
            return slots.size
        return self.budget + int(((slots.valid.sum(dim=2) if slots.ragged else slots.size) - self.rooms).max())

    def give(self, share: int | Tensor) -> None:
        """Set what the heads may hold: all the same, or `[B, H_kv]` int32 each its own, with `budget` as their mean."""
        if isinstance(share, int):
            self.budget = share
        else:
            self.rooms = share

    @property
    def held(self) -> Slots | None:
        """The slots, in order, wherever they are stored; None before the first token."""
        return self.slots if self.static is None else thaw(self.static)

    @property
    def keys(self) -> Tensor | None:
        """`[B, H_kv, slots, d]`, chronological, rotated to `positions`; None before the first token."""
        return None if self.held is None else self.held.keys

    @property
    def values(self) -> Tensor | None:
        """`[B, H_kv, slots, d_v]`, chronological; None before the first token."""
        return None if self.held is None else self.held.values

    @property
    def positions(self) -> Tensor | None:
        """`[B, H_kv, slots]` int32: index of the slot's token in its row's text; -1 where empty."""
        return None if self.held is None else self.held.positions

    @property
    def cardinality(self) -> Tensor | None:
        """`[B, H_kv, slots]` int32: tokens a slot stands for; 0 where empty."""
        return None if self.held is None else self.held.cardinality

    @property
    def waiting(self) -> bool:
        """Whether tokens have arrived that no query has attended to yet."""
        return self._arrived is not None

    @property
    def active(self) -> bool:
        """Whether this layer is held to a budget now."""
        return self.budget is not None and not self.frozen

    @property
    def nbytes(self) -> int:
        """Bytes held, side vectors and the observation window included."""
        others = (*(self.window or ()), *(() if self.rooms is None else (self.rooms,)))
        slots = self._slots if self.static is None else self.static
        return sum(x.numel() * x.element_size() for x in others) + (0 if slots is None else slots.nbytes)

    @property
    def fallbacks(self) -> Tensor | None:
        """`[B]` int64 on the CPU: how often a head fell back to plain eviction.

        None before the first token, and for methods that count no `"fallbacks"` in their slots' state.
        """
        held = self.held
        counted = {} if held is None else {**self.method.initial_state(held), **held.state}
        return counted["fallbacks"].sum(dim=1).long().cpu() if "fallbacks" in counted else None

    # --- one forward pass ------------------------------------------------------------------------------------------

    def plan(self, prompt: int) -> None:
        """Fix the budget, now that the prompt's length is known, and check it.

        Raises:
            ValueError: the budget leaves the method no room.
        """
        if self.budget is None and self.share is not None and not self.method.unlimited:
            mean = slots_of(self.share, prompt)
            self.method = self.method.resolve(mean)
            self.method.check(mean)
            self.budget = self.method.layer_budget(mean, self.layer, self.layers)

    def attend(
        self, module: nn.Module, query: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> Tensor:
        """Attend to the slots and the new tokens, then compress.

        Args:
            module: the model's attention layer, which says whose cache this is.
            query: `[B, H_q, n, d]`, post-RoPE.
            mask: `[B, 1, n, n]` bool over the new tokens, or None when nothing is padding.
            scale: factor on the logits.
            softcap: cap on the logits, or None.

        Returns:
            `[B, H_q, n, d_v]`.
        """
        keys, values = self._arrived
        self._arrived = None
        if self.record is not None:
            self.record.append(Pass(module, keys, values, query, mask, scale, softcap))
        before = self.slots
        if before is None:
            self.cache().check_model(module)
            self.module = weakref.ref(module)
            self.cache().plan(query.shape[2])
        new, positions = self._new_slots(keys, values, mask)
        slots = new if before is None else before.append(new)
        step = self._step(query, positions, scale, softcap, keys.shape[1])
        if self.probe is not None:
            return self.probe.attend(self, slots, step)
        step = self._remember(step)
        statistics = self.method.statistics if self.active else ()
        keep = self.active and self.method.observes and query.shape[2] > 1
        out, found, view = look(step, slots, statistics, keep)
        step = dataclasses.replace(step, view=view)
        self.seen += query.shape[2]
        arrived = query.shape[2] if mask is None else (positions >= 0).sum(dim=1).to(torch.int32)
        self.row_tokens = self.row_tokens + arrived
        self._since += query.shape[2]
        self.is_initialized = True
        self._settle(self.method.accumulate(slots, found, step) if self.active else slots, step)
        return out.flatten(1, 2)

    def _settle(self, slots: Slots, step: Step) -> None:
        """Store the slots, compressed if it is due."""
        arrived = step.queries.shape[3]
        if self.active and self.method.due(self.fill(slots), self.budget, arrived, self._since):
            self.cache().settle(self, slots, step)
        else:
            self.slots = slots

    def compress(self, slots: Slots, step: Step) -> None:
        """Store the slots, brought to the budget."""
        left = self.method.compress(slots, self.budget, step)
        self._since = 0
        # What comes flat was counted by the method; asking a GPU again would make the host wait.
        if self.method.bounded and isinstance(left, Slots) and self.fill(left) > self.budget:
            raise RuntimeError(f"{self.method.name} left {self.fill(left)} slots with a budget of {self.budget}")
        self.slots = left

    def _new_slots(self, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Slots, Tensor]:
        """Slots for the tokens that arrived, and the query positions `[B, n]` (-1 for padding)."""
        b, h, n, _ = keys.shape
        if self.row_tokens is None:
            self.row_tokens = torch.zeros(b, dtype=torch.int32, device=keys.device)
        if mask is None:
            positions = self.row_tokens[:, None] + torch.arange(n, dtype=torch.int32, device=keys.device)
        else:
            valid = _new_tokens(mask, b, n)
            counted = self.row_tokens[:, None] + valid.cumsum(dim=1).to(torch.int32)
            positions = (counted - 1).masked_fill(~valid, -1)
        spread = positions[:, None].expand(b, h, n).contiguous()
        names = self.method.accumulates if self.active else ()
        new = Slots(
            keys=keys,
            values=values,
            positions=spread,
            cardinality=torch.ones_like(spread) if mask is None else (spread >= 0).to(torch.int32),
            stats={name: torch.zeros_like(spread, dtype=torch.float32) for name in names},
            ragged=mask is not None,
        )
        return new, positions

    def _step(self, query: Tensor, positions: Tensor, scale: float, softcap: float | None, heads: int) -> Step:
        """What a method sees of this pass."""
        b, hq, n, d = query.shape
        return Step(
            queries=query.reshape(b, heads, hq // heads, n, d),
            query_positions=positions,
            scale=scale,
            softcap=softcap,
            positions=self.method.positions,
            cardinality_bias=self.method.cardinality_bias,
            rotation=self.rotation,
            layer=self.layer,
            layers=self.layers,
            budget=self.budget or 0,
            rooms=self.rooms,
        )

    @property
    def width(self) -> int:
        """Queries of the observation window; 0 without one."""
        return self.method.window_of(self.budget) if self.active else 0

    def _remember(self, step: Step) -> Step:
        """Move the observation window on by a pass's queries, and let the pass show it."""
        width = self.width
        if width == 0:
            return step
        queries, places = step.queries, step.query_positions
        if self.window is not None:
            queries = torch.cat([self.window[0], queries], dim=3)
            places = torch.cat([self.window[1], places], dim=1)
        self.window = (queries[:, :, :, -width:].clone(), places[:, -width:].clone())
        return dataclasses.replace(step, window_queries=self.window[0], window_positions=self.window[1])


@dataclass(frozen=True)
class Pass:
    """What one forward pass hands to one layer; see `CompressedLayer.update` and `attend` for the shapes."""

    module: nn.Module
    keys: Tensor
    values: Tensor
    query: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None


class GradientProbe:
    """A pass that stores nothing: it takes the loss's gradient by a layer's cached keys (AsymKV).

    The keys enter as leaves before rotary embedding; `compress` uses their gradients once the loss has been
    differentiated.
    """

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.leaf: Tensor | None = None
        self._slots: Slots | None = None
        self._step: Step | None = None

    def attend(self, layer: CompressedLayer, slots: Slots, step: Step) -> Tensor:
        """Attention output `[B, H_q, n, d_v]`, differentiable by `leaf`."""
        past = layer.slots.size
        wide = slots.keys.to(torch.promote_types(slots.keys.dtype, torch.float32))
        plain = layer.rotation.rotate(wide[:, :, :past], -slots.positions[:, :, :past])
        self.leaf = plain.detach().requires_grad_()
        turned = layer.rotation.rotate(self.leaf, slots.positions[:, :, :past]).to(slots.keys.dtype)
        live = dataclasses.replace(slots, keys=torch.cat([turned, slots.keys[:, :, past:]], dim=2))
        self._slots = slots.map(torch.Tensor.detach)
        self._step = dataclasses.replace(step, queries=step.queries.detach())
        out, _ = attend(step, live, ())
        return out.flatten(1, 2)

    def compress(self, layer: CompressedLayer, gradient: Tensor) -> None:
        """Merge the past so that it and the pass's n tokens fit the budget; the n tokens are read again afterwards."""
        n = self._step.queries.shape[3]
        gradients = torch.nn.functional.pad(gradient, (0, 0, 0, n))
        step = dataclasses.replace(self._step, gradients=gradients)
        method = dataclasses.replace(layer.method, sinks=layer.method.sinks_of(layer.budget), recent=n)
        slots = method.compress(self._slots, layer.budget, step)
        past = torch.arange(slots.size - n, device=gradient.device)
        layer.slots = slots.map(lambda x: x.index_select(2, past) if x.dim() > 2 else x)


class SecondReading:
    """A pass that stores nothing: it reads the tokens that a layer overflowed with again, behind all that it holds.

    The layer then compresses, with these queries beside those of the first pass. Later layers still get what the
    uncompressed slots gave.
    """

    def __init__(self, first: Step | None) -> None:
        """`first` is the pass that made the layer overflow; None for a layer that did not."""
        self._first = first

    def attend(self, layer: CompressedLayer, slots: Slots, step: Step) -> Tensor:
        """Attention output `[B, H_q, n, d_v]`."""
        out, _ = attend(step, slots, ())
        first, self._first = self._first, None  # a layer's queries are let go before the next layer's
        if first is not None:
            layer.cache().settle(layer, layer.slots, dataclasses.replace(first, again=step))
        return out.flatten(1, 2)


class CompressedCache(Cache):
    """A cache for `model.generate(..., past_key_values=cache)` that holds every layer to a budget.

    Attributes:
        layers: one `CompressedLayer` a full-attention layer; sliding-window layers stay as transformers makes them.
        method: the method, with its options.
    """

    def __init__(
        self, config: PretrainedConfig, method: Method, budget: int | float | None, rotation: Rotation | None
    ) -> None:
        """Use `make_cache`, which checks the model and the budget."""
        plain = DynamicCache(config=config).layers
        full = [i for i, layer in enumerate(plain) if type(layer) is DynamicLayer]
        order = {index: place for place, index in enumerate(full)}
        layers = [
            CompressedLayer(method, budget, order[i], len(full), rotation) if i in order else layer
            for i, layer in enumerate(plain)
        ]
        super().__init__(layers=layers)
        self.method = method
        self.budget = budget
        self.split = False
        self._config = config
        self._waiting: list[tuple[CompressedLayer, Step]] = []
        self._postpones = False
        for layer in self.compressed:
            layer.cache = weakref.ref(self)

    @property
    def compressed(self) -> list[CompressedLayer]:
        """The layers that are compressed."""
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes really held by all layers, side vectors included."""
        return sum(layer.nbytes if isinstance(layer, CompressedLayer) else _plain_bytes(layer) for layer in self.layers)

    @property
    def fallbacks(self) -> Tensor | None:
        """`[B]` int64: how often a head of any layer fell back to plain eviction; None where that is not counted."""
        counts = [layer.fallbacks for layer in self.compressed]
        return None if any(count is None for count in counts) else torch.stack(counts).sum(dim=0)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values to a layer.

        Raises:
            ValueError: the model has more layers than the one the cache was made for.
            RuntimeError: the model is not prepared.
        """
        if layer_idx >= len(self.layers):
            raise ValueError(self._other_model())
        before = self.layers[layer_idx - 1]
        if layer_idx > 0 and isinstance(before, CompressedLayer) and before.waiting:
            raise RuntimeError(_UNREACHED)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def plan(self, prompt: int) -> None:
        """Fix all budgets for a prompt of `prompt` tokens; a share of the prompt becomes a number of slots.

        Raises:
            ValueError: the budget leaves the method no room.
        """
        for layer in self.compressed:
            layer.plan(prompt)

    def check_model(self, module: nn.Module) -> None:
        """Check that an attention layer belongs to the model the cache was made for.

        Raises:
            ValueError: it does not.
        """
        config = module.config.get_text_config(decoder=True)
        if config is not self._config and _shape(config) != _shape(self._config):
            raise ValueError(self._other_model())

    def _other_model(self) -> str:
        """The error for a cache in the wrong model."""
        return (
            f"this cache was made for another model ({_shape(self._config)}); "
            "make one for this model with kvrepro.make_cache(model, method, budget)"
        )

    def settle(self, layer: CompressedLayer, slots: Slots, step: Step) -> None:
        """Compress a layer that is due, or let it wait: for a second reading (`postponing`), or for all layers."""
        if self._postpones:
            layer.slots = slots
            self._waiting.append((layer, step))
        elif layer.method.shares_at(step.queries.shape[3]) and self._to_share(layer, slots):
            layer.slots = slots
            self.settle_together(layer, step)
        else:
            layer.compress(slots, step)

    def _to_share(self, layer: CompressedLayer, slots: Slots) -> bool:
        """Whether slots are to be shared out now: once, or, among heads, for each row of a batch once it overflows."""
        if not layer.method.shares_heads or layer.rooms is None:
            return not self.split
        equal = torch.stack([(each.rooms == each.budget).all(dim=1).cpu() for each in self.compressed]).all(dim=0)
        overflows = (slots.valid.sum(dim=2) > layer.budget).any(dim=1).cpu()
        return bool((equal & overflows).any())

    @contextmanager
    def postponing(self) -> Iterator[list[tuple[CompressedLayer, Step]]]:
        """Inside, layers that are due wait; yields them, with the pass that made them so."""
        self._postpones = True
        try:
            yield self._waiting
        finally:
            self._postpones, self._waiting = False, []

    @contextmanager
    def probing(self, probes: Sequence[GradientProbe | SecondReading]) -> Iterator[None]:
        """Inside, a pass stores nothing: each compressed layer hands it to its probe, the others forget it."""
        layers, self.layers = (
            self.layers,
            [layer if isinstance(layer, CompressedLayer) else copy.deepcopy(layer) for layer in self.layers],
        )
        for layer, probe in zip(self.compressed, probes, strict=True):
            layer.probe = probe
        try:
            yield
        finally:
            self.layers = layers
            for layer in self.compressed:
                layer.probe = None

    def settle_together(self, layer: CompressedLayer, step: Step) -> None:
        """On a first overflow, once the last layer has attended, let the method share slots out, then compress."""
        self._waiting.append((layer, layer.method.waiting(layer.slots, layer.budget, step)))
        if layer is not [each for each in self.compressed if each.budget is not None][-1]:
            return
        waiting, self._waiting, self.split = self._waiting, [], True
        layers, steps = [each for each, _ in waiting], [its_step for _, its_step in waiting]
        shares = layer.method.split([each.slots for each in layers], steps, layer.budget)
        for each, its_step, share in zip(layers, steps, shares, strict=True):
            slots = each.slots
            each.give(share)
            # Whether any head exceeds a room of its own, only the device knows: the host would wait for each layer.
            if each.rooms is not None or each.fill(slots) > each.budget:
                each.compress(slots, dataclasses.replace(its_step, budget=each.budget, rooms=each.rooms))
            else:
                each.slots = slots

    def freeze(self) -> None:
        """Stop compressing: what comes next is appended. For measuring a prompt that was compressed once."""
        for layer in self.compressed:
            layer.frozen = True

    def record(self) -> list[list[Pass]]:
        """Note the arguments of each pass from now on; returns the notes, a list for each compressed layer."""
        for layer in self.compressed:
            layer.record = []
        return [layer.record for layer in self.compressed]

    def replay(self, passes: list[list[Pass]]) -> None:
        """Fill this cache from another's recorded passes instead of running the model.

        Right when what a layer is handed does not depend on the method: a prompt read in one pass.

        Raises:
            ValueError: some layers are not compressed layers (sliding windows), several passes were recorded, or the
                method takes more of the model than one pass.
        """
        if not self.method.replayable:
            raise ValueError(
                f"{self.method.name}, with the options it has here, takes more of the model than one pass over a "
                "prompt: read the prompt with kvrepro.prefill instead"
            )
        if len(passes) != len(self.layers) or any(len(notes) != 1 for notes in passes):
            raise ValueError(
                "only a prompt read in one pass, by a model whose layers are all compressed, can be replayed"
            )
        for layer, (note,) in zip(self.compressed, passes, strict=True):
            layer.update(note.keys, note.values)
            layer.attend(note.module, note.query, note.mask, note.scale, note.softcap)

    def reset(self) -> None:
        """Forget everything; the cache can then serve another prompt."""
        super().reset()
        self.split, self._waiting, self._postpones = False, [], False


def make_cache(
    model: PreTrainedModel, method: str, budget: int | float | None = None, **options: Any
) -> CompressedCache:
    """A compressed cache for a model: pass it to `model.generate(..., past_key_values=cache)`.

    Args:
        model: a decoder; it is prepared if it was not (see `prepare`).
        method: one of `kvrepro.methods.names()`.
        budget: slots per KV head and layer, sinks and recent tokens included, their mean where the method gives layers
            or heads different numbers; a float in (0, 1] is a share of the prompt; None is unlimited.
        **options: the method's options, see `kvrepro.methods.describe(method)`.

    Returns:
        An empty cache. One cache serves one prompt or one batch of prompts. A share is taken of the first pass the
        cache sees; `prefill` tells it the whole prompt's length, and `cache.plan(length)` does where you feed pieces.

    Raises:
        ValueError: unknown method, option or value; a budget that leaves no room; a model that cannot be served.
    """
    chosen = methods.create(method, **options)
    _check_budget(budget)
    if isinstance(budget, int) and not chosen.unlimited:
        chosen.resolve(budget).check(budget)
    if not isinstance(model, PreTrainedModel) or not is_prepared(model):
        prepare(model)
    config = model.config.get_text_config(decoder=True)
    rotation = None
    if chosen.positions != "original" or chosen.needs_rotation:
        rotation = find_rotation(model, "full_attention")
    cache = CompressedCache(config, chosen, budget, rotation)
    if not cache.compressed:
        raise ValueError(f"{type(model).__name__} has only sliding-window layers here: there is nothing to compress")
    return cache


def slots_of(budget: int | float, prompt: int) -> int:
    """Slots a head for a budget given as slots or as a share of a prompt of `prompt` tokens (rounded up)."""
    return budget if isinstance(budget, int) else math.ceil(budget * prompt)


def _check_budget(budget: int | float | None) -> None:
    """Raise `ValueError` unless the budget is None, a positive int, or a float in (0, 1]."""
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(f"budget={budget!r} is not valid; give slots (int), a share of the prompt (float), or None")
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"budget={budget} is not valid; give at least 1 slot, or None for unlimited")
    if isinstance(budget, float) and not 0.0 < budget <= 1.0:
        raise ValueError(f"budget={budget} is not valid; a share of the prompt is above 0 and at most 1")


def _new_tokens(mask: Tensor, b: int, n: int) -> Tensor:
    """`[B, n]` bool: which of the new tokens are text, from the mask of the last query.

    Raises:
        ValueError: a mask that this module did not make.
    """
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[-2:] != (n, n):
        raise ValueError(
            "a compressed cache takes a 2D attention_mask [batch, tokens] that marks padding, not a custom mask"
        )
    return mask[:, 0, -1].expand(b, n)


def _shape(config: PretrainedConfig) -> dict[str, Any]:
    """What a cache depends on of a model."""
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    return {name: getattr(config, name, None) for name in names}


def _plain_bytes(layer: CacheLayerMixin) -> int:
    """Bytes held by one of transformers' own layers."""
    return sum(x.numel() * x.element_size() for x in (layer.keys, layer.values) if x is not None)
