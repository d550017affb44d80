"""Time one-shot compression of one layer: `python benchmarks/merging.py [--length 32768] [--share 0.25]`.

Prints for each method the median time of `compress`, the share of a layer's part of Llama-3.1-8B's prefill (1411 ms at
32k over 32 layers on an H100), peak extra memory, the costliest kernels, and the error of the kernels beside the twins'
at a smaller length. `--sweep` times tiles of the nearest-key kernel, beside its twin, and the sums' chunks.

Estimate at 32,768 slots -> 8,192 on an H100, counted and not measured (`kernels.merging` has the floors): launches of
small vectors, 2.5 us each, and kernels that read keys or values or sort.

| | launches | small vectors | the others | ms |
|---|---|---|---|---|
| h2o | 26 | 0.05 | choice 0.04, gathers 0.06 | 0.15 |
| kvmerger | 101 | 0.21 | choices 0.07, neighbours 0.03, distance 0.04, sums 0.10 | 0.45 |
| d2o | 33 | 0.04 | choice 0.04, packing 0.01, nearest 0.7 to 0.85, sort 0.07, sums 0.12 | 1.0 to 1.15 |
| keepkv | 35 | 0.04 | the same and projection 0.03 | 1.0 to 1.2 |
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from kvrepro import kernels, methods
from kvrepro.attention import Step
from kvrepro.methods import Method, d2o, keepkv
from kvrepro.slots import Slots, partition, top

METHODS = ("h2o", "weightedkv", "kvmerger", "d2o", "keepkv")
HEADS, GROUP, DIM = 8, 4, 128
PREFILL_MS = 1411 / 32  # a layer's part of the prefill at 32k


def random_slots(length: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Slots, Step]:
    """A dense layer whose neighbouring keys are alike (0.8 on average, less in some stretches), and a step."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, generator=generator, device=device)

    noise = normal(1, HEADS, length, DIM)
    window = torch.hann_window(8, periodic=False, device=device).view(1, 1, -1)
    smooth = torch.nn.functional.conv1d(noise.transpose(2, 3).reshape(-1, 1, length), window, padding=4)[..., :length]
    smooth = smooth.view(1, HEADS, DIM, length).transpose(2, 3)
    keys = smooth + normal(1, HEADS, length, 1).abs() * 0.5 * noise
    # As a model lays them out: the heads of a token side by side.
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2).to(dtype) for x in (keys, normal(*keys.shape)))
    positions = torch.arange(length, dtype=torch.int32, device=device).expand(1, HEADS, -1).contiguous()
    mass = normal(1, HEADS, length).exp()
    count = (length - positions).float()
    slots = Slots(keys, values, positions, torch.ones_like(positions), stats={"mass": mass, "count": count})
    queries = normal(1, HEADS, GROUP, 2, DIM).to(dtype)
    return slots, Step(queries, positions[:, 0, -2:], scale=DIM**-0.5)


def prepared(name: str, slots: Slots, step: Step, budget: int) -> tuple[Method, Slots, Step]:
    """A method, and what it is given."""
    method = methods.create(name).resolve(budget)
    slots = dataclasses.replace(slots, stats={side: slots.stats[side] for side in method.accumulates})
    return method, slots, dataclasses.replace(step, cardinality_bias=method.cardinality_bias, budget=budget)


def milliseconds(run: Callable[[], object], device: str, times: int = 20) -> float:
    """Median time of a run on the device, after three to warm up."""
    found = []
    for i in range(times + 3):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            spent = start.elapsed_time(end)
        else:
            begin = time.perf_counter()
            run()
            spent = 1000 * (time.perf_counter() - begin)
        found.extend([spent] if i >= 3 else [])
    return statistics.median(found)


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """The run as a CUDA graph: the time of its kernels alone, and a proof that nothing waits for the host."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def profile(run: Callable[[], object], device: str, most: int) -> tuple[int, float, list[str]]:
    """Kernels of one run (operators on a CPU): how many, their summed time in ms, and the costliest ones."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorder:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    kind = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    events = [e for e in recorder.events() if e.device_type == kind]
    spent: dict[str, list[float]] = {}
    for event in events:
        us = event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
        spent.setdefault(event.name, []).append(us)
    costly = sorted(spent.items(), key=lambda entry: -sum(entry[1]))[:most]
    lines = [f"    {sum(us):8.1f} us  {len(us):3d} x  {name[:90]}" for name, us in costly]
    return len(events), sum(map(sum, spent.values())) / 1000, lines


def error(name: str, share: float, length: int, dtype: torch.dtype, device: str) -> str:
    """Relative error of keys and values against float64, with kernels and without."""
    slots, step = random_slots(length, dtype, device, seed=1)
    method, slots, step = prepared(name, slots, step, int(share * length))
    found = [method.compress(slots, step.budget, step)]
    with mock.patch.object(kernels, "covers", lambda *tensors: False):
        found.append(method.compress(slots, step.budget, step))
        wide = dataclasses.replace(slots, keys=slots.keys.double(), values=slots.values.double())
        exact = method.compress(wide, step.budget, dataclasses.replace(step, queries=step.queries.double()))
    same = [float((x.positions == exact.positions).float().mean()) for x in found]
    texts = [f"same slots {same[0]:.4f}, twin {same[1]:.4f}"]
    for side in ("keys", "values"):
        want = getattr(exact, side)
        off = [float((getattr(x, side).double() - want).norm() / want.norm()) for x in found]
        texts.append(f"{side} {off[0]:.2e}, twin {off[1]:.2e}")
    return "; ".join(texts)


def report(name: str, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Measure one method and print it."""
    budget = int(args.share * args.length)
    method, slots, step = prepared(name, *random_slots(args.length, dtype, args.device), budget)

    def run() -> Slots:
        """What is timed."""
        return method.compress(slots, budget, step)

    ms = milliseconds(run, args.device, args.times)
    extra = ""
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        extra = f", peak extra {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"
        try:
            extra += f", as a CUDA graph {milliseconds(graphed(run), args.device, args.times):.3f} ms"
        except RuntimeError as problem:
            extra += f", no CUDA graph: {str(problem).splitlines()[0]}"
    count, busy, lines = profile(run, args.device, 10)
    print(f"{name}: {ms:.3f} ms ({100 * ms / PREFILL_MS:.1f} % of a 32k prefill){extra}")
    print(f"  {count} kernels, {busy:.3f} ms in them; {error(name, args.share, args.check, dtype, args.device)}")
    print("\n".join(lines), flush=True)


#: Evicted and kept slots of a tile, warps, stages.
NEAREST = (
    (128, 128, 8, 2), (128, 128, 8, 3), (128, 128, 4, 2), (256, 128, 8, 2), (256, 128, 16, 2), (128, 64, 4, 3),
    (128, 256, 8, 2), (64, 128, 4, 2),
)  # fmt: skip
#: Members of a chunk and warps of `_sums`.
SUMS = ((64, 8), (32, 8), (32, 4))


def sweep(args: argparse.Namespace, dtype: torch.dtype) -> None:
    """Time the parts of D2O's and KeepKV's compression, and what can be chosen in them."""
    from kvrepro.kernels import merging

    slots, _ = random_slots(args.length, dtype, args.device)
    budget = int(args.share * args.length)

    def timed(run: Callable[[], object], **config: object) -> float | str:
        """Milliseconds with these entries of `CONFIG`, or why not: a tile that the compiler or the card refuses."""
        try:
            with mock.patch.dict(merging.CONFIG, config):
                return milliseconds(run, args.device, args.times)
        except Exception as problem:
            return f"{type(problem).__name__} {str(problem)[:60]}"

    keep = top(slots.stats["mass"], slots.valid, budget)
    print("top", timed(lambda: top(slots.stats["mass"], slots.valid, budget)), "ms")
    print("partition", timed(lambda: partition(keep)), "ms")
    gone, kept = partition(keep)[0].split([args.length - budget, budget], dim=2)
    with mock.patch.object(kernels, "covers", lambda *tensors: False):
        want, best = d2o.nearest_kept(slots.keys, gone, kept, None)
    flops = 2 * HEADS * DIM * gone.shape[2] * kept.shape[2]
    found: dict[str, Tensor] = {}

    def nearest() -> None:
        """What is timed."""
        found["similarity"], found["index"] = merging.nearest(slots.keys, gone, kept, None)

    for queries, width, warps, stages in NEAREST:
        ms = timed(nearest, queries=queries, kept=width, nearest_warps=warps, nearest_stages=stages)
        text = f"nearest, {queries} x {width}, {warps} warps, {stages} stages"
        if isinstance(ms, str):
            print(f"{text}: {ms}", flush=True)
            continue
        same = float((found["index"] == best).float().mean())
        lost = want - found["similarity"]
        print(
            f"{text}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s; same place {same:.5f}, cosine lost at most "
            f"{float(lost.max()):.1e}, norm {float(lost.norm() / want.norm()):.1e}",
            flush=True,
        )
    plan = d2o.evict(slots, keep, budget)
    old = torch.full((1, HEADS), torch.nan, device=args.device)
    logits = torch.randn(slots.positions.shape, device=args.device)
    for chunk, warps in SUMS:
        means = timed(lambda: d2o.merge(slots, plan, old, 0.5), chunk=chunk, mix_warps=warps)
        votes = timed(lambda: keepkv.merge(slots, plan, logits, 0.8), chunk=chunk, mix_warps=warps)
        print(f"settle, sort and sums, chunk {chunk}, {warps} warps: d2o {means} ms, keepkv {votes} ms", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--check", type=int, default=2048, help="length at which the error is measured")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    args.check = min(args.check, args.length)
    dtype = getattr(torch, args.dtype)
    with torch.no_grad():
        for name in args.methods:
            report(name, args, dtype)
        if args.sweep:
            sweep(args, dtype)


if __name__ == "__main__":
    main()
