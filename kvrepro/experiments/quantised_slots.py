"""More slots in fewer bits, or fewer slots in the model's own type: fidelity at the same bytes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from kvrepro import evaluate
from kvrepro.cache import CompressedCache, CompressedLayer, Pass, make_cache
from kvrepro.experiments import across
from kvrepro.experiments.common import Bench, as_list, parse_variants
from kvrepro.quantised import BITS, QuantisedLayer, quantise
from kvrepro.records import Cell, Record, Skip, Value

PAPER = "across"
#: Bits of the model's own type, as bytes are counted here whatever type the model runs in.
UNQUANTISED = 16


def same_bytes(
    text: str,
    method: str | Sequence[str],
    bits: int | Sequence[int],
    share: float | Sequence[float],
    context: int,
    continuation: int,
    n: int,
    *,
    group: int | None = None,
    residual: int = 0,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> list[Record]:
    """Fidelity of caches that hold the same number of bytes, their slots in the model's type or quantised.

    The context is read in one pass, compressed once and packed; its continuation is predicted, teacher-forced, in one
    pass over what is held, and is not packed itself. Bytes are counted for a model in a 16-bit type: where it runs in
    float32, as on a CPU, its unquantised numbers count 2 bytes, not 4; codes, scales, zeros, positions, counts and side
    vectors count what they take. A budget is the largest that does not exceed ``share`` of the bytes of the full
    cache's keys and values, and never more slots than tokens.

    Args:
        text: Named text.
        method: Methods or variants, see :class:`kvrepro.experiments.common.Variant`.
        bits: Any of 16 (not quantised), 8 and 4.
        share: Shares of the full cache's bytes, in (0, 1).
        context: Tokens that are compressed.
        continuation: Tokens that are predicted.
        n: Passages, from different documents where there are enough.
        group: See :func:`kvrepro.quantise`.
        residual: See :func:`kvrepro.quantise`.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.
        seed: Seed of the methods that draw at random.

    Returns:
        One record a method, number of bits and share, see :func:`_same_bytes`.

    Raises:
        ValueError: Bits that are not valid, a share outside (0, 1), a method that reads its context in chunks, or a
            text that is too short.
    """
    shares, widths, variants = as_list(share), as_list(bits), parse_variants(method)
    if not all(0 < s < 1 for s in shares):
        raise ValueError(f"shares of the full cache's bytes lie between 0 and 1, not {shares}")
    if wrong := [b for b in widths if b not in (UNQUANTISED, *BITS)]:
        raise ValueError(f"bits={wrong} are not valid; choose of {[UNQUANTISED, *BITS]}")
    bench = Bench(PAPER, "quantised", model, device, dtype)
    bench.windows(text, context + continuation, n)  # too short a text is an error before anything runs
    jobs = []
    for variant in variants:
        for s in shares:
            for b in widths:
                params = {"share": s, "bits": b, "context": context, "continuation": continuation, "passages": n}
                params |= {"group": group, "residual": residual}
                cell = bench.cell(
                    "KL(full || compressed)", "nats/token", method=variant, data=text, seed=seed, **params
                )
                if cell.options.get("fisher") == "loss":
                    raise ValueError(f"{variant.label} reads its context in chunks; take asymkv(fisher='forward') here")
                if cell.options.get("queries") == "repeat":
                    raise ValueError(f"{variant.label} reads its context twice; take queries='prompt' here")
                jobs.append((cell, partial(_same_bytes, bench, cell)))
    return bench.sweep(jobs)


@torch.no_grad()
def _same_bytes(bench: Bench, cell: Cell) -> Value:
    """KL divergence per token of one method at one number of bits and bytes.

    Returns:
        The mean over tokens and passages, its spread the standard error over passages; ``extra`` holds per passage
        ``kl``, ``nll`` and ``nll_full`` (means over tokens, nats), and ``slots`` (the budget), ``nbytes``, ``target``
        and ``whole`` (bytes held by, allowed to, and of the full cache of all passages together); where the method
        counts them, also :func:`kvrepro.experiments.across.fallbacks`.

    Raises:
        Skip: The model has layers that are no compressed layers, or the bytes are too few.
    """
    model, _ = bench.load()
    p = cell.params
    ids = bench.windows(cell.data, p["context"] + p["continuation"], p["passages"])
    reference = across.shared_reference(bench, cell.data, p["context"], p["continuation"], p["passages"])
    if not reference.replayable:
        raise Skip("this takes models whose layers all have full attention, such as Llama or Qwen")
    whole = sum(2 * (x.keys.numel() + x.values.numel()) for notes in reference.passes for x in notes)
    target = math.floor(p["share"] * whole)
    slots = _largest_budget(model, cell, reference.passes, target)
    cache = _cache(model, cell, slots)
    cache.plan(p["context"])
    cache.replay(reference.passes)
    nbytes = sum(_bytes(layer) for layer in cache.compressed)
    if nbytes > target:
        raise Skip(f"{slots} slots should fit into {target:,} bytes and take {nbytes:,}: layers differ in size")
    found = evaluate.continued(model, ids, cache, reference)
    kl, nll, nll_full = (x.double().mean(1) for x in (found.kl, found.nll, found.nll_full))  # [n]
    error = float(kl.std()) / len(kl) ** 0.5 if len(kl) > 1 else None
    extra = {"kl": kl, "nll": nll, "nll_full": nll_full, "slots": slots, "nbytes": nbytes, "target": target}
    return Value(float(kl.mean()), error, len(kl), extra | {"whole": whole} | across.fallbacks(found, reference))


def _cache(model: PreTrainedModel, cell: Cell, slots: int) -> CompressedCache:
    """An empty cache of the cell's method and bits."""
    cache = make_cache(model, cell.method, slots, **cell.options)
    if cell.params["bits"] == UNQUANTISED:
        return cache
    return quantise(cache, cell.params["bits"], group=cell.params["group"], residual=cell.params["residual"])


def _bytes(layer: CompressedLayer) -> int:
    """Bytes that a layer holds if each number in the model's own type takes 2."""
    own = [*layer.newest] if isinstance(layer, QuantisedLayer) else [layer.slots.keys, layer.slots.values]
    own += [] if layer.window is None else [layer.window[0]]
    return layer.nbytes - sum(x.numel() * (x.element_size() - UNQUANTISED // 8) for x in own)


def _largest_budget(model: PreTrainedModel, cell: Cell, passes: list[list[Pass]], target: int) -> int:
    """Slots per head and layer that fit into ``target`` bytes, by what one layer holds; at most the context's tokens.

    Raises:
        Skip: The bytes hold no more than the slots that stay unpacked.
    """

    def taken(slots: int) -> int:
        """Bytes of all layers; 0 for a budget that is too small for the method, which says so if none is left."""
        try:
            return len(passes) * _layer_bytes(model, cell, passes, slots)
        except ValueError:
            return 0

    budgets = range(cell.params["residual"] + 1, cell.params["context"] + 1)
    fit = bisect_right(budgets, target, key=taken)
    if fit == 0:
        raise Skip(f"{target:,} bytes hold no more than the {cell.params['residual']} slots that stay unpacked")
    return budgets[fit - 1]


def _layer_bytes(model: PreTrainedModel, cell: Cell, passes: list[list[Pass]], slots: int) -> int:
    """Bytes that the middle layer holds with a budget of ``slots`` after the context."""
    cache = _cache(model, cell, slots)
    cache.plan(cell.params["context"])
    layer, (note,) = cache.compressed[len(passes) // 2], passes[len(passes) // 2]
    layer.update(note.keys, note.values)
    layer.attend(note.module, note.query, note.mask, note.scale, note.softcap)
    return _bytes(layer)
