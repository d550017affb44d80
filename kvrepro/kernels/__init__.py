"""Triton kernels: what they can take, and where the PyTorch code takes over.

A kernel module holds one kernel and the function that launches it. Its twin, the same function in PyTorch, is the code
that calls it: `attention`, `methods`, `static`. `covers` decides between the two, so that nothing has to be switched on
or off: without a GPU or without Triton the twins do everything, and a shape or type that no kernel takes is said once.

Triton launches on the current device, wherever the tensors lie, and a model's layers may lie on several: a function
that launches is decorated with `on_its_device`.

The kernels' tests run in Triton's interpreter (TRITON_INTERPRET=1), which needs no GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

#: Head sizes the kernels are written and tested for.
HEAD_DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

P = ParamSpec("P")
R = TypeVar("R")
_said: set[str] = set()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, kernels are launched and CUDA graphs captured on this device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function that launches kernels do so where its first tensor lies; all of its tensors lie there."""

    @functools.wraps(function)
    def placed(*args: P.args, **kwargs: P.kwargs) -> R:
        with on(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).device):
            return function(*args, **kwargs)

    return placed


def processors(x: Tensor) -> int:
    """Streaming multiprocessors of the device; an H100's number where there is no GPU (the interpreter)."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def covers(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors, `[..., d]` of one head size; what they don't take of a GPU is said once.

    Where a gradient will be taken, PyTorch's code runs as well: the kernels have none.
    """
    if tensors[0].device.type != "cuda" or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return False
    reason = _why_not(tensors)
    if reason and reason not in _said:
        _said.add(reason)
        warnings.warn(f"the Triton kernels do not take {reason}: PyTorch code is used, slower", stacklevel=3)
    return not reason


def _why_not(tensors: tuple[Tensor, ...]) -> str | None:
    """What the kernels do not cover of these tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "any input because Triton is not installed"
    for x in tensors:
        if x.dtype not in DTYPES:
            return f"the type {x.dtype}"
        if x.shape[-1] not in HEAD_DIMS:
            return f"heads of {x.shape[-1]} dimensions (they take {', '.join(map(str, HEAD_DIMS))})"
    if len({x.shape[-1] for x in tensors}) > 1:
        return "keys and values of different head sizes"
    return None
