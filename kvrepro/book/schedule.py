"""Several notebooks at a time: how many this machine takes, in which order, and how long that will be."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvrepro import executors
from kvrepro.book.project import Notebook

#: Ours. From eight on all would wait for the longest notebook, a seventh of the work of those that run side by side.
MOST_JOBS = 4
#: Beside workers: one that measures, one whose last cells keep only some of them busy, one that loads or draws.
JOBS_WITH_WORKERS = 3
_JOB_BYTES = 3 << 30  # a kernel with the embedded model takes about half of it
_POLL_S = 1.0  # a signal that comes just before a wait is noticed after it

T = TypeVar("T")


def default_jobs(workers: int = 0) -> int:
    """Notebooks that run at a time unless the user says how many: one a core, as far as memory goes, 4 at most.

    One with a GPU or a cluster of workers, which notebooks would only take from each other. ``OMP_NUM_THREADS`` bounds
    the cores that count.

    Args:
        workers: processes on this machine that measure for the notebooks, which then need no core of their own.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if workers:
        return max(1, min(JOBS_WITH_WORKERS, memory // _JOB_BYTES - workers))
    if torch.cuda.is_available() or executors.scheduler() is not None:
        return 1
    return max(1, min(torch.get_num_threads(), MOST_JOBS, memory // _JOB_BYTES))


@dataclass(frozen=True)
class Run:
    """One run of a notebook.

    Attributes:
        notebook: its name.
        times: whether times are measured; a run without ends before the first, and the notebook runs again alone.
    """

    notebook: str
    times: bool = True

    def __str__(self) -> str:
        return self.notebook if self.times else f"{self.notebook} without its times"


@dataclass(frozen=True)
class Round:
    """Runs side by side.

    Attributes:
        runs: in the order in which they begin.
        jobs: how many at a time.
        workers: processes that measure for them; 0 for none, as where times are measured.
    """

    runs: Sequence[Run]
    jobs: int
    workers: int = 0

    @property
    def threads(self) -> int | None:
        """Threads of each, so that together they use the cores once; None, torch's choice, for one at a time."""
        return None if self.jobs == 1 else max(1, torch.get_num_threads() // self.jobs)


def plan(notebooks: Sequence[Notebook], seconds: Mapping[str, float], jobs: int, workers: int = 0) -> list[Round]:
    """What runs when: first what may run side by side, then, one by one, what must run alone.

    The longest begin first, those of unknown length before them: then the cores are busy to the end.
    With workers what runs alone comes last in any case, and without them.

    Args:
        notebooks: in the order of the index, which is kept where one runs at a time.
        seconds: how long each is expected to take, by name, where that is known.
        jobs: how many may run at a time.
        workers: processes that measure for those that may run side by side.
    """
    together = [Run(each.name, times=not each.alone) for each in notebooks if each.alone != "whole"]
    jobs = min(jobs, len(together))
    if jobs <= 1 and not workers:
        return [Round([Run(each.name) for each in notebooks], 1)] if notebooks else []
    together.sort(key=lambda run: -seconds.get(run.notebook, float("inf")))
    after = [Run(each.name) for each in notebooks if each.alone]
    rounds = [Round(together, jobs, workers), Round(after, 1)]
    return [each for each in rounds if each.runs]


def time_left(running: Iterable[float], waiting: Iterable[float], jobs: int) -> float:
    """Seconds until all are done: whatever ends first makes room for the next that waits.

    Args:
        running: seconds left of those that run, at most ``jobs``.
        waiting: seconds of those that wait, in order.
        jobs: how many run at a time.
    """
    ends = sorted(running)
    ends = [0.0] * (jobs - len(ends)) + ends  # a sorted list is a heap
    for seconds in waiting:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)


def run_together(items: Sequence[T], work: Callable[[T], None], jobs: int, kill: Callable[[], None]) -> None:
    """Work on items in threads, in order and so many at a time.

    Args:
        items: what there is to do.
        work: does one of them.
        jobs: how many at a time.
        kill: makes every call of ``work`` return or raise soon.

    Raises:
        Exception: the first that ``work`` raised. Like KeyboardInterrupt, it ends the others: those under way are
            killed, those that wait never begin.
    """
    with ThreadPoolExecutor(jobs) as pool:
        try:
            left = {pool.submit(work, item) for item in items}
            while left:
                done, left = wait(left, _POLL_S, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
        except BaseException:
            kill()
            pool.shutdown(cancel_futures=True)
            raise
