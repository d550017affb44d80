"""The published pages: what is kept of a build, and what the book shows of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from book_project import make_project
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kvrepro.book import BookError, Project
from kvrepro.book.build import build, run
from kvrepro.book.execute import cell_id
from kvrepro.book.published import PROFILE, draw, keep, kept, link, merged, shown, stage_published
from kvrepro.book.site import check_toc
from kvrepro.book.stamps import Stamp, source_hash
from kvrepro.experiments import across
from kvrepro.fingerprint import fingerprint
from kvrepro.records import Cell, Record, Value, read_records, write_records

CODE = fingerprint(across.same_bytes, "h2o")


def record(
    size: int, value: float, *, method: str = "h2o", day: int = 1, stale: bool = False, **about: object
) -> Record:
    """A record made by hand, of the present code unless it is to be stale."""
    cell = Cell(
        paper="demo", experiment="sizes", metric="m", method="h2o", model="none", model_sha256="0", data="d",
        data_sha256="0", params={"size": size, "label": method},
    )  # fmt: skip
    code = "0" * 64 if stale else CODE
    run = {"commit": "c" * 40, "dirty": False, "date": f"2026-01-0{day}", "device": "GPU", "code": code}
    run |= {"module": across.__name__, "wall_s": 0.0, "peak_bytes": 0, **about}
    return Record.parse(Record(cell.key(code), cell, Value(value), "ok", "", run).line())


def ran(project: Project, **changes: object) -> Stamp:
    """Put a page of the second notebook as if it had been run with the gpu profile, with its stamp and records."""
    notebook = project.select(["words"])[0]
    glued = new_output("display_data", data={"text/plain": "1"}, metadata={"scrapbook": {"name": "key"}})
    said = new_output("display_data", data={"text/markdown": "See [sizes](sizes.ipynb) and [below](#part)."})
    cells = [
        new_markdown_cell("# Words\n\nSee [sizes](../demo/sizes.ipynb), [the ledger](../../ledger.md), [part](#part)."),
        new_code_cell("print()", outputs=[glued, said, new_output("stream", name="stderr", text="noise")]),
        new_markdown_cell("(part)=\n## Part"),
        new_markdown_cell("links", id=cell_id("downloads", 0)),
    ]
    notebook.page.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), notebook.page)
    write_records(notebook.records, [record(1, 2.0)])
    stamp = Stamp(
        profile=PROFILE, parameters={"times": 2}, source=source_hash(notebook.source), code={},
        records=[r.key for r in read_records(notebook.records)],
        environment={"commit": "c" * 40, "dirty": False, "device": "A GPU", "date": "2026-01-02T00:00:00"},
    )  # fmt: skip
    stamp = replace(stamp, **changes)
    stamp.write(notebook.stamp)
    return stamp


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh miniature."""
    return make_project(tmp_path / "project")


class TestKeep:
    def test_pages_and_records(self, project: Project) -> None:
        ran(project)
        pages, records = keep(project)
        assert pages == ["demo/words"] and [r.value.value for r in records] == [2.0]
        words = project.select(["words"])[0]
        assert Stamp.read(kept(project, words).with_suffix(".stamp.json")) == Stamp.read(words.stamp)
        assert read_records(project.root / "results/published/demo.jsonl") == records
        assert not kept(project, project.select(["sizes"])[0]).exists()

    def test_what_the_quick_profile_shows_as_well_is_left_out(self, project: Project) -> None:
        ran(project, parameters={})
        assert keep(project)[0] == []

    def test_a_page_that_shows_what_is_published_is_left_out(self, project: Project) -> None:
        index = project.index.read_text(encoding="utf-8")
        assert ran(project) and keep(project)[0] == ["demo/words"]
        project.index.write_text(index.replace("- name: demo/words\n", "- name: demo/words\n  twin: false\n"))
        assert keep(project)[0] == []

    def test_refusals(self, project: Project) -> None:
        with pytest.raises(BookError, match="no page was run with the profile gpu"):
            keep(project)
        ran(project, failure="ValueError: no")
        with pytest.raises(BookError, match="demo/words is not published: ValueError: no"):
            keep(project)
        ran(project, environment={"dirty": True})
        with pytest.raises(BookError, match="commit the changes first"):
            keep(project)
        assert not (project.root / "results/published").exists()


class TestDraw:
    def test_from_the_published_records(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVREPRO_COMMIT", "c" * 40)
        monkeypatch.setenv("KVREPRO_RESULTS", str(project.root / "results" / "local"))
        sizes = project.select(["sizes"])[0]
        with pytest.raises(BookError, match="demo/sizes is not drawn: StoreError: 1 values are not stored"):
            draw(project, ["sizes"])
        assert not kept(project, sizes).exists()
        build(project, "smoke", ["sizes"], site=False)
        (project.root / "results/published").mkdir(parents=True)
        sizes_of_gpu = replace(Stamp.read(sizes.stamp), profile=PROFILE)
        sizes_of_gpu.write(sizes.stamp)
        assert [r.value.value for r in keep(project)[1]] == [2.0]  # the smoke profile's size
        with pytest.raises(BookError, match="not stored"):  # the gpu profile's is 3
            draw(project, ["sizes"])
        run(project, "sizes", {"size": 3}, "smoke")
        write_records(
            project.root / "results/published/demo.jsonl", read_records(project.root / "results/local/demo.jsonl")
        )
        assert draw(project, ["sizes"]) == ["demo/sizes"]
        stamp = Stamp.read(kept(project, sizes).with_suffix(".stamp.json"))
        assert stamp.profile == PROFILE and stamp.source == source_hash(sizes.source)
        assert stamp.records == [r.key for r in read_records(project.root / "results/local/demo.jsonl")][-1:]
        assert "value 3.0" in kept(project, sizes).read_text()
        assert os.environ["KVREPRO_RESULTS"] == str(project.root / "results" / "local")


class TestMerged:
    def test_one_a_cell_the_present_code_first(self) -> None:
        old, new = record(1, 1.0, day=1), record(1, 2.0, day=3, stale=True)
        assert merged([old], [new]) == [old]
        assert merged([new], [old]) == [old]
        assert merged([record(1, 1.0, stale=True)], [new]) == [new]

    def test_other_code_goes_with_its_method(self) -> None:
        stale = [record(1, 1.0, stale=True), record(2, 1.0, stale=True), record(2, 1.0, method="tova", stale=True)]
        fresh = record(1, 2.0, day=2)
        assert merged(stale, [fresh]) == [stale[2], fresh]
        assert merged(stale, []) == stale

    def test_failures_and_changes(self) -> None:
        assert merged([], [replace(record(1, 1.0), status="error")]) == []
        with pytest.raises(BookError, match="commit first: 1 records"):
            merged([], [record(1, 1.0, dirty=True)])


class TestStage:
    def page(self, project: Project) -> tuple[str, list[nbformat.NotebookNode]]:
        """The staged page's note, and its cells."""
        stage_published(project, project.notebooks())
        cells = nbformat.read(shown(project, project.select(["words"])[0]), as_version=4).cells
        return cells[1].source, cells

    def test_links_labels_and_glue(self, project: Project) -> None:
        ran(project)
        keep(project)
        about, cells = self.page(project)
        assert cells[0].source.startswith("# Words: published\n")
        assert "[sizes](../../results/demo/sizes.ipynb), [the ledger](../../ledger.md), [part](#published-part)" in (
            cells[0].source
        )
        assert [output.data for output in cells[2].outputs] == [
            {"text/markdown": "See [sizes](../../results/demo/sizes.ipynb) and [below](#published-part)."}
        ]
        assert cells[3].source == "(published-part)=\n## Part"
        assert len(cells) == 5 and "/results/published/demo.jsonl" in cells[4].source
        assert about.startswith(":::{note}") and "measured on GPU (commit `cccccccc`)" in about
        for target in ("../../results/demo/words.ipynb",):
            assert target in about
        assert "(../../published/demo/words.ipynb)" in link(project, project.select(["words"])[0])
        assert link(project, project.select(["sizes"])[0]) == ""

    def test_out_of_date(self, project: Project) -> None:
        ran(project)
        keep(project)
        records = project.root / "results/published/demo.jsonl"
        stale = record(1, 2.0, stale=True)
        write_records(records, [stale])
        words = project.select(["words"])[0]
        stamp = kept(project, words).with_suffix(".stamp.json")
        replace(Stamp.read(stamp), records=[stale.key, "f" * 64], source="other").write(stamp)
        about, _ = self.page(project)
        assert about.startswith(":::{warning}")
        assert "1 of its 2 values were measured by other code than is here now; 1 of them" in about
        assert "its notebook has been changed since" in about

    def test_a_page_without_a_stamp(self, project: Project) -> None:
        ran(project)
        keep(project)
        kept(project, project.select(["words"])[0]).with_suffix(".stamp.json").write_text(json.dumps({}))
        with pytest.raises(BookError, match="has no stamp"):
            stage_published(project, project.notebooks())

    def test_the_table_of_contents_has_them(self, project: Project) -> None:
        ran(project)
        keep(project)
        with pytest.raises(BookError, match="add book/published/demo/words to _toc.yml"):
            check_toc(project, project.notebooks())
        toc = project.root / "_toc.yml"
        toc.write_text(
            toc.read_text().replace("- file: book/rerun", "- file: book/published/demo/words\n- file: book/rerun")
        )
        check_toc(project, project.notebooks())
        kept(project, project.select(["words"])[0]).unlink()
        with pytest.raises(BookError, match="take book/published/demo/words out of _toc.yml"):
            check_toc(project, project.notebooks())
