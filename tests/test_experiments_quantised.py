"""Quantised slots at the same bytes: what is counted, the budgets, the divergence against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import measure_tiny, tiny_model, tokens

import kvrepro
from kvrepro.adapter import cache_arguments
from kvrepro.experiments import across, common, quantised_slots
from kvrepro.records import Record

LABELS = ["h2o", "snapkv", "kvmerger(mass='attention')"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Record]]:
    """Measure on a tiny float32 model and random tokens; the text's name only has to exist."""
    measure_tiny(monkeypatch)
    across.shared_reference.cache_clear()
    yield lambda *args, **more: quantised_slots.same_bytes("code", *args, 48, 8, 2, model="smollm2-135m", **more)
    across.shared_reference.cache_clear()


@pytest.mark.parametrize("residual", [0, 4])
def test_bytes_and_divergence_by_definition(small: Callable, residual: int) -> None:
    """The bytes are those of the same cache in bfloat16; one slot more would be too many."""
    ids, model = tokens(2, 56, seed=len("code")), common._loaded("x", None, None)
    half = kvrepro.prepare(tiny_model(dtype=torch.bfloat16))
    with torch.no_grad():
        truth = torch.log_softmax(model(input_ids=ids[:, :-1]).logits[:, 47:], -1)
    for record in small(LABELS, [16, 8, 4], 0.75, residual=residual):
        p, extra = record.cell.params, record.value.extra
        name = common.Variant.parse(p["label"])

        def cache(m: object, slots: int, p: dict = p, name: common.Variant = name) -> kvrepro.CompressedCache:
            """An empty one of the record's method and bits."""
            made = kvrepro.make_cache(m, name.method, slots, **name.options)
            return made if p["bits"] == 16 else kvrepro.quantise(made, p["bits"], residual=residual)

        held = []
        for slots in (extra["slots"], extra["slots"] + 1):
            sixteen = cache(half, slots)
            kvrepro.prefill(half, ids[:, :48], sixteen)
            held.append(sixteen.nbytes)
        assert extra["whole"] == 2 * 3 * 2 * 48 * 2 * 8 * 2  # rows, layers, heads, tokens, key and value, d, bytes
        assert extra["target"] == 0.75 * extra["whole"]
        assert held[0] == extra["nbytes"] <= extra["target"] < held[1]
        exact = cache(model, extra["slots"])
        first = kvrepro.prefill(model, ids[:, :48], exact).logits
        exact.freeze()
        with torch.no_grad():
            rest = model(input_ids=ids[:, 48:-1], **cache_arguments(model, exact)).logits
        found = torch.log_softmax(torch.cat([first, rest], dim=1), -1)
        kl = (truth.exp() * (truth - found)).sum(-1).mean(1)
        assert extra["kl"] == pytest.approx(kl.tolist(), rel=1e-3)
        assert record.value.value == pytest.approx(float(kl.mean()), rel=1e-3)
        assert extra["nll_full"] == pytest.approx(
            (-truth.gather(-1, ids[:, 48:, None])).mean((1, 2)).tolist(), rel=1e-3
        )


def test_heads_that_fell_back_are_in_the_record(small: Callable) -> None:
    fitted, evicted = small(["attention_matching(heads='same')", "h2o"], 8, 0.3)
    assert len(fitted.value.extra["fallbacks"]) == 2 and fitted.value.extra["heads"] == 3 * 2  # layers, KV heads
    assert not {"fallbacks", "heads"} & set(evicted.value.extra)


def test_never_more_slots_than_tokens(small: Callable) -> None:
    (record,) = small("h2o", 4, 0.99)
    assert record.value.extra["slots"] == 48
    assert record.value.value > 0  # nothing is evicted, but all is rounded


def test_too_few_bytes(small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVREPRO_STRICT")
    refused, _ = small("h2o(recent=20)", 8, [0.1, 0.9])
    assert refused.status == "error" and "raise the budget" in refused.reason
    skipped, _ = small("h2o", 8, [0.1, 0.9], residual=20)
    assert skipped.status == "skipped" and "no more than the 20 slots" in skipped.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h2o", 2, 0.5), r"bits=\[2\] are not valid; choose of \[16, 8, 4\]"),
        (("h2o", 8, 1.5), "between 0 and 1"),
        (("asymkv", 8, 0.5), "fisher='forward'"),
        (("attention_matching(queries='repeat')", 8, 0.5), "take queries='prompt' here"),
    ],
)
def test_bad_requests(small: Callable, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(*arguments)
