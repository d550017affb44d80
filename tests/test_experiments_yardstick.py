"""The yardstick: errors of the attention output against loops, the fits against their definitions, bad requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import measure_tiny, tiny_model, tokens
from torch import Tensor

import kvrepro
from kvrepro import fit
from kvrepro.experiments import common, tables, yardstick
from kvrepro.experiments.capture import capture_qkv
from kvrepro.experiments.yardstick import Kept
from kvrepro.records import Record
from kvrepro.rope import Rotation, find_rotation
from kvrepro.slots import take

SIZES = {"context": 40, "continuation": 8, "fit": 24, "n": 2}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Record]]:
    """Measure on a tiny model and random tokens; the text's name only has to exist."""
    measure_tiny(monkeypatch)
    yardstick._layers.cache_clear()
    yardstick._measured.cache_clear()
    yield lambda *args, **sizes: yardstick.errors("code", *args, **{**SIZES, **sizes}, model="smollm2-135m")
    yardstick._layers.cache_clear()
    yardstick._measured.cache_clear()


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention(n: int = 1, h: int = 2, g: int = 2, m: int = 10, s: int = 5) -> Tensor:
    """Attention probabilities ``[n, h, g, m, s]``."""
    return torch.softmax(2 * random(n, h, g, m, s, seed=1), -1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of one row."""
    e = np.exp(logits - logits.max())
    return e / e.sum()


def test_reading_of_slots_is_attention_written_out() -> None:
    q, k, v, bias = (
        random(1, 2, 2, 3, 4),
        random(1, 2, 5, 4, seed=1),
        random(1, 2, 5, 4, seed=2),
        random(1, 2, 5, seed=3),
    )
    positions = torch.tensor([[[-1, 0, 1, 3, 6], [0, 1, 2, 3, 4]]])
    out, lse = Kept(k, v, bias, positions, scale=0.5).read(q, torch.tensor([[7, 8, 9]]))
    for h in range(2):
        filled = [i for i in range(5) if positions[0, h, i] >= 0]
        for g in range(2):
            for t in range(3):
                logits = np.array([0.5 * float(q[0, h, g, t] @ k[0, h, i]) + float(bias[0, h, i]) for i in filled])
                expected = sum(p * v[0, h, i].numpy() for p, i in zip(softmax(logits), filled, strict=True))
                assert out[0, h, g, t].numpy() == pytest.approx(expected)
                assert float(lse[0, h, g, t]) == pytest.approx(np.log(np.exp(logits).sum()))


METHODS = ["h2o", "weightedkv", "kvslimmer", "kvslimmer(positions='original')", "kvmerger(mass='attention')", "d2o"]


def as_read(keys: Tensor, held: Any, rotation: Rotation) -> np.ndarray:
    """Keys of a compressed layer's slots where its method's queries see them."""
    if held.method.positions == "original":
        return keys.numpy()
    weight = torch.ones_like(held.positions) if held.method.positions == "cache" else held.cardinality
    newest, behind = held.positions.amax(-1, keepdim=True), weight.flip(-1).cumsum(-1).flip(-1) - weight
    return rotation.rotate(keys, newest - behind - held.positions).numpy()


@pytest.mark.parametrize("label", METHODS)
def test_errors_are_those_of_a_loop_over_queries(small: Callable, label: str) -> None:
    record = next(r for r in small(label, 0.5) if r.cell.metric == "attention output error")
    model, ids = common._loaded("x", None, None), tokens(2, 48, seed=len("code"))
    options = common.Variant.parse(label)
    cache = kvrepro.make_cache(model, options.method, 0.5, **options.options)
    kvrepro.prefill(model, ids[:, :40], cache)
    captured, rotation = capture_qkv(model, ids), find_rotation(model, "full_attention")
    biased = cache.method.cardinality_bias
    found = np.zeros((3, 2, 4))  # layers, passages, parts: merge, eviction, in_text, the log of the mass
    for layer, seen in captured.items():
        held = cache.layers[layer]
        merged_keys = as_read(held.keys, held, rotation)
        own_keys = as_read(take(seen.keys[:, :, :40], held.positions.long()), held, rotation)
        q, k, v, scale = seen.queries.numpy(), seen.keys.numpy(), seen.values.numpy(), seen.scale
        for row in range(2):
            lost, whole, masses = np.zeros(3), np.zeros(2), []
            for head in range(q.shape[1]):
                kv = head // (q.shape[1] // k.shape[1])
                own = held.positions[row, kv].numpy()
                values = held.values[row, kv].numpy()
                bias = np.log(held.cardinality[row, kv].numpy()) if biased else np.zeros(len(own))
                for t in range(40, 48):
                    query = q[row, head, t] * scale
                    right = softmax(k[row, kv, :40] @ query) @ v[row, kv, :40]
                    merged = merged_keys[row, kv] @ query + bias
                    evicted = softmax(own_keys[row, kv] @ query) @ v[row, kv, own]
                    lost[0] += ((softmax(merged) @ values - right) ** 2).sum()
                    lost[1] += ((evicted - right) ** 2).sum()
                    after = k[row, kv, 40 : t + 1] @ query
                    text = softmax(np.concatenate([merged, after])) @ np.concatenate([values, v[row, kv, 40 : t + 1]])
                    lost[2] += ((text - seen.outputs[row, head, t].numpy()) ** 2).sum()
                    whole += (right**2).sum(), (seen.outputs[row, head, t].numpy() ** 2).sum()
                    masses.append(np.log(np.exp(merged).sum() / np.exp(k[row, kv, :40] @ query).sum()))
            found[layer, row] = [*lost / whole[[0, 0, 1]], np.mean(masses)]
    extra = record.value.extra
    assert extra["by_layer"]["merge"] == pytest.approx(found[..., 0].mean(1), rel=1e-3)
    assert extra["by_passage"]["eviction"] == pytest.approx(found[..., 1].mean(0), rel=1e-3)
    assert extra["in_text"]["merge"] == pytest.approx(found[..., 2].mean(0), rel=1e-3)
    assert extra["mass"]["merge"] == pytest.approx(found[..., 3].mean(0), rel=1e-3, abs=1e-5)
    assert record.value.value == pytest.approx(found[..., 0].mean(), rel=1e-3)
    spread = found[..., 0].mean(0).std(ddof=1) / np.sqrt(2)
    assert record.value.spread == pytest.approx(spread, rel=1e-2) and record.value.n == 2
    assert np.shape(extra["by_head"]["best"]) == (3, 2) and extra["slots"] == 20


def test_fitted_queries_are_the_prompts_at_the_places_of_those_that_follow(small: Callable) -> None:
    bench = common.Bench("across", "best_merge", "smollm2-135m")
    layers = yardstick._layers(yardstick.Reading(bench, "code", *SIZES.values()))
    model, ids = common._loaded("x", None, None), tokens(2, 48, seed=len("code"))
    captured, rotation = capture_qkv(model, ids), find_rotation(model, "full_attention")
    for index, layer in enumerate(layers):
        seen = captured[index]
        assert torch.allclose(layer.held.queries.flatten(1, 2), seen.queries[:, :, 40:], atol=1e-5)
        places = 40 + torch.arange(24) % 8
        assert torch.equal(layer.fit.positions, places.expand(2, -1))
        # Only differences of positions matter: a key moved along with the query has the logit it had.
        for t in range(24):
            shift = torch.full((2, 2, 48), int(places[t]) - (16 + t))
            keys = rotation.rotate(seen.keys, shift).repeat_interleave(seen.queries.shape[1] // 2, 1)
            old = (seen.queries[:, :, 16 + t, None] * seen.keys.repeat_interleave(seen.queries.shape[1] // 2, 1)).sum(
                -1
            )
            new = (layer.fit.queries.flatten(1, 2)[:, :, t, None] * keys).sum(-1)
            assert torch.allclose(old, new, atol=1e-4)


def test_ridge_is_the_normal_equations_of_each_head() -> None:
    p, target, start = attention(), random(1, 2, 2, 10, 3, seed=2), random(1, 2, 5, 3, seed=3)
    offered = (1e-3, 1e-1, 10.0)
    found = yardstick.best_values(p, target, start, offered)
    for h in range(2):

        def solved(queries: slice, ridge: float, h: int = h) -> np.ndarray:
            """The best values for some of the queries."""
            rows = np.concatenate([p[0, h, g, queries].numpy() for g in range(2)])
            wanted = np.concatenate([target[0, h, g, queries].numpy() for g in range(2)])
            pull = ridge * np.mean([rows[:, i] @ rows[:, i] for i in range(5)])
            mean = start[0, h].numpy()
            system = rows.T @ rows + pull * np.eye(5)
            return np.linalg.solve(system, rows.T @ wanted + pull * mean)

        missed = [
            sum(
                ((p[0, h, g, t].numpy() @ solved(slice(0, 5), ridge) - target[0, h, g, t].numpy()) ** 2).sum()
                for g in range(2)
                for t in range(5, 10)
            )
            for ridge in offered
        ]
        assert found[0, h].numpy() == pytest.approx(solved(slice(0, 10), offered[int(np.argmin(missed))]))


def test_without_a_ridge_no_other_values_fit_better() -> None:
    p, target, start = attention(m=40), random(1, 2, 2, 40, 3, seed=2), random(1, 2, 5, 3, seed=3)
    fitted = yardstick.best_values(p, target, start, [1e-10])
    best = yardstick.square(yardstick.mixed(p, fitted) - target)
    for seed in range(20):
        for other in (start, fitted + 0.1 * random(1, 2, 5, 3, seed=seed)):
            assert (best <= yardstick.square(yardstick.mixed(p, other) - target)).all()


@pytest.mark.parametrize("label", METHODS[1:])
def test_best_values_fit_no_worse_than_the_methods_own(
    small: Callable, monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    found = []
    plain = yardstick.best_values

    def both(p: Tensor, target: Tensor, start: Tensor) -> Tensor:
        """Note how well the fit does on the queries it is fitted to."""
        values = plain(p, target, start, [1e-9])
        found.append((p, target, values))
        return values

    monkeypatch.setattr(yardstick, "best_values", both)
    judge = yardstick.judge
    merged = []
    monkeypatch.setattr(yardstick, "judge", lambda layer, kept, own: merged.append(kept) or judge(layer, kept, own))
    small(label, 0.25, fit=40)
    assert len(found) == 2 * len(merged) == 6
    for (p, target, values), kept in zip(found[::2], merged, strict=True):
        fitted, own = (yardstick.square(yardstick.mixed(p, v) - target) for v in (values, kept.values))
        assert (fitted <= own * (1 + 1e-5) + 1e-9).all()


def test_a_slot_that_no_query_looks_at_keeps_its_value() -> None:
    p, start = attention(), random(1, 2, 5, 3, seed=3)
    p = torch.cat([p, torch.zeros_like(p[..., :1])], -1)
    start = torch.cat([start, torch.full_like(start[:, :, :1], 7.0)], 2)
    found = yardstick.best_values(p, random(1, 2, 2, 10, 3, seed=2), start)
    assert torch.allclose(found[:, :, 5], start[:, :, 5])


def test_weights_end_where_non_negative_least_squares_does() -> None:
    share = random(1, 2, 30, 6, seed=4).abs() * torch.tensor([0.05, 0.5, 0.1, 0.2, 0.05, 0.3])
    share[..., 0] += 1  # almost all that is needed: some of the others are better left out
    gram, moment = share.mT @ share, share.sum(-2)
    path = fit.Masses.of(share, share, dual=False).descent(20000).squeeze(-2)
    assert torch.allclose(path[0], torch.ones_like(path[0]))
    last = path[-1]
    slope = (gram @ last.unsqueeze(-1)).squeeze(-1) - moment
    used = last > 0
    assert used.any() and not used.all() and (last >= 0).all()
    assert slope[used].abs().max() < 1e-8 and slope[~used].min() > -1e-8


@pytest.mark.parametrize("dual", [False, True])
def test_weights_are_those_of_the_best_round_for_the_other_half(dual: bool) -> None:
    share = 0.3 * random(1, 2, 2, 12, 6, seed=5).abs()
    found = fit.best_weights(share, 15, dual=dual)
    first, second = share[:, :, :, :6].flatten(2, 3), share[:, :, :, 6:].flatten(2, 3)
    path = fit.Masses.of(first, first, dual=False).descent(15).squeeze(-2)
    missed = ((second @ path.unsqueeze(-1)).squeeze(-1) - 1).square().sum(-1)  # [16, 1, 2]
    every = share.flatten(2, 3)
    again = fit.Masses.of(every, every, dual=False).descent(15).squeeze(-2)
    for h in range(2):
        assert torch.allclose(found[0, h], again[int(missed[:, 0, h].argmin()), 0, h].clamp_min(1e-8))


def test_eviction_removes_nothing_and_the_best_values_all() -> None:
    eviction, best = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])
    assert yardstick.removed(eviction, eviction, best)[:2].tolist() == [0.0, 0.0]
    assert yardstick.removed(best, eviction, best)[:2].tolist() == [1.0, 1.0]
    assert yardstick.removed(torch.tensor([2.5, 3.0, 0.0]), eviction, best).isnan().tolist() == [False, False, True]
    assert yardstick.removed(torch.tensor([5.5]), eviction[:1], best[:1]).item() == -0.5


def test_share_of_the_avoidable_error(small: Callable) -> None:
    records = small(["h2o", "weightedkv(merge=False)", "weightedkv"], [0.5, 0.25])
    assert len({record.key for record in records}) == len(records) == 12
    frame = tables.frame(records)
    share = frame[frame.metric == "avoidable error removed"].set_index(["label", "budget"])
    error = frame[frame.metric == "attention output error"].set_index(["label", "budget"])
    for at, row in share.iterrows():
        parts = error.by_passage[at]
        base, best, own = (np.array(parts[name]) for name in ("eviction", "best", "merge"))
        assert row.by_passage == pytest.approx((base - own) / (base - best), rel=1e-3, abs=1e-5)
        assert np.shape(row.thirds) == (2, 3) and len(row.by_layer) == 3
        evicts = at[0] != "weightedkv"
        assert (row["value"] == 0.0) is evicts and (parts["keys"] == parts["eviction"])
        assert (parts["early"] == parts["eviction"]) is evicts and (parts["values"] == parts["merge"])
    again = small(["h2o"], 0.5)
    assert again[0].key == records[0].key


def test_parts_of_a_merge() -> None:
    positions = torch.tensor([[[1, 3, 5, 7]]])
    merged = Kept(random(1, 1, 4, 2), random(1, 1, 4, 2, seed=1), random(1, 1, 4, seed=2), positions, 1.0)
    plain = replace(merged, keys=merged.keys + 9, values=merged.values + 9, bias=torch.zeros_like(merged.bias))
    parts = yardstick.readings(merged, plain, 8)
    assert set(parts) == set(yardstick.PARTS)
    for name in ("keys", "values", "bias"):
        own, other = getattr(merged, name), getattr(plain, name)
        assert torch.equal(getattr(parts["early"], name), torch.cat([own[:, :, :2], other[:, :, 2:]], 2))
        assert torch.equal(getattr(parts["late"], name), torch.cat([other[:, :, :2], own[:, :, 2:]], 2))
        alone = parts[{"bias": "counts"}.get(name, name)]
        assert torch.equal(getattr(alone, name), own)
        assert all(torch.equal(getattr(alone, n), getattr(plain, n)) for n in ("keys", "values", "bias") if n != name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "h3o"}, "unknown method 'h3o'"),
        ({"method": "full"}, "compresses nothing"),
        ({"method": "asymkv"}, "write fisher='forward'"),
        ({"method": "attention_matching(queries='repeat')"}, "write queries='prompt'"),
        ({"method": "kvmerger(recent=0.9)"}, "lower recent, topk or block"),
        ({"method": "weightedkv", "share": 0.1}, "raise the budget"),
        ({"share": 1.0}, "between 0 and 1"),
        ({"share": [0.5, 64]}, "between 0 and 1"),
        ({"fit": 41}, "fit=41 from 2 to context=40"),
        ({"fit": 1}, "fit=1 from 2"),
        ({"continuation": 0}, "continuation=0 must be 1 or more"),
    ],
)
def test_bad_requests_load_no_model(monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(common.Bench, "load", lambda self: pytest.fail("the model was loaded"))
    asked = {"text": "code", "method": "h2o", "share": 0.5, **SIZES, **given}
    with pytest.raises(ValueError, match=message):
        yardstick.errors(**asked, model="smollm2-135m")


def test_layers_of_other_kinds_are_skipped(small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = kvrepro.prepare(tiny_model("gemma2", dtype=torch.float32))
    monkeypatch.setattr(common, "_loaded", lambda *_: gemma)
    monkeypatch.delenv("KVREPRO_STRICT")
    with pytest.raises(RuntimeError, match="whose layers all have full attention"):
        small("h2o", 0.5)
