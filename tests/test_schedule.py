"""Several notebooks at a time: order, limits, what runs alone, and what happens to the others when one goes wrong."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from book_project import make_project, write_notebook

from kvrepro import executors
from kvrepro.book import BookError, Notebook, Project
from kvrepro.book import build as building
from kvrepro.book.execute import Outcome
from kvrepro.book.schedule import Round, Run, default_jobs, plan, run_together, time_left
from kvrepro.book.stamps import Sources, Stamp

SOON_S = 20  # how long a test waits for what happens at once, unless something is wrong


def nothing() -> None:
    """Kills nothing."""


class TestDefault:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.set = monkeypatch.setattr
        self.set(torch.cuda, "is_available", lambda: False)
        self.resources(cores=2, gib=8)

    def resources(self, cores: int, gib: float) -> None:
        pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gib * 2**30 / 4096)}
        self.set(torch, "get_num_threads", lambda: cores)
        self.set(os, "sysconf", pages.__getitem__)

    @pytest.mark.parametrize(
        ("cores", "gib", "jobs"), [(1, 64, 1), (2, 7.6, 2), (4, 16, 4), (4, 7.6, 2), (64, 512, 4), (8, 2, 1)]
    )
    def test_one_a_core_as_far_as_memory_goes(self, cores: int, gib: float, jobs: int) -> None:
        self.resources(cores, gib)
        assert default_jobs() == jobs

    def test_one_with_a_gpu(self) -> None:
        self.set(torch.cuda, "is_available", lambda: True)
        assert default_jobs() == 1

    def test_one_with_a_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(executors.VARIABLE, "dask://localhost:8786")
        assert default_jobs() == 1

    @pytest.mark.parametrize(("gib", "workers", "jobs"), [(64, 5, 3), (20, 5, 1), (8, 1, 1), (11, 1, 2)])
    def test_three_beside_workers_whose_memory_counts(self, gib: float, workers: int, jobs: int) -> None:
        self.resources(cores=1, gib=gib)
        self.set(torch.cuda, "is_available", lambda: True)
        assert default_jobs(workers) == jobs

    @pytest.mark.parametrize(("cores", "jobs", "threads"), [(8, 1, None), (8, 2, 4), (8, 3, 2), (2, 2, 1), (2, 4, 1)])
    def test_threads_share_the_cores(self, cores: int, jobs: int, threads: int | None) -> None:
        self.resources(cores, 64)
        assert Round([Run("a/b")], jobs).threads == threads


def listed(*names: str) -> list[Notebook]:
    """Notebooks; those called timed run alone, of those called both the times do."""
    kinds = {"timed": "whole", "both": "times"}
    here = Path()
    return [Notebook(name, "", {}, here, here, alone=kinds.get(name.partition(" ")[0], "")) for name in names]


class TestPlan:
    SECONDS: Mapping[str, float] = {"a": 5, "b": 20, "d": 10, "both": 15, "timed": 60, "timed too": 70}

    def test_longest_first_and_alone_last(self) -> None:
        rounds = plan(listed("timed", "a", "b", "both", "c", "d", "timed too"), self.SECONDS, 2)
        first = [Run("c"), Run("b"), Run("both", times=False), Run("d"), Run("a")]
        assert rounds == [Round(first, 2), Round([Run("timed"), Run("both"), Run("timed too")], 1)]

    def test_one_at_a_time_keeps_the_order(self) -> None:
        names = ["timed", "a", "both", "b"]
        assert plan(listed(*names), self.SECONDS, 1) == [Round([*map(Run, names)], 1)]

    @pytest.mark.parametrize("jobs", [1, 2])
    def test_workers_are_gone_when_times_are_measured(self, jobs: int) -> None:
        rounds = plan(listed("timed", "a", "b", "both"), self.SECONDS, jobs, workers=5)
        first = [Run("b"), Run("both", times=False), Run("a")]
        assert rounds == [Round(first, jobs, workers=5), Round([Run("timed"), Run("both")], 1)]
        assert plan(listed("both"), {}, jobs, workers=5) == [Round([Run("both", False)], 1, 5), Round([Run("both")], 1)]
        assert plan(listed("timed"), {}, jobs, workers=5) == [Round([Run("timed")], 1)]
        assert plan(listed("a"), {}, jobs, workers=5) == [Round([Run("a")], 1, 5)]
        assert plan([], {}, jobs, workers=5) == []

    def test_no_more_at_a_time_than_there_are(self) -> None:
        assert plan(listed("timed", "a"), self.SECONDS, 4) == [Round([Run("timed"), Run("a")], 1)]
        assert plan(listed("both"), self.SECONDS, 4) == [Round([Run("both")], 1)]
        assert plan(listed("a", "b"), self.SECONDS, 4) == [Round([Run("b"), Run("a")], 2)]
        assert plan(listed("timed", "timed too"), {}, 4) == [Round([Run("timed"), Run("timed too")], 1)]
        assert plan([], {}, 4) == []

    @pytest.mark.parametrize(
        ("running", "waiting", "jobs", "left"),
        [
            ([], [], 2, 0),
            ([], [5, 4, 3], 1, 12),
            ([], [5, 4, 3], 2, 7),
            ([6, 1], [2, 2], 2, 6),
            ([6], [2, 2], 2, 6),
            ([1], [], 3, 1),
        ],
    )
    def test_time_left(self, running: list[float], waiting: list[float], jobs: int, left: float) -> None:
        assert time_left(running, waiting, jobs) == left


@functools.cache
def same_sources() -> Sources:
    """The package as it is, read once."""
    return Sources()


class Stub:
    """Work that lasts until it is told to end, and says what ran beside it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.beside: dict[str, set[str]] = {}
        self._now: set[str] = set()
        self._changed = threading.Condition()
        self.killed = threading.Event()

    @contextmanager
    def running(self, name: str):  # noqa: ANN201
        with self._changed:
            self.begun.append(name)
            self._now.add(name)
            for other in self._now:
                self.beside.setdefault(other, set()).update(self._now - {other})
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._now.remove(name)

    def wait_for(self, *names: str) -> None:
        """Wait until these have begun."""
        with self._changed:
            assert self._changed.wait_for(lambda: set(names) <= set(self.begun), SOON_S), f"{names} did not begin"


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch, heeds_interrupts: None) -> Callable[[], None]:
    """Sends the main thread Ctrl-C's signal, once it waits for what runs."""
    main, waits = threading.main_thread().ident, threading.Event()
    assert main is not None

    def wait(*given: Any, **options: Any) -> Any:
        waits.set()
        return concurrent.futures.wait(*given, **options)

    def send() -> None:
        assert waits.wait(SOON_S)
        signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr("kvrepro.book.schedule.wait", wait)
    return send


class TestTogether:
    def test_so_many_at_a_time_and_in_order(self) -> None:
        stub, names = Stub(), [*"abcdef"]
        meet = threading.Barrier(2, timeout=SOON_S)  # two must be there at a time

        def work(name: str) -> None:
            with stub.running(name):
                meet.wait()

        run_together(names, work, 2, nothing)
        assert sorted(stub.begun) == names
        for first in (0, 2, 4):
            assert set(stub.begun[first : first + 2]) == set(names[first : first + 2])
        assert all(len(beside) >= 1 for beside in stub.beside.values())

    def test_one_at_a_time(self) -> None:
        stub = Stub()

        def work(name: str) -> None:
            with stub.running(name):
                pass

        run_together([*"abc"], work, 1, nothing)
        assert stub.begun == [*"abc"]
        assert stub.beside == {"a": set(), "b": set(), "c": set()}

    def endless(self, stub: Stub, otherwise: Callable[[str], None]) -> Callable[[str], None]:
        """Work that only ends when it is killed, but for item ``a``."""

        def work(name: str) -> None:
            with stub.running(name):
                if name == "a":
                    otherwise(name)
                assert stub.killed.wait(SOON_S), "nobody killed it"

        return work

    def test_an_error_ends_the_others(self) -> None:
        stub = Stub()

        def fail(name: str) -> None:
            stub.wait_for("b")
            raise BookError("the disk is full")

        with pytest.raises(BookError, match="the disk is full"):
            run_together([*"abcd"], self.endless(stub, fail), 2, stub.killed.set)
        assert {"a", "b"} <= set(stub.begun) <= {"a", "b", "c"}  # c may take the place of a before the error is seen
        assert not stub._now

    def test_ctrl_c_ends_all(self, interrupt: Callable[[], None]) -> None:
        stub = Stub()

        def stop(name: str) -> None:
            stub.wait_for("b")
            interrupt()

        with pytest.raises(KeyboardInterrupt):
            run_together([*"abcd"], self.endless(stub, stop), 2, stub.killed.set)
        assert sorted(stub.begun) == ["a", "b"]
        assert not stub._now


class TestBuild:
    """A build of five notebooks, whose kernels are stubs."""

    @pytest.fixture
    def project(self, tmp_path: Path) -> Project:
        project = make_project(tmp_path / "project")
        entries = []
        for name in ("demo/timed", "demo/a", "demo/b", "demo/c", "demo/timed_too"):
            write_notebook(project.root / f"notebooks/{name}.ipynb", [("md", "# A page"), ("parameters", "size = 1")])
            entries.append({"name": name, "title": name, "profiles": {}})
            if "timed" in name:
                entries[-1]["alone"] = "whole"
        entries[2]["seconds"], entries[3]["seconds"] = {"quick": 5}, {"quick": 50}
        project.index.write_text(yaml.safe_dump(entries), encoding="utf-8")
        toc = yaml.safe_load((project.root / "_toc.yml").read_text(encoding="utf-8"))
        toc["chapters"] = [{"file": f"book/results/{entry['name']}"} for entry in entries]
        (project.root / "_toc.yml").write_text(yaml.safe_dump(toc), encoding="utf-8")
        (project.book / "intro.md").write_text("# Demo\n", encoding="utf-8")
        return project

    def stubbed(
        self, monkeypatch: pytest.MonkeyPatch, stub: Stub, inside: Callable[[str, Any], str] = lambda name, kernels: ""
    ) -> dict[str, int | None]:
        """Put a stub in place of kernels; returns the threads that each notebook was given."""
        threads = {}

        def execute(
            project: Project, notebook: Notebook, parameters: object, progress: Path, **options: Any
        ) -> Outcome:
            with stub.running(notebook.name):
                threads[notebook.name] = options["threads"]
                assert options["times"] or notebook.alone == "times"
                failure = inside(notebook.name, options["kernels"])
            return Outcome(nbformat.read(notebook.source, as_version=4), 1.0, failure)

        monkeypatch.setattr(building, "execute", execute)
        monkeypatch.setattr(building, "stage", lambda *_: [])  # what the pages show is another matter
        monkeypatch.setattr(building, "Sources", same_sources)
        return threads

    def test_what_measures_times_runs_alone(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        stub, meet = Stub(), threading.Barrier(3, timeout=SOON_S)

        def inside(name: str, kernels: object) -> str:
            if "timed" not in name:
                meet.wait()
            return ""

        threads = self.stubbed(monkeypatch, stub, inside)
        report = building.build(project, "quick", jobs=3, site=False)
        assert report.failed == {}
        assert stub.begun[-2:] == ["demo/timed", "demo/timed_too"]
        assert stub.beside["demo/timed"] == stub.beside["demo/timed_too"] == set()
        assert stub.beside["demo/a"] == {"demo/b", "demo/c"}
        assert threads == {"demo/timed": None, "demo/timed_too": None, "demo/a": 1, "demo/b": 1, "demo/c": 1}

    def test_only_its_times_run_alone(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        index = project.index.read_text(encoding="utf-8")
        project.index.write_text(index.replace("alone: whole", "alone: times"), encoding="utf-8")
        stub = Stub()
        self.stubbed(monkeypatch, stub, lambda name, kernels: "" if stub.begun.count(name) == 2 else "TimesLater: h2o")
        report = building.build(project, "quick", ["demo/timed", "demo/timed_too"], jobs=2, site=False)
        assert sorted(stub.begun[:2]) == stub.begun[2:] == ["demo/timed", "demo/timed_too"]
        assert (report.ran, report.failed) == (["demo/timed", "demo/timed_too"], {})

    def test_workers_measure_while_nothing_is_timed(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str | None] = []

        @contextmanager
        def working(count: int, folder: Path, log: Path) -> Iterator[str]:
            asked.append(f"{count} in {folder.name}")
            yield "dask://127.0.0.1:1"
            asked.append("gone")

        def inside(name: str, kernels: object) -> str:
            asked.append(os.environ.get(executors.VARIABLE))
            return ""

        monkeypatch.setattr(building.crew, "working", working)
        self.stubbed(monkeypatch, Stub(), inside)
        report = building.build(project, "quick", ["demo/timed", "demo/a", "demo/b"], jobs=1, workers=2, site=False)
        assert report.failed == {}
        assert asked == ["2 in project", "dask://127.0.0.1:1", "dask://127.0.0.1:1", "gone", None]
        asked.clear()
        assert building.build(project, "quick", ["demo/a"], workers=2, site=False).ran == asked == []

    def test_the_default_follows_the_machine(self, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(building, "default_jobs", lambda workers: 1)
        stub = Stub()
        self.stubbed(monkeypatch, stub)
        building.build(project, "quick", site=False)
        assert stub.begun == ["demo/timed", "demo/a", "demo/b", "demo/c", "demo/timed_too"]

    def test_a_failure_is_told_by_name_and_the_others_go_on(
        self, project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.stubbed(monkeypatch, Stub(), lambda name, kernels: "KeyError: 'gone'" if name == "demo/c" else "")
        report = building.build(project, "quick", jobs=2, site=False)
        assert report.failed == {"demo/c": "KeyError: 'gone'"}
        assert len(report.ran) == 5
        told = capfd.readouterr().err
        assert "      demo/c: FAILED after 1 s: KeyError: 'gone'\n" in told
        assert "      demo/a: done in 1 s\n" in told

    def test_what_was_killed_is_not_kept(
        self, project: Project, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[], None]
    ) -> None:
        stub = Stub()

        def inside(name: str, kernels: Any) -> str:
            if name == "demo/a":  # the first, for nobody knows how long it takes; then c and b
                stub.wait_for("demo/b")
                interrupt()
            if name != "demo/c":
                while not kernels.killed:
                    threading.Event().wait(0.01)
                return "the kernel died"
            return ""

        self.stubbed(monkeypatch, stub, inside)
        with pytest.raises(KeyboardInterrupt):
            building.build(project, "quick", jobs=2, site=False)
        assert stub.begun == ["demo/a", "demo/c", "demo/b"]
        assert [nb.name for nb in project.notebooks() if Stamp.read(nb.stamp)] == ["demo/c"]
        self.stubbed(monkeypatch, stub := Stub())
        building.build(project, "quick", jobs=2, site=False)
        assert sorted(stub.begun) == ["demo/a", "demo/b", "demo/timed", "demo/timed_too"]
