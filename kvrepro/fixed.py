"""Fixed storage for whole passes: the same tensors before and after, so that a CUDA graph can hold the pass."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvrepro import kernels
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
    """Whether reading one more chunk is worth capturing: on a GPU, if it is the work of the one before."""
    return model.device.type == "cuda" and full_and_steady(cache, chunk) and not on_several_devices(model)


def on_several_devices(model: PreTrainedModel) -> bool:
    """Whether a model's weights lie on several devices: no CUDA graph holds a pass through it."""
    return len({weight.device for weight in model.parameters()}) > 1


def full_and_steady(cache: CompressedCache, chunk: int) -> bool:
    """Whether reading one more chunk of text is the work of the one before, launch for launch."""
    layers = cache.compressed
    if len(layers) != len(cache.layers) or cache.method.shares_layers:
        return False
    return all(
        layer.active
        and layer.record is None
        and layer.slots is not None
        and layer.slots.size == layer.budget
        and not layer.slots.ragged
        and layer.method.steady(layer.budget, chunk)
        for layer in layers
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
        self._read = read
        self._tokens = part.clone()
        self._fixed = [FixedLayer(layer) for layer in self._layers]
        self._logits: Tensor | None = None
        with self._counted(0):
            self._replay = capture(self._once, part.device)

    def _once(self) -> None:
        """Read the tokens that lie there; in a capture this is what is captured."""
        places = torch.arange(self._tokens.shape[1], device=self._tokens.device) + self._layers[0].row_tokens[:, None]
        with unmasked():
            self._logits = self._read(self._tokens, places.long())
        for layer in self._fixed:
            layer.copy_back()

    @contextmanager
    def _counted(self, tokens: int) -> Iterator[None]:
        """Inside, a chunk is read or captured; afterwards the layers have seen `tokens` more than before."""
        before = [(layer.seen, layer._since) for layer in self._layers]
        yield
        for layer, (seen, since) in zip(self._layers, before, strict=True):
            layer.seen, layer._since = seen + tokens, since

    def __call__(self, part: Tensor) -> Tensor:
        """Read the next chunk `[B, chunk]`; returns its logits."""
        self._tokens.copy_(part)
        with self._counted(part.shape[1]):
            self._replay()
        return self._logits.clone()


def capture(body: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What does the body's work again: a CUDA graph's replay, or on other devices the body itself."""
    if device.type != "cuda":
        return body
    graph = torch.cuda.CUDAGraph()
    with kernels.on(device), torch.cuda.graph(graph, stream=_stream(device)):
        body()
    return graph.replay


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where a GPU's graphs are captured: PyTorch's own stream for it lies on the GPU of the process's first capture."""
    return torch.cuda.Stream(device)
