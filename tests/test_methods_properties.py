"""What must hold for every method whatever the slots: hypothesis draws sizes, gaps, padding and protections."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvrepro import methods
from kvrepro.attention import Step, attend
from kvrepro.methods import Method
from kvrepro.rope import Rotation
from kvrepro.slots import Slots

HEADS, GROUP, DIM = 2, 2, 4
NAMES = [name for name in methods.names() if name != "full"]
EVICTING = ["streaming_llm", "h2o", "tova", "snapkv", "pyramidkv", "keydiff", "random"]
LOSSLESS = ["weightedkv", "kvmerger", "asymkv", "kvslimmer"]
BOUNDED = settings(max_examples=25, deadline=None, derandomize=True)


@dataclasses.dataclass
class Situation:
    """A batch of two rows that has overflowed: the second row has `short` slots fewer, behind padding."""

    slots: Slots
    step: Step
    budget: int
    short: int


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """Slots with earlier gaps and merges, the last n of them new, one row padded."""
    budget = draw(st.integers(12, 20))
    excess, n, short = draw(st.integers(1, 14)), draw(st.integers(1, 6)), draw(st.integers(0, 20))
    size = budget + excess
    short = min(short, size - n - 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    cardinality = torch.randint(1, 4, (2, 1, size), generator=generator)
    cardinality[..., size - n :] = 1
    cardinality[1, :, :short] = 0
    positions = cardinality.cumsum(-1) - 1
    positions[1, :, :short] = -1
    shape = (2, HEADS, size)
    slots = Slots(
        keys=torch.randn(*shape, DIM, generator=generator, dtype=torch.float64),
        values=torch.randn(*shape, DIM, generator=generator, dtype=torch.float64),
        positions=positions.int().expand(shape).contiguous(),
        cardinality=cardinality.int().expand(shape).contiguous(),
        dense=False,
        ragged=short > 0,
    )
    queries = torch.randn(2, HEADS, GROUP, n, DIM, generator=generator, dtype=torch.float64)
    step = Step(
        queries=queries,
        query_positions=positions[:, 0, size - n :].int(),
        scale=0.5,
        rotation=Rotation(torch.tensor([1.0, 0.1])),
        budget=budget,
        layers=3,
    )
    return Situation(slots, step, budget, short)


def ready(name: str, situation: Situation, **options: Any) -> tuple[Method, Slots, Step]:
    """The method, and slots and step with the side vectors it asks for."""
    if name == "asymkv":
        options = {"fisher": "forward", **options}
    method = methods.create(name, **options).resolve(situation.budget)
    slots = situation.slots
    step = dataclasses.replace(
        situation.step,
        positions=method.positions,
        cardinality_bias=method.cardinality_bias,
        window_queries=situation.step.queries,
        window_positions=situation.step.query_positions,
    )
    zeros = torch.zeros(slots.positions.shape)
    slots = dataclasses.replace(slots, stats={side: zeros for side in method.accumulates})
    _, found = attend(step, slots, method.statistics)
    return method, method.accumulate(slots, found, step), step


def goal(name: str, method: Method, situation: Situation, row: int) -> tuple[int, int]:
    """The fewest and the most slots that a row may keep."""
    had = situation.slots.size - (situation.short if row == 1 else 0)
    most = min(had, situation.budget)
    decoding = situation.step.queries.shape[3] == 1
    in_blocks = name == "kvmerger" or (decoding and name in ("asymkv", "kvslimmer", "attention_matching"))
    return (min(had, situation.budget - method.block_of(situation.budget) + 1) if in_blocks else most), most


@pytest.mark.parametrize("name", NAMES)
@BOUNDED
@given(situation=situations(), positions=st.sampled_from(["original", "cache"]))
def test_every_compression(name: str, situation: Situation, positions: str) -> None:
    """Budget met, order kept, protected slots kept, nothing invented, no NaN, rows that fit untouched."""
    options = {} if name in ("snapkv", "pyramidkv") else {"positions": positions}
    method, slots, step = ready(name, situation, **options)
    budget = situation.budget
    out = method.compress(slots, budget, step)
    assert out.size <= budget
    sinks, recent = method.sinks_of(budget), method.recent_of(budget)
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        before, after = slots.valid[row, head], out.valid[row, head]
        old, new = slots.positions[row, head][before].tolist(), out.positions[row, head][after].tolist()
        fewest, most = goal(name, method, situation, row)
        assert fewest <= len(new) <= most
        assert new == sorted(set(new)) and set(new) <= set(old)
        assert new[:sinks] == old[:sinks]
        assert recent == 0 or new[-recent:] == old[-recent:]
        assert bool(out.keys[row, head][after].isfinite().all() and out.values[row, head][after].isfinite().all())
        assert bool((out.positions[row, head][~after] == -1).all())
        if len(old) <= fewest:
            assert torch.equal(out.values[row, head][after], slots.values[row, head][before])
            assert torch.equal(out.keys[row, head][after], slots.keys[row, head][before])


@pytest.mark.parametrize("name", EVICTING)
@BOUNDED
@given(situation=situations())
def test_evictions_copy_what_they_keep(name: str, situation: Situation) -> None:
    """Keys, values and cardinalities of the kept slots are those they had, bit for bit."""
    method, slots, step = ready(name, situation)
    out = method.compress(slots, situation.budget, step)
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        place = {int(p): i for i, p in enumerate(slots.positions[row, head]) if p >= 0}
        after = out.valid[row, head]
        chosen = [place[int(p)] for p in out.positions[row, head][after]]
        for side in ("keys", "values", "cardinality"):
            assert torch.equal(getattr(out, side)[row, head][after], getattr(slots, side)[row, head][chosen])


@pytest.mark.parametrize("name", LOSSLESS)
@BOUNDED
@given(situation=situations())
def test_disjoint_merges_lose_no_token(name: str, situation: Situation) -> None:
    """Cardinalities sum to what they summed to, in every row and head."""
    method, slots, step = ready(name, situation)
    out = method.compress(slots, situation.budget, step)
    assert torch.equal(out.cardinality.sum(-1), slots.cardinality.sum(-1))


@pytest.mark.parametrize("name", ["weightedkv", "d2o"])
@BOUNDED
@given(situation=situations())
def test_convex_merges_stay_within_the_values(name: str, situation: Situation) -> None:
    """Each dimension of a merged value lies between the smallest and the largest of what there was."""
    method, slots, step = ready(name, situation)
    out = method.compress(slots, situation.budget, step)
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        before = slots.values[row, head][slots.valid[row, head]]
        after = out.values[row, head][out.valid[row, head]]
        slack = 1e-5  # weights are float32
        assert bool((after >= before.amin(0) - slack).all() and (after <= before.amax(0) + slack).all())


@pytest.mark.parametrize("name", ["asymkv", "kvslimmer"])
@BOUNDED
@given(situation=situations())
def test_pair_merges_keep_the_sum_of_values(name: str, situation: Situation) -> None:
    """Σ c v of every head is what it was: the values of AsymKV and KVSlimmer are whole."""
    method, slots, step = ready(name, situation)
    out = method.compress(slots, situation.budget, step)
    total = [(s.values * s.cardinality.unsqueeze(-1)).sum(2) for s in (slots, out)]
    torch.testing.assert_close(total[0], total[1])


@pytest.mark.parametrize("name", NAMES)
@BOUNDED
@given(situation=situations())
def test_rows_do_not_see_each_other(name: str, situation: Situation) -> None:
    """The second row alone, its padding cut off, is compressed to the same slots as beside the first."""
    method, slots, step = ready(name, situation)
    together = method.compress(slots, situation.budget, step)
    if slots.size - situation.short <= situation.budget:
        return  # alone it would not be compressed; `test_every_compression` says that it is untouched

    def second(x: torch.Tensor) -> torch.Tensor:
        return x[1:, :, situation.short :] if x.dim() > 2 else x[1:]

    lone = dataclasses.replace(slots.map(second), ragged=False)
    lone_step = dataclasses.replace(
        step,
        queries=step.queries[1:],
        query_positions=step.query_positions[1:],
        window_queries=step.window_queries[1:],
        window_positions=step.window_positions[1:],
    )
    alone = method.compress(lone, situation.budget, lone_step)
    for head in range(HEADS):
        left, right = together.valid[1, head], alone.valid[0, head]
        for side in ("positions", "cardinality", "keys", "values"):
            found, expected = getattr(together, side)[1, head][left], getattr(alone, side)[0, head][right]
            torch.testing.assert_close(found, expected)
