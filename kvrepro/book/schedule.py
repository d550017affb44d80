"""Several notebooks at a time: how many this machine takes, in which order, and how long that will be."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

from kvrepro import executors

#: More would wait for the longest notebook, which is a fifth of the work of those that may run beside others.
MOST_JOBS = 4
_JOB_BYTES = 3 << 30  # a kernel with the embedded model takes about half of it
_POLL_S = 1.0  # a signal that comes just before a wait is noticed after it

T = TypeVar("T")


def default_jobs() -> int:
    """Notebooks that run at a time unless the user says how many: one a core, as far as memory goes, 4 at most.

    One with a GPU or a cluster of workers, which notebooks would only take from each other. ``OMP_NUM_THREADS`` bounds
    the cores that count.
    """
    if torch.cuda.is_available() or executors.scheduler() is not None:
        return 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(torch.get_num_threads(), MOST_JOBS, memory // _JOB_BYTES))


@dataclass(frozen=True)
class Round:
    """Notebooks that run side by side.

    Attributes:
        names: in the order in which they begin.
        jobs: how many run at a time.
    """

    names: Sequence[str]
    jobs: int

    @property
    def threads(self) -> int | None:
        """Threads of each, so that together they use the cores once; None, torch's choice, for one at a time."""
        return None if self.jobs == 1 else max(1, torch.get_num_threads() // self.jobs)


def plan(names: Sequence[str], alone: Collection[str], seconds: Mapping[str, float], jobs: int) -> list[Round]:
    """What runs when: first what may run side by side, then, one by one, what must run alone.

    The longest begin first, those of unknown length before them: then the cores are busy to the end.

    Args:
        names: the notebooks, in the order of the index, which is kept where one runs at a time.
        alone: those whose measured times others would disturb.
        seconds: how long each is expected to take, where that is known.
        jobs: how many may run at a time.
    """
    together = [name for name in names if name not in alone]
    jobs = min(jobs, len(together))
    if jobs <= 1:
        return [Round(names, 1)] if names else []
    together.sort(key=lambda name: -seconds.get(name, float("inf")))
    after = [name for name in names if name in alone]
    return [Round(together, jobs), *([Round(after, 1)] if after else [])]


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
