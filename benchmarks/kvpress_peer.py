"""What kvpress takes for the same: run in an environment of its own, because it needs an older transformers.

Needs nothing of kvrepro. ``--version`` prints the versions; ``--request JSON`` measures what it asks for (see
``kvrepro.experiments.speed.kvpress``) and prints one JSON line a press and length.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

# kvpress imports these for presses and downloads that are not measured here; where they are not, it gets empty ones.
_ABSENT = [name for name in ("datasets", "fire") if importlib.util.find_spec(name) is None]
for _name in _ABSENT:
    sys.modules[_name] = ModuleType(_name)
    sys.modules[_name].load_dataset = None  # type: ignore[attr-defined]
from kvpress import ObservedAttentionPress, SnapKVPress, StreamingLLMPress  # noqa: E402

for _name in _ABSENT:
    del sys.modules[_name]

#: Each press, and the attention it asks for.
PRESSES = {
    "snapkv": (SnapKVPress, "sdpa"),
    "observed_attention": (ObservedAttentionPress, "eager"),
    "streaming_llm": (StreamingLLMPress, "sdpa"),
}
#: Steps before the timed ones, by device.
SKIPPED = {"cuda": 8, "cpu": 2}


def versions() -> dict[str, str]:
    """Versions of what is measured."""
    found = {name: metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    return {**found, "python": sys.version.split()[0]}


def load(request: dict[str, Any]) -> PreTrainedModel:
    """The requested shape with random weights."""
    config = AutoConfig.for_model(**request["config"])
    torch.manual_seed(request["seed"])
    with torch.device(request["device"]):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, request["dtype"]))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor, press: Any) -> DynamicCache:
    """Read a prompt ``[1, L]`` and compress it."""
    cache = DynamicCache(config=model.config)
    with press(model):
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def write(model: PreTrainedModel, cache: DynamicCache, seen: int, steps: int) -> list[float]:
    """Seconds of each of ``steps`` greedy steps after a prompt of ``seen`` tokens, without waiting between them."""
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    marks, skipped = [], SKIPPED[model.device.type]
    for step in range(skipped + steps):
        places = torch.tensor([[seen + step]], device=model.device)
        output = model(input_ids=token, past_key_values=cache, position_ids=places, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(dim=-1)
        marks.append(moment(model.device))
    synchronize(model.device)
    return [apart(a, b) for a, b in zip(marks[skipped - 1 :], marks[skipped:], strict=False)]


def moment(device: torch.device) -> Any:
    """A moment in the device's queue."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def apart(a: Any, b: Any) -> float:
    """Seconds between two moments."""
    return b - a if isinstance(a, float) else a.elapsed_time(b) / 1000


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of ``run()``."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def measure(model: PreTrainedModel, name: str, length: int, request: dict[str, Any]) -> dict[str, Any]:
    """Times of reading and writing, the most bytes beside the weights (0 on a CPU), the bytes of the cache."""
    kind, attention = PRESSES[name]
    model.set_attn_implementation(attention)
    press = kind(compression_ratio=request["ratio"])
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(request["seed"])
    ids = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
    on_gpu = model.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    cache = read(model, ids, press)
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    steps = write(model, cache, length, request["steps"])
    del cache
    times = [seconds(lambda: read(model, ids, press), model.device) for _ in range(request["repeats"])]
    return {"times": times, "steps": steps, "peak": peak, "cache": held}


def main() -> None:
    """Answer one request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", action="store_true", help="print the versions and stop")
    parser.add_argument("--request", help="JSON: config, device, dtype, seed, lengths, presses, ratio, repeats, steps")
    given = parser.parse_args()
    if given.version:
        print(json.dumps(versions()))
        return
    request = json.loads(given.request)
    model = load(request)
    for length in request["lengths"]:
        for name in request["presses"]:
            row = {"press": name, "length": length, "versions": versions()}
            try:
                row |= measure(model, name, length, request)
            except torch.OutOfMemoryError as error:
                row |= {"oom": str(error)}
            except (AssertionError, RuntimeError, ValueError) as error:  # such as a prompt shorter than its window
                row |= {"error": f"{type(error).__name__}: {error}"}
            gc.collect()
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
