"""The most memory that a computation holds at one time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

T = TypeVar("T")


class _Watch(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live.

    Attributes:
        peak: the most bytes alive at one time.
    """

    def __init__(self) -> None:
        """Nothing alive yet."""
        super().__init__()
        self.peak = 0
        self._now = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        """Run the operation and note the storages it made."""
        known = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            return
        self._live[key] = storage.nbytes()
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self._now -= self._live.pop(key)


def peak_bytes(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Run a computation and say how many bytes its tensors held at the most.

    What was allocated before (the weights) is not counted. On a GPU the allocator knows; on a CPU every operation's
    results are watched until they are let go, which counts neither the workspace inside an operation nor what the
    allocator keeps for later.

    Args:
        run: The computation.
        device: Where it runs.

    Returns:
        Its result, and the bytes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _Watch() as watch:
        result = run()
    return result, watch.peak
