"""KVMerger's experiments: similarity of keys, merging sets, ablations. The needle in a haystack is in ``needle``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import normalize

import kvrepro
from kvrepro.attention import Step
from kvrepro.evaluate import Reference, full_reference
from kvrepro.experiments.capture import LayerCapture, capture_qkv
from kvrepro.experiments.common import Bench, Variant, as_list, parse_variants
from kvrepro.methods.kvmerger import KVMerger
from kvrepro.records import Record, Value
from kvrepro.slots import Slots

PAPER = "kvmerger"

#: Distances between two tokens at which mean similarities are taken (those below the window's length).
DISTANCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)


def similarity(
    text: str | Sequence[str],
    length: int,
    samples: int,
    layers: int | Sequence[int],
    map_tokens: int,
    tokens: int | Sequence[int],
    reach: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Cosine similarity of post-RoPE keys: maps, neighbours of chosen tokens, mean by distance.

    Args:
        text: Named text or texts.
        length: Tokens a window.
        samples: Windows a text.
        layers: Layers whose maps are recorded; negative counts from the last.
        map_tokens: Tokens of a map, the last ones of the first window.
        tokens: Indices of the tokens whose neighbours are recorded.
        reach: Neighbours on each side.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        For each text a record of metric ``"profile"``, one ``"neighbours"`` and one ``"map"`` a layer.

    Raises:
        ValueError: A token is too close to the window's ends, or the map is larger than the window.
    """
    chosen = as_list(tokens)
    if not all(reach <= t < length - reach for t in chosen) or map_tokens > length:
        raise ValueError(
            f"tokens {chosen} with {reach} neighbours on each side and a map of {map_tokens} tokens do not fit in "
            f"windows of {length} tokens: lengthen the windows or move the tokens"
        )
    bench = Bench(PAPER, "similarity", model, device, dtype)
    common = {"length": length, "samples": samples}
    jobs = []
    for name in as_list(text):
        source = (bench, name, length, samples)
        jobs.append((bench.cell("profile", "cosine", data=name, **common), partial(_profile, *source)))
        cell = bench.cell("neighbours", "cosine", data=name, **common, tokens=chosen, reach=reach)
        jobs.append((cell, partial(_neighbours, *source, tuple(chosen), reach)))
        for layer in as_list(layers):
            cell = bench.cell("map", "cosine", data=name, **common, layer=layer, map_tokens=map_tokens)
            jobs.append((cell, partial(_map, *source, layer, map_tokens)))
    return bench.sweep(jobs)


@lru_cache(maxsize=1)
def _keys(bench: Bench, text: str, length: int, samples: int) -> Tensor:
    """Post-RoPE keys of a text's windows, ``[samples, layers, H_kv, L, d]`` float32."""
    model, _ = bench.load()
    windows = bench.windows(text, length, samples).to(model.device)
    rows = [torch.stack([c.keys[0].float() for c in capture_qkv(model, ids[None]).values()]) for ids in windows]
    return torch.stack(rows)


def cosine_by_distance(keys: Tensor, distances: Sequence[int]) -> Tensor:
    """Mean cosine similarity of tokens so many places apart.

    Args:
        keys: ``[..., L, d]``.
        distances: Places, each below L.

    Returns:
        ``[..., distances]``.
    """
    unit = normalize(keys, dim=-1)
    return torch.stack([(unit[..., n:, :] * unit[..., :-n, :]).sum(-1).mean(-1) for n in distances], dim=-1)


def _profile(bench: Bench, text: str, length: int, samples: int) -> Value:
    """Mean cosine by distance.

    Returns:
        The value is the mean cosine of adjacent keys over windows, layers and heads, its spread the standard error over
        windows. ``extra``: ``distances``; ``by_window`` [samples, distances] (mean over layers and heads);
        ``by_layer`` [layers, distances]; ``centred`` [layers, distances], the same after the mean key of each window
        and head is taken away; ``gap`` [layers], mean Euclidean distance of adjacent keys.
    """
    keys = _keys(bench, text, length, samples)
    distances = [n for n in DISTANCES if n < length // 2]
    cosine = cosine_by_distance(keys, distances)  # [samples, layers, H_kv, distances]
    centred = cosine_by_distance(keys - keys.mean(dim=-2, keepdim=True), distances)
    by_window = cosine.mean(dim=(1, 2))
    extra = {
        "distances": distances,
        "by_window": by_window,
        "by_layer": cosine.mean(dim=(0, 2)).round(decimals=4),
        "centred": centred.mean(dim=(0, 2)).round(decimals=4),
        "gap": (keys[..., 1:, :] - keys[..., :-1, :]).norm(dim=-1).mean(dim=(0, 2, 3)),
    }
    error = float(by_window[:, 0].std() / samples**0.5) if samples > 1 else None
    return Value(float(by_window[:, 0].mean()), error, samples, extra)


def _neighbours(bench: Bench, text: str, length: int, samples: int, tokens: tuple[int, ...], reach: int) -> Value:
    """Cosine of chosen tokens of the first window with their neighbours.

    Returns:
        The value is the mean over tokens, layers and heads of the cosine with the nearest neighbour on the left.
        ``extra["cosine"]`` [tokens, layers, H_kv, 2 reach + 1]; the middle one is the token itself, 1.
    """
    unit = normalize(_keys(bench, text, length, samples)[0], dim=-1)  # [layers, H_kv, L, d]
    rows = [unit[:, :, t - reach : t + reach + 1] @ unit[:, :, t, :, None] for t in tokens]
    cosine = torch.stack(rows).squeeze(-1)
    near = cosine[..., reach - 1]
    return Value(float(near.mean()), None, near.numel(), {"cosine": cosine.round(decimals=3)})


def _map(bench: Bench, text: str, length: int, samples: int, layer: int, tokens: int) -> Value:
    """Cosine of every pair of the last ``tokens`` keys of the first window, for each head of a layer.

    Returns:
        The value is the mean off the diagonal; ``extra["cosine"]`` [H_kv, tokens, tokens]; ``extra["depth"]`` the
        layer counted from 0.
    """
    keys = _keys(bench, text, length, samples)[0]
    unit = normalize(keys[layer, :, -tokens:], dim=-1)  # [H_kv, tokens, d]
    cosine = unit @ unit.mT
    pairs = tokens * (tokens - 1)
    mean = (cosine.sum() - cosine.diagonal(dim1=1, dim2=2).sum()) / (pairs * len(cosine))
    return Value(float(mean), None, 1, {"cosine": cosine.round(decimals=3), "depth": layer % len(keys)})


def merging_sets(
    text: str | Sequence[str],
    method: str | Sequence[str],
    length: int,
    samples: int,
    budget: float,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Merging sets found at a fixed threshold, and what they leave of the cache, by layer.

    Args:
        text: Named text or texts.
        method: KVMerger with ``budget_mode='threshold'``, one variant or several.
        length: Tokens a prompt.
        samples: Prompts a text.
        budget: Share of the prompt that the protected shares refer to.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a text and variant, see :func:`_merging_sets`.

    Raises:
        ValueError: A variant is not KVMerger at a fixed threshold.
    """
    bench = Bench(PAPER, "merging_sets", model, device, dtype)
    jobs = []
    for name, variant in product(as_list(text), parse_variants(method)):
        if variant.method != "kvmerger" or variant.options.get("budget_mode") != "threshold":
            raise ValueError(
                f"{variant.label}: merging sets are counted at a fixed threshold; "
                "write kvmerger(budget_mode='threshold'), with other options as you like"
            )
        cell = bench.cell(
            "slots kept", "share", data=name, method=variant, budget=budget, length=length, samples=samples
        )
        jobs.append((cell, partial(_merging_sets, bench, name, variant, length, samples, budget)))
    return bench.sweep(jobs)


def _merging_sets(bench: Bench, text: str, variant: Variant, length: int, samples: int, budget: float) -> Value:
    """Find the sets of each prompt, layer and head.

    Returns:
        The value is the share of slots kept, mean over samples, layers and heads; its spread the standard error over
        samples. ``extra``: ``kept`` [samples, layers] (mean over heads); ``by_head`` [layers, H_kv] (mean over
        samples); ``members`` [layers] (share of the tokens that lie in sets of two or more); ``largest`` [layers]
        (tokens of the largest set).
    """
    method = KVMerger(**variant.options)
    kept, members, largest = [], [], []
    for layers in _observed(bench, text, length, samples):
        sizes = [set_sizes(method.links(slots, round(budget * length), 0))[0] for slots in layers]  # each [H_kv, L]
        kept.append(torch.stack([(n > 0).sum(-1) / length for n in sizes]))  # [layers, H_kv]
        members.append(torch.stack([(n * (n > 1)).sum() / n.sum() for n in sizes]))
        largest.append(torch.stack([n.max() for n in sizes]))
    share = torch.stack(kept).double()  # [samples, layers, H_kv]
    by_sample = share.mean(dim=(1, 2))
    extra = {
        "kept": share.mean(2).round(decimals=5),
        "by_head": share.mean(0).round(decimals=5),
        "members": torch.stack(members).mean(0),
        "largest": torch.stack(largest).amax(0),
    }
    error = float(by_sample.std() / samples**0.5) if samples > 1 else None
    return Value(float(by_sample.mean()), error, samples, extra)


@lru_cache(maxsize=1)
def _observed(bench: Bench, text: str, length: int, samples: int) -> list[list[Slots]]:
    """For each prompt, the full cache of every layer with the attention that its slots received."""
    model, _ = bench.load()
    prompts = bench.windows(text, length, samples).to(model.device)
    return [[observe(layer) for layer in capture_qkv(model, ids[None]).values()] for ids in prompts]


def observe(layer: LayerCapture) -> Slots:
    """A layer's full cache after a prompt, with the attention each slot received from all queries.

    Args:
        layer: What the layer's attention got, batch B.

    Returns:
        One slot a token, ``[B, H_kv, L]``; ``stats["mass"]`` is the mean over the group's query heads.
    """
    batch, heads, length, _ = layer.keys.shape
    positions = torch.arange(length, dtype=torch.int32, device=layer.keys.device)
    slots = Slots(
        layer.keys,
        layer.values,
        positions=positions.expand(batch, heads, -1),
        cardinality=torch.ones(batch, heads, length, dtype=torch.int32, device=layer.keys.device),
    )
    queries = layer.queries.unflatten(1, (heads, -1))  # [B, H_kv, G, L, d]
    step = Step(queries, positions.expand(batch, -1), layer.scale)
    mass = sum(p.sum(dim=3) for _, p in step.blocks(slots)).mean(dim=2)
    return replace(slots, stats={"mass": mass})


def set_sizes(link: Tensor) -> Tensor:
    """Tokens of each set of linked neighbours.

    Args:
        link: ``[..., S - 1]`` bool, slot i and slot i + 1 belong together.

    Returns:
        ``[..., S]`` int64: the sizes of the sets in order, then zeros.
    """
    group = torch.nn.functional.pad((~link).cumsum(dim=-1), (1, 0))  # index of each slot's set
    return torch.zeros_like(group).scatter_add(-1, group, torch.ones_like(group))


def ablations(
    text: str | Sequence[str],
    methods: str | Sequence[str],
    budget: float | Sequence[float],
    context: int,
    continuation: int,
    samples: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Fidelity of KVMerger's variants: the divergence of the compressed model's predictions from the full cache's.

    Args:
        text: Named text or texts.
        methods: Methods or variants.
        budget: Shares of the context, or slots.
        context: Tokens that are read and compressed.
        continuation: Tokens predicted after it, teacher-forced.
        samples: Windows a text.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a text, budget and variant, see :func:`_fidelity`.
    """
    bench = Bench(PAPER, "ablations", model, device, dtype)
    jobs = []
    for name, size, variant in product(as_list(text), as_list(budget), parse_variants(methods)):
        cell = bench.cell(
            "KL(full || compressed)",
            "nats per token",
            data=name,
            method=variant,
            budget=size,
            context=context,
            continuation=continuation,
            samples=samples,
        )
        jobs.append((cell, partial(_fidelity, bench, name, variant, size, context, continuation, samples)))
    return bench.sweep(jobs)


def _fidelity(
    bench: Bench, text: str, variant: Variant, budget: float, context: int, continuation: int, samples: int
) -> Value:
    """KL and NLL of the continuation under the compressed cache.

    Returns:
        The value is the mean KL over windows, its spread the standard error over windows. ``extra``: ``kl`` and
        ``dnll`` [samples] (nats per token), ``bytes`` (share of the full cache's bytes).
    """
    model, _ = bench.load()
    ids, reference = _reference(bench, text, context, continuation, samples)
    sizes = {"context": context, "continuation": continuation}
    found = kvrepro.fidelity(model, ids, variant.method, budget, reference=reference, **sizes, **variant.options)
    kl = found.kl.double().mean(1)  # [samples]
    dnll = (found.nll - found.nll_full).double().mean(1)
    error = float(kl.std() / samples**0.5) if samples > 1 else None
    extra = {"kl": kl, "dnll": dnll, "bytes": found.nbytes / found.nbytes_full}
    return Value(float(kl.mean()), error, samples, extra)


@lru_cache(maxsize=1)
def _reference(bench: Bench, text: str, context: int, continuation: int, samples: int) -> tuple[Tensor, Reference]:
    """The windows ``[samples, context + continuation]``, read once with the full cache for all variants."""
    model, _ = bench.load()
    ids = bench.windows(text, context + continuation, samples)
    return ids, full_reference(model, ids, context=context, continuation=continuation)
