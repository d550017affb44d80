"""Make the book: run the notebooks that need it, write what is generated, build the pages."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import nbformat

from kvrepro import executors
from kvrepro.book import workers as crew
from kvrepro.book.checks import check_profile_runs, default_profile
from kvrepro.book.execute import Kernels, Outcome, downloads, environment, execute
from kvrepro.book.files import locked, write_text
from kvrepro.book.parameters import check, defaults
from kvrepro.book.progress import Reporter, duration
from kvrepro.book.project import BookError, Notebook, Project, check_profile
from kvrepro.book.schedule import Run, default_jobs, plan, run_together
from kvrepro.book.site import build_site, check_toc, stage
from kvrepro.book.stamps import Sources, Stamp, count_statuses, plain, source_hash, why
from kvrepro.records import write_records


@dataclass(frozen=True)
class Report:
    """What a build did.

    Attributes:
        profile: the profile built.
        ran: notebooks that were run.
        failed: what went wrong, by notebook.
        missing: notebooks that were not run yet.
        built: whether the pages were built; False when they were up to date.
        front: the page to open.
    """

    profile: str
    ran: list[str]
    failed: dict[str, str]
    missing: list[str]
    built: bool
    front: Path


@dataclass(frozen=True)
class _Task:
    """A notebook to run, with what differs from its parameters cell, and why it runs."""

    notebook: Notebook
    parameters: Mapping[str, Any]
    why: str

    def all_parameters(self) -> dict[str, Any]:
        """Every parameter with the value it runs with."""
        return {**defaults(self.notebook.source), **self.parameters}

    def expected(self, profile: str) -> float | None:
        """Seconds it took the last time it went through in this profile, else what the index says, None if nothing."""
        stamp = Stamp.read(self.notebook.stamp)
        if stamp and stamp.profile == profile and not stamp.failure:
            return stamp.seconds
        return self.notebook.expected.get(profile)


def build(
    project: Project,
    profile: str | None = None,
    names: Sequence[str] = (),
    *,
    force: bool = False,
    site: bool = True,
    jobs: int | None = None,
    workers: int | None = None,
) -> Report:
    """Run the notebooks whose pages no longer hold, then build the pages when something they show changed.

    Args:
        project: the checkout.
        profile: ``smoke``, ``quick``, ``gpu`` or ``paper``; by default ``gpu`` where CUDA is found, else ``quick``.
        names: only these notebooks; the other pages stay as they are.
        force: run the notebooks although their pages still hold.
        site: build the pages afterwards.
        jobs: notebooks that run at a time, each in a process of its own; by default as many as this machine takes
            (:func:`kvrepro.book.schedule.default_jobs`). Those whose times others would disturb run alone in any case.
        workers: processes of this machine that measure the notebooks' cells, for as long as the build runs
            (:mod:`kvrepro.book.workers`); by default each notebook's own process does. Times are measured without them.

    Returns:
        What was done. Notebooks that failed are in ``failed``: their pages show how.

    Raises:
        RequestError: an unknown profile, notebook or parameter, or workers beside another executor; before anything
            runs.
        BookError: the profile cannot run here, or the pages could not be built.
        kvrepro.executors.ExecutorError: the cluster that was asked for does not answer, or the workers cannot start.
        KeyboardInterrupt: stopped; what was finished is kept, and the next build goes on from there.
    """
    if workers is not None:
        crew.check(workers)
    profile = check_profile(profile or default_profile())
    every = project.notebooks()
    sources = Sources()
    tasks = _tasks(project.select(names), profile, sources, force)
    check_toc(project, every)
    if tasks:
        executors.check()
        check_profile_runs(profile, [task.all_parameters() for task in tasks])
    with locked(project.work / "build.lock"), _terminable():
        _run_all(project, tasks, profile, sources, jobs or default_jobs(workers or 0), workers or 0)
        missing = stage(project, every, sources)
        failed = {notebook.name: reason for notebook in every if (reason := _failure(notebook))}
        built = site and build_site(project, strict=not failed and not missing)
    return Report(profile, [task.notebook.name for task in tasks], failed, missing, built, project.front)


def run(
    project: Project, name: str, given: Mapping[str, Any], profile: str | None = None, *, force: bool = False
) -> Path:
    """Run one notebook: the book's own page, or with parameters of one's own a copy under ``results/runs``.

    Args:
        project: the checkout.
        name: the notebook.
        given: parameters to set; they go over those of the profile.
        profile: as in :func:`build`.
        force: run it although it was run with these parameters before and nothing changed.

    Returns:
        The executed notebook.

    Raises:
        RequestError: an unknown profile, notebook or parameter; before anything runs.
        BookError: the profile cannot run here, or the notebook failed.
        kvrepro.executors.ExecutorError: the cluster that was asked for does not answer.
    """
    profile = check_profile(profile or default_profile())
    notebook = project.select([name])[0]
    known = defaults(notebook.source)
    parameters = check(notebook.name, known, {**notebook.parameters(profile), **given})
    if given:
        digest = hashlib.sha256(json.dumps(plain({**known, **parameters}), sort_keys=True).encode()).hexdigest()[:8]
        notebook = replace(notebook, page=project.runs / f"{notebook.name.replace('/', '-')}-{digest}.ipynb")
    sources = Sources()
    reason = why(notebook, parameters, sources) or ("asked for" if force else "")
    if reason:
        task = _Task(notebook, parameters, reason)
        executors.check()
        check_profile_runs(profile, [task.all_parameters()])
        with locked(project.work / "build.lock"), _terminable():
            _run_all(project, [task], "" if given else profile, sources)
    if failure := _failure(notebook):
        raise BookError(f"{notebook.name} failed: {failure}; it is in {notebook.page} as far as it ran")
    return notebook.page


def _tasks(chosen: Sequence[Notebook], profile: str, sources: Sources, force: bool) -> list[_Task]:
    """What is to be run, every parameter checked."""
    tasks = []
    for notebook in chosen:
        parameters = check(notebook.name, defaults(notebook.source), notebook.parameters(profile))
        reason = why(notebook, parameters, sources) or ("asked for" if force else "")
        if reason:
            tasks.append(_Task(notebook, parameters, reason))
        elif (stamp := Stamp.read(notebook.stamp)) and stamp.profile != profile:
            replace(stamp, profile=profile).write(notebook.stamp)  # the same parameters in both
    return tasks


def _run_all(
    project: Project, tasks: Sequence[_Task], profile: str, sources: Sources, jobs: int = 1, workers: int = 0
) -> None:
    """Run notebooks and keep what comes of each as soon as it is done."""
    by_name = {task.notebook.name: task for task in tasks}
    known = {name: seconds for name, task in by_name.items() if (seconds := task.expected(profile)) is not None}
    rounds = plan([task.notebook for task in tasks], known, jobs, workers)
    kernels = Kernels()

    with Reporter(rounds, known) as reporter:

        def carry_out(run: Run, threads: int | None) -> None:
            task = by_name[run.notebook]
            options = {"threads": threads, "kernels": kernels, "times": run.times}
            with reporter.running(run, task.why) as feed:
                outcome = execute(project, task.notebook, task.parameters, feed, **options)
                if kernels.killed:
                    return  # it did not fail by itself: the next build runs it again
                if run.times:
                    keep(task.notebook, task.parameters, outcome, profile, sources)
            failure = _failure(task.notebook) if run.times else ""  # an error before the times comes again
            took = duration(outcome.seconds)
            reporter.say(f"      {run}: {f'FAILED after {took}: {failure}' if failure else f'done in {took}'}")

        for each in rounds:
            with _measuring(project, each.workers) if each.workers else nullcontext():
                run_together(each.runs, partial(carry_out, threads=each.threads), each.jobs, kernels.kill)


@contextmanager
def _measuring(project: Project, workers: int) -> Iterator[None]:
    """Have so many workers measure the cells of the notebooks that are run inside."""
    log = project.work / "workers.log"
    with crew.working(workers, project.root, log) as name, environment({executors.VARIABLE: name}):
        yield


def keep(notebook: Notebook, parameters: Mapping[str, Any], outcome: Outcome, profile: str, sources: Sources) -> None:
    """Put an executed notebook and its records in place; the stamp comes last, a page without one counts as not run.

    Args:
        notebook: says where its page goes.
        parameters: what it was run with.
        outcome: what came of it.
        profile: the profile it was run for, empty for a run with parameters of one's own.
        sources: the package as it was.
    """
    notebook.stamp.unlink(missing_ok=True)
    if profile:
        downloads(outcome.notebook, notebook, bool(outcome.records))
    write_text(notebook.page, nbformat.writes(outcome.notebook) + "\n")
    notebook.records.unlink(missing_ok=True)
    if outcome.records:
        write_records(notebook.records, outcome.records)
    used = sorted({record.cell.methods for record in outcome.records})
    Stamp(
        profile=profile,
        parameters=plain(parameters),
        source=source_hash(notebook.source),
        code=sources.code(notebook.source, used),
        methods=used,
        records=[record.key for record in outcome.records],
        statuses=count_statuses(outcome.records),
        seconds=round(outcome.seconds, 1),
        environment={**outcome.environment, "date": datetime.now(UTC).isoformat(timespec="seconds")},
        failure=outcome.failure,
    ).write(notebook.stamp)


def _failure(notebook: Notebook) -> str:
    """What went wrong when the page was last run, empty for nothing."""
    stamp = Stamp.read(notebook.stamp)
    if stamp is None:
        return ""
    broken = stamp.statuses.get("error", 0)
    first = stamp.failure.strip().splitlines()[0] if stamp.failure.strip() else ""
    return first or (f"{broken} of {len(stamp.records)} values could not be measured" if broken else "")


@contextmanager
def _terminable() -> Iterator[None]:
    """Make a termination signal end a build as Ctrl-C does, with the kernels killed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
