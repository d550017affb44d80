"""Values measured here beside the published ones: which cells, within which tolerance, and the page that shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvrepro.book import BookError
from kvrepro.book.compare_page import compare_page, summary
from kvrepro.book.reference import keep, main
from kvrepro.compare import REBUILT_ATOL, Rebuilt, rebuilt
from kvrepro.records import Cell, Record, Status, Store, Value, read_records


def record(
    value: float | None = 1.0,
    spread: float | None = None,
    *,
    status: Status = "ok",
    dirty: bool = False,
    date: str = "2026-01-01T00:00:00+00:00",
    params: dict[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """A record of one cell; parameters and fields can be changed."""
    given = {"dtype": "float32", "window": 96, "label": "h2o", **(params or {})}
    fields = {"paper": "p", "experiment": "e", "metric": "perplexity", "method": "h2o", "model": "m", "data": "essays"}
    fields |= {"model_sha256": "1", "data_sha256": "2", "budget": 32, **changes}
    about = {"commit": "abcdef0123", "dirty": dirty, "date": date, "device": "a GPU", "module": "x", "code": "y"}
    cell = Cell(**fields, params=given)
    return Record(cell.key(date), cell, Value(value, spread), status, "", about)


def elsewhere(value: float, spread: float | None = None, **changes: Any) -> Record:
    """The same as :func:`record`, measured on another day."""
    return record(value, spread, date="2026-02-02T00:00:00+00:00", **changes)


class TestRebuilt:
    @pytest.mark.parametrize(
        ("published", "here", "agrees"),
        [
            (record(10.0), elsewhere(10.009), True),
            (record(10.0), elsewhere(10.011), False),
            (record(-10.0), elsewhere(-10.011), False),
            (record(10.0, 0.5), elsewhere(10.049, 0.5), True),  # a tenth of the standard error
            (record(10.0, 0.5), elsewhere(10.051, 0.5), False),  # two standard errors would be far too wide
            (record(10.0, 8.0), elsewhere(10.11, 8.0), False),  # never more than 1 %
            (record(10.0), elsewhere(10.2, 5.0), False),  # the error found here does not count
            (record(1e-16), elsewhere(5e-16), True),  # rounding is the value itself
            (record(0.0), elsewhere(2 * REBUILT_ATOL), False),
            (record(10.0, params={"dtype": "bfloat16"}), elsewhere(10.09, params={"dtype": "bfloat16"}), True),
            (record(10.0, params={"dtype": "bfloat16"}), elsewhere(10.11, params={"dtype": "bfloat16"}), False),
        ],
    )
    def test_tolerance(self, published: Record, here: Record, agrees: bool) -> None:
        found = rebuilt([published], [here])
        assert found.apart == [] and [pair.agrees for pair in found.pairs] == [agrees]
        assert found.pairs[0].difference == pytest.approx(here.value.value - published.value.value)

    def test_the_newest_published_record_of_a_cell_counts(self) -> None:
        found = rebuilt([elsewhere(2.0), record(1.0)], [record(2.0, date="2026-03-03T00:00:00+00:00")])
        assert [pair.agrees for pair in found.pairs] == [True]

    @pytest.mark.parametrize(
        ("here", "kind", "reason"),
        [
            (elsewhere(1.0, params={"window": 192}), "other parameters", "here window 192 for 96 in the nearest"),
            (elsewhere(1.0, params={"dtype": "bfloat16"}), "other parameters", "dtype bfloat16 for float32"),
            (elsewhere(1.0, budget=64), "other parameters", "budget 64 for 32"),
            (elsewhere(1.0, options={"sinks": 4}), "other parameters", "option sinks 4 for (none)"),
            (elsewhere(1.0, data_sha256="3"), "other text", "another version of the text"),
            (elsewhere(1.0, model_sha256="3"), "other model", "another version of the model"),
            (elsewhere(1.0, data="code", data_sha256="3"), "other parameters", "here data code for essays in"),
            (elsewhere(1.0, experiment="f"), "not published", "nothing of this experiment"),
            (elsewhere(1.0, params={"hardware": "a CPU"}), "a time", "depend on the machine"),
            (elsewhere(1.0, status="oom"), "not measured", "oom"),
            (replace(elsewhere(1.0), value=Value(None)), "no single number", "array"),
            (record(1.0), "the published record itself", "by this copy"),
        ],
    )
    def test_what_cannot_be_compared_says_why(self, here: Record, kind: str, reason: str) -> None:
        found = rebuilt([record(1.0), record(1.0, budget=4096, params={"window": 8})], [here])
        assert found.pairs == []
        assert found.apart[0].kind == kind and reason in found.apart[0].reason

    def test_failed_published_records_do_not_count(self) -> None:
        assert rebuilt([record(1.0, status="error")], [elsewhere(1.0)]).apart[0].kind == "not published"


class TestPage:
    found = {
        "p/e": rebuilt(
            [record(10.0, 0.5), record(20.0, budget=64)],
            [elsewhere(10.001, 0.5), elsewhere(21.0, budget=64), elsewhere(1.0, params={"window": 192})],
        )
    }

    def test_every_cell_is_shown(self) -> None:
        page = compare_page(self.found, {"p/e": "An experiment"})
        assert "1 of 2 values that this machine measured anew agree" in page and "1 more cannot be compared" in page
        (good,) = [line for line in page.splitlines() if "agrees`" in line]
        assert "`h2o`, budget 32, essays" in good and "10 ± 0.5 | 10.001 ± 0.5 | +0.001 | 0.05" in good
        assert "a GPU, abcdef01, other code" in good
        (bad,) = [line for line in page.splitlines() if "differs`" in line]
        assert "20 | 21 | +1 | 0.02" in bad
        assert "| other parameters | here window 192 for 96 in the nearest published cell |" in page

    def test_nothing_to_compare(self) -> None:
        assert "No value of this copy" in summary({}, "compare.md")
        assert "nothing was run yet" in compare_page({}, {})
        page = compare_page({"p/e": rebuilt([], [record()])}, {"p/e": "An experiment"})
        assert "None of the values here can be compared: not published (1)" in page
        assert isinstance(self.found["p/e"], Rebuilt)


class TestReference:
    def test_keeps_what_can_be_compared_and_the_newest_of_a_cell(self, tmp_path: Path) -> None:
        keep([record(1.0), record(5.0, paper="q"), record(3.0, params={"hardware": "x"})], tmp_path)
        kept = keep([elsewhere(2.0), elsewhere(1.0, status="skipped", budget=64)], tmp_path)
        assert sorted(r.value.value for r in kept) == [2.0, 5.0]
        assert [r.value.value for r in read_records(tmp_path / "p.jsonl")] == [2.0]

    def test_records_of_a_tree_with_changes_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BookError, match=r"commit first: 1 records"):
            keep([record(dirty=True)], tmp_path / "none")
        assert not (tmp_path / "none").exists()

    def test_from_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "p.jsonl").write_text(record(1.0).line() + "\n", encoding="utf-8")
        store = Store(tmp_path / "local", tmp_path / "out")
        monkeypatch.setattr("kvrepro.book.reference.Store.default", lambda: store)
        main([str(tmp_path / "a")])
        assert len(read_records(tmp_path / "out" / "quick" / "p.jsonl")) == 1
