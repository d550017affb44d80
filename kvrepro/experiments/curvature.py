"""KVSlimmer's closed form: alignment of the loss gradient with it, and its check against second derivatives."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from kvrepro import methods
from kvrepro.experiments.capture import LayerCapture, capture_qkv, recording
from kvrepro.experiments.common import Bench, as_list
from kvrepro.methods.kvslimmer import second_derivatives
from kvrepro.records import Cell, Record, Skip, Value

PAPER = "kvslimmer"


def alignment(
    text: str | Sequence[str],
    layers: int | Sequence[int],
    length: int,
    samples: int,
    pairs: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Alignment of the loss gradient E = dL/do with the second derivatives c11, c22, c12 of the attention output.

    Args:
        text: Named text or texts.
        layers: Layers, counted from 0.
        length: Tokens a window; L is the mean next-token loss of the whole window.
        samples: Windows a text.
        pairs: Adjacent pairs of the window's first half; the queries are all tokens of the second half.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a text and layer, see :func:`_alignment`.

    Raises:
        ValueError: More pairs than the first half of a window has.
    """
    if not 1 <= pairs < length // 2:
        raise ValueError(f"a window of {length} tokens has {length // 2 - 1} pairs in its first half, not {pairs}")
    bench = Bench(PAPER, "alignment", model, device, dtype)
    jobs = []
    for name, layer in product(as_list(text), as_list(layers)):
        cell = bench.cell(
            "correlation of cos(E, c11) and -cos(E, c12)",
            "",
            data=name,
            layer=layer,
            length=length,
            samples=samples,
            pairs=pairs,
        )
        jobs.append((cell, partial(_alignment, bench, name, layer, length, samples, pairs)))
    return bench.sweep(jobs)


def _alignment(bench: Bench, text: str, layer: int, length: int, samples: int, pairs: int) -> Value:
    """Cosines of E with the c_ij over queries and pairs.

    The window's last query is left out: the loss does not depend on it.

    Returns:
        The value is the correlation over single queries and pairs between cos(E, c11) and -cos(E, c12), mean over
        heads; its spread the standard error over windows. ``extra``: ``cosine`` [samples, H_q, 3], the mean over
        queries and pairs of cos(E, c11), cos(E, c22), cos(E, c12); ``correlation`` [samples, 2], of cos(E, c11) with
        cos(E, c22) and with -cos(E, c12); ``chance`` [samples, 2], the same for random directions instead of E;
        ``size`` [samples, 3], mean absolute cosines.
    """
    model, _ = bench.load()
    means, correlations, chances, sizes = [], [], [], []
    for number, ids in enumerate(bench.windows(text, length, samples)):
        captured, gradient = loss_gradient(model, ids[None].to(model.device), layer)
        cosine = _cosines(captured, gradient, pairs).cpu()  # [H_q, queries * pairs, 3]
        means.append(cosine.mean(1))
        sizes.append(cosine.abs().mean(dim=(0, 1)))
        correlations.append(_correlations(cosine))
        draw = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(number)).to(gradient.device)
        chances.append(_correlations(_cosines(captured, draw, pairs).cpu()))
    correlation = torch.stack(correlations)  # [samples, 2]
    error = float(correlation[:, 1].std() / samples**0.5) if samples > 1 else None
    extra = {"cosine": torch.stack(means), "correlation": correlation}
    extra |= {"chance": torch.stack(chances), "size": torch.stack(sizes)}
    return Value(float(correlation[:, 1].mean()), error, samples, extra)


def loss_gradient(model: PreTrainedModel, ids: Tensor, layer: int) -> tuple[LayerCapture, Tensor]:
    """A layer's attention and the gradient of the mean next-token loss by its output.

    Args:
        model: The model.
        ids: Token ids ``[1, L]``.
        layer: Layer, counted from 0.

    Returns:
        The capture, and dL/do ``[1, H_q, L, d]``.
    """
    with torch.enable_grad(), recording(model, [layer], grad=True) as seen:
        loss = _loss(model, ids)
        (gradient,) = torch.autograd.grad(loss, [seen[layer].outputs])
    return seen[layer], gradient


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean next-token loss of ``ids`` ``[1, L]`` read without a cache."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return cross_entropy(_wide(logits), ids[0, 1:])


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32, or float64 when it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_rows(captured: LayerCapture, start: int) -> tuple[Tensor, Tensor]:
    """Attention probabilities of the queries from ``start`` on, and the values that each query head reads.

    Args:
        captured: One layer, batch of one.
        start: First query.

    Returns:
        ``[H_q, L - start, L]`` in float32 or float64, and ``[H_q, L, d]``.
    """
    queries = _wide(captured.queries[0, :, start:])
    group = queries.shape[0] // captured.keys.shape[1]
    keys = _wide(captured.keys[0]).repeat_interleave(group, dim=0)
    values = _wide(captured.values[0]).repeat_interleave(group, dim=0)
    logits = queries @ keys.mT * captured.scale
    rows, columns = logits.shape[1:]
    later = torch.ones(rows, columns, dtype=torch.bool, device=logits.device).triu(start + 1)
    return logits.masked_fill(later, -torch.inf).softmax(-1), values


def _cosines(captured: LayerCapture, gradient: Tensor, pairs: int) -> Tensor:
    """Cosines ``[H_q, queries * pairs, 3]`` of E with c11, c22, c12.

    Queries of the second half but the last, which predicts nothing; pairs of the first half.
    """
    half = gradient.shape[2] // 2
    alpha, values = attention_rows(captured, half)
    alpha = alpha[:, :-1]
    left = torch.linspace(0, half - 2, pairs, device=alpha.device).round().long()
    both = torch.stack([left, left + 1], dim=1)  # [pairs, 2]
    output = _wide(captured.outputs[0, :, half:-1].detach())  # [H_q, queries, d]
    curvature = second_derivatives(alpha[:, :, both], values[:, None, both], output[:, :, None])
    error = _wide(gradient[0, :, half:-1])[:, :, None]  # [H_q, queries, 1, d]
    return torch.stack([cosine_similarity(error, c.squeeze(-2), dim=-1) for c in curvature], dim=-1).flatten(1, 2)


def _correlations(cosine: Tensor) -> Tensor:
    """Correlations ``[2]`` of cos(E, c11) with cos(E, c22) and -cos(E, c12), mean over heads; ``[H_q, points, 3]``."""
    x = cosine - cosine.mean(1, keepdim=True)
    return torch.stack([cosine_similarity(x[..., 0], sign * x[..., j], dim=-1).mean() for j, sign in ((1, 1), (2, -1))])


def closed_form(
    text: str,
    draws: int,
    layers: int | Sequence[int],
    length: int,
    samples: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Check the closed form: against autograd, against the whole loss Hessian, and where its weights leave [0, 1].

    Args:
        text: Named text.
        draws: Random draws of the check against autograd, and of each cell of the map of weights.
        layers: Layers of the model at which the loss Hessian and the weights are looked at.
        length: Tokens a window.
        samples: Windows a layer; each gives eight (query, pair, head) for the loss Hessian.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        Records of metrics ``"error"``, ``"outside"`` (random values), and for each layer ``"hessian"`` and
        ``"outside, model"``.
    """
    bench = Bench(PAPER, "closed_form", model, device, dtype)
    jobs = [
        (_drawn("error", draws), partial(_autograd_error, draws)),
        (_drawn("outside", draws), partial(_outside_map, draws)),
    ]
    common = {"data": text, "length": length, "samples": samples}
    for layer in as_list(layers):
        source = (bench, text, layer, length, samples)
        jobs.append((bench.cell("hessian", "share", layer=layer, **common), partial(_hessian, *source)))
        jobs.append((bench.cell("outside, model", "share", layer=layer, **common), partial(_outside_model, *source)))
    return bench.sweep(jobs)


def _drawn(metric: str, draws: int) -> Cell:
    """A cell of random draws, without model or text."""
    return Cell(
        paper=PAPER,
        experiment="closed_form",
        metric=metric,
        method="kvslimmer",
        options=methods.create("kvslimmer").resolved(),
        model="none",
        model_sha256="",
        data="random draws",
        data_sha256=hashlib.sha256(b"").hexdigest(),
        params={"draws": draws},
    )


def _autograd_error(draws: int) -> Value:
    """Largest difference of the closed form from autograd's second derivatives of softmax attention, in float64.

    Returns:
        The value is the largest, over draws, of max |closed - autograd| / max |autograd|; ``extra["errors"]`` [draws].
    """
    generator = torch.Generator().manual_seed(0)
    errors = []
    for _ in range(draws):
        slots, dimension = 6, 8
        logits = 3 * torch.randn(slots, generator=generator, dtype=torch.float64)
        values = torch.randn(slots, dimension, generator=generator, dtype=torch.float64)
        exact = _second_by_autograd(logits, values)  # [d, S, S]
        alpha = logits.softmax(-1)
        c11, c22, c12 = second_derivatives(alpha, values, alpha @ values)  # each [S - 1, d]
        diagonal, beside = exact.diagonal(dim1=1, dim2=2).T, exact.diagonal(offset=1, dim1=1, dim2=2).T
        worst = max(float((c - e).abs().max()) for c, e in ((c11, diagonal[:-1]), (c22, diagonal[1:]), (c12, beside)))
        errors.append(worst / float(exact.abs().max()))
    return Value(max(errors), None, draws, {"errors": errors})


def _second_by_autograd(logits: Tensor, values: Tensor) -> Tensor:
    """Hessian of each component of softmax(logits) @ values by the logits, ``[d, S, S]``."""

    def component(s: Tensor, j: int) -> Tensor:
        return (s.softmax(-1) @ values)[j]

    hessian = torch.autograd.functional.hessian
    return torch.stack([hessian(partial(component, j=j), logits) for j in range(values.shape[1])])


#: Attention at which the map of weights is drawn.
ALPHAS = tuple(round(0.025 + 0.05 * i, 3) for i in range(19))


def _outside_map(draws: int) -> Value:
    """How often the paper's weights leave [0, 1], by the attention of the two slots, values being random.

    Returns:
        The value is the share over all draws and cells with alpha_m + alpha_{m+1} < 1; ``extra``: ``alphas``;
        ``outside`` [alphas, alphas], rows alpha_m, columns alpha_{m+1}, null where they sum to 1 or more.
    """
    generator = torch.Generator().manual_seed(0)
    grid = torch.tensor(ALPHAS, dtype=torch.float64)
    values = torch.randn(draws, 4, 64, generator=generator, dtype=torch.float64)
    left, right = torch.meshgrid(grid, grid, indexing="ij")
    rest = (1 - left - right).unsqueeze(-1).clamp_min(0) * torch.tensor([0.5, 0.5], dtype=torch.float64)
    alpha = torch.cat([left[..., None], right[..., None], rest], dim=-1)[:, :, None]  # [A, A, 1, 4]
    output = (alpha.unsqueeze(-1) * values).sum(-2)  # [A, A, draws, d]
    outside = _outside(alpha.expand(-1, -1, draws, -1)[..., :2], values[:, :2].expand(*output.shape[:3], 2, -1), output)
    share = outside.double().mean(-1)
    possible = left + right < 1 - 1e-9
    return Value(
        float(share[possible].mean()),
        None,
        int(possible.sum()) * draws,
        {
            "alphas": ALPHAS,
            "outside": share.masked_fill(~possible, torch.nan).round(decimals=4),
        },
    )


def raw_share(alpha: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """The left key's share as printed, neither clamped nor replaced.

    Args:
        alpha: ``[..., 2]``, attention of one query to the pair.
        values: ``[..., 2, d]``.
        output: ``[..., d]``.

    Returns:
        ``[...]``; infinite or NaN where the denominator is 0.
    """
    n11, n22, n12 = (c.squeeze(-2).norm(dim=-1) for c in second_derivatives(alpha, values, output))
    return (n11 - n12) / (n11 - 2 * n12 + n22)


def _outside(alpha: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Whether the paper's share leaves [0, 1] or is not defined (0/0), boolean; arguments as :func:`raw_share`."""
    share = raw_share(alpha, values, output)
    return ~((share >= 0) & (share <= 1))


@torch.no_grad()
def _outside_model(bench: Bench, text: str, layer: int, length: int, samples: int) -> Value:
    """How often the weights leave [0, 1] at a layer of the model.

    Returns:
        The value is the share over single queries (second half of the window) and adjacent pairs (first half), mean
        over windows, its spread the standard error over windows. A weight of 0/0 counts as outside. ``extra``:
        ``largest`` (upper edges of bins of the larger attention of the pair) with ``outside`` (null in an empty bin)
        and ``pairs`` in each; ``summed``, the share when the norms are summed over the queries first, as the method
        does here.
    """
    model, _ = bench.load()
    edges = torch.tensor([0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0])
    counts, hits = torch.zeros(len(edges)), torch.zeros(len(edges))
    shares, summed = [], []
    for ids in bench.windows(text, length, samples):
        captured = capture_qkv(model, ids[None].to(model.device), [layer])[layer]
        half = length // 2
        alpha, values = attention_rows(captured, half)
        output = _wide(captured.outputs[0, :, half:])
        both = torch.stack([torch.arange(half - 1), torch.arange(1, half)], dim=1).to(alpha.device)
        outside, largest, norms = [], [], []
        for head in range(alpha.shape[0]):  # one head at a time: [queries, pairs, 2, d] is large
            a, v = alpha[head][:, both], values[head][both][None]
            outside.append(_outside(a, v, output[head][:, None]))
            largest.append(a.amax(-1))
            norms.append(_norm_sums(a, v, output[head][:, None]))
        out, large = torch.stack(outside).cpu(), torch.stack(largest).cpu()
        bins = torch.bucketize(large, edges).clamp_max(len(edges) - 1).flatten()
        counts += torch.bincount(bins, minlength=len(edges))
        hits += torch.bincount(bins, weights=out.flatten().float(), minlength=len(edges))
        shares.append(float(out.float().mean()))
        summed.append(float(torch.stack(norms).float().mean()))
    found = torch.tensor(shares, dtype=torch.float64)
    extra = {"largest": edges, "outside": hits / counts, "pairs": counts, "summed": sum(summed) / samples}
    return Value(float(found.mean()), float(found.std() / samples**0.5) if samples > 1 else None, samples, extra)


def _norm_sums(alpha: Tensor, values: Tensor, output: Tensor) -> Tensor:
    """Whether the share of norms summed over queries leaves [0, 1] or is 0/0, ``[pairs]``."""
    n11, n22, n12 = (c.squeeze(-2).norm(dim=-1).sum(0) for c in second_derivatives(alpha, values, output))
    share = (n11 - n12) / (n11 - 2 * n12 + n22)
    return ~((share >= 0) & (share <= 1))


def _hessian(bench: Bench, text: str, layer: int, length: int, samples: int) -> Value:
    """How much of the loss's second derivative by a logit the closed form leaves out.

    For one query's logit s_m, d2L/ds_m^2 = E.c11 + u.(d2L/do2) u with u = do/ds_m = alpha_m (v_m - o). The first term
    is KVSlimmer's, the second the Gauss-Newton term, taken here as a Hessian-vector product through the layers above.

    Returns:
        The value is the median over draws of |Gauss-Newton| / |whole|. A draw with both terms exactly 0, such as one
        whose value equals the output, has no such share: it is left out of the median and of ``n``. ``extra``:
        ``kept`` (E.c11), ``left`` (Gauss-Newton term) and ``alpha`` of each draw [8 samples]; ``undefined``, the
        number of draws left out.

    Raises:
        Skip: No draw has a share.
    """
    model, _ = bench.load()
    kept, left, alphas = [], [], []
    for number, ids in enumerate(bench.windows(text, length, samples)):
        for draw in _hessian_draws(model, ids[None].to(model.device), layer, seed=number):
            for store, x in zip((kept, left, alphas), draw, strict=True):
                store.append(x)
    a, b = torch.tensor(kept, dtype=torch.float64), torch.tensor(left, dtype=torch.float64)
    defined = (a != 0) | (b != 0)
    if not defined.any():
        raise Skip(f"both terms of the second derivative are 0 in all {len(a)} draws at layer {layer}: no share")
    ratio = (b.abs() / (a + b).abs())[defined]
    extra = {"kept": kept, "left": left, "alpha": alphas, "undefined": len(a) - len(ratio)}
    return Value(float(ratio.median()), None, len(ratio), extra)


def _hessian_draws(
    model: PreTrainedModel, ids: Tensor, layer: int, seed: int, draws: int = 8
) -> list[tuple[float, float, float]]:
    """E.c11, the Gauss-Newton term and alpha_m for draws of (head, query, token) weighted by their attention.

    Queries are those of the second half but the last, which predicts no token of the window: the loss does not depend
    on it, and both terms would be 0.
    """
    # The fused kernels have no second derivative; the plain one has.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), recording(model, [layer], grad=True) as seen:
        loss = _loss(model, ids)
        captured = seen[layer]
        (gradient,) = torch.autograd.grad(loss, [captured.outputs], create_graph=True)
        with torch.no_grad():
            half = ids.shape[1] // 2
            alpha, values = attention_rows(captured, half)  # [H_q, queries, L]
            generator = torch.Generator().manual_seed(seed)
            weights = alpha[..., :half].cpu().clone()
            weights[:, -1] = 0  # masked, not cut off: the other draws of a seed stay what they are
            picks = torch.multinomial(weights.flatten(), draws, generator=generator)
        found = []
        for pick in picks.tolist():
            head, rest = divmod(pick, alpha.shape[1] * half)
            query, token = divmod(rest, half)
            found.append(_second_terms(captured, gradient, alpha, values, (head, query, token), half))
    return found


def _second_terms(
    captured: LayerCapture, gradient: Tensor, alpha: Tensor, values: Tensor, place: tuple[int, int, int], start: int
) -> tuple[float, float, float]:
    """The two terms of d2L/ds^2 and alpha at (head, query after ``start``, token)."""
    head, query, token = place
    weight = alpha[head, query, token]
    away = values[head, token] - _wide(captured.outputs[0, head, start + query].detach())
    direction = torch.zeros_like(captured.outputs)
    direction[0, head, start + query] = (weight * away).to(direction.dtype)
    (product_,) = torch.autograd.grad(gradient, [captured.outputs], grad_outputs=direction, retain_graph=True)
    kept = weight * (1 - 2 * weight) * (_wide(gradient[0, head, start + query].detach()) @ away)
    return float(kept), float((product_ * direction).sum()), float(weight)
