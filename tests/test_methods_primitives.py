"""The few tensor operations all methods are made of, against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import base

from kvrepro import slots as primitives
from kvrepro.methods.pairs import greedy_pairs
from kvrepro.rope import Rotation
from kvrepro.slots import Slots

BOUNDED = settings(max_examples=100, deadline=None, derandomize=True)


def make_slots(valid: list[bool], heads: int = 1, dim: int = 4, seed: int = 0) -> Slots:
    """One row of random slots; those marked False are empty."""
    generator = torch.Generator().manual_seed(seed)
    filled = torch.tensor(valid).expand(1, heads, -1)
    place = filled.cumsum(2) - 1
    return Slots(
        keys=torch.randn(1, heads, len(valid), dim, generator=generator, dtype=torch.float64),
        values=torch.randn(1, heads, len(valid), dim, generator=generator, dtype=torch.float64),
        positions=torch.where(filled, place, -1).int(),
        cardinality=filled.int(),
        stats={"mass": torch.rand(1, heads, len(valid), generator=generator)},
        ragged=not all(valid),
    )


SCORES = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, 4.0, math.inf]) | st.floats(-9, 9), min_size=1, max_size=24)


@BOUNDED
@given(SCORES)
def test_greedy_pairs_equals_sorting_and_taking(scores: list[float]) -> None:
    """The closed form is the greedy matching, ties and forbidden pairs included."""
    taken = greedy_pairs(torch.tensor(scores, dtype=torch.float64))
    assert taken.nonzero().flatten().tolist() == base.greedy_pairs(scores, len(scores))


@BOUNDED
@given(SCORES)
def test_greedy_pairs_are_disjoint_and_maximal(scores: list[float]) -> None:
    """No slot twice; every allowed pair left out touches one that was taken."""
    taken = greedy_pairs(torch.tensor(scores, dtype=torch.float64)).tolist()
    for i, score in enumerate(scores):
        neighbours = taken[max(i - 1, 0) : i] + taken[i + 1 : i + 2]
        assert not (taken[i] and any(neighbours))
        assert taken[i] or math.isinf(score) or any(neighbours)


@BOUNDED
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=12), st.integers(0, 12)
)
def test_top_marks_the_highest_later_first(entries: list[tuple[float, bool]], count: int) -> None:
    """`top` takes the best candidates, and of equal ones the later."""
    score, candidates = (list(column) for column in zip(*entries, strict=True))
    marked = primitives.top(torch.tensor([[score]]), torch.tensor([[candidates]]), count)[0, 0]
    ranking = sorted((i for i in range(len(score)) if candidates[i]), key=lambda i: (-score[i], -i))
    assert marked.nonzero().flatten().tolist() == sorted(ranking[:count])


@BOUNDED
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 4), st.integers(0, 4))
def test_protected_counts_filled_slots_only(valid: list[bool], sinks: int, recent: int) -> None:
    """Padding is neither a sink nor recent."""
    for slots, in_front in ((make_slots(valid), False), (make_slots(sorted(valid)), True)):
        marked = primitives.protected(slots, sinks, recent, in_front=in_front)[0, 0].nonzero().flatten().tolist()
        filled = slots.valid[0, 0].nonzero().flatten().tolist()
        assert marked == sorted(set(filled[:sinks]) | set(filled[max(len(filled) - recent, 0) :]))


@BOUNDED
@given(st.lists(st.booleans(), min_size=2, max_size=12).filter(any), st.data())
def test_compact_keeps_the_marked_in_order(valid: list[bool], data: st.DataObject) -> None:
    """What is kept arrives bit for bit, in order, at the end; in front of it are empty slots."""
    slots = make_slots(valid)
    marked = data.draw(st.lists(st.booleans(), min_size=len(valid), max_size=len(valid)))
    chosen = [i for i in range(len(valid)) if valid[i] and marked[i]]
    size = data.draw(st.integers(max(len(chosen), 1), len(valid)))
    out = primitives.compact(slots, torch.tensor([[marked]]), size)
    filled = out.valid[0, 0].nonzero().flatten().tolist()
    assert out.size == size and filled == list(range(size - len(chosen), size))
    for name in ("keys", "values", "positions", "cardinality"):
        assert torch.equal(getattr(out, name)[0, 0, filled], getattr(slots, name)[0, 0, chosen])
    assert torch.equal(out.stats["mass"][0, 0, filled], slots.stats["mass"][0, 0, chosen])
    assert out.positions[0, 0, : size - len(chosen)].tolist() == [-1] * (size - len(chosen))


@BOUNDED
@given(st.lists(st.booleans(), min_size=1, max_size=14), st.integers(0, 99))
def test_join_right_is_one_convex_combination_a_run(keep: list[bool], seed: int) -> None:
    """Each run of evicted slots and the kept slot on its right: Σ w v / Σ w; keys and lone slots keep their bits."""
    keep = [*keep, True]
    slots = make_slots([True] * len(keep), seed=seed)
    weights = torch.rand(1, 1, len(keep), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    out = primitives.join_right(slots, torch.tensor([[keep]]), weights)
    run: list[int] = []
    for j, kept in enumerate(keep):
        run.append(j)
        if not kept:
            continue
        if len(run) == 1:
            assert torch.equal(out.values[0, 0, j], slots.values[0, 0, j])
        w = [float(weights[0, 0, i]) for i in run]
        expected = sum(x * slots.values[0, 0, i].numpy() for x, i in zip(w, run, strict=True)) / sum(w)
        np.testing.assert_allclose(out.values[0, 0, j], expected, rtol=1e-12)
        assert out.cardinality[0, 0, j] == len(run)
        run = []
    assert torch.equal(out.keys, slots.keys)


@pytest.mark.parametrize("dim, rotary", [(8, 8), (8, 4)])
def test_rotation_moves_a_key(dim: int, rotary: int) -> None:
    """Rotating stored keys equals turning each pair by hand, and two moves add up; the unrotated rest stays."""
    inv_freq = torch.tensor([10000.0 ** (-2 * i / rotary) for i in range(rotary // 2)])
    rotation = Rotation(inv_freq)
    keys = torch.randn(2, 3, 5, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shift = torch.randint(-40, 40, (2, 3, 5), generator=torch.Generator().manual_seed(2))
    turned = rotation.rotate(keys, shift)
    for b, h, s in np.ndindex(2, 3, 5):
        expected = base.rotate(keys[b, h, s].numpy(), int(shift[b, h, s]), inv_freq.double().numpy())
        np.testing.assert_allclose(turned[b, h, s], expected, atol=1e-12)
    torch.testing.assert_close(rotation.rotate(turned, -shift), keys)
    assert torch.equal(rotation.rotate(keys, torch.zeros_like(shift)), keys)


def test_rotation_of_bfloat16_is_rounded_once() -> None:
    """In float32 inside: as good as rotating in float64 and rounding (no loss from the trigonometry)."""
    inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001])
    keys = torch.randn(1, 1, 64, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    shift = torch.arange(64).view(1, 1, 64) * 7
    exact = Rotation(inv_freq.double()).rotate(keys.double(), shift)
    turned = Rotation(inv_freq).rotate(keys, shift)
    assert turned.dtype == torch.bfloat16
    assert float((turned.double() - exact).abs().max()) <= 2 * float((exact.bfloat16().double() - exact).abs().max())


def test_uniform_depends_on_each_counter_and_nothing_else() -> None:
    """The same five numbers give the same draw in any shape; any other number gives another draw."""
    head, position = torch.arange(3).view(3, 1), torch.arange(50).view(1, 50)
    draw = primitives.uniform(0, 1, head, position)
    assert float(primitives.uniform(0, 1, torch.tensor(2), torch.tensor(17))) == float(draw[2, 17])
    others = [
        primitives.uniform(1, 1, head, position),
        primitives.uniform(0, 2, head, position),
        primitives.uniform(0, 1, head + 3, position),
        primitives.uniform(0, 1, head, position + 50),
        primitives.uniform(0, 1, head, position, stream=1),
    ]
    for other in others:
        assert int((draw == other).sum()) == 0


def test_uniform_is_uniform() -> None:
    """Mean, histogram and neighbours' correlation of 40 000 draws (fixed counters: no chance is involved)."""
    draw = primitives.uniform(7, 3, torch.arange(4).view(4, 1), torch.arange(10_000).view(1, -1)).double()
    assert float(draw.min()) >= 0 and float(draw.max()) < 1
    assert abs(float(draw.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / draw.numel())
    counts = torch.histc(draw.float(), bins=20, min=0, max=1)
    chi_squared = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_squared < 43.8  # 99.9 % point of χ² with 19 degrees of freedom
    along = torch.corrcoef(torch.stack([draw[:, :-1].flatten(), draw[:, 1:].flatten()]))[0, 1]
    across = torch.corrcoef(draw)[0, 1]
    assert abs(float(along)) < 4 / math.sqrt(40_000) and abs(float(across)) < 4 / math.sqrt(10_000)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_marked_slots_alone(turned: bool, told: bool) -> None:
    """One head behind the other, however keys lie in memory; spread out again they are the marked slots in order."""
    generator = torch.Generator().manual_seed(0)
    b, h, size, d = 2, 3, 7, 4
    shape = (b, size, h, d) if turned else (b, h, size, d)
    keys, values = torch.randn(2, *shape, generator=generator).transpose(2, 3 if turned else 2)
    positions = torch.arange(size, dtype=torch.int32).expand(b, h, size).contiguous()
    slots = Slots(keys, values, positions, positions + 1, stats={"bias": torch.randn(b, h, size, generator=generator)})
    keep = torch.rand(b, h, size, generator=generator) < 0.6
    keep[0, 1] = False
    flat = primitives.flatten(slots, keep, keep.sum(dim=2) if told else None)
    assert flat.count.tolist() == keep.sum(dim=2).tolist()
    assert flat.size == int(keep.sum(dim=2).max())
    spread = flat.spread()
    for i in range(b):
        for j in range(h):
            n = int(keep[i, j].sum())
            kept = keep[i, j].nonzero().flatten()
            for side in ("keys", "values", "positions", "cardinality"):
                found, had = getattr(spread, side)[i, j], getattr(slots, side)[i, j]
                assert torch.equal(found[flat.size - n :], had[kept])
            assert torch.equal(spread.stats["bias"][i, j, flat.size - n :], slots.stats["bias"][i, j, kept])
            assert bool((spread.positions[i, j, : flat.size - n] == -1).all())
