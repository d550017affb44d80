"""Let the compiler fuse what lies between a model's matrix products, while decoding.

Decoder layers are alike: compiled one by one they share what was compiled for the first, which takes seconds where the
whole model takes a minute. The model itself stays as it is: its modules call what was compiled inside `compiled` only.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

#: Settings of the compiler: products of a matrix and one vector become kernels of its own, tuned for this GPU.
OPTIONS = {"coordinate_descent_tuning": True}

_calls: weakref.WeakKeyDictionary[PreTrainedModel, list[tuple[nn.Module, Callable[..., Any]]]] = (
    weakref.WeakKeyDictionary()
)


def regions(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that are compiled: decoder layers, what stands beside them in the decoder, and the output head."""
    names = set(model._no_split_modules or ())
    layers = [m for m in model.modules() if type(m).__name__ in names]
    beside = [m for m in model.base_model.children() if not isinstance(m, nn.ModuleList | nn.Embedding)]
    head = model.get_output_embeddings()
    return [*layers, *beside, *([] if head is None else [head])]


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's regions run compiled; they are compiled when they first do, once a batch size."""
    if model not in _calls:
        _calls[model] = [(m, _compile(m._call_impl)) for m in regions(model)]
    before = [m._compiled_call_impl for m, _ in _calls[model]]
    for module, call in _calls[model]:
        module._compiled_call_impl = call
    try:
        yield
    finally:
        for (module, _), call in zip(_calls[model], before, strict=True):
            module._compiled_call_impl = call


def _compile(call: Callable[..., Any]) -> Callable[..., Any]:
    """Compile one module's call for fixed shapes."""
    return torch.compile(call, dynamic=False, options=OPTIONS)
