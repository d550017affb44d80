"""WeightedKV's experiments, the comparison at the same bytes, and what experiments share, on small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import measure_tiny, tokens
from torch.nn.functional import cosine_similarity

import kvrepro
from kvrepro import methods
from kvrepro.experiments import across, common, tables, weightedkv
from kvrepro.experiments.capture import LayerCapture
from kvrepro.records import Record


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Record]]:
    """Run an experiment on a tiny model and random tokens; the text's name only has to exist."""
    measure_tiny(monkeypatch)

    def forget() -> None:
        """Let go of what was read with another model."""
        across.shared_reference.cache_clear()
        weightedkv._nll.cache_clear()

    forget()
    yield lambda function, *args, **kwargs: function("code", *args, model="smollm2-135m", **kwargs)
    forget()


def test_toy_gives_the_papers_numbers() -> None:
    (record,) = weightedkv.toy()
    assert record.status == "ok" and record.value.value < 1e-12
    steps = record.value.extra["steps"]
    assert [step["before"][step["evicted"]] for step in steps] == [2, 4, 5, 1]
    assert steps[0]["mixture"][1] == pytest.approx([0, 1 / 6, 5 / 6, 0, 0, 0, 0, 0], abs=1e-6)
    assert steps[1]["mixture"][2] == pytest.approx([0, 0, 0, 0.4, 0.6, 0, 0, 0], abs=1e-6)


def test_singular_values_are_those_of_the_matrix() -> None:
    x = torch.randn(3, 40, 8, dtype=torch.float64)
    assert torch.allclose(weightedkv.singular_values(x), torch.linalg.svdvals(x))


def test_spectra_of_a_small_model(small: Callable) -> None:
    (record,) = small(weightedkv.spectra, 2, 32)
    extra = record.value.extra
    assert np.shape(extra["spectrum_keys"]) == (3, 8) and len(extra["rank_values"]) == 3
    assert all(row[0] == pytest.approx(1) for row in extra["spectrum_keys"])
    gap = np.mean(np.subtract(extra["rank_values"], extra["rank_keys"]))
    assert record.value.value == pytest.approx(gap, abs=1e-5)


def test_perplexity_measures_full_once_and_skips_useless_budgets(small: Callable) -> None:
    records = small(weightedkv.perplexity, ["full", "h2o", "weightedkv(merge=False)"], [12, 16], [16, 32], 2, 4)
    cells = [(r.cell.params["label"], r.cell.budget, r.cell.params["window"]) for r in records]
    assert cells.count(("full", None, 16)) == cells.count(("full", None, 32)) == 1
    assert ("h2o", 12, 16) in cells and ("h2o", 16, 16) not in cells and ("h2o", 16, 32) in cells
    frame = tables.frame(records)
    assert {"window", "chunk", "nll", "label"} <= set(frame.columns)
    for _, row in frame.iterrows():
        assert np.exp(np.mean(row.nll)) == pytest.approx(row["value"], rel=1e-4)
    with pytest.raises(ValueError, match="nothing would be compressed"):
        small(weightedkv.perplexity, "h2o", 32, 32, 2, 4)
    with pytest.raises(ValueError, match="even numbers"):
        small(weightedkv.perplexity, "h2o", 16, 33, 2, 4)


PROTOCOLS = (weightedkv.perplexity, weightedkv.perplexity_in_pieces)


@pytest.mark.parametrize("label", ["h2o", "weightedkv", "cam", "tova", "streaming_llm"])
def test_a_shorter_window_is_the_beginning_of_a_longer_one(small: Callable, label: str) -> None:
    sliding, pieces = (small(f, label, 12, [24, 48], 3) for f in PROTOCOLS)
    model, ids = common._loaded("x", None, None), tokens(3, 48, seed=len("code"))
    options = dict(sliding[0].cell.options)
    for record, size in zip(sliding, (24, 48), strict=True):
        alone = kvrepro.perplexity(model, ids[:, :size], label, 12, window=size, stride=size // 2, **options)
        assert record.value.value == pytest.approx(alone.ppl, rel=1e-5)
        assert record.value.extra["nll"] == pytest.approx(alone.nll.mean(dim=(1, 2)).tolist(), rel=1e-4)
        assert (record.cell.params["protocol"], record.cell.params["chunk"]) == (weightedkv.SLIDING, 1)
    whole = kvrepro.perplexity(model, ids, label, 12, window=48, stride=47, **options)
    assert pieces[1].value.value == pytest.approx(whole.ppl, rel=1e-5)
    assert {(r.cell.experiment, r.cell.params["protocol"]) for r in pieces} == {
        ("perplexity_in_pieces", weightedkv.PIECES)
    }


def test_texts_sizes_and_protocols_share_one_reading(monkeypatch: pytest.MonkeyPatch, small: Callable) -> None:
    read = []
    plain = weightedkv.evaluate.perplexity
    monkeypatch.setattr(weightedkv.evaluate, "perplexity", lambda *a, **k: read.append(a[2:4]) or plain(*a, **k))
    for function in PROTOCOLS:
        function(["code", "essays"], ["full", "h2o"], [12, 16], [24, 48], 2, model="smollm2-135m")
    # The full cache is read to each window's end, since a longer one may be beyond the model's context.
    assert read == [("full", None), ("full", None), ("h2o", 12), ("h2o", 16)]


def test_a_text_is_measured_alike_alone_and_beside_others(small: Callable) -> None:
    (alone,) = small(weightedkv.perplexity, "h2o", 12, 48, 2)
    bench = common.Bench("weightedkv", "reading", "smollm2-135m")
    both = weightedkv.Reading(bench, ("essays", "code"), 2, 48, batch_size=3, starts_of=48).nll(alone.cell, 48)
    assert both[:, -24:].mean(1).tolist() == pytest.approx(alone.value.extra["nll"], rel=1e-5)


def test_methods_read_to_different_lengths_read_the_same_windows(small: Callable) -> None:
    whole = small(weightedkv.perplexity, "h2o", 12, [32, 48], 2)
    (brief,) = small(weightedkv.perplexity, "h2o", 12, 32, 2, starts_of=48)
    assert brief.cell == whole[0].cell and brief.value == whole[0].value
    (alone,) = small(weightedkv.perplexity, "h2o", 12, 32, 2)
    assert alone.cell != brief.cell  # windows of 32 tokens begin elsewhere
    with pytest.raises(ValueError, match="starts_of"):
        small(weightedkv.perplexity, "h2o", 12, 48, 2, starts_of=32)


def test_texts_that_are_not_here_are_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, embedded: tuple
) -> None:
    monkeypatch.delenv("KVREPRO_DATA_DIR", raising=False)
    found, missing = weightedkv.readable(["books", "essays"])
    assert found == ["essays"] and "KVREPRO_DATA_DIR" in missing["books"]
    monkeypatch.setenv("KVREPRO_DATA_DIR", str(tmp_path))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("word " * 400, encoding="utf-8")
    assert weightedkv.readable("books") == (["books"], {})


def test_full_cache_beyond_the_models_positions_is_skipped_with_a_reason(small: Callable) -> None:
    records = small(weightedkv.perplexity, ["full", "streaming_llm"], 16, 1024, 1, 256)
    assert [r.status for r in records] == ["skipped", "ok"]
    assert "512 positions" in records[0].reason
    assert list(tables.problems(records).status) == ["skipped"] and len(tables.frame(records)) == 1


def test_merge_or_evict_scores_the_same_tokens(small: Callable) -> None:
    records = small(weightedkv.merge_or_evict, 16, 130, 2, 8)
    full, merged, evicted = (np.array(r.value.extra["nll"]) for r in records)
    assert full.shape == merged.shape == (2, 129 // weightedkv.BIN)
    assert not np.allclose(merged, evicted)
    with pytest.raises(ValueError, match="holds all"):
        small(weightedkv.merge_or_evict, 64, 64, 2, 8)


@pytest.mark.parametrize("merge", [True, False])
def test_one_merge_equals_attention_written_out(merge: bool) -> None:
    step, length, d = 12, 20, 4
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, length, d, generator=generator, dtype=torch.float64) for _ in range(3))
    method = methods.create("weightedkv", sinks=0, recent=1, positions="original", merge=merge)
    got = weightedkv._merged_cosine(LayerCapture(q, k, v, q, d**-0.5), method, step)

    mean = torch.zeros(step, dtype=torch.float64)
    for t in range(step):
        mean[: t + 1] += torch.softmax(k[0, 0, : t + 1] @ q[0, 0, t] / d**0.5, 0)
    mean /= torch.arange(step, 0, -1)
    gone = int(mean[:-1].argmin())
    values = v[0, 0].clone()
    if merge:
        a, b = mean[gone], mean[gone + 1]
        values[gone + 1] = (a * values[gone] + b * values[gone + 1]) / (a + b)
    rest = [i for i in range(length) if i != gone]
    for t in range(step, length):
        seen = [i for i in rest if i <= t]
        whole = torch.softmax(k[0, 0, : t + 1] @ q[0, 0, t] / d**0.5, 0) @ v[0, 0, : t + 1]
        less = torch.softmax(k[0, 0, seen] @ q[0, 0, t] / d**0.5, 0) @ values[seen]
        assert float(got[t - step]) == pytest.approx(float(cosine_similarity(whole, less, dim=0)), abs=1e-5)


def test_one_merge_on_a_small_model(small: Callable) -> None:
    records = small(weightedkv.one_merge, 2, 24, 64)
    assert all(r.value.n == 2 and len(r.value.extra["distance"]) == 2 for r in records)
    assert all(len(r.value.extra["layers"]) == 3 and r.value.value < 1 for r in records)


SAME_BYTES = ["h2o", "snapkv(window=4)", "pyramidkv(window=4)", "weightedkv", "kvmerger", "kvslimmer", "d2o", "cam"]


def test_same_bytes_spends_what_is_allowed_and_no_more(small: Callable) -> None:
    records = small(across.same_bytes, SAME_BYTES, [0.5, 0.75], 64, 16, 2)
    for record in records:
        extra = record.value.extra
        per_slot = extra["nbytes"] / extra["slots"]
        assert extra["nbytes"] <= extra["target"] == int(record.cell.params["share"] * extra["whole"])
        assert extra["target"] - extra["nbytes"] < 2.1 * per_slot, record.cell.method
        assert extra["whole"] == 2 * 3 * 2 * 64 * (8 + 8) * 4  # rows, layers, heads, tokens, key and value, bytes


def test_same_bytes_is_fidelity_at_that_budget(small: Callable) -> None:
    (record,) = small(across.same_bytes, "weightedkv", 0.5, 64, 16, 2)
    model, ids = common._loaded("x", None, None), tokens(2, 80, seed=len("code"))
    found = kvrepro.fidelity(model, ids, "weightedkv", record.value.extra["slots"], context=64, continuation=16)
    assert record.value.value == pytest.approx(float(found.kl.mean()), rel=1e-4)
    assert record.value.extra["nbytes"] == found.nbytes
    with pytest.raises(ValueError, match="between 0 and 1"):
        small(across.same_bytes, "h2o", 1.5, 64, 16, 2)


def test_same_bytes_counts_heads_that_fell_back(small: Callable) -> None:
    fitted, evicted = small(across.same_bytes, ["attention_matching", "h2o"], 0.5, 64, 16, 2)
    model, ids = common._loaded("x", None, None), tokens(2, 80, seed=len("code"))
    slots = fitted.value.extra["slots"]
    found = kvrepro.fidelity(model, ids, "attention_matching", slots, context=64, continuation=16)
    assert fitted.value.extra["fallbacks"] == found.fallbacks.tolist()
    assert fitted.value.extra["heads"] == 3 * 2  # layers, KV heads
    assert not {"fallbacks", "heads"} & set(evicted.value.extra)


def test_same_bytes_of_a_method_that_reads_twice(small: Callable) -> None:
    """Whose context is read for it, since a replay has no second reading."""
    method = "attention_matching(queries='repeat')"
    again, once = small(across.same_bytes, [method, "attention_matching"], 0.5, 64, 16, 2)
    model, ids = common._loaded("x", None, None), tokens(2, 80, seed=len("code"))
    slots = again.value.extra["slots"]
    assert slots == once.value.extra["slots"] and again.value.value != once.value.value
    found = kvrepro.fidelity(model, ids, "attention_matching", slots, context=64, continuation=16, queries="repeat")
    assert again.value.value == pytest.approx(float(found.kl.mean()), rel=1e-4)
    assert again.value.extra["nbytes"] == found.nbytes <= again.value.extra["target"]


def test_reading_is_timed_in_turns_with_the_full_cache(small: Callable) -> None:
    records = small(across.reading_times, {"h2o": 16, "weightedkv(merge=False)": 24}, 48, 2, 3)
    found = [(r.cell.params["label"], r.cell.budget) for r in records]
    assert found == [("h2o", 16), ("weightedkv(merge=False)", 24)]
    for record in records:
        assert record.cell.params["hardware"]
        shares = np.divide(record.value.extra["times"], record.value.extra["times_full"])
        assert len(shares) == record.value.n == 3
        assert record.value.value == pytest.approx(np.median(shares), rel=1e-4)


def test_pareto_front_by_comparing_all_pairs() -> None:
    generator = np.random.default_rng(0)
    costs = generator.integers(1, 5, (60, 3)).astype(float)
    expected = [not any(all(b <= a) and any(b < a) for j, b in enumerate(costs) if j != i) for i, a in enumerate(costs)]
    assert across.pareto_front(costs).tolist() == expected
    # Within the slack two costs are equal, so that neither beats the other by it.
    assert across.pareto_front(np.array([[1.0, 1.0], [1.04, 1.0]]), 0.05).tolist() == [True, True]
    assert across.pareto_front(np.array([[1.0, 1.0], [1.2, 1.04]]), (0.05, 0.0)).tolist() == [True, False]
    assert across.pareto_front(np.array([[1.0, 1.04], [1.2, 1.0]]), (0.05, 0.05)).tolist() == [True, False]


def test_too_short_a_text_is_an_error_before_anything_runs(monkeypatch: pytest.MonkeyPatch, embedded: tuple) -> None:
    monkeypatch.setattr(common, "_loaded", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="fewer or shorter windows"):
        weightedkv.perplexity("essays", "h2o", 64, 8192, 1000, 32, model="smollm2-135m")


def test_variants_are_read_and_written() -> None:
    variant = common.Variant.parse("kvmerger(sigma=5.0, pivot='random')")
    assert variant.method == "kvmerger" and variant.options == {"sigma": 5.0, "pivot": "random"}
    assert common.Variant.parse(variant.label) == variant and common.Variant.parse("h2o").label == "h2o"
    for wrong in ("h2o(", "h2o(3)", "a.b", "h2o(sinks=x)", "nothing", "h2o(colour=1)", "weightedkv(merge=2)"):
        with pytest.raises(ValueError):
            common.Variant.parse(wrong)
    with pytest.raises(ValueError, match="given twice: h2o"):
        common.parse_variants(["h2o", "tova", "h2o"])
    assert common.as_list("h2o") == ["h2o"] and common.as_list([1, 2]) == [1, 2] and common.as_list(3) == [3]


def test_estimates_are_paired() -> None:
    one = tables.estimate([1.0, 2.0, 3.0])
    assert (one.mean, one.n) == (2.0, 3) and one.error == pytest.approx(1 / 3**0.5)
    assert np.isnan(tables.estimate([1.0]).error) and tables.estimate([1.0]).sign == 0
    difference = tables.paired([11.0, 2.1, 7.05], [10.0, 1.0, 6.0])
    assert difference.mean == pytest.approx(1.05) and difference.error < 0.03 and difference.sign == 1
    with pytest.raises(ValueError, match="same things"):
        tables.paired([1.0], [1.0, 2.0])


def test_numbers_over_seeds() -> None:
    """Two settings, one of them with three seeds."""
    rows = [("a", 0, 1.0, 0.2), ("b", 0, 7.0, None), ("a", 1, 2.0, 0.3), ("a", 2, 6.0, 0.1)]
    found = tables.pd.DataFrame(rows, columns=["label", "seed", "value", "spread"], dtype=object).astype(
        {"value": float}
    )
    a, b = (row for _, row in tables.over_seeds(found, ["label"]).iterrows())
    assert (a.label, a.seeds, a["value"], a.most) == ("a", 3, 3.0, 5.0)
    assert a.sd == pytest.approx(7**0.5) and a.spread == pytest.approx(0.2)
    assert (b.label, b.seeds, b["value"], b.most) == ("b", 1, 7.0, 0.0) and np.isnan([b.sd, b.spread]).all()


def test_compare_finds_each_rows_reference(small: Callable) -> None:
    frame = tables.frame(small(weightedkv.perplexity, ["full", "h2o"], [12, 16], [32, 64], 3, 8))
    compared = tables.compare(frame, "nll", "full", ["data", "window"])
    for _, row in compared.iterrows():
        full = frame[(frame.label == "full") & (frame.window == row.window)].iloc[0]
        assert row.difference == pytest.approx(np.mean(row.nll) - np.mean(full.nll))
    assert tables.compare(frame, "nll", "tova", ["data"]).difference.isna().all()


def test_verdicts_and_published_numbers() -> None:
    assert tables.verdict(0, -1) == "Not decided here"
    assert tables.verdict(-1, -1) == "Reproduced here" and tables.verdict(1, -1) == "Not reproduced here"
    paper = tables.published("WeightedKV", "Table I")
    assert set(paper.source) == {"paper"} and len(paper) == 124
    assert set(tables.published("KVMerger").source) == {"second-hand"}
    with pytest.raises(ValueError, match="WeightedKV: Table I"):
        tables.published("WeightedKV", "Table IX")
    assert set(tables.kvpress_reference().columns) == {"press", "removed", "delta_nll", "kl", "source"}
