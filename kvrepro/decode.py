"""Decoding token by token: slots in fixed storage, the whole step in one CUDA graph.

Plain `model.generate` works with every cache. `generate` here does the same faster: on a GPU a step is captured once
and replayed, so that no time goes to Python and launches. Methods with a `step_rule` work in place; the others run
their `compress`, whose results are copied back into fixed storage. Without a GPU the same steps run one by one.
"""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvrepro.adapter import redirected
from kvrepro.cache import CompressedCache, CompressedLayer
from kvrepro.evaluate import prefill
from kvrepro.methods.base import StepRule
from kvrepro.slots import Slots
from kvrepro.static import freeze_shape, step, thaw

#: Steps that run before the capture: they compile kernels and set up libraries.
_WARM_UP = 2
#: Steps between two looks at whether all rows have ended; a look waits for the GPU.
_LOOK = 16

_compiled: weakref.WeakKeyDictionary[PreTrainedModel, Callable[..., Any]] = weakref.WeakKeyDictionary()


class _InPlace:
    """A layer whose method lets one slot go for each token (`step_rule`)."""

    def __init__(self, layer: CompressedLayer, rule: StepRule, newest: Tensor, room: int) -> None:
        """Move the layer's slots into fixed storage."""
        self.layer = layer
        names = tuple(n for n in ("mass", "count") if n in layer.slots.stats)
        budget = layer.slots.size + room if rule.score == "none" else layer.budget
        rotation = None if layer.method.positions == "original" else layer.rotation
        layer.static = freeze_shape(layer.slots, budget, rule, newest, names, rotation)
        layer.slots = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """`[B, H_q, 1, d]` from one new token a row: query `[B, H_q, 1, d]`, key and value `[B, H_kv, 1, d]`."""
        b, hq, _, d = query.shape
        h = key.shape[1]
        out = step(self.layer.static, query.reshape(b, h, hq // h, d), key.squeeze(2), value.squeeze(2), scale, softcap)
        return out.reshape(b, hq, 1, -1)

    def close(self) -> None:
        """Give the slots back in order."""
        self.layer.slots, self.layer.static = thaw(self.layer.static), None


class _CopiedBack:
    """A layer whose method compresses through pure functions: what they return is copied into fixed storage."""

    def __init__(self, layer: CompressedLayer) -> None:
        """Fix the layer's tensors."""
        self.layer = layer
        if layer.active and layer.slots.size < layer.budget:
            layer.slots = layer.slots.pad(layer.budget)
        layer.slots = layer.slots.map(torch.clone)
        state = {**layer.method.initial_state(layer.slots), **layer.slots.state}
        layer.slots = dataclasses.replace(layer.slots, state=state)
        self.fixed = self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything of the layer that a step replaces."""
        layer = self.layer
        slots = layer.slots
        named = {"keys": slots.keys, "values": slots.values, "positions": slots.positions}
        named |= {"cardinality": slots.cardinality, "tokens": layer.row_tokens}
        named |= {f"stats.{k}": x for k, x in slots.stats.items()} | {f"state.{k}": x for k, x in slots.state.items()}
        return named | {f"window.{i}": x for i, x in enumerate(layer.window or ())}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """As `_InPlace.attend`."""
        layer = self.layer
        layer.update(key, value)
        out = layer.attend(layer.module(), query, None, scale, softcap)
        for name, x in self._tensors().items():
            self.fixed[name].copy_(x)
        self._restore()
        return out

    def _restore(self) -> None:
        """Point the layer at the fixed storage again."""
        layer, fixed = self.layer, self.fixed
        slots = layer.slots
        layer.slots = Slots(
            keys=fixed["keys"],
            values=fixed["values"],
            positions=fixed["positions"],
            cardinality=fixed["cardinality"],
            stats={k: fixed[f"stats.{k}"] for k in slots.stats},
            state={k: fixed[f"state.{k}"] for k in slots.state},
            dense=False,
            ragged=slots.ragged,
        )
        layer.row_tokens = fixed["tokens"]
        if layer.window is not None:
            layer.window = (fixed["window.0"], fixed["window.1"])

    def close(self) -> None:
        """Nothing to give back: the layer holds the fixed storage as its slots."""


class _Plain:
    """A layer that runs as it is, its slots growing and shrinking: not for a captured graph."""

    def __init__(self, layer: CompressedLayer) -> None:
        """Take the layer as it is."""
        self.layer = layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> Tensor:
        """As `_InPlace.attend`."""
        self.layer.update(key, value)
        return self.layer.attend(self.layer.module(), query, None, scale, softcap)

    def close(self) -> None:
        """Nothing to give back."""


class Decoder:
    """Decoding steps of one model over one cache; a context manager that gives the cache back when it is left.

    Attributes:
        graphed: steps are captured in a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, cache: CompressedCache, *, room: int, compile: bool = False) -> None:
        """Fix the storage of a cache that has read its prompt.

        Args:
            model: the model the cache was made for.
            cache: the cache.
            room: steps that will be taken at most; an unlimited cache reserves this many slots.
            compile: also compile the model with `torch.compile`, which fuses what lies between its matrix products;
                takes a minute, once a model and batch size.

        Raises:
            ValueError: an empty cache, or a model with sliding-window layers.
        """
        layers = cache.compressed
        if any(layer.slots is None for layer in layers):
            raise ValueError("the cache is empty: read the prompt first, with kvrepro.prefill")
        if len(layers) != len(cache.layers):
            raise ValueError(f"{type(model).__name__} has sliding-window layers: decode with model.generate")
        self._model = model
        self._layers = layers
        self._room = room
        self._taken = 0
        self._seen = layers[0].seen
        self._newest = layers[0].row_tokens.clone()
        self._mask = torch.ones(self._newest.shape[0], 1, 1, 1, dtype=torch.bool, device=self._newest.device)
        on_gpu = self._newest.is_cuda
        self._held = [_hold(layer, self._newest, room, on_gpu) for layer in layers]
        self.graphed = on_gpu and not any(isinstance(held, _Plain) for held in self._held)
        self._forward = _compile(model) if compile else model.forward
        if on_gpu and not self.graphed:
            warnings.warn(
                f"{layers[0].method.name} as it is set up here holds no constant number of slots: its steps cannot be "
                "captured and run one by one",
                stacklevel=2,
            )

    def __enter__(self) -> Self:
        """The decoder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the slots back to the cache, in order."""
        for held, layer in zip(self._held, self._layers, strict=True):
            held.close()
            layer.seen = self._seen + self._taken
            layer.row_tokens = self._newest.clone()

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """One step: tokens `[B]` in, the next ones' logits `[B, V]` out. For the body of `run`."""
        handlers = {layer.module(): held.attend for layer, held in zip(self._layers, self._held, strict=True)}
        with redirected(handlers):
            output = self._forward(
                input_ids=tokens[:, None],
                position_ids=self._newest[:, None].long(),
                attention_mask=self._mask,
                use_cache=False,
                logits_to_keep=1,
            )
        self._newest += 1
        return output.logits[:, -1]

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
                captured after two calls and replayed, so it must not look at values.
            steps: how many.
            until: asked now and then; True ends the run early.
            progress: called after each step.

        Returns:
            The steps taken.

        Raises:
            ValueError: more steps than there is room for.
        """
        if self._taken + steps > self._room:
            raise ValueError(f"{self._taken} + {steps} steps, but room={self._room}; make the decoder with more room")
        taken = 0
        graph = None
        while taken < steps:
            if graph is None and self.graphed and taken >= _WARM_UP:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    body()
            if graph is None:
                body()
            else:
                graph.replay()
            taken += 1
            self._taken += 1
            if progress is not None:
                progress()
            if until is not None and taken % _LOOK == 0 and until():
                break
        return taken


def _hold(layer: CompressedLayer, newest: Tensor, room: int, on_gpu: bool) -> _InPlace | _CopiedBack | _Plain:
    """The way a layer's steps are taken."""
    method = layer.method
    rule = method.step_rule(layer.budget) if layer.active else StepRule("none")
    if rule is not None and method.positions != "cardinality":
        return _InPlace(layer, rule, newest, room)
    if on_gpu and layer.active and method.bounded and not (method.shares_layers and not layer.cache().split):
        return _CopiedBack(layer)
    return _Plain(layer)


def _compile(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, compiled once."""
    if model not in _compiled:
        _compiled[model] = torch.compile(model.forward, dynamic=False)
    return _compiled[model]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompressedCache,
    max_new_tokens: int,
    *,
    attention_mask: Tensor | None = None,
    chunk: int | None = None,
    eos_token_id: int | None = None,
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
        eos_token_id: the token that ends a row; None writes all tokens. What follows it in a row is the same token.
        temperature: 0 takes the likeliest token; above 0 tokens are drawn from softmax(logits / temperature) with
            PyTorch's default generator of the device.
        compile: see `Decoder`.

    Returns:
        `[B, L + new]`: the prompt and what was written. The cache holds all of it but the last token.

    Raises:
        ValueError: fewer than one new token, a negative temperature, or whatever `prefill` and `Decoder` refuse.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be 1 or more, temperature={temperature} must not be negative"
        )
    input_ids = input_ids.to(model.device)
    logits = prefill(model, input_ids, cache, attention_mask=attention_mask, chunk=chunk).logits[:, -1]
    token = _pick(logits, temperature)
    written = [token.clone()]
    if max_new_tokens > 1:
        written.append(_write(model, cache, token, max_new_tokens - 1, eos_token_id, temperature, compile))
    new = torch.cat([x.view(len(token), -1) for x in written], dim=1)
    return torch.cat([input_ids, new if eos_token_id is None else _trim(new, eos_token_id)], dim=1)


def _write(
    model: PreTrainedModel,
    cache: CompressedCache,
    token: Tensor,
    steps: int,
    eos_token_id: int | None,
    temperature: float,
    compile: bool,
) -> Tensor:
    """`[B, n]`: the tokens after `token` `[B]`, n <= steps."""
    out = torch.zeros(len(token), steps, dtype=token.dtype, device=token.device)
    index = torch.zeros(1, dtype=torch.long, device=token.device)
    ended = torch.zeros_like(token, dtype=torch.bool) if eos_token_id is None else token == eos_token_id

    with Decoder(model, cache, room=steps, compile=compile) as decoder:

        def body() -> None:
            """One token a row."""
            token.copy_(_pick(decoder.logits(token), temperature))
            out.index_copy_(1, index, token[:, None])
            index.add_(1)
            if eos_token_id is not None:
                ended.logical_or_(token == eos_token_id)

        taken = decoder.run(body, steps, until=None if eos_token_id is None else lambda: bool(ended.all()))
    return out[:, :taken]


def _pick(logits: Tensor, temperature: float) -> Tensor:
    """`[B]` tokens from logits `[B, V]`: the likeliest, or a draw."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    p = torch.softmax(logits.float() / temperature, dim=-1)
    # The largest of p / E with E exponential is a draw from p; unlike multinomial it never waits for the GPU.
    return (p / torch.empty_like(p).exponential_(1.0).clamp_min(1e-20)).argmax(dim=-1)


def _trim(new: Tensor, eos: int) -> Tensor:
    """Everything after a row's first `eos` becomes `eos`; columns after all rows have ended are cut off."""
    over = (new == eos).cumsum(dim=1) > 0
    after = torch.cat([torch.zeros_like(over[:, :1]), over[:, :-1]], dim=1)
    length = int((~after).any(dim=0).sum())
    return new.masked_fill(after, eos)[:, :length]
