"""The cache inside real models: families, plain caches, budgets, batches and padding, generate."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

import kvrepro
from kvrepro import methods
from kvrepro.adapter import cache_arguments, cache_keyword
from kvrepro.cache import CompressedCache

NAMES = methods.names()
BOUNDED = [name for name in NAMES if name != "full"]
#: Methods whose slots lose no token: what is evicted is merged.
LOSSLESS = ["weightedkv", "kvmerger", "asymkv", "kvslimmer"]
BUDGET = 16
#: What the installed transformers calls a model's cache.
NATIVE = cache_keyword(tiny_model())


class Older(LlamaForCausalLM):
    """A model whose code calls its cache what transformers did before 5.24."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{NATIVE: past_key_values}, **kwargs)


class Newer(LlamaForCausalLM):
    """A model whose code calls its cache what transformers does since 5.24."""

    def forward(self, input_ids: Tensor, cache: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, **{NATIVE: cache}, **kwargs)


@pytest.mark.parametrize(("kind", "keyword"), [(Older, "past_key_values"), (Newer, "cache")])
def test_a_model_gets_its_cache_by_its_own_name(kind: type[PreTrainedModel], keyword: str) -> None:
    model, ids = kvrepro.prepare(tiny_model()), tokens(1, 30)
    other = kvrepro.prepare(kind(model.config).to(model.dtype).eval())
    other.load_state_dict(model.state_dict())
    assert cache_keyword(other) == keyword
    caches = [kvrepro.make_cache(model, "weightedkv", BUDGET) for _ in range(2)]
    written = [kvrepro.generate(m, ids, c, 8, chunk=9) for m, c in zip((model, other), caches, strict=True)]
    assert torch.equal(*written) and caches[1].get_seq_length() == 37


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_is_used_that_transformers_gives_up(family: str) -> None:
    """Reading, scoring and decoding warn of nothing; `model.generate` takes the old name until transformers 6."""
    model = kvrepro.prepare(tiny_model(family, dtype=torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        kvrepro.prefill(model, tokens(1, 30), kvrepro.make_cache(model, "asymkv", BUDGET), chunk=8)
        kvrepro.generate(model, tokens(1, 20), kvrepro.make_cache(model, "kvslimmer", BUDGET), 4, chunk=8)
        kvrepro.fidelity(model, tokens(1, 30), "h2o", BUDGET, context=24, continuation=6)


@torch.no_grad()
def logits(
    model: PreTrainedModel,
    ids: Tensor,
    cache: Any,
    sizes: list[int],
    mask: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Logits of all tokens, read in pieces of the given sizes; `places` are position ids, which `generate` gives."""
    out = []
    for stop, n in zip(itertools.accumulate(sizes), sizes, strict=True):
        seen = None if mask is None else mask[:, :stop]
        where = None if places is None else places[:, stop - n : stop]
        part = ids[:, stop - n : stop]
        out.append(model(part, attention_mask=seen, position_ids=where, **cache_arguments(model, cache)).logits)
    return torch.cat(out, dim=1)


def plain_logits(family: str, ids: Tensor, mask: Tensor | None = None, **shape: Any) -> Tensor:
    """The same model's logits with transformers' own attention and no cache."""
    model = tiny_model(family, **shape)
    model.set_attn_implementation("eager" if family == "gemma2" else "sdpa")  # SDPA cannot cap logits
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def left_padded(rows: list[Tensor], filler: int) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch: ids and attention mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), filler), row]) for row in rows])
    mask = torch.stack([torch.cat([torch.zeros(width - len(row)), torch.ones(len(row))]) for row in rows]).long()
    return ids, mask


def options_for(name: str) -> dict[str, Any]:
    """AsymKV without its loss, which plain forwards cannot take."""
    return {"fisher": "forward"} if name == "asymkv" else {}


# --- plain caches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_prepared_model_serves_plain_caches_as_before(family: str, padded: bool) -> None:
    """Without a compressed cache nothing changes: no cache, DynamicCache in pieces, with and without padding."""
    ids = tokens(2, 18)
    mask = None
    if padded:
        ids, mask = left_padded([tokens(18, seed=1), tokens(11, seed=2)], filler=0)
    shape = {"dtype": torch.float32}
    real = slice(None) if mask is None else mask.bool()
    expected = plain_logits(family, ids, mask, **shape)
    model = kvrepro.prepare(tiny_model(family, **shape))
    with torch.no_grad():
        uncached = model(ids, attention_mask=mask, use_cache=False).logits
    cached = logits(model, ids, DynamicCache(config=model.config), [7, 8, 1, 2], mask)
    torch.testing.assert_close(uncached[real], expected[real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(cached[real], expected[real], atol=2e-5, rtol=1e-4)


def test_a_prepared_model_generates_with_a_static_cache_as_before() -> None:
    """A cache with empty places at its end: the mask must cover them."""
    ids = tokens(2, 9)
    found = []
    for model in (tiny_model(), kvrepro.prepare(tiny_model())):
        found.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                cache_implementation="static",
                disable_compile=True,
            )
        )
    assert torch.equal(found[0], found[1])


def test_a_prepared_model_trains_as_before() -> None:
    """Gradients without a cache are those of transformers' own attention."""
    ids, gradients = tokens(2, 12), []
    for prepared in (False, True):
        model = tiny_model()
        if prepared:
            kvrepro.prepare(model)
        model.train()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


# --- unlimited budgets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [None, 200])
@pytest.mark.parametrize("name", NAMES)
def test_unlimited_budget_gives_the_full_caches_logits(name: str, budget: float | None) -> None:
    """Whole and in pieces, every position mode the method offers."""
    ids = tokens(2, 24)
    expected = plain_logits("llama", ids)
    model = tiny_model("llama")
    choices = next(option.choices for option in methods.describe(name).options if option.name == "positions")
    assert "original" in choices
    for positions in choices:
        for sizes in ([24], [10, 9, 1, 1, 3]):
            cache = kvrepro.make_cache(model, name, budget, positions=positions, **options_for(name))
            cache.plan(24)
            torch.testing.assert_close(logits(model, ids, cache, sizes), expected, atol=1e-6, rtol=1e-6)
            assert cache.get_seq_length() == 24
            assert all(layer.keys.shape == (2, 2, 24, 8) for layer in cache.compressed)
            assert all(bool((layer.positions == torch.arange(24)).all()) for layer in cache.compressed)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["full", "weightedkv", "h2o", "kvslimmer"])
def test_unlimited_budget_in_every_family(family: str, name: str) -> None:
    """Softcaps, sliding layers, normalised keys and biases included; with left padding."""
    ids, mask = left_padded([tokens(20, seed=3), tokens(13, seed=4)], filler=0)
    shape = {"dtype": torch.float32}
    expected = plain_logits(family, ids, mask, **shape)
    model = tiny_model(family, **shape)
    cache = kvrepro.make_cache(model, name, 32)
    found = logits(model, ids, cache, [9, 6, 1, 4], mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=5e-5, rtol=1e-4)


def test_unlimited_budget_in_bfloat16_is_as_good_as_sdpa() -> None:
    """Against float32: at most twice the error of transformers' own attention in the same precision."""
    ids = tokens(4, 40, seed=20)
    exact = plain_logits("llama", ids, dtype=torch.float32)
    plain = float((plain_logits("llama", ids, dtype=torch.bfloat16).float() - exact).abs().mean())
    model = tiny_model("llama", dtype=torch.bfloat16)
    for name in NAMES:
        cache = kvrepro.make_cache(model, name, 64, **options_for(name))
        found = logits(model, ids, cache, [20, 15, 1, 1, 3]).float()
        assert float((found - exact).abs().mean()) <= 2 * plain


@pytest.mark.parametrize("name", ["h2o", "weightedkv", "kvmerger", "kvslimmer", "snapkv", "keepkv"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_a_budget(name: str, dtype: torch.dtype) -> None:
    """Slots keep the model's type, nothing overflows, statistics are float32."""
    model, ids = tiny_model(dtype=dtype), tokens(2, 40)
    cache = kvrepro.make_cache(model, name, BUDGET)
    out = logits(model, ids, cache, [20, 9, 8, 1, 1, 1])
    assert bool(out.isfinite().all())
    for layer in cache.compressed:
        assert layer.keys.dtype == layer.values.dtype == dtype and layer.keys.shape[2] == BUDGET
        assert all(side.dtype == torch.float32 for side in layer.slots.stats.values())


# --- budgets ---------------------------------------------------------------------------------------------------------


def held(cache: CompressedCache) -> list[list[int]]:
    """Filled slots of every layer and head of the first row."""
    return [(layer.cardinality[0] > 0).sum(-1).tolist() for layer in cache.compressed]


@pytest.mark.parametrize("chunk", [1, 5, None])
@pytest.mark.parametrize("name", BOUNDED)
def test_budget_is_kept_at_every_step_in_every_layer(name: str, chunk: int | None) -> None:
    """After the prompt and after each decoded token no head holds more than its layer's budget, and not much less."""
    model, ids = tiny_model(), tokens(1, 34)
    cache = kvrepro.make_cache(model, name, BUDGET, **options_for(name))
    kvrepro.prefill(model, ids[:, :28], cache, chunk=chunk)
    assert sum(layer.budget for layer in cache.compressed) == BUDGET * len(cache.compressed)
    for step in range(28, 34):
        for layer, counts in zip(cache.compressed, held(cache), strict=True):
            room = torch.full((2,), layer.budget) if layer.rooms is None else layer.rooms[0]
            missing = room - torch.tensor(counts)
            assert int(missing.min()) >= 0 and int(missing.max()) <= (1 if name == "kvmerger" else 0)
            assert int(room.max()) == layer.keys.shape[2]
            for tensor in (layer.positions, layer.cardinality):
                assert tensor.shape == layer.keys.shape[:3]
            later = (layer.positions.diff(dim=-1) > 0) | (layer.positions[..., 1:] < 0)
            assert bool(later.all())  # chronological
        logits(model, ids[:, step : step + 1], cache, [1])
    assert cache.get_seq_length() == 34


@pytest.mark.parametrize("name", BOUNDED)
def test_peak_is_budget_plus_chunk(name: str) -> None:
    """While a prompt is read in chunks no layer ever attends to more than budget + chunk slots."""
    model, ids = tiny_model(), tokens(1, 40)
    cache = kvrepro.make_cache(model, name, BUDGET, **options_for(name))
    cache.plan(40)
    peaks = []
    for layer in cache.compressed:
        method = layer.method

        def compress(slots: Any, budget: int, step: Any, method: Any = method, layer: Any = layer) -> Any:
            peaks.append(layer.fill(slots) - budget)
            return type(method).compress(method, slots, budget, step)

        layer.method = copy.copy(method)
        object.__setattr__(layer.method, "compress", compress)
    kvrepro.prefill(model, ids, cache, chunk=6)
    assert len(peaks) >= 4 * len(cache.compressed) and max(peaks) <= 6


def test_budget_as_a_share_of_the_prompt() -> None:
    """0.5 of 29 tokens is 15 slots (rounded up); known before the first chunk is read, and still 15 while decoding."""
    model, ids = tiny_model(), tokens(1, 33)
    cache = kvrepro.make_cache(model, "h2o", 0.5)
    kvrepro.prefill(model, ids[:, :29], cache, chunk=4)
    assert [layer.budget for layer in cache.compressed] == [15, 15, 15]
    logits(model, ids[:, 29:], cache, [1, 3])
    assert held(cache) == [[15, 15]] * 3
    whole = kvrepro.make_cache(model, "h2o", 0.5)
    logits(model, ids, whole, [29, 1, 3])
    assert [layer.budget for layer in whole.compressed] == [15, 15, 15]


def test_pyramid_budgets_fall_linearly_and_average_to_the_budget() -> None:
    """An arithmetic sequence (up to rounding) with the budget as its mean."""
    model = tiny_model(layers=8)
    cache = kvrepro.make_cache(model, "pyramidkv", 40)
    cache.plan(100)
    budgets = [layer.budget for layer in cache.compressed]
    slope = (budgets[0] - budgets[-1]) / 7
    line = [budgets[0] - slope * i for i in range(8)]
    assert sum(budgets) == 40 * 8 and slope > 4
    assert all(abs(found - exact) <= 1 for found, exact in zip(budgets, line, strict=True))


def test_layers_left_whole() -> None:
    """KVMerger's and D2O's options leave the first two layers and the last whole; the others keep the budget."""
    for name, option in (("kvmerger", "skip_layers"), ("d2o", "whole_layers")):
        model = tiny_model(layers=5)
        cache = kvrepro.make_cache(model, name, BUDGET, **{option: True})
        kvrepro.prefill(model, tokens(1, 30), cache)
        assert [layer.keys.shape[2] for layer in cache.compressed] == [30, 30, BUDGET, BUDGET, 30]


@pytest.mark.parametrize("chunk", [None, 7])
def test_d2o_splits_the_slots_by_variance(chunk: int | None) -> None:
    """Layers get different budgets, together as many slots as asked for, and hold them."""
    model, ids = tiny_model(layers=4), tokens(1, 36)
    cache = kvrepro.make_cache(model, "d2o", BUDGET, layer_budgets="variance")
    kvrepro.prefill(model, ids[:, :32], cache, chunk=chunk)
    logits(model, ids[:, 32:], cache, [1, 1, 2])
    budgets = [layer.budget for layer in cache.compressed]
    assert sum(budgets) == BUDGET * 4 and len(set(budgets)) > 1
    assert [max(counts) for counts in held(cache)] == budgets


def test_nbytes_counts_what_is_held() -> None:
    """Keys, values, and every side vector; a compressed cache holds less than the full one."""
    model, ids = tiny_model(dtype=torch.float32), tokens(2, 40)
    full, small = kvrepro.make_cache(model, "full"), kvrepro.make_cache(model, "h2o", BUDGET)
    for cache in (full, small):
        kvrepro.prefill(model, ids, cache)
    slots = 2 * 2 * BUDGET * 3  # rows, heads, slots, layers
    keys_and_values, position_and_cardinality, mass = 2 * 8 * 4, 2 * 4, 4
    assert small.nbytes == slots * (keys_and_values + position_and_cardinality + mass)
    assert full.nbytes >= 2 * 2 * 40 * 3 * keys_and_values


@pytest.mark.parametrize("chunk", [1, 4, None])
@pytest.mark.parametrize("name", LOSSLESS)
def test_nothing_is_lost_with_disjoint_merges(name: str, chunk: int | None) -> None:
    """The cardinalities of every head sum to the tokens seen, at every step."""
    model, ids = tiny_model(), tokens(2, 45)
    cache = kvrepro.make_cache(model, name, BUDGET, **options_for(name))
    kvrepro.prefill(model, ids[:, :40], cache, chunk=chunk)
    for seen in range(40, 45):
        for layer in cache.compressed:
            assert bool((layer.cardinality.sum(-1) == seen).all())
        logits(model, ids[:, seen : seen + 1], cache, [1])


def test_overlapping_merges_lose_tokens() -> None:
    """The released codes' quirk is reproduced: some cardinality is gone."""
    model = tiny_model()
    cache = kvrepro.make_cache(model, "kvslimmer", BUDGET, overlap="released")
    kvrepro.prefill(model, tokens(1, 40), cache)
    assert any(int(layer.cardinality[0].sum(-1).min()) < 40 for layer in cache.compressed)


# --- chunks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["streaming_llm", "random"])
def test_choices_that_do_not_depend_on_chunks(name: str) -> None:
    """Which tokens stay is a matter of their place (StreamingLLM) or of their draw (random), not of the chunking."""
    model, ids = tiny_model(), tokens(1, 40)
    kept = []
    for chunk in (1, 3, 7, None):
        cache = kvrepro.make_cache(model, name, BUDGET)
        kvrepro.prefill(model, ids, cache, chunk=chunk)
        kept.append([layer.positions for layer in cache.compressed])
    for other in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(kept[0], other, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_prefill_equals_feeding_the_pieces(name: str) -> None:
    """`prefill(chunk=4)` is the model called on four tokens at a time."""
    model, ids = tiny_model(), tokens(1, 26)
    one, two = (kvrepro.make_cache(model, name, BUDGET, **options_for(name)) for _ in range(2))
    last = kvrepro.prefill(model, ids, one, chunk=4).logits[:, -1]
    expected = logits(model, ids, two, [4] * 6 + [2])[:, -1]
    torch.testing.assert_close(last, expected)
    for a, b in zip(one.compressed, two.compressed, strict=True):
        assert torch.equal(a.positions, b.positions) and torch.equal(a.keys, b.keys)


# --- batches and padding ---------------------------------------------------------------------------------------------

#: Every method, and variants that keep books of another kind.
PADDED = [
    *((name, options_for(name)) for name in NAMES),
    ("kvmerger", {"block": 4, "recent": 2, "topk": 1}),
    ("kvmerger", {"budget_mode": "threshold", "epsilon": 0.3}),
    ("kvslimmer", {"variant": "released"}),
    ("kvslimmer", {"overlap": "released", "positions": "cache"}),
    ("weightedkv", {"positions": "cardinality"}),
]
ROWS = [tokens(30, seed=5), tokens(21, seed=6), tokens(13, seed=7)]  # the last one fills its budget while decoding
MORE = 8


@pytest.mark.parametrize("sizes", [[30], [11, 10, 9]], ids=["whole", "pieces"])
@pytest.mark.parametrize("name, options", PADDED)
def test_a_padded_batch_equals_its_rows(name: str, options: dict[str, Any], sizes: list[int]) -> None:
    """Each row of a left-padded batch has the slots and logits it has alone: padding is not scored, kept, merged."""
    model = tiny_model()
    ids, mask = left_padded(ROWS, filler=0)
    ids = torch.cat([ids, tokens(3, MORE, seed=8)], dim=1)
    mask = torch.cat([mask, torch.ones(3, MORE, dtype=torch.long)], dim=1)
    cache = kvrepro.make_cache(model, name, BUDGET, **options)
    together = logits(model, ids, cache, sizes + [1] * MORE, mask, (mask.cumsum(1) - 1).clamp_min(0))
    for b, row in enumerate(ROWS):
        alone = kvrepro.make_cache(model, name, BUDGET, **options)
        padding = 30 - len(row)
        own = [n for n in cut(sizes, padding) if n > 0]
        single = logits(model, ids[b : b + 1, padding:], alone, own + [1] * MORE)
        torch.testing.assert_close(together[b, padding:], single[0], atol=1e-5, rtol=1e-4)
        for whole, one in zip(cache.compressed, alone.compressed, strict=True):
            for h in range(2):
                filled, own_filled = whole.cardinality[b, h] > 0, one.cardinality[0, h] > 0
                for side in ("positions", "cardinality", "keys", "values"):
                    found, expected = getattr(whole, side)[b, h][filled], getattr(one, side)[0, h][own_filled]
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def cut(sizes: list[int], padding: int) -> list[int]:
    """What is left of each piece when the first `padding` tokens are taken away."""
    left = []
    for n in sizes:
        left.append(max(n - padding, 0))
        padding = max(padding - n, 0)
    return left


@pytest.mark.parametrize("name", NAMES)
def test_what_padding_contains_does_not_matter(name: str) -> None:
    """Another padding token, and the logits stay bit for bit."""
    model = tiny_model()
    found = []
    for filler in (0, 50):
        ids, mask = left_padded(ROWS, filler)
        cache = kvrepro.make_cache(model, name, BUDGET, **options_for(name))
        out = logits(model, ids, cache, [20, 8, 1, 1], mask)
        found.append(out[mask.bool()])
        assert all(bool(out[b, -12:].isfinite().all()) for b in range(3))
    assert torch.equal(found[0], found[1])


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("name", NAMES)
def test_generate_with_an_unlimited_budget_equals_a_plain_cache(name: str, how: str) -> None:
    """Through plain `generate`, on a left-padded batch: the same tokens as with transformers' own cache."""
    settings = {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "top_k": 20},
        "beams": {"do_sample": False, "num_beams": 3},
    }[how]
    ids, mask = left_padded([tokens(14, seed=9), tokens(9, seed=10)], filler=0)
    model = tiny_model()
    found = []
    for cache in (None, kvrepro.make_cache(model, name, 40, **options_for(name))):
        torch.manual_seed(0)
        found.append(
            model.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, pad_token_id=0, **settings
            )
        )
    assert found[0].shape == (2, 22) and torch.equal(found[0], found[1])


@pytest.mark.parametrize("how", ["greedy", "sampling", "beams"])
@pytest.mark.parametrize("name", BOUNDED)
def test_generate_within_a_budget(name: str, how: str) -> None:
    """`generate` makes all tokens, keeps the budget, and greedy decoding equals feeding the tokens by hand."""
    settings = {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "top_k": 20},
        "beams": {"do_sample": False, "num_beams": 2},
    }[how]
    model, ids = tiny_model(), tokens(2, 22, seed=11)
    cache = kvrepro.make_cache(model, name, BUDGET, **options_for(name))
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=7, **settings)
    assert out.shape == (2, 29)
    assert cache.get_seq_length() == 28
    assert all(layer.fill(layer.slots) <= layer.budget for layer in cache.compressed)
    if how == "greedy":
        again = kvrepro.make_cache(model, name, BUDGET, **options_for(name))
        by_hand = logits(model, out[:, :28], again, [22, 1, 1, 1, 1, 1, 1])
        assert torch.equal(by_hand[:, 21:].argmax(-1), out[:, 22:])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["weightedkv", "kvmerger", "kvslimmer", "snapkv"])
def test_generate_in_every_family(family: str, name: str) -> None:
    """A budget is kept by the full layers of every family; sliding layers stay as transformers makes them."""
    model = tiny_model(family, dtype=torch.float32)
    ids, mask = left_padded([tokens(26, seed=12), tokens(20, seed=13)], filler=0)
    cache = kvrepro.make_cache(model, name, BUDGET)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False, num_beams=2, pad_token_id=0
    )
    assert out.shape == (2, 31)
    assert len(cache.compressed) == (2 if family.startswith("gemma") else 3)
    assert all(layer.keys.shape[2] <= BUDGET for layer in cache.compressed)


def test_a_conversation_goes_on_with_its_cache() -> None:
    """The second call of `generate` reads only what is new: as if all had been fed by hand."""
    model = tiny_model()
    settings = {"max_new_tokens": 5, "do_sample": False}
    cache = kvrepro.make_cache(model, "weightedkv", BUDGET)
    ids = tokens(1, 24, seed=21)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    ids = torch.cat([answer, tokens(1, 7, seed=22)], dim=1)
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **settings)
    by_hand = kvrepro.make_cache(model, "weightedkv", BUDGET)
    # The last token of an answer is not read before the next question comes.
    expected = logits(model, answer[:, :40], by_hand, [24, 1, 1, 1, 1, 8, 1, 1, 1, 1])
    assert torch.equal(expected[:, 35:].argmax(-1), answer[:, 36:])
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("family", ["phi3", "qwen3_moe"])
def test_other_families_that_work(family: str) -> None:
    """Whoever uses the attention interface and half-split rotary embeddings."""
    model = tiny_model(family, dtype=torch.float32)
    cache = kvrepro.make_cache(model, "weightedkv", BUDGET)
    kvrepro.prefill(model, tokens(1, 30), cache, chunk=8)
    assert all(layer.keys.shape[2] == BUDGET for layer in cache.compressed)


@pytest.mark.parametrize("name", BOUNDED)
def test_reordered_rows_go_on_as_themselves(name: str) -> None:
    """Beam search moves rows about: each goes on exactly as it would have in its old place."""
    model, ids = tiny_model(), tokens(3, 24, seed=14)
    order = torch.tensor([2, 0, 0])
    one, two = (kvrepro.make_cache(model, name, BUDGET, **options_for(name)) for _ in range(2))
    logits(model, ids, one, [24])
    logits(model, ids[order], two, [24])
    one.reorder_cache(order)
    more = tokens(3, 6, seed=15)
    torch.testing.assert_close(logits(model, more, one, [1] * 6), logits(model, more, two, [1] * 6))


@pytest.mark.parametrize("name", ["weightedkv", "snapkv", "d2o"])
def test_a_copied_cache_goes_on_by_itself(name: str) -> None:
    """A prompt's cache copied for two continuations, as transformers' guide does: neither disturbs the other."""
    model, ids = tiny_model(), tokens(1, 24, seed=16)
    cache = kvrepro.make_cache(model, name, BUDGET)
    kvrepro.prefill(model, ids, cache)
    copied = copy.deepcopy(cache)
    one, two = tokens(1, 5, seed=17), tokens(1, 5, seed=18)
    first = logits(model, one, cache, [1] * 5)
    logits(model, two, copied, [1] * 5)
    fresh = kvrepro.make_cache(model, name, BUDGET)
    kvrepro.prefill(model, ids, fresh)
    assert torch.equal(first, logits(model, one, fresh, [1] * 5))


def test_reset_forgets_everything() -> None:
    """A reset cache reads another prompt as a new one does."""
    model = tiny_model()
    used, fresh = (kvrepro.make_cache(model, "snapkv", 0.5) for _ in range(2))
    logits(model, tokens(1, 40), used, [20, 20])
    used.reset()
    assert used.get_seq_length() == 0 and used.nbytes == 0
    ids = tokens(1, 30, seed=19)
    assert torch.equal(logits(model, ids, used, [20, 9, 1]), logits(model, ids, fresh, [20, 9, 1]))
