"""The kernels of one-shot merging in Triton's interpreter, against their twins and against float64 loops."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvrepro import kernels, methods
from kvrepro import slots as primitives
from kvrepro.attention import Step
from kvrepro.methods import attention_matching, d2o, keepkv, kvmerger
from kvrepro.slots import Slots

merging = pytest.importorskip("kvrepro.kernels.merging")

pytestmark = pytest.mark.usefixtures("mended_interpreter")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64, 45), (128, 70), (256, 33)]  # head size, slots


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch, bfloat16_products: None) -> None:
    """Unwritten outputs are NaN or a number that no test expects; bfloat16 matrices are multiplied as such."""

    def empty(*shape: Any, **options: Any) -> Tensor:
        size = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        dtype = options.get("dtype") or torch.get_default_dtype()
        return torch.full(size, float("nan") if dtype.is_floating_point else 77, **options)

    monkeypatch.setattr(torch, "empty", empty)
    seed = torch.seed() % 2**31
    print(f"torch.manual_seed({seed})")  # shown where a test fails
    torch.manual_seed(seed)


def no_worse(ours: Tensor, twins: Tensor, exact: Tensor, units: float = 1.0) -> None:
    """The kernel's error is at most twice the twin's, plus one unit in the last place of the result's type."""
    assert ours.dtype == twins.dtype and torch.isfinite(ours).all()
    grain = units * torch.finfo(ours.dtype).eps * float(exact.norm())
    error, allowed = (float((x.double() - exact).norm()) for x in (ours, twins))
    assert error <= 2 * allowed + grain, (error, allowed, grain)


def rows(b: int, size: int, d: int, dtype: torch.dtype) -> Tensor:
    """`[b, 2, size, d]`, laid out as a model does: the heads of a token side by side."""
    return torch.randn(b, size, 2, d).to(dtype).transpose(1, 2)


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [1 << 12, 0])
@pytest.mark.parametrize("size", [1, 5, 70])
def test_top_equals_its_twin_bit_for_bit(size: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random scores, ties with zeros of both signs, infinities and NaN; too few, too many, as many as there are."""
    monkeypatch.setitem(merging.CONFIG, "held", held)
    monkeypatch.setitem(merging.CONFIG, "scan", 32)
    monkeypatch.setitem(merging.CONFIG, "tile", 16)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, 1.0])
    score = torch.stack(
        [torch.randn(size), torch.randint(-2, 3, (size,)) * -1.0, special[torch.randint(0, 6, (size,))]]
    )
    candidates = torch.rand(1, 3, size) > 0.2
    counts = [torch.randint(0, size + 1, (1, 3, 1)), torch.tensor([[[0], [size + 3], [-1]]]), size // 2]
    for count, dtype in zip(counts, DTYPES, strict=True):
        want = primitives.top(score[None].to(dtype), candidates, count)
        assert torch.equal(merging.top(score[None].to(dtype), candidates, count), want)
        taken = torch.rand(1, 3, size) > 0.7
        want = taken | primitives.top(score[None].to(dtype), candidates & ~taken, count)
        assert torch.equal(primitives.top(score[None].to(dtype), candidates, count, taken), want)
        assert torch.equal(merging.top(score[None].to(dtype), candidates, count, taken), want)


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_a_token_s_score_is_averaged_over_the_heads_that_hold_it(
    size: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel, its twin, and loops; heads hold different tokens, and different numbers of them."""
    monkeypatch.setitem(merging.CONFIG, "looked_for", 64)
    positions = torch.rand(2, heads, 2 * size).argsort(dim=2)[..., :size].sort(dim=2).values.int()
    empty = torch.arange(size) < torch.tensor([[0, 1, 0, 3], [2, 0, 5, 0]])[:, :heads, None]
    positions, score = positions.masked_fill(empty, -1), torch.rand(2, heads, size).masked_fill(empty, 0)
    want = torch.zeros_like(score)
    for b, h, s in itertools.product(range(2), range(heads), range(size)):
        token = positions[b, h, s]
        held = [
            score[b, k][positions[b, k] == token][0] for k in range(heads) if bool((positions[b, k] == token).any())
        ]
        want[b, h, s] = sum(held) / len(held)
    keys = torch.zeros(2, heads, size, 16)
    slots = Slots(keys, keys, positions, (positions >= 0).int(), dense=False, ragged=True)
    torch.testing.assert_close(merging.by_token(score, positions), want)
    torch.testing.assert_close(attention_matching._by_token(score, slots), want)


def test_a_token_s_score_is_found_behind_padding_between_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a batch whose later pass is padded has empty slots between filled ones."""
    positions = torch.rand(2, 3, 60).argsort(dim=2)[..., :30].sort(dim=2).values.int()
    positions[0, :, 9:17] = -1
    valid = positions >= 0
    score, keys = torch.rand(2, 3, 30).masked_fill(~valid, 0), torch.zeros(2, 3, 30, 16)
    slots = Slots(keys, keys, positions, valid.int(), dense=False, ragged=True)
    want = attention_matching._by_token(score, slots)
    monkeypatch.setattr(attention_matching, "has_kernel", lambda x: True)
    torch.testing.assert_close(attention_matching._by_token(score, slots)[valid], want[valid])


@pytest.mark.parametrize("size", [1, 5, 37, 130])
def test_partition_equals_its_twin_and_a_stable_sort(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(merging.CONFIG, "scan", 32)
    monkeypatch.setitem(merging.CONFIG, "part", 16)
    for share in (0.0, 0.3, 1.0):
        keep = torch.rand(2, 2, size) < share
        order, place = merging.partition(keep)
        assert torch.equal(order, keep.to(torch.int8).argsort(dim=2, stable=True))
        twin = primitives.partition(keep)
        assert torch.equal(order, twin[0]) and torch.equal(place, twin[1])


# --- comparing keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "size"), SHAPES)
def test_numbers_a_key(d: int, size: int, dtype: torch.dtype) -> None:
    """Cosine of neighbours, distance from a target, dot product with a vector."""
    keys = rows(2, size, d, dtype)
    keys[0, 0, 3] = 0
    wide = keys.double()
    target, vector = torch.randint(0, size, (2, 2, size)), torch.randn(2, 2, d).to(dtype)
    norm = wide.norm(dim=-1).clamp_min(1e-8)
    cosine = (wide[:, :, :-1] * wide[:, :, 1:]).sum(-1) / norm[..., :-1] / norm[..., 1:]
    no_worse(merging.neighbours(keys), kvmerger.neighbours(keys), cosine)
    apart = (wide - primitives.take(wide, target)).norm(dim=-1)
    no_worse(merging.distance(keys, target), kvmerger.distances(keys, target), apart)
    dots = (wide * vector.double().unsqueeze(2)).sum(-1)
    no_worse(merging.project(keys, vector, 0.3), keepkv.project(keys, vector, 0.3), 0.3 * dots)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "size"), SHAPES)
@pytest.mark.parametrize("share", [0.2, 0.7, None])
def test_nearest_kept(
    d: int, size: int, dtype: torch.dtype, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot as similar as the best one, and its cosine; what is empty never answers; of equal slots the first does."""
    # Tiles that the kept slots do not fill, and (None) two that they do.
    options = {"queries": 32, "kept": 16, "nearest_stages": 2}
    for name, value in options.items():
        monkeypatch.setitem(merging.CONFIG, name, value)
    keys = rows(1, size, d, dtype)
    keys *= torch.rand(1, 2, size, 1).exp() * 8
    keys[..., 0] *= 20  # a channel that outweighs the others, as in a model
    order = torch.rand(1, 2, size).argsort(dim=2)
    count = 32 if share is None else int(share * size)
    kept, gone = order.split([count, size - count], dim=2)
    valid = torch.rand(kept.shape) > 0.2
    valid[..., -1] = True
    valid[:, 1] = torch.arange(count) >= count // 2  # a shorter head
    keys[0, 0, kept[0, 0, 1]] = keys[0, 0, kept[0, 0, -1]]
    valid[0, 0, 1] = True
    valid = torch.ones_like(valid) if share is None else valid
    keys[0, 0, gone[0, 0, 0]] = keys[0, 0, kept[0, 0, -1]]
    similarity, index = merging.nearest(keys, gone, kept, None if share is None else valid)
    twin, twins_index = d2o.nearest_kept(keys, gone, kept, valid)
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    cosines = primitives.take(unit, gone) @ primitives.take(unit, kept).transpose(2, 3)  # [1, 2, E, K]
    best = cosines.masked_fill(~valid.unsqueeze(2), -torch.inf).amax(3)
    chosen, twins = (cosines.gather(3, i.long().unsqueeze(3)).squeeze(3) for i in (index, twins_index))
    assert valid.gather(2, index.long()).all()
    no_worse(similarity, twin, chosen)
    # A place in the last bits of 16-bit keys' scores costs little more than float32's rounding of the products.
    assert (best - chosen).max() <= (1e-6 if dtype == torch.float32 else 2**-17) + (best - twins).max()
    assert int(index[0, 0, 0]) == 1  # not its double at the end


def test_nothing_is_nearest_where_nothing_is_kept() -> None:
    """The similarity is -inf, and the place is one that exists."""
    keys = rows(1, 40, 64, torch.bfloat16)
    order = torch.arange(40).expand(1, 2, 40)
    valid = torch.stack([torch.zeros(15), torch.ones(15)])[None].bool()
    similarity, index = merging.nearest(keys, order[..., :25], order[..., 25:], valid)
    assert (similarity[0, 0] == -torch.inf).all() and torch.isfinite(similarity[0, 1]).all()
    assert (index[0, 0] == 0).all()


def test_nearest_kept_twin_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = torch.randn(2, 2, 40, 8)
    order = torch.rand(2, 2, 40).argsort(dim=2)
    valid = torch.rand(2, 2, 15) > 0.3
    want = d2o.nearest_kept(keys, order[..., 15:], order[..., :15], valid)
    monkeypatch.setattr(d2o, "_BLOCK", 200)
    got = d2o.nearest_kept(keys, order[..., 15:], order[..., :15], valid)
    torch.testing.assert_close(got[0], want[0])
    assert torch.equal(got[1], want[1])


# --- summing ---------------------------------------------------------------------------------------------------------


def destinations(kind: str, size: int, empty: int) -> tuple[Tensor, int]:
    """A place for each of `size` slots, the first `empty` of them going nowhere; and the number of places."""
    if kind == "any":
        target = torch.randint(0, size // 3, (size,))
        target[torch.rand(size) < 0.3] = size // 3
        places = size // 3 - empty // 3
        target[torch.randperm(size - empty)[:places] + empty] = torch.arange(places) + size // 3 - places
        target[target < size // 3 - places] = size // 3
        target[:empty] = size // 3
        return target, size // 3
    starts = torch.rand(size - empty) < (0.4 if kind == "short" else 0.03)
    starts[0] = True
    runs = starts.cumsum(0) - 1
    count = int(runs[-1]) + 1
    return torch.cat([torch.full((empty,), count), runs]), count


def summed(x: Tensor, target: Tensor, weight: Tensor, size: int) -> Tensor:
    """The definition, `[1, 2, size, d]` float64."""
    out = torch.zeros(1, 2, size, x.shape[3], dtype=torch.float64)
    for h in range(2):
        for i, place in enumerate(target[0, h].tolist()):
            if place < size:
                out[0, h, place] += weight[0, h, i].double() * x[0, h, i].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty", [0, 7])
@pytest.mark.parametrize("kind", ["any", "short", "long"])
def test_mix(kind: str, empty: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in place order, merges that cross many chunks, places that nothing goes to."""
    for name in ("chunk", "exact_chunk"):
        monkeypatch.setitem(merging.CONFIG, name, 16)
    monkeypatch.setattr(merging, "_SPAN", 2)
    d, size = SHAPES[int(torch.randint(0, 3, ()))]
    size += 61
    keys, values = rows(1, size, d, dtype), rows(1, size, 64, dtype)
    pair = [destinations(kind, size, empty) for _ in range(2)]
    places = max(count for _, count in pair)
    # A head with fewer places leaves the first ones empty, as ragged slots do.
    target = torch.stack([torch.where(t < count, t + places - count, places) for t, count in pair])[None]
    ragged = empty > 0 or pair[0][1] != pair[1][1]
    weights = torch.rand(2, 1, 2, size)
    weights[:, target.eq(places)] = torch.nan  # what goes nowhere is not looked at
    got = merging.mix(keys, values, target, *weights, places, runs=kind != "any", whole=not ragged)
    weights = weights.nan_to_num(0.0)
    slots = Slots(keys, values, target.int(), torch.ones_like(target, dtype=torch.int32))
    twin = primitives.mix(slots, target, tuple(weights), places)
    for x, w, ours, theirs in zip((keys, values), weights, got, twin, strict=True):
        no_worse(ours, theirs, summed(x, target, w, places))


# --- whole methods ---------------------------------------------------------------------------------------------------


def situation(dtype: torch.dtype, short: int, size: int = 90, d: int = 64) -> tuple[Slots, Step]:
    """A prompt whose neighbouring keys are alike; the second row holds `short` slots fewer, behind empty ones."""
    keys, noise = rows(2, size, d, torch.float32), rows(2, size, d, torch.float32)
    for i in range(1, size):
        keys[:, :, i] = 0.9 * keys[:, :, i - 1] + 0.44 * noise[:, :, i]
    cardinality = torch.randint(1, 4, (2, 2, size), dtype=torch.int32)
    cardinality[1, :, :short] = 0
    positions = (cardinality.cumsum(-1) - 1).int().masked_fill(cardinality == 0, -1)
    slots = Slots(
        keys=keys.to(dtype),
        values=rows(2, size, d, dtype),
        positions=positions,
        cardinality=cardinality,
        stats={"mass": torch.rand(2, 2, size).masked_fill(cardinality == 0, 0)},
        dense=False,
        ragged=short > 0,
    )
    step = Step(torch.randn(2, 2, 3, 2, d).to(dtype), positions[:, 0, -2:], scale=d**-0.5)
    return slots, step


def planned(slots: Slots, size: int, crowd: int) -> d2o.Eviction:
    """An eviction at random, whose evicted slots are like one of the last `crowd` kept ones."""
    keep = primitives.top(torch.rand(slots.positions.shape), slots.valid, size)
    order, place = primitives.partition(keep)
    gone = order[..., : slots.size - size]
    shape = gone.shape
    evicted = (slots.valid & ~keep).gather(2, gone) if slots.ragged else None
    filled = keep.sum(dim=2, keepdim=True).clamp_min(1)
    nearest = size - 1 - (torch.rand(shape) * filled.clamp_max(crowd)).long()
    return d2o.Eviction(keep, order, place, evicted, torch.rand(shape) * 1.5 - 0.5, nearest, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("short", "crowd"), [(0, 24), (0, 2), (20, 24), (80, 3)])
@pytest.mark.parametrize("votes", [False, True])
def test_merges(votes: bool, short: int, crowd: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """D2O's and KeepKV's, a few members or many chunks of them; logits far apart; no threshold yet, or one."""
    for name, value in {"chunk": 16, "exact_chunk": 16, "settle": 16}.items():
        monkeypatch.setitem(merging.CONFIG, name, value)
    monkeypatch.setattr(merging, "_SPAN", 2)
    slots, _ = situation(dtype, short, d=int(torch.tensor([64, 128, 256])[torch.randint(0, 3, ())]))
    wide = dataclasses.replace(slots, keys=slots.keys.double(), values=slots.values.double())
    plan = planned(slots, 24, crowd)
    logits = torch.randn(slots.positions.shape) * (60 if crowd == 2 else 3) + 5
    old = torch.tensor([[torch.nan, 0.1], [0.2, torch.nan]])

    def run(slots: Slots) -> tuple[d2o.Merged, Tensor]:
        if votes:
            return keepkv.merge(slots, plan, logits.to(torch.promote_types(slots.keys.dtype, old.dtype)), 0.1), old
        return d2o.merge(slots, plan, old, 0.3)

    twin, exact = run(slots), run(wide)
    monkeypatch.setattr(kernels, "covers", lambda *tensors: all(x.dtype in kernels.DTYPES for x in tensors))
    ours = run(slots)
    torch.testing.assert_close(ours[1], twin[1], equal_nan=True)
    assert torch.equal(ours[0].cardinality, twin[0].cardinality)
    assert crowd != 2 or int(ours[0].cardinality.max()) > 20  # a merge of several chunks
    for side in ("keys", "values"):
        no_worse(*(getattr(x[0], side) for x in (ours, twin, exact)))
    again = run(slots)[0]
    assert torch.equal(again.keys, ours[0].keys) and torch.equal(again.values, ours[0].values)


@pytest.mark.parametrize("short", [0, 20, 80])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {}),
        ("weightedkv", {"sinks": 0}),
        ("d2o", {}),
        ("keepkv", {"threshold": 0.3}),
        ("kvmerger", {}),
        ("kvmerger", {"sigma": "printed", "mass": "attention"}),
        ("kvmerger", {"weights": "mean", "budget_mode": "threshold", "shared_sets": True}),
    ],
    ids=str,
)
def test_methods_give_the_same_with_kernels(
    name: str, options: dict[str, Any], short: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, step = situation(torch.float32, short)
    method = methods.create(name, **options).resolve(24)
    if name == "weightedkv":  # many slots that received nothing: runs whose weights sum to 0
        mass = slots.stats["mass"] * (torch.rand(slots.positions.shape) < 0.4)
        slots = dataclasses.replace(slots, stats={"mass": mass, "count": 1 + mass.round()})
    step = dataclasses.replace(step, cardinality_bias=method.cardinality_bias, positions=method.positions)
    want = method.compress(slots, 24, step)
    monkeypatch.setattr(kernels, "covers", lambda *tensors: all(x.dtype in kernels.DTYPES for x in tensors))
    got = method.compress(slots, 24, step)
    assert got.ragged == want.ragged and got.size == want.size
    filled = want.valid
    assert torch.equal(got.positions, want.positions) and torch.equal(got.cardinality, want.cardinality)
    for side in ("keys", "values"):
        a, b = getattr(got, side), getattr(want, side)
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a[filled], b[filled], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.stats["mass"], want.stats["mass"])
    for key, value in want.state.items():
        torch.testing.assert_close(got.state[key], value, equal_nan=True)


@pytest.mark.parametrize("name", ["d2o", "keepkv", "kvmerger", "weightedkv"])
def test_slots_that_nothing_joins_keep_their_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, step = situation(torch.float16, 0)
    slots = dataclasses.replace(slots, stats={**slots.stats, "count": torch.ones_like(slots.stats["mass"])})
    monkeypatch.setattr(kernels, "covers", lambda *tensors: all(x.dtype in kernels.DTYPES for x in tensors))
    out = methods.create(name).compress(slots, 60, step)
    lone = 0
    for b, h, i in np.ndindex(2, 2, 60):
        j = int((slots.positions[b, h] == out.positions[b, h, i]).nonzero())
        if out.cardinality[b, h, i] == slots.cardinality[b, h, j]:
            assert torch.equal(out.keys[b, h, i], slots.keys[b, h, j])
            assert torch.equal(out.values[b, h, i], slots.values[b, h, j])
            lone += 1
    assert lone > 20
