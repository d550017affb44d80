"""The least-squares fits against other solvers, and Attention Matching: heads that cannot be fitted, others' slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from oracles.fitting import pursuit
from recording import recorded
from scipy.optimize import nnls
from tiny import tiny_model, tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode

import kvrepro
from kvrepro import fit, methods
from kvrepro.adapter import cache_arguments
from kvrepro.attention import Step, attend, observe
from kvrepro.methods import attention_matching
from kvrepro.methods.attention_matching import BASES, AttentionMatching, _alike, _Seen
from kvrepro.rope import Rotation
from kvrepro.slots import Slots, compact, top


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(m: int, s: int, *, heads: int = 3) -> Tensor:
    """Attention ``[2, heads, 2, m, s]``; the second row's first query is padding."""
    p = torch.softmax(2 * random(2, heads, 2, m, s, seed=1), -1)
    p[1, :, :, 0] = 0
    return p


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m, s", [(4, 30), (20, 7), (9, 18)], ids=["few queries", "few slots", "as many"])
def test_primal_and_dual_give_the_same_values(m: int, s: int) -> None:
    p, target, start = attention(m, s), random(2, 3, 2, m, 5, seed=2), random(2, 3, s, 5, seed=3)
    target[1, :, :, 0] = 0
    primal, dual = (fit.fit_values(p, target, start, [1e-3, 0.1, 10.0], dual=dual) for dual in (False, True))
    torch.testing.assert_close(primal.values, dual.values)
    torch.testing.assert_close(primal.gain, dual.gain)
    torch.testing.assert_close(fit.best_values(p, target, start, [1e-3, 0.1, 10.0]), primal.values)


@pytest.mark.parametrize("m, s", [(4, 30), (20, 7)])
def test_primal_and_dual_give_the_same_weights(m: int, s: int) -> None:
    share = 0.7 * attention(m, s)
    primal, dual = (fit.best_weights(share, 15, dual=dual) for dual in (False, True))
    torch.testing.assert_close(primal, dual)
    in_single = fit.best_weights(share.float(), 15)
    assert in_single.dtype == torch.float32
    torch.testing.assert_close(in_single.double(), primal, rtol=1e-2, atol=1e-3)


def test_weights_carried_to_the_end_are_those_of_scipy() -> None:
    share = random(2, 40, 6, seed=4).abs() * torch.tensor([0.05, 0.5, 0.1, 0.2, 0.05, 0.3])
    share[..., 0] += 1
    path = fit.Masses.of(share, share, dual=False).descent(20000).squeeze(-2)
    for h in range(2):
        expected, _ = nnls(share[h].numpy(), np.ones(40))
        assert 0 < np.count_nonzero(expected) < 6
        np.testing.assert_allclose(path[-1, h], expected, atol=1e-8)


def test_gain_is_what_the_held_out_queries_gain() -> None:
    p, target, start = attention(10, 6), random(2, 3, 2, 10, 4, seed=2), random(2, 3, 6, 4, seed=3)
    target[1, :, :, 0] = 0
    found = fit.fit_values(p, target, start, [0.3])
    first, second = slice(5), slice(5, None)
    for b in range(2):
        for h in range(3):
            rows, wanted = (x[b, h, :, first].flatten(0, 1).numpy() for x in (p, target))
            pull = 0.3 * (rows**2).sum() / 6 * np.eye(6)
            v = start[b, h].numpy()
            fitted = v + np.linalg.solve(rows.T @ rows + pull, rows.T @ (wanted - rows @ v))
            rows, wanted = (x[b, h, :, second].flatten(0, 1).numpy() for x in (p, target))
            before, after = (((rows @ x - wanted) ** 2).sum() for x in (v, fitted))
            assert float(found.gain[b, h]) == pytest.approx(before - after)


@pytest.mark.parametrize("dual", [False, True])
def test_a_head_that_cannot_be_solved_harms_no_other(dual: bool) -> None:
    p, target, start = attention(10, 6), random(2, 3, 2, 10, 4, seed=2), random(2, 3, 6, 4, seed=3)
    expected = fit.fit_values(p, target, start, dual=dual)
    p[0, 1, 0, 3, 2] = torch.nan
    found = fit.fit_values(p, target, start, dual=dual)
    broken = torch.zeros(2, 3, dtype=torch.bool)
    broken[0, 1] = True
    assert bool(found.values[broken].isnan().any()) and bool((found.gain[broken] == -torch.inf).all())
    torch.testing.assert_close(found.values[~broken], expected.values[~broken])
    torch.testing.assert_close(found.gain[~broken], expected.gain[~broken])


@pytest.mark.parametrize("dual", [False, True])
def test_a_negative_matrix_has_no_solution(dual: bool) -> None:
    found = fit.ridge_solution(-torch.eye(3, dtype=torch.float64), random(3, 2), torch.zeros(()), 5 if dual else None)
    assert bool(found.isnan().all())


# --- heads that fall back --------------------------------------------------------------------------------------------


def situation(n: int, size: int = 20) -> tuple[Slots, Step]:
    """Three KV heads of two query heads, the last `n` of `size` slots new."""
    positions = torch.arange(size, dtype=torch.int32).expand(1, 3, -1).contiguous()
    slots = Slots(
        keys=random(1, 3, size, 8),
        values=random(1, 3, size, 8, seed=1),
        positions=positions,
        cardinality=torch.ones_like(positions),
        stats={"bias": torch.zeros(1, 3, size)},
    )
    queries = 2 * random(1, 3, 2, n, 8, seed=2)
    step = Step(queries, positions[:, 0, size - n :], scale=8**-0.5, rotation=Rotation(0.3 ** torch.arange(4.0)))
    return slots, step


def evicted(left: Slots, slots: Slots, head: int) -> bool:
    """Whether a head's slots are as they were."""
    kept = compact(slots, torch.isin(slots.positions, left.positions[:, head]), left.size)
    same = (torch.equal(getattr(left, side)[:, head], getattr(kept, side)[:, head]) for side in ("keys", "values"))
    return all(same) and not bool(left.stats["bias"][:, head].any())


@pytest.mark.parametrize("padding, chosen", [(0, [2, 5, 8, 11]), (6, [7, 8, 10, 11]), (9, [9, 10, 11])])
def test_reference_queries_are_spread_over_the_pass(padding: int, chosen: list[int]) -> None:
    """The newest is among them, padding is not; they stand behind it, told here by their lengths."""
    slots, step = situation(12)
    places = torch.arange(-padding, 12 - padding, dtype=torch.int32).clamp_min(-1)[None]
    valid = (torch.arange(20) >= 8 + padding).expand_as(slots.positions)
    slots = dataclasses.replace(
        slots,
        positions=torch.arange(-8 - padding, 12 - padding, dtype=torch.int32).expand_as(valid).masked_fill(~valid, -1),
        cardinality=valid.to(torch.int32),
        ragged=True,
    )
    step = dataclasses.replace(step, query_positions=places)
    asked = methods.create("attention_matching", count=4).reference(slots, step, 6)
    there = asked.query_positions[0] >= 0
    lengths = asked.queries.norm(dim=-1)[0, 0, 0][there]
    torch.testing.assert_close(lengths, step.queries.norm(dim=-1)[0, 0, 0, chosen])
    assert asked.query_positions[0, there].tolist() == [12 - padding + i for i in reversed(range(len(chosen)))]


def test_while_decoding_all_queries_of_the_window_ask_in_order() -> None:
    """The newest stands right behind the newest token, whatever padding lies among them; none is left out."""
    slots, step = situation(1)
    places = torch.tensor([[-1, 14, -1, -1, 17, 18, 19]], dtype=torch.int32)
    window = random(1, 3, 2, 7, 8, seed=3)
    step = dataclasses.replace(step, window_queries=window, window_positions=places)
    method = methods.create("attention_matching", window=7, fitted=2)
    asked = method._see(slots, 112, step).asked
    assert asked.query_positions.tolist() == [[-1, 23, -1, -1, 22, 21, 20]]
    torch.testing.assert_close(asked.queries.norm(dim=-1), window.norm(dim=-1))


def test_a_share_of_the_slots_is_rounded_alike_wherever_it_is_computed() -> None:
    """Number of slots on the host or on the device: 0.7 of 90 is below 63 in 64 bits, and 63 in 32."""
    method = methods.create("attention_matching", newest=0.7)
    score, now = random(2, 1, 2, 120)
    valid = torch.ones(1, 2, 120, dtype=torch.bool)
    found = [
        method._marked(score, now, valid, ~valid, free)
        for free in (90, torch.full((1, 2, 1), 90), torch.full((1, 2, 1), 90, dtype=torch.int32))
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    newest = now.argsort(dim=2, descending=True)[:, :, :62]
    assert bool(found[0].gather(2, newest).all())
    assert found[0].sum(dim=2).tolist() == [[90, 90]]


def test_a_slot_s_score_is_the_mean_with_the_tokens_beside_it() -> None:
    """By hand; empty slots, here in front, and slots whose tokens are not neighbours count not."""
    slots, _ = situation(6)
    score = torch.tensor([[[7.0, 7, 1, 4, 4, 0], [3, 0, 0, 3, 6, 0]]])
    tokens = torch.tensor([[[-1, -1, 0, 1, 2, 3], [0, 1, 4, 6, 7, 8]]], dtype=torch.int32)
    slots = dataclasses.replace(slots, positions=tokens, cardinality=(tokens >= 0).int(), ragged=True)
    expected = torch.tensor([[[0, 0, 2.5, 3, 8 / 3, 2], [1.5, 1.5, 0, 4.5, 3, 3]]])
    found = attention_matching._smoothed(score, slots)
    torch.testing.assert_close(found.where(slots.valid, 0.0), expected)


def test_scores_are_smoothed_where_queries_are_left_out_alone() -> None:
    slots, step = situation(12)
    method = methods.create("attention_matching", count=6, newest=0.0, heads="same")
    asked = method.reference(slots, step, 6)
    assert asked.queries.shape[3] == 6
    found = method._see(slots, 6, step)
    plain = observe(asked, slots, power=2).mass
    torch.testing.assert_close(found.score, attention_matching._smoothed(plain, slots))
    whole = methods.create("attention_matching", count=12, newest=0.0, heads="same")
    every = observe(whole.reference(slots, step, 6), slots, power=2).mass
    torch.testing.assert_close(whole._see(slots, 6, step).score, every)


def test_what_waits_is_small() -> None:
    """Until the last layer has attended, the others keep the queries that are fitted to, and what chooses slots."""
    slots, step = situation(12)
    method = methods.create("attention_matching", fitted=4)
    step = dataclasses.replace(step, again=step)
    waits = method.waiting(slots, 14, step)
    asked = waits.found.asked
    assert waits.queries.shape[3] == 2 and asked.queries.shape[3] == 4
    assert asked.queries.untyped_storage().nbytes() == asked.queries.numel() * asked.queries.element_size()
    assert all(x.view is None and x.again is None for x in (waits, asked))
    assert waits.found.score.shape == slots.positions.shape


def test_heads_that_can_be_fitted_are() -> None:
    slots, step = situation(20)
    left = methods.create("attention_matching").compress(slots, 14, step)
    for head in range(3):
        assert evicted(left, slots, head) == bool(left.state["fallbacks"][0, head])
    assert float(left.state["fallbacks"].sum()) < 3


class Rounded(TorchFunctionMode):
    """Matrices of float32 are multiplied as with TF32 while that is on: what is beyond 11 bits is cut off."""

    on = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.on and func in (Tensor.matmul, Tensor.__matmul__) and args[0].dtype == torch.float32:
            args = [(x.contiguous().view(torch.int32) & ~((1 << 13) - 1)).view(torch.float32) for x in args]
        return func(*args, **(kwargs or {}))

    @contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        """Instead of `fit.tf32`."""
        before, self.on = self.on, on
        yield
        self.on = before


def test_halves_of_the_queries_are_views() -> None:
    """Of shares as the fit forms them; they are the largest that it holds."""
    share = random(2, 3, 6, 4, 5, seed=0).transpose(2, 3)
    for part in (slice(3), slice(3, None)):
        rows = fit.in_rows(share[:, :, :, part])
        assert rows.untyped_storage().data_ptr() == share.untyped_storage().data_ptr()
        torch.testing.assert_close(rows[1, 2, 4 + 3], share[1, 2, 3, part.start or 0 :][1])


@pytest.mark.parametrize("sharp", [0.5, 1.0, 3.0])
def test_rounding_on_a_gpu_costs_no_accuracy(sharp: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other queries' output, slots fitted in a 16-bit model miss as much with and without, to a hundredth."""
    keys, values = (random(1, 2, 600, 32, seed=seed).bfloat16() for seed in (0, 1))
    queries = (sharp * (random(1, 2, 4, 96, 32, seed=2) + random(1, 2, 4, 1, 32, seed=3))).bfloat16()
    positions = torch.arange(600, dtype=torch.int32).expand(1, 2, -1).contiguous()
    stats = {"bias": torch.zeros(1, 2, 600)}
    slots = Slots(keys, values, positions, torch.ones_like(positions), stats=stats, dense=False)
    places = torch.full((1, 48), 600, dtype=torch.int32)
    asked, others = (Step(queries[:, :, :, i::2], places, scale=32**-0.5, behind=True) for i in (0, 1))
    whole, wanted = observe(asked, slots, power=2), observe(others, slots).output
    left = compact(slots, top(whole.mass, slots.valid, 400), 400)
    method = methods.create("attention_matching")

    def missed() -> float:
        """The error once fitted."""
        fitted, bias, _ = method.fit(left, asked, whole.output.bfloat16().float(), whole.lse)
        found = observe(others, dataclasses.replace(left, values=fitted, stats={"bias": bias})).output
        return float((found - wanted).norm())

    plain = missed()
    monkeypatch.setattr(fit, "_halved", lambda rows: rows.bfloat16())
    with Rounded() as mode:
        for module in (fit, attention_matching):
            monkeypatch.setattr(module, "tf32", mode.switched)
        rounded = missed()
    assert plain != rounded == pytest.approx(plain, rel=1e-2)


def test_tf32_is_as_it_was_afterwards() -> None:
    """Whichever of PyTorch's two ways it was set by, both can still be read."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            for asked in (True, False):
                with fit.tf32(asked):
                    assert not hasattr(matmul, "fp32_precision") or matmul.fp32_precision == ("ieee", "tf32")[asked]
                assert matmul.allow_tf32 == allowed
    finally:
        matmul.allow_tf32 = before


def test_too_few_queries_to_fit_and_judge() -> None:
    """One query cannot do both: the slots that stay are as they were, in every head."""
    slots, step = situation(2)
    method = methods.create("attention_matching", count=1)
    left = method.compress(slots, 14, step)
    assert all(evicted(left, slots, head) for head in range(3))
    assert left.state["fallbacks"].tolist() == [[1.0, 1.0, 1.0]]
    again = method.compress(left, 12, step)
    assert bool((again.state["fallbacks"] >= 1).all())


def test_while_decoding_what_was_fitted_stays() -> None:
    """A window's queries choose slots; what a prompt's gave the slots that stay is not fitted again."""
    model, ids = kvrepro.prepare(tiny_model(layers=2)), tokens(1, 80)
    cache = kvrepro.make_cache(model, "attention_matching", 16, heads="same", window=6, block=4)
    kvrepro.prefill(model, ids[:, :40], cache)
    before = [layer.slots for layer in cache.compressed]
    assert any(bool(slots.stats["bias"].any()) for slots in before)
    with torch.no_grad():
        for at in range(40, 48):
            model(ids[:, at : at + 1], **cache_arguments(model, cache))
    for old, layer in zip(before, cache.compressed, strict=True):
        new = layer.slots
        same = new.positions.unsqueeze(-1) == old.positions.unsqueeze(2)  # [B, H, S', S]
        stays, index = same.any(-1), same.int().argmax(-1)
        assert bool(stays.any()) and new.size < old.size + 8
        kept = old.values.gather(2, index.unsqueeze(-1).expand(*index.shape, old.values.shape[-1]))
        assert torch.equal(new.values[stays], kept[stays])
        assert torch.equal(new.stats["bias"][stays], old.stats["bias"].gather(2, index)[stays])
        assert not bool(new.stats["bias"][~stays].any())
        assert torch.equal(new.state["fallbacks"], old.state["fallbacks"])


@pytest.mark.parametrize("keys", BASES)
def test_one_token_at_a_time_a_hybrid_is_its_base(keys: str) -> None:
    """Read without a prompt, another method's slots are what that method leaves: nothing is fitted to few queries."""
    model, ids = kvrepro.prepare(tiny_model(layers=2)), tokens(1, 40)
    caches = [
        kvrepro.make_cache(model, "attention_matching", 16, keys=keys, window=8, block=1),
        kvrepro.make_cache(model, keys, 16, **BASES[keys]),
    ]
    with torch.no_grad():
        for at in range(40):
            for cache in caches:
                model(ids[:, at : at + 1], **cache_arguments(model, cache))
    for mine, base in zip(*(cache.compressed for cache in caches), strict=True):
        for side in ("positions", "keys", "values"):
            torch.testing.assert_close(getattr(mine, side), getattr(base, side))
        assert not bool(mine.slots.stats["bias"].any())


def test_attention_on_one_token() -> None:
    """A head that sees one slot has nothing to gain; the others are fitted as without it."""
    slots, step = situation(20)
    method = methods.create("attention_matching", newest=0.0)  # the newest query's choice is one for all heads
    expected = method.compress(slots, 14, step)
    keys, queries = slots.keys.clone(), step.queries.clone()
    keys[:, 1] = 0
    keys[:, 1, 5, 3] = 1e4  # the slowest rotation
    queries[:, 1] = 0
    queries[:, 1, :, :, 3] = 10
    lonely = dataclasses.replace(slots, keys=keys)
    left = method.compress(lonely, 14, dataclasses.replace(step, queries=queries))
    assert bool(left.values.isfinite().all()) and 5 in left.positions[0, 1].tolist()
    assert evicted(left, lonely, 1) and float(left.state["fallbacks"][0, 1]) == 1
    for head in (0, 2):
        torch.testing.assert_close(left.values[:, head], expected.values[:, head])
        torch.testing.assert_close(left.stats["bias"][:, head], expected.stats["bias"][:, head])


def test_equal_keys_make_a_singular_system() -> None:
    """Slots that no query can tell apart: the ridge decides, and nothing is infinite."""
    slots, step = situation(20)
    keys = slots.keys.clone()
    keys[:, :, 1:] = keys[:, :, :1]
    rotation = Rotation(torch.zeros(4))
    left = methods.create("attention_matching", ridge=1e-9).compress(
        dataclasses.replace(slots, keys=keys), 14, dataclasses.replace(step, rotation=rotation)
    )
    assert bool(left.values.isfinite().all() and left.stats["bias"].isfinite().all())


def test_numbers_that_are_none_reach_no_slot() -> None:
    """A head whose logits overflow keeps its slots as they were."""
    slots, step = situation(20)
    queries = step.queries.clone()
    queries[:, 2] = torch.inf
    left = methods.create("attention_matching").compress(slots, 14, dataclasses.replace(step, queries=queries))
    assert bool(left.values.isfinite().all()) and evicted(left, slots, 2)
    assert float(left.state["fallbacks"][0, 2]) == 1


# --- reference queries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("queries", "fitted"), [("prompt", 256), ("prompt", 25), ("prompt", 7), ("gaussian", 10), ("repeat", 8)]
)
def test_padding_and_neighbours_change_no_row(queries: str, fitted: int) -> None:
    """A prompt is compressed to the same slots alone and beside a longer one, and twice to the same bits."""
    model = kvrepro.prepare(tiny_model(layers=2))
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    options = {"queries": queries, "fitted": fitted, "count": 24 if fitted in (7, 10) else 33}
    caches = [kvrepro.make_cache(model, "attention_matching", 16, **options) for _ in range(3)]
    kvrepro.prefill(model, ids, caches[0], attention_mask=mask)
    kvrepro.prefill(model, ids[1:, 9:], caches[1])
    kvrepro.prefill(model, ids[1:, 9:], caches[2])
    for layers in zip(*(cache.compressed for cache in caches), strict=True):
        assert torch.equal(layers[1].values, layers[2].values)
        beside, alone = row_of(layers[0].slots, 1), row_of(layers[1].slots, 0)
        assert torch.equal(beside.positions, alone.positions)
        torch.testing.assert_close(beside.values, alone.values)
        torch.testing.assert_close(beside.stats["bias"], alone.stats["bias"])
        assert torch.equal(beside.state["fallbacks"], alone.state["fallbacks"])


def row_of(slots: Slots, row: int) -> Slots:
    """One row's slots, as wide as its fullest head."""
    size = int(slots.valid[row].sum(-1).max())
    return slots.map(lambda x: x[row : row + 1, :, -size:] if x.dim() > 2 else x[row : row + 1])


# --- slots that the heads share ---------------------------------------------------------------------------------------


def test_pooled_slots_go_to_what_is_attended_to_most() -> None:
    """The best of all slots of all heads, each head's best few aside: by hand, two layers of two heads."""
    method = methods.create("attention_matching", least=0.5, block=1)
    scores = torch.tensor([[[9.0, 8, 7, 6, 5, 0], [1, 1, 4, 1, 1, 0]], [[2, 2, 2, 0.5, 3, 0], [0, 0, 0, 0, 0, 0]]])
    positions = torch.arange(6, dtype=torch.int32).expand(1, 2, -1).contiguous()
    zeros = torch.zeros(1, 2, 6, 1)
    slots = Slots(zeros, zeros, positions, torch.ones_like(positions))
    step = Step(torch.zeros(1, 2, 1, 2, 1), positions[:, 0, :2], scale=1.0)
    seen = [_Seen(step, zeros, zeros, score[None], score[None]) for score in scores]
    rooms = method.split([slots, slots], [dataclasses.replace(step, found=each) for each in seen], 4)
    # Two each: the newest, which stays in any case, and the best. Then 8 more: 8, 7, 6, 5, 2, 2, 2 and the first 1.
    assert [x.tolist() for x in rooms] == [[[6, 3]], [[5, 2]]]


@pytest.mark.parametrize("chunk", [None, 17])
def test_pooled_heads_keep_to_the_budget_and_its_bytes(chunk: int | None) -> None:
    """On average a head holds the budget and no byte is held for slots that are empty, in the prompt and after it."""
    model = kvrepro.prepare(tiny_model(layers=3))
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :50] = 0  # this row never overflows while the prompt is read
    pooled, same = (kvrepro.make_cache(model, "attention_matching", 20, heads=heads) for heads in ("pooled", "same"))
    for cache in (pooled, same):
        kvrepro.prefill(model, ids, cache, attention_mask=mask, chunk=chunk)
    count = torch.stack([layer.slots.valid.sum(-1) for layer in pooled.compressed])  # [L, B, H]
    assert count[:, 0].sum() == 20 * count[:, 0].numel() and len(count[:, 0].unique()) > 2
    assert bool((count[:, 1] == 10).all())
    heads = 8 * count.numel()  # how many a head may hold, and holds
    row = same.nbytes - sum(x.numel() * x.element_size() for layer in same.compressed for x in layer.window)
    window = pooled.nbytes - sum(layer._slots.nbytes for layer in pooled.compressed) - heads // 2
    per_slot = (row - 4 * count.numel()) / (2 * 20 * 6)
    filled = sum(layer._slots.nbytes for layer in pooled.compressed) - heads // 2 - 4 * count.numel()
    assert window == same.nbytes - row and filled == per_slot * int(count.sum())
    for step in range(25):
        ids = torch.cat([ids, tokens(2, 1)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        with torch.no_grad():
            model(ids[:, -1:], attention_mask=mask, **cache_arguments(model, pooled))
        for layer in pooled.compressed:
            assert bool((layer.slots.valid.sum(-1) <= layer.rooms).all()), step
    assert bool((torch.stack([layer.rooms for layer in pooled.compressed])[:, 1] == 20).all())


@pytest.mark.parametrize("budget", [8, 20])
def test_layers_fitted_side_by_side_are_as_each_alone(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many heads memory holds at a time; one row of the batch still fits where the budget is 20."""
    model = kvrepro.prepare(tiny_model(layers=3))
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :43] = 0
    caches, sizes = [], []
    plain = AttentionMatching._compressed
    for together in (1, attention_matching._TOGETHER):
        monkeypatch.setattr(attention_matching, "_TOGETHER", together)
        monkeypatch.setattr(AttentionMatching, "_compressed", lambda *a: sizes.append(len(a[1])) or plain(*a))
        caches.append(kvrepro.make_cache(model, "attention_matching", budget))
        kvrepro.prefill(model, ids, caches[-1], attention_mask=mask)
    assert sizes == [1, 1, 1, 3]
    for alone, beside in zip(caches[0].compressed, caches[1].compressed, strict=True):
        assert torch.equal(alone.positions, beside.positions)
        torch.testing.assert_close(alone.values, beside.values)
        torch.testing.assert_close(alone.slots.stats["bias"], beside.slots.stats["bias"])
        assert torch.equal(alone.fallbacks, beside.fallbacks)


@pytest.mark.parametrize("fitted", [4, 64])
def test_memory_bounds_how_many_layers_are_fitted_side_by_side(fitted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's shares count, and its key and value: here two layers of five come together."""
    model, budget = kvrepro.prepare(tiny_model(layers=5)), 12
    sizes, each = [], 0
    plain = AttentionMatching._compressed

    def compressed(method: AttentionMatching, layers: list, budget: int) -> list[Slots]:
        """Note what comes together."""
        sizes.append(len(layers))
        return plain(method, layers, budget)

    monkeypatch.setattr(AttentionMatching, "_compressed", compressed)
    for _ in range(2):
        cache = kvrepro.make_cache(model, "attention_matching", budget, fitted=fitted)
        kvrepro.prefill(model, tokens(1, 60), cache)
        assert sizes == ([2, 2, 1] if each else [5])
        sizes.clear()
        rooms = torch.stack([layer.rooms for layer in cache.compressed])
        slots, group = cache.compressed[0].slots, model.config.num_attention_heads // rooms.shape[2]
        side = slots.keys.shape[3] + slots.values.shape[3]
        each = rooms[0].numel() * slots.keys.element_size() * budget * (group * min(fitted, 60) + side)
        monkeypatch.setattr(attention_matching, "_TOGETHER", 3 * each - 1)


def test_rows_of_pooled_heads_can_be_reordered() -> None:
    """Beam search moves what each head may hold with its slots."""
    model = kvrepro.prepare(tiny_model(layers=2))
    cache = kvrepro.make_cache(model, "attention_matching", 12)
    kvrepro.prefill(model, tokens(2, 40), cache)
    before = [(row_of(layer.slots, 0), row_of(layer.slots, 1), layer.rooms) for layer in cache.compressed]
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    for layer, (first, second, rooms) in zip(cache.compressed, before, strict=True):
        assert torch.equal(layer.rooms, rooms[[1, 1, 0]])
        for row, want in enumerate((second, second, first)):
            assert torch.equal(row_of(layer.slots, row).values, want.values)


def test_pooling_lowers_the_error_that_it_is_for() -> None:
    """As many slots in all bring the predictions nearer to the full cache's."""
    model = kvrepro.prepare(tiny_model(layers=2))
    ids, sizes = tokens(8, 120), {"context": 100, "continuation": 20}
    pooled, same = (
        kvrepro.fidelity(model, ids, "attention_matching", 30, heads=heads, **sizes).kl.mean()
        for heads in ("pooled", "same")
    )
    assert pooled < same


def test_a_quantised_cache_has_no_pooled_heads() -> None:
    model = kvrepro.prepare(tiny_model(layers=2))
    with pytest.raises(ValueError, match="make the cache with heads='same'"):
        kvrepro.quantise(kvrepro.make_cache(model, "attention_matching", 12))


def test_draws_have_the_queries_mean_and_covariance() -> None:
    slots, step = situation(20)
    method = methods.create("attention_matching", queries="gaussian", count=20000)
    plain = 0.5 + random(1, 3, 2, 20, 8, seed=7)
    drawn = method._drawn(plain, torch.ones(1, 20, dtype=torch.bool), layer=1)
    torch.testing.assert_close(drawn.mean(3), plain.mean(3), atol=0.05, rtol=0)
    off = plain - plain.mean(3, keepdim=True)
    centred = drawn - drawn.mean(3, keepdim=True)
    torch.testing.assert_close(centred.mT @ centred / 20000, off.mT @ off / 20, atol=0.1, rtol=0)
    other = methods.create("attention_matching", queries="gaussian", count=20000, seed=1)
    assert not torch.equal(other._drawn(plain, torch.ones(1, 20, dtype=torch.bool), layer=1), drawn)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_prompt_is_read_twice(kv_heads: int) -> None:
    """The second reading's queries and outputs are those of the text and its repetition in a full cache."""
    model = kvrepro.prepare(tiny_model(layers=3, kv_heads=kv_heads))
    ids = tokens(1, 30)
    whole = kvrepro.make_cache(model, "full")
    with recorded(whole) as expected, torch.no_grad():
        model(torch.cat([ids, ids], dim=1), **cache_arguments(model, whole))
    cache = kvrepro.make_cache(model, "attention_matching", 16, queries="repeat")
    with recorded(cache) as passes:
        logits = kvrepro.prefill(model, ids, cache).logits
    torch.testing.assert_close(logits, model(ids).logits[:, -1:])
    for layer, (first, second), (both,) in zip(cache.compressed, passes, expected, strict=True):
        torch.testing.assert_close(first.output, both.output[:, :, :30])
        torch.testing.assert_close(second.queries, both.queries[:, :, 30:])
        torch.testing.assert_close(second.output, both.output[:, :, 30:])
        assert (layer.fill(layer.slots), layer.seen, layer.row_tokens.tolist()) == (16, 30, [30])
        assert int(layer.positions.max()) == 29 and layer.probe is None
        assert torch.equal(layer.window[0].flatten(1, 2), first.queries[:, :, -layer.width :])
    held = torch.stack([layer.slots.valid.sum(-1) for layer in cache.compressed])
    assert held.sum() == 16 * held.numel() and bool((held != 16).any())


def test_the_second_reading_is_what_is_fitted_to() -> None:
    """Slots and values are those of `compress` with that pass beside the first."""
    slots, step = situation(20)
    repeat = methods.create("attention_matching", queries="repeat")
    again = dataclasses.replace(
        step, queries=2 * random(1, 3, 2, 20, 8, seed=8), query_positions=step.query_positions + 20
    )
    left = repeat.compress(slots, 14, dataclasses.replace(step, again=again))
    moved = dataclasses.replace(step, queries=again.queries, query_positions=again.query_positions)
    other = methods.create("attention_matching").reference(slots, moved, 14)
    asked = repeat.reference(slots, dataclasses.replace(step, again=again), 14)
    assert torch.equal(asked.queries, other.queries) and torch.equal(asked.query_positions, other.query_positions)
    assert not torch.equal(left.values, methods.create("attention_matching").compress(slots, 14, step).values)


def test_each_chunk_that_overflows_is_read_twice() -> None:
    model = kvrepro.prepare(tiny_model(layers=2))
    cache = kvrepro.make_cache(model, "attention_matching", 16, queries="repeat", window=4)
    with recorded(cache) as passes:
        kvrepro.prefill(model, tokens(1, 39), cache, chunk=12)
    # The first of 12, 12, 12 and 3 fits, and the last is shorter than the window.
    assert [seen.queries.shape[2] for seen in passes[1]] == [12, 12, 12, 12, 12, 3]
    assert [layer.fill(layer.slots) for layer in cache.compressed] == [16, 16]
    assert cache.get_seq_length() == 39


def test_a_prompt_that_fits_is_read_once_and_decoding_takes_the_window() -> None:
    model = kvrepro.prepare(tiny_model(layers=2))
    ids = tokens(1, 12)
    repeat, prompt = (
        kvrepro.make_cache(model, "attention_matching", 16, queries=queries, window=4)
        for queries in ("repeat", "prompt")
    )
    with recorded(repeat) as passes:
        kvrepro.prefill(model, ids, repeat)
    assert len(passes[0]) == 1
    repeat.reset()
    assert torch.equal(kvrepro.generate(model, ids, repeat, 12), kvrepro.generate(model, ids, prompt, 12))
    assert torch.equal(repeat.compressed[1].values, prompt.compressed[1].values)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_sliding_windows_hold_no_token_twice(family: str) -> None:
    """Neither of the second reading nor of the one for AsymKV's gradient."""
    model = kvrepro.prepare(tiny_model(family))
    ids = tokens(1, 40)
    plain = kvrepro.make_cache(model, "attention_matching", 16)
    for name, options, chunk in (("attention_matching", {"queries": "repeat"}, None), ("asymkv", {}, 4)):
        cache = kvrepro.make_cache(model, name, 16, **options)
        kvrepro.prefill(model, ids, cache, chunk=chunk)
        sliding = [layer for layer in cache.layers if layer not in cache.compressed]
        assert [layer.get_seq_length() for layer in sliding] == [40]
        if chunk is None:
            kvrepro.prefill(model, ids, plain)
            assert torch.equal(cache.layers[1].keys, plain.layers[1].keys)


def test_what_cannot_read_twice_says_so() -> None:
    model, ids = kvrepro.prepare(tiny_model()), tokens(2, 24)
    mask = torch.ones_like(ids)
    options = {"budget": 16, "queries": "repeat"}
    said = "read the prompt with it, write with kvrepro.generate, or choose queries='prompt'"
    with pytest.raises(ValueError, match=said):
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=2,
            past_key_values=kvrepro.make_cache(model, "attention_matching", **options),
        )
    full = kvrepro.make_cache(model, "full")
    passes = full.record()
    kvrepro.prefill(model, ids, full)
    for name, more in (("attention_matching", options), ("asymkv", {"budget": 16})):
        with pytest.raises(ValueError, match=f"{name}, with .* read the prompt with kvrepro.prefill instead"):
            kvrepro.make_cache(model, name, **more).replay(passes)
    mixed = kvrepro.prepare(tiny_model("gemma3"))
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="read prompts of one length, or one at a time"):
        kvrepro.prefill(mixed, ids, kvrepro.make_cache(mixed, "attention_matching", **options), attention_mask=mask)


# --- keys that are pursued --------------------------------------------------------------------------------------------


def test_pursuit_equals_its_loops() -> None:
    """Head by head, each with its own number of slots; rows of zeros and slots that are no candidates count not."""
    share = 0.9 * attention(20, 90)
    chosen = random(2, 3, 90, seed=4) > 1.5
    candidates = random(2, 3, 90, seed=5) > -1.0
    count = torch.tensor([[[0], [1], [70]], [[5], [33], [64]]])
    count = torch.minimum(count, (candidates & ~chosen).sum(2, keepdim=True))
    found = fit.pursued(share, chosen, candidates, count)
    assert torch.equal(found.sum(2, keepdim=True), count)
    for b in range(2):
        for h in range(3):
            (known,) = chosen[b, h].nonzero().T.tolist() or [[]]
            (may,) = (chosen[b, h] | candidates[b, h]).nonzero().T.tolist()
            rows = share[b, h, :, :, may].flatten(0, 1).numpy()
            stays = pursuit(rows, [may.index(j) for j in known], int(count[b, h]))
            (added,) = found[b, h].nonzero().T.tolist()
            assert sorted(known + added) == sorted(may[j] for j in stays)


def test_pursuit_takes_what_the_others_lack() -> None:
    """Of two slots that the same queries look at, one will do; the highest attention would take both."""
    share = torch.zeros(1, 1, 1, 10, 4, dtype=torch.float64)
    share[..., :7, :2] = 0.5
    share[..., 7:, 2] = 0.5
    share[..., 3] = 0.05
    nothing, two = torch.zeros(1, 1, 4, dtype=torch.bool), torch.full((1, 1, 1), 2)
    assert fit.pursued(share, nothing, ~nothing, two)[0, 0].tolist() == [False, True, True, False]
    assert top(share.square().sum((2, 3)), ~nothing, two)[0, 0].tolist() == [True, True, False, False]


def test_a_padded_row_is_pursued_as_it_is_alone() -> None:
    """In a row that overflows a second time, too."""
    ids, mask = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, :8] = 0
    beside = prefilled(ids, mask, "attention_matching", 16, keys="greedy")
    alone = prefilled(ids[1:, 8:], None, "attention_matching", 16, keys="greedy")
    for _ in range(2):
        for each, row in ((beside, 1), (alone, 0)):
            assert int(each.compressed[0].slots.valid[row].sum()) == 32
        both, one = row_of(beside.compressed[0].slots, 1), row_of(alone.compressed[0].slots, 0)
        assert torch.equal(both.positions, one.positions)
        torch.testing.assert_close(both.values, one.values)
        torch.testing.assert_close(both.stats["bias"], one.stats["bias"])
        model = kvrepro.prepare(tiny_model(layers=1))
        more = tokens(2, 9)
        kvrepro.prefill(model, more, beside, attention_mask=torch.ones_like(more))
        kvrepro.prefill(model, more[1:], alone)


# --- the slots of other methods ---------------------------------------------------------------------------------------


def prefilled(ids: Tensor, mask: Tensor | None, name: str, budget: int = 32, **options: str) -> kvrepro.CompressedCache:
    """The cache of a prompt, of a model with one layer, where every method sees the same."""
    model = kvrepro.prepare(tiny_model(layers=1))
    cache = kvrepro.make_cache(model, name, budget, **options)
    kvrepro.prefill(model, ids, cache, attention_mask=mask)
    return cache


@pytest.mark.parametrize("keys", BASES)
def test_a_hybrid_keeps_the_slots_of_its_base(keys: str) -> None:
    """The same tokens in the same slots with the same keys, in a padded batch; biases and values are fitted."""
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 0
    hybrid = prefilled(ids, mask, "attention_matching", keys=keys).compressed[0]
    base = prefilled(ids, mask, keys, **BASES[keys]).compressed[0]
    assert hybrid.method.positions == base.method.positions
    for side in ("positions", "cardinality", "keys"):
        assert torch.equal(getattr(hybrid, side), getattr(base, side)), side
    fitted = hybrid.slots.state["fallbacks"] == 0
    assert bool(fitted.any())
    assert bool((hybrid.values[fitted] != base.values[fitted]).flatten(1).any(dim=1).all())
    assert bool(hybrid.slots.stats["bias"][fitted].any())  # a head whose best round is the first one has none
    alone = prefilled(ids[1:, 9:], None, "attention_matching", keys=keys).compressed[0]
    torch.testing.assert_close(hybrid.values[1:], alone.values)


@pytest.mark.parametrize("keys", BASES)
def test_a_hybrid_s_error_is_below_its_base_s(keys: str) -> None:
    """Queries that were not fitted to get an output nearer to the whole cache's from the fitted slots."""
    size = 60
    slots, step = situation(size, size)
    new = 2 * random(1, 3, 2, 40, 8, seed=9)
    later = dataclasses.replace(step, queries=new, query_positions=torch.full((1, 40), size, dtype=torch.int32))
    wanted = output(later, slots)
    lost = {}
    for name, options in ((keys, BASES[keys]), ("attention_matching", {"keys": keys})):
        method = methods.create(name, **options)
        about = {"positions": method.positions, "cardinality_bias": method.cardinality_bias}
        seen = dataclasses.replace(step, **about, window_queries=step.queries, window_positions=step.query_positions)
        zeros = torch.zeros(slots.positions.shape)
        mine = dataclasses.replace(slots, stats={side: zeros for side in method.accumulates}, dense=True)
        _, found = attend(seen, mine, method.statistics)
        left = method.compress(method.accumulate(mine, found, seen), 32, seen)
        lost[name] = float((output(dataclasses.replace(later, **about), left) - wanted).square().sum())
    assert lost["attention_matching"] < 0.9 * lost[keys]


def output(step: Step, slots: Slots) -> Tensor:
    """What a step's queries get."""
    return attend(step, slots, ())[0]


@pytest.mark.parametrize("keys", ["tova", "weightedkv", "kvslimmer"])
def test_an_unlimited_hybrid_is_the_full_cache(keys: str) -> None:
    model = kvrepro.prepare(tiny_model(layers=2))
    ids = tokens(1, 30)
    cache = kvrepro.make_cache(model, "attention_matching", keys=keys)
    assert torch.equal(kvrepro.prefill(model, ids, cache, keep_logits=0).logits, model(ids).logits)


@pytest.mark.parametrize("keys", ["h2o", "snapkv", "weightedkv"])
def test_a_row_that_still_fits_waits(keys: str) -> None:
    """While decoding, a block is freed in the rows of a batch that overflow, and only there."""
    model = kvrepro.prepare(tiny_model(layers=1))
    ids, mask = tokens(2, 31), torch.ones(2, 31, dtype=torch.long)
    mask[1, :2] = 0
    cache = kvrepro.make_cache(model, "attention_matching", 30, keys=keys, block=6)
    with torch.no_grad():
        for at in range(31):  # one token at a time: the first row overflows, the second has one slot less
            model(ids[:, at : at + 1], attention_mask=mask[:, : at + 1], **cache_arguments(model, cache))
    (layer,) = cache.compressed
    assert layer.slots.valid.sum(-1).tolist() == [[25, 25], [29, 29]]
    assert layer.positions[1, 0].tolist()[-29:] == list(range(29))
    assert not bool(layer.slots.stats["bias"][1].any()) and not bool(layer.slots.state["fallbacks"][1].any())


def test_a_merged_slot_weighs_what_its_parts_did() -> None:
    """Beside log cardinality a bias is a mean over tokens: merging fitted slots keeps their mass."""
    slots, step = situation(20)
    tokens_of = torch.arange(1, 21, dtype=torch.int32).expand(1, 3, -1).contiguous()
    bias = random(1, 3, 20, seed=5)
    stats = {"bias": bias, "mass": random(1, 3, 20, seed=6).abs()}
    slots = dataclasses.replace(slots, cardinality=tokens_of, stats=stats, dense=False)
    step = dataclasses.replace(step, cardinality_bias=True)
    weight = (tokens_of * bias.exp()).sum(-1)
    for name, options in (("kvslimmer", {}), ("kvmerger", {"mass": "attention"})):
        left = methods.create(name, **options).compress(slots, 14, step)
        assert left.size == 14
        torch.testing.assert_close((left.cardinality * left.stats["bias"].exp()).sum(-1), weight)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keys": "h2o", "heads": "pooled"}, "heads='pooled' is not valid with keys='h2o'"),
        ({"heads": "same", "least": 0.5}, "least=0.5 is not valid with heads='same'"),
        ({"heads": "same", "least": 0.5, "keys": "h2o"}, "least=0.5 is not valid with heads='same'"),
        ({"keys": "h2o", "newest": 0.5}, "newest=0.5 is not valid with keys='h2o'"),
        ({"keys": "d2o"}, "keys='d2o' is not valid; choose one of .*'weightedkv', 'kvmerger', 'kvslimmer'"),
        ({"keys": "snapkv", "positions": "cache"}, "snapkv: positions='cache' is not valid"),
    ],
)
def test_what_a_hybrid_cannot_have(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        methods.create("attention_matching", **options)


def test_a_hybrid_s_options_are_its_base_s() -> None:
    """Those that are set are handed on; those that are not are the base's own, and records name the positions."""
    hybrid = methods.create("attention_matching", keys="weightedkv", sinks=2)
    base = methods.create("weightedkv", sinks=2)
    assert (hybrid.sinks_of(32), hybrid.recent_of(32)) == (2, base.recent_of(32))
    assert hybrid.resolved()["positions"] == "cache" and hybrid.resolved()["newest"] is None
    assert methods.create("attention_matching", **hybrid.resolved()) == hybrid
    with pytest.raises(ValueError, match="kvslimmer: block=20 is not valid"):
        methods.create("attention_matching", keys="kvslimmer", block=20).check(32)


def test_heads_are_grouped_by_size() -> None:
    """No more than half of a group is empty, and none is larger than all heads would be with equal numbers."""
    assert _alike([0, 5, 6, 9, 10, 19, 100], 150) == [(slice(1, 4), 9), (slice(4, 6), 19), (slice(6, 7), 100)]
    assert _alike([7, 8, 9], 16) == [(slice(0, 2), 8), (slice(2, 3), 9)]
    assert _alike([0, 0], 10) == [] and _alike([40], 10) == [(slice(0, 1), 40)]
