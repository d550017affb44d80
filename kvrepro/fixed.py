"""Fixed storage for whole passes: the same tensors before and after, so that a CUDA graph can hold the pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvrepro.adapter import unmasked
from kvrepro.cache import CompressedCache, CompressedLayer
from kvrepro.slots import Slots


class FixedLayer:
    """A layer's tensors in fixed storage; what a pass makes of them is copied back into it."""

    def __init__(self, layer: CompressedLayer) -> None:
        """Copy what the layer holds; it has as many slots after each pass as it has now."""
        self._layer = layer
        slots = layer.slots.map(torch.clone)
        layer.slots = dataclasses.replace(slots, state={**layer.method.initial_state(slots), **slots.state})
        layer.row_tokens = layer.row_tokens.clone()
        if layer.window is not None:
            layer.window = tuple(x.clone() for x in layer.window)
        self._fixed = self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything of the layer that a pass replaces."""
        layer = self._layer
        slots = layer.slots
        named = {"keys": slots.keys, "values": slots.values, "positions": slots.positions}
        named |= {"cardinality": slots.cardinality, "tokens": layer.row_tokens}
        named |= {f"stats.{k}": x for k, x in slots.stats.items()} | {f"state.{k}": x for k, x in slots.state.items()}
        return named | {f"window.{i}": x for i, x in enumerate(layer.window or ())}

    def copy_back(self) -> None:
        """Copy what the pass made into the storage, and let the layer hold that."""
        for name, x in self._tensors().items():
            self._fixed[name].copy_(x)
        layer, fixed = self._layer, self._fixed
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


def repeats(model: PreTrainedModel, cache: CompressedCache, chunk: int) -> bool:
    """Whether reading one more chunk of text is the work of the one before, launch for launch."""
    layers = cache.compressed
    method = cache.method
    return (
        model.device.type == "cuda"
        and len(layers) == len(cache.layers)
        and not method.shares_layers
        and all(
            layer.active
            and layer.record is None
            and layer.slots is not None
            and layer.slots.size == layer.budget
            and not layer.slots.ragged
            and layer.method.steady(layer.budget, chunk)
            for layer in layers
        )
    )


class RepeatedChunk:
    """The reading of one chunk by a full cache, captured in a CUDA graph and replayed for each of the next ones.

    Small chunks leave a GPU waiting for Python and launches; a replay does not.
    """

    def __init__(self, cache: CompressedCache, read: Callable[[Tensor, Tensor], Tensor], part: Tensor) -> None:
        """Capture; nothing is read yet.

        Args:
            cache: the cache, for which `repeats` holds, after a chunk of this size was read with it full.
            read: (tokens, position ids), both `[B, chunk]`, to logits; reads them into the cache.
            part: a chunk of tokens `[B, chunk]`.
        """
        self._layers = cache.compressed
        self._chunk = part.shape[1]
        self._tokens = part.clone()
        fixed = [FixedLayer(layer) for layer in self._layers]
        seen = [(layer.seen, layer._since) for layer in self._layers]
        self._graph = torch.cuda.CUDAGraph()
        with unmasked(), torch.cuda.graph(self._graph):
            places = torch.arange(self._chunk, device=part.device) + self._layers[0].row_tokens[:, None]
            self._logits = read(self._tokens, places.long())
            for layer in fixed:
                layer.copy_back()
        for layer, (tokens, since) in zip(self._layers, seen, strict=True):
            layer.seen, layer._since = tokens, since

    def __call__(self, part: Tensor) -> Tensor:
        """Read the next chunk `[B, chunk]`; returns its logits."""
        self._tokens.copy_(part)
        self._graph.replay()
        for layer in self._layers:
            layer.seen += self._chunk
        return self._logits.clone()
