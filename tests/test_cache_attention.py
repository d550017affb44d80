"""Attention over slots and its exact statistics, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import base

from kvrepro import attention
from kvrepro.attention import Step
from kvrepro.rope import Rotation
from kvrepro.slots import Slots

DIM, KV_HEADS, GROUP, PAST, CHUNK = 8, 2, 2, 6, 3
INV_FREQ = torch.tensor([10000.0 ** (-2 * i / DIM) for i in range(DIM // 2)], dtype=torch.float64)


def filled_oracle(positions: str, cardinality: bool, own: bool = False) -> tuple[base.Oracle, torch.Tensor, base.Chunk]:
    """An oracle whose cache has seen some evictions and merges, and its attention of three queries.

    With `own`, merged slots have a bias of their own.
    """
    rng = np.random.default_rng(0)
    oracle = base.Oracle(
        query_heads=KV_HEADS * GROUP, kv_heads=KV_HEADS, inv_freq=INV_FREQ.numpy(), positions=positions
    )
    oracle.log_cardinality = cardinality
    for h in range(KV_HEADS):
        # The past has holes (2 and 5 were merged into 3 and 6), the chunk's own tokens 9, 10, 11 come last.
        for position, count in zip([0, 1, 3, 4, 6, 8, 9, 10, 11], [1, 1, 2, 1, 2, 2, 1, 1, 1], strict=True):
            slot = base.Slot(rng.normal(size=DIM), rng.normal(size=DIM), position, count)
            slot.bias = 0.7 * position - 3.0 if own and count > 1 else 0.0
            oracle.heads[h].append(slot)
    queries = rng.normal(size=(KV_HEADS * GROUP, CHUNK, DIM))
    return oracle, torch.from_numpy(queries), oracle.attend(queries, [9, 10, 11])


def tensors(oracle: base.Oracle, padding: int = 0, own: bool = False) -> Slots:
    """The oracle's slots as tensors, behind `padding` empty ones filled with garbage."""
    rows = [[base.Slot(np.full(DIM, 9.0), np.full(DIM, 99.0), -1, 0)] * padding + slots for slots in oracle.heads]

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array([[getattr(slot, name) for slot in slots] for slots in rows]))[None]

    return Slots(
        keys=stack("key"),
        values=stack("value"),
        positions=stack("position").int(),
        cardinality=stack("cardinality").int(),
        stats={"bias": stack("bias")} if own else {},
        dense=False,
        ragged=padding > 0,
    )


def make_step(queries: torch.Tensor, positions: str, cardinality: bool, softcap: float | None = None) -> Step:
    """The pass the oracle attended with."""
    return Step(
        queries=queries.view(1, KV_HEADS, GROUP, CHUNK, DIM),
        query_positions=torch.tensor([[9, 10, 11]], dtype=torch.int32),
        scale=DIM**-0.5,
        softcap=softcap,
        positions=positions,
        cardinality_bias=cardinality,
        rotation=Rotation(INV_FREQ),
    )


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("own", [False, True], ids=["", "own bias"])
@pytest.mark.parametrize("cardinality", [False, True])
@pytest.mark.parametrize("positions", ["original", "cache", "cardinality"])
@pytest.mark.parametrize("statistics", [(), ("mass", "last")])
def test_attention_over_slots_equals_loops(
    positions: str, cardinality: bool, own: bool, padding: int, statistics: tuple[str, ...]
) -> None:
    """Output and statistics, fused and in blocks, in every position mode, with and without empty slots in front."""
    oracle, queries, chunk = filled_oracle(positions, cardinality, own)
    slots = tensors(oracle, padding, own)
    output, found = attention.attend(make_step(queries, positions, cardinality), slots, statistics)
    np.testing.assert_allclose(output.reshape(KV_HEADS * GROUP, CHUNK, DIM), chunk.outputs, atol=1e-10)
    if not statistics:
        return
    for g, rows in enumerate(chunk.probabilities):
        mass = [sum(row[j] for row in rows if j < len(row)) for j in range(PAST + CHUNK)]
        index = (0, g // GROUP, g % GROUP)
        np.testing.assert_allclose(found["mass"][index], [0.0] * padding + mass, atol=1e-10)
        np.testing.assert_allclose(found["last"][index], [0.0] * padding + rows[-1], atol=1e-10)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One query at a time gives the column sums of all at once."""
    oracle, queries, _ = filled_oracle("cache", False)
    step, slots = make_step(queries, "cache", False), tensors(oracle)
    whole = attention.attend(step, slots, ("mass", "last"))
    monkeypatch.setattr(attention, "BLOCK", {"cpu": 1})
    assert [p.shape[3] for _, p in step.blocks(slots)] == [1] * CHUNK
    blocked = attention.attend(step, slots, ("mass", "last"))
    torch.testing.assert_close(blocked[0], whole[0])
    torch.testing.assert_close(blocked[1], whole[1])


def test_column_sums_of_a_whole_prompt() -> None:
    """The mass of a prompt in one pass is the column sums of its causal attention matrix."""
    generator = torch.Generator().manual_seed(4)
    keys, values = torch.randn(2, 1, KV_HEADS, 20, DIM, generator=generator, dtype=torch.float64)
    queries = torch.randn(1, KV_HEADS, GROUP, 20, DIM, generator=generator, dtype=torch.float64)
    place = torch.arange(20, dtype=torch.int32)
    slots = Slots(keys, values, place.expand(1, KV_HEADS, 20), torch.ones(1, KV_HEADS, 20, dtype=torch.int32))
    _, found = attention.attend(Step(queries, place.expand(1, 20), scale=DIM**-0.5), slots, ("mass",))
    for h, g in np.ndindex(KV_HEADS, GROUP):
        expected = base.column_sums(queries[0, h, g].numpy(), keys[0, h].numpy(), DIM**-0.5, 0)
        np.testing.assert_allclose(found["mass"][0, h, g], expected, atol=1e-10)


def test_softcap_is_applied_before_the_softmax() -> None:
    """Gemma's cap c tanh(logit / c), the same with and without statistics, and different from no cap."""
    oracle, queries, chunk = filled_oracle("original", False)
    slots = tensors(oracle)
    capped, _ = attention.attend(make_step(queries, "original", False, softcap=0.5), slots, ())
    counted, _ = attention.attend(make_step(queries, "original", False, softcap=0.5), slots, ("mass",))
    torch.testing.assert_close(capped, counted)
    query = queries[0, 0].numpy()
    dots = [float(np.dot(query, slot.key)) * DIM**-0.5 for slot in oracle.heads[0][: PAST + 1]]
    row = base.softmax([0.5 * math.tanh(dot / 0.5) for dot in dots])
    expected = sum(p * slot.value for p, slot in zip(row, oracle.heads[0], strict=False))
    np.testing.assert_allclose(capped[0, 0, 0, 0], expected, atol=1e-10)
    assert not np.allclose(expected, chunk.outputs[0, 0], atol=1e-6)


@pytest.mark.parametrize("statistics", [(), ("mass",)])
def test_a_padding_query_scores_nothing(statistics: tuple[str, ...]) -> None:
    """A query that is padding adds no mass and gives no NaN."""
    oracle, queries, _ = filled_oracle("original", False)
    step = make_step(queries, "original", False)
    padded = Step(step.queries, torch.tensor([[-1, 10, 11]], dtype=torch.int32), step.scale)
    slots = tensors(oracle, padding=2)
    output, found = attention.attend(padded, slots, statistics)
    assert bool(output.isfinite().all())
    for name in statistics:
        np.testing.assert_allclose(found[name].sum(-1), 2.0)  # two real queries, each a probability distribution
