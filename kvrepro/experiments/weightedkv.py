"""WeightedKV's experiments: the toy example, spectra of keys and values, perplexity, merging against evicting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from kvrepro import evaluate, methods, texts
from kvrepro.assets import AssetError
from kvrepro.attention import Step, attend
from kvrepro.experiments.capture import LayerCapture, capture_qkv
from kvrepro.experiments.common import Bench, as_list, parse_variants
from kvrepro.methods.base import Method
from kvrepro.records import Cell, Record, Skip, Store, Value
from kvrepro.slots import Slots

PAPER = "weightedkv"
#: What the two protocols score of a text; the cells say which one they follow.
SLIDING = "second half of each window"
PIECES = "all of each piece"
#: Tokens in a row whose mean a curve along a text keeps.
BIN = 32

#: Fig. 3 of the paper, m = 4: the historical mean attention of the five slots at steps 5 to 8, left to right.
TOY_AVERAGES = (
    (0.3, 0.1, 0.5, 0.3, 0.5),
    (0.3, 0.4, 0.2, 0.3, 0.9),
    (0.3, 0.4, 0.2, 0.5, 0.7),
    (0.2, 0.4, 0.3, 0.4, 0.6),
)
#: The same figure's outcome: for each slot, the tokens mixed in its value and their weights.
TOY_EXPECTED = ({1: 1 / 3, 2: 1 / 9, 3: 5 / 9}, {4: 0.8 / 7, 5: 1.2 / 7, 6: 5 / 7}, {7: 1.0}, {8: 1.0})


def toy() -> list[Record]:
    """The paper's toy example, run by the package's own WeightedKV.

    Returns:
        One record: the value is the largest difference of a final mixture weight from the paper's; ``extra["steps"]``
        holds, for each step, ``average`` [5], ``before`` and ``after`` (tokens the slots are keyed by), ``evicted``
        (index of the slot that goes) and ``mixture`` [4, 8] (share of token t's value in each slot's value).
    """
    sha = hashlib.sha256(json.dumps(TOY_AVERAGES).encode()).hexdigest()
    options = {"sinks": 0, "recent": 1}
    cell = Cell(
        paper=PAPER,
        experiment="toy",
        metric="largest difference from the paper",
        method="weightedkv",
        options=methods.create("weightedkv", **options).resolved(),
        model="none",
        model_sha256="",
        data="Fig. 3 of the paper",
        data_sha256=sha,
        budget=4,
    )
    return Store.default().sweep([(cell, partial(_toy, options))], f"{PAPER}/toy")


def _toy(options: dict[str, int]) -> Value:
    """Run the steps; tokens' values are unit vectors, so that a slot's value is its list of mixture weights."""
    budget, tokens = 4, 4 + len(TOY_AVERAGES)
    method = methods.create("weightedkv", **options)
    slots = _toy_slots(range(budget), tokens)
    steps = []
    for t, average in enumerate(TOY_AVERAGES, start=budget):
        slots = slots.append(_toy_slots([t], tokens))
        before = (slots.positions[0, 0] + 1).tolist()
        # One query each: the paper prints averages, so the accumulated attention is the average itself.
        stats = {"mass": torch.tensor(average, dtype=torch.float64)[None, None], "count": torch.ones(1, 1, budget + 1)}
        full = Slots(slots.keys, slots.values, slots.positions, slots.cardinality, stats, dense=slots.dense)
        query = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
        slots = method.compress(full, budget, Step(query, torch.tensor([[t]]), scale=1.0))
        after = (slots.positions[0, 0] + 1).tolist()
        evicted = next(i for i, token in enumerate(before) if token not in after)
        mixture = slots.values[0, 0]  # [4, 8]
        steps.append(
            {"average": average, "before": before, "after": after, "evicted": evicted, "mixture": mixture.clone()}
        )
    expected = torch.zeros_like(mixture)
    for slot, weights in enumerate(TOY_EXPECTED):
        for token, weight in weights.items():
            expected[slot, token - 1] = weight
    return Value(float((mixture - expected).abs().max()), extra={"steps": steps, "expected": expected})


def _toy_slots(tokens: Sequence[int], total: int) -> Slots:
    """Slots of some tokens: keys of no consequence, values unit vectors ``[1, 1, n, total]``."""
    index = torch.tensor(list(tokens), dtype=torch.int32)[None, None]
    zeros = torch.zeros(1, 1, len(tokens), 1, dtype=torch.float64)
    values = torch.eye(total, dtype=torch.float64)[index.long()]
    stats = {name: torch.zeros(1, 1, len(tokens), dtype=torch.float64) for name in ("mass", "count")}
    return Slots(zeros, values, index, torch.ones_like(index), stats)


def spectra(
    text: str | Sequence[str], n: int, length: int, *, model: str, device: str | None = None, dtype: str | None = None
) -> list[Record]:
    """Singular values of the cached keys and values (the paper's motivation).

    Args:
        text: Named text or texts.
        n: Sequences a text.
        length: Tokens a sequence.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        One record a text, see :func:`_spectra`.
    """
    bench = Bench(PAPER, "spectra", model, device, dtype)
    jobs = []
    for name in as_list(text):
        cell = bench.cell("rank for 90 % of the energy, values - keys", "", data=name, sequences=n, length=length)
        jobs.append((cell, partial(_spectra, bench, name, n, length)))
    return bench.sweep(jobs)


@torch.no_grad()
def _spectra(bench: Bench, text: str, n: int, length: int) -> Value:
    """Spectra per layer and KV head, averaged over heads and sequences.

    Returns:
        The value is the mean over layers of rank90(values) - rank90(keys), its spread the standard error over
        sequences; ``extra`` holds ``spectrum_keys`` and ``spectrum_values`` [layers, d] (singular values of the
        [length, d] matrix of a KV head, divided by the largest) and ``rank_keys``, ``rank_values`` [layers] (how many
        of them hold 90 % of the sum of their squares).
    """
    model, _ = bench.load()
    found = []
    for ids in bench.windows(text, length, n):
        captured = capture_qkv(model, ids[None].to(model.device))
        pairs = [(layer.keys[0], layer.values[0]) for layer in captured.values()]
        found.append(torch.stack([torch.stack([singular_values(k), singular_values(v)]) for k, v in pairs]))
    values = torch.stack(found)  # [n, layers, 2, H_kv, d]
    energy = values.square().cumsum(-1) / values.square().sum(-1, keepdim=True)
    rank = ((energy < 0.9).sum(-1) + 1).double().mean(3)  # [n, layers, 2]
    spectrum = (values / values[..., :1]).mean(dim=(0, 3))  # [layers, 2, d]
    gap = (rank[..., 1] - rank[..., 0]).mean(1)  # [n]
    error = float(gap.std() / n**0.5) if n > 1 else None
    extra = {"spectrum_keys": spectrum[:, 0], "spectrum_values": spectrum[:, 1]}
    extra |= {"rank_keys": rank[..., 0].mean(0), "rank_values": rank[..., 1].mean(0)}
    return Value(float(gap.mean()), error, n, extra)


def singular_values(x: Tensor) -> Tensor:
    """Singular values of matrices ``[..., L, d]``, largest first, ``[..., d]`` in float64, through the Gram matrix."""
    x = x.double()
    return torch.linalg.eigvalsh(x.mT @ x).flip(-1).clamp_min(0).sqrt()


def readable(names: str | Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Which named texts this machine has, and why it lacks the others.

    Args:
        names: Named text or texts.

    Returns:
        Those that can be read, in order, and for each of the others the reason.
    """
    found, missing = [], {}
    for name in as_list(names):
        try:
            texts.load(name)
        except (ValueError, OSError, AssetError) as error:
            missing[name] = str(error)
        else:
            found.append(name)
    return found, missing


def perplexity(
    text: str | Sequence[str],
    method: str | Sequence[str],
    budget: int | Sequence[int],
    window: int | Sequence[int],
    n_windows: int,
    chunk: int = 1,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    starts_of: int | None = None,
) -> list[Record]:
    """Perplexity against cache size and window, token by token (the paper's Table I).

    Each window starts with an empty cache and is scored on its second half. The paper slides windows over whole books
    by half a window; here they come from different documents, so that they are independent samples. The windows of all
    texts are read side by side, and a shorter window is the beginning of a longer one, so that one reading of the
    longest serves all. ``full`` is measured once a window, the others at every budget smaller than the window.

    Args:
        text: Named text or texts.
        method: Methods or variants, see :class:`kvrepro.experiments.common.Variant`.
        budget: Slots per KV head and layer.
        window: Tokens a window; even.
        n_windows: Windows a text, from different documents where there are enough.
        chunk: Tokens that enter the cache at once. 1 is the paper's algorithm; more is another one.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.
        seed: Seed of the methods that draw at random.
        batch_size: Windows read side by side, None for what memory holds; it changes the speed only and is no part of
            the record.
        starts_of: Windows begin where windows of so many tokens do, so that methods read to different lengths read the
            same text; None is the longest of ``window``.

    Returns:
        One record a cell, see :func:`_perplexity`. Cells that share a reading share its time: the first one's record
        has all of it.

    Raises:
        ValueError: No budget is smaller than a window, a window is odd or longer than ``starts_of``, or a text is too
            short.
    """
    sizes = as_list(window)
    if any(size % 2 for size in sizes):
        raise ValueError(f"half of a window is scored, so windows must be even numbers of tokens, not {sizes}")
    if starts_of is not None and starts_of < max(sizes):
        raise ValueError(f"starts_of={starts_of} must not be below the longest window, {max(sizes)}")
    about = {size: {"protocol": SLIDING, "window": size, "stride": size // 2, "windows": n_windows} for size in sizes}
    bench = Bench(PAPER, "perplexity", model, device, dtype)
    reading = replace(bench, experiment="reading")
    plan = Reading(reading, tuple(as_list(text)), n_windows, max(sizes), batch_size, starts_of or max(sizes))
    return _sweep(bench, plan, method, as_list(budget), about, chunk, seed)


def perplexity_in_pieces(
    text: str | Sequence[str],
    method: str | Sequence[str],
    budget: int | Sequence[int],
    piece: int | Sequence[int],
    n_pieces: int,
    chunk: int = 1,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[Record]:
    """Perplexity by TOVA's protocol: the text is cut into pieces, and every token of a piece but the first is scored.

    Not to be mixed with :func:`perplexity`: the tokens that are read before a cache is full count here, so that all
    methods come closer to the full cache. Both share one reading where texts, sizes and numbers are the same.

    Args:
        text: Named text or texts.
        method: Methods or variants, see :class:`kvrepro.experiments.common.Variant`.
        budget: Slots per KV head and layer.
        piece: Tokens a piece, each read from an empty cache (TOVA: 4096).
        n_pieces: Pieces a text, from different documents where there are enough.
        chunk: As for :func:`perplexity`.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.
        seed: Seed of the methods that draw at random.
        batch_size: As for :func:`perplexity`.

    Returns:
        One record a cell, see :func:`_perplexity`.

    Raises:
        ValueError: No budget is smaller than a piece, or a text is too short.
    """
    about = {size: {"protocol": PIECES, "piece": size, "pieces": n_pieces} for size in as_list(piece)}
    bench = Bench(PAPER, "perplexity_in_pieces", model, device, dtype)
    longest = max(about)
    plan = Reading(replace(bench, experiment="reading"), tuple(as_list(text)), n_pieces, longest, batch_size, longest)
    return _sweep(bench, plan, method, as_list(budget), about, chunk, seed)


def _sweep(
    bench: Bench,
    plan: Reading,
    method: str | Sequence[str],
    budgets: list[int],
    about: Mapping[int, Mapping[str, object]],
    chunk: int,
    seed: int,
) -> list[Record]:
    """Measure one cell a text, size, variant and budget; ``about`` says by size what is scored.

    Raises:
        ValueError: Nothing would be compressed, or a text is too short.
    """
    if min(budgets) >= plan.longest:
        raise ValueError(f"no budget of {budgets} is below a window of {list(about)}: nothing would be compressed")
    for name in plan.texts:
        bench.windows(name, plan.starts_of, plan.n)  # too short a text is an error before anything runs
    jobs = []
    for variant, name, size in product(parse_variants(method), plan.texts, about):
        for slots in [None] if variant.method == "full" else [b for b in budgets if b < size]:
            params = {**about[size], "starts_of": plan.starts_of, "chunk": chunk}
            cell = bench.cell("perplexity", "", method=variant, data=name, budget=slots, seed=seed, **params)
            jobs.append((cell, partial(_perplexity, plan, cell)))
    return bench.sweep(jobs)


@dataclass(frozen=True)
class Reading:
    """Windows of several texts that are read side by side.

    Attributes:
        bench: The model.
        texts: Names.
        n: Windows a text.
        longest: Tokens of the longest window.
        batch_size: Windows read side by side, None for what memory holds.
        starts_of: The windows begin where windows of so many tokens do.
    """

    bench: Bench
    texts: tuple[str, ...]
    n: int
    longest: int
    batch_size: int | None
    starts_of: int

    def shared(self, cell: Cell) -> tuple[int, str, int | None, tuple[tuple[str, object], ...], int]:
        """The reading that serves a cell (:func:`_nll`): those that have it in common are best measured together."""
        options = tuple(sorted(cell.options.items()))
        length = _size(cell) if cell.method == "full" else self.longest
        return length, cell.method, cell.budget, options, cell.params["chunk"]

    def nll(self, cell: Cell, length: int) -> Tensor:
        """``[n, length - 1]`` float64: negative log-likelihoods of all tokens but the first of the cell's windows."""
        found = _nll(self, *self.shared(cell))
        rows = slice(self.texts.index(cell.data) * self.n, (self.texts.index(cell.data) + 1) * self.n)
        return found[rows, : length - 1].double()


@lru_cache(maxsize=64)
def _nll(
    plan: Reading, length: int, method: str, budget: int | None, options: tuple[tuple[str, object], ...], chunk: int
) -> Tensor:
    """``[texts * n, length - 1]``: one reading of all windows, kept for the cells of other texts, sizes, protocols."""
    model, _ = plan.bench.load()
    ids = torch.cat([plan.bench.windows(name, plan.starts_of, plan.n)[:, :length] for name in plan.texts])
    found = evaluate.perplexity(
        model,
        ids,
        method,
        budget,
        window=length,
        stride=length - 1,  # every token but the first is scored
        chunk=1 if method == "full" else chunk,  # the full cache takes as many at once as it likes
        batch_size=None if method == "full" else plan.batch_size,
        **dict(options),
    )
    return found.nll[:, 0]


def _perplexity(plan: Reading, cell: Cell) -> Value:
    """Perplexity of one cell.

    Returns:
        The perplexity over all windows; its spread is the standard error of the mean log-likelihood over windows times
        the perplexity; ``extra["nll"]`` [windows] holds each window's mean negative log-likelihood in nats per token.

    Raises:
        Skip: the full cache does not fit into the model's context.
    """
    size = _size(cell)
    if cell.method == "full":
        _check_context(plan.bench.load()[0], cell, size)
    scored = cell.params.get("stride", size - 1)
    nll = plan.nll(cell, size)[:, -scored:].mean(1)  # [windows]
    mean = float(nll.mean().exp())
    error = mean * float(nll.std()) / plan.n**0.5 if plan.n > 1 else None
    return Value(mean, error, plan.n, {"nll": nll})


def _size(cell: Cell) -> int:
    """Tokens of a cell's windows, pieces or passages."""
    return next(size for name in ("window", "piece", "length") if (size := cell.params.get(name)))


def _check_context(model: PreTrainedModel, cell: Cell, length: int) -> None:
    """Make sure that a full cache of so many tokens is within the model's context.

    Raises:
        Skip: It is beyond.
    """
    limit = model.config.get_text_config().max_position_embeddings
    if length > limit:
        raise Skip(f"{length} tokens are beyond the {limit} positions that {cell.model} was trained for")


def merge_or_evict(
    text: str,
    budget: int,
    length: int,
    n: int,
    chunk: int = 1,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """Log-perplexity along texts read once through a small cache: values merged against values evicted.

    Args:
        text: Named text.
        budget: Slots per KV head and layer.
        length: Tokens of a passage; each starts with an empty cache.
        n: Passages, from different documents where there are enough.
        chunk: Tokens that enter the cache at once. 1 is the paper's algorithm; more is another one.
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        Records for the full cache, WeightedKV and WeightedKV without merging, see :func:`_along`.

    Raises:
        ValueError: Nothing would be compressed, or the text is too short.
    """
    if budget >= length:
        raise ValueError(f"a budget of {budget} slots holds all of {length} tokens: nothing would be compressed")
    bench = Bench(PAPER, "merge_or_evict", model, device, dtype)
    bench.windows(text, length, n)  # too short a text is an error before anything runs
    jobs = []
    for variant in parse_variants(["full", "weightedkv", "weightedkv(merge=False)"]):
        slots = None if variant.method == "full" else budget
        params = {"length": length, "passages": n, "chunk": chunk, "skipped": budget}
        cell = bench.cell("log perplexity", "nats/token", method=variant, data=text, budget=slots, **params)
        jobs.append((cell, partial(_along, bench, cell)))
    return bench.sweep(jobs)


def _along(bench: Bench, cell: Cell) -> Value:
    """Negative log-likelihood of every token but the first of each passage.

    Returns:
        The mean in nats per token over the tokens after the first ``skipped``, where the caches differ; its spread is
        the standard error over passages. ``extra["nll"]`` [passages, bins]: means over :data:`BIN` tokens in a row.

    Raises:
        Skip: The full cache does not fit into the model's context.
    """
    length, n = cell.params["length"], cell.params["passages"]
    plan = Reading(replace(bench, experiment="reading"), (cell.data,), n, length, None, length)
    if cell.method == "full":
        _check_context(bench.load()[0], cell, length)
    nll = plan.nll(cell, length)
    mean = nll[:, cell.params["skipped"] :].mean(1)
    bins = nll[:, : nll.shape[1] // BIN * BIN].unflatten(1, (-1, BIN)).mean(2)
    return Value(float(mean.mean()), float(mean.std()) / n**0.5 if n > 1 else None, n, {"nll": bins})


def one_merge(
    text: str,
    n: int,
    step: int,
    following: int,
    *,
    model: str,
    device: str | None = None,
    dtype: str | None = None,
) -> list[Record]:
    """How far one merge, or one eviction, turns the attention outputs of the steps that follow.

    After ``step`` tokens, the slot that WeightedKV chooses leaves each head; the queries of the next ``following``
    tokens attend once to all keys and once without that slot. Queries, keys and values are the plain model's, so that
    nothing but this one merge differs; positions stay as they are.

    Args:
        text: Named text.
        n: Passages.
        step: Tokens before the merge (the paper: 100).
        following: Steps observed after it (the paper: 800).
        model: Model to load.
        device: Device, or None for the default.
        dtype: Name of a torch dtype, or None for the default.

    Returns:
        Two records, for WeightedKV with and without merging, see :func:`_one_merge`.

    Raises:
        ValueError: The text is too short.
    """
    bench = Bench(PAPER, "one_merge", model, device, dtype)
    bench.windows(text, step + following, n)
    jobs = []
    for variant in parse_variants(
        ["weightedkv(positions='original')", "weightedkv(merge=False, positions='original')"]
    ):
        params = {"step": step, "following": following, "passages": n}
        cell = bench.cell("cosine of attention outputs", "", method=variant, data=text, budget=step - 1, **params)
        jobs.append((cell, partial(_one_merge, bench, cell)))
    return bench.sweep(jobs)


@torch.no_grad()
def _one_merge(bench: Bench, cell: Cell) -> Value:
    """Cosine similarity of attention outputs with and without one merge.

    Returns:
        The mean over steps, layers, heads and passages, its spread the standard error over passages; ``extra`` holds
        1 - cosine as ``distance`` [bins], by step in bins of :data:`BIN`, and as ``layers`` [layers], by layer.
    """
    model, _ = bench.load()
    method = methods.create(cell.method, **cell.options)
    cosines = []
    for ids in bench.windows(cell.data, cell.params["step"] + cell.params["following"], cell.params["passages"]):
        layers = capture_qkv(model, ids[None].to(model.device)).values()
        cosines.append(torch.stack([_merged_cosine(layer, method, cell.params["step"]) for layer in layers]))
    cosine = torch.stack(cosines).double().cpu()  # [n, layers, following], means over heads
    mean = cosine.mean(dim=(1, 2))
    steps = cosine.mean(dim=(0, 1))
    bins = steps[: len(steps) // BIN * BIN].view(-1, BIN).mean(1)
    extra = {"distance": 1 - bins, "layers": 1 - cosine.mean(dim=(0, 2))}
    error = float(mean.std()) / len(mean) ** 0.5 if len(mean) > 1 else None
    return Value(float(mean.mean()), error, len(mean), extra)


def _merged_cosine(layer: LayerCapture, method: Method, step: int) -> Tensor:
    """``[following]``: cosine of outputs with and without the slot the method drops at ``step``, mean over heads."""
    kv = layer.keys.shape[1]
    queries = layer.queries.unflatten(1, (kv, -1))  # [1, H_kv, G, L, d]
    places = torch.arange(queries.shape[3], dtype=torch.int32, device=queries.device)
    past = _plain_slots(layer, places, slice(0, step), method.accumulates)
    rest = _plain_slots(layer, places, slice(step, None), method.accumulates)
    before = Step(queries[:, :, :, :step], places[None, :step], layer.scale)
    after = Step(queries[:, :, :, step:], places[None, step:], layer.scale)
    _, found = attend(before, past, method.statistics)
    merged = method.compress(method.accumulate(past, found, before), step - 1, before)
    whole, _ = attend(after, past.append(rest), ())
    changed, _ = attend(after, merged.append(rest), ())
    return cosine_similarity(whole.float(), changed.float(), dim=-1).mean(dim=(0, 1, 2))


def _plain_slots(layer: LayerCapture, places: Tensor, part: slice, names: Sequence[str]) -> Slots:
    """Slots of some tokens of a captured layer, one token each."""
    keys = layer.keys[:, :, part]
    positions = places[part].expand(*keys.shape[:3]).contiguous()
    stats = {name: torch.zeros_like(positions, dtype=torch.float32) for name in names}
    return Slots(keys, layer.values[:, :, part], positions, torch.ones_like(positions), stats)
