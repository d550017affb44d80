"""The kernels of whole prompts in Triton's interpreter, against their twins and against float64."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvrepro import attention, kernels, methods
from kvrepro.attention import Step
from kvrepro.methods import kvslimmer
from kvrepro.rope import Rotation
from kvrepro.slots import Slots, greedy_pairs

prefill = pytest.importorskip("kvrepro.kernels.prefill")
pairs_kernel = pytest.importorskip("kvrepro.kernels.pairs")

#: Head size, query heads a KV head, queries, slots, cap.
SHAPES = [(64, 1, 37, 90, None), (128, 8, 70, 70, 2.0), (256, 3, 5, 200, None), (16, 2, 33, 33, None)]


def problem(
    d: int, group: int, n: int, size: int, *, cap: float | None = None, ragged: bool = False, merged: bool = False
) -> tuple[Step, Slots]:
    """A pass of n queries over `size` slots in float64; the first row has empty slots in front where `ragged`."""
    b, h = 2, 2
    gaps = torch.rand(b, h, 3 * size).argsort(dim=2)[..., :size].sort(dim=2).values if merged else None
    positions = torch.arange(size).expand(b, h, size).clone() if gaps is None else gaps
    positions[..., size - n :] = 3 * size + torch.arange(n)
    cardinality = torch.randint(1, 4, (b, h, size)) if merged else torch.ones(b, h, size, dtype=torch.int64)
    empty = torch.zeros(b, h, size, dtype=torch.bool)
    if ragged:
        empty[0, :, : size - n + 2] = True  # two of the new tokens are padding as well
    queried = positions[:, 0, size - n :].masked_fill(empty[:, 0, size - n :], -1)
    slots = Slots(
        keys=torch.randn(b, h, size, d, dtype=torch.float64),
        values=torch.randn(b, h, size, d, dtype=torch.float64),
        positions=positions.masked_fill(empty, -1).int(),
        cardinality=cardinality.masked_fill(empty, 0).int(),
        dense=not merged,
        ragged=ragged,
    )
    step = Step(
        queries=torch.randn(b, h, group, n, d, dtype=torch.float64),
        query_positions=queried.int(),
        scale=d**-0.5,
        softcap=cap,
        positions="cache" if merged else "original",
        cardinality_bias=merged,
        rotation=Rotation(100.0 ** -(torch.arange(0, d, 2) / d)),
    )
    return step, slots


def cast(step: Step, slots: Slots, dtype: torch.dtype) -> tuple[Step, Slots]:
    """The same in another type."""
    return (
        dataclasses.replace(step, queries=step.queries.to(dtype)),
        dataclasses.replace(slots, keys=slots.keys.to(dtype), values=slots.values.to(dtype)),
    )


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels take what lies on the CPU, and give them memory full of NaN to write into."""
    monkeypatch.setattr(kernels, "covers", lambda *tensors: tensors[0].dtype != torch.float64)
    monkeypatch.setattr(attention, "_cudnn", lambda *tensors: False)
    empty = torch.Tensor.new_empty

    def poisoned(self: Tensor, *shape: int, **how: Any) -> Tensor:
        """`new_empty`, full of NaN."""
        x = empty(self, *shape, **how)
        return x.fill_(torch.nan) if x.is_floating_point() else x

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


def no_worse(ours: Tensor, twin: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Our error is at most twice the twin's at the same precision, and one unit in the last place."""
    assert torch.isfinite(ours).all()
    grain = torch.finfo(dtype).eps * float(truth.norm())
    assert float((ours - truth).norm()) <= 2 * float((twin - truth).norm()) + grain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("ragged", "merged"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("d", "group", "n", "size", "cap"), SHAPES)
def test_output_and_statistics(
    d: int,
    group: int,
    n: int,
    size: int,
    cap: float | None,
    ragged: bool,
    merged: bool,
    dtype: torch.dtype,
    request: pytest.FixtureRequest,
) -> None:
    torch.manual_seed(d + n)
    low = cast(*problem(d, group, n, size, cap=cap, ragged=ragged, merged=merged), dtype)
    exact = cast(*low, torch.float64)
    want, found = attention.attend(*exact, ("mass", "last"))
    theirs, their_found = attention.attend(*low, ("mass", "last"))
    request.getfixturevalue("interpreted")
    ours, our_found = attention.attend(*low, ("mass", "last"))
    plain, _ = attention.attend(*low, ())
    real = (low[0].query_positions >= 0)[:, None, None, :, None]
    assert ours.dtype == dtype and ours.shape == want.shape
    for out in (ours, plain):
        no_worse(out.double() * real, theirs.double() * real, want * real, dtype)
    for name in ("mass", "last"):
        assert our_found[name].dtype == torch.float32
        no_worse(our_found[name].double(), their_found[name].double(), found[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_rotation(d: int, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """Turned as by the twin, near and far; a key that is not moved keeps its bits."""
    keys = torch.randn(2, 3, 40, d).to(dtype)
    shift = torch.randint(-90, 90, (2, 3, 40), dtype=torch.int32)
    shift[..., :9] = 0
    shift[..., 30:] *= 1000
    rotation = Rotation(10000.0 ** -(torch.arange(0, d, 2) / d))
    truth = Rotation(rotation.inv_freq.double()).rotate(keys.double(), shift)
    twin = rotation.rotate(keys, shift)
    request.getfixturevalue("interpreted")
    ours = rotation.rotate(keys, shift)
    assert torch.equal(ours[:, :, :9], keys[:, :, :9])
    no_worse(ours.double(), twin.double(), truth, dtype)


@pytest.mark.parametrize("first", [0, 3, 36])
def test_column_sums_over_a_range_of_queries(first: int, interpreted: None) -> None:
    step, slots = cast(*problem(64, 2, 37, 90), torch.float32)
    seen = attention.view(step, slots)
    ((_, p),) = cast(step, slots, torch.float64)[0].blocks(cast(step, slots, torch.float64)[1])
    torch.testing.assert_close(seen.column_sums(first).double(), p[:, :, :, first:].sum(3), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("d", "group", "n", "size", "cap"), SHAPES[:3])
def test_curvatures(
    d: int, group: int, n: int, size: int, cap: float | None, dtype: torch.dtype, interpreted: None
) -> None:
    """The norms of chosen pairs are those of all pairs, from the output as the pass returned it."""
    torch.manual_seed(d + n)
    step, slots = cast(*problem(d, group, n, size, cap=cap, merged=True), dtype)
    seen = attention.view(step, slots)
    left = torch.rand(2, 2, size - 1).argsort(dim=2)[..., :7].sort(dim=2).values
    single, cross = prefill.curvature(
        seen.queries, seen.keys, seen.values, seen.output, seen.lse, seen.bias, (left, left + 1), step.scale, cap
    )
    want_single, want_cross = 0.0, 0.0
    v = slots.values.double()
    for part, p in cast(step, slots, torch.float64)[0].blocks(cast(step, slots, torch.float64)[1]):
        out = seen.output.double().view(2, 2, group, n, d)[:, :, :, part]
        away = v[:, :, None, None] - out.unsqueeze(4)  # [B, H, G, q, S, d]
        want_single = want_single + (p * (1 - 2 * p).abs() * away.norm(dim=-1)).sum(3)
        pair = (away[..., :-1, :] + away[..., 1:, :]).norm(dim=-1)
        want_cross = want_cross + (p[..., :-1] * p[..., 1:] * pair).sum(3)
    index = left[:, :, None].expand(-1, -1, group, -1)
    tolerance = {"rtol": 2e-3, "atol": 2e-2}  # |v - o| is a small difference of large squares where v is nearly o
    single = single.view(2, 2, group, -1, 2).double()
    torch.testing.assert_close(single[..., 0], want_single.gather(3, index), **tolerance)
    torch.testing.assert_close(single[..., 1], want_single.gather(3, index + 1), **tolerance)
    torch.testing.assert_close(cross.view(2, 2, group, -1).double(), want_cross.gather(3, index), **tolerance)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("label", ["kvslimmer", "kvslimmer-released", "asymkv", "overlapping"])
def test_pairs_merge_as_in_the_twin(label: str, ragged: bool, request: pytest.FixtureRequest) -> None:
    """One chunk's merge through all kernels: the same slots stay, with the same contents."""
    options = {
        "kvslimmer": {},
        "kvslimmer-released": {"variant": "released"},
        "asymkv": {"fisher": "forward"},
        "overlapping": {"overlap": "released"},
    }[label]
    name = "asymkv" if label == "asymkv" else "kvslimmer"
    method = methods.create(name, sinks=2, recent=8, queries=12, **options)
    torch.manual_seed(len(label) + ragged)
    step, slots = cast(*problem(64, 2, 16, 64, ragged=False, merged=True), torch.float32)
    step = dataclasses.replace(step, positions="cardinality")
    if ragged:
        empty = torch.arange(64) < torch.tensor([0, 20])[:, None, None]
        slots = dataclasses.replace(
            slots,
            positions=slots.positions.masked_fill(empty, -1),
            cardinality=slots.cardinality.masked_fill(empty, 0),
            ragged=True,
        )
    # One choice of pairs for all heads: their cardinalities are the same, as they are in a real cache.
    slots = dataclasses.replace(slots, cardinality=slots.cardinality[:, :1].expand(-1, 2, -1).contiguous())
    stats = {k: torch.rand(2, 2, 64) for k in method.accumulates}
    slots = dataclasses.replace(slots, stats={k: x.masked_fill(~slots.valid, 0) for k, x in stats.items()})
    want = method.compress(slots, 50, step)
    request.getfixturevalue("interpreted")
    ours = method.compress(slots, 50, step)
    assert torch.equal(ours.positions, want.positions) and torch.equal(ours.cardinality, want.cardinality)
    valid = want.valid.unsqueeze(-1)
    for field in ("keys", "values"):
        a, b = (getattr(x, field) * valid for x in (ours, want))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("tile", [16, 4096])
@pytest.mark.parametrize("pairs", [1, 2, 15, 48, 101])
def test_greedy_pairs_is_its_twin(pairs: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, forbidden pairs, and runs that go on from one tile to the next."""
    monkeypatch.setattr(pairs_kernel, "GREEDY_TILE", tile)
    for score in (torch.rand(2, 3, pairs), torch.randint(0, 4, (2, 3, pairs)).float()):
        score[torch.rand(score.shape) < 0.1] = torch.inf
        assert torch.equal(pairs_kernel.greedy(score), greedy_pairs(score))


def test_share_of_chosen_pairs_is_the_closed_form(interpreted: None) -> None:
    """Pairs that were not chosen do not count; the chosen ones get the share that the twin computes."""
    step, slots = cast(*problem(64, 2, 12, 40, merged=True), torch.float32)
    method = methods.create("kvslimmer")
    seen = attention.observe(step, slots)
    chosen = torch.zeros(2, 2, 39, dtype=torch.bool)
    chosen[..., 3:30:3] = True
    share = method.weigh(slots, step, seen, chosen, 12).squeeze(-1)
    single, cross = kvslimmer.curvature_norms(slots, step)
    mass = seen.mass
    want = kvslimmer.merge_share(single[..., :-1], single[..., 1:], cross, mass[..., :-1], mass[..., 1:])
    torch.testing.assert_close(share[chosen], want[chosen], rtol=1e-3, atol=1e-3)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """The interpreter does not look at types; the compiler does, and needs no GPU."""
    script = tmp_path / "launch.py"
    script.write_text(
        "import torch\n"
        "from kvrepro.kernels import pairs, prefill\n"
        "from kvrepro.slots import Slots\n"
        "q, k = torch.randn(1, 8, 200, 128).bfloat16(), torch.randn(1, 2, 300, 128).bfloat16()\n"
        "for bias, cap in ((None, None), (torch.zeros(1, 2, 300), 2.0)):\n"
        "    out, lse = prefill.attend(q, k, k, bias, 0.1, cap)\n"
        "    prefill.column_sums(q, k, lse, bias, 0.1, cap)\n"
        "left = torch.arange(100).expand(1, 2, -1)\n"
        "prefill.curvature(q, k, k, out, lse, bias, (left, left + 1), 0.1, None)\n"
        "pairs.greedy(torch.rand(1, 1, 299))\n"
        "ones = torch.ones(1, 2, 300, dtype=torch.int32)\n"
        "for last in (1, 128):\n"
        "    share = torch.rand(1, 2, 299, last)\n"
        "    pairs.merge(Slots(k, k, ones, ones), ones[..., 1:] > 0, share, ones[..., 1:], left, torch.rand(64))\n",
        encoding="utf-8",
    )
    compile_script(script, launches=8)


def compile_script(script: Path, launches: int) -> None:
    """Compile the launches of a script for compute capability 9.0, in a process of its own."""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "compile_kernels.py"), str(script)],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(root), "HOME": str(script.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"compiled {launches} launches" in done.stdout
