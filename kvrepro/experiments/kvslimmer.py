"""KVSlimmer's experiments: similarity, spectra and cost. Those about its closed form are in ``curvature``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

import kvrepro
from kvrepro.experiments.capture import capture_qkv
from kvrepro.experiments.common import Bench, Variant, as_list, parse_variants
from kvrepro.experiments.memory import peak_bytes
from kvrepro.provenance import device_name
from kvrepro.records import Record, Value
from kvrepro.rope import find_rotation

PAPER = "kvslimmer"
#: Points at which curves over modes are recorded: share of the modes, from the largest on.
GRID = 48


def similarity(
    text: str | Sequence[str],
    length: int,
    samples: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Cosine similarity of adjacent tokens' queries, keys and values, by layer.

    Args:
        text: Named text or texts.
        length: Tokens a window.
        samples: Windows a text.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a text, see :func:`_similarity`.
    """
    bench = Bench(PAPER, "similarity", model, device, dtype)
    jobs = []
    for name in as_list(text):
        cell = bench.cell("keys - values", "cosine", data=name, length=length, samples=samples)
        jobs.append((cell, partial(_similarity, bench, name, length, samples)))
    return bench.sweep(jobs)


@torch.no_grad()
def _similarity(bench: Bench, text: str, length: int, samples: int) -> Value:
    """Adjacent cosine after rotary embedding (``post``) and before it (``pre``).

    Returns:
        The value is the mean over layers of cosine(keys) - cosine(values), keys after rotary embedding; its spread the
        standard error over windows. ``extra``: ``queries``, ``keys``, ``values``, ``queries_pre``, ``keys_pre``
        [samples, layers], each the mean over heads and pairs.
    """
    model, _ = bench.load()
    rotation = find_rotation(model, "full_attention")
    back = -torch.arange(length, device=model.device)[None, None]  # [1, 1, L]: undo each token's position
    found: dict[str, list[Tensor]] = {name: [] for name in ("queries", "keys", "values", "queries_pre", "keys_pre")}
    for ids in bench.windows(text, length, samples):
        layers = capture_qkv(model, ids[None].to(model.device)).values()
        for name in ("queries", "keys", "values"):
            found[name].append(torch.stack([_adjacent(getattr(layer, name)) for layer in layers]))
        for name in ("queries", "keys"):
            plain = [_adjacent(rotation.rotate(getattr(layer, name).float(), back)) for layer in layers]
            found[f"{name}_pre"].append(torch.stack(plain))
    stacked = {name: torch.stack(rows) for name, rows in found.items()}  # each [samples, layers]
    gap = (stacked["keys"] - stacked["values"]).mean(1)
    error = float(gap.std() / samples**0.5) if samples > 1 else None
    return Value(float(gap.mean()), error, samples, {name: x.round(decimals=5) for name, x in stacked.items()})


def _adjacent(x: Tensor) -> Tensor:
    """Mean cosine of adjacent tokens, over heads and pairs; ``x`` ``[B, H, L, d]``."""
    x = x.float()
    return cosine_similarity(x[:, :, 1:], x[:, :, :-1], dim=-1).mean().cpu()


def spectra(
    text: str | Sequence[str],
    length: int,
    samples: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Spectra of the projections W_Q, W_K, W_V and what each mode adds to the similarity of adjacent tokens.

    Args:
        text: Named text or texts (for the modes' contributions; the spectra are the weights' alone).
        length: Tokens a window.
        samples: Windows a text.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a text, see :func:`_spectra`.
    """
    bench = Bench(PAPER, "spectra", model, device, dtype)
    jobs = []
    for name in as_list(text):
        cell = bench.cell("effective rank, values - keys", "share", data=name, length=length, samples=samples)
        jobs.append((cell, partial(_spectra, bench, name, length, samples)))
    return bench.sweep(jobs)


@torch.no_grad()
def _spectra(bench: Bench, text: str, length: int, samples: int) -> Value:
    """Eigenvalues of W W^T by layer, with the energy and the similarity that text gives to each mode.

    With W = U S V^T and z = V^T x for a layer's input x, mode i of a projected token is s_i z_i. Its energy share is
    s_i^2 <z_i^2> / sum_j s_j^2 <z_j^2>, and its contribution c_i (ours: the paper's formula is not at hand) the part of
    the adjacent tokens' inner product it carries, s_i^2 <z_i(t) z_i(t+1)> / sum_j s_j^2 <z_j^2>. The c_i sum to the
    energy-weighted adjacent similarity. Biases are left out.

    Returns:
        The value is the mean over layers of the effective rank of W_V minus that of W_K, each as a share of its modes
        (exp of the entropy of the normalised eigenvalues); its spread the standard error over layers. ``extra``, for
        each of Q, K, V: ``rank`` [layers]; ``eigenvalues`` [layers, grid] (over the largest); ``energy`` and
        ``contribution`` [layers, grid] (cumulative from the largest eigenvalue on); ``grid``, share of the modes.
    """
    model, _ = bench.load()
    inputs = projection_inputs(model, bench.windows(text, length, samples))
    names = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    extra: dict[str, object] = {"grid": (torch.arange(GRID) + 1) / GRID}
    ranks = {}
    for short, name in names.items():
        rows = [_modes(getattr(layer, name).weight, x) for layer, x in inputs]
        ranks[short] = torch.stack([row[0] for row in rows])
        curves = torch.stack([row[1] for row in rows])  # [layers, 3, grid]
        extra[f"rank_{short}"] = ranks[short]
        for place, curve in enumerate(("eigenvalues", "energy", "contribution")):
            extra[f"{curve}_{short}"] = curves[:, place].round(decimals=6)
    gap = ranks["v"] - ranks["k"]
    return Value(float(gap.mean()), float(gap.std() / len(gap) ** 0.5), len(gap), extra)


def projection_inputs(model: PreTrainedModel, windows: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """Each attention module of a model with what its projections read.

    Args:
        model: A model whose attention modules have ``q_proj``, ``k_proj`` and ``v_proj``.
        windows: Token ids ``[n, L]``.

    Returns:
        For each layer the module and its input ``[n, L, hidden]`` in float64 on the CPU.

    Raises:
        ValueError: The model projects with one fused matrix.
    """
    modules = [m for m in model.modules() if all(hasattr(m, name) for name in ("q_proj", "k_proj", "v_proj"))]
    if not modules:
        raise ValueError(f"{type(model).__name__} has no separate q_proj, k_proj and v_proj: use a model that has")
    seen: list[list[Tensor]] = [[] for _ in modules]

    def keep(store: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
        store.append(args[0].detach().double().cpu())

    handles = [m.k_proj.register_forward_pre_hook(partial(keep, store)) for m, store in zip(modules, seen, strict=True)]
    try:
        for ids in windows:
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [(module, torch.cat(rows)) for module, rows in zip(modules, seen, strict=True)]


def _modes(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Effective rank (share of the modes) and the three curves ``[3, grid]`` of one projection ``[out, hidden]``."""
    singular, right = torch.linalg.svd(weight.detach().double().cpu(), full_matrices=False)[1:]
    eigen = singular.square()
    share = eigen / eigen.sum()
    rank = (-(share * share.clamp_min(1e-300).log()).sum()).exp() / len(eigen)
    z = x @ right.T * singular  # [n, L, modes]
    total = z.square().mean(dim=(0, 1)).sum()
    energy = z.square().mean(dim=(0, 1)) / total
    along = (z[:, 1:] * z[:, :-1]).mean(dim=(0, 1)) / total
    picks = torch.linspace(1 / GRID, 1, GRID, dtype=torch.float64).mul(len(eigen)).round().long().clamp_min(1) - 1
    return rank, torch.stack([(eigen / eigen[0])[picks], energy.cumsum(0)[picks], along.cumsum(0)[picks]])


def efficiency(
    text: str,
    methods: str | Sequence[str],
    lengths: int | Sequence[int],
    budget: int | float,
    chunk: int,
    repeats: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Time and memory of reading a prompt in chunks through a compressed cache.

    Args:
        text: Named text the prompts are taken from.
        methods: Methods or variants.
        lengths: Tokens of a prompt.
        budget: Slots per KV head and layer, or a share of the prompt.
        chunk: Tokens read at a time.
        repeats: Timed runs, the methods taking turns, after one that warms up and whose memory is measured.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a method and length, see :func:`_efficiency`; the device's name is in the cell.
    """
    bench = Bench(PAPER, "efficiency", model, device, dtype)
    hardware = device_name(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    variants = parse_variants(methods)
    jobs = []
    for length, variant in product(as_list(lengths), variants):
        cell = bench.cell(
            "prefill time",
            "s",
            data=text,
            method=variant,
            budget=None if variant.method == "full" else budget,
            length=length,
            chunk=chunk,
            repeats=repeats,
            hardware=hardware,
        )
        run = partial(_efficiency, bench, text, tuple(v.label for v in variants), length, budget, chunk, repeats)
        jobs.append((cell, partial(run, variant.label)))
    return bench.sweep(jobs)


def _efficiency(
    bench: Bench,
    text: str,
    labels: tuple[str, ...],
    length: int,
    budget: int | float,
    chunk: int,
    repeats: int,
    label: str,
) -> Value:
    """What one method took.

    Returns:
        The value is the median time in seconds, its spread the standard error of a median (1.25 sigma / sqrt(n)).
        ``extra``: ``times`` [repeats]; ``peak``, the most bytes that tensors made on the way held at one time (cache
        and activations, not the weights); ``weights``, bytes of the weights; ``cache``, bytes of the cache at the end.
    """
    found = _in_turn(bench, text, labels, length, budget, chunk, repeats)[label]
    if isinstance(found, str):
        raise torch.OutOfMemoryError(found)
    times, extra = found
    error = 1.25 * float(times.std()) / repeats**0.5 if repeats > 1 else None
    return Value(float(times.median()), error, repeats, {"times": times, **extra})


@lru_cache(maxsize=1)
def _in_turn(
    bench: Bench, text: str, labels: tuple[str, ...], length: int, budget: int | float, chunk: int, repeats: int
) -> dict[str, tuple[Tensor, dict[str, int]] | str]:
    """Read one prompt with each method, then with each again: a machine that slows down meanwhile slows all alike.

    Returns:
        For each method's label the times ``[repeats]`` in seconds and the bytes named in :func:`_efficiency`, or the
        message where it ran out of memory: one that does must not cost the others their record.
    """
    model, _ = bench.load()
    ids = bench.windows(text, length, 1).to(model.device)

    def read(variant: Variant) -> kvrepro.CompressedCache:
        options = {} if variant.method == "full" else {"budget": budget}
        cache = kvrepro.make_cache(model, variant.method, **options, **variant.options)
        kvrepro.prefill(model, ids, cache, chunk=chunk)
        return cache

    runs = {label: partial(read, Variant.parse(label)) for label in labels}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    sizes, failed = {}, {}
    for label, run in runs.items():
        try:
            cache, peak = peak_bytes(run, model.device)
            sizes[label] = {"peak": peak, "weights": weights, "cache": cache.nbytes}
        except torch.OutOfMemoryError as error:
            failed[label] = str(error)
    rounds = [[_seconds(runs[label], model.device) for label in sizes] for _ in range(repeats)]
    times = torch.tensor(rounds, dtype=torch.float64)  # [repeats, methods]
    return failed | {label: (times[:, place], size) for place, (label, size) in enumerate(sizes.items())}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``run()``, the device's queue emptied before and after."""
    sync = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start
