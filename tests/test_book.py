"""The engine that makes the book: parameters, stamps, execution, pages, and what it does when something goes wrong."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import nbformat
import pytest
import torch
import yaml
from book_project import MEASURE, ROOT, make_project, write_notebook
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from kvrepro import methods
from kvrepro.book import PROFILES, BookError, Project, RequestError
from kvrepro.book.build import Report, build, run
from kvrepro.book.checks import check_profile_runs, profile_problems
from kvrepro.book.execute import Kernels, clean, execute, note
from kvrepro.book.files import locked
from kvrepro.book.pages import fill_glue, glued_in_prose, markdown_table, methods_table, options_table, placeholder
from kvrepro.book.parameters import check, defaults, parse
from kvrepro.book.progress import Reporter, duration
from kvrepro.book.schedule import Round, Run
from kvrepro.book.site import check_toc, outside_references, toc_files
from kvrepro.book.stamps import Sources, Stamp, plain, source_hash, why
from kvrepro.fingerprint import PACKAGE_DIR
from kvrepro.records import read_records


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A fresh miniature."""
    return make_project(tmp_path / "project")


class TestParameters:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ([], {}),
            (["budget=128 window=2048"], {"budget": 128, "window": 2048}),
            (["budget=128", "share=1e-3", "name=essays"], {"budget": 128, "share": 0.001, "name": "essays"}),
            (["budgets=64,128,256"], {"budgets": [64, 128, 256]}),
            (["budgets=[64, 128]"], {"budgets": [64, 128]}),
            (["methods=h2o,full"], {"methods": ["h2o", "full"]}),
            (["methods=[h2o, 'full']"], {"methods": ["h2o", "full"]}),
            (
                ["methods=full,kvmerger(sigma=5.0, epsilon=0.8) n=2"],
                {"methods": ["full", "kvmerger(sigma=5.0, epsilon=0.8)"], "n": 2},
            ),
            (["a=None b=true c=False d='x y'"], {"a": None, "b": True, "c": False, "d": "x y"}),
        ],
    )
    def test_parse(self, words: list[str], expected: dict[str, Any]) -> None:
        assert parse(words) == expected

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["128"], "name=value"),
            (["budget", "128"], "name=value"),
            (["a=1 a=2"], "given twice"),
            (["a="], "no value"),
            (["a=[1,2"], "missing"),
        ],
    )
    def test_parse_says_what_is_wrong(self, words: list[str], message: str) -> None:
        with pytest.raises(RequestError, match=message):
            parse(words)

    def test_defaults_of_a_notebook(self, project: Project) -> None:
        found = defaults(project.select(["sizes"])[0].source)
        assert found == {"budgets": [64, 128], "size": 3, "label": "a", "ratio": None}

    def test_parameters_cell_holds_literals_only(self, tmp_path: Path) -> None:
        write_notebook(tmp_path / "a.ipynb", [("parameters", "x = 1\ny = x + 1")])
        with pytest.raises(BookError, match="line 2"):
            defaults(tmp_path / "a.ipynb")
        write_notebook(tmp_path / "b.ipynb", [("code", "x = 1")])
        with pytest.raises(BookError, match="exactly one cell"):
            defaults(tmp_path / "b.ipynb")

    def test_check(self) -> None:
        known = {"budgets": [64], "size": 3, "label": "a", "ratio": None, "flag": True}
        given = {"budgets": 32, "size": 2.5, "ratio": "any", "label": ["a", "b"]}
        assert check("demo", known, given) == {"budgets": [32], "size": 2.5, "ratio": "any", "label": ["a", "b"]}
        with pytest.raises(RequestError, match="no parameter sizes; it has budgets="):
            check("demo", known, {"sizes": 1})
        for wrong in ({"size": "abc"}, {"label": 3}, {"budgets": ["x"]}, {"flag": 1}, {"size": True}):
            with pytest.raises(RequestError, match="is not valid"):
                check("demo", known, wrong)


class TestIndex:
    def test_selection(self, project: Project) -> None:
        assert [nb.name for nb in project.select([])] == ["demo/sizes", "demo/words"]
        for name in ("demo/words", "words", "notebooks/demo/words.ipynb"):
            assert [nb.name for nb in project.select([name])] == ["demo/words"]
        with pytest.raises(RequestError, match="there are demo/sizes, demo/words"):
            project.select(["demo/word"])

    @pytest.mark.parametrize(
        ("entry", "message"),
        [
            ({"name": "demo/sizes"}, "needs name, title and profiles"),
            ({"name": "Sizes", "title": "", "profiles": {}}, "paper/name"),
            ({"name": "demo/none", "title": "", "profiles": {}}, "there is no"),
            ({"name": "demo/sizes", "title": "", "profiles": {"fast": {}}}, "unknown profile fast"),
            ({"name": "demo/sizes", "title": "", "profiles": {}, "alone": True}, "alone is whole or times, not True"),
        ],
    )
    def test_bad_entries(self, project: Project, entry: dict[str, Any], message: str) -> None:
        project.index.write_text(yaml.safe_dump([entry]), encoding="utf-8")
        with pytest.raises(BookError, match=message):
            project.notebooks()

    def test_toc_and_index_must_agree(self, project: Project) -> None:
        notebooks = project.notebooks()
        check_toc(project, notebooks)
        with pytest.raises(BookError, match="take book/results/demo/words out"):
            check_toc(project, notebooks[:1])
        (project.book / "rerun.md").unlink()
        with pytest.raises(BookError, match="write book/rerun.md"):
            check_toc(project, notebooks)

    def test_no_checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KVREPRO_ROOT", str(tmp_path))
        with pytest.raises(BookError, match="clone it"):
            Project.find()


class TestThisRepository:
    """What must hold for the notebooks and pages of the repository itself."""

    def test_toc_agrees_with_index(self) -> None:
        here = Project(ROOT)
        check_toc(here, here.notebooks())

    @pytest.mark.parametrize("profile", PROFILES)
    def test_profiles_set_parameters_that_exist(self, profile: str) -> None:
        for notebook in Project(ROOT).notebooks():
            check(notebook.name, defaults(notebook.source), notebook.parameters(profile))

    def test_notebooks_are_stored_without_outputs(self) -> None:
        for notebook in Project(ROOT).notebooks():
            cells = nbformat.read(notebook.source, as_version=4).cells
            stored = [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
            assert not stored, f"{notebook.name}: run nbstripout on it"

    def test_every_notebook_starts_with_a_title(self) -> None:
        for notebook in Project(ROOT).notebooks():
            first = nbformat.read(notebook.source, as_version=4).cells[0]
            assert first.cell_type == "markdown" and first.source.startswith("# "), notebook.name


class TestStamps:
    @staticmethod
    def stamped(project: Project, sources: Sources, **changes: Any) -> Stamp:
        notebook = project.select(["sizes"])[0]
        stamp = Stamp(
            profile="smoke",
            parameters=plain({"size": 2}),
            source=source_hash(notebook.source),
            code=sources.code(notebook.source, ["h2o"]),
            methods=["h2o"],
        )
        stamp = replace(stamp, **changes)
        stamp.write(notebook.stamp)
        notebook.page.write_text("{}", encoding="utf-8")
        return stamp

    def test_reasons(self, project: Project) -> None:
        notebook, sources = project.select(["sizes"])[0], Sources()
        assert why(notebook, {"size": 2}, sources) == "not run yet"
        self.stamped(project, sources)
        assert why(notebook, {"size": 2}, sources) == ""
        assert why(notebook, {"size": 3}, sources) == "its parameters changed"
        self.stamped(project, sources, failure="ValueError: no")
        assert why(notebook, {"size": 2}, sources) == "failed the last time"
        self.stamped(project, sources, statuses={"error": 1, "ok": 2})
        assert why(notebook, {"size": 2}, sources) == "failed the last time"
        self.stamped(project, sources, statuses={"oom": 1, "ok": 2})
        assert why(notebook, {"size": 2}, sources) == ""
        write_notebook(notebook.source, [("md", "# Sizes"), ("parameters", "size = 1")])
        assert why(notebook, {"size": 2}, sources) == "the notebook changed"

    def test_outputs_and_metadata_of_the_source_do_not_count(self, project: Project) -> None:
        path = project.select(["words"])[0].source
        before = source_hash(path)
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata["note"] = "x"
        notebook.cells[1]["outputs"] = [new_output("stream", text="x")]
        nbformat.write(notebook, path)
        assert source_hash(path) == before
        notebook.cells[1].metadata["tags"] = ["parameters", "hide-input"]
        nbformat.write(notebook, path)
        assert source_hash(path) != before

    def test_only_the_code_behind_a_page_counts(self, project: Project, tmp_path: Path) -> None:
        package = tmp_path / "kvrepro"
        shutil.copytree(PACKAGE_DIR, package, ignore=shutil.ignore_patterns("__pycache__"))
        source = project.select(["words"])[0].source  # imports kvrepro.slots

        def changed_by(file: str, text: str, used: list[str]) -> bool:
            path = package / file
            original = path.read_text(encoding="utf-8")
            before = Sources(package).code(source, used)
            path.write_text(original + text, encoding="utf-8")
            after = Sources(package).code(source, used)
            path.write_text(original, encoding="utf-8")
            return before != after

        assert changed_by("methods/h2o.py", "\nX = 1\n", ["h2o"])
        assert changed_by("methods/h2o.py", "\nX = 1\n", ["h2o+tova"])
        assert not changed_by("methods/h2o.py", "\nX = 1\n", ["tova"])
        assert changed_by("methods/h2o.py", "\nX = 1\n", [])  # no records: it may use any method
        assert not changed_by("methods/h2o.py", "\n# a comment\n", ["h2o"])
        assert changed_by("slots.py", "\nX = 1\n", ["tova"])
        assert not changed_by("plots.py", "\nX = 1\n", ["tova"])  # not imported by this notebook
        assert changed_by("data/published_numbers.csv", "\nx\n", ["tova"])
        assert not changed_by("records.py", "\nX = 1\n", ["tova"])

    def test_plots_count_for_a_notebook_that_draws(self, tmp_path: Path) -> None:
        write_notebook(tmp_path / "a.ipynb", [("code", "%matplotlib inline\nfrom kvrepro import plots")])
        assert "kvrepro.plots" in Sources().code(tmp_path / "a.ipynb", ["h2o"])

    def test_damaged_stamp_is_no_stamp(self, tmp_path: Path) -> None:
        for text in ("", "{", "[]", '{"schema": 0}', '{"schema": 1, "x": 2}'):
            (tmp_path / "s.json").write_text(text, encoding="utf-8")
            assert Stamp.read(tmp_path / "s.json") is None


class TestCleaning:
    def test_executed_notebook_is_clean(self, tmp_path: Path) -> None:
        cell = new_code_cell("x", id="a")
        cell.metadata.update(
            {"papermill": {"status": "completed"}, "execution": {"iopub.status.busy": "now"}, "tags": []}
        )
        bar = "sizes:  50%|##   | 1/2 [00:00<00:01,  1.0it/s]"
        cell.outputs = [
            new_output("stream", name="stderr", text=f"\r{bar}\r{bar}\n"),
            new_output("stream", name="stderr", text=f"{tmp_path}/a.py: a warning\n"),
            new_output("stream", name="stdout", text=f"in {tmp_path}/b and {Path.home()}/c"),
        ]
        marker, ours = new_markdown_cell("error"), new_code_cell("export")
        marker.metadata["tags"], ours.metadata["tags"] = ["papermill-error-cell-tag"], ["kvrepro-export"]
        injected = new_code_cell("# Parameters\nx = 1")
        injected.metadata["tags"] = ["injected-parameters"]
        notebook = new_notebook(cells=[marker, injected, cell, ours])
        notebook.metadata["papermill"] = {"input_path": "/somewhere"}
        cleaned = clean(notebook, tmp_path)
        assert [c.source for c in cleaned.cells] == ["# Parameters\nx = 1", "x"]
        assert "papermill" not in json.dumps(cleaned)
        assert dict(cleaned.cells[1].metadata) == {}
        assert [o.text for o in cleaned.cells[1].outputs] == ["a.py: a warning\n", "in b and ~/c"]
        assert cleaned.cells[0].id == clean(new_notebook(cells=[injected]), tmp_path).cells[0].id

    def test_notes_replace_each_other(self) -> None:
        notebook = new_notebook(cells=[new_markdown_cell("# T"), new_code_cell("x")])
        note(notebook, "danger", "one")
        note(notebook, "warning", "two")
        assert [cell.source for cell in notebook.cells] == ["# T", ":::{warning}\ntwo\n:::", "x"]
        note(notebook, "note", "")
        assert [cell.source for cell in notebook.cells] == ["# T", "x"]


class TestPages:
    def test_tables(self) -> None:
        assert markdown_table(["a", "b"], [["1|2", "3"]]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |\n"
        assert all(f"`{name}`" in methods_table() for name in methods.names())
        table = options_table("kvmerger")
        assert "| `epsilon` | `0.75` |" in table
        assert "{bdg-warning}`second-hand`" in table

    def test_pages_not_run_have_what_the_prose_shows(self, project: Project) -> None:
        assert glued_in_prose(project) == {"demo/sizes": {"demo_size": ".1f"}}
        page = placeholder(project.notebooks()[0])
        for _ in range(2):  # the second time changes nothing
            fill_glue(page, {"a": ".1f", "b": "s"})
        assert [list(o.data.values()) for o in page.cells[-1].outputs] == [["nan"], ["'not run yet'"]]
        assert len(page.cells) == 2
        nbformat.validate(page)

    def test_outside_references(self, tmp_path: Path) -> None:
        (tmp_path / "a.html").write_text(
            '<a href="https://arxiv.org">fine</a><link rel="canonical" href="https://x.org">'
            '<script async src="https://cdn.x.org/a.js"></script><img alt="" src=//x.org/b.png>'
            '<script src="_static/a.js"></script>',
            encoding="utf-8",
        )
        (tmp_path / "a.css").write_text('@import "https://fonts.x.org/f"; b {background: url(c.png)}', encoding="utf-8")
        assert outside_references(tmp_path) == [
            "a.html: script https://cdn.x.org/a.js",
            "a.html: img //x.org/b.png",
            "a.css: css https://fonts.x.org/f",
        ]


class TestKernels:
    def test_a_kernel_that_starts_after_the_end_is_killed(self, project: Project) -> None:
        kernels = Kernels()
        kernels.kill()
        outcome = execute(project, project.select(["words"])[0], {}, kernels=kernels)
        assert outcome.failure.startswith("the kernel ")


class TestProgress:
    @pytest.fixture(autouse=True)
    def stopped_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvrepro.book.progress.time", SimpleNamespace(monotonic=lambda: 0.0))

    def test_duration(self) -> None:
        assert [duration(s) for s in (0.4, 59, 61, 120, 3700)] == ["0 s", "59 s", "1 min 1 s", "2 min", "1 h 1 min"]

    def test_lines_without_a_terminal(self) -> None:
        stream = io.StringIO()
        with Reporter([Round([Run("a/b"), Run("c/d")], 1)], {"a/b": 10.0, "c/d": 50.0}, stream) as reporter:
            assert reporter.left() == 60
            with reporter.running(Run("a/b"), "not run yet"):
                assert reporter.left() == 60
            assert reporter.left() == 50
        assert stream.getvalue() == "[1/2] a/b (not run yet): about 10 s, 1 min left in all\n"

    def test_several_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvrepro.book.progress._QUIET_S", 0.0)
        stream = io.StringIO()
        rounds = [Round([Run("a/b"), Run("c/d"), Run("e/f")], 2), Round([Run("g/h")], 1)]
        known = {"a/b": 100.0, "c/d": 60.0, "e/f": 20.0, "g/h": 40.0}
        with Reporter(rounds, known, stream) as reporter:
            with (
                reporter.running(Run("a/b"), "not run yet") as first,
                reporter.running(Run("c/d"), "not run yet") as second,
            ):
                first.write_text('{"done": 1, "total": 4, "running": "h2o", "left_s": 3.0}\n')
                second.write_text('{"done": 2, "total": 3, "running": "full", "left_s": null}\n')
                reporter._tick()
                assert reporter.left() == 140  # a/b, beside it the two others, then g/h
            with reporter.running(Run("e/f"), "not run yet"):
                assert reporter.left() == 60
        told = stream.getvalue()
        assert "[2/4] c/d (not run yet): about 1 min, 2 min 20 s left in all\n" in told
        assert "      a/b: 1/4 h2o, 3 s left\n" in told
        assert "      c/d: 2/3 full\n" in told

    def test_bar_in_a_terminal_shows_the_sweeps(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        stream = Terminal()
        with (
            Reporter([Round([Run("a/b"), Run("c/d")], 2)], {"a/b": 10.0}, stream) as reporter,
            reporter.running(Run("a/b"), "not run yet") as feed,
            reporter.running(Run("c/d"), "not run yet"),
        ):
            feed.write_text('{"done": 1, "total": 4, "running": "h2o budget=64", "left_s": 3.0}\n')
            reporter._tick()
        assert "a/b: 1/4 h2o budget=64, 3 s left" in stream.getvalue()
        assert "c/d: running" in stream.getvalue()
        assert "2/2 runs" in stream.getvalue()


class TestProfiles:
    def test_unknown_profile(self, project: Project) -> None:
        with pytest.raises(RequestError, match="unknown profile 'fast'; there are smoke, quick, gpu, paper"):
            build(project, "fast")

    def test_gpu_profile_without_a_gpu(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BookError, match=r"(?s)profile gpu cannot run here.*a GPU.*PROFILE=quick"):
            build(project, "gpu")
        assert not project.pages.exists()

    def test_paper_profile_lists_everything_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("kvrepro.book.checks.constants.HF_HUB_OFFLINE", True)
        needed = [{"model": "nobody/nothing-7b", "text": ["essays", "books"]}, {"model": "smollm2-135m"}]
        with pytest.raises(BookError) as caught:
            check_profile_runs("paper", needed)
        assert "nobody/nothing-7b: not in the hub's cache" in str(caught.value)
        assert "KVREPRO_DATA_DIR" in str(caught.value)
        assert "smollm2" not in str(caught.value)

    def test_quick_needs_nothing(self) -> None:
        assert profile_problems("quick", [{"model": "smollm2-135m", "text": "essays"}]) == []


class Built(NamedTuple):
    """A miniature after its first build: the project, what the build reported, and what it told."""

    project: Project
    report: Report
    told: str


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A miniature built once, for all tests of ``TestBuild``; they work on copies of it."""
    project = make_project(tmp_path_factory.mktemp("first") / "project")
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(told):
        patch.setenv("KVREPRO_RESULTS", str(project.root / "results" / "local"))
        report = build(project, "smoke", jobs=2)
    return Built(project, report, told.getvalue())


class TestBuild:
    """What builds do to a miniature that was built before: each test has a copy of it."""

    @pytest.fixture
    def life(self, first: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
        root = tmp_path.resolve() / "project"
        shutil.copytree(first.project.root, root)
        monkeypatch.setenv("KVREPRO_RESULTS", str(root / "results" / "local"))
        return Project(root)

    def test_first_build(self, first: Built) -> None:
        life, report, told = first
        assert report.ran == ["demo/sizes", "demo/words"]
        assert (report.failed, report.missing, report.built) == ({}, [], True)
        assert "[1/2] demo/sizes (not run yet)" in told
        sizes, words = life.notebooks()
        assert [record.value.value for record in read_records(sizes.records)] == [2.0]
        assert not words.records.exists()
        stamp = Stamp.read(sizes.stamp)
        assert stamp is not None
        assert (stamp.profile, stamp.methods, stamp.statuses) == ("smoke", ["h2o"], {"ok": 1})
        html = (life.html / "book" / "intro.html").read_text(encoding="utf-8")
        assert ">2.0<" in html  # glued from the notebook
        assert outside_references(life.html) == []
        page = words.page.read_text(encoding="utf-8")
        assert "progress" not in page.split("outputs", 2)[2].split("source")[0]

    def test_second_build_does_nothing(self, life: Project) -> None:
        report = build(life, "smoke")
        assert (report.ran, report.built) == ([], False)

    def test_other_profile_runs_what_differs(self, life: Project) -> None:
        report = build(life, "quick")
        assert report.ran == ["demo/sizes"]
        assert {stamp.profile for nb in life.notebooks() if (stamp := Stamp.read(nb.stamp))} == {"quick"}

    def test_own_parameters_leave_the_page_alone(self, life: Project) -> None:
        before = life.notebooks()[0].page.read_bytes()
        path = run(life, "sizes", {"size": 7, "budgets": 32}, "quick")
        assert path.parent == life.runs
        assert "value 7.0" in path.read_text(encoding="utf-8")
        assert life.notebooks()[0].page.read_bytes() == before
        again = path.stat().st_mtime_ns
        assert run(life, "sizes", {"size": 7, "budgets": 32}, "quick").stat().st_mtime_ns == again

    def test_failure_shows_and_others_go_on(self, life: Project) -> None:
        sizes, words = life.notebooks()
        good = words.source.read_text(encoding="utf-8")
        write_notebook(
            words.source, [("md", "# Words"), ("parameters", "times = 1"), ("code", "raise KeyError('gone')")]
        )
        write_notebook(
            sizes.source,
            [
                ("md", "# Sizes"),
                ("parameters", "budgets = [64]\nsize = 4"),
                ("code", MEASURE),
                ("code", "from myst_nb import glue\n\nglue('demo_size', float(size), display=False)"),
            ],
        )
        report = build(life, "quick")
        assert report.failed == {"demo/words": "KeyError: 'gone'"}
        assert report.ran == ["demo/sizes", "demo/words"]
        assert report.built
        html = (life.html / "book/results/demo/words.html").read_text(encoding="utf-8")
        assert "This notebook failed" in html and "gone" in html
        assert ">4.0<" in (life.html / "book/intro.html").read_text(encoding="utf-8")
        words.source.write_text(good, encoding="utf-8")
        assert build(life, "quick").ran == ["demo/words"]
        html = (life.html / "book/results/demo/words.html").read_text(encoding="utf-8")
        assert "This notebook failed" not in html

    def test_changed_page_of_the_book_is_rebuilt_without_running(self, life: Project) -> None:
        with (life.book / "intro.md").open("a", encoding="utf-8") as file:
            file.write("\nA new sentence.\n")
        report = build(life, "smoke")
        assert (report.ran, report.built) == ([], True)
        assert "A new sentence" in (life.html / "book/intro.html").read_text(encoding="utf-8")

    def test_warning_fails_the_build(self, life: Project) -> None:
        intro = (life.book / "intro.md").read_text(encoding="utf-8")
        (life.book / "intro.md").write_text(intro + "\n[nowhere](nothing.md)\n", encoding="utf-8")
        with pytest.raises(BookError, match=r"(?s)Jupyter Book failed.*nothing.md"):
            build(life, "smoke")
        (life.book / "intro.md").write_text(intro, encoding="utf-8")

    def test_terminated_build_goes_on(self, life: Project) -> None:
        sizes, words = life.notebooks()
        told_pid = life.work / "pid"
        sleep = "import os\nimport time\nfrom pathlib import Path\n\n"
        sleep += f"Path({str(told_pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
        write_notebook(words.source, [("md", "# Words"), ("parameters", "times = 1"), ("code", sleep)])
        sizes.stamp.unlink()
        before = words.page.read_bytes()
        environment = {**os.environ, "KVREPRO_ROOT": str(life.root), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "kvrepro", "build", "--profile", "smoke", "--jobs", "2"]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        told = itertools.takewhile(lambda line: "demo/sizes: done" not in line, process.stderr)
        assert any("demo/words (" in line for line in list(told))  # it runs beside the other
        while not (told_pid.exists() and told_pid.read_text()):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert "stopped" in process.stderr.read()
        assert process.wait(timeout=60) == 130
        with pytest.raises(ProcessLookupError):
            os.kill(int(told_pid.read_text()), 0)  # its kernel is gone
        assert words.page.read_bytes() == before
        write_notebook(words.source, [("md", "# Words"), ("parameters", "times = 1"), ("code", "print('back')")])
        report = build(life, "smoke")
        assert report.ran == ["demo/words"]  # the other one was finished before the signal
        assert report.failed == {}

    def test_two_builds_at_once(self, life: Project) -> None:
        with locked(life.work / "build.lock"), pytest.raises(BookError, match="another build"):
            build(life, "smoke")


def test_toc_files_are_in_reading_order(project: Project) -> None:
    assert toc_files(project)[0] == "book/intro"
    assert toc_files(project)[-1] == "book/status"
