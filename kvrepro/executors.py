"""Where the cells of a sweep are measured: in this process, or by the workers of a Dask cluster.

``KVREPRO_EXECUTOR`` says which: ``local``, the default, which needs no Dask, or ``dask://HOST:PORT``, a scheduler
(``stored`` forbids measuring). With a scheduler, this
process then hands the cells out, one at a time to each worker, and gets their records back: workers need the package
and the data, but no folder in common. Cells that name this machine's hardware, as timings do, are measured here.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvrepro import models, provenance, texts
from kvrepro.fingerprint import PACKAGE, code_at_start, measuring_module, origin
from kvrepro.records import Cell, Record, Value, free_memory, measured

if TYPE_CHECKING:
    from distributed import Client, Future

VARIABLE = "KVREPRO_EXECUTOR"
LOCAL = "local"
#: Nobody measures: what is not stored is an error.
STORED = "stored"
#: Workers that a cell may lose before it is recorded as an error.
MOST_LOST = 3
#: Times that a cell may run out of memory beside others before that is recorded. Ours: with up to 196 workers it is
#: alone before that, unless other clients begin beside it each time.
MOST_CROWDED = 12
#: Modules whose functions keep what their next calls need, and one among them whose do for all experiments: the model.
_KEEPERS = (f"{PACKAGE}.experiments.", f"{PACKAGE}.tasks.")
_COMMON = f"{PACKAGE}.experiments.common"
_POLL_S = 0.5
_CONNECT_S = 10
_FETCH_S = 30


class ExecutorError(RuntimeError):
    """Cells cannot be measured where they should be; the message says why and what to do."""


@dataclass(frozen=True)
class Job:
    """A cell to be measured.

    Attributes:
        cell: what is measured.
        run: measures it.
        key: of its record.
        code: fingerprint of the code that measures.
    """

    cell: Cell
    run: Callable[[], Value]
    key: str
    code: str

    @property
    def shared(self) -> Hashable:
        """What is worked out once for all jobs that have it in common: one worker should measure them.

        The function's first argument says it where it has a method ``shared(cell)``, as
        :class:`kvrepro.experiments.weightedkv.Reading` does; else no two jobs have anything in common.
        """
        first = next(iter(getattr(self.run, "args", ())), None)
        return (first, first.shared(self.cell)) if hasattr(first, "shared") else self.key


def scheduler(name: str | None = None) -> str | None:
    """Address of the scheduler whose workers measure, as Dask writes it; None where this process does, or nobody.

    Args:
        name: ``local``, ``stored`` or ``dask://HOST:PORT``; what ``KVREPRO_EXECUTOR`` says by default.

    Raises:
        ValueError: none of them.
    """
    name = os.environ.get(VARIABLE, "") if name is None else name
    if name in ("", LOCAL, STORED):
        return None
    if not re.fullmatch(r"dask://(\[[0-9a-fA-F:]+\]|[^\s/:]+):\d+", name):
        raise ValueError(f"{name!r} is no executor: write {LOCAL}, {STORED}, or dask://HOST:PORT for a Dask scheduler")
    return name.replace("dask://", "tcp://")


def check() -> None:
    """Make sure, before anything is measured, that the scheduler of ``KVREPRO_EXECUTOR`` answers.

    Raises:
        ValueError: the variable names no executor.
        ExecutorError: Dask is not installed, or no scheduler is there.
    """
    if (address := scheduler()) is not None:
        with _connected(address):
            pass


def names_this_machine(cell: Cell) -> bool:
    """Whether a parameter of a cell is the name of a device of this machine: such a cell must be measured here."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    named = {value for value in cell.params.values() if isinstance(value, str)}
    return not named.isdisjoint(map(provenance.device_name, devices))


def measure(address: str, jobs: Sequence[Job], show: Callable[[str], None]) -> Iterator[Record]:
    """Have cells measured by a cluster's workers.

    Args:
        address: the scheduler's.
        jobs: what is to be measured, neighbours being those that share most of what they load.
        show: called with a text that says what runs, whenever that changes.

    Yields:
        Each job's record as soon as it is there, in any order.

    Raises:
        ExecutorError: no scheduler, or a worker that must not measure: with other code, model or text, another kind of
            device, or several cells at a time.
    """
    with _connected(address) as client:
        yield from _Sweep(client, jobs, show).records()


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    try:
        from distributed import Client
    except ImportError as error:
        raise ExecutorError(
            f"{VARIABLE}: Dask is not installed here ({error}): pip install 'kvrepro[dask]', or measure with {LOCAL}"
        ) from error
    try:
        client = Client(address, timeout=_CONNECT_S, set_as_default=False)
    except OSError as error:
        raise ExecutorError(f"no Dask scheduler answers at {address} ({error}): start one, dask scheduler") from error
    try:
        yield client
    finally:
        client.close()


# --- here: handing out ----------------------------------------------------------------------------------------------


#: Which worker holds what jobs have in common, by :attr:`Job.shared`: for the next sweep of this process.
_HOMES: dict[Hashable, str] = {}


class _Waiting:
    """Jobs in stretches of neighbours, one stretch a worker: what neighbours share is then loaded once a worker.

    Those with something in common (:attr:`Job.shared`) become neighbours and stay together: no other worker takes what
    is left of them, nor those whose common part a worker has from an earlier sweep.
    """

    def __init__(self, jobs: Sequence[Job], homes: Mapping[Hashable, str] | None = None) -> None:
        """All jobs, free.

        Args:
            jobs: in the order of the sweep.
            homes: the worker that has worked out what jobs have in common, by :attr:`Job.shared`.
        """
        groups: dict[Hashable, list[Job]] = {}
        for job in jobs:
            groups.setdefault(job.shared, []).append(job)
        homes = dict(homes or {})
        self._free = [[job for shared, group in groups.items() if shared not in homes for job in group]]  # no worker's
        self._kept: dict[str, list[Job]] = {}  # by their home
        for shared, group in groups.items():
            if shared in homes:
                self._kept.setdefault(homes[shared], []).extend(group)
        self._own: dict[str, list[Job]] = {}
        self._last: dict[str, Job] = {}  # that a worker took

    def __len__(self) -> int:
        """The jobs that wait."""
        return sum(map(len, [*self._free, *self._own.values(), *self._kept.values()]))

    @property
    def owners(self) -> set[str]:
        """The workers that have a stretch, or jobs of their own from an earlier sweep."""
        return {*self._own, *self._kept}

    def take(self, worker: str) -> Job | None:
        """The next job for a worker, None for none.

        First what it is the home of, then its stretch, then a free one, then the second half of the longest.
        """
        if self._kept.get(worker):
            return self._kept[worker].pop(0)
        if not self._own.get(worker):
            self._own[worker] = max(self._free, key=len, default=[])
            self._free = [stretch for stretch in self._free if stretch and stretch is not self._own[worker]]
        if not self._own[worker]:
            owner = max(self._own, key=lambda name: len(self._own[name]) - self._cut(name))
            stretch, cut = self._own[owner], self._cut(owner)
            self._own[worker], stretch[cut:] = stretch[cut:], []
        if not self._own[worker]:
            return None
        self._last[worker] = self._own[worker].pop(0)
        return self._last[worker]

    def _cut(self, owner: str) -> int:
        """Where a worker's stretch can be cut: the place nearest to its middle between jobs with nothing in common."""
        stretch = self._own[owner]
        before = [self._last.get(owner), *stretch]
        places = [i for i, job in enumerate(stretch) if before[i] is None or before[i].shared != job.shared]
        return min(places, key=lambda i: abs(i - len(stretch) // 2), default=len(stretch))

    def leave(self, worker: str, job: Job | None = None) -> None:
        """Free the jobs of a worker that is gone, behind the one that it lost."""
        left = [self._kept.pop(worker, []), self._own.pop(worker, [])]
        if job is not None:
            next((part for part in left if part and part[0].shared == job.shared), left[1]).insert(0, job)
        self._free += left
        self._last.pop(worker, None)

    def put_back(self, job: Job) -> None:
        """Have a job measured again: after those that wait and have something in common with it, else where one can."""
        for stretch in [*self._kept.values(), *self._own.values(), *self._free]:
            places = [i for i, other in enumerate(stretch) if other.shared == job.shared]
            if places:
                stretch.insert(places[-1] + 1, job)
                return
        self._free.append([job])


@dataclass
class _Run:
    """A cell at a worker.

    Attributes:
        worker: its address.
        job: what it measures.
        beside: most other workers that were seen at work, for whomever, while it did.
    """

    worker: str
    job: Job
    beside: int = 0


class _Sweep:
    """One sweep: which worker measures what, and what came of it."""

    def __init__(self, client: Client, jobs: Sequence[Job], show: Callable[[str], None]) -> None:
        self._client = client
        self._waiting = _Waiting(jobs, _HOMES)
        self._running: dict[Future, _Run] = {}
        self._lost: Counter[str] = Counter()  # workers, by the key of what they measured
        self._crowded: Counter[str] = Counter()  # times that memory ran out beside others, likewise
        self._room = math.inf  # workers at work, for whomever, up to which cells are handed out: memory takes no more
        self._name = uuid.uuid4().hex[:8]  # another client may have the same cell measured: each has a task of its own
        self._show, self._shown = show, ""

    def records(self) -> Iterator[Record]:
        """The records as they come. Whatever ends this early, cells that wait are never begun."""
        from distributed import CancelledError

        try:
            while self._waiting or self._running:
                workers = self._workers()
                yield from self._recall(workers)
                self._hand_out(workers)
                for future in self._finished():
                    yield from self._fetch(future)
        except (OSError, CancelledError) as error:  # what Dask makes of a connection that broke
            raise ExecutorError(f"the Dask scheduler is gone ({error}). The records that came back are kept") from error
        finally:
            if self._client.status == "running":
                self._client.cancel(list(self._running), force=True)

    def _workers(self) -> dict[str, Any]:
        """What the scheduler knows of each worker that may measure, by address: those with a GPU where there is one."""
        if self._client.status != "running":
            raise OSError("the connection was lost")
        # Not scheduler_info(): what it returns may be a copy kept from before, without any worker.
        workers = self._client.sync(self._client.scheduler.identity, n_workers=-1)["workers"]
        with_gpu = {address: about for address, about in workers.items() if about["resources"].get("GPU", 0) >= 1}
        self._resources = {"GPU": 1} if with_gpu or torch.cuda.is_available() else {}
        return with_gpu if self._resources else workers

    def _recall(self, workers: dict[str, Any]) -> Iterator[Record]:
        """Take back what workers that are gone were measuring; yields the records of cells given up."""
        for future, run in list(self._running.items()):
            if run.worker not in workers:
                self._client.cancel([future], force=True)
                yield from self._lose(future)
        there = {worker for worker, about in workers.items() if about["status"] == "running"}
        for worker in self._waiting.owners - there:  # gone while it measured nothing of this sweep, or paused
            self._waiting.leave(worker)

    def _lose(self, future: Future) -> Iterator[Record]:
        run = self._running.pop(future)
        self._lost[run.job.key] += 1
        given_up = self._lost[run.job.key] >= MOST_LOST
        self._waiting.leave(run.worker, None if given_up else run.job)
        if given_up:
            yield _given_up(run.job)

    def _hand_out(self, workers: dict[str, Any]) -> None:
        """Give idle workers their next cells, and show what runs. One at another client's cell is not idle."""
        busy = self._busy()
        for worker, about in workers.items():
            idle = worker not in busy and about["status"] == "running" and len(busy) < self._room
            if self._waiting and idle and (job := self._waiting.take(worker)) is not None:
                self._running[self._submit(worker, job)] = _Run(worker, job)
                busy.add(worker)
        for run in self._running.values():
            run.beside = max(run.beside, len(busy - {run.worker}))
        labels = [run.job.cell.label() for run in self._running.values()]
        more = f", and {len(labels) - 1} more" if labels[1:] else ""
        missing = "waiting for a worker" + (" with --resources GPU=1" if self._resources and not workers else "")
        text = f"{labels[0]}{more}" if labels else missing
        if text != self._shown:
            self._show(text)
            self._shown = text

    def _busy(self) -> set[str]:
        """The workers at work, for whomever."""
        there = self._client.sync(self._client.scheduler.processing)
        return {run.worker for run in self._running.values()} | {worker for worker, tasks in there.items() if tasks}

    def _submit(self, worker: str, job: Job) -> Future:
        tries = self._lost[job.key] + self._crowded[job.key]
        return self._client.submit(
            _measure,
            _Order.of(job),
            key=f"{job.cell.paper}/{job.cell.experiment}-{job.key[:16]}-{self._name}-{tries}",
            workers=[worker],
            resources=self._resources,
            pure=False,
        )

    def _finished(self) -> list[Future]:
        """Cells that are done, once there is one or it is time to look at the workers again."""
        from distributed import TimeoutError, wait

        if not self._running:
            time.sleep(_POLL_S)
            return []
        try:
            with self._client.as_current():  # the user may have a client of their own
                return list(wait(list(self._running), timeout=_POLL_S, return_when="FIRST_COMPLETED").done)
        except TimeoutError:
            return []

    def _fetch(self, future: Future) -> Iterator[Record]:
        """The record of a cell that is done, or why there is none.

        That memory ran out beside other workers, which may share it, says nothing of the cell: it is measured again.
        """
        from distributed import KilledWorker, TimeoutError

        worker = self._running[future].worker
        try:
            line = future.result(timeout=_FETCH_S)
        except TimeoutError:
            return  # the worker went with its result: the next round takes the cell back
        except KilledWorker:
            yield from self._lose(future)
            return
        except ExecutorError as error:
            raise ExecutorError(f"the worker {worker} must not measure: {error}") from error
        except Exception as error:  # whatever kept it from reading what it was sent
            raise ExecutorError(
                f"the worker {worker} cannot measure ({type(error).__name__}: {error}): start it in an environment "
                "with this package and what it needs"
            ) from error
        run, record = self._running.pop(future), Record.parse(line)
        if record.status == "oom" and self._crowded_out(run):
            self._waiting.put_back(run.job)
            return
        if run.job.shared != run.job.key:
            _HOMES[run.job.shared] = run.worker
        yield record

    def _crowded_out(self, run: _Run) -> bool:
        """Whether memory that ran out may have been others', so that the cell is measured again with fewer at work.

        Workers that are idle then forget what they keep: it may be what took the room.
        """
        busy = self._busy()
        beside = max(run.beside, len(busy - {run.worker}))
        if not beside:
            self._room = math.inf  # too large on its own: that held nobody up
            return False
        self._client.run(_forget, workers=list(self._workers().keys() - busy), on_error="ignore")
        self._crowded[run.job.key] += 1
        self._room = min(self._room, max(1, beside * 3 // 4))
        return self._crowded[run.job.key] <= MOST_CROWDED


def _given_up(job: Job) -> Record:
    """The record of a cell that nobody lived to tell of; its provenance says nothing of a device."""
    reason = (
        f"{MOST_LOST} workers were lost while they measured it; their logs say more. Often the machine's memory is full"
    )
    about = provenance.describe(provenance.Meter(), job.code, measuring_module(job.run))
    return Record(job.key, job.cell, Value(None, n=0), "error", reason, about)


# --- the way to a worker, and there ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """A job on its way to a worker, with what the worker has to have in common with this process.

    Attributes:
        cell: as in the job.
        key: as in the job.
        code: as in the job.
        modules: where the measuring code begins.
        own: measuring code outside the package, which travels with the function.
        device: kind of device that this process computes on by default: cells hold the number format that follows.
        named: which of ``model`` and ``data`` have, in this process, the sha256 in the cell under their name.
        function: the measuring function, pickled; for a ``partial`` what it calls.
        arguments: a partial's arguments, pickled one by one: what several cells share is unpickled once.
        keywords: the same by name.
    """

    cell: Cell
    key: str
    code: str
    modules: list[str]
    own: str
    device: str
    named: list[str]
    function: bytes
    arguments: list[bytes]
    keywords: dict[str, bytes]

    @classmethod
    def of(cls, job: Job) -> _Order:
        """Pack a job.

        Raises:
            ExecutorError: its function cannot be pickled.
        """
        run = job.run if isinstance(job.run, functools.partial) else functools.partial(job.run)
        modules, own = origin(job.run)
        named = [
            kind for kind, look_up in _lookups(job.cell).items() if look_up() == getattr(job.cell, f"{kind}_sha256")
        ]
        try:
            with _by_value(measuring_module(job.run)):
                function, arguments = _dumps(run.func), [_dumps(each) for each in run.args]
                keywords = {name: _dumps(each) for name, each in run.keywords.items()}
        except Exception as error:  # whatever an object's own pickling raises
            raise ExecutorError(
                f"{job.cell.label()}: what measures it cannot be sent to a worker ({type(error).__name__}: {error}); "
                f"measure it with {LOCAL}"
            ) from error
        device = models.resolve_device().type
        return cls(job.cell, job.key, job.code, modules, own, device, named, function, arguments, keywords)

    def problem(self, threads: int) -> str | None:
        """Why this process must not measure the cell, None if it may.

        Args:
            threads: cells that this process measures at a time.
        """
        if threads != 1:
            return (
                f"it measures {threads} cells at a time, which mixes their times and memory: start it with --nthreads 1"
            )
        if self.code != code_at_start().fingerprint(self.modules, self.cell.methods, self.own):
            return (
                f"its code is not the client's ({', '.join(self.modules)}, {self.cell.methods}): bring both to the "
                "same commit, and start it anew, since it runs the code it began with"
            )
        if self.device != (here := models.resolve_device().type):
            return (
                f"it computes on {here} and the client on {self.device}, which the cells' number format follows: start "
                "both with a GPU, or both with CUDA_VISIBLE_DEVICES= (empty)"
            )
        lookups = _lookups(self.cell)
        for kind in self.named:
            if lookups[kind]() != getattr(self.cell, f"{kind}_sha256"):
                return f"its {kind} {getattr(self.cell, kind)!r} is not the client's: the sha256 differs"
        return None

    def unpack(self) -> functools.partial[Value]:
        """The measuring function."""
        keywords = {name: _loads(each) for name, each in self.keywords.items()}
        return functools.partial(_loads(self.function), *map(_loads, self.arguments), **keywords)


def _lookups(cell: Cell) -> dict[str, Callable[[], str]]:
    """How to find the sha256 of what a cell names, ``model`` and ``data``, where a machine could have another one.

    Names without a slash are the embedded model's, which is one file, or those of shapes and toys.
    """
    found: dict[str, Callable[[], str]] = {}
    if "/" in cell.model:
        found["model"] = lambda: models.identity(cell.model)
    if cell.data in texts.names():
        found["data"] = lambda: texts.load(cell.data).sha256
    return found


@contextmanager
def _by_value(module: str) -> Iterator[None]:
    """Pickle functions of a module outside the package with their code, as those of a notebook are in any case."""
    import cloudpickle

    if module == "__main__" or module not in sys.modules or module.partition(".")[0] == PACKAGE:
        yield
        return
    cloudpickle.register_pickle_by_value(sys.modules[module])
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[module])


def _dumps(value: object) -> bytes:
    import cloudpickle

    return cloudpickle.dumps(value)


@functools.lru_cache(maxsize=16)
def _loads(data: bytes) -> Any:
    """What was pickled; the same object for the next cell that has it, so that it keeps what it found out."""
    import cloudpickle

    return cloudpickle.loads(data)


def _measure(order: _Order) -> str:
    """On a worker: the line of a cell's record. Memory of the GPU that is held for later is given back to the others.

    Raises:
        ExecutorError: this worker must not measure it.
    """
    from distributed import get_worker

    if problem := order.problem(get_worker().state.nthreads):
        raise ExecutorError(problem)
    _come_to(order.cell.paper, order.cell.experiment)
    record, _ = measured(order.cell, order.unpack(), order.key, order.code)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return record.line()


@functools.lru_cache(maxsize=1)
def _come_to(paper: str, experiment: str) -> None:
    """Forget what was kept for the cells of another experiment: nothing happens while it stays the same one."""
    _forget()


def _forget() -> None:
    """Free what this process keeps for the next cells: of each kind the last reading, often gigabytes of a GPU.

    That is what functions of the experiments and tasks keep by ``lru_cache(maxsize=1)``. The model stays, which every
    experiment needs.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(_KEEPERS) and name != _COMMON:
            for kept in list(vars(module).values()):
                if isinstance(kept, functools._lru_cache_wrapper) and kept.cache_parameters()["maxsize"] == 1:
                    kept.cache_clear()
    free_memory()
