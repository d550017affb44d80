"""Time and memory of prompts, merging, decoding and batches, each beside its peers and its floor.

The models have random weights and read random tokens: neither changes what is computed, but for methods that look for
similar keys. Every measurement is a cell of its own, so that what one of them lacks (memory, a peer) costs no other.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import kvrepro
from kvrepro import methods as registry
from kvrepro import models
from kvrepro.adapter import cache_arguments, prepare
from kvrepro.cache import CompressedCache
from kvrepro.decode import Decoder
from kvrepro.experiments.common import Job, Variant, as_list, parse_variants
from kvrepro.experiments.memory import peak_bytes
from kvrepro.provenance import device_name
from kvrepro.records import Cell, Record, Skip, Store, Value

PAPER = "speed"
#: Steps before the timed ones, by device: kernels are compiled, a graph is captured.
SKIPPED = {"cuda": 8, "cpu": 2}
#: What a token costs is measured with this many tokens more than the budget, so that every step lets a slot go.
OVER = 64
#: Bytes that are copied, and rows of the square matrices that are multiplied, to see what a device reaches.
COPIED = {"cuda": 1 << 32, "cpu": 1 << 27}
MULTIPLIED = {"cuda": 8192, "cpu": 1024}
#: Prompts of more tokens are not read once more to warm up; the beginning is, of so many tokens unless in chunks.
LONG, SHORT = 32768, 2048
TRANSFORMERS = "transformers sdpa"
PLAIN_GENERATE = "model.generate"
PLAIN_LOOP = "plain loop"


@lru_cache(maxsize=1)
def _loaded(shape: str, device: str | None, dtype: str | None, seed: int) -> PreTrainedModel:
    """The model with random weights; the last one asked for is kept. It never ends a text by itself."""
    model, _ = kvrepro.load_model(shape, device=device, dtype=dtype, weights="random", seed=seed)
    model.generation_config.eos_token_id = None
    return model


def release() -> None:
    """Let go of the loaded model and of the memory that PyTorch keeps for later."""
    _loaded.cache_clear()
    free()


def free() -> None:
    """Give cached memory back, so that a cell starts with all of it."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Setup:
    """A model shape with random weights on a device.

    Attributes:
        shape: one of ``kvrepro.models.SHAPES``.
        device: device, or None for the default.
        dtype: name of a torch dtype, or None for the default.
        seed: of weights and tokens.
    """

    shape: str = "llama-3.1-8b"
    device: str | None = None
    dtype: str | None = None
    seed: int = 0

    @property
    def place(self) -> torch.device:
        """The device in effect."""
        return models.resolve_device(self.device)

    @property
    def number(self) -> torch.dtype:
        """The number format in effect."""
        return models.resolve_dtype(self.dtype, self.place)

    def load(self) -> PreTrainedModel:
        """The prepared model. Call it while measuring only."""
        return _loaded(self.shape, self.device, self.dtype, self.seed)

    def tokens(self, length: int, rows: int = 1) -> Tensor:
        """Random tokens ``[rows, length]`` on the device."""
        generator = torch.Generator().manual_seed(self.seed)
        vocabulary = models.shape(self.shape).vocab_size
        return torch.randint(vocabulary, (rows, length), generator=generator).to(self.place)

    def cell(
        self,
        experiment: str,
        metric: str,
        unit: str,
        *,
        method: str | Variant = "full",
        budget: int | float | None = None,
        options: dict[str, Any] | None = None,
        **params: object,
    ) -> Cell:
        """A cell of one measurement.

        Args:
            experiment: the piece it belongs to.
            metric: what is measured.
            unit: its unit.
            method: method or variant, or the one nearest to a peer's.
            budget: slots per KV head and layer, or a share of the prompt.
            options: what a peer of another library was given, instead of the method's options.
            **params: everything else the value depends on; hardware and number format are added.
        """
        variant = method if isinstance(method, Variant) else Variant.parse(method)
        resolved = registry.create(variant.method, **{"seed": self.seed, **variant.options}).resolved()
        recipe = {"kind": "uniform", "seed": self.seed, "vocabulary": models.shape(self.shape).vocab_size}
        number = str(self.number).removeprefix("torch.")
        return Cell(
            paper=PAPER,
            experiment=experiment,
            metric=metric,
            unit=unit,
            method=variant.method,
            options=resolved if options is None else options,
            model=self.shape,
            model_sha256=models.identity(self.shape, weights="random", seed=self.seed),
            data="random tokens",
            data_sha256=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
            budget=None if variant.method == "full" else budget,
            seed=self.seed,
            params={"label": variant.label, "hardware": device_name(self.place), "dtype": number, **params},
        )


def sweep(jobs: Sequence[Job], experiment: str) -> list[Record]:
    """Measure the cells that are not measured yet; a cell that fails becomes a record that says so."""
    return Store.default().sweep(jobs, f"{PAPER}/{experiment}")


# --- clocks, ceilings, floors ---------------------------------------------------------------------------------------


class Clock:
    """Moments in a device's queue, taken without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        """No moment yet."""
        self._on_gpu = device.type == "cuda"
        self._moments: list[Any] = []

    def __len__(self) -> int:
        """The moments marked so far."""
        return len(self._moments)

    def mark(self, *_: object) -> None:
        """Mark this moment."""
        if not self._on_gpu:
            self._moments.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments.append(event)

    def seconds(self) -> Tensor:
        """``[marks - 1]`` float64: the time between each moment and the next."""
        if self._on_gpu:
            torch.cuda.synchronize()
            between = [a.elapsed_time(b) / 1000 for a, b in zip(self._moments, self._moments[1:], strict=False)]
        else:
            between = [b - a for a, b in zip(self._moments, self._moments[1:], strict=False)]
        return torch.tensor(between, dtype=torch.float64)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``run()``, the device's queue emptied before and after."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - start


def _median(times: Tensor, extra: dict[str, Any]) -> Value:
    """The median of ``times`` ``[n]`` with its standard error (1.25 sigma / sqrt(n))."""
    error = 1.25 * float(times.std()) / len(times) ** 0.5 if len(times) > 1 else None
    return Value(float(times.median()), error, len(times), {"times": times, **extra})


def ceilings(setup: Setup) -> list[Record]:
    """What the device reaches at most: bytes a second of a large copy, operations a second of a large matrix product.

    Args:
        setup: its device and number format.

    Returns:
        Two records.
    """
    jobs: list[Job] = []
    for metric, unit, run in (("copy", "B/s", _copy_speed), ("matrix product", "flop/s", _matmul_speed)):
        jobs.append((setup.cell("ceilings", metric, unit), partial(run, setup)))
    return sweep(jobs, "ceilings")


def _copy_speed(setup: Setup) -> Value:
    """Bytes read and written a second by a copy too large for any cache; ``extra``: ``times``, ``bytes``."""
    size = COPIED[setup.place.type]
    source = torch.zeros(size, dtype=torch.uint8, device=setup.place)
    target = torch.empty_like(source)
    return _rate(lambda: target.copy_(source), 2 * size, "bytes", setup.place)


def _matmul_speed(setup: Setup) -> Value:
    """Multiplications and additions a second of a square product; ``extra``: ``times``, ``flops``."""
    n = MULTIPLIED[setup.place.type]
    a, b = torch.randn(2, n, n, device=setup.place).to(setup.number)
    out = torch.empty_like(a)
    return _rate(lambda: torch.matmul(a, b, out=out), 2 * n**3, "flops", setup.place)


def _rate(run: Callable[[], object], amount: int, name: str, device: torch.device, repeats: int = 9) -> Value:
    """``amount`` a second, in the fastest of ``repeats`` runs after two that warm up: what can be reached."""
    times = [seconds_of(run, device) for _ in range(repeats + 2)][2:]
    rates = amount / torch.tensor(times, dtype=torch.float64)
    return Value(float(rates.max()), None, repeats, {"times": times, name: amount})


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without.

    Attributes:
        flops: multiplications and additions.
        bytes: bytes that pass through memory.
    """

    flops: float
    bytes: float

    def floor(self, setup: Setup) -> dict[str, float]:
        """For ``extra``: ``floor`` in seconds, what it was counted from, and the ceilings it was divided by."""
        found = [record.value.value for record in ceilings(setup)]
        if None in found:
            raise RuntimeError("the device's ceilings could not be measured, so there is no floor to report")
        bandwidth, speed = (float(x) for x in found if x is not None)
        return {
            "floor": max(self.flops / speed, self.bytes / bandwidth),
            "flops": self.flops,
            "bytes": self.bytes,
            "bandwidth": bandwidth,
            "speed": speed,
        }


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as the floors need them.

    Attributes:
        weights: bytes of all weights.
        read: bytes of the weights that one forward pass reads: all but the rows of the embedding not looked up.
        matrices: elements of the layers' matrices, without embedding and output.
        layers: number of layers.
        width: query heads times head size.
        slot: bytes of one slot, keys and values of all layers.
    """

    weights: int
    read: int
    matrices: int
    layers: int
    width: int
    slot: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        """The sizes of a model."""
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        table, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2 and p is not table and p is not output)
        return cls(
            weights=weights,
            read=weights if table is output else weights - table.numel() * table.element_size(),
            matrices=matrices,
            layers=config.num_hidden_layers,
            width=config.num_attention_heads * head,
            slot=2 * config.num_hidden_layers * config.num_key_value_heads * head * table.element_size(),
        )

    def reading(self, length: int, chunk: int | None, slots: int) -> Work:
        """Reading a prompt of ``length`` tokens in chunks, a cache of at most ``slots`` slots being left after each."""
        chunk = chunk or length
        starts = range(0, length, chunk)
        pasts = [min(start, slots) for start in starts]
        tokens = [min(chunk, length - start) for start in starts]
        pairs = sum(n * past + n * (n + 1) / 2 for n, past in zip(tokens, pasts, strict=True))
        flops = 2.0 * self.matrices * length + 4.0 * pairs * self.width * self.layers
        moved = len(tokens) * self.read + self.slot * (sum(pasts) + length)
        return Work(flops, float(moved))

    def step(self, rows: int, cache: int) -> Work:
        """One token for each of ``rows`` rows over a cache of ``cache`` bytes."""
        return Work(2.0 * self.matrices * rows, float(self.read + cache))


# --- what is timed --------------------------------------------------------------------------------------------------


@contextmanager
def as_transformers(model: PreTrainedModel) -> Iterator[None]:
    """The model as transformers has it, with PyTorch's attention; prepared again at the end."""
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        prepare(model)


@torch.no_grad()
def _read_plain(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    """Read a prompt ``[B, L]`` as transformers does, at once."""
    cache = DynamicCache(config=model.config)
    with as_transformers(model):
        model(input_ids=ids, logits_to_keep=1, **cache_arguments(model, cache))
    return cache


def read_prompt(model: PreTrainedModel, ids: Tensor, variant: Variant, budget: int | float, chunk: int | None) -> Any:
    """Read a prompt ``[B, L]`` through the package's cache."""
    cache = _cache(model, variant, budget)
    kvrepro.prefill(model, ids, cache, chunk=chunk)
    return cache


def _cache(model: PreTrainedModel, variant: Variant, budget: int | float | None) -> CompressedCache:
    """An empty cache; the full one has no budget."""
    size = None if variant.method == "full" else budget
    return kvrepro.make_cache(model, variant.method, size, **variant.options)


def _cache_bytes(cache: Any) -> int:
    """Bytes of the package's cache, or of transformers'."""
    if isinstance(cache, CompressedCache):
        return cache.nbytes
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def prefill(
    setup: Setup,
    lengths: int | Sequence[int],
    methods: str | Sequence[str],
    *,
    budget: int | float = 0.25,
    chunk: int | None = None,
    repeats: int = 5,
    peers: bool = True,
    experiment: str = "prefill",
) -> list[Record]:
    """Time and memory of reading a prompt.

    Args:
        setup: model and device.
        lengths: tokens of the prompts.
        methods: methods or variants.
        budget: slots per KV head and layer, or a share of the prompt.
        chunk: tokens read at a time; None reads all at once.
        repeats: timed runs, after one that warms up and whose memory is measured; above :data:`LONG` tokens a short
            prompt warms up instead.
        peers: measure transformers (SDPA, full cache, the prompt at once) beside them.
        experiment: name of the piece; ``pairs`` for the methods that merge pairs chunk by chunk.

    Returns:
        One record a length and method, see :func:`_prefill`.
    """
    jobs: list[Job] = []
    for length in as_list(lengths):
        same = {"length": length, "batch": 1, "repeats": repeats}
        if peers:
            cell = setup.cell(experiment, "prefill time", "s", peer=TRANSFORMERS, chunk=None, **same)
            jobs.append((cell, partial(_prefill, setup, None, length, budget, None, repeats)))
        for variant in parse_variants(methods):
            cell = setup.cell(experiment, "prefill time", "s", method=variant, budget=budget, chunk=chunk, **same)
            jobs.append((cell, partial(_prefill, setup, variant.label, length, budget, chunk, repeats)))
    return sweep(jobs, experiment)


def _prefill(
    setup: Setup, label: str | None, length: int, budget: int | float, chunk: int | None, repeats: int
) -> Value:
    """Read one prompt ``repeats`` times; ``label`` None is transformers.

    Returns:
        The value is the median time in seconds. ``extra``: ``times`` [repeats]; ``peak``, the most bytes that tensors
        made on the way held at one time (cache and activations, not the weights); ``weights``; ``cache``, bytes of the
        cache at the end; ``floor`` in seconds and what it was counted from (:class:`Work`).
    """
    model = setup.load()
    free()
    ids = setup.tokens(length)
    if label is None:
        run: Callable[[], Any] = partial(_read_plain, model, ids)
        held = length
    else:
        variant = Variant.parse(label)
        run = partial(read_prompt, model, ids, variant, budget, chunk)
        held = length if variant.method == "full" else kvrepro.cache.slots_of(budget, length)
    if length > LONG:
        warm = ids[:, : 2 * (chunk or SHORT)]
        _ = _read_plain(model, warm) if label is None else read_prompt(model, warm, variant, budget, chunk)
        del _
    cache, peak, seconds = _timed_peak(run, model.device)
    shape = Shape.of(model)
    extra = {"peak": peak, "weights": shape.weights, "cache": _cache_bytes(cache)}
    del cache
    first = [seconds] if length > LONG else []
    times = torch.tensor(
        [*first, *(seconds_of(run, model.device) for _ in range(repeats - len(first)))], dtype=torch.float64
    )
    return _median(times, {**extra, **shape.reading(length, chunk, held).floor(setup)})


def _timed_peak(run: Callable[[], Any], device: torch.device) -> tuple[Any, int, float]:
    """What ``run()`` gives, the most bytes it holds, and its seconds (meaningless on a CPU, where watching is slow)."""
    found: list[Any] = []
    seconds, peak = peak_bytes(lambda: seconds_of(lambda: found.append(run()), device), device)
    return found.pop(), peak, seconds


def merging(
    setup: Setup,
    length: int,
    methods: str | Sequence[str],
    *,
    budget: int | float = 0.25,
    repeats: int = 3,
) -> list[Record]:
    """Time that compressing a prompt once takes, inside the reading of that prompt.

    Args:
        setup: model and device.
        length: tokens of the prompt, read at once.
        methods: methods or variants.
        budget: slots per KV head and layer, or a share of the prompt.
        repeats: timed runs after one that warms up.

    Returns:
        One record a method, see :func:`_merging`.
    """
    jobs: list[Job] = []
    for variant in parse_variants(methods):
        same = {"length": length, "chunk": None, "batch": 1, "repeats": repeats}
        cell = setup.cell("merging", "compression time", "s", method=variant, budget=budget, **same)
        jobs.append((cell, partial(_merging, setup, variant.label, length, budget, repeats)))
    return sweep(jobs, "merging")


def _merging(setup: Setup, label: str, length: int, budget: int | float, repeats: int) -> Value:
    """Time inside all layers' ``compress``.

    Returns:
        The value is the median over runs of the sum over layers, seconds. ``extra``: ``times`` [repeats]; ``prefill``
        [repeats], the whole reading in the same runs; ``share``, the median of their ratio; ``peak``, ``cache``;
        ``floor``: the slots' bytes read once and the kept ones written.
    """
    model, ids, variant = setup.load(), setup.tokens(length), Variant.parse(label)
    free()

    def run() -> tuple[CompressedCache, Callable[[], float]]:
        cache = _cache(model, variant, budget)
        inside = _time_compress(cache, model.device)
        kvrepro.prefill(model, ids, cache)
        return cache, inside

    (cache, _), peak = peak_bytes(run, model.device)
    shape, held = Shape.of(model), _cache_bytes(cache)
    del cache
    within, whole = [], []
    for _ in range(repeats):
        found: list[Callable[[], float]] = []
        whole.append(seconds_of(lambda found=found: found.append(run()[1]), model.device))
        within.append(found[0]())
    times, total = torch.tensor(within, dtype=torch.float64), torch.tensor(whole, dtype=torch.float64)
    extra = {"prefill": total, "share": float((times / total).median()), "peak": peak, "cache": held}
    return _median(times, {**extra, **Work(0.0, float(shape.slot * length + held)).floor(setup)})


def _time_compress(cache: CompressedCache, device: torch.device) -> Callable[[], float]:
    """Time every ``compress`` of a cache's layers from now on; the function returned gives their sum in seconds."""
    clock = Clock(device)

    def timed(compress: Callable[[Any, Any], None], slots: object, step: object) -> None:
        clock.mark()
        compress(slots, step)
        clock.mark()

    for layer in cache.compressed:
        layer.compress = partial(timed, layer.compress)
    return lambda: float(clock.seconds()[::2].sum())


def decode(
    setup: Setup,
    slots: int | Sequence[int],
    methods: str | Sequence[str],
    *,
    batch: int | Sequence[int] = 1,
    compile: bool | Sequence[bool] = False,
    steps: int = 64,
    blocks: int = 3,
    peers: bool = True,
    generate: str | Sequence[str] = (),
) -> list[Record]:
    """Time a token while decoding.

    Args:
        setup: model and device.
        slots: slots per KV head and layer; for the full cache, tokens of the context.
        methods: methods or variants, run by :class:`kvrepro.decode.Decoder`.
        batch: rows decoded side by side, all from one prompt.
        compile: whether the model is compiled too.
        steps: tokens of a block; a method that frees slots now and then is timed over whole cycles of that.
        blocks: blocks that are timed, after the :data:`SKIPPED` steps (and two cycles).
        peers: measure transformers' ``generate`` over its full cache of as many tokens.
        generate: methods run by transformers' ``generate`` over the package's cache.

    Returns:
        One record a number of slots, batch, method and way of running, see :func:`_decode`.
    """
    ways: list[tuple[str, str | None, bool]] = []
    if peers:
        ways.append(("full", TRANSFORMERS, False))
    ways += [(variant.label, PLAIN_GENERATE, False) for variant in parse_variants(generate)]
    ways += [(v.label, None, bool(flag)) for flag in as_list(compile) for v in parse_variants(methods)]
    jobs: list[Job] = []
    for rows, size, (label, peer, compiled) in product(as_list(batch), as_list(slots), ways):
        same = {"slots": size, "batch": rows, "steps": steps, "blocks": blocks, "compile": compiled}
        named = {} if peer is None else {"peer": peer}
        cell = setup.cell("decode", "time per token", "ms", method=label, budget=size, **same, **named)
        jobs.append((cell, partial(_decode, setup, label, peer, size, rows, compiled, steps, blocks)))
    return sweep(jobs, "decode")


def _decode(
    setup: Setup, label: str, peer: str | None, slots: int, rows: int, compiled: bool, steps: int, blocks: int
) -> Value:
    """Decode ``blocks`` blocks of ``steps`` tokens.

    Returns:
        The value is the median over blocks of the time a step took, milliseconds; a step gives one token a row.
        ``extra``: ``times`` [blocks], ms; ``first``, seconds before the timed steps (compiling, capturing);
        ``graphed``, whether they were; ``cycle``, steps from one compression to the next; ``peak``, bytes of the cache
        and of what the steps add to it at the most, on a CPU in one cycle; ``cache``, bytes after the last step;
        ``floor``, in ms.
    """
    _decode_before(setup)
    return _decode_now(setup, label, peer, slots, rows, compiled, steps, blocks)


@cache
def _decode_before(setup: Setup) -> None:
    """Decode something that does not count, on a GPU: what a process decodes first may take 7 % less time.

    That was seen on an H100 for the same method, first and later. Why, we do not know.
    """
    if setup.place.type == "cuda":
        _decode_now(setup, "streaming_llm", None, 256, 1, False, 16, 1)


def _decode_now(
    setup: Setup, label: str, peer: str | None, slots: int, rows: int, compiled: bool, steps: int, blocks: int
) -> Value:
    """:func:`_decode`, whatever was decoded before."""
    model, variant = setup.load(), Variant.parse(label)
    free()
    cycle = 1 if peer == TRANSFORMERS else _cycle(variant, slots)
    steps = -(-steps // cycle) * cycle
    skipped = SKIPPED[model.device.type] + (2 * cycle if cycle > 1 else 0)
    taken = skipped + steps * blocks
    ids = setup.tokens(slots if variant.method == "full" else slots + OVER)

    def read() -> Any:
        if peer == TRANSFORMERS:
            return _repeated(_read_plain(model, ids[:, :-1]), rows)
        known = ids if peer is None else ids[:, :-1]
        return _repeated(read_prompt(model, known, variant, slots, None), rows)

    def write(cache: Any, count: int) -> tuple[Clock, float, bool]:
        if peer is None:
            return _decoded(model, cache, rows, count, compiled, skipped)
        with as_transformers(model) if peer == TRANSFORMERS else nullcontext():
            return _generated(model, ids, cache, rows, count, skipped)

    cache, on_cpu = read(), model.device.type == "cpu"
    before = _cache_bytes(cache)
    watched = SKIPPED["cpu"] + cycle if on_cpu else taken
    (clock, first, graphed), peak = peak_bytes(partial(write, cache, watched), model.device)
    if on_cpu:  # watching takes several times as long as the steps
        cache = read()
        clock, first, graphed = write(cache, taken)
    times = 1000 * clock.seconds()[skipped - 1 :][: steps * blocks].view(blocks, steps).mean(dim=1)
    held = _cache_bytes(cache)
    floor = Shape.of(model).step(rows, held).floor(setup)
    extra = {"peak": before + peak, "cache": held, "first": first, "graphed": graphed, "cycle": cycle}
    return _median(times, {**extra, **floor, "floor": 1000 * floor["floor"]})


def _cycle(variant: Variant, slots: int) -> int:
    """Steps from one compression to the next, where a method frees several slots at a time."""
    if variant.method == "full":
        return 1
    method = registry.create(variant.method, **variant.options).resolve(slots)
    leaves = method.leaves(slots)
    return 1 if leaves is None else slots + 1 - leaves


def _repeated(cache: Any, rows: int) -> Any:
    """The cache of one prompt, for ``rows`` rows."""
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    return cache


def _decoded(
    model: PreTrainedModel, cache: CompressedCache, rows: int, steps: int, compiled: bool, skipped: int
) -> tuple[Clock, float, bool]:
    """Take ``steps`` greedy steps over a cache that has read its prompt: their ends, the start-up, whether captured."""
    clock, start = Clock(model.device), time.perf_counter()
    token = torch.zeros(rows, dtype=torch.long, device=model.device)
    with Decoder(model, cache, room=steps, compile=compiled) as decoder:

        def body() -> None:
            token.copy_(decoder.logits(token).argmax(dim=-1))

        decoder.run(body, steps, progress=clock.mark)
        return clock, _first(clock, start, skipped), decoder.graphed


def _first(clock: Clock, start: float, skipped: int) -> float:
    """Seconds from ``start`` to the first timed step, once all steps are done."""
    timed = float(clock.seconds()[skipped - 1 :].sum())
    return max(0.0, time.perf_counter() - start - timed)


class _Marks(StoppingCriteria):
    """Marks the end of each step of ``generate``."""

    def __init__(self, clock: Clock) -> None:
        """Marks go to ``clock``."""
        self.clock = clock

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        """Mark, and never stop."""
        self.clock.mark()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def _generated(
    model: PreTrainedModel, ids: Tensor, cache: Any, rows: int, steps: int, skipped: int
) -> tuple[Clock, float, bool]:
    """Let transformers write ``steps`` tokens after ``ids`` ``[1, L]``, all but the last of them being in the cache."""
    clock, start = Clock(model.device), time.perf_counter()
    model.generate(
        input_ids=ids.expand(rows, -1),
        attention_mask=torch.ones_like(ids).expand(rows, -1),
        past_key_values=cache,
        max_new_tokens=steps,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([_Marks(clock)]),
    )
    return clock, _first(clock, start, skipped), False


def throughput(
    setup: Setup,
    length: int,
    methods: str | Sequence[str],
    *,
    budget: int | float = 0.25,
    limit: int = 1024,
    steps: int = 32,
    chunk: int | None = None,
    peers: bool = True,
) -> list[Record]:
    """The most rows that decode side by side, and the tokens a second they give.

    Args:
        setup: model and device.
        length: tokens of the context; every row has the same one, read once.
        methods: methods or variants, run by :class:`kvrepro.decode.Decoder`.
        budget: slots per KV head and layer, or a share of the context.
        limit: rows that are tried at most.
        steps: timed steps.
        chunk: tokens of the context read at a time.
        peers: measure transformers' full cache too.

    Returns:
        One record a method, see :func:`_throughput`.
    """
    same = {"length": length, "limit": limit, "steps": steps}
    jobs: list[Job] = []
    if peers:
        cell = setup.cell("throughput", "tokens per second", "tokens/s", peer=TRANSFORMERS, chunk=None, **same)
        jobs.append((cell, partial(_throughput, setup, None, length, budget, limit, steps, chunk)))
    for variant in parse_variants(methods):
        cell = setup.cell(
            "throughput", "tokens per second", "tokens/s", method=variant, budget=budget, chunk=chunk, **same
        )
        jobs.append((cell, partial(_throughput, setup, variant.label, length, budget, limit, steps, chunk)))
    return sweep(jobs, "throughput")


def _throughput(
    setup: Setup, label: str | None, length: int, budget: int | float, limit: int, steps: int, chunk: int | None
) -> Value:
    """Search the largest batch and time it.

    Returns:
        The value is rows over the median time of a step. ``extra``: ``batch``, the rows; ``tried``, ``[rows, fits]``
        pairs in order; ``times`` [steps], seconds; ``row``, bytes of one row's cache; ``cache``; ``floor``, seconds of
        a step, and what it was counted from.
    """
    model, ids = setup.load(), setup.tokens(length)
    free()

    def read() -> Any:
        return (
            _read_plain(model, ids) if label is None else read_prompt(model, ids, Variant.parse(label), budget, chunk)
        )

    def attempt(rows: int) -> tuple[Tensor, int] | None:
        try:
            return _batch_step(model, _repeated(read(), rows), rows, steps, ids)
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
            return None

    row = _cache_bytes(read())
    rows, tried, (times, held) = largest_batch(attempt, _estimate(model.device, row, limit), limit)
    floor = Shape.of(model).step(rows, held).floor(setup)
    extra = {"batch": rows, "tried": tried, "times": times, "row": row, "cache": held, **floor}
    rates = rows / times
    return Value(float(rates.median()), 1.25 * float(rates.std()) / len(times) ** 0.5, len(times), extra)


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an error is, or came of, running out of memory: a capture that is cut short raises one of its own."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _batch_step(model: PreTrainedModel, cache: Any, rows: int, steps: int, ids: Tensor) -> tuple[Tensor, int]:
    """Times ``[steps]`` of one step of ``rows`` rows in seconds, and the bytes of the cache."""
    skipped = SKIPPED[model.device.type]
    if isinstance(cache, CompressedCache):
        clock, _, _ = _decoded(model, cache, rows, skipped + steps, False, skipped)
    else:
        clock = _loop(model, cache, rows, skipped + steps, ids)
    return clock.seconds()[skipped - 1 :][:steps], _cache_bytes(cache)


@torch.no_grad()
def _loop(model: PreTrainedModel, cache: Any, rows: int, steps: int, ids: Tensor) -> Clock:
    """Take greedy steps with the model's plain forward pass."""
    clock = Clock(model.device)
    token = ids[:, -1:].expand(rows, 1)
    plain = not isinstance(cache, CompressedCache)
    with as_transformers(model) if plain else nullcontext():
        for _ in range(steps):
            logits = model(input_ids=token, logits_to_keep=1, **cache_arguments(model, cache)).logits
            token = logits[:, -1:].argmax(dim=-1)
            clock.mark()
    return clock


def _estimate(device: torch.device, row: int, limit: int) -> int:
    """Rows whose caches fill nine tenths of the memory that is free now, at least 1 and at most ``limit``."""
    if device.type != "cuda":
        return limit
    free()
    return max(1, min(limit, int(0.9 * torch.cuda.mem_get_info(device)[0] / row)))


def largest_batch(
    attempt: Callable[[int], Any | None], guess: int, limit: int
) -> tuple[int, list[tuple[int, bool]], Any]:
    """The largest batch that fits, to within a sixteenth: from a guess up by halves, or down, then bisected.

    Args:
        attempt: measures a batch; None where it does not fit.
        guess: batch to begin with.
        limit: largest batch to try.

    Returns:
        The batch, what was tried (batch, whether it fits), and what ``attempt`` gave for the batch.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    fits, fails, best, tried = 0, limit + 1, None, []
    rows = max(1, min(guess, limit))
    while fails - fits > max(1, fits // 16):
        found = attempt(rows)
        free()
        tried.append((rows, found is not None))
        if found is None:
            fails = rows
        else:
            fits, best = rows, found
        grown = fits + max(1, fits // 2) if fits else 3 * rows // 4
        rows = max(1, min(grown, (fits + fails) // 2 if fits else grown))
    if best is None:
        raise torch.OutOfMemoryError(f"not even one row fits: tried batches of {[r for r, _ in tried]}")
    return fits, tried, best


def perplexity(
    setup: Setup,
    methods: str | Sequence[str],
    *,
    budget: int = 256,
    window: int = 2048,
    rows: int = 128,
    plain_steps: int = 64,
    repeats: int = 3,
) -> list[Record]:
    """Tokens a second of streaming perplexity, beside the plain loop that reads token by token, text by text.

    Args:
        setup: model and device.
        methods: methods or variants.
        budget: slots per KV head and layer.
        window: tokens a window.
        rows: windows read side by side.
        plain_steps: tokens the plain loop is timed over, after the budget is full.
        repeats: timed runs after one that warms up.

    Returns:
        Two records a method, the second one of the plain loop; see :func:`_perplexity` and :func:`_plain_loop`.
    """
    same: dict[str, object] = {"window": window, "repeats": repeats}
    jobs: list[Job] = []
    for variant in parse_variants(methods):
        named = partial(setup.cell, "perplexity", "tokens per second", "tokens/s", method=variant, budget=budget)
        jobs.append(
            (named(batch=rows, **same), partial(_perplexity, setup, variant.label, budget, window, rows, repeats))
        )
        cell = named(batch=1, steps=plain_steps, peer=PLAIN_LOOP, **same)
        jobs.append((cell, partial(_plain_loop, setup, variant.label, budget, plain_steps, repeats)))
    return sweep(jobs, "perplexity")


def _perplexity(setup: Setup, label: str, budget: int, window: int, rows: int, repeats: int) -> Value:
    """Read ``rows`` windows side by side, each token scored after half of the window.

    Returns:
        The value is the tokens read a second in all. ``extra``: ``times`` [repeats], seconds; ``peak``; ``floor``, the
        seconds that the steps after the budget need, each reading weights and caches once.
    """
    model, variant = setup.load(), Variant.parse(label)
    free()
    ids = setup.tokens(window, rows)

    def run() -> None:
        kvrepro.perplexity(
            model, ids, variant.method, budget, window=window, stride=window // 2, batch_size=rows, **variant.options
        )

    _, peak = peak_bytes(run, model.device)
    times = torch.tensor([seconds_of(run, model.device) for _ in range(repeats)], dtype=torch.float64)
    shape = Shape.of(model)
    one = shape.step(rows, rows * budget * shape.slot)
    steps = max(1, window - budget)
    extra = {"times": times, "peak": peak, **Work(steps * one.flops, steps * one.bytes).floor(setup)}
    return _rates(rows * window / times, extra)


def _plain_loop(setup: Setup, label: str, budget: int, steps: int, repeats: int) -> Value:
    """One text, one token a forward pass, over the package's cache once its budget is full.

    Returns:
        The value is the tokens read a second. ``extra``: ``times`` [repeats], seconds of ``steps`` tokens; ``peak``;
        ``floor``, the seconds that reading the weights and the cache ``steps`` times takes.
    """
    model, variant = setup.load(), Variant.parse(label)
    free()
    ids = setup.tokens(budget + 1)
    cache = read_prompt(model, ids, variant, budget, None)
    _, peak = peak_bytes(partial(_loop, model, cache, 1, SKIPPED[model.device.type], ids), model.device)
    times = [seconds_of(partial(_loop, model, cache, 1, steps, ids), model.device) for _ in range(repeats)]
    shape = Shape.of(model)
    one = shape.step(1, budget * shape.slot)
    extra = {"times": times, "peak": peak, **Work(steps * one.flops, steps * one.bytes).floor(setup)}
    return _rates(steps / torch.tensor(times, dtype=torch.float64), extra)


def _rates(rates: Tensor, extra: dict[str, Any]) -> Value:
    """The median of ``rates`` ``[n]`` with its standard error."""
    error = 1.25 * float(rates.std()) / len(rates) ** 0.5 if len(rates) > 1 else None
    return Value(float(rates.median()), error, len(rates), extra)


# --- kvpress, in an environment of its own --------------------------------------------------------------------------

#: The method of this package that is nearest to each of kvpress's, by the name its cells carry.
PRESSES = {"snapkv": "snapkv", "observed_attention": "h2o", "streaming_llm": "streaming_llm"}


@dataclass(frozen=True)
class Kvpress:
    """Where kvpress can be run: it needs an older transformers than this package.

    Attributes:
        script: the program that measures it and prints a JSON line a measurement.
        python: an interpreter, or None where there is none.
        path: a folder to put before the interpreter's packages, or None.
    """

    script: str
    python: str | None = None
    path: str | None = None

    def run(self, *arguments: str, timeout: float = 3600.0) -> list[dict[str, Any]]:
        """What the program printed, a mapping a line.

        Raises:
            Skip: it cannot be run here.
            RuntimeError: it failed; the message ends as its own does.
        """
        if self.python is None:
            raise Skip("no environment with kvpress was given (--kvpress-python or --kvpress-path)")
        command = [self.python, "-P", self.script, *arguments]  # without the script's folder among the packages
        environment = os.environ | ({} if self.path is None else {"PYTHONPATH": self.path})
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
            )
        except OSError as error:
            raise Skip(f"the interpreter for kvpress cannot be run: {error}") from error
        if done.returncode:
            raise RuntimeError(f"{Path(self.script).name} failed: {done.stderr.strip()[-400:]}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] or [{}]

    @lru_cache(maxsize=4)  # noqa: B019 - a frozen dataclass of strings
    def version(self) -> str | None:
        """The version that is there, or None."""
        try:
            return str(self.run("--version", timeout=300)[0]["kvpress"])
        except (Skip, RuntimeError, KeyError, subprocess.TimeoutExpired):
            return None


def kvpress(
    setup: Setup,
    lengths: int | Sequence[int],
    presses: str | Sequence[str],
    peer: Kvpress,
    *,
    ratio: float = 0.75,
    repeats: int = 3,
    steps: int = 32,
) -> list[Record]:
    """Time and memory of the same with kvpress, in a process of its own.

    Args:
        setup: model and device.
        lengths: tokens of the prompts, read at once.
        presses: keys of :data:`PRESSES`.
        peer: where kvpress is.
        ratio: share of the slots that is removed.
        repeats: timed runs after one that warms up.
        steps: tokens decoded after the prompt, for the time a token takes.

    Returns:
        Two records a length and press: ``prefill time`` (s) and ``time per token`` (ms), with the program's versions in
        ``extra``; ``skipped`` where there is no kvpress.
    """
    version = peer.version()
    jobs: list[Job] = []
    asked = tuple(as_list(lengths)), tuple(as_list(presses))
    for length, press in product(*asked):
        name = f"kvpress {press}" if version is None else f"kvpress {version} {press}"
        same = {"length": length, "chunk": None, "batch": 1, "repeats": repeats, "peer": name}
        for experiment, metric, unit, more in (
            ("prefill", "prefill time", "s", {}),
            ("decode", "time per token", "ms", {"steps": steps}),
        ):
            cell = setup.cell(
                experiment, metric, unit, method=PRESSES[press], budget=1 - ratio,
                options={"compression_ratio": ratio}, **same, **more,
            )  # fmt: skip
            run = partial(_kvpress, setup, peer, *asked, ratio, repeats, steps)
            jobs.append((cell, partial(run, length, press, metric)))
    return sweep(jobs, "kvpress")


def _kvpress(
    setup: Setup,
    peer: Kvpress,
    lengths: tuple[int, ...],
    presses: tuple[str, ...],
    ratio: float,
    repeats: int,
    steps: int,
    length: int,
    press: str,
    metric: str,
) -> Value:
    """One measurement of the peer's program; ``extra`` as in :func:`_prefill` and ``versions``."""
    rows = _kvpress_rows(setup, peer, lengths, presses, ratio, repeats, steps)
    row = next((row for row in rows if (row.get("length"), row.get("press")) == (length, press)), rows[-1])
    if "oom" in row:
        raise torch.OutOfMemoryError(row["oom"])
    if "error" in row:
        raise RuntimeError(row["error"])
    shape = Shape.of(_outline(setup))
    extra = {"peak": row["peak"], "weights": shape.weights, "cache": row["cache"], "versions": row["versions"]}
    if metric == "prefill time":
        times = torch.tensor(row["times"], dtype=torch.float64)
        return _median(times, {**extra, **shape.reading(length, None, length).floor(setup)})
    floor = shape.step(1, row["cache"]).floor(setup)
    times = 1000 * torch.tensor(row["steps"], dtype=torch.float64)
    return _median(times, {**extra, **floor, "floor": 1000 * floor["floor"]})


def _outline(setup: Setup) -> PreTrainedModel:
    """The model without any weights, for its sizes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(models.shape(setup.shape), dtype=setup.number)


@lru_cache(maxsize=1)
def _kvpress_rows(
    setup: Setup,
    peer: Kvpress,
    lengths: tuple[int, ...],
    presses: tuple[str, ...],
    ratio: float,
    repeats: int,
    steps: int,
) -> list[dict[str, Any]]:
    """Everything the peer's program measures, in one run; the model here is let go first, both need the memory."""
    ceilings(setup)
    release()
    request = {
        "config": dict(models.SHAPES[setup.shape]),
        "device": str(setup.place),
        "dtype": str(setup.number).removeprefix("torch."),
        "seed": setup.seed,
        "lengths": lengths,
        "presses": presses,
        "ratio": ratio,
        "repeats": repeats,
        "steps": steps,
    }
    try:
        return peer.run("--request", json.dumps(request))
    except (RuntimeError, subprocess.TimeoutExpired) as error:  # once, not again for every cell
        return [{"error": str(error)}]
