"""The papers' own numbers and identities: toy examples, closed forms against autograd, what a merge must preserve."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from oracles import kvmerger as kvmerger_oracle
from oracles import pairs as pairs_oracle
from oracles.base import softmax
from recording import recorded
from tiny import tiny_model, tokens
from torch import Tensor

import kvrepro
from kvrepro import methods
from kvrepro.adapter import cache_arguments
from kvrepro.attention import Step, attend, observe
from kvrepro.methods import asymkv, kvslimmer
from kvrepro.rope import Rotation
from kvrepro.slots import Slots

DIM = 8


def slots_of(keys: Tensor, values: Tensor, cardinality: list[int] | None = None, **stats: Tensor) -> Slots:
    """One row, one head: keys and values `[S, d]`."""
    size = keys.shape[0]
    counts = torch.ones(size) if cardinality is None else torch.tensor(cardinality)
    return Slots(
        keys=keys[None, None],
        values=values[None, None],
        positions=torch.arange(size).int()[None, None],
        cardinality=counts.int()[None, None],
        stats={name: x[None, None].float() for name, x in stats.items()},
        dense=cardinality is None,
    )


def step_of(queries: Tensor, size: int, inv_freq: Tensor | None = None, **changes: object) -> Step:
    """One row, one KV head: queries `[G, n, d]` of the last n tokens."""
    n = queries.shape[1]
    return Step(
        queries=queries[None, None],
        query_positions=torch.arange(size - n, size).int()[None],
        scale=queries.shape[2] ** -0.5,
        rotation=Rotation(torch.zeros(queries.shape[2] // 2) if inv_freq is None else inv_freq),
        **changes,
    )


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- WeightedKV ------------------------------------------------------------------------------------------------------


def test_weightedkv_figure_3() -> None:
    """The paper's toy: m = 4, nothing protected but the newest, the mean attention given step by step."""
    rows = {
        5: [0.3, 0.1, 0.5, 0.3, 0.5],
        6: [0.3, 0.4, 0.2, 0.3, 0.9],
        7: [0.3, 0.4, 0.2, 0.5, 0.7],
        8: [0.2, 0.4, 0.3, 0.4, 0.6],
    }
    method = methods.create("weightedkv", sinks=0, recent=0, positions="original")
    values = torch.eye(8, dtype=torch.float64)  # value i is the i-th unit vector, so a slot's value shows its mixture
    slots = slots_of(random(4, DIM), values[:4])
    seen = []
    for step, mean in rows.items():
        new = slots_of(random(1, DIM, seed=step), values[step - 1 : step])
        new = dataclasses.replace(new, positions=new.positions + step - 1)
        slots = dataclasses.replace(slots, stats={}).append(new)
        stats = {"mass": torch.tensor([[mean]]) * step, "count": torch.full((1, 1, 5), float(step))}
        slots = method.compress(dataclasses.replace(slots, stats=stats), 4, None)
        seen.append((slots.positions[0, 0] + 1).tolist())
    assert seen == [[1, 3, 4, 5], [1, 3, 5, 6], [1, 3, 6, 7], [3, 6, 7, 8]]
    expected = torch.zeros(4, 8, dtype=torch.float64)
    expected[0, :3] = torch.tensor([1 / 3, 2 / 3 * 1 / 6, 2 / 3 * 5 / 6])  # v1/3 + v2/9 + 5 v3/9
    expected[1, 3:6] = torch.tensor([0.4 * 2 / 7, 0.6 * 2 / 7, 5 / 7])  # .1143 v4 + .1714 v5 + .7143 v6
    expected[2, 6] = expected[3, 7] = 1.0
    torch.testing.assert_close(slots.values[0, 0], expected, atol=1e-6, rtol=0)
    assert slots.cardinality[0, 0].tolist() == [3, 3, 1, 1]


def algorithm_1(
    queries: Tensor, keys: Tensor, values: Tensor, m: int, sinks: int, recent: int
) -> tuple[list, list, list]:
    """WeightedKV's Algorithm 1, line by line, one token at a time; keys' indices, values and outputs."""
    held: list[int] = []
    v: list[Tensor] = []
    a: list[float] = []
    n: list[int] = []
    outputs = []
    for t in range(len(keys)):
        held, v, a, n = [*held, t], [*v, values[t]], [*a, 0.0], [*n, 0]
        attention = softmax([float(queries[t] @ keys[i]) / math.sqrt(keys.shape[1]) for i in held])
        outputs.append(sum(p * x for p, x in zip(attention, v, strict=True)))
        a = [old + p for old, p in zip(a, attention, strict=True)]
        n = [old + 1 for old in n]
        if len(held) > m:
            mean = [x / y for x, y in zip(a, n, strict=True)]
            j = min(range(sinks, m - recent + 1), key=lambda i: mean[i])
            v[j + 1] = (mean[j] * v[j] + mean[j + 1] * v[j + 1]) / (mean[j] + mean[j + 1])
            del held[j], v[j], a[j], n[j]
    return held, v, outputs


@pytest.mark.parametrize("sinks, recent", [(0, 1), (2, 4)])
def test_weightedkv_one_token_at_a_time_is_algorithm_1(sinks: int, recent: int) -> None:
    """The cache, driven token by token, against the printed algorithm."""
    model, ids = tiny_model(layers=1, heads=2, kv_heads=2), tokens(1, 40)
    options = {"sinks": sinks, "recent": recent, "positions": "original"}
    cache = kvrepro.make_cache(model, "weightedkv", 12, **options)
    with recorded(cache) as passes, torch.no_grad():
        for t in range(40):
            model(ids[:, t : t + 1], **cache_arguments(model, cache))
    (layer,) = cache.compressed
    for h in range(2):
        q, k, v = (torch.cat([getattr(one, name)[0, h] for one in passes[0]]) for name in ("queries", "keys", "values"))
        held, mixed, outputs = algorithm_1(q, k, v, 12, sinks, recent)
        assert layer.positions[0, h].tolist() == held
        torch.testing.assert_close(layer.keys[0, h], k[held])
        torch.testing.assert_close(layer.values[0, h], torch.stack(mixed), atol=1e-5, rtol=1e-5)
        found = torch.cat([one.output[0, h] for one in passes[0]])
        torch.testing.assert_close(found, torch.stack(outputs), atol=1e-5, rtol=1e-5)


# --- KVSlimmer -------------------------------------------------------------------------------------------------------


def test_kvslimmers_c_are_the_outputs_second_derivatives() -> None:
    """c11, c22 and c12 against autograd, for every pair, and the oracle's against the package's."""
    logits, values = random(6, seed=1), random(6, DIM, seed=2)
    exact = torch.autograd.functional.hessian  # of one output dimension by the logits
    hessian = torch.stack(
        [exact(lambda s, x=x: torch.softmax(s, 0) @ values[:, x], logits) for x in range(DIM)], dim=-1
    )
    alpha = torch.softmax(logits, 0)
    c11, c22, c12 = kvslimmer.second_derivatives(alpha, values, alpha @ values)
    for m in range(5):
        torch.testing.assert_close(c11[m], hessian[m, m])
        torch.testing.assert_close(c22[m], hessian[m + 1, m + 1])
        torch.testing.assert_close(c12[m], hessian[m, m + 1])
        slow = pairs_oracle.second_derivatives(alpha.tolist(), list(values.numpy()), m)
        for found, expected in zip((c11, c12, c22), slow, strict=True):
            np.testing.assert_allclose(found[m], expected, atol=1e-12)


def test_kvslimmers_norms_come_from_its_second_derivatives() -> None:
    """The norms formed from inner products equal the norms of the vectors, summed over queries and heads."""
    size, n = 9, 3
    queries, slots = random(2, n, DIM, seed=3), slots_of(random(size, DIM, seed=4), random(size, DIM, seed=5))
    step = step_of(queries, size)
    single, cross = kvslimmer.curvature_norms(slots, step, observe(step, slots))
    expected = [torch.zeros(size - 1, dtype=torch.float64) for _ in range(3)]
    for _, p in step.blocks(slots):
        for alpha in p[0, 0].flatten(0, 1):
            v = slots.values[0, 0]
            for x, c in zip(expected, kvslimmer.second_derivatives(alpha, v, alpha @ v), strict=True):
                x += c.norm(dim=-1)
    torch.testing.assert_close(single[0, 0, :-1], expected[0])
    torch.testing.assert_close(single[0, 0, 1:], expected[1])
    torch.testing.assert_close(cross[0, 0], expected[2])


def test_kvslimmers_gradient_form_is_the_loss_hessian_without_gauss_newton() -> None:
    """d²L/ds_i ds_j = Eᵀ c_ij + (∂o/∂s_i)ᵀ (d²L/do²) (∂o/∂s_j): the method leaves the second term out."""
    logits, values, goal = random(5, seed=6), random(5, DIM, seed=7), random(DIM, seed=8)

    def loss(s: Tensor) -> Tensor:
        return ((torch.softmax(s, 0) @ values - goal) ** 2).sum()

    hessian = torch.autograd.functional.hessian(loss, logits)
    alpha = torch.softmax(logits, 0)
    output = alpha @ values
    gradient = 2 * (output - goal)  # E
    slope = alpha[:, None] * (values - output)  # ∂o/∂s
    c11, c22, c12 = kvslimmer.second_derivatives(alpha, values, output)
    gauss_newton = 2 * slope @ slope.T
    torch.testing.assert_close(hessian.diagonal()[:-1], c11 @ gradient + gauss_newton.diagonal()[:-1])
    torch.testing.assert_close(hessian.diagonal()[1:], c22 @ gradient + gauss_newton.diagonal()[1:])
    torch.testing.assert_close(hessian.diagonal(1), c12 @ gradient + gauss_newton.diagonal(1))
    assert float((c12 @ gradient - hessian.diagonal(1)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "n11, n12, n22, share",
    [
        (3.0, 1.0, 2.0, 2 / 3),  # (3 - 1) / (3 - 2 + 2)
        (1.0, 0.0, 1.0, 0.5),
        (1.0, 2.0, 4.0, 0.0),  # (1 - 2) / (1 - 4 + 4) = -1: clamped
        (4.0, 2.0, 1.0, 1.0),  # 2 / 1: clamped
        (1.0, 1.0, 1.0, 0.75),  # no denominator: attention 0.3 against 0.1
        (1.0, 2.0, 1.0, 0.75),  # a negative one
        (0.0, 0.0, 0.0, 0.75),
    ],
)
def test_kvslimmers_share_of_the_left_key(n11: float, n12: float, n22: float, share: float) -> None:
    """The printed formula, clamped to [0, 1]; the attention-weighted mean where the denominator vanishes."""
    found = kvslimmer.merge_share(*(torch.tensor(x, dtype=torch.float64) for x in (n11, n22, n12, 0.3, 0.1)))
    assert float(found) == pytest.approx(share)
    assert pairs_oracle.left_share(n11, n12, n22, 0.3, 0.1) == pytest.approx(share)


# --- merging pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["asymkv", "kvslimmer"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_merging_equal_neighbours_changes_no_output(name: str, variant: str) -> None:
    """Two slots with one key and one value weigh as much as their merged slot: cardinality attention is exact."""
    pairs, size = 6, 12
    keys = random(pairs, DIM, seed=9).repeat_interleave(2, dim=0)
    values = random(pairs, DIM, seed=10).repeat_interleave(2, dim=0)
    zeros = torch.zeros(size)
    slots = slots_of(keys, values, alpha=torch.ones(size) / size, h=torch.ones(size), passes=zeros + 1)
    queries = random(2, 2, DIM, seed=11)
    queries[:, 0] = queries[:, 1]
    step = step_of(queries, size, cardinality_bias=True, budget=9)
    before, _ = attend(step, slots, ())
    fisher = {"fisher": "forward"} if name == "asymkv" else {}
    method = methods.create(name, sinks=2, recent=2, positions="original", variant=variant, **fisher)
    if name == "kvslimmer" and variant == "paper":
        slots = dataclasses.replace(slots, stats={})
    # Equal neighbours get the lowest score only by chance, so forbid the pairs of strangers.
    strangers = torch.arange(size - 1) % 2 == 1
    scores = method.scores

    def of_twins(*args: object) -> Tensor:
        return scores(*args).masked_fill(strangers[: scores(*args).shape[-1]], torch.inf)

    object.__setattr__(method, "scores", of_twins)
    merged = method.compress(slots, 9, step)
    assert merged.cardinality[0, 0].sum() == size and merged.size == 9
    after, _ = attend(step, merged, ())
    # The first query is the last but one token: it must not see the merged last pair, so compare the newest only.
    torch.testing.assert_close(after[..., -1, :], before[..., -1, :])


def test_asymkv_weighs_each_dimension_by_its_squared_gradient() -> None:
    """k* = (g_i² k_i + g_j² k_j) / (g_i² + g_j²) before RoPE, and by cardinality where both are zero."""
    inv_freq = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    slots = slots_of(random(5, DIM, seed=12), random(5, DIM, seed=13), cardinality=[1, 3, 1, 1, 1])
    gradients = random(5, DIM, seed=14)
    gradients[1:3, 0] = 0.0
    step = step_of(random(1, 1, DIM, seed=15), 5, inv_freq, gradients=gradients[None, None], cardinality_bias=True)
    method = methods.create("asymkv", sinks=1, recent=2)
    merged = method.compress(slots, 4, step)  # only the pair (1, 2) is free
    assert merged.positions[0, 0].tolist() == [0, 2, 3, 4] and merged.cardinality[0, 0].tolist() == [1, 4, 1, 1]
    plain = step.rotation.rotate(slots.keys, -slots.positions)[0, 0]
    left, right = gradients[1] ** 2, gradients[2] ** 2
    expected = (left * plain[1] + right * plain[2]) / (left + right)
    expected[0] = (3 * plain[1, 0] + plain[2, 0]) / 4
    found = step.rotation.rotate(merged.keys, -merged.positions)[0, 0, 1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(merged.values[0, 0, 1], (3 * slots.values[0, 0, 1] + slots.values[0, 0, 2]) / 4)


def test_pair_scores_follow_the_formula() -> None:
    """Mass over both slots and all heads, discounted by place with γ = 4096 / ln 512, times the pair's cardinality."""
    slots = slots_of(random(6, DIM, seed=16), random(6, DIM, seed=17), cardinality=[1, 1, 2, 1, 3, 1])
    step = step_of(random(2, 1, DIM, seed=18), 6, cardinality_bias=True)
    method = methods.create("kvslimmer", sinks=1, recent=1)
    found = method.scores(slots, 5, observe(step, slots).mass)[0, 0]
    ((_, p),) = step.blocks(slots)
    mass = p.sum(dim=(0, 1, 2, 3))
    counts = slots.cardinality[0, 0]
    expected = [
        float((mass[i] + mass[i + 1]) * (counts[i] + counts[i + 1])) / math.exp(i / (4096 / math.log(512)))
        for i in range(5)
    ]
    assert found[0] == math.inf and found[4] == math.inf  # the sink's pair and the newest token's pair
    # γ counts places from anywhere: only ratios matter.
    np.testing.assert_allclose(found[1:4] / found[1], np.array(expected[1:4]) / expected[1], rtol=1e-6)


def test_released_cardinality_stops_at_five() -> None:
    """The codes cap c at 5 and keep the sum of values; 'paper' does not cap."""
    slots = slots_of(random(5, DIM, seed=19), random(5, DIM, seed=20), cardinality=[1, 4, 3, 1, 1])
    step = step_of(random(1, 1, DIM, seed=21), 5, cardinality_bias=True)
    total = 4 * slots.values[0, 0, 1] + 3 * slots.values[0, 0, 2]
    for variant, count in (("paper", 7), ("released", 5)):
        method = methods.create("asymkv", fisher="forward", variant=variant, sinks=1, recent=2)
        merged = method.compress(slots, 4, step)
        assert merged.cardinality[0, 0].tolist() == [1, count, 1, 1]
        torch.testing.assert_close(merged.values[0, 0, 1] * count, total)


def test_overlapping_pairs_lose_a_token_as_released() -> None:
    """Six tokens, pairs (1, 2) and (2, 3): cardinality 5; disjoint pairs keep all six."""
    keys, values = random(6, DIM, seed=22), random(6, DIM, seed=23)
    step = step_of(random(1, 1, DIM, seed=24), 6, cardinality_bias=True)
    counts = {}
    for overlap in ("released", "disjoint"):
        method = methods.create("kvslimmer", overlap=overlap, sinks=1, recent=1)
        score = torch.tensor([[[math.inf, 1.0, 2.0, 9.0, math.inf]]])
        object.__setattr__(method, "scores", lambda slots, *_, s=score: s[..., : slots.size - 1])
        merged = method.compress(slots_of(keys, values), 4, step)
        counts[overlap] = int(merged.cardinality.sum())
        assert merged.size == 4
    assert counts == {"released": 5, "disjoint": 6}


# --- KeepKV ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("votes", [None, [1, 1, 2, 1, 3, 1, 1, 1]])
def test_keepkv_leaves_the_present_output_as_it_was(votes: list[int] | None) -> None:
    """After a merge the newest query gets the same output and the same total mass (one query head a KV head)."""
    size = 8
    # Keys that all look the query's way: their logits stay away from 0, where the merged key is not defined.
    query = random(DIM, seed=25)
    keys = 2.0 * query / query.norm() + 0.3 * random(size, DIM, seed=26)
    slots = slots_of(keys, random(size, DIM, seed=27), cardinality=votes, mass=random(size, seed=28).abs())
    step = step_of(query[None, None], size, cardinality_bias=True)
    method = methods.create("keepkv", threshold=-1.0, recent=2)
    before, _ = attend(step, slots, ())
    merged = method.compress(slots, 5, step)
    after, _ = attend(step, merged, ())
    assert int(merged.cardinality.sum()) == int(slots.cardinality.sum()) and merged.size == 5
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)
    total = [float(((s.keys[0, 0] @ query) * step.scale).exp() @ s.cardinality[0, 0].double()) for s in (slots, merged)]
    assert total[0] == pytest.approx(total[1], rel=1e-6)
    dropped = methods.create("keepkv", threshold=1.0, recent=2).compress(slots, 5, step)
    assert not torch.allclose(attend(step, dropped, ())[0], before, atol=1e-3)


# --- KVMerger --------------------------------------------------------------------------------------------------------


def melted(slots: Slots, link: list[bool], **options: object) -> tuple[Slots, list[int]]:
    """KVMerger's merge of given sets, and which slots stay."""
    method = methods.create("kvmerger", **options)
    step = step_of(random(1, 1, DIM), slots.size)
    merged, stays = method.merge(slots, torch.tensor([[link]]), step)
    return merged, stays[0, 0].nonzero().flatten().tolist()


LINK = [True, True, False, True, False]  # sets {0, 1, 2}, {3, 4}, {5}
MASS = torch.tensor([0.2, 0.9, 0.1, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("sigma", ["mean_dist", "printed", 0.8, 5.0])
def test_kvmerger_weights(sigma: str | float) -> None:
    """g = exp(-‖k_p - k‖² / 2σ²), Σ w = 1; key Σ w k, value |S| Σ w v; the most attended member is the pivot."""
    keys, values = 0.4 * random(6, DIM, seed=29), random(6, DIM, seed=30)
    merged, stays = melted(slots_of(keys, values, mass=MASS), LINK, sigma=sigma)
    assert stays == [1, 4, 5]
    assert merged.cardinality[0, 0, stays].tolist() == [3, 2, 1]
    for members, pivot in (([0, 1, 2], 1), ([3, 4], 4)):
        w = kvmerger_oracle.gaussian_weights([keys[i].numpy() for i in members], members.index(pivot), sigma)
        assert sum(w) == pytest.approx(1) and max(w) == w[members.index(pivot)]
        key = sum(x * keys[i] for x, i in zip(w, members, strict=True))
        value = len(members) * sum(x * values[i] for x, i in zip(w, members, strict=True))
        torch.testing.assert_close(merged.keys[0, 0, pivot], key, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(merged.values[0, 0, pivot], value, atol=1e-6, rtol=1e-6)
    assert torch.equal(merged.keys[0, 0, 5], keys[5]) and torch.equal(merged.values[0, 0, 5], values[5])


def test_kvmergers_printed_sigma_ends_at_its_fixed_point() -> None:
    """With keys far apart σ = 1 / (√2 |S|), so the pivot keeps all the weight; σ never exceeds 0.707."""
    far = [0.0, 4.0, 5.0, 6.0]
    assert kvmerger_oracle.printed_sigma(far) == pytest.approx(1 / (math.sqrt(2) * 4))
    assert kvmerger_oracle.printed_sigma([0.0, 0.0, 0.0]) == pytest.approx(1 / math.sqrt(2))
    keys, values = 4.0 * random(6, DIM, seed=31), random(6, DIM, seed=32)
    merged, _ = melted(slots_of(keys, values, mass=MASS), LINK, sigma="printed")
    torch.testing.assert_close(merged.keys[0, 0, 1], keys[1])
    torch.testing.assert_close(merged.values[0, 0, 1], 3 * values[1])


def test_kvmerger_plain_means() -> None:
    """weights="mean": the mean key and |S| times the mean value, which is the sum."""
    keys, values = random(6, DIM, seed=33), random(6, DIM, seed=34)
    merged, stays = melted(slots_of(keys, values, mass=MASS), LINK, weights="mean")
    torch.testing.assert_close(merged.keys[0, 0, stays[0]], keys[:3].mean(0))
    torch.testing.assert_close(merged.values[0, 0, stays[0]], values[:3].sum(0))


def test_kvmergers_threshold_is_strict_and_protects() -> None:
    """Pairs above ε join; sinks, recent and top-k slots never do."""
    angle = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6, 1.7, 1.8, 1.9], dtype=torch.float64)
    keys = torch.stack([angle.cos(), angle.sin()], dim=-1)
    mass = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.1, 9.0, 0.1, 0.1])
    slots = slots_of(keys, keys, mass=mass)
    options = {"budget_mode": "threshold", "epsilon": 0.75}
    free = methods.create("kvmerger", sinks=0, recent=1, topk=0, **options)
    assert free.links(slots, 4, 4)[0, 0].tolist() == [True, True, False, True, True, True, False]
    guarded = methods.create("kvmerger", sinks=1, recent=1, topk=1, **options)
    assert guarded.links(slots, 4, 4)[0, 0].tolist() == [False, True, False, True, False, False, False]


@pytest.mark.parametrize("goal", [5, 6, 7])
def test_kvmergers_exact_budget_is_an_order_statistic(goal: int) -> None:
    """The links are those of a threshold ε set just below the last similarity that is needed."""
    keys = random(9, DIM, seed=35)
    slots = slots_of(keys, keys, mass=torch.rand(9, generator=torch.Generator().manual_seed(1)))
    exact = methods.create("kvmerger", recent=1, topk=0).links(slots, goal, goal)
    similarity = torch.cosine_similarity(keys[:-1], keys[1:])[:7]
    epsilon = float(similarity.sort(descending=True).values[9 - goal - 1]) - 1e-6
    threshold = methods.create("kvmerger", recent=1, topk=0, budget_mode="threshold", epsilon=epsilon)
    assert int(exact.sum()) == 9 - goal
    assert torch.equal(exact, threshold.links(slots, goal, goal))


# --- CaM -------------------------------------------------------------------------------------------------------------


def test_cam_merges_with_the_probability_of_its_attention() -> None:
    """Over many seeds the share of merges is ā_e / mean ā of the next 16, and certain once that is 1."""
    size = 20
    keys, values = random(size, DIM, seed=36), random(size, DIM, seed=37)
    for leaving, p in ((0.3, 0.3), (2.0, 1.0), (0.0, 0.0)):
        mass = torch.ones(size)
        mass[2] = leaving
        slots = slots_of(keys, values, mass=mass)
        merges = 0
        for seed in range(400):
            method = methods.create("cam", sinks=2, seed=seed)
            out = method.compress(slots, size - 1, step_of(random(1, 1, DIM), size))
            assert out.positions[0, 0].tolist() == [0, 1, *range(3, size)]
            gain = out.values[0, 0] - values[[0, 1, *range(3, size)]]
            merged = bool(gain.abs().max() > 0)
            expected = torch.zeros_like(gain)
            if merged:
                expected[2:18] = values[2] / 16  # the next 16 kept slots, and not the seventeenth
            torch.testing.assert_close(gain, expected, atol=1e-12, rtol=0)
            merges += merged
        assert abs(merges / 400 - p) <= 4 * math.sqrt(p * (1 - p) / 400)


def test_cam_passes_on_what_a_slot_received() -> None:
    """A prompt's slots leave one after another, many blocks of them, each with what earlier ones gave it."""
    size, budget, sinks = 300, 40, 2
    keys, values = random(size, DIM, seed=38), random(size, DIM, seed=39)
    slots = slots_of(keys, values, mass=torch.linspace(2, 1, size))  # above the mean of the next ones: all are merged
    out = methods.create("cam", sinks=sinks).compress(slots, budget, step_of(random(1, 1, DIM), size))
    held = values.clone()
    for e in range(sinks, size - budget + sinks):
        held[e + 1 : e + 17] += held[e] / 16
    torch.testing.assert_close(out.values[0, 0], torch.cat([held[:sinks], held[size - budget + sinks :]]))


# --- D2O -------------------------------------------------------------------------------------------------------------


def test_d2os_threshold_is_a_running_mean() -> None:
    """First eviction: the mean similarity; then half the old and half the new; what stays below is dropped."""
    angle = torch.tensor([0.0, 1.0, 2.0, 0.3, 1.2, 2.9], dtype=torch.float64)
    keys = torch.stack([angle.cos(), angle.sin()], dim=-1)
    mass = torch.tensor([9.0, 8.0, 7.0, 0.3, 0.2, 9.0])
    method = methods.create("d2o", sinks=0, recent=1)
    slots = slots_of(keys, keys, mass=mass)
    first = method.compress(slots, 5, step_of(random(1, 1, 2), 6))  # slot 4 goes, 0.2 away from slot 1
    assert float(first.state["threshold"]) == pytest.approx(math.cos(0.2), abs=1e-6)
    assert first.cardinality[0, 0].tolist() == [1, 2, 1, 1, 1]
    merged = (keys[1] + math.cos(0.2) * keys[4]) / (1 + math.cos(0.2))
    torch.testing.assert_close(first.keys[0, 0, 1], merged, atol=1e-6, rtol=0)
    second = method.compress(first, 4, step_of(random(1, 1, 2), 6))  # slot 3 goes, 0.3 away from slot 0
    assert float(second.state["threshold"]) == pytest.approx((math.cos(0.2) + math.cos(0.3)) / 2, abs=1e-6)
    assert second.cardinality[0, 0].tolist() == [1, 2, 1, 1]  # cos 0.3 is below it: dropped


# --- AsymKV's gradient -----------------------------------------------------------------------------------------------


def test_asymkvs_gradient_is_that_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients `prefill` hands to the method equal finite differences of the chunk's loss by the cached keys."""
    model, ids = tiny_model(layers=2), tokens(1, 19)
    given: list[tuple[Slots, Step]] = []
    compress = asymkv.AsymKV.compress

    def listen(self: asymkv.AsymKV, slots: Slots, budget: int, step: Step) -> Slots:
        given.append((slots, step))
        return compress(self, slots, budget, step)

    monkeypatch.setattr(asymkv.AsymKV, "compress", listen)
    cache = kvrepro.make_cache(model, "asymkv", 16, positions="original")
    kvrepro.prefill(model, ids[:, :16], cache, chunk=4)
    assert not given
    kvrepro.prefill(model, ids[:, 16:], cache, chunk=4)
    assert len(given) == 2 and all(step.gradients is not None for _, step in given)

    def loss(layer: int, h: int, j: int, move: Tensor) -> float:
        again = kvrepro.make_cache(model, "full")
        with torch.no_grad():
            model(ids[:, :16], **cache_arguments(model, again))
            held = again.compressed[layer].slots
            turned = find_rotation(cache).rotate(move[None, None, None], torch.tensor([[[j]]]))
            held.keys[0, h, j] += turned[0, 0, 0]
            logits = model(ids[:, 16:], **cache_arguments(model, again)).logits
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 17:]))

    for layer, h, j, x in ((0, 0, 3, 1), (0, 1, 9, 6), (1, 0, 0, 4), (1, 1, 15, 0)):
        move = torch.zeros(DIM, dtype=torch.float64)
        move[x] = 1e-2  # the model's norms are float32 inside, so a smaller step drowns in rounding
        slope = (loss(layer, h, j, move) - loss(layer, h, j, -move)) / 2e-2
        found = float(given[layer][1].gradients[0, h, j, x])
        assert found == pytest.approx(slope, abs=5e-5)
        assert abs(slope) > 2e-3


def find_rotation(cache: kvrepro.CompressedCache) -> Rotation:
    """The rotation a cache's layers turn keys with."""
    return cache.compressed[0].rotation


def test_asymkv_reads_each_chunk_over_the_compressed_past() -> None:
    """With the loss the past is merged before the chunk is read again: its slots plus the chunk meet the budget."""
    model, ids = tiny_model(), tokens(1, 40)
    cache = kvrepro.make_cache(model, "asymkv", 16)
    with recorded(cache) as passes:
        kvrepro.prefill(model, ids, cache, chunk=4)
    for layer in cache.compressed:
        assert layer.keys.shape[2] == 16 and bool((layer.cardinality.sum(-1) == 40).all())
        assert layer.positions[0, :, -4:].tolist() == [[36, 37, 38, 39]] * 2
    assert len(passes[0]) == 10 + 6  # ten chunks, of which six overflow and are read twice


def test_asymkv_says_when_it_has_no_gradient() -> None:
    """Plain `generate` runs no backward pass: a warning names the way out; with fisher="forward" there is none."""
    model, ids = tiny_model(), tokens(1, 24)
    cache = kvrepro.make_cache(model, "asymkv", 16)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    with pytest.warns(UserWarning, match="kvrepro.prefill"):
        model.generate(ids, past_key_values=cache, **settings)
    meant = kvrepro.make_cache(model, "asymkv", 16, fisher="forward")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(ids, past_key_values=meant, **settings)
