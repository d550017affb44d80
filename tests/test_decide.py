"""The deciding chapter: what it says of the published records, and of small stores where other methods win."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from book_project import ROOT

from kvrepro import decide, fingerprint
from kvrepro.book.decide_page import decide_parts
from kvrepro.decide import (
    PURPOSES,
    SINGLE,
    advice,
    beside_evictions,
    beyond,
    costs,
    harmful,
    merging_against_eviction,
    missing,
    rows,
    within,
)
from kvrepro.experiments import across
from kvrepro.ledger import published
from kvrepro.records import Cell, Record, Value
from kvrepro.rules import label

CODE = fingerprint.fingerprint(across.same_bytes, "h2o")
NOISE = np.array([0.0, 0.01, -0.01, 0.02, -0.02, 0.0, 0.01, -0.01])


def record(experiment: str, method: str, extra: dict[str, Any], *, paper: str = "across", **given: Any) -> Record:
    """A record made by hand, of the present code; cell and value fields by name, the rest are parameters."""
    fields = {name: given.pop(name) for name in ("metric", "budget", "model", "data") if name in given}
    value = Value(given.pop("value", 0.0), given.pop("spread", None), given.pop("n", 8), extra)
    cell = Cell(
        **{"metric": "m", "model": "small", "data": "essays", "budget": None, **fields},
        paper=paper,
        experiment=experiment,
        method=method.partition("(")[0],
        model_sha256="0",
        data_sha256=fields.get("data", "essays"),
        params={"label": method, **given},
    )
    about = {"commit": "c" * 40, "dirty": False, "date": "2026-01-01", "device": "CPU", "module": across.__name__}
    about["code"] = CODE
    return Record(cell.key(CODE), cell, value, "ok", "", about)


def divergence(kl: dict[str, float], share: float = 0.25, **given: Any) -> list[Record]:
    """Divergences at one share of the bytes."""
    params = {"share": share, "context": 64, "continuation": 8, "passages": 8, **given}
    return [
        record("same_bytes", name, {"kl": (mean + NOISE * mean).tolist()}, value=mean, spread=0.01 * mean, **params)
        for name, mean in kl.items()
    ]


def needles(loglik: dict[str, float], share: float = 0.25, task: str = "niah_single") -> list[Record]:
    """Log-likelihoods of a needle's answer; below -1 it is not found."""
    return [
        record(
            "ruler",
            name,
            {
                "loglik": (mean + NOISE).tolist(),
                "exact": [mean > -1] * 8,
                "ids": list("abcdefgh"),
                "documents": list("abcdefgh"),
            },
            metric="log-likelihood",
            budget=None if name == "full" else share,
            data=f"ruler/{task}",
            task=task,
            chunk=None,
        )
        for name, mean in loglik.items()
    ]


def timed(read: dict[str, float], token: dict[str, float], length: int = 1024) -> list[Record]:
    """Times of prompts and steps at the shape of a model, a quarter of the slots kept."""
    common = {"paper": "speed", "batch": 1, "spread": 0.001, "n": 3, "model": "shape", "data": "random tokens"}
    reads = [
        record(
            "prefill",
            name,
            {"cache": 4096 if name == "full" else 1024},
            value=seconds,
            length=length,
            budget=None if name == "full" else 0.25,
            chunk=None,
            **common,
        )
        for name, seconds in read.items()
    ]
    slots = {name: length if name == "full" else length // 4 for name in token}
    return reads + [
        record("decode", name, {}, value=ms, slots=slots[name], compile=False, **common) for name, ms in token.items()
    ]


def said(records: list[Record]) -> str:
    """All advice on records."""
    return "\n".join(advice(rows(records), costs(records), records))


class TestRows:
    def test_best_and_runner_up_with_paired_differences(self) -> None:
        (row,) = rows(divergence({"h2o": 0.2, "snapkv": 0.1, "weightedkv": 0.3}))
        assert [s.label for s in row.standings] == ["snapkv", "h2o", "weightedkv"]
        assert row.best.loss.mean == pytest.approx(0.1) and row.runner_up.behind.mean == pytest.approx(0.1)
        assert row.budget == "25 % of the bytes" and row.n == 8
        assert row.best.level and not row.runner_up.level

    def test_draws_of_one_method_are_one_method(self) -> None:
        records = needles({"full": -0.1, "h2o": -0.5, "tova": -0.2, "cam": -3.0})
        (again,) = needles({"cam(seed=1)": -2.0})
        again = replace(again, cell=replace(again.cell, method="cam", options={**records[-1].cell.options, "seed": 1}))
        (row,) = rows([*records, again])
        assert {s.label: round(s.loss.mean, 6) for s in row.standings} == {"tova": 0.1, "h2o": 0.4, "cam": 2.4}

    def test_a_fixed_threshold_stands_at_no_budget(self) -> None:
        records = needles({"full": -0.1, "h2o": -0.5, "tova": -0.2, "cam": -3.0, "kvmerger": -0.3})
        free = replace(records[-1], cell=replace(records[-1].cell, options={"budget_mode": "threshold"}))
        (row,), (without,) = rows(records), rows([*records[:-1], free])
        assert row.of("kvmerger") is not None and without.of("kvmerger") is None

    def test_losses_are_against_the_full_cache(self) -> None:
        (row,) = rows(needles({"full": -0.1, "h2o": -0.5, "tova": -0.2, "cam": -3.0}))
        assert {s.label: round(s.loss.mean, 6) for s in row.standings} == {"tova": 0.1, "h2o": 0.4, "cam": 2.9}
        assert row.full_found == 1.0 and row.of("cam").found == 0.0

    def test_too_few_methods_are_no_row(self) -> None:
        assert rows(divergence({"h2o": 0.2, "snapkv": 0.1})) == []
        assert rows(needles({"h2o": -0.5, "tova": -0.2, "cam": -3.0})) == []  # no full cache to compare with

    def test_a_method_that_lacks_a_part_is_left_out_and_missing(self) -> None:
        whole = [r for text in ("books", "math") for r in self._perplexities(text)]
        found = rows([r for r in whole if not (label(r) == "tova" and r.cell.data == "math")])
        (row,) = found
        assert {s.label for s in row.standings} == {"h2o", "cam", "weightedkv"} and row.n == 16
        assert "tova" in missing(found)[row.purpose.name] and "h2o" not in missing(found)[row.purpose.name]
        assert row.budget == "16 of 64 slots" and row.share == 0.25

    def test_a_method_with_other_samples_is_left_out(self) -> None:
        kl = {"h2o": 0.2, "snapkv": 0.1, "weightedkv": 0.3}
        (few,) = divergence({"attention_matching": 0.01})
        few = replace(few, value=replace(few.value, extra={"kl": [0.01, 0.02]}))
        (row,) = rows([*divergence(kl), few])
        assert [s.label for s in row.standings] == ["snapkv", "h2o", "weightedkv"]

    def test_models_are_not_mixed(self) -> None:
        kl = {"h2o": 0.2, "snapkv": 0.1, "weightedkv": 0.3}
        two = [*divergence(kl), *divergence({k: 1 - v for k, v in kl.items()}, model="large")]
        assert [(row.model, row.best.label) for row in rows(two)] == [("large", "weightedkv"), ("small", "snapkv")]
        assert "With small: " in said(two) and "With large: " in said(two)

    def _perplexities(self, text: str) -> list[Record]:
        nll = {"full": 2.0, "h2o": 2.1, "tova": 2.2, "cam": 2.3, "weightedkv": 2.15}
        return [
            record(
                "perplexity",
                name,
                {"nll": (mean + NOISE).tolist()},
                paper="weightedkv",
                data=text,
                budget=None if name == "full" else 16,
                window=64,
            )
            for name, mean in nll.items()
        ]


def test_methods_with_more_texts_than_most_stay() -> None:
    """Few methods were read on a second text: the row is of the first one, with all of them."""
    kl = {"h2o": 0.01, "snapkv": 0.02, "weightedkv": 0.03, "tova": 0.04, "keydiff": 0.05}
    more = divergence({name: kl[name] + 1 for name in ("h2o", "snapkv")}, data="another text")
    (row,) = rows([*divergence(kl), *more])
    assert [s.label for s in row.standings] == list(kl) and row.n == 8


class TestAdvice:
    KL = {"h2o": 0.01, "snapkv": 0.02, "weightedkv": 0.03, "kvmerger": 0.5}

    def test_the_method_that_stays_best_is_named(self) -> None:
        text = said([*divergence(self.KL, 0.5), *divergence(self.KL, 0.25)])
        assert "take H2O**: the best" in text and "(50, 25 % of the bytes)" in text

    def test_another_method_wins(self) -> None:
        other = {**self.KL, "weightedkv": 0.001}
        assert "take WeightedKV**" in said([*divergence(other, 0.5), *divergence(other, 0.25)])

    def test_no_method_stays_best(self) -> None:
        text = said([*divergence(self.KL, 0.5), *divergence({**self.KL, "snapkv": 0.001}, 0.25)])
        assert "it depends on the budget**: H2O at 50 % of the bytes; SnapKV at 25 % of the bytes" in text

    def test_variants_of_one_method_take_turns(self) -> None:
        variants = {"kvmerger(mass='attention')": 0.002, "kvmerger": 0.001}
        text = said(
            [*divergence({**self.KL, **variants}, 0.5), *divergence({**self.KL, **variants, "kvmerger": 0.004}, 0.25)]
        )
        assert "take KVMerger**; which of its variants is the best depends on the budget: KVMerger at 50 %" in text

    def test_merging_or_evicting(self) -> None:
        assert "**If nothing else decides, evict**" in said(divergence(self.KL))
        assert "**If nothing else decides, merge**" in said(divergence({**self.KL, "weightedkv": 0.001}))
        even = [*divergence(self.KL, 0.5), *divergence({**self.KL, "weightedkv": 0.001}, 0.25)]
        assert "nothing else decides" not in said(even)

    def test_a_variant_is_advised_if_it_is_better_everywhere(self) -> None:
        better = {**self.KL, "kvmerger(mass='attention')": 0.05}
        text = "If you use KVMerger, use `kvmerger(mass='attention')`"
        assert text in said([*divergence(better, 0.5), *divergence(better, 0.25)])
        worse = {**better, "kvmerger(mass='attention')": 0.9}
        assert text not in said([*divergence(better, 0.5), *divergence(worse, 0.25)])

    def test_a_needle_that_the_nearest_method_loses(self) -> None:
        lost = needles({"full": -0.1, "h2o": -3.0, "snapkv": -0.2, "weightedkv": -3.0})
        text = said([*divergence(self.KL), *lost])
        assert "do not choose by the mean divergence" in text and "H2O succeeds in 0 % of the prompts" in text
        variant = {**self.KL, "kvmerger(mass='attention')": 0.001}  # nearer, and never asked for a needle
        assert "H2O succeeds in 0 % of the prompts" in said([*divergence(variant), *lost])
        kept = needles({"full": -0.1, "h2o": -0.1, "snapkv": -0.2, "weightedkv": -3.0})
        assert "do not choose by the mean divergence" not in said([*divergence(self.KL), *kept])
        less_sure = needles({"full": -0.1, "h2o": -0.9, "snapkv": -0.1, "weightedkv": -3.0})  # and yet found
        assert "do not choose by the mean divergence" not in said([*divergence(self.KL), *less_sure])

    def test_what_the_model_cannot_do_gives_no_advice(self) -> None:
        blind = needles({"full": -5.0, "h2o": -6.0, "snapkv": -5.5, "weightedkv": -7.0})
        assert said(blind) == ""
        (unable,) = beyond(blind)
        assert (unable.task, unable.found, unable.n) == ("niah_single", 0.0, 8)
        assert beyond(needles({"full": -0.1})) == []

    def test_the_least_bytes_within_the_tolerance(self) -> None:
        grown = {name: 20 * kl for name, kl in self.KL.items()}
        text = said([*divergence(self.KL, 0.5), *divergence(grown, 0.25)])
        assert "50 % of the bytes are enough" in text
        assert "are enough" not in said(divergence(grown))

    def test_time(self) -> None:
        token = {"full": 10.0, "h2o": 8.0, "snapkv": 9.5, "kvmerger": 11.0}
        text = said(timed({"full": 1.0, "h2o": 1.2, "snapkv": 1.1, "kvmerger": 1.3}, token))
        assert "**If you only read, do not compress for speed**" in text and "by 10 % to 30 %" in text
        assert "with 2 of 3 methods; tokens to write until then: H2O 100, SnapKV 200." in text
        faster = said(timed({"full": 1.0, "h2o": 0.5, "snapkv": 1.1, "kvmerger": 1.3}, {}))
        assert "do not compress for speed" not in faster and "saves time as well" not in faster

    def test_throughput(self) -> None:
        def of(compressed: float) -> list[Record]:
            common = {"paper": "speed", "model": "shape", "length": 64}
            return [
                record("throughput", "full", {}, value=100.0, peer="transformers", **common),
                record("throughput", "weightedkv", {}, value=compressed, budget=0.25, **common),
            ]

        assert "4.0 times as many, a part of which" in said(of(400.0))
        assert said(of(90.0)) == ""


def test_harmful_merges_are_worse_at_every_budget() -> None:
    def of(name: str, removed: float, budget: float) -> Record:
        metric = "avoidable error removed"
        return record("best_merge", name, {}, metric=metric, value=removed, spread=0.01, n=16, budget=budget)

    found = [of("d2o", -0.5, 0.5), of("d2o", -0.2, 0.25), of("cam", -0.5, 0.5), of("cam", 0.3, 0.25)]
    assert list(harmful(found)) == ["d2o"]


def test_costs_take_the_longest_prompt_that_enough_methods_read() -> None:
    read = {"full": 1.0, "h2o": 1.2, "snapkv": 1.1, "kvmerger": 1.3}
    token = {"full": 10.0, "h2o": 8.0}
    few = timed({"full": 9.0, "h2o": 9.5}, {}, length=4096)
    (found,) = costs([*timed(read, token), *few])
    assert (found.length, found.share, found.full.token.mean) == (1024, 0.25, 10.0)
    assert [cost.label for cost in found.methods] == ["snapkv", "h2o", "kvmerger"]
    h2o = found.methods[1]
    assert h2o.more.mean == pytest.approx(0.2) and found.saved_after(h2o) == pytest.approx(100)
    assert found.saved_after(replace(h2o, token=None)) is None
    assert found.saved_after(replace(h2o, more=found.full.more)) == 0.0  # reading is not shown to take longer


def needle_map(loglik: dict[tuple[str, str], dict[str, float]], noise: dict[str, float]) -> list[Record]:
    """Log-likelihoods of needles by length and depth; a method's noise is so many times :data:`NOISE`."""
    return [
        record(
            "needle",
            name,
            {"loglik": (mean + noise.get(name, 1.0) * NOISE).tolist()},
            paper="kvmerger",
            budget=None if name == "full" else 0.5,
            question="seen",
            length=length,
            depth=depth,
        )
        for (length, depth), means in loglik.items()
        for name, mean in means.items()
    ]


def test_a_method_stands_beside_the_best_eviction_of_each_part() -> None:
    """By hand: tova is the best eviction at the first and third place of the needle, h2o at the second; snapkv never.

    The losses vary as NOISE does times what a method's noise differs from the full cache's; tova's lead at the third
    place is less than that.
    """
    loglik = {
        ("1024", "0.1"): {"full": -0.2, "h2o": -1.0, "tova": -0.1, "snapkv": -1.5, "attention_matching": -0.3},
        ("2048", "0.1"): {"full": -0.2, "h2o": -0.4, "tova": -2.0, "snapkv": -0.5, "attention_matching": -0.2},
        ("2048", "0.9"): {"full": -0.2, "h2o": -0.9, "tova": -0.299, "snapkv": -0.5, "attention_matching": -0.3},
    }
    made = needle_map(loglik, {"attention_matching": 3.0, "tova": 2.0})
    (row,) = rows(made, SINGLE)
    assert len(row.standings) == 4
    found = beside_evictions(row, "attention_matching")
    assert [(x.part, x.rival.label) for x in found] == [
        ("1024, 0.1", "tova"),
        ("2048, 0.1", "h2o"),
        ("2048, 0.9", "tova"),
    ]
    assert [x.gap.mean for x in found] == [pytest.approx(x) for x in (0.2, -0.2, 0.001)]
    assert [x.gap.sign() for x in found] == [1, -1, 0]
    half = 2.36 * NOISE.std(ddof=1) / 8**0.5  # Student's quantile for 7 degrees of freedom
    assert found[0].gap.high - found[0].gap.mean == pytest.approx(half)  # the noises differ by one
    assert (found[0].theirs.mean, found[0].theirs.sign()) == (pytest.approx(-0.1), -1)
    assert beside_evictions(row, "kvmerger") == []
    text = decide_parts(made).texts["single"]
    assert "In 2 of 3 comparisons an eviction has the lower mean loss, by 0.2 nats" in text
    assert "in 1 it is shown to be better" in text and "about 0 would show that by chance" in text
    assert "That eviction has a loss below 0 (\N{MINUS SIGN}0.1 [" in text
    worse = {place: {**means, "full": 0.5} for place, means in loglik.items()}
    assert "below 0" not in decide_parts(needle_map(worse, {})).texts["single"]
    without = {place: {k: v for k, v in means.items() if k != "attention_matching"} for place, means in loglik.items()}
    assert "o published record" in decide_parts(needle_map(without, {})).texts["single"]


def test_tasks_beyond_the_model_are_left_out() -> None:
    able = needles({"full": -0.1, "h2o": -2.0, "tova": -0.2, "snapkv": -0.3, "attention_matching": -0.1})
    unable = needles(
        {"full": -3.0, "h2o": -3.5, "tova": -2.5, "snapkv": -4.0, "attention_matching": -3.0}, task="niah_multivalue"
    )
    assert beyond([*able, *unable]) and within([*able, *unable]) == able
    assert "In 0 of 1 comparisons" in decide_parts([*able, *unable]).texts["single"]


class TestChapter:
    def test_it_includes_what_is_made_and_nothing_else(self) -> None:
        chapter = (ROOT / "book" / "decide.md").read_text(encoding="utf-8")
        included = re.findall(r"\{include\} _generated/decide/(\w+)\.md", chapter)
        assert sorted(included) == sorted(decide_parts([]).texts)
        assert not re.search(r"\d+(\.\d+)? (%|nats|GiB|ms|tokens)", chapter)  # numbers come from records

    def test_without_records_it_says_so(self, tmp_path: Path) -> None:
        parts = decide_parts([])
        assert not parts.figures
        assert "Nothing is published" in parts.texts["state"]
        assert all("o published record" in parts.texts[name] for name in ("advice", "budget", "merging", "costs"))
        parts.write(tmp_path)
        assert {path.stem for path in tmp_path.iterdir()} == set(parts.texts)

    def test_another_method_wins(self) -> None:
        kl = {"h2o": 0.02, "snapkv": 0.03, "attention_matching": 0.001}
        parts = decide_parts(divergence(kl, 0.5), with_page=["across/same_bytes"])
        (line,) = [line for line in parts.texts["budget"].splitlines() if line.startswith("| 50 %")]
        assert "**Attention Matching**" in line and "published/across/same_bytes.ipynb" in line and "| yes |" in line
        assert "Merging helps in 1 of 1" in parts.texts["merging"]
        assert "attention_matching" not in parts.texts["missing"].splitlines()[2]

    def test_the_published_records(self) -> None:
        records = published()
        found = rows(records)
        parts = decide_parts(records)
        assert {row.purpose for row in found} == set(PURPOSES)
        for row in found:
            assert row.best.loss.mean == min(s.loss.mean for s in row.standings)
            assert f"**{row.best.title}**" in parts.texts["budget"]
        same = [r for r in records if r.cell.experiment == "same_bytes" and r.cell.seed == 0]
        same = [r for r in same if r.cell.data == "essays"]  # other texts were read with few methods
        quarter = {label(r): r.value.value for r in same if r.cell.params["share"] == 0.25}
        (row,) = [row for row in found if row.purpose is decide.FIDELITY and row.share == 0.25]
        assert row.best.label == min(quarter, key=lambda name: quarter[name])
        assert row.best.loss.mean == pytest.approx(quarter[row.best.label], rel=1e-4)
        outcomes = [o[1] for row in found if row.able and (o := merging_against_eviction(row))]
        assert f"helps in {outcomes.count(-1)} of {len(outcomes)} comparisons" in parts.texts["merging"]
        assert "If it is about" in parts.texts["advice"]
        (drawing,) = parts.figures.values()
        assert drawing.startswith("<?xml") and "KL(full" in drawing
        for name, text in parts.texts.items():
            assert "nan" not in re.findall(r"\w+", text), name
            for address in re.findall(r"\]\(results/([^)]+)\.ipynb\)", text):
                assert (ROOT / "notebooks" / f"{address}.ipynb").is_file()
        assert decide_parts(records).figures == parts.figures  # the same bytes every time
