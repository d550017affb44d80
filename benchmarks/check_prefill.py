"""Whether the kernels on a GPU compute what their twins do: attention, statistics, every method's merge, whole prompts.

Run from the repository's root on a machine with a GPU: ``python -m benchmarks.check_prefill``. One line a check; the
exit code is the number of failures. The tests run the same kernels in Triton's interpreter; this runs what the compiler
makes of them, and PyTorch's own fused attention, whose log-sum-exp the statistics rest on.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import Tensor

import kvrepro
from benchmarks.check_decode import VOCABULARY, tiny
from kvrepro import attention, evaluate, kernels, methods
from kvrepro.attention import Step
from kvrepro.cache import CompressedCache
from kvrepro.rope import Rotation
from kvrepro.slots import Slots

DTYPES = (torch.float32, torch.bfloat16)
#: Head size, query heads a KV head, queries, slots.
SHAPES = ((64, 3, 300, 300), (128, 4, 512, 512), (128, 4, 200, 900), (256, 1, 130, 400))
LENGTH, BUDGET, CHUNK = 480, 96, 24


@contextmanager
def twins() -> Iterator[None]:
    """Inside, no kernel is used."""
    covers = kernels.covers
    kernels.covers = lambda *tensors: False
    try:
        yield
    finally:
        kernels.covers = covers


def problem(
    device: torch.device, dtype: torch.dtype, d: int, group: int, n: int, size: int, merged: bool
) -> tuple[Step, Slots]:
    """A pass of n queries over `size` random slots; `merged` ones have cardinalities and in-cache positions."""
    b, h = 2, 2
    positions = torch.arange(size, device=device, dtype=torch.int32).expand(b, h, size)
    positions = (2 * positions if merged else positions).contiguous()
    counts = torch.randint(1, 4, (b, 1, size), device=device, dtype=torch.int32).expand(b, h, size)
    slots = Slots(
        keys=torch.randn(b, h, size, d, device=device).to(dtype),
        values=torch.randn(b, h, size, d, device=device).to(dtype),
        positions=positions,
        cardinality=(counts if merged else torch.ones_like(counts)).contiguous(),
        stats={name: torch.rand(b, h, size, device=device) for name in ("mass", "count", "last", "alpha", "h")},
        dense=not merged,
    )
    step = Step(
        queries=torch.randn(b, h, group, n, d, device=device).to(dtype),
        query_positions=positions[:, 0, -n:],
        scale=d**-0.5,
        positions="cardinality" if merged else "original",
        cardinality_bias=merged,
        rotation=Rotation(100.0 ** -(torch.arange(0, d, 2, device=device) / d)),
        window_queries=None,
    )
    return step, slots


def error(ours: Tensor, truth: Tensor) -> float:
    """The norm of the difference over the norm of the truth."""
    return float((ours.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def check_attention(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """Output, column sums and last row, from errors against float64: at most twice the twin's, and a rounding."""
    for dtype, shape, merged in product(DTYPES, SHAPES, (False, True)):
        step, slots = problem(device, dtype, *shape, merged)
        with twins():
            theirs, their_found = attention.attend(step, slots, ("mass", "last"))
            exact = dataclasses.replace(step, queries=step.queries.double())
            wide = dataclasses.replace(slots, keys=slots.keys.double(), values=slots.values.double())
            truth, found = attention.attend(exact, wide, ("mass", "last"))
        ours, our_found = attention.attend(step, slots, ("mass", "last"))
        triples = [(ours, theirs, truth, torch.finfo(dtype).eps)]
        triples += [(our_found[name], their_found[name], found[name], 1e-6) for name in ("mass", "last")]
        errors = [(error(a, t), error(b, t), eps) for a, b, t, eps in triples]
        good = all(mine <= 2 * twin + eps for mine, twin, eps in errors)
        said = ", ".join(f"{mine:.1e} (twin {twin:.1e})" for mine, twin, _ in errors)
        yield f"attention {str(dtype)[6:]} {shape} {'merged' if merged else 'plain'}", good, said


def check_references(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """What queries behind all slots see of them, by cuDNN's attention where it takes them: squares of attention."""
    for dtype, (d, group, n, size) in product(DTYPES, SHAPES):
        step, slots = problem(device, dtype, d, group, n, size, merged=False)
        asked = dataclasses.replace(step, query_positions=step.query_positions + n, behind=True)
        with twins():
            exact = dataclasses.replace(asked, queries=asked.queries.double())
            wide = dataclasses.replace(slots, keys=slots.keys.double(), values=slots.values.double())
            truth, theirs = (attention.observe(*x, power=2).mass for x in ((exact, wide), (asked, slots)))
        mine = max(error(attention.observe(asked, slots, 2, output=told).mass, truth) for told in (True, False))
        twin = error(theirs, truth)
        flat = asked.queries.flatten(1, 2)
        by = "cuDNN" if attention._cudnn(flat, slots.keys, slots.values, causal=False) else "kernel"
        good = mine <= 2 * twin + 1e-5 and (by == "cuDNN" or dtype == torch.float32 or d > 128)
        yield f"references {str(dtype)[6:]} {(d, group, n, size)}, {by}", good, f"{mine:.1e} (twin {twin:.1e})"


def check_methods(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """Every method's compression of the same slots by kernels and by twins: which slots stay, and what they hold."""
    for name in methods.names():
        if name == "full":
            continue
        method = methods.create(name).resolve(BUDGET)
        step, slots = problem(device, torch.float32, 64, 3, 40, 256, merged=name in ("asymkv", "kvslimmer"))
        window = method.window_of(BUDGET)
        if window:
            step = dataclasses.replace(
                step, window_queries=step.queries[..., -window:, :], window_positions=step.query_positions[:, -window:]
            )
        none = torch.zeros_like(slots.positions, dtype=torch.float32)
        slots = dataclasses.replace(slots, stats={name: slots.stats.get(name, none) for name in method.accumulates})
        with warnings.catch_warnings(), twins():
            warnings.simplefilter("ignore")
            want = method.compress(slots, BUDGET, step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = method.compress(slots, BUDGET, step)
        same = float((ours.positions == want.positions).double().mean())
        errors = [error(getattr(ours, x), getattr(want, x).double()) for x in ("keys", "values")]
        yield f"{name}: compress", same == 1.0 and max(errors) < 1e-3, f"same slots {same:.4f}, errors {errors}"


def check_prompts(device: torch.device) -> Iterator[tuple[str, bool, str]]:
    """Whole prompts in chunks: chunks replayed from a graph, and read one by one, leave the same cache."""
    model = tiny(device)
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), device=device, generator=torch.Generator(device).manual_seed(0))
    for name in methods.names():
        caches = []
        for worth in (evaluate._WORTH, 1 << 30):
            before, evaluate._WORTH = evaluate._WORTH, worth
            try:
                cache = kvrepro.make_cache(model, name, BUDGET)
                logits = kvrepro.prefill(model, ids, cache, chunk=CHUNK).logits
            finally:
                evaluate._WORTH = before
            caches.append((cache, logits))
        (one, a), (other, b) = caches
        same = agreement(one, other)
        yield f"{name}: chunks", same > 0.999 and error(a, b.double()) < 1e-3, f"same slots {same:.4f}"


def agreement(one: CompressedCache, other: CompressedCache) -> float:
    """Share of the slots that stand for the same tokens."""
    pairs = zip(one.compressed, other.compressed, strict=True)
    return min(float((a.positions == b.positions).double().mean()) for a, b in pairs)


def main() -> int:
    """Check all, print a line each; returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("this check needs a GPU")
        return 1
    failed = 0
    torch.manual_seed(0)
    for check in (check_attention, check_references, check_methods, check_prompts):
        try:
            for name, good, said in check(device):
                failed += not good
                print(f"{'ok    ' if good else 'FAILED'} {name}: {said}", flush=True)
        except Exception as problem_found:
            failed += 1
            print(f"FAILED {check.__name__}: {type(problem_found).__name__}: {problem_found}", flush=True)
    print(f"{failed} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
