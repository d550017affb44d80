"""All methods on the same text at the same bytes: how far the predictions move from the full cache's, and the time.

Quality, bytes and time together say which methods are worth having: those that no other one beats in all three.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvrepro import evaluate
from kvrepro.cache import make_cache
from kvrepro.experiments.common import Bench, as_list, parse_variants
from kvrepro.models import resolve_device
from kvrepro.provenance import device_name
from kvrepro.records import Cell, Record, Skip, Value

PAPER = "across"


def same_bytes(
    text: str,
    method: str | Sequence[str],
    share: float | Sequence[float],
    context: int,
    continuation: int,
    n: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> list[Record]:
    """Fidelity of methods that hold the same number of bytes.

    The context is read in one pass and compressed once; its continuation is predicted, teacher-forced, in one pass over
    the compressed cache (see :func:`kvrepro.fidelity`, whose numbers these are). A method's budget is the largest whose
    ``cache.nbytes`` (side vectors and observation windows included) does not exceed ``share`` of the bytes of
    transformers' own full cache, which holds keys and values only.

    Args:
        text: Named text.
        method: Methods or variants, see :class:`kvrepro.experiments.common.Variant`.
        share: Shares of the full cache's bytes, in (0, 1).
        context: Tokens that are compressed.
        continuation: Tokens that are predicted.
        n: Passages, from different documents where there are enough.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.
        seed: Seed of the methods that draw at random.

    Returns:
        One record a method and share, see :func:`_same_bytes`.

    Raises:
        ValueError: A share outside (0, 1), or a text that is too short.
    """
    shares = as_list(share)
    if not all(0 < s < 1 for s in shares):
        raise ValueError(f"shares of the full cache's bytes lie between 0 and 1, not {shares}")
    bench = Bench(PAPER, "same_bytes", model, device, dtype)
    bench.windows(text, context + continuation, n)  # too short a text is an error before anything runs
    jobs = []
    for variant in parse_variants(method):
        for s in shares:
            params = {"share": s, "context": context, "continuation": continuation, "passages": n}
            cell = bench.cell("KL(full || compressed)", "nats/token", method=variant, data=text, seed=seed, **params)
            jobs.append((cell, partial(_same_bytes, bench, cell)))
    return bench.sweep(jobs)


def _same_bytes(bench: Bench, cell: Cell) -> Value:
    """KL divergence per token of one method at one number of bytes.

    Returns:
        The mean over tokens and passages, its spread the standard error over passages; ``extra`` holds per passage
        ``kl``, ``nll`` and ``nll_full`` (means over tokens, nats), and ``slots`` (the budget), ``nbytes``, ``target``
        and ``whole`` (bytes held by, allowed to, and of the full cache of all passages together); where the method
        counts them, also :func:`fallbacks`; where it shares slots out among heads, ``rooms`` [layers, H_kv], those
        that each one got, the mean over passages.

    Raises:
        Skip: The model has layers that are no compressed layers, or layers that differ in size.
    """
    model, _ = bench.load()
    p = cell.params
    ids = bench.windows(cell.data, p["context"] + p["continuation"], p["passages"])
    reference = shared_reference(bench, cell.data, p["context"], p["continuation"], p["passages"])
    if not reference.replayable:
        raise Skip("same_bytes takes models whose layers all have full attention, such as Llama or Qwen")
    notes = [note for layer in reference.passes for note in layer]
    whole = sum(x.numel() * x.element_size() for note in notes for x in (note.keys, note.values))
    target = math.floor(p["share"] * whole)
    slots = largest_budget(model, cell.method, cell.options, reference, target)
    sizes = {"context": p["context"], "continuation": p["continuation"]}
    found = evaluate.fidelity(model, ids, cell.method, slots, reference=reference, **sizes, **cell.options)
    if found.nbytes > target:
        raise Skip(f"{slots} slots should fit into {target:,} bytes and take {found.nbytes:,}: layers differ in size")
    kl, nll, nll_full = (x.double().mean(1) for x in (found.kl, found.nll, found.nll_full))  # [n]
    error = float(kl.std()) / len(kl) ** 0.5 if len(kl) > 1 else None
    extra = {"kl": kl, "nll": nll, "nll_full": nll_full, "slots": slots, "nbytes": found.nbytes, "target": target}
    extra |= {"whole": whole} | fallbacks(found, reference)
    if found.rooms is not None:
        extra["rooms"] = found.rooms.double().mean(0)
    return Value(float(kl.mean()), error, len(kl), extra)


def fallbacks(found: evaluate.Fidelity, reference: evaluate.Reference) -> dict[str, Any]:
    """What a record says of heads that fell back to plain eviction; nothing for methods that do not count them.

    Returns:
        ``fallbacks``, per passage the number of heads that did, and ``heads``, the KV heads of all layers.
    """
    if found.fallbacks is None:
        return {}
    return {"fallbacks": found.fallbacks, "heads": sum(note.keys.shape[1] for (note,) in reference.passes)}


@lru_cache(maxsize=1)
def shared_reference(bench: Bench, text: str, context: int, continuation: int, n: int) -> evaluate.Reference:
    """The passages read with the full cache, once for all methods and budgets (the last reading is kept).

    Args:
        bench: The experiment.
        text: Named text.
        context: Tokens that are compressed.
        continuation: Tokens that are predicted.
        n: Passages.
    """
    model, _ = bench.load()
    ids = bench.windows(text, context + continuation, n)
    return evaluate.full_reference(model, ids, context=context, continuation=continuation)


@torch.no_grad()
def largest_budget(
    model: PreTrainedModel, method: str, options: Mapping[str, Any], reference: evaluate.Reference, target: int
) -> int:
    """The slots per head and layer that fit into a number of bytes, from what one layer holds of the whole context.

    Args:
        model: A prepared model.
        method: The method.
        options: Its options.
        reference: A text read with the full cache.
        target: Bytes that the compressed layers may hold.

    Returns:
        At least 1 and at most twice the context's tokens, which a pyramid's mean may exceed.

    Raises:
        ValueError: As many slots as the context has tokens leave the method no room.
    """
    layers = len(reference.passes)
    note = reference.passes[layers // 2][0]
    rows, heads, context, _ = note.keys.shape
    cache = make_cache(model, method, context, **options)  # nothing has to leave, whatever that would take
    cache.plan(context)
    layer = cache.compressed[layers // 2]
    layer.update(note.keys, note.values)
    layer.attend(note.module, note.query, note.mask, note.scale, note.softcap)
    state = sum(x.numel() * x.element_size() for x in layer.slots.state.values())
    per_slot = (layer.slots.nbytes - state) / layer.slots.size
    per_query = (layer.nbytes - layer.slots.nbytes) / max(1, layer.method.window_of(layer.budget or 0))

    def needed(budget: int) -> float:
        """Bytes of all layers.

        A running threshold or count, 4 bytes a head, may join the slots in later passes, and where slots are shared
        out, how many a head may hold and holds.
        """
        resolved = cache.method.resolve(budget)
        sizes = [resolved.layer_budget(budget, each, layers) for each in range(layers)]
        slots = sum(context if size is None else min(size, context) for size in sizes)
        numbers = 3 if resolved.shares_heads else 1
        return slots * per_slot + layers * (resolved.window_of(budget) * per_query + 4 * numbers * rows * heads)

    budget = 2 * context  # a pyramid's upper layers may have room when its lower ones hold everything
    while budget > 1 and needed(budget) > target:
        budget -= 1
    return budget


def reading_times(
    text: str,
    slots: Mapping[str, int],
    context: int,
    n: int,
    repeats: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> list[Record]:
    """How long it takes to read a context and compress it, by method, beside the full cache on the same machine.

    Args:
        text: Named text.
        slots: Budget of each method or variant.
        context: Tokens that are read, in one pass where the method allows it.
        n: Passages side by side.
        repeats: Times it is timed, after once to warm up.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.
        seed: Seed of the methods that draw at random.

    Returns:
        One record a method, see :func:`_reading_time`.
    """
    bench = Bench(PAPER, "reading_times", model, device, dtype)
    bench.windows(text, context, n)  # too short a text is an error before anything runs
    params = {"hardware": device_name(resolve_device(device)), "context": context, "passages": n, "repeats": repeats}
    jobs = []
    for variant in parse_variants(list(slots)):
        about = {"method": variant, "data": text, "budget": slots[variant.label], "seed": seed, **params}
        cell = bench.cell("prefill time", "of the full cache's", **about)
        jobs.append((cell, partial(_reading_time, bench, cell)))
    return bench.sweep(jobs)


def _reading_time(bench: Bench, cell: Cell) -> Value:
    """Time to read the context and to compress it, as a share of the full cache's.

    The full cache and the method read in turns, so that what else the machine does slows both.

    Returns:
        The median share, its spread the median's standard error (1.25 sigma / sqrt(n)); ``extra["times"]`` and
        ``extra["times_full"]`` [repeats] in seconds.
    """
    model, _ = bench.load()
    ids = bench.windows(cell.data, cell.params["context"], cell.params["passages"]).to(model.device)
    _read_once(model, ids, cell.method, cell.budget, cell.options)
    found = np.array(
        [
            (_read_once(model, ids, "full", None, {}), _read_once(model, ids, cell.method, cell.budget, cell.options))
            for _ in range(cell.params["repeats"])
        ]
    )
    shares = found[:, 1] / found[:, 0]
    error = 1.25 * float(shares.std(ddof=1)) / len(shares) ** 0.5 if len(shares) > 1 else None
    extra = {"times": found[:, 1], "times_full": found[:, 0]}
    return Value(float(np.median(shares)), error, len(shares), extra)


def _read_once(
    model: PreTrainedModel, ids: Tensor, method: str, budget: int | float | None, options: Mapping[str, Any]
) -> float:
    """Seconds to read `ids` ``[n, L]`` into an empty cache."""
    wait = partial(torch.cuda.synchronize, model.device) if model.device.type == "cuda" else lambda: None
    cache = make_cache(model, method, budget, **options)
    wait()
    start = time.perf_counter()
    evaluate.prefill(model, ids, cache)
    wait()
    return time.perf_counter() - start


def pareto_front(costs: np.ndarray, slack: Sequence[float] | float = 0.0) -> np.ndarray:
    """Which points no other point beats.

    One point beats another when it is no worse in every cost and better in at least one. Differences within `slack`
    count as none.

    Args:
        costs: ``[points, costs]``, lower is better, not negative.
        slack: Share of a cost within which two count as equal, one for all costs or ``[costs]``.

    Returns:
        ``[points]`` bool.
    """
    mine, other = costs[:, None, :], costs[None, :, :]  # [points, 1, costs], [1, points, costs]
    margin = np.asarray(slack) * np.maximum(mine, other)
    beaten = (other <= mine + margin).all(-1) & (other < mine - margin).any(-1)  # [points, points]
    return ~beaten.any(1)
