"""How far each merge is from the best possible one: least squares on the attention output, layer by layer.

A passage is read once with the full cache. Each method then compresses each layer's prompt as it does in a model, and
the queries of the tokens that follow, the same for all methods, read what it kept: errors do not travel from layer to
layer. Beside the method's own error stand that of plain eviction (the same slots with their tokens' own keys and
values) and that of the best values for the method's keys, fitted to other queries: the share of the avoidable error
that a merge removes is where it lies between the two (ours; after Attention Matching, arXiv 2602.16284).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor

from kvrepro import evaluate, methods
from kvrepro.attention import Step, causal_logits
from kvrepro.cache import CompressedLayer, Pass, make_cache, slots_of
from kvrepro.experiments.common import Bench, Variant, as_list, parse_variants
from kvrepro.fit import best_values, best_weights, mixed
from kvrepro.records import Cell, Record, Skip, Value
from kvrepro.rope import Rotation, find_rotation
from kvrepro.slots import take

PAPER = "across"
#: What is read of the kept slots, see :func:`readings`, and the two fits, see :func:`best_values`.
PARTS = ("merge", "eviction", "keys", "values", "counts", "early", "late")
BESTS = ("best", "best_mass")


@dataclass(frozen=True)
class Queries:
    """Queries of one layer that stand behind the prompt, and what they get from all of it.

    Attributes:
        queries: ``[B, H_kv, G, m, d]``, post-RoPE.
        positions: ``[B, m]``.
        output: ``[B, H_kv, G, m, d_v]``, over the full prompt and nothing else.
        lse: ``[B, H_kv, G, m]``, log-sum-exp of their logits over the full prompt.
    """

    queries: Tensor
    positions: Tensor
    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Kept:
    """Slots as queries read them.

    Attributes:
        keys: ``[B, H_kv, S, d]``, at the positions where the queries see them.
        values: ``[B, H_kv, S, d_v]``.
        bias: ``[B, H_kv, S]``, added to the logits.
        positions: ``[B, H_kv, S]``, the slot's token; -1 for an empty slot.
        scale: Factor on the logits.
        softcap: Cap on the logits, or None.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    positions: Tensor
    scale: float
    softcap: float | None = None

    def attend(self, queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Attention ``[B, H_kv, G, m, S]`` of queries at positions ``[B, m]``, and its log-sum-exp."""
        logits = causal_logits(queries, positions, self.keys, self.positions, self.bias, self.scale, self.softcap)
        lse = logits.logsumexp(-1)
        return (logits - lse.unsqueeze(-1)).exp(), lse

    def read(self, queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Attention output ``[B, H_kv, G, m, d_v]`` of queries at positions ``[B, m]``, and its log-sum-exp."""
        p, lse = self.attend(queries, positions)
        return mixed(p, self.values), lse

    def where(self, mask: Tensor, other: Kept) -> Kept:
        """These slots where ``mask`` ``[B, H_kv, S]``, elsewhere the other's."""
        wide = mask.unsqueeze(-1)
        return replace(
            other,
            keys=torch.where(wide, self.keys, other.keys),
            values=torch.where(wide, self.values, other.values),
            bias=torch.where(mask, self.bias, other.bias),
        )


@dataclass(frozen=True)
class Layer:
    """One layer of the passages, read with the full cache.

    Attributes:
        prompt: What the layer was handed while the prompt was read.
        fit: Queries that the best values are fitted to.
        held: Queries of the continuation, that everything is judged on.
        own: Output and log-sum-exp of these over the continuation's own tokens, up to each one's.
    """

    prompt: Pass
    fit: Queries
    held: Queries
    own: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reading:
    """Passages that are read side by side.

    Attributes:
        bench: The model.
        text: Name of the text.
        context: Tokens of the prompt, which are compressed.
        continuation: Tokens after it, whose queries judge.
        fit: Last tokens of the prompt, whose queries the best values are fitted to.
        n: Passages.
    """

    bench: Bench
    text: str
    context: int
    continuation: int
    fit: int
    n: int


@dataclass(frozen=True)
class Errors:
    """What one method's compressed prompts lose, B passages.

    Attributes:
        squared: By part (:data:`PARTS`, :data:`BESTS`) the summed squared error of the held-out queries' outputs,
            ``[B, layers, H_kv]``.
        whole: The summed square of the outputs over the full prompt, ``[B, layers, H_kv]``.
        in_text: By ``merge``, ``eviction`` and fit, the error relative to the output's square where the queries see the
            continuation's own tokens too, ``[B, layers]``: here a lost or doubled mass of the prompt counts.
        mass: By the same names, the mean log of the mass kept: log-sum-exp over the slots minus that over the full
            prompt, ``[B, layers]``; 0 is right.
        slots: Slots a head.
    """

    squared: dict[str, Tensor]
    whole: Tensor
    in_text: dict[str, Tensor]
    mass: dict[str, Tensor]
    slots: int

    def relative(self, part: str) -> Tensor:
        """``[B, layers]``: squared error relative to the square of the output, heads together."""
        return self.squared[part].sum(-1) / self.whole.sum(-1)


def errors(
    text: str,
    method: str | Sequence[str],
    share: float | Sequence[float],
    context: int,
    continuation: int,
    fit: int,
    n: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> list[Record]:
    """Errors of the attention output by method, beside plain eviction's and the best values'.

    The queries of the continuation (teacher-forced, from the full cache) attend to the compressed prompt alone, at the
    method's own reading positions and with its own bias on the logits. The best values are fitted to the queries of the
    last ``fit`` tokens of the prompt, each moved by its rotary embedding to the place of one of the continuation's
    (token i of them to place i modulo ``continuation``), so that all of the prompt lies before it (ours).

    Args:
        text: Named text.
        method: Methods or variants, see :class:`kvrepro.experiments.common.Variant`; they compress in one shot.
        share: Slots as shares of the prompt, in (0, 1).
        context: Tokens of the prompt.
        continuation: Tokens after it, whose queries judge.
        fit: Last tokens of the prompt whose queries are fitted to, 2 to ``context``.
        n: Passages, from different documents where there are enough.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.
        seed: Seed of the methods that draw at random.

    Returns:
        Two records a method and share, see :func:`_error` and :func:`_removed`; they share one measurement, whose time
        the first has all of.

    Raises:
        ValueError: A share outside (0, 1) or without room, a method that this cannot judge, sizes that do not fit each
            other, or a text that is too short.
    """
    variants, shares = parse_variants(method), as_list(share)
    _check(variants, shares, context, continuation, fit)
    bench = Bench(PAPER, "best_merge", model, device, dtype)
    bench.windows(text, context + continuation, n)  # too short a text is an error before anything runs
    reading = Reading(bench, text, context, continuation, fit, n)
    about = {"context": context, "continuation": continuation, "fit": fit, "passages": n}
    jobs = []
    for s, variant in product(shares, variants):
        for metric, unit, run in (
            ("attention output error", "of its square", _error),
            ("avoidable error removed", "", _removed),
        ):
            cell = bench.cell(metric, unit, method=variant, data=text, budget=s, seed=seed, **about)
            jobs.append((cell, partial(run, reading, cell)))
    return bench.sweep(jobs)


def _check(variants: Sequence[Variant], shares: Sequence[float], context: int, continuation: int, fit: int) -> None:
    """Check what needs no model.

    Raises:
        ValueError: See :func:`errors`.
    """
    if not all(isinstance(s, float) and 0 < s < 1 for s in shares):
        raise ValueError(f"shares of the prompt lie between 0 and 1, not {list(shares)}")
    if continuation < 1 or not 2 <= fit <= context:
        raise ValueError(f"continuation={continuation} must be 1 or more, fit={fit} from 2 to context={context}")
    for variant in variants:
        method = methods.create(variant.method, **variant.options)
        if method.unlimited:
            raise ValueError(f"{variant.label} compresses nothing: its error is 0; leave it out")
        if getattr(method, "fisher", None) == "loss":
            raise ValueError(f"{variant.label} needs the loss's gradient, chunk by chunk; write fisher='forward'")
        if not method.replayable:
            raise ValueError(f"{variant.label} reads its prompt twice, and here it is replayed; write queries='prompt'")
        for s in shares:
            slots = slots_of(s, context)
            method.resolve(slots).check(slots)


def _error(reading: Reading, cell: Cell) -> Value:
    """Squared error of the attention output relative to the output's square.

    Returns:
        The mean over layers and passages, its spread the standard error over passages. ``extra`` holds by part
        ``by_layer`` and ``layer_spread`` [layers] (means over passages, and their standard errors) and ``by_passage``
        [n] (means over layers); ``by_head`` [layers, H_kv] (means over passages) for ``merge``, ``eviction`` and
        ``best``; ``in_text`` and ``mass`` [n] (means over layers, see :class:`Errors`) for these and ``best_mass``; and
        ``slots``. The parts: ``merge`` is the method; ``eviction`` the same slots with their tokens' own keys and
        values and no bias; ``keys``, ``values`` and ``counts`` that with the method's keys, values or bias alone;
        ``early`` and ``late`` that with all three in the slots of the first or second half of the prompt alone;
        ``best`` the method's keys and bias with the best values; ``best_mass`` that with the best biases, too.
    """
    found = _measured(reading, cell.method, cell.budget, tuple(sorted(cell.options.items())))
    by_part = {part: found.relative(part) for part in (*PARTS, *BESTS)}  # [n, layers]
    heads = {part: found.squared[part] / found.whole for part in ("merge", "eviction", "best")}
    mean, error = _mean(by_part["merge"].mean(1))
    extra = {
        "by_layer": {part: x.mean(0) for part, x in by_part.items()},
        "layer_spread": {part: x.std(0) / reading.n**0.5 for part, x in by_part.items()} if reading.n > 1 else {},
        "by_passage": {part: x.mean(1) for part, x in by_part.items()},
        "by_head": {part: x.mean(0) for part, x in heads.items()},
        "in_text": {part: x.mean(1) for part, x in found.in_text.items()},
        "mass": {part: x.mean(1) for part, x in found.mass.items()},
        "slots": found.slots,
    }
    return Value(mean, error, reading.n, extra)


def _removed(reading: Reading, cell: Cell) -> Value:
    """Share of the avoidable error that a merge removes: (eviction - merge) / (eviction - best values).

    1 is as good as the best values for the method's keys, 0 as good as evicting, below 0 worse.

    Returns:
        The mean over passages of the share of the errors' means over layers, its spread the standard error over
        passages; ``extra`` holds these shares as ``by_passage`` [n] and, for each third of the layers from the input
        up, ``thirds`` [n, 3]; and ``by_layer`` [layers], from the errors' means over passages.
    """
    found = _measured(reading, cell.method, cell.budget, tuple(sorted(cell.options.items())))
    by_part = [found.relative(part) for part in ("merge", "eviction", "best")]  # [n, layers]
    passages = removed(*(x.mean(1) for x in by_part))
    thirds = zip(*(x.tensor_split(3, 1) for x in by_part), strict=True)
    by_third = torch.stack([removed(*(x.mean(1) for x in third)) for third in thirds], 1)
    mean, error = _mean(passages)
    by_layer = removed(*(x.mean(0) for x in by_part))
    extra = {"by_passage": passages, "by_layer": by_layer, "thirds": by_third}
    return Value(mean, error, reading.n, extra)


def removed(merge: Tensor, eviction: Tensor, best: Tensor) -> Tensor:
    """Share of the avoidable error that is removed, (eviction - merge) / (eviction - best).

    Args:
        merge: Error of the merge, any shape.
        eviction: Error of evicting, of the same shape.
        best: Error of the best values.

    Returns:
        The share, of the same shape; NaN where nothing can be avoided.
    """
    room = eviction - best
    return torch.where(room > 0, (eviction - merge) / room, torch.nan)


def _mean(samples: Tensor) -> tuple[float, float | None]:
    """Mean and standard error of samples ``[n]``."""
    n = len(samples)
    return float(samples.mean()), float(samples.std()) / n**0.5 if n > 1 else None


@lru_cache(maxsize=1)
@torch.no_grad()
def _layers(reading: Reading) -> list[Layer]:
    """The passages read with the full cache, once for all methods and shares (the last reading is kept).

    Raises:
        Skip: The model has layers that are no compressed layers.
    """
    model, _ = reading.bench.load()
    ids = reading.bench.windows(reading.text, reading.context + reading.continuation, reading.n).to(model.device)
    cache = make_cache(model, "full")
    if len(cache.compressed) != len(cache.layers):
        raise Skip("best_merge takes models whose layers all have full attention, such as Llama or Qwen")
    passes = cache.record()
    for part in (ids[:, : reading.context], ids[:, reading.context :]):
        evaluate.prefill(model, part, cache)
    rotation = find_rotation(model, "full_attention")
    return [_layer(prompt, rest, rotation, reading.fit) for prompt, rest in passes]


def _layer(prompt: Pass, rest: Pass, rotation: Rotation, fit: int) -> Layer:
    """What one layer was handed, and what its queries get from the full prompt."""
    context, continuation = prompt.keys.shape[2], rest.keys.shape[2]
    device = prompt.keys.device
    held = torch.arange(continuation, device=device) + context
    moved = torch.arange(fit, device=device) % continuation + context
    shift = moved - torch.arange(context - fit, context, device=device)
    old = prompt.query[:, :, -fit:].contiguous()
    turned = rotation.rotate(old, shift.expand(old.shape[:3]).contiguous())
    whole = _tokens(prompt, torch.arange(context, device=device))
    return Layer(
        prompt,
        _asked(whole, turned, moved),
        _asked(whole, rest.query, held),
        _tokens(rest, held).read(*_grouped(rest.query, held, rest.keys.shape[1])),
    )


def _tokens(note: Pass, positions: Tensor) -> Kept:
    """All tokens of a pass, at ``positions`` ``[L]``, as they are."""
    places = positions.expand(note.keys.shape[:3])
    bias = torch.zeros(places.shape, device=places.device)
    return Kept(note.keys, note.values, bias, places, note.scale, note.softcap)


def _grouped(query: Tensor, positions: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H_q, m, d]`` at ``positions`` ``[m]`` by KV head: ``[B, H_kv, G, m, d]``, and ``[B, m]``."""
    return query.unflatten(1, (heads, -1)), positions.expand(len(query), -1)


def _asked(whole: Kept, query: Tensor, positions: Tensor) -> Queries:
    """Queries ``[B, H_q, m, d]`` at ``positions`` ``[m]``, with what they get from ``whole``."""
    queries, places = _grouped(query, positions, whole.keys.shape[1])
    return Queries(queries, places, *whole.read(queries, places))


@lru_cache(maxsize=1)
@torch.no_grad()
def _measured(reading: Reading, method: str, budget: float, options: tuple[tuple[str, object], ...]) -> Errors:
    """Compress the passages by one method, and judge every layer (the last measurement is kept)."""
    model, _ = reading.bench.load()
    layers = _layers(reading)
    cache = make_cache(model, method, budget, **dict(options))
    cache.plan(reading.context)
    cache.replay([[layer.prompt] for layer in layers])
    found = [judge(layer, *kept(layer, held)) for layer, held in zip(layers, cache.compressed, strict=True)]

    def stacked(name: str) -> dict[str, Tensor]:
        """One result of all layers, ``[B, layers, ...]``, on the CPU."""
        first = found[0][name]
        return {part: torch.stack([each[name][part] for each in found], 1).cpu() for part in first}

    squared = stacked("squared")
    return Errors(squared, squared.pop("whole"), stacked("in_text"), stacked("mass"), cache.compressed[0].slots.size)


def kept(layer: Layer, held: CompressedLayer) -> tuple[Kept, Kept]:
    """What a compressed layer holds, as its method reads it, and the same slots as their tokens were.

    Args:
        layer: The layer as it was.
        held: The layer as it is held.

    Returns:
        The merged slots; and those with their tokens' own keys, at the same places, own values, and no bias.
    """
    slots, note, method = held.slots, layer.prompt, held.method
    asked = (layer.held.queries, layer.held.positions, note.scale, note.softcap)
    step = Step(*asked, method.positions, method.cardinality_bias, held.rotation)
    index = slots.positions.clamp_min(0).long()
    plain = replace(slots, keys=take(note.keys, index), values=take(note.values, index))
    none = torch.zeros(index.shape, device=index.device)
    bias = step.bias(slots)
    about = (slots.positions, note.scale, note.softcap)
    return (
        Kept(step.read_keys(slots), slots.values, none if bias is None else bias, *about),
        Kept(step.read_keys(plain), plain.values, none, *about),
    )


def readings(merged: Kept, plain: Kept, context: int) -> dict[str, Kept]:
    """The merge, eviction, and the merge's parts, by the names of :data:`PARTS` (see :func:`_error`)."""
    early = merged.positions < context // 2
    return {
        "merge": merged,
        "eviction": plain,
        "keys": replace(plain, keys=merged.keys),
        "values": replace(plain, values=merged.values),
        "counts": replace(plain, bias=merged.bias),
        "early": merged.where(early, plain),
        "late": plain.where(early, merged),
    }


def judge(layer: Layer, merged: Kept, plain: Kept) -> dict[str, dict[str, Tensor]]:
    """Errors of one layer's compressed prompt, of its parts, and of the best fits.

    Args:
        layer: The layer as it was.
        merged: Its slots as the method reads them.
        plain: The same slots with their tokens' own keys and values.

    Returns:
        ``squared`` by part, with ``whole`` for the output itself, ``[B, H_kv]``; ``in_text`` and ``mass`` by part,
        ``[B]``; see :class:`Errors`.
    """
    held = layer.held
    every = readings(merged, plain, layer.prompt.keys.shape[2]) | best_fits(layer.fit, merged, plain.values)
    squared = {"whole": square(held.output)}
    in_text, mass = {}, {}
    whole = in_one(held.output, held.lse, *layer.own)
    for part, slots in every.items():
        output, lse = slots.read(held.queries, held.positions)
        squared[part] = square(output - held.output)
        if part in ("merge", "eviction", *BESTS):
            lost = square(in_one(output, lse, *layer.own) - whole)
            in_text[part] = lost.sum(1) / square(whole).sum(1)
            mass[part] = (lse - held.lse).double().mean((1, 2, 3))
    return {"squared": squared, "in_text": in_text, "mass": mass}


def square(x: Tensor) -> Tensor:
    """``[B, H_kv]`` float64: sum of squares of ``[B, H_kv, G, m, d]``."""
    return x.double().square().sum((2, 3, 4))


def in_one(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Attention output over two sets of tokens from the outputs ``[..., d]`` and log-sum-exps ``[...]`` over each."""
    share = torch.sigmoid(lse - other_lse).unsqueeze(-1)
    return share * output + (1 - share) * other


def best_fits(fit: Queries, merged: Kept, start: Tensor) -> dict[str, Kept]:
    """The method's slots with the best values, and with the best biases and values.

    Args:
        fit: The queries that are fitted to.
        merged: The slots as the method reads them.
        start: ``[B, H_kv, S, d_v]``, the values that the ridge pulls to: the slots' tokens' own.

    Returns:
        ``best`` and ``best_mass``.
    """
    p, lse = merged.attend(fit.queries, fit.positions)
    best = replace(merged, values=best_values(p, fit.output, start))
    share = p * (lse - fit.lse).exp().unsqueeze(-1)  # of the full prompt's mass, by slot
    weighted = replace(merged, bias=merged.bias + best_weights(share.double()).log().to(merged.bias.dtype))
    p, _ = weighted.attend(fit.queries, fit.positions)
    return {"best": best, "best_mass": replace(weighted, values=best_values(p, fit.output, start))}
