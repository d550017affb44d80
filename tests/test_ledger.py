"""The ledger: its file of claims, its rules on records made by hand, what is stale, its page and its command."""

from __future__ import annotations

import json
import math
import random
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import yaml
from book_project import ROOT, make_project

from kvrepro import fingerprint, plots, rules
from kvrepro.book import Project
from kvrepro.book.ledger_page import ledger_page
from kvrepro.book.pages import published_table, variants_table
from kvrepro.book.parameters import check, defaults, parse
from kvrepro.cli import cli, main
from kvrepro.experiments import across, speed, task_runtimes
from kvrepro.experiments.common import parse_variants
from kvrepro.ledger import Claim, Entry, current, judge, ledger, newest, published, read_claims, select
from kvrepro.records import Cell, Record, Value
from kvrepro.rules import CONTRADICTED, NOT_REPRODUCED, NOT_RUN, REPRODUCED, RULES, SAME, VERDICTS, Missing
from kvrepro.tasks import longbench

CODE = fingerprint.fingerprint(across.same_bytes, "h2o")
CLAIMS = read_claims()


def record(
    label: str = "h2o",
    value: float | None = None,
    spread: float | None = None,
    *,
    n: int = 4,
    extra: dict[str, Any] | None = None,
    budget: int | float | None = 64,
    model: str = "small",
    data: str = "essays",
    date: str = "2026-01-01",
    stale: bool = False,
    **params: Any,
) -> Record:
    """A record made by hand, of the present code unless it is to be stale."""
    cell = Cell(
        paper="p",
        experiment="e",
        metric="m",
        method="h2o",
        model=model,
        model_sha256=model,
        data=data,
        data_sha256=data,
        budget=budget,
        params={"label": label, **params},
    )
    about = {"commit": "c" * 40, "dirty": False, "date": date, "device": "CPU", "module": across.__name__}
    about["code"] = "0" * 64 if stale else CODE
    return Record(cell.key(about["code"]), cell, Value(value, spread, n, extra or {}), "ok", "", about)


def two(ours: list[float], theirs: list[float], name: str = "x", **params: Any) -> list[Record]:
    """Records of methods ``a`` and ``b`` with samples."""
    return [record("a", extra={name: ours}, **params), record("b", extra={name: theirs}, **params)]


def verdict(rule: str, records: list[Record], effect: float | None = None, **given: Any) -> str:
    """What a rule says."""
    return RULES[rule].judge(records, effect, **given).verdict


def claim(**changes: Any) -> Claim:
    """A claim judged by the difference of ``a`` and ``b``."""
    rule = {"name": "difference", "where": {"experiment": "e"}, "of": "a", "against": ["b"], "samples": "x"}
    fields = {"id": "c", "paper": "WeightedKV", "where": "Table I", "source": "paper", "text": "A is lower."}
    return Claim(**{**fields, "command": "kvrepro methods", "rule": rule, **changes})


class TestFile:
    def test_claims_are_many_and_apart(self) -> None:
        assert len(CLAIMS) >= 25
        assert len({c.id for c in CLAIMS}) == len(CLAIMS)
        assert {c.paper for c in CLAIMS} == {"WeightedKV", "KVMerger", "KVSlimmer"}

    def test_no_verdict_is_typed(self) -> None:
        assert not {"verdict", "ours"} & set(Claim.__dataclass_fields__)

    @pytest.mark.parametrize("one", CLAIMS, ids=lambda c: c.id)
    def test_every_claim_is_whole(self, one: Claim) -> None:
        assert one.text.endswith(".") and one.where
        assert one.rule or one.not_run
        assert all(math.isfinite(value) for value in one.paper_values)

    def test_commands_and_pages_exist(self) -> None:
        notebooks = {notebook.name: notebook for notebook in Project(ROOT).notebooks()}
        for one in CLAIMS:
            assert not one.page or one.page in notebooks, one.id
            words = shlex.split(one.command)
            if words[:2] == ["kvrepro", "run"]:
                name, rest = words[2], [word for word in words[3:] if word not in ("--profile", "paper", "gpu")]
                check(name, defaults(notebooks[name].source), parse(rest))
            elif words[:1] == ["kvrepro"]:
                command: click.Command = cli
                context = click.Context(cli)
                while isinstance(command, click.Group):
                    words = words[1:]
                    command = command.get_command(context, words[0])
                    assert command is not None, one.id
                command.make_context(words[0], words[1:])
            else:
                assert words in ([], ["make", "test"]), one.id

    def test_paper_numbers_are_looked_up(self) -> None:
        one = next(c for c in CLAIMS if c.id == "weightedkv-256-h2o")
        assert one.paper_values == [7.49, 7.85]
        assert one.paper_effect == pytest.approx(100 * (7.49 / 7.85 - 1))
        slimmer = next(c for c in CLAIMS if c.id == "kvslimmer-longbench")
        assert slimmer.paper_effect == pytest.approx(0.92)
        assert next(c for c in CLAIMS if c.id == "kvslimmer-latency").paper_effect == -28

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text": None}, "claim c: text: missing"),
            ({"verdict": "reproduced"}, "claim c: verdict: unknown field"),
            ({"paper": "H2O"}, "claim c: paper: 'H2O' is none of WeightedKV, KVMerger, KVSlimmer"),
            ({"source": "hearsay"}, "claim c: source"),
            ({"rule": None}, "claim c: rule: missing, and no not_run"),
            ({"command": None}, "claim c: command: missing, and no not_run"),
            ({"rule": {"name": "best"}}, "claim c: rule.name: 'best' is no rule; there are difference"),
            ({"rule": {"name": "exact"}}, "claim c: rule: exact needs limit"),
            ({"rule": {"name": "exact", "limit": 1, "size": 2}}, "claim c: rule: exact does not take size"),
            ({"effect": "percent"}, "claim c: numbers: an effect compares two"),
            ({"numbers": [{"method": "H2O", "budget": 3}]}, "c: numbers: 0 rows"),
            ({"numbers": [{"slots": 3}]}, "c: numbers: no column slots"),
        ],
    )
    def test_errors_name_entry_and_field(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        entry = {"id": "c", "paper": "WeightedKV", "where": "Table I", "source": "paper", "text": "A."}
        entry |= {"command": "make test", "rule": {"name": "exact", "limit": 1}}
        entry = {name: value for name, value in {**entry, **changes}.items() if value is not None}
        path = tmp_path / "claims.yml"
        path.write_text(yaml.safe_dump([entry]), encoding="utf-8")
        with pytest.raises(ValueError, match=r".") as caught:
            read_claims(path)
        assert message in str(caught.value)

    def test_an_id_is_used_once(self, tmp_path: Path) -> None:
        entry = {"id": "c", "paper": "KVMerger", "where": "x", "source": "paper", "text": "A.", "not_run": "no"}
        (tmp_path / "c.yml").write_text(yaml.safe_dump([entry, entry]), encoding="utf-8")
        with pytest.raises(ValueError, match="claim c: id: used twice"):
            read_claims(tmp_path / "c.yml")


class TestIntervals:
    def test_mean_and_interval(self) -> None:
        # samples 1, 2, 3: standard deviation 1, standard error 1/sqrt(3); t(2) = 4.30
        found = rules.interval("x", [1, 2, 3])
        assert found.mean == 2 and found.low == pytest.approx(2 - 4.30 / math.sqrt(3))
        assert found.sign() == 0 and rules.interval("x", [10, 11, 12]).sign() == 1
        assert rules.interval("x", [5]).sign() == 0  # one sample has no interval

    def test_quantiles(self) -> None:
        assert [rules.quantile(n) for n in (2, 3, 16, 31, 32, 1000)] == [12.71, 4.30, 2.13, 2.04, 2.0, 2.0]

    def test_correlation(self) -> None:
        # r of (1, 2, 3, 4) and (1, 2, 3, 5): 6.5 / sqrt(5 * 8.75)
        found = rules.correlation("x", np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 3, 5]))
        assert found.mean == pytest.approx(6.5 / math.sqrt(5 * 8.75))
        assert found.low == pytest.approx(math.tanh(math.atanh(found.mean) - 2))

    def test_text(self) -> None:
        assert str(rules.Comparison("x", -0.5, -0.75, -0.25, 4, "%")) == "−0.5 [−0.75, −0.25] %"
        assert str(rules.Comparison("x", 2.0, None, None, 1)) == "2"


class TestRules:
    """Differences with samples 1 ± 0.1 are beyond their intervals, those that change sign are not."""

    PLUS, MINUS, ZERO = [1.0, 1.1, 0.9, 1.0], [-1.0, -1.1, -0.9, -1.0], [1.0, -1.0, 1.0, -1.0]
    NONE = [0.0, 0.0, 0.0, 0.0]

    @pytest.mark.parametrize(
        ("samples", "effect", "expected"),
        [
            (MINUS, None, REPRODUCED),
            (MINUS, -1.9, REPRODUCED),  # within a factor of 2 of our −1
            (MINUS, -2.1, SAME),
            (MINUS, 1.0, SAME),  # the claim is "lower": the paper's number must be, too, to count
            (ZERO, None, NOT_REPRODUCED),
            (PLUS, None, CONTRADICTED),
        ],
    )
    def test_difference(self, samples: list[float], effect: float | None, expected: str) -> None:
        given = {"of": "a", "against": ["b"], "samples": "x"}
        assert verdict("difference", two(samples, self.NONE), effect, **given) == expected
        turned = None if effect is None else -effect
        assert verdict("difference", two(self.NONE, samples), turned, **given, direction="higher") == expected

    def test_an_infinite_factor_asks_for_no_size(self) -> None:
        given = {"of": "a", "against": ["b"], "samples": "x", "factor": math.inf}
        assert verdict("difference", two(self.MINUS, self.NONE), 2.08, **given) == REPRODUCED

    def test_difference_is_of_the_same_things(self) -> None:
        given = {"of": "a", "against": ["b"], "samples": "x"}
        a, b = two(self.MINUS, self.NONE)
        for other in (record("b", extra={"x": self.NONE}, data="code"), record("b", extra={"x": self.NONE}, size=2)):
            with pytest.raises(Missing, match="no records of a and b"):
                verdict("difference", [a, other], **given)
        full = record("b", extra={"x": self.NONE}, budget=None)  # the full cache has no budget
        assert verdict("difference", [a, full], **given) == REPRODUCED
        with pytest.raises(Missing, match="has no y"):
            verdict("difference", [a, b], of="a", against=["b"], samples="y")

    def test_difference_in_per_cent_apart_and_averaged(self) -> None:
        records = [*two([-0.1, -0.1], [0.0, 0.0], size=1), *two([-0.3, -0.3], [0.0, 0.0], size=2)]
        given = {"of": "a", "against": ["b"], "samples": "x", "scale": "percent"}
        pooled = RULES["difference"].judge(records, None, **given).comparisons
        assert [(c.n, round(c.mean, 6)) for c in pooled] == [(4, round(100 * math.expm1(-0.2), 6))]
        apart = RULES["difference"].judge(records, None, **given, each="size").comparisons
        assert [c.name for c in apart] == ["against b, size 1", "against b, size 2"]
        assert RULES["difference"].judge(records, None, **given, average=True).comparisons[0].n == 2

    def test_every_rival_counts(self) -> None:
        given = {"of": "a", "against": ["b", "c"], "samples": "x"}
        for third, expected in ((self.PLUS, REPRODUCED), (self.ZERO, NOT_REPRODUCED), (self.MINUS, CONTRADICTED)):
            records = [*two(self.NONE, self.PLUS), record("c", extra={"x": third})]
            assert verdict("difference", records, **given) == expected

    def test_draws_count_with_their_mean(self) -> None:
        """Of one method with two seeds, whether the seed is the cell's or the method's option."""

        def drawn(name: str, x: list[float], seed: int, option: int, **extra: Any) -> Record:
            made = record(name, float(np.mean(x)), 0.5, extra={"x": x, **extra})
            cell = replace(made.cell, seed=seed, options={"k": 1, "seed": option})
            return replace(made, cell=cell, key=f"{seed}{option}")

        a = record("a", extra={"x": self.NONE})
        first = drawn("b(k=1)", [1.0, 1.1], 0, 0, ids=["7", "8"], ragged=[[1], [1, 2]])
        own, option = drawn("b(k=1)", [3.0, 3.1], 1, 1), drawn("b(k=1, seed=2)", [5.0, 5.1], 0, 2)
        groups = list(rules.over_draws([option, a, own, first]).values())
        assert groups == [[first, own, option], [a]]
        mean = rules.mean_draw(groups[0])
        assert mean.cell == first.cell and mean.value.extra["x"] == pytest.approx([3.0, 3.1])
        assert mean.value.value == pytest.approx(3.05) and mean.value.spread == 0.5
        assert (mean.value.extra["ids"], mean.value.extra["ragged"]) == (["7", "8"], [[1], [1, 2]])
        assert rules.mean_draw([a]) is a
        only = drawn("b(seed=1)", [0.0], 0, 1)  # of other options, though they have one name
        assert len(rules.over_draws([first, only, record("b", extra={"x": [0.0]})])) == 3

    def test_a_verdict_is_of_the_mean_over_seeds(self) -> None:
        """Neither draw alone decides; all records and their number are told."""
        a, b = two(self.NONE, [4.0, -4.0, 4.0, 4.0])
        turned = record("b", extra={"x": [-2.0, 6.1, -2.0, -1.9]})
        turned = replace(turned, cell=replace(turned.cell, seed=1), key="turned")
        assert judge(claim(), [a, b]).verdict == NOT_REPRODUCED
        found = judge(claim(), [a, b, turned])
        assert found.verdict == REPRODUCED  # the means are 1, 1.05, 1 and 1.05
        assert found.judged.comparisons[0].mean == pytest.approx(-1.025)
        assert found.judged.records == [a, b, turned] and found.judged.note == "b: mean over 2 seeds"
        other = [replace(r, cell=replace(r.cell, data_sha256="more"), key=r.key + "more") for r in (a, b)]
        assert judge(claim(), [a, b, turned, *other]).judged.note == "b: mean over 1 or 2 seeds"

    @pytest.mark.parametrize(("first", "expected"), [(MINUS, REPRODUCED), (ZERO, NOT_REPRODUCED), (PLUS, CONTRADICTED)])
    def test_larger_at(self, first: list[float], expected: str) -> None:
        records = [*two(first, self.NONE, budget=8), *two(self.NONE, self.NONE, budget=16)]
        given = {"of": "a", "against": ["b"], "samples": "x", "parameter": "budget", "first": 8, "second": 16}
        assert verdict("larger_at", records, **given) == expected
        with pytest.raises(Missing):
            verdict("larger_at", records[:2], **given)

    @pytest.mark.parametrize(
        ("lost", "expected"), [(0.01, REPRODUCED), (0.05, NOT_REPRODUCED), (0.2, CONTRADICTED), (-0.3, REPRODUCED)]
    )
    def test_holds_at(self, lost: float, expected: str) -> None:
        long = [2.0 + lost, 3.02 + lost, 2.5 + lost, 2.8 + lost]
        short = [2.01, 3.0, 2.51, 2.8]
        records = [record("a", extra={"x": x}, window=w) for x, w in ((long, 16), (short, 4))]
        given = {"of": "a", "parameter": "window", "first": 16, "second": 4, "samples": "x", "margin": 5.0}
        judged = RULES["holds_at"].judge(records, None, **given)
        assert judged.verdict == expected and len(judged.records) == 2
        assert judged.comparisons[0].mean == pytest.approx(100 * math.expm1(lost))
        with pytest.raises(Missing, match="no records of a at window 16 and 4"):
            verdict("holds_at", [records[0], record("a", extra={"x": short}, window=4, data="code")], **given)

    @pytest.mark.parametrize(
        ("ours", "spread", "effect", "expected"),
        [
            (70.0, 1.0, None, REPRODUCED),  # −30 %
            (70.0, 1.0, -28.0, REPRODUCED),
            (70.0, 1.0, -10.0, SAME),
            (70.0, None, -28.0, SAME),  # measured once
            (99.0, 5.0, None, NOT_REPRODUCED),
            (130.0, None, None, NOT_REPRODUCED),
            (130.0, 1.0, None, CONTRADICTED),
        ],
    )
    def test_change(self, ours: float, spread: float | None, effect: float | None, expected: str) -> None:
        records = [record("a", ours, spread, length=1), record("b", 100.0, spread, length=1)]
        assert verdict("change", records, effect, of="a", against="b", measure="value") == expected

    @pytest.mark.parametrize(
        ("ratios", "expected"),
        [
            ((30.0, 60.0), REPRODUCED),
            ((30.0, 96.0), NOT_REPRODUCED),  # a standard error of 1, three prompts: within 4.3
            ((30.0, 110.0), CONTRADICTED),  # on every task
        ],
    )
    def test_every_task(self, ratios: tuple[float, float], expected: str) -> None:
        records = [record("a / b", value, 1.0, n=3, task=task) for value, task in zip(ratios, "xy", strict=True)]
        judged = RULES["every_task"].judge(records, None, tasks=["x", "y"])
        assert judged.verdict == expected and len(judged.records) == 2
        assert [c.name for c in judged.comparisons] == ["x", "y"]
        assert judged.comparisons[0].mean == -70 and judged.comparisons[0].high == pytest.approx(-70 + 4.30)
        once = [record("a / b", value, None, n=1, task=task) for value, task in zip(ratios, "xy", strict=True)]
        assert verdict("every_task", once, tasks=["x", "y"]) == (SAME if ratios[1] < 100 else NOT_REPRODUCED)
        with pytest.raises(Missing, match="no records of z"):
            verdict("every_task", records, tasks=["x", "y", "z"])

    @pytest.mark.parametrize(("ours", "expected"), [(99.0, NOT_REPRODUCED), (97.0, REPRODUCED), (103.0, CONTRADICTED)])
    def test_a_change_below_the_least_counts_as_none(self, ours: float, expected: str) -> None:
        records = [record("a", ours, 0.01, length=1), record("b", 100.0, 0.01, length=1)]
        assert verdict("change", records, of="a", against="b", measure="value", least=2.0) == expected
        records += [record("a", 130.0, 0.01, length=2), record("b", 100.0, 0.01, length=2)]
        assert verdict("change", records, of="a", against="b", measure="value", least=2.0) == CONTRADICTED

    def test_change_of_bytes(self) -> None:
        records = [record(name, extra={"peak": p, "weights": 80}, length=1) for name, p in (("a", 10), ("b", 60))]
        given = {"of": "a", "against": "b", "measure": "peak", "exact": True}
        assert RULES["change"].judge(records, None, **given).comparisons[0].mean == pytest.approx(100 * (10 / 60 - 1))
        whole = RULES["change"].judge(records, -30.0, **given, plus="weights")
        assert whole.comparisons[0].mean == pytest.approx(100 * (90 / 140 - 1)) and whole.verdict == REPRODUCED
        assert str(whole.comparisons[0]) == "−35.7 %"

    def test_within(self) -> None:
        for value, expected in ((5.0, REPRODUCED), (0.1, NOT_REPRODUCED), (-5.0, CONTRADICTED)):
            assert verdict("within", [record(value=value, spread=0.1)]) == expected
        # [samples, layers]: means over layers differ by 1, 1.2, 0.8, 1
        keys = [[2.0, 4.0], [2.2, 4.2], [1.8, 3.8], [2.0, 4.0]]
        records = [record(extra={"keys": keys, "values": [[2.0, 2.0]] * 4})]
        assert verdict("within", records, of="keys", against=["values"]) == REPRODUCED
        assert verdict("within", records, of="keys", against=["values"], direction="lower") == CONTRADICTED
        # the last entries, and ratios: 4/2, 4.2/2.2 … exceed 1
        assert verdict("within", records, of="keys.-1", against=["values.0"]) == REPRODUCED
        assert verdict("within", records, of="keys.1/keys.0", against=["values.1/values.0"]) == REPRODUCED
        with pytest.raises(Missing):
            verdict("within", [])

    @pytest.mark.parametrize(
        ("level", "chance", "expected"),
        [
            (0.95, 0.1, REPRODUCED),
            (0.5, 0.1, SAME),
            (0.5, 0.6, NOT_REPRODUCED),  # no more than chance gives
            (0.0, -0.5, NOT_REPRODUCED),
            (-0.5, -0.9, CONTRADICTED),
        ],
    )
    def test_above(self, level: float, chance: float, expected: str) -> None:
        jitter = [-0.01, 0.01, -0.01, 0.01]
        extra = {"x": [[level + j] for j in jitter], "chance": [[chance + j / 2] for j in jitter]}
        given = {"paths": ["x.0"], "limit": 0.9, "floors": ["chance.0"], "names": ["it"]}
        assert verdict("above", [record(extra=extra)], **given) == expected

    @pytest.mark.parametrize(
        ("second", "expected"),
        [
            (lambda i: i, REPRODUCED),
            (lambda i: i + 6 * (i % 2), SAME),  # r = 0.86
            (lambda i: i % 2, NOT_REPRODUCED),
            (lambda i: -i, CONTRADICTED),
        ],
    )
    def test_heads_agree_and_alike(self, second: Any, expected: str) -> None:
        a, b = [float(i) for i in range(20)], [float(second(i)) for i in range(20)]
        heads = [[list(pair) for pair in zip(a, b, strict=True)]] * 2  # [samples, heads, 2]
        found = verdict("heads_agree", [record(extra={"x": heads})], path="x", columns=[[0, 1, 1]], limit=0.9)
        assert found == expected
        shift = sum(a) / 20 - sum(b) / 20  # so that the texts' means agree and differ less than layers
        texts = [record(extra={"x": [a]}), record(extra={"x": [[y + shift for y in b]]}, data="code")]
        assert verdict("alike", texts, path="x", limit=0.9) == expected

    def test_alike_contradicted_when_texts_differ_more_than_layers(self) -> None:
        a = [float(i) for i in range(20)]
        texts = [record(extra={"x": [a]}), record(extra={"x": [[x + 100 for x in a]]}, data="code")]
        assert verdict("alike", texts, path="x", limit=0.9) == CONTRADICTED
        with pytest.raises(Missing, match="two texts"):
            verdict("alike", texts[:1], path="x", limit=0.9)

    @pytest.mark.parametrize(
        ("third", "expected"),
        [
            (PLUS, REPRODUCED),
            ([2.0, -1.0, 2.0, -1.0], SAME),  # the best mean, but not beyond the interval
            ([1.0, -2.0, 1.0, -2.0], NOT_REPRODUCED),
            (MINUS, CONTRADICTED),
        ],
    )
    def test_best_of(self, third: list[float], expected: str) -> None:
        records = [*two(self.NONE, self.PLUS), record("c", extra={"x": third})]
        assert verdict("best_of", records, of="a", against=["b", "c"], samples="x") == expected

    def test_exact(self) -> None:
        assert verdict("exact", [record(value=1e-12)], limit=1e-6) == REPRODUCED
        assert verdict("exact", [record(value=1e-3)], limit=1e-6) == CONTRADICTED

    def test_near(self) -> None:
        for value, expected in ((0.47, REPRODUCED), (0.54, REPRODUCED), (0.4, NOT_REPRODUCED)):
            assert verdict("near", [record(value=value, spread=0.01)], target=0.5, factor=1.1) == expected
        given = {"of": "a", "against": ["b"], "samples": "x", "scale": "percent", "factor": 1.5}
        records = two([0.1] * 4, self.NONE)  # +10.5 %
        assert verdict("near", records, 9.5, **given) == REPRODUCED
        assert verdict("near", records, 5.0, **given) == NOT_REPRODUCED
        assert verdict("near", records, -9.5, **given) == NOT_REPRODUCED

    def test_every_rule_says_what_it_asks(self) -> None:
        assert all(rule.text.format(factor=2).endswith(".") for rule in RULES.values())

    @staticmethod
    def _asked(label: str, task: str, **extra: list[float]) -> Record:
        """A record of a task with one document a sample."""
        values = next(iter(extra.values()))
        more = {"ids": list("abcdefgh"), "documents": list("abcdefgh"), **extra}
        return record(label, sum(values) / len(values), extra=more, task=task, measure=next(iter(extra)))

    def _tasks(self, gap: float, scored: float | None = None) -> list[Record]:
        """Two tasks and three methods: ``a`` is above ``b`` by ``gap`` nats, and by ``gap`` points in score."""
        found = []
        for task, base in (("x", -1.0), ("y", -3.0)):
            for name, more in (("full", 0.5), ("b", 0.0), ("a", gap)):
                own = [base + more + 0.01 * i * (name == "a") for i in range(8)]
                found.append(self._asked(name, task, loglik=own))
                if scored is not None:
                    found.append(self._asked(name, task, scores=[scored + value for value in own]))
        return found

    def test_tasks_by_log_likelihood(self) -> None:
        given = {"of": "a", "against": ["b"], "tasks": ["x", "y"], "least": 25}
        judged = RULES["tasks"].judge(self._tasks(0.2), 1.0, **given)
        (one,) = judged.comparisons
        assert judged.verdict == REPRODUCED and one.unit == "nats/token" and one.n == 16  # sizes are not compared
        assert one.mean == pytest.approx(0.235) and one.low is not None and 0.2 < one.low < one.mean
        assert verdict("tasks", self._tasks(-0.2), **given) == CONTRADICTED
        assert verdict("tasks", self._tasks(-0.035), **given) == NOT_REPRODUCED
        assert verdict("tasks", self._tasks(0.2), **{**given, "direction": "lower"}) == CONTRADICTED
        with pytest.raises(Missing, match="no records of a and b on z"):
            verdict("tasks", self._tasks(0.2), **{**given, "tasks": ["x", "z"]})

    def test_tasks_by_score_where_the_full_cache_can_answer(self) -> None:
        given = {"of": "a", "against": ["b"], "tasks": ["x", "y"]}
        able = RULES["tasks"].judge(self._tasks(0.2, scored=40), 0.2, least=25, **given)
        assert able.verdict == REPRODUCED and able.comparisons[0].unit == "points"
        assert "scores 38.5 points on average; against b, log-likelihood: 0.235" in able.note
        assert verdict("tasks", self._tasks(0.2, scored=40), 9.0, least=25, **given) == SAME
        weak = RULES["tasks"].judge(self._tasks(0.2, scored=4), 9.0, least=25, **given)
        assert weak.verdict == REPRODUCED and weak.comparisons[0].unit == "nats/token" and "points" in weak.note

    def test_tasks_that_lose_little(self) -> None:
        given = {"of": "a", "against": ["full"], "tasks": ["x", "y"], "least": 25}
        margin = {"scores": 5.0, "loglik": 0.1}
        assert verdict("tasks", self._tasks(0.45), margin=margin, **given) == REPRODUCED
        assert verdict("tasks", self._tasks(0.365), margin=margin, **given) == NOT_REPRODUCED
        assert verdict("tasks", self._tasks(0.2), margin=margin, **given) == CONTRADICTED
        assert "margin \N{MINUS SIGN}0.1" in RULES["tasks"].judge(self._tasks(0.2), None, margin=margin, **given).note


class TestJudging:
    def test_missing_records(self) -> None:
        entry = judge(claim(), [])
        assert (entry.verdict, entry.reason) == (NOT_RUN, "no such record is published")
        assert judge(claim(not_run="no GPU"), []).reason == "no GPU"
        assert judge(claim(rule={}, not_run="no GPU"), []).verdict == NOT_RUN
        alone = two(TestRules.MINUS, TestRules.NONE)[:1]
        assert judge(claim(), alone).reason == "no records of a and b on the same text and settings"

    def test_stale_records_are_marked(self) -> None:
        fresh, old = two(TestRules.MINUS, TestRules.NONE), two(TestRules.MINUS, TestRules.NONE, stale=True)
        entry = judge(claim(), fresh)
        assert current(fresh[0]) and (entry.verdict, entry.stale, entry.state) == (REPRODUCED, 0, "current")
        entry = judge(claim(), [fresh[0], old[1]])
        assert (entry.verdict, entry.stale, entry.state) == (REPRODUCED, 1, "1 of 2 records by other code")
        assert "line}`other code`" in ledger_page([entry]) and "1 of 1 verdicts rest on" in ledger_page([entry])

    def test_the_present_code_counts_before_a_newer_record(self) -> None:
        old, fresh = record(value=1.0, stale=True, date="2027-01-01"), record(value=2.0)
        assert newest([old, fresh]) == newest([fresh, old]) == [fresh]
        assert newest([record(value=1.0), record(value=3.0, date="2027-01-01")])[0].value.value == 3.0

    def test_models_are_not_mixed_and_the_papers_own_comes_first(self) -> None:
        other = two(TestRules.PLUS, TestRules.NONE, model="small", date="2027-01-01")
        own = two(TestRules.MINUS, TestRules.NONE, model="paper/model")
        assert judge(claim(), [*other, *own]).models == ["small"]
        entry = judge(claim(model="paper/model"), [*other, *own])
        assert entry.own_model and entry.verdict == REPRODUCED
        assert judge(claim(model="paper/model"), [*other, own[0]]).verdict == CONTRADICTED

    def test_selection(self) -> None:
        records = [record(size=1), record(size=2), record(budget=None, size=1), record(data="code", size=1)]
        assert len(select(records, {"size": 1})) == 3
        assert len(select(records, {"size": [1, 2], "data": "essays"})) == 3
        assert len(select(records, {"budget": 64, "paper": "p"})) == 3
        failed = Record("k", records[0].cell, Value(None, n=0), "oom", "no", records[0].provenance)
        assert select([failed], {}) == []


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """The project's own ledger."""
    return ledger()


class TestRealLedger:
    def test_verdicts_have_numbers_and_the_rest_has_reasons(self, entries: list[Entry]) -> None:
        assert len(entries) == len(CLAIMS)
        for entry in entries:
            assert entry.verdict in VERDICTS
            assert bool(entry.reason) == (entry.verdict == NOT_RUN), entry.claim.id
            assert bool(entry.judged.comparisons) == bool(entry.judged.records) == (entry.verdict != NOT_RUN)
            assert entry.stale == sum(not r.is_current for r in entry.judged.records), entry.claim.id

    def test_rules_name_what_is_published(self, entries: list[Entry]) -> None:
        """A selection that misses its records by a misspelling would pass as not run: only these may find none."""
        absent = {"weightedkv/perplexity", "across/longbench"}
        for entry in entries:
            if entry.claim.rule and entry.verdict == NOT_RUN:
                assert entry.claim.page in absent and entry.claim.not_run, entry.claim.id

    def test_runtimes_over_longbench_are_what_the_gpu_profile_measures(self) -> None:
        """The rule's selection and tasks are the page's: a misspelling would pass as not run."""
        one = next(c for c in CLAIMS if c.id == "kvslimmer-runtime-longbench")
        given = next(n for n in Project(ROOT).notebooks() if n.name == one.page).parameters("gpu")
        where = one.rule["where"]
        assert {name: given[name] for name in ("budget", "chunk", "max_length")}.items() <= where.items()
        assert one.rule["tasks"] == given["tasks"] == list(longbench.NAMES)
        setup = speed.Setup(given["shape"], "cpu")
        cells = [
            task_runtimes._task_cell(
                setup, parse_variants(["kvslimmer", "asymkv"]), name, None, given["samples"], budget=given["budget"],
                chunk=given["chunk"], max_length=given["max_length"], tokenizer="smollm2-135m",
            )
            for name in given["tasks"]
        ]  # fmt: skip
        about = {"commit": "c" * 40, "date": "2026-01-01", "module": task_runtimes.__name__, "code": CODE}
        made = [Record(cell.identity, cell, Value(30.0, 1.0, 3), "ok", "", about) for cell in cells]
        assert judge(one, made).verdict == REPRODUCED
        entry = judge(one, made[1:])
        assert entry.verdict == NOT_RUN and "narrativeqa" in entry.reason
        assert "kvrepro run kvslimmer/efficiency --profile gpu" in ledger_page([entry])

    def test_page(self, entries: list[Entry]) -> None:
        page = ledger_page(entries)
        assert ", [as published](published/" not in page
        assert "(published/across/same_bytes.ipynb)" in ledger_page(entries, ["across/same_bytes"])
        assert all(entry.claim.text in page for entry in entries)
        assert all(f"### {name.replace('_', ' ')}\n" in page for name in RULES)
        assert "come from a paper's own model" in page
        rows = [line for line in page.splitlines() if "<br>" in line]
        assert len(rows) == len(CLAIMS) and all(line.count(" | ") == 3 for line in rows)

    def test_order_of_records_does_not_count(self, entries: list[Entry]) -> None:
        records = published()
        random.Random(0).shuffle(records)
        assert [e.as_dict()["ours"] for e in ledger(records=records)] == [e.as_dict()["ours"] for e in entries]

    def test_command(self, entries: list[Entry], capsys: pytest.CaptureFixture[str]) -> None:
        def call(*words: str) -> tuple[int, str]:
            with pytest.raises(SystemExit) as caught:
                main(words)
            return int(caught.value.code or 0), capsys.readouterr().out

        code, out = call("ledger")
        assert code == 0 and len(out.splitlines()) == len(entries) + 2
        found = json.loads(call("ledger", "--json")[1])
        assert [(one["id"], one["verdict"]) for one in found] == [(e.claim.id, e.verdict) for e in entries]
        some = json.loads(call("ledger", "--paper", "kvslimmer", "--json")[1])
        assert {one["paper"] for one in some} == {"KVSlimmer"}
        assert call("ledger", "--paper", "H2O")[0] == 2
        assert "Example" in call("ledger", "--help")[1] and "ledger" in call("--help")[1]


def test_published_records_by_state(tmp_path: Path) -> None:
    notebook = make_project(tmp_path / "project").notebooks()[0]
    here = record(value=1.0)  # this copy read the text essays with the sha256 "essays"
    notebook.records.parent.mkdir(parents=True)
    notebook.records.write_text(here.line() + "\n", encoding="utf-8")
    foreign = Record.parse(here.line().replace('"data_sha256":"essays"', '"data_sha256":"other"'))
    table = published_table([here, record(value=1.0, stale=True), foreign, record(data="code")], [notebook])
    assert table.splitlines()[2] == "| p/e | 4 | 1 | 1 | `cccccccccccc` | CPU |"
    assert "Other code" in table and len(published()) > 0


def test_variants_table_counts_wins_and_losses() -> None:
    def of(label: str, kl: list[float], share: float) -> Record:
        made = record(label, extra={"kl": kl}, share=share)
        return replace(made, cell=replace(made.cell, experiment="same_bytes"))

    released = "kvslimmer(variant='released')"
    base = [of("kvslimmer", [1.0, 1.1, 1.0], share) for share in (0.5, 0.25, 0.125)]
    other = [
        of(released, kl, s) for kl, s in (([0.5, 0.6, 0.5], 0.5), ([1.0, 1.0, 1.1], 0.25), ([3.0, 3.1, 3.0], 0.125))
    ]
    table = variants_table([*base, *other])
    assert "| 3 shares | \N{MINUS SIGN}0.5 " in table and "(0.5) to 2 " in table and table.endswith("| 1 | 1 |\n")
    assert variants_table(base).startswith("No published record")


def test_pages_say_how_many_of_their_records_are_of_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(plots, "display", lambda html: shown.append(html.data))
    plots.provenance([record(value=1.0), record(value=1.0, stale=True)])
    plots.provenance([record(value=1.0)])
    assert "(2 records); 1 of 2 were made by other code than this version's<" in shown[0]
    assert "(1 record)<" in shown[1]
