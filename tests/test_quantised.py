"""Quantised slots: what is packed and what it costs, against loops and by hand; every method on top of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvrepro
from kvrepro import fixed, methods
from kvrepro.adapter import cache_arguments
from kvrepro.cache import CompressedCache, CompressedLayer
from kvrepro.quantised import Form, QuantisedCache, QuantisedLayer, pack, store, unpack
from kvrepro.slots import Slots

BUDGET, ALL = 24, 10_000
WITH_OPTIONS = [
    *((name, {}) for name in methods.names()),
    ("d2o", {"layer_budgets": "variance"}),  # waits for the last layer, then compresses all
    ("h2o", {"positions": "cache"}),
    ("kvmerger", {"mass": "attention"}),
    ("kvslimmer", {"positions": "cardinality"}),
    ("asymkv", {"fisher": "forward"}),
]
IDS = [f"{name} {options}" if options else name for name, options in WITH_OPTIONS]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """A tiny Llama in float64."""
    return kvrepro.prepare(tiny_model())


def two(
    model: PreTrainedModel, method: str, options: dict[str, Any] | None = None, **form: Any
) -> tuple[CompressedCache, QuantisedCache]:
    """The same empty cache, as it is and quantised."""
    if method == "attention_matching":
        options = {"heads": "same", **(options or {})}
    cache = kvrepro.make_cache(model, method, BUDGET, **(options or {}))
    return cache, kvrepro.quantise(cache, **form)


def decode(model: PreTrainedModel, cache: CompressedCache, ids: Tensor) -> Tensor:
    """Logits `[B, n, V]` of tokens read one by one."""
    with torch.no_grad():
        steps = [
            model(input_ids=ids[:, i : i + 1], **cache_arguments(model, cache)).logits for i in range(ids.shape[1])
        ]
    return torch.cat(steps, dim=1)


# --- numbers


@pytest.mark.parametrize("group", [16, 8, 2])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_a_loop(bits: int, group: int) -> None:
    x = 3 * torch.randn(2, 1, 5, 16, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) - 1
    packed = pack(x, bits, group)
    found = unpack(packed, bits, x.dtype)
    for index in np.ndindex(2, 1, 5):
        for g in range(16 // group):
            part = x[index][g * group : (g + 1) * group].numpy()
            scale = float(np.float16((part.max() - part.min()) / (2**bits - 1)))
            zero = float(np.float16(part.min()))
            codes = np.clip(np.round((part - zero) / scale), 0, 2**bits - 1)
            np.testing.assert_array_equal(found[index][g * group : (g + 1) * group], zero + codes * scale)
            width = part.max() - part.min()
            rounded = (abs(part.min()) + width) * 2.0**-11  # zero and scale, in float16
            assert np.abs(zero + codes * scale - part).max() <= 0.5 * width / (2**bits - 1) + rounded
            if bits == 4:
                bytes_ = packed.codes[index][g * group // 2 : (g + 1) * group // 2].numpy()
                np.testing.assert_array_equal(bytes_, codes[::2] + 16 * codes[1::2])


def test_equal_numbers_are_kept() -> None:
    x = torch.full((1, 1, 2, 8), 0.3)
    torch.testing.assert_close(unpack(pack(x, 4, 8), 4, x.dtype), x.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e5])
def test_what_float16_cannot_scale_is_refused(bad: float) -> None:
    x = torch.zeros(1, 1, 2, 8)
    x[0, 0, 1, 3] = -bad
    with pytest.raises(ValueError, match="float16"):
        pack(x, 8, 8)


# --- what is held


@pytest.mark.parametrize(("bits", "group", "residual"), [(8, None, 0), (4, None, 0), (4, 4, 0), (8, 2, 5), (4, 8, 30)])
def test_bytes_by_hand(bits: int, group: int | None, residual: int) -> None:
    """A head's slot: codes, a scale and a zero a group, or 4 bytes a number; 8 bytes of position and cardinality."""
    small = kvrepro.prepare(tiny_model(dtype=torch.float32))
    cache, quantised = two(small, "h2o", bits=bits, group=group, residual=residual)
    for each in (cache, quantised):
        kvrepro.prefill(small, tokens(3, 40), each)
    layers, rows, heads, d = 3, 3, 2, 8
    newest = min(residual, BUDGET)
    packed = 2 * (d * bits // 8 + 4 * d // (group or d))
    slot = (BUDGET - newest) * packed + newest * 2 * 4 * d + BUDGET * (8 + 4)  # H2O adds its float32 mass
    assert quantised.nbytes == layers * rows * heads * slot
    assert cache.nbytes == layers * rows * heads * BUDGET * (2 * 4 * d + 8 + 4)
    assert quantised.layers[0].newest[0].shape[2] == newest


def test_the_observation_window_counts(model: PreTrainedModel) -> None:
    cache, quantised = two(model, "snapkv", bits=8)
    for each in (cache, quantised):
        kvrepro.prefill(model, tokens(1, 40), each)
    saved = 3 * 2 * BUDGET * 2 * (8 * 8 - (8 + 4))  # layers, heads, slots, keys and values: float64 against 8 bits
    assert cache.nbytes - quantised.nbytes == saved


def test_sliding_layers_stay_and_count() -> None:
    gemma = kvrepro.prepare(tiny_model("gemma3", dtype=torch.float32))
    _, quantised = two(gemma, "h2o", bits=4)
    kvrepro.prefill(gemma, tokens(1, 40), quantised)
    kinds = [isinstance(layer, QuantisedLayer) for layer in quantised.layers]
    assert kinds == [True, False, True]
    window = quantised.layers[1]
    assert window.keys.dtype == torch.float32
    plain = sum(x.numel() * x.element_size() for x in (window.keys, window.values))
    assert quantised.nbytes == plain + sum(layer.nbytes for layer in quantised.compressed)


# --- methods on top


@pytest.mark.parametrize(("method", "options"), [m for m in WITH_OPTIONS if m != ("asymkv", {})])
@pytest.mark.parametrize("residual", [0, 6])
def test_a_prompt_is_compressed_first_and_packed_then(
    model: PreTrainedModel, method: str, options: dict[str, Any], residual: int
) -> None:
    """Merging and evicting decide and mix on the model's own numbers; what they leave is packed, and nothing else."""
    cache, quantised = two(model, method, options, bits=4, residual=residual)
    ids = tokens(2, 40)
    logits = [kvrepro.prefill(model, ids, each).logits for each in (cache, quantised)]
    assert torch.equal(*logits)
    for layer, own in zip(cache.layers, quantised.layers, strict=True):
        assert torch.equal(own.positions, layer.positions) and torch.equal(own.cardinality, layer.cardinality)
        for name in layer.slots.stats:
            assert torch.equal(own.slots.stats[name], layer.slots.stats[name])
        for mine, exact in ((own.keys, layer.keys), (own.values, layer.values)):
            first = exact.shape[2] - residual
            assert torch.equal(mine[:, :, :first], unpack(pack(exact[:, :, :first], 4, 8), 4, exact.dtype))
            assert torch.equal(mine[:, :, first:], exact[:, :, first:])


@pytest.mark.parametrize(("method", "options"), WITH_OPTIONS, ids=IDS)
def test_nothing_packed_nothing_changed(model: PreTrainedModel, method: str, options: dict[str, Any]) -> None:
    """With all slots residual, chunks and steps give the plain cache's logits; 4 bits give others."""
    cache, quantised = two(model, method, options, residual=ALL)
    _, packed = two(model, method, options, bits=4)
    ids = tokens(2, 44)
    found = []
    for each in (cache, quantised, packed):
        first = kvrepro.prefill(model, ids[:, :40], each, chunk=10).logits
        found.append(torch.cat([first, decode(model, each, ids[:, 40:])], dim=1))
    torch.testing.assert_close(found[1], found[0])
    assert bool(found[2].isfinite().all()) and not torch.allclose(found[2], found[0], atol=1e-3)
    assert packed.get_seq_length() == 44


@pytest.mark.parametrize("method", ["full", "streaming_llm"])
def test_eight_bits_are_nearly_the_models_own(model: PreTrainedModel, method: str) -> None:
    """Methods that decide by nothing that is rounded: logits within a small part of their own spread."""
    cache, quantised = two(model, method, bits=8)
    _, coarse = two(model, method, bits=4)
    ids = tokens(2, 60)
    exact, near, far = (
        torch.cat([kvrepro.prefill(model, ids[:, :40], c, chunk=8).logits, decode(model, c, ids[:, 40:])], dim=1)
        for c in (cache, quantised, coarse)
    )
    assert float((near - exact).std()) < 0.02 * float(exact.std())
    assert 5 < float((far - exact).std() / (near - exact).std()) < 60  # 17 times the step


# --- nothing drifts


@pytest.mark.parametrize(
    ("method", "dtype", "residual"),
    [
        ("full", torch.bfloat16, 0),
        ("h2o", torch.float32, 0),
        ("h2o", torch.bfloat16, 7),
        ("weightedkv", torch.bfloat16, 0),
    ],
)
def test_what_was_packed_once_keeps_its_bits(method: str, dtype: torch.dtype, residual: int) -> None:
    """Over 60 steps, by methods that leave keys as they are; with H2O values, too."""
    small = kvrepro.prepare(tiny_model(dtype=dtype))
    _, quantised = two(small, method, bits=4, group=4, residual=residual)
    kvrepro.prefill(small, tokens(1, 30), quantised)
    first = torch.full((2, 3, 2, 200, 8), torch.nan, dtype=dtype)  # keys and values, layers, heads, positions
    again = 0
    for token in tokens(60, 1, 1, seed=1):
        decode(small, quantised, token)
        for i, layer in enumerate(quantised.layers):
            slots, packed = layer.slots, layer.slots.size - layer.newest[0].shape[2]
            assert slots.size - packed <= residual
            place = slots.positions[0, :, :packed].long().unsqueeze(-1).expand(-1, -1, 8)
            for side, x in enumerate((slots.keys,) if method == "weightedkv" else (slots.keys, slots.values)):
                known, now = first[side, i].gather(1, place), x[0, :, :packed]
                assert torch.equal(torch.where(known.isnan(), now, known), now)
                again += int((~known.isnan()).sum())
                first[side, i].scatter_(1, place, now)
    assert again > 30_000


@pytest.mark.parametrize("residual", [0, 3])
def test_what_changes_is_packed_anew_and_nothing_else(residual: int) -> None:
    """One slot leaves, one value is merged, one key moves: the codes of all others stay, wherever they stand now."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 2, 12, 8, generator=generator)
    places = torch.arange(12, dtype=torch.int32).expand(1, 2, 12).contiguous()
    old = store(Slots(x[0], x[1], places, torch.ones_like(places)), Form(4, 4, residual))
    before = old.unpacked(4)
    kept = [i for i in range(12) if i != 2]
    slots = before.map(lambda t: t[:, :, kept].clone())
    slots.values[0, 1, 4] = torch.randn(8, generator=generator)
    slots.keys[0, 0, 6] *= 1.5
    new = store(slots, Form(4, 4, residual), (old, before))
    packed = new.keys.size
    assert packed == max(11 - residual, 12 - residual - 1)
    for name, changed in (("keys", (0, 6)), ("values", (1, 4))):
        mine, theirs = getattr(new, name), getattr(old, name)
        for head in range(2):
            for slot in range(packed):
                same = all(
                    torch.equal(getattr(mine, part)[0, head, slot], getattr(theirs, part)[0, head, kept[slot]])
                    for part in ("codes", "scale", "zero")
                )
                assert same == ((head, slot) != changed)
    exact = slots.values[0, 1, 4]
    error = (new.unpacked(4).values[0, 1, 4] - exact).abs().max()
    assert 0 < float(error) < 0.75 * float(exact.max() - exact.min()) / 15


def test_a_packed_slot_is_not_taken_for_a_new_one() -> None:
    """Where many of the newest slots leave at once, packed ones stand among the newest: they stay packed."""
    x = torch.randn(2, 1, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(12, dtype=torch.int32).view(1, 1, 12)
    old = store(Slots(x[0], x[1], places, torch.ones_like(places)), Form(4, 8, 4))
    before = old.unpacked(4)
    slots = before.map(lambda t: t[:, :, :9])  # three of the four newest leave
    new = store(slots, Form(4, 8, 4), (old, before))
    assert new.keys.size == 8 and new.rest.keys.shape[2] == 1
    assert torch.equal(new.keys.codes, old.keys.codes)
    assert torch.equal(new.unpacked(4).keys, slots.keys)


# --- batches, beams, and what else one does with a cache


@pytest.mark.parametrize("method", ["h2o", "weightedkv", "kvmerger", "kvslimmer", "d2o"])
def test_padding_changes_nothing(model: PreTrainedModel, method: str) -> None:
    """A short row behind padding is read and decoded as it is alone."""
    ids = tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    both, alone = (two(model, method, bits=8, residual=3)[1] for _ in range(2))
    kvrepro.prefill(model, ids, both, attention_mask=mask, chunk=8)
    for part in ids[1:, 12:].split([4, 8, 8, 8], dim=1):  # cut where the padded row was
        kvrepro.prefill(model, part, alone)
    for a, b in zip(both.layers, alone.layers, strict=True):
        for head in range(2):
            mine, theirs = a.slots.valid[1, head], b.slots.valid[0, head]
            assert torch.equal(a.positions[1, head][mine], b.positions[0, head][theirs])
            torch.testing.assert_close(a.values[1, head][mine], b.values[0, head][theirs])


@pytest.mark.parametrize("residual", [0, 5])
def test_rows_move_without_being_rounded(model: PreTrainedModel, residual: int) -> None:
    _, quantised = two(model, "snapkv", bits=4, residual=residual)
    kvrepro.prefill(model, tokens(3, 40), quantised)
    before = [layer.slots for layer in quantised.layers]
    windows = [layer.window[0] for layer in quantised.layers]
    for move, rows in (
        (lambda: quantised.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda: quantised.batch_repeat_interleave(2), [2, 2, 0, 0, 0, 0]),
        (lambda: quantised.batch_select_indices(torch.tensor([1, 4])), [2, 0]),
    ):
        move()
        for layer, old, window in zip(quantised.layers, before, windows, strict=True):
            for name in ("keys", "values", "positions", "cardinality"):
                assert torch.equal(getattr(layer, name), getattr(old, name)[rows])
            assert torch.equal(layer.window[0], window[rows]) and len(layer.row_tokens) == len(rows)


@pytest.mark.parametrize(("method", "beams"), [*((name, 1) for name in methods.names()), ("h2o", 3), ("weightedkv", 3)])
def test_generate(model: PreTrainedModel, method: str, beams: int) -> None:
    """`model.generate` writes over it, the budget is kept, and with all slots residual it writes the plain cache's."""
    ids = tokens(1, 40)
    plain, same = two(model, method, residual=ALL)
    _, packed = two(model, method, bits=4)
    settings = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    texts = [model.generate(ids, past_key_values=cache, **settings) for cache in (plain, same, packed)]
    assert torch.equal(texts[0], texts[1])
    assert packed.layers[0].keys.shape == plain.layers[0].keys.shape and packed.nbytes < plain.nbytes


@pytest.mark.parametrize("method", methods.names())
def test_fixed_storage_is_refused(model: PreTrainedModel, method: str) -> None:
    ids = tokens(1, 40)
    expected, quantised = (two(model, method, bits=4)[1] for _ in range(2))
    first = kvrepro.prefill(model, ids, expected).logits[:, -1:].argmax(-1)
    second = decode(model, expected, first).argmax(-1)
    with pytest.raises(ValueError, match=r"model\.generate"):
        kvrepro.generate(model, ids, quantised, 4)
    assert all(layer.static is None for layer in quantised.layers)
    assert torch.equal(decode(model, quantised, first).argmax(-1), second)  # nothing was spoilt


def test_no_chunk_is_captured(model: PreTrainedModel) -> None:
    """A CUDA graph would hold the slots in the model's type."""
    cache, quantised = two(model, "kvslimmer")
    for each in (cache, quantised):
        kvrepro.prefill(model, tokens(1, 48), each, chunk=8)
    assert fixed.full_and_steady(cache, 8) and not fixed.full_and_steady(quantised, 8)


@pytest.mark.parametrize("residual", [0, ALL])
def test_the_gradient_of_the_loss(model: PreTrainedModel, residual: int) -> None:
    """AsymKV's probe reads the slots unpacked and gives back merged ones, which are packed."""
    cache, quantised = two(model, "asymkv", residual=residual)
    ids = tokens(1, 60)
    found = [kvrepro.prefill(model, ids, each, chunk=6).logits for each in (cache, quantised)]
    assert quantised.layers[0].keys.shape == cache.layers[0].keys.shape
    assert torch.allclose(*found) == (residual == ALL)


def test_a_chunk_that_is_read_twice_is_packed_once(model: PreTrainedModel) -> None:
    """Between the two readings its slots are as the model made them."""
    for options in ({"heads": "same"}, {"heads": "same", "queries": "repeat"}):
        cache = kvrepro.make_cache(model, "attention_matching", 16, **options)
        quantised = kvrepro.quantise(kvrepro.make_cache(model, "attention_matching", 16, **options), bits=8, residual=0)
        for each in (cache, quantised):
            kvrepro.prefill(model, tokens(1, 50), each)
        for plain, layer in zip(cache.compressed, quantised.compressed, strict=True):
            assert torch.equal(layer.positions, plain.positions) and not layer._opened
            torch.testing.assert_close(layer.values, plain.values, atol=0.05, rtol=0.05)
            assert torch.equal(layer.slots.stats["bias"], plain.slots.stats["bias"])


def test_reset(model: PreTrainedModel) -> None:
    _, quantised = two(model, "d2o", bits=4)
    first = kvrepro.prefill(model, tokens(1, 50), quantised, chunk=10).logits
    quantised.reset()
    assert quantised.nbytes == 0 and quantised.layers[0].keys is None
    assert torch.equal(kvrepro.prefill(model, tokens(1, 50), quantised, chunk=10).logits, first)


def test_the_given_cache_is_left_as_it_is(model: PreTrainedModel) -> None:
    cache, quantised = two(model, "h2o")
    kvrepro.prefill(model, tokens(1, 40), quantised)
    assert cache.get_seq_length() == 0 and not isinstance(cache.layers[0], QuantisedLayer)
    assert quantised.method.name == "h2o" and quantised.method.resolved() == cache.method.resolved()
    assert all(isinstance(layer, CompressedLayer) for layer in quantised.layers)


# --- errors


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"bits": 2}, r"bits=2 is not valid; choose one of \[8, 4\]"),
        ({"bits": 8.0}, "bits=8.0 is not valid"),
        ({"group": 3}, r"group=3 is not valid for heads of 8 dimensions; choose one of \[2, 4, 8\]"),
        ({"group": 1}, "group=1 is not valid"),
        ({"group": 16}, "group=16 is not valid"),
        ({"group": True}, "group=True is not valid"),
        ({"residual": -1}, "residual=-1 is not valid"),
        ({"residual": 0.5}, "residual=0.5 is not valid"),
    ],
)
def test_bad_forms(model: PreTrainedModel, form: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two(model, "h2o", **form)


def test_default_groups() -> None:
    """The head's dimensions with 8 bits; 32 with 4, where these divide them."""
    wide, odd = tiny_model(), tiny_model()
    wide.config.head_dim, odd.config.head_dim = 64, 48
    sizes = [two(m, "h2o", bits=bits)[1].form.group for m in (wide, odd) for bits in (8, 4)]
    assert sizes == [64, 32, 48, 48]


def test_bad_caches(model: PreTrainedModel) -> None:
    cache, quantised = two(model, "h2o")
    with pytest.raises(ValueError, match="quantised already, with bits=8"):
        kvrepro.quantise(quantised)
    with pytest.raises(ValueError, match="DynamicCache cannot be quantised"):
        kvrepro.quantise(DynamicCache())
    kvrepro.prefill(model, tokens(1, 8), cache)
    with pytest.raises(ValueError, match="begun to read"):
        kvrepro.quantise(cache)
    cache.reset()
    assert kvrepro.quantise(cache, bits=4).form.bits == 4
    planned = kvrepro.make_cache(model, "h2o", 0.5)
    planned.plan(40)
    with pytest.raises(ValueError, match="begun to read"):
        kvrepro.quantise(planned)
